"""A server on 127.0.0.1 stands in for the mirrors, with the faults that real ones have."""

import dataclasses
import hashlib
import io
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import download_data
import files

REPOSITORY = Path(__file__).parents[1]
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
        start = int(asked[6:-1]) if asked and fault != "ignores ranges" else 0
        if start and start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        half = (start + len(content)) // 2
        self.wfile.write(content[start:half])
        if fault == "breaks":
            return None
        if fault == "is slow":
            time.sleep(1)
        if fault == "is interrupted":
            return mirror.interrupt()
        self.wfile.write(content[half:])

    def log_message(self, *_):
        pass


class Mirror:
    """Mirrors of every archive under /one/NAME and /two/NAME, and all they were asked."""

    def __init__(self, root):
        self.contents, self.faults, self.requests = {}, {}, []
        self.root = root
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
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
        deadline = time.monotonic() + 5
        while not any(part.stat().st_size for part in self.root.rglob("*Dataset.zip.part")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.3)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "data"


@pytest.fixture
def mirror(root, monkeypatch):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr(download_data, "PAUSE", 0.0)
    mirror = Mirror(root)
    threading.Thread(target=mirror.server.serve_forever, args=(0.02,), daemon=True).start()
    yield mirror
    mirror.server.shutdown()
    mirror.server.server_close()


def put(monkeypatch, mirror, texts=TEXTS, photos=PHOTOS):
    """Let the table's flickr8k be these files on the local mirrors."""
    rows = (
        mirror.offer("Flickr8k_text.zip", zipped(texts), "Flickr8k_text"),
        mirror.offer("Flickr8k_Dataset.zip", zipped(photos), "Flicker8k_Dataset"),
    )
    monkeypatch.setitem(download_data.DATASETS, "flickr8k", rows)
    return rows


@pytest.fixture
def offered(mirror, monkeypatch):
    return put(monkeypatch, mirror)


def get(root, *flags):
    download_data.main(["--root", str(root), *flags])


def error_of(root, capsys, *flags):
    """Return the one line that the script leaves on stderr with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        files.run(lambda: get(root, *flags))
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


# What is unpacked, and where


def test_the_dataset_lands_in_the_official_layout_and_nothing_else_remains(
    root, mirror, offered, capsys
):
    get(root)
    assert tree(root) == COMPLETE
    assert not list(root.glob("flickr8k/.unpacking*"))
    assert not (root / "flickr8k/archives").exists()
    assert "B to download" in capsys.readouterr().out


@pytest.mark.parametrize("top", ["", "Flickr8k_text/"])
@pytest.mark.parametrize("mac", [False, True])
def test_the_same_layout_comes_of_archives_with_and_without_folder_and_mac_files(
    top, mac, root, mirror, monkeypatch
):
    texts = {top + name: content for name, content in TEXTS.items()}
    photos = {"Flicker8k_Dataset/": b"", **PHOTOS}
    if mac:
        texts["__MACOSX/._Flickr8k.token.txt"] = b"resource fork"
        photos["__MACOSX/Flicker8k_Dataset/._1.jpg"] = b"resource fork"
    put(monkeypatch, mirror, texts, photos)
    get(root)
    assert tree(root) == COMPLETE


def test_a_second_run_asks_nothing_changes_nothing_and_says_so_in_one_line(
    root, mirror, offered, capsys
):
    get(root)
    asked, before = len(mirror.requests), {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    capsys.readouterr()
    get(root)
    said = capsys.readouterr()
    assert len(mirror.requests) == asked
    after = {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.suffix != ".lock"}
    assert after.items() <= before.items()
    assert said.out == f"{root / 'flickr8k'} is complete, nothing to do\n"
    assert said.err == ""


def test_only_the_part_that_is_gone_is_downloaded_again(root, mirror, offered):
    get(root)
    shutil.rmtree(root / "flickr8k/Flickr8k_text")
    mirror.requests.clear()
    get(root)
    assert mirror.requests == [("/one/Flickr8k_text.zip", None)]
    assert tree(root) == COMPLETE


def test_a_folder_that_the_user_filled_is_left_as_it_is(root, mirror, offered, capsys):
    own = root / "flickr8k/Flicker8k_Dataset/own.jpg"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"own")
    get(root)
    assert os.listdir(own.parent) == ["own.jpg"]
    assert asked_for(mirror) == []
    assert "left as it is" in capsys.readouterr().out


def test_downloaded_archives_are_kept_when_asked_and_then_used(root, mirror, offered):
    get(root, "--keep-archives")
    kept = {path.name: md5(path.read_bytes()) for path in root.glob("flickr8k/archives/*")}
    assert kept == {file.name: file.md5 for file in offered}
    shutil.rmtree(root / "flickr8k/Flicker8k_Dataset")
    mirror.requests.clear()
    get(root, "--keep-archives")
    assert mirror.requests == []
    assert len(tree(root)) == len(COMPLETE) + 2


def test_an_archive_left_by_a_run_killed_before_it_could_remove_it_is_removed(
    root, mirror, offered, capsys
):
    get(root, "--keep-archives")
    left = root / "flickr8k/archives"
    (left / "Flickr8k_Dataset.zip.part").write_bytes(b"")
    get(root, "--keep-archives")
    assert sorted(os.listdir(left)) == sorted(file.name for file in offered)
    capsys.readouterr()
    get(root)
    assert capsys.readouterr().out == f"{root / 'flickr8k'} is complete, nothing to do\n"
    assert tree(root) == COMPLETE
    assert not left.exists()


def test_an_archive_beside_a_folder_that_the_user_filled_is_not_removed(root, mirror, offered):
    get(root, "--keep-archives")
    (root / "flickr8k/Flickr8k_text" / download_data.MARKER).unlink()
    get(root)
    assert os.listdir(root / "flickr8k/archives") == ["Flickr8k_text.zip"]


# Datasets of many parts, and the question before a large one

COCO = {  # part: archive, members, whether it is a usual part
    "karpathy": ("caption_datasets.zip", {"dataset_coco.json": b"{}"}, True),
    "annotations2014": (
        "annotations_trainval2014.zip",
        {"annotations/captions_train2014.json": b"14", "annotations/captions_val2014.json": b"v"},
        True,
    ),
    "train2014": ("train2014.zip", {"train2014/COCO_train2014_000000000009.jpg": PHOTO}, True),
    "annotations2017": (
        "annotations_trainval2017.zip",
        {"annotations/captions_train2017.json": b"17"},
        False,
    ),
}
USUAL = {
    "coco/annotations2014/captions_train2014.json": b"14",
    "coco/annotations2014/captions_val2014.json": b"v",
    "coco/karpathy/dataset_coco.json": b"{}",
    "coco/train2014/COCO_train2014_000000000009.jpg": PHOTO,
}


@pytest.fixture
def coco(mirror, monkeypatch):
    """Let the table's coco be these small archives; what is over 0.1 MB is asked for."""
    rows = {
        part: dataclasses.replace(mirror.offer(name, zipped(members), part), usual=usual)
        for part, (name, members, usual) in COCO.items()
    }
    monkeypatch.setitem(download_data.DATASETS, "coco", tuple(rows.values()))
    monkeypatch.setattr(download_data, "ASK", 1e5)
    return rows


def answer(monkeypatch, said):
    """Sit at a terminal and say this."""
    terminal = io.StringIO(said)
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)


def test_the_usual_parts_land_in_folders_of_their_own(root, coco):
    get(root, "coco", "--yes")
    assert tree(root) == USUAL


def test_parts_are_fetched_one_by_one_and_side_by_side(root, mirror, coco):
    get(root, "coco", "--parts", "annotations2014")
    assert [path for path, _ in mirror.requests] == ["/one/annotations_trainval2014.zip"]
    get(root, "coco", "--parts", "annotations2017", "annotations2014")
    assert [path for path, _ in mirror.requests[1:]] == ["/one/annotations_trainval2017.zip"]
    get(root, "coco", "--yes")
    assert tree(root) == {**USUAL, "coco/annotations2017/captions_train2017.json": b"17"}
    assert len(mirror.requests) == 4


def test_archives_of_other_parts_are_left_alone(root, mirror, coco):
    get(root, "coco", "--parts", "karpathy", "--keep-archives")
    get(root, "coco", "--parts", "annotations2014")
    assert os.listdir(root / "coco/archives") == ["caption_datasets.zip"]


@pytest.mark.parametrize(
    ("dataset", "choices"),
    [
        ("coco", "karpathy, annotations2014, train2014, annotations2017"),
        ("flickr8k", "Flickr8k_text, Flicker8k_Dataset"),
        ("shapes", "none"),
    ],
)
def test_a_part_that_is_not_known_is_one_line_with_the_choices(
    dataset, choices, root, coco, capsys
):
    line = error_of(root, capsys, dataset, "--parts", "test2014")
    assert line == f"error: {dataset} has no part 'test2014'; parts: {choices}"
    assert not root.exists()


@pytest.mark.parametrize("said", ["y\n", "Yes\n"])
def test_a_large_download_is_asked_for_on_a_terminal(said, root, coco, monkeypatch, capsys):
    answer(monkeypatch, said)
    get(root, "coco")
    assert tree(root) == USUAL
    assert "download 0.6 MB? [y/N] " in capsys.readouterr().out


@pytest.mark.parametrize("said", ["n\n", "\n", "", "yesterday\n"])
def test_all_but_a_yes_downloads_nothing(said, root, mirror, coco, monkeypatch, capsys):
    answer(monkeypatch, said)
    assert "nothing was downloaded" in error_of(root, capsys, "coco")
    assert mirror.requests == [] and tree(root) == {}


def test_a_large_download_with_nobody_to_ask_wants_the_flag(root, mirror, coco, capsys):
    line = error_of(root, capsys, "coco")
    assert "0.6 MB" in line and "--yes" in line
    assert mirror.requests == [] and tree(root) == {}


def test_what_is_at_hand_or_here_is_not_asked_for(root, tmp_path, mirror, coco):
    (tmp_path / "train2014.zip").write_bytes(mirror.contents["/one/train2014.zip"])
    get(root, "coco", "--archives", str(tmp_path))
    assert tree(root) == USUAL
    get(root, "coco")


def test_a_download_that_broke_near_its_end_is_continued_without_a_question(root, mirror, coco):
    part = root / "coco/archives/train2014.zip.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(mirror.contents["/one/train2014.zip"][:550_000])
    get(root, "coco")
    assert asked_for(mirror, "train2014.zip") == [("one", "bytes=550000-")]
    assert tree(root) == USUAL


def test_sizes_and_what_is_here_are_shown_before_the_question(root, coco, monkeypatch, capsys):
    get(root, "coco", "--parts", "karpathy")
    capsys.readouterr()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9e9, 0, 8.1e9))
    with pytest.raises(ValueError, match="--yes"):
        get(root, "coco")
    assert capsys.readouterr().out.splitlines() == [
        "karpathy            0.0 MB  is here",
        "annotations2014     0.0 MB  0.0 MB to download",
        "train2014           0.6 MB  0.6 MB to download",
        "0.6 MB to download, 0.6 MB unpacked, 8.1 GB free",
    ]


def test_flickr30k_is_its_captions_and_a_line_on_the_images(root, mirror, monkeypatch, capsys):
    row = mirror.offer(
        "caption_datasets.zip", zipped({"dataset_flickr30k.json": b"{}"}), "karpathy"
    )
    monkeypatch.setitem(download_data.DATASETS, "flickr30k", (row,))
    get(root, "flickr30k")
    assert tree(root) == {"flickr30k/karpathy/dataset_flickr30k.json": b"{}"}
    last = capsys.readouterr().out.splitlines()[-1]
    assert "https://shannon.cs.illinois.edu/DenotationGraph/" in last
    assert str(root / "flickr30k/flickr30k-images") in last


def test_help_shows_every_part_and_its_size(capsys):
    with pytest.raises(SystemExit):
        download_data.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "coco train2014 *: 13.5 GB" in said and "coco train2017: 19.3 GB" in said
    for dataset, rows in download_data.DATASETS.items():
        assert all(f"{dataset} {row.folder}" in said and row.about in said for row in rows)


def test_the_usual_parts_of_coco_are_those_of_2014_and_20_gb():
    usual = download_data.choose("coco", ())
    names = {row.folder for row in usual}
    assert names == {"train2014", "val2014", "annotations2014", "karpathy"}
    assert download_data.in_units(sum(row.size for row in usual)) == "20.4 GB"


# Downloads through faults


def test_a_broken_download_is_continued_where_it_stopped(root, mirror, offered):
    mirror.faults["/one/Flickr8k_Dataset.zip"] = ["breaks"]
    get(root)
    (_, first), (again, rest) = asked_for(mirror)
    size = offered[1].size
    assert first is None and again == "one"
    # All but the chunk in which the connection broke is kept.
    assert size // 2 - download_data.CHUNK <= int(rest[6:-1]) <= size // 2
    assert tree(root) == COMPLETE


def test_a_server_that_ignores_ranges_is_read_from_the_start(root, mirror, offered):
    mirror.faults["/one/Flickr8k_Dataset.zip"] = ["breaks", "ignores ranges"]
    get(root)
    assert len(asked_for(mirror)) == 2
    assert tree(root) == COMPLETE


def test_a_connection_that_keeps_breaking_ends_as_long_as_it_brings_something(
    root, mirror, offered, monkeypatch
):
    monkeypatch.setattr(download_data, "CHUNK", 100)
    mirror.faults["/one/Flickr8k_Dataset.zip"] = ["breaks"] * (download_data.ATTEMPTS + 3)
    get(root)
    assert len(asked_for(mirror)) == download_data.ATTEMPTS + 4
    assert tree(root) == COMPLETE


def test_a_file_that_changed_between_two_pieces_is_downloaded_anew(root, mirror, offered):
    part = root / "flickr8k/archives/Flickr8k_Dataset.zip.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"of another version")
    get(root)
    assert asked_for(mirror) == [("one", "bytes=18-"), ("one", None)]
    assert tree(root) == COMPLETE


@pytest.mark.parametrize("extra", [b"", b"too much"])
def test_a_part_as_long_as_the_file_or_longer_is_judged_by_its_checksum(
    extra, root, mirror, offered
):
    part = root / "flickr8k/archives/Flickr8k_Dataset.zip.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(mirror.contents["/one/Flickr8k_Dataset.zip"] + extra)
    get(root)
    length = offered[1].size + len(extra)
    fresh = [("one", None)] if extra else []
    assert asked_for(mirror) == [("one", f"bytes={length}-"), *fresh]
    assert tree(root) == COMPLETE


def test_ctrl_c_leaves_a_part_that_the_next_run_continues(root, mirror, offered, capsys):
    mirror.faults["/one/Flickr8k_Dataset.zip"] = ["is interrupted"]
    with pytest.raises(SystemExit) as stop:
        files.run(lambda: get(root))
    assert stop.value.code == 130
    assert "Traceback" not in capsys.readouterr().err
    have = (root / "flickr8k/archives/Flickr8k_Dataset.zip.part").stat().st_size
    assert have > 0
    get(root)
    assert asked_for(mirror) == [("one", None), ("one", f"bytes={have}-")]
    assert tree(root) == COMPLETE


def test_a_missing_file_goes_to_the_next_mirror_at_once(root, mirror, offered):
    del mirror.contents["/one/Flickr8k_Dataset.zip"]
    get(root)
    assert asked_for(mirror) == [("one", None), ("two", None)]
    assert tree(root) == COMPLETE


def test_a_server_in_trouble_is_asked_again_before_the_next_mirror(root, mirror, offered):
    mirror.faults["/one/Flickr8k_Dataset.zip"] = ["503"] * 9
    get(root)
    assert asked_for(mirror) == [("one", None)] * download_data.ATTEMPTS + [("two", None)]
    assert tree(root) == COMPLETE


def test_wrong_bytes_are_thrown_away_and_come_from_the_next_mirror(root, mirror, offered):
    mirror.contents["/one/Flickr8k_Dataset.zip"] = b"<html>please log in</html>"
    get(root)
    assert asked_for(mirror) == [("one", None), ("two", None)]
    assert tree(root) == COMPLETE


def test_a_piece_of_a_dead_mirror_is_continued_at_the_next(root, mirror, offered):
    mirror.faults["/one/Flickr8k_Dataset.zip"] = ["breaks", "404"]
    get(root)
    assert [who for who, _ in asked_for(mirror)] == ["one", "one", "two"]
    ranges = [asked for _, asked in asked_for(mirror)]
    assert ranges[0] is None and ranges[1] == ranges[2] != "bytes=0-"
    assert tree(root) == COMPLETE


def test_dead_mirrors_end_in_one_line_that_says_what_is_wanted_and_where_to_put_it(
    root, mirror, offered, capsys
):
    mirror.contents["/one/Flickr8k_Dataset.zip"] = b"wrong"
    del mirror.contents["/two/Flickr8k_Dataset.zip"]
    line = error_of(root, capsys)
    for part in (
        "Flickr8k_Dataset.zip could not be downloaded",
        f"{mirror.address}/one/Flickr8k_Dataset.zip (MD5 {offered[1].md5} expected, "
        f"{md5(b'wrong')} found)",
        f"{mirror.address}/two/Flickr8k_Dataset.zip (HTTP 404)",
        "--archives DIR",
    ):
        assert part in line
    assert not (root / "flickr8k/Flicker8k_Dataset").exists()


def test_a_network_that_is_down_is_one_line_too(root, mirror, offered, capsys):
    mirror.server.server_close()
    assert "(ConnectionError)" in error_of(root, capsys)


def test_a_disk_that_is_too_small_is_noticed_before_the_download(
    root, mirror, offered, monkeypatch, capsys
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    assert "too little disk space" in error_of(root, capsys)
    assert mirror.requests == []


def test_fetch_alone_returns_the_verified_file(tmp_path, mirror, offered):
    path = download_data.fetch(offered[0], tmp_path / "new")
    assert path == tmp_path / "new/Flickr8k_text.zip"
    assert md5(path.read_bytes()) == offered[0].md5
    assert download_data.fetch(offered[0], tmp_path / "new") == path
    assert len(mirror.requests) == 1


# Archives at hand


@pytest.fixture
def at_hand(tmp_path, mirror, offered):
    folder = tmp_path / "at hand"
    folder.mkdir()
    for file in offered:
        (folder / file.name).write_bytes(mirror.contents[f"/one/{file.name}"])
    return folder


def test_archives_at_hand_need_no_request_and_stay_as_they_are(root, mirror, at_hand):
    before = tree(at_hand)
    get(root, "--archives", str(at_hand))
    assert mirror.requests == []
    assert tree(root) == COMPLETE
    assert tree(at_hand) == before


def test_a_part_that_archives_at_hand_make_needless_is_removed(root, mirror, at_hand):
    part = root / "flickr8k/archives/Flickr8k_Dataset.zip.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(PHOTO[:1000])
    get(root, "--archives", str(at_hand))
    assert mirror.requests == []
    assert tree(root) == COMPLETE


def test_archives_at_hand_in_the_download_folder_stay_too(root, mirror, at_hand):
    own = root / "flickr8k/archives"
    shutil.copytree(at_hand, own)
    for _ in range(2):
        get(root, "--archives", str(own))
        assert tree(own) == tree(at_hand)


def test_what_is_not_at_hand_is_downloaded(root, mirror, at_hand):
    (at_hand / "Flickr8k_text.zip").unlink()
    get(root, "--archives", str(at_hand))
    assert mirror.requests == [("/one/Flickr8k_text.zip", None)]
    assert tree(root) == COMPLETE


def test_a_wrong_archive_at_hand_is_refused_with_both_checksums(
    root, mirror, offered, at_hand, capsys
):
    wrong = at_hand / "Flickr8k_Dataset.zip"
    wrong.write_bytes(b"cut short")
    line = error_of(root, capsys, "--archives", str(at_hand))
    assert str(wrong) in line
    assert f"MD5 {offered[1].md5} expected, {md5(b'cut short')} found" in line
    assert wrong.read_bytes() == b"cut short"
    assert mirror.requests == [] and tree(root) == {}


def test_an_archives_folder_that_is_not_there_is_named(root, mirror, offered, tmp_path, capsys):
    line = error_of(root, capsys, "--archives", str(tmp_path / "nowhere"))
    assert f"--archives {tmp_path / 'nowhere'} is not a folder" in line


# Archives that mean harm, and interrupted unpacking


def link(name):
    entry = zipfile.ZipInfo(name)
    entry.create_system = 3  # Unix, where links are
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return entry


@pytest.mark.parametrize(
    "name",
    [
        "../outside.txt",
        "Flickr8k_text/../../outside.txt",
        "{tmp}/outside.txt",
        "//outside.txt",
        "..\\outside.txt",
        "\\outside.txt",
        "C:/outside.txt",
        "C:outside.txt",
        "C:\\outside.txt",
        "link",
    ],
)
def test_an_archive_that_could_write_outside_its_folder_writes_nothing(
    name, root, mirror, monkeypatch, tmp_path, capsys
):
    name = name.format(tmp=tmp_path)
    evil = {link("link"): "../..", "link/outside.txt": b"evil"} if name == "link" else {name: b"!"}
    rows = put(monkeypatch, mirror, texts={**TEXTS, **evil})
    line = error_of(root, capsys)
    assert repr(name) in line and "is refused" in line
    assert list(tree(tmp_path)) == [f"data/flickr8k/archives/{rows[0].name}"]
    assert not Path("/outside.txt").exists()


def test_unpacking_that_fails_leaves_nothing_and_is_redone_without_a_download(
    root, mirror, offered, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        real = shutil.copyfileobj

        def full_disk(source, out):
            if source.name.endswith("2.jpg"):
                raise OSError(28, "No space left on device", out.name)
            real(source, out)

        patch.setattr(shutil, "copyfileobj", full_disk)
        assert "No space left on device" in error_of(root, capsys)
    assert not [path for path in root.rglob("*") if "Flicker8k" in path.name]
    mirror.requests.clear()
    get(root)
    assert mirror.requests == []
    assert tree(root) == COMPLETE


WORKER = """
import sys, download_data, files
{patch}
rows = tuple(download_data.File(*row[:4], tuple(row[4])) for row in {rows!r})
download_data.DATASETS["flickr8k"] = rows
files.run(lambda: download_data.main(["--root", sys.argv[1]]))
"""
DIES = """
import os, shutil
def die(source, out):
    if source.name.endswith("2.jpg"):
        os.kill(os.getpid(), 9)
    out.write(source.read())
shutil.copyfileobj = die
"""


def start(root, rows, patch=""):
    rows = [(row.name, row.md5, row.size, row.folder, list(row.mirrors)) for row in rows]
    command = [sys.executable, "-c", WORKER.format(rows=rows, patch=patch), str(root)]
    return subprocess.Popen(
        command, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def test_unpacking_that_is_killed_does_not_look_complete_and_is_redone(root, mirror, offered):
    process = start(root, offered, patch=DIES)
    assert process.wait(20) == -signal.SIGKILL, process.stdout.read()
    process.stdout.close()
    assert not (root / "flickr8k/Flicker8k_Dataset").exists()
    left = root / "flickr8k/.unpacking-Flicker8k_Dataset"
    (left / "1.jpg").rename(left / "of another archive.jpg")
    get(root)
    assert tree(root) == COMPLETE
    assert not list(root.glob("flickr8k/.unpacking*"))


def test_two_processes_at_once_download_once(root, mirror, offered):
    mirror.faults["/one/Flickr8k_text.zip"] = ["is slow"] * 2  # so that the two do overlap
    processes = [start(root, offered) for _ in range(2)]
    said = sorted(process.communicate(timeout=20)[0].splitlines()[-1] for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert said == [
        f"{root / 'flickr8k'} is complete, nothing to do",
        f"{root / 'flickr8k'} is ready",
    ]
    assert len(mirror.requests) == 2
    assert tree(root) == COMPLETE


# The table and the other dataset


def test_every_archive_has_mirrors_a_checksum_and_a_folder_of_its_own():
    for rows in download_data.DATASETS.values():
        assert len({row.folder for row in rows}) == len(rows)
        for row in rows:
            assert len(row.md5) == 32 and row.size > 0 and row.about
            assert row.mirrors and all(mirror.endswith("/") for mirror in row.mirrors)


def test_the_marker_names_the_archive_and_its_checksum(root, mirror, offered):
    get(root)
    for row in offered:
        marker = root / "flickr8k" / row.folder / download_data.MARKER
        assert json.loads(marker.read_text()) == {"archive": row.name, "md5": row.md5}


def test_a_dataset_that_is_not_known_is_one_line_with_the_choices(root, capsys):
    line = error_of(root, capsys, "flicker8k")
    assert "flicker8k" in line and "flickr8k" in line and "shapes" in line


def test_shapes_are_drawn_once(root, monkeypatch, capsys):
    shapes = pytest.importorskip("shapes")
    drawn = []

    def draw(folder, **_):
        drawn.append(folder)
        folder.mkdir(parents=True)

    monkeypatch.setattr(shapes, "draw", draw)
    monkeypatch.setattr(shapes, "is_drawn", Path.is_dir)
    get(root, "shapes")
    get(root, "shapes")
    assert drawn == [root / "shapes"]
    assert "nothing to do" in capsys.readouterr().out
