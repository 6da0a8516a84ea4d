"""Shards hold the dataset they were written from; damaged and hostile ones are one clear line."""

import gzip
import hashlib
import io
import json
import logging
import os
import shlex
import shutil
import signal
import sys
import tarfile
from pathlib import Path

import pytest
from helpers.shards import (
    as_img2dataset,
    by_id,
    contents,
    copied,
    listed,
    served,
    write,
    write_tar,
)
from helpers.tiny import run_code, run_script

import features
import shards
from readers import load_split
from shards import SPLITS
from util import files, tars
from util.seeding import derive_seed

wds = pytest.importorskip("webdataset")


@pytest.fixture(scope="module")
def written(drawn, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "made"
    write(drawn, folder)
    return folder


# --- written and read


def test_shards_hold_the_files_and_captions_of_the_images(written, drawn, tmp_path):
    for split in SPLITS:
        expected = by_id(load_split("shapes", drawn, split))
        assert by_id(load_split("shards", written, split, cache_dir=tmp_path)) == expected
    names = {path.name for path in written.glob("*.tar")}
    assert names == {"train-000000.tar", "train-000001.tar", "train-000002.tar", "val-000000.tar",
                     "test-000000.tar"}  # fmt: skip


def test_the_webdataset_library_reads_them(written, drawn):
    urls = [str(path) for path in sorted(written.glob("train-*.tar"))]
    found = {}
    for sample in wds.WebDataset(urls, shardshuffle=False):
        about = json.loads(sample["json"])
        assert sample["txt"].decode() == about["captions"][0]
        found[about["image_id"]] = (sample["png"], tuple(about["captions"]))
    assert found == by_id(load_split("shapes", drawn, "train"))


def test_images_are_unpacked_once(written, tmp_path, monkeypatch):
    first = load_split("shards", written, "val", cache_dir=tmp_path)
    monkeypatch.setattr(shards, "read_tar", lambda *_: pytest.fail("unpacked again"))
    assert list(load_split("shards", written, "val", cache_dir=tmp_path)) == list(first)


def test_the_list_has_the_order_of_the_tars(written, tmp_path):
    rows = iter(listed(written, tmp_path))
    for shard in tars.read_index(written, tmp_path)["splits"]["train"]["shards"]:
        with tarfile.open(written / shard["name"]) as tar:
            names = [name for name in tar.getnames() if name.endswith(".png")]
        assert [next(rows).path for _ in names] == [Path(shard["name"]) / name for name in names]
        assert shard["images"] == len(names) and shard["captions"] == 5 * len(names)
    assert next(rows, None) is None


def test_the_order_of_the_images_is_random_and_depends_on_the_seed(written, drawn, tmp_path):
    ids = [record.image_id for record in listed(written, tmp_path)]
    assert sorted(ids) != ids
    write(drawn, tmp_path / "other", "--seed", "1")
    other = [record.image_id for record in listed(tmp_path / "other", tmp_path)]
    assert sorted(other) == sorted(ids) and other != ids


def test_the_same_data_give_the_same_bytes(written, drawn, tmp_path):
    write(drawn, tmp_path / "again", "--workers", "1")
    assert contents(tmp_path / "again") == contents(written)


def test_shards_without_txt_are_read(written, tmp_path):
    """As version 1.0 wrote them."""
    folder = copied(written, tmp_path / "made")
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            members = {one.name: tar.extractfile(one).read() for one in tar}
        write_tar(path, {name: members[name] for name in members if not name.endswith(".txt")})
    for split in SPLITS:
        old = load_split("shards", folder, split, cache_dir=tmp_path / "old")
        new = load_split("shards", written, split, cache_dir=tmp_path / "new")
        assert by_id(old) == by_id(new)


def test_a_folder_of_img2dataset_is_one_train_split(drawn, tmp_path, monkeypatch):
    expected = as_img2dataset(drawn, tmp_path / "laion")
    before = contents(tmp_path / "laion")
    records = load_split("shards", tmp_path / "laion", "train", cache_dir=tmp_path / "cache")
    assert len(expected) == 24 and by_id(records) == expected
    with pytest.raises(FileNotFoundError, match="no val split in .*it holds train"):
        load_split("shards", tmp_path / "laion", "val", cache_dir=tmp_path / "cache")
    assert contents(tmp_path / "laion") == before
    with monkeypatch.context() as patch:  # captions are collected once
        patch.setattr(shards, "read_tar", lambda *_: pytest.fail("read again"))
        assert len(listed(tmp_path / "laion", tmp_path / "cache")) == 24
    odd = json.dumps({"image_id": 1.5, "captions": "odd", "caption": 3}).encode()
    odd_members = {"9.png": b"?", "9.txt": b"one more", "9.json": odd, "8.png": b"?", "8.json": odd}
    write_tar(tmp_path / "laion/00003.tar", odd_members)
    assert [row[::2] for row in listed(tmp_path / "laion", tmp_path / "cache")[24:]] == [
        ("00003/9.png", ("one more",))
    ]


# --- written safely


def test_a_killed_writer_leaves_no_index_and_the_next_call_writes_all(written, drawn, tmp_path):
    folder = tmp_path / "made"
    killed = """
        import os, signal, sys
        import features, shards
        original, done = shards.files.replacing, []
        def replacing(path):
            if len(done) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(path)
            return original(path)
        shards.files.replacing = replacing
        features.main(sys.argv[1:])
    """
    flags = ["--shards", str(folder), "--dataset", "shapes", "--data-dir", str(drawn)]
    run = run_code(killed, *flags, "--shard-size", "2")
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert len(list(folder.glob("*.tar"))) == 2 and not (folder / "index.json").exists()
    write(drawn, folder)
    assert contents(folder) == contents(written)


def test_what_is_written_already_is_not_written_again(written, drawn, monkeypatch):
    monkeypatch.setattr(shards, "write_tars", lambda *_: pytest.fail("all is there"))
    write(drawn, written)


def test_images_that_were_replaced_by_others_of_the_same_size_are_noticed(drawn, tmp_path):
    record = load_split("shapes", drawn, "train")[0]
    path = Path(shutil.copy(record.path, tmp_path / "image.png"))
    splits = {"train": [record._replace(path=path)]}
    index = shards.write_shards(splits, tmp_path / "made", "csv")
    assert shards.write_shards(splits, tmp_path / "made", "csv") == index
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="holds tar files of other data"):
        shards.write_shards(splits, tmp_path / "made", "csv")


def test_shards_of_the_version_that_compared_only_sizes_are_known(drawn, tmp_path):
    records = load_split("shapes", drawn, "train")[:2]
    shards.write_shards({"train": records}, tmp_path / "made", "csv")
    about = files.read_json(tmp_path / "made" / "index.json")
    digest = hashlib.sha256(b"1/1000")
    for one in sorted(records, key=lambda one: derive_seed(0, one.image_id)):
        row = ["train", one.image_id, one.path.stat().st_size, one.captions]
        digest.update(json.dumps(row).encode())
    about["fingerprint"] = digest.hexdigest()
    files.write_json(tmp_path / "made" / "index.json", about)
    assert shards.write_shards({"train": records}, tmp_path / "made", "csv") == about


def test_a_folder_of_other_files_is_not_changed(written, drawn, tmp_path, capsys):
    before = contents(written)
    flags = ["--dataset", "shapes", "--data-dir", drawn, "--shards"]
    code, _, said = run_script(features, *flags, written, "--shard-size", "7", capsys=capsys)
    assert code == 2 and "holds tar files of other data" in said and said.count("\n") == 1
    (tmp_path / "mine.tar").write_bytes(b"mine")
    code, _, said = run_script(features, *flags, tmp_path, capsys=capsys)
    assert code == 2 and "holds tar files of other data" in said
    assert contents(written) == before and (tmp_path / "mine.tar").read_bytes() == b"mine"


def test_images_that_cannot_be_read_are_left_out(drawn, tmp_path, caplog):
    plain = list(load_split("shapes", drawn, "train")) * 5
    plain = [one._replace(image_id=f"{n}.png") for n, one in enumerate(plain)]
    (tmp_path / "bad.png").write_bytes(b"<html>")
    plain[7] = plain[7]._replace(path=tmp_path / "bad.png")
    made = tmp_path / "made"
    with caplog.at_level(logging.WARNING):
        index = shards.write_shards({"train": plain}, made, "csv", shard_size=50)
    assert caplog.messages == ["left out: 1 of 120 images can't be read: 7.png"]
    assert sum(shard["images"] for shard in index["splits"]["train"]["shards"]) == 119
    assert len(load_split("shards", made, "train", cache_dir=tmp_path / "cache")) == 119
    plain[8:12] = [plain[7]._replace(image_id=f"gone-{n}.png") for n in range(4)]
    with pytest.raises(ValueError, match="5 of 120 images can't be read: .*7.png"):
        shards.write_shards({"train": plain}, tmp_path / "worse", "csv")
    assert not (tmp_path / "worse" / "index.json").exists()


def test_what_was_written_is_printed_and_goes_to_json(drawn, tmp_path, capsys):
    write(drawn, tmp_path / "made", "--limit", "5", "--json", str(tmp_path / "made.json"))
    said = capsys.readouterr().out
    assert "train: 5 images with 25 captions in 1 shards" in said
    about = files.read_json(tmp_path / "made.json")
    assert about["splits"]["val"] == [{"name": "val-000000.tar", "images": 5, "captions": 25}]


@pytest.mark.skipif(os.name != "posix", reason="no limits of file sizes on Windows")
def test_a_full_disk_is_one_line_and_leaves_no_half_shard(drawn, tmp_path):
    code = """
        import resource, signal, sys
        import features
        from util import program
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))
        program.run(lambda: features.main(sys.argv[1:]))
    """
    flags = ["--shards", str(tmp_path), "--dataset", "shapes", "--data-dir", str(drawn)]
    full = run_code(code, *flags, "--shard-size", "10")
    assert full.returncode == 2 and full.stderr.count("\n") == 1, full.stderr
    assert "File too large" in full.stderr and ".tar" in full.stderr
    assert not list(tmp_path.glob("*.tar")) and not list(tmp_path.glob(".train*"))


# --- from an address


def test_an_address_gives_what_the_folder_gives(written, drawn, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    expected = by_id(load_split("shapes", drawn, "val"))
    with served(written) as address:
        records = load_split("shards", address, "val", cache_dir=tmp_path / "http")
        assert by_id(records) == expected
        assert listed(f"{address}/{{}}", tmp_path) == listed(written, tmp_path)
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


# --- damaged or hostile


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.update(version=2),
        lambda index: index.pop("splits"),
        lambda index: index["splits"]["val"]["shards"][0].update(name="../val.tar"),
        lambda index: index["splits"]["val"]["shards"][0].update(name="pipe:ls"),
        lambda index: index["splits"]["val"]["shards"][0].update(images=-1),
        lambda index: index["splits"]["val"]["shards"][0].update(images="8"),
        lambda index: index["splits"].update(val=3),
    ],
)
def test_an_index_of_another_kind_is_one_line(change, written, tmp_path):
    folder = copied(written, tmp_path / "made")
    index = files.read_json(folder / "index.json")
    change(index)
    files.write_json(folder / "index.json", index)
    with pytest.raises(files.UserError, match=r"index\.json is not an index of shards"):
        load_split("shards", folder, "val", cache_dir=tmp_path)


@pytest.mark.parametrize(
    "row",
    [
        '["../a.png", "a", ["x"]]',
        '["/a.png", "a", ["x"]]',
        '["a.png", {}, ["x"]]',
        '["a.png", "a", "x"]',
        '["a.png", "a", []]',
        '["a.png", "a", [3]]',
        '["a.png", "a"]',
        "{",
        "[" * 100_000,
    ],
)
def test_a_list_of_another_kind_is_one_line(row, written, tmp_path):
    folder = copied(written, tmp_path / "made")
    rows = gzip.decompress((folder / "val.jsonl.gz").read_bytes()).splitlines(keepends=True)
    (folder / "val.jsonl.gz").write_bytes(gzip.compress(b"".join([*rows[:-1], row.encode()])))
    with pytest.raises(files.UserError, match=r"val\.jsonl\.gz is damaged.* \(after 7 good rows"):
        listed(folder, tmp_path, "val")


def test_a_list_with_too_few_or_too_many_rows_is_one_line(written, tmp_path):
    folder = copied(written, tmp_path / "made")
    path = folder / "val.jsonl.gz"
    complete = path.read_bytes()
    rows = gzip.decompress(complete).splitlines(keepends=True)
    for bad in (
        complete[:-20],
        gzip.compress(b"".join(rows[1:])),
        gzip.compress(b"".join([*rows, rows[0]])),
        b"no gzip",
    ):
        path.write_bytes(bad)
        with pytest.raises(files.UserError, match=r"val\.jsonl\.gz is damaged"):
            listed(folder, tmp_path, "val")


def test_a_hostile_tar_writes_nothing_outside_the_cache(written, tmp_path):
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


def test_a_tar_cut_short_is_an_error_and_is_read_once_repaired(written, tmp_path, caplog):
    folder = copied(written, tmp_path / "made")
    path = folder / "val-000000.tar"
    complete = path.read_bytes()
    path.write_bytes(complete[:-15_000])
    with pytest.raises(ValueError, match="of 8 images of the val split are missing in their sha"):
        load_split("shards", folder, "val", cache_dir=tmp_path)
    assert "val-000000.tar is damaged" in caplog.text
    path.write_bytes(complete)
    assert len(load_split("shards", folder, "val", cache_dir=tmp_path)) == 8


def test_an_image_that_is_too_large_is_left_out(written, tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "MAX_BYTES", 10)
    with pytest.raises(ValueError, match="8 of 8 images of the val split are missing"):
        load_split("shards", written, "val", cache_dir=tmp_path)


@pytest.mark.parametrize("row", [b'["a.png", 1, ["x"]]\n', b" "])
def test_a_list_that_unpacks_to_far_more_than_its_size_is_one_line(
    row, written, tmp_path, monkeypatch
):
    monkeypatch.setattr(shards, "BOMB", 2)  # times a million bytes, for so small a file
    folder = copied(written, tmp_path / "made")
    index = files.read_json(folder / "index.json")
    index["splits"]["val"]["shards"][0]["images"] = 2**39
    files.write_json(folder / "index.json", index)
    (folder / "val.jsonl.gz").write_bytes(gzip.compress(row * (3 * 2**20 // len(row))))
    with pytest.raises(files.UserError, match=r"val\.jsonl\.gz is damaged"):
        listed(folder, tmp_path, "val")


@pytest.mark.parametrize(
    "address",
    ["http://x/'; touch owned; '", 'gs://x/"`ls`"', "https://a b/c", "http://x/\n", "hf:\\x"],
)
def test_an_address_that_a_shell_might_read_otherwise_is_refused(address, tmp_path, monkeypatch):
    monkeypatch.setattr(wds, "gopen", lambda *_: pytest.fail("it was opened"))
    with pytest.raises(files.UserError, match="is not an address: it has blanks, quotes"):
        load_split("shards", address, "val", cache_dir=tmp_path)


@pytest.mark.parametrize("address", ["strange:x/y", "PIPE:ls{}"])
def test_an_address_that_nothing_opens_is_one_line(address, tmp_path):
    with pytest.raises(files.UserError, match="can't be opened"):
        load_split("shards", address, "val", cache_dir=tmp_path)


@pytest.mark.parametrize("name", ["index.json", "train.jsonl.gz", "val.jsonl.gz"])
def test_a_folder_with_files_of_the_same_names_is_refused(name, drawn, tmp_path):
    (tmp_path / name).write_text('{"name": "my app"}')
    with pytest.raises(files.UserError, match=f"holds another {name}, which would be lost"):
        write(drawn, tmp_path)
    assert (tmp_path / name).read_text() == '{"name": "my app"}'
    assert not list(tmp_path.glob("*.tar"))


def test_a_list_of_shards_is_written_over_no_other_file(drawn, tmp_path, capsys):
    argv = ["--dataset", "shapes", "--data-dir", drawn, "--shards", tmp_path / "made"]
    (tmp_path / "mine.json").write_text('{"splits": 3}')
    for name, said in (("mine.json", "does not hold a list of shards"), ("a.txt", "end in .json")):
        code, _, err = run_script(features, *argv, "--json", tmp_path / name, capsys=capsys)
        assert code == 2 and said in err and not (tmp_path / "made").exists()
    for _ in range(2):  # its own is written again
        assert run_script(features, *argv, "--json", tmp_path / "a.json", capsys=capsys)[0] == 0
    assert (tmp_path / "mine.json").read_text() == '{"splits": 3}'
