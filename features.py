"""The feature cache: each image goes through the frozen CNN once, and its features are kept.

B images · S image positions · C backbone channels

A cache is `NAME.npy`, float16 (images, views, S, C), memory-mapped, with `NAME.json` saying what
made it. View 0 is the image itself, 1 its mirror image, the others are random parts of it, those
of odd number mirrored. A cache of many images is several such pairs, `NAME-00000.npy` and so on,
each made on its own, and a `NAME.json` that says how many images each has. A killed extraction goes
on where it stopped; processes that want the same cache build each file of it once.

As a script it prepares another form of data: `python features.py --shards DIR` writes a dataset as
tar shards (`shard_writer.py`).
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from compact import Places
from dataset import Loader
from encoder import (
    TRANSFORM,
    Encoder,
    fingerprint,
    folded,
    image_transform,
    multiplies_bfloat16,
)
from readers import MAX_LEFT_OUT, UNREADABLE, Record, report_left_out
from shard_writer import main
from util import files
from util.files import UserError
from util.images import read_image
from util.seeding import fork_seeded

SAVE_EVERY = 16  # batches between two notes of how far the extraction has come
MOST_IMAGES = 8192  # in one file: 1.6 GB of one view by ResNet-50 at 224 pixels


class FeatureCache:
    """Features by image id, read from disk as they are asked for.

    Raises ValueError where the file beside it says that something else made it, and where a file
    is damaged.
    """

    def __init__(self, path: Path, expected: dict[str, Any] | None = None):
        """`path` is the .npy file; `expected` what its description must say, entry by entry."""
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
                    f"the feature cache {path} has {key} {_short(found)}, but {_short(wanted)} is "
                    "wanted; delete it, or use another --cache-dir"
                )
        self.paths, self.per_file = [path], None
        if "images_per_file" in description:
            self.per_file = description["images_per_file"]
            self.paths = [part for part, _ in _parts(path, description["images"], self.per_file)]
        self.arrays = [_mapped(each) for each in self.paths]
        self.left_out: dict[str | int, None] = {}
        self.rows = Places(self._ids(), without=self.left_out)

    def _ids(self) -> Iterator[str | int]:
        """Yield all image ids; those of a file that are left out are noted before its first."""
        for path in self.paths:
            about = files.read_json(path.with_suffix(".json"))
            self.left_out.update(dict.fromkeys(about["left_out"]))
            yield from about["image_ids"]

    def __reduce__(self) -> tuple:
        return FeatureCache, (self.path,)  # a worker process maps the file itself, not a copy

    def __contains__(self, image_id: str) -> bool:
        return self.rows.find(image_id) is not None

    @property
    def description(self) -> Any:
        """What the cache's .json says, read anew: it may hold many ids."""
        return files.read_json(self.path.with_suffix(".json"))

    @property
    def array(self) -> np.ndarray:
        """The features (images, views, S, C) of the first file."""
        return self.arrays[0]

    def get(self, image_id: str, view: int = 0) -> Tensor:
        """Return the features (S, C) of an image, float16."""
        row = self.rows.find(image_id)
        if row is None:
            raise KeyError(image_id)
        file, place = divmod(row, self.per_file) if self.per_file else (0, row)
        return torch.from_numpy(np.array(self.arrays[file][place, view]))


def _mapped(path: Path) -> np.ndarray:
    try:
        return np.lib.format.open_memmap(path, mode="r")  # np.load takes other kinds too
    except ValueError as error:
        raise UserError(
            f"the feature cache {path} is damaged ({error}); delete it to have it made anew"
        ) from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]}… (sha {_digest(text)[:8]})"


def _digest(text: str) -> str:
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
    """Return the cache of `records` in `folder`, extracting what is not there yet.

    `views` of each image are kept. With `amp` the CNN works in bfloat16 where the device is made
    for it: about twice as fast, and the features differ in the third digit.
    The file is called `name` and a digest of what makes it, so a cache of other weights, sizes or
    images can lie beside it. Raises ValueError when over 1 % of the images cannot be read.

    Of `world` processes that call this at once each builds its share of the files, then waits for
    the others' (and builds what they, gone meanwhile, left undone).
    """
    if not records:
        raise UserError(f"there are no images to encode for {name}")
    amp = amp and multiplies_bfloat16(torch.device(device))
    description = describe(records, encoder, img_size, amp, views)
    key = _digest(repr(sorted(description.items())))[:10]
    path = folder / f"{name}-{encoder.name}-{img_size}-{key}.npy"
    batch_size = max(1, batch_size // views)
    parts = _planned(path, description, len(records), batch_size, world)
    for part, rows in [*parts[rank::world], *parts]:
        with files.lock(part.with_suffix(".lock")):
            if _finished(part):
                continue
            chosen, about = records[rows], description
            if part != path:
                about = description | {"image_ids": [record.image_id for record in chosen]}
            new = [each for each, _ in parts if not _begun(each)]
            how = {"device": device, "batch_size": batch_size, "workers": workers, "amp": amp}
            _extract(chosen, encoder, part, about, len(records), len(new), **how)
    cache = FeatureCache(path, description)
    if len(cache.left_out) > MAX_LEFT_OUT * len(records):  # together; repaired, they are read anew
        for part in cache.paths:
            if files.read_json(part.with_suffix(".json"))["left_out"]:
                _discard(part.with_suffix(".json"), part)
    report_left_out(list(cache.left_out), len(records), "can't be read")
    return cache


def _planned(
    path: Path, description: dict[str, Any], images: int, batch_size: int, world: int
) -> list[tuple[Path, slice]]:
    """Return the files of a cache, each with its part of the records; begun ones stay as planned.

    Several files where there are many images or several processes. All but the last hold whole
    batches, so that features are the same however many there are.
    """
    index = path.with_suffix(".json")
    with files.lock(path.with_suffix(".lock")):
        if _begun(path):
            return [(path, slice(None))]
        about = files.read_json(index) if index.exists() else None
        planned = about.get("images_per_file") if isinstance(about, dict) else None
        if not planned:
            planned = batch_size * -(-min(MOST_IMAGES, -(-images // world)) // batch_size)
            if planned >= images:
                return [(path, slice(None))]
            files.write_json(index, description | {"images": images, "images_per_file": planned})
    return _parts(path, images, planned)


def _parts(path: Path, images: int, per_file: int) -> list[tuple[Path, slice]]:
    return [
        (path.with_name(f"{path.stem}-{number:05}.npy"), slice(start, start + per_file))
        for number, start in enumerate(range(0, images, per_file))
    ]


def _begun(path: Path) -> bool:
    return path.exists() or path.with_suffix(".part").exists()


def _finished(path: Path) -> bool:
    return path.exists() and path.with_suffix(".json").exists()


def describe(
    records: Sequence[Record],
    encoder: Encoder,
    img_size: int,
    amp: bool = False,
    views: int = 1,
) -> dict[str, Any]:
    """Return what a cache of these images by this encoder must say of itself."""
    seen, ids, names = hashlib.sha256(), hashlib.sha256(), []
    for number, record in enumerate(records):
        line = f"{record.image_id} {_size(record.path)}"
        seen.update(("\n" * bool(number) + line).encode("utf-8", "surrogatepass"))
        ids.update(f"{record.image_id!r},".encode())
        if len(records) <= MOST_IMAGES:
            names.append(record.image_id)
    return {
        "backbone": encoder.name,
        "weights": fingerprint(encoder),
        "img_size": img_size,
        "grid": encoder.grid,
        "precision": "bfloat16" if amp else "float32",
        "transform": TRANSFORM,
        "views": views,
        "image_ids": names or ids.hexdigest(),  # of many, each file has its own
        "image_files": seen.hexdigest(),
    }


def _size(path: Path) -> int:
    """Return the bytes of a file, -1 where it is gone (a link that leads nowhere)."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def _extract(
    records: Sequence[Record],
    encoder: Encoder,
    path: Path,
    description: dict[str, Any],
    total: int,
    new: int,
    **how: Any,
) -> None:
    """Fill the cache at `path`; on return the .npy is complete and the .json says so.

    Until then features are in a .part file, and .progress says how many of its rows are good.
    All files together hold `total` images, `new` of them are still to be begun: the disk must have
    room for those. `how` is for `encode_images`.
    """
    part, progress = path.with_suffix(".part"), path.with_suffix(".progress")
    if path.exists():  # killed just before its .json was written, or somebody deleted that
        path.replace(part)
    array, done, lost = _resumed(part, progress)
    bar = tqdm(total=len(records), initial=done, desc=path.stem, unit=" images", disable=None)
    batches = encode_images(
        records[done:],
        encoder,
        description["img_size"],
        views=description["views"],
        **how,
    )

    def note() -> None:
        array.flush()
        files.write_json(progress, {"done": done, "left_out": lost})

    try:
        for number, (features, unread) in enumerate(batches, 1):
            if array is None:
                array = _new_array(part, (len(records), *features.shape[1:]), new)
            array[done : done + len(features)] = features.cpu().numpy()
            done, lost = done + len(features), lost + unread
            bar.update(len(features))
            if len(lost) > MAX_LEFT_OUT * total:
                array = None
                _discard(part, progress)
                report_left_out(lost, total, "can't be read")
            if number % SAVE_EVERY == 0 or done == len(records):
                note()
    except KeyboardInterrupt:  # Ctrl-C or SIGTERM: nothing that is done is done again
        if array is not None:
            note()
        raise
    finally:
        bar.close()
    array = None
    part.replace(path)
    files.write_json(path.with_suffix(".json"), {**description, "left_out": lost})
    _discard(progress)


def _resumed(part: Path, progress: Path) -> tuple[np.ndarray | None, int, list[str]]:
    """Return the array of an extraction that was stopped, its good rows, and the ids left out."""
    if not (part.exists() and progress.exists()):
        _discard(part, progress)  # one without the other is worth nothing
        return None, 0, []
    noted = files.read_json(progress)
    return np.lib.format.open_memmap(part, mode="r+"), noted["done"], noted["left_out"]


def _discard(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _new_array(path: Path, shape: tuple[int, ...], count: int) -> np.ndarray:
    """Return a new .npy file as an array; OSError where the disk has no room for `count` such."""
    needed = 2 * int(np.prod(shape)) * max(1, count)
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise OSError(
            f"the feature cache {path} needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are "
            "free; make room or give --cache-dir on another disk"
        )
    array = None
    try:
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
        # A mapped file has no blocks until it is written to; a disk that is full by then would
        # end the process with a bus error.
        if hasattr(os, "posix_fallocate"):
            with open(path, "rb+") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:  # file systems that can't do it are no reason to stop
        if array is None or error.errno in (errno.ENOSPC, errno.EDQUOT):
            path.unlink(missing_ok=True)
            raise files.write_error(error.errno, path) from error
    return array


def encode_images(
    records: Sequence[Record],
    encoder: Encoder,
    img_size: int,
    device: torch.device | str = "cpu",
    batch_size: int = 32,
    workers: int = 2,
    amp: bool = False,
    views: int = 1,
) -> Iterator[tuple[Tensor, list[str]]]:
    """Yield features (B, views, S, C) in float16, batch by batch, and which ids can't be read.

    An image that can't be read has a row of zeros, so rows stay with their records. With `amp`
    the CNN works in bfloat16.
    """
    loader = Loader(
        _Pixels(records, img_size, views),
        batch_size,
        num_workers=min(workers, len(records)),
        collate_fn=_stack,
    )
    dtype = torch.bfloat16 if amp else torch.float32
    encoder = folded(encoder).to(device, dtype)
    for images, unread in loader:
        with torch.no_grad():  # not around the yield: it would reach into the caller
            images = images.to(device, dtype, non_blocking=True)
            features = encoder(images.flatten(0, 1)).float().unflatten(0, images.shape[:2])
        lost = [row for row, image_id in enumerate(unread) if image_id is not None]
        features[lost] = 0
        # float16 ends at 65,504; beyond it lies infinity.
        yield features.clamp(-65504, 65504).half(), [unread[row] for row in lost]


class _Pixels(Dataset):
    """Records as views (views, 3, H, W) and None; if unreadable, grey pixels and the image's id."""

    def __init__(self, records: Sequence[Record], img_size: int, views: int):
        self.records, self.img_size, self.views = records, img_size, views
        self.whole, self.part = (image_transform(img_size, train=crop) for crop in (False, True))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, str | None]:
        record = self.records[index]
        try:
            image = read_image(record.path)
        except UNREADABLE:
            return torch.zeros(self.views, 3, self.img_size, self.img_size), record.image_id
        return torch.stack([self.see(image, record.image_id, v) for v in range(self.views)]), None

    def see(self, image: Any, image_id: str, view: int) -> Tensor:
        """Return a view (3, H, W) of the image, the same each time."""
        if view < 2:
            pixels = self.whole(image)
        else:
            with fork_seeded("view", view, image_id):
                pixels = self.part(image)
        return pixels.flip(-1) if view % 2 else pixels


def _stack(items: Sequence[tuple[Tensor, str | None]]) -> tuple[Tensor, list[str | None]]:
    pixels, unread = zip(*items, strict=True)
    return torch.stack(pixels), list(unread)


if __name__ == "__main__":
    files.run(main)
