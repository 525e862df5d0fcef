"""The cage of a system: namespaces that are made once at the start, and that its agents enter (see `native/cage.c`).

A child makes the namespaces, sends their descriptors and ends; the descriptors keep the namespaces alive. Every forked
process inherits them and may enter the namespaces. An agent closes them before its program runs.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from aiosd.sandbox import places
from aiosd.sandbox.confine import Native
from aiosd.sandbox.places import Machine


@dataclass(frozen=True, slots=True)
class Cage:
    """Descriptors of its namespaces."""

    user: int
    machine: int
    cage: int
    ipc: int
    net: int

    def fds(self) -> tuple[int, ...]:
        return self.user, self.machine, self.cage, self.ipc, self.net


#: The cage of this process, set when it was built; forked processes have it, too.
current: Cage | None = None


def descriptors() -> tuple[int, ...]:
    """The descriptors that a process needs to enter the cage; empty if there is no cage."""
    return current.fds() if current is not None else ()


def look(system: Iterable[str], needed: Iterable[str]) -> Machine:
    """The part of the machine that a cage shows: folders of the system, and files that are `needed` wherever they lie
    (on many machines /etc/resolv.conf is a link to a file in /run)."""
    system = tuple(system)
    real = [os.path.realpath(path) for path in (*system, *places.DEVICES) if os.path.exists(path)]
    kept = places.outermost(real)
    more = [os.path.realpath(path) for path in needed if os.path.exists(path)]
    kept = places.outermost([*kept, *(path for path in more if not places.inside(path, kept))])
    folders: list[str] = []
    links: dict[str, str] = {}
    for entry in os.scandir("/"):
        if entry.is_symlink() and entry.path != "/tmp":
            links[entry.path] = os.readlink(entry.path)
        elif entry.is_dir():
            folders.append(entry.path)
    ways: dict[str, str] = {}
    for path in system:
        ways |= {link: source for link, source in links_to(path) if not places.inside(link, kept)}
    return Machine(tuple(path for path in kept if path != "/"), tuple(sorted(folders)), links, ways)


def links_to(path: str) -> Iterator[tuple[str, str]]:
    """The links on the way to a path, except those directly below the root, each with the real path of its folder, and
    with its target."""
    at = ""
    for name in path.split("/")[1:]:
        folder, at = os.path.realpath(at or "/"), f"{at}/{name}"
        if not os.path.lexists(at):
            return
        if folder != "/" and os.path.islink(at):
            yield os.path.join(folder, name), os.path.realpath(at)


def build(native: Native, machine: Machine, fork: Callable[[Callable[[], int]], int]) -> Cage:
    """Build the cage. `fork` runs a function in a child, and returns its Linux pid. Raises OSError if it fails."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def child() -> int:
        try:
            fds = native.build_cage(places.packed(found), len(found))
            theirs.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
        except OSError as err:
            theirs.send(f"{err.errno}:{err.strerror}".encode())
        return 0

    found = places.of_cage(machine)
    with ours:
        with theirs:
            ospid = fork(child)
        payload, ancillary, _, _ = ours.recvmsg(4096, socket.CMSG_SPACE(5 * 4), socket.MSG_CMSG_CLOEXEC)
        os.waitpid(ospid, 0)
    if ancillary:
        return Cage(*array.array("i", ancillary[0][2]))
    number, _, words = payload.decode(errors="replace").partition(":")
    raise OSError(int(number) if number.isdigit() else 1, words or "the process that should build it has died")
