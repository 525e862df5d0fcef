"""The process table: one record per agent, and the life of a process as data.

              fork
               │
               ▼      STOP
            RUNNING ─────────▶ STOPPED
             │ ▲  ◀─────────      │
             │ │      CONT        │
        FAIL │ │ START            │ FAIL
             ▼ │                  │
            WAITING ◀─────────────┘     its process has ended, and it is started again after a while (`restart`);
                                        or it never has one (`outside`)

            RUNNING, STOPPED, WAITING
               │
          EXIT │
               ▼
            ZOMBIE                      dead, exit status not yet collected
               │
          REAP │  its parent waited for it, or its parent is pid 1, which waits for all
               ▼
            REAPED                      in the history: the last N dead, for aios-wait, -logs and -inspect

`advance()` alone moves a process, and only along `TRANSITIONS`; anything else is a bug of aiosd and moves nothing. STAT
of aios-ps is computed from the state and from the calls that are open (`listing.py`).

Everything here is touched by the kernel's one thread only. The parent of an agent that was started from
outside, or whose parent died, is pid 1.
"""

from __future__ import annotations

import enum
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from aiosd.errors import Bug
from aiosd.ipc import link
from aiosd.kernel.budget import Budget
from aiosd.kernel.ledger import TOOLS_CPU_US, LedgerRow, loose_row
from aiosd.sandbox.box import Box
from libaios import wire

INIT = 1  # the pid of aiosd itself
BUDGET_ENDED = 124


class ProcState(enum.Enum):
    RUNNING = "running"
    STOPPED = "stopped"
    WAITING = "waiting"
    ZOMBIE = "zombie"
    REAPED = "reaped"


# A tuple: members are compared by identity, and not hashed.
_ALIVE = (ProcState.RUNNING, ProcState.STOPPED, ProcState.WAITING)


class ProcEvent(enum.Enum):
    STOP = "stop"
    CONT = "cont"
    FAIL = "fail"
    START = "start"
    EXIT = "exit"
    REAP = "reap"


TRANSITIONS: dict[tuple[ProcState, ProcEvent], ProcState] = {
    (ProcState.RUNNING, ProcEvent.STOP): ProcState.STOPPED,
    (ProcState.STOPPED, ProcEvent.STOP): ProcState.STOPPED,
    (ProcState.STOPPED, ProcEvent.CONT): ProcState.RUNNING,
    (ProcState.RUNNING, ProcEvent.CONT): ProcState.RUNNING,
    (ProcState.RUNNING, ProcEvent.FAIL): ProcState.WAITING,
    (ProcState.STOPPED, ProcEvent.FAIL): ProcState.WAITING,
    (ProcState.WAITING, ProcEvent.START): ProcState.RUNNING,
    (ProcState.WAITING, ProcEvent.EXIT): ProcState.ZOMBIE,
    (ProcState.RUNNING, ProcEvent.EXIT): ProcState.ZOMBIE,
    (ProcState.STOPPED, ProcEvent.EXIT): ProcState.ZOMBIE,
    (ProcState.ZOMBIE, ProcEvent.REAP): ProcState.REAPED,
}


@dataclass(slots=True, eq=False)
class Proc:
    """One agent."""

    # fixed at spawn
    pid: int
    ospid: int
    pgid: int
    uid: int
    name: str
    command: str
    group: str
    log: str  # "" unless detached
    started: float  # Unix time
    attached_to: int  # id of the client that gets its exit code, and whose end sends it HUP; 0: none
    client: tuple[int, int] = (0, 0)  # the process of that client: Linux pid and start time
    named: bool = False  # the name was given, and not made from the program's name
    token: bytes = b""  # the hash of its token for the gateway; b"": it has none
    outside: bool = False  # programs from outside act as this agent: it has no process here, and its state is WAITING
    box: Box | None = None  # how it is confined
    network: int = 0  # the inode of its own network; 0: it has none
    handed: tuple[int, ...] = ()  # sockets that it has begun with: inodes. What was sent there may be its parent's
    template: wire.Template | None = None  # from which its process is forked
    program: bytes = b""  # the program that a person has started, see `access.deed.Subject`,
    sha256: bytes = b""  # … and with which content
    row: LedgerRow = field(default_factory=loose_row)  # in the ledger
    budgets: list[Budget] = field(default_factory=list)  # those it shares: of its ancestors, and its own
    caller: tuple[link.Caller, Box | None] | None = None  # its `Caller` for services, while it has no budgets; its box

    # life
    ppid: int = INIT
    nice: int = 0
    state: ProcState = ProcState.RUNNING
    halted: bool = False  # STOP was sent: it is stopped, or will be
    continued: int = 0  # how many times it was continued
    restart: str = "no"  # when it is started again, see aiosd.init.restart,
    restarts: int = 0  # … and how often it was
    status: int | None = None  # exit code or -signal
    budget: str = ""  # which budget ended it
    reason: str = ""  # what the kernel or the supervisor noted about the end
    denied: str = ""  # what its sandbox has denied it last, as far as that is known, and what would allow it
    ended: float = 0.0  # Unix time

    # what it used
    calls: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    cost: int = 0  # in 10^-12 of the currency's unit
    ctx_tokens: int = 0
    mem_bytes: int = 0
    sampled: float = 0.0  # when mem_bytes was (monotonic)
    tools_bytes: int = 0  # what its calls of tools hold
    cpu_s: float = 0.0
    os_state: str = "S"  # Linux's letter,
    looked: float = 0.0  # … and when that and cpu_s were read (monotonic)

    @property
    def alive(self) -> bool:
        return self.state in _ALIVE

    @property
    def tools_cpu_s(self) -> float:
        """Processor seconds of its calls of tools."""
        return float(self.row[TOOLS_CPU_US]) / 1e6


class ProcTable:
    """All agents by pid. Invariant: `children[p]` are exactly the processes, dead or alive, whose ppid is p
    and which have not been reaped."""

    def __init__(self, keep_dead: int) -> None:
        self.procs: dict[int, Proc] = {}  # live and zombies
        self.children: dict[int, dict[int, Proc]] = {}
        self.history: OrderedDict[int, Proc] = OrderedDict()
        self.keep_dead = keep_dead

    def __iter__(self) -> Iterator[Proc]:
        return iter(list(self.procs.values()))

    def add(self, proc: Proc) -> None:
        self.procs[proc.pid] = proc
        self.children.setdefault(proc.ppid, {})[proc.pid] = proc

    def get(self, pid: int) -> Proc | None:
        """A live agent or a zombie."""
        return self.procs.get(pid)

    def find(self, pid: int) -> Proc | None:
        """The same, or a dead agent of which there is still a record."""
        return self.procs.get(pid) or self.history.get(pid)

    def live(self) -> list[Proc]:
        return [proc for proc in self.procs.values() if proc.alive]

    def members(self, pgid: int) -> list[Proc]:
        return [proc for proc in self.procs.values() if proc.pgid == pgid]

    def children_of(self, pid: int) -> list[Proc]:
        return list(self.children.get(pid, {}).values())

    def subtree(self, proc: Proc) -> list[Proc]:
        """The agent and all its descendants, parents first."""
        return self.subtrees([proc])

    def subtrees(self, procs: Iterable[Proc]) -> list[Proc]:
        """These agents and all their descendants, each once."""
        found = list(procs)
        seen = {proc.pid for proc in found}
        for one in found:  # grows during the loop
            for child in self.children.get(one.pid, {}).values():
                if child.pid not in seen:
                    seen.add(child.pid)
                    found.append(child)
        return found

    def is_ancestor(self, pid: int, proc: Proc) -> bool:
        """Whether `pid` is the agent itself or one of its ancestors."""
        one: Proc | None = proc
        while one is not None:
            if one.pid == pid:
                return True
            one = self.procs.get(one.ppid)
        return False

    def advance(self, proc: Proc, event: ProcEvent) -> None:
        """The one place where a process changes its state; an illegal move raises Bug and moves nothing."""
        new = TRANSITIONS.get((proc.state, event))
        if new is None:
            raise Bug(f"process {proc.pid}: {event.name} in state {proc.state.name}")
        proc.state = new

    def adopt_orphan(self, proc: Proc) -> None:
        """The parent of a process is dead: pid 1 is its parent from now on."""
        siblings = self.children.get(proc.ppid, {})
        siblings.pop(proc.pid, None)
        if not siblings:
            self.children.pop(proc.ppid, None)
        proc.ppid = INIT
        self.children.setdefault(INIT, {})[proc.pid] = proc

    def exit(self, proc: Proc, status: int) -> list[Proc]:
        """Record an end. Returns the children, whose parent is pid 1 from now on."""
        self.advance(proc, ProcEvent.EXIT)
        proc.status = status
        proc.ended = time.time()
        orphans = self.children_of(proc.pid)
        for child in orphans:
            self.adopt_orphan(child)
        return orphans

    def reap(self, proc: Proc) -> list[int]:
        """Move a zombie to the history. Returns the pids that the history dropped for it."""
        self.advance(proc, ProcEvent.REAP)
        siblings = self.children[proc.ppid]
        del siblings[proc.pid]
        if not siblings:
            del self.children[proc.ppid]
        del self.procs[proc.pid]
        self.history[proc.pid] = proc
        return self._trim()

    def _trim(self) -> list[int]:
        forgotten = []
        while len(self.history) > self.keep_dead:
            forgotten.append(self.history.popitem(last=False)[0])
        return forgotten


def shell_status(status: int) -> int:
    """An exit status as a shell shows it: the code, or 128 + n for signal n."""
    return status if status >= 0 else 128 - status


def shown_exit(proc: Proc) -> int | None:
    """The exit status as a shell shows it, 124 if a budget ended the agent; None: it is alive."""
    if proc.status is None:
        return None
    return BUDGET_ENDED if proc.budget else shell_status(proc.status)
