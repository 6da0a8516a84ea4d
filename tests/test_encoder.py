"""Backbones give torchvision's features, with the weights of the file."""

import collections
import copy
import math
import re
import socket
import urllib.error

import numpy as np
import pytest
import torch
import torchvision
from helpers.tiny import tiny_model
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.models.vision_transformer import interpolate_embeddings

from encoder import (
    BACKBONES,
    MEAN,
    STD,
    Encoder,
    EncoderConfig,
    build_encoder,
    fetch_weights,
    fingerprint,
    fold_batch_norm,
    get_backbone,
    image_transform,
    load_weights,
    prepare_encoder,
)
from model import CaptionModel

PUBLISHED = [name for name, row in BACKBONES.items() if row.pretrained]
RESNET18_FILE = "resnet18-f37072fd.pth"


def stir(module: nn.Module) -> None:
    """Give BatchNorm statistics and scales that matter: those of a new model do nothing."""
    generator = torch.Generator().manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.running_var, part.weight.data):
                tensor.uniform_(0.6, 1.2, generator=generator)
            for tensor in (part.running_mean, part.bias.data):
                tensor.normal_(0, 0.2, generator=generator)


def full_model(name: str, size: int | None = None) -> nn.Module:
    """Torchvision's own model with its classifier and random weights, in eval mode."""
    extra = {}
    if name in ("inception_v3", "googlenet"):
        extra = {"init_weights": False, "transform_input": True}
    elif name == "vit_b_16" and size:
        extra = {"image_size": size}
    model = torchvision.models.get_model(name, weights=None, **extra).eval()
    stir(model)
    return model


@torch.no_grad()
def torchvision_features(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The features (B, S, C) before the classifier, in torchvision's own forward."""
    last = ("layer4", "permute", "encoder", "Mixed_7c", "inception5b", "features")
    layer = next(getattr(model, name) for name in last if hasattr(model, name))
    outputs = []
    layer.register_forward_hook(lambda module, given, output: outputs.append(output))
    model(images)
    if outputs[0].dim() == 3:
        return outputs[0][:, 1:]  # a ViT's class token comes first
    return outputs[0].flatten(2).transpose(1, 2)


def older_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict with the names that torchvision's published ViT weights have."""
    return {
        key.replace(".mlp.0.", ".mlp.linear_1.").replace(".mlp.3.", ".mlp.linear_2."): tensor
        for key, tensor in state.items()
    }


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= 1e-4 * theirs.abs().max())


def images(name: str, count: int = 2) -> torch.Tensor:
    size = max(64, get_backbone(name).least_size)
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def resnet18():
    torch.manual_seed(0)
    return full_model("resnet18")


@pytest.fixture(scope="module")
def weights(resnet18, tmp_path_factory):
    """A torchvision state dict on disk."""
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(resnet18.state_dict(), path)
    return path


# --- two ways, one answer


@pytest.mark.parametrize("name", BACKBONES)
def test_features_are_torchvisions_and_folding_does_not_change_them(name, tmp_path):
    torch.manual_seed(0)
    encoder = Encoder(name)
    if name in PUBLISHED:
        model = full_model(name)
        save_file(older_names(model.state_dict()), tmp_path / "full.safetensors")
        load_weights(encoder.cnn, name, tmp_path / "full.safetensors")
    else:
        stir(encoder)
    batch, light, prepared = images(name), fold_batch_norm(encoder), prepare_encoder(encoder, "cpu")
    with torch.no_grad():
        features, folded = encoder(batch), light(batch)
        fused, other_size = prepared(batch), prepared(batch[:1])
    assert features.shape[::2] == (2, get_backbone(name).channels)
    assert close(folded, features) and close(fused, features) and close(other_size, features[:1])
    assert not any(isinstance(part, nn.BatchNorm2d) for part in light.modules())
    if name == "vit_b_16":  # torchvision's other way to another image size
        state = interpolate_embeddings(batch.shape[-1], 16, model.state_dict())
        model = full_model(name, batch.shape[-1])
        model.load_state_dict(state)
    if name in PUBLISHED:
        theirs = torchvision_features(model, batch)
        assert theirs.abs().max() > 0 and close(features, theirs)


@pytest.mark.parametrize("name", BACKBONES)
def test_positions_are_row_by_row_and_gradients_reach_the_last_stages(name):
    """The features of a corner change more with that corner of the image than with another."""
    torch.manual_seed(0)
    row, encoder = get_backbone(name), Encoder(name, "last")
    size = 4 * max(row.size_multiple, row.least_size)
    plain, right, below = torch.randn(1, 3, size, size).repeat(3, 1, 1, 1)
    right[:, : size // 3, -size // 3 :] *= -3
    below[:, -size // 3 :, : size // 3] *= -3
    batch = torch.stack([plain, right, below])
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # its statistics become the batch's: small features would vanish
    with torch.no_grad():
        encoder.cnn.train()(batch)
    plain, *corners = encoder.train()(batch)
    side = math.isqrt(len(plain))
    assert side > 1 and plain.shape == (side**2, row.channels)
    by_right, by_below = ((each - plain).square().sum(1) for each in corners)
    assert by_right[side - 1] > by_below[side - 1]
    assert by_below[-side] > by_right[-side]
    corners[0].square().sum().backward()
    for stage in row.last_stages:
        parameters = encoder.cnn.get_submodule(stage).parameters()
        assert all(parameter.grad.any() for parameter in parameters), stage
    first = next(encoder.cnn.parameters())
    assert first.grad is None and not first.requires_grad


@pytest.mark.parametrize("name", BACKBONES)
def test_the_least_size_of_an_image_is_enough(name):
    row, encoder = get_backbone(name), Encoder(name)
    with torch.no_grad():
        assert encoder(torch.zeros(1, 3, row.least_size, row.least_size)).shape[1] >= 1
    EncoderConfig(name, img_size=row.least_size).validate()
    EncoderConfig(name).validate()


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
@pytest.mark.parametrize("classifier", [True, False])
@pytest.mark.parametrize("half", [False, True])
def test_weights_are_the_same_from_every_kind_of_file(kind, classifier, half, resnet18, tmp_path):
    state = {
        name: tensor.half().float() if tensor.is_floating_point() else tensor
        for name, tensor in resnet18.state_dict().items()
    }
    kept = {
        name: tensor.half() if half and tensor.is_floating_point() else tensor
        for name, tensor in state.items()
        if classifier or not name.startswith("fc.")
    }
    path = tmp_path / f"weights.{kind}"
    torch.save(kept, path) if kind == "pth" else save_file(kept, path)
    encoder = build_encoder("resnet18", path)
    loaded = encoder.cnn.state_dict()
    assert loaded and all(torch.equal(tensor, state[name]) for name, tensor in loaded.items())
    assert next(encoder.parameters()).dtype == torch.float32


def test_a_captioners_checkpoint_gives_its_cnn(resnet18, tmp_path):
    state = {f"encoder.cnn.{name}": tensor for name, tensor in resnet18.state_dict().items()}
    save_file({**state, "decoder.norm.weight": torch.ones(3)}, tmp_path / "best.safetensors")
    encoder = build_encoder("resnet18", tmp_path / "best.safetensors")
    for name, tensor in encoder.cnn.state_dict().items():
        assert torch.equal(tensor, resnet18.state_dict()[name])


def test_weights_without_batch_counters_are_read(resnet18, tmp_path):
    state = {k: v for k, v in resnet18.state_dict().items() if "num_batches" not in k}
    torch.save(collections.OrderedDict(state), tmp_path / "old.pth")
    encoder = build_encoder("resnet18", str(tmp_path / "old.pth"))
    assert torch.equal(encoder.cnn.conv1.weight, resnet18.conv1.weight)


def test_weights_in_torchs_cache_are_used_without_a_network(
    weights, resnet18, tmp_path, no_network
):
    place = tmp_path / "hub" / "checkpoints" / RESNET18_FILE
    place.parent.mkdir(parents=True)
    place.write_bytes(weights.read_bytes())
    for word in ("default", "IMAGENET1K_V1", "DEFAULT"):
        encoder = build_encoder("resnet18", word)
        assert torch.equal(encoder.cnn.conv1.weight, resnet18.conv1.weight)
    place.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{re.escape(str(place))} is not a readable state dict"):
        build_encoder("resnet18", "default")


def test_the_fingerprint_is_of_the_weights_alone(weights):
    encoder = build_encoder("resnet18", weights)
    mark = fingerprint(encoder)
    assert re.fullmatch("[0-9a-f]{16}", mark)
    assert fingerprint(build_encoder("resnet18", weights, finetune=True)) == mark
    assert fingerprint(encoder.to(memory_format=torch.contiguous_format)) == mark
    encoder.cnn.bn1.num_batches_tracked += 1
    assert fingerprint(encoder) == mark
    encoder.cnn.layer4[1].bn2.running_mean[3] += 1e-3
    assert fingerprint(encoder) != mark


# --- what learns


def test_frozen_and_finetuned_statistics_do_not_move_and_live_ones_do(weights):
    for source, finetune, moves in ((weights, None, 0), (weights, True, 0), ("none", None, 1)):
        encoder = build_encoder("resnet18", source, finetune=finetune)
        nn.Sequential(encoder).train()
        before = {name: tensor.clone() for name, tensor in encoder.named_buffers()}
        encoder(images("resnet18"))
        moved = [
            name
            for name, tensor in encoder.named_buffers()
            if not torch.equal(tensor, before[name])
        ]
        assert len(moved) == moves * len(before)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "tiny"])
@pytest.mark.parametrize("trained", ["none", "last", "all"])
def test_a_step_changes_exactly_what_learns(name, trained):
    torch.manual_seed(0)
    encoder = Encoder(name, trained)
    stir(encoder)
    before = copy.deepcopy(dict(encoder.cnn.named_parameters()))
    features = encoder(images(name))
    assert features.requires_grad == (trained != "none")
    if trained != "none":
        features.square().mean().backward()
        torch.optim.Adam(encoder.parameters(), lr=0.1).step()
    stages = get_backbone(name).last_stages
    for part, parameter in encoder.cnn.named_parameters():
        learns = trained == "all" or (
            trained == "last" and any(part.startswith(f"{stage}.") for stage in stages)
        )
        assert torch.equal(parameter, before[part]) != learns, part


def test_folding_leaves_the_encoder_as_it_was():
    encoder = Encoder("tiny", "all")
    stir(encoder)
    state = copy.deepcopy(encoder.state_dict())
    light = fold_batch_norm(encoder)
    assert encoder.training and all(parameter.requires_grad for parameter in encoder.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in encoder.state_dict().items())
    assert not light.train().training and not any(p.requires_grad for p in light.parameters())


# --- the image transform


def coordinates(width: int, height: int) -> Image.Image:
    """An image whose red says how far right a pixel is, and green how far down."""
    y, x = np.mgrid[:height, :width]
    planes = [x * 255 / (width - 1), y * 255 / (height - 1), 0 * x]
    return Image.fromarray(np.stack(planes, axis=2).round().astype(np.uint8))


def denormalised(pixels: torch.Tensor) -> torch.Tensor:
    """Normalised pixels back to 0..1."""
    return pixels * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]


@pytest.mark.parametrize("size", [(90, 60), (30, 200), (64, 64)])
def test_evaluation_squashes_the_whole_image(size):
    image = coordinates(*size)
    pixels = image_transform(64, train=False)(image)
    assert pixels.shape == (3, 64, 64) and pixels.dtype == torch.float32
    wanted = image.resize((64, 64), Image.Resampling.BILINEAR)
    expected = torch.from_numpy(np.array(wanted)).permute(2, 0, 1) / 255
    assert torch.allclose(denormalised(pixels), expected, atol=1e-6)
    assert (
        denormalised(pixels)[0, :, 0].max() < 0.03 and denormalised(pixels)[0, :, -1].min() > 0.97
    )


@pytest.mark.parametrize("size", [(150, 100), (80, 160), (100, 100)])
def test_a_training_crop_is_random_and_nearly_of_the_images_own_shape(size):
    transform, lefts = image_transform(64, train=True), set()
    torch.manual_seed(0)
    for _ in range(20):
        pixels = denormalised(transform(coordinates(*size)))
        x, y = pixels[0].mean(0), pixels[1].mean(1)
        wide, high = x[-1] - x[0] + 0.02, y[-1] - y[0] + 0.02
        assert wide * high > 0.77 and 0.85 < wide / high < 1.18
        lefts.add(round(float(x[0]), 2))
    assert len(lefts) > 4


def test_too_small_an_image_size_is_an_error():
    with pytest.raises(ValueError, match="image size 31 is too small; use at least 32"):
        image_transform(31, train=False)
    with pytest.raises(ValueError, match=r"--img-size 64 is too small for inception_v3; .* 75"):
        EncoderConfig(cnn_backbone="inception_v3", img_size=64).validate()
    with pytest.raises(ValueError, match="--img-size 230 does not fit vit_b_16; .* multiple of 16"):
        EncoderConfig(cnn_backbone="vit_b_16", img_size=230).validate()
    EncoderConfig(cnn_backbone="inception_v3", img_size=75).validate()


# --- errors by their message


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    def refuse(*args, **keywords):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))


def test_no_network_names_the_file_its_address_and_its_place(no_network, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        build_encoder("resnet18", "default")
    said = str(caught.value)
    place = tmp_path / "hub" / "checkpoints" / RESNET18_FILE
    assert f"https://download.pytorch.org/models/{RESNET18_FILE}" in said
    assert f"put it at {place}" in said and "Name or service not known" in said
    assert "\n" not in said and not list(place.parent.glob("*"))


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match="backbone 'resnet5' is not known; choose from convnext_t"):
        build_encoder("resnet5", "none")
    known = "default, none, IMAGENET1K_V1, or the path"
    with pytest.raises(ValueError, match=f"weights 'V3' are not known for resnet18; .* {known}"):
        build_encoder("resnet18", "V3")
    for word in ("default", "IMAGENET1K_V1"):
        with pytest.raises(
            ValueError, match="'tiny' has no published weights; use --cnn-weights n"
        ):
            build_encoder("tiny", word)


def test_a_server_that_says_nothing_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr("encoder.DOWNLOAD_TIMEOUT", 0.2)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    before = socket.getdefaulttimeout()
    with socket.create_server(("127.0.0.1", 0)) as silent:

        class Published:
            url = f"http://127.0.0.1:{silent.getsockname()[1]}/resnet18.pth"

            def get_state_dict(self, **how):
                return torch.hub.load_state_dict_from_url(self.url, str(tmp_path), progress=False)

        with pytest.raises(FileNotFoundError, match="could not be downloaded .*timed out"):
            fetch_weights(Published())
    assert socket.getdefaulttimeout() == before


def test_a_folder_of_the_name_of_weights_is_not_taken_for_them(tmp_path, monkeypatch, no_network):
    (tmp_path / "default").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="could not be downloaded"):
        build_encoder("resnet18", "default")


class Other:
    pass


def test_files_that_are_no_state_dict_say_so_in_a_line(weights, tmp_path):
    torch.save({"conv1.weight": Other()}, tmp_path / "class.pth")
    torch.save({"model": {"conv1.weight": torch.zeros(1)}}, tmp_path / "nested.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    whole = weights.read_bytes()
    for name, content in {
        "half.pth": whole[: len(whole) // 2],
        "empty.pth": b"",
        "page.pth": b"<html>404</html>",
        "page.safetensors": b"<html>404</html>",
    }.items():
        (tmp_path / name).write_bytes(content)
    expected = {
        "gone.pth": "no CNN weights at",
        "class.pth": "holds test_encoder.Other, not only tensors",
        "nested.pth": "expected names and tensors only",
        "list.pth": "expected names and tensors only",
        "half.pth": "is damaged, or something else",
        "empty.pth": "is damaged, or something else",
        "page.pth": "is damaged, or something else",
        "page.safetensors": "is damaged, or something else",
    }
    for name, said in expected.items():
        with pytest.raises((ValueError, FileNotFoundError), match=said) as caught:
            build_encoder("resnet18", tmp_path / name)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_weights_of_another_architecture_say_what_does_not_fit(weights, tmp_path):
    with pytest.raises(ValueError, match=r"not a mobilenet_v2 state dict: it has no features\.0"):
        build_encoder("mobilenet_v2", weights)
    with pytest.raises(ValueError, match=r"not a resnet34 state dict: it has no layer1\.2\.conv1"):
        build_encoder("resnet34", weights)
    with pytest.raises(ValueError, match=r"resnet50: layer1\.0\.conv1\.weight has .* 3, 3\), exp"):
        build_encoder("resnet50", weights)
    # All that a resnet18 wants is in a resnet34, in the right shapes.
    save_file(Encoder("resnet34").cnn.state_dict(), tmp_path / "larger.safetensors")
    with pytest.raises(ValueError, match=r"not a resnet18 state dict: resnet18 has no layer\d\."):
        build_encoder("resnet18", tmp_path / "larger.safetensors")


def test_statistics_that_did_not_fit_into_float16_are_an_error(resnet18, tmp_path):
    state = copy.deepcopy(resnet18.state_dict())
    state["bn1.running_var"][5] = 83_614
    torch.save({k: v.half() for k, v in state.items()}, tmp_path / "half.pth")
    with pytest.raises(ValueError, match=r"bn1\.running_var holds infinity or NaN"):
        build_encoder("resnet18", tmp_path / "half.pth")


def test_the_cnn_of_a_captioner_with_int8_is_read(tmp_path):
    path = tmp_path / "captioner.safetensors"
    tiny_model().save(path, int8=True)
    found, expected = build_encoder("tiny", path), CaptionModel.load(path).encoder
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state | {"fc.weight": state["fc.weight"].to(torch.int8)}, "fc.weight_scale"),
        (lambda state: {k: v.to(torch.int8) for k, v in state.items()}, "weight_scale is missing"),
        (lambda state: state | {"bn1.bias": torch.ones(64).byte()}, "bn1.bias holds torch.uint8"),
        (lambda state: state | {"conv1.weight": state["conv1.weight"].int()}, "conv1.weight holds"),
    ],
)
def test_integers_in_place_of_weights_are_refused(change, said, resnet18, tmp_path):
    path = tmp_path / "cnn.safetensors"
    save_file(change(resnet18.state_dict()), path)
    with pytest.raises(ValueError, match=rf"cnn\.safetensors .*{said}"):
        build_encoder("resnet18", path)


@pytest.mark.parametrize("grid", [1, 2, 4, 6])
def test_a_grid_averages_the_map(grid):
    images = torch.rand(2, 3, 128, 128)
    whole, averaged = Encoder("tiny").eval(), Encoder("tiny", grid=grid).eval()
    averaged.load_state_dict(whole.state_dict())
    found, maps = averaged(images), whole(images).transpose(1, 2).unflatten(2, (8, 8))
    assert found.shape == (2, grid * grid, 128)
    corner = maps[:, :, : math.ceil(8 / grid), : math.ceil(8 / grid)]
    torch.testing.assert_close(found[:, 0], corner.mean((2, 3)))


def test_a_grid_of_nothing_is_refused():
    with pytest.raises(ValueError, match="--grid 0 must be at least 1"):
        EncoderConfig(grid=0).validate()


def test_a_grid_finer_than_the_map_is_refused():
    encoder = Encoder("tiny", grid=9).eval()
    with pytest.raises(ValueError, match="--grid 9 is finer than the 4 x 4 positions that tiny"):
        encoder(torch.rand(1, 3, 64, 64))


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_pixels_are_those_of_torchvisions_own_transform(mode):
    from torchvision.transforms import v2

    noise = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    expected = v2.Compose([
        v2.Resize((64, 64)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
    ])(image.convert("RGB"))  # fmt: skip
    torch.testing.assert_close(image_transform(64, train=False)(image), expected, atol=1e-5, rtol=0)
