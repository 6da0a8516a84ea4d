"""Tar shards, as the webdataset library reads them: images and captions in few large files.

A folder of shards, or the address of one, holds

- `train-000000.tar` … (and those of val and test): of each image `KEY.jpg`, the file as it was, and
  `KEY.json`, {"image_id": …, "captions": […]}, in an order by chance;
- `train.jsonl.gz` …: a row [name in the tar, image id, captions] of each image, in that order, so
  that words can be counted and shares divided before any image is read;
- `index.json`: how many images and captions each shard has.
"""

import contextlib
import gzip
import io
import json
import logging
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from util.files import UserError

SPLITS = ("train", "val", "test")


log = logging.getLogger(__name__)

FORMAT, VERSION = "image-captioning shards", 1
INDEX = "index.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9]+)+")  # of a file here: never a path
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # two letters or more: C: is a disk
MOST_BYTES = 200 * 2**20  # of an image file; a larger one is left out
CHUNK = 2**20  # bytes that are asked for at a time
MOST_LINE = 20 * 2**20  # of a row of captions
# What a list that is damaged, or none, raises where it is unpacked and read.
DAMAGED = (ValueError, TypeError, RecursionError, EOFError, gzip.BadGzipFile, zlib.error)
T = TypeVar("T")


class Shard(NamedTuple):
    """A tar file and how much is in it."""

    name: str
    images: int
    captions: int


class Index(NamedTuple):
    """What `index.json` says: the shards of each split, and a digest of all that was written."""

    dataset: str
    fingerprint: str
    splits: dict[str, list[Shard]]


def read_index(root: str) -> Index:
    """Return what the index of the shards at `root` says; ValueError where it is none."""
    where = place_of(root, INDEX)
    if not is_address(where) and not Path(where).is_file():
        raise FileNotFoundError(
            f"no shards in {root}: there is no {INDEX}; write some with python features.py "
            "--shards DIR, and give --data-dir, their folder or its address"
        )
    with opened(root, INDEX) as stream:
        text = stream.read()
        check_whole(stream, where)
    try:
        about = json.loads(text)
        if about["format"] != FORMAT or about["version"] != VERSION:
            raise UserError(f"format {about['format']!r}, version {about['version']!r}")
        splits = {
            split: [_shard(each) for each in about["splits"][split]["shards"]]
            for split in SPLITS
            if split in about["splits"]
        }
        return Index(str(about["dataset"]), str(about["fingerprint"]), splits)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{where} is not an index of shards as features.py --shards writes it "
            f"({type(error).__name__}: {str(error)[:100]})"
        ) from error


def _shard(about: Any) -> Shard:
    shard = Shard(about["name"], about["images"], about["captions"])
    if not NAME.fullmatch(shard.name) or not all(
        type(count) is int and 0 <= count < 2**40 for count in shard[1:]
    ):
        raise UserError(f"the shard {str(shard)[:60]}")
    return shard


def _rows(root: str, name: str) -> Iterator[tuple[str, str | int, list[str]]]:
    """Yield name in the tar, image id and captions of each image of a list."""
    where, kind, number = place_of(root, name), None, 0
    try:
        with opened(root, name) as stream, gzip.GzipFile(fileobj=_Seekless(stream)) as unpacked:
            while line := unpacked.readline(MOST_LINE):
                file, image_id, captions = json.loads(line)
                kind, number = kind or type(image_id), number + 1
                _check_row(file, image_id, captions, kind)
                yield file, image_id, captions
            check_whole(stream, where)
    except DAMAGED as error:
        raise UserError(
            f"{where} is not a list of captions as features.py --shards writes it, or damaged "
            f"(after row {number}: {str(error)[:100]})"
        ) from error


def _check_row(file: Any, image_id: Any, captions: Any, kind: type) -> None:
    """Raise ValueError where a row is not what `_write_list` writes; all ids are of one `kind`."""
    if not (isinstance(file, str) and NAME.fullmatch(file)):
        raise UserError(f"the name {str(file)[:60]!r}")
    whole = kind is int and -(2**63) <= image_id < 2**63
    if type(image_id) is not kind or not (kind is str or whole):
        raise UserError(f"the image id {str(image_id)[:60]!r}")
    texts = isinstance(captions, list) and all(isinstance(line, str) for line in captions)
    if not captions or not texts:
        raise UserError(f"the captions {str(captions)[:60]}")


class _Seekless(io.RawIOBase):
    """A stream that can be read and nothing else, as gzip wants it."""

    def __init__(self, stream: Any):
        self.stream = stream

    def keep_readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self.stream.read(size)


def samples(root: str, shard: str, wanted: dict[str, T]) -> Iterator[tuple[T, bytes]]:
    """Yield those of `wanted` (by name in the tar) that the shard holds, with their contents.

    They are taken out of `wanted`; what stays in it is missing or damaged. Nothing but regular
    files of exactly these names is looked at, and nothing is unpacked to a path a tar names.
    """
    where = place_of(root, shard)
    with opened(root, shard) as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r|", bufsize=CHUNK) as tar:
                for member in tar:
                    if member.isreg() and member.name in wanted and member.size <= MOST_BYTES:
                        content = tar.extractfile(member).read()
                        yield wanted.pop(member.name), content
                    if not wanted:
                        return
                    tar.members = []  # tarfile would remember them all
        except (tarfile.TarError, EOFError, ValueError) as error:
            log.warning("%s is damaged (%s)", where, error)
        check_whole(stream, where)


def is_address(place: str) -> bool:
    return ADDRESS.match(place) is not None


def place_of(root: str, name: str) -> str:
    """Return where the file `name` of the shards at `root` is: a path or an address.

    In an address {} stands for the name, else it comes at the end.
    """
    if not is_address(root):
        return str(Path(root).expanduser() / name)
    if "{}" in root:
        return root.replace("{}", name)
    if root.startswith("pipe:"):
        raise UserError(
            f"--data-dir {root!r} is a command that names no file; put {{}} where the name of an "
            "index, list or shard goes"
        )
    return f"{root.rstrip('/')}/{name}"


@contextlib.contextmanager
def opened(root: str, name: str) -> Iterator[Any]:
    """Lend a binary stream of a file of the shards at `root`; OSError where it can't be had."""
    where = place_of(root, name)
    stream = (_gopen if is_address(where) else io.FileIO)(where)
    try:
        yield stream
    except OSError as error:
        if error.errno or isinstance(error, gzip.BadGzipFile):
            raise
        raise _unreachable(where, stream) from error
    finally:
        with contextlib.suppress(OSError):  # a program that was stopped in the middle complains
            stream.close()


def _gopen(where: str) -> Any:
    try:
        import webdataset
    except ImportError as error:
        raise UserError(
            f"{where} is read by the library webdataset, which is not installed: pip install -r "
            "requirements-shards.txt (shards in a folder need none)"
        ) from error
    return webdataset.gopen(where)


def check_whole(stream: Any, where: str) -> None:
    """Raise OSError where a stream that was read to its end is not all there was."""
    try:
        stream.close()
    except OSError as error:
        raise _unreachable(where, stream) from error


def _unreachable(where: str, stream: Any) -> OSError:
    status = getattr(stream, "status", None)
    return OSError(f"{where} can't be read (what fetches it ended with code {status})")


# ---- small splits ----------------------------------------------------------------------------
