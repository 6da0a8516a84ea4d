"""Captions on disk -> records: every layout of every dataset, and the splits.

A dataset is one function and one row in `DATASETS`.
"""

import csv
import hashlib
import json
import logging
import os
from array import array
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

import shards
from compact import Gathered, Texts, id_list, same, shortest
from shards import SPLITS
from util import files, shapes, tars
from util.files import UserError
from util.images import read_image

COLUMNS = ("image", "caption")
DELIMITERS = {".tsv": "\t"}


def read_table(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield line numbers and rows of a table with the columns `image` and `caption`, maybe more.

    `.jsonl` is a JSON object a line, `.tsv` is parted by tabs, anything else by commas; the first
    line names the columns, in upper or lower case. Raises ValueError naming the line at fault.
    """
    rows = _json_rows(path) if path.suffix.lower() == ".jsonl" else _csv_rows(path)
    for number, row in rows:
        for column in COLUMNS:
            if not isinstance(row.get(column), str) or (column == "image" and not row[column]):
                raise UserError(f"{path} line {number} has no {column}: {str(row)[:60]}")
        yield number, row


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    # Strict, because a quote that is not closed would swallow the captions after it.
    delimiter = DELIMITERS.get(path.suffix.lower(), ",")
    table = csv.reader(read_lines(path), delimiter=delimiter, strict=True)
    try:
        first = next(table, [])
        header = [cell.strip().lower() for cell in first]
        if any(header.count(column) != 1 for column in COLUMNS) or header.count("split") > 1:
            raise UserError(
                f"{path} is not a table of captions: its first line must name the columns "
                f"image{delimiter}caption, each once, not {delimiter.join(first)[:60]!r}"
            )
        for row in table:
            if not any(map(str.strip, row)):  # as spreadsheets leave them at the end
                continue
            if len(row) != len(header):
                raise csv.Error(f"it has {len(row)} columns")
            yield table.line_num, dict(zip(header, map(str.strip, row), strict=True))
    except csv.Error as error:
        raise UserError(f"{path} line {table.line_num} is not a caption ({error})") from error


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.strip())
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} line {number} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f'{path} line {number} is not {{"image": "…", "caption": "…"}}')
        yield number, {key.strip().lower(): _stripped(value) for key, value in row.items()}


def _stripped(value: object) -> object:
    return value.strip() if isinstance(value, str) else value


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file, each with its \\n, without having all in memory.

    Raises ValueError, where it comes to it, for what is not text.
    """
    # Lines are split at \n alone: splitlines() would also split at marks that captions may hold.
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise _not_text(path, error) from error


def read_text(path: Path) -> str:
    """Return what a text file holds, line ends as \\n; ValueError where it is not text."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_text(path, error) from error


def _not_text(path: Path, error: UnicodeDecodeError) -> UserError:
    return UserError(f"{path} is not a text file in UTF-8 ({error.reason}); save it as UTF-8")


log = logging.getLogger(__name__)

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


def report_left_out(lost: Sequence[str], total: int, what: str) -> None:
    """Log the images that are left out and why; more than 1 % of `total` is a ValueError."""
    if not lost:
        return
    shown = ", ".join(str(each)[:100] for each in lost[:10])
    shown += f" and {len(lost) - 10} more" if len(lost) > 10 else ""
    line = f"{len(lost)} of {total} images {what}: {shown}"
    if len(lost) > MAX_LEFT_OUT * total:
        raise UserError(f"{line}; more than 1 % is too many to leave out, repair the dataset")
    log.warning("left out: %s", line)


def keep_readable(records: Sequence[Record]) -> Records:
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
    report_left_out(lost, len(records), "can't be read")
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
    report_left_out(lost, len(names), f"of the {split} split have no image file or no caption")
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
        raise UserError(
            f"{where}the image path {name[:100]!r} leaves the dataset's folder {folder}; "
            "images must lie in it"
        )


log = logging.getLogger(__name__)


def read_flickr8k(root: Path, split: str, split_seed: int = 0) -> Records:
    """Return the records of a split of Flickr8k in whichever layout `root` holds.

    Official archives, Kaggle's `Images/` + `captions.txt`, `Images/` + `Flickr8k.token.txt`, or
    Karpathy's JSON; `root` or a folder in it. Splits come from the official lists where there are
    any, else from the JSON, else each image's place in an order shuffled by `split_seed`.
    """
    folders = search_folders(root)
    lists = {
        name: find(folders, f"Flickr_8k.{word}Images.txt")
        for name, word in (("train", "train"), ("val", "dev"), ("test", "test"))
    }
    token = find(folders, "Flickr8k.token.txt", "captions.txt")
    karpathy = find(folders, "dataset_flickr8k.json", "dataset.json")
    if karpathy and not (token and any(lists.values())):
        return read_karpathy(karpathy, folders, split)
    if not token:
        raise FileNotFoundError(
            f"no Flickr8k captions in {root}: looked for Flickr8k.token.txt, captions.txt and "
            "dataset_flickr8k.json there and in its folders; run python download_data.py flickr8k "
            "or give --data-dir"
        )
    captions = read_token_file(token) if token.name != "captions.txt" else read_csv_file(token)
    if not captions:
        raise UserError(f"{token} holds no captions")
    if any(lists.values()):
        names = read_names(lists[split]) if lists[split] else []
        others = [name for name, path in lists.items() if path and name != split]
    else:
        splits = split_by_image(captions, split_seed)
        names = splits[split]
        others = [name for name, part in splits.items() if part]
    if not names:
        raise missing_split(root, split, others)
    return make_records(names, captions, folders, root, split)


def read_token_file(path: Path) -> Gathered:
    """Return image name → captions from lines `name.jpg#0<TAB>caption`."""
    captions = Gathered()
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        key, tab, caption = line.partition("\t")
        name, hash_mark, index = key.rpartition("#")
        if not tab or not hash_mark or not index.isdigit():
            raise UserError(
                f"{path} line {number} is not a caption: expected name.jpg#0, a tab and the "
                f"caption, not {line.rstrip()[:60]!r}"
            )
        captions.add(name, caption.strip())
    return captions


def read_csv_file(path: Path) -> Gathered:
    """Return image name → captions from a table with the columns `image` and `caption`."""
    captions = Gathered()
    for _, row in read_table(path):
        captions.add(row["image"], row["caption"])
    return captions


# What a JSON file of another shape than expected raises where it is taken apart.
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, OverflowError)


def text(value: object) -> str:
    """Return the text itself; TypeError where it is none."""
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:40]!r} is not text")
    return value


def number(value: object) -> int:
    """Return the whole number; OverflowError where it takes more than 64 bits."""
    whole = int(value)
    if not -(2**63) <= whole < 2**63:
        raise OverflowError(f"{str(whole)[:40]} is too large for an id")
    return whole


def read_karpathy(path: Path, folders: Sequence[Path], split: str) -> Records:
    """Return the records of a split from Karpathy's JSON; `restval` images join train."""
    wanted = (split, "restval") if split == "train" else (split,)
    captions, parts = Gathered(), {}
    for name, part, lines in _karpathy_images(path):
        if parts.setdefault(name, part) != part:
            both = f"{parts[name][:20]} and {part[:20]}"
            raise UserError(f"{path}: {name[:100]} is in the splits {both}")
        if part in wanted:
            captions.add(name, *lines)
    if not captions:
        raise missing_split(path, split, [part[:20] for part in sorted(set(parts.values()))[:9]])
    return make_records(list(captions), captions, folders, path.parent, split)


def _karpathy_images(path: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Yield name, split and captions of each image in Karpathy's JSON."""
    value = files.read_json(path)
    try:
        for image in value["images"]:
            name, part = text(image["filename"]), text(image["split"])
            yield name, part, [text(one["raw"]).strip() for one in image["sentences"]]
    except MALFORMED as error:
        raise UserError(
            f'{path} is not a captions file: expected {{"images": [{{"filename", "split", '
            f'"sentences": [{{"raw"}}]}}]}} ({type(error).__name__}: {error})'
        ) from error


def read_flickr30k(root: Path, split: str, split_seed: int = 0) -> Records:
    """Return the records of a split of Flickr30k: Karpathy's JSON and a folder of images."""
    folders = search_folders(root)
    karpathy = find(folders, "dataset_flickr30k.json")
    if not karpathy:
        raise FileNotFoundError(
            f"no dataset_flickr30k.json in {root} or its folders; run python download_data.py "
            "flickr30k or give --data-dir"
        )
    return read_karpathy(karpathy, folders, split)


COCO_TEST = 5000  # images of val that become test where no split file says otherwise


def read_coco(root: Path, split: str, split_seed: int = 0) -> Records:
    """Return the records of a split of COCO captions, 2014 or 2017; image ids are integers.

    With Karpathy's `dataset_coco.json` its splits; else the official annotations, train as given
    and val parted: its images, shuffled by `split_seed`, give the first 5,000 (half of them where
    there are fewer than 10,000) to test and the others to val.
    """
    folders = search_folders(root)
    karpathy = find(folders, "dataset_coco.json")
    if karpathy:
        return _coco_records(*_coco_karpathy(karpathy, split), folders, root, split)
    part = "train" if split == "train" else "val"
    path = find(folders, f"captions_{part}2014.json", f"captions_{part}2017.json")
    if not path:
        raise SplitMissingError(
            f"no captions of COCO's {split} split in {root}: looked for captions_{part}2014.json, "
            f"captions_{part}2017.json and dataset_coco.json there and in its folders; run python "
            "download_data.py coco or give --data-dir"
        )
    names, captions = _coco_annotations(path)
    if part == "val":
        order = sorted(names, key=lambda one: shuffled(one, split_seed))
        test = order[: min(COCO_TEST, len(order) // 2)]
        chosen = set(test) if split == "test" else set(names) - set(test)
        names = {image_id: name for image_id, name in names.items() if image_id in chosen}
    return _coco_records(names, captions, folders, root, split)


def _coco_annotations(path: Path) -> tuple[dict[int, str], Gathered]:
    """Return image id → file name and image id → captions of an official annotation file."""
    value, captions = files.read_json(path), Gathered()
    try:
        names = {number(image["id"]): text(image["file_name"]) for image in value["images"]}
        for one in value["annotations"]:
            captions.add(number(one["image_id"]), text(one["caption"]).strip())
    except MALFORMED as error:
        raise UserError(
            f'{path} is not a COCO captions file: expected {{"images": [{{"id", "file_name"}}], '
            f'"annotations": [{{"image_id", "caption"}}]}} ({type(error).__name__}: {error})'
        ) from error
    if not names.keys() & captions.keys():
        raise UserError(f"{path}: no caption's image_id is the id of an image")
    if strangers := captions.keys() - names.keys():
        log.warning(
            "left out: captions of %d images that %s does not list, the first with id %s",
            len(strangers),
            path,
            min(strangers),
        )
    return names, captions


def _coco_karpathy(path: Path, split: str) -> tuple[dict[int, str], Gathered]:
    """Return what `_coco_annotations` does, from Karpathy's JSON; `restval` joins train."""
    value = files.read_json(path)
    wanted = (split, "restval") if split == "train" else (split,)
    try:
        images = [image for image in value["images"] if image["split"] in wanted]
        names = {number(image["cocoid"]): text(image["filename"]) for image in images}
        captions = Gathered()
        for image in images:
            lines = (text(one["raw"]).strip() for one in image["sentences"])
            captions.add(number(image["cocoid"]), *lines)
        if len(names) != len(images):
            raise UserError("a cocoid comes twice")
    except MALFORMED as error:
        raise UserError(
            f"{path} is not Karpathy's COCO file ({type(error).__name__}: {error})"
        ) from error
    if not names:
        raise missing_split(path, split, [])
    return names, captions


def _coco_records(
    names: dict[int, str],
    captions: Mapping[int, list[str]],
    folders: Sequence[Path],
    root: Path,
    split: str,
) -> Records:
    """Return records with integer ids; restval's images lie in another folder than train's."""
    by_name = {Path(name).name: image_id for image_id, name in names.items()}
    if len(by_name) != len(names):
        one, other = next(
            (image_id, by_name[Path(name).name])
            for image_id, name in names.items()
            if by_name[Path(name).name] != image_id
        )
        raise UserError(
            f"the images {one} and {other} of the {split} split in {root} have one file name, "
            f"{Path(names[one]).name}; rename one of the files"
        )
    said = _ByName(by_name, captions)
    records = make_records(list(by_name), said, folders, root, split)
    return records.with_ids(by_name[name] for name in records.image_ids)


@dataclass
class _ByName(Mapping):
    """Captions by file name, where they are kept by image id."""

    ids: dict[str, int]
    captions: Mapping[int, list[str]]

    def __getitem__(self, name: str) -> list[str]:
        return self.captions[self.ids[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __len__(self) -> int:
        return len(self.ids)


def read_shapes(root: Path, split: str, split_seed: int = 0) -> Records:
    """Return the records of a split of the drawn shapes, drawing them into `root` first."""
    shapes.draw(root)
    return read_karpathy(root / "captions.json", [root, root / "images"], split)


CACHE = Path("data/cache")


def read_shards(
    root: Path | str, split: str, split_seed: int = 0, cache_dir: Path = CACHE
) -> Records:
    """Return the records of a split of tar shards, unpacked into `cache_dir` the first time.

    `root` is the folder of the shards, or its address.
    """
    check_shards(root, split, cache_dir)
    records = [Record(*row) for row in shards.unpack_images(root, split, cache_dir)]
    found = [record for record in records if record.path.exists()]
    lost = sorted({record.image_id for record in records} - {one.image_id for one in found})
    report_left_out(lost, len(records), f"of the {split} split are missing in their shards")
    return Records.of(found)


TABLES = (".csv", ".tsv", ".jsonl")
SPLIT_NAMES = {name: name for name in SPLITS} | dict.fromkeys(("dev", "valid", "validation"), "val")


def read_csv(root: Path, split: str, split_seed: int = 0) -> Records:
    """Return the records of a split of anybody's photographs, described by a table.

    `root` is the table (CSV, TSV or JSON lines), or the folder that holds it. Its columns are
    `image`, a path in that folder, `caption`, a row for each of an image's captions, and perhaps
    `split`: train, val or test. Without that, images are split by `split_seed`.
    """
    path = find_table(root)
    captions, splits = read_described(path)
    if not captions:
        raise UserError(f"{path} holds no captions")
    blank = [image for image, part in splits.items() if not part]
    if blank and len(blank) < len(splits):
        raise UserError(
            f"{path} names the split of some images but not of {blank[0]} and {len(blank) - 1} "
            "more; give it for all, or for none"
        )
    if blank:
        drawn = split_by_image(captions, split_seed)
        if not drawn["train"]:
            raise UserError(f"{path} has {len(captions)} images: too few to split, give 3 or more")
        splits = {image: part for part, images in drawn.items() for image in images}
    names = [image for image in captions if splits[image] == split]
    if not names:
        raise missing_split(path, split, sorted(set(splits.values())))
    return make_records(names, captions, search_folders(path.parent), path.parent, split)


def read_described(path: Path) -> tuple[Gathered, dict[str, str]]:
    """Return image → captions and image → split ("" where none is named) of a table."""
    captions = Gathered()
    splits: dict[str, str] = {}
    for number, row in read_table(path):
        where = f"{path} line {number}: "
        image = plain_name(row["image"], path.parent)
        check_inside(image, path.parent, where)
        named = str(row.get("split") or "").lower()
        if named and named not in SPLIT_NAMES:
            known = ", ".join(SPLIT_NAMES)
            raise UserError(f"{where}split {named!r} is not known; choose from {known}")
        part = SPLIT_NAMES.get(named, "")
        if splits.setdefault(image, part) != part:
            raise UserError(f"{where}{image} is in another split further up")
        captions.add(image, row["caption"])
    return captions, splits


def find_table(root: Path) -> Path:
    """Return the table that `root` is or holds: captions.csv, or another name if it is the only.

    Raises FileNotFoundError where there is none, ValueError where there are several.
    """
    if root.is_file():
        return root
    here = sorted(root.glob("*")) if root.is_dir() else []
    tables = [path for path in here if path.suffix.lower() in TABLES and path.name[0] != "."]
    tables = [path for path in tables if path.stem == "captions"] or tables
    if not tables:
        raise FileNotFoundError(
            f"no table of captions in {root}: give --data-dir, the folder that holds captions.csv, "
            ".tsv or .jsonl (or the file itself), with the columns image and caption"
        )
    if len(tables) > 1:
        raise UserError(
            f"several tables in {root}: {', '.join(path.name for path in tables)}; name one with "
            "--data-dir"
        )
    return tables[0]


def plain_name(name: str, root: Path) -> str:
    """Return an image's path as seen from `root`, without detours."""
    plain = os.path.normpath(name)
    if os.path.isabs(plain):
        plain = os.path.relpath(plain, os.path.abspath(root))
    return Path(plain).as_posix()


DATASETS: dict[str, Callable[..., Sequence[Record]]] = {
    "flickr8k": read_flickr8k,
    "flickr30k": read_flickr30k,
    "coco": read_coco,
    "csv": read_csv,
    "shapes": read_shapes,
    "shards": read_shards,
}


def data_folder(dataset: str, data_dir: str | Path | None) -> Path | str:
    """Return where the dataset's own files are: `data_dir`, or data/<dataset>.

    Shards may have an address, which stays text: a Path would spoil it.
    """
    if data_dir and tars.is_address(str(data_dir)):
        if dataset != "shards":
            raise UserError(
                f"--data-dir {data_dir} is an address, and {dataset} is read from a folder; only "
                "--dataset shards is read from one"
            )
        return str(data_dir)
    return Path(data_dir).expanduser() if data_dir else Path("data") / dataset


def load_split(
    dataset: str,
    data_dir: str | Path | None,
    split: str,
    split_seed: int = 0,
    cache_dir: Path = CACHE,
) -> Sequence[Record]:
    """Return the records of a split of a dataset; errors name what is not there.

    Shards are unpacked into `cache_dir`. Raises ValueError for a name that is not known,
    SplitMissingError for a split that is absent.
    """
    if dataset not in DATASETS:
        raise UserError(f"dataset {dataset!r} is not known; choose from {', '.join(DATASETS)}")
    if split not in SPLITS:
        raise UserError(f"split {split!r} is not known; choose from {', '.join(SPLITS)}")
    root = data_folder(dataset, data_dir)
    if dataset == "shards":
        return read_shards(root, split, split_seed, cache_dir)
    return DATASETS[dataset](root, split, split_seed)


def list_shards(root: Path | str, split: str, cache_dir: Path) -> Records:
    """Return ids and captions of a split's images, read from the shards' list alone.

    The `path` of each is shard / name in it: not a file, but where it comes from.
    """
    check_shards(root, split, cache_dir)
    return Records.of(Record(*row) for row in shards.read_rows(root, split, cache_dir))


def check_shards(root: Path | str, split: str, cache_dir: Path) -> None:
    """Raise SplitMissingError where the shards have no such split."""
    splits = shards.read_index(root, cache_dir)["splits"]
    if split not in splits:
        raise missing_split(Path(root), split, list(splits))
