"""Model files: one safetensors file with a header that describes the model.

`model.CaptionModel` writes and reads them. Their header is metadata of safetensors: JSON values.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from encoder import CAPTIONER_PREFIX
from util.files import UserError
from util.quantization import dequantize_state

FORMAT = "image-captioning 2"
INT8_FORMAT = "image-captioning 3"  # the CNN's matrices may be int8, which earlier versions refuse
MAX_HEADER = 10_000_000  # bytes: enough for half a million words
MAX_NGRAM = 1000


def checkpoint_file(path: str | Path) -> Path:
    """Return the model file that `path` means: itself, or best.safetensors of a run's folder."""
    path = Path(path)
    if path.is_dir():
        if not (path / "best.safetensors").is_file():
            raise FileNotFoundError(
                f"no best.safetensors in {path}: it is not the folder of a run, or the run has "
                "not finished its first epoch"
            )
        return path / "best.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: there is no such file or folder")
    return path


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return the header of a model file, without reading a tensor; `path` may be a run's folder.

    It has the keys `model` (what it is built of) and `vocabulary`, and if train.py wrote the file
    `scores` and `training`. Raises UserError where the file is damaged, or not a model file.
    """
    return read_header(path)[0]


def read_header(path: str | Path) -> tuple[dict[str, Any], str | None]:
    """Return `read_metadata` and the digest of the file, None if it is of an earlier version."""
    from safetensors import SafetensorError, safe_open

    path = checkpoint_file(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    try:
        # The library's own limit is ten times higher, and text grows when it is parsed.
        if MAX_HEADER < length < path.stat().st_size:
            raise SafetensorError(f"a header of {length:,} bytes, at most {MAX_HEADER:,} are read")
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
        found = str(header.get("format"))[:60]
        known = [json.dumps(each) for each in (FORMAT, INT8_FORMAT)]
        if found not in known:  # another program's values need not be JSON
            raise UserError(
                f"{path} is not a captioning model of this version: its header has the format "
                f"{found}, expected {' or '.join(known)}; train it again, or use the version of "
                "the project that wrote it"
            )
        metadata = {key: json.loads(value) for key, value in header.items()}
        return metadata, metadata.pop("digest", None)
    except (SafetensorError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} is not a model file, or is cut short ({error}); expected a .safetensors "
            "file written by train.py"
        ) from error


def read_no_repeat_ngram(metadata: dict[str, Any]) -> int:
    """Return what a model's header asks for in place of `DecodingConfig.no_repeat_ngram`, else 0.

    Raises UserError if that is no such number.
    """
    decoding = metadata.get("decoding", {})
    value = decoding.get("no_repeat_ngram", 0) if isinstance(decoding, dict) else None
    if type(value) is not int or not 0 <= value <= MAX_NGRAM:
        raise UserError(f"its no_repeat_ngram is not a number between 0 and {MAX_NGRAM}")
    return value


def to_json(value: Any) -> str:
    """Return the text of a value in the header of a model file."""
    return json.dumps(value, ensure_ascii=False)


def digest(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of a model file's header and tensors, in hex digits.

    It covers what the file means, not its layout: another writer may order it differently.
    """
    found = hashlib.sha256()
    for key in sorted(metadata):
        found.update(f"{key}={to_json(metadata[key])}\n".encode("utf-8", "surrogatepass"))
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy())  # NumPy has no bfloat16
    return found.hexdigest()


def read_tensors(
    path: Path, expected: dict[str, Tensor], metadata: dict[str, Any], written: str | None
) -> dict[str, Tensor]:
    """Return the tensors of a model file, with the types of those `expected`.

    Raises UserError where names or shapes differ from those expected, a tensor holds infinity or
    NaN, int8 lacks its scales, or the file's digest is not the one `written` in its header.
    """
    from safetensors.torch import load_file

    stored = tensors = load_file(path)
    if metadata["format"] == INT8_FORMAT:
        tensors = dequantize_state(stored, path, CAPTIONER_PREFIX)
    missing, extra = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    problem = ""
    if missing:
        problem = f"it lacks {min(missing)} and {len(missing) - 1} more"
    elif extra:
        problem = f"it has an unknown {min(extra)[:99]!r}, and {len(extra) - 1} more"
    for name in () if problem else expected:
        if tensors[name].shape != expected[name].shape:
            shapes = tuple(tensors[name].shape), tuple(expected[name].shape)
            problem = f"{name} has shape {shapes[0]}, expected {shapes[1]}"
            break
    if problem:
        raise UserError(f"{path} has other weights than its header says: {problem}")
    is_whole = written is None or written == digest(metadata, stored)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() != expected[name].is_floating_point():
            raise UserError(f"{path} is damaged: {name} holds {tensor.dtype}")
        # Copied: the file's tensors start at odd addresses, which slows every product.
        tensors[name] = tensor.to(expected[name].dtype, copy=True)
        if not tensors[name].isfinite().all():
            raise UserError(f"{path} is damaged: {name} holds infinity or NaN")
    if not is_whole:
        raise UserError(
            f"{path} is damaged: its content is not what was written (another SHA-256 than its "
            "header says); copy or download it again, or export it from the run again"
        )
    return tensors


def to_half(tensor: Tensor) -> Tensor:
    """Return a matrix of floats in float16 if all its values fit; any other tensor as it is."""
    if tensor.dim() < 2 or not tensor.is_floating_point():
        return tensor
    half = tensor.half()
    return half if half.isfinite().all() else tensor
