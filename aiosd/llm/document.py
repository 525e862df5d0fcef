"""A JSON Schema as a document: the targets of its references, merging of several schemas, and which values fit.

Pure functions on plain data, used by `schema.py`, which makes the grammar. Unknown keywords are annotations, as JSON
Schema defines it. All work is counted (`spend`): through references a small schema can become arbitrarily large.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

from aiosd.errors import refuse
from aiosd.llm import numbers
from aiosd.llm.pattern import FORMATS

Schema = dict[str, Any] | bool

MAX_DEPTH = 64
TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")

#: The types that a keyword applies to.
IMPLIES = {
    "object": (
        "properties", "required", "additionalProperties", "patternProperties", "propertyNames", "minProperties",
        "maxProperties",
    ),
    "array": ("items", "prefixItems", "minItems", "maxItems", "additionalItems", "uniqueItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}  # fmt: skip
REFUSED = (
    "if", "dependentSchemas", "dependentRequired", "dependencies", "contains", "$dynamicRef", "$recursiveRef",
)  # fmt: skip
KEYWORDS = frozenset(
    ["type", "enum", "const", "anyOf", "oneOf", "allOf", "not", "$ref", "discriminator", "then", "else",
     "unevaluatedProperties", "unevaluatedItems", *REFUSED, *(word for words in IMPLIES.values() for word in words)]
)  # fmt: skip


class Later(Exception):
    """This takes too long to be done between two decode steps."""


class Impossible(OSError):
    """No value is valid against this part of a schema. An optional property, or a branch, can be left out then."""

    def __init__(self, sentence: str) -> None:
        super().__init__(errno.EINVAL, sentence)


class Document:
    """One schema with everything that it refers to."""

    def __init__(self, root: Schema, spend: Callable[[int], None]) -> None:
        self.root = root
        self._spend = spend
        self._anchors: dict[str, Any] | None = None

    # ── references ──

    def resolve(self, pointer: Any) -> Schema:
        at = self._target(pointer)
        if not isinstance(at, dict | bool):
            raise refuse(f"$ref {pointer!r} points to something that is no schema")
        return at

    def _target(self, pointer: Any) -> Any:
        if not isinstance(pointer, str):
            raise refuse(f"$ref {pointer!r} is no text")
        base, _, fragment = pointer.partition("#")
        at: Any = self.root if not base else self._anchor(base, pointer)
        if fragment and not fragment.startswith("/"):
            return self._anchor(f"#{unquote(fragment)}", pointer)
        for part in fragment.split("/")[1:]:
            part = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(at, list) and part.isdigit() and int(part) < len(at):
                at = at[int(part)]
            elif isinstance(at, dict) and part in at:
                at = at[part]
            else:
                raise refuse(f"$ref {pointer!r} points to nothing")
        return at

    def _anchor(self, name: str, pointer: str) -> Any:
        if self._anchors is None:
            self._anchors = {}
            self._find_anchors(self.root, 0)
        if name not in self._anchors:
            if name.startswith("#"):
                raise refuse(f"$ref {pointer!r} points to nothing")
            raise refuse(f"$ref {pointer!r}: only references within the schema are followed")
        return self._anchors[name]

    def _find_anchors(self, value: Any, depth: int) -> None:
        self._spend(1)
        if depth > 4 * MAX_DEPTH:
            raise refuse(f"the schema is nested deeper than {MAX_DEPTH} levels")
        assert self._anchors is not None
        if isinstance(value, dict):
            for key, prefix in (("$anchor", "#"), ("$id", "")):
                if isinstance(value.get(key), str):
                    self._anchors.setdefault(prefix + value[key].rstrip("#"), value)
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            self._find_anchors(inner, depth + 1)

    def follow(self, schema: Schema) -> Schema:
        """The target, if a schema is nothing but a reference."""
        for _ in range(MAX_DEPTH):
            if not isinstance(schema, dict) or set(essential(schema)) != {"$ref"}:
                break
            schema = self.resolve(schema["$ref"])
        return schema

    # ── several schemas as one ──

    def merged(self, schema: dict[str, Any], seen: frozenset[str] = frozenset()) -> dict[str, Any]:
        """One schema without `allOf` and `$ref` that is equivalent to `schema` with all of these."""
        self._spend(1)
        parts = schema.get("allOf", [])
        if not isinstance(parts, list):
            raise refuse("allOf must be a list")
        whole = {key: value for key, value in essential(schema).items() if key not in ("allOf", "$ref")}
        if "$ref" in schema:
            pointer = schema["$ref"]
            if pointer in seen:
                raise refuse("allOf: its references go round in a circle")
            whole = self._with(whole, self.resolve(pointer), seen | {pointer})
        for part in parts:
            whole = self._with(whole, part, seen)
        return whole

    def _with(self, whole: dict[str, Any], part: Schema, seen: frozenset[str]) -> dict[str, Any]:
        if part is False:
            raise Impossible("the schema false allows no value")
        if not isinstance(part, dict | bool):
            raise refuse("allOf must hold schemas")
        return self.both(whole, self.merged(part, seen)) if isinstance(part, dict) else whole

    def both(self, a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
        self._spend(1 + len(a) + len(b))
        if ("prefixItems" in a) != ("prefixItems" in b) and ("items" in a or "items" in b):
            raise refuse("allOf: prefixItems of one part with items of another cannot be combined")
        both = dict(a)
        for key, value in b.items():
            if key == "properties":
                continue
            both[key] = value if key not in a or same(a[key], value) else self._joined(key, a[key], value)
        if "properties" in a or "properties" in b:
            both["properties"] = self._both_properties(a, b)
        return both

    def _joined(self, key: str, a: Any, b: Any) -> Any:
        """The value of a keyword that two merged parts give different values, `a` and `b`."""
        if key == "required":
            self._spend(len(a) + len(b))
            return list(dict.fromkeys([*a, *b]))
        if key in ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"):
            return max(a, b)
        if key in ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"):
            return min(a, b)
        if key == "type":
            return _common_types(a, b)
        if key in ("pattern", "format"):
            return [*(a if isinstance(a, list) else [a]), *(b if isinstance(b, list) else [b])]
        if key in ("items", "additionalProperties", "propertyNames", "unevaluatedProperties"):
            return False if False in (a, b) else {"allOf": [a, b]}
        if key == "enum":
            known = set(map(dumped, b))
            return [value for value in a if dumped(value) in known]
        if key == "uniqueItems":
            return bool(a or b)
        if key in ("anyOf", "oneOf"):
            return self._products(key, a, b)
        if key == "not":
            return {"anyOf": [a, b]}
        if key in ("const", "discriminator"):
            if key == "const":
                raise Impossible("const: two different values are asked for")
            return a
        if key == "multipleOf" and all(isinstance(value, int | float) and value > 0 for value in (a, b)):
            low, high = sorted((Decimal(repr(a)), Decimal(repr(b))))
            if high % low == 0:
                return max(a, b)
        raise refuse(f"allOf: two different {key} at one place cannot be combined")

    def _products(self, key: str, a: list[Schema], b: list[Schema]) -> list[Schema]:
        if not isinstance(a, list) or not isinstance(b, list):
            raise refuse(f"{key} must be a list of schemas")
        self._spend(len(a) * len(b))
        return [{"allOf": [one, other]} for one in a for other in b]

    def _both_properties(self, a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
        ours, theirs = a.get("properties", {}), b.get("properties", {})
        both: dict[str, Schema] = {}
        for name in dict.fromkeys([*ours, *theirs]):
            self._spend(1)
            schemas = [part.get("properties", {}).get(name, part.get("additionalProperties", True)) for part in (a, b)]
            schemas = [schema for schema in schemas if schema is not True]
            if False in schemas:
                both[name] = False
            elif len(schemas) == 2 and not same(*schemas):
                both[name] = {"allOf": schemas}
            else:
                both[name] = schemas[0] if schemas else True
        return both

    # ── which values fit ──

    def fits(self, value: Any, schema: Schema, depth: int = 0) -> bool:
        """Is a value that the schema lists (enum, const) valid against the rest of the schema?"""
        self._spend(1)
        if depth > MAX_DEPTH:
            raise refuse(f"the schema is nested deeper than {MAX_DEPTH} levels")
        if isinstance(schema, bool):
            return schema
        for keyword in REFUSED:
            if keyword in schema:
                raise refuse(f"{keyword}: not together with enum or const")
        deeper = depth + 1
        kinds = types(schema)
        return (
            (not kinds or any(is_type(value, kind) for kind in kinds))
            and ("$ref" not in schema or self.fits(value, self.resolve(schema["$ref"]), deeper))
            and ("enum" not in schema or any(same(value, one) for one in schema["enum"]))
            and ("const" not in schema or same(value, schema["const"]))
            and all(self.fits(value, part, deeper) for part in schema.get("allOf", []))
            and ("anyOf" not in schema or any(self.fits(value, part, deeper) for part in schema["anyOf"]))
            and ("oneOf" not in schema or sum(self.fits(value, part, deeper) for part in schema["oneOf"]) == 1)
            and ("not" not in schema or not self.fits(value, schema["not"], deeper))
            and self._fits_by_type(value, schema, deeper)
        )

    def _fits_by_type(self, value: Any, schema: dict[str, Any], depth: int) -> bool:
        if isinstance(value, str):
            return _fits_string(value, schema)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return _fits_number(value, schema)
        if isinstance(value, list):
            heads, items = schema.get("prefixItems", []), schema.get("items", True)
            return (
                schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
                and all(self.fits(item, head, depth) for item, head in zip(value, heads, strict=False))
                and all(self.fits(item, items, depth) for item in value[len(heads) :])
                and (not schema.get("uniqueItems") or len(set(map(dumped, value))) == len(value))
            )
        if isinstance(value, dict):
            known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
            if "patternProperties" in schema:
                raise refuse("patternProperties: not together with enum or const")
            return (
                schema.get("minProperties", 0) <= len(value) <= schema.get("maxProperties", len(value))
                and set(schema.get("required", [])) <= set(value)
                and all(self.fits(item, known.get(key, others), depth) for key, item in value.items())
                and all(self.fits(key, schema.get("propertyNames", True), depth) for key in value)
            )
        return True

    # ── can two schemas be distinguished? ───

    def disjoint(self, a: Schema, b: Schema) -> bool:
        """Can no text of a's grammar be valid against b, nor the other way round? False when in doubt."""
        a, b = self._open(a), self._open(b)
        return self._excluded(a, b, 0) and self._excluded(b, a, 0)

    def _open(self, schema: Schema) -> Schema:
        schema = self.follow(schema)
        if isinstance(schema, dict) and ("allOf" in schema or "$ref" in schema):
            return self.merged(schema)
        return schema

    def _excluded(self, x: Schema, y: Schema, depth: int) -> bool:
        """Is no text of x's grammar valid against y? (It writes the properties that are declared or required.)"""
        self._spend(1)
        if x is False or y is False:
            return True
        if not isinstance(x, dict) or not isinstance(y, dict) or depth > 4:
            return False
        for union in ("anyOf", "oneOf"):
            if union in y:
                return all(self._excluded(x, self._open(branch), depth + 1) for branch in y[union])
            if union in x:
                return all(self._excluded(self._open(branch), y, depth + 1) for branch in x[union])
        values_x, values_y = listed(x), listed(y)
        if values_x is not None and values_y is not None:
            self._spend((len(values_x) + len(values_y)) // 8)
            return not values_x & values_y
        kinds_x, kinds_y = possible_types(x), possible_types(y)
        if kinds_x and kinds_y and not _overlap(kinds_x, kinds_y):
            return True
        if not kinds_x or not kinds_y:
            return False
        common = {kind for kind in kinds_x if _overlap({kind}, kinds_y)}
        if common <= {"integer", "number"}:
            return _apart(x, y)
        return common == {"object"} and self._distinguished(x, y, depth)

    def _distinguished(self, x: dict[str, Any], y: dict[str, Any], depth: int) -> bool:
        members_x, members_y = x.get("properties", {}), y.get("properties", {})
        needed_x, needed_y = set(x.get("required", [])), set(y.get("required", []))
        open_x = x.get("additionalProperties", False) is not False or "patternProperties" in x
        if not open_x and needed_y - set(members_x) - needed_x:
            return True  # y requires a property that x never writes
        if y.get("additionalProperties", True) is False and needed_x - set(members_y):
            return True  # x always writes a property that y forbids
        for name in (needed_x | needed_y) & set(members_x) & set(members_y):
            if self._excluded(self._open(members_x[name]), self._open(members_y[name]), depth + 1):
                return True
        return False


# ── small questions ───────────────────────────────────────────────────────────────────────────────────────


def essential(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema without annotations and unknown keywords."""
    return {key: value for key, value in schema.items() if key in KEYWORDS}


def types(schema: dict[str, Any]) -> list[str]:
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not isinstance(kinds, list) or not all(kind in TYPES for kind in kinds):
        raise refuse(f"type {json.dumps(kinds)[:60]}: must be one of {', '.join(TYPES)}")
    return list(dict.fromkeys(kinds))


def possible_types(schema: dict[str, Any]) -> set[str]:
    """The types of the texts that the grammar of a schema writes; empty: any."""
    kinds = set(types(schema))
    if kinds:
        return kinds
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list):
        return {next(kind for kind in ("integer", *TYPES) if is_type(value, kind)) for value in values}
    return set()


def _overlap(a: set[str], b: set[str]) -> bool:
    return bool(a & b) or ("number" in a and "integer" in b) or ("integer" in a and "number" in b)


def _common_types(a: Any, b: Any) -> list[str]:
    ours, theirs = types({"type": a}), types({"type": b})
    common = [kind for kind in ours if kind in theirs or (kind == "integer" and "number" in theirs)]
    common += [kind for kind in theirs if kind == "integer" and "number" in ours and kind not in common]
    if not common:
        raise Impossible("type: no value has all the types that are asked for")
    return common


def is_type(value: Any, kind: str) -> bool:
    if isinstance(value, bool) or value is None:
        return kind == ("null" if value is None else "boolean")
    if isinstance(value, int):
        return kind in ("integer", "number")
    if isinstance(value, float):
        return kind == "number" or (kind == "integer" and value.is_integer())
    return isinstance(value, {"string": str, "array": list, "object": dict}.get(kind, ()))


def strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def dumped(value: Any) -> str:
    """A text that is the same for equal JSON values, and only for these (true is not 1; 1.0 is 1)."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, sort_keys=True, default=str)


def same(a: Any, b: Any) -> bool:
    return bool(a == b) and dumped(a) == dumped(b)


def listed(schema: dict[str, Any]) -> set[str] | None:
    """The values of a const or an enum."""
    if "const" in schema:
        return {dumped(schema["const"])}
    values = schema.get("enum")
    return set(map(dumped, values)) if isinstance(values, list) else None


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _fits_string(value: str, schema: dict[str, Any]) -> bool:
    patterns: Iterable[Any] = as_list(schema.get("pattern", []))
    formats = [FORMATS[form] for form in as_list(schema.get("format", [])) if form in FORMATS]
    try:
        found = all(re.search(pattern, value) for pattern in [*patterns, *formats])
    except (re.error, TypeError, RecursionError) as error:
        raise refuse(f"pattern: {error}") from None
    return found and schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))


def _fits_number(value: int | float, schema: dict[str, Any]) -> bool:
    low, high = numbers.limits(schema)
    exact = Decimal(repr(value))
    step = schema.get("multipleOf")
    return (
        (low is None or exact > low.value or (exact == low.value and not low.excluded))
        and (high is None or exact < high.value or (exact == high.value and not high.excluded))
        and (step is None or exact % Decimal(repr(step)) == 0)
    )


def _apart(x: dict[str, Any], y: dict[str, Any]) -> bool:
    """Do the limits of two number schemas exclude each other?"""

    def below(a: dict[str, Any], b: dict[str, Any]) -> bool:
        high, low = numbers.limits(a)[1], numbers.limits(b)[0]
        if high is None or low is None:
            return False
        return high.value < low.value or (high.value == low.value and (high.excluded or low.excluded))

    return below(x, y) or below(y, x)
