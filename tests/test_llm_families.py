"""Chat models of the known families: what the prompt looks like, how their tool calls come back, what they refuse.

Each family is a tiny random model with that family's special tokens, kind of tokenizer and chat template
(`tinymodels.FAMILIES`).
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aiosd.ipc.link import Submit
from aiosd.llm import llama
from aiosd.llm.chat import ChatTemplate, normal_messages, normal_tools
from aiosd.llm.dialects import nine_characters
from aiosd.llm.request import Requests
from aiosd.llm.sequence import Sequence
from libaios.parts import Splitter
from libaios.wire import Generate, Sampling
from tests import tinymodels
from tests.tinymodels import FAMILIES

TOOL = {
    "name": "weather",
    "description": "What is the weather?",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 8}, "unit": {"enum": ["C", "F"]}},
        "required": ["city", "unit"],
    },
}
S = {"role": "system", "content": "Be brief."}
U = {"role": "user", "content": "Hello?"}
A = {"role": "assistant", "content": "Yes."}
V = {"role": "user", "content": "And now?"}


def call(city: str = "Rome", id_: str | None = None) -> dict[str, Any]:
    one = {"name": "weather", "arguments": {"city": city, "unit": "C"}}
    return {"id": id_, **one} if id_ else one


def calling(*calls: dict[str, Any], content: str | None = None) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def result(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, **more}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, llama.Model]]:
    llama.start()
    folder: Path = tmp_path_factory.mktemp("families")
    made = {}
    for name in FAMILIES:
        path = tinymodels.write_family(folder / f"{name}.gguf", name)
        made[name] = llama.Model(str(path), 0, lambda fraction: None)
    yield made
    for model in made.values():
        model.close()


def template(name: str) -> ChatTemplate:
    family = FAMILIES[name]
    return ChatTemplate(family.template, family.bos, family.eos)


def rendered(name: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, **more: Any) -> str:
    return template(name).render(normal_messages(messages), normal_tools(tools), **more)


def sequence(model: llama.Model, **request: Any) -> Sequence:
    return Requests(model, 4096).sequence(Submit((1, 1), Generate(sampling=Sampling(), **request)), 1, 0.0)


def written(model: llama.Model, tokens: Any) -> str:
    """Tokens as text, with control tokens."""
    return "".join(model.token_text(int(token)) for token in tokens)


# ── prompts ───────────────────────────────────────────────────────────────────────────────────────────────

HEAD = "<|start_header_id|>%s<|end_header_id|>\n\n"
PLAIN = {
    "llama3.1": "<|begin_of_text|>" + HEAD % "system" + "Today Date: 26 Jul 2024\n\nBe brief.<|eot_id|>" + HEAD % "user"
    + "Hello?<|eot_id|>" + HEAD % "assistant" + "Yes.<|eot_id|>" + HEAD % "user" + "And now?<|eot_id|>"
    + HEAD % "assistant",
    "mistral-v0.1": "<s>[INST] Be brief.\n\nHello? [/INST]Yes.</s> [INST] And now? [/INST]",
    "mistral-v0.3": "<s>[INST] Be brief.\n\nHello?[/INST] Yes.</s>[INST] And now?[/INST]",
    "mistral-v13": "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]Hello?[/INST]Yes.</s>[INST]And now?[/INST]",
    "qwen2.5": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello?<|im_end|>\n"
    "<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n",
    "gemma2": "<bos><start_of_turn>user\nBe brief.\n\nHello?<end_of_turn>\n<start_of_turn>model\nYes.<end_of_turn>\n"
    "<start_of_turn>user\nAnd now?<end_of_turn>\n<start_of_turn>model\n",
}  # fmt: skip
PLAIN["qwen3"], PLAIN["gemma3"] = PLAIN["qwen2.5"], PLAIN["gemma2"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_conversation_with_a_system_message(name: str) -> None:
    assert rendered(name, [S, U, A, V]) == PLAIN[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_become_tokens_and_markers_control_tokens(name: str, models: dict[str, llama.Model]) -> None:
    model, family = models[name], FAMILIES[name]
    tokens = sequence(model, messages=[S, U, A, V]).prompt
    text = written(model, tokens)
    assert text.replace(" ", "") == PLAIN[name].replace(" ", ""), "SentencePiece adds blanks, and nothing else"
    controls = [model.token_text(int(token)) for token in tokens if model.control[token]]
    assert controls == re.findall("|".join(map(re.escape, family.control)), PLAIN[name])
    assert model.adds_bos == (tokens[0] == model.bos)
    assert controls.count(family.bos) == family.add_bos


@pytest.mark.parametrize("name", FAMILIES)
def test_a_conversation_with_a_system_message_alone(name: str) -> None:
    """Without a system role it becomes a message of the user."""
    assert "Be brief." in rendered(name, [S])


@pytest.mark.parametrize("name", ["mistral-v0.1", "mistral-v0.3", "gemma2", "gemma3"])
@pytest.mark.parametrize("messages", [[A, U], [A, A, U]], ids=["model first", "model first and twice"])
def test_roles_that_do_not_alternate_are_refused_with_the_templates_error(
    name: str, messages: list[dict[str, Any]], models: dict[str, llama.Model]
) -> None:
    with pytest.raises(OSError, match=r"refuses them: .*roles must alternate") as caught:
        sequence(models[name], messages=messages)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=25, deadline=None)
@example(
    messages=[
        {"role": "system", "content": None, "tool_calls": [call(), call("Oslo", "x")]},
        {"role": "tool", "content": None, "tool_calls": [call()]},
    ],
    tools=None,
)
@given(
    messages=st.lists(
        st.builds(
            lambda role, content, calls, more: {"role": role, "content": content, **calls, **more},
            st.sampled_from(["system", "user", "assistant", "tool", "model", ""]),
            st.sampled_from([None, "", "text", [{"type": "text", "text": "x"}], [], 7, {"a": 1}]),
            st.sampled_from(
                [{}, {"tool_calls": [call()]}, {"tool_calls": [call(), call("Oslo", "x")]}, {"tool_calls": 3}]
            ),
            st.sampled_from([{}, {"tool_call_id": "x"}, {"tool_call_id": 5}, {"name": "weather"}, {"name": None}]),
        ),
        max_size=6,
    ),
    tools=st.sampled_from([None, [TOOL]]),
)
def test_any_messages_are_rendered_or_refused(name: str, messages: list[dict[str, Any]], tools: Any) -> None:
    try:
        outcome: str | OSError = rendered(name, messages, tools)
    except OSError as error:
        outcome = error
    assert isinstance(outcome, str) or (outcome.errno == errno.EINVAL and outcome.strerror)


# ── what messages quote ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", FAMILIES)
def test_quoted_control_tokens_stay_text_wherever_they_stand(name: str, models: dict[str, llama.Model]) -> None:
    model = models[name]
    attack = "".join(FAMILIES[name].control)

    def controls(word: str) -> list[int]:
        tool = {**TOOL, "description": f"d{word}", "parameters": {**TOOL["parameters"], "title": f"t{word}"}}
        messages = [
            {"role": "system", "content": f"s{word}"},
            {"role": "user", "content": f"u{word}"},
            calling(call(f"city{word}", "abcdefghi"), content=f"a{word}" if name != "mistral-v0.3" else ""),
            result(f"r{word}", tool_call_id="abcdefghi"),
            {"role": "assistant", "content": f"b{word}"},
            {"role": "user", "content": f"v{word}"},
        ]
        tokens = sequence(model, messages=messages, tools=[tool]).prompt
        return [int(token) for token in tokens if model.control[token]]

    assert controls(attack) == controls("harmless")


@pytest.mark.parametrize("name", FAMILIES)
def test_quoted_control_tokens_can_be_read(name: str, models: dict[str, llama.Model]) -> None:
    model = models[name]
    tokens = sequence(model, messages=[{"role": "user", "content": f"look: {FAMILIES[name].eos}!"}]).prompt
    seen = model.detokenize([int(token) for token in tokens if not model.control[token]]).decode()
    assert f"look:{FAMILIES[name].eos}!" in seen.replace(" ", "")


# ── tools ─────────────────────────────────────────────────────────────────────────────────────────────────

DIALECTS = {
    "llama3.1": "llama3", "mistral-v0.1": "fenced", "mistral-v0.3": "mistral", "mistral-v13": "mistral-args",
    "qwen2.5": "hermes", "qwen3": "hermes", "gemma2": "fenced", "gemma3": "fenced",
}  # fmt: skip
ROME, OSLO = '{"city": "Rome", "unit": "C"}', '{"city": "Oslo", "unit": "C"}'


def test_every_family_has_its_dialect() -> None:
    assert {name: template(name).dialect.name for name in FAMILIES} == DIALECTS
    assert {name for name in FAMILIES if not template(name).takes_tools} == {"mistral-v0.1", "gemma2", "gemma3"}


@pytest.mark.parametrize("name", FAMILIES)
def test_tools_are_in_the_prompt(name: str) -> None:
    text = rendered(name, [S, U], [TOOL])
    assert "weather" in text
    assert "What is the weather?" in text
    assert text.count("Be brief.") == 1


CALL_AND_RESULT = {
    "llama3.1": HEAD % "assistant" + f'{{"name": "weather", "parameters": {ROME}}}<|eot_id|>' + HEAD % "ipython"
    + '"18 degrees"<|eot_id|>' + HEAD % "assistant",
    "mistral-v0.1": '[/INST]```tool_call\n{"name": "weather", "parameters": ' + ROME
    + "}\n```</s> [INST] Result of weather:\n18 degrees [/INST]",
    "mistral-v0.3": f'[TOOL_CALLS] [{{"name": "weather", "arguments": {ROME}, "id": "ID"}}]</s>'
    '[TOOL_RESULTS] {"content": 18 degrees, "call_id": "ID"}[/TOOL_RESULTS]',
    "mistral-v13": f"[TOOL_CALLS]weather[ARGS]{ROME}</s>[TOOL_RESULTS]18 degrees[/TOOL_RESULTS]",
    "qwen2.5": f'<tool_call>\n{{"name": "weather", "arguments": {ROME}}}\n</tool_call><|im_end|>\n<|im_start|>user\n'
    "<tool_response>\n18 degrees\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
    "gemma2": '<start_of_turn>model\n```tool_call\n{"name": "weather", "parameters": ' + ROME + "}\n```<end_of_turn>\n"
    "<start_of_turn>user\nResult of weather:\n18 degrees<end_of_turn>\n<start_of_turn>model\n",
}  # fmt: skip
CALL_AND_RESULT["qwen3"], CALL_AND_RESULT["gemma3"] = CALL_AND_RESULT["qwen2.5"], CALL_AND_RESULT["gemma2"]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("id_", [None, "call_0123456789abcdef01", "123456789"], ids=["no id", "our id", "nine"])
def test_a_call_and_its_result(name: str, id_: str | None) -> None:
    named = {"tool_call_id": id_} if id_ else {}
    text = rendered(name, [S, U, calling(call("Rome", id_)), result("18 degrees", **named)], [TOOL])
    assert "Be brief." in text
    ids = re.findall(r'"(?:call_)?id": "(\w*)"', text)
    assert len(set(ids)) <= 1, "the result names its call"
    assert all(len(one) == 9 for one in ids)
    assert text.endswith(CALL_AND_RESULT[name].replace("ID", ids[0] if ids else ""))
    if id_ == "123456789" and ids:
        assert ids[0] == id_


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("named", [True, False], ids=["named", "in order"])
def test_several_calls_in_one_message_and_their_results(name: str, named: bool) -> None:
    ids = ["first-call", "second-call"]
    results = [result("cold", tool_call_id=ids[1]), result("warm", tool_call_id=ids[0])]
    if not named:
        results = [result("warm"), result("cold")]
    calls = [call(city, id_ if named else None) for city, id_ in zip(("Rome", "Oslo"), ids, strict=True)]
    text = rendered(name, [U, calling(*calls), *results], [TOOL])
    assert text.index("Rome") < text.index("Oslo")
    assert text.count("warm") == text.count("cold") == 1
    if name == "llama3.1":  # one call at a time, each followed by its result
        assert [text.index(word) for word in ("Rome", "warm", "Oslo", "cold")] == sorted(
            text.index(word) for word in ("Rome", "warm", "Oslo", "cold")
        )
    if name == "mistral-v0.3":
        made = re.findall(r'"id": "(\w{9})"', text)
        assert len(set(made)) == 2
        assert re.findall(r'"content": (\w+), "call_id": "(\w{9})"', text) == (
            [("cold", made[1]), ("warm", made[0])] if named else [("warm", made[0]), ("cold", made[1])]
        )
    if not template(name).takes_tools:  # roles alternate, so results of tools become one message
        assert text.endswith((rendered(name, [U])[-12:], "[/INST]"))


def test_what_the_user_says_after_a_result_still_alternates() -> None:
    text = rendered("gemma3", [U, calling(call()), result("warm", name="weather"), V], [TOOL])
    assert "Result of weather:\nwarm\n\nAnd now?<end_of_turn>" in text


@given(st.text(max_size=20))
def test_ids_of_nine_characters(word: str) -> None:
    assert re.fullmatch("[0-9A-Za-z]{9}", nine_characters(word))
    assert nine_characters(nine_characters(word)) == nine_characters(word)


# ── generated calls ───────────────────────────────────────────────────────────────────────────────────────

#: The beginning of a forced call, and the part of it that is shown as text.
BEGINS = {
    "llama3.1": ['{"name": "weather", "parameters": ', "<|python_tag|>"],
    "mistral-v0.1": ["```tool_call\n"],
    "mistral-v0.3": ["[TOOL_CALLS]"],
    "mistral-v13": ["[TOOL_CALLS]"],
    "qwen2.5": ["<tool_call>", "<tool_call>\n{"],
    "qwen3": ["<think>\nIs <tool_call> right?\n</think>\n\n<tool_call>"],
    "gemma2": ["```tool_call\n", '```tool_call\n{"name'],
    "gemma3": ["```tool_call"],
}


def generate(
    model: llama.Model, begin: str, seed: int, closing: str = "", **request: Any
) -> tuple[Sequence, list[int]]:
    """Random tokens, without a model, under the constraint and after `begin`, until the text may end."""
    made = sequence(model, messages=[U], given=model.tokenize(begin, bos=False, special=True), **request)
    assert made.constraint is not None
    rng = np.random.default_rng(seed)
    for _ in range(1500):
        row = rng.standard_normal(model.n_vocab).astype(np.float32)
        row[list(model.end_tokens)] += 6.0  # or the text would become long
        if closing and made.text.inside:
            row[model.tokenize(closing, bos=False, special=True)] += 3.0
        token = made.constraint.settle(made.text, row, int(row.argmax()), lambda logits: int(logits.argmax()))
        if token < 0 or token in model.end_tokens:
            break
        made.out.append(token)
        made.text.feed(model.pieces[token])
    made.text.finish()
    made.constraint.close()
    return made, made.out


@pytest.mark.parametrize(("name", "begin"), [(name, begin) for name in BEGINS for begin in BEGINS[name]])
@pytest.mark.parametrize("seed", range(3))
def test_what_follows_the_beginning_of_a_call_is_a_call(
    name: str, begin: str, seed: int, models: dict[str, llama.Model]
) -> None:
    made, _ = generate(models[name], begin, seed, tools=[TOOL])
    assert made.text.triggered
    assert made.dialect is not None
    calls = made.dialect.read(made.text.rest, (1, 1))
    assert calls
    for one in calls:
        assert one.name == "weather"
        assert set(one.arguments) == {"city", "unit"}
        assert len(one.arguments["city"]) <= 8
        assert one.arguments["unit"] in ("C", "F")
    assert len({one.id for one in calls}) == len(calls)


@pytest.mark.parametrize("name", FAMILIES)
def test_several_calls_that_were_generated_are_read(name: str, models: dict[str, llama.Model]) -> None:
    model = models[name]
    text = {
        "llama3": '{"name": "weather", "parameters": ROME}; {"name": "weather", "parameters": OSLO}',
        "mistral": '[TOOL_CALLS][{"name": "weather", "arguments": ROME, "id": "aaaaaaaa1"}, '
        '{"name": "weather", "arguments": OSLO, "id": "aaaaaaaa2"}]',
        "mistral-args": "[TOOL_CALLS]weather[ARGS]ROME[TOOL_CALLS]weather[ARGS]OSLO",
        "hermes": '<tool_call>\n{"name": "weather", "arguments": ROME}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": OSLO}\n</tool_call>',
        "fenced": '```tool_call\n{"name": "weather", "parameters": ROME}\n```\n'
        '```tool_call\n{"name": "weather", "parameters": OSLO}\n```',
    }[DIALECTS[name]]
    tokens = model.tokenize(text.replace("ROME", ROME).replace("OSLO", OSLO), bos=False, special=True)
    made = sequence(model, messages=[U], tools=[TOOL], given=tokens)
    made.text.finish()
    assert made.dialect is not None
    calls = made.dialect.read(made.text.rest, (1, 1))
    assert [one.arguments["city"] for one in calls] == ["Rome", "Oslo"]
    if name == "mistral-v0.3":
        assert [one.id for one in calls] == ["aaaaaaaa1", "aaaaaaaa2"], "the model's own ids go back into its prompt"
    assert made.constraint is not None
    made.constraint.close()


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_that_fit_no_tool_are_refused(name: str, models: dict[str, llama.Model]) -> None:
    begin = BEGINS[name][-1]
    tail = 'storm[ARGS]{"city"' if DIALECTS[name] == "mistral-args" else '{"name": "storm"'
    tokens = models[name].tokenize(begin.removesuffix('{"name').rstrip("{") + tail, bos=False, special=True)
    with pytest.raises(OSError, match="do not fit the tools"):
        sequence(models[name], messages=[U], tools=[TOOL], given=tokens)


# ── thoughts ──────────────────────────────────────────────────────────────────────────────────────────────


def test_thoughts_of_past_turns_are_left_out_and_those_of_this_turn_kept() -> None:
    thinking = "<think>\nhm\n</think>\n\n"
    past = {"role": "assistant", "content": f"{thinking}Yes."}
    assert "hm" not in rendered("qwen3", [U, past, V])
    text = rendered("qwen3", [U, calling(call(), content=thinking), result("warm")], [TOOL])
    assert "<think>\nhm\n</think>\n\n<tool_call>" in text


def test_with_a_schema_there_is_no_place_for_thoughts(models: dict[str, llama.Model]) -> None:
    model = models["qwen3"]

    def end(**request: Any) -> str:
        made = sequence(model, messages=[U], **request)
        if made.constraint is not None:
            made.constraint.close()
        return written(model, made.prompt)[-40:]

    assert end(schema={"type": "object"}).endswith("<think>\n\n</think>\n\n")
    assert end().endswith("assistant\n")


def test_thoughts_that_the_prompt_begins() -> None:
    """With QwQ and DeepSeek R1 the prompt ends with the beginning of the thoughts."""
    source = "{% for m in messages %}{{ m.content }}{% endfor %}{{ '<think>\\n' }}"
    assert ChatTemplate(source, "", "").render([U], None) == "Hello?<think>\n"
    assert ChatTemplate(source, "", "").render([U], None, thinking=False) == "Hello?<think>\n\n</think>\n\n"


def test_a_call_within_thoughts_is_no_call(models: dict[str, llama.Model]) -> None:
    text = f'<think>\n<tool_call>{{"name": "weather", "arguments": {ROME}}}</tool_call>'
    tokens = models["qwen3"].tokenize(text, bos=False, special=True)
    made = sequence(models["qwen3"], messages=[U], tools=[TOOL], given=tokens)
    assert not made.text.triggered
    made.text.finish()
    assert made.text.shown == len(text.removeprefix("<think>\n")) + 1, "all of it is reasoning"


# ── templates that cannot ─────────────────────────────────────────────────────────────────────────────────


def test_arguments_as_text_for_templates_that_need_it() -> None:
    source = (
        "{{ tools | length }}{% for t in tools %}{{ t.function.name }}{% endfor %}{% for m in messages %}"
        "{{ '|' + m.role + ':' + m.content }}{% for c in m.tool_calls or [] %}"
        "{{ '<tool_call>' + '{\"name\": \"' + c.function.name + '\", \"arguments\": ' + c.function.arguments + '}' }}"
        "{% endfor %}{% endfor %}"
    )
    made = ChatTemplate(source, "", "")
    assert (made.takes_tools, made.can.objects, made.can.no_tools) == (True, False, [])
    text = made.render(normal_messages([U, calling(call())]), normal_tools([TOOL]))
    assert text == f'1weather|user:Hello?|assistant:<tool_call>{{"name": "weather", "arguments": {ROME}}}'


def test_tools_are_described_where_a_template_writes_calls_in_an_unknown_way() -> None:
    source = (
        "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{% for m in messages %}{{ m.role + m.content }}"
        "{% for c in m.tool_calls or [] %}<function={{ c.function.name }}>{% endfor %}{% endfor %}"
    )
    made = ChatTemplate(source, "", "")
    assert (made.takes_tools, made.dialect.name) == (False, "fenced")
    text = made.render(normal_messages([U, calling(call()), result("warm")]), normal_tools([TOOL]))
    assert text.startswith("systemYou can call functions.")
    assert "<function=" not in text
    described = next(line for line in text.splitlines() if line.startswith('{"description"'))
    assert json.JSONDecoder().raw_decode(described)[0]["name"] == "weather"


# ── families whose calls are tags, or whose answers have parts ────────────────────────────────────────────

NEWER_DIALECTS = {
    "qwen3-coder": "qwen-xml", "glm-4.5": "glm", "deepseek-v3.1": "deepseek", "deepseek-r1": "deepseek-r1",
    "gpt-oss": "harmony", "smollm2": "fenced",
}  # fmt: skip
RICH = {
    "name": "weather",
    "description": "What is the weather?",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 8},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
            "unit": {"enum": ["C", "F"]},
            "note": {"type": "string", "maxLength": 20},
        },
        "required": ["city", "days"],
    },
}
#: Two calls as each family writes them; the arguments of the second contain quoted marks.
TWO_CALLS = {
    "qwen3-coder": "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n3\n"
    "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n4\n"
    "</parameter>\n<parameter=note>\na \"b\"\n<c>\n</parameter>\n</function>\n</tool_call>",
    "glm-4.5": "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n<arg_key>days</arg_key>\n"
    "<arg_value>3</arg_value>\n</tool_call>\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>4</arg_value>\n<arg_key>note</arg_key>\n<arg_value>a \"b\"\n<c></arg_value>\n"
    "</tool_call>",
    "deepseek-v3.1": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>ROME<｜tool▁call▁end｜>"
    "<｜tool▁call▁begin｜>weather<｜tool▁sep｜>OSLO<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek-r1": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\nROME\n```"
    "<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\nOSLO\n```<｜tool▁call▁end｜>"
    "<｜tool▁calls▁end｜>",
    "gpt-oss": "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>ROME",
    "smollm2": '```tool_call\n{"name": "weather", "parameters": ROME}\n```\n```tool_call\n{"name": "weather", '
    '"parameters": OSLO}\n```',
}  # fmt: skip
CALL_ROME = {"city": "Rome", "days": 3}
CALL_OSLO = {"city": "Oslo", "days": 4, "note": 'a "b"\n<c>'}


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, llama.Model]]:
    llama.start()
    folder: Path = tmp_path_factory.mktemp("newer")
    made = {}
    for name in tinymodels.NEWER:
        path = tinymodels.write_family(folder / f"{name}.gguf", name)
        made[name] = llama.Model(str(path), 0, lambda fraction: None)
    yield made
    for model in made.values():
        model.close()


def two_calls(name: str) -> str:
    return TWO_CALLS[name].replace("ROME", json.dumps(CALL_ROME)).replace("OSLO", json.dumps(CALL_OSLO))


def shown(made: Sequence) -> tuple[str, str, list[Any]]:
    made.text.finish()
    return Splitter().split(made.text.take())


def fed(model: llama.Model, text: str, **request: Any) -> Sequence:
    """A generation that has produced this text, of which nothing was read yet."""
    tokens = model.tokenize(text, bos=False, special=True)
    made = sequence(model, messages=[U], given=tokens, **request)
    made.text = made.new_text()
    for token in tokens:
        made.text.feed(model.pieces[token])
    if made.constraint is not None:
        made.constraint.close()
    return made


@pytest.mark.parametrize("name", NEWER_DIALECTS)
def test_newer_families_have_their_dialects(name: str, newer: dict[str, llama.Model]) -> None:
    assert Requests(newer[name], 4096).template.dialect.name == NEWER_DIALECTS[name]


@pytest.mark.parametrize("name", NEWER_DIALECTS)
def test_calls_of_newer_families_are_read(name: str, newer: dict[str, llama.Model]) -> None:
    before = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant" if name == "gpt-oss" else ""
    before = "hm</think>" if name.startswith("deepseek") else before
    made = fed(newer[name], before + two_calls(name), tools=[RICH])
    assert made.text.triggered
    assert made.dialect is not None
    calls = made.dialect.read(made.text.rest, (1, 1))
    expected = [CALL_ROME] if name == "gpt-oss" else [CALL_ROME, CALL_OSLO]
    assert [(one.name, one.arguments) for one in calls] == [("weather", arguments) for arguments in expected]
    assert shown(made) == ("", "hm" if before else "", [])


@pytest.mark.parametrize("name", NEWER_DIALECTS)
@pytest.mark.parametrize("seed", range(2))
def test_a_call_that_must_come_is_one(name: str, seed: int, newer: dict[str, llama.Model]) -> None:
    """The grammar forces the trigger, too, after the end of thoughts."""
    before = "hm</think>" if name.startswith("deepseek") else ""
    made, _ = generate(newer[name], before, seed, tools=[RICH], tool_choice="required", parallel_tool_calls=False)
    assert made.dialect is not None
    calls = made.dialect.read(made.text.rest, (1, 1))
    assert len(calls) == 1
    assert set(calls[0].arguments) >= {"city", "days"}
    assert len(calls[0].arguments["city"]) <= 8
    assert 1 <= calls[0].arguments["days"] <= 9


@pytest.mark.parametrize("name", FAMILIES)
def test_a_call_may_be_required_named_or_forbidden(name: str, models: dict[str, llama.Model]) -> None:
    other = {"name": "other", "parameters": {"type": "object", "properties": {}}}
    for choice, names in (("required", {"weather", "other"}), ({"function": {"name": "other"}}, {"other"})):
        for seed in range(3):
            made, _ = generate(models[name], "", seed, tools=[TOOL, other], tool_choice=choice)
            assert made.dialect is not None
            calls = made.dialect.read(made.text.rest, (1, 1))
            assert calls
            assert {one.name for one in calls} <= names
            assert all(one.arguments == {} for one in calls if one.name == "other")
    for begin in BEGINS[name]:
        with pytest.raises(OSError, match="do not fit the tools"):
            fed(models[name], begin, tools=[TOOL], tool_choice="none")


@pytest.mark.parametrize(
    ("choice", "said"),
    [("never", "must be auto"), ({"function": {"name": "x"}}, "'x' is not among"), ("required", "no tools")],
)
def test_choices_that_cannot_be(choice: Any, said: str, models: dict[str, llama.Model]) -> None:
    tools = None if choice == "required" else [TOOL]
    with pytest.raises(OSError, match=said):
        sequence(models["qwen3"], messages=[U], tools=tools, tool_choice=choice)


@pytest.mark.parametrize("name", [*FAMILIES, *NEWER_DIALECTS])
def test_an_answer_in_json_is_an_answer(
    name: str, models: dict[str, llama.Model], newer: dict[str, llama.Model]
) -> None:
    """Text that begins with a brace is no call while tools are offered; a call has the form of the model's calls."""
    before = "hm</think>" if name.startswith("deepseek") else "<|channel|>final<|message|>" if name == "gpt-oss" else ""
    delete = {"name": "delete_all_files", "parameters": {"type": "object", "properties": {}}}
    for text in (
        '{"city": "Madrid"}',
        '{"name": "Madrid", "parameters": {}}',
        '```json\n{"a": 1}\n```',
        '{"name": "del',
    ):
        made = fed({**models, **newer}[name], before + text, tools=[delete])
        assert not made.text.triggered
        assert shown(made)[0].removeprefix(" ") == text, "SentencePiece begins with a blank"


@pytest.mark.parametrize(
    "name", ["qwen2.5", "mistral-v13", "llama3.1", "deepseek-v3.1", "deepseek-r1", "gpt-oss", "smollm2"]
)
def test_calls_are_shown_while_they_are_written(
    name: str, models: dict[str, llama.Model], newer: dict[str, llama.Model]
) -> None:
    text = {
        "qwen2.5": f'Well.\n<tool_call>\n{{"name": "weather", "arguments": {ROME}}}\n</tool_call>\n<tool_call>\n'
        f'{{"name": "weather", "arguments": {OSLO}}}\n</tool_call>',
        "mistral-v13": f"Well.[TOOL_CALLS]weather[ARGS]{ROME}[TOOL_CALLS]weather[ARGS]{OSLO}",
        "llama3.1": f'{{"name": "weather", "parameters": {ROME}}}; {{"name": "weather", "parameters": {OSLO}}}',
    }.get(name) or ("hm</think>" if "deepseek" in name else "") + TWO_CALLS[name].replace("ROME", ROME).replace(
        "OSLO", OSLO
    )
    made = fed({**models, **newer}[name], text, tools=[TOOL], stream=True)
    assert made.dialect is not None
    final = made.dialect.read(made.text.rest, (1, 1))
    _, _, pieces = shown(made)
    seen: dict[int, list[str]] = {}
    for piece in pieces:
        if piece.name is not None:
            assert piece.index == len(seen)
            seen[piece.index] = [str(piece.id), piece.name, ""]
        seen[piece.index][2] += piece.arguments
    assert [(id_, called, json.loads(arguments)) for id_, called, arguments in seen.values()] == [
        (one.id, one.name, one.arguments) for one in final
    ]


# ── thoughts, and what comes behind them ──────────────────────────────────────────────────────────────────


def test_harmony_has_channels(newer: dict[str, llama.Model]) -> None:
    text = "<|channel|>analysis<|message|>Hm <|channel|>.<|end|><|start|>assistant<|channel|>final<|message|>Yes."
    assert shown(fed(newer["gpt-oss"], text.replace(" <|channel|>", "")))[:2] == ("Yes.", "Hm.")


def test_harmony_answers_in_the_final_channel_where_there_is_no_choice(newer: dict[str, llama.Model]) -> None:
    model = newer["gpt-oss"]
    made, _ = generate(model, "", 1, schema={"type": "integer", "minimum": 10, "maximum": 99})
    assert written(model, made.prompt).endswith("<|start|>assistant<|channel|>final<|message|>")
    assert 10 <= int(made.text.take()) <= 99
    tokens = model.tokenize(" three", bos=False, special=True)
    more = sequence(model, messages=[U, {"role": "assistant", "content": "One, two,"}], given=tokens)
    text = more.new_text()
    text.feed(b" three")
    assert written(model, more.prompt).endswith("<|channel|>final<|message|>One, two,")
    assert text.take() == " three"


def test_a_schema_holds_from_where_the_thoughts_have_ended(models: dict[str, llama.Model]) -> None:
    asked = {"schema": {"type": "integer", "minimum": 10, "maximum": 99}, "template_args": {"enable_thinking": True}}
    for begin in ("", "<think>\nhm {", "<think>\nhm</think>", "<think>\nhm</think>\n\n"):
        for seed in range(3):
            made, tokens = generate(models["qwen3"], begin, seed, closing="</think>", **asked)
            text = models["qwen3"].detokenize(tokens).decode(errors="replace")
            assert 10 <= int(text.rpartition("</think>")[2]) <= 99
            assert made.text.take().endswith(text.rpartition("</think>")[2].strip())


def test_arguments_for_the_template(newer: dict[str, llama.Model]) -> None:
    model = newer["gpt-oss"]
    text = written(model, sequence(model, messages=[U], template_args={"date": "2020-02-02"}).prompt)
    assert "Current date: 2020-02-02" in text
    quoted = written(model, sequence(model, messages=[U], template_args={"date": "<|end|>"}).prompt)
    assert quoted.count("<|end|>") == written(model, sequence(model, messages=[U]).prompt).count("<|end|>") + 1
    with pytest.raises(OSError, match="template_args: messages"):
        sequence(model, messages=[U], template_args={"messages": []})
