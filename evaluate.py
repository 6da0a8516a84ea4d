"""Caption a split with a model, or take captions made elsewhere, and score them.

B images · S image positions · C backbone channels
"""

import itertools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

# Before torch, which reads how its threads wait when it is loaded.
from util import threads

# isort: split
import torch
from torch import Tensor, nn

import metrics
from caption_results import (
    holds_coco_results,
    match_image_ids,
    pick_captioned,
    read_captions,
)
from corpora import Trained, read_trained
from decoding import DecodingConfig, decode, to_captions
from encoder import PRECISIONS, pick_dtype
from features import FeatureCache, encode_images
from inference import SHIPPED, Captioner, list_checkpoints
from losses import cross_entropy
from model import CaptionModel, ModelEnsemble
from onnx_model import OnnxModel
from readers import CACHE, DATASETS, Columns, Record, load_split
from report import is_report, write_report
from shards import SPLITS
from util import distributed, files, program
from util.files import UserError
from util.images import report_left_out
from util.progress import progress_bar
from util.tars import check_allowed
from util.truncation import set_strict

log = logging.getLogger(__name__)

MAX_IMAGES = 2**20
FEW = 100  # images; a CIDEr of fewer says little: it weights words by their rarity in them


# --- encode and caption


class SplitBatch(NamedTuple):
    """Consecutive images of a split that could be read.

    `features`: (B, S, C) for each encoder of the model; `seeds`, one per image, are those with
    which `inference.Captioner` samples captions (None for cached features).
    """

    records: list[Record]
    features: list[Tensor]
    seeds: list[int] | None


def encode_split(
    model: CaptionModel | ModelEnsemble,
    records: Sequence[Record],
    cache: FeatureCache | None = None,
    *,
    batch_size: int = 64,
    workers: int = 2,
    precision: str = "float32",
) -> Iterator[SplitBatch]:
    """Yield the features of `records` batch by batch, from `cache` or from the image files.

    `precision` of the CNN: float32, bfloat16, or auto (`encoder.pick_dtype`).
    Images that can't be read are left out and logged; raises UserError if they are too many.
    """
    device = next(model.parameters()).device
    parts = [records[start : start + batch_size] for start in range(0, len(records), batch_size)]
    encoded: Iterable[Any] = itertools.repeat(None, len(parts))
    if cache is None:
        amp = pick_dtype(precision, device) == torch.bfloat16
        # An image is read in the same way for all, as `inference.Captioner` does.
        at_least = max(img_size for _, img_size in model.encoders)
        how = {"amp": amp, "at_least": at_least}
        streams = [
            encode_images(records, encoder, img_size, device, batch_size, workers, **how)
            for encoder, img_size in model.encoders
        ]
        encoded = zip(*streams, strict=True)
    unreadable: dict[str | int, None] = {}
    bar = progress_bar(total=len(records), desc="captioning", unit=" images", leave=False)
    for part, views in zip(parts, encoded, strict=True):
        if cache is not None:
            features = torch.stack([cache.get(record.image_id) for record in part])
            yield SplitBatch(list(part), [features], None)
        else:
            unreadable |= {image_id: None for view in views for image_id in view.unreadable}
            rows = [row for row, record in enumerate(part) if record.image_id not in unreadable]
            if rows:
                yield SplitBatch(
                    [part[row] for row in rows],
                    [view.features[rows, 0] for view in views],
                    [views[0].seeds[row] for row in rows],
                )
        bar.update(len(part))
    bar.close()
    report_left_out(list(unreadable), len(records), "can't be read")


@torch.inference_mode()
def caption_batch(
    model: CaptionModel | ModelEnsemble, batch: SplitBatch, decoding: DecodingConfig
) -> dict[Any, str]:
    """Return image id → caption."""
    device = next(model.parameters()).device
    memory = model.encode(*(features.to(device) for features in batch.features))
    decoded = decode(
        model.decoder, memory, decoding, seeds=batch.seeds,
        longest=model.config.seq_len, no_repeat_ngram=model.no_repeat_ngram,
    )  # fmt: skip
    captions = to_captions(model.vocabulary, decoded)
    return {
        record.image_id: best.text
        for record, (best, *_) in zip(batch.records, captions, strict=True)
    }


@torch.inference_mode()
def batch_loss(model: CaptionModel, batch: SplitBatch) -> tuple[float, int]:
    """Return the negative log-likelihood of the images' own captions, in nats, and their words."""
    device = next(model.parameters()).device
    rows = [
        torch.tensor(model.vocabulary.encode(line, model.config.seq_len))
        for record in batch.records
        for line in record.captions
    ]
    # On the CPU, where it is known without waiting for a GPU which tokens are words.
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    counts = torch.tensor([len(record.captions) for record in batch.records])
    owner = torch.arange(len(counts)).repeat_interleave(counts)
    logits = model(batch.features[0].to(device), tokens, owner).logits
    loss = cross_entropy(logits, tokens)
    return float(loss.nll), loss.words


def gather_captions(captions: Mapping[Any, str], records: Sequence[Record]) -> dict[Any, str]:
    """Return all processes' captions in the order of `records`, on the main process only."""
    shares = distributed.gather(captions) or []
    merged = {image_id: text for share in shares for image_id, text in share.items()}
    return {r.image_id: merged[r.image_id] for r in records if r.image_id in merged}


# --- score


def score_captions(
    records: Sequence[Record], captions: Mapping[Any, str], *, java: bool = False
) -> dict[str, float]:
    """Return the scores of `captions` (image id → text) against the records' captions, and faults.

    With `java`, METEOR and SPICE too if they can be computed; a line is logged if they can't.
    """
    references = {record.image_id: record.captions for record in records}
    scores = metrics.score(references, captions)
    if java:
        more, reasons = metrics.java_scores(references, captions)
        scores |= more
        for reason in reasons:
            log.warning("%s", reason)
    return scores | metrics.faults(captions.values())


def score_split(
    model: CaptionModel,
    records: Sequence[Record],
    decoding: DecodingConfig,
    cache: FeatureCache | None = None,
    stop_between: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> tuple[dict[str, float], dict[Any, str]]:
    """Return the scores of a split with its "loss" (nats per word), and its captions.

    Each process captions its share. On all but the main one the loss is the only score, and there
    are no captions. The batches are iterated through `stop_between`, which may stop the work.
    """
    captions: dict[Any, str] = {}
    nll, words = 0.0, 0
    # Caption and loss batch by batch: the features of a large split do not fit in memory.
    for batch in stop_between(encode_split(model, distributed.split_by_rank(records), cache)):
        captions |= caption_batch(model, batch, decoding)
        batch_nll, batch_words = batch_loss(model, batch)
        nll, words = nll + batch_nll, words + batch_words
    captions = gather_captions(captions, records)
    nll, words = distributed.all_reduce_sum([nll, words])
    scores = {}
    if distributed.is_main():
        scores = score_captions([r for r in records if r.image_id in captions], captions)
    return scores | {"loss": nll / words}, captions


def print_scores(scores: Mapping[str, Any], file: Any = None) -> None:
    """Print those scores that are metrics or faults, one per line, with a note on few "images"."""
    for name in (*itertools.chain(*metrics.METRICS), *metrics.FAULTS):
        if name in scores:
            few = name == "CIDEr" and scores.get("images", FEW) < FEW
            note = f"  (says little of fewer than {FEW} images)" if few else ""
            print(f"  {name:8} {scores[name]:.3f}{note}", file=file or sys.stdout)


def captions_json(captions: Mapping[Any, str]) -> list[dict[str, Any]]:
    """Return `captions` in COCO's results format."""
    return [{"image_id": name, "caption": text} for name, text in captions.items()]


# --- the script


@dataclass(frozen=True)
class Config:
    """The flags of this script."""

    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    checkpoint: Path | None = None
    """A model file, or the folder of a run (default: the shipped model)."""
    ensemble: tuple[Path, ...] = ()
    """Several checkpoints, decoded together: their probabilities are averaged."""
    captions: Path | None = None
    """Score the captions of this file and use no model: what inference.py wrote (--output, --json),
    COCO's results format, or a table. Images are named by their id or path."""
    only_captioned: bool = False
    """Score only the images of which --captions has a caption."""
    dataset: Literal[tuple(DATASETS)] | None = None
    """The dataset that the split is of (default: that which the model was trained on)."""
    data_dir: str | None = None
    """Folder of the dataset's own files (default: data/DATASET); of shards, or their URL."""
    allow_commands: bool = False
    """Let --data-dir pipe:COMMAND run its command."""
    split: Literal[SPLITS] = "test"
    """Which split of it."""
    split_seed: int | None = None
    """Seed of the split of a dataset that has none of its own (default: that of the training)."""
    image_column: str | None = None
    """Column of a table (--dataset csv) with the images' names (default: that of the training)."""
    caption_column: str | None = None
    """Column of a table with the captions (default: that of the training)."""
    strict: bool = False
    """Leave out images that lack their last bytes, in place of reading them as far as they go."""
    limit: int | None = None
    """Use only this many images of the split."""
    java: bool = True
    """Compute METEOR and SPICE too, if pycocoevalcap and Java are installed."""
    json: Path | None = None
    """Write the scores to this JSON file."""
    captions_json: Path | None = None
    """Write the captions to this JSON file, in COCO's results format."""
    report: Path | None = None
    """Write a page (.html) of the scores and the best and worst captions, with their images."""
    batch_size: int = 64
    """Images per batch."""
    workers: int = field(default_factory=threads.default_workers)
    """Processes that read images."""
    device: str = "auto"
    """auto, cpu, cuda (or gpu), cuda:1, mps."""
    precision: Literal[PRECISIONS] = "auto"
    """What the CNN computes in. auto: bfloat16 where the processor multiplies it, else float32."""
    threads: int | None = None
    """CPU threads to compute with (default: one for each CPU that this process may use)."""

    def __post_init__(self) -> None:
        for name, least in (("limit", 1), ("batch_size", 1), ("workers", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} {value} must be at least {least}")
        for name, most in (("batch_size", MAX_IMAGES), ("workers", threads.MAX_WORKERS)):
            if getattr(self, name) > most:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} {getattr(self, name)} must be at most {most:,}")
        check_allowed(self.data_dir, self.allow_commands)
        if self.captions and self.ensemble:
            raise UserError("--captions scores a file and uses no model; leave out --ensemble")
        if self.only_captioned and not self.captions:
            raise UserError("--only-captioned is about --captions, which is not given")


def evaluate(config: Config) -> tuple[dict[str, Any], dict[Any, str]]:
    """Return the report (scores, split, number of images, decoding settings) and the captions.

    The captions are by the ids of the split's records. Writes the page that `report` asks for.
    Several processes share the images; all but the main one return nothing.
    """
    checkpoints = list_checkpoints(config.checkpoint, config.ensemble)
    first = (checkpoints or [SHIPPED])[0]
    trained = read_trained(first) if first.exists() and not config.captions else Trained()
    dataset = config.dataset or trained.pick_dataset(config.data_dir)
    split = load_split(*choose_data(config, dataset, trained))
    trained.warn_of_other_kind(dataset)
    used = len(split) if config.limit is None else config.limit
    records = split[:used]
    if config.captions:
        captions = read_captions(config.captions)
        if not captions:
            raise UserError(f"nothing to score: {config.captions} has no captions")
        captions = match_image_ids(captions, records, split[used:])
        source: dict[str, Any] = {"captions": config.captions.name}
        if config.only_captioned:
            source["split_images"] = len(records)
        records = pick_captioned(records, captions, config.captions, config.only_captioned)
    else:
        model = Captioner.load(checkpoints, config.device).model
        if isinstance(model, OnnxModel):
            raise UserError(
                f"{config.checkpoint} has no encoder of its own to score with; give the "
                "checkpoint that it was exported from"
            )
        share = distributed.split_by_rank(records)
        if len(share) > config.batch_size:
            threads.warn_of_overload()
        captions = {}
        for batch in encode_split(
            model,
            share,
            batch_size=config.batch_size,
            workers=config.workers,
            precision=config.precision,
        ):
            captions |= caption_batch(model, batch, config.decoding)
        captions = gather_captions(captions, records)
        records = [record for record in records if record.image_id in captions]
        source = {"decoding": asdict(config.decoding)}
    if not distributed.is_main():
        return {}, {}
    scores = score_captions(records, captions, java=config.java)
    about = {"dataset": dataset, "split": config.split, "images": len(records)}
    if config.report:
        write_report(config.report, records, captions, {**scores, **about})
    return {**scores, **about, **source}, captions


def choose_data(config: Config, dataset: str, trained: Trained) -> tuple[Any, ...]:
    """Return the arguments of `load_split`: what no flag says is as it was in training."""
    columns = Columns(config.image_column, config.caption_column)
    if dataset == "csv":
        pairs = zip(columns, trained.columns, strict=True)
        columns = Columns(*(own or then for own, then in pairs))
    seed = config.split_seed
    if seed is None:
        seed = trained.split_seed if dataset in {trained.dataset, *trained.also.values()} else 0
    return dataset, config.data_dir, config.split, seed, CACHE, columns


def check_outputs(config: Config) -> None:
    """Raise UserError or OSError, before any work, where a file can't or must not be written."""
    inputs = [config.captions, config.checkpoint, *config.ensemble]
    files.check_output(config.json, [".json"], inputs)
    files.check_output(config.captions_json, [".json"], [*inputs, config.json])
    files.check_output(config.report, [".html", ".htm"], inputs)
    files.check_replaceable(config.json, holds_scores, "scores")
    files.check_replaceable(config.captions_json, holds_coco_results, "captions of images")
    files.check_replaceable(config.report, is_report, "a report of this script")


def holds_scores(path: Path) -> bool:
    """Return whether a file is one that `--json` wrote."""
    value = files.read_json(path)
    return isinstance(value, dict) and value.keys() >= {"dataset", "split", "images"}


def main(argv: list[str] | None = None) -> None:
    """Score a model on a split and print the scores."""
    config = program.parse(
        Config, argv, program="evaluate.py", description="Caption a split and score the captions."
    )
    check_outputs(config)
    set_strict(config.strict)
    with distributed.join():
        threads.set_up_process(config.threads)
        report, captions = evaluate(config)
    if not report:  # only the main process has one
        return
    images = str(report["images"])
    if config.only_captioned:
        images += f" of {report['split_images']}"
    print(f"{report['dataset']} {config.split}, {images} images")
    print_scores(report)
    if config.json:
        files.write_json(config.json, report)
    if config.captions_json:
        files.write_json(config.captions_json, captions_json(captions))


if __name__ == "__main__":
    program.run(main)
