"""What this machine can do, found out by doing it: a forked child confines itself, and tries what must not work.

The settings of a machine mislead (a user namespace may be allowed and then be of no use); only a try tells. It is made
once, when the system starts.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass

from aiosd.sandbox import filter, landlock
from aiosd.sandbox.box import Box
from aiosd.sandbox.confine import Confine
from aiosd.sandbox.plan import Ground, plan


@dataclass(frozen=True, slots=True)
class Offer:
    """The strongest level that works here, and why there is none that is stronger, with the remedy."""

    level: str
    reason: str = ""
    open: tuple[str, ...] = ()  # what a confined agent can still do, for people


def offer(confine: Confine | None, ground: Ground | None, fork: Callable[[Callable[[], int]], int]) -> Offer:
    """`fork`: runs a function in a child, and returns its Linux pid."""
    why = _missing(confine)
    if not why and confine is not None and ground is not None:
        why = _tried(confine, ground, fork)
    return Offer("none", why) if why else Offer("flat", "", tuple(_open(landlock.abi())))


def _missing(confine: Confine | None) -> str:
    if not filter.known_here():
        return f"the system calls of this processor are not known; only those of {filter.MACHINE} are"
    if confine is None:
        return "aiosd was installed without a C compiler; install one, then aiosd again"
    if landlock.abi() < 1:
        return "Linux has no Landlock; boot with lsm=landlock,… or a kernel from 5.13 on"
    return ""


def _tried(confine: Confine, ground: Ground, fork: Callable[[Callable[[], int]], int]) -> str:
    """Confine a child; what went wrong, or nothing."""
    reading, writing = os.pipe()
    box = Box("flat", "none", "/usr")

    def child() -> int:
        try:
            confine(plan(ground, box, doors=False))
            os.write(writing, _attempts().encode())
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
    """In the confined child: whether it is confined, and still works."""
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


def _open(abi: int) -> list[str]:
    found = [
        "names, sizes and times of hidden files can be seen",
        "modes and times of the user's own files can be changed",
    ]
    if abi < 3:
        found.append("files can be truncated (Linux 6.2 ends that)")
    if abi < 6:
        found.append("the user's other processes can be signalled (Linux 6.12 ends that)")
    return found
