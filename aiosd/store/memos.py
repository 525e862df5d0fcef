"""Memos: the replies of calls that take effect once, for as long as such a call may be submitted again.

A store that dies may have done a call whose reply has not arrived. The call is submitted again, and must get the reply
of the first time. So the reply is kept together with the effect, in one transaction. A row for each call would cost two
thirds of the throughput; so a peer has one row with all its memos, which is written once in a transaction, with the
commit.

How long is a memo needed? A call is submitted again as long as its peer has no reply. The kernel knows that
(`link.Ask.settled`), and settled memos are forgotten with the peer's next call. A peer that sends on without reading
its replies settles nothing; with MEMOS of them its calls are refused, so no needed memo is ever forgotten.

The ids of a peer that was started again begin anew (`link.Ask.life`): memos of an earlier life are void.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from typing import Any

from msgspec import Struct, msgpack

from aiosd.ipc import link
from libaios import wire

MEMOS = 4096  # of one peer
KNOWN_PEERS = 10_000  # most peers whose memos are in memory, too


class _Memos(Struct):
    """The memos of one peer: the encoded replies by call id."""

    life: int = 0
    calls: dict[int, bytes] = {}


_decode = msgpack.Decoder(dict[int, bytes]).decode


class Memos:
    """All memos. `rows`: executes a statement. Memos are written by `write`, within the transaction of the effects."""

    def __init__(self, rows: Callable[..., list[tuple[Any, ...]]]) -> None:
        self._rows = rows
        self._peers: dict[int, _Memos] = {}  # copies of rows
        self._changed: set[int] = set()  # their rows are older

    def find(self, ask: link.Ask) -> bytes | None:
        return self._of(ask).calls.get(ask.key[1])

    def make_room(self, ask: link.Ask) -> None:
        """Forget settled memos. Raises OSError (EAGAIN) if too many are not settled."""
        calls = self._of(ask).calls
        while (oldest := next(iter(calls), ask.settled)) < ask.settled:
            del calls[oldest]
        if len(calls) >= MEMOS:
            raise wire.error(errno.EAGAIN, f"the replies to {len(calls)} earlier calls have not been read")

    def add(self, ask: link.Ask, reply: bytes) -> None:
        peer, call = ask.key
        self._of(ask).calls[call] = reply
        self._changed.add(peer)

    def write(self) -> None:
        """Write changed memos. Called before a commit."""
        for peer in self._changed:
            memos = self._peers[peer]
            sql = "INSERT OR REPLACE INTO replies(peer, life, calls) VALUES(?, ?, ?)"
            self._rows(sql, peer, memos.life, msgpack.encode(memos.calls))
        self._changed.clear()
        if len(self._peers) > KNOWN_PEERS:
            self._peers.clear()

    def forget_all(self) -> None:
        """Drop all copies, because a transaction was lost: the rows are as before it, but the copies may not be."""
        self._peers.clear()
        self._changed.clear()

    def gone(self, peer: int) -> None:
        """A peer is dead: remove its row, in the open transaction."""
        self._peers.pop(peer, None)
        self._changed.discard(peer)
        self._rows("DELETE FROM replies WHERE peer = ?", peer)

    def only(self, peers: Iterable[int]) -> None:
        """All agents but these are dead. (Clients have negative numbers; a client that is not among `peers` may still
        come back.)"""
        alive = set(peers)
        for (peer,) in self._rows("SELECT peer FROM replies WHERE peer > 0"):
            if peer not in alive:
                self.gone(peer)

    def _of(self, ask: link.Ask) -> _Memos:
        peer = ask.key[0]
        memos = self._peers.get(peer)
        if memos is None:
            found = self._rows("SELECT life, calls FROM replies WHERE peer = ?", peer)
            memos = self._peers[peer] = _Memos(found[0][0], _decode(found[0][1])) if found else _Memos(ask.life, {})
        if memos.life != ask.life:
            memos.life, memos.calls = ask.life, {}
        return memos
