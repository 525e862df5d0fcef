"""The control socket: clients from outside (aios-run, aios-ps, a notebook) become peers like agents.

A client is known by what Linux says of its connection: its user, who must be aiosd's own (or root), and its process.
One that descends from an agent has that agent's rights and no more. It must say Hello before it may call; the identity
it gets is what it shows when it has lost its kernel and reconnects to the next.

Whoever has connected and said nothing yet is a *stranger*: one small frame without descriptors is read from it, soon,
and the oldest makes room when there are too many. So a thousand connections that say nothing keep nobody out.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import struct
from typing import TYPE_CHECKING

import msgspec

from aiosd import __version__, procfs
from aiosd.kernel.peer import OUTBOX_PAUSE, ClientPeer, failure
from aiosd.kernel.proc import Proc
from aiosd.kernel.status import FDS_CLIENTS, descriptors_left
from aiosd.timers import Timer
from libaios import wire
from libaios.ring import ProtocolError
from libaios.stream import MAX_FDS, FrameSocket

if TYPE_CHECKING:
    from aiosd.kernel.loop import Kernel

logger = logging.getLogger("kernel.control")

ACCEPT_S = 0.001  # of a turn, for new clients
PAUSE_S = 0.2  # before new clients are accepted again when there was no descriptor for one
MAX_GENERATIONS = 64  # steps up the process tree in search of an agent
ACCEPT_PER_TURN = 16
MAX_STRANGERS = 64
HELLO_S = 10.0  # how long a stranger has to say Hello,
HELLO_BYTES = 1024  # … and how long that may be
CLIENTS_OF_AGENT = 64  # connections of what descends from one agent
FRAMES_PER_TURN = 16  # of one client; each may bring descriptors, which are open meanwhile
FDS_ON_THEIR_WAY = 256  # with unfinished frames, of all clients together


class Control:
    def __init__(self, kernel: Kernel, listener: socket.socket) -> None:
        self.kernel = kernel
        self.clients: dict[int, ClientPeer] = {}  # by id, once they have said Hello
        self.strangers: dict[ClientPeer, Timer] = {}  # before their Hello, oldest first
        self._fds_held: dict[ClientPeer, int] = {}  # descriptors that came with unfinished frames
        self._listener = listener
        self._listen()

    def _listen(self) -> None:
        self.kernel.watch(self._listener.fileno(), self._on_connect, of_clients=True)

    def knows(self, client: int) -> bool:
        return client in self.clients

    def descriptors(self) -> int:
        """How many the kernel has open for clients."""
        return len(self.clients) + len(self.strangers) + sum(self._fds_held.values())

    def forget(self, peer: ClientPeer) -> None:
        """The connection is gone; what was attached to it hears of that, unless the whole system goes."""
        self._fds_held.pop(peer, None)
        timer = self.strangers.pop(peer, None)
        if timer is not None:
            timer.cancel()
        if self.clients.get(peer.id) is peer:
            del self.clients[peer.id]
            if not self.kernel.stopping:
                self.kernel.agents.hang_up(peer.id)

    def _on_connect(self, mask: int) -> None:
        """Some of those who wait; each turn of a busy kernel takes its time. But not all of ours."""
        until = self.kernel.timers.clock() + ACCEPT_S
        for _ in range(ACCEPT_PER_TURN):
            if not self._accept() or self.kernel.timers.clock() >= until:
                return

    def _accept(self) -> bool:
        """One of them; False when there is none, or no room."""
        try:
            if self.descriptors() >= FDS_CLIENTS and descriptors_left(self.kernel) < 1:
                raise OSError(errno.EMFILE, f"{len(self.clients)} clients, and no descriptor for another")
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return False
        except OSError as err:  # out of descriptors: those who wait keep waiting, and we do not spin meanwhile
            logger.warning("control socket: %s", err)
            self.kernel.unwatch(self._listener.fileno())
            self.kernel.timers.after(PAUSE_S, self._listen)
            return False
        sock.setblocking(False)
        ospid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid not in (os.getuid(), 0):
            logger.warning("control socket: uid %d refused", uid)
            sock.close()
            return True
        proc = self._agent_above(ospid)
        if proc is not None and sum(other.proc is proc for other in self._everybody()) >= CLIENTS_OF_AGENT:
            sock.close()  # without a word in the log: there may be many
            return True
        frames = FrameSocket(sock, HELLO_BYTES)
        frames.max_fds = 0
        self._meet(ClientPeer(frames, uid, ospid, proc))
        return True

    def _everybody(self) -> list[ClientPeer]:
        return [*self.clients.values(), *self.strangers]

    def _meet(self, peer: ClientPeer) -> None:
        """Somebody new. An honest client has said Hello already: it is read before anybody else can come."""
        kernel = self.kernel
        if len(self.strangers) >= MAX_STRANGERS:
            kernel.drop_peer(next(iter(self.strangers)))
        kernel.counters["clients"] += 1
        self.strangers[peer] = kernel.timers.after(HELLO_S, lambda: kernel.drop_peer(peer))
        kernel.watch(peer.fileno(), lambda mask: self._on_client(peer, mask), of_clients=True)
        self._on_client(peer, select.EPOLLIN)

    def watch(self, peer: ClientPeer) -> None:
        """Listen to it unless it does not read what it is told; and for room, when something waits."""
        pending = peer.socket.pending
        mask = (select.EPOLLOUT if pending else 0) | (select.EPOLLIN if pending <= OUTBOX_PAUSE else 0)
        self.kernel.epoll.modify(peer.fileno(), mask)

    def _agent_above(self, ospid: int) -> Proc | None:
        """The agent that a client descends from, if any: its rights are the client's."""
        for _ in range(MAX_GENERATIONS):
            agent = self.kernel.agents.by_ospid.get(ospid)
            if agent is not None:
                return agent
            stat = procfs.read_stat(ospid)
            if stat is None or stat.ppid <= 1:
                return None
            ospid = stat.ppid
        return None

    def _on_client(self, peer: ClientPeer, mask: int) -> None:
        kernel = self.kernel
        try:
            if peer.socket.flush():
                kernel.generations.resume_streams(peer)
            if peer.socket.pending <= OUTBOX_PAUSE:
                self._read(peer)
        except ProtocolError as err:
            kernel.offend(peer, str(err))
        except (EOFError, OSError):
            kernel.drop_peer(peer)
        else:
            if not peer.gone:
                self.watch(peer)

    def _read(self, peer: ClientPeer) -> None:
        kernel, frames = self.kernel, peer.socket.receive(FRAMES_PER_TURN)
        self._handle(peer, frames)
        if peer.gone:
            return
        if peer.socket.assembling or peer.assembling:
            kernel.note_assembling(peer, peer.socket.assembling)
        if not peer.gone and (peer.socket.held_fds or peer in self._fds_held):
            self._fds_held[peer] = peer.socket.held_fds
            if sum(self._fds_held.values()) > FDS_ON_THEIR_WAY:
                raise ProtocolError("descriptors with a frame and no end, when there was no room for more")
        if not peer.gone and len(frames) == FRAMES_PER_TURN:  # the socket will not tell of those read already
            kernel.hungry[peer.fileno()] = kernel.on_event[peer.fileno()]

    def _handle(self, peer: ClientPeer, frames: list[tuple[bytes, list[int]]]) -> None:
        try:
            for payload, fds in frames:
                if peer.gone:
                    return
                peer.fds = fds
                if peer.welcome:
                    self.kernel.dispatch(peer, payload)
                else:
                    self._greet(peer, payload)
        finally:
            peer.fds = []
            for _, fds in frames:  # whoever wanted to keep one has a duplicate
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
        ident = hello.client if hello.boot == self.kernel.boot and hello.client else _new_client_id()
        if -ident in self.clients:
            raise ProtocolError("an identity that is in use")
        peer.id = -ident
        peer.welcome = True
        peer.socket.max_frame, peer.socket.max_fds = wire.MAX_FRAME, MAX_FDS
        self.strangers.pop(peer).cancel()
        self.clients[peer.id] = peer
        peer.send(wire.encode(wire.Welcome(wire.VERSION, self.kernel.boot, ident, __version__)))


def _new_client_id() -> int:
    """Random, so that nobody can claim the identity of a client that is about to reconnect."""
    return int.from_bytes(os.urandom(6), "little") + 1
