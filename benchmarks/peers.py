"""Compare this project's speed with other programs that do the same, in one run.

Run `pip install -r requirements-peers.txt`, then `python benchmarks/peers.py --json peers.json`.

Decoding is compared with `generate` of transformers, by a GPT-2 with this project's weights; the
CNN with onnxruntime and openvino; reading images with Pillow and torchvision. All sides of a row
run alternately, with the same number of threads, and must have the same results.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Before torch, which reads how its threads wait when it is loaded.
from util import threads  # noqa: E402, I001

import peer_rows  # noqa: E402
from machine import Machine, Seconds, choose_rows  # noqa: E402
from peer_rows import Bench, Row, is_installed  # noqa: E402

from inference import SHIPPED  # noqa: E402
from util import files, program  # noqa: E402
from util.distributed import pick_device  # noqa: E402
from util.files import UserError  # noqa: E402


@dataclass(frozen=True)
class Config:
    """The flags of this benchmark."""

    json: Path | None = None
    """Also write the table to this JSON file."""
    rows: tuple[str, ...] = ()
    """Only rows whose name contains one of these words (default: all)."""
    repeats: int = 5
    """Number of times that each side is measured; the table has the medians."""
    checkpoint: Path = SHIPPED
    """The captioner; its decoder must be a transformer."""
    images: int = 128
    """Number of images that are captioned in batches."""
    batch_size: int = 64
    """Images that are captioned at once."""
    device: str = "cpu"
    """Where captions are decoded: auto, cpu, cuda, cuda:1, mps. The other rows are of the CPU."""
    threads: int | None = None
    """CPU threads that each program computes with (default: one for each CPU it may use)."""

    def __post_init__(self) -> None:
        for name in ("repeats", "images", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1")


class Measure(NamedTuple):
    """What measures some rows, and the packages of which it needs all, or any."""

    rows: Callable[[Bench], list[Row]]
    needs: tuple[str, ...] = ()
    any_of: tuple[str, ...] = ()

    def list_missing(self) -> list[str]:
        """Return the packages without which a row of these is left out."""
        return [name for name in (*self.needs, *self.any_of) if not is_installed(name)]

    def is_possible(self) -> bool:
        """Return whether there is a row that can be measured."""
        all_there = all(map(is_installed, self.needs))
        return all_there and (not self.any_of or any(map(is_installed, self.any_of)))


def decoding(name: str, make_sides: Callable) -> Measure:
    """Return what measures a method of decoding beside transformers."""
    return Measure(partial(peer_rows.decoding_rows, name, make_sides), ("transformers",))


# Name, as --rows takes it -> what measures it.
ROWS: dict[str, Measure] = {
    "greedy": decoding("greedy", peer_rows.greedy_sides),
    "beam": decoding("beam 5", peer_rows.beam_sides),
    "sample": decoding("sampling", peer_rows.sample_sides),
    "cnn": Measure(peer_rows.cnn_rows, ("onnx", "onnxscript"), tuple(peer_rows.ENGINES)),
    "reading": Measure(peer_rows.reading_rows),
}


def format_table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table: ms per image."""
    lines = [
        "| row | beside | their ms | our ms | ratio | their CPU ms | our CPU ms | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            f"{row[clock]['peer']:.4g} | {row[clock]['ours']:.4g} | {row[clock]['ratio']:.2f}×"
            for clock in Seconds._fields
        ]
        lines.append(f"| {row['name']} | {row['peer']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure the rows and print them."""
    config = program.parse(
        Config, argv, program="peers.py", description="Compare speeds with other programs."
    )
    files.check_writable(config.json)
    chosen = choose_rows(ROWS, config.rows)
    threads.set_up_process(config.threads)
    rows: list[dict[str, Any]] = []
    left_out: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(pick_device(config.device), config.repeats)
        sizes = config.images, config.batch_size
        bench = Bench(machine, config.checkpoint, *sizes, Path(folder))
        for name, measure in chosen.items():
            if missing := measure.list_missing():
                left_out[name] = missing
                print(
                    f"{name}: rows that need {' and '.join(missing)} are left out: "
                    "pip install -r requirements-peers.txt",
                    file=sys.stderr,
                )
            if measure.is_possible():
                print(f"measuring {name}", file=sys.stderr, flush=True)
                rows += [row.to_dict() for row in measure.rows(bench)]
    print(machine.describe())
    print(format_table(rows))
    if config.json:
        report = {"machine": machine.describe(), "rows": rows, "left_out": left_out}
        files.write_json(config.json, report)


if __name__ == "__main__":
    program.run(main)
