"""What happens when a budget is reached (`budget` tells what budgets are)."""

from __future__ import annotations

import signal
from collections.abc import Callable

from aiosd import link
from aiosd.kernel import budget as budgets
from aiosd.kernel.budget import GRACE_S, Budget, Stage
from aiosd.kernel.proc import Proc, ProcTable
from aiosd.kernel.uplink import Uplink
from aiosd.timers import Timers


class Enforcer:
    """`deliver` sends a signal to an agent."""

    def __init__(self, table: ProcTable, uplink: Uplink, timers: Timers, deliver: Callable[[Proc, int], None]) -> None:
        self._table = table
        self._uplink = uplink
        self._timers = timers
        self._deliver = deliver

    def reached(self, budget: Budget, which: str) -> None:
        """Note that a budget was reached; its owner's exit status will tell."""
        if budget.reached:
            return
        budget.reached = which
        owner = self._table.get(budget.owner)
        if owner is not None and not owner.budget:
            owner.budget = which
            self._uplink.send(link.Mark(owner.pid, budget=which))
            self.set_reason(owner, budgets.sentence(budget))

    def set_reason(self, proc: Proc, reason: str) -> None:
        if not proc.reason:
            proc.reason = reason
            self._uplink.send(link.Mark(proc.pid, reason=reason))

    def spent(self, budget: Budget) -> None:
        """No token is left. Agents may end by themselves; a call for more puts them on notice."""
        self.reached(budget, "tokens")

    def refused(self, budget: Budget) -> None:
        """More was asked for than is left: those that do not end by themselves now are ended."""
        self.reached(budget, "tokens")
        if budget.stage < Stage.NOTICE:
            budget.stage = Stage.NOTICE
            self._timers.after(GRACE_S, lambda: self.end(budget, Stage.TERM))

    def time_is_up(self, budget: Budget) -> None:
        self.reached(budget, "time")
        self.end(budget, Stage.TERM)

    def memory_exceeded(self, budget: Budget) -> None:
        self.reached(budget, "memory")
        self.end(budget, Stage.KILL)

    def end(self, budget: Budget, stage: Stage) -> None:
        """End all that share the budget: TERM, and KILL after a grace."""
        budget.stage = max(budget.stage, stage)
        number = signal.SIGKILL if stage is Stage.KILL else signal.SIGTERM
        for proc in [proc for pid in list(budget.sharers) if (proc := self._table.get(pid)) is not None]:
            if proc.outside:  # there is nothing to end: each request gets EDQUOT until a person revokes its token
                continue
            self._deliver(proc, number)
            if number == signal.SIGTERM:
                self._deliver(proc, signal.SIGCONT)  # a stopped one must get its TERM, too
        if budget.sharers and stage is not Stage.KILL:
            self._timers.after(GRACE_S, lambda: self.end(budget, Stage.KILL))

    def adopted(self, proc: Proc) -> None:
        """A new kernel has found this agent: what it had used up it has used up."""
        for budget in proc.budgets:
            if budget.tokens_left == 0:
                self.refused(budget)

    def born(self, proc: Proc) -> None:
        """It was being forked while a budget that it shares came to its end."""
        if any(budget.stage >= Stage.TERM for budget in proc.budgets):
            self._deliver(proc, signal.SIGKILL)
