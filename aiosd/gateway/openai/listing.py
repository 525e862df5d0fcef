"""GET /v1/models and /v1/models/{name}."""

from __future__ import annotations

import os
from typing import Any

from aiosd.gateway.openai import fields
from aiosd.gateway.web import HttpRequest, Problem
from libaios.wire import ModelInfo


async def models(request: HttpRequest) -> None:
    await request.reply({"object": "list", "data": [_shown(model) for model in await fields.models(request)]})


async def model(request: HttpRequest) -> None:
    name = request.words["model"]
    for known in await fields.models(request):
        if known.name == name:
            await request.reply(_shown(known))
            return
    raise Problem(404, f"there is no model {name[:80]!r}", param="model", code="model_not_found")


def _shown(model: ModelInfo) -> dict[str, Any]:
    try:
        created = int(os.stat(model.path).st_mtime)
    except OSError:
        created = 0
    return {
        "id": model.name,
        "object": "model",
        "created": created,
        "owned_by": "aiosd",
        "meta": {
            "n_params": model.n_params,
            "n_ctx": model.n_ctx,
            "n_vocab": model.n_vocab,
            "n_embd": model.n_embd,
            "n_slots": model.n_slots,
        },
    }
