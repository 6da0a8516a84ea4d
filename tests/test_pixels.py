"""Images of 12 bits in files of 16, of any kind: as bright as the same image of 8 bits."""

import io
import struct

import numpy as np
import pytest
from helpers.images import bytes_of, pixels
from PIL import Image

from util.images import read_image

GREY = np.add.outer(np.arange(48), np.arange(64)) / 110  # 0 to 1


def png(array) -> bytes:
    """Write a PNG of 16 bits with 3 or 4 channels, which Pillow can't."""
    import zlib

    height, width, channels = array.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(
            ">I", zlib.crc32(kind + content)
        )  # fmt: skip

    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff(array) -> bytes:
    """Write an uncompressed TIFF of 16 bits with 3 channels."""
    height, width, channels = array.shape
    data = array.astype("<u2").tobytes()
    tags = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, channels, 8), (259, 3, 1, 1),
        (262, 3, 1, 2), (273, 4, 1, 14), (277, 3, 1, channels), (278, 4, 1, height),
        (279, 4, 1, len(data)),
    ]  # fmt: skip
    bits = struct.pack("<HHH", 16, 16, 16)
    head = struct.pack("<2sHI", b"II", 42, 14 + len(data)) + bits
    entries = b"".join(struct.pack("<HHLL", *tag) for tag in tags)
    return head + data + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_grey_of_any_depth_is_as_bright_as_that_of_8_bits(kind, bits):
    deep = (GREY * (2**bits - 1)).astype(np.uint16)
    image = Image.open(io.BytesIO(bytes_of(Image.fromarray(deep), kind)))
    assert image.mode.startswith("I;16")
    read = pixels(bytes_of(Image.fromarray(deep), kind))
    assert np.abs(read - (GREY * 255)[..., None]).max() <= 1


@pytest.mark.parametrize("write", [png, tiff])
@pytest.mark.parametrize("bits", [12, 14, 16])
def test_colours_are_as_bright_too_in_as_many_steps_as_pillow_keeps(write, bits):
    colors = np.stack([GREY, GREY[::-1], 1 - GREY], -1)
    read = pixels(write((colors * (2**bits - 1)).astype(np.uint16)))
    assert np.abs(read - colors * 255).max() <= 2 ** (16 - bits) + 1


def test_the_alpha_of_16_bit_colours_is_kept():
    colors = np.stack([GREY, GREY, GREY], -1) * 4095
    clear = np.full((48, 64, 1), 65535)
    clear[:, :32] = 0
    read = pixels(png(np.concatenate([colors, clear], -1).astype(np.uint16)))
    assert (read[:, :32] == 255).all()  # transparent, on white
    assert np.abs(read[:, 32:, 0] - GREY[:, 32:] * 255).max() <= 17
    assert np.abs(pixels(np.concatenate([colors, clear], -1).astype(np.uint16)) - read).max() <= 17


@pytest.mark.parametrize("shape", [(48, 64), (48, 64, 3)])
def test_arrays_of_a_sensor_are_not_black(shape):
    array = np.broadcast_to(GREY.reshape(48, 64, *[1] * (len(shape) - 2)), shape) * 4095
    assert np.abs(pixels(array.astype(np.uint16))[..., 0] - GREY * 255).max() <= 1


@pytest.mark.parametrize("mode", ["I", "F"])
def test_modes_of_32_bits_have_the_same_whites(mode):
    deep = (GREY * 4095).astype({"I": np.int32, "F": np.float32}[mode])
    assert np.abs(pixels(Image.fromarray(deep))[..., 0] - GREY * 255).max() <= 1


def test_black_stays_black():
    assert read_image(png(np.zeros((4, 4, 3), np.uint16))).getextrema() == ((0, 0),) * 3
    assert read_image(np.zeros((4, 4), np.uint16)).getextrema() == ((0, 0),) * 3
