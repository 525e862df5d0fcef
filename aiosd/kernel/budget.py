"""Budgets: tokens, seconds and memory that an agent may use, its descendants included.

A budget belongs to the agent that it was given to (its owner) and is shared by all that the owner starts, directly or
not. It lasts as long as any agent that shares it, whether or not the owner is alive, and a new kernel finds it again
in what the supervisor remembers of each agent (`link.Share`): so spawning is no way out of it, and no death is. A
reached budget never fails open:

    tokens   running generations end with finish_reason "limit"; a further one gets EDQUOT, and an agent that
             is still there `GRACE_S` later gets TERM and then KILL
    time     wall seconds since the spawn; TERM, then KILL `GRACE_S` later
    memory   PSS of the owner's and its descendants' processes, sampled every `SAMPLE_S`; KILL at once

and the owner's exit status tells which budget it was.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from aiosd import link
from aiosd.kernel.ledger import CHARGED, Ledger, Row
from aiosd.timers import Timer, Timers
from aiosd.units import format_size
from libaios.wire import Limits

GRACE_S = 5.0
SAMPLE_S = 0.5  # the lag of the memory limit


class Stage(enum.IntEnum):
    """How far the end of those that share a reached budget has come."""

    OPEN = 0
    NOTICE = 1  # EDQUOT; the next stage follows after `GRACE_S`
    TERM = 2
    KILL = 3


@dataclass(slots=True, eq=False)
class Budget:
    owner: int
    limits: Limits
    since: float = 0.0  # on the monotonic clock
    tokens_used: int = 0
    reached: str = ""  # the first one that was: "tokens", "time", "memory"
    stage: Stage = Stage.OPEN
    row: Row | None = None  # its owner's, in the ledger
    timer: Timer | None = None  # of its seconds
    sharers: set[int] = field(default_factory=set)  # pids of live agents
    coming: int = 0  # agents that are being forked and will share it

    @property
    def tokens_left(self) -> int | None:
        return None if self.limits.tokens is None else max(0, self.limits.tokens - self.tokens_used)

    @property
    def share(self) -> link.Share:
        return link.Share(self.owner, self.limits, self.since)


class Budgets:
    """All budgets that a live agent shares. `time_is_up` is called with one whose seconds are over."""

    def __init__(self, ledger: Ledger, timers: Timers) -> None:
        self._ledger = ledger
        self._timers = timers
        self._by_owner: dict[int, Budget] = {}
        self._forgotten: set[int] = set()  # owners that have left the history, while their budget is still shared
        self.time_is_up: Callable[[Budget], None]

    def __iter__(self) -> Iterator[Budget]:
        return iter(self._by_owner.values())

    def owners(self) -> set[int]:
        return set(self._by_owner)

    def join(self, pid: int, since: float, shares: Sequence[link.Share]) -> list[Budget]:
        """What a new agent, or one adopted from a dead kernel, has a share in. `since`: when it was forked."""
        joined = []
        for share in shares:
            budget = self._find(share.owner or pid, share.limits, share.since or since)
            budget.sharers.add(pid)
            joined.append(budget)
        return joined

    def _find(self, owner: int, limits: Limits, since: float) -> Budget:
        budget = self._by_owner.get(owner)
        if budget is None:
            row = self._ledger.row(owner)
            budget = self._by_owner[owner] = Budget(owner, limits, since, row[CHARGED], row=row)
            if limits.time_s is not None:
                budget.timer = self._timers.at(since + limits.time_s, lambda: self.time_is_up(budget))
        return budget

    def expect(self, shares: Sequence[link.Share]) -> None:
        """An agent is being forked that will share these: they last until `arrived`, though all others may be dead."""
        for share in shares:
            budget = self._by_owner.get(share.owner)
            if budget is not None:
                budget.coming += 1

    def arrived(self, shares: Sequence[link.Share]) -> None:
        """It has joined, or it could not be forked."""
        for share in shares:
            budget = self._by_owner.get(share.owner)
            if budget is not None:
                budget.coming -= 1
                self._drop_if_unused(budget)

    def leave(self, pid: int, budgets: Sequence[Budget]) -> None:
        """The agent is dead."""
        for budget in budgets:
            budget.sharers.discard(pid)
            self._drop_if_unused(budget)

    def _drop_if_unused(self, budget: Budget) -> None:
        if budget.sharers or budget.coming or self._by_owner.get(budget.owner) is not budget:
            return
        del self._by_owner[budget.owner]
        if budget.timer is not None:
            budget.timer.cancel()
        if budget.owner in self._forgotten:
            self._forgotten.discard(budget.owner)
            self._ledger.forget(budget.owner)

    def forget(self, pid: int) -> None:
        """The dead agent has left the history: its row in the ledger goes, now or with its budget."""
        if pid in self._by_owner:
            self._forgotten.add(pid)
        else:
            self._ledger.forget(pid)

    def adopt(self, known: set[int]) -> None:
        """After a kernel's death: of the rows in the ledger, keep those of agents that are `known`, and of owners."""
        for pid in self._ledger.pids() - known:
            self.forget(pid)


def tokens_left(budgets: list[Budget]) -> int | None:
    """The smallest of what is left; None: unlimited."""
    left = [budget.tokens_left for budget in budgets if budget.limits.tokens is not None]
    return min((n for n in left if n is not None), default=None)


def charge(budgets: list[Budget], tokens: int) -> Budget | None:
    """Count tokens against every budget; returns one that has now nothing left, if any."""
    empty = None
    for budget in budgets:
        budget.tokens_used += tokens
        if budget.tokens_left == 0:
            empty = budget
    return empty


def settle(budgets: list[Budget], tokens: int) -> None:
    """A call that used this number of tokens is closed: they are on the books now."""
    for budget in budgets:
        if budget.row is not None:
            budget.row[CHARGED] += tokens


def sentence(budget: Budget) -> str:
    """In words, for the person who gave it."""
    limits = budget.limits
    return {
        "tokens": f"token budget of {limits.tokens} used up",
        "time": f"time budget of {limits.time_s:g} s used up" if limits.time_s is not None else "",
        "memory": f"memory budget of {format_size(limits.memory_bytes or 0)} exceeded",
    }.get(budget.reached, "")
