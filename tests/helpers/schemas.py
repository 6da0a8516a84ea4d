"""Whether a value is what a schema of OpenAPI 3.1 says, for the words that the project's uses."""

from typing import Any

TYPES = {
    "object": dict, "array": list, "string": str, "boolean": bool, "integer": int,
    "number": (int, float), "null": type(None),
}  # fmt: skip
# What says nothing about a value, or only in a form (media types are the tests' own business).
NOTES = {"description", "default", "contentMediaType"}


def faults(value: Any, schema: dict, document: dict, where: str = "$") -> list[str]:
    """Return in what a value differs from a schema; ValueError for a word that is not known."""
    found, schema = [], dict(schema)
    for note in NOTES:
        schema.pop(note, None)
    if reference := schema.pop("$ref", None):
        assert reference.startswith("#/")
        target = document
        for step in reference[2:].split("/"):
            target = target[step]
        found += faults(value, target, document, where)
    kinds = schema.pop("type", list(TYPES))
    if not any(is_a(value, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)):
        return [*found, f"{where} is no {kinds}: {str(value)[:40]}"]
    if "const" in schema and value != schema["const"]:
        found.append(f"{where} is not {schema['const']}")
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{where} is none of {schema['enum']}")
    if is_a(value, "number") and not (
        schema.get("minimum", value) <= value <= schema.get("maximum", value)
    ):
        found.append(f"{where} is out of bounds: {value}")
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            found.append(f"{where} has {len(value)} items")
        for place, item in enumerate(value):
            found += faults(item, schema.get("items", {}), document, f"{where}[{place}]")
    if isinstance(value, dict):
        properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        found += [
            f"{where} lacks {name}" for name in schema.get("required", ()) if name not in value
        ]
        for name, item in value.items():
            below = properties.get(name, others)
            if below is False:
                found.append(f"{where} has an unknown {name}")
            elif isinstance(below, dict):
                found += faults(item, below, document, f"{where}.{name}")
    if "oneOf" in schema:
        fitting = [each for each in schema["oneOf"] if not faults(value, each, document, where)]
        if len(fitting) != 1:
            found.append(f"{where} fits {len(fitting)} of {len(schema['oneOf'])}")
    known = {"const", "enum", "minimum", "maximum", "minItems", "maxItems", "items", "properties",
             "additionalProperties", "required", "oneOf"}  # fmt: skip
    if unknown := schema.keys() - known:
        raise ValueError(f"{where}: no check for {unknown}")
    return found


def is_a(value: Any, kind: str) -> bool:
    """Return whether a value is of a type of JSON; true is no number."""
    return isinstance(value, TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))
