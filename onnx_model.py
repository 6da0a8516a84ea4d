"""A captioner as two ONNX graphs, run by onnxruntime and decoded by the project's own search.

B images · K beams · V vocabulary · S image positions

`NAME.onnx` turns pixels into the state before the first word, once an image; `NAME.step.onnx`
beside it turns the last words and the state into log-probabilities and the next state, once a
word. The first one's metadata hold the vocabulary and how pictures are prepared.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dataset import Vocabulary
from decoding import State

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


class OnnxSteps:
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
            raise ValueError(f"{path} holds the graph of a step; name the other file, model.onnx")
        steps, step_about = open_graph(step_file(path))
        if about["model"] != step_about["model"]:
            raise ValueError(
                f"{path} and {step_file(path)} are of different models; export both anew: "
                f"python export.py RUN {path}"
            )
        self.decoder = OnnxSteps(steps, about["shared"])
        self.vocabulary = Vocabulary(about["vocabulary"][len(Vocabulary.SPECIALS) :])
        self.config = SimpleNamespace(seq_len=about["max_words"])
        self.views = [(self, about["picture"]["size"])]
        # Where pictures go, as callers ask: nothing is learned here.
        self.place = nn.Parameter(torch.empty(0), requires_grad=False)

    def remember(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the state before the first word of `images` (B, 3, H, W), a tensor a part."""
        return tuple(self.first(images))

    def look(self, memory: tuple[Tensor, ...], tokens: Tensor) -> None:
        """Return None: the graphs keep no attention."""


def load_onnx(paths: Sequence[str | Path], device: torch.device | str) -> OnnxModel:
    """Return the captioner of the one file in `paths`; ValueError on several, or on a GPU."""
    if len(paths) > 1:
        raise ValueError(
            "an ensemble is of PyTorch checkpoints; "
            + " and ".join(str(path) for path in paths if is_onnx(path))
            + " can only be used alone"
        )
    if str(device) not in ("auto", "cpu"):
        raise ValueError(f"{paths[0]} runs on the CPU here, not on {device}; use --device cpu")
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
        raise ValueError(f"{path} is not a graph that onnxruntime can run ({reason})") from error
    stored = session.get_modelmeta().custom_metadata_map
    if stored.get("format") != json.dumps(FORMAT):
        raise ValueError(
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
        raise ValueError(
            f"ONNX needs {error.name}: pip install -r requirements-onnx.txt"
        ) from error
