"""From a forked child to an agent.

The steps, in this order: prepared (session, subreaper) → its letter read → named → confined (`sandbox`) → folder and
program looked up, and that reported (`report`) → descriptors → umask, limits, environment, streams → the program
(`program`). A confined agent's own program is looked up with no more rights than the agent has.

An agent is a child subreaper, so that every process it starts, however often that forks, stays below it in the process
tree while the agent lives, and becomes a child of the supervisor (which ends it) when the agent dies: so the owner of
every process is certain, without looking at its environment.

Most of an agent's memory is pages that it shares with the supervisor; a page that is written to is copied. Several
lines below avoid writing for that reason; their comments mark that. For the same reason functions of modules that
agents seldom use are imported by name: a lookup in a module writes to the module, its dictionary and the name.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
import time
from array import array
from atexit import register
from ctypes import memmove
from dataclasses import dataclass
from gc import enable
from io import TextIOWrapper
from itertools import accumulate
from multiprocessing.util import _exit_function  # type: ignore[attr-defined]
from resource import RLIM_INFINITY, RLIMIT_NOFILE, getrlimit, setrlimit
from typing import Any
from weakref import finalize

import msgspec

from aiosd.birth import confinement, program, title
from aiosd.birth.fork import (
    keep_only,
    malloc,
    name_process,
    write_proc,
)
from aiosd.birth.report import Report
from aiosd.budgets.limits import bounds
from aiosd.ipc import letter, link
from aiosd.ipc.letter import Letter
from aiosd.kin import LIBC, adopt_orphans
from libaios import wire

NAMES = 64  # most arguments whose links are made available in the cage


@dataclass(slots=True)
class Descriptors:
    """The descriptors of a new agent: stdin, stdout, stderr, its channel, its letter, and that for its report."""

    stdio: tuple[int, int, int]
    memfd: int
    bell: int
    letter: int
    report: int


def prepare() -> None:
    """The first steps of any agent. A spare takes them before it is known which agent it becomes."""
    os.setsid()
    adopt_orphans()
    _lower_oom_protection()


def become_agent(spec: link.Fork, pid: int, home: str, fds: Descriptors, keeps_library: bool = False) -> int:
    """In the prepared child: turn into the agent, run its code, return its exit code. `keeps_library`: what the
    standard library has stored before the fork is the agent's, too: modules that it would import have stored it."""
    _above_stdio(fds)
    content = with_bytes(letter.read(fds.letter))
    report = Report(fds.report)
    name_process(spec.name)
    try:
        if content.box is not None:
            terminal = _terminal(fds.stdio[0]) if spec.tty else ""
            names = (content.target, *content.args[:NAMES])
            confinement.enter(content.box, report, fds.stdio[1:], terminal, names)
        content = _enter_folder(content)
        found = program.find(content)
    except OSError as err:
        return report.refuse(err, err.strerror or str(err))
    if found.is_python:
        report.ready(fds.bell)  # before the rest, because the parent waits for it
    _take_descriptors(fds)
    if spec.tty:
        _take_terminal()
    os.umask(spec.umask)
    _restore_nofile()
    _bound(spec)
    _set_environment(content, pid, home, fds)
    _reopen_streams(spec)
    enable()
    if not keeps_library:
        _reset_library()
        _register_exit_functions()

    return found.run(found, report)


def with_bytes(content: Letter) -> Letter:
    """With bytes that are no UTF-8 in Python's form; `wire.os_text` is the form in which they were sent."""
    if not any(text[:1] == "\0" for text in (content.target, content.cwd, *content.args)):
        return content
    args = [wire.os_str(arg) for arg in content.args]
    return msgspec.structs.replace(content, target=wire.os_str(content.target), cwd=wire.os_str(content.cwd), args=args)


def _enter_folder(content: Letter) -> Letter:
    """Enter the agent's working directory. A confined agent that cannot read it begins in its workspace."""
    try:
        if content.box is not None:
            return confinement.enter_folder(content)
        os.chdir(content.cwd)
    except OSError as err:
        raise OSError(err.errno, f"{content.cwd}: {err.strerror}") from None
    return content


def _above_stdio(fds: Descriptors) -> None:
    """Move descriptors at 0–2 away: the supervisor may have been started without stdio."""

    def up(fd: int) -> int:
        while fd < 3:
            fd = os.dup(fd)
        return fd

    fds.stdio = (up(fds.stdio[0]), up(fds.stdio[1]), up(fds.stdio[2]))
    fds.memfd, fds.bell, fds.letter, fds.report = up(fds.memfd), up(fds.bell), up(fds.letter), up(fds.report)


def _take_descriptors(fds: Descriptors) -> None:
    for number, fd in enumerate(fds.stdio):
        os.dup2(fd, number, inheritable=True)
    keep_only((fds.memfd, fds.bell, fds.report))
    for fd in (fds.memfd, fds.bell):
        os.set_inheritable(fd, True)  # they survive exec; ENV_CHANNEL names their owner


def _terminal(fd: int) -> str:
    """The path of the terminal, if the descriptor is one; "": it is not."""
    with contextlib.suppress(OSError):
        return os.ttyname(fd)
    return ""


def _take_terminal() -> None:
    import fcntl
    import termios

    with contextlib.suppress(OSError):  # stdin is no terminal after all: then the agent has none
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _restore_nofile() -> None:
    """Python and aiosd raise the soft limit; programs that use select() need the usual one."""
    _, hard = getrlimit(RLIMIT_NOFILE)
    setrlimit(RLIMIT_NOFILE, (min(1024, hard), hard))


def _bound(spec: link.Fork) -> None:
    """Set the limits that Linux enforces for its budgets, in each of its processes. Only root could raise them
    again."""
    for which, amount in bounds(share.limits for share in spec.shares):
        _, hard = getrlimit(which)
        amount = amount if hard == RLIM_INFINITY else min(amount, hard)
        setrlimit(which, (amount, amount))


def _lower_oom_protection() -> None:
    """When memory runs out Linux kills agents before the system, the largest first, even if a model uses most of it."""
    write_proc("/proc/self/oom_score_adj", b"1000")


def _reopen_streams(spec: link.Fork) -> None:
    """New sys.std* on the agent's own descriptors, because those inherited hold the supervisor's buffers. A log is
    written line by line, because a user may be following it."""
    streams = {  # they live as long as the process: no context manager
        "stdin": open(0, encoding="utf-8", errors="surrogateescape", closefd=False),  # noqa: SIM115
        "stdout": _stdout(spec),
        "stderr": open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False),  # noqa: SIM115
    }
    for name, stream in streams.items():
        raw: Any = getattr(stream.buffer, "raw", stream.buffer)
        raw.name = f"<{name}>"  # the name in error messages
    _kept.append((sys.stdin, sys.stdout, sys.stderr))  # not freed, because that would write to shared pages
    for name, stream in streams.items():
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _stdout(spec: link.Fork) -> TextIOWrapper:
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))  # as with `python -u`
    out = open(1, "wb", buffering=0 if unbuffered else -1, closefd=False)  # noqa: SIM115
    by_lines = spec.detached or os.isatty(1)
    text = TextIOWrapper(
        out, encoding="utf-8", errors="surrogateescape", line_buffering=by_lines, write_through=unbuffered
    )
    text.mode = "w"  # type: ignore[misc] # as open() and the interpreter do
    return text


def _set_environment(content: Letter, pid: int, home: str, fds: Descriptors) -> None:
    environment, command_line = environment_of(content, pid, home, fds.memfd, fds.bell)
    _replace_environment(environment, command_line)
    if "TZ" in content.env:
        time.tzset()


def environment_of(content: Letter, pid: int, home: str, memfd: int, bell: int) -> tuple[dict[bytes, bytes], bytes]:
    """An agent's environment, and its command line with a NUL after each word."""
    environment = _encoded(content.env)
    environment[wire.ENV_HOME.encode()] = os.fsencode(home)
    environment[wire.ENV_PID.encode()] = str(pid).encode()
    environment[wire.ENV_CHANNEL.encode()] = f"{memfd}:{bell}:{os.getpid()}".encode()
    return environment, b"".join(os.fsencode(word) + b"\0" for word in program.command_line(content))


def _encoded(env: dict[str, str]) -> dict[bytes, bytes]:
    """As `wire.os_bytes` makes them of names and values; all at once, where each is text."""
    texts = [*env, *env.values()]
    together = "\0".join(texts)
    if together.count("\0") >= len(texts):
        return {wire.os_bytes(name): wire.os_bytes(value) for name, value in env.items()}
    encoded = together.encode("utf-8", "surrogateescape").split(b"\0")
    return dict(zip(encoded[: len(env)], encoded[len(env) :], strict=False))  # of nothing, `split` makes one


def _replace_environment(encoded: dict[bytes, bytes], command_line: bytes) -> None:
    """As `os.environ.clear()` and `update()`, but the C library's array is one piece of memory, and nothing is freed,
    because the old strings lie on a hundred pages that all agents share. Linux shows that piece in /proc from now
    on."""
    strings = [name + b"=" + value + b"\0" for name, value in encoded.items()]
    # Not a ctypes array: that would be a new type for each size.
    array_bytes = (len(strings) + 1) * POINTER_BYTES
    start = malloc(array_bytes + sum(map(len, strings)) + len(command_line))
    pointers = array("L", accumulate(map(len, strings), initial=start + array_bytes))  # an address each
    pointers[-1] = 0  # where the next string would begin: the array's end
    block = b"".join((pointers, *strings, command_line))
    memmove(start, block, len(block))
    _kept.append(os.environ._data)  # type: ignore[attr-defined]
    os.environ._data = os.environb._data = encoded  # type: ignore[attr-defined]
    _environ.value = start
    strings_end = start + len(block) - len(command_line)
    title.show((strings_end, start + len(block)), (start + array_bytes, strings_end))


POINTER_BYTES = ctypes.sizeof(ctypes.c_void_p)
_environ = ctypes.c_void_p.in_dll(LIBC, "environ")
_kept: list[object] = []


def _reset_library() -> None:
    """Reset what standard library modules have stored in the supervisor, as at the start of an interpreter."""
    _kept.append(logging.root.handlers)
    logging.root.handlers = []
    logging.root.level = logging.WARNING  # not `setLevel`: that clears the caches of all loggers
    logging.root._cache.clear()  # type: ignore[attr-defined]
    logging.raiseExceptions = True
    _kept.append(finalize._registry)  # type: ignore[attr-defined]
    finalize._registry = {}  # type: ignore[attr-defined]
    finalize._registered_with_atexit = False  # type: ignore[attr-defined]


def _register_exit_functions() -> None:
    """Register again what the standard library had registered, and `fork` has cleared: agents expect it."""
    register(logging.shutdown)
    register(_exit_function)
