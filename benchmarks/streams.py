"""Measure images per second to and from tar shards, and from files: `python benchmarks/streams.py`.

Synthetic images of 500 x 375 pixels are read, decoded and resized as for training, alternately from
shards and from separate files. The best of three rounds counts; all files are in the page cache.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from synthetic import captions, vocabulary, write_jpegs  # noqa: E402

import readers  # noqa: E402
from dataset import Batch, CaptionDataset, get_loader, stream_loader  # noqa: E402
from encoder import image_transform  # noqa: E402
from readers import Record  # noqa: E402
from shards import write_shards  # noqa: E402
from util import files, program  # noqa: E402

ROUNDS = 3


@dataclass(frozen=True)
class Config:
    """The flags of this benchmark."""

    images: int = 1000
    """Number of images."""
    shard_size: int = 100
    """Images in a shard."""
    img_size: int = 224
    """Side in pixels of the square that they are resized to."""
    batch_size: int = 32
    """Images in a batch."""
    workers: tuple[int, ...] = (0, 2)
    """Threads that decode images of shards; processes that read files."""
    folder: Path | None = None
    """Where to write the data (default: a temporary folder)."""
    json: Path | None = None
    """Also write the figures to this JSON file."""


class Clock:
    """Measures wall-clock time and the processor time of this process and its finished children."""

    def __init__(self) -> None:
        self.start = self.read()

    def read(self) -> tuple[float, float]:
        """Return both times in seconds."""
        return time.perf_counter(), sum(os.times()[:4])

    def compute_rates(self, images: int) -> dict[str, float]:
        """Return images per second since the start, by both times."""
        wall, cpu = (now - then for now, then in zip(self.read(), self.start, strict=True))
        return {"images_s": images / wall, "images_cpu_s": images / max(cpu, 0.01)}


def measure(make_loader: Callable[[], Iterable[Batch]], images: int) -> dict[str, float]:
    """Return images per second of a loader, of which all batches are read."""
    clock = Clock()
    if sum(len(batch.image_ids) for batch in make_loader()) != images:
        raise RuntimeError("images are missing")
    return clock.compute_rates(images)


def select_best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each way and number of workers: its best rates."""
    best: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        kept = best.setdefault((row["what"], row.get("workers")), row)
        for clock in ("images_s", "images_cpu_s"):
            kept[clock] = max(kept[clock], row[clock])
    return list(best.values())


def main(argv: list[str] | None = None) -> None:
    """Measure and print a table."""
    description = "Measure images per second to and from tar shards."
    config = program.parse(Config, argv, program="streams.py", description=description)
    files.check_writable(config.json)
    count, rows = config.images, []
    with tempfile.TemporaryDirectory(dir=config.folder) as temporary:
        folder = Path(temporary)
        paths = write_jpegs(folder / "images", count)
        records = [
            Record(path.name, path, tuple(lines))
            for path, lines in zip(paths, captions(count), strict=True)
        ]
        clock = Clock()
        written = folder / "shards"
        write_shards({"train": records}, written, "csv", shard_size=config.shard_size)
        rows.append({"what": "written", **clock.compute_rates(count)})
        words, transform = vocabulary(), image_transform(config.img_size, train=False)
        listed = readers.list_shards(written, "train", folder / "cache")
        streamed = CaptionDataset(listed, words, 30, transform)
        separate = CaptionDataset(records, words, 30, transform)
        for workers in config.workers:
            how = {"batch_size": config.batch_size, "workers": workers}
            ways = {
                "streamed": partial(stream_loader, streamed, written, **how),
                "from files": partial(get_loader, separate, shuffle=True, **how),
            }
            for _ in range(ROUNDS):
                for name, make_loader in ways.items():
                    rates = measure(make_loader, count)
                    rows.append({"what": name, "workers": workers, **rates})
    rows = select_best(rows)
    print("| | workers | images/s | images per second of processor time |\n|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['what']} | {row.get('workers', '')} | {row['images_s']:.0f} | "
            f"{row['images_cpu_s']:.0f} |"
        )
    if config.json:
        files.write_json(config.json, rows)


if __name__ == "__main__":
    program.run(main)
