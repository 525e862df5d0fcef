"""Each agent's process looks up the agent's paths itself, so a look-up that never ends delays no other agent.

A FIFO simulates a file system that hangs: a process that opens it waits for a writer.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from aiosd import procfs
from aiosd.birth.report import Report
from aiosd.init import agents as supervised
from aiosd.init import births
from aiosd.init.births import Birth, Births
from aiosd.init.records import Agent
from aiosd.ipc import letter, link
from aiosd.kernel.agents import Lifecycle, UnderWay
from aiosd.kernel.events import Events
from aiosd.kernel.proc import ProcTable
from aiosd.kernel.turns import AgentTurns
from aiosd.timers import Timers
from libaios import digest
from libaios.channel import Channel, make_channel
from tests.conftest import System, eventually

Fresh = Callable[..., System]


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "slow.py")
    return tmp_path / "slow.py"


def answer(slow: Path, text: str) -> None:
    """Let the process that hangs go on, with this text. It must have opened the FIFO in time."""

    def written() -> bool:
        with contextlib.suppress(OSError):  # ENXIO: no process has opened it for reading yet
            fd = os.open(slow, os.O_WRONLY | os.O_NONBLOCK)
            os.write(fd, text.encode())
            os.close(fd)
            return True
        return False

    assert eventually(written)


def test_a_birth_is_over_with_its_process_though_another_holds_its_socket() -> None:
    """A spare that was forked at the same time has a copy of the socket until it runs, so the socket ends late."""
    over: list[Birth] = []
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with select.epoll() as epoll, ours, theirs:
        agent: Agent = object.__new__(Agent)
        births_ = Births(epoll, Timers(), over.append)
        births_.expect(Birth(agent, ours, 1))
        births_.ended(agent)
        assert [birth.refusal for birth in over] == [None]
        theirs.close()
        assert epoll.poll(0) == []


def test_a_look_up_that_hangs_delays_no_other_agent(fresh_aiosd: Fresh, slow: Path) -> None:
    system = fresh_aiosd()
    run = system.popen("aios-run", slow)
    assert eventually(lambda: system.run("aios-run", "--", "echo", "others", check=True).stdout == "others\n")
    assert run.poll() is None
    answer(slow, "print('found'); raise SystemExit(3)")
    assert (run.wait(30), run.stdout.read()) == (3, "found\n")


def test_a_program_is_looked_up_with_the_descriptors_of_its_own_agent_alone(fresh_aiosd: Fresh, slow: Path) -> None:
    """Once it had copies of all descriptors of the supervisor. Then an agent that was spawned at the same time seemed
    not to end, because the pipe of its output stayed open until the look-up was given up."""
    system = fresh_aiosd()
    system.popen("aios-run", slow)
    supervisor = next(entry["ospid"] for entry in system.ps() if entry["name"] == "supervisor")

    def looking() -> list[psutil.Process]:
        return [one for one in psutil.Process(supervisor).children() if procfs.name(one.pid) == "slow"]

    assert eventually(looking)
    folder = f"/proc/{looking()[0].pid}/fd"
    opened = [os.readlink(f"{folder}/{fd}") for fd in os.listdir(folder)]
    assert [name for name in opened if name.endswith("/data/lock") or "journal" in name or "eventpoll" in name] == []
    assert len([name for name in opened if "aios-letter" in name]) == 1
    assert len([name for name in opened if "aios-channel" in name]) == 1
    answer(slow, "print()")


def test_a_pipe_is_left_to_the_agent_that_reads_it(slow: Path) -> None:
    """It can be read only once, so the command that starts the agent must not read it."""
    reader = os.open(slow, os.O_RDONLY | os.O_NONBLOCK)
    try:
        slow.write_text("print()")
        assert digest.of_file(str(slow)) == b""
        assert os.read(reader, 100) == b"print()"
    finally:
        os.close(reader)


def test_aiosd_stops_while_a_program_is_looked_up(fresh_aiosd: Fresh, slow: Path) -> None:
    system = fresh_aiosd()
    run = system.popen("aios-run", slow)
    assert eventually(lambda: len(system.processes()) > 4)
    assert system.stop() == 0
    assert run.wait(30) != 0


def test_the_kernel_dies_while_a_program_is_looked_up(fresh_aiosd: Fresh, slow: Path) -> None:
    system = fresh_aiosd()
    run = system.popen("aios-run", slow)
    pid = next(entry["ospid"] for entry in system.ps() if entry["name"] == "kernel")
    assert eventually(lambda: len(system.processes()) > 4)
    for _ in range(2):
        os.kill(pid, signal.SIGKILL)
        assert eventually(lambda dead=pid: [e for e in system.ps() if e["name"] == "kernel" and e["ospid"] != dead])
        pid = next(entry["ospid"] for entry in system.ps() if entry["name"] == "kernel")
    answer(slow, "print('found'); raise SystemExit(3)")
    assert (run.wait(30), run.stdout.read()) == (3, "found\n")


def test_what_cannot_start_leaves_nothing(aiosd: System, tmp_path: Path) -> None:
    logs = set((aiosd.home / "logs").glob("*")) if (aiosd.home / "logs").exists() else set()
    dead = {entry["pid"] for entry in aiosd.ps("--dead")}
    done = aiosd.run("aios-run", "-d", tmp_path / "nonesuch.py")
    assert (done.returncode, done.stdout) == (127, "")
    assert done.stderr == f"aios-run: {tmp_path}/nonesuch.py: not found\n"
    assert {entry["pid"] for entry in aiosd.ps("--dead")} == dead
    assert set((aiosd.home / "logs").glob("*") if (aiosd.home / "logs").exists() else []) == logs


def test_a_folder_that_is_not_there(aiosd: System, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "import libaios as aios\n"
        "for cwd in ('/nonesuch', '/etc/passwd'):\n"
        "    try: aios.proc.spawn('true', cwd=cwd)\n"
        "    except OSError as err: print(type(err).__name__, err.strerror)\n"
        "try: aios.proc.wait(block=False)\n"
        "except ChildProcessError: print('no child')\n"
    )
    assert aiosd.run("aios-run", tmp_path / "a.py", check=True).stdout.splitlines() == [
        "FileNotFoundError /nonesuch: No such file or directory",
        "NotADirectoryError /etc/passwd: Not a directory",
        "no child",
    ]


def test_a_long_path_is_searched_by_the_child(aiosd: System, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "import libaios as aios\n"
        "path = ':'.join(f'/{n}' for n in range(110_000))\n"
        "try: aios.proc.spawn('nonesuch', env={'PATH': path})\n"
        "except FileNotFoundError as err: print(err.strerror)\n"
    )
    path = ":".join(f"/{n}" for n in range(110_000))
    began = time.process_time()
    assert shutil.which("nonesuch", path=path) is None
    one_search_s = time.process_time() - began
    supervisor = psutil.Process(next(entry["ospid"] for entry in aiosd.ps() if entry["name"] == "supervisor"))
    before = supervisor.cpu_times()
    assert aiosd.run("aios-run", tmp_path / "a.py", check=True).stdout == "nonesuch: not found\n"
    after = supervisor.cpu_times()
    assert after.user + after.system - before.user - before.system < one_search_s / 2


def test_an_agent_that_stops_itself_at_once_is_shown_so(aiosd: System, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import os; os.kill(os.getpid(), 19); print('went on')")
    pid = aiosd.run("aios-run", "-d", tmp_path / "a.py", check=True).stdout.strip()
    assert eventually(lambda: aiosd.agents()[0]["stat"] == "T")
    aiosd.run("aios-kill", "-CONT", pid, check=True)
    aiosd.run("aios-wait", pid, check=True)
    assert aiosd.run("aios-logs", pid, check=True).stdout == "went on\n"


# ── births without a system ───────────────────────────────────────────────────────────────────────────────


class Ward:
    """Births with a fake clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers = Timers(lambda: self.now)
        self.epoll = select.epoll()
        self.over: list[Birth] = []
        self.reasons: list[str] = []
        self.births = Births(self.epoll, self.timers, self._over)
        self.theirs: list[socket.socket] = []

    def _over(self, birth: Birth) -> None:
        self.over.append(birth)
        if birth.refusal is not None:
            self.reasons.append(letter.read_text(birth.refusal[1]))

    def expect(self, ospid: int = 0) -> Birth:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.theirs.append(theirs)
        spec = link.Fork((1, 1), 1, 0, 0, "x", 0, "g", 0, False, False, False)
        agent = Agent(7, ospid, spec, pgid=7, started=0, since=0, log="", memfd=-1, bell=-1, ppid=1, nice=0)
        birth = Birth(agent, ours, epoch=1)
        self.births.expect(birth)
        return birth

    def turn(self) -> None:
        for fd, _ in self.epoll.poll(0):
            self.births.look(fd)

    def close(self) -> None:
        for sock in self.theirs:
            sock.close()
        self.turn()
        self.epoll.close()


@pytest.fixture
def ward() -> Ward:
    return Ward()


def test_a_closed_report_means_that_it_runs(ward: Ward) -> None:
    birth = ward.expect()
    ward.turn()
    assert ward.over == []
    ward.theirs[0].close()
    ward.turn()
    assert (ward.over, birth.refusal) == ([birth], None)
    ward.close()


def test_one_that_has_rung_reports_that(ward: Ward) -> None:
    birth = ward.expect()
    ours, bell = socket.socketpair()
    Report(ward.theirs[0].detach()).ready(bell.fileno())
    assert ours.recv(10) == b"\0"
    ward.turn()
    assert (ward.over, birth.refusal, birth.rung) == ([birth], None, True)
    ward.close()
    ours.close()
    bell.close()


def test_a_report_has_the_reason_of_a_failure(ward: Ward) -> None:
    birth = ward.expect()
    Report(ward.theirs[0].detach()).refuse(FileNotFoundError(2, ""), "x.py: not found")
    ward.births.ended(birth.agent)
    assert birth.refusal is not None
    assert (ward.over, birth.refusal[0], ward.reasons) == ([birth], 2, ["x.py: not found"])
    ward.close()


def test_one_that_takes_too_long_is_killed(ward: Ward) -> None:
    child = os.fork()
    if child == 0:
        signal.pause()
    birth = ward.expect(child)
    ward.now = births.PATIENCE_S - 1
    ward.timers.run_due()
    assert ward.over == []
    ward.now = births.PATIENCE_S
    ward.timers.run_due()
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert birth.refusal is not None
    assert birth.refusal[0] == 110
    ward.close()


def test_one_that_is_stopped_has_more_time(ward: Ward) -> None:
    """It may have been stopped between its ring and its report; its spawner has its pid by then."""
    with subprocess.Popen(("sleep", "100")) as child:
        birth = ward.expect(child.pid)
        birth.agent.stopped = True
        ward.now = births.PATIENCE_S
        ward.timers.run_due()
        assert (ward.over, child.poll()) == ([], None)
        ward.close()
        assert (ward.over, birth.refusal) == ([birth], None)
        child.kill()


def test_a_kernel_that_sends_a_fork_again_is_answered(ward: Ward) -> None:
    birth = ward.expect()
    for epoch in (1, 2):
        assert ward.births.claim(birth.agent, epoch)
        assert (birth.claimed, birth.epoch) == (epoch, 1)
    ward.close()
    assert not ward.births.claim(birth.agent, 2)


class Sent:
    """A link to a kernel of this epoch, which records the names of messages."""

    def __init__(self, epoch: int, names: list[str]) -> None:
        self.epoch = epoch
        self.names = names

    def send(self, message: Any, fds: tuple[int, ...] = ()) -> None:
        self.names.append(type(message).__name__)


@pytest.mark.parametrize(
    ("restarts", "claimed", "rung", "sent"),
    [
        (0, 0, True, {1: []}),
        (0, 0, False, {1: ["Forked"]}),
        (0, 1, True, {1: ["Forked"]}),
        (0, 2, True, {2: ["Forked"]}),
        (1, 0, True, {1: ["ChildRestarted"], 2: []}),
        (1, 1, True, {1: ["ChildRestarted", "Forked"]}),
        (1, 2, True, {2: ["Forked"]}),
    ],
)
def test_a_kernel_gets_the_births_that_it_has_not_inherited(
    ward: Ward, restarts: int, claimed: int, rung: bool, sent: dict[int, list[str]]
) -> None:
    """Its epoch decides: a kernel that was forked after the birth began (in epoch 1) has inherited the process."""
    birth = ward.expect()
    birth.claimed, birth.rung = claimed, rung
    birth.agent.restarts = SimpleNamespace(total=restarts)  # type: ignore[assignment]
    for epoch, expected in sent.items():
        found: list[str] = []
        agents: Any = object.__new__(supervised.AgentSupervisor)
        agents._link = Sent(epoch, found)
        agents._born(birth)
        assert found == expected
    ward.close()


# ── in the kernel ─────────────────────────────────────────────────────────────────────────────────────────

KEY = (1, 1)
FORKED = link.Forked(KEY, pid=7, ospid=70, pgid=7, started=0.0, since=0.0, log="")


class Nursery:
    """The kernel's side of one birth, with a real doorbell."""

    def __init__(self) -> None:
        self.events = Events(Timers())
        nothing = SimpleNamespace(answer=None, count=None)
        self.begun: list[int] = []
        self.agents: Any = object.__new__(Lifecycle)
        self.agents.turns = AgentTurns(Any, self.events, Timers(), nothing, nothing)  # type: ignore[arg-type]
        self.agents.table = ProcTable(10)
        self.agents.budgets = SimpleNamespace(arrived=lambda shares: None)
        self.agents.listed = SimpleNamespace(refused=lambda key, words: None)
        self.agents._begin = self._begin
        spec = link.Fork(KEY, 1, 0, 0, "x", 0, "g", 0, False, False, False)
        self.under_way = UnderWay(None, spec, "", None, {})
        self.agents.forks = {KEY: self.under_way}
        memfd, self.kernels, self.bell = make_channel()
        self.agents.forking(link.Forking(FORKED), [memfd, self.kernels])

    def _begin(self, under_way: UnderWay, message: link.Forked) -> None:
        del self.agents.forks[message.key]
        self.begun.append(message.pid)

    def turn(self) -> list[int]:
        self.events.round(idle=False)
        return self.begun

    def close(self) -> None:
        newborn = self.under_way.newborn
        assert newborn is not None
        assert isinstance(newborn.channel, Channel)
        newborn.channel.close()
        self.events._epoll.close()
        with contextlib.suppress(OSError):
            os.close(self.bell)


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


def test_it_begins_when_it_rings(nursery: Nursery) -> None:
    assert nursery.turn() == []
    os.write(nursery.bell, b"\0")
    assert nursery.turn() == [7]


def test_it_has_begun_if_it_has_rung_before_its_end(nursery: Nursery) -> None:
    os.write(nursery.bell, b"\0")
    os.close(nursery.bell)
    assert nursery.turn() == [7]


def test_one_that_ends_without_a_ring_is_left_to_the_supervisor(nursery: Nursery) -> None:
    os.close(nursery.bell)
    assert nursery.turn() == []
    nursery.agents.forked(FORKED, [])
    assert nursery.begun == [7]


def test_an_end_may_overtake_the_ring(nursery: Nursery) -> None:
    nursery.agents.exited(link.ChildExited(7, 0))
    assert nursery.begun == [7]


def test_a_stop_may_overtake_the_ring(nursery: Nursery) -> None:
    nursery.agents.stopped(link.ChildStopped(7, True))
    assert nursery.under_way.newborn is not None
    assert nursery.under_way.newborn.stopped
    assert nursery.begun == []


def test_nothing_is_left_of_one_that_cannot_run(nursery: Nursery) -> None:
    nursery.agents.fork_failed(link.ForkFailed(KEY, 2, "not found"), [])
    assert nursery.agents.forks == {}
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(nursery.kernels)
    with pytest.raises(BrokenPipeError):
        os.write(nursery.bell, b"\0")


def test_one_that_has_rung_and_cannot_run_is_left_to_its_end(nursery: Nursery) -> None:
    os.write(nursery.bell, b"\0")
    assert nursery.turn() == [7]
    nursery.agents.fork_failed(link.ForkFailed(KEY, 110, "too late"), [])
    assert nursery.agents.forks == {}
