"""Image file → the same file with only the parts that its pixels and its orientation need.

Metadata is made of many small parts that Pillow keeps as objects, joins again and again, or
unpacks to a thousand times their size, and each scan of a progressive JPEG costs as much time as
the whole image. A file made for it would take hours or all memory, so parts that aren't needed are
dropped before Pillow sees them, and those that are needed are limited in number.
"""

import io
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

from util.files import UserError

MAX_SCANS = 100  # of a JPEG; encoders write about 10, and each goes through all of its pixels
MAX_PARTS = 100_000  # segments of a JPEG, chunks of a PNG, blocks of a GIF before its pixels
MAX_VALUES = 2**18  # of a tag of a TIFF, such as the positions of its strips
MAX_TEXT = 2**20  # bytes of compressed metadata that are unpacked
ORIENTATION = 274  # the tag in EXIF and TIFF

JPEG_MARKER = re.compile(rb"\xff([^\x00\xff])")
SOS, EOI = 0xDA, 0xD9
STANDALONE = {0x01, *range(0xD0, 0xDA)}  # markers without a length: RST0 to RST7, SOI, EOI, TEM
# The chunks of a PNG that say what its pixels are.
PNG_NEEDED = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"acTL", b"fcTL"}
# The bytes of a value of each of TIFF's types; the type's number is the position.
TIFF_SIZES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8)
TIFF_BYTES = (1, 2, 6, 7)  # types that are kept as bytes, however many there are


def drop_metadata(stream: BinaryIO) -> BinaryIO:
    """Return a seekable image file without the parts that its pixels don't need.

    Of EXIF and XMP the orientation is kept. Files that aren't JPEG, PNG, GIF or TIFF are returned
    as they are. UserError for a JPEG of more than `MAX_SCANS` scans, and other files with so many
    parts that reading them would take far more memory or time than their pixels.
    """
    stream.seek(0)
    signature = stream.read(4)
    stream.seek(0)
    for start, clean in CLEANERS.items():
        if signature.startswith(start):
            stream = clean(stream)
            break
    stream.seek(0)
    return stream


def check_parts(number: int, what: str) -> None:
    """Raise UserError if a file has too many parts."""
    if number > MAX_PARTS:
        raise UserError(f"more than {MAX_PARTS:,} {what}; save it anew with an image editor")


# --- JPEG


def clean_jpeg(stream: BinaryIO) -> BinaryIO:
    """Return a JPEG without comments and application segments, except JFIF's and Adobe's.

    Libjpeg needs these two to know the colours.
    """
    data = stream.read()
    needed: list[tuple[int, int]] = []  # where segments begin and end
    application: dict[bytes, tuple[int, int]] = {}
    exif = xmp = b""
    place, number = 2, 0
    while True:
        found = JPEG_MARKER.search(data, place)
        if not found:
            raise UserError("the file is truncated")
        start, place, marker = found.start(), found.end(), found[1][0]
        if marker == SOS:
            break
        check_parts(number := number + 1, "segments")
        if marker in STANDALONE:
            continue
        place += int.from_bytes(data[place : place + 2], "big")
        if 0xE0 <= marker <= 0xEF or marker == 0xFE:
            kind = data[start + 1 : min(start + 9, place)]  # the marker, the length, a name
            if kind.startswith(b"\xe0") and kind[3:] == b"JFIF\0":
                application[b"JFIF"] = start, place
            elif kind.startswith(b"\xee") and kind[3:] == b"Adobe":
                application[b"Adobe"] = start, place
            elif kind.startswith(b"\xe1") and kind[3:] == b"Exif\0" and not exif:
                exif = data[start + 4 : place]
            elif kind.startswith(b"\xe1") and kind[3:] == b"http:" and not xmp:
                xmp = data[start + 4 : place]
        else:
            needed.append((start, place))
    check_scans(data, start)
    parts = [b"\xff\xd8", *(data[slice(*each)] for each in application.values())]
    if orientation := make_exif(exif, xmp):
        length = len(orientation) + 2
        parts.append(b"\xff\xe1" + length.to_bytes(2, "big") + orientation)
    parts += [data[slice(*each)] for each in needed]
    return io.BytesIO(b"".join([*parts, memoryview(data)[start:]]))


def check_scans(data: bytes, place: int = 2, most: int = MAX_SCANS) -> None:
    """Raise UserError if there are more than `most` scans from `place` in a JPEG to its end."""
    # The bytes of a marker may also be part of a table, so the fast count is an upper limit.
    if data.count(b"\xff\xda", place) > most and count_scans(data, place, most) > most:
        raise UserError(f"more than {most} scans; save it anew as an ordinary JPEG")


def count_scans(data: bytes, place: int, most: int) -> int:
    """Return how many scans there are from `place` to the end of the image, up to `most` + 1."""
    scans = 0
    while scans <= most and (found := JPEG_MARKER.search(data, place)):
        place, marker = found.end(), found[1][0]
        if marker == EOI:
            break
        scans += marker == SOS
        if marker not in STANDALONE:
            place += int.from_bytes(data[place : place + 2], "big")
    return scans


# --- PNG


def clean_png(stream: BinaryIO) -> BinaryIO:
    """Return a PNG without texts, colour profiles and private chunks, and without later frames."""
    data = stream.read()
    parts, texts = [], {}
    place, number, in_pixels = 8, 0, False
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        start, place = place, place + 12 + length
        check_parts(number := number + 1, "chunks")
        if kind == b"IEND" or (in_pixels and kind in (b"fcTL", b"fdAT")):
            parts.append(b"\0\0\0\0IEND\xaeB`\x82")
            break
        in_pixels |= kind == b"IDAT"
        if kind in PNG_NEEDED:
            parts.append(memoryview(data)[start:place])
        elif kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
            name, content = kind, data[start + 8 : place - 4]
            if kind != b"eXIf":
                name, _, content = content.partition(b"\0")
            if name in (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp"):
                texts.setdefault(name, (kind, content))
    exif = texts.get(b"eXIf", (b"", b""))[1]
    if not exif and (text := texts.get(b"Raw profile type exif")):  # hexadecimal, after 3 lines
        digits = b"".join(unpack_text(*text).split(b"\n")[3:])
        exif = bytes.fromhex(re.match(rb"(?:[0-9a-fA-F]{2})*", digits)[0].decode())
    if orientation := make_exif(exif, unpack_text(*texts.get(b"XML:com.adobe.xmp", (b"", b"")))):
        content = b"eXIf" + orientation[6:]
        chunk = struct.pack(f">I{len(content)}sI", len(content) - 4, content, zlib.crc32(content))
        parts.insert(1, chunk)
    return io.BytesIO(b"".join([data[:8], *parts]))


def unpack_text(kind: bytes, content: bytes) -> bytes:
    """Return the text in a tEXt, zTXt or iTXt chunk, of which `content` follows the keyword."""
    is_compressed = kind == b"zTXt"
    if kind == b"zTXt":
        content = content[1:]
    elif kind == b"iTXt":
        is_compressed = content[:1] == b"\1"
        content = content[2:].split(b"\0", 2)[-1]
    if not is_compressed:
        return content[:MAX_TEXT]
    try:
        return zlib.decompressobj().decompress(content, MAX_TEXT)
    except zlib.error:
        return b""


# --- GIF


def clean_gif(stream: BinaryIO) -> BinaryIO:
    """Return a GIF without comments and other extensions before its first frame."""
    data = stream.read()
    colors = data[10] if len(data) > 10 else 0
    place = 13 + (3 << (colors & 7) + 1 if colors & 0x80 else 0)
    header, control, number = data[:place], b"", 0
    while data[place : place + 1] not in (b",", b";", b""):
        start, is_extension = place, data[place] == ord("!")
        place += 2 if is_extension else 1  # Pillow skips what it doesn't know
        while is_extension and place < len(data) and data[place]:
            check_parts(number := number + 1, "blocks")
            place += 1 + data[place]
        place += is_extension
        check_parts(number := number + 1, "blocks")
        if data[start : start + 2] == b"!\xf9":  # says which colour is transparent
            control = data[start:place]
    return io.BytesIO(b"".join([header, control, memoryview(data)[place:]]))


# --- TIFF


def check_tiff(stream: BinaryIO) -> BinaryIO:
    """Return a TIFF as it is; UserError where tags share their values or have too many."""
    total = 0
    for _, kind, count, _ in list_tags(stream):
        total += count * TIFF_SIZES[kind]
        if count > MAX_VALUES and kind not in TIFF_BYTES:
            raise UserError(f"a tag of {count:,} values; at most {MAX_VALUES:,} are read")
    if total > (size := stream.seek(0, os.SEEK_END)):
        raise UserError(f"its tags claim {total:,} bytes, the file has {size:,}")
    return stream


def list_tags(stream: BinaryIO) -> Iterator[tuple[int, int, int, bytes]]:
    """Yield tag, type, count and last field of each entry of a TIFF's first directory.

    A directory that can't be read has no entries.
    """
    head = stream.read(16)
    order = "<" if head.startswith(b"II") else ">"
    is_big = 43 in head[2:4]
    entry, number = (f"{order}HHQ8s", f"{order}Q") if is_big else (f"{order}HHL4s", f"{order}H")
    try:
        (offset,) = struct.unpack_from(f"{order}Q" if is_big else f"{order}L", head, 4 << is_big)
        stream.seek(offset)
        (count,) = struct.unpack(number, stream.read(struct.calcsize(number)))
    except (struct.error, ValueError, OverflowError, OSError):
        return
    entries = stream.read(min(count, 2**16) * struct.calcsize(entry))
    whole = len(entries) // struct.calcsize(entry) * struct.calcsize(entry)
    for tag, kind, values, field in struct.iter_unpack(entry, entries[:whole]):
        if kind < len(TIFF_SIZES):
            yield tag, kind, values, field


# --- orientation


def make_exif(exif: bytes, xmp: bytes = b"") -> bytes:
    """Return an EXIF block with nothing but the orientation that EXIF, else XMP, gives.

    It is empty if none does.
    """
    orientation = find_orientation(exif)
    if orientation is None and (found := re.search(rb'tiff:Orientation(?:="|>)([0-9])', xmp)):
        orientation = int(found[1])
    if orientation is None:
        return b""
    tag = struct.pack(">HHLHH", ORIENTATION, 3, 1, orientation, 0)
    return b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + tag + bytes(4)


def find_orientation(exif: bytes) -> int | None:
    """Return the orientation in an EXIF block, or None if there is none."""
    exif = re.sub(rb"^(Exif\0\0)+", b"", exif)
    order = "<" if exif.startswith(b"II") else ">"
    for tag, kind, count, field in list_tags(io.BytesIO(exif)):
        if tag == ORIENTATION and count == 1 and kind in (1, 3, 4):
            return struct.unpack_from(order + {1: "B", 3: "H", 4: "L"}[kind], field)[0] % 2**16
    return None


CLEANERS: dict[bytes, Callable[[BinaryIO], BinaryIO]] = {
    b"\xff\xd8\xff": clean_jpeg,
    b"\x89PNG": clean_png,
    b"GIF8": clean_gif,
    **dict.fromkeys((b"II*\0", b"II\0*", b"II+\0", b"MM\0*", b"MM*\0", b"MM\0+"), check_tiff),
}
