"""Images that lack their last bytes: whether they are read, how far, and the line that says so."""

import contextlib
import io
import logging
import os
import threading
from collections.abc import Iterator
from typing import Any

from PIL import Image, ImageFile

from util import program
from util.files import UserError

log = logging.getLogger(__name__)

STRICT = "IMAGE_CAPTIONING_STRICT"  # of the environment, which worker processes inherit
MAX_WARNINGS = 10  # images that a process names
_warned: set[str] = set()


class Allowance(threading.local):
    """Pillow's switch for reading such images, which is global, for one thread alone."""

    is_on = bool(ImageFile.LOAD_TRUNCATED_IMAGES)

    def __bool__(self) -> bool:
        return self.is_on

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Switch it on in the block."""
        before, self.is_on = self.is_on, True
        if not ImageFile.LOAD_TRUNCATED_IMAGES:  # the caller, or a copy of this module, has set it
            ImageFile.LOAD_TRUNCATED_IMAGES = self
        try:
            yield
        finally:
            self.is_on = before


allowance = ImageFile.LOAD_TRUNCATED_IMAGES = Allowance()


def set_strict(strict: bool) -> None:
    """Refuse images that lack their last bytes, here and in worker processes, or read them."""
    os.environ[STRICT] = "1" if strict else ""
    _warned.clear()


def is_strict() -> bool:
    """Return whether images that lack their last bytes are refused."""
    return bool(os.environ.get(STRICT))


def complete(stream: Any, error: OSError) -> Any | None:
    """Return the file to read with `allowance.on()` after this error, None if that won't help.

    Pillow fills the rest of an image itself, but in a WebP file, which gets as many zeros as it
    lacks bytes, unless that is more than half of it.
    """
    stream.seek(0)
    if "truncated" in str(error):
        return stream
    data = stream.read()
    size = 8 + int.from_bytes(data[4:8], "little")
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and len(data) < size < 2 * len(data):
        return io.BytesIO(data + bytes(size - len(data)))
    return None


def check_enough(image: Image.Image) -> None:
    """Raise UserError if half of an image has one colour: it was filled, as too much is missing."""
    width, height = image.size
    middle = max(1, width // 2), max(1, height // 2)
    halves = (0, 0, width, middle[1]), (0, height - middle[1], width, height)
    halves += (0, 0, middle[0], height), (width - middle[0], 0, width, height)
    for half in halves:
        if all(low == high for low, high in image.crop(half).getextrema()):
            raise UserError("image file is truncated: half of the image or more is missing")


def warn_of_missing_end(name: str) -> None:
    """Log that an image lacks its last bytes, once, and of the first few that do."""
    if name in _warned:
        return
    _warned.add(name)
    if len(_warned) <= MAX_WARNINGS:
        more = "" if len(_warned) < MAX_WARNINGS else "; further ones are not named"
        message = "%s lacks its last bytes: it is read as far as it goes (--strict refuses it)%s"
        log.warning(message, program.printable(name), more)  # the name may be a stranger's
