"""The SDK of aiosd: what an agent imports.

    import libaios as aios

    r = aios.llm.chat([{"role": "user", "content": "hi"}])
    pid = aios.proc.spawn("agent.py", "argument")
    aios.msg.send(pid, {"any": "object"})

Families: `llm` (the model), `proc` (processes), `msg` (messages), `mem` (notes), `sto` (files), `tool` (the toolbox);
`aio` has the same names as coroutines. A call that fails raises an OSError with a POSIX error number and a sentence.
Outside an agent the same calls go through the control socket of the system that the variable AIOS_HOME names.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from libaios import aio, llm, mem, msg, proc, sto, tool

__all__ = ["aio", "llm", "mem", "msg", "proc", "sto", "tool"]


def __getattr__(name: str) -> object:
    """Import a family when it is first used: a command that needs one family does not wait for the import of all."""
    if name in __all__:
        return importlib.import_module(f"libaios.{name}")
    raise AttributeError(f"module 'libaios' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
