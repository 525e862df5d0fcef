"""A new agent confines itself, before its program is looked up.

The common part for all agents is made once in the supervisor (`prepare`), so that agents share its memory.
"""

from __future__ import annotations

import errno
import os
import pickle
import resource
import sys
from collections.abc import Iterable

import msgspec

from aiosd.birth import fork, gates
from aiosd.birth.report import Report
from aiosd.budgets.limits import most_processes
from aiosd.ipc.letter import Letter
from aiosd.sandbox import cage, confine, filter, hosts, places, plan, probe
from aiosd.sandbox.box import Box
from aiosd.sandbox.probe import Offer
from libaios import wire

FILES = 4096  # the most open files of a process in a sandbox

_native: confine.Native | None = None
_ground: plan.Ground | None = None
_gates: list[gates.HostPort] = []
_opened: tuple[int, ...] = ()
#: The box of this process, for explaining errors.
box: Box | None = None


def prepare(addresses: list[gates.HostPort]) -> Offer:
    """In the supervisor, before the first fork: find out what this machine can do. `addresses`: of the gates."""
    global _native, _ground, _gates
    _native, _gates = confine.load(), addresses
    offer, _ground = probe.offer(_native, plan.ground(sys.path) if filter.known_here() else None, fork.fork)
    cage.current = _ground.cage if _ground is not None else None
    return offer


def rehearse() -> None:
    """Make plans, without carrying them out."""
    if _native is not None and _ground is not None:
        for level in ("flat", "flat" if _ground.cage is None else "cage"):
            plan.plan(_ground, Box(level, "all", "/srv/workspace", ["/usr/share"], []), doors=True)


def open_common() -> None:
    """In a brooder: open the files that the common rules name, once for all its spares. Spares are used within two
    seconds (`spares.FRESH_S`), so that agents soon have the new version of a file of /etc that was replaced."""
    global _ground, _opened
    if _ground is not None:
        _ground, _opened = plan.opened(_ground)


def descriptors() -> tuple[int, ...]:
    """The descriptors that a process needs to confine itself, at any level."""
    return (*cage.descriptors(), *_opened)


def packed() -> bytes:
    """The common part for all confined agents, for a template, which is not forked from this process."""
    return pickle.dumps((_ground, _gates))


def unpack(content: bytes) -> None:
    """Called in a template with the result of `packed`. The template has inherited the descriptors of the cage under
    their numbers."""
    global _native, _ground, _gates
    _native = confine.load()
    _ground, _gates = pickle.loads(content)
    cage.current = _ground.cage if _ground is not None else None


def enter(new: Box, report: Report, outputs: Iterable[int] = (), terminal: str = "", names: Iterable[str] = ()) -> None:
    """Confine this process, for good. `outputs`: its stdout and stderr; `terminal`, `names`: see `plan.plan`. Raises
    OSError with a sentence."""
    global box
    workspace = wire.os_str(new.workspace)
    for folder in (workspace, os.path.join(workspace, "tmp")):
        os.makedirs(folder, mode=0o700, exist_ok=True)
    report.door(apply(new, doors=True, outputs=outputs, terminal=terminal, names=names))
    if hosts.are_named(new.net):
        report.gates(gates.made(_gates))
    limit(resource.RLIMIT_NOFILE, FILES)
    box = new


def apply(
    new: Box, doors: bool = False, outputs: Iterable[int] = (), terminal: str = "", names: Iterable[str] = ()
) -> int:
    """Confine a process, which need not be an agent. Its workspace must exist. Returns the listener of its door, if
    any."""
    if _native is None or _ground is None:
        raise OSError(1, f"sandbox: {new.level} is not possible here")
    listener = _native.confine(plan.plan(_ground, new, doors, outputs=outputs, terminal=terminal, names=names))
    if new.level == "cage":  # there Linux counts this agent's processes alone (for other levels: kernel.forks)
        limit(resource.RLIMIT_NPROC, most_processes())
    return listener


def limit(which: int, most: int) -> None:
    """Lower a limit of this process to `most`, for good."""
    soft, hard = resource.getrlimit(which)
    if hard == resource.RLIM_INFINITY or hard > most:
        resource.setrlimit(which, (most if soft == resource.RLIM_INFINITY else min(soft, most), most))


def enter_folder(content: Letter) -> Letter:
    """Enter the working directory if the agent can see it or something in it; else the workspace, and then name the
    program with its full path."""
    assert content.box is not None
    try:
        os.chdir(content.cwd)
    except OSError as err:
        hidden = errno.ENOENT if content.box.level == "cage" else errno.EACCES
        if err.errno not in (hidden, errno.EACCES):
            raise
    else:
        if _is_shown(os.getcwd(), content.box):
            return content
    workspace = wire.os_str(content.box.workspace)
    os.chdir(workspace)
    target = content.target
    if (content.kind == "exec" and "/" in target) or (content.kind == "file" and target != "-"):
        target = os.path.join(content.cwd, target)
    return msgspec.structs.replace(content, target=target, cwd=workspace)


def _is_shown(path: str, box: Box) -> bool:
    """Whether the agent sees that folder of the machine, or something in it that it was granted: then a path that a
    person has typed has the same meaning for the agent. (In a cage there may be an empty folder of the same name.)"""
    assert _ground is not None
    folder, granted = wire.os_text(path), (*box.read, *box.write)
    if places.inside(folder, (*_ground.machine.system, box.workspace, *granted)):
        return True
    return any(places.inside(one, (folder,)) for one in granted)


def explain(err: BaseException) -> str:
    """A text about what the sandbox has denied; "": the error has another cause."""
    if box is None or _ground is None:
        return ""
    from aiosd.birth import denial

    return denial.words(err, box, _ground.machine.system)
