"""One request and its reply, whatever the API.

The agent of a request is identified before its body is read. An exception of a handler becomes the reply: a `Problem`
as it is, an OSError by the kernel's errno, any other as 500. After the first part of a stream it becomes a part of
that stream.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import errno
import logging
import re
import zlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import msgspec

from aiosd.gateway import places
from aiosd.gateway.accounts import Account, Accounts, Full, User
from aiosd.ipc.endpoint import Endpoint
from aiosd.threads import NoneLeft
from libaios.wire import ModelInfo

logger = logging.getLogger("gateway")

BODY_BYTES = 16 << 20  # of one request
COMMENT_S = 5.0  # between two signs of life in a stream in which nothing else is sent

BOM = b"\xef\xbb\xbf"  # some editors put it before a text

encode = msgspec.json.Encoder().encode


class Problem(Exception):
    """An error that becomes the reply."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.headers = dict(headers or {})

    def renamed(self, names: places.PlaceNames) -> Problem:
        """The same error with the names of another API."""
        new = self.param and names(self.param)
        if self.param and new:
            self.message, self.param = places.renamed(self.message, self.param, new), new
        return self


@contextlib.contextmanager
def renaming(names: places.PlaceNames) -> Iterator[None]:
    """Around code shared with another API: translates the names in its errors."""
    try:
        yield
    except Problem as problem:
        raise problem.renamed(names) from None


class Left(Exception):
    """The program has closed the connection and does not wait for the reply any more."""


NO_RETRY = {"x-should-retry": "false"}
SOON = {"retry-after": "1"}


def problem_of(err: OSError, names: places.PlaceNames = places.same) -> Problem:
    """The HTTP error for an error from the kernel. `names`: translates places in it into this API's names."""
    message = err.strerror or str(err)
    match err.errno:
        case errno.EINVAL | errno.EMSGSIZE:
            code = "context_length_exceeded" if err.errno == errno.EMSGSIZE else None
            return Problem(400, message, param=places.found(message), code=code).renamed(names)
        case errno.EDQUOT:
            return Problem(429, message, "insufficient_quota", code="insufficient_quota", headers=NO_RETRY)
        case errno.EAGAIN if isinstance(err, NoneLeft):  # not a limit of this agent
            return Problem(503, message, "server_error", headers=SOON)
        case errno.EAGAIN:
            return Problem(429, message, "rate_limit_error", code="rate_limit_exceeded", headers=SOON)
        case errno.EPERM | errno.EACCES:
            return Problem(403, message, "permission_error")
        case errno.ENOENT:
            return Problem(404, message, "not_found_error")
        case errno.ENOSYS:
            return Problem(501, message, "not_implemented_error")
        case errno.ETIMEDOUT:
            return Problem(504, message, "timeout_error", headers=NO_RETRY)
        case errno.ENOTCONN | errno.ECONNREFUSED | errno.ECANCELED:
            return Problem(503, message, "server_error", headers=SOON)
    return Problem(500, message, "server_error")


def openai_error(problem: Problem) -> dict[str, Any]:
    return {"error": {"message": problem.message, "type": problem.kind, "param": problem.param, "code": problem.code}}


@dataclass(slots=True)
class Counters:
    """The counters that /metrics reports."""

    requests: dict[int, int] = field(default_factory=dict)  # by status
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cancelled: int = 0
    streams: int = 0  # replies that are being sent in parts now

    def note(self, status: int) -> None:
        self.requests[status] = self.requests.get(status, 0) + 1

    def totals(self) -> dict[str, int]:
        return {
            "requests": sum(self.requests.values()),
            "failed": sum(count for status, count in self.requests.items() if status >= 400),
            "cancelled": self.cancelled,
        }


class HttpRequest:
    """A request. `account` is set before a handler gets it, unless the route needs no token."""

    def __init__(self, app: App, scope: dict[str, Any], receive: Any, send: Any) -> None:
        self.app = app
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query: bytes = scope["query_string"]
        self.connection: User = scope["connection"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.account: Account
        self.words: dict[str, str] = {}  # parts of the path
        self.error_form: Callable[[Problem], dict[str, Any]] = openai_error
        self.names: places.PlaceNames = places.same  # translates places into the names of the handler's API
        self.extra: list[tuple[bytes, bytes]] = []  # headers of the reply
        self.begun = False  # the head of the reply is sent
        self._received = False  # its whole body has come
        self._events = False  # the reply is a stream of events, not of lines
        self._receive, self._send = receive, send

    # ── from the program ──────────────────────────────────────────────────────────────────────────────────

    def token(self) -> str:
        """The token: a bearer token, x-api-key, or the password of Basic. Empty: none."""
        given = self.headers.get(b"authorization", b"").decode("latin-1")
        kind, _, value = given.partition(" ")
        if kind.lower() == "bearer":
            return value.strip()
        if kind.lower() == "basic":
            try:
                return base64.b64decode(value, validate=True).decode("latin-1").partition(":")[2]
            except binascii.Error:
                return ""
        return self.headers.get(b"x-api-key", b"").decode("latin-1").strip()

    async def body(self) -> bytes:
        """The whole body. Raises Problem (413), Full, Left."""
        try:
            announced = int(self.headers.get(b"content-length", b"0"))
        except ValueError:
            announced = 0
        taken, parts = 0, bytearray()
        try:
            while True:
                if max(announced, len(parts)) > BODY_BYTES:
                    self.extra.append((b"connection", b"close"))
                    raise Problem(413, f"a body of more than {BODY_BYTES} bytes")
                message = await self._receive()
                if message["type"] != "http.request":
                    raise Left
                self._received = not message["more_body"]
                self.account.take_body(self.connection, len(message["body"]))
                taken += len(message["body"])
                parts += message["body"]
                if self._received:
                    return self._decoded(bytes(parts))
        finally:
            self.account.drop_body(self.connection, taken)

    def _decoded(self, body: bytes) -> bytes:
        """The body, decompressed if it was sent compressed. Raises Problem (400, 413, 415)."""
        coding = self.headers.get(b"content-encoding", b"identity").decode("latin-1").strip().lower()
        if coding in ("", "identity"):
            return body
        if coding not in ("gzip", "x-gzip", "deflate"):
            self.extra.append((b"accept-encoding", b"gzip, deflate, identity"))
            raise Problem(415, f"content-encoding: gzip or deflate, not {coding:.40}")
        unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32)  # zlib recognises which of the two formats it is
        try:
            found = unpacker.decompress(body, BODY_BYTES + 1)
        except zlib.error:
            raise Problem(400, f"the body is not compressed as its content-encoding says: {coding}") from None
        if len(found) > BODY_BYTES:
            raise Problem(413, f"a body of more than {BODY_BYTES} bytes")
        if not unpacker.eof:
            raise Problem(400, "the body ends before it is complete")
        return found

    async def json(self) -> dict[str, Any]:
        """The body, which must be a JSON object. Raises Problem as `body`, and 400."""
        body = await self.body()
        try:
            value = msgspec.json.decode(body.removeprefix(BOM))
        except (msgspec.MsgspecError, UnicodeDecodeError) as err:
            kind = self.headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip()
            named = f", but {kind:.80}" if kind and "json" not in kind.lower() else ""
            raise Problem(400, f"the body is no JSON{named}: {err}") from None
        except RecursionError:
            raise Problem(400, "the body is nested too deeply") from None
        if not isinstance(value, dict):
            raise Problem(400, "the body must be a JSON object")
        return value

    async def left(self) -> None:
        """Wait until the program has closed the connection."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    # ── to the program ────────────────────────────────────────────────────────────────────────────────────

    async def reply(self, value: Any, status: int = 200) -> None:
        await self.reply_bytes(encode(value), b"application/json", status)

    async def reply_bytes(self, body: bytes, kind: bytes, status: int = 200) -> None:
        await self._begin(status, kind, None if status == 204 else len(body))
        await self._send({"type": "http.response.body", "body": body})

    async def stream(self, part: bytes, kind: bytes, last: bool = False) -> None:
        """Send a part of a reply that is sent in parts."""
        if not self.begun:
            self._events = kind.startswith(b"text/event-stream")
            self.extra.append((b"cache-control", b"no-cache"))
            await self._begin(200, kind, None)
        await self._send({"type": "http.response.body", "body": part, "more_body": not last})

    async def _begin(self, status: int, kind: bytes, size: int | None) -> None:
        self.begun = True
        self.app.counters.note(status)
        headers = [*self.extra]
        if kind:
            headers.append((b"content-type", kind))
        if not self._received and self._waits_or_is_long():
            headers.append((b"connection", b"close"))
        if size is not None:
            headers.append((b"content-length", str(size).encode()))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    def _waits_or_is_long(self) -> bool:
        """Whether to close the connection because the rest of the body will not be read: it may never come, or it is
        too long; and the next request cannot be found without reading it."""
        size = self.headers.get(b"content-length", b"0")
        if b"expect" in self.headers or b"transfer-encoding" in self.headers:
            return True
        return not size.isdigit() or len(size) > 9 or int(size) > BODY_BYTES

    async def fail(self, problem: Problem) -> None:
        if self.begun:
            part = encode(self.error_form(problem)) + b"\n"
            await self.stream(b"data: " + part + b"\n" if self._events else part, b"", last=True)
            return
        self.extra += [(name.encode(), value.encode()) for name, value in problem.headers.items()]
        await self.reply(self.error_form(problem), problem.status)


RouteHandler = Callable[[HttpRequest], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Route:
    """`path`: a pattern for the whole path; `name`: the path as people write it. `open`: it needs no token."""

    method: str
    name: str
    path: re.Pattern[str]
    handler: RouteHandler
    open: bool = False
    error_form: Callable[[Problem], dict[str, Any]] = openai_error


def route(
    method: str,
    path: str,
    handler: RouteHandler,
    open: bool = False,
    error_form: Callable[[Problem], dict[str, Any]] = openai_error,
    before: str = "",
) -> Route:
    """`path` with {name} for a part between slashes; {name:path} for all that follows. `before`: a pattern for what
    may stand in front of it."""
    pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", re.sub(r"\{(\w+):path\}", r"(?P<\1>.+)", before + path))
    return Route(method, path.replace(":path", ""), re.compile(pattern), handler, open, error_form)


#: Whose request is it? Raises Problem, Full.
Identify = Callable[[HttpRequest], Awaitable[Account]]


class App:
    """The ASGI application."""

    def __init__(
        self, accounts: Accounts, counters: Counters, door: Endpoint, routes: list[Route], identify: Identify
    ) -> None:
        self.accounts = accounts
        self.counters = counters
        self.models: list[ModelInfo] = []  # as last reported by the kernel
        self._routes = routes
        self._identify = identify
        self._hosts = {*(one.host for one in door.all), "localhost", "127.0.0.1", "::1"}

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        request = HttpRequest(self, scope, receive, send)
        try:
            await self._serve(request)
        except Left:
            self.counters.cancelled += 1
        except Problem as problem:
            await request.fail(problem)
        except Full as full:
            await request.fail(Problem(429, str(full), "rate_limit_error", headers=SOON))
        except OSError as err:
            await request.fail(problem_of(err, request.names))
        except asyncio.CancelledError:
            raise
        except Exception:  # a bug: it ends this request, and no other
            logger.exception("%s %s: a bug of the gateway", request.method, request.path[:80])
            await request.fail(Problem(500, "the gateway made a mistake; aiosd's log has the details", "server_error"))

    async def _serve(self, request: HttpRequest) -> None:
        self._check_origin(request)
        if request.method == "OPTIONS":
            await self._reply_methods(request)
            return
        chosen = self._route(request)
        if not chosen.open:
            with request.connection.identifying():
                request.account = await self._identify(request)
        await chosen.handler(request)

    def _check_origin(self, request: HttpRequest) -> None:
        """A page in a browser must not reach an agent's model, whatever name it has given this machine."""
        host = request.headers.get(b"host", b"").decode("latin-1")
        origin = request.headers.get(b"origin", b"").decode("latin-1")
        if host and _host(f"//{host}") not in self._hosts:  # browsers always send it
            raise Problem(403, f"host: {host[:80]!r} is not this machine")
        if not origin:
            return
        if _host(origin) not in self._hosts:
            raise Problem(403, f"origin: requests from pages of {origin[:80]!r} are refused")
        # A page of this machine may read the replies; it needs a token, see `whose`.
        request.extra += [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"origin")]

    async def _reply_methods(self, request: HttpRequest) -> None:
        """Answer OPTIONS with the allowed methods. A browser sends it, without a token, before a page's request."""
        methods = self._methods(request.path) if request.path != "*" else sorted({one.method for one in self._routes})
        if not methods:
            raise self._nothing_at(request)
        allowed = ", ".join(_with_head(methods)).encode()
        request.extra.append((b"allow", allowed))
        if b"access-control-request-method" in request.headers:
            wanted = request.headers.get(b"access-control-request-headers", b"")
            request.extra += [(b"access-control-allow-methods", allowed), (b"access-control-max-age", b"600")]
            if wanted:
                request.extra.append((b"access-control-allow-headers", wanted))
        await request.reply_bytes(b"", b"", 204)

    def _methods(self, path: str) -> list[str]:
        return [one.method for one in self._routes if _matched(one, path) is not None]

    def _route(self, request: HttpRequest) -> Route:
        for one in self._routes:
            match = _matched(one, request.path)
            if match is not None and one.method == ("GET" if request.method == "HEAD" else request.method):
                request.words = {name: word for name, word in match.groupdict().items() if word is not None}
                request.error_form = one.error_form
                return one
        request.error_form = self._error_form_near(request.path)
        methods = self._methods(request.path)
        if not methods:
            raise self._nothing_at(request)
        request.extra.append((b"allow", ", ".join(_with_head(methods)).encode()))
        raise Problem(405, f"{request.method} is not allowed here; {' and '.join(methods)} is")

    def _error_form_near(self, path: str) -> Callable[[Problem], dict[str, Any]]:
        """The error form of the API that has the first part of the path: clients of that API can read no other form."""
        first = path.strip("/").partition("/")[0]
        near = (one for one in self._routes if one.name.strip("/").partition("/")[0] == first)
        return next((one.error_form for one in near), openai_error)

    def _nothing_at(self, request: HttpRequest) -> Problem:
        """A 404 that lists the paths that exist."""
        there = ", ".join(dict.fromkeys(f"{one.method} {one.name}" for one in self._routes))
        path = request.path[:200]
        return Problem(404, f"there is nothing at {request.method} {path}; there are: {there}", code="unknown_url")


def _matched(one: Route, path: str) -> re.Match[str] | None:
    """Match a path against a route. A slash at the end, or two slashes for one, make no difference."""
    return one.path.fullmatch(path.rstrip("/")) or one.path.fullmatch(re.sub("/+", "/", path).rstrip("/"))


def _with_head(methods: list[str]) -> list[str]:
    more = ["HEAD"] if "GET" in methods else []
    return [*methods, *more, "OPTIONS"]


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
