"""Sites that the operator allows may ask for captions from a browser; all others may not."""

import io

import pytest
from helpers.tiny import picture, png

import app
from util import origins
from util.files import UserError

PHOTO = png(picture(1))
SITE = "https://front.example"
PREFLIGHT = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "content-type",
}


@pytest.fixture(scope="module")
def client(captioner):
    sites = (SITE, "http://localhost:5173")
    return app.create_app(captioner, max_mb=0.1, allow_origin=sites).test_client()


def shared(answer):
    """Return the headers of an answer that are for pages of other sites."""
    return {name: value for name, value in answer.headers if name.startswith("Access-Control")}


@pytest.mark.parametrize("origin", [SITE, "http://localhost:5173"])
def test_a_page_of_an_allowed_site_gets_captions_and_errors(origin, client):
    headers = {"Origin": origin}
    for data, status in ((PHOTO, 200), (b"no image", 400), (bytes(100_001), 413)):
        answer = client.post("/caption", data=data, headers=headers)
        assert answer.status_code == status
        assert shared(answer) == {"Access-Control-Allow-Origin": origin}
        assert answer.headers["Vary"] == "Origin"
    for address in ("/health", "/openapi.json", "/nothing"):
        answer = client.get(address, headers=headers)
        assert shared(answer) == {"Access-Control-Allow-Origin": origin}


@pytest.mark.parametrize("address", ["/caption", "/health", "/nothing"])
def test_a_browser_that_asks_beforehand_is_told_what_is_allowed(address, client):
    answer = client.options(address, headers={"Origin": SITE, **PREFLIGHT})
    assert (answer.status_code, answer.data) == (204, b"")
    assert shared(answer) == {
        "Access-Control-Allow-Origin": SITE,
        "Access-Control-Allow-Methods": "GET, POST",
        "Access-Control-Allow-Headers": "Content-Type",
        "Access-Control-Max-Age": "600",
    }


@pytest.mark.parametrize(
    "origin",
    [
        "http://front.example", "https://front.example:8443", "https://front.example.evil.example",
        "https://evil.example", "https://xfront.example", "https://sub.front.example", "null",
        "https://front.example/", "HTTPS://FRONT.EXAMPLE", "*", "",
    ],
)  # fmt: skip
def test_an_origin_must_be_exactly_an_allowed_one(origin, client):
    headers = {"Origin": origin}
    if origin:  # without any, no browser asks
        for answer in (
            client.post("/caption", data=PHOTO, headers=headers),
            client.options("/caption", headers={**headers, **PREFLIGHT}),
        ):
            assert answer.status_code == 403
            assert answer.get_json() == {"error": "pages of other sites may not ask for captions"}
            assert shared(answer) == {}
    answer = client.get("/health", headers=headers)  # which the browser then keeps from the page
    assert shared(answer) == {} and answer.headers["Vary"] == "Origin"


def test_without_allowed_sites_there_is_none(captioner):
    closed = app.create_app(captioner).test_client()
    answer = closed.options("/caption", headers={"Origin": SITE, **PREFLIGHT})
    assert answer.status_code == 403 and shared(answer) == {}
    answer = closed.post("/caption", data=PHOTO)
    assert "Vary" not in answer.headers and shared(answer) == {}


def test_an_allowed_site_does_not_make_a_foreign_host_name_known(client):
    headers = {"Origin": SITE, "Host": "evil.example"}
    form = {"image": (io.BytesIO(PHOTO), "a.png")}
    answer = client.post("/caption", data=form, headers=headers)
    assert answer.status_code == 403 and "--hostnames NAME" in answer.get_json()["error"]
    assert client.options("/caption", headers={**headers, **PREFLIGHT}).status_code == 403


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("https://Example.org", "https://example.org"),
        ("https://example.org/", "https://example.org"),
        ("https://example.org:443", "https://example.org"),
        ("http://example.org:80/", "http://example.org"),
        ("http://example.org:443", "http://example.org:443"),
        (" http://127.0.0.1:3000 ", "http://127.0.0.1:3000"),
        ("http://[::1]:3000", "http://[::1]:3000"),
        ("http://[0:0:0:0:0:0:0:1]", "http://[::1]"),
        ("https://bücher.example", "https://xn--bcher-kva.example"),
    ],
)
def test_an_origin_is_compared_as_browsers_send_it(text, origin):
    assert origins.parse_origin(text) == origin


@pytest.mark.parametrize(
    "text",
    [
        "*", "", "null", "example.org", "//example.org", "ftp://example.org", "https://",
        "https://example.org/app", "https://example.org?a", "https://example.org#a",
        "https://user@example.org", "https://example.org:port", "https://example.org:99999",
        "https://*.example.org", "https://exa mple.org", "https://[::1", "https://[a]",
        "https://a..b", "file:///tmp", "https://a\nb",
    ],
)  # fmt: skip
def test_what_is_no_origin_is_refused_in_one_line(text):
    with pytest.raises(UserError, match="is not an origin; give scheme and host") as error:
        origins.parse_origin(text)
    assert str(error.value).startswith(f"allow origin {text!r} ")


def test_the_flag_may_be_given_several_times_and_is_checked(monkeypatch):
    parsed = app.program.parse(
        app.Config, ["--allow-origin", SITE, "--allow-origin", "http://localhost:3000"],
        program="app.py", description="",
    )  # fmt: skip
    assert parsed.allow_origin == (SITE, "http://localhost:3000")
    with pytest.raises(UserError, match="sites are allowed by name"):
        app.Config(allow_origin=("*",))
