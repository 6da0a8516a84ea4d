"""Images a second into tar shards, out of them, and out of files: `python benchmarks/streams.py`.

Made-up photographs of 500 x 375 pixels, read, decoded and resized as for training, in turn from
shards and from files of their own; the best of three rounds each, all from the system's memory.
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

from synthetic import captions, photographs, vocabulary  # noqa: E402

import readers  # noqa: E402
from dataset import Batch, CaptionDataset, get_loader, stream_loader  # noqa: E402
from encoder import image_transform  # noqa: E402
from readers import Record  # noqa: E402
from shards import write_shards  # noqa: E402
from util import files  # noqa: E402

ROUNDS = 3


@dataclass(frozen=True)
class Config:
    """The flags of this benchmark."""

    images: int = 1000
    """How many photographs."""
    shard_size: int = 100
    """Images in a shard."""
    img_size: int = 224
    """Pixels a side that they are resized to."""
    batch_size: int = 32
    """Images in a batch."""
    workers: tuple[int, ...] = (0, 2)
    """Threads that decode beside the one that reads a stream; processes that read files."""
    folder: Path | None = None
    """Where to write the data (default: a temporary folder)."""
    json: Path | None = None
    """Also write the figures to this JSON file."""


class Clock:
    """Seconds since it was made, by the wall and of all processors (ended processes' too)."""

    def __init__(self) -> None:
        self.began = self.now()

    def now(self) -> tuple[float, float]:
        return time.perf_counter(), sum(os.times()[:4])

    def rates(self, images: int) -> dict[str, float]:
        wall, busy = (now - then for now, then in zip(self.now(), self.began, strict=True))
        return {"images_s": images / wall, "images_cpu_s": images / max(busy, 0.01)}


def rates(made: Callable[[], Iterable[Batch]], images: int) -> dict[str, float]:
    """Return how many images a second come, when all batches are gone through."""
    clock = Clock()
    if sum(len(batch.image_ids) for batch in made()) != images:
        raise ValueError("images are missing")
    return clock.rates(images)


def best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the best round of each way, by either clock."""
    found: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        kept = found.setdefault((row["what"], row.get("workers")), row)
        for clock in ("images_s", "images_cpu_s"):
            kept[clock] = max(kept[clock], row[clock])
    return list(found.values())


def main(argv: list[str] | None = None) -> None:
    """Measure and print a table."""
    about = "Measure images a second into and out of tar shards."
    config = files.parse(Config, argv, program="streams.py", description=about)
    files.check_writable(config.json)
    count, rows = config.images, []
    with tempfile.TemporaryDirectory(dir=config.folder) as temporary:
        folder = Path(temporary)
        said = captions(count)
        plain = [
            Record(path.name, path, tuple(lines))
            for path, lines in zip(photographs(folder / "photos", count), said, strict=True)
        ]
        clock = Clock()
        written = folder / "shards"
        write_shards({"train": plain}, written, "csv", shard_size=config.shard_size)
        rows.append({"what": "written", **clock.rates(count)})
        words, transform = vocabulary(), image_transform(config.img_size, train=False)
        listed = readers.list_shards(written, "train", folder / "cache")
        streamed = CaptionDataset(listed, words, 30, transform)
        filed = CaptionDataset(plain, words, 30, transform)
        for workers in config.workers:
            how = {"batch_size": config.batch_size, "workers": workers}
            ways = {
                "streamed": partial(stream_loader, streamed, written, **how),
                "from files": partial(get_loader, filed, shuffle=True, **how),
            }
            for _ in range(ROUNDS):
                for name, way in ways.items():
                    rows.append({"what": name, "workers": workers, **rates(way, count)})
    rows = best(rows)
    print("| | workers | images/s | images a processor's second |\n|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['what']} | {row.get('workers', '')} | {row['images_s']:.0f} | "
            f"{row['images_cpu_s']:.0f} |"
        )
    if config.json:
        files.write_json(config.json, rows)


if __name__ == "__main__":
    files.run(main)
