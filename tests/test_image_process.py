"""Images of strangers are read in a process that is ended when it takes too long."""

import os
import signal
import threading
import time

import numpy as np
import pytest
from helpers.images import bytes_of, pixels
from PIL import Image

from util import image_process
from util.files import UserError
from util.image_process import ImageReader


@pytest.fixture(scope="module")
def reader():
    reader = ImageReader(seconds=60)
    yield reader
    reader.close()


def test_an_image_is_the_one_that_is_read_in_this_process(reader):
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    image = reader.read(bytes_of(Image.fromarray(noise), "PNG"), "noise.png")
    assert (image.mode, image.size) == ("RGB", (40, 30))
    assert np.array_equal(np.asarray(image), noise)


def test_a_large_jpeg_is_read_at_the_size_that_is_asked_for(reader):
    content = bytes_of(Image.effect_noise((800, 600), 90).convert("RGB"), "JPEG")
    image = reader.read(content, "noise.jpg", 64)
    assert image.size == (200, 150)
    assert np.array_equal(np.asarray(image), pixels(content, at_least=64))


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "the file is empty"), (b"text", "no image format"), (b"\xff\xd8\xff", "truncated")],
)
def test_a_bad_file_is_refused_with_its_name_and_the_process_goes_on(content, reason, reader):
    before = reader.process.pid
    with pytest.raises(UserError, match=f"фото\n.png is not an image .*{reason}"):
        reader.read(content, "фото\n.png")
    assert reader.read(bytes_of(Image.new("RGB", (3, 2)), "PNG"), "a.png").size == (3, 2)
    assert reader.process.pid == before


def test_a_slow_image_ends_its_process_and_not_the_next_image(monkeypatch):
    reader = ImageReader(seconds=0.2)
    os.kill(reader.process.pid, signal.SIGSTOP)  # it answers nobody
    began = time.monotonic()
    with pytest.raises(UserError, match=r"slow\.jpg .*it takes more than 0\.2 seconds; save it"):
        reader.read(b"\xff\xd8", "slow.jpg")
    assert time.monotonic() - began < 30
    reader.seconds = 60
    assert reader.read(bytes_of(Image.new("RGB", (3, 2)), "PNG"), "a.png").size == (3, 2)
    reader.close()


def test_a_decoder_that_crashes_ends_its_process_and_not_the_next_image(reader):
    crash = threading.Timer(0.2, lambda: os.kill(reader.process.pid, signal.SIGSEGV))
    os.kill(reader.process.pid, signal.SIGSTOP)
    crash.start()
    threading.Timer(0.3, lambda pid=reader.process.pid: os.kill(pid, signal.SIGCONT)).start()
    with pytest.raises(UserError, match=r"bad\.jpg is not an image .*\(its decoder failed\)"):
        reader.read(bytes_of(Image.new("RGB", (3, 2)), "PNG"), "bad.jpg")
    assert reader.read(bytes_of(Image.new("RGB", (3, 2)), "PNG"), "a.png").size == (3, 2)


@pytest.mark.skipif(not hasattr(signal, "alarm"), reason="the system has no such alarm")
def test_a_slow_image_ends_its_process_when_nobody_is_left_to_kill_it(tmp_path):
    """As after `kill -9` of the server."""
    reader = ImageReader(seconds=60)
    head = image_process.REQUEST.pack(10**6, 1, 0, -1.0)  # more bytes than come, 1 second
    reader.process.stdin.write(head + b"a")
    reader.process.stdin.flush()
    assert reader.process.wait(30) == -signal.SIGALRM
    reader.close()


@pytest.mark.skipif(not hasattr(signal, "alarm"), reason="the system has no such limit")
def test_memory_is_limited(monkeypatch):
    import resource

    limits = []
    monkeypatch.setattr(resource, "setrlimit", lambda *limit: limits.append(limit))
    image_process.limit_memory(123)
    assert limits == [(resource.RLIMIT_AS, (123, 123))]
