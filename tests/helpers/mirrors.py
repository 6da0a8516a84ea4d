"""A server on 127.0.0.1 that stands in for the download mirrors, with the faults real ones have."""

import hashlib
import io
import random
import signal
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import download_data
from util import program

PHOTO = random.Random(0).randbytes(600_000)  # several chunks, and zip can't shrink it
PHOTOS = {"Flicker8k_Dataset/1.jpg": PHOTO, "Flicker8k_Dataset/2.jpg": b"second"}
TEXTS = {"Flickr8k.token.txt": b"1.jpg#0\tA dog .\n", "readme.txt": b"about"}


def zipped(members):
    """Return the bytes of a zip archive of {name or ZipInfo: bytes}."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def md5(content):
    return hashlib.md5(content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        mirror = self.server.mirror
        asked = self.headers.get("Range")
        mirror.requests.append((self.path, asked))
        faults = mirror.faults.get(self.path, [])
        fault = faults.pop(0) if faults else ""
        content = mirror.contents.get(self.path)
        if content is None or fault.isdigit():
            return self.send_error(int(fault or 404))
        if fault == "redirects":
            return self.redirect()
        if fault == "page":
            return self.answer(200, b"<html>please log in</html>", "Content-Type: text/html")
        if fault == "endless":
            return self.endless()
        start = int(asked[6:-1]) if asked and fault != "ignores ranges" else 0
        if start and start >= len(content):
            return self.send_error(416)
        self.send(fault, content, start)

    def send(self, fault, content, start):
        """Send the content from `start`, with a fault."""
        first = start + 50 * (fault == "elsewhere")
        length = len(content) - start + {"says more": 100, "says less": -100}.get(fault, 0)
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(length))
        self.end_headers()
        half = (start + len(content)) // 2
        if fault.startswith("breaks at"):
            half = start + int(fault.split()[-1])
        self.wfile.write(content[start:half])
        if fault.startswith("breaks"):
            return
        if fault == "is slow":
            time.sleep(1)
        if fault == "stalls":
            self.server.mirror.over.wait(20)
            return
        if fault == "is interrupted":
            self.server.mirror.interrupt()
            return
        self.wfile.write(content[half:])

    def redirect(self):
        """Send the asker here again."""
        self.answer(302, b"", f"Location: {self.path}")

    def answer(self, status, content, *headers):
        self.send_response(status)
        for header in headers:
            self.send_header(*header.split(": "))
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def endless(self):
        """Send zeros, without a length, as long as somebody listens."""
        self.send_response(200)
        self.end_headers()
        while not self.server.mirror.over.is_set():
            self.wfile.write(bytes(1 << 16))

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, *_):
        """Let an asker that hangs up in the middle of an answer pass: that is what it should do."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(*_)


class Mirror:
    """Mirrors of every archive under /one/NAME and /two/NAME, and all they were asked."""

    def __init__(self, root):
        self.contents, self.faults, self.requests = {}, {}, []
        self.root = root
        self.over = threading.Event()  # the test
        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.mirror = self
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def offer(self, name, content, folder):
        """Put the content on both mirrors and return its row of the table."""
        mirrors = (f"{self.address}/one/", f"{self.address}/two/")
        for path in (f"/one/{name}", f"/two/{name}"):
            self.contents[path] = content
        return download_data.File(name, md5(content), len(content), folder, mirrors)

    def interrupt(self):
        """Press Ctrl-C once some of this answer is on the disk, and stall."""
        deadline = time.monotonic() + 60
        while not any(part.stat().st_size for part in self.root.rglob("*Dataset.zip.part")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.3)


def put(monkeypatch, mirror, texts=TEXTS, photos=PHOTOS):
    """Let the table's flickr8k be these files on the local mirrors."""
    rows = (
        mirror.offer("Flickr8k_text.zip", zipped(texts), "Flickr8k_text"),
        mirror.offer("Flickr8k_Dataset.zip", zipped(photos), "Flicker8k_Dataset"),
    )
    monkeypatch.setitem(download_data.DATASETS, "flickr8k", rows)
    return rows


def get(root, *flags):
    download_data.main(["--root", str(root), *flags])


def error_of(root, capsys, *flags):
    """Return the one line that the script leaves on stderr with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        program.run(lambda: get(root, *flags))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert len(lines) == 1
    return lines[0]


def tree(folder):
    """Return {relative path: bytes} of all files in the folder, without the script's own."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".lock" and path.name != download_data.MARKER
    }


COMPLETE = {
    "flickr8k/Flicker8k_Dataset/1.jpg": PHOTO,
    "flickr8k/Flicker8k_Dataset/2.jpg": b"second",
    "flickr8k/Flickr8k_text/Flickr8k.token.txt": TEXTS["Flickr8k.token.txt"],
    "flickr8k/Flickr8k_text/readme.txt": TEXTS["readme.txt"],
}


def asked_for(mirror, name="Flickr8k_Dataset.zip"):
    return [(path.split("/")[1], asked) for path, asked in mirror.requests if path.endswith(name)]
