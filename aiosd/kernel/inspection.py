"""Makes the report of `aios-inspect` about one agent."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from aiosd.budgets.limits import KINDS, SAMPLE_S, Kind
from aiosd.kernel.budget import Budget
from aiosd.kernel.peer import AgentPeer, ClientPeer, Peer
from aiosd.kernel.proc import Proc, shown_exit
from aiosd.sandbox.box import Box
from libaios import wire


def inspect(
    proc: Proc, line: wire.ProcInfo, peers: Sequence[Peer], children: list[int], mailbox: int
) -> dict[str, Any]:
    """The report. `line`: its line in aios-ps. `peers`: all its connections."""
    return {
        **{field: getattr(line, field) for field in line.__struct_fields__},
        "state": proc.state.value,
        "log": proc.log,
        "named": proc.named,
        "attached": bool(proc.attached_to),
        "ended": proc.ended or None,
        "signal": -proc.status if proc.status is not None and proc.status < 0 else None,
        "exit": shown_exit(proc),
        "budget": proc.budget,
        "reason": proc.reason,
        "denied": proc.denied,
        "children": children,
        "budgets": [_budget(budget) for budget in proc.budgets],
        "tools": {"cpu_s": round(proc.tools_cpu_s, 3), "memory_bytes": proc.tools_bytes, "lag_s": SAMPLE_S},
        "restart": proc.restart,
        "restarts": proc.restarts,
        "template": None if proc.template is None else _template(proc.template),
        "box": None if proc.box is None else _box(proc.box),
        "mailbox": mailbox,
        "connected": any(isinstance(peer, AgentPeer) for peer in peers),
        "clients": [peer.ospid for peer in peers if isinstance(peer, ClientPeer)],
        "open_calls": [
            {"id": call.id, "call": call.row.name, "over": "channel" if isinstance(peer, AgentPeer) else "socket"}
            for peer in peers
            for call in peer.calls.values()
        ],
    }


def _template(template: wire.Template) -> dict[str, Any]:
    """The template of an agent. `python`: "" is aiosd's own."""
    return {"name": template.name, "modules": template.modules, "python": wire.os_shown(template.python)}


def _box(box: Box) -> dict[str, Any]:
    """What a confined agent may reach."""
    return {
        "level": box.level,
        "net": box.net,
        "workspace": wire.os_shown(box.workspace),
        "read": [wire.os_shown(path) for path in box.read],
        "write": [wire.os_shown(path) for path in box.write],
    }


def _budget(budget: Budget) -> dict[str, Any]:
    now = time.monotonic()
    return {
        "owner": 0 if budget.group else budget.owner,
        "group": budget.group,
        "tokens": budget.limits.tokens,
        "tokens_used": budget.tokens_used,
        "time_s": budget.limits.time_s,
        "memory_bytes": budget.limits.memory_bytes,
        "reached": budget.reached,
        "kinds": kinds(budget, now),
    }


def kinds(budget: Budget, now: float) -> dict[str, dict[str, Any]]:
    """For each kind that the budget limits: the limit, and how much is used."""
    return {kind.name: _kind(budget, kind, now) for kind in KINDS if kind.of(budget.limits) is not None}


def _kind(budget: Budget, kind: Kind, now: float) -> dict[str, Any]:
    """One kind. `lag_s`: how old the figure may be at most, in seconds; null: it is exact. `age_s`: how old it is."""
    limit = kind.of(budget.limits) or 0
    shown = {"limit": kind.shown(limit), "used": kind.shown(budget.used(kind.name, now)), "lag_s": None}
    if kind.lag_s:
        shown |= {"lag_s": kind.lag_s, "age_s": round(now - budget.sampled, 3) if budget.sampled else None}
    return shown
