"""The processes of a job that torchrun started: their ranks, devices and communication.

A script works inside `with distributed.join():`. Started by torchrun it is one of `world_size()`
processes (ranks 0, 1, …); started by hand it is the only one, and nothing here does anything. All
processes of a job must call the functions of the second part in the same order. They communicate
through main memory (gloo), so they never wait for a GPU.
"""

import contextlib
import datetime
import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

# Imported before there is a process group: imported later, as torchvision does, the defaults of its
# functions keep the group alive for ever, and a thread of it can abort a process that ends.
import torch.distributed.nn.functional

from util.files import UserError

# A process that has waited this long for the others gives up: a machine may have vanished.
TIMEOUT = datetime.timedelta(minutes=10)
T = TypeVar("T")


class LostError(ConnectionError):
    """Another process of the job has ended."""


def started_by_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """Return the number of this process in the job, from 0."""
    return dist.get_rank() if _joined() else 0


def world_size() -> int:
    """Return how many processes the job has."""
    return dist.get_world_size() if _joined() else 1


def is_main() -> bool:
    """Return whether this is the process that writes files and prints."""
    return rank() == 0


def local_rank() -> int:
    """Return the number of this process on its machine, from 0: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0)) if _joined() else 0


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def restarted() -> bool:
    """Return whether torchrun started this process in place of one that died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def may_restart() -> bool:
    """Return whether torchrun restarts processes that die (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


@contextlib.contextmanager
def join(timeout: datetime.timedelta = TIMEOUT) -> Iterator[None]:
    """Join the job that torchrun started, if it did, until the end of the block.

    Only rank 0 prints. An error is reported only by the first process that meets one; the others
    exit quietly. Raises LostError where another process has ended, at once or after `timeout`.
    """
    if not started_by_torchrun() or _joined():
        yield
        return
    # A store that torchrun keeps: it outlives the processes of the job.
    store, number, count = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))
    # Restarted processes must not see what those that died have left in it.
    store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=timeout)
    with _quiet() if number else contextlib.nullcontext():
        try:
            yield
        except BaseException as error:
            # The group is not destroyed: that would wait for processes that may have died.
            if not _is_first_error(store):
                raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 2) from None
            if lost := as_lost(error):
                raise lost from None
            raise
        dist.destroy_process_group()


def _is_first_error(store: Any) -> bool:
    """Return whether no other process of the job has ended with an error before."""
    try:
        return store.add("ended", 1) == 1
    except RuntimeError:  # torchrun itself is gone
        return True


def as_lost(error: BaseException) -> LostError | None:
    """Return a LostError for torch's error of a broken connection, None for other errors."""
    text = str(error)
    broken = isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text)
    )
    if not broken:
        return None
    return LostError(
        f"process {rank()} of {world_size()} has lost another one: it was killed, or its machine "
        "can't be reached; what was saved before is kept"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Print nothing and draw no progress bar in the block; stderr still takes errors."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            open(os.dup(2), "wb", buffering=0) as raw,
            _NoTerminal(raw, write_through=True) as stderr,
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(stderr),
        ):
            yield
    finally:
        logging.disable(before)


class _NoTerminal(io.TextIOWrapper):
    """A stream that is no terminal, so that no progress bar is drawn on it."""

    def isatty(self) -> bool:
        return False


# --- communication


def barrier() -> None:
    """Wait until every process has called this."""
    all_reduce_sum([0.0])


def all_reduce_sum(values: Sequence[float]) -> list[float]:
    """Return each of `values` summed over all processes."""
    if world_size() == 1:
        return [float(value) for value in values]
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


def gather(value: Any) -> list[Any] | None:
    """Return every process's `value`, by rank, on the main process; None on the others."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size() if is_main() else None
    dist.gather_object(value, values)
    return values


def broadcast(value: T) -> T:
    """Return the main process's `value`."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def on_main(work: Callable[[], T]) -> T:
    """Return what `work` returns on the main process; the others do not call it."""
    return broadcast(work() if is_main() else None)


def split_by_rank(items: Sequence[T]) -> Sequence[T]:
    """Return this process's items: every `world_size()`-th, starting at its rank."""
    return items if world_size() == 1 else items[rank() :: world_size()]


# --- devices


def pick_device(device: torch.device | str) -> torch.device:
    """Return the torch device of that name; "auto" is a GPU where there is one, else the CPU.

    Each process of a machine has a GPU of its own, unless `device` gives a number. Raises UserError
    for a name that torch does not know, and for a device that is not there. "gpu" is "cuda", or
    "mps" on a Mac.
    """
    named, name = str(device), str(device).strip().lower()
    if name.partition(":")[0] == "gpu":
        mac = torch.backends.mps.is_available() and not torch.cuda.is_available()
        device = name.replace("gpu", "mps" if mac else "cuda", 1)
    if str(device) in ("auto", "cuda") and torch.cuda.is_available():
        return own_gpu()
    if str(device) == "auto":
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        found = torch.empty(0, device=device).device
        if found.type == "meta":
            raise RuntimeError("it computes nothing")
        return found
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        if "Expected one of" in reason or "Invalid device string" in reason:
            reason = "there is no such device"  # torch lists twenty kinds that nobody has
        raise UserError(
            f"device {named!r} can't be used ({reason}); choose from auto, cpu, cuda, cuda:1, mps"
        ) from error


def own_gpu() -> torch.device:
    """Return this process's GPU; UserError where there are more processes than GPUs."""
    if world_size() == 1:
        return torch.device("cuda")
    number, count = local_rank(), torch.cuda.device_count()
    if number >= count:
        raise UserError(
            f"process {number + 1} on this machine has no GPU of its own, there are {count}; give "
            f"torchrun --nproc-per-node {count}, or --device cpu"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)
