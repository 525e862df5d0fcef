"""The API of OpenAI: requests have their effect, and answers the form that clients expect."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from aiosd.gateway import web
from aiosd.gateway.openai import chat, generation, responses
from aiosd.ipc import endpoint
from libaios import wire
from libaios.connection import Pending
from libaios.wire import ModelInfo
from tests.conftest import System
from tests.gatewayagent import CHAT, HELLO, Agent

pytestmark = pytest.mark.skipif(not endpoint.installed(), reason="the extra `gateway` is not installed")

COMPLETION = "/v1/completions"
MODEL = ModelInfo("nano", "/nano", True, "", 1, 2048, 4, 100, 64, 0, True, True)
USER = [{"role": "user", "content": "x"}]


@pytest.fixture
def agent(aiosd: System) -> Agent:
    return Agent(aiosd)


def chunks(agent: Agent, path: str, body: dict[str, Any]) -> list[Any]:
    """The chunks of a stream, without its end mark."""
    answer = agent.do(path=path, body={**body, "stream": True})
    assert answer["status"] == 200, answer
    assert answer["headers"]["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in answer["body"].split("\n") if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
TOOLS = [tool("add", a=DIGIT, b=DIGIT), tool("stop")]
FORM = {"type": "object", "properties": {"n": DIGIT}, "required": ["n"], "additionalProperties": False}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": FORM, "strict": True}}


# ── chats ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_chat_is_answered_whole_and_in_parts(agent: Agent) -> None:
    body = {"messages": HELLO, "max_completion_tokens": 12, "temperature": 0, "unheard_of": 1}
    answer = agent.do(path="/chat/completions", body=body)
    whole = json.loads(answer["body"])
    assert answer["headers"]["x-aios-ignored"] == "unheard_of"
    assert whole["object"] == "chat.completion"
    text = whole["choices"][0]["message"]["content"]
    assert text
    parts = chunks(agent, CHAT, body)
    assert "".join(part["choices"][0]["delta"].get("content", "") for part in parts) == text
    assert parts[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [part["choices"][0]["finish_reason"] for part in parts][-2:] == [None, whole["choices"][0]["finish_reason"]]
    assert all("usage" not in part for part in parts)
    parts = chunks(agent, CHAT, {**body, "stream_options": {"include_usage": True}})
    assert parts[-1]["choices"] == []
    assert parts[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert all(part["usage"] is None for part in parts[:-1])


def test_messages_may_have_any_form_that_programs_send(agent: Agent) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": "!"}], "name": "n"},
        {"role": "user", "content": "Again"},
        {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a":1,"b":2}'}},
        {"role": "function", "name": "add", "content": "3"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": {
            "name": "add", "arguments": '{"a": 1, "b": 2}'}}]},
        {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "3"}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}], "audio": None, "refusal": None},
        {"role": "system", "content": "And polite."},
        {"role": "assistant", "content": "The"},
    ]  # fmt: skip
    body = {"messages": messages, "max_tokens": 3, "tools": TOOLS, "tool_choice": "none"}
    assert agent.post(CHAT, body)[0] == 200
    image = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    assert agent.error(CHAT, {"messages": [{"role": "user", "content": image}]})[:2] == (400, "messages[0].content")


def test_a_prompt_that_is_too_long_is_never_cut(agent: Agent) -> None:
    for content in ("word " * 3000, "word " * 500_000):
        found = agent.error(CHAT, {"messages": [{"role": "user", "content": content}]})
        assert found == (400, "messages", "context_length_exceeded")
    _, found = agent.post(COMPLETION, {"prompt": "word " * 3000})
    assert "2048" in found["error"]["message"]


def test_several_choices_are_numbered_and_their_prompt_counts_once(agent: Agent) -> None:
    body = {"messages": HELLO, "n": 3, "seed": 5, "temperature": 1.5, "max_tokens": 8}
    _, whole = agent.post(CHAT, body)
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    one = agent.post(CHAT, {**body, "n": 1})[1]
    assert one["choices"][0]["message"]["content"] == texts[0]
    assert one["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]
    streamed = ["", "", ""]
    for part in chunks(agent, CHAT, body):
        choice = part["choices"][0]
        streamed[choice["index"]] += choice["delta"].get("content", "")
    assert streamed == texts


def test_logprobs_stop_and_bias_are_honoured(agent: Agent) -> None:
    body = {"messages": HELLO, "max_tokens": 6, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    choice = agent.post(CHAT, body)[1]["choices"][0]
    content = choice["logprobs"]["content"]
    assert [len(one["top_logprobs"]) for one in content] == 6 * [2]
    assert bytes(b for one in content for b in one["bytes"]).decode() == choice["message"]["content"]
    streamed = [
        one
        for part in chunks(agent, CHAT, body)
        if (found := part["choices"][0]["logprobs"])
        for one in found["content"]
    ]
    assert [one["token"] for one in streamed] == [one["token"] for one in content]
    first = content[0]["token"]
    assert agent.post(CHAT, {**body, "stop": [first]})[1]["choices"][0]["message"]["content"] == ""
    ids = agent.post("/tokenize", {"content": first})[1]["tokens"]
    biased = agent.post(CHAT, {**body, "logit_bias": {str(ids[0]): -100}})[1]
    assert not biased["choices"][0]["message"]["content"].startswith(first)


# ── tools and forms ───────────────────────────────────────────────────────────────────────────────────────


def test_tools_that_must_be_called_are_called(agent: Agent) -> None:
    body: dict[str, Any] = {"messages": USER, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    choice = agent.post(CHAT, body)[1]["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    assert len(choice["message"]["tool_calls"]) == 1
    body["tool_choice"] = {"type": "function", "function": {"name": "add"}}
    call = agent.post(CHAT, body)[1]["choices"][0]["message"]["tool_calls"][0]
    assert call["function"]["name"] == "add"
    assert sorted(json.loads(call["function"]["arguments"])) == ["a", "b"]
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [{"name": "stop"}]}}
    call = agent.post(CHAT, {**body, "tool_choice": allowed})[1]["choices"][0]["message"]["tool_calls"][0]
    assert call["function"] == {"name": "stop", "arguments": "{}"}


def test_a_streamed_tool_call_has_its_name_once_and_its_arguments_in_pieces(agent: Agent) -> None:
    named = {"type": "function", "function": {"name": "add"}}
    parts = chunks(agent, CHAT, {"messages": USER, "tools": TOOLS, "tool_choice": named, "parallel_tool_calls": False})
    calls = [one for part in parts for one in part["choices"][0]["delta"].get("tool_calls", [])]
    assert calls[0]["id"]
    assert (calls[0]["type"], calls[0]["function"]["name"]) == ("function", "add")
    assert all("id" not in call and "name" not in call["function"] for call in calls[1:])
    assert {call["index"] for call in calls} == {0}
    assert sorted(json.loads("".join(call["function"]["arguments"] for call in calls))) == ["a", "b"]
    assert parts[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_the_older_functions_are_tools(agent: Agent) -> None:
    functions = [one["function"] for one in TOOLS]
    body = {"messages": USER, "functions": functions, "function_call": {"name": "stop"}}
    choice = agent.post(CHAT, body)[1]["choices"][0]
    assert choice["finish_reason"] == "function_call"
    assert choice["message"]["function_call"] == {"name": "stop", "arguments": "{}"}
    assert "tool_calls" not in choice["message"]


def test_an_answer_has_the_requested_form(agent: Agent) -> None:
    choice = agent.post(CHAT, {"messages": USER, "response_format": SCHEMA})[1]["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert list(json.loads(choice["message"]["content"])) == ["n"]
    body = {"messages": USER, "response_format": {"type": "json_object"}, "max_tokens": 40, "seed": 1}
    assert agent.post(CHAT, body)[1]["choices"][0]["message"]["content"].startswith("{")
    bad = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object", "contains": 5}}}
    assert agent.error(CHAT, {"messages": USER, "response_format": bad})[:2] == (400, "response_format")


def test_tools_go_together_with_a_form(agent: Agent) -> None:
    """The model calls a tool or answers in the form. (Inside, the form is a tool, too; clients must not see this.)"""
    body = {"messages": USER, "tools": [tool("stop")], "response_format": SCHEMA, "parallel_tool_calls": False}
    kinds = set()
    for seed in range(12):
        choice = agent.post(CHAT, {**body, "seed": seed, "temperature": 3})[1]["choices"][0]
        parts = chunks(agent, CHAT, {**body, "seed": seed, "temperature": 3})
        deltas = [part["choices"][0]["delta"] for part in parts]
        text = "".join(delta.get("content") or "" for delta in deltas)
        calls = choice["message"].get("tool_calls", [])
        assert parts[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
        if calls:
            assert [call["function"]["name"] for call in calls] == ["stop"]
        else:
            assert (list(json.loads(text)), choice["finish_reason"]) == (["n"], "stop")
            assert json.loads(text) == json.loads(choice["message"]["content"])
        kinds.add(bool(calls))
    assert kinds == {True, False}


# ── what cannot be done ───────────────────────────────────────────────────────────────────────────────────


def read(**body: Any) -> Any:
    """The arguments of GENERATE for a chat, or the status and the name of the refused field."""
    from aiosd.gateway.openai import fields

    class Request:
        extra: list[Any] = []  # noqa: RUF012

    try:
        return fields.chat(fields.read(Request(), {"messages": USER, **body}, fields.ChatRequest), MODEL)  # type: ignore[arg-type]
    except web.Problem as problem:
        return problem.status, problem.param


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("audio", {"voice": "x"}),
        ("modalities", ["text", "audio"]),
        ("web_search_options", {}),
        ("verbosity", "high"),
        ("typical_p", 0.5),
        ("n", 0),
        ("top_logprobs", 3),
        ("logit_bias", {"word": 5}),
        ("tool_choice", {"type": "custom", "custom": {"name": "f"}}),
        ("tool_choice", {"type": "allowed_tools", "allowed_tools": {"tools": [{"name": "x"}]}}),
    ],
)
def test_a_field_that_cannot_be_honoured_is_named(field: str, value: Any) -> None:
    assert read(**{field: value}) == (400, field)


SAY = {"role": "user", "content": "x"}
CALLED = {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f"}}]}
BAD_CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}
BAD_OLD = {"role": "assistant", "function_call": {"name": "f", "arguments": "{"}}
BAD_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}
NAMELESS = {"type": "function", "function": {"parameters": {}}}
FLAT = {"type": "function", "name": "f", "parameters": {"type": "array"}}
ALLOWED = {"type": "allowed_tools", "mode": "auto", "tools": [{"name": "f"}]}
TEXT, RESPONSE = "/v1/completions", "/v1/responses"
IMAGE = [{"type": "image_url", "image_url": {"url": "data:,"}}]
LONGEST = "word " * 3000
IMPOSSIBLE = {"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}, "required": ["a"]}
FORM = {"type": "json_schema", "json_schema": {"name": "x", "schema": IMPOSSIBLE}}

WRONG: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {}, "messages"),
    (CHAT, {"messages": [SAY, 5]}, "messages[1]"),
    (CHAT, {"messages": [SAY, {"role": "user"}]}, "messages[1].content"),
    (CHAT, {"messages": [SAY, {"role": "nobody", "content": "x"}]}, "messages[1].role"),
    (CHAT, {"messages": [SAY, {"role": "user", "content": IMAGE}]}, "messages[1].content"),
    (CHAT, {"messages": [SAY, BAD_CALL, SAY]}, "messages[1].tool_calls[0].function.arguments"),
    (CHAT, {"messages": [SAY, BAD_OLD, SAY]}, "messages[1].function_call.arguments"),
    (CHAT, {"messages": [{**SAY, "tool_calls": 5}]}, "messages[0].tool_calls"),
    (CHAT, {"messages": [{**SAY, "content": LONGEST}]}, "messages"),
    (CHAT, {"messages": [SAY], "tools": [tool("g"), BAD_TOOL]}, "tools[1].function.parameters"),
    (CHAT, {"messages": [SAY], "tools": [tool("g"), BAD_TOOL], "tool_choice": ALLOWED}, "tools[1].function.parameters"),
    (CHAT, {"messages": [SAY], "tools": [NAMELESS]}, "tools[0].function.name"),
    (CHAT, {"messages": [SAY], "tools": [{"type": "x"}]}, "tools[0].type"),
    (CHAT, {"messages": [SAY], "functions": [{"name": "f", "parameters": 5}]}, "functions[0].parameters"),
    (CHAT, {"messages": [SAY], "tools": [tool("f")], "tool_choice": "x"}, "tool_choice"),
    (CHAT, {"messages": [SAY], "functions": [{"name": "f"}], "function_call": {"name": "x"}}, "function_call"),
    (CHAT, {"messages": [SAY], "response_format": FORM}, "response_format"),
    (CHAT, {"messages": [SAY], "json_schema": IMPOSSIBLE}, "json_schema"),
    (CHAT, {"messages": [SAY], "guided_grammar": "x"}, "guided_grammar"),
    (CHAT, {"messages": [SAY], "top_p": 7}, "top_p"),
    (CHAT, {"messages": [SAY], "stop": ["a", 5]}, "stop[1]"),
    (CHAT, {"messages": [SAY, {"role": "assistant", "content": "x", "audio": {"id": "x"}}]}, "messages[1].audio"),
    (CHAT, {"messages": [SAY], "logit_bias": {"99999": 1}}, "logit_bias"),
    (CHAT, {"messages": [SAY], "stop_token_ids": [-1]}, "stop_token_ids[0]"),
    (CHAT, {"messages": [SAY], "max_completion_tokens": 0, "ignore_eos": 5}, "ignore_eos"),
    (CHAT, {"messages": [SAY], "stream_options": {"include_usage": "x"}}, "stream_options.include_usage"),
    (TEXT, {"prompt": []}, "prompt"),
    (TEXT, {"prompt": LONGEST}, "prompt"),
    (TEXT, {"prompt": [1, 1 << 20]}, "prompt[1]"),
    (TEXT, {"prompt": "x", "repetition_penalty": -3}, "repetition_penalty"),
    (RESPONSE, {"input": [SAY, {"type": "image"}]}, "input[1].type"),
    (RESPONSE, {"input": [SAY, {"role": "nobody", "content": "x"}], "instructions": "x"}, "input[1].role"),
    (RESPONSE, {"input": [SAY, {"role": "user", "content": 5}]}, "input[1].content"),
    (RESPONSE, {"input": [SAY, {"type": "function_call_output", "call_id": "a", "output": 5}]}, "input[1].output"),
    (RESPONSE, {"input": [SAY, {"type": "function_call", "name": "f", "arguments": "{"}]}, "input[1].arguments"),
    (RESPONSE, {"input": [SAY, {"type": "function_call", "arguments": "{}"}]}, "input[1].name"),
    (RESPONSE, {"input": LONGEST}, "input"),
    (RESPONSE, {"input": "x", "tools": [FLAT]}, "tools[0].parameters"),
    (RESPONSE, {"input": "x", "text": {"format": {"type": "xml"}}}, "text.format"),
    (RESPONSE, {"input": "x", "text": {"format": {"type": "json_schema", "schema": IMPOSSIBLE}}}, "text.format.schema"),
    (RESPONSE, {"input": "x", "top_logprobs": 99}, "top_logprobs"),
    (RESPONSE, {"input": "x", "text": {"verbosity": "low"}}, "text.verbosity"),
    (RESPONSE, {"input": "x", "moderation": {"model": "x"}}, "moderation"),
    ("/v1/embeddings", {"input": ["x", ""]}, "input[1]"),
    ("/v1/embeddings", {"input": [[1, 2]]}, "input"),
    ("/v1/detokenize", {"tokens": [1, 1 << 20]}, "tokens[1]"),
    ("/query", {"query_data": {}}, "query_type"),
    ("/agents/submit", {"agent_id": "x", "agent_config": {}}, "agent_config.task"),
    ("/agents/submit", {"agent_config": {"task": "x"}}, "agent_id"),
]


def test_an_error_names_its_field_as_the_api_has_it(agent: Agent) -> None:
    found = []
    for path, body, param in WRONG:
        status, answer = agent.post(path, {"max_tokens": 4, **body} if path in (CHAT, TEXT) else body)
        error = answer["error"]
        if (status, error["param"]) != (400, param) or not error["message"]:
            found.append((path, body, param, status, error))
    assert not found
    message = agent.post(CHAT, {"messages": [SAY], "tools": [BAD_TOOL]})[1]["error"]["message"]
    assert message == "tools[0].function.parameters must be a JSON Schema of type object"
    ollama = {"messages": [SAY], "options": {"top_p": 7}}
    assert agent.post("/api/chat", ollama)[1]["error"].startswith("options.top_p: ")


def test_fields_that_change_nothing_are_accepted() -> None:
    names = "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention prediction"
    read(**dict.fromkeys(names.split(), "x"), modalities=["text"], audio=None, verbosity=None).args  # noqa: B018


def test_limits_and_seeds_are_clamped() -> None:
    asked = read(max_tokens=1 << 40, max_completion_tokens=7, seed=-7, n=2)
    assert [one.sampling.max_tokens for one in asked.args] == [7, 7]
    assert read(max_tokens=1 << 40).args[0].sampling.max_tokens == 1 << 24
    assert read(max_tokens=-1).args[0].sampling.max_tokens is None
    assert all(0 <= one.sampling.seed < 1 << 63 for one in asked.args)


def test_thoughts_are_counted_apart() -> None:
    used = generation.total([wire.Usage(7, 0, 5, reasoning_tokens=3), wire.Usage(7, 0, 2, reasoning_tokens=1)])
    assert chat.usage(used)["completion_tokens_details"] == {"reasoning_tokens": 4}
    assert responses._usage(used)["output_tokens_details"] == {"reasoning_tokens": 4}


def test_reasoning_effort_reaches_the_template() -> None:
    assert read(reasoning_effort="none").args[0].template_args["enable_thinking"] is False
    assert read(reasoning_effort="high").args[0].template_args["reasoning_effort"] == "high"


# ── the other families ────────────────────────────────────────────────────────────────────────────────────


def test_completions_take_texts_and_ids_one_or_many(agent: Agent) -> None:
    answer = agent.do(path="/tokenize", body={"content": "Once", "add_special": True})
    ids = json.loads(answer["body"])["tokens"]  # this model has no start token
    assert "x-aios-ignored" not in answer["headers"]
    assert agent.post("/detokenize", {"tokens": ids})[1]["content"] == "Once"
    pieces = [one["piece"] for one in agent.post("/tokenize", {"content": "a€", "with_pieces": True})[1]["tokens"]]
    assert pieces[0] == "a"
    assert [byte for piece in pieces[1:] for byte in piece] == list("€".encode())  # parts of a character, as bytes
    for prompt, count in (("Once", 1), (["Once", "Twice"], 2), (ids, 1), ([ids, ids], 2)):
        _, found = agent.post(COMPLETION, {"prompt": prompt, "max_tokens": 4, "n": 2, "temperature": 0, "logprobs": 1})
        assert [choice["index"] for choice in found["choices"]] == list(range(2 * count))
        assert [len(choice["logprobs"]["tokens"]) for choice in found["choices"]] == 2 * count * [4]
        assert found["usage"]["prompt_tokens"] == count * len(ids) or prompt == ["Once", "Twice"]
    body = {"prompt": "Once", "echo": True, "max_tokens": 4, "temperature": 0}
    whole = agent.post("/v1/engines/davinci/completions", body)[1]["choices"][0]["text"]
    assert whole.startswith("Once")
    assert "".join(part["choices"][0]["text"] for part in chunks(agent, COMPLETION, body)) == whole
    body = {"prompt": "Once", "max_tokens": 6, "temperature": 0, "logprobs": 0}
    found = agent.post(COMPLETION, body)[1]["choices"][0]["logprobs"]
    parts = [part["choices"][0]["logprobs"] or {} for part in chunks(agent, COMPLETION, body)]
    assert [at for part in parts for at in part.get("text_offset", [])] == found["text_offset"]
    assert agent.error(COMPLETION, {"prompt": "Once", "suffix": "end"})[:2] == (400, "suffix")
    assert agent.error(COMPLETION, {"prompt": ["Once", 5]})[:2] == (400, "prompt")


def test_completions_have_their_token_ids(agent: Agent) -> None:
    body = {"prompt": [300, 301], "max_tokens": 6, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    _, whole = agent.post("/v1/completions", body)
    ids = whole["choices"][0]["token_ids"]
    assert len(ids) == whole["usage"]["completion_tokens"] == 6
    lines = agent.do(path="/v1/completions", body={**body, "stream": True})["body"].split("\n\n")
    parts = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    assert [one for part in parts for one in part.get("token_ids", [])] == ids


def test_embeddings_are_the_same_in_both_encodings(agent: Agent) -> None:
    _, floats = agent.post("/v1/embeddings", {"input": ["one", "two"]})
    _, packed = agent.post("/v1/embeddings", {"input": ["one", "two"], "encoding_format": "base64"})
    vectors = [one["embedding"] for one in floats["data"]]
    data = [base64.b64decode(one["embedding"]) for one in packed["data"]]
    assert [list(struct.unpack(f"<{len(one) // 4}f", one)) for one in data] == vectors
    assert floats["usage"]["prompt_tokens"] > 0
    assert agent.error("/v1/embeddings", {"input": [1, 2]})[:2] == (400, "input")
    for body, what in (({"user": "me"}, "missing"), ({"input": ""}, "empty"), ({"input": []}, "empty")):
        assert agent.post("/v1/embeddings", body)[1]["error"]["message"] == f"input: it is {what}"
    assert agent.error("/v1/embeddings", {"input": "x", "dimensions": 3})[:2] == (400, "dimensions")


def test_models_are_listed_and_found(agent: Agent) -> None:
    status, found = agent.post("/v1/models", method="GET")
    assert status == 200, found
    assert [model["id"] for model in found["data"]] == ["nano"]
    assert agent.post("/v1/models/nano", method="GET")[1]["object"] == "model"
    assert agent.error("/v1/models/gpt-9", method="GET")[::2] == (404, "model_not_found")


def events(agent: Agent, body: dict[str, Any]) -> list[Any]:
    answer = agent.do(path="/v1/responses", body={**body, "stream": True})
    found = [part.split("\ndata: ") for part in answer["body"].split("\n\n") if part]
    parsed = [json.loads(data) for _, data in found]
    assert [name.removeprefix("event: ") for name, _ in found] == [event["type"] for event in parsed]
    assert [event["sequence_number"] for event in parsed] == list(range(len(parsed)))
    return parsed


def test_responses_are_written_item_by_item(agent: Agent) -> None:
    body = {"input": "Hello!", "instructions": "Be brief.", "max_output_tokens": 6, "temperature": 0}
    found = events(agent, body)
    kinds = [event["type"].removeprefix("response.") for event in found]
    deltas = kinds.count("output_text.delta")
    assert kinds == [
        "created", "in_progress", "output_item.added", "content_part.added", *deltas * ["output_text.delta"],
        "output_text.done", "content_part.done", "output_item.done", kinds[-1],
    ]  # fmt: skip
    text = "".join(event["delta"] for event in found if event["type"].endswith("text.delta"))
    last = found[-1]["response"]
    assert last["output"][0]["content"][0]["text"] == text
    assert f"response.{last['status']}" == found[-1]["type"]
    assert (last["status"], last["output"][0]["status"]) == ("incomplete", "incomplete")
    assert last["output"][0]["id"].startswith("msg_")
    _, whole = agent.post("/v1/responses", body)
    assert whole["output"][0]["content"][0]["text"] == text
    assert whole["usage"]["output_tokens"] == last["usage"]["output_tokens"]
    counted = agent.post("/v1/responses/input_tokens", body)[1]
    assert counted == {"object": "response.input_tokens", "input_tokens": whole["usage"]["input_tokens"]}


def test_a_response_continues_an_earlier_one(agent: Agent) -> None:
    one = {"type": "function", **TOOLS[0]["function"]}
    body = {"input": "x", "tools": [one], "tool_choice": "required", "parallel_tool_calls": False}
    found = events(agent, body)
    call = found[-1]["response"]["output"][0]
    assert (call["type"], call["name"]) == ("function_call", "add")
    arguments = [event for event in found if event["type"] == "response.function_call_arguments.done"]
    assert arguments[0]["arguments"] == call["arguments"]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "3"}
    status, more = agent.post(
        "/v1/responses",
        {"input": [result], "previous_response_id": found[-1]["response"]["id"], "max_output_tokens": 4},
    )
    assert status == 200
    assert more["usage"]["input_tokens"] > found[-1]["response"]["usage"]["input_tokens"]
    ident = more["id"]
    _, items = agent.post(f"/v1/responses/{ident}/input_items", method="GET")
    assert [item["output"] for item in items["data"]] == ["3"]
    assert agent.post(f"/v1/responses/{ident}", method="GET") == (200, more)
    assert agent.post("/v1/responses", {"previous_response_id": ident, "max_output_tokens": 1})[0] == 200
    assert agent.post(f"/v1/responses/{ident}", method="DELETE")[1]["deleted"]
    assert agent.error(f"/v1/responses/{ident}", method="GET")[0] == 404
    assert agent.error("/v1/responses", {"max_output_tokens": 1})[:2] == (400, "input")
    lost = {"input": "x", "previous_response_id": "resp_0"}
    assert agent.error("/v1/responses", lost)[::2] == (404, "previous_response_not_found")
    assert agent.error("/v1/responses", {"input": "x", "tools": [{"type": "web_search"}]})[:2] == (400, "tools[0].type")
    assert agent.error("/v1/responses", {"input": "x", "background": True})[:2] == (400, "background")


# ── streams in which nothing happens ──────────────────────────────────────────────────────────────────────


class Quiet:
    """A connection whose kernel replies when the test says so."""

    def __init__(self) -> None:
        self.call: Pending
        self.abandoned = 0

    def prepare(self, sys: int, args: Any, stream: bool, notify: Callable[[], None]) -> Pending:
        return Pending(sys, args, notify)

    def may_send(self, call: Pending) -> bool:
        return True

    def send(self, call: Pending) -> None:
        self.call = call

    def abandon(self, call: Pending) -> None:
        self.abandoned += 1


class Asker:
    """A request whose client does not leave."""

    def __init__(self) -> None:
        self.sent: deque[bytes] = deque()
        self.begun = False
        self.account = type("Account", (), {"connection": Quiet()})
        self.app = type("App", (), {"counters": web.Counters()})
        self.arrived = asyncio.Event()

    async def left(self) -> None:
        await asyncio.Event().wait()

    async def stream(self, part: bytes, kind: bytes, last: bool = False) -> None:
        self.begun = True
        self.sent.append(part)
        self.arrived.set()


def test_pieces_that_have_come_together_are_one() -> None:
    from aiosd.gateway.openai import generation

    one, two = (wire.Logprob(i, -0.5, b"x") for i in (1, 2))
    joined = generation._joined([wire.Piece("a", [1], [one], "m"), wire.Piece("b", [2, 3], [two])])
    assert joined == wire.Piece("ab", [1, 2, 3], [one, two], "m")
    assert generation._joined([wire.Piece("a", [1]), wire.Piece("b", [2])]).logprobs is None


def test_a_stream_that_waits_shows_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    from aiosd.gateway.openai import chat, fields, generation

    monkeypatch.setattr(generation, "COMMENT_S", 0.01)

    async def run() -> None:
        request = Asker()
        asked = fields.ChatGeneration([wire.Generate()])
        task = asyncio.create_task(
            generation.stream(request, asked.args, chat.ChatForm({"id": "x", "model": "m"}, asked, False))  # type: ignore[arg-type]
        )
        await request.arrived.wait()
        assert request.sent[0].startswith(b": ")
        connection = request.account.connection
        connection.call.final = wire.Reply(1, 5, body=wire.raw(wire.Failure("broken")))
        connection.call.notify()
        with pytest.raises(OSError, match="broken"):
            await task
        assert connection.abandoned == 1
        assert request.app.counters.streams == 0

    asyncio.run(run())


def test_a_tool_is_strict_only_if_it_is_declared_so() -> None:
    """In this API a tool's schema that no grammar can keep is no reason to refuse a request; an answer's schema is."""
    given = [{"type": "function", "function": {"name": name, "parameters": {}, **strict}}
             for name, strict in (("a", {}), ("b", {"strict": True}), ("c", {"strict": None}))]  # fmt: skip
    (args,) = read(tools=given).args
    assert [tool["function"]["strict"] for tool in args.tools] == [False, True, False]
    asked = read(tools=given, response_format={"type": "json_schema", "json_schema": {"schema": {"type": "object"}}})
    assert "strict" not in asked.args[0].tools[-1]["function"]
