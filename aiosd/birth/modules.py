"""Which modules an agent finds imported: those of a fresh `python3`, and the others when it imports them.

The supervisor has imported some hundred modules before it forks agents, and an agent should not import them again,
because it shares their memory. But a script expects that its own `token.py` is imported instead of the library's, as
with python3, and a module that is already in `sys.modules` is used before any file. So the supervisor's modules are
hidden: removed from `sys.modules`, kept alive here, and returned on import by a finder in front of all others.

    invariant: the finder returns a hidden module only where python3 would have found the same file: no folder that is
    before the module's own in `sys.path`, and that the supervisor does not have, contains another module of that name

Together with a module, those modules of its own package that it has imported become visible. It already refers to
modules of other packages, which stay hidden until the script imports them: each module that enters `sys.modules` costs
the agent a page of memory. Modules that python3 itself has loaded when a script begins are never hidden: with python3,
too, a script's file does not replace them.

`hide` is called once in the supervisor, before the first fork, and again if something was imported since. The kernel
and the llm cores undo it (`show`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import BuiltinFunctionType, FunctionType, ModuleType

_LAST_AT_START = "site"  # the last import of python3 before a script begins; sys.modules is in order of imports

#: Modules that nearly every agent imports stay visible: the finder would cost each agent memory and time.
_SHOWN = ("libaios", "msgspec")

#: All modules that the supervisor has imported, hidden or not. All others are an agent's own.
inherited: dict[str, ModuleType] = {}
_hidden: dict[str, ModuleType] = {}
_needs: dict[str, list[str]] = {}  # modules of its own package that a hidden module has imported
_folders: dict[str, str | None] = {}  # the entry of sys.path where a hidden module outside packages was found
_known: set[str] = set()  # sys.path when modules were hidden
_visible = 0  # how many modules were left in sys.modules
last_visible = ""  # the last of them; what an agent imports comes after it


def hide() -> None:
    """Remove from `sys.modules` the modules that a fresh python3 does not have."""
    global _visible, last_visible
    if len(sys.modules) == _visible:
        return
    names = list(sys.modules)
    if _LAST_AT_START not in names:  # python -S: the interpreter's own modules are unknown
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
    _visible, last_visible = len(sys.modules), next(reversed(sys.modules), "")
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def share() -> None:
    """In a template: make all that it has imported visible to its agents, as shared modules."""
    global last_visible
    inherited.update(sys.modules)
    last_visible = next(reversed(sys.modules))


def show() -> None:
    """Undo `hide`, in one of aiosd's own processes."""
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
        for name, module in _hidden.items():
            sys.modules.setdefault(name, module)


def _imported_by(module: ModuleType) -> set[str]:
    """Names of the modules that this one refers to, which includes those that it has imported."""
    found = {module.__name__.rpartition(".")[0]}
    for value in list(module.__dict__.values()):
        if isinstance(value, ModuleType):
            found.add(value.__name__)
        elif isinstance(value, (type, FunctionType, BuiltinFunctionType)) and isinstance(value.__module__, str):
            found.add(value.__module__)
    return found


def _folder_of(module: ModuleType) -> str | None:
    """The entry of sys.path where it was found; None: in none (an installer put it elsewhere), so after all of them."""
    file = getattr(module, "__file__", None) or ""
    folder = os.path.dirname(file)
    folder = os.path.dirname(folder) if hasattr(module, "__path__") else folder
    return folder if folder in sys.path else None


class HiddenFinder:
    """Returns hidden modules when they are imported."""

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
        """The import system uses the module that is in sys.modules afterwards, and drops the one that it created."""
        _reveal(module.__name__)


_finder = HiddenFinder()


def _is_import(frame: object) -> bool:
    """Whether the caller is a real import. Others (importlib.util.find_spec, reload) need the spec of a file."""
    caller = getattr(frame, "f_back", None)  # of importlib's _find_spec
    return caller is not None and caller.f_code.co_name == "_find_and_load_unlocked"


def _reveal(name: str) -> None:
    """Make a module visible, with the modules of its package that it has imported."""
    sys.modules[name] = _hidden[name]
    for needed in _needs[name]:
        if needed not in sys.modules:
            _reveal(needed)


def _is_shadowed(name: str) -> bool:
    """Whether python3 would find another module of this name before the hidden module's folder."""
    if getattr(_hidden[name].__spec__, "origin", None) in ("built-in", "frozen"):
        return False
    home = _folders[name]
    for entry in sys.path:
        if entry == home:
            return False
        if entry not in _known:
            spec = PathFinder.find_spec(name, [entry])
            if spec is not None and spec.loader is not None:  # a module wins over a folder without __init__.py
                return True
    return home is not None
