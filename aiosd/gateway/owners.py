"""Finds the agent of a connection on which no valid token was sent: the agent whose processes have its other end.

Many programs send a fixed key that means nothing here, or no key, and use a fixed address. The connection is the only
proof of their agent then, so whatever is not certain is refused:

- All processes that have the other end are found (`holders`). The kernel proves the agent of each as for its own
  clients (`kernel.ancestry`): by pid and start time, with a pidfd, twice. If they do not all belong to one agent the
  connection belongs to none: each of the processes may have sent the request.
- A process that has ended has no ancestors. An orphan of a dead agent, a tool's process and an MCP server have the
  supervisor as their only ancestor, and belong to no agent.
- An agent may begin with a socket as its stdin, stdout or stderr. Its parent chose that socket, and may have sent the
  request. So such a socket never proves anything: the supervisor records its inode (`records.Agent.handed`), which the
  kernel compares.
- A program that receives a connection from another process, over a Unix socket, takes over what was sent on it: the
  other process may be gone, or not be found.
- Pages in a browser are not the browser's own requests: they need a token wherever the browser runs (`whose`).
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from aiosd import procfs
from aiosd.gateway.greetings import Greetings
from aiosd.gateway.holders import Holders, SocketHolder, roots
from aiosd.gateway.identity import SocketAddress
from libaios import wire
from libaios.greeting import NotYet, Refused

SETTLE_S, SETTLE_TRIES = 0.05, 10  # an agent's program may connect before the kernel knows that it runs
UNSETTLED = 16  # connections that are asked about again at a time

_NOBODY = "no process of aiosd's user is found that has opened this connection"
_OUTSIDE = "this connection was not opened by one agent's own programs"
_NO_AGENT = "this connection comes from a process of aiosd's that belongs to no agent"
_MANY = f"more than {wire.MOST_PROCESSES} processes have this connection"


class HasEnds(Protocol):
    @property
    def ends(self) -> tuple[SocketAddress, SocketAddress]:
        """The address of the other end, and ours."""


class UnknownOwner(Exception):
    """The connection does not prove its agent; the message gives the reason."""


class Owners:
    def __init__(self, greetings: Greetings) -> None:
        self._greetings = greetings
        self._holders = Holders()
        self._unsettled = 0

    async def token_of(self, connection: HasEnds) -> str:
        """The Hello's token for the agent of this connection: its first process, so it is valid as long as the agent
        lives. Raises UnknownOwner, NoKernel."""
        held = await self._holders.of(*connection.ends)
        if not held:
            raise UnknownOwner(_NOBODY)
        agent = await self._proved(roots(held))
        first = procfs.read_stat(agent.ospid)
        if first is None:
            raise UnknownOwner(_NOBODY)
        return f"{wire.PROCESSES}0/{agent.ospid}:{first.started}"

    async def _proved(self, held: list[SocketHolder]) -> wire.Welcome:
        """The kernel's Welcome for the agent of these processes. Raises UnknownOwner, NoKernel."""
        if len(held) > wire.MOST_PROCESSES:
            raise UnknownOwner(_MANY)
        names = ",".join(f"{one.pid}:{one.started}" for one in held)
        token = f"{wire.PROCESSES}{held[0].inode}/{names}"
        for tries in range(1, SETTLE_TRIES + 1):
            try:
                frames, welcome = await self._greetings.greet(token)
            except Refused:
                raise UnknownOwner(_OUTSIDE) from None
            except NotYet:
                if tries == SETTLE_TRIES or self._unsettled >= UNSETTLED:
                    break
                await self._settle()
            else:
                frames.close()
                return welcome
        raise UnknownOwner(_NO_AGENT)

    async def _settle(self) -> None:
        self._unsettled += 1
        try:
            await asyncio.sleep(SETTLE_S)
        finally:
            self._unsettled -= 1
