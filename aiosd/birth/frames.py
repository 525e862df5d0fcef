"""Tracebacks of agents: the script's own lines, without the machinery that ran them or that they called.

Where a script waits for a model, there are twenty lines of libaios between its line and the system call. They mean
nothing to a user who presses Ctrl-C. For an error that a call raised, the one line that names the call is kept.
"""

from __future__ import annotations

from types import FrameType, TracebackType

from aiosd.birth import modules

_SDK = "libaios"
_PROGRAMS = "libaios.agents."  # they are agents, not the SDK


def trim(err: BaseException) -> None:
    """Shorten the traceback of an exception, and those of its causes."""
    keep = 0 if isinstance(err, KeyboardInterrupt) else 1
    seen: set[int] = set()
    todo: list[BaseException | None] = [err]
    while todo:
        one = todo.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            _cut(one.__traceback__, keep)
            todo += (one.__cause__, one.__context__)


def _cut(trace: TracebackType | None, keep: int) -> None:
    """Remove the SDK's frames at the end, except the first `keep`, and the frames that they called. If a frame of the
    script follows them (its own signal handler), nothing is removed."""
    before, tail = None, 0
    while trace is not None:
        if tail or _is_sdk(trace.tb_frame):
            tail += 1
            if _is_own(trace.tb_frame):
                tail = 0
        if tail <= keep:
            before = trace
        trace = trace.tb_next
    if before is not None and tail > keep:
        before.tb_next = None


def _name(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__"))


def _is_own(frame: FrameType) -> bool:
    """Whether the frame runs the agent's own code, not a module that all agents share."""
    return _name(frame) == "__main__" or _name(frame) not in modules.inherited


def _is_sdk(frame: FrameType) -> bool:
    name = _name(frame)
    return (name == _SDK or name.startswith(f"{_SDK}.")) and not name.startswith(_PROGRAMS)
