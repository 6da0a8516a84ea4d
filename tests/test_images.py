"""Any picture in, an upright RGB image out; and which pictures are in a folder."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import images as pictures
from helpers.images import bytes_of, pixels
from PIL import Image, features

from util import images
from util.images import list_images, read_image

photo = pictures.photo  # the fixture


# --- sources


def test_every_kind_of_source_gives_the_same_pixels(photo, tmp_path):
    path = tmp_path / "photo.png"
    photo.save(path)
    data = path.read_bytes()
    rest = io.BytesIO(data)
    rest.seek(7)
    sources = [str(path), path, data, bytearray(data), memoryview(data), io.BytesIO(data), rest]
    sources += [Image.open(path), photo, np.asarray(photo), np.asarray(photo) / 255]
    for source in sources:
        image = read_image(source)
        assert (image.mode, image.size) == ("RGB", (64, 48))
        assert np.array_equal(np.asarray(image), np.asarray(photo))


def test_a_pipe_is_read(photo):
    reader, writer = os.pipe()
    with open(writer, "wb") as file:
        photo.save(file, "PNG")
    with open(reader, "rb", buffering=0) as file:
        assert np.array_equal(pixels(file), np.asarray(photo))


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"])
def test_every_common_format_is_read(kind, photo):
    read = pixels(bytes_of(photo, kind))
    assert np.abs(read - np.asarray(photo)).mean() < 8


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow was built without AVIF")
def test_avif_is_read(photo):
    assert np.abs(pixels(bytes_of(photo, "AVIF", quality=90)) - np.asarray(photo)).mean() < 8


@pytest.mark.parametrize("name", ["photo.jpg", "photo.gif", "photo.txt", "photo", "photo.heic"])
def test_the_content_and_not_the_extension_says_what_a_file_is(name, photo, tmp_path):
    (tmp_path / name).write_bytes(bytes_of(photo, "PNG"))
    assert np.array_equal(pixels(tmp_path / name), np.asarray(photo))


@pytest.mark.parametrize(
    "name", ["фото 写真 \U0001f436.png", "é" * 120 + ".png", "a\nb\x1b[1m.png"]
)
def test_a_file_of_any_name_is_read_listed_and_refused(name, photo, tmp_path):
    path = tmp_path / name
    try:
        photo.save(path)
    except OSError:
        pytest.skip("this file system has no such names")
    assert list_images(tmp_path) == [path]
    assert np.array_equal(pixels(path), np.asarray(photo))
    path.write_bytes(b"text")
    with pytest.raises(ValueError, match="no image format"):
        read_image(path)


def test_a_name_that_no_file_can_have_is_one_error():
    with pytest.raises(OSError, match="name too long"):
        read_image("a" * 5000 + ".jpg")
    with pytest.raises(ValueError, match="null"):
        read_image("a\0b.jpg")


def test_links_are_followed_out_of_the_folder_once_and_never_in_a_circle(photo, tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    (outside / "deep").mkdir(parents=True)
    photo.save(outside / "photo.png")
    photo.save(outside / "deep" / "photo.png")
    try:
        (inside / "link.png").symlink_to(outside / "photo.png")
        (inside / "gone.png").symlink_to(outside / "gone.png")
        (inside / "folder").symlink_to(outside)
        (inside / "second").symlink_to(outside / "deep")  # listed below the first
        (inside / "loop").symlink_to(inside)
        (inside / "above").symlink_to(tmp_path)
        (inside / "self").symlink_to(inside / "self")
        (outside / "back").symlink_to(inside)
        (outside / "deep" / "up").symlink_to(outside)
    except OSError:
        pytest.skip("links are not allowed here")
    assert list_images(inside) == [
        inside / name for name in ("folder/deep/photo.png", "folder/photo.png", "gone.png",
                                   "link.png")
    ]  # fmt: skip
    assert list_images(inside, recursive=False) == [inside / "gone.png", inside / "link.png"]
    assert np.array_equal(pixels(inside / "link.png"), np.asarray(photo))
    with pytest.raises(FileNotFoundError, match="gone"):
        read_image(inside / "gone.png")


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP"])
def test_a_picture_of_one_pixel_is_read(kind):
    read = pixels(bytes_of(Image.new("RGB", (1, 1), (250, 10, 10)), kind))
    assert read.shape == (1, 1, 3) and np.abs(read - [250, 10, 10]).max() < 12


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_every_mode_is_read_as_pillow_shows_it(mode, photo):
    image = photo.convert(mode)
    assert np.array_equal(pixels(image), np.asarray(image.convert("RGB")))


def test_an_upright_rgb_image_is_not_copied(photo):
    assert read_image(photo) is photo


def test_an_image_handed_over_is_left_as_it_was(photo):
    photo.getexif()[0x0112] = 3
    photo.info["transparency"] = (0, 0, 0)
    before = photo.tobytes(), dict(photo.info)
    read_image(photo)
    assert (photo.tobytes(), photo.info) == before


def test_reading_closes_the_file(photo, tmp_path):
    path = tmp_path / "pages.tif"
    photo.save(path, save_all=True, append_images=[photo])
    image = read_image(path)
    path.unlink()
    assert np.array_equal(np.asarray(image.resize((64, 48))), np.asarray(photo))


# --- upright


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "MPO"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_exif_rotated_photo_reads_like_the_upright_one(kind, orientation, photo):
    undo = {5: 5, 6: 8, 7: 7, 8: 6}.get(orientation, orientation)
    turn = images.TURNS.get(undo)
    lying = photo if turn is None else photo.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = read_image(bytes_of(lying, kind, exif=exif))
    assert image.size == (64, 48)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(photo)).mean() < 4


def test_reading_twice_turns_once(photo):
    exif = Image.Exif()
    exif[0x0112] = 6
    once = read_image(bytes_of(photo, "JPEG", exif=exif))
    assert once.size == (48, 64)
    assert np.array_equal(pixels(once), np.asarray(once))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "damage", [b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12", b"junk"]
)
def test_a_corrupt_exif_block_does_not_stop_the_reading(damage, photo):
    data = bytes_of(photo, "JPEG", quality=95)
    assert np.array_equal(pixels(bytes_of(photo, "JPEG", quality=95, exif=damage)), pixels(data))


# --- colours


@pytest.mark.parametrize("mode", ["RGBA", "LA", "La", "RGBa", "PA"])
def test_transparent_pixels_are_white(mode):
    grey = Image.new("LA", (4, 4), (40, 255))
    grey.putpixel((1, 2), (0, 0))
    image = grey if mode == "LA" else grey.convert("La" if mode == "La" else "RGBA")
    image = image.convert(mode) if mode in ("RGBa", "PA") else image
    assert image.mode == mode
    read = read_image(image)
    assert read.getpixel((1, 2)) == (255, 255, 255)
    assert read.getpixel((0, 0)) == (40, 40, 40)


def test_half_transparent_black_is_grey():
    assert read_image(Image.new("RGBA", (1, 1), (0, 0, 0, 128))).getpixel((0, 0)) == (127,) * 3


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP"])
def test_a_file_with_transparency_is_laid_on_white(kind, photo):
    see_through = photo.convert("RGBA")
    see_through.paste((0, 0, 0, 0), (0, 0, 32, 48))
    read = pixels(bytes_of(see_through, kind))
    assert (read[:, :31] == 255).all()
    assert np.abs(read[:, 33:] - np.asarray(photo)[:, 33:]).mean() < 8


def test_a_palette_or_colour_marked_transparent_is_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    for image in (palette, palette.convert("RGB")):
        mark = 0 if image.mode == "P" else (10, 20, 30)
        read = read_image(bytes_of(image, "PNG", transparency=mark))
        assert (read.getpixel((0, 0)), read.getpixel((1, 0))) == ((255,) * 3, (40, 50, 60))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_a_16_bit_grey_reads_like_its_8_bit_version(kind):
    grey = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    expected = (grey >> 8).astype(int)[..., None]
    assert np.abs(pixels(bytes_of(Image.fromarray(grey), kind)) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I"])
def test_a_bright_deep_grey_is_not_saturated(mode):
    assert read_image(Image.new(mode, (2, 2), 32896)).getpixel((0, 0)) == (128,) * 3


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_grey_in_floats_reads_like_its_8_bit_version(white):
    grey = np.linspace(0, white, 256, dtype=np.float32).reshape(16, 16)
    assert np.array_equal(pixels(Image.fromarray(grey))[..., 0].ravel(), np.arange(256))


def test_floats_of_unknown_range_use_their_own_and_missing_ones_are_dark():
    grey = np.array([[-10, 1e6, np.nan, np.inf]], dtype=np.float32)
    assert pixels(Image.fromarray(grey))[0, :, 0].tolist() == [0, 255, 0, 0]
    assert (pixels(Image.fromarray(np.zeros((2, 2), np.float32))) == 0).all()


def test_a_cmyk_jpeg_has_the_colours_it_was_made_from(photo):
    data = bytes_of(photo.convert("CMYK"), "JPEG", quality=95)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    assert np.abs(pixels(data) - np.asarray(photo)).mean() < 4


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_several_is_read(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    data = bytes_of(frames[0], kind, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.abs(pixels(data) - [255, 0, 0]).max() < 8


# --- arrays


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1), (6, 5, 3), (6, 5, 4)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", ">u2", "float16", "float32", "float64"])
def test_arrays_of_every_depth_are_the_same_picture(shape, dtype):
    picture = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    picture[..., 3:] = 255
    scale = {"u": 1 if dtype == "uint8" else 257, "f": 1 / 255}[np.dtype(dtype).kind]
    image = read_image((picture * np.float64(scale)).round(6).astype(dtype))
    assert (image.mode, image.size) == ("RGB", (5, 6))
    expected = picture[..., :3] if picture.ndim == 3 else picture[..., None]
    assert np.array_equal(np.asarray(image), np.broadcast_to(expected, (6, 5, 3)))


def test_a_bool_array_is_black_and_white():
    assert pixels(np.array([[True, False]]))[0, :, 0].tolist() == [255, 0]


def test_a_transposed_array_is_read():
    array = np.arange(24, dtype=np.uint8).reshape(3, 2, 4).T
    assert np.array_equal(pixels(array), array)


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((3, 5, 6), np.uint8), r"shape \(3, 5, 6\) and uint8 .* expected shape \(H, W\)"),
        (np.zeros((1, 5, 6, 3), np.uint8), r"shape \(1, 5, 6, 3\)"),
        (np.zeros((0, 5), np.uint8), r"shape \(0, 5\)"),
        (np.zeros((5,), np.uint8), r"shape \(5,\)"),
        (np.zeros((5, 6), np.int64), r"int64 .* expected .* uint8, uint16, bool, or floats"),
        (np.array([["a"]]), r"<U1 is not an image"),
        (np.full((5, 6), 200.0), "reach from 200 to 200; .* floats in 0..1"),
        (np.array([[-0.5, 1]]), "reach from -0.5 to 1"),
        (np.array([[np.nan, 1]]), "reach from nan to nan"),
        ([[1, 2]], "a list is not an image"),
        (None, "a NoneType is not an image"),
    ],
)
def test_an_array_that_is_no_picture_says_what_is_expected(array, said):
    with pytest.raises(ValueError, match=said):
        read_image(array)


# --- faster reading


def test_a_large_jpeg_read_at_least_so_large_keeps_twice_that(photo):
    data = bytes_of(photo.resize((1600, 1200)), "JPEG", quality=95)
    small = read_image(data, at_least=100)
    assert small.size == (400, 300)
    exact = np.asarray(read_image(data).resize(small.size, Image.Resampling.BOX)).astype(int)
    assert np.abs(np.asarray(small) - exact).mean() < 2


def test_small_and_other_pictures_are_read_exactly_whatever_is_asked(photo):
    for kind in ("JPEG", "PNG"):
        data = bytes_of(photo, kind)
        assert np.array_equal(pixels(data, at_least=224), pixels(data))
    assert read_image(bytes_of(photo, "PNG"), at_least=2).size == photo.size


# --- folders


def test_the_images_below_a_folder_are_listed_in_order(tmp_path):
    wanted = ["B.JPG", "a.png", "sub/c.jpeg", "sub/deeper/d.WebP"]
    others = [".hidden.jpg", "sub/._c.jpeg", ".cache/e.jpg", "__MACOSX/f.jpg", "notes.txt", "jpg"]
    for name in wanted + others:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "folder.jpg").mkdir()
    assert list_images(tmp_path) == sorted(tmp_path / name for name in wanted)
    assert list_images(str(tmp_path / "sub" / "deeper")) == [tmp_path / "sub/deeper/d.WebP"]


def test_a_link_to_a_folder_that_is_listed_anyway_adds_nothing(tmp_path, monkeypatch):
    for name in ("z/a.jpg", ".store/b.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    try:
        (tmp_path / "a").symlink_to("z")  # relative, and earlier in the order
        (tmp_path / "z" / "again").symlink_to(tmp_path / "z")
        (tmp_path / "shown").symlink_to(".store")  # would be hidden otherwise
    except OSError:
        pytest.skip("links are not allowed here")
    names = ["shown/b.jpg", "z/a.jpg"]
    assert list_images(tmp_path) == [tmp_path / name for name in names]
    monkeypatch.chdir(tmp_path)
    assert list_images(".") == [Path(name) for name in names]
    (tmp_path.parent / "linked-root").symlink_to(tmp_path)
    root = tmp_path.parent / "linked-root"
    assert list_images(root) == [root / name for name in names]


def test_a_folder_that_cannot_be_read_is_logged_and_the_rest_is_listed(
    tmp_path, monkeypatch, caplog
):
    for name in ("a/x.jpg", "b/x.jpg", "c/x.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    scan = os.scandir

    def guarded(path):
        if os.path.basename(str(path)) == "b":  # pytest gives numbers of open folders
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", guarded)
    assert list_images(tmp_path) == [tmp_path / "a/x.jpg", tmp_path / "c/x.jpg"]
    assert f"the folder {tmp_path / 'b'} can't be read (Permission denied)" in caplog.text
    with pytest.raises(PermissionError):
        list_images(tmp_path / "b")
    errors = []
    assert list(images.walk_images(tmp_path / "b", on_error=errors.append)) == []
    assert [error.filename for error in errors] == [str(tmp_path / "b")]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes of POSIX")
def test_a_pipe_in_a_folder_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").touch()
    assert list_images(tmp_path) == [tmp_path / "b.jpg"]


def test_a_hidden_folder_may_be_asked_for_by_name(tmp_path):
    folder = tmp_path / ".cache"
    folder.mkdir()
    (folder / "a.jpg").touch()
    assert list_images(folder) == [folder / "a.jpg"]


def test_listing_a_missing_folder_or_a_file_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list_images(tmp_path / "nowhere")
    (tmp_path / "a.jpg").touch()
    with pytest.raises(OSError, match=r"a\.jpg"):
        list_images(tmp_path / "a.jpg")


def test_the_extensions_listed_are_those_of_the_formats_that_are_read():
    formats = Image.registered_extensions()
    for extension in images.EXTENSIONS - {".heic", ".heif"}:  # those a plug-in reads
        assert formats[extension] in images.FORMATS
    assert {formats[each] for each in images.EXTENSIONS & formats.keys()} >= set(images.FORMATS)


def test_the_documentation_lists_the_formats_that_are_read():
    text = (Path(images.__file__).parents[1] / "docs/inference.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^Formats that are read: (.*?\))\. ", text, re.MULTILINE | re.DOTALL)
    listed = {name.split()[0].upper() for name in re.sub(r"\(.*?\)", "", line).split(", ")}
    assert listed == {*images.FORMATS, "HEIC"}


def test_importing_needs_neither_torch_nor_numpy():
    code = "import sys, util.images; assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(images.__file__).parents[1], check=True)


# --- large ones


@pytest.mark.parametrize("at_least", [None, 8, 24, 400])
@pytest.mark.parametrize("how", [{}, {"progressive": True}])
def test_a_jpeg_of_too_many_pixels_is_decoded_at_a_lower_size(at_least, how, photo, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 400 * 300 - 1)
    monkeypatch.setattr(images, "MAX_JPEG", 400 * 300)
    data = bytes_of(photo.resize((400, 300)), "JPEG", quality=95, **how)
    image = read_image(data, at_least)
    factor = {None: 2, 8: 8, 24: 4, 400: 2}[at_least]
    assert image.size == (400 // factor, -(-300 // factor))
    expected = np.asarray(photo.resize(image.size)).astype(int)
    assert np.abs(np.asarray(image) - expected).mean() < 5
    opened = Image.open(io.BytesIO(data))
    assert read_image(opened).size == (200, 150)
    opened = Image.open(io.BytesIO(data))
    opened.load()
    with pytest.raises(ValueError, match="400 x 300 pixels; at most 119,999 are read"):
        read_image(opened)


def test_more_pixels_than_are_read_are_one_line_with_both_limits(photo, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 64 * 48 - 1)
    said = "64 x 48 pixels; at most 3,071 are read, of a JPEG 300,000,000; save it smaller"
    with pytest.raises(ValueError, match=said):
        read_image(bytes_of(photo, "WEBP"))
    monkeypatch.setattr(images, "MAX_JPEG", 64 * 48 - 1)
    with pytest.raises(ValueError, match="64 x 48 pixels; at most 3,071 are read, of a JPEG 3,071"):
        read_image(bytes_of(photo, "JPEG"))


LARGE = """
import logging, resource, sys, warnings
from util import images
warnings.simplefilter("error")
for at_least in (224, None):
    print(images.read_image(sys.argv[1], at_least).size)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured in other units elsewhere")
@pytest.mark.parametrize(("progressive", "most"), [(False, 700), (True, 1800)])
def test_300_megapixels_are_read_in_bounded_memory(progressive, most, tmp_path):
    code = f"""
import sys
from PIL import Image
Image.new("RGB", (20000, 15000), (200, 90, 30)).save(sys.argv[1], progressive={progressive})
"""
    path = str(tmp_path / "large.jpg")
    subprocess.run([sys.executable, "-c", code, path], check=True)
    root = Path(images.__file__).parents[1]
    command = [sys.executable, "-c", LARGE, path]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    reduced, full, memory = done.stdout.splitlines()
    assert (reduced, full) == ("(2500, 1875)", "(10000, 7500)"), done.stderr
    assert float(memory) < most


# --- what is no image


def test_files_left_out_are_counted_by_their_ending(tmp_path):
    from collections import Counter

    names = ["a.jpg", "a.txt", "a.xmp", "b.txt", "c.mov", "sub/d.MOV", "sub/e", ".f.cr2", "g.cr2"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    others = Counter()
    assert list(images.walk_images(tmp_path, others=others)) == [str(tmp_path / "a.jpg")]
    assert others == {".mov": 2, ".txt": 1, ".cr2": 1, "": 1}
    line = images.count_others(others)
    assert line.startswith("5 files that are no images: 2 .mov, 1 ") and "1 without an end" in line
    assert images.count_others(Counter([".mov"])) == "1 file that is no image: 1 .mov"
    assert "2 other endings" in images.count_others(Counter({f".{n}": 1 for n in range(11)}))


@pytest.mark.parametrize("ending", [".j2k", ".jpx", ".jpf", ".j2c", ".jpc", ".avifs", ".pfm"])
def test_every_ending_of_a_format_that_is_read_is_listed(ending, tmp_path):
    (tmp_path / f"a{ending}").touch()
    (tmp_path / f"B{ending.upper()}").touch()
    assert len(list_images(tmp_path)) == 2
