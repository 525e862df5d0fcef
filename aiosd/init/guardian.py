"""The guardian: the process that the user started. It waits, forwards signals and sweeps up; nothing else.

It takes the home (a lock, so that a second aiosd fails), binds the control socket and forks the supervisor. Guardian
and supervisor are both child subreapers, and each ends everything when the other dies: the supervisor on its
parent-death signal, the guardian when `wait` reports the death, or when the heartbeat is missing. Nothing outlives
aiosd as long as one of the two lives long enough to clean up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import logging
import os
import resource
import signal
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from aiosd import kin, procfs
from aiosd.birth import fork
from aiosd.errors import UsageError, WorldError
from aiosd.init import restart, signals
from aiosd.init.sweep import sweep
from aiosd.ipc import endpoint, passage
from aiosd.ipc.heartbeat import BEAT_S, HANG_S, START_S, Heart
from aiosd.logs import processlog

if TYPE_CHECKING:
    from aiosd.config import Settings
    from libaios.home import Home

logger = logging.getLogger("guardian")

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main(settings: Settings) -> int:
    """Run the whole system in the foreground; returns its exit code."""
    home = settings.home
    prepare(home)
    locks = take_locks(home)
    listener = bind(home)
    settings = dataclasses.replace(settings, door=endpoint.listen(settings.gateway), passages=passage.make())
    _raise_nofile()
    kin.adopt_orphans()
    processlog.setup("guardian", settings.log_level)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, *FORWARDED})
    heart = Heart()
    supervisor = _fork_supervisor(settings, listener, heart.write)
    heart.forked()
    if settings.ready_fd is not None:
        os.close(settings.ready_fd)  # only the supervisor keeps it, so that its death ends the starter's wait
    try:
        return _watch(supervisor, heart)
    finally:
        sweep()
        for path in {home.socket, home.root / home.socket.name}:
            with contextlib.suppress(OSError):
                os.unlink(path)
        for lock in locks:
            os.close(lock)


def prepare(home: Home) -> None:
    """Make the folders of a home, private to this user. Raises UsageError for one that another user can change."""
    for folder in (home.root, home.socket.parent, home.data, home.logs):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except FileExistsError as err:
            raise WorldError(f"{folder}: is no directory") from err
        except OSError as err:
            raise WorldError(f"{folder}: {err.strerror}") from err
        _check_private(folder)


def _check_private(folder: Path) -> None:
    """Check a folder's owner and mode. Also for root: another owner would control its files, and where its links
    lead."""
    me = os.getuid()
    link, found = os.lstat(folder), os.stat(folder)
    if found.st_uid != me or link.st_uid not in (me, 0):
        other = found.st_uid if found.st_uid != me else link.st_uid
        raise UsageError(f"{folder} belongs to another user ({other}); a system runs in folders of its own user ({me})")
    if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
        raise UsageError(f"{folder} can be changed by every user; make it private with: chmod o-w {folder}")


def take_locks(home: Home) -> list[int]:
    """Take the lock of the home, and where the socket lies elsewhere, that of its folder: another home of this user may
    have the same (under sudo, or with another HOME). They are held as long as the returned descriptors are open, here
    or in the supervisor."""
    running = f"already running in {home.root}; aiosd reload reads changed settings, aiosd stop ends it"
    locks = [_take_lock(home.data, running)]
    if home.socket.parent != home.root:
        why = f"start this one with --home DIR or AIOS_HOME: another aiosd has the socket {home.socket}"
        locks.append(_take_lock(home.socket.parent, why))
    return locks


def _take_lock(folder: Path, why_not: str) -> int:
    fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as err:
        holder = os.read(fd, 32).decode(errors="replace").strip()
        os.close(fd)
        raise UsageError(f"{why_not} (pid {holder or 'unknown'})") from err
    os.ftruncate(fd, 0)
    os.write(fd, f"{os.getpid()}\n".encode())
    return fd


def bind(home: Home) -> socket.socket:
    """Listen on the control socket. An existing one belongs to a dead aiosd, because this process holds the locks.

    The folder is reached through /proc/self/fd, because a socket's path is limited to 107 bytes.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(home.socket)
    folder = os.open(home.socket.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        listener.bind(f"/proc/self/fd/{folder}/{home.socket.name}")
    finally:
        os.close(folder)
    os.chmod(home.socket, 0o600)
    listener.listen(1024)
    _link_socket(home)
    return listener


def _link_socket(home: Home) -> None:
    """Agents find the socket by AIOS_HOME, because their XDG variables may be different; so it must be in the home's
    root, even when the socket itself is in the runtime folder."""
    link = home.root / home.socket.name
    if link != home.socket:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(link)
        os.symlink(home.socket, link)


def _raise_nofile() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _fork_supervisor(settings: Settings, listener: socket.socket, heartbeat: int) -> int:
    guardian = os.getpid()

    def child() -> int:
        from aiosd.init.supervisor import main

        return main(settings, listener, guardian, heartbeat)

    return fork.fork(child)


def _watch(supervisor: int, heart: Heart) -> int:
    """Wait for the supervisor's end; returns its exit code."""
    while True:
        info = signal.sigtimedwait({signal.SIGCHLD, *FORWARDED}, BEAT_S)
        if info is not None and info.si_signo in FORWARDED and not _is_refused(info, supervisor):
            os.kill(supervisor, info.si_signo)
        code = _reap(supervisor)
        if code is not None:
            return code
        silent_s = HANG_S if heart.beaten else START_S
        if heart.hangs(silent_s=silent_s, ospid=supervisor):
            logger.critical("the supervisor hangs (no heartbeat for %.0f s); ending everything", silent_s)
            os.kill(supervisor, signal.SIGKILL)


def _is_refused(info: signal.struct_siginfo, supervisor: int) -> bool:
    """Whether a signal is refused: processes that agents have started may not stop the system. But a sender that has
    already ended is obeyed: Linux no longer knows its parent, and a user's `kill` or `pkill` has always ended by now.
    So an agent's `kill` can stop the system. (An agent runs as the same user, and could send KILL just as well.)"""
    number, sender = info.si_signo, info.si_pid
    what = f"{signals.signal_name(number)} {signals.describe_sender(sender)}"
    if not sender:  # Linux itself (Ctrl-C, a closed terminal), or a sender outside of the container
        return False
    if procfs.descends(sender, supervisor):
        logger.warning("%s: ignored, it belongs to an agent", what)
        return True
    logger.info("%s", what)
    return False


def _reap(supervisor: int) -> int | None:
    """Reap dead children; returns the exit code for the user when the supervisor was among them."""
    while True:
        try:
            ospid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return 1
        if ospid == 0:
            return None
        if ospid == supervisor:
            code = os.waitstatus_to_exitcode(status)
            if code < 0:
                logger.critical("the supervisor died (%s)", restart.exit_in_words(code))
            return code if code >= 0 else 1
