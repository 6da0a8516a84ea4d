"""Tar shards of a folder, or behind an address that the webdataset library opens; their index.

An address is `http://…`, `gs://…`, `pipe:COMMAND` and the like.
"""

import contextlib
import gzip
import io
import json
import logging
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from util import files
from util.files import UserError
from util.images import EXTENSIONS
from util.progress import progress_bar
from util.seeding import derive_seed

FORMAT, VERSION, INDEX = "image-captioning shards", 1, "index.json"


NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9]+)+")  # of a file, never a path


log = logging.getLogger(__name__)

MAX_BYTES = 200 * 2**20  # of a file in a tar; larger ones are left out


def import_webdataset() -> Any:
    try:
        import webdataset
    except ImportError as error:
        message = "tar shards need webdataset: pip install -r requirements-shards.txt"
        raise UserError(message) from error
    return webdataset


def is_address(root: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", root) is not None  # C: is a disk


def is_command(root: str | Path | None) -> bool:
    return str(root or "")[:5].lower() == "pipe:"


def check_allowed(root: str | Path | None, allow_commands: bool) -> None:
    """Raise UserError for a command that the command line does not allow to run."""
    if is_command(root) and not allow_commands:
        raise UserError(
            f"--data-dir {str(root)!r} would run a command; add --allow-commands if you mean it"
        )


def locate(root: str, name: str) -> str:
    """Return the path or address of a file; `{}` in an address is replaced by its name."""
    if not is_address(root):
        return str(Path(root).expanduser() / name)
    if not root.startswith(("pipe:", "file:")) and re.search(r"[\s\x00-\x1f'\"`\\\\]", root):
        # No URL has them, and versions of webdataset hand URLs to a shell.
        raise UserError(f"--data-dir {root!r} is not an address: it has blanks, quotes or \\")
    if is_command(root) and "{}" not in root:
        raise UserError(f"--data-dir {root!r} names no file; put {{}} where a file's name belongs")
    return root.replace("{}", name) if "{}" in root else f"{root.rstrip('/')}/{name}"


@contextlib.contextmanager
def open_file(root: str, name: str) -> Iterator[Any]:
    """Yield a binary stream; OSError where the file, or the command that fetches it, fails."""
    where = locate(root, name)
    open_stream = import_webdataset().gopen if is_address(where) else io.FileIO
    try:
        stream = open_stream(where)
    except (ValueError, ImportError, AssertionError) as error:  # a scheme that it can't open
        raise UserError(f"{where} can't be opened ({error})") from error
    try:
        yield stream
        stream.close()
    except OSError as error:
        if error.errno:
            raise
        code = getattr(stream, "status", None)
        raise OSError(f"{where} can't be read (fetching it ended with code {code})") from error
    finally:
        with contextlib.suppress(OSError):  # a command that is stopped early reports a failure
            stream.close()


def read_tar(root: str, name: str, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each regular file in a tar whose name is `wanted`.

    Nothing is unpacked to a path that the tar names. webdataset's own iterator has no limit for the
    size of a file, hence this one. A damaged tar ends early, with one line in the log.
    """
    with open_file(root, name) as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r|", bufsize=2**20) as tar:
                for member in tar:
                    if member.isreg() and member.size <= MAX_BYTES and wanted(member.name):
                        yield member.name, tar.extractfile(member).read()
                    tar.members = []  # tarfile would keep them all
        except (tarfile.TarError, EOFError, ValueError) as error:
            log.warning("%s is damaged (%s)", locate(root, name), error)


def read_index(root: str | Path, cache_dir: Path) -> dict[str, Any]:
    """Return the index of the shards, with `place`: the folder or address where it is."""
    where = locate(str(root), INDEX)
    if not is_address(where) and not Path(where).is_file():
        root = index_folder(Path(root).expanduser(), cache_dir)
    with open_file(str(root), INDEX) as stream:
        content = stream.read()
    try:
        index = json.loads(content)
        if (index["format"], index["version"]) != (FORMAT, VERSION):
            raise UserError(f"format {index['format']!r}, version {index['version']!r}")
        for shard in chain(*(split["shards"] for split in index["splits"].values())):
            count = shard["images"]
            if (
                not NAME.fullmatch(shard["name"])
                or type(count) is not int
                or not 0 <= count < 2**40
            ):
                raise UserError(f"shard {shard}")
        return index | {"place": str(root)}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{where} is not an index of shards ({error!r:.100})") from error


def index_folder(folder: Path, cache_dir: Path) -> Path:
    """Return a folder in `cache_dir` with index and list of tars that have none: all are train."""
    tars = sorted(path for path in folder.glob("*.tar") if NAME.fullmatch(path.name))
    if not tars:
        raise FileNotFoundError(
            f"no shards in {folder}; write some with python features.py --shards DIR, or give "
            "--data-dir, a folder of tars or the address of one with an index.json"
        )
    stats = [(path.stat().st_size, path.stat().st_mtime_ns) for path in tars]
    fingerprint = f"{derive_seed(folder.resolve(), *zip(tars, stats, strict=True)):014x}"
    place = cache_dir / f"shards-{fingerprint}"
    with files.lock(place.with_suffix(".lock")):
        if not (place / INDEX).exists():
            bar = progress_bar(tars, desc="reading captions", unit=" shards")
            rows = {path.name: read_captions(folder, path.name) for path in bar}
            write_index(place, folder.name, fingerprint, {"train": rows})
    return place


def read_captions(folder: Path, shard: str) -> list[list]:
    """Return [name, image id, captions] of the images of a shard that have a caption."""
    names: list[str] = []

    def is_text(name: str) -> bool:
        names.append(name)
        return name.endswith((".txt", ".json"))

    texts, rows = dict(read_tar(str(folder), shard, is_text)), []
    for name in filter(NAME.fullmatch, names):
        key, extension = name.split(".", 1)
        if f".{extension.lower()}" not in EXTENSIONS:
            continue
        about = {}
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            about = dict(json.loads(texts.get(f"{key}.json", b"{}")))
        image_id, captions = about.get("image_id"), about.get("captions")
        if type(image_id) not in (str, int):  # keys are unique in a shard only
            image_id = f"{shard.removesuffix('.tar')}/{name}"
        if not isinstance(captions, list) or not captions:
            text = texts.get(f"{key}.txt", b"").decode("utf-8", "replace")
            captions = [text.strip() or about.get("caption")]
        if all(isinstance(caption, str) and caption.strip() for caption in captions):
            rows.append([name, image_id, captions])
    return rows


def write_index(
    folder: Path, dataset: str, fingerprint: str, rows: Mapping[str, Mapping[str, list]]
) -> dict[str, Any]:
    """Write the lists and the index of `rows` by split and shard; return the index."""
    index = {"format": FORMAT, "version": VERSION, "dataset": dataset, "fingerprint": fingerprint}
    index["splits"] = {}
    for split, shards in rows.items():
        counts = [
            {"name": name, "images": len(part), "captions": sum(len(row[2]) for row in part)}
            for name, part in shards.items()
        ]
        with (
            files.replacing(folder / f"{split}.jsonl.gz") as temporary,
            open(temporary, "wb") as raw,
            gzip.GzipFile("", "wb", mtime=0, fileobj=raw) as packed,
        ):
            for row in chain(*shards.values()):
                packed.write(json.dumps(row).encode() + b"\n")
        index["splits"][split] = {"list": f"{split}.jsonl.gz", "shards": counts}
    files.write_json(folder / INDEX, index)
    return index
