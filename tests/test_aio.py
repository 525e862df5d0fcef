"""The SDK in event loops: with threads, with cancelled tasks, and across the death of a kernel."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import libaios as aios
import libaios.aio as aio
from libaios import agent, wire
from libaios.wire import Sys
from tests.fakekernel import PATIENCE_S, ChannelKernel, SocketKernel, args_of, as_process_connection, aside
from tests.ticker import Ticker

pytestmark = pytest.mark.deadline(60)


@pytest.fixture
def kernel() -> Iterator[ChannelKernel]:
    made = ChannelKernel()
    with as_process_connection(made.connection):
        yield made
    made.close()


def test_many_calls_at_once(kernel: ChannelKernel) -> None:
    end = kernel.serve(lambda request: args_of(request).text)

    async def main() -> list[object]:
        return await asyncio.gather(*(aio._run(plan(str(number))) for number in range(300)))

    try:
        assert asyncio.run(main()) == [str(number) for number in range(300)]
    finally:
        end()


ECHO = 950  # a call that only these tests have
wire.add(wire.Row(ECHO, wire.Tokenize, str, by="tests"))


def plan(text: str) -> aio.Plan[str]:
    return aio.Plan(ECHO, wire.Tokenize(text))


def test_threads_and_two_loops_share_the_connection(kernel: ChannelKernel) -> None:
    end = kernel.serve(lambda request: args_of(request).text)

    def in_thread(name: str) -> None:
        for turn in range(200):
            call = kernel.connection.call(Sys.TOKENIZE, wire.Tokenize(f"{name}{turn}"), str)
            assert call == f"{name}{turn}"

    async def in_loop(name: str) -> None:
        for turn in range(100):
            texts = [f"{name}{turn}.{part}" for part in range(3)]
            assert await asyncio.gather(*(aio._run(plan(text)) for text in texts)) == texts

    try:
        others = [aside(in_thread, "a"), aside(in_thread, "b"), aside(asyncio.run, in_loop("c"))]
        asyncio.run(in_loop("d"))
        for other in others:
            other.result(30)
    finally:
        end()
    assert kernel.connection.open_calls == 0


def test_one_loop_after_another(kernel: ChannelKernel) -> None:
    end = kernel.serve(lambda request: 4)
    try:
        for _ in range(5):
            assert asyncio.run(aio.proc.getpid()) == 4
    finally:
        end()


def test_canceling_a_task_cancels_its_call(kernel: ChannelKernel) -> None:
    async def main() -> None:
        task = asyncio.create_task(aio.msg.recv())
        request = await asyncio.to_thread(kernel.take, Sys.RECV)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert args_of(await asyncio.to_thread(kernel.take, Sys.CANCEL)).id == request.id

    asyncio.run(main())
    assert kernel.connection.open_calls == 0


def test_a_call_that_gets_no_answer_in_time(kernel: ChannelKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aio, "SLACK_S", 0.0)
    with pytest.raises(TimeoutError, match="no answer"):
        asyncio.run(aio.msg.recv(timeout=0.01))
    request = kernel.take(Sys.RECV)
    assert args_of(kernel.take(Sys.CANCEL)).id == request.id


def test_an_error_is_raised_in_the_task(kernel: ChannelKernel) -> None:
    async def main() -> None:
        task = asyncio.create_task(aio.proc.kill(99))
        kernel.fail(await asyncio.to_thread(kernel.take, Sys.KILL), errno.ESRCH, "99: no such agent")
        with pytest.raises(ProcessLookupError, match="no such agent"):
            await task

    asyncio.run(main())


def test_a_stream(kernel: ChannelKernel) -> None:
    async def main() -> list[str]:
        texts = []
        reading = asyncio.create_task(collect(texts))
        request = await asyncio.to_thread(kernel.take, Sys.GENERATE)
        for offset, letter in enumerate("abc"):
            kernel.piece(request, offset, letter, [offset])
        kernel.end(request, "d", [9])
        await reading
        return texts

    async def collect(texts: list[str]) -> None:
        async for piece in aio.llm.complete("x", stream=True):
            texts.append(piece.text)

    assert asyncio.run(main()) == ["a", "b", "c", "d"]


def test_leaving_a_stream_cancels_it(kernel: ChannelKernel) -> None:
    async def main() -> None:
        async def first() -> str:
            pieces = aio.llm.complete("x", stream=True).__aiter__()
            async for piece in pieces:
                await pieces.aclose()  # type: ignore[attr-defined]
                return piece.text
            raise AssertionError

        reading = asyncio.create_task(first())
        request = await asyncio.to_thread(kernel.take, Sys.GENERATE)
        kernel.piece(request, 0, "a", [1])
        assert await reading == "a"
        assert args_of(await asyncio.to_thread(kernel.take, Sys.CANCEL)).id == request.id

    asyncio.run(main())


def test_a_generation_is_awaited_in_every_way_and_asked_once(kernel: ChannelKernel) -> None:
    end = kernel.serve(lambda request: wire.Generated("hi", [1], "stop", wire.Usage()))

    async def main() -> None:
        for wait in (asyncio.create_task, asyncio.ensure_future, lambda one: asyncio.wait_for(one, PATIENCE_S)):
            generation = aio.llm.complete("x")
            first = await wait(generation)
            assert first.text == "hi"
            assert await generation is first
            assert await asyncio.create_task(generation) is first

    before = kernel.connection.transport.next_id()
    try:
        asyncio.run(main())
        assert asyncio.run(aio.llm.complete("x")).text == "hi"
    finally:
        end()
    assert kernel.connection.transport.next_id() - before == 5, "four calls"


def test_several_results_and_the_end_of_all_when_one_fails(kernel: ChannelKernel) -> None:
    async def main() -> None:
        asking = asyncio.create_task(aio.llm.complete("x", n=3, seed=(1 << 63) - 2))
        requests = [await asyncio.to_thread(kernel.take, Sys.GENERATE) for _ in range(3)]
        assert [args_of(request).sampling.seed for request in requests] == [(1 << 63) - 2, (1 << 63) - 1, 0]
        for text, request in zip("cba", reversed(requests), strict=True):
            kernel.end(request, text, [1])
        assert [choice.text for choice in (await asking).choices] == ["a", "b", "c"]

        asking = asyncio.create_task(aio.llm.complete("x", n=2))
        first, second = [await asyncio.to_thread(kernel.take, Sys.GENERATE) for _ in range(2)]
        kernel.fail(second, errno.EIO, "no")
        with pytest.raises(OSError, match="no"):
            await asking
        assert args_of(await asyncio.to_thread(kernel.take, Sys.CANCEL)).id == first.id

    asyncio.run(main())


def test_two_tasks_await_one_generation(kernel: ChannelKernel) -> None:
    async def ask(generation: aio.Generation) -> object:
        return await generation

    async def main() -> None:
        generation = aio.llm.complete("x")
        both = asyncio.gather(ask(generation), ask(generation))
        kernel.end(await asyncio.to_thread(kernel.take, Sys.GENERATE), "hi")
        first, second = await both
        assert first is second
        assert kernel.quiet()

    asyncio.run(main())


def test_canceling_the_task_of_a_generation_cancels_its_call(kernel: ChannelKernel) -> None:
    async def main() -> None:
        task = asyncio.create_task(aio.llm.complete("x"))
        request = await asyncio.to_thread(kernel.take, Sys.GENERATE)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert args_of(await asyncio.to_thread(kernel.take, Sys.CANCEL)).id == request.id

    asyncio.run(main())


def test_async_with_ends_a_stream(kernel: ChannelKernel) -> None:
    async def main() -> None:
        async def first() -> str:
            async with aio.llm.complete("x", stream=True) as pieces:
                async for piece in pieces:
                    return piece.text
            raise AssertionError

        reading = asyncio.create_task(first())
        request = await asyncio.to_thread(kernel.take, Sys.GENERATE)
        kernel.piece(request, 0, "a", [1])
        assert await reading == "a"
        assert args_of(await asyncio.to_thread(kernel.take, Sys.CANCEL)).id == request.id

    asyncio.run(main())


def test_a_new_kernel_in_the_middle_of_a_call(kernel: ChannelKernel) -> None:
    async def main() -> int:
        task = asyncio.create_task(aio.proc.getpid())
        before = await asyncio.to_thread(kernel.take, Sys.GETPID)
        kernel.die()
        kernel.rise()
        again = await asyncio.to_thread(kernel.take, Sys.GETPID)
        assert again.id == before.id
        kernel.reply(again, 6)
        return await asyncio.wait_for(task, PATIENCE_S)

    assert asyncio.run(main()) == 6


# ── a full ring ───────────────────────────────────────────────────────────────────────────────────────────

LARGE = "x" * 20_000


@pytest.fixture
def small() -> Iterator[ChannelKernel]:
    """A kernel whose rings hold no large call."""
    made = ChannelKernel(1 << 12)
    with as_process_connection(made.connection):
        yield made
    made.close()


def test_tasks_wait_for_room_in_their_order_and_the_loop_goes_on(small: ChannelKernel) -> None:
    async def main() -> None:
        ticker = Ticker()
        tasks = [asyncio.create_task(aio._run(plan(f"{number:03}{LARGE}"))) for number in range(30)]
        await ticker.turn()
        assert small.connection.transport.outbox_bytes < 2 * len(LARGE), "the others keep their calls to themselves"
        tasks[3].cancel()
        come = []
        for _ in tasks[1:]:
            request = await asyncio.to_thread(small.take, ECHO)
            come.append(int(args_of(request).text[:3]))
            small.reply(request, "done")
        assert come == [0, 1, 2, *range(4, 30)]
        assert await asyncio.gather(*tasks[:3], *tasks[4:]) == ["done"] * 29
        await ticker.turn(1)
        ticker.stop()

    asyncio.run(main())
    assert small.connection.open_calls == 0


def test_a_thread_that_waits_for_room_does_not_hold_the_loop(small: ChannelKernel) -> None:
    async def main() -> None:
        ticker = Ticker()
        thread = aside(small.connection.call, ECHO, wire.Tokenize(LARGE), str)
        while not small.connection.transport.outbox_bytes:
            await ticker.turn(1)
        task = asyncio.create_task(aio.proc.getpid())
        await ticker.turn()
        for sys, body in ((ECHO, "done"), (Sys.GETPID, 5)):
            small.reply(await asyncio.to_thread(small.take, sys), body)
        assert (await task, thread.result(PATIENCE_S)) == (5, "done")
        await ticker.turn(1)
        ticker.stop()

    asyncio.run(main())


def test_tasks_that_wait_for_room_when_aiosd_ends(small: ChannelKernel) -> None:
    async def main() -> list[object]:
        tasks = [asyncio.create_task(aio._run(plan(LARGE))) for _ in range(5)]
        await asyncio.sleep(0)
        small.hang_up()
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), PATIENCE_S)

    assert [type(error) for error in asyncio.run(main())] == [OSError] * 5


# ── over the control socket ───────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def socket_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SocketKernel]:
    """A system of which this process is no agent: it connects as a client of the control socket."""
    monkeypatch.setenv(wire.ENV_HOME, str(tmp_path))
    made = SocketKernel(tmp_path / "aiosd.sock")
    yield made
    agent.reset()
    made.close()


def test_the_loop_goes_on_while_it_connects(socket_kernel: SocketKernel) -> None:
    """aiosd runs, but its kernel does not answer yet."""

    async def main() -> None:
        ticker = Ticker()
        calls = [asyncio.create_task(aio.proc.getpid()) for _ in range(3)]
        await ticker.turn()
        await asyncio.to_thread(socket_kernel.welcome)
        for _ in calls:
            socket_kernel.reply(await asyncio.to_thread(socket_kernel.take, Sys.GETPID), 5)
        assert await asyncio.gather(*calls) == [5] * 3
        await ticker.turn(1)
        ticker.stop()

    asyncio.run(main())


def test_the_loop_goes_on_while_there_is_no_kernel(socket_kernel: SocketKernel) -> None:
    async def main() -> None:
        ticker = Ticker()
        call = asyncio.create_task(aio.proc.getpid())
        await asyncio.to_thread(socket_kernel.welcome)
        before = await asyncio.to_thread(socket_kernel.take, Sys.GETPID)
        socket_kernel.die()
        await ticker.turn()
        for _ in range(3):  # kernels that die before they have greeted
            await asyncio.to_thread(socket_kernel.accept)
            await ticker.turn(10)
            socket_kernel.die()
        meanwhile = asyncio.create_task(aio.proc.getppid())
        await ticker.turn()
        await asyncio.to_thread(socket_kernel.welcome)
        again = await asyncio.to_thread(socket_kernel.take, Sys.GETPID)
        assert again.id == before.id
        socket_kernel.reply(again, 5)
        socket_kernel.reply(await asyncio.to_thread(socket_kernel.take, Sys.GETPPID), 6)
        assert (await call, await meanwhile) == (5, 6)
        await ticker.turn(1)
        ticker.stop()

    asyncio.run(main())


def test_when_aiosd_has_ended_the_loop_is_not_woken_again(kernel: ChannelKernel) -> None:
    """A connection that has ended stays readable for ever: the loop must stop watching it."""

    async def main() -> int:
        task = asyncio.create_task(aio.proc.getpid())
        await asyncio.to_thread(kernel.take)
        kernel.hang_up()
        with pytest.raises(OSError, match="aiosd is gone"):
            await asyncio.wait_for(task, PATIENCE_S)
        turns = 0
        original = kernel.connection._read

        def read() -> bool:
            nonlocal turns
            turns += 1
            return original()

        kernel.connection._read = read  # type: ignore[method-assign]
        await asyncio.sleep(0.02)  # this test counts the loop's turns
        return turns

    assert asyncio.run(main()) <= 1


def test_a_loop_that_runs_on_when_another_thread_closes_keeps_its_other_readers(kernel: ChannelKernel) -> None:
    """The number of the closed descriptor is given to the next socket at once, before the loop runs again."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        kernel.connection.attach_loop(loop)
        number = kernel.connection.transport.fileno()
        aside(kernel.connection.close).result(PATIENCE_S)  # this blocks the loop, because it is its thread
        reading, writing = os.pipe()
        os.dup2(reading, number)
        found = asyncio.Event()
        loop.add_reader(number, found.set)
        await asyncio.sleep(0)
        os.write(writing, b"!")
        await asyncio.wait_for(found.wait(), PATIENCE_S)
        loop.remove_reader(number)
        for fd in {reading, writing, number}:
            os.close(fd)

    asyncio.run(main())


class Clock:
    """A fake of a loop as a connection needs it, with a clock of its own; and a pace."""

    def __init__(self) -> None:
        self.now, self.watched = 0.0, True
        self.looks: list[Callable[[], None]] = []

    def time(self) -> float:
        return self.now

    def add_reader(self, fd: int, act: Any) -> None:
        self.watched, self.look = True, act

    def remove_reader(self, fd: int) -> None:
        self.watched = False

    def wait_s(self) -> float:
        return 0.02

    def later(self, look: Callable[[], None]) -> None:
        self.looks.append(look)

    def look_again(self) -> None:
        (look,) = self.looks
        self.looks.clear()
        look()

    def is_closed(self) -> bool:
        return False

    def is_running(self) -> bool:
        return False


def test_a_loop_looks_less_often_only_where_pieces_come_fast(kernel: ChannelKernel) -> None:
    clock: Any = Clock()
    connection = kernel.connection
    connection.attach_loop(clock, clock)
    stream = connection.prepare(Sys.GENERATE, wire.Generate(prompt="x", stream=True), stream=True)
    connection.send(stream)
    request = kernel.take(Sys.GENERATE)

    def piece(number: int) -> None:
        kernel.piece(request, number, "x", [1])

    clock.now = 1.0
    piece(0)
    clock.look()
    assert clock.watched, "the first look after a pause of the stream"
    clock.now = 1.01
    piece(1)
    clock.look()
    assert not clock.watched, "pieces come fast"
    piece(2)
    piece(3)
    clock.look_again()
    assert len(stream.pieces or ()) == 4
    assert not clock.watched, "they still do"
    clock.look_again()
    assert clock.watched, "nothing has come"
    assert not clock.looks
    clock.now = 1.02
    piece(4)
    clock.look()
    assert not clock.watched
    call = connection.prepare(Sys.GETPID, wire.NoArgs())
    connection.send(call)
    kernel.reply(kernel.take(Sys.GETPID), 5)
    clock.look_again()
    assert call.final is not None
    assert clock.watched, "a final reply is no piece of a stream"
    connection.close()


def test_a_reply_and_the_end_of_the_system_at_once(kernel: ChannelKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """One event on the bell, and no back-stop: the answered call has its result, the other one its error."""
    monkeypatch.setattr(aio, "BACKSTOP_S", 1000.0)

    async def main() -> list[object]:
        tasks = [asyncio.create_task(aio.proc.getpid()), asyncio.create_task(aio.proc.getppid())]
        request = await asyncio.to_thread(kernel.take, Sys.GETPID)
        await asyncio.to_thread(kernel.take, Sys.GETPPID)
        kernel.reply(request, 5)
        kernel.hang_up()
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), PATIENCE_S)

    first, second = asyncio.run(main())
    assert first == 5
    assert "aiosd is gone" in str(second)


def test_closing_while_a_task_looks_for_itself_does_no_harm(
    kernel: ChannelKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread closes after the task has looked at its ring, before it rings the bell."""
    connection = kernel.connection
    original = connection.pump

    def pump() -> None:
        original()
        aside(connection.close).result(PATIENCE_S)

    monkeypatch.setattr(connection, "pump", pump)
    monkeypatch.setattr(aio, "BACKSTOP_S", 0.0, raising=False)

    async def main() -> None:
        await aio._reply(connection, aio.Replied())

    asyncio.run(main())


def test_a_reply_for_a_loop_that_is_closed_does_no_harm(kernel: ChannelKernel) -> None:
    """The task has ended with its loop; the thread that reads the reply goes on."""
    loop = asyncio.new_event_loop()

    async def begin() -> None:
        await aio._submit(kernel.connection, Sys.GETPID, wire.NoArgs())

    loop.run_until_complete(begin())
    loop.close()
    orphan = kernel.take(Sys.GETPID)
    call = aside(aios.proc.getppid)
    request = kernel.take(Sys.GETPPID)
    kernel.reply(orphan, 1)
    kernel.reply(request, 2)
    assert call.result(PATIENCE_S) == 2


def test_the_same_names_as_coroutines() -> None:
    for family in ("proc", "msg", "llm", "mem", "sto", "tool"):
        twins = getattr(aio, family)
        functions = [name for name in getattr(aios, family).__all__ if name[0].islower()]
        missing = [name for name in functions if not hasattr(twins, name)]
        assert missing == [], family


def test_a_context_of_coroutines_refuses_what_it_cannot_do() -> None:
    context = aio.llm.context([{"role": "user", "content": "hi"}])
    with pytest.raises(OSError, match="stream: not here"):
        asyncio.run(context.chat(stream=True))
