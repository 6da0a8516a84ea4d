"""What cannot be read, takes too much or is damaged says so in one line, with its name."""

import io
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from helpers import images as pictures
from helpers.images import bytes_of, pixels
from PIL import Image, ImageFile

from util import images
from util.images import list_images, read_image

photo = pictures.photo  # the fixture


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jpg"):
        read_image("nowhere.jpg")


def test_a_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path.name} is a folder, not an image"):
        read_image(tmp_path)


def refused(source, reason, name="the image given as bytes"):
    with pytest.raises(ValueError, match=reason) as caught:
        read_image(source)
    assert "\n" not in str(caught.value)
    assert f"{name} is not an image that can be read (" in str(caught.value)


def test_an_empty_file_says_so(tmp_path):
    path = tmp_path / "photo.jpg"
    path.touch()
    refused(path, "the file is empty", name="photo.jpg")
    refused(b"", "the file is empty")


def test_text_named_as_an_image_says_so(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_text("<html>404</html>")
    refused(path, "no image format that is known", name="photo.jpg")
    with path.open("rb") as file:
        refused(file, "no image format that is known", name="photo.jpg")
    refused(io.BytesIO(b"hello"), "no image", name="the image given as a file object")


@pytest.mark.parametrize("kind", ["BMP", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"])
def test_an_image_of_which_half_is_missing_is_refused(kind, photo, tmp_path):
    path = tmp_path / "photo.dat"
    data = bytes_of(photo, kind)
    path.write_bytes(data[: len(data) // 2])
    refused(path, ".", name="photo.dat")


def test_a_truncated_image_opened_by_the_caller_is_refused(photo):
    data = bytes_of(photo, "JPEG")
    refused(Image.open(io.BytesIO(data[:-50])), "truncated", name="the image given")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9460, 14000])
def test_a_decompression_bomb_is_an_error(side, tmp_path):
    path = tmp_path / "bomb.png"
    Image.new("1", (side, side)).save(path)
    refused(path, "pixels", name="bomb.png")


def test_a_picture_too_large_is_refused_in_whatever_form_it_comes(monkeypatch, photo):
    monkeypatch.setattr(images, "MAX_PIXELS", 64 * 48 - 1)
    opened = Image.open(io.BytesIO(bytes_of(photo, "PNG")))
    for source in (bytes_of(photo, "PNG"), opened, photo, np.asarray(photo)):
        with pytest.raises(ValueError, match="64 x 48 pixels; at most 3,071 are read"):
            read_image(source)


PEAK = """
import sys
from util import images
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
import numpy, PIL.Image
PIL.Image.init()
before = peak()
picture = images.read_image(sys.argv[1])
print((peak() - before) / (picture.width * picture.height))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system tells no peak")
@pytest.mark.parametrize("kind", ["deep.tif", "float.tif", "palette.png", "rgba.webp", "rgb.jp2"])
def test_reading_takes_at_most_24_bytes_a_pixel(kind, tmp_path):
    grey = Image.linear_gradient("L").resize((1500, 1500))
    make = {
        "deep.tif": lambda: (grey.convert("I"), {}),
        "float.tif": lambda: (grey.convert("F"), {}),
        "palette.png": lambda: (grey.quantize(8), {"transparency": 2}),
        "rgba.webp": lambda: (Image.merge("RGBA", (grey,) * 4), {"method": 0}),
        "rgb.jp2": lambda: (grey.convert("RGB"), {}),
    }
    image, how = make[kind]()
    image.save(tmp_path / kind, **how)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / kind],
        cwd=Path(images.__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert 3 < float(done.stdout) < 24, done.stderr


@pytest.mark.parametrize("kind", ["EPS", "FITS", "ICNS", "ICO", "PCX", "PSD", "SGI", "TGA"])
def test_a_format_that_nobody_has_photos_in_is_not_opened(kind, photo):
    """Postscript is a program, a FITS file may unpack to all memory, and few test the others."""
    made = {
        "FITS": b"SIMPLE  =                    T".ljust(2880),
        "PSD": b"8BPS\0\1" + bytes(8) + b"\0\3\0\0\0\x01\0\0\0\1\0\x08\0\3" + bytes(20),
    }
    content = made.get(kind) or bytes_of(photo.resize((16, 16)), kind)
    refused(content, "no image format that is known")


def test_postscript_that_was_opened_by_the_caller_is_not_run(photo):
    opened = Image.open(io.BytesIO(bytes_of(photo, "EPS")))
    refused(opened, "PostScript is not read", name="the image given")


def test_heic_names_its_plug_in_and_is_read_where_that_is_installed(photo, tmp_path, monkeypatch):
    path = tmp_path / "IMG_0001.HEIC"
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99))
    assert list_images(tmp_path) == [path]
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    refused(path, "plug-in pillow-heif: pip install pillow-heif", name="IMG_0001.HEIC")

    def register():
        class Plug(ImageFile.ImageFile):
            format = "HEIF"

            def _open(self):
                self._size, self._mode = (2, 1), "RGB"
                self.im = Image.new("RGB", (2, 1), "red").im

        Image.register_open("HEIF", Plug, lambda start: start[4:12] == b"ftypheic")

    plug_in = types.SimpleNamespace(register_heif_opener=register)
    monkeypatch.setitem(sys.modules, "pillow_heif", plug_in)
    monkeypatch.setattr(Image, "ID", Image.ID.copy())
    monkeypatch.setattr(Image, "OPEN", Image.OPEN.copy())
    assert pixels(path).tolist() == [[[255, 0, 0]] * 2]


@pytest.mark.parametrize("name", ["photo.png", None])
def test_a_failing_disk_keeps_the_systems_words_and_names_the_file(name):
    class Faulty(io.BytesIO):
        def read(self, *_):
            raise OSError(5, "Input/output error", name)

    with pytest.raises(OSError, match="Input/output error") as caught:
        read_image(Faulty(b"x"))
    assert caught.value.filename == (name or "the image given as a file object")


def test_a_file_that_sends_its_reader_before_its_start_is_damaged_and_the_disk_is_not():
    class Damaged(io.BytesIO):
        def read(self, *_):
            raise OSError(22, "Invalid argument")

    refused(Damaged(b"x"), "Invalid argument", name="the image given as a file object")


def test_a_file_without_permission_is_named(photo, tmp_path):
    if not hasattr(os, "geteuid") or os.geteuid() == 0:
        pytest.skip("this user may read every file")
    path = tmp_path / "photo.png"
    photo.save(path)
    path.chmod(0)
    with pytest.raises(PermissionError, match=r"photo\.png"):
        read_image(path)


def test_memory_that_is_not_there_is_one_line(photo, monkeypatch):
    def load(_):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    refused(bytes_of(photo, "BMP"), "it takes more memory than there is")
