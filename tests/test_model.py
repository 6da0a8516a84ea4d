"""The model: pixels or features, what learns, and what is counted.

B images · S image positions · C backbone channels · M captions
"""

import pytest
import torch
from helpers.small_model import OWNER, TOKENS, assert_same, build, lively, pixels
from torch import nn

from decoder import DECODERS
from encoder import BACKBONES, Encoder
from losses import cross_entropy
from model import CaptionModel


@pytest.fixture(params=DECODERS)
def model(request) -> CaptionModel:
    return lively(build(request.param))


# ---- pixels and features ---------------------------------------------------------------------


@torch.no_grad()
def test_cached_features_are_as_good_as_pixels(model):
    model.eval()
    features = model.encoder(pixels())
    assert features.shape == (2, 16, 128)
    torch.testing.assert_close(model.encode(features), model.encode(pixels()))
    half = model.encode(features.half())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, model.encode(pixels()), atol=0.02, rtol=0.02)


@torch.no_grad()
def test_features_of_another_image_size_are_refused(model):
    with pytest.raises(ValueError, match=r"features have .*\(36, 128\).* built for \(16, 128\)"):
        model.encode(pixels(size=96))


@pytest.mark.parametrize(("size", "positions"), [(64, 16), (96, 36), (32, 4), (16, 1)])
def test_positions_are_counted_as_the_encoder_makes_them(size, positions):
    encoder = Encoder("tiny", "all")
    assert encoder.count_positions(size) == positions
    assert encoder(pixels(2, size)).shape[1] == positions


@pytest.mark.parametrize("name", [name for name, row in BACKBONES.items() if row.stride])
def test_a_backbone_s_stride_gives_the_number_of_positions(name):
    encoder = Encoder(name)
    for size in (64, 97):
        assert encoder.count_positions(size) == encoder(pixels(1, size)).shape[1]


@pytest.mark.parametrize("training", (True, False))
def test_counting_positions_leaves_the_encoder_as_it_was(training):
    encoder = Encoder("googlenet", "all").train(training)
    before = {key: each.clone() for key, each in encoder.state_dict().items()}
    encoder.count_positions(64)
    assert all(module.training == training for module in encoder.modules())
    assert all(torch.equal(each, before[key]) for key, each in encoder.state_dict().items())


def test_an_image_size_too_small_for_the_cnn_is_named_with_its_own():
    encoder = Encoder("inception_v3")
    with pytest.raises(ValueError, match=r"--img-size 40 does not fit .*inception_v3.* is 299"):
        encoder.count_positions(40)


# ---- what learns -----------------------------------------------------------------------------


@pytest.mark.parametrize("trained", ("none", "last", "all"))
def test_what_learns_gets_a_gradient_and_nothing_else_does(trained):
    model = build("transformer", "resnet18", trained).train()
    torch.manual_seed(0)
    logits = model(pixels(), TOKENS, OWNER).logits
    cross_entropy(logits, TOKENS, 0.1).objective.backward()
    learned = {name for name, _ in model.trainable_state()}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in learned), name
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.any(), name
    cnn = {name for name in learned if name.startswith("encoder.")}
    assert {name for name, _ in model.decoder.named_parameters(prefix="decoder")} <= learned
    every = {name for name in model.state_dict() if name.startswith("encoder.")}
    assert (
        cnn
        == {
            "none": set(),
            "last": {name for name in every if ".layer3." in name or ".layer4." in name},
            "all": every,
        }[trained]
    )


@pytest.mark.parametrize("inputs", [(0, 3, 64, 64), (0, 16, 128), (0,), (2, 3, 64, 64)])
@pytest.mark.parametrize("length", (6, 1, 0))
def test_an_empty_batch_gives_every_trainable_parameter_a_zero_gradient(model, inputs, length):
    tokens, owner = torch.zeros(0, length, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    logits = model.train()(torch.randn(inputs), tokens, owner).logits
    assert logits.shape == (0, max(length - 1, 0), len(model.vocabulary))
    logits.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize("trained", ("none", "last"))
def test_batch_normalisation_of_a_pretrained_cnn_never_moves(trained):
    model = build("transformer", "resnet18", trained).train()
    norms = [each for each in model.encoder.modules() if isinstance(each, nn.BatchNorm2d)]
    before = [each.running_mean.clone() for each in norms]
    model(pixels(), TOKENS, OWNER)
    assert norms and not any(each.training for each in norms)
    assert all(torch.equal(a, b.running_mean) for a, b in zip(before, norms, strict=True))
    assert model.decoder.training


def test_what_was_learned_and_the_encoder_are_the_whole_model(model):
    fresh = build(model.config.decoder)
    missing = fresh.load_state_dict(dict(model.trainable_state()), strict=False)
    assert not missing.unexpected_keys and not missing.missing_keys
    assert_same(fresh.eval(), model.eval())
