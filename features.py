"""The feature cache: each image goes through the frozen CNN once, its features are kept on disk.

B images · S image positions · C backbone channels

A cache is `NAME.npy`, a memory-mapped float16 array (images, views, S, C), and `NAME.json`, which
says what the features were computed from. View 0 is the image itself, view 1 its mirror image; the
others are random crops, every second one mirrored (`dataset.is_mirrored`). The cache of many images
is split into files `NAME-00000.npy`, ..., each with its own .json; `NAME.json` then says how many
images each file has. An interrupted extraction continues where it stopped. Processes that need the
same cache at once extract each file only once.

As a script, `python features.py --shards DIR` writes a dataset as tar shards (`shards.py`).
"""

import errno
import functools
import hashlib
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from dataset import Loader, is_mirrored
from encoder import (
    TRANSFORM,
    Encoder,
    fingerprint,
    fold_batch_norm,
    image_transform,
    multiplies_bfloat16,
)
from readers import DATASETS, Record, load_splits
from shards import write_shards
from util import files
from util.files import UserError
from util.images import UNREADABLE, are_too_many, read_image, report_left_out
from util.seeding import fork_seeded
from util.tars import check_allowed

SAVE_EVERY = 16  # batches between two notes of how far an extraction has come
MOST_IMAGES = 8192  # per file: 1.6 GB for one view of ResNet-50 features at 224 pixels


class FeatureCache:
    """The features of images by image id, read from disk on demand.

    Raises UserError where the cache was made from something else than `expected`, or is damaged.
    """

    def __init__(self, path: Path, expected: dict[str, Any] | None = None):
        """`path`: the cache's .npy file; `expected`: entries that its description must have."""
        self.path = path
        description = self.description
        if (
            not isinstance(description, dict)
            or "image_ids" not in description
            or not description.keys() & {"left_out", "images_per_file"}
        ):
            raise UserError(f"{path.with_suffix('.json')} does not describe a feature cache")
        for key, wanted in (expected or {}).items():
            found = description.get(key)
            if found != wanted:
                raise UserError(
                    f"the feature cache {path} has {key} {abbreviate(found)}, but "
                    f"{abbreviate(wanted)} is wanted; delete it, or use another --cache-dir"
                )
        self.paths = [path]
        if "images_per_file" in description:
            sizes = description["images"], description["images_per_file"]
            self.paths = [file for file, _ in split_into_files(path, *sizes)]
        self.arrays = []
        for file in self.paths:
            try:
                # Unlike np.load, open_memmap accepts no other format: neither pickles nor archives.
                self.arrays.append(np.lib.format.open_memmap(file, mode="r"))
            except ValueError as error:
                raise UserError(
                    f"the feature cache {file} is damaged ({error}); delete it, and it will be "
                    "made again"
                ) from error
        self.images_per_file = len(self.arrays[0])  # the last file may have fewer
        image_ids: list[str | int] = []
        self.left_out: list[str | int] = []  # images that could not be read: rows of zeros
        for file in self.paths:
            contents = files.read_json(file.with_suffix(".json"))
            image_ids += contents["image_ids"]
            self.left_out += contents["left_out"]
        lost = set(self.left_out)
        self.rows = {name: row for row, name in enumerate(image_ids) if name not in lost}

    def __len__(self) -> int:
        return len(self.rows)

    def __contains__(self, image_id: str | int) -> bool:
        return image_id in self.rows

    def __reduce__(self) -> tuple:
        return FeatureCache, (self.path,)  # a worker process maps the files again, without a copy

    @property
    def description(self) -> Any:
        """What the .json file says, read from disk each time because the ids may be many."""
        return files.read_json(self.path.with_suffix(".json"))

    def get(self, image_id: str | int, view: int = 0) -> Tensor:
        """Return the features (S, C) of an image, float16; KeyError for an unknown id."""
        file, row = divmod(self.rows[image_id], self.images_per_file)
        return torch.from_numpy(np.array(self.arrays[file][row, view]))


def abbreviate(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]}… (sha {digest(text)[:8]})"


def digest(text: str) -> str:
    """Return the SHA-256 of `text`, which may hold lone surrogates, in hex digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def cached_features(
    records: Sequence[Record],
    encoder: Encoder,
    img_size: int,
    folder: Path,
    name: str,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 32,
    workers: int = 2,
    amp: bool = False,
    views: int = 1,
    rank: int = 0,
    world: int = 1,
) -> FeatureCache:
    """Return the cache of `records` in `folder`; features that are not there yet are extracted.

    `views` of each image are kept. With `amp` the CNN runs in bfloat16 where the device supports
    it: about twice as fast, and the features differ in the third digit. The file name is `name` and
    a digest of the description, so that caches of other weights, sizes or images lie side by side.
    Raises UserError where too many images cannot be read.

    If `world` processes call this at once, each extracts its share of the files and then waits for
    the others (and takes over the files of those that have ended).
    """
    if not records:
        raise UserError(f"there are no images to encode for {name}")
    amp = amp and multiplies_bfloat16(torch.device(device))
    description = describe(records, encoder, img_size, amp, views)
    key = digest(repr(sorted(description.items())))[:10]
    path = folder / f"{name}-{encoder.name}-{img_size}-{key}.npy"
    batch_size = max(1, batch_size // views)
    encode = functools.partial(
        encode_images,
        encoder=encoder,
        img_size=img_size,
        device=device,
        batch_size=batch_size,
        workers=workers,
        amp=amp,
        views=views,
    )
    parts = plan_files(path, description, len(records), batch_size, world)
    for file, rows in [*parts[rank::world], *parts]:
        with files.lock(file.with_suffix(".lock")):
            if file.exists() and file.with_suffix(".json").exists():
                continue
            contents = description
            if file != path:
                image_ids = [record.image_id for record in records[rows]]
                contents = description | {"image_ids": image_ids}
            not_started = sum(not is_started(each) for each, _ in parts)
            extract(records[rows], encode, file, contents, len(records), not_started)
    cache = FeatureCache(path, description)
    try:
        report_left_out(cache.left_out, len(records), "can't be read")
    except UserError:  # once the images are repaired, their files must be extracted again
        for file in cache.paths:
            if files.read_json(file.with_suffix(".json"))["left_out"]:
                remove(file.with_suffix(".json"), file)
        raise
    return cache


def describe(
    records: Sequence[Record],
    encoder: Encoder,
    img_size: int,
    amp: bool = False,
    views: int = 1,
) -> dict[str, Any]:
    """Return the description of a cache: everything that its features depend on."""
    image_ids = [record.image_id for record in records]
    # The size in bytes shows that an image file was replaced; -1: a link that leads nowhere.
    sizes = [r.path.stat().st_size if r.path.exists() else -1 for r in records]
    lines = [f"{image_id} {size}" for image_id, size in zip(image_ids, sizes, strict=True)]
    if len(records) > MOST_IMAGES:  # several files, each of which lists its own ids
        image_ids = digest("".join(f"{image_id!r}," for image_id in image_ids))
    return {
        "backbone": encoder.name,
        "weights": fingerprint(encoder),
        "img_size": img_size,
        "grid": encoder.grid,
        "precision": "bfloat16" if amp else "float32",
        "transform": TRANSFORM,
        "views": views,
        "image_ids": image_ids,
        "image_files": digest("\n".join(lines)),
    }


def plan_files(
    path: Path, description: dict[str, Any], images: int, batch_size: int, world: int
) -> list[tuple[Path, slice]]:
    """Return the files of a cache, each with the slice of the records that it holds.

    There are several files where there are many images or several processes. A plan that was
    already started is kept. All files but the last hold full batches: the batches, and with them
    the features, are the same however many files there are.
    """
    index = path.with_suffix(".json")
    with files.lock(path.with_suffix(".lock")):
        if is_started(path):
            return [(path, slice(None))]
        planned = files.read_json(index) if index.exists() else None
        per_file = planned.get("images_per_file") if isinstance(planned, dict) else None
        if not per_file:
            share = -(-images // world)
            per_file = batch_size * -(-min(MOST_IMAGES, share) // batch_size)
            if per_file >= images:
                return [(path, slice(None))]
            files.write_json(index, description | {"images": images, "images_per_file": per_file})
    return split_into_files(path, images, per_file)


def split_into_files(path: Path, images: int, per_file: int) -> list[tuple[Path, slice]]:
    """Return the files of a cache of several, each with the slice of the images that it holds."""
    return [
        (path.with_name(f"{path.stem}-{number:05}.npy"), slice(start, start + per_file))
        for number, start in enumerate(range(0, images, per_file))
    ]


def is_started(path: Path) -> bool:
    return path.exists() or path.with_suffix(".part").exists()


def extract(
    records: Sequence[Record],
    encode: Callable[[Sequence[Record]], Iterator["EncodedBatch"]],
    path: Path,
    description: dict[str, Any],
    total: int,
    not_started: int,
) -> None:
    """Write the features of `records` to `path` and their description beside it.

    Until all are there, the features are in a .part file, and .progress says how many of its rows
    are valid. The cache has `total` images in all its files, `not_started` of which are still to
    come: the disk must have room for those.
    """
    part, progress = path.with_suffix(".part"), path.with_suffix(".progress")
    if path.exists():  # killed before the .json was written, or the .json was deleted
        path.replace(part)
    array, done, left_out = None, 0, []
    if part.exists() and progress.exists():
        noted = files.read_json(progress)
        done, left_out = noted["done"], noted["left_out"]
        array = np.lib.format.open_memmap(part, mode="r+")
    else:  # neither is of use without the other
        remove(part, progress)

    def save_progress() -> None:
        array.flush()
        files.write_json(progress, {"done": done, "left_out": left_out})

    bar = tqdm(total=len(records), initial=done, desc=path.stem, unit=" images", disable=None)
    try:
        for number, batch in enumerate(encode(records[done:]), 1):
            rows = len(batch.features)
            if array is None:
                array = new_array(part, (len(records), *batch.features.shape[1:]), not_started)
            array[done : done + rows] = batch.features.cpu().numpy()
            done, left_out = done + rows, left_out + batch.unreadable
            bar.update(rows)
            if are_too_many(len(left_out), total):
                array = None
                remove(part, progress)
                report_left_out(left_out, total, "can't be read")
            if number % SAVE_EVERY == 0 or done == len(records):
                save_progress()
    except KeyboardInterrupt:  # Ctrl-C or SIGTERM: no image is encoded twice
        if array is not None:
            save_progress()
        raise
    finally:
        bar.close()
    array = None  # Windows can't rename a file that is mapped
    part.replace(path)
    files.write_json(path.with_suffix(".json"), {**description, "left_out": left_out})
    remove(progress)


def remove(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def new_array(path: Path, shape: tuple[int, ...], count: int) -> np.ndarray:
    """Return a new .npy file as an array; OSError if the disk has no room for `count` of them."""
    needed = 2 * int(np.prod(shape)) * max(1, count)  # bytes: 2 per number
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(
            f"the feature cache {path} needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are "
            "free; make room or give --cache-dir on another disk"
        )
    array = None
    try:
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
        # A mapped file has no blocks until it is written to. If the disk were full by then, the
        # process would end with a bus error.
        if hasattr(os, "posix_fallocate"):
            with open(path, "rb+") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        # Some file systems cannot allocate in advance; the array is usable all the same.
        if array is None or error.errno in (errno.ENOSPC, errno.EDQUOT):
            path.unlink(missing_ok=True)
            raise files.write_error(error.errno, path) from error
    return array


class EncodedBatch(NamedTuple):
    """The features of consecutive images.

    `features` (B, views, S, C) float16, zeros for an image that can't be read; `unreadable`: the
    ids of those; `seeds` (B): a checksum of each image's pixels (view 0), the seed with which
    captions of it are sampled.
    """

    features: Tensor
    unreadable: list[str | int]
    seeds: list[int]


def encode_images(
    records: Sequence[Record],
    encoder: Encoder,
    img_size: int,
    device: torch.device | str = "cpu",
    batch_size: int = 32,
    workers: int = 2,
    amp: bool = False,
    views: int = 1,
) -> Iterator[EncodedBatch]:
    """Yield the features of `views` of each image, batch by batch, in the order of `records`.

    With `amp` the CNN runs in bfloat16.
    """
    images = ImageViews(records, img_size, views)
    loader = Loader(images, batch_size, num_workers=min(workers, len(records)))
    dtype = torch.bfloat16 if amp else torch.float32
    encoder = fold_batch_norm(encoder).to(device, dtype)
    start = 0
    for pixels, seeds, readable in loader:
        with torch.no_grad():  # not around the yield: it would apply to the caller's code too
            pixels = pixels.to(device, dtype, non_blocking=True)
            features = encoder(pixels.flatten(0, 1)).float().unflatten(0, pixels.shape[:2])
        lost = (~readable).nonzero()[:, 0].tolist()
        features[lost] = 0
        unreadable = [records[start + row].image_id for row in lost]
        start += len(features)
        # float16 ends at 65,504: beyond it is infinity.
        yield EncodedBatch(features.clamp(-65504, 65504).half(), unreadable, seeds.tolist())


class ImageViews(Dataset):
    """Each image as (pixels (views, 3, H, W), seed, whether it could be read)."""

    def __init__(self, records: Sequence[Record], img_size: int, views: int):
        self.records, self.img_size, self.views = records, img_size, views
        self.resize = image_transform(img_size, train=False)
        self.random_crop = image_transform(img_size, train=True)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, int, bool]:
        record = self.records[index]
        try:
            image = read_image(record.path)
        except UNREADABLE:
            return torch.zeros(self.views, 3, self.img_size, self.img_size), 0, False
        original = self.resize(image)
        views = []
        for view in range(self.views):
            pixels = original
            if view >= 2:
                with fork_seeded("view", view, record.image_id):
                    pixels = self.random_crop(image)
            views.append(pixels.flip(-1) if is_mirrored(view) else pixels)
        # The same seed as inference.Captioner's, so that both sample the same captions.
        return torch.stack(views), zlib.crc32(original.contiguous().numpy()), True


# ---- script ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """The flags of this script."""

    shards: Path
    """Write the dataset as WebDataset tar shards into this folder."""
    dataset: Literal[tuple(DATASETS)] = "flickr8k"
    """Dataset to write."""
    data_dir: str | None = None
    """Folder of the dataset's own files (default: data/DATASET)."""
    allow_commands: bool = False
    """Let --data-dir pipe:COMMAND run its command."""
    split_seed: int = 0
    """Seed of the split where the dataset has none of its own."""
    shard_size: int = 1000
    """Images in a shard."""
    seed: int = 0
    """Seed of the order in which images are put into shards."""
    limit: int | None = None
    """Use only this many images of each split, for quick trials."""
    workers: int | None = None
    """Threads that read images (default: one for each processor)."""
    json: Path | None = None
    """Write the images and captions of each shard to this JSON file."""

    def __post_init__(self) -> None:
        for name in ("shard_size", "limit", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")
        check_allowed(self.data_dir, self.allow_commands)


def lists_shards(path: Path) -> bool:
    """Return whether a file is one that `--json` wrote."""
    value = files.read_json(path)
    return isinstance(value, dict) and value.keys() == {"dataset", "splits"}


def main(argv: list[str] | None = None) -> None:
    """Write the splits that the dataset has as tar shards."""
    config = files.parse(
        Config, argv, program="features.py", description="Write a dataset as tar shards."
    )
    files.check_output(config.json, [".json"], [config.shards / "index.json"])
    files.check_replaceable(config.json, lists_shards, "a list of shards")
    files.check_writable(config.shards / "index.json")
    splits = load_splits(config.dataset, config.data_dir, config.split_seed)
    if not splits:
        raise UserError(f"{config.dataset} has no split to write")
    index = write_shards(
        {split: records[: config.limit] for split, records in splits.items()},
        config.shards,
        config.dataset,
        shard_size=config.shard_size,
        seed=config.seed,
        workers=config.workers,
    )
    written = {split: part["shards"] for split, part in index["splits"].items()}
    for split, parts in written.items():
        images, captions = (sum(one[name] for one in parts) for name in ("images", "captions"))
        print(f"{split}: {images} images with {captions} captions in {len(parts)} shards")
    folder = files.printable(config.shards)
    print(f"train from them: python train.py --dataset shards --data-dir {folder}")
    if config.json:
        files.write_json(config.json, {"dataset": index["dataset"], "splits": written})


if __name__ == "__main__":
    files.run(main)
