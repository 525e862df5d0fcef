"""Agents that aiosd.toml lists for the start of the system: the pid of each, or why it did not start.

`aiosd status` shows those that failed, and so does the output of the start. The system is ready when all of them have
started or failed, but it does not wait for an agent whose program lies on a file system that does not reply.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from aiosd.init.restart import exit_in_words
from aiosd.ipc.link import CallKey
from aiosd.kernel.proc import Proc, ProcState, ProcTable
from aiosd.timers import Timer, Timers

if TYPE_CHECKING:
    from aiosd.config.autostart import AgentSpec

OWNER = 0  # in the keys of their spawns, which the system makes itself; no agent and no client has this number
PATIENCE_S = 1.0  # how long "ready" waits for them


def key_of(number: int) -> CallKey:
    """The key of the spawn of the agent at this place of the list (from 1)."""
    return OWNER, number


class Listed:
    def __init__(self, table: ProcTable, timers: Timers) -> None:
        self._table = table
        self._timers = timers
        self._names: dict[int, str] = {}  # by their places in the list
        self._pids: dict[int, int] = {}
        self._refused: dict[int, str] = {}
        self._then: Callable[[], None] | None = None
        self._patience: Timer | None = None

    def expect(self, specs: Sequence[AgentSpec]) -> None:
        self._names = {number: spec.name or spec.target for number, spec in enumerate(specs, 1)}

    def started(self, key: CallKey, pid: int) -> None:
        """Called with every new agent; agents whose key has another owner are ignored."""
        if key[0] == OWNER:
            self._pids[key[1]] = pid
            self._look()

    def refused(self, key: CallKey, why: str) -> None:
        if key[0] == OWNER:
            self._refused[key[1]] = why
            self._look()

    def when_over(self, then: Callable[[], None]) -> None:
        """Call `then` when each agent has started or failed, or has taken too long."""
        self._then = then
        self._patience = self._timers.after(PATIENCE_S, self._over)
        self._look()

    def _look(self) -> None:
        if self._names.keys() <= self._pids.keys() | self._refused.keys():
            self._over()

    def _over(self) -> None:
        then, self._then = self._then, None
        if self._patience is not None:
            self._patience.cancel()
        if then is not None:
            then()

    def problems(self) -> dict[str, str]:
        """Name → what is wrong with the agent now. Without agents that this kernel has no record of: it may be
        newer."""
        found: dict[str, str] = {}
        for number, name in self._names.items():
            proc = self._table.find(self._pids.get(number, -1))
            words = self._refused.get(number, "") if proc is None else _words(proc)
            if words:
                found[f"{name} ({number})" if name in found else name] = words
        return found


def _words(proc: Proc) -> str:
    if proc.state is ProcState.WAITING:
        return f"waits to be started again (agent {proc.pid}, {proc.restarts} restarts)"
    if proc.alive or not proc.status:
        return ""
    return f"has ended with {exit_in_words(proc.status)} (aios-logs {proc.pid})"
