"""Tests what this machine can do: a forked child confines itself, and then tries actions that must fail.

The settings of a machine can be misleading (a user namespace may be allowed and then be of no use), so only a test
shows it. It is made once, when the system starts.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass

from aiosd.sandbox import cage, filter, landlock
from aiosd.sandbox.box import Box
from aiosd.sandbox.confine import Native
from aiosd.sandbox.plan import Ground, plan

ForkFunction = Callable[[Callable[[], int]], int]


@dataclass(frozen=True, slots=True)
class Offer:
    """The strongest level that works here, and why there is none that is stronger, with the remedy."""

    level: str
    reason: str = ""
    open: tuple[str, ...] = ()  # gaps that remain for a confined agent, for people


def offer(native: Native | None, ground: Ground | None, fork: ForkFunction) -> tuple[Offer, Ground | None]:
    """The strongest level that works here, and the ground with its cage, if there can be one. `fork`: runs a function
    in a child, and returns its Linux pid."""
    why = _missing(native)
    if native is None or ground is None or why:
        return Offer("none", why), ground
    why = _tried(native, ground, "flat", fork)
    if why:
        return Offer("none", why), ground
    abi = landlock.abi()
    try:
        caged = dataclasses.replace(ground, cage=cage.build(native, ground.machine, fork))
    except OSError as err:
        return Offer("flat", _no_cage(err), _open("flat", abi)), ground
    why = _tried(native, caged, "cage", fork)
    if why:
        return Offer("flat", f"no cage: {why}", _open("flat", abi)), ground
    return Offer("cage", "", _open("cage", abi)), caged


def _missing(native: Native | None) -> str:
    if not filter.known_here():
        return f"the system calls of this processor are not known; only those of {filter.MACHINE} are"
    if native is None:
        return "aiosd was installed without a C compiler; install one, then aiosd again"
    if landlock.abi() < 1:
        return "Linux has no Landlock; boot with lsm=landlock,… or a kernel from 5.13 on"
    return ""


def _no_cage(err: OSError) -> str:
    """Why there is no cage, and what to do about it."""
    words = (err.strerror or str(err)).removeprefix("sandbox: ")
    if err.errno == errno.ENOSPC:
        return "user namespaces are switched off; sysctl user.max_user_namespaces=10000 allows them"
    if err.errno in (errno.EPERM, errno.EACCES):
        for setting, value, remedy in _SETTINGS:
            if _reads(setting) == value:
                return f"user namespaces are denied; sysctl {setting.replace('/', '.')}={remedy} allows them"
        if any(map(os.path.exists, ("/.dockerenv", "/run/.containerenv"))):
            return "the container denies user namespaces; --security-opt seccomp=unconfined allows them"
    return f"no cage: {words}"


#: Settings that deny user namespaces, with the value that does, and the one that does not.
_SETTINGS = (
    ("kernel/apparmor_restrict_unprivileged_userns", "1", "0"),
    ("kernel/unprivileged_userns_clone", "0", "1"),
)


def _reads(setting: str) -> str:
    try:
        with open(f"/proc/sys/{setting}") as file:
            return file.read().strip()
    except OSError:
        return ""


def _tried(native: Native, ground: Ground, level: str, fork: ForkFunction) -> str:
    """Confine a child. Returns a sentence about the failure; "": there was none."""
    reading, writing = os.pipe()
    box = Box(level, "none", "/usr")
    outside = os.stat("/tmp").st_dev if os.path.exists("/tmp") else -1

    def child() -> int:
        try:
            native.confine(plan(ground, box, doors=False))
            os.write(writing, (_attempts() or (_attempts_in_cage(outside) if level == "cage" else "")).encode())
        except OSError as err:
            os.write(writing, (err.strerror or str(err)).encode())
        return 0

    try:
        ospid = fork(child)
        os.close(writing)
        writing = -1
        os.waitpid(ospid, 0)
        return os.read(reading, 4096).decode(errors="replace")
    finally:
        os.close(reading)
        if writing >= 0:
            os.close(writing)


def _attempts() -> str:
    """In the confined child: test that it is confined, and still works."""
    try:
        os.close(os.open("/etc/passwd", os.O_RDONLY))
        os.close(os.open(os.devnull, os.O_RDWR))
    except OSError as err:
        return f"a confined process cannot read {err.filename}"
    try:
        os.listdir("/")
        return "Landlock is in force, but denies nothing"
    except PermissionError:
        pass
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM).close()
        return "seccomp is in force, but denies nothing"
    except OSError:
        return ""


def _attempts_in_cage(outside: int) -> str:
    """The same in a cage. `outside`: the device of the machine's /tmp."""
    try:
        os.close(os.open("/tmp/probe", os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        for fd in os.openpty():
            os.close(fd)
    except OSError as err:
        return f"in the cage there is no {err.filename or 'terminal'}"
    return "" if os.stat("/tmp").st_dev != outside else "the cage shows files of the machine"


def _open(level: str, abi: int) -> tuple[str, ...]:
    found = ["/proc shows which processes there are, with their command lines", "names in /etc can be seen"]
    if level == "flat":
        found += [
            "names, sizes and times of hidden files can be seen",
            "modes and times of the user's own files can be changed",
        ]
    if abi < 3 and level == "flat":
        found.append("files can be truncated (Linux 6.2 ends that)")
    if abi < 6:
        found.append("the user's other processes can be signalled (Linux 6.12 ends that)")
    return tuple(found)
