"""Caption a split with a model, or take captions made elsewhere, and score them.

B images · S image positions · C backbone channels
"""

import base64
import html
import io
import logging
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import metrics
from decoding import DecodingConfig, decode, to_captions
from features import EncodedBatch, encode_images
from inference import Captioner, list_checkpoints
from losses import cross_entropy
from model import CaptionModel, ModelEnsemble
from onnx_model import OnnxModel
from readers import DATASETS, Record, load_split, report_left_out
from shards import SPLITS
from util import distributed, files
from util.files import UserError
from util.images import read_image
from util.tokenizer import tokenize

SHOWN = 24  # captions at either end
THUMBNAIL = (480, 360)  # pixels: sharp on a screen that doubles them

STYLE = """
:root { color-scheme: light dark; --faint: color-mix(in srgb, currentColor 9%, transparent) }
body { font: 16px/1.45 system-ui, sans-serif; max-width: 76rem; margin: 2.5rem auto;
padding: 0 1.5rem }
h1 { font-size: 1.5rem; margin: 0 0 1rem } h2 { font-size: 1.15rem; margin: 2.5rem 0 1rem }
table { border-collapse: collapse } td, th { padding: .3rem 1.6rem .3rem 0; text-align: left;
white-space: nowrap }
td { font-variant-numeric: tabular-nums; font-size: 1.15rem } th { font-weight: 400; opacity: .7 }
main { display: grid; gap: 2rem 1.5rem;
grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)) }
figure { margin: 0 } img { width: 100%; aspect-ratio: 4/3; object-fit: contain; border-radius: 6px;
background: var(--faint) } figcaption { font-weight: 600; margin-top: .4rem }
ul { margin: .3rem 0 0; padding: 0 0 0 1.1rem; font-size: .875rem; opacity: .8 }
small { font-size: .8rem; font-weight: 400; opacity: .7; display: block; overflow-wrap: anywhere }
"""


def write_report(
    path: Path, records: Sequence[Record], captions: Mapping[Any, str], scores: Mapping[str, Any]
) -> None:
    """Write an HTML page, one file that needs no other, of `captions` by the ids of `records`.

    They are ranked by their own CIDEr-D. `scores` are the split's; what is no number is left out.
    """
    references = [[tokenize(line) for line in record.captions] for record in records]
    given = [tokenize(captions[record.image_id]) for record in records]
    values = metrics.CiderD(references).scores(given, range(len(records)))
    ranked = sorted(range(len(records)), key=lambda place: -values[place])
    best = ranked[: min(SHOWN, (len(ranked) + 1) // 2)]
    worst = ranked[len(best) :][-SHOWN:][::-1]
    parts = [head(scores, len(records))]
    for title, places in (("Best captions", best), ("Worst captions", worst)):
        figures = [figure(records[p], captions[records[p].image_id], values[p]) for p in places]
        parts.append(f"<h2>{title}</h2><main>{''.join(figures)}</main>")
    files.write_text(path, "\n".join(parts) + "\n")


def head(scores: Mapping[str, Any], images: int) -> str:
    """Return the page's beginning: its style, and the scores as a table."""
    title = html.escape(f"{scores.get('dataset', '')} {scores.get('split', '')}".strip())
    rows = {name: f"{value:.3f}" for name, value in scores.items() if isinstance(value, float)}
    names = "".join(f"<th scope=col>{html.escape(name.replace('_', ' '))}" for name in rows)
    cells = "".join(f"<td>{value}" for value in rows.values())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}: captions</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
        f"<h1>{title}, {images} images</h1>"
        f'<div style="overflow-x:auto"><table><tr>{names}<tr>{cells}</table></div>'
    )


def figure(record: Record, caption: str, value: float) -> str:
    """Return a picture with its caption, that caption's CIDEr-D, and what people wrote."""
    lines = "".join(f"<li>{html.escape(line)}" for line in record.captions)
    text = html.escape(caption)
    return (
        f'<figure><img loading="lazy" alt="{text}" src="{embedded(record.path)}">'
        f"<figcaption>{text}<small>CIDEr {value:.2f} · {html.escape(str(record.image_id))}</small>"
        f"</figcaption><ul>{lines}</ul></figure>"
    )


def embedded(path: Path) -> str:
    """Return a small copy of a picture as an address that holds it."""
    picture = read_image(path)
    picture.thumbnail(THUMBNAIL, Image.Resampling.LANCZOS)
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


log = logging.getLogger(__name__)

PRINTED = (
    "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "SPICE", "bad_endings",
    "repeats",
)  # fmt: skip
MOST_IMAGES, MOST_WORKERS = 2**20, 1024
EXAMPLE_ROW = '{"image_id": …, "caption": "…"}'


def split_features(
    model: CaptionModel | ModelEnsemble,
    records: Sequence[Record],
    cache: Any = None,
    *,
    batch_size: int = 64,
    workers: int = 2,
) -> Iterator[tuple[list[str], list[Tensor]]]:
    """Yield image ids and features (B, S, C) for each of the model's views, from cache or files.

    Images that can't be read are left out; raises ValueError when they are over 1 %.
    """
    lost: list[str] = []
    if cache is None:
        device = next(model.parameters()).device
        batches = zip(
            *(
                encode_images(records, encoder, img_size, device, batch_size, workers)
                for encoder, img_size in model.encoders
            ),
            strict=True,
        )
    else:
        batches = (
            [
                EncodedBatch(
                    torch.stack([cache.get(each.image_id) for each in part])[:, None], [], []
                )
            ]
            for part in _parts(records, batch_size)
        )
    for part, encoded in zip(_parts(records, batch_size), batches, strict=True):
        unread = list(dict.fromkeys(name for batch in encoded for name in batch.unreadable))
        lost += unread
        kept = [row for row, record in enumerate(part) if record.image_id not in unread]
        if kept:
            yield (
                [part[row].image_id for row in kept],
                [batch.features[kept, 0] for batch in encoded],
            )
    report_left_out(lost, len(records), "can't be read")


def _parts(records: Sequence[Record], size: int) -> Iterator[Sequence[Record]]:
    return (records[start : start + size] for start in range(0, len(records), size))


def caption_split(
    model: CaptionModel | ModelEnsemble,
    features: Iterable[tuple[list[str], Sequence[Tensor]]],
    decoding: DecodingConfig,
    total: int | None = None,
) -> dict[str, str]:
    """Return image id → caption for features as `split_features` yields them."""
    captions: dict[str, str] = {}
    device = next(model.parameters()).device
    with tqdm(total=total, desc="captioning", unit=" images", disable=None, leave=False) as bar:
        for image_ids, views in features:
            seeds = [zlib.crc32(os.fsencode(str(image_id))) for image_id in image_ids]
            with torch.inference_mode():
                memory = model.encode(*(batch.to(device) for batch in views))
                longest = model.config.seq_len
                decoded = decode(model.decoder, memory, decoding, longest=longest, seeds=seeds)
            texts = (each[0].text for each in to_captions(model.vocabulary, decoded))
            captions.update(zip(image_ids, texts, strict=True))
            bar.update(len(image_ids))
    return captions


def gathered(captions: Mapping[Any, str], records: Sequence[Record]) -> dict[Any, str]:
    """Return the captions that all processes have, in the order of `records`.

    Only the main process gets them; the others get none.
    """
    shares = distributed.gather(captions) or []
    every = {image_id: text for share in shares for image_id, text in share.items()}
    return {each.image_id: every[each.image_id] for each in records if each.image_id in every}


def score_captions(
    records: Sequence[Record], captions: Mapping[str, str], *, java: bool = False
) -> dict[str, float]:
    """Return the scores of `captions` (image id → text) against the records' captions.

    With `java`, METEOR and SPICE too where they can be had; a line is logged where not.
    """
    references = {record.image_id: record.captions for record in records}
    scores = metrics.score(references, captions)
    if java:
        more, reasons = metrics.java_scores(references, captions)
        scores |= more
        for reason in reasons:
            log.warning("%s", reason)
    return scores


def score_split(
    model: CaptionModel,
    records: Sequence[Record],
    decoding: DecodingConfig,
    cache: Any = None,
    stop_between: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> tuple[dict[str, float], dict[Any, str]]:
    """Return the scores of a split, its loss too, and its captions, on the main process.

    Each process captions its share; the others return no captions, and the loss as their score.
    What is iterated goes through `stop_between`, which may break off.
    """
    share = distributed.split_by_rank(records)
    features = list(stop_between(split_features(model, share, cache)))
    captions = caption_split(model, stop_between(features), decoding, len(share))
    captions = gathered(captions, records)
    scores = {}
    if distributed.is_main():
        scores = score_captions(records, captions) | metrics.faults(captions.values())
    return scores | {"loss": split_loss(model, records, features)}, captions


@torch.inference_mode()
def split_loss(
    model: CaptionModel, records: Sequence[Record], features: list[tuple[list[str], list[Tensor]]]
) -> float:
    """Return the mean negative log-likelihood a word, in nats, of the split's captions.

    `features` are those of this process's share of the images; the loss is that of all.
    """
    lines = {record.image_id: record.captions for record in records}
    nll, words = 0.0, 0
    device = next(model.parameters()).device
    for image_ids, (batch,) in features:
        captions = [[model.vocabulary.encode(line, model.config.seq_len) for line in lines[name]]
                    for name in image_ids]  # fmt: skip
        rows = [torch.tensor(tokens) for each in captions for tokens in each]
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        counts = torch.tensor([len(each) for each in captions])
        owner = torch.arange(len(captions)).repeat_interleave(counts).to(device)
        loss = cross_entropy(model(batch.to(device), tokens, owner).logits, tokens)
        nll, words = nll + float(loss.nll), words + loss.words
    nll, words = distributed.all_reduce_sum([nll, words])
    return nll / words


def read_captions(path: Path) -> dict[str, str]:
    """Return image id → caption from a COCO results file: [{"image_id": …, "caption": …}, …].

    Ids are text here, whether the file has numbers (COCO) or names (Flickr). Raises ValueError
    where the file is another thing, and where an image comes twice.
    """
    rows = files.read_json(path)
    expected = f"{path} is not a captions file: expected a JSON list of {EXAMPLE_ROW}"
    if not isinstance(rows, list):
        raise UserError(f"{expected}, not a {type(rows).__name__}")
    captions: dict[str, str] = {}
    for number, row in enumerate(rows, 1):
        if not is_caption(row):
            raise UserError(f"{expected}; entry {number} is {repr(row)[:60]}")
        if str(row["image_id"]) in captions:
            raise UserError(
                f"{path} has two captions of image {row['image_id']!r}; expected one an image"
            )
        captions[str(row["image_id"])] = row["caption"]
    return captions


def is_caption(row: Any) -> bool:
    """Return whether `row` is an entry of a COCO results file."""
    return (
        isinstance(row, dict)
        and isinstance(row.get("image_id"), (str, int))
        and isinstance(row.get("caption"), str)
    )


def captions_json(captions: Mapping[Any, str]) -> list[dict[str, Any]]:
    """Return `captions` in COCO's results format."""
    return [{"image_id": name, "caption": text} for name, text in captions.items()]


@dataclass(frozen=True)
class Config:
    """The flags of this script."""

    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    checkpoint: Path | None = None
    """A model file, or the folder of a run (default: the shipped model)."""
    ensemble: tuple[Path, ...] = ()
    """Several checkpoints, decoded together: the mean of their probabilities decides."""
    captions: Path | None = None
    """Score the captions of this file (COCO results format) and use no model."""
    dataset: Literal[tuple(DATASETS)] = "flickr8k"
    """The dataset that the split is of."""
    data_dir: str | None = None
    """Folder of the dataset's own files (default: data/DATASET); of shards, or their address."""
    split: Literal[SPLITS] = "test"
    """Which part of it."""
    split_seed: int = 0
    """Seed of the split where the dataset has none of its own."""
    limit: int | None = None
    """Use only this many images of the split."""
    java: bool = True
    """METEOR and SPICE too, by pycocoevalcap and Java, where they are there."""
    json: Path | None = None
    """Write the scores to this JSON file."""
    captions_json: Path | None = None
    """Write the captions to this JSON file, in COCO's results format."""
    report: Path | None = None
    """Write a page (.html) of the scores and the best and worst captions, with their pictures."""
    batch_size: int = 64
    """Images at once."""
    workers: int = 2
    """Processes that read images."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    def __post_init__(self) -> None:
        for name, least in (("limit", 1), ("batch_size", 1), ("workers", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} {value} must be at least {least}")
        for name, most in (("batch_size", MOST_IMAGES), ("workers", MOST_WORKERS)):
            if getattr(self, name) > most:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} {getattr(self, name)} must be at most {most:,}")
        if self.captions and self.ensemble:
            raise UserError("--captions scores a file and uses no model; leave out --ensemble")


def evaluate(config: Config) -> tuple[dict[str, Any], dict[Any, str]]:
    """Return the report (scores, split, image count, decoding settings) and the captions.

    The captions go by the ids of the split's records. Writes the page that `report` asks for.
    Several processes share the images; all but the main one return nothing.
    """
    every = load_split(config.dataset, config.data_dir, config.split, config.split_seed)
    used = len(every) if config.limit is None else config.limit
    records = every[:used]
    if config.captions:
        captions = by_own_ids(read_captions(config.captions), records, every[used:])
        how: dict[str, Any] = {"captions": config.captions.name}
    else:
        captioner = Captioner.load(
            list_checkpoints(config.checkpoint, config.ensemble), config.device
        )
        if isinstance(captioner.model, OnnxModel):
            raise UserError(
                f"{config.checkpoint} has no encoder of its own to score with; give the "
                "checkpoint that it was exported from"
            )
        share = distributed.split_by_rank(records)
        features = split_features(
            captioner.model, share, batch_size=config.batch_size, workers=config.workers
        )
        captions = caption_split(captioner.model, features, config.decoding, len(share))
        captions = gathered(captions, records)
        records = [record for record in records if record.image_id in captions]
        how = {"decoding": asdict(config.decoding)}
    if not distributed.is_main():
        return {}, {}
    scores = score_captions(records, captions, java=config.java)
    scores |= metrics.faults(captions.values())
    about = {"dataset": config.dataset, "split": config.split, "images": len(records)}
    if config.report:
        write_report(config.report, records, captions, {**scores, **about})
    return {**scores, **about, **how}, captions


def by_own_ids(
    captions: Mapping[str, str], records: Sequence[Record], skipped: Sequence[Record]
) -> dict[Any, str]:
    """Return `captions` by the ids of `records`, without those of the `skipped` records."""
    own = {str(record.image_id): record.image_id for record in records}
    dropped = {str(record.image_id) for record in skipped}
    return {own.get(name, name): text for name, text in captions.items() if name not in dropped}


def main(argv: list[str] | None = None) -> None:
    """Score a model on a split and print the scores."""
    config = files.parse(
        Config, argv, program="evaluate.py", description="Caption a split and score the captions."
    )
    files.check_writable(config.json, config.captions_json, config.report)
    with distributed.join():
        report, captions = evaluate(config)
    if not report:  # the main process has it
        return
    print(f"{config.dataset} {config.split}, {report['images']} images")
    print_scores(report)
    if config.json:
        files.write_json(config.json, report)
    if config.captions_json:
        files.write_json(config.captions_json, captions_json(captions))


def print_scores(scores: Mapping[str, Any], file: Any = None) -> None:
    """Print the scores, a line each."""
    for name in PRINTED:
        if name in scores:
            print(f"  {name:8} {scores[name]:.3f}", file=file or sys.stdout)


if __name__ == "__main__":
    files.run(main)
