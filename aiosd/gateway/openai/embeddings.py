"""POST /v1/embeddings."""

from __future__ import annotations

import base64
import struct
from typing import Any

from msgspec import UNSET, Struct, UnsetType

from aiosd.gateway.calls import ask
from aiosd.gateway.openai import fields, named
from aiosd.gateway.web import HttpRequest, Problem
from libaios import wire
from libaios.wire import Sys


class Embedding(Struct, kw_only=True):
    input: str | list[str | int | list[int]] | UnsetType = UNSET
    model: str | None = None
    encoding_format: str | None = None
    dimensions: int | None = None
    user: Any = None


async def embed(request: HttpRequest) -> None:
    asked = fields.read(request, await request.json(), Embedding)
    request.names = named.of(asked)
    texts = _texts(asked.input)
    if asked.encoding_format not in (None, "float", "base64"):
        raise Problem(400, "encoding_format: float or base64", param="encoding_format")
    model = await fields.model_for(request, asked.model)
    found: wire.Embedded = await ask(
        request.account.connection, Sys.EMBED, wire.Embed(texts, model.name), wire.Embedded
    )
    if asked.dimensions not in (None, found.d):
        raise Problem(400, f"dimensions: this model's vectors have {found.d}", param="dimensions")
    request.app.counters.prompt_tokens += found.prompt_tokens
    form = _base64 if asked.encoding_format == "base64" else _floats
    size = 4 * found.d
    vectors = [form(found.data[at : at + size]) for at in range(0, len(found.data), size)]
    await request.reply(
        {
            "object": "list",
            "data": [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(vectors)],
            "model": model.name,
            "usage": {"prompt_tokens": found.prompt_tokens, "total_tokens": found.prompt_tokens},
        }
    )


def _texts(value: str | list[str | int | list[int]] | UnsetType) -> list[str]:
    if isinstance(value, UnsetType) or value in ("", []):
        what = "missing" if isinstance(value, UnsetType) else "empty"
        raise Problem(400, f"input: it is {what}", param="input")
    texts = [value] if isinstance(value, str) else value
    if not all(isinstance(text, str) for text in texts):
        # Programs make token ids with a tokenizer of OpenAI's: here they would be other words, without any error.
        message = "input: give texts; token ids are another model's (LangChain: check_embedding_ctx_length=False)"
        raise Problem(400, message, param="input")
    return [text for text in texts if isinstance(text, str)]


def _floats(data: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(data) // 4}f", data))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
