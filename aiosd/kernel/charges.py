"""Calls that a budget counts, before they go to the service that answers them: calls of tools, bytes for the store.

A call is counted at the moment when it is given to its service, in one step with the check, so that several agents that
use one budget at the same time cannot exceed it. The count is never undone: a call that fails, or that a new kernel
gets again, is not free.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from aiosd.kernel import budget as budgets
from aiosd.kernel.budget import Budget, Stage
from aiosd.kernel.peer import Call
from aiosd.kernel.proc import Proc
from aiosd.kernel.service import Service, Services
from libaios import wire
from libaios.wire import Sys

#: Calls that write bytes into the store: the size of their request is counted.
WRITING = frozenset((Sys.MEM_ADD, Sys.MEM_UPDATE, Sys.STO_WRITE, Sys.STO_PIECE))


class Charges:
    """Counts these calls. `refused` is called with the budget that has no room, the kind, and the agent of the call."""

    def __init__(self, services: Services, refused: Callable[[Budget, str, Proc], None]) -> None:
        self._services = services
        self._refused = refused

    def tool(self, call: Call, args: Any) -> Service:
        """Count a call of a tool; returns the toolbox. Raises OSError: EDQUOT, ENOSYS."""
        if call.row.sys == Sys.TOOL_CALL:
            self._take(call, "tool_calls", 1)
        return self._service(call)

    def admit(self, call: Call) -> None:
        """Count a call of a tool that its caller computes itself. Raises OSError: EDQUOT."""
        self._take(call, "tool_calls", 1)

    def store(self, call: Call, args: Any) -> Service:
        """Count a call of the store; returns the store. Raises OSError: EDQUOT, ENOSYS."""
        if call.row.sys in WRITING:
            self._take(call, "disk", call.size)
        return self._service(call)

    def _service(self, call: Call) -> Service:
        service = self._services.of_kind(call.row.by)
        if service is None:
            raise wire.error(errno.ENOSYS, f"{call.row.name}: this system has no {call.row.by}")
        return service

    def _take(self, call: Call, kind: str, amount: int) -> None:
        proc = call.peer.proc
        if proc is None or not proc.budgets:
            return
        check_open(proc)
        short = budgets.take(proc.budgets, kind, amount)
        if short is not None:
            self._refused(short, kind, proc)
            raise wire.error(errno.EDQUOT, budgets.sentence(short, kind))


def check_open(proc: Proc) -> None:
    """Raises OSError (EDQUOT) when a budget has come to its end, and its agents only have time left to end in order."""
    for budget in proc.budgets:
        if budget.stage >= Stage.TERM:
            raise wire.error(errno.EDQUOT, budgets.sentence(budget))
