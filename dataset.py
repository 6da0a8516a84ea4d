"""Records to batches: each image with all its captions, so that the CNN runs once per image.

B images · M captions in a batch · T words · S image positions · C backbone channels
"""

import contextlib
import random
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

# Before torch, which reads how its threads wait when it is loaded.
from util import threads  # noqa: F401

# isort: split
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from readers import DATASETS, Record, load_split
from shards import read_images
from util.files import UserError
from util.images import are_too_many, read_image, report_left_out
from util.seeding import derive_seed, fork_seeded, seeded_generator
from util.signals import block_signals, ignore_signals
from util.tars import import_webdataset
from vocabulary import PAD, Vocabulary

__all__ = [
    "DATASETS",
    "Batch",
    "CaptionDataset",
    "Record",
    "Vocabulary",
    "collate_fn",
    "get_loader",
    "load_split",
    "stream_loader",
]

MOST_CAPTIONS = 50  # per image in a batch: an image with thousands would not fit into memory

BUFFER = 1000  # image files in the shuffle buffer of tar shards: about 100 MB

# Captions with these words would be wrong for the mirrored image.
SIDES = re.compile(r"\b(?:left|right)(?:most|wards?|hand(?:ed)?|side)?\b", re.IGNORECASE)


class Batch(NamedTuple):
    """Images with all their captions.

    `inputs`: pixels (B, 3, H, W) or cached features (B, S, C); `tokens` (M, T) int64, each row
    <start> words <end>, then <pad>; `owner` (M,) int64, the index of each caption's image,
    ascending. An empty batch has `inputs` (0,), `tokens` (0, 1) and `owner` (0,): see `get_loader`.
    """

    image_ids: list[str | int]
    inputs: Tensor
    tokens: Tensor
    owner: Tensor


@dataclass(eq=False)
class CaptionDataset(Dataset):
    """Each image as (image id, input, token lists), one token list per caption.

    The input is the image's pixels (3, H, W) through `transform`, or, where `features` is given
    (anything with `get(image_id, view)`, like `features.FeatureCache`), its features (S, C).
    Without a `vocabulary` there are no token lists.

    An image is augmented differently in each epoch, depending on (seed, epoch, image id) alone, so
    neither on the workers nor on whether a run was resumed. Pixels: `transform` may crop, and with
    `flip` the dataset mirrors half of the images. Features: the dataset picks one of the cache's
    `views`. The dataset does the mirroring because it knows the captions: an image with a caption
    that mentions left or right is never mirrored.
    """

    records: Sequence[Record]
    vocabulary: Vocabulary | None = None
    seq_len: int = 30
    transform: Callable[[Any], Tensor] | None = None
    features: Any = None
    views: int = 1
    flip: bool = False
    seed: int = 0
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[str | int, Tensor, list[list[int]]]:
        return self.item(self.records[index])

    def read(self, source: Any) -> Any:
        """Return an image, decoded no larger than the transform needs."""
        return read_image(source, getattr(self.transform, "at_least", None))

    def item(self, record: Record, image: Any = None) -> tuple[str | int, Tensor, list[list[int]]]:
        """Return the item of a record, whose `image` may have been read already.

        Of an image with more than `MOST_CAPTIONS` captions, each epoch uses that many others.
        """
        captions = record.captions
        if len(captions) > MOST_CAPTIONS:
            order = sorted(captions, key=lambda line: derive_seed(self.seed, self.epoch, line))
            captions = order[:MOST_CAPTIONS]
        tokens = []
        if self.vocabulary is not None:
            tokens = [self.vocabulary.encode(caption, self.seq_len) for caption in captions]
        may_mirror = not any(SIDES.search(caption) for caption in record.captions)
        seed = (self.seed, self.epoch, record.image_id)
        if self.features is not None:
            views = [view for view in range(self.views) if may_mirror or not is_mirrored(view)]
            view = views[derive_seed(*seed) % len(views)]
            return record.image_id, self.features.get(record.image_id, view), tokens
        with fork_seeded(*seed):
            pixels = self.transform(self.read(record.path) if image is None else image)
            mirror = self.flip and may_mirror and torch.rand(()) < 0.5
        return record.image_id, pixels.flip(-1) if mirror else pixels, tokens


def digest_records(records: Sequence[Record]) -> Tensor:
    """Return (N, 2) int64: digests of each image's id and of its captions, in any order."""
    rows = [
        (derive_seed(record.image_id), derive_seed("\n".join(sorted(record.captions))))
        for record in records
    ]
    return torch.tensor(rows, dtype=torch.int64).view(-1, 2)


def describe_changes(before: Tensor, now: Tensor) -> str:
    """Return how two results of `digest_records` differ, for messages; "" where they do not."""
    old, new = (dict(digests.tolist()) for digests in (before, now))
    counts = {
        "added": len(new.keys() - old.keys()),
        "removed": len(old.keys() - new.keys()),
        "with other captions": sum(new.get(each, text) != text for each, text in old.items()),
    }
    if changes := [f"{count:,} {what}" for what, count in counts.items() if count]:
        return f"images: {', '.join(changes)}"
    return "" if list(old) == list(new) else "images in another order"


def is_mirrored(view: int) -> bool:
    """Return whether this view of an image in the feature cache is a mirrored one."""
    return view % 2 == 1


def collate_fn(items: Sequence[tuple[str | int, Tensor, list[list[int]]]]) -> Batch:
    """Return the batch of a dataset's items, captions padded to the longest; it may be empty."""
    rows = [torch.tensor(tokens) for _, _, captions in items for tokens in captions]
    counts = torch.tensor([len(captions) for _, _, captions in items], dtype=torch.int64)
    return Batch(
        [image_id for image_id, _, _ in items],
        torch.stack([inputs for _, inputs, _ in items]) if items else torch.empty(0),
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
        if rows
        else torch.empty(0, 1, dtype=torch.int64),
        torch.arange(len(items)).repeat_interleave(counts),
    )


def get_loader(
    dataset: CaptionDataset,
    batch_size: int,
    *,
    shuffle: bool = False,
    sizes: Sequence[int] | None = None,
    seed: int = 0,
    epoch: int = 0,
    skip: int = 0,
    workers: int = 0,
    accumulate: int = 1,
    rank: int = 0,
    world: int = 1,
) -> DataLoader:
    """Return a loader of one epoch's `Batch`es.

    With `shuffle` the order of the images depends on (seed, epoch) alone. `sizes`: the records are
    those of several datasets, one after the other; each is spread evenly over the epoch.

    A step's batch has `batch_size` images over all `world` processes; the epoch's last one may have
    fewer. The loader gives each process its share (`rank`), in `accumulate` micro-batches, of which
    some are empty where there are too few images: all processes get the same number. `skip` leaves
    out the first steps, to continue an interrupted epoch.
    """
    if batch_size < 1:
        raise UserError(f"batch size {batch_size} must be at least 1")
    order = torch.arange(len(dataset))
    if shuffle:
        order = mix_evenly(sizes or [len(dataset)], seeded_generator(seed, epoch))
    batches = []
    for start in range(skip * batch_size, len(dataset), batch_size):
        share = order[start : start + batch_size][rank::world].tolist()
        batches += [share[part::accumulate] for part in range(accumulate)]
    return Loader(
        replace(dataset, epoch=epoch),  # a copy: loaders of two epochs may be in use at once
        batch_sampler=batches,
        collate_fn=collate_fn,
        num_workers=min(workers, len(batches)),
        pin_memory=torch.cuda.is_available(),
    )


def mix_evenly(sizes: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return a random order of datasets that lie one after the other, of `sizes` images each.

    Any part of the order has each dataset's share of it, to within one image.
    """
    places, rows, start = [], [], 0
    for size in sizes:
        rows.append(start + torch.randperm(size, generator=generator))
        places.append((torch.arange(size, dtype=torch.float64) + 0.5) / size)
        start += size
    return torch.cat(rows)[torch.cat(places).argsort(stable=True)]


class Loader(DataLoader):
    """A DataLoader whose workers ignore SIGINT (Ctrl-C) and SIGTERM.

    Both signals reach all processes of a group, but only the main process decides what to do: it
    needs its workers to finish the current step.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, worker_init_fn=ignore_signals, **kwargs)

    def __iter__(self) -> Iterator[Any]:
        with block_signals():  # the workers are started here
            return super().__iter__()


# ---- training from tar shards ----------------------------------------------------------------


@dataclass(eq=False)
class ShardStream(IterableDataset):
    """A rank's micro-batches of an epoch, and last the error that ended it, if one did."""

    dataset: CaptionDataset
    root: str
    reading: list[Record]  # in the order of the shards
    batches: list[list[Record]]
    threads: int

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch | Exception]:
        try:
            with ThreadPoolExecutor(self.threads or 1) as pool:
                yield from self.make_batches(pool.map if self.threads else map)
        except (UserError, OSError) as error:  # DataLoader would add the traceback of its worker
            yield error

    def make_batches(self, run: Callable) -> Iterator[Batch]:
        """Yield the collated batches, images decoded by `run`, a map."""
        needed = {record.path for record in chain(*self.batches)}
        images = read_images(self.root, [one for one in self.reading if one.path in needed])
        buffer: dict[Path, bytes | None] = {}
        # Augmentation draws from torch's one generator, which threads would share.
        augments = self.dataset.flip or getattr(self.dataset.transform, "crop", False)
        lock = threading.Lock() if augments else contextlib.nullcontext()

        def read_file(record: Record) -> bytes | None:
            while record.path not in buffer:
                found, content = next(images)
                buffer[found.path] = content
            return buffer.pop(record.path)

        def make_item(record: Record, content: bytes | None) -> tuple | None:
            try:
                image = content and self.dataset.read(content)
            except UserError:
                image = None
            with lock:
                return self.dataset.item(record, image) if image else None

        made = (run(make_item, part, [*map(read_file, part)]) for part in self.batches)
        lost: list[str | int] = []
        # In pairs, so that one batch is read while threads decode the one before.
        for part, (items, _) in zip(self.batches, pairwise(chain(made, [None])), strict=True):
            items = list(items)
            lost += [one.image_id for one, item in zip(part, items, strict=True) if item is None]
            if are_too_many(len(lost), len(needed)):  # raises now, not after the epoch
                report_left_out(lost, len(needed), "of the shards can't be read")
            yield collate_fn([item for item in items if item is not None])
        report_left_out(lost, len(needed), "of the shards can't be read")


class StreamLoader(Loader):
    """A loader of a `ShardStream`, whose error it raises."""

    def __iter__(self) -> Iterator[Batch]:
        batches, error = super().__iter__(), None
        for batch in batches:
            if isinstance(batch, Exception):
                error = batch
                break
            yield batch
        del batches  # ends the worker, which the error's traceback would keep
        if error:
            raise error


def stream_loader(
    dataset: CaptionDataset,
    root: str | Path,
    batch_size: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    skip: int = 0,
    workers: int = 0,
    accumulate: int = 1,
    rank: int = 0,
    world: int = 1,
) -> StreamLoader:
    """Return a loader of one epoch's `Batch`es from tar shards, as `get_loader` does from files.

    The dataset has the records of `readers.list_shards`, or the first of them. The shards in a
    random order are one long sequence of images; each rank reads an unbroken part of it and
    shuffles it in a buffer, depending on (seed, epoch, rank, world) alone. A resumed epoch opens
    only the shards it still needs. All ranks have the same number of batches, some may be empty.
    One process reads ahead, with `workers` threads that decode.
    """
    shards = [list(group) for _, group in groupby(dataset.records, lambda row: row.path.parent)]
    random.Random(derive_seed("shards", seed, epoch)).shuffle(shards)
    sequence, total = list(chain(*shards)), len(dataset.records)
    # (n + rank) // world of the first n images are a rank's: over all ranks that makes n.
    start = sum((total + other) // world for other in range(rank))
    reading = sequence[start : start + (total + rank) // world]
    # The records are shuffled as the buffer would shuffle images, before any image is read.
    rng = random.Random(derive_seed("buffer", seed, epoch, rank, world))
    shuffle = import_webdataset().shuffle(BUFFER, initial=BUFFER, rng=rng)
    order = list(shuffle(iter(reading)))
    ends = [(min(end, total) + rank) // world for end in range(0, total + batch_size, batch_size)]
    batches = [order[first:last] for first, last in pairwise(ends)][skip:]
    parts = [batch[part::accumulate] for batch in batches for part in range(accumulate)]
    dataset = replace(dataset, epoch=epoch)  # its own: another epoch's loader may still be in use
    return StreamLoader(
        ShardStream(dataset, str(root), reading, parts, workers),
        batch_size=None,
        num_workers=1 if workers and parts else 0,
        pin_memory=torch.cuda.is_available(),
    )
