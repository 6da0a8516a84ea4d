"""Which sites may ask the web page's server: names of the host, and origins of other pages."""

import ipaddress
import re
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

from util.files import UserError

PORTS = {"http": 80, "https": 443}
HOST = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?")
MAX_AGE = 600  # seconds for which a browser remembers what is allowed


class RefusedError(UserError):
    """A refused request, with its HTTP status."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def check_sender(request: Any, hostnames: Collection[str], origins: Collection[str] = ()) -> None:
    """Raise RefusedError for a request that another site made a browser send.

    The page of the other site sends its own name as Origin; or as Host, if that name is made to
    resolve to this machine. An IP address can't be redirected so. Pages of `origins` may ask.
    """
    if not is_own_host(request.host, hostnames):
        raise RefusedError(
            403, "this server does not go by that name; start it with --hostnames NAME"
        )
    origin = request.headers.get("Origin")
    if not origin or origin in origins or origin.partition("://")[2] == request.host:
        return
    if request.method == "POST" or is_preflight(request):
        raise RefusedError(403, "pages of other sites may not ask for captions")


def is_own_host(host: str, hostnames: Collection[str]) -> bool:
    """Return whether a Host header is an IP address, localhost, or one of `hostnames`."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name in {"localhost", *(known.lower() for known in hostnames)}
    return True


def is_preflight(request: Any) -> bool:
    """Return whether a browser asks if the page of another site may send a request."""
    return request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers


def cors_headers(request: Any, origins: Collection[str]) -> dict[str, str]:
    """Return the headers by which a page of one of `origins` may read an answer.

    An answer differs by the origin that asks, so that caches must not give it to another one.
    """
    if not origins:
        return {}
    headers = {"Vary": "Origin"}
    if (origin := request.headers.get("Origin")) in origins:
        headers["Access-Control-Allow-Origin"] = origin
        if is_preflight(request):
            headers["Access-Control-Allow-Methods"] = "GET, POST"
            headers["Access-Control-Allow-Headers"] = "Content-Type"
            headers["Access-Control-Max-Age"] = str(MAX_AGE)
    return headers


def parse_origin(text: str) -> str:
    """Return an origin as browsers send it: in lower case, without the scheme's own port.

    Raises UserError for anything but a scheme, a host and a port.
    """
    fault = f"allow origin {text!r} is not an origin; give scheme and host, as https://example.org"
    if text == "*":
        raise UserError(f"{fault}: sites are allowed by name, one --allow-origin each")
    try:
        if text.split() != [text.strip()]:  # urlsplit drops line breaks
            raise ValueError
        parts = urlsplit(text.strip())
        port, name = parts.port, parts.hostname or ""
        host = f"[{ipaddress.IPv6Address(name)}]" if ":" in name else to_ascii(name)
    except ValueError as error:
        raise UserError(fault) from error
    if parts.scheme not in PORTS or not host or parts.username or parts.password:
        raise UserError(fault)
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise UserError(f"{fault}; the path is not part of it")
    return f"{parts.scheme}://{host}" + ("" if port in (None, PORTS[parts.scheme]) else f":{port}")


def to_ascii(name: str) -> str:
    """Return a host's name as it is sent (`bücher.de` as `xn--bcher-kva.de`), "" if it is none."""
    encoded = name.encode("idna").decode() if name else ""
    return encoded if HOST.fullmatch(encoded) else ""
