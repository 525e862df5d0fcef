"""Which function answers which path."""

from __future__ import annotations

from dataclasses import replace

from aiosd.gateway import cerebrum, health, ollama, submitted
from aiosd.gateway.openai import chat, completions, embeddings, kept, listing, responses, tokens
from aiosd.gateway.web import Route, RouteHandler, route

#: What may precede a path of OpenAI's API: nothing, a version, or an engine (older clients send that).
PREFIX = r"(?:/v1)?(?:/(?:engines|openai/deployments)/{engine})?"
VERSION = r"(?:/v1)?"


def _openai(method: str, path: str, handler: RouteHandler) -> Route:
    return replace(route(method, path, handler, before=PREFIX), name=f"/v1{path.replace(':path', '')}")


def _ollama(method: str, path: str, handler: RouteHandler, open: bool = False) -> Route:
    return route(method, "/api" + path, handler, open, ollama.error)


ROUTES = [
    route("GET", "/health", health.health, open=True, before=VERSION),
    route("GET", "/metrics", health.metrics, open=True),
    _openai("POST", "/chat/completions", chat.complete),
    _openai("POST", "/completions", completions.complete),
    _openai("POST", "/responses", responses.create),
    _openai("POST", "/responses/input_tokens", responses.count),
    _openai("GET", "/responses/{response}", kept.get),
    _openai("DELETE", "/responses/{response}", kept.delete),
    _openai("POST", "/responses/{response}/cancel", kept.cancel),
    _openai("GET", "/responses/{response}/input_items", kept.input_items),
    _openai("POST", "/embeddings", embeddings.embed),
    _openai("POST", "/tokenize", tokens.tokenize),
    _openai("POST", "/detokenize", tokens.detokenize),
    _openai("GET", "/models", listing.models),
    _openai("GET", "/models/{model:path}", listing.model),
    route("POST", "/query", cerebrum.query),
    route("GET", "/core/llms/list", cerebrum.llms),
    route("GET", "/status", cerebrum.status, before="(?:/core)?"),
    route("POST", "/core/{part}/setup", cerebrum.setup),
    route("POST", "/agents/submit", submitted.submit),
    route("GET", "/agents/ps", submitted.ps),
    route("GET", "/agents/{pid}/status", submitted.status),
    replace(route("GET", "", ollama.here, open=True), name="/"),
    _ollama("POST", "/chat", ollama.chat),
    _ollama("POST", "/generate", ollama.generate),
    _ollama("POST", "/embed", ollama.embed),
    _ollama("POST", "/embeddings", ollama.embeddings),
    _ollama("POST", "/show", ollama.show),
    _ollama("GET", "/tags", ollama.tags),
    _ollama("GET", "/ps", ollama.running),
    _ollama("GET", "/version", ollama.version, open=True),
]
