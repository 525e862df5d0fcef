"""The agents that the gateway serves: for each a connection to the kernel, and the proof that a program may use it.

A token leads to an account; only the kernel knows which agent it belongs to. A connection that was accepted at an
agent's own gate (`birth.gates`) needs no token: only this agent's processes can connect there. Any other TCP connection
may use the account of an agent if the process at its other end is that agent or descends from it. That is looked up
once for each connection, in a thread, because there may be many processes to check. So a token that another agent has
read somewhere is of no use to it; nor is the token of a person's own programs, which no process of the system may use.
Without a token the connection alone may prove its agent (`owners`).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from aiosd import threads
from aiosd.gateway.greetings import Greetings
from aiosd.gateway.identity import SocketAddress, belongs, holder, is_outside
from aiosd.gateway.owners import Owners, UnknownOwner
from libaios import wire
from libaios.client import ControlSocket
from libaios.connection import Connection
from libaios.greeting import Refused
from libaios.home import Home
from libaios.pace import Pace

T = TypeVar("T")

CONNECTIONS = 256  # of one agent
BODY_BYTES = 64 << 20  # in requests of one agent that are being received,
BODY_BYTES_ALL = 512 << 20  # … and in those of all agents
SLOW_S = 10.0  # the most time for one request, when these limits are reached


class User(Protocol):
    """A TCP connection (`connection.Guarded`). `account`: the agent that it was shown to belong to."""

    account: Account | None
    agent: int  # the agent at whose own gate it was accepted; 0: none
    unknown: str  # a token that it has sent, and that no agent has
    unproven: str  # why it is no agent's without a token; "": that was not asked, or it is one's

    @property
    def ends(self) -> tuple[SocketAddress, SocketAddress]:
        """The address of the other end, and that of this end."""

    def known(self, account: Account) -> None: ...

    def identifying(self) -> AbstractContextManager[None]:
        """Entered while the agent of a request is being identified."""

    def abort(self) -> None: ...


class Full(Exception):
    """The agent has too much open; the message names the limit."""


@dataclass(slots=True, eq=False)
class Account:
    """One agent."""

    pid: int
    ospid: int  # 0: it has no process, and programs from outside act as it
    connection: Connection
    all: Accounts
    users: set[User] = field(default_factory=set)  # TCP connections that were shown to be its own
    body_bytes: int = 0
    responses: dict[str, bytes] = field(default_factory=dict)  # those that are kept (`openai.kept`); oldest first

    @property
    def over(self) -> bool:
        return self.connection.transport.hung_up

    def close(self) -> None:
        """Called when the agent or its kernel is dead."""
        self.connection.close("the agent of this token has ended")
        for user in list(self.users):
            user.abort()

    def admit(self, user: User) -> None:
        """Count a TCP connection of this agent. Raises Full."""
        if len(self.users) >= CONNECTIONS:
            raise Full(f"more than {CONNECTIONS} connections of one agent")
        self.users.add(user)

    def take_body(self, user: User, size: int) -> None:
        """Count `size` more bytes of a request. Raises Full."""
        if self.body_bytes + size > BODY_BYTES:
            raise Full(f"the requests of this agent that are on their way hold more than {BODY_BYTES} bytes")
        if self.all.body_bytes + size > BODY_BYTES_ALL:
            self.all.drop_slow()
            raise Full(f"the requests of all agents that are on their way hold more than {BODY_BYTES_ALL} bytes")
        self.body_bytes += size
        self.all.body_bytes += size
        self.all.receiving.setdefault(user, time.monotonic())

    def drop_body(self, user: User, size: int) -> None:
        """The request was handled, or will not be: count its bytes no more."""
        self.all.receiving.pop(user, None)
        self.body_bytes -= size
        self.all.body_bytes -= size


class Accounts:
    """All accounts. `pace`: when pieces of streams from the kernel are read."""

    def __init__(self, home: Home, pace: Pace) -> None:
        self._greetings = Greetings(home)
        self._owners = Owners(self._greetings)
        self._pace = pace
        self._by_token: dict[str, asyncio.Task[Account]] = {}
        self.body_bytes = 0  # of all agents
        self.receiving: dict[User, float] = {}  # connections with an incomplete request: since when
        self._threads = ThreadPoolExecutor(2, "identity")

    async def of_gate(self, agent: int) -> Account:
        """The account of the agent at whose gate a connection was accepted. Raises NoKernel."""
        return await self.of(f"{wire.GATE}{agent}")

    async def of(self, token: str) -> Account:
        """The account of a token, connected. Raises NoKernel: `Refused` if the token belongs to no live agent."""
        task = self._by_token.get(token)
        if task is not None and task.done() and (task.cancelled() or task.exception() or task.result().over):
            self.sweep()
            task = None
        if task is None:
            task = self._by_token[token] = asyncio.create_task(self._connect(token))
            task.add_done_callback(lambda done: self._drop_failed(token, done))
        return await asyncio.shield(task)

    def _drop_failed(self, token: str, done: asyncio.Task[Account]) -> None:
        if (done.cancelled() or done.exception() is not None) and self._by_token.get(token) is done:
            del self._by_token[token]

    async def _connect(self, token: str) -> Account:
        frames, welcome = await self._greetings.greet(token)
        for known in self._connected():  # by another token, its gate, or the other end of a connection
            if (known.pid, known.ospid) == (welcome.pid, welcome.ospid) and not known.over:
                frames.close()
                return known
        connection = Connection(ControlSocket(self._greetings.home, token, (frames, welcome)))
        connection.attach_loop(asyncio.get_running_loop(), self._pace)
        return Account(welcome.pid, welcome.ospid, connection, self)

    def _connected(self) -> list[Account]:
        done = [task for task in self._by_token.values() if task.done() and not task.cancelled()]
        return list(dict.fromkeys(task.result() for task in done if task.exception() is None))

    async def at_other_end(self, user: User) -> Account:
        """The account of the agent that has the other end of this connection. Raises UnknownOwner, NoKernel."""
        token = await self._owners.token_of(user)
        try:
            return await self.of(token)
        except Refused:
            raise UnknownOwner("its agent has ended") from None

    async def is_of(self, account: Account, theirs: SocketAddress, ours: SocketAddress) -> bool:
        """Whether the TCP connection is one of this agent."""
        if account.ospid:
            return await self._in_thread(lambda: belongs(theirs, ours, account.ospid))
        return await self._in_thread(lambda: is_outside(theirs, ours, os.getppid()))

    async def process_of(self, user: User) -> int:
        """The process at the other end of a TCP connection that is identified; 0: none is found. Linux shows nothing
        of connections in an agent's own network: for these the result is the agent itself."""
        if user.agent and user.account is not None:
            return user.account.ospid
        return await self._in_thread(lambda: holder(*user.ends))

    async def _in_thread(self, look: Callable[[], T]) -> T:
        """Raises OSError (EAGAIN) if no thread can be started."""
        return await asyncio.wrap_future(threads.submit(self._threads, look))

    def drop_slow(self) -> None:
        """The incomplete requests hold too much memory: close those that have been incomplete for SLOW_S."""
        for user, since in list(self.receiving.items()):
            if time.monotonic() - since > SLOW_S:
                del self.receiving[user]
                user.abort()

    def gone(self, pid: int) -> None:
        """Close the account of an agent that is dead."""
        for token, task in list(self._by_token.items()):
            if task.done() and not task.cancelled() and task.exception() is None and task.result().pid == pid:
                del self._by_token[token]
                task.result().close()

    def sweep(self) -> None:
        """Close the accounts whose connection the kernel has ended: their agents have died, perhaps while there was no
        kernel to report it."""
        for token, task in list(self._by_token.items()):
            if task.done() and not task.cancelled() and task.exception() is None and task.result().over:
                del self._by_token[token]
                task.result().close()

    def __len__(self) -> int:
        return len(self._connected())
