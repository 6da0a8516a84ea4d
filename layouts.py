"""Captions on disk → records: every layout of every dataset, and the splits.

Reading a split gives `Record`s, one an image with all its captions. A dataset is one function and
one row in `DATASETS`.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import files
import shapes
import shards
from compact import Gathered
from records import (
    SPLITS,
    Record,
    Records,
    SplitMissingError,
    check_inside,
    find,
    make_records,
    missing_split,
    read_names,
    search_folders,
    shuffled,
    split_by_image,
)
from tables import read_lines, read_table

log = logging.getLogger(__name__)


def read_flickr8k(root: Path, split: str, split_seed: int = 0) -> Records:
    """Return the records of a split of Flickr8k in whichever layout `root` holds.

    Official archives, Kaggle's `Images/` + `captions.txt`, `Images/` + `Flickr8k.token.txt`, or
    Karpathy's JSON; `root` or a folder in it. Splits come from the official lists where there are
    any, else from the JSON, else each image's place in an order shuffled by `split_seed`.
    """
    folders = search_folders(root)
    lists = {
        name: find(folders, f"Flickr_8k.{word}Images.txt")
        for name, word in (("train", "train"), ("val", "dev"), ("test", "test"))
    }
    token = find(folders, "Flickr8k.token.txt", "captions.txt")
    karpathy = find(folders, "dataset_flickr8k.json", "dataset.json")
    if karpathy and not (token and any(lists.values())):
        return read_karpathy(karpathy, folders, split)
    if not token:
        raise FileNotFoundError(
            f"no Flickr8k captions in {root}: looked for Flickr8k.token.txt, captions.txt and "
            "dataset_flickr8k.json there and in its folders; run python download_data.py flickr8k "
            "or give --data-dir"
        )
    captions = read_token_file(token) if token.name != "captions.txt" else read_csv_file(token)
    if not captions:
        raise ValueError(f"{token} holds no captions")
    if any(lists.values()):
        names = read_names(lists[split]) if lists[split] else []
        others = [name for name, path in lists.items() if path and name != split]
    else:
        splits = split_by_image(captions, split_seed)
        names = splits[split]
        others = [name for name, part in splits.items() if part]
    if not names:
        raise missing_split(root, split, others)
    return make_records(names, captions, folders, root, split)


def read_token_file(path: Path) -> Gathered:
    """Return image name → captions from lines `name.jpg#0<TAB>caption`."""
    captions = Gathered()
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        key, tab, caption = line.partition("\t")
        name, hash_mark, index = key.rpartition("#")
        if not tab or not hash_mark or not index.isdigit():
            raise ValueError(
                f"{path} line {number} is not a caption: expected name.jpg#0, a tab and the "
                f"caption, not {line.rstrip()[:60]!r}"
            )
        captions.add(name, caption.strip())
    return captions


def read_csv_file(path: Path) -> Gathered:
    """Return image name → captions from a table with the columns `image` and `caption`."""
    captions = Gathered()
    for _, row in read_table(path):
        captions.add(row["image"], row["caption"])
    return captions


# What a JSON file of another shape than expected raises where it is taken apart.
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, OverflowError)


def text(value: object) -> str:
    """Return the text itself; TypeError where it is none."""
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:40]!r} is not text")
    return value


def number(value: object) -> int:
    """Return the whole number; OverflowError where it takes more than 64 bits."""
    whole = int(value)
    if not -(2**63) <= whole < 2**63:
        raise OverflowError(f"{str(whole)[:40]} is too large for an id")
    return whole


def read_karpathy(path: Path, folders: Sequence[Path], split: str) -> Records:
    """Return the records of a split from Karpathy's JSON; `restval` images join train."""
    wanted = (split, "restval") if split == "train" else (split,)
    captions, parts = Gathered(), {}
    for name, part, lines in _karpathy_images(path):
        if parts.setdefault(name, part) != part:
            both = f"{parts[name][:20]} and {part[:20]}"
            raise ValueError(f"{path}: {name[:100]} is in the splits {both}")
        if part in wanted:
            captions.add(name, *lines)
    if not captions:
        raise missing_split(path, split, [part[:20] for part in sorted(set(parts.values()))[:9]])
    return make_records(list(captions), captions, folders, path.parent, split)


def _karpathy_images(path: Path) -> Iterator[tuple[str, str, list[str]]]:
    """Yield name, split and captions of each image in Karpathy's JSON."""
    value = files.read_json(path)
    try:
        for image in value["images"]:
            name, part = text(image["filename"]), text(image["split"])
            yield name, part, [text(one["raw"]).strip() for one in image["sentences"]]
    except MALFORMED as error:
        raise ValueError(
            f'{path} is not a captions file: expected {{"images": [{{"filename", "split", '
            f'"sentences": [{{"raw"}}]}}]}} ({type(error).__name__}: {error})'
        ) from error


def read_flickr30k(root: Path, split: str, split_seed: int = 0) -> Records:
    """Return the records of a split of Flickr30k: Karpathy's JSON and a folder of images."""
    folders = search_folders(root)
    karpathy = find(folders, "dataset_flickr30k.json")
    if not karpathy:
        raise FileNotFoundError(
            f"no dataset_flickr30k.json in {root} or its folders; run python download_data.py "
            "flickr30k or give --data-dir"
        )
    return read_karpathy(karpathy, folders, split)


COCO_TEST = 5000  # images of val that become test where no split file says otherwise


def read_coco(root: Path, split: str, split_seed: int = 0) -> Records:
    """Return the records of a split of COCO captions, 2014 or 2017; image ids are integers.

    With Karpathy's `dataset_coco.json` its splits; else the official annotations, train as given
    and val parted: its images, shuffled by `split_seed`, give the first 5,000 (half of them where
    there are fewer than 10,000) to test and the others to val.
    """
    folders = search_folders(root)
    karpathy = find(folders, "dataset_coco.json")
    if karpathy:
        return _coco_records(*_coco_karpathy(karpathy, split), folders, root, split)
    part = "train" if split == "train" else "val"
    path = find(folders, f"captions_{part}2014.json", f"captions_{part}2017.json")
    if not path:
        raise SplitMissingError(
            f"no captions of COCO's {split} split in {root}: looked for captions_{part}2014.json, "
            f"captions_{part}2017.json and dataset_coco.json there and in its folders; run python "
            "download_data.py coco or give --data-dir"
        )
    names, captions = _coco_annotations(path)
    if part == "val":
        order = sorted(names, key=lambda one: shuffled(one, split_seed))
        test = order[: min(COCO_TEST, len(order) // 2)]
        chosen = set(test) if split == "test" else set(names) - set(test)
        names = {image_id: name for image_id, name in names.items() if image_id in chosen}
    return _coco_records(names, captions, folders, root, split)


def _coco_annotations(path: Path) -> tuple[dict[int, str], Gathered]:
    """Return image id → file name and image id → captions of an official annotation file."""
    value, captions = files.read_json(path), Gathered()
    try:
        names = {number(image["id"]): text(image["file_name"]) for image in value["images"]}
        for one in value["annotations"]:
            captions.add(number(one["image_id"]), text(one["caption"]).strip())
    except MALFORMED as error:
        raise ValueError(
            f'{path} is not a COCO captions file: expected {{"images": [{{"id", "file_name"}}], '
            f'"annotations": [{{"image_id", "caption"}}]}} ({type(error).__name__}: {error})'
        ) from error
    if not names.keys() & captions.keys():
        raise ValueError(f"{path}: no caption's image_id is the id of an image")
    if strangers := captions.keys() - names.keys():
        log.warning(
            "left out: captions of %d images that %s does not list, the first with id %s",
            len(strangers),
            path,
            min(strangers),
        )
    return names, captions


def _coco_karpathy(path: Path, split: str) -> tuple[dict[int, str], Gathered]:
    """Return what `_coco_annotations` does, from Karpathy's JSON; `restval` joins train."""
    value = files.read_json(path)
    wanted = (split, "restval") if split == "train" else (split,)
    try:
        images = [image for image in value["images"] if image["split"] in wanted]
        names = {number(image["cocoid"]): text(image["filename"]) for image in images}
        captions = Gathered()
        for image in images:
            lines = (text(one["raw"]).strip() for one in image["sentences"])
            captions.add(number(image["cocoid"]), *lines)
        if len(names) != len(images):
            raise ValueError("a cocoid comes twice")
    except MALFORMED as error:
        raise ValueError(
            f"{path} is not Karpathy's COCO file ({type(error).__name__}: {error})"
        ) from error
    if not names:
        raise missing_split(path, split, [])
    return names, captions


def _coco_records(
    names: dict[int, str],
    captions: Mapping[int, list[str]],
    folders: Sequence[Path],
    root: Path,
    split: str,
) -> Records:
    """Return records with integer ids; restval's images lie in another folder than train's."""
    by_name = {Path(name).name: image_id for image_id, name in names.items()}
    if len(by_name) != len(names):
        one, other = next(
            (image_id, by_name[Path(name).name])
            for image_id, name in names.items()
            if by_name[Path(name).name] != image_id
        )
        raise ValueError(
            f"the images {one} and {other} of the {split} split in {root} have one file name, "
            f"{Path(names[one]).name}; rename one of the files"
        )
    said = _ByName(by_name, captions)
    records = make_records(list(by_name), said, folders, root, split)
    return records.with_ids(by_name[name] for name in records.image_ids)


@dataclass
class _ByName(Mapping):
    """Captions by file name, where they are kept by image id."""

    ids: dict[str, int]
    captions: Mapping[int, list[str]]

    def __getitem__(self, name: str) -> list[str]:
        return self.captions[self.ids[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __len__(self) -> int:
        return len(self.ids)


def read_shapes(root: Path, split: str, split_seed: int = 0) -> Records:
    """Return the records of a split of the drawn shapes, drawing them into `root` first."""
    shapes.draw(root)
    return read_karpathy(root / "captions.json", [root, root / "images"], split)


CACHE = Path("data/cache")


def read_shards(
    root: Path | str, split: str, split_seed: int = 0, cache_dir: Path = CACHE
) -> Records:
    """Return the records of a split of tar shards, unpacked into `cache_dir` the first time.

    `root` is the folder of the shards, or its address.
    """
    return shards.unpacked(str(root), split, cache_dir)


TABLES = (".csv", ".tsv", ".jsonl")
SPLIT_NAMES = {name: name for name in SPLITS} | dict.fromkeys(("dev", "valid", "validation"), "val")


def read_csv(root: Path, split: str, split_seed: int = 0) -> Records:
    """Return the records of a split of anybody's photographs, described by a table.

    `root` is the table (CSV, TSV or JSON lines), or the folder that holds it. Its columns are
    `image`, a path in that folder, `caption`, a row for each of an image's captions, and perhaps
    `split`: train, val or test. Without that, images are split by `split_seed`.
    """
    path = find_table(root)
    captions, splits = read_described(path)
    if not captions:
        raise ValueError(f"{path} holds no captions")
    blank = [image for image, part in splits.items() if not part]
    if blank and len(blank) < len(splits):
        raise ValueError(
            f"{path} names the split of some images but not of {blank[0]} and {len(blank) - 1} "
            "more; give it for all, or for none"
        )
    if blank:
        drawn = split_by_image(captions, split_seed)
        if not drawn["train"]:
            raise ValueError(f"{path} has {len(captions)} images: too few to split, give 3 or more")
        splits = {image: part for part, images in drawn.items() for image in images}
    names = [image for image in captions if splits[image] == split]
    if not names:
        raise missing_split(path, split, sorted(set(splits.values())))
    return make_records(names, captions, search_folders(path.parent), path.parent, split)


def read_described(path: Path) -> tuple[Gathered, dict[str, str]]:
    """Return image → captions and image → split ("" where none is named) of a table."""
    captions = Gathered()
    splits: dict[str, str] = {}
    for number, row in read_table(path):
        where = f"{path} line {number}: "
        image = plain_name(row["image"], path.parent)
        check_inside(image, path.parent, where)
        named = str(row.get("split") or "").lower()
        if named and named not in SPLIT_NAMES:
            known = ", ".join(SPLIT_NAMES)
            raise ValueError(f"{where}split {named!r} is not known; choose from {known}")
        part = SPLIT_NAMES.get(named, "")
        if splits.setdefault(image, part) != part:
            raise ValueError(f"{where}{image} is in another split further up")
        captions.add(image, row["caption"])
    return captions, splits


def find_table(root: Path) -> Path:
    """Return the table that `root` is or holds: captions.csv, or another name if it is the only.

    Raises FileNotFoundError where there is none, ValueError where there are several.
    """
    if root.is_file():
        return root
    here = sorted(root.glob("*")) if root.is_dir() else []
    tables = [path for path in here if path.suffix.lower() in TABLES and path.name[0] != "."]
    tables = [path for path in tables if path.stem == "captions"] or tables
    if not tables:
        raise FileNotFoundError(
            f"no table of captions in {root}: give --data-dir, the folder that holds captions.csv, "
            ".tsv or .jsonl (or the file itself), with the columns image and caption"
        )
    if len(tables) > 1:
        raise ValueError(
            f"several tables in {root}: {', '.join(path.name for path in tables)}; name one with "
            "--data-dir"
        )
    return tables[0]


def plain_name(name: str, root: Path) -> str:
    """Return an image's path as seen from `root`, without detours."""
    plain = os.path.normpath(name)
    if os.path.isabs(plain):
        plain = os.path.relpath(plain, os.path.abspath(root))
    return Path(plain).as_posix()


DATASETS: dict[str, Callable[..., Sequence[Record]]] = {
    "flickr8k": read_flickr8k,
    "flickr30k": read_flickr30k,
    "coco": read_coco,
    "csv": read_csv,
    "shapes": read_shapes,
    "shards": read_shards,
}


def data_folder(dataset: str, data_dir: str | Path | None) -> Path | str:
    """Return where the dataset's own files are: `data_dir`, or data/<dataset>.

    Shards may have an address, which stays text: a Path would spoil it.
    """
    if data_dir and shards.is_address(str(data_dir)):
        if dataset != "shards":
            raise ValueError(
                f"--data-dir {data_dir} is an address, and {dataset} is read from a folder; only "
                "--dataset shards is read from one"
            )
        return str(data_dir)
    return Path(data_dir).expanduser() if data_dir else Path("data") / dataset


def load_split(
    dataset: str,
    data_dir: str | Path | None,
    split: str,
    split_seed: int = 0,
    cache_dir: Path = CACHE,
) -> Sequence[Record]:
    """Return the records of a split of a dataset; errors name what is not there.

    Shards are unpacked into `cache_dir`. Raises ValueError for a name that is not known,
    SplitMissingError for a split that is absent.
    """
    if dataset not in DATASETS:
        raise ValueError(f"dataset {dataset!r} is not known; choose from {', '.join(DATASETS)}")
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not known; choose from {', '.join(SPLITS)}")
    root = data_folder(dataset, data_dir)
    if dataset == "shards":
        return read_shards(root, split, split_seed, cache_dir)
    return DATASETS[dataset](root, split, split_seed)
