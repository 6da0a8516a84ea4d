"""Images of your own: a captions table in any of six formats, and faults that name the line."""

import csv
import json
import zipfile
from pathlib import Path

import pandas as pd
import pytest
from helpers.datasets import save_image

import train
from readers import SplitMissingError, load_split, read_table
from util import files, tables

ROWS = [
    ("a.jpg", 'a "red" thing, and more', "train"),
    ("a.jpg", "लाल गेंद", "train"),
    ("deep/er/b.jpg", "красный мяч", "dev"),
    ("c d.jpg", "一个红色的球", "test"),
    ("deep/er/b.jpg", "tab\tand\nline", "validation"),
]


def write_csv(path: Path, rows=ROWS, header=("image", "caption", "split")) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        table.writerows([header, *rows])
    return path


def write_jsonl(path: Path, rows=ROWS, header=("image", "caption", "split")) -> Path:
    lines = [json.dumps(dict(zip(header, row, strict=True)), ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return path


def write_json(path: Path) -> Path:
    frame = pd.DataFrame(ROWS, columns=["image", "caption", "split"])
    frame.to_json(path, orient="records")
    return path


def write_excel(path: Path) -> Path:
    pytest.importorskip("openpyxl")
    pd.DataFrame(ROWS, columns=["image", "caption", "split"]).to_excel(path, index=False)
    return path


def write_parquet(path: Path) -> Path:
    pytest.importorskip("pyarrow")
    pd.DataFrame(ROWS, columns=["image", "caption", "split"]).to_parquet(path)
    return path


FORMS = {
    "captions.csv": write_csv,
    "captions.tsv": write_csv,
    "captions.json": write_json,
    "captions.jsonl": write_jsonl,
    "captions.xlsx": write_excel,
    "captions.parquet": write_parquet,
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of three images."""
    for name in ("a.jpg", "deep/er/b.jpg", "c d.jpg"):
        save_image(tmp_path / name)
    return tmp_path


def contents(root: Path) -> dict:
    return {
        split: {record.image_id: record.captions for record in load_split("csv", root, split)}
        for split in ("train", "val", "test")
    }


@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_same_captions_and_splits(form, folder):
    path = FORMS[form](folder / form)
    assert contents(folder) == contents(path) == {
        "train": {"a.jpg": ('a "red" thing, and more', "लाल गेंद")},
        "val": {"deep/er/b.jpg": ("красный мяч", "tab\tand\nline")},
        "test": {"c d.jpg": ("一个红色的球",)},
    }  # fmt: skip


def test_columns_come_in_any_order_and_case_among_others(folder):
    rows = [(7, split, line, image) for image, line, split in ROWS]
    write_csv(folder / "captions.csv", rows, ("id", "Split", "CAPTION", " Image "))
    other = folder / "other"
    other.mkdir()
    for name in ("a.jpg", "deep/er/b.jpg", "c d.jpg"):
        save_image(other / name)
    write_csv(other / "captions.csv")
    assert contents(folder) == contents(other)


def test_a_table_may_be_as_spreadsheets_leave_it(folder):
    text = "image,caption,split,,\na.jpg,a dog,train,,\n,,,,\n  ,,,,\n"
    (folder / "my.csv").write_text(text)
    (folder / "._my.csv").write_bytes(b"\0\1")  # a Mac's leftover
    (record,) = load_split("csv", folder, "train")
    assert record.captions == ("a dog",)


def test_keys_of_json_lines_may_be_in_upper_case(folder):
    (folder / "captions.jsonl").write_text('{"Image": "a.jpg", "CAPTION": "a", "Split": "Train"}\n')
    assert len(load_split("csv", folder, "train")) == 1


def test_a_table_of_any_name_is_found_if_it_is_the_only_one(folder):
    write_csv(folder / "my images.csv")
    assert len(load_split("csv", folder, "train")) == 1
    write_jsonl(folder / "b.jsonl")
    with pytest.raises(ValueError, match=r"several tables in .*: b\.jsonl, my images\.csv"):
        load_split("csv", folder, "train")
    write_csv(folder / "captions.csv")
    assert len(load_split("csv", folder, "train")) == 1


def test_images_may_lie_in_a_folder_beside_the_table_and_have_detours(folder):
    rows = [("./x/../a.jpg", "one", "train"), (f"{folder}/a.jpg", "two", "train")]
    (folder / "images").mkdir()
    (folder / "a.jpg").rename(folder / "images/a.jpg")
    write_csv(folder / "captions.csv", rows)
    (record,) = load_split("csv", folder, "train")
    assert record.captions == ("one", "two") and record.path == folder / "images/a.jpg"


def test_without_a_split_column_images_are_split_by_the_seed(tmp_path):
    rows = [(f"{number}.jpg", f"number {number}") for number in range(16) for _ in range(3)]
    for name, _ in rows:
        save_image(tmp_path / name)
    write_csv(tmp_path / "captions.csv", rows, ("image", "caption"))
    sizes = {split: len(images) for split, images in contents(tmp_path).items()}
    assert sizes == {"train": 12, "val": 2, "test": 2}
    first, again, other = (load_split("csv", tmp_path, "test", seed) for seed in (0, 0, 1))
    assert first == again != other
    write_csv(tmp_path / "captions.csv", [(*row, "") for row in rows])
    assert load_split("csv", tmp_path, "test") == first


def test_captions_in_any_script_train_and_print(tmp_path, capsys):
    lines = ["लाल गेंद", "красный мяч", "一个 红色 的 球", "كرة حمراء", "κόκκινη μπάλα"]
    rows = [(f"{n}.png", line, part) for n in range(4) for line in lines
            for part in [("train", "train", "train", "test")[n]]]  # fmt: skip
    for name, *_ in rows:
        save_image(tmp_path / name)
    write_csv(tmp_path / "captions.csv", rows)
    train.main([
        "--dataset", "csv", "--data-dir", str(tmp_path), "--output", str(tmp_path / "run"),
        "--cnn-backbone", "tiny", "--cnn-weights", "none", "--epochs", "8", "--min-count", "1",
        "--d-model", "32", "--n-decode", "1", "--lr", "0.01", "--ema", "0",
    ])  # fmt: skip
    said = capsys.readouterr().out
    assert "BLEU-4" in said and any(line in said for line in lines)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("captions.csv", "photo,text\na.jpg,a dog\n", "must have the columns image and caption"),
        ("captions.csv", "image,caption,caption\na.jpg,a,b\n", "each once"),
        ("captions.csv", "", "is empty"),
        ("captions.csv", "image,caption\n", "holds no captions"),
        ("captions.csv", "image,caption\na.jpg,a dog, a cat\n", "line 2 has 3 cells, not 2"),
        ("captions.csv", "image,caption\n../a.jpg,a dog\n", r"'\.\./a\.jpg' leaves the dataset's"),
        ("captions.csv", "image,caption\n/etc/a.jpg,a dog\n", r"leaves the dataset's folder"),
        ("captions.csv", "image,caption\nx/../../a.jpg,a\n", r"leaves the dataset's folder"),
        ("captions.tsv", "image,caption\na.jpg,a dog\n", "not 'image,caption'"),
        ("captions.csv", "image,caption,id\na.jpg,a,1\n\nb.jpg\n", "line 4 has 1 cells, not 3"),
        ("captions.csv", 'image,caption\na.jpg,"a dog\n', "unexpected end of data"),
        ("captions.csv", 'image,caption\na.jpg,"a\ndog"\nb.jpg\n', "line 4 has 1 cells, not 2"),
        ("captions.json", '{"images": []}', r"must have the columns .* not 'images'"),
        ("captions.json", '["a.jpg"]', r"line 1 is not \{"),
        ("captions.json", "[{]", "is not a JSON file"),
        ("captions.xlsx", "image,caption\n", "can't be read as a table"),
        ("captions.parquet", "image,caption\n", "can't be read as a table"),
        ("captions.csv", "image,caption,split\na.jpg,a,train\na.jpg,b,val\n", "a.jpg is listed as"),
        ("captions.csv", "image,caption,split\na.jpg,a,train\nb.jpg,b,\n", "1 of 2 images have no"),
        ("captions.csv", "image,caption,split\na.jpg,a,dog\n", "'dog' of a.jpg is not known"),
        ("captions.csv", "image,caption\na.jpg,a\n,b\n", "line 3 has no image"),
        ("captions.csv", "image,caption\na.jpg,a\nb.jpg,b\n", "2 of 2 images have no split"),
        ("captions.jsonl", "[" * 100000 + "\n", "line 1 is not JSON"),
        ("captions.jsonl", '{"image": "a.jpg"}\n', "must have the columns"),
        ("captions.jsonl", '{"image": "a.jpg", "caption": [3]}\n', "line 1 has no text"),
        ("captions.jsonl", '\n{"image": 3, "caption": "a"}\n', "line 2 has no text"),
        ("captions.jsonl", '["a.jpg", "a"]\n', r"line 1 is not \{"),
        ("captions.jsonl", "a.jpg,a dog\n", r"line 1 is not JSON"),
        ("captions.jsonl", '{"image": "a.jpg", "caption": "a", "split": 3}\n', "column split: '3'"),
    ],
)  # fmt: skip
def test_a_fault_is_named(name, text, said, folder):
    if name.endswith((".xlsx", ".parquet")):
        pytest.importorskip("openpyxl" if name.endswith(".xlsx") else "pyarrow")
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        load_split("csv", folder, "train")


def test_what_is_absent_is_named(folder):
    with pytest.raises(FileNotFoundError, match=r"no table of captions in .*captions\.csv"):
        load_split("csv", folder, "train")
    with pytest.raises(FileNotFoundError, match="no table of captions in .*gone"):
        load_split("csv", folder / "gone", "train")
    write_csv(folder / "captions.csv", ROWS[:2])
    with pytest.raises(SplitMissingError, match=r"no val split in .*; it holds train"):
        load_split("csv", folder, "val")


def test_a_table_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "captions.csv"
    path.write_bytes("image,caption\na.jpg,ça\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"captions\.csv is not a text file in UTF-8"):
        read_table(path)


@pytest.mark.parametrize(("image", "caption"), [("file_name", "text"), ("image_name", "comment")])
def test_columns_of_other_datasets_are_known(image, caption, folder):
    write_csv(folder / "metadata.csv", ROWS, (image, caption, "split"))
    other = folder / "other"
    for name in ("a.jpg", "deep/er/b.jpg", "c d.jpg"):
        save_image(other / name)
    write_csv(other / "captions.csv")
    assert contents(folder) == contents(other)


def test_kaggles_flickr30k_table_is_read_with_the_row_that_lacks_a_bar(folder):
    text = 'image_name| comment_number| comment\na.jpg| 0| "Two" men .\na.jpg| 1| A dog .\n'
    path = folder / "results.csv"
    path.write_text(text + "a.jpg| 2   A dog runs across the grass .\n")
    captions = ['"Two" men .', "A dog .", "A dog runs across the grass ."]
    assert read_table(path)["caption"].tolist() == captions
    path.write_text(text + "a.jpg| A dog .\n")
    with pytest.raises(ValueError, match=r"line 4 has 2 cells, not 3: \['a.jpg', 'A dog"):
        read_table(path)


def test_kaggles_flickr8k_table_is_read_from_its_folder(folder):
    (folder / "captions.txt").write_text('image,caption\na.jpg,A dog .\nc d.jpg,"A, b ."\n')
    assert read_table(folder / "captions.txt")["caption"].tolist() == ["A dog .", "A, b ."]
    (folder / "captions.txt").write_text("image,caption,split\na.jpg,A dog .,train\n")
    assert load_split("csv", folder, "train")[0].captions == ("A dog .",)


@pytest.mark.parametrize("image", ["Image_Path", "FILE", "path", "filename"])
@pytest.mark.parametrize("caption", ["Caption_Text", "description", "SENTENCE"])
def test_other_names_of_columns_are_known_and_said(image, caption, folder, caplog):
    path = write_csv(folder / "mine.csv", ROWS[:1], (image, caption, "split"))
    assert read_table(path)["caption"].tolist() == [ROWS[0][1]]
    assert f"mine.csv is read with image = {image.lower()}; caption = {caption.lower()}" in (
        caplog.text
    )


@pytest.mark.parametrize("separator", [",", ";", "|", "\t", ", ", "; "])
def test_separators_are_found_out(separator, folder):
    cell = "a wet dog" if separator == "|" else '"a wet, dog; it | runs"'
    lines = [("image", "a,b,c;d" if separator == "\t" else "note", "caption"), ("a.jpg", "1", cell)]
    path = folder / "captions.csv"
    path.write_text("".join(separator.join(line) + "\n" for line in lines))
    assert read_table(path)["caption"].tolist() == [cell.strip('"')]


def test_a_quote_after_a_space_that_encloses_no_cell_is_text(folder):
    (folder / "captions.csv").write_text('image, caption\na.jpg, "Two" men\n')
    assert read_table(folder / "captions.csv")["caption"].tolist() == ['"Two" men']


@pytest.mark.parametrize("names", [("caption_0", "caption_1"), ("caption1", "Caption2")])
def test_each_numbered_column_is_a_caption_and_empty_cells_none(names, folder):
    rows = [("a.jpg", "one", "two"), ("c d.jpg", "", "three"), ("deep/er/b.jpg", "", "")]
    path = write_csv(folder / "captions.csv", rows, ("image", *names))
    table = read_table(path)
    assert table["caption"].tolist() == ["one", "two", "three", ""]
    assert table["image_id"].tolist() == ["a.jpg", "a.jpg", "c d.jpg", "deep/er/b.jpg"]


def test_of_two_columns_of_captions_the_one_called_caption_is_read(folder):
    write_csv(folder / "captions.csv", [("a.jpg", "a note", "a dog")], ("image", "text", "caption"))
    assert read_table(folder / "captions.csv")["caption"].tolist() == ["a dog"]


def test_two_columns_of_captions_of_other_names_are_one_line(folder):
    write_csv(folder / "captions.csv", ROWS, ("image", "comment", "text"))
    with pytest.raises(files.UserError, match="several columns of captions: comment, text; ren"):
        load_split("csv", folder, "train")


@pytest.mark.parametrize("name", ["captions.json", "mine.json"])
def test_cocos_annotations_are_read_under_any_name(name, folder):
    names = ["a.jpg", "deep/er/b.jpg", "c d.jpg"]
    value = {
        "images": [{"id": number, "file_name": name} for number, name in enumerate(names, 7)],
        "annotations": [{"image_id": number, "caption": f"{number}"} for number in (7, 8, 9)],
    }
    (folder / name).write_text(json.dumps(value))
    root = folder if name == "captions.json" else folder / name
    found = [load_split("csv", root, split)[0] for split in ("train", "val", "test")]
    assert {record.image_id: record.captions for record in found} == {
        7: ("7",), 8: ("8",), 9: ("9",)
    }  # fmt: skip


def test_paths_as_windows_writes_them_are_found(folder):
    write_csv(folder / "captions.csv", [(r"deep\er\b.jpg", "a dog", "train")])
    assert load_split("csv", folder, "train")[0].path == folder / "deep/er/b.jpg"


@pytest.mark.parametrize("name", ["\\", "\\\\", "..\\", "deep\\er", ".\\deep"])
def test_a_backslash_is_no_separator_where_that_would_name_a_folder(name, folder):
    (folder / "deep/er").mkdir(parents=True, exist_ok=True)
    write_csv(folder / "captions.csv", [(name, "a dog", "train")])
    assert read_table(folder / "captions.csv")["file"].tolist() == [name]


@pytest.mark.parametrize("text", ["007", "NA", "null", "1.0", "True", "2024-01-01", "=1", "#a"])
def test_a_caption_is_never_taken_for_anything_but_text(text, folder):
    write_csv(folder / "captions.csv", [("a.jpg", text, "train")])
    assert load_split("csv", folder, "train")[0].captions == (text,)


def test_other_json_files_are_no_tables(folder):
    (folder / "settings.json").write_text("{}")
    write_csv(folder / "mine.csv", ROWS[:2])
    assert len(load_split("csv", folder, "train")) == 1


@pytest.mark.parametrize(("name", "package"), [("a.xlsx", "openpyxl"), ("a.parquet", "pyarrow")])
def test_a_package_that_is_absent_is_named(name, package, folder, monkeypatch):
    def absent(*_, **__):
        raise ImportError("Missing optional dependency")

    monkeypatch.setattr(pd, "read_excel", absent)
    monkeypatch.setattr(pd, "read_parquet", absent)
    (folder / name).touch()
    with pytest.raises(ValueError, match=f"is read with {package}: pip install {package}$"):
        load_split("csv", folder, "train")


def test_an_excel_file_that_unpacks_to_far_more_than_its_size_is_one_line(tmp_path):
    pytest.importorskip("openpyxl")
    with zipfile.ZipFile(tmp_path / "a.xlsx", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/sharedStrings.xml", bytes(60_000_000))
    with pytest.raises(files.UserError, match=r"a\.xlsx unpacks to 60 MB, too much for a table"):
        tables.read_table(tmp_path / "a.xlsx", {"image": ["image"]})


def test_text_files_beside_images_have_a_caption_per_line(folder):
    (folder / "a.txt").write_text("a dog\n\nanother dog\n")
    (folder / "deep/er/b.txt").write_text("a cat")
    (folder / "c d.txt").write_text("a cow\n")
    records = [load_split("sidecar", folder, split)[0] for split in ("train", "val", "test")]
    assert {record.image_id: record.captions for record in records} == {
        "a.jpg": ("a dog", "another dog"),
        "deep/er/b.jpg": ("a cat",),
        "c d.jpg": ("a cow",),
    }


def test_images_without_any_text_beside_them_are_one_line(folder):
    with pytest.raises(FileNotFoundError, match=r"text files beside images, such as dog\.txt"):
        load_split("sidecar", folder, "train")


def test_linked_folders_of_images_beside_texts_are_followed_once(tmp_path, caplog):
    root, outside = tmp_path / "photos", tmp_path / "outside"
    for place, name in ((root / "a/b/c/d", "one"), (outside, "two"), (root, "three")):
        save_image(place / f"{name}.jpg")
        (place / f"{name}.txt").write_text(f"a {name}\n")
    (root / "movie.mov").touch()
    (root / "table.csv").touch()
    try:
        (root / "again").symlink_to(root / "a", target_is_directory=True)
        (root / "a/loop").symlink_to(root, target_is_directory=True)
        for name in ("linked", "linked-too"):
            (root / name).symlink_to(outside, target_is_directory=True)
    except OSError:
        pytest.skip("links are not allowed here")
    records = [each for split in ("train", "val", "test") for each in load_split(
        "sidecar", root, split
    )]  # fmt: skip
    assert {record.image_id: record.captions for record in records} == {
        "a/b/c/d/one.jpg": ("a one",), "linked/two.jpg": ("a two",), "three.jpg": ("a three",)
    }  # fmt: skip
    assert "2 files that are no images: 1 .csv, 1 .mov" in caplog.text or (
        "2 files that are no images: 1 .mov, 1 .csv" in caplog.text
    )


@pytest.mark.parametrize(
    "cells",
    [("a dog", "a cat"), (["a dog"], ["a cat"]), ({"caption": "a dog"}, {"caption": "a cat"})],
)
def test_a_json_object_may_have_a_key_per_image(cells, folder):
    value = dict(zip(("a.jpg", "c d.jpg"), cells, strict=True))
    (folder / "captions.json").write_text(json.dumps(value))
    table = read_table(folder / "captions.json")
    assert table["file"].tolist() == ["a.jpg", "c d.jpg"]
    assert table["caption"].tolist() == ["a dog", "a cat"]
