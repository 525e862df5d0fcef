"""Passes over the weights: how a batch is divided into them, what they cost, which gaps between slots are filled."""

from __future__ import annotations

from itertools import chain, pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiosd.llm.passes import PassCost, fillers, passes, saved_by_filling, waste


@pytest.mark.parametrize(
    ("slots", "rows", "found"),
    [
        ([0], [8], [8]),
        ([0, 1], [4, 4], [8]),
        ([0, 1], [8, 1], [2, 7]),
        ([0, 1, 2], [8, 1, 4], [3, 7, 3]),
        ([0, 2], [4, 4], [4, 4]),
        ([3, 4, 9], [2, 3, 1], [4, 1, 1]),
    ],
)
def test_how_a_batch_is_divided(slots: list[int], rows: list[int], found: list[int]) -> None:
    assert passes(slots, rows) == found


def test_cost_is_the_line_through_the_largest_steps() -> None:
    assert PassCost.of({1: 9.0, 8: 10.0, 16: 14.0}) == PassCost(another=6.0, row=0.5)
    assert PassCost.of({1: 2.0, 8: 9.0}) == PassCost(another=1.0, row=1.0)
    assert PassCost.of({1: 2.0}) is None
    assert str(PassCost(another=0.0146, row=0.0061)) == "one more costs 14.6 ms, one more row 6.1 ms"


def test_cost_is_never_negative() -> None:
    assert PassCost.of({8: 10.0, 16: 9.0}) == PassCost(another=10.0, row=0.0)
    assert PassCost.of({8: 1.0, 16: 9.0}) == PassCost(another=0.0, row=1.0)


def seconds(slots: list[int], filled: list[int], cost: PassCost) -> float:
    every = sorted([*slots, *filled])
    return len(passes(every, [1] * len(every))) * cost.another + len(every) * cost.row


@given(st.sets(st.integers(0, 12), min_size=1), st.floats(0, 8), st.floats(0.1, 2))
def test_no_other_choice_of_fillers_is_faster(taken: set[int], another: float, row: float) -> None:
    slots, cost = sorted(taken), PassCost(another, row)
    chosen = fillers(slots, cost)
    gaps = [list(range(a + 1, b)) for a, b in pairwise(slots) if b > a + 1]
    choices = [list(chain(*picked)) for picked in product(*([[], gap] for gap in gaps))]
    best = min(seconds(slots, choice, cost) for choice in choices)
    assert seconds(slots, chosen, cost) == pytest.approx(best)
    assert seconds(slots, [], cost) - best == pytest.approx(saved_by_filling(slots, cost))
    together = seconds(list(range(len(slots))), [], cost)
    assert best - together == pytest.approx(waste(slots, cost))


def test_a_gap_with_a_slot_that_is_full_stays() -> None:
    cost = PassCost(another=5.0, row=1.0)
    assert fillers([0, 2, 5], cost, lambda slot: slot != 3) == [1]
    assert fillers([0, 2, 5], None) == []
