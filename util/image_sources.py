"""Images from wherever a caller has them: what `util.images` reads, addresses, tensors."""

import hashlib
import io
import sys
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from util.addresses import MAX_BYTES, decode_data_uri, is_address, is_data_uri, shorten
from util.fetching import fetch
from util.files import UserError
from util.images import read_image

MAX_SECONDS = 60.0  # to fetch an image
TENSORS = "expected shape (3, H, W), (1, H, W) or (H, W) and uint8, or floats in 0..1"


class NamedBytes(io.BytesIO):
    """The content of a file, with the name that messages give it."""

    def __init__(self, content: bytes, name: str):
        super().__init__(content)
        self.name = name


def read_source(source: Any, at_least: int | None = None) -> Image.Image:
    """Return an image, decoded, upright and in mode RGB.

    `source` is anything that `util.images.read_image` reads, the text of an http(s) address or of
    a `data:` URI, or a torch tensor: (3, H, W) in the order red, green, blue, (1, H, W) or (H, W),
    of uint8 in 0..255 or floats in 0..1, on any device. Raises UserError or OSError.
    """
    if is_address(source):
        source = fetch_image(source)
    elif is_data_uri(source):
        source = NamedBytes(decode_data_uri(source), shorten(source))
    elif isinstance(source, Tensor):
        source = to_array(source)
    elif isinstance(source, NamedBytes):
        source.seek(0)  # it may have been read before
    return read_image(source, at_least)


def fetch_image(url: str) -> NamedBytes:
    """Return the content of an address that the user names; UserError if it is a web page."""
    content = fetch(url, MAX_BYTES, max_seconds=MAX_SECONDS, private=True)
    if content.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        raise UserError(f"{shorten(url)} is a web page; give the address of the image in it")
    return NamedBytes(content, shorten(url))


def is_named_otherwise(place: Any) -> bool:
    """Return whether a word of the command line names an image that is no file."""
    return place == "-" or is_address(place) or is_data_uri(place)


def name_source(place: str) -> tuple[str, Any]:
    """Return the name of an image that is no file, for tables, and what it is read from.

    Standard input ("-") is read now. Its name and that of a `data:` URI tell their content, so
    that a file of captions is continued with the right ones.
    """
    if place != "-":
        return shorten(place), place
    content = read_stdin()
    name = f"- (sha256 {hashlib.sha256(content).hexdigest()[:12]})"
    return name, NamedBytes(content, "the image from standard input")


def read_stdin() -> bytes:
    """Return the image in standard input; UserError if there is none, or too much."""
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError("- reads an image from standard input: python inference.py - < photo.jpg")
    content = sys.stdin.buffer.read(MAX_BYTES + 1)
    if not content:
        raise UserError("standard input is empty; pipe an image into it")
    if len(content) > MAX_BYTES:
        raise UserError(f"standard input has more than {MAX_BYTES / 1e6:.4g} MB")
    return content


def as_images(image: Any) -> list[Any] | None:
    """Return the images of a list, a tuple or a tensor (B, C, H, W); None for a single image."""
    if isinstance(image, (list, tuple)) or (isinstance(image, Tensor) and image.ndim == 4):
        return list(image)
    return None


def to_array(tensor: Tensor) -> Any:
    """Return a tensor (C, H, W) or (H, W) as a numpy array (H, W, C) or (H, W).

    Floats become float32. Raises UserError for other shapes, types and values.
    """
    message = f"a tensor of shape {tuple(tensor.shape)} and {tensor.dtype} is not an image"
    is_float = tensor.is_floating_point()
    if tensor.ndim == 3 and tensor.shape[0] not in (1, 3, 4) and tensor.shape[2] in (1, 3, 4):
        raise UserError(f"{message}; its channels come last: use tensor.permute(2, 0, 1)")
    channels = tensor.shape[0] if tensor.ndim == 3 else 1
    is_image = tensor.ndim in (2, 3) and channels in (1, 3, 4) and tensor.numel()  # 4: with alpha
    if not is_image or not (is_float or tensor.dtype in (torch.uint8, torch.bool)):
        raise UserError(f"{message}; {TENSORS}")
    tensor = tensor.detach().to("cpu")
    if is_float:
        tensor = tensor.float()
        low, high = tensor.min().item(), tensor.max().item()
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # room for rounding; false for NaN too
            raise UserError(
                f"{message}: its values reach from {low:.4g} to {high:.4g}; {TENSORS}, "
                "not normalised"
            )
    return (tensor.permute(1, 2, 0) if tensor.ndim == 3 else tensor).contiguous().numpy()
