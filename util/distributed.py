"""Which of torchrun's processes this is, and what they tell each other.

A script does its work inside `with distributed.join():`. Started by torchrun it is then one of
`world_size()` processes (ranks 0, 1, …); started by hand it is the only one, and nothing here does
anything. All of a job's processes must call the same of these functions in the same order. What is
told goes through memory, not through GPUs, so telling waits for no GPU.
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

# Here, before there is a group: imported later, as torchvision does, its functions' defaults would
# hold the group for ever, and a thread of it can abort a process that ends.
import torch.distributed.nn.functional

from util.files import UserError

# How long a process waits for the others before it gives up: a machine may have vanished.
LONGEST_WAIT = datetime.timedelta(minutes=10)
T = TypeVar("T")


class LostError(ConnectionError):
    """Another process of the job has ended."""


def started_by_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """Return which of the job's processes this is, from 0."""
    return dist.get_rank() if _joined() else 0


def world_size() -> int:
    """Return how many processes the job has."""
    return dist.get_world_size() if _joined() else 1


def is_main() -> bool:
    """Tell whether this process writes the files and speaks to the user."""
    return rank() == 0


def local_rank() -> int:
    """Return which of this machine's processes of the job this is, from 0: its GPU's number."""
    return int(os.environ.get("LOCAL_RANK", 0)) if _joined() else 0


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def restarted() -> bool:
    """Tell whether torchrun has started this process in place of one that died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def may_restart() -> bool:
    """Tell whether torchrun was told to start processes anew that die (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


@contextlib.contextmanager
def join(longest_wait: datetime.timedelta = LONGEST_WAIT) -> Iterator[None]:
    """Join the job that torchrun started, if it did, until the end of the work.

    Of an error that ends the work only the first process to meet it tells; the others end quietly.
    All but the first process are quiet from the start. Raises LostError where another process has
    ended, at once or after `longest_wait`.
    """
    if not started_by_torchrun() or _joined():
        yield
        return
    # Not from the environment directly: the store, which torchrun keeps, outlives processes.
    store, number, count = next(iter(dist.rendezvous("env://", timeout=LONGEST_WAIT)))
    # What processes that have died left in it is not for those in their place.
    store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(
        backend, store=store, rank=number, world_size=count, timeout=longest_wait
    )
    with _quiet() if number else contextlib.nullcontext():
        try:
            yield
        except BaseException as error:
            # No goodbye to the others: they may be waiting for what will never come.
            if not _first_to_end(store):
                raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 2) from None
            if lost := as_lost(error):
                raise lost from None
            raise
        dist.destroy_process_group()


def _first_to_end(store: Any) -> bool:
    """Tell whether no other process of the job has ended with an error before."""
    try:
        return store.add("ended", 1) == 1
    except RuntimeError:  # torchrun itself is gone
        return True


def as_lost(error: BaseException) -> LostError | None:
    """Return a LostError for torch's error of a connection that broke, None for other errors."""
    said = str(error)
    broken = isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in said or "NCCL" in said)
    )
    if not broken:
        return None
    return LostError(
        f"process {rank()} of {world_size()} has lost another one: it was killed, or its machine "
        "can't be reached; what was saved before is kept"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep this process's lines and progress bars to itself; its errors are still told."""
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
    """A stream that progress bars stay away from."""

    def isatty(self) -> bool:
        return False


# ---- what processes tell each other ----------------------------------------------------------


def barrier() -> None:
    """Wait until every process is here."""
    all_reduce_sum([0.0])


def all_reduce_sum(values: Sequence[float]) -> list[float]:
    """Return the sum over all processes of each of `values`."""
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
    """Return what `work` returns on the main process, which alone does it."""
    return broadcast(work() if is_main() else None)


def split_by_rank(items: Sequence[T]) -> Sequence[T]:
    """Return this process's share of `items`: every `world_size()`-th, beginning with its rank."""
    return items if world_size() == 1 else items[rank() :: world_size()]


def pick_device(device: torch.device | str) -> torch.device:
    """Return the device named; "auto" is the GPU where there is one, else the CPU.

    Of several processes on a machine each has a GPU of its own, unless one is named by its number.
    Raises ValueError for a name that torch does not know, and for a device that is not there.
    """
    if str(device) in ("auto", "cuda") and torch.cuda.is_available():
        return own_gpu()
    if str(device) == "auto":
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(
            f"device {str(device)!r} can't be used ({reason}); choose from auto, cpu, cuda, "
            "cuda:1, mps"
        ) from error


def own_gpu() -> torch.device:
    """Return this process's GPU; ValueError where there are more processes than GPUs."""
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
