"""Tar shards for tests: written, copied, served over HTTP, or laid out as img2dataset does."""

import contextlib
import functools
import http.server
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import features
import readers


def write(drawn: Path, folder: Path, *more: str) -> None:
    """Write the shapes dataset of `drawn` as shards of ten images."""
    features.main(["--shards", str(folder), "--dataset", "shapes", "--data-dir", str(drawn),
                   "--shard-size", "10", "--workers", "2", *more])  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def copied(written: Path, folder: Path) -> Path:
    folder.mkdir()
    for name, content in contents(written).items():
        (folder / name).write_bytes(content)
    return folder


def by_id(records) -> dict:
    return {record.image_id: (record.path.read_bytes(), record.captions) for record in records}


def listed(root: Path | str, cache_dir: Path, split: str = "train") -> list[readers.Record]:
    return list(readers.list_shards(root, split, cache_dir))


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def as_img2dataset(drawn: Path, folder: Path) -> dict:
    """Write the train split as img2dataset does, two captions in .txt alone or .json alone.

    Returns image ids → (file, captions).
    """
    folder.mkdir()
    expected, members = {}, {}
    for number, record in enumerate(readers.load_split("shapes", drawn, "train")):
        key, caption, content = f"{number:09}", record.captions[0], record.path.read_bytes()
        about = {"caption": caption, "url": "https://example.org/x.png", "key": key, "width": 96}
        members |= {f"{key}.png": content}
        if number != 4:
            members[f"{key}.txt"] = caption.encode()
        if number != 7:
            members[f"{key}.json"] = json.dumps(about).encode()
        expected[f"{number // 8:05}/{key}.png"] = (content, (caption,))
        if number % 8 == 7:
            write_tar(folder / f"{number // 8:05}.tar", members)
            (folder / f"{number // 8:05}_stats.json").write_text("{}")
            members = {}
    return expected


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Yield the address of a server of the folder's files."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
