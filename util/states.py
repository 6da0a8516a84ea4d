"""Training states that may be damaged, or a stranger's: checked before and after torch.load.

`torch.load` with `weights_only` runs no code, but a small file can still ask it for all memory, and
what it returns may be anything.
"""

import pickletools
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from util.files import UserError

# What a pickle of tensors in dictionaries and lists calls. torch.load allows more with
# weights_only, such as bytearray(10**10).
PICKLED = re.compile(
    r"collections OrderedDict|torch._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage"
)


def check_torch_file(path: Path) -> None:
    """Raise UserError for a file of `torch.save` that would take more memory than its size.

    Such are archives with compressed entries or with several entries of the same bytes, which
    torch.save never writes, and pickles that call for memory. zipfile.BadZipFile: not an archive.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        packed = any(each.compress_type != zipfile.ZIP_STORED for each in entries)
        if packed or sum(each.file_size for each in entries) > path.stat().st_size:
            raise UserError("its entries are compressed, which torch.save never does")
        for entry in entries:
            if not entry.filename.endswith(".pkl"):
                continue
            for code, argument, _ in pickletools.genops(archive.read(entry)):
                if code.name not in ("GLOBAL", "INST", "STACK_GLOBAL"):
                    continue
                if not PICKLED.fullmatch(str(argument)):
                    name = str(argument).replace(" ", ".")
                    raise UserError(f"it holds {name}, not only tensors and plain values")


def check_state(state: Any) -> None:
    """Raise UserError where `state` is not the training state of a run, whatever its model."""
    if not isinstance(state, dict):
        raise UserError(f"it holds a {type(state).__name__}, not the state of a run")
    for names, (fits, required) in ENTRIES.items():
        for name in names.split():
            if name not in state and required:
                raise UserError(f"it has no {name}")
            if name in state and not fits(state[name]):
                raise UserError(f"its {name} is not that of a run")
    for first, last in (("first_step", "step_number"), ("first_epoch", "epoch")):
        if state.get(first, 0) > state[last]:
            raise UserError(f"its {first} {state[first]} is after its {last} {state[last]}")
    if len(state["rows"]) < state["epoch"]:
        raise UserError(f"it has {len(state['rows'])} rows of {state['epoch']} epochs")
    counted = state.get("samples", 0) if state.get("critical") else state["words"]
    if state["batch"] and not counted:
        raise UserError(f"it has trained on {state['batch']} batches without a word")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and -1e300 < value < 1e300


def _are_tensors(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items()
    )


def _are_digests(value: Any) -> bool:
    return _are_tensors(value) and all(
        each.dtype == torch.int64 and each.dim() == 2 and each.shape[1] == 2
        for each in value.values()
    )


def _are_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def _are_rows(value: Any) -> bool:
    """Return whether a value is the rows of metrics.csv: numbers, and None for empty cells."""
    return isinstance(value, list) and all(
        isinstance(row, dict)
        and "CIDEr" in row
        and _is_count(row.get("epoch"))
        and all(type(cell) in (int, float, type(None)) for cell in row.values())
        and (row["CIDEr"] is None or _is_finite(row["CIDEr"]))
        for row in value
    )


# Entries of a state: what their values are, and whether runs of all versions have them.
ENTRIES: dict[str, tuple[Callable[[Any], bool], bool]] = {
    "weights average": (_are_tensors, True),
    "optimizer": (lambda value: isinstance(value, dict), True),
    "step_number epoch batch words": (_is_count, True),
    "first_step first_epoch": (_is_count, False),
    "batch_size": (lambda value: _is_count(value) and value > 0, False),
    "rows": (_are_rows, True),
    "seconds nll": (_is_finite, True),
    "rewarded baselines samples": (_is_finite, False),
    "vocabulary": (_are_words, False),
    "data": (_are_digests, False),
    "by_character critical": (lambda value: isinstance(value, bool), False),
    "encoder": (lambda value: value is None or isinstance(value, str), True),
}
