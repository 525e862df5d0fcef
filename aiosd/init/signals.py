"""Signals: those that come to the supervisor, with their senders, and those that go to agents.

They are read from a signalfd, because it names the sender: an agent's `kill $PPID` must not look like the user's
Ctrl-C. Signals to other processes go through a pidfd, so that they cannot reach another process that has meanwhile
got the same number; an agent's own number cannot be reused before the supervisor has reaped it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import struct
from collections.abc import Iterable
from typing import NamedTuple

from aiosd import procfs
from aiosd.kin import LIBC

_RECORD = 128  # bytes of a signalfd_siginfo
_FIELDS = struct.Struct("=Iiiii")  # number, errno, code, pid, uid
_SET_BYTES = 128  # of the C library's sigset_t; Linux looks at the first 8
_CLOEXEC, _NONBLOCK = os.O_CLOEXEC, os.O_NONBLOCK
SI_KERNEL = 0x80


class SignalInfo(NamedTuple):
    number: int
    sender: int  # Linux pid; 0: Linux itself


def open_signals(numbers: Iterable[int]) -> int:
    """Block these, and return a descriptor that delivers them."""
    numbers = tuple(numbers)
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    bits = sum(1 << (number - 1) for number in numbers)
    mask = ctypes.create_string_buffer(bits.to_bytes(8, "little"), _SET_BYTES)
    fd = LIBC.signalfd(-1, mask, _CLOEXEC | _NONBLOCK)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "signalfd")
    return int(fd)


def read_signals(fd: int) -> list[SignalInfo]:
    """All signals received, oldest first."""
    received = []
    with contextlib.suppress(BlockingIOError):
        while data := os.read(fd, 64 * _RECORD):
            for at in range(0, len(data), _RECORD):
                number, _, code, sender, _ = _FIELDS.unpack_from(data, at)
                received.append(SignalInfo(number, 0 if code == SI_KERNEL else sender))
    return received


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def describe_sender(ospid: int) -> str:
    """A sender's name and pid, for the log."""
    if not ospid:
        return "from Linux"
    return f"from pid {ospid} ({procfs.name(ospid) or 'it has ended'})"


# ── to agents ─────────────────────────────────────────────────────────────────────────────────────────────


def signal_tree(ospid: int, number: int) -> None:
    """Signal a child of this process with its process group, then every descendant that has left the group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # it now belongs to another user
        try:
            os.killpg(ospid, number)
        except ProcessLookupError:  # just forked: it has no group yet
            os.kill(ospid, number)
    signal_descendants(ospid, number, but_group=ospid)


def signal_descendants(root: int, number: int, but_group: int = 0) -> None:
    found = {root}
    for victim in procfs.descendants(root):
        found.add(victim)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            pidfd = os.pidfd_open(victim)
            try:
                stat = procfs.read_stat(victim)  # read after the pidfd was opened: is it still the same process?
                if stat is not None and stat.ppid in found and stat.pgid != (but_group or -1):
                    signal.pidfd_send_signal(pidfd, number)
            finally:
                os.close(pidfd)
