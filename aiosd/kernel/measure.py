"""Samples of live agents: the usage that budgets limit, memory, and the size of logs.

A few agents are sampled at a time (`jobs`), because each takes long. Agents with a sampled budget are sampled every
`SAMPLE_S`, or less often, so that sampling takes at most a quarter of the time; if a budget of CPU time is nearly used
up, as soon as all processors together could have used the rest. Memory is first taken from /proc/PID/stat, where shared
memory counts in full, and only if that is too much from smaps_rollup, which takes fifty times as long. The use of calls
of tools is sampled in the toolbox, which reports it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from aiosd import procfs
from aiosd.budgets import limits as kinds
from aiosd.budgets.cputime import CpuMeter, ProcessSample
from aiosd.budgets.limits import DISK_S, SAMPLE_S
from aiosd.ipc import link
from aiosd.kernel import budget as budgets
from aiosd.kernel import ledger
from aiosd.kernel.budget import Budget, Budgets
from aiosd.kernel.diskwatch import DiskWatch
from aiosd.kernel.forks import Forks
from aiosd.kernel.jobs import Jobs
from aiosd.kernel.logkeeper import LogKeeper
from aiosd.kernel.proc import Proc, ProcTable
from aiosd.procfs import Stat
from aiosd.timers import Timer, Timers
from libaios.wire import Limits

LOG_SAMPLE_S = 1.0
MEMORY_SAMPLE_S = 0.5  # for agents without a budget, whose memory is only shown
SAMPLE_FEW = 16  # of them that are measured in one sample
LOOKED_AT = 128  # … and that are considered for that
SHOWN_PART = 100  # at most a hundredth of the time goes into that
OLD_S = 2.0  # what is older than this is measured again
SHORTEST_S = 0.01  # Linux counts CPU time in steps of that
CALM_S = 1.0  # between two checks whether there is something to sample, while there is nothing
PART = 4  # sampling takes at most 1/PART of the time
DISK_LATE_S = 10.0  # a folder that takes longer than this counts as not measurable

UNMEASURED = "{} budget: it cannot be measured ({})"


@dataclass(slots=True)
class _Taken:
    """One sample of the agents that share a budget."""

    memory: int = 0
    processes: int = 0
    unreadable: str = ""
    memfds: dict[tuple[int, int], int] = field(default_factory=dict)
    trees: list[Mapping[int, Stat]] = field(default_factory=list)

    @property
    def ospids(self) -> list[int]:
        return [ospid for tree in self.trees for ospid, stat in tree.items() if stat.state != "Z"]


class Measure:
    """All samples. `exceeded` is called with a budget, the kind that is exceeded, and a sentence if the reason is that
    it could not be measured. `folder`: of the workspaces."""

    def __init__(
        self,
        table: ProcTable,
        budgets: Budgets,
        timers: Timers,
        jobs: Jobs,
        exceeded: Callable[[Budget, str, str], None],
        forks: Forks,
        logs: LogKeeper,
        folder: str,
    ) -> None:
        self._table = table
        self._budgets = budgets
        self._timers = timers
        self._jobs = jobs
        self._exceeded = exceeded
        self._forks = forks
        self._logs = logs
        self._folder = folder
        self._cores = len(os.sched_getaffinity(0))
        self._meters: dict[int, CpuMeter] = {}  # by Linux pid
        self._disk = DiskWatch()
        self._disk_asked = 0.0
        self._calm: Timer | None = None  # the next check, while there is nothing to sample
        self._in_turn: Iterator[Proc] = iter(())  # all agents, one after another

    def start(self) -> None:
        self._jobs.start(self._sample_logs())
        self._jobs.start(self._sample_memory())
        self._jobs.start(self._sample_limited())

    def _again(self, after_s: float, job: Callable[[], Iterator[None]]) -> Timer:
        """Start the job again this long after its end, so that jobs do not pile up on a slow machine."""
        return self._timers.after(after_s, lambda: self._jobs.start(job()))

    def begun(self, proc: Proc) -> None:
        """Called with a new agent, which may be the first that has to be sampled."""
        if self._calm is not None and self._is_sampled(proc):
            self._calm.cancel()
            self._calm = None
            self._again(SAMPLE_S, self._sample_limited)

    def _is_sampled(self, proc: Proc) -> bool:
        return any(_sampled(budget.limits) for budget in proc.budgets) or self._forks.watches(proc)

    # ── budgets ───────────────────────────────────────────────────────────────────────────────────────────

    def _sample_limited(self) -> Iterator[None]:
        """Sample all agents that share a sampled budget, and compare the budgets with the samples."""
        began, self._calm = time.monotonic(), None
        limited = [budget for budget in self._budgets if budget.sharers and _sampled(budget.limits)]
        taken: dict[Budget, _Taken] = {budget: _Taken() for budget in limited}
        for pid in sorted({pid for budget in limited for pid in budget.sharers}):
            proc = self._table.get(pid)
            if proc is not None and proc.ospid and proc.alive:
                self._look(proc, taken)
                yield
        for budget, sample in taken.items():
            yield from self._judge(budget, sample)
        self._look_at_disks(taken)
        yield from self._forks.look()
        if not any(map(self._is_sampled, self._table.live())):
            self._calm = self._again(CALM_S, self._sample_limited)
            return
        waits = [self._wait(budget) for budget in limited]
        self._again(max(min(waits, default=SAMPLE_S), (PART - 1) * (time.monotonic() - began)), self._sample_limited)

    def _look(self, proc: Proc, taken: Mapping[Budget, _Taken]) -> None:
        tree = procfs.tree(proc.ospid)
        self._count_cpu(proc, tree)
        for budget in proc.budgets:
            sample = taken.get(budget)
            if sample is not None:
                sample.trees.append(tree)
                sample.processes += len(tree)
                sample.memory += sum(stat.rss_bytes for stat in tree.values())

    def _count_cpu(self, proc: Proc, tree: Mapping[int, Stat]) -> None:
        if not any(budget.limits.cpu_s is not None for budget in proc.budgets):
            return
        meter = self._meters.get(proc.ospid)
        if meter is None:
            meter = self._meters[proc.ospid] = CpuMeter(proc.row[ledger.OWN_CPU_US] / 1e6)
        used = [ProcessSample((ospid, stat.started), stat.cpu_s, stat.waited_s) for ospid, stat in tree.items()]
        self._charge_cpu(proc, meter.update(used))

    @staticmethod
    def _charge_cpu(proc: Proc, seconds: float) -> None:
        amount = round(seconds * 1e6)
        proc.row[ledger.OWN_CPU_US] += amount
        for budget in proc.budgets:
            budget.row[ledger.CPU_US] += amount

    def ended(self, proc: Proc, cpu_s: float) -> None:
        """A process has ended with this processor time: count the part that was not sampled."""
        meter = self._meters.pop(proc.ospid, None) or CpuMeter(proc.row[ledger.OWN_CPU_US] / 1e6)
        if proc.budgets:
            self._charge_cpu(proc, meter.end(cpu_s))
        proc.row[ledger.OWN_CPU_US] = 0  # when it is started again it begins at 0

    def tools_used(self, use: link.ToolUse) -> None:
        """Count what calls of tools have used for an agent. It may have died in the meantime; then the budgets that it
        shared with others are charged."""
        proc = self._table.find(use.pid)
        if proc is None:
            return
        proc.tools_bytes = use.memory_bytes
        self._charge_used(proc, use.cpu_us)

    def proxy_used(self, use: link.ProxyUse) -> None:
        """Count what connections to its hosts have used."""
        proc = self._table.find(use.pid)
        if proc is not None:
            self._charge_used(proc, use.cpu_us)

    def _charge_used(self, proc: Proc, cpu_us: int) -> None:
        proc.row[ledger.TOOLS_CPU_US] += cpu_us
        for budget in filter(self._budgets.lasts, proc.budgets):
            budget.row[ledger.CPU_US] += cpu_us
            self._judge_kind(budget, "cpu")

    def tools_ended(self) -> None:
        """The toolbox has died, and all calls that ran in it."""
        for proc in self._table:
            proc.tools_bytes = 0

    def _tools_bytes(self, budget: Budget) -> int:
        return sum(proc.tools_bytes for pid in budget.sharers if (proc := self._table.get(pid)) is not None)

    def _judge(self, budget: Budget, sample: _Taken) -> Iterator[None]:
        if budget.limits.memory_bytes is not None:
            yield from self._take_memory(budget, sample)
        budget.levels["processes"] = sample.processes
        budget.sampled = time.monotonic()
        if sample.unreadable:
            why = UNMEASURED.format("memory", f"process {sample.unreadable} cannot be read")
            self._exceeded(budget, "memory", why)
        for kind in ("cpu", "memory", "processes"):
            self._judge_kind(budget, kind)

    def _judge_kind(self, budget: Budget, kind: str) -> None:
        left = budget.left(kind)
        budgets.check_near(budget, kind)
        if left is not None and (left < 0 or (kind == "cpu" and left == 0)):
            self._exceeded(budget, kind, "")

    def _take_memory(self, budget: Budget, sample: _Taken) -> Iterator[None]:
        """Sample memory: resident memory if that is within the budget, else the proportional one; plus the content of
        memfds and the memory of calls of tools."""
        tools = self._tools_bytes(budget)
        limit = (budget.limits.memory_bytes or 0) - tools
        for ospid in sample.ospids:
            held = procfs.memfds(ospid)
            if held is None:
                sample.unreadable = sample.unreadable or str(ospid)
            sample.memfds |= held or {}
            yield
        if sample.memory + sum(sample.memfds.values()) > limit:
            sample.memory = 0
            for ospid in sample.ospids:
                size = procfs.measured_pss_bytes(ospid)
                if size is None:
                    sample.unreadable = sample.unreadable or str(ospid)
                sample.memory += size or 0
                yield
        budget.levels["memory"] = tools + sample.memory + sum(sample.memfds.values())

    def _wait(self, budget: Budget) -> float:
        """Seconds until the budget must be sampled again."""
        left = budget.left("cpu")
        return SAMPLE_S if left is None else min(SAMPLE_S, max(SHORTEST_S, left / self._cores))

    # ── files ─────────────────────────────────────────────────────────────────────────────────────────────

    def _look_at_disks(self, taken: Mapping[Budget, _Taken]) -> None:
        """Take the sizes that the thread has measured, and have it measure again."""
        now, disk = time.monotonic(), self._disk
        watched = {budget: self._folders(budget) for budget in taken if budget.limits.disk_bytes is not None}
        if not watched:
            disk.forget()  # the next agent in a workspace is not charged for the files of the last one
            return
        for budget, folders in watched.items():
            self._judge_disk(budget, [disk.sizes[folder] for folder in folders if folder in disk.sizes])
            if disk.busy and now - self._disk_asked > DISK_LATE_S:
                self._exceeded(
                    budget, "disk", UNMEASURED.format("disk", "looking through its workspace takes too long")
                )
        due = not disk.busy and now - self._disk_asked >= max(DISK_S, PART * disk.took_s)
        if due:
            self._disk_asked = now
        if due or disk.waits:
            disk.ask({folder: taken[budget].ospids for budget, folders in watched.items() for folder in folders})

    def _judge_disk(self, budget: Budget, sizes: Sequence[int | None]) -> None:
        if None in sizes:
            self._exceeded(budget, "disk", UNMEASURED.format("disk", "its workspace cannot be looked through"))
            return
        budget.levels["disk"] = sum(size or 0 for size in sizes)
        budgets.check_near(budget, "disk")
        left = budget.left("disk")
        if left is not None and left < 0:
            self._exceeded(budget, "disk", "")

    def _folders(self, budget: Budget) -> set[str]:
        """The folders in which its agents write. Those of a group are all in one folder, also those of dead agents."""
        if budget.group:
            return {os.path.join(self._folder, budget.group)}
        procs = [proc for pid in budget.sharers if (proc := self._table.get(pid)) is not None]
        return {proc.box.workspace for proc in procs if proc.box is not None}

    # ── all agents ────────────────────────────────────────────────────────────────────────────────────────

    def _sample_memory(self) -> Iterator[None]:
        """PSS of agents, a few of them in turn."""
        took_s = 0.0
        for proc in self._next_old(time.monotonic() - OLD_S):
            began = time.thread_time()
            for _ in self._sample(proc):
                took_s += time.thread_time() - began
                yield
                began = time.thread_time()
        self._again(max(MEMORY_SAMPLE_S, SHOWN_PART * took_s), self._sample_memory)

    def _next_old(self, until: float) -> list[Proc]:
        """The next few agents in turn that were last sampled before `until`. It considers few, as there may be
        thousands."""
        found: list[Proc] = []
        begun = False
        for _ in range(LOOKED_AT):
            proc = next(self._in_turn, None)
            if proc is None:
                if found or begun:
                    break
                self._in_turn, begun = iter(self._table), True
            elif proc.alive and proc.sampled < until:
                found.append(proc)
                if len(found) == SAMPLE_FEW:
                    break
        return found

    @staticmethod
    def _sample(proc: Proc) -> Iterator[None]:
        """Sample an agent, one process after another, because it may have thousands."""
        if not proc.alive:
            return
        memory, began = 0, proc.ospid
        pids = [began]
        for ospid in pids:  # grows during the loop
            memory += procfs.pss_bytes(ospid)
            pids.extend(procfs.children(ospid))
            yield
        if proc.ospid == began:
            proc.mem_bytes = memory
        proc.sampled = time.monotonic()

    def sample_new(self, procs: Sequence[Proc]) -> Iterator[None]:
        """Sample some agents that are too new to have been sampled, so that a listing shows no zeros."""
        for proc in [proc for proc in procs if proc.alive and not proc.sampled][:SAMPLE_FEW]:
            yield from self._sample(proc)

    def _sample_logs(self) -> Iterator[None]:
        for proc in self._table:
            if proc.log and proc.alive:
                self._logs.sample(proc.log)
                yield
        self._again(LOG_SAMPLE_S, self._sample_logs)


def _sampled(limits: Limits) -> bool:
    return any(kind.of(limits) is not None for kind in kinds.SAMPLED)
