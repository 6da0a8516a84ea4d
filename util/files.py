"""Atomic writes, locks, checks of outputs, and the error of a user's mistake.

Every file this project writes goes through `replacing`, so that a crash, a full disk or Ctrl-C
leaves either the old file or the new one, never half of one.
"""

import contextlib
import errno
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from util.filesystem import find_lock_error, set_mode, sync_file, sync_folder, warn_once

# Metadata of a dataclass field whose value makes the model another one: a run that is resumed
# must not change it.
IDENTITY = {"identity": True}


class UserError(ValueError):
    """A mistake of the user, shown as one line: the message names the value and what to do."""


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; at the end it is fsynced and renamed to `path`.

    On an exception the temporary file is removed and `path` stays as it was. Missing folders are
    created, links are followed, and the file keeps its mode. The temporary name keeps the suffix,
    from which some writers infer the format. Devices and pipes (/dev/stdout) can't be replaced:
    they are yielded themselves.
    """
    check_held(path)
    check_writable(path)
    if is_special(Path(path)):
        yield Path(path)
        return
    target, temporary = Path(os.path.realpath(path)), None
    try:
        temporary = create_temporary(target)
        yield temporary
        with open(temporary, "rb+") as file:
            set_mode(temporary, get_mode(target))
            sync_file(file, path)
        os.replace(temporary, target)
        sync_folder(target.parent)
    except OSError as error:
        # The error of a full disk names no file, and users don't know the temporary name.
        if error.errno and error.filename in (None, str(target), str(temporary)):
            raise write_error(error.errno, path) from error
        raise
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


_held: dict[Path, tuple[int, str]] = {}  # folder → its descriptor and advice, see `hold_folder`


@contextlib.contextmanager
def hold_folder(folder: Path, advice: str) -> Iterator[None]:
    """In the block, write into `folder` only as long as its path leads to the same folder.

    Otherwise `replacing` would create it again once it was renamed or deleted, or write among the
    files of another one that has taken its place. `advice` ends the error's message.
    """
    if os.name != "posix":  # Windows refuses to rename or delete a folder with a file that is open
        yield
        return
    # As long as it is open, the system gives its number to no other folder.
    descriptor, folder = os.open(folder, os.O_RDONLY), folder.absolute()
    _held[folder] = descriptor, advice
    try:
        yield
    finally:
        del _held[folder]
        os.close(descriptor)


def check_held(path: str | Path) -> None:
    """Raise UserError where `path` is in a held folder that was renamed, deleted or replaced."""
    for folder in _held.keys() & set(Path(path).absolute().parents):
        descriptor, advice = _held[folder]
        try:
            same = os.path.samestat(os.fstat(descriptor), os.stat(folder))
        except OSError:  # gone, or on a network drive that is
            same = False
        if not same:
            raise UserError(
                f"{folder} was renamed, deleted or replaced by another folder while it was in "
                f"use; nothing more is written; {advice}"
            )


def check_writable(*paths: str | Path | None) -> None:
    """Raise OSError if a path can't be written, before hours of work are spent on its content.

    None stands for a file that was not requested. Nothing is created.
    """
    for path in filter(None, paths):
        if number := find_obstacle(Path(path).absolute()):
            raise write_error(number, path)


def check_output(
    path: str | Path | None,
    suffixes: Collection[str] = (),
    inputs: Iterable[str | Path | None] = (),
) -> None:
    """Raise UserError or OSError if `path` can't be written, or is the wrong file to write.

    That is a write-protected file, one with another suffix than `suffixes` (in lower case; "": a
    name without one; none at all: any name will do), or one of `inputs`, under this name or
    another: another spelling, a link of either kind. Inputs may also be other outputs, which need
    not exist. Devices and pipes are always right, and None stands for what was not requested.
    Nothing is created.
    """
    check_writable(path)
    if path is None or is_special(Path(path)):
        return
    if is_protected(path):
        raise write_error(errno.EACCES, path)
    if suffixes and Path(path).suffix.lower() not in suffixes:
        endings = " or ".join(filter(None, suffixes))
        raise UserError(f"{path} is to be written, so its name must end in {endings}")
    own = identify(path)
    for other in inputs:
        if other is not None and identify(other) == own:
            raise UserError(
                f"{path} can't be written: this command uses the same file as {other}; name "
                "another file"
            )


def check_replaceable(
    path: str | Path | None, is_earlier: Callable[[Path], bool], content: str
) -> None:
    """Raise UserError where `path` is a file that writing `content` to it would destroy.

    `is_earlier` says whether a file is an earlier one with such content, or raises UserError.
    """
    if path is None or not Path(path).is_file() or not os.path.getsize(path):
        return
    try:
        if is_earlier(Path(path)):
            return
    except (UserError, OSError):
        pass
    raise UserError(
        f"{path} is there, and does not hold {content}: it would be lost; name another file"
    )


def identify(path: str | Path) -> tuple[int, int] | str:
    """Return what two names of one file have in common: its device and inode, or a real path."""
    try:
        status = os.stat(path)
        return status.st_dev, status.st_ino
    except OSError:  # it does not exist
        return os.path.normcase(os.path.realpath(path))


def is_protected(path: str | Path) -> bool:
    """Return whether `path` is a write-protected file, which the system's own user could write."""
    try:
        return not (os.stat(path).st_mode & 0o222 and os.access(path, os.W_OK))
    except OSError:
        return False


def find_obstacle(path: Path) -> int:
    """Return the errno that writing to `path` would certainly raise, else 0."""
    if path.is_dir():
        return errno.EISDIR
    place = path
    if not is_special(path):
        place = next(folder for folder in path.parents if folder.exists())
        if not place.is_dir():
            return errno.ENOTDIR
    return 0 if os.access(place, os.W_OK) else errno.EACCES


def write_error(number: int, path: str | Path) -> OSError:
    """Return the error that says why `path` can't be written."""
    return OSError(number, f"cannot write ({os.strerror(number)})", str(path))


def is_special(path: Path) -> bool:
    """Return whether `path` exists and is not a regular file: a device, a pipe."""
    return path.exists() and not path.is_file()


def create_temporary(target: Path) -> Path:
    """Return a new empty file beside `target`, whose folder is created if missing."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            prefix=f".{target.stem[:40]}-", suffix=target.suffix, dir=target.parent
        )
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from error
    os.close(handle)
    return Path(name)


def remove_leftovers(target: Path) -> None:
    """Remove temporary files of killed writers of `target`; nobody else may be writing it now."""
    for leftover in target.parent.glob(f".{target.stem[:40]}-????????{target.suffix}"):
        leftover.unlink(missing_ok=True)


def get_mode(target: Path) -> int:
    """Return the permissions of `target`, or those of a new file: mkstemp's are private."""
    if target.exists():
        return stat.S_IMODE(target.stat().st_mode)
    umask = os.umask(0)  # it can be read only by setting it
    os.umask(umask)
    return 0o666 & ~umask


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write `content` to `path`, atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON, atomically."""
    write_bytes(path, f"{format_json(value)}\n".encode("utf-8", "backslashreplace"))


def format_json(value: Any) -> str:
    """Return `value` as indented JSON, to be encoded as UTF-8 with "backslashreplace".

    File names may contain bytes that are not text (lone surrogates); "\\udcff" is also JSON's
    escape for them.
    """
    return json.dumps(value, indent=2, ensure_ascii=False)


def read_text(path: Path) -> str:
    """Return a text file's content, line ends as \\n; UserError with its name if it is no UTF-8."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        reason = "it holds NUL" if "\0" in text else ""
    except UnicodeDecodeError as error:
        reason = error.reason
    if reason:
        raise UserError(f"{path} is not a text file in UTF-8 ({reason}); save it as UTF-8")
    return text


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file; UserError with its name if it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a JSON file ({error})") from error


def digest(path: str | Path) -> str:
    """Return the SHA-256 of a file's content, in hex digits."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            found.update(block)
    return found.hexdigest()


@contextlib.contextmanager
def lock(path: str | Path, wait: float = -1, message: str = "") -> Iterator[bool]:
    """Hold an exclusive lock on `path` among processes; it is freed if the process is killed.

    If another process still holds it after `wait` seconds (-1: no limit), raise UserError with
    `message`. Yields True; where the file system has no locks, False after a warning.
    """
    from filelock import FileLock, Timeout

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if error := find_lock_error(path):
        warn_once(
            f"the file system of {path.parent} has no locks ({error.strerror}): do not start a "
            "second process that writes to this folder before this one has ended"
        )
        yield False
        return
    try:
        acquired = FileLock(path).acquire(timeout=wait)
    except Timeout:
        raise UserError(message) from None
    with acquired:
        yield True
