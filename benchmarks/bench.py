"""Ours beside the usual way, in one run: `python benchmarks/bench.py --json bench.json`."""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import rows as measured  # noqa: E402
from machine import Machine  # noqa: E402

from util import files  # noqa: E402
from util.distributed import pick_device  # noqa: E402


@dataclass(frozen=True)
class Config:
    """The flags of this benchmark."""

    json: Path | None = None
    """Also write the table to this JSON file."""
    rows: tuple[str, ...] = ()
    """Only rows whose name holds one of these words (default: all)."""
    repeats: int = 5
    """How many times each side is measured; the median counts."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""


# --- the table

# name -> what measures it, and the words that --rows looks for
TABLE: dict[str, Callable[[Machine, Path], Any]] = {
    "training": lambda machine, _: measured.training_rows(machine),
    "beam transformer": lambda machine, _: measured.beam_row(machine, "transformer", 20),
    "beam attention-lstm": lambda machine, _: measured.beam_row(machine, "attention LSTM", 10),
    "greedy": lambda machine, _: measured.greedy_row(machine),
    "features": measured.extraction_row,
    "caption": measured.latency_rows,
    "start": measured.start_row,
    "scores": lambda machine, _: measured.scoring_row(machine),
    "reward": lambda machine, _: measured.reward_row(machine),
}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| row | unit | usual | ours | ratio | target | met |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in rows:
        bound = "≤" if each["unit"] == "ms" else "≥"
        lines.append(
            f"| {each['name']} | {each['unit']} | {each['usual']:.4g} | {each['ours']:.4g} | "
            f"{each['ratio']:.2f}× | {bound} {each['target']}× | {'yes' if each['met'] else 'no'} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure the rows and print them."""
    config = files.parse(
        Config, argv, program="bench.py", description="Time this project beside the usual way."
    )
    files.check_writable(config.json)
    chosen = {
        name: measure
        for name, measure in TABLE.items()
        if not config.rows or any(word in name for word in config.rows)
    }
    if not chosen:
        raise ValueError(f"no row is called {config.rows}; choose from {', '.join(TABLE)}")
    machine = Machine(pick_device(config.device), config.repeats)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, measure in chosen.items():
            print(f"measuring {name}", file=sys.stderr, flush=True)
            found = measure(machine, Path(folder))
            rows += found if isinstance(found, list) else [found]
    print(machine.describe())
    print(table(rows))
    if config.json:
        files.write_json(config.json, {"machine": machine.describe(), "rows": rows})


if __name__ == "__main__":
    files.run(main)
