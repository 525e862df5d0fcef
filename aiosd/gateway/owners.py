"""Whose is a connection on which no token was shown? That of the agent whose processes have its other end.

Programs have keys in them that mean nothing here, or none at all, and a fixed address; the connection proves whose they
are all the same. It is the only proof then, so it must be certain:

- All processes that have the other end are looked for (`holders`). The kernel proves from which agent each descends, as
  it does for its own clients (`kernel.ancestry`): by number and start time, with a pidfd, twice. If they are not all of
  one agent the connection is nobody's: each of them may have sent the request.
- A process that has ended has no ancestors. One that has lost its agent, or is a tool's or an MCP server's, descends
  from the supervisor alone, and belongs to no agent.
- An agent may begin with a socket as its stdin, stdout or stderr. Who started it chose that, has it, too, and may have
  sent the request. So what an agent was handed is never its own: the supervisor notes the inodes (`Agent.handed`).
- A program that takes a connection from another process, over a Unix socket, takes over what was sent on it.
- A page in a browser is not the browser: its requests need a token wherever the browser runs (`whose`).
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from aiosd import procfs
from aiosd.gateway.greetings import Greetings
from aiosd.gateway.holders import Holder, Holders, roots
from aiosd.gateway.identity import SocketAddress
from libaios import wire
from libaios.greeting import NotYet, Refused

SETTLE_S, SETTLE_TRIES = 0.05, 10  # an agent's program may connect before the kernel knows that it runs
UNSETTLED = 16  # connections that are asked about again at a time

_NOBODY = "no process of aiosd's user is found that has opened this connection"
_OUTSIDE = "this connection comes from no agent, not from one alone, or was handed to it when it was started"
_NO_AGENT = "this connection comes from a process of aiosd's that belongs to no agent"
_MANY = f"more than {wire.MOST_PROCESSES} processes have this connection"


class HasEnds(Protocol):
    @property
    def ends(self) -> tuple[SocketAddress, SocketAddress]:
        """The address of the other end, and ours."""


class UnknownOwner(Exception):
    """It is not certain whose it is; the message gives the reason."""


class Owners:
    def __init__(self, greetings: Greetings) -> None:
        self._greetings = greetings
        self._holders = Holders()
        self._unsettled = 0

    async def token_of(self, connection: HasEnds) -> str:
        """What stands for the agent that has this connection, in place of a token, as long as the agent lives. Raises
        UnknownOwner, NoKernel."""
        held = await self._holders.of(*connection.ends)
        if not held:
            raise UnknownOwner(_NOBODY)
        agent = await self._proved(roots(held))
        first = procfs.read_stat(agent.ospid)
        if first is None:
            raise UnknownOwner(_NOBODY)
        return f"{wire.PROCESSES}0/{agent.ospid}:{first.started}"

    async def _proved(self, held: list[Holder]) -> wire.Welcome:
        """What the kernel answers in the name of these processes' agent. Raises UnknownOwner, NoKernel."""
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
