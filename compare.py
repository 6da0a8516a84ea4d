"""Compare runs of train.py: `python compare.py runs/*` prints one table, and draws their curves."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from util import files, plots, program
from util.checkpoints import is_run_config
from util.files import UserError
from util.plots import to_float

# Flags that say where files are or how long to work, not what is trained.
PLACES = {"output", "resume", "device", "threads", "workers", "cache_dir", "tensorboard", "compile"}


@dataclass(frozen=True)
class Config:
    """The flags of this script."""

    runs: tuple[Path, ...]
    """Folders of runs (or of other things, which are named and left out)."""
    output: Path | None = None
    """Draw the curves of all runs over each other into this PNG file."""
    json: Path | None = None
    """Also write the table to this JSON file."""


@dataclass(frozen=True)
class Run:
    """What a run's folder says: its flags, its rows of metrics.csv and its last scores."""

    name: str
    flags: dict[str, Any]
    rows: list[dict[str, str]]
    scores: dict[str, Any]

    def best(self) -> dict[str, str] | None:
        """Return the row with the highest validation CIDEr, None if no epoch has one."""
        scored = [row for row in self.rows if math.isfinite(to_float(row.get("CIDEr")))]
        return max(scored, key=lambda row: to_float(row["CIDEr"]), default=None)

    def summary(self) -> dict[str, Any]:
        """Return the run's line of the table; None for what it does not have (yet)."""
        best, epochs = self.best() or {}, [row for row in self.rows if to_float(row["epoch"]) > 0]
        wanted = self.flags.get("epochs", 0) + self.flags.get("scst_epochs", 0)
        test = self.scores.get("test", {})
        numbers = {
            "best_epoch": best.get("epoch"),
            "CIDEr": best.get("CIDEr"),
            "BLEU-4": best.get("BLEU-4"),
            "test_CIDEr": test.get("CIDEr"),
            "test_BLEU-4": test.get("BLEU-4"),
        }
        found = {name: to_float(value) for name, value in numbers.items()}
        return {
            "run": self.name,
            "epochs": len(epochs),
            "of": wanted,
            "finished": bool(self.scores),
            **{name: value if math.isfinite(value) else None for name, value in found.items()},
            "seconds": sum(s for row in epochs if math.isfinite(s := to_float(row.get("seconds")))),
        }


def read_run(folder: Path) -> Run:
    """Return the run in a folder; raises UserError or OSError where there is none, or no epoch."""
    import pandas as pd

    if not folder.is_dir():
        raise UserError(f"{folder} is no folder" if folder.exists() else f"there is no {folder}")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not the folder of a run: it has no config.json")
    flags = files.read_json(folder / "config.json")
    if not is_run_config(flags):
        raise UserError(f"{folder / 'config.json'} does not hold the flags of a run")
    path, scores = folder / "metrics.csv", {}
    if not path.is_file():
        raise UserError(f"{folder} has no metrics.csv: the run has not finished an epoch")
    try:
        rows = pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records")
        for row in rows:
            for name in ("epoch", "train_loss", "val_loss", "CIDEr", "BLEU-4", "seconds"):
                to_float(row[name])
        if not all(math.isfinite(to_float(row["epoch"])) for row in rows):
            raise ValueError("an epoch without its number")
    except (ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{path} is damaged, or not of a run ({reason})") from error
    if not rows:
        raise UserError(f"{folder} has not finished an epoch")
    if (folder / "scores.json").is_file():
        scores = files.read_json(folder / "scores.json")
        splits = scores.values() if isinstance(scores, dict) else [None]
        if not all(isinstance(split, dict) for split in splits):
            raise UserError(f"{folder / 'scores.json'} does not hold the scores of a run")
    return Run(str(folder), flags, rows, scores)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Return the runs, the best first; what is none is named on stderr, a line each.

    Raises UserError if none is left.
    """
    runs = []
    for folder in dict.fromkeys(folders):
        try:
            runs.append(read_run(folder))
        except (UserError, OSError) as error:
            print(f"left out: {program.one_line(program.explain(error))}", file=sys.stderr)
    if not runs:
        raise UserError("none of these is a run to compare; name folders of train.py, as in runs/*")
    return sorted(runs, key=lambda run: -(run.summary()["CIDEr"] or 0.0))


def differing_flags(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return flag → its value in each run, for those that are not equal in all."""
    names = dict.fromkeys(name for run in runs for name in run.flags if name not in PLACES)
    values = {name: [run.flags.get(name) for run in runs] for name in names}
    return {name: each for name, each in values.items() if any(v != each[0] for v in each)}


def format_table(runs: Sequence[Run]) -> str:
    """Return a line per run: epochs, scores, time; then the flags in which they differ."""
    import pandas as pd

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    lines = []
    for each in (run.summary() for run in runs):
        lines.append({
            "run": program.printable(each["run"]),
            "epochs": f"{each['epochs']}/{each['of']}",
            "best": "-" if each["best_epoch"] is None else f"{each['best_epoch']:g}",
            "val CIDEr": number(each["CIDEr"]),
            "BLEU-4": number(each["BLEU-4"]),
            "test CIDEr": number(each["test_CIDEr"]),
            "test BLEU-4": number(each["test_BLEU-4"]),
            "time": format_time(each["seconds"]),
        })  # fmt: skip
    text = pd.DataFrame(lines).to_string(index=False)
    different = differing_flags(runs)
    if different:
        rows = {f"--{name.replace('_', '-')}": map(show_value, each)
                for name, each in different.items()}  # fmt: skip
        names = [program.printable(run.name) for run in runs]
        table = pd.DataFrame.from_dict(rows, orient="index", columns=names)
        text += f"\n\nThey differ in:\n{table.T.to_string()}"
    elif len(runs) > 1:
        text += "\n\nThey differ in no flag."
    return text


def show_value(value: Any) -> str:
    """Return a flag's value as the command line takes it; "-" for none."""
    if value is None or value == []:
        return "-"
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return program.printable(text)


def format_time(seconds: float) -> str:
    """Return a duration as 1:23:45."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def is_comparison(path: Path) -> bool:
    """Return whether a JSON file holds a table of this script."""
    value = files.read_json(path)
    return isinstance(value, list) and all(isinstance(v, dict) and "run" in v for v in value)


def main(argv: list[str] | None = None) -> None:
    """Compare runs: print the table, draw the curves, write the JSON."""
    import tyro

    flags = tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(Config)
    config = program.parse(flags, argv, program="compare.py", description="Compare runs.")
    inputs = [folder / name for folder in config.runs
              for name in ("learning_curve.png", "scores.json", "config.json")]  # fmt: skip
    files.check_output(config.output, [".png"], inputs)
    files.check_output(config.json, [".json"], inputs)
    files.check_replaceable(config.output, plots.is_comparison, "curves of this script")
    files.check_replaceable(config.json, is_comparison, "a table of this script")
    runs = read_runs(config.runs)
    print(format_table(runs))
    if config.output:
        plots.compare_curves(config.output, {run.name: run.rows for run in runs})
    if config.json:
        different = differing_flags(runs)
        files.write_json(config.json, [
            {**run.summary(), "flags": {name: each[number] for name, each in different.items()}}
            for number, run in enumerate(runs)
        ])  # fmt: skip


if __name__ == "__main__":
    program.run(main)
