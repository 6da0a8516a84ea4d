"""Tables whose columns have other names: --image-column and --caption-column of every script."""

import csv
import json
from pathlib import Path

import pandas as pd
import pytest
from helpers.datasets import write_colours
from helpers.tiny import COLOURS, run_script

import evaluate
import features
import train
from config import configure
from readers import Columns, load_split
from util import files

NAMED = ("--image-column", "Bild", "--caption-column", "Was zu sehen ist")


def rename(folder: Path, form: str = "captions.csv", names=("Bild", "Was zu sehen ist")) -> Path:
    """Give the table of `write_colours` other columns, beside one that is called caption."""
    with open(folder / "captions.csv", encoding="utf-8") as file:
        rows = [(a, b, c, "a wrong one") for a, b, c in list(csv.reader(file))[1:]]
    (folder / "captions.csv").unlink()
    table = pd.DataFrame(rows, columns=[*names, "split", "caption"])
    path = folder / form
    if path.suffix == ".csv":
        table.to_csv(path, index=False, sep=";")
    elif path.suffix == ".xlsx":
        pytest.importorskip("openpyxl")
        table.to_excel(path, index=False)
    elif path.suffix == ".parquet":
        pytest.importorskip("pyarrow")
        table.to_parquet(path)
    else:
        table.to_json(path, orient="records", lines=path.suffix == ".jsonl")
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_colours(tmp_path / "photos")


@pytest.mark.parametrize("ending", ["csv", "xlsx", "parquet", "json", "jsonl"])
def test_named_columns_are_read_from_every_form(ending, folder):
    rename(folder, f"captions.{ending}")
    for names in (Columns("Bild", "Was zu sehen ist"), Columns("bild ", "WAS ZU SEHEN IST")):
        records = load_split("csv", folder, "val", columns=names)
        assert [each.captions for each in records] == [("a red apple",), ("a blue ocean",)]


def test_a_run_its_resumption_and_its_evaluation_know_the_columns(folder, tmp_path, capsys):
    rename(folder)
    output = tmp_path / "run"
    flags = [*COLOURS, *NAMED, "--data-dir", folder, "--output", output, "--epochs", 1]
    code, out, err = run_script(train, *flags, capsys=capsys)
    assert (code, "8 train, 2 val, 2 test images, 9 words" in out) == (0, True), err
    flags = json.loads((output / "config.json").read_text())
    assert (flags["image_column"], flags["caption_column"]) == (NAMED[1], NAMED[3])
    again = ("--resume", "--output", output, "--epochs", 2)
    code, out, err = run_script(train, *again, capsys=capsys)
    assert (code, "8 train, 2 val" in out, "changed" in err) == (0, True, False), err
    score = ("--checkpoint", output, "--data-dir", folder, "--workers", 0, "--no-java")
    code, out, err = run_script(evaluate, *score, capsys=capsys)
    assert (code, out.splitlines()[0]) == (0, "csv test, 2 images"), err


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_column_that_is_not_there_is_one_line_that_lists_those_that_are(
    ending, folder, tmp_path, capsys
):
    rename(folder, f"captions.{ending}", ("photo", "words"))
    output = tmp_path / "run"
    flags = (*COLOURS, *NAMED[:2], "--data-dir", folder, "--output", output)
    code, out, err = run_script(train, *flags, capsys=capsys)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"captions.{ending} has no column 'Bild'; it has photo, words, split, caption" in err
    assert not output.exists()


@pytest.mark.parametrize("script", [train, evaluate, features])
@pytest.mark.parametrize("dataset", ["shapes", "flickr8k", "sidecar"])
def test_columns_of_other_datasets_are_refused_in_one_line(
    script, dataset, folder, tmp_path, capsys
):
    place = ("--shards",) if script is features else ("--output",) if script is train else ()
    place = (*place, tmp_path / "new") if place else ()
    flags = (*place, "--dataset", dataset, "--data-dir", folder, *NAMED)
    code, out, err = run_script(script, *flags, capsys=capsys)
    assert (code, out, len(err.strip().splitlines()[-1:])) == (2, "", 1)
    said = "--image-column Bild and --caption-column Was zu sehen ist is for tables of your own"
    assert f"{said} (--dataset csv), not for --dataset {dataset}" in err
    assert not (tmp_path / "new").exists()


def test_columns_may_be_those_of_a_further_dataset(folder, tmp_path):
    flags = ["--dataset", "flickr8k", "--data-dir", str(tmp_path), *NAMED]
    assert configure([*flags, "--also", f"csv:{folder}"]).data.columns == Columns(*NAMED[1::2])
    with pytest.raises(files.UserError, match="not for --dataset flickr8k and sidecar"):
        configure([*flags, "--also", f"sidecar:{folder}"])


def test_shards_are_made_of_named_columns(folder, tmp_path, capsys):
    pytest.importorskip("webdataset")
    rename(folder)
    flags = ("--shards", tmp_path / "shards", "--dataset", "csv", "--data-dir", folder, *NAMED)
    code, out, err = run_script(features, *flags, capsys=capsys)
    assert (code, "train: 8 images with 8 captions" in out) == (0, True), err


def test_cocos_annotations_have_no_columns(tmp_path):
    (tmp_path / "captions.json").write_text('{"images": [], "annotations": []}')
    with pytest.raises(files.UserError, match="COCO's annotations, no columns; leave out --image"):
        load_split("csv", tmp_path, "train", columns=Columns("Bild"))


def test_a_named_column_may_be_several_numbered_ones(folder):
    rows = "Bild,Satz_1,Satz_2,split\ntrain-0.png,one,two,train\ntrain-1.png,,three,train\n"
    (folder / "captions.csv").write_text(rows)
    records = load_split("csv", folder, "train", columns=Columns("Bild", "Satz"))
    assert [each.captions for each in records] == [("one", "two"), ("three",)]
    records = load_split("csv", folder, "train", columns=Columns("Bild", "Satz_2"))
    assert [each.captions for each in records] == [("two",), ("three",)]


@pytest.mark.parametrize("name", ["caption", "captions", "sentences"])
@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet"])
def test_a_cell_may_have_a_list_of_captions(name, ending, folder):
    rows = [
        {"image": "train-0.png", name: ["one", "two"], "split": "train"},
        {"image": "train-1.png", name: ["three"], "split": "train"},
        {"image": "train-2.png", name: [], "split": "train"},
    ]
    (folder / "captions.csv").unlink()
    if ending == "parquet":
        pytest.importorskip("pyarrow")
        pd.DataFrame(rows).to_parquet(folder / "captions.parquet")
    else:
        lines = [json.dumps(row) for row in rows]
        text = "\n".join(lines) if ending == "jsonl" else f"[{','.join(lines)}]"
        (folder / f"captions.{ending}").write_text(text)
    records = load_split("csv", folder, "train")
    assert [each.captions for each in records] == [("one", "two"), ("three",)]
