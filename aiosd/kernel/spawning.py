"""Turns a checked SPAWN into the request that the supervisor gets. No path that it names is looked up here: a slow or
hanging file system must hold up neither kernel nor supervisor."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Container, Sequence
from pathlib import PurePath

from aiosd import procfs
from aiosd.access.deed import program_key
from aiosd.init import restart
from aiosd.ipc import link
from aiosd.ipc.letter import Letter
from aiosd.kernel.proc import INIT, Proc
from aiosd.sandbox.box import Box
from libaios import wire

SPAWN_CHARS = 1 << 20


def fork(
    args: wire.Spawn,
    key: link.CallKey,
    parent: Proc | None,
    box: Box | None,
    attached: bool = False,
    client: tuple[int, int] = (0, 0),
    allowed: bool = False,
    shares: Sequence[link.BudgetShare] = (),
    content: bytes = b"",
) -> link.Fork:
    """The request. `parent`: the agent that starts it, None: the person. `box`: how it is confined. `client`: the
    process that it is attached to. `allowed`: it may have more rights than its parent. `shares`: the budgets that it
    shares. Raises OSError: EINVAL, E2BIG, EPERM."""
    _check(args)
    if args.template is not None and parent is not None and parent.box is not None:
        raise wire.error(errno.EPERM, "template: its modules run unconfined, so no confined agent may name them")
    _check_disk(shares, box)
    return link.Fork(
        key=key,
        ppid=INIT if parent is None else parent.pid,
        pgid=parent.pgid if parent is not None else 0,
        uid=os.getuid(),
        name=args.name or _default_name(args),
        named=args.name is not None,
        nice=_nice_of_child(parent, args.nice, allowed),
        group=group_of_child(parent, args.group, allowed),
        shares=list(shares),
        umask=args.umask,
        detached=args.detached,
        attached=attached,
        client=client,
        tty=args.tty,
        restart=args.restart,
        sandbox=box.level if box is not None else "none",
        program=program_key(path) if parent is None and (path := program_path(args)) else b"",
        sha256=content,
        template=args.template,
    )


def content(args: wire.Spawn, parent: Proc | None, wanted: Container[bytes]) -> bytes:
    """The hash that its process has to compare with its script's content, if it is one of those `wanted`; else b""."""
    known = parent is None and args.kind == "file" and args.sandbox.sha256 in wanted
    return args.sandbox.sha256 if known else b""


def letter(args: wire.Spawn, env: dict[str, str], box: Box | None, content: bytes = b"") -> Letter:
    """The part of a spawn for the agent's own process alone. `fork` has checked it."""
    return Letter(args.kind, args.target, args.args, env, args.cwd, box, content)


def _check(args: wire.Spawn) -> None:
    """Check what the types of the arguments cannot express. No path that they name is looked up here."""
    if not os.path.isabs(wire.os_str(args.cwd)):
        raise wire.error(errno.EINVAL, "cwd must be an absolute path")
    if args.name is not None and (args.name.isdecimal() or args.name.startswith("-")):
        raise wire.error(errno.EINVAL, f"name: {args.name!r} would be taken for a pid or an option")
    _check_restart(args)
    _check_template(args)
    texts = (args.target, args.cwd, *args.args, *args.env, *args.env.values())
    together = "".join(texts)  # checked as one string first: most environments have dozens of variables
    if "\0" in together and any("\0" in text and not _is_bytes(text) for text in texts):
        raise wire.error(errno.EINVAL, "a string with a null byte")
    if len(together) > SPAWN_CHARS:
        raise wire.error(errno.E2BIG, f"arguments and environment have more than {SPAWN_CHARS} characters")
    if "" in args.env or "=" in "".join(args.env):
        raise wire.error(errno.EINVAL, "env: a name is empty or holds '='")


def _is_bytes(text: str) -> bool:
    """Whether a text stands for bytes, as `wire.os_text` writes them."""
    rest = text[1:]
    return text[0] == "\0" and bool(rest) and "\0" not in rest and ord(max(rest)) < 256


def _check_restart(args: wire.Spawn) -> None:
    try:
        policy = restart.parse(args.restart)
    except ValueError as err:
        raise wire.error(errno.EINVAL, f"restart: {err}") from None
    if policy.when is not restart.When.NO and not args.detached:
        raise wire.error(errno.EINVAL, "restart: only a detached agent can be started again")


def _check_disk(shares: Sequence[link.BudgetShare], box: Box | None) -> None:
    """Raises OSError if a budget of disk could not be measured: it is measured in the agent's workspace, so the agent
    must not be able to write elsewhere."""
    if any(share.limits.disk_bytes is not None for share in shares):
        if box is None:
            raise wire.error(errno.EINVAL, "disk budget: cannot be measured without a sandbox (--sandbox flat)")
        if box.write:
            raise wire.error(errno.EINVAL, "disk budget: cannot be measured where it may write outside its workspace")


def _check_template(args: wire.Spawn) -> None:
    if args.template is None:
        return
    python = args.template.python
    if args.kind == "exec":
        raise wire.error(errno.EINVAL, "template: a script or a module is forked from one; a program is executed")
    if python and (not os.path.isabs(wire.os_str(python)) or ("\0" in python and not _is_bytes(python))):
        raise wire.error(errno.EINVAL, "template: python must be an absolute path")
    if not python and not args.template.modules:
        raise wire.error(errno.EINVAL, "template: neither an interpreter nor a module is named")


def process_of(ospid: int) -> tuple[int, int]:
    """Linux pid and start time of a client, which together identify it for ever."""
    stat = procfs.read_stat(ospid)
    return (ospid, stat.started) if stat is not None else (0, 0)


def _default_name(args: wire.Spawn) -> str:
    target = "stdin" if args.kind == "file" and args.target == "-" else wire.os_shown(args.target)
    stem = target.rpartition(".")[2] if args.kind == "module" else PurePath(target).stem
    name = re.sub(r"[\x00-\x20\x7f/]+", "_", stem)[:64]
    if name in ("", ".", ".."):
        return "agent"
    return f"_{name}"[:64] if name.isdecimal() or name.startswith("-") else name


def _nice_of_child(parent: Proc | None, nice: int | None, allowed: bool = False) -> int:
    if parent is None:
        return nice or 0
    if nice is not None and nice < parent.nice and not allowed:
        raise wire.error(errno.EPERM, f"nice: an agent may not start one nicer than itself ({parent.nice})")
    return parent.nice if nice is None else nice


def group_of_child(parent: Proc | None, group: str | None, allowed: bool = False) -> str:
    if parent is None:
        return group or "default"
    if group is not None and group != parent.group and not allowed:
        raise wire.error(errno.EPERM, f"group: an agent of {parent.group!r} may not start one of {group!r}")
    return group or parent.group


def raised(args: wire.Spawn, parent: Proc) -> str:
    """In which way the new agent would have more rights than its parent, its sandbox aside; "": in none."""
    reasons = []
    for check in (lambda: _nice_of_child(parent, args.nice), lambda: group_of_child(parent, args.group)):
        try:
            check()
        except PermissionError as err:
            reasons.append(err.strerror or str(err))
    return "; ".join(reasons)


def program_path(args: wire.Spawn) -> bytes:
    """The path by which rules identify the program; b"": there is none."""
    if args.sandbox.program:
        path = wire.os_bytes(args.sandbox.program)
    elif args.kind == "file" and args.target != "-":
        path = os.path.normpath(os.path.join(wire.os_bytes(args.cwd), wire.os_bytes(args.target)))
    else:
        return b""
    return path if os.path.isabs(path) else b""
