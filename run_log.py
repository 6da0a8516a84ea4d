"""What a run of `train.py` shows people: lines, progress bars, pages of samples, TensorBoard."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from util import threads

# isort: split
import numpy as np
import torch
from PIL import Image

from config import Config
from corpora import Corpus
from decoding import DecodingConfig
from evaluate import print_scores
from model import CaptionModel
from readers import Record
from trainer import Trainer
from util import distributed, plots, program
from util.images import read_image
from util.progress import progress_bar

# Narrow enough for 80 columns; tqdm's own has the time left of the epoch.
BAR = "{desc} |{bar}| {n_fmt}/{total_fmt}, {rate_fmt}{postfix}"


def print_start(
    config: Config, model: CaptionModel, corpora: Sequence[Corpus], folder: Path
) -> None:
    """Print what is about to be trained, and whether the machine has time for it."""
    threads.warn_of_overload()
    trainable = sum(each.numel() for each in model.parameters() if each.requires_grad)
    for corpus in corpora:
        images = ", ".join(f"{len(every)} {split}" for split, every in corpus.records.items())
        words = f", {len(model.vocabulary)} words" if corpus is corpora[-1] else ""
        print(f"{program.printable(corpus.name)}: {images} images{words}")
    print(
        f"{model.encoder.name} + {config.decoder.decoder}, {trainable / 1e6:.1f} million weights "
        f"to train, on {next(model.parameters()).device}; run folder {program.printable(folder)}",
        flush=True,
    )


def show_steps(trainer: Trainer, steps: Iterator[Any], images: int) -> Iterator[Any]:
    """Yield the steps of an epoch beside a bar: images, loss, learning rate, time left of the run.

    A step is taken while it is yielded. `images`: how many the epoch has.
    """
    name = "self-critical" if trainer.critical else "epoch"
    last, size = trainer.first_epoch + trainer.stage_epochs, trainer.config.batch_size
    title = f"{name} {trainer.epoch + 1}/{last}"
    done = min(images, trainer.batch * size)  # before an interruption
    settings = {"initial": done, "unit": " images", "leave": False, "bar_format": BAR}
    with progress_bar(desc=title, total=images, **settings) as bar:
        for step in steps:
            yield step
            trainer.clock.count_step()
            bar.set_postfix_str(describe_step(trainer), refresh=False)
            bar.update(min(size, images - bar.n))


def describe_step(trainer: Trainer) -> str:
    """Return the loss or the reward, the learning rate and the time that the run still takes."""
    parts = []
    if trainer.critical and trainer.sums["samples"]:
        parts.append(f"reward {trainer.sums['rewarded'] / trainer.sums['samples']:.3f}")
    elif (loss := trainer.recent_loss()) is not None:
        parts.append(f"loss {loss:.3f}")
    parts.append(f"{trainer.clock.estimate(trainer.steps_left())} left")
    parts.append(f"lr {trainer.optimizer.param_groups[-1]['lr']:.1e}")
    return ", ".join(parts)


def print_row(row: dict[str, Any], device: torch.device, rate: float, is_best: bool) -> None:
    """Print an epoch's line; `rate` is its images per second."""
    parts = [f"epoch {row['epoch']}"]
    if not row["epoch"]:
        parts.append("before training")
    elif row["reward"] is None:
        parts.append(f"train loss {row['train_loss']:.3f}")
    else:
        parts.append(f"reward {row['reward']:.3f} (baseline {row['baseline']:.3f})")
    if row["val_loss"] is not None:
        parts.append(f"val loss {row['val_loss']:.3f}")
        own = [f"{name[6:]} {row[name]:.3f}" for name in row if name.startswith("CIDEr ")]
        each = program.printable(f" ({', '.join(own)})") if own else ""
        best = " (the best so far)" if is_best else ""
        parts += [f"CIDEr {row['CIDEr']:.3f}{each}{best}", f"BLEU-4 {row['BLEU-4']:.3f}"]
        parts.append(f"bad endings {row['bad_endings']:.1%}, repeats {row['repeats']:.1%}")
    parts.append(f"{row['seconds']:.0f} s" + (f" ({rate:.0f} images/s)" if row["epoch"] else ""))
    if device.type == "cuda":
        parts.append(f"GPU memory {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB")
    print(", ".join(parts), flush=True)


def print_split(
    label: str, scores: dict[str, Any], captions: dict[Any, str],
    decoding: DecodingConfig, validation: DecodingConfig,
) -> None:  # fmt: skip
    """Print the scores of a split and its first captions.

    And why they differ from those of the epochs, which are decoded as `validation` says.
    """
    beams, during = decoding.beam_size, validation.beam_size
    note = f"; the epochs above: beam {during}" if beams != during else ""
    print(program.printable(f"{label}, {len(captions)} images, beam {beams}{note}"))
    print_scores(scores)
    for image_id in list(captions)[:3]:
        print(f"    {program.printable(f'{image_id}: {captions[image_id]}')}")


def write_samples(path: Path, records: Sequence[Record], captions: dict[Any, str]) -> None:
    """Write a page of twelve images of the split with their captions."""
    chosen = records[:: max(1, len(records) // 12)][:12]
    items = [
        (read_image(record.path), captions[record.image_id], [record.captions[0]])
        for record in chosen
        if record.image_id in captions
    ]
    plots.caption_page(path, items, title=path.stem)


# Columns of metrics.csv -> their group in TensorBoard; all others are scores.
GROUPS = {
    "train_loss": "loss", "val_loss": "loss", "reward": "reward", "baseline": "reward",
    "lr": "training", "seconds": "training", "bad_endings": "faults", "repeats": "faults",
}  # fmt: skip


class Board:
    """The figures of metrics.csv and the pages of samples, for TensorBoard."""

    def __init__(self, folder: Path, rows: Sequence[dict[str, Any]]):
        """Write into `folder`/tensorboard; `rows` are the epochs that the run already has.

        What an earlier process wrote of later epochs, which are trained again, is hidden.
        """
        from torch.utils.tensorboard import SummaryWriter  # optional, and slow to import

        self.folder, place = folder, folder / "tensorboard"
        is_new = not place.is_dir() or not any(place.iterdir())
        following = rows[-1]["epoch"] + 1 if rows else 0
        self.writer = SummaryWriter(place, purge_step=None if is_new else following)
        for row in rows if is_new else ():
            self.add(row)

    def add(self, row: dict[str, Any]) -> None:
        """Write an epoch's row of metrics.csv, and its pages if they are there."""
        epoch = row["epoch"]
        for name, value in row.items():
            if name != "epoch" and isinstance(value, int | float):
                tag = f"{GROUPS.get(name, 'scores')}/{name.replace(' ', '/')}"
                self.writer.add_scalar(tag, value, epoch)
        for page in sorted((self.folder / "samples").glob(f"*epoch-{epoch:02}.png")):
            tag = page.stem.removesuffix(f"epoch-{epoch:02}").rstrip("-")
            with Image.open(page) as image:
                pixels = np.asarray(image.convert("RGB"))
            self.writer.add_image(f"samples/{tag or 'val'}", pixels, epoch, dataformats="HWC")
        self.writer.flush()


@contextlib.contextmanager
def open_board(folder: Path, trainer: Trainer) -> Iterator[Board | None]:
    """Yield the board of a run, on its main process and with --tensorboard; else None."""
    if not trainer.config.tensorboard or not distributed.is_main():
        yield None
        return
    board = Board(folder, trainer.rows)
    with contextlib.closing(board.writer):
        yield board
