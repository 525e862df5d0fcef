"""The parts of the kernel that decide about asks and record them, without a system."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from aiosd.access.deed import Deed, Subject
from aiosd.access.rules import AccessPolicy, Act, Rule
from aiosd.kernel.always import LastingApprovals
from aiosd.kernel.approvals import BACK_S, OPEN_OF_AGENT, Approvals
from aiosd.kernel.audit import LINES_PER_S, Audit
from aiosd.kernel.calls import CallTable
from aiosd.kernel.peer import Call, Peer
from aiosd.kernel.peers import Peers
from aiosd.kernel.proc import ProcTable
from aiosd.timers import Timers
from libaios import wire
from libaios.wire import Sys

CALC = Deed("calc", True, details=[("expression", "1")])
ASK = Rule(Act.ASK, True, ["calc"], text="tool=calc", line=3)


# ── the audit ─────────────────────────────────────────────────────────────────────────────────────────────


def lines(path: Path) -> list[dict[str, Any]]:
    return [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]


def test_audit_files_rotate_and_are_private(tmp_path: Path) -> None:
    audit = Audit(tmp_path / "audit.jsonl", size=2000, keep=2, clock=lambda: 1_700_000_000.25)
    for number in range(100):
        audit.note("allowed", number + 1, what="x" * 50)
    audit.close()
    found = sorted(tmp_path.iterdir())
    assert [path.name for path in found] == ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 and path.stat().st_size <= 2000 for path in found)
    pids = [line["pid"] for path in reversed(found) for line in lines(path)]
    assert pids == list(range(pids[0], 101))  # in order, and none is missing in between
    assert lines(found[0])[-1]["time"] == "2023-11-14T22:13:20.250Z"


def test_an_agent_cannot_push_the_audit_out_by_many_lines(tmp_path: Path) -> None:
    now = [100.0]
    audit = Audit(tmp_path / "audit.jsonl", clock=lambda: now[0])
    for _ in range(10_000):
        audit.note("denied", 7)
    audit.note("denied", 8)
    now[0] += 1
    audit.note("denied", 7)
    audit.close()
    found = lines(tmp_path / "audit.jsonl")
    assert len(found) == LINES_PER_S + 3
    assert [line["lines"] for line in found if line["event"] == "more"] == [10_000 - LINES_PER_S]


# ── approvals for all times ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("content", [b"", b"[", b"{}", b'[{"number": 1}]'])
def test_a_file_that_cannot_be_read_allows_nothing(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "always.json"
    path.write_bytes(content)
    always = LastingApprovals(path)
    assert always.covering(Subject("web"), CALC) is None
    assert always.add(Subject("web"), CALC, "a", 0.0).number == 1
    assert LastingApprovals(path).covering(Subject("web"), CALC) is not None


def test_an_approval_that_could_not_be_written_does_not_hold(tmp_path: Path) -> None:
    always = LastingApprovals(tmp_path / "missing" / "always.json")
    with pytest.raises(OSError, match="missing"):
        always.add(Subject("web"), CALC, "a", 0.0)
    assert always.covering(Subject("web"), CALC) is None


# ── asks ──────────────────────────────────────────────────────────────────────────────────────────────────


class FakePeer(Peer):
    def __init__(self, ident: int, proc: Any) -> None:
        super().__init__(ident, proc)
        self.replies: list[wire.Reply] = []

    def send(self, payload: bytes) -> None:
        self.replies.append(wire.decode_reply(payload))

    @property
    def outbox_bytes(self) -> int:
        return 0

    @property
    def errno(self) -> int:
        return self.replies[-1].errno


class World:
    """An agent, a person, and a clock."""

    def __init__(self, tmp_path: Path, timeout: float = 0.0, reborn: bool = False) -> None:
        self.now = 1000.0
        self.timers = Timers(lambda: self.now)
        events: Any = None
        self.calls = CallTable(Peers(), events, self.timers)
        always, audit = LastingApprovals(tmp_path / "always.json"), Audit(tmp_path / "audit.jsonl")
        self.table = ProcTable(10)
        self.approvals = Approvals(AccessPolicy([ASK], timeout), self.table, self.calls, always, audit, "boot", reborn)
        proc: Any = SimpleNamespace(
            pid=7, ppid=1, name="a", group="web", program=b"", sha256=b"", restarts=0, attached_to=-5
        )
        self.table.procs[7] = proc
        self.agent, self.person = FakePeer(7, proc), FakePeer(-5, None)
        self.went_on = 0

    def call(self, peer: FakePeer, number: int, sys: int, again: bool = False) -> Call:
        return self.calls.open(peer, wire.Request(number, sys, again=again), 10)

    def ask(self, number: int = 1, deed: Deed = CALC, again: bool = False) -> bool:
        def go_on() -> None:
            self.went_on += 1

        return self.approvals.judge(self.call(self.agent, number, Sys.TOOL_CALL, again), deed, go_on)

    def listen(self, number: int = 1, **which: Any) -> Call:
        call = self.call(self.person, number, Sys.ASK_WATCH)
        self.approvals.watch(call, wire.WatchAsks(**which))
        return call

    def after(self, seconds: float) -> None:
        self.now += seconds
        self.timers.run_due()


@pytest.fixture
def world(tmp_path: Path) -> Callable[..., World]:
    return lambda **how: World(tmp_path, **how)


def test_an_ask_waits_as_long_as_the_settings_say(world: Callable[..., World]) -> None:
    made = world(timeout=60.0)
    assert made.ask() is False
    made.after(59.0)
    assert not made.agent.replies
    made.after(2.0)
    assert (made.agent.errno, made.approvals.listed()) == (1, [])


def test_the_time_of_an_ask_begins_when_the_last_listener_leaves(world: Callable[..., World]) -> None:
    made = world(timeout=60.0)
    watch = made.listen()
    made.ask()
    made.after(10_000.0)
    assert not made.agent.replies
    made.calls.close(watch)
    made.after(59.0)
    assert not made.agent.replies
    made.after(2.0)
    assert made.agent.errno == 1


@pytest.mark.parametrize(
    ("which", "hears"), [({}, True), ({"pid": 7}, True), ({"pid": 8}, False), ({"attached": True}, True)]
)
def test_who_listens_to_whom(which: dict[str, Any], hears: bool, world: Callable[..., World]) -> None:
    made = world()
    made.listen(**which)
    if hears:
        assert made.ask() is False
        assert len(made.person.replies) == 1
    else:
        with pytest.raises(PermissionError, match="nobody listens"):
            made.ask()


def test_a_new_kernel_waits_for_the_listeners_of_the_old_one(world: Callable[..., World]) -> None:
    made = world(reborn=True)
    assert made.ask(again=True) is False
    made.after(BACK_S - 1)
    assert not made.agent.replies
    made.listen()
    made.after(2.0)
    assert not made.agent.replies
    (asked,) = made.approvals.listed()
    made.approvals.answer(made.person, wire.AnswerAsk(asked.id, asked.digest, True))
    assert made.went_on == 1


def test_one_agent_does_not_fill_the_list(world: Callable[..., World]) -> None:
    made = world(timeout=60.0)
    for number in range(OPEN_OF_AGENT):
        made.ask(number)
    with pytest.raises(BlockingIOError, match="asks of this agent wait already"):
        made.ask(999)
    assert len({asked.id for asked in made.approvals.listed()}) == OPEN_OF_AGENT


def test_an_answer_is_given_once(world: Callable[..., World]) -> None:
    made = world()
    made.listen()
    made.ask()
    (asked,) = made.approvals.listed()
    with pytest.raises(BlockingIOError, match="something else is asked"):
        made.approvals.answer(made.person, wire.AnswerAsk(asked.id, "00" * 16, True))
    made.approvals.answer(made.person, wire.AnswerAsk(asked.id, asked.digest, True))
    with pytest.raises(ProcessLookupError):
        made.approvals.answer(made.person, wire.AnswerAsk(asked.id, asked.digest, True))
    assert made.went_on == 1


def test_a_person_is_never_asked(world: Callable[..., World]) -> None:
    made = world()
    assert made.approvals.judge(made.call(made.person, 9, Sys.TOOL_CALL), CALC, lambda: None) is True
