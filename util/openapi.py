"""The description of the web page's interface for programs, as OpenAPI 3.1 (`GET /openapi.json`).

A client can be generated from it; `tests/test_openapi.py` compares it with the real answers.
"""

from collections.abc import Mapping
from typing import Any

Schema = dict[str, Any]

# What each setting means, as in docs/app.md.
MEANINGS = {
    "method": "decoding method",
    "n": "number of captions; greedy has one",
    "beam_size": "beams of beam search; at least n are used",
    "length_penalty": "beam search ranks by log-probability / length to this power",
    "no_repeat_ngram": "no sequence of this many words occurs twice (null: as the model file asks)",
    "max_words": "longest caption in words (null: what the model was trained for)",
    "min_words": "shortest caption in words",
    "temperature": "sampling: below 1 prefers probable words, above 1 gives more variety",
    "top_k": "sampling: from the k most probable words (0: all)",
    "top_p": "sampling: from the fewest words with this share of the probability",
    "seed": "sampling: the same seed gives an image the same captions",
    "attention": "whether captions come with their attention maps, which are most of the answer",
}
ERRORS = {
    400: "A setting, a file or an address that can't be used.",
    403: "Sent by the page of another site, or to a host name that is not known.",
    404: "There is no such file.",
    413: "The image has more megabytes than are taken.",
    415: "A type of body in which no image can come.",
    500: "A bug, whose traceback is in the server's terminal.",
    503: "Too many requests are waiting; the same one may succeed in a minute.",
}
REFUSED = (400, 403, 413, 415, 500, 503)  # what a request with an image may be answered
RAW = {"type": "string", "contentMediaType": "application/octet-stream"}
TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
LINK: Schema = {
    "type": "string",
    "description": "http(s) address of the image, in place of the image; the server fetches it",
}


def describe(settings: Mapping[str, Mapping[str, Any]], *, fetches: bool = True) -> Schema:
    """Return the document. `settings`: the default of each, and its `choices` or its bounds.

    `fetches`: whether the server fetches images from addresses.
    """
    schemas = {name: describe_setting(name, about) for name, about in settings.items()}
    schemas["attention"] = {"type": "boolean", "default": True}
    for name, schema in schemas.items():
        schema["description"] = MEANINGS[name]
    paths = {
        "/caption": {"post": describe_caption(schemas, fetches)},
        "/health": {"get": describe_get("The server's limits, settings and model.", "Health")},
        "/examples/{name}": {"get": describe_example()},
        "/openapi.json": {"get": describe_get("This document.")},
    }
    if fetches:
        paths["/fetch"] = {"post": describe_fetch()}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Image captioning",
            "version": "1",
            "description": 'Captions of images. Errors are one line: `{"error": "…"}`.',
        },
        "servers": [{"url": "."}],
        "paths": paths,
        "components": {"schemas": {**ANSWERS, "Error": obj({"error": TEXT})}},
    }


def describe_setting(name: str, about: Mapping[str, Any]) -> Schema:
    """Return the schema of one setting."""
    if "choices" in about:
        return {"type": "string", "enum": list(about["choices"]), "default": about["default"]}
    kind = "integer" if isinstance(about["least"], int) else "number"
    schema = {"type": kind, "minimum": about["least"], "maximum": about["most"]}
    return schema | ({} if about["default"] is None else {"default": about["default"]})


def describe_caption(settings: dict[str, Schema], fetches: bool) -> Schema:
    """Return the operation that captions an image, which can be sent in several ways."""
    link = {"url": LINK} if fetches else {}
    base64 = {"type": "string", "description": "the file in base64, or a data: URI"}
    nullable = {
        name: schema | {"type": [schema["type"], "null"]} | (
            {"enum": [*schema["enum"], None]} if "enum" in schema else {}
        )
        for name, schema in settings.items()
    }  # fmt: skip
    content = {
        "multipart/form-data": {"schema": one_of({"image": RAW, **link}, settings)},
        "application/json": {"schema": one_of({"image": base64, **link}, nullable)},
        "image/*": {"schema": RAW},
        "application/octet-stream": {"schema": RAW},
    }
    if fetches:
        content["application/x-www-form-urlencoded"] = {"schema": one_of(link, settings)}
    query = [
        {"name": name, "in": "query", "schema": schema, "description": schema["description"]}
        for name, schema in settings.items()
    ]
    return {
        "operationId": "caption",
        "summary": "Caption an image.",
        "description": "Settings come in the body beside the image, or in the query.",
        "parameters": query,
        "requestBody": {"required": True, "content": content},
        "responses": {"200": answer("The captions, best first.", "Captions"), **errors(*REFUSED)},
    }


def describe_fetch() -> Schema:
    """Return the operation that fetches an image for the page."""
    content = {
        kind: {"schema": obj({"url": LINK})}
        for kind in ("application/json", "application/x-www-form-urlencoded", "multipart/form-data")
    }
    file = {"description": "The file at the address.", "content": {RAW["contentMediaType"]: {}}}
    return {
        "operationId": "fetch",
        "summary": "Fetch the image at an address, as the page does to show it.",
        "requestBody": {"required": True, "content": content},
        "responses": {"200": file, **errors(*REFUSED)},
    }


def describe_example() -> Schema:
    """Return the operation that gets one of the sample photographs."""
    name = {"name": "name", "in": "path", "required": True, "schema": TEXT}
    return {
        "operationId": "getExample",
        "summary": "A sample photograph; /health lists their names and credits.",
        "parameters": [name],
        "responses": {
            "200": {"description": "The file.", "content": {"image/*": {}}},
            **errors(403, 404, 500),
        },
    }


def describe_get(summary: str, schema: str = "") -> Schema:
    """Return an operation without parameters; without a schema any JSON object is its answer."""
    found = answer(summary, schema) if schema else {
        "description": summary, "content": {"application/json": {"schema": {"type": "object"}}}
    }  # fmt: skip
    return {"summary": summary, "responses": {"200": found, **errors(403, 500)}}


def errors(*statuses: int) -> Schema:
    """Return the answers of refused requests."""
    return {str(status): answer(ERRORS[status], "Error") for status in statuses}


def answer(description: str, schema: str) -> Schema:
    """Return a JSON answer of a schema of the document."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"description": description, "content": content}


def obj(properties: Schema, required: list[str] | None = None) -> Schema:
    """Return the schema of an object with these members and no others, by default all required."""
    required = list(properties) if required is None else required
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def one_of(images: Schema, settings: Schema) -> Schema:
    """Return the schema of an object with one of `images` and any of the settings."""
    return {
        "type": "object",
        "properties": {**images, **settings},
        "additionalProperties": False,
        "oneOf": [{"required": [name]} for name in images],
    }


def array(items: Schema, **bounds: int) -> Schema:
    return {"type": "array", "items": items, **bounds}


SHARE: Schema = {"type": "number", "minimum": 0, "maximum": 1}
OR_NULL: Schema = {"type": ["string", "null"]}
SETTING = {
    "type": "object",
    "properties": {
        "default": {"type": ["string", "number", "null"]},
        "choices": array(TEXT, minItems=1),
        "least": NUMBER,
        "most": NUMBER,
    },
    "required": ["default"],
    "additionalProperties": False,
}
ANSWERS: Schema = {
    "Captions": obj({"captions": array({"$ref": "#/components/schemas/Caption"}, minItems=1)}),
    "Caption": obj({
        "text": TEXT | {"description": "the caption"},
        "log_prob": {
            "type": "number",
            "maximum": 0,
            "description": "natural logarithm of its probability, end token included",
        },
        "probability": SHARE | {
            "description": "the same per word: exp(log_prob / (number of words + 1))"
        },
        "words": array(TEXT) | {"description": "the caption's words"},
        "attention": {
            "type": ["array", "null"],
            "items": array(array(SHARE, minItems=1), minItems=1),
            "description": "for each word a map, rows of columns over the upright image, which "
            "sums to 1; null if the model has none, or it was not asked for",
        },
    }),
    "Health": obj({
        "status": {"const": "ok"},
        "max_mb": NUMBER | {"description": "largest image in megabytes"},
        "max_pixels": {"type": "integer", "description": "largest image in pixels"},
        "at_once": {"type": "integer", "description": "images captioned at a time"},
        "fetches": {"type": "boolean", "description": "whether images may be given as addresses"},
        "settings": {"type": "object", "additionalProperties": SETTING},
        "model": obj({
            "name": TEXT,
            "about": TEXT | {"description": "what it is built of and was trained on"},
            "warning": TEXT | {"description": "how far its captions can be trusted"},
            "sure": {
                "type": ["array", "null"],
                "items": SHARE,
                "minItems": 2,
                "maxItems": 2,
                "description": "the probability from which a caption is called fairly sure, and "
                "that from which it is called sure; null if they are not known for this model",
            },
        }),
        "examples": array(obj({
            "name": TEXT,
            "credit": TEXT,
            "link": OR_NULL,
            "licence": TEXT,
        })),
    }),
}  # fmt: skip
