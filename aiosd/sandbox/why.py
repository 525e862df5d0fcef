"""Explains why an agent can or cannot use a path, or reach a host: which layer allows or denies it, by which rule, and
what would allow it.

Everything but the path's own mode follows from the agent's box, and from the common part of all plans
(`plan.common_rules`).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from aiosd.sandbox import hosts, landlock
from aiosd.sandbox.box import Box
from aiosd.sandbox.places import Machine, inside

_DEEDS = {"read": landlock.READ_FILE | landlock.READ_DIR, "write": landlock.WRITE_FILE, "run": landlock.EXECUTE}
_MODES = {"read": 4, "write": 2, "run": 1}
_PRIVATE = ("/tmp", "/dev/shm", "/dev/pts")


@dataclass(frozen=True, slots=True)
class Finding:
    """The result for one deed."""

    deed: str  # read, write or run, or reach
    allowed: bool
    why: str
    remedy: str = ""  # an option of aios-run, with its argument


def findings(path: str, box: Box, machine: Machine, common: Sequence[tuple[str, int]]) -> list[Finding]:
    """The results for a path. `path`: absolute, without links. `common`: the rights of all agents, by path."""
    return [_finding(deed, path, box, machine, common) for deed in _DEEDS]


def of_host(url: str, box: Box) -> Finding:
    """The result for a host. `url`: SCHEME://HOST[:PORT][/…]. Raises ValueError."""
    scheme, _, rest = url.partition("://")
    host, port = hosts.address(rest.partition("/")[0])
    port = port or {"http": 80, "https": 443, "ws": 80, "wss": 443}.get(scheme.lower(), 0)
    if not port:
        raise ValueError(f"{url}: which port is meant? ({scheme}://{host}:PORT)")
    if box.net == hosts.ALL:
        return Finding("reach", True, "it has the machine's network")
    shown = f"[{host}]" if ":" in host else host
    remedy = f"--net {shown if port in hosts.PORTS else f'{shown}:{port}'}" if box.level == "cage" else "--net all"
    if box.net == hosts.NONE:
        return Finding("reach", False, "it has no network (EAFNOSUPPORT)", remedy)
    found = hosts.rule(hosts.grants(box.net), host, port)
    if found is None:
        return Finding("reach", False, f"no rule of net names it, only {box.net} (403 of the proxy)", remedy)
    return Finding("reach", True, f"granted by net: {found}, through the proxy, where its addresses are public")


def _finding(deed: str, path: str, box: Box, machine: Machine, common: Sequence[tuple[str, int]]) -> Finding:
    caged = box.level == "cage"
    granted = _granted(box)
    mine = next((folder for folder in _PRIVATE if caged and inside(path, (folder,))), "")
    if mine and not inside(path, (folder for folder, _, _ in granted)):
        if path == mine or not os.path.lexists(path):
            return Finding(deed, True, f"in the cage {mine} is the agent's own")
        return Finding(
            deed, False, f"in the cage {mine} is the agent's own: no such file (ENOENT)", _remedy(deed, path)
        )
    shared = [(os.path.realpath(folder), rights, f"all agents may: {folder}") for folder, rights in common]
    found = _rule(deed, path, [*granted, *shared])
    remedy = _remedy(deed, path)
    if caged and not inside(path, (*machine.system, *(folder for folder, _, _ in granted))):
        return Finding(deed, False, "not in the cage: no such file (ENOENT)", remedy)
    if not found:
        writable = [folder for folder, rights, _ in granted if rights & landlock.WRITE_FILE]
        first = "mounted read-only (EROFS), and " if caged and deed == "write" and not inside(path, writable) else ""
        return Finding(deed, False, f"{first}no rule of Landlock grants it (EACCES)", remedy)
    mode = _mode(deed, path)
    return Finding(deed, not mode, f"{mode}, although {found}" if mode else found)


def _remedy(deed: str, path: str) -> str:
    """The option of aios-run that would allow it. "" for `run`, because a file that may be read may be run."""
    return {"read": f"--read {path}", "write": f"--write {path}"}.get(deed, "")


def _granted(box: Box) -> list[tuple[str, int, str]]:
    """Path, rights, and the name of the rule."""
    granted = [(box.workspace, landlock.WRITE, "its workspace")]
    granted += [(path, landlock.READ, f"granted by read: {path}") for path in box.read]
    return granted + [(path, landlock.WRITE, f"granted by write: {path}") for path in box.write]


def _rule(deed: str, path: str, rules: Iterable[tuple[str, int, str]]) -> str:
    return next((words for folder, rights, words in rules if rights & _DEEDS[deed] and inside(path, (folder,))), "")


def _mode(deed: str, path: str) -> str:
    """What the file's own mode denies to a process of this user without capabilities (agents have none, even as
    root)."""
    try:
        found = os.stat(path)
    except OSError as err:
        return f"the file cannot be looked at ({err.strerror})"
    if deed == "run" and stat.S_ISDIR(found.st_mode):
        return ""
    shift = 6 if found.st_uid == os.geteuid() else 3 if found.st_gid in {os.getegid(), *os.getgroups()} else 0
    if found.st_mode >> shift & _MODES[deed]:
        return ""
    return f"its mode ({stat.filemode(found.st_mode)}) denies it (EACCES)"
