"""aiosd's own processes, as lines of aios-ps and figures of `aiosd status`; and the descriptors that the kernel has."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from aiosd import procfs
from aiosd.kernel.service import Services
from libaios import wire

if TYPE_CHECKING:
    from aiosd.init.records import Inheritance

SAMPLE_S = 0.5  # between two looks at the memory of aiosd's own processes
FDS_PER_AGENT = 3  # in the kernel: its memfd, the mapping of that, its doorbell
FDS_SPARE = 64  # for itself, and
FDS_CLIENTS = 32  # of these for clients


class System:
    def __init__(self, born: Inheritance, services: Services) -> None:
        self._born = born
        self._services = services
        self.templates = list(born.templates)
        self._pss: dict[int, int] = {}  # by Linux pid, read since `_sampled`
        self._sampled = 0.0

    def processes(self) -> dict[str, tuple[int, int]]:
        """name → (pid, Linux pid)."""
        pids = self._born.pids
        found = {"supervisor": (pids["supervisor"], os.getppid()), "kernel": (pids["kernel"], os.getpid())}
        found |= {service.title: (service.pid, service.ospid) for service in self._services}
        return found | {one.name: (one.pid, one.ospid) for one in self.templates}

    def pids(self) -> set[int]:
        return {pid for pid, _ in self.processes().values()}

    def lines(self, pids: set[int] | None, wanted: str | None) -> list[wire.ProcInfo]:
        """Those with one of these pids (None: all) and this name (None: any)."""
        return [
            self._line(name, pid, ospid)
            for name, (pid, ospid) in self.processes().items()
            if (pids is None or pid in pids) and (wanted is None or name == wanted)
        ]

    def _line(self, name: str, pid: int, ospid: int) -> wire.ProcInfo:
        stat = procfs.read_stat(ospid)
        return wire.ProcInfo(
            pid=pid,
            ppid=0 if pid == 1 else 1,
            pgid=pid,
            ospid=ospid,
            uid=os.getuid(),
            stat="S" if stat is None or stat.state != "R" else "R",
            nice=0,
            name=name,
            command=f"aiosd: {name}",
            group="system",
            calls=0,
            prompt_tokens=0,
            cached_tokens=0,
            completion_tokens=0,
            ctx_tokens=0,
            mem_bytes=self._pss_bytes(ospid),
            cpu_s=stat.cpu_s if stat is not None else 0.0,
            started=self._born.started,
            system=True,
        )

    def _pss_bytes(self, ospid: int) -> int:
        """Not read anew within half a second, since it takes milliseconds."""
        now = time.monotonic()
        if now - self._sampled > SAMPLE_S:
            self._sampled, self._pss = now, {}
        if ospid not in self._pss:
            self._pss[ospid] = procfs.pss_bytes(ospid)
        return self._pss[ospid]


class Descriptors:
    """How many the kernel may still open. `agents` counts those that live or are being forked; `clients` descriptors
    that are open for clients."""

    def __init__(self, agents: Callable[[], int], clients: Callable[[], int]) -> None:
        self._agents = agents
        self._clients = clients

    @property
    def max_agents(self) -> int:
        """How many agents the limit on open files allows."""
        return max(0, (_limit() - FDS_SPARE) // FDS_PER_AGENT)

    def left(self) -> int:
        """How many more the kernel may open before it eats into what it needs itself."""
        return _limit() - FDS_SPARE - FDS_PER_AGENT * self._agents() - max(0, self._clients() - FDS_CLIENTS)

    def room_for_agent(self) -> bool:
        return self.left() >= FDS_PER_AGENT

    def room_for_client(self) -> bool:
        return self._clients() < FDS_CLIENTS or self.left() >= 1


def _limit() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
