"""The description of an image in XMP (dc:description), where photo managers show and search it.

The packet, an XML text, is not built anew: only the bytes of the description change, so all other
properties stay as their program wrote them. `write_description` puts it into a JPEG, PNG or WebP,
all other bytes of which stay too; images of other formats get a file beside them.
"""

import errno
import mmap
import os
import re
from pathlib import Path
from typing import Any, NamedTuple
from xml.parsers import expat
from xml.sax.saxutils import escape

from util import files, xmp_files
from util.files import UserError
from util.xmp_files import MAX_PACKET

RDF, DC = "http://www.w3.org/1999/02/22-rdf-syntax-ns#", "http://purl.org/dc/elements/1.1/"
XML = "http://www.w3.org/XML/1998/namespace"
SEPARATOR = "\1"  # between a namespace and a name; no XML has it
RDF_ROOT, BLOCK, ITEM, ABOUT = (
    f"{RDF}{SEPARATOR}{name}" for name in ("RDF", "Description", "li", "about")
)
DESCRIPTION, LANGUAGE = f"{DC}{SEPARATOR}description", f"{XML}{SEPARATOR}lang"
DEFAULT = "x-default"
# What XML 1.0 has no way to write.
NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
TAG = re.compile(rb"""</?[^\s/>]+(?:\s+[^\s=]+\s*=\s*(?:"[^"]*"|'[^']*'))*\s*/?>""")
# Tells other programs' scanners where the packet is in a file of any format; "w": may be edited.
BEGIN = b'<?xpacket begin="\xef\xbb\xbf" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'
END = b'\n<?xpacket end="w"?>'
EMPTY = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/">\n'
    b' <rdf:RDF xmlns:rdf="' + RDF.encode() + b'">\n </rdf:RDF>\n</x:xmpmeta>'
)


class Place(NamedTuple):
    """Where an element is in a packet, in bytes, and its text."""

    start: int
    end: int
    text: str
    language: str = ""


class Packet:
    """An XMP packet as UTF-8; `description` is its dc:description for any language, or "".

    Raises UserError if it is not XMP, or not such that it can be changed with nothing lost.
    """

    def __init__(self, content: bytes) -> None:
        self.content = content.rstrip(b"\0")
        if len(content) > MAX_PACKET:
            raise UserError(f"its XMP has {len(content):,} bytes, more than {MAX_PACKET:,}")
        self.path: list[str] = []  # names of the open elements
        self.starts: list[int] = []
        self.text: list[str] = []
        self.language = ""
        self.rest: list[Any] = []  # all there is besides the description
        self.rdf: Place | None = None
        self.about: str | None = None  # which resource the properties are of
        self.element: Place | None = None  # dc:description
        self.attribute: tuple[Place, str] | None = None  # the element that has it, its value
        self.items: list[Place] = []  # of the description, one per language
        self._parse()
        texts = {item.language: item.text for item in self.items if item.text.strip()}
        self.description = texts.get(DEFAULT) or next(iter(texts.values()), "")
        if self.attribute:
            self.description = self.attribute[1]
        elif self.element and not self.items:
            self.description = self.element.text.strip()

    def _parse(self) -> None:
        parser = expat.ParserCreate("utf-8", namespace_separator=SEPARATOR)
        parser.ordered_attributes = True
        parser.buffer_text = True
        parser.StartDoctypeDeclHandler = self._refuse_doctype
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._add_text
        self.parser = parser
        try:
            parser.Parse(self.content, True)
        except expat.ExpatError as error:
            raise UserError(f"its XMP is malformed ({error})") from None
        if self.rdf is None:
            raise UserError("its XMP is malformed (it has no rdf:RDF)")

    def _refuse_doctype(self, *_: Any) -> None:
        raise UserError("its XMP has a document type, as no image needs")

    def _start(self, name: str, attributes: list[str]) -> None:
        start = self.parser.CurrentByteIndex
        given = dict(zip(attributes[::2], attributes[1::2], strict=True))
        if self._is_property() and name == DESCRIPTION:
            if self.element or self.attribute:
                raise UserError("its XMP has several descriptions")
            self.element, self.text = Place(start, 0, ""), []
        elif self._is_block(name) and (value := given.pop(DESCRIPTION, None)) is not None:
            if self.element or self.attribute:
                raise UserError("its XMP has several descriptions")
            self.attribute = Place(start, 0, ""), value
        if self._is_block(name) and self.about is None:
            self.about = given.get(ABOUT, given.get("about", ""))
        self.path.append(name)
        self.starts.append(start)
        if not self._in_description():
            self.rest.append((name, given))
        elif name == ITEM:
            self.language, self.text = given.get(LANGUAGE, ""), []

    def _end(self, name: str) -> None:
        place = self.parser.CurrentByteIndex
        start, text = self.starts.pop(), "".join(self.text)
        end = self._tag_end(start)
        if end == place and self.content[end - 2 : end] == b"/>":  # <name/> is start and end
            place = start
        else:
            end = self._tag_end(place)
        inside = self._in_description()
        self.path.pop()
        if not inside:
            self.rest.append(name)
            if name == RDF_ROOT and self.rdf is None:
                self.rdf = Place(start, place, "")
        elif not self._in_description():
            self.element = Place(start, end, text)
        elif name == ITEM:
            self.items.append(Place(start, end, text, self.language))

    def _add_text(self, text: str) -> None:
        if self._in_description():
            self.text.append(text)
        elif text.strip():
            self.rest.append(text)

    def _tag_end(self, start: int) -> int:
        found = TAG.match(self.content, start)
        if not found:
            raise UserError("its XMP is malformed")
        return found.end()

    def _is_block(self, name: str) -> bool:
        """Return whether an element that starts here holds properties of the image itself."""
        is_top = len(self.path) <= 2 and self.path[-1:] == [RDF_ROOT]
        return is_top and name == BLOCK

    def _is_property(self) -> bool:
        is_top = len(self.path) <= 3
        return is_top and self.path[-2:] == [RDF_ROOT, BLOCK]

    def _in_description(self) -> bool:
        outer = [RDF_ROOT, BLOCK, DESCRIPTION]
        return any(self.path[i : i + 3] == outer for i in range(min(2, len(self.path))))

    def describe(self, text: str) -> bytes:
        """Return the packet with `text` as the description in the language x-default."""
        kept = [item for item in self.items if item.language not in (DEFAULT, "")]
        element = (
            b'<dc:description xmlns:dc="%b" xmlns:rdf="%b"><rdf:Alt><rdf:li xml:lang="%b">%b'
            b"</rdf:li>%b</rdf:Alt></dc:description>"
        ) % (
            DC.encode(), RDF.encode(), DEFAULT.encode(), escape(text).encode(),
            b"".join(self.content[item.start : item.end] for item in kept),
        )  # fmt: skip
        block = (
            b'<rdf:Description rdf:about="%b" xmlns:rdf="%b">%b</rdf:Description>\n'
            % (escape(self.about or "", {'"': "&quot;"}).encode(), RDF.encode(), element)
        )  # fmt: skip
        content = self.content
        if self.element:
            return content[: self.element.start] + element + content[self.element.end :]
        if self.attribute:
            start = self.attribute[0].start
            end = self._tag_end(start)
            tag = re.sub(
                rb"""\s+[^\s="']+:description\s*=\s*("[^"]*"|'[^']*')""", b"", content[start:end]
            )
            content = content[:start] + tag + content[end:]
            return Packet(content).describe(text)
        if self.rdf.start == self.rdf.end:  # <rdf:RDF/>
            end = self._tag_end(self.rdf.start)
            tag = content[self.rdf.start : end]
            name = re.match(rb"<([^\s/>]+)", tag)[1]
            whole = b"%b>%b</%b>" % (tag[:-2], block, name)
            return content[: self.rdf.start] + whole + content[end:]
        return content[: self.rdf.end] + block + content[self.rdf.end :]


def edit_packet(content: bytes, text: str, overwrite: bool) -> bytes | None:
    """Return an XMP packet with `text` as its description; None if it has another one.

    With `overwrite` that is replaced; other languages are kept, and all other properties. `content`
    may be empty. Raises UserError where the packet can't be changed with nothing lost.
    """
    text = re.sub(r"\r\n?", "\n", NO_XML.sub(" ", text))
    is_new = not content.strip(b"\0 \t\r\n")
    before = Packet(BEGIN + EMPTY + END if is_new else content)
    if before.description == text:
        return content
    if before.description.strip() and not overwrite:
        return None
    edited = before.describe(text)
    after = Packet(edited)
    # The properties may have a block more, that of the description.
    about = {ABOUT: before.about or ""}
    block = [(BLOCK, about), BLOCK]
    rests = [[each for each in packet.rest if each not in block] for packet in (before, after)]
    if after.description != text or rests[0] != rests[1]:
        raise UserError("its XMP can't be changed with nothing lost")
    return edited


def description_file(image: str) -> str:
    """Return the path of the file that holds an image's description: the image, or photo.tif.xmp.

    That is the name which digiKam and darktable give to such files; photo.xmp could be of several
    images.
    """
    with open(image, "rb") as file:
        return image if xmp_files.find_kind(file.read(12)) else f"{image}.xmp"


def has_description(image: str) -> bool:
    """Return whether an image has a description; False, too, where that can't be known."""
    try:
        path = description_file(image)
        with open(path, "rb") as file:
            if path != image:
                packet = file.read(MAX_PACKET + 1)
            else:
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    packet = xmp_files.find_packet(data).packet
        return bool(packet) and bool(Packet(packet).description.strip())
    except (UserError, OSError):
        return False


def write_description(image: str, text: str, overwrite: bool) -> bool:
    """Write the description of an image; return False if it has another one, which is kept.

    With `overwrite` it is replaced. Raises UserError, and changes nothing, where that could lose
    something; OSError if the file can't be written.
    """
    path = description_file(image)
    try:
        if path == image:
            data = Path(path).read_bytes()
            found = xmp_files.find_packet(data)
            earlier = found.packet
        else:
            earlier = Path(path).read_bytes() if os.path.lexists(path) else b""
        packet = edit_packet(earlier, text, overwrite)
        if packet is None or packet == earlier:
            return packet is not None
        if files.is_protected(path):
            raise files.write_error(errno.EACCES, path)
        if path == image:
            packet = xmp_files.replace_packet(data, found, packet)
        files.write_bytes(path, packet)
    except UserError as error:
        raise UserError(f"{path} is left as it is: {error}") from error
    return True
