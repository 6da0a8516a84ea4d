"""Compare this project's speed with the usual implementation's, in one run.

Run `python benchmarks/bench.py --json bench.json`; `rows.py` and `neighbours.py` have its rows.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Before torch, which reads how its threads wait when it is loaded.
from util import threads  # noqa: E402, I001

import neighbours  # noqa: E402
import rows as benchmarks  # noqa: E402
from machine import Machine, choose_rows  # noqa: E402

from util import files, program  # noqa: E402
from util.distributed import pick_device  # noqa: E402


@dataclass(frozen=True)
class Config:
    """The flags of this benchmark."""

    json: Path | None = None
    """Also write the table to this JSON file."""
    rows: tuple[str, ...] = ()
    """Only rows whose name contains one of these words (default: all)."""
    repeats: int = 5
    """Number of times that each side is measured; the table has the medians."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    threads: int | None = None
    """CPU threads to compute with (default: one for each CPU that this process may use)."""


# Name, as --rows takes it -> the function that measures one row or several.
ROWS: dict[str, Callable[[Machine, Path], Any]] = {
    "training": lambda machine, _: benchmarks.training_rows(machine),
    "beam transformer": lambda machine, _: benchmarks.beam_row(machine, "transformer", 20),
    "beam attention-lstm": lambda machine, _: benchmarks.beam_row(machine, "attention LSTM", 10),
    "greedy": lambda machine, _: benchmarks.greedy_row(machine),
    "features": benchmarks.extraction_row,
    "caption": benchmarks.latency_rows,
    "start": benchmarks.start_row,
    "scores": lambda machine, _: benchmarks.scoring_row(machine),
    "reward": lambda machine, _: benchmarks.reward_row(machine),
    "neighbour": lambda machine, _: neighbours.neighbour_rows(machine),
}


def format_table(rows: list[dict[str, Any]]) -> str:
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
    config = program.parse(
        Config, argv, program="bench.py", description="Compare speeds with the usual way."
    )
    files.check_writable(config.json)
    chosen = choose_rows(ROWS, config.rows)
    threads.set_up_process(config.threads)
    machine = Machine(pick_device(config.device), config.repeats)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, measure in chosen.items():
            print(f"measuring {name}", file=sys.stderr, flush=True)
            found = measure(machine, Path(folder))
            rows += found if isinstance(found, list) else [found]
    print(machine.describe())
    print(format_table(rows))
    if config.json:
        files.write_json(config.json, {"machine": machine.describe(), "rows": rows})


if __name__ == "__main__":
    program.run(main)
