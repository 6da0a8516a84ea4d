"""WebDataset tar shards as img2dataset writes them: large datasets in few files, or at an address.

For each image a tar holds `KEY.jpg` (the file as it was), `KEY.txt` (its first caption) and
`KEY.json` ({"image_id": …, "captions": […]}). Beside the tars, `index.json` has the number of
images in each, and `SPLIT.jsonl.gz` lists [name in the tar, image id, captions], so that words are
counted without reading images. For a folder without them, both are made in the cache folder.
"""

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, groupby, repeat
from pathlib import Path
from typing import Any, NamedTuple

from util import files
from util.files import UserError
from util.images import EXTENSIONS, read_image, report_left_out
from util.progress import progress_bar
from util.seeding import derive_seed
from util.sources import digest_file
from util.tars import (
    INDEX,
    NAME,
    VERSION,
    import_webdataset,
    locate,
    open_file,
    read_index,
    read_tar,
    write_index,
)
from util.threads import count_cpus

SPLITS = ("train", "val", "test")
BOMB = 50  # largest unpacked size of a list, times its size: captions shrink to a fifth


class Row(NamedTuple):
    """An image and its captions, as `readers.Record`; `path` is shard / name in the shard."""

    image_id: str | int
    path: Path
    captions: tuple[str, ...]


# ---- reading ---------------------------------------------------------------------------------


def read_rows(root: str | Path, split: str, cache_dir: Path) -> list[Row]:
    """Return the images and captions of a split that the index has, without reading images."""
    index, name, rows = read_index(root, cache_dir), f"{split}.jsonl.gz", []
    shards = index["splits"][split]["shards"]
    folders = chain(*(repeat(Path(shard["name"]), shard["images"]) for shard in shards))
    with open_file(index["place"], name) as stream:
        packed = io.BytesIO(stream.read())
    try:
        with gzip.open(packed) as unpacked:
            lines = read_lines(unpacked, BOMB * max(len(packed.getbuffer()), 2**20))
            for line, folder in zip(lines, folders, strict=True):
                file, image_id, captions = json.loads(line)
                good = type(image_id) in (str, int) and type(captions) is list and captions
                if not good or not NAME.fullmatch(file) or {*map(type, captions)} != {str}:
                    raise ValueError(f"the row {[file, image_id, captions]}")
                rows.append(Row(image_id, folder / file, tuple(captions)))
    except (ValueError, TypeError, RecursionError, EOFError, OSError, zlib.error) as error:
        where = locate(index["place"], name)
        text = f"is damaged, or not the list of captions that {INDEX} describes"
        raise UserError(f"{where} {text} (after {len(rows)} good rows)") from error
    return rows


def read_lines(stream: Any, limit: int) -> Iterator[bytes]:
    """Yield the lines of a binary stream; ValueError after more than `limit` bytes."""
    while line := stream.readline(limit + 1):
        limit -= len(line)
        if limit < 0:
            raise ValueError("it unpacks to far more than its size")
        yield line


def read_images(root: str | Path, rows: Sequence[Row]) -> Iterator[tuple[Row, bytes | None]]:
    """Yield the rows with their image files, shard after shard; None for a missing file."""
    for shard, group in groupby(rows, key=lambda row: row.path.parent):
        missing = {row.path.name: row for row in group}
        for name, content in read_tar(str(root), str(shard), missing.__contains__):
            yield missing.pop(name), content
            if not missing:
                break
        yield from ((row, None) for row in missing.values())


def unpack_images(root: str | Path, split: str, cache_dir: Path) -> list[Row]:
    """Return the rows with the paths of their image files, unpacked into `cache_dir` once.

    The file of an image that the shards lack is not there; it is searched again next time.
    """
    rows = read_rows(root, split, cache_dir)
    fingerprint = derive_seed(read_index(root, cache_dir)["fingerprint"])
    place = cache_dir / f"shards-{fingerprint:014x}-{split}"
    with files.lock(place.with_suffix(".lock")):
        missing = [row for row in rows if not (place / row.path).exists()]
        images = read_images(root, missing) if missing else ()
        for row, content in progress_bar(images, desc=f"unpacking {split}", unit=" images"):
            if content is not None:
                (place / row.path).parent.mkdir(parents=True, exist_ok=True)
                (place / "part").write_bytes(content)
                (place / "part").replace(place / row.path)
    return [row._replace(path=place / row.path) for row in rows]


# ---- writing ---------------------------------------------------------------------------------


def write_shards(
    splits: Mapping[str, Sequence[Row]],
    folder: Path,
    dataset: str,
    *,
    shard_size: int = 1000,
    seed: int = 0,
    workers: int | None = None,
) -> dict[str, Any]:
    """Write each split's records as shards, in a random order, and return their index.

    Images that can't be read are left out; UserError if they are too many. The index is written
    last: without it, the next call begins again.
    """
    ordered = {
        split: sorted(records, key=lambda record: derive_seed(seed, record.image_id))
        for split, records in splits.items()
    }
    digest, earlier = (hashlib.sha256(f"{VERSION}/{shard_size}".encode()) for _ in range(2))
    for split, record in ((split, one) for split, records in ordered.items() for one in records):
        size = record.path.stat().st_size if record.path.is_file() else -1
        row = [split, record.image_id, size, record.captions]
        earlier.update(json.dumps(row).encode())  # as versions did that compared only sizes
        digest.update(json.dumps([*row, digest_file(record.path)]).encode())
    unfinished = folder / ".unfinished"
    with files.lock(folder / ".lock", 10, f"another process is writing shards into {folder}"):
        if (folder / INDEX).exists():
            index = files.read_json(folder / INDEX)
            known = (digest.hexdigest(), earlier.hexdigest())
            if isinstance(index, dict) and index.get("fingerprint") in known:
                return index
        elif unfinished.exists():
            for left in folder.glob("*-??????*.tar"):
                left.unlink()
            for split in splits:
                (folder / f"{split}.jsonl.gz").unlink(missing_ok=True)
        if any(folder.glob("*.tar")):
            raise UserError(
                f"{folder} holds tar files of other data, or of another --shard-size or --seed; "
                "name another folder, or delete them"
            )
        for name in (INDEX, *(f"{split}.jsonl.gz" for split in splits)):
            if (folder / name).exists():
                raise UserError(
                    f"{folder} holds another {name}, which would be lost; name another folder"
                )
        unfinished.touch()
        with ThreadPoolExecutor(workers or count_cpus()) as pool:
            rows = {
                split: write_tars(folder, split, records, shard_size, pool)
                for split, records in ordered.items()
            }
        index = write_index(folder, dataset, digest.hexdigest(), rows)
        unfinished.unlink()
    return index


def write_tars(
    folder: Path, split: str, records: Sequence[Row], shard_size: int, pool: Any
) -> dict[str, list[list]]:
    """Write the tars of a split; return [name, image id, captions] of their images by tar."""
    rows: dict[str, list[list]] = {}
    lost = []
    starts = range(0, len(records), shard_size)
    for start in progress_bar(starts, desc=split, unit=" shards", leave=False):
        part = records[start : start + shard_size]
        contents = pool.map(read_checked, [record.path for record in part])
        path = folder / f"{split}-{start // shard_size:06}.tar"
        rows[path.name] = []
        with (
            files.replacing(path) as temporary,
            open(temporary, "wb") as stream,
            import_webdataset().TarWriter(stream, mtime=0) as tar,
        ):
            for number, (record, content) in enumerate(zip(part, contents, strict=True), start):
                if content is None:
                    lost.append(record.image_id)
                    continue
                suffix = record.path.suffix.lower()
                extension = suffix[1:] if suffix in EXTENSIONS else "img"
                about = {"image_id": record.image_id, "captions": record.captions}
                tar.write({
                    "__key__": f"{number:09}",
                    extension: content,
                    "txt": record.captions[0].encode("utf-8", "replace"),
                    "json": json.dumps(about).encode(),
                })  # fmt: skip
                rows[path.name].append([f"{number:09}.{extension}", *about.values()])
    report_left_out(lost, len(records), "can't be read")
    return rows


def read_checked(path: Path) -> bytes | None:
    """Return an image file's bytes, None where it is no image that can be read."""
    try:
        stream = io.BytesIO(path.read_bytes())
        stream.name = str(path)  # for messages
        read_image(stream)
        return stream.getvalue()
    except (UserError, FileNotFoundError, PermissionError):
        return None
