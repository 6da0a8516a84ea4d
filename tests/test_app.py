"""What the page's server answers: captions, a line for what is wrong, nothing for other sites."""

import io
import re
import threading
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny import METHODS, picture, png, tiny_model
from PIL import Image

import app
import inference
from decoding import DecodingConfig
from inference import Captioner
from util.files import UserError

ROOT = Path(__file__).parent.parent


PHOTO = png(picture(1))


def ask(client, photo=PHOTO, name="photo.png", headers=None, **settings):
    """Return status and JSON of a photo sent as a browser sends it."""
    form = {"image": (io.BytesIO(photo), name), **settings}
    response = client.post("/caption", data=form, headers=headers)
    return response.status_code, response.get_json()


def error_of(*answer):
    """Return status and message of a refused request, which has nothing else in it."""
    status, said = answer
    assert list(said) == ["error"] and "\n" not in said["error"]
    return status, said["error"]


# --- captions


@pytest.mark.parametrize("method", METHODS)
def test_the_endpoint_gives_the_captions_of_inference(method, client, run):
    n = 1 if method == "greedy" else 3
    status, said = ask(client, method=method, n=n, max_words=5)
    assert status == 200
    texts = [caption["text"] for caption in said["captions"]]
    same = inference.caption(picture(1), checkpoint=run, method=method, n=n, max_words=5)
    assert (texts if n > 1 else texts[0]) == same


def test_a_large_photo_is_read_as_inference_reads_it(captioner, monkeypatch):
    class AskedError(Exception):
        pass

    def read(reader, content, name, at_least=None):
        raise AskedError(at_least)

    monkeypatch.setattr(app.ImageReader, "read", read)
    application = app.create_app(captioner)
    application.testing = True
    with pytest.raises(AskedError, match=f"^{captioner.at_least}$"):
        ask(application.test_client())


def test_without_settings_there_is_the_one_caption_of_inference(client, run):
    status, said = ask(client)
    assert status == 200
    assert [each["text"] for each in said["captions"]] == [
        inference.caption(picture(1), checkpoint=run)
    ]


def test_a_caption_comes_with_its_words_their_probability_and_where_they_looked(client, captioner):
    _, said = ask(client, n=3)
    for caption, same in zip(said["captions"], captioner.explain(picture(1), n=3), strict=True):
        assert list(caption) == ["text", "log_prob", "probability", "words", "attention"]
        assert caption["words"] == caption["text"].split() == same.words
        assert caption["log_prob"] == pytest.approx(same.log_prob, abs=1e-5)
        words = len(same.words) + 1  # the end token counts as one
        assert caption["probability"] ** words == pytest.approx(np.exp(same.log_prob))
        looks = np.array(caption["attention"])
        assert looks.shape == same.attention.shape
        assert looks == pytest.approx(same.attention, abs=6e-5)
        assert looks.sum((1, 2)) == pytest.approx(np.ones(len(same.words)), abs=0.01)


def test_a_model_without_attention_gives_none():
    lstm = app.create_app(Captioner(tiny_model(decoder="lstm"))).test_client()
    status, said = ask(lstm)
    assert status == 200 and said["captions"][0]["attention"] is None


def test_every_setting_can_be_sent_and_has_a_default(client):
    known = {each.name for each in fields(DecodingConfig)}
    settings = client.get("/health").get_json()["settings"]
    assert set(settings) == known | {"n"}
    assert settings["method"] == {"default": "beam", "choices": list(METHODS)}
    assert settings["max_words"] == {"default": None, "least": 1, "most": 8}  # the model's
    assert {name: each["default"] for name, each in settings.items()} == {
        "n": 1,
        **{each.name: each.default for each in fields(DecodingConfig)},
    }


@pytest.mark.parametrize("end", ["least", "most"])
@pytest.mark.parametrize("name", app.BOUNDS)
def test_a_setting_may_be_at_either_end(name, end, client):
    value = client.get("/health").get_json()["settings"][name][end]
    method = "sample" if name in ("temperature", "top_k", "top_p", "seed") else "beam"
    status, said = ask(client, method=method, **{name: value})
    assert status == 200 and said["captions"][0]["words"] is not None


# --- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "bean"}, "method 'bean' is not known; choose from beam, greedy, sample"),
        ({"beam_size": "0"}, "beam_size '0' must be a whole number between 1 and 20"),
        ({"beam_size": "21"}, "beam_size '21' must be a whole number between 1 and 20"),
        ({"beam_size": "2.5"}, "beam_size '2.5' must be a whole number between 1 and 20"),
        ({"n": "eleven"}, "n 'eleven' must be a whole number between 1 and 10"),
        ({"max_words": "9"}, "max_words '9' must be a whole number between 1 and 8"),
        ({"length_penalty": "-1"}, "length_penalty '-1' must be a number between 0.0 and 10.0"),
        ({"temperature": "nan"}, "temperature 'nan' must be a number between 0.01 and 100.0"),
        ({"top_p": "inf"}, "top_p 'inf' must be a number between 0.001 and 1.0"),
        ({"seed": ""}, "seed '' must be a whole number between 0 and 2147483648"),
        (
            {"method": "greedy", "n": "2"},
            "the greedy method has one caption per image; use beam or sample",
        ),
    ],
    ids=str,
)
def test_a_setting_out_of_bounds_is_refused_by_name(settings, message, client):
    assert error_of(*ask(client, **settings)) == (400, message)


def test_a_setting_that_is_not_known_is_refused_with_those_that_are(client):
    status, message = error_of(*ask(client, beams=3))
    assert (status, message) == (
        400,
        "setting 'beams' is not known; choose from method, n, beam_size, length_penalty, "
        "no_repeat_ngram, max_words, min_words, temperature, top_k, top_p, seed, attention",
    )


@pytest.mark.parametrize(
    ("photo", "name", "message"),
    [
        (b"", "empty.jpg", "empty.jpg is not an image that can be read (the file is empty)"),
        (
            b"What a day!",
            "notes.txt",
            "notes.txt is not an image that can be read (no image format that is known)",
        ),
        (PHOTO[:900], "cut.png", "cut.png is not an image that can be read (image file is "),
        (
            png(Image.new("1", (10_000, 9_000))),
            "vast.png",
            "vast.png is not an image that can be read (10000 x 9000 pixels; at most 89,478,485",
        ),
        (
            b"no image",
            "../../etc/passwd",
            "passwd is not an image that can be read (no image format that is known)",
        ),
    ],
    ids=["empty", "text", "cut short", "too many pixels", "odd name"],
)
def test_a_bad_file_is_refused_by_its_name_and_the_reason(photo, name, message, client):
    status, said = error_of(*ask(client, photo, name))
    assert status == 400 and said.startswith(message)


def test_a_request_without_one_photo_is_told_how_to_send_it(client):
    how = "send one photo as the form's field image: curl -F image=@photo.jpg"
    for form in ({}, {"n": "2"}, {"image": "photo.jpg"}):  # the last: curl without the @
        answer = client.post("/caption", data=form)
        assert error_of(answer.status_code, answer.get_json()) == (400, f"no photos came; {how}")
    two = {"image": [(io.BytesIO(PHOTO), "a.png"), (io.BytesIO(PHOTO), "b.png")]}
    answer = client.post("/caption", data=two)
    assert error_of(answer.status_code, answer.get_json()) == (400, f"2 photos came; {how}")
    for body in ({"json": {"n": 2}}, {}, {"data": {"url": ["https://a.example/b.jpg", "c"]}}):
        answer = client.post("/caption", **body)
        wanted = f"{'2' if 'data' in body else 'no'} photos came; {how}"
        assert error_of(answer.status_code, answer.get_json()) == (400, wanted)


def test_a_photo_of_more_megabytes_than_allowed_is_refused(captioner):
    small = app.create_app(captioner, max_mb=0.1).test_client()
    fits, over, far_over = (bytes(count) for count in (100_000, 100_001, 900_000))
    status, message = error_of(*ask(small, fits, "fits.bin"))
    assert status == 400 and "fits.bin is not an image" in message  # read, and found to be none
    answer = error_of(*ask(small, bytes(120_000), "over.bin"))
    assert answer == (413, "over.bin has 0.12 MB; at most 0.1 MB are taken")
    assert ask(small, over)[0] == 413
    answer = error_of(*ask(small, far_over))
    assert answer == (413, "this upload has more than 0.1 MB, the most that is taken")


def test_other_addresses_and_methods_are_refused_in_one_line(client):
    gone = client.get("/photos")
    assert error_of(gone.status_code, gone.get_json()) == (
        404,
        "there is nothing here; the page is at /, captions are given at POST /caption",
    )
    wrong = client.get("/caption")
    assert error_of(wrong.status_code, wrong.get_json()) == (
        405,
        "this address is not asked that way; captions are given at POST /caption",
    )


class Replaced:
    """A captioner whose `explain` is another function."""

    def __init__(self, captioner, explain):
        self.model, self.decoding, self.explain = captioner.model, captioner.decoding, explain
        self.at_least = captioner.at_least


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_a_bug_in_the_server_tells_visitors_nothing_of_the_machine(error, captioner, caplog):
    def explain(image, **settings):
        raise error("/home/someone/models is broken")

    broken = app.create_app(Replaced(captioner, explain)).test_client()
    answer = error_of(*ask(broken))
    assert answer == (500, "something went wrong on the server; its terminal says what")
    assert "/home/someone/models is broken" in caplog.text


# --- several people


def ask_together(client_of, count):
    """Return the statuses of `count` requests made at the same time."""
    statuses = []
    threads = [
        threading.Thread(target=lambda: statuses.append(ask(client_of.test_client())[0]))
        for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return statuses


def test_as_many_photos_as_allowed_are_captioned_at_the_same_time(captioner):
    both = threading.Barrier(2, timeout=30)  # neither gets further alone

    def explain(image, **settings):
        both.wait()
        return captioner.explain(image, **settings)

    assert ask_together(app.create_app(Replaced(captioner, explain), at_once=2), 2) == [200, 200]


def test_no_more_photos_than_allowed_are_captioned_at_the_same_time(captioner):
    inside, highest = [], []

    def explain(image, **settings):
        inside.append(1)
        highest.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        return []

    assert ask_together(app.create_app(Replaced(captioner, explain), at_once=1), 5) == [200] * 5
    assert highest == [1] * 5


def test_who_waits_too_long_is_told_so_and_a_failure_frees_its_turn(captioner):
    started, finish = threading.Event(), threading.Event()

    def explain(image, **settings):
        started.set()
        finish.wait(30)
        raise UserError("no")

    busy = app.create_app(Replaced(captioner, explain), at_once=1, max_wait=0.05)
    first = threading.Thread(target=lambda: ask(busy.test_client()))
    first.start()
    assert started.wait(30)
    answer = error_of(*ask(busy.test_client()))
    assert answer == (503, "too many photos are waiting; try again in a minute")
    finish.set()
    first.join(30)
    assert error_of(*ask(busy.test_client())) == (400, "no")


def test_captions_made_at_the_same_time_are_those_made_alone(captioner, client):
    photos = [png(picture(seed)) for seed in range(6)]
    alone = [ask(client, photo, n=2)[1] for photo in photos]
    together = [None] * len(photos)

    def one(place):
        together[place] = ask(client.application.test_client(), photos[place], n=2)[1]

    threads = [threading.Thread(target=one, args=(place,)) for place in range(len(photos))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert together == alone
    assert len({said["captions"][0]["text"] for said in alone}) > 1


# --- other sites


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:81"])
def test_pages_of_other_sites_get_no_captions(origin, client):
    answer = error_of(*ask(client, headers={"Origin": origin}))
    assert answer == (403, "pages of other sites may not ask for captions")


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "127.0.0.1:8000", "192.168.0.7", "[::1]:8000", "pc.lan"]
)
def test_the_page_may_ask_by_every_name_of_its_own(host, captioner):
    ours = app.create_app(captioner, hostnames=("PC.lan",)).test_client()
    for scheme in ("http", "https"):  # a proxy may add the s
        headers = {"Host": host, "Origin": f"{scheme}://{host}"}
        assert ask(ours, headers=headers)[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "[", ""]
)
def test_a_foreign_name_that_leads_here_gets_nothing(host, client):
    for address in ("/", "/health", "/static/app.js"):
        answer = client.get(address, headers={"Host": host})
        assert answer.status_code in (400, 403) and list(answer.get_json()) == ["error"]
    answer = error_of(*ask(client, headers={"Host": "evil.example"}))
    assert answer == (403, "this server does not go by that name; start it with --hostnames NAME")


def test_every_answer_has_the_headers_that_keep_others_out(client):
    answers = [client.get(each) for each in ("/", "/health", "/static/app.js", "/static/x", "/x")]
    answers.append(client.post("/caption", data={"image": (io.BytesIO(PHOTO), "a.png")}))
    for answer in answers:
        policy = answer.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; ")
        assert "unsafe" not in policy and "*" not in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert not [name for name in answer.headers if name[0].startswith("Access-Control")]
    assert answers[-1].headers["Cache-Control"] == "no-store"


def test_the_page_and_its_files_name_no_address_elsewhere():
    kinds = set()
    for path in (ROOT / "static").iterdir():
        text = path.read_text(encoding="utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"(?:https?:)?//[a-z]", text), path.name
        assert "style=" not in text and not re.search(r"\son[a-z]+=", text), path.name  # the policy
        kinds.add(path.suffix)
    assert kinds == {".html", ".css", ".js", ".svg"}
