"""One request and its reply, whatever the API.

Before a request's body is read it is known whose it is. What a handler raises becomes the reply: a `Problem` as it is,
an OSError as the kernel's errno says, anything else as 500. After the first part of a stream it becomes a part of that
stream.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import errno
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import msgspec

from aiosd.endpoint import Endpoint
from aiosd.gateway.accounts import Account, Accounts, Full, User
from libaios import wire
from libaios.greeting import NoKernel, Refused
from libaios.wire import ModelInfo

logger = logging.getLogger("gateway")

BODY_BYTES = 16 << 20  # of one request
COMMENT_S = 5.0  # between two signs of life in a stream in which nothing else is sent

TOKEN_CHARS = 128  # the kernel reads no long ones

encode = msgspec.json.Encoder().encode


class Problem(Exception):
    """The reply is an error."""

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


class Left(Exception):
    """The program does not wait for the reply any more."""


NO_RETRY = {"x-should-retry": "false"}
_SOON = {"retry-after": "1"}
#: What the kernel calls otherwise than the API.
RENAMED = {"schema": "response_format"}
_PLACE = re.compile(r"([a-z_]+(?:\[\d+\]|\.[a-z_]+)*)\b")


def problem_of(err: OSError) -> Problem:
    """What an answer of the kernel is in HTTP."""
    message = err.strerror or str(err)
    match err.errno:
        case errno.EINVAL | errno.EMSGSIZE:
            found = _PLACE.match(message)
            param = RENAMED.get(found[1], found[1]) if found is not None else None
            code = "context_length_exceeded" if err.errno == errno.EMSGSIZE else None
            return Problem(400, message, param=param, code=code)
        case errno.EDQUOT:
            return Problem(429, message, "insufficient_quota", code="insufficient_quota", headers=NO_RETRY)
        case errno.EAGAIN:
            return Problem(429, message, "rate_limit_error", code="rate_limit_exceeded", headers=_SOON)
        case errno.EPERM | errno.EACCES:
            return Problem(403, message, "permission_error")
        case errno.ENOENT:
            return Problem(404, message, "not_found_error")
        case errno.ENOSYS:
            return Problem(501, message, "not_implemented_error")
        case errno.ETIMEDOUT:
            return Problem(504, message, "timeout_error", headers=NO_RETRY)
        case errno.ENOTCONN | errno.ECONNREFUSED | errno.ECANCELED:
            return Problem(503, message, "server_error", headers=_SOON)
    return Problem(500, message, "server_error")


def openai_error(problem: Problem) -> dict[str, Any]:
    return {"error": {"message": problem.message, "type": problem.kind, "param": problem.param, "code": problem.code}}


@dataclass(slots=True)
class Counters:
    """What /metrics tells."""

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


class Request:
    """`account` is set before a handler gets it, unless the route is open to all."""

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
        self.extra: list[tuple[bytes, bytes]] = []  # headers of the reply
        self.begun = False  # the head of the reply is sent
        self._events = False  # it is a stream of events, not of lines
        self._receive, self._send = receive, send

    # ── from the program ──────────────────────────────────────────────────────────────────────────────────

    def token(self) -> str:
        """As a bearer token, as x-api-key, or as the password of Basic. Empty: none."""
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
        """Raises Problem (413), Full, Left."""
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
                self.account.take_body(len(message["body"]))
                taken += len(message["body"])
                parts += message["body"]
                if not message["more_body"]:
                    return bytes(parts)
        finally:
            self.account.drop_body(taken)

    async def json(self) -> dict[str, Any]:
        """Raises Problem as `body`, and 400."""
        body = await self.body()
        try:
            value = msgspec.json.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError) as err:
            raise Problem(400, f"the body is no JSON: {err}") from None
        except RecursionError:
            raise Problem(400, "the body is nested too deeply") from None
        if not isinstance(value, dict):
            raise Problem(400, "the body must be a JSON object")
        return value

    async def left(self) -> None:
        """Until the program has closed the connection."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    # ── to the program ────────────────────────────────────────────────────────────────────────────────────

    async def reply(self, value: Any, status: int = 200) -> None:
        await self.reply_bytes(encode(value), b"application/json", status)

    async def reply_bytes(self, body: bytes, kind: bytes, status: int = 200) -> None:
        await self._begin(status, kind, len(body))
        await self._send({"type": "http.response.body", "body": body})

    async def stream(self, part: bytes, kind: bytes, last: bool = False) -> None:
        """A part of a reply that comes in parts."""
        if not self.begun:
            self._events = kind.startswith(b"text/event-stream")
            self.extra.append((b"cache-control", b"no-cache"))
            await self._begin(200, kind, None)
        await self._send({"type": "http.response.body", "body": part, "more_body": not last})

    async def _begin(self, status: int, kind: bytes, size: int | None) -> None:
        self.begun = True
        self.app.counters.note(status)
        headers = [(b"content-type", kind), *self.extra]
        if size is not None:
            headers.append((b"content-length", str(size).encode()))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def fail(self, problem: Problem) -> None:
        if self.begun:
            part = encode(self.error_form(problem)) + b"\n"
            await self.stream(b"data: " + part + b"\n" if self._events else part, b"", last=True)
            return
        self.extra += [(name.encode(), value.encode()) for name, value in problem.headers.items()]
        await self.reply(self.error_form(problem), problem.status)


Handler = Callable[[Request], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Route:
    """`path`: a pattern for all of the path. `open`: without a token."""

    method: str
    path: re.Pattern[str]
    handler: Handler
    open: bool = False
    error_form: Callable[[Problem], dict[str, Any]] = openai_error


def route(
    method: str,
    path: str,
    handler: Handler,
    open: bool = False,
    error_form: Callable[[Problem], dict[str, Any]] = openai_error,
) -> Route:
    """`path` with {name} for a part between slashes; {name:path} for all that follows."""
    pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", re.sub(r"\{(\w+):path\}", r"(?P<\1>.+)", path))
    return Route(method, re.compile(pattern), handler, open, error_form)


class App:
    """The ASGI application."""

    def __init__(self, accounts: Accounts, counters: Counters, door: Endpoint, routes: list[Route]) -> None:
        self.accounts = accounts
        self.counters = counters
        self.models: list[ModelInfo] = []  # as last seen
        self._routes = routes
        self._hosts = {door.host, "localhost", "127.0.0.1", "::1"}

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        request = Request(self, scope, receive, send)
        try:
            await self._serve(request)
        except Left:
            self.counters.cancelled += 1
        except Problem as problem:
            await request.fail(problem)
        except Full as full:
            await request.fail(Problem(429, str(full), "rate_limit_error", headers=_SOON))
        except OSError as err:
            await request.fail(problem_of(err))
        except asyncio.CancelledError:
            raise
        except Exception:  # a bug: it costs this request, and no other
            logger.exception("%s %s: a bug of the gateway", request.method, request.path[:80])
            await request.fail(Problem(500, "the gateway made a mistake; aiosd's log has the details", "server_error"))

    async def _serve(self, request: Request) -> None:
        self._check_origin(request)
        chosen = self._route(request)
        if not chosen.open:
            await self._identify(request)
        await chosen.handler(request)

    def _check_origin(self, request: Request) -> None:
        """A page in a browser must not reach an agent's model, whatever name it has given this machine."""
        host = request.headers.get(b"host", b"").decode("latin-1")
        origin = request.headers.get(b"origin", b"").decode("latin-1")
        if _host(f"//{host}") not in self._hosts:
            raise Problem(403, f"host: {host[:80]!r} is not this machine")
        if origin and _host(origin) not in self._hosts:
            raise Problem(403, f"origin: requests from pages of {origin[:80]!r} are refused")

    def _route(self, request: Request) -> Route:
        allowed = []
        for one in self._routes:
            match = one.path.fullmatch(request.path)
            if match is None:
                continue
            if one.method == request.method or (one.method == "GET" and request.method == "HEAD"):
                request.words = {name: word for name, word in match.groupdict().items() if word is not None}
                request.error_form = one.error_form
                return one
            allowed.append(one.method)
        if allowed:
            request.extra.append((b"allow", ", ".join(allowed).encode()))
            raise Problem(405, f"{request.method} is not allowed here; {' and '.join(allowed)} is")
        raise Problem(404, f"there is nothing at {request.method} {request.path[:200]}", code="unknown_url")

    async def _identify(self, request: Request) -> None:
        """Whose request is it? Raises Problem: 401, 403, 503."""
        token, connection = request.token(), request.connection
        if connection.agent:
            await self._identify_guest(request)
            return
        if not token:
            message = "a token is needed: aios-run gives each agent its own in OPENAI_API_KEY"
            raise Problem(401, message, code="no_api_key")
        try:
            if len(token) > TOKEN_CHARS or token.startswith(wire.GATE):
                raise Refused
            account = await self.accounts.of(token)
        except Refused:
            raise Problem(401, "no agent that lives has this token", code="invalid_api_key") from None
        except NoKernel as err:
            raise Problem(503, err.strerror or str(err), "server_error", headers=_SOON) from None
        if connection.account is not account:
            if connection.account is not None or not await self.accounts.is_of(account, *connection.ends):
                raise Problem(403, "this token belongs to another agent", "permission_error", code="wrong_agent")
            if connection.account is None:  # it was not shown meanwhile, by a request in front of this one
                connection.known(account)
        request.account = account

    async def _identify_guest(self, request: Request) -> None:
        """The gate tells whose request it is, whatever token a program sends. Raises Problem: 403, 503."""
        connection = request.connection
        try:
            account = await self.accounts.of_gate(connection.agent)
        except Refused:
            raise Problem(403, "this agent has ended", "permission_error") from None
        except NoKernel as err:
            raise Problem(503, err.strerror or str(err), "server_error", headers=_SOON) from None
        if connection.account is not account:
            if connection.account is not None:
                raise Problem(403, "this agent was started again", "permission_error")
            connection.known(account)
        request.account = account


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
