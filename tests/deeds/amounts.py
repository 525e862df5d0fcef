"""Use of too many resources, or for too long: processes, descriptors, memory, disk, time."""

from __future__ import annotations

import _thread
import contextlib
import errno
import fcntl
import os
import resource
import signal
import threading
import time

from tests.deeds.table import Stage, deed, prctl

MANY = 600  # processes; the sandbox's limit is lower on a machine of two cores
LARGE = 80 << 20  # bytes; more than the agent's own /tmp and /dev/shm hold
_SET_SIGNAL = 10  # F_SETSIG


@deed
def fork_bomb(stage: Stage) -> object:
    """Start threads, which Linux counts as processes, and which end with this process."""
    threading.stack_size(64 << 10)
    end = threading.Event()
    try:
        for _ in range(MANY + 128 * max(0, (os.cpu_count() or 1) - 2)):
            _thread.start_new_thread(end.wait, ())
    except RuntimeError as err:
        raise BlockingIOError(errno.EAGAIN, str(err)) from None
    finally:
        end.set()
    return None


@deed
def open_many(stage: Stage) -> object:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return [os.dup(0) for _ in range(5000)]


@deed
def fill_tmp(stage: Stage) -> object:
    return _fill("/tmp/" + stage["tag"])


@deed
def fill_shared_memory(stage: Stage) -> object:
    return _fill("/dev/shm/" + stage["tag"])


@deed
def fill_own_folder(stage: Stage) -> object:
    return _fill("large")


def _fill(path: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        os.posix_fallocate(fd, 0, LARGE)
    finally:
        os.close(fd)
        os.unlink(path)


@deed
def memory_without_map(stage: Stage) -> object:
    return os.posix_fallocate(os.memfd_create("large"), 0, LARGE)


@deed
def signal_by_file(stage: Stage) -> object:
    """Become able to stop another process: make it the owner of a pipe, which gets a signal when data arrive."""
    reading, writing = os.pipe()
    fcntl.fcntl(reading, fcntl.F_SETOWN, stage["victim"])
    fcntl.fcntl(reading, _SET_SIGNAL, int(signal.SIGSTOP))
    fcntl.fcntl(reading, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    os.write(writing, b"x")
    for _ in range(20):
        with open(f"/proc/{stage['victim']}/stat") as file:
            if file.read().rpartition(")")[2].split()[0] in "Tt":
                return None
        time.sleep(0.01)  # the signal may arrive later
    raise PermissionError(1, "the signal does not arrive")


@deed
def survive_end(stage: Stage) -> object:
    """Start a process in a session of its own, whose parent ends and which ignores signals. The deed has succeeded if
    it lives when all others have ended (see `Stage.survivor`)."""
    reading, writing = os.pipe()
    if os.fork():
        os.close(writing)
        with open(reading) as pipe, open("survivor", "w") as file:
            file.write(pipe.readline())
        return None
    os.setsid()
    if os.fork():
        os._exit(0)
    prctl(1, 0)  # no signal when its parent ends
    prctl(36, 1)
    for number in set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP}:
        with contextlib.suppress(OSError):
            signal.signal(number, signal.SIG_IGN)
    os.write(writing, b"%d\n" % os.getpid())
    os.closerange(0, 1 << 10)
    time.sleep(60)
    os._exit(0)
