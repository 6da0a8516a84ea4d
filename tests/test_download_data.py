"""What lands where: the official layout, parts, archives at hand, and what is left alone."""

import dataclasses
import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from helpers.mirrors import (
    COMPLETE,
    PHOTO,
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


def test_a_file_of_an_archives_name_is_not_replaced(root, mirror, offered, capsys):
    mine = root / "flickr8k/archives" / offered[0].name
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    line = error_of(root, capsys)
    assert str(mine) in line and "is not this archive" in line and "move it away" in line
    assert mine.read_bytes() == b"mine"
