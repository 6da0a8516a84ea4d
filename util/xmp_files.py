"""Where the XMP packet is in a JPEG, PNG or WebP, and the same file with another packet.

All other bytes stay as they are, those of the pixels too; only a WebP's header counts its parts.
Raises UserError for a file whose parts are not certain.
"""

import mmap
import re
import struct
import zlib
from typing import NamedTuple

from util.files import UserError

MAX_PACKET = 2**22  # bytes; those of an editor's long history have some 100,000
MAX_SEGMENT = 2**16 - 3  # of a JPEG, without its marker and length
JPEG_XMP, JPEG_MORE = b"http://ns.adobe.com/xap/1.0/\0", b"http://ns.adobe.com/xmp/extension/\0"
PNG_XMP = b"XML:com.adobe.xmp\0"
SOS, STANDALONE = 0xDA, {0, 1, *range(0xD0, 0xDA)}  # markers; without a length
PNG, JPEG, WEBP = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF....WEBP"
XMP_FLAG, ALPHA_FLAG = 0x04, 0x10  # of a WebP's VP8X


Data = bytes | mmap.mmap  # of a file; mapped, only what is asked for is read


class Found(NamedTuple):
    """Where the part with the XMP packet begins and ends in a file, and the packet.

    Without one, it is where a new one belongs, twice, and b"".
    """

    kind: str
    start: int
    packet: bytes
    end: int


def find_kind(head: bytes) -> str:
    """Return "jpeg", "png" or "webp" by a file's first 12 bytes, "" for other files."""
    for kind, magic in (("png", PNG), ("jpeg", JPEG), ("webp", WEBP)):
        if re.match(magic if kind == "webp" else re.escape(magic), head, re.DOTALL):
            return kind
    return ""


def find_packet(data: Data) -> Found:
    """Return where the XMP packet is in a JPEG, PNG or WebP."""
    return {"jpeg": search_jpeg, "png": search_png, "webp": search_webp}[find_kind(data[:12])](data)


def replace_packet(data: Data, found: Found, packet: bytes) -> bytes:
    """Return the file with another packet."""
    before, after = data[: found.start], data[found.end :]
    if found.kind == "png":
        body = b"iTXt" + PNG_XMP + bytes(4) + packet  # not compressed, no language
        chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
        return before + chunk + after
    if found.kind == "webp":
        chunk = b"XMP " + struct.pack("<I", len(packet)) + packet + bytes(len(packet) % 2)
        before = extend_webp(before)
        size = riff_size(data) + len(before) - found.end + len(chunk)
        return before[:4] + struct.pack("<I", size) + before[8:] + chunk + after
    if len(JPEG_XMP + packet) > MAX_SEGMENT:  # room that is kept for editors
        packet = re.sub(rb"\s+(?=<\?xpacket end)", b"\n", packet)
    segment = JPEG_XMP + packet
    if len(segment) > MAX_SEGMENT:
        raise UserError("its XMP would be too long for a JPEG")
    return before + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + after


# --- JPEG


def search_jpeg(data: Data) -> Found:
    """Return where the packet of a JPEG is; a new one comes behind JFIF and EXIF.

    Of Extended XMP that is the standard packet alone: the extension is bound to it by a digest of
    the extension alone, so it stays valid.
    """
    found, more, place, new, images = [], b"", 2, 2, 0
    while True:
        start = place
        while data[place : place + 2] == b"\xff\xff":  # fill bytes
            place += 1
        marker, length = data[place : place + 2], int.from_bytes(data[place + 2 : place + 4], "big")
        if len(marker) < 2 or marker[0] != 0xFF or marker[1] in STANDALONE or length < 2:
            raise UserError("the file is damaged")
        if marker[1] == SOS:
            break
        end = place + 2 + length
        content = data[place + 4 : end]
        if len(content) != length - 2:
            raise UserError("the file is truncated")
        if marker == b"\xff\xe1" and content.startswith(JPEG_XMP):
            if images:
                raise UserError("its XMP is behind the list of its further images (MPF)")
            found.append((start, content.removeprefix(JPEG_XMP), end))
        elif marker == b"\xff\xe1" and content.startswith(JPEG_MORE):
            more += content[len(JPEG_MORE) + 40 :]
        elif marker == b"\xff\xe2" and content.startswith(b"MPF\0"):
            images = start
        if start == new and (marker == b"\xff\xe0" or content.startswith(b"Exif\0")):
            new = end
        place = end
    if b":description" in more:
        raise UserError("it has a description in Extended XMP")
    return choose("jpeg", found, new)


def choose(kind: str, found: list[tuple[int, bytes, int]], new: int) -> Found:
    """Return the packet of those `found`, or where a `new` one belongs."""
    if len(found) > 1:
        raise UserError("it has several packets of XMP")
    return Found(kind, *(found[0] if found else (new, b"", new)))


# --- PNG


def search_png(data: Data) -> Found:
    """Return where the packet of a PNG is; a new one comes behind the header."""
    found, place, new = [], len(PNG), 0
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        start, place = place, place + 12 + length
        name = data[start + 8 : start + 8 + min(length, 32)]
        if kind == b"iTXt" and name.startswith(PNG_XMP):
            content = data[start + 8 : place - 4]
            if place > len(data):
                raise UserError("the file is truncated")
            found.append((start, unpack_text(content.removeprefix(PNG_XMP)), place))
        elif kind in (b"zTXt", b"tEXt") and name.startswith(b"Raw profile type xmp\0"):
            raise UserError("its XMP is in ImageMagick's own form")
        new = new or place
        if kind == b"IEND":
            break
    if data[len(PNG) + 4 : len(PNG) + 8] != b"IHDR" or new > len(data):
        raise UserError("the file is damaged")
    return choose("png", found, new)


def unpack_text(content: bytes) -> bytes:
    """Return the text of an iTXt chunk, of which `content` follows the keyword."""
    fields = content[2:].split(b"\0", 2)
    if len(fields) != 3:
        raise UserError("its XMP is damaged")
    if content[:1] != b"\1":
        return fields[2]
    try:
        unpack = zlib.decompressobj()
        text = unpack.decompress(fields[2], MAX_PACKET)
    except zlib.error as error:
        raise UserError(f"its XMP is damaged ({error})") from None
    if not unpack.eof:
        raise UserError(f"its XMP has more than {MAX_PACKET:,} bytes, or is damaged")
    return text


# --- WebP


def search_webp(data: Data) -> Found:
    """Return where the packet of a WebP is; a new one comes last."""
    end = 8 + riff_size(data)
    if end > len(data):
        raise UserError("the file is truncated")
    found, place = [], 12
    while place + 8 <= end:
        kind, length = struct.unpack_from("<4sI", data, place)
        start, place = place, place + 8 + length + length % 2
        if place > end:
            raise UserError("the file is truncated")
        if kind == b"XMP ":
            found.append((start, data[start + 8 : start + 8 + length], place))
    return choose("webp", found, end)


def riff_size(data: Data) -> int:
    """Return how many bytes a WebP says that it has, without the first 8."""
    return int.from_bytes(data[4:8], "little")


def extend_webp(before: bytes) -> bytes:
    """Return what precedes the packet of a WebP, saying that there is one."""
    if before[12:16] == b"VP8X":
        return before[:20] + bytes([before[20] | XMP_FLAG]) + before[21:]
    return before[:12] + make_header(before) + before[12:]


def make_header(data: bytes) -> bytes:
    """Return the chunk VP8X that a WebP with metadata begins with, of one without metadata."""
    flags, kind, content = XMP_FLAG, data[12:16], data[20:30]
    if kind == b"VP8 " and content[3:6] == b"\x9d\x01\x2a":
        width, height = (size & 0x3FFF for size in struct.unpack_from("<HH", content, 6))
    elif kind == b"VP8L" and content[:1] == b"\x2f":
        bits = int.from_bytes(content[1:5], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        flags |= ALPHA_FLAG if bits >> 28 & 1 else 0
    else:
        raise UserError("the file is damaged")
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"VP8X" + struct.pack("<I", 10) + bytes([flags, 0, 0, 0]) + size
