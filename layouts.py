"""Captions on disk → records: every layout of every dataset, and the splits.

Reading a split gives `Record`s, one an image with all its captions. A dataset is one function and
one row in `DATASETS`.
"""

import csv
import hashlib
import io
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import files
import shapes
from images import read_image

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
    shown = ", ".join(lost[:10]) + (f" and {len(lost) - 10} more" if len(lost) > 10 else "")
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


def read_flickr8k(root: Path, split: str, split_seed: int = 0) -> list[Record]:
    """Return the records of a split of Flickr8k in whichever layout `root` holds.

    Official archives, Kaggle's `Images/` + `captions.txt`, `Images/` + `Flickr8k.token.txt`, or
    Karpathy's JSON; `root` or a folder in it. Splits come from the official lists where there are
    any, else from the JSON, else each image's place in an order shuffled by `split_seed`.
    """
    folders = _folders(root)
    lists = {
        name: _find(folders, f"Flickr_8k.{word}Images.txt")
        for name, word in (("train", "train"), ("val", "dev"), ("test", "test"))
    }
    token = _find(folders, "Flickr8k.token.txt") or _find(folders, "captions.txt")
    karpathy = _find(folders, "dataset_flickr8k.json") or _find(folders, "dataset.json")
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
        raise ValueError(f"{token} holds no captions")
    if any(lists.values()):
        names = _names(lists[split]) if lists[split] else []
        others = [name for name, path in lists.items() if path and name != split]
    else:
        splits = split_by_image(captions, split_seed)
        names = splits[split]
        others = [name for name, part in splits.items() if part]
    if not names:
        raise _missing_split(root, split, others)
    return _records(names, captions, folders, root, split)


def _folders(root: Path) -> list[Path]:
    """Return `root` and the folders in it, hidden ones and Mac leftovers aside, for two levels."""
    if not root.is_dir():
        raise FileNotFoundError(
            f"no dataset at {root}: there is no such folder; run python download_data.py or give "
            "--data-dir, the folder that holds the dataset's files"
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


def _find(folders: Sequence[Path], name: str) -> Path | None:
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _missing_split(root: Path, split: str, present: Sequence[str]) -> SplitMissingError:
    return SplitMissingError(
        f"no {split} split in {root}; it holds {', '.join(present) if present else 'no split'}"
    )


def read_token_file(path: Path) -> dict[str, list[str]]:
    """Return image name → captions from lines `name.jpg#0<TAB>caption`."""
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        key, tab, caption = line.partition("\t")
        name, hash_mark, index = key.rpartition("#")
        if not tab or not hash_mark or not index.isdigit():
            raise ValueError(
                f"{path} line {number} is not a caption: expected name.jpg#0, a tab and the "
                f"caption, not {line[:60]!r}"
            )
        captions.setdefault(name, []).append(caption.strip())
    return captions


def read_csv_file(path: Path) -> dict[str, list[str]]:
    """Return image name → captions from a CSV with the header `image,caption`."""
    captions: dict[str, list[str]] = {}
    # Strict, because a quote that is not closed would swallow the captions after it.
    rows = csv.reader(io.StringIO(_text(path)), strict=True)
    try:
        header = next(rows, [])
        if [cell.strip().lower() for cell in header] != ["image", "caption"]:
            raise ValueError(
                f"{path} is not a captions file: its first line must be image,caption, "
                f"not {','.join(header)[:60]!r}"
            )
        for row in filter(None, rows):
            if len(row) != 2:
                raise csv.Error(f"it has {len(row)} columns")
            captions.setdefault(row[0].strip(), []).append(row[1].strip())
    except csv.Error as error:
        raise ValueError(
            f"{path} line {rows.line_num} is not a caption: expected image,caption ({error})"
        ) from error
    return captions


def _names(path: Path) -> list[str]:
    """Return the image names of an official list, each once."""
    return list(dict.fromkeys(line.strip() for line in _text(path).split("\n") if line.strip()))


def _text(path: Path) -> str:
    """Return what a text file holds, line ends as \\n; ValueError where it is not text."""
    # Lines are split at \n alone: splitlines() would also split at marks that captions may hold.
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8 ({error.reason})") from error


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
    return hashlib.sha256(f"{seed}/{name}".encode()).digest()


def read_karpathy(path: Path, folders: Sequence[Path], split: str) -> list[Record]:
    """Return the records of a split from Karpathy's JSON; `restval` images join train."""
    value = files.read_json(path)
    try:
        images = [
            (image["filename"], image["split"], [one["raw"].strip() for one in image["sentences"]])
            for image in value["images"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{path} is not a captions file: expected {{"images": [{{"filename", "split", '
            f'"sentences": [{{"raw"}}]}}]}} ({type(error).__name__}: {error})'
        ) from error
    wanted = (split, "restval") if split == "train" else (split,)
    captions = {name: lines for name, part, lines in images if part in wanted}
    if not captions:
        raise _missing_split(path, split, sorted({str(part) for _, part, _ in images}))
    return _records(list(captions), captions, folders, path.parent, split)


def read_flickr30k(root: Path, split: str, split_seed: int = 0) -> list[Record]:
    """Return the records of a split of Flickr30k: Karpathy's JSON and a folder of images."""
    folders = _folders(root)
    karpathy = _find(folders, "dataset_flickr30k.json")
    if not karpathy:
        raise FileNotFoundError(
            f"no dataset_flickr30k.json in {root} or its folders; run python download_data.py "
            "flickr30k or give --data-dir"
        )
    return read_karpathy(karpathy, folders, split)


COCO_TEST = 5000  # images of val that become test where no split file says otherwise


def read_coco(root: Path, split: str, split_seed: int = 0) -> list[Record]:
    """Return the records of a split of COCO captions, 2014 or 2017; image ids are integers.

    With Karpathy's `dataset_coco.json` its splits; else the official annotations, train as given
    and val parted: its images, shuffled by `split_seed`, give the first 5,000 (half of them where
    there are fewer than 10,000) to test and the others to val.
    """
    folders = _folders(root)
    karpathy = _find(folders, "dataset_coco.json")
    if karpathy:
        return _coco_records(*_coco_karpathy(karpathy, split), folders, root, split)
    part = "train" if split == "train" else "val"
    found = [_find(folders, f"captions_{part}{year}.json") for year in (2014, 2017)]
    path = next(filter(None, found), None)
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


def _coco_annotations(path: Path) -> tuple[dict[int, str], dict[int, list[str]]]:
    """Return image id → file name and image id → captions of an official annotation file."""
    value = files.read_json(path)
    try:
        names = {int(image["id"]): image["file_name"] for image in value["images"]}
        captions: dict[int, list[str]] = {}
        for one in value["annotations"]:
            captions.setdefault(int(one["image_id"]), []).append(one["caption"].strip())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f'{path} is not a COCO captions file: expected {{"images": [{{"id", "file_name"}}], '
            f'"annotations": [{{"image_id", "caption"}}]}} ({type(error).__name__}: {error})'
        ) from error
    if not names.keys() & captions.keys():
        raise ValueError(f"{path}: no caption's image_id is the id of an image")
    return names, captions


def _coco_karpathy(path: Path, split: str) -> tuple[dict[int, str], dict[int, list[str]]]:
    """Return what `_coco_annotations` does, from Karpathy's JSON; `restval` joins train."""
    value = files.read_json(path)
    wanted = (split, "restval") if split == "train" else (split,)
    try:
        images = [image for image in value["images"] if image["split"] in wanted]
        names = {int(image["cocoid"]): image["filename"] for image in images}
        captions = {
            int(image["cocoid"]): [one["raw"].strip() for one in image["sentences"]]
            for image in images
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} is not Karpathy's COCO file ({type(error).__name__}: {error})"
        ) from error
    if not names:
        raise _missing_split(path, split, [])
    return names, captions


def _coco_records(
    names: dict[int, str],
    captions: dict[int, list[str]],
    folders: Sequence[Path],
    root: Path,
    split: str,
) -> list[Record]:
    """Return records with integer ids; restval's images lie in another folder than train's."""
    by_name = {Path(name).name: image_id for image_id, name in names.items()}
    lines = {name: captions.get(image_id, []) for name, image_id in by_name.items()}
    records = _records(list(by_name), lines, folders, root, split)
    return [record._replace(image_id=by_name[record.image_id]) for record in records]


def read_shapes(root: Path, split: str, split_seed: int = 0) -> list[Record]:
    """Return the records of a split of the drawn shapes, drawing them into `root` first."""
    shapes.draw(root)
    return read_karpathy(root / "captions.json", [root, root / "images"], split)


def _records(
    names: Sequence[str],
    captions: dict[str, list[str]],
    folders: Sequence[Path],
    root: Path,
    split: str,
) -> list[Record]:
    """Return records for `names`, leaving out (with a line) those with no image or no caption."""
    places = _image_files(folders, names)
    if not places:
        raise SplitMissingError(
            f"no image of the {split} split in {root} or its folders (wanted {names[0]} and "
            f"{len(names) - 1} more)"
        )
    described = {name: tuple(filter(None, captions.get(name, ()))) for name in names}
    if not any(described.values()):
        raise SplitMissingError(f"no captions of the {split} split in {root} (wanted {names[0]} …)")
    lost = [name for name in names if name not in places or not described[name]]
    leave_out(lost, len(names), f"of the {split} split have no image file or no caption")
    return [
        Record(name, places[name], lines)
        for name, lines in described.items()
        if lines and name in places
    ]


def _image_files(folders: Sequence[Path], names: Iterable[str]) -> dict[str, Path]:
    """Return where each of `names` is, the folder that holds the most of them first."""
    wanted = set(names)
    found = [(folder, wanted.intersection(os.listdir(folder))) for folder in folders]
    places: dict[str, Path] = {}
    for folder, held in sorted(found, key=lambda pair: -len(pair[1])):
        places = {name: folder / name for name in held} | places
    return places


DATASETS: dict[str, Callable[..., Sequence[Record]]] = {
    "flickr8k": read_flickr8k,
    "flickr30k": read_flickr30k,
    "coco": read_coco,
    "shapes": read_shapes,
}


def data_folder(dataset: str, data_dir: Path | None) -> Path:
    """Return the folder of the dataset's own files: `data_dir`, or data/<dataset>."""
    return data_dir.expanduser() if data_dir else Path("data") / dataset


def load_split(
    dataset: str, data_dir: Path | None, split: str, split_seed: int = 0
) -> Sequence[Record]:
    """Return the records of a split of a dataset; errors name what is not there.

    Raises ValueError for a name that is not known, SplitMissingError for a split that is absent.
    """
    if dataset not in DATASETS:
        raise ValueError(f"dataset {dataset!r} is not known; choose from {', '.join(DATASETS)}")
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not known; choose from {', '.join(SPLITS)}")
    return DATASETS[dataset](data_folder(dataset, data_dir), split, split_seed)
