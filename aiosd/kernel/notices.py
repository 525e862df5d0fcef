"""Messages to agents whose budget is nearly used up: once for each kind, from pid 1."""

from __future__ import annotations

import logging
import time

from aiosd.budgets import limits
from aiosd.kernel.budget import Budget
from aiosd.kernel.mail import Mail
from aiosd.kernel.proc import Proc, ProcTable
from libaios import wire

logger = logging.getLogger("kernel.budgets")


class Notices:
    def __init__(self, table: ProcTable, mail: Mail) -> None:
        self._table = table
        self._mail = mail

    def near(self, budget: Budget, which: str) -> None:
        """Notify the owner of a budget; if that is dead, or a group, notify all that share it."""
        kind = limits.BY_NAME[which]
        message = {
            "budget": which,
            "used": kind.shown(budget.used(which, time.monotonic())),
            "limit": kind.shown(kind.of(budget.limits) or 0),
            "group": budget.group,
        }
        for proc in self._receivers(budget):
            try:
                self._mail.post(proc, wire.raw(message))
            except OSError as err:
                logger.warning("agent %d gets no notice of its %s budget: %s", proc.pid, which, err.strerror)

    def _receivers(self, budget: Budget) -> list[Proc]:
        owner = self._table.get(budget.owner)
        if owner is not None and owner.alive:
            return [owner]
        return [proc for pid in sorted(budget.sharers) if (proc := self._table.get(pid)) is not None and proc.alive]
