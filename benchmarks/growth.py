"""Measure how cost grows with images, caption length, beams and vocabulary.

Run `python benchmarks/growth.py`. Each point is measured in a process of its own, which has its own
peak memory. Features are synthetic and small (4 x 64), so that the decoder's work dominates.

B images · S image positions · C backbone channels
"""

import multiprocessing
import resource
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from synthetic import captions, vocabulary  # noqa: E402

from dataset import CaptionDataset, get_loader  # noqa: E402
from decoder import DecoderConfig, build_decoder  # noqa: E402
from decoding import beam_search  # noqa: E402
from features import FeatureCache  # noqa: E402
from losses import cross_entropy  # noqa: E402
from readers import Record  # noqa: E402
from util import files, program  # noqa: E402
from util.files import UserError  # noqa: E402

POSITIONS, CHANNELS = 4, 64
STEPS, DECODED = 30, 512  # training steps and captioned images, unless the images vary


@dataclass(frozen=True)
class Point:
    """The sizes that one process measures."""

    images: int = 1000
    length: int = 11
    beam: int = 5
    words: int = 2900


VARIED: dict[str, tuple[int, ...]] = {
    "images": (1_000, 3_000, 10_000, 30_000, 100_000),
    "length": (5, 10, 20, 40),
    "beam": (1, 2, 5, 10, 20),
    "words": (1_000, 3_000, 10_000, 30_000, 100_000),
}


@dataclass(frozen=True)
class Config:
    """The flags of this benchmark."""

    json: Path | None = None
    """Also write the figures to this JSON file."""
    picture: Path | None = None
    """Also plot them into this PNG file."""
    vary: tuple[str, ...] = tuple(VARIED)
    """What to vary: images, length, beam, words."""


def build_cache(folder: Path, images: int) -> FeatureCache:
    """Return a cache of synthetic features in the format of `features.py`."""
    path = folder / "synthetic.npy"
    array = np.lib.format.open_memmap(path, "w+", np.float16, (images, 1, POSITIONS, CHANNELS))
    rng = np.random.default_rng(0)
    for start in range(0, images, 10_000):
        part = array[start : start + 10_000]
        part[:] = rng.random(part.shape, np.float32)
    del array, part
    names = [str(number) for number in range(images)]
    files.write_json(path.with_suffix(".json"), {"image_ids": names, "left_out": []})
    return FeatureCache(path)


def measure(point: Point) -> dict[str, float]:
    """Return seconds per image of training and of captioning, and the peak memory in MB."""
    torch.manual_seed(0)
    words = vocabulary(point.words)
    before = get_peak()
    with tempfile.TemporaryDirectory() as folder:
        cache = build_cache(Path(folder), point.images)
        lines = captions(point.images, mean_length=point.length, words=point.words)
        records = [Record(str(n), Path(f"{n}.jpg"), tuple(each)) for n, each in enumerate(lines)]
        config = DecoderConfig(seq_len=3 * point.length)
        decoder = build_decoder(
            config, vocabulary=len(words), channels=CHANNELS, positions=POSITIONS
        )
        dataset = CaptionDataset(records, words, config.seq_len, features=cache)
        train_seconds = time_training(decoder, dataset, whole_epoch=point.images > 1000)
        caption_seconds = time_captioning(decoder.eval(), dataset, point)
        memory = get_peak() - before
        return {"train": train_seconds, "caption": caption_seconds, "memory": memory}


def get_peak() -> float:
    """Return this process's peak memory in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def time_training(decoder: Any, dataset: CaptionDataset, whole_epoch: bool) -> float:
    """Return seconds per image of training; with `whole_epoch`, all images are also read."""
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-3)
    done, start = 0, 0.0
    for number, batch in enumerate(get_loader(dataset, 32, shuffle=True)):
        if number == 2:  # two steps for warm-up
            done, start = 0, time.perf_counter()
        if number >= STEPS + 2:  # all steps cost the same: the other batches are only read
            if not whole_epoch:
                break
            continue
        logits = decoder(decoder.encode(batch.inputs.float()), batch.tokens, batch.owner).logits
        loss = cross_entropy(logits, batch.tokens)
        optimizer.zero_grad()
        (loss.objective / loss.words).backward()
        optimizer.step()
        done += len(batch.image_ids)
        seconds = time.perf_counter() - start
    return seconds / done


@torch.inference_mode()
def time_captioning(decoder: Any, dataset: CaptionDataset, point: Point) -> float:
    """Return seconds per image of beam search, all captions with `point.length` words."""
    images = DECODED if point.images <= 1000 else min(point.images, 10_000)
    start = time.perf_counter()
    for first in range(0, images, 64):
        part = dataset.records[first : min(first + 64, images)]
        inputs = torch.stack([dataset.features.get(record.image_id) for record in part])
        beam_search(
            decoder,
            decoder.encode(inputs.float()),
            beam_size=point.beam,
            max_words=point.length,
            min_words=point.length,
        )
    return (time.perf_counter() - start) / images


def main(argv: list[str] | None = None) -> None:
    """Measure every point and print a table."""
    config = program.parse(Config, argv, program="growth.py", description="Measure how cost grows.")
    files.check_writable(config.json, config.picture)
    unknown = set(config.vary) - set(VARIED)
    if unknown:
        raise UserError(f"{', '.join(unknown)} can't be varied; choose from {', '.join(VARIED)}")
    context = multiprocessing.get_context("spawn")
    rows = []
    print(
        "| varied | value | training, ms per image | beam search, ms per image | peak memory, MB |"
    )
    print("|---|---|---|---|---|")
    for name in config.vary:
        for value in VARIED[name]:
            point = replace(Point(), **{name: value})
            with context.Pool(1) as pool:
                measured = pool.apply(measure, (point,))
            rows.append({"varied": name, **asdict(point), **measured})
            print(
                f"| {name} | {value:,} | {1000 * measured['train']:.2f} | "
                f"{1000 * measured['caption']:.2f} | {measured['memory']:.0f} |",
                flush=True,
            )
    if config.json:
        files.write_json(config.json, rows)
    if config.picture:
        draw(config.picture, rows)


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Plot time (above) and memory (below) against each varied size, on logarithmic axes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    varied = list(dict.fromkeys(row["varied"] for row in rows))
    titles = {"images": "images", "length": "words per caption", "beam": "beams",
              "words": "words in the vocabulary"}  # fmt: skip
    figure = Figure(figsize=(3.4 * len(varied), 5.4), dpi=110, layout="constrained")
    panels = figure.subplots(2, len(varied), sharex="col", sharey="row", squeeze=False)
    for (times, memory), name in zip(panels.T, varied, strict=True):
        chosen = [row for row in rows if row["varied"] == name]
        values = [row[name] for row in chosen]
        for key, label, line in (("train", "training", "o-"), ("caption", "beam search", "s-")):
            colour = {"train": "#0072B2", "caption": "#D55E00"}[key]
            times.plot(values, [1000 * row[key] for row in chosen], line, color=colour, label=label)
        memory.plot(values, [row["memory"] for row in chosen], "^-", color="#555555")
        memory.set(xlabel=titles[name], xticks=values)
        for axes in (times, memory):
            axes.set(xscale="log", yscale="log")
            axes.grid(alpha=0.3)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
                axis.set_minor_formatter(NullFormatter())
        memory.set_xticks(values, [f"{value:,}" for value in values], fontsize=8)
    panels[0][0].set(ylabel="ms per image", ylim=(0.5, 300))
    panels[1][0].set(ylabel="peak memory, MB", ylim=(100, 20_000))
    panels[0][0].legend(frameon=False)
    with files.replacing(path) as temporary:
        figure.savefig(temporary, format="png")


if __name__ == "__main__":
    program.run(main)
