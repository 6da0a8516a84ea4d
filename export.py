"""A model in another form: a small file to share (`python export.py RUN model.safetensors`), or
ONNX graphs for other programs (`python export.py RUN model.onnx`).

B images · K beams · V vocabulary
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model import CaptionModel, checkpoint_file, mean_model, read_checkpoint
from onnx_model import write_onnx
from util import files
from util.files import UserError


@dataclass(frozen=True)
class Config:
    """The flags of this script."""

    checkpoint: Path
    """A model file, or the folder of a run."""
    output: Path
    """File to write: .safetensors with matrices in float16, half the size of what training saves;
    every script loads it like any other. Or .onnx, the graph from pixels to the state before the
    first word; the graph of a step goes beside it, as .step.onnx."""
    average: tuple[Path, ...] = ()
    """More checkpoints, of runs that began with the same weights: the mean of all is written (name
    one twice for twice its share)."""


def export(checkpoint: Path, output: Path, average: Sequence[Path] = ()) -> list[Path]:
    """Write the model of a checkpoint in the form that `output` ends in; return the files.

    With `average` it is the mean of all the checkpoints. Raises ValueError on an unknown form.
    """
    if output.suffix not in FORMS:
        raise UserError(f"{output} names no form that is known; end it in {' or '.join(FORMS)}")
    about, _ = read_checkpoint(checkpoint_file(checkpoint))
    story = {key: about[key] for key in ("scores", "training") if key in about}
    if average:  # the scores are not the mean's
        stories = [read_checkpoint(checkpoint_file(each))[0].get("training") for each in average]
        story = {"training": {"mean_of": [story.get("training"), *stories]}}
    model = mean_model([CaptionModel.load(each) for each in (checkpoint, *average)])
    return FORMS[output.suffix](model, output, story)


def write_small(model: CaptionModel, output: Path, story: dict[str, Any]) -> list[Path]:
    """Write the model with its matrices in float16, and its `story`: scores, how it was trained."""
    model.save(output, half=True, **story)
    return [output]


# --- ONNX


FORMS: dict[str, Callable[[CaptionModel, Path, dict[str, Any]], list[Path]]] = {
    ".safetensors": write_small,
    ".onnx": write_onnx,
}


def main(argv: list[str] | None = None) -> None:
    """Export a model and say how large its files are."""
    import tyro

    flags = tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(Config)
    config = files.parse(flags, argv, program="export.py", description="Write a model to share.")
    files.check_writable(config.output)
    for path in export(config.checkpoint, config.output, config.average):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    files.run(main)
