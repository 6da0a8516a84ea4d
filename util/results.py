"""Files of captions: CSV, JSON lines, HTML; text files beside the images; annotated copies.

A file of results grows by a line per image, so a job that was killed continues after the last
complete line. Of several processes, each writes a part, `captions.csv.part-0` and so on;
`merge_parts` adds them to the file at the end of the job, or at the start of the next one.
"""

import contextlib
import csv
import glob
import html
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from PIL import Image

from util import files
from util.files import UserError
from util.images import read_image, walk_images


class Caption(NamedTuple):
    """A caption and the natural logarithm of its probability, end token included."""

    text: str
    log_prob: float

    @property
    def score(self) -> float:
        """Return the mean log-probability per word, where the end token counts as a word."""
        return self.log_prob / (len(self.text.split()) + 1)


class Result(NamedTuple):
    """An image with its captions, best first, or with the reason why it has none."""

    image: str
    captions: Sequence[Caption]
    error: str = ""

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
    error = files.one_line(result.error)
    if format == "csv":
        cells = [cell for each in result.captions for cell in (each.text, f"{each.score:.4f}")]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(
            [result.image, *cells, *[""] * (2 * n - len(cells)), error]
        )
        return text.getvalue()
    name = html.escape(result.image)
    if error:
        return f'<figure data-image="{name}"><p>{html.escape(error)}</p></figure>\n'
    best, *others = (html.escape(each.text) for each in result.captions)
    address = html.escape(quote(os.path.relpath(result.image, folder)))
    more = "".join(f"<small>{each}</small>" for each in others)
    return (
        f'<figure data-image="{name}"><img loading="lazy" src="{address}" alt="{best}">'
        f"<figcaption>{best}{more}<small>{html.escape(Path(result.image).name)}</small>"
        "</figcaption></figure>\n"
    )


def parse_image(format: str, line: str) -> str:
    """Return the image that a line is about."""
    if format == "jsonl":
        return json.loads(line)["image"]
    if format == "csv":
        return next(csv.reader([line]))[0]
    return html.unescape(re.search('data-image="([^"]*)"', line)[1])


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
        stream.write(format_line(format, result, n, folder))
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


def merge_parts(path: Path, format: str, n: int, images: Sequence[str]) -> set[str]:
    """Add the rows of all parts to the file at `path`; return the images that have a row now.

    The file is sorted by the order of `images`; rows of other images stay in front. It is replaced
    in one step before the parts are removed, and an image's first row counts, so that a kill loses
    no row and duplicates none. Raises UserError if a file is not one of results.
    """
    files.check_writable(path)
    if files.is_special(path):
        return set()
    parts, rows = find_parts(path), {}
    for source in [path, *parts] if path.exists() else parts:
        for image, line in read_rows(source, format, n):
            rows.setdefault(image, line)
    position = {image: number for number, image in enumerate(images)}
    ordered = sorted(rows, key=lambda image: position.get(image, -1))
    if parts or ordered != list(rows):
        files.remove_leftovers(path)
        with files.replacing(path) as temporary, open(temporary, "w", **TEXT) as file:
            file.write(format_header(format, n))
            file.writelines(rows[image] for image in ordered)
    for part in parts:
        part.unlink()
    return set(rows)


def read_rows(path: Path, format: str, n: int) -> Iterator[tuple[str, str]]:
    """Yield the image and the line of each row; an incomplete last line is cut off the file.

    Raises UserError if the file holds something else.
    """
    header = format_header(format, n)
    begin = header or '{"image": "'
    with open(path, **TEXT) as file:
        for number, line in enumerate(file, 1):
            is_complete = line.endswith("\n")
            if number == 1 and (header or not is_complete):
                expected = header if is_complete else begin[: len(line)]
                if line.replace("\r\n", "\n")[: len(begin)] != expected:
                    raise UserError(
                        f"{path} begins with {line.rstrip()[:60]!r}, not as these results would; "
                        "it is another file, or was made with another --n: name another --output"
                    )
            elif is_complete:
                try:
                    yield parse_image(format, line), line
                except (ValueError, LookupError, TypeError, StopIteration) as error:
                    raise UserError(
                        f"line {number} of {path} is no result; name another --output"
                    ) from error
            if not is_complete:  # a killed process was writing it
                written = len(line.encode("utf-8", "surrogateescape"))
                os.truncate(path, path.stat().st_size - written)


# --- which images, and what is written beside or instead of them


def find_images(
    places: Sequence[Path], annotated: Path | None = None, *, recursive: bool = True
) -> list[str]:
    """Return the images at `places`, folders replaced by their images, except those `annotated`.

    Raises UserError if no place is given, or a folder has no images.
    """
    if not places:
        raise UserError("no image was given; name files or folders: python inference.py IMAGE")
    images: list[str] = []
    for place in places:
        if not place.is_dir():
            images.append(str(place))
            continue
        found = walk_images(place, recursive)
        if annotated and place.resolve() in annotated.resolve().parents:
            below = place / annotated.resolve().relative_to(place.resolve())
            copies = os.path.join(below, "")
            found = (image for image in found if not image.startswith(copies))
        count = len(images)
        images += found
        if len(images) == count:
            raise UserError(f"no images in the folder {place}")
    return images


def sidecar(image: str) -> str:
    """Return the path of the text file beside an image: photo.txt for photo.jpg."""
    return str(Path(image).with_suffix(".txt"))


def check_sidecars(images: Iterable[str]) -> None:
    """Raise UserError if two images would share a sidecar, OSError if one can't be written."""
    owners: dict[str, str] = {}
    for image in images:
        path = sidecar(image)
        if (other := owners.setdefault(path, image)) != image:
            raise UserError(f"{other} and {image} would both have {path}; rename one of them")
    files.check_writable(*owners)


WRITABLE = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP"}
DESCRIPTION, SOFTWARE = 0x010E, 0x0131  # EXIF tags
MADE_BY = "image-captioning --annotate"


def plan_annotated(folder: Path, places: Sequence[Path], images: Iterable[str]) -> dict[str, str]:
    """Return the path in `folder` of each image's annotated copy.

    It is the image's path below the place that contains it, or its name; numbered if that is
    taken, with .png added if Pillow can't write the image's format. Raises UserError if a file
    would be overwritten that is not such a copy.
    """
    paths: dict[str, str] = {}
    taken: set[str] = set()
    for image in map(Path, dict.fromkeys(images)):
        base = next((place for place in places if place in image.parents), image.parent)
        copy, number = folder / image.relative_to(base), 2
        if copy.suffix.lower() not in WRITABLE:
            copy = copy.with_name(f"{copy.name}.png")
        path = str(copy)
        while path in taken:
            path, number = str(copy.with_stem(f"{copy.stem}-{number}")), number + 1
        if os.path.exists(path) and not is_annotated(path):
            raise UserError(
                f"--annotate {folder} would overwrite {path}, a file of your own; name another "
                "folder"
            )
        paths[str(image)] = path
        taken.add(path)
    files.check_writable(*taken)
    return paths


def is_annotated(path: str) -> bool:
    """Return whether an image was written by `write_annotated`."""
    try:
        with Image.open(path) as image:
            return image.getexif().get(SOFTWARE) == MADE_BY
    except (OSError, ValueError, SyntaxError):
        return False


def write_annotated(path: str, image: str, text: str) -> None:
    """Write the image with its caption below it, and in its EXIF description.

    Raises UserError if it can't be written.
    """
    from util import plots  # here, as captions alone need no plots

    annotated, exif = plots.annotate(read_image(image), text), Image.Exif()
    exif[DESCRIPTION] = text.encode()  # bytes: Pillow would replace all but ASCII by ?
    exif[SOFTWARE] = MADE_BY
    try:
        with files.replacing(path) as temporary:
            kind = WRITABLE[Path(path).suffix.lower()]
            annotated.save(temporary, format=kind, quality=92, exif=exif)
    except (ValueError, OSError) as error:
        raise UserError(f"{path} can't be written ({error})") from error
