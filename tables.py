"""A table of captions (CSV, TSV or JSON lines) → its rows; each fault is named by its line."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

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
                raise ValueError(f"{path} line {number} has no {column}: {str(row)[:60]}")
        yield number, row


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    # Strict, because a quote that is not closed would swallow the captions after it.
    delimiter = DELIMITERS.get(path.suffix.lower(), ",")
    table = csv.reader(read_lines(path), delimiter=delimiter, strict=True)
    try:
        first = next(table, [])
        header = [cell.strip().lower() for cell in first]
        if any(header.count(column) != 1 for column in COLUMNS) or header.count("split") > 1:
            raise ValueError(
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
        raise ValueError(f"{path} line {table.line_num} is not a caption ({error})") from error


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.strip())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} line {number} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f'{path} line {number} is not {{"image": "…", "caption": "…"}}')
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


def _not_text(path: Path, error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"{path} is not a text file in UTF-8 ({error.reason}); save it as UTF-8")
