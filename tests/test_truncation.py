"""Images that lack their last bytes: read with a line, refused with --strict, in every script."""

import io
import json
import threading

import numpy as np
import pytest
from helpers import images as pictures
from helpers.datasets import write_colours
from helpers.images import bytes_of
from helpers.tiny import COLOURS, picture, run_script
from PIL import Image, ImageFile

import evaluate
import features
import inference
import train
from encoder import Encoder
from readers import load_split
from util import truncation
from util.files import UserError
from util.images import read_image

photo = pictures.photo  # the fixture
LINE = "lacks its last bytes: it is read as far as it goes (--strict refuses it)"


@pytest.fixture(autouse=True)
def lenient():
    truncation.set_strict(False)
    yield
    truncation.set_strict(False)


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"])
@pytest.mark.parametrize("at_least", [None, 8])
def test_what_is_there_is_read_and_a_line_says_so(kind, at_least, tmp_path, caplog):
    whole = bytes_of(picture(1, (200, 150)), kind)
    path = tmp_path / "photo.dat"
    path.write_bytes(whole[: len(whole) * 9 // 10])
    image = np.asarray(read_image(path, at_least)).astype(int)
    expected = np.asarray(read_image(whole, at_least)).astype(int)
    assert image.shape == expected.shape
    third = slice(len(image) // 3, 2 * len(image) // 3)
    assert np.abs(image - expected)[third].mean() < 3
    assert caplog.messages == [f"{path} {LINE}"]
    read_image(path)  # again, as each epoch does
    assert len(caplog.messages) == 1
    truncation.set_strict(True)
    with pytest.raises(UserError, match="is not an image that can be read"):
        read_image(path)


def test_a_progressive_jpeg_is_read_as_coarse_as_it_came(photo, caplog):
    image = photo.resize((640, 480))
    data = bytes_of(image, "JPEG", progressive=True, quality=95)
    read = np.asarray(read_image(data[: len(data) * 2 // 3])).astype(int)
    assert np.abs(read - np.asarray(image)).mean() < 5
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("kind", ["BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP"])
def test_an_image_of_which_little_is_there_is_refused(kind, photo, caplog):
    data = bytes_of(photo.resize((320, 240)), kind)
    for share in (3, 10, 100):
        with pytest.raises(UserError, match="can't be read|can be read"):
            read_image(data[: len(data) // share])
    assert not caplog.messages


def test_a_whole_image_is_read_as_ever_and_another_fault_is_no_missing_end(photo, caplog):
    data = bytearray(bytes_of(photo, "PNG"))
    assert np.array_equal(np.asarray(read_image(bytes(data))), np.asarray(photo))
    data[len(data) // 2] ^= 255
    with pytest.raises(UserError):
        read_image(bytes(data))
    assert not caplog.messages


def test_pillows_switch_is_on_for_the_reading_thread_alone(photo):
    seen = []
    with truncation.allowance.on():
        other = threading.Thread(target=lambda: seen.append(bool(ImageFile.LOAD_TRUNCATED_IMAGES)))
        other.start()
        other.join()
        assert ImageFile.LOAD_TRUNCATED_IMAGES
    assert (seen, bool(ImageFile.LOAD_TRUNCATED_IMAGES)) == ([False], False)
    with pytest.raises(OSError, match="truncated"):
        Image.open(io.BytesIO(bytes_of(photo, "JPEG")[:-50])).load()


def test_only_the_first_images_are_named_without_what_a_terminal_obeys(caplog):
    truncation.warn_of_missing_end("a\x1b[2Jb.jpg")
    assert caplog.messages == [rf"a\x1b[2Jb.jpg {LINE}"]
    truncation.set_strict(False)
    caplog.clear()
    for number in range(30):
        truncation.warn_of_missing_end(f"{number}.jpg")
    assert len(caplog.messages) == 10
    assert caplog.messages[-1].endswith("refuses it); further ones are not named")


# --- the scripts


@pytest.fixture
def photos(tmp_path):
    """A dataset of JPEGs, of which one of train and one of test lack their last bytes."""
    folder = write_colours(tmp_path / "photos")
    table = (folder / "captions.csv").read_text().replace(".png", ".jpg")
    (folder / "captions.csv").write_text(table)
    for number, path in enumerate(sorted(folder.glob("*.png"))):
        picture(number, (90, 60)).save(path.with_suffix(".jpg"), quality=95)
        path.unlink()
    for name in ("train-3", "test-1"):
        path = folder / f"{name}.jpg"
        path.write_bytes(path.read_bytes()[:-60])
    return folder


def test_training_reads_them_with_one_line_or_leaves_them_out(photos, tmp_path, capsys, caplog):
    for strict in (False, True):
        caplog.clear()
        output = tmp_path / f"run-{strict}"
        flags = [*COLOURS, "--data-dir", photos, "--epochs", 2, "--output", output]
        code, _, err = run_script(train, *flags, *["--strict"] * strict, capsys=capsys)
        assert code == 0, err
        assert caplog.text.count(f"train-3.jpg {LINE}") == (not strict)
        assert ("1 of 8 images can't be read: train-3.jpg" in caplog.text) == strict
        assert json.loads((output / "config.json").read_text())["strict"] == strict
    caplog.clear()
    flags = ("--resume", "--output", output, "--epochs", 3)  # with the flags of the run
    assert run_script(train, *flags, capsys=capsys)[0] == 0
    assert "can't be read: train-3.jpg" in caplog.text and LINE not in caplog.text


def test_the_feature_cache_has_them_or_another_one_without_them(photos, tmp_path, caplog):
    records = load_split("csv", photos, "train")
    encoder, ids = Encoder("tiny", "none"), {record.image_id for record in records}
    for strict in (False, True, False, True):
        truncation.set_strict(strict)
        caplog.clear()
        place = (records, encoder, 32, tmp_path / "cache", "train")
        cache = features.cached_features(*place, workers=0)
        assert {each for each in ids if each not in cache} == ({"train-3.jpg"} if strict else set())
        assert ("can't be read: train-3.jpg" in caplog.text) == strict
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2


def test_evaluation_counts_them_or_leaves_them_out(photos, run, capsys, caplog):
    flags = ("--checkpoint", run, "--dataset", "csv", "--data-dir", photos, "--no-java")
    code, out, _ = run_script(evaluate, *flags, "--workers", 0, capsys=capsys)
    assert (code, out.splitlines()[0]) == (0, "csv test, 2 images")
    assert caplog.text.count(f"test-1.jpg {LINE}") == 1
    code, out, _ = run_script(evaluate, *flags, "--workers", 1, "--strict", capsys=capsys)
    assert (code, out.splitlines()[0]) == (0, "csv test, 1 images")
    assert "1 of 2 images can't be read: test-1.jpg" in caplog.text


def test_captioning_reads_them_or_says_which_it_refuses(photos, run, capsys, caplog):
    flags = (photos / "test-0.jpg", photos / "test-1.jpg", "--checkpoint", run)
    code, out, err = run_script(inference, *flags, capsys=capsys)
    assert (code, out.count("\n")) == (0, 2)
    assert (caplog.messages, err) == ([f"{photos / 'test-1.jpg'} {LINE}"], "")
    code, out, err = run_script(inference, *flags, "--strict", capsys=capsys)
    assert (code, out.count("\n")) == (2, 1)
    assert "test-1.jpg is not an image that can be read (image file is truncated" in err


def test_shards_have_them_or_leave_them_out(photos, tmp_path, capsys, caplog):
    pytest.importorskip("webdataset")
    for strict in (False, True):
        caplog.clear()
        place = tmp_path / f"shards-{strict}"
        flags = ("--shards", place, "--dataset", "csv", "--data-dir", photos)
        code, out, err = run_script(features, *flags, *["--strict"] * strict, capsys=capsys)
        assert code == 0, err
        assert f"train: {8 - strict} images" in out
        assert (f"train-3.jpg {LINE}" in caplog.text) == (not strict)


@pytest.mark.parametrize("other", [False, truncation.Allowance()])
def test_another_ones_switch_does_not_end_the_reading(other, photo, monkeypatch, caplog):
    """A program may set Pillow's switch itself, and torch.hub loads this module a second time."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", other)
    assert read_image(bytes_of(photo, "JPEG")[:-50]).size == photo.size
    assert len(caplog.messages) == 1
