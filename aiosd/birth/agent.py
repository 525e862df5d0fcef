"""From a forked child to an agent.

It is made in this order: session, subreaper → descriptors → umask, limits, streams, environment, folder → the
program (`program`). An agent is a child subreaper, so that whatever it starts, however often that forks, stays below it
in the process tree as long as it lives, and falls to the supervisor (which ends it) when it dies: ownership of
every process is certain without asking its environment.

Most of an agent's memory is pages that it shares with the supervisor; what is written to is copied. Several lines below
are the way they are for that reason, and say so.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import io
import itertools
import logging
import os
import resource
import sys
import time

from aiosd import link
from aiosd.birth import program
from aiosd.birth.fork import (
    LIBC,
    PR_SET_CHILD_SUBREAPER,
    keep_only,
    malloc,
    name_process,
    prctl,
    write_proc,
)
from libaios import wire


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
        return program.cannot(spec, f"{spec.cwd}: {err.strerror}", program.CANNOT_EXECUTE)
    _lower_oom_protection()
    gc.enable()
    _reset_logging()
    _register_exit_functions()
    return program.RUN[spec.kind](spec)


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
    write_proc("/proc/self/oom_score_adj", b"1000")


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
    start = malloc(array_bytes + sum(map(len, strings)))
    places = itertools.accumulate(map(len, strings), initial=start + array_bytes)
    pointers = [place.to_bytes(POINTER_BYTES, sys.byteorder) for place in places]
    pointers[-1] = bytes(POINTER_BYTES)  # where the next string would begin: the array's end
    block = b"".join((*pointers, *strings))
    ctypes.memmove(start, block, len(block))
    _kept.append(os.environ._data)  # type: ignore[attr-defined]
    os.environ._data = os.environb._data = encoded  # type: ignore[attr-defined]
    _environ.value = start


POINTER_BYTES = ctypes.sizeof(ctypes.c_void_p)
_environ = ctypes.c_void_p.in_dll(LIBC, "environ")
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
