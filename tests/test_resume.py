"""A resumed run keeps its own words whatever became of the captions, and says what changed."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers.datasets import write_colours
from helpers.tiny import COLOURS, assert_same_run

import train
from model import CaptionModel
from model_file import read_metadata
from util import plots


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """Return a folder with the data, and in it a run of one epoch."""
    home = write_colours(tmp_path_factory.mktemp("colours") / "data").parent
    place = ["--data-dir", str(home / "data"), "--output", str(home / "run")]
    train.main([*COLOURS, *place, "--epochs", "1"])
    return home


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """They take most of the time of so small a run."""
    for name in ("learning_curve", "caption_page"):
        monkeypatch.setattr(plots, name, lambda *arguments, **options: None)


@pytest.fixture
def home(begun, tmp_path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "home"))


def resume(home: Path, *more: str) -> None:
    place = ["--data-dir", str(home / "data"), "--output", str(home / "run")]
    train.main(["--resume", *place, "--epochs", "2", *more])


def forget(run: Path, *names: str) -> None:
    """Take entries out of last.pt, as if an older version had written it."""
    state = torch.load(run / "last.pt", weights_only=True)
    torch.save({key: value for key, value in state.items() if key not in names}, run / "last.pt")


def lines_of(caplog) -> list[str]:
    return [line for line in caplog.messages if "the data has changed" in line]


@pytest.mark.parametrize("older", [False, True])
def test_words_keep_their_numbers_when_other_captions_count_them_differently(older, home, caplog):
    before = read_metadata(home / "run")["vocabulary"]
    write_colours(home / "data", ("train-1.png,ocean ocean,train", "train-3.png,ocean,train"))
    if older:
        forget(home / "run", "vocabulary", "data")
    resume(home)
    assert (
        read_metadata(home / "run")["vocabulary"]
        == before
        == ["a", "apple", "blue", "ocean", "red"]
    )
    assert torch.load(home / "run/last.pt", weights_only=True)["vocabulary"] == before
    said = [] if older else [
        "the data has changed since this run was saved (train images: 2 with other captions); it "
        "goes on with its own 5 words"
    ]  # fmt: skip
    assert lines_of(caplog) == said


def test_new_words_and_images_are_named_and_the_run_goes_on(home, caplog):
    shutil.copy(home / "data/train-0.png", home / "data/new.png")
    rows = ("new.png,a green rex and a rex,train", "new.png,a rare dog,val")
    write_colours(home / "data", rows[:1])
    resume(home, "--epochs", "2")
    (line,) = lines_of(caplog)
    assert "train images: 1 added" in line and "val" not in line
    assert "rex (2), and (1), green (1)" in line and "--init-from" in line
    model = CaptionModel.load(home / "run")
    assert len(model.vocabulary.known) == 5
    caplog.clear()
    resume(home)  # the run was saved with that data: only its words are still new
    assert "images" not in lines_of(caplog)[0]


def test_an_older_run_whose_words_are_stored_nowhere_is_refused_if_they_changed(home):
    forget(home / "run", "vocabulary", "data")
    (home / "run/best.safetensors").unlink()
    write_colours(home / "data", ("train-1.png,an ocean,train",))
    with pytest.raises(
        ValueError, match=r"have 10 words now, but the run in .* began with 9; put back"
    ):
        resume(home)


@pytest.mark.parametrize("names", [(), ("vocabulary", "data")])
def test_with_unchanged_data_nothing_is_said_and_the_weights_are_the_same(
    names, begun, home, tmp_path, caplog
):
    whole = ["--data-dir", str(begun / "data"), "--output", str(tmp_path / "whole")]
    train.main([*COLOURS, *whole, "--epochs", "2"])
    (tmp_path / "whole/previous.pt").replace(home / "run/last.pt")  # after the first epoch
    forget(home / "run", *names)
    resume(home)
    assert not lines_of(caplog)
    assert_same_run(home / "run", tmp_path / "whole")
