"""The process table and the life of a process."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from aiosd.errors import Bug
from aiosd.kernel.listing import line, stat_letter
from aiosd.kernel.proc import INIT, TRANSITIONS, Proc, ProcEvent, ProcState, ProcTable, shell_status


def make(pid: int, ppid: int = INIT) -> Proc:
    return Proc(
        pid=pid,
        ospid=1 << 30,  # no process has this pid
        pgid=pid,
        uid=0,
        name=f"a{pid}",
        command="",
        group="",
        log="",
        started=0.0,
        attached_to=0,
        ppid=ppid,
    )


@given(st.sampled_from(ProcState), st.sampled_from(ProcEvent))
def test_a_move_that_is_not_in_the_table_is_refused_and_changes_nothing(state: ProcState, event: ProcEvent) -> None:
    proc = make(2)
    proc.state = state
    table = ProcTable(10)
    if (state, event) in TRANSITIONS:
        table.advance(proc, event)
        assert proc.state is TRANSITIONS[state, event]
    else:
        with pytest.raises(Bug):
            table.advance(proc, event)
        assert proc.state is state


def test_an_ended_process_stays_ended() -> None:
    alive = (ProcState.RUNNING, ProcState.STOPPED, ProcState.WAITING)
    assert not any(new in alive for (old, _), new in TRANSITIONS.items() if old not in alive)
    assert not any(old is ProcState.REAPED for old, _ in TRANSITIONS)


@pytest.mark.parametrize(("status", "shown"), [(0, 0), (3, 3), (255, 255), (-9, 137), (-15, 143)])
def test_exit_status_as_a_shell_shows_it(status: int, shown: int) -> None:
    assert shell_status(status) == shown


def test_stat_letters() -> None:
    proc = make(2)
    assert stat_letter(proc, [], "S") == "S"
    assert stat_letter(proc, [], "R") == "R"
    proc.state = ProcState.STOPPED
    assert stat_letter(proc, [], "S") == "T"
    assert stat_letter(proc, [], "S", parked=False) == "S", "a core may still generate for it"
    proc.state = ProcState.ZOMBIE
    assert stat_letter(proc, [], "S") == "Z"


def test_a_process_that_has_ended_is_still_described() -> None:
    assert line(make(2), []).pid == 2


def test_orphans_go_to_pid_1() -> None:
    table = ProcTable(10)
    parent, child = make(2), make(3, 2)
    table.add(parent)
    table.add(child)
    assert table.exit(parent, 0) == [child]
    assert child.ppid == INIT
    assert child in table.children_of(INIT)
    assert table.children_of(2) == []


def test_the_history_forgets_the_oldest() -> None:
    table = ProcTable(2)
    forgotten = []
    for pid in range(2, 6):
        proc = make(pid)
        table.add(proc)
        table.exit(proc, 0)
        forgotten += table.reap(proc)
    assert forgotten == [2, 3]
    assert table.find(2) is None
    assert table.find(5) is not None
    assert table.get(5) is None


class Families(RuleBasedStateMachine):
    """Random families: processes are spawned, end and are waited for in any order, and the books balance."""

    alive = Bundle("alive")
    zombies = Bundle("zombies")

    def __init__(self) -> None:
        super().__init__()
        self.table = ProcTable(5)
        self.next_pid = 2

    def born(self, ppid: int) -> Proc:
        proc = make(self.next_pid, ppid)
        self.next_pid += 1
        self.table.add(proc)
        return proc

    @rule(target=alive)
    def start(self) -> Proc:
        return self.born(INIT)

    @rule(target=alive, parent=alive)
    def spawn(self, parent: Proc) -> Proc:
        return self.born(parent.pid if parent.alive else INIT)

    @rule(proc=alive, event=st.sampled_from([ProcEvent.STOP, ProcEvent.CONT]))
    def park(self, proc: Proc, event: ProcEvent) -> None:
        if proc.alive:
            self.table.advance(proc, event)

    @rule(target=zombies, proc=consumes(alive))
    def die(self, proc: Proc) -> Proc:
        if proc.alive:
            self.table.exit(proc, 1)
            return proc
        return multiple()  # type: ignore[return-value]

    @rule(proc=consumes(zombies))
    def reap(self, proc: Proc) -> None:
        if proc.state is ProcState.ZOMBIE:
            self.table.reap(proc)

    @invariant()
    def books_balance(self) -> None:
        table = self.table
        filed = {child.pid: parent for parent, children in table.children.items() for child in children.values()}
        assert set(filed) == set(table.procs)
        for proc in table:
            assert filed[proc.pid] == proc.ppid
            parent = table.get(proc.ppid)
            assert proc.ppid == INIT or (parent is not None and parent.alive)
        assert len(table.history) <= 5


TestFamilies = Families.TestCase
