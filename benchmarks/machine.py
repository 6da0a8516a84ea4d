"""Timing two sides in turn, and what a row of the table says of them."""

import gc
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass
class Machine:
    """Where the rows run, and how often."""

    device: torch.device
    repeats: int

    def seconds(self, *sides: Callable[[], Any]) -> list[float]:
        """Return the median seconds of each side, measured in turn after one uncounted time."""
        found: list[list[float]] = [[] for _ in sides]
        gc.collect()
        for number in range(self.repeats + 1):
            for times, side in zip(found, sides, strict=True):
                began = time.perf_counter()
                side()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                if number:
                    times.append(time.perf_counter() - began)
        return [statistics.median(times) for times in found]

    def describe(self) -> str:
        """Return the machine in words."""
        if self.device.type == "cuda":
            return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
        cores = f"{torch.get_num_threads()} threads"
        return (
            f"{processor()}, {cores}, torch {torch.__version__}, Python {platform.python_version()}"
        )


def processor() -> str:
    """Return the processor's name."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def row(name: str, unit: str, usual: float, ours: float, target: float) -> dict[str, Any]:
    """Return a row of rates: more is better, and the ratio must reach the target."""
    ratio = ours / usual
    return {"name": name, "unit": unit, "usual": usual, "ours": ours, "ratio": ratio,
            "target": target, "met": ratio >= target}  # fmt: skip


def multiple(name: str, base: float, ours: float, most: float) -> dict[str, Any]:
    """Return a row of times in ms: ours may take at most so many times what is its base."""
    ratio = ours / base
    return {"name": name, "unit": "ms", "usual": 1000 * base, "ours": 1000 * ours, "ratio": ratio,
            "target": most, "met": ratio <= most}  # fmt: skip


def agree(what: str, same: bool) -> None:
    """Raise RuntimeError where both sides should have made the same and did not."""
    if not same:
        raise RuntimeError(f"{what}: the two ways do not agree; the benchmark is void")
