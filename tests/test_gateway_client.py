"""The official client of OpenAI's API as an agent, and that of Ollama's API by hand."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import textwrap
from pathlib import Path
from typing import Any, cast

import pytest

from aiosd.gateway.openai import completions, embeddings, fields, responses
from aiosd.gateway.web import Problem
from aiosd.ipc import endpoint
from tests.conftest import System, eventually
from tests.gatewayagent import HELLO, Agent

pytestmark = pytest.mark.skipif(not endpoint.installed(), reason="the extra `gateway` is not installed")
official = pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason="openai is not installed")

EXAMPLE = Path(__file__).parent.parent / "examples" / "openai_agent.py"

TOUR = """
import asyncio, openai, sys
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field

client = OpenAI()
say = [{"role": "user", "content": "Hello!"}]

class Point(BaseModel):
    x: int = Field(ge=0, le=9)
    kind: bool

parsed = client.chat.completions.parse(model="gpt-4o", messages=say, response_format=Point).choices[0].message.parsed
print("parsed", type(parsed).__name__, parsed.model_dump().keys() == {"x", "kind"})

tool = openai.pydantic_function_tool(Point, name="draw")
with client.chat.completions.stream(
    model="x", messages=say, tools=[tool], tool_choice="required", parallel_tool_calls=False
) as stream:
    kinds = {event.type for event in stream}
    call = stream.get_final_completion().choices[0].message.tool_calls[0]
print("tool", call.function.name, type(call.function.parsed_arguments).__name__)
print("events", "tool_calls.function.arguments.done" in kinds)

with client.responses.stream(model="x", input="Hello!", temperature=0) as stream:
    kinds = [event.type for event in stream]
    print("response", kinds[0], kinds[-1], bool(stream.get_final_response().output_text))

print("completion", bool(client.completions.create(model="x", prompt="Once", max_tokens=4).choices[0].text))

long = [{"role": "user", "content": "w " * 9000}]
for wrong in ({"messages": []}, {"messages": say, "temperature": -5}, {"messages": long}):
    try:
        client.chat.completions.create(model="x", **wrong)
    except openai.BadRequestError as err:
        print("refused", err.code, err.param)
print("any key", OpenAI(api_key="sk-none").models.list().data[0].id)

async def cancelled():
    async with AsyncOpenAI() as client:
        task = asyncio.create_task(client.completions.create(model="x", prompt="Once", extra_body={"ignore_eos": True}))
        await client.models.list()
        task.cancel()
        print("cancelled", isinstance((await asyncio.gather(task, return_exceptions=True))[0], asyncio.CancelledError))
asyncio.run(cancelled())

try:
    while True:
        client.completions.create(model="x", prompt="Once", extra_body={"ignore_eos": True})
except openai.RateLimitError as err:
    print("budget", err.code, err.response.headers["x-should-retry"])
"""


@official
def test_the_official_client_finds_what_it_expects(aiosd: System, tmp_path: Path) -> None:
    script = tmp_path / "tour.py"
    script.write_text(TOUR)
    done = aiosd.run("aios-run", "--tokens", "4000", script, timeout=100)
    assert done.stdout == textwrap.dedent("""\
        parsed Point True
        tool draw Point
        events True
        response response.created response.completed True
        completion True
        refused None messages
        refused None temperature
        refused context_length_exceeded messages
        any key nano
        cancelled True
        budget insufficient_quota false
    """), done.stderr


@official
def test_the_example_runs(aiosd: System) -> None:
    done = aiosd.run("aios-run", EXAMPLE, timeout=60, check=True)
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    assert lines["model"] == "nano"
    assert lines["call"] == "multiply ['a', 'b']"
    assert lines["form"] == "['number']"
    assert lines["vectors"].startswith("2 of ")
    assert {"stream", "answer", "response"} <= set(lines)


#: The fields of this API, and where we describe what they mean here.
DOCUMENTED = {
    "chat.completion_create_params": ("CompletionCreateParamsBase", fields.ChatRequest),
    "completion_create_params": ("CompletionCreateParamsBase", completions.Completion),
    "embedding_create_params": ("EmbeddingCreateParams", embeddings.Embedding),
    "responses.response_create_params": ("ResponseCreateParamsBase", responses.Responses),
}


@official
@pytest.mark.parametrize("module", DOCUMENTED)
def test_every_documented_field_is_known(module: str) -> None:
    name, ours = DOCUMENTED[module]
    theirs = getattr(importlib.import_module(f"openai.types.{module}"), name)
    documented = theirs.__required_keys__ | theirs.__optional_keys__
    assert documented
    assert documented <= set(ours.__struct_fields__)


# ── Ollama ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def agent(aiosd: System) -> Agent:
    return Agent(aiosd)


def lines(agent: Agent, path: str, body: dict[str, Any]) -> list[Any]:
    answer = agent.do(path=path, body=body)
    assert answer["status"] == 200, answer
    assert answer["headers"]["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer["body"].splitlines()]


def test_ollamas_chats_are_lines_unless_they_are_not_to_be(agent: Agent) -> None:
    body = {"model": "llama3.2", "messages": HELLO, "options": {"num_predict": 6, "temperature": 0, "num_ctx": 4096}}
    parts = lines(agent, "/api/chat", body)
    whole = agent.post("/api/chat", {**body, "stream": False})[1]
    assert "".join(part["message"]["content"] for part in parts) == whole["message"]["content"] != ""
    assert [part["done"] for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1]["eval_count"] == whole["eval_count"] == 6
    assert (whole["done_reason"], whole["model"]) == ("length", "nano")
    generated = lines(agent, "/api/generate", {"model": "x", "prompt": "Hello!", "options": {"num_predict": 3}})
    assert all("response" in part for part in generated)
    raw = {"model": "x", "prompt": "Once", "raw": True, "stream": False, "options": {"num_predict": 3}}
    assert agent.post("/api/generate", raw)[1]["eval_count"] == 3


def test_ollamas_tools_forms_and_models(aiosd: System, agent: Agent) -> None:
    tools = [{"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "properties": {}}}}]
    form = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9, "minimum": 0}}, "required": ["n"]}
    body = {"model": "x", "messages": HELLO, "stream": False}
    assert list(json.loads(agent.post("/api/chat", {**body, "format": form})[1]["message"]["content"])) == ["n"]
    both = agent.post("/api/chat", {**body, "format": form, "tools": tools})[1]["message"]
    assert both["content"] or both["tool_calls"][0]["function"]["arguments"] == {}
    assert agent.post("/api/tags", method="GET")[1]["models"][0]["name"] == "nano"
    shown = agent.post("/api/show", {"model": "x"})[1]
    assert (shown["model_info"]["general.name"], "completion" in shown["capabilities"]) == ("nano", True)
    assert len(agent.post("/api/embed", {"model": "x", "input": ["a", "b"]})[1]["embeddings"]) == 2
    assert agent.post("/api/embeddings", {"model": "x", "prompt": "a"})[1]["embedding"]
    (running,) = agent.post("/api/ps", method="GET")[1]["models"]
    assert (running["name"], running["context_length"]) == ("nano", aiosd.status()["models"][0]["info"]["n_ctx"])
    assert agent.post("/api/version", method="GET", headers={"Authorization": None})[0] == 200
    assert agent.post("/api/chat", {**body, "format": "xml"}) == (400, {"error": "format: json, or a schema"})
    image = [{"role": "user", "content": "x", "images": ["aGk="]}]
    assert agent.post("/api/chat", {**body, "messages": image})[0] == 400


def test_ollamas_empty_requests(aiosd: System, agent: Agent) -> None:
    """Programs send such requests to load a model, or to check whether there is a server."""
    for path, body in (("/api/generate", {"prompt": "", "keep_alive": 0}), ("/api/chat", {"messages": []})):
        status, found = agent.post(path, {"model": "nano:latest", **body})
        assert (status, found["done"], found["done_reason"], found["model"]) == (200, True, "load", "nano")
        assert found.get("response", "") == found.get("message", {"content": ""})["content"] == ""
    assert [one["prompt_tokens"] for one in aiosd.agents()] == [0]
    answer = agent.do(path="/", method="GET", headers={"Authorization": None})
    assert (answer["status"], "Ollama is running" in answer["body"]) == (200, True)


def test_ollamas_options_are_honoured_refused_or_named(agent: Agent) -> None:
    form = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9, "minimum": 0}}, "required": ["n"]}
    raw = {"prompt": "Once", "raw": True, "stream": False}
    assert list(json.loads(agent.post("/api/generate", {**raw, "format": form})[1]["response"])) == ["n"]
    few = {**raw, "logprobs": True, "top_logprobs": 2, "options": {"num_predict": 3}}
    whole = agent.post("/api/generate", few)[1]["logprobs"]
    assert [len(one["top_logprobs"]) for one in whole] == [2, 2, 2]
    parts = lines(agent, "/api/chat", {"messages": HELLO, "logprobs": True, "options": {"num_predict": 3}})
    chances = [one for part in parts for one in part.get("logprobs", [])]
    assert "".join(one["token"] for one in chances) == "".join(part["message"]["content"] for part in parts)
    odd = {"messages": HELLO, "options": {"num_predict": 1, "num_ctx": 64, "repeat_last_n": 9}, "stream": False}
    answer = agent.do(path="/api/chat", body=odd)
    assert answer["headers"]["x-aios-ignored"] == "options.repeat_last_n"
    odd["options"] = {"typical_p": 0.5}
    assert agent.post("/api/chat", odd) == (400, {"error": "options.typical_p: this server cannot do that"})


# ── Cerebrum ──────────────────────────────────────────────────────────────────────────────────────────────


def query(agent: Agent, kind: str, **data: Any) -> dict[str, Any]:
    body = {"query_type": kind, "agent_name": "x", "query_data": {"query_class": kind, **data}}
    answer = agent.do(path="/query", body=body)
    found = json.loads(answer["body"])
    assert (answer["status"], answer["headers"].get("x-aios-ignored")) == (200, None), found
    assert found["response"]["response_class"] == kind
    assert len(found["turnaround_times"]) == 1
    return found["response"]


def test_cerebrums_queries_of_a_model(agent: Agent) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["n"]}
    chat: dict[str, Any] = {"llms": None, "messages": HELLO, "tools": None, "temperature": 1.0, "max_new_tokens": 30}
    answer = query(agent, "llm", **chat, action_type="chat", message_return_type="text", response_format=None)
    assert answer["response_message"]
    assert (answer["finished"], answer["status_code"], answer["tool_calls"]) == (True, 200, None)
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    whole = {**chat, "max_new_tokens": 400}  # an answer that is cut off would be no JSON
    answer = query(agent, "llm", **whole, action_type="chat_with_json_output", response_format=form)
    assert list(json.loads(answer["response_message"])) == ["n"]
    tool = {"name": "demo_author/calc", "description": "d", "parameters": schema}
    chat["tools"] = [{"type": "function", "function": tool}]
    answer = query(agent, "llm", **chat, action_type="chat_with_tool_call_output")
    assert all(call["name"] == "demo_author/calc" for call in answer["tool_calls"] or [])
    chat["max_new_tokens"] = 1000
    answer = query(agent, "llm", **chat, action_type="call_tool")  # aiosd's own calc needs an expression
    assert (answer["status_code"], answer["response_message"]) == (400, None)
    assert answer["error"].startswith("calc: ")
    chat["messages"] = [{"role": "user", "content": "Write 'blue' into the file sky.txt"}]
    answer = query(agent, "llm", **chat, action_type="operate_file")
    if answer["status_code"] == 200:  # the embedded model may fail at tools of which it was not trained
        assert answer["response_message"]
    else:
        assert answer["error"]
    assert agent.error("/query", {"query_type": "x", "query_data": {}})[:2] == (400, "query_type")


def test_cerebrums_memories_are_notes(agent: Agent) -> None:
    metadata = {"tags": ["t"], "keywords": ["deep"], "nested": {"a": [1]}}
    params = {"content": "the sky is blue", "metadata": metadata}
    ident = query(agent, "memory", operation_type="add_memory", params=params)["memory_id"]
    assert query(agent, "memory", operation_type="get_memory", params={"memory_id": ident})["metadata"] == metadata
    change = {"memory_id": ident, "content": "the sky is grey"}
    assert query(agent, "memory", operation_type="update_memory", params=change)["success"]
    found = query(agent, "memory", operation_type="retrieve_memory", params={"content": "sky", "k": 3})
    assert [(one["content"], one["tags"], one["keywords"]) for one in found["search_results"]] == [
        ("the sky is grey", ["t"], ["deep"])
    ]
    assert query(agent, "memory", operation_type="remove_memory", params={"memory_id": ident})["success"]
    for wrong in ({"memory_id": ident}, {"memory_id": "x"}, {}):
        assert not query(agent, "memory", operation_type="get_memory", params=wrong)["success"]
    for wrong in ({}, {"content": 5}, {"content": "x", "metadata": 5}, {"content": "x" * (2 << 20)}):
        assert not query(agent, "memory", operation_type="add_memory", params=wrong)["success"]


def test_cerebrums_files_are_kept_with_their_versions(agent: Agent) -> None:
    def do(operation: str, **params: Any) -> tuple[int, str]:
        answer = query(agent, "storage", operation_type=operation, params=params)
        return answer["status_code"], answer["response_message"] or answer["error"]

    assert do("mount", root_dir="/tmp/r")[0] == 200
    assert do("create_file", file_path="/r/plan.txt")[0] == 200
    assert do("create_file", file_path="r/plan.txt") == (409, "r/plan.txt is there already")
    assert [do("write", file_path="r/plan.txt", content=text)[0] for text in ("blue sky", "green sea")] == [200, 200]
    assert json.loads(do("retrieve", query_text="green", n=3, keywords=None)[1])[0]["file_path"] == "r/plan.txt"
    assert json.loads(do("retrieve", query_text="nothing", n=3, keywords=["green"])[1])[0]["content"] == "green sea"
    assert do("rollback", file_path="r/plan.txt", n=1, time=None)[0] == 200
    assert json.loads(do("retrieve", query_text="blue", n=3)[1])[0]["content"]
    assert do("share", file_path="r/plan.txt")[0] == 200
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("rollback", {"file_path": "r/plan.txt", "n": 50}),
        ("rollback", {"file_path": "r/plan.txt", "n": "x"}),
        ("rollback", {"file_path": "r/plan.txt", "n": 1, "time": "2026-01-01"}),
        ("write", {"file_path": "../escape", "content": "x"}),
        ("write", {"file_path": 5, "content": "x"}),
        ("write", {"file_path": "x", "content": "x" * (2 << 20)}),
        ("share", {"file_path": "nothing"}),
        ("format", {}),
    ]
    for operation, params in wrong:
        assert 400 <= do(operation, **params)[0] < 500, operation


def test_cerebrums_tools_and_lists(agent: Agent) -> None:
    call = {"name": "someone/calc", "parameters": {"expression": "6*7"}}
    assert query(agent, "tool", tool_calls=[call])["response_message"] == "42"
    assert query(agent, "tool", tool_calls=[{"name": "nothing", "parameters": {}}])["status_code"] == 404
    assert agent.post("/core/llms/list", method="GET")[1]["llms"] == [{"name": "nano", "backend": "aiosd"}]
    assert agent.post("/status", method="GET")[0] == agent.post("/core/llm/setup", {})[0] == 200


def test_cerebrums_model_works_on_files(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """With given calls of a model; the store does what they say."""
    from aiosd.gateway import cerebrum, filing
    from libaios.wire import ToolCall

    wanted = [ToolCall("1", "write", {"file_path": "a", "content": "x"}), ToolCall("2", "share", {"file_path": "a"})]
    asked_for: list[Any] = []

    async def generate(request: Any, asked: Any) -> Any:
        asked_for.append(asked)
        return type("Result", (), {"tool_calls": wanted, "text": ""})()

    async def do(request: Any, operation: str, params: dict[str, Any]) -> str:
        return f"{operation} {params['file_path']}"

    monkeypatch.setattr(cerebrum, "_generate", generate)
    monkeypatch.setattr(filing, "do", do)
    query = cerebrum.LlmQuery(messages=HELLO, action_type="operate_file")
    answer = asyncio.run(cerebrum._operate(cast("Any", None), query))
    assert answer["response_message"] == "write a\nshare a"
    assert asked_for[0].action_type == "call_tool"
    assert asked_for[0].messages[1:] == HELLO
    assert {tool["function"]["name"] for tool in asked_for[0].tools} <= set(filing._OPERATIONS)
    wanted.clear()
    with pytest.raises(Problem, match="has not chosen"):
        asyncio.run(cerebrum._operate(cast("Any", None), query))


RUN_AGENT = """#!/bin/sh
echo "$PWD $* $AIOS_PID"
case "$*" in *fail*) exit 3;; *wait*) exec sleep 60;; esac
"""


def test_cerebrums_agents_are_children(aiosd: System, tmp_path: Path) -> None:
    program = tmp_path / "bin" / "run-agent"
    program.parent.mkdir()
    program.write_text(RUN_AGENT)
    program.chmod(0o755)
    agent = Agent(aiosd, "-e", f"PATH={program.parent}:{os.environ['PATH']}")

    def submit(ident: str, task: Any) -> Any:
        return agent.post("/agents/submit", {"agent_id": ident, "agent_config": {"task": task}})

    def ended(pid: int) -> dict[str, Any]:
        assert eventually(lambda: agent.post(f"/agents/{pid}/status", method="GET")[1]["status"] != "running")
        return agent.post(f"/agents/{pid}/status", method="GET")[1]

    good, bad, slow = (submit("demo/math", task)[1]["execution_id"] for task in ("1+1", "fail", "wait"))
    found = ended(good)
    assert (found["status"], found["execution_id"]) == ("completed", good)
    assert f"--agent_author demo --agent_name math --task_input 1+1 {good}" in found["result"]
    assert ended(bad)["error"]["message"] == "exit code 3"
    assert agent.post(f"/agents/{slow}/status", method="GET")[1]["status"] == "running"
    listed = agent.post("/agents/ps", method="GET")[1]
    assert [(one["id"], one["status"]) for one in listed["processes"]] == [
        (good, "completed"), (bad, "error"), (slow, "running"),
    ]  # fmt: skip
    aiosd.run("aios-kill", str(slow), check=True)
    assert submit("./here", 5)[0] == 400
    assert agent.post("/agents/1/status", method="GET")[0] == 404
    program.unlink()
    status, refused = submit("demo/math", "x")
    assert status == 404
    assert "pip install aios-agent-sdk" in refused["error"]["message"]
    agent.end()
