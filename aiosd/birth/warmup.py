"""What a template does so that agents find more than the modules that were named.

Many packages load parts of themselves only when these are used. `lazily_loaded` finds out which, by using the package
in a child that is thrown away: the template itself imports modules and makes no calls, because clients, connections and
event loops are of no use in another process.

There is one such use: a call of the `openai` client, on which most frameworks for agents are built, against a server in
the child.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from aiosd.birth.fork import fork

TIME_S = 20  # of the child
_MESSAGE = {"role": "assistant", "content": "x"}
_USAGE = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}


def lazily_loaded() -> list[str]:
    """Names of modules that are loaded when the imported packages are used. Nothing is left of the use."""
    uses = [use for name, use in _USES.items() if name in sys.modules]
    if not uses:
        return []
    reading, writing = os.pipe()
    child = fork(lambda: _in_child(uses, writing))
    os.close(writing)
    with open(reading, encoding="utf-8") as pipe:
        names = pipe.read().split()
    os.waitpid(child, 0)
    return names


def _in_child(uses: list[Callable[[], None]], writing: int) -> int:
    signal.alarm(TIME_S)  # a use that hangs ends the child, and nothing more is imported
    before = set(sys.modules)
    for use in uses:
        with contextlib.suppress(BaseException):  # what was loaded before it failed is loaded
            use()
    new = [name for name in list(sys.modules) if name not in before and _is_importable(name)]
    os.write(writing, "\n".join(new).encode()[:65536])
    return 0


def _is_importable(name: str) -> bool:
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return getattr(spec, "name", None) == name and name not in _SERVER


# ── uses ──────────────────────────────────────────────────────────────────────────────────────────────────

#: What only the server below needs.
_SERVER = ("http.server", "socketserver")


def _use_openai() -> None:
    import asyncio

    openai: Any = sys.modules["openai"]
    with _Server() as url:
        options: dict[str, Any] = {"base_url": url, "api_key": "x", "max_retries": 0, "timeout": 5.0}
        ask: dict[str, Any] = {"model": "x", "messages": [{"role": "user", "content": "x"}]}
        openai.OpenAI(**options).chat.completions.create(**ask)
        list(openai.OpenAI(**options).chat.completions.create(**ask, stream=True))
        asyncio.run(openai.AsyncOpenAI(**options).chat.completions.create(**ask))


_USES: dict[str, Callable[[], None]] = {"openai": _use_openai}


class _Server:
    """Answers every POST as the OpenAI API would a chat, in a thread of the child."""

    def __enter__(self) -> str:
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

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __exit__(self, *of_error: object) -> None:
        self._server.shutdown()


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
    """The random numbers of numpy, which are copied by a fork; Python's own are seeded anew by itself."""
    random = sys.modules.get("numpy.random")
    if random is not None:
        random.seed()
