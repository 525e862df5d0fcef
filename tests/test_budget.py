"""Budgets: shared by descendants, never failing open."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aiosd.kernel.budget import Budget, charge, describe, tokens_left
from libaios.wire import Limits


def test_without_a_limit_nothing_runs_out() -> None:
    budget = Budget(2, Limits(time_s=3))
    assert charge([budget], 10**9) is None
    assert tokens_left([budget]) is None
    assert tokens_left([]) is None


def test_the_smallest_of_what_is_left_counts() -> None:
    grandparent, parent = Budget(2, Limits(tokens=100)), Budget(3, Limits(tokens=50))
    charge([grandparent], 80)
    assert tokens_left([grandparent, parent]) == 20


def test_a_budget_of_nothing_is_used_up_at_once() -> None:
    assert tokens_left([Budget(2, Limits(tokens=0))]) == 0


@given(st.integers(0, 1000), st.lists(st.integers(0, 100)))
def test_it_is_empty_exactly_when_as_much_was_charged_as_it_held(limit: int, charges: list[int]) -> None:
    budget = Budget(2, Limits(tokens=limit))
    total = 0
    for tokens in charges:
        total += tokens
        assert (charge([budget], tokens) is budget) == (total >= limit)
        assert budget.tokens_left == max(0, limit - total)


def test_descriptions_name_the_budget_and_its_size() -> None:
    budget = Budget(2, Limits(tokens=7, time_s=1.5, memory_bytes=30 << 20))
    for which, word in (("tokens", "7"), ("time", "1.5 s"), ("memory", "of 30.0M ")):
        budget.reached = which
        assert word in describe(budget)
