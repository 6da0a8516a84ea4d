"""The datasets of a run: one with --dataset and --data-dir, any number more with --also KIND:DIR.

S image positions · C backbone channels

Each has its own splits and its own feature caches. Their train splits are trained on as one
(`join_train`), with one vocabulary; validation scores each alone.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from config import DataConfig, fits, parse_also
from model_file import read_metadata
from readers import DATASETS, NOT_NAMED, Columns, Record, data_folder, list_shards, load_splits
from util.cache import FeatureCache
from util.files import UserError

log = logging.getLogger(__name__)

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
        columns = data.columns if kind == "csv" else NOT_NAMED
        splits = load_splits(*where, required=("train",), columns=columns)
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


# --- what a model was trained on


class Trained(NamedTuple):
    """What the header of a model file says of the data that the model was trained on.

    `kinds`: those of all its datasets, and of the models that it started from; empty if unknown.
    `also`: the kinds of further datasets by the names of their folders.
    """

    kinds: frozenset[str] = frozenset()
    dataset: str = "flickr8k"
    also: Mapping[str, str] = MappingProxyType({})
    columns: Columns = NOT_NAMED
    split_seed: int = 0

    def pick_dataset(self, data_dir: str | None) -> str:
        """Return the kind of the dataset in a folder: that which it had in training."""
        return self.also.get(Path(data_dir).expanduser().name if data_dir else "", self.dataset)

    def warn_of_other_kind(self, dataset: str) -> None:
        """Log where a model of photographs is to be scored on drawings, or the other way round."""
        known = ", ".join(sorted(self.kinds))
        if not self.kinds or "shards" in self.kinds or dataset == "shards":  # may be of anything
            return
        if dataset == "shapes" and "shapes" not in self.kinds:
            log.warning(
                "this model was trained on photographs (%s) and is scored on drawings (shapes), "
                "which it does not know", known,
            )  # fmt: skip
        elif dataset != "shapes" and self.kinds == {"shapes"}:
            log.warning(
                "this model was trained on drawings (shapes) and is scored on photographs (%s), "
                "which it does not know", dataset,
            )  # fmt: skip


def read_trained(checkpoint: Path) -> Trained:
    """Return what the model of a checkpoint was trained on; of a mean of models, the first."""
    if checkpoint.suffix == ".onnx":
        return Trained()
    training = read_metadata(checkpoint).get("training")
    flags = training
    while isinstance(flags, dict) and isinstance(flags.get("mean_of"), list):
        flags = next(iter(flags["mean_of"]), None)
    if not isinstance(flags, dict) or str(flags.get("dataset")) not in DATASETS:
        return Trained()
    names = [flags.get(f"{name}_column") for name in Columns._fields]
    columns = Columns(*(name if name and fits(name, str) else None for name in names))
    seed = flags.get("split_seed")
    also = {folder: kind for kind, folder in list_also(flags)}
    kinds = frozenset(list_kinds(training))
    return Trained(kinds, flags["dataset"], also, columns, seed if type(seed) is int else 0)


def list_also(flags: dict[str, Any]) -> list[tuple[str, str]]:
    """Return kind and folder of the further datasets in the flags of a header."""
    also = flags.get("also") if fits(flags.get("also"), tuple[str, ...]) else []
    pairs = [tuple(each.partition(":")[::2]) for each in also]
    return [(kind, folder) for kind, folder in pairs if kind in DATASETS]


def list_kinds(flags: Any) -> list[str]:
    """Return the kinds of all datasets in the flags of a header, those of earlier models too."""
    if not isinstance(flags, dict):
        return []
    means = flags.get("mean_of")
    earlier = [flags.get("init_from"), *(means if isinstance(means, list) else [])]
    own = [str(flags.get("dataset"))]
    own += [kind for kind, _ in list_also(flags)]
    own += [kind for each in earlier for kind in list_kinds(each)]
    return [kind for kind in own if kind in DATASETS]
