"""The check of the books finds what is wrong with them."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec import Raw

from aiosd.kernel import books, ledger
from aiosd.kernel.budget import Budget
from aiosd.kernel.peer import Call, Generation, Peer
from aiosd.kernel.proc import Message, Proc, ProcTable
from libaios import wire


@pytest.fixture
def kernel() -> Any:
    """A kernel's books with one agent in them, which is this very process, with a message and a generation."""
    row = memoryview(bytearray(8 * ledger.ITEMS)).cast("Q")
    table = ProcTable(10)
    budget = Budget(7, wire.Limits(tokens=100), tokens_used=9, row=row)
    proc = Proc(7, os.getpid(), 7, 0, "x", "x", "", "", 0.0, 0, row=row, budgets=[budget])
    proc.peer = Peer(7, proc)  # type: ignore[assignment]
    call = Call(proc.peer, 1, wire.Sys.GENERATE, core="nano")
    call.generation = Generation(wire.Generate(prompt="x"), "nano", [1, 2, 3], used=5, prompt_tokens=4, cached_tokens=2)
    proc.peer.calls[1] = call
    proc.row[ledger.PROMPT], proc.row[ledger.COMPLETION], proc.row[ledger.CHARGED] = 3, 1, 4
    proc.prompt_tokens, proc.cached_tokens, proc.completion_tokens = 7, 2, 4
    proc.mailbox.append(Message(1, 0, Raw(b"\xc0")))
    proc.mailbox_bytes = 1
    table.add(proc)
    core = SimpleNamespace(
        name="nano", ospid=0, calls={call.key: call}, stats={"slots": {"free": 3, "used": 1, "total": 4}}
    )
    return SimpleNamespace(
        table=table,
        proc=proc,
        budget=budget,
        core=core,
        cores=[core],
        control=SimpleNamespace(clients={}),
        agents=SimpleNamespace(by_ospid={os.getpid(): proc}),
        waiters=SimpleNamespace(calls=list),
        journal=SimpleNamespace(waiting=lambda: [1]),
        ledger=SimpleNamespace(pids=lambda: {7}),
    )


PARTS = [books._families, books._calls, books._slots, books._mailboxes, books._tokens]


def check(kernel: Any) -> list[str]:
    """All but the comparison with /proc: this process is nobody's supervisor."""
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
    kernel.proc.mailbox_bytes += 1


def spoil_journal(kernel: Any) -> None:
    kernel.journal.waiting = list


def spoil_slots(kernel: Any) -> None:
    kernel.core.stats["slots"]["free"] = 4


def spoil_calls(kernel: Any) -> None:
    kernel.proc.peer.calls.clear()
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
        (spoil_slots, "slots do not add up"),
        (spoil_calls, "belongs to nobody"),
        (spoil_parents, "filed under parent 1, says 99"),
        (spoil_rows, "[123]"),
    ],
)
def test_a_discrepancy_is_named(kernel: Any, spoil: Callable[[Any], None], words: str) -> None:
    spoil(kernel)
    (line,) = check(kernel)
    assert words in line
