"""Captions files, parsed: one function per format; each returns a table as `readers` wants it."""

import logging
import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from util import files, tables
from util.files import UserError
from util.folders import Folders, add_folders

log = logging.getLogger(__name__)


class Columns(NamedTuple):
    """The columns that a user's table has its images and captions in, where they are named."""

    image: str | None = None
    caption: str | None = None

    @property
    def flags(self) -> dict[str, str]:
        """The flags that name them, with their values."""
        return {f"--{key}-column": name for key, name in self._asdict().items() if name}


NOT_NAMED = Columns()
COLUMNS = ["image_id", "file", "caption", "split"]
# Names of a captions table's columns, in lower case; the first that is there is used.
COLUMN_NAMES = {
    "image": ("image", "file_name", "filename", "image_name", "image_path", "file", "path"),
    "caption": (
        "caption", "text", "comment", "caption_text", "description", "sentence", "captions",
        "sentences",
    ),
    "split": ("split",),
}  # fmt: skip
# What JSON of another structure raises.
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, OverflowError)


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


def read_table(path: Path, columns: Columns = NOT_NAMED) -> pd.DataFrame:
    """Return the table of a file in one of the formats of `util.tables`.

    `columns` are read, or those that are found by their usual names.
    """
    named = {column: name for column, name in columns._asdict().items() if name}
    how = {"optional": ["split"], "repeated": ["caption"], "named": named}
    table = tables.read_table(path, COLUMN_NAMES, **how)
    names = {}
    for number, name in table["image"].drop_duplicates().items():
        if not name.strip():
            raise UserError(f"{path} line {number} has no image")
        place = name.strip()
        if "\\" in place and not os.path.lexists(path.parent / place):
            portable = place.replace("\\", "/")
            if os.path.isfile(path.parent / portable):  # written on Windows
                place = portable
        names[name] = os.path.normpath(place)
        if os.path.isabs(names[name]):
            names[name] = os.path.relpath(names[name], os.path.abspath(path.parent))
        names[name] = Path(names[name]).as_posix()
    image_ids = table.pop("image").map(names)
    return table.assign(image_id=image_ids, file=image_ids)


def read_karpathy(path: Path, folders: Folders, id_key: str = "filename") -> pd.DataFrame:
    """Return the table of one of Karpathy's JSON files; `id_key` is where it has the image's id.

    An image is in the folder that `filepath` names, if there is one of that name.
    """
    value, rows = files.read_json(path), []
    try:
        images = value["images"]
        names = paths = [image["filename"] for image in images]
        if all(isinstance(name, str) for name in names):  # else `group_captions` shows which
            folder_names = [image.get("filepath") or "" for image in images]
            paths = add_folders(folders, list(zip(folder_names, names, strict=True)))
            shared = Counter(name for name, _ in set(zip(names, paths, strict=True)))
        for image, name, file in zip(images, names, paths, strict=True):
            image_id = image[id_key]
            if id_key == "filename" and file != name and shared[name] > 1:
                image_id = file  # images of one name in two folders
            for caption in [sentence["raw"] for sentence in image["sentences"]] or [""]:
                rows.append((image_id, file, caption, image["split"]))
    except MALFORMED as error:
        raise UserError(
            f'{path} is not a captions file: expected {{"images": [{{"{id_key}", "filename", '
            f'"split", "sentences": [{{"raw"}}]}}]}} ({type(error).__name__}: {error})'
        ) from error
    return pd.DataFrame(rows, columns=COLUMNS, dtype=object)


def is_coco(path: Path) -> bool:
    """Return whether a file is JSON in the structure of COCO's annotations."""
    if path.suffix.lower() != ".json":
        return False
    value = files.read_json(path)
    return isinstance(value, dict) and {"images", "annotations"} <= value.keys()


def read_coco_annotations(path: Path, folders: Folders) -> pd.DataFrame:
    """Return the table of an official annotation file, without `split`.

    Images are searched for in the folder that the file names or that has its own name (train2014),
    else in all folders.
    """
    value, captions = files.read_json(path), defaultdict(list)
    try:
        places = [os.path.split(image["file_name"]) for image in value["images"]]
        paths = add_folders(folders, places, default=path.stem.removeprefix("captions_"))
        names = {int(image["id"]): file for image, file in zip(value["images"], paths, strict=True)}
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
