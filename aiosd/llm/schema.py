r"""JSON Schema to a llama.cpp grammar (GBNF).

The promise: every text of the grammar is JSON and valid against the schema, and every value that the schema allows can
be written. A keyword that the grammar cannot keep is refused with a sentence and its place (a JSON pointer), not
ignored. Unknown keywords and annotations (title, description, default, …) do not affect validity and are ignored, and
so are formats that are not in `pattern.FORMATS`.

The grammar is narrower than the schema on purpose, only in these points: an object has the declared properties, and
others only where `additionalProperties` asks for them; a tuple is written whole; whitespace is limited; integers have
64 bits, numbers between limits 15 significant digits and no exponent; `-0.0` and exponents beyond e99 never appear;
`\u` escapes exclude surrogates (half a pair is no character, and msgpack refuses it). `oneOf` is kept only where no
value can match two of its branches.

A *loose* conversion (`loosely`) drops what a grammar cannot keep, where it stands, instead of refusing it. Then a text
may be not valid, but every value that the schema allows can still be written. It is for arguments that are checked
against the whole schema before they are used; what is final, like the answer under a schema, is never converted so.

Any agent can send any schema, and llama.cpp recurses over grammars and prints what it cannot parse. So this file limits
its output: depth, number of rules, bytes, repetitions, work, and the number of ways in which a rule can begin
(llama.cpp follows all of them, and a rule that can begin with itself is an error there).
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from decimal import Decimal
from typing import Any

from aiosd.errors import refuse
from aiosd.llm import numbers
from aiosd.llm.document import (
    IMPLIES,
    MAX_DEPTH,
    REFUSED,
    Document,
    Impossible,
    Later,
    Schema,
    as_list,
    essential,
    is_type,
    possible_types,
    same,
    strings,
    types,
)
from aiosd.llm.numbers import Limit
from aiosd.llm.pattern import FORMATS, MAX_REPETITIONS, Strings, as_it_is, in_json

__all__ = ["Converter", "Schema", "grammar_of", "literal", "written_raw"]

MAX_RULES = 20_000
MAX_BYTES = 2_000_000
MAX_BEGINNINGS = 2_000
MAX_PROPERTIES = 500
MAX_WORK = 40_000  # schemas visited and merged: through references a small schema can become arbitrarily large
MAX_MULTIPLES = 2_000  # of a number between two limits, listed one by one
QUICK_WORK = 600  # most work done between two decode steps
_BLOCK = 64  # repetitions written out in one rule

_FIRST = f'"-" ({numbers.integers(10**18, 2**63)})'
_LAST = numbers.integers(10**19, numbers.HIGHEST)
_BASE = {
    "ws": r'| " " | "\n" [ \t]{0,20}',
    "hex": "[0-9a-fA-F]",
    "char": r'[^"\\\x00-\x1F\x7F\uD800-\uDFFF\U00110000-\U001FFFFF] | "\\" (["\\/bfnrt] | "u" escape)',
    "escape": "([0-9a-cA-CefEF] hex | [dD] [0-7]) hex hex",
    "string": r'"\"" char* "\""',
    "integer": f'"-"? ("0" | [1-9] [0-9]{{0,17}}) | [1-9] [0-9]{{18}} | {_FIRST} | {_LAST}',
    "number": 'integer ("." [0-9]{1,17})? ([eE] [-+]? [0-9] [0-9]?)?',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "pair": 'string ":" ws value',
    "object": '"{" ws (pair ("," ws pair)*)? ws "}"',
    "array": '"[" ws (value ("," ws value)*)? ws "]"',
    "value": "object | array | string | number | boolean | null",
}


def literal(text: str) -> str:
    """`text` as a GBNF string."""
    return '"' + "".join(_escaped(c) for c in text) + '"'


def _escaped(char: str) -> str:
    if char in '"\\':
        return "\\" + char
    if char.isprintable():
        return char
    point = ord(char)
    return f"\\x{point:02X}" if point < 0x100 else f"\\U{point:08X}"


class TooLarge(OSError):
    """No keyword can be dropped that would help."""

    def __init__(self, sentence: str) -> None:
        super().__init__(errno.EINVAL, sentence)


#: What a loose conversion tries to do without, the first that helps.
_DROPPED = (
    (*REFUSED, "then", "else", "not"),
    ("pattern", "format"),
    ("multipleOf",),
    ("uniqueItems",),
    ("patternProperties", "propertyNames"),
    ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"),
    ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    ("oneOf",),
    ("allOf",),
    ("anyOf", "enum", "const"),
)


class Converter:
    """Collects the rules of one grammar. `convert` may be called several times; `text` is the whole grammar."""

    def __init__(self, quick: bool = False) -> None:
        self._most_work = QUICK_WORK if quick else MAX_WORK
        self._quick = quick
        self.loose = False  # see `loosely`
        self._rules = dict(_BASE)
        self._begins: dict[str, list[str]] = {}  # rule → rules that can be its first element
        self._known: dict[tuple[int, str], str] = {}  # (document, schema) → rule
        self._documents: list[Document] = []
        self._document = Document(True, self._spend)
        self._path: list[str] = []  # the current place in the document, for refusals
        self._bytes = 0
        self._work = 0
        self._strings = Strings(self.add, self._repeat, self._spend)

    def convert(self, name: str, schema: Schema) -> str:
        """Add the rules of a schema; returns the name of its first rule."""
        with self._open(schema):
            rule = self._visit(schema, name, 0)
        self._check_beginnings()
        return rule

    def convert_raw(self, name: str, schema: Schema, root: Schema, end: str) -> str:
        """As `convert`, for a part of `root` that stands between tags: a string without quotes and escapes, in which
        `end` does not occur; anything else as JSON."""
        with self._open(root):
            rule = self._raw(schema, name, end)
        self._check_beginnings()
        return rule

    @contextmanager
    def loosely(self) -> Iterator[None]:
        """Inside this block, keywords that a grammar cannot keep are dropped instead of refused. What is refused all
        the same (it is too large, or allows nothing) leaves nothing behind."""
        rules, begins, known, size, work = (
            dict(self._rules),
            dict(self._begins),
            dict(self._known),
            self._bytes,
            self._work,
        )
        self.loose = True
        try:
            yield
        except OSError:
            self._rules, self._begins, self._known, self._bytes, self._work = rules, begins, known, size, work
            self._strings = Strings(self.add, self._repeat, self._spend)
            raise
        finally:
            self.loose = False

    @contextmanager
    def _open(self, root: Schema) -> Iterator[None]:
        self._document = Document(root, self._spend)
        self._documents.append(self._document)  # keeps it alive: its address is used as a key
        self._path = []
        try:
            yield
        except OSError as error:
            place = getattr(error, "place", "")
            raise refuse(f"{error.strerror} (at {place})" if place else str(error.strerror)) from None
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
            # The checks below do not cover every malformed schema.
            raise refuse(f"the schema is malformed: {error}") from error

    def add(self, name: str, body: str) -> str:
        """Add a rule with this name, or this name and a number. Returns the name."""
        key, i = name, 0
        while key in self._rules and self._rules[key] != body:
            i += 1
            key = f"{name}-{i}"
        if key not in self._rules:
            self._bytes += len(body) + len(key) + 8
            if len(self._rules) >= MAX_RULES or self._bytes > MAX_BYTES:
                raise TooLarge("the schema is too large for a grammar")
            self._rules[key] = body
        return key

    def _reserve(self, name: str) -> str:
        """A unique name for a rule whose body is not known yet."""
        key, i = name, 0
        while key in self._rules:
            i += 1
            key = f"{name}-{i}"
        if len(self._rules) >= MAX_RULES:
            raise TooLarge("the schema is too large for a grammar")
        self._rules[key] = "value"
        return key

    def _spend(self, work: int) -> None:
        self._work += work
        if self._work > self._most_work:
            if self._quick:
                raise Later
            raise TooLarge("the schema is too complex for a grammar")

    @contextmanager
    def _at(self, *parts: str | int) -> Iterator[None]:
        """Inside this block, `parts` are added to the current place; a refusal contains the innermost place."""
        before = self._path
        self._path = [*before, *map(str, parts)]
        try:
            yield
        except OSError as error:
            if not hasattr(error, "place"):
                error.place = self._place()  # type: ignore[attr-defined] # our own attribute
            raise
        finally:
            self._path = before

    def _place(self) -> str:
        pointer = "#" + "".join("/" + part.replace("~", "~0").replace("/", "~1") for part in self._path)
        return pointer if len(pointer) <= 200 else f"…{pointer[-200:]}"

    def text(self) -> str:
        return "\n".join(f"{name} ::= {body}" for name, body in self._rules.items()) + "\n"

    # ── one schema ──

    def _visit(self, schema: Schema, name: str, depth: int, *at: str | int) -> str:
        """The name of the rule of a schema. `at`: its place, relative to the schema around it."""
        with self._at(*at):
            self._spend(1)
            if depth > MAX_DEPTH:
                raise refuse(f"the schema is nested deeper than {MAX_DEPTH} levels")
            if schema is False:
                raise Impossible("the schema false allows no value")
            if schema is True:
                return "value"
            if not isinstance(schema, dict):
                raise refuse(f"a schema must be an object or a boolean, not {json.dumps(schema)[:40]}")
            return self._kept(essential(schema), name, depth)

    def _kept(self, schema: dict[str, Any], name: str, depth: int) -> str:
        """The rule of a schema; of a loose conversion, of as much of it as a grammar can keep."""
        try:
            return self._of(schema, name, depth)
        except (Impossible, TooLarge):
            raise
        except OSError:
            if not self.loose:
                raise
        for weaker in _weaker(schema):
            try:
                return self._of(weaker, name, depth)
            except TooLarge:
                raise
            except OSError:
                continue
        return "value"

    def _of(self, schema: dict[str, Any], name: str, depth: int) -> str:
        if not schema:
            return "value"
        if "$ref" in schema or "allOf" in schema:
            return self._reference(schema, name, depth)
        self._check_keywords(schema)
        if "not" in schema:
            return self._of(self._without(schema), name, depth)
        for union in ("anyOf", "oneOf"):
            if union in schema:
                return self._union(schema, union, name, depth)
        if "enum" in schema or "const" in schema:
            return self._choice(schema, name)
        return self._typed(schema, name, depth)

    def _check_keywords(self, schema: dict[str, Any]) -> None:
        for keyword in REFUSED:
            if keyword == "if" and "then" not in schema and "else" not in schema:
                continue
            if keyword in schema:
                raise refuse(f"{keyword}: no grammar can express this keyword")

    def _reference(self, schema: dict[str, Any], name: str, depth: int) -> str:
        """A schema that is merged from others. Each gets one rule; its name is fixed before its body is known, because
        the body may refer to it."""
        pointer = schema["$ref"] if set(schema) == {"$ref"} else None
        key = id(self._document), f"#{pointer}" if pointer is not None else json.dumps(schema)
        self._spend(len(key[1]) // 256)
        if key in self._known:
            return self._known[key]
        rule = self._reserve(f"ref{len(self._known)}")
        before = len(self._known)
        self._known[key] = rule
        try:
            if pointer is not None:
                target = self._document.resolve(pointer)
                outside, self._path = self._path, str(pointer).partition("#")[2].split("/")[1:]
                body = self._visit(target, f"{rule}-", depth + 1)
                self._path = outside
            else:
                body = self._kept(self._document.merged(schema), f"{rule}-", depth + 1)
        except OSError:
            for stale in list(self._known)[before:]:  # rules made since then may refer to it
                del self._known[stale]
            raise
        self._rules[rule] = body
        self._begins[rule] = [body]
        return rule

    def _without(self, schema: dict[str, Any]) -> dict[str, Any]:
        """The same schema without its `not`, where other keywords can express it."""
        negated = self._document.follow(schema["not"])
        rest = {key: value for key, value in schema.items() if key != "not"}
        if negated is True or (isinstance(negated, dict) and not essential(negated)):
            raise Impossible("not: the schema allows no value")
        if negated is False:
            return rest
        if not isinstance(negated, dict):
            raise refuse("not: must be a schema")
        negated = essential(negated)
        if set(negated) == {"anyOf"}:
            for part in negated["anyOf"]:
                rest = self._without({**rest, "not": part})
            return rest
        if self._document.disjoint(rest, negated):
            return rest
        if set(negated) == {"type"}:
            kinds = types(rest) or ["object", "array", "string", "number", "boolean", "null"]
            gone = types(negated)
            if "integer" not in gone or "number" in gone or "number" not in kinds:
                return {**rest, "type": [kind for kind in kinds if kind not in gone and not
                                         (kind == "integer" and "number" in gone)]}  # fmt: skip
        if "enum" in rest or "const" in rest:
            values = [rest["const"]] if "const" in rest else rest["enum"]
            kept = [value for value in values if not self._document.fits(value, negated)]
            if not kept:
                raise Impossible("not: nothing is left of the values")
            return {**{key: value for key, value in rest.items() if key != "const"}, "enum": kept}
        if set(negated) == {"required"} and strings(negated["required"]) and len(negated["required"]) == 1:
            name = negated["required"][0]
            return {**rest, "properties": {**rest.get("properties", {}), name: False}}
        raise refuse("not: no grammar can express this keyword here")

    def _check_beginnings(self) -> None:
        """No rule may begin with itself, or in too many ways."""
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

    # ── unions and lists of values ──

    def _union(self, schema: dict[str, Any], key: str, name: str, depth: int) -> str:
        branches = schema[key]
        if not isinstance(branches, list) or not branches:
            raise refuse(f"{key} must be a list of schemas")
        rest = {k: v for k, v in schema.items() if k not in (key, "discriminator")}
        tag = self._tag(schema) if key == "oneOf" else None
        if tag is not None:
            rest = {**rest, "required": [*rest.get("required", []), tag]}
        if rest:
            branches = [{**rest, "allOf": [branch]} for branch in branches]
        if key == "oneOf":
            self._check_disjoint(branches)
        rules, impossible = [], None
        for i, branch in enumerate(branches):
            try:
                rules.append(self._visit(branch, f"{name}-{i}", depth + 1, key, i))
            except Impossible as error:
                impossible = error
        if not rules and impossible is not None:
            raise impossible
        return self._alternatives(name, rules)

    def _tag(self, schema: dict[str, Any]) -> str | None:
        """OpenAPI's discriminator: a property that every branch must have, even if it is not declared so."""
        discriminator = schema.get("discriminator")
        if isinstance(discriminator, dict) and isinstance(discriminator.get("propertyName"), str):
            return str(discriminator["propertyName"])
        return None

    def _alternatives(self, name: str, rules: list[str]) -> str:
        unique = list(dict.fromkeys(rules))
        if len(unique) == 1:
            return unique[0]
        rule = self.add(name, " | ".join(unique))
        self._begins[rule] = unique
        return rule

    def _check_disjoint(self, branches: list[Schema]) -> None:
        self._spend(len(branches) * (len(branches) - 1) // 2)
        for i, a in enumerate(branches):
            for j, b in enumerate(branches[:i]):
                if not self._disjoint(a, b):
                    raise refuse(
                        f"oneOf: a value could match both branch {j} and branch {i}; use anyOf, or tell them apart "
                        "by type, by a required property or by a const"
                    )

    def _disjoint(self, a: Schema, b: Schema) -> bool:
        try:
            return self._document.disjoint(a, b)
        except Impossible:  # one of them allows no value at all
            return True

    def _choice(self, schema: dict[str, Any], name: str) -> str:
        return self.add(name, self._trie(name, sorted({_json(value) for value in self._values(schema)})))

    def _values(self, schema: dict[str, Any]) -> list[Any]:
        """The values of an enum or a const that fit the other keywords beside it."""
        values = [schema["const"]] if "const" in schema else schema["enum"]
        if not isinstance(values, list) or not values:
            raise refuse("enum must be a list of values")
        self._spend(len(values) // 16)
        if "const" in schema and "enum" in schema:
            values = [value for value in values if any(same(value, other) for other in schema["enum"])]
        rest = {key: value for key, value in schema.items() if key not in ("const", "enum")}
        if set(rest) <= {"type"}:
            kinds = types(rest)
            kept = [value for value in values if not kinds or any(is_type(value, kind) for kind in kinds)]
        else:
            kept = [value for value in values if self._document.fits(value, rest)]
        if not kept:
            raise Impossible("enum: none of its values has the type that the schema asks for, and keeps its limits")
        return kept

    def _trie(self, name: str, texts: list[str]) -> str:
        """Sorted texts as a prefix tree: so even with many texts, few alternatives are possible at each point."""
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
        kinds = types(schema) or [kind for kind, words in IMPLIES.items() if any(word in schema for word in words)]
        if not kinds:
            if "type" in schema:
                raise Impossible("type: no type is left")
            return "value"
        make: dict[str, Callable[[dict[str, Any], str, int], str]] = {
            "object": self._object,
            "array": self._array,
            "string": self._string,
            "number": self._number,
            "integer": self._integer,
        }
        rules, impossible = [], None
        for kind in kinds:
            suffix = f"{name}-{kind}" if len(kinds) > 1 else name
            try:
                rules.append(make[kind](schema, suffix, depth) if kind in make else kind)
            except Impossible as error:
                impossible = error
        if not rules and impossible is not None:
            raise impossible
        return self._alternatives(name, rules)

    # ── objects ──

    def _object(self, schema: dict[str, Any], name: str, depth: int) -> str:
        required = schema.get("required", [])
        others = schema.get("additionalProperties", schema.get("unevaluatedProperties", True))
        declared = schema.get("properties", {})
        if not isinstance(declared, dict) or not strings(required):
            raise refuse("properties must be an object and required a list of names")
        if len(declared) > MAX_PROPERTIES:
            raise refuse(f"properties: more than {MAX_PROPERTIES}")
        low, high = _bounds(schema, "minProperties", "maxProperties")
        pairs = self._pairs(schema, required, others, name, depth)
        if not pairs and not declared:
            return self._map(schema, name, others, low, high, depth)
        names = [key for key, _, _ in pairs]
        asked = "additionalProperties" in schema and others is not False and set(declared) == set(names)
        extra = self._extra(name, names, others, depth) if asked and "patternProperties" not in schema else None
        body = self._members([(pair, needed) for _, pair, needed in pairs], low, high, extra, name)
        return self.add(name, f'"{{" ws {body} ws "}}"')

    def _pairs(
        self, schema: dict[str, Any], required: list[str], others: Schema, name: str, depth: int
    ) -> list[tuple[str, str, bool]]:
        """(name, rule, required) of every property that can be written."""
        declared, keys = schema.get("properties", {}), schema.get("propertyNames", True)
        pairs = []
        for i, key in enumerate(dict.fromkeys([*declared, *required])):
            needed = key in required
            at = ("properties", key) if key in declared else ("additionalProperties",)
            try:
                if not self._document.fits(key, keys):
                    raise Impossible(f"propertyNames: does not allow {key!r}, which is required")
                value = self._patterned(schema, key, declared.get(key, others))
                if value is False and key not in declared:
                    raise Impossible(f"required: {key!r} is not among the properties, and no others are allowed")
                rule = self._visit(value, f"{name}-{i}", depth + 1, *at)
            except Impossible:
                if needed:
                    raise
                continue
            pairs.append((key, f'{literal(_json(key))} ":" ws {rule}', needed))
        return pairs

    def _patterned(self, schema: dict[str, Any], key: str, value: Schema) -> Schema:
        """The schema of a property together with those of the patterns that its name matches."""
        patterns = schema.get("patternProperties", {})
        matching = [inner for pattern, inner in patterns.items() if self._document.fits(key, {"pattern": pattern})]
        if not matching:
            return value
        if key in schema.get("properties", {}):
            matching.append(value)
        return matching[0] if len(matching) == 1 else {"allOf": matching}

    def _members(self, pairs: list[tuple[str, bool]], low: int, high: int | None, extra: str | None, name: str) -> str:
        """The members in their order; optional ones may be left out; commas only between members. Built from the last
        member to the first: for each, what may follow after n members were written. n is 0, or 1 for "some", and is
        counted exactly where the number of members is limited."""
        needed = sum(need for _, need in pairs)
        low = 0 if low <= needed else low
        high = None if high is not None and extra is None and high >= len(pairs) else high
        if (high is not None and needed > high) or (extra is None and low > len(pairs)):
            raise Impossible("minProperties, maxProperties, minItems, maxItems: cannot be kept with what is there")
        most = high if high is not None else max(low, 1)
        self._spend(len(pairs) * (most + 1) // 16)
        more = self.add(f"{name}-e", f'"," ws {extra}') if extra else ""
        after: list[str | None] = [self._ends(written, low, high, extra, more, name) for written in range(most + 1)]
        for i in range(len(pairs) - 1, -1, -1):
            pair, need = pairs[i]
            before: list[str | None] = []
            for written in range(most + 1):
                following = after[min(written + 1, most)] if high is None or written < high else None
                comma = '"," ws ' if written else ""
                ways = [f"{comma}{pair} {following}"] if following is not None else []
                if not need and after[written] is not None:
                    ways.append(str(after[written]))
                before.append(self.add(f"{name}-{'fr'[written > 0]}{i}", " | ".join(ways)) if ways else None)
            after = before
        if after[0] is None:
            raise Impossible("minProperties, maxProperties, minItems, maxItems: cannot be kept with what is there")
        return after[0]

    def _ends(self, written: int, low: int, high: int | None, extra: str | None, more: str, name: str) -> str | None:
        """What may follow the last declared member, when `written` members have been written."""
        if extra is None:
            return '""' if written >= low else None
        least, most = max(low - written, 0), None if high is None else high - written
        if least > 1:
            raise refuse("minProperties: more than one of freely named properties cannot be ensured")
        if most == 0:
            return '""'
        if written:
            return f"({self._repeat(more, least, most, name) or chr(34) * 2})"
        return f"({self._listed(extra, least, most, name)})"

    def _map(self, schema: dict[str, Any], name: str, others: Schema, low: int, high: int | None, depth: int) -> str:
        patterns = schema.get("patternProperties", {})
        keys = schema.get("propertyNames", True)
        if not isinstance(patterns, dict):
            raise refuse("patternProperties must be an object")
        if len(patterns) > 1 or (patterns and others not in (True, False)):
            raise refuse("patternProperties: more than one kind of freely named properties")
        for pattern, inner in patterns.items():
            keys = {"allOf": [keys, {"type": "string", "pattern": pattern}]}
            others = inner
        if high == 0 or others is False or (schema.get("properties") == {} and "additionalProperties" not in schema
                                            and not patterns and keys is True):  # fmt: skip
            return self._empty("{}", low, name)
        if low > 1:
            raise refuse("minProperties: more than one of freely named properties cannot be ensured")
        try:
            value = self._visit(others, f"{name}-v", depth + 1, "additionalProperties")
        except Impossible:
            return self._empty("{}", low, name)
        key = "string"
        if keys is not True:
            self._document.disjoint(keys, {"type": "string"})
            key = self._visit({"allOf": [keys, {"type": "string"}]}, f"{name}-k", depth + 1, "propertyNames")
        pair = self.add(f"{name}-p", f'{key} ":" ws {value}')
        return self.add(name, f'"{{" ws {self._listed(pair, low, high, name)} ws "}}"')

    def _empty(self, brackets: str, low: int, name: str) -> str:
        if low:
            raise Impossible("minItems, minProperties: none are allowed")
        return self.add(name, f'"{brackets[0]}" ws "{brackets[1]}"')

    def _extra(self, name: str, names: list[str], others: Schema, depth: int) -> str | None:
        """A property with a name that is not among `names`."""
        value = self._visit(others, f"{name}-v", depth + 1, "additionalProperties")
        key = self._other_name(f"{name}-k", [_json(key)[1:-1] for key in names])
        return self.add(f"{name}-p", f'"\\"" {key} ":" ws {value}')

    def _other_name(self, name: str, taken: list[str]) -> str:
        """The rest of a string, with its closing quote, which is none of `taken`."""
        groups: dict[str, list[str]] = {}
        for text in taken:
            if text:
                groups.setdefault(text[0], []).append(text[1:])
        ways = [] if "" in taken else ['"\\""']
        ways += [f"{literal(char)} {self._other_name(name, rest)}" for char, rest in groups.items() if char != "\\"]
        shut = "".join(f"\\U{ord(char):08X}" for char in groups)
        ways.append(f'[^"\\\\\\x00-\\x1F\\x7F\\uD800-\\uDFFF\\U00110000-\\U001FFFFF{shut}] char* "\\""')
        return self.add(f"{name}-o", " | ".join(ways))

    # ── arrays ──

    def _array(self, schema: dict[str, Any], name: str, depth: int) -> str:
        items = schema.get("items", True)
        heads = schema.get("prefixItems", [])
        if isinstance(items, list):  # as in older drafts
            heads, items = items, schema.get("additionalItems", True)
        elif "items" not in schema and schema.get("unevaluatedItems") is False:
            items = False
        if not isinstance(heads, list):
            raise refuse("prefixItems must be a list of schemas")
        low, high = _bounds(schema, "minItems", "maxItems")
        if high is not None and high < low:
            raise Impossible("minItems: a minimum is larger than its maximum")
        if schema.get("uniqueItems") is True and (high is None or high > 1):
            return self._set(items, low, high, name, len(heads))
        if heads:
            asked = "items" in schema or "additionalItems" in schema
            return self._tuple(heads, items, low, high, name, depth, asked)
        if high == 0 or items is False:
            return self._empty("[]", low, name)
        try:
            item = self._visit(items, f"{name}-i", depth + 1, "items")
        except Impossible:
            if low:
                raise
            return self._empty("[]", low, name)
        return self.add(name, f'"[" ws {self._listed(item, low, high, name)} ws "]"')

    def _set(self, items: Schema, low: int, high: int | None, name: str, heads: int) -> str:
        """Unique items: each of a few known values at most once, in their order."""
        schema = self._document.follow(items)
        if isinstance(schema, dict) and set(essential(schema)) == {"type"} and types(schema) == ["boolean"]:
            schema = {"enum": [False, True]}
        if heads or not isinstance(schema, dict) or not ("enum" in schema or "const" in schema):
            raise refuse("uniqueItems: no grammar can express this keyword where the items are not an enum")
        texts = list(dict.fromkeys(_json(value) for value in self._values(essential(schema))))
        body = self._members([(literal(text), False) for text in texts], low, high, None, name)
        return self.add(name, f'"[" ws {body} ws "]"')

    def _tuple(
        self, heads: list[Schema], items: Schema, low: int, high: int | None, name: str, depth: int, asked: bool
    ) -> str:
        if high is not None and high < len(heads):
            heads, items = heads[:high], False
        if not heads:
            return self._empty("[]", low, name)
        rules = [self._visit(head, f"{name}-{i}", depth + 1, "prefixItems", i) for i, head in enumerate(heads)]
        body = ' "," ws '.join(rules)  # all of them: the schema allows shorter arrays, but means the whole tuple
        if low > len(heads) and items is False:
            raise Impossible("minItems: more than the items that are allowed")
        if items is not False and (asked or low > len(heads)):
            item = self.add(f"{name}-m", f'"," ws {self._visit(items, f"{name}-i", depth + 1, "items")}')
            least = max(low - len(heads), 0)
            body += f" {self._repeat(item, least, None if high is None else high - len(heads), name)}"
        return self.add(name, f'"[" ws {body} ws "]"')

    def _listed(self, item: str, low: int, high: int | None, name: str) -> str:
        """`item` low to high times, with commas between."""
        more = self.add(f"{name}-n", f'"," ws {item}')
        tail = self._repeat(more, max(low - 1, 0), None if high is None else high - 1, name)
        listed = f"{item} {tail}" if tail else item
        return listed if low else f"({listed})?"

    def _repeat(self, item: str, low: int, high: int | None, name: str) -> str:
        """`item` low to high times. llama.cpp expands every repetition, so large numbers are built from blocks."""
        if high is not None and high < low:
            raise Impossible("a minimum is larger than its maximum")
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

    # ── strings ──

    def _string(self, schema: dict[str, Any], name: str, depth: int) -> str:
        low, high = _bounds(schema, "minLength", "maxLength")
        if high is not None and high < low:
            raise Impossible("minLength: a minimum is larger than its maximum")
        patterns = _patterns(schema)
        if patterns:
            return self.add(name, f'"\\"" {self._strings.rule(name, patterns, low, high, spell=in_json)} "\\""')
        if not low and high is None:
            return "string"
        return self.add(name, f'"\\"" {self._repeat("char", low, high, name)} "\\""')

    def _raw(self, schema: Schema, name: str, end: str) -> str:
        inner = self._document.follow(schema)
        if not written_raw(inner, self._document.root):
            return self._visit(schema, name, 0)
        assert isinstance(inner, dict)
        if "enum" in inner or "const" in inner:
            return self.add(name, self._trie(name, sorted(set(self._values(essential(inner))))))
        low, high = _bounds(inner, "minLength", "maxLength")
        return self._strings.rule(name, _patterns(inner), low, high, spell=as_it_is, without=end)

    # ── numbers ──

    def _integer(self, schema: dict[str, Any], name: str, depth: int) -> str:
        low, high = numbers.limits(schema)
        step = _step(schema)
        if step is not None and step != step.to_integral_value():
            if (1 / step) != (1 / step).to_integral_value():
                raise refuse("multipleOf: of an integer it must be a whole number")
            step = None
        if step is not None and step != 1:
            return self._multiples(step, low, high, name)
        if low is None and high is None:
            return "integer"
        first, last = numbers.first_integer(low), numbers.last_integer(high)
        if first > last:
            raise Impossible("minimum, maximum: no whole number of 64 bits lies between them")
        return self.add(name, numbers.integers(first, last))

    def _number(self, schema: dict[str, Any], name: str, depth: int) -> str:
        low, high = numbers.limits(schema)
        step = _step(schema)
        if step is not None and step == step.to_integral_value():
            return self._integer(schema, name, depth)
        places = None if step is None else -int(step.as_tuple().exponent)
        if step is not None and step.as_tuple().digits != (1,):
            return self._multiples(step, low, high, name)
        if low is not None or high is not None:
            return self.add(name, numbers.decimals(low, high, places))
        return "number" if places is None else self.add(name, f'integer ("." [0-9]{{1,{places}}})?')

    def _multiples(self, step: Decimal, low: Limit | None, high: Limit | None, name: str) -> str:
        if low is not None and high is not None and (high.value - low.value) / step <= MAX_MULTIPLES:
            first = int((low.value / step).to_integral_value(rounding="ROUND_CEILING"))
            last = int((high.value / step).to_integral_value(rounding="ROUND_FLOOR"))
            first += low.excluded and first * step == low.value
            last -= high.excluded and last * step == high.value
            if first > last:
                raise Impossible("minimum, maximum: no multiple lies between them")
            texts = sorted({f"{(i * step).normalize():f}" for i in range(first, last + 1)})
            return self.add(name, self._trie(name, texts))
        if low is None and high is None and step == step.to_integral_value() and step <= 100:
            return self._divisible(int(step), name)
        raise refuse("multipleOf: together with these limits no grammar can express it")

    def _divisible(self, step: int, name: str) -> str:
        """All multiples of a number: one rule for each remainder of the digits written so far."""
        rules = [self._reserve(f"{name}-m{remainder}") for remainder in range(step)]
        for remainder, rule in enumerate(rules):
            ways = [f'"{digit}" {rules[(remainder * 10 + digit) % step]}' for digit in range(10)]
            self._rules[rule] = " | ".join([*ways, '""'] if remainder == 0 else ways)
        begin = " | ".join(f'"{digit}" {rules[digit % step]}' for digit in range(1, 10))
        return self.add(name, f'"0" | "-"? ({begin})')


def _weaker(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The schema with less and less in it: without one group of keywords, then without more and more of these."""
    for dropped in (*_DROPPED, *(sum(_DROPPED[:n], ()) for n in range(2, len(_DROPPED) + 1))):
        weaker = {key: value for key, value in schema.items() if key not in dropped}
        if "patternProperties" in schema and "patternProperties" not in weaker:
            weaker["additionalProperties"] = True  # what the patterns allowed
        if "oneOf" in schema and dropped == ("oneOf",):
            weaker["anyOf"] = [*schema["oneOf"]]
        if len(weaker) < len(schema) or "anyOf" in weaker:
            yield weaker
    if isinstance(schema.get("type"), str):
        yield {"type": schema["type"]}


def written_raw(schema: Schema, root: Schema) -> bool:
    """Is every value of this schema a string, so that it needs no quotes between tags?"""
    inner = Document(root, lambda work: None).follow(schema)
    if not isinstance(inner, dict) or {"anyOf", "oneOf", "allOf", "$ref", "not"} & set(inner):
        return False
    return possible_types(inner) == {"string"}


def _patterns(schema: dict[str, Any]) -> list[Any]:
    formats = [FORMATS[form] for form in as_list(schema.get("format", [])) if form in FORMATS]
    return [*as_list(schema.get("pattern", [])), *formats]


def _json(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (ValueError, UnicodeEncodeError):
        raise refuse("enum: a value that is not JSON") from None
    return text


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


def _step(schema: dict[str, Any]) -> Decimal | None:
    step = schema.get("multipleOf")
    if step is None:
        return None
    if isinstance(step, bool) or not isinstance(step, int | float) or step <= 0:
        raise refuse("multipleOf must be a number above 0")
    return Decimal(repr(step)).normalize()


def grammar_of(schema: Schema, quick: bool = False, loose: bool = False) -> str:
    """The grammar of one schema. `quick`: raises `Later` where it takes long. `loose`: see `Converter.loosely`."""
    converter = Converter(quick)
    with converter.loosely() if loose else nullcontext():
        rule = converter.convert("s", schema)
    return converter.text() + f"root ::= {rule}\n"
