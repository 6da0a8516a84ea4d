"""Every layout users have on disk gives the same records, and what is wrong says so by name."""

import json
import logging
import os
import random
from pathlib import Path

import pandas as pd
import pytest
from helpers.datasets import (
    CAPTIONS,
    LAYOUTS,
    NAMES,
    PARTS,
    draw,
    kaggle,
    karpathy,
    official,
    older,
    token_text,
    write,
)

import readers
from readers import (
    SplitMissingError,
    keep_readable,
    load_split,
    load_splits,
    read_table,
    read_token_file,
)
from shards import SPLITS
from util import shapes
from util.images import report_left_out


def captions_of(table: pd.DataFrame) -> dict[str, list[str]]:
    return {file: rows["caption"].tolist() for file, rows in table.groupby("file", sort=False)}


def contents(root: Path, split: str) -> dict:
    """Image id → the image's bytes and the captions."""
    records = load_split("flickr8k", root, split)
    assert len({record.image_id for record in records}) == len(records)
    return {record.image_id: (record.path.read_bytes(), record.captions) for record in records}


# --- two ways, one answer


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_the_same_images_and_captions(layout, tmp_path):
    root = LAYOUTS[layout](tmp_path)
    found = {name: value for split in SPLITS for name, value in contents(root, split).items()}
    assert {name: list(lines) for name, (_, lines) in found.items()} == CAPTIONS
    draw(tmp_path / "again")
    assert all((tmp_path / "again" / name).read_bytes() == found[name][0] for name in NAMES)


@pytest.mark.parametrize("split", SPLITS)
def test_layouts_agree_on_each_split(split, tmp_path):
    read = {name: contents(make(tmp_path / name), split) for name, make in LAYOUTS.items()}
    assert read["official"] == read["karpathy"] and list(read["official"]) == PARTS[split]
    assert read["kaggle"] == read["older"]
    assert list(read["kaggle"]) == sorted(read["kaggle"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_dataset_may_lie_in_a_folder_of_data_dir(layout, tmp_path):
    root = LAYOUTS[layout](tmp_path / "data" / "Flickr8k")
    assert contents(root.parent, "val") == contents(root, "val")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-8"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_line_ends_and_byte_order_marks_change_nothing(end, encoding, tmp_path):
    path = write(tmp_path / "t.txt", token_text().replace("\n", end), encoding)
    assert captions_of(read_token_file(path)) == CAPTIONS
    kaggle(tmp_path)
    text = (tmp_path / "captions.txt").read_text(encoding="utf-8")
    path = write(tmp_path / "captions.txt", text.replace("\r\n", "\n").replace("\n", end), encoding)
    assert captions_of(read_table(path)) == CAPTIONS


# --- which source wins


def test_official_lists_win_over_the_json(tmp_path):
    karpathy(tmp_path, {"train": NAMES})
    official(tmp_path)
    assert list(contents(tmp_path, "test")) == PARTS["test"]


def test_the_jsons_splits_win_over_a_shuffle(tmp_path):
    kaggle(tmp_path)
    karpathy(tmp_path)
    assert list(contents(tmp_path, "test")) == PARTS["test"]


def test_official_lists_are_used_with_kaggles_captions(tmp_path):
    kaggle(tmp_path)
    write(tmp_path / "Flickr_8k.testImages.txt", "\n".join(PARTS["test"]))
    assert list(contents(tmp_path, "test")) == PARTS["test"]


def test_the_fullest_image_folder_is_the_one(tmp_path):
    official(tmp_path)
    draw(tmp_path / "A_few", NAMES[:3])
    draw(tmp_path / "__MACOSX" / "Flicker8k_Dataset")
    draw(tmp_path / ".trash")
    records = load_split("flickr8k", tmp_path, "train")
    assert {record.path.parent.name for record in records} == {"Flicker8k_Dataset"}
    assert "__MACOSX" not in str(records[0].path)


def test_hidden_folders_are_not_looked_into(tmp_path):
    official(tmp_path / ".trash")
    with pytest.raises(FileNotFoundError, match="no Flickr8k captions"):
        load_split("flickr8k", tmp_path, "train")


def test_folders_that_may_not_be_read_are_passed_over_and_named(tmp_path, monkeypatch, caplog):
    official(tmp_path)
    (tmp_path / "lost+found").mkdir()
    listed, access = [], os.access
    listdir, scandir = os.listdir, os.scandir
    monkeypatch.setattr(os, "access", lambda p, m: "lost" not in str(p) and access(p, m))
    monkeypatch.setattr(os, "listdir", lambda path: listed.append(str(path)) or listdir(path))
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(str(path)) or scandir(path))
    assert len(load_split("flickr8k", tmp_path, "train")) == 14
    assert listed and not any("lost" in path for path in listed)
    assert "lost+found can't be read (Permission denied)" in caplog.text


def test_a_link_to_itself_is_passed_over(tmp_path):
    official(tmp_path)
    try:
        (tmp_path / "self").symlink_to(tmp_path / "self")
    except OSError:
        pytest.skip("links are not allowed here")
    assert len(load_split("flickr8k", tmp_path, "train")) == 14


# --- splits


def test_an_automatic_split_is_complete_and_disjoint_whatever_the_order_of_the_file(tmp_path):
    path = kaggle(tmp_path) / "captions.txt"
    before = load_splits("flickr8k", tmp_path, 3)
    assert {split: len(records) for split, records in before.items()} == {
        "train": 18, "val": 3, "test": 3,
    }  # fmt: skip
    ids = [record.image_id for records in before.values() for record in records]
    assert sorted(ids) == NAMES
    header, *rows = path.read_text(encoding="utf-8").splitlines()
    random.Random(0).shuffle(rows)
    write(path, "\n".join([header, *rows]))
    after = load_splits("flickr8k", tmp_path, 3)
    for split, records in before.items():
        assert [r.image_id for r in records] == [r.image_id for r in after[split]]


def test_the_automatic_split_of_a_seed_never_changes(tmp_path):
    records = load_split("flickr8k", kaggle(tmp_path), "test", 3)
    assert [record.image_id for record in records] == [
        "image_14.jpg",
        "image_18.jpg",
        "image_23.jpg",
    ]


def test_all_splits_at_once_are_the_splits_one_by_one(tmp_path, caplog):
    official(tmp_path, ["train", "test"])
    splits = load_splits("flickr8k", tmp_path, required=("train",))
    assert splits == {split: load_split("flickr8k", tmp_path, split) for split in splits}
    assert list(splits) == ["train", "test"]
    assert f"left out: no val split in {tmp_path}; it holds train, test" in caplog.messages
    with pytest.raises(SplitMissingError, match="no val split"):
        load_splits("flickr8k", tmp_path, required=("val",))


def test_the_split_seed_chooses_the_split(tmp_path):
    kaggle(tmp_path)
    chosen = [load_split("flickr8k", tmp_path, "test", seed) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]


def test_too_few_images_to_split_say_what_there_is(tmp_path):
    write(tmp_path / "captions.txt", "image,caption\na.jpg,a dog\nb.jpg,a cat\n")
    with pytest.raises(ValueError, match="2 of 2 images have no split, .*; .* at least 3"):
        load_split("flickr8k", tmp_path, "train")


def test_restval_joins_train(tmp_path):
    karpathy(tmp_path, {"train": NAMES[:4], "restval": NAMES[4:10], "val": NAMES[10:]})
    assert list(contents(tmp_path, "train")) == NAMES[:10]
    with pytest.raises(SplitMissingError, match="no test split in .*; it holds train, val"):
        load_split("flickr8k", tmp_path, "test")


def test_a_test_split_alone_is_read(tmp_path):
    captions = {name: CAPTIONS[name] for name in PARTS["test"]}
    official(tmp_path, ["test"], PARTS["test"], captions)
    assert list(contents(tmp_path, "test")) == PARTS["test"]
    with pytest.raises(SplitMissingError, match="no train split in .*; it holds test"):
        load_split("flickr8k", tmp_path, "train")


def test_complete_texts_with_the_images_of_one_split_are_read(tmp_path):
    official(tmp_path, images_of=PARTS["test"])
    assert list(contents(tmp_path, "test")) == PARTS["test"]
    with pytest.raises(SplitMissingError, match=r"no image of the train split in .*image_00\.jpg"):
        load_split("flickr8k", tmp_path, "train")


def test_a_split_without_captions_says_so(tmp_path):
    official(tmp_path, captions={name: CAPTIONS[name] for name in PARTS["train"]})
    assert len(load_split("flickr8k", tmp_path, "train")) == 14
    with pytest.raises(SplitMissingError, match="no captions of the val split"):
        load_split("flickr8k", tmp_path, "val")


# --- captions as they are written


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\x0b", "\x1c"])
def test_only_line_feeds_end_a_line(mark, tmp_path):
    path = write(tmp_path / "a.txt", f"a.jpg#0\ta dog{mark}runs\n")
    assert captions_of(read_token_file(path)) == {"a.jpg": [f"a dog{mark}runs"]}
    path = write(tmp_path / "captions.txt", f"image,caption\na.jpg,a dog{mark}runs\n")
    assert captions_of(read_table(path)) == {"a.jpg": [f"a dog{mark}runs"]}


def test_a_csv_may_quote_everything_and_break_lines_inside_quotes(tmp_path):
    path = write(tmp_path / "captions.txt", '"image","caption"\n"a.jpg","a ""big""\ndog"\n\n')
    assert captions_of(read_table(path)) == {"a.jpg": ['a "big"\ndog']}


def test_names_keep_their_hashes_and_dots(tmp_path):
    path = write(tmp_path / "t", "a#b.jpg#0\tone\n2258277193_586949ec62.jpg.1#0\ttwo\n\n")
    expected = {"a#b.jpg": ["one"], "2258277193_586949ec62.jpg.1": ["two"]}
    assert captions_of(read_token_file(path)) == expected


def test_empty_captions_and_repeated_names_are_dropped(tmp_path):
    official(tmp_path, captions={**CAPTIONS, NAMES[18]: ["", "a dog", "  "]})
    write(tmp_path / "Flickr8k_text" / "Flickr_8k.testImages.txt", "\n".join(PARTS["test"] * 2))
    found = contents(tmp_path, "test")
    assert list(found) == PARTS["test"] and found[NAMES[18]][1] == ("a dog",)


LONG = " ".join(["dog"] * 10_000)
CONTROLS = "".join(map(chr, range(1, 32))).replace("\n", "").replace("\r", "").strip()


@pytest.mark.parametrize(
    "caption", [LONG, f"a{CONTROLS}b", "\u202eright to left", "a\ufeffb", "🐶"]
)
@pytest.mark.parametrize("make", [official, kaggle, older, karpathy])
def test_captions_of_any_length_and_signs_are_read_whole(make, caption, tmp_path, monkeypatch):
    monkeypatch.setitem(CAPTIONS, NAMES[0], [caption, "a dog"])
    root = make(tmp_path)
    if make is official:
        write(root / "Flickr8k_text" / "Flickr8k.token.txt", token_text(CAPTIONS))
    found = {name: value for split in SPLITS for name, value in contents(root, split).items()}
    assert found[NAMES[0]][1] == (caption, "a dog")


@pytest.mark.parametrize("make", [kaggle, karpathy])
def test_an_image_may_have_thousands_of_captions_some_of_them_twice(make, tmp_path, monkeypatch):
    lines = [f"a dog {number % 2500}" for number in range(5000)]
    monkeypatch.setitem(CAPTIONS, NAMES[0], lines)
    root = make(tmp_path)
    found = {name: value for split in SPLITS for name, value in contents(root, split).items()}
    assert list(found[NAMES[0]][1]) == lines


def test_an_image_listed_twice_in_a_json_keeps_all_its_captions(tmp_path):
    root = karpathy(tmp_path)
    path = root / "dataset_flickr8k.json"
    value = json.loads(path.read_text())
    first = value["images"][0]
    again = first | {"sentences": [{"raw": "said again"}]}
    write(path, json.dumps({"images": [*value["images"], again]}))
    assert contents(root, "train")[first["filename"]][1] == (*CAPTIONS[NAMES[0]], "said again")
    again["split"] = "test"
    write(path, json.dumps({"images": [*value["images"], again]}))
    with pytest.raises(ValueError, match=rf"{NAMES[0]} is listed as .*'train'.*'test'"):
        load_split("flickr8k", root, "train")


# --- a few that are missing, and too many


@pytest.fixture
def many(tmp_path) -> Path:
    """Two hundred images in the train split, official layout."""
    names = [f"{number:03}.jpg" for number in range(200)]
    draw(tmp_path / "Flicker8k_Dataset", names)
    write(tmp_path / "Flickr8k.token.txt", token_text({name: ["a dog"] for name in names}))
    write(tmp_path / "Flickr_8k.trainImages.txt", "\n".join(names))
    return tmp_path


def test_a_few_missing_images_are_listed_counted_and_left_out(many, caplog):
    (many / "Flicker8k_Dataset" / "007.jpg").unlink()
    write(many / "Flickr8k.token.txt", (many / "Flickr8k.token.txt").read_text().split("\n", 1)[1])
    with caplog.at_level(logging.WARNING):
        records = load_split("flickr8k", many, "train")
    assert len(records) == 198 and {"000.jpg", "007.jpg"}.isdisjoint(r.image_id for r in records)
    assert caplog.messages == [
        "left out: 2 of 200 images of the train split have no image file or no caption: "
        "000.jpg, 007.jpg"
    ]


def test_too_many_missing_images_are_an_error(many):
    for number in range(13):
        (many / "Flicker8k_Dataset" / f"{number:03}.jpg").unlink()
    with pytest.raises(ValueError, match=r"13 of 200 .* 000\.jpg, .* and 3 more; more than 1 %"):
        load_split("flickr8k", many, "train")


def test_unreadable_images_are_left_out_and_too_many_are_an_error(many, caplog):
    records = load_split("flickr8k", many, "train")
    assert keep_readable(records) == records and not caplog.messages
    records[3].path.write_bytes(b"<html>")
    records[5].path.unlink()
    good = keep_readable(records)
    assert [r.image_id for r in records if r not in good] == ["003.jpg", "005.jpg"]
    assert "2 of 200 images can't be read: 003.jpg, 005.jpg" in caplog.text
    records[8].path.write_bytes(records[8].path.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"3 of 200 images can't be read: .*008\.jpg"):
        keep_readable(records)


@pytest.mark.parametrize(("bad", "total"), [(1, 40), (1, 2), (2, 200), (2, 299)])
def test_one_image_in_any_case_and_one_percent_are_left_out_with_a_line(bad, total, caplog):
    report_left_out(["a.jpg"] * bad, total, "can't be read")
    shown = ", ".join(["a.jpg"] * bad)
    assert caplog.messages == [f"left out: {bad} of {total} images can't be read: {shown}"]


@pytest.mark.parametrize(("bad", "total"), [(2, 40), (3, 299), (1, 1)])
def test_more_images_or_all_are_too_many(bad, total):
    with pytest.raises(ValueError, match=f"{bad} of {total} images .* too many to leave out"):
        report_left_out(["a.jpg"] * bad, total, "can't be read")


def test_images_without_permission_are_unreadable_and_a_failing_disk_stops(many, monkeypatch):
    records = load_split("flickr8k", many, "train")
    faults = {records[0].path: PermissionError(13, "Permission denied")}

    def read_image(path):
        if path in faults:
            raise faults[path]

    monkeypatch.setattr("readers.read_image", read_image)
    assert keep_readable(records) == records[1:]
    faults[records[1].path] = OSError(5, "Input/output error")
    with pytest.raises(OSError, match="Input/output"):
        keep_readable(records)


# --- errors by their message


def test_no_folder_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no dataset at .*gone.*download_data\.py"):
        load_split("flickr8k", tmp_path / "gone", "train")


def test_no_captions_file_says_what_was_looked_for(tmp_path):
    draw(tmp_path / "Images", NAMES[:1])
    with pytest.raises(FileNotFoundError, match=r"Flickr8k\.token\.txt, captions\.txt.*--data-dir"):
        load_split("flickr8k", tmp_path, "train")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x89PNG\r\n\xff\xfe\0", "is not a text file in UTF-8"),
        ("a.jpg#0\tone".encode("utf-16"), "is not a text file in UTF-8.*; save it as UTF-8"),
        ("a.jpg#0\tone".encode("utf-16-le"), "is not a text file in UTF-8 .it holds NUL"),
        ("a.jpg#0\tune fête".encode("latin-1"), "is not a text file in UTF-8"),
        (b"<!DOCTYPE html>\n<html>", r"line 1 is not a caption: .*not '<!DOCTYPE html>'"),
        (b"a.jpg#0\ta dog\na.jpg#1 no tab\n", r"line 2 is not a caption: expected name.jpg#0"),
        (b"a.jpg#0\ta dog\n\na.jpg\tno number\n", "line 3 is not a caption"),
    ],
)
def test_a_token_file_of_another_kind_says_where(content, said, tmp_path):
    (tmp_path / "Flickr8k.token.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"Flickr8k\.token\.txt.*{said}"):
        load_split("flickr8k", tmp_path, "train")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x89PNG\r\n\xff\xfe\0", "is not a text file in UTF-8"),
        (
            b"<!DOCTYPE html>\n<html>",
            "must have the columns image and caption, each once, not '<!doctype html>'",
        ),
        (b"id,label\n1,2\n", "must have the columns .* not 'id, label'"),
        (b"image,caption\na.jpg,a dog\nb.jpg,a dog, a cat\n", "line 3 has 3 cells, not 2"),
        (b"image,caption\na.jpg\n", r"line 2 has 1 cells, not 2: \['a.jpg'\]"),
        (b'image,caption\na.jpg,"a dog\nb.jpg,a cat\n', "line 3: unexpected end of data"),
        (
            b'image,caption\na.jpg,"a dog\n' + b"b.jpg,a cat\n" * 20000,
            "field larger than field limit",
        ),
        (b"image,caption\na.jpg,a \0dog\n", "is not a text file in UTF-8 .it holds NUL"),
        (b"", "is empty"),
    ],
)
def test_a_csv_of_another_kind_says_where(content, said, tmp_path):
    (tmp_path / "captions.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"captions\.txt.*{said}"):
        load_split("flickr8k", tmp_path, "train")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not a JSON file"),
        ("[]", "expected .*images"),
        ('{"images": [{"filename": "a.jpg"}]}', "KeyError: 'sentences'"),
        ('{"images": [{"filename": "a", "split": "val", "sentences": null}]}', "expected"),
        ("[" * 100_000, "is not a JSON file"),
        ("1" * 5000, "is not a"),
    ],
)
def test_a_json_of_another_kind_says_so(text, said, tmp_path):
    write(tmp_path / "dataset_flickr8k.json", text)
    with pytest.raises(ValueError, match=rf"dataset_flickr8k\.json.*{said}"):
        load_split("flickr8k", tmp_path, "val")


@pytest.mark.parametrize(
    "image",
    [
        {"filename": "a", "split": "val", "sentences": [{"raw": 3}]},
        {"filename": 3, "split": "val", "sentences": []},
        {"filename": [], "split": "val", "sentences": []},
        {"filename": "a", "split": {}, "sentences": []},
    ],
)
def test_cells_of_another_type_are_shown(image, tmp_path):
    write(tmp_path / "dataset_flickr8k.json", json.dumps({"images": [image]}))
    with pytest.raises(ValueError, match=r"not an image id, file, caption and split: \("):
        load_split("flickr8k", tmp_path, "val")


def test_a_dataset_without_a_caption_says_so(tmp_path):
    for name in ("captions.txt", "dataset_flickr8k.json"):
        write(tmp_path / name, "image,caption\n" if name[0] == "c" else '{"images": []}')
        with pytest.raises(ValueError, match="holds no captions"):
            load_split("flickr8k", tmp_path, "train")
        (tmp_path / name).unlink()


def test_unknown_datasets_and_splits_list_the_known(tmp_path):
    with pytest.raises(ValueError, match=r"dataset 'flicker' is not known; choose from flickr8k"):
        load_split("flicker", tmp_path, "train")
    with pytest.raises(ValueError, match=r"split 'dev' is not known; choose from train, val, test"):
        load_split("flickr8k", tmp_path, "dev")


def test_data_lie_in_data_unless_told(monkeypatch, tmp_path):
    assert readers.data_folder("flickr8k", None) == Path("data/flickr8k")
    assert readers.data_folder("flickr8k", tmp_path) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert readers.data_folder("flickr8k", Path("~/f8k")) == tmp_path / "f8k"


def test_shapes_are_read_as_they_were_drawn(tmp_path):
    root = shapes.draw(tmp_path, train=3, val=2, test=2)
    _, _, captions = shapes.example(0, "val", 1)
    record = load_split("shapes", root, "val")[1]
    assert record.image_id == "val_00001.png" and record.captions == tuple(captions)
    assert record.path.is_file() and len(load_split("shapes", root, "train")) == 3
