"""Training and scoring by two processes: the same as by one."""

import json
from pathlib import Path

import pytest
import torch
from helpers.tiny import SLOW_TO_LOOK, SMALL, losses, torchrun

import evaluate
import features
import train
from encoder import Encoder

# What differs between one process and two is the order of sums; dropout has chances of its own,
# and a CNN that is trained from scratch has statistics of its own share.
EXACT = [*SMALL, "--epochs", "3", "--no-amp", "--dropout", "0", "--device", "cpu"]

TRAIN = """
import train
from util import program
program.run(train.main)
"""

# The second process alone is asked to stop, or killed, after its eighth step; once.
AT_STEP_EIGHT = """
import os, signal, sys
from pathlib import Path
import train, trainer
from util import distributed, program

marker, number = Path(sys.argv.pop(1)), getattr(signal, sys.argv.pop(1))
finish_step = trainer.Trainer.finish_step

def broken(self, words):
    finish_step(self, words)
    if self.step_number == 8 and distributed.rank() == 1 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), number)

trainer.Trainer.finish_step = broken
program.run(train.main)
"""


@pytest.fixture(scope="module")
def frozen(drawn, tmp_path_factory) -> list[str]:
    """Return the flags of a run on `drawn` with a frozen CNN."""
    folder = tmp_path_factory.mktemp("frozen")
    torch.manual_seed(0)
    torch.save(Encoder("tiny").cnn.state_dict(), folder / "cnn.pth")
    places = ["--data-dir", str(drawn), "--cache-dir", str(folder)]
    return [*EXACT, *places, "--cnn-weights", str(folder / "cnn.pth")]


@pytest.fixture(scope="module")
def alone(frozen, tmp_path_factory) -> Path:
    """Return the folder of a run by one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    train.main([*frozen, "--output", str(folder)])
    return folder


def assert_nearly_same(folder: Path, alone: Path) -> None:
    ours, theirs = (
        [[float(value) for value in row] for row in losses(each)] for each in (folder, alone)
    )
    assert len(ours) == 3
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=1e-5)
    ours, theirs = (torch.load(each / "last.pt", weights_only=True) for each in (folder, alone))
    assert (ours["words"], ours["step_number"]) == (theirs["words"], theirs["step_number"])


def test_a_batch_in_parts_is_the_batch(alone, frozen, tmp_path):
    folder = tmp_path / "run"
    train.main([*frozen, "--accumulate", "3", "--output", str(folder)])
    assert_nearly_same(folder, alone)


def test_two_processes_train_as_one(alone, frozen, tmp_path):
    folder = tmp_path / "run"
    # Three parts each of a batch of four: some are empty.
    run = torchrun(TRAIN, *frozen, "--accumulate", "3", "--output", folder)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("epoch 2,") == 1
    assert_nearly_same(folder, alone)
    assert (folder / "scores.json").exists()


@pytest.mark.slow
def test_two_processes_train_from_shards_as_one(drawn, frozen, tmp_path):
    """Where a batch holds all images; of smaller ones the processes have others than one would."""
    features.main(["--shards", str(tmp_path / "shards"), "--dataset", "shapes",
                   "--data-dir", str(drawn), "--shard-size", "24"])  # fmt: skip
    flags = [*frozen, "--dataset", "shards", "--data-dir", str(tmp_path / "shards"),
             "--cnn-backbone", "tiny", "--img-size", "64", "--min-count", "1"]  # fmt: skip
    one = tmp_path / "one"
    train.main([*flags, "--batch-size", "24", "--output", str(one)])
    both = torchrun(TRAIN, *flags, "--batch-size", "24", "--output", tmp_path / "both")
    assert both.returncode == 0, both.stderr
    assert_nearly_same(tmp_path / "both", one)
    # The second process has no image in an epoch's last batch, and the only shard is not enough
    # for two: neither waits for the other in vain.
    uneven = torchrun(TRAIN, *flags, "--batch-size", "23", "--output", tmp_path / "uneven")
    assert uneven.returncode == 0, uneven.stderr
    assert len(losses(tmp_path / "uneven")) == 3


@pytest.mark.slow
def test_two_processes_stop_together_and_one_goes_on(alone, frozen, tmp_path):
    folder = tmp_path / "run"
    run = torchrun(AT_STEP_EIGHT, tmp_path / "marker", "SIGTERM", *frozen, "--output", folder)
    assert "stopped after step 8;" in run.stdout, run.stderr
    assert torch.load(folder / "last.pt", weights_only=True)["batch"] == 2
    train.main(["--resume", "--output", str(folder)])
    assert_nearly_same(folder, alone)


@pytest.mark.slow
def test_a_killed_process_is_started_again_and_the_run_goes_on(alone, frozen, tmp_path):
    folder, flags = tmp_path / "run", ["--max-restarts", "1", *SLOW_TO_LOOK]
    said = [tmp_path / "marker", "SIGKILL", *frozen, "--output", folder]
    run = torchrun(AT_STEP_EIGHT, *said, flags=flags)
    assert run.returncode == 0, run.stderr
    assert "has lost another one" in run.stderr
    assert_nearly_same(folder, alone)


def test_a_restart_needs_a_folder_to_be_found(monkeypatch, drawn):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(ValueError, match="--max-restarts needs --output"):
        train.main([*EXACT, "--data-dir", str(drawn)])


@pytest.mark.slow
def test_two_processes_draw_captions_of_their_own_and_share_the_reward(drawn, tmp_path):
    folder = tmp_path / "run"
    flags = ["--scst-epochs", "1", "--data-dir", drawn, "--output", folder]
    run = torchrun(TRAIN, *EXACT, "--epochs", "1", *flags)
    assert run.returncode == 0, run.stderr
    assert "epoch 2, reward" in run.stdout
    rows = torch.load(folder / "last.pt", weights_only=True)["rows"]
    assert rows[1]["baseline"] == pytest.approx(rows[1]["reward"])  # of all samples, each once


@pytest.mark.slow
def test_two_processes_score_as_one(alone, drawn, tmp_path):
    flags = ["--checkpoint", alone, "--dataset", "shapes", "--data-dir", drawn, "--no-java"]
    flags += ["--limit", "7", "--json"]  # an odd number: their shares differ
    script = "import evaluate; from util import program; program.run(evaluate.main)"
    run = torchrun(script, *flags, tmp_path / "two.json")
    assert run.returncode == 0, run.stderr
    evaluate.main([*map(str, flags), str(tmp_path / "one.json")])
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one == two
    assert one["images"] == 7
