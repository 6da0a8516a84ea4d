"""How memory and time grow with captions: `python benchmarks/scale.py`.

A table of captions (or COCO's JSON) and as many empty image files as it names are written, and read
in a process of their own as `train.py` would; what stays in memory and the peak on the way count.
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
from util import files  # noqa: E402
from vocabulary import Vocabulary  # noqa: E402

AT_ONCE = 1000  # images whose captions are made up together; they come again with other names
MOST_COUNTED = 1_000_000  # captions whose words are counted: it takes time and no memory
LOOKS = 20_000  # records that are looked up to time it


@dataclass(frozen=True)
class Config:
    """The flags of this benchmark."""

    captions: tuple[int, ...] = (1_000, 100_000, 1_000_000)
    """How many captions; five are of one image."""
    layout: Literal["csv", "coco", "none"] = "csv"
    """The file that is read: a table, COCO's JSON, or none: records are made up in memory."""
    folder: Path | None = None
    """Where to write the data (default: a temporary folder)."""
    json: Path | None = None
    """Also write the figures to this JSON file."""


def described(images: int) -> Iterator[tuple[int, str, list[str]]]:
    """Yield number, file name and captions of so many images."""
    said = captions(min(images, AT_ONCE))
    for number in range(images):
        yield number, f"COCO_train2014_{number:012}.jpg", said[number % len(said)]


def write(folder: Path, layout: str, images: int) -> None:
    """Write captions and empty image files."""
    pictures = folder / "train2014"
    pictures.mkdir(parents=True)
    for _, name, _ in described(images):
        (pictures / name).touch()
    if layout == "csv":
        with (folder / "captions.csv").open("w", encoding="utf-8") as file:
            file.write("image,caption,split\n")
            for _, name, lines in described(images):
                file.writelines(f"{name},{line},train\n" for line in lines)
        return
    with (folder / "captions_train2014.json").open("w", encoding="utf-8") as file:
        file.write('{"images": [')
        for number, name, _ in described(images):
            file.write(f"{', ' if number else ''}" + json.dumps({"id": number, "file_name": name}))
        file.write('], "annotations": [')
        for number, _, lines in described(images):
            for place, line in enumerate(lines):
                row = {"image_id": number, "id": PER_IMAGE * number + place, "caption": line}
                file.write(f"{', ' if number or place else ''}" + json.dumps(row))
        file.write("]}")


def made(images: int) -> list[Record]:
    """Return so many records, of files that are not there."""
    folder = Path("data/coco/train2014")
    return [Record(name, folder / name, tuple(lines)) for _, name, lines in described(images)]


def block_signals() -> int:
    """Return the bytes of memory this process has now, what it could give back given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak() -> int:
    """Return the most bytes of memory this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(folder: Path, layout: str, images: int) -> dict[str, float]:
    """Return what reading the train split takes, in bytes and seconds."""
    before, began = block_signals(), time.perf_counter()
    records = made(images) if layout == "none" else load_split(layout, folder, "train")
    seconds = time.perf_counter() - began
    highest, stays = peak() - before, block_signals() - before
    began = time.perf_counter()
    some = records[: MOST_COUNTED // PER_IMAGE]
    words = Vocabulary.build((line for record in some for line in record.captions), 1)
    counted = time.perf_counter() - began
    rng, began = random.Random(0), time.perf_counter()
    for _ in range(LOOKS):
        records[rng.randrange(len(records))]
    looked = (time.perf_counter() - began) / LOOKS
    return {"read_s": seconds, "held": stays, "peak": highest, "vocabulary_s": counted,
            "words": len(words), "record_us": 1e6 * looked}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Measure each size and print a table."""
    about = "Measure how memory and time grow with captions."
    config = files.parse(Config, argv, program="scale.py", description=about)
    files.check_writable(config.json)
    context, rows = multiprocessing.get_context("spawn"), []
    print("| captions | held, bytes a caption | peak, bytes a caption | peak, MB | reading, s | "
          "vocabulary, s | a record, µs |\n|---|---|---|---|---|---|---|")  # fmt: skip
    for count in config.captions:
        with tempfile.TemporaryDirectory(dir=config.folder) as folder:
            images = max(1, count // PER_IMAGE)
            if config.layout != "none":
                write(Path(folder), config.layout, images)
            with context.Pool(1) as pool:
                found = pool.apply(measure, (Path(folder), config.layout, images))
        rows.append({"captions": count, "layout": config.layout, **found})
        print(
            f"| {count:,} | {found['held'] / count:.0f} | {found['peak'] / count:.0f} | "
            f"{found['peak'] / 1e6:.0f} | {found['read_s']:.1f} | {found['vocabulary_s']:.1f} | "
            f"{found['record_us']:.1f} |",
            flush=True,
        )
    if config.json:
        files.write_json(config.json, rows)


if __name__ == "__main__":
    files.run(main)
