"""The feature cache: each image goes through the frozen CNN once, its features are kept on disk.

B images · S image positions · C backbone channels

A cache is `NAME.npy`, a float16 array (images, views, S, C), and `NAME.json`, which says what the
features were computed from. View 0 is the image itself, view 1 its mirror image; the others are
random crops, every second one mirrored (`dataset.is_mirrored`). The cache of many images is split
into files `NAME-00000.npy`, ..., each with its own .json; `NAME.json` then says how many images
each file has. Processes that need the same cache at once extract each file only once.

`util/cache.py` has the format of the files and how they are checked, `util/extraction.py` how they
are filled: an interrupted extraction continues where it stopped, and features that are damaged, or
whose image file has changed, are extracted again.

As a script, `python features.py --shards DIR` writes a dataset as tar shards (`shards.py`).
"""

import functools
import logging
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

# Before torch, which reads how its threads wait when it is loaded.
from util import threads  # noqa: F401

# isort: split
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataset import Loader, is_mirrored
from encoder import (
    TRANSFORM,
    Encoder,
    fingerprint,
    image_transform,
    multiplies_bfloat16,
    prepare_encoder,
)
from readers import DATASETS, Columns, Record, load_splits
from shards import write_shards
from util import cache, files, program
from util.cache import FeatureCache, digest
from util.extraction import bring_up_to_date, is_complete, is_started
from util.files import UserError
from util.images import UNREADABLE, read_image, report_left_out
from util.seeding import fork_seeded
from util.sources import read_source
from util.tars import check_allowed
from util.truncation import is_strict, set_strict

log = logging.getLogger(__name__)

MOST_IMAGES = 8192  # per file: 1.6 GB for one view of ResNet-50 features at 224 pixels


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
    The whole cache is read once and compared with its checksums, and the image files with what was
    read of them: what is damaged or has changed is extracted again, with a line in the log.
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
    report_other_sizes(path, f"{name}-{encoder.name}-{img_size}-*.json", description)
    parts = plan_files(path, description, len(records), batch_size, world)
    for number in sorted(range(len(parts)), key=lambda number: number % world != rank):
        file, rows = parts[number]
        contents = description
        if file != path:
            image_ids = [record.image_id for record in records[rows]]
            contents = description | {"image_ids": image_ids}
        not_started = sum(not is_started(each) for each, _ in parts)
        bring_up_to_date(records[rows], encode, file, contents, len(records), not_started)
    features = FeatureCache(path, description)
    report_left_out(features.left_out, len(records), "can't be read")
    return features


def describe(
    records: Sequence[Record],
    encoder: Encoder,
    img_size: int,
    amp: bool = False,
    views: int = 1,
) -> dict[str, Any]:
    """Return the description of a cache: everything that its features depend on."""
    image_ids = [record.image_id for record in records]
    # Images of other sizes in bytes have a cache of their own; -1: a link that leads nowhere.
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
        # Only where it is set: caches of other versions lack it.
        **({"strict": True} if is_strict() else {}),
    }


def report_other_sizes(path: Path, pattern: str, description: dict[str, Any]) -> None:
    """Log a line where there is a cache of the same images when their files had other sizes."""
    if is_started(path) or path.with_suffix(".json").exists():
        return
    for other in path.parent.glob(pattern):
        with suppress(UserError, AttributeError):
            found = files.read_json(other)
            if found.keys() >= description.keys() and all(
                found[key] == value for key, value in description.items() if key != "image_files"
            ):
                log.warning(
                    "image files have changed since %s was made: their features are extracted "
                    "into another cache; delete that one if you no longer need it",
                    other.with_suffix(".npy"),
                )


def plan_files(
    path: Path, description: dict[str, Any], images: int, batch_size: int, world: int
) -> list[tuple[Path, slice]]:
    """Return the files of a cache, each with the slice of the records that it holds.

    There are several files where there are many images or several processes. A plan that was
    already started is kept. All files but the last hold full batches: the batches, and with them
    the features, are the same however many files there are.
    """
    index = path.with_suffix(".json")
    if is_complete(path):  # without the lock: the folder may be read-only
        return [(path, slice(None))]
    if not (per_file := read_plan(index, description, images)):
        with files.lock(path.with_suffix(".lock")) as is_locked:
            if world > 1 and not is_locked:
                raise UserError(
                    f"several processes need locks to share a cache, and the file system of "
                    f"{path.parent} has none; give --cache-dir on another disk, or let one process "
                    "make the cache first"
                )
            if is_started(path):
                return [(path, slice(None))]
            if not (per_file := read_plan(index, description, images)):
                share = -(-images // world)
                per_file = batch_size * -(-min(MOST_IMAGES, share) // batch_size)
                if per_file >= images:
                    return [(path, slice(None))]
                if index.exists():
                    log.warning("%s is damaged: it is made again", index)
                plan = {"images": images, "images_per_file": per_file}
                files.write_json(index, description | plan)
    return cache.split_into_files(path, images, per_file)


def read_plan(index: Path, description: dict[str, Any], images: int) -> int | None:
    """Return how many images each file of a cache has; None where there is no valid plan."""
    if not index.exists():
        return None
    found = None
    with suppress(UserError):
        found = files.read_json(index)
    per_file = found.get("images_per_file") if isinstance(found, dict) else None
    if found == {**description, "images": images, "images_per_file": per_file} and (
        isinstance(per_file, int) and per_file > 0
    ):
        return per_file
    return None


class EncodedBatch(NamedTuple):
    """The features of consecutive images.

    `features` (B, views, S, C) float16, zeros for an image that can't be read; `unreadable`: the
    ids of those; `seeds` (B): a checksum of each image's pixels (view 0), the seed with which
    captions of it are sampled; `sources` (B): `sources.read_source` of each image file.
    """

    features: Tensor
    unreadable: list[str | int]
    seeds: list[int]
    sources: list[str]


def encode_images(
    records: Sequence[Record],
    encoder: Encoder,
    img_size: int,
    device: torch.device | str = "cpu",
    batch_size: int = 32,
    workers: int = 2,
    amp: bool = False,
    views: int = 1,
    at_least: int | None = None,
) -> Iterator[EncodedBatch]:
    """Yield the features of `views` of each image, batch by batch, in the order of `records`.

    With `amp` the CNN runs in bfloat16. `at_least`: pixels per side that reading an image must keep
    (default: `img_size`; for an ensemble, the largest).
    """
    images = ImageViews(records, img_size, views, at_least)
    loader = Loader(
        images,
        batch_size,
        num_workers=min(workers, len(records)),
        pin_memory=torch.device(device).type == "cuda",
    )
    encode = prepare_encoder(encoder, device, torch.bfloat16 if amp else torch.float32)
    start = 0
    for pixels, seeds, readable, sources in loader:
        with torch.no_grad():  # not around the yield: it would apply to the caller's code too
            features = encode(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2])
        lost = (~readable).nonzero()[:, 0].tolist()
        features[lost] = 0
        unreadable = [records[start + row].image_id for row in lost]
        start += len(features)
        # float16 ends at 65,504: beyond it is infinity.
        features = features.clamp(-65504, 65504).half()
        yield EncodedBatch(features, unreadable, seeds.tolist(), list(sources))


class ImageViews(Dataset):
    """Each image as (pixels (views, 3, H, W), seed, whether it could be read, source)."""

    def __init__(
        self, records: Sequence[Record], img_size: int, views: int, at_least: int | None = None
    ):
        self.records, self.img_size, self.views = records, img_size, views
        self.resize = image_transform(img_size, train=False)
        self.at_least = at_least or self.resize.at_least
        self.random_crop = image_transform(img_size, train=True)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, int, bool, str]:
        record = self.records[index]
        source = read_source(record.path)  # first: a change after it will be noticed
        try:
            image = read_image(record.path, self.at_least)
        except UNREADABLE:
            return torch.zeros(self.views, 3, self.img_size, self.img_size), 0, False, source
        original = self.resize(image)
        views = []
        for view in range(self.views):
            pixels = original
            if view >= 2:
                with fork_seeded("view", view, record.image_id):
                    pixels = self.random_crop(image)
            views.append(pixels.flip(-1) if is_mirrored(view) else pixels)
        # The same seed as inference.Captioner's, so that both sample the same captions.
        return torch.stack(views), zlib.crc32(original.contiguous().numpy()), True, source


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
    image_column: str | None = None
    """Column of a table (--dataset csv) that has the images' names, where it is not found."""
    caption_column: str | None = None
    """Column of a table that has the captions."""
    strict: bool = False
    """Leave out images that lack their last bytes."""
    shard_size: int = 1000
    """Images in a shard."""
    seed: int = 0
    """Seed of the order in which images are put into shards."""
    limit: int | None = None
    """Use only this many images of each split, for quick trials."""
    workers: int | None = None
    """Threads that read images (default: one for each CPU that this process may use)."""
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
    config = program.parse(
        Config, argv, program="features.py", description="Write a dataset as tar shards."
    )
    files.check_output(config.json, [".json"], [config.shards / "index.json"])
    files.check_replaceable(config.json, lists_shards, "a list of shards")
    files.check_writable(config.shards / "index.json")
    set_strict(config.strict)
    columns = Columns(config.image_column, config.caption_column)
    where = (config.dataset, config.data_dir, config.split_seed)
    splits = load_splits(*where, columns=columns)
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
    folder = program.printable(config.shards)
    print(f"train from them: python train.py --dataset shards --data-dir {folder}")
    if config.json:
        files.write_json(config.json, {"dataset": index["dataset"], "splits": written})


if __name__ == "__main__":
    program.run(main)
