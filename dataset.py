"""Records → batches of images with all their captions; and the words themselves.

B images · M captions in a batch · T words · S image positions · C backbone channels

`CaptionDataset` turns records into tensors, `collate_fn` puts all captions of an image into the
batch of that image, so the CNN runs once per image.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from readers import DATASETS, Record, load_split
from util.files import UserError
from util.images import read_image
from util.seeding import derive_seed, fork_seeded
from util.signals import block_signals, ignore_signals
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
]

# Captions of one image in a batch: one with thousands would not fit into memory.
MOST_CAPTIONS = 50

SIDES = re.compile(r"\b(?:left|right)(?:most|wards?|hand(?:ed)?|side)?\b", re.IGNORECASE)


# ---- words -----------------------------------------------------------------------------------


# ---- batches ---------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Images with all their captions.

    `inputs`: pixels (B, 3, H, W) or cached features (B, S, C); `tokens` (M, T) int64, each row
    <start> words <end> then <pad>; `owner` (M,) which image a caption belongs to, ascending.
    Without `image_ids` it counts for nothing: see `get_loader`.
    """

    image_ids: list[str]
    inputs: Tensor
    tokens: Tensor
    owner: Tensor
    references: list[list[str]] = []  # noqa: RUF012


@dataclass(eq=False)
class CaptionDataset(Dataset):
    """Records as (image id, input, token lists, captions).

    The input comes from `features` (anything with `get(image_id, view)`) where given, one of its
    `views` drawn anew each epoch, else from the image file through `transform`. With `flip`, half
    of the images, drawn anew each epoch, are mirrored. None is whose captions speak of left or
    right (views of odd number are mirrored ones). Without `vocabulary` there are no tokens. An
    image with more than `MOST_CAPTIONS` captions has so many of them as tokens, others each epoch.
    The item at `~index` (a negative number) is that at `index`, with None for an id.
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

    def __getitem__(self, index: int) -> tuple[str | None, Tensor, list[list[int]], list[str]]:
        if index < 0:
            return None, *self[~index][1:]
        return self.item(self.records[index])

    def item(
        self, record: Record, image: Any = None
    ) -> tuple[str, Tensor, list[list[int]], list[str]]:
        """Return what the record gives; `image`, if given, is read in place of its file."""
        tokens = []
        if self.vocabulary is not None:
            tokens = [self.vocabulary.encode(line, self.seq_len) for line in self._said(record)]
        return record.image_id, self._input(record, image), tokens, list(record.captions)

    def _said(self, record: Record) -> Sequence[str]:
        if len(record.captions) <= MOST_CAPTIONS:
            return record.captions
        order = [(derive_seed(self.seed, self.epoch, line), line) for line in record.captions]
        return [line for _, line in sorted(order)[:MOST_CAPTIONS]]

    def _input(self, record: Record, image: Any) -> Tensor:
        sided = any(SIDES.search(line) for line in record.captions)
        # Augmentation depends on nothing but (seed, epoch, image): not on workers, not on resume.
        chance = (self.seed, self.epoch, record.image_id)
        if self.features is not None:
            allowed = [view for view in range(self.views) if not (sided and is_mirrored(view))]
            return self.features.get(record.image_id, allowed[derive_seed(*chance) % len(allowed)])
        with fork_seeded(*chance):
            pixels = self.transform(read_image(record.path if image is None else image))
            mirrored = self.flip and torch.rand(()) < 0.5
        return pixels.flip(-1) if mirrored and not sided else pixels


def is_mirrored(view: int) -> bool:
    """Return whether this view of an image in the feature cache is a mirrored one."""
    return view % 2 == 1


def collate_fn(items: Sequence[tuple]) -> Batch:
    """Return the batch of `items`: inputs stacked, captions padded to the longest of the batch.

    Items without an id (None) have none in the batch either. A rank without images of a step has a
    batch of none.
    """
    if not items:
        nothing = torch.zeros(0, dtype=torch.int64)
        return Batch([], torch.zeros(0), nothing.view(0, 0), nothing, [])
    image_ids, inputs, tokens, references = zip(*items, strict=True)
    rows = [torch.tensor(caption) for captions in tokens for caption in captions]
    padded = torch.empty(0, 0, dtype=torch.int64)
    if rows:
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    counts = torch.tensor([len(captions) for captions in tokens])
    owner = torch.arange(len(items)).repeat_interleave(counts)
    image_ids = [image_id for image_id in image_ids if image_id is not None]
    return Batch(image_ids, torch.stack(inputs), padded, owner, list(references))


def get_loader(
    dataset: CaptionDataset,
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    epoch: int = 0,
    skip: int = 0,
    workers: int = 0,
    accumulate: int = 1,
    rank: int = 0,
    world: int = 1,
) -> DataLoader:
    """Return a loader of `Batch`es of `batch_size` images for one epoch.

    With `shuffle` the order depends on (seed, epoch) alone; `skip` leaves out that many batches
    at the start, which is how an interrupted epoch goes on. Every image is used: the last batch
    may be smaller. Of each batch a process has the share of its `rank` among `world` processes,
    and that in `accumulate` parts, each a `Batch` of its own. Where there is no image for a part,
    it borrows one, and its `image_ids` are empty: it counts for nothing.
    """
    order = Order(len(dataset), batch_size, seed if shuffle else None, epoch)
    batches = Shares(order, skip, accumulate, rank, world)
    return Loader(
        replace(dataset, epoch=epoch),  # its own: a loader of another epoch may still be in use
        batch_sampler=batches,
        collate_fn=collate_fn,
        num_workers=min(workers, len(batches)),
        pin_memory=torch.cuda.is_available(),
    )


class Order:
    """Which images each batch of an epoch has: in order, or with a `seed` by chance."""

    def __init__(self, images: int, batch_size: int, seed: int | None = None, epoch: int = 0):
        if batch_size < 1:
            raise UserError(f"batch size {batch_size} must be at least 1")
        self.batch_size = batch_size
        self.order = torch.arange(images)
        if seed is not None:
            generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
            self.order = torch.randperm(images, generator=generator)

    def __len__(self) -> int:
        return math.ceil(len(self.order) / self.batch_size)

    def __getitem__(self, number: int) -> list[int]:
        """Return the images of a batch."""
        first = number * self.batch_size
        return self.order[first : first + self.batch_size].tolist()


class Shares:
    """One process's parts of the batches of an `Order`, from batch `skip` on."""

    def __init__(self, order: Order, skip: int, accumulate: int, rank: int, world: int):
        self.order, self.skip, self.parts = order, skip, accumulate
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return max(0, len(self.order) - self.skip) * self.parts

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(self.skip, len(self.order)):
            batch = self.order[number]
            own = batch[self.rank :: self.world]
            for part in range(self.parts):
                yield own[part :: self.parts] or [~batch[0]]  # see CaptionDataset


class Loader(DataLoader):
    """A DataLoader whose workers ignore Ctrl-C and SIGTERM, which reach a whole process group.

    The main process decides what they mean; were its workers gone, it could not finish its step.
    """

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, worker_init_fn=ignore_signals, **settings)

    def __iter__(self) -> Iterator[Any]:
        with block_signals():  # workers are born here
            return super().__iter__()
