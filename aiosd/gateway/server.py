"""The loop of the gateway: HTTP on the sockets that the guardian has made, and on connections that the proxy has
accepted."""

from __future__ import annotations

import asyncio
import functools
import logging
import selectors
import socket
import time
from collections.abc import Callable
from typing import Any

from uvicorn import Config
from uvicorn.server import ServerState

from aiosd.gateway.accounts import Accounts
from aiosd.gateway.connection import Guarded
from aiosd.gateway.pacer import Pacer
from aiosd.gateway.routes import ROUTES
from aiosd.gateway.spec import GatewaySpec
from aiosd.gateway.strangers import Strangers
from aiosd.gateway.web import App, Counters
from aiosd.gateway.whose import identify
from aiosd.ipc import passage
from aiosd.ipc.endpoint import BACKLOG
from aiosd.ipc.heartbeat import BEAT_S, Rounds
from aiosd.ipc.superior import Superior

KEEP_ALIVE_S = 75
GATHER_S = 0.0003


def serve(superior: Superior, spec: GatewaySpec, rounds: Rounds) -> int:
    counters = Counters()
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(Gathering(counters))) as runner:
        return runner.run(_serve(superior, spec, rounds, counters))


class Gathering(selectors.EpollSelector):
    """An event loop's selector that waits a moment longer after an event, while there are several streams. A model
    gives out the tokens of all of them at once, and the kernel sends them on one by one. Without the wait each would
    wake this process, and the model's process would have to wait for the processor as often."""

    def __init__(self, counters: Counters) -> None:
        super().__init__()
        self._counters = counters

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        found = super().select(timeout)
        if not found or timeout == 0 or self._counters.streams < 2:
            return found
        time.sleep(GATHER_S)
        return super().select(0)


async def _serve(superior: Superior, spec: GatewaySpec, rounds: Rounds, counters: Counters) -> int:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    strangers = Strangers()
    accounts = Accounts(spec.home, Pacer(lambda: counters.streams))
    superior.on_gone = accounts.gone
    superior.stats = lambda: {
        **counters.totals(),
        "agents": len(accounts),
        "strangers": len(strangers),
        "port": spec.door.port,
    }

    def look() -> None:
        superior.look()
        if superior.over:
            ended.set()

    loop.add_reader(superior.channel.fileno(), look)
    look()
    _beat(loop, rounds, accounts)
    for name in ("uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).setLevel(logging.ERROR)  # uvicorn would write a line for each broken request
    app = App(accounts, counters, spec.door, ROUTES, lambda request: identify(request, accounts))
    config = Config(
        app,
        lifespan="off",
        ws="none",
        access_log=False,
        log_config=None,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
    )
    config.load()
    kind = type("Connection", (Guarded,), {"strangers": strangers})
    state = ServerState()
    servers = [
        await loop.create_server(
            lambda: kind(config=config, server_state=state, app_state={}),
            sock=socket.socket(fileno=door.fd),
            backlog=BACKLOG,
        )
        for door in spec.door.all
    ]
    if spec.guests >= 0:
        guests = socket.socket(fileno=spec.guests)

        def connection_of(agent: int) -> Guarded:
            connection: Guarded = kind(config=config, server_state=state, app_state={})
            connection.agent = agent
            return connection

        passage.watch(loop, guests, functools.partial(_take_guest, connection_of))
    await ended.wait()
    for server in servers:
        server.close()
    return 0


def _take_guest(connection_of: Callable[[int], Guarded], message: passage.PassageMessage, fds: list[int]) -> None:
    """Serve a connection that the proxy has accepted at the gate of an agent."""
    loop = asyncio.get_running_loop()
    for sock in [socket.socket(fileno=fd) for fd in fds]:
        if not isinstance(message, passage.Guest):
            sock.close()
            continue
        sock.setblocking(False)
        connecting = loop.create_task(loop.connect_accepted_socket(functools.partial(connection_of, message.pid), sock))
        _connecting.add(connecting)
        connecting.add_done_callback(_guest_connected)


def _guest_connected(task: asyncio.Task[Any]) -> None:
    _connecting.discard(task)
    if not task.cancelled():
        task.exception()  # the connection is gone again; read the error, or asyncio reports it


_connecting: set[asyncio.Task[Any]] = set()  # asyncio keeps no task alive by itself


def _beat(loop: asyncio.AbstractEventLoop, rounds: Rounds, accounts: Accounts) -> None:
    """Send a heartbeat at each round of the loop."""
    rounds.begin()
    accounts.sweep()
    loop.call_later(BEAT_S, _beat, loop, rounds, accounts)
