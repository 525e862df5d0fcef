"""What happens when a budget is reached (`budget` defines budgets).

    refused kinds       EDQUOT for a call that needs more. An agent that is still there `GRACE_S` later gets TERM, and
                        KILL `GRACE_S` after that
    time                TERM, and KILL `GRACE_S` later; meanwhile no call that a budget counts begins
    sampled kinds       KILL at once, because the use cannot be refused. The same if it cannot be measured

This ends all agents that share the budget. If the budget is a group's, or of an agent without a process, a call that
needs more ends only the agent that made it. An agent without a process is never ended: each of its requests that needs
more is refused.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable

from aiosd.ipc import link
from aiosd.kernel import budget as budgets
from aiosd.kernel.budget import GRACE_S, Budget, Stage
from aiosd.kernel.proc import Proc, ProcTable
from aiosd.kernel.uplink import Uplink
from aiosd.timers import Timers

logger = logging.getLogger("kernel.budgets")

#: Signals by which Linux ends a process that exceeds a limit of its own, and the budget from which the limit is made.
BOUNDS = {-signal.SIGXCPU: "cpu", -signal.SIGXFSZ: "disk"}


class Enforcer:
    """Ends agents over their budgets. `deliver` sends a signal to an agent."""

    def __init__(self, table: ProcTable, uplink: Uplink, timers: Timers, deliver: Callable[[Proc, int], None]) -> None:
        self._table = table
        self._uplink = uplink
        self._timers = timers
        self._deliver = deliver

    # ── what is noted ─────────────────────────────────────────────────────────────────────────────────────

    def reached(self, budget: Budget, which: str, why: str = "") -> None:
        """Note that a budget was reached, for the owner's exit status. `why`: another reason than that, as a
        sentence."""
        if budget.reached:
            return
        budget.reached = which
        why = why or budgets.sentence(budget)
        logger.warning("%s", why if budget.group else f"agent {budget.owner}: {why}")
        owner = self._table.get(budget.owner)
        if owner is not None and owner.alive:
            self._mark(owner, which, why)

    def _mark(self, proc: Proc, which: str, why: str) -> None:
        if not proc.budget:
            proc.budget = which
            self._uplink.send(link.Mark(proc.pid, budget=which))
            self.set_reason(proc, why)

    def set_reason(self, proc: Proc, reason: str) -> None:
        if not proc.reason:
            proc.reason = reason
            self._uplink.send(link.Mark(proc.pid, reason=reason))

    # ── what is done ──────────────────────────────────────────────────────────────────────────────────────

    def spent(self, budget: Budget, which: str) -> None:
        """No tokens or no money are left. Agents may end by themselves; a call that needs more starts their grace
        period."""
        self.reached(budget, which)

    def refused(self, budget: Budget, which: str, proc: Proc) -> None:
        """This agent made a call that needs more than is left: agents that do not end by themselves now are ended."""
        self.reached(budget, which)
        owner = self._table.get(budget.owner)
        if budget.group or (owner is not None and owner.outside):
            self._give_notice(budget, which, proc)
        elif budget.stage < Stage.NOTICE:
            budget.stage = Stage.NOTICE
            self._timers.after(GRACE_S, lambda: self.end(budget, Stage.TERM))

    def _give_notice(self, budget: Budget, which: str, proc: Proc) -> None:
        if not proc.budget and not proc.outside:
            self._mark(proc, which, budgets.sentence(budget, which))
            self._timers.after(GRACE_S, lambda: self._end_one(proc, signal.SIGTERM))

    def _end_one(self, proc: Proc, number: int) -> None:
        if not proc.alive:
            return
        self._signal(proc, number)
        if number == signal.SIGTERM:
            self._timers.after(GRACE_S, lambda: self._end_one(proc, signal.SIGKILL))

    def time_is_up(self, budget: Budget) -> None:
        self.reached(budget, "time")
        self.end(budget, Stage.TERM)

    def exceeded(self, budget: Budget, which: str, why: str = "") -> None:
        """A sample shows that a budget is exceeded. `why`: a sentence if it could not be measured."""
        if budget.stage < Stage.KILL:
            self.reached(budget, which, why)
            self.end(budget, Stage.KILL, why)

    def crowded(self, proc: Proc, why: str) -> None:
        """The agent has more processes than one without a budget of them may have."""
        if proc.alive and not proc.budget:
            logger.warning("agent %d: %s", proc.pid, why)
            self._mark(proc, "processes", why)
            self._deliver(proc, signal.SIGKILL)

    def end(self, budget: Budget, stage: Stage, why: str = "") -> None:
        """End all that share the budget: TERM, and KILL after a grace."""
        budget.stage = max(budget.stage, stage)
        number = signal.SIGKILL if stage is Stage.KILL else signal.SIGTERM
        for proc in [proc for pid in list(budget.sharers) if (proc := self._table.get(pid)) is not None]:
            if proc.outside:  # there is no process to end: each request gets EDQUOT until a person revokes its token
                continue
            self._mark(proc, budget.reached, why or budgets.sentence(budget))
            self._signal(proc, number)
        if budget.sharers and stage is not Stage.KILL:
            self._timers.after(GRACE_S, lambda: self.end(budget, Stage.KILL))

    def _signal(self, proc: Proc, number: int) -> None:
        self._deliver(proc, number)
        if number == signal.SIGTERM:
            self._deliver(proc, signal.SIGCONT)  # a stopped one must get its TERM, too

    # ── births and deaths ─────────────────────────────────────────────────────────────────────────────────

    def adopted(self, proc: Proc) -> None:
        """A new kernel has adopted this agent: used-up budgets stay used up, and a grace period goes on."""
        for budget in proc.budgets:
            if budget.tokens_left == 0 and not budget.group:
                self.refused(budget, "tokens", proc)
        if proc.budget and not proc.outside:
            self._timers.after(GRACE_S, lambda: self._end_one(proc, signal.SIGTERM))

    def born(self, proc: Proc) -> None:
        """A new agent may have been forked while a budget that it shares was used up."""
        for budget in proc.budgets:
            if budget.stage >= Stage.TERM:
                self._mark(proc, budget.reached, budgets.sentence(budget))
                self._deliver(proc, signal.SIGKILL)
                return

    def ended(self, proc: Proc, status: int) -> None:
        """An agent has ended: note the budget if Linux ended it for a limit made from one."""
        which = BOUNDS.get(status, "")
        for budget in proc.budgets:
            if which and budgets.sentence(budget, which):
                self.reached(budget, which)
                self._mark(proc, which, budgets.sentence(budget, which))
