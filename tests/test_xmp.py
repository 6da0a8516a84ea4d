"""A description goes into a photo, and nothing else of the photo changes."""

import hashlib
import io
import os
import struct
import xml.etree.ElementTree as ET
import zlib

import numpy as np
import pytest
from helpers.tiny import picture
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin, features

from util import xmp, xmp_files
from util.files import UserError
from util.xmp import edit_packet, write_description

RDF, DC = f"{{{xmp.RDF}}}", f"{{{xmp.DC}}}"
LANG = "{http://www.w3.org/XML/1998/namespace}lang"
NAMES = {"JPEG": "a.jpg", "PNG": "a.png", "WEBP": "a.webp"}
TEXT = 'a "red" dog & a <cat> 町'

LIGHTROOM = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="Adobe XMP Core 7.0">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="uuid:1&amp;2" xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:odd="urn:my own"
    xmp:Rating="4" odd:a="&lt;&quot;">
   <!-- mine --><dc:subject><rdf:Bag><rdf:li>dog</rdf:li><rdf:li>a &amp; b</rdf:li></rdf:Bag>
   </dc:subject>
   <odd:nested rdf:parseType="Resource"><dc:description>of a part</dc:description></odd:nested>%s
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
                                        
<?xpacket end="w"?>"""
OWN = """
   <dc:description><rdf:Alt><rdf:li xml:lang="x-default">my words</rdf:li>
   <rdf:li xml:lang="de-DE">meine &lt;Worte</rdf:li></rdf:Alt></dc:description>"""


def descriptions(packet):
    """The languages of the description of an XMP packet, read by another parser."""
    root = ET.fromstring(packet.decode().lstrip("\ufeff") if isinstance(packet, bytes) else packet)
    paths = f"{RDF}Description/{DC}description/{RDF}Alt/{RDF}li"
    rdf = root if root.tag == f"{RDF}RDF" else root.find(f"{RDF}RDF")
    return {each.get(LANG): each.text for each in rdf.findall(paths)}


def save(path, kind, packet=None, **more):
    """Save a photo with EXIF and a colour profile, and perhaps XMP."""
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "of a camera", 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    if packet and kind == "PNG":
        more["pnginfo"] = PngImagePlugin.PngInfo()
        more["pnginfo"].add_itxt("XML:com.adobe.xmp", packet.decode())
    elif packet:
        more["xmp"] = packet
    picture(1, (37, 23)).save(path, kind, exif=exif, icc_profile=profile, **more)
    return path


def parts_of(data):
    """All parts of a file but its XMP, as a second, simpler reader finds them."""
    parts = []
    if data[:2] == b"\xff\xd8":
        place = 2
        while data[place + 1] != 0xDA:
            end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
            if not data[place + 4 : end].startswith(b"http://ns.adobe.com/xap/1.0/\0"):
                parts.append(data[place:end])
            place = end
        return [*parts, data[place:]]
    if data[:4] == b"RIFF":
        assert int.from_bytes(data[4:8], "little") == len(data) - 8
        place = 12
        while place < len(data):
            end = place + 8 + int.from_bytes(data[place + 4 : place + 8], "little")
            end += end % 2
            if data[place : place + 4] == b"VP8X":
                parts.append(bytes([data[place + 8] & ~4]) + data[place + 9 : end])
            elif data[place : place + 4] != b"XMP ":
                parts.append(data[place:end])
            place = end
        return parts
    place = 8
    while place < len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        kind, crc = data[place + 4 : place + 8], int.from_bytes(data[end - 4 : end], "big")
        assert zlib.crc32(data[place + 4 : end - 4]) == crc
        if kind != b"iTXt" or not data[place + 8 :].startswith(b"XML:com.adobe.xmp\0"):
            parts.append(data[place:end])
        place = end
    return parts


def read_packet(path):
    with Image.open(path) as image:
        image.load()
        packet = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
        return packet.encode() if isinstance(packet, str) else packet


# --- the photo


@pytest.mark.parametrize("packet", [None, LIGHTROOM % "", LIGHTROOM % OWN])
@pytest.mark.parametrize("kind", NAMES)
def test_nothing_but_the_description_changes(kind, packet, tmp_path):
    packet = packet and packet.encode()
    path = save(tmp_path / NAMES[kind], kind, packet)
    path.chmod(0o640)
    assert xmp.has_description(str(path)) == (packet is not None and OWN.encode() in packet)
    before, pixels = path.read_bytes(), np.asarray(Image.open(path))
    assert write_description(str(path), TEXT, overwrite=True)
    after = path.read_bytes()
    assert parts_of(after) == parts_of(before) and after != before
    assert xmp.has_description(str(path))
    assert (np.asarray(Image.open(path)) == pixels).all()
    assert path.stat().st_mode & 0o777 == 0o640
    expected = {"x-default": TEXT}
    if packet and b"de-DE" in packet:
        expected["de-DE"] = "meine <Worte"
    assert descriptions(read_packet(path)) == expected
    assert write_description(str(path), TEXT, overwrite=False)  # it is there
    assert path.read_bytes() == after
    assert not write_description(str(path), "another", overwrite=False)
    assert path.read_bytes() == after
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def without_description(packet):
    """A packet as another parser sees it, with no description of the image."""
    root = ET.fromstring(packet)
    for block in list(root.find(f"{RDF}RDF")):
        for each in block.findall(f"{DC}description"):
            block.remove(each)
        if not len(block) and set(block.attrib) == {f"{RDF}about"}:
            root.find(f"{RDF}RDF").remove(block)
    return ET.canonicalize(ET.tostring(root, "unicode"), strip_text=True)


@pytest.mark.parametrize("own", ["", OWN, "<dc:description/>"])
def test_other_properties_stay_as_they_were_written(own):
    packet = (LIGHTROOM % own).encode()
    edited = edit_packet(packet, TEXT, overwrite=True)
    assert without_description(edited.decode()) == without_description(packet.decode())
    for part in (b"<!-- mine -->", b'xmlns:odd="urn:my own"', b'x:xmptk="Adobe XMP Core 7.0"'):
        assert part in edited
    assert edited.count(b'rdf:about="uuid:1&amp;2"') == (1 if own else 2)
    assert b"<dc:description>of a part</dc:description>" in edited


@pytest.mark.parametrize(
    "own",
    [
        OWN,
        OWN.replace("x-default", "en-US"),
        "<dc:description>my words</dc:description>",
        '<dc:description rdf:parseType="Literal">my words</dc:description>',
    ],
)
def test_a_description_is_kept_unless_it_is_to_be_replaced(own):
    packet = (LIGHTROOM % own).encode()
    assert xmp.Packet(packet).description == "my words"
    assert edit_packet(packet, TEXT, overwrite=False) is None
    assert edit_packet(packet, "my words", overwrite=False) == packet
    edited = edit_packet(packet, TEXT, overwrite=True)
    assert descriptions(edited)["x-default"] == TEXT
    assert ("de-DE" in descriptions(edited)) == ("de-DE" in own)


def test_a_description_that_is_an_attribute_is_one():
    packet = (LIGHTROOM % "").replace('odd:a="', 'dc:description = "mine > yours"\n odd:a="')
    assert edit_packet(packet.encode(), TEXT, overwrite=False) is None
    edited = edit_packet(packet.encode(), TEXT, overwrite=True)
    assert b"yours" not in edited and descriptions(edited) == {"x-default": TEXT}
    assert b'odd:a="&lt;&quot;"' in edited


@pytest.mark.parametrize(
    "packet",
    [
        '<rdf:RDF xmlns:rdf="{}"/>',
        '\ufeff<r:RDF xmlns:r="{}"  ></r:RDF >',
        '<?xml version="1.0" encoding="UTF-8"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<RDF xmlns="{}"><Description about="a"/></RDF></x:xmpmeta>',
        '<rdf:RDF xmlns:rdf="{}"><rdf:Description xmlns:dc="http://purl.org/dc/elements/1.1/">'
        '<dc:description><rdf:Alt><rdf:li xml:lang="x-default"> </rdf:li></rdf:Alt>'
        "</dc:description></rdf:Description></rdf:RDF>",
    ],
)
def test_a_packet_may_be_written_in_any_way(packet):
    edited = edit_packet(packet.format(xmp.RDF).encode(), TEXT, overwrite=False)
    assert descriptions(edited) == {"x-default": TEXT}
    assert edit_packet(edited, "new", overwrite=True) == edited.replace(
        TEXT.encode().replace(b"&", b"&amp;").replace(b"<", b"&lt;").replace(b">", b"&gt;"), b"new"
    )


@given(st.text())
def test_any_text_is_read_back(text):
    expected = xmp.NO_XML.sub(" ", text).replace("\r\n", "\n").replace("\r", "\n")
    if expected.strip():
        edited = edit_packet(b"", expected, overwrite=False)
        assert descriptions(edited) == {"x-default": expected}


# --- packets that are left alone

BOMB = (
    '<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;">]>'
    + (LIGHTROOM % "&b;").split("?>", 1)[1]
)
LEFT = {
    "a document type": BOMB,
    "malformed (not well-formed": LIGHTROOM[:200],
    "malformed (undefined entity": LIGHTROOM % "&b;",
    "malformed (it has no rdf:RDF)": "<html/>",
    "malformed (unbound prefix": LIGHTROOM % "<a:b/>",
    "malformed (junk after": LIGHTROOM % "" + "<a/>",
    "several descriptions": LIGHTROOM % (OWN + OWN),
    "more than": " " * 2**22 + LIGHTROOM % "",
}


@pytest.mark.parametrize("said", LEFT)
def test_a_packet_that_is_no_xmp_is_left_alone(said, tmp_path):
    packet = LEFT[said].encode()
    if said.startswith("malformed (not"):
        packet = packet + b"\xff"
    (tmp_path / "a.tif.xmp").write_bytes(packet)
    picture(1).save(tmp_path / "a.tif")
    with pytest.raises(UserError) as raised:
        write_description(str(tmp_path / "a.tif"), TEXT, overwrite=True)
    assert f"{tmp_path / 'a.tif.xmp'} is left as it is" in str(raised.value)
    assert said in str(raised.value) and "\n" not in str(raised.value)
    assert (tmp_path / "a.tif.xmp").read_bytes() == packet


def test_deep_xml_is_no_trouble():
    deep = "<odd:a>" * 100_000 + "</odd:a>" * 100_000
    packet = (LIGHTROOM % deep).encode()
    edited = edit_packet(packet, TEXT, overwrite=False)
    assert xmp.Packet(edited).description == TEXT


# --- JPEG


def segment(marker, content):
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def extended(packet, content):
    """The segments of Extended XMP, as Adobe's specification has them."""
    digest = hashlib.md5(content).hexdigest().upper()
    packet = packet.replace(
        "<odd:nested",
        f'<n:HasExtendedXMP xmlns:n="http://ns.adobe.com/xmp/note/">{digest}'
        "</n:HasExtendedXMP><odd:nested",
    )
    head = xmp_files.JPEG_MORE + digest.encode() + struct.pack(">LL", len(content), 0)
    return segment(0xE1, xmp_files.JPEG_XMP + packet.encode()) + segment(0xE1, head + content)


def jpeg(*segments):
    stream = io.BytesIO()
    picture(1).save(stream, "JPEG")
    data = stream.getvalue()
    return data[:20] + b"".join(segments) + data[20:] + b"a film after the photo"


def written(path, data, text=TEXT, overwrite=True):
    path.write_bytes(data)
    try:
        assert write_description(str(path), text, overwrite)
    except UserError:
        assert path.read_bytes() == data
        raise
    return path.read_bytes()


def test_extended_xmp_stays_bound_to_its_packet(tmp_path):
    more = b"<rdf:RDF xmlns:rdf='a'>" + b"depth " * 1000 + b"</rdf:RDF>"
    before = jpeg(extended(LIGHTROOM % "", more))
    after = written(tmp_path / "a.jpg", before)
    assert parts_of(after) == parts_of(before)
    packet = read_packet(tmp_path / "a.jpg")
    assert hashlib.md5(more).hexdigest().upper().encode() in packet
    assert descriptions(packet) == {"x-default": TEXT}
    with pytest.raises(UserError, match="has a description in Extended XMP"):
        written(tmp_path / "b.jpg", jpeg(extended(LIGHTROOM % "", b"<dc:description>")))


def test_a_list_of_further_images_stays_right(tmp_path):
    """MPF counts from its own segment to them, so what it counts over must not grow."""
    mpf = segment(0xE2, b"MPF\0II*\0" + bytes(30))
    packet = segment(0xE1, xmp_files.JPEG_XMP + (LIGHTROOM % "").encode())
    for before in (jpeg(mpf), jpeg(packet, mpf)):
        after = written(tmp_path / "a.jpg", before)
        assert parts_of(after) == parts_of(before)
        assert len(after) - after.index(b"MPF\0") == len(before) - before.index(b"MPF\0")
    with pytest.raises(UserError, match=r"behind the list of its further images \(MPF\)"):
        written(tmp_path / "a.jpg", jpeg(mpf, packet))


def test_exif_stays_first(tmp_path):
    exif, after = segment(0xE1, b"Exif\0\0II*\0"), segment(0xEE, b"other")
    data = written(tmp_path / "a.jpg", jpeg(exif, after))
    assert data.index(b"JFIF") < data.index(b"Exif\0") < data.index(b"ns.adobe.com")


def test_a_jpegs_packet_gives_up_its_room_and_is_refused_when_too_long(tmp_path):
    room = " " * (65_450 - len((LIGHTROOM % "").encode()))
    fits = (LIGHTROOM % "").replace("\n<?xpacket end", room + "\n<?xpacket end")
    data = written(tmp_path / "a.jpg", jpeg(segment(0xE1, xmp_files.JPEG_XMP + fits.encode())))
    assert len(data) < 10_000 and descriptions(read_packet(tmp_path / "a.jpg"))
    full = LIGHTROOM % f"<odd:b>{'b' * 64_700}</odd:b>"
    with pytest.raises(UserError, match="too long for a JPEG"):
        written(tmp_path / "a.jpg", jpeg(segment(0xE1, xmp_files.JPEG_XMP + full.encode())))


@pytest.mark.parametrize("kind", NAMES)
def test_a_file_cut_anywhere_is_written_with_the_same_rest_or_left_alone(kind, tmp_path):
    path = save(tmp_path / NAMES[kind], kind, (LIGHTROOM % "").encode())
    data = path.read_bytes()
    for length in range(12, len(data), 7):
        try:
            after = written(path, data[:length])
        except UserError as error:
            assert "is left as it is" in str(error)
        else:
            first, last = xmp_files.find_packet(data[:length]), xmp_files.find_packet(after)
            assert after[: last.start] == data[: first.start]
            assert after[last.end :] == data[first.end : length]


@pytest.mark.parametrize("kind", NAMES)
def test_two_packets_are_left_alone(kind, tmp_path):
    path = save(tmp_path / NAMES[kind], kind, (LIGHTROOM % "").encode())
    data = path.read_bytes()
    found = xmp_files.find_packet(data)
    double = data[: found.end] + data[found.start :]
    if kind == "WEBP":
        double = double[:4] + struct.pack("<I", len(double) - 8) + double[8:]
    with pytest.raises(UserError, match="several packets"):
        written(path, double)


# --- PNG and WebP


def test_a_compressed_packet_is_read(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", LIGHTROOM % OWN, zip=True)
    picture(1).save(tmp_path / "a.png", pnginfo=info)
    assert not write_description(str(tmp_path / "a.png"), TEXT, overwrite=False)
    assert write_description(str(tmp_path / "a.png"), TEXT, overwrite=True)
    assert descriptions(read_packet(tmp_path / "a.png"))["x-default"] == TEXT
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", " " * 2**23, zip=True)
    picture(1).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(UserError, match="more than"):
        write_description(str(tmp_path / "a.png"), TEXT, overwrite=True)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("lossless", [True, False])
def test_a_plain_webp_is_extended(lossless, mode, tmp_path):
    image = picture(1, (37, 23)).convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    image.save(tmp_path / "a.webp", lossless=lossless)
    before = (tmp_path / "a.webp").read_bytes()
    assert write_description(str(tmp_path / "a.webp"), TEXT, overwrite=False)
    after = Image.open(tmp_path / "a.webp")
    assert after.size == (37, 23) and after.mode == mode
    assert (np.asarray(after) == np.asarray(Image.open(io.BytesIO(before)))).all()
    assert set(parts_of(before)) - {b""} <= set(parts_of((tmp_path / "a.webp").read_bytes()))


# --- other formats, and files that can't be written


@pytest.mark.parametrize("name", ["a.tif", "a.gif", "a.bmp", "a.avif", "wrong.jpg"])
def test_other_formats_have_a_file_beside_them(name, tmp_path):
    if name == "a.avif" and not features.check("avif"):
        pytest.skip("Pillow reads no AVIF")
    path = tmp_path / name
    picture(1).save(path, "BMP" if name == "wrong.jpg" else None)
    before = path.read_bytes()
    assert write_description(str(path), TEXT, overwrite=False)
    assert path.read_bytes() == before
    beside = tmp_path / f"{name}.xmp"
    assert descriptions(beside.read_bytes()) == {"x-default": TEXT}
    assert xmp.has_description(str(path))
    assert not write_description(str(path), "another", overwrite=False)
    beside.write_text(LIGHTROOM % OWN)
    assert write_description(str(path), TEXT, overwrite=True)
    assert without_description(beside.read_text()) == without_description(LIGHTROOM % OWN)


def test_a_protected_photo_is_not_written(tmp_path):
    path = save(tmp_path / "a.jpg", "JPEG")
    before = path.read_bytes()
    path.chmod(0o444)
    with pytest.raises(OSError, match="cannot write"):
        write_description(str(path), TEXT, overwrite=True)
    assert path.read_bytes() == before
    path.chmod(0o644)
    os.symlink(path, tmp_path / "link.jpg")
    assert write_description(str(tmp_path / "link.jpg"), TEXT, overwrite=False)
    assert (tmp_path / "link.jpg").is_symlink() and path.read_bytes() != before
