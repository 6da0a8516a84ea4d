"""A captioner as two ONNX graphs, run by onnxruntime and decoded by the project's own search.

B images · K beams · V vocabulary · S image positions

`NAME.onnx` turns pixels into the state before the first word, once an image; `NAME.step.onnx`
beside it turns the last words and the state into log-probabilities and the next state, once a
word. The first one's metadata hold the vocabulary and how pictures are prepared.
"""

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from decoding import NEVER, State
from encoder import MEAN, STD, TRANSFORM, fingerprint, fold_batch_norm
from model import CaptionModel
from util import files
from util.files import UserError
from vocabulary import END, START, Vocabulary

FORMAT = "image-captioning onnx 1"


class Graph(NamedTuple):
    """A graph at hand: onnxruntime's session, and the names of what goes in and comes out."""

    session: Any
    inputs: list[str]
    outputs: list[str]

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """Return the graph's outputs for its inputs, in their order."""
        arrays = (np.ascontiguousarray(tensor.numpy()) for tensor in tensors)
        fed = dict(zip(self.inputs, arrays, strict=True))
        return [torch.from_numpy(array) for array in self.session.run(self.outputs, fed)]


class OnnxDecoder:
    """The language side as decoding wants it: `start` and `step`, computed by onnxruntime."""

    def __init__(self, graph: Graph, shared: int):
        """`shared`: how many of the state's tensors belong to an image and not to a beam."""
        self.graph, self.shared = graph, shared

    def start(self, memory: tuple[Tensor, ...]) -> State:
        """Return the state before the first word, which the other graph has computed."""
        return State(memory[: self.shared], memory[self.shared :])

    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """Return log-probabilities (B, K, V) after `token` (B, K), and the next state."""
        log_probs, *beam = self.graph(token, *state.image, *state.beam)
        return log_probs, State(state.image, tuple(beam))


class OnnxModel(nn.Module):
    """What `inference.Captioner` wants of a model, computed by onnxruntime on the CPU."""

    def __init__(self, path: str | Path):
        """Read `path` and the graph of a step beside it.

        Raises FileNotFoundError where one is missing, ValueError where they are not such graphs,
        or not of one model, and where onnxruntime is not installed.
        """
        super().__init__()
        path = Path(path)
        self.first, about = open_graph(path)
        if "shared" not in about:
            raise UserError(f"{path} holds the graph of a step; name the other file, model.onnx")
        steps, step_about = open_graph(step_file(path))
        if about["model"] != step_about["model"]:
            raise UserError(
                f"{path} and {step_file(path)} are of different models; export both anew: "
                f"python export.py RUN {path}"
            )
        self.decoder = OnnxDecoder(steps, about["shared"])
        self.vocabulary = Vocabulary(about["vocabulary"][len(Vocabulary.SPECIALS) :])
        self.config = SimpleNamespace(seq_len=about["max_words"])
        self.encoders = [(self, about["picture"]["size"])]
        # Where pictures go, as callers ask: nothing is learned here.
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)

    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the state before the first word of `images` (B, 3, H, W), a tensor a part."""
        return tuple(self.first(images))

    def attention_maps(self, memory: tuple[Tensor, ...], tokens: Tensor) -> None:
        """Return None: the graphs keep no attention."""


def load_onnx(paths: Sequence[str | Path], device: torch.device | str) -> OnnxModel:
    """Return the captioner of the one file in `paths`; ValueError on several, or on a GPU."""
    if len(paths) > 1:
        raise UserError(
            "an ensemble is of PyTorch checkpoints; "
            + " and ".join(str(path) for path in paths if is_onnx(path))
            + " can only be used alone"
        )
    if str(device) not in ("auto", "cpu"):
        raise UserError(f"{paths[0]} runs on the CPU here, not on {device}; use --device cpu")
    return OnnxModel(paths[0])


def is_onnx(path: str | Path) -> bool:
    """Tell by its name whether a checkpoint is an ONNX graph."""
    return Path(path).suffix == ".onnx"


def step_file(path: Path) -> Path:
    """Return the name of the step's graph: model.step.onnx beside model.onnx."""
    return path.with_suffix(".step.onnx")


def open_graph(path: Path) -> tuple[Graph, dict[str, Any]]:
    """Return the graph in `path` and what its metadata say."""
    with optional():
        import onnxruntime as runtime
    if not path.is_file():
        raise FileNotFoundError(
            f"no graph at {path}: a captioner in ONNX is two files, model.onnx and "
            "model.step.onnx; write them with python export.py RUN model.onnx"
        )
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common class
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} is not a graph that onnxruntime can run ({reason})") from error
    stored = session.get_modelmeta().custom_metadata_map
    if stored.get("format") != json.dumps(FORMAT):
        raise UserError(
            f"{path} is not a captioner of this version: its format is {stored.get('format')}, "
            f"expected {json.dumps(FORMAT)}; write it with python export.py RUN {path}"
        )
    names = (
        [item.name for item in items] for items in (session.get_inputs(), session.get_outputs())
    )
    return Graph(session, *names), {key: json.loads(value) for key, value in stored.items()}


@contextlib.contextmanager
def optional() -> Iterator[None]:
    """Turn the want of a library that only ONNX needs into a line that says what to install."""
    try:
        yield
    except ImportError as error:
        raise UserError(f"ONNX needs {error.name}: pip install -r requirements-onnx.txt") from error


class First(nn.Module):
    """Pixels (B, 3, H, W) → the state before the first word: the image's tensors, the beam's."""

    def __init__(self, model: CaptionModel):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        state = self.model.decoder.start(self.model.encode(images))
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
    model.encoder = fold_batch_norm(model.encoder)  # smaller; and torch 2.6 can't write BatchNorm
    images, token = torch.zeros(2, 3, model.img_size, model.img_size), torch.full((2, 3), START)
    state = model.decoder.start(model.encode(images))
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
            raise UserError(
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
