"""The files of a feature cache: a row of features per image, and what each row was made of.

S image positions · C backbone channels

`NAME.npy` is a float16 array (images, views, S, C). `NAME.json` describes it: its "shape"; by row
"image_ids", "checksums" (CRC-32) and "sources" (`util/sources.py`); "reading", how large JPEGs were
read; and "left_out", the ids of images that could not be read, whose rows are zeros. Caches of
earlier versions have no shape, checksums, sources and reading.

Files are read and written, not mapped into memory: where a mapped file is cut short, or its disk
full, the process is killed without a word (SIGBUS). That costs 0.05 ms per view of an image.
"""

import errno
import hashlib
import math
import os
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from util import files
from util.files import UserError
from util.progress import progress_bar
from util.sources import is_same_content, update_sources
from util.threads import default_workers

T = TypeVar("T")
CHUNK = 2**22  # bytes that are read at a time when a whole file is checked


class DamagedError(UserError):
    """A file of a cache is not as it was written."""

    def __init__(self, path: Path, reason: Any):
        super().__init__(
            f"the feature cache {path} is damaged ({reason}); delete it, and it will be made again"
        )
        self.path, self.reason = path, reason


class FeatureFile:
    """An open .npy file of float16 (images, views, S, C), read and written by rows."""

    def __init__(self, path: Path, mode: str = "rb"):
        """Raises DamagedError where it has another type of array, or another length than it says.

        `mode` "rb+" opens it for writing too.
        """
        self.path, self.lock = path, threading.Lock()
        self.stream = open(path, mode, buffering=0)  # noqa: SIM115
        try:
            with open(path, "rb") as header:
                # Nothing of a pickle or an archive is read: it has another magic number.
                version = np.lib.format.read_magic(header)
                if version != (1, 0):
                    raise ValueError(f"format {version}")
                self.shape, by_column, dtype = np.lib.format.read_array_header_1_0(header)
                self.start = header.tell()
            if dtype != np.float16 or by_column or len(self.shape) != 4 or 0 in self.shape:
                raise ValueError(f"it holds {dtype} of shape {self.shape}")
            self.row_bytes = 2 * math.prod(self.shape[1:])
            found, expected = path.stat().st_size, self.start + len(self) * self.row_bytes
            if found != expected:
                raise ValueError(f"it has {found:,} bytes of {expected:,}")
        except ValueError as error:
            self.close()
            raise DamagedError(path, error) from error

    def __len__(self) -> int:
        return self.shape[0]

    def __enter__(self) -> "FeatureFile":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        self.stream.close()

    @classmethod
    def create(cls, path: Path, shape: tuple[int, ...], count: int = 1) -> "FeatureFile":
        """Return a new file, open for writing; OSError if the disk has no room for `count` of them.

        The disk space is allocated now, where the file system can do that.
        """
        needed = 2 * math.prod(shape) * max(1, count)  # bytes: 2 per number
        free = shutil.disk_usage(path.parent).free
        if needed > free:
            raise OSError(
                f"the feature cache {path} needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are "
                "free; make room or give --cache-dir on another disk"
            )
        path.touch()
        try:
            write_header(path, shape)
            if hasattr(os, "posix_fallocate"):
                with open(path, "rb+") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                path.unlink(missing_ok=True)
                raise files.write_error(error.errno, path) from error
            if not path.stat().st_size:
                raise
        return cls(path, "rb+")

    def read(self, row: int, count: int = 1) -> np.ndarray:
        """Return `count` rows (count, views, S, C)."""
        array = np.empty((count, *self.shape[1:]), np.float16)
        self._fill(array, self.start + row * self.row_bytes)
        return array

    def read_view(self, row: int, view: int) -> np.ndarray:
        """Return one view (S, C) of a row."""
        if not -len(self) <= row < len(self) or not 0 <= view < self.shape[1]:
            raise IndexError(f"{self.path} has no view {view} of row {row}")
        array = np.empty(self.shape[2:], np.float16)
        self._fill(array, self.start + row * self.row_bytes + view * array.nbytes)
        return array

    def write(self, row: int, features: np.ndarray) -> None:
        """Write rows (n, views, S, C) from `row` on."""
        content, offset = memoryview(np.ascontiguousarray(features)).cast("B"), 0
        position = self.start + row * self.row_bytes
        try:
            while offset < len(content):
                offset += self._write_at(content[offset:], position + offset)
        except OSError as error:
            raise files.write_error(error.errno, self.path) from error

    def sync(self) -> None:
        """Wait until the disk has what was written."""
        files.sync_file(self.stream, self.path)

    def _fill(self, array: np.ndarray, position: int) -> None:
        buffer, offset = memoryview(array).cast("B"), 0
        try:
            while offset < len(buffer):
                if not (count := self._read_at(buffer[offset:], position + offset)):
                    raise UserError(
                        f"{self.path} was cut short while it was in use; start again, and what is "
                        "missing is extracted again"
                    )
                offset += count
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def _read_at(self, buffer: memoryview, position: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self.stream.fileno(), [buffer], position)
        with self.lock:  # Windows: the position is shared by threads
            self.stream.seek(position)
            return self.stream.readinto(buffer)

    def _write_at(self, content: memoryview, position: int) -> int:
        if hasattr(os, "pwrite"):
            return os.pwrite(self.stream.fileno(), content, position)
        with self.lock:
            self.stream.seek(position)
            return self.stream.write(content)


def write_header(path: Path, shape: Sequence[int]) -> None:
    """Give a file the header and the length of an array of this shape; its content stays."""
    header = {"descr": "<f2", "fortran_order": False, "shape": tuple(shape)}
    with open(path, "rb+") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + 2 * math.prod(shape))


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
        self.arrays = [FeatureFile(file) for file in self.paths]
        self.images_per_file = len(self.arrays[0])  # the last file may have fewer
        image_ids: list[str | int] = []
        self.left_out: list[str | int] = []  # images that could not be read: rows of zeros
        for file, array in zip(self.paths, self.arrays, strict=True):
            contents = read_description(file)
            if len(contents["image_ids"]) != len(array):
                raise DamagedError(file, f"{len(array)} rows, {len(contents['image_ids'])} images")
            image_ids += contents["image_ids"]
            self.left_out += contents["left_out"]
        lost = set(self.left_out)
        self.rows = {name: row for row, name in enumerate(image_ids) if name not in lost}

    def __len__(self) -> int:
        return len(self.rows)

    def __contains__(self, image_id: str | int) -> bool:
        return image_id in self.rows

    def __reduce__(self) -> tuple:
        return FeatureCache, (self.path,)  # a worker process opens the files again

    @property
    def description(self) -> Any:
        """What the .json file says, read from disk each time because the ids may be many."""
        return files.read_json(self.path.with_suffix(".json"))

    def get(self, image_id: str | int, view: int = 0) -> Tensor:
        """Return the features (S, C) of an image, float16; KeyError for an unknown id."""
        file, row = divmod(self.rows[image_id], self.images_per_file)
        return torch.from_numpy(self.arrays[file].read_view(row, view))


def abbreviate(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]}… (sha {digest(text)[:8]})"


def digest(text: str) -> str:
    """Return the SHA-256 of `text`, which may hold lone surrogates, in hex digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def split_into_files(path: Path, images: int, per_file: int) -> list[tuple[Path, slice]]:
    """Return the files of a cache of several, each with the slice of the images that it holds."""
    return [
        (path.with_name(f"{path.stem}-{number:05}.npy"), slice(start, start + per_file))
        for number, start in enumerate(range(0, images, per_file))
    ]


# ---- checking a file -------------------------------------------------------------------------


def read_description(path: Path) -> dict[str, Any]:
    """Return the description of one file of a cache; DamagedError if it is none."""
    try:
        contents = files.read_json(path.with_suffix(".json"))
        image_ids, left_out = contents["image_ids"], contents["left_out"]
        sources = contents.get("sources", image_ids)
        lengths = {*map(len, (image_ids, sources, contents.get("checksums", image_ids)))}
        good = (
            len(lengths) == 1 and isinstance(left_out, list) and "images_per_file" not in contents
        )
    except (UserError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(path, f"its description: {error!r:.200}") from error
    if not good:
        raise DamagedError(path, f"its description has lists of {sorted(lengths)} entries")
    return contents


def scan(file: FeatureFile, look: Callable[[np.ndarray], T]) -> Iterator[T]:
    """Yield `look(row)` for each row (views, S, C) of a file, read at the speed of the disk."""
    step = max(1, CHUNK // file.row_bytes)

    def look_at_chunk(start: int) -> list[T]:
        return [look(row) for row in file.read(start, min(step, len(file) - start))]

    name = f"checking {file.path.stem}"
    bar = progress_bar(total=len(file), desc=name, unit=" images", leave=False, delay=2)
    # Reading and checksums release Python's global lock.
    with ThreadPoolExecutor(default_workers()) as pool, bar:
        for results in pool.map(look_at_chunk, range(0, len(file), step)):
            bar.update(len(results))
            yield from results


def is_sound(row: np.ndarray) -> bool:
    """Return whether a row is possible: it is finite, and not all zeros."""
    return bool(row.any() and np.isfinite(row).all())


def check_file(
    path: Path, image_ids: Sequence[str | int], images: Sequence[Path], repair: bool = False
) -> tuple[dict[str, Any], dict[int, str]]:
    """Return the description of a file, with sources as they are now, and its rows to be replaced.

    The rows come with the reason. `images` are the image files. With `repair` the header and the
    length of the file are restored where they are damaged. Raises DamagedError where the file is of
    no use.
    """
    contents = read_description(path)
    if contents["image_ids"] != list(image_ids):
        raise DamagedError(path, "it lists other images")
    try:
        file = FeatureFile(path)
        if "shape" in contents and list(file.shape) != contents["shape"]:
            file.close()
            raise DamagedError(path, f"its shape is {file.shape}")
    except DamagedError:
        if not repair or "shape" not in contents:
            raise
        write_header(path, contents["shape"])
        file = FeatureFile(path)
    lost = {row for row, name in enumerate(image_ids) if name in set(contents["left_out"])}
    with file:
        if len(file) != len(image_ids):
            raise DamagedError(path, f"{len(file)} rows, {len(image_ids)} images")
        if "checksums" in contents:
            found = scan(file, zlib.crc32)
            pairs = enumerate(zip(found, contents["checksums"], strict=True))
            damaged = [row for row, (is_now, was) in pairs if is_now != was]
        else:  # of an earlier version
            found = list(scan(file, lambda row: (zlib.crc32(row), is_sound(row))))
            damaged = [row for row, (_, good) in enumerate(found) if not good and row not in lost]
            contents |= {
                "shape": list(file.shape),
                "checksums": [checksum for checksum, _ in found],
            }
    # An earlier version did not note what it read: the image files are taken to be the same.
    before = contents.get("sources") or update_sources(images, [""] * len(images))
    contents["sources"] = update_sources(images, before)
    pairs = enumerate(zip(before, contents["sources"], strict=True))
    changed = [row for row, (was, is_now) in pairs if not is_same_content(was, is_now)]
    return contents, dict.fromkeys(damaged, "damaged") | dict.fromkeys(changed, "changed")


def mark_rows(contents: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """Return the description in which `rows` are about to be written: they count as changed."""
    sources = list(contents["sources"])
    for row in rows:
        sources[row] = None
    return contents | {"sources": sources}
