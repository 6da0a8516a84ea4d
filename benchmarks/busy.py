"""How busy training keeps the device: `python benchmarks/busy.py --device cuda`.

The default model takes steps on cached features that are made up, as a loader gives them, under
torch's profiler. Busy is the share of the time in which the device ran at least one kernel (a CPU:
one operation), as opposed to waiting for Python to ask for the next.
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
from util import files  # noqa: E402
from util.distributed import pick_device  # noqa: E402


@dataclass(frozen=True)
class Config:
    """The flags of this benchmark."""

    device: str = "auto"
    """auto, cpu, cuda."""
    images: tuple[int, ...] = (32, 128)
    """Images a step (--batch-size), one row each."""
    steps: int = 10
    """StepDecoder that are looked at, after three that are not."""
    compile: bool = False
    """Compile the model first, as train.py --compile does."""
    json: Path | None = None
    """Also write the figures to this JSON file."""


def measure(images: int, config: Config) -> dict[str, float]:
    """Return a row: milliseconds a step, the share of it the device is busy, kernels a step."""
    device = pick_device(config.device)
    torch.manual_seed(0)
    model = CaptionModel(Encoder("resnet50"), DecoderConfig(), vocabulary(), 224).to(device)
    trainer = Trainer(model, TrainConfig(compile=config.compile), steps_per_epoch=10**6)
    one = batch(images)
    on_gpu = device.type == "cuda"
    if on_gpu:
        one = one._replace(inputs=one.inputs.pin_memory())

    def steps(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            train_epoch(trainer, [[one]])
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    steps(3)
    seconds = steps(config.steps)  # without the profiler, which slows Python down
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as seen:
        looked = steps(config.steps)
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in seen.events()
        if event.device_type == kind
    ]
    busy = covered(spans) / 1e6  # from microseconds
    whole = seconds if on_gpu else looked  # a GPU's kernels take what they take, profiled or not
    return {
        "images": images,
        "step": 1000 * seconds / config.steps,
        "busy": min(1.0, busy / whole),
        "kernels": len(spans) / config.steps,
    }


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return how much of the time at least one span covers."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def main(argv: list[str] | None = None) -> None:
    """Measure each number of images and print a table."""
    config = files.parse(
        Config, argv, program="busy.py", description="Measure how busy training keeps the device."
    )
    files.check_writable(config.json)
    print("| images a step | step, ms | device busy | kernels a step |\n|---|---|---|---|")
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
    files.run(main)
