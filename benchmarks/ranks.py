"""Measure a training step in several processes: `python benchmarks/ranks.py --processes 1 2`.

Each row is a job of its own, started with torchrun, with one CPU thread or one GPU per process: the
default model on synthetic cached features. `own work` is a step on the process's share of the batch
without communication, `exchange` the time to sum all gradients over the processes.
"""

import contextlib
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from synthetic import batch, vocabulary  # noqa: E402

from config import TrainConfig  # noqa: E402
from decoder import DecoderConfig  # noqa: E402
from encoder import Encoder  # noqa: E402
from model import CaptionModel  # noqa: E402
from train import train_epoch  # noqa: E402
from trainer import Trainer  # noqa: E402
from util import distributed, files, program  # noqa: E402
from util.distributed import pick_device  # noqa: E402
from util.files import UserError  # noqa: E402


@dataclass(frozen=True)
class Config:
    """The flags of this benchmark."""

    processes: tuple[int, ...] = (1, 2)
    """Numbers of processes, a job for each."""
    images: tuple[int, ...] = (32,)
    """Images per step (--batch-size), over all processes."""
    steps: int = 10
    """Steps that are timed; the table has the median."""
    device: str = "cpu"
    """auto, cpu, cuda."""
    json: Path | None = None
    """Also write the figures to this JSON file."""

    def __post_init__(self) -> None:
        if min(self.images) < max(self.processes):
            raise UserError(f"--images {min(self.images)} must be at least the number of processes")


def measure(images: int, steps: int, device: str) -> dict[str, Any] | None:
    """Return the row, on the main process: milliseconds of a step and its parts, peak memory."""
    place = pick_device(device)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = CaptionModel(Encoder("resnet50"), DecoderConfig(), vocabulary(), 224).to(place)
    share = len(distributed.split_by_rank(range(images)))
    one = batch(share, seed=distributed.rank())
    trainer = Trainer(model, TrainConfig(), steps_per_epoch=10**6)
    step = time_median(lambda: train_epoch(trainer, [[one]]), steps, place)
    weights = torch.zeros(sum(p.numel() for p in model.parameters() if p.requires_grad))
    exchange = time_median(lambda: all_reduce(weights.to(place)), steps, place)
    distributed.barrier()
    trainer.net = model  # without DistributedDataParallel
    with no_communication():
        own = time_median(lambda: train_epoch(trainer, [[one]]), steps, place)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    peaks = distributed.gather(peak)
    if peaks is None:
        return None
    rate = len(one.tokens) * distributed.world_size() / step
    return {"processes": distributed.world_size(), "images": images, "step": 1000 * step,
            "own": 1000 * own, "exchange": 1000 * exchange, "rate": rate,
            "memory": max(peaks)}  # fmt: skip


def time_median(work: Callable[[], Any], steps: int, device: torch.device) -> float:
    """Return the median seconds of `work`, after two runs for warm-up."""
    seconds = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def all_reduce(weights: torch.Tensor) -> None:
    """Sum the weights over the processes, if there are several."""
    if distributed.world_size() > 1:
        torch.distributed.all_reduce(weights)


@contextlib.contextmanager
def no_communication() -> Iterator[None]:
    """Within this context, a step does not sum its number of words over the processes either."""
    total = distributed.all_reduce_sum
    distributed.all_reduce_sum = lambda values: [float(value) for value in values]
    try:
        yield
    finally:
        distributed.all_reduce_sum = total


def run_job(processes: int, images: int, config: Config) -> dict[str, Any]:
    """Return the row of a job with this number of processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    work = [__file__, "--worker", str(images), str(config.steps), config.device]
    run = subprocess.run(
        [*launch, "--nproc-per-node", str(processes), *work],
        capture_output=True,
        text=True,
    )
    if run.returncode:
        raise RuntimeError(f"a job of {processes} processes failed: {run.stderr.strip()[-300:]}")
    return json.loads(run.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> None:
    """Measure every job and print a table."""
    config = program.parse(
        Config, argv, program="ranks.py", description="Measure a step in several processes."
    )
    files.check_writable(config.json)
    rows = []
    print(
        "| processes | images per step | step, ms | own work | exchange | captions/s | memory, MB |"
    )
    print("|---|---|---|---|---|---|---|")
    for images in config.images:
        for processes in config.processes:
            row = run_job(processes, images, config)
            rows.append(row)
            print(
                f"| {processes} | {images} | {row['step']:.0f} | {row['own']:.0f} | "
                f"{row['exchange']:.1f} | {row['rate']:.0f} | {row['memory']:.0f} |",
                flush=True,
            )
    if config.json:
        files.write_json(config.json, rows)


def worker(images: str, steps: str, device: str) -> None:
    """Print the row of a job as JSON, from the main process; torchrun starts this."""
    with distributed.join():
        row = measure(int(images), int(steps), device)
        if row:
            print(json.dumps(row))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
    else:
        program.run(main)
