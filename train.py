"""Train a captioner: `python train.py --dataset shapes`, or on Flickr8k without any flag.

The training loop is `train_epoch`. What it keeps between steps is in `trainer.py`, what it
minimises in `losses.py`, the flags in `config.py`.

B images · S image positions · C backbone channels · T words · V vocabulary · M captions in a batch
"""

import contextlib
import logging
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Before torch, which reads how its threads wait when it is loaded.
from util import threads

# isort: split
import torch
from tqdm import tqdm

from config import Config, configure, flatten
from dataset import CaptionDataset, get_loader, stream_loader
from decoding import DecodingConfig
from encoder import Encoder, build_encoder, image_transform
from evaluate import print_scores, score_split
from features import FeatureCache, cached_features
from losses import Reward, sample_captions
from model import CaptionModel, read_metadata
from readers import Record, data_folder, keep_readable, list_shards, load_splits
from trainer import Trainer
from util import distributed, files, plots
from util.checkpoints import load_state, run_folder, save_state, write_metrics
from util.distributed import pick_device
from util.files import UserError
from util.images import read_image
from util.layers import to_device
from util.signals import Interrupts, StoppedError
from vocabulary import Vocabulary

log = logging.getLogger(__name__)

# Three beams rank epochs as five do. Greedy decoding does not: self-critical training improves it
# long after beam search has become worse.
VALIDATION = DecodingConfig(beam_size=3)

Records = dict[str, Sequence[Record]]  # by split
Caches = dict[str, FeatureCache]


# --- the loop


def train_epoch(trainer: Trainer, steps: Iterable[Sequence[Any]]) -> None:
    """Change the weights by one optimiser step for each item of `steps`, a list of micro-batches.

    All processes of a job run this side by side, each with its share of a step's images. A process
    without an image in a step takes part with an empty batch, whose loss and gradients are zero.
    """
    config, model, net, optimizer = trainer.config, trainer.model, trainer.net, trainer.optimizer
    for batches in steps:
        trainer.seed_step()
        trainer.set_learning_rate()
        optimizer.zero_grad(set_to_none=True)
        if trainer.critical:
            # Captions sampled from the model itself take the place of those that people wrote. No
            # gradients yet: below, the samples are scored like any other captions.
            with trainer.autocast():
                sampled = [
                    sample_captions(model, batch, trainer.reward, config.scst_samples)
                    for batch in batches
                ]
            batches = [batch for batch, _ in sampled]
            trainer.add_rewards(torch.cat([rewards for _, rewards in sampled]))
        # The loss is a mean over the words of the whole batch, however it is divided among
        # processes and micro-batches: so every word counts the same.
        totals = trainer.count(batches)
        loss = torch.zeros((), device=trainer.device)
        for batch in batches:
            with sync_after(net, last=batch is batches[-1]):
                # Teacher forcing: the decoder reads tokens[:, :-1] and predicts tokens[:, 1:], all
                # words of all captions at once. `owner` says which image a caption is of, so that
                # the CNN runs once per image and not once per caption.
                with trainer.autocast():
                    inputs = to_device(batch.inputs, trainer.device)
                    logits, attention = net(inputs, batch.tokens, batch.owner)
                part = trainer.objective(logits, attention, batch, totals, config)
                # DistributedDataParallel takes the mean over processes; we want the sum.
                (part.objective * distributed.world_size()).backward()
            loss += part.objective.detach()
            trainer.nll += part.nll
        # Only now: the norm is that of the whole batch's gradient, summed over all processes.
        norm = trainer.clip_gradients()
        trainer.watch(batches, torch.stack([loss, norm]))
        optimizer.step()
        trainer.finish_step(totals.words)  # counts it and updates the average of weights


def sync_after(net: torch.nn.Module, *, last: bool) -> contextlib.AbstractContextManager:
    """Return the context in which gradients are summed over processes only after the last part."""
    return contextlib.nullcontext() if last or distributed.world_size() == 1 else net.no_sync()


# --- the data and the model


def load_data(config: Config) -> Records:
    """Return the records of each split that the dataset has; the train split is required."""
    data = config.data
    where = (data.dataset, data.data_dir, data.split_seed, data.cache_dir)
    if data.dataset == "shards":
        if data.views > 1:
            raise UserError(
                f"--views {data.views} is for a feature cache, and shards are read without one"
            )
        root = data_folder(data.dataset, data.data_dir)
        train = list_shards(root, "train", data.cache_dir)  # images are streamed
        splits = {"train": train} | load_splits(*where, splits=("val", "test"))
    else:
        splits = load_splits(*where, required=("train",))
    n_train = max(1, round(data.train_fraction * len(splits["train"])))
    splits["train"] = splits["train"][:n_train]
    return {split: records[: data.limit] for split, records in splits.items()}


def build(config: Config, records: Records) -> tuple[CaptionModel, Records, Caches]:
    """Return the model on its device, the records whose image can be read, and cached features.

    Features are cached where the CNN is frozen; images of shards are streamed.
    """
    device = pick_device(config.train.device)
    init_model = CaptionModel.load(config.train.init_from) if config.train.init_from else None
    torch.manual_seed(config.train.seed)
    encoder = make_encoder(config, init_model).to(device)
    if init_model:
        vocabulary = init_model.vocabulary
    else:
        # Of the training captions only: a model must not know words from val or test.
        captions = (caption for record in records["train"] for caption in record.captions)
        vocabulary = Vocabulary.build(captions, config.data.min_count)
    records, caches = dict(records), {}
    for split, every in records.items():
        if split == "train" and config.data.dataset == "shards":
            continue
        if encoder.trained != "none":
            records[split] = keep_readable(every)
            continue
        # For val and test the same features as evaluate.py: one view, in full precision.
        train = split == "train"
        caches[split] = cache = cached_features(
            every, encoder, config.encoder.img_size, config.data.cache_dir,
            f"{config.data.dataset}-{split}", device=device, workers=config.data.workers,
            amp=config.train.amp and train, views=config.data.views if train else 1,
            rank=distributed.rank(), world=distributed.world_size(),
        )  # fmt: skip
        records[split] = [record for record in every if record.image_id in cache]
    # The decoder starts from the same weights, however many numbers the encoder has drawn.
    torch.manual_seed(config.train.seed)
    model = CaptionModel(encoder, config.decoder, vocabulary, config.encoder.img_size)
    if init_model:
        model.load_state_dict(init_model.state_dict())
    # The optimiser is built later, over parameters that are on their device already.
    return model.to(device), records, caches


def make_encoder(config: Config, init_model: CaptionModel | None) -> Encoder:
    """Return the encoder that the flags name, with the weights of `init_model` if there is one."""
    flags = config.encoder
    if not init_model:
        return build_encoder(
            flags.cnn_backbone, flags.cnn_weights, finetune=flags.finetune_cnn, grid=flags.grid
        )
    trained = "last" if flags.finetune_cnn else "all" if flags.cnn_weights == "none" else "none"
    encoder = Encoder(flags.cnn_backbone, trained, flags.grid)
    encoder.load_state_dict(init_model.encoder.state_dict())
    return encoder.to(memory_format=torch.channels_last)


def load_epoch(trainer: Trainer, config: Config, records: Sequence[Record], cache: Any) -> Any:
    """Return the loader of this epoch's micro-batches, from where an interrupted epoch stopped."""
    model, data = trainer.model, config.data
    augment = data.augment and model.encoder.trained != "none"
    transform = image_transform(model.img_size, train=augment)
    dataset = CaptionDataset(
        records, model.vocabulary, model.config.seq_len, transform, cache,
        views=data.views, flip=augment, seed=config.train.seed,
    )  # fmt: skip
    options = {
        "seed": config.train.seed,
        "epoch": trainer.epoch,
        "skip": trainer.batch,
        # Cached features are read faster than another process could hand them over.
        "workers": 0 if cache is not None else data.workers,
        "accumulate": config.train.accumulate,
        "rank": distributed.rank(),
        "world": distributed.world_size(),
    }
    if data.dataset == "shards":
        root = data_folder("shards", data.data_dir)
        return stream_loader(dataset, root, config.train.batch_size, **options)
    return get_loader(dataset, config.train.batch_size, shuffle=True, **options)


# --- a run


def train(config: Config) -> dict[str, Any]:
    """Train, validate and save as the flags say; return the scores by split."""
    output, resume = config.train.output, config.train.resume
    with run_folder(output, config.data.dataset, resume=resume) as folder:
        records = load_data(config)
        if not resume:  # before hours of feature extraction, so that --resume can go on after them
            write_config(folder, config)
        model, records, caches = build(config, records)
        steps_per_epoch = math.ceil(len(records["train"]) / config.train.batch_size)
        trainer = Trainer(model, config.train, steps_per_epoch)
        if config.train.scst_epochs:
            trainer.reward = Reward(records["train"], model.vocabulary, config.train.scst_bleu)
        if resume:
            if state := load_state(folder):
                trainer.load(state)
            else:
                check_not_begun(folder)
                print(
                    f"{files.printable(folder)} has no training state yet: training starts with "
                    "the first step"
                )
            write_config(folder, config)
        print_start(config, model, records, folder)
        with Interrupts() as interrupts:
            try:
                while not trainer.stage_is_over() or start_self_critical(trainer, folder):
                    run_epoch(trainer, config, records["train"], caches.get("train"), interrupts)
                    finish_epoch(trainer, config, records, caches, folder, interrupts)
                return finish(trainer, records, caches, folder, interrupts)
            except StoppedError:
                write_state(folder, trainer)
                print(
                    f"stopped after step {trainer.step_number}; go on: --resume --output "
                    f"{files.printable(folder)}"
                )
                raise KeyboardInterrupt from None


def check_not_begun(folder: Path) -> None:
    """Raise UserError where a run without a state has a model, which a new start would replace.

    The model of the first epoch may be there: a run can be killed before its state is saved.
    """
    if not (folder / "best.safetensors").exists():
        return
    scores = read_metadata(folder).get("scores")
    if not isinstance(scores, dict) or scores.get("epoch") not in (0, 1):
        raise UserError(
            f"{folder} has a best.safetensors but no last.pt, so the run can't go on; start "
            f"another from its best weights: --init-from {folder}"
        )


def load_best(folder: Path, trainer: Trainer) -> CaptionModel:
    """Return the best model of the run; UserError where best.safetensors is another's."""
    best, own = CaptionModel.load(folder, trainer.device), trainer.model
    kinds = [(m.config.decoder, m.vocabulary, m.encoder.name, m.img_size) for m in (best, own)]
    shapes = [{name: each.shape for name, each in m.state_dict().items()} for m in (best, own)]
    if kinds[0] != kinds[1] or shapes[0] != shapes[1]:
        raise UserError(
            f"{folder / 'best.safetensors'} is not a model of this run; put its own back, or start "
            "a new run"
        )
    return best


def start_self_critical(trainer: Trainer, folder: Path) -> bool:
    """Start the self-critical stage from the best model so far; return False if there is none."""
    if trainer.critical or not trainer.config.scst_epochs:
        return False
    if trainer.epoch:  # there was a first stage, or else the weights are those of --init-from
        best = load_best(folder, trainer)
        trainer.model.load_state_dict(best.state_dict())
    trainer.start_stage(critical=True)
    # Now: if the run is killed later, its best model may already be one of this stage.
    write_state(folder, trainer)
    return True


def run_epoch(
    trainer: Trainer,
    config: Config,
    records: Sequence[Record],
    cache: FeatureCache | None,
    interrupts: Interrupts,
) -> None:
    """Train once on all training images, with a progress bar; stop between steps when asked to."""
    loader, size = load_epoch(trainer, config, records, cache), config.train.accumulate
    steps = map(list, zip(*[iter(loader)] * size, strict=True))  # lists of `size` micro-batches
    name = "self-critical epoch" if trainer.critical else "epoch"
    last = trainer.first_epoch + trainer.stage_epochs
    bar = tqdm(
        steps, desc=f"{name} {trainer.epoch + 1}/{last}", total=len(loader) // size,
        unit=" steps", disable=None, leave=False,
    )  # fmt: skip
    start = time.perf_counter()
    try:
        with trainer.training_mode():
            train_epoch(trainer, interrupts.stop_between(bar))
    finally:
        trainer.seconds += time.perf_counter() - start
    trainer.check_finite()


def finish_epoch(
    trainer: Trainer,
    config: Config,
    records: Records,
    caches: Caches,
    folder: Path,
    interrupts: Interrupts,
) -> None:
    """Validate, write the run's files, and set the counters for the next epoch."""
    sums, critical = trainer.total_sums(), trainer.critical
    row: dict[str, Any] = {
        "epoch": trainer.epoch + 1,
        "train_loss": None if critical else sums["nll"] / trainer.words,
        "val_loss": None,
        "CIDEr": None,
        "BLEU-4": None,
        "lr": trainer.optimizer.param_groups[-1]["lr"],
        "seconds": round(trainer.seconds, 1),
        "reward": sums["rewarded"] / sums["samples"] if critical else None,
        "baseline": sums["baselines"] / sums["samples"] if critical else None,
        "bad_endings": None,
        "repeats": None,
    }
    with trainer.averaged_model() as model:
        if "val" in records:
            scores, captions = score_split(
                model, records["val"], VALIDATION, caches.get("val"), interrupts.stop_between_alone
            )
            row |= {"val_loss": scores.pop("loss")} | {name: float(s) for name, s in scores.items()}
        row = distributed.broadcast(row)  # only the main process has the scores
        if distributed.is_main():
            if "val" in records:
                path = folder / "samples" / f"epoch-{row['epoch']:02}.png"
                write_samples(path, records["val"], captions)
            # Chosen by the scores of freely generated captions: the loss, which knows only teacher
            # forcing, may rise while captions still improve.
            if row["CIDEr"] is None or row["CIDEr"] > trainer.best_score():
                info = training_info(config)
                model.save(folder / "best.safetensors", scores=row, training=info)
    trainer.rows.append(row)
    trainer.epoch += 1
    trainer.start_epoch()
    if distributed.is_main():
        write_metrics(folder / "metrics.csv", trainer.rows)
        plots.learning_curve(folder / "learning_curve.png", trainer.rows)
    # Last: a state on disk must never be ahead of the files that it belongs to.
    write_state(folder, trainer)
    print_row(row, trainer.device)


def finish(
    trainer: Trainer, records: Records, caches: Caches, folder: Path, interrupts: Interrupts
) -> dict[str, Any]:
    """Score the best model on val and, once, on test; write scores.json and print the scores.

    Returns them by split, on the main process.
    """
    # The only time that the test split is used, after validation has chosen the model.
    model, decoding = load_best(folder, trainer), DecodingConfig()
    report: dict[str, Any] = {}
    for split in ("val", "test"):
        if split not in records:
            continue
        scores, captions = score_split(
            model, records[split], decoding, caches.get(split), interrupts.stop_between_alone
        )
        report[split] = {**scores, "images": len(records[split]), "decoding": asdict(decoding)}
        if distributed.is_main():
            write_samples(folder / "samples" / f"{split}.png", records[split], captions)
            print(f"{split}, {len(records[split])} images, beam {decoding.beam_size}")
            print_scores(scores)
            for image_id in list(captions)[:3]:
                print(f"    {files.printable(f'{image_id}: {captions[image_id]}')}")
    if not distributed.is_main():
        return {}
    test_loss = report.get("test", {}).get("loss")
    plots.learning_curve(folder / "learning_curve.png", trainer.rows, test_loss)
    files.write_json(folder / "scores.json", report)
    print(f"caption an image: python inference.py IMAGE --checkpoint {files.printable(folder)}")
    return report


# --- files and lines of a run


def write_config(folder: Path, config: Config) -> None:
    """Write config.json."""
    if distributed.is_main():
        files.write_json(folder / "config.json", flatten(config))


def write_state(folder: Path, trainer: Trainer) -> None:
    """Write last.pt; every process must call this, for the state has sums over all of them."""
    state = trainer.state()
    if distributed.is_main():
        save_state(folder, state)


def write_samples(path: Path, records: Sequence[Record], captions: dict[Any, str]) -> None:
    """Write a page of twelve images of the split with their captions."""
    chosen = records[:: max(1, len(records) // 12)][:12]
    items = [
        (read_image(record.path), captions[record.image_id], [record.captions[0]])
        for record in chosen
        if record.image_id in captions
    ]
    plots.caption_page(path, items, title=path.stem)


def training_info(config: Config) -> dict[str, Any]:
    """Return the flags for the model file: how it was trained, without paths of this machine."""
    flags = flatten(config)
    own = ("data_dir", "allow_commands", "cache_dir", "output", "resume")
    for name in (*own, "device", "workers", "threads"):
        del flags[name]
    if init_from := flags["init_from"]:  # how that model was trained, in place of its path
        flags["init_from"] = read_metadata(init_from).get("training")
    return {**flags, "cnn_weights": Path(flags["cnn_weights"]).name}


def print_start(config: Config, model: CaptionModel, records: Records, folder: Path) -> None:
    """Print what is about to be trained, and whether the machine has time for it."""
    threads.warn_of_overload()
    trainable = sum(each.numel() for each in model.parameters() if each.requires_grad)
    images = ", ".join(f"{len(every)} {split}" for split, every in records.items())
    print(f"{config.data.dataset}: {images} images, {len(model.vocabulary)} words")
    print(
        f"{model.encoder.name} + {config.decoder.decoder}, {trainable / 1e6:.1f} million weights "
        f"to train, on {next(model.parameters()).device}; run folder {files.printable(folder)}",
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
        config = distributed.on_main(lambda: configure(argv))
        threads.use_threads(config.train.threads)
        train(config)


if __name__ == "__main__":
    files.run(main)
