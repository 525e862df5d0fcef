"""Which free slot serves a prompt best, and how scattered slots come together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from aiosd.llm.prefix import common_prefix
from aiosd.llm.slots import SlotContent, Slots, best_slot

ids = st.lists(st.integers(0, 3), max_size=12)


def array(tokens: list[int]) -> np.ndarray:
    return np.asarray(tokens, np.int32)


def held(slot: int, tokens: list[int], group: str = "", reusable: int | None = None, used: float = 0.0) -> SlotContent:
    return SlotContent(slot, group, array(tokens), len(tokens) if reusable is None else reusable, used)


@given(ids, ids)
def test_common_prefix_is_the_longest(a: list[int], b: list[int]) -> None:
    n = common_prefix(array(a), array(b))
    assert a[:n] == b[:n]
    assert n in (len(a), len(b)) or a[n] != b[n]


@given(ids, st.lists(st.tuples(ids, st.sampled_from(["", "g"]))), st.integers(0, 12))
def test_the_choice_saves_the_most_and_never_crosses_groups(
    prompt: list[int], slots: list[tuple[list[int], str]], most: int
) -> None:
    match = best_slot(array(prompt), "g", [held(i, t, g) for i, (t, g) in enumerate(slots)], most)
    if not slots:
        assert match is None
        return
    assert match is not None
    saved = [min(common_prefix(array(prompt), array(t)), most) if g == "g" else 0 for t, g in slots]
    assert match.length == saved[match.slot] == max(saved)


def test_without_a_match_an_empty_slot_is_taken_before_one_that_holds_something() -> None:
    match = best_slot(array([9]), "", [held(0, [1, 2]), held(1, [])], 10)
    assert match is not None
    assert match.slot == 1


def test_of_slots_that_hold_something_the_one_unused_longest_goes() -> None:
    match = best_slot(array([9]), "", [held(0, [1], used=5.0), held(1, [1], used=3.0)], 10)
    assert match is not None
    assert match.slot == 1


def test_only_the_reusable_part_counts() -> None:
    match = best_slot(array([1, 2, 3, 4]), "", [held(0, [1, 2, 3, 4], reusable=2)], 10)
    assert match is not None
    assert match.length == 2


# ── slots that are scattered ──────────────────────────────────────────────────────────────────────────────


@dataclass
class Row:
    key: tuple[int, int]
    slot: int = -1


@given(st.sets(st.integers(0, 15), min_size=1), st.sets(st.integers(0, 15)))
def test_scattered_rows_come_together_in_the_fewest_moves(taken: set[int], blocked: set[int]) -> None:
    slots = Slots(16)
    rows = [Row((1, slot)) for slot in sorted(taken)]
    for row in rows:
        slots.take(row.key[1], row)  # type: ignore[arg-type]
    for slot in blocked - taken:
        slots.take(slot, Row((2, slot)))  # type: ignore[arg-type]
    n = len(rows)
    fewest = min(len(set(range(start, start + n)) - taken) for start in range(16 - n + 1))
    moves = slots.closing_moves(rows)  # type: ignore[arg-type]
    for a, b in moves:
        slots.exchange(a, b)
        slots.check()
    places = sorted(row.slot for row in rows)
    assert places == list(range(places[0], places[0] + n))
    assert len(moves) == fewest
