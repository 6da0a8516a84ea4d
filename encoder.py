"""The image side: a backbone without its classifier, its weights, the image transform.

B images · S image positions · C backbone channels · (B, 3, H, W) → (B, S, C)

A backbone is one row in `BACKBONES`; `backbones.py` builds the networks.
"""

import copy
import hashlib
import http.client
import math
import re
import socket
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Resampling
from torch import Tensor, nn

from backbones import (
    MEAN,
    STD,
    ViT,
    build_inception,
    build_resnet,
    build_sequential,
    build_tiny,
    flatten_map,
    list_published_weights,
)
from util.files import IDENTITY, UserError
from util.fusion import can_fuse, fuse_convolutions
from util.layers import to_device
from util.quantization import dequantize_state
from util.states import check_torch_file

TRANSFORM = "squash-bilinear-imagenet"  # name of the evaluation transform in caches and model files
LEAST_SIZE = 32  # pixels per side: most CNNs halve the image five times
MOST_SIZE = 2048  # pixels per side: more would take gigabytes per image

DOWNLOAD_TIMEOUT = 20.0  # seconds without an answer from the server of torchvision's weights
CAPTIONER_PREFIX = "encoder.cnn."  # of the CNN's entries in the state dict of a CaptionModel


class Backbone(NamedTuple):
    """A row of the table: channels C, the image size (pixels per side) unless --img-size is given,
    and the modules that --finetune-cnn trains.

    `build` returns the backbone of a name, its parameters named as in torchvision's state dict;
    `to_sequence` turns its output into (B, S, C), the positions of a square row by row.
    """

    channels: int
    img_size: int
    last_stages: tuple[str, ...]
    build: Callable[[str], nn.Module] = build_sequential
    to_sequence: Callable[[Tensor], Tensor] = flatten_map
    least_size: int = LEAST_SIZE
    size_multiple: int = 1
    pretrained: bool = True  # torchvision has weights for it
    stride: int | None = None  # pixels per position, rounded up; None: only running it tells
    classifier: str | None = None  # layer in the state dict that classifies the features' mean


def _resnet(channels: int) -> Backbone:
    return Backbone(channels, 224, ("layer3", "layer4"), build_resnet, stride=32, classifier="fc")


def _features(
    channels: int, img_size: int, *last: int, classifier: str | None = "classifier.1"
) -> Backbone:
    stages = tuple(f"features.{number}" for number in last)
    return Backbone(channels, img_size, stages, stride=32, classifier=classifier)


BACKBONES: dict[str, Backbone] = {
    "resnet18": _resnet(512),
    "resnet34": _resnet(512),
    "resnet50": _resnet(2048),
    "resnet101": _resnet(2048),
    "resnet152": _resnet(2048),
    "mobilenet_v2": _features(1280, 224, 14, 15, 16, 17, 18),
    "mobilenet_v3_large": _features(960, 224, 13, 14, 15, 16, classifier=None),
    "efficientnet_b0": _features(1280, 224, 6, 7, 8),
    "efficientnet_v2_s": _features(1280, 384, 6, 7),
    "convnext_tiny": Backbone(768, 224, ("features.6", "features.7")),
    "googlenet": Backbone(
        1024, 224, ("inception5a", "inception5b"), build_inception, classifier="fc"
    ),
    "inception_v3": Backbone(  # least size: its convolutions have no padding
        2048, 299, ("Mixed_7a", "Mixed_7b", "Mixed_7c"), build_inception, least_size=75,
        classifier="fc",
    ),
    # Swin's layer `permute` has turned (B, h, w, C) into a map.
    "swin_t": Backbone(768, 224, ("features.6", "features.7", "norm"), classifier="head"),
    "vit_b_16": Backbone(  # the first of its outputs is the class token's
        768, 224, ("encoder.layers.encoder_layer_10", "encoder.layers.encoder_layer_11",
        "encoder.ln"), ViT, to_sequence=lambda tokens: tokens[:, 1:], size_multiple=16,
    ),
    "tiny": Backbone(
        128, 64, ("conv3", "bn3", "conv4", "bn4"), build_tiny, pretrained=False, stride=16
    ),
}  # fmt: skip


def get_backbone(name: str) -> Backbone:
    """Return the row of a backbone; UserError lists the known ones."""
    if name not in BACKBONES:
        known = ", ".join(sorted(BACKBONES))
        raise UserError(f"backbone {name!r} is not known; choose from {known}")
    return BACKBONES[name]


@dataclass(frozen=True)
class EncoderConfig:
    """The backbone, and the size of the images that it gets."""

    cnn_backbone: Literal[tuple(BACKBONES)] = field(default="resnet50", metadata=IDENTITY)
    """The CNN or vision transformer, without its classifier."""
    cnn_weights: str = "default"
    """default (torchvision's), IMAGENET1K_V1, a state-dict file (.pth or .safetensors, also a
    captioner's model file), or none (the whole CNN is trained from scratch)."""
    img_size: int | None = field(default=None, metadata=IDENTITY)
    """Side in pixels of the square that images are resized to."""
    grid: int | None = field(default=None, metadata=IDENTITY)
    """Average the features to this many positions per side (1: one vector per image, and a small
    cache); None keeps the CNN's own, 7 for a ResNet at 224 pixels."""
    finetune_cnn: bool = field(default=False, metadata=IDENTITY)
    """Train the last stages of the CNN too."""

    def validate(self) -> None:
        """Raise UserError for a value out of range, or an image size that does not fit the CNN."""
        row = get_backbone(self.cnn_backbone)
        for flag, value in (("--img-size", self.img_size), ("--grid", self.grid)):
            if value is not None and type(value) is not int:
                raise UserError(f"{flag} {value!r} must be a whole number")
        if self.grid is not None and self.grid < 1:
            raise UserError(f"--grid {self.grid} must be at least 1")
        size = row.img_size if self.img_size is None else self.img_size
        if size < row.least_size:
            raise UserError(
                f"--img-size {size} is too small for {self.cnn_backbone}; use at least "
                f"{row.least_size}"
            )
        if size > MOST_SIZE:
            raise UserError(f"--img-size {size} must be at most {MOST_SIZE:,}")
        if size % row.size_multiple:
            raise UserError(
                f"--img-size {size} does not fit {self.cnn_backbone}; use a multiple of "
                f"{row.size_multiple}"
            )


class Encoder(nn.Module):
    """A backbone that turns images into a sequence of features, one per image position.

    `trained` says which part has gradients: "none" (frozen), "last" (the last stages) or "all"
    (trained from scratch). Unless all is trained, BatchNorm stays in eval mode, with the statistics
    of ImageNet.
    """

    def __init__(self, name: str, trained: str = "none", grid: int | None = None):
        """`grid`: positions per side that the features are averaged to (None: the CNN's own)."""
        super().__init__()
        if trained not in ("none", "last", "all"):
            raise ValueError(f"trained {trained!r} is not known; choose from none, last, all")
        self.name, self.trained, self.grid = name, trained, grid
        row = get_backbone(name)
        self.channels = row.channels
        self.cnn = row.build(name)
        for key, parameter in self.cnn.named_parameters():
            parameter.requires_grad = self.is_trained(key)
        self.train()

    def is_trained(self, key: str) -> bool:
        """Return whether training changes this entry of the CNN's state dict."""
        if self.trained == "last":
            stages = get_backbone(self.name).last_stages
            return key.startswith(tuple(f"{stage}." for stage in stages))
        return self.trained == "all"

    def train(self, mode: bool = True) -> "Encoder":
        """Return the encoder itself, in training mode only if all of it is trained."""
        return super().train(mode and self.trained == "all")

    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, S, C) of `images` (B, 3, H, W), positions row by row."""
        return self.to_sequence(self.cnn(images.contiguous(memory_format=torch.channels_last)))

    def to_sequence(self, maps: Tensor) -> Tensor:
        """Return features (B, S, C) of the backbone's output, averaged to the grid if there is one.

        Raises UserError where the grid is finer than the output.
        """
        features = get_backbone(self.name).to_sequence(maps)
        if not self.grid:
            return features
        side = math.isqrt(features.shape[1])
        self.check_grid(side)
        maps = features.transpose(1, 2).unflatten(2, (side, side))
        return flatten_map(F.adaptive_avg_pool2d(maps, self.grid))

    def check_grid(self, side: int) -> None:
        """Raise UserError if the CNN's own `side` positions per side are fewer than the grid's."""
        if self.grid and self.grid > side:
            raise UserError(
                f"--grid {self.grid} is finer than the {side} x {side} positions that "
                f"{self.name} makes of images of that size"
            )

    def count_positions(self, img_size: int) -> int:
        """Return how many positions S an image of `img_size` x `img_size` pixels has.

        Raises UserError where the size is too small for the backbone.
        """
        row = get_backbone(self.name)
        if row.stride:
            side = -(-img_size // row.stride)
            self.check_grid(side)
            return (self.grid or side) ** 2
        training = self.training
        try:
            with torch.inference_mode():
                device = next(self.parameters()).device
                features = self.eval()(torch.zeros(1, 3, img_size, img_size, device=device))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"--img-size {img_size} does not fit the CNN {self.name} ({reason}); its own size "
                f"is {row.img_size}"
            ) from error
        finally:
            self.train(training)
        return features.shape[1]


def build_encoder(
    name: str, weights: str | Path, *, finetune: bool | None = False, grid: int | None = None
) -> Encoder:
    """Return an `Encoder` with `weights`: default, none, a torchvision weights name, or a path.

    With none the whole CNN is trained; otherwise its last stages if `finetune`, else nothing of it.
    Raises UserError where the name is not known or the weights do not fit.
    """
    from_scratch = str(weights) == "none"
    trained = "all" if from_scratch else "last" if finetune else "none"
    encoder = Encoder(name, trained, grid)
    if not from_scratch:
        load_weights(encoder.cnn, name, weights)
    return encoder.to(memory_format=torch.channels_last)


def load_weights(cnn: nn.Module, name: str, weights: str | Path) -> None:
    """Fill `cnn` from torchvision's named weights or a state-dict file, with or without classifier.

    Of a captioner's model file, whose CNN may be fine-tuned, the CNN is read. Raises UserError that
    names the first entry which is missing, has another shape or type, holds infinity or NaN, or
    belongs to a larger CNN.
    """
    source, state = read_weights(name, weights)
    if any(key.startswith(CAPTIONER_PREFIX) for key in state):
        state = {
            key.removeprefix(CAPTIONER_PREFIX): tensor
            for key, tensor in state.items()
            if key.startswith(CAPTIONER_PREFIX)
        }
    state = dequantize_state(state, source)
    # Torchvision's published ViT weights name the layers of an MLP as its first version did.
    for old, new in ((".mlp.linear_1.", ".mlp.0."), (".mlp.linear_2.", ".mlp.3.")):
        state = {key.replace(old, new): tensor for key, tensor in state.items()}
    expected = cnn.state_dict()
    for key, tensor in expected.items():
        if key.endswith("num_batches_tracked"):
            state.setdefault(key, tensor)
        if key not in state:
            raise UserError(f"{source} is not a {name} state dict: it has no {key}")
        if state[key].shape != tensor.shape:
            raise UserError(
                f"{source} does not fit {name}: {key} has shape {tuple(state[key].shape)}, "
                f"expected {tuple(tensor.shape)}"
            )
        if tensor.is_floating_point() and not state[key].is_floating_point():
            raise UserError(
                f"{source} does not fit {name}: {key} holds {state[key].dtype}, expected floats"
            )
        if not state[key].isfinite().all():
            raise UserError(
                f"{source} is damaged: {key} holds infinity or NaN (float16 ends at 65,504; keep "
                "BatchNorm's statistics in float32)"
            )
    # A resnet18 would fit into the entries of a resnet34: other entries must be a classifier's.
    stages = {part for part, _ in cnn.named_children()}
    for key in state.keys() - expected.keys():
        if key.split(".")[0] in stages:
            raise UserError(f"{source} is not a {name} state dict: {name} has no {key}")
    cnn.load_state_dict({key: state[key].to(expected[key].dtype) for key in expected})


def read_weights(name: str, weights: str | Path) -> tuple[str, dict[str, Tensor]]:
    """Return where the weights come from, for messages, and the state dict."""
    choice, path, published = str(weights), Path(weights).expanduser(), {}
    if get_backbone(name).pretrained:
        published = list_published_weights(name)
    chosen = published.get("DEFAULT" if choice == "default" else choice)
    if chosen is not None:
        return fetch_weights(chosen)
    if path.suffix or path.is_file():
        return choice, read_state_dict(path)
    if not published:
        raise UserError(
            f"backbone {name!r} has no published weights; use --cnn-weights none, or the path of "
            "a state dict"
        )
    raise UserError(
        f"weights {choice!r} are not known for {name}; choose from default, none, "
        f"{', '.join(key for key in published if key != 'DEFAULT')}, or the path of a state dict"
    )


def fetch_weights(published: Any) -> tuple[str, dict[str, Tensor]]:
    """Return torchvision's weights, downloaded into torch's cache unless they are there."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(published.url).name
    if path.is_file():
        return str(path), read_state_dict(path)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # torch's download has none of its own
    try:
        state = published.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise FileNotFoundError(
            f"the weights {path.name} could not be downloaded ({error}); get {published.url} and "
            f"put it at {path}, or give its path with --cnn-weights"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    return path.name, state


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file, or of a .pth file read with weights_only."""
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"no CNN weights at {path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path):  # older files are not, and are read as they are
            check_torch_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except UserError as error:
        raise UserError(f"{path} is not a readable state dict: {error}") from error
    except Exception as error:  # a damaged pickle can raise anything
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"holds {found[1]}, not only tensors" if found else "is damaged, or something else"
        raise UserError(f"{path} is not a readable state dict: it {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path} is not a state dict: expected names and tensors only")
    return state


def fingerprint(module: nn.Module) -> str:
    """Return 16 hex digits that change with any weight of the module."""
    digest = hashlib.sha256()
    for key, tensor in module.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            digest.update(key.encode())
            digest.update(tensor.float().contiguous().cpu().numpy())
    return digest.hexdigest()[:16]


def fold_batch_norm(encoder: Encoder) -> Encoder:
    """Return a copy for inference only, BatchNorm folded into the convolutions before it."""
    from torch.fx.experimental.optimization import fuse

    light = copy.deepcopy(encoder).requires_grad_(False)
    light.trained = "none"  # without its BatchNorms it must never be trained
    light.eval()
    if any(isinstance(module, nn.BatchNorm2d) for module in light.modules()):
        light.cnn = fuse(light.cnn, inplace=True)
    return light.to(memory_format=torch.channels_last)


PRECISIONS = ("auto", "float32", "bfloat16")


def pick_dtype(precision: str, device: torch.device | str) -> torch.dtype:
    """Return the type that the CNN computes in; auto: bfloat16 where the device multiplies it."""
    fast = precision == "bfloat16" or (
        precision == "auto" and multiplies_bfloat16(torch.device(device))
    )
    return torch.bfloat16 if fast else torch.float32


def prepare_encoder(
    encoder: Encoder, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> Callable[[Tensor], Tensor]:
    """Return the fastest function from pixels (B, 3, H, W) to features (B, S, C), both float32.

    It computes in `dtype` on `device`, and is for inference only: later changes of the encoder's
    weights don't reach it.
    """
    device = torch.device(device)
    if device.type == "cpu" and can_fuse(encoder.cnn, dtype):
        cnn = fuse_convolutions(encoder.cnn, dtype)
    else:
        cnn = fold_batch_norm(encoder).cnn.to(device, dtype)

    def encode(pixels: Tensor) -> Tensor:
        # One after the other: to both at once, torch would convert on the CPU, and wait for it.
        pixels = to_device(pixels, device).to(dtype)
        maps = cnn(pixels.contiguous(memory_format=torch.channels_last))
        return encoder.to_sequence(maps).float()

    return encode


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 matrices faster than float32."""
    if device.type == "cpu":  # a CPU without the instructions is many times slower
        return getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    # Older GPUs only emulate it.
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


class Resize:
    """A PIL image → (3, H, W) normalised pixels, resized to a square of `size` pixels per side.

    With `crop`, a random part (at least 80 % of the area, nearly of the image's own shape) is
    taken first: large enough that captions stay true. `at_least` is what `util.images.read_image`
    should be given: it keeps twice that, and so the random part is not enlarged either.
    """

    def __init__(self, size: int, crop: bool = False):
        self.size, self.crop, self.at_least = size, crop, size
        mean, std = (torch.tensor(each)[:, None, None] for each in (MEAN, STD))
        self.scale, self.shift = 1 / (255 * std), mean / std

    def __call__(self, image: Any) -> Tensor:
        pixels = torch.from_numpy(np.array(self.resize(image)))  # (H, W, 3) uint8
        return pixels.permute(2, 0, 1) * self.scale - self.shift

    def resize(self, image: Any) -> Any:
        """Return the PIL image, or a random part of it, at the size wanted."""
        image = image if image.mode == "RGB" else image.convert("RGB")
        size = (self.size, self.size)
        if not self.crop:
            return image.resize(size, Resampling.BILINEAR)
        from torchvision.transforms.v2 import RandomResizedCrop  # slow to import: not at start

        # Relative to the image's own shape: a square of 80 % does not fit into a 3:2 image.
        shape = image.width / image.height
        ratio = (0.9 * shape, 1.1 * shape)
        return RandomResizedCrop(self.size, (0.8, 1.0), ratio, antialias=True)(image)


def image_transform(img_size: int, *, train: bool) -> Callable[[Any], Tensor]:
    """Return what turns a PIL image into (3, img_size, img_size) normalised pixels.

    The aspect ratio is ignored and nothing is cut off; with `train` a random crop is taken.
    Mirroring is done by the dataset, which knows the captions.
    """
    if img_size < LEAST_SIZE:
        raise UserError(f"image size {img_size} is too small; use at least {LEAST_SIZE}")
    return Resize(img_size, crop=train)
