"""Schemas of tools that no grammar can keep: the grammar keeps what it can, and the toolbox checks the rest."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiosd.llm import llama
from aiosd.llm.chat import loose_tools, normal_tools
from aiosd.llm.dialects import DEEPSEEK, GLM, HERMES, MISTRAL_ARGS, QWEN_XML, call_rules
from aiosd.llm.schema import Converter, Schema, grammar_of
from aiosd.llm.structured import Guide
from tests import tinymodels
from tests.conftest import System


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[llama.Model]:
    llama.start()
    path: Path = tinymodels.write(
        tmp_path_factory.mktemp("gguf") / "tiny.gguf", d=8, layers=1, heads=1, kv_heads=1, ff=8
    )
    model = llama.Model(str(path), 0, lambda fraction: None)
    yield model
    model.close()


def accepts(model: llama.Model, gbnf: str, value: Any) -> bool:
    guide = Guide(model, gbnf)
    try:
        tokens = [model.pieces.index(bytes([byte])) for byte in json.dumps(value).encode()]
        return guide.follow(tokens) and guide.can_end
    finally:
        guide.close()


def with_a(schema: Schema) -> dict[str, Any]:
    """Arguments with one property of this schema and one of another."""
    return {
        "type": "object",
        "properties": {"a": schema, "n": {"type": "integer"}},
        "required": ["a", "n"],
        "additionalProperties": False,
    }


PROPERTIES: list[tuple[Schema, list[Any], list[Any]]] = [
    # schemas that no grammar keeps, values that must remain possible, values that are still refused
    ({"type": "string", "pattern": r"(?<!x)y"}, ["y", "free"], [1, None]),
    ({"type": "string", "pattern": r"\bword\b", "maxLength": 8}, ["a word b"], [1, "more than eight characters"]),
    ({"type": "string", "pattern": r"(a)\1"}, ["aa"], [[]]),
    ({"type": "string", "pattern": "(", "minLength": 2}, ["ab"], [{}, "a"]),
    ({"type": "integer", "multipleOf": 7, "minimum": 0}, [7, 12], [-1, "7", 1.5]),
    ({"type": "number", "multipleOf": 0.03, "minimum": 0, "maximum": 1000}, [0.06, 1.01], [-1, 1001, "x"]),
    ({"type": "string", "not": {"pattern": "^a"}}, ["b", "a"], [1]),
    ({"type": "array", "items": {"type": "string"}, "uniqueItems": True}, [["a", "b"], ["a", "a"]], [[1], "a"]),
    ({"type": "array", "items": {"type": "integer"}, "contains": {"const": 3}}, [[3], []], [["a"]]),
    ({"type": "object", "properties": {"x": {"type": "integer"}}, "dependentRequired": {"x": ["y"]},
      "additionalProperties": {"type": "integer"}}, [{"x": 1, "y": 2}, {"x": 1}], [{"x": "1"}]),
    ({"type": "object", "patternProperties": {"^s": {"type": "string"}, "^i": {"type": "integer"}},
      "additionalProperties": False}, [{"s1": "a", "i1": 1}, {}], [[], 3]),
    ({"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False,
      "if": {"properties": {"x": {"const": 1}}}, "then": {"required": ["x"]}}, [{"x": 1}], [{"x": "1"}, {}]),
    ({"oneOf": [{"type": "string", "maxLength": 5}, {"type": "string", "minLength": 3}]}, ["abc", "a"], [1]),
    ({"allOf": [{"type": "integer", "multipleOf": 4}, {"multipleOf": 6, "minimum": 0}]}, [12, 4], []),
    ({"type": "string", "minLength": 3_000_000}, ["short"], [1]),
    ({"$ref": "#/$defs/missing"}, ["anything", 1], []),
    ({"type": ["string", "null"], "pattern": "(?<=a)b"}, [None, "ab"], [1]),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "possible", "refused"), PROPERTIES, ids=lambda value: json.dumps(value)[:50])
def test_what_no_grammar_can_keep_is_dropped_and_the_rest_kept(
    model: llama.Model, schema: Schema, possible: list[Any], refused: list[Any]
) -> None:
    whole = with_a(schema)
    with pytest.raises(OSError, match="at #/"):  # for an answer under a schema
        grammar_of(whole)
    gbnf = grammar_of(whole, loose=True)
    for value in possible:
        assert accepts(model, gbnf, {"a": value, "n": 1}), value
    for value in refused:
        assert not accepts(model, gbnf, {"a": value, "n": 1}), value
    assert not accepts(model, gbnf, {"a": possible[0], "n": "1"})
    assert not accepts(model, gbnf, {"a": possible[0]})


def test_a_schema_that_a_grammar_can_keep_is_kept_whole() -> None:
    schema = with_a({"type": "string", "pattern": "^(?=.*x)[a-z]+$", "maxLength": 9})
    assert grammar_of(schema, loose=True) == grammar_of(schema)


def test_a_recursive_schema_is_projected_everywhere(model: llama.Model) -> None:
    tree = {"type": "object", "properties": {"name": {"type": "string", "pattern": r"\Ba"},
                                             "kids": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
            "required": ["name"], "additionalProperties": False}  # fmt: skip
    gbnf = grammar_of({"$ref": "#/$defs/tree", "$defs": {"tree": tree}}, loose=True)
    assert accepts(model, gbnf, {"name": "a", "kids": [{"name": "b"}]})
    assert not accepts(model, gbnf, {"name": "a", "kids": [{"name": 1}]})


HUGE = {"type": "object", "properties": {"a": {"anyOf": [{"const": i} for i in range(60_000)]}}, "required": ["a"]}
BAD = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?<!x)y"}}, "required": ["a"]}


def tool(name: str, parameters: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


@pytest.mark.parametrize("dialect", [HERMES, MISTRAL_ARGS, QWEN_XML, GLM, DEEPSEEK], ids=lambda dialect: dialect.name)
def test_one_tool_does_not_keep_others_from_being_offered(dialect: Any) -> None:
    good = with_a({"type": "string", "maxLength": 3})
    impossible = {"type": "object", "properties": {"a": False}, "required": ["a"]}
    unlike = {**good, "minProperties": 1, "not": {"required": ["n", "a"]}}
    given = [tool("huge", HUGE, strict=False), tool("bad", BAD, strict=False), tool("never", impossible, strict=False),
             tool("unlike", unlike, strict=False), tool("good", good)]  # fmt: skip
    converter = Converter()
    rules = call_rules(dialect, normal_tools(given), converter, loose_tools(given))
    assert all(name in rules for name in ("huge", "bad", "never", "unlike", "good"))
    with pytest.raises(OSError, match=r"tools\[1\].parameters: pattern"):
        call_rules(dialect, normal_tools([tool("good", good), tool("bad", BAD)]), Converter())


def test_the_prompt_does_not_show_how_arguments_are_checked() -> None:
    given = [tool("a", BAD, strict=False), tool("b", BAD, strict=True), tool("c", BAD)]
    assert loose_tools(given) == {"a"}
    assert all("strict" not in one["function"] for one in normal_tools(given))


words = st.sampled_from(["a", "ab", "x", "", "word"])
values = st.recursive(words | st.integers(-20, 20), lambda inner: st.lists(inner, max_size=3), max_leaves=4)


@settings(max_examples=60, deadline=None)
@given(
    st.fixed_dictionaries({"type": st.sampled_from(["string", "integer", "array"])}, optional={
        "pattern": st.sampled_from(["(?<!x)y", "^a", "("]),
        "not": st.sampled_from([{"type": "string"}, {"pattern": "^a"}, {"const": 1}]),
        "multipleOf": st.sampled_from([2, 7, 0.3]), "uniqueItems": st.just(True), "maxLength": st.integers(0, 3),
        "minimum": st.integers(-5, 5), "contains": st.just({"const": 1}),
        "enum": st.lists(values, min_size=1, max_size=3),
        "oneOf": st.just([{"type": "string"}, {"maxLength": 2}]),
    }),
    values,
)  # fmt: skip
def test_every_valid_value_can_be_written(model: llama.Model, schema: Any, value: Any) -> None:
    import jsonschema_rs

    try:
        if not jsonschema_rs.validator_for(schema).is_valid(value):
            return
    except ValueError:
        return
    assert accepts(model, grammar_of(schema, loose=True), value)


FILE = '''
from typing import Annotated, Any
from msgspec import Meta
from libaios.tool import define

Code = Annotated[str, Meta(pattern="^(?!secret)\\\\w+\\\\b")]

@define
def even(number: Annotated[int, Meta(multiple_of=7, ge=0)], code: Code) -> str:
    """Takes what no grammar can express."""
    return f"{number} {code}"
'''


def test_a_chat_offers_such_a_tool_and_its_call_is_checked(fresh_aiosd: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FILE)
    (tmp_path / "agent.py").write_text(
        "import libaios as aios\n"
        "asked = [{'role': 'user', 'content': 'go'}]\n"
        "made = aios.llm.chat(asked, tools=['even'], tool_choice='required', temperature=0.0, max_tokens=60)\n"
        "print(made.tool_calls[0].name if made.tool_calls else made.finish_reason)\n"
        "for n, code in ((14, 'x'), (15, 'x'), (14, 'secrets')):\n"
        "    try: print(aios.tool.call('even', number=n, code=code))\n"
        "    except OSError as err: print(err.strerror.partition(' ')[0])\n"
        "shape = aios.tool.schema('even')\n"
        "try: aios.llm.chat(asked, schema=shape)\n"
        "except OSError as err: print(err.strerror)\n"
    )
    system: System = fresh_aiosd("--tools", str(tmp_path / "mine.py"), "--threads", "1")
    done = system.run("aios-run", str(tmp_path / "agent.py"))
    assert done.stderr == ""
    assert done.stdout.splitlines()[0] in ("even", "length")
    assert done.stdout.splitlines()[1:4] == ["14 x", "even.number:", "even.code:"]
    assert done.stdout.splitlines()[4].startswith("schema: ")
    assert "#/properties/" in done.stdout.splitlines()[4]
