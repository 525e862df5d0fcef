"""Who runs next: pure decisions over records and a clock; no tensors, no llama.cpp, no I/O.

The engine asks in every step. `admit` says which waiting calls take the free slots, `order` in which order the
admitted ones get the step's token budget for their prompts, `evict` which running calls give up their slot to
a waiting one. Decoding is not asked about: a call with a slot and its prompt in place decodes in every step.

A policy sees of a call only what `Entry` shows, and keeps no reference to an entry between two questions: the
engine passes all of them each time, so a policy cannot leak a call that is gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar


class Entry(Protocol):
    """What a policy may know of a call."""

    @property
    def peer(self) -> int: ...  # who asked
    @property
    def nice(self) -> int: ...
    @property
    def group(self) -> str: ...
    @property
    def order(self) -> int: ...  # arrival number, unique
    @property
    def arrived(self) -> float: ...  # clock at arrival
    @property
    def num_generated(self) -> int: ...
    @property
    def num_pending(self) -> int: ...  # prompt tokens that are not in the cache yet


E = TypeVar("E", bound=Entry)


class Policy(Protocol):
    name: str

    def arrive(self, call: E, now: float) -> None: ...
    def leave(self, call: E, now: float) -> None: ...
    def charge(self, calls: Sequence[E], tokens: int, now: float) -> None: ...
    def charge_prompt(self, call: E, tokens: int, now: float) -> None: ...
    def select(self, decoding: list[E], now: float) -> list[E]: ...

    def admit(self, waiting: Sequence[E], running: Sequence[E], free: int, now: float) -> list[E]:
        """Those of `waiting` that take a slot now, at most `free`, the most urgent first."""
        ...

    def order(self, pending: Sequence[E], now: float) -> list[E]:
        """`pending` (calls whose prompt is not in place) in the order in which they are prefilled."""
        ...

    def evict(self, waiting: Sequence[E], running: Sequence[E], free: int, now: float) -> list[E]:
        """Those of `running` that give up their slot; they wait again, with what they have."""
        ...


class Fifo:
    """First come, first served.

    Promise: calls get slots in the order of arrival, without exception, and keep them to their end. So no call
    waits for one that came after it, and the longest wait is that for the slots of those before it.
    """

    name = "fifo"

    def arrive(self, call: E, now: float) -> None: ...
    def leave(self, call: E, now: float) -> None: ...
    def charge(self, calls: Sequence[E], tokens: int, now: float) -> None: ...
    def charge_prompt(self, call: E, tokens: int, now: float) -> None: ...
    def select(self, decoding: list[E], now: float) -> list[E]:
        return decoding

    def admit(self, waiting: Sequence[E], running: Sequence[E], free: int, now: float) -> list[E]:
        return sorted(waiting, key=lambda entry: entry.order)[:free] if free > 0 else []

    def order(self, pending: Sequence[E], now: float) -> list[E]:
        return sorted(pending, key=lambda entry: entry.order)

    def evict(self, waiting: Sequence[E], running: Sequence[E], free: int, now: float) -> list[E]:
        return []
