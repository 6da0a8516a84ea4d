"""A captioner as two ONNX graphs, run by onnxruntime and decoded by the project's own search.

B images · K beams · V vocabulary

`NAME.onnx` turns pixels into the state before the first word, once per image; `NAME.step.onnx`
beside it turns the last words and the state into log-probabilities and the next state, once per
word. The metadata of the first hold the vocabulary and how images are prepared.
"""

import json
import logging
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from backbones import MEAN, STD
from decoder import MAX_SIZES
from decoding import State
from encoder import LEAST_SIZE, MOST_SIZE, TRANSFORM, fingerprint, fold_batch_norm
from masks import NEVER
from model import CaptionModel
from model_file import read_no_repeat_ngram
from util import files
from util.files import UserError
from util.graphs import Graph, needs_packages, open_graph
from vocabulary import END, START, Vocabulary

FORMAT = "image-captioning onnx 1"


# --- running


class OnnxDecoder:
    """`start` and `step` for `decoding`, computed by onnxruntime."""

    def __init__(self, graph: Graph, shared: int, words: int):
        """`shared`: how many tensors of the state belong to an image, not to a beam; `words`: V."""
        self.graph, self.shared, self.words = graph, shared, words

    def start(self, memory: tuple[Tensor, ...]) -> State:
        """Return the state before the first word, which the other graph has computed."""
        return State(memory[: self.shared], memory[self.shared :])

    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """Return log-probabilities (B, K, V) after `token` (B, K), and the next state."""
        log_probs, *beam = self.graph(token, *state.image, *state.beam)
        shapes = [log_probs.shape[:2], *(each.shape[:2] for each in beam)]
        fit = log_probs.shape[-1] == self.words and all(each == token.shape for each in shapes)
        # Not for NaN either; rounding may give a little more than 0.
        if not fit or not log_probs.amax() <= 0.01:
            raise UserError(
                f"{self.graph.path} does not compute log-probabilities of words; export it again"
            )
        return log_probs, State(state.image, tuple(beam))


class OnnxModel(nn.Module):
    """What `inference.Captioner` needs of a model, computed by onnxruntime on the CPU."""

    def __init__(self, path: str | Path):
        """Open `path` and the step graph beside it.

        Raises FileNotFoundError where one is missing, UserError where they are not such graphs, or
        of different models, and where a package of ONNX is not installed.
        """
        super().__init__()
        path = Path(path)
        self.graph, metadata = open_captioner(path)
        if "shared" not in metadata:
            raise UserError(f"{path} holds the graph of a step; name the other file, model.onnx")
        step_graph, step_metadata = open_captioner(step_file(path))
        if metadata.get("model") != step_metadata.get("model"):
            raise UserError(
                f"{path} and {step_file(path)} are of different models; export both again: "
                f"python export.py RUN {path}"
            )
        try:
            self.vocabulary = check_metadata(metadata)
            check_signatures(self.graph, step_graph, metadata)
            self.no_repeat_ngram = read_no_repeat_ngram(metadata)
        except UserError as error:
            raise UserError(
                f"{path} is not a captioner that this version can use: {error}; export it again: "
                f"python export.py RUN {path}"
            ) from error
        self.decoder = OnnxDecoder(step_graph, metadata["shared"], len(self.vocabulary))
        self.config = SimpleNamespace(seq_len=metadata["max_words"])
        # The graph begins with pixels: there is no encoder by itself.
        self.encoders = [(nn.Identity(), metadata["picture"]["size"])]
        # Callers ask a model's parameters for its device.
        self.device_parameter = nn.Parameter(torch.empty(0), requires_grad=False)

    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of the state before the first word, of `images` (B, 3, H, W)."""
        memory = tuple(self.graph(images))
        if any(tensor.shape[0] != len(images) for tensor in memory):
            raise UserError(f"{self.graph.path} mixes images up; export it again")
        return memory

    def attention_maps(self, memory: tuple[Tensor, ...], tokens: Tensor) -> None:
        """Return None: the graphs do not output attention."""


def load_onnx(paths: Sequence[str | Path], device: torch.device | str) -> OnnxModel:
    """Return the captioner of the one file in `paths`; UserError on several, or on a GPU."""
    if len(paths) > 1:
        raise UserError(
            "an ensemble needs PyTorch checkpoints; "
            + " and ".join(str(path) for path in paths if is_onnx(path))
            + " can only be used alone"
        )
    if str(device) not in ("auto", "cpu"):
        raise UserError(f"{paths[0]} runs on the CPU here, not on {device}; use --device cpu")
    return OnnxModel(paths[0])


def is_onnx(path: str | Path) -> bool:
    """Return whether a checkpoint is an ONNX graph, by its name."""
    return Path(path).suffix == ".onnx"


def step_file(path: Path) -> Path:
    """Return the name of the step graph: model.step.onnx beside model.onnx."""
    return path.with_suffix(".step.onnx")


def open_captioner(path: Path) -> tuple[Graph, dict[str, Any]]:
    """Return the graph in `path`, ready to run, and its metadata; UserError if it is not ours."""
    graph = open_graph(path)
    found = graph.metadata.get("format", "none")[:60]
    if found != json.dumps(FORMAT):
        raise UserError(
            f"{path} is not a captioner of this version: its format is {found}, "
            f"expected {json.dumps(FORMAT)}; write it with python export.py RUN {path}"
        )
    try:
        return graph, {key: json.loads(value) for key, value in graph.metadata.items()}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: its metadata are not JSON ({error})") from error


def check_metadata(metadata: dict[str, Any]) -> Vocabulary:
    """Return the vocabulary in the metadata of an image graph, which may be a stranger's.

    Raises UserError for metadata that this version would not write.
    """
    words, picture = metadata.get("vocabulary"), metadata.get("picture")
    specials = len(Vocabulary.SPECIALS)
    if not isinstance(words, list) or tuple(words[:specials]) != Vocabulary.SPECIALS:
        raise UserError("its vocabulary is not a list of words")
    size = picture.get("size") if isinstance(picture, dict) else None
    limits = {
        "shared": (metadata.get("shared"), 0, 2**16),
        "max_words": (metadata.get("max_words"), 1, MAX_SIZES["seq_len"]),
        "size": (size, LEAST_SIZE, MOST_SIZE),
    }
    for name, (value, least, most) in limits.items():
        if type(value) is not int or not least <= value <= most:
            raise UserError(f"its {name} is not a number between {least} and {most}")
    for name, value in describe(size).items():
        if metadata.get(name) != value:
            raise UserError(f"its {name} is not {value}")
    return Vocabulary.from_file(words[specials:], metadata)


def check_signatures(image: Graph, step: Graph, metadata: dict[str, Any]) -> None:
    """Raise UserError where inputs and outputs are not those that `write_onnx` writes."""
    shared, size = metadata["shared"], metadata["picture"]["size"]
    beam = [f"beam.{number}" for number in range(len(image.outputs) - shared)]
    state = [*(f"image.{number}" for number in range(shared)), *beam]
    if not beam:
        raise UserError("it has no state of a beam")
    for name, found, expected in (
        ("inputs", image.inputs, ["images"]),
        ("outputs", image.outputs, state),
        ("inputs of a step", step.inputs, ["token", *state]),
        ("outputs of a step", step.outputs, ["log_probs", *(f"next_{each}" for each in beam)]),
    ):
        if [each.name for each in found] != expected:
            raise UserError(f"its {name} are not {', '.join(expected)}")
    for place in (*image.inputs, *image.outputs, *step.inputs[1:], *step.outputs):
        # A beam's state has the axes of images and beams, at least.
        if place.type != "tensor(float)" or len(place.shape or ()) < 2:
            raise UserError(f"its {place.name} is not a tensor of numbers for each image")
    if step.inputs[0].type != "tensor(int64)":
        raise UserError("its token is not a whole number")
    words = len(metadata["vocabulary"])
    for place, sizes in (
        (image.inputs[0], (None, 3, size, size)),
        (step.inputs[0], (None, None)),
        (step.outputs[0], (None, None, words)),
    ):
        fixed = [each if isinstance(each, int) else None for each in place.shape]
        if len(fixed) != len(sizes) or any(
            own not in (None, wanted) for own, wanted in zip(fixed, sizes, strict=True)
        ):
            raise UserError(f"its {place.name} has another shape than its metadata say")


# --- writing


class ImageGraph(nn.Module):
    """Pixels (B, 3, H, W) → the state before the first word: the image's tensors, the beams'."""

    def __init__(self, model: CaptionModel):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        state = self.model.decoder.start(self.model.encode(images))
        return (*state.image, *state.beam)


class StepGraph(nn.Module):
    """The last words (B, K) and the state → log-probabilities (B, K, V) and the beams' tensors."""

    def __init__(self, decoder: nn.Module, shared: int):
        super().__init__()
        self.decoder, self.shared = decoder, shared

    def forward(self, token: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        before = State(tuple(state[: self.shared]), tuple(state[self.shared :]))
        log_probs, after = self.decoder.step(token, before)
        return (log_probs, *after.beam)


@torch.no_grad()
def write_onnx(model: CaptionModel, output: Path, training_info: dict[str, Any]) -> list[Path]:
    """Write the model as two graphs, for any number of images and beams; return the files.

    `training_info` is not written: the graphs are for other programs.
    """
    with needs_packages():
        import onnx  # noqa: F401 (torch would import both later, inside its export)
        import onnxscript  # noqa: F401
    metadata = {"format": FORMAT, "model": fingerprint(model)}  # equal in both files
    model.encoder = fold_batch_norm(model.encoder)  # smaller; and torch 2.6 can't write BatchNorm
    images, token = torch.zeros(2, 3, model.img_size, model.img_size), torch.full((2, 3), START)
    start = model.decoder.start(model.encode(images))
    # Torch takes a length of 0 or 1 for a constant, so the example state is two words later.
    one = model.decoder.step(token, start.reorder(torch.zeros_like(token)))[1]
    two = model.decoder.step(token, one)[1]
    image = [f"image.{number}" for number in range(len(start.image))]
    beam = [f"beam.{number}" for number in range(len(start.beam))]
    # Only torch 2.6 asks for bounds: the graphs have none.
    batch, beams = (torch.export.Dim(axis, max=2**16) for axis in ("images", "beams"))
    words = torch.export.Dim("words", max=model.config.seq_len)
    shapes = [{0: batch} for _ in two.image]
    for old, new in zip(one.beam, two.beam, strict=True):
        growing = {axis: words for axis in range(old.dim()) if old.shape[axis] != new.shape[axis]}
        shapes.append({0: batch, 1: beams, **growing})
    image_graph = trace(ImageGraph(model), (images,), ({0: batch},), ["images"], [*image, *beam])
    step_graph = trace(
        StepGraph(model.decoder, len(start.image)),
        (token, (*two.image, *two.beam)),
        ({0: batch, 1: beams}, tuple(shapes)),
        ["token", *image, *beam],
        ["log_probs", *(f"next_{name}" for name in beam)],
    )
    preparation = {
        "vocabulary": model.vocabulary.words,
        **model.vocabulary.to_entries(),
        "max_words": model.config.seq_len,
        **describe(model.img_size),
        "shared": len(start.image),
    }
    if model.no_repeat_ngram:
        preparation["decoding"] = {"no_repeat_ngram": model.no_repeat_ngram}
    write_graph(output, image_graph, metadata | preparation)
    write_graph(step_file(output), step_graph, metadata)
    return [output, step_file(output)]


def describe(img_size: int) -> dict[str, Any]:
    """Return the metadata that are the same for all models, but for the size of their images."""
    transform = {"transform": TRANSFORM, "mean": list(MEAN), "std": list(STD)}
    return {
        "start": START,
        "end": END,
        "never": list(NEVER),
        "picture": {"size": img_size, **transform},
    }


def trace(
    module: nn.Module, example: tuple, shapes: tuple, inputs: list[str], outputs: list[str]
) -> Any:
    """Return the ONNX graph (a protocol buffer) of what `module` computes for `example`.

    `shapes` says which axes may have other lengths. Raises UserError where this version of torch
    can't write it.
    """
    logger = logging.getLogger("torch")
    level = logger.level
    with warnings.catch_warnings(), redirect_stdout(StringIO()):  # notes for torch's developers
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        try:
            # Traced here: torch.onnx would fall back to ways that may make the sizes constants.
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
            logger.setLevel(level)


def write_graph(path: Path, graph: Any, metadata: dict[str, Any]) -> None:
    """Write a graph with `metadata`, each value as JSON."""
    for key, value in metadata.items():
        graph.metadata_props.add(key=key, value=json.dumps(value, ensure_ascii=False))
    files.write_bytes(path, graph.SerializeToString())
