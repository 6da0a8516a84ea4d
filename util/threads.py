"""CPU threads and memory: as many threads as this process may use, none that keeps a CPU busy while
it waits, and no memory that goes back to the system after each layer.

Import this before torch: OpenMP, whose threads torch computes with, reads its settings only once,
when it is loaded. Settings of the user's own (OMP_NUM_THREADS, OMP_WAIT_POLICY, GOMP_SPINCOUNT,
KMP_BLOCKTIME) are left alone.
"""

import contextlib
import ctypes
import logging
import math
import os
import sys
from pathlib import Path, PurePosixPath

from util.files import UserError

log = logging.getLogger(__name__)

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
MAX_THREADS, MAX_WORKERS = 1024, 1024  # of --threads and --workers
DEFAULT_WORKERS = 4  # at most, on machines with more CPUs
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h, both in bytes
OVERLOAD = 1.5  # processes that want to run, per CPU, from which on a line says so


def set_environment() -> None:
    """Set how many threads OpenMP starts, and that they sleep while they wait for each other.

    By default they spin, as they do not know of other programs. On a machine shared with others, a
    thread that spins takes the CPU from the one it waits for: steps become ten times slower.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ["KMP_BLOCKTIME"] = "1"  # ms, of Intel's and LLVM's OpenMP: the default is 200
    # OpenMP knows which CPUs a process may use, but not that a container may use only part of them.
    if "OMP_NUM_THREADS" not in os.environ and (granted := count_cpus()) < count_allowed():
        os.environ["OMP_NUM_THREADS"] = str(granted)


def count_allowed() -> int:
    """Return the number of CPUs on which the system lets this process run."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def count_cpus() -> int:
    """Return how many CPUs this process may keep busy: those allowed, or its container's share."""
    return max(1, min(count_allowed(), math.ceil(min(read_quota(), 2**20))))


def read_quota(
    mounts: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")
) -> float:
    """Return the CPUs' worth of time that the control groups of this process grant (Linux).

    Version 1 and 2 of control groups; the limit of a group also binds those in it. Infinity where
    there is no limit.
    """
    quotas = [math.inf]
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return math.inf
    for line in lines:
        _, names, path = line.split(":", 2)
        group = PurePosixPath("/", path.lstrip("/"))
        for parent in (group, *group.parents):
            if not names:  # version 2
                quotas.append(read_numbers(mounts / str(parent)[1:] / "cpu.max"))
            elif "cpu" in names.split(","):
                folder = mounts / "cpu" / str(parent)[1:]
                quotas.append(
                    read_numbers(folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us")
                )
    return min(quotas)


def read_numbers(*paths: Path) -> float:
    """Return quota / period from one or two files; infinity where they do not hold a limit."""
    try:
        quota, period = " ".join(path.read_text() for path in paths).split()
        limit = int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf
    return limit if limit > 0 else math.inf


def default_workers() -> int:
    """Return how many workers should read images: one for each CPU of this process, at most 4."""
    share = count_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of torchrun's processes
    return max(1, min(DEFAULT_WORKERS, share))


def set_up_process(count: int | None) -> None:
    """Prepare a script's process for long work: its threads, and how it treats freed memory.

    `count` is the number of threads to compute with (None: the default). Raises UserError if it is
    out of range.
    """
    import torch

    if count is not None:
        if not 1 <= count <= MAX_THREADS:
            raise UserError(f"--threads {count} must be between 1 and {MAX_THREADS:,}")
        torch.set_num_threads(count)
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Let the C library keep memory that is freed, for what is allocated next (Linux, glibc).

    By default it gives large blocks back to the system at once. The result of each layer of a CNN
    is such a block: half of the time went into getting zeroed pages for it again and again.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):  # another C library, such as musl
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def warn_of_overload() -> None:
    """Log a line if many more processes want to run than the machine has CPUs."""
    if not hasattr(os, "getloadavg"):  # Windows
        return
    cpus, load = os.cpu_count() or 1, os.getloadavg()[0]
    if load >= OVERLOAD * cpus + 1:
        log.warning(
            "this machine is overloaded: in the last minute %.0f processes shared its %d CPU%s; "
            "work takes longer than usual, and --threads 1 may be faster",
            load, cpus, "s" * (cpus > 1),
        )  # fmt: skip


set_environment()
