"""One request to an endpoint, on a thread of its own: http.client blocks, and the core's loop must not.

The thread reads the answer as server-sent events and posts each; `hold` stops the reading (TCP slows the endpoint
down), `close` ends it from outside. After a close nothing that the thread posts counts.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import msgspec

from aiosd.errors import UsageError
from aiosd.llm.remote.answer import Wrong, sentence

CONNECT_S = 10.0
IDLE_S = 60.0  # without a byte
SILENT_S = 300.0  # without an event, though bytes come (comments, a line that does not end)
_MOST_LINE = 8 << 20
_MOST_REFUSAL = 64 << 10
_DONE = b"[DONE]"


@dataclass(frozen=True)
class Data:
    """An event of the stream."""

    data: bytes


@dataclass(frozen=True)
class End:
    """The answer is over."""


@dataclass(frozen=True)
class Lost:
    """There is no answer, or no more of it."""

    why: str


@dataclass(frozen=True)
class Refused:
    """A status other than 200."""

    status: int
    why: str
    code: str = ""  # the endpoint's own word for it
    retry_after: float = 0.0  # seconds


Event = Data | End | Lost | Refused


@dataclass(frozen=True)
class Endpoint:
    url: str  # as it is shown: without user, password and query
    https: bool
    host: str
    port: int | None
    path: str
    key_file: str = ""

    @classmethod
    def of(cls, url: str, key_file: str = "") -> Endpoint:
        """Raises UsageError."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise UsageError(f"{url}: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"{url}: an address such as https://host/v1 is wanted")
        if parts.username or parts.password or parts.query:
            raise UsageError("url: neither user, password nor query belong there; a key is put into key_file")
        path = parts.path.rstrip("/")
        return cls(
            f"{parts.scheme}://{parts.netloc}{path}", parts.scheme == "https", parts.hostname, port, path, key_file
        )

    def key(self) -> str:
        """Read anew for each request, so that it can be exchanged while the system runs. Raises OSError, ValueError."""
        if not self.key_file:
            return ""
        with open(self.key_file, encoding="utf-8") as file:
            key = file.read(65536).strip()
        if not key or not key.isascii() or not key.isprintable():  # http.client would put it into its complaint
            raise ValueError("it holds no key: one line of printable characters")
        return key

    def connection(self) -> http.client.HTTPConnection:
        if self.https:
            return http.client.HTTPSConnection(
                self.host, self.port, timeout=CONNECT_S, context=ssl.create_default_context()
            )
        return http.client.HTTPConnection(self.host, self.port, timeout=CONNECT_S)


class Exchange:
    def __init__(self, endpoint: Endpoint, path: str, body: dict[str, Any], post: Callable[[Exchange, Event], None]):
        self._endpoint = endpoint
        self._path = f"{endpoint.path}/{path}"
        self._body = msgspec.json.encode(body)
        self._post = post
        self._go = threading.Event()
        self._go.set()
        self._socket: socket.socket | None = None
        self.closed = False
        self._thread = threading.Thread(target=self._run, name="exchange", daemon=True)
        self._thread.start()

    def hold(self, held: bool) -> None:
        """Read nothing more for the time being."""
        (self._go.clear if held else self._go.set)()

    def close(self) -> None:
        self.closed = True
        self._go.set()
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    def _run(self) -> None:
        key = ""
        connection = self._endpoint.connection()
        try:
            key = self._endpoint.key()
            for event in self._events(connection, key):
                self._post(self, event)
        except (OSError, http.client.HTTPException, Wrong, ValueError) as error:
            why = str(error) or type(error).__name__
            self._post(self, Lost(_without(key, why)))
        finally:
            connection.close()

    def _events(self, connection: http.client.HTTPConnection, key: str) -> Iterator[Event]:
        connection.connect()
        self._socket = connection.sock
        if self.closed:
            return
        connection.sock.settimeout(IDLE_S)
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream", "User-Agent": "aiosd"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        connection.request("POST", self._path, self._body, headers)
        response = connection.getresponse()
        if response.status != http.client.OK:
            yield _refusal(response, key)
        elif "json" in response.headers.get_content_type():  # it does not stream
            yield Data(self._all(response))
            yield End()
        else:
            yield from self._stream(response)

    def _all(self, response: http.client.HTTPResponse) -> bytes:
        data = response.read(_MOST_LINE)
        if response.read(1):
            raise Wrong("an answer without end")
        return data

    def _stream(self, response: http.client.HTTPResponse) -> Iterator[Event]:
        rest, since = b"", time.monotonic()
        while True:
            self._go.wait()
            read = response.read1(1 << 16)
            *lines, rest = (rest + read).split(b"\n")
            for line in lines:
                if not line.startswith(b"data:"):
                    continue
                data, since = line[5:].strip(), time.monotonic()
                if data == _DONE:
                    yield End()
                    return
                yield Data(data)
            if not read:
                yield End()  # whether it is complete, its finish_reason tells
                return
            if len(rest) > _MOST_LINE or time.monotonic() - since > SILENT_S:
                raise Wrong("a line without end" if len(rest) > _MOST_LINE else f"nothing came for {SILENT_S:g} s")


def _refusal(response: http.client.HTTPResponse, key: str) -> Refused:
    data = response.read(_MOST_REFUSAL)
    try:
        found = msgspec.json.decode(data)
    except msgspec.DecodeError:
        found = data[:300].decode(errors="replace")
    error = found.get("error") if isinstance(found, dict) else None
    code = str(error.get("code") or error.get("type") or "") if isinstance(error, dict) else ""
    why = _without(key, sentence(found) or response.reason)
    return Refused(response.status, why, code, _seconds(response.headers.get("Retry-After", "")))


def _seconds(text: str) -> float:
    """Of a Retry-After: seconds, or a date. 0: there is none that can be read."""
    try:
        return max(float(text), 0.0) if text else 0.0
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    except ValueError:
        return 0.0


def _without(key: str, text: str) -> str:
    """Endpoints repeat what they were sent; no key goes into a message or a log."""
    return text.replace(key, "…") if key else text
