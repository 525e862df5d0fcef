"""What an agent finds imported: as much as a fresh `python3` has, and the rest when it asks for it.

The supervisor has imported some hundred modules before it forks agents, and an agent must not import them anew: it
shares their memory. But a script expects that its own `token.py` wins over the library's, as it does under python3,
and a module that is already in `sys.modules` wins over every file. So the modules of the supervisor are hidden: taken
out of `sys.modules`, kept alive here, and given back by a finder in front of all others to those that import them.

    invariant: the finder gives a hidden module only where python3 would have found the same file: no folder
    in front of the module's own in `sys.path`, that the supervisor does not have, holds another one of that name

With a module come those of its own package that it has imported. What it needs beside them it holds already, and they
stay hidden until the script asks for them: each module that enters `sys.modules` is a page of memory of the agent's
own. What python3 itself has loaded when a script begins is never hidden: there a script's file loses under python3 too.

`hide` is called once in the supervisor, before the first fork, and again where something was imported since. The
kernel and the llm cores take everything back (`show`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import BuiltinFunctionType, FunctionType, ModuleType

_LAST_AT_START = "site"  # what python3 imports last before a script begins; sys.modules is in order of imports

#: What nearly every agent imports stays: the way through the finder would cost each of them memory and time.
_SHOWN = ("libaios", "msgspec")

#: All that the supervisor has imported, hidden or not: an agent's own modules are those that are not here.
inherited: dict[str, ModuleType] = {}
_hidden: dict[str, ModuleType] = {}
_needs: dict[str, list[str]] = {}  # those of its own package that a hidden module has imported
_folders: dict[str, str | None] = {}  # the entry of sys.path where a hidden module outside packages was found
_known: set[str] = set()  # sys.path when modules were hidden
_visible = 0  # how many modules were left in sys.modules


def hide() -> None:
    """Take out of `sys.modules` what a fresh python3 does not have."""
    global _visible
    if len(sys.modules) == _visible:
        return
    names = list(sys.modules)
    if _LAST_AT_START not in names:  # python -S: what belongs to the interpreter is not known
        return
    names = [name for name in names[names.index(_LAST_AT_START) + 1 :] if name.partition(".")[0] not in _SHOWN]
    inherited.update(sys.modules)
    _known.update(sys.path)
    new = [name for name in names if name not in _hidden]
    _hidden.update((name, sys.modules[name]) for name in names)
    for name in new:
        same = {other for other in _hidden if other.partition(".")[0] == name.partition(".")[0]}
        _needs[name] = sorted(_imported_by(_hidden[name]) & same)
        if "." not in name:
            _folders[name] = _folder_of(_hidden[name])
    for name in names:
        del sys.modules[name]
    _visible = len(sys.modules)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def show() -> None:
    """Undo `hide`, in a process of aiosd's own."""
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
        for name, module in _hidden.items():
            sys.modules.setdefault(name, module)


def _imported_by(module: ModuleType) -> set[str]:
    """Names of modules that this one refers to: they were imported for it, or on the way to it."""
    found = {module.__name__.rpartition(".")[0]}
    for value in list(module.__dict__.values()):
        if isinstance(value, ModuleType):
            found.add(value.__name__)
        elif isinstance(value, (type, FunctionType, BuiltinFunctionType)) and isinstance(value.__module__, str):
            found.add(value.__module__)
    return found


def _folder_of(module: ModuleType) -> str | None:
    """None where no entry of sys.path led to it (one that an installer has put elsewhere): behind all of them then."""
    file = getattr(module, "__file__", None) or ""
    folder = os.path.dirname(file)
    folder = os.path.dirname(folder) if hasattr(module, "__path__") else folder
    return folder if folder in sys.path else None


class Finder:
    """Gives hidden modules to those who import them."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        if name not in _hidden or not _is_import(sys._getframe(1)):
            return None
        top = name.partition(".")[0]
        if top != name:
            if sys.modules.get(top) is not inherited.get(top):
                return None
        elif _is_shadowed(name):
            return None
        return ModuleSpec(name, self)  # type: ignore[arg-type] # a loader by its methods

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        """The import system takes what it finds in sys.modules afterwards; the module that it has made is dropped."""
        _reveal(module.__name__)


_finder = Finder()


def _is_import(frame: object) -> bool:
    """Whether a real import asks. Others (importlib.util.find_spec, reload) want the spec of a file."""
    caller = getattr(frame, "f_back", None)  # of importlib's _find_spec
    return caller is not None and caller.f_code.co_name == "_find_and_load_unlocked"


def _reveal(name: str) -> None:
    """With all of its package that it has imported."""
    sys.modules[name] = _hidden[name]
    for needed in _needs[name]:
        if needed not in sys.modules:
            _reveal(needed)


def _is_shadowed(name: str) -> bool:
    """Whether python3 would find something else of this name before it comes to the hidden module's folder."""
    if getattr(_hidden[name].__spec__, "origin", None) in ("built-in", "frozen"):
        return False
    home = _folders[name]
    for entry in sys.path:
        if entry == home:
            return False
        if entry not in _known:
            spec = PathFinder.find_spec(name, [entry])
            if spec is not None and spec.loader is not None:  # a folder without __init__.py yields to a module
                return True
    return home is not None
