"""Valid and invalid HTTP requests: the gateway's protocol and routes, without a system."""

from __future__ import annotations

import asyncio
import errno
import gzip
import json
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from aiosd.ipc import endpoint
from aiosd.ipc.endpoint import Endpoint

pytestmark = pytest.mark.skipif(not endpoint.installed(), reason="the extra `gateway` is not installed")

HEAD = "POST /echo HTTP/1.1\r\nHost: localhost\r\n"


@dataclass
class Account:
    """An account that accepts all bodies."""

    held: int = 0

    def take_body(self, user: Any, size: int) -> None:
        self.held += size

    def drop_body(self, user: Any, size: int) -> None:
        self.held -= size


@dataclass
class House:
    """A gateway whose only agent echoes. `/wait` waits for `go`; `left` lists requests whose clients left before."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    account: Account
    go: asyncio.Event = field(default_factory=asyncio.Event)
    waits: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)

    def send(self, text: str | bytes, body: bytes = b"") -> None:
        self.writer.write((text.encode() if isinstance(text, str) else text) + body)

    async def reply(self, method: str = "POST") -> tuple[int, dict[str, str], bytes]:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        line, *fields = head.strip().split("\r\n")
        headers = dict(one.lower().split(": ", 1) for one in fields)
        size = 0 if method == "HEAD" else int(headers.get("content-length", 0))
        return int(line.split()[1]), headers, await self.reader.readexactly(size)

    async def ask(self, text: str, body: bytes = b"", method: str = "POST") -> tuple[int, dict[str, str], Any]:
        self.send(text, body)
        status, headers, found = await self.reply(method)
        return status, headers, json.loads(found) if found else None

    async def post(self, body: bytes, *headers: str) -> tuple[int, dict[str, str], Any]:
        more = "".join(f"{one}\r\n" for one in headers)
        return await self.ask(f"{HEAD}{more}Content-Length: {len(body)}\r\n\r\n", body)

    async def closed(self) -> bool:
        return await self.reader.read() == b""


@asynccontextmanager
async def _house(keep_alive_s: float = 30) -> AsyncIterator[House]:
    from uvicorn import Config
    from uvicorn.server import ServerState

    from aiosd.gateway import web
    from aiosd.gateway.connection import Guarded
    from aiosd.gateway.strangers import Strangers

    account, made = Account(), list[House]()

    async def echo(request: web.HttpRequest) -> None:
        request.account = account  # type: ignore[assignment]
        await request.reply({"got": await request.json()})

    async def wait(request: web.HttpRequest) -> None:
        request.account = account  # type: ignore[assignment]
        (house,) = made
        await request.body()
        house.waits.set()
        leaving = asyncio.create_task(request.left())
        going = asyncio.create_task(house.go.wait())
        await asyncio.wait((leaving, going), return_when=asyncio.FIRST_COMPLETED)
        if leaving.done():
            house.left.set()
            raise web.Left
        leaving.cancel()
        await request.reply({"waited": True})

    async def breaks(request: web.HttpRequest) -> None:
        await request.stream(b"begun\n\n", b"text/event-stream" if request.words["kind"] == "events" else b"lines")
        raise OSError(errno.EDQUOT, "used up")

    async def show(request: web.HttpRequest) -> None:
        await request.reply(request.words)

    routes = [
        web.route("POST", "/echo", echo, open=True),
        web.route("POST", "/wait", wait, open=True),
        web.route("POST", "/break/{kind}", breaks, open=True),
        web.route("GET", "/models/{model:path}", show, open=True, before="(?:/v1)?"),
    ]
    app = web.App(None, web.Counters(), Endpoint("127.0.0.1", 1), routes, None)  # type: ignore[arg-type]
    config = Config(app, lifespan="off", ws="none", access_log=False, log_config=None, timeout_keep_alive=keep_alive_s)  # type: ignore[arg-type]
    config.load()
    kind = type("Connection", (Guarded,), {"strangers": Strangers()})
    state, loop = ServerState(), asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: kind(config=config, server_state=state, app_state={}), host="127.0.0.1", port=0
    )
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    made.append(House(reader, writer, account))
    try:
        yield made[0]
        assert account.held == 0
    finally:
        writer.close()
        server.close()


Body = Callable[[House], Coroutine[Any, Any, None]]


def in_house(body: Body) -> Callable[[], None]:
    """Turn a coroutine with a House into a test."""

    def test() -> None:
        async def run() -> None:
            async with asyncio.timeout(20), _house() as house:
                await body(house)

        asyncio.run(run())

    test.__name__, test.__doc__ = body.__name__, body.__doc__
    return test


# ── paths and methods ─────────────────────────────────────────────────────────────────────────────────────


@in_house
async def test_a_path_is_the_same_with_more_slashes_and_in_percents(house: House) -> None:
    for path in ("/v1/models/a/b", "/models/a%2Fb", "/v1/models/a/b/", "//v1//models/a/b"):
        found = await house.ask(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (found[0], found[2]) == (200, {"model": "a/b"}), path


@in_house
async def test_options_lists_the_allowed_methods(house: House) -> None:
    for path, allowed in (("/echo", "post, options"), ("/models/x", "get, head, options"), ("*", None)):
        status, headers, _ = await house.ask(f"OPTIONS {path} HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert (status, "content-length" in headers) == (204, False)
        assert headers["allow"] == (allowed or "get, post, head, options")
    status, headers, _ = await house.ask("GET /echo HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert (status, headers["allow"]) == (405, "post, options")
    assert (await house.ask("OPTIONS /x HTTP/1.1\r\nHost: localhost\r\n\r\n"))[0] == 404


@in_house
async def test_a_404_lists_the_paths_that_exist(house: House) -> None:
    status, _, found = await house.ask("GET /v1/nothing HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert (status, found["error"]["code"]) == (404, "unknown_url")
    assert found["error"]["message"].endswith(
        "there are: POST /echo, POST /wait, POST /break/{kind}, GET /models/{model}"
    )


@in_house
async def test_head_has_no_body(house: House) -> None:
    status, headers, found = await house.ask("HEAD /models/x HTTP/1.1\r\nHost: localhost\r\n\r\n", method="HEAD")
    assert (status, found) == (200, None)
    assert int(headers["content-length"]) > 0
    assert (await house.post(b"{}"))[0] == 200, "the next reply follows at once"


@in_house
async def test_pages_of_this_machine_get_the_headers_that_permit_requests(house: House) -> None:
    ask = "OPTIONS /echo HTTP/1.1\r\nHost: localhost\r\nAccess-Control-Request-Method: POST\r\n"
    ask += "Access-Control-Request-Headers: authorization\r\nOrigin: "
    status, headers, _ = await house.ask(f"{ask}http://localhost:3000\r\n\r\n")
    assert (status, headers["access-control-allow-origin"]) == (204, "http://localhost:3000")
    assert headers["access-control-allow-headers"] == "authorization"
    status, headers, _ = await house.ask(f"{ask}https://evil.example\r\n\r\n")
    assert (status, "access-control-allow-origin" in headers) == (403, False)


# ── bodies ────────────────────────────────────────────────────────────────────────────────────────────────


@in_house
async def test_a_body_may_be_compressed_and_is_bounded_all_the_same(house: House) -> None:
    body = b'{"x": 1}'
    for coding, packed in (("gzip", gzip.compress(body)), ("deflate", zlib.compress(body)), ("identity", body)):
        assert (await house.post(packed, f"Content-Encoding: {coding}"))[2] == {"got": {"x": 1}}
    bomb = gzip.compress(b" " * (17 << 20))
    for packed, coding, status in (
        (bomb, "gzip", 413), (body, "gzip", 400), (gzip.compress(body)[:-4], "gzip", 400), (body, "br", 415),
    ):  # fmt: skip
        assert (await house.post(packed, f"Content-Encoding: {coding}"))[0] == status


@in_house
async def test_json_is_json_whatever_it_is_called(house: House) -> None:
    form = "Content-Type: application/x-www-form-urlencoded"
    assert (await house.post(b"\xef\xbb\xbf{}", form))[0] == 200
    status, _, found = await house.post(b"a=b", form)
    assert status == 400
    assert "no JSON, but application/x-www-form-urlencoded" in found["error"]["message"]


@in_house
async def test_a_client_that_expects_100_continue_gets_it(house: House) -> None:
    house.send(f"{HEAD}Expect: 100-continue\r\nContent-Length: 2\r\n\r\n")
    assert (await house.reply())[0] == 100
    house.send("{}")
    assert (await house.reply())[0] == 200
    house.send("POST /nothing HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
    assert (await house.reply())[0] == 404
    assert await house.closed(), "what would come next might be the body, or not"


@in_house
async def test_an_upgrade_is_ignored_and_the_request_answered(house: House) -> None:
    """Java's client sends such requests."""
    upgrade = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAA")
    for _ in range(2):
        assert (await house.post(b'{"x": 1}', *upgrade))[2] == {"got": {"x": 1}}
    house.send(f"{HEAD}Connection: Upgrade\r\nUpgrade: h2c\r\nExpect: 100-continue\r\n")
    house.send("Transfer-Encoding: chunked\r\n\r\n")
    assert (await house.reply())[0] == 100
    for part in ('5\r\n{"x":\r\n', "2\r\n2}\r\n", "0\r\n\r\n"):
        house.send(part)
        await house.writer.drain()
    assert json.loads((await house.reply())[2]) == {"got": {"x": 2}}
    get = "GET /models/x HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    assert (await house.ask(get))[0] == 200


# ── one after the other ───────────────────────────────────────────────────────────────────────────────────

WAIT = "POST /wait HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}"
ECHO = f"{HEAD}Content-Length: 2\r\n\r\n{{}}"


@in_house
async def test_requests_may_be_sent_ahead_and_are_answered_in_order(house: House) -> None:
    house.send(WAIT + ECHO * 30)
    house.go.set()
    assert json.loads((await house.reply())[2]) == {"waited": True}
    assert [(await house.reply())[0] for _ in range(30)] == [200] * 30


@in_house
async def test_a_client_that_leaves_is_noticed_even_with_another_request_sent_ahead(house: House) -> None:
    house.send(WAIT)
    await house.waits.wait()
    house.send(ECHO)
    house.writer.close()
    await house.left.wait()


@in_house
async def test_an_error_within_a_stream_is_sent_in_it(house: House) -> None:
    for kind, mark in (("events", b"data: "), ("lines", b"")):
        house.send(f"POST /break/{kind} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
        head, _, body = (await house.reader.readuntil(b"\r\n0\r\n\r\n")).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        _, begun, _, error, *_ = body.split(b"\r\n")  # lengths and chunks in turn
        assert (begun, error[: len(mark)]) == (b"begun\n\n", mark)
        assert json.loads(error.removeprefix(mark))["error"]["code"] == "insufficient_quota"
        assert error.endswith(b"}\n\n" if mark else b"}\n")


@in_house
async def test_garbage_after_a_request_does_not_change_its_reply(house: House) -> None:
    house.send(WAIT)
    await house.waits.wait()
    house.send("nonsense\r\n\r\n")
    house.send(ECHO)
    await house.writer.drain()
    house.go.set()
    status, headers, found = await house.reply()
    assert (status, json.loads(found), headers["connection"]) == (200, {"waited": True}, "close")
    assert await house.closed()


@in_house
async def test_an_invalid_request_gets_an_error_in_json(house: House) -> None:
    status, headers, found = await house.ask("GET / HTTP/1.1\r\n" + "X: " + "x" * 70_000 + "\r\n\r\n")
    assert (status, headers["connection"]) == (431, "close")
    assert "65536 bytes" in found["error"]["message"]


@in_house
async def test_a_request_that_breaks_off_is_no_request(house: House) -> None:
    house.send(f"{HEAD}Transfer-Encoding: chunked\r\n\r\nzz\r\n")
    assert (await house.reply())[0] == 400
    assert await house.closed()


def test_an_incomplete_request_times_out_like_a_silent_connection() -> None:
    async def run() -> None:
        async with asyncio.timeout(20), _house(keep_alive_s=0.2) as house:
            assert (await house.post(b"{}"))[0] == 200
            house.send("POST /ec")
            assert await house.closed()

    asyncio.run(run())


def test_of_many_connections_at_once_none_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    from aiosd.gateway import strangers

    class Connection:
        aborted = False

        def abort(self) -> None:
            self.aborted = True

    async def run() -> None:
        known = strangers.Strangers()
        crowd = [Connection() for _ in range(500)]
        for one in crowd:
            known.add(one)
        assert not any(one.aborted for one in crowd)
        for one in crowd[:100]:
            known.identifying(one)
        monkeypatch.setattr(strangers, "YOUNG_S", -1.0)  # as if they had been silent for long
        known.add(crowd[0])
        assert [one.aborted for one in crowd] == [False] * 100 + [True] * 273 + [False] * 127
        for one in crowd[1:100]:
            known.refused(one)
        assert len(known) == strangers.SILENT
        monkeypatch.setattr(strangers, "MOST", strangers.SILENT)
        known.identifying(crowd[99])
        known.add(Connection())
        assert not crowd[99].aborted
        assert len(known) == strangers.MOST
        for one in [*known._silent, *known._pending]:
            known.forget(one)  # and their timers

    asyncio.run(run())


def test_slow_bodies_are_aborted_when_all_memory_for_bodies_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    from aiosd.gateway import accounts

    class User:
        account = None
        aborted = False

        def abort(self) -> None:
            self.aborted = True

    monkeypatch.setattr(accounts, "BODY_BYTES_ALL", 100)
    clock = [0.0]
    monkeypatch.setattr(accounts.time, "monotonic", lambda: clock[0])
    every = accounts.Accounts(None, lambda: 0)  # type: ignore[arg-type]
    first, second = (accounts.Account(pid, 1, None, every) for pid in (7, 8))  # type: ignore[arg-type]
    slow, quick, late = User(), User(), User()
    first.take_body(slow, 60)  # type: ignore[arg-type]
    clock[0] += accounts.SLOW_S + 1
    first.take_body(slow, 1)  # type: ignore[arg-type]
    second.take_body(quick, 30)  # type: ignore[arg-type]
    with pytest.raises(accounts.Full, match="of all agents"):
        second.take_body(late, 20)  # type: ignore[arg-type]
    assert (slow.aborted, quick.aborted) == (True, False)
    first.drop_body(slow, 61)  # type: ignore[arg-type]
    second.take_body(late, 20)  # type: ignore[arg-type]
    every._threads.shutdown()
