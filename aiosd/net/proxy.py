"""The proxy at agents' gates.

A connection has one request (see `request`): its head is read, its host is compared with the agent's grants and
connected, and then bytes go both ways until one side ends. Each agent has a limit of connections; when it is reached,
or when all agents together have too many, further ones wait at the agent's own gate. No connection may be silent for
ever, and each takes no more memory than the buffers of a few reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from aiosd.ipc import passage
from aiosd.net import request
from aiosd.net.dialing import LOOKUPS, Dialer, Private, Unreachable
from aiosd.net.request import Bad, ProxyRequest
from aiosd.net.shares import Shares
from aiosd.sandbox import hosts

logger = logging.getLogger("proxy")

CONNECTIONS = 64  # of one agent
CONNECTIONS_ALL = 4096  # of all agents; when there are more, each agent may have
FEW = 8
FDS_KEPT = 256  # descriptors kept free for other uses than connections
ACCEPTED_AT_ONCE = 16
HEAD_S = 20.0  # time for a request's head
DIAL_S = 30.0  # time until its host is connected
IDLE_S = 900.0  # without a byte in either direction
LINGER_S = 2.0  # time for a client to read why it was refused
GUESTS = 64  # connections of one agent that are passed on to the gateway, until there is a pause
PAUSE_S = 0.2  # length of that pause, and of the one after a descriptor was missing
BUFFER = request.HEAD_BYTES  # of one read; at most twice that is buffered in each direction
DENIED_AGAIN_S = 60.0  # after which the same denial is reported again
DENIED_KNOWN = 256  # of one agent,
DENIED_PER_S = 20  # new denials of one agent that are reported in a second, at most

#: Agent, host, port, and why.
OnDenied = Callable[[int, str, int, str], None]
_PHRASES = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large", 504: "Gateway Timeout"}


@dataclass(slots=True, eq=False)
class AgentGate:
    """The gate of one agent, with its connections."""

    pid: int
    life: int
    grants: tuple[hosts.HostGrant, ...]
    listeners: list[socket.socket]
    lookups: asyncio.Semaphore
    connections: set[asyncio.Task[None]] = field(default_factory=set)
    guests: int = 0  # connections passed on since the last pause
    denied: OrderedDict[tuple[str, int], float] = field(default_factory=OrderedDict)  # last report of each denial
    reported: int = 0  # denials reported in this second,
    second: float = 0.0  # … and when that second began


@dataclass(slots=True)
class _Traffic:
    """The state of one connection."""

    pid: int
    shares: Shares
    at: float = field(default_factory=time.monotonic)

    def read(self, count: int) -> None:
        self.at = time.monotonic()
        self.shares.read(self.pid, count)


class Proxy:
    """Serves all gates. `denied` is called with each denial, `shares` counts the work for each agent; `guests`: the
    passage to the gateway, None: there is none."""

    def __init__(self, dialer: Dialer, denied: OnDenied, shares: Shares, guests: socket.socket | None = None) -> None:
        self._dialer = dialer
        self._denied = denied
        self._shares = shares
        self._guests = guests
        self._loop = asyncio.get_running_loop()
        self.gates: dict[int, AgentGate] = {}
        self._full: set[AgentGate] = set()  # gates whose further connections wait
        self.connections = 0
        self.served = 0
        self.refused = 0
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = max(FEW, min(CONNECTIONS_ALL, (soft - FDS_KEPT) // 2))

    # ── gates ─────────────────────────────────────────────────────────────────────────────────────────────

    def handle(self, message: passage.PassageMessage, fds: list[int]) -> None:
        """Handle a message of the kernel."""
        match message:
            case passage.Gate():
                self._open(message, [socket.socket(fileno=fd) for fd in fds])
            case passage.Closed(pid=pid):
                self._close(pid)
            case passage.GatesKept(pids=pids):
                for pid in self.gates.keys() - set(pids):
                    self._close(pid)

    def _open(self, message: passage.Gate, listeners: list[socket.socket]) -> None:
        known = self.gates.get(message.pid)
        if known is not None and known.life == message.life:  # a new kernel has sent the gate again
            for one in listeners:
                one.close()
            return
        self._close(message.pid)
        lookups = asyncio.Semaphore(LOOKUPS)
        gate = AgentGate(message.pid, message.life, hosts.grants(message.net), listeners, lookups)
        self.gates[gate.pid] = gate
        self._listen(gate)

    def _close(self, pid: int) -> None:
        """The agent has ended: close its connections."""
        gate = self.gates.pop(pid, None)
        if gate is None:
            return
        for listener in gate.listeners:
            self._loop.remove_reader(listener)
            listener.close()
        self._full.discard(gate)
        for task in gate.connections:
            task.cancel()

    def close(self) -> None:
        for pid in list(self.gates):
            self._close(pid)

    def _listen(self, gate: AgentGate) -> None:
        self._full.discard(gate)
        for number, listener in enumerate(gate.listeners):
            self._loop.add_reader(listener, self._accept, gate, listener, number > 0)

    def _pause(self, gate: AgentGate) -> None:
        """Accept no more connections for a moment at the gate of the proxy. (The gateway counts its connections
        itself.)"""
        self._full.add(gate)
        self._loop.remove_reader(gate.listeners[0])

    def _resume(self) -> None:
        """Accept connections again, since there is room."""
        for gate in [gate for gate in self._full if self._room(gate)]:
            self._listen(gate)

    def _room(self, gate: AgentGate) -> bool:
        return len(gate.connections) < (CONNECTIONS if self.connections < self._most else FEW)

    def _accept(self, gate: AgentGate, listener: socket.socket, to_gateway: bool) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            if to_gateway and gate.guests >= GUESTS:
                self._rest(gate, gate.listeners[1:])
                return
            if not to_gateway and not self._room(gate):
                self._pause(gate)
                return
            try:
                sock, _ = listener.accept()
            except (BlockingIOError, ConnectionError):
                return
            except OSError as err:  # out of descriptors: they keep waiting, and are not polled meanwhile
                logger.warning("connections of agents: %s", err)
                self._rest(gate, gate.listeners)
                return
            if to_gateway:
                self._pass_on(gate, sock)
            else:
                self._begin(gate, sock)

    def _rest(self, gate: AgentGate, listeners: list[socket.socket]) -> None:
        for one in listeners:
            self._loop.remove_reader(one)
        self._loop.call_later(PAUSE_S, self._rested, gate)

    def _rested(self, gate: AgentGate) -> None:
        gate.guests = 0
        if self.gates.get(gate.pid) is gate:
            self._listen(gate)

    def _pass_on(self, gate: AgentGate, sock: socket.socket) -> None:
        gate.guests += 1
        self._shares.connected(gate.pid)
        if gate.guests == 1:
            self._loop.call_later(PAUSE_S, self._rested, gate)
        with sock, contextlib.suppress(OSError):  # the gateway does not keep up: the connection is refused
            if self._guests is not None:
                passage.send(self._guests, passage.Guest(gate.pid), [sock.fileno()])

    def _begin(self, gate: AgentGate, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._shares.connected(gate.pid)
        task = self._loop.create_task(self._serve(gate, sock))
        self.connections += 1
        gate.connections.add(task)
        task.add_done_callback(lambda done: self._end(gate, done))

    def _end(self, gate: AgentGate, done: asyncio.Task[None]) -> None:
        self.connections -= 1
        gate.connections.discard(done)
        if not done.cancelled() and (err := done.exception()) is not None:  # a bug: it ends this connection only
            logger.error("a connection of agent %d: a bug of the proxy", gate.pid, exc_info=err)
        self._resume()

    # ── a connection ──────────────────────────────────────────────────────────────────────────────────────

    async def _serve(self, gate: AgentGate, sock: socket.socket) -> None:
        reader, writer = await _streams(sock)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await self._serve_streams(gate, reader, writer)
        finally:
            writer.transport.abort()

    async def _serve_streams(self, gate: AgentGate, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            wanted = await _head(reader)
            server = await self._dial(gate, wanted)
        except Bad as bad:
            await _refuse(reader, writer, bad.status, str(bad))
            return
        self.served += 1
        far_reader, far_writer = await _streams(server)
        try:
            traffic = _Traffic(gate.pid, self._shares)
            await _relay(wanted, reader, writer, far_reader, far_writer, traffic)
        except Bad as bad:
            await _refuse(reader, writer, bad.status, str(bad))
        finally:
            far_writer.transport.abort()

    async def _dial(self, gate: AgentGate, wanted: ProxyRequest) -> socket.socket:
        """Connect to the wanted host. Raises Bad."""
        host, port = wanted.host, wanted.port
        granted = hosts.rule(gate.grants, host, port)
        if granted is None:
            raise self._refusal(gate, wanted, hosts.refusal(gate.grants, host, port))
        try:
            async with asyncio.timeout(DIAL_S):
                return await self._dialer.dial(host, port, gate.lookups)
        except Private as err:
            words = f"sandbox: {err}, which --net {granted} does not reach: public addresses only"
            raise self._refusal(gate, wanted, words) from None
        except Unreachable as err:
            raise Bad(str(err), 502) from None
        except TimeoutError:
            raise Bad(f"{host}:{port} was not reached within {DIAL_S:.0f} s", 504) from None

    def _refusal(self, gate: AgentGate, wanted: ProxyRequest, words: str) -> Bad:
        self.refused += 1
        key, now = (wanted.host, wanted.port), time.monotonic()
        if now - gate.second >= 1.0:
            gate.second, gate.reported = now, 0
        if gate.reported < DENIED_PER_S and now - gate.denied.get(key, -DENIED_AGAIN_S) >= DENIED_AGAIN_S:
            gate.reported += 1
            gate.denied[key] = now
            gate.denied.move_to_end(key)
            if len(gate.denied) > DENIED_KNOWN:
                gate.denied.popitem(last=False)
            self._denied(gate.pid, wanted.host, wanted.port, words)
        return Bad(words, 403)


async def _streams(sock: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection(sock=sock, limit=BUFFER)
    writer.transport.max_size = BUFFER  # type: ignore[attr-defined] # size of a read, 256 kB by default
    return reader, writer


async def _head(reader: asyncio.StreamReader) -> ProxyRequest:
    """Read the head of a request. Raises Bad, IncompleteReadError."""
    try:
        async with asyncio.timeout(HEAD_S):
            return request.parse(await reader.readuntil(b"\r\n\r\n"))
    except asyncio.LimitOverrunError:
        raise Bad(f"the head of a request may have {request.HEAD_BYTES} bytes", 431) from None
    except TimeoutError:
        raise Bad(f"no request came within {HEAD_S:.0f} s", 408) from None


async def _refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, status: int, words: str) -> None:
    """Refuse a request. Clients of CONNECT show only the first line: so the sentence is in there, too."""
    phrase = words.encode("ascii", "replace")[:512].replace(b"\r", b" ").replace(b"\n", b" ").decode("ascii")
    if status not in (403, 502):
        phrase = _PHRASES.get(status, "Refused")
    body = words.encode("utf-8", "replace") + b"\n"
    head = f"HTTP/1.1 {status} {phrase}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {len(body)}\r\n"
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(LINGER_S):
            writer.write(head.encode("ascii") + b"Connection: close\r\n\r\n" + body)
            await writer.drain()
            writer.write_eof()
            while await reader.read(BUFFER):  # unread data would make Linux drop the answer
                pass


async def _relay(
    wanted: ProxyRequest,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    far_reader: asyncio.StreamReader,
    far_writer: asyncio.StreamWriter,
    traffic: _Traffic,
) -> None:
    """Copy until both directions have ended, or no data come any more. Raises Bad for a malformed body."""
    if wanted.head:
        far_writer.write(wanted.head)
        there = _copy_body(wanted.body, reader, far_writer, traffic)
    else:
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        there = _copy(reader, far_writer, traffic)
    back = _copy(far_reader, writer, traffic)
    tasks = {asyncio.ensure_future(there), asyncio.ensure_future(back)}
    pending = tasks
    try:
        while pending and time.monotonic() - traffic.at < IDLE_S:
            wait_s = traffic.at + IDLE_S - time.monotonic()
            done, pending = await asyncio.wait(pending, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        if not pending:
            await _flushed(writer)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _flushed(writer: asyncio.StreamWriter) -> None:
    """Wait until all data are written, before the connection is closed."""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(LINGER_S):
            writer.close()
            await writer.wait_closed()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, traffic: _Traffic) -> None:
    while data := await reader.read(BUFFER):
        traffic.read(len(data))
        writer.write(data)
        await writer.drain()
        traffic.at = time.monotonic()
    writer.write_eof()


async def _copy_bytes(
    count: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, traffic: _Traffic
) -> None:
    while count:
        data = await reader.read(min(count, BUFFER))
        if not data:
            raise asyncio.IncompleteReadError(b"", count)
        traffic.read(len(data))
        count -= len(data)
        writer.write(data)
        await writer.drain()


async def _copy_body(
    length: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, traffic: _Traffic
) -> None:
    """Copy the body of a plain request, and nothing after it: that might be a request to another host."""
    if length != request.CHUNKED:
        await _copy_bytes(length, reader, writer, traffic)
        return
    while True:
        line = await _line(reader)
        writer.write(line)
        size = request.chunk(line[:-2])
        if not size:
            break
        await _copy_bytes(size, reader, writer, traffic)
        if await reader.readexactly(2) != b"\r\n":
            raise Bad("a part of the body has another length than it says")
        writer.write(b"\r\n")
    for _ in range(request.HEADERS):
        line = await _line(reader)
        writer.write(line)
        if line == b"\r\n":
            await writer.drain()
            return
    raise Bad("the body has too many headers behind it")


async def _line(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\r\n")
    except asyncio.LimitOverrunError:
        raise Bad("a line of the body is too long") from None
