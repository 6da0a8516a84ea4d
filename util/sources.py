"""What identifies the content of a file: cheap to compare, and only read when something differs.

A source is "SIZE CHANGED MODIFIED SHA256" of a file: its size in bytes, two times in nanoseconds
since 1970, and 16 digits of its SHA-256. While size and times are the same, so is the content: who
restores the time of modification, or renames another file to this name, still sets the time of
change. Where they differ, as in a copy of a folder, the digests decide.
"""

import contextlib
import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from util import files
from util.threads import default_workers


def read_source(path: Path) -> str:
    """Return the source of a file, empty if there is none or it can't be read."""
    times = read_times(path)
    checksum = digest_file(path) if times else ""
    return f"{times} {checksum}" if checksum else ""


def digest_file(path: Path) -> str:
    """Return 16 digits of a file's SHA-256, empty if it can't be read."""
    try:
        return files.digest(path)[:16]
    except OSError:
        return ""


def read_times(path: Path) -> str:
    """Return "SIZE CHANGED MODIFIED" of a file, empty if there is none."""
    with contextlib.suppress(OSError):
        about = os.stat(path)
        if stat.S_ISREG(about.st_mode):  # a pipe would have to be waited for
            return f"{about.st_size} {about.st_ctime_ns} {about.st_mtime_ns}"
    return ""


def update_sources(paths: Sequence[Path], sources: Sequence[str | None]) -> list[str | None]:
    """Return the `sources` as they are now. Only files whose size or times differ are read.

    A file that can't be read now keeps what it had.
    """
    moved = [
        row
        for row, (path, source) in enumerate(zip(paths, sources, strict=True))
        if not source or source.rpartition(" ")[0] != read_times(path)
    ]
    updated = list(sources)
    with ThreadPoolExecutor(default_workers()) as pool:
        for row, found in zip(
            moved, pool.map(lambda row: read_source(paths[row]), moved), strict=True
        ):
            updated[row] = found or sources[row]
    return updated


def is_same_content(one: str | None, other: str | None) -> bool:
    """Return whether two sources have the same digest; None: a row that was being written."""
    return None not in (one, other) and one.rpartition(" ")[2] == other.rpartition(" ")[2]
