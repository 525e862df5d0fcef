"""A call that waits: others go on, it is called again at an event, and it is not blamed for a death meanwhile."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest

from aiosd.ipc import link, service
from aiosd.ipc.heartbeat import Rounds
from aiosd.ipc.service import Pause, Server
from libaios import wire
from libaios.channel import Channel, Side, make_channel
from tests import toy
from tests.conftest import eventually

CALLER = link.Caller(7, 1000, "me", True, "default")


class Running:
    """A server in a thread, with this test as its kernel. Calls of ECHO wait until their text is in `arrived`."""

    def __init__(self) -> None:
        memfd, kernel_bell, service_bell = make_channel()
        self.channel = Channel(os.dup(memfd), kernel_bell, Side.AGENT)
        self.bell = os.eventfd(0, os.EFD_NONBLOCK)
        self.arrived: set[str] = set()
        self.turns = self.rounds = 0
        self.worked_on: list[link.CallKey | None] = []  # the call that the channel names, at each turn
        self.messages: list[Any] = []
        self.server = Server(
            Channel(memfd, service_bell, Side.KERNEL),
            {toy.ECHO: self.echo, toy.NEVER: lambda ask, args: args.folder},
            background=self.background,
            others=lambda message: link.Parked(message.number) if isinstance(message, link.Park) else None,
            charge=lambda body: 3,
            info={"n": 1},
        )
        self.server.watch(self.bell, self.ring)
        self.thread = threading.Thread(target=self.server.run, args=(Rounds(),))
        self.thread.start()

    def echo(self, ask: link.Ask, args: toy.Text) -> Generator[Pause, None, str]:
        until = time.monotonic() + (0.05 if args.text == "late" else 60)
        while args.text not in self.arrived and time.monotonic() < until:
            self.turns += 1
            self.worked_on.append(self.channel.work.call)
            yield Pause(until)
        return args.text

    def ring(self) -> None:
        os.eventfd_read(self.bell)

    def background(self) -> float:
        self.rounds += 1
        return 60.0

    def ask(self, number: int, text: str) -> None:
        self.channel.send(link.encode(link.Ask((7, number), CALLER, toy.ECHO, wire.raw(toy.Text(text)))))

    def once(self, peer: int, number: int, text: str, again: bool, **more: Any) -> link.FromService:
        """Answer a call that must not be done twice."""
        args = wire.raw(toy.Work(text))
        key = (peer, number)
        self.channel.send(link.encode(link.Ask(key, CALLER, toy.NEVER, args, again, **more)))
        return self.until(lambda found: isinstance(found, link.Answered | link.Failed) and found.key == key)

    def until(self, found: Callable[[Any], bool]) -> Any:
        """Wait for the first message that fits."""
        end = time.monotonic() + 20
        while time.monotonic() < end:
            for message in self.messages:
                if found(message):
                    self.messages.remove(message)
                    return message
            if not self.channel.more:
                self.channel.wait(0.2)
            self.messages += [link.decode_from_service(payload) for payload in self.channel.receive()]
        raise AssertionError(self.messages)

    def answer(self, number: int) -> Any:
        return self.until(lambda message: isinstance(message, link.Answered) and message.key == (7, number))


@pytest.fixture
def running() -> Iterator[Running]:
    made = Running()
    yield made
    made.channel.send(link.encode(link.Quit()))
    made.thread.join(30)
    assert not made.thread.is_alive()
    made.channel.close()
    made.server.channel.close()
    os.close(made.bell)


def test_a_call_that_waits_delays_no_other(running: Running) -> None:
    assert running.until(lambda message: isinstance(message, link.Loaded)).info == {"n": 1}
    running.ask(1, "slow")
    assert eventually(lambda: running.worked_on and running.channel.work.call is None)
    assert set(running.worked_on) == {(7, 1)}
    running.arrived.add("quick")
    running.ask(2, "quick")
    assert running.answer(2).prompt_tokens == 3
    running.arrived.add("slow")
    os.eventfd_write(running.bell, 1)
    running.answer(1)
    assert running.turns < 20, "it sleeps while there is nothing for it"
    kept = {(7, 1), (7, 2)}
    assert eventually(lambda: set(running.server._answers) == kept), "what took more than one step is not done again"


def test_a_pause_ends_at_its_time(running: Running) -> None:
    running.ask(1, "late")
    running.answer(1)
    assert running.turns <= 4


def test_other_messages_get_their_answers(running: Running) -> None:
    running.channel.send(link.encode(link.Park(7, True, 5)))
    assert running.until(lambda message: isinstance(message, link.Parked)).number == 5
    running.ask(1, "slow")
    running.channel.send(link.encode(link.CancelCall((7, 1))))
    running.arrived.add("quick")
    running.ask(2, "quick")
    running.answer(2)
    assert not running.server._under_way
    assert not running.server._paused


def test_watched_descriptors_have_their_turn_while_messages_keep_coming(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "LOOK_S", 0.0)
    memfd, kernel_bell, service_bell = make_channel()
    kernel = Channel(os.dup(memfd), kernel_bell, Side.AGENT)
    bell = os.eventfd(1, os.EFD_NONBLOCK)
    handled: list[Any] = []
    server = Server(Channel(memfd, service_bell, Side.KERNEL), {}, others=handled.append)
    server.watch(bell, server.end)
    try:
        for number in range(5 * service.MESSAGES_AT_ONCE):
            kernel.send(link.encode(link.Park(number, parked=True)))
        assert server.run(Rounds()) == 0
        assert 0 < len(handled) <= service.MESSAGES_AT_ONCE
    finally:
        os.close(bell)
        kernel.close()
        server.channel.close()


def test_what_must_not_be_done_twice_begins_when_it_has_certainly_not_begun(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failed(found: link.FromService) -> bool:
        return isinstance(found, link.Failed) and found.errno == errno.EIO

    assert failed(running.once(7, 5, "an earlier process may have begun it", again=True))
    assert not failed(running.once(7, 5, "an earlier process had it, and had not begun it", again=False, moved=True))
    assert failed(running.once(7, 6, "this one it may have begun", again=True))
    assert not failed(running.once(7, 6, "new", again=False))
    assert not failed(running.once(7, 6, "its answer is remembered", again=True))
    assert not failed(running.once(7, 9, "the kernel died before it was passed on", again=True))
    assert failed(running.once(7, 4, "older than what came here first", again=True))
    assert failed(running.once(8, 10, "of another peer", again=True))
    assert failed(running.once(7, 12, "of another life", again=True, life=1))
    running.channel.send(link.encode(link.CancelCall((7, 20))))
    assert failed(running.once(7, 20, "it was here, and was cancelled", again=True))
    assert not failed(running.once(7, 21, "later", again=True))
    monkeypatch.setattr(service, "REMEMBERED", 1)
    for number in (30, 31):
        assert not failed(running.once(7, number, "new", again=False))
    assert failed(running.once(7, 30, "its answer was dropped", again=True))
    running.channel.send(link.encode(link.PeerGone(7)))
    assert failed(running.once(7, 40, "nothing is known of it", again=True))
