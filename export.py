"""A model in another form: a small file to share (`python export.py RUN model.safetensors`)."""

from dataclasses import dataclass
from pathlib import Path

import files
from model import CaptionModel, checkpoint_file, read_checkpoint


@dataclass(frozen=True)
class Config:
    """The flags of this script."""

    checkpoint: Path
    """A model file, or the folder of a run."""
    output: Path
    """File to write: .safetensors with matrices in float16, half the size of what training saves;
    every script loads it like any other."""


def export(checkpoint: Path, output: Path) -> None:
    """Write the model of a checkpoint to `output`, in the form that its name ends in.

    Raises ValueError on a form that is not known.
    """
    if output.suffix != ".safetensors":
        raise ValueError(f"{output} names no form that is known; end it in .safetensors")
    about, _ = read_checkpoint(checkpoint_file(checkpoint))
    story = {key: about[key] for key in ("scores", "training") if key in about}
    CaptionModel.load(checkpoint).save(output, half=True, **story)


def main(argv: list[str] | None = None) -> None:
    """Export a model and say how large its file is."""
    import tyro

    flags = tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(Config)
    config = files.parse(flags, argv, program="export.py", description="Write a model to share.")
    files.check_writable(config.output)
    export(config.checkpoint, config.output)
    print(f"{config.output}: {config.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    files.run(main)
