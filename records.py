"""What every dataset on disk shares: records, splits, folders searched, images found or left out.

A reader of a layout (`layouts.py`) says which images a split has and what was said of them; here
that becomes `Record`s whose files exist.
"""

import hashlib
import logging
import os
from array import array
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from compact import Texts, id_list, same, shortest
from images import read_image
from tables import read_text

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
MAX_LEFT_OUT = 0.01  # of a split's images may be missing or unreadable
AT_ONCE = 4096  # images that are checked before more are asked for
# What `read_image` raises for a file of its own fault; a failing disk or network drive is not left
# out but stops the work.
UNREADABLE = (ValueError, FileNotFoundError, PermissionError)


class Record(NamedTuple):
    """One image: `image_id` is its file name (COCO: its integer id), `captions` as written."""

    image_id: str | int
    path: Path
    captions: tuple[str, ...]


class Records(Sequence[Record]):
    """Records in a few flat arrays: some 65 bytes a caption, nearly all of them its own letters.

    A `Record` is made when it is asked for. Slices and selections share the arrays; so do the
    workers of a loader, which are forked. `add` fills it, `pack` ends that.
    """

    def __init__(self) -> None:
        self._held, self._rows = _Held(), range(0)

    @classmethod
    def of(cls, records: Iterable[Record]) -> "Records":
        """Return the records as `Records`; themselves if they are."""
        if isinstance(records, cls):
            return records
        made = cls()
        for image_id, path, captions in records:
            made.add(image_id, path.parent, path.name, captions)
        return made.pack()

    def add(self, image_id: str | int, folder: Path, file: str, captions: Iterable[str]) -> None:
        """Add the image `file` (a name or a path) in `folder`."""
        self._held.add(image_id, folder, file, captions)
        self._rows = range(len(self._rows) + 1)

    def pack(self) -> "Records":
        """Return itself, as small as it can be."""
        self._held.pack()
        return self

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self._with(self._held, self._rows[index])
        return self._held.record(int(self._rows[index]))

    def __eq__(self, other: object) -> bool:
        return same(self, other)

    __hash__ = None

    def __repr__(self) -> str:
        return f"<{len(self)} records>"

    @property
    def image_ids(self) -> Iterator[str | int]:
        """The ids alone, which costs less than whole records do."""
        return (self._held.ids[row] for row in self._rows)

    def take(self, places: Sequence[int]) -> "Records":
        """Return the records at these places, in this order."""
        rows = np.asarray(self._rows)[np.asarray(places, np.int64)]
        return self._with(self._held, shortest(rows))

    def keep(self, ids: Container) -> "Records":
        """Return those whose image id is among `ids`."""
        kept = array("q", (n for n, one in enumerate(self.image_ids) if one in ids))
        return self if len(kept) == len(self) else self.take(kept)

    def with_ids(self, ids: Iterable[str | int]) -> "Records":
        """Return the same images under other ids, in the same order."""
        packed = self._held.renamed(self._rows, ids)
        return self._with(packed, self._rows)

    @classmethod
    def _with(cls, held: "_Held", rows: Any) -> "Records":
        made = cls()
        made._held, made._rows = held, rows
        return made


class _Held:
    """The arrays of `Records`; images are told by their row."""

    def __init__(self) -> None:
        self.ids: Any = None
        self.files: Texts | None = None  # only where they aren't the ids
        self.folders: dict[Path, int] = {}
        self.folder_of: Any = array("q")
        self.captions = Texts()
        self.ends: Any = array("q", [0])  # of each image's captions

    def add(self, image_id: Any, folder: Path, file: str, captions: Iterable[str]) -> None:
        if self.ids is None:
            self.ids = id_list(image_id)
        if self.files is None and file != image_id:
            self.files = Texts(self.ids)
        if self.files is not None:
            self.files.append(file)
        self.ids.append(image_id)
        self.folder_of.append(self.folders.setdefault(folder, len(self.folders)))
        for caption in captions:
            self.captions.append(caption)
        self.ends.append(len(self.captions))

    def pack(self) -> None:
        for texts in (self.ids, self.files, self.captions):
            if isinstance(texts, Texts):
                texts.pack()
        self.folder_of, self.ends = shortest(self.folder_of), shortest(self.ends)
        self.places = list(self.folders)

    def record(self, row: int) -> Record:
        image_id = self.ids[row]
        file = image_id if self.files is None else self.files[row]
        said = self.captions.part(*self.ends[row : row + 2].tolist())
        return Record(image_id, self.places[self.folder_of[row]] / file, tuple(said))

    def renamed(self, rows: Sequence[int], ids: Iterable[str | int]) -> "_Held":
        """Return itself with other ids in these rows, which must be all there are."""
        made = _Held()
        vars(made).update(vars(self))
        made.files, made.ids = self.files or self.ids, None
        for _, one in zip(rows, ids, strict=True):
            made.ids = id_list(one) if made.ids is None else made.ids
            made.ids.append(one)
        if isinstance(made.ids, Texts):
            made.ids.pack()
        return made


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


def readable(records: Sequence[Record]) -> Records:
    """Return the records whose image can be read, having read them all; the others are listed."""

    def reads(record: Record) -> bool:
        try:
            read_image(record.path)
        except UNREADABLE:
            return False
        return True

    records, good, lost = Records.of(records), array("q"), []
    bar = tqdm(
        total=len(records), desc="checking images", unit=" images", disable=None, leave=False
    )
    with bar, ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for start in range(0, len(records), AT_ONCE):
            part = records[start : start + AT_ONCE]
            for place, (record, fine) in enumerate(zip(part, pool.map(reads, part), strict=True)):
                if fine:
                    good.append(start + place)
                else:
                    lost.append(record.image_id)
                bar.update()
    leave_out(lost, len(records), "can't be read")
    return records.take(good) if lost else records


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
    captions: Mapping[str, Sequence[str]],
    folders: Sequence[Path],
    root: Path,
    split: str,
) -> Records:
    """Return records for `names`, leaving out (with a line) those with no image or no caption."""
    places = image_files(folders, names)
    if not places:
        raise SplitMissingError(
            f"no image of the {split} split in {root} or its folders (wanted "
            f"{str(names[0])[:100]} and {len(names) - 1} more)"
        )
    records, lost, described = Records(), [], False
    for name in names:
        lines = tuple(filter(None, captions.get(name, ())))
        described = described or bool(lines)
        if lines and name in places:
            records.add(name, places[name], name, lines)
        else:
            lost.append(name)
    if not described:
        raise SplitMissingError(
            f"no captions of the {split} split in {root} (wanted {str(names[0])[:100]} …)"
        )
    leave_out(lost, len(names), f"of the {split} split have no image file or no caption")
    return records.pack()


def image_files(folders: Sequence[Path], names: Iterable[str]) -> dict[str, Path]:
    """Return which folder each of `names` is in, that which holds the most of them first.

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
        with os.scandir(folder) as entries:
            found.append((folder, wanted.intersection(entry.name for entry in entries) | below))
    places: dict[str, Path] = {}
    for folder, held in sorted(found, key=lambda pair: -len(pair[1])):
        for name in held:
            places.setdefault(name, folder)
    return places


def check_inside(name: str, folder: Path, where: str = "") -> None:
    """Raise ValueError, begun by `where`, where the image path `name` leads out of `folder`."""
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise ValueError(
            f"{where}the image path {name[:100]!r} leaves the dataset's folder {folder}; "
            "images must lie in it"
        )
