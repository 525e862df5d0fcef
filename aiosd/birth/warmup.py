"""Uses the imported modules of a template once, so that agents share what that creates.

Many packages load parts of themselves, compile validators and fill caches only when they are used. So a template makes
a call, as every agent will: otherwise each agent would have all of that in memory of its own. The only package that it
can call is the `openai` client, on which most frameworks for agents are built; a server in a child that is thrown away
answers. Clients, connections and event loops are of no use in another process, and none is left behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

from aiosd.birth.fork import fork

TIME_S = 5.0  # limit of one call
_MESSAGE = {"role": "assistant", "content": "x"}
_USAGE = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}


def use_modules() -> None:
    """Make those calls. If one fails, everything loaded until then stays."""
    uses = [use for name, use in _USES.items() if name in sys.modules]
    if uses:
        with _Server() as url:
            for use in uses:
                with contextlib.suppress(Exception):  # a library of another project may raise any exception
                    use(url)


# ── uses ──────────────────────────────────────────────────────────────────────────────────────────────────


def _use_openai(url: str) -> None:
    import asyncio

    openai: Any = sys.modules["openai"]
    options: dict[str, Any] = {"base_url": url, "api_key": "x", "max_retries": 0, "timeout": TIME_S}
    ask: dict[str, Any] = {"model": "x", "messages": [{"role": "user", "content": "x"}]}

    async def use_async() -> None:
        async with openai.AsyncOpenAI(**options) as client:
            await client.chat.completions.create(**ask)

    with openai.OpenAI(**options) as client:
        client.chat.completions.create(**ask)
        list(client.chat.completions.create(**ask, stream=True))
    asyncio.run(use_async())


_USES: dict[str, Callable[[str], None]] = {"openai": _use_openai}


class _Server:
    """A child that answers every POST like a chat of the OpenAI API."""

    def __enter__(self) -> str:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._child = fork(lambda: _serve(listener))
            return f"http://127.0.0.1:{listener.getsockname()[1]}/v1"

    def __exit__(self, *of_error: object) -> None:
        os.kill(self._child, signal.SIGKILL)
        os.waitpid(self._child, 0)


def _serve(listener: socket.socket) -> int:
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
            body, kind = _answer(bool(asked.get("stream")))
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(listener.getsockname(), Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = listener
    server.serve_forever()
    return 0


def _answer(stream: bool) -> tuple[bytes, str]:
    reply: dict[str, Any] = {"id": "x", "created": 1, "model": "x"}
    if stream:
        choice = {"index": 0, "delta": _MESSAGE, "finish_reason": "stop"}
        chunk = json.dumps(reply | {"object": "chat.completion.chunk", "choices": [choice]})
        return f"data: {chunk}\n\ndata: [DONE]\n\n".encode(), "text/event-stream"
    choice = {"index": 0, "message": _MESSAGE, "finish_reason": "stop"}
    whole = reply | {"object": "chat.completion", "choices": [choice], "usage": _USAGE}
    return json.dumps(whole).encode(), "application/json"


# ── in each agent ─────────────────────────────────────────────────────────────────────────────────────────


def reseed() -> None:
    """Seed numpy's random numbers anew, because a fork copies their state. (Python's own are seeded anew by Python.)"""
    random = sys.modules.get("numpy.random")
    if random is not None:
        random.seed()
