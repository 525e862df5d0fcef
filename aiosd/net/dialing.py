"""From a granted host to a connection: its name is resolved here, every address checked, and the connection is made to
the checked address. So a name that is resolved to another address a moment later (DNS rebinding) leads nowhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from aiosd import threads
from aiosd.sandbox import addresses

THREADS = 32  # threads that look names up,
LOOKUPS = 2  # … and how many of them for one agent
CONNECT_S = 8.0  # for one address of a host,
ADDRESSES = 4  # of a host that are tried, at most

Address = tuple[str, int] | tuple[str, int, int, int]
Resolved = tuple[socket.AddressFamily, Address]


class Unreachable(Exception):
    """The host cannot be reached now; the message has the reason."""


class Private(Exception):
    """The host's address is not public; the message has the address."""


def why_not(address: str) -> str:
    """Why agents may not connect to an address, in a few words; "": they may."""
    return addresses.why_not_public(address) or ("an address of this machine" if _is_ours(address) else "")


def _is_ours(address: str) -> bool:
    """Whether it is a public address of this machine itself: a server there may be meant for this machine only. No
    packet is sent."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect((address, 9))
        return bool(sock.getsockname()[0] == address)
    return False


class Dialer:
    """Makes connections. `why_not`: the function of that name; tests use another one."""

    def __init__(self, why_not: Callable[[str], str] = why_not) -> None:
        self._why_not = why_not
        self._threads = ThreadPoolExecutor(THREADS, "lookup")

    async def dial(self, host: str, port: int, lookups: asyncio.Semaphore) -> socket.socket:
        """Connect to a host. `lookups`: limits the agent's lookups. Raises Unreachable, Private."""
        found = await self._look_up(host, port, lookups)
        for _, address in found:
            if why := self._why_not(address[0]):
                raise Private(f"{host} is {address[0]}, {why}")
        reason = "it has no address"
        for family, address in found[:ADDRESSES]:
            try:
                async with asyncio.timeout(CONNECT_S):
                    return await _connected(family, address)
            except TimeoutError:
                reason = "it does not answer"
            except OSError as err:
                reason = err.strerror or str(err)
        raise Unreachable(f"{host}:{port} cannot be reached: {reason}")

    async def _look_up(self, host: str, port: int, lookups: asyncio.Semaphore) -> list[Resolved]:
        """The addresses of a name. If the agent stops waiting its thread is still used until the lookup ends, because
        Linux's resolver cannot be interrupted."""
        loop = asyncio.get_running_loop()
        await lookups.acquire()

        def over(_: Future[list[Resolved]]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(lookups.release)

        try:
            future = threads.submit(self._threads, lambda: _resolve(host, port))
        except OSError as err:
            lookups.release()
            raise Unreachable(f"{host} cannot be looked up: {err.strerror}") from None
        future.add_done_callback(over)
        try:
            return await asyncio.wrap_future(future)
        except (OSError, UnicodeError) as err:
            raise Unreachable(f"{host} is not known: {getattr(err, 'strerror', None) or err}") from None


def _resolve(host: str, port: int) -> list[Resolved]:
    entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return list(dict.fromkeys((entry[0], entry[4]) for entry in entries))  # type: ignore[misc]


async def _connected(family: socket.AddressFamily, address: Address) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, address)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:  # of any kind, an interrupt too: undo, and raise it again
        sock.close()
        raise
    return sock
