"""The image side: a torchvision CNN without its classifier, its weights, and the image transform.

B images · S image positions · C backbone channels · (B, 3, H, W) → (B, S, C)

The only file that names torchvision's models. A backbone is one row in `BACKBONES`.
"""

import copy
import hashlib
import http.client
import re
import socket
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL.Image import Resampling
from torch import Tensor, nn

from util.files import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, torchvision's own
TRANSFORM = "squash-bilinear-imagenet"  # names the evaluation transform in caches and checkpoints
LEAST_SIZE = 32  # pixels a side: most CNNs halve the picture five times
MOST_SIZE = 2048  # pixels a side: more would take gigabytes a picture, and no CNN here wants it

PATIENCE = 20.0  # seconds that the server of torchvision's weights may be silent
IN_CAPTIONER = "encoder.cnn."  # what CaptionModel's state dict calls the CNN

RESNET_LAYERS = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
INCEPTION_SKIPS = ("AuxLogits", "avgpool", "dropout", "fc")


class Backbone(NamedTuple):
    """A row of the table: channels C, default image size, the last stages that fine-tuning trains.

    Sizes are sides in pixels; below `least_size` the CNN runs out of picture. `layers` picks the
    trunk's modules from torchvision's model; none: the trunk is `features`.
    """

    channels: int
    img_size: int
    last_stages: tuple[str, ...]
    layers: Callable[[str], bool] = lambda name: name == "features"
    pretrained: bool = True
    least_size: int = LEAST_SIZE


def _resnet(channels: int) -> Backbone:
    return Backbone(channels, 224, ("layer3", "layer4"), lambda name: name in RESNET_LAYERS)


def _features(channels: int, img_size: int, *last: int) -> Backbone:
    return Backbone(channels, img_size, tuple(f"features.{number}" for number in last))


BACKBONES: dict[str, Backbone] = {
    "resnet18": _resnet(512),
    "resnet34": _resnet(512),
    "resnet50": _resnet(2048),
    "resnet101": _resnet(2048),
    "resnet152": _resnet(2048),
    "mobilenet_v2": _features(1280, 224, 14, 15, 16, 17, 18),
    "mobilenet_v3_large": _features(960, 224, 13, 14, 15, 16),
    "efficientnet_v2_s": _features(1280, 384, 6, 7),
    "convnext_tiny": _features(768, 224, 6, 7),
    "inception_v3": Backbone(
        2048,
        299,
        ("Mixed_7a", "Mixed_7b", "Mixed_7c"),
        lambda name: name not in INCEPTION_SKIPS,
        least_size=75,  # its convolutions have no padding
    ),
    "tiny": Backbone(128, 64, ("conv3", "bn3", "conv4", "bn4"), pretrained=False),
}


@dataclass(frozen=True)
class EncoderConfig:
    """What sees the picture."""

    cnn_backbone: Literal[tuple(BACKBONES)] = "resnet50"
    """The CNN, without its classifier."""
    cnn_weights: str = "default"
    """default (torchvision's), IMAGENET1K_V1, a state-dict file (.pth or .safetensors, a
    captioner's checkpoint too), or none (the whole CNN is trained from scratch)."""
    img_size: int | None = None
    """Side in pixels that images are resized to (default: the backbone's own, 224 for a ResNet;
    for Flickr8k 320)."""
    grid: int | None = None
    """Average the features to this many positions a side (1: one pooled vector an image, and a
    small cache; default: the CNN's own, 7 for a ResNet at 224 pixels)."""
    finetune_cnn: bool = False
    """Train the last stages of the CNN too."""

    def __post_init__(self) -> None:
        least = backbone(self.cnn_backbone).least_size
        for flag, value in (("--img-size", self.img_size), ("--grid", self.grid)):
            if value is not None and type(value) is not int:
                raise UserError(f"{flag} {value!r} must be a whole number")
        if self.img_size is not None and self.img_size < least:
            raise UserError(
                f"--img-size {self.img_size} is too small for {self.cnn_backbone}; use at least "
                f"{least}"
            )
        if self.img_size is not None and self.img_size > MOST_SIZE:
            raise UserError(f"--img-size {self.img_size} must be at most {MOST_SIZE:,}")
        if self.grid is not None and self.grid < 1:
            raise UserError(f"--grid {self.grid} must be at least 1")


def backbone(name: str) -> Backbone:
    """Return the row of a backbone; ValueError lists the known ones."""
    if name not in BACKBONES:
        known = ", ".join(sorted(BACKBONES))
        raise UserError(f"backbone {name!r} is not known; choose from {known}")
    return BACKBONES[name]


class InceptionInput(nn.Module):
    """Turns ImageNet-normalised pixels into the -1..1 that Inception's weights were trained on."""

    def forward(self, images: Tensor) -> Tensor:
        mean = images.new_tensor(MEAN)[:, None, None]
        std = images.new_tensor(STD)[:, None, None]
        return (images * std + mean) * 2 - 1


def tiny() -> nn.Sequential:
    """Return a small CNN for 64-pixel drawings, to be trained from scratch: C = 128, S = 4 x 4."""
    layers, channels = OrderedDict(), 3
    for number, (width, stride) in enumerate(((32, 2), (64, 2), (128, 2), (128, 2), (128, 1))):
        layers[f"conv{number}"] = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        layers[f"bn{number}"] = nn.BatchNorm2d(width)
        layers[f"relu{number}"] = nn.ReLU(inplace=True)
        channels = width
    return nn.Sequential(layers)


def build_trunk(name: str) -> nn.Sequential:
    """Return the backbone with random weights, parameter names as in torchvision's state dict."""
    row = backbone(name)
    if name == "tiny":
        return tiny()
    with torch.device("cpu"):  # the import reckons with tensors; a model may be built on "meta"
        import torchvision

    # Inception warns about its slow truncated-normal start unless it is told which to use.
    extra = {"init_weights": True} if name == "inception_v3" else {}
    model = torchvision.models.get_model(name, weights=None, **extra)
    layers = [(part, module) for part, module in model.named_children() if row.layers(part)]
    if name == "inception_v3":
        layers.insert(0, ("input", InceptionInput()))
    return nn.Sequential(OrderedDict(layers))


class Encoder(nn.Module):
    """A CNN's last feature map as a sequence of image positions.

    `trained` tells what learns: "none" (frozen), "last" (the last stages) or "all" (from scratch).
    Unless all is trained, BatchNorm stays in eval: its statistics are ImageNet's.
    """

    def __init__(self, name: str, trained: str = "none", grid: int | None = None):
        """`grid`: positions a side that the map is averaged to (none: the CNN's own)."""
        super().__init__()
        if trained not in ("none", "last", "all"):
            raise UserError(f"trained {trained!r} is not known; choose from none, last, all")
        self.name, self.trained, self.grid = name, trained, grid
        self.channels = backbone(name).channels
        self.cnn = build_trunk(name)
        for part, parameter in self.cnn.named_parameters():
            parameter.requires_grad = self.trains(part)
        self.train()

    def trains(self, parameter: str) -> bool:
        """Tell whether a parameter of the CNN learns."""
        if self.trained == "last":
            return any(
                parameter.startswith(stage + ".") for stage in backbone(self.name).last_stages
            )
        return self.trained == "all"

    def train(self, mode: bool = True) -> "Encoder":
        """Return the encoder itself, in training mode only if all of it is trained."""
        return super().train(mode and self.trained == "all")

    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, S, C) of `images` (B, 3, H, W), positions row by row."""
        maps = self.cnn(images.contiguous(memory_format=torch.channels_last))
        if self.grid:
            if self.grid > min(maps.shape[2:]):
                height, width = maps.shape[2:]
                raise UserError(
                    f"--grid {self.grid} is finer than the {height} x {width} positions that "
                    f"{self.name} makes of images of that size"
                )
            maps = nn.functional.adaptive_avg_pool2d(maps, self.grid)
        return maps.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, S, C)


def build_encoder(
    name: str, weights: str | Path, *, finetune: bool | None = None, grid: int | None = None
) -> Encoder:
    """Return an `Encoder` with `weights`: default, none, a torchvision weights name, or a path.

    `finetune` None means: the whole CNN is trained where weights are none, else it is frozen.
    Raises ValueError for frozen random features, and where name or weights don't fit.
    """
    from_scratch = str(weights) == "none"
    if from_scratch and finetune is False:
        raise UserError(
            "frozen random features teach a decoder nothing: give --cnn-weights, or let the CNN "
            "be trained"
        )
    trained = "all" if from_scratch else "last" if finetune else "none"
    encoder = Encoder(name, trained, grid)
    if not from_scratch:
        load_weights(encoder.cnn, name, weights)
    return encoder.to(memory_format=torch.channels_last)


def load_weights(cnn: nn.Module, name: str, weights: str | Path) -> None:
    """Fill `cnn` from torchvision's named weights or a state-dict file, with or without classifier.

    The file may be a captioner's checkpoint, whose CNN was fine-tuned: only that is read.
    Raises ValueError naming the first entry that is missing, has another shape, holds infinity or
    NaN, or belongs to a larger CNN.
    """
    source, state = read_weights(name, weights)
    if captioner := {key for key in state if key.startswith(IN_CAPTIONER)}:
        state = {key.removeprefix(IN_CAPTIONER): state[key] for key in captioner}
    wanted = cnn.state_dict()
    for key, tensor in wanted.items():
        if key.endswith("num_batches_tracked"):
            state.setdefault(key, tensor)
        if key not in state:
            raise UserError(f"{source} is not a {name} state dict: it has no {key}")
        if state[key].shape != tensor.shape:
            raise UserError(
                f"{source} does not fit {name}: {key} has shape {tuple(state[key].shape)}, "
                f"expected {tuple(tensor.shape)}"
            )
        if not state[key].isfinite().all():
            raise UserError(
                f"{source} is damaged: {key} holds infinity or NaN (float16 ends at 65,504; keep "
                "BatchNorm's statistics in float32)"
            )
    # A resnet18 would fit into the entries of a resnet34: what is left over must be a classifier.
    stages = {part for part, _ in cnn.named_children()}
    for key in state.keys() - wanted.keys():
        if key.split(".")[0] in stages:
            raise UserError(f"{source} is not a {name} state dict: {name} has no {key}")
    cnn.load_state_dict({key: state[key].to(wanted[key].dtype) for key in wanted})


def read_weights(name: str, weights: str | Path) -> tuple[str, dict[str, Tensor]]:
    """Return a word for the source of the weights, and the state dict."""
    import torchvision

    word, path, published = str(weights), Path(weights).expanduser(), {}
    if backbone(name).pretrained:
        published = torchvision.models.get_model_weights(name).__members__
    chosen = published.get("DEFAULT" if word == "default" else word)
    if chosen is not None:
        return fetch_weights(chosen)
    if path.suffix or path.is_file():
        return word, read_state_dict(path)
    if not published:
        raise UserError(
            f"backbone {name!r} has no published weights; use --cnn-weights none, or the path of "
            "a state dict"
        )
    raise UserError(
        f"weights {word!r} are not known for {name}; choose from default, none, "
        f"{', '.join(key for key in published if key != 'DEFAULT')}, or the path of a state dict"
    )


def fetch_weights(published: Any) -> tuple[str, dict[str, Tensor]]:
    """Return torchvision's weights, downloaded into torch's cache unless they are there."""
    place = Path(torch.hub.get_dir()) / "checkpoints" / Path(published.url).name
    if place.is_file():
        return str(place), read_state_dict(place)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)  # torch's own download would wait for ever
    try:
        state = published.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise FileNotFoundError(
            f"the weights {place.name} could not be downloaded ({error}); get {published.url} and "
            f"put it at {place}, or give its path with --cnn-weights"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
    return place.name, state


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file, or of a .pth file read with weights_only."""
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"no CNN weights at {path}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle can raise anything
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"holds {found[1]}, not tensors alone" if found else "is damaged, or another thing"
        raise UserError(f"{path} is not a readable state dict: it {what}") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path} is not a state dict: expected names and tensors only")
    return state


def fingerprint(encoder: nn.Module) -> str:
    """Return 16 hex digits that change with any weight of the encoder."""
    digest = hashlib.sha256()
    for key, tensor in encoder.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            digest.update(key.encode())
            digest.update(tensor.float().contiguous().cpu().numpy())
    return digest.hexdigest()[:16]


def folded(encoder: Encoder) -> Encoder:
    """Return a copy for inference only, BatchNorm folded into the convolutions before it."""
    from torch.fx.experimental.optimization import fuse

    light = copy.deepcopy(encoder).requires_grad_(False)
    light.trained = "none"  # its BatchNorms are gone: it must never go back to training
    light.cnn = fuse(light.eval().cnn, inplace=True)
    return light.to(memory_format=torch.channels_last)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Tell whether the device multiplies bfloat16 matrices faster than float32."""
    if device.type == "cpu":  # elsewhere it works too, many times slower
        return getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    # Older GPUs only imitate it.
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


class Resize:
    """A PIL image → (3, H, W) normalised pixels, squashed to a square of `size` pixels.

    With `crop`, a random part (at least 80 % of the area, nearly of the image's own shape) is
    taken first: large enough that captions stay true.
    """

    def __init__(self, size: int, crop: bool = False):
        self.size, self.crop = size, crop
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

        # Relative to the image's own shape: a square of 80 % does not fit into a 3:2 photograph.
        shape = image.width / image.height
        ratio = (0.9 * shape, 1.1 * shape)
        return RandomResizedCrop(self.size, (0.8, 1.0), ratio, antialias=True)(image)


def image_transform(img_size: int, *, train: bool) -> Callable[[Any], Tensor]:
    """Return what turns a PIL image into (3, img_size, img_size) normalised pixels.

    The aspect ratio is given up and nothing is cut off; with `train` a random crop is taken.
    Mirroring is the dataset's: it must know the captions.
    """
    if img_size < LEAST_SIZE:
        raise UserError(f"image size {img_size} is too small; use at least {LEAST_SIZE}")
    return Resize(img_size, crop=train)
