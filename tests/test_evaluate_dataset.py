"""What a checkpoint says of its data: the kind of dataset, the seed of its split, drawings."""

import json

import pytest
from helpers.datasets import write_colours
from helpers.tiny import COLOURS, run_script, tiny_model

import evaluate
import train
from corpora import read_trained
from readers import load_split
from util import shapes

SCORE = ("--workers", 0, "--no-java", "--device", "cpu")


def save(folder, **training):
    """Write a model that was trained as these flags say; return the folder of its run."""
    folder.mkdir()
    tiny_model().save(folder / "best.safetensors", training=training)
    return folder


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    return shapes.draw(tmp_path_factory.mktemp("drawings"), train=2, val=2, test=2)


def test_a_run_is_evaluated_without_naming_its_dataset(tmp_path, capsys):
    photos, output = write_colours(tmp_path / "photos"), tmp_path / "run"
    flags = (*COLOURS, "--data-dir", photos, "--output", output, "--epochs", 1)
    assert run_script(train, *flags, capsys=capsys)[0] == 0
    flags = ("--checkpoint", output, "--data-dir", photos, *SCORE)
    code, out, err = run_script(evaluate, *flags, "--json", tmp_path / "a.json", capsys=capsys)
    assert (code, out.splitlines()[0], err) == (0, "csv test, 2 images", "")
    assert json.loads((tmp_path / "a.json").read_text())["dataset"] == "csv"
    exported = output / "best.safetensors"
    code, out, err = run_script(evaluate, "--checkpoint", exported, *flags[2:], capsys=capsys)
    assert (code, out.splitlines()[0]) == (0, "csv test, 2 images")


def test_the_random_split_is_that_of_the_training(tmp_path, capsys):
    photos = write_colours(tmp_path / "photos")
    table = photos / "captions.csv"
    rows = [line.rpartition(",")[0] for line in table.read_text().splitlines()]
    table.write_text("\n".join(rows))
    run = save(tmp_path / "run", dataset="csv", split_seed=5)

    def score(*flags):
        place = tmp_path / "captions.json"
        place.unlink(missing_ok=True)
        flags = ("--checkpoint", run, "--data-dir", photos, "--captions-json", place, *flags)
        code, _, err = run_script(evaluate, *flags, *SCORE, capsys=capsys)
        assert code == 0, err
        return {row["image_id"] for row in json.loads(place.read_text())}

    def split(seed):
        return {record.image_id for record in load_split("csv", photos, "test", seed)}

    assert split(5) != split(0)
    assert score() == split(5)
    assert score("--split-seed", 0) == split(0)


@pytest.mark.parametrize(
    ("training", "kind"),
    [
        ({"dataset": "shapes"}, "shapes"),
        ({"dataset": "coco", "also": ["csv:photos", "sidecar:lora"]}, "coco"),
        ({"mean_of": [{"dataset": "coco"}, {"dataset": "csv"}]}, "coco"),
        ({}, "flickr8k"),
        ({"dataset": "of another version"}, "flickr8k"),
        ({"dataset": ["csv"], "also": 3, "mean_of": 7}, "flickr8k"),
        ({"dataset": "csv", "split_seed": "5", "image_column": "a\x1bb", "init_from": 3}, "csv"),
    ],
)
def test_what_the_header_says_of_the_dataset_is_read_whatever_it_is(training, kind, tmp_path):
    trained = read_trained(save(tmp_path / "run", **training))
    assert trained.pick_dataset(None) == trained.pick_dataset("elsewhere") == kind
    assert (trained.split_seed, trained.columns) == (0, (None, None))


def test_a_further_dataset_of_a_run_is_known_by_its_folder(tmp_path):
    run = save(tmp_path / "run", dataset="coco", also=["csv:photos", "sidecar:lora"])
    trained = read_trained(run)
    assert trained.pick_dataset("elsewhere/photos/") == "csv"
    assert trained.pick_dataset("lora") == "sidecar"


@pytest.mark.parametrize("also", [[], ["csv:photos"]])
def test_drawings_scored_with_a_model_of_photographs_are_one_line(
    also, drawings, tmp_path, capsys, caplog
):
    run = save(tmp_path / "run", dataset="flickr8k", also=also)
    flags = ("--checkpoint", run, "--dataset", "shapes", "--data-dir", drawings, *SCORE)
    code = run_script(evaluate, *flags, capsys=capsys)[0]
    kinds = "csv, flickr8k" if also else "flickr8k"
    assert (code, len(caplog.messages)) == (0, 1)
    assert f"was trained on photographs ({kinds}) and is scored on drawings (shapes)" in caplog.text


def test_photographs_scored_with_a_model_of_drawings_are_one_line(tmp_path, capsys, caplog):
    photos = write_colours(tmp_path / "photos")
    run = save(tmp_path / "run", dataset="shapes")
    flags = ("--checkpoint", run, "--dataset", "csv", "--data-dir", photos, *SCORE)
    code = run_script(evaluate, *flags, capsys=capsys)[0]
    assert (code, len(caplog.messages)) == (0, 1)
    assert "was trained on drawings (shapes) and is scored on photographs (csv)" in caplog.text


@pytest.mark.parametrize(
    ("training", "dataset"),
    [
        ({"dataset": "shapes"}, "shapes"),
        ({"dataset": "csv"}, "coco"),
        ({"dataset": "csv", "also": ["shapes:data"]}, "shapes"),
        ({"dataset": "csv", "init_from": {"dataset": "shapes"}}, "shapes"),
        ({"dataset": "shapes", "init_from": {"mean_of": [{"dataset": "coco"}]}}, "csv"),
        ({"dataset": "shards"}, "shapes"),
        ({"dataset": "shapes"}, "shards"),
        ({}, "shapes"),
    ],
)
def test_where_it_fits_or_is_not_known_nothing_is_said(training, dataset, tmp_path, caplog):
    read_trained(save(tmp_path / "run", **training)).warn_of_other_kind(dataset)
    assert not caplog.messages


def test_captions_made_elsewhere_need_no_model(drawings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "read_trained", lambda path: pytest.fail("a model was read"))
    records = load_split("shapes", drawings, "test")
    rows = [{"image_id": each.image_id, "caption": each.captions[0]} for each in records]
    (tmp_path / "captions.json").write_text(json.dumps(rows))
    flags = ("--captions", tmp_path / "captions.json", "--dataset", "shapes")
    code, out, _ = run_script(evaluate, *flags, "--data-dir", drawings, *SCORE, capsys=capsys)
    assert (code, out.splitlines()[0]) == (0, "shapes test, 2 images")
