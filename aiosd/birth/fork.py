"""Forking, and what happens in a child before its own code runs.

Only the supervisor forks, its brooders (see `spares`), and the templates that it has started (see `template`). Every
child leaves through `_run()` below, which ends in `os._exit`, so that neither `finally` blocks nor `atexit` handlers of
the parent ever run in a child. A child keeps exactly the descriptors that it should, and starts with default signal
handlers and a parent-death signal. How such a child becomes an agent is in `agent`.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found] # C, without stubs; see SIGNALS
import atexit
import contextlib
import ctypes
import gc
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FunctionType
from typing import NoReturn

from aiosd.kin import LIBC, die_with_parent

#: All signals, as plain numbers. The functions of `signal` turn every number and handler into an enum member, which
#: would write to half a megabyte of memory that a new agent shares with the supervisor; `_signal` does not.
SIGNALS = tuple(map(int, signal.valid_signals()))

SYS_PIDFD_GETFD = 438


def pidfd_getfd(ospid: int, number: int) -> int:
    """A duplicate of descriptor `number` of another process; OSError where Linux forbids it."""
    pidfd = os.pidfd_open(ospid)
    try:
        copy = LIBC.syscall(SYS_PIDFD_GETFD, pidfd, number, 0)
        if copy < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
        return int(copy)
    finally:
        os.close(pidfd)


def fork(child: Callable[[], int], *, tied: bool = True, exits: bool = False) -> int:
    """Fork; the child runs `child` and exits with what it returns. Returns the child's pid in the parent.

    `tied`: the child dies with its parent. `exits`: it keeps what was registered to run at the exit."""
    parent = os.getpid()
    # Signals that come between the fork and the reset of the handlers must not run the parent's handlers.
    old = _signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        ospid = _fork()
        if ospid == 0:
            _in_child(child, parent if tied else 0, exits)
        return ospid
    finally:
        _signal.pthread_sigmask(signal.SIG_SETMASK, old)


def _fork() -> int:
    """`os.fork` without the repairs that `threading` and `logging` do in the child. They repair the records and locks
    of threads that do not exist in the child. With only one thread there is nothing to repair, and it would write to
    memory that all agents share (0.1 to 0.4 MB each). With more threads it is done, and also in the child's own
    forks."""
    if len(threading._active) > 1:  # type: ignore[attr-defined]
        return os.fork()
    for hook, _, instead in _REPAIRS:
        hook.__code__ = instead.__code__
    try:
        return os.fork()
    finally:
        for hook, code, _ in _REPAIRS:
            hook.__code__ = code


def _nothing() -> None:
    pass


def _release() -> None:
    """Runs among the names of `logging`, which has taken its lock before the fork. (The locks of handlers are free.)"""
    _lock.release()  # type: ignore[name-defined] # noqa: F821


def _repairs() -> Iterator[tuple[FunctionType, CodeType, Callable[[], None]]]:
    """Functions that repair, their code, and the function whose code runs in its place."""
    repair = getattr(threading, "_after_fork", None)
    if repair is not None:
        yield repair, repair.__code__, _nothing
    repair = getattr(logging, "_after_at_fork_child_reinit_locks", None)
    if repair is not None and hasattr(logging, "_lock"):
        yield repair, repair.__code__, _release


_REPAIRS = tuple(_repairs())


def fork_again(child: Callable[[], int]) -> int:
    """`fork` in a process that is such a child itself, and not tied: nothing of the parent is left to be reset."""
    ospid = _fork()
    if ospid == 0:
        _run(child)
    return ospid


def _in_child(child: Callable[[], int], parent: int, exits: bool) -> NoReturn:
    def begin() -> int:
        gc.freeze()  # inherited objects must not be collected here
        if not exits:
            atexit._clear()
        signal.set_wakeup_fd(-1)
        reset_signals()
        if parent:
            die_with_parent(parent, signal.SIGKILL)
        _signal.pthread_sigmask(signal.SIG_SETMASK, ())
        return child()

    _run(begin)


def _run(child: Callable[[], int]) -> NoReturn:
    code = 70  # EX_SOFTWARE: the exit code when even the child's error handling fails
    try:
        code = child()
    except BaseException:  # of any kind: the child of a fork must not return into its parent's code
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):  # a broken stderr must not keep the child from leaving
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def name_process(name: str) -> None:
    """Set the name that top and `ps -e` show; at most 15 bytes."""
    write_proc("/proc/self/comm", name.encode("utf-8", "surrogateescape")[:15])


def write_proc(path: str, data: bytes) -> None:
    """Write to a file of /proc, if Linux allows it."""
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


def reset_signals() -> None:
    for number in SIGNALS:
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            _signal.signal(number, _signal.SIG_DFL)
    _signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # as at Python's start: EPIPE and EFBIG become exceptions
        _signal.signal(number, _signal.SIG_IGN)


malloc = LIBC.malloc
malloc.restype = ctypes.c_void_p


def keep_only(keep: Iterable[int]) -> None:
    """Close every descriptor from 3 up that is not in `keep`."""
    low = 3
    for fd in sorted({fd for fd in keep if fd >= 3}):
        if fd > low:
            os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, 1 << 30)
