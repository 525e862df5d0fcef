"""The ledger keeps what agents have used."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from aiosd.kernel.ledger import CALLS, COMPLETION, ROWS, Ledger


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("aios-ledger")
    yield fd
    os.close(fd)


def test_a_successor_finds_the_rows(memfd: int) -> None:
    row = Ledger(memfd).row(7)
    row[CALLS] += 3
    row[COMPLETION] += 40
    again = Ledger(memfd).row(7)
    assert (again[CALLS], again[COMPLETION]) == (3, 40)
    assert Ledger(memfd).row(8)[CALLS] == 0


def test_a_forgotten_row_is_empty_for_the_next_agent(memfd: int) -> None:
    ledger = Ledger(memfd)
    ledger.row(7)[CALLS] = 5
    ledger.forget(7)
    ledger.forget(7)
    assert ledger.row(8)[CALLS] == 0
    assert Ledger(memfd).row(7)[CALLS] == 0


def test_more_agents_than_rows_are_counted_all_the_same(memfd: int) -> None:
    ledger = Ledger(memfd)
    for pid in range(1, ROWS + 10):
        ledger.row(pid)[CALLS] += 1
    assert ledger.row(ROWS)[CALLS] == 1
    beyond = ledger.row(ROWS + 5)
    beyond[CALLS] += 1
    assert beyond[CALLS] == 1


def test_a_successor_finds_the_command_lines(memfd: int) -> None:
    ledger = Ledger(memfd)
    for pid, command in ((7, "a.py x"), (8, "é" * 4096)):
        ledger.row(pid)
        ledger.keep_command(pid, command)
    ledger.keep_command(9, "of no row")
    again = Ledger(memfd)
    assert again.command(7) == "a.py x"
    assert again.command(8) == "é" * 511
    assert again.command(9) == ""
