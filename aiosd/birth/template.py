"""A template: a process that has imported what agents need, and from which they are forked.

    supervisor ──executes──▶ template: imports, freezes its memory, reports (`TemplateReport`)
    supervisor ──one end of a socket pair──▶ template ──forks──▶ middle ──forks──▶ spare
               ◀─────────────── the spare's Linux pid ────────────┘ (ends when the supervisor knows the spare)
               ──which agent it is, with its descriptors──▶ spare = the agent; its parent is the supervisor now

A spare's parent ends as soon as the supervisor has recorded the spare, so the spare becomes the supervisor's child (a
template is no subreaper, its supervisor is one), under the same supervision as any other agent. The data of an agent go
from the supervisor to the spare over the socket, past the template: the template never has anything of an agent in its
memory.

    invariant: a template has one thread when it forks; a module that starts another is refused

A template imports the modules that were named, and uses those that it knows how to use (`warmup`). It ends when a file
that it has imported has changed: then the supervisor starts another one.
"""

from __future__ import annotations

import array
import errno
import importlib
import os
import platform
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable

import msgspec

from aiosd.birth import confinement, modules, rehearsal, spares, warmup
from aiosd.birth.fork import fork, name_process
from aiosd.ipc.link import TemplateReport
from aiosd.kin import die_with_parent
from aiosd.sandbox import cage

FD_BYTES = 4
LOOK_S = 1.0  # the shortest time between two checks whether files have changed


class TemplateRefused(Exception):
    def __init__(self, number: int, words: str) -> None:
        super().__init__(words)
        self.errno = number


def main(number: int, supervisor: int, ground: int, names: list[str]) -> None:
    """The template's process. `number`: of the socket to the supervisor; `ground`: of a memfd, see
    `confinement.packed`. Never returns."""
    code = 1
    sock = socket.socket(fileno=number)
    confinement.unpack(os.pread(ground, os.fstat(ground).st_size, 0))
    for fd in (number, ground, *cage.descriptors()):
        os.set_inheritable(fd, False)
    try:
        name_process("aios:template")
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr] # a module may keep it
        _load(names)
        files = ImportedFiles()
        sock.send(msgspec.json.encode(TemplateReport(True, version=platform.python_version(), loaded=len(sys.modules))))
        _serve(sock, supervisor, files)
        code = 0
    except TemplateRefused as err:
        sock.send(msgspec.json.encode(TemplateReport(errno=err.errno, words=str(err))))
    finally:
        os._exit(code)


# ── what it has imported ──────────────────────────────────────────────────────────────────────────────────


def _load(names: list[str]) -> None:
    """Import everything, and prepare the memory that all agents will share. Raises
    TemplateRefused."""
    for name in names:
        _import(name)
    warmup.use_modules()
    _refuse_threads()
    modules.share()
    rehearsal.warm_up(hides=False)


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as err:
        missing = "" if err.name == name else f" (which {name} imports)"
        raise TemplateRefused(errno.ENOENT, f"template: no module {err.name!r}{missing} in {sys.prefix}") from None
    except BaseException as err:  # a module may raise any exception, SystemExit included
        why = traceback.format_exception_only(err)[-1].strip()
        raise TemplateRefused(errno.EIO, f"template: the import of {name} failed: {why}") from None


def _refuse_threads() -> None:
    """Refuse modules with threads: a fork does not copy threads, and locks that they hold stay locked for ever."""
    tasks = os.listdir("/proc/self/task")
    if len(tasks) == 1:
        return
    known = [one.name for one in threading.enumerate() if one is not threading.main_thread()]
    found = ", ".join(known) or f"{len(tasks) - 1} of a library in C"
    raise TemplateRefused(errno.EINVAL, f"template: a module has started threads, which agents would not have: {found}")


class ImportedFiles:
    """The files of all imported modules, as they were at the import."""

    def __init__(self) -> None:
        self._seen = {path: _stamp(path) for path in _files(sys.modules)}
        self._looked = time.monotonic()

    def changed(self) -> bool:
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return False
        self._looked = now
        return any(_stamp(path) != stamp for path, stamp in self._seen.items())


def _files(names: Iterable[str]) -> set[str]:
    found = {getattr(sys.modules[name], "__file__", None) for name in list(names)}
    return {path for path in found if isinstance(path, str)} | {os.path.join(sys.prefix, "pyvenv.cfg")}


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


# ── forks ─────────────────────────────────────────────────────────────────────────────────────────────────


def _serve(sock: socket.socket, supervisor: int, files: ImportedFiles) -> None:
    """Fork an agent for each socket that comes, until the supervisor closes its end."""
    while True:
        payload, ancillary, _, _ = sock.recvmsg(1, socket.CMSG_SPACE(FD_BYTES), socket.MSG_CMSG_CLOEXEC)
        if not payload or not ancillary:
            return
        number = array.array("i", ancillary[0][2])[0]
        if files.changed():
            sock.send(msgspec.json.encode(TemplateReport(stale=True)))
            return
        middle = fork(lambda: _middle(number, supervisor), exits=True)  # noqa: B023 # it runs at once, in the child
        os.close(number)
        os.waitpid(middle, 0)


def _middle(number: int, supervisor: int) -> int:
    """Fork the spare, report its pid, and end when the supervisor has sent the spare its data: then it has a record of
    it."""
    sock = socket.socket(fileno=number)
    ourselves = os.pidfd_open(os.getpid())
    spare = fork(lambda: _spare(sock, ourselves, supervisor), tied=False, exits=True)
    sock.send(spares.PID.pack(spare))
    sock.recv(1, socket.MSG_PEEK)
    return 0


def _spare(sock: socket.socket, parent: int, supervisor: int) -> int:
    """Wait until the supervisor is the parent. (Linux reports the end of a process only after it has given its children
    another parent.)"""
    poll = select.poll()
    poll.register(parent, select.POLLIN)
    poll.poll()
    die_with_parent(supervisor, signal.SIGKILL)
    warmup.reseed()
    name_process("aios:spare")
    return spares.become(sock, keeps_library=True)
