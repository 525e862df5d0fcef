"""The mounts of a cage, and those that an agent in it gets besides. Pure, without any access to the disk.

The cage's root is a small read-only file system in memory. It has the system's folders (`system`) and an empty folder
for everything else that lies directly below the machine's root. A path that an agent was granted lies in one of these
folders (/home, for example): the agent covers the folder with memory of its own, makes the folders above the path
there, and attaches the path.

    invariant: an agent sees `system`, its own memory, and the paths that it was granted; of the names above a path only
               those that lead there
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from libaios.wire import os_bytes

ATTACH, MEMORY, TERMINALS, FOLDER, LINK, SEAL = range(6)
READ_ONLY, NO_SUID, NO_DEVICES = 1, 2, 4

_RECORD = struct.Struct("=6I")
_SHARED = "size=64m,mode=1777"  # for /tmp and /dev/shm; larger files go to TMPDIR, which is on the disk
_COVER = "size=1m,mode=755"
_TERMINALS = "mode=600,ptmxmode=666"

#: The name of an agent's own terminal (`aios-run -t`), which lies in the machine's /dev/pts; for others it is
#: /dev/null.
CONSOLE = "/dev/console"
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty")
_DEVICE_LINKS = {
    "/dev/ptmx": "pts/ptmx", "/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0",
    "/dev/stdout": "/proc/self/fd/1", "/dev/stderr": "/proc/self/fd/2",
}  # fmt: skip


class Place(NamedTuple):
    """One step of building a cage (a place in `native/cage.h`). Paths are `os_text`, absolute."""

    kind: int
    target: str
    source: str = ""  # of a mount: a path; of memory: options; of a link: its target
    attributes: int = 0
    must: bool = False


#: File systems of an agent's own.
_PRIVATE = (
    Place(MEMORY, "/tmp", _SHARED, NO_SUID | NO_DEVICES),
    Place(MEMORY, "/dev/shm", _SHARED, NO_SUID | NO_DEVICES),
    Place(TERMINALS, "/dev/pts", _TERMINALS, NO_SUID),
)


@dataclass(frozen=True, slots=True)
class Machine:
    """The parts of the machine that are in the cage, and the names of all others."""

    system: tuple[str, ...]  # folders and files, resolved, none of them inside of another
    folders: tuple[str, ...] = ()  # directly below the root, without links
    links: dict[str, str] = field(default_factory=dict)  # links directly below the root, with their targets
    ways: dict[str, str] = field(default_factory=dict)  # links further down that lead programs to `system`


def outermost(paths: Iterable[str]) -> list[str]:
    """The paths, sorted, without those that lie inside of others."""
    kept: list[str] = []
    for path in sorted(set(paths)):
        if not any(inside(path, (other,)) for other in kept):
            kept.append(path)
    return kept


def inside(path: str, folders: Iterable[str]) -> bool:
    for folder in folders:  # noqa: SIM110  as a generator it takes three times as long, and each agent needs it
        if path == folder or folder == "/" or path.startswith(folder + "/"):
            return True
    return False


def of_cage(machine: Machine) -> list[Place]:
    """The steps that build the cage, once."""
    places = [Place(LINK, link, source) for link, source in machine.links.items()]
    places += [Place(FOLDER, folder) for folder in (*machine.folders, "/dev/shm", "/dev/pts", "/tmp")]
    places += [Place(LINK, link, source) for link, source in _DEVICE_LINKS.items()]
    for top in dict.fromkeys(map(_top, machine.ways)):
        places += _ways(machine, top)
    return places + [_system(path) for path in machine.system] + [_no_console()]


def of_agent(
    machine: Machine,
    workspace: str,
    read: Iterable[str],
    write: Iterable[str],
    protected: Mapping[str, bool] | None = None,
    terminal: str = "",
    ways: Mapping[str, str] | None = None,
) -> list[Place]:
    """The steps of one agent after it has entered the cage. `protected`: see `sandbox.protected`. `terminal`: the path
    of its own terminal, or "". `ways`: links in the paths that it got, see `needed`."""
    granted = dict.fromkeys(_below_root(machine, read), False)
    granted |= dict.fromkeys(_below_root(machine, write), True)
    granted[workspace] = True
    covers: list[Place] = []
    grants: list[Place] = []
    seals: list[Place] = []
    seen = dict.fromkeys(machine.system, False)  # visible paths, and whether they can be written to
    covered = {"/tmp"}
    for path in sorted(granted):
        writable = granted[path]
        above = [folder for folder in seen if inside(path, (folder,))]
        if above and (not writable or any(seen[folder] for folder in above)):
            continue
        if not above and (top := _top(path)) != path and top not in covered:
            covered.add(top)
            covers += _covering(machine, top)
            seals.append(Place(SEAL, top))
        attributes = NO_SUID | (0 if writable else READ_ONLY) | (0 if _top(path) == "/dev" else NO_DEVICES)
        grants.append(Place(ATTACH, path, path, attributes, must=path == workspace))
        seen[path] = writable
    fixed = [
        Place(ATTACH, path, path, NO_SUID | NO_DEVICES | (0 if writable else READ_ONLY))
        for path, writable in (protected or {}).items()
        if inside(path, write)
    ]
    made: list[Place] = []
    for link, source in (ways or {}).items():
        if (top := _top(link)) not in covered:
            covered.add(top)
            covers += _covering(machine, top)
            seals.append(Place(SEAL, top))
        made += [Place(FOLDER, link.rpartition("/")[0]), Place(LINK, link, source)]
    console = [Place(ATTACH, CONSOLE, terminal, NO_SUID)] if terminal else []
    in_tmp = [*_ways(machine, "/tmp"), *(_system(path) for path in machine.system if _top(path) == "/tmp")]
    return [*covers, *_PRIVATE, *in_tmp, *made, *grants, *fixed, *console, *seals]


def needed(machine: Machine, links: Iterable[Iterable[str]], granted: Sequence[str]) -> dict[str, str]:
    """The links in the paths that an agent got (its program, its arguments) that lead to visible paths, except those
    that every cage has."""
    seen = (*machine.system, *granted)
    return {
        link: source
        for link, source in links
        if link not in machine.ways
        and _top(link) != "/dev"  # links in /dev are in every cage
        and not inside(link, seen)
        and (inside(source, seen) or any(inside(path, (source,)) for path in granted))
    }


def packed(places: Sequence[Place]) -> bytes:
    """The places as records of `native/cage.h`, concatenated."""
    return b"".join(map(_pack, places))


def _pack(place: Place) -> bytes:
    source = os_bytes(place.source)[place.kind == ATTACH :]  # paths without the slash at their beginning
    texts = source + b"\0" + os_bytes(place.target)[1:] + b"\0"
    texts += bytes(-len(texts) % 8)
    head = _RECORD.pack(place.kind, place.attributes, place.must, len(source) + 1, len(texts), 0)
    return head + texts


def _system(path: str) -> Place:
    return Place(ATTACH, path, path, NO_SUID if _top(path) == "/dev" else NO_SUID | READ_ONLY)


def _ways(machine: Machine, top: str) -> list[Place]:
    found: list[Place] = []
    for link, source in machine.ways.items():
        if _top(link) == top:
            found += [Place(FOLDER, link.rpartition("/")[0]), Place(LINK, link, source)]
    return found


def _no_console() -> Place:
    return Place(ATTACH, CONSOLE, os.devnull, NO_SUID)


def _covering(machine: Machine, top: str) -> list[Place]:
    """Cover a folder below the root with memory, and attach there again the parts of the system that lie in it."""
    again: list[Place] = []
    if top == "/dev":
        again = [Place(FOLDER, "/dev/shm"), Place(FOLDER, "/dev/pts")]
        again += [Place(LINK, link, source) for link, source in _DEVICE_LINKS.items()]
        again.append(_no_console())
    again += [*_ways(machine, top), *(_system(path) for path in machine.system if _top(path) == top)]
    return [Place(MEMORY, top, _COVER, NO_SUID), *again]


def _top(path: str) -> str:
    return "/" + path.split("/", 2)[1]


def _below_root(machine: Machine, paths: Iterable[str]) -> list[str]:
    """The paths, with the entries of the root instead of the root itself."""
    found: list[str] = []
    for path in paths:
        if path == "/":
            found += [folder for folder in machine.folders if folder not in ("/dev", "/proc", "/sys")]
        else:
            found.append(path)
    return found
