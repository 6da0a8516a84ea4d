"""The model in the repository works right after a clone, and is what its card says."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny import picture
from PIL import Image
from safetensors import safe_open

from inference import SHIPPED, Captioner

ROOT = Path(__file__).parent.parent


def test_a_picture_is_captioned_with_nothing_named(tmp_path):
    picture(1, (300, 200)).save(tmp_path / "photo.jpg")
    done = subprocess.run(
        [sys.executable, ROOT / "inference.py", tmp_path / "photo.jpg"],
        capture_output=True,
        encoding="utf-8",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"using the shipped model {SHIPPED}\n"
    words = done.stdout.split()
    assert done.stdout.count("\n") == 1 and 4 <= len(words) <= 20
    known = Captioner.load(SHIPPED, "cpu").model.vocabulary.ids
    assert set(words) <= known.keys() and words[-1] not in ("a", "the", "in", "with")


def test_the_readmes_first_photograph_has_the_caption_that_it_says():
    captioner = Captioner.load(SHIPPED, "cpu", precision="float32")
    caption = captioner.caption(ROOT / "docs/examples/coffee.jpg")
    assert f"It prints `{caption}`" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_opens_with_a_figure_that_the_project_draws(tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    figure = ROOT / "docs/examples/attention.jpg"
    assert "](docs/examples/attention.jpg)" in "".join(readme.splitlines()[:8])
    assert figure.stat().st_size < 150_000
    scope = runpy.run_path(str(ROOT / "docs/examples/attention.py"))
    scope["main"](tmp_path / "attention.jpg")
    drawn, shown = (
        np.asarray(Image.open(path).convert("RGB"), np.float32)
        for path in (tmp_path / "attention.jpg", figure)
    )
    assert drawn.shape == shown.shape and np.abs(drawn - shown).mean() < 3  # of 255


def test_the_statistics_are_of_the_captions_that_the_card_names(header):
    statistics = json.loads((SHIPPED.parent / "caption_statistics.json").read_text())
    counts, rare = statistics["word_counts"], statistics["rare_words"]
    assert len(counts) == len(header["vocabulary"]) and counts == sorted(counts, reverse=True)
    assert counts[-1] == 4 and set(rare) == {"1", "2", "3"}  # --min-count
    words = sum(counts) + sum(int(count) * number for count, number in rare.items())
    assert words == sum(int(length) * n for length, n in statistics["lengths"].items())
    assert statistics["captions"] == sum(statistics["lengths"].values()) == 43031
    assert "43,031 captions" in (ROOT / "weights/README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def header() -> dict:
    with safe_open(SHIPPED, "pt") as file:
        return {key: json.loads(value) for key, value in file.metadata().items()}


def test_the_file_is_small_and_keeps_batchnorm_in_float32():
    assert SHIPPED.stat().st_size < 40e6
    with safe_open(SHIPPED, "pt") as file:
        kinds = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert kinds["encoder.cnn.bn1.running_var"] == torch.float32
    assert kinds["encoder.cnn.layer4.2.conv3.weight"] == torch.int8
    assert kinds["decoder.project.weight"] == torch.float16


def test_the_card_says_what_the_file_says(header):
    card = (ROOT / "weights/README.md").read_text(encoding="utf-8")
    assert f"{len(header['vocabulary']) + 4:,}" in card
    assert header["model"]["d_model"] == 256 and "width 256" in card
    critical = [each for each in header["training"]["mean_of"] if each["scst_epochs"]]
    assert {each["seed"] for each in critical} == {0, 1, 2}
    begun = [each["init_from"] for each in critical]
    assert all(each["img_size"] == header["model"]["img_size"] for each in begun)
    assert f"{header['model']['img_size']} x {header['model']['img_size']} pixels" in card
    assert all(each["also"] == ["csv:coco", "csv:web"] for each in begun)
    assert all(each["also"] == ["csv:coco"] for each in critical)  # the captions of people
    assert all(f"--views {each['views']}" in card for each in critical)
    assert f"--tags {header['model']['tags']}" in card
    assert f"--scst-lr {critical[0]['scst_lr']:.0e}".replace("e-0", "e-") in card


def test_the_file_names_no_path_of_a_machine(header):
    assert not any(sign in json.dumps(header["training"]) for sign in ("/", "\\\\"))
