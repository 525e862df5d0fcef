"""The fields of a request.

Every field that OpenAI documents is known here, and those of llama-server and vLLM that programs use. A field that
cannot be honoured, and that would change the answer, is a 400 with its name; one that changes nothing is accepted. A
field that is not documented is accepted too, and named in the reply's `x-aios-ignored`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec
from msgspec import UNSET, Struct, UnsetType

from aiosd.gateway import places
from aiosd.gateway.calls import ask
from aiosd.gateway.web import HttpRequest, Problem
from libaios import wire
from libaios.generate import generate_args
from libaios.wire import ModelInfo, Sys

MOST_TOKENS = 1 << 24
MOST_CHOICES = 128
SEEDS = (1 << 63) - 1


class StreamOptions(Struct):
    include_usage: bool | None = None
    include_obfuscation: Any = None  # random padding, which has no effect here


class SamplingFields(Struct, kw_only=True):
    """What chats and completions have in common."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    # of llama-server and vLLM
    top_k: int | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    n_predict: int | None = None
    grammar: str | None = None
    json_schema: dict[str, Any] | bool | None = None
    guided_json: dict[str, Any] | bool | None = None
    guided_grammar: str | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_sequence_breakers: list[str] | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    mirostat: int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    # these change no answer
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    cache_prompt: Any = None
    # these would change it
    typical_p: Any = None
    dynatemp_range: Any = None
    logit_bias_text: Any = None


#: Fields that cannot be honoured: the values that have no effect and are therefore accepted.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "web_search_options": (None,),
    "modalities": (None, ["text"]),
    "verbosity": (None, "medium"),
    "text.verbosity": (None, "medium"),
    "typical_p": (None, 1, 1.0),
    "options.typical_p": (None, 1, 1.0),
    "dynatemp_range": (None, 0, 0.0),
    "logit_bias_text": (None,),
    "moderation": (None,),
    "suffix": (None, ""),
}

F = TypeVar("F", bound=Struct)


def read(request: HttpRequest, value: dict[str, Any], kind: type[F]) -> F:
    """Convert a request into a struct. Raises Problem (400) with the name of the field that is wrong."""
    try:
        fields = msgspec.convert({name: _whole(given) for name, given in value.items()}, kind)
    except msgspec.ValidationError as err:
        place, text = places.of_error(str(err))
        raise Problem(400, f"{place}: {text}" if place else text, param=place or None) from None
    unknown = []
    for name, given, known in _given(value, fields):
        if not known:
            unknown.append(name)
        elif name in NEUTRAL and given not in NEUTRAL[name]:
            raise Problem(400, f"{name}: this server cannot do that", param=name, code="unsupported_parameter")
    if unknown:
        listed = re.sub(r"[^\w,.-]", "?", ",".join(sorted(unknown))[:200], flags=re.ASCII)
        request.extra.append((b"x-aios-ignored", listed.encode()))
    return fields


def _given(value: dict[str, Any], fields: Struct, before: str = "") -> Iterator[tuple[str, Any, bool]]:
    """All fields of a request, inner ones as `text.format`, with their values, and whether they are known here."""
    for name, given in value.items():
        known = name in fields.__struct_fields__
        yield before + name, given, known
        inner = getattr(fields, name) if known else None
        if isinstance(inner, Struct) and isinstance(given, dict):
            yield from _given(given, inner, f"{before}{name}.")


def _whole(value: Any) -> Any:
    """A number without a fraction is an integer in JSON, however it is written."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1 << 53 else value


# ── models ────────────────────────────────────────────────────────────────────────────────────────────────


async def models(request: HttpRequest) -> list[ModelInfo]:
    """The models of the system, the default one first. The list does not change while the system runs."""
    if not request.app.models:
        request.app.models = await ask(request.account.connection, Sys.MODELS, wire.NoArgs(), list[ModelInfo])
    return request.app.models


async def model_for(request: HttpRequest, asked: str | None) -> ModelInfo:
    """The model of that name, else the default one: programs name models that exist elsewhere. The reply names it."""
    known = await models(request)
    asked = request.words.get("engine", asked)
    found = next((model for model in known if model.name == asked), None) or next(iter(known), None)
    if found is None:
        raise Problem(503, "no model is loaded yet", "server_error", headers={"retry-after": "1"})
    return found


# ── sampling ──────────────────────────────────────────────────────────────────────────────────────────────


def options(fields: SamplingFields) -> dict[str, Any]:
    """The options with their names in `libaios.llm`; options that the request does not have keep their defaults
    there."""
    tokens = fields.max_tokens if fields.max_tokens is not None else fields.n_predict
    given: dict[str, Any] = {
        "max_tokens": None if tokens is None or tokens < 0 else min(tokens, MOST_TOKENS),
        "temperature": fields.temperature,
        "top_p": fields.top_p,
        "top_k": None if fields.top_k is None else max(fields.top_k, 0),
        "min_p": fields.min_p,
        "repeat_penalty": _first(fields.repeat_penalty, fields.repetition_penalty),
        "presence_penalty": fields.presence_penalty,
        "frequency_penalty": fields.frequency_penalty,
        "logit_bias": _token_ids(fields.logit_bias),
        "seed": None if fields.seed is None or fields.seed == -1 else fields.seed & SEEDS,
        "stop": fields.stop,
        "stop_tokens": fields.stop_token_ids,
        "ignore_eos": fields.ignore_eos,
        "min_tokens": fields.min_tokens,
        "grammar": _first(fields.grammar, fields.guided_grammar),
        "schema": _first(fields.json_schema, fields.guided_json),
        "dry_multiplier": fields.dry_multiplier,
        "dry_base": fields.dry_base,
        "dry_allowed_length": fields.dry_allowed_length,
        "dry_breakers": fields.dry_sequence_breakers,
        "xtc_probability": fields.xtc_probability,
        "xtc_threshold": fields.xtc_threshold,
        "mirostat": fields.mirostat,
        "mirostat_tau": fields.mirostat_tau,
        "mirostat_eta": fields.mirostat_eta,
        "stream": fields.stream,
    }
    return {name: value for name, value in given.items() if value is not None and value != ""}


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _token_ids(bias: dict[str, float] | None) -> dict[int, float] | None:
    try:
        return None if bias is None else {int(token): value for token, value in bias.items()}
    except ValueError:
        raise Problem(400, "logit_bias: its keys must be token ids", param="logit_bias") from None


def choices(fields: SamplingFields, args: wire.Generate, most: int = MOST_CHOICES) -> list[wire.Generate]:
    """The same `n` times, with seeds one after the other. The prompt is computed once."""
    n = 1 if fields.n is None else fields.n
    if not 1 <= n <= most:
        raise Problem(400, f"n: from 1 to {most}, not {n}", param="n")
    first = args.sampling
    seeds = [(first.seed + i) & SEEDS for i in range(n)]
    replace = msgspec.structs.replace
    return [args if not i else replace(args, sampling=replace(first, seed=seed)) for i, seed in enumerate(seeds)]


def wants_usage(fields: SamplingFields) -> bool:
    if fields.stream_options is None:
        return False
    if not fields.stream:
        raise Problem(400, "stream_options: only with stream", param="stream_options")
    return bool(fields.stream_options.include_usage)


# ── chats ─────────────────────────────────────────────────────────────────────────────────────────────────


class ChatRequest(SamplingFields, kw_only=True):
    messages: list[dict[str, Any]] | UnsetType = UNSET
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: list[dict[str, Any]] | None = None
    function_call: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    prediction: Any = None  # makes an answer faster, and does not change it
    audio: Any = None
    modalities: Any = None
    moderation: Any = None
    verbosity: Any = None
    web_search_options: Any = None


class ChatGeneration(Struct):
    """A chat as it is to be generated. `answer_tool`: the name of a tool that was added; its arguments are the answer
    in the requested form. `functions`: the request used the older fields (`functions`), and so does the reply."""

    args: list[wire.Generate]
    answer_tool: str = ""
    functions: bool = False


ANSWER_TOOL = "final_answer"


def chat(fields: ChatRequest, model: ModelInfo) -> ChatGeneration:
    """Convert a chat request. Raises Problem (400)."""
    if isinstance(fields.messages, UnsetType):
        raise Problem(400, "messages: they are missing", param="messages")
    given = options(fields)
    limit = _first(fields.max_completion_tokens, fields.max_tokens, fields.n_predict)
    given.pop("max_tokens", None)
    if limit is not None and limit >= 0:
        given["max_tokens"] = min(limit, MOST_TOKENS)
    schema = _schema(fields.response_format)
    if schema is not None:
        given["schema"] = schema
    tools, choice = _tools(fields)
    answer_tool = ""
    if tools and given.get("schema") is not None:
        tools, choice, answer_tool = _both(tools, choice, given)
    if tools or choice not in ("auto", "none"):
        given["tools"], given["tool_choice"] = tools, choice
        given["parallel_tool_calls"] = fields.parallel_tool_calls is not False and fields.functions is None
    if fields.top_logprobs and not fields.logprobs:
        raise Problem(400, "top_logprobs: only with logprobs", param="top_logprobs")
    if fields.logprobs:
        given["logprobs"], given["top_logprobs"] = True, fields.top_logprobs or 0
    args = generate_args(_messages(fields.messages), None, model=model.name, template_args=_template(fields), **given)
    return ChatGeneration(choices(fields, args), answer_tool, fields.functions is not None)


def _schema(form: dict[str, Any] | None) -> dict[str, Any] | bool | None:
    if form is None:
        return None
    match form.get("type"):
        case "text":
            return None
        case "json_object":
            schema = form.get("schema", {"type": "object"})  # llama-server takes a schema here
        case "json_schema":
            inner = form.get("json_schema", form)
            schema = inner.get("schema") if isinstance(inner, dict) else None
        case other:
            raise Problem(
                400, f"response_format: type must be text, json_object or json_schema, not {other!r:.60}",
                param="response_format",
            )  # fmt: skip
    if not isinstance(schema, dict | bool):
        raise Problem(400, "response_format: json_schema has no schema", param="response_format")
    return schema


def _tools(fields: ChatRequest) -> tuple[list[dict[str, Any]], str | dict[str, Any]]:
    """The tools, and which of them is to be called."""
    tools, choice = fields.tools or [], _first(fields.tool_choice, "auto")
    if fields.functions is not None:
        if fields.tools:
            raise Problem(400, "functions: not together with tools", param="functions")
        tools = [{"type": "function", "function": function} for function in fields.functions]
        choice = _first(fields.function_call, "auto")
    for i, tool in enumerate(tools):
        if tool.get("type", "function") != "function":
            raise Problem(400, f"tools[{i}].type: only functions, not {tool['type']!r:.60}", param=f"tools[{i}].type")
    tools = [_not_strict(tool) for tool in tools]
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        return _allowed(tools, choice.get("allowed_tools", choice))
    if isinstance(choice, dict) and choice.get("type", "function") != "function":
        raise Problem(400, f"tool_choice: only functions, not {choice['type']!r:.60}", param="tool_choice")
    return tools, choice


def _not_strict(tool: dict[str, Any]) -> dict[str, Any]:
    """The tool without the parts of its schema that no grammar can express. In this API arguments need not fit the
    schema unless the tool is `strict`, so checking them is left to the program; the request is not refused."""
    function = tool.get("function", tool)
    if not isinstance(function, dict) or function.get("strict"):
        return tool
    loose = {**function, "strict": False}
    return {**tool, "function": loose} if "function" in tool else loose


def _allowed(tools: list[dict[str, Any]], allowed: Any) -> tuple[list[dict[str, Any]], str]:
    try:
        kept = _which(tools, allowed)
        mode = allowed.get("mode", "auto")
    except (AttributeError, KeyError, TypeError):
        raise Problem(400, "tool_choice: allowed_tools needs mode and tools", param="tool_choice") from None
    if not kept or not isinstance(mode, str):
        raise Problem(400, "tool_choice: none of the allowed tools is among the tools", param="tool_choice")
    return [tools[i] for i in kept], mode


def _which(tools: list[dict[str, Any]], allowed: Any) -> list[int]:
    """The numbers of the allowed tools. Raises AttributeError, KeyError, TypeError if `allowed` has another form."""
    names = {entry.get("function", entry)["name"] for entry in allowed["tools"]}
    return [i for i, tool in enumerate(tools) if tool.get("function", tool)["name"] in names]


def order_of_tools(fields: ChatRequest) -> list[int]:
    """For each tool that is sent to the kernel, its number in the request."""
    tools, choice = _first(fields.tools or None, fields.functions, []), fields.tool_choice
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        return _which(tools, choice.get("allowed_tools", choice))
    return list(range(len(tools)))


def _both(
    tools: list[dict[str, Any]], choice: str | dict[str, Any], given: dict[str, Any]
) -> tuple[list[dict[str, Any]], str | dict[str, Any], str]:
    """Tools together with a schema for the answer. If the model may choose, the answer becomes a tool of its own, and
    one of all these tools must be called; the program gets that tool's arguments as the answer."""
    if choice == "none":
        return [], "none", ""
    schema = given.pop("schema")
    if choice != "auto":
        return tools, choice, ""
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        raise Problem(400, "response_format: with tools only a schema of type object", param="response_format")
    names = {tool.get("function", tool).get("name") for tool in tools}
    name = ANSWER_TOOL
    while name in names:
        name += "_"
    function = {"name": name, "description": "Give the final answer to the user.", "parameters": schema}
    return [*tools, {"type": "function", "function": function}], "required", name


def _template(fields: ChatRequest) -> dict[str, Any]:
    args = dict(fields.chat_template_kwargs or {})
    if fields.reasoning_effort is not None:
        args.setdefault("reasoning_effort", fields.reasoning_effort)
        args.setdefault("enable_thinking", fields.reasoning_effort != "none")
    return args


def _messages(given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages as the kernel takes them. Errors in one are found there, where the model's template is known."""
    for i, message in enumerate(given):
        if message.get("audio") is not None:  # refers to an earlier answer in audio, which does not exist here
            raise Problem(400, f"messages[{i}].audio: this server cannot do that", param=f"messages[{i}].audio")
    return [_message(message) for message in given]


PARTS = ("role", "content", "name", "tool_calls", "tool_call_id")


def _message(message: dict[str, Any]) -> dict[str, Any]:
    known = {name: message[name] for name in PARTS if name in message}
    thoughts = _first(message.get("reasoning_content"), message.get("reasoning"))
    if isinstance(thoughts, str):
        known["reasoning"] = thoughts
    old = message.get("function_call")
    if old is not None and not known.get("tool_calls"):
        known["tool_calls"] = [old]
    if known.get("content") is None and not known.get("tool_calls") and isinstance(message.get("refusal"), str):
        known["content"] = message["refusal"]
    if isinstance(known.get("content"), list):
        known["content"] = [_part(part) for part in known["content"]]
    return {name: value for name, value in known.items() if value is not None or name == "content"}


def _part(part: Any) -> Any:
    """A part of a message; an assistant's refusal becomes plain text."""
    if isinstance(part, dict) and part.get("type") == "refusal" and isinstance(part.get("refusal"), str):
        return {"type": "text", "text": part["refusal"]}
    return part
