"""A new agent confines itself, before its program is looked up.

What is the same for all agents is made once in the supervisor (`prepare`), so that agents share its memory.
"""

from __future__ import annotations

import os
import sys

import msgspec

from aiosd.birth import fork
from aiosd.birth.report import Report
from aiosd.letter import Letter
from aiosd.sandbox import confine, filter, plan, probe
from aiosd.sandbox.box import Box
from aiosd.sandbox.probe import Offer
from libaios import wire

_native: confine.Native | None = None
_ground: plan.Ground | None = None
#: How this process is confined, for the words that explain an error.
box: Box | None = None


def prepare() -> Offer:
    """In the supervisor, before the first fork: what this machine can do."""
    global _native, _ground
    _native = confine.load()
    offer, _ground = probe.offer(_native, plan.ground(sys.path) if filter.known_here() else None, fork.fork)
    return offer


def cage() -> tuple[int, ...]:
    """The descriptors of the cage, which a process needs that is to enter it; none where there is no cage."""
    return () if _ground is None or _ground.cage is None else _ground.cage.fds()


def enter(new: Box, report: Report) -> None:
    """Confine this process, for good. Raises OSError with a sentence."""
    global box
    if _native is None or _ground is None:
        raise OSError(1, f"sandbox: {new.level} is not possible here")
    workspace = wire.os_str(new.workspace)
    for folder in (workspace, os.path.join(workspace, "tmp")):
        os.makedirs(folder, mode=0o700, exist_ok=True)
    report.door(_native.confine(plan.plan(_ground, new, doors=True)))
    box = new


def enter_folder(content: Letter) -> Letter:
    """Enter the working directory; where that cannot be read, or seen, the workspace, and name the program in full."""
    assert content.box is not None
    try:
        os.chdir(content.cwd)
        os.close(os.open(".", os.O_RDONLY | os.O_DIRECTORY))
    except PermissionError:
        pass
    except FileNotFoundError:
        if content.box.level != "cage":
            raise
    else:
        return content
    workspace = wire.os_str(content.box.workspace)
    os.chdir(workspace)
    target = content.target
    if (content.kind == "exec" and "/" in target) or (content.kind == "file" and target != "-"):
        target = os.path.join(content.cwd, target)
    return msgspec.structs.replace(content, target=target, cwd=workspace)


def explain(err: BaseException) -> str:
    """Words about a file that the sandbox has denied; "": it was something else."""
    if box is None or not isinstance(err, PermissionError) or not isinstance(err.filename, str | bytes):
        return ""
    path = os.path.abspath(os.fsdecode(err.filename))
    grant = "write" if _is_readable(path) else "read"
    return f"(sandbox {box.level}: aios-run --{grant} {path}, or {grant} of [[group]] in aiosd.toml, would allow it)"


def _is_readable(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True
