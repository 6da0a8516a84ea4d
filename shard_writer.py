"""Writes a dataset as tar shards: `python features.py --shards DIR`.

What a folder of shards holds is said in `shards.py`.
"""

import gzip
import hashlib
import io
import json
import os
import tarfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from readers import (
    DATASETS,
    UNREADABLE,
    Record,
    Records,
    SplitMissingError,
    load_split,
    report_left_out,
    shuffled,
)
from shards import FORMAT, INDEX, SPLITS, VERSION, Index, Shard, read_index
from util import files
from util.files import UserError
from util.images import EXTENSIONS, read_image

PLAN = "unfinished.json"  # what is being written, until there is an index


def write_shards(
    splits: Mapping[str, Sequence[Record]],
    folder: Path,
    dataset: str,
    *,
    shard_size: int = 1000,
    seed: int = 0,
    workers: int | None = None,
) -> Index:
    """Write shards of the splits' records into `folder`, and return their index.

    Images that can't be read are left out; over 1 % of a split is a ValueError. What a killed call
    has finished is kept by the next. Raises ValueError where the folder holds something else.
    """
    with files.lock(folder / ".lock", 10, f"another process is writing shards into {folder}"):
        packed = {
            split: in_chance_order(Records.of(records), seed) for split, records in splits.items()
        }
        fingerprint = _fingerprint(packed, shard_size)
        if _is_written(folder, fingerprint):
            return read_index(str(folder))
        written = {}
        for split, records in packed.items():
            lost = _write_split(folder, split, records, shard_size, workers)
            report_left_out(
                [records[place].image_id for place in lost], len(records), "can't be read"
            )
            written[split] = _write_list(folder, split, records, shard_size, lost)
        about = {
            "format": FORMAT,
            "version": VERSION,
            "dataset": dataset,
            "seed": seed,
            "fingerprint": fingerprint,
            "splits": {
                split: {
                    "images": sum(shard.images for shard in shards),
                    "captions": sum(shard.captions for shard in shards),
                    "list": f"{split}.jsonl.gz",
                    "shards": [shard._asdict() for shard in shards],
                }
                for split, shards in written.items()
            },
        }
        files.write_json(folder / INDEX, about)
        for left in [folder / PLAN, *folder.glob("*-??????.done")]:
            left.unlink(missing_ok=True)
    return Index(dataset, fingerprint, written)


def in_chance_order(records: Records, seed: int) -> Records:
    """Return the records in an order by chance, so that each shard is a fair sample of all."""
    keys = np.fromiter(
        (int.from_bytes(shuffled(one, seed)[:8], "big") for one in records.image_ids),
        np.uint64,
        len(records),
    )
    return records.take(np.argsort(keys, kind="stable"))


def _fingerprint(splits: Mapping[str, Records], shard_size: int) -> str:
    digest = hashlib.sha256(f"{VERSION}/{shard_size}".encode())
    for split, records in splits.items():
        digest.update(f"/{split}/{len(records)}".encode())
        for record in records:
            size = record.path.stat().st_size if record.path.is_file() else -1
            digest.update(json.dumps([record.image_id, size, record.captions]).encode())
    return digest.hexdigest()


def _is_written(folder: Path, fingerprint: str) -> bool:
    """Return whether the folder holds these shards; ValueError where it holds something else."""
    for name in (INDEX, PLAN):
        if (folder / name).exists():
            found = files.read_json(folder / name)
            if not isinstance(found, dict) or found.get("fingerprint") != fingerprint:
                raise UserError(
                    f"{folder} holds shards of other data, or of another --shard-size or --seed; "
                    "name another folder, or delete them"
                )
            return name == INDEX
    if any(folder.glob("*.tar")):
        raise UserError(f"{folder} holds tar files of somebody else; name another folder")
    files.write_json(folder / PLAN, {"fingerprint": fingerprint})
    return False


def _write_split(
    folder: Path, split: str, records: Records, size: int, workers: int | None
) -> list[int]:
    """Write the shards of a split that are not there yet; return the places of what can't be read.

    A shard is finished when a .done file beside it says what it leaves out.
    """
    lost: list[int] = []
    starts, stop = range(0, len(records), size), threading.Event()
    bar = tqdm(total=len(records), desc=split, unit=" images", disable=None, leave=False)
    with bar, ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        jobs = {
            pool.submit(
                _write_shard, folder / shard_name(split, number), records, start, size, stop
            ): min(size, len(records) - start)
            for number, start in enumerate(starts)
        }
        try:
            for job in as_completed(jobs):
                lost += job.result()
                bar.update(jobs[job])
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    return sorted(lost)


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06}.tar"


def _write_shard(
    path: Path, records: Records, start: int, size: int, stop: threading.Event
) -> list[int]:
    """Write one shard, if it is not there yet; return the places of records left out.

    Told to `stop`, it leaves nothing behind.
    """
    done = path.with_suffix(".done")
    if path.exists() and done.exists():
        return files.read_json(done)
    files.remove_leftovers(path)
    lost = []
    with files.replacing(path) as temporary, tarfile.open(temporary, "w") as tar:
        for place, record in enumerate(records[start : start + size], start):
            if stop.is_set():
                raise InterruptedError("another shard could not be written, or Ctrl-C was pressed")
            try:
                content = record.path.read_bytes()
                read_image(content)
            except UNREADABLE:
                lost.append(place)
                continue
            about = {"image_id": record.image_id, "captions": record.captions}
            _put(tar, file_name(place, record.path), content)
            _put(tar, f"{place:09}.json", json.dumps(about).encode())
    files.write_json(done, lost)
    return lost


def file_name(place: int, path: Path) -> str:
    """Return the name in the tar of an image: its place, and the kind of its own file."""
    kind = path.suffix.lower()
    return f"{place:09}{kind if kind in EXTENSIONS else '.img'}"


def _put(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    about = tarfile.TarInfo(name)  # no times and no owners: the same data give the same bytes
    about.size = len(content)
    tar.addfile(about, io.BytesIO(content))


def _write_list(
    folder: Path, split: str, records: Records, size: int, lost: Sequence[int]
) -> list[Shard]:
    """Write the rows of a split's images; return its shards."""
    counts: dict[int, list[int]] = {}
    gone = set(lost)
    with (
        files.replacing(folder / f"{split}.jsonl.gz") as temporary,
        open(temporary, "wb") as raw,
        gzip.GzipFile("", "wb", mtime=0, fileobj=raw) as packed,
    ):
        for place, record in enumerate(records):
            if place in gone:
                continue
            row = [file_name(place, record.path), record.image_id, record.captions]
            packed.write(json.dumps(row).encode() + b"\n")
            count = counts.setdefault(place // size, [0, 0])
            count[0] += 1
            count[1] += len(record.captions)
    return [Shard(shard_name(split, number), *count) for number, count in counts.items()]


# ---- script ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """The flags of this script."""

    shards: Path
    """Write the dataset as WebDataset tar shards into this folder."""
    dataset: Literal[tuple(DATASETS)] = "flickr8k"
    """What to write."""
    data_dir: str | None = None
    """Folder of the dataset's own files (default: data/DATASET)."""
    split_seed: int = 0
    """Seed of the split where the dataset has none of its own."""
    shard_size: int = 1000
    """Images in a shard."""
    seed: int = 0
    """Seed of the order in which images are put into shards."""
    limit: int | None = None
    """Use only this many images of each split, for quick trials."""
    workers: int | None = None
    """Shards written at once (default: one for each processor)."""
    json: Path | None = None
    """Write what was made to this JSON file."""

    def __post_init__(self) -> None:
        for name in ("shard_size", "limit", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")


def read_splits(config: Config) -> dict[str, Sequence[Record]]:
    """Return the splits there are; SplitMissingError where there is none."""
    splits: dict[str, Sequence[Record]] = {}
    for split in SPLITS:
        try:
            records = load_split(config.dataset, config.data_dir, split, config.split_seed)
        except SplitMissingError as error:
            missing = error
            continue
        splits[split] = records[: config.limit]
    if not splits:
        raise missing
    return splits


def main(argv: list[str] | None = None) -> None:
    """Write a dataset as tar shards."""
    config = files.parse(
        Config, argv, program="features.py", description="Write a dataset as tar shards."
    )
    files.check_writable(config.json, config.shards / "index.json")
    index = write_shards(
        read_splits(config),
        config.shards,
        config.dataset,
        shard_size=config.shard_size,
        seed=config.seed,
        workers=config.workers,
    )
    print_index(index, config.shards)
    if config.json:
        splits = {
            split: [shard._asdict() for shard in shards] for split, shards in index.splits.items()
        }
        files.write_json(config.json, {"dataset": index.dataset, "splits": splits})


def print_index(index: Index, folder: Path) -> None:
    """Say what was written."""
    for split, shards in index.splits.items():
        images, captions = (sum(shard[place] for shard in shards) for place in (1, 2))
        print(f"{split}: {images} images with {captions} captions in {len(shards)} shards")
    print(f"train from them: python train.py --dataset shards --data-dir {folder}")
