"""The API of AIOS's kernel, as Cerebrum's SDK speaks it: POST /query, GET /core/llms/list, GET /status.

A query names an agent, which is only a label here: the caller's identity comes from the token in CEREBRUM_KERNEL_URL.
An error in a query is reported in its reply (`error`, `status_code`), as the SDK expects; HTTP's own errors are for
requests that are not valid queries.
"""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from msgspec import Struct
from msgspec.structs import replace

from aiosd.gateway import filing
from aiosd.gateway.calls import ask
from aiosd.gateway.filing import checked, storage
from aiosd.gateway.openai import fields, generation
from aiosd.gateway.web import HttpRequest, Problem, encode, problem_of
from libaios import wire
from libaios.generate import Result
from libaios.wire import Sys

#: Under this name a note has the whole metadata of a memory as JSON: a note's metadata are flat, Cerebrum's are not.
METADATA = "cerebrum"
#: Names of Cerebrum's tools are `author/name`; function names cannot contain a slash.
SLASH = "__"


class Query(Struct, kw_only=True):
    query_type: Literal["llm", "memory", "storage", "tool"]
    agent_name: str = ""
    query_data: dict[str, Any]


class LlmQuery(Struct, kw_only=True):
    query_class: Any = None  # the same as query_type
    messages: list[dict[str, Any]]
    llms: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    action_type: Literal["chat", "chat_with_json_output", "chat_with_tool_call_output", "call_tool", "operate_file"] = (
        "chat"
    )
    temperature: float | None = None
    max_new_tokens: int | None = None
    message_return_type: str | None = None
    response_format: dict[str, Any] | None = None


class MemoryQuery(Struct, kw_only=True):
    query_class: Any = None
    operation_type: str
    params: dict[str, Any] = {}


class ToolQuery(Struct, kw_only=True):
    query_class: Any = None
    tool_calls: list[dict[str, Any]] = []


async def query(request: HttpRequest) -> None:
    asked = fields.read(request, await request.json(), Query)
    kind: str = asked.query_type
    began = time.time()
    try:
        answer = await _KINDS[kind](request, asked.query_data)
    except OSError as err:
        answer = _failed(kind, problem_of(err))
    except Problem as problem:
        answer = _failed(kind, problem)
    took = time.time() - began
    await request.reply(
        {
            "response": {"response_class": kind, **answer},
            "start_times": [began],
            "end_times": [began + took],
            "waiting_times": [0.0],
            "turnaround_times": [took],
        }
    )


def _failed(kind: str, problem: Problem) -> dict[str, Any]:
    if kind == "memory":
        return _memory(success=False, error=problem.message)
    failed = {"response_message": None, "finished": True, "error": problem.message, "status_code": problem.status}
    return {**failed, "tool_calls": None} if kind == "llm" else failed


# ── llm ───────────────────────────────────────────────────────────────────────────────────────────────────


async def _llm(request: HttpRequest, data: dict[str, Any]) -> dict[str, Any]:
    asked = fields.read(request, data, LlmQuery)
    if asked.action_type == "operate_file":
        return await _operate(request, asked)
    result = await _generate(request, asked)
    calls = [
        {"name": call.name.replace(SLASH, "/"), "parameters": call.arguments, "id": call.id, "type": "function"}
        for call in result.tool_calls
    ]
    text: str | None = result.text if result.text or not calls else None
    if asked.action_type == "call_tool" and calls:
        text = await _run_tools(request, calls)
    return {"response_message": text, "tool_calls": calls or None, "finished": True, "error": None, "status_code": 200}


async def _operate(request: HttpRequest, asked: LlmQuery) -> dict[str, Any]:
    """Let the model choose file operations, and carry them out. The answer is the result of each operation in the words
    of the store: a summary by another model could claim that an operation was done when it was not."""
    messages = [{"role": "system", "content": filing.PARSER}, *asked.messages]
    result = await _generate(request, replace(asked, messages=messages, tools=filing.TOOLS, action_type="call_tool"))
    if not result.tool_calls:
        raise Problem(422, "operate_file: the model has not chosen an operation within max_new_tokens")
    done = [await filing.do(request, call.name, call.arguments) for call in result.tool_calls]
    message = "\n".join(done)
    return {"response_message": message, "tool_calls": None, "finished": True, "error": None, "status_code": 200}


async def _generate(request: HttpRequest, asked: LlmQuery) -> Result:
    named = next(iter(asked.llms or ()), {})
    form = asked.response_format
    if form is None and asked.action_type == "chat_with_json_output":
        form = {"type": "json_object"}
    with_tools = asked.action_type in ("chat_with_tool_call_output", "call_tool")
    tools = [_tool(tool) for tool in asked.tools or ()] if with_tools else []
    model = await fields.model_for(request, named.get("name") if isinstance(named, dict) else None)
    chat = fields.ChatRequest(
        messages=asked.messages,
        max_tokens=asked.max_new_tokens,
        temperature=asked.temperature,
        tools=tools,
        tool_choice="required" if tools and asked.action_type == "call_tool" else None,
        response_format=form if not tools else None,
    )
    (result,) = await generation.results(request, fields.chat(chat, model).args)
    return result


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    function = tool.get("function", tool)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Problem(400, "tools: one has no name", param="tools")
    return {"type": "function", "function": {**function, "name": function["name"].replace("/", SLASH)}}


# ── tools ─────────────────────────────────────────────────────────────────────────────────────────────────


async def _tools(request: HttpRequest, data: dict[str, Any]) -> dict[str, Any]:
    asked = fields.read(request, data, ToolQuery)
    text = await _run_tools(request, asked.tool_calls)
    return {"response_message": text, "finished": True, "error": None, "status_code": 200}


async def _run_tools(request: HttpRequest, calls: list[dict[str, Any]]) -> str:
    """Make the calls one after the other, as they may depend on each other. Raises OSError."""
    results = []
    for call in calls:
        name, given = call.get("name"), call.get("parameters") or {}
        if not isinstance(name, str) or not isinstance(given, dict):
            raise Problem(400, "tool_calls: each needs a name and parameters", param="tool_calls")
        args = wire.CallTool(name.rpartition("/")[2], given)
        result = await ask(request.account.connection, Sys.TOOL_CALL, args, Any)
        results.append(result if isinstance(result, str) else encode(result).decode())
    return "\n".join(results)


# ── memory ────────────────────────────────────────────────────────────────────────────────────────────────


async def _memories(request: HttpRequest, data: dict[str, Any]) -> dict[str, Any]:
    asked = fields.read(request, data, MemoryQuery)
    operation = _OPERATIONS.get(asked.operation_type)
    if operation is None:
        message = f"operation_type: {asked.operation_type[:60]!r} is none of {', '.join(_OPERATIONS)}"
        raise Problem(400, message, param="operation_type")
    return await operation(request, asked.params)


def _memory(
    note: wire.Note | None = None,
    found: list[dict[str, Any]] | None = None,
    ident: str | None = None,
    success: bool = True,
    error: str | None = None,
) -> dict[str, Any]:
    return {
        "memory_id": str(note.id) if note is not None else ident,
        "content": note.text if note is not None else None,
        "metadata": _metadata(note) if note is not None else None,
        "search_results": found,
        "success": success,
        "error": error,
    }


def _metadata(note: wire.Note) -> dict[str, Any]:
    kept = note.metadata.get(METADATA)
    return dict(json.loads(kept)) if isinstance(kept, str) else {**note.metadata, "tags": note.tags}


def _kept(metadata: Any) -> tuple[list[str], dict[str, Any]]:
    """The tags, by which notes can be found, and all of the metadata."""
    if metadata is None:
        return [], {}
    if not isinstance(metadata, dict):
        raise Problem(400, "metadata: an object", param="metadata")
    tags = metadata.get("tags") or []
    return [str(tag) for tag in tags] if isinstance(tags, list) else [str(tags)], {METADATA: encode(metadata).decode()}


def _text(params: dict[str, Any]) -> str:
    content = params.get("content")
    if not isinstance(content, str):
        raise Problem(400, "content: a text", param="content")
    return content


def _ident(params: dict[str, Any]) -> int:
    try:
        return int(params.get("memory_id", ""))
    except (TypeError, ValueError):
        raise wire.error(errno.ENOENT, f"{params.get('memory_id')!r:.60}: no such memory") from None


async def _add(request: HttpRequest, params: dict[str, Any]) -> dict[str, Any]:
    tags, metadata = _kept(params.get("metadata"))
    args = checked(wire.MemAdd(_text(params), tags=tags, metadata=metadata))
    ident = await ask(request.account.connection, Sys.MEM_ADD, args, int)
    return _memory(ident=str(ident))


async def _get(request: HttpRequest, params: dict[str, Any]) -> dict[str, Any]:
    return _memory(await ask(request.account.connection, Sys.MEM_GET, wire.MemGet(_ident(params)), wire.Note))


async def _update(request: HttpRequest, params: dict[str, Any]) -> dict[str, Any]:
    given = params.get("metadata")
    tags, metadata = _kept(given)
    text = _text(params) if params.get("content") is not None else None
    whole = (tags, metadata) if given is not None else (None, None)
    args = checked(wire.MemUpdate(_ident(params), text, *whole))
    await ask(request.account.connection, Sys.MEM_UPDATE, args, int)
    return _memory(ident=str(_ident(params)))


async def _remove(request: HttpRequest, params: dict[str, Any]) -> dict[str, Any]:
    await ask(request.account.connection, Sys.MEM_REMOVE, wire.MemGet(_ident(params)), None)
    return _memory(ident=str(_ident(params)))


async def _search(request: HttpRequest, params: dict[str, Any]) -> dict[str, Any]:
    k = params.get("k", 5)
    args = checked(wire.MemSearch(_text(params), k if isinstance(k, int) else 5))
    found = await ask(request.account.connection, Sys.MEM_SEARCH, args, list[wire.Found])
    return _memory(found=[_found(one) for one in found])


def _found(one: wire.Found) -> dict[str, Any]:
    metadata = _metadata(one.note)
    return {
        "memory_id": str(one.note.id),
        "content": one.note.text,
        "keywords": metadata.get("keywords", []),
        "tags": metadata.get("tags", one.note.tags),
        "category": metadata.get("category", ""),
        "timestamp": metadata.get("timestamp", one.note.created),
        "metadata": metadata,
        "score": one.score,
    }


Operation = Callable[[HttpRequest, dict[str, Any]], Awaitable[dict[str, Any]]]

_OPERATIONS: dict[str, Operation] = {
    "add_memory": _add,
    "add_agentic_memory": _add,
    "get_memory": _get,
    "update_memory": _update,
    "remove_memory": _remove,
    "delete_memory": _remove,
    "retrieve_memory": _search,
    "retrieve_memory_raw": _search,
}


_KINDS: dict[str, Operation] = {"llm": _llm, "memory": _memories, "storage": storage, "tool": _tools}


# ── about the system ──────────────────────────────────────────────────────────────────────────────────────


async def llms(request: HttpRequest) -> None:
    listed = [{"name": model.name, "backend": "aiosd"} for model in await fields.models(request)]
    await request.reply({"status": "success", "llms": listed})


async def status(request: HttpRequest) -> None:
    parts = dict.fromkeys(("llm", "memory", "storage", "tool", "factory"), "active")
    await request.reply({**parts, "status": "ok", "message": "All components active", "components": parts})


async def setup(request: HttpRequest) -> None:
    """The older SDK sets up each part before it uses it. Here nothing is to be done: all parts started with the
    system."""
    await request.body()
    await request.reply({"status": "success", "message": f"{request.words['part'][:40]} is ready"})
