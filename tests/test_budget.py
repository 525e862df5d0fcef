"""Budgets: shared by descendants, and never exceeded because of an error."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiosd.budgets.limits import GroupLimits
from aiosd.ipc.link import BudgetShare
from aiosd.kernel.budget import FIRST_GROUP, Budget, Budgets, Stage, charge, sentence, settle, take, tokens_left
from aiosd.kernel.charges import check_open
from aiosd.kernel.enforce import Enforcer
from aiosd.kernel.ledger import COUNTED, Ledger
from aiosd.kernel.proc import Proc, ProcTable
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
    """Budgets with a ledger, and a list of the owners whose time was up."""
    clock = Clock()
    memfd = os.memfd_create("ledger")
    ledger, timers, up = Ledger(memfd), Timers(clock), list[int]()
    os.close(memfd)
    budgets = Budgets(ledger, timers)
    budgets.time_is_up = lambda budget: up.append(budget.owner)
    return budgets, timers, clock, ledger, up


def test_the_time_of_a_dead_owner_runs_on_for_its_children() -> None:
    budgets, timers, clock, _, up = books()
    (budget,) = owned = budgets.join(2, 100.0, [BudgetShare(0, Limits(time_s=2))])
    assert budgets.join(3, 101.0, [budget.share]) == [budget]
    budgets.leave(2, owned)
    clock.now = 102.5
    timers.run_due()
    assert up == [2]


def test_a_budget_ends_with_the_last_agent_that_shares_it() -> None:
    budgets, timers, clock, ledger, up = books()
    (budget,) = owned = budgets.join(2, 100.0, [BudgetShare(0, Limits(time_s=2))])
    budgets.join(3, 101.0, [budget.share])
    budgets.leave(2, owned)
    budgets.forget(2)  # the owner has left the history; its row must stay
    assert ledger.pids() == {2}
    budgets.leave(3, owned)
    assert (ledger.pids(), list(budgets)) == (set(), [])
    clock.now = 200.0
    timers.run_due()
    assert up == []


def test_a_new_kernel_finds_what_a_dead_owner_had_used() -> None:
    budgets, timers, _, ledger, _ = books()
    (budget,) = owned = budgets.join(2, 100.0, [BudgetShare(0, Limits(tokens=50))])
    charge(owned, 30)
    settle(owned, 30)
    successor = Budgets(ledger, timers)
    successor.time_is_up = lambda budget: None
    (again,) = successor.join(3, 101.0, [budget.share])  # the owner is dead, and no longer in the history
    successor.adopt({3})
    assert (again.owner, again.tokens_left, again.since) == (2, 20, 100.0)
    assert ledger.pids() == {2}


def test_a_budget_waits_for_an_agent_that_is_being_forked() -> None:
    """All that share it end meanwhile, and leave the history: their use still counts for the new agent."""
    budgets, timers, clock, ledger, up = books()
    (budget,) = owned = budgets.join(2, 100.0, [BudgetShare(0, Limits(tokens=50, time_s=2))])
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
    (budget,) = owned = budgets.join(2, 100.0, [BudgetShare(0, Limits(tokens=50))])
    budgets.expect([budget.share])
    budgets.leave(2, owned)
    budgets.forget(2)
    budgets.arrived([budget.share])
    assert (ledger.pids(), list(budgets)) == (set(), [])


# ── what is counted as it happens ─────────────────────────────────────────────────────────────────────────


@given(st.integers(0, 50), st.lists(st.tuples(st.integers(0, 2), st.integers(0, 20))))
def test_nothing_is_counted_beyond_any_of_the_shared_budgets(limit: int, takes: list[tuple[int, int]]) -> None:
    """Three agents, of which two share a budget, and all that of an ancestor, in any order of requests."""
    all_of_them, pair = Budget(2, Limits(tool_calls=limit)), Budget(3, Limits(tool_calls=limit // 2))
    shares = [[all_of_them, pair], [all_of_them, pair], [all_of_them]]
    begun = [0, 0, 0]
    for who, amount in takes:
        short = take(shares[who], "tool_calls", amount)
        if short is None:
            begun[who] += amount
        else:
            assert (short.left("tool_calls") or 0) < amount
    assert sum(begun) == all_of_them.used("tool_calls") <= limit
    assert begun[0] + begun[1] == pair.used("tool_calls") <= limit // 2


def test_a_new_kernel_finds_what_was_counted() -> None:
    budgets, timers, _, ledger, _ = books()
    owned = budgets.join(2, 100.0, [BudgetShare(0, Limits(tool_calls=3, disk_bytes=100))])
    assert take(owned, "tool_calls", 2) is None
    assert take(owned, "disk", 60) is None
    successor = Budgets(ledger, timers)
    successor.time_is_up = lambda budget: None
    again = successor.join(2, 100.0, [owned[0].share])
    assert take(again, "tool_calls", 2) is again[0]
    assert take(again, "tool_calls", 1) is None
    assert take(again, "disk", 41) is again[0]


def test_children_count_from_the_moment_that_they_are_being_forked_and_once() -> None:
    budgets, timers, _, ledger, _ = books()
    (budget,) = owned = budgets.join(2, 100.0, [BudgetShare(0, Limits(children=2))])
    shares = budgets.of_new(owned, "", Limits())
    budgets.expect(shares)
    budgets.expect(shares)
    assert budgets.full(shares, "children") is budget
    budgets.arrived(shares)  # one could not be forked
    assert budgets.full(shares, "children") is None
    for kernel in (budgets, Budgets(ledger, timers)):
        kernel.time_is_up = lambda budget: None
        (budget,) = joined = kernel.join(3, 101.0, shares)
        kernel.born(3, ledger.row(3), joined)
        assert budget.used("children") - budget.coming == 1
    assert not ledger.row(2)[COUNTED]


def test_an_owner_is_no_child_of_its_own_budget() -> None:
    budgets, _, _, ledger, _ = books()
    owned = budgets.join(2, 100.0, [BudgetShare(0, Limits(children=0))])
    budgets.born(2, ledger.row(2), owned)
    assert owned[0].used("children") == 0


# ── groups ────────────────────────────────────────────────────────────────────────────────────────────────

WEB = {"web": GroupLimits(all=Limits(tokens=100, time_s=10), each=Limits(time_s=3))}


def group_books() -> tuple[Budgets, Timers, Clock, Ledger, list[str]]:
    _, timers, clock, ledger, _ = books()
    up: list[str] = []
    budgets = Budgets(ledger, timers, WEB)
    budgets.time_is_up = lambda budget: up.append(budget.group or str(budget.owner))
    return budgets, timers, clock, ledger, up


def test_a_group_has_one_budget_and_each_agent_of_a_person_its_own() -> None:
    budgets, *_ = group_books()
    first = budgets.join(7, 100.0, budgets.of_new(None, "web", Limits(tokens=5)))
    second = budgets.join(8, 101.0, budgets.of_new(None, "web", Limits()))
    child = budgets.join(9, 101.0, budgets.of_new(second, "web", Limits()))
    assert first[0] is second[0] is child[0]
    assert first[1].limits == Limits(tokens=5, time_s=3)
    assert second[1] is child[1]
    assert budgets.of_new(None, "other", Limits()) == []
    assert [share.owner for share in budgets.of_new([], "web", Limits())] == [first[0].owner]


def test_the_time_of_a_group_runs_from_its_first_agent_on_over_every_death() -> None:
    budgets, timers, clock, ledger, up = group_books()
    clock.now = 150.0
    owned = budgets.join(7, 150.0, budgets.of_new(None, "web", Limits()))
    budgets.leave(7, owned)
    budgets.forget(7)
    successor = Budgets(ledger, Timers(clock), WEB)
    successor.time_is_up = budgets.time_is_up
    successor.adopt(set())
    later = successor.join(8, 158.0, successor.of_new(None, "web", Limits()))
    assert later[0].used("time", 158.0) == 8.0
    clock.now = 160.5
    timers.run_due()
    assert "web" in up


def test_what_a_group_used_stays_used_and_what_it_had_is_free_again() -> None:
    budgets, *_ = group_books()
    owned = budgets.join(7, 100.0, budgets.of_new(None, "web", Limits()))
    charge(owned[:1], 60)
    owned[0].levels["memory"], owned[0].reached, owned[0].stage = 5.0, "memory", Stage.KILL
    budgets.leave(7, owned)
    (again, _) = budgets.join(8, 101.0, budgets.of_new(None, "web", Limits()))
    assert (again.tokens_left, again.used("memory"), again.stage) == (40, 0.0, Stage.OPEN)


# ── messages ──────────────────────────────────────────────────────────────────────────────────────────────


def test_an_agent_gets_one_notice_whichever_kernel_sends_it() -> None:
    _, _, clock, ledger, _ = books()
    said: list[tuple[int, str]] = []

    def kernel() -> Budgets:
        budgets = Budgets(ledger, Timers(clock), soft=0.8)
        budgets.time_is_up = lambda budget: None
        budgets.near = lambda budget, which: said.append((budget.owner, which))
        return budgets

    limits = Limits(tokens=100, tool_calls=5, time_s=10)
    first = kernel()
    owned = first.join(2, 100.0, [BudgetShare(0, limits)])
    charge(owned, 79)
    take(owned, "tool_calls", 3)
    assert said == []
    charge(owned, 1)
    take(owned, "tool_calls", 1)
    charge(owned, 5)
    assert said == [(2, "tokens"), (2, "tool_calls")]
    settle(owned, 85)
    again = kernel().join(2, 100.0, [owned[0].share])
    charge(again, 5)
    take(again, "tool_calls", 1)
    assert said == [(2, "tokens"), (2, "tool_calls")]
    clock.now = 108.5
    first._timers.run_due()
    assert said[2:] == [(2, "time")]


def test_a_budget_may_set_when_the_notice_is_sent() -> None:
    budgets, *_ = books()
    said: list[str] = []
    budgets.near = lambda budget, which: said.append(which)
    for pid, soft in ((2, 50), (3, 0), (4, None)):
        owned = budgets.join(pid, 100.0, [BudgetShare(0, Limits(tokens=100, soft=soft))])
        charge(owned, 60)
    assert said == ["tokens"]


# ── the end ───────────────────────────────────────────────────────────────────────────────────────────────


class House:
    """Agents that share a budget, or a group's, and what is sent to them."""

    def __init__(self, limits: Limits, group: str = "") -> None:
        self.clock = Clock()
        self.timers = Timers(self.clock)
        self.sent: list[tuple[float, int, int]] = []
        self.table = ProcTable(10)
        uplink: Any = SimpleNamespace(send=lambda message: None)
        self.enforcer = Enforcer(self.table, uplink, self.timers, self._deliver)
        self.budget = Budget(FIRST_GROUP if group else 2, limits, group=group, sharers={2, 3})
        for pid in (2, 3):
            proc = Proc(pid, pid, pid, 0, "x", "x", group, "", 0.0, 0, budgets=[self.budget])
            self.table.add(proc)

    def _deliver(self, proc: Proc, number: int) -> None:
        if number != signal.SIGCONT:
            self.sent.append((round(self.clock.now - 100, 1), proc.pid, number))

    def run(self, seconds: float) -> None:
        self.clock.now += seconds
        self.timers.run_due()


TERM, KILL = signal.SIGTERM, signal.SIGKILL


def test_an_agent_that_requests_more_has_time_to_end_before_all_are_ended() -> None:
    house = House(Limits(tool_calls=1))
    house.enforcer.refused(house.budget, "tool_calls", house.table.procs[3])
    house.run(4.9)
    assert house.sent == []
    house.run(0.2)
    house.run(5.0)
    assert house.sent == [(5.1, 2, TERM), (5.1, 3, TERM), (10.1, 2, KILL), (10.1, 3, KILL)]
    assert {proc.budget for proc in house.table} == {"tool_calls"}
    assert house.table.procs[3].reason == "tool call budget of 1 used up"


def test_of_a_group_only_the_agent_that_requests_more_is_ended() -> None:
    house = House(Limits(tool_calls=1), group="web")
    for _ in range(2):
        house.enforcer.refused(house.budget, "tool_calls", house.table.procs[3])
    house.run(5.1)
    house.run(5.1)
    assert house.sent == [(5.1, 3, TERM), (10.2, 3, KILL)]
    assert house.table.procs[2].budget == ""


def test_an_owner_without_a_process_is_refused_and_never_ended() -> None:
    """Agents that it started are not ended for its requests either, and calls within its budget go on."""
    house = House(Limits(tool_calls=1, tokens=100))
    house.table.procs[2].outside = True
    house.enforcer.refused(house.budget, "tool_calls", house.table.procs[2])
    house.run(5.1)
    house.run(5.1)
    assert house.sent == []
    check_open(house.table.procs[2])
    house.enforcer.refused(house.budget, "tool_calls", house.table.procs[3])
    house.run(5.1)
    assert house.sent == [(15.3, 3, TERM)]


def test_what_is_sampled_or_cannot_be_measured_is_ended_at_once() -> None:
    house = House(Limits(memory_bytes=5))
    house.enforcer.exceeded(house.budget, "memory", "memory budget: it cannot be measured (x)")
    house.enforcer.exceeded(house.budget, "memory", "")
    assert house.sent == [(0.0, 2, KILL), (0.0, 3, KILL)]
    assert house.table.procs[2].reason == "memory budget: it cannot be measured (x)"


def test_a_notice_survives_the_kernels_death() -> None:
    house = House(Limits(tool_calls=1))
    house.table.procs[3].budget = "tool_calls"
    house.enforcer.adopted(house.table.procs[3])
    house.run(5.1)
    assert house.sent == [(5.1, 3, TERM)]


def test_a_process_that_linux_ends_for_a_bound_was_ended_by_its_budget() -> None:
    house = House(Limits(cpu_s=1))
    house.enforcer.ended(house.table.procs[3], -signal.SIGXFSZ)
    assert house.table.procs[3].budget == ""
    house.enforcer.ended(house.table.procs[3], -signal.SIGXCPU)
    assert house.table.procs[3].reason == "CPU budget of 1 s used up"


def test_a_budget_at_its_end_allows_no_further_call() -> None:
    house = House(Limits(time_s=1, tool_calls=5))
    check_open(house.table.procs[3])
    house.enforcer.time_is_up(house.budget)
    with pytest.raises(OSError, match="time budget of 1 s used up"):
        check_open(house.table.procs[3])
