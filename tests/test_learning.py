"""A model trained on the drawn shapes with the README's command captions unseen drawings truly."""

import contextlib
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.scene_parser import is_true

import inference
import train
from util import files


@pytest.fixture(scope="module")
def shapes_run(tmp_path_factory) -> SimpleNamespace:
    """Train shapes with the README's own settings; `folder`, `data` and what was `said`."""
    base = tmp_path_factory.mktemp("shapes")
    folder, data, said = base / "run", base / "data", io.StringIO()
    with contextlib.redirect_stdout(said):
        train.main(["--dataset", "shapes", "--data-dir", str(data), "--output", str(folder)])
    return SimpleNamespace(folder=Path(folder), data=Path(data), said=said.getvalue())


def test_shapes_captions_are_true_of_their_pictures(shapes_run):
    images = files.read_json(shapes_run.data / "captions.json")["images"]
    test = [image for image in images if image["split"] == "test"]
    paths = [shapes_run.data / "images" / image["filename"] for image in test]
    captions = inference.caption(paths, checkpoint=shapes_run.folder)
    true = sum(is_true(text, image["scene"]) for text, image in zip(captions, test, strict=True))
    assert len(test) == 500
    assert true / len(test) >= 0.95


def test_shapes_training_says_its_scores_and_captions(shapes_run):
    assert "CIDEr" in shapes_run.said and "test_00000.png: " in shapes_run.said
    assert json.loads((shapes_run.folder / "scores.json").read_text())["test"]["CIDEr"] > 1
