"""The description of the interface is that of the real answers, errors and bounds."""

import base64
import io
import json
from dataclasses import fields

import pytest
from helpers.schemas import faults
from helpers.tiny import picture, png, tiny_model

import app
from decoding import DecodingConfig
from inference import Captioner
from util import openapi
from util.files import UserError

PHOTO = png(picture(1))
BASE64 = base64.b64encode(PHOTO).decode()
LINK = "https://example.org/a.png"
MODEL = {"name": "a", "about": "b", "warning": "c", "sure": [0.4, 0.5]}


def fetch(url, max_bytes):
    if "bug" in url:
        raise RuntimeError("a bug")
    if "gone" in url:
        raise UserError("there is nothing")
    return PHOTO


@pytest.fixture(scope="module")
def client(captioner):
    return app.create_app(captioner, max_mb=0.1, fetch=fetch, model=MODEL).test_client()


@pytest.fixture(scope="module")
def document(client):
    """Return what the server says of itself."""
    answer = client.get("/openapi.json")
    assert (answer.status_code, answer.mimetype) == (200, "application/json")
    return answer.get_json()


@pytest.fixture
def busy(captioner):
    """Return a server whose turns, and addresses, are all taken."""
    application = app.create_app(captioner, at_once=0, fetch=fetch, max_wait=0.01)
    return application.test_client()


EVIL = {"Origin": "https://evil.example"}
FOREIGN = {"Host": "evil.example"}
LARGE = {"data": bytes(100_001)}
REQUESTS = {
    ("post", "/caption", 200): {"data": PHOTO},
    ("post", "/caption", 400): {"data": b"no image"},
    ("post", "/caption", 403): {"data": PHOTO, "headers": EVIL},
    ("post", "/caption", 413): LARGE,
    ("post", "/caption", 415): {"data": PHOTO, "content_type": "text/html"},
    ("post", "/caption", 500): {"data": {"url": f"{LINK}?bug"}},
    ("post", "/caption", 503): {"data": PHOTO},
    ("post", "/fetch", 200): {"data": {"url": LINK}},
    ("post", "/fetch", 400): {"data": {"url": f"{LINK}?gone"}},
    ("post", "/fetch", 403): {"data": {"url": LINK}, "headers": EVIL},
    ("post", "/fetch", 413): LARGE,
    ("post", "/fetch", 415): {"data": LINK, "content_type": "text/plain"},
    ("post", "/fetch", 500): {"data": {"url": f"{LINK}?bug"}},
    ("post", "/fetch", 503): {"data": {"url": LINK}},
    ("get", "/health", 200): {},
    ("get", "/health", 403): {"headers": FOREIGN},
    ("get", "/examples/{name}", 200): {"name": "cat.jpg"},
    ("get", "/examples/{name}", 403): {"name": "cat.jpg", "headers": FOREIGN},
    ("get", "/examples/{name}", 404): {"name": "captions.jpg"},
    ("get", "/openapi.json", 200): {},
    ("get", "/openapi.json", 403): {"headers": FOREIGN},
}


@pytest.mark.parametrize(
    ("method", "path", "status"), REQUESTS, ids=lambda part: str(part).strip("/")
)
def test_an_answer_is_what_the_description_says(method, path, status, client, document, busy):
    how = dict(REQUESTS[method, path, status])
    asked = busy if status == 503 else client
    answer = asked.open(path.format(name=how.pop("name", "")), method=method.upper(), **how)
    assert answer.status_code == status
    described = document["paths"][path][method]["responses"][str(status)]["content"]
    kind = answer.mimetype
    content = described.get(kind, described.get(f"{kind.partition('/')[0]}/*"))
    assert content is not None, (kind, list(described))
    if kind == "application/json":
        assert faults(answer.get_json(), content["schema"], document) == []


def test_each_documented_answer_is_compared_and_each_path_is_documented(client, document):
    """Only the answer to a bug is the same everywhere, and compared where one can be made."""
    documented = {
        (method, path, int(status))
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        for status in operation["responses"]
    }
    bugs = {each for each in documented if each[0] == "get" and each[2] == 500}
    assert documented - bugs == REQUESTS.keys()
    rules = {
        (method.lower(), rule.rule.replace("<name>", "{name}"))
        for rule in client.application.url_map.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
    }
    pages = {("get", "/"), ("get", "/static/<path:filename>")}
    assert rules - pages == {(method, path) for method, path, _ in documented}


def test_the_captions_of_a_model_without_attention_and_without_attention_asked_for(document):
    lstm = app.create_app(Captioner(tiny_model(decoder="lstm"))).test_client()
    for client, query in ((lstm, ""), (lstm, "?attention=false")):
        answer = client.post(f"/caption{query}", data=PHOTO).get_json()
        assert faults(answer, {"$ref": "#/components/schemas/Captions"}, document) == []
    health = lstm.get("/health").get_json()
    assert faults(health, {"$ref": "#/components/schemas/Health"}, document) == []


def settings_of(document):
    parameters = document["paths"]["/caption"]["post"]["parameters"]
    assert {each["in"] for each in parameters} == {"query"}
    return {each["name"]: each["schema"] for each in parameters}


def test_every_setting_is_described_with_its_real_default_and_bounds(client, document):
    found = settings_of(document)
    assert set(found) == {each.name for each in fields(DecodingConfig)} | {"n", "attention"}
    known = client.get("/health").get_json()["settings"]
    for name, schema in found.items():
        if name == "attention":
            assert schema["default"] is True
            continue
        assert schema.get("default") == known[name]["default"]
        assert schema.get("enum") == known[name].get("choices")
        assert schema.get("minimum") == known[name].get("least")
        assert schema.get("maximum") == known[name].get("most")
        sampling = name in ("temperature", "top_k", "top_p", "seed")
        method = {} if name == "method" else {"method": "sample" if sampling else "beam"}
        ends = schema.get("enum") or [schema["minimum"], schema["maximum"]]
        for value in ends:
            answer = client.post("/caption", json={"image": BASE64, **method, name: value})
            assert answer.status_code == 200, (name, value)
        if "enum" not in schema:
            beyond = [schema["minimum"] - 1, schema["maximum"] + 1]
            for value in [*beyond, *([1.5] if schema["type"] == "integer" else [])]:
                answer = client.post("/caption", json={"image": BASE64, name: value})
                assert answer.status_code == 400, (name, value)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"image": BASE64}, 200),
        ({"url": LINK, "n": 2, "method": "beam", "attention": False}, 200),
        ({"image": BASE64, "max_words": None, "method": None}, 200),
        ({}, 400),
        ({"image": BASE64, "url": LINK}, 400),
        ({"image": BASE64, "beams": 2}, 400),
        ({"image": BASE64, "n": 0}, 400),
        ({"image": BASE64, "method": "bean"}, 400),
        ({"image": BASE64, "attention": 1}, 400),
        ({"image": 1}, 400),
    ],
    ids=str,
)
def test_a_body_that_fits_the_description_is_taken_and_no_other(body, status, client, document):
    content = document["paths"]["/caption"]["post"]["requestBody"]["content"]
    wrong = faults(body, content["application/json"]["schema"], document)
    assert client.post("/caption", json=body).status_code == status
    assert (wrong == []) is (status == 200), wrong


def test_every_documented_type_of_body_is_taken(client, document):
    bodies = {
        "multipart/form-data": {"image": (io.BytesIO(PHOTO), "a.png")},
        "application/json": json.dumps({"image": BASE64}),
        "image/*": PHOTO,
        "application/octet-stream": PHOTO,
        "application/x-www-form-urlencoded": {"url": LINK},
    }
    content = document["paths"]["/caption"]["post"]["requestBody"]["content"]
    assert set(content) == set(bodies)
    for kind, data in bodies.items():
        answer = client.post("/caption", data=data, content_type=kind.replace("*", "webp"))
        assert answer.status_code == 200, kind


def test_a_server_that_fetches_nothing_describes_nothing_of_it(captioner):
    document = app.create_app(captioner).test_client().get("/openapi.json").get_json()
    assert "/fetch" not in document["paths"]
    assert '"url"' not in json.dumps(document["paths"])


def test_the_description_is_whole(document):
    """Every reference leads somewhere, every schema has only words that the tests check."""
    assert document["openapi"] == "3.1.0" and document["info"].keys() >= {"title", "version"}
    assert set(openapi.MEANINGS) == set(settings_of(document))
    names = set(document["components"]["schemas"])
    text = json.dumps(document)
    assert all(f"#/components/schemas/{name}" in text for name in names)
    for schema in document["components"]["schemas"].values():
        faults({}, schema, document)  # raises KeyError, ValueError
    ids = [
        op["operationId"]
        for path in document["paths"].values()
        for op in path.values()
        if "operationId" in op
    ]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    ("value", "schema"),
    [
        (1.5, {"type": "integer"}), (True, {"type": "number"}), ("a", {"enum": ["b"]}),
        ({}, {"required": ["a"]}), ({"a": 1}, {"properties": {}, "additionalProperties": False}),
        ({"a": 1}, {"properties": {"a": {"type": "string"}}}), ([1], {"items": {"minimum": 2}}),
        ([], {"minItems": 1}), ([1, 2], {"maxItems": 1}), (3, {"maximum": 2}), (1, {"const": 2}),
        ({"a": 1, "b": 1}, {"oneOf": [{"required": ["a"]}, {"required": ["b"]}]}),
        (None, {"$ref": "#/a"}),
    ],
)  # fmt: skip
def test_the_check_of_schemas_finds_faults(value, schema):
    assert faults(value, schema, {"a": {"type": "string"}})
