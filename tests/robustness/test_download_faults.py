"""Mirrors that break off, stall and lie, and archives that mean harm: all or nothing lands."""

import io
import random
import shutil
import signal
import stat
import struct
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.mirrors import (
    COMPLETE,
    PHOTOS,
    TEXTS,
    asked_for,
    error_of,
    get,
    md5,
    put,
    tree,
    zipped,
)

import download_data
from util import program

REPOSITORY = Path(__file__).parents[2]

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
        program.run(lambda: get(root))
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


FAULTS = ["429", "500", "stalls", "redirects", "page", "says less", "elsewhere", "endless"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mirror_that_never_gives_the_file_is_left_for_the_next(
    fault, root, mirror, offered, monkeypatch
):
    if fault == "stalls":
        monkeypatch.setattr(download_data, "TIMEOUT", (5, 0.2))
    mirror.faults["/one/Flickr8k_Dataset.zip"] = [fault] * 999
    get(root)
    asked = [who for who, _ in asked_for(mirror)]
    assert asked[0] == "one" and asked[-1] == "two"
    # requests follows 30 redirections before it calls them too many.
    assert len(asked) <= 1 + download_data.ATTEMPTS * (31 if fault == "redirects" else 4)
    assert tree(root) == COMPLETE


@pytest.mark.parametrize("fault", FAULTS)
def test_mirrors_that_never_give_the_file_end_in_one_line_and_no_dataset(
    fault, root, mirror, offered, monkeypatch, capsys
):
    if fault == "stalls":
        monkeypatch.setattr(download_data, "TIMEOUT", (5, 0.2))
    for mirrored in ("one", "two"):
        mirror.faults[f"/{mirrored}/Flickr8k_text.zip"] = [fault] * 999
    line = error_of(root, capsys)
    assert "Flickr8k_text.zip could not be downloaded" in line and "--archives DIR" in line
    assert {"500": "HTTP 500", "429": "HTTP 429", "redirects": "TooManyRedirects",
            "page": "a page of HTML", "endless": "bytes came"}.get(fault, "") in line  # fmt: skip
    assert set(tree(root)) <= {"flickr8k/archives/Flickr8k_text.zip.part"}
    mirror.faults.clear()
    get(root)
    assert tree(root) == COMPLETE


@pytest.mark.parametrize("seed", range(10))
def test_connections_that_break_at_random_bytes_bring_the_file(seed, root, mirror, offered):
    chance = random.Random(seed)
    size = offered[1].size
    mirror.faults["/one/Flickr8k_Dataset.zip"] = [
        f"breaks at {chance.randrange(size)}" for _ in range(chance.randrange(1, 9))
    ]
    get(root)
    assert tree(root) == COMPLETE


def test_a_length_that_is_too_long_costs_one_more_question(root, mirror, offered):
    mirror.faults["/one/Flickr8k_text.zip"] = ["says more"]
    get(root)
    assert len(asked_for(mirror, "Flickr8k_text.zip")) == 2
    assert tree(root) == COMPLETE


def test_a_page_in_place_of_the_archive_does_not_cost_what_came_before(root, mirror, offered):
    part = root / "flickr8k/archives/Flickr8k_Dataset.zip.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(mirror.contents["/one/Flickr8k_Dataset.zip"][:550_000])
    mirror.faults["/one/Flickr8k_Dataset.zip"] = ["page"]
    get(root)
    assert asked_for(mirror) == [("one", "bytes=550000-"), ("two", "bytes=550000-")]
    assert tree(root) == COMPLETE


def test_pauses_between_attempts_double(root, mirror, offered, monkeypatch):
    pauses = []
    monkeypatch.setattr(download_data, "PAUSE", 1.0)
    monkeypatch.setattr(download_data, "time", SimpleNamespace(sleep=pauses.append))
    mirror.faults["/one/Flickr8k_Dataset.zip"] = ["503"] * 9
    get(root)
    assert pauses == [2.0, 4.0]


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


def packed(*members, method=zipfile.ZIP_DEFLATED):
    """Return the bytes of a zip archive of (name, bytes) pairs, names twice if they come so."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", method) as archive:
        warnings.simplefilter("ignore")
        for member in members:
            archive.writestr(*member)
    return buffer.getvalue()


def marked(content, local, central, value):
    """Return the archive with 16 bits of its first file's two headers changed."""
    content = bytearray(content)
    for start, offset in ((0, local), (content.index(b"PK\x01\x02"), central)):
        struct.pack_into("<H", content, start + offset, value)
    return bytes(content)


ZEROS = packed(("a.txt", bytes(10_000_000)))
ONE = packed(("a.txt", b"text"))
HARMFUL = {
    "a bomb": (ZEROS, "is refused: 1 files of 10.0 MB in 0.0 MB are no dataset"),
    # The sizes said are of 32 bits; their upper half becomes nothing.
    "a bomb that says it is small": (marked(ZEROS, 24, 26, 0), "is not a sound zip archive"),
    "a name twice": (packed(("a.txt", b"1"), ("a.txt", b"2")), "'a.txt' is in it twice"),
    "a name twice on a Mac": (packed(("a.txt", b"1"), ("A.TXT", b"2")), "'A.TXT' is in it twice"),
    "a place twice": (packed(("a.txt", b"1"), ("./a.txt", b"2")), "'./a.txt' is in it twice"),
    "a file that is a folder": (packed(("t/a", b"1"), ("t/a/b", b"2"), ("t/c", b"3")), "t"),
    "a password": (marked(ONE, 6, 8, 1), "is encrypted"),
    "an unknown method": (marked(ONE, 8, 10, 99), "is not a sound zip archive"),
    "nothing": (packed(), "0 files"),
}


@pytest.mark.parametrize("harm", HARMFUL)
def test_a_harmful_archive_is_one_line_and_leaves_nothing(
    harm, root, tmp_path, mirror, monkeypatch, capsys
):
    content, reason = HARMFUL[harm]
    photos = mirror.offer("Flickr8k_Dataset.zip", zipped(PHOTOS), "Flicker8k_Dataset")
    row = mirror.offer("Flickr8k_text.zip", content, "Flickr8k_text")
    monkeypatch.setitem(download_data.DATASETS, "flickr8k", (row, photos))
    assert reason in error_of(root, capsys)
    assert list(tree(tmp_path)) == ["data/flickr8k/archives/Flickr8k_text.zip"]
    assert not list((root / "flickr8k").glob(".unpacking*"))


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
import sys, download_data
from util import program
{patch}
rows = tuple(download_data.File(*row[:4], tuple(row[4])) for row in {rows!r})
download_data.DATASETS["flickr8k"] = rows
program.run(lambda: download_data.main(["--root", sys.argv[1]]))
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
    assert process.wait(120) == -signal.SIGKILL, process.stdout.read()
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
    said = sorted(process.communicate(timeout=120)[0].splitlines()[-1] for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert said == [
        f"{root / 'flickr8k'} is complete, nothing to do",
        f"{root / 'flickr8k'} is ready",
    ]
    assert len(mirror.requests) == 2
    assert tree(root) == COMPLETE
