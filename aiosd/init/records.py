"""The supervisor's records, which a new kernel inherits.

Only the supervisor changes these. A kernel gets a copy of them when it is forked, and is informed of later changes
through its link.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from aiosd.init.restart import Restarts
from aiosd.ipc import link
from aiosd.ipc.heartbeat import Heart
from aiosd.ipc.link import CallKey, ServerShown, TemplateShown
from aiosd.ipc.service import ServiceSpec
from aiosd.sandbox.probe import Offer
from aiosd.timers import Cancellable

if TYPE_CHECKING:
    from aiosd.config import Settings

#: First and longest wait (s) before a dead service or kernel is forked again.
BACKOFF_S = (0.1, 5.0)

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Memo(Generic[K, V]):
    """Results of calls that take effect once, by their keys: submitted again, a call gets the same result. The oldest
    are forgotten: a call is submitted again soon after a death, or never."""

    LIMIT = 4096

    def __init__(self) -> None:
        self._entries: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V | None:
        return self._entries.get(key)

    def __contains__(self, key: K) -> bool:
        return key in self._entries

    def forget(self, key: K) -> None:
        self._entries.pop(key, None)

    def put(self, key: K, value: V) -> None:
        self._entries[key] = value
        if len(self._entries) > self.LIMIT:
            self._entries.popitem(last=False)


@dataclass(slots=True, eq=False)
class Agent:
    """The supervisor's record of one agent, which a new kernel inherits."""

    # fixed at spawn
    pid: int
    ospid: int
    spec: link.Fork
    pgid: int
    started: float  # Unix time
    since: float  # the same on the monotonic clock: deadlines count from here
    log: str
    memfd: int
    bell: int  # the kernel's end
    # changed by the kernel through link.Mark
    ppid: int
    nice: int
    budget: str = ""
    reason: str = ""
    reaped: bool = False  # its exit status has been collected
    # changed by waitid
    stopped: bool = False
    status: int | None = None  # exit code or -signal; None while alive
    ended: float = 0.0  # Unix time
    cpu_s: float = 0.0  # processor seconds of its last process, with the children that it had waited for
    # for an agent that is started again when it ends (its `ospid` is 0 while it waits for that)
    restarts: Restarts | None = None
    forked_at: float = 0.0  # when its process was forked, on the monotonic clock
    letter: int = -1  # a descriptor of its letter, kept for its next start and for the next kernel
    door: int = -1  # of a confined agent: a descriptor, see `sandbox.doors`
    handed: tuple[int, ...] = ()  # sockets among its stdin, stdout and stderr: inodes
    gates: tuple[int, ...] = ()  # of an agent with a network of its own: descriptors, see `birth.gates`
    last_status: int = 0
    again: Cancellable | None = None  # its next start; None while it waits: STOP holds it
    # changed by signals sent to it
    got_term: bool = False  # so its orphans get time to end in order
    meant: bool = False  # a signal that ends it was sent through aiosd: it is not started again


@dataclass(slots=True, eq=False)
class SystemProcess:
    """One of aiosd's own processes: the kernel, or a service. When it is forked again it gets a new channel, which
    contains nothing from the dead one."""

    service: ServiceSpec
    pid: int
    ospid: int = 0  # 0: not running; then it has no channel either
    memfd: int = -1
    kernel_bell: int = -1
    own_bell: int = -1
    heart: Heart | None = None
    deaths: int = 0
    forked_at: float = 0.0
    backoff_s: float = BACKOFF_S[0]


@dataclass(slots=True)
class Inheritance:
    """Everything that a kernel inherits."""

    boot: str
    settings: Settings
    listener: int
    link: int
    heartbeat: int
    epoch: int
    pids: dict[str, int]  # of guardian, supervisor and kernel
    guardian: int
    started: float
    since: float
    journal: tuple[int, int]  # two memfds, see kernel.journal
    ledger: int  # a memfd, see kernel.ledger
    memo: Memo[CallKey, bytes]  # replies of calls that take effect once
    ready: bool = False  # the system has been ready before
    offer: Offer = field(default_factory=lambda: Offer("none"))  # the sandbox that this machine can do
    agents: list[Agent] = field(default_factory=list)
    services: list[SystemProcess] = field(default_factory=list)
    templates: list[TemplateShown] = field(default_factory=list)
    servers: list[ServerShown] = field(default_factory=list)
