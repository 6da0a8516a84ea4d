"""Files at http(s) addresses: bounded in size and time, and for strangers only from public ones.

Whoever names an address to a server has it send a request from where the server stands, behind
the firewall. So a name is resolved once, all its addresses are checked, and the connection is made
to the one that was checked; each redirect is checked again. Proxies are not used: they would
resolve the name themselves.
"""

import contextlib
import functools
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from util.files import UserError
from util.origins import to_ascii

MAX_REDIRECTS = 5
MAX_SECONDS = 20.0  # from the first request to the last byte
CHUNK = 2**16
PORTS = {"http": 80, "https": 443}
AGENT = "image-captioning (https://github.com/OWNER/image-captioning)"
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # holds an IPv4 address
WIRE_SERVER = ipaddress.ip_address("168.63.129.16")  # a public address, but Azure's own services
SAFE = "/%:@!$&'()*+,;=~-._?"  # not quoted again in paths and queries


class TooLargeError(UserError):
    """A file has more bytes than were asked for."""

    status = 413


def fetch(
    url: str, max_bytes: int, *, max_seconds: float = MAX_SECONDS, private: bool = False
) -> bytes:
    """Return the file at an http(s) address.

    With `private` the address may be inside this network; a public one may even then not redirect
    there. Raises UserError, in one line that a stranger may read, if the file has more than
    `max_bytes`, takes longer than `max_seconds`, or can't be had.
    """
    shown = url if len(url) <= 120 else f"{url[:120]}…"
    deadline = Deadline(max_seconds)
    try:
        with deadline:
            for _ in range(MAX_REDIRECTS + 1):
                parts = check_url(url, private)
                with request(parts, deadline, private) as (response, private):
                    if response.status not in (301, 302, 303, 307, 308):
                        content = read(response, max_bytes)
                        if deadline.is_over:  # it may be why the file ended
                            raise UserError
                        return content
                    url = urljoin(url, response.headers.get("Location", ""))
            raise UserError(f"it redirects more than {MAX_REDIRECTS} times")
    except TooLargeError as error:
        raise TooLargeError(f"{shown} {error}") from error
    except (UserError, OSError, http.client.HTTPException, ValueError) as error:
        if deadline.is_over:
            reason = f"it takes more than {max_seconds:g} seconds"
        elif isinstance(error, UserError):
            reason = str(error)
        elif isinstance(error, ssl.SSLError):
            reason = "its certificate or encryption is not valid"
        elif isinstance(error, http.client.HTTPException):
            reason = "its server sends no proper answer"
        else:
            reason = "its server can't be reached"
        raise UserError(f"{shown} can't be fetched: {reason}") from error


class Deadline:
    """Shuts the connection down when the time is over, however slowly bytes come."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds
        self.connection: socket.socket | None = None
        self.timer = threading.Timer(seconds, self.stop)
        self.timer.daemon = True

    def __enter__(self) -> "Deadline":
        self.timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()

    @property
    def is_over(self) -> bool:
        return self.remaining <= 0

    @property
    def remaining(self) -> float:
        """Return the seconds that are left."""
        return self.end - time.monotonic()

    def watch(self, connection: socket.socket) -> socket.socket:
        """Return a connection that ends with the time; UserError if it is over already."""
        self.connection = connection
        if self.is_over:
            connection.close()
            raise UserError
        return connection

    def stop(self) -> None:
        """End the connection, for the thread that reads from it too."""
        if self.connection is not None:
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)


def check_url(url: str, private: bool) -> SplitResult:
    """Return the parts of an address; UserError if it is not one that may be fetched.

    With `private` any port will do; else none of services that are no web servers.
    """
    try:
        parts = urlsplit(url)
        host = (
            (parts.hostname or "")
            if ":" in (parts.hostname or "")
            else to_ascii(parts.hostname or "")
        )
        port = parts.port or PORTS.get(parts.scheme, 0)
    except ValueError:
        host, port = "", 0
    if not host or parts.scheme not in PORTS:
        raise UserError("it is not the http or https address of a file")
    if parts.username is not None or parts.password is not None:
        raise UserError("addresses with a user name or a password are not taken")
    if port < 1024 and port not in PORTS.values() and not private:
        raise UserError(f"port {port} is not one of web pages")
    netloc = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    path, query = quote(parts.path or "/", safe=SAFE), quote(parts.query, safe=SAFE)
    return SplitResult(parts.scheme, netloc, path, query, "")


@contextlib.contextmanager
def request(
    parts: SplitResult, deadline: Deadline, private: bool
) -> Iterator[tuple[http.client.HTTPResponse, bool]]:
    """Yield the answer to a GET request, without its body, and whether it is from inside."""
    host, port = parts.hostname or "", parts.port or 0
    connection = http.client.HTTPConnection(host, port)
    try:
        connection.sock, inside = connect(host, port, deadline, private)
        if parts.scheme == "https":
            connection.sock = deadline.watch(
                tls_context().wrap_socket(
                    connection.sock, server_hostname=host, do_handshake_on_connect=False
                )
            )
            connection.sock.do_handshake()
        default = PORTS[parts.scheme] == port
        name = parts.netloc.rpartition(":")[0] if default else parts.netloc
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        headers = {"Host": name, "User-Agent": AGENT, "Accept": "image/*", "Connection": "close"}
        connection.request("GET", target, headers=headers)
        yield connection.getresponse(), inside
    finally:
        deadline.connection = None
        connection.close()


@functools.cache
def tls_context() -> ssl.SSLContext:
    """Return what checks certificates: by the system's authorities and those of certifi."""
    from requests.certs import where  # here, as it takes a while

    context = ssl.create_default_context()
    context.load_verify_locations(where())  # some systems have none of their own
    return context


def connect(host: str, port: int, deadline: Deadline, private: bool) -> tuple[socket.socket, bool]:
    """Return a connection to the first address of a host that answers, and whether it is inside.

    The name is resolved once, so that what is checked is what is connected to.
    """
    # One line for all: strangers need not know which names there are inside.
    refusal = UserError(f"{host[:80]} has no public address")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise refusal from None
    inside = not all(is_public(each[4][0]) for each in found)
    if not found or (inside and not private):
        raise refusal
    failure: OSError = ConnectionError("no address answers")
    for family, kind, protocol, _, address in found:
        connection = deadline.watch(socket.socket(family, kind, protocol))
        try:
            connection.settimeout(max(0.001, min(deadline.remaining, MAX_SECONDS / 2)))
            connection.connect(address)
            deadline.watch(connection)
            inside = inside or is_own(connection)
            if inside and not private:
                raise refusal
            return connection, inside
        except (OSError, UserError) as error:
            connection.close()
            if error is refusal:
                raise
            failure = error
    raise failure


def is_own(connection: socket.socket) -> bool:
    """Return whether a connection leads to this machine, whose own address may be public."""
    return connection.getsockname()[0] == connection.getpeername()[0]


def is_public(text: str) -> bool:
    """Return whether an IP address is one of the public internet, not of this network."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if address in NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            address = inner
        elif address.is_site_local:
            return False
    is_special = address.is_multicast or address.is_reserved or address == WIRE_SERVER
    return address.is_global and not is_special


def read(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    """Return the body of an answer; UserError for an error, TooLargeError for too many bytes."""
    if response.status != 200:
        reason = " ".join(response.reason.split())[:60]
        raise UserError(f"its server says {response.status} {reason}".rstrip())
    limit = f"at most {max_bytes / 1e6:.3g} MB are taken"
    if (response.length or 0) > max_bytes:
        raise TooLargeError(f"has {response.length / 1e6:.3g} MB; {limit}")
    content = bytearray()
    while chunk := response.read(CHUNK):
        content += chunk
        if len(content) > max_bytes:
            raise TooLargeError(f"has more than {max_bytes / 1e6:.3g} MB; {limit}")
    if response.length:
        raise UserError("its server breaks off in the middle of the file")
    return bytes(content)
