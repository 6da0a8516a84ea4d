"""Every way to send an image to the page's server, and a line for every way to send it wrongly."""

import base64
import io
import json

import pytest
from helpers.tiny import picture, png

import app
from util import uploads
from util.files import UserError

PHOTO = png(picture(1))
BASE64 = base64.b64encode(PHOTO).decode()
QUERY = "/caption?n=2&method=beam&attention=false"
SETTINGS = {"n": "2", "method": "beam", "attention": "false"}


@pytest.fixture(scope="module")
def asked():
    """Return the addresses that the server was asked to fetch, which grows."""
    return []


@pytest.fixture(scope="module")
def client(captioner, asked):
    def fetch(url, max_bytes):
        asked.append((url, max_bytes))
        return PHOTO

    return app.create_app(captioner, max_mb=1, fetch=fetch).test_client()


def post(client, address="/caption", **how):
    answer = client.post(address, **how)
    return answer.status_code, answer.get_json()


def error_of(answer):
    status, said = answer
    assert list(said) == ["error"] and "\n" not in said["error"]
    return status, said["error"]


@pytest.fixture(scope="module")
def wanted(client):
    """Return the answer to a form of a browser, with settings."""
    return post(client, data={"image": (io.BytesIO(PHOTO), "a.png"), **SETTINGS})


LINK = "https://example.org/a.png"
WAYS = {
    "the body itself": (QUERY, {"data": PHOTO, "content_type": "image/png"}),
    "any file": (QUERY, {"data": PHOTO, "content_type": "application/octet-stream"}),
    "a body of no type": (QUERY, {"data": PHOTO}),
    "what curl --data-binary says": (
        QUERY, {"data": PHOTO, "content_type": "application/x-www-form-urlencoded"},
    ),
    "JSON": ("/caption", {"json": {"image": BASE64, "n": 2, "attention": False}}),
    "JSON with texts": ("/caption", {"json": {"image": BASE64, **SETTINGS}}),
    "JSON and the query": (QUERY, {"json": {"image": BASE64}}),
    "JSON with null": (QUERY, {"json": {"image": BASE64, "max_words": None, "url": None}}),
    "JSON with floats": ("/caption", {"json": {"image": BASE64, **SETTINGS, "n": 2.0}}),
    "a data: URI": (QUERY, {"json": {"image": f"data:image/png;base64,{BASE64}"}}),
    "a data: URI in percent": (
        QUERY, {"json": {"image": "data:," + "".join(f"%{byte:02x}" for byte in PHOTO)}},
    ),
    "a data: URI as url": (QUERY, {"json": {"url": f"data:image/png;base64,{BASE64}"}}),
    "lines of base64": (QUERY, {"json": {"image": base64.encodebytes(PHOTO).decode()}}),
    "base64 for addresses": (
        QUERY, {"json": {"image": base64.urlsafe_b64encode(PHOTO).decode().rstrip("=")}},
    ),
    "an address in JSON": ("/caption", {"json": {"url": LINK, **SETTINGS}}),
    "an address in a form": ("/caption", {"data": {"url": LINK, **SETTINGS}}),
    "an address in the query": (f"{QUERY}&url={LINK}", {}),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_an_image_can_be_sent_in_many_ways_and_has_the_same_captions(way, client, wanted):
    address, how = WAYS[way]
    assert wanted[0] == 200 and len(wanted[1]["captions"]) == 2
    assert post(client, address, **how) == wanted


def test_captions_without_attention_are_those_with_it(client, wanted):
    _, full = post(client, data={"image": (io.BytesIO(PHOTO), "a.png"), "n": 2})
    for short, long in zip(wanted[1]["captions"], full["captions"], strict=True):
        assert long["attention"] and short.pop("attention") is None
        long.pop("attention")
        assert short.pop("log_prob") == pytest.approx(long.pop("log_prob"), abs=1e-5)
        assert short.pop("probability") == pytest.approx(long.pop("probability"), abs=1e-5)
        assert short == long


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"json": {"image": "photo.jpg"}}, "image is neither base64 nor a data: URI"),
        ({"json": {"image": "ä"}}, "image is neither base64 nor a data: URI"),
        ({"json": {"image": "data:image/png;base64"}}, "a data: URI has the form"),
        ({"json": {"image": LINK}}, "image is an address; send it as url"),
        ({"json": {"image": 7}}, "image must be the photo's file as text: base64, or a data: URI"),
        ({"json": {"image": [BASE64]}}, "image must be the photo's file as text"),
        ({"json": {"url": 7}}, "url must be the address of one photo"),
        ({"json": {"url": " "}}, "url must be the address of one photo"),
        ({"json": {"image": ""}}, "the photo is not an image that can be read (the file is empty)"),
        ({"json": {"image": BASE64, "url": LINK}}, "2 photos came; send one"),
        ({"json": [BASE64]}, "the body is not a JSON object; send"),
        ({"json": BASE64}, "the body is not a JSON object; send"),
        ({"json": {"image": BASE64, "n": True}}, "n true must be a whole number between 1 and 10"),
        ({"json": {"image": BASE64, "n": 1.5}}, "n 1.5 must be a whole number between 1 and 10"),
        ({"json": {"image": BASE64, "n": [1]}}, "n [1] must be a whole number between 1 and 10"),
        ({"json": {"image": BASE64, "n": 11}}, "n 11 must be a whole number between 1 and 10"),
        ({"json": {"image": BASE64, "top_p": {}}}, "top_p [] must be a number between 0.001"),
        ({"json": {"image": BASE64, "method": 1}}, "method 1 is not known; choose from beam"),
        ({"json": {"image": BASE64, "attention": 2}}, "attention 2 must be true or false"),
        ({"json": {"image": BASE64, "attention": "no"}}, "attention 'no' must be true or false"),
        ({"json": {"image": BASE64, "beams": 2}}, "setting 'beams' is not known; choose from"),
        ({"json": {"image": BASE64, "n": "9" * 99}}, f"n '{'9' * 79}… must be a whole number"),
    ],
    ids=str,
)
def test_json_that_can_not_be_used_is_refused_by_what_is_wrong(how, message, client):
    status, said = error_of(post(client, **how))
    assert status == 400 and said.startswith(message)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b"{'image': 1}", b"[" * 100_000, b'{"n": ' + b"9" * 5000 + b"}"]
)
def test_a_body_that_is_no_json_is_refused(body, client):
    status, said = error_of(post(client, data=body, content_type="application/json"))
    assert status == 400 and said.startswith("the body is not JSON that can be read (")
    assert len(said) < 200


def test_a_setting_that_is_given_twice_is_refused(client):
    for address, how in [
        ("/caption?n=1&n=2", {"data": PHOTO}),
        ("/caption?n=1", {"json": {"image": BASE64, "n": 1}}),
        ("/caption", {"data": {"image": (io.BytesIO(PHOTO), "a.png"), "n": ["1", "2"]}}),
        ("/caption", {"data": f'{{"image": "{BASE64}", "n": 1, "n": 2}}',
                      "content_type": "application/json"}),
    ]:  # fmt: skip
        assert error_of(post(client, address, **how)) == (
            400,
            "setting 'n' is given more than once",
        )


@pytest.mark.parametrize("kind", ["text/html", "text/plain", "video/mp4", "application/xml"])
def test_another_type_of_body_is_named(kind, client):
    status, said = error_of(post(client, data=PHOTO, content_type=kind))
    assert (status, said) == (415, f"a body of {kind} can't be read; {uploads.USAGE}")


def test_what_is_too_large_is_refused_in_every_way(client):
    over, far_over = bytes(1_000_001), bytes(2_500_000)
    text = {"image": base64.b64encode(over).decode()}
    for how in ({"data": over}, {"json": text}):
        answer = error_of(post(client, **how))
        assert answer == (413, "the photo has 1 MB; at most 1 MB are taken")
    for how in ({"data": far_over}, {"json": {"image": "A" * 3_000_000}}):
        answer = error_of(post(client, **how))
        assert answer == (413, "this upload has more than 1 MB, the most that is taken")
    fits = base64.b64encode(bytes(1_000_000)).decode()
    assert "(no image format that is known)" in error_of(post(client, json={"image": fits}))[1]


# --- addresses


def test_the_page_gets_the_file_at_an_address(client, asked):
    answer = client.post("/fetch", data={"url": f" {LINK} "})
    assert (answer.status_code, answer.data) == (200, PHOTO)
    assert answer.mimetype == "application/octet-stream"
    assert asked[-1] == (LINK, 1_000_000)


@pytest.mark.parametrize(
    "form",
    [{}, {"url": LINK, "n": 2}, {"image": (io.BytesIO(PHOTO), "a.png")}],
    ids=["nothing", "a setting", "a file"],
)
def test_fetching_takes_an_address_and_nothing_else(form, client):
    assert error_of(post(client, "/fetch", data=form))[0] == 400


def test_no_file_that_is_not_an_image_is_passed_on(captioner):
    secret = app.create_app(captioner, fetch=lambda url, max_bytes: b"<html>secret</html>")
    status, said = error_of(post(secret.test_client(), "/fetch", data={"url": LINK}))
    reason = "(no image format that is known)"
    assert (status, said) == (400, f"a.png is not an image that can be read {reason}")


def test_an_address_that_fails_is_refused_in_the_line_of_the_fault(captioner):
    def fetch(url, max_bytes):
        raise UserError(f"{url} was not found")

    broken = app.create_app(captioner, fetch=fetch).test_client()
    for address in ("/caption", "/fetch"):
        answer = error_of(post(broken, address, data={"url": LINK}))
        assert answer == (400, f"{LINK} was not found")


def test_a_server_that_fetches_nothing_says_so(captioner):
    closed = app.create_app(captioner).test_client()
    answer = error_of(post(closed, data={"url": LINK}))
    assert answer == (400, "this server fetches no addresses; send the photo itself")
    assert post(closed, "/fetch", data={"url": LINK})[0] == 404
    assert closed.get("/health").get_json()["fetches"] is False


def test_slow_addresses_leave_the_others_their_turn(captioner, monkeypatch):
    """One is being fetched, and as many as may be: the next one waits in vain."""
    monkeypatch.setattr(app, "FETCHES", 1)
    answers = []

    def fetch(url, max_bytes):
        if not answers:
            answers.append(None)
            answers.append(error_of(post(slow.test_client(), data={"url": LINK})))
            answers.append(
                post(slow.test_client(), data={"image": (io.BytesIO(PHOTO), "a.png")})[0]
            )
        return PHOTO

    slow = app.create_app(captioner, fetch=fetch, max_wait=0.1)
    assert post(slow.test_client(), data={"url": LINK})[0] == 200
    message = "too many addresses are being fetched; try again in a minute"
    assert answers[1:] == [(503, message), 200]
    assert post(slow.test_client(), data={"url": LINK})[0] == 200  # its turn was given back


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a.jpg", "a.jpg"), ("../../etc/passwd", "passwd"), ("C:\\photos\\a.jpg", "a.jpg"),
        ("", "the photo"), (None, "the photo"), ("x" * 99 + ".jpg", "x" * 76 + ".jpg"),
    ],
)  # fmt: skip
def test_a_file_is_named_without_its_folders(text, name):
    assert uploads.file_name(text) == name


def test_an_address_is_named_by_its_last_part():
    for url in (LINK, f"{LINK}?size=large#top", f"{LINK}/"):
        assert uploads.to_link(url) == uploads.Upload(name="a.png", url=url)
    assert uploads.to_link("https://example.org").name == "example.org"


def test_values_of_json_are_shown_as_json():
    with pytest.raises(UserError, match="^n null must be"):
        uploads.read_setting("n", None, {"n": (1, 2)}, ["beam"])
    assert json.dumps(uploads.read_setting("n", " 2 ", {"n": (1, 2)}, ["beam"])) == "2"
