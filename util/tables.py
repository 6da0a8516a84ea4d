"""Tables of text in CSV, TSV, JSON, JSON lines, Excel or Parquet, with the line of any fault."""

import csv
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from util import files, results
from util.files import UserError

MOST_UNPACKED = 50_000_000  # bytes of an Excel file, which is an archive, in any case
BOMB = 20  # the same of larger files, times their size
FORMATS = (".csv", ".tsv", ".json", ".jsonl", ".xlsx", ".parquet")


def read_table(
    path: Path, columns: Mapping[str, Sequence[str]], optional: Sequence[str] = ()
) -> pd.DataFrame:
    """Return the `columns` of a table; the index is the number of the line (or row), from 1.

    Each column has the names that it may go by in the file, in lower case; the first that is there
    is read. `optional` columns may be absent, and their cells empty: "". A suffix that is not in
    `FORMATS` means CSV. UserError names the line at fault.
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
    except (OSError, MemoryError, UserError):
        raise
    except Exception as error:  # what openpyxl and pyarrow raise for damaged files has no limits
        message = f"{type(error).__name__}: {str(error)[:100]}"
        raise UserError(f"{path} can't be read as a table ({message})") from error
    header = [str(name).strip().lower() for name in table.columns]
    found = {}
    for column, names in columns.items():
        name = next((name for name in names if name in header), None)
        if header.count(name) > 1 or (name is None and column not in optional):
            required = " and ".join(name for name in columns if name not in optional)
            raise UserError(
                f"{path} must have the columns {required}, each once, not "
                f"{', '.join(header)[:60]!r}"
            )
        cells = table.iloc[:, header.index(name)] if name else pd.Series("", table.index)
        if column in optional:
            cells = cells.where(cells.notna(), "")
        found[column] = cells.tolist()
        for number, cell in zip(table.index, found[column], strict=True):
            if not isinstance(cell, str):
                message = f"{path} line {number} has no text in the column {column}"
                raise UserError(f"{message}: {str(cell)[:60]!r}")
    return pd.DataFrame(found, index=table.index, dtype=object)


def read_cells(path: Path) -> pd.DataFrame:
    """Return a CSV, TSV or Excel file, all cells as text without blanks around it."""
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
        header = text.partition("\n")[0]
        separator = "\t" if path.suffix.lower() == ".tsv" else max(",|;\t", key=header.count)
        # pandas.read_csv would cut or fill rows of another length, and accept open quotes.
        reader = csv.reader(io.StringIO(text), delimiter=separator, strict=True)
        try:
            for cells in reader:
                rows[reader.line_num] = cells
        except csv.Error as error:
            raise UserError(f"{path} line {reader.line_num}: {error}") from error
    rows = {number: [cell.strip() for cell in cells] for number, cells in rows.items()}
    rows = {number: cells for number, cells in rows.items() if any(cells)}  # blank at the end
    if results.is_own_header(next(iter(rows.values()), [])):
        rows = {number: list(map(results.unescape_cell, cells)) for number, cells in rows.items()}
    if not rows:
        raise UserError(f"{path} is empty")
    header, *body = rows.values()
    for number, cells in rows.items():
        if len(cells) != len(header):
            message = f"{path} line {number} has {len(cells)} cells, not {len(header)}"
            raise UserError(f"{message}: {str(cells)[:60]}")
    return pd.DataFrame(body, index=list(rows)[1:], columns=header, dtype=object)


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
            raise UserError(f'{path} line {number} is not {{"column": "text"}}: {str(row)[:60]}')
        rows[number] = {key.strip().lower(): cell for key, cell in row.items()}
    return pd.DataFrame(list(rows.values()), index=list(rows), dtype=object)
