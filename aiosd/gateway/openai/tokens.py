"""POST /tokenize and /detokenize, as llama-server has them."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from aiosd.gateway.calls import ask
from aiosd.gateway.openai import fields, named
from aiosd.gateway.web import HttpRequest
from libaios import wire
from libaios.wire import Sys


class TokenizeRequest(Struct, kw_only=True):
    content: str = ""
    prompt: str | None = None  # as vLLM names it
    model: str | None = None
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeRequest(Struct, kw_only=True):
    tokens: list[int] = []
    model: str | None = None


async def tokenize(request: HttpRequest) -> None:
    asked = fields.read(request, await request.json(), TokenizeRequest)
    request.names = named.of(asked)
    model = await fields.model_for(request, asked.model)
    connection, text = request.account.connection, asked.content if asked.prompt is None else asked.prompt
    args = wire.Tokenize(text, model.name, asked.parse_special, asked.add_special)
    ids = await ask(connection, Sys.TOKENIZE, args, list[int])
    tokens: list[Any] = ids
    if asked.with_pieces:
        apart = wire.Detokenize(ids, model.name, apart=True)
        pieces = await ask(connection, Sys.DETOKENIZE, apart, list[bytes])
        tokens = [{"id": one, "piece": _piece(data)} for one, data in zip(ids, pieces, strict=True)]
    await request.reply({"tokens": tokens, "count": len(ids), "max_model_len": model.n_ctx})


def _piece(data: bytes) -> str | list[int]:
    """The text of a token, or its bytes if these are a part of a character."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)


async def detokenize(request: HttpRequest) -> None:
    asked = fields.read(request, await request.json(), DetokenizeRequest)
    model = await fields.model_for(request, asked.model)
    text = await ask(request.account.connection, Sys.DETOKENIZE, wire.Detokenize(asked.tokens, model.name), str)
    await request.reply({"content": text, "prompt": text})
