"""Which sequence is in which slot of the KV cache, and what the free slots still hold.

Invariants: a slot is free or owned by exactly one sequence; free + owned = total. A free slot may still hold
the tokens of its last owner (`SlotContent`), which a later prompt of the same scope can reuse. Slots in use are kept
low and close together by always giving out the lowest (see `best_slot`), because a step over scattered ids is
split into several passes over the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np

from aiosd.errors import Bug
from aiosd.llm.arrays import Tokens
from aiosd.llm.prefix import common_prefix
from aiosd.llm.sequence import Sequence

_NOTHING = np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True)
class SlotContent:
    """What a free slot still holds. `reusable`: how many of its tokens may serve another call (in exact mode
    only those that were prefilled: the same tokens decoded one by one differ in their last bits)."""

    slot: int
    scope: str = ""
    tokens: Tokens = field(default_factory=lambda: _NOTHING)
    reusable: int = 0
    used: float = 0.0  # clock when it was last in use
    peer: int = 0  # the peer whose call left it
    kept: bool = False  # the store has all of its reusable tokens


@dataclass(frozen=True, slots=True)
class Match:
    slot: int
    length: int


def best_slot(prompt: Tokens, scope: str, held: Iterable[SlotContent], most: int) -> Match | None:
    """The free slot that saves the most prompt tokens, never more than `most`; None when there is no free slot.

    If no slot saves any, an empty slot is preferred, then the one unused for longest, then the lowest number, because
    slots in use should lie close together.
    """

    def saved(slot: SlotContent) -> int:
        if slot.scope != scope or not slot.reusable:
            return 0
        return min(common_prefix(prompt, slot.tokens), slot.reusable, most)

    best = max(
        ((saved(slot), not len(slot.tokens), -slot.used, -slot.slot) for slot in held),
        default=None,
    )
    return None if best is None else Match(slot=-best[3], length=best[0])


class Slots:
    def __init__(self, total: int) -> None:
        self.total = total
        self.num_free = total
        self._owner: list[Sequence | None] = [None] * total
        self._held = [SlotContent(i) for i in range(total)]

    def owners(self) -> Iterator[Sequence]:
        """In ascending order of slots."""
        return (owner for owner in self._owner if owner is not None)

    def owner(self, slot: int) -> Sequence | None:
        return self._owner[slot]

    def held(self, slot: int) -> SlotContent:
        """What lies in a free slot."""
        return self._held[slot]

    def free_slots(self) -> list[SlotContent]:
        return [held for held in self._held if self._owner[held.slot] is None]

    def empty(self) -> list[int]:
        """Free slots that hold nothing."""
        return [held.slot for held in self.free_slots() if not len(held.tokens)]

    def match(self, sequence: Sequence, tokens: Tokens, most: int) -> Match | None:
        """The best free slot for this sequence, and how many of its tokens can be reused there."""
        return best_slot(tokens, sequence.scope, self.free_slots(), most)

    def cheapest(self) -> SlotContent:
        """The free slot with the least to lose: an empty one, else one kept in the store, else the least recent."""
        free = self.free_slots()
        return min(free, key=lambda held: (len(held.tokens) > 0, not held.kept, held.used, held.slot))

    def take(self, slot: int, sequence: Sequence) -> None:
        if self._owner[slot] is not None or sequence.slot >= 0:
            raise Bug(f"slot {slot} given to {sequence.key}, which has {sequence.slot}")
        self._owner[slot] = sequence
        self._held[slot] = SlotContent(slot)
        self.num_free -= 1
        sequence.slot = slot

    def release(self, sequence: Sequence, now: float, *, keep: bool, exact: bool = False) -> int:
        """Free the sequence's slot. `keep`: its content stays usable as a prefix; in exact mode only the prefilled
        part."""
        slot = sequence.slot
        if slot < 0 or self._owner[slot] is not sequence:
            raise Bug(f"slot {slot} is not {sequence.key}'s")
        self._owner[slot] = None
        self.num_free += 1
        sequence.slot = -1
        if keep:
            tokens = sequence.tokens()[: sequence.length]
            reusable = sequence.prefilled if exact else len(tokens)
            self._held[slot] = SlotContent(slot, sequence.scope, tokens, reusable, now, sequence.peer)
        return slot

    def mark_kept(self, slot: int) -> None:
        """The store has what this free slot holds."""
        self._held[slot] = replace(self._held[slot], kept=True)

    def holds(self, slot: int) -> bool:
        """Does this free slot hold anything that could be reused?"""
        return len(self._held[slot].tokens) > 0

    def exchange(self, a: int, b: int) -> None:
        """Two slots exchange their owners and what they hold."""
        owners, held = self._owner, self._held
        owners[a], owners[b] = owners[b], owners[a]
        held[a], held[b] = replace(held[b], slot=a), replace(held[a], slot=b)
        for slot in (a, b):
            owner = owners[slot]
            if owner is not None:
                owner.slot = slot

    def closing_moves(self, rows: list[Sequence]) -> list[tuple[int, int]]:
        """The fewest exchanges of slots, each (from, to), after which `rows` lie in consecutive slots."""
        n, slots = len(rows), {sequence.slot for sequence in rows}
        before = [0, *accumulate(slot in slots for slot in range(self.total))]  # rows in the slots below
        windows = ((before[start + n] - before[start], -start) for start in range(self.total - n + 1))
        start = -max(windows)[1]  # with most of the rows inside; of several the lowest
        window = range(start, start + n)
        outside = (slot for slot in sorted(slots, reverse=True) if slot not in window)
        return list(zip(outside, (slot for slot in window if slot not in slots), strict=True))

    def forget(self, slot: int) -> None:
        """The content of a free slot must not be used any more."""
        self._held[slot] = SlotContent(slot)

    def check(self) -> None:
        """Check the invariants: every owner knows its slot, no sequence owns two."""
        owned = [(slot, owner) for slot, owner in enumerate(self._owner) if owner is not None]
        if any(owner.slot != slot for slot, owner in owned):
            raise Bug("a slot's owner lies elsewhere")
        if len(owned) + self.num_free != self.total:
            raise Bug(f"{len(owned)} slots in use + {self.num_free} free ≠ {self.total}")
