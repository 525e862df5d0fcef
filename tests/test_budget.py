"""Budgets: shared by descendants, never failing open."""

from __future__ import annotations

import os

from hypothesis import given
from hypothesis import strategies as st

from aiosd.kernel.budget import Budget, Budgets, charge, sentence, settle, tokens_left
from aiosd.kernel.ledger import Ledger
from aiosd.link import Share
from aiosd.timers import Timers
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
        assert word in sentence(budget)


# ── trees ─────────────────────────────────────────────────────────────────────────────────────────────────


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def books() -> tuple[Budgets, Timers, Clock, Ledger, list[int]]:
    """Budgets over a ledger, and the owners of those whose time was up."""
    clock = Clock()
    memfd = os.memfd_create("ledger")
    ledger, timers, up = Ledger(memfd), Timers(clock), list[int]()
    os.close(memfd)
    budgets = Budgets(ledger, timers)
    budgets.time_is_up = lambda budget: up.append(budget.owner)
    return budgets, timers, clock, ledger, up


def test_the_time_of_a_dead_owner_runs_on_for_its_children() -> None:
    budgets, timers, clock, _, up = books()
    (budget,) = owned = budgets.join(2, 100.0, [Share(0, Limits(time_s=2))])
    assert budgets.join(3, 101.0, [budget.share]) == [budget]
    budgets.leave(2, owned)
    clock.now = 102.5
    timers.run_due()
    assert up == [2]


def test_a_budget_ends_with_the_last_that_shares_it() -> None:
    budgets, timers, clock, ledger, up = books()
    (budget,) = owned = budgets.join(2, 100.0, [Share(0, Limits(time_s=2))])
    budgets.join(3, 101.0, [budget.share])
    budgets.leave(2, owned)
    budgets.forget(2)  # the owner has left the history, its row must not
    assert ledger.pids() == {2}
    budgets.leave(3, owned)
    assert (ledger.pids(), list(budgets)) == (set(), [])
    clock.now = 200.0
    timers.run_due()
    assert up == []


def test_a_new_kernel_finds_what_a_dead_owner_had_used() -> None:
    budgets, timers, _, ledger, _ = books()
    (budget,) = owned = budgets.join(2, 100.0, [Share(0, Limits(tokens=50))])
    charge(owned, 30)
    settle(owned, 30)
    successor = Budgets(ledger, timers)
    successor.time_is_up = lambda budget: None
    (again,) = successor.join(3, 101.0, [budget.share])  # the owner is dead, and forgotten
    successor.adopt({3})
    assert (again.owner, again.tokens_left, again.since) == (2, 20, 100.0)
    assert ledger.pids() == {2}


def test_a_budget_waits_for_an_agent_that_is_being_forked() -> None:
    """All that share it end meanwhile, and are forgotten: what they have used counts for the one that comes."""
    budgets, timers, clock, ledger, up = books()
    (budget,) = owned = budgets.join(2, 100.0, [Share(0, Limits(tokens=50, time_s=2))])
    shares = [budget.share]
    budgets.expect(shares)
    charge(owned, 30)
    settle(owned, 30)
    budgets.leave(2, owned)
    budgets.forget(2)
    clock.now = 102.5
    timers.run_due()
    assert up == [2]
    (joined,) = budgets.join(3, 102.6, shares)
    budgets.arrived(shares)
    assert joined is budget
    assert joined.tokens_left == 20
    budgets.leave(3, [joined])
    assert (ledger.pids(), list(budgets)) == (set(), [])


def test_a_budget_ends_when_the_last_could_not_be_forked() -> None:
    budgets, _, _, ledger, _ = books()
    (budget,) = owned = budgets.join(2, 100.0, [Share(0, Limits(tokens=50))])
    budgets.expect([budget.share])
    budgets.leave(2, owned)
    budgets.forget(2)
    budgets.arrived([budget.share])
    assert (ledger.pids(), list(budgets)) == (set(), [])
