"""Caption files on disk → a table with a row per caption → the records of each split.

A dataset is one reader and one row in `DATASETS`. A reader returns a `pandas.DataFrame` with a row
per caption and these columns; everything else is done here, once for all datasets:

- `image_id`: the file name; COCO: the integer id;
- `file`: the image's name, or its path below the dataset's folder;
- `caption`: as written; an image without captions has one row with an empty caption;
- `split`: a key of `SPLIT_NAMES`.
"""

import functools
import hashlib
import inspect
import itertools
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pandas as pd

import shards
from caption_files import (
    COLUMNS,
    NOT_NAMED,
    Columns,
    is_coco,
    read_coco_annotations,
    read_karpathy,
    read_table,
    read_token_file,
)
from shards import SPLITS
from util import files, shapes, tables, tars
from util.files import UserError
from util.folders import check_folder, find_file, find_images, scan_folders
from util.images import UNREADABLE, count_others, read_image, report_left_out, walk_images
from util.progress import progress_bar
from util.threads import count_cpus

log = logging.getLogger(__name__)

# What a split may be called, in lower case. Images of "val/test" and of no named split are divided.
SPLIT_NAMES = {name: name for name in (*SPLITS, "val/test", "")}
SPLIT_NAMES |= {"dev": "val", "valid": "val", "validation": "val"}
SPLIT_NAMES |= {"restval": "train"}  # the images of COCO's val that Karpathy adds to train
COCO_TEST = 5000  # images that "val/test" gives to test
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
        return read_karpathy(karpathy, folders)
    if not captions:
        names = "Flickr8k.token.txt, captions.txt, dataset_flickr8k.json"
        raise no_captions("Flickr8k", root, names)
    table = read_table(captions) if captions.name == "captions.txt" else read_token_file(captions)
    if not listed:
        return table.sort_values("image_id", kind="stable")
    # A list may name an image that has no captions.
    images = pd.DataFrame(listed, columns=["image_id", "split"], dtype=object)
    table = images.merge(table[["image_id", "caption"]], how="left").fillna({"caption": ""})
    return table.assign(file=table["image_id"])


def read_flickr30k(root: Path) -> pd.DataFrame:
    """Return the table of Flickr30k: Karpathy's JSON, in `root` or a folder in it."""
    folders = scan_folders(root)
    if karpathy := find_file(folders, "dataset_flickr30k.json"):
        return read_karpathy(karpathy, folders)
    raise no_captions("Flickr30k", root, "dataset_flickr30k.json")


def read_coco(root: Path, splits: Sequence[str] = SPLITS) -> pd.DataFrame:
    """Return the table of COCO captions, 2014 or 2017; image ids are integers.

    Karpathy's `dataset_coco.json` if it is there, else the official annotations, which have no test
    split: val is divided. Of these, only the files that have `splits` are read: train's takes long.
    """
    folders = scan_folders(root)
    if karpathy := find_file(folders, "dataset_coco.json"):
        return read_karpathy(karpathy, folders, "cocoid")
    found = {}
    for part, split in (("train", "train"), ("val", "val/test")):
        path = find_file(folders, f"captions_{part}2014.json", f"captions_{part}2017.json")
        if path:
            found[split] = path
    if not found:
        names = "captions_train2014.json, captions_val2014.json, those of 2017, dataset_coco.json"
        raise no_captions("COCO", root, names)
    # Without a file of a wanted split all are read, to say which splits there are.
    wanted = {split for split in found if set(split.split("/")) & set(splits)} or set(found)
    return pd.concat(
        read_coco_annotations(path, folders).assign(split=split)
        for split, path in found.items()
        if split in wanted
    )


def read_shapes(root: Path) -> pd.DataFrame:
    """Return the table of the synthetic shapes, which are drawn into `root` first."""
    return read_karpathy(shapes.draw(root) / "captions.json", {})


def read_csv(root: Path, columns: Columns = NOT_NAMED) -> pd.DataFrame:
    """Return the table of images of your own: `root` is a captions table or a folder with one.

    In a folder, a table called captions or metadata is read, else the only one. `columns`: those
    that the user has named.
    """
    found = [root] if root.is_file() else []
    if root.is_dir():
        found = sorted(path for path in root.iterdir() if path.suffix.lower() in tables.FORMATS)
        found = [path for path in found if path.name[0] not in ".~"]  # open in Excel, or a Mac's
        usual = [path for path in found if path.stem in ("captions", "metadata")]
        # Other JSON files may hold anything.
        found = usual or [path for path in found if path.suffix.lower() != ".json"]
        kaggle = root / "captions.txt"  # Flickr8k's; other text files are no tables
        if not found and kaggle.is_file():
            found = [kaggle]
    if not found:
        raise FileNotFoundError(
            f"no table of captions in {root}: give --data-dir, the folder that holds captions.csv "
            f"(or {', '.join(tables.FORMATS[1:])}), or the file, with the columns image and caption"
        )
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"several tables in {root}: {names}; name one with --data-dir")
    if is_coco(found[0]):
        if flags := " and ".join(columns.flags):
            raise UserError(f"{found[0]} has COCO's annotations, no columns; leave out {flags}")
        folder = root if root.is_dir() else root.parent
        log.warning("%s is read as COCO's annotations", found[0].name)
        return read_coco_annotations(found[0], scan_folders(folder)).assign(split="")
    return read_table(found[0], columns)


def read_sidecar(root: Path) -> pd.DataFrame:
    """Return the table of images with text files beside them: dog.txt for dog.jpg.

    Each line is a caption. Images without a text file have none.
    """
    check_folder(root)
    rows, others = [], Counter()
    for image in map(Path, walk_images(root, others=others)):
        file, text = image.relative_to(root).as_posix(), image.with_suffix(".txt")
        lines = files.read_text(text).splitlines() if text.is_file() else []
        captions = [line for line in lines if line.strip()] or [""]
        rows += [(file, file, caption, "") for caption in captions]
    del others[".txt"]
    if others:
        log.warning("left out: %s", count_others(others))
    if not any(caption for _, _, caption, _ in rows):
        raise FileNotFoundError(
            f"no captions in {root} or its folders: searched for text files beside images, such as "
            "dog.txt for dog.jpg; give --data-dir"
        )
    return pd.DataFrame(rows, columns=COLUMNS, dtype=object).sort_values("file", kind="stable")


def no_captions(dataset: str, root: Path, names: str) -> FileNotFoundError:
    """Return the error that says which files were searched for."""
    return FileNotFoundError(
        f"no {dataset} captions in {root} or its folders: searched for {names}; run python "
        f"download_data.py {dataset.lower()} or give --data-dir"
    )


# ---- splits ----------------------------------------------------------------------------------


DATASETS: dict[str, Callable[[Path], pd.DataFrame] | None] = {
    "flickr8k": read_flickr8k,
    "flickr30k": read_flickr30k,
    "coco": read_coco,
    "csv": read_csv,
    "sidecar": read_sidecar,
    "shapes": read_shapes,
    "shards": None,  # no table and files: see `unpack_shards`
}


def load_split(
    dataset: str,
    data_dir: str | Path | None,
    split: str,
    split_seed: int = 0,
    cache_dir: Path = CACHE,
    columns: Columns = NOT_NAMED,
) -> list[Record]:
    """Return the records of a split of a dataset; SplitMissingError if it has no such split.

    `data_dir` is data/DATASET if None. Shards may be at an address; they are unpacked into
    `cache_dir`. `columns`: see `read_csv`.
    """
    where = (dataset, data_dir, split_seed, cache_dir)
    return load_splits(*where, splits=(split,), required=(split,), columns=columns)[split]


def load_splits(
    dataset: str,
    data_dir: str | Path | None,
    split_seed: int = 0,
    cache_dir: Path = CACHE,
    splits: Sequence[str] = SPLITS,
    required: Sequence[str] = (),
    columns: Columns = NOT_NAMED,
) -> dict[str, list[Record]]:
    """Return the records of each of `splits` that the dataset has; its files are read once.

    Those that are absent are logged; SplitMissingError if one of them is `required`. `columns`:
    see `read_csv`.
    """
    if dataset not in DATASETS:
        raise UserError(f"dataset {dataset!r} is not known; choose from {', '.join(DATASETS)}")
    if unknown := set(splits) - set(SPLITS):
        raise UserError(f"split {min(unknown)!r} is not known; choose from {', '.join(SPLITS)}")
    check_columns(columns, [dataset])
    root = data_folder(dataset, data_dir)
    images = {}
    if dataset != "shards":
        read = DATASETS[dataset]
        settings = {"splits": splits, "columns": columns}  # it need not read all of its files
        known = inspect.signature(read).parameters
        read = functools.partial(read, **{key: settings[key] for key in settings if key in known})
        images = group_captions(read, root, split_seed)
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


def check_columns(columns: Columns, datasets: Sequence[str]) -> None:
    """Raise UserError if columns are named and none of the `datasets` is a table."""
    if columns.flags and "csv" not in datasets:
        flags = " and ".join(f"{flag} {name}" for flag, name in columns.flags.items())
        raise UserError(
            f"{flags} is for tables of your own (--dataset csv), not for --dataset "
            f"{' and '.join(datasets)}"
        )


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


class ImageCaptions(NamedTuple):
    """What a table says of an image; `captions` are not empty."""

    image_id: str | int
    split: str
    captions: list[str]


def group_captions(
    read: Callable[[Path], pd.DataFrame], root: Path, split_seed: int
) -> dict[str, ImageCaptions]:
    """Return file → image of a dataset, in the table's order, all of them in one of `SPLITS`."""
    table, images = read(root), {}
    for row in zip(*(table[column].tolist() for column in COLUMNS), strict=True):
        image_id, file, caption, split = row
        if not isinstance(image_id, str | int) or {type(cell) for cell in row[1:]} != {str}:
            raise UserError(f"{root}: not an image id, file, caption and split: {str(row)[:100]}")
        if (split := SPLIT_NAMES.get(split.strip().lower())) is None:
            known = ", ".join(filter(None, SPLIT_NAMES))
            message = f"the split {row[3][:20]!r} of {file[:100]} is not known"
            raise UserError(f"{root}: {message}; choose from {known}")
        if file not in images:
            images[file] = ImageCaptions(image_id, split, [])
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
        # By a hash: the same order everywhere, whatever the order of the table.
        keys = {file: f"{split_seed}/{images[file].image_id}" for file in group}
        keys = {file: key.encode("utf-8", "surrogatepass") for file, key in keys.items()}
        group.sort(key=lambda file: hashlib.sha256(keys[file]).digest())
        if name:
            order = ["test"] * min(COCO_TEST, len(group) // 2) + ["val"] * len(group)
        else:
            eighth = max(1, len(group) // 8)
            order = ["val"] * eighth + ["test"] * eighth + ["train"] * len(group)
        for file, split in zip(group, order, strict=False):
            images[file] = images[file]._replace(split=split)
    return images


def make_records(images: Mapping[str, ImageCaptions], split: str, root: Path) -> list[Record]:
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


def keep_readable(records: Sequence[Record]) -> list[Record]:
    """Return the records whose image can be read, after reading them all."""

    def is_readable(record: Record) -> bool:
        try:
            read_image(record.path)
        except UNREADABLE:
            return False
        return True

    bar = {"desc": "checking images", "unit": " images", "leave": False}
    with ThreadPoolExecutor(max_workers=count_cpus()) as pool:
        readable = list(progress_bar(pool.map(is_readable, records), total=len(records), **bar))
    lost = [record.image_id for record, good in zip(records, readable, strict=True) if not good]
    report_left_out(lost, len(records), "can't be read")
    return list(itertools.compress(records, readable))


# ---- tar shards ------------------------------------------------------------------------------


def list_shards(
    root: Path | str, split: str, cache_dir: Path, read: Callable = shards.read_rows
) -> list[Record]:
    """Return the records of a split, read from the shards' list; `path` is shard / name in it."""
    splits = tars.read_index(root, cache_dir)["splits"]
    if split not in splits:
        raise SplitMissingError(f"no {split} split in {root}; it holds {', '.join(splits)}")
    return [Record(*row) for row in read(root, split, cache_dir)]


def unpack_shards(root: Path | str, split: str, cache_dir: Path) -> list[Record]:
    """Return the records of a split, its images unpacked into `cache_dir` the first time."""
    records = list_shards(root, split, cache_dir, shards.unpack_images)
    missing = [record.image_id for record in records if not record.path.exists()]
    report_left_out(missing, len(records), f"of the {split} split are missing in their shards")
    return [record for record in records if record.path.exists()]
