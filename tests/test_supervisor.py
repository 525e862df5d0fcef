"""The supervisor and a kernel that has just died, piece by piece."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from aiosd.init import guardian, signals
from aiosd.init import supervisor as module
from aiosd.init.agents import AgentSupervisor
from aiosd.init.kernellink import KernelLink
from aiosd.init.records import Agent, SystemProcess
from aiosd.init.supervisor import KERNEL, LAST_WAIT_S, Supervisor
from aiosd.ipc import link
from aiosd.ipc.heartbeat import HANG_S, START_S, Heart, Rounds, beat
from aiosd.ipc.service import ServiceSpec, Stopped
from aiosd.timers import Timers
from libaios.stream import FrameSocket


def agent(pid: int) -> Agent:
    spec = link.Fork(
        key=(1, 1),
        ppid=1,
        pgid=0,
        uid=0,
        name="x",
        nice=0,
        group="default",
        umask=0o22,
        detached=True,
        attached=False,
        tty=False,
    )
    return Agent(pid, 1000 + pid, spec, pid, 0.0, 0.0, "", -1, -1, ppid=1, nice=0, status=0)


def test_messages_of_a_dead_kernel_count_even_if_no_kernel_can_be_reached() -> None:
    """Otherwise the next kernel would return an exit status again that this one has returned."""
    ours, theirs = socket.socketpair()
    supervisor = object.__new__(Supervisor)
    with select.epoll() as epoll:
        supervisor.link = KernelLink(epoll, SystemProcess(KERNEL, 3, os.getpid()))
        supervisor.link.open(ours)
        agents = object.__new__(AgentSupervisor)
        agents.records = {pid: agent(pid) for pid in (7, 8)}
        supervisor._act = {link.Mark: agents.on_mark}
        kernel = FrameSocket(theirs)
        kernel.send(link.encode(link.Mark(7, reaped=True)))
        kernel.send(link.encode(link.Mark(8, reaped=True)))
        kernel.close()
        supervisor.link.send(link.ChildExited(9, 0))
        while supervisor.link.is_open:
            supervisor._on_kernel()
    assert [one.reaped for one in agents.records.values()] == [True, True]


def test_a_bug_in_the_work_for_a_dead_child_is_not_swallowed() -> None:
    """Whatever the exception: the work must not be left half done silently."""
    supervisor = object.__new__(Supervisor)
    supervisor.stopping = ""

    def child_ended(ospid: int, status: int, cpu_s: float) -> None:
        raise BlockingIOError(11, "a bug of ours")

    supervisor._child_ended = child_ended  # type: ignore[method-assign]
    with subprocess.Popen(["true"]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(BlockingIOError, match="a bug of ours"):
            supervisor._reap()


def test_descendants_are_signalled_through_pidfds_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has got the pid of a descendant meanwhile gets no signal."""
    signalled: list[int] = []
    monkeypatch.setattr(signals.signal, "pidfd_send_signal", lambda pidfd, number: signalled.append(number))
    monkeypatch.setattr(signals.os, "kill", lambda *args: pytest.fail("by its number"))
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        monkeypatch.setattr(signals.procfs, "descendants", lambda root: [child.pid])
        signals.signal_descendants(os.getpid(), 15)
        assert signalled == [15]
        signals.signal_descendants(1 << 30, 15)  # the pid now belongs to a child of another process
        assert signalled == [15]
        child.stdin.close()  # type: ignore[union-attr]


def test_own_processes_are_stopped_in_the_order_of_their_records(monkeypatch: pytest.MonkeyPatch) -> None:
    now, done = 0.0, []
    supervisor = object.__new__(Supervisor)
    supervisor.timers = Timers(lambda: now)
    supervisor.stopping, supervisor.last_step, supervisor.exit_code = "asked to", None, None
    supervisor.agents = SimpleNamespace(live=list)  # type: ignore[assignment]
    supervisor.link = SimpleNamespace(send=lambda message: done.append((102, message.last)))  # type: ignore[assignment]
    supervisor.orphans = SimpleNamespace(any=lambda: False)  # type: ignore[assignment]
    supervisor.kernel = SystemProcess(KERNEL, 2, ospid=102)
    door = SystemProcess(ServiceSpec("door", "door", "", stopped=Stopped.FIRST), 3, ospid=103)
    store = SystemProcess(ServiceSpec("store", "store", ""), 4, ospid=104)
    supervisor.services = {"store": store, "door": door}
    monkeypatch.setattr(os, "kill", lambda ospid, number: done.append((ospid, number)))
    supervisor._continue_stop()
    supervisor._continue_stop()
    assert done == [(103, signal.SIGTERM)], "once"
    now = LAST_WAIT_S + 0.1
    supervisor.timers.run_due()
    assert done.pop() == (103, signal.SIGKILL)
    door.ospid = 0
    supervisor._continue_stop()
    assert done[1:] == [(102, True), (104, signal.SIGTERM)]
    supervisor.kernel.ospid = store.ospid = 0
    supervisor._continue_stop()
    assert supervisor.exit_code == 0


def test_heartbeats_go_on_while_the_last_pids_are_written_to_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []
    supervisor = object.__new__(Supervisor)
    supervisor.heartbeat = 7
    supervisor.pids = SimpleNamespace(release=lambda: done.append("released"))  # type: ignore[assignment]

    def begin(write: int, rounds: Rounds) -> None:
        done.append((write, rounds.stuck(), rounds._since is not None))  # not for ever: a dead disk counts as a hang

    monkeypatch.setattr(module, "beat_in_background", begin)
    supervisor._release_pids()
    assert done == [(7, False, True), "released"]


def test_the_guardian_gives_the_supervisor_time_until_its_first_beat(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(Heart):
        def hangs(
            self, clock: Callable[[], float] = time.monotonic, silent_s: float = HANG_S, ospid: int | None = None
        ) -> bool:
            asked.append(silent_s)
            if len(asked) == 1:
                beat(self.write)
                assert not super().hangs()
            return False

    asked: list[float] = []
    heart = Silent()
    monkeypatch.setattr(signal, "sigtimedwait", lambda numbers, seconds: None)
    monkeypatch.setattr(guardian, "_reap", lambda supervisor: 0 if len(asked) == 2 else None)
    assert guardian._watch(1, heart) == 0
    assert asked == [START_S, HANG_S]
    heart.close()
