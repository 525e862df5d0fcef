"""Tracebacks of agents: the script's own lines, without the machinery that ran them or that they called.

Where a script waits for a model, twenty lines of libaios lie between its line and the system call, and none of them
means anything to who pressed Ctrl-C. An error that a call raised keeps the one line that names the call.
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
    """Take away the SDK's frames at the end but for the first `keep`, with what they have called. Where the script
    comes again after them (a signal handler of its own) nothing is taken away."""
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
    """Whether it runs code of the agent, not of what all agents share."""
    return _name(frame) == "__main__" or _name(frame) not in modules.inherited


def _is_sdk(frame: FrameType) -> bool:
    name = _name(frame)
    return (name == _SDK or name.startswith(f"{_SDK}.")) and not name.startswith(_PROGRAMS)
