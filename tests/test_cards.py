"""What the page says of its model and sample photographs is what their files say."""

import re
from pathlib import Path

import pytest
from helpers.tiny import tiny_model

import app
from inference import SHIPPED
from util import cards

ROOT = Path(__file__).parent.parent


def test_the_shipped_model_is_described_as_its_card_does(tmp_path):
    card = " ".join((ROOT / "weights/README.md").read_text(encoding="utf-8").split())
    fact = re.search(
        r"Of a hundred everyday photographs .*?(\d+) had a caption with nothing false", card
    )
    found = app.describe_model(None)
    assert found["warning"] == (
        "Captions are often wrong: of a hundred everyday photographs, "
        f"{fact[1]} had a caption with nothing false in it."
    )
    assert found["name"] == "the shipped model" and found["sure"] == app.SURE
    assert found["about"] == "resnet50 and transformer, trained on flickr8k, coco, web"
    copy = tmp_path / "copy.safetensors"
    copy.symlink_to(SHIPPED)
    assert app.describe_model([copy]) == found


def test_a_model_of_ones_own_is_described_by_its_name_and_header(tmp_path):
    training = {
        "dataset": "csv",
        "also": ["coco:/home/someone/secret/photos/"],
        "init_from": {"dataset": "flickr8k"},
    }
    for name in ("my-run/best.safetensors", "other.v2.safetensors"):
        tiny_model().save(tmp_path / name, training=training)
    about = "tiny and transformer, trained on csv, photos, flickr8k"
    for path, name in [
        ("my-run", "my-run"), ("my-run/best.safetensors", "my-run"),
        ("other.v2.safetensors", "other.v2"),
    ]:  # fmt: skip
        assert app.describe_model([tmp_path / path]) == {
            "name": name, "about": about, "warning": "Captions are often wrong.", "sure": None
        }  # fmt: skip
    both = app.describe_model([tmp_path / "my-run", tmp_path / "other.v2.safetensors"])
    assert (both["name"], both["about"]) == ("my-run + other.v2", about)
    assert app.describe_model([tmp_path / "model.onnx"])["name"] == "model"


@pytest.mark.parametrize(
    "training", [None, 7, "x", [], {"also": 7, "dataset": ["a"], "init_from": 3}]
)
def test_a_header_of_another_program_says_nothing(training):
    assert cards.describe_header({"training": training}) == ""


def test_a_header_as_deep_as_a_file_can_hold_is_read():
    training = {"dataset": "coco"}
    for _ in range(10_000):
        training = {"init_from": training}
    assert cards.describe_header({"training": training}) == "trained on coco"


def test_every_sample_photograph_has_its_credit_and_licence():
    found = cards.list_examples(app.EXAMPLES)
    photos = {path.name for path in app.EXAMPLES.glob("*.jpg")} - {"attention.jpg", "captions.jpg"}
    assert {each["name"] for each in found} == photos and len(found) == len(photos) >= 8
    for each in found:
        assert each["credit"] and each["licence"] and not set("[]()`|") & set(each["credit"])
        if each["licence"].startswith("CC BY"):
            assert each["link"].startswith("https://") and ", by " in each["credit"]


def test_a_clone_without_the_samples_has_a_page_without_them(tmp_path, captioner, monkeypatch):
    assert cards.list_examples(tmp_path / "nothing") == []
    (tmp_path / "README.md").write_text(
        "| `../a.jpg` | a | b | c |\n| `gone.jpg` | a | b | CC0 |\n"
    )
    assert cards.list_examples(tmp_path) == []
    monkeypatch.setattr(app, "EXAMPLES", tmp_path)
    client = app.create_app(captioner).test_client()
    assert client.get("/health").get_json()["examples"] == []
    assert client.get("/examples/README.md").status_code == 404


def test_samples_alone_are_served(captioner):
    client = app.create_app(captioner).test_client()
    answer = client.get("/examples/cat.jpg")
    assert answer.mimetype == "image/jpeg"
    assert answer.data == (app.EXAMPLES / "cat.jpg").read_bytes()
    for name in ("README.md", "captions.jpg", "captions.py", "..%2f..%2fREADME.md", "x.jpg"):
        assert client.get(f"/examples/{name}").status_code == 404
