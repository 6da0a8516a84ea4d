"""The datasets of a run: one with --dataset and --data-dir, any number more with --also KIND:DIR.

S image positions · C backbone channels

Each has its own splits and its own feature caches. Their train splits are trained on as one
(`join_train`), with one vocabulary; validation scores each alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from config import DataConfig, parse_also
from readers import Record, data_folder, list_shards, load_splits
from util.cache import FeatureCache
from util.files import UserError

Records = dict[str, Sequence[Record]]  # by split
Caches = dict[str, FeatureCache]


@dataclass
class Corpus:
    """A dataset of a run: its name in reports, its kind, and its records and features by split.

    `is_first`: it is that of --dataset, whose files and scores need no name to tell them apart.
    """

    name: str
    kind: str
    records: Records
    is_first: bool = True
    caches: Caches = field(default_factory=dict)

    def label(self, part: str) -> str:
        """Return the name of a split, or of a page, in the state and the files of a run."""
        return part if self.is_first else f"{self.name}-{part}"


def load_corpora(data: DataConfig) -> list[Corpus]:
    """Return the datasets that the flags name; the train split of each is required."""
    places = [(data.dataset, data.data_dir), *map(parse_also, data.also)]
    corpora: list[Corpus] = []
    for (kind, folder), name in zip(places, name_corpora(places), strict=True):
        corpora.append(Corpus(name, kind, load_records(data, kind, folder), not corpora))
    return corpora


def name_corpora(places: Sequence[tuple[str, str | None]]) -> list[str]:
    """Return a name for each (kind, folder): that of its folder, of a single dataset its kind.

    A name that is taken gets a number.
    """
    names: list[str] = []
    for kind, folder in places:
        several = len(places) > 1 and folder
        base = Path(folder).expanduser().absolute().name if several else kind
        name, number = base, 2
        while name in names:
            name, number = f"{base}-{number}", number + 1
        names.append(name)
    return names


def load_records(data: DataConfig, kind: str, folder: str | None) -> Records:
    """Return the records of each split that a dataset has, as many as the flags ask for."""
    where = (kind, folder, data.split_seed, data.cache_dir)
    if kind == "shards":
        if data.views > 1:
            raise UserError(
                f"--views {data.views} is for a feature cache, and shards are read without one"
            )
        root = data_folder(kind, folder)
        train = list_shards(root, "train", data.cache_dir)  # images are streamed
        splits = {"train": train} | load_splits(*where, splits=("val", "test"))
    else:
        splits = load_splits(*where, required=("train",))
    n_train = max(1, round(data.train_fraction * len(splits["train"])))
    splits["train"] = splits["train"][:n_train]
    return {split: records[: data.limit] for split, records in splits.items()}


class JoinedFeatures:
    """The feature caches of several train splits as one."""

    def __init__(self, places: dict[str | int, tuple[FeatureCache, str | int]]):
        """`places`: for each image id of `join_train`, its cache and its id in that."""
        self.places = places

    def get(self, image_id: str | int, view: int = 0) -> Tensor:
        """Return the features (S, C) of a view of an image."""
        cache, own_id = self.places[image_id]
        return cache.get(own_id, view)


def join_train(corpora: Sequence[Corpus]) -> tuple[Sequence[Record], Any]:
    """Return the records of all train splits, one dataset after the other, and their features.

    Two datasets may have images of one id, so the ids of all but the first begin with the name of
    the dataset. The features are None where they are not cached.
    """
    first = corpora[0]
    if len(corpora) == 1:
        return first.records["train"], first.caches.get("train")
    records: list[Record] = []
    places = {}
    for corpus in corpora:
        cache = corpus.caches.get("train")
        for record in corpus.records["train"]:
            own_id = record.image_id
            joined_id = own_id if corpus.is_first else f"{corpus.name}/{own_id}"
            records.append(record._replace(image_id=joined_id))
            places[joined_id] = cache, own_id
    if len(places) < len(records):
        raise UserError("two images of different datasets have the same id and name; rename one")
    return records, JoinedFeatures(places) if first.caches else None


def mean_scores(scores: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return the mean of each score over the datasets, then each dataset's own: "CIDEr coco".

    `scores` are by the name of the dataset; those of one dataset are returned as they are.
    """
    own = list(scores.values())
    if len(own) < 2:
        return dict(own[0]) if own else {}
    means = {name: sum(each[name] for each in own) / len(own) for name in own[0]}
    return means | {
        f"{name} {corpus}": value
        for corpus, values in scores.items()
        for name, value in values.items()
    }
