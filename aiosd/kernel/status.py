"""What `aiosd status` shows: the figures of the kernel and of its cores, and a check of the books.

A core answers between two steps, so the reply waits for all cores, but not longer than `WAIT_S`; a core that
was too busy is shown with its last known figures.
"""

from __future__ import annotations

import errno
import itertools
import os
import resource
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aiosd import link, procfs
from aiosd.kernel import books
from aiosd.kernel.budget import SAMPLE_S
from aiosd.kernel.peer import Call
from aiosd.kernel.proc import describe
from libaios import wire

if TYPE_CHECKING:
    from aiosd.kernel.cores import Core
    from aiosd.kernel.loop import Kernel

WAIT_S = 1.0
SETTLE_S = 0.3  # between two looks at books that do not balance
FDS_PER_AGENT = 3  # in the kernel: its memfd, the mapping of that, its doorbell
FDS_SPARE = 64  # for itself, and
FDS_CLIENTS = 32  # of these for clients


@dataclass(slots=True)
class _Request:
    call: Call
    check: bool
    missing: int


class StatusRequests:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self._open: dict[int, _Request] = {}
        self._numbers = itertools.count(1)
        self._pss: dict[int, int] = {}  # by Linux pid, read since `_sampled`
        self._sampled = 0.0

    def ask(self, call: Call, check: bool) -> None:
        number = next(self._numbers)
        asked = [core for core in self.kernel.cores if core.state == "ready"]
        self._open[number] = _Request(call, check, len(asked))
        for core in asked:
            core.send(link.GetStats(number))
        self.kernel.timers.after(WAIT_S if asked else 0.0, lambda: self._answer(number))

    def part(self, number: int) -> None:
        """One core has answered."""
        request = self._open.get(number)
        if request is not None:
            request.missing -= 1
            if request.missing == 0:
                self._answer(number)

    def _answer(self, number: int) -> None:
        request = self._open.pop(number, None)
        if request is None:
            return
        wrong = books.check(self.kernel) if request.check else None
        if not wrong:
            self.kernel.finish(request.call, self.describe(wrong))
            return

        def look_again() -> None:
            """What was only on its way has arrived by now."""
            still = set(books.check(self.kernel))
            self.kernel.finish(request.call, self.describe([line for line in wrong if line in still]))

        self.kernel.timers.after(SETTLE_S, look_again)

    def describe(self, wrong: list[str] | None) -> dict[str, Any]:
        kernel, born = self.kernel, self.kernel.born
        from aiosd import __version__

        status: dict[str, Any] = {
            "version": __version__,
            "boot": kernel.boot,
            "state": "stopping" if kernel.stopping else "ready" if kernel.ready else "loading",
            "pid": born.guardian,
            "uptime_s": round(time.monotonic() - born.since, 1),
            "home": str(kernel.settings.home.root),
            "logs": str(kernel.settings.home.logs),
            "policy": kernel.settings.policy,
            "quantum": dict(zip(("tokens", "seconds"), kernel.settings.quantum, strict=True)),
            "group_shares": dict(kernel.settings.shares),
            "agents": dict(Counter(describe(proc).stat for proc in kernel.table)),
            "dead_remembered": len(kernel.table.history),
            "max_agents": max_agents(),
            "memory_limits_by": f"sampling PSS every {SAMPLE_S} s",
            "kernel": {
                "epoch": born.epoch,
                **kernel.counters,
                "clients_now": len(kernel.control.clients),
                "open_calls": sum(len(peer.calls) for peer in books.peers(kernel)),
            },
            "models": [self._model(core) for core in kernel.cores],
        }
        if wrong is not None:
            status["check"] = wrong
        return status

    def _model(self, core: Core) -> dict[str, Any]:
        info = core.info
        return {
            "name": core.name,
            "path": core.path,
            "default": core.default,
            "state": core.state,
            "pid": core.pid,
            "ospid": core.ospid,
            "deaths": core.deaths,
            "last_death": core.last_death,
            "open_calls": len(core.calls),
            "info": {} if info is None else {field: getattr(info, field) for field in info.__struct_fields__},
            "stats": core.stats,
        }

    def pss_bytes(self, ospid: int) -> int:
        """Of one of aiosd's own processes; not read anew within half a second, since it takes milliseconds."""
        now = self.kernel.timers.clock()
        if now - self._sampled > SAMPLE_S:
            self._sampled, self._pss = now, {}
        if ospid not in self._pss:
            self._pss[ospid] = procfs.pss_bytes(ospid)
        return self._pss[ospid]

    def no_agent(self, pid: int) -> OSError:
        """What a caller hears who took this pid for that of an agent."""
        if pid in {pid for pid, _ in self.system_processes().values()}:
            return wire.error(errno.EPERM, f"{pid}: is part of aiosd itself, which ends by: aiosd stop")
        return wire.error(errno.ESRCH, f"{pid}: no such agent")

    def system_processes(self) -> dict[str, tuple[int, int]]:
        """name → (pid, Linux pid) of aiosd's own processes."""
        kernel = self.kernel
        pids = kernel.born.pids
        found = {"supervisor": (pids["supervisor"], os.getppid()), "kernel": (pids["kernel"], os.getpid())}
        cores = list(kernel.cores)
        for core in cores:
            found["llm" if len(cores) == 1 else f"llm:{core.name}"] = (core.pid, core.ospid)
        return found


def max_agents() -> int:
    """How many agents the limit on open files allows."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(0, (soft - FDS_SPARE) // FDS_PER_AGENT)


def descriptors_left(kernel: Kernel) -> int:
    """How many more the kernel may open before it eats into what it needs itself."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    agents = len(kernel.agents.by_ospid) + len(kernel.agents.forks)
    return soft - FDS_SPARE - FDS_PER_AGENT * agents - max(0, kernel.control.descriptors() - FDS_CLIENTS)
