"""Shared beginnings of prompts: sequences read them in the store's memory instead of copying them into their slots.

A *base* is the state of some leading tokens, pinned in the store's memory. A slot that *stands on* a base holds only
the tokens after it: their positions continue those of the base, their cells begin at 0. Attention goes through a base
once for all the sequences that stand on it (see `native/attention.c`).

Invariants: a base and its memory exist as long as a slot stands on it; a base ends where a node of the store ends;
`used` is the size of the pieces of all bases, where a piece of several bases counts once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from aiosd.llm.arrays import Tokens
from aiosd.llm.attention import Attention
from aiosd.llm.blob import StatePiece
from aiosd.llm.contexts import Store
from aiosd.llm.prefix import Node, path_to

#: A base has at least LEAST tokens, and LEAST_PIECE per piece on average: smaller ones cost more than a copy.
LEAST, LEAST_PIECE = 32, 16

#: A base is reused at once (`popular`) when a quarter of all slots stand on it and it covers a third of the prompt.
MANY, GOOD_PART = 4, 3


@dataclass(slots=True, eq=False)
class Base:
    key: tuple[str, bytes]  # scope and tokens
    node: Node[Any]  # where it ends; pinned, so that no piece from the root to it is moved out of memory
    length: int
    pieces: list[StatePiece] = field(default_factory=list)
    slots: set[int] = field(default_factory=set)
    run: int = 0  # index of its first piece in the runs


class Bases:
    """Which slot stands on which base. `budget`: bytes that bases may keep from being evicted. `attention` None: there
    can be no bases, because llama.cpp's attention reads slots only."""

    def __init__(self, attention: Attention | None, store: Store | None, slots: int, budget: int) -> None:
        self._attention, self._store = None, store
        self._budget = budget
        self._bases: dict[tuple[str, bytes], Base] = {}
        self._under: list[Base | None] = [None] * slots
        self._length = [0] * slots
        self._divided = 0
        self.used = 0  # bytes
        if attention is not None and store is not None and store.layout.by_rows:
            self._attention = attention
            attention.set_layout(store.layout.sizes)
            attention.base_length[:] = 0

    @property
    def possible(self) -> bool:
        return self._attention is not None

    def length(self, slot: int) -> int:
        """How many of the slot's tokens lie in its base."""
        return self._length[slot]

    def popular(self, scope: str, tokens: Tokens) -> int:
        """The length of the longest base at the beginning of these tokens that many slots stand on and that covers a
        good part of the tokens (see MANY, GOOD_PART); 0: there is none."""
        crowds = [base for base in self._bases.values() if len(base.slots) * MANY >= len(self._under)]
        fitting = [
            base.length
            for base in crowds
            if len(tokens) >= base.length >= len(tokens) // GOOD_PART
            and base.key == (scope, tokens[: base.length].tobytes())
        ]
        return max(fitting, default=0)

    def take(self, slot: int, scope: str, tokens: Tokens, length: int) -> int:
        """Put an empty slot on a base of `tokens[:length]`. Returns the base's length; 0 if there can be none: it would
        be too short or over the budget, or a piece is not in memory."""
        if self._attention is None or length < LEAST:
            return 0
        key = scope, tokens[:length].tobytes()
        base = self._bases.get(key) or self._make(key, tokens, length)
        if base is None:
            return 0
        base.slots.add(slot)
        self._under[slot] = base
        self._stand(slot, length)
        return length

    def _make(self, key: tuple[str, bytes], tokens: Tokens, length: int) -> Base | None:
        assert self._store is not None
        node = self._store.ending(key[0], tokens, length)
        if node is None:
            return None
        base = self._bases[key] = Base(key, node, length)
        self._publish()
        if self.used > self._budget or len(base.pieces) * LEAST_PIECE > length:
            del self._bases[key]
            self._publish()
            return None
        node.pins += 1
        return base

    def sync(self) -> None:
        """When the store has split pieces, use the new ones, so that the memory of the old ones is freed."""
        assert self._store is not None
        if self._divided != self._store.divided and self._bases:
            self._publish()

    def cut(self, slot: int, length: int) -> None:
        """The slot keeps its first `length` tokens only."""
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
            del self._bases[base.key]
            self._publish()

    def exchange(self, a: int, b: int) -> None:
        """Two slots exchange their contents."""
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
        """Pass the addresses of all pieces to the attention, and count their bytes, each piece once."""
        assert self._attention is not None
        assert self._store is not None
        self._divided = self._store.divided
        runs: list[tuple[int, int]] = []
        sizes: dict[int, int] = {}
        for base in self._bases.values():
            pieces = _pieces(base.node)
            if all(pieces) and sum(piece.length for piece in pieces if piece) == base.length:  # else dropped
                base.pieces = [piece for piece in pieces if piece]
            base.run = len(runs)
            runs.extend((piece.data.ctypes.data, piece.length) for piece in base.pieces)
            sizes |= {id(piece): piece.size for piece in base.pieces}
            for slot in base.slots:
                self._attention.base_run[slot] = base.run
        self._attention.set_runs(runs)
        self.used = sum(sizes.values())

    def stats(self) -> dict[str, int]:
        return {
            "bases": len(self._bases),
            "slots": sum(base is not None for base in self._under),
            "bytes": self.used,
        }

    def check(self) -> None:
        held = {id(piece): piece.size for base in self._bases.values() for piece in base.pieces}
        assert self.used == sum(held.values())
        for base in self._bases.values():
            assert base.slots, "a base without a slot on it"
            assert base.node.pins > 0, "a base that may be evicted"
            assert base.node.stop == base.length == sum(piece.length for piece in base.pieces)
            assert base.pieces == _pieces(base.node), "the store keeps others"
            assert all(self._under[slot] is base for slot in base.slots)
        for slot, under in enumerate(self._under):
            assert (under is None) == (not self._length[slot])
            assert under is None or slot in under.slots


def _pieces(node: Node[Any]) -> list[StatePiece | None]:
    """The pieces from the first token to the end of a node; None for each that is not in memory."""
    return [on_way.payload if isinstance(on_way.payload, StatePiece) else None for on_way in path_to(node)]
