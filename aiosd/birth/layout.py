"""The code that every agent runs, side by side in memory.

A call of a Python function writes to its code object, whose reference count changes. Code objects lie in the order in
which modules were imported, so those that an agent runs in its first milliseconds lie on more than a hundred pages,
each of which is copied for the agent. `gather` finds out which ones are run, and gives their functions copies of them
that lie next to each other. A copy has the same bytecode, and shares names and constants with its original.

The interpreter caches the attributes of classes that it has looked up, in a table that holds a reference to each name.
After a thousand imports that table is full of names that no agent uses; each one that an agent displaces would cost it
a page. `forget_attributes` empties it.

Together they save an agent a tenth of its memory (benchmarks/spawn.py measures it). Nothing else depends on them.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Collection
from types import CodeType, FrameType, FunctionType


def gather(play: Callable[[], None], modules: Collection[str] = ()) -> int:
    """Move the code that `play` runs, and that of all functions of these modules. Returns the number of functions. To
    be called before the code is warm, because a copy begins cold."""
    hot = _run_by(play)
    gc.unfreeze()  # functions that this process has inherited are frozen, and must be found
    functions = [one for one in gc.get_objects() if type(one) is FunctionType]
    for one in functions:
        if one.__module__ in modules:
            hot.setdefault(id(one.__code__), one.__code__)
    copies: dict[int, CodeType] = {}
    for code in hot.values():
        _copy(code, hot, copies)
    moved = [one for one in functions if id(one.__code__) in copies]
    for one in moved:
        one.__code__ = copies[id(one.__code__)]
    _kept.append(hot)  # so that nothing else gets the places of the old ones
    return len(moved)


def forget_attributes() -> None:
    """Empty the interpreter's table of attributes of classes. It fills again by itself."""
    clear = getattr(sys, "_clear_internal_caches", None) or sys._clear_type_cache
    clear()


def _run_by(play: Callable[[], None]) -> dict[int, CodeType]:
    """The code objects that `play` runs, by id, since code with the same content is equal."""
    found: dict[int, CodeType] = {}

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            found.setdefault(id(frame.f_code), frame.f_code)

    sys.setprofile(note)
    try:
        play()
    finally:
        sys.setprofile(None)
    return found


def _copy(code: CodeType, hot: dict[int, CodeType], copies: dict[int, CodeType]) -> CodeType:
    """A copy of a code object, with copies of those of its inner functions."""
    if id(code) not in copies:
        inner = [isinstance(one, CodeType) and id(one) in hot for one in code.co_consts]
        consts = zip(inner, code.co_consts, strict=True)
        copies[id(code)] = code.replace(
            co_consts=tuple(_copy(one, hot, copies) if is_hot else one for is_hot, one in consts)
        )
    return copies[id(code)]


_kept: list[object] = []
