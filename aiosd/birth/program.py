"""What an agent runs: a Python script, a module, or a program of another kind.

A script and a module run in this very process, as `python FILE` and `python -m MODULE` would run them: `__main__`,
sys.argv and sys.path as there, the same exit codes and tracebacks, and the same end (threads joined, atexit, buffers
written).
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from types import CodeType, ModuleType

from aiosd import link

#: Exit codes of an agent that could not be started, as in a shell.
CANNOT_EXECUTE = 126
NOT_FOUND = 127


def cannot(spec: link.Fork, why: str, code: int) -> int:
    print(f"aios-run: {spec.target}: {why}" if not why.startswith(spec.cwd) else f"aios-run: {why}", file=sys.stderr)
    return code


def _exec(spec: link.Fork) -> int:
    return _execute(spec, spec.target)


def _execute(spec: link.Fork, program: str) -> int:
    # What Python ignores or has changed must be as a program expects it.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        os.execvpe(program, [program, *spec.args], os.environ)
    except FileNotFoundError:
        return cannot(spec, _what_is_missing(program if "/" in program else _in_path(spec)), NOT_FOUND)
    except OSError as err:
        return cannot(spec, err.strerror or str(err), CANNOT_EXECUTE)


def _what_is_missing(program: str | None) -> str:
    """Where Linux says no more than that there is no such file."""
    try:
        with open(program or "", "rb") as file:
            interpreter = _interpreter(file.read(256)).split(" ")[0]
    except OSError:
        return "not found"
    return f"its interpreter {interpreter or 'or loader'} was not found"


def _interpreter(source: bytes) -> str:
    """What the first line of a script names; whatever else is on it, such as a CR, belongs to the name."""
    line = source.partition(b"\n")[0]
    return os.fsdecode(line[2:].strip(b" ")) if line.startswith(b"#!") else ""


def _run_file(spec: link.Fork) -> int:
    path = os.path.join(spec.cwd, spec.target)
    try:
        with open(path, "rb") as file:
            source = file.read()
            folder = os.path.dirname(os.readlink(f"/proc/self/fd/{file.fileno()}"))  # links resolved, at no cost
    except FileNotFoundError as err:
        hint = f"; for the program: aios-run -- {spec.target}" if "/" not in spec.target and _in_path(spec) else ""
        return cannot(spec, f"{err.strerror}{hint}", NOT_FOUND)
    except OSError as err:
        return cannot(spec, err.strerror or str(err), CANNOT_EXECUTE)
    if not spec.target.endswith(".py") and _is_for_others(source):
        if not os.access(path, os.X_OK):
            return cannot(spec, "is no Python script, and not executable", CANNOT_EXECUTE)
        return _execute(spec, path)
    main = _new_main(spec, folder)
    main.__file__ = path if os.path.isabs(spec.target) else os.path.normpath(path)
    return _run(lambda: compile(source, main.__file__ or "", "exec", dont_inherit=True), main)


def _is_for_others(source: bytes) -> bool:
    """Whether it is a program, or a script of another language."""
    interpreter = _interpreter(source)
    return source.startswith(b"\x7fELF") or (bool(interpreter) and "python" not in interpreter)


def _in_path(spec: link.Fork) -> str | None:
    folders = spec.env.get("PATH", "").split(os.pathsep)
    return next((path for f in folders if f and os.access(path := os.path.join(f, spec.target), os.X_OK)), None)


def _run_module(spec: link.Fork) -> int:
    main = _new_main(spec, spec.cwd)
    try:
        found = importlib.util.find_spec(spec.target)
        if found is not None and found.submodule_search_locations is not None:
            found = importlib.util.find_spec(spec.target + ".__main__")
    except (ImportError, ValueError, AttributeError) as err:
        return cannot(spec, str(err), NOT_FOUND)
    if found is None or found.loader is None or not hasattr(found.loader, "get_code"):
        return cannot(spec, f"No module named {spec.target}", NOT_FOUND)
    sys.argv[0] = main.__file__ = found.origin or spec.target
    main.__spec__, main.__loader__, main.__package__ = found, found.loader, found.parent
    return _run(lambda: found.loader.get_code(found.name), main)  # type: ignore[union-attr]


RUN: dict[str, Callable[[link.Fork], int]] = {"file": _run_file, "module": _run_module, "exec": _exec}


def _new_main(spec: link.Fork, first_path: str) -> ModuleType:
    """A fresh `__main__`, with sys.argv and sys.path as `python TARGET` would have them."""
    main = ModuleType("__main__")
    main.__dict__.update(__builtins__=__builtins__, __spec__=None, __annotations__={})
    sys.modules["__main__"] = main
    if sys.path and sys.path[0] == os.path.dirname(os.path.realpath(sys.argv[0])):
        del sys.path[0]  # the folder of aiosd's own script
    sys.argv = [spec.target, *spec.args]
    python_path = spec.env.get("PYTHONPATH", "")
    if python_path:
        sys.path[:0] = [entry for entry in python_path.split(os.pathsep) if entry and entry not in sys.path]
    sys.path.insert(0, first_path)
    return main


def _run(code: Callable[[], CodeType], main: ModuleType) -> int:
    """Run code as `__main__` the way the interpreter does: exit codes, traceback, threads, atexit, flush."""
    try:
        exec(code(), main.__dict__)
        status = 0
    except SystemExit as err:
        status = _exit_code(err.code)
    except KeyboardInterrupt:
        _print_exception()
        status = -signal.SIGINT
    except BaseException:
        _print_exception()
        status = 1
    status = _finalize(status)
    if status < 0:  # die of the signal, so that whoever waits sees it as such
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return status


def _exit_code(code: object) -> int:
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    print(code, file=sys.stderr)
    return 1


def _print_exception() -> None:
    """Show the traceback without the frames of this module and of the supervisor below them."""
    kind, value, trace = sys.exc_info()
    assert kind is not None
    assert value is not None
    while trace is not None and trace.tb_frame.f_globals is globals():
        trace = trace.tb_next
    sys.excepthook(kind, value.with_traceback(trace), trace)


def _finalize(status: int) -> int:
    threading = sys.modules.get("threading")
    try:
        if threading is not None:
            threading._shutdown()
        atexit._run_exitfuncs()
    except BaseException:
        _print_exception()
    try:
        sys.stdout.flush()
    except OSError:
        status = status or 120  # as the interpreter does
    return status
