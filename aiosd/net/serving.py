"""The loop of the proxy's process: gates from the kernel, the channel, heartbeats."""

from __future__ import annotations

import asyncio
import socket

from aiosd.ipc import link, passage
from aiosd.ipc.heartbeat import BEAT_S, Rounds
from aiosd.ipc.superior import Superior
from aiosd.net.dialing import Dialer
from aiosd.net.proxy import Proxy
from aiosd.net.shares import Shares
from aiosd.net.spec import ProxySpec

OUTBOX_BYTES = 1 << 20  # unsent bytes for the kernel above which denials are not reported


def serve(superior: Superior, spec: ProxySpec, rounds: Rounds) -> int:
    return asyncio.run(_serve(superior, spec, rounds))


async def _serve(superior: Superior, spec: ProxySpec, rounds: Rounds) -> int:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    guests = socket.socket(fileno=spec.guests) if spec.guests >= 0 else None
    gates = socket.socket(fileno=spec.gates)

    def denied(pid: int, host: str, port: int, why: str) -> None:
        if superior.channel.outbox_bytes < OUTBOX_BYTES:
            superior.send(link.Denied(pid, host, port, why))

    def charge(pid: int, cpu_us: int) -> None:
        if cpu_us and superior.channel.outbox_bytes < OUTBOX_BYTES:
            superior.send(link.ProxyUse(pid, cpu_us))

    proxy = Proxy(Dialer(), denied, Shares(loop.call_later, charge), guests)
    superior.stats = lambda: {
        "agents": len(proxy.gates),
        "connections": proxy.connections,
        "served": proxy.served,
        "refused": proxy.refused,
    }

    def look() -> None:
        superior.look()
        if superior.over:
            ended.set()

    loop.add_reader(superior.channel.fileno(), look)
    passage.watch(loop, gates, proxy.handle)
    look()
    _beat(loop, rounds)
    await ended.wait()
    proxy.close()
    return 0


def _beat(loop: asyncio.AbstractEventLoop, rounds: Rounds) -> None:
    """Send a heartbeat at each round of the loop."""
    rounds.begin()
    loop.call_later(BEAT_S, _beat, loop, rounds)
