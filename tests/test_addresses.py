"""Addresses and data: URIs, with servers on this computer alone."""

import base64
import contextlib
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest

from util import addresses
from util.addresses import decode_data_uri, fetch, is_public, shorten
from util.files import UserError

CONTENT = bytes(range(256)) * 300


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.paths.append(self.path)
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", unquote(self.path.removeprefix("/to/")))
            self.end_headers()
        elif self.path == "/drip":
            self.send_response(200)
            self.end_headers()
            while not self.server.closing.wait(0.05):
                self.wfile.write(b"x")
        elif self.path == "/headers":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            while not self.server.closing.wait(0.05):
                self.wfile.write(b"x")
        elif self.path == "/silent":
            self.server.closing.wait(20)
        elif self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            while not self.server.closing.is_set():
                self.wfile.write(b"x" * 4096)
        elif self.path in ("/photo", "/empty"):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")  # not trusted
            self.end_headers()
            self.wfile.write(CONTENT * (self.path == "/photo"))
        elif self.path == "/short":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x")
        else:
            self.send_error(404)

    def handle(self):
        with contextlib.suppress(OSError):  # the client has left
            super().handle()

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.paths, server.closing = [], threading.Event()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def public(monkeypatch):
    """Let 127.0.0.1 count as an address of the internet; 127.0.0.2 does not."""
    monkeypatch.setattr(addresses, "is_public", lambda address: address == "127.0.0.1")


def test_an_address_is_fetched(server, public):
    assert fetch(server.url + "/photo") == CONTENT
    assert fetch(server.url.replace("http", "HTTP") + "/photo#part") == CONTENT


def test_a_private_address_is_fetched_for_the_user_alone(server):
    assert fetch(server.url + "/photo", private=True) == CONTENT
    server.paths.clear()
    for host in ("127.0.0.1", "localhost", "2130706433", "0x7f.1"):
        with pytest.raises(UserError, match="is not a public address"):
            fetch(f"http://{host}:{server.server_port}/photo")
    assert server.paths == []


def test_redirects_are_followed(server, public):
    assert fetch(f"{server.url}/to/{server.url}/photo") == CONTENT
    assert fetch(f"{server.url}/to//photo") == CONTENT  # relative
    assert fetch(server.url + "/to/" * 5 + "/photo") == CONTENT
    with pytest.raises(UserError, match="more than 5 redirects"):
        fetch(server.url + "/to/" * 6 + "/photo")


@pytest.mark.parametrize("private", [False, True])
def test_no_redirect_leads_from_a_public_address_inside(server, public, private):
    inside = server.url.replace("127.0.0.1", "127.0.0.2")
    for target in (inside, "http://169.254.169.254", "http://[::1]", "file:///etc/passwd"):
        with pytest.raises(UserError, match="not a public address|not an http or https address"):
            fetch(f"{server.url}/to/{target}/photo", private=private)
    assert all(path.startswith("/to/") for path in server.paths)


def test_a_user_is_redirected_from_one_private_address_to_another(server):
    assert fetch(f"{server.url}/to/{server.url}/photo", private=True) == CONTENT


def test_a_name_that_is_resolved_to_another_address_later_gets_no_request(server, monkeypatch):
    """The check resolves the name to a public address, the connection to a private one."""
    resolve = socket.getaddrinfo
    answers = iter(["93.184.216.34"])

    def rebind(host, port, *args, **keywords):
        return resolve(next(answers, "127.0.0.1"), port, *args, **keywords)

    monkeypatch.setattr(socket, "getaddrinfo", rebind)
    with pytest.raises(UserError, match="the server is not at a public address"):
        fetch(f"http://rebound.example:{server.server_port}/photo")
    assert server.paths == []


def test_every_address_of_a_name_must_be_public(server, monkeypatch):
    resolve = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo",
        lambda host, port, **keywords: [
            *resolve("93.184.216.34", port, **keywords), *resolve("10.0.0.1", port, **keywords)
        ],
    )  # fmt: skip
    with pytest.raises(UserError, match="two.example is not a public address"):
        fetch("http://two.example/photo")


def test_a_visitor_gets_neither_proxies_nor_passwords_of_the_environment(
    server, public, monkeypatch
):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert fetch(server.url + "/photo") == CONTENT
    with pytest.raises(UserError, match="the proxy does not answer"):
        fetch(server.url + "/photo", private=True)


def test_the_size_is_bounded(server, public):
    assert fetch(server.url + "/photo", max_bytes=len(CONTENT)) == CONTENT
    with pytest.raises(UserError, match="it has more than 0.0767 MB"):
        fetch(server.url + "/photo", max_bytes=len(CONTENT) - 100)
    with pytest.raises(UserError, match="it has more than 1 MB"):
        fetch(server.url + "/endless", max_bytes=10**6)


@pytest.mark.parametrize("path", ["/drip", "/headers", "/silent"])
def test_the_time_is_bounded(server, public, path):
    start, threads = time.monotonic(), threading.active_count()
    with pytest.raises(UserError, match=rf"{path} took more than 0.5 seconds"):
        fetch(server.url + path, timeout=0.5)
    assert time.monotonic() - start < 10
    while threading.active_count() > threads + 1 and time.monotonic() - start < 10:
        time.sleep(0.05)  # the thread that fetched ends too; that of the server may still wait
    assert threading.active_count() <= threads + 1


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("{}/missing", "the server answers 404 Not Found"),
        ("{}/empty", "the answer is empty"),
        ("{}/short", "the connection broke"),
        ("http://127.0.0.1:1/photo", "the connection failed or broke"),
        ("http://no-such-name.invalid/", "no server is known by the name no-such-name.invalid"),
        ("http://127.0.0.1:99999/", "Port out of range"),
        ("http://[::1/", "Invalid IPv6 URL"),
        ("http:///photo.jpg", "names no server"),
        ("http://a\0b/", "can't be fetched"),
        ("http://" + "a" * 70 + ".com/", "no server is known"),
        ("http://..example/", "no server is known"),
        ("ftp://127.0.0.1/photo.jpg", "is not an http or https address"),
        ("https://127.0.0.1:{port}/photo", "its certificate is not valid|the connection failed"),
    ],
)
def test_what_fails_is_said_in_a_line(server, public, url, reason):
    with pytest.raises(UserError, match=reason) as error:
        fetch(url.format(server.url, port=server.server_port))
    assert "\n" not in str(error.value)


def test_a_password_is_not_repeated(server, public):
    with pytest.raises(UserError) as error:
        fetch(server.url.replace("//", "//me:secret@") + "/missing")
    assert "secret" not in str(error.value)
    assert shorten("https://me:secret@host/a@b") == "https://host/a@b"


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::", True),
        ("64:ff9b::5db8:d822", True),  # 93.184.216.34 behind NAT64
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.0.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("100.100.100.200", False),
        ("168.63.129.16", False),
        ("224.0.1.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fec0::1", False),
        ("fd00:ec2::254", False),
        ("::ffff:127.0.0.1", False),
        ("64:ff9b::a9fe:a9fe", False),  # 169.254.169.254
        ("2002:7f00:1::", False),  # 127.0.0.1 by 6to4
        ("ff02::1", False),
    ],
)
def test_which_addresses_are_public(address, public):
    assert is_public(address) is public


def test_data_uris_are_decoded():
    code = base64.b64encode(CONTENT).decode()
    assert decode_data_uri(f"data:image/png;base64,{code}") == CONTENT
    assert decode_data_uri(f"DATA:;BASE64,{code}") == CONTENT
    url_safe = code.replace("+", "-").replace("/", "_").rstrip("=")
    assert decode_data_uri(f"data:image/png;base64,{url_safe}") == CONTENT
    broken = "\n".join(code[start : start + 76] for start in range(0, len(code), 76))
    assert decode_data_uri(f"data:image/png;base64,{broken}") == CONTENT
    assert decode_data_uri(f"data:image/png;base64,{code.replace('+', '%2B')}") == CONTENT
    assert decode_data_uri("data:text/plain;charset=utf-8,a%20b,c") == b"a b,c"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("data:image/png;base64", "has the form"),
        ("data:image/png;base64,", "is empty"),
        ("data:image/png;base64,a", "is damaged"),
        ("data:image/png;base64,ab*d", "is damaged"),
        ("data:image/png;base64,äöüß", "is damaged"),
        ("data:,aaaaaaaaaaaaaaaaaaaaa", "more than 2e-05 MB"),
        ("data:;base64," + "a" * 200, "more than 2e-05 MB"),
    ],
)
def test_bad_data_uris_are_refused(text, reason):
    with pytest.raises(UserError, match=reason):
        decode_data_uri(text, max_bytes=20)


def test_short_names_stay_different():
    first, second = (shorten("data:image/png;base64," + "a" * 999 + end) for end in "bc")
    assert first != second
    assert first.startswith("data:image/png (sha256 ")
    assert len(first) < 50
    assert shorten("https://host/photo.jpg?x=1") == "https://host/photo.jpg?x=1"
    long = "https://host/" + "a" * 999
    assert shorten(long + "b") != shorten(long + "c")
    assert len(shorten(long)) <= 300
