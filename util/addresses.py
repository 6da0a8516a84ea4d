"""Bytes from http(s) addresses and `data:` URIs, bounded in size and time.

Whoever names an address lets this computer ask it. A stranger (a visitor of the web page, or a
server that redirects) must not reach what only this computer can: its own services, the local
network, a cloud's metadata. So names are resolved and all their addresses checked, and the address
that the connection really has is checked again before a byte is sent, as a name may be resolved to
another one the second time.
"""

import base64
import binascii
import contextlib
import hashlib
import ipaddress
import re
import socket
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote_to_bytes, urljoin, urlsplit

from util.files import UserError

MAX_BYTES = 100 * 2**20  # of an image: more than the largest that is decoded has as a JPEG
TIMEOUT = 30.0  # seconds for all of it, redirects included
MAX_REDIRECTS = 5
CHUNK = 2**14  # bytes; small, as compressed answers may grow a thousandfold
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # an IPv4 address in its last 32 bits
WIRE_SERVER = ipaddress.ip_address("168.63.129.16")  # a public address, but Azure's own services


def is_address(source: Any) -> bool:
    """Return whether `source` is the text of an http(s) address."""
    return isinstance(source, str) and re.match(r"https?://", source, re.IGNORECASE) is not None


def is_data_uri(source: Any) -> bool:
    """Return whether `source` is the text of a `data:` URI."""
    return isinstance(source, str) and source[:5].lower() == "data:"


def fetch(
    url: str, *, private: bool = False, max_bytes: int = MAX_BYTES, timeout: float = TIMEOUT
) -> bytes:
    """Return the content of an http(s) address, of at most `max_bytes`, within `timeout` seconds.

    `private` allows that the address itself leads to this computer or a local network (a user at
    a terminal may name http://localhost/…, a visitor of the web page may not); a redirect from a
    public address to there is always refused. At most `MAX_REDIRECTS` are followed. The proxies
    of the environment are used for the user, never for a visitor. Raises UserError with one line.
    """
    transfer = Transfer(private, max_bytes, timeout)
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append(transfer.fetch(url))
        except Exception as error:
            outcome.append(error)

    # A thread, as nothing else limits the time of resolving names, or of a server that sends a
    # byte from time to time.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        thread.join(timeout)
    finally:
        transfer.stop()
    name = shorten(url)
    if not outcome:
        raise UserError(f"{name} took more than {timeout:g} seconds; save the image and name it")
    if isinstance(outcome[0], UserError):
        raise UserError(f"{name} can't be fetched: {outcome[0]}") from outcome[0].__cause__
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


class Transfer:
    """One fetch, which another thread may stop."""

    def __init__(self, private: bool, max_bytes: int, timeout: float):
        self.private, self.max_bytes, self.timeout = private, max_bytes, timeout
        self.user = private  # at a terminal: stays, where `private` ends at a public address
        self.stopped = False
        self.sockets: list[socket.socket] = []

    def stop(self) -> None:
        """End the transfer: a read that waits returns."""
        self.stopped = True
        for each in self.sockets:
            with contextlib.suppress(OSError):  # closed already
                each.shutdown(socket.SHUT_RDWR)

    def fetch(self, url: str) -> bytes:
        """Return the content of `url`; raises UserError with the reason alone."""
        import requests  # here, as images from files need no network

        try:
            with requests.Session() as session:
                # Neither its proxies nor passwords (.netrc) are a visitor's.
                session.trust_env = self.user
                session.headers["User-Agent"] = f"image-captioning {session.headers['User-Agent']}"
                session.headers["Accept"] = "image/*, */*;q=0.5"
                adapter = checked_adapter(self.check_connection)
                session.mount("http://", adapter)
                session.mount("https://", adapter)
                return self.follow(session, url)
        except requests.RequestException as error:
            raise UserError(explain(error)) from error
        except (OSError, UnicodeError) as error:  # UnicodeError: no name of a host
            raise UserError(str(error) or type(error).__name__) from error

    def follow(self, session: Any, url: str) -> bytes:
        """Return the content of `url`, or of where it redirects to."""
        for _ in range(MAX_REDIRECTS + 1):
            self.check(session, url)
            timeout = min(self.timeout, 10), 2 * self.timeout  # seconds to connect, to read
            with session.get(url, stream=True, allow_redirects=False, timeout=timeout) as response:
                target = session.get_redirect_target(response)
                if target is None:
                    return self.receive(response)
                url = urljoin(url, target)
        raise UserError(f"more than {MAX_REDIRECTS} redirects")

    def check(self, session: Any, url: str) -> None:
        """Raise UserError if `url` is not an address that may be asked."""
        from requests.utils import select_proxy

        if not is_address(url):
            raise UserError(f"{shorten(url)} is not an http or https address")
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as error:
            raise UserError(f"{error} in {shorten(url)}") from error
        if not host:
            raise UserError(f"{shorten(url)} names no server")
        settings = session.merge_environment_settings(url, {}, True, None, None)
        try:
            found = {each[4][0] for each in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
        except (OSError, UnicodeError) as error:
            if select_proxy(url, settings["proxies"]):  # which resolves names itself
                self.private = False
                return
            raise UserError(f"no server is known by the name {host}") from error
        if all(map(is_public, found)):
            self.private = False  # from here on
        elif not self.private:
            raise UserError(f"{host} is not a public address")

    def check_connection(self, connected: socket.socket) -> None:
        """Raise UserError if a connection leads where it may not; else note it for `stop`."""
        if not self.private and not is_public(connected.getpeername()[0]):
            raise UserError("the server is not at a public address")
        self.sockets.append(connected)
        if self.stopped:  # before it was noted
            self.stop()

    def receive(self, response: Any) -> bytes:
        """Return the content of an answer."""
        if response.status_code != 200:
            reason = " ".join(str(response.reason or "").split())[:100]
            raise UserError(f"the server answers {response.status_code} {reason}".rstrip())
        content = bytearray()
        for part in response.iter_content(CHUNK):
            content += part
            if len(content) > self.max_bytes:
                raise UserError(f"it has more than {self.max_bytes / 1e6:.4g} MB")
            if self.stopped:
                raise UserError("stopped")  # nobody waits for it
        if not content:
            raise UserError("the answer is empty")
        return bytes(content)


def checked_adapter(check: Callable[[socket.socket], None]) -> Any:
    """Return an adapter for requests that calls `check` with each connection, before it is used.

    Connections to proxies are not checked.
    """
    from requests.adapters import HTTPAdapter

    def checked(pool_class: type) -> type:
        connection_class = pool_class.ConnectionCls

        class Connection(connection_class):
            def connect(self) -> None:
                super().connect()
                try:
                    check(self.sock)
                except BaseException:
                    self.close()
                    raise

        return type(pool_class.__name__, (pool_class,), {"ConnectionCls": Connection})

    class Adapter(HTTPAdapter):
        def init_poolmanager(self, *args: Any, **keywords: Any) -> None:
            super().init_poolmanager(*args, **keywords)
            pools = self.poolmanager.pool_classes_by_scheme
            self.poolmanager.pool_classes_by_scheme = {
                scheme: checked(pool) for scheme, pool in pools.items()
            }

    return Adapter()


def is_public(address: str) -> bool:
    """Return whether an IP address is one of the internet, not of this computer or a network."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in NAT64:
            inner = ipaddress.ip_address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip.is_site_local or ip.teredo:
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved and ip != WIRE_SERVER


def explain(error: Exception) -> str:
    """Return why requests failed, in a few words; its own text repeats the address and objects."""
    import requests

    reasons = (
        (requests.exceptions.SSLError, "its certificate is not valid"),
        (requests.Timeout, "the server does not answer"),
        (requests.exceptions.ProxyError, "the proxy does not answer"),
        (requests.ConnectionError, "the connection failed or broke"),
        (requests.exceptions.ChunkedEncodingError, "the connection broke"),
        (requests.exceptions.ContentDecodingError, "the answer is damaged"),
        (requests.exceptions.InvalidURL, "it is not an address"),
    )
    return next(
        (reason for kind, reason in reasons if isinstance(error, kind)), type(error).__name__
    )


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
        compact = b"".join(content.split()).replace(b"-", b"+").replace(b"_", b"/").rstrip(b"=")
        try:
            content = base64.b64decode(compact + b"=" * (-len(compact) % 4), validate=True)
        except (binascii.Error, ValueError) as error:
            raise UserError("the data: URI is damaged: its base64 can't be decoded") from error
    if len(content) > max_bytes:
        raise too_large
    if not content:
        raise UserError("the data: URI is empty")
    return content


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
