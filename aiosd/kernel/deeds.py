"""Makes deeds of system calls that the kernel answers: the parts that rules can name, and the text for a person.

Deeds of the store's and the toolbox's calls are made there, because only the store knows which file is meant, and only
the toolbox knows the tool.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable
from typing import Any

import msgspec

from aiosd.access.deed import Deed, details_of
from aiosd.kernel.proc import Proc
from libaios import wire
from libaios.wire import Sys

#: Calls whose deeds are made by their service.
OF_SERVICES = frozenset(
    (
        Sys.TOOL_CALL, Sys.TOOL_ADMIT,
        Sys.STO_WRITE, Sys.STO_READ, Sys.STO_STAT, Sys.STO_HISTORY, Sys.STO_ROLLBACK, Sys.STO_REMOVE, Sys.STO_SHARE,
        Sys.STO_UNSHARE, Sys.STO_UPLOAD, Sys.STO_PIECE, Sys.STO_FINISH, Sys.STO_ABORT, Sys.MEM_ADD, Sys.MEM_UPDATE,
        Sys.MEM_REMOVE,
    )
)  # fmt: skip
#: Calls that rules cannot forbid: without them an agent could not give anything up.
FREE = frozenset((Sys.GETPID, Sys.GETPPID, Sys.CANCEL))

RAISES = "an agent that raises rights asks"


def signalled(args: wire.Kill, targets: Iterable[Proc]) -> Deed:
    procs = list(targets)
    name = signal.Signals(args.signal).name.removeprefix("SIG") if args.signal in _SIGNALS else str(args.signal)
    return Deed(
        "kill",
        resources=[("signal", name), *_groups(procs)],
        details=details_of([("signal", name), ("to", ", ".join(f"{proc.name}({proc.pid})" for proc in procs))]),
    )


def concerning(row: wire.Row, args: Any, target: Proc) -> Deed:
    """The deed of a call about one other agent."""
    of = [("agent", f"{target.name}({target.pid})")]
    return Deed(row.name, resources=_groups([target]), details=details_of([*of, *_fields(args)]))


def plain(row: wire.Row, args: Any) -> Deed:
    return Deed(row.name, details=details_of(_fields(args)))


def renice(args: wire.NiceArgs, target: Proc, new: int) -> Deed:
    """The deed of an agent that sets a lower nice value."""
    what = [("agent", f"{target.name}({target.pid})"), ("nice", f"from {target.nice} to {new}")]
    return Deed(
        "nice",
        resources=_groups([target]),
        details=details_of(what),
        default=RAISES,
        once=True,
        reason=f"nice: an agent may not lower it (from {target.nice} to {new})",
    )


def spawned(args: wire.Spawn, raised: str = "") -> Deed:
    """The deed of a spawn. `raised`: in which way the child would have more rights than its parent. Values of variables
    are not shown."""
    what: list[tuple[str, object]] = [
        ("runs", f"{args.kind} {wire.os_shown(args.target)}"),
        ("arguments", [wire.os_shown(arg) for arg in args.args]),
        ("in", wire.os_shown(args.cwd)),
        ("variables", sorted(wire.os_shown(name) for name in args.env)),
    ]
    if raised:
        what.insert(0, ("raises", raised))
    box = args.sandbox
    what += [(f"sandbox {name}", getattr(box, name)) for name in ("level", "net") if getattr(box, name)]
    what += [
        (f"sandbox {name}", [wire.os_shown(path) for path in getattr(box, name)])
        for name in ("read", "write", "own")
        if getattr(box, name)
    ]
    what += [(name, getattr(args, name)) for name in ("group", "nice", "name") if getattr(args, name) is not None]
    bound = msgspec.msgpack.encode(args)
    return Deed(
        "spawn",
        details=details_of(what),
        bound=bound,
        default=RAISES if raised else "",
        once=bool(raised),
        reason=raised,
    )


_SIGNALS = {number.value for number in signal.Signals}


def _groups(procs: Iterable[Proc]) -> list[tuple[str, str]]:
    return [("group", group) for group in sorted({proc.group for proc in procs})]


def _fields(args: Any) -> list[tuple[str, object]]:
    """The arguments of a call that differ from their defaults."""
    fields = msgspec.structs.fields(args)
    given = [(field.name, getattr(args, field.name), field.default) for field in fields]
    return [(name, _readable(value)) for name, value, default in given if value != default]


def _readable(value: object) -> object:
    """The value in a form that JSON can show."""
    if isinstance(value, msgspec.Raw):
        return _readable(msgspec.msgpack.decode(value))
    return msgspec.to_builtins(value, str_keys=True, enc_hook=repr)
