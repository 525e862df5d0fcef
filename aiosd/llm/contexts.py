"""Contexts kept outside the slots: a radix tree of state pieces in memory and on disk, each with a budget.

    slot → RAM → disk → tokens (to be computed again)

When a budget is full, a piece moves one step down. First goes the piece that is cheapest to lose: recompute cost per
byte, divided by the age of its K-th last use (LRU-K: a system prompt that many calls use outlives a conversation that
was used once). All pieces below a parent need it, so leaves go first. Pieces that will certainly be used again (the
state of a preempted call) go last.

A piece that is read back from disk damaged is dropped and computed again. Nothing here can lose an answer: at worst
the tokens of a context are computed again.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
import zlib
from bisect import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from aiosd.errors import Bug
from aiosd.llm.arrays import Tokens
from aiosd.llm.blob import Bytes, StateLayout, StatePiece
from aiosd.llm.prefix import K, Node, Tree, path_to

#: A piece with fewer than K uses counts as if its K-th last use were this many seconds before its oldest one.
ONCE = 600.0

#: Attention makes later tokens dearer: a token with DEARER tokens before it costs twice as much as the first.
DEARER = 4096.0

#: This part of a budget is freed at a time, so that making room costs little per piece.
SLACK = 1 / 16

#: After 1/ORDERED of the pieces in memory have been taken from the order, they are put in order again.
ORDERED = 4

#: Where many contexts branch off at one node, only this number is counted: it is enough to choose a base.
MANY = 64

#: When more than this number of dead peers is noted, their nodes are marked as the first to go.
GONE = 1024


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a piece lies in the swap file."""

    offset: int
    size: int
    length: int  # tokens
    checksum: int


Payload = StatePiece | Extent


class Swap:
    """An unnamed file of at most `budget` bytes: however the process ends, nothing of the file is left."""

    def __init__(self, folder: str, budget: int) -> None:
        self.budget = budget
        self.used = 0
        self.failed = ""  # why nothing more can be written, '' if it can
        self._folder = folder
        self._file: Any = None
        self._free: list[tuple[int, int]] = [(0, budget)]  # (offset, size), ascending, never touching

    def put(self, piece: StatePiece) -> Extent | None:
        """Write a piece. None: no room in the budget or on the disk."""
        place = next((i for i, (_, size) in enumerate(self._free) if size >= piece.size), None)
        if place is None or not piece.size:
            return None
        offset, size = self._free[place]
        try:
            if self._file is None:
                os.makedirs(self._folder, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
            if _write_all(self._file.fileno(), piece.data, offset) != piece.size:
                return None
        except OSError as error:
            self.failed = error.strerror or str(error)
            return None
        self.failed = ""
        self._free[place : place + 1] = [(offset + piece.size, size - piece.size)] if size > piece.size else []
        self.used += piece.size
        return Extent(offset, piece.size, piece.length, zlib.crc32(piece.data.data))

    def get(self, extent: Extent) -> StatePiece | None:
        """Read a piece. None: it is damaged, or cannot be read."""
        data = np.empty(extent.size, np.uint8)
        try:
            done = _read_all(self._file.fileno(), data, extent.offset)
        except OSError:
            return None
        if done != extent.size or zlib.crc32(data.data) != extent.checksum:
            return None
        return StatePiece(data, extent.length)

    def free(self, extent: Extent) -> None:
        self.used -= extent.size
        free, offset, size = self._free, extent.offset, extent.size
        place = bisect(free, (offset, size))
        if place < len(free) and free[place][0] == offset + size:
            size += free.pop(place)[1]
        if place and sum(free[place - 1]) == offset:
            place -= 1
            before = free.pop(place)
            offset, size = before[0], before[1] + size
        free.insert(place, (offset, size))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _write_all(fd: int, data: Bytes, offset: int) -> int:
    view, done = data.data, 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)
    return done


def _read_all(fd: int, data: Bytes, offset: int) -> int:
    """Read in a loop: Linux reads at most 2 GiB in one call."""
    view, done = data.data, 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)
        if not count:
            break
        done += count
    return done


class Store:
    """The tree of pieces. `ram` and `swap.budget`: bytes."""

    def __init__(
        self, layout: StateLayout, ram: int, swap: Swap | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.layout = layout
        self.ram_budget = ram
        self.ram = 0  # bytes in memory
        self.swap = swap
        self.evictions = {"disk": 0, "dropped": 0}
        self.divided = 0  # how many pieces have been split in two
        self.beside: Callable[[], int] = lambda: 0  # bytes of the budget that are used outside of the store
        self.relieve: Callable[[], bool] = lambda: False  # gives up a pin that is not needed; False: there was none
        self._order: list[Node[Payload]] = []  # nodes in memory at `_ordered_at`, the cheapest to lose last …
        self._ordered_at = 0.0
        self._next = 0  # … and how many may still be taken before they are put in order again
        self._gone: set[int] = set()  # dead peers whose nodes `_write_off` has not marked yet
        self._clock = clock
        self._tree: Tree[Payload] = Tree(self._split)

    # ── finding ───────────────────────────────────────────────────────────────────────────────────────────

    def length(self, scope: str, tokens: Tokens, most: int) -> int:
        """How many leading tokens of `tokens[:most]` are kept."""
        return self._tree.walk(scope, tokens, most)[1]

    def find(self, scope: str, tokens: Tokens, most: int, peer: int = 0) -> tuple[list[StatePiece], int]:
        """The pieces of the longest kept prefix of `tokens[:most]`, all in memory, and its length."""
        path, length = self._tree.walk(scope, tokens, most)
        pieces = self._gather(path, peer)
        return pieces, min(length, sum(piece.length for piece in pieces))

    def branches(self, scope: str, tokens: Tokens, most: int) -> list[int]:
        """For each kept context that branches off `tokens[:most]`: after how many tokens. At most MANY per node."""
        found: list[int] = []
        for node in self._tree.walk(scope, tokens, most)[0]:
            if node.stop <= most:
                found += [node.stop] * min(len(node.children) + len(node.privates) - 1, MANY)
        return found

    def ending(self, scope: str, tokens: Tokens, stop: int) -> Node[Payload] | None:
        """The node that ends after `tokens[:stop]`; an edge is split there if needed. None: not all is in memory."""
        path, length = self._tree.walk(scope, tokens, stop)
        if length < stop or not all(isinstance(node.payload, StatePiece) for node in path):
            return None
        return self._tree.add(scope, tokens, stop, self._nothing, self._clock())

    @staticmethod
    def _nothing(start: int) -> Payload:
        raise Bug(f"tokens from {start} on are missing, but were all there")

    def whole(self, node: Node[Payload], peer: int = 0) -> list[StatePiece] | None:
        """The pieces from the start up to the end of a node. None: a piece is gone."""
        if node.parent is None:
            return None
        path = path_to(node)
        pieces = self._gather(path, peer)
        return pieces if len(pieces) == len(path) else None

    def _gather(self, path: list[Node[Payload]], peer: int) -> list[StatePiece]:
        now, pieces = self._clock(), []
        with _pinned(path):  # reading one piece into memory must not push out another
            for node in path:
                piece = self._fetch(node)
                if piece is None:
                    break
                node.touch(now)
                node.peer = peer
                pieces.append(piece)
        return pieces

    def _fetch(self, node: Node[Payload]) -> StatePiece | None:
        payload = node.payload
        if isinstance(payload, StatePiece) or payload is None:
            return payload
        assert self.swap is not None
        piece = self.swap.get(payload)
        if piece is None:
            self.drop(node)
        elif not node.private and self._room_beside(node, piece.size):  # private: dropped after it is read
            self.swap.free(payload)
            node.payload = piece
            self.ram += piece.size
        return piece

    # ── adding ────────────────────────────────────────────────────────────────────────────────────────────

    def add(
        self, scope: str, tokens: Tokens, stop: int, cut: Callable[[int, int], StatePiece], peer: int = 0
    ) -> Node[Payload] | None:
        """Keep the state of `tokens[:stop]`: `cut(a, b)` gives the piece of the tokens [a, b) that is missing.
        None: there is no room."""
        path, start = self._tree.walk(scope, tokens, stop)
        with _pinned(path):  # a dropped node takes all nodes below it along
            return self._add(path, start, scope, tokens, stop, cut, peer)

    def _add(
        self,
        path: list[Node[Payload]],
        start: int,
        scope: str,
        tokens: Tokens,
        stop: int,
        cut: Callable[[int, int], StatePiece],
        peer: int,
    ) -> Node[Payload] | None:
        last = path[-1] if path else None
        if last is not None and last.stop > start and isinstance(last.payload, Extent):
            self._fetch(last)  # only an edge in memory can be split
            if isinstance(last.payload, Extent):
                return None
        if not self._room_beside(last, (stop - start) * self.layout.bytes_per_token):
            return None
        node = self._tree.add(scope, tokens, stop, lambda at: self._counted(cut(at, stop)), self._clock())
        node.peer = peer
        return node if node.parent is not None else None

    def add_private(
        self, parent: Node[Payload], tokens: Tokens, piece: StatePiece, peer: int = 0
    ) -> Node[Payload] | None:
        """Keep the state after `parent` for one call alone, until `drop`."""
        if not self._room_beside(parent, piece.size) or parent.parent is None:
            return None
        node = self._tree.add_private(parent, tokens, self._counted(piece), self._clock())
        node.peer = peer
        return node

    def _room_beside(self, node: Node[Payload] | None, need: int) -> bool:
        """Make room for a new child of `node`, without removing `node` itself."""
        with _pinned(path_to(node) if node is not None else []):
            return self._make_room(need)

    def _counted(self, piece: StatePiece) -> StatePiece:
        self.ram += piece.size
        return piece

    def _split(self, payload: Payload, count: int) -> tuple[Payload, Payload]:
        assert isinstance(payload, StatePiece)
        self.divided += 1
        return self.layout.part_of(payload, 0, count), self.layout.part_of(payload, count, payload.length)

    # ── losing ────────────────────────────────────────────────────────────────────────────────────────────

    def drop(self, node: Node[Payload]) -> None:
        """Forget a node and all below it."""
        if node.parent is None:
            return
        for gone in self._tree.remove(node):
            payload, gone.payload = gone.payload, None
            if isinstance(payload, Extent):
                assert self.swap is not None
                self.swap.free(payload)
            elif payload is not None:
                self.ram -= payload.size

    def release(self, scope: str, tokens: Tokens, peer: int) -> None:
        """Drop the last nodes on the path of these tokens, as far as only `peer` used them."""
        path, _ = self._tree.walk(scope, tokens, len(tokens))
        for node in reversed(path):
            if not node.leaf or node.peer != peer or node.pins:
                return
            self.drop(node)

    def gone(self, peer: int) -> None:
        """What only this peer used is not needed any more: it goes first after pieces are next put in order."""
        self._gone.add(peer)
        if len(self._gone) > GONE:  # a walk over all nodes for each dead peer would take too long
            self._write_off()

    def _write_off(self) -> None:
        if not self._gone:
            return
        for node in self._tree.nodes():
            if node.leaf and node.peer in self._gone:
                node.uses = [-ONCE]
        self._gone.clear()

    def _make_room(self, need: int) -> bool:
        """Free memory for `need` more bytes; False: that is not possible."""
        budget = self.ram_budget - self.beside()
        if need > budget:
            return False
        if self.ram + need <= budget:
            return True
        target = budget - need - int(budget * SLACK)
        while self.ram > max(target, 0):
            node = self._cheapest()
            if node is not None:
                self._move_down(node)
            elif self.ram + need <= budget or not self.relieve():
                break
        return self.ram + need <= budget

    def _cheapest(self) -> Node[Payload] | None:
        """The node in memory that is cheapest to lose. One sort serves for several calls: nodes that have been used
        since the sort are passed over."""
        for anew in (False, True):
            if anew:
                self._put_in_order()
            while self._next:
                self._next -= 1
                node = self._order.pop()
                if self._may_go(node) and node.uses[0] <= self._ordered_at:
                    return node
        return None

    def _put_in_order(self) -> None:
        self._write_off()
        self._ordered_at = now = self._clock()
        found = [node for node in self._tree.nodes() if self._may_go(node)]
        self._order = sorted(found, key=lambda node: (node.private, self._worth(node, now)), reverse=True)
        self._next = -(-len(found) // ORDERED)

    @staticmethod
    def _may_go(node: Node[Payload]) -> bool:
        """Is it in memory and not pinned, with nothing in memory below it?"""
        if not isinstance(node.payload, StatePiece) or node.pins:
            return False
        return node.leaf or not any(isinstance(below.payload, StatePiece) for below in node.below())

    def _worth(self, node: Node[Payload], now: float) -> float:
        """Relative computing time saved per byte and second: a token costs more, the more tokens are before it."""
        kth = node.uses[K - 1] if len(node.uses) >= K else node.uses[0] - ONCE
        return (1 + node.stop / DEARER) / max(now - kth, 1e-3)

    def _move_down(self, node: Node[Payload]) -> None:
        piece = node.payload
        if not isinstance(piece, StatePiece):
            return
        extent = self._to_disk(node, piece)
        if extent is None:
            self.evictions["dropped"] += 1
            self.drop(node)
            return
        self.evictions["disk"] += 1
        node.payload = extent
        self.ram -= piece.size

    def _to_disk(self, node: Node[Payload], piece: StatePiece) -> Extent | None:
        swap = self.swap
        if swap is None or piece.size > swap.budget:
            return None
        extent = swap.put(piece)
        if extent is None and not swap.failed:
            self._clear_disk(piece.size, node)
            extent = swap.put(piece)
        return extent

    def _clear_disk(self, need: int, spare: Node[Payload]) -> None:
        """Drop what is cheapest to lose on the disk, but no child of `spare`."""
        assert self.swap is not None
        self._write_off()
        now = self._clock()
        leaves = [
            n
            for n in self._tree.nodes()
            if isinstance(n.payload, Extent) and n.leaf and not n.pins and n.parent is not spare
        ]
        leaves.sort(key=lambda node: (node.private, self._worth(node, now)))
        goal = max(need, int(self.swap.budget * SLACK))
        for node in leaves:
            if goal <= 0:
                return
            goal -= node.payload.size if isinstance(node.payload, Extent) else 0
            self.evictions["dropped"] += 1
            self.drop(node)

    # ── counts ────────────────────────────────────────────────────────────────────────────────────────────

    def stats(self) -> dict[str, Any]:
        """A context counts where its last piece lies."""
        ram = disk = entries = 0
        for node in self._tree.nodes():
            entries += 1
            if node.leaf:
                ram += isinstance(node.payload, StatePiece)
                disk += isinstance(node.payload, Extent)
        swap = self.swap
        return {
            "ram": {"contexts": ram, "bytes": self.ram, "budget": self.ram_budget},
            "disk": {
                "contexts": disk,
                "bytes": swap.used if swap else 0,
                "budget": swap.budget if swap else 0,
                **({"failed": swap.failed} if swap and swap.failed else {}),
            },
            "entries": entries,
            "evictions": dict(self.evictions),
        }

    def by_peer(self) -> dict[int, tuple[str, int]]:
        """Where the longest kept context of each peer lies, and how many tokens it has."""
        found: dict[int, tuple[str, int]] = {}
        for node in self._tree.nodes():
            if node.leaf and node.stop > found.get(node.peer, ("", 0))[1]:
                found[node.peer] = ("ram" if isinstance(node.payload, StatePiece) else "disk", node.stop)
        return found

    def check(self) -> None:
        """Bytes counted = bytes kept; every node is whole."""
        ram = disk = 0
        for node in self._tree.nodes():
            payload = node.payload
            assert payload is not None
            assert payload.length == len(node.tokens), "a node without the state of all its tokens"
            if isinstance(payload, StatePiece):
                ram += payload.size
            else:
                disk += payload.size
        assert ram == self.ram, f"{self.ram} bytes counted in memory, {ram} kept"
        assert self.swap is None or disk == self.swap.used, "bytes on disk"

    def close(self) -> None:
        if self.swap is not None:
            self.swap.close()


@contextlib.contextmanager
def _pinned(path: list[Node[Payload]]) -> Iterator[None]:
    """Inside the block no node of the path is evicted, whatever needs room."""
    for node in path:
        node.pins += 1
    try:
        yield
    finally:
        for node in path:
            node.pins -= 1
