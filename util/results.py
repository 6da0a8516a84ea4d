"""Captions of many pictures as a file that grows by a line a picture: CSV, JSON lines, a page.

What is there already is kept, and a run that was killed goes on after the last whole line. Several
processes write a part each, `captions.csv.part-0` and so on, which the first adds to the file at
the end. Parts that a killed job left count as written.
"""

import contextlib
import csv
import glob
import heapq
import html
import io
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TextIO
from urllib.parse import quote

from PIL import Image

from util import files, plots
from util.files import UserError
from util.images import read_image, walk_images


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


@contextlib.contextmanager
def json_list(path: Path) -> Iterator[Callable[[Any], None]]:
    """Lend what adds a value to the list in a JSON file, there at the end if any value came.

    Values are written as they come and not kept.
    """
    with contextlib.ExitStack() as stack:
        file = None

        def add(value: Any) -> None:
            nonlocal file
            begin = ",\n" if file else "[\n"
            if not file:
                temporary = stack.enter_context(files.replacing(path))
                file = stack.enter_context(open(temporary, "wb"))
                stack.callback(file.write, b"\n]\n")
            text = files.format_json(value).replace("\n", "\n  ")
            file.write(f"{begin}  {text}".encode("utf-8", "backslashreplace"))

        yield add


def pick_form(path: Path | None, name: str | None) -> str:
    """Return the form asked for by name, or by a file's; ValueError where neither says one."""
    found = name or ("csv" if path is None else path.suffix.lower().removeprefix("."))
    if found not in FORMS:
        raise UserError(
            f"{path} does not say which form is wanted; end it in .csv, .jsonl or .html, or use "
            f"--format {{{','.join(FORMS)}}}"
        )
    return found


class Lines:
    """Prints a picture's captions as plain lines, with its name where there are `many`."""

    def __init__(self, many: bool):
        self.many = many

    def add(self, result: Result) -> None:
        """Print a result; an error goes to stderr."""
        if result.error and self.many:
            print(f"left out: {result.error}", file=sys.stderr)
        for each in result.captions:
            print(f"{result.image}\t{each.text}" if self.many else each.text, flush=True)


class Results:
    """A file of results, open to be added to."""

    def __init__(self, file: TextIO, form: str, n: int, folder: Path, *, head: bool = True):
        """`form`: of `FORMS`; `folder`: where the file lies; `head`: it is new and gets one."""
        self.file, self.form, self.n, self.folder = file, FORMS[form], n, folder
        if head:
            file.write(head_line(self.form, n))

    def add(self, result: Result) -> None:
        """Write a result and hand it to the system at once. ValueError on a line break in the name,
        which would break the line.
        """
        if "\n" in result.image or "\r" in result.image:
            raise UserError(f"the file name {result.image!r} has a line break; rename it")
        self.file.write(f"{self.form.line(result, self.n, self.folder)}\n")
        self.file.flush()


def head_line(form: Form, n: int) -> str:
    """Return the line that a file begins with, empty where it has none."""
    return f"{form.head(n)}\n" if form.head(n) else ""


TEXT = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}


@contextlib.contextmanager
def open_results(path: Path, form: str, n: int) -> Iterator[Results]:
    """Open the file of results at `path`, which `find_known` has looked at, to add to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", **TEXT) as file:
        new = not os.fstat(file.fileno()).st_size
        yield Results(file, form, n, path.parent, head=new)


def find_known(path: Path, form: str, n: int) -> set[str]:
    """Return the pictures that have a row at `path` or in its parts, all cut to whole lines.

    Raises ValueError where one is another thing, or was made with another number of captions.
    """
    files.check_writable(path)
    known: set[str] = set()
    if path.exists() and not files.is_special(path):
        known |= read_known(path, FORMS[form], n)
    for part in reversed(find_parts(path)):
        inside = read_known(part, FORMS[form], n)
        if inside <= known:  # added already, by a job killed before it could remove the part
            part.unlink()
        known |= inside
    return known


def read_known(path: Path, form: Form, n: int) -> set[str]:
    """Return the pictures in a file of results, which is cut to its last whole line.

    Raises ValueError where the file is another thing.
    """
    with open(path, "rb+") as file:
        end = whole_lines(file)
        if (
            not end
            and path.stat().st_size
            and not form.head(n).encode().startswith(path.read_bytes())
        ):
            raise UserError(f"{path} is another file; name another --output")
        file.truncate(end)
    return {image for image, _ in read_rows(path, form, n)}


def read_rows(path: Path, form: Form, n: int) -> Iterator[tuple[str, str]]:
    """Yield the picture and the line of each row of a file of results.

    Raises ValueError where the file is another thing.
    """
    with open(path, **TEXT) as file:
        head = form.head(n)
        first = file.readline().rstrip("\r\n") if head else ""
        if first != head and path.stat().st_size:
            raise UserError(
                f"{path} begins with {first[:60]!r}, not as these results would; it is another "
                "file, or was made with another --n: name another --output"
            )
        for number, line in enumerate(file, 2 if head else 1):
            try:
                yield form.image(line.rstrip("\r\n")), line
            except (ValueError, KeyError, TypeError, IndexError, StopIteration) as error:
                raise UserError(
                    f"line {number} of {path} is no result; name another --output"
                ) from error


# --- parts, of several processes


def part_file(path: Path, number: int) -> Path:
    """Return the path of a part of the results at `path`."""
    return path.with_name(f"{path.name}.part-{number}")


def find_parts(path: Path) -> list[Path]:
    """Return the parts that there are of the results at `path`, the oldest first."""
    found = path.parent.glob(f"{glob.escape(path.name)}.part-*")
    return sorted((part for part in found if part_number(part) >= 0), key=part_number)


def part_number(part: Path) -> int:
    """Return the number of a part, -1 where the file is none."""
    number = part.name.rpartition(".part-")[2]
    return int(number) if re.fullmatch("[0-9]{1,9}", number) else -1


def free_part(path: Path, form: str, n: int, order: Sequence[str]) -> int:
    """Return the number from which on parts are new; the parts there are become one.

    So parts don't add up, however often a job is killed.
    """
    parts = find_parts(path)
    number = part_number(parts[-1]) + 1 if parts else 0
    if len(parts) < 2:
        return number
    merge(parts, part_file(path, number), form, n, order)
    return number + 1


def merge(parts: Sequence[Path], target: Path, form: str, n: int, order: Sequence[str]) -> None:
    """Add the rows of `parts` to `target`, in the `order` of the pictures, and remove the parts.

    Each part's rows must be in that order. Rows that are there are kept as they are. The target is
    replaced when it is whole, so that a kill loses nothing and leaves no row twice.
    """
    files.remove_leftovers(target)
    place = {image: number for number, image in enumerate(order)}
    rows = [read_rows(part, FORMS[form], n) for part in parts]
    merged = heapq.merge(*rows, key=lambda row: place.get(row[0], -1))
    with files.replacing(target) as temporary, open(temporary, "a", **TEXT) as out:
        if target.exists() and target.stat().st_size:
            with open(target, **TEXT) as whole:
                shutil.copyfileobj(whole, out)
        else:
            out.write(head_line(FORMS[form], n))
        for _, same in itertools.groupby(merged, key=lambda row: row[0]):
            out.write(next(same)[1])
    for part in parts:
        part.unlink()


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


def find_photos(
    places: Sequence[Path], made: Path | None = None, *, recursive: bool = True
) -> list[str]:
    """Return the pictures named, folders replaced by what they hold, but nothing below `made`.

    Raises ValueError where a folder holds none, and where nothing is named.
    """
    if not places:
        raise UserError("no picture was named; give files or folders: python inference.py PHOTO")
    found: list[str] = []
    for place in places:
        inside = walk_images(place, recursive) if place.is_dir() else iter([str(place)])
        if made and place.is_dir() and place.resolve() in made.resolve().parents:
            below = os.path.join(place / made.resolve().relative_to(place.resolve()), "")
            inside = (photo for photo in inside if not photo.startswith(below))  # made earlier
        before = len(found)
        found += inside
        if len(found) == before:
            raise UserError(f"no pictures in the folder {place}")
    return found


def sidecar(photo: str) -> str:
    """Return the text file beside a picture, photo.txt for photo.jpg."""
    return str(Path(photo).with_suffix(".txt"))


def check_sidecars(photos: Sequence[str]) -> None:
    """Raise ValueError where two pictures would share a sidecar, OSError where none can be made."""
    owners: dict[str, str] = {}
    for photo in photos:
        text = sidecar(photo)
        if (other := owners.setdefault(text, photo)) != photo:
            raise UserError(f"{other} and {photo} would both have {text}; rename one of them")
    check_folders(owners)


def check_folders(targets: Iterable[str]) -> None:
    """Raise OSError where the folder of a target can't be written: one look a folder."""
    files.check_writable(*{os.path.dirname(target): target for target in targets}.values())


# --- captioned pictures

WRITABLE = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP"}
DESCRIPTION, SOFTWARE = 0x010E, 0x0131  # EXIF tags
MADE_HERE = "image-captioning --annotate"


def annotated_places(folder: Path, places: Sequence[Path], photos: Sequence[str]) -> dict[str, str]:
    """Return the file in `folder` for each picture: its path below the place named, or its name.

    A number is added where that is taken, .png where Pillow can't write the picture's own format.
    Raises ValueError where a file would be overwritten that was not made so before.
    """
    targets: dict[str, str] = {}
    taken: set[str] = set()
    for photo in dict.fromkeys(photos):
        name = below_place(Path(photo), places)
        if name.suffix.lower() not in WRITABLE:
            name = name.with_name(f"{name.name}.png")
        target, number = str(folder / name), 2
        while target in taken:
            target, number = str(folder / name.with_stem(f"{name.stem}-{number}")), number + 1
        if os.path.exists(target) and not made_here(target):
            raise UserError(
                f"--annotate {folder} would overwrite {target}, a file of your own; name another "
                "folder"
            )
        targets[photo] = target
        taken.add(target)
    check_folders(taken)
    return targets


def below_place(photo: Path, places: Sequence[Path]) -> Path:
    """Return the picture's path below the first place named that it lies in, else its name."""
    base = next((place for place in places if place in photo.parents), photo.parent)
    return photo.relative_to(base)


def made_here(path: str) -> bool:
    """Tell whether a picture was written by `write_annotated`."""
    try:
        with Image.open(path) as picture:
            return picture.getexif().get(SOFTWARE) == MADE_HERE
    except (OSError, ValueError, SyntaxError):
        return False


def write_annotated(target: str, photo: str, text: str) -> None:
    """Write the picture with its caption under it, and in its EXIF description.

    Raises ValueError where it can't be written.
    """
    picture = plots.annotate(read_image(photo), text)
    about = Image.Exif()
    about[DESCRIPTION] = text.encode()  # bytes: Pillow would make ? of all but ASCII
    about[SOFTWARE] = MADE_HERE
    form = WRITABLE[Path(target).suffix.lower()]
    try:
        with files.replacing(target) as temporary:
            picture.save(temporary, format=form, quality=92, exif=about)
    except (ValueError, OSError) as error:
        raise UserError(f"{target} can't be written ({error})") from error
