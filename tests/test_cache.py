"""What a cache notices: image files that changed, and features that are not what was written."""

import json
import logging
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import caches
from helpers.caches import build, make_images, stop_after

import features
from features import FeatureCache, encode_images
from util import cache, extraction, sources
from util.files import UserError

# Fixtures, made once for this file.
one_thread, encoder = caches.one_thread, caches.encoder


@pytest.fixture
def records(tmp_path):
    """Return images that all have the same size in bytes: bitmaps."""
    made = []
    for number, record in enumerate(make_images(tmp_path / "images", 8)):
        path = record.path.with_suffix(".bmp")
        caches.Image.open(record.path).save(path)
        record.path.unlink()
        made.append(record._replace(image_id=f"{number:03}.bmp", path=path))
    assert len({record.path.stat().st_size for record in made}) == 1
    return made


@pytest.fixture
def built(records, encoder, tmp_path) -> FeatureCache:
    return build(records, encoder, tmp_path / "cache")


def expected(records, encoder) -> torch.Tensor:
    """Return the features of the images as they are now."""
    return torch.cat([b.features[:, 0] for b in encode_images(records, encoder, 32, workers=0)])


def check(found: FeatureCache, records, encoder) -> None:
    for record, wanted in zip(records, expected(records, encoder), strict=True):
        torch.testing.assert_close(found.get(record.image_id), wanted, atol=2e-3, rtol=2e-3)


def read_again(records, encoder, tmp_path, monkeypatch, caplog) -> tuple[FeatureCache, list, list]:
    """Return the cache of the next run, the images it encoded, and the lines it logged."""
    caplog.clear()
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        read = stop_after(patch, 99)
        found = build(records, encoder, tmp_path / "cache")
    lines, before = list(caplog.messages), read_files(tmp_path / "cache")
    build(records, encoder, tmp_path / "cache")  # nothing is left to do
    assert read_files(tmp_path / "cache") == before
    return found, [path.name for path in read], lines


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def swap(one: Path, other: Path) -> None:
    between = one.with_suffix(".between")
    one.rename(between)
    other.rename(one)
    between.rename(other)


# ---- image files -----------------------------------------------------------------------------


def test_images_that_were_swapped_are_encoded_again(
    built, records, encoder, tmp_path, monkeypatch, caplog
):
    swap(records[1].path, records[6].path)
    found, read, lines = read_again(records, encoder, tmp_path, monkeypatch, caplog)
    assert found.path == built.path and read == ["001.bmp", "006.bmp"]
    assert lines == [
        f"{built.path}: extracting 2 of 8 images again, as the image files have changed: "
        "001.bmp, 006.bmp"
    ]
    check(found, records, encoder)


@pytest.mark.parametrize("restored", [False, True], ids=["new time", "time restored"])
def test_an_image_replaced_by_one_of_the_same_size_is_encoded_again(
    restored, built, records, encoder, tmp_path, monkeypatch, caplog
):
    path, before = records[3].path, records[3].path.stat()
    content = bytearray(path.read_bytes())
    content[60:400] = content[400:740]
    path.write_bytes(content)
    if restored:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_mtime_ns == before.st_mtime_ns
    found, read, lines = read_again(records, encoder, tmp_path, monkeypatch, caplog)
    assert read == ["003.bmp"] and len(lines) == 1
    check(found, records, encoder)


def test_a_dataset_that_was_copied_is_not_encoded_again(
    built, records, encoder, tmp_path, monkeypatch, caplog
):
    copied = tmp_path / "elsewhere"
    shutil.copytree(records[0].path.parent, copied, copy_function=shutil.copyfile)
    moved = [record._replace(path=copied / record.path.name) for record in records]
    for record in moved:
        os.utime(record.path, (1, 1))
    before = built.path.read_bytes()
    found, read, lines = read_again(moved, encoder, tmp_path, monkeypatch, caplog)
    assert (read, lines) == ([], []) and found.path.read_bytes() == before
    # Its times were noted: the next run reads no image file.
    monkeypatch.setattr(sources, "read_source", lambda path: pytest.fail("read again"))
    build(moved, encoder, tmp_path / "cache")


def test_images_of_another_size_have_another_cache_and_a_line(
    built, records, encoder, tmp_path, monkeypatch, caplog
):
    with records[3].path.open("ab") as file:
        file.write(b"0")
    found, read, lines = read_again(records, encoder, tmp_path, monkeypatch, caplog)
    assert found.path != built.path and len(read) == 8
    assert lines == [
        f"image files have changed since {built.path} was made: their features are extracted into "
        "another cache; delete that one if you no longer need it"
    ]


def test_an_image_that_was_left_out_is_added_once_it_can_be_read(
    encoder, records, tmp_path, monkeypatch, caplog
):
    good = records[2].path.read_bytes()
    records[2].path.write_bytes(bytes(len(good)))
    found, _, lines = read_again(records, encoder, tmp_path, monkeypatch, caplog)
    assert len(found) == 7 and lines == ["left out: 1 of 8 images can't be read: 002.bmp"]
    records[2].path.write_bytes(good)
    found, read, lines = read_again(records, encoder, tmp_path, monkeypatch, caplog)
    assert len(found) == 8 and read == ["002.bmp"] and len(lines) == 1
    check(found, records, encoder)


def test_an_image_is_added_when_a_library_that_reads_it_was_installed(
    encoder, records, tmp_path, monkeypatch, caplog
):
    def lacking(path, at_least=None):
        if path.name == "002.bmp":
            raise UserError("no library for it")
        return caches.read_image(path)

    with monkeypatch.context() as patch:
        patch.setattr(features, "read_image", lacking)
        patch.setattr(extraction, "read_image", lacking)
        assert len(build(records, encoder, tmp_path / "cache")) == 7
    found, read, lines = read_again(records, encoder, tmp_path, monkeypatch, caplog)
    assert len(found) == 8 and read == ["002.bmp"]
    assert "1 of 8 images again, as they can be read now: 002.bmp" in lines[0]


def test_an_image_that_became_unreadable_is_left_out(
    built, encoder, records, tmp_path, monkeypatch, caplog
):
    content = records[5].path.read_bytes()
    records[5].path.write_bytes(bytes(len(content)))
    found, _, lines = read_again(records, encoder, tmp_path, monkeypatch, caplog)
    assert len(found) == 7 and "005.bmp" not in found
    assert lines[1:] == ["left out: 1 of 8 images can't be read: 005.bmp"]


# ---- the features on disk --------------------------------------------------------------------


def flip(content: bytearray, row: int) -> None:
    content[128 + row * 1024 + 77] ^= 16


def zero_tail(content: bytearray, row: int) -> None:
    content[128 + row * 1024 :] = bytes(len(content) - 128 - row * 1024)


def put_nan(content: bytearray, row: int) -> None:
    content[128 + row * 1024 : 128 + row * 1024 + 2] = np.array(np.nan, np.float16).tobytes()


def cut(content: bytearray, row: int) -> None:
    del content[128 + row * 1024 + 5 :]


def lengthen(content: bytearray, row: int) -> None:
    content += bytes(1024)


def other_type(content: bytearray, row: int) -> None:
    content[:128] = content[:128].replace(b"<f2", b"<i2")


def other_shape(content: bytearray, row: int) -> None:
    content[:128] = content[:128].replace(b"4, 128", b"128, 4")


def no_header(content: bytearray, row: int) -> None:
    content[:128] = bytes(128)


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        (flip, [6]), (put_nan, [6]), (zero_tail, [6, 7]), (cut, [6, 7]), (lengthen, []),
        (other_type, []), (other_shape, []), (no_header, []),
    ],
)  # fmt: skip
def test_damaged_features_are_extracted_again(
    damage, lost, built, records, encoder, tmp_path, monkeypatch, caplog
):
    content = bytearray(whole := built.path.read_bytes())
    assert len(content) == 128 + 8 * 1024
    damage(content, 6)
    built.path.write_bytes(content)
    found, read, lines = read_again(records, encoder, tmp_path, monkeypatch, caplog)
    assert read == [records[row].path.name for row in lost]
    if lost:
        assert lines == [
            f"{built.path}: extracting {len(lost)} of 8 images again, as the cache is damaged "
            f"there: {', '.join(records[row].image_id for row in lost)}"
        ]
    check(found, records, encoder)
    assert found.path.read_bytes()[: 128 + 6 * 1024] == whole[: 128 + 6 * 1024]
    assert len(found.path.read_bytes()) == len(whole)


def test_features_of_another_type_are_extracted_again(
    built, records, encoder, tmp_path, monkeypatch, caplog
):
    np.save(built.path, np.load(built.path).astype(np.float32))
    found, read, lines = read_again(records, encoder, tmp_path, monkeypatch, caplog)
    assert len(read) == 8 and "extracting 8 of 8 images again, as the cache is damaged" in lines[0]
    check(found, records, encoder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"image_ids": [], "left_out": []}', '{"image_ids": 3, "left_out": 1}']
)
def test_a_damaged_description_is_made_again(
    text, built, records, encoder, tmp_path, monkeypatch, caplog
):
    built.path.with_suffix(".json").write_text(text)
    found, read, lines = read_again(records, encoder, tmp_path, monkeypatch, caplog)
    assert len(read) == 8 and f"{built.path} is damaged" in lines[0]
    check(found, records, encoder)


def test_a_description_of_other_images_is_made_again(
    built, records, encoder, tmp_path, monkeypatch, caplog
):
    path = built.path.with_suffix(".json")
    about = json.loads(path.read_text())
    about["image_ids"][:2] = about["image_ids"][1::-1]
    path.write_text(json.dumps(about))
    found, read, lines = read_again(records, encoder, tmp_path, monkeypatch, caplog)
    assert len(read) == 8 and "is damaged (it lists other images)" in lines[0]
    check(found, records, encoder)


def test_a_file_that_is_cut_while_it_is_used_is_one_line(built, records):
    built.get("000.bmp")
    os.truncate(built.path, 128 + 2 * 1024 + 100)
    built.get("001.bmp")
    for name in ("002.bmp", "007.bmp"):
        with pytest.raises(UserError, match="was cut short while it was in use; start again"):
            built.get(name)


def test_only_rows_that_were_not_replaced_yet_are_encoded_after_an_interruption(
    built, records, encoder, tmp_path, monkeypatch, caplog
):
    for record in records:  # all in another order
        record.path.write_bytes(record.path.read_bytes()[:-1000] + bytes(1000))
    with monkeypatch.context() as patch:
        stop_after(patch, 5)  # batches are of two
        with pytest.raises(caches.ExtractionStoppedError):
            build(records, encoder, tmp_path / "cache")
    found, read, _ = read_again(records, encoder, tmp_path, monkeypatch, caplog)
    assert read == [record.path.name for record in records[4:]]
    check(found, records, encoder)


def test_one_file_of_several_is_repaired_alone(encoder, records, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(features, "MOST_IMAGES", 4)
    built = build(records, encoder, tmp_path / "cache")
    assert len(built.paths) == 2
    content = bytearray(built.paths[1].read_bytes())
    flip(content, 1)
    built.paths[1].write_bytes(content)
    swap(records[0].path, records[7].path)
    found, read, lines = read_again(records, encoder, tmp_path, monkeypatch, caplog)
    assert read == ["000.bmp", "005.bmp", "007.bmp"] and len(lines) == 3
    check(found, records, encoder)
    index = found.path.with_suffix(".json")
    for text in ("{", index.read_text().replace('"images": 8', '"images": 9')):
        index.write_text(text)
        found, read, lines = read_again(records, encoder, tmp_path, monkeypatch, caplog)
        assert read == [] and lines == [f"{index} is damaged: it is made again"]


def test_views_are_checked_too(encoder, records, tmp_path, monkeypatch):
    built = build(records, encoder, tmp_path / "cache", views=2)
    content = bytearray(built.path.read_bytes())
    content[128 + 2048 * 3 + 1500] ^= 1  # the second view of the fourth image
    built.path.write_bytes(content)
    read = stop_after(monkeypatch, 99)
    build(records, encoder, tmp_path / "cache", views=2)
    assert [path.name for path in read] == ["003.bmp"]


def test_a_file_is_checked_in_chunks(built, records, encoder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cache, "CHUNK", 3 * 1024)  # rows have 1024 bytes: the last chunk has two
    _, read, lines = read_again(records, encoder, tmp_path, monkeypatch, caplog)
    assert (read, lines) == ([], [])
    content = bytearray(built.path.read_bytes())
    for row in (2, 3, 7):
        flip(content, row)
    built.path.write_bytes(content)
    found, read, _ = read_again(records, encoder, tmp_path, monkeypatch, caplog)
    assert read == ["002.bmp", "003.bmp", "007.bmp"]
    check(found, records, encoder)


def test_features_that_are_no_numbers_are_not_cached(encoder, records, tmp_path, monkeypatch):
    def encode(*arguments, **settings):
        for batch in encode_images(*arguments, **settings):
            batch.features[0, 0, 0, 0] = np.nan
            yield batch

    monkeypatch.setattr(features, "encode_images", encode)
    with pytest.raises(UserError, match="features are not finite.*--cnn-weights"):
        build(records, encoder, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.npy"))


# ---- caches of earlier versions, read-only folders -------------------------------------------


def as_before(built: FeatureCache) -> None:
    """Make the description one of the version that noted no checksums and sources."""
    path = built.path.with_suffix(".json")
    about = json.loads(path.read_text())
    for name in ("shape", "checksums", "sources"):
        del about[name]
    path.write_text(json.dumps(about))


def test_a_cache_of_an_earlier_version_is_used_and_noted(
    built, records, encoder, tmp_path, monkeypatch, caplog
):
    before = built.path.with_suffix(".json").read_text()
    as_before(built)
    _, read, lines = read_again(records, encoder, tmp_path, monkeypatch, caplog)
    assert read == [] and built.description == json.loads(before)
    assert lines == [
        f"{built.path} was made by an earlier version, which did not note what the image files "
        "held: delete it if you have replaced images since; from now on such changes are noticed"
    ]
    swap(records[1].path, records[6].path)
    _, read, _ = read_again(records, encoder, tmp_path, monkeypatch, caplog)
    assert read == ["001.bmp", "006.bmp"]


def test_an_image_that_an_earlier_version_left_out_is_not_damaged(
    records, encoder, tmp_path, monkeypatch, caplog
):
    records[4].path.write_bytes(b"<html>")
    as_before(build(records, encoder, tmp_path / "cache"))
    found, read, lines = read_again(records, encoder, tmp_path, monkeypatch, caplog)
    assert read == [] and len(found) == 7
    assert not any("damaged" in line for line in lines)


@pytest.mark.parametrize("damage", [put_nan, zero_tail])
def test_impossible_features_of_an_earlier_version_are_extracted_again(
    damage, built, records, encoder, tmp_path, monkeypatch, caplog
):
    as_before(built)
    content = bytearray(built.path.read_bytes())
    damage(content, 7)
    built.path.write_bytes(content)
    found, read, _ = read_again(records, encoder, tmp_path, monkeypatch, caplog)
    assert read == ["007.bmp"]
    check(found, records, encoder)


def with_large_jpeg(records) -> list:
    """Return the records with a JPEG of several times the CNN's size as the fourth."""
    path = records[3].path.with_suffix(".jpg")
    noise = np.random.default_rng(3).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    caches.Image.fromarray(noise).save(path, quality=95)
    return [*records[:3], records[3]._replace(path=path), *records[4:]]


def read_in_full(path, at_least=None):
    return caches.read_image(path)


def test_large_jpegs_that_an_earlier_version_read_in_full_are_encoded_again(
    records, encoder, tmp_path, monkeypatch, caplog
):
    records = with_large_jpeg(records)
    with monkeypatch.context() as patch:
        patch.setattr(features, "read_image", read_in_full)
        before = build(records, encoder, tmp_path / "cache")
    about = json.loads(before.path.with_suffix(".json").read_text())
    assert about.pop("reading") == "reduced"
    before.path.with_suffix(".json").write_text(json.dumps(about))
    old = before.get("003.bmp")
    found, read, lines = read_again(records, encoder, tmp_path, monkeypatch, caplog)
    assert read == ["003.jpg"]
    assert lines == [
        f"{before.path}: extracting 1 of 8 images again, as large JPEGs are now decoded at a "
        "reduced size: 003.bmp"
    ]
    assert not torch.equal(found.get("003.bmp"), old)
    check(found, records, encoder)


def test_an_extraction_that_an_earlier_version_began_ends_as_if_it_were_new(
    records, encoder, tmp_path, monkeypatch, caplog
):
    records = with_large_jpeg(records)
    monkeypatch.setattr(extraction, "SAVE_EVERY", 1)
    with monkeypatch.context() as patch:
        read = stop_after(patch, 6)
        reduced = features.read_image
        patch.setattr(features, "read_image", lambda path, _: reduced(path, None))
        with pytest.raises(caches.ExtractionStoppedError):
            build(records, encoder, tmp_path / "cache")
    (progress,) = (tmp_path / "cache").glob("*.progress")
    noted = json.loads(progress.read_text())
    del noted["reading"]
    progress.write_text(json.dumps(noted))
    found, read, lines = read_again(records, encoder, tmp_path, monkeypatch, caplog)
    assert read == ["006.bmp", "007.bmp", "003.jpg"] and "reduced size" in lines[0]
    check(found, records, encoder)


@pytest.mark.parametrize("several", [False, True])
def test_a_cache_in_a_folder_that_is_read_only_can_be_used(
    several, encoder, records, tmp_path, monkeypatch, caplog
):
    if several:
        monkeypatch.setattr(features, "MOST_IMAGES", 4)
    built = build(records, encoder, tmp_path / "cache")
    os.utime(records[0].path, (1, 1))

    def refuse(path, *arguments):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(features.files, "lock", refuse)
    monkeypatch.setattr(features.files, "write_json", refuse)
    again = build(records, encoder, tmp_path / "cache")
    assert torch.equal(again.get("003.bmp"), built.get("003.bmp"))


# ---- parts -----------------------------------------------------------------------------------


def test_each_row_has_the_checksum_of_its_bytes(built):
    about = json.loads(built.path.with_suffix(".json").read_text())
    array = np.load(built.path)
    assert about["checksums"] == [zlib.crc32(row.tobytes()) for row in array]
    assert about["shape"] == list(array.shape)


def test_a_source_is_size_times_and_digest(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"abc")
    about = path.stat()
    assert sources.read_source(path) == (
        f"3 {about.st_ctime_ns} {about.st_mtime_ns} ba7816bf8f01cfea"
    )
    assert sources.read_source(tmp_path / "none") == sources.read_source(tmp_path) == ""


def test_a_file_that_cannot_be_read_now_keeps_its_source(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"abc")
    source = sources.read_source(path)
    path.unlink()
    assert sources.update_sources([path, path], [source, None]) == [source, None]


def test_the_last_byte_of_a_large_file_counts(tmp_path):
    for name, last in (("one", b"1"), ("other", b"2")):
        (tmp_path / name).write_bytes(bytes(2**21 + 5) + last)
    one, other = (sources.read_source(tmp_path / name) for name in ("one", "other"))
    assert not sources.is_same_content(one, other)


def test_a_file_is_read_and_written_where_the_system_has_no_positions(built, monkeypatch):
    before = built.get("005.bmp")
    for name in ("preadv", "pwrite"):
        monkeypatch.delattr(os, name)
    assert torch.equal(built.get("005.bmp"), before)
    with cache.FeatureFile(built.path, "rb+") as file:
        file.write(2, before[None, None].numpy())
    assert torch.equal(built.get("002.bmp"), before)
