"""The image and the settings of a request to the web page's server.

An image comes as a file of a form, in base64 in a JSON object, as the body itself, or as an
address that the server fetches. Settings come beside it, or in the query of the address.
"""

import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from util.addresses import decode_base64, decode_data_uri, is_data_uri
from util.files import UserError
from util.origins import RefusedError

MEGABYTE = 1_000_000
FORM_BYTES = 500_000  # allowed in a request besides the image; werkzeug reads blocks of 64 KiB
USAGE = "send one photo as the form's field image: curl -F image=@photo.jpg"
UNNAMED = "the photo"
FORM, FIELDS, JSON = "multipart/form-data", "application/x-www-form-urlencoded", "application/json"
RAW = ("", "application/octet-stream", "binary/octet-stream")  # and image/*
SWITCHES = {"true": True, "false": False, "1": True, "0": False}


class Upload(NamedTuple):
    """The image of a request: the bytes of a file, or the address where it lies."""

    content: bytes = b""
    name: str = UNNAMED
    url: str = ""


def body_limit(request: Any, max_bytes: int) -> int:
    """Return how many bytes the body of a request may have for an image of `max_bytes`."""
    share = 4 / 3 if request.mimetype == JSON else 1  # base64
    return math.ceil(max_bytes * share) + FORM_BYTES


def read_upload(request: Any, max_bytes: int) -> tuple[Upload, dict[str, Any]]:
    """Return the image of a request and its settings by name, as they were sent.

    Raises UserError where there is not one image, or a setting is given twice; RefusedError (413)
    if it has more than `max_bytes`, (415) for another type of body.
    """
    fields: list[tuple[str, Any]] = list(request.args.items(multi=True))
    kind, uploads = request.mimetype, []
    is_raw = kind in RAW or kind.startswith("image/")
    if kind == FIELDS:  # what curl --data-binary says of any file
        is_raw = not request.get_data(parse_form_data=False).isascii()
    if kind == JSON:
        fields += read_json(request)
    elif is_raw:
        content = request.get_data(cache=False)
        uploads = [Upload(content)] if content else []
    elif kind in (FORM, FIELDS):
        fields += request.form.items(multi=True)
        files = request.files.getlist("image")
        uploads = [Upload(each.read(), file_name(each.filename)) for each in files]
    else:
        raise RefusedError(415, f"a body of {kind[:80]} can't be read; {USAGE}")
    settings: dict[str, Any] = {}
    for name, value in fields:
        if name == "url":
            uploads.append(to_link(value))
        elif name == "image" and kind == JSON:
            uploads.append(Upload(decode_image(value)))
        elif name == "image":  # curl without the @
            continue
        elif name in settings:
            raise UserError(f"setting {name[:80]!r} is given more than once")
        else:
            settings[name] = value
    if len(uploads) != 1:
        raise UserError(f"{len(uploads) or 'no'} photos came; {USAGE}")
    check_size(uploads[0], max_bytes)
    return uploads[0], settings


def check_size(upload: Upload, max_bytes: int) -> None:
    """Raise RefusedError if an image has more than `max_bytes`."""
    if (size := len(upload.content)) > max_bytes:
        size_mb, max_mb = (f"{count / MEGABYTE:.3g}" for count in (size, max_bytes))
        raise RefusedError(413, f"{upload.name} has {size_mb} MB; at most {max_mb} MB are taken")


def file_name(text: str | None) -> str:
    """Return the last part of a path, shortened, for messages."""
    return PurePosixPath((text or "").replace("\\", "/")).name[-80:] or UNNAMED


def read_json(request: Any) -> Iterator[tuple[str, Any]]:
    """Yield the members of a JSON object; UserError if the body is not one. null is no value."""
    try:
        members = json.loads(request.get_data(cache=False), object_pairs_hook=list)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:80]
        raise UserError(f"the body is not JSON that can be read ({reason})") from error
    if not isinstance(members, list) or not all(isinstance(each, tuple) for each in members):
        raise UserError('the body is not a JSON object; send {"image": "<base64>"}')
    return ((name, value) for name, value in members if value is not None)


def to_link(value: Any) -> Upload:
    """Return the image that lies at an address; UserError if it is no text."""
    if not isinstance(value, str) or not value.strip():
        raise UserError("url must be the address of one photo, as https://example.org/photo.jpg")
    url = value.strip()
    if is_data_uri(url):
        return Upload(decode_image(url))
    return Upload(url=url, name=file_name(url.partition("?")[0].partition("#")[0].rstrip("/")))


def decode_image(value: Any) -> bytes:
    """Return the bytes of a file that a JSON text holds: base64, or a data: URI."""
    if not isinstance(value, str):
        raise UserError("image must be the photo's file as text: base64, or a data: URI")
    text = value.lstrip()
    if text[:8].lower().startswith(("http://", "https://")):
        raise UserError("image is an address; send it as url")
    if is_data_uri(text):
        return decode_data_uri(text)
    try:
        return decode_base64(text.encode())
    except ValueError as error:
        raise UserError("image is neither base64 nor a data: URI") from error


# --- settings


def read_setting(
    name: str, value: Any, bounds: Mapping[str, tuple[float, float]], methods: Collection[str]
) -> Any:
    """Return the value of a setting; UserError if it is not known or out of bounds.

    It is a text in forms and queries; in JSON it may also be of the setting's own type.
    """
    if isinstance(value, str):
        value = value.strip()
    shown = repr(value) if isinstance(value, str) else json.dumps(value)
    shown = shown if len(shown) <= 80 else f"{shown[:80]}…"
    if name == "method":
        if value not in list(methods):
            raise UserError(f"method {shown} is not known; choose from {', '.join(methods)}")
        return value
    if name == "attention":
        found = SWITCHES.get(value.lower()) if isinstance(value, str) else value
        if not isinstance(found, bool):
            raise UserError(f"attention {shown} must be true or false")
        return found
    if name not in bounds:
        known = ", ".join(("method", *bounds, "attention"))
        raise UserError(f"setting {name[:80]!r} is not known; choose from {known}")
    least, most = bounds[name]
    number = to_number(value, type(least))
    if not least <= number <= most:
        kind = "whole number" if isinstance(least, int) else "number"
        raise UserError(f"{name} {shown} must be a {kind} between {least} and {most}")
    return number


def to_number(value: Any, kind: type) -> float:
    """Return a value as an int or a float, NaN if it is none; 3.0 is the integer 3 in JSON."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return math.nan
    if kind is int and isinstance(value, float) and not value.is_integer():
        return math.nan
    try:
        return kind(value)
    except (ValueError, OverflowError):
        return math.nan
