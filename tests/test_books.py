"""The check of the books finds what is wrong with them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec import Raw

from aiosd.kernel import books, ledger
from aiosd.kernel.budget import Budget
from aiosd.kernel.generation import OpenGeneration
from aiosd.kernel.mail import Mailbox, Message
from aiosd.kernel.peer import Call, ClientPeer
from aiosd.kernel.peers import Peers
from aiosd.kernel.proc import Proc, ProcTable
from libaios import wire


@pytest.fixture
def kernel() -> Any:
    """A kernel's books with one agent, which is this process, and with a message and a generation that a child of it
    makes over the control socket."""
    row = memoryview(bytearray(8 * ledger.ITEMS)).cast("Q")
    table = ProcTable(10)
    budget = Budget(7, wire.Limits(tokens=100), tokens_used=9, row=row, sharers={7})
    proc = Proc(7, os.getpid(), 7, 0, "x", "x", "", "", 0.0, 0, row=row, budgets=[budget])
    table.add(proc)
    sock: Any = None
    peer = ClientPeer(sock, 0, proc, lambda: None)
    peer.id = -1
    peers = Peers()
    peers.add(peer)
    generation = OpenGeneration(wire.Generate(prompt="x"), "nano", wire.Progress([1, 2, 3]), used=5, prompt_tokens=4)
    generation.cached_tokens, generation.completion_tokens = 2, 3
    call = Call(peer, 1, wire.TABLE[wire.Sys.GENERATE], size=10, generation=generation)
    peer.calls[1] = call
    proc.row[ledger.PROMPT], proc.row[ledger.COMPLETION], proc.row[ledger.CHARGED] = 3, 1, 4
    proc.prompt_tokens, proc.cached_tokens, proc.completion_tokens = 7, 2, 4
    box = Mailbox(deque([Message(1, 0, Raw(b"\xc0"), 1)]), size=1)
    core = SimpleNamespace(
        name="llm:nano", ospid=0, calls={call.key: call}, stats={"slots": {"free": 3, "used": 1, "total": 4}}
    )
    return SimpleNamespace(
        table=table,
        proc=proc,
        budget=budget,
        core=core,
        peer=peer,
        box=box,
        peers=peers,
        calls=SimpleNamespace(peers=peers, open_bytes=10, assembly=SimpleNamespace(total=0)),
        services=[core],
        waiters=SimpleNamespace(calls=list),
        mail=SimpleNamespace(boxes=lambda: [(7, box)], total=1, journal=SimpleNamespace(waiting=lambda: [1])),
        ledger=SimpleNamespace(pids=lambda: {7}),
        budgets=OneBudget(budget),
        strangers={},
    )


class OneBudget(list[Budget]):
    def __init__(self, budget: Budget) -> None:
        super().__init__([budget])

    def owners(self) -> set[int]:
        return {budget.owner for budget in self}


PARTS = [books.families, books.calls, books.slots, books.mailboxes, books.tokens, books.sizes]


def check(kernel: Any) -> list[str]:
    """Check the books, without the comparison with /proc, because this process is no child of a supervisor."""
    return [line for part in PARTS for line in part(kernel)]


def test_books_that_balance(kernel: Any) -> None:
    assert check(kernel) == []


def spoil_tokens(kernel: Any) -> None:
    kernel.proc.completion_tokens += 1


def spoil_budget(kernel: Any) -> None:
    kernel.budget.tokens_used -= 1


def spoil_ledger(kernel: Any) -> None:
    kernel.proc.row[ledger.CACHED] += 1


def spoil_mailbox(kernel: Any) -> None:
    kernel.box.size += 1


def spoil_journal(kernel: Any) -> None:
    kernel.mail.journal.waiting = list


def spoil_sizes(kernel: Any) -> None:
    kernel.calls.open_bytes += 1


def spoil_slots(kernel: Any) -> None:
    kernel.core.stats["slots"]["free"] = 4


def spoil_calls(kernel: Any) -> None:
    kernel.peer.calls.clear()
    kernel.calls.open_bytes = 0
    kernel.proc.prompt_tokens, kernel.proc.cached_tokens, kernel.proc.completion_tokens = 3, 0, 1
    kernel.budget.tokens_used = 4


def spoil_parents(kernel: Any) -> None:
    kernel.proc.ppid = 99


def spoil_rows(kernel: Any) -> None:
    kernel.ledger.pids = lambda: {7, 123}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_tokens, "completion tokens"),
        (spoil_budget, "8 tokens charged, 4 + 5 generated"),
        (spoil_ledger, "cached"),
        (spoil_mailbox, "1 bytes in its mailbox, 2 in the books"),
        (spoil_journal, "1 in mailboxes, 0 in the journal"),
        (spoil_sizes, "open calls: 10 bytes, 11 in the books"),
        (spoil_slots, "slots do not add up"),
        (spoil_calls, "is not open"),
        (spoil_parents, "filed under parent 1, names 99"),
        (spoil_rows, "[123]"),
    ],
)
def test_a_discrepancy_is_named(kernel: Any, spoil: Callable[[Any], None], words: str) -> None:
    spoil(kernel)
    (line,) = check(kernel)
    assert words in line
