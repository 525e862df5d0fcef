"""One TCP connection: uvicorn's protocol, with the gateway's own limits. A connection is a *stranger* until one of its
requests was shown to come from an agent."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from aiosd.gateway.accounts import Account
from aiosd.gateway.identity import SocketAddress
from aiosd.gateway.strangers import Strangers
from aiosd.gateway.web import Problem, encode, openai_error

HEAD_BYTES = 64 << 10  # of a request's line and headers
FRAMING = (b"content-length", b"transfer-encoding")
PIPELINED = 8  # requests that wait behind another one of their connection; then no more is read


class Guarded(HttpToolsProtocol):
    """One TCP connection, an `accounts.User`. `account`: the agent that it was shown to belong to; `agent`: the one at
    whose own gate it was accepted (`birth.gates`), 0: it was accepted at the public address."""

    strangers: Strangers  # of the server; set on a subclass

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.account: Account | None = None
        self.agent = 0
        self.unknown = self.unproven = ""
        self._head_bytes = 0
        self._served: RequestResponseCycle | None = None  # the one being answered; `cycle` is the last one
        self._discards = False  # what comes is no longer parsed
        self._silent = False  # the parser is reading a head that was handled before

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.strangers.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.strangers.forget(self)
        if self.account is not None:
            self.account.users.discard(self)
        served = self._served
        if served is not None and not served.response_complete:
            served.disconnected = True
            served.message_event.set()
        super().connection_lost(exc)

    def known(self, account: Account) -> None:
        """The connection was shown to belong to an agent. Raises Full."""
        account.admit(self)
        self.account = account
        self.strangers.forget(self)

    @contextlib.contextmanager
    def identifying(self) -> Iterator[None]:
        """Entered while the agent of a request is being identified."""
        self.strangers.identifying(self)
        try:
            yield
        finally:
            self.strangers.refused(self)

    def abort(self) -> None:
        self.transport.abort()

    @property
    def ends(self) -> tuple[SocketAddress, SocketAddress]:
        """The address of the other end, and that of this end."""
        theirs, ours = self.transport.get_extra_info("peername"), self.transport.get_extra_info("sockname")
        return SocketAddress(*theirs[:2]), SocketAddress(*ours[:2])

    def on_message_begin(self) -> None:
        if self._silent:
            return
        super().on_message_begin()
        self._head_bytes = 0
        self.scope["connection"] = self  # type: ignore[typeddict-unknown-key]

    def on_url(self, url: bytes) -> None:
        if self._silent:
            return
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._silent:
            return
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > HEAD_BYTES:
            raise ValueError("too long")  # the parser treats it as an invalid request

    def on_headers_complete(self) -> None:
        if self._silent:
            return
        super().on_headers_complete()
        waiting = len(self.pipeline)
        if not waiting:
            self._served = self.cycle
        elif waiting < PIPELINED:
            self.flow.resume_reading()  # only a read shows that the program has left

    def on_message_complete(self) -> None:
        if not self._silent:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        if self.pipeline:
            self._served = self.pipeline[-1][0]
        super().on_response_complete()

    def data_received(self, data: bytes) -> None:
        if self._discards:
            return
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._stay(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("")
        if self.parser is None or self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:  # half a request has no more time than no request
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _stay(self, rest: bytes) -> None:
        """Continue with HTTP/1.1 after a request to change the protocol, as RFC 9110, 7.8, allows: programs in Java
        request HTTP/2 that way. The parser stopped after the head; a new one takes the body and what follows."""
        framing = [name + b": " + value for name, value in self.headers if name in FRAMING]
        self.parser = httptools.HttpRequestParser(self)
        self._silent = True
        try:
            self.parser.feed_data(b"\r\n".join([b"POST / HTTP/1.1", *framing, b"", b""]))
        finally:
            self._silent = False
        if framing:
            self.cycle.more_body = True
        if rest:
            self.data_received(rest)

    def send_400_response(self, msg: str) -> None:
        """Answer a request that cannot be parsed with a 400, unless another reply is half sent."""
        served, last = self._served, self.cycle
        if served is not None and not served.response_complete and (served is not last or not served.more_body):
            self._discards = True
            self.pipeline.clear()
            served.keep_alive = False
            return
        if served is not None and served.response_started and not served.response_complete:
            self.transport.close()
            return
        long = self._head_bytes > HEAD_BYTES
        status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE if long else HTTPStatus.BAD_REQUEST
        words = f"a request's line and headers may have {HEAD_BYTES} bytes" if long else "this is no HTTP request"
        body = encode(openai_error(Problem(status, words)))
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body)
        self.transport.close()
