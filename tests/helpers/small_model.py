"""Small models of every decoder, of weights that are nobody's defaults, and what they output.

B images · S image positions · M captions
"""

import torch
from torch import Tensor

from decoder import DecoderConfig
from decoding import beam_search
from encoder import Encoder
from model import CaptionModel
from vocabulary import END, PAD, START, Vocabulary

KNOWN = ("a", "dog", "runs", "犬", "l'été", "grass", "on", "red", "ball")
SIZES = {"d_model": 24, "n_decode": 2, "n_head": 3, "fc_dim": 40, "dropout": 0.4, "seq_len": 6}
IMG_SIZE = 64
TOKENS = torch.tensor(
    [[START, 4, 5, 6, END, PAD], [START, 4, 7, 5, 6, END], [START, 9, END, 0, 0, 0]]
)
OWNER = torch.tensor([0, 0, 1])


def build(
    name: str = "transformer",
    backbone: str = "tiny",
    trained: str = "all",
    img_size: int = IMG_SIZE,
) -> CaptionModel:
    torch.manual_seed(0)
    config = DecoderConfig(decoder=name, **SIZES)
    return CaptionModel(Encoder(backbone, trained), config, Vocabulary(KNOWN), img_size)


def pixels(count: int = 2, size: int = IMG_SIZE) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def lively(model: CaptionModel) -> CaptionModel:
    """Return the model with weights and BatchNorm statistics that are nobody's defaults."""
    model.train()
    model.encoder(pixels(8))
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def outputs(model: CaptionModel) -> tuple[Tensor, ...]:
    memory = model.encode(pixels())
    logits = model(pixels(), TOKENS, OWNER).logits
    return memory, logits, *beam_search(model.decoder, memory, max_words=6, beam_size=3, n=2)


def assert_same(one: CaptionModel, other: CaptionModel) -> None:
    for mine, theirs in zip(outputs(one), outputs(other), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)
