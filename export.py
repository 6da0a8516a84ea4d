"""A model in another form: a small file to share (`python export.py RUN model.safetensors`), or
ONNX graphs for other programs (`python export.py RUN model.onnx`).

B images · K beams · V vocabulary
"""

import json
import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import files
from decoding import END, NEVER, START, State
from encoder import MEAN, STD, TRANSFORM, fingerprint, folded
from model import CaptionModel, checkpoint_file, mean_model, read_checkpoint
from onnx_model import FORMAT, optional, step_file


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
        raise ValueError(f"{output} names no form that is known; end it in {' or '.join(FORMS)}")
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


class First(nn.Module):
    """Pixels (B, 3, H, W) → the state before the first word: the image's tensors, the beam's."""

    def __init__(self, model: CaptionModel):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        state = self.model.decoder.start(self.model.remember(images))
        return (*state.image, *state.beam)


class Step(nn.Module):
    """The last words (B, K) and the state → log-probabilities (B, K, V) and the beam's tensors."""

    def __init__(self, decoder: nn.Module, shared: int):
        super().__init__()
        self.decoder, self.shared = decoder, shared

    def forward(self, token: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        before = State(tuple(state[: self.shared]), tuple(state[self.shared :]))
        log_probs, after = self.decoder.step(token, before)
        return (log_probs, *after.beam)


@torch.no_grad()
def write_onnx(model: CaptionModel, output: Path, story: dict[str, Any]) -> list[Path]:
    """Write the model as two graphs, for any number of images and beams."""
    with optional():
        import onnx  # noqa: F401 (torch imports both, when it is late)
        import onnxscript  # noqa: F401
    about = {"format": FORMAT, "model": fingerprint(model)}  # the same in files that go together
    model.encoder = folded(model.encoder)  # smaller; and torch 2.6 can't write BatchNorm
    images, token = torch.zeros(2, 3, model.img_size, model.img_size), torch.full((2, 3), START)
    state = model.decoder.start(model.remember(images))
    # Torch takes a length of 0 or 1 for one that never changes, so the example is two words on.
    one = model.decoder.step(token, state.reorder(torch.zeros_like(token)))[1]
    two = model.decoder.step(token, one)[1]
    image = [f"image.{number}" for number in range(len(state.image))]
    beam = [f"beam.{number}" for number in range(len(state.beam))]
    # Bounds only because torch 2.6 asks for them: the graphs know none.
    batch, beams = (torch.export.Dim(axis, max=2**16) for axis in ("images", "beams"))
    said = torch.export.Dim("words", max=model.config.seq_len)
    shapes = [{0: batch} for _ in two.image]
    for old, new in zip(one.beam, two.beam, strict=True):
        grown = {axis: said for axis in range(old.dim()) if old.shape[axis] != new.shape[axis]}
        shapes.append({0: batch, 1: beams, **grown})
    first = traced(First(model), (images,), ({0: batch},), ["images"], [*image, *beam])
    step = traced(
        Step(model.decoder, len(state.image)),
        (token, (*two.image, *two.beam)),
        ({0: batch, 1: beams}, tuple(shapes)),
        ["token", *image, *beam],
        ["log_probs", *(f"next_{name}" for name in beam)],
    )
    write_graph(output, first, {**about, **described(model), "shared": len(state.image)})
    write_graph(step_file(output), step, about)
    return [output, step_file(output)]


def traced(
    module: nn.Module, example: tuple, shapes: tuple, inputs: list[str], outputs: list[str]
) -> Any:
    """Return the ONNX graph (a protocol buffer) of what `module` does with `example`.

    Raises ValueError where this version of torch can't write it.
    """
    log = logging.getLogger("torch")
    level = log.level
    with warnings.catch_warnings(), redirect_stdout(StringIO()):  # torch's notes to its makers
        warnings.simplefilter("ignore")
        log.setLevel(logging.CRITICAL)
        try:
            # Traced here: torch.onnx would try other ways, which may fix the sizes to these.
            program = torch.export.export(
                module.eval(), example, dynamic_shapes=shapes, strict=False
            )
            return torch.onnx.export(
                program, dynamo=True, input_names=inputs, output_names=outputs, verbose=False
            ).model_proto
        except Exception as error:  # of many classes
            reason = " ".join(str(error.__cause__ or error).split())[:200]
            raise ValueError(
                f"torch {torch.__version__} can't write this model as ONNX, a newer one may "
                f"({reason})"
            ) from error
        finally:
            log.setLevel(level)


def described(model: CaptionModel) -> dict[str, Any]:
    """Return what a program needs to know beside the graphs: words, limits, the picture's form."""
    return {
        "vocabulary": model.vocabulary.words,
        "start": START,
        "end": END,
        "never": NEVER,
        "max_words": model.config.seq_len,
        "picture": {
            "size": model.img_size,
            "transform": TRANSFORM,
            "mean": MEAN,
            "std": STD,
        },
    }


def write_graph(path: Path, graph: Any, about: dict[str, Any]) -> None:
    """Write a graph with `about` in its metadata, each value as JSON."""
    for key, value in about.items():
        graph.metadata_props.add(key=key, value=json.dumps(value, ensure_ascii=False))
    files.write_bytes(path, graph.SerializeToString())


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
