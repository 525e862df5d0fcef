"""aiosd's own processes, as lines of aios-ps and figures of `aiosd status`; and the number of descriptors that the
kernel has open."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from aiosd import procfs
from aiosd.kernel.service import Services
from aiosd.procfs import Stat
from libaios import wire

if TYPE_CHECKING:
    from aiosd.init.records import Inheritance

SAMPLE_S = 0.5  # between two samples of the memory of aiosd's own processes
FDS_PER_AGENT = 3  # in the kernel: its memfd, the mapping of that, its doorbell
FDS_SPARE = 64  # for itself, and
FDS_CLIENTS = 32  # of these for clients


class ListedProcess(NamedTuple):
    """One of aiosd's own processes. `whole`: its figures include all processes that it has started."""

    name: str
    pid: int
    ospid: int
    started: float
    whole: bool = True


class System:
    def __init__(self, born: Inheritance, services: Services) -> None:
        self._born = born
        self._services = services
        self.templates = list(born.templates)
        self.servers = list(born.servers)
        self._pss: dict[int, int] = {}  # by Linux pid, read since `_sampled`
        self._sampled = 0.0

    def processes(self) -> list[ListedProcess]:
        """All of aiosd's own processes that run now."""
        born, pids = self._born, self._born.pids
        found = [
            ListedProcess("guardian", pids["guardian"], born.guardian, born.started, whole=False),
            ListedProcess("supervisor", pids["supervisor"], os.getppid(), born.started, whole=False),
            ListedProcess("kernel", pids["kernel"], os.getpid(), born.started),
        ]
        found += [ListedProcess(service.title, service.pid, service.ospid, born.started) for service in self._services]
        found += [ListedProcess(one.name, one.pid, one.ospid, one.started) for one in self.templates]
        return found + [ListedProcess(f"mcp:{one.name}", one.pid, one.ospid, one.started) for one in self.servers]

    def pids(self) -> set[int]:
        return {process.pid for process in self.processes()}

    def lines(self, pids: set[int] | None, wanted: str | None, lines: list[wire.ProcInfo]) -> Iterator[None]:
        """A job: adds the lines of processes with one of these pids (None: all) and this name (None: any)."""
        for process in self.processes():
            if (pids is None or process.pid in pids) and (wanted is None or process.name == wanted):
                tree = procfs.tree(process.ospid) if process.whole else _alone(process.ospid)
                for ospid in tree:
                    if self._look(ospid):
                        yield
                lines.append(self._line(process, tree))

    def _line(self, process: ListedProcess, tree: dict[int, Stat]) -> wire.ProcInfo:
        computes = any(stat.state == "R" for stat in tree.values())
        return wire.ProcInfo(
            pid=process.pid,
            ppid=0 if process.ospid in (self._born.guardian, os.getppid()) else 1,
            pgid=process.pid,
            ospid=process.ospid,
            uid=os.getuid(),
            stat="R" if computes else "S",
            nice=0,
            name=process.name,
            command=f"aiosd: {process.name}",
            group="system",
            calls=0,
            prompt_tokens=0,
            cached_tokens=0,
            completion_tokens=0,
            ctx_tokens=0,
            mem_bytes=sum(self._pss.get(ospid, 0) for ospid in tree),
            cpu_s=round(sum(stat.cpu_s + (stat.waited_s if process.whole else 0.0) for stat in tree.values()), 3),
            started=process.started,
            system=True,
        )

    def _look(self, ospid: int) -> bool:
        """Sample its memory, at most every half second, since that takes milliseconds. Returns whether it was read
        now."""
        now = time.monotonic()
        if now - self._sampled > SAMPLE_S:
            self._sampled, self._pss = now, {}
        if ospid in self._pss:
            return False
        self._pss[ospid] = procfs.pss_bytes(ospid)
        return True


def _alone(ospid: int) -> dict[int, Stat]:
    stat = procfs.read_stat(ospid)
    return {} if stat is None else {ospid: stat}


class FdLimit:
    """How many descriptors the kernel may still open. `agents` counts agents that live or are being forked; `clients`
    counts descriptors that are open for clients."""

    def __init__(self, agents: Callable[[], int], clients: Callable[[], int]) -> None:
        self._agents = agents
        self._clients = clients

    @property
    def max_agents(self) -> int:
        """How many agents the limit on open files allows."""
        return max(0, (_limit() - FDS_SPARE) // FDS_PER_AGENT)

    def left(self) -> int:
        """How many more the kernel may open without using those that it needs itself."""
        return _limit() - FDS_SPARE - FDS_PER_AGENT * self._agents() - max(0, self._clients() - FDS_CLIENTS)

    def room_for_agent(self) -> bool:
        return self.left() >= FDS_PER_AGENT

    def room_for_client(self) -> bool:
        return self._clients() < FDS_CLIENTS or self.left() >= 1


def _limit() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
