"""Budgets: how much an agent and all that it starts may use (the kinds are in `aiosd.budgets.limits`).

A budget belongs to the agent that it was given to (its owner), or to a group. It is shared by all agents that the owner
starts, directly or not, or by all agents of the group. It lasts as long as any agent that shares it, whether or not the
owner is alive; a group's lasts as long as aiosd. A new kernel finds it again in the supervisor's records of agents
(`link.BudgetShare`) and in the ledger. So neither spawning nor a death is a way out of a budget. A reached budget never
fails open (`enforce`). How each kind is counted:

    tokens, context       by the model's core, before it computes them (`llm.purse`), and here once they are given out
    cost                  here, by the prices of the models: of a prompt when it is sent, of an answer as it comes
    tool_calls            here, when a call goes to the toolbox
    children              here, when an agent is forked; agents that are being forked count, too
    disk                  here, when bytes go to the store; and its workspace, sampled
    time                  wall seconds since the spawn (a group's: since its first agent's)
    cpu, memory, processes    sampled (`measure`); cpu and memory include what its calls of tools use
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from aiosd.budgets import limits as kinds
from aiosd.budgets.limits import GroupLimits
from aiosd.ipc import link
from aiosd.kernel.ledger import (
    CHARGED,
    CHILDREN,
    COST_CHARGED,
    COUNTED,
    CPU_US,
    NOTIFIED,
    SINCE_US,
    STORED,
    TOOL_CALLS,
    Ledger,
    LedgerRow,
    loose_row,
)
from aiosd.timers import Timer, Timers
from libaios.wire import Limits

GRACE_S = 5.0
NEVER = 1 << 63
#: Owners with this number or a higher one are groups.
FIRST_GROUP = 1 << 53

#: Kinds that are counted in the ledger as they are used.
_COUNTERS = {"tool_calls": TOOL_CALLS, "children": CHILDREN, "disk": STORED}


class Stage(enum.IntEnum):
    """The stages in which agents that share a reached budget are ended."""

    OPEN = 0
    NOTICE = 1  # EDQUOT; the next stage follows after `GRACE_S`
    TERM = 2
    KILL = 3


def _ignore(budget: Budget, which: str) -> None:
    pass


@dataclass(slots=True, eq=False)
class Budget:
    owner: int
    limits: Limits
    since: float = 0.0  # on the monotonic clock
    tokens_used: int = 0
    cost_used: int = 0  # in 10^-12 of the currency's unit
    group: str = ""  # the group that owns it; "": the owner is an agent
    reached: str = ""  # the first kind that was reached
    stage: Stage = Stage.OPEN
    row: LedgerRow = field(default_factory=loose_row)  # its owner's, in the ledger
    timers: list[Timer] = field(default_factory=list)  # for its seconds
    sharers: set[int] = field(default_factory=set)  # pids of live agents
    coming: int = 0  # agents that are being forked and will share it
    levels: dict[str, float] = field(default_factory=dict)  # the last samples, by kind,
    sampled: float = 0.0  # … and when
    soft: float = 0.0  # the fraction of each kind at which its agent gets a message; 0: never
    tokens_near: int = NEVER  # the number of used tokens at which it gets a message
    near: Callable[[Budget, str], None] = _ignore  # called then

    @property
    def tokens_left(self) -> int | None:
        return None if self.limits.tokens is None else max(0, self.limits.tokens - self.tokens_used)

    @property
    def cost_left(self) -> int | None:
        return None if self.limits.cost is None else max(0, self.limits.cost - self.cost_used)

    @property
    def share(self) -> link.BudgetShare:
        return link.BudgetShare(self.owner, self.limits, self.since)

    @property
    def cpu_s(self) -> float:
        return float(self.row[CPU_US]) / 1e6

    def used(self, kind: str, now: float = 0.0) -> float:
        """How much of it is used; `now` on the monotonic clock, for its seconds."""
        if kind == "tokens":
            return self.tokens_used
        if kind == "cost":
            return self.cost_used
        if kind == "time":
            return max(now - self.since, 0.0) if self.since else 0.0
        if kind == "cpu":
            return self.cpu_s
        counted = self.row[_COUNTERS[kind]] if kind in _COUNTERS else 0
        return counted + self.levels.get(kind, 0.0) + (self.coming if kind == "children" else 0)

    def left(self, kind: str) -> float | None:
        """How much of a counted or sampled kind is left; None: it has no limit."""
        amount = kinds.BY_NAME[kind].of(self.limits)
        return None if amount is None else amount - self.used(kind)

    def count(self, kind: str, amount: int) -> None:
        self.row[_COUNTERS[kind]] += amount


class Budgets:
    """All budgets that a live agent shares, and those of groups. `time_is_up` is called with a budget whose seconds are
    over; `near` when a kind is nearly used up: at the fraction that its limits name, else at `soft` (0: never)."""

    def __init__(
        self, ledger: Ledger, timers: Timers, groups: Mapping[str, GroupLimits] | None = None, soft: float = 0.0
    ) -> None:
        self._ledger = ledger
        self._timers = timers
        self._by_owner: dict[int, Budget] = {}
        self._forgotten: set[int] = set()  # owners that have left the history, while their budget is still shared
        self._each = {name: group.each for name, group in (groups or {}).items()}
        self._of_group: dict[str, Budget] = {}
        self._soft = soft
        self.time_is_up: Callable[[Budget], None]
        self.near: Callable[[Budget, str], None] = _ignore
        for number, (name, group) in enumerate(sorted((groups or {}).items())):
            if kinds.is_any(group.all):
                self._of_group[name] = self._group(FIRST_GROUP + number, name, group.all)

    def __iter__(self) -> Iterator[Budget]:
        return iter(self._by_owner.values())

    def lasts(self, budget: Budget) -> bool:
        """Whether the budget is still in use: all agents that shared it may be dead."""
        return self._by_owner.get(budget.owner) is budget

    def owners(self) -> set[int]:
        return set(self._by_owner)

    def of_new(self, parent: Sequence[Budget] | None, group: str, wanted: Limits) -> list[link.BudgetShare]:
        """The budgets that a new agent in this group will share. `parent`: the budgets of the agent that starts it;
        None: a person does. A child is in its parent's group, whose budget is among its parent's; or in one that a
        person has allowed."""
        if parent is not None:
            shares = [budget.share for budget in parent]
            shares += [share for share in self.of_group(group) if all(share.owner != one.owner for one in shares)]
        else:
            shares = self.of_group(group)
            wanted = kinds.least(wanted, self.each_of(group))
        return [*shares, link.BudgetShare(0, wanted)] if kinds.is_any(wanted) else shares

    def each_of(self, group: str) -> Limits:
        """The limits of each agent of the group that a person starts."""
        return self._each.get(group, Limits())

    def of_group(self, group: str) -> list[link.BudgetShare]:
        """The budget of the group, if it has one."""
        return [self._of_group[group].share] if group in self._of_group else []

    def full(self, shares: Sequence[link.BudgetShare], kind: str) -> Budget | None:
        """One of these budgets that has no room for one more, or is used up; None: there is none."""
        found = [budget for share in shares if (budget := self._by_owner.get(share.owner)) is not None]
        return next((budget for budget in found if budget.stage >= Stage.TERM), None) or without_room(found, kind, 1)

    def join(self, pid: int, since: float, shares: Sequence[link.BudgetShare]) -> list[Budget]:
        """The budgets of a new agent, or of one adopted from a dead kernel. `since`: when it was forked."""
        joined = []
        for share in shares:
            budget = self._find(share.owner or pid, share.limits, share.since or since)
            if not budget.since:  # a group's first agent
                budget.row[SINCE_US] = int(since * 1e6)
                self._run(budget, since)
            budget.sharers.add(pid)
            joined.append(budget)
        return joined

    def born(self, pid: int, row: LedgerRow, budgets: Sequence[Budget]) -> None:
        """Count a new agent as a child, once, whichever kernel counts it. `row`: its own in the ledger."""
        if not row[COUNTED]:
            for budget in budgets:
                if budget.owner != pid:
                    budget.count("children", 1)
                    check_near(budget, "children")
            row[COUNTED] = 1

    def _find(self, owner: int, limits: Limits, since: float) -> Budget:
        budget = self._by_owner.get(owner)
        if budget is None:
            budget = self._new(owner, limits)
            self._run(budget, since)
        return budget

    def _group(self, owner: int, name: str, limits: Limits) -> Budget:
        budget = self._new(owner, limits)
        budget.group = name
        if budget.row[SINCE_US]:
            self._run(budget, budget.row[SINCE_US] / 1e6)
        return budget

    def _new(self, owner: int, limits: Limits) -> Budget:
        row = self._ledger.row(owner)
        soft = self._soft if limits.soft is None else limits.soft / 100
        budget = Budget(owner, limits, tokens_used=row[CHARGED], cost_used=row[COST_CHARGED], row=row, soft=soft)
        self._by_owner[owner] = budget
        budget.near = lambda budget, which: self.near(budget, which)
        if limits.tokens is not None and soft and not notified(budget, "tokens"):
            budget.tokens_near = int(soft * limits.tokens)
        return budget

    def _run(self, budget: Budget, since: float) -> None:
        """Start the budget's time, now or at the time `since`."""
        budget.since = since
        seconds = budget.limits.time_s
        if seconds is None:
            return
        budget.timers.append(self._timers.at(since + seconds, lambda: self.time_is_up(budget)))
        if budget.soft:
            budget.timers.append(self._timers.at(since + budget.soft * seconds, lambda: notify_near(budget, "time")))

    def expect(self, shares: Sequence[link.BudgetShare]) -> None:
        """An agent is being forked that will share these: they last until `arrived`, though all others may be dead."""
        for share in shares:
            budget = self._by_owner.get(share.owner)
            if budget is not None:
                budget.coming += 1

    def arrived(self, shares: Sequence[link.BudgetShare]) -> None:
        """The expected agent has joined, or could not be forked."""
        for share in shares:
            budget = self._by_owner.get(share.owner)
            if budget is not None:
                budget.coming -= 1
                self._drop_if_unused(budget)

    def leave(self, pid: int, budgets: Sequence[Budget]) -> None:
        """An agent is dead: it does not share its budgets any more."""
        for budget in budgets:
            budget.sharers.discard(pid)
            self._drop_if_unused(budget)

    def _drop_if_unused(self, budget: Budget) -> None:
        if budget.sharers or budget.coming or self._by_owner.get(budget.owner) is not budget:
            return
        if budget.group:
            _recover(budget)
            return
        del self._by_owner[budget.owner]
        for timer in budget.timers:
            timer.cancel()
        if budget.owner in self._forgotten:
            self._forgotten.discard(budget.owner)
            self._ledger.forget(budget.owner)

    def forget(self, pid: int) -> None:
        """A dead agent has left the history: drop its row in the ledger, now or together with its budget."""
        if pid in self._by_owner:
            self._forgotten.add(pid)
        else:
            self._ledger.forget(pid)

    def adopt(self, known: set[int]) -> None:
        """After a kernel's death: keep only the rows of the ledger that belong to agents in `known`, or to owners."""
        for pid in self._ledger.pids() - known:
            self.forget(pid)


def _recover(budget: Budget) -> None:
    """A group has no agent any more: amounts that were held at a time are free again, used amounts are not."""
    for kind in ("memory", "processes", "context"):
        budget.levels.pop(kind, None)
    if budget.reached in ("memory", "processes", "context"):
        budget.reached, budget.stage = "", Stage.OPEN


# ── tokens ────────────────────────────────────────────────────────────────────────────────────────────────


def tokens_left(budgets: list[Budget]) -> int | None:
    """The smallest number of tokens left in any of them; None: unlimited."""
    left = [budget.tokens_left for budget in budgets if budget.limits.tokens is not None]
    return min((n for n in left if n is not None), default=None)


def purses(budgets: Sequence[Budget]) -> list[link.PurseShare]:
    """For a core: the budgets from which its calls are paid."""
    return [
        link.PurseShare(budget.owner, budget.tokens_left, budget.limits.context)
        for budget in budgets
        if budget.limits.tokens is not None or budget.limits.context is not None
    ]


def hold(budgets: Sequence[Budget], tokens: int) -> None:
    """An open call holds this number of tokens more (or fewer, if negative)."""
    for budget in budgets:
        if budget.limits.context is not None:
            budget.levels["context"] = budget.levels.get("context", 0.0) + tokens
            check_near(budget, "context")


def charge(budgets: list[Budget], tokens: int) -> Budget | None:
    """Count tokens against every budget; returns one that has now nothing left, if any."""
    empty = None
    for budget in budgets:
        budget.tokens_used += tokens
        if budget.tokens_used >= budget.tokens_near:
            budget.tokens_near = NEVER
            notify_near(budget, "tokens")
        if budget.tokens_left == 0:
            empty = budget
    return empty


def settle(budgets: list[Budget], tokens: int, cost: int = 0) -> None:
    """Record the usage of a call that is closed now."""
    for budget in budgets:
        budget.row[CHARGED] += tokens
        budget.row[COST_CHARGED] += cost


# ── money ─────────────────────────────────────────────────────────────────────────────────────────────────


def cost_left(budgets: list[Budget]) -> int | None:
    """The smallest amount of money left in any of them; None: unlimited."""
    return min((left for budget in budgets if (left := budget.cost_left) is not None), default=None)


def pay(budgets: list[Budget], cost: int) -> Budget | None:
    """Count money against every budget; returns one that has now nothing left, if any. Negative: it is given back."""
    empty = None
    for budget in budgets:
        budget.cost_used += cost
        check_near(budget, "cost")
        if budget.cost_left == 0:
            empty = budget
    return empty


def tightest(budgets: list[Budget], kind: str) -> Budget | None:
    """The budget that has the least left of a kind; None: none limits it."""
    limited = [(left, budget) for budget in budgets if (left := budget.left(kind)) is not None]
    return min(limited, key=lambda pair: pair[0])[1] if limited else None


# ── other kinds ───────────────────────────────────────────────────────────────────────────────────────────


def without_room(budgets: Sequence[Budget], kind: str, amount: int) -> Budget | None:
    """A budget that has no room for this amount more."""
    for budget in budgets:
        left = budget.left(kind)
        if left is not None and left < amount:
            return budget
    return None


def take(budgets: Sequence[Budget], kind: str, amount: int) -> Budget | None:
    """Count this amount against every budget, or nothing: then it returns the one that has no room for it."""
    short = without_room(budgets, kind, amount)
    if short is None:
        for budget in budgets:
            budget.count(kind, amount)
            check_near(budget, kind)
    return short


def notified(budget: Budget, kind: str) -> bool:
    """Whether its agent has had the message that this kind is nearly used up."""
    return bool(budget.row[NOTIFIED] & _bit(kind))


def notify_near(budget: Budget, kind: str) -> None:
    """Send that message, once, whichever kernel does it."""
    if not notified(budget, kind):
        budget.row[NOTIFIED] |= _bit(kind)
        budget.near(budget, kind)


def check_near(budget: Budget, kind: str) -> None:
    amount = kinds.BY_NAME[kind].of(budget.limits)
    if budget.soft and amount is not None and budget.used(kind) >= budget.soft * amount:
        notify_near(budget, kind)


def _bit(kind: str) -> int:
    return 1 << next(number for number, one in enumerate(kinds.KINDS) if one.name == kind)


def sentence(budget: Budget, kind: str = "") -> str:
    """A sentence about a reached budget, for a person. `kind`: "" is the kind that was reached."""
    return kinds.sentence(budget.limits, kind or budget.reached, budget.group)
