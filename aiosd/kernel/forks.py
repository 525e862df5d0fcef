"""Ends fork bombs where Linux has no limit: in level flat it counts processes by user, and those of root not at all.

To count each agent's processes ten times a second would cost more than all else that an idle agent does. But Linux
reports cheaply how many threads the whole machine has. So the agents are counted only when the number of other threads
has grown by `MORE`. An agent that has more processes than `limits.most_processes`, and no budget that limits their
number, is ended. So a bomb can grow for the time between two checks (`limits.SAMPLE_S`, or four times as long as all
samples take). A cgroup for each agent would stop it at once, but entering one takes every agent 0.4 ms and more, during
which no other process of the machine can fork.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from aiosd import procfs
from aiosd.budgets.limits import most_processes
from aiosd.kernel.proc import Proc, ProcTable

MORE = 128


class Forks:
    """The check. `ended` is called with an agent that has too many processes, and a sentence."""

    def __init__(self, table: ProcTable, ended: Callable[[Proc, str], None]) -> None:
        self._table = table
        self._ended = ended
        self._most = most_processes()
        self._root = os.getuid() == 0
        self._calm = 0  # threads of the machine, without agents', at the last check without a bomb

    def look(self) -> Iterator[None]:
        """A job: check once."""
        others = procfs.threads_of_machine() - len(self._table.procs)
        if others <= self._calm + MORE:
            self._calm = min(self._calm, others)
            return
        self._calm = others
        for proc in self._table.live():
            if proc.ospid and self.watches(proc):
                if procfs.threads_below(proc.ospid, self._most) > self._most:
                    self._ended(proc, f"more than {self._most} processes and threads (--processes N allows more)")
                yield

    def watches(self, proc: Proc) -> bool:
        """Whether nothing else limits the number of its processes."""
        if proc.box is None or (proc.box.level == "cage" and not self._root):
            return False
        return all(budget.limits.processes is None for budget in proc.budgets)
