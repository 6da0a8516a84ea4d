"""Run the notebooks and keep what they print: `python notebooks/execute.py [NAME ...]`.

Their outputs are committed, so that they can be read on a web page. Progress bars and warnings are
left out, and large pictures become small JPEGs. Needs requirements-dev.txt.
"""

import base64
import io
import sys
from pathlib import Path

import nbclient
import nbformat
from PIL import Image

FOLDER = Path(__file__).resolve().parent
RUN = FOLDER.parent / "runs/shapes-notebook"  # where train_image_capgen.ipynb trains
MAX_PNG, MAX_WIDTH, QUALITY = 60_000, 1000, 85  # bytes, pixels, of 100


def execute(path: Path, parameters: str = "", timeout: int = 1800) -> nbformat.NotebookNode:
    """Return the notebook with the outputs of a run from start to end.

    `parameters` is code that runs after the cell tagged "parameters". Raises
    nbclient.exceptions.CellExecutionError where a cell fails.
    """
    book = nbformat.read(path, as_version=4)
    (cell,) = (each for each in book.cells if "parameters" in each.metadata.get("tags", ()))
    source = cell.source
    cell.source = f"{source}\n{parameters}"
    where = {"metadata": {"path": str(FOLDER)}}  # as it is opened by hand
    client = nbclient.NotebookClient(
        book, timeout=timeout, kernel_name="python3", resources=where, record_timing=False
    )
    client.execute()
    cell.source = source
    return book


def clean(book: nbformat.NotebookNode) -> None:
    """Leave out stderr and widgets, and shrink pictures."""
    for cell in book.cells:
        if cell.cell_type != "code":
            continue
        cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
        for output in cell.outputs:
            data = output.get("data", {})
            for kind in [kind for kind in data if "widget" in kind]:
                del data[kind]
            if "image/png" in data:
                data.pop("image/jpeg", None)
                shrink(output)
        cell.outputs = [each for each in cell.outputs if each.get("data", True)]
    book.metadata.pop("widgets", None)
    book.metadata.language_info = {"name": "python"}


def shrink(output: nbformat.NotebookNode) -> None:
    """Turn an output's PNG into a JPEG of at most MAX_WIDTH pixels if it is large."""
    png = base64.b64decode(output.data["image/png"])
    if len(png) <= MAX_PNG:
        return
    image = Image.open(io.BytesIO(png)).convert("RGB")
    if image.width > MAX_WIDTH:
        image = image.resize((MAX_WIDTH, round(image.height * MAX_WIDTH / image.width)))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=QUALITY)
    del output.data["image/png"]
    output.get("metadata", {}).pop("image/png", None)  # its width, which is no longer right
    output.data["image/jpeg"] = base64.b64encode(stream.getvalue()).decode()


def main(names: list[str]) -> None:
    """Run the named notebooks, or all of them, and write them with their outputs."""
    if RUN.exists():
        sys.exit(f"{RUN} exists: rename it, or the notebook would show how that run is continued")
    for path in sorted(FOLDER.glob("*.ipynb")):
        if not names or path.stem in names:
            book = execute(path)
            clean(book)
            nbformat.write(book, path)
            print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
