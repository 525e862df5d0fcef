"""A new agent confines itself, before its program is looked up.

What is the same for all agents is made once in the supervisor (`prepare`), so that agents share its memory.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

import msgspec

from aiosd.birth import fork
from aiosd.birth.report import Report
from aiosd.letter import Letter
from aiosd.sandbox import confine, filter, plan, probe
from aiosd.sandbox.box import Box
from aiosd.sandbox.probe import Offer
from libaios import wire

_confine: confine.Confine | None = None
_ground: plan.Ground | None = None
#: How this process is confined, for the words that explain an error.
box: Box | None = None


def prepare() -> Offer:
    """In the supervisor, before the first fork: what this machine can do."""
    load(sys.path)
    return probe.offer(_confine, _ground, fork.fork)


def load(python_path: Iterable[str]) -> None:
    """Before the first fork: what all confined agents have in common. `python_path`: where they look for modules."""
    global _confine, _ground
    _confine = confine.load()
    _ground = plan.ground(python_path) if filter.known_here() else None


def enter(new: Box, report: Report) -> None:
    """Confine this process, for good. Raises OSError with a sentence."""
    global box
    if _confine is None or _ground is None:
        raise OSError(1, f"sandbox: {new.level} is not possible here")
    workspace = wire.os_str(new.workspace)
    for folder in (workspace, os.path.join(workspace, "tmp")):
        os.makedirs(folder, mode=0o700, exist_ok=True)
    report.door(_confine(plan.plan(_ground, new, doors=True)))
    box = new


def in_reach(content: Letter) -> Letter:
    """In the working directory: where it cannot be read, go to the workspace, and name the program in full."""
    try:
        os.close(os.open(".", os.O_RDONLY | os.O_DIRECTORY))
    except PermissionError:
        pass
    else:
        return content
    assert content.box is not None
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
