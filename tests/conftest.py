"""What all tests share: one thread of torch, and shapes trained once for the whole run."""

import os
import signal
import threading
from pathlib import Path

import pytest
from hypothesis import settings

# Before torch is imported, and for subprocesses too: tiny models are fastest on one thread, and
# runs that are compared bit for bit must use the same number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell's background job, which a test run may be, ignores Ctrl-C, and so do its children.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples each time, and no folder left behind; "long" looks for new ones.
settings.register_profile("short", max_examples=40, deadline=None, derandomize=True, database=None)
settings.register_profile("long", max_examples=4000, deadline=None, database=None)
settings.load_profile("short")


@pytest.fixture(autouse=True)
def idle(monkeypatch):
    """The machine is never said to be overloaded, whatever else runs on it."""
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0), raising=False)


@pytest.fixture(scope="session")
def drawn(tmp_path_factory) -> Path:
    """Return a folder of few drawings, for runs that need not learn anything."""
    from util import shapes

    return shapes.draw(tmp_path_factory.mktemp("drawn"), train=24, val=8, test=8)


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """Return a run's folder with a tiny untrained model."""
    from helpers.tiny import tiny_model  # imports torch, which must see the threads set above

    folder = tmp_path_factory.mktemp("run")
    tiny_model().save(folder / "best.safetensors")
    return folder


@pytest.fixture(scope="module")
def captioner(run):
    """Return that model, ready to caption."""
    from inference import Captioner

    return Captioner.load(run, "cpu")


@pytest.fixture(scope="module")
def client(captioner):
    """Return what asks the web page's server."""
    import app

    return app.create_app(captioner).test_client()


# --- a server in place of the download mirrors


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def mirror(root, monkeypatch):
    """Serve `mirrors.Mirror` on 127.0.0.1, and wait for nothing between attempts."""
    from helpers.mirrors import Mirror

    import download_data

    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr(download_data, "PAUSE", 0.0)
    mirror = Mirror(root)
    threading.Thread(target=mirror.server.serve_forever, args=(0.02,), daemon=True).start()
    yield mirror
    mirror.over.set()
    mirror.server.shutdown()
    mirror.server.server_close()


@pytest.fixture
def offered(mirror, monkeypatch):
    from helpers.mirrors import put

    return put(monkeypatch, mirror)
