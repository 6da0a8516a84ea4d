"""Training images straight from tar shards: read one after another, and never the same way twice.

The shards of a split, in an order by chance, are one long row of images. Each process (rank) has an
unbroken part of it, no image in two parts, and takes its images through a buffer that mixes them.
Which image comes when depends on seed, epoch, rank and number of processes alone, and is known
before anything is read. All processes have the same number of steps, and together a whole batch in
each but the last.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

import shards
from dataset import Batch, CaptionDataset, Loader, collate_fn
from readers import MAX_LEFT_OUT, UNREADABLE, report_left_out
from util.files import UserError
from util.images import read_image
from util.seeding import seeded_generator
from vocabulary import END, START

BUFFER = 1000  # images, as files, that are mixed: some 100 MB of photographs
AHEAD = 2  # batches in the making beside the next


class Segment(NamedTuple):
    """Rows of the split's list that lie in one shard, one after another."""

    shard: int
    start: int
    stop: int


def share(images: int, rank: int, world: int) -> int:
    """Return how many of the first `images` of an epoch's batches are a rank's.

    (images + rank) // world, which over all ranks sums to `images` exactly (Hermite's identity).
    """
    return (images + rank) // world


def segments(
    counts: Sequence[int], *, seed: int, epoch: int, rank: int = 0, world: int = 1
) -> list[Segment]:
    """Return a rank's part of an epoch; `counts` are the images of each shard.

    The parts of all ranks are the whole, and differ by one image at most.
    """
    total, starts = sum(counts), np.cumsum([0, *counts]).tolist()
    low = sum(share(total, other, world) for other in range(rank))
    high = low + share(total, rank, world)
    order = torch.randperm(len(counts), generator=seeded_generator("shards", seed, epoch)).tolist()
    parts, before = [], 0
    for shard in order:
        first, last = max(low - before, 0), min(high - before, counts[shard])
        if first < last:
            parts.append(Segment(shard, starts[shard] + first, starts[shard] + last))
        before += counts[shard]
    return parts


def mixed(rows: np.ndarray, generator: torch.Generator, size: int = BUFFER) -> np.ndarray:
    """Return `rows` in the order in which a buffer of `size`, from which chance draws, gives them.

    No row comes before the buffer could have read it.
    """
    held, out = rows[:size].tolist(), []
    if len(rows) > size:
        drawn = torch.randint(size, (len(rows) - size,), generator=generator).tolist()
        for place, row in zip(drawn, rows[size:].tolist(), strict=True):
            out.append(held[place])
            held[place] = row
    out += [held[place] for place in torch.randperm(len(held), generator=generator).tolist()]
    return np.array(out, np.int64)


def cut(
    rows: np.ndarray, images: int, batch_size: int, rank: int = 0, world: int = 1
) -> list[np.ndarray]:
    """Return a rank's `rows` as its shares of an epoch's batches, of `images` in all.

    Over all ranks each batch has `batch_size` images, but the last; some shares may be empty.
    """
    ends = [*range(batch_size, images, batch_size), images]
    cuts = [0, *(share(end, rank, world) for end in ends)]
    return [rows[start:stop] for start, stop in pairwise(cuts)]


@dataclass(eq=False)
class ShardStream(IterableDataset):
    """A rank's batches of an epoch, as rows, read and decoded in this order.

    Images are read in this process, one shard after another, and decoded by `threads`. Yields
    `Batch`es, or, as the last, the error that ended it: an error raised in a loader's process would
    be told with all its history. In place of a batch without any image that can be read comes one
    whose `image_ids` are empty: it counts for nothing.
    """

    dataset: CaptionDataset
    root: str
    names: Sequence[str]
    parts: Sequence[Segment]
    batches: Sequence[Sequence[int]]
    threads: int = 0

    def __iter__(self) -> Iterator[Batch | Exception]:
        self.lost: list[str] = []
        self.total = sum(map(len, self.batches))
        self.lock = threading.Lock()
        try:
            yield from self._decoded()
            report_left_out(self.lost, self.total, "of the shards can't be read")
        except (ValueError, OSError) as error:
            yield error

    def _decoded(self) -> Iterator[Batch]:
        """Yield batches, some images ahead being decoded meanwhile."""
        images = self._images()
        with contextlib.ExitStack() as stack:
            submit: Callable[..., Any] = _Now
            if self.threads:
                pool = stack.enter_context(ThreadPoolExecutor(self.threads))
                stack.callback(pool.shutdown, cancel_futures=True)
                submit = pool.submit
            making: deque[list[Future]] = deque()
            for rows in self.batches:
                making.append([submit(self._item, row, next(images)) for row in rows])
                if len(making) > (AHEAD if self.threads else 0):
                    yield self._batch(making.popleft())
            while making:
                yield self._batch(making.popleft())

    def _item(self, row: int, content: bytes | None) -> tuple | str | int:
        """Return what `CaptionDataset` makes of a row; its image id where it can't be read."""
        record = self.dataset.records[row]
        if content is None:
            return record.image_id
        try:
            image = read_image(content)
        except UNREADABLE:
            return record.image_id
        # A process has one chance, torch's own: where it is drawn from, one thread at a time.
        drawn = self.dataset.flip or getattr(self.dataset.transform, "crop", False)
        with self.lock if drawn else contextlib.nullcontext():
            return self.dataset.item(record, image)

    def _batch(self, items: Sequence[Any]) -> Batch:
        made = [item.result() for item in items]
        good = [item for item in made if isinstance(item, tuple)]
        self.lost += [str(item) for item in made if not isinstance(item, tuple)]
        if len(self.lost) > MAX_LEFT_OUT * self.total:
            report_left_out(self.lost, self.total, "of the shards can't be read")
        return collate_fn(good or [self._nothing()])

    def _nothing(self) -> tuple:
        """Return an item without an id, as `CaptionDataset` makes it: an even grey, no word."""
        size = self.dataset.transform.size
        return None, torch.zeros(3, size, size), [[START, END]], [""]

    def _images(self) -> Iterator[bytes | None]:
        """Yield the file of each row of the batches, None where it is missing."""
        rows = np.concatenate([*self.batches, np.empty(0, np.int64)])
        needed = np.zeros(len(self.dataset.records), bool)
        needed[rows] = True
        held: dict[int, bytes | None] = {}
        source = self._read(needed)
        for row in rows.tolist():
            while row not in held:
                found, held[found] = next(source)
            yield held.pop(row)

    def _read(self, needed: np.ndarray) -> Iterator[tuple[int, bytes | None]]:
        """Yield row and file of each needed row, shard after shard; None for a file not there."""
        for shard, start, stop in self.parts:
            rows = (start + np.flatnonzero(needed[start:stop])).tolist()
            names = {self.dataset.records[row].path.name: row for row in rows}
            if names:
                yield from shards.samples(self.root, self.names[shard], names)
            yield from ((row, None) for row in names.values())


class _Now:
    """A call made at once, with a future's `result`."""

    def __init__(self, call: Callable[..., Any], *arguments: Any):
        self.value = call(*arguments)

    def result(self) -> Any:
        return self.value


class StreamLoader:
    """An epoch's batches from shards; raises what went wrong in reading them."""

    def __init__(self, loader: DataLoader, steps: int):
        self.loader, self.steps = loader, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            if isinstance(batch, Exception):
                raise batch
            yield batch


def stream_loader(
    dataset: CaptionDataset,
    root: str,
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
    """Return the batches of an epoch of the train shards, as `dataset.get_loader` does of files.

    The dataset's records are those that `readers.listed` gives, or the first of them. A process has
    its share of each batch of `batch_size` images, in `accumulate` parts; `skip` leaves out that
    many batches at the start. One process reads, and decodes with `workers` threads; neither
    changes what is read when.
    """
    if batch_size < 1:
        raise UserError(f"batch size {batch_size} must be at least 1")
    every = shards.read_index(root).splits["train"]
    starts = np.cumsum([0, *(shard.images for shard in every)]).tolist()
    counts = [
        max(0, min(shard.images, len(dataset.records) - start))
        for shard, start in zip(every, starts, strict=False)
    ]
    total = sum(counts)
    parts = segments(counts, seed=seed, epoch=epoch, rank=rank, world=world)
    rows = [np.arange(start, stop) for _, start, stop in parts] or [np.empty(0, np.int64)]
    rows = mixed(np.concatenate(rows), seeded_generator("buffer", seed, epoch, rank, world))
    shares = cut(rows, total, batch_size, rank, world)[skip:]
    batches = [own[part::accumulate] for own in shares for part in range(accumulate)]
    stream = ShardStream(
        replace(dataset, epoch=epoch),
        root,
        [shard.name for shard in every],
        parts,
        batches,
        workers,
    )
    loader = Loader(
        stream,
        batch_size=None,
        num_workers=1 if workers and batches else 0,
        pin_memory=torch.cuda.is_available(),
    )
    return StreamLoader(loader, len(batches))
