"""Addresses and `data:` URIs in place of image files: what they are, and their short names."""

import base64
import hashlib
import re
from typing import Any
from urllib.parse import unquote_to_bytes

from util.files import UserError

MAX_BYTES = 100 * 2**20  # of an image: more than the largest that is decoded has as a JPEG


def is_address(source: Any) -> bool:
    """Return whether `source` is the text of an http(s) address."""
    return isinstance(source, str) and re.match(r"https?://", source, re.IGNORECASE) is not None


def is_data_uri(source: Any) -> bool:
    """Return whether `source` is the text of a `data:` URI."""
    return isinstance(source, str) and source[:5].lower() == "data:"


def decode_data_uri(text: str, *, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the content of a `data:` URI (base64 or percent-encoded), of at most `max_bytes`."""
    header, comma, payload = text.partition(",")
    if not is_data_uri(text) or not comma:
        raise UserError(
            "a data: URI has the form data:image/png;base64,… or data:image/png,… (percent-encoded)"
        )
    too_large = UserError(f"the data: URI has more than {max_bytes / 1e6:.4g} MB")
    if len(payload) > 4 * max_bytes + 4:  # neither coding takes more
        raise too_large
    content = unquote_to_bytes(payload)
    if header.rstrip().lower().endswith(";base64"):
        try:
            content = decode_base64(content)
        except ValueError as error:
            raise UserError("the data: URI is damaged: its base64 can't be decoded") from error
    if len(content) > max_bytes:
        raise too_large
    if not content:
        raise UserError("the data: URI is empty")
    return content


def decode_base64(text: bytes) -> bytes:
    """Return what base64 of either alphabet holds, with blanks or without its padding.

    Raises ValueError for anything else.
    """
    compact = b"".join(text.split()).replace(b"-", b"+").replace(b"_", b"/").rstrip(b"=")
    return base64.b64decode(compact + b"=" * (-len(compact) % 4), validate=True)


def shorten(source: str) -> str:
    """Return a name of an address or `data:` URI for messages and tables of captions.

    Addresses lose a password, and their end if they are long; `data:` URIs become
    "data:image/png (sha256 0123456789ab)". Different sources keep different names.
    """
    digest = hashlib.sha256(source.encode(errors="surrogatepass")).hexdigest()[:12]
    if is_data_uri(source):
        return f"{source[:100].partition(',')[0].partition(';')[0]} (sha256 {digest})"
    name = re.sub(r"^(\w+://)[^/?#\s]*@", r"\1", source)
    return name if len(name) <= 300 else f"{name[:270]}… (sha256 {digest})"
