"""Records → batches of images with all their captions; and the words themselves.

B images · M captions in a batch · T words · S image positions · C backbone channels

`CaptionDataset` turns records into tensors, `collate_fn` puts all captions of an image into the
batch of that image, so the CNN runs once per image.
"""

import contextlib
import hashlib
import math
import re
import signal
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import files
from decoding import END, PAD, START, UNK
from images import read_image
from layouts import DATASETS, load_split
from records import Record

__all__ = [
    "DATASETS",
    "Batch",
    "CaptionDataset",
    "DataConfig",
    "Record",
    "Vocabulary",
    "collate_fn",
    "get_loader",
    "load_split",
]

# Captions of one image in a batch: one with thousands would not fit into memory.
MOST_CAPTIONS = 50
# A slip of the keyboard shall not fill a disk with views, or start a process for each image.
MOST_VIEWS, MOST_WORKERS = 1000, 1024

SIDES = re.compile(r"\b(?:left|right)(?:most|wards?|hand(?:ed)?|side)?\b", re.IGNORECASE)


@dataclass(frozen=True)
class DataConfig:
    """What is learned from."""

    dataset: Literal[tuple(DATASETS)] = "flickr8k"
    """What to learn from; shapes is drawn by the project itself, shards are tar files as
    features.py --shards writes them."""
    data_dir: str | None = None
    """Folder of the dataset's own files (default: data/DATASET); of shards, or their address."""
    split_seed: int = 0
    """Seed of the split where the dataset has none of its own."""
    train_fraction: float = 1.0
    """Share of the training images to use, for quick trials."""
    limit: int | None = None
    """Use only this many images of each split, for quick trials."""
    min_count: int = 4
    """Words that come less often in the training captions are unknown."""
    augment: bool = True
    """Where the CNN is trained: random crops, and mirroring of what has no left or right."""
    cache_dir: Path = Path("data/cache")
    """Where the features of a frozen CNN are kept."""
    views: int = 1
    """Views of each training image that the cache keeps: 1 the image alone, 2 mirrored too, more:
    random parts, every other one mirrored. Training sees one of them by chance each epoch. For
    Flickr8k the default is 2."""
    workers: int = 2
    """Processes that read images."""

    def __post_init__(self) -> None:
        for name, least in (("limit", 1), ("min_count", 1), ("views", 1), ("workers", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')} {value} must be at least {least}")
        for name, most in (("views", MOST_VIEWS), ("workers", MOST_WORKERS)):
            if getattr(self, name) > most:
                raise ValueError(f"--{name} {getattr(self, name)} must be at most {most:,}")
        if not 0 < self.train_fraction <= 1:
            raise ValueError(
                f"--train-fraction {self.train_fraction} must be above 0 and at most 1"
            )


# ---- words -----------------------------------------------------------------------------------


class _Letters(dict):
    """Maps a character to itself if it can be in a word, apostrophes to ', the rest to a space.

    Invisible characters that shape a word (joiners, soft hyphens, direction marks) go without a
    trace; the zero-width space parts words.
    """

    def __missing__(self, code: int) -> str:
        char = chr(code)
        category = unicodedata.category(char)
        if char in "'’ʼ":
            self[code] = "'"
        elif category == "Cf" and char != "\u200b":
            self[code] = ""
        else:
            self[code] = char if category[0] in "LMN" else " "
        return self[code]


_LETTERS = _Letters()
_WORD = re.compile(r"[^\s']+(?:'[^\s']+)*")


def words(caption: str) -> list[str]:
    """Return the model's words: lower-cased runs of letters, marks, digits and inner apostrophes.

    Any script; Unicode is composed (NFC) first, so that é is one word in either spelling.
    """
    text = unicodedata.normalize("NFC", caption.lower())
    return _WORD.findall(text.translate(_LETTERS))


class Vocabulary:
    """The words a model knows; ids 0..3 are <pad> <start> <end> <unk>, the most frequent first."""

    SPECIALS = ("<pad>", "<start>", "<end>", "<unk>")

    def __init__(self, known: Iterable[str]):
        """`known`: the words without the special ones. Raises ValueError on a repeated word."""
        self.words = (*self.SPECIALS, *known)
        self.ids = {word: index for index, word in enumerate(self.words)}
        if len(self.ids) != len(self.words):
            raise ValueError("a vocabulary holds each word once, and no <pad> <start> <end> <unk>")

    @classmethod
    def build(cls, captions: Iterable[str], min_count: int) -> "Vocabulary":
        """Return the vocabulary of words that come at least `min_count` times (train split only).

        Raises ValueError where no word is left.
        """
        counts = Counter(word for caption in captions for word in words(caption))
        kept = [word for word, count in counts.items() if count >= min_count]
        if not kept:
            raise ValueError(
                f"no word comes {min_count} times in the captions; lower --min-count "
                f"(they have {len(counts)} different words)"
            )
        return cls(sorted(kept, key=lambda word: (-counts[word], word)))

    def __len__(self) -> int:
        return len(self.words)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.words == other.words

    def __hash__(self) -> int:
        return hash(self.words)

    def encode(self, caption: str, seq_len: int) -> list[int]:
        """Return <start> words <end> as ids, unpadded, cut to `seq_len` words (<end> stays)."""
        ids = [self.ids.get(word, UNK) for word in words(caption)[:seq_len]]
        return [START, *ids, END]

    def decode(self, tokens: Iterable[int] | Tensor) -> str:
        """Return the words of `tokens` (T,) up to <end>; special tokens are left out."""
        spoken = []
        for token in tokens.tolist() if isinstance(tokens, Tensor) else tokens:
            if token == END:
                break
            if token >= len(self.SPECIALS):
                spoken.append(self.words[token])
        return " ".join(spoken)

    def save(self, path: str | Path) -> None:
        """Write the words to `path` as JSON."""
        files.write_json(path, {"words": self.words[len(self.SPECIALS) :]})

    @classmethod
    def load(cls, path: str | Path) -> "Vocabulary":
        """Return the vocabulary that `save` wrote; ValueError where the file is another thing."""
        value = files.read_json(path)
        known = value.get("words") if isinstance(value, dict) else None
        if not isinstance(known, list) or not all(isinstance(word, str) for word in known):
            raise ValueError(f'{path} is not a vocabulary: expected {{"words": ["a", …]}}')
        try:
            return cls(known)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


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
    references: list[list[str]]


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
        order = [(mix(self.seed, self.epoch, line), line) for line in record.captions]
        return [line for _, line in sorted(order)[:MOST_CAPTIONS]]

    def _input(self, record: Record, image: Any) -> Tensor:
        sided = any(SIDES.search(line) for line in record.captions)
        # Augmentation depends on nothing but (seed, epoch, image): not on workers, not on resume.
        chance = (self.seed, self.epoch, record.image_id)
        if self.features is not None:
            allowed = range(0, self.views, 2 if sided else 1)
            return self.features.get(record.image_id, allowed[mix(*chance) % len(allowed)])
        with seeded(*chance):
            pixels = self.transform(read_image(record.path if image is None else image))
            mirrored = self.flip and torch.rand(()) < 0.5
        return pixels.flip(-1) if mirrored and not sided else pixels


def mix(*parts: int | str) -> int:
    """Return a seed that depends on all of `parts` and looks like no other."""
    # JSON and the names of files may hold lone surrogates, which are no text.
    text = "/".join(map(str, parts)).encode("utf-8", "surrogatepass")
    digest = hashlib.sha256(text).digest()
    return int.from_bytes(digest[:7], "big")


@contextlib.contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Lend torch's own chance on the CPU, seeded with `mix(*parts)`, and give it back as it was."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: it would seed the GPU too, which fork_rng leaves alone here.
        torch.default_generator.manual_seed(mix(*parts))
        yield


def collate_fn(items: Sequence[tuple]) -> Batch:
    """Return the batch of `items`: inputs stacked, captions padded to the longest of the batch.

    Items without an id (None) have none in the batch either.
    """
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
            raise ValueError(f"batch size {batch_size} must be at least 1")
        self.batch_size = batch_size
        self.order = torch.arange(images)
        if seed is not None:
            generator = torch.Generator().manual_seed(mix(seed, epoch))
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
    """A DataLoader whose workers never heed Ctrl-C and SIGTERM, which reach a whole process group.

    The main process decides what they mean; were its workers gone, it could not finish its step.
    """

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, worker_init_fn=deaf, **settings)

    def __iter__(self) -> Iterator[Any]:
        with held():  # workers are born here
            return super().__iter__()


SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Hold signals back till the end of the block, and for good in processes that it starts.

    What a worker ignores of itself comes too late: until then a signal kills it.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def deaf(worker: int) -> None:
    """Let a loader's worker ignore signals, where its birth could not hold them back."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
