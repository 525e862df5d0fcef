"""Forking, and what happens in a child before its own code runs.

Only the supervisor forks. Every child of it leaves through `fork()` below, whose child branch ends in
`os._exit`, so that neither the supervisor's `finally` blocks nor its `atexit` handlers ever run in a child.
A child keeps exactly the descriptors it is told to keep, and starts with default signal handlers, a session
of its own, and a parent-death signal.

An agent is made in this order: fork → session, subreaper, death signal → descriptors → environment, folder,
umask, limits → `run_file`, `run_module` or `exec`. It is a child subreaper, so that whatever it starts, however
often that forks, stays below it in the process tree as long as it lives, and falls to the supervisor (which
ends it) when it dies: ownership of every process is certain without asking its environment.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found] # C, without stubs; see SIGNALS
import atexit
import contextlib
import ctypes
import gc
import importlib.util
import io
import itertools
import logging
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from types import CodeType, ModuleType
from typing import NoReturn

from aiosd import link, procfs
from libaios import wire

logger = logging.getLogger("spawn")

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

#: All of them, as plain numbers. The functions of `signal` make enum members of every number and handler they see,
#: which would write to half a megabyte of memory that a new agent shares with the supervisor; `_signal` does not.
SIGNALS = tuple(map(int, signal.valid_signals()))

_libc = ctypes.CDLL(None, use_errno=True)
SYS_PIDFD_GETFD = 438

#: Exit codes of an agent that could not be started, as in a shell.
CANNOT_EXECUTE = 126
NOT_FOUND = 127


def prctl(option: int, argument: int) -> None:
    if _libc.prctl(option, argument, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def pidfd_getfd(ospid: int, number: int) -> int:
    """A duplicate of descriptor `number` of another process; OSError where Linux forbids it."""
    pidfd = os.pidfd_open(ospid)
    try:
        copy = _libc.syscall(SYS_PIDFD_GETFD, pidfd, number, 0)
        if copy < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
        return int(copy)
    finally:
        os.close(pidfd)


def fork(child: Callable[[], int]) -> int:
    """Fork; the child runs `child` and exits with what it returns. Returns the child's pid in the parent."""
    parent = os.getpid()
    # Signals that come between the fork and the reset of the handlers must not run the parent's handlers.
    old = _signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        ospid = _fork()
        if ospid == 0:
            _in_child(child, parent)
        return ospid
    finally:
        _signal.pthread_sigmask(signal.SIG_SETMASK, old)


def _fork() -> int:
    """`os.fork` without what `threading` does in the child after it. That repairs the books and locks of a process
    whose other threads are gone. Where there was but one thread they are in order, and it would write to memory that
    all agents share (0.1 to 0.4 MB each). Whoever has threads keeps the repair, and so do the child's own forks."""
    repair = getattr(threading, "_after_fork", None)
    if repair is None or len(threading._active) > 1:  # type: ignore[attr-defined]
        return os.fork()
    code = repair.__code__
    repair.__code__ = _nothing.__code__
    try:
        return os.fork()
    finally:
        repair.__code__ = code


def _nothing() -> None:
    pass


def _in_child(child: Callable[[], int], parent: int) -> NoReturn:
    code = 70  # EX_SOFTWARE: what a child leaves with when even its own error handling fails
    try:
        gc.freeze()  # what it has inherited is not this process's to collect
        atexit._clear()
        signal.set_wakeup_fd(-1)
        reset_signals()
        die_with_parent(parent, signal.SIGKILL)
        _signal.pthread_sigmask(signal.SIG_SETMASK, ())
        code = child()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):  # a broken stderr must not keep the child from leaving
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def name_process(name: str) -> None:
    """What top and `ps -e` show; 15 bytes at most."""
    _write("/proc/self/comm", name.encode("utf-8", "surrogateescape")[:15])


def _write(path: str, data: bytes) -> None:
    """Into a file of /proc, if Linux lets us."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        os.write(fd, data)
    except OSError:
        pass
    finally:
        os.close(fd)


def die_with_parent(parent: int, number: int) -> None:
    """Ask for a signal at the parent's death, and notice a parent that is dead already."""
    prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def reset_signals() -> None:
    for number in SIGNALS:
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            _signal.signal(number, _signal.SIG_DFL)
    _signal.signal(signal.SIGINT, signal.default_int_handler)
    _signal.signal(signal.SIGPIPE, _signal.SIG_IGN)  # as Python starts: EPIPE becomes an exception


def describe(status: int) -> str:
    """An exit status (as of os.waitstatus_to_exitcode) in words."""
    if status >= 0:
        return f"exit code {status}"
    try:
        return f"signal {signal.Signals(-status).name}"
    except ValueError:  # a real-time signal
        return f"signal {-status}"


def sweep(patience_s: float = 5.0, meanwhile: Callable[[], None] = lambda: None) -> None:
    """KILL everything below this process until nothing is left, and collect it. What is killed may have forked
    meanwhile, and what that made falls to us as subreaper: hence the loop. `meanwhile` is called in each round.

    Some processes KILL does not end: one that has become another user's (setuid), one that a driver or a dead disk
    holds. They are given up, and named in the log, when for `patience_s` there has been nothing else: waiting for
    them would keep the lock and the socket for as long as they please."""
    pause_s = waited_s = 0.0  # what was slept, not what a clock says: while we were stopped ourselves nobody could die
    while True:
        killed = [victim for victim in procfs.descendants(os.getpid()) if _kill(victim)]
        if any(map(_runs, killed)):  # on its way out, however long that takes: a model is many pages to give back
            waited_s = 0.0
        meanwhile()
        try:
            collected = _collect()
        except ChildProcessError:
            return
        if waited_s >= patience_s:
            left = ", ".join(f"{ospid} ({procfs.name(ospid)})" for ospid in procfs.descendants(os.getpid()))
            logger.error("cannot be killed and left behind: %s", left)
            return
        pause_s = SHORTEST_PAUSE_S if collected else min(max(2 * pause_s, SHORTEST_PAUSE_S), LONGEST_PAUSE_S)
        time.sleep(pause_s)
        waited_s += pause_s


SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.001, 0.05


def _kill(ospid: int) -> bool:
    """Whether KILL may be sent to it."""
    try:
        os.kill(ospid, signal.SIGKILL)
    except PermissionError:
        return False
    except ProcessLookupError:
        pass
    return True


def _runs(ospid: int) -> bool:
    """Whether a thread of it is on a processor, or would like to be; the first thread may have ended before others."""
    try:
        threads = os.listdir(f"/proc/{ospid}/task")
    except OSError:
        return False
    return any((stat := procfs.read_stat(int(thread))) is not None and stat.state == "R" for thread in threads)


def _collect() -> bool:
    """Collect the dead; whether there were any. ChildProcessError when no child is left."""
    any_dead = False
    while os.waitpid(-1, os.WNOHANG)[0]:
        any_dead = True
    return any_dead


def tidy_heap() -> None:
    """Before many forks: have the C library merge and sort its free blocks once here, instead of in every child."""
    _libc.malloc_trim(0)
    _libc.free(ctypes.c_void_p(_malloc(1 << 16)))


_malloc = _libc.malloc
_malloc.restype = ctypes.c_void_p


def keep_only(keep: Iterable[int]) -> None:
    """Close every descriptor from 3 up that is not in `keep`."""
    low = 3
    for fd in sorted({fd for fd in keep if fd >= 3}):
        if fd > low:
            os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, 1 << 30)


# ── agents ────────────────────────────────────────────────────────────────────────────────────────────────


def become_agent(spec: link.Fork, pid: int, home: str, stdio: tuple[int, int, int], memfd: int, bell: int) -> int:
    """In the forked child: turn into the agent, run its code, return its exit code."""
    os.setsid()
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    stdio, memfd, bell = _above_stdio(stdio, memfd, bell)
    for number, fd in enumerate(stdio):
        os.dup2(fd, number, inheritable=True)
    keep_only((memfd, bell))
    for fd in (memfd, bell):
        os.set_inheritable(fd, True)  # they survive exec; ENV_CHANNEL says whose they are
    name_process(spec.name)
    if spec.tty:
        _take_terminal()
    os.umask(spec.umask)
    _restore_nofile()
    _reopen_streams(spec)
    _set_environment(spec, pid, home, memfd, bell)
    try:
        os.chdir(spec.cwd)
    except OSError as err:
        return _cannot(spec, f"{spec.cwd}: {err.strerror}", CANNOT_EXECUTE)
    _lower_oom_protection()
    gc.enable()
    _reset_logging()
    _register_exit_functions()
    return _RUN[spec.kind](spec)


def _above_stdio(stdio: tuple[int, int, int], memfd: int, bell: int) -> tuple[tuple[int, int, int], int, int]:
    """Move descriptors that lie at 0–2 (the supervisor may have been started without stdio) out of the way."""

    def up(fd: int) -> int:
        while fd < 3:
            fd = os.dup(fd)
        return fd

    return (up(stdio[0]), up(stdio[1]), up(stdio[2])), up(memfd), up(bell)


def _take_terminal() -> None:
    import fcntl
    import termios

    with contextlib.suppress(OSError):  # stdin is no terminal after all: the agent has none then
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _restore_nofile() -> None:
    """Python and aiosd raise the soft limit; programs that use select() need the usual one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))


def _lower_oom_protection() -> None:
    """When memory runs out agents go before the system does, the largest first: also where a model holds most of it."""
    _write("/proc/self/oom_score_adj", b"1000")


def _reopen_streams(spec: link.Fork) -> None:
    """Fresh sys.std* on the agent's own descriptors: those inherited hold the supervisor's buffers. What goes to a log
    is written line by line, as somebody may be reading along."""
    streams = {  # they live as long as the process: no context manager
        "stdin": open(0, encoding="utf-8", errors="surrogateescape", closefd=False),  # noqa: SIM115
        "stdout": _stdout(spec),
        "stderr": open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False),  # noqa: SIM115
    }
    _kept.append((sys.stdin, sys.stdout, sys.stderr))  # freeing them would write to what all agents share
    for name, stream in streams.items():
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _stdout(spec: link.Fork) -> io.TextIOWrapper:
    unbuffered = bool(spec.env.get("PYTHONUNBUFFERED"))  # as `python -u` has it
    out = open(1, "wb", buffering=0 if unbuffered else -1, closefd=False)  # noqa: SIM115
    by_lines = spec.detached or os.isatty(1)
    text = io.TextIOWrapper(
        out, encoding="utf-8", errors="surrogateescape", line_buffering=by_lines, write_through=unbuffered
    )
    text.mode = "w"  # type: ignore[misc] # as open() and the interpreter set it
    return text


def _set_environment(spec: link.Fork, pid: int, home: str, memfd: int, bell: int) -> None:
    environment = dict(spec.env)
    environment[wire.ENV_HOME] = home
    environment[wire.ENV_PID] = str(pid)
    environment[wire.ENV_CHANNEL] = f"{memfd}:{bell}:{os.getpid()}"
    _replace_environment(environment)
    if "TZ" in spec.env:
        time.tzset()


def _replace_environment(new: dict[str, str]) -> None:
    """As `os.environ.clear()` and `update()`, but the C library's array is made in one piece, and nothing is freed: the
    old strings lie on a hundred pages that all agents share."""
    encoded = {
        key.encode("utf-8", "surrogateescape"): value.encode("utf-8", "surrogateescape") for key, value in new.items()
    }
    strings = [name + b"=" + value + b"\0" for name, value in encoded.items()]
    # Plain bytes in plain memory: an array of ctypes would be a new type for each size.
    array_bytes = (len(strings) + 1) * POINTER_BYTES
    start = _malloc(array_bytes + sum(map(len, strings)))
    places = itertools.accumulate(map(len, strings), initial=start + array_bytes)
    pointers = [place.to_bytes(POINTER_BYTES, sys.byteorder) for place in places]
    pointers[-1] = bytes(POINTER_BYTES)  # where the next string would begin: the array's end
    block = b"".join((*pointers, *strings))
    ctypes.memmove(start, block, len(block))
    _kept.append(os.environ._data)  # type: ignore[attr-defined]
    os.environ._data = os.environb._data = encoded  # type: ignore[attr-defined]
    _environ.value = start


POINTER_BYTES = ctypes.sizeof(ctypes.c_void_p)
_environ = ctypes.c_void_p.in_dll(_libc, "environ")
_kept: list[object] = []


def _reset_logging() -> None:
    """Logging as at the start of an interpreter, without the supervisor's handler."""
    _kept.append(logging.root.handlers)
    logging.root.handlers = []
    logging.root.level = logging.WARNING  # not `setLevel`: that clears the caches of all loggers
    logging.root._cache.clear()  # type: ignore[attr-defined]
    logging.raiseExceptions = True


def _register_exit_functions() -> None:
    """What the standard library had registered in the supervisor and an agent expects: `fork` cleared it."""
    for module, name in (("logging", "shutdown"), ("multiprocessing.util", "_exit_function")):
        if module in sys.modules:
            atexit.register(getattr(sys.modules[module], name))


def _cannot(spec: link.Fork, why: str, code: int) -> int:
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
        return _cannot(spec, _what_is_missing(program if "/" in program else _in_path(spec)), NOT_FOUND)
    except OSError as err:
        return _cannot(spec, err.strerror or str(err), CANNOT_EXECUTE)


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
        return _cannot(spec, f"{err.strerror}{hint}", NOT_FOUND)
    except OSError as err:
        return _cannot(spec, err.strerror or str(err), CANNOT_EXECUTE)
    if not spec.target.endswith(".py") and _is_for_others(source):
        if not os.access(path, os.X_OK):
            return _cannot(spec, "is no Python script, and not executable", CANNOT_EXECUTE)
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
        return _cannot(spec, str(err), NOT_FOUND)
    if found is None or found.loader is None or not hasattr(found.loader, "get_code"):
        return _cannot(spec, f"No module named {spec.target}", NOT_FOUND)
    sys.argv[0] = main.__file__ = found.origin or spec.target
    main.__spec__, main.__loader__, main.__package__ = found, found.loader, found.parent
    return _run(lambda: found.loader.get_code(found.name), main)  # type: ignore[union-attr]


_RUN: dict[str, Callable[[link.Fork], int]] = {"file": _run_file, "module": _run_module, "exec": _exec}


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
