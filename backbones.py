"""The networks that turn images into feature maps, without their classifiers.

B images · S image positions · C channels · h, w size of a feature map

The only module that names torchvision's models. The ResNets (arXiv 1512.03385) are written out
here, with torchvision's names of the weights, because importing torchvision takes as long as
importing torch: half of the time in which `python inference.py photo.jpg` prints a caption.
`tests/test_encoder.py` checks that both compute the same.
"""

import math
import warnings
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as in torchvision

# Modules of torchvision's models that come after the last features.
CLASSIFIER = {
    "avgpool", "flatten", "dropout", "fc", "classifier", "head", "AuxLogits", "aux1", "aux2",
}  # fmt: skip

# Name -> whether a block has three convolutions (else two), and the blocks of the four stages.
RESNETS = {
    "resnet18": (False, (2, 2, 2, 2)),
    "resnet34": (False, (3, 4, 6, 3)),
    "resnet50": (True, (3, 4, 6, 3)),
    "resnet101": (True, (3, 4, 23, 3)),
    "resnet152": (True, (3, 8, 36, 3)),
}
STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))  # width of the convolutions, stride


def flatten_map(features: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, S, C), row by row"""
    return features.flatten(2).transpose(1, 2)


class ResidualBlock(nn.Module):
    """Two convolutions of 3 x 3, or a bottleneck of 1 x 1, 3 x 3 and 1 x 1, added to the input."""

    def __init__(self, channels: int, width: int, stride: int, bottleneck: bool):
        super().__init__()
        out = 4 * width if bottleneck else width
        # The stride is in the 3 x 3 convolution, not in the paper's first (1 x 1) one, as in the
        # networks that published weights are of.
        layers = [(width, 3, stride), (width, 3, 1)]
        if bottleneck:
            layers = [(width, 1, 1), (width, 3, stride), (out, 1, 1)]
        self.depth, before = len(layers), channels
        for number, (after, kernel, step) in enumerate(layers, 1):
            conv = nn.Conv2d(before, after, kernel, step, padding=kernel // 2, bias=False)
            self.add_module(f"conv{number}", conv)
            self.add_module(f"bn{number}", nn.BatchNorm2d(after))
            before = after
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or channels != out:
            conv = nn.Conv2d(channels, out, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, h, w) of (B, C', h', w')."""
        out = x
        for number in range(1, self.depth + 1):
            out = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(out))
            if number < self.depth:
                out = self.relu(out)
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def build_resnet(name: str) -> nn.Sequential:
    """Return the layers of a ResNet before its classifier, with random weights."""
    bottleneck, blocks = RESNETS[name]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv1"] = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
    layers["bn1"] = nn.BatchNorm2d(64)
    layers["relu"] = nn.ReLU(inplace=True)
    layers["maxpool"] = nn.MaxPool2d(3, 2, padding=1)
    channels = 64
    for number, ((width, stride), count) in enumerate(zip(STAGES, blocks, strict=True), 1):
        stage = []
        for block in range(count):
            stage.append(ResidualBlock(channels, width, 1 if block else stride, bottleneck))
            channels = 4 * width if bottleneck else width
        layers[f"layer{number}"] = nn.Sequential(*stage)
    resnet = nn.Sequential(layers)
    for module in resnet.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return resnet


class InceptionInput(nn.Module):
    """Turns ImageNet-normalised pixels into the -1..1 that Inception's weights were trained on."""

    def forward(self, images: Tensor) -> Tensor:
        mean = images.new_tensor(MEAN)[:, None, None]
        std = images.new_tensor(STD)[:, None, None]
        return (images * std + mean) * 2 - 1


class ViT(nn.Module):
    """Torchvision's vision transformer without its classifier: (B, 3, H, W) → (B, 1 + S, C).

    The first output is the class token's. Position embeddings are interpolated to the image size.
    """

    def __init__(self, name: str):
        super().__init__()
        model = build_torchvision(name)
        self.class_token = model.class_token
        self.conv_proj, self.encoder = model.conv_proj, model.encoder

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv_proj(images)  # (B, C, h, w)
        first, position = self.encoder.pos_embedding[:, :1], self.encoder.pos_embedding[:, 1:]
        side = math.isqrt(position.shape[1])
        if patches.shape[2:] != (side, side):  # like torchvision's `interpolate_embeddings`
            grid = position.float().mT.unflatten(2, (side, side))
            grid = F.interpolate(grid, patches.shape[2:], mode="bicubic", align_corners=True)
            position = flatten_map(grid).to(position.dtype)
        token = (self.class_token + first).expand(images.shape[0], -1, -1)
        x = torch.cat([token, flatten_map(patches) + position], 1)
        return self.encoder.ln(self.encoder.layers(x))


def build_torchvision(name: str) -> nn.Module:
    """Return torchvision's model with random weights."""
    with torch.device("cpu"):  # the import computes tensors; a model may be built on "meta"
        import torchvision
    with warnings.catch_warnings():  # Inception's note on how its weights are initialised
        warnings.simplefilter("ignore", FutureWarning)
        return torchvision.models.get_model(name, weights=None)


def build_sequential(name: str) -> nn.Sequential:
    """Return the layers of torchvision's model before its classifier."""
    layers = build_torchvision(name).named_children()
    return nn.Sequential(OrderedDict(item for item in layers if item[0] not in CLASSIFIER))


def build_inception(name: str) -> nn.Sequential:
    """Return the layers of an Inception model, with the scaling of pixels its weights expect."""
    layers = build_sequential(name).named_children()
    return nn.Sequential(OrderedDict([("input", InceptionInput()), *layers]))


def build_tiny(name: str = "tiny") -> nn.Sequential:
    """Return a small CNN for 64-pixel drawings, to be trained from scratch: C = 128, S = 4 x 4."""
    layers, channels = OrderedDict(), 3
    for number, (width, stride) in enumerate(((32, 2), (64, 2), (128, 2), (128, 2), (128, 1))):
        layers[f"conv{number}"] = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        layers[f"bn{number}"] = nn.BatchNorm2d(width)
        layers[f"relu{number}"] = nn.ReLU(inplace=True)
        channels = width
    return nn.Sequential(layers)


def list_classes() -> list[str]:
    """Return the names of ImageNet's 1,000 classes, in the order of a classifier's outputs."""
    from torchvision.models import ResNet50_Weights  # slow to import

    return list(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])


def list_published_weights(name: str) -> dict[str, Any]:
    """Return torchvision's weights of a model by their name."""
    import torchvision

    return dict(torchvision.models.get_model_weights(name).__members__)
