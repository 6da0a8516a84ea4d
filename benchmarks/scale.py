"""Measure how memory and time grow with the number of captions: `python benchmarks/scale.py`.

A table of captions (or COCO's JSON) and empty image files are written, and read in a process of its
own as `train.py` reads them. Measured are the memory afterwards and its peak.
"""

import ctypes
import gc
import json
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from synthetic import PER_IMAGE, captions  # noqa: E402

from readers import Record, load_split  # noqa: E402
from util import files, program  # noqa: E402
from vocabulary import Vocabulary  # noqa: E402

DISTINCT = 1000  # images with captions of their own; the others repeat them
MAX_COUNTED = 1_000_000  # captions from which a vocabulary is built, to save time
LOOKUPS = 20_000  # of records, to time them


@dataclass(frozen=True)
class Config:
    """The flags of this benchmark."""

    captions: tuple[int, ...] = (1_000, 100_000, 1_000_000)
    """Numbers of captions, five per image."""
    layout: Literal["csv", "coco", "none"] = "csv"
    """The file that is read: a table, COCO's JSON, or none (records are made in memory)."""
    folder: Path | None = None
    """Where to write the data (default: a temporary folder)."""
    json: Path | None = None
    """Also write the figures to this JSON file."""


def make_images(images: int) -> Iterator[tuple[int, str, list[str]]]:
    """Yield number, file name and captions of each image."""
    lines = captions(min(images, DISTINCT))
    for number in range(images):
        yield number, f"COCO_train2014_{number:012}.jpg", lines[number % len(lines)]


def write(folder: Path, layout: str, images: int) -> None:
    """Write captions and empty image files."""
    image_folder = folder / "train2014"
    image_folder.mkdir(parents=True)
    for _, name, _ in make_images(images):
        (image_folder / name).touch()
    if layout == "csv":
        with (folder / "captions.csv").open("w", encoding="utf-8") as file:
            file.write("image,caption,split\n")
            for _, name, lines in make_images(images):
                file.writelines(f"{name},{line},train\n" for line in lines)
        return
    with (folder / "captions_train2014.json").open("w", encoding="utf-8") as file:
        file.write('{"images": [')
        for number, name, _ in make_images(images):
            file.write(f"{', ' if number else ''}" + json.dumps({"id": number, "file_name": name}))
        file.write('], "annotations": [')
        for number, _, lines in make_images(images):
            for place, line in enumerate(lines):
                row = {"image_id": number, "id": PER_IMAGE * number + place, "caption": line}
                file.write(f"{', ' if number or place else ''}" + json.dumps(row))
        file.write("]}")


def make_records(images: int) -> list[Record]:
    """Return records of files that do not exist."""
    folder = Path("data/coco/train2014")
    return [Record(name, folder / name, tuple(lines)) for _, name, lines in make_images(images)]


def get_memory() -> int:
    """Return the memory of this process in bytes, after returning free memory to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def get_peak() -> int:
    """Return the peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(folder: Path, layout: str, images: int) -> dict[str, float]:
    """Return the cost of reading the train split, in bytes and seconds."""
    before, start = get_memory(), time.perf_counter()
    records = make_records(images) if layout == "none" else load_split(layout, folder, "train")
    read_seconds = time.perf_counter() - start
    peak, memory = get_peak() - before, get_memory() - before
    start = time.perf_counter()
    counted = records[: MAX_COUNTED // PER_IMAGE]
    words = Vocabulary.build((line for record in counted for line in record.captions), 1)
    vocabulary_seconds = time.perf_counter() - start
    rng, start = random.Random(0), time.perf_counter()
    for _ in range(LOOKUPS):
        records[rng.randrange(len(records))]
    lookup = (time.perf_counter() - start) / LOOKUPS
    return {"read_s": read_seconds, "memory": memory, "peak": peak, "words": len(words),
            "vocabulary_s": vocabulary_seconds, "record_us": 1e6 * lookup}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Measure each size and print a table."""
    description = "Measure how memory and time grow with the number of captions."
    config = program.parse(Config, argv, program="scale.py", description=description)
    files.check_writable(config.json)
    context, rows = multiprocessing.get_context("spawn"), []
    print("| captions | memory, bytes per caption | peak, bytes per caption | peak, MB | "
          "reading, s | vocabulary, s | a record, µs |\n|---|---|---|---|---|---|---|")  # fmt: skip
    for count in config.captions:
        with tempfile.TemporaryDirectory(dir=config.folder) as folder:
            images = max(1, count // PER_IMAGE)
            if config.layout != "none":
                write(Path(folder), config.layout, images)
            with context.Pool(1) as pool:
                row = pool.apply(measure, (Path(folder), config.layout, images))
        rows.append({"captions": count, "layout": config.layout, **row})
        print(
            f"| {count:,} | {row['memory'] / count:.0f} | {row['peak'] / count:.0f} | "
            f"{row['peak'] / 1e6:.0f} | {row['read_s']:.1f} | {row['vocabulary_s']:.1f} | "
            f"{row['record_us']:.1f} |",
            flush=True,
        )
    if config.json:
        files.write_json(config.json, rows)


if __name__ == "__main__":
    program.run(main)
