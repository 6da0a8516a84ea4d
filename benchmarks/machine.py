"""Time two implementations alternately, and make rows of the table of the results."""

import gc
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from util.files import UserError


class Seconds(NamedTuple):
    """Median seconds of a side: by the clock, and on the processor, all threads together."""

    wall: float
    processor: float


@dataclass
class Machine:
    """The device that rows run on, and how often."""

    device: torch.device
    repeats: int

    def time(self, *sides: Callable[[], Any]) -> list[float]:
        """Return the median seconds of each side, measured alternately after one warm-up run."""
        return [each.wall for each in self.measure(*sides)]

    def measure(self, *sides: Callable[[], Any]) -> list[Seconds]:
        """Return the same with the processor time of this process, which others don't slow down."""
        measured: list[list[Seconds]] = [[] for _ in sides]
        gc.collect()
        for number in range(self.repeats + 1):
            for times, side in zip(measured, sides, strict=True):
                wall, processor = time.perf_counter(), time.process_time()
                side()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                if number:
                    passed = time.perf_counter() - wall, time.process_time() - processor
                    times.append(Seconds(*passed))
        columns = [zip(*times, strict=True) for times in measured]
        return [Seconds(*map(statistics.median, both)) for both in columns]

    def describe(self) -> str:
        """Return the name of the device, and the versions."""
        if self.device.type == "cuda":
            return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
        versions = f"torch {torch.__version__}, Python {platform.python_version()}"
        return f"{get_processor()}, {torch.get_num_threads()} threads, {versions}"


def get_processor() -> str:
    """Return the processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def choose_rows(table: dict[str, Any], words: tuple[str, ...]) -> dict[str, Any]:
    """Return the rows of `table` whose name contains one of the `words`, or all if there are none.

    Raises UserError if there is no such row.
    """
    chosen = {
        name: measure
        for name, measure in table.items()
        if not words or any(word in name for word in words)
    }
    if not chosen:
        raise UserError(f"no row is called {words}; choose from {', '.join(table)}")
    return chosen


def rate_row(name: str, unit: str, usual: float, ours: float, target: float) -> dict[str, Any]:
    """Return a row of rates: ours / usual should be at least the target."""
    ratio = ours / usual
    return {"name": name, "unit": unit, "usual": usual, "ours": ours, "ratio": ratio,
            "target": target, "met": ratio >= target}  # fmt: skip


def time_row(name: str, base: float, ours: float, most: float) -> dict[str, Any]:
    """Return a row of times in ms: ours / base should be at most `most`."""
    ratio = ours / base
    return {"name": name, "unit": "ms", "usual": 1000 * base, "ours": 1000 * ours, "ratio": ratio,
            "target": most, "met": ratio <= most}  # fmt: skip


def check_equal(what: str, equal: bool) -> None:
    """Raise RuntimeError if the two implementations have different results."""
    if not equal:
        raise RuntimeError(f"{what} differ between the two implementations: nothing to compare")
