"""Checks whether the kernel's books (its counts) agree with each other, and with what Linux reports.

`check` is requested by `aiosd status --check`, by the tests after each test, by benchmarks/chaos.py after each fault.
It changes nothing. A message on its way between two processes may cause a line that is gone a moment later; therefore
`status` checks twice.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from aiosd import procfs
from aiosd.ipc.service import TOOLBOX
from aiosd.kernel import ledger
from aiosd.kernel.budget import Budgets
from aiosd.kernel.calls import CallTable
from aiosd.kernel.generation import OpenGeneration
from aiosd.kernel.ledger import Ledger
from aiosd.kernel.mail import Mail
from aiosd.kernel.peer import AgentPeer, Peer
from aiosd.kernel.peers import Peers
from aiosd.kernel.proc import Proc, ProcState, ProcTable
from aiosd.kernel.service import Services, ServiceState
from aiosd.kernel.system import System
from aiosd.kernel.waiters import Waiters


@dataclass(slots=True)
class Books:
    """The parts whose counts are compared. `by_ospid`: live agents by Linux pid. `strangers`: clients that have sent no
    Hello yet."""

    table: ProcTable
    calls: CallTable
    services: Services
    waiters: Waiters
    mail: Mail
    ledger: Ledger
    budgets: Budgets
    by_ospid: Mapping[int, Proc]
    strangers: Iterable[Peer]
    system: System

    @property
    def peers(self) -> Peers:
        return self.calls.peers

    def check(self, wrong: list[str]) -> Iterator[None]:
        """A job: adds one line to `wrong` for each discrepancy."""
        for part in (families, calls, slots, mailboxes, tokens, processors, rings, sizes):
            wrong.extend(part(self))
            yield
        for line in processes(self):
            if line:
                wrong.append(line)
            yield


def processes(books: Books) -> Iterator[str]:
    """Live agents and aiosd's own processes are the supervisor's children, and there are no others. Yields "" for each
    one without a fault, so that the job can be interrupted: reading about thousands takes long."""
    supervisor = os.getppid()
    children = set(procfs.children(supervisor))
    live = {proc.ospid: proc for proc in books.table.live() if proc.state is not ProcState.WAITING}
    if set(books.by_ospid) != set(live):
        yield f"agents by Linux pid: {len(books.by_ospid)}, live in the table: {len(live)}"
    for ospid, proc in live.items():
        if ospid not in children and proc.alive:
            yield f"agent {proc.pid}: the supervisor has no child {ospid}"
    own = {process.ospid for process in books.system.processes()}
    for server in books.system.servers:
        if server.ospid not in children:
            yield f"MCP server {server.name}: the supervisor has no child {server.ospid}"
    for ospid in children - set(live) - own:
        stat, name = procfs.read_stat(ospid), procfs.name(ospid)
        if stat is not None and stat.state != "Z" and stat.ppid == supervisor and name != "aios:spare":
            yield f"process {ospid} ({name}): a child of the supervisor, and no agent"
        else:
            yield ""


def families(books: Books) -> Iterator[str]:
    for pid, children in books.table.children.items():
        for child in children.values():
            if child.ppid != pid or books.table.get(child.pid) is not child:
                yield f"agent {child.pid}: filed under parent {pid}, names {child.ppid}"
    known = {proc.pid for proc in books.table.procs.values()} | set(books.table.history) | books.budgets.owners()
    unknown = books.ledger.pids() - known
    if unknown:
        yield f"rows in the ledger of agents that are not known: {sorted(unknown)[:10]}"


def calls(books: Books) -> Iterator[str]:
    """Every call that a service has, or that waits for an end, is open."""
    is_open = {call.key for peer in books.peers for call in peer.calls.values()}
    for service in books.services:
        for key in service.calls:
            if key not in is_open:
                yield f"{service.name}: call {key} is not open"
    for call in books.waiters.calls():
        if call.key not in is_open:
            yield f"call {call.key} waits for a process and is closed"


def slots(books: Books) -> Iterator[str]:
    for service in books.services:
        found = service.stats.get("slots")
        if isinstance(found, dict) and found.get("free", 0) + found.get("used", 0) != found.get("total", 0):
            yield f"{service.name}: slots do not add up: {found}"


def mailboxes(books: Books) -> Iterator[str]:
    waiting, total = 0, 0
    for pid, box in books.mail.boxes():
        size = sum(message.size for message in box.messages)
        waiting, total = waiting + len(box.messages), total + size
        if size != box.size:
            yield f"agent {pid}: {size} bytes in its mailbox, {box.size} in the books"
        if box.messages and box.receivers:
            yield f"agent {pid}: {len(box.messages)} messages and {len(box.receivers)} receivers wait"
    if waiting != len(books.mail.journal.waiting()):
        yield f"messages: {waiting} in mailboxes, {len(books.mail.journal.waiting())} in the journal"
    if total != books.mail.total:
        yield f"mailboxes: {total} bytes, {books.mail.total} in the books"


def tokens(books: Books) -> Iterator[str]:
    """The usage that an agent and its budgets show is that of closed calls (in the ledger) plus that of open ones, over
    all connections of the agent."""
    for proc in books.table:
        open_ones = _generations(books, proc)
        shown = (proc.prompt_tokens, proc.cached_tokens, proc.completion_tokens, proc.cost)
        counted = (
            proc.row[ledger.PROMPT] + sum(one.prompt_tokens for one in open_ones),
            proc.row[ledger.CACHED] + sum(one.cached_tokens for one in open_ones),
            proc.row[ledger.COMPLETION] + sum(one.completion_tokens for one in open_ones),
            proc.row[ledger.COST] + sum(one.cost for one in open_ones),
        )
        if shown != counted:
            yield f"agent {proc.pid}: prompt, cached, completion tokens, cost {shown}, counted {counted}"
    for budget in books.budgets:
        sharers = [one for pid in budget.sharers if (one := books.table.get(pid)) is not None]
        open_ones = [one for sharer in sharers for one in _generations(books, sharer)]
        under_way = sum(one.used for one in open_ones)
        settled = budget.row[ledger.CHARGED]
        if budget.tokens_used != settled + under_way:
            yield f"budget of {budget.owner}: {budget.tokens_used} tokens charged, {settled} + {under_way} generated"
        settled, under_way = budget.row[ledger.COST_CHARGED], sum(one.cost for one in open_ones)
        if budget.cost_used != settled + under_way:
            yield f"budget of {budget.owner}: {budget.cost_used} of money charged, {settled} + {under_way} spent"


def processors(books: Books) -> Iterator[str]:
    """The processor time of live agents and their calls of tools has been charged to each budget; and no call that has
    ended holds memory."""
    for budget in books.budgets:
        sharers = [one for pid in budget.sharers if (one := books.table.get(pid)) is not None]
        used = sum(one.row[ledger.OWN_CPU_US] + one.row[ledger.TOOLS_CPU_US] for one in sharers)
        if budget.row[ledger.CPU_US] < used:
            yield f"budget of {budget.owner}: {budget.row[ledger.CPU_US]} µs on processors charged, {used} used"
    toolbox = books.services.of_kind(TOOLBOX)
    if toolbox is None or toolbox.state is not ServiceState.READY:
        for proc in books.table:
            if proc.tools_bytes:
                yield f"agent {proc.pid}: its calls of tools hold {proc.tools_bytes} bytes, and none runs"


def _generations(books: Books, proc: Proc) -> list[OpenGeneration]:
    return [call.generation for call in books.peers.calls_of(proc) if call.generation is not None]


def sizes(books: Books) -> Iterator[str]:
    """Sizes that are counted along the way are equal to the real ones."""
    held = sum(peer.assembling for peer in [*books.peers, *books.strangers])
    if held != books.calls.assembly.total:
        yield f"unfinished frames: {held} bytes with peers, {books.calls.assembly.total} in the books"
    opened = sum(call.size for peer in books.peers for call in peer.calls.values())
    if opened != books.calls.open_bytes:
        yield f"open calls: {opened} bytes, {books.calls.open_bytes} in the books"


def rings(books: Books) -> Iterator[str]:
    for peer in books.peers:
        if isinstance(peer, AgentPeer) and (wrong := peer.channel.unbalanced()):
            yield f"agent {peer.id}: {wrong}"
