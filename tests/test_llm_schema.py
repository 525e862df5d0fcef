"""Every text of a grammar is JSON and valid against its schema; schemas without a grammar are refused with a sentence.

The texts are drawn by random walks through llama.cpp's own grammar, byte by byte, and judged by a validator of
the tests' own (`minischema`).
"""

from __future__ import annotations

import errno
import json
import random
import re
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiosd.llm import llama
from aiosd.llm.schema import Schema, grammar_of
from aiosd.llm.structured import Guide
from tests import tinymodels
from tests.minischema import valid
from tests.pace import cheap

#: Characters that are drawn more often, so that walks end.
CLOSING = {bytes([byte]) for byte in b'"}],:0'}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[llama.Model]:
    llama.start()
    path: Path = tinymodels.write(
        tmp_path_factory.mktemp("gguf") / "tiny.gguf", d=8, layers=1, heads=1, kv_heads=1, ff=8
    )
    model = llama.Model(str(path), 0, lambda fraction: None)
    yield model
    model.close()


def walk(model: llama.Model, gbnf: str, rng: random.Random, most: int) -> bytes | None:
    """A text of the grammar, drawn byte by byte; None when it got longer than `most`."""
    single = np.array([token for token in range(model.n_vocab) if len(model.pieces[token]) == 1])
    guide, text = Guide(model, gbnf), b""
    try:
        while len(text) <= most:
            if guide.can_end and rng.random() < 0.5:
                return text
            allowed = [int(token) for token in guide.fitting(single) if guide.allows(int(token))]
            if not allowed:
                assert guide.can_end, f"a dead end after {text!r}"
                return text
            closing = [token for token in allowed if model.pieces[token] in CLOSING]
            token = rng.choice(closing if closing and rng.random() < 0.75 else allowed)
            guide.accept(token)
            text += model.pieces[token]
        return None
    finally:
        guide.close()


def check_walks(model: llama.Model, schema: Schema, walks: int = 6, most: int = 300) -> list[Any]:
    gbnf = grammar_of(schema)
    values = []
    for seed in range(walks):
        text = walk(model, gbnf, random.Random(seed), most)
        if text is not None:
            value = json.loads(text.decode())
            assert valid(value, schema), f"{value!r} is not valid against {schema}"
            values.append(value)
    return values


SCHEMAS: list[Schema] = [
    {"type": "string", "pattern": r"^[^\s@]{1,9}@[^\s@]{1,9}$"},
    {"type": "string", "pattern": r"^[^\W]{1,5}[^\D][^\w]$"},
    True,
    {},
    {"type": "null"},
    {"type": "boolean"},
    {"type": ["integer", "null"]},
    {"type": "integer", "minimum": -12, "maximum": 1305},
    {"type": "integer", "exclusiveMinimum": 0},
    {"type": "integer", "maximum": -7},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "number", "exclusiveMinimum": -2, "exclusiveMaximum": 3},
    {"type": "number", "minimum": 0.5},
    {"type": "string", "minLength": 2, "maxLength": 5},
    {"type": "string", "maxLength": 300},
    {"type": "string", "pattern": "^[a-c]{2,3}\\d+(x|\"y\\\\)?$"},
    {"type": "string", "pattern": "[^a-z\"]\\w\\s\\S\\D?."},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "uuid"},
    {"enum": ["a", "é\n\"", 1, None, True, [1, {"k": "v"}]]},
    {"enum": [f"value-{i:04d}" for i in range(0, 3000, 7)]},
    {"const": {"a": [1, 2.5, "x"]}},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    {"type": "array", "items": False},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"const": "x"}], "items": {"type": "null"}, "minItems": 3},
    {"type": "object"},
    {"type": "object", "additionalProperties": False},
    {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1, "maxProperties": 2},
    {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b\"q": {"type": "boolean"}, "é": {"enum": [1]}, "d": {}},
        "required": ["b\"q", "d"],
        "additionalProperties": False,
    },
    {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "null"}}},
    {"type": "object", "required": ["only"]},
    {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 1}]},
    {"oneOf": [{"type": "integer"}, {"type": "string", "maxLength": 1}]},
    {
        "oneOf": [
            {"type": "object", "properties": {"kind": {"const": "a"}, "n": {"type": "integer"}}, "required": ["kind"]},
            {"type": "object", "properties": {"kind": {"const": "b"}}, "required": ["kind"]},
        ]
    },
    {"allOf": [{"type": "object", "properties": {"a": {"type": "null"}}}, {"required": ["a"]}]},
    {"type": "object", "properties": {"a": {"type": "null"}}, "anyOf": [{"required": ["a"]}, {"type": "object"}]},
    {
        "$defs": {"node": {"required": ["next"], "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"},
                                                                                {"type": "null"}]}}}},
        "$ref": "#/$defs/node",
    },
]  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:50])
def test_every_drawn_text_is_valid(model: llama.Model, schema: Schema) -> None:
    assert check_walks(model, schema), "no walk came to an end"


numbers = st.integers(-2000, 2000) | st.floats(-100, 100).map(lambda x: round(x, 2))
scalars = st.one_of(
    st.just({"type": "boolean"}),
    st.builds(
        lambda a, b: {"type": "integer", "minimum": min(a, b), "maximum": max(a, b)},
        st.integers(-(10**6), 10**6),
        st.integers(-(10**6), 10**6),
    ),
    st.builds(
        lambda a, b: {"type": "number", "minimum": min(a, b), "exclusiveMaximum": max(a, b) + 1}, numbers, numbers
    ),
    st.builds(
        lambda a, b: {"type": "string", "minLength": a, "maxLength": a + b}, st.integers(0, 130), st.integers(0, 130)
    ),
    st.lists(st.text(max_size=6) | st.integers() | st.none(), min_size=1, max_size=20).map(lambda v: {"enum": v}),
)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.builds(
            lambda item, a, b: {"type": "array", "items": item, "minItems": a, "maxItems": a + b},
            inner,
            st.integers(0, 3),
            st.integers(0, 3),
        ),
        st.builds(
            lambda properties, n: {"type": "object", "properties": properties, "required": sorted(properties)[:n]},
            st.dictionaries(st.text(max_size=5), inner, max_size=4),
            st.integers(0, 4),
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda branches: {"anyOf": branches}),
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.recursive(scalars, containers, max_leaves=6))
def test_drawn_texts_of_drawn_schemas_are_valid(model: llama.Model, schema: Schema) -> None:
    check_walks(model, schema, walks=2)


def nested(depth: int) -> Schema:
    schema: Schema = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


#: Every definition can begin with two others: 2^40 ways to begin.
DOUBLING = {
    "$defs": {
        f"{side}{i}": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}, {"$ref": f"#/$defs/b{i + 1}"}, {"const": f"{side}{i}"}]}
        for i in range(15)
        for side in "ab"
    }
    | {"a15": {"type": "null"}, "b15": {"type": "integer"}},
    "$ref": "#/$defs/a0",
}


def _needs(properties: list[str], *required: str) -> Schema:
    return {"type": "object", "properties": {name: {} for name in properties}, "required": list(required)}


def _either(kind: str) -> Schema:
    return {"type": ["object", "string"], "properties": {"kind": {"const": kind}}, "required": ["kind"]}


def _twice(i: int) -> Schema:
    return {"anyOf": [{"$ref": f"#/$defs/{i + 1}"}] * 2, "minLength": 1}


REFUSED: list[tuple[Any, str]] = [
    (False, "no value"),
    ({"not": {}}, "allows no value"),
    ({"type": "string", "not": {"pattern": "x"}}, "not:"),
    ({"if": {}, "then": {}}, "if:"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"type": "integer", "multipleOf": 300}, "multipleOf"),
    ({"patternProperties": {"a": {}, "b": {}}}, "patternProperties"),
    ({"$ref": "http://example.com/schema"}, "within the schema"),
    ({"$ref": "#/$defs/missing"}, "points to nothing"),
    ({"$ref": "#"}, "refers to itself"),
    ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "refers to itself"),
    ({"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}, "circle"),
    ({"type": "whatever"}, "must be one of"),
    ({"type": {}}, "must be one of"),
    ({"type": "integer", "minimum": 5, "maximum": 4}, "no whole number"),
    ({"type": "number", "minimum": 0.3, "exclusiveMaximum": 0.3}, "no number"),
    ({"type": "string", "pattern": "(?<=a)b"}, "pattern"),
    ({"type": "string", "pattern": "(?=a)b"}, "no text satisfies"),
    ({"type": "string", "pattern": "(a"}, "pattern"),
    ({"type": "string", "pattern": "a" * 5000}, "2000 characters"),
    ({"type": "string", "minLength": -1}, "whole number"),
    ({"type": "string", "minLength": 5, "maxLength": 2}, "larger than its maximum"),
    ({"type": "array", "minItems": 10**9}, "can repeat"),
    ({"enum": []}, "list of values"),
    ({"enum": ["\ud800"]}, "not JSON"),
    ({"type": "string", "enum": [1]}, "type"),
    ({"anyOf": []}, "list of schemas"),
    ({"anyOf": "x"}, "list of schemas"),
    ({"properties": []}, "properties"),
    ({"type": "object", "properties": {"a": 1}}, "object or a boolean"),
    ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf"),
    ({"oneOf": [{"minimum": 1}, {"maximum": 1}]}, "oneOf"),
    ({"required": ["a"], "properties": {"b": {}}, "additionalProperties": False}, "'a'"),
    (nested(500), "nested"),
    ({"type": "object", "properties": {f"p{i}": {} for i in range(2000)}}, "properties"),
    ({"enum": [f"{i}" * 30_000 for i in range(90)]}, "too large"),
    (DOUBLING, "too many"),
    ({"enum": [1, 10], "minimum": 50}, "none of its values"),
    ({"const": True, "enum": [1]}, "none of its values"),
    ({"allOf": [{"prefixItems": [{"type": "integer"}]}, {"items": {"type": "string"}}]}, "prefixItems"),
    ({"oneOf": [_needs(["x"], "x", "k"), _needs(["y"], "k")]}, "could match both"),
    ({"oneOf": [_either("a"), _either("b")]}, "could match both"),
    ({"$ref": "#/$defs/0", "$defs": {str(i): _twice(i) for i in range(40)} | {"40": {}}}, "nested deeper"),
    ({"oneOf": [{"const": i} for i in range(4000)]}, "too complex"),
]


@pytest.mark.parametrize(("schema", "why"), REFUSED, ids=lambda value: json.dumps(value)[:40])
def test_what_no_grammar_can_keep_is_refused_with_a_sentence(schema: Any, why: str) -> None:
    def refuse() -> None:
        with pytest.raises(OSError, match=re.escape(why)) as caught:
            grammar_of(schema)
        assert caught.value.errno == errno.EINVAL

    cheap(2, refuse)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": {"type": "array", "minItems": 900_000}, "minItems": 900_000},
        {"type": "string", "minLength": 1_000_000, "maxLength": 10**12},
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(500)}},
        {"enum": [f"{i:x}" * 3 for i in range(5000)]},
        {"anyOf": [{"const": i} for i in range(1500)]},
        {"type": "string", "pattern": "((a{50}){50}){50}"},
        nested(60),
    ],
    ids=lambda schema: json.dumps(schema)[:40],
)
def test_large_but_bounded_schemas_work_and_quickly(model: llama.Model, schema: Schema) -> None:
    def work() -> None:
        grammar = llama.Grammar(model, grammar_of(schema))
        for token in range(model.n_vocab):
            grammar.allows(token)
        grammar.close()

    cheap(3, work)


@settings(max_examples=150, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "enum", "const", "items", "prefixItems", "properties", "required", "minItems", "maxLength",
                 "minimum", "maximum", "pattern", "anyOf", "oneOf", "allOf", "$ref", "$defs", "format",
                 "additionalProperties", "exclusiveMinimum", "minProperties"]
            ),
            inner | st.sampled_from(["object", "array", "string", "#", "#/$defs/a", "integer"]),
            max_size=4,
        ),
        max_leaves=12,
    ).filter(lambda value: isinstance(value, dict))
)  # fmt: skip
def test_any_nonsense_gives_a_grammar_or_a_sentence(model: llama.Model, schema: Any) -> None:
    try:
        gbnf = grammar_of(schema)
    except OSError as refusal:
        code, sentence = refusal.errno, refusal.strerror
    else:
        llama.Grammar(model, gbnf).close()
        return
    assert code == errno.EINVAL
    assert sentence


# ── what can be written, and what cannot ──────────────────────────────────────────────────────────────────


def accepts(model: llama.Model, schema: Schema, text: str) -> bool:
    guide = Guide(model, grammar_of(schema))
    try:
        for byte in text.encode():
            token = model.pieces.index(bytes([byte]))
            if not guide.allows(token):
                return False
            guide.accept(token)
        return guide.can_end
    finally:
        guide.close()


DATE, DATE_TIME = {"type": "string", "format": "date"}, {"type": "string", "format": "date-time"}
TREE = {"type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#/$defs/t", "x-order": 1}}}}
PETS: Schema = {
    "$defs": {
        "cat": {"type": "object", "properties": {"kind": {"const": "cat"}, "n": {"type": "integer"}}},
        "dog": {"type": "object", "properties": {"kind": {"const": "dog"}, "pal": {"$ref": "#/$defs/pet"}}},
        "pet": {
            "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
            "discriminator": {"propertyName": "kind", "mapping": {"cat": "#/$defs/cat"}},
        },
    },
    "$ref": "#/$defs/pet",
}
AT_LEAST_ONE: Schema = {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}}, "minProperties": 1}
OPEN: Schema = {"type": "object", "properties": {"ab": {"const": 1}}, "additionalProperties": {"type": "boolean"}}
LISTED: list[tuple[Schema, list[str], list[str]]] = [
    (DATE, ['"2024-01-29"', '"2024-01-30"', '"2024-12-31"', '"2024-02-29"', '"2000-02-29"', '"2023-04-30"'],
     ['"2023-02-29"', '"2023-02-30"', '"2023-04-31"', '"1900-02-29"', '"2023-13-01"', '"2023-00-10"']),
    (DATE_TIME, ['"2024-12-31T23:59:59Z"', '"2023-06-30T12:00:00+02:00"', '"2023-06-30T12:00:00.123456Z"'],
     ['"2023-06-31T12:00:00Z"', '"2023-06-30T24:00:00Z"']),
    ({"type": "integer"}, ["0", "1234567890123456", "1234567890123456789", "18446744073709551615",
                           "-9223372036854775808"], ["18446744073709551616", "-9223372036854775809", "01", "1.0"]),
    ({"type": "number"}, ["1234567890123456789", "0.30000000000000004", "1e99"], ["1.", ".5"]),
    ({"type": "integer", "minimum": 2**53}, ["9007199254740992", "1" + "0" * 18], ["9007199254740991"]),
    ({"type": "integer", "minimum": 0, "maximum": 2**63 - 1}, ["9223372036854775807"], ["9223372036854775808"]),
    ({"type": "number", "minimum": 0.5}, ["0.5", "0.75", "1", "3.25"], ["0.4", "0", "0.49999"]),
    ({"type": "number", "exclusiveMinimum": 0.5, "maximum": 0.8}, ["0.8", "0.50001"], ["0.5", "0.81", "1"]),
    ({"type": "number", "exclusiveMaximum": 101}, ["100.9", "-3.5"], ["101", "100.9999999999999999"]),
    ({"type": "number", "multipleOf": 0.01}, ["1.25", "3"], ["1.255"]),
    ({"type": "number", "multipleOf": 1}, ["3"], ["3.5"]),
    ({"type": "integer", "multipleOf": 7}, ["0", "7", "-21", "7777777"], ["8", "71"]),
    ({"type": "integer", "multipleOf": 5, "minimum": 1, "maximum": 12}, ["5", "10"], ["0", "15", "7"]),
    ({"$defs": {"t": TREE}, "$ref": "#/$defs/t"}, ['{"kids":[{},{"kids":[]}]}'], ['{"kids":[1]}']),
    ({"$defs": {"t": {"$ref": "#/$defs/u", "type": "object"}, "u": TREE}, "$ref": "#/$defs/t"},
     ['{"kids":[{"kids":[]}]}'], ["[]"]),
    (PETS, ['{"kind":"cat","n":1}', '{"kind":"dog","pal":{"kind":"dog"}}'], ["{}", '{"kind":"cat","pal":{}}']),
    ({"$defs": {"a b": {"const": 1}, "c/d": {"const": 2}},
      "anyOf": [{"$ref": "#/$defs/a%20b"}, {"$ref": "#/$defs/c~1d"}]},
     ["1", "2"], ["3"]),
    ({"$defs": {"x": {"$anchor": "here", "const": 1}}, "$ref": "#here"}, ["1"], ["2"]),
    ({"$id": "https://example.org/s", "$defs": {"x": {"const": 1}}, "$ref": "https://example.org/s#/$defs/x"}, ["1"],
     ["2"]),
    ({"type": "string", "pattern": "^a$|^b$"}, ['"a"', '"b"'], ['"ab"', '"c"', '""']),
    ({"type": "string", "pattern": "^https?://"}, ['"https://x.org/y"', '"http://"'], ['"ftp://x"']),
    ({"type": "string", "pattern": "foo"}, ['"foo"', '"a foo b"'], ['"fo"']),
    ({"type": "string", "pattern": "^(?!admin)[a-z]+$"}, ['"adm"', '"user"'], ['"admin"', '"administrator"']),
    ({"type": "string", "pattern": "^[a-z]+$", "minLength": 2, "maxLength": 4}, ['"ab"', '"abcd"'], ['"a"', '"abcde"']),
    ({"type": "string", "format": "date", "pattern": "^2024"}, ['"2024-02-29"'], ['"2023-01-01"']),
    ({"type": "string", "pattern": "^(?<year>\\d+)$"}, ['"12"'], ['"a"']),
    ({"type": "string", "anyOf": [{"type": "string", "maxLength": 1}, {"type": "null"}]}, ['"a"', '""'],
     ["null", '"ab"']),
    ({"enum": ["a", "bbbb", 3], "maxLength": 2}, ['"a"', "3"], ['"bbbb"']),
    ({"enum": [1, 10, 20], "minimum": 5}, ["10"], ["1"]),
    (AT_LEAST_ONE, ['{"a":1}', '{"b":2}', '{"a":1,"b":2}'], ["{}"]),
    ({**AT_LEAST_ONE, "maxProperties": 1}, ['{"a":1}', '{"b":2}'], ["{}", '{"a":1,"b":2}']),
    (OPEN, ['{"ab":1,"abc":true,"a":false}', '{"x":true}', "{}"], ['{"ab":true}', '{"x":1}', '{"a\\u0062":true}']),
    ({"type": "object", "patternProperties": {"^x-": {"const": 1}}, "additionalProperties": False}, ['{"x-a":1}', "{}"],
     ['{"a":1}']),
    ({"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": {"const": 1}}, ['{"a":1}'],
     ['{"c":1}']),
    ({"type": "object", "properties": {"a": {"const": 1}, "never": {"not": {}}}}, ['{"a":1}'], ['{"never":1}']),
    ({"type": ["string", "null"], "not": {"type": "null"}}, ['"a"'], ["null"]),
    ({"type": "string", "not": {"const": 5}}, ['"a"'], ["5"]),
    ({"enum": ["a", "b"], "not": {"const": "a"}}, ['"b"'], ['"a"']),
    ({"type": "array", "items": {"enum": ["a", "b"]}, "uniqueItems": True, "minItems": 1}, ['["a"]', '["a","b"]'],
     ["[]", '["a","a"]']),
    ({"type": "array", "prefixItems": [{"const": 1}], "items": {"const": 2}}, ["[1]", "[1,2,2]"], ["[2]"]),
    ({"allOf": [{"$ref": "#/$defs/a"}] * 100, "$defs": {"a": {"const": 1}}}, ["1"], ["2"]),
    ({"allOf": [{"type": "number", "minimum": 1}, {"type": "integer", "maximum": 3}]}, ["2"], ["2.5", "4"]),
    ({"allOf": [{"pattern": "^a"}, {"pattern": "b$"}], "type": "string"}, ['"ab"', '"acb"'], ['"a"', '"b"']),
    ({"allOf": [{"anyOf": [{"const": 1}, {"const": 2}]}, {"anyOf": [{"const": 2}, {"const": 3}]}]}, ["2"], ["1", "3"]),
    ({"oneOf": [{"maximum": 1, "type": "integer"}, {"exclusiveMinimum": 1, "type": "integer"}]}, ["1", "2"], ['"a"']),
    ({"type": "object", "properties": {}}, ["{}"], ['{"a":1}']),
]  # fmt: skip


@pytest.mark.parametrize(
    ("schema", "good", "bad"), LISTED, ids=[f"{i}-{json.dumps(schema)[:40]}" for i, (schema, _, _) in enumerate(LISTED)]
)
def test_what_a_schema_allows_can_be_written_and_nothing_else(
    model: llama.Model, schema: Schema, good: list[str], bad: list[str]
) -> None:
    assert [text for text in good if not accepts(model, schema, text)] == [], "cannot be written"
    assert [text for text in bad if accepts(model, schema, text)] == [], "can be written"


def test_every_day_of_the_calendar_and_no_other(model: llama.Model) -> None:
    """Byte by byte to "2023-mm-dd" and "2024-mm-dd"."""
    for year in (2023, 2024):
        days = [f'"{year}-{month:02}-{day:02}"' for month in range(14) for day in range(33)]
        real = set()
        for day in days:
            try:
                date.fromisoformat(day.strip('"'))
            except ValueError:
                continue
            real.add(day)
        assert {day for day in days if accepts(model, DATE, day)} == real


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(st.integers(-50, 50), st.floats(-9, 9).map(lambda x: round(x, 3))),
    st.one_of(st.integers(-50, 50), st.floats(-9, 9).map(lambda x: round(x, 3))),
    st.booleans(),
    st.booleans(),
    st.floats(-60, 60).map(lambda x: round(x, 4)),
)
def test_numbers_between_limits_digit_by_digit(
    model: llama.Model, a: float, b: float, open_low: bool, open_high: bool, x: float
) -> None:
    low, high = min(a, b), max(a, b)
    schema = {
        "type": "number",
        "exclusiveMinimum" if open_low else "minimum": low,
        "exclusiveMaximum" if open_high else "maximum": high,
    }
    for value in (x, low, high, low + 0.001, high - 0.001):
        text = f"{round(value, 4):.6f}".rstrip("0").rstrip(".")
        if text == "-0":
            continue
        try:
            written = accepts(model, schema, text)
        except OSError:
            assert low == high
            continue
        assert written == valid(float(text), schema), text


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"type": "object", "properties": {"a": {"type": "string", "pattern": "(?<=x)y"}}}, "#/properties/a"),
        ({"$defs": {"d": {"items": {"if": {}, "then": {}}}}, "$ref": "#/$defs/d"}, "#/$defs/d/items"),
        ({"anyOf": [{"type": "null"}, {"type": "array", "uniqueItems": True}]}, "#/anyOf/1"),
        ({"type": "object", "properties": {"a/b": {"contains": {}}}}, "#/properties/a~1b"),
    ],
)
def test_a_refusal_names_its_place(schema: Schema, place: str) -> None:
    with pytest.raises(OSError, match=re.escape(f"(at {place})")):
        grammar_of(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "((a{0,24}){0,24}){0,24}"},
        {"type": "string", "pattern": "^((a{0,24}){0,24}){0,24}$"},
        {"type": "string", "pattern": "^((a{0,24}b?){0,24}c?){0,24}$"},
        {"type": "string", "pattern": "^(?!((a{0,24}){0,24}){0,24}$).*$"},
        {"type": "string", "pattern": "(((a*b?)*c?)*){0,300}", "maxLength": 500},
        {"oneOf": [{"enum": [f"a{i}" for i in range(9000)]}, {"enum": [f"b{i}" for i in range(9000)]}]},
        {"allOf": [{"anyOf": [{"const": i} for i in range(300)]}, {"anyOf": [{"const": i} for i in range(300)]}]},
        {"type": "string", "pattern": "^" + "(a|b)?" * 300 + "c{300}$", "minLength": 300},
        {"type": "object", "properties": {f"p{i}": {"const": i} for i in range(500)}, "minProperties": 400},
        {"type": "string", "pattern": "^(?=.*a)(?=.*b)(?=.*c)(?=.*d)(?=.*e)(?=.*f)(?=.*g)(?=.*h)(?=.*i)(?=.*j).*$"},
    ],
    ids=lambda schema: json.dumps(schema)[:40],
)
def test_any_schema_is_converted_or_refused_in_about_a_second(model: llama.Model, schema: Schema) -> None:
    codes: set[int | None] = set()

    def do_or_refuse() -> None:
        try:
            guide = Guide(model, grammar_of(schema))
        except OSError as error:
            codes.add(error.errno)
            return
        for _ in range(3):
            ids = [int(token) for token in guide.fitting(np.arange(model.n_vocab)) if guide.allows(int(token))]
            if not ids:
                break
            guide.accept(ids[0])
        guide.close()

    cheap(2.5, do_or_refuse)
    assert codes <= {errno.EINVAL}
