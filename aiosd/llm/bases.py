"""Beginnings that sequences read where they are kept, instead of having a copy in their slots.

A *base* is the state of some leading tokens in the store's memory, pinned there. A slot that stands on one holds only
what comes behind: positions go on, cells do not. All that stand on the same base go through it together, in one pass
of attention (see `native/attention.c`).

Invariant: a base is there as long as a slot stands on it, and its memory with it; `used` is what all of them need.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from aiosd.llm.attention import Attention
from aiosd.llm.blob import Layout, Piece
from aiosd.llm.prefix import Node, Tokens

#: So many tokens at least are worth a base, and so many on average each of its pieces: tiny ones cost more than a copy.
LEAST, LEAST_PIECE = 32, 16


@dataclass(slots=True, eq=False)
class Base:
    key: tuple[str, bytes]  # scope and tokens
    node: Node[Any]  # pinned: nothing on the way to it is moved out of memory
    pieces: list[Piece]
    length: int
    slots: set[int] = field(default_factory=set)
    run: int = 0  # the place of its first piece among the runs


class Bases:
    """Which slot stands on what. `budget`: bytes that they may keep from being evicted. `attention` None: nothing can
    be read but what lies in a slot."""

    def __init__(self, attention: Attention | None, layout: Layout | None, slots: int, budget: int) -> None:
        readable = layout is not None and layout.by_rows and attention is not None
        self._attention = attention if readable else None
        self._per_token = layout.bytes_per_token if layout is not None else 0
        self._budget = budget
        self._bases: dict[tuple[str, bytes], Base] = {}
        self._under: list[Base | None] = [None] * slots
        self._length = [0] * slots
        self.used = 0  # bytes
        if self._attention is not None and layout is not None:
            self._attention.set_layout(layout.sizes)
            self._attention.base_length[:] = 0

    @property
    def possible(self) -> bool:
        return self._attention is not None

    def length(self, slot: int) -> int:
        """How many tokens of what a slot holds lie in its base."""
        return self._length[slot]

    def take(self, slot: int, scope: str, tokens: Tokens, length: int, path: list[Node[Any]]) -> int:
        """Put an empty slot on a base of `tokens[:length]`, which the nodes of `path` hold. How long it is: 0 if that
        cannot be, as something is not in memory or it would be too much."""
        if self._attention is None or length < LEAST:
            return 0
        key = scope, tokens[:length].tobytes()
        base = self._bases.get(key) or self._make(key, length, path)
        if base is None:
            return 0
        base.slots.add(slot)
        self._under[slot] = base
        self._stand(slot, length)
        return length

    def _make(self, key: tuple[str, bytes], length: int, path: list[Node[Any]]) -> Base | None:
        size = length * self._per_token
        needed = [node for node in path if node.start < length]
        pieces = [node.payload for node in needed if isinstance(node.payload, Piece)]
        if self.used + size > self._budget or len(pieces) * LEAST_PIECE > length:
            return None
        if len(pieces) < len(needed) or not needed or needed[-1].stop < length:
            return None
        base = Base(key, needed[-1], pieces, length)
        base.node.pins += 1
        self.used += size
        self._bases[key] = base
        self._publish()
        return base

    def cut(self, slot: int, length: int) -> None:
        """The slot forgets what it held from a token on."""
        if not length:
            self.drop(slot)
        elif length < self._length[slot]:
            self._stand(slot, length)

    def drop(self, slot: int) -> None:
        base = self._under[slot]
        if base is None:
            return
        self._under[slot] = None
        self._stand(slot, 0)
        base.slots.discard(slot)
        if not base.slots:
            base.node.pins -= 1
            self.used -= base.length * self._per_token
            del self._bases[base.key]
            self._publish()

    def exchange(self, a: int, b: int) -> None:
        """Two slots change what they hold."""
        under, lengths = self._under, (self._length[b], self._length[a])
        if under[a] is under[b] is None:
            return
        under[a], under[b] = under[b], under[a]
        for slot, other, length in ((a, b, lengths[0]), (b, a, lengths[1])):
            base = under[slot]
            if base is not None:
                base.slots.add(slot)
                if under[other] is not base:
                    base.slots.discard(other)
            self._stand(slot, length)

    def _stand(self, slot: int, length: int) -> None:
        self._length[slot] = length
        attention, base = self._attention, self._under[slot]
        assert attention is not None
        attention.base_length[slot] = length
        attention.base_run[slot] = base.run if base is not None else 0

    def _publish(self) -> None:
        """Tell where all pieces lie."""
        assert self._attention is not None
        runs: list[tuple[int, int]] = []
        for base in self._bases.values():
            base.run = len(runs)
            runs.extend((piece.data.ctypes.data, piece.length) for piece in base.pieces)
            for slot in base.slots:
                self._attention.base_run[slot] = base.run
        self._attention.set_runs(runs)

    def stats(self) -> dict[str, int]:
        return {
            "bases": len(self._bases),
            "slots": sum(base is not None for base in self._under),
            "bytes": self.used,
        }

    def check(self) -> None:
        assert self.used == sum(base.length for base in self._bases.values()) * self._per_token
        for base in self._bases.values():
            assert base.slots, "a base without a slot on it"
            assert base.node.pins > 0, "a base that may be evicted"
            assert all(self._under[slot] is base for slot in base.slots)
        for slot, under in enumerate(self._under):
            assert (under is None) == (not self._length[slot])
            assert under is None or slot in under.slots
