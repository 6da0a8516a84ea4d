"""An interrupted extraction ends with the same cache, in one file or several."""

import errno
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

import features
from encoder import image_transform
from features import FeatureCache, describe
from util import extraction, program
from util.images import read_image

# Fixtures, made once for this file.
one_thread, records = caches.one_thread, caches.records
encoder, reference = caches.encoder, caches.reference


# --- interrupted, killed, two at once


@pytest.mark.parametrize("count", [1, 5, 6, 9])
def test_an_interrupted_extraction_continues_where_it_stopped(
    count, reference, records, encoder, tmp_path, monkeypatch
):
    monkeypatch.setattr(extraction, "SAVE_EVERY", 2)  # progress is saved after 4 and 8 images
    stop_after(monkeypatch, count)
    with pytest.raises(ExtractionStoppedError):
        build(records, encoder, tmp_path)
    assert ".npy" not in suffixes(tmp_path) and ".json" not in suffixes(tmp_path)
    read = stop_after(monkeypatch, 99)
    cache = build(records, encoder, tmp_path)
    assert contents(cache) == contents(reference)
    assert read == [record.path for record in records[count // 4 * 4 :]]
    assert suffixes(tmp_path) == {".npy", ".json"}


def test_no_image_is_read_again_after_a_kill_before_the_last_file_was_written(
    reference, records, encoder, tmp_path, monkeypatch
):
    write_json = extraction.files.write_json

    def stopping(path, value):
        if path.suffix == ".json":
            raise ExtractionStoppedError
        write_json(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(extraction.files, "write_json", stopping)
        with pytest.raises(ExtractionStoppedError):
            build(records, encoder, tmp_path)
    stop_after(monkeypatch, 0)
    assert contents(build(records, encoder, tmp_path)) == contents(reference)
    assert suffixes(tmp_path) == {".npy", ".json"}


@pytest.mark.parametrize("gone", [".part", ".progress"])
def test_an_extraction_starts_again_where_one_of_its_two_files_is_missing(
    gone, reference, records, encoder, tmp_path, monkeypatch
):
    monkeypatch.setattr(extraction, "SAVE_EVERY", 2)
    for count in (9, 3):  # the second time no progress was saved
        stop_after(monkeypatch, count)
        with pytest.raises(ExtractionStoppedError):
            build(records, encoder, tmp_path)
        for path in tmp_path.glob(f"*{gone}"):
            path.unlink()
    stop_after(monkeypatch, 99)
    assert contents(build(records, encoder, tmp_path)) == contents(reference)


def build_in_process(records, folder: Path, last: int, count) -> None:
    """Build the cache; kill this process when it has read `last` images."""

    def reading(path, at_least):
        if count.value == last:
            os.kill(os.getpid(), signal.SIGKILL)
        count.value += 1
        return read_image(path, at_least)

    torch.set_num_threads(1)
    features.read_image, extraction.SAVE_EVERY = reading, 1
    build(records, make_encoder("tiny"), folder)


def start(records, folder: Path, last: int) -> tuple:
    """Start a process that builds the cache; return it and the count of images it has read."""
    context = multiprocessing.get_context("fork")
    count = context.Value("i", 0)
    process = context.Process(target=build_in_process, args=(records, folder, last, count))
    process.start()
    return process, count


def test_a_killed_extraction_continues_to_the_same_cache(
    reference, records, encoder, tmp_path, monkeypatch
):
    process, count = start(records, tmp_path, 7)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and count.value == 7
    assert suffixes(tmp_path) == {".part", ".progress"}
    read = stop_after(monkeypatch, 99)
    assert contents(build(records, encoder, tmp_path)) == contents(reference)
    assert read == [record.path for record in records[6:]]


def test_two_processes_at_once_extract_only_once(reference, records, tmp_path):
    started = [start(records, tmp_path, 99) for _ in range(2)]
    for process, _ in started:
        process.join(60)
    assert [process.exitcode for process, _ in started] == [0, 0]
    assert sorted(count.value for _, count in started) == [0, 11]
    (path,) = tmp_path.glob("*.npy")
    assert contents(FeatureCache(path)) == contents(reference)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_all_progress(number, reference, records, encoder, tmp_path, monkeypatch):
    read = []

    def stopping(path, at_least):
        read.append(path)
        if len(read) == 7:  # batches are of three
            os.kill(os.getpid(), number)
        return read_image(path, at_least)

    with monkeypatch.context() as patch:
        patch.setattr(features, "read_image", stopping)
        with pytest.raises(SystemExit) as stop:
            program.run(lambda: build(records, encoder, tmp_path))
    assert stop.value.code == 130
    again = stop_after(monkeypatch, 99)
    assert contents(build(records, encoder, tmp_path)) == contents(reference)
    assert again == [record.path for record in records[6:]]


# --- several files


def test_a_cache_of_several_files_is_the_cache_of_one(
    reference, records, encoder, tmp_path, monkeypatch
):
    monkeypatch.setattr(features, "MOST_IMAGES", 3)  # full batches of two: four images per file
    cache = build(records, encoder, tmp_path)
    assert [len(array) for array in cache.arrays] == [4, 4, 3] and len(cache) == 11
    for record in records:
        assert record.image_id in cache
        assert torch.equal(cache.get(record.image_id), reference.get(record.image_id))
    assert "other.png" not in cache and suffixes(tmp_path) == {".npy", ".json"}
    again = pickle.loads(pickle.dumps(cache))
    assert torch.equal(again.get("010.png"), reference.get("010.png"))
    stop_after(monkeypatch, 0)
    build(records, encoder, tmp_path)
    with pytest.raises(ValueError, match="has image_ids '[0-9a-f]{49}… .*, but '[0-9a-f]{49}"):
        FeatureCache(cache.path, describe(records[1:], encoder, 32))
    damaged = cache.paths[1]
    os.truncate(damaged, 100)
    with pytest.raises(ValueError, match=rf"{damaged.name} is damaged"):
        FeatureCache(cache.path)


def test_each_process_builds_its_files_and_then_those_that_are_missing(
    reference, records, encoder, tmp_path, monkeypatch
):
    read = stop_after(monkeypatch, 99)
    caches = [build(records, encoder, tmp_path, rank=rank, world=3) for rank in (2, 0, 1)]
    # The third process runs first and alone: it builds its own file, then those of the others.
    order = [*records[8:], *records[:4], *records[4:8]]
    assert read == [record.path for record in order]
    for cache in caches:
        assert all(torch.equal(cache.get(r.image_id), reference.get(r.image_id)) for r in records)
    assert len(build(records, encoder, tmp_path).arrays) == 3  # one process takes the same files
    assert len(read) == 11


def test_an_extraction_into_several_files_continues_where_it_stopped(
    reference, records, encoder, tmp_path, monkeypatch
):
    monkeypatch.setattr(extraction, "SAVE_EVERY", 1)
    monkeypatch.setattr(features, "MOST_IMAGES", 4)
    stop_after(monkeypatch, 7)
    with pytest.raises(ExtractionStoppedError):
        build(records, encoder, tmp_path)
    read = stop_after(monkeypatch, 99)
    cache = build(records, encoder, tmp_path)
    assert read == [record.path for record in records[6:]]
    assert all(torch.equal(cache.get(r.image_id), reference.get(r.image_id)) for r in records)


def test_unreadable_images_are_counted_over_all_files(encoder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(features, "MOST_IMAGES", 50)
    records = make_images(tmp_path / "images", 200)
    for place in (4, 9):  # two of fifty: too many for one file, not for all
        records[place].path.write_bytes(b"<html>")
    with caplog.at_level(logging.WARNING):
        cache = build(records, encoder, tmp_path / "cache", batch_size=50)
    assert caplog.messages == ["left out: 2 of 200 images can't be read: 004.png, 009.png"]
    assert len(cache) == 198 and "004.png" not in cache and "150.png" in cache


# --- unreadable images


def test_a_few_unreadable_images_are_left_out_and_reported(encoder, tmp_path, caplog):
    records = make_images(tmp_path / "images", 200)
    records[4].path.write_bytes(b"<html>")
    records[9].path.unlink()
    with caplog.at_level(logging.WARNING):
        cache = build(records, encoder, tmp_path / "cache", batch_size=50)
    assert caplog.messages == ["left out: 2 of 200 images can't be read: 004.png, 009.png"]
    assert len(cache) == 198 and "004.png" not in cache and "009.png" not in cache
    array = np.load(cache.path)
    assert not array[4].any() and not array[9].any() and array[5].any()
    with torch.no_grad():
        pixels = image_transform(32, train=False)(read_image(records[10].path))
        expected = encoder(pixels[None])[0]
    assert torch.allclose(cache.get("010.png").float(), expected, rtol=2e-3, atol=2e-3)


def test_after_too_many_unreadable_images_nothing_is_kept_and_repaired_ones_are_read(
    encoder, tmp_path
):
    records = make_images(tmp_path / "images", 20)
    good = {records[row].path: records[row].path.read_bytes() for row in (4, 7)}
    for path, content in good.items():
        path.write_bytes(bytes(len(content)))  # the same size: the same cache
    with pytest.raises(ValueError, match=r"2 of 20 images can't be read: 004\.png, 007\.png; more"):
        build(records, encoder, tmp_path / "cache")
    assert suffixes(tmp_path / "cache") == set()
    for path, content in good.items():
        path.write_bytes(content)
    assert "004.png" in build(records, encoder, tmp_path / "cache")


# --- a full disk


def test_too_little_space_is_an_error_before_the_extraction(
    records, encoder, tmp_path, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"test-tiny-32-.* needs 0\.0 GB .*--cache-dir on another"):
        build(records, encoder, tmp_path)
    assert suffixes(tmp_path) == set()


def test_disk_space_is_allocated_at_the_start(records, encoder, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match=r"No space left on device\): .*test-tiny-32"):
            build(records, encoder, tmp_path)
    assert suffixes(tmp_path) == set()
    stop_after(monkeypatch, 3)
    with pytest.raises(ExtractionStoppedError):
        build(records, encoder, tmp_path)
    (part,) = tmp_path.glob("*.part")
    assert part.stat().st_blocks * 512 >= 2 * 11 * 4 * 128


@pytest.mark.skipif(os.name != "posix", reason="no limits of file sizes on Windows")
def test_the_error_for_a_full_disk_names_the_cache(
    reference, records, encoder, tmp_path, monkeypatch
):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write \(File too large\): .*test-tiny-32.*part"):
            build(records, encoder, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert suffixes(tmp_path) == set()
    assert contents(build(records, encoder, tmp_path)) == contents(reference)


def test_space_for_all_files_is_checked_at_the_first(records, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "MOST_IMAGES", 4)
    usage = shutil.disk_usage(tmp_path)._replace(free=2 * 4 * 4 * 128 * 2)  # for two files
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"test-tiny-32-.*-00000\.part needs .*--cache-dir"):
        build(records, encoder, tmp_path)
