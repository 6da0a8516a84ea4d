"""Captions files on disk → a table with a row per caption → the records of each split.

A dataset is one reader and one row in `DATASETS`. A reader returns a `pandas.DataFrame` with a row
per caption and these columns; everything else is done here, once for all datasets:

- `image_id`: the file name; COCO: the integer id;
- `file`: the image's name, or its path below the dataset's folder;
- `caption`: as written; an image without captions has one row with an empty caption;
- `split`: a key of `SPLIT_NAMES`.
"""

import hashlib
import io
import itertools
import json
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from tqdm import tqdm

import shards
from shards import SPLITS
from util import files, shapes, tars
from util.files import UserError
from util.images import read_image

log = logging.getLogger(__name__)

COLUMNS = ["image_id", "file", "caption", "split"]
# Names of a captions table's columns, in lower case; the first that is there is used.
COLUMN_NAMES = {
    "image": ("image", "file_name", "filename", "image_name"),
    "caption": ("caption", "text", "comment"),
    "split": ("split",),
}
# What a split may be called, in lower case. Images of "val/test" and of no named split are divided.
SPLIT_NAMES = {name: name for name in (*SPLITS, "val/test", "")}
SPLIT_NAMES |= {"dev": "val", "valid": "val", "validation": "val"}
SPLIT_NAMES |= {"restval": "train"}  # the images of COCO's val that Karpathy adds to train
COCO_TEST = 5000  # images that "val/test" gives to test
TABLES = (".csv", ".tsv", ".json", ".jsonl", ".xlsx", ".parquet")
MAX_LEFT_OUT = 0.01  # of a split's images may be missing or unreadable, and one in any case
# What `read_image` raises for a bad file. Other errors, as of a failing disk, end the program.
UNREADABLE = (ValueError, FileNotFoundError, PermissionError)
# What JSON of another structure raises.
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, OverflowError)
CACHE = Path("data/cache")


class Record(NamedTuple):
    """An image: `image_id` is its file name (COCO: its integer id), `captions` as written."""

    image_id: str | int
    path: Path
    captions: tuple[str, ...]


class SplitMissingError(FileNotFoundError):
    """The dataset is there, but not this split of it."""


# ---- readers ---------------------------------------------------------------------------------


def read_flickr8k(root: Path) -> pd.DataFrame:
    """Return the table of Flickr8k in any of its layouts, in `root` or a folder in it.

    Captions: `Flickr8k.token.txt`, Kaggle's `captions.txt` or Karpathy's JSON. Splits: the official
    lists if there are any, else the JSON, else none.
    """
    folders = scan_folders(root)
    listed = []
    for split, word in (("train", "train"), ("val", "dev"), ("test", "test")):
        if path := find_file(folders, f"Flickr_8k.{word}Images.txt"):
            names = map(str.strip, files.read_text(path).split("\n"))
            listed += [(name, split) for name in dict.fromkeys(names) if name]
    captions = find_file(folders, "Flickr8k.token.txt", "captions.txt")
    karpathy = find_file(folders, "dataset_flickr8k.json", "dataset.json")
    if karpathy and not (captions and listed):
        return read_karpathy(karpathy)
    if not captions:
        raise FileNotFoundError(
            f"no Flickr8k captions in {root}: looked for Flickr8k.token.txt, captions.txt and "
            "dataset_flickr8k.json there and in its folders; run python download_data.py flickr8k "
            "or give --data-dir"
        )
    table = read_table(captions) if captions.name == "captions.txt" else read_token_file(captions)
    if not listed:
        return table.sort_values("image_id", kind="stable")
    # A list may name an image that has no captions.
    images = pd.DataFrame(listed, columns=["image_id", "split"], dtype=object)
    table = images.merge(table[["image_id", "caption"]], how="left").fillna({"caption": ""})
    return table.assign(file=table["image_id"])


def read_token_file(path: Path) -> pd.DataFrame:
    """Return the table of a file of lines `name.jpg#0<TAB>caption`."""
    rows = []
    for number, line in enumerate(files.read_text(path).split("\n"), 1):
        key, tab, caption = line.partition("\t")
        name, hash_mark, index = key.rpartition("#")
        if tab and hash_mark and index.isdigit():
            rows.append((name, name, caption, ""))
        elif line.strip():
            raise UserError(
                f"{path} line {number} is not a caption: expected name.jpg#0, a tab and the "
                f"caption, not {line.rstrip()[:60]!r}"
            )
    return pd.DataFrame(rows, columns=COLUMNS, dtype=object)


def read_karpathy(path: Path, id_key: str = "filename") -> pd.DataFrame:
    """Return the table of one of Karpathy's JSON files; `id_key` is where it has the image's id."""
    value, rows = files.read_json(path), []
    try:
        for image in value["images"]:
            for caption in [sentence["raw"] for sentence in image["sentences"]] or [""]:
                rows.append((image[id_key], image["filename"], caption, image["split"]))
    except MALFORMED as error:
        raise UserError(
            f'{path} is not a captions file: expected {{"images": [{{"{id_key}", "filename", '
            f'"split", "sentences": [{{"raw"}}]}}]}} ({type(error).__name__}: {error})'
        ) from error
    return pd.DataFrame(rows, columns=COLUMNS, dtype=object)


def read_flickr30k(root: Path) -> pd.DataFrame:
    """Return the table of Flickr30k: Karpathy's JSON, in `root` or a folder in it."""
    if karpathy := find_file(scan_folders(root), "dataset_flickr30k.json"):
        return read_karpathy(karpathy)
    raise FileNotFoundError(
        f"no dataset_flickr30k.json in {root} or its folders; run python download_data.py "
        "flickr30k or give --data-dir"
    )


def read_coco(root: Path) -> pd.DataFrame:
    """Return the table of COCO captions, 2014 or 2017; image ids are integers.

    Karpathy's `dataset_coco.json` if it is there, else the official annotations, which have no test
    split: val is divided.
    """
    folders = scan_folders(root)
    if karpathy := find_file(folders, "dataset_coco.json"):
        return read_karpathy(karpathy, "cocoid")
    tables = []
    for part, split in (("train", "train"), ("val", "val/test")):
        names = [f"captions_{part}{year}.json" for year in (2014, 2017)]
        if path := find_file(folders, *names):
            tables.append(read_coco_annotations(path).assign(split=split))
    if not tables:
        raise FileNotFoundError(
            f"no COCO captions in {root}: looked for captions_train2014.json, "
            "captions_val2014.json, those of 2017 and dataset_coco.json there and in its folders; "
            "run python download_data.py coco or give --data-dir"
        )
    return pd.concat(tables)


def read_coco_annotations(path: Path) -> pd.DataFrame:
    """Return the table of an official annotation file, without `split`."""
    value, captions = files.read_json(path), defaultdict(list)
    try:
        # Images are searched for by name in all folders, whatever folder the file names.
        names = {int(image["id"]): Path(image["file_name"]).name for image in value["images"]}
        for each in value["annotations"]:
            captions[int(each["image_id"])].append(each["caption"])
    except MALFORMED as error:
        raise UserError(
            f'{path} is not a COCO captions file: expected {{"images": [{{"id", "file_name"}}], '
            f'"annotations": [{{"image_id", "caption"}}]}} ({type(error).__name__}: {error})'
        ) from error
    if unknown := captions.keys() - names.keys():
        what = f"images that {path} does not list, the first with id {min(unknown)}"
        log.warning("left out: captions of %d %s", len(unknown), what)
    rows = []
    for image_id, name in names.items():
        rows += [(image_id, name, caption) for caption in captions.get(image_id, [""])]
    return pd.DataFrame(rows, columns=COLUMNS[:3], dtype=object)


def read_shapes(root: Path) -> pd.DataFrame:
    """Return the table of the synthetic shapes, which are drawn into `root` first."""
    return read_karpathy(shapes.draw(root) / "captions.json")


def read_csv(root: Path) -> pd.DataFrame:
    """Return the table of images of your own: `root` is a captions table or a folder with one.

    In a folder, a table called captions or metadata is read, else the only one.
    """
    tables = [root] if root.is_file() else []
    if root.is_dir():
        found = sorted(path for path in root.iterdir() if path.suffix.lower() in TABLES)
        found = [path for path in found if path.name[0] not in ".~"]  # open in Excel, or a Mac's
        tables = [path for path in found if path.stem in ("captions", "metadata")]
        # Other JSON files may hold anything.
        tables = tables or [path for path in found if path.suffix.lower() != ".json"]
    if not tables:
        raise FileNotFoundError(
            f"no table of captions in {root}: give --data-dir, the folder that holds captions.csv "
            f"(or {', '.join(TABLES[1:])}), or the file, with the columns image and caption"
        )
    if len(tables) > 1:
        names = ", ".join(path.name for path in tables)
        raise UserError(f"several tables in {root}: {names}; name one with --data-dir")
    return read_table(tables[0])


# ---- captions tables -------------------------------------------------------------------------


def read_table(path: Path) -> pd.DataFrame:
    """Return the table of a file in one of the formats `TABLES`; any other suffix means CSV.

    Raises UserError that names the line (in Excel, Parquet and JSON: the row) at fault.
    """
    kind = path.suffix.lower()
    try:
        if kind in (".json", ".jsonl"):
            table = read_objects(path)
        elif kind == ".parquet":
            table = pd.read_parquet(path)
            table.index = range(1, len(table) + 1)
        else:
            table = read_cells(path)
    except ImportError as error:
        package = "pyarrow" if kind == ".parquet" else "openpyxl"
        raise UserError(f"{path} is read with {package}: pip install {package}") from error
    except (OSError, UserError):
        raise
    except Exception as error:  # what openpyxl and pyarrow raise for damaged files has no limits
        message = f"{type(error).__name__}: {str(error)[:100]}"
        raise UserError(f"{path} can't be read as a table of captions ({message})") from error
    header = [str(name).strip().lower() for name in table.columns]
    columns = {}
    for column, names in COLUMN_NAMES.items():
        name = next((name for name in names if name in header), None)
        if header.count(name) > 1 or (name is None and column != "split"):
            raise UserError(
                f"{path} is not a table of captions: it must have the columns image and caption, "
                f"each once, not {', '.join(header)[:60]!r}"
            )
        cells = table.iloc[:, header.index(name)] if name else pd.Series("", table.index)
        columns[column] = cells.fillna("").tolist() if column == "split" else cells.tolist()
    rows = []
    paths = {image: normalize_path(image, path.parent) for image in set(map(str, columns["image"]))}
    for number, image, caption, split in zip(table.index, *columns.values(), strict=True):
        if not isinstance(image, str) or not image.strip():
            raise UserError(f"{path} line {number} has no image: {str(image)[:60]!r}")
        if not isinstance(caption, str):
            raise UserError(f"{path} line {number} has no caption: {str(caption)[:60]!r}")
        rows.append((paths[image], paths[image], caption, split))
    return pd.DataFrame(rows, columns=COLUMNS, dtype=object)


def normalize_path(name: str, folder: Path) -> str:
    """Return an image's path as seen from `folder`, without detours."""
    path = os.path.normpath(name.strip())
    if os.path.isabs(path):
        path = os.path.relpath(path, os.path.abspath(folder))
    return Path(path).as_posix()


def read_cells(path: Path) -> pd.DataFrame:
    """Return a CSV, TSV or Excel file as text cells; the index counts rows from 1."""
    # The header is read as a row, so that pandas expects as many cells in every row.
    options = {"header": None, "dtype": str, "keep_default_na": False}
    if path.suffix.lower() == ".xlsx":
        table = pd.read_excel(path, **options)
    else:
        text = files.read_text(path)
        header = text.partition("\n")[0]
        options["sep"] = "\t" if path.suffix.lower() == ".tsv" else max(",|;\t", key=header.count)
        # The C engine would fill short rows and accept quotes that are not closed.
        options |= {"engine": "python", "index_col": False, "skip_blank_lines": False}
        table = pd.read_csv(io.StringIO(text), **options)
    table.index += 1
    table = table.map(str.strip, na_action="ignore")
    table = table[(table.fillna("") != "").any(axis=1)]  # spreadsheets leave blank rows
    for number, row in table[table.isna().any(axis=1)].iterrows():
        cells = row.dropna().tolist()
        raise UserError(
            f"{path} line {number} has {len(cells)} cells, not {len(row)}: {cells}"[:200]
        )
    return table.iloc[1:].set_axis(table.iloc[0], axis=1)


def read_objects(path: Path) -> pd.DataFrame:
    """Return the table of a JSON list of objects, or of a file with an object per line."""
    rows = {}
    if path.suffix.lower() == ".json":
        value = files.read_json(path)
        rows = dict(enumerate(value if isinstance(value, list) else [value], 1))
    else:
        for number, line in enumerate(files.read_text(path).split("\n"), 1):
            try:
                if line.strip():
                    rows[number] = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path} line {number} is not JSON ({error})") from error
    for number, row in rows.items():
        if not isinstance(row, dict):
            raise UserError(f'{path} line {number} is not {{"image": "…", "caption": "…"}}')
        rows[number] = {key.strip().lower(): cell for key, cell in row.items()}
    return pd.DataFrame(list(rows.values()), index=list(rows), dtype=object)


# ---- finding files ---------------------------------------------------------------------------


def scan_folders(root: Path) -> dict[Path, set[str]]:
    """Return the names of the files in `root` and the folders in it, two levels deep.

    Hidden folders, those of Macs and those that may not be read are left out.
    """
    if not root.is_dir():
        raise FileNotFoundError(
            f"no dataset at {root}: there is no such folder; run python download_data.py flickr8k "
            "(or coco, flickr30k), or give --data-dir, the folder that holds the dataset's files"
        )
    found: dict[Path, set[str]] = {}
    level = [root]
    for _ in range(3):
        below = []
        for folder in level:
            with os.scandir(folder) as entries:
                found[folder] = set()
                for entry in entries:
                    if not entry.is_dir():
                        found[folder].add(entry.name)
                    elif not entry.name.startswith((".", "__MACOSX")):
                        below.append(folder / entry.name)
        level = [folder for folder in sorted(below) if os.access(folder, os.R_OK | os.X_OK)]
    return found


def find_file(folders: Mapping[Path, set[str]], *names: str) -> Path | None:
    """Return the path of the first of `names` that is in any of `folders`, or None."""
    found = (folder / name for name in names for folder in folders if name in folders[folder])
    return next(found, None)


def find_images(root: Path, names: Sequence[str]) -> dict[str, Path]:
    """Return the path of each image that is in `root` or a folder in it.

    An image of which there are several is taken from the folder with the most images. A name may
    be a path below a folder.
    """
    folders = scan_folders(root)
    nested = {name for name in names if os.path.basename(name) != name}
    found = {}
    for folder in folders:
        here = {name for name in nested if (folder / name).is_file()}
        nested -= here
        found[folder] = here | folders[folder].intersection(names)
    paths: dict[str, Path] = {}
    for folder in sorted(found, key=lambda folder: -len(found[folder])):
        paths.update((name, folder / name) for name in found[folder] - paths.keys())
    return paths


# ---- splits ----------------------------------------------------------------------------------


DATASETS: dict[str, Callable[[Path], pd.DataFrame] | None] = {
    "flickr8k": read_flickr8k,
    "flickr30k": read_flickr30k,
    "coco": read_coco,
    "csv": read_csv,
    "shapes": read_shapes,
    "shards": None,  # no table and files: see `unpack_shards`
}


def load_split(
    dataset: str,
    data_dir: str | Path | None,
    split: str,
    split_seed: int = 0,
    cache_dir: Path = CACHE,
) -> list[Record]:
    """Return the records of a split of a dataset; SplitMissingError if it has no such split.

    `data_dir` is data/DATASET if None. Shards may be at an address; they are unpacked into
    `cache_dir`.
    """
    where = (dataset, data_dir, split_seed, cache_dir)
    return load_splits(*where, splits=(split,), required=(split,))[split]


def load_splits(
    dataset: str,
    data_dir: str | Path | None,
    split_seed: int = 0,
    cache_dir: Path = CACHE,
    splits: Sequence[str] = SPLITS,
    required: Sequence[str] = (),
) -> dict[str, list[Record]]:
    """Return the records of each of `splits` that the dataset has; its files are read once.

    Those that are absent are logged; SplitMissingError if one of them is `required`.
    """
    if dataset not in DATASETS:
        raise UserError(f"dataset {dataset!r} is not known; choose from {', '.join(DATASETS)}")
    if unknown := set(splits) - set(SPLITS):
        raise UserError(f"split {min(unknown)!r} is not known; choose from {', '.join(SPLITS)}")
    root = data_folder(dataset, data_dir)
    images = {} if dataset == "shards" else read_images(DATASETS[dataset], root, split_seed)
    records: dict[str, list[Record]] = {}
    for split in splits:
        try:
            if dataset == "shards":
                records[split] = unpack_shards(root, split, cache_dir)
            else:
                records[split] = make_records(images, split, root)
        except SplitMissingError as error:
            if split in required:
                raise
            log.warning("left out: %s", error)
    return records


def data_folder(dataset: str, data_dir: str | Path | None) -> Path | str:
    """Return `data_dir`, or data/DATASET if None; an address of shards stays a string."""
    if not data_dir or not tars.is_address(str(data_dir)):
        return Path(data_dir).expanduser() if data_dir else Path("data") / dataset
    if dataset != "shards":
        raise UserError(
            f"--data-dir {data_dir} is an address, and {dataset} is read from a folder; only "
            "--dataset shards is read from one"
        )
    return str(data_dir)


class Image(NamedTuple):
    """What a table says of an image; `captions` are not empty."""

    image_id: str | int
    split: str
    captions: list[str]


def read_images(
    read: Callable[[Path], pd.DataFrame], root: Path, split_seed: int
) -> dict[str, Image]:
    """Return file → image of a dataset, in the table's order, all of them in one of `SPLITS`."""
    table, images = read(root), {}
    for row in zip(*(table[column].tolist() for column in COLUMNS), strict=True):
        image_id, file, caption, split = row
        if not isinstance(image_id, str | int) or {type(cell) for cell in row[1:]} != {str}:
            raise UserError(f"{root}: not an image id, file, caption and split: {str(row)[:100]}")
        split = split.strip().lower()
        if split not in SPLIT_NAMES:
            raise UserError(
                f"{root}: the split {split[:20]!r} of {file[:100]} is not known; choose from "
                f"{', '.join(filter(None, SPLIT_NAMES))}"
            )
        split = SPLIT_NAMES[split]
        if file not in images:
            images[file] = Image(image_id, split, [])
            if os.path.isabs(file) or ".." in Path(file).parts:
                raise UserError(f"the image path {file[:100]!r} leaves the dataset's folder {root}")
        if images[file][:2] != (image_id, split):
            raise UserError(
                f"{root}: {file[:100]} is listed as image {images[file].image_id} of "
                f"{images[file].split!r} and as image {image_id} of {split!r}"
            )
        if caption := caption.strip():
            images[file].captions.append(caption)
    if not images:
        raise UserError(f"{root} holds no captions")
    unnamed = [file for file, image in images.items() if not image.split]
    if 0 < len(unnamed) < max(3, len(images)):
        raise UserError(
            f"{root}: {len(unnamed)} of {len(images)} images have no split, the first is "
            f"{unnamed[0][:100]}; give a split to all, or to none of at least 3"
        )
    for name in ("", "val/test"):
        group = [file for file, image in images.items() if image.split == name]
        group.sort(key=lambda file: hash_key(images[file].image_id, split_seed))
        if name:
            order = ["test"] * min(COCO_TEST, len(group) // 2) + ["val"] * len(group)
        else:
            eighth = max(1, len(group) // 8)
            order = ["val"] * eighth + ["test"] * eighth + ["train"] * len(group)
        for file, split in zip(group, order, strict=False):
            images[file] = images[file]._replace(split=split)
    return images


def hash_key(name: str | int, seed: int) -> bytes:
    """Return a key to shuffle by: the same order everywhere, whatever it was before."""
    return hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogatepass")).digest()


def make_records(images: Mapping[str, Image], split: str, root: Path) -> list[Record]:
    """Return the records of a split; images without a file or a caption are left out."""
    wanted = {file: image for file, image in images.items() if image.split == split}
    if not wanted:
        present = ", ".join(dict.fromkeys(image.split for image in images.values()))
        raise SplitMissingError(f"no {split} split in {root}; it holds {present}")
    paths = find_images(root if root.is_dir() else root.parent, wanted)
    missing = [file for file, image in wanted.items() if file not in paths or not image.captions]
    if len(missing) == len(wanted):
        what = "captions" if paths else "image"
        raise SplitMissingError(
            f"no {what} of the {split} split in {root} or its folders (wanted {missing[0][:100]} "
            f"and {len(missing) - 1} more)"
        )
    report_left_out(missing, len(wanted), f"of the {split} split have no image file or no caption")
    for file in missing:
        del wanted[file]
    if len({image.image_id for image in wanted.values()}) < len(wanted):
        raise UserError(f"two images of the {split} split in {root} have the same id")
    return [Record(id_, paths[file], tuple(lines)) for file, (id_, _, lines) in wanted.items()]


# ---- images that can't be read ---------------------------------------------------------------


def are_too_many(left_out: int, total: int) -> bool:
    """Return whether so many of `total` images may not be left out: one may, if it is not all."""
    return left_out > max(1, MAX_LEFT_OUT * total) or left_out == total > 0


def report_left_out(image_ids: Sequence[str | int], total: int, reason: str) -> None:
    """Log which images are left out, and of how many; UserError if they are too many."""
    if not image_ids:
        return
    shown = ", ".join(str(image_id)[:100] for image_id in image_ids[:10])
    shown += f" and {len(image_ids) - 10} more" if len(image_ids) > 10 else ""
    message = f"{len(image_ids)} of {total} images {reason}: {shown}"
    if are_too_many(len(image_ids), total):
        raise UserError(f"{message}; more than 1 % is too many to leave out, repair the dataset")
    log.warning("left out: %s", message)


def keep_readable(records: Sequence[Record]) -> list[Record]:
    """Return the records whose image can be read, after reading them all."""

    def is_readable(record: Record) -> bool:
        try:
            read_image(record.path)
        except UNREADABLE:
            return False
        return True

    bar = {"desc": "checking images", "unit": " images", "disable": None, "leave": False}
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        readable = list(tqdm(pool.map(is_readable, records), total=len(records), **bar))
    lost = [record.image_id for record, good in zip(records, readable, strict=True) if not good]
    report_left_out(lost, len(records), "can't be read")
    return list(itertools.compress(records, readable))


# ---- tar shards ------------------------------------------------------------------------------


def list_shards(root: Path | str, split: str, cache_dir: Path) -> list[Record]:
    """Return the records of a split from the list of shards; `path` is shard / name in it."""
    splits = tars.read_index(root, cache_dir)["splits"]
    if split not in splits:
        raise SplitMissingError(f"no {split} split in {root}; it holds {', '.join(splits)}")
    return [Record(*row) for row in shards.read_rows(root, split, cache_dir)]


def unpack_shards(root: Path | str, split: str, cache_dir: Path) -> list[Record]:
    """Return the records of a split, its images unpacked into `cache_dir` the first time."""
    listed = list_shards(root, split, cache_dir)
    records = [Record(*row) for row in shards.unpack_images(root, split, cache_dir)]
    records = [record for record in records if record.path.exists()]
    lost = sorted({one.image_id for one in listed} - {one.image_id for one in records})
    report_left_out(lost, len(listed), f"of the {split} split are missing in their shards")
    return records
