"""Files of captions: CSV, JSON lines, HTML, with a line per image.

A file grows line by line, so a job that was killed continues after the last complete line. Of
several processes, each writes a part, `captions.csv.part-0` and so on; `merge_parts` adds them to
the file at the end of the job, or at the start of the next one. `captions.csv.settings.json` says
which model and settings the captions are of.
"""

import contextlib
import csv
import glob
import html
import io
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from util import files, program
from util.addresses import is_address
from util.files import UserError
from util.images import EXTENSIONS
from util.scripts import list_words

log = logging.getLogger(__name__)


class Caption(NamedTuple):
    """A caption and the natural logarithm of its probability, end token included."""

    text: str
    log_prob: float

    @property
    def score(self) -> float:
        """Return the mean log-probability per word, where the end token counts as a word.

        Characters of a script without spaces are words.
        """
        return self.log_prob / (len(list_words(self.text)) + 1)


class Result(NamedTuple):
    """An image with its captions, best first, or with the reason why it has none."""

    image: str
    captions: Sequence[Caption]
    error: str = ""

    @property
    def has_scores(self) -> bool:
        """Return whether the scores of all captions are known, as they are not in a page."""
        return not any(math.isnan(each.log_prob) for each in self.captions)

    def to_json(self) -> dict[str, Any]:
        """Return the result as values that JSON can represent."""
        captions = [{**each._asdict(), "score": each.score} for each in self.captions]
        return {"image": self.image, "captions": captions, "error": self.error or None}


# --- formats: a header and a line per image; `n` is the number of captions per image

FORMATS = ("csv", "jsonl", "html")
# The end tags of body and html may be omitted, so a page can grow line by line.
HTML_HEADER = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><title>Captions</title>'
    '<meta name="viewport" content="width=device-width"><style>'
    ":root{color-scheme:light dark}body{font:16px/1.4 system-ui,sans-serif;margin:2rem;"
    "display:grid;gap:2rem 1.5rem;grid-template-columns:repeat(auto-fill,minmax(16rem,1fr))}"
    "figure{margin:0}img{width:100%;aspect-ratio:4/3;object-fit:contain;border-radius:6px;"
    "background:color-mix(in srgb,currentColor 7%,transparent)}"
    "figcaption{margin-top:.5rem;font-weight:600}small{display:block;font-weight:400;"
    "overflow-wrap:anywhere}small:last-child{font-size:.75rem;opacity:.65;margin-top:.2rem}"
    "p{margin:0;box-sizing:border-box;padding:1rem;aspect-ratio:4/3;display:grid;"
    "place-content:center;text-align:center;border-radius:6px;overflow-wrap:anywhere;"
    "border:1px dashed}</style><body>"
)


def pick_format(path: Path | None, name: str | None) -> str:
    """Return the format: `name`, or by the suffix of `path`, or CSV; UserError if not known."""
    name = name or ("csv" if path is None else path.suffix.lower().removeprefix("."))
    if name not in FORMATS:
        raise UserError(
            f"{path} does not say which format is wanted; end it in .csv, .jsonl or .html, or use "
            f"--format {{{','.join(FORMATS)}}}"
        )
    others = {f".{other}" for other in FORMATS if other != name}
    if path is not None and path.suffix.lower() in others | EXTENSIONS:
        raise UserError(
            f"{path} is to be written as {name}, so its name must not end in {path.suffix}"
        )
    return name


def format_header(format: str, n: int) -> str:
    """Return what a file begins with. Only CSV depends on `n`: caption_2, score_2, …"""
    if format == "csv":
        more = [f"{name}_{rank}" for rank in range(2, n + 1) for name in ("caption", "score")]
        return ",".join(["image", "caption", "score", *more, "error"]) + "\n"
    return f"{HTML_HEADER}\n" if format == "html" else ""


def format_line(format: str, result: Result, n: int, folder: Path) -> str:
    """Return the line of a result in a file in `folder`: CSV cells, a JSON object, or a figure."""
    if format == "jsonl":
        return json.dumps(result.to_json(), ensure_ascii=False) + "\n"
    error = program.one_line(result.error)
    texts = [re.sub(r"[\r\n]+", " ", each.text) for each in result.captions]
    if format == "csv":
        scores = ["" if math.isnan(each.score) else f"{each.score:.4f}" for each in result.captions]
        pairs = zip(map(escape_cell, texts), scores, strict=True)
        cells = [cell for pair in pairs for cell in pair]
        cells += [""] * (2 * n - len(cells))
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(
            [escape_cell(result.image), *cells, escape_cell(error)]
        )
        return text.getvalue()
    name = html.escape(result.image)
    if not texts:
        return f'<figure data-image="{name}"><p>{html.escape(error)}</p></figure>\n'
    best, *others = map(html.escape, texts)
    is_link = is_address(result.image)
    address = result.image if is_link else quote(os.path.relpath(result.image, folder))
    address = html.escape(address)
    more = "".join(f"<small>{each}</small>" for each in others)
    return (
        f'<figure data-image="{name}"><img loading="lazy" src="{address}" alt="{best}">'
        f"<figcaption>{best}{more}<small>{html.escape(Path(result.image).name)}</small>"
        "</figcaption></figure>\n"
    )


def parse_line(format: str, line: str, n: int) -> Result:
    """Return the result in a line; a caption whose score it does not say has the score NaN.

    Raises one of `NO_RESULT` if it is no such line, or only half of one.
    """
    if format == "jsonl":
        row = json.loads(line)
        image, error = row["image"], row.get("error") or ""
        captions = [Caption(each["text"], float(each["log_prob"])) for each in row["captions"]]
        if not all(isinstance(text, str) for text in (image, error, *(c.text for c in captions))):
            raise TypeError("expected text")
        return Result(image, captions, error)
    if format == "csv":
        (cells,) = csv.reader([line], strict=True)
        image, *pairs, error = map(unescape_cell, cells)
        if len(pairs) != 2 * n:
            raise ValueError(f"{len(cells)} cells, not {2 + 2 * n}")
        captions = []
        for text, score in zip(pairs[::2], pairs[1::2], strict=True):
            if text or score:
                mean = float(score or math.nan)  # a caption written by hand may have none
                captions.append(Caption(text, mean * (len(list_words(text)) + 1)))
        return Result(image, captions, error)
    figure = re.fullmatch(r'<figure data-image="([^"]*)">(.*)</figure>\s*', line)
    image, content = html.unescape(figure[1]), figure[2]
    if error := re.fullmatch("<p>(.*)</p>", content):
        return Result(image, (), html.unescape(error[1]))
    text = re.search("<figcaption>(.*?)<small>(.*)</small></figcaption>", content)
    texts = [text[1], *text[2].split("</small><small>")[:-1]]  # the last is the file's name
    return Result(image, [Caption(html.unescape(each), math.nan) for each in texts])


# What `parse_line` raises for other lines.
NO_RESULT = (ValueError, LookupError, TypeError, AttributeError, RecursionError, csv.Error)

# --- cells that a spreadsheet would run

# What a spreadsheet takes for a formula, or may after it has cut blanks; behind apostrophes too.
FORMULA = re.compile(r"['\s]*[=+\-@\uff1d\uff0b\uff0d\uff20]|'*[\t\r\n]")


def escape_cell(text: str) -> str:
    """Return the text for a cell of a CSV file, which a spreadsheet must not run as a formula.

    An apostrophe is put in front of what begins like one. `unescape_cell` returns any text as it
    was; numbers of our own, such as -0.5, are no text and need no escape.
    """
    return f"'{text}" if FORMULA.match(text) else text


def unescape_cell(cell: str) -> str:
    """Return the text that `escape_cell` made the cell of."""
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell[1:]) else cell


def is_own_header(header: Sequence[str]) -> bool:
    """Return whether this is the header of the captions that `inference.py --output` writes."""
    return list(header[:3]) == ["image", "caption", "score"] and header[-1] == "error"


# --- the file and its parts

TEXT = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}


@contextlib.contextmanager
def open_results(file: Any, format: str, n: int) -> Iterator[Callable[[Result], None]]:
    """Yield a function that appends a result to `file`, a path or an open text file, and flushes.

    It raises UserError if the image's name contains a line break, which would break the line.
    """
    folder = file.parent if isinstance(file, Path) else Path()

    def write(result: Result) -> None:
        if "\n" in result.image or "\r" in result.image:
            raise UserError(f"the file name {result.image!r} has a line break; rename it")
        line = format_line(format, result, n, folder)
        # Programs get the content as it is, people at a terminal what is safe to show.
        stream.write(f"{program.printable(line.rstrip())}\n" if stream.isatty() else line)
        stream.flush()

    with contextlib.ExitStack() as stack:
        stream, is_new = file, True
        if isinstance(file, Path):
            folder.mkdir(parents=True, exist_ok=True)
            stream = stack.enter_context(open(file, "a", **TEXT))
            is_new = not os.fstat(stream.fileno()).st_size
        if is_new:
            stream.write(format_header(format, n))
        yield write


def part_file(path: Path, rank: int) -> Path:
    """Return the path of the part that process `rank` writes of the results at `path`."""
    return path.with_name(f"{path.name}.part-{rank}")


def find_parts(path: Path) -> list[Path]:
    """Return the existing parts of the results at `path`."""
    parts = path.parent.glob(f"{glob.escape(path.name)}.part-*")
    return sorted(part for part in parts if re.fullmatch(r".*\.part-\d+", part.name, re.DOTALL))


def merge_parts(path: Path, format: str, n: int, images: Sequence[str]) -> dict[str, str]:
    """Add the rows of all parts to the file at `path`; return the line of each image in it.

    The file is sorted by the order of `images`; rows of other images stay in front. Of an image's
    rows the first with captions and no error counts, else the last with captions, else the last.
    The file is replaced in one step, before the parts are removed, so that a kill loses no row and
    duplicates none. Raises UserError, and changes nothing, if a file is not one of results.
    """
    files.check_writable(path)
    if files.is_special(path):
        return {}
    parts = find_parts(path)
    rows: dict[str, str] = {}
    ranks: dict[str, int] = {}
    lines = []  # of the file itself
    for source in [path, *parts] if path.exists() else parts:
        for result, line in read_rows(source, format, n):
            if source == path:
                lines.append(line)
            if result is None:
                continue
            rank, before = 2 * bool(result.captions) + (not result.error), ranks.get(result.image)
            if before is None or rank > before or rank == before < 3:
                is_whole = line.endswith("\n") and not line.endswith("\r\n")  # no copy in memory
                rows[result.image] = line if is_whole else line.rstrip("\r\n") + "\n"
                ranks[result.image] = rank
    position = {image: number for number, image in enumerate(images)}
    ordered = sorted(rows, key=lambda image: position.get(image, -1))
    merged = [*filter(None, [format_header(format, n)]), *(rows[image] for image in ordered)]
    if parts or (lines and lines != merged):
        files.remove_leftovers(path)
        with files.replacing(path) as temporary, open(temporary, "w", **TEXT) as file:
            file.writelines(merged)
    for part in parts:
        part.unlink()
    return rows


def read_rows(path: Path, format: str, n: int) -> Iterator[tuple[Result | None, str]]:
    """Yield each line of a file and its result, None for the header and half a last line.

    A last line without a line break is half of one if it is no result: a killed process was writing
    it. Raises UserError if the file holds something else.
    """
    header = format_header(format, n)
    begin = header or '{"image": "'
    with open(path, **TEXT) as file:
        for number, line in enumerate(file, 1):
            is_complete, result = line.endswith("\n"), None
            if number == 1 and (header or not is_complete):
                expected = header if is_complete else begin[: len(line)]
                if line.replace("\r\n", "\n")[: len(begin)] != expected:
                    raise UserError(
                        f"{path} begins with {line.rstrip()[:60]!r}, not as these results would; "
                        "it is another file, or was made with another --n: name another --output"
                    )
            if number > 1 or not header:
                try:
                    result = parse_line(format, line, n)
                except NO_RESULT as error:
                    if is_complete:
                        why = program.explain(error)[:60]
                        raise UserError(
                            f"line {number} of {path} is no result ({why}); correct it, or name "
                            "another --output"
                        ) from error
                    log.warning("%s ends in half a row, which is left out: %s", path, line[:200])
            yield result, line


# --- which model made a file


def write_settings(path: Path, settings: Sequence[Mapping[str, Any]]) -> None:
    """Write what made the results at `path` to its settings file, unless it says so already."""
    place = settings_file(path)
    if not settings or files.is_special(path):
        return
    if not place.exists() or files.read_json(place) != list(settings):
        files.write_json(place, settings)


def settings_file(path: Path) -> Path:
    """Return the path of the file that says which model and settings made the results at `path`."""
    return Path(f"{os.path.realpath(path)}.settings.json")  # /dev/stdout may lead to a file


def check_settings(path: Path, settings: Mapping[str, Any], mix: bool) -> list[dict[str, Any]]:
    """Return what the settings file of the results at `path` has to hold if they are continued.

    That is each of the `settings` with which some of its rows were made; an empty list if that is
    not known. Raises UserError if some were made with others than `settings`, unless `mix`.
    """
    place = settings_file(path)
    if not place.exists():
        log.warning("%s does not say which model made its captions; it is continued", path)
        return []
    earlier = files.read_json(place)
    if not isinstance(earlier, list) or not all(isinstance(each, dict) for each in earlier):
        raise UserError(f"{place} is damaged; remove it, or name another --output")
    is_known = False
    for each in earlier:
        names = [name for name in settings if each.get(name, settings[name]) != settings[name]]
        names = [name for name in names if name != "checkpoint"]  # a model may have moved
        is_known = is_known or not names
        if not names or mix:
            continue
        name, now = names[0], settings[names[0]]
        what = f"with --{name.replace('_', '-')} {each[name]}, not {now}"
        if name == "model":
            what = f"by another model, {each.get('checkpoint')}, not {settings['checkpoint']}"
        raise UserError(
            f"the captions in {path} were made {what}; name another --output, or add --mix to have "
            "both in one file"
        )
    return earlier if is_known else [*earlier, dict(settings)]
