"""How llama.cpp divides a batch into passes over the weights, what these cost, and which gaps are worth filling.

Each slot has cells of its own, and one pass computes consecutive slots with the same number of rows each. So calls in
scattered slots are computed in many passes, each of which reads all weights and multiplies few rows, which is slow:

    slots with a row     0  1  2  ·  4  5  ·  ·  ·  ·  10  11      three passes: 0–2, 4–5, 10–11
    slot 3 filled        0  1  2  x  4  5  ·  ·  ·  ·  10  11      two: 0–5, 10–11

A gap is *filled* with a row for each of its slots, computed after what lies in the slot and removed after the step. No
logits are computed of it. That pays where a pass costs more than these rows; both are known from the steps that are
measured when a model is loaded (`lookahead.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class PassCost:
    """Seconds for one more pass, and for one more row of it."""

    another: float
    row: float

    def __str__(self) -> str:
        return f"one more costs {1e3 * self.another:.1f} ms, one more row {1e3 * self.row:.1f} ms"

    @classmethod
    def of(cls, steps: Mapping[int, float]) -> PassCost | None:
        """From the seconds that steps of at least two numbers of rows took: the line through the largest two. None:
        fewer numbers were measured."""
        if len(steps) < 2:
            return None
        fewer, more = sorted(steps)[-2:]
        row = max(steps[more] - steps[fewer], 0.0) / (more - fewer)
        return cls(max(steps[fewer] - fewer * row, 0.0), row)


def passes(slots: Sequence[int], rows: Sequence[int]) -> list[int]:
    """The number of rows of each pass. `rows`: the batch's rows for each of these slots (ascending)."""
    left, found = dict(zip(slots, rows, strict=True)), []
    while left:
        run = [next(iter(left))]
        for slot in left:
            if slot == run[-1] + 1:
                run.append(slot)
        depth = min(left[slot] for slot in run)
        found.append(len(run) * depth)
        for slot in run:
            left[slot] -= depth
            if not left[slot]:
                del left[slot]
    return found


def fillers(
    slots: Sequence[int], cost: PassCost | None, usable: Callable[[int], bool] = lambda slot: True
) -> list[int]:
    """The slots between these (ascending) to fill, so that a step with one row for each of `slots` takes least."""
    found: list[int] = []
    if cost is not None:
        for before, after in pairwise(slots):
            gap = range(before + 1, after)
            if len(gap) * cost.row < cost.another and all(usable(slot) for slot in gap):
                found.extend(gap)
    return found


def saved_by_filling(slots: Sequence[int], cost: PassCost | None) -> float:
    """Seconds of such a step that its fillers save."""
    if cost is None:
        return 0.0
    gaps = (after - before - 1 for before, after in pairwise(slots))
    return sum(max(cost.another - gap * cost.row, 0.0) for gap in gaps if gap)


def waste(slots: Sequence[int], cost: PassCost) -> float:
    """Seconds of such a step that consecutive slots would save."""
    return sum(min((after - before - 1) * cost.row, cost.another) for before, after in pairwise(slots))
