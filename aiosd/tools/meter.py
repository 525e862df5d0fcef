"""The usage of calls: processor time and memory of workers and of all processes that they have started.

A tool may manipulate its worker, so a worker's own figures are not trusted: they are read from Linux (/proc while it
lives, `wait4` at its end). As a worker runs one call at a time, the usage between the beginning and the end of a call
belongs to that call. Only the growth of its memory counts, since a call need not pay for the interpreter and the source
that the worker has loaded before. The usage of a worker that is being ended counts for its last call until all its
processes are gone; a worker that was started for one agent alone charges that agent for its start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from aiosd import procfs
from aiosd.budgets.cputime import CpuMeter, ProcessSample
from aiosd.procfs import Stat

#: Agent, microseconds of processor time since the last call, bytes that its calls hold now.
Charge = Callable[[int, int, int], None]


class WorkerMeter:
    """The meter of one worker. `payer`: the agent for which it works, has worked last, or was started; 0: none."""

    def __init__(self, payer: int = 0) -> None:
        self.payer = payer
        self._started_for = payer  # until its first call begins
        self.memory = 0  # bytes, in the last sample
        self.due = 0.0  # seconds of processor time that are not charged yet
        self._cpu = CpuMeter()
        self._base: dict[int, int] = {}  # bytes that its processes had before the call, by Linux pid
        self._known: set[int] = set()  # processes that were seen
        self._reaped_s = 0.0

    def begin(self, payer: int, tree: Mapping[int, Stat]) -> None:
        """Note the beginning of a call."""
        if not payer or self._started_for != payer:
            self._cpu, self.due, self._reaped_s = CpuMeter(), 0.0, 0.0
            self._cpu.update(_used(tree))
        self.payer, self.memory, self._started_for = payer, 0, 0
        self._known = set(tree)
        self._base = {ospid: stat.rss_bytes for ospid, stat in tree.items()}

    def look(self, tree: Mapping[int, Stat]) -> None:
        self.due += self._cpu.update(_used(tree))
        self._known |= tree.keys()

    def weigh(self, tree: Mapping[int, Stat]) -> int:
        """Memory of its processes: shared memory in proportion; of processes that existed before the call only their
        growth. What cannot be read counts in full."""
        memory = 0
        memfds: dict[tuple[int, int], int] = {}
        for ospid, stat in tree.items():
            memfds |= procfs.memfds(ospid) or {}
            base = self._base.get(ospid)
            pss = procfs.measured_pss_bytes(ospid) if base is None else max(0, stat.rss_bytes - base)
            memory += stat.rss_bytes if pss is None else pss
        self.memory = memory + sum(memfds.values())
        return self.memory

    def reaped(self, seconds: float) -> None:
        """One of its processes has ended. `seconds`: of its whole life, with the children that it had waited for."""
        self._reaped_s += seconds
        self.due += self._cpu.end(self._reaped_s)

    def knows(self, ospid: int) -> bool:
        return ospid in self._known


class Bills:
    """Charges agents for usage, when there is something to charge."""

    def __init__(self, charge: Charge) -> None:
        self._charge = charge
        self._held: dict[int, int] = {}  # bytes that are held, by agent
        self._small: dict[int, float] = {}  # seconds that are too few to be charged, by agent

    def settle(self, meters: Sequence[WorkerMeter], payer: int) -> None:
        """Charge one agent for all usage of its workers that was not charged yet."""
        if not payer:
            return
        memory, due = 0, 0.0
        for meter in meters:
            if meter.payer == payer:
                memory += meter.memory
                due, meter.due = due + meter.due, 0.0
        self._send(payer, due, memory)

    def add(self, payer: int, seconds: float, least: float) -> None:
        """Count seconds of the toolbox itself; charged when their sum reaches `least`."""
        seconds += self._small.pop(payer, 0.0)
        if seconds < least:
            self._small[payer] = seconds
        else:
            self._send(payer, seconds, self._held.get(payer, 0))

    def forget(self, payer: int) -> None:
        """The agent has ended: charge what its workers still use."""
        self._small.pop(payer, None)

    def again(self) -> None:
        """There is a new kernel, which has a record of the time, but not of held memory."""
        for payer, memory in self._held.items():
            self._charge(payer, 0, memory)

    def _send(self, payer: int, seconds: float, memory: int) -> None:
        microseconds = round(seconds * 1e6)
        if microseconds or memory != self._held.get(payer, 0):
            self._charge(payer, microseconds, memory)
        if memory:
            self._held[payer] = memory
        else:
            self._held.pop(payer, None)


def _used(tree: Mapping[int, Stat]) -> list[ProcessSample]:
    return [ProcessSample((ospid, stat.started), stat.cpu_s, stat.waited_s) for ospid, stat in tree.items()]
