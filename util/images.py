"""Any image file, bytes or array → an upright RGB image, or one line that says why not."""

import errno
import importlib
import io
import logging
import os
import struct
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, JpegImagePlugin, UnidentifiedImageError

from util.files import UserError
from util.image_parts import MAX_SCANS, check_scans, drop_metadata, make_exif
from util.pixels import brighten, from_array, to_rgb
from util.truncation import allowance, check_enough, complete, is_strict, warn_of_missing_end

log = logging.getLogger(__name__)

EXTENSIONS = frozenset({
    ".apng", ".avif", ".avifs", ".bmp", ".gif", ".heic", ".heif", ".j2c", ".j2k", ".jfif", ".jp2",
    ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".pbm", ".pfm", ".pgm", ".png", ".pnm", ".ppm",
    ".tif", ".tiff", ".webp",
})  # fmt: skip
BESIDE = (".txt", ".xmp")  # endings of the files that hold the caption of an image beside them
HIDDEN = (".", "__MACOSX")  # what the names of hidden entries begin with
# Pillow's names of the formats that people have photos in, the only ones that are opened: readers
# of rare formats are where its faults are found. HEIC is one more, with its plug-in.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
MAX_PIXELS = 89_478_485  # above it Pillow warns of a decompression bomb
MAX_JPEG = 300_000_000  # pixels of a JPEG; those above the other limit are decoded at a lower size
# The brands of HEIC files; AVIF, of the same family, is read by Pillow itself.
HEIC = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})

# What Pillow's readers raise for damaged files, besides errors of their own.
PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    MemoryError,
    RuntimeError,
    struct.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,  # raised where the caller's filters turn warnings into errors
)

# What `read_image` raises for a bad file. Other errors, as of a failing disk, end the program.
UNREADABLE = (ValueError, FileNotFoundError, PermissionError)
MAX_LEFT_OUT = 0.01  # of a split's images may be missing or unreadable, and one in any case

# EXIF orientation → the transposition that makes the image upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(source: Any, at_least: int | None = None) -> Image.Image:
    """Return the image, decoded, upright and in mode RGB.

    `source` is a path, bytes, a binary file object, a PIL image (returned itself if nothing needs
    to change) or a numpy array: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8, uint16, bool,
    or floats in 0..1. Transparency is composited on white, 16-bit grey is rescaled, and the first
    of several frames or pages is read. `at_least` allows a faster, approximate decoding of large
    JPEGs: each side keeps at least twice that many pixels. A JPEG of more than `MAX_PIXELS` is
    always decoded at a reduced size.

    Files and bytes are of one of `FORMATS`, or HEIC, which needs the plug-in pillow-heif. One that
    lacks its last bytes is read as far as it goes, with a warning, unless `is_strict`. A missing
    file is a FileNotFoundError; anything else that can't be read, has more than `MAX_PIXELS` pixels
    (a JPEG: `MAX_JPEG`), or parts that would take far longer than these, is a UserError with name
    and reason.
    """
    if isinstance(source, (str, os.PathLike)):
        name = os.fsdecode(source)
        if os.path.isdir(source):  # on Windows, opening it would be a permission error
            raise UserError(f"{name} is a folder, not an image")
        with open(source, "rb") as stream:
            return read_stream(stream, name, at_least)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return read_stream(io.BytesIO(source), "the image given as bytes", at_least)
    if isinstance(source, Image.Image):
        try:  # one that was opened but not decoded may still fail
            check_header(source)
            reduce_jpeg(source, None)
            return make_upright(source)
        except PILLOW_ERRORS as error:
            raise unreadable(getattr(source, "filename", "") or "the image given", error) from error
    if hasattr(source, "read"):
        name = getattr(source, "name", None)
        if not isinstance(name, str) or not name:
            name = "the image given as a file object"
        if not getattr(source, "seekable", lambda: True)():  # a pipe
            source = io.BytesIO(source.read())
        return read_stream(source, name, at_least)
    image = from_array(source)
    check_header(image)
    return to_rgb(image)


def read_ahead(
    read: Callable[[Any], Any], items: Iterable[Any], workers: int, ahead: int
) -> Iterator[Any]:
    """Yield `read(item)` for each item, in order; `workers` threads work on the next `ahead`."""
    if not workers:
        yield from map(read, items)
        return
    items = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        waiting = deque(pool.submit(read, item) for item in islice(items, ahead))
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(read, item) for item in islice(items, 1))
                yield result
        finally:
            for future in waiting:
                future.cancel()


def drop_traceback(error: Exception) -> Exception:
    """Return the error without its traceback and causes, which keep decoded pixels in memory."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


# --- folders


def list_images(folder: str | Path, recursive: bool = True) -> list[Path]:
    """Return the image files below `folder`, or only directly in it, sorted.

    Hidden files and `__MACOSX` are left out. A folder that is linked to is listed once, under the
    link's name if it is not below `folder` anyway; links that would lead in a circle are not
    followed. Raises OSError if `folder` may not be read; folders below it are logged instead.
    """
    return [Path(name) for name in walk_images(folder, recursive)]


def walk_images(
    folder: str | Path,
    recursive: bool = True,
    on_error: Callable[[OSError], None] | None = None,
    others: Counter[str] | None = None,
) -> Iterator[str]:
    """Yield the paths of `list_images` as text: a million of them take 0.1 GB.

    `on_error` is called with the error of each folder that can't be read, `folder` included.
    `others` counts the files that are no images by their ending (`list_others`).
    """
    root = str(Path(folder))
    visited: set[str] = set()  # real paths of the folders that only links lead to
    waiting = [(root, True, False)]
    while waiting:
        path, is_folder, is_linked = waiting.pop()
        if not is_folder:
            yield path
            continue
        if is_linked and not is_new(path, root, visited):
            continue
        try:
            with os.scandir(path) as entries:
                entries = list(entries)
                found = sorted(
                    filter(may_hold_images, entries),
                    key=lambda entry: os.path.normcase(entry.name),  # as the system compares names
                    reverse=True,
                )
        except OSError as error:
            error.filename = path
            if on_error is None and path == root:
                raise
            (on_error or log_unread)(error)
            continue
        if others is not None:
            others.update(list_others(entries, {os.path.splitext(each.name)[0] for each in found}))
        base = "" if path == os.curdir else os.path.join(path, "")
        for entry in found:
            is_folder = leads_to_folder(entry)
            if recursive or not is_folder:
                linked_too = is_folder and (is_linked or entry.is_symlink())
                waiting.append((base + entry.name, is_folder, linked_too))


def list_others(entries: Sequence[os.DirEntry], images: Set[str]) -> Iterator[str]:
    """Yield the endings of files that are neither hidden nor images, nor beside one of `images`.

    `images`: their names without endings.
    """
    for entry in entries:
        stem, suffix = os.path.splitext(entry.name)
        suffix = suffix.lower()
        is_beside = stem in images or os.path.splitext(stem)[0] in images  # photo.tif.xmp
        is_known = suffix in EXTENSIONS or (suffix in BESIDE and is_beside)
        # Not entry.is_file(), which fails for a link to itself.
        if not is_known and not entry.name.startswith(".") and os.path.isfile(entry.path):
            yield suffix


def count_others(others: Counter[str]) -> str:
    """Return "3 files that are no images: 2 .mov, 1 without an ending", for messages."""
    counts = [
        f"{count:,} {suffix or 'without an ending'}" for suffix, count in others.most_common()
    ]
    shown = counts if len(counts) <= 10 else [*counts[:9], f"{len(counts) - 9} other endings"]
    files = "1 file that is no image" if others.total() == 1 else None
    return f"{files or f'{others.total():,} files that are no images'}: {', '.join(shown)}"


def log_unread(error: OSError) -> None:
    """Log that a folder can't be read."""
    log.warning("left out: the folder %s can't be read (%s)", error.filename, error.strerror)


def leads_to_folder(entry: os.DirEntry) -> bool:
    """Return whether an entry is a folder or a link to one; a link that leads nowhere is not."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or to where one may not look
        return False


def may_hold_images(entry: os.DirEntry) -> bool:
    """Return whether an entry is an image file, or a folder that may contain some."""
    if leads_to_folder(entry):
        return not entry.name.startswith(HIDDEN)
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix not in EXTENSIONS or entry.name.startswith("."):
        return False
    return entry.is_symlink() or entry.is_file()  # a pipe would be waited for


def is_new(path: str, root: str, visited: set[str]) -> bool:
    """Return whether a folder that a link leads to is to be walked; if so, add it to `visited`.

    It is not if the walk of `root` comes to it without a link, or contains it already, or if it
    contains the link.
    """
    target, parent, top = map(os.path.realpath, (path, os.path.dirname(path), root))
    ends = [os.path.join(each, "") for each in (target, parent, top)]
    below = ends[0].removeprefix(ends[2]).split(os.sep)
    is_walked = ends[0].startswith(ends[2]) and not any(each.startswith(HIDDEN) for each in below)
    is_loop = ends[1].startswith(ends[0])
    if is_walked or is_loop or target in visited:
        return False
    visited.add(target)
    return True


# --- decoding


def read_stream(stream: Any, name: str, at_least: int | None) -> Image.Image:
    """Return the image in a seekable binary file object."""
    try:
        stream = drop_metadata(stream)
        try:
            return decode(stream, at_least)
        except OSError as error:
            if is_strict() or (completed := complete(stream, error)) is None:
                raise
        with allowance.on():
            image = decode(completed, at_least)
        check_enough(image)
        warn_of_missing_end(name)
        return image
    except PILLOW_ERRORS as error:
        raise unreadable(name, error, stream) from error


def decode(stream: Any, at_least: int | None) -> Image.Image:
    """Return the image in a file without metadata, in RGB and upright."""
    with open_image(stream) as image:
        check_header(image)
        if (pixels := image.width * image.height) > MAX_PIXELS:  # a JPEG: each scan takes longer
            check_scans(stream.getvalue(), most=MAX_SCANS * MAX_PIXELS // pixels)
        if exif := image.info.get("exif"):  # Pillow would read all of it
            image.info["exif"] = make_exif(exif)
        reduce_jpeg(image, at_least)
        return make_upright(image)


def reduce_jpeg(image: Image.Image, at_least: int | None) -> bool:
    """Let a large JPEG, not decoded yet, be decoded at a reduced size; return whether it will be.

    Each side keeps at least twice `at_least` pixels, or half of its own if it has too many.
    """
    size = image.size
    wanted = size if at_least is None else (2 * at_least, 2 * at_least)
    if size[0] * size[1] > MAX_PIXELS:
        wanted = tuple(min(one, max(1, side // 2)) for one, side in zip(wanted, size, strict=True))
    if wanted != size:
        image.draft("RGB", wanted)
    return image.size != size


def is_reduced(path: str | Path, at_least: int) -> bool:
    """Return whether `read_image(path, at_least)` decodes a JPEG at a reduced size."""
    try:
        with open(path, "rb") as stream, open_image(drop_metadata(stream)) as image:
            check_header(image)
            return reduce_jpeg(image, at_least)
    except PILLOW_ERRORS:  # UserError is one of them
        return False


def open_image(stream: Any) -> Image.Image:
    """Return the image in a file object, not decoded yet."""
    stream.seek(0)
    if stream.read(3) == b"\xff\xd8\xff":
        stream.seek(0)
        try:  # Image.open would refuse a large one, whose size can still be reduced
            return JpegImagePlugin.JpegImageFile(stream)
        except (SyntaxError, LookupError, TypeError, struct.error) as error:
            raise UnidentifiedImageError from error
    stream.seek(0)
    try:
        return Image.open(stream, formats=FORMATS)
    except UnidentifiedImageError:
        stream.seek(0)
        start = stream.read(12)
        stream.seek(0)
        if start[4:8] != b"ftyp" or start[8:12] not in HEIC:
            raise
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError as error:
        raise UserError(
            "HEIC needs the plug-in pillow-heif: pip install pillow-heif, or save it as JPEG"
        ) from error
    return Image.open(stream, formats=("HEIF",))


def check_header(image: Image.Image, most: int | None = None) -> None:
    """Raise UserError for an image that is too large or too dangerous to decode.

    `most`: pixels (default: what its format allows).
    """
    width, height = image.size
    if width * height > (most or (MAX_JPEG if image.format == "JPEG" else MAX_PIXELS)):
        raise UserError(f"{width} x {height} pixels; {describe_limits()}")
    if image.format == "EPS":  # Pillow would run the program in it with Ghostscript
        raise UserError("PostScript is not read")


def describe_limits() -> str:
    """Return how many pixels an image may have, for messages."""
    return f"at most {MAX_PIXELS:,} are read, of a JPEG {MAX_JPEG:,}; save it smaller"


def unreadable(name: str, error: BaseException, stream: Any = None) -> Exception:
    """Return the error to raise in place of one of Pillow's; the system's own are kept."""
    # A damaged file may make Pillow seek to before its start, which is the system's EINVAL.
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        if error.filename is None:
            error.filename = name
        return error
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        reason = "the file is empty" if is_empty(stream) else "no image format that is known"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        reason = f"too many pixels; {describe_limits()}"
    if isinstance(error, MemoryError):
        reason = "it takes more memory than there is"
    return UserError(f"{name} is not an image that can be read ({reason})")


def is_empty(stream: Any) -> bool:
    """Return whether a file object is known to be empty."""
    try:
        return stream.seek(0, os.SEEK_END) == 0
    except (AttributeError, OSError, ValueError):
        return False


def make_upright(image: Image.Image) -> Image.Image:
    """Return `image` decoded, in RGB, and turned as its EXIF block or XMP packet says."""
    is_deep = ";16" in str([tile[3] for tile in getattr(image, "tile", ())])
    image.load()  # before EXIF: in a PNG it may follow the pixels
    check_header(image, MAX_PIXELS)  # larger than its header says, or than it was to be decoded
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except PILLOW_ERRORS:  # a damaged EXIF block
        turn = None
    if is_deep and not image.mode.startswith("I"):
        image = brighten(image)
    image = to_rgb(image)
    if turn is not None:
        image = image.transpose(turn)
        image.info = {}  # else the next reader would turn it again
    return image


# ---- images that are left out ----------------------------------------------------------------


def are_too_many(left_out: int, total: int) -> bool:
    """Return whether so many of `total` images may not be left out: one may, if it is not all."""
    return left_out > max(1, MAX_LEFT_OUT * total) or left_out == total > 0


def report_left_out(image_ids: Sequence[str | int], total: int, reason: str) -> None:
    """Log which images are left out, and of how many; UserError if they are too many."""
    if not image_ids:
        return
    message = f"{len(image_ids)} of {total} images {reason}: {name_some(image_ids)}"
    if are_too_many(len(image_ids), total):
        raise UserError(f"{message}; more than 1 % is too many to leave out, repair the dataset")
    log.warning("left out: %s", message)


def name_some(image_ids: Sequence[str | int]) -> str:
    """Return the first ten ids, and how many more there are."""
    shown = ", ".join(str(image_id)[:100] for image_id in image_ids[:10])
    return f"{shown} and {len(image_ids) - 10} more" if len(image_ids) > 10 else shown
