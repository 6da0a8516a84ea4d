"""The notebooks run from start to end, and are kept without what they print."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Enough to run every cell, not to learn anything.
SMALL = "--epochs 1 --batch-size 8 --d-model 16 --n-head 2 --n-decode 1 --fc-dim 32 --workers 0"


def read(notebook: Path) -> dict:
    return json.loads(notebook.read_text(encoding="utf-8"))


def named(path: Path) -> str:
    return path.stem


def test_both_notebooks_are_there():
    assert [path.stem for path in NOTEBOOKS] == ["explore_captions", "train_image_capgen"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=named)
def test_a_notebook_is_kept_without_outputs(notebook):
    cells = [cell for cell in read(notebook)["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=named)
def test_a_notebooks_badge_opens_that_notebook(notebook):
    address = (
        "https://colab.research.google.com/github/OWNER/image-captioning/blob/main/notebooks/"
        f"{notebook.name}"
    )
    assert address in "".join(read(notebook)["cells"][0]["source"])
    assert address in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=named)
def test_a_notebook_runs_from_start_to_end(notebook, drawn, tmp_path):
    reason = "nbclient and ipykernel are not installed (requirements-dev.txt)"
    nbformat = pytest.importorskip("nbformat", reason=reason)
    nbclient = pytest.importorskip("nbclient", reason=reason)
    pytest.importorskip("ipykernel", reason=reason)

    book = nbformat.read(notebook, as_version=4)
    (place,) = (
        number
        for number, cell in enumerate(book.cells)
        if "parameters" in cell.metadata.get("tags", [])
    )
    settings = f"DATA, RUN, MORE = Path({str(drawn)!r}), Path({str(tmp_path / 'run')!r}), {SMALL!r}"
    book.cells[place].source += f"\n{settings}"
    where = {"metadata": {"path": str(notebook.parent)}}  # as it is opened by hand
    nbclient.NotebookClient(book, timeout=600, kernel_name="python3", resources=where).execute()

    outputs = [each for cell in book.cells for each in cell.get("outputs", [])]
    printed = "".join(each.get("text", "") for each in outputs)
    # %run shows a script's error and goes on.
    assert "error:" not in printed and "Traceback" not in printed and "SystemExit" not in printed
    assert "CIDEr" in printed
    assert sum("image/png" in each.get("data", {}) for each in outputs) >= 5
