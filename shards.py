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
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

import files
from records import SPLITS, Records, leave_out, missing_split

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
            raise ValueError(f"format {about['format']!r}, version {about['version']!r}")
        splits = {
            split: [_shard(each) for each in about["splits"][split]["shards"]]
            for split in SPLITS
            if split in about["splits"]
        }
        return Index(str(about["dataset"]), str(about["fingerprint"]), splits)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{where} is not an index of shards as features.py --shards writes it "
            f"({type(error).__name__}: {str(error)[:100]})"
        ) from error


def _shard(about: Any) -> Shard:
    shard = Shard(about["name"], about["images"], about["captions"])
    if not NAME.fullmatch(shard.name) or not all(
        type(count) is int and 0 <= count < 2**40 for count in shard[1:]
    ):
        raise ValueError(f"the shard {str(shard)[:60]}")
    return shard


def listed(root: str, split: str) -> Records:
    """Return ids and captions of a split's images, shard after shard, from its list alone.

    The `path` of each is shard / name in it: not a file, but where it comes from.
    """
    index = read_index(root)
    shards = index.splits.get(split)
    if not shards:
        raise missing_split(Path(root), split, list(index.splits))
    name = f"{split}.jsonl.gz"
    rows, records = _rows(root, name), Records()
    for shard in shards:
        folder = Path(shard.name)
        for _ in range(shard.images):
            row = next(rows, None)
            if row is None:
                raise ValueError(f"{place_of(root, name)} has fewer images than {INDEX} says")
            file, image_id, captions = row
            records.add(image_id, folder, file, captions)
    if next(rows, None) is not None:
        raise ValueError(f"{place_of(root, name)} has more images than {INDEX} says")
    return records.pack()


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
        raise ValueError(
            f"{where} is not a list of captions as features.py --shards writes it, or damaged "
            f"(after row {number}: {str(error)[:100]})"
        ) from error


def _check_row(file: Any, image_id: Any, captions: Any, kind: type) -> None:
    """Raise ValueError where a row is not what `_write_list` writes; all ids are of one `kind`."""
    if not (isinstance(file, str) and NAME.fullmatch(file)):
        raise ValueError(f"the name {str(file)[:60]!r}")
    whole = kind is int and -(2**63) <= image_id < 2**63
    if type(image_id) is not kind or not (kind is str or whole):
        raise ValueError(f"the image id {str(image_id)[:60]!r}")
    texts = isinstance(captions, list) and all(isinstance(line, str) for line in captions)
    if not captions or not texts:
        raise ValueError(f"the captions {str(captions)[:60]}")


class _Seekless(io.RawIOBase):
    """A stream that can be read and nothing else, as gzip wants it."""

    def __init__(self, stream: Any):
        self.stream = stream

    def readable(self) -> bool:
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
        raise ValueError(
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
        raise ValueError(
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


def unpacked(root: str, split: str, folder: Path) -> Records:
    """Return the records of a split, its images unpacked into `folder` the first time."""
    index = read_index(root)
    records = listed(root, split)
    place = folder / f"shards-{index.fingerprint[:16]}-{split}"
    place = place.with_name(re.sub(r"[^A-Za-z0-9-]", "", place.name))  # an index may be anybody's
    with files.lock(place.with_suffix(".lock")):
        if not place.is_dir():
            _unpack(root, index.splits[split], records, place)
    there = set(os.listdir(place))
    made, lost = Records(), []
    for image_id, path, captions in records:
        if path.name in there:
            made.add(image_id, place, path.name, captions)
        else:
            lost.append(image_id)
    try:
        leave_out(lost, len(records), f"of the {split} split are missing in their shards")
    except ValueError:
        shutil.rmtree(place)  # repaired shards are unpacked anew
        raise
    return made.pack()


def _unpack(root: str, shards: Sequence[Shard], records: Records, place: Path) -> None:
    part, start = place.with_suffix(".part"), 0
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    bar = tqdm(total=len(records), desc=f"unpacking {place.name}", unit=" images", disable=None)
    try:
        with bar:
            for shard in shards:
                names = [record.path.name for record in records[start : start + shard.images]]
                for name, content in samples(root, shard.name, {name: name for name in names}):
                    (part / name).write_bytes(content)
                    bar.update()
                start += shard.images
        part.replace(place)
    finally:
        shutil.rmtree(part, ignore_errors=True)  # a full disk is not left full
