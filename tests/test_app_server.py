"""The server itself: uploads over the network, none kept on the disk, its flags and its end."""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny import picture, png, run_script
from PIL import Image

import app

ROOT = Path(__file__).parent.parent


PHOTO = png(picture(1))
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


def test_the_script_serves_until_it_is_interrupted(run):
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
        connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=60)
        connection.request("GET", "/")
        page = connection.getresponse()
        assert page.status == 200 and b"<h1>Image captioning</h1>" in page.read()
        connection.close()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (0, "", "")
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "65536"], "port 65536 must be between 0 and 65535 (0: any that is free)"),
        (["--max-mb", "0"], "max mb 0 must be above 0 and at most 1000"),
        (["--max-mb", "nan"], "max mb nan must be above 0 and at most 1000"),
        (["--at-once", "0"], "at once 0 must be at least 1"),
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
