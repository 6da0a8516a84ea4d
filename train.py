"""Train a captioner: `python train.py --dataset shapes`, or on Flickr8k with no flag at all.

B images · S image positions · C backbone channels · T words · M captions in a batch
"""

import csv
import io
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import readers
from config import Config, DataConfig, configure, flat
from dataset import CaptionDataset, get_loader
from decoding import DecodingConfig
from encoder import Encoder, build_encoder, get_backbone, image_transform
from evaluate import print_scores, score_split
from features import FeatureCache, cached_features
from losses import Rewards
from model import CaptionModel, read_metadata
from readers import Record, Records, SplitMissingError, data_folder, keep_readable, load_split
from streaming import stream_loader
from trainer import Trainer
from util import distributed, files, plots
from util.checkpoints import load_state, run_folder, save_state
from util.distributed import pick_device
from util.files import UserError
from util.images import read_image
from util.signals import Interrupts, StoppedError
from vocabulary import Vocabulary

log = logging.getLogger(__name__)


@dataclass
class Data:
    """The records of each split that is there; where the CNN is frozen, their features."""

    records: dict[str, Sequence[Record]]
    caches: dict[str, FeatureCache]


def load_data(config: DataConfig) -> dict[str, Sequence[Record]]:
    """Return the splits there are; the train split must be."""
    splits: dict[str, Sequence[Record]] = {}
    for split in ("train", "val", "test"):
        try:
            records = load_records(config, split)
        except SplitMissingError as error:
            if split == "train":
                raise
            log.warning("no %s scores: %s", split, error)
            continue
        if split == "train":
            records = records[: max(1, round(config.train_fraction * len(records)))]
        splits[split] = records[: config.limit]
    return splits


def load_records(config: DataConfig, split: str) -> Sequence[Record]:
    """Return a split's records; of shards to learn from only the captions, images are streamed."""
    if split == "train" and config.dataset == "shards":
        if config.views > 1:
            raise UserError(
                f"--views {config.views} is for a feature cache, and shards are read without one"
            )
        return readers.listed(str(data_folder(config.dataset, config.data_dir)), split)
    where = (config.dataset, config.data_dir, split, config.split_seed)
    return load_split(*where, cache_dir=config.cache_dir)


def build(config: Config, data: dict[str, Sequence[Record]]) -> tuple[CaptionModel, Data]:
    """Return the model to train, on its device, and the data to train it on."""
    device = pick_device(config.train.device)
    begun = config.train.init_from and CaptionModel.load(config.train.init_from)
    torch.manual_seed(config.train.seed)
    encoder = new_encoder(config, begun).to(device)
    if begun:
        vocabulary = begun.vocabulary
    else:
        captions = (line for record in data["train"] for line in record.captions)
        vocabulary = Vocabulary.build(captions, config.data.min_count)
    img_size = config.encoder.img_size or get_backbone(encoder.name).img_size
    caches = {}
    for split, records in data.items():
        if split == "train" and config.data.dataset == "shards":
            continue  # its images are read as they come, each epoch anew
        if encoder.trained == "none":
            caches[split] = split_cache(split, records, encoder, img_size, config, device)
            data[split] = Records.of(records).keep(caches[split])
        else:
            data[split] = keep_readable(records)
    # The same start for the decoder, whatever the encoder's construction drew.
    torch.manual_seed(config.train.seed)
    model = CaptionModel(encoder, config.decoder, vocabulary, img_size)
    if begun:
        model.load_state_dict(begun.state_dict())
    return model.to(device), Data(data, caches)


def new_encoder(config: Config, begun: CaptionModel | None) -> Encoder:
    """Return the encoder that the flags say, or the one of the model that the run begins with."""
    flags, finetune = config.encoder, config.encoder.finetune_cnn or None
    if not begun:
        return build_encoder(
            flags.cnn_backbone, flags.cnn_weights, finetune=finetune, grid=flags.grid
        )
    trained = "last" if finetune else "all" if flags.cnn_weights == "none" else "none"
    encoder = Encoder(begun.encoder.name, trained, begun.encoder.grid)
    encoder.load_state_dict(begun.encoder.state_dict())
    return encoder.to(memory_format=torch.channels_last)


def split_cache(
    split: str,
    records: Sequence[Record],
    encoder: Encoder,
    img_size: int,
    config: Config,
    device: torch.device,
) -> FeatureCache:
    """Return the features of a split by a frozen encoder.

    Scores are of what evaluate.py and inference.py see: the image itself, in full precision.
    """
    learned_from = split == "train"
    return cached_features(
        records,
        encoder,
        img_size,
        config.data.cache_dir,
        f"{config.data.dataset}-{split}",
        device=device,
        workers=config.data.workers,
        amp=config.train.amp and learned_from,
        views=config.data.views if learned_from else 1,
        rank=distributed.rank(),
        world=distributed.world_size(),
    )


def train(config: Config) -> dict[str, Any]:
    """Train, validate and save as the flags say; return the scores by split."""
    output, resume = config.train.output, config.train.resume
    with run_folder(output, config.data.dataset, resume=resume) as folder:
        records = load_data(config.data)
        if not config.train.resume:  # before hours of encoding, after which a --resume goes on
            write_flags(folder, config)
        model, data = build(config, records)
        steps = math.ceil(len(data.records["train"]) / config.train.batch_size)
        trainer = Trainer(model, config.train, steps)
        if config.train.scst_epochs:
            trainer.rewards = Rewards(
                data.records["train"], model.vocabulary, config.train.scst_bleu
            )
        if config.train.resume:
            go_on(trainer, folder)
            write_flags(folder, config)
        print_start(config, model, data, folder)
        return run_stages(trainer, config, data, folder)


def write_flags(folder: Path, config: Config) -> None:
    """Write config.json."""
    if distributed.is_main():
        files.write_json(folder / "config.json", flat(config))


def write_state(folder: Path, trainer: Trainer) -> None:
    """Write last.pt; all processes have their part in what it says."""
    state = trainer.state()
    if distributed.is_main():
        save_state(folder, state)


def go_on(trainer: Trainer, folder: Path) -> None:
    """Take over the state of the run in `folder`; where none was saved yet, say so."""
    state = load_state(folder)
    if state is None:
        print(f"{folder} has no training state yet: it begins with the first step")
    else:
        trainer.load(state)


def run_stages(trainer: Trainer, config: Config, data: Data, folder: Path) -> dict[str, Any]:
    """Train the stages to their end and return the scores; asked to stop, save and stop."""
    with Interrupts() as interrupts:
        try:
            while not trainer.stage_is_over() or enter_self_critical(trainer, folder):
                train_epoch(trainer, config, data, interrupts)
                finish_epoch(trainer, config, data, folder, interrupts)
            return finish(config, data, folder, trainer.rows, interrupts)
        except StoppedError:
            write_state(folder, trainer)
            print(f"stopped after step {trainer.step_number}; go on: --resume --output {folder}")
            raise KeyboardInterrupt from None


def enter_self_critical(trainer: Trainer, folder: Path) -> bool:
    """Begin the self-critical stage with the best model so far; False where there is none."""
    if trainer.critical or not trainer.config.scst_epochs:
        return False
    if trainer.epoch:
        best = CaptionModel.load(folder, trainer.device)
        trainer.model.load_state_dict(best.state_dict())
    trainer.begin(critical=True)
    # Now: a run killed later must not begin the stage again with a best model out of the stage.
    write_state(folder, trainer)
    return True


def train_epoch(trainer: Trainer, config: Config, data: Data, interrupts: Interrupts) -> None:
    """Go once over the training images, from where an interrupted epoch stopped."""
    records, model = data.records["train"], trainer.model
    cache = data.caches.get("train")
    augment = config.data.augment and model.encoder.trained != "none"
    dataset = CaptionDataset(
        records,
        model.vocabulary,
        model.config.seq_len,
        image_transform(model.img_size, train=augment),
        cache,
        views=config.data.views,
        flip=augment,
        seed=config.train.seed,
    )
    how = {
        "seed": config.train.seed,
        "epoch": trainer.epoch,
        "skip": trainer.batch,
        "workers": 0 if cache is not None else config.data.workers,
        "accumulate": config.train.accumulate,
        "rank": distributed.rank(),
        "world": distributed.world_size(),
    }
    if config.data.dataset == "shards":
        root = str(data_folder("shards", config.data.data_dir))
        loader = stream_loader(dataset, root, config.train.batch_size, **how)
    else:
        loader = get_loader(dataset, config.train.batch_size, shuffle=True, **how)
    began = time.perf_counter()
    last = trainer.first_epoch + trainer.stage_epochs
    name = f"{'self-critical ' if trainer.critical else ''}epoch {trainer.epoch + 1}/{last}"
    steps = zip(*[iter(loader)] * config.train.accumulate, strict=True)
    total = len(loader) // config.train.accumulate
    bar = tqdm(steps, desc=name, total=total, unit=" steps", disable=None, leave=False)
    try:
        for parts in interrupts.stop_between(bar):
            trainer.step(*parts)
    finally:
        trainer.seconds += time.perf_counter() - began
    trainer.check()


def finish_epoch(
    trainer: Trainer, config: Config, data: Data, folder: Path, interrupts: Interrupts
) -> None:
    """Validate, write the run's files, and make ready for the next epoch."""
    sums = trainer.sums()
    row: dict[str, Any] = {
        "epoch": trainer.epoch + 1,
        "train_loss": None if trainer.critical else sums["nll"] / trainer.words,
        "val_loss": None,
        "CIDEr": None,
        "BLEU-4": None,
        "lr": trainer.optimizer.param_groups[-1]["lr"],
        "seconds": round(trainer.seconds, 1),
        "reward": sums["rewarded"] / sums["samples"] if trainer.critical else None,
        "baseline": sums["baselines"] / sums["samples"] if trainer.critical else None,
        "bad_endings": None,
        "repeats": None,
    }
    best = trainer.best()
    with trainer.averaged() as model:
        if "val" in data.records:
            scores, captions = score_split(
                model,
                data.records["val"],
                VALIDATION,
                data.caches.get("val"),
                interrupts.stop_between_alone,
            )
            row |= {"val_loss": scores.pop("loss")} | {name: scores.get(name) for name in SHOWN}
        row = distributed.broadcast(row)  # the scores are the main process's
        if distributed.is_main():
            if "val" in data.records:
                page = folder / "samples" / f"epoch-{row['epoch']:02}.png"
                write_samples(page, data.records["val"], captions)
            if row["CIDEr"] is None or row["CIDEr"] > best:
                model.save(folder / "best.safetensors", scores=row, training=training_facts(config))
    trainer.rows.append(row)
    trainer.epoch += 1
    trainer.forget()
    if distributed.is_main():
        write_rows(folder / "metrics.csv", trainer.rows)
        plots.learning_curve(folder / "learning_curve.png", trainer.rows)
    # Last, so that a state on disk never runs ahead of the files it stands for.
    write_state(folder, trainer)
    print_row(row, trainer.device)


# Three beams rank epochs as five do. The greedy method does not: self-critical training makes it
# better long after beams have got worse.
VALIDATION = DecodingConfig(beam_size=3)
SHOWN = ("CIDEr", "BLEU-4", "bad_endings", "repeats")  # of the scores, after each epoch


def training_facts(config: Config) -> dict[str, Any]:
    """Return the flags for the model file: how it was trained, and no path of this machine."""
    flags = flat(config)
    for name in ("data_dir", "cache_dir", "output", "resume", "device", "workers"):
        del flags[name]
    if begun := flags["init_from"]:  # its own story in place of its path
        flags["init_from"] = read_metadata(begun).get("training")
    return {**flags, "cnn_weights": Path(flags["cnn_weights"]).name}


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write metrics.csv: a row an epoch, an empty field for what was not measured."""
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write_text(path, table.getvalue())


def write_samples(path: Path, records: Sequence[Record], captions: dict[str, str]) -> None:
    """Draw a page of twelve pictures of the split with their captions."""
    chosen = records[:: max(1, len(records) // 12)][:12]
    items = [
        (read_image(record.path), captions[record.image_id], [record.captions[0]])
        for record in chosen
        if record.image_id in captions
    ]
    plots.caption_page(path, items, title=path.stem)


def finish(
    config: Config,
    data: Data,
    folder: Path,
    rows: Sequence[dict[str, Any]],
    interrupts: Interrupts,
) -> dict[str, Any]:
    """Score the best model on val and, once, on test; write scores.json and print them.

    Returns the scores by split, on the main process.
    """
    model = CaptionModel.load(folder, pick_device(config.train.device))
    report: dict[str, Any] = {}
    for split in ("val", "test"):
        if split not in data.records:
            continue
        records = data.records[split]
        scores, captions = score_split(
            model, records, DecodingConfig(), data.caches.get(split), interrupts.stop_between_alone
        )
        report[split] = {**scores, "images": len(records), "decoding": asdict(DecodingConfig())}
        if distributed.is_main():
            write_samples(folder / "samples" / f"{split}.png", records, captions)
            print(f"{split}, {len(records)} images, beam {DecodingConfig().beam_size}")
            print_scores(scores)
            for record in records[:3]:
                print(f"    {record.image_id}: {captions[record.image_id]}")
    if not distributed.is_main():
        return {}
    test_loss = report.get("test", {}).get("loss")
    plots.learning_curve(folder / "learning_curve.png", list(rows), test_loss)
    files.write_json(folder / "scores.json", report)
    print(f"caption a picture: python inference.py PHOTO --checkpoint {folder}")
    return report


def print_start(config: Config, model: CaptionModel, data: Data, folder: Path) -> None:
    """Say what is about to be trained."""
    learning = sum(each.numel() for each in model.parameters() if each.requires_grad)
    images = ", ".join(f"{len(records)} {split}" for split, records in data.records.items())
    print(f"{config.data.dataset}: {images} images, {len(model.vocabulary)} words")
    print(
        f"{model.encoder.name} + {config.decoder.decoder}, {learning / 1e6:.1f} million weights "
        f"to train, on {next(model.parameters()).device}; run folder {folder}",
        flush=True,
    )


def print_row(row: dict[str, Any], device: torch.device) -> None:
    """Print an epoch's line."""
    parts = [f"epoch {row['epoch']}"]
    if row["reward"] is None:
        parts.append(f"train loss {row['train_loss']:.3f}")
    else:
        parts.append(f"reward {row['reward']:.3f} (baseline {row['baseline']:.3f})")
    if row["val_loss"] is not None:
        parts.append(f"val loss {row['val_loss']:.3f}")
        parts += [f"CIDEr {row['CIDEr']:.3f}", f"BLEU-4 {row['BLEU-4']:.3f}"]
        parts.append(f"bad endings {row['bad_endings']:.1%}, repeats {row['repeats']:.1%}")
    parts.append(f"{row['seconds']:.0f} s")
    if device.type == "cuda":
        parts.append(f"GPU memory {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB")
    print(", ".join(parts), flush=True)


def main(argv: list[str] | None = None) -> None:
    """Train a captioner."""
    with distributed.join():
        train(distributed.on_main(lambda: configure(argv)))


if __name__ == "__main__":
    files.run(main)
