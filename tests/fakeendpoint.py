"""An OpenAI-compatible endpoint whose behaviour a test sets: one behaviour for each request, the last
one again and again."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Deed = Callable[["Handler"], None]
USAGE = {
    "prompt_tokens": 11,
    "completion_tokens": 3,
    "prompt_tokens_details": {"cached_tokens": 4},
    "completion_tokens_details": {"reasoning_tokens": 2},
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Endpoint
    body: dict[str, Any]

    def do_POST(self) -> None:
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.asked.append((self.path, self.body, dict(self.headers)))
            server.times.append(time.monotonic())
            deed = server.deeds.pop(0) if len(server.deeds) > 1 else server.deeds[0]
        try:
            deed(self)
        except OSError:
            server.hung_up.set()  # the client is gone

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def reply(self, found: Any) -> None:
        data = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True

    def event(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())
        self.wfile.flush()

    def chunk(self, reason: str | None = None, **delta: Any) -> None:
        self.event(json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}))


class Endpoint(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, *deeds: Deed) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.deeds = list(deeds)
        self.asked: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.times: list[float] = []
        self.ports: list[int] = []  # ports of clients that a behaviour has recorded
        self.lock = threading.Lock()
        self.hung_up = threading.Event()
        self.over = threading.Event()  # ends behaviours that wait
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.hung_up.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def close(self) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()
        self.thread.join()


# ── behaviours ────────────────────────────────────────────────────────────────────────────────────────────


def answers(*words: str, reason: str | None = "stop", usage: dict[str, Any] | None = USAGE, **more: Any) -> Deed:
    def deed(handler: Handler) -> None:
        handler.stream()
        for word in words:
            if handler.path.endswith("chat/completions"):
                handler.chunk(content=word)
            else:
                handler.event(json.dumps({"choices": [{"text": word, "finish_reason": None}]}))
        handler.chunk(reason, **more)
        if usage is not None:
            handler.event(json.dumps({"choices": [], "usage": usage}))
        handler.event("[DONE]")

    return deed


def status(number: int, message: str = "no", headers: dict[str, str] | None = None, **error: Any) -> Deed:
    def deed(handler: Handler) -> None:
        data = json.dumps({"error": {"message": message, **error}}).encode()
        handler.send_response(number)
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    return deed


def cut(*words: str) -> Deed:
    """Close the connection in the middle of an answer."""

    def deed(handler: Handler) -> None:
        handler.stream()
        for word in words:
            handler.chunk(content=word)

    return deed


def garbage(data: str) -> Deed:
    def deed(handler: Handler) -> None:
        handler.stream()
        handler.event(data)

    return deed


def whole(message: dict[str, Any], reason: str = "stop", usage: dict[str, Any] | None = USAGE) -> Deed:
    """Answer without a stream."""

    def deed(handler: Handler) -> None:
        handler.reply({"choices": [{"message": message, "finish_reason": reason}], "usage": usage})

    return deed


def vectors(*found: Any, tokens: int = 5) -> Deed:
    """Answer with these vectors, or whole items; without any, with one vector for each text."""

    def deed(handler: Handler) -> None:
        rows = found or [[3.0, 4.0] for _ in handler.body["input"]]
        data = [row if isinstance(row, dict) else {"index": at, "embedding": row} for at, row in enumerate(rows)]
        handler.reply({"data": data, "usage": {"prompt_tokens": tokens}})

    return deed


def hangs(*words: str) -> Deed:
    """Begin an answer, and send nothing more until the client has left."""

    def deed(handler: Handler) -> None:
        handler.stream()
        for word in words:
            handler.chunk(content=word)
        while not handler.server.over.wait(0.02):
            handler.wfile.write(b": still here\n\n")
            handler.wfile.flush()

    return deed


def bytewise(*words: str) -> Deed:
    """Send an answer one byte at a time."""

    def deed(handler: Handler) -> None:
        handler.stream()
        lines = [json.dumps({"choices": [{"delta": {"content": word}}]}) for word in words]
        lines += [json.dumps({"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": USAGE}), "[DONE]"]
        for byte in "".join(f"data: {line}\r\n\r\n" for line in lines).encode():
            handler.wfile.write(bytes([byte]))
            handler.wfile.flush()

    return deed


def raw(head: bytes, again: bytes | None = None, pause: float = 0.0) -> Deed:
    """Send these bytes, and then the others again and again until the client has left."""

    def deed(handler: Handler) -> None:
        handler.close_connection = True
        handler.wfile.write(head)
        while again is not None and not handler.server.over.wait(pause):
            handler.wfile.write(again)

    return deed
