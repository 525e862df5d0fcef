"""One request to an endpoint, on a thread of its own: http.client blocks, and the core's loop must not.

The thread reads the answer as server-sent events and posts each event to the core. It reads on only when the core has
handled the earlier ones (`taken`), so a fast endpoint fills no memory; `hold` stops the reading (TCP slows the endpoint
down), `close` ends it from outside. Events posted after a close do not count. The last event is always None, whatever
happens.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import AnyStr

from aiosd.llm.remote.answer import BadAnswer, loosely, safe_line, sentence
from aiosd.llm.remote.connections import Connections

FIRST_S = 300.0  # without a byte before the first event: endpoints have queues, and long prompts
IDLE_S = 60.0  # … and after it
MOST_LINE = 2 << 20
MOST_WHOLE = 8 << 20  # of an answer that does not stream
MOST_STREAM = 256 << 20  # of one that does
MOST_UNREAD = 1 << 20  # read, and not yet taken
_MOST_REFUSAL = 64 << 10
_REST_S = 0.5  # for the end of the body behind the last event
_DONE = b"[DONE]"


@dataclass(frozen=True)
class Data:
    """An event of the stream."""

    data: bytes


@dataclass(frozen=True)
class End:
    """The answer is over; `done`: the endpoint has marked its end."""

    done: bool = False


@dataclass(frozen=True)
class ConnectionLost:
    """The connection was lost before the answer, or in the middle of it."""

    why: str


@dataclass(frozen=True)
class BadStatus:
    """The endpoint replied with a status other than 200."""

    status: int
    why: str
    code: str = ""  # the endpoint's own word for it
    retry_after: float = 0.0  # seconds


ExchangeEvent = Data | End | ConnectionLost | BadStatus
Post = Callable[["Exchange", ExchangeEvent | None], None]


class Exchange:
    """One request. Raises RuntimeError if no thread can be started."""

    def __init__(self, connections: Connections, path: str, body: bytes, post: Post) -> None:
        self._connections = connections
        self._path = f"{connections.endpoint.path}/{path}"
        self._body = body
        self._post = post
        self._changed = threading.Condition()
        self._held = False
        self._unread = 0
        self._socket: socket.socket | None = None
        self.closed = False
        self.ended = False  # all of the answer has come: there is nothing to close
        self._thread = threading.Thread(target=self._run, name="exchange", daemon=True)
        self._thread.start()

    # ── for the core's loop ───────────────────────────────────────────────────────────────────────────────

    def hold(self, held: bool) -> None:
        """Read nothing more while `held` is true."""
        with self._changed:
            self._held = held
            self._changed.notify()

    def taken(self, event: ExchangeEvent) -> None:
        """The core has handled the event."""
        if isinstance(event, Data):
            with self._changed:
                self._unread -= len(event.data)
                self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self.closed = True
            self._changed.notify()
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # also with TLS: the socket below it

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    # ── the thread ────────────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        key, connection = "", None
        try:
            key = self._connections.endpoint.key()
            connection, response = self._asked(key)
            for event in self._events(response, key):
                self._post(self, self._counted(event))
            if self._over(connection, response):
                self._connections.keep(connection)
                connection = None
        except Exception as error:  # of any kind: a call whose thread has ended in silence would wait for ever
            words = error.strerror if isinstance(error, OSError) else ""  # else its number would stand before them
            why = words or str(error) or type(error).__name__
            self._post(self, ConnectionLost(safe_line(_without(key, why))))
        finally:
            if connection is not None:
                connection.close()
            self._post(self, None)

    def _asked(self, key: str) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Send the request, and wait for the beginning of the answer. The endpoint may close a kept connection at the
        very moment when it is used: then a new one is used."""
        connection = self._connections.kept()
        if connection is not None:
            try:
                return connection, self._ask(connection, key)
            except (http.client.RemoteDisconnected, ConnectionError):
                connection.close()
        connection = self._connections.new()
        try:
            return connection, self._ask(connection, key)
        except BaseException:  # of any kind: close it, and raise it again
            connection.close()
            raise

    def _ask(self, connection: http.client.HTTPConnection, key: str) -> http.client.HTTPResponse:
        if connection.sock is None:
            connection.connect()
        self._socket = connection.sock
        if self.closed:
            raise OSError("given up")
        connection.sock.settimeout(FIRST_S)
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream", "User-Agent": "aiosd"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        connection.request("POST", self._path, self._body, headers)
        return connection.getresponse()

    def _events(self, response: http.client.HTTPResponse, key: str) -> Iterator[ExchangeEvent]:
        kind = response.headers.get_content_type()
        if response.status != http.client.OK:
            yield _refusal(response, key)
        elif response.headers.get("Content-Encoding", "identity") != "identity":
            raise BadAnswer("an answer that is compressed, though none was asked for")
        elif "json" in kind:  # the answer does not stream
            yield Data(_without(key, self._all(response)))
            yield End()
        elif kind != "text/event-stream" and response.headers.get("Content-Type"):
            raise BadAnswer(f"an answer of the type {kind}, which is neither text/event-stream nor JSON")
        else:
            yield from self._stream(response, key)

    def _all(self, response: http.client.HTTPResponse) -> bytes:
        data = response.read(MOST_WHOLE)
        if response.read(1):
            raise BadAnswer(f"an answer of more than {MOST_WHOLE} bytes")
        return data

    def _stream(self, response: http.client.HTTPResponse, key: str) -> Iterator[ExchangeEvent]:
        begun, total = bytearray(), 0  # of a line
        while self._may_read():
            read = response.read1(1 << 16)
            total += len(read)
            *lines, rest = read.split(b"\n")
            for line in lines:
                begun += line
                data = bytes(begun[5:]).strip() if begun.startswith(b"data:") else b""
                begun.clear()
                if data == _DONE:
                    yield End(done=True)
                    return
                if data:
                    yield Data(_without(key, data))
            begun += rest
            if not read:
                yield End()  # its finish_reason shows whether it is complete
                return
            if len(begun) > MOST_LINE or total > MOST_STREAM:
                raise BadAnswer("a line without end" if len(begun) > MOST_LINE else "a stream without end")

    def _counted(self, event: ExchangeEvent) -> ExchangeEvent:
        if isinstance(event, End):
            self.ended = True
        if isinstance(event, Data):
            if self._socket is not None:
                self._socket.settimeout(IDLE_S)
            with self._changed:
                self._unread += len(event.data)
        return event

    def _may_read(self) -> bool:
        """Wait while reading is held. False: the exchange was closed."""
        with self._changed:
            self._changed.wait_for(lambda: self.closed or (not self._held and self._unread < MOST_UNREAD))
        return not self.closed

    def _over(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> bool:
        """Has the whole answer been read, so that the connection can serve again?"""
        if self.closed or response.will_close:
            return False
        if not response.isclosed() and connection.sock is not None:
            connection.sock.settimeout(_REST_S)
            with contextlib.suppress(OSError):
                response.read1(1)
        with self._changed:
            self._socket = None  # from now on this exchange must not close it
            return response.isclosed() and connection.sock is not None and not self.closed


def _refusal(response: http.client.HTTPResponse, key: str) -> BadStatus:
    found = loosely(_without(key, response.read(_MOST_REFUSAL)))
    error = found.get("error") if isinstance(found, dict) else None
    words = [error.get("code"), error.get("type")] if isinstance(error, dict) else []
    code = next((word[:100] for word in words if word and isinstance(word, str)), "")  # some give the status as code
    why = sentence(found) or safe_line(_without(key, response.reason))
    return BadStatus(response.status, why, safe_line(code), seconds(response.headers.get("Retry-After", "")))


def seconds(text: str) -> float:
    """The seconds of a Retry-After header, which may be a date. 0: there is none that can be parsed."""
    try:
        found = float(text)
    except ValueError:
        try:
            found = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return found if math.isfinite(found) and found > 0 else 0.0


def _without(key: str, text: AnyStr) -> AnyStr:
    """The text without the key: endpoints may repeat what they were sent, and no message, log or answer must have the
    key."""
    if not key:
        return text
    return text.replace(key, "…") if isinstance(text, str) else text.replace(key.encode(), b"...")
