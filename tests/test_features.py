"""The cache is the encoder's own output, and says what made it."""

import functools
import io
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import caches
from helpers.caches import build, contents, leftovers, stirred, stop_after
from PIL import Image
from torch import nn

import features
from encoder import BACKBONES, Encoder, backbone, folded, image_transform
from features import FeatureCache, cached_features, describe, encode_images
from util.images import read_image

# The pictures, the encoder and the cache of caches.py, made once for this file.
one_thread, records = caches.one_thread, caches.records
encoder, whole = caches.encoder, caches.whole


# --- two ways, one answer


@pytest.mark.parametrize("name", BACKBONES)
def test_the_cache_is_the_encoder_on_the_pixels(name, records, tmp_path):
    encoder, size = stirred(name), max(64, backbone(name).least_size)
    cache = build(records[:3], encoder, tmp_path, size=size)
    transform = image_transform(size, train=False)
    pixels = torch.stack([transform(read_image(record.path)) for record in records[:3]])
    with torch.no_grad():
        expected = encoder(pixels)
    cached = torch.stack([cache.get(record.image_id) for record in records[:3]])
    assert cached.dtype == torch.float16 and cached.shape == expected.shape
    assert expected.abs().max() > 0
    error = (cached.float() - expected).abs().max() / expected.abs().max()
    assert error < 2**-10  # float16 has 11 bits


def test_the_file_is_float16_by_image_view_position_and_channel(whole, records):
    array = np.load(whole.path)
    assert array.shape == (11, 1, 4, 128) and array.dtype == np.float16
    for row, record in enumerate(records):
        assert record.image_id in whole
        assert np.array_equal(whole.get(record.image_id).numpy(), array[row, 0])
    assert "other.png" not in whole
    assert isinstance(whole.array, np.memmap)


def test_batches_and_workers_change_nothing_that_float16_shows(whole, records, encoder, tmp_path):
    other = build(records, encoder, tmp_path, batch_size=4, workers=2)
    assert np.allclose(other.array, whole.array, rtol=2e-3, atol=1e-4)
    assert other.description == whole.description


def test_a_made_cache_is_read_and_not_made_again(whole, records, encoder, monkeypatch):
    before = contents(whole)
    stop_after(monkeypatch, 0)
    again = build(records, encoder, whole.path.parent)
    assert again.path == whole.path and contents(again) == before
    assert leftovers(whole.path.parent) == {".npy", ".json"}


# --- what made a cache


def test_a_cache_says_what_made_it(whole, records, encoder):
    description = whole.description
    assert description["backbone"] == "tiny" and description["img_size"] == 32
    assert description["image_ids"] == [record.image_id for record in records]
    assert {"weights", "transform", "views", "left_out"} <= description.keys()
    assert str(records[0].path.parent) not in json.dumps(description)
    assert describe(records, encoder, 32) == {
        key: value for key, value in description.items() if key != "left_out"
    }


def test_other_weights_sizes_and_images_have_caches_of_their_own(records, encoder, tmp_path):
    other = stirred("tiny")
    other.cnn.conv0.weight.data[0, 0, 0, 0] += 1
    for count, arguments in enumerate(
        [(records, encoder), (records, other), (records[:5], encoder), (records[::-1], encoder)], 1
    ):
        cache = build(*arguments, tmp_path)
        assert len(list(tmp_path.glob("*.npy"))) == count
        assert len(cache.rows) == len(arguments[0])
    assert build(records, encoder, tmp_path, size=64).get("000.png").shape == (16, 128)
    pooled = Encoder("tiny", grid=1)
    pooled.load_state_dict(encoder.state_dict())
    assert build(records, pooled, tmp_path).get("000.png").shape == (1, 128)


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("backbone", "resnet18", ("'tiny'", "'resnet18'")),
        ("img_size", 64, ("32", "64")),
        ("weights", "0123456789abcdef", ("'[0-9a-f]{16}'", "'0123456789abcdef'")),
        ("image_ids", ["a.jpg"], (r"\['000.png', .*… \(sha [0-9a-f]{8}\)", r"\['a.jpg'\]")),
        ("transform", "crop", ("'squash-bilinear-imagenet'", "'crop'")),
    ],
)
def test_a_cache_of_something_else_shows_both_values(key, value, shown, whole):
    expected = {**whole.description, key: value}
    with pytest.raises(ValueError, match=f"has {key} {shown[0]}, but {shown[1]} is wanted"):
        FeatureCache(whole.path, expected)


def test_a_damaged_cache_says_so(whole, tmp_path):
    path = Path(shutil.copy(whole.path, tmp_path / "c.npy"))
    about = Path(shutil.copy(whole.path.with_suffix(".json"), tmp_path / "c.json"))
    os.truncate(path, 1000)
    with pytest.raises(ValueError, match=r"c\.npy is damaged .*delete it"):
        FeatureCache(path)
    about.write_text("[]")
    with pytest.raises(ValueError, match=r"c\.json does not describe a feature cache"):
        FeatureCache(path)


def test_a_cache_that_lost_its_array_is_made_again(whole, records, encoder, tmp_path):
    before = contents(build(records, encoder, tmp_path))
    next(tmp_path.glob("*.npy")).unlink()
    assert contents(build(records, encoder, tmp_path)) == before == contents(whole)


def test_a_worker_process_gets_the_files_name_and_not_its_contents(whole):
    sent = pickle.dumps(whole)
    assert len(sent) < 1000
    assert torch.equal(pickle.loads(sent).get("003.png"), whole.get("003.png"))


def test_no_images_are_an_error(encoder, tmp_path):
    with pytest.raises(ValueError, match="no images to encode for test"):
        build([], encoder, tmp_path)


# --- several views


def test_views_are_the_image_its_mirror_image_and_parts_of_it(records, encoder, whole, tmp_path):
    cache = build(records, encoder, tmp_path, views=4)
    assert cache.array.shape[:2] == (len(records), 4)
    mirrored = image_transform(32, train=False)
    for record in records[:3]:
        seen = [cache.get(record.image_id, view) for view in range(4)]
        assert torch.equal(seen[0], whole.get(record.image_id))
        pixels = mirrored(read_image(record.path).transpose(Image.Transpose.FLIP_LEFT_RIGHT))
        expected = folded(encoder)(pixels[None])[0].half()
        torch.testing.assert_close(seen[1], expected, atol=2e-3, rtol=2e-3)
        for one in range(4):
            assert not any(torch.equal(seen[one], seen[other]) for other in range(one))


def test_views_are_the_same_each_time_and_for_any_batch(records, encoder, tmp_path):
    first = build(records, encoder, tmp_path / "first", views=3, batch_size=6)
    again = build(records, encoder, tmp_path / "again", views=3, batch_size=1)
    assert torch.allclose(
        *(torch.from_numpy(each.array).float() for each in (first, again)), atol=1e-3
    )


def test_caches_of_other_views_lie_side_by_side(records, encoder, tmp_path):
    paths = {build(records, encoder, tmp_path, views=views).path for views in (1, 2)}
    assert len(paths) == 2 and all(path.exists() for path in paths)


# --- the encoder's run


def test_values_beyond_float16_stay_finite(records):
    encoder = Encoder("tiny")
    for bias in (encoder.cnn.bn4.bias.data, encoder.cnn.bn4.running_mean):
        bias.fill_(1e6)
    encoder.cnn.bn4.running_mean.zero_()
    ((batch, lost),) = encode_images(records[:2], encoder, 32, workers=0)
    assert batch.dtype == torch.float16 and bool((batch == 65504).all()) and lost == []


def test_encoding_leaves_the_callers_gradients_on(records, encoder):
    for batch, _ in encode_images(records[:3], encoder, 32, batch_size=2, workers=0):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        weight = torch.ones(1, requires_grad=True)
        (batch.float() * weight).sum().backward()


def test_the_encoder_runs_folded_and_channels_last(records, encoder, monkeypatch):
    ran = []

    def watched(original):
        light = features_folded(original)
        light.cnn.register_forward_pre_hook(lambda module, given: ran.append((light, given[0])))
        return light

    features_folded = features.folded
    monkeypatch.setattr(features, "folded", watched)
    list(encode_images(records[:4], encoder, 32, workers=0))
    ((light, pixels),) = ran
    assert not any(isinstance(part, nn.BatchNorm2d) for part in light.modules())
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    assert light.cnn.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_progress_shows_images_per_second(records, encoder, tmp_path, monkeypatch):
    said, tqdm = io.StringIO(), features.tqdm

    @functools.wraps(tqdm)
    def shown(*arguments, **keywords):
        return tqdm(*arguments, **{**keywords, "disable": False, "file": said, "mininterval": 0})

    monkeypatch.setattr(features, "tqdm", shown)
    build(records, encoder, tmp_path)
    assert "11/11" in said.getvalue() and " images/s" in said.getvalue()


def test_bfloat16_features_are_nearly_those_of_float32_in_a_cache_of_their_own(
    records, encoder, tmp_path, monkeypatch
):
    monkeypatch.setattr("features.multiplies_bfloat16", lambda device: True)
    arguments = (records, encoder, 64, tmp_path, "train")
    plain, quick = (cached_features(*arguments, workers=0, amp=amp) for amp in (False, True))
    assert plain.path != quick.path
    assert (plain.description["precision"], quick.description["precision"]) == (
        "float32", "bfloat16",
    )  # fmt: skip
    for record in records:
        one, two = (cache.get(record.image_id).float() for cache in (plain, quick))
        assert float(torch.cosine_similarity(one.flatten(), two.flatten(), dim=0)) > 0.999
        assert not torch.equal(one, two)


def test_without_such_a_device_features_are_float32(records, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr("features.multiplies_bfloat16", lambda device: False)
    cache = cached_features(records, encoder, 64, tmp_path, "train", workers=0, amp=True)
    assert cache.description["precision"] == "float32"
