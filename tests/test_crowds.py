"""The cost of two thousand agents for the kernel: nothing is examined twice, and long work is done in slices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from aiosd.kernel import listing, measure
from aiosd.kernel.access import Access
from aiosd.kernel.calls import CallTable
from aiosd.kernel.cores import Core
from aiosd.kernel.jobs import SLICE_S, Jobs
from aiosd.kernel.measure import SAMPLE_FEW, Measure
from aiosd.kernel.peer import Call, Peer
from aiosd.kernel.peers import Peers
from aiosd.kernel.proc import INIT, Proc, ProcEvent, ProcState, ProcTable
from aiosd.kernel.service import ServiceState as ServiceState
from aiosd.kernel.status import StatusRequests
from aiosd.kernel.syscalls import ProcessCalls
from aiosd.kernel.waiters import Waiters
from aiosd.procfs import Stat
from aiosd.timers import Timers
from libaios import wire
from libaios.wire import Sys

MANY = 2000
READ_S = 36e-6  # time to read /proc/PID/stat


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make(pid: int, ppid: int = INIT, pgid: int = 0) -> Proc:
    return Proc(pid, 1 << 29 | pid, pgid or pid, 0, f"a{pid}", "", "default", "", 0.0, 0, ppid=ppid)


def table_of(procs: Iterator[Proc]) -> ProcTable:
    table = ProcTable(10_000)
    for proc in procs:
        table.add(proc)
    return table


def access_to(table: ProcTable) -> Access:
    approvals: Any = None  # it is not asked
    return Access(table, set, approvals, lambda args, parent: "")


class House:
    """A table of agents, and calls that record with which result they were closed."""

    def __init__(self, table: ProcTable) -> None:
        self.table, self.clock = table, Clock()
        events: Any = None
        self.timers = Timers(self.clock)
        self.calls = CallTable(Peers(), events, self.timers)
        self.calls.send = lambda peer, payload: self.sent.append(payload)  # type: ignore[method-assign]
        self.sent: list[bytes] = []
        self.waiters = Waiters(table, self.calls, access_to(table))

    def call(self, peer: Peer, number: int, sys: int) -> Call:
        return self.calls.open(peer, wire.Request(number, sys), 10)


# ── ps and status ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> tuple[Clock, list[int]]:
    """A clock that each look at a process advances, and a list of these processes."""
    clock, found = Clock(), list[int]()

    def read_stat(ospid: int) -> Stat:
        clock.now += READ_S
        found.append(ospid)
        return Stat("S", 1, ospid, ospid, 0.0, 0)

    monkeypatch.setattr(listing.procfs, "read_stat", read_stat)
    monkeypatch.setattr(listing.procfs, "pss_bytes", lambda ospid: 1)
    monkeypatch.setattr(listing.procfs, "children", lambda ospid: [])
    for module in (listing, measure):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock))
    return clock, found


def lister(house: House, clock: Clock) -> tuple[ProcessCalls, Jobs]:
    jobs = Jobs(clock)
    nothing: Any = None
    agents: Any = SimpleNamespace(calls=house.calls, peers=house.calls.peers, is_parked=lambda proc: True)
    cores: Any = SimpleNamespace(context_of=lambda pid: ("", 0))
    system: Any = SimpleNamespace(lines=lambda pids, name, lines: iter(()))
    made = ProcessCalls(
        house.table, agents, nothing, house.waiters, nothing, system, nothing, cores, Measure.__new__(Measure), jobs
    )
    return made, jobs


def slices(jobs: Jobs, clock: Clock) -> list[float]:
    """The duration of each slice of a job."""
    found = []
    while jobs.waiting:
        began = clock.now
        jobs.run()
        found.append(clock.now - began)
    return found


def test_a_listing_of_thousands_is_made_in_pieces(reads: tuple[Clock, list[int]]) -> None:
    clock, read = reads
    house = House(table_of(make(pid) for pid in range(2, MANY + 2)))
    calls, jobs = lister(house, clock)
    began = clock.now
    calls.ps(house.call(Peer(-1, None), 1, Sys.PS), wire.Ps(all=True))
    pieces = [clock.now - began, *slices(jobs, clock)]
    assert max(pieces) <= SLICE_S + 2 * READ_S
    assert len(pieces) >= MANY * READ_S / SLICE_S / 1.2
    assert len(read) == MANY
    assert [proc.mem_bytes for proc in house.table].count(1) == SAMPLE_FEW
    (reply,) = house.sent
    assert len(wire.decode_reply(reply).body) > 100 * MANY


def test_nothing_is_read_again_within_a_moment(reads: tuple[Clock, list[int]]) -> None:
    clock, read = reads
    house = House(table_of(make(pid) for pid in range(2, MANY + 2)))
    calls, jobs = lister(house, clock)
    for number in range(20):
        calls.ps(house.call(Peer(-1, None), number, Sys.PS), wire.Ps(all=True))
    slices(jobs, clock)
    assert len(house.sent) == 20
    passed = clock.now - 1000.0
    assert len(read) <= MANY * (1 + passed / listing.FRESH_S)
    clock.now += listing.FRESH_S
    read.clear()
    calls.ps(house.call(Peer(-1, None), 99, Sys.PS), wire.Ps(all=True))
    slices(jobs, clock)
    assert len(read) == MANY


def test_jobs_take_turns() -> None:
    clock = Clock()
    order: list[str] = []

    def job(name: str) -> Iterator[None]:
        for _ in range(3):
            clock.now += SLICE_S
            order.append(name)
            yield

    jobs = Jobs(clock)
    jobs.start(job("a"))
    jobs.start(job("b"))
    while jobs.waiting:
        jobs.run()
    assert order == list("abababab"[:6])


def test_the_figures_of_thousands_are_gathered_in_pieces(reads: tuple[Clock, list[int]]) -> None:
    clock, read = reads
    house = House(table_of(make(pid) for pid in range(2, MANY + 2)))
    status = StatusRequests.__new__(StatusRequests)
    status._calls, status._table, status._is_parked = house.calls, house.table, lambda proc: True
    status._describe = lambda letters, wrong: letters  # type: ignore[method-assign, assignment, return-value]
    jobs = Jobs(clock)
    began = clock.now
    jobs.start(status._described(house.call(Peer(-1, None), 1, Sys.STATUS), None))
    pieces = [clock.now - began, *slices(jobs, clock)]
    assert max(pieces) <= SLICE_S + 2 * READ_S
    assert len(read) == MANY


class Counted(dict[int, Proc]):
    """Counts look-ups."""

    looks = 0

    def get(self, key: int, default: Any = None) -> Any:
        Counted.looks += 1
        return super().get(key, default)


@pytest.fixture
def chain() -> ProcTable:
    """Agents of one group, each of which is a child of the one before."""
    table = ProcTable(10)
    table.procs = Counted()
    for pid in range(2, MANY + 2):
        table.add(make(pid, pid - 1, pgid=2))
    Counted.looks = 0
    return table


def test_a_long_line_of_ancestors_is_walked_once(chain: ProcTable) -> None:
    """An agent in the middle of the line lists its family, and signals its group."""
    house, clock = House(chain), Clock()
    calls, _ = lister(house, clock)
    me = Peer(1000, chain.procs[1000])
    call = house.call(me, 1, Sys.PS)
    assert [proc.pid for proc in calls._chosen(call, wire.Ps())] == list(range(1000, MANY + 2))
    targets = access_to(chain).targets(me, -2)
    assert [proc.pid for proc in targets] == list(range(1000, MANY + 2))
    assert Counted.looks <= MANY
    assert len(chain.subtrees(list(chain))) == MANY


# ── waiting ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stop_of_thousands_looks_at_each_once_or_twice() -> None:
    table = table_of(make(pid) for pid in range(2, MANY + 2))
    house = House(table)
    asked: list[int] = []

    def done(proc: Proc) -> bool:
        asked.append(proc.pid)
        return proc.state is ProcState.STOPPED

    call = house.call(Peer(-1, None), 1, Sys.KILL)
    assert not house.waiters.until(call, list(table), done)
    for proc in table:
        assert house.sent == []
        table.advance(proc, ProcEvent.STOP)
        house.waiters.on_change(proc)
        house.waiters.on_change(proc)  # for example, a core has confirmed that it is parked
    assert len(house.sent) == 1
    assert len(asked) == 2 * MANY
    assert house.waiters.calls() == []


def test_a_stop_that_is_given_up_leaves_nothing() -> None:
    table = table_of(make(pid) for pid in range(2, 10))
    house = House(table)
    call = house.call(Peer(-1, None), 1, Sys.KILL)
    assert not house.waiters.until(call, list(table), lambda proc: proc.state is ProcState.STOPPED)
    table.advance(table.procs[5], ProcEvent.STOP)
    house.waiters.on_change(table.procs[5])
    house.calls.fail(call, 1, "cancelled")
    assert house.waiters._conditions == {}


def test_ends_of_children_look_at_no_more_waits_than_they_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand open waits for any child, and two thousand children that end."""
    parent = make(2)
    table = table_of(one for one in (parent, *(make(pid, 2) for pid in range(3, MANY + 3))))
    house = House(table)
    house.waiters.collect = lambda proc, key, result: table.reap(proc) and None  # type: ignore[assignment]
    looked: list[int] = []
    is_gone = Waiters._is_gone
    monkeypatch.setattr(
        Waiters, "_is_gone", staticmethod(lambda call, proc: looked.append(call.id) or is_gone(call, proc))
    )
    peer = Peer(2, parent)
    for number in range(1000):
        assert house.waiters.wait(house.call(peer, number, Sys.WAIT), wire.Wait()) is None
    for proc in list(table):
        if proc is not parent:
            table.exit(proc, 0)
            house.waiters.on_exit(proc, 2)
    assert len(house.sent) == 1000
    assert len(looked) <= 2 * MANY
    assert [wire.decode_reply(payload).errno for payload in house.sent] == 1000 * [0]


def test_the_last_child_fails_the_waits_that_are_left() -> None:
    parent, child = make(2), make(3, 2)
    table = table_of(iter((parent, child)))
    house = House(table)
    house.waiters.collect = lambda proc, key, result: table.reap(proc) and None  # type: ignore[assignment]
    for number, args in enumerate((wire.Wait(), wire.Wait(), wire.Wait(3))):
        house.waiters.wait(house.call(Peer(2, parent), number, Sys.WAIT), args)
    table.exit(child, 7)
    house.waiters.on_exit(child, 2)
    assert len(house.sent) == 3
    assert sorted(wire.decode_reply(payload).errno for payload in house.sent)[0] == 0
    assert house.waiters.calls() == []


# ── parking ───────────────────────────────────────────────────────────────────────────────────────────────


def core_with(parked: Callable[[int], None]) -> Core:
    owner: Any = SimpleNamespace(on_parked=parked)
    return Core(
        "llm", "llm", "llm", owner, owner, state=ServiceState.READY, model="m", path="", default=True, listener=owner
    )


def test_a_confirmation_of_a_core_is_about_one_peer() -> None:
    from aiosd.ipc import link

    told: list[int] = []
    core = core_with(told.append)
    for peer in range(MANY):
        core.park(peer, True)
    assert not core.stands_still([5])
    numbers = {peer: number for number, peer in core.unconfirmed.items()}
    core.park(5, False)
    core.park(5, True)  # again: the first confirmation does not count for this
    core.handle(link.Parked(numbers[5]))
    assert (told, core.stands_still([5])) == ([], False)
    core.handle(link.Parked(core.latest[5]))
    assert (told, core.stands_still([5])) == ([5], True)
    core.died("SIGKILL")
    assert sorted(told) == list(range(MANY))
    assert core.stands_still(range(MANY))
