"""Fetching a stranger's address reaches no host inside, and ends in time and in one line."""

import contextlib
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from util import fetching
from util.fetching import TooLargeError, fetch, is_public
from util.files import UserError

PHOTO = bytes(range(256)) * 20


class Handler(BaseHTTPRequestHandler):
    """Answers by the path, with the faults that servers have."""

    def do_GET(self):
        self.server.asked.append((self.path, dict(self.headers)))
        path = self.path.partition("?")[0]
        if path.startswith("/to/"):  # the rest is where to, a host and a path
            return self.answer(302, b"", f"Location: http://{path[4:].replace('PORT', self.port)}")
        if path == "/round":
            return self.answer(302, b"", "Location: /round")
        if path == "/relative/a":
            return self.answer(301, b"", "Location: ../photo.png")
        if path == "/file":
            return self.answer(302, b"", "Location: file:///etc/passwd")
        if path == "/missing":
            return self.answer(404, b"<html>")
        if path == "/large":
            return self.answer(200, b"", f"Content-Length: {10**9}")
        if path == "/endless":
            self.send_response(200)
            self.end_headers()
            while not self.server.over.is_set():
                self.wfile.write(bytes(1000))
        elif path == "/short":
            return self.answer(200, PHOTO[:100], f"Content-Length: {len(PHOTO)}")
        elif path.startswith("/slow"):
            if path == "/slow-body":
                self.send_response(200)
                self.end_headers()
            while not self.server.over.wait(0.02):
                self.wfile.write(b"x")
        elif path == "/nonsense":
            self.wfile.write(b"no answer\r\n\r\n")
        else:
            self.answer(200, PHOTO, f"Content-Length: {len(PHOTO)}")

    @property
    def port(self):
        return str(self.server.server_port)

    def answer(self, status, content, *headers):
        self.send_response(status)
        for header in headers:
            self.send_header(*header.split(": "))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        """Let clients hang up, as they should."""


@pytest.fixture(scope="module")
def server():
    server = Server(("127.0.0.1", 0), Handler)
    server.asked, server.over = [], threading.Event()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def asked(server):
    server.asked.clear()
    return server.asked


@pytest.fixture
def inside(server):
    """Return the address of the server, which is inside this network."""
    return f"http://127.0.0.1:{server.server_port}"


# Hosts by name; nothing listens at the addresses that are not 127.0.0.1, nor is anything sent.
HOSTS = {
    "photos.example": ["127.0.0.1"],
    "mixed.example": ["127.0.0.1", "10.0.0.7"],
    "inside.example": ["10.0.0.7"],
    "metadata.example": ["169.254.169.254"],
    "v6.example": ["fd00::1"],
}


@pytest.fixture
def outside(server, monkeypatch):
    """Let 127.0.0.1 be public: return the address of the server, now that of a public host."""
    lookups = []

    def getaddrinfo(host, port, **how):
        lookups.append(host)
        family = socket.AF_INET
        if host not in HOSTS:
            raise socket.gaierror(-2, "Name or service not known")
        return [(family, socket.SOCK_STREAM, 6, "", (each, port)) for each in HOSTS[host]]

    original = is_public
    monkeypatch.setattr(fetching.socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(fetching, "is_own", lambda connection: False)
    monkeypatch.setattr(
        fetching, "is_public", lambda address: address == "127.0.0.1" or original(address)
    )
    server.lookups = lookups
    return f"http://photos.example:{server.server_port}"


def reason_of(url, **how):
    """Return why an address can't be fetched, from the one line that says so."""
    with pytest.raises(UserError) as error:
        fetch(url, 10_000, **how)
    message = str(error.value)
    assert "\n" not in message and len(message) < 300
    start = url if len(url) <= 120 else f"{url[:120]}…"
    assert message.startswith(f"{start} can't be fetched: ")
    return message.removeprefix(f"{start} can't be fetched: ")


def test_the_file_at_a_public_address_is_returned(outside, asked, server):
    assert fetch(f"{outside}/a%20b/ä.png?size=ü&x=1#part", 10_000) == PHOTO
    path, headers = asked[0]
    assert path == "/a%20b/%C3%A4.png?size=%C3%BC&x=1"
    assert headers["Host"] == outside.removeprefix("http://")
    assert server.lookups == ["photos.example"]  # what was checked is what was connected to
    assert fetch(f"{outside}/photo.png", len(PHOTO)) == PHOTO  # exactly as large as may be
    assert fetch(f"{outside}/relative/a", 10_000) == PHOTO
    assert fetch(f"{outside}/to/photos.example:PORT/a.png", 10_000) == PHOTO


@pytest.mark.parametrize("host", ["inside", "mixed", "metadata", "v6", "nowhere"])
def test_no_host_inside_is_reached_by_name_or_by_redirect(host, outside, asked, server):
    wanted = f"{host}.example has no public address"
    assert reason_of(f"http://{host}.example/a.png") == wanted
    assert asked == []
    address = f"{outside}/to/{host}.example:PORT/a.png"
    for private in (False, True):  # a public address may in no case lead inside
        with pytest.raises(UserError, match=f"can't be fetched: {wanted}$"):
            fetch(address, 10_000, private=private)
    assert [path for path, _ in asked] == [f"/to/{host}.example:PORT/a.png"] * 2


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0.0.0.0",
        "[::1]", "[::ffff:127.0.0.1]", "[::]", "[fe80::1]", "10.0.0.1", "192.168.1.1",
        "169.254.169.254", "100.64.0.1", "[fd00::1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]",
    ],
)  # fmt: skip
def test_no_address_inside_is_reached_however_it_is_written(host, server, asked):
    reason = reason_of(f"http://{host}:{server.server_port}/a.png")
    assert reason == f"{host.strip('[]')} has no public address"
    assert asked == []


def test_this_machines_own_public_address_is_not_reached(server, asked, monkeypatch):
    monkeypatch.setattr(fetching, "is_public", lambda address: True)
    reason = reason_of(f"http://127.0.0.1:{server.server_port}/a.png")
    assert reason == "127.0.0.1 has no public address" and asked == []


def test_a_person_may_name_an_address_inside_and_it_may_redirect(inside, asked):
    assert fetch(f"{inside}/a.png", 10_000, private=True) == PHOTO
    address = inside.removeprefix("http://")
    assert fetch(f"{inside}/to/{address}/b.png", 10_000, private=True) == PHOTO


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("2606:4700::1111", True), ("::ffff:8.8.8.8", True),
        ("64:ff9b::808:808", True), ("2002:808:808::", True), ("172.15.0.1", True),
        ("127.0.0.1", False), ("10.0.0.1", False), ("172.16.0.1", False), ("192.168.0.1", False),
        ("169.254.1.1", False), ("100.64.0.1", False), ("0.0.0.0", False), ("224.0.0.1", False),
        ("240.0.0.1", False), ("255.255.255.255", False), ("192.0.2.1", False),
        ("198.18.0.1", False), ("168.63.129.16", False),
        ("::1", False), ("::", False), ("fe80::1%eth0", False),
        ("fd00::1", False), ("fec0::1", False), ("ff02::1", False), ("::ffff:10.0.0.1", False),
        ("64:ff9b::a00:1", False), ("2002:a00:1::", False), ("::10.0.0.1", False),
        ("2001:db8::1", False), ("", False), ("localhost", False),
    ],
)  # fmt: skip
def test_an_address_is_public_or_not(address, public):
    assert is_public(address) is public


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("ftp://example.org/a.png", "it is not the http or https address of a file"),
        ("file:///etc/passwd", "it is not the http or https address of a file"),
        ("//example.org/a.png", "it is not the http or https address of a file"),
        ("example.org/a.png", "it is not the http or https address of a file"),
        ("http://", "it is not the http or https address of a file"),
        ("http://[::1", "it is not the http or https address of a file"),
        ("http://a b/", "it is not the http or https address of a file"),
        ("http://a..b/", "it is not the http or https address of a file"),
        ("http://a:99999/", "it is not the http or https address of a file"),
        ("http://a\r\nHost: b/", "it is not the http or https address of a file"),
        ("http://u:p@example.org/", "addresses with a user name or a password are not taken"),
        ("http://example.org:22/", "port 22 is not one of web pages"),
        ("http://example.org:25/", "port 25 is not one of web pages"),
    ],
)
def test_what_is_no_address_of_a_file_is_refused(url, reason, monkeypatch):
    monkeypatch.setattr(fetching.socket, "getaddrinfo", None)  # nothing is looked up
    with pytest.raises(UserError, match=f"can't be fetched: {reason}$"):
        fetch(url, 10_000)


def test_a_person_may_name_any_port_of_a_host_inside():
    assert "port" not in reason_of("http://127.0.0.1:9/photo.jpg", private=True)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/missing", "its server says 404 Not Found"),
        ("/round", "it redirects more than 5 times"),
        ("/file", "it is not the http or https address of a file"),
        ("/short", "its server breaks off in the middle of the file"),
        ("/nonsense", "its server sends no proper answer"),
    ],
)
def test_what_a_server_does_wrong_is_said_in_a_line(path, reason, inside):
    assert reason_of(f"{inside}{path}", private=True) == reason


def test_a_server_that_is_not_there_or_has_no_encryption_is_said(inside, server):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert reason_of(f"http://127.0.0.1:{port}/", private=True) == "its server can't be reached"
    reason = reason_of(inside.replace("http", "https"), private=True)
    assert reason == "its certificate or encryption is not valid"


def test_a_long_address_is_shortened(inside):
    assert (
        reason_of(f"{inside}/missing?{'x' * 500}", private=True) == "its server says 404 Not Found"
    )


def test_a_file_that_is_too_large_is_not_read_to_its_end(inside):
    for path, size in (("/large", "1e+03 MB"), ("/endless", "more than 0.01 MB")):
        with pytest.raises(TooLargeError) as error:
            fetch(f"{inside}{path}", 10_000, private=True)
        assert str(error.value) == f"{inside}{path} has {size}; at most 0.01 MB are taken"
        assert error.value.status == 413


@pytest.mark.parametrize("path", ["/slow-head", "/slow-body"])
def test_a_server_that_sends_a_byte_now_and_then_is_left(path, inside):
    """It would keep a thread of the page's server busy for ever."""
    began = time.monotonic()
    reason = reason_of(f"{inside}{path}", private=True, max_seconds=0.3)
    assert reason == "it takes more than 0.3 seconds"
    assert time.monotonic() - began < 20


def test_a_handshake_that_never_ends_is_left(server):
    """A record of encryption is announced, and comes a byte at a time."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip():
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(b"\x16\x03\x03\x40\x00")
                while not server.over.wait(0.02):
                    connection.sendall(b"x")

        threading.Thread(target=drip, daemon=True).start()
        began = time.monotonic()
        url = f"https://127.0.0.1:{listener.getsockname()[1]}/"
        reason = reason_of(url, private=True, max_seconds=0.3)
        assert reason == "it takes more than 0.3 seconds"
        assert time.monotonic() - began < 20


def test_proxies_of_the_environment_are_not_asked(outside, asked, monkeypatch):
    """They would look the name up themselves, unchecked."""
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert fetch(f"{outside}/a.png", 10_000) == PHOTO
