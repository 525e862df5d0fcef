"""Which slots hold the cells of a common KV cache, and how many cells are free (`--kv-layout unified`).

All slots lie in one cache. Each of its cells holds one token of one slot or of several: a beginning that slots have in
common is there once, and sharing it copies nothing.

    slot 0   │ system prompt │ question 0 │ answer 0 │         cells in use: one run each
    slot 1   │      ″        │ question 1 │                      ″: the same run, and one of its own
    slot 2   │      ″        │ question 2 │ answer 2 │         only a part of a run may be shared, its beginning

A *run* is what one slot has added; others may hold its beginning. A slot is a path of runs, each up to where the next
begins, the last one up to the slot's end. A cell is in use while any slot holds it, so a run has as many cells in use
as the slot that goes furthest in it. llama.cpp keeps the cells, but does not report how many are free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, eq=False)
class CellRun:
    begin: int  # tokens before it, in each slot that holds it


class Cells:
    """`total` cells for `slots` slots; `length(slot)`: how many tokens a slot holds."""

    def __init__(self, total: int, slots: int, length: Callable[[int], int]) -> None:
        self.total = total
        self._length = length
        self._paths: list[list[CellRun]] = [[CellRun(0)] for _ in range(slots)]
        self._surely_free = 0  # at least this number is free: the last count, less what was taken since

    def share(self, source: int, target: int, length: int) -> None:
        """The empty slot `target` holds the first `length` cells of `source` now, too."""
        self._paths[target] = [*_before(self._paths[source], length), CellRun(length)]

    def cut(self, slot: int, length: int) -> None:
        """The slot keeps only its first `length` tokens. Its next tokens are a new run if other slots hold the last
        one, since they may go further in it."""
        kept = _before(self._paths[slot], length)
        others = (path for other, path in enumerate(self._paths) if other != slot)
        if not kept or any(kept[-1] in path for path in others):
            kept.append(CellRun(length))
        self._paths[slot] = kept

    def used_by(self, slots: Iterable[int]) -> int:
        """Cells that these slots hold together; one that several hold counts once."""
        ends: dict[CellRun, int] = {}
        for slot in slots:
            length, path = self._length(slot), self._paths[slot]
            for run, begin in zip(path, [*(after.begin for after in path[1:]), length], strict=True):
                ends[run] = max(ends.get(run, 0), min(begin, length) - run.begin)
        return sum(ends.values())

    @property
    def used(self) -> int:
        return self.used_by(range(len(self._paths)))

    def has(self, count: int) -> bool:
        """Are at least `count` cells free? (Counted only if the last count is not enough, because every step calls
        this.)"""
        if count > self._surely_free:
            self._surely_free = self.total - self.used
        return count <= self._surely_free

    @property
    def free(self) -> int:
        return self.total - self.used

    def take(self, count: int) -> None:
        """`count` cells more are used from now on."""
        self._surely_free -= count

    def stats(self, owned: Iterable[int]) -> dict[str, int]:
        """`owned`: the slots of running calls; cells that only other slots hold are idle and are given up when
        needed."""
        used, held = self.used, sum(map(self._length, range(len(self._paths))))
        idle = used - self.used_by(owned)
        return {"total": self.total, "used": used, "idle": idle, "saved_by_sharing": held - used}


def _before(path: list[CellRun], length: int) -> list[CellRun]:
    return [run for run in path if run.begin < length]
