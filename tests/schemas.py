"""Schemas as pydantic, zod and servers of the Model Context Protocol write them today, made from parts.

The parts are what these libraries print for their types (such as a discriminated union, an optional field, a record
with keys of an enum). `corpus` combines them by a seed. All of them must become grammars.
"""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]

SAFE = 2**53 - 1

#: Fields as pydantic prints them.
PYDANTIC: list[Schema] = [
    {"title": "Name", "type": "string"},
    {"title": "Age", "type": "integer", "minimum": 0, "exclusiveMaximum": 150},
    {"title": "Ratio", "type": "number", "exclusiveMinimum": 0, "maximum": 1},
    {"title": "Price", "anyOf": [{"type": "number", "minimum": 0.5}, {"type": "null"}], "default": None},
    {"title": "Decimal", "anyOf": [{"type": "number"}, {"type": "string",
                                                        "pattern": "^(?!^[-+.]*$)[+-]?0*\\d*\\.?\\d*$"}]},
    {"title": "Flag", "type": "boolean", "default": False},
    {"title": "Maybe", "anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
    {"title": "Code", "type": "string", "pattern": "^[A-Z]{3}-\\d+$", "maxLength": 12},
    {"title": "Short", "type": "string", "minLength": 1, "maxLength": 10},
    {"title": "When", "type": "string", "format": "date-time"},
    {"title": "Day", "type": "string", "format": "date"},
    {"title": "Hour", "type": "string", "format": "time"},
    {"title": "Lasts", "type": "string", "format": "duration"},
    {"title": "Id", "type": "string", "format": "uuid"},
    {"title": "Mail", "type": "string", "format": "email"},
    {"title": "Link", "type": "string", "format": "uri", "minLength": 1, "maxLength": 2083},
    {"title": "Blob", "type": "string", "format": "binary"},
    {"title": "Colour", "enum": ["red", "green", "blue"], "type": "string"},
    {"title": "Kind", "const": "cat", "type": "string", "default": "cat"},
    {"title": "Tags", "type": "array", "items": {"type": "string"}, "default": []},
    {"title": "Colours", "type": "array", "items": {"enum": ["red", "green"], "type": "string"}, "uniqueItems": True},
    {"title": "Pair", "type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "minItems": 2,
     "maxItems": 2},
    {"title": "Map", "type": "object", "additionalProperties": {"type": "integer"}},
    {"title": "Keyed", "type": "object", "patternProperties": {"^[a-z]+$": {"type": "number"}}},
    {"title": "Free", "type": "object", "additionalProperties": True},
    {"title": "Any"},
    {"title": "Half", "type": "number", "multipleOf": 0.01, "minimum": 0},
    {"title": "Step", "type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100},
    {"title": "List", "anyOf": [{"type": "array", "items": {"type": "integer"}, "maxItems": 3}, {"type": "null"}]},
    {"title": "Node", "$ref": "#/$defs/Node"},
    {"title": "Pet", "discriminator": {"mapping": {"cat": "#/$defs/Cat", "dog": "#/$defs/Dog"}, "propertyName": "kind"},
     "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}]},
    {"allOf": [{"$ref": "#/$defs/Size"}], "default": "s", "description": "an enum with a default, as pydantic 2.0 did"},
]  # fmt: skip
DEFS: Schema = {
    "Node": {"type": "object", "title": "Node", "required": ["value"], "properties": {
        "value": {"type": "integer"},
        "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}], "default": None}}},
    "Cat": {"type": "object", "title": "Cat", "required": ["lives"], "properties": {
        "kind": {"const": "cat", "default": "cat", "type": "string"}, "lives": {"type": "integer"}}},
    "Dog": {"type": "object", "title": "Dog", "properties": {
        "kind": {"const": "dog", "default": "dog", "type": "string"},
        "friends": {"type": "array", "items": {"discriminator": {"propertyName": "kind"}, "oneOf": [
            {"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}]}}}},
    "Size": {"enum": ["s", "m", "l"], "title": "Size", "type": "string"},
}  # fmt: skip

#: Fields as zod prints them.
ZOD: list[Schema] = [
    {"type": "string"},
    {"type": "string", "minLength": 1},
    {"type": "string", "format": "email", "pattern": "^(?!\\.)(?!.*\\.\\.)([A-Za-z0-9_'+\\-\\.]*)[A-Za-z0-9_+-]@"
     "([A-Za-z0-9][A-Za-z0-9\\-]*\\.)+[A-Za-z]{2,}$"},
    {"type": "string", "format": "uuid", "pattern": "^([0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[1-8][0-9a-fA-F]{3}-"
     "[89abAB][0-9a-fA-F]{3}-[0-9a-fA-F]{12}|00000000-0000-0000-0000-000000000000)$"},
    {"type": "string", "format": "uri"},
    {"type": "string", "pattern": "^https?:\\/\\/"},
    {"type": "string", "pattern": "^abc.*", "maxLength": 20},
    {"type": "string", "pattern": "^a$|^b$"},
    {"type": "integer", "minimum": -SAFE, "maximum": SAFE},
    {"type": "integer", "exclusiveMinimum": 0, "maximum": SAFE},
    {"type": "number"},
    {"type": "number", "minimum": 0, "maximum": 100, "multipleOf": 1},
    {"type": "boolean"},
    {"type": "null"},
    {"anyOf": [{"type": "string"}, {"type": "number"}, {"type": "null"}]},
    {"type": "string", "enum": ["low", "high"], "default": "low"},
    {"type": "number", "const": 7},
    {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 3},
    {"type": "array", "prefixItems": [{"type": "string"}, {"type": "number"}], "items": {"type": "boolean"}},
    {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"type": "number"}},
    {"type": "object", "propertyNames": {"type": "string", "enum": ["a", "b"]}, "additionalProperties": {}},
    {"type": "object", "properties": {}, "additionalProperties": False},
    {"type": "object", "properties": {"a": {"type": "string"}, "never": {"not": {}}}, "required": ["a"],
     "additionalProperties": {"type": "string"}},
    {"allOf": [{"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
               {"type": "object", "properties": {"b": {"type": "number"}}, "required": ["b"]}]},
    {"oneOf": [{"type": "object", "properties": {"t": {"type": "string", "const": "x"}}, "required": ["t"]},
               {"type": "object", "properties": {"t": {"type": "string", "const": "y"}}, "required": ["t"]}]},
    {},
]  # fmt: skip

#: Fields of tools as servers of the Model Context Protocol list them, many of them written by hand.
MCP: list[Schema] = [
    {"type": "string", "description": "The path to read", "examples": ["/tmp/x"]},
    {"type": ["string", "null"], "description": "an optional name"},
    {"type": ["integer", "string"]},
    {"type": "number", "description": "How many", "default": 10, "minimum": 1, "maximum": 100},
    {"type": "integer", "format": "int64"},
    {"type": "string", "enum": ["open", "closed", "all"], "x-order": 3},
    {"type": "array", "items": {"type": "object", "properties": {"oldText": {"type": "string"}, "newText": {
        "type": "string"}}, "required": ["oldText", "newText"], "additionalProperties": False}},
    {"type": "array", "items": {}},
    {"type": "object", "additionalProperties": True},
    {"type": "object"},
    {"type": "object", "properties": {"q": {"type": "string"}}, "minProperties": 1, "maxProperties": 1},
    {"type": "string", "pattern": "^[a-zA-Z0-9][a-zA-Z0-9_.-]+$", "minLength": 2, "maxLength": 20},
    {"type": "boolean", "default": False, "deprecated": True},
    {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
    {"type": "string", "anyOf": [{"enum": ["a", "b"]}, {"pattern": "^c+$"}]},
    {"type": "string", "not": {"type": "null"}},
    {"enum": ["ab", "c", "defg"], "minLength": 2},
    {"$ref": "#/$defs/a%20name"},
    {"$ref": "#/$defs/b~1c"},
]  # fmt: skip
MCP_DEFS: Schema = {"a name": {"type": "string", "maxLength": 3}, "b/c": {"type": "integer", "minimum": 5}}

_STYLES = {"pydantic": (PYDANTIC, DEFS), "zod": (ZOD, {}), "mcp": (MCP, MCP_DEFS)}


def fields() -> list[tuple[str, Schema]]:
    """Every part as a schema of its own."""
    return [
        (f"{style}-{i}", {**field, "$defs": defs} if defs else field)
        for style, (parts, defs) in _STYLES.items()
        for i, field in enumerate(parts)
    ]


def corpus(count: int, seed: int = 0) -> list[tuple[str, Schema]]:
    """Schemas of objects with one to six fields of one style; some objects are in lists or in further objects."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        style = rng.choice(list(_STYLES))
        parts, defs = _STYLES[style]
        schema = _model(rng, parts, style, 0)
        if defs:
            schema["$defs"] = defs
        if style == "zod":
            schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
        made.append((f"{style}-object-{i}", schema))
    return made


def _model(rng: random.Random, parts: list[Schema], style: str, depth: int) -> Schema:
    names = rng.sample(["id", "name", "first-name", "größe", "a b", "items", "value", "x"], rng.randint(1, 6))
    properties: Schema = {}
    for name in names:
        field = rng.choice(parts)
        if depth < 2 and rng.random() < 0.2:
            field = _model(rng, parts, style, depth + 1)
        if rng.random() < 0.1:
            field = {"type": "array", "items": field}
        properties[name] = field
    schema: Schema = {"type": "object", "properties": properties}
    required = [name for name in names if rng.random() < 0.6]
    if required:
        schema["required"] = required
    if style == "pydantic":
        schema["title"] = "Model"
    elif style == "zod" or rng.random() < 0.5:
        schema["additionalProperties"] = False
    return schema
