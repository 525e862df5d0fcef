"""The SDK of aiosd: what an agent imports.

    import libaios as aios

    r = aios.llm.chat([{"role": "user", "content": "hi"}])
    pid = aios.proc.spawn("agent.py", "argument")
    aios.msg.send(pid, {"any": "object"})

Families: `llm` (the model), `proc` (processes), `msg` (messages), `mem` (notes), `sto` (files), `tool` (later); `aio`
has the same names as coroutines. Errors are OSErrors with POSIX numbers and a sentence. Outside an agent the same
calls go through the control socket of the system that AIOS_HOME names.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from libaios import aio, llm, mem, msg, proc, sto, tool

__all__ = ["aio", "llm", "mem", "msg", "proc", "sto", "tool"]


def __getattr__(name: str) -> object:
    """Families are imported when they are first used: a command that needs one does not pay for all."""
    if name in __all__:
        return importlib.import_module(f"libaios.{name}")
    raise AttributeError(f"module 'libaios' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
