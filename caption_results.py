"""Captions to be scored: a file of them → a caption for each image of a split.

The file is what `inference.py` writes (`--output`, `--json`), COCO's results format, or a table.
"""

import json
import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from caption_files import COLUMN_NAMES
from readers import Record
from util import files, results, tables
from util.files import UserError

log = logging.getLogger(__name__)

EXAMPLE_ROW = '{"image_id": …, "caption": "…"}'
COLUMNS = {
    "image": ("image_id", *COLUMN_NAMES["image"]),
    "caption": COLUMN_NAMES["caption"],
    "score": ("score",),
    "error": ("error",),
}
PAGE = "<!doctype html>"

# --- read


def read_captions(path: Path) -> dict[str, str]:
    """Return image → caption from a file of captions; the image is an id or a path, as text.

    Images that the file says have no caption are left out; of several captions the first counts.
    Raises UserError if the file has another form or two rows of one image.
    """
    captions: dict[str, str] = {}
    for image, caption in read_rows(path):
        if str(image) in captions:
            raise UserError(f"{path} has two captions of image {image!r}; expected one per image")
        captions[str(image)] = caption
    return captions


def read_rows(path: Path) -> Iterator[tuple[Any, str]]:
    """Yield image and caption of each row of a file that has a caption, in any of the formats."""
    kind = path.suffix.lower()
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        begin = file.read(4096).lstrip()
    if kind in (".html", ".htm") or begin.startswith(PAGE):
        return read_page(path)
    if kind == ".jsonl" or (kind != ".json" and begin.startswith("{")):
        return parse_objects(path, read_json_lines(path), "line")
    if (kind in tables.FORMATS and kind != ".json") or begin.startswith("image,caption,"):
        return read_cells(path)
    rows = files.read_json(path)
    if not isinstance(rows, list):
        raise UserError(f"{expected(path)}, not a {type(rows).__name__}")
    return parse_objects(path, enumerate(rows, 1), "entry")


def expected(path: Path) -> str:
    return f"{path} is not a captions file: expected a JSON list of {EXAMPLE_ROW}"


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each line; half a last line, of a killed job, is left out."""
    lines = files.read_text(path).split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines) > 1:
                log.warning("%s ends in half a row, which is left out: %s", path, line[:200])
                return
            raise UserError(f"{path} line {number} is not JSON ({error})") from error
        yield number, value


def parse_objects(
    path: Path, rows: Iterable[tuple[int, Any]], what: str
) -> Iterator[tuple[Any, str]]:
    """Yield image and caption of numbered JSON objects: COCO's, or those of `inference.py`."""
    for number, row in rows:
        fields = row if isinstance(row, dict) else {}
        image = next((fields[name] for name in COLUMNS["image"] if name in fields), None)
        caption = next((fields[name] for name in COLUMNS["caption"] if name in fields), None)
        if isinstance(several := fields.get("captions"), list):
            if not several:
                continue
            caption = several[0].get("text") if isinstance(several[0], dict) else several[0]
        if not isinstance(image, (str, int)) or not isinstance(caption, str):
            raise UserError(f"{expected(path)}; {what} {number} is {repr(row)[:60]}")
        yield image, caption


def read_cells(path: Path) -> Iterator[tuple[str, str]]:
    """Yield image and caption of a table's rows; those of neither caption nor score have none."""
    table = tables.read_table(path, COLUMNS, optional=["score", "error"])
    for image, caption, score in zip(table["image"], table["caption"], table["score"], strict=True):
        if caption or score:
            yield image, caption


def read_page(path: Path) -> Iterator[tuple[str, str]]:
    """Yield image and caption of each figure of a gallery that `inference.py --output` wrote."""
    header, *lines = files.read_text(path).split("\n")
    if header != results.HTML_HEADER:
        raise UserError(f"{path} is not a page of captions that inference.py --output wrote")
    for number, line in enumerate(lines, 2):
        if not line.strip():
            continue
        try:
            result = results.parse_line("html", line, 1)
        except results.NO_RESULT as error:
            raise UserError(f"{path} line {number} is not an image with its caption") from error
        if result.captions:
            yield result.image, result.captions[0].text


def holds_coco_results(path: Path) -> bool:
    """Return whether a file has captions in COCO's results format, and nothing else."""
    rows = files.read_json(path)
    return isinstance(rows, list) and all(
        isinstance(row, dict) and row.keys() == {"image_id", "caption"} for row in rows
    )


# --- match


def match_image_ids(
    captions: Mapping[str, str], records: Sequence[Record], skipped: Sequence[Record] = ()
) -> dict[Any, str]:
    """Return `captions` by the ids of `records`, without those of the `skipped` records.

    An image of `captions` is a record's id, else a path to its file: one whose end is the id or the
    file's name, or that is the end of the file's path. Images of no record are left out, and
    counted in a line. Raises UserError where a path may be of several records, or two are of one.
    """
    everything = [*records, *skipped]
    own = {str(record.image_id): record.image_id for record in everything}
    by_name = defaultdict(list)
    for record in everything:
        by_name[record.path.name].append(record)
    names: dict[Any, str] = {}  # image id → what the file calls the image
    unknown = []
    for name in captions:
        found = [own[name]] if name in own else find_records(name, by_name)
        if len(found) > 1:
            raise UserError(
                f"the captions' image {name!r} may be any of {len(found)} images, such as "
                f"{found[0]!r} and {found[1]!r}; name it by its id"
            )
        if not found:
            unknown.append(name)
        elif (other := names.setdefault(found[0], name)) != name:
            raise UserError(
                f"the captions' images {other!r} and {name!r} are both the image {found[0]!r}; "
                "leave one of them out"
            )
    if unknown and names:
        what = f"{len(unknown)} of {len(captions)} captions are of no image of this split"
        log.warning("%s and are left out, that of %r for one", what, unknown[0])
    dropped = {record.image_id for record in skipped}
    return {each: captions[name] for each, name in names.items() if each not in dropped}


def find_records(name: str, by_name: Mapping[str, Sequence[Record]]) -> list[Any]:
    """Return the ids of the records whose file the path `name` may lead to."""
    path = split_path(name)
    found = []
    for record in by_name.get(path[-1], ()) if path else ():
        own = split_path(str(record.image_id))
        own = own if own and own[-1] == path[-1] else path[-1:]  # an id may be no path
        if ends_with(path, own) or ends_with(split_path(os.path.abspath(record.path)), path):
            found.append(record.image_id)
    return found


def split_path(path: str) -> list[str]:
    """Return the parts of a path, of Windows too, without those that only say where it begins."""
    parts = PurePosixPath(os.path.normpath(path.replace("\\", "/"))).parts
    return [part for part in parts if part not in ("/", "//", ".", "..")]


def ends_with(path: Sequence[str], end: Sequence[str]) -> bool:
    return list(path[-len(end) :]) == list(end)


def pick_captioned(
    records: Sequence[Record], captions: Mapping[Any, str], path: Path, only_captioned: bool
) -> list[Record]:
    """Return the records to score by the captions of the file `path`: all, or those it has.

    Raises UserError if it has none, or lacks some without `only_captioned`.
    """
    captioned = [record for record in records if record.image_id in captions]
    if len(captioned) == len(records) or (captioned and only_captioned):
        return captioned
    lacking = next(record.image_id for record in records if record.image_id not in captions)
    advice = "--only-captioned scores those that it has captions of"
    if not captioned:
        advice = "it has none of this split; name its images by their id or file name"
    raise UserError(
        f"{len(records) - len(captioned)} of {len(records)} images have references but no caption "
        f"in {path}, {lacking!r} for one; {advice}"
    )
