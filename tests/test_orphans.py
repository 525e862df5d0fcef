"""Orphans of agents are killed at once, or get time to end if the agent got a signal to end."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from aiosd import procfs
from aiosd.init import orphans
from aiosd.init.orphans import COST_SHARE, FEW, Orphans
from aiosd.timers import Timers
from tests.conftest import System, eventually

Fresh = Callable[..., System]

GRACE_S = 5.0


class World:
    """The supervisor's children as Linux shows them, a clock, and the signals that were sent to each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, term_first: bool = False) -> None:
        self.now = 100.0
        self.children: dict[int, int] = {}  # Linux pid → session
        self.known: set[int] = set()
        self.sent: list[tuple[int, int]] = []
        self.looks: list[float] = []
        self.cost_s = 0.0  # duration of one look
        self.timers = Timers(lambda: self.now)
        monkeypatch.setattr(orphans, "procfs", SimpleNamespace(children=self._look, read_stat=self._stat, name=str))
        monkeypatch.setattr(orphans, "signal_descendants", lambda ospid, number: None)
        monkeypatch.setattr(orphans.os, "kill", self._kill)
        self.orphans = Orphans(self.timers, lambda: self.known, GRACE_S, term_first)

    def _look(self, ospid: int) -> list[int]:
        self.looks.append(self.now)
        self.now += self.cost_s
        return list(self.children)

    def _stat(self, ospid: int) -> procfs.Stat | None:
        session = self.children.get(ospid)
        return None if session is None else procfs.Stat("S", 1, session, session, 0.0, 0)

    def _kill(self, ospid: int, number: int) -> None:
        self.sent.append((ospid, number))
        if number == signal.SIGKILL:
            self.children.pop(ospid, None)

    def until(self, when: float) -> None:
        while self.now < when:
            self.timers.run_due()
            self.now += 0.01
        self.timers.run_due()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


KILL, TERM = signal.SIGKILL, signal.SIGTERM


def test_the_log_names_a_few_and_counts_many(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "supervisor")
    world = World(monkeypatch)
    world.children = {1000 + number: 99 for number in range(FEW)}
    world.orphans.agent_ended(99, got_term=False)
    world.until(101.0)
    assert caplog.records[0].getMessage().startswith("process 1000 (1000) was left behind")
    assert len(caplog.records) == FEW
    caplog.clear()
    monkeypatch.setattr(orphans.procfs, "name", lambda ospid: "bomb" if ospid % 100 else "sh")
    world.children = {1000 + number: 99 for number in range(500)}
    world.orphans.agent_ended(99, got_term=False)
    world.until(102.0)
    shown = [record.getMessage() for record in caplog.records]
    assert shown == ["500 processes (495 bomb, 5 sh) were left behind by agents and are killed"]
    assert world.children == {}


def test_orphans_of_an_agent_are_killed_at_once(world: World) -> None:
    world.children = {7: 5, 8: 8, 9: 9}
    world.known = {9}
    world.orphans.agent_ended(5, got_term=False)
    world.until(100.1)
    assert world.sent == [(7, KILL), (8, KILL)]


def test_orphans_of_an_agent_that_got_a_signal_to_end_have_time(world: World) -> None:
    """Also orphans with a session of their own, but not those of another agent."""
    world.children = {7: 5, 8: 8, 10: 6}
    world.orphans.agent_ended(5, got_term=True)
    world.until(100.0 + GRACE_S - 0.1)
    assert world.sent == [(10, KILL)]
    assert world.orphans.any()
    world.until(100.0 + GRACE_S + 0.1)
    assert world.sent == [(10, KILL), (7, KILL), (8, KILL)]
    assert not world.orphans.any()


def test_orphans_that_have_ended_are_waited_for_no_longer(world: World) -> None:
    world.children = {7: 5}
    world.orphans.agent_ended(5, got_term=True)
    assert world.orphans.any(), "a look is due"
    world.until(100.1)
    del world.children[7]
    world.orphans.ended()
    world.until(100.2)
    assert not world.orphans.any()
    assert world.sent == []


def test_children_of_an_orphan_become_orphans_too(world: World) -> None:
    """For example, those that it forked while it was being killed."""
    world.children = {7: 5}
    world.orphans.agent_ended(5, got_term=False)
    world.until(100.1)
    world.children = {77: 5}
    world.orphans.ended()
    world.until(100.2)
    assert world.sent == [(7, KILL), (77, KILL)]


def test_with_the_setting_every_orphan_gets_term_first(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, term_first=True)
    world.children = {7: 5}
    world.orphans.agent_ended(5, got_term=False)
    world.until(100.0 + GRACE_S - 0.1)
    assert world.sent == [(7, TERM)]
    world.until(100.0 + GRACE_S + 0.2)
    assert world.sent == [(7, TERM), (7, KILL)]


def test_many_deaths_cause_one_look_and_looks_take_a_bounded_share_of_the_time(world: World) -> None:
    """With thousands of children a look takes long. Two thousand deaths in ten seconds must not take all of them."""
    world.known = set(range(10_000, 12_000))
    world.children = dict.fromkeys(world.known, 0)
    world.cost_s = 0.02
    for number in range(2000):
        world.orphans.agent_ended(number, got_term=False)
        world.until(100.0 + 0.005 * (number + 1))
    assert len(world.looks) * world.cost_s <= (world.now - 100.0) * COST_SHARE * 1.5
    assert len(world.looks) >= 10
    assert len(world.timers) <= 64


# ── wrapped programs ──────────────────────────────────────────────────────────────────────────────────────

#: On TERM it records that, and ends in order when the file says so.
SERVER = """
import os, signal, sys
told, gate, cleaned = sys.argv[1:]
def end(*_):
    open(told, "w").close()
    while not os.path.exists(gate):
        pass
    open(cleaned, "w").close()
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print(os.getpid(), flush=True)
while True:
    signal.pause()
"""


#: Long enough for an orderly end on a busy machine.
PATIENT = {"AIOSD_STOP_TIMEOUT": "60"}


class Wrapped:
    """A server in a shell that only waits for it."""

    def __init__(self, system: System, folder: Path, *options: str) -> None:
        self.told, self.gate, self.cleaned = (folder / name for name in ("told", "gate", "cleaned"))
        (folder / "server.py").write_text(SERVER)
        command = f"python3 {folder}/server.py {self.told} {self.gate} {self.cleaned}; true"
        done = system.run("aios-run", "-d", "--name", "wrapped", *options, "--", "sh", "-c", command, check=True)
        self.pid = int(done.stdout)
        (entry,) = [one for one in system.agents() if one["pid"] == self.pid]
        log = system.home / "data" / "logs" / f"{self.pid}.log"
        assert eventually(lambda: log.exists() and log.read_text().endswith("\n"))
        self.server = int(log.read_text())
        self.ospid = entry["ospid"]

    def runs(self) -> bool:
        stat = procfs.read_stat(self.server)
        return stat is not None and stat.state != "Z"


@pytest.mark.parametrize("how", ["pid", "group"])
def test_a_wrapped_program_ends_in_order(fresh_aiosd: Fresh, tmp_path: Path, how: str) -> None:
    system = fresh_aiosd("--threads", "1", env=PATIENT)
    wrapped = Wrapped(system, tmp_path)
    target = str(wrapped.pid) if how == "pid" else f"-{wrapped.pid}"
    system.run("aios-kill", "--", target, check=True)
    assert system.run("aios-wait", str(wrapped.pid)).returncode == 143
    assert eventually(wrapped.told.exists)
    assert wrapped.runs(), "its shell is dead, and it has time"
    wrapped.gate.touch()
    assert eventually(wrapped.cleaned.exists)
    assert eventually(lambda: not wrapped.runs())


def test_one_that_does_not_end_is_killed(fresh_aiosd: Fresh, tmp_path: Path) -> None:
    system = fresh_aiosd("--threads", "1", env={"AIOSD_STOP_TIMEOUT": "3"})
    wrapped = Wrapped(system, tmp_path)
    system.run("aios-kill", str(wrapped.pid), check=True)
    assert eventually(wrapped.told.exists)
    assert eventually(lambda: not wrapped.runs())
    assert not wrapped.cleaned.exists()


def test_the_end_of_the_system_is_an_orderly_end_too(fresh_aiosd: Fresh, tmp_path: Path) -> None:
    system = fresh_aiosd("--threads", "1", env=PATIENT)
    wrapped = Wrapped(system, tmp_path)
    assert system.daemon is not None
    system.daemon.terminate()
    assert eventually(lambda: wrapped.told.exists() and not Path(f"/proc/{wrapped.ospid}").exists())
    wrapped.gate.touch()
    assert system.daemon.wait(30) == 0
    assert wrapped.cleaned.exists()


def test_with_the_setting_orphans_may_end_in_order(fresh_aiosd: Fresh, tmp_path: Path) -> None:
    system = fresh_aiosd("--threads", "1", env=PATIENT | {"AIOSD_ORPHANS": "term"})
    wrapped = Wrapped(system, tmp_path)
    os.kill(wrapped.ospid, signal.SIGKILL)  # only the shell; no process gets a signal to end
    assert eventually(wrapped.told.exists)
    assert eventually(lambda: system.agents() == [])
    wrapped.gate.touch()
    assert eventually(wrapped.cleaned.exists)
    assert eventually(lambda: not wrapped.runs())


def test_without_the_setting_orphans_are_killed_and_the_log_names_them(aiosd: System, tmp_path: Path) -> None:
    wrapped = Wrapped(aiosd, tmp_path)
    os.kill(wrapped.ospid, signal.SIGKILL)
    assert eventually(lambda: not wrapped.runs())
    assert not wrapped.told.exists()
    line = f"process {wrapped.server} (python3) was left behind by its agent and is killed"
    assert eventually(lambda: line in aiosd.log())
