"""The folder of a run: who may write to it, its training state, its table of metrics."""

import contextlib
import io
import logging
import os
import pickle
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from util import distributed, files, program
from util.files import UserError
from util.states import check_state, check_torch_file

log = logging.getLogger(__name__)

# A folder with one of these holds a run, which a new run must not overwrite.
RUN_FILES = ("last.pt", "previous.pt", "best.safetensors")
# What else a run writes, besides config.json.
RESULTS = ("metrics.csv", "learning_curve.png", "samples", "scores.json")
LARGE = ("last.pt", "best.safetensors")  # a killed run can leave a temporary file of these
# Seconds. The loader's workers of a killed run notice within five, and hold its lock until then.
LOCK_TIMEOUT = 10.0


@contextlib.contextmanager
def run_folder(output: Path | None, dataset: str, *, resume: bool) -> Iterator[Path]:
    """Lock the folder of a run, `output` or runs/DATASET with a free number, and yield it.

    Raises UserError where another run works in it, or where a new run would overwrite one; OSError
    where it can't be written to. After an error before the first state, such as a missing dataset,
    the folder is as it was before; if this has created it, it is removed.
    """
    if not distributed.is_main():
        yield distributed.broadcast(None)
        return
    folder = output or _free_folder(dataset)
    files.check_writable(folder / "config.json")
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    lock, busy = folder / ".lock", f"another run is at work in {folder}; name another --output"
    advice = "go on from what was saved with --resume --output and the folder's new name"
    with files.lock(lock, LOCK_TIMEOUT, busy), files.hold_folder(folder, advice):
        try:
            if not resume:
                check_free(folder)
            for name in LARGE:
                files.remove_leftovers(folder / name)
            with contextlib.nullcontext() if resume else restoring_config(folder):
                yield distributed.broadcast(folder)
        finally:
            with contextlib.suppress(OSError, UserError):  # Windows keeps a file that is open
                files.check_held(lock)  # another run may have taken its place
                if not lock.stat().st_size:  # a stranger's has content
                    lock.unlink()
                for path in created:
                    path.rmdir()  # fails where anything is in it


@contextlib.contextmanager
def restoring_config(folder: Path) -> Iterator[None]:
    """After an error in the block, put the folder's config.json back where nothing else is there.

    A run that is interrupted keeps it, so that --resume can go on.
    """
    config = folder / "config.json"
    before = config.read_bytes() if config.exists() else None
    try:
        yield
    except Exception:
        if not any(os.path.lexists(folder / name) for name in (*RUN_FILES, *RESULTS)):
            with contextlib.suppress(OSError, UserError):
                files.check_held(config)  # another folder may have taken its place
                if before is None:
                    config.unlink(missing_ok=True)
                else:
                    files.write_bytes(config, before)
        raise


def check_free(folder: Path) -> None:
    """Raise UserError where a new run in `folder` would replace files.

    A config.json alone may be there: that of a run which ended before its first state was saved.
    """
    present = [name for name in (*RUN_FILES, *RESULTS) if os.path.lexists(folder / name)]
    config, ours = folder / "config.json", False
    if os.path.lexists(config):
        with contextlib.suppress(UserError, OSError):
            ours = is_run_config(files.read_json(config))
        if not ours:
            present.append("config.json")
    if ours and present:
        raise UserError(f"{folder} holds a run already; add --resume, or name another --output")
    if present:
        raise UserError(
            f"{folder} holds {' and '.join(present)}, which this run would replace; name another "
            "--output"
        )


def is_run_config(value: Any) -> bool:
    """Return whether the content of a config.json is the flags of a run of train.py."""
    return isinstance(value, dict) and {"dataset", "cnn_backbone", "decoder", "epochs"} <= set(
        value
    )


def _is_free(folder: Path) -> bool:
    try:
        check_free(folder)
    except UserError:
        return False
    return not (folder / ".lock").exists()


def _free_folder(dataset: str) -> Path:
    """Return a folder in runs/ that no run uses, not even one that has just started."""
    folder, number = Path("runs") / dataset, 2
    while not _is_free(folder):
        folder = Path("runs") / f"{dataset}-{number}"
        number += 1
    return folder


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write last.pt and keep the one before it as previous.pt."""
    # Through memory: torch.save reports a full disk as a RuntimeError without a reason.
    content = io.BytesIO()
    torch.save(state, content)
    last = folder / "last.pt"
    with files.replacing(last) as temporary:
        temporary.write_bytes(content.getbuffer())
        if last.exists():
            last.replace(folder / "previous.pt")


def write_metrics(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write metrics.csv: a row per epoch, an empty cell for what was not measured."""
    import pandas  # slow to import

    table = pandas.DataFrame(rows, dtype=object)
    files.write_text(path, table.to_csv(index=False, lineterminator="\n"))


def load_state(folder: Path) -> dict[str, Any] | None:
    """Return the training state of a run: last.pt, or previous.pt if that is damaged.

    None where none has been saved yet; UserError where both are damaged.
    """
    faults = []
    for name in ("last.pt", "previous.pt"):
        if not (folder / name).exists():
            continue
        try:
            return _read_state(folder / name)
        except Exception as error:
            reason = program.explain(error).splitlines()[0]
            faults.append(f"{folder / name} can't be read ({reason})")
            log.warning("%s", faults[-1])
    if faults:
        raise UserError(
            f"{' and '.join(faults)}: the run can't go on; start another from its best weights "
            f"(--init-from {folder}), or a new one"
        )
    return None


def _read_state(path: Path) -> dict[str, Any]:
    check_torch_file(path)
    with zipfile.ZipFile(path) as archive:  # torch.load does not compare checksums
        if damaged := archive.testzip():
            raise UserError(f"{damaged} in it is damaged")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's text explains how to run the code in it
        raise UserError("it holds more than tensors and plain values") from error
    check_state(state)
    return state
