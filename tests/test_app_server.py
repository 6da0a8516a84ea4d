"""The server itself: uploads over the network, none kept on the disk, its flags and its end."""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.tiny import picture, png, run_script
from PIL import Image

import app
from util import connections

ROOT = Path(__file__).parent.parent


PHOTO = png(picture(1))
JSON = {"Content-Type": "application/json"}
watching: list[list[str]] = []


def note_writes(event, about):
    """Note each file that is opened for writing while somebody watches."""
    if event == "open" and watching and about[2] & (os.O_WRONLY | os.O_RDWR):
        watching[-1].append(str(about[0]))


@pytest.fixture(scope="module", autouse=True)
def audited():
    sys.addaudithook(note_writes)  # it stays for the process, but does nothing unless watching


@contextlib.contextmanager
def serving(application, **flags):
    """Yield the port of a real server of the application."""
    server = app.create_server(application, app.Config(port=0, **flags))

    def run():
        with contextlib.suppress(OSError):  # it is closed while it waits
            server.run()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield server.effective_port
    server.close()
    thread.join(5)


def send(port, photo):
    """Return status and body of a photo sent over the network."""
    rule = "frontier"
    head = f'--{rule}\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    body = head.encode() + photo + f"\r\n--{rule}--\r\n".encode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    kind = {"Content-Type": f"multipart/form-data; boundary={rule}"}
    connection.request("POST", "/caption", body, kind)
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_a_photo_is_never_written_to_the_disk(captioner, client):
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), dtype=np.uint8)
    photo = png(Image.fromarray(noise))
    assert len(photo) > 2_900_000  # waitress and werkzeug would move 0.5 MB into files
    with serving(client.application) as port:
        watching.append([])
        try:
            status, body = send(port, photo)
        finally:
            written = watching.pop()
    assert status == 200 and json.loads(body)["captions"]
    assert written == []


def curl_commands():
    """Return the commands of docs/app.md that ask for captions."""
    text = (ROOT / "docs/app.md").read_text(encoding="utf-8")
    return re.findall(r"^curl .*/caption.*$", text, re.MULTILINE)


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_the_commands_for_other_programs_work(captioner, tmp_path):
    application = app.create_app(captioner, fetch=lambda url, max_bytes: PHOTO)
    (tmp_path / "photo.jpg").write_bytes(PHOTO)
    assert len(curl_commands()) >= 4
    with serving(application) as port:
        for command in curl_commands():
            # Of the tiny model no caption has more than 8 words.
            command = command.replace(":8000", f":{port}").replace("max_words=12", "max_words=8")
            done = subprocess.run(
                ["bash", "-c", f"{command} --silent --noproxy '*'"],
                cwd=tmp_path, capture_output=True, text=True, timeout=60,
            )  # fmt: skip
            assert json.loads(done.stdout)["captions"][0]["words"], command


def test_a_real_upload_that_is_too_large_is_answered(captioner):
    small = app.create_app(captioner, max_mb=0.1)
    with serving(small, max_mb=0.1) as port:
        status, body = send(port, bytes(180_000))
        assert status == 413
        assert json.loads(body) == {"error": "a.png has 0.18 MB; at most 0.1 MB are taken"}
        status, body = send(port, bytes(650_000))
        assert status == 413
        assert json.loads(body)["error"].startswith("this upload has more than 0.1 MB")
        assert send(port, PHOTO)[0] == 200


def test_an_image_that_takes_too_long_is_refused_and_the_next_one_captioned(captioner, monkeypatch):
    slow = app.create_app(captioner, at_once=1, max_seconds=0.3)
    reader = slow.extensions["image_readers"][0]
    os.kill(reader.process.pid, signal.SIGSTOP)
    with serving(slow) as port:
        status, body = send(port, PHOTO)
        assert status == 400
        reason = "it takes more than 0.3 seconds; save it as an ordinary JPEG"
        assert json.loads(body) == {"error": f"a.png is not an image that can be read ({reason})"}
        reader.seconds = 60
        assert send(port, PHOTO)[0] == 200


def test_requests_that_are_half_sent_make_nobody_wait(client, monkeypatch):
    monkeypatch.setattr(app, "CONNECTIONS", 8)
    monkeypatch.setattr(connections, "PATIENCE", 3600.0)  # only a crowded server is impatient
    monkeypatch.setattr(connections, "CROWDED_PATIENCE", 0.2)
    with serving(client.application) as port, contextlib.ExitStack() as stack:
        for _ in range(20):
            half = stack.enter_context(socket.create_connection(("127.0.0.1", port), 60))
            half.sendall(b"POST /caption HTTP/1.1\r\nContent-Length: 100\r\n\r\nabc")
        began = time.monotonic()
        assert send(port, PHOTO)[0] == 200
        assert time.monotonic() - began < 40


@pytest.mark.parametrize(
    ("silent", "age", "received", "late"),
    [
        (0, 0, 0, False),
        (14, 14, 10, False),
        (16, 16, 10**7, True),  # nothing for a while
        (1, 100, 10**6, False),  # slow, but it arrives
        (1, 100, 10**5, True),  # a byte now and then
        (1, 301, 10**7, True),
        (16, None, 0, True),  # kept open for the next request, which does not come
        (14, None, 0, False),
    ],
)
def test_a_connection_is_late_if_it_is_silent_or_slow(silent, age, received, late):
    arriving = SimpleNamespace(header_bytes_received=100, body_bytes_received=received)
    connection = SimpleNamespace(
        requests=[], request=None if age is None else arriving, last_activity=1000 - silent
    )
    assert connections.is_late(connection, 1000, age or 0, connections.PATIENCE) is late
    connection.requests = ["being answered"]
    assert not connections.is_late(connection, 1000, age or 0, connections.PATIENCE)


def test_a_request_is_as_old_as_the_time_since_it_was_first_seen():
    class Request:
        header_bytes_received, body_bytes_received = 100, 0

    connection = SimpleNamespace(requests=[], request=Request(), will_close=False)
    server = SimpleNamespace(in_connection_overflow=False, active_channels={1: connection})
    began = {}
    for now, closed in ((1000, False), (1014, False), (1016, True)):
        connection.last_activity = now - 1
        connections.close_late(server, began, now)
        assert connection.will_close is closed


@contextlib.contextmanager
def running(run):
    """Yield the script as a process, and its port."""
    process = subprocess.Popen(
        [sys.executable, "app.py", "--checkpoint", str(run), "--device", "cpu", "--port", "0"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said = process.stdout.readline()
        found = re.fullmatch(r"http://127\.0\.0\.1:(\d+) \(Ctrl-C stops it\)\n", said)
        assert found, said
        yield process, int(found[1])
    finally:
        process.kill()
        process.communicate()


def test_the_script_serves_until_it_is_interrupted(run):
    with running(run) as (process, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/")
        page = connection.getresponse()
        assert page.status == 200 and b"<h1>Image captioning</h1>" in page.read()
        # Whoever asks the server to fetch an address from where it stands gets nothing from inside.
        inside = f"http://localhost:{port}/examples/cat.jpg"
        for path in ("/caption", "/fetch"):
            connection.request("POST", path, json.dumps({"url": inside}), JSON)
            answer = connection.getresponse()
            said = json.loads(answer.read())["error"]
            assert (answer.status, said) == (
                400, f"{inside} can't be fetched: localhost has no public address"
            )  # fmt: skip
        connection.close()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (0, "", "")


@pytest.mark.slow
def test_the_script_ends_while_an_image_is_being_read(run):
    with running(run) as (process, port):
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        if not children.exists():
            pytest.skip("the system does not list a process's children")
        readers = [int(reader) for reader in children.read_text().split()]
        assert len(readers) == 2
        for reader in readers:
            os.kill(reader, signal.SIGSTOP)

        def ask_in_vain():
            with contextlib.suppress(OSError, http.client.HTTPException):
                send(port, PHOTO)

        threading.Thread(target=ask_in_vain, daemon=True).start()
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=15)
        assert (process.returncode, out, err) == (0, "", "1 thread(s) still running\n")
        for reader in readers:
            with pytest.raises(ProcessLookupError):
                os.kill(reader, 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "65536"], "port 65536 must be between 0 and 65535 (0: any that is free)"),
        (["--max-mb", "0"], "max mb 0 must be above 0 and at most 1000"),
        (["--max-mb", "nan"], "max mb nan must be above 0 and at most 1000"),
        (["--at-once", "0"], "at once 0 must be at least 1"),
        (["--allow-origin", "*"], "allow origin '*' is not an origin; give scheme and host, as"),
        (["--allow-origin", "example.org"], "allow origin 'example.org' is not an origin; give"),
        (["--max-words", "9"], "max words 9 must be between 1 and the model's 8"),
        (["--host", "256.0.0.1"], "can't listen at 256.0.0.1, port 8000 ("),
        (["--checkpoint", "nowhere"], "no checkpoint at nowhere: there is no such file or folder"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_bad_flag_is_refused_in_one_line(flags, message, run, capsys):
    before = [] if "--checkpoint" in flags else ["--checkpoint", run, "--device", "cpu"]
    code, out, err = run_script(app, *before, *flags, capsys=capsys)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}") and err.count("\n") == 1


def test_a_port_that_is_taken_is_named(client, run, capsys):
    with serving(client.application) as port:
        flags = ["--checkpoint", run, "--device", "cpu", "--port", port]
        code, _, err = run_script(app, *flags, capsys=capsys)
    assert code == 2
    assert err == (
        f"error: can't listen at 127.0.0.1, port {port} (Address already in use); choose another "
        "--port or --host\n"
    )


@pytest.mark.parametrize("library", ["flask", "waitress"])
def test_a_missing_library_is_named_with_what_installs_it(library, run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    code, _, err = run_script(app, "--checkpoint", run, capsys=capsys)
    wanted = f"error: {library} is missing; install it: pip install -r requirements-app.txt\n"
    assert (code, err) == (2, wanted)
