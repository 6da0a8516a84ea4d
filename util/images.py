"""Any image file, bytes or array → an upright RGB image, or one line that says why not."""

import errno
import importlib
import io
import logging
import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, UnidentifiedImageError

from util.files import UserError
from util.image_parts import drop_metadata, make_exif

log = logging.getLogger(__name__)

EXTENSIONS = frozenset({
    ".apng", ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg",
    ".heic", ".heif", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
})  # fmt: skip
HIDDEN = (".", "__MACOSX")  # what the names of hidden entries begin with
# Pillow's names of the formats that people have photos in, the only ones that are opened: readers
# of rare formats are where its faults are found. HEIC is one more, with its plug-in.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
MAX_PIXELS = 89_478_485  # above it Pillow warns of a decompression bomb
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

CHUNK = 2**20  # numbers converted at a time
ARRAYS = (
    "expected shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) "
    "and uint8, uint16, bool, or floats in 0..1"
)


def read_image(source: Any, at_least: int | None = None) -> Image.Image:
    """Return the image, decoded, upright and in mode RGB.

    `source` is a path, bytes, a binary file object, a PIL image (returned itself if nothing needs
    to change) or a numpy array: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8, uint16, bool,
    or floats in 0..1. Transparency is composited on white, 16-bit grey is rescaled, and the first
    of several frames or pages is read. `at_least` allows a faster, approximate decoding of large
    JPEGs: each side keeps at least twice that many pixels.

    Files and bytes are of one of `FORMATS`, or HEIC, which needs the plug-in pillow-heif. A missing
    file is a FileNotFoundError; anything else that can't be read, has more than `MAX_PIXELS`
    pixels, or parts that would take far longer than these, is a UserError with name and reason.
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
    folder: str | Path, recursive: bool = True, on_error: Callable[[OSError], None] | None = None
) -> Iterator[str]:
    """Yield the paths of `list_images` as text: a million of them take 0.1 GB.

    `on_error` is called with the error of each folder that can't be read, `folder` included.
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
        base = "" if path == os.curdir else os.path.join(path, "")
        for entry in found:
            is_folder = leads_to_folder(entry)
            if recursive or not is_folder:
                linked_too = is_folder and (is_linked or entry.is_symlink())
                waiting.append((base + entry.name, is_folder, linked_too))


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
        with open_image(drop_metadata(stream)) as image:
            check_header(image)
            if exif := image.info.get("exif"):  # Pillow would read all of it
                image.info["exif"] = make_exif(exif)
            if at_least is not None:
                reduce_jpeg(image, at_least)
            return make_upright(image)
    except PILLOW_ERRORS as error:
        raise unreadable(name, error, stream) from error


def reduce_jpeg(image: Image.Image, at_least: int) -> bool:
    """Let a large JPEG, not decoded yet, be decoded at a reduced size; return whether it will be.

    Each side keeps at least twice `at_least` pixels.
    """
    size = image.size
    image.draft("RGB", (2 * at_least, 2 * at_least))
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


def check_header(image: Image.Image) -> None:
    """Raise UserError for an image that is too large or too dangerous to decode."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UserError(f"{width} x {height} pixels; at most {MAX_PIXELS:,} are read")
    if image.format == "EPS":  # Pillow would run the program in it with Ghostscript
        raise UserError("PostScript is not read")


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
    image.load()  # before EXIF: in a PNG it may follow the pixels
    check_header(image)  # an icon may be larger than its header says
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except PILLOW_ERRORS:  # a damaged EXIF block
        turn = None
    image = to_rgb(image)
    if turn is not None:
        image = image.transpose(turn)
        image.info = {}  # else the next reader would turn it again
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Return `image` in RGB, on white where it is transparent; itself if it is RGB already."""
    if image.mode.startswith(("I", "F")):
        image = from_deep_grey(image)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    if image.mode == "La":  # premultiplied grey, which Pillow converts only to LA
        image = image.convert("LA")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return white


def from_deep_grey(image: Image.Image) -> Image.Image:
    """Return a grey image of 16 or 32 bits or floats in 8 bits, which `convert` would saturate.

    The modes I and F do not define white. It is taken as the smallest of 1 (F only), 255 and 65535
    that no value exceeds; if there is none, the range of the values is used.
    """
    import numpy as np

    values = np.array(image)
    if image.mode.startswith("I;16"):
        return from_array(values)
    if image.mode == "F":
        np.nan_to_num(values, copy=False, posinf=0, neginf=0)
    low, high = min(float(values.min()), 0.0), float(values.max())
    whites = (1, 255, 65535) if image.mode == "F" else (255, 65535)
    white = next((white for white in whites if low == 0 and high <= white), high)
    scale = max(white - low, 1e-12)
    return Image.fromarray(
        to_uint8(lambda part: from_unit((part.astype(np.float64) - low) / scale), values)
    )


def from_array(array: Any) -> Image.Image:
    """Return a numpy array as an image of mode L, RGB or RGBA."""
    import numpy as np

    if not isinstance(array, np.ndarray):
        raise UserError(f"a {type(array).__name__} is not an image; give a path or an array")
    message = f"an array of shape {array.shape} and {array.dtype} is not an image"
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4) or 0 in array.shape:
        raise UserError(f"{message}; {ARRAYS}")
    array = array[..., 0] if array.ndim == 3 and channels == 1 else array
    if array.dtype == bool:
        array = array * np.uint8(255)
    elif array.dtype.kind == "u" and array.dtype.itemsize == 2:
        array = to_uint8(lambda part: (part.astype(np.uint32) + 128) // 257, array)
    elif array.dtype.kind == "f":
        low, high = array.min(), array.max()
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # room for rounding; false for NaN too
            raise UserError(f"{message}: its values reach from {low:.4g} to {high:.4g}; {ARRAYS}")
        array = to_uint8(from_unit, array)
    elif array.dtype != np.uint8:
        raise UserError(f"{message}; {ARRAYS}")
    return Image.fromarray(np.ascontiguousarray(array))


def from_unit(values: Any) -> Any:
    """Return numbers in 0..1 as numbers in 0..255, to be truncated to integers."""
    return values.clip(0, 1) * 255 + 0.5


def to_uint8(convert: Callable[[Any], Any], array: Any) -> Any:
    """Return `convert(array)` as uint8, computed in chunks, as wider types take more memory."""
    import numpy as np

    flat = np.ascontiguousarray(array).reshape(-1)
    result = np.empty(flat.shape, np.uint8)
    for start in range(0, len(flat), CHUNK):
        chunk = slice(start, start + CHUNK)
        result[chunk] = convert(flat[chunk])  # assigning truncates as astype does
    return result.reshape(array.shape)


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
