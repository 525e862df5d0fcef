"""The API of Ollama: /api/chat, /api/generate, /api/embed, /api/tags, /api/show, /api/ps, /api/version.

A request is translated into the fields of OpenAI's API, and the rest of the work is shared with that. Replies are lines
of JSON unless `stream` is false.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from msgspec import Struct

from aiosd.gateway.calls import ask
from aiosd.gateway.openai import fields, generation, named
from aiosd.gateway.openai.chat import FINISH, logprobs
from aiosd.gateway.places import split
from aiosd.gateway.web import HttpRequest, Problem, encode, renaming
from libaios import wire
from libaios.generate import Piece, generate_args
from libaios.wire import ModelInfo, Sys, ToolCall

VERSION = "0.12.0"  # the version of Ollama whose API this is
LINES = b"application/x-ndjson"


class Options(Struct, kw_only=True):
    num_predict: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    mirostat: int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    # how the model is loaded: decided by the system's settings
    num_ctx: Any = None
    num_batch: Any = None
    num_gpu: Any = None
    main_gpu: Any = None
    num_thread: Any = None
    num_keep: Any = None
    numa: Any = None
    use_mmap: Any = None
    use_mlock: Any = None
    low_vram: Any = None
    # would change the answer
    typical_p: Any = None


class Common(Struct, kw_only=True):
    model: str | None = None
    options: Options | None = None
    format: str | dict[str, Any] | None = None
    stream: bool | None = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    keep_alive: Any = None
    truncate: Any = None  # nothing is truncated here: a text that is too long is an error
    shift: Any = None


class OllamaChat(Common, kw_only=True):
    messages: list[dict[str, Any]] = []
    tools: list[dict[str, Any]] | None = None


class OllamaGenerate(Common, kw_only=True):
    prompt: str = ""
    system: str | None = None
    raw: bool = False
    suffix: str | None = None
    images: list[str] | None = None
    context: list[int] | None = None
    template: str | None = None


class OllamaEmbed(Struct, kw_only=True):
    model: str | None = None
    input: str | list[str] = []
    prompt: str | None = None  # the text of the older /api/embeddings
    truncate: bool | None = None
    dimensions: int | None = None
    options: Any = None
    keep_alive: Any = None


class Named(Struct, kw_only=True):
    model: str | None = None
    name: str | None = None
    verbose: Any = None


def error(problem: Problem) -> dict[str, Any]:
    return {"error": problem.message}


# ── texts ─────────────────────────────────────────────────────────────────────────────────────────────────


async def chat(request: HttpRequest) -> None:
    asked = fields.read(request, await request.json(), OllamaChat)
    request.names = lambda place: "messages" if place == "prompt" else _names(place)
    model = await _model(request, asked.model)
    if not asked.messages:
        await _loaded(request, model, "message")
        return
    await _answer(request, asked, model, _chat(asked, [_message(one) for one in asked.messages], asked.tools, model))


async def generate(request: HttpRequest) -> None:
    asked = fields.read(request, await request.json(), OllamaGenerate)
    request.names = lambda place: "prompt" if place.startswith("messages") else _names(place)
    for name in ("suffix", "images", "context", "template"):
        if getattr(asked, name):
            raise Problem(400, f"{name}: this server cannot do that", param=name)
    model = await _model(request, asked.model)
    if not asked.prompt:
        await _loaded(request, model, "response")
        return
    if asked.raw:
        given = fields.options(_sampling(asked, json_schema=_schema(asked)))
        if asked.logprobs:
            given["logprobs"], given["top_logprobs"] = True, asked.top_logprobs or 0
        args = generate_args(None, asked.prompt, model=model.name, **given)
        await _answer(request, asked, model, fields.ChatGeneration([args]), "response")
        return
    messages = [{"role": "system", "content": asked.system}] if asked.system else []
    messages.append({"role": "user", "content": asked.prompt})
    await _answer(request, asked, model, _chat(asked, messages, None, model), "response")


async def _model(request: HttpRequest, name: str | None) -> ModelInfo:
    """Programs add `:latest` to a name without a version."""
    if name is not None and all(known.name != name for known in await fields.models(request)):
        name = name.removesuffix(":latest")
    return await fields.model_for(request, name)


async def _loaded(request: HttpRequest, model: ModelInfo, part: str) -> None:
    """Answer a request without a prompt, which only wants the model to be loaded: it is loaded always."""
    body = LinesForm(model.name, fields.ChatGeneration([]), part).shown("", "", [])
    await request.reply({**body, "done": True, "done_reason": "load"})


#: Names that differ from those of OpenAI's API and of the kernel.
NAMES = {"max_tokens": "options.num_predict", "n_predict": "options.num_predict", "template_args": "think"}
NAMES |= {"response_format": "format", "schema": "format"}


def _names(place: str) -> str:
    root, rest = split(place)
    name = f"options.{root}" if root in Options.__struct_fields__ else NAMES.get(root, root)
    return name + rest


def _message(message: dict[str, Any]) -> dict[str, Any]:
    if message.get("images"):
        raise Problem(400, "images: this server cannot do that", param="images")
    known: dict[str, Any] = {name: message[name] for name in ("role", "content", "tool_calls") if name in message}
    if isinstance(message.get("thinking"), str):
        known["reasoning"] = message["thinking"]
    return known


def _chat(
    asked: Common, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, model: ModelInfo
) -> fields.ChatGeneration:
    schema = _schema(asked)
    form = None if schema is None else {"type": "json_schema", "json_schema": {"schema": schema}}
    chances = {"logprobs": asked.logprobs, "top_logprobs": asked.top_logprobs}
    chat = _sampling(asked, fields.ChatRequest, messages=messages, tools=tools, response_format=form, **chances)
    assert isinstance(chat, fields.ChatRequest)
    if asked.think is not None:
        chat.chat_template_kwargs = {"enable_thinking": bool(asked.think)}
    with renaming(_names):
        return fields.chat(chat, model)


def _schema(asked: Common) -> dict[str, Any] | None:
    if isinstance(asked.format, str) and asked.format not in ("", "json"):
        raise Problem(400, "format: json, or a schema", param="format")
    if isinstance(asked.format, str):
        return {"type": "object"} if asked.format else None
    return asked.format


def _sampling(
    asked: Common, kind: type[fields.SamplingFields] = fields.SamplingFields, **more: Any
) -> fields.SamplingFields:
    given = asked.options or Options()
    same = {name: getattr(given, name) for name in given.__struct_fields__ if name in kind.__struct_fields__}
    return kind(stream=asked.stream is not False, n_predict=given.num_predict, **same, **more)


async def _answer(
    request: HttpRequest, asked: Common, model: ModelInfo, chat: fields.ChatGeneration, part: str = "message"
) -> None:
    form = LinesForm(model.name, chat, part)
    if asked.stream is not False:
        await generation.stream(request, chat.args, form)
        return
    (result,) = await generation.results(request, chat.args)
    form.begin(result.model)
    body = form.shown(result.text, result.reasoning, result.tool_calls, result.logprobs)
    await request.reply({**body, **form.last(result.finish_reason, result.usage)})


class LinesForm:
    """One JSON object a line. `part`: the field that has the text, "message" or "response"."""

    kind = LINES
    comment = b""  # there is none: every line would be taken for a part of the answer

    def __init__(self, model: str, chat: fields.ChatGeneration, part: str) -> None:
        self._model, self._chat, self._part = model, chat, part
        self._since = time.monotonic()
        self._reason = ""

    def begin(self, model: str) -> bytes:
        self._model = model or self._model
        return b""

    def piece(self, index: int, piece: Piece) -> bytes:
        made = b""
        if piece.text or piece.reasoning or piece.tool_calls or piece.logprobs:
            shown = self.shown(piece.text, piece.reasoning, piece.tool_calls, piece.logprobs)
            made = encode({**shown, "done": False}) + b"\n"
        if piece.finish_reason is not None:
            self._reason = piece.finish_reason
        return made

    def end(self, usages: Sequence[wire.Usage]) -> bytes:
        return encode({**self.shown("", "", []), **self.last(self._reason, usages[0])}) + b"\n"

    def shown(
        self, text: str, thoughts: str, calls: Sequence[ToolCall], chances: wire.Logprobs | None = None
    ) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self._model, "created_at": _now()}
        if chances:
            body["logprobs"] = logprobs(chances)
        answers = [call for call in calls if call.name == self._chat.answer_tool]
        text += "".join(encode(call.arguments).decode() for call in answers)
        if self._part == "response":
            return {**body, "response": text, **({"thinking": thoughts} if thoughts else {})}
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if thoughts:
            message["thinking"] = thoughts
        if len(calls) > len(answers):
            others = [call for call in calls if call not in answers]
            message["tool_calls"] = [
                {"id": call.id, "function": {"index": i, "name": call.name, "arguments": call.arguments}}
                for i, call in enumerate(others)
            ]
        return {**body, "message": message}

    def last(self, reason: str, usage: wire.Usage) -> dict[str, Any]:
        reason = FINISH.get(reason, "stop")
        return {
            "done": True,
            "done_reason": "stop" if reason == "tool_calls" else reason,
            "total_duration": int((time.monotonic() - self._since) * 1e9),
            "load_duration": 0,
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": int(usage.prefill_s * 1e9),
            "eval_count": usage.completion_tokens,
            "eval_duration": int(usage.decode_s * 1e9),
        }


def _now() -> str:
    return _written(datetime.now(UTC))


def _written(when: datetime) -> str:
    return when.isoformat().replace("+00:00", "Z")


# ── vectors ───────────────────────────────────────────────────────────────────────────────────────────────


async def embed(request: HttpRequest) -> None:
    asked = fields.read(request, await request.json(), OllamaEmbed)
    model, vectors, tokens = await _vectors(request, asked)
    if asked.dimensions not in (None, model.n_embd):
        raise Problem(400, f"dimensions: this model's vectors have {model.n_embd}", param="dimensions")
    durations = {"total_duration": 0, "load_duration": 0}
    await request.reply({"model": model.name, "embeddings": vectors, **durations, "prompt_eval_count": tokens})


async def embeddings(request: HttpRequest) -> None:
    """The older form, for one text."""
    asked = fields.read(request, await request.json(), OllamaEmbed)
    _, vectors, _ = await _vectors(request, asked)
    await request.reply({"embedding": vectors[0]})


async def _vectors(request: HttpRequest, asked: OllamaEmbed) -> tuple[ModelInfo, list[list[float]], int]:
    request.names = named.of(asked)
    given = asked.input or asked.prompt
    texts = [given] if isinstance(given, str) else given
    if not texts:
        raise Problem(400, "input: it is missing, or empty", param="input")
    model = await _model(request, asked.model)
    found: wire.Embedded = await ask(
        request.account.connection, Sys.EMBED, wire.Embed(texts, model.name), wire.Embedded
    )
    rows = struct.iter_unpack(f"<{found.d}f", found.data)
    return model, [list(row) for row in rows], found.prompt_tokens


# ── models ────────────────────────────────────────────────────────────────────────────────────────────────


async def tags(request: HttpRequest) -> None:
    await request.reply({"models": [_listed(model) for model in await fields.models(request)]})


async def running(request: HttpRequest) -> None:
    """The models in this machine's memory: no routes, and none that is elsewhere."""
    forever = "9999-12-31T23:59:59Z"
    here = [model for model in await fields.models(request) if not model.route and not model.url]
    listed = [
        {**_listed(model), "expires_at": forever, "size_vram": 0, "context_length": model.n_ctx} for model in here
    ]
    await request.reply({"models": listed})


async def show(request: HttpRequest) -> None:
    asked = fields.read(request, await request.json(), Named)
    model = await _model(request, asked.model or asked.name)
    known = {
        "general.name": model.name,  # a name that no model has stands for the default one
        "general.parameter_count": model.n_params,
        "llama.context_length": model.n_ctx,
        "llama.embedding_length": model.n_embd,
    }
    capabilities = ["completion", "embedding", *(["tools"] if model.chat else [])]
    details = _listed(model)["details"]
    await request.reply(
        {
            "modelfile": "",
            "parameters": f"num_ctx {model.n_ctx}",
            "template": "",
            "details": details,
            "model_info": known,
            "capabilities": capabilities,
        }
    )


async def here(request: HttpRequest) -> None:
    """The reply that programs check before their first request."""
    await request.reply_bytes(b"aiosd: Ollama is running", b"text/plain")


async def version(request: HttpRequest) -> None:
    await request.reply({"version": VERSION})


def _listed(model: ModelInfo) -> dict[str, Any]:
    details = {
        "format": "gguf",
        "family": "llama",
        "families": ["llama"],
        "parameter_size": f"{model.n_params / 1e6:.0f}M",
        "quantization_level": "",
    }
    try:
        about = os.stat(model.path)
        size, since = about.st_size, datetime.fromtimestamp(about.st_mtime, UTC)
    except OSError:
        size, since = 0, datetime.fromtimestamp(0, UTC)
    head = {"name": model.name, "model": model.name, "modified_at": _written(since)}
    return {**head, "size": size, "digest": "", "details": details}
