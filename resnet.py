"""The ResNets (arXiv 1512.03385) without their classifier, with the weights' names of torchvision.

They are here, though torchvision has them, because importing torchvision takes as long as importing
torch: half of the time in which `python inference.py photo.jpg` prints a caption.
`tests/test_encoder.py` checks that both compute the same.

B images · C channels · h, w size of a feature map
"""

from collections import OrderedDict

from torch import Tensor, nn

# Name -> whether a block has three convolutions (else two), and the blocks of the four stages.
RESNETS = {
    "resnet18": (False, (2, 2, 2, 2)),
    "resnet34": (False, (3, 4, 6, 3)),
    "resnet50": (True, (3, 4, 6, 3)),
    "resnet101": (True, (3, 4, 23, 3)),
    "resnet152": (True, (3, 8, 36, 3)),
}
STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))  # width of the convolutions, stride


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
