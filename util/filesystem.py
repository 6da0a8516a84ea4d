"""What not every file system can do: locks, permissions, writing to the disk at once.

Network drives, memory sticks and file systems of programs (FUSE) lack some of these. Work goes on
without, after a warning where something may be lost.
"""

import errno
import functools
import logging
import os
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

# What file systems answer that lack an operation: network drives, some of those in user space.
UNSUPPORTED = {
    getattr(errno, name, None)
    for name in ("ENOLCK", "ENOSYS", "EINVAL", "ENOTSUP", "EOPNOTSUPP", "ENOTTY", "ENODEV")
}


def set_mode(path: Path, mode: int) -> None:
    """Set the permissions of a file, where the file system has permissions."""
    try:
        path.chmod(mode)
    except OSError as error:
        if error.errno not in {*UNSUPPORTED, errno.EPERM, errno.EACCES}:
            raise


def sync_file(file: Any, path: str | Path) -> None:
    """Wait until the disk has the content of the open `file`; warn if the system can't say so."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        warn_of_lost_power(Path(path).parent, error)


def sync_folder(folder: Path) -> None:
    """Make the renames in `folder` durable; warn if the system can't. Windows has no such call."""
    if os.name != "posix":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in {*UNSUPPORTED, errno.EPERM, errno.EACCES, errno.EBADF, errno.EISDIR}:
            raise
        warn_of_lost_power(folder, error)


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning, but the same one only once."""
    log.warning("%s", message)


def warn_of_lost_power(folder: Path, error: OSError) -> None:
    warn_once(
        f"the file system of {folder} can't be told to write to the disk at once "
        f"({error.strerror}): if the power fails, files that were just written may be lost"
    )


def find_lock_error(path: Path) -> OSError | None:
    """Return the error with which the file system says that it has no locks, None if it has.

    filelock itself would, depending on its version, wait for ever, raise an error, or use a file
    that a killed process leaves behind.
    """
    try:
        import fcntl
    except ImportError:  # Windows, whose network drives have locks
        return None
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # others: a process holds it
        return error if error.errno in UNSUPPORTED else None
    finally:
        os.close(descriptor)
    return None
