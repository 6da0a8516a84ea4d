"""What a run shows people: the bar, an epoch's line, and the figures in TensorBoard."""

import csv
import io
import json

import pytest
import torch
from helpers.tiny import SMALL, run_script, tiny_trainer

import run_log
import train
from util import progress


def test_the_bar_shows_loss_rate_and_the_time_left_of_the_run(monkeypatch):
    shown = []

    class Bar(progress.tqdm):
        def set_postfix_str(self, text, refresh=True):
            shown.append((self.n, self.total, text))

    monkeypatch.setattr(run_log, "progress_bar", lambda **how: Bar(**how, file=io.StringIO()))
    trainer = tiny_trainer(batch_size=4, epochs=2, scst_epochs=1)
    monkeypatch.setattr(trainer.clock, "estimate", lambda steps: f"{steps:g} steps")
    for number, _ in enumerate(run_log.show_steps(trainer, iter("abc"), images=10)):
        trainer.unchecked.append(("a step", torch.tensor([3.0 - number, 1.0])))
        trainer.batch += 1
    lr = trainer.optimizer.param_groups[-1]["lr"]
    steps = (2 + 3) * trainer.steps_per_epoch  # a self-critical step counts three times
    assert shown == [
        (0, 10, f"loss 3.000, {steps - 1} steps left, lr {lr:.1e}"),
        (4, 10, f"loss 2.500, {steps - 2} steps left, lr {lr:.1e}"),
        (8, 10, f"loss 2.000, {steps - 3} steps left, lr {lr:.1e}"),
    ]


def test_in_the_second_stage_the_bar_shows_the_reward():
    trainer = tiny_trainer(epochs=1, scst_epochs=2)
    trainer.start_stage(critical=True)
    trainer.sums |= {"rewarded": 3.0, "samples": 4}
    assert run_log.describe_step(trainer).startswith("reward 0.750, ")
    assert trainer.steps_left() == 2 * trainer.steps_per_epoch


ROW = {"epoch": 2, "train_loss": 2.5, "val_loss": 3.0, "CIDEr": 0.5, "BLEU-4": 0.25, "lr": 1e-3,
       "seconds": 12.0, "reward": None, "baseline": None, "bad_endings": 0.0, "repeats": 0.5,
       "CIDEr shapes": 0.4}  # fmt: skip


@pytest.mark.parametrize("is_best", [True, False])
def test_an_epochs_line_has_its_rate_and_marks_the_best(is_best, capsys):
    run_log.print_row(ROW, torch.device("cpu"), 123.4, is_best)
    mark = " (the best so far)" if is_best else ""
    assert capsys.readouterr().out == (
        f"epoch 2, train loss 2.500, val loss 3.000, CIDEr 0.500 (shapes 0.400){mark}, "
        "BLEU-4 0.250, bad endings 0.0%, repeats 50.0%, 12 s (123 images/s)\n"
    )


@pytest.fixture(scope="module")
def board():
    """Return a function from a run's folder to {tag: {step: value}} and the steps with images."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read(folder):
        events = EventAccumulator(str(folder / "tensorboard"))
        events.Reload()
        tags = events.Tags()
        scalars = {tag: {each.step: each.value for each in events.Scalars(tag)}
                   for tag in tags["scalars"]}  # fmt: skip
        counts = {tag: len(events.Scalars(tag)) for tag in tags["scalars"]}
        assert counts == {tag: len(steps) for tag, steps in scalars.items()}  # none twice
        images = {tag: [each.step for each in events.Images(tag)] for tag in tags["images"]}
        return scalars, images

    return read


def test_tensorboard_has_the_figures_of_metrics_csv_also_after_a_resume(
    board, drawn, tmp_path, capsys
):
    folder = tmp_path / "run"
    flags = [*SMALL, "--data-dir", str(drawn), "--output", str(folder), "--epochs", "1"]
    assert run_script(train, *flags, "--tensorboard", capsys=capsys)[0] == 0
    again = ["--resume", "--output", str(folder), "--epochs", "2"]
    code, out, _ = run_script(train, *again, capsys=capsys)
    assert code == 0 and "; the epochs above: beam 3" in out
    scalars, images = board(folder)
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for column, tag in (("train_loss", "loss/train_loss"), ("CIDEr", "scores/CIDEr"),
                        ("lr", "training/lr"), ("repeats", "faults/repeats")):  # fmt: skip
        wanted = {int(row["epoch"]): pytest.approx(float(row[column]), abs=1e-4) for row in rows}
        assert scalars[tag] == wanted and len(wanted) == 2
    assert images == {"samples/val": [1, 2]}
    assert json.loads((folder / "config.json").read_text())["tensorboard"] is True


def test_a_run_that_turns_it_on_later_has_all_epochs(board, tmp_path):
    board_rows = [{**ROW, "epoch": epoch} for epoch in (1, 2, 3)]
    run_log.Board(tmp_path, board_rows).writer.close()
    run_log.Board(tmp_path, board_rows[:2]).writer.close()  # epoch 3 is trained again
    scalars, _ = board(tmp_path)
    assert list(scalars["scores/CIDEr"]) == [1, 2]
    assert list(scalars["scores/CIDEr/shapes"]) == [1, 2]


def test_tensorboard_that_is_not_installed_is_one_line_before_anything(
    drawn, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("config.find_spec", lambda name: None)
    flags = [*SMALL, "--data-dir", str(drawn), "--output", str(tmp_path / "run"), "--tensorboard"]
    code, _, error = run_script(train, *flags, capsys=capsys)
    assert code == 2 and "pip install tensorboard" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()
