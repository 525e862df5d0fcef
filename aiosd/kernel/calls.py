"""Open calls and their replies: every request gets exactly one final reply.

A handler returns the body of the reply, or PENDING. A pending call is in its peer's `calls`, and on one list that
another part will look at (a service's calls, a mailbox's receivers, the waiters for an exit). `finish` and `fail` close
a call, send its only final reply and take it off that list. When a peer disconnects, `drop` closes all calls that it
had open. So nothing is answered twice, and nothing waits for a peer that is gone.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from typing import Any, Final

from msgspec import Raw

from aiosd.kernel.events import Events
from aiosd.kernel.peer import OUTBOX_MAX, UNKNOWN, AgentPeer, Assembly, Call, ClientPeer, Peer, failure, reply
from aiosd.kernel.peers import Peers
from aiosd.timers import Timers
from libaios import wire
from libaios.ring import ProtocolError

logger = logging.getLogger("kernel")

#: What a handler returns when the reply comes later.
PENDING: Final = object()

MAX_OPEN_CALLS = 1024  # of one peer
OPEN_BYTES = 64 << 20  # of the requests of one peer's open calls,
OPEN_BYTES_ALL = 1 << 30  # … and of all peers'; a single call always finds room


class CallTable:
    """Opens and closes calls. `offended` is called with an agent that broke the protocol, `gone` with a dropped
    peer."""

    def __init__(self, peers: Peers, events: Events, timers: Timers) -> None:
        self.peers = peers
        self.events = events
        self.timers = timers
        self.assembly = Assembly()
        self.counters = {"calls": 0, "refused": 0, "offenders": 0, "clients": 0, "agents": 0}
        self.open_bytes = 0
        self.offended: Callable[[AgentPeer, str], None]
        self.gone: Callable[[Peer], None]

    # ── opening ───────────────────────────────────────────────────────────────────────────────────────────

    def open(self, peer: Peer, request: wire.Request, size: int) -> Call:
        """Open a call. Its id must not be in use."""
        call = Call(peer, request.id, wire.TABLE.get(request.sys, UNKNOWN), size, request.again)
        peer.calls[request.id] = call
        peer.open_bytes += size
        self.open_bytes += size
        return call

    def check_room(self, call: Call) -> None:
        """Check the limits of open calls. Raises OSError (EAGAIN) when too much is open already."""
        peer = call.peer
        if len(peer.calls) > MAX_OPEN_CALLS:
            raise wire.error(errno.EAGAIN, f"more than {MAX_OPEN_CALLS} calls open")
        if peer.open_bytes > max(OPEN_BYTES, call.size):
            raise wire.error(errno.EAGAIN, f"the open calls hold more than {OPEN_BYTES} bytes")
        if self.open_bytes > max(OPEN_BYTES_ALL, call.size):
            raise wire.error(errno.EAGAIN, f"the open calls of all hold more than {OPEN_BYTES_ALL} bytes")

    def refuse(self, peer: Peer, call_id: int, code: int, message: str) -> None:
        """Answer a request that was not opened."""
        self.counters["refused"] += 1
        self.send(peer, failure(call_id, code, message))

    # ── closing ───────────────────────────────────────────────────────────────────────────────────────────

    def finish(self, call: Call, body: Any) -> None:
        """Close a call with its result."""
        if self.close(call):
            self.send(call.peer, reply(call.id, body))

    def fail(self, call: Call, code: int, message: str) -> None:
        """Close a call with an error."""
        if self.close(call):
            self.refuse(call.peer, call.id, code, message)

    def close(self, call: Call) -> bool:
        """Take a call off all lists; False when it was closed before."""
        peer = call.peer
        if peer.calls.get(call.id) is not call:
            return False
        del peer.calls[call.id]
        peer.open_bytes -= call.size
        self.open_bytes -= call.size
        if call.timer is not None:
            call.timer.cancel()
        if call.forget is not None:
            forget, call.forget = call.forget, None
            forget()
        return True

    def set_timeout(self, call: Call, seconds: float | None, what: str) -> None:
        if seconds is not None:
            message = f"no {what} within {seconds:g} s"
            call.timer = self.timers.after(seconds, lambda: self.fail(call, errno.ETIMEDOUT, message))

    def send_piece(self, call: Call, offset: int, body: Raw) -> None:
        """Send a partial reply."""
        self.send(call.peer, wire.encode(wire.Reply(call.id, 0, True, offset, body)))

    # ── sending ───────────────────────────────────────────────────────────────────────────────────────────

    def send(self, peer: Peer, payload: bytes) -> None:
        if peer.gone:
            return
        try:
            peer.send(payload)
            self.check_outbox(peer)
        except ProtocolError as err:
            self.offend(peer, str(err))
        except OSError:
            self.drop(peer)

    @staticmethod
    def check_outbox(peer: Peer) -> None:
        if peer.outbox_bytes > OUTBOX_MAX:
            raise ProtocolError(f"does not read its replies ({peer.outbox_bytes} bytes wait)")

    def note_assembling(self, peer: Peer, size: int) -> None:
        """Note how many bytes of an unfinished frame this peer has here now."""
        offender = self.assembly.note(peer, size)
        if offender is not None:
            self.offend(offender, f"a frame of {offender.assembling} bytes and no end, when there was no room for more")

    # ── the end of a peer ─────────────────────────────────────────────────────────────────────────────────

    def offend(self, peer: Peer, why: str) -> None:
        """End a peer that broke the protocol."""
        self.counters["offenders"] += 1
        kind = "agent" if isinstance(peer, AgentPeer) else "client"
        logger.warning("%s %d: EPROTO: %s", kind, peer.id, why)
        if isinstance(peer, AgentPeer):
            self.offended(peer, why)
        self.drop(peer)

    def drop(self, peer: Peer) -> None:
        """The connection is gone: close all that it had open, without replies. Twice is once."""
        peer.gone = True
        self.assembly.note(peer, 0)
        for call in list(peer.calls.values()):
            self.close(call)
        known = self.peers.remove(peer)
        source, peer.source = peer.source, None
        if source is not None:
            self.events.unwatch(source)
            peer.close()
        if known or isinstance(peer, ClientPeer):
            self.gone(peer)
