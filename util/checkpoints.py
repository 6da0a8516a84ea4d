"""A run's folder: one process at a time, training state on disk, a stop between two steps."""

import contextlib
import io
import logging
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from util import distributed, files
from util.files import UserError

log = logging.getLogger(__name__)

# What training leaves behind: a folder with none of these has nothing to lose.
WORTH_KEEPING = ("last.pt", "previous.pt", "best.safetensors")
LARGE = ("last.pt", "best.safetensors")  # a kill can leave half of one, under another name
# Seconds: the loader's workers of a killed run notice within five, and may hold its lock till then.
PATIENCE = 10.0
T = TypeVar("T")


@contextlib.contextmanager
def run_folder(output: Path | None, dataset: str, *, resume: bool) -> Iterator[Path]:
    """Lend the folder of a run, `output` or a free name, which is this job's alone until the end.

    Its first process alone writes there. Raises ValueError where another run is at work in it, or
    where a new run would write over one; OSError where it can't be written. A folder that stays
    empty is removed.
    """
    if not distributed.is_main():
        yield distributed.broadcast(None)
        return
    folder = output or _free_name(dataset)
    files.check_writable(folder / "config.json")
    lock = folder / ".lock"
    with files.lock(lock, PATIENCE, f"another run is at work in {folder}; name another --output"):
        try:
            if not resume and _holds_a_run(folder):
                raise UserError(
                    f"{folder} holds a run already; add --resume, or name another --output"
                )
            for name in LARGE:
                files.remove_leftovers(folder / name)
            yield distributed.broadcast(folder)
        finally:
            with contextlib.suppress(OSError):  # Windows keeps a file that is open
                lock.unlink()
                folder.rmdir()


def _holds_a_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in WORTH_KEEPING)


def _free_name(dataset: str) -> Path:
    """Return a folder's name in runs/ that no run has, not even one that has just begun."""
    folder, number = Path("runs") / dataset, 2
    while _holds_a_run(folder) or (folder / ".lock").exists():
        folder = Path("runs") / f"{dataset}-{number}"
        number += 1
    return folder


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write last.pt; the one before it stays as previous.pt."""
    # Through memory: torch.save turns a full disk into a RuntimeError without a reason.
    content = io.BytesIO()
    torch.save(state, content)
    last = folder / "last.pt"
    with files.replacing(last) as temporary:
        temporary.write_bytes(content.getbuffer())
        if last.exists():
            last.replace(folder / "previous.pt")


def load_state(folder: Path) -> dict[str, Any] | None:
    """Return the training state of a run: the one before it if the last is damaged.

    None where none was saved yet; ValueError where none that was can be read.
    """
    faults = []
    for name in ("last.pt", "previous.pt"):
        if not (folder / name).exists():
            continue
        try:
            return _read_state(folder / name)
        except Exception as error:
            faults.append(f"{folder / name} can't be read ({_first_line(error)})")
            log.warning("%s", faults[-1])
    if faults:
        raise UserError(
            f"{' and '.join(faults)}: the run can't go on; begin another with its best weights "
            f"(--init-from {folder}), or anew"
        )
    return None


def _first_line(error: Exception) -> str:
    return files.explain(error).splitlines()[0]


def _read_state(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:  # torch.load checks no checksum: a flipped bit passes
        if damaged := archive.testzip():
            raise UserError(f"{damaged} in it is damaged")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own words tell how to run the code in it
        raise UserError("it holds more than tensors and plain values") from error
