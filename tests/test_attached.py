"""After the death of a kernel: which attached agents get HUP, and when."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from aiosd import procfs
from aiosd.kernel.agents import ATTACHED_LOOK_S, REATTACH_S, Lifecycle
from aiosd.timers import Timers
from tests.conftest import eventually


class House:
    """One agent that is attached to client 5, a real process, and a clock."""

    def __init__(self, client: tuple[int, int]) -> None:
        self.now = 100.0
        self.hung_up: list[int] = []
        self.proc = SimpleNamespace(pid=7, attached_to=5, client=client)
        self.agents: Any = object.__new__(Lifecycle)
        self.agents.timers = Timers(lambda: self.now)
        self.agents.table = SimpleNamespace(live=lambda: [self.proc])
        self.agents.peers = SimpleNamespace(clients={})
        self.agents._patience = {}
        self.agents.deliver = lambda proc, number: self.hung_up.append(number)

    def pass_time(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self.now += ATTACHED_LOOK_S / 2
            self.agents.timers.run_due()


@pytest.fixture
def client() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def named(process: subprocess.Popen[bytes]) -> tuple[int, int]:
    stat = procfs.read_stat(process.pid)
    assert stat is not None
    return process.pid, stat.started


def stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGSTOP)
    assert eventually(lambda: procfs.is_stopped(*named(process)))


def test_a_client_that_does_not_come_back_is_gone(client: subprocess.Popen[bytes]) -> None:
    house = House(named(client))
    house.agents.hang_up_unclaimed()
    assert house.hung_up == [signal.SIGHUP]


def test_a_client_that_is_stopped_keeps_its_agent(client: subprocess.Popen[bytes]) -> None:
    """However long it is stopped. When it goes on it has time to connect again."""
    stop(client)
    house = House(named(client))
    house.agents.hang_up_unclaimed()
    house.pass_time(50 * REATTACH_S)
    client.send_signal(signal.SIGCONT)
    assert eventually(lambda: not procfs.is_stopped(*named(client)))
    house.pass_time(REATTACH_S / 2)
    assert house.hung_up == []
    house.agents.peers.clients[5] = client  # connected again
    house.pass_time(10 * REATTACH_S)
    assert house.hung_up == []
    assert len(house.agents.timers) == 0


def test_a_client_that_goes_on_and_does_not_come_back_is_gone(client: subprocess.Popen[bytes]) -> None:
    stop(client)
    house = House(named(client))
    house.agents.hang_up_unclaimed()
    client.send_signal(signal.SIGCONT)
    assert eventually(lambda: not procfs.is_stopped(*named(client)))
    house.pass_time(REATTACH_S + 2 * ATTACHED_LOOK_S)
    assert house.hung_up == [signal.SIGHUP]


def test_a_client_that_is_killed_while_it_is_stopped_is_gone(client: subprocess.Popen[bytes]) -> None:
    stop(client)
    house = House(named(client))
    house.agents.hang_up_unclaimed()
    client.kill()
    client.wait()
    house.pass_time(2 * ATTACHED_LOOK_S)
    assert house.hung_up == [signal.SIGHUP]


def test_a_number_that_is_another_process_is_not_the_client(client: subprocess.Popen[bytes]) -> None:
    stop(client)
    house = House((client.pid, 1))
    house.agents.hang_up_unclaimed()
    assert house.hung_up == [signal.SIGHUP]
    assert not procfs.is_there(client.pid, 1)
    assert procfs.is_there(os.getpid(), named_self())


def named_self() -> int:
    stat = procfs.read_stat(os.getpid())
    assert stat is not None
    return stat.started
