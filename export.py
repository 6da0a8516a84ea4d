"""A model in another form: a small file to share (`python export.py RUN model.safetensors`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import files
from model import CaptionModel, checkpoint_file, mean_model, read_checkpoint


@dataclass(frozen=True)
class Config:
    """The flags of this script."""

    checkpoint: Path
    """A model file, or the folder of a run."""
    output: Path
    """File to write: .safetensors with matrices in float16, half the size of what training saves;
    every script loads it like any other."""
    average: tuple[Path, ...] = ()
    """More checkpoints, of runs that began with the same weights: the mean of all is written (name
    one twice for twice its share)."""


def export(checkpoint: Path, output: Path, average: Sequence[Path] = ()) -> None:
    """Write the model of a checkpoint to `output`, in the form that its name ends in.

    With `average` it is the mean of all the checkpoints. Raises ValueError on an unknown form.
    """
    if output.suffix != ".safetensors":
        raise ValueError(f"{output} names no form that is known; end it in .safetensors")
    about, _ = read_checkpoint(checkpoint_file(checkpoint))
    story = {key: about[key] for key in ("scores", "training") if key in about}
    if average:  # the scores are not the mean's
        stories = [read_checkpoint(checkpoint_file(each))[0].get("training") for each in average]
        story = {"training": {"mean_of": [story.get("training"), *stories]}}
    model = mean_model([CaptionModel.load(each) for each in (checkpoint, *average)])
    model.save(output, half=True, **story)


def main(argv: list[str] | None = None) -> None:
    """Export a model and say how large its file is."""
    import tyro

    flags = tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(Config)
    config = files.parse(flags, argv, program="export.py", description="Write a model to share.")
    files.check_writable(config.output)
    export(config.checkpoint, config.output, config.average)
    print(f"{config.output}: {config.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    files.run(main)
