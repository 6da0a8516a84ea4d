"""Training states of strangers: none asks for more memory than its size, or surprises a run."""

import math
import zipfile
from pathlib import Path

import pytest
import torch

from util import checkpoints
from util.files import UserError
from util.states import check_state, check_torch_file


def good_state() -> dict:
    return {
        "weights": {"a": torch.zeros(2, 3)},
        "average": {"a": torch.zeros(2, 3)},
        "optimizer": {"state": {}, "param_groups": []},
        "encoder": None,
        "batch_size": 4,
        "step_number": 6,
        "epoch": 1,
        "batch": 0,
        "words": 0,
        "seconds": 1.5,
        "rows": [{"epoch": 1, "CIDEr": 0.5, "val_loss": None}],
        "critical": False,
        "first_step": 0,
        "first_epoch": 0,
        "nll": 0.0,
        "rewarded": 0.0,
        "baselines": 0.0,
        "samples": 0.0,
        "vocabulary": ["a", "dog"],
        "data": {"train": torch.zeros(3, 2, dtype=torch.int64)},
    }


def repacked(path: Path, compression: int, change=lambda name, content: content) -> Path:
    """Write the archive at `path` anew, each entry as `change` returns it."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, change(name, content))
    return path


def saved(value, path: Path) -> Path:
    torch.save(value, path)
    return path


def test_a_state_as_it_is_saved_is_read(tmp_path):
    checkpoints.save_state(tmp_path, good_state())
    assert checkpoints.load_state(tmp_path)["rows"] == good_state()["rows"]


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_entries_are_refused_before_they_are_unpacked(method, tmp_path, monkeypatch):
    state = good_state()
    state["weights"]["a"] = torch.zeros(3_000_000)
    path = repacked(saved(state, tmp_path / "last.pt"), method)
    assert path.stat().st_size < 100_000  # of 12 MB
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was unpacked"))
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda _: pytest.fail("it was unpacked"))
    with pytest.raises(UserError, match="entries are compressed"):
        checkpoints.load_state(tmp_path)


def test_many_entries_of_the_same_bytes_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "last.pt", "w") as archive:
        archive.writestr("archive/data/9", bytes(10**6))
        archive.filelist *= 50  # its directory names the same place again and again
    with pytest.raises(UserError, match="entries are compressed"):
        check_torch_file(tmp_path / "last.pt")


@pytest.mark.parametrize(
    "value",
    [
        bytearray(10),  # weights_only would allow bytearray(10**10), which a few bytes ask for
        {"a": torch.Size([3])},
        {"rows": {1, 2}},
        {"a": complex(1, 2)},
        {"a": Path("x")},
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_pickle_calls_nothing_but_what_tensors_need(value, tmp_path, monkeypatch):
    saved(value, tmp_path / "last.pt")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was unpickled"))
    with pytest.raises(UserError, match=r"it holds .*, not only tensors and plain values"):
        checkpoints.load_state(tmp_path)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("first_epoch", [2, -1, "0", 0.0, True, None, 10**30]),
        ("first_step", [7, -1, [0]]),
        ("epoch", [-1, 2, 10**9, "1", math.inf, None]),
        ("step_number", [-1, 1.5, "6"]),
        ("batch", [-1, 3, 10**12, "0"]),  # without a word, an epoch has had no batch
        ("words", [-1, "0", 1.5]),
        ("batch_size", [0, -4, "4"]),
        ("seconds", ["1", math.nan, math.inf, 10**400, None]),
        ("nll", [math.nan, "0", torch.zeros(())]),
        ("samples", ["0", math.inf]),
        ("critical", [0, "no", None]),
        ("encoder", [3, ["a"]]),
        ("weights", [[], None, {"a": 3}, {1: torch.zeros(1)}]),
        ("average", [torch.zeros(2, 3), {"a": [0.0]}]),
        ("optimizer", [[], None]),
        ("vocabulary", [3, "a b", ["a", 3], [None]]),
        ("data", [[], {"train": 3}, {"train": torch.zeros(2, 2)},
                  {"train": torch.zeros(4, dtype=torch.int64)}]),
        ("rows", [{}, [], [3], [{}], [{"CIDEr": 0.5}], [{"CIDEr": 0.5, "epoch": "1"}],
                  [{"epoch": 1, "CIDEr": "0.5"}], [{"epoch": 1, "CIDEr": math.nan}],
                  [{"epoch": 1, "CIDEr": 0.5, "lr": "=cmd()"}],
                  [{"epoch": 1, "CIDEr": 0.5, "more": [1]}]]),
    ],
)  # fmt: skip
def test_a_wrong_count_or_type_is_named(name, values):
    for value in values:
        with pytest.raises(UserError) as error:
            check_state({**good_state(), name: value})
        assert name.split("_")[-1] in str(error.value) or name == "batch"
        assert len(str(error.value)) < 200


def test_what_is_missing_is_named_and_what_older_versions_lacked_is_not():
    for name in ("weights", "rows", "epoch", "nll", "encoder"):
        state = good_state()
        del state[name]
        with pytest.raises(UserError, match=f"it has no {name}"):
            check_state(state)
    state = good_state()
    for name in ("critical", "first_step", "first_epoch", "batch_size", "samples"):
        del state[name]
    check_state(state)
    for value in ([], 3, torch.zeros(3), None):
        with pytest.raises(UserError, match="not the state of a run"):
            check_state(value)


def test_a_damaged_state_is_passed_over_for_the_one_before_it(tmp_path, caplog):
    saved({**good_state(), "first_epoch": "zero"}, tmp_path / "last.pt")
    saved({**good_state(), "step_number": 5}, tmp_path / "previous.pt")
    assert checkpoints.load_state(tmp_path)["step_number"] == 5
    assert "last.pt can't be read (its first_epoch is not that of a run)" in caplog.text
