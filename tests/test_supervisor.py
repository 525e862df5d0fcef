"""The supervisor and a kernel that has just died, piece by piece."""

from __future__ import annotations

import os
import select
import socket

from aiosd import link
from aiosd.init.records import Agent, Process
from aiosd.init.supervisor import KERNEL, Supervisor
from libaios.stream import FrameSocket


def agent(pid: int) -> Agent:
    spec = link.Fork(
        key=(1, 1),
        ppid=1,
        pgid=0,
        uid=0,
        kind="exec",
        target="true",
        args=[],
        env={},
        cwd="/",
        name="x",
        nice=0,
        group="default",
        umask=0o22,
        detached=True,
        attached=False,
        tty=False,
    )
    return Agent(pid, 1000 + pid, spec, "true", pid, 0.0, 0.0, "", -1, -1, ppid=1, nice=0, status=0)


def test_what_a_dead_kernel_had_sent_counts_though_nobody_can_be_told_any_more() -> None:
    """Else an exit status that it gave out is given out again by the next one."""
    ours, theirs = socket.socketpair()
    supervisor = object.__new__(Supervisor)
    supervisor.epoll = select.epoll()
    supervisor.epoll.register(ours.fileno(), select.EPOLLIN)
    supervisor.link, supervisor.kernel = FrameSocket(ours), Process(KERNEL, 3, os.getpid())
    supervisor.agents = {pid: agent(pid) for pid in (7, 8)}
    kernel = FrameSocket(theirs)
    kernel.send(link.encode(link.Mark(7, reaped=True)))
    kernel.send(link.encode(link.Mark(8, reaped=True)))
    kernel.close()
    supervisor._tell(link.ChildExited(9, 0))
    while supervisor.link is not None:
        supervisor._on_kernel(supervisor.link)
    supervisor.epoll.close()
    assert [one.reaped for one in supervisor.agents.values()] == [True, True]
