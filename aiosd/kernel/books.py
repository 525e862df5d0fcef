"""Whether the kernel's books balance: against each other, and against what Linux says.

`check` is asked for by `aiosd status --check`, by the tests after each test, by benchmarks/chaos.py after each fault.
It changes nothing. What is on its way between two processes at this moment may show as a line that is gone a moment
later; `status` looks twice for that reason.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from aiosd import procfs
from aiosd.kernel import ledger
from aiosd.kernel.peer import AgentPeer, Generation, Peer
from aiosd.kernel.proc import Proc

if TYPE_CHECKING:
    from aiosd.kernel.budget import Budget
    from aiosd.kernel.loop import Kernel


def check(kernel: Kernel) -> list[str]:
    """One line for each discrepancy; empty when all is well."""
    parts = (_processes, _families, _calls, _slots, _mailboxes, _tokens, _rings, _assembly)
    return [line for part in parts for line in part(kernel)]


def peers(kernel: Kernel) -> list[Peer]:
    agents: list[Peer] = [proc.peer for proc in kernel.table if proc.peer is not None]
    return [*agents, *kernel.control.clients.values()]


def _processes(kernel: Kernel) -> Iterator[str]:
    """Live agents and aiosd's own processes are the supervisor's children, and there are no others."""
    supervisor = os.getppid()
    children = set(procfs.children(supervisor))
    live = {proc.ospid: proc for proc in kernel.table.live()}
    for ospid, proc in live.items():
        if ospid not in children:
            yield f"agent {proc.pid}: the supervisor has no child {ospid}"
    own = {os.getpid(), *(core.ospid for core in kernel.cores)}
    for ospid in children - set(live) - own:
        stat = procfs.read_stat(ospid)
        if stat is not None and stat.state != "Z" and procfs.name(ospid) != "aios:spare":
            yield f"process {ospid} ({procfs.name(ospid)}): a child of the supervisor, and nobody's agent"
    if set(kernel.agents.by_ospid) != set(live):
        yield f"agents by Linux pid: {len(kernel.agents.by_ospid)}, live in the table: {len(live)}"


def _families(kernel: Kernel) -> Iterator[str]:
    for pid, children in kernel.table.children.items():
        for child in children.values():
            if child.ppid != pid or kernel.table.get(child.pid) is not child:
                yield f"agent {child.pid}: filed under parent {pid}, says {child.ppid}"
    known = {proc.pid for proc in kernel.table} | set(kernel.table.history)
    rows = kernel.ledger.pids()
    if rows - known:
        yield f"rows in the ledger of agents that nobody knows: {sorted(rows - known)[:10]}"


def _calls(kernel: Kernel) -> Iterator[str]:
    """Every call that lies with a core, waits for an end or for a fork is open."""
    open_keys = {call.key for peer in peers(kernel) for call in peer.calls.values()}
    for core in kernel.cores:
        for key in core.calls:
            if key not in open_keys:
                yield f"core {core.name}: call {key} belongs to nobody"
    for call in kernel.waiters.calls():
        if call.peer.calls.get(call.id) is not call:
            yield f"call {call.key} waits for a process and is closed"


def _slots(kernel: Kernel) -> Iterator[str]:
    for core in kernel.cores:
        slots = core.stats.get("slots")
        if isinstance(slots, dict) and slots.get("free", 0) + slots.get("used", 0) != slots.get("total", 0):
            yield f"core {core.name}: slots do not add up: {slots}"


def _mailboxes(kernel: Kernel) -> Iterator[str]:
    waiting = 0
    for proc in kernel.table:
        size = sum(len(memoryview(message.obj)) for message in proc.mailbox)
        waiting += len(proc.mailbox)
        if size != proc.mailbox_bytes:
            yield f"agent {proc.pid}: {size} bytes in its mailbox, {proc.mailbox_bytes} in the books"
        if proc.mailbox and proc.receivers:
            yield f"agent {proc.pid}: {len(proc.mailbox)} messages and {len(proc.receivers)} receivers wait"
    if waiting != len(kernel.journal.waiting()):
        yield f"messages: {waiting} in mailboxes, {len(kernel.journal.waiting())} in the journal"


def _tokens(kernel: Kernel) -> Iterator[str]:
    """What an agent and its budgets show is what closed calls have used (the ledger) and open ones."""
    budgets: dict[Budget, int] = {}
    for proc in kernel.table:
        generations = _generations(proc)
        shown = (proc.prompt_tokens, proc.cached_tokens, proc.completion_tokens)
        counted = (
            proc.row[ledger.PROMPT] + sum(one.prompt_tokens for one in generations),
            proc.row[ledger.CACHED] + sum(one.cached_tokens for one in generations),
            proc.row[ledger.COMPLETION] + sum(len(one.tokens) for one in generations),
        )
        if shown != counted:
            yield f"agent {proc.pid}: prompt, cached, completion tokens {shown}, counted {counted}"
        for budget in proc.budgets:
            budgets[budget] = budgets.get(budget, 0) + sum(one.used for one in generations)
    for budget, under_way in budgets.items():
        settled = budget.row[ledger.CHARGED] if budget.row is not None else 0
        if budget.tokens_used != settled + under_way:
            yield f"budget of {budget.owner}: {budget.tokens_used} tokens charged, {settled} + {under_way} generated"


def _generations(proc: Proc) -> list[Generation]:
    calls = proc.peer.calls.values() if proc.peer is not None else ()
    return [call.generation for call in calls if call.generation is not None]


def _assembly(kernel: Kernel) -> Iterator[str]:
    held = sum(peer.assembling for peer in [*peers(kernel), *kernel.control.strangers])
    if held != kernel.assembly.total:
        yield f"unfinished frames: {held} bytes with peers, {kernel.assembly.total} in the books"


def _rings(kernel: Kernel) -> Iterator[str]:
    for peer in peers(kernel):
        if isinstance(peer, AgentPeer) and (wrong := peer.channel.unbalanced()):
            yield f"agent {peer.id}: {wrong}"
