"""Copies of services' answers: a call that reads the same data again is answered without its service.

On two cores a call that goes from an agent through the kernel to a service and back costs four switches between
processes; a call that the kernel answers costs none or two. So a service may *promise* that an answer stays right until
it takes the promise back (`link.Answered.promise` has its number). It takes it back (`link.Stale`) when the data
change, before the answer to the call that has changed them. Both messages come through one ring, in order. So callers
can rely on this: once the call that makes a change was answered, no agent gets the older data. (The Andrew File System
has such promises, named callbacks.)

A copy is given only to the peer for which the service has made the answer, and only for the very same call, so no agent
gets data that the service would not give it. Calls of one peer keep their order, because no copy is given while the
service has one of them.

What an agent has just written it often reads next, and the first reading would need the service. So a service may send,
with the answer to a call, the answer that the same caller would get for another call now (`link.Answered.ahead`): by
the same function that would answer it, with the same checks and the same kind of promise, after the effects of the call
are durable. Such a copy makes a write dearer by a tenth, so it is made where about one in MOST_UNREAD is read: after
that many in a row that were not, only one call in PROBED asks for one (`link.Ask.ahead`), until one is read again.

A promise ends when the service dies, and when there is a new service or a new kernel. The number of times a copy was
given is reported to the service before the next call that it gets (`link.CopiesUsed`), so that its counts and its own
cache are as if it had answered.

Memory is bounded for each peer and in all; the oldest copy is dropped first, since the service can answer again.
"""

from __future__ import annotations

from msgspec import Raw

from aiosd.ipc.link import LARGEST_COPY
from aiosd.kernel.peer import Copy, CopyKey, Peer

OF_PEER = 64  # most copies of one peer,
OF_PEER_BYTES = 128 << 10  # … with how many bytes together,
OF_ALL_BYTES = 8 << 20  # … and of all peers
MOST_UNREAD = 4  # copies made ahead in a row that their peer has not read
PROBED = 17  # a prime, so that calls in any pattern have their turn


def is_worth_it(peer: Peer, call_id: int) -> bool:
    """Whether a service should send a copy ahead with the answer to this call."""
    return peer.unread < MOST_UNREAD or call_id % PROBED == 0


class Copies:
    """The copies of one service's answers."""

    def __init__(self) -> None:
        self.bytes = 0
        self.used: dict[int, int] = {}  # by promise: how often it was given since the last report
        self._kept: dict[tuple[Peer, CopyKey], Copy] = {}  # the oldest first
        self._promised: dict[int, set[tuple[Peer, CopyKey]]] = {}

    def keep(self, peer: Peer, key: CopyKey, promise: int, body: bytes, ahead: bool = False) -> None:
        peer.unread += ahead
        size = len(body) + len(key[1])
        if size > LARGEST_COPY or peer.gone:
            return
        self._drop(peer, key)
        while len(peer.copies) >= OF_PEER or peer.copied_bytes + size > OF_PEER_BYTES:
            self._drop(peer, next(iter(peer.copies)))
        while self.bytes + size > OF_ALL_BYTES:
            self._drop(*next(iter(self._kept)))
        peer.copies[key] = self._kept[peer, key] = Copy(Raw(body), promise, size, self.used, ahead)
        self._promised.setdefault(promise, set()).add((peer, key))
        peer.copied_bytes += size
        self.bytes += size

    def stale(self, promises: list[int]) -> None:
        """The service takes these promises back."""
        for promise in promises:
            for place in list(self._promised.get(promise, ())):
                self._drop(*place)

    def forget(self, peer: Peer) -> None:
        """Drop the copies of a peer that is gone."""
        for key in list(peer.copies):
            self._drop(peer, key)

    def clear(self) -> None:
        """Drop all copies: every promise has ended."""
        for place in list(self._kept):
            self._drop(*place)
        self.used.clear()

    def _drop(self, peer: Peer, key: CopyKey) -> None:
        copy = self._kept.pop((peer, key), None)
        if copy is None:
            return
        del peer.copies[key]
        peer.copied_bytes -= copy.size
        self.bytes -= copy.size
        places = self._promised[copy.promise]
        places.remove((peer, key))
        if not places:
            del self._promised[copy.promise]
