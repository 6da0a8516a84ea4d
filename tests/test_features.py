"""The cache holds the encoder's output, and its description says what it was made from."""

import io
import json
import os
import pickle
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import caches
from helpers.caches import (
    ExtractionStoppedError,
    build,
    contents,
    make_encoder,
    make_images,
    stop_after,
    suffixes,
)
from PIL import Image

import features
from encoder import (
    BACKBONES,
    Encoder,
    fold_batch_norm,
    get_backbone,
    image_transform,
    prepare_encoder,
)
from features import FeatureCache, cached_features, describe, encode_images
from readers import Record
from util import extraction
from util.images import read_image

# Fixtures, made once for this file.
one_thread, records = caches.one_thread, caches.records
encoder, reference = caches.encoder, caches.reference


# --- the contents


@pytest.mark.parametrize("name", BACKBONES)
def test_the_cache_holds_the_encoders_output(name, records, tmp_path):
    encoder, size = make_encoder(name), max(64, get_backbone(name).least_size)
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


def test_the_file_is_float16_of_image_view_position_and_channel(reference, records):
    array = np.load(reference.path)
    assert array.shape == (11, 1, 4, 128) and array.dtype == np.float16
    for row, record in enumerate(records):
        assert record.image_id in reference
        assert np.array_equal(reference.get(record.image_id).numpy(), array[row, 0])
    assert "other.png" not in reference and len(reference) == 11
    with pytest.raises(KeyError):
        reference.get("other.png")


def test_batch_size_and_workers_change_no_feature(reference, records, encoder, tmp_path):
    other = build(records, encoder, tmp_path, batch_size=4, workers=2)
    arrays = [np.load(cache.path) for cache in (other, reference)]
    assert np.allclose(*arrays, rtol=2e-3, atol=1e-4)
    assert other.description == reference.description


def test_an_existing_cache_is_not_extracted_again(reference, records, encoder, monkeypatch):
    before = contents(reference)
    stop_after(monkeypatch, 0)
    again = build(records, encoder, reference.path.parent)
    assert again.path == reference.path and contents(again) == before
    assert suffixes(reference.path.parent) == {".npy", ".json"}


# --- the description


def test_the_description_says_what_the_cache_was_made_from(reference, records, encoder):
    description = reference.description
    assert description["backbone"] == "tiny" and description["img_size"] == 32
    assert description["image_ids"] == [record.image_id for record in records]
    assert {"weights", "transform", "views", "left_out"} <= description.keys()
    assert str(records[0].path.parent) not in json.dumps(description)
    added = {"left_out", "shape", "checksums", "sources", "reading"}
    assert describe(records, encoder, 32) == {
        key: value for key, value in description.items() if key not in added
    }


def test_other_weights_sizes_and_images_have_separate_caches(records, encoder, tmp_path):
    other = make_encoder("tiny")
    other.cnn.conv0.weight.data[0, 0, 0, 0] += 1
    for count, arguments in enumerate(
        [(records, encoder), (records, other), (records[:5], encoder), (records[::-1], encoder)], 1
    ):
        cache = build(*arguments, tmp_path)
        assert len(list(tmp_path.glob("*.npy"))) == count
        assert len(cache) == len(arguments[0])
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
def test_the_error_for_an_unexpected_cache_shows_both_values(key, value, shown, reference):
    expected = {**reference.description, key: value}
    with pytest.raises(ValueError, match=f"has {key} {shown[0]}, but {shown[1]} is wanted"):
        FeatureCache(reference.path, expected)


def test_a_damaged_cache_is_an_error(reference, tmp_path):
    path = Path(shutil.copy(reference.path, tmp_path / "c.npy"))
    about = Path(shutil.copy(reference.path.with_suffix(".json"), tmp_path / "c.json"))
    os.truncate(path, 1000)
    with pytest.raises(ValueError, match=r"c\.npy is damaged .*delete it"):
        FeatureCache(path)
    about.write_text("[]")
    with pytest.raises(ValueError, match=r"c\.json does not describe a feature cache"):
        FeatureCache(path)


def test_a_cache_whose_array_was_deleted_is_made_again(reference, records, encoder, tmp_path):
    before = contents(build(records, encoder, tmp_path))
    next(tmp_path.glob("*.npy")).unlink()
    assert contents(build(records, encoder, tmp_path)) == before == contents(reference)


def test_a_worker_process_receives_the_path_and_not_the_contents(reference):
    sent = pickle.dumps(reference)
    assert len(sent) < 1000
    assert torch.equal(pickle.loads(sent).get("003.png"), reference.get("003.png"))


@pytest.mark.parametrize(
    ("records", "key"),
    [
        ([Record("a.png", Path("a.png"), ("x",)), Record("\udcff.png", Path("b.png"), ())],
         "2484249c8b"),
        ([Record(number, Path("gone.png"), ()) for number in range(9000)], "c1bfb7e391"),
    ],
    ids=["names", "numbers in several files"],
)  # fmt: skip
def test_the_key_of_a_cache_has_not_changed(records, key, tmp_path, monkeypatch):
    """Caches made by earlier versions must be found."""
    monkeypatch.chdir(tmp_path)
    Path("a.png").write_bytes(b"12345")
    encoder = Encoder("tiny")
    for number, tensor in enumerate(encoder.state_dict().values()):
        tensor.copy_(torch.full_like(tensor, number % 5 + 1))
    stop_after(monkeypatch, 0)
    with pytest.raises(ExtractionStoppedError):
        build(records, encoder, tmp_path, views=2)
    assert (tmp_path / f"test-tiny-32-{key}.lock").exists()


def test_no_images_are_an_error(encoder, tmp_path):
    with pytest.raises(ValueError, match="no images to encode for test"):
        build([], encoder, tmp_path)


# --- views


def test_views_are_the_image_its_mirror_image_and_crops(records, encoder, reference, tmp_path):
    cache = build(records, encoder, tmp_path, views=4)
    assert np.load(cache.path).shape[:2] == (len(records), 4)
    transform = image_transform(32, train=False)
    for record in records[:3]:
        seen = [cache.get(record.image_id, view) for view in range(4)]
        assert torch.equal(seen[0], reference.get(record.image_id))
        pixels = transform(read_image(record.path).transpose(Image.Transpose.FLIP_LEFT_RIGHT))
        expected = fold_batch_norm(encoder)(pixels[None])[0].half()
        torch.testing.assert_close(seen[1], expected, atol=2e-3, rtol=2e-3)
        for one in range(4):
            assert not any(torch.equal(seen[one], seen[other]) for other in range(one))


def test_images_and_views_are_cropped_each_in_its_own_way(records, encoder, tmp_path):
    twins = [records[0], records[1]._replace(path=records[0].path)]
    cache = build(twins, encoder, tmp_path, views=5)
    first, second = ([cache.get(each.image_id, view) for view in range(5)] for each in twins)
    same = [torch.equal(*pair) for pair in zip(first, second, strict=True)]
    assert same == [True, True, False, False, False]
    assert not torch.equal(first[2], first[4])  # neither is mirrored


def test_views_do_not_depend_on_the_batch(records, encoder, tmp_path):
    first = build(records, encoder, tmp_path / "first", views=3, batch_size=6)
    again = build(records, encoder, tmp_path / "again", views=3, batch_size=1)
    arrays = [np.load(cache.path).astype(np.float32) for cache in (first, again)]
    assert np.allclose(*arrays, atol=1e-3)


def test_caches_of_different_views_are_separate(records, encoder, tmp_path):
    paths = {build(records, encoder, tmp_path, views=views).path for views in (1, 2)}
    assert len(paths) == 2 and all(path.exists() for path in paths)


# --- encode_images


def test_values_beyond_float16_stay_finite(records):
    encoder = Encoder("tiny")
    for bias in (encoder.cnn.bn4.bias.data, encoder.cnn.bn4.running_mean):
        bias.fill_(1e6)
    encoder.cnn.bn4.running_mean.zero_()
    (batch,) = encode_images(records[:2], encoder, 32, workers=0)
    assert batch.features.dtype == torch.float16 and bool((batch.features == 65504).all())


@pytest.mark.parametrize(("views", "workers"), [(1, 0), (3, 1)])
def test_the_seed_of_an_image_is_the_checksum_of_its_pixels(views, workers, records, encoder):
    settings = {"batch_size": 4, "workers": workers, "views": views}
    batches = list(encode_images(records, encoder, 32, **settings))
    transform = image_transform(32, train=False)
    expected = [
        zlib.crc32(transform(read_image(record.path)).contiguous().numpy()) for record in records
    ]
    assert [seed for batch in batches for seed in batch.seeds] == expected
    assert len(set(expected)) == len(records) and {type(seed) for seed in batches[0].seeds} == {int}


def test_an_unreadable_image_has_a_row_of_zeros(encoder, tmp_path):
    records = make_images(tmp_path, 5)
    records[3].path.write_bytes(b"<html>")
    first, second, third = encode_images(records, encoder, 32, batch_size=2, workers=0)
    assert [batch.unreadable for batch in (first, second, third)] == [[], ["003.png"], []]
    assert second.features[0].any() and not second.features[1].any()
    assert [len(batch.seeds) for batch in (first, second, third)] == [2, 2, 1]


def test_gradients_stay_enabled_for_the_caller(records, encoder):
    for batch in encode_images(records[:3], encoder, 32, batch_size=2, workers=0):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        weight = torch.ones(1, requires_grad=True)
        (batch.features.float() * weight).sum().backward()


@pytest.mark.parametrize(("amp", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_the_encoder_is_prepared_for_inference_once(amp, dtype, records, encoder, monkeypatch):
    prepared = []

    def prepare(*arguments):
        prepared.append(arguments)
        return prepare_encoder(*arguments)

    monkeypatch.setattr(features, "prepare_encoder", prepare)
    batches = list(encode_images(records[:4], encoder, 32, batch_size=2, workers=0, amp=amp))
    assert len(batches) == 2 and prepared == [(encoder, "cpu", dtype)]


def test_progress_shows_images_per_second(records, encoder, tmp_path, monkeypatch):
    output, bar = io.StringIO(), extraction.progress_bar
    visible = {"disable": False, "file": output, "mininterval": 0}
    monkeypatch.setattr(extraction, "progress_bar", lambda **how: bar(**{**how, **visible}))
    build(records, encoder, tmp_path)
    assert "11/11" in output.getvalue() and " images/s" in output.getvalue()


def test_bfloat16_features_are_close_to_float32_and_cached_separately(
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


def test_a_device_without_bfloat16_makes_float32_features(records, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr("features.multiplies_bfloat16", lambda device: False)
    cache = cached_features(records, encoder, 64, tmp_path, "train", workers=0, amp=True)
    assert cache.description["precision"] == "float32"
