"""The rows of the comparison with other programs: decoding, the CNN, reading images.

B images · S image positions · C backbone channels · D model width · T words · V vocabulary

Each checks that both programs have the same results.
"""

import importlib.util
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from machine import Machine, Seconds, check_equal
from PIL import Image
from rows import to_lists
from synthetic import features, write_jpegs
from torch import Tensor

from backbones import MEAN, STD
from decoder import Transformer
from decoding import Decoded, beam_search, greedy, sample
from encoder import fold_batch_norm, image_transform, pick_dtype, prepare_encoder
from masks import NEVER
from model import CaptionModel
from onnx_model import trace
from util.files import UserError
from util.images import read_image
from vocabulary import END, PAD, START

BEAM = {"beam_size": 5, "length_penalty": 0.7}
PHOTO = (4000, 3000)  # pixels of a phone's photo


def is_installed(package: str) -> bool:
    """Return whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


class Bench:
    """What rows share: the machine, the model, how many images, a folder for files."""

    def __init__(
        self, machine: Machine, checkpoint: Path, images: int, batch_size: int, folder: Path
    ):
        """`images` are captioned in batches of `batch_size`; only decoding is on a GPU."""
        self.machine, self.folder = machine, folder
        self.cpu = Machine(torch.device("cpu"), machine.repeats)
        self.images, self.batch_size = images, batch_size
        self.model = CaptionModel.load(checkpoint).eval()
        if not isinstance(self.model.decoder, Transformer):
            raise UserError(f"the decoder of {checkpoint} is not a transformer")
        self.decoder = self.model.decoder.to(self.machine.device)
        self.max_words = self.model.config.seq_len

    @cached_property
    def gpt2(self) -> Any:
        """The decoder as a model of transformers."""
        return build_gpt2(self.decoder).to(self.machine.device)

    @cached_property
    def memory(self) -> Tensor:
        """The encoded images (B, S, D)."""
        sizes = self.decoder.positions, self.decoder.project.in_features
        with torch.inference_mode():
            inputs = features(self.images, *sizes).float().to(self.machine.device)
            return self.decoder.encode(inputs)


class Row(NamedTuple):
    """A row of the table: seconds per image of the peer and of this project."""

    name: str
    peer: str
    theirs: Seconds
    ours: Seconds

    def to_dict(self) -> dict[str, Any]:
        """Return the row for JSON: times in ms per image, the ratios are theirs / ours."""
        row: dict[str, Any] = {"name": self.name, "peer": self.peer}
        for clock in Seconds._fields:
            theirs, ours = (1000 * getattr(side, clock) for side in (self.theirs, self.ours))
            row[clock] = {"peer": theirs, "ours": ours, "ratio": theirs / ours}
        return row


def make_row(name: str, peer: str, theirs: Seconds, ours: Seconds, images: int) -> Row:
    """Return a row of seconds for `images` images."""
    return Row(name, peer, *(Seconds(*(each / images for each in side)) for side in (theirs, ours)))


# ---- decoding --------------------------------------------------------------------------------


@torch.no_grad()
def build_gpt2(ours: Transformer) -> Any:
    """Return transformers' GPT-2 with cross-attention and the weights of `ours`.

    The two compute the same: both are pre-norm, with learned positions.
    """
    from transformers import GPT2Config, GPT2LMHeadModel, logging

    logging.set_verbosity_error()  # no advice to pass an attention mask, which it then ignores
    words, width = ours.embedding.weight.shape
    config = GPT2Config(
        vocab_size=words, n_positions=len(ours.word_position), n_embd=width,
        n_layer=len(ours.blocks), n_head=ours.heads, n_inner=ours.blocks[0].mlp[0].out_features,
        activation_function="gelu", layer_norm_epsilon=ours.norm.eps, add_cross_attention=True,
        tie_word_embeddings=ours.untied is None,
        bos_token_id=START, eos_token_id=END, pad_token_id=PAD,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    body = model.transformer
    body.wte.load_state_dict(ours.embedding.state_dict())
    model.lm_head.weight.copy_(ours.output_weight)
    body.wpe.weight.copy_(ours.word_position)
    body.ln_f.load_state_dict(ours.norm.state_dict())
    for block, own in zip(body.h, ours.blocks, strict=True):
        for norm, from_norm in (
            (block.ln_1, own.norm_self),
            (block.ln_cross_attn, own.norm_cross),
            (block.ln_2, own.norm_mlp),
        ):
            norm.load_state_dict(from_norm.state_dict())
        for layer, linear in (
            (block.attn.c_attn, own.qkv),
            (block.attn.c_proj, own.self_out),
            (block.crossattention.q_attn, own.query),
            (block.crossattention.c_attn, own.key_value),
            (block.crossattention.c_proj, own.cross_out),
            (block.mlp.c_fc, own.mlp[0]),
            (block.mlp.c_proj, own.mlp[3]),
        ):
            layer.weight.copy_(linear.weight.T)
            layer.bias.copy_(linear.bias)
    return model


def generate(bench: Bench, memory: Tensor, **settings: Any) -> Any:
    """Return what transformers' `generate` does for `memory` (B, S, D), with our limits."""
    start = torch.full((len(memory), 1), START, device=memory.device)
    return bench.gpt2.generate(
        start,
        attention_mask=torch.ones_like(start),
        encoder_hidden_states=memory,
        max_length=bench.max_words + 2,  # start and end token
        forced_eos_token_id=END,
        begin_suppress_tokens=[END],
        suppress_tokens=list(NEVER),
        return_dict_in_generate=True,
        **settings,
    )


def greedy_sides(bench: Bench) -> tuple[Callable, Callable, Callable]:
    """Return their function of memory, ours, and what checks that the captions are equal."""

    def check(theirs: list[Any], ours: list[Decoded]) -> None:
        check_equal("greedy captions", sequences(theirs) == best(ours))

    return (
        lambda memory: generate(bench, memory, do_sample=False),
        lambda memory: greedy(bench.decoder, memory, max_words=bench.max_words),
        check,
    )


def beam_sides(bench: Bench) -> tuple[Callable, Callable, Callable]:
    """Return their function of memory, ours, and what checks that our captions score no less.

    Not that they are equal: ours also completes a caption whose end token is not among the best K
    of the next words.
    """
    settings = {"num_beams": BEAM["beam_size"], "length_penalty": BEAM["length_penalty"]}

    def check(theirs: list[Any], ours: list[Decoded]) -> None:
        gains = [
            rank(part.log_prob[:, 0].cpu(), best([part])) - rank(log_probs, sequences([output]))
            for part, output, log_probs in zip(ours, theirs, score_all(bench, theirs), strict=True)
        ]
        check_equal("scores of beam search", bool((torch.cat(gains) > -1e-3).all()))

    return (
        lambda memory: generate(bench, memory, do_sample=False, **settings),
        lambda memory: beam_search(bench.decoder, memory, max_words=bench.max_words, **BEAM),
        check,
    )


def sample_sides(bench: Bench) -> tuple[Callable, Callable, Callable]:
    """Return their function of memory, ours, and what checks that samples are equally probable."""

    def check(theirs: list[Any], ours: list[Decoded]) -> None:
        own = [part.log_prob[:, 0].cpu() for part in ours]
        sums = torch.cat(score_all(bench, theirs)), torch.cat(own)
        if min(map(len, sums)) < 30:  # too few to tell
            return
        error = sum(float(each.var()) / len(each) for each in sums) ** 0.5
        difference = abs(float(sums[0].mean() - sums[1].mean()))
        check_equal("mean log-probabilities of samples", difference < 5 * error)

    return (
        lambda memory: generate(bench, memory, do_sample=True, top_k=0, top_p=1.0),
        lambda memory: sample(
            bench.decoder, memory, max_words=bench.max_words, seeds=range(len(memory))
        ),
        check,
    )


def score_all(bench: Bench, outputs: Sequence[Any]) -> list[Tensor]:
    """Return the log-probabilities (B,) of transformers' captions of each part of the images."""
    first, found = 0, []
    for output in outputs:
        tokens = output.sequences  # (B, T), the start token first
        memory = bench.memory[first : first + len(tokens)]
        logits = bench.decoder(memory, tokens.cpu(), torch.arange(len(tokens))).logits
        targets = tokens[:, 1:, None]
        gains = logits.log_softmax(-1).gather(-1, targets).masked_fill(targets == PAD, 0)
        found.append(gains.sum((1, 2)).cpu())
        first += len(tokens)
    return found


def rank(log_probs: Tensor, captions: list[list[int]]) -> Tensor:
    """Return what beam search ranks captions by, (B,)."""
    lengths = torch.tensor([len(line) for line in captions])
    return log_probs / lengths ** BEAM["length_penalty"]


def sequences(outputs: Sequence[Any]) -> list[list[int]]:
    """Return transformers' captions as lists that end with the end token."""
    return [line for output in outputs for line in to_lists(output.sequences[:, 1:])]


def best(outputs: Sequence[Decoded]) -> list[list[int]]:
    """Return our first caption of each image as a list that ends with the end token."""
    return [line for output in outputs for line in to_lists(output.tokens[:, 0])]


@torch.inference_mode()
def decoding_rows(name: str, make_sides: Callable, bench: Bench) -> list[Row]:
    """Return the rows of a method: the decoder alone, with many images, and with one at a time."""
    theirs, ours, check = make_sides(bench)
    found: dict[str, list] = {}
    rows = []
    one = bench.memory[: max(1, len(bench.memory) // 16)].split(1)
    many = bench.memory.split(bench.batch_size)
    for parts, size in ((many, f"batches of {len(many[0])}"), (one, "one image")):

        def run(side: str, decode: Callable, parts: Sequence[Tensor] = parts) -> None:
            found[side] = [decode(part) for part in parts]

        times = bench.machine.measure(lambda: run("theirs", theirs), lambda: run("ours", ours))
        if parts is many or make_sides is not sample_sides:
            check(found["theirs"], found["ours"])
        images = sum(map(len, parts))
        rows.append(make_row(f"{name}, {size}", "transformers", *times, images))
    return rows


# ---- the CNN ---------------------------------------------------------------------------------


def write_cnn(bench: Bench) -> Path:
    """Write the CNN as an ONNX graph for any number of images; return the file."""
    path = bench.folder / "cnn.onnx"
    if not path.exists():
        encoder, size = fold_batch_norm(bench.model.encoder.cpu()), bench.model.img_size
        pixels, batch = torch.zeros(2, 3, size, size), torch.export.Dim("images", max=2**16)
        graph = trace(encoder, (pixels,), ({0: batch},), ["images"], ["features"])
        path.write_bytes(graph.SerializeToString())
    return path


def run_onnxruntime(path: Path, pixels: Tensor, dtype: torch.dtype) -> Callable[[], np.ndarray]:
    """Return what computes the features of `pixels` in float32, the only type it has on a CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"images": pixels.numpy()})[0]


def run_openvino(path: Path, pixels: Tensor, dtype: torch.dtype) -> Callable[[], np.ndarray]:
    """Return what computes the features of `pixels` in `dtype`, for exactly as many images."""
    import openvino

    core = openvino.Core()
    graph = core.read_model(path)
    graph.reshape(list(pixels.shape))
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32" if dtype == torch.float32 else "bf16",
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(graph, "CPU", settings)
    return lambda: compiled(pixels.numpy())[0]


ENGINES = {"onnxruntime": run_onnxruntime, "openvino": run_openvino}


@torch.inference_mode()
def cnn_rows(bench: Bench) -> list[Row]:
    """Return the rows of the CNN alone, from pixels to features, against the engines there are."""
    path, size = write_cnn(bench), bench.model.img_size
    engines = {name: run for name, run in ENGINES.items() if is_installed(name)}
    dtypes = {torch.float32, pick_dtype("auto", "cpu")}
    rows = []
    for dtype in sorted(dtypes, key=str, reverse=True):
        for count in (16, 1):
            pixels = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
            sides = {
                name: run(path, pixels, dtype)
                for name, run in engines.items()
                if dtype == torch.float32 or name == "openvino"
            }
            rows += compare_cnn(bench, pixels, dtype, sides)
    return rows


def compare_cnn(
    bench: Bench, pixels: Tensor, dtype: torch.dtype, sides: dict[str, Callable]
) -> list[Row]:
    """Return a row for each of the other programs' `sides`, after comparing their features."""
    encode = prepare_encoder(bench.model.encoder.cpu(), "cpu", dtype)
    ours = encode(pixels)
    # bfloat16 has three digits, and each layer rounds.
    least = 0.9999 if dtype == torch.float32 else 0.99
    for name, side in sides.items():
        theirs = torch.from_numpy(np.array(side())).view(ours.shape)
        cosine = F.cosine_similarity(theirs.flatten(1), ours.flatten(1))
        check_equal(f"features of {name}", float(cosine.min()) > least)
    *times, own = bench.cpu.measure(*sides.values(), lambda: encode(pixels))
    count, precision = len(pixels), str(dtype).removeprefix("torch.")
    images = "one image" if count == 1 else f"batches of {count}"
    name = f"{bench.model.encoder.name} at {pixels.shape[-1]} px, {precision}, {images}"
    return [
        make_row(name, peer, theirs, own, count) for peer, theirs in zip(sides, times, strict=True)
    ]


# ---- reading images --------------------------------------------------------------------------


def reading_rows(bench: Bench) -> list[Row]:
    """Return the rows of reading a JPEG: from the file to the pixels that the CNN gets."""
    from torchvision.io import ImageReadMode, decode_image, read_file
    from torchvision.transforms.v2 import functional as tv

    size = bench.model.img_size
    transform = image_transform(size, train=False)
    mean, std = (np.array(each, dtype=np.float32) for each in (MEAN, STD))

    def pillow(path: Path) -> Tensor:
        image = Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
        pixels = (np.asarray(image, dtype=np.float32) / 255 - mean) / std
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy())

    def torchvision(path: Path) -> Tensor:
        image = decode_image(read_file(str(path)), ImageReadMode.RGB)
        pixels = tv.to_dtype(tv.resize(image, [size, size], antialias=True), scale=True)
        return tv.normalize(pixels, list(MEAN), list(STD))

    def ours(path: Path) -> Tensor:
        return transform(read_image(path, at_least=size))

    rows = []
    for name, shape, count in (("500 x 375", (500, 375), 8), ("12 megapixels", PHOTO, 1)):
        paths = write_jpegs(bench.folder / name, count, shape)
        sides = {"Pillow": pillow, "torchvision": torchvision}
        for peer, read in sides.items():
            pairs = ((read(path).flatten(), ours(path).flatten()) for path in paths)
            cosines = [float(F.cosine_similarity(*pair, dim=0)) for pair in pairs]
            check_equal(f"pixels read by {peer}", min(cosines) > 0.99)

        def each(read: Callable, paths: Sequence[Path] = paths) -> Callable[[], None]:
            return lambda: [read(path) for path in paths]

        *times, own = bench.cpu.measure(*map(each, sides.values()), each(ours))
        rows += [
            make_row(f"reading a JPEG, {name}", peer, theirs, own, count)
            for peer, theirs in zip(sides, times, strict=True)
        ]
    return rows
