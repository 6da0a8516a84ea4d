"""Shards hold the dataset they were written from, whoever reads them, and stand up to bad ones."""

import contextlib
import functools
import gzip
import http.server
import io
import json
import logging
import os
import shlex
import signal
import sys
import tarfile
import threading
from pathlib import Path

import pytest
from helpers.tiny import run_code, run_script

import features
import readers
import shard_writer
import shards
from readers import Records, load_split
from shards import SPLITS
from util import files


@pytest.fixture(scope="module")
def written(drawn, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "made"
    write(drawn, folder)
    return folder


def write(drawn: Path, folder: Path, *more: str) -> None:
    features.main(["--shards", str(folder), "--dataset", "shapes", "--data-dir", str(drawn),
                   "--shard-size", "10", "--workers", "2", *more])  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def by_id(records) -> dict:
    return {record.image_id: (record.path.read_bytes(), record.captions) for record in records}


# --- two ways, one answer


def test_shards_hold_the_images_files_and_captions(written, drawn, tmp_path):
    for split in SPLITS:
        expected = by_id(load_split("shapes", drawn, split))
        assert by_id(load_split("shards", written, split, cache_dir=tmp_path)) == expected
    names = {path.name for path in written.glob("*.tar")}
    assert names == {"train-000000.tar", "train-000001.tar", "train-000002.tar", "val-000000.tar",
                     "test-000000.tar"}  # fmt: skip


def test_the_webdataset_library_reads_them(written, drawn):
    wds = pytest.importorskip("webdataset")
    urls = [str(path) for path in sorted(written.glob("train-*.tar"))]
    found = {}
    for sample in wds.WebDataset(urls, shardshuffle=False):
        about = json.loads(sample["json"])
        found[about["image_id"]] = (sample["png"], tuple(about["captions"]))
    assert found == by_id(load_split("shapes", drawn, "train"))


def test_the_list_has_the_order_of_the_tars(written):
    listed = readers.listed(str(written), "train")
    rows = iter(listed)
    for shard in shards.read_index(str(written)).splits["train"]:
        with tarfile.open(written / shard.name) as tar:
            names = [name for name in tar.getnames() if not name.endswith(".json")]
        assert [next(rows).path for _ in names] == [Path(shard.name) / name for name in names]
        assert shard.images == len(names) and shard.captions == 5 * len(names)
    assert next(rows, None) is None and isinstance(listed, Records)


def test_images_are_in_an_order_by_chance_and_by_seed(written, drawn, tmp_path):
    ids = [record.image_id for record in readers.listed(str(written), "train")]
    assert sorted(ids) != ids
    write(drawn, tmp_path / "other", "--seed", "1")
    other = [record.image_id for record in readers.listed(str(tmp_path / "other"), "train")]
    assert sorted(other) == sorted(ids) and other != ids


def test_the_same_data_give_the_same_bytes(written, drawn, tmp_path):
    write(drawn, tmp_path / "again", "--workers", "1")
    assert contents(tmp_path / "again") == contents(written)


# --- written safely

KILLED = """
    import os, signal, sys
    import features, shard_writer
    original, done = shard_writer._write_shard, []
    def write(path, *arguments):
        if len(done) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(original(path, *arguments))
        return done[-1]
    shard_writer._write_shard = write
    features.main(sys.argv[1:])
"""


def test_a_killed_writer_keeps_what_is_finished(written, drawn, tmp_path, monkeypatch):
    folder = tmp_path / "made"
    flags = ["--shards", str(folder), "--dataset", "shapes", "--data-dir", str(drawn),
             "--shard-size", "10", "--workers", "1"]  # fmt: skip
    killed = run_code(KILLED, *flags)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    assert len(kept) == 2 and not (folder / "index.json").exists()
    features.main(flags)
    assert contents(folder) == contents(written)
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())
    monkeypatch.setattr(shard_writer, "_write_split", lambda *_: pytest.fail("all is there"))
    features.main(flags)


def test_a_folder_of_something_else_is_left_alone(written, drawn, tmp_path, capsys):
    before = contents(written)
    flags = ["--dataset", "shapes", "--data-dir", drawn, "--shards"]
    code, _, said = run_script(features, *flags, written, "--shard-size", "7", capsys=capsys)
    assert code == 2 and "holds shards of other data" in said and said.count("\n") == 1
    (tmp_path / "mine.tar").write_bytes(b"mine")
    code, _, said = run_script(features, *flags, tmp_path, capsys=capsys)
    assert code == 2 and "tar files of somebody else" in said
    assert contents(written) == before and (tmp_path / "mine.tar").read_bytes() == b"mine"


def test_images_that_cannot_be_read_are_left_out(drawn, tmp_path, caplog):
    plain = list(load_split("shapes", drawn, "train")) * 5
    plain = [one._replace(image_id=f"{n}.png") for n, one in enumerate(plain)]
    (tmp_path / "bad.png").write_bytes(b"<html>")
    plain[7] = plain[7]._replace(path=tmp_path / "bad.png")
    with caplog.at_level(logging.WARNING):
        index = shard_writer.write_shards({"train": plain}, tmp_path / "made", "csv", shard_size=50)
    assert caplog.messages == ["left out: 1 of 120 images can't be read: 7.png"]
    assert sum(shard.images for shard in index.splits["train"]) == 119
    assert len(readers.unpacked(str(tmp_path / "made"), "train", tmp_path / "cache")) == 119
    plain[8] = plain[7]._replace(image_id="other.png")
    with pytest.raises(ValueError, match="2 of 120 images can't be read: .*7.png"):
        shard_writer.write_shards({"train": plain}, tmp_path / "worse", "csv")
    assert not (tmp_path / "worse" / "index.json").exists()


def test_what_was_made_is_told_and_written(drawn, tmp_path, capsys):
    write(drawn, tmp_path / "made", "--limit", "5", "--json", str(tmp_path / "made.json"))
    said = capsys.readouterr().out
    assert "train: 5 images with 25 captions in 1 shards" in said
    about = files.read_json(tmp_path / "made.json")
    assert about["splits"]["val"] == [{"name": "val-000000.tar", "images": 5, "captions": 25}]


# --- from elsewhere


@contextlib.contextmanager
def served(folder: Path):
    """Lend the address of a server of the folder's files."""

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


def test_an_address_gives_what_the_folder_gives(written, drawn, tmp_path, monkeypatch):
    pytest.importorskip("webdataset")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    expected = by_id(load_split("shapes", drawn, "val"))
    with served(written) as address:
        records = load_split("shards", address, "val", cache_dir=tmp_path / "http")
        assert by_id(records) == expected
        assert readers.listed(f"{address}/{{}}", "train") == readers.listed(str(written), "train")
        with pytest.raises(OSError, match=r"nothing/index.json can't be read .*code 22"):
            load_split("shards", f"{address}/nothing", "val", cache_dir=tmp_path)
    pipe = f"pipe:cat {shlex.quote(str(written))}/{{}}"
    assert by_id(load_split("shards", pipe, "val", cache_dir=tmp_path / "pipe")) == expected
    plain = f"file:{written}"
    assert by_id(load_split("shards", plain, "val", cache_dir=tmp_path / "file")) == expected


def test_addresses_that_cannot_work_say_why(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"names no file; put \{\}"):
        load_split("shards", "pipe:cat x.tar", "val", cache_dir=tmp_path)
    with pytest.raises(ValueError, match="is an address, and coco is read from a folder"):
        load_split("coco", "http://127.0.0.1/coco", "val")
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ValueError, match="pip install -r requirements-shards.txt"):
        load_split("shards", "http://127.0.0.1:9/", "val", cache_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no shards in .*python features.py --shards"):
        load_split("shards", tmp_path, "val", cache_dir=tmp_path)


# --- hostile or damaged


def copied(written: Path, folder: Path) -> Path:
    folder.mkdir()
    for name, content in contents(written).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    "change",
    [
        lambda about: about.update(version=2),
        lambda about: about.pop("splits"),
        lambda about: about["splits"]["val"]["shards"][0].update(name="../val.tar"),
        lambda about: about["splits"]["val"]["shards"][0].update(name="pipe:ls"),
        lambda about: about["splits"]["val"]["shards"][0].update(images=-1),
        lambda about: about["splits"]["val"]["shards"][0].update(images="8"),
        lambda about: about["splits"].update(val=3),
    ],
)
def test_an_index_of_another_kind_says_so(change, written, tmp_path):
    folder = copied(written, tmp_path / "made")
    about = files.read_json(folder / "index.json")
    change(about)
    files.write_json(folder / "index.json", about)
    with pytest.raises(ValueError, match=r"index\.json is not an index of shards"):
        load_split("shards", folder, "val", cache_dir=tmp_path)


@pytest.mark.parametrize(
    "row",
    [
        '["../a.png", "a", ["x"]]',
        '["/a.png", "a", ["x"]]',
        '["a.png", {}, ["x"]]',
        '["a.png", "a", "x"]',
        '["a.png", "a", []]',
        '["a.png", "a"]',
        "{",
        "[" * 100_000,
        '["a.png", 99999999999999999999, ["x"]]',
    ],
)
def test_a_list_of_another_kind_says_so(row, written, tmp_path):
    folder = copied(written, tmp_path / "made")
    (folder / "val.jsonl.gz").write_bytes(gzip.compress(row.encode()))
    with pytest.raises(ValueError, match=r"val\.jsonl\.gz is not a list of captions"):
        readers.listed(str(folder), "val")


def test_a_list_cut_short_or_too_short_says_so(written, tmp_path):
    folder = copied(written, tmp_path / "made")
    path = folder / "val.jsonl.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"val\.jsonl\.gz is not a list .*or damaged"):
        readers.listed(str(folder), "val")
    rows = gzip.decompress(whole).splitlines(keepends=True)
    path.write_bytes(gzip.compress(b"".join(rows[1:])))
    with pytest.raises(ValueError, match=r"val\.jsonl\.gz has fewer images than index\.json"):
        readers.listed(str(folder), "val")
    path.write_bytes(gzip.compress(b"".join([*rows, rows[0]])))
    with pytest.raises(ValueError, match=r"val\.jsonl\.gz has more images than index\.json"):
        readers.listed(str(folder), "val")


def test_a_hostile_tar_puts_nothing_anywhere(written, tmp_path):
    folder = copied(written, tmp_path / "made")
    with tarfile.open(folder / "val-000000.tar") as tar:
        good = {member.name: tar.extractfile(member).read() for member in tar}
    name = next(name for name in good if name.endswith(".png"))
    with tarfile.open(folder / "val-000000.tar", "w") as tar:
        for bad in ("../out.png", "/tmp/out.png", "a/../../out.png", "x.pyd", f"./{name}"):
            member = tarfile.TarInfo(bad)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"bad"))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        for each, content in good.items():
            member = tarfile.TarInfo(each)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    before = set(tmp_path.rglob("*"))
    records = load_split("shards", folder, "val", cache_dir=tmp_path / "cache")
    assert by_id(records) == by_id(
        load_split("shards", written, "val", cache_dir=tmp_path / "good")
    )
    new = {path for path in set(tmp_path.rglob("*")) - before if path.is_file()}
    assert {path.suffix for path in new} <= {".png", ".lock"}


def test_a_tar_cut_short_is_an_error_and_repaired_it_is_read(written, tmp_path, caplog):
    folder = copied(written, tmp_path / "made")
    path = folder / "val-000000.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:-15_000])
    with pytest.raises(ValueError, match="of 8 images of the val split are missing in their sha"):
        load_split("shards", folder, "val", cache_dir=tmp_path)
    path.write_bytes(whole)
    assert len(load_split("shards", folder, "val", cache_dir=tmp_path)) == 8


def test_an_image_too_large_is_left_out(written, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MOST_BYTES", 10)
    with pytest.raises(ValueError, match="8 of 8 images of the val split are missing"):
        load_split("shards", written, "val", cache_dir=tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="no limits of file sizes on Windows")
def test_a_full_disk_is_one_line_and_leaves_no_half_shard(drawn, tmp_path):
    code = """
        import resource, signal, sys
        import features
        from util import files
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))
        files.run(lambda: features.main(sys.argv[1:]))
    """
    flags = ["--shards", str(tmp_path), "--dataset", "shapes", "--data-dir", str(drawn)]
    full = run_code(code, *flags, "--shard-size", "10")
    assert full.returncode == 2 and full.stderr.count("\n") == 1, full.stderr
    assert "File too large" in full.stderr and ".tar" in full.stderr
    assert not list(tmp_path.glob("*.tar")) and not list(tmp_path.glob(".train*"))
