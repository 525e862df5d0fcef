"""The end of a Python agent: what python3 does when a script is over, but only for the agent's own objects.

python3 tears down every module. An agent shares most of its modules with the supervisor. Tearing those down would copy
megabytes in every agent just before they are freed, and run the supervisor's destructors on descriptors that now belong
to the agent. So the steps of `Py_FinalizeEx` are done here one by one, in the same order, and those about modules only
for the agent's own ones:

    threads joined → atexit → stdout and stderr written → the agent's modules dropped and garbage collected
    → modules that something still holds emptied, garbage collected again → files still open closed → C's exit

Exit codes are python3's: 120 if printed output could not be written.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import itertools
import os
import signal
import sys
import threading
import weakref
from _io import _IOBase, _TextIOBase  # those of `io` are abstract: a question about each type would write to it
from collections.abc import Callable, Iterator
from functools import partial
from importlib.machinery import EXTENSION_SUFFIXES
from types import ModuleType, TracebackType
from typing import Any, NoReturn

from aiosd.birth import modules

UNWRITTEN = 120
INTERRUPTED = -int(signal.SIGINT)


def leave(status: int) -> NoReturn:
    """End this process as python3 ends; `INTERRUPTED`: by that signal."""
    sys.unraisablehook = partial(_without_us, sys.unraisablehook)
    _join_threads()
    atexit._run_exitfuncs()
    written = _flush("stdout") & _flush("stderr")
    by_exit = _has_loaded_c()
    with contextlib.suppress(KeyboardInterrupt):  # the process ends anyway
        files = _write_out_files()
        exec(_NOWHERE, {"steps": _steps()})
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(BaseException):  # the script's own object may raise anything
                stream.flush()
        _close_files(files)
    if status == INTERRUPTED:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    _exit(status if written else UNWRITTEN, by_exit)


def _has_loaded_c() -> bool:
    """Whether the script has loaded C code that the supervisor has not loaded."""
    own = [str(getattr(sys.modules[name], "__file__", "")) for name in _own()]
    return "ctypes" in sys.modules or any(file.endswith(tuple(EXTENSION_SUFFIXES)) for file in own)


def _exit(status: int, by_exit: bool) -> NoReturn:
    """Call C's `exit`, which writes out buffers of C libraries, and lets these end in order. The interpreter's lock is
    held meanwhile, so that remaining threads run no more Python. If only the supervisor's C code is loaded this would
    only cost time, and is left out."""
    if by_exit:
        ctypes.PyDLL(None).exit(status & 0xFF)
    os._exit(status & 0xFF)


def _join_threads() -> None:
    try:
        threading._shutdown()  # type: ignore[attr-defined]
    except BaseException as err:  # of a thread, or Ctrl-C: python3 reports it and goes on
        unraisable(err, threading)
    threading.excepthook = _silent  # remaining threads fail, because their modules are emptied


def _silent(args: object) -> None:
    pass


def _flush(name: str) -> bool:
    """Flush; returns whether all output was written. python3 reports a failure for stdout only."""
    stream: Any = getattr(sys, name, None)
    if stream is None or _is_closed(stream):
        return True
    try:
        stream.flush()
    except BaseException as err:  # the script's own object may raise anything
        if name == "stdout":
            unraisable(err, stream)
        return False
    return True


def _is_closed(stream: Any) -> bool:
    try:
        return bool(stream.closed)
    except Exception:  # the script's own object, or a detached stream: flushing it shows the error
        return False


def _below(trace: TracebackType | None) -> TracebackType | None:
    """The traceback without the frames of this module."""
    while trace is not None and (trace.tb_frame.f_globals is globals() or trace.tb_frame.f_code is _NOWHERE):
        trace = trace.tb_next
    return trace


# ── modules ───────────────────────────────────────────────────────────────────────────────────────────────


#: In this code a warning about an object's end has the form that python3 uses after the script: `sys:1: …Warning: …`.
_NOWHERE = compile("for step in steps: step()", "sys", "exec")


def _steps() -> Iterator[Callable[[], object]]:
    """The steps that `_NOWHERE` runs; each is a function written in C, so that no frame of ours appears in reports."""
    for name in ("last_type", "last_value", "last_traceback", "last_exc"):
        yield partial(sys.__dict__.pop, name, None)
    yield gc.collect
    for name in ("stdin", "stdout", "stderr"):
        yield partial(sys.__dict__.__setitem__, name, sys.__dict__.get(f"__{name}__"))
    sys.__dict__["meta_path"] = None  # no more imports
    sys.__dict__["modules"]["warnings"] = None  # so that C shows warnings, in one line
    held = [weakref.ref(sys.modules[name]) for name in _own() if isinstance(sys.modules[name], ModuleType)]
    names: dict[str, Any] = sys.__dict__["modules"]
    for name in _own():
        yield partial(names.__setitem__, name, None)  # as python3 does
    yield gc.collect
    for reference in reversed(held):
        yield from _clearing(reference())
    yield gc.collect


def _own() -> list[str]:
    """The agent's own modules, `__main__` first. Only those that came after the last one of the supervisor are
    looked at, because each look writes to a shared page."""
    names = list(itertools.takewhile(lambda name: name != modules.last_visible or _is_own(name), reversed(sys.modules)))
    return [name for name in ("__main__", *reversed(names)) if _is_own(name)]


def _is_own(name: str) -> bool:
    module = sys.modules.get(name)
    return module is not None and modules.inherited.get(name) is not module


def _clearing(module: ModuleType | None) -> Iterator[Callable[[], object]]:
    """Private names first, as python3 does, so that objects deleted later still find the other names."""
    if module is None:
        return
    names = module.__dict__
    del module
    for private in (True, False):
        for name in list(names):
            if name != "__builtins__" and (not private or (name[:1] == "_" and name[1:2] != "_")):
                yield partial(names.__setitem__, name, None)


def _write_out_files() -> list[weakref.ref[_IOBase]]:
    """Write out all buffers now, before the order in which the collector finds the files matters: a buffer whose
    descriptor has been closed before it is lost. Returns the files, upper layers first: text, layers written in Python,
    plain buffers.

    Not if there are threads: one of them may hold a file's lock for ever, and python3 writes nothing out either."""
    if len(sys._current_frames()) > 1:
        return []
    found = [one for one in gc.get_objects() if issubclass(type(one), _IOBase)]
    found.sort(key=lambda one: (not isinstance(one, _TextIOBase), type(one).__module__ == "_io"))
    for stream in found:
        if type(stream).__module__ == "_io":
            with contextlib.suppress(BaseException):  # python3 is silent there too
                stream.flush()
    return [weakref.ref(stream) for stream in found]


def _close_files(files: list[weakref.ref[_IOBase]]) -> None:
    """Close files that an object of the supervisor still refers to, for example a module of the library."""
    for reference in files:
        stream = reference()
        if stream is not None:
            with contextlib.suppress(BaseException):  # python3 is silent there too
                stream.close()


# ── reports ───────────────────────────────────────────────────────────────────────────────────────────────


def _hook_arguments() -> Any:
    """The type of the argument of `sys.unraisablehook`. It has no public name, so it is taken from a real one."""
    seen: list[Any] = []

    class Faulty:
        def __del__(self) -> None:
            raise RuntimeError

    hook, sys.unraisablehook = sys.unraisablehook, lambda args: seen.append(type(args))
    try:
        Faulty()
    finally:
        sys.unraisablehook = hook
    return seen[0]


_HookArguments = _hook_arguments()


def unraisable(err: BaseException, source: object) -> None:
    """`Exception ignored in: …`, as the interpreter reports what it cannot raise."""
    with contextlib.suppress(BaseException):  # the script may have replaced the hook
        sys.unraisablehook(_HookArguments((type(err), err, err.__traceback__, None, source)))


def _without_us(hook: Callable[[Any], object], args: Any) -> None:
    trace = _below(args.exc_traceback)
    hook(_HookArguments((args.exc_type, args.exc_value, trace, args.err_msg, args.object)))
