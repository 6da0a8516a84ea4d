"""What the web page says of its model and of its sample photographs."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def name_model(path: Path) -> str:
    """Return the name of a model file, or of the run that it is of; no folders above it."""
    path = path.resolve()
    if path.name == "best.safetensors":
        path = path.parent
    return path.name if path.is_dir() else path.stem


def describe_header(header: dict[str, Any]) -> str:
    """Return what the header of a model file says in few words, "" if it says nothing."""
    model = header.get("model", {})
    parts = " and ".join(str(model[key]) for key in ("cnn_backbone", "decoder") if key in model)
    names = ", ".join(dict.fromkeys(list_datasets(header.get("training"))))
    return ", ".join(filter(None, (parts, names and f"trained on {names}")))


def list_datasets(training: Any) -> Iterator[str]:
    """Yield the datasets of a model, and of those it was started from or is the mean of."""
    remaining = [training]
    while remaining:
        found = remaining.pop()
        if isinstance(found, list):
            remaining += reversed(found)
        if not isinstance(found, dict):
            continue
        for name in (found.get("dataset"), *to_list(found.get("also"))):
            if isinstance(name, str):  # KIND:DIR, of which only the folder's own name is told
                yield re.split(r"[:/\\]", name.rstrip("/\\"))[-1][:80]
        remaining += [found.get("mean_of"), found.get("init_from")]


def to_list(value: Any) -> list:
    return value if isinstance(value, list) else []


def list_examples(folder: Path) -> list[dict[str, str | None]]:
    """Return the sample photographs with their credits, from the table in the folder's README."""
    examples = []
    with contextlib.suppress(OSError):
        for line in (folder / "README.md").read_text(encoding="utf-8").splitlines():
            row = re.fullmatch(r"\| `([\w.-]+)` \| (.+) \| (.+) \| (.+) \|", line)
            if row and (folder / row[1]).is_file():
                link = re.search(r"\]\((https?://[^)\s]+)\)", row[2])
                credit = re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", row[2])
                licence = {"licence": row[4].strip(), "link": link[1] if link else None}
                examples.append({"name": row[1], "credit": credit.strip(), **licence})
    return examples
