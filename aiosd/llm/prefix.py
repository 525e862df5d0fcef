"""Which tokens that lie in the cache already a prompt can reuse: pure, over token ids; no tensors.

Today: the longest common prefix with what a free slot still holds, if it came from the same group. (Reuse
across groups would tell one of them, by timing, what the other has sent.) A tree over everything that is
cached, live and finished, takes this file's place when prefixes travel between slots.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]


def common_prefix(a: Tokens, b: Tokens) -> int:
    """How many leading tokens are the same."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


@dataclass(frozen=True, slots=True)
class Held:
    """What a free slot still holds. `reusable`: how many of its tokens may serve another call (in exact mode
    only those that were prefilled: the same tokens decoded one by one differ in their last bits)."""

    slot: int
    group: str
    tokens: Tokens
    reusable: int
    used: float  # clock when it was last in use


@dataclass(frozen=True, slots=True)
class Match:
    slot: int
    length: int


def best_slot(prompt: Tokens, group: str, held: Iterable[Held], most: int) -> Match | None:
    """The free slot that saves the most prompt tokens, never more than `most`; None when there is no free slot.

    Without anything to save an empty slot is better than one that holds something, then the one unused for
    longest; at the end the lowest number, because slots in use should lie close together.
    """

    def saved(slot: Held) -> int:
        if slot.group != group:
            return 0
        return min(common_prefix(prompt, slot.tokens), slot.reusable, most)

    best = max(
        ((saved(slot), not len(slot.tokens), -slot.used, -slot.slot) for slot in held),
        default=None,
    )
    return None if best is None else Match(slot=-best[3], length=best[0])


def equal_runs(lengths: Sequence[int]) -> list[list[int]]:
    """Indices grouped by equal value, groups in order of their first member."""
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(length, []).append(index)
    return list(groups.values())
