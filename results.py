"""Captions of many pictures as a file that grows by a line a picture: CSV, JSON lines, a page.

What is there already is kept, and a run that was killed goes on after the last whole line.
"""

import contextlib
import csv
import html
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TextIO
from urllib.parse import quote

import files


class Caption(NamedTuple):
    """A caption and the natural logarithm of its probability by the model."""

    text: str
    log_prob: float

    @property
    def score(self) -> float:
        """Return the mean log-probability of a word, the end counted as one."""
        return self.log_prob / (len(self.text.split()) + 1)


class Result(NamedTuple):
    """What became of one picture: its captions, the best first, or why it has none."""

    image: str
    captions: Sequence[Caption]
    error: str = ""


class Form(Protocol):
    """A form of results: a head, a line a picture, and which picture a line is of."""

    def head(self, n: int) -> str: ...
    def line(self, result: Result, n: int, folder: Path) -> str: ...
    def image(self, line: str) -> str: ...


class Csv:
    """Columns image, caption, score, error; with n > 1 also caption_2, score_2 and so on."""

    def head(self, n: int) -> str:
        more = [f"{name}_{place}" for place in range(2, n + 1) for name in ("caption", "score")]
        return self.joined(["image", "caption", "score", *more, "error"])

    def line(self, result: Result, n: int, folder: Path) -> str:
        cells = [cell for each in result.captions for cell in (each.text, f"{each.score:.4f}")]
        return self.joined(
            [result.image, *cells, *[""] * (2 * n - len(cells)), files.one_line(result.error)]
        )

    def image(self, line: str) -> str:
        return next(csv.reader([line]))[0]

    @staticmethod
    def joined(cells: list[str]) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="").writerow(cells)
        return text.getvalue()


class JsonLines:
    """An object a line: image, captions (text, score, log_prob), error."""

    def head(self, n: int) -> str:
        return ""

    def line(self, result: Result, n: int, folder: Path) -> str:
        return json.dumps(as_json(result), ensure_ascii=False)

    def image(self, line: str) -> str:
        return json.loads(line)["image"]


class Page:
    """A gallery: each picture with its captions below it, the best as its alt attribute too."""

    def head(self, n: int) -> str:
        # The end tags of body and html may be left out, so a page can grow like a table.
        return (
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>Captions</title>'
            '<meta name="viewport" content="width=device-width"><style>'
            ":root{color-scheme:light dark}body{font:16px/1.4 system-ui,sans-serif;margin:2rem;"
            "display:grid;gap:2rem 1.5rem;grid-template-columns:repeat(auto-fill,"
            "minmax(16rem,1fr))}"
            "figure{margin:0}img{width:100%;aspect-ratio:4/3;object-fit:contain;border-radius:6px;"
            "background:color-mix(in srgb,currentColor 7%,transparent)}"
            "figcaption{margin-top:.5rem;font-weight:600}small{display:block;font-weight:400;"
            "overflow-wrap:anywhere}small:last-child{font-size:.75rem;opacity:.65;margin-top:.2rem}"
            "p{margin:0;box-sizing:border-box;padding:1rem;aspect-ratio:4/3;display:grid;"
            "place-content:center;text-align:center;border-radius:6px;overflow-wrap:anywhere;"
            "border:1px dashed}</style><body>"
        )

    def line(self, result: Result, n: int, folder: Path) -> str:
        name = html.escape(result.image)
        words = [html.escape(each.text) for each in result.captions]
        if result.error:
            error = html.escape(files.one_line(result.error))
            return f'<figure data-image="{name}"><p>{error}</p></figure>'
        address = html.escape(quote(os.path.relpath(result.image, folder)))
        more = "".join(f"<small>{each}</small>" for each in words[1:])
        return (
            f'<figure data-image="{name}"><img loading="lazy" src="{address}" alt="{words[0]}">'
            f"<figcaption>{words[0]}{more}<small>{html.escape(Path(result.image).name)}</small>"
            "</figcaption></figure>"
        )

    def image(self, line: str) -> str:
        return html.unescape(re.search('data-image="([^"]*)"', line)[1])


FORMS: dict[str, Form] = {"csv": Csv(), "jsonl": JsonLines(), "html": Page()}


def as_json(result: Result) -> dict[str, Any]:
    """Return a result as JSON values."""
    captions = [{**each._asdict(), "score": each.score} for each in result.captions]
    return {"image": result.image, "captions": captions, "error": result.error or None}


def pick_form(path: Path | None, name: str | None) -> str:
    """Return the form asked for by name, or by a file's; ValueError where neither says one."""
    found = name or ("csv" if path is None else path.suffix.lower().removeprefix("."))
    if found not in FORMS:
        raise ValueError(
            f"{path} does not say which form is wanted; end it in .csv, .jsonl or .html, or use "
            f"--format {{{','.join(FORMS)}}}"
        )
    return found


class Results:
    """A file of results, open to be added to; `known` are the pictures in it already."""

    def __init__(self, file: TextIO, form: Form, n: int, folder: Path, known: set[str] | None):
        """`known` None: the file is empty, and gets its head."""
        self.file, self.form, self.n, self.folder = file, form, n, folder
        self.known = known or set()
        if known is None and form.head(n):
            file.write(form.head(n) + "\n")

    def add(self, results: Sequence[Result]) -> None:
        """Write results and hand them to the system at once. ValueError on a line break in a name,
        which would break the line.
        """
        for result in results:
            if "\n" in result.image or "\r" in result.image:
                raise ValueError(f"the file name {result.image!r} has a line break; rename it")
        lines = [f"{self.form.line(result, self.n, self.folder)}\n" for result in results]
        self.file.write("".join(lines))
        self.file.flush()


@contextlib.contextmanager
def open_results(path: Path, name: str, n: int) -> Iterator[Results]:
    """Open the file of results at `path` in a form of `FORMS`, new or to be continued.

    Raises ValueError where it is another thing, or was made with another number of captions.
    """
    form = FORMS[name]
    files.check_writable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    known = read_known(path, form, n) if path.exists() and not files.is_special(path) else None
    encoding = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    with open(path, "a", **encoding) as file:
        yield Results(file, form, n, path.parent, known)


def read_known(path: Path, form: Form, n: int) -> set[str] | None:
    """Return the pictures in a file of results, cut to its last whole line; None where it is empty.

    Raises ValueError where the file is another thing.
    """
    with open(path, "rb+") as file:
        end = whole_lines(file)
        if not end:
            if path.stat().st_size and not form.head(n).encode().startswith(path.read_bytes()):
                raise ValueError(f"{path} is another file; name another --output")
            file.truncate(0)
            return None
        file.truncate(end)
    known: set[str] = set()
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        if form.head(n) and (first := file.readline().rstrip("\r\n")) != form.head(n):
            raise ValueError(
                f"{path} begins with {first[:60]!r}, not as these results would; it is another "
                "file, or was made with another --n: name another --output"
            )
        for number, line in enumerate(file, 2 if form.head(n) else 1):
            try:
                known.add(form.image(line.rstrip("\r\n")))
            except (ValueError, KeyError, TypeError, IndexError, StopIteration) as error:
                raise ValueError(
                    f"line {number} of {path} is no result; name another --output"
                ) from error
    return known


def whole_lines(file: Any) -> int:
    """Return how many bytes of a binary file are whole lines."""
    place = file.seek(0, os.SEEK_END)
    while place:
        start = max(0, place - 65536)
        file.seek(start)
        found = file.read(place - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        place = start
    return 0
