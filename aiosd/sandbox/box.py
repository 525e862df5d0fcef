"""The kernel's decision about the box of a new agent: from the call's request, the rules of its group, and its parent's
box.

    a person's agent    the request, else the rules of the group, else the settings; when these are `strict`, the cage
    an agent's child    its parent's box: the same files, the same workspace. It may have less network, and never
                        more of anything. The child of an agent that is not confined is not confined either, unless the
                        call requests it

Single hosts (`hosts`) can only be granted in the cage, because only there an agent has a network of its own.

Names are not looked up here. A client that starts an agent for a person sends absolute paths without symbolic links.
"""

from __future__ import annotations

import errno
import os.path
import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import translate
from functools import lru_cache

import msgspec
from msgspec import Struct

from aiosd.sandbox import hosts
from libaios import digest, wire
from libaios.sandbox import CERTIFICATES

LEVELS = ("none", "flat", "cage")  # from the weakest to the strongest
STRICT = "strict"  # a setting: no agent is in less than the strongest level

#: Variables that a confined agent gets from the environment of its start. All others may be secrets.
VARIABLES = (
    "PATH", "LANG", "LANGUAGE", "LC_*", "TZ", "TERM", "COLORTERM", "NO_COLOR", "LINES", "COLUMNS", "USER", "LOGNAME",
    "SHELL", "PAGER", "EDITOR", "PYTHON*", "VIRTUAL_ENV", "AIOS*", "OMP_*", "CC", "CXX", "CFLAGS", "LDFLAGS",
    "LD_LIBRARY_PATH",
    *CERTIFICATES,
)  # fmt: skip
#: Names in small letters. These pass as well, except a value that has a password in it.
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


class Box(Struct, array_like=True, frozen=True):
    """The limits of one agent. Paths are `os_text`, absolute and without symbolic links."""

    level: str
    net: str  # see `hosts`
    workspace: str
    read: list[str] = []
    write: list[str] = []


class SandboxSettings(Struct, frozen=True):
    """The settings for all agents, or those of a [[group]] of aiosd.toml for its own."""

    level: str = "none"
    net: str = "all"
    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    env: tuple[str, ...] = ()


def of_person(wish: wire.Sandbox, rules: SandboxSettings, workspace: str) -> Box | None:
    """The box of an agent that a person starts, or an agent that is not confined; None: it is not confined."""
    level = wish.level or rules.level
    if level == "none":
        _refuse_grants(wish)
        return None
    return Box(
        level,
        _possible(wish.net or rules.net, level),
        workspace,
        _once(rules.read, (*wish.own, *wish.read)),
        _once(rules.write, wish.write),
    )


def of_child(wish: wire.Sandbox, parent: Box) -> Box:
    """The box of a child of a confined agent. Raises OSError (EPERM)."""
    if wish.level and LEVELS.index(wish.level) < LEVELS.index(parent.level):
        raise wire.error(errno.EPERM, f"sandbox: an agent in {parent.level!r} may not start one in {wish.level!r}")
    if wish.net and not hosts.covers(parent.net, wish.net):
        raise wire.error(errno.EPERM, _more_network(wish.net, parent.net))
    for path in wish.write:
        if not _within(path, (*parent.write, parent.workspace)):
            raise wire.error(errno.EPERM, f"sandbox: {wire.os_shown(path)}: an agent may not let others write there")
    for path in wish.read:
        if not _within(path, (*parent.read, *parent.write, parent.workspace)):
            raise wire.error(errno.EPERM, f"sandbox: {wire.os_shown(path)}: an agent may not let others read there")
    return msgspec.structs.replace(parent, net=_possible(wish.net or parent.net, parent.level))


def of_child_with_more(wish: wire.Sandbox, parent: Box) -> Box | None:
    """The same if a person has allowed the child to be less confined; None: it is not confined at all."""
    level = wish.level or parent.level
    if level == "none":
        return None
    return msgspec.structs.replace(
        parent,
        level=level,
        net=_possible(wish.net or parent.net, level),
        read=_once(parent.read, (*wish.own, *wish.read)),
        write=_once(parent.write, wish.write),
    )


def check(wish: wire.Sandbox) -> None:
    """Check what the types of its fields cannot express. Raises OSError (EINVAL)."""
    for path in (*wish.own, *wish.read, *wish.write):
        plain = wire.os_bytes(path)
        if not plain.startswith(b"/") or plain.startswith(b"//") or b"\0" in plain or os.path.normpath(plain) != plain:
            raise wire.error(errno.EINVAL, f"sandbox: {wire.os_shown(path)!r} is no plain absolute path")


def with_hosts(wish: wire.Sandbox) -> wire.Sandbox:
    """The request with its hosts in the form in which they are compared. Raises OSError (EINVAL)."""
    if not hosts.are_named(wish.net):
        return wish
    try:
        net = hosts.normal([wish.net])
    except ValueError as err:
        raise wire.error(errno.EINVAL, f"sandbox: --net: {err}") from None
    return msgspec.structs.replace(wish, net=net)


def without_data(wish: wire.Sandbox, data: str) -> wire.Sandbox:
    """The request without aiosd's own data. The folder of an agent's program is granted automatically; if aiosd's data
    (approvals, the audit, data of other agents) lie in it, only the program itself is granted."""
    own = [path for path in wish.own if not _within(wire.os_text(data), [path])]
    if len(own) < len(wish.own) and wish.program.startswith("/"):
        own.append(wish.program)
    return msgspec.structs.replace(wish, own=own)


def refuse_data(box: Box, data: str, workspaces: str) -> None:
    """Raises OSError (EINVAL) if the box has data of the system itself: no agent gets these, even if a person grants
    them."""
    text = wire.os_text(data)
    for path in (*box.read, *box.write):
        inside = _within(path, [text]) and not _within(path, [wire.os_text(workspaces)])
        if inside or _within(text, [path]):
            shown = wire.os_shown(path)
            raise wire.error(errno.EINVAL, f"sandbox: {shown}: aiosd's own data is there ({data}), which no agent gets")


def environment(env: Mapping[str, str], allowed: Iterable[str]) -> dict[str, str]:
    """The variables that a confined agent gets; names may end in '*'."""
    passes = _any_of((*VARIABLES, *allowed))
    return {
        name: value
        for name, value in env.items()
        if passes(name) is not None or (name.lower() in PROXIES and "@" not in value)
    }


@lru_cache(maxsize=64)
def _any_of(patterns: tuple[str, ...]) -> Callable[[str], re.Match[str] | None]:
    """Whether a name matches one of the patterns. All in one expression: the kernel does this for each variable of each
    new agent, and one pattern after the other took longer than all the rest of a spawn."""
    return re.compile("|".join(map(translate, patterns))).match


def at_home(env: Mapping[str, str], box: Box) -> dict[str, str]:
    """The environment with the workspace as home, and with the address of its proxy."""
    own = hosts.proxied(env) if hosts.are_named(box.net) else env
    return {**own, "HOME": box.workspace, "TMPDIR": box.workspace + "/tmp"}


def workspace(folder: str, group: str, program: str, name: str) -> str:
    """The folder in which agents of this group, program and name keep their files. `name`: "" if none was given on
    purpose."""
    key = digest.short(wire.os_bytes(program), 4).hex()
    stem = "".join(c if c.isalnum() or c in "._-" else "_" for c in wire.os_shown(program).rpartition("/")[2])
    return os.path.join(folder, group, f"{stem.lstrip('.')[:32] or 'agent'}-{key}", f"={name}" if name else "-")


def _once(rules: Iterable[str], wish: Iterable[str]) -> list[str]:
    return list(dict.fromkeys((*rules, *wish)))


def _possible(net: str, level: str) -> str:
    """Check that the level can have this network. Raises OSError (ENOTSUP)."""
    if hosts.are_named(net) and level != "cage":
        words = f"--net {net[:200]} needs --sandbox cage: in {level} an agent has the machine's network, or none"
        raise wire.error(errno.ENOTSUP, f"sandbox: {words}")
    return net


def _more_network(wanted: str, has: str) -> str:
    if has == hosts.NONE:
        return "sandbox: an agent without network may not start one that has it"
    return f"sandbox: an agent that reaches {has[:200]} may not start one that reaches {wanted[:200]}"


def _refuse_grants(wish: wire.Sandbox) -> None:
    _possible(wish.net, "none")
    if wish.read or wish.write or wish.net == "none":
        raise wire.error(errno.EINVAL, "sandbox: --read, --write and --net none need a sandbox: --sandbox cage")


def _within(path: str, folders: Iterable[str]) -> bool:
    return any(path == folder or path.startswith(folder.rstrip("/") + "/") for folder in folders)
