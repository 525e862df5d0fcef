"""Which free slot serves a prompt best."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from aiosd.llm.prefix import Held, best_slot, common_prefix

ids = st.lists(st.integers(0, 3), max_size=12)


def array(tokens: list[int]) -> np.ndarray:
    return np.asarray(tokens, np.int32)


def held(slot: int, tokens: list[int], group: str = "", reusable: int | None = None, used: float = 0.0) -> Held:
    return Held(slot, group, array(tokens), len(tokens) if reusable is None else reusable, used)


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
