"""What every dataset on disk shares: records, splits, folders searched, images found or left out.

A reader of a layout (`layouts.py`) says which images a split has and what was said of them; here
that becomes `Record`s whose files exist.
"""

import hashlib
import logging
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from images import read_image
from tables import read_text

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
MAX_LEFT_OUT = 0.01  # of a split's images may be missing or unreadable
# What `read_image` raises for a file of its own fault; a failing disk or network drive is not left
# out but stops the work.
UNREADABLE = (ValueError, FileNotFoundError, PermissionError)


class Record(NamedTuple):
    """One image: `image_id` is its file name (COCO: its integer id), `captions` as written."""

    image_id: str | int
    path: Path
    captions: tuple[str, ...]


class SplitMissingError(FileNotFoundError):
    """The data are there, but not this split of them."""


def leave_out(lost: Sequence[str], total: int, what: str) -> None:
    """Log the images that are left out and why; more than 1 % of `total` is a ValueError."""
    if not lost:
        return
    shown = ", ".join(str(each)[:100] for each in lost[:10])
    shown += f" and {len(lost) - 10} more" if len(lost) > 10 else ""
    line = f"{len(lost)} of {total} images {what}: {shown}"
    if len(lost) > MAX_LEFT_OUT * total:
        raise ValueError(f"{line}; more than 1 % is too many to leave out, repair the dataset")
    log.warning("left out: %s", line)


def readable(records: Sequence[Record]) -> list[Record]:
    """Return the records whose image can be read, having read them all; the others are listed."""

    def reads(record: Record) -> bool:
        try:
            read_image(record.path)
        except UNREADABLE:
            return False
        return True

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        results = list(
            tqdm(
                pool.map(reads, records),
                total=len(records),
                desc="checking images",
                unit=" images",
                disable=None,
                leave=False,
            )
        )
    lost = [record.image_id for record, good in zip(records, results, strict=True) if not good]
    leave_out(lost, len(records), "can't be read")
    return [record for record, good in zip(records, results, strict=True) if good]


def search_folders(root: Path) -> list[Path]:
    """Return `root` and the folders in it, hidden ones and Mac leftovers aside, for two levels."""
    if not root.is_dir():
        raise FileNotFoundError(
            f"no dataset at {root}: there is no such folder; run python download_data.py flickr8k "
            "(or coco, flickr30k), or give --data-dir, the folder that holds the dataset's files"
        )
    inside = _subfolders(root)
    return [root, *inside, *(deeper for folder in inside for deeper in _subfolders(folder))]


def _subfolders(folder: Path) -> list[Path]:
    """Return the folders in `folder` that may be read: a disk's lost+found is none of ours."""
    with os.scandir(folder) as entries:
        return sorted(
            Path(entry.path)
            for entry in entries
            if not entry.name.startswith((".", "__MACOSX"))
            and entry.is_dir()
            and os.access(entry.path, os.R_OK | os.X_OK)
        )


def find(folders: Sequence[Path], *names: str) -> Path | None:
    """Return the first of `names` that is in any of `folders`, None where none is."""
    places = (folder / name for name in names for folder in folders)
    return next((place for place in places if place.is_file()), None)


def missing_split(root: Path, split: str, present: Sequence[str]) -> SplitMissingError:
    return SplitMissingError(
        f"no {split} split in {root}; it holds {', '.join(present) if present else 'no split'}"
    )


def read_names(path: Path) -> list[str]:
    """Return the image names of an official list, each once."""
    return list(dict.fromkeys(line.strip() for line in read_text(path).split("\n") if line.strip()))


def split_by_image(names: Iterable[str], seed: int) -> dict[str, list[str]]:
    """Return the split of each image name: an eighth each (at least one) val and test, rest train.

    Images are ordered by a hash of seed and name: the same everywhere, whatever the file's order.
    """
    ordered = sorted(names, key=lambda name: shuffled(name, seed))
    part = max(1, len(ordered) // 8)
    parts = (ordered[2 * part :], ordered[:part], ordered[part : 2 * part])
    return {split: sorted(names) for split, names in zip(SPLITS, parts, strict=True)}


def shuffled(name: object, seed: int) -> bytes:
    """Return what to sort `name` by for an order by chance that depends on nothing else."""
    return hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogatepass")).digest()


def make_records(
    names: Sequence[str],
    captions: dict[str, list[str]],
    folders: Sequence[Path],
    root: Path,
    split: str,
) -> list[Record]:
    """Return records for `names`, leaving out (with a line) those with no image or no caption."""
    places = image_files(folders, names)
    if not places:
        raise SplitMissingError(
            f"no image of the {split} split in {root} or its folders (wanted "
            f"{str(names[0])[:100]} and {len(names) - 1} more)"
        )
    described = {name: tuple(filter(None, captions.get(name, ()))) for name in names}
    if not any(described.values()):
        raise SplitMissingError(
            f"no captions of the {split} split in {root} (wanted {str(names[0])[:100]} …)"
        )
    lost = [name for name in names if name not in places or not described[name]]
    leave_out(lost, len(names), f"of the {split} split have no image file or no caption")
    return [
        Record(name, places[name], lines)
        for name, lines in described.items()
        if lines and name in places
    ]


def image_files(folders: Sequence[Path], names: Iterable[str]) -> dict[str, Path]:
    """Return where each of `names` is, the folder that holds the most of them first.

    A name may be a path below a folder; one that leads out of it is a ValueError.
    """
    wanted = set(names)
    nested = sorted(name for name in wanted if os.path.basename(name) != name)
    for name in nested:
        check_inside(name, folders[0])
    found = []
    for folder in folders:
        below = {name for name in nested if (folder / name).is_file()}
        nested = [name for name in nested if name not in below]  # looked for until found
        found.append((folder, wanted.intersection(os.listdir(folder)) | below))
    places: dict[str, Path] = {}
    for folder, held in sorted(found, key=lambda pair: -len(pair[1])):
        places = {name: folder / name for name in held} | places
    return places


def check_inside(name: str, folder: Path, where: str = "") -> None:
    """Raise ValueError, begun by `where`, where the image path `name` leads out of `folder`."""
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise ValueError(
            f"{where}the image path {name[:100]!r} leaves the dataset's folder {folder}; "
            "images must lie in it"
        )
