"""Rows of the benchmark's table: work with all threads while a neighbour keeps the CPUs busy.

Threads wait for each other. Where another program has their CPU, the others must not spin while
they wait, or the work takes several times as long as with one thread (`util/threads.py`).
"""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from machine import Machine, time_row
from synthetic import batch, features, trained_decoder, vocabulary

from config import TrainConfig
from decoder import DecoderConfig
from decoding import beam_search
from encoder import Encoder, prepare_encoder
from model import CaptionModel
from train import train_epoch
from trainer import Trainer
from util.threads import count_cpus

CPU = torch.device("cpu")
IMAGES = 16


@contextlib.contextmanager
def busy_neighbours(count: int) -> Iterator[None]:
    """Keep `count` CPUs busy with processes that only compute."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def neighbour_rows(machine: Machine) -> list[dict[str, Any]]:
    """Return the times with all threads as multiples of those with one, the other CPUs busy."""
    alone = Machine(CPU, machine.repeats)
    granted = torch.get_num_threads()

    def with_threads(count: int, work: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            torch.set_num_threads(count)
            work()

        return run

    rows = []
    try:
        for name, work in make_work().items():
            with busy_neighbours(max(1, count_cpus() - 1)):
                one, many = alone.time(with_threads(1, work), with_threads(granted, work))
            title = f"{name} beside a busy neighbour, {granted} threads against one"
            rows.append(time_row(title, one, many, 1.0))
    finally:
        torch.set_num_threads(granted)
    return rows


def make_work() -> dict[str, Callable[[], Any]]:
    """Return what is measured, by name: the CNN, training, and beam search, each on one batch."""
    torch.manual_seed(0)
    model = CaptionModel(Encoder("resnet50"), DecoderConfig(), vocabulary(), 224)
    trainer, one = Trainer(model, TrainConfig(), steps_per_epoch=10**6), batch(32)
    encode, pixels = prepare_encoder(model.encoder, CPU), torch.rand(IMAGES, 3, 224, 224)
    decoder, inputs = trained_decoder(DecoderConfig()), features(64).float()

    @torch.inference_mode()
    def search() -> None:
        beam_search(decoder, decoder.encode(inputs), beam_size=5, max_words=30, length_penalty=0.7)

    return {
        f"ResNet-50, {IMAGES} images": torch.inference_mode()(lambda: encode(pixels)),
        "training step, cached features": lambda: train_epoch(trainer, [[one]]),
        "beam 5, 64 images": search,
    }
