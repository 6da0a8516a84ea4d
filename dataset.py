"""Captions on disk → records and splits → batches; and the words themselves.

B images · M captions in a batch · T words · S image positions · C backbone channels

Reading a split gives `Record`s (one an image, with all its captions). `CaptionDataset` turns them
into tensors, `collate_fn` puts all captions of an image into the batch of that image, so the CNN
runs once per image.
"""

import csv
import hashlib
import logging
import os
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import files
import shapes
from decoding import END, PAD, START, UNK
from images import read_image

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
MAX_LEFT_OUT = 0.01  # of a split's images may be missing or unreadable
SIDES = re.compile(r"\b(?:left|right)(?:most|ward|wards)?\b", re.IGNORECASE)


@dataclass(frozen=True)
class DataConfig:
    """What is learned from."""

    dataset: str = "flickr8k"
    """flickr8k, or shapes (drawn by the project itself)."""
    data_dir: Path | None = None
    """Folder of the dataset's own files (default: data/DATASET)."""
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
    workers: int = 2
    """Processes that read images."""


# ---- words -----------------------------------------------------------------------------------


class _Letters(dict):
    """Maps a character to itself if it can be in a word, apostrophes to ', the rest to a space."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        is_part = unicodedata.category(char)[0] in "LMN"
        self[code] = "'" if char in "'’ʼ" else char if is_part else " "
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
        if not isinstance(value, dict) or not isinstance(value.get("words"), list):
            raise ValueError(f'{path} is not a vocabulary: expected {{"words": [...]}}')
        return cls(value["words"])


# ---- records ---------------------------------------------------------------------------------


class Record(NamedTuple):
    """One image: `image_id` is its file name (COCO: its integer id), `captions` as written."""

    image_id: str
    path: Path
    captions: tuple[str, ...]


class SplitMissingError(FileNotFoundError):
    """The data are there, but not this split of them."""


def leave_out(lost: Sequence[str], total: int, what: str) -> None:
    """Log the images that are left out and why; more than 1 % of `total` is a ValueError."""
    if not lost:
        return
    shown = ", ".join(lost[:10]) + (f" and {len(lost) - 10} more" if len(lost) > 10 else "")
    line = f"{len(lost)} of {total} images {what}: {shown}"
    if len(lost) > MAX_LEFT_OUT * total:
        raise ValueError(f"{line}; more than 1 % is too many to leave out, repair the dataset")
    log.warning("left out: %s", line)


def readable(records: Sequence[Record]) -> list[Record]:
    """Return the records whose image can be read, having read them all; the others are listed."""

    def reads(record: Record) -> bool:
        try:
            read_image(record.path)
        except (ValueError, FileNotFoundError):
            return False
        return True

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        results = list(
            tqdm(
                pool.map(reads, records),
                total=len(records),
                desc="checking images",
                disable=None,
                leave=False,
            )
        )
    lost = [record.image_id for record, good in zip(records, results, strict=True) if not good]
    leave_out(lost, len(records), "can't be read")
    return [record for record, good in zip(records, results, strict=True) if good]


def read_flickr8k(root: Path, split: str, split_seed: int = 0) -> list[Record]:
    """Return the records of a split of Flickr8k in whichever layout `root` holds.

    Official archives, Kaggle's `Images/` + `captions.txt`, `Images/` + `Flickr8k.token.txt`, or
    Karpathy's JSON; `root` or a folder in it. Splits come from the official lists where there are
    any, else from the JSON, else each image's place in an order shuffled by `split_seed`.
    """
    folders = _folders(root)
    lists = {
        name: _find(folders, f"Flickr_8k.{word}Images.txt")
        for name, word in (("train", "train"), ("val", "dev"), ("test", "test"))
    }
    token = _find(folders, "Flickr8k.token.txt") or _find(folders, "captions.txt")
    karpathy = _find(folders, "dataset_flickr8k.json") or _find(folders, "dataset.json")
    if karpathy and not (token and any(lists.values())):
        return read_karpathy(karpathy, folders, split)
    if not token:
        raise FileNotFoundError(
            f"no Flickr8k captions in {root}: looked for Flickr8k.token.txt, captions.txt and "
            "dataset_flickr8k.json there and in its folders; run python download_data.py flickr8k "
            "or give --data-dir"
        )
    captions = read_token_file(token) if token.name != "captions.txt" else read_csv_file(token)
    if any(lists.values()):
        if not lists[split]:
            raise _missing_split(root, split, [name for name, path in lists.items() if path])
        names = lists[split].read_text(encoding="utf-8").split()
    else:
        names = split_by_image(captions, split_seed)[split]
    return _records(names, captions, folders, root, split)


def _folders(root: Path) -> list[Path]:
    """Return `root` and the folders in it, hidden ones and Mac leftovers aside, for two levels."""
    if not root.is_dir():
        raise FileNotFoundError(
            f"no dataset at {root}: there is no such folder; run python download_data.py or give "
            "--data-dir, the folder that holds the dataset's files"
        )
    found = [root]
    for level in (root, *_subfolders(root)):
        found += [folder for folder in _subfolders(level) if folder not in found]
    return found


def _subfolders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return sorted(
            Path(entry.path)
            for entry in entries
            if not entry.name.startswith((".", "__MACOSX")) and entry.is_dir()
        )


def _find(folders: Sequence[Path], name: str) -> Path | None:
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _missing_split(root: Path, split: str, present: Sequence[str]) -> SplitMissingError:
    return SplitMissingError(
        f"no {split} split in {root}; it holds {', '.join(present) if present else 'no split'}"
    )


def read_token_file(path: Path) -> dict[str, list[str]]:
    """Return image name → captions from lines `name.jpg#0<TAB>caption`."""
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        key, tab, caption = line.partition("\t")
        name, hash_mark, index = key.rpartition("#")
        if not tab or not hash_mark or not index.isdigit():
            raise ValueError(
                f"{path} line {number} is not a caption: expected name.jpg#0, a tab and the "
                f"caption, not {line[:60]!r}"
            )
        captions.setdefault(name, []).append(caption.strip())
    return captions


def read_csv_file(path: Path) -> dict[str, list[str]]:
    """Return image name → captions from a CSV with the header `image,caption`."""
    captions: dict[str, list[str]] = {}
    rows = csv.reader(_text(path).splitlines(keepends=True))
    if [cell.strip().lower() for cell in next(rows, [])] != ["image", "caption"]:
        raise ValueError(f"{path} is not a captions file: its first line must be image,caption")
    for row in rows:
        if not row:
            continue
        if len(row) != 2:
            raise ValueError(
                f"{path} line {rows.line_num} is not a caption: expected image,caption, "
                f"not {len(row)} columns"
            )
        captions.setdefault(row[0].strip(), []).append(row[1].strip())
    return captions


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8 ({error.reason})") from error


def split_by_image(names: Iterable[str], seed: int) -> dict[str, list[str]]:
    """Return the split of each image name: an eighth each (at least one) val and test, rest train.

    Images are ordered by a hash of seed and name: the same everywhere, whatever the file's order.
    """
    ordered = sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    part = max(1, len(ordered) // 8)
    parts = (ordered[2 * part :], ordered[:part], ordered[part : 2 * part])
    return {split: sorted(names) for split, names in zip(SPLITS, parts, strict=True)}


def read_karpathy(path: Path, folders: Sequence[Path], split: str) -> list[Record]:
    """Return the records of a split from Karpathy's JSON; `restval` images join train."""
    value = files.read_json(path)
    try:
        images = [
            (image["filename"], image["split"], [line["raw"] for line in image["sentences"]])
            for image in value["images"]
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f'{path} is not a captions file: expected {{"images": [{{"filename", "split", '
            f'"sentences": [{{"raw"}}]}}]}} ({type(error).__name__}: {error})'
        ) from error
    wanted = (split, "restval") if split == "train" else (split,)
    captions = {name: lines for name, part, lines in images if part in wanted}
    if not captions:
        raise _missing_split(path, split, sorted({part for _, part, _ in images}))
    return _records(list(captions), captions, folders, path.parent, split)


def read_shapes(root: Path, split: str, split_seed: int = 0) -> list[Record]:
    """Return the records of a split of the drawn shapes, drawing them into `root` first."""
    shapes.draw(root)
    return read_karpathy(root / "captions.json", [root, root / "images"], split)


def _records(
    names: Sequence[str],
    captions: dict[str, list[str]],
    folders: Sequence[Path],
    root: Path,
    split: str,
) -> list[Record]:
    """Return records for `names`, leaving out (with a line) those with no image or no caption."""
    if not names:
        raise _missing_split(root, split, [])
    folder, present = _image_folder(folders, names)
    if not present:
        raise SplitMissingError(
            f"no image of the {split} split in {root} or its folders (wanted {names[0]} and "
            f"{len(names) - 1} more)"
        )
    described = [name for name in names if captions.get(name)]
    if not described:
        raise SplitMissingError(f"no captions of the {split} split in {root} (wanted {names[0]} …)")
    lost = [name for name in names if name not in present or not captions.get(name)]
    leave_out(lost, len(names), f"of the {split} split have no image file or no caption")
    return [
        Record(name, folder / name, tuple(captions[name])) for name in described if name in present
    ]


def _image_folder(folders: Sequence[Path], names: Sequence[str]) -> tuple[Path, set[str]]:
    """Return the folder that holds the most of `names`, and those it holds."""
    wanted = set(names)
    found = [(folder, wanted.intersection(os.listdir(folder))) for folder in folders]
    return max(found, key=lambda pair: len(pair[1]))


DATASETS: dict[str, Callable[..., Sequence[Record]]] = {
    "flickr8k": read_flickr8k,
    "shapes": read_shapes,
}


def data_folder(dataset: str, data_dir: Path | None) -> Path:
    """Return the folder of the dataset's own files: `data_dir`, or data/<dataset>."""
    return data_dir or Path("data") / dataset


def load_split(
    dataset: str, data_dir: Path | None, split: str, split_seed: int = 0
) -> Sequence[Record]:
    """Return the records of a split of a dataset; errors name what is not there.

    Raises ValueError for a name that is not known, SplitMissingError for a split that is absent.
    """
    if dataset not in DATASETS:
        raise ValueError(f"dataset {dataset!r} is not known; choose from {', '.join(DATASETS)}")
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not known; choose from {', '.join(SPLITS)}")
    return DATASETS[dataset](data_folder(dataset, data_dir), split, split_seed)


# ---- batches ---------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Images with all their captions.

    `inputs`: pixels (B, 3, H, W) or cached features (B, S, C); `tokens` (M, T) int64, each row
    <start> words <end> then <pad>; `owner` (M,) which image a caption belongs to, ascending.
    """

    image_ids: list[str]
    inputs: Tensor
    tokens: Tensor
    owner: Tensor
    references: list[list[str]]


@dataclass
class CaptionDataset(Dataset):
    """Records as (image id, input, token lists, captions).

    The input comes from `features` (anything with `get(image_id, view)` and `views`) where given,
    else from the image file through `transform`. With `flip`, half of the images, drawn anew
    each epoch, are mirrored, but none whose captions speak of left or right.
    """

    records: Sequence[Record]
    vocabulary: Vocabulary | None = None
    seq_len: int = 30
    transform: Callable[[Any], Tensor] | None = None
    features: Any = None
    flip: bool = False
    seed: int = 0
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[str, Tensor, list[list[int]], list[str]]:
        record = self.records[index]
        tokens = []
        if self.vocabulary is not None:
            tokens = [self.vocabulary.encode(line, self.seq_len) for line in record.captions]
        return record.image_id, self._input(record, index), tokens, list(record.captions)

    def _input(self, record: Record, index: int) -> Tensor:
        if self.features is not None:
            return self.features.get(record.image_id)
        # Augmentation depends on nothing but (seed, epoch, image): not on workers, not on resume.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix(self.seed, self.epoch, index))
            pixels = self.transform(read_image(record.path))
            mirrored = self.flip and torch.rand(()) < 0.5
        if mirrored and not any(SIDES.search(line) for line in record.captions):
            pixels = pixels.flip(-1)
        return pixels


def mix(*numbers: int) -> int:
    """Return a seed that depends on all of `numbers` and looks like no other."""
    digest = hashlib.sha256("/".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def collate_fn(items: Sequence[tuple]) -> Batch:
    """Return the batch of `items`: inputs stacked, captions padded to the longest of the batch."""
    image_ids, inputs, tokens, references = zip(*items, strict=True)
    rows = [torch.tensor(caption) for captions in tokens for caption in captions]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    counts = torch.tensor([len(captions) for captions in tokens])
    owner = torch.arange(len(items)).repeat_interleave(counts)
    return Batch(list(image_ids), torch.stack(inputs), padded, owner, list(references))


def get_loader(
    dataset: CaptionDataset,
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    epoch: int = 0,
    skip: int = 0,
    workers: int = 0,
) -> DataLoader:
    """Return a loader of `Batch`es of `batch_size` images for one epoch.

    With `shuffle` the order depends on (seed, epoch) alone; `skip` leaves out that many batches
    at the start, which is how an interrupted epoch goes on. Every image is used: the last batch
    may be smaller.
    """
    order = list(range(len(dataset)))
    if shuffle:
        random.Random(mix(seed, epoch)).shuffle(order)
    dataset.epoch = epoch
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return DataLoader(
        dataset,
        batch_sampler=batches[skip:],
        collate_fn=collate_fn,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )
