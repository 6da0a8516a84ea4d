"""The cache is the encoder's own output, however often the work was broken off."""

import errno
import functools
import io
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import features
import files
from encoder import BACKBONES, Encoder, backbone, folded, image_transform
from features import FeatureCache, cached_features, describe, encode_images
from images import read_image
from records import Record


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Rounding may depend on the number of threads, and a forked process can have but one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(folder: Path, count: int) -> list[Record]:
    """Write pictures that all differ."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for number in range(count):
        name = f"{number:03}.png"
        values = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(values).resize((40, 30)).save(folder / name)
        made.append(Record(name, folder / name, ("a dog",)))
    return made


def stirred(name: str) -> Encoder:
    """A frozen encoder, the same at every call, whose BatchNorm has something to do."""
    torch.manual_seed(0)
    encoder = Encoder(name)
    for part in encoder.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 1.0  # its statistics become those of the one batch it sees here
    size = max(64, backbone(name).least_size)
    encoder.cnn.train()
    with torch.no_grad():
        encoder(torch.rand(4, 3, size, size) * 4 - 2)
    for part in encoder.modules():
        if isinstance(part, nn.BatchNorm2d):  # a channel that said nothing would drown in rounding
            part.running_var.clamp_(min=0.01)
    return encoder.train()


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> list[Record]:
    return draw(tmp_path_factory.mktemp("pictures"), 11)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return stirred("tiny")


def build(records, encoder, folder, name="test", size=32, **how) -> FeatureCache:
    how = {"batch_size": 2, "workers": 0, **how}
    return cached_features(records, encoder, size, folder, name, **how)


def leftovers(folder: Path) -> set[str]:
    """The suffixes of the files in a cache folder, the lock aside."""
    return {path.suffix for path in folder.iterdir() if path.suffix != ".lock"}


@pytest.fixture(scope="module")
def whole(records, encoder, tmp_path_factory) -> FeatureCache:
    """A cache that nobody disturbed."""
    return build(records, encoder, tmp_path_factory.mktemp("whole"))


def contents(cache: FeatureCache) -> tuple[bytes, bytes]:
    return cache.path.read_bytes(), cache.path.with_suffix(".json").read_bytes()


class Stop(Exception):  # noqa: N818
    """Stands for whatever breaks the work off."""


def stop_after(monkeypatch, count: int) -> list[Path]:
    """Break the work off after so many pictures; return the list of those that were read."""
    read = []

    def stopping(path):
        if len(read) == count:
            raise Stop
        read.append(path)
        return read_image(path)

    monkeypatch.setattr(features, "read_image", stopping)
    return read


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


@pytest.mark.parametrize("count", [1, 5, 6, 9])
def test_a_broken_off_extraction_goes_on_where_it_stopped(
    count, whole, records, encoder, tmp_path, monkeypatch
):
    monkeypatch.setattr(features, "SAVE_EVERY", 2)  # notes after 4 and 8 pictures
    stop_after(monkeypatch, count)
    with pytest.raises(Stop):
        build(records, encoder, tmp_path)
    assert ".npy" not in leftovers(tmp_path) and ".json" not in leftovers(tmp_path)
    read = stop_after(monkeypatch, 99)
    cache = build(records, encoder, tmp_path)
    assert contents(cache) == contents(whole)
    assert read == [record.path for record in records[count // 4 * 4 :]]
    assert leftovers(tmp_path) == {".npy", ".json"}


def test_killed_before_the_last_file_was_written_no_picture_is_read_again(
    whole, records, encoder, tmp_path, monkeypatch
):
    write_json = features.files.write_json

    def stopping(path, value):
        if path.suffix == ".json":
            raise Stop
        write_json(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(features.files, "write_json", stopping)
        with pytest.raises(Stop):
            build(records, encoder, tmp_path)
    stop_after(monkeypatch, 0)
    assert contents(build(records, encoder, tmp_path)) == contents(whole)
    assert leftovers(tmp_path) == {".npy", ".json"}


@pytest.mark.parametrize("gone", [".part", ".progress"])
def test_half_of_the_notes_of_a_broken_off_extraction_is_not_believed(
    gone, whole, records, encoder, tmp_path, monkeypatch
):
    monkeypatch.setattr(features, "SAVE_EVERY", 2)
    for count in (9, 3):  # the second time nothing is noted
        stop_after(monkeypatch, count)
        with pytest.raises(Stop):
            build(records, encoder, tmp_path)
        for path in tmp_path.glob(f"*{gone}"):
            path.unlink()
    stop_after(monkeypatch, 99)
    assert contents(build(records, encoder, tmp_path)) == contents(whole)


def work(records, folder: Path, last: int, count) -> None:
    """Build the cache in a process of its own, killed when it has read `last` pictures."""

    def reading(path):
        if count.value == last:
            os.kill(os.getpid(), signal.SIGKILL)
        count.value += 1
        return read_image(path)

    torch.set_num_threads(1)
    features.read_image, features.SAVE_EVERY = reading, 1
    build(records, stirred("tiny"), folder)


def start(records, folder: Path, last: int) -> tuple:
    """Start a process that builds the cache; return it and the count of pictures it has read."""
    context = multiprocessing.get_context("fork")
    count = context.Value("i", 0)
    process = context.Process(target=work, args=(records, folder, last, count))
    process.start()
    return process, count


def test_a_killed_extraction_equals_an_undisturbed_one(
    whole, records, encoder, tmp_path, monkeypatch
):
    process, count = start(records, tmp_path, 7)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and count.value == 7
    assert leftovers(tmp_path) == {".part", ".progress"}
    read = stop_after(monkeypatch, 99)
    assert contents(build(records, encoder, tmp_path)) == contents(whole)
    assert read == [record.path for record in records[6:]]


def test_two_processes_at_once_build_once_and_agree(whole, records, tmp_path):
    started = [start(records, tmp_path, 99) for _ in range(2)]
    for process, _ in started:
        process.join(60)
    assert [process.exitcode for process, _ in started] == [0, 0]
    assert sorted(count.value for _, count in started) == [0, 11]
    (path,) = tmp_path.glob("*.npy")
    assert contents(FeatureCache(path)) == contents(whole)


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


# --- pictures that can't be read


def test_a_few_unreadable_pictures_are_listed_and_left_out(encoder, tmp_path, caplog):
    records = draw(tmp_path / "pictures", 200)
    records[4].path.write_bytes(b"<html>")
    records[9].path.unlink()
    with caplog.at_level(logging.WARNING):
        cache = build(records, encoder, tmp_path / "cache", batch_size=50)
    assert caplog.messages == ["left out: 2 of 200 images can't be read: 004.png, 009.png"]
    assert len(cache.rows) == 198 and "004.png" not in cache and "009.png" not in cache
    assert not cache.array[4].any() and not cache.array[9].any() and cache.array[5].any()
    with torch.no_grad():
        pixels = image_transform(32, train=False)(read_image(records[10].path))
        expected = encoder(pixels[None])[0]
    assert torch.allclose(cache.get("010.png").float(), expected, rtol=2e-3, atol=2e-3)


def test_too_many_unreadable_pictures_leave_nothing_and_can_be_repaired(encoder, tmp_path):
    records = draw(tmp_path / "pictures", 20)
    good = records[4].path.read_bytes()
    records[4].path.write_bytes(bytes(len(good)))  # the same size: the same cache
    with pytest.raises(ValueError, match=r"1 of 20 images can't be read: 004\.png; more than 1 %"):
        build(records, encoder, tmp_path / "cache")
    assert leftovers(tmp_path / "cache") == set()
    records[4].path.write_bytes(good)
    assert "004.png" in build(records, encoder, tmp_path / "cache")


def test_no_images_are_an_error(encoder, tmp_path):
    with pytest.raises(ValueError, match="no images to encode for test"):
        build([], encoder, tmp_path)


# --- a full disk


def test_too_little_space_is_known_before_the_work(records, encoder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"test-tiny-32-.* needs 0\.0 GB .*--cache-dir on another"):
        build(records, encoder, tmp_path)
    assert leftovers(tmp_path) == set()


def test_room_for_the_whole_cache_is_taken_at_the_start(records, encoder, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match=r"No space left on device\): .*test-tiny-32"):
            build(records, encoder, tmp_path)
    assert leftovers(tmp_path) == set()
    stop_after(monkeypatch, 3)
    with pytest.raises(Stop):
        build(records, encoder, tmp_path)
    (part,) = tmp_path.glob("*.part")
    assert part.stat().st_blocks * 512 >= 2 * 11 * 4 * 128


@pytest.mark.skipif(os.name != "posix", reason="no limits of file sizes on Windows")
def test_a_full_disk_is_told_with_the_name_of_the_cache(
    whole, records, encoder, tmp_path, monkeypatch
):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write \(File too large\): .*test-tiny-32.*part"):
            build(records, encoder, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert leftovers(tmp_path) == set()
    assert contents(build(records, encoder, tmp_path)) == contents(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_extraction_that_is_asked_to_stop_does_no_picture_twice(
    number, whole, records, encoder, tmp_path, monkeypatch
):
    read = []

    def stopping(path):
        read.append(path)
        if len(read) == 7:  # batches are of three
            os.kill(os.getpid(), number)
        return read_image(path)

    with monkeypatch.context() as patch:
        patch.setattr(features, "read_image", stopping)
        with pytest.raises(SystemExit) as stop:
            files.run(lambda: build(records, encoder, tmp_path))
    assert stop.value.code == 130
    again = stop_after(monkeypatch, 99)
    assert contents(build(records, encoder, tmp_path)) == contents(whole)
    assert again == [record.path for record in records[6:]]


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


# --- several files


def test_a_cache_of_several_files_is_the_cache_of_one(
    whole, records, encoder, tmp_path, monkeypatch
):
    monkeypatch.setattr(features, "MOST_IMAGES", 3)  # whole batches of two: four images in a file
    cache = build(records, encoder, tmp_path)
    assert [len(array) for array in cache.arrays] == [4, 4, 3] and len(cache.rows) == 11
    for record in records:
        assert record.image_id in cache
        assert torch.equal(cache.get(record.image_id), whole.get(record.image_id))
    assert "other.png" not in cache and leftovers(tmp_path) == {".npy", ".json"}
    again = pickle.loads(pickle.dumps(cache))
    assert torch.equal(again.get("010.png"), whole.get("010.png"))
    stop_after(monkeypatch, 0)
    build(records, encoder, tmp_path)
    with pytest.raises(ValueError, match="has image_ids '[0-9a-f]{49}… .*, but '[0-9a-f]{49}"):
        FeatureCache(cache.path, describe(records[1:], encoder, 32))


def test_each_process_builds_its_files_and_what_another_left_undone(
    whole, records, encoder, tmp_path, monkeypatch
):
    read = stop_after(monkeypatch, 99)
    caches = [build(records, encoder, tmp_path, rank=rank, world=3) for rank in (2, 0, 1)]
    # Alone so far, the third process builds its own file first, then those of the others.
    order = [*records[8:], *records[:4], *records[4:8]]
    assert read == [record.path for record in order]
    for cache in caches:
        assert all(torch.equal(cache.get(r.image_id), whole.get(r.image_id)) for r in records)
    assert len(build(records, encoder, tmp_path).arrays) == 3  # one process takes the same files
    assert len(read) == 11


def test_an_extraction_into_several_files_goes_on_where_it_stopped(
    whole, records, encoder, tmp_path, monkeypatch
):
    monkeypatch.setattr(features, "SAVE_EVERY", 1)
    monkeypatch.setattr(features, "MOST_IMAGES", 4)
    stop_after(monkeypatch, 7)
    with pytest.raises(Stop):
        build(records, encoder, tmp_path)
    read = stop_after(monkeypatch, 99)
    cache = build(records, encoder, tmp_path)
    assert read == [record.path for record in records[6:]]
    assert all(torch.equal(cache.get(r.image_id), whole.get(r.image_id)) for r in records)


def test_unreadable_pictures_are_counted_over_all_files(encoder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(features, "MOST_IMAGES", 50)
    records = draw(tmp_path / "pictures", 200)
    for place in (4, 9):  # two of fifty: too many for one file, not for all
        records[place].path.write_bytes(b"<html>")
    with caplog.at_level(logging.WARNING):
        cache = build(records, encoder, tmp_path / "cache", batch_size=50)
    assert caplog.messages == ["left out: 2 of 200 images can't be read: 004.png, 009.png"]
    assert len(cache.rows) == 198 and "004.png" not in cache and "150.png" in cache


def test_room_is_asked_for_all_files_at_the_first(records, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "MOST_IMAGES", 4)
    usage = shutil.disk_usage(tmp_path)._replace(free=2 * 4 * 4 * 128 * 2)  # for two files
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"test-tiny-32-.*-00000\.part needs .*--cache-dir"):
        build(records, encoder, tmp_path)
