"""The control socket: clients from outside (aios-run, aios-ps, a notebook) become peers like agents.

A client is identified by what Linux reports about its connection: its user, which must be aiosd's own (or root), and
its process. A client that descends from an agent has that agent's rights and no more. A client is refused if it cannot
be shown where it comes from (`ancestry`). It must send Hello before it may call; the identity that it gets is what it
sends when it has lost its kernel and connects to the next.

The gateway serves programs that speak HTTP. For each agent whose programs send it requests it makes a connection, whose
Hello has that agent's token, or names processes that the kernel then proves to be the agent's. The connection is the
agent's then, as if a descendant had made it. Only the very process that the supervisor has forked as the gateway may do
so, and it may do nothing else.

A client that has connected and sent nothing yet is a *stranger*: one small frame without descriptors is read from it,
soon, and the oldest makes room when there are too many. So a thousand silent connections keep no other client out.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import select
import socket
from collections.abc import Callable, Mapping

import msgspec

from aiosd import __version__
from aiosd.kernel.ancestry import Unproven, Unsettled, agent_above, agent_above_all, is_child, peer_of
from aiosd.kernel.calls import CallTable
from aiosd.kernel.dispatch import Dispatcher
from aiosd.kernel.events import Events, EventSource, Turn
from aiosd.kernel.ledger import DOOR_FAMILY, DOOR_ID, DOOR_OSPID, DOOR_TYPE
from aiosd.kernel.peer import OUTBOX_PAUSE, ClientPeer, Peer, failure
from aiosd.kernel.proc import Proc
from aiosd.kernel.system import FdLimit
from aiosd.sandbox import doors, hosts
from aiosd.sandbox.doors import DoorRequest, Question
from aiosd.timers import Timer, Timers
from libaios import wire
from libaios.ring import ProtocolError
from libaios.stream import MAX_FDS, FrameSocket

logger = logging.getLogger("kernel.control")

ACCEPT_S = 0.001  # part of a turn that is for new clients
PAUSE_S = 0.2  # before new clients are accepted again when there was no descriptor for one
ACCEPT_PER_TURN = 16
SETTLE_S, SETTLE_TRIES = 0.05, 40  # an agent's child may connect before the kernel knows of the agent
MAX_UNSETTLED = 16
MAX_STRANGERS = 64
HELLO_S = 10.0  # how long a stranger has to send its Hello,
HELLO_BYTES = 1024  # … and how long that may be
CLIENTS_OF_AGENT = 64  # connections of the descendants of one agent
FRAMES_PER_TURN = 16  # of one client; each may bring descriptors, which are open meanwhile
REFUSED_S = 10.0  # between two lines in the log about connections that are refused
FDS_ON_THEIR_WAY = 256  # with unfinished frames, of all clients together


class Control:
    """All clients. `caught_up` is called with a client that has read its replies, `joined` with one that has sent its
    Hello, and `hang_up` with the id of one that is gone."""

    def __init__(
        self,
        listener: socket.socket,
        boot: str,
        calls: CallTable,
        events: Events,
        timers: Timers,
        dispatcher: Dispatcher,
        agents: Mapping[int, Proc],
        descriptors: Callable[[], FdLimit],
        services: Callable[[], Mapping[int, str]],
        caught_up: Callable[[Peer], None],
        joined: Callable[[Peer], None],
        hang_up: Callable[[int], None],
        bearer: Callable[[str], Proc | None],
    ) -> None:
        self._listener = listener
        self._boot = boot
        self._calls = calls
        self._peers = calls.peers
        self._events = events
        self._timers = timers
        self._dispatcher = dispatcher
        self._agents = agents  # by Linux pid
        self._descriptors = descriptors
        self._services = services  # names by Linux pid
        self._caught_up = caught_up
        self._joined = joined
        self._hang_up = hang_up
        self._bearer = bearer  # finds the agent of a token
        self.strangers: dict[ClientPeer, Timer] = {}  # before their Hello, oldest first
        self._fds_held: dict[ClientPeer, int] = {}  # descriptors that came with unfinished frames
        self._doors: dict[int, EventSource] = {}  # of confined agents, by pid
        self._unsettled = 0  # connections that will be checked again
        self._refused = 0  # … and refused since the last line in the log about that
        self._source: EventSource
        self._listen()

    def _listen(self) -> None:
        self._source = self._events.watch(self._listener.fileno(), self._on_connect, of_clients=True)

    def descriptors(self) -> int:
        """How many the kernel has open for clients."""
        return len(self._peers.clients) + len(self.strangers) + self._unsettled + sum(self._fds_held.values())

    def forget(self, peer: ClientPeer) -> None:
        """A connection is gone; agents that were attached to it get HUP if the client does not come back."""
        self._fds_held.pop(peer, None)
        timer = self.strangers.pop(peer, None)
        if timer is not None:
            timer.cancel()
        elif peer.welcome:
            self._hang_up(peer.id)

    def _on_connect(self, mask: int) -> None:
        """Accept some of the waiting connections: a few in each turn, so that a busy kernel has time for other work."""
        until = self._timers.clock() + ACCEPT_S
        for _ in range(ACCEPT_PER_TURN):
            if not self._accept() or self._timers.clock() >= until:
                return

    def _accept(self) -> bool:
        """Accept one connection; False if there is none, or no room."""
        try:
            if not self._descriptors().room_for_client():
                raise OSError(errno.EMFILE, f"{len(self._peers.clients)} clients, and no descriptor for another")
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return False
        except OSError as err:  # out of descriptors: they keep waiting, and are not polled meanwhile
            logger.warning("control socket: %s", err)
            self._events.unwatch(self._source)
            self._timers.after(PAUSE_S, self._listen)
            return False
        sock.setblocking(False)
        self._consider(sock, SETTLE_TRIES)
        return True

    def _consider(self, sock: socket.socket, tries: int) -> None:
        """Admit a connection or refuse it. If its origin is not known yet, check again a little later."""
        try:
            self._admit(sock)
        except Unproven as err:
            if isinstance(err, Unsettled) and tries and (tries < SETTLE_TRIES or self._unsettled < MAX_UNSETTLED):
                self._unsettled += tries == SETTLE_TRIES
                self._timers.after(SETTLE_S, lambda: self._consider(sock, tries - 1))
                return
            self._note_refused(err)
            sock.close()
        self._unsettled -= tries < SETTLE_TRIES

    def _note_refused(self, why: Unproven) -> None:
        """Log a refusal, but not each of them: there may be thousands."""
        self._refused += 1
        if self._refused == 1:
            logger.warning("control socket: a connection was refused: %s", why)
            self._timers.after(REFUSED_S, self._note_more_refused)

    def _note_more_refused(self) -> None:
        if self._refused > 1:
            logger.warning("control socket: %d more were refused within %.0f s", self._refused - 1, REFUSED_S)
        self._refused = 0

    def _admit(self, sock: socket.socket) -> None:
        origin = peer_of(sock)
        try:
            if origin.uid not in (os.getuid(), 0):
                raise Unproven(f"user {origin.uid}")
            service = self._services().get(origin.ospid, "")
            if service and is_child(origin, os.getppid()):
                proc = None
            else:
                service, proc = "", agent_above(origin, self._agents, os.getppid())
        finally:
            os.close(origin.pidfd)
        if proc is not None and self._connections_of(proc) >= CLIENTS_OF_AGENT:
            sock.close()  # without a line in the log: there may be many
            return
        self._receive(sock, origin.ospid, proc, service)

    def _receive(self, sock: socket.socket, ospid: int, proc: Proc | None, service: str = "") -> None:
        frames = FrameSocket(sock, HELLO_BYTES)
        frames.max_fds = 0
        peer = ClientPeer(frames, ospid, proc, lambda: self._watch(peer), service)
        self._meet(peer)

    # ── doors of confined agents ──────────────────────────────────────────────────────────────────────────

    def open_door(self, proc: Proc, door: int) -> None:
        """Serve the door of a confined agent, and own its descriptor. A second one is a duplicate of the first."""
        if proc.pid in self._doors:
            os.close(door)
            return
        source = self._events.watch(door, lambda mask: self._at_door(proc, door, mask), of_clients=True)
        self._doors[proc.pid] = source
        if last := _last_received(proc):
            # Later, because other agents may not be adopted yet.
            self._timers.after(0.0, lambda: self._answer_again(proc, source, last))

    def _answer_again(self, proc: Proc, source: EventSource, last: DoorRequest) -> None:
        """Answer what a dead kernel has received at this door, and may not have answered. (This kernel answers each
        request before it receives the next.)"""
        if self._doors.get(proc.pid) is not source:  # closed meanwhile
            return
        doors.refuse_lost(source.fd, last.id)
        self._answer(proc, Question(source.fd, last))

    def close_door(self, proc: Proc) -> None:
        source = self._doors.pop(proc.pid, None)
        if source is not None:
            self._events.unwatch(source)
            os.close(source.fd)

    def _at_door(self, proc: Proc, door: int, mask: int) -> None:
        """A process of the agent requests a socket. Its origin needs no further proof: see `sandbox.doors`."""
        if not mask & select.EPOLLIN:  # the last of its processes has ended
            self.close_door(proc)
            return
        try:
            received = doors.receive(door)
        except (FileNotFoundError, InterruptedError):  # the process has ended meanwhile, or epoll reports it again
            return
        _note_received(proc, received)
        self._answer(proc, Question(door, received))

    def _answer(self, proc: Proc, question: Question) -> None:
        if question.family != socket.AF_UNIX:
            proc.denied = hosts.no_network(proc.box.level if proc.box is not None else "")
            question.refuse(errno.EAFNOSUPPORT)
            return
        if self._connections_of(proc) >= CLIENTS_OF_AGENT or not self._descriptors().room_for_client():
            question.refuse(errno.EMFILE)
            return
        sock = question.connect()
        if sock is not None:
            self._receive(sock, question.ospid, proc)

    def _connections_of(self, proc: Proc) -> int:
        return len(self._peers.clients_of(proc)) + sum(other.proc is proc for other in self.strangers)

    def _meet(self, peer: ClientPeer) -> None:
        """Read from a new client. An honest one has sent its Hello already, so it is read before the next client
        comes."""
        if len(self.strangers) >= MAX_STRANGERS:
            self._calls.drop(next(iter(self.strangers)))
        self._calls.counters["clients"] += 1
        self.strangers[peer] = self._timers.after(HELLO_S, lambda: self._calls.drop(peer))
        peer.source = self._events.watch(
            peer.socket.fileno(), lambda mask: self._on_client(peer, mask), of_clients=True
        )
        self._on_client(peer, select.EPOLLIN)

    def _watch(self, peer: ClientPeer) -> None:
        """Poll its socket: for requests, unless it does not read its replies; for room, if replies wait."""
        pending = peer.socket.pending
        mask = (select.EPOLLOUT if pending else 0) | (select.EPOLLIN if pending <= OUTBOX_PAUSE else 0)
        if peer.source is not None:
            self._events.modify(peer.source, mask)

    def _on_client(self, peer: ClientPeer, mask: int) -> None:
        try:
            if peer.socket.flush():
                self._caught_up(peer)
            if peer.socket.pending <= OUTBOX_PAUSE:
                self._read(peer)
        except ProtocolError as err:
            self._calls.offend(peer, str(err))
        except (EOFError, OSError):
            self._calls.drop(peer)
        else:
            if not peer.gone:
                self._watch(peer)

    def _read(self, peer: ClientPeer) -> None:
        frames = peer.socket.receive(FRAMES_PER_TURN)
        self._handle(peer, frames)
        if peer.gone:
            return
        if peer.socket.assembling or peer.assembling:
            self._calls.note_assembling(peer, peer.socket.assembling)
        if not peer.gone and (peer.socket.held_fds or peer in self._fds_held):
            self._fds_held[peer] = peer.socket.held_fds
            if sum(self._fds_held.values()) > FDS_ON_THEIR_WAY:
                raise ProtocolError("descriptors with a frame and no end, when there was no room for more")
        if not peer.gone and len(frames) == FRAMES_PER_TURN and peer.source is not None:
            self._events.move(peer.source, Turn.HUNGRY)  # the socket gives no event for those read already

    def _handle(self, peer: ClientPeer, frames: list[tuple[bytes, list[int]]]) -> None:
        try:
            for payload, fds in frames:
                if peer.gone:
                    return
                peer.fds = fds
                if peer.welcome:
                    self._dispatcher.dispatch(peer, payload)
                else:
                    self._greet(peer, payload)
        finally:
            peer.fds = []
            for _, fds in frames:  # a call that keeps one has a duplicate
                for fd in fds:
                    os.close(fd)

    def _greet(self, peer: ClientPeer, payload: bytes) -> None:
        try:
            hello = msgspec.msgpack.decode(payload, type=wire.Hello)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as err:
            raise ProtocolError(f"no Hello: {err}") from None
        if hello.version != wire.VERSION:
            message = f"version {hello.version} of the protocol; this aiosd speaks {wire.VERSION}"
            peer.send(failure(0, errno.EPROTONOSUPPORT, message))
            raise ProtocolError(message)
        if (peer.of_gateway or hello.token) and not self._act_for(peer, hello.token):
            return
        ident = hello.client if hello.boot == self._boot and hello.client else _new_client_id()
        if -ident in self._peers.clients:
            raise ProtocolError("an identity that is in use")
        peer.id = -ident
        peer.welcome = True
        peer.socket.max_frame, peer.socket.max_fds = wire.MAX_FRAME, MAX_FDS
        self.strangers.pop(peer).cancel()
        self._peers.add(peer)
        self._joined(peer)
        agent = (peer.proc.pid, peer.proc.ospid) if peer.of_gateway and peer.proc is not None else (0, 0)
        peer.send(wire.encode(wire.Welcome(wire.VERSION, self._boot, ident, __version__, *agent)))

    def _act_for(self, peer: ClientPeer, token: str) -> bool:
        """Make the connection one of the token's agent; False: it is refused. A wrong token is not logged: any program
        can send one to the gateway."""
        if not peer.of_gateway:
            peer.send(failure(0, errno.EPERM, "only aiosd's own gateway acts for others"))
            raise ProtocolError("a token, from another process than the gateway")
        why, code = "no agent that lives has this token", errno.EACCES
        try:
            peer.proc = self._descended(token) if token.startswith(wire.PROCESSES) else self._bearer(token)
        except Unproven as err:
            why, code = str(err), errno.EAGAIN if isinstance(err, Unsettled) else errno.EACCES
        if peer.proc is None:
            peer.send(failure(0, code, why))
            self._calls.drop(peer)
        return peer.proc is not None

    def _descended(self, token: str) -> Proc:
        """The agent of the processes that the gateway has found at the other end of a connection. Raises Unproven."""
        inode, _, names = token.removeprefix(wire.PROCESSES).partition("/")
        named = [re.fullmatch(r"([0-9]{1,9}):([0-9]{1,18})", name) for name in names.split(",")]
        processes = [(int(one[1]), int(one[2])) for one in named if one is not None]
        if len(processes) < len(named) or len(named) > wire.MOST_PROCESSES:
            raise Unproven("no processes")
        proc = agent_above_all(processes, self._agents, os.getppid())
        if inode in map(str, proc.handed):
            raise Unproven("it was handed to its agent when that was started")
        return proc


def _note_received(proc: Proc, received: DoorRequest) -> None:
    """Note it for the next kernel. The id comes last: with it the others are valid."""
    proc.row[DOOR_OSPID], proc.row[DOOR_FAMILY], proc.row[DOOR_TYPE] = received.ospid, received.family, received.type
    proc.row[DOOR_ID] = received.id


def _last_received(proc: Proc) -> DoorRequest | None:
    row = proc.row
    if not row[DOOR_ID]:
        return None
    return DoorRequest(row[DOOR_ID], row[DOOR_OSPID], row[DOOR_FAMILY], row[DOOR_TYPE])


def _new_client_id() -> int:
    """Random, so that no other process can take the identity of a client that is about to reconnect."""
    return int.from_bytes(os.urandom(6), "little") + 1
