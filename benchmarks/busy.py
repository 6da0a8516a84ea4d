"""Measure how busy training keeps the device: `python benchmarks/busy.py --device cuda`.

The default model is trained for some steps on synthetic cached features under torch's profiler.
The device is busy while it runs at least one kernel (a CPU: one operation), and idle while it waits
for Python to launch the next.
"""

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from synthetic import batch, vocabulary  # noqa: E402
from torch.autograd import DeviceType  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from config import TrainConfig  # noqa: E402
from decoder import DecoderConfig  # noqa: E402
from encoder import Encoder  # noqa: E402
from model import CaptionModel  # noqa: E402
from train import train_epoch  # noqa: E402
from trainer import Trainer  # noqa: E402
from util import files, program  # noqa: E402
from util.distributed import pick_device  # noqa: E402


@dataclass(frozen=True)
class Config:
    """The flags of this benchmark."""

    device: str = "auto"
    """auto, cpu, cuda."""
    images: tuple[int, ...] = (32, 128)
    """Images per step (--batch-size), a row for each value."""
    steps: int = 10
    """Steps that are measured, after three for warm-up."""
    compile: bool = False
    """Compile the model first, as train.py --compile does."""
    json: Path | None = None
    """Also write the figures to this JSON file."""


def measure(images: int, config: Config) -> dict[str, float]:
    """Return a row: milliseconds and kernels per step, and the share of time the device is busy."""
    device = pick_device(config.device)
    torch.manual_seed(0)
    model = CaptionModel(Encoder("resnet50"), DecoderConfig(), vocabulary(), 224).to(device)
    trainer = Trainer(model, TrainConfig(compile=config.compile), steps_per_epoch=10**6)
    one = batch(images)
    on_gpu = device.type == "cuda"
    if on_gpu:
        one = one._replace(inputs=one.inputs.pin_memory())

    def run_steps(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            train_epoch(trainer, [[one]])
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    run_steps(3)
    seconds = run_steps(config.steps)  # without the profiler, which slows Python down
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as profiler:
        profiled_seconds = run_steps(config.steps)
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        # Not ranges that a program names: on a GPU such a range lasts from kernel to kernel.
        if event.device_type == kind and not getattr(event, "is_user_annotation", False)
    ]
    busy = sum_covered(spans) / 1e6  # from microseconds
    # The profiler slows down Python, and with it a CPU's operations, but not a GPU's kernels.
    whole = seconds if on_gpu else profiled_seconds
    return {
        "images": images,
        "step": 1000 * seconds / config.steps,
        "busy": min(1.0, busy / whole),
        "kernels": len(spans) / config.steps,
    }


def sum_covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the time that is covered by at least one of the spans (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def main(argv: list[str] | None = None) -> None:
    """Measure each number of images and print a table."""
    config = program.parse(
        Config, argv, program="busy.py", description="Measure how busy training keeps the device."
    )
    files.check_writable(config.json)
    print("| images per step | step, ms | device busy | kernels per step |\n|---|---|---|---|")
    rows = []
    for images in config.images:
        row = measure(images, config)
        rows.append(row)
        print(
            f"| {images} | {row['step']:.1f} | {row['busy']:.0%} | {row['kernels']:.0f} |",
            flush=True,
        )
    if config.json:
        files.write_json(config.json, rows)


if __name__ == "__main__":
    program.run(main)
