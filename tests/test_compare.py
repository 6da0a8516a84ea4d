"""Several runs in one table and one plot; what is no run is named and left out."""

import csv
import json
from pathlib import Path

import pytest
from helpers.tiny import run_script
from PIL import Image

import compare
from config import Config, flatten


def write_run(folder: Path, ciders, *, scores=None, **flags) -> Path:
    """Write what train.py leaves in the folder of a run of `len(ciders)` epochs."""
    folder.mkdir(parents=True)
    config = {**flatten(Config()), "epochs": 4, "output": str(folder), **flags}
    (folder / "config.json").write_text(json.dumps(config))
    with open(folder / "metrics.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["epoch", "train_loss", "val_loss", "CIDEr", "BLEU-4", "lr", "seconds"])
        for epoch, cider in enumerate(ciders, 1):
            rows.writerow([epoch, 3.0, 4 - epoch / 10, cider, cider and cider / 2, 1e-3, 61.5])
    if scores:
        (folder / "scores.json").write_text(json.dumps(scores))
    return folder


@pytest.fixture
def runs(tmp_path):
    test = {"val": {"CIDEr": 0.52}, "test": {"CIDEr": 0.61, "BLEU-4": 0.25}}
    return (
        write_run(tmp_path / "runs" / "a", [0.1, 0.3, 0.2, 0.25], lr=6e-4, also=[]),
        write_run(tmp_path / "runs" / "b", [0.4, 0.5, 0.45, 0.4], lr=1e-3, scores=test,
                  also=["csv:web"]),
    )  # fmt: skip


def test_the_best_run_comes_first_with_its_scores_time_and_what_differs(runs, capsys):
    code, out, err = run_script(compare, *runs, capsys=capsys)
    assert (code, err) == (0, "")
    first, second = out.splitlines()[1:3]
    assert first.split() == [
        str(runs[1]),
        "4/4",
        "2",
        "0.500",
        "0.250",
        "0.610",
        "0.250",
        "0:04:06",
    ]
    assert second.split() == [str(runs[0]), "4/4", "2", "0.300", "0.150", "-", "-", "0:04:06"]
    title, names, best, other = out.split("\n\n")[1].splitlines()
    assert title == "They differ in:" and names.split() == ["--also", "--lr"]
    assert best.split()[1:] == ["csv:web", "0.001"] and other.split()[1:] == ["-", "0.0006"]


def test_runs_with_the_same_flags_say_so(tmp_path, capsys):
    pair = [write_run(tmp_path / name, [0.1], device=device)
            for name, device in (("a", "cpu"), ("b", "cuda"))]  # fmt: skip
    assert "They differ in no flag." in run_script(compare, *pair, capsys=capsys)[1]


def test_the_table_goes_to_json_and_the_curves_to_a_png_that_may_be_replaced(
    runs, tmp_path, capsys
):
    png, table = tmp_path / "curves.png", tmp_path / "table.json"
    for chosen in (runs, runs[:1]):
        flags = ("--output", png, "--json", table)
        assert run_script(compare, *chosen, *flags, capsys=capsys)[0] == 0
        rows = json.loads(table.read_text())
        assert [Path(row["run"]) for row in rows] == [*chosen][::-1]
        with Image.open(png) as image:
            assert image.size[0] > 1000
    assert rows[0]["CIDEr"] == 0.3 and rows[0]["test_CIDEr"] is None
    assert rows[0]["flags"] == {} and rows[0]["seconds"] == 246


def test_a_run_without_validation_is_compared_by_its_loss(tmp_path, capsys):
    run = write_run(tmp_path / "a", ["", ""])
    code, out, _ = run_script(compare, run, "--output", tmp_path / "a.png", capsys=capsys)
    assert code == 0 and out.splitlines()[1].split()[1:5] == ["2/4", "-", "-", "-"]


def damage(path, content):
    path.write_text(content)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda run: (run / "config.json").unlink(), "it has no config.json"),
        (lambda run: damage(run / "config.json", "[1]"), "does not hold the flags of a run"),
        (lambda run: damage(run / "config.json", "{"), "is not a JSON file"),
        (lambda run: (run / "metrics.csv").unlink(), "has not finished an epoch"),
        (lambda run: damage(run / "metrics.csv", ""), "metrics.csv is damaged"),
        (lambda run: damage(run / "metrics.csv", "epoch,CIDEr\n1,0.5\n"), "metrics.csv is damaged"),
        (lambda run: damage(run / "metrics.csv", "a\0b\n\n1,2,3"), "metrics.csv is damaged"),
        (lambda run: damage(run / "scores.json", "[]"), "does not hold the scores of a run"),
        (lambda run: damage(run / "scores.json", '{"val": 3}'), "does not hold the scores"),
    ],
)
def test_what_is_no_run_is_named_in_a_line_and_the_rest_is_compared(spoil, reason, runs, capsys):
    spoil(runs[0])
    code, out, err = run_script(compare, *runs, capsys=capsys)
    assert code == 0 and str(runs[1]) in out and str(runs[0]) not in out
    assert err.startswith("left out: ") and reason in err and len(err.splitlines()) == 1
    code, _, err = run_script(compare, runs[0], capsys=capsys)
    assert code == 2 and "none of these is a run to compare" in err


@pytest.mark.parametrize(("flag", "name"), [("--output", "mine.png"), ("--json", "mine.json")])
def test_a_file_of_the_users_is_not_overwritten(flag, name, runs, tmp_path, capsys):
    path = tmp_path / name
    path.write_text('{"mine": 1}')
    code, out, err = run_script(compare, *runs, flag, path, capsys=capsys)
    assert code == 2 and "it would be lost" in err and path.read_text() == '{"mine": 1}' and not out
    code, _, err = run_script(compare, *runs, flag, runs[0] / "config.json", capsys=capsys)
    assert code == 2 and (runs[0] / "config.json").stat().st_size > 100
