"""Agents as aios-ps shows them.

The part that only Linux knows (the state of a process, its processor time) is read from /proc, which takes longer than
the rest of a line. So it is read at most once in `FRESH_S`, however many listings are requested.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from aiosd import procfs
from aiosd.kernel.peer import Call
from aiosd.kernel.proc import Proc, ProcState, shown_exit
from aiosd.units import format_money
from libaios import wire

FRESH_S = 0.2


def stat_letter(proc: Proc, calls: Sequence[Call], os_state: str, parked: bool = True) -> str:
    """STAT: R on the LLM or computing, Q waiting for the LLM, S sleeping, T stopped, W waiting to be started again, Z
    dead and not waited for, X dead.

    With no call open only Linux knows whether the agent computes or sleeps. `parked` False: it has stopped, but a core
    still decodes its generations; it shows T when nothing more can happen.
    """
    if not proc.alive:
        return "Z" if proc.state is ProcState.ZOMBIE else "X"
    if proc.state is ProcState.STOPPED and parked:
        return "T"
    if proc.outside and proc.halted and parked:
        return "T"
    if proc.state is ProcState.WAITING and not proc.outside:
        return "W"
    generations = [call.generation for call in calls if call.generation is not None]
    if any(generation.started for generation in generations):
        return "R"
    if generations:
        return "Q"
    if calls:
        return "S"
    return "R" if os_state == "R" else "S"


def look(proc: Proc) -> None:
    """Read from /proc what Linux knows of a live agent."""
    now = time.monotonic()
    if not proc.alive or now - proc.looked < FRESH_S:
        return
    proc.looked = now
    stat = procfs.read_stat(proc.ospid)
    if stat is not None:
        proc.cpu_s, proc.os_state = stat.cpu_s, stat.state


def line(proc: Proc, calls: Sequence[Call], context: tuple[str, int] = ("", 0), parked: bool = True) -> wire.ProcInfo:
    """One line of aios-ps; memory was sampled before. `context`: where a core keeps the agent's context, and its number
    of tokens. The use of its calls of tools is included."""
    look(proc)
    return wire.ProcInfo(
        pid=proc.pid,
        ppid=proc.ppid,
        pgid=proc.pgid,
        ospid=proc.ospid,
        uid=proc.uid,
        stat=stat_letter(proc, calls, proc.os_state, parked),
        nice=proc.nice,
        name=proc.name,
        command=proc.command,
        group=proc.group,
        calls=proc.calls,
        prompt_tokens=proc.prompt_tokens,
        cached_tokens=proc.cached_tokens,
        completion_tokens=proc.completion_tokens,
        cost=format_money(proc.cost),
        ctx_tokens=proc.ctx_tokens,
        mem_bytes=proc.mem_bytes + proc.tools_bytes,
        cpu_s=round(proc.cpu_s + proc.tools_cpu_s, 3),
        started=proc.started,
        exit=shown_exit(proc),
        ctx_kept=context[1],
        ctx_place=context[0],
        restarts=proc.restarts,
        sandbox=proc.box.level if proc.box is not None else "none",
        budget=proc.budget,
        reason=proc.reason,
        template=proc.template.name if proc.template is not None else "",
        ended=proc.ended or None,
    )
