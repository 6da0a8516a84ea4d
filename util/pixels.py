"""Deep grey, floats, transparency and numpy arrays → 8-bit RGB."""

from collections.abc import Callable
from typing import Any

from PIL import Image

from util.files import UserError

CHUNK = 2**20  # numbers converted at a time
# What white may be in a file of 16 or 32 bits: sensors have 8, 10, 12, 14 or 16 of them.
WHITES = (255, 1023, 4095, 16383, 65535)
ARRAYS = (
    "expected shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) "
    "and uint8, uint16, bool, or floats in 0..1"
)


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

    The modes I and F do not define white. It is taken as the smallest of 1 (F only) and `WHITES`
    that no value exceeds; if there is none, the range of the values is used.
    """
    import numpy as np

    values = np.array(image)
    if image.mode.startswith("I;16"):
        return from_array(values)
    if image.mode == "F":
        np.nan_to_num(values, copy=False, posinf=0, neginf=0)
    low, high = min(float(values.min()), 0.0), float(values.max())
    whites = (1, *WHITES) if image.mode == "F" else WHITES
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
        parts = [array] if channels < 4 else [array[..., :3], array[..., 3:]]
        parts = [from_uint16(part) for part in parts]  # a camera's alpha may be of 16 bits, alone
        array = parts[0] if channels < 4 else np.concatenate(parts, axis=2)
    elif array.dtype.kind == "f":
        low, high = array.min(), array.max()
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # room for rounding; false for NaN too
            raise UserError(f"{message}: its values reach from {low:.4g} to {high:.4g}; {ARRAYS}")
        array = to_uint8(from_unit, array)
    elif array.dtype != np.uint8:
        raise UserError(f"{message}; {ARRAYS}")
    return Image.fromarray(np.ascontiguousarray(array))


def from_uint16(array: Any) -> Any:
    """Return numbers of up to 16 bits in 8 bits; their white is the smallest that fits."""
    import numpy as np

    high = int(array.max())
    white = next(white for white in WHITES if high <= white)
    return to_uint8(lambda part: (part.astype(np.uint32) * 255 + white // 2) // white, array)


def brighten(image: Image.Image) -> Image.Image:
    """Return an image of 16-bit colours, which Pillow has cut to 8, with its white at 255.

    A photo of 12 bits in such a file would be black: of its 4,096 values Pillow keeps 16.
    """
    bands = image.getbands()
    extrema = image.getextrema() if len(bands) > 1 else (image.getextrema(),)
    is_color = [band not in ("A", "a") for band in bands]
    high = max(each[1] for each, color in zip(extrema, is_color, strict=True) if color)
    white = next(white >> 8 for white in WHITES if high <= white >> 8)
    if not 0 < white < 255:
        return image
    table = [min(255, value * 255 // white) for value in range(256)]
    return image.point([x for color in is_color for x in (table if color else range(256))])


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
