"""Write a model in another form: a small file to share (`python export.py RUN model.safetensors`),
or ONNX graphs for other programs (`python export.py RUN model.onnx`).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model import CaptionModel, mean_model
from model_file import checkpoint_file, read_metadata, read_no_repeat_ngram
from onnx_model import FORMAT, is_onnx, step_file, write_onnx
from util import files, program
from util.files import UserError


@dataclass(frozen=True)
class Config:
    """The flags of this script."""

    checkpoint: Path
    """A model file, or the folder of a run."""
    output: Path
    """File to write. A .safetensors file has its matrices in float16: it is half as large as what
    train.py saves (see also --int8), and every script loads it. A .onnx file holds the graph from
    pixels to the state before the first word; the graph of one step is written beside it, as
    .step.onnx."""
    average: tuple[Path, ...] = ()
    """More checkpoints, of runs that began with the same weights: the mean of all is written (name
    one twice to count it twice)."""
    int8: bool = False
    """Store the CNN's large matrices of a .safetensors file as int8, a scale per output channel:
    three fifths of the size for ResNet-50. A few captions change; earlier versions of this project
    do not read the file."""
    no_repeat_ngram: int | None = None
    """What captions of the model keep to where --no-repeat-ngram is not given with them: no
    sequence of this many words occurs twice (default: as the checkpoint has it, else off)."""


def write_half(
    model: CaptionModel, output: Path, training_info: dict[str, Any], *, int8: bool = False
) -> list[Path]:
    """Write a model file with matrices in float16, or with `int8` the CNN's large ones in int8."""
    model.save(output, half=True, int8=int8, **training_info)
    return [output]


FORMS: dict[str, Callable[[CaptionModel, Path, dict[str, Any]], list[Path]]] = {
    ".safetensors": write_half,
    ".onnx": write_onnx,
}


def is_exported(path: Path) -> bool:
    """Return whether a file is a model file or one of a model's graphs; UserError if neither."""
    return FORMAT.encode() in path.read_bytes() if is_onnx(path) else bool(read_metadata(path))


def export(
    checkpoint: Path,
    output: Path,
    average: Sequence[Path] = (),
    *,
    int8: bool = False,
    no_repeat_ngram: int | None = None,
) -> list[Path]:
    """Write the model of a checkpoint in the form that the suffix of `output` names.

    With `average` it is the mean of all the checkpoints; with `int8` the CNN's large matrices of a
    .safetensors file are in int8; `no_repeat_ngram` becomes the default of the model's captions.
    Returns the files written; raises UserError where the suffix is
    not known, or has no int8, or a file would be lost that is not such a model.
    """
    if output.suffix not in FORMS:
        raise UserError(f"{output} has no known suffix; end it in {' or '.join(FORMS)}")
    if int8 and output.suffix != ".safetensors":
        raise UserError(f"--int8 is for .safetensors files, not for {output}; leave it out")
    if no_repeat_ngram is not None:
        read_no_repeat_ngram({"decoding": {"no_repeat_ngram": no_repeat_ngram}})
    checkpoints = [checkpoint, *average]
    written = [output, step_file(output)] if output.suffix == ".onnx" else [output]
    for path in written:
        files.check_output(path, inputs=map(checkpoint_file, checkpoints))
        files.check_replaceable(path, is_exported, "an exported model")
    if output.name == "best.safetensors" and output.exists():
        raise UserError(f"{output} is the model of a run, which would be lost; name another file")
    headers = [read_metadata(each) for each in checkpoints]
    if average:  # no scores: they are of the single models
        training_info = {"training": {"mean_of": [each.get("training") for each in headers]}}
    else:
        training_info = {
            key: headers[0][key] for key in ("scores", "training") if key in headers[0]
        }
    model = mean_model([CaptionModel.load(each) for each in checkpoints])
    if no_repeat_ngram is not None:
        model.no_repeat_ngram = no_repeat_ngram
    write = functools.partial(write_half, int8=True) if int8 else FORMS[output.suffix]
    return write(model, output, training_info)


def main(argv: list[str] | None = None) -> None:
    """Export a model and print the sizes of its files."""
    import tyro

    flags = tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(Config)
    config = program.parse(flags, argv, program="export.py", description="Write a model to share.")
    how = {"int8": config.int8, "no_repeat_ngram": config.no_repeat_ngram}
    for path in export(config.checkpoint, config.output, config.average, **how):
        print(f"{program.printable(path)}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    program.run(main)
