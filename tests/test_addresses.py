"""Addresses and data: URIs in place of image files."""

import base64

import pytest

from util.addresses import decode_data_uri, shorten
from util.files import UserError

CONTENT = bytes(range(256)) * 300


def test_data_uris_are_decoded():
    code = base64.b64encode(CONTENT).decode()
    assert decode_data_uri(f"data:image/png;base64,{code}") == CONTENT
    assert decode_data_uri(f"DATA:;BASE64,{code}") == CONTENT
    url_safe = code.replace("+", "-").replace("/", "_").rstrip("=")
    assert decode_data_uri(f"data:image/png;base64,{url_safe}") == CONTENT
    broken = "\n".join(code[start : start + 76] for start in range(0, len(code), 76))
    assert decode_data_uri(f"data:image/png;base64,{broken}") == CONTENT
    assert decode_data_uri(f"data:image/png;base64,{code.replace('+', '%2B')}") == CONTENT
    assert decode_data_uri("data:text/plain;charset=utf-8,a%20b,c") == b"a b,c"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("data:image/png;base64", "has the form"),
        ("data:image/png;base64,", "is empty"),
        ("data:image/png;base64,a", "is damaged"),
        ("data:image/png;base64,ab*d", "is damaged"),
        ("data:image/png;base64,äöüß", "is damaged"),
        ("data:,aaaaaaaaaaaaaaaaaaaaa", "more than 2e-05 MB"),
        ("data:;base64," + "a" * 200, "more than 2e-05 MB"),
    ],
)
def test_bad_data_uris_are_refused(text, reason):
    with pytest.raises(UserError, match=reason):
        decode_data_uri(text, max_bytes=20)


def test_short_names_stay_different():
    first, second = (shorten("data:image/png;base64," + "a" * 999 + end) for end in "bc")
    assert first != second
    assert first.startswith("data:image/png (sha256 ")
    assert len(first) < 50
    assert shorten("https://host/photo.jpg?x=1") == "https://host/photo.jpg?x=1"
    long = "https://host/" + "a" * 999
    assert shorten(long + "b") != shorten(long + "c")
    assert len(shorten(long)) <= 300
