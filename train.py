"""Train a captioner: `python train.py --dataset shapes`, or on Flickr8k without any flag.

The training loop is `train_epoch`. What it keeps between steps is in `trainer.py`, what it
minimises in `losses.py`, its data and model are made in `prepare.py`, the flags are in `config.py`.

B images · S image positions · C backbone channels · T words · V vocabulary · M captions in a batch
"""

import contextlib
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

from config import Config, configure, flatten
from corpora import Corpus, join_train, load_corpora, mean_scores
from decoding import DecodingConfig
from evaluate import score_split
from losses import Reward, sample_captions
from model import CaptionModel
from prepare import (
    build,
    check_not_begun,
    digest_corpora,
    init_checkpoint,
    load_epoch,
    read_vocabulary,
    training_info,
    warn_of_changes,
    warn_of_few_images,
)
from run_log import (
    Board,
    open_board,
    print_row,
    print_split,
    print_start,
    show_steps,
    write_samples,
)
from trainer import Trainer
from util import distributed, files, plots, program
from util.checkpoints import load_state, run_folder, save_state, write_metrics
from util.files import UserError
from util.layers import to_device
from util.signals import Interrupts, StoppedError
from util.truncation import set_strict

# Three beams rank epochs as five do. Greedy decoding does not: self-critical training improves it
# long after beam search has become worse.
VALIDATION = DecodingConfig(beam_size=3)


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


# --- a run


def train(config: Config) -> dict[str, Any]:
    """Train, validate and save as the flags say; return the scores by split."""
    output, resume = config.train.output, config.train.resume
    with run_folder(output, config.data.dataset, resume=resume) as folder:
        corpora = load_corpora(config.data)
        if not resume:  # before hours of feature extraction, so that --resume can go on after them
            write_config(folder, config)
            warn_of_few_images(config, sum(len(each.records["train"]) for each in corpora))
        state = load_state(folder) if resume else None
        if resume and not state:
            check_not_begun(folder)
            print(
                f"{program.printable(folder)} has no training state yet: training starts with the "
                "first step"
            )
        source = init_checkpoint(config, folder, resumed=bool(state))
        init_model = CaptionModel.load(source) if source else None
        train_records, _ = join_train(corpora)
        resumed = read_vocabulary(config, train_records, folder, state) if state else None
        model = build(config, corpora, init_model, resumed)
        train_records, _ = join_train(corpora)  # without images that can't be read
        steps_per_epoch = math.ceil(len(train_records) / config.train.batch_size)
        trainer = Trainer(model, config.train, steps_per_epoch)
        trainer.training_info = training_info(config, source)
        trainer.data = digest_corpora(corpora)
        if config.train.scst_epochs:
            trainer.reward = Reward(train_records, model.vocabulary, config.train.scst_bleu)
        if state:
            trainer.load(state)
            warn_of_changes(trainer, state.get("data"), train_records, config)
        if resume:
            write_config(folder, config)
        print_start(config, model, corpora, folder)
        with Interrupts() as interrupts, open_board(folder, trainer) as board:
            run = trainer, corpora, folder, interrupts
            try:
                validates = any("val" in corpus.records for corpus in corpora)
                if init_model and validates and not (trainer.step_number or trainer.rows):
                    # Epoch 0: the scores of the model that training starts from.
                    finish_epoch(*run, board)
                while not stage_is_over(trainer) or start_self_critical(trainer, folder):
                    run_epoch(trainer, config, corpora, interrupts)
                    finish_epoch(*run, board)
                return finish(*run)
            except StoppedError:
                write_state(folder, trainer)
                print(
                    f"stopped after step {trainer.step_number}; go on: --resume --output "
                    f"{program.printable(folder)}"
                )
                raise KeyboardInterrupt from None


def stage_is_over(trainer: Trainer) -> bool:
    """Return whether the stage has had its epochs, or its scores no longer improve."""
    last = trainer.first_epoch + trainer.stage_epochs
    if trainer.epoch < last and trainer.out_of_patience():
        best, patience = trainer.best_row(), trainer.config.patience
        print(
            f"stopped early after epoch {trainer.epoch} of {last}: {patience} epochs without a "
            f"better CIDEr (--patience {patience}; 0 trains to the end); the best is epoch "
            f"{best['epoch']} with {best['CIDEr']:.3f}",
            flush=True,
        )
        return True
    return trainer.epoch >= last


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
    trainer: Trainer, config: Config, corpora: Sequence[Corpus], interrupts: Interrupts
) -> None:
    """Train once on all training images, with a progress bar; stop between steps when asked to."""
    loader, size = load_epoch(trainer, config, corpora), config.train.accumulate
    steps = map(list, zip(*[iter(loader)] * size, strict=True))  # lists of `size` micro-batches
    images = sum(len(corpus.records["train"]) for corpus in corpora)
    start = time.perf_counter()
    try:
        with trainer.training_mode():
            shown = show_steps(trainer, steps, images)
            train_epoch(trainer, interrupts.stop_between(shown))
    finally:
        trainer.seconds += time.perf_counter() - start
    trainer.check_finite()


def finish_epoch(
    trainer: Trainer,
    corpora: Sequence[Corpus],
    folder: Path,
    interrupts: Interrupts,
    board: Board | None = None,
) -> None:
    """Validate, write the run's files, and set the counters for the next epoch."""
    row, rate = trainer.epoch_row(), trainer.images_per_second()
    with trainer.averaged_model() as model:
        row |= validate(model, corpora, folder / "samples", row["epoch"], interrupts)
        row = distributed.broadcast(row)  # only the main process has the scores
        # Chosen by the scores of freely generated captions: the loss, which knows only teacher
        # forcing, may rise while captions still improve.
        is_best = row["CIDEr"] is None or row["CIDEr"] > trainer.best_score()
        if distributed.is_main() and is_best:
            info = trainer.training_info
            model.save(folder / "best.safetensors", scores=row, training=info)
    trainer.rows.append(row)
    trainer.epoch = row["epoch"]
    trainer.start_epoch()
    if distributed.is_main():
        write_metrics(folder / "metrics.csv", trainer.rows)
        plots.learning_curve(folder / "learning_curve.png", trainer.rows)
    # Last: a state on disk must never be ahead of the files that it belongs to.
    write_state(folder, trainer)
    if board:
        board.add(row)
    print_row(row, trainer.device, rate, is_best)


def validate(
    model: CaptionModel,
    corpora: Sequence[Corpus],
    pages: Path,
    epoch: int,
    interrupts: Interrupts,
) -> dict[str, float]:
    """Return the columns of metrics.csv that validation fills, and write a page for each dataset.

    Of several datasets they are the mean, and then each dataset's own. On all but the main process
    the loss is the only score.
    """
    scores = {}
    for corpus in corpora:
        if "val" in corpus.records:
            own, captions = score_split(
                model, corpus.records["val"], VALIDATION, corpus.caches.get("val"),
                interrupts.stop_between_alone,
            )  # fmt: skip
            scores[corpus.name] = {"val_loss": own.pop("loss")}
            scores[corpus.name] |= {name: float(value) for name, value in own.items()}
            if distributed.is_main():
                name = corpus.label(f"epoch-{epoch:02}")
                write_samples(pages / f"{name}.png", corpus.records["val"], captions)
    return mean_scores(scores)


def finish(
    trainer: Trainer, corpora: Sequence[Corpus], folder: Path, interrupts: Interrupts
) -> dict[str, Any]:
    """Score the best model on val and, once, on test; write scores.json and print the scores.

    Returns them by split, on the main process; those of a further dataset are at "NAME-SPLIT".
    """
    # The only time that the test split is used, after validation has chosen the model.
    model, report = load_best(folder, trainer), {}
    for corpus in corpora:
        for split in ("val", "test"):
            if split in corpus.records:
                label = corpus.label(split)
                report[label] = finish_split(model, corpus, split, folder, interrupts)
    if not distributed.is_main():
        return {}
    test_loss = report.get("test", {}).get("loss")
    plots.learning_curve(folder / "learning_curve.png", trainer.rows, test_loss)
    files.write_json(folder / "scores.json", report)
    best = trainer.best_row()
    if best and not best["epoch"]:
        print(
            "no epoch was better than epoch 0: the best model is the one that training started "
            "from; a lower --lr may help, or more images"
        )
    print(f"caption an image: python inference.py IMAGE --checkpoint {program.printable(folder)}")
    return report


def finish_split(
    model: CaptionModel, corpus: Corpus, split: str, folder: Path, interrupts: Interrupts
) -> dict[str, Any]:
    """Return the entry of a split in scores.json; write its page and print its scores."""
    records, decoding, label = corpus.records[split], DecodingConfig(), corpus.label(split)
    scores, captions = score_split(
        model, records, decoding, corpus.caches.get(split), interrupts.stop_between_alone
    )
    if distributed.is_main():
        write_samples(folder / "samples" / f"{label}.png", records, captions)
        print_split(label, scores, captions, decoding, VALIDATION)
    return {**scores, "images": len(records), "decoding": asdict(decoding)}


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


def main(argv: list[str] | None = None) -> None:
    """Train a captioner."""
    with distributed.join():
        config = distributed.on_main(lambda: configure(argv))
        threads.set_up_process(config.train.threads)
        set_strict(config.data.strict)
        distributed.pick_device(config.train.device)  # a wrong one ends here, before any file
        train(config)


if __name__ == "__main__":
    program.run(main)
