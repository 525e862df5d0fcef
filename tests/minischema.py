"""A validator for the part of JSON Schema that the tests use. It is written from the specification, not from
`aiosd.llm.schema`, so that it finds faults there."""

from __future__ import annotations

import re
from typing import Any

Schema = dict[str, Any] | bool


def valid(value: Any, schema: Schema, root: Schema | None = None) -> bool:
    root = schema if root is None else root
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema and not valid(value, follow(root, schema["$ref"]), root):
        return False
    if "type" in schema:
        kinds = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
        if not any(has_type(value, kind) for kind in kinds):
            return False
    if "enum" in schema and not any(same(value, one) for one in schema["enum"]):
        return False
    if "const" in schema and not same(value, schema["const"]):
        return False
    if not all(valid(value, one, root) for one in schema.get("allOf", [])):
        return False
    if "anyOf" in schema and not any(valid(value, one, root) for one in schema["anyOf"]):
        return False
    if "oneOf" in schema and sum(valid(value, one, root) for one in schema["oneOf"]) != 1:
        return False
    if isinstance(value, str):
        return valid_string(value, schema)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return valid_number(value, schema)
    if isinstance(value, list):
        return valid_array(value, schema, root)
    if isinstance(value, dict):
        return valid_object(value, schema, root)
    return True


def follow(root: Schema, pointer: str) -> Schema:
    at: Any = root
    for part in pointer.split("/")[1:]:
        at = at[part]
    return at  # type: ignore[no-any-return]


def same(a: Any, b: Any) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def has_type(value: Any, kind: str) -> bool:
    if kind == "null":
        return value is None
    if kind == "boolean":
        return isinstance(value, bool)
    if isinstance(value, bool):
        return False
    if kind == "integer":
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    kinds: dict[str, Any] = {"string": str, "array": list, "object": dict, "number": (int, float)}
    return isinstance(value, kinds[kind])


def valid_string(value: str, schema: dict[str, Any]) -> bool:
    return (
        schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 1 << 60)
        and ("pattern" not in schema or re.search(schema["pattern"], value) is not None)
        and not any(0xD800 <= ord(char) < 0xE000 for char in value)
    )


def valid_number(value: float, schema: dict[str, Any]) -> bool:
    return (
        abs(value) < float("inf")
        and value >= schema.get("minimum", value)
        and value <= schema.get("maximum", value)
        and ("exclusiveMinimum" not in schema or value > schema["exclusiveMinimum"])
        and ("exclusiveMaximum" not in schema or value < schema["exclusiveMaximum"])
    )


def valid_array(value: list[Any], schema: dict[str, Any], root: Schema) -> bool:
    if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 1 << 60):
        return False
    heads = schema.get("prefixItems", [])
    if not all(valid(item, head, root) for item, head in zip(value, heads, strict=False)):
        return False
    return all(valid(item, schema.get("items", True), root) for item in value[len(heads) :])


def valid_object(value: dict[str, Any], schema: dict[str, Any], root: Schema) -> bool:
    if not schema.get("minProperties", 0) <= len(value) <= schema.get("maxProperties", 1 << 60):
        return False
    if not set(schema.get("required", [])) <= set(value):
        return False
    known = schema.get("properties", {})
    return all(
        valid(item, known.get(key, schema.get("additionalProperties", True)), root) for key, item in value.items()
    )
