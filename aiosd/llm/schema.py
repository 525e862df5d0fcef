r"""JSON Schema to a llama.cpp grammar (GBNF).

The promise: every text of the grammar is JSON and valid against the schema. The grammar may be narrower (an
object has the properties that are declared and no others, whitespace is limited), never wider: a keyword that
cannot be kept is refused with a sentence, not dropped. Annotations (title, description, default, …) and
formats other than date, time, date-time and uuid say nothing about validity and are passed over.

The schema comes from anybody, and llama.cpp recurses over grammars and prints what it cannot parse, so this
file bounds what it makes: depth, number of rules, bytes, repetitions, and the number of ways on which a rule
can begin (llama.cpp walks all of them, and a rule that can begin with itself is an error there).

Narrow spots that are easy to get wrong: `\u` escapes exclude surrogates (half a pair is no character, and
msgpack refuses it); `-0.0` and exponents beyond e99 never appear; `oneOf` is kept only where no value can
match two of its branches.
"""

from __future__ import annotations

import errno
import importlib
import json
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

Schema = dict[str, Any] | bool

MAX_DEPTH = 64
MAX_RULES = 4_000
MAX_BYTES = 400_000
MAX_BEGINNINGS = 2_000
MAX_PROPERTIES = 500
MAX_REPETITIONS = 1_000_000
MAX_WORK = 20_000  # schemas looked at and put together: references make a small one as large as they like
_BLOCK = 64  # repetitions written out in one rule

_BASE = {
    "ws": r'| " " | "\n" [ \t]{0,20}',
    "hex": "[0-9a-fA-F]",
    "char": r'[^"\\\x00-\x1F\x7F\uD800-\uDFFF\U00110000-\U001FFFFF] | "\\" (["\\/bfnrt] | "u" escape)',
    "escape": "([0-9a-cA-CefEF] hex | [dD] [0-7]) hex hex",
    "string": r'"\"" char* "\""',
    "digits": "[0-9]{1,15}",
    "natural": '"0" | [1-9] [0-9]{0,14}',
    "integer": '"-"? natural',
    "fraction": '"." [0-9]{0,14} [1-9]',
    "number": 'integer ("." digits)? ([eE] [-+]? [0-9] [0-9]?)?',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "pair": 'string ":" ws value',
    "object": '"{" ws (pair ("," ws pair)*)? ws "}"',
    "array": '"[" ws (value ("," ws value)*)? ws "]"',
    "value": "object | array | string | number | boolean | null",
}

_DATE = '[0-9] [0-9] [0-9] [0-9] "-" ("0" [1-9] | "1" [0-2]) "-" ("0" [1-9] | "1" [0-9] | "2" [0-8])'
_TIME = (
    '([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9] ("." [0-9]{1,6})? '
    '("Z" | [-+] ([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9])'
)
_FORMATS = {
    "date": _DATE,  # to the 28th: every such day exists
    "time": _TIME,
    "date-time": f'{_DATE} "T" {_TIME}',
    "uuid": 'hex{8} "-" hex{4} "-" hex{4} "-" hex{4} "-" hex{12}',
}

_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_IMPLIES = {
    "object": ("properties", "required", "additionalProperties", "minProperties", "maxProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems", "additionalItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
}
_REFUSED = (
    "not", "if", "then", "else", "dependentSchemas", "dependentRequired", "dependencies", "contains",
    "patternProperties", "propertyNames", "unevaluatedItems", "multipleOf", "$dynamicRef", "$recursiveRef",
)  # fmt: skip


def refuse(sentence: str) -> OSError:
    return OSError(errno.EINVAL, sentence)


def literal(text: str) -> str:
    """`text` as a GBNF string."""
    return '"' + "".join(_escaped(c) for c in text) + '"'


def _escaped(char: str) -> str:
    if char in '"\\':
        return "\\" + char
    return char if char.isprintable() else _code(char)


def _code(char: str) -> str:
    point = ord(char)
    return f"\\x{point:02X}" if point < 0x100 else f"\\U{point:08X}"


class Converter:
    """Gathers the rules of one grammar. `convert` may be called several times; `text` gives it all."""

    def __init__(self) -> None:
        self._rules = dict(_BASE)
        self._begins: dict[str, list[str]] = {}  # rule → rules it can begin with before anything is written
        self._refs: dict[tuple[int, str], str] = {}  # (document, pointer) → rule
        self._root: Schema = True
        self._bytes = 0
        self._work = 0

    def convert(self, name: str, schema: Schema) -> str:
        """Add the rules of a schema; the name of its first rule."""
        self._root = schema
        try:
            rule = self._visit(schema, name, 0)
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            # Nonsense has more forms than there are checks below.
            raise refuse(f"the schema is malformed: {error}") from error
        self._check_beginnings()
        return rule

    def add(self, name: str, body: str) -> str:
        """A rule under this name, or this name with a number."""
        key, i = name, 0
        while key in self._rules and self._rules[key] != body:
            i += 1
            key = f"{name}-{i}"
        if key not in self._rules:
            self._bytes += len(body) + len(key) + 8
            if len(self._rules) >= MAX_RULES or self._bytes > MAX_BYTES:
                raise refuse("the schema is too large for a grammar")
            self._rules[key] = body
        return key

    def _spend(self, work: int) -> None:
        self._work += work
        if self._work > MAX_WORK:
            raise refuse("the schema is too complex for a grammar")

    def text(self) -> str:
        return "\n".join(f"{name} ::= {body}" for name, body in self._rules.items()) + "\n"

    # ── one schema ──

    def _visit(self, schema: Schema, name: str, depth: int) -> str:
        """The name of the rule of a schema."""
        self._spend(1)
        if depth > MAX_DEPTH:
            raise refuse(f"the schema is nested deeper than {MAX_DEPTH} levels")
        if schema is True or schema == {}:
            return "value"
        if schema is False:
            raise refuse("the schema false allows no value")
        if not isinstance(schema, dict):
            raise refuse(f"a schema must be an object or a boolean, not {json.dumps(schema)[:40]}")
        self._check_keywords(schema)
        if "$ref" in schema:
            return self._reference(schema, name, depth)
        if "allOf" in schema:
            return self._visit(self._merged(schema), name, depth + 1)
        for union in ("anyOf", "oneOf"):
            if union in schema:
                return self._union(schema, union, name, depth)
        if "enum" in schema or "const" in schema:
            return self._choice(schema, name)
        return self._typed(schema, name, depth)

    def _check_keywords(self, schema: dict[str, Any]) -> None:
        for keyword in _REFUSED:
            if keyword in schema:
                raise refuse(f"{keyword}: no grammar can express this keyword")
        if schema.get("uniqueItems") is True:
            raise refuse("uniqueItems: no grammar can express this keyword")

    def _reference(self, schema: dict[str, Any], name: str, depth: int) -> str:
        pointer = schema["$ref"]
        siblings = {k: v for k, v in schema.items() if k != "$ref" and k not in _ANNOTATIONS}
        if siblings:
            return self._visit(self._merged({**siblings, "allOf": [{"$ref": pointer}]}), name, depth + 1)
        target = self._resolve(pointer)
        known = self._refs.get((id(self._root), pointer))
        if known is not None:
            return known
        # The rule's name is fixed before its body is known, because the body may need it.
        rule = self._reserve(f"ref{len(self._refs)}")
        self._refs[id(self._root), pointer] = rule
        body = self._visit(target, f"{rule}-", depth + 1)
        self._rules[rule] = body
        self._begins[rule] = [body]
        return rule

    def _reserve(self, name: str) -> str:
        key, i = name, 0
        while key in self._rules:
            i += 1
            key = f"{name}-{i}"
        if len(self._rules) >= MAX_RULES:
            raise refuse("the schema is too large for a grammar")
        self._rules[key] = "value"
        return key

    def _resolve(self, pointer: Any) -> Schema:
        if not isinstance(pointer, str) or not (pointer == "#" or pointer.startswith("#/")):
            raise refuse(f"$ref {pointer!r}: only references within the schema are followed ('#/…')")
        at: Any = self._root
        for part in pointer.split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(at, list) and part.isdigit() and int(part) < len(at):
                at = at[int(part)]
            elif isinstance(at, dict) and part in at:
                at = at[part]
            else:
                raise refuse(f"$ref {pointer!r} points to nothing")
        if not isinstance(at, dict | bool):
            raise refuse(f"$ref {pointer!r} points to something that is no schema")
        return at

    def _check_beginnings(self) -> None:
        """No rule may begin with itself, and none on too many ways."""
        ways: dict[str, int] = {}
        open_: set[str] = set()

        def count(rule: str, depth: int) -> int:
            if rule in open_ or depth > 4 * MAX_DEPTH:
                raise refuse("the schema refers to itself with nothing in between")
            if rule not in ways:
                open_.add(rule)
                ways[rule] = sum(count(other, depth + 1) for other in self._begins.get(rule, ())) or 1
                open_.remove(rule)
            if ways[rule] > MAX_BEGINNINGS:
                raise refuse("the schema has too many alternatives at one place")
            return ways[rule]

        for rule in self._begins:
            count(rule, 0)

    # ── combinations ──

    def _merged(self, schema: dict[str, Any], depth: int = 0) -> dict[str, Any]:
        """One schema that says what `schema` and all of its allOf say together."""
        if depth > MAX_DEPTH:
            raise refuse("allOf: nested too deep")
        merged: dict[str, Any] = {k: v for k, v in schema.items() if k != "allOf"}
        parts = schema["allOf"]
        if not isinstance(parts, list):
            raise refuse("allOf must be a list")
        for part in parts:
            self._spend(1)
            while isinstance(part, dict) and set(part) - _ANNOTATIONS == {"$ref"}:
                depth += 1
                if depth > MAX_DEPTH:
                    raise refuse("allOf: its references go round in a circle")
                part = self._resolve(part["$ref"])
            if part is True:
                continue
            if not isinstance(part, dict):
                raise refuse("allOf must hold schemas")
            if "allOf" in part:
                part = self._merged(part, depth + 1)
            merged = self._both(merged, part)
        return merged

    def _both(self, a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
        self._spend(1 + len(a) + len(b))
        if ("prefixItems" in a) != ("prefixItems" in b) and ("items" in a or "items" in b):
            raise refuse("allOf: prefixItems of one part with items of another cannot be combined")
        both = dict(a)
        for key, value in b.items():
            if key not in both or _same(both[key], value) or key in _ANNOTATIONS:
                both[key] = value
            elif key == "properties":
                both[key] = self._both_properties(both[key], value)
            elif key == "required":
                self._spend(len(both[key]) + len(value))
                both[key] = list(dict.fromkeys([*both[key], *value]))
            elif key in ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"):
                both[key] = max(both[key], value)
            elif key in ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"):
                both[key] = min(both[key], value)
            else:
                raise refuse(f"allOf: two different {key} at one place cannot be combined")
        if a.get("additionalProperties", True) is not True or b.get("additionalProperties", True) is not True:
            for one, other in ((a, b), (b, a)):
                extra = set(other.get("properties", ())) - set(one.get("properties", ()))
                if one.get("additionalProperties", True) is not True and extra:
                    raise refuse("allOf: additionalProperties of one part excludes properties of another")
        return both

    def _both_properties(self, a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
        both = dict(a)
        for name, value in b.items():
            both[name] = {"allOf": [both[name], value]} if name in both and both[name] != value else value
        return both

    def _union(self, schema: dict[str, Any], key: str, name: str, depth: int) -> str:
        branches = schema[key]
        if not isinstance(branches, list) or not branches:
            raise refuse(f"{key} must be a list of schemas")
        rest = {k: v for k, v in schema.items() if k != key and k not in _ANNOTATIONS}
        if rest:
            branches = [
                self._merged({**rest, "allOf": [branch]}) if branch is not True else rest for branch in branches
            ]
        if key == "oneOf":
            self._check_disjoint(branches)
        rules = [self._visit(branch, f"{name}-{i}", depth + 1) for i, branch in enumerate(branches)]
        return self._alternatives(name, rules)

    def _alternatives(self, name: str, rules: list[str]) -> str:
        unique = list(dict.fromkeys(rules))
        if len(unique) == 1:
            return unique[0]
        rule = self.add(name, " | ".join(unique))
        self._begins[rule] = unique
        return rule

    def _check_disjoint(self, branches: list[Schema]) -> None:
        self._spend(len(branches) * (len(branches) - 1) // 2)
        followed = [self._follow(branch) for branch in branches]
        for i, a in enumerate(followed):
            for b in followed[:i]:
                if not _disjoint(a, b):
                    raise refuse(
                        "oneOf: a value could match two of the branches; use anyOf, or tell them apart "
                        "by type, by a required property or by a const"
                    )

    def _follow(self, schema: Schema) -> Schema:
        for _ in range(MAX_DEPTH):
            if not isinstance(schema, dict) or "$ref" not in schema:
                break
            schema = self._resolve(schema["$ref"])
        return schema

    def _choice(self, schema: dict[str, Any], name: str) -> str:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        if not isinstance(values, list) or not values:
            raise refuse("enum must be a list of values")
        beside = set(schema) - _ANNOTATIONS - {"const", "enum", "type", "$defs", "definitions"}
        if beside:
            raise refuse(f"enum, const: not together with {min(beside)}")
        types = _types(schema)
        kept = [value for value in values if not types or any(_is(value, t) for t in types)]
        if "const" in schema and "enum" in schema:
            kept = [value for value in kept if any(_same(value, other) for other in schema["enum"])]
        if not kept:
            raise refuse("enum: none of its values has the type that the schema asks for")
        try:
            texts = sorted({json.dumps(value, ensure_ascii=False, allow_nan=False) for value in kept})
            "".join(texts).encode()
        except (ValueError, UnicodeEncodeError):
            raise refuse("enum: a value that is not JSON") from None
        return self.add(name, self._trie(name, texts))

    def _trie(self, name: str, texts: list[str]) -> str:
        """Sorted texts as a tree over what they begin with: however many there are, few can begin at once."""
        if len(texts) <= 8:
            return " | ".join(map(literal, texts))
        groups: dict[str, list[str]] = {}
        for text in texts:
            groups.setdefault(text[:1], []).append(text)
        alternatives = []
        for members in groups.values():
            head = _common_head(members)
            if len(members) == 1:
                alternatives.append(literal(head))
            else:
                rule = self.add(f"{name}-t", self._trie(name, [text[len(head) :] for text in members]))
                alternatives.append(f"{literal(head)} {rule}" if head else rule)
        return " | ".join(alternatives)

    # ── types ──

    def _typed(self, schema: dict[str, Any], name: str, depth: int) -> str:
        types = _types(schema) or [t for t, keywords in _IMPLIES.items() if any(k in schema for k in keywords)]
        if not types:
            return "value"
        make: dict[str, Callable[[dict[str, Any], str, int], str]] = {
            "object": self._object,
            "array": self._array,
            "string": self._string,
            "number": self._number,
            "integer": self._integer,
        }
        rules = []
        for kind in types:
            suffix = f"{name}-{kind}" if len(types) > 1 else name
            rules.append(make[kind](schema, suffix, depth) if kind in make else kind)
        return self._alternatives(name, rules)

    def _object(self, schema: dict[str, Any], name: str, depth: int) -> str:
        properties = schema.get("properties", {})
        if isinstance(properties, dict) and len(properties) > MAX_PROPERTIES:
            raise refuse(f"properties: more than {MAX_PROPERTIES}")
        required = schema.get("required", [])
        others = schema.get("additionalProperties", schema.get("unevaluatedProperties", True))
        if not isinstance(properties, dict) or not _strings(required):
            raise refuse("properties must be an object and required a list of names")
        missing = [key for key in required if key not in properties]
        if missing and others is False:
            raise refuse(f"required: {missing[0]!r} is not among the properties, and no others are allowed")
        members = {**properties, **dict.fromkeys(missing, others)}
        if not members:
            return self._map(schema, name, others, depth)
        low, high = _bounds(schema, "minProperties", "maxProperties")
        if low > len(set(required)) or (high is not None and high < len(members)):
            raise refuse("minProperties, maxProperties: not together with properties")
        pairs = [
            (f'{literal(json.dumps(key, ensure_ascii=False))} ":" ws '
             f"{self._visit(value, f'{name}-{i}', depth + 1)}", key in required)
            for i, (key, value) in enumerate(members.items())
        ]  # fmt: skip
        first = self._members(pairs, name)
        return self.add(name, f'"{{" ws {first} ws "}}"')

    def _members(self, pairs: list[tuple[str, bool]], name: str) -> str:
        """The members in their order, the optional ones left out or not, commas only between members. From the
        back: what may follow when nothing was written yet, and when something was."""
        first = rest = '""'
        for i in range(len(pairs) - 1, -1, -1):
            pair, needed = pairs[i]
            first_body, rest_body = f"{pair} {rest}", f'"," ws {pair} {rest}'
            if not needed:
                first_body, rest_body = f"{first_body} | {first}", f"{rest_body} | {rest}"
            first, rest = self.add(f"{name}-f{i}", first_body), self.add(f"{name}-r{i}", rest_body)
        return first

    def _map(self, schema: dict[str, Any], name: str, others: Schema, depth: int) -> str:
        low, high = _bounds(schema, "minProperties", "maxProperties")
        if others is False or high == 0:
            if low:
                raise refuse("minProperties: no properties are allowed")
            return self.add(name, '"{" ws "}"')
        if low > 1:
            raise refuse("minProperties: more than one of freely named properties cannot be ensured")
        value = self._visit(others, f"{name}-v", depth + 1)
        pair = self.add(f"{name}-p", f'string ":" ws {value}')
        return self.add(name, f'"{{" ws {self._listed(pair, low, high, name)} ws "}}"')

    def _array(self, schema: dict[str, Any], name: str, depth: int) -> str:
        items = schema.get("items", True)
        heads = schema.get("prefixItems", [])
        if isinstance(items, list):  # the way of older drafts
            heads, items = items, schema.get("additionalItems", True)
        if not isinstance(heads, list):
            raise refuse("prefixItems must be a list of schemas")
        low, high = _bounds(schema, "minItems", "maxItems")
        if not heads:
            if items is False:
                high = 0
            if high == 0:
                if low:
                    raise refuse("minItems: no items are allowed")
                return self.add(name, '"[" ws "]"')
            item = self._visit(items, f"{name}-i", depth + 1)
            return self.add(name, f'"[" ws {self._listed(item, low, high, name)} ws "]"')
        return self._tuple(heads, items, low, high, name, depth)

    def _tuple(self, heads: list[Schema], items: Schema, low: int, high: int | None, name: str, depth: int) -> str:
        if high is not None and high < len(heads):
            heads, items = heads[:high], False
        if not heads:
            return self.add(name, '"[" ws "]"')
        rules = [self._visit(head, f"{name}-{i}", depth + 1) for i, head in enumerate(heads)]
        body = ' "," ws '.join(rules)  # all of them: an array may be shorter, but this is always valid
        if low > len(heads):
            if items is False:
                raise refuse("minItems: more than the items that are allowed")
            item = self.add(f"{name}-m", f'"," ws {self._visit(items, f"{name}-i", depth + 1)}')
            body += f" {self._repeat(item, low - len(heads), None if high is None else high - len(heads), name)}"
        return self.add(name, f'"[" ws {body} ws "]"')

    def _listed(self, item: str, low: int, high: int | None, name: str) -> str:
        """`item` low to high times, with commas between."""
        more = self.add(f"{name}-n", f'"," ws {item}')
        tail = self._repeat(more, max(low - 1, 0), None if high is None else high - 1, name)
        listed = f"{item} {tail}" if tail else item
        return listed if low else f"({listed})?"

    def _repeat(self, item: str, low: int, high: int | None, name: str) -> str:
        """`item` low to high times. llama.cpp writes every repetition out, so many of them go in blocks."""
        if high is not None and high < low:
            raise refuse("a minimum is larger than its maximum")
        exact = self._exactly(item, low, name)
        if high is None:
            return f"{exact} {item}*".strip()
        return f"{exact} {self._at_most(item, high - low, name)}".strip()

    def _exactly(self, item: str, n: int, name: str) -> str:
        if n <= _BLOCK:
            return f"{item}{{{n}}}" if n else ""
        block = self.add(f"{name}-b", f"{item}{{{_BLOCK}}}")
        blocks, rest = divmod(n, _BLOCK)
        return f"{self._exactly(block, blocks, name)} {self._exactly(item, rest, name)}".strip()

    def _at_most(self, item: str, n: int, name: str) -> str:
        if n <= _BLOCK:
            return f"{item}{{0,{n}}}" if n else ""
        block = self.add(f"{name}-b", f"{item}{{{_BLOCK}}}")
        blocks, rest = divmod(n, _BLOCK)
        fewer = f"{self._at_most(block, blocks - 1, name)} {item}{{0,{_BLOCK - 1}}}".strip()
        full = f"{self._exactly(block, blocks, name)} {self._at_most(item, rest, name)}".strip()
        return self.add(f"{name}-u", f"{fewer} | {full}")

    def _string(self, schema: dict[str, Any], name: str, depth: int) -> str:
        low, high = _bounds(schema, "minLength", "maxLength")
        pattern, form = schema.get("pattern"), schema.get("format")
        limited = low > 0 or high is not None
        if pattern is not None:
            if limited:
                raise refuse("pattern: not together with minLength or maxLength")
            return self.add(name, f'"\\"" ({_Pattern(self, name).rule(pattern)}) "\\""')
        if form in _FORMATS and not limited:
            return self.add(name, f'"\\"" {_FORMATS[form]} "\\""')
        if not limited:
            return "string"
        return self.add(name, f'"\\"" {self._repeat("char", low, high, name)} "\\""')

    def _integer(self, schema: dict[str, Any], name: str, depth: int) -> str:
        low, high = _limits(schema)
        if low is None and high is None:
            return "integer"
        return self.add(name, _integers(_first_int(low), _last_int(high)))

    def _number(self, schema: dict[str, Any], name: str, depth: int) -> str:
        low, high = _limits(schema)
        if low is None and high is None:
            return "number"
        first, last = _first_int(low), _last_int(high)
        # n.frac lies strictly between n and n + 1, so both of these must be within the limits (closed or not).
        least = math.ceil(low[0]) if low else -_LARGEST
        most = math.floor(high[0]) if high else _LARGEST
        parts = []
        if first <= last:
            parts.append(_integers(first, last))
        if max(least, 0) <= most - 1:
            parts.append(f"({_integers(max(least, 0), most - 1)}) fraction")
        if max(-most, 0) <= -least - 1:
            parts.append(f'"-" ({_integers(max(-most, 0), -least - 1)}) fraction')
        if not parts:
            raise refuse("minimum, maximum: too close together for a grammar")
        return self.add(name, " | ".join(parts))


_ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "example", "$comment", "$schema", "$id", "$defs", "definitions",
     "deprecated", "readOnly", "writeOnly", "nullable", "contentEncoding", "contentMediaType", "$anchor"}
)  # fmt: skip


def _types(schema: dict[str, Any]) -> list[str]:
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not isinstance(kinds, list) or not all(kind in _TYPES for kind in kinds):
        raise refuse(f"type {json.dumps(kinds)[:60]}: must be one of {', '.join(_TYPES)}")
    return list(dict.fromkeys(kinds))


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool) or value is None:
        return kind == ("null" if value is None else "boolean")
    if isinstance(value, int):
        return kind in ("integer", "number")
    if isinstance(value, float):
        return kind == "number" or (kind == "integer" and value.is_integer())
    return isinstance(value, {"string": str, "array": list, "object": dict}.get(kind, ()))


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _common_head(texts: list[str]) -> str:
    first, last = min(texts), max(texts)
    n = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:n]


def _bounds(schema: dict[str, Any], least: str, most: str) -> tuple[int, int | None]:
    low, high = schema.get(least, 0), schema.get(most)
    for key, value in ((least, low), (most, high)):
        if key not in schema:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value != int(value):
            raise refuse(f"{key} must be a whole number")
        if value > MAX_REPETITIONS and key == least:
            raise refuse(f"{key} {value}: a grammar can repeat {MAX_REPETITIONS} times at most")
    return int(low), None if high is None else min(int(high), MAX_REPETITIONS)


def _disjoint(a: Schema, b: Schema) -> bool:
    """Can no text of a's grammar be valid against b, nor the other way round? False when in doubt."""
    if not isinstance(a, dict) or not isinstance(b, dict):
        return False
    values_a, values_b = _values(a), _values(b)
    if values_a is not None and values_b is not None:
        return not any(value in values_b for value in values_a)
    kinds_a, kinds_b = set(_types(a)), set(_types(b))
    if kinds_a and kinds_b:
        if "number" in kinds_a | kinds_b:
            kinds_a, kinds_b = kinds_a - {"integer"} | {"number"} & kinds_a, kinds_b
            if "integer" in kinds_b and "number" in kinds_a:
                return False
            if "integer" in set(_types(a)) and "number" in kinds_b:
                return False
        if not kinds_a & kinds_b:
            return True
    members_a, members_b = a.get("properties", {}), b.get("properties", {})
    needed_a, needed_b = a.get("required", []), b.get("required", [])
    if not members_a or not members_b or {"anyOf", "allOf", "oneOf", "$ref"} & {*a, *b}:
        return False
    if (kinds_a or {"object"}) & (kinds_b or {"object"}) != {"object"}:
        return False  # a value that is no object has no properties to be told apart by
    for name in set(needed_a) & set(needed_b) & set(members_a) & set(members_b):
        inner_a, inner_b = members_a[name], members_b[name]
        if isinstance(inner_a, dict) and isinstance(inner_b, dict):
            values_a, values_b = _values(inner_a), _values(inner_b)
            if values_a is not None and values_b is not None and not any(value in values_b for value in values_a):
                return True
    # Only properties that are declared or required are ever written, so a lacks what b needs, and b what a needs.
    return bool(set(needed_b) - {*members_a, *needed_a}) and bool(set(needed_a) - {*members_b, *needed_b})


def _same(a: Any, b: Any) -> bool:
    """As JSON has it: true is not 1."""
    return a == b and json.dumps(a, sort_keys=True, default=str) == json.dumps(b, sort_keys=True, default=str)


def _values(schema: dict[str, Any]) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return values if isinstance(values, list) else None


# ── numbers between limits ────────────────────────────────────────────────────────────────────────────────

_LARGEST = 10**15 - 1

Limit = tuple[float, bool]  # value; is it excluded?


def _limits(schema: dict[str, Any]) -> tuple[Limit | None, Limit | None]:
    def limit(inclusive: str, exclusive: str, tighter: Callable[[Limit, Limit], Limit]) -> Limit | None:
        found: list[Limit] = []
        for key, excluded in ((inclusive, False), (exclusive, True)):
            value = schema.get(key)
            if isinstance(value, bool):  # draft 4: a flag on the other keyword
                if value and excluded and isinstance(schema.get(inclusive), int | float):
                    found.append((schema[inclusive], True))
            elif value is not None:
                if not isinstance(value, int | float) or not math.isfinite(value):
                    raise refuse(f"{key} must be a number")
                found.append((value, excluded))
        if not found:
            return None
        return found[0] if len(found) == 1 else tighter(*found)

    low = limit("minimum", "exclusiveMinimum", max)
    high = limit("maximum", "exclusiveMaximum", lambda a, b: min(a, b, key=lambda x: (x[0], not x[1])))
    return low, high


def _first_int(low: Limit | None) -> int:
    if low is None:
        return -_LARGEST
    return math.floor(low[0]) + 1 if low[1] else math.ceil(low[0])


def _last_int(high: Limit | None) -> int:
    if high is None:
        return _LARGEST
    return math.ceil(high[0]) - 1 if high[1] else math.floor(high[0])


def _integers(first: int, last: int) -> str:
    """The decimal numbers first … last, as alternatives."""
    first, last = max(first, -_LARGEST), min(last, _LARGEST)
    if first > last:
        raise refuse("minimum, maximum: no whole number lies between them")
    parts = []
    if first < 0:
        parts += [f'"-" {part}' for part in _naturals(max(-last, 1), -first)]
    if last >= 0:
        parts += _naturals(max(first, 0), last)
    return " | ".join(parts)


def _naturals(first: int, last: int) -> list[str]:
    parts = []
    for length in range(len(str(first)), len(str(last)) + 1):
        low = max(first, 10 ** (length - 1) if length > 1 else 0)
        high = min(last, 10**length - 1)
        parts.append(_same_length(str(low), str(high)))
    return [f"({part})" if " | " in part else part for part in parts]


def _same_length(low: str, high: str) -> str:
    """Decimal strings of one length between two of them."""
    if low == high:
        return f'"{low}"' if low else ""
    if set(low) == {"0"} and set(high) == {"9"}:
        return f"[0-9]{{{len(low)}}}"
    if low[0] == high[0]:
        rest = _same_length(low[1:], high[1:])
        return f'"{low[0]}" ' + (f"({rest})" if " | " in rest else rest)
    n = len(low) - 1
    start, end = int(low[0]), int(high[0])
    parts = []
    if set(low[1:]) - {"0"}:
        parts.append(_same_length(low, low[0] + "9" * n))
        start += 1
    tail = ""
    if set(high[1:]) - {"9"}:
        tail = _same_length(high[0] + "0" * n, high)
        end -= 1
    if start <= end:
        parts.append(f"[{start}-{end}]" + (f" [0-9]{{{n}}}" if n else ""))
    if tail:
        parts.append(tail)
    return " | ".join(parts)


# ── patterns ──────────────────────────────────────────────────────────────────────────────────────────────

Ranges = list[tuple[int, int]]

_TOP = 0x10FFFF
_UNWRITABLE: Ranges = [(0, 0x1F), (0x22, 0x22), (0x5C, 0x5C), (0x7F, 0x7F), (0xD800, 0xDFFF)]
_CLASSES: dict[str, Ranges] = {
    "CATEGORY_DIGIT": [(0x30, 0x39)],
    "CATEGORY_SPACE": [(0x20, 0x20)],
    "CATEGORY_WORD": [(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)],
}


#: … with all that some reader of patterns counts among them.
_WIDEST: dict[str, Ranges] = {
    "CATEGORY_DIGIT": [(0x30, 0x39), (0x80, _TOP)],
    "CATEGORY_SPACE": [
        (9, 13), (0x1C, 0x20), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029),
        (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF),
    ],
    "CATEGORY_WORD": [*_CLASSES["CATEGORY_WORD"], (0x80, _TOP)],
}  # fmt: skip


def _inverse(ranges: Ranges) -> Ranges:
    out, at = [], 0
    for low, high in sorted(ranges):
        if low > at:
            out.append((at, low - 1))
        at = max(at, high + 1)
    return [*out, (at, _TOP)] if at <= _TOP else out


class _Pattern:
    """A regular expression as the inside of a JSON string. A text that the whole pattern matches is made, which
    also satisfies a pattern without anchors. Lookaround, back references and the like are refused."""

    def __init__(self, converter: Converter, name: str) -> None:
        self._converter = converter
        self._name = name

    def rule(self, pattern: Any) -> str:
        if not isinstance(pattern, str) or len(pattern) > 2000:
            raise refuse("pattern must be a string of at most 2000 characters")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                parsed = importlib.import_module("re._parser").parse(pattern)
        except (ValueError, OverflowError, RecursionError) as error:  # re.error is a ValueError from 3.13 on
            raise refuse(f"pattern: {error}") from None
        except Exception as error:
            if type(error).__name__ not in ("error", "PatternError"):
                raise
            raise refuse(f"pattern: {error}") from None
        items = list(parsed)
        if items and _op(items[0]) == "AT" and str(items[0][1]) in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            items = items[1:]
        if items and _op(items[-1]) == "AT" and str(items[-1][1]) in ("AT_END", "AT_END_STRING"):
            items = items[:-1]
        return self._sequence(items, 0) or '""'

    def _sequence(self, items: Iterable[Any], depth: int) -> str:
        if depth > MAX_DEPTH:
            raise refuse("pattern: nested too deep")
        return " ".join(filter(None, (self._item(_op(item), item[1], depth) for item in items)))

    def _item(self, op: str, value: Any, depth: int) -> str:
        if op == "LITERAL":
            return self._characters([(value, value)])
        if op == "NOT_LITERAL":
            return self._characters(_inverse([(value, value)]))
        if op == "ANY":
            return self._characters(_inverse([(10, 10)]))
        if op == "IN":
            return self._characters(self._class(value))
        if op == "SUBPATTERN":
            return f"({self._sequence(value[3], depth + 1)})" if list(value[3]) else ""
        if op == "BRANCH":
            return "(" + " | ".join(self._sequence(branch, depth + 1) or '""' for branch in value[1]) + ")"
        if op in ("MAX_REPEAT", "MIN_REPEAT"):
            return self._repeated(value, depth)
        raise refuse(f"pattern: {op.lower().replace('_', ' ')} cannot be expressed by a grammar")

    def _repeated(self, value: Any, depth: int) -> str:
        low, high, inner = value
        body = self._sequence(inner, depth + 1)
        if not body:
            return ""
        high = None if "MAXREPEAT" in str(high) else int(high)
        if int(low) > MAX_REPETITIONS or (high is not None and high > MAX_REPETITIONS):
            raise refuse(f"pattern: more than {MAX_REPETITIONS} repetitions")
        item = self._converter.add(f"{self._name}-x", body)
        return f"({self._converter._repeat(item, int(low), high, self._name)})"

    def _class(self, members: Iterable[Any]) -> Ranges:
        ranges: Ranges = []
        classes: list[tuple[Ranges, Ranges, bool]] = []
        negate = False
        for member in members:
            op, value = _op(member), member[1]
            if op == "NEGATE":
                negate = True
            elif op == "LITERAL":
                ranges.append((value, value))
            elif op == "RANGE":
                ranges.append((value[0], value[1]))
            else:
                kind = str(value)
                name, without = kind.replace("_NOT_", "_"), "_NOT_" in kind
                if name not in _CLASSES:
                    raise refuse("pattern: a character class that is not supported")
                classes.append((_CLASSES[name], _WIDEST[name], without))
        # What \w, \s, \d hold in full Unicode depends on who asks. What is written must be in them, or outside of them,
        # whoever asks: in a class its surest members count, in a negated one all that anybody takes for a member.
        for sure, widest, without in classes:
            if negate:
                ranges += _inverse(sure) if without else widest
            else:
                ranges += _ascii(_inverse([*widest, (0x7F, _TOP)])) if without else sure
        return _inverse(ranges) if negate else ranges

    def _characters(self, ranges: Ranges) -> str:
        """One character out of these, as it is written in JSON."""
        plain = _inverse([*_inverse(ranges), *_UNWRITABLE])

        def has(point: int) -> bool:
            return any(low <= point <= high for low, high in ranges)

        escapes = [r'"\\\""'] * has(0x22) + [r'"\\\\"'] * has(0x5C)
        escapes += [f'"\\\\{letter}"' for letter, point in (("n", 10), ("t", 9), ("r", 13)) if has(point)]
        if plain:
            inside = "".join(_code(chr(a)) + (f"-{_code(chr(b))}" if b > a else "") for a, b in plain)
            escapes.insert(0, f"[{inside}]")
        if not escapes:
            raise refuse("pattern: a character that JSON cannot write plainly")
        return escapes[0] if len(escapes) == 1 else f"({' | '.join(escapes)})"


def _ascii(ranges: Ranges) -> Ranges:
    return [(low, min(high, 0x7E)) for low, high in ranges if low <= 0x7E]


def _op(item: Any) -> str:
    return str(item[0])


def grammar_of(schema: Schema) -> str:
    """The grammar of one schema."""
    converter = Converter()
    rule = converter.convert("s", schema)
    return converter.text() + f"root ::= {rule}\n"
