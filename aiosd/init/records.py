"""What the supervisor remembers, and a new kernel is born with.

The supervisor alone keeps and changes these; a kernel gets them by being forked, once, and from then on hears of
changes through its link.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aiosd import link
from aiosd.heartbeat import Heart

if TYPE_CHECKING:
    from aiosd.config import Settings
    from aiosd.llm.spec import ModelSpec

#: First and longest wait (s) before a dead core or kernel is forked again.
BACKOFF_S = (0.1, 5.0)


@dataclass(slots=True)
class Agent:
    """What the supervisor knows of one agent, and a new kernel is told."""

    # fixed at spawn
    pid: int
    ospid: int
    spec: link.Fork  # without its environment
    pgid: int
    started: float  # Unix time
    since: float  # the same moment on the monotonic clock: what deadlines count from
    log: str
    memfd: int
    bell: int  # the kernel's end
    # changed by the kernel through link.Mark
    ppid: int
    nice: int
    budget: str = ""
    reason: str = ""
    reaped: bool = False  # its exit status has been collected,
    reaped_by: link.Key | None = None  # … by this call
    # changed by waitid
    stopped: bool = False
    status: int | None = None  # exit code or -signal; None while alive


@dataclass(slots=True)
class Core:
    """One llm core. A core forked again gets a new channel: nothing of its predecessor's lies in it."""

    model: ModelSpec
    pid: int
    ospid: int = 0  # 0: not running; then it has no channel either
    memfd: int = -1
    kernel_bell: int = -1
    core_bell: int = -1
    heart: Heart | None = None
    deaths: int = 0
    forked_at: float = 0.0
    backoff_s: float = BACKOFF_S[0]


@dataclass(slots=True)
class Inheritance:
    """All that a kernel is born with."""

    boot: str
    settings: Settings
    listener: int
    link: int
    heartbeat: int
    epoch: int
    pids: dict[str, int]  # of aiosd's own processes, by name
    guardian: int
    started: float
    since: float
    journal: tuple[int, int]  # two memfds, see kernel.journal
    ledger: int  # a memfd, see kernel.ledger
    ready: bool = False  # the system has been ready to serve
    agents: list[Agent] = field(default_factory=list)
    cores: list[Core] = field(default_factory=list)
