"""What is sampled of live agents: memory, and how their logs grow. A few agents at a time (`jobs`): each takes long."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from aiosd import procfs
from aiosd.kernel.budget import SAMPLE_S, Budget
from aiosd.kernel.jobs import Jobs
from aiosd.kernel.logkeeper import LogKeeper
from aiosd.kernel.proc import Proc, ProcTable
from aiosd.timers import Timers

LOG_SAMPLE_S = 1.0
SAMPLE_FEW = 16  # agents without a memory budget that are measured in one sample


class Measure:
    """`exceeded` is called with a memory budget that was found exceeded."""

    def __init__(
        self, table: ProcTable, timers: Timers, jobs: Jobs, exceeded: Callable[[Budget], None], logs: LogKeeper
    ) -> None:
        self._table = table
        self._timers = timers
        self._jobs = jobs
        self._exceeded = exceeded
        self._logs = logs

    def start(self) -> None:
        self._jobs.start(self._sample_logs())
        self._jobs.start(self._sample_memory())

    def _again(self, after_s: float, job: Callable[[], Iterator[None]]) -> None:
        """When it is over: so that it does not pile up on a machine that is too slow for it."""
        self._timers.after(after_s, lambda: self._jobs.start(job()))

    def _sample_memory(self) -> Iterator[None]:
        """PSS of agents: of all with a memory budget each time, of a few others in turn."""
        limited = [proc for proc in self._table.live() if _limited(proc)]
        for proc in limited:
            self._sample(proc)
            yield
        used: dict[Budget, int] = {}
        for proc in limited:
            if proc.alive:
                for budget in proc.budgets:
                    used[budget] = used.get(budget, 0) + proc.mem_bytes
        for budget, size in used.items():
            if budget.limits.memory_bytes is not None and size > budget.limits.memory_bytes:
                self._exceeded(budget)
        others = [proc for proc in self._table.live() if not _limited(proc)]
        for proc in sorted(others, key=lambda proc: proc.sampled)[:SAMPLE_FEW]:
            yield
            self._sample(proc)
        self._again(SAMPLE_S, self._sample_memory)

    def _sample(self, proc: Proc) -> None:
        if proc.alive:
            proc.mem_bytes = procfs.tree_pss_bytes(proc.ospid)
            proc.sampled = time.monotonic()

    def sample_new(self, procs: Sequence[Proc]) -> Iterator[None]:
        """Agents too young to have been sampled, a few of them, so that a listing shows no zeros."""
        for proc in [proc for proc in procs if proc.alive and not proc.sampled][:SAMPLE_FEW]:
            self._sample(proc)
            yield

    def _sample_logs(self) -> Iterator[None]:
        for proc in self._table.live():
            if proc.log and proc.alive:
                self._logs.sample(proc.log)
                yield
        self._again(LOG_SAMPLE_S, self._sample_logs)


def _limited(proc: Proc) -> bool:
    return any(budget.limits.memory_bytes is not None for budget in proc.budgets)
