"""The files of a feature cache are filled by an encoder, and kept up to date.

S image positions · C backbone channels

`encode` stands for the encoder: given records (`image_id`, `path`) it yields batches of consecutive
ones, with `features` (B, views, S, C), the ids of `unreadable` images, and `sources`
(`features.EncodedBatch`).
"""

import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from util import files
from util.cache import DamagedError, FeatureFile, check_file, mark_rows, read_description
from util.files import UserError
from util.images import (
    UNREADABLE,
    are_too_many,
    is_reduced,
    name_some,
    read_image,
    report_left_out,
)
from util.progress import progress_bar
from util.threads import default_workers

log = logging.getLogger(__name__)

READING = "reduced"  # how large JPEGs are read; earlier versions, which did it in full, noted none
SAVE_EVERY = 16  # batches between two notes of how far an extraction has come

Encode = Callable[[Sequence[Any]], Iterator[Any]]


def is_started(path: Path) -> bool:
    return path.exists() or path.with_suffix(".part").exists()


def is_complete(path: Path) -> bool:
    return path.exists() and path.with_suffix(".json").exists()


def bring_up_to_date(
    records: Sequence[Any],
    encode: Encode,
    path: Path,
    description: dict[str, Any],
    total: int,
    not_started: int,
) -> None:
    """Extract the features of a file that are missing, damaged, or of images that have changed.

    The arguments are those of `extract`.
    """
    if is_complete(path):
        # Without the lock: processes check at the same time, and the folder may be read-only.
        with suppress(DamagedError, FileNotFoundError):
            contents, stale = find_stale(path, records)
            if not stale:
                save_times(path, contents)
                return
    with files.lock(path.with_suffix(".lock")):
        if not is_complete(path):
            extract(records, encode, path, description, total, not_started)
        try:
            contents, stale = find_stale(path, records, repair=True)
        except DamagedError as error:
            log.warning("%s is damaged (%s): it is made again", path, error.reason)
            remove(path.with_suffix(".json"), path)
            extract(records, encode, path, description, total, not_started)
            return
        report_version(path)
        replace_rows(records, encode, path, contents, stale)


def find_stale(
    path: Path, records: Sequence[Any], repair: bool = False
) -> tuple[dict[str, Any], dict[int, str]]:
    """Return what `cache.check_file` does; rows of images that can be read by now are stale too.

    So are those of JPEGs that an earlier version read in full, and that are now read otherwise.
    """
    image_ids = [record.image_id for record in records]
    contents, stale = check_file(path, image_ids, [each.path for each in records], repair)
    left_out = set(contents["left_out"])
    for row, record in enumerate(records):
        if record.image_id in left_out and row not in stale:
            with suppress(*UNREADABLE):
                read_image(record.path)
                stale[row] = "readable"
    if contents.get("reading") != READING:
        paths, size = [record.path for record in records], contents["img_size"]
        with ThreadPoolExecutor(default_workers()) as pool:
            reduced = pool.map(lambda path: is_reduced(path, size), paths)
        large = [row for row, is_large in enumerate(reduced) if is_large]
        stale = dict.fromkeys(large, "large") | stale
        contents["reading"] = READING
    return contents, stale


def save_times(path: Path, contents: dict[str, Any]) -> None:
    """Write the description of a file, whose image files have other times now, or no sources yet.

    That only saves time in the next run, so a folder that can't be written to is no error.
    """
    report_version(path)
    if contents != read_description(path):
        with suppress(OSError), files.lock(path.with_suffix(".lock")):
            now = read_description(path)  # another process may have replaced rows
            if now.get("checksums") in (None, contents["checksums"]):
                files.write_json(path.with_suffix(".json"), contents)


def report_version(path: Path) -> None:
    """Log a line where a file was made by a version that did not note sources."""
    if "sources" not in read_description(path):
        log.warning(
            "%s was made by an earlier version, which did not note what the image files held: "
            "delete it if you have replaced images since; from now on such changes are noticed",
            path,
        )


def replace_rows(
    records: Sequence[Any],
    encode: Encode,
    path: Path,
    contents: dict[str, Any],
    stale: dict[int, str],
) -> None:
    """Encode the images of the `stale` rows of a file again, after a line that says why."""
    for reason, text in (
        ("changed", "the image files have changed"),
        ("damaged", "the cache is damaged there"),
        ("readable", "they can be read now"),
        ("large", "large JPEGs are now decoded at a reduced size"),
    ):
        if names := [records[row].image_id for row, why in stale.items() if why == reason]:
            counts = f"{len(names)} of {len(records)} images"
            log.warning("%s: extracting %s again, as %s: %s", path, counts, text, name_some(names))
    rows, done = sorted(stale), 0
    left_out = set(contents["left_out"]) - {records[row].image_id for row in rows}

    def save() -> None:
        file.sync()
        marked = mark_rows(contents, rows[done:])
        marked["left_out"] = [name for name in contents["image_ids"] if name in left_out]
        files.write_json(path.with_suffix(".json"), marked)

    silent = {} if rows else {"disable": True}
    bar = progress_bar(total=len(rows), desc=path.stem, unit=" images", **silent)
    with FeatureFile(path, "rb+") as file, bar:
        save()  # before the first row is written: a kill leaves no row that only looks right
        try:
            for number, batch in enumerate(encode([records[row] for row in rows]), 1):
                features = to_rows(batch)
                for row, each, source in zip(rows[done:], features, batch.sources, strict=False):
                    file.write(row, each[None])
                    contents["checksums"][row] = zlib.crc32(each)
                    contents["sources"][row] = source
                left_out |= set(batch.unreadable)
                done += len(features)
                bar.update(len(features))
                if number % SAVE_EVERY == 0:
                    save()
        finally:
            save()


def to_rows(batch: Any) -> np.ndarray:
    """Return a batch's features for a file; UserError where one is not a number."""
    features = batch.features.cpu().numpy()
    if not np.isfinite(features).all():
        raise UserError(
            "the CNN's features are not finite: its weights are damaged, or numbers became too "
            "large; check --cnn-weights, or add --no-amp"
        )
    return features


def extract(
    records: Sequence[Any],
    encode: Encode,
    path: Path,
    description: dict[str, Any],
    total: int,
    not_started: int,
) -> None:
    """Write the features of `records` to `path` and their description beside it.

    Until all are there, the features are in a .part file, and .progress says how many of its rows
    are valid. The cache has `total` images in all its files, `not_started` of which are still to
    come: the disk must have room for those.
    """
    part, progress = path.with_suffix(".part"), path.with_suffix(".progress")
    if path.exists():  # killed before the .json was written, or the .json was deleted
        path.replace(part)
    file, noted = None, {"reading": READING, "left_out": [], "sources": [], "checksums": []}
    with suppress(UserError, OSError):
        found = files.read_json(progress)
        # Without "reading": an earlier version began it, and the large JPEGs are replaced later.
        if isinstance(found, dict) and found.keys() | {"reading"} == noted.keys():
            file = FeatureFile(part, "rb+")
            noted = found
    if file is None:  # neither is of use without the other
        remove(part, progress)
    done = len(noted["sources"])

    def save_progress() -> None:
        file.sync()
        files.write_json(progress, noted)

    bar = progress_bar(total=len(records), initial=done, desc=path.stem, unit=" images")
    try:
        for number, batch in enumerate(encode(records[done:]), 1):
            features = to_rows(batch)
            if file is None:
                file = FeatureFile.create(part, (len(records), *features.shape[1:]), not_started)
            file.write(done, features)
            done += len(features)
            noted["left_out"] += batch.unreadable
            noted["sources"] += batch.sources
            noted["checksums"] += map(zlib.crc32, features)
            bar.update(len(features))
            if are_too_many(len(noted["left_out"]), total):
                file.close()
                remove(part, progress)
                report_left_out(noted["left_out"], total, "can't be read")
            if number % SAVE_EVERY == 0 or done == len(records):
                save_progress()
    except KeyboardInterrupt:  # Ctrl-C or SIGTERM: no image is encoded twice
        if file is not None:
            save_progress()
        raise
    finally:
        bar.close()
        if file is not None:
            file.close()  # Windows can't rename a file that is open
    part.replace(path)
    shape = {"shape": list(file.shape)}
    files.write_json(path.with_suffix(".json"), description | shape | noted)
    remove(progress)


def remove(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
