"""The process table: one record per agent, and the life of a process as data.

              fork
               │
               ▼      STOP
            RUNNING ─────────▶ STOPPED
               │  ◀─────────  │
               │      CONT    │
          EXIT │              │ EXIT
               ▼              ▼
            ZOMBIE ◀──────────┘         dead, exit status not yet collected
               │
          REAP │  its parent waited for it, or its parent is pid 1, which waits for all
               ▼
            REAPED                      in the history: the last N dead, for aios-wait, -logs and -inspect

`advance()` alone moves a process, and only along `TRANSITIONS`; anything else is a bug of ours and moves
nothing. What aios-ps shows as STAT is computed from the state and from the calls that are open (`stat_letter`).

Everything here is touched by the kernel's one thread only. The parent of an agent that was started from
outside, or whose parent died, is pid 1.
"""

from __future__ import annotations

import enum
import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from msgspec import Raw

from aiosd import procfs
from aiosd.errors import Bug
from aiosd.kernel.ledger import Row
from libaios import wire

if TYPE_CHECKING:
    from aiosd.kernel.budget import Budget
    from aiosd.kernel.peer import AgentPeer, Call
    from aiosd.link import Key

INIT = 1  # the pid of aiosd itself


class State(enum.Enum):
    RUNNING = "running"
    STOPPED = "stopped"
    ZOMBIE = "zombie"
    REAPED = "reaped"


class Event(enum.Enum):
    STOP = "stop"
    CONT = "cont"
    EXIT = "exit"
    REAP = "reap"


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.RUNNING, Event.STOP): State.STOPPED,
    (State.STOPPED, Event.STOP): State.STOPPED,
    (State.STOPPED, Event.CONT): State.RUNNING,
    (State.RUNNING, Event.CONT): State.RUNNING,
    (State.RUNNING, Event.EXIT): State.ZOMBIE,
    (State.STOPPED, Event.EXIT): State.ZOMBIE,
    (State.ZOMBIE, Event.REAP): State.REAPED,
}


class Message(NamedTuple):
    """One message in a mailbox; `seq` is its number in the journal."""

    seq: int
    sender: int
    obj: Raw


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
    attached_to: int  # id of the client that gets its exit code and whose end hangs it up; 0: none
    row: Row = field(default_factory=lambda: memoryview(bytearray(64)).cast("Q"))  # in the ledger
    budgets: list[Budget] = field(default_factory=list)  # its own and those of its ancestors

    # life
    ppid: int = INIT
    nice: int = 0
    state: State = State.RUNNING
    continued: int = 0  # how many times it was told to go on
    status: int | None = None  # exit code or -signal
    budget: str = ""  # which budget ended it
    reason: str = ""  # what the kernel or the supervisor had to say about the end
    ended: float = 0.0  # Unix time
    reaped_by: Key | None = None  # the WAIT call that collected its status

    # its connection; None once it is dead or has hung up
    peer: AgentPeer | None = None
    mailbox: deque[Message] = field(default_factory=deque)
    mailbox_bytes: int = 0
    receivers: deque[Call] = field(default_factory=deque)  # open RECV calls, first come first served

    # what it used
    calls: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    ctx_tokens: int = 0
    mem_bytes: int = 0
    sampled: float = 0.0  # when mem_bytes was (monotonic)
    cpu_s: float = 0.0

    @property
    def alive(self) -> bool:
        return self.state in (State.RUNNING, State.STOPPED)


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
        """The same, or one of the dead that are remembered."""
        return self.procs.get(pid) or self.history.get(pid)

    def live(self) -> list[Proc]:
        return [proc for proc in self.procs.values() if proc.alive]

    def members(self, pgid: int) -> list[Proc]:
        return [proc for proc in self.procs.values() if proc.pgid == pgid]

    def children_of(self, pid: int) -> list[Proc]:
        return list(self.children.get(pid, {}).values())

    def subtree(self, proc: Proc) -> list[Proc]:
        """The agent and all its descendants, parents first."""
        found = [proc]
        for one in found:  # grows while we walk it
            found.extend(self.children.get(one.pid, {}).values())
        return found

    def is_ancestor(self, pid: int, proc: Proc) -> bool:
        """Whether `pid` is the agent itself or one of its ancestors."""
        one: Proc | None = proc
        while one is not None:
            if one.pid == pid:
                return True
            one = self.procs.get(one.ppid)
        return False

    def advance(self, proc: Proc, event: Event) -> None:
        """The one place where a process changes its state; an illegal move raises Bug and moves nothing."""
        new = TRANSITIONS.get((proc.state, event))
        if new is None:
            raise Bug(f"process {proc.pid}: {event.name} in state {proc.state.name}")
        proc.state = new

    def exit(self, proc: Proc, status: int) -> list[Proc]:
        """Record an end. Returns the children, which are pid 1's from now on."""
        self.advance(proc, Event.EXIT)
        proc.status = status
        proc.ended = time.time()
        orphans = self.children.pop(proc.pid, {})
        for child in orphans.values():
            child.ppid = INIT
        self.children.setdefault(INIT, {}).update(orphans)
        return list(orphans.values())

    def reap(self, proc: Proc) -> list[int]:
        """Move a zombie to the history. Returns the pids that fell out of it."""
        self.advance(proc, Event.REAP)
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


def stat_letter(proc: Proc, os_state: str) -> str:
    """R on the LLM or computing, Q waiting for the LLM, S sleeping, T stopped, Z dead and not waited for, X dead.

    With no call open only Linux knows whether the agent computes or sleeps.
    """
    if not proc.alive:
        return "Z" if proc.state is State.ZOMBIE else "X"
    if proc.state is State.STOPPED:
        return "T"
    calls = list(proc.peer.calls.values()) if proc.peer is not None else []
    generations = [call.generation for call in calls if call.generation is not None]
    if any(generation.started for generation in generations):
        return "R"
    if generations:
        return "Q"
    if calls:
        return "S"
    return "R" if os_state == "R" else "S"


def describe(proc: Proc, context: tuple[str, int] = ("", 0)) -> wire.ProcInfo:
    """The line of aios-ps; live figures are read from /proc now, memory was sampled. `context`: where the core keeps
    the agent's context, and its tokens."""
    stat = procfs.read_stat(proc.ospid) if proc.alive else None
    if stat is not None:
        proc.cpu_s = stat.cpu_s
    return wire.ProcInfo(
        pid=proc.pid,
        ppid=proc.ppid,
        pgid=proc.pgid,
        ospid=proc.ospid,
        uid=proc.uid,
        stat=stat_letter(proc, stat.state if stat is not None else "S"),
        nice=proc.nice,
        name=proc.name,
        command=proc.command,
        group=proc.group,
        calls=proc.calls,
        prompt_tokens=proc.prompt_tokens,
        cached_tokens=proc.cached_tokens,
        completion_tokens=proc.completion_tokens,
        ctx_tokens=proc.ctx_tokens,
        mem_bytes=proc.mem_bytes,
        cpu_s=round(proc.cpu_s, 3),
        started=proc.started,
        exit=None if proc.status is None else shell_status(proc.status),
        ctx_kept=context[1],
        ctx_place=context[0],
    )
