"""A message whose receiver gave up while it was on its way is not lost: the next RECV gets it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil
import pytest

import libaios as aios
from libaios import aio, channel, msg, plan, ring, wire
from libaios import connection as connections
from libaios.agent import AgentTransport
from libaios.client import Client
from libaios.connection import Connection, Pending
from libaios.home import Home
from libaios.wire import Sys
from tests.conftest import System, eventually
from tests.fakekernel import PATIENCE_S, ChannelKernel, args_of, as_process_connection, aside
from tests.interrupts import Interrupt, Interrupts


@pytest.fixture
def kernel() -> Iterator[ChannelKernel]:
    made = ChannelKernel()
    with as_process_connection(made.connection):
        yield made
    made.close()


@pytest.fixture
def connection(kernel: ChannelKernel) -> Connection:
    return kernel.connection


def message(obj: object) -> wire.Received:
    return wire.Received(5, wire.raw(obj))


def ask(connection: Connection) -> Pending:
    return connection.submit(Sys.RECV, wire.Recv(None))


def test_a_reply_that_lies_in_the_ring(kernel: ChannelKernel, connection: Connection) -> None:
    call = ask(connection)
    kernel.reply(kernel.take(Sys.RECV), message("kept"))
    connection.abandon(call)
    assert aios.msg.recv() == (5, "kept")


def test_a_reply_that_was_handed_out(kernel: ChannelKernel, connection: Connection) -> None:
    call = ask(connection)
    kernel.reply(kernel.take(Sys.RECV), message("kept"))
    connection.pump()
    connection.abandon(call)
    connection.abandon(call)
    assert aios.msg.recv(timeout=0) == (5, "kept")
    assert kernel.quiet()  # no call was sent to the kernel


def test_an_interrupt_at_the_last_moment(
    kernel: ChannelKernel, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = connection._wait

    def interrupted(ready: Callable[[], bool], call: Pending, deadline: float | None) -> None:
        kernel.reply(kernel.take(Sys.RECV), message("kept"))
        wait(ready, call, deadline)
        raise KeyboardInterrupt

    monkeypatch.setattr(connection, "_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        aios.msg.recv()
    monkeypatch.undo()
    assert aios.msg.recv() == (5, "kept")


INTERRUPTED = (connections, channel, ring, plan, msg)
SIZES = (10, 5000, 3000, 9000, 20)  # in a ring of 4096 bytes: whole, in pieces, around its end


def test_an_interrupt_at_any_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """At each point at which a signal handler may raise: every message is received once, in the order of sending."""
    for n in range(1, 100_000):
        mailbox = Mailbox(n)
        monkeypatch.setattr(AgentTransport, "wait", mailbox.turn)
        received = []
        with as_process_connection(mailbox.kernel.connection):
            while len(received) < len(SIZES):
                try:
                    with mailbox.interrupts:
                        body = aios.msg.recv()[1]
                    received.append(len(body))
                except Interrupt:
                    pass
        mailbox.kernel.close()
        assert received == list(SIZES), n
        if mailbox.interrupts.left > 0:
            assert n > 100
            return


class Mailbox:
    """A kernel that answers RECVs with messages whenever the agent waits."""

    def __init__(self, n: int) -> None:
        self.kernel = ChannelKernel(ring.MIN_RING)
        self.interrupts = Interrupts(n, *INTERRUPTED)
        self._sizes = list(SIZES)
        self._open: dict[int, wire.Request] = {}

    def turn(self, timeout: float | None = None) -> bool:
        sys.setprofile(None)
        for request in self.kernel.poll(0.0):
            if request.sys == Sys.RECV:
                self._open[request.id] = request
            elif (cancelled := self._open.pop(args_of(request).id, None)) is not None:
                self.kernel.fail(cancelled, errno.ECANCELED, "canceled")
        while self._open and self._sizes:
            self.kernel.reply(self._open.pop(min(self._open)), message(bytes(self._sizes.pop(0))))
        self.interrupts.__enter__()
        return True


def test_an_interrupt_while_the_reply_of_another_thread_is_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(1, 100_000):
        pair = TwoThreads(n)
        monkeypatch.setattr(AgentTransport, "wait", pair.wait)
        with as_process_connection(pair.kernel.connection):
            with contextlib.suppress(Interrupt):
                aios.msg.recv()
            sys.setprofile(None)
            assert pair.other is not None
            assert pair.other.result(PATIENCE_S) == (5, "theirs"), n
        pair.kernel.close()
        if pair.interrupts.left > 0:
            assert n > 30
            return


def test_the_connection_ends_after_an_interrupt_in_the_middle_of_a_hand_out(
    kernel: ChannelKernel, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reply did not reach its call, so the call ends with the connection, like all others."""
    call = ask(connection)
    kernel.reply(kernel.take(Sys.RECV), message("lost"))

    def interrupted(self: Pending) -> None:
        raise Interrupt

    call.fds = [os.dup(0)]
    with monkeypatch.context() as patch:
        patch.setattr(Pending, "release", interrupted)
        with pytest.raises(Interrupt):
            connection.pump()
    assert call.final is None
    connection.close()
    assert call.final is not None  # or its thread would wait for ever
    with pytest.raises(OSError, match="closed") as raised:
        connection.result(call, wire.Received)
    assert raised.value.errno == errno.ENOTCONN


class TwoThreads:
    """This thread reads the connection for another one, too. Both replies arrive, and this thread is interrupted."""

    def __init__(self, n: int) -> None:
        self.kernel = ChannelKernel()
        self.interrupts = Interrupts(n, *INTERRUPTED)
        self.other: Future[Any] | None = None

    def wait(self, timeout: float | None = None) -> bool:
        if self.other is None:
            own = self.kernel.take(Sys.RECV)
            self.other = aside(aios.msg.recv)
            theirs = self.kernel.take(Sys.RECV)
            assert eventually(lambda: bool(self.kernel.connection._followers))
            self.kernel.reply(theirs, message("theirs"))
            self.kernel.reply(own, message("own"))
            self.interrupts.__enter__()
        return True


def test_a_reply_that_comes_later(kernel: ChannelKernel, connection: Connection) -> None:
    call = ask(connection)
    first = kernel.take(Sys.RECV)
    connection.abandon(call)
    assert args_of(kernel.take(Sys.CANCEL)).id == first.id
    kernel.reply(first, message("kept"))
    connection.pump()
    assert aios.msg.recv() == (5, "kept")
    assert not connection._given_up


def test_a_later_reply_goes_to_a_call_that_waits(kernel: ChannelKernel, connection: Connection) -> None:
    """The waiting call may get another message from the kernel, which is not lost either."""
    call = ask(connection)
    first = kernel.take(Sys.RECV)
    connection.abandon(call)
    kernel.take(Sys.CANCEL)
    waiting = aside(aios.msg.recv)
    second = kernel.take(Sys.RECV)
    kernel.reply(first, message("one"))
    assert waiting.result(PATIENCE_S) == (5, "one")
    assert args_of(kernel.take(Sys.CANCEL)).id == second.id
    kernel.reply(second, message("two"))
    connection.pump()
    assert aios.msg.recv(timeout=0) == (5, "two")


def test_messages_keep_their_order(kernel: ChannelKernel, connection: Connection) -> None:
    calls = [ask(connection) for _ in range(5)]
    requests = [kernel.take(Sys.RECV) for _ in calls]
    for call in calls:
        connection.abandon(call)
    for number, request in enumerate(requests):
        kernel.reply(request, message(number))
    connection.pump()
    assert [aios.msg.recv(timeout=0)[1] for _ in calls] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("code", [errno.ECANCELED, errno.ETIMEDOUT])
def test_a_call_without_a_message_leaves_nothing(kernel: ChannelKernel, connection: Connection, code: int) -> None:
    call = ask(connection)
    request = kernel.take(Sys.RECV)
    connection.abandon(call)
    kernel.fail(request, code, "nothing")
    connection.pump()
    assert not connection._given_up
    assert not connection._returned


def test_the_kernel_dies_before_its_reply(kernel: ChannelKernel, connection: Connection) -> None:
    """The journal may have given the message to this call, so it is sent to the successor again, with a CANCEL."""
    call = ask(connection)
    request = kernel.take(Sys.RECV)
    connection.abandon(call)
    kernel.take(Sys.CANCEL)
    kernel.die()
    kernel.rise()
    connection.pump()
    again = kernel.take(Sys.RECV)
    assert again.id == request.id
    assert args_of(kernel.take(Sys.CANCEL)).id == request.id
    kernel.reply(again, message("kept"))
    connection.pump()
    assert aios.msg.recv(timeout=0) == (5, "kept")


def test_the_kernel_dies_after_its_reply(kernel: ChannelKernel, connection: Connection) -> None:
    call = ask(connection)
    kernel.reply(kernel.take(Sys.RECV), message("kept"))
    connection.abandon(call)
    kernel.die()
    kernel.rise()
    connection.pump()
    assert aios.msg.recv(timeout=0) == (5, "kept")
    assert kernel.quiet()  # the call is not sent again


def test_a_task_that_is_cancelled_when_its_reply_is_there(kernel: ChannelKernel, connection: Connection) -> None:
    async def main() -> tuple[int, object]:
        task = asyncio.create_task(aio.msg.recv())
        await asyncio.sleep(0)  # the task sends its call
        kernel.reply(kernel.take(Sys.RECV), message("kept"))
        connection.pump()  # its reply is there; the task has not run since
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await aio.msg.recv(timeout=0)

    assert asyncio.run(main()) == (5, "kept")
    assert kernel.quiet()


AGENT = """
import libaios as aios
from libaios import wire
from libaios.agent import connection
call = connection().submit(wire.Sys.RECV, wire.Recv(None))
print(aios.proc.getpid(), flush=True)
input()
connection().abandon(call)
print(aios.msg.recv(timeout=30), flush=True)
"""


@pytest.mark.parametrize("killed", [False, True])
def test_through_the_system(fresh_aiosd: Callable[..., System], tmp_path: Path, killed: bool) -> None:
    """The message is in the agent's ring, unread, when it gives up."""
    script = tmp_path / "receiver.py"
    script.write_text(AGENT)
    system = fresh_aiosd("--threads", "1")
    job = system.popen("aios-run", script)
    assert job.stdout is not None
    assert job.stdin is not None
    pid = int(job.stdout.readline())
    with Client(Home(system.home)) as client:
        client.call(Sys.SEND, wire.Send(pid, wire.raw("kept")), None, timeout=30)
    if killed:
        old = next(entry["ospid"] for entry in system.ps() if entry["name"] == "kernel")
        os.kill(old, signal.SIGKILL)
        assert eventually(lambda: not psutil.pid_exists(old))
    job.stdin.write("\n")
    job.stdin.flush()
    assert job.stdout.read() == "(0, 'kept')\n"
    assert job.wait(30) == 0
