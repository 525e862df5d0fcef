"""Budgets: tokens, seconds and memory that an agent may use, its descendants included.

A budget belongs to the agent it was given to (its owner) and is shared by all that the owner starts, directly
or not: spawning is no way out of it. A reached budget never fails open:

    tokens   running generations end with finish_reason "limit"; a further one gets EDQUOT, and an agent that
             is still there `GRACE_S` later gets TERM and then KILL
    time     wall seconds since the spawn; TERM, then KILL `GRACE_S` later
    memory   PSS of the owner's and its descendants' processes, sampled every `SAMPLE_S`; KILL at once

and the owner's exit status says which budget it was.
"""

from __future__ import annotations

from dataclasses import dataclass

from aiosd.kernel.ledger import CHARGED, Row
from aiosd.timers import Timer
from aiosd.units import format_size
from libaios.wire import Limits

GRACE_S = 5.0
SAMPLE_S = 0.5  # the lag of the memory limit


@dataclass(slots=True, eq=False)
class Budget:
    owner: int
    limits: Limits
    tokens_used: int = 0
    reached: str = ""  # the first one that was: "tokens", "time", "memory"
    ending: bool = False  # those that share it are on notice
    row: Row | None = None  # its owner's, in the ledger
    timer: Timer | None = None  # of its seconds

    @property
    def tokens_left(self) -> int | None:
        return None if self.limits.tokens is None else max(0, self.limits.tokens - self.tokens_used)


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
    """A call that used so many tokens is closed: they are on the books now."""
    for budget in budgets:
        if budget.row is not None:
            budget.row[CHARGED] += tokens


def describe(budget: Budget) -> str:
    """In words, for the person who gave it."""
    limits = budget.limits
    return {
        "tokens": f"token budget of {limits.tokens} used up",
        "time": f"time budget of {limits.time_s:g} s used up" if limits.time_s is not None else "",
        "memory": f"memory budget of {format_size(limits.memory_bytes or 0)} exceeded",
    }.get(budget.reached, "")
