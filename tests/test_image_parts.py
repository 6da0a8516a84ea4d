"""Files made to cost far more than their pixels: parts that aren't needed never reach Pillow."""

import io
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from helpers import images as pictures
from helpers.images import bytes_of, pixels
from PIL import Image, PngImagePlugin

from util import images
from util.files import UserError
from util.image_parts import MAX_PARTS, MAX_SCANS, MAX_VALUES, drop_metadata
from util.images import read_image

photo = pictures.photo  # the fixture
SMALL = Image.new("RGB", (10, 10), (200, 40, 40))


def costs(content):
    """Return the peak of Python's memory while a file is read, in times of its size."""
    tracemalloc.start()
    try:
        read_image(io.BytesIO(content))
        return tracemalloc.get_traced_memory()[1] / len(content)
    finally:
        tracemalloc.stop()


def is_read_alike(content):
    """Return whether Pillow decodes the file to the pixels that it decodes it to without us."""
    with Image.open(io.BytesIO(content)) as whole:
        expected = images.make_upright(whole)
    return np.array_equal(pixels(content), np.asarray(expected))


# --- JPEG


def segment(marker, content):
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def with_segments(image, *segments):
    content = bytes_of(image, "JPEG")
    return b"".join([content[:2], *segments, content[2:]])


def with_scans(number, between=b"", **how):
    """Return a progressive JPEG with the last scan repeated until there are `number`."""
    content = bytes_of(SMALL, "JPEG", progressive=True, **how)
    last = content.rindex(b"\xff\xda")
    extra = number - content.count(b"\xff\xda")
    return content[:last] + (content[last:-2] + between) * (extra + 1) + b"\xff\xd9"


@pytest.mark.parametrize("between", [b"", segment(0xFE, b"\xff\xd9 the end?")])
def test_a_jpeg_of_too_many_scans_is_refused_before_it_is_decoded(between):
    assert read_image(with_scans(MAX_SCANS, between)).size == (10, 10)
    with pytest.raises(UserError, match="more than 100 scans; save it anew as an ordinary JPEG"):
        read_image(with_scans(MAX_SCANS + 1, between))
    began = time.monotonic()
    with pytest.raises(UserError, match="more than 100 scans"):
        read_image(with_scans(300_000, between))
    assert time.monotonic() - began < 20


def test_a_jpeg_that_is_decoded_at_a_lower_size_may_have_fewer_scans(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 50)
    assert read_image(with_scans(50)).size == (5, 5)
    with pytest.raises(UserError, match="more than 50 scans"):
        read_image(with_scans(51))


def test_what_follows_a_jpeg_and_its_tables_are_no_scans():
    """Phones append a film of a second to a photo."""
    content = with_scans(20, segment(0xFE, b"\xff\xda"))
    assert read_image(content + b"\xff\xda" * 1000).size == (10, 10)


@pytest.mark.parametrize("marker", [0xFE, 0xE1, 0xE2, 0xED, 0xEF])
def test_comments_and_application_segments_cost_no_multiple_of_the_file(marker):
    for name in (
        b"",
        b"Exif\0\0",
        b"ICC_PROFILE\0\1\1",
        b"Photoshop 3.0\0",
        b"http://ns.adobe.com",
    ):
        assert costs(with_segments(SMALL, *[segment(marker, name + bytes(65_000))] * 50)) < 1.2
    assert costs(with_segments(SMALL, *[segment(marker, b"")] * 9000)) < 3


def test_a_jpeg_of_too_many_segments_is_refused():
    with pytest.raises(UserError, match="more than 100,000 segments"):
        read_image(with_segments(SMALL, *[segment(0xFE, b"")] * (MAX_PARTS + 1)))


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("how", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_a_jpeg_without_its_metadata_has_the_same_pixels(mode, how, photo):
    how = how | {"comment": b"none", "icc_profile": bytes(70_000), "dpi": (300, 300)}
    content = bytes_of(photo.convert(mode), "JPEG", **how)
    assert is_read_alike(content)
    assert is_read_alike(content.replace(b"\xff\xdb", b"junk\xff\xff\xff\xdb", 1))
    cleaned = drop_metadata(io.BytesIO(content)).read()
    assert len(content) - len(cleaned) > 70_000
    assert drop_metadata(io.BytesIO(cleaned)).read() == cleaned


def test_colours_that_only_adobes_segment_explains_are_kept(photo):
    plain = bytes_of(photo, "JPEG", quality=95)
    adobe = segment(0xEE, b"Adobe\0\x64\0\0\0\0\0")  # 0: it is RGB, not YCbCr
    content = plain[:2] + adobe + plain[plain.index(b"\xff\xdb") :]  # without JFIF's segment
    assert is_read_alike(content)
    assert np.abs(pixels(content) - pixels(plain)).mean() > 20


@pytest.mark.parametrize("cut", [3, 21, 150, 400])
def test_a_jpeg_cut_before_its_pixels_is_refused(cut, photo):
    content = bytes_of(photo, "JPEG", comment=b"a" * 99)[:cut]
    with pytest.raises(UserError, match="is not an image that can be read"):
        read_image(content)


XMP = b'<x:xmpmeta tiff:Orientation="6">'


def exif_of(orientation, order="II"):
    exif = Image.Exif()
    exif.endian = {"II": "<", "MM": ">"}[order]
    exif[0x010F], exif[0x0112], exif[0x0128] = "a camera " * 50, orientation, 2
    return exif.tobytes()


@pytest.mark.parametrize("order", ["II", "MM"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_orientation_is_kept_of_exif_and_of_xmp(kind, order, photo):
    turned = photo.transpose(Image.Transpose.ROTATE_270)
    for how in ({"exif": exif_of(6, order)}, {"exif": exif_of(6, order), "xmp": b""}):
        content = bytes_of(photo, kind, **how)
        assert is_read_alike(content)
        assert np.abs(pixels(content) - np.asarray(turned)).mean() < 9
    content = bytes_of(photo, kind, exif=exif_of(1, order))
    assert np.array_equal(pixels(content), pixels(bytes_of(photo, kind)))


def test_xmp_turns_an_image_that_has_no_exif(photo):
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", XMP, zip=True)
    for content in (
        with_segments(photo, segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP)),
        bytes_of(photo, "PNG", pnginfo=text),
    ):
        assert read_image(content).size == (48, 64)
        assert is_read_alike(content)


# --- PNG


def chunk(kind, content=b""):
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I4s", len(content), kind) + content + struct.pack(">I", checksum)


def with_chunks(image, *chunks, place=b"IDAT"):
    content = bytes_of(image, "PNG")
    start = content.index(place) - 4
    return b"".join([content[:start], *chunks, content[start:]])


BOMB = zlib.compress(bytes(1_000_000), 9)


@pytest.mark.parametrize("place", [b"IDAT", b"IEND"])
@pytest.mark.parametrize(
    "extra",
    [
        lambda n: chunk(b"zTXt", b"key %d\0\0" % n + BOMB),
        lambda n: chunk(b"iTXt", b"key %d\0\1\0\0\0" % n + BOMB),
        lambda n: chunk(b"tEXt", b"key %d\0" % n + bytes(1000)),
        lambda n: chunk(b"iCCP", b"name\0\0" + BOMB),
        lambda n: chunk(b"eXIf", b"II*\0" + bytes(1000)),
        lambda n: chunk(b"prVt", bytes(1000)),
    ],
    ids=["zTXt", "iTXt", "tEXt", "iCCP", "eXIf", "private"],
)
def test_texts_and_other_chunks_of_a_png_cost_no_multiple_of_the_file(extra, place):
    content = with_chunks(SMALL, *(extra(number) for number in range(3000)), place=place)
    assert costs(content) < 1.2
    assert np.array_equal(pixels(content), np.asarray(SMALL))


def test_a_png_of_too_many_chunks_is_refused():
    with pytest.raises(UserError, match="more than 100,000 chunks"):
        read_image(with_chunks(SMALL, chunk(b"IDAT") * (MAX_PARTS + 1)))


def test_the_orientation_in_a_text_of_a_png_is_kept(photo):
    digits = exif_of(6).hex()
    lines = "\n".join(digits[start : start + 72] for start in range(0, len(digits), 72))
    for zip in (False, True):
        text = PngImagePlugin.PngInfo()
        text.add_text("Raw profile type exif", f"\nexif\n{len(digits) // 2:8}\n{lines}\n", zip)
        content = bytes_of(photo, "PNG", pnginfo=text)
        assert read_image(content).size == (48, 64)
        assert is_read_alike(content)
    assert (
        read_image(with_chunks(photo, chunk(b"eXIf", exif_of(8)[6:]), place=b"IEND")).height == 64
    )


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "I;16"])
def test_a_png_without_its_metadata_has_the_same_pixels(mode, photo):
    deep = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 256)
    image = deep if mode == "I;16" else photo.convert(mode)
    how = {"transparency": 3} if mode in "PL" else {}
    content = bytes_of(image, "PNG", dpi=(72, 72), icc_profile=b"none" * 99, **how)
    assert is_read_alike(content)
    assert len(drop_metadata(io.BytesIO(content)).read()) < len(content)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "TIFF"])
def test_only_the_first_of_many_frames_is_read(kind):
    frames = [Image.new("RGB", (8, 8), (number, 0, 99)) for number in range(250)]
    content = bytes_of(frames[200], kind, save_all=True, append_images=frames)
    assert np.abs(pixels(content) - [200, 0, 99]).max() < 8
    assert is_read_alike(content)


# --- GIF and TIFF


def test_comments_of_a_gif_cost_no_multiple_of_the_file(photo):
    content = bytes_of(photo.quantize(8), "GIF", transparency=3)
    start = content.index(b"!\xf9")  # before what says which colour is transparent
    extra = b"!\xfe" + b"\2ab" * 300 + b"\0"
    longer = content[:start] + extra * 300 + content[start:]
    assert is_read_alike(longer) and np.array_equal(pixels(longer), pixels(content))
    assert costs(longer) < 2
    with pytest.raises(UserError, match="more than 100,000 blocks"):
        read_image(content[:start] + b"!\xfe" + b"\1a" * MAX_PARTS + b"\0" + content[start:])


def tiff_with(entries, big=False):
    """Return a TIFF of one black pixel with more entries: (tag, type, number of values)."""
    order, pair = ("<HHQQ", 8) if big else ("<HHLL", 4)
    needed = {256: 1, 257: 1, 258: 8, 262: 1, 273: 0, 277: 1, 278: 1, 279: 1}
    entries = [(tag, 3, 1, value) for tag, value in needed.items()] + [
        (*each, 8) for each in entries
    ]
    count = struct.pack("<Q" if big else "<H", len(entries))
    head = b"II+\0\x08\0\0\0" + struct.pack("<Q", 16) if big else b"II*\0" + struct.pack("<L", 8)
    return head + count + b"".join(struct.pack(order, *each) for each in entries) + bytes(pair)


@pytest.mark.parametrize("big", [False, True])
def test_tags_of_a_tiff_that_share_their_values_are_refused(big):
    assert read_image(tiff_with([], big) + bytes(5000)).size == (1, 1)
    content = tiff_with([(50_000 + n, 7, 5000) for n in range(2000)], big) + bytes(5000)
    with pytest.raises(UserError, match="its tags claim 10,000,"):
        read_image(content)


def test_a_tag_of_too_many_values_is_refused():
    content = tiff_with([(50_000, 4, MAX_VALUES + 1)]) + bytes(4 * MAX_VALUES + 99)
    with pytest.raises(UserError, match="a tag of 262,145 values; at most 262,144 are read"):
        read_image(content)
    assert read_image(tiff_with([(50_000, 7, 10**6)]) + bytes(10**6)).size == (1, 1)


@pytest.mark.parametrize("content", [b"II*\0", b"MM\0*\0\0\0\x08\xff\xff", b"II+\0" + b"\xff" * 30])
def test_a_tiff_that_ends_in_its_directory_is_refused_in_one_line(content):
    with pytest.raises(UserError, match="is not an image that can be read"):
        read_image(content)
