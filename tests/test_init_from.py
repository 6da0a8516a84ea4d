"""A run that starts from another model: its words, new ones, and the scores before training."""

import csv
import itertools
import math
import shutil
from pathlib import Path

import pytest
import torch
from helpers.datasets import write_colours
from helpers.tiny import COLOURS, assert_same_run

import inference
import train
from decoder import DECODERS, DecoderConfig
from encoder import Encoder
from model import CaptionModel, add_rows
from model_file import read_metadata
from util import plots
from vocabulary import UNK, Vocabulary

KNOWN = ["a", "red", "blue", "dog"]
NEW = ["rex", "ocean", "apple"]


def build(decoder: str, tied: bool, words: list[str]) -> CaptionModel:
    sizes = DecoderConfig(decoder, d_model=16, n_head=2, n_decode=1, fc_dim=32, tie_weights=tied)
    torch.manual_seed(len(words))
    model = CaptionModel(Encoder("tiny", "all"), sizes, Vocabulary(words), 32).eval()
    return model


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """They take most of the time of so small a run."""
    for name in ("learning_curve", "caption_page"):
        monkeypatch.setattr(plots, name, lambda *arguments, **options: None)


@pytest.mark.parametrize(("decoder", "tied"), list(itertools.product(DECODERS, (True, False))))
@torch.no_grad()
def test_new_words_leave_the_others_as_they_were_and_begin_between_them_and_unk(decoder, tied):
    small, large = build(decoder, tied, KNOWN), build(decoder, tied, [*KNOWN, *NEW])
    for parameter in small.decoder.parameters():  # biases too
        torch.nn.init.normal_(parameter, std=0.7)
    shares = [0.6, 0.3, 0.01]
    large.load_state_dict(add_rows(small.state_dict(), large.state_dict(), shares))
    images, owner = torch.randn(2, 3, 32, 32), torch.tensor([0, 0, 1])
    tokens = torch.tensor([[1, 4, 5, 2], [1, 6, 2, 0], [1, 3, 7, 2]])
    before, after = (model(images, tokens, owner).logits for model in (small, large))
    torch.testing.assert_close(after[..., : before.shape[-1]], before)
    # Each lies between the mean of the words (share 1/4 and less) and <unk> (share 1).
    real = tokens[:, 1:] != 0
    old, new = after[real].split([len(before[0, 0]), len(NEW)], -1)
    for column, share in enumerate(shares):
        weight = max(0, 1 + math.log(share) / math.log(4))
        expected = (1 - weight) * old[:, 4:].mean(-1) + weight * old[:, UNK]
        torch.testing.assert_close(new[:, column], expected)
        limit = share * old.softmax(-1)[:, UNK] ** weight
        assert weight == 0 or (after.softmax(-1)[real][:, 8 + column] <= limit).all()


@pytest.fixture
def home(tmp_path) -> Path:
    """Return a folder with images, captions with three new words, and a model to start from."""
    rows = ("train-0.png,rex and a red apple,train", "train-1.png,a blue ocean,train")
    write_colours(tmp_path / "data", rows)
    build("transformer", True, KNOWN).save(tmp_path / "model.safetensors", training={"x": 1})
    return tmp_path


def start(home: Path, *more: str) -> list[dict[str, str]]:
    """Train from the model; return the rows of metrics.csv."""
    train.main([
        *("--dataset", "csv", "--data-dir", str(home / "data"), "--output", str(home / "run")),
        *("--cache-dir", str(home / "cache"), "--init-from", str(home / "model.safetensors")),
        *("--workers", "0", "--batch-size", "4", *more),
    ])  # fmt: skip
    with (home / "run/metrics.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_frequent_new_words_are_learned_and_rare_ones_named(home, capsys, caplog):
    rows = start(home, "--min-count", "2", "--epochs", "30", "--patience", "0", "--lr", "0.01")
    assert "new words, beside the 4 of" in (said := capsys.readouterr().out)
    assert "ocean (5), apple (5)" in said or "apple (5), ocean (5)" in said
    (line,) = [line for line in caplog.messages if "stay unknown" in line]
    assert "--min-count 2 times: and (1), rex (1)" in line
    assert read_metadata(home / "run")["vocabulary"] == [*KNOWN, "apple", "ocean"]
    assert [row["epoch"] for row in rows] == [str(epoch) for epoch in range(31)]
    assert rows[0]["train_loss"] == rows[0]["lr"] == "" and float(rows[0]["val_loss"]) > 1
    assert float(rows[30]["val_loss"]) < 0.5 * float(rows[0]["val_loss"])
    caption = inference.caption(home / "data/val-1.png", checkpoint=home / "run")
    assert caption in ("a red apple", "a blue ocean")
    assert "epoch 0, before training, val loss" in said
    assert "no epoch was better" not in said


def test_where_no_epoch_is_better_the_best_model_is_the_initial_one(home, capsys):
    rows = start(home, "--lr", "1e-9", "--min-count", "99", "--epochs", "2")
    assert rows[0]["CIDEr"] == rows[2]["CIDEr"]
    assert "no epoch was better than epoch 0" in capsys.readouterr().out
    first, best = (CaptionModel.load(home / name) for name in ("model.safetensors", "run"))
    assert read_metadata(home / "run")["scores"]["epoch"] == 0
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, best.state_dict()[name])


def test_a_run_resumes_exactly_without_the_model_that_it_started_from(home, capsys):
    flags = ("--min-count", "1", "--epochs", "2")
    start(home, *flags)
    shutil.move(home / "run", home / "whole")
    start(home, *flags)
    (home / "run/previous.pt").replace(home / "run/last.pt")
    (home / "model.safetensors").unlink()
    capsys.readouterr()
    train.main(["--resume", "--output", str(home / "run")])
    assert "epoch 0, before training" not in capsys.readouterr().out
    assert_same_run(home / "run", home / "whole")
    assert read_metadata(home / "run")["training"]["init_from"] == {"x": 1}


def test_few_images_are_told_what_helps_before_any_work(tmp_path, caplog):
    write_colours(tmp_path / "data")
    place = ["--data-dir", str(tmp_path / "data"), "--epochs", "1"]
    train.main([*COLOURS, *place, "--output", str(tmp_path / "run")])
    (line,) = [line for line in caplog.messages if "training images are few" in line]
    assert line.startswith("8 training images") and "captioner.safetensors" in line
    caplog.clear()
    for more in (["--limit", "4"], ["--init-from", str(tmp_path / "run")]):
        train.main([*COLOURS, *place, "--output", str(tmp_path / f"run{len(more[0])}"), *more])
    assert not [line for line in caplog.messages if "training images are few" in line]
