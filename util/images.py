"""Any picture anyone hands us → an upright RGB image, or one line that says why not."""

import errno
import importlib
import io
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, UnidentifiedImageError

from util.files import UserError

EXTENSIONS = frozenset({
    ".apng", ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg",
    ".heic", ".heif", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
})  # fmt: skip
MAX_PIXELS = 89_478_485  # where Pillow begins to warn of a decompression bomb
# The brands that HEIC files bear; those of AVIF, of the same family, Pillow reads itself.
HEIC = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})

# What Pillow's readers raise for damaged files, beside errors of their own.
UNREADABLE = (
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
    Image.DecompressionBombWarning,  # raised where the caller's filters make warnings errors
)

PART = 2**20  # numbers converted at a time

# EXIF orientation → what makes the picture upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

ARRAYS = (
    "expected shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) "
    "and uint8, uint16, bool, or floats in 0..1"
)


def read_image(source: Any, at_least: int | None = None) -> Image.Image:
    """Return the picture, decoded, upright and in mode RGB.

    `source` is a path, bytes, a binary file object, a PIL image (returned itself when nothing need
    change) or a numpy array: (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8, uint16, bool, or
    floats in 0..1. Transparency is laid on white, deep grey is rescaled, and of several frames or
    pages the first is read. `at_least` allows a faster, approximate reading of JPEGs larger than
    needed: each side keeps at least twice that many pixels.

    HEIC needs the plug-in pillow-heif. A missing file is a FileNotFoundError; whatever else cannot
    be read, or has more than `MAX_PIXELS` pixels, is a ValueError that names source and reason.
    """
    if isinstance(source, (str, os.PathLike)):
        return read_path(source, at_least)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return read_stream(io.BytesIO(source), "the image given as bytes", at_least)
    if isinstance(source, Image.Image):
        return read_picture(source, getattr(source, "filename", "") or "the image given")
    if hasattr(source, "read"):
        return read_stream(seekable(source), stream_name(source), at_least)
    picture = from_array(source)
    check_header(picture)
    return flat(picture)


def list_images(folder: str | Path, recursive: bool = True) -> list[Path]:
    """Return the image files below `folder`, or only in it, sorted.

    Hidden files and `__MACOSX` are left out. A missing folder, or one that may not be read, is an
    OSError that names it.
    """
    return [Path(name) for name in walk_images(folder, recursive)]


def walk_images(folder: str | Path, recursive: bool = True) -> Iterator[str]:
    """Yield what `list_images` returns, as text: a million paths take a tenth of a gigabyte."""
    waiting = [(str(Path(folder)), True)]
    while waiting:
        path, is_folder = waiting.pop()
        if not is_folder:
            yield path
            continue
        with os.scandir(path) as entries:
            inside = sorted(filter(is_meant, entries), key=by_name, reverse=True)
        base = "" if path == os.curdir else os.path.join(path, "")
        for entry in inside:
            below = entry.is_dir()
            if not below or (recursive and not entry.is_symlink()):
                waiting.append((base + entry.name, below))


def is_meant(entry: os.DirEntry) -> bool:
    """Tell whether a folder's entry is a picture, or a folder that may hold some."""
    if entry.is_dir():
        return not entry.name.startswith((".", "__MACOSX"))
    suffix = os.path.splitext(entry.name)[1].lower()
    return suffix in EXTENSIONS and not entry.name.startswith(".")


def by_name(entry: os.DirEntry) -> str:
    """Return what entries are sorted by, as the system compares names."""
    return os.path.normcase(entry.name)


def read_path(path: str | os.PathLike, at_least: int | None) -> Image.Image:
    """Return the picture in the file at `path`."""
    name = os.fsdecode(path)
    if os.path.isdir(path):  # Windows would call it a permission error
        raise UserError(f"{name} is a folder, not an image")
    with open(path, "rb") as stream:
        return read_stream(stream, name, at_least)


def read_stream(stream: Any, name: str, at_least: int | None) -> Image.Image:
    """Return the picture in a binary file object."""
    try:
        with opened(stream) as picture:
            check_header(picture)
            if at_least is not None:
                picture.draft("RGB", (2 * at_least, 2 * at_least))
            return upright(picture)
    except UNREADABLE as error:
        raise unreadable(name, error, stream) from error


def opened(stream: Any) -> Image.Image:
    """Return the picture that a binary file object holds, not decoded yet."""
    try:
        return Image.open(stream)
    except UnidentifiedImageError:
        if not is_heic(stream):
            raise
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except ImportError as error:
        raise UserError(
            "HEIC needs the plug-in pillow-heif: pip install pillow-heif, or save it as JPEG"
        ) from error
    return Image.open(stream)


def is_heic(stream: Any) -> bool:
    """Whether a file object begins as a HEIC file does."""
    stream.seek(0)
    start = stream.read(12)
    stream.seek(0)
    return start[4:8] == b"ftyp" and start[8:12] in HEIC


def read_picture(picture: Image.Image, name: str) -> Image.Image:
    """Return a PIL image upright and RGB; one that was opened but not decoded may yet fail."""
    try:
        check_header(picture)
        return upright(picture)
    except UNREADABLE as error:
        raise unreadable(name, error) from error


def check_header(picture: Image.Image) -> None:
    """Refuse what would be dear or dangerous to decode."""
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise UserError(f"{width} x {height} pixels; at most {MAX_PIXELS:,} are read")
    if picture.format == "EPS":  # Pillow would hand a stranger's program to Ghostscript
        raise UserError("PostScript is not read")


def unreadable(name: str, error: BaseException, stream: Any = None) -> Exception:
    """Return the error to raise in place of one of Pillow's; the system's own keep their kind."""
    # A damaged file may send Pillow to a place before its start, which the system calls EINVAL.
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
    """Whether a file object is known to hold nothing."""
    try:
        return stream.seek(0, os.SEEK_END) == 0
    except (AttributeError, OSError, ValueError):
        return False


def seekable(stream: Any) -> Any:
    """Return the file object, or one over what is left in it where it cannot seek (a pipe)."""
    if getattr(stream, "seekable", lambda: True)():
        return stream
    return io.BytesIO(stream.read())


def stream_name(stream: Any) -> str:
    """Return the name of a file object for messages."""
    name = getattr(stream, "name", None)
    return name if isinstance(name, str) and name else "the image given as a file object"


def upright(picture: Image.Image) -> Image.Image:
    """Return `picture` in RGB, turned as its EXIF block or XMP packet says."""
    picture.load()  # before EXIF: in a PNG it may follow the pixels
    check_header(picture)  # an icon may hold more than its header says
    turn = TURNS.get(orientation(picture))
    picture = flat(picture)
    if turn is not None:
        picture = picture.transpose(turn)
        picture.info = {}  # else the next reader would turn it once more
    return picture


def orientation(picture: Image.Image) -> Any:
    """Return the EXIF orientation, 1 where there is none or the block is damaged."""
    try:
        return picture.getexif().get(ExifTags.Base.Orientation, 1)
    except UNREADABLE:
        return 1


def flat(picture: Image.Image) -> Image.Image:
    """Return `picture` in RGB, on white where it is transparent; itself if it is so already."""
    if picture.mode.startswith(("I", "F")):
        picture = from_deep_grey(picture)
    if picture.has_transparency_data:
        return on_white(picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def on_white(picture: Image.Image) -> Image.Image:
    """Return `picture` laid on white."""
    if picture.mode == "La":  # premultiplied grey, which Pillow converts only to LA
        picture = picture.convert("LA")
    picture = picture.convert("RGBA")
    white = Image.new("RGB", picture.size, "white")
    white.paste(picture, mask=picture)
    return white


def from_deep_grey(picture: Image.Image) -> Image.Image:
    """Return a grey image of 16 or 32 bits or floats as 8 bits, which `convert` would saturate.

    The unbounded modes I and F do not say what white is: the least of 1 (F only), 255 and 65535
    that holds all values, or else the values' own range.
    """
    import numpy as np

    values = np.array(picture)
    if picture.mode.startswith("I;16"):
        return from_array(values)
    if picture.mode == "F":
        np.nan_to_num(values, copy=False, posinf=0, neginf=0)
    low, high = min(float(values.min()), 0.0), float(values.max())
    whites = (1, 255, 65535) if picture.mode == "F" else (255, 65535)
    white = next((white for white in whites if low == 0 and high <= white), high)
    scale = max(white - low, 1e-12)
    return Image.fromarray(
        by_parts(lambda part: from_unit((part.astype(np.float64) - low) / scale), values)
    )


def from_array(array: Any) -> Image.Image:
    """Return a numpy array as an image of mode L, RGB or RGBA."""
    import numpy as np

    if not isinstance(array, np.ndarray):
        raise UserError(f"a {type(array).__name__} is not an image; give a path or an array")
    said = f"an array of shape {array.shape} and {array.dtype} is not an image"
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4) or 0 in array.shape:
        raise UserError(f"{said}; {ARRAYS}")
    array = array[..., 0] if array.ndim == 3 and channels == 1 else array
    return Image.fromarray(np.ascontiguousarray(to_bytes(array, said)))


def to_bytes(array: Any, said: str) -> Any:
    """Return the array as uint8, white being 255; `said` begins the error message."""
    import numpy as np

    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array * np.uint8(255)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return by_parts(lambda part: (part.astype(np.uint32) + 128) // 257, array)
    if array.dtype.kind != "f":
        raise UserError(f"{said}; {ARRAYS}")
    low, high = array.min(), array.max()
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # room for rounding; false for NaN too
        raise UserError(f"{said}: its values reach from {low:.4g} to {high:.4g}; {ARRAYS}")
    return by_parts(from_unit, array)


def from_unit(values: Any) -> Any:
    """Return numbers from 0 to 1 as numbers from 0 to 255, to be cut to whole ones."""
    return values.clip(0, 1) * 255 + 0.5


def by_parts(change: Callable[[Any], Any], array: Any) -> Any:
    """Return `change(array)` as uint8, worked out in parts: wide numbers are never all there."""
    import numpy as np

    flat = np.ascontiguousarray(array).reshape(-1)
    result = np.empty(flat.shape, np.uint8)
    for start in range(0, len(flat), PART):
        part = slice(start, start + PART)
        result[part] = change(flat[part])  # assigning cuts as astype does
    return result.reshape(array.shape)
