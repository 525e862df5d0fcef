"""The control socket: clients from outside (aios-run, aios-ps, a notebook) become peers like agents.

A client is known by what Linux says of its connection: its user, who must be aiosd's own (or root), and its process.
One that descends from an agent has that agent's rights and no more. It must say Hello before it may call; the identity
it gets is what it shows when it has lost its kernel and reconnects to the next.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
from typing import TYPE_CHECKING

import msgspec

from aiosd import __version__, procfs
from aiosd.kernel.peer import ClientPeer, failure
from aiosd.kernel.proc import Proc
from aiosd.kernel.status import FDS_CLIENTS, descriptors_left
from libaios import wire
from libaios.ring import ProtocolError
from libaios.stream import FrameSocket

if TYPE_CHECKING:
    from aiosd.kernel.loop import Kernel

logger = logging.getLogger("kernel.control")

PAUSE_S = 0.2  # before new clients are accepted again when there was no descriptor for one
MAX_GENERATIONS = 64  # steps up the process tree in search of an agent


class Control:
    def __init__(self, kernel: Kernel, listener: socket.socket) -> None:
        self.kernel = kernel
        self.clients: dict[int, ClientPeer] = {}  # by id, once they have said Hello
        self._listener = listener
        self._listen()

    def _listen(self) -> None:
        self.kernel.watch(self._listener.fileno(), self._on_connect)

    def knows(self, client: int) -> bool:
        return client in self.clients

    def forget(self, peer: ClientPeer) -> None:
        """The connection is gone; what was attached to it hears of that, unless the whole system goes."""
        if self.clients.get(peer.id) is peer:
            del self.clients[peer.id]
            if not self.kernel.stopping:
                self.kernel.agents.hang_up(peer.id)

    def _on_connect(self, mask: int) -> None:
        try:
            if len(self.clients) >= FDS_CLIENTS and descriptors_left(self.kernel) < 1:
                raise OSError(errno.EMFILE, f"{len(self.clients)} clients, and no descriptor for another")
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return  # it left before we came
        except OSError as err:  # out of descriptors: those who wait keep waiting, and we do not spin meanwhile
            logger.warning("control socket: %s", err)
            self.kernel.unwatch(self._listener.fileno())
            self.kernel.timers.after(PAUSE_S, self._listen)
            return
        sock.setblocking(False)
        ospid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid not in (os.getuid(), 0):
            logger.warning("control socket: uid %d refused", uid)
            sock.close()
            return
        peer = ClientPeer(FrameSocket(sock), uid, ospid, self._agent_above(ospid))
        self.kernel.counters["clients"] += 1
        self.kernel.watch(peer.fileno(), lambda mask: self._on_client(peer, mask))

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
        try:
            if peer.socket.flush():
                self.kernel.generations.resume_streams(peer)
            self._handle(peer, peer.socket.receive())
        except ProtocolError as err:
            self.kernel.offend(peer, str(err))
        except (EOFError, OSError):
            self.kernel.drop_peer(peer)
        else:
            if peer.fileno() in self.kernel.on_event:
                self.kernel.watch_output(peer.socket)

    def _handle(self, peer: ClientPeer, frames: list[tuple[bytes, list[int]]]) -> None:
        try:
            for payload, fds in frames:
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
        except msgspec.MsgspecError as err:
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
        self.clients[peer.id] = peer
        peer.send(wire.encode(wire.Welcome(wire.VERSION, self.kernel.boot, ident, __version__)))


def _new_client_id() -> int:
    """Random, so that nobody can claim the identity of a client that is about to reconnect."""
    return int.from_bytes(os.urandom(6), "little") + 1
