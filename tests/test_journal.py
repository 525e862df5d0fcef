"""The journal of messages: a successor reads the complete state from it."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiosd.errors import WorldError
from aiosd.kernel.journal import MAGIC, VERSION, Journal
from libaios import wire

Make = Callable[..., Journal]


def new_fds() -> tuple[int, int]:
    return os.memfd_create("aios-journal-a"), os.memfd_create("aios-journal-b")


@pytest.fixture
def make() -> Iterator[Make]:
    """A function that opens the journal as the next kernel does."""
    fds = new_fds()
    yield lambda **options: Journal(fds, lambda pid: True, **options)
    for fd in fds:
        os.close(fd)


def obj(value: object) -> msgspec.Raw:
    return wire.raw(value)


def content(journal: Journal) -> list[tuple[int, int, object]]:
    return [(m.to, m.sender, msgspec.msgpack.decode(m.obj)) for m in journal.waiting()]


def test_accepted_messages_are_there_for_the_next_kernel(make: Make) -> None:
    journal = make()
    journal.sent((7, 1), 8, 7, obj("a"))
    seq = journal.sent((7, 2), 8, 7, obj("b"))
    journal.taken((8, 1), seq)
    successor = make()
    assert content(successor) == [(8, 7, "a")]


def test_a_call_submitted_again_finds_what_it_did(make: Make) -> None:
    journal = make()
    seq = journal.sent((7, 1), 8, 7, obj({"x": 1}))
    journal.taken((8, 5), seq)
    successor = make()
    assert successor.served[7, 1] is None
    received = successor.served[8, 5]
    assert received is not None
    assert (received.sender, msgspec.msgpack.decode(received.obj)) == (7, {"x": 1})
    assert (8, 6) not in successor.served


def test_half_a_record_does_not_count(make: Make) -> None:
    journal = make()
    journal.sent((7, 1), 8, 7, obj("whole"))
    fd = journal._fds[journal._at]
    os.pwrite(fd, b"\x40\x00\x00\x00torn", 32 + journal._size)  # died before the count was written
    successor = make()
    assert content(successor) == [(8, 7, "whole")]
    successor.sent((7, 2), 8, 7, obj("next"))
    assert [value for *_, value in content(make())] == ["whole", "next"]


def test_numbers_are_not_used_twice_by_a_successor(make: Make) -> None:
    first = make().sent((7, 1), 8, 7, obj("a"))
    second = make().sent((7, 2), 8, 7, obj("b"))
    assert second > first


def test_it_stays_small_and_loses_no_waiting_message(make: Make) -> None:
    journal = make(compact_at=4096)
    kept = journal.sent((7, 0), 9, 7, obj("kept"))
    for n in range(20_000):
        journal.taken((8, n), journal.sent((7, n + 1), 8, 7, obj(n)))
    assert max(os.fstat(fd).st_size for fd in journal._fds) < 1 << 20
    successor = make()
    assert content(successor) == [(9, 7, "kept")]
    assert successor.served[8, 19_999] is not None
    assert kept == 1


def test_a_death_while_compacting_leaves_the_old_one(make: Make) -> None:
    journal = make()
    journal.sent((7, 1), 8, 7, obj("a"))
    other = journal._fds[1 - journal._at]
    os.pwrite(other, struct.pack("=4Q", MAGIC, VERSION, 0, 99) + b"garbage of a compaction that did not finish", 0)
    assert content(make()) == [(8, 7, "a")]


def test_a_journal_of_another_release_is_refused_with_a_sentence(make: Make) -> None:
    journal = make()
    journal.sent((7, 1), 8, 7, obj("a"))
    os.pwrite(journal._fds[journal._at], struct.pack("=Q", VERSION + 1), 8)
    with pytest.raises(WorldError, match=f"a journal of version {VERSION + 1}; this is version {VERSION}"):
        make()


@pytest.mark.parametrize("head", [b"x", b"\0" * 32, b"aiosring" + b"\1" + b"\0" * 23])
def test_another_file_is_refused(make: Make, head: bytes) -> None:
    journal = make()
    os.ftruncate(journal._fds[0], 0)
    os.pwrite(journal._fds[0], head, 0)
    with pytest.raises(WorldError, match="journal"):
        make()


EVENTS = st.tuples(st.sampled_from(["send", "take", "die"]), st.integers(2, 4), st.binary(max_size=60))


@given(st.lists(EVENTS, max_size=60))
def test_replay_equals_what_happened(events: list[tuple[str, int, bytes]]) -> None:
    fds = new_fds()
    try:
        journal = Journal(fds, lambda pid: True, compact_at=500)
        expected: list[tuple[int, bytes]] = []
        for number, (event, pid, data) in enumerate(events):
            if event == "send":
                journal.sent((1, number), pid, 1, obj(data))
                expected.append((pid, data))
            elif event == "take":
                mine = [message for message in journal.waiting() if message.to == pid]
                if mine:
                    journal.taken((pid, number), mine[0].seq)
                    expected.remove((pid, msgspec.msgpack.decode(mine[0].obj)))
            else:
                journal = Journal(fds, lambda pid: True, compact_at=500)
            assert [(message.to, msgspec.msgpack.decode(message.obj)) for message in journal.waiting()] == expected
    finally:
        for fd in fds:
            os.close(fd)
