"""Tables of text in CSV, TSV, JSON, JSON lines, Excel or Parquet, with the line of any fault."""

import csv
import io
import itertools
import json
import logging
import re
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from util import files, results
from util.files import UserError

log = logging.getLogger(__name__)

MOST_UNPACKED = 50_000_000  # bytes of an Excel file, which is an archive, in any case
BOMB = 20  # the same of larger files, times their size
FORMATS = (".csv", ".tsv", ".json", ".jsonl", ".xlsx", ".parquet")
# Kaggle's table of Flickr30k has a row that lacks the bar between its number and its caption.
FLICKR30K = ["image_name", "comment_number", "comment"]


def read_table(
    path: Path,
    columns: Mapping[str, Sequence[str]],
    optional: Sequence[str] = (),
    repeated: Sequence[str] = (),
    named: Mapping[str, str] = {},
) -> pd.DataFrame:
    """Return the `columns` of a table; the index is the number of the line (or row), from 1.

    Each column has the names that it may go by in the file, in lower case; the first that is there
    is read. For those in `named` it is that name alone, in any case. `optional` columns may be
    absent, and their cells empty: "". A `repeated` column may be several numbered ones (caption_0,
    caption_1), or have lists in its cells, each text a row unless it is empty; to find it under two
    names, neither its first one, is an error. A suffix that is not in `FORMATS` means CSV.
    UserError names the line at fault. Which columns were read is logged if they have other names.
    """
    columns = {**columns, **{column: [name.strip().lower()] for column, name in named.items()}}
    kind = path.suffix.lower()
    try:
        if kind in (".json", ".jsonl"):
            table = read_objects(path, columns)
        elif kind == ".parquet":
            table = pd.read_parquet(path)
            table.index = range(1, len(table) + 1)
        else:
            table = read_cells(path, {name for names in columns.values() for name in names})
    except ImportError as error:
        package = "pyarrow" if kind == ".parquet" else "openpyxl"
        raise UserError(f"{path} is read with {package}: pip install {package}") from error
    except (OSError, MemoryError, UserError):
        raise
    except Exception as error:  # what openpyxl and pyarrow raise for damaged files has no limits
        message = f"{type(error).__name__}: {str(error)[:100]}"
        raise UserError(f"{path} can't be read as a table ({message})") from error
    header = [str(name).strip().lower() for name in table.columns]
    chosen = {}
    for column, names in columns.items():
        if column in repeated:
            chosen[column] = find_repeated(path, header, names)
        else:
            name = next((name for name in names if name in header), None)
            chosen[column] = [place for place, each in enumerate(header) if each == name]
        found = [header[place] for place in chosen[column]]
        if not found and column in named:
            present = ", ".join(str(name).strip() for name in table.columns)
            raise UserError(f"{path} has no column {named[column]!r}; it has {present[:300]}")
        if len(set(found)) < len(found) or (not found and column not in optional):
            required = " and ".join(name for name in columns if name not in optional)
            raise UserError(
                f"{path} must have the columns {required}, each once, not "
                f"{', '.join(header)[:60]!r}; {column} may be called {', '.join(names)}, "
                f"or what --{column}-column says"
            )
    named = {column: [header[place] for place in places] for column, places in chosen.items()}
    if any(names and names != [column] for column, names in named.items()):
        parts = [f"{column} = {', '.join(names)}" for column, names in named.items() if names]
        log.warning("%s is read with %s", path.name, "; ".join(parts))
    lists = {
        column: [table.iloc[:, place].tolist() for place in places] or [[""] * len(table)]
        for column, places in chosen.items()
    }
    rows = []
    for place, number in enumerate(table.index):
        row = {}
        for column, values in lists.items():
            cells = [each[place] for each in values]
            if column in repeated:
                cells = [text for cell in cells for text in to_list(cell)]
            if column in optional or len(cells) > 1:
                cells = ["" if is_absent(cell) else cell for cell in cells]
            for cell in cells:
                if not isinstance(cell, str):
                    message = f"{path} line {number} has no text in the column {column}"
                    raise UserError(f"{message}: {str(cell)[:60]!r}")
            # An image without any caption keeps one row, with an empty one.
            row[column] = [cell for cell in cells if cell.strip()] or cells[:1]
        rows += [(number, *cells) for cells in itertools.product(*row.values())]
    index = [number for number, *_ in rows]
    return pd.DataFrame([row[1:] for row in rows], index, list(columns), dtype=object)


def is_absent(cell: object) -> bool:
    """Return whether a cell is None or NaN."""
    return cell is None or cell != cell


def is_text(cell: Any) -> bool:
    """Return whether a cell is a text, or a list of some."""
    texts = cell if isinstance(cell, list) else [cell]
    return bool(texts) and all(isinstance(text, str) for text in texts)


def to_list(cell: Any) -> list[Any]:
    """Return the items of a list in a cell (an array in Parquet), else the cell alone."""
    if hasattr(cell, "tolist"):
        cell = cell.tolist()
    return (cell or [""]) if isinstance(cell, list) else [cell]


def find_repeated(path: Path, header: Sequence[str], names: Sequence[str]) -> list[int]:
    """Return the places of a column that goes by one of `names`, or of its numbered columns.

    The first of the names is preferred; of others there may be only one.
    """
    places: dict[str, list[int]] = {}
    for place, name in enumerate(header):
        base = name if name in names else re.sub(r"[ _-]?\d+$", "", name)
        if base in names:
            places.setdefault(base, []).append(place)
    if names[0] in places:
        return places[names[0]]
    if len(places) > 1:
        found = ", ".join(header[each[0]] for each in places.values())
        raise UserError(f"{path} has several columns of captions: {found}; rename all but one")
    return next(iter(places.values()), [])


def read_cells(path: Path, known: Collection[str]) -> pd.DataFrame:
    """Return a CSV, TSV or Excel file, all cells as text without blanks around it.

    A text file's separator is that whose header has the most `known` names of columns.
    """
    rows = {}
    if path.suffix.lower() == ".xlsx":
        size = 0
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                size = sum(each.file_size for each in archive.infolist())
        if size > max(MOST_UNPACKED, BOMB * path.stat().st_size):
            raise UserError(f"{path} unpacks to {size / 1e6:,.0f} MB, too much for a table")
        table = pd.read_excel(path, header=None, dtype=str, keep_default_na=False)
        rows = dict(enumerate(table.to_numpy().tolist(), 1))
    else:
        text = files.read_text(path)
        separator = "\t" if path.suffix.lower() == ".tsv" else find_separator(text, known)
        try:
            # Quotes may follow a space (`a.jpg, "a wet, dog"`); bars have spaces and plain quotes.
            rows = split_lines(path, text, separator, spaced=separator != "|")
        except UserError:
            rows = split_lines(path, text, separator, spaced=False)
    rows = {number: [cell.strip() for cell in cells] for number, cells in rows.items()}
    rows = {number: cells for number, cells in rows.items() if any(cells)}  # blank at the end
    if results.is_own_header(next(iter(rows.values()), [])):
        rows = {number: list(map(results.unescape_cell, cells)) for number, cells in rows.items()}
    if not rows:
        raise UserError(f"{path} is empty")
    header = next(iter(rows.values()))
    if header == FLICKR30K:
        rows = {number: mend_flickr30k(cells) for number, cells in rows.items()}
    header, *body = rows.values()
    for number, cells in rows.items():
        if len(cells) != len(header):
            message = f"{path} line {number} has {len(cells)} cells, not {len(header)}"
            raise UserError(f"{message}: {str(cells)[:60]}")
    return pd.DataFrame(body, index=list(rows)[1:], columns=header, dtype=object)


def find_separator(text: str, known: Collection[str]) -> str:
    """Return the separator of a table: that which gives the most known names, or is most often."""
    header = next((line for line in text.split("\n") if line.strip()), "")

    def count(separator: str) -> tuple[int, int]:
        names = [cell.strip().strip('"').lower() for cell in header.split(separator)]
        return sum(name in known for name in names), header.count(separator)

    return max(",|;\t", key=count)


def split_lines(path: Path, text: str, separator: str, spaced: bool) -> dict[int, list[str]]:
    """Return the cells of each line, by its number; `spaced`: spaces before a quote are skipped."""
    # pandas.read_csv would cut or fill rows of another length, and accept open quotes.
    reader = csv.reader(
        io.StringIO(text), delimiter=separator, strict=True, skipinitialspace=spaced
    )
    rows: dict[int, list[str]] = {}
    try:
        for cells in reader:
            rows[reader.line_num] = cells
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: {error}") from error
    return rows


def mend_flickr30k(cells: list[str]) -> list[str]:
    """Return the cells of a row of Kaggle's Flickr30k: `4   A dog runs .` is two of them."""
    number, _, caption = cells[-1].partition(" ")
    if len(cells) == 2 and number.isdigit() and caption.strip():
        return [cells[0], number, caption.strip()]
    return cells


def read_objects(path: Path, columns: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Return the table of a JSON list of objects, or of a file with an object per line.

    A JSON object that is no row itself has a row per key, that of the first of the `columns`; its
    value is the second, or an object with the others.
    """
    rows = {}
    if path.suffix.lower() == ".json":
        value = files.read_json(path)
        known = {name for names in columns.values() for name in names}
        if isinstance(value, dict) and not known & set(map(str.lower, value)):
            first, second, *_ = [*columns, "", ""]
            cells = [each if isinstance(each, dict) else {second: each} for each in value.values()]
            if value and all(isinstance(each, dict) or is_text(each) for each in value.values()):
                value = [{first: key, **row} for key, row in zip(value, cells, strict=True)]
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
            raise UserError(f'{path} line {number} is not {{"column": "text"}}: {str(row)[:60]}')
        rows[number] = {key.strip().lower(): cell for key, cell in row.items()}
    return pd.DataFrame(list(rows.values()), index=list(rows), dtype=object)
