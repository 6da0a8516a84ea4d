"""The feature cache: each image goes through the frozen CNN once, and its features are kept.

B images · S image positions · C backbone channels

A cache is `NAME.npy`, float16 (images, views, S, C), memory-mapped, with `NAME.json` saying what
made it. View 0 is the image itself, 1 its mirror image, the others are random parts of it, those
of odd number mirrored. A killed extraction goes on where it stopped; two processes that want the
same cache build it once.
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

import files
from dataset import Loader, seeded
from encoder import (
    TRANSFORM,
    Encoder,
    fingerprint,
    folded,
    image_transform,
    multiplies_bfloat16,
)
from images import read_image
from records import MAX_LEFT_OUT, UNREADABLE, Record, leave_out

SAVE_EVERY = 16  # batches between two notes of how far the extraction has come


class FeatureCache:
    """Features by image id, read from disk as they are asked for.

    Raises ValueError where the file beside it says that something else made it, and where a file
    is damaged.
    """

    def __init__(self, path: Path, expected: dict[str, Any] | None = None):
        """`path` is the .npy file; `expected` what its description must say, entry by entry."""
        self.path = path
        self.description = files.read_json(path.with_suffix(".json"))
        if not isinstance(self.description, dict) or not {"image_ids", "left_out"} <= set(
            self.description
        ):
            raise ValueError(f"{path.with_suffix('.json')} does not describe a feature cache")
        for key, wanted in (expected or {}).items():
            found = self.description.get(key)
            if found != wanted:
                raise ValueError(
                    f"the feature cache {path} has {key} {_short(found)}, but {_short(wanted)} is "
                    "wanted; delete it, or use another --cache-dir"
                )
        try:
            self.array = np.lib.format.open_memmap(path, mode="r")  # np.load takes other kinds too
        except ValueError as error:
            raise ValueError(
                f"the feature cache {path} is damaged ({error}); delete it to have it made anew"
            ) from error
        left_out = set(self.description["left_out"])
        self.rows = {
            image_id: row
            for row, image_id in enumerate(self.description["image_ids"])
            if image_id not in left_out
        }

    def __reduce__(self) -> tuple:
        return FeatureCache, (self.path,)  # a worker process maps the file itself, not a copy

    def __contains__(self, image_id: str) -> bool:
        return image_id in self.rows

    def get(self, image_id: str, view: int = 0) -> Tensor:
        """Return the features (S, C) of an image, float16."""
        return torch.from_numpy(np.array(self.array[self.rows[image_id], view]))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]}… (sha {_digest(text)[:8]})"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


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
) -> FeatureCache:
    """Return the cache of `records` in `folder`, extracting what is not there yet.

    `views` of each image are kept. With `amp` the CNN works in bfloat16 where the device is made
    for it: about twice as fast, and the features differ in the third digit.
    The file is called `name` and a digest of what makes it, so a cache of other weights, sizes or
    images can lie beside it. Raises ValueError when over 1 % of the images cannot be read.
    """
    if not records:
        raise ValueError(f"there are no images to encode for {name}")
    amp = amp and multiplies_bfloat16(torch.device(device))
    description = describe(records, encoder, img_size, amp, views)
    key = _digest(repr(sorted(description.items())))[:10]
    path = folder / f"{name}-{encoder.name}-{img_size}-{key}.npy"
    with files.lock(path.with_suffix(".lock")):
        if not (path.exists() and path.with_suffix(".json").exists()):
            _extract(records, encoder, path, description, device, batch_size, workers, amp)
    cache = FeatureCache(path, description)
    leave_out(cache.description["left_out"], len(records), "can't be read")
    return cache


def describe(
    records: Sequence[Record],
    encoder: Encoder,
    img_size: int,
    amp: bool = False,
    views: int = 1,
) -> dict[str, Any]:
    """Return what a cache of these images by this encoder must say of itself."""
    files_seen = [f"{record.image_id} {_size(record.path)}" for record in records]
    return {
        "backbone": encoder.name,
        "weights": fingerprint(encoder),
        "img_size": img_size,
        "grid": encoder.grid,
        "precision": "bfloat16" if amp else "float32",
        "transform": TRANSFORM,
        "views": views,
        "image_ids": [record.image_id for record in records],
        "image_files": _digest("\n".join(files_seen)),
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
    device: torch.device | str,
    batch_size: int,
    workers: int,
    amp: bool,
) -> None:
    """Fill the cache at `path`; on return the .npy is complete and the .json says so.

    Until then features are in a .part file, and .progress says how many of its rows are good.
    """
    part, progress = path.with_suffix(".part"), path.with_suffix(".progress")
    if path.exists():  # killed just before its .json was written, or somebody deleted that
        path.replace(part)
    array, done, lost = _resumed(part, progress)
    bar = tqdm(total=len(records), initial=done, desc=path.stem, unit=" images", disable=None)
    views = description["views"]
    batches = encode_images(
        records[done:],
        encoder,
        description["img_size"],
        device,
        max(1, batch_size // views),
        workers,
        amp,
        views,
    )

    def note() -> None:
        array.flush()
        files.write_json(progress, {"done": done, "left_out": lost})

    try:
        for number, (features, unread) in enumerate(batches, 1):
            if array is None:
                array = _new_array(part, (len(records), *features.shape[1:]))
            array[done : done + len(features)] = features.cpu().numpy()
            done, lost = done + len(features), lost + unread
            bar.update(len(features))
            if len(lost) > MAX_LEFT_OUT * len(records):
                array = None
                _discard(part, progress)
                leave_out(lost, len(records), "can't be read")
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


def _new_array(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Return a new .npy file as an array; OSError where the disk has no room for it."""
    needed = 2 * int(np.prod(shape))
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
            with seeded("view", view, image_id):
                pixels = self.part(image)
        return pixels.flip(-1) if view % 2 else pixels


def _stack(items: Sequence[tuple[Tensor, str | None]]) -> tuple[Tensor, list[str | None]]:
    pixels, unread = zip(*items, strict=True)
    return torch.stack(pixels), list(unread)
