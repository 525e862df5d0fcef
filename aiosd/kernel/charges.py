"""Calls that a budget counts, before they go to the service that answers them: calls of tools, bytes for the store.

A call is counted when it is given to its service, in one step with the check, so that agents which race with one budget
cannot go beyond it. What is counted stays counted: a call that fails, or that a new kernel gets once more, is never
free.
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

#: Calls that put bytes into the store: the size of their request counts.
WRITING = frozenset((Sys.MEM_ADD, Sys.MEM_UPDATE, Sys.STO_WRITE, Sys.STO_PIECE))


class Charges:
    """`refused` is called with the budget that has no room, its kind, and the agent that asked."""

    def __init__(self, services: Services, refused: Callable[[Budget, str, Proc], None]) -> None:
        self._services = services
        self._refused = refused

    def tool(self, call: Call, args: Any) -> Service:
        """The toolbox. Raises OSError: EDQUOT, ENOSYS."""
        if call.row.sys == Sys.TOOL_CALL:
            self._take(call, "tool_calls", 1)
        return self._service(call)

    def store(self, call: Call, args: Any) -> Service:
        """The store. Raises OSError: EDQUOT, ENOSYS."""
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
    """Raises OSError (EDQUOT) when a budget has come to its end, and its agents have time to end in order only."""
    for budget in proc.budgets:
        if budget.stage >= Stage.TERM:
            raise wire.error(errno.EDQUOT, budgets.sentence(budget))
