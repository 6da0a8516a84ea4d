"""Files of a folder, or behind an address that the webdataset library opens, and tars among them.

An address is `http://…`, `gs://…`, `pipe:COMMAND` and the like.
"""

import contextlib
import io
import logging
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from util.files import UserError

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


def locate(root: str, name: str) -> str:
    """Return the path or address of a file; `{}` in an address is replaced by its name."""
    if not is_address(root):
        return str(Path(root).expanduser() / name)
    if root.startswith("pipe:") and "{}" not in root:
        raise UserError(f"--data-dir {root!r} names no file; put {{}} where a file's name belongs")
    return root.replace("{}", name) if "{}" in root else f"{root.rstrip('/')}/{name}"


@contextlib.contextmanager
def open_file(root: str, name: str) -> Iterator[Any]:
    """Yield a binary stream; OSError where the file, or the command that fetches it, fails."""
    where = locate(root, name)
    stream = import_webdataset().gopen(where) if is_address(where) else io.FileIO(where)
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
