"""The connection of an agent: replies in any order to any thread, streams, interruptions, deaths and forks."""

from __future__ import annotations

import contextlib
import errno
import gc
import multiprocessing
import os
import random
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

import libaios as aios
from libaios import agent, ring, wire
from libaios import channel as channels
from libaios import connection as connections
from libaios.agent import AgentTransport
from libaios.connection import Connection, Pending
from libaios.generate import Stream, generate_args
from libaios.wire import NoArgs, Sys
from tests.conftest import eventually
from tests.fakekernel import PATIENCE_S, ChannelKernel, args_of, as_process_connection, aside

pytestmark = pytest.mark.deadline(60)


@pytest.fixture
def kernel() -> Iterator[ChannelKernel]:
    made = ChannelKernel()
    yield made
    made.close()


@pytest.fixture
def connection(kernel: ChannelKernel) -> Connection:
    return kernel.connection


@pytest.fixture
def unsupported(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChannelKernel]:
    """A kernel whose agent sleeps without a time limit, so that a lost wake-up shows."""
    monkeypatch.setattr(channels, "BACKSTOP_S", 1000.0)
    made = ChannelKernel()
    yield made
    made.close()


def generate(stream: bool = True, timeout: float | None = None) -> wire.Generate:
    return generate_args(None, "text", stream=stream, timeout=timeout)


# ── calls ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_option_that_is_not_known_is_one_of_the_function_that_was_called() -> None:
    with pytest.raises(TypeError, match=r"^chat/complete\(\) got an unexpected keyword argument 'max_token'"):
        aios.llm.chat([], max_token=3)


def test_replies_in_any_order_find_their_calls(kernel: ChannelKernel, connection: Connection) -> None:
    results = [aside(connection.call, Sys.TOKENIZE, wire.Tokenize(str(number)), str) for number in range(8)]
    requests = [kernel.take() for _ in results]
    random.Random(3).shuffle(requests)
    for request in requests:
        kernel.reply(request, args_of(request).text)
    assert [future.result(PATIENCE_S) for future in results] == [str(number) for number in range(8)]
    assert connection.open_calls == 0


def test_many_threads_make_many_calls(kernel: ChannelKernel, connection: Connection) -> None:
    """The leader changes all the time, and every thread is woken."""
    end = kernel.serve(lambda request: args_of(request).text)
    try:

        def work(number: int) -> None:
            for turn in range(300):
                assert connection.call(Sys.TOKENIZE, wire.Tokenize(f"{number}.{turn}"), str) == f"{number}.{turn}"

        with ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(work, number) for number in range(8)]:
                done.result(30)
    finally:
        end()


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOENT, FileNotFoundError),
        (errno.EPERM, PermissionError),
        (errno.EACCES, PermissionError),
        (errno.ESRCH, ProcessLookupError),
        (errno.ETIMEDOUT, TimeoutError),
        (errno.EAGAIN, BlockingIOError),
        (errno.ECHILD, ChildProcessError),
        (errno.EINTR, InterruptedError),
        (errno.EDQUOT, OSError),
        (errno.ENOSYS, OSError),
    ],
)
def test_an_error_is_the_os_error_of_its_number(
    kernel: ChannelKernel, connection: Connection, code: int, kind: type[OSError]
) -> None:
    call = aside(connection.call, Sys.GETPID, NoArgs(), int)
    kernel.fail(kernel.take(), code, "a sentence")
    with pytest.raises(kind, match="a sentence") as caught:
        call.result(PATIENCE_S)
    assert caught.value.errno == code


def test_a_call_that_gets_no_answer_in_time_is_canceled(
    kernel: ChannelKernel, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "SLACK_S", 0.0)
    with pytest.raises(TimeoutError):
        connection.call(Sys.RECV, wire.Recv(0.01), None, timeout=0.01)
    request = kernel.take(Sys.RECV)
    assert args_of(kernel.take(Sys.CANCEL)).id == request.id


def test_a_follower_that_gets_no_answer_in_time_is_canceled(
    kernel: ChannelKernel, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "SLACK_S", 0.0)
    leader = aside(connection.call, Sys.GETPID, NoArgs(), int)
    first = kernel.take(Sys.GETPID)
    with pytest.raises(TimeoutError):
        connection.call(Sys.RECV, wire.Recv(0.01), None, timeout=0.01)
    request = kernel.take(Sys.RECV)
    assert args_of(kernel.take(Sys.CANCEL)).id == request.id
    kernel.reply(first, 1)
    assert leader.result(PATIENCE_S) == 1


def test_a_call_larger_than_the_limit_is_refused_here(kernel: ChannelKernel, connection: Connection) -> None:
    with pytest.raises(OSError, match="limit") as caught:
        connection.call(Sys.TOKENIZE, wire.Tokenize("x" * wire.MAX_FRAME), None)
    assert caught.value.errno == errno.EMSGSIZE
    assert kernel.quiet()
    assert connection.open_calls == 0


def test_a_full_ring_makes_callers_wait_and_loses_nothing() -> None:
    """Large calls of several threads through a small ring, while others get replies."""
    kernel = ChannelKernel(1 << 12)
    end = kernel.serve(lambda request: len(args_of(request).text))
    try:

        def work(number: int) -> None:
            for turn in range(30):
                length = (number * 7919 + turn * 1009) % 20_000
                call = (Sys.TOKENIZE, wire.Tokenize("x" * length), int)
                assert kernel.connection.call(*call) == length

        with ThreadPoolExecutor(6) as pool:
            for done in [pool.submit(work, number) for number in range(6)]:
                done.result(30)
    finally:
        end()
        kernel.close()


# ── the lead ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_thread_that_has_stopped_waiting_gives_up_the_lead(kernel: ChannelKernel, connection: Connection) -> None:
    """A stream's reader gets a piece and the lead at the same moment, and leaves to use the piece. Another thread must
    read on."""
    leader = aside(connection.call, Sys.GETPID, NoArgs(), int)
    first = kernel.take(Sys.GETPID)
    stream = Stream(connection, generate())
    opened = kernel.take(Sys.GENERATE)
    piece = aside(next, stream)
    follower = aside(connection.call, Sys.GETPPID, NoArgs(), int)
    second = kernel.take(Sys.GETPPID)
    until_followed(connection, 2)
    with kernel.one_bell():  # the leader wakes the stream's reader for its piece, and leaves
        kernel.piece(opened, 0, "a", [1])
        kernel.reply(first, 1)
    assert leader.result(PATIENCE_S) == 1
    assert piece.result(PATIENCE_S).text == "a"
    kernel.reply(second, 2)
    assert follower.result(PATIENCE_S) == 2
    stream.close()


def until_followed(connection: Connection, number: int) -> None:
    """Wait until this number of threads wait while a leader reads."""
    assert eventually(lambda: len(connection._followers) >= number), f"{len(connection._followers)} followers"


def test_interrupting_the_leader_passes_the_lead_on(kernel: ChannelKernel, connection: Connection) -> None:
    with interrupted_when(lambda: bool(connection._followers)):
        other = aside(follow, connection, Sys.GETPPID)
        with pytest.raises(KeyboardInterrupt):
            connection.call(Sys.RECV, wire.Recv(), None)
    requests = {request.sys: request for request in (kernel.take() for _ in range(3))}
    assert args_of(requests[Sys.CANCEL]).id == requests[Sys.RECV].id
    kernel.reply(requests[Sys.GETPPID], 5)
    assert other.result(PATIENCE_S) == 5


def follow(connection: Connection, number: int) -> object:
    """Make a call once another thread leads."""
    patience = threading.Event()
    while not connection._leader:
        patience.wait(0.005)
    return connection.call(number, NoArgs(), int)


@contextlib.contextmanager
def interrupted_when(holds: Callable[[], object]) -> Iterator[None]:
    """The main thread gets one SIGINT as soon as this holds."""
    main = threading.main_thread().ident
    assert main is not None

    def fire() -> None:
        if eventually(holds, every=0.005):
            signal.pthread_kill(main, signal.SIGINT)

    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    firing = threading.Thread(target=fire)
    firing.start()
    try:
        yield
    finally:
        firing.join()
        signal.signal(signal.SIGINT, old)


def test_interrupting_a_follower_cancels_its_call_alone(kernel: ChannelKernel, connection: Connection) -> None:
    leader = aside(connection.call, Sys.GETPID, NoArgs(), int)
    first = kernel.take(Sys.GETPID)
    with interrupted_when(lambda: bool(connection._followers)), pytest.raises(KeyboardInterrupt):
        connection.call(Sys.RECV, wire.Recv(), None)
    request = kernel.take(Sys.RECV)
    assert args_of(kernel.take(Sys.CANCEL)).id == request.id
    kernel.reply(first, 1)
    assert leader.result(PATIENCE_S) == 1
    assert connection.open_calls == 0


def test_interrupting_a_thread_that_waits_for_room_cancels_its_call() -> None:
    kernel = ChannelKernel(1 << 12)
    connection = kernel.connection
    try:
        with interrupted_when(lambda: connection.transport.outbox_bytes), pytest.raises(KeyboardInterrupt):
            connection.call(Sys.TOKENIZE, wire.Tokenize("x" * 20_000), None)
        other = aside(connection.call, Sys.GETPID, NoArgs(), int)
        request = kernel.take(Sys.TOKENIZE)  # its frame had been begun, and has arrived whole
        assert args_of(request).text == "x" * 20_000
        assert args_of(kernel.take(Sys.CANCEL)).id == request.id
        kernel.reply(kernel.take(Sys.GETPID), 3)
        assert other.result(PATIENCE_S) == 3
    finally:
        kernel.close()


def interrupt(connection: Connection) -> None:
    """Send SIGUSR1 to the main thread when it sleeps in this function."""
    main = threading.main_thread().ident
    assert main is not None
    assert eventually(lambda: connection._polling, every=0.005)
    signal.pthread_kill(main, signal.SIGUSR1)


def test_a_signal_handler_may_make_a_call_while_its_thread_leads(kernel: ChannelKernel, connection: Connection) -> None:
    """For example, an agent may send a last message on SIGTERM."""
    answers: list[object] = []

    def handler(*_: object) -> None:
        answers.append(connection.call(Sys.GETPID, NoArgs(), int))

    def serve() -> None:
        first = kernel.take(Sys.RECV)
        interrupt(connection)
        kernel.reply(kernel.take(Sys.GETPID), 42)
        kernel.reply(first, wire.Received(0, wire.raw("x")))

    old = signal.signal(signal.SIGUSR1, handler)
    serving = aside(serve)
    try:
        received = connection.call(Sys.RECV, wire.Recv(), wire.Received)
    finally:
        signal.signal(signal.SIGUSR1, old)
    serving.result(PATIENCE_S)
    assert answers == [42]
    assert received.sender == 0


def test_an_oserror_of_a_signal_handler_is_its_own(kernel: ChannelKernel, connection: Connection) -> None:
    """TimeoutError from SIGALRM, for example, ends the call, not the connection."""

    def handler(*_: object) -> None:
        raise TimeoutError("the handler's own")

    def serve() -> None:
        kernel.take(Sys.GETPPID)
        interrupt(connection)
        kernel.take(Sys.CANCEL)
        kernel.reply(kernel.take(Sys.GETPID), 42)

    old = signal.signal(signal.SIGUSR1, handler)
    serving = aside(serve)
    try:
        with pytest.raises(TimeoutError, match="the handler's own"):
            connection.call(Sys.GETPPID, NoArgs(), int)
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert not connection.transport.hung_up
    assert connection.call(Sys.GETPID, NoArgs(), int) == 42
    serving.result(PATIENCE_S)


@pytest.mark.deadline(15)
@pytest.mark.parametrize("raises", [False, True])
def test_a_signal_handler_that_reads_the_reply_of_the_interrupted_call_wakes_it(
    unsupported: ChannelKernel, raises: bool
) -> None:
    """The call's sleep goes on after the handler (PEP 475), which has taken the data that would have ended it."""
    kernel, connection = unsupported, unsupported.connection
    sent = threading.Event()

    def handler(*_: object) -> None:
        assert connection.call(Sys.GETPID, NoArgs(), int) == 42
        assert sent.wait(PATIENCE_S)
        connection.transport.drain_bell()  # type: ignore[attr-defined]  # as the call has, unless it was too quick
        if raises:
            raise LookupError

    def serve() -> None:
        first = kernel.take(Sys.GETPPID)
        interrupt(connection)
        second = kernel.take(Sys.GETPID)
        with kernel.one_bell():
            kernel.reply(first, 7)
            kernel.reply(second, 42)
        sent.set()
        kernel.reply(kernel.take(Sys.TOKENIZE), "next")

    old = signal.signal(signal.SIGUSR1, handler)
    serving = aside(serve)
    try:
        with pytest.raises(LookupError) if raises else contextlib.nullcontext():
            assert connection.call(Sys.GETPPID, NoArgs(), int) == 7
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert connection.call(Sys.TOKENIZE, wire.Tokenize("x"), str) == "next"
    serving.result(PATIENCE_S)


@pytest.mark.deadline(15)
def test_a_second_signal_handler_while_the_first_hands_out_replies_gets_edeadlk(
    kernel: ChannelKernel, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one leads instead of a sleeping thread, and does not sleep itself."""
    refused: list[int | None] = []
    original = connection._hand_out

    def second(*_: object) -> None:
        with pytest.raises(OSError, match="handed out") as caught:
            connection.call(Sys.TOKENIZE, wire.Tokenize("x"), str)
        refused.append(caught.value.errno)

    def first(*_: object) -> None:
        assert connection.call(Sys.GETPID, NoArgs(), int) == 42

    def hand_out(reply: wire.Reply) -> None:
        if not refused:
            signal.raise_signal(signal.SIGUSR2)
        original(reply)

    def serve() -> None:
        request = kernel.take(Sys.GETPPID)
        interrupt(connection)
        kernel.reply(kernel.take(Sys.GETPID), 42)
        kernel.take(Sys.TOKENIZE)
        kernel.take(Sys.CANCEL)
        kernel.reply(request, 7)

    monkeypatch.setattr(connection, "_hand_out", hand_out)
    old = [signal.signal(signal.SIGUSR1, first), signal.signal(signal.SIGUSR2, second)]
    serving = aside(serve)
    try:
        assert connection.call(Sys.GETPPID, NoArgs(), int) == 7
    finally:
        signal.signal(signal.SIGUSR1, old[0])
        signal.signal(signal.SIGUSR2, old[1])
    serving.result(PATIENCE_S)
    assert refused == [errno.EDEADLK]


def test_a_thread_that_gets_reply_and_lead_from_the_same_leader_does_not_sleep(unsupported: ChannelKernel) -> None:
    """Another thread leads, delivers our reply and leaves, after we have looked for it and before we have the lead."""
    kernel, connection = unsupported, unsupported.connection

    class Racing(dict[int, tuple[int, object]]):
        meanwhile: Callable[[], None] | None = None

        def setdefault(self, key: int, value: tuple[int, object]) -> tuple[int, object]:  # type: ignore[override]
            act, self.meanwhile = self.meanwhile, None
            if act is not None:
                act()
            return super().setdefault(key, value)

    def other_leads() -> None:
        other = aside(connection.call, Sys.GETPPID, NoArgs(), int)
        second = kernel.take(Sys.GETPPID)
        kernel.reply(first, 5)
        kernel.reply(second, 6)
        assert other.result(PATIENCE_S) == 6
        connection.transport.drain_bell()  # type: ignore[attr-defined]  # the other may not have had to sleep

    leader = connection._leader = Racing()
    call = connection.submit(Sys.GETPID, NoArgs())
    first = kernel.take(Sys.GETPID)
    leader.meanwhile = other_leads
    assert aside(connection.result, call, int).result(2 * PATIENCE_S) == 5


# ── cancels that another thread sends ─────────────────────────────────────────────────────────────────────


def overflow(connection: Connection) -> list[int]:
    """More cancels (of calls that never existed) than the small ring holds."""
    connection._cancels.extend(range(10_000, 10_400))
    connection._send_cancels()
    assert connection.transport.outbox_bytes
    return list(range(10_000, 10_400))


def drain(kernel: ChannelKernel) -> list[int]:
    """The ids of the calls that are cancelled, until no more cancels come."""
    ids = []
    while not kernel.quiet():
        ids += [args_of(request).id for request in kernel.taken]
        kernel.taken.clear()
        kernel.connection.pump()
    return ids


def test_a_call_abandoned_while_the_leader_pumps_is_canceled(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = ChannelKernel(1 << 12)
    connection = kernel.connection
    try:
        victim = connection.submit(Sys.GENERATE, generate(), stream=True)
        kernel.take(Sys.GENERATE)
        others = overflow(connection)
        original = AgentTransport.pump

        def pump(self: AgentTransport) -> bool:
            aside(connection.abandon, victim).result(PATIENCE_S)  # this thread is sending, and sends the cancel
            return original(self)

        monkeypatch.setattr(AgentTransport, "pump", pump)
        connection.pump()
        monkeypatch.undo()
        assert drain(kernel) == [*others, victim.id]
    finally:
        kernel.close()


def test_a_call_finalized_while_its_thread_pumps_is_canceled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is finalized after a frame was sent and before this was recorded. Pumping at that moment would repeat it."""
    kernel = ChannelKernel(1 << 12)
    connection = kernel.connection
    try:
        victim = connection.submit(Sys.GENERATE, generate(), stream=True)
        kernel.take(Sys.GENERATE)
        others = overflow(connection)
        told = [args_of(request).id for request in kernel.poll(0.0)]  # now there is room
        original = ring.Producer.put

        def put(self: ring.Producer, payload: bytes, offset: int) -> int:
            done = original(self, payload, offset)
            connection.abandon(victim)
            return done

        monkeypatch.setattr(ring.Producer, "put", put)
        connection.pump()
        monkeypatch.undo()
        assert told + drain(kernel) == [*others, victim.id]
    finally:
        kernel.close()


@pytest.mark.parametrize("fault", [TypeError, None])
def test_a_call_abandoned_while_another_fails_to_be_sent_is_canceled(
    kernel: ChannelKernel, connection: Connection, monkeypatch: pytest.MonkeyPatch, fault: type[Exception] | None
) -> None:
    victim = connection.submit(Sys.GENERATE, generate(), stream=True)
    kernel.take(Sys.GENERATE)

    def encode(_: object) -> bytes:
        monkeypatch.undo()
        aside(connection.abandon, victim).result(PATIENCE_S)
        if fault is not None:
            raise fault
        return b"x" * (wire.MAX_FRAME + 1)

    monkeypatch.setattr(wire, "encode", encode)
    with pytest.raises(OSError):  # noqa: PT011 # of two kinds
        connection.submit(Sys.GETPID, NoArgs())
    assert args_of(kernel.take(Sys.CANCEL)).id == victim.id
    assert kernel.quiet()


# ── streams ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stream_brings_its_pieces_in_order_and_its_end(kernel: ChannelKernel, connection: Connection) -> None:
    stream = Stream(connection, generate())
    request = kernel.take(Sys.GENERATE)
    kernel.piece(request, 0, "a", [1])
    kernel.piece(request, 1, "b", [2, 3])
    kernel.end(request, "c", [4])
    pieces = list(stream)
    assert [(piece.text, piece.tokens) for piece in pieces] == [("a", [1]), ("b", [2, 3]), ("c", [4])]
    assert [piece.finish_reason for piece in pieces] == [None, None, "stop"]
    assert kernel.quiet()  # nothing to cancel


def test_leaving_the_loop_cancels_at_once(kernel: ChannelKernel, connection: Connection) -> None:
    """Losing the last reference cancels, not the collector, which may run much later and would keep a slot busy."""
    gc.disable()
    try:
        stream = Stream(connection, generate())
        request = kernel.take(Sys.GENERATE)
        kernel.piece(request, 0, "a", [1])
        for _ in stream:
            break
        del stream
        assert args_of(kernel.take(Sys.CANCEL)).id == request.id
    finally:
        gc.enable()


def test_a_loop_over_an_unnamed_stream_keeps_it_alive(kernel: ChannelKernel, connection: Connection) -> None:
    def read() -> str:
        return "".join(piece.text for piece in Stream(connection, generate()))

    text = aside(read)
    request = kernel.take(Sys.GENERATE)
    for offset, letter in enumerate("abc"):
        kernel.piece(request, offset, letter, [offset])
    kernel.end(request)
    assert text.result(PATIENCE_S) == "abc"
    assert kernel.quiet()


def test_closing_a_stream_in_another_thread_ends_its_reader(kernel: ChannelKernel, connection: Connection) -> None:
    stream = Stream(connection, generate())
    request = kernel.take(Sys.GENERATE)
    reading = aside(next, stream)
    while not connection._leader:
        threading.Event().wait(0.005)
    stream.close()
    stream.close()
    assert args_of(kernel.take(Sys.CANCEL)).id == request.id
    kernel.reply(kernel_request_for_pump(connection, kernel), 1)
    with pytest.raises(OSError, match="canceled") as caught:
        reading.result(PATIENCE_S)
    assert caught.value.errno == errno.ECANCELED
    assert kernel.quiet()


def kernel_request_for_pump(connection: Connection, kernel: ChannelKernel) -> wire.Request:
    """Send a frame that wakes the leader."""
    call = connection.submit(Sys.GETPID, NoArgs())
    request = kernel.take(Sys.GETPID)
    connection._open.pop(call.id)
    return request


def test_a_stream_is_finalized_in_the_middle_of_a_send(
    kernel: ChannelKernel, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector runs finalizers in any thread at any moment, also in one that is sending."""
    stream = [Stream(connection, generate())]
    first = kernel.take(Sys.GENERATE)
    original = connection.transport.next_id

    def next_id() -> int:
        stream.clear()  # here and now
        return original()

    monkeypatch.setattr(connection.transport, "next_id", next_id)
    call = connection.submit(Sys.GETPID, NoArgs())
    monkeypatch.undo()
    assert kernel.take().sys == Sys.GETPID
    assert args_of(kernel.take(Sys.CANCEL)).id == first.id
    connection.abandon(call)
    kernel.take(Sys.CANCEL)


def test_a_stream_is_abandoned_while_its_reply_is_handed_out(kernel: ChannelKernel, connection: Connection) -> None:
    class Racing(dict[int, Pending]):
        def get(self, key: int, default: object = None) -> Pending | None:  # type: ignore[override]
            call = super().get(key)
            if call is not None:
                connection.abandon(call)
            return call

    connection._open = Racing(connection._open)
    call = connection.submit(Sys.GENERATE, generate(), stream=True)
    kernel.piece(kernel.take(Sys.GENERATE), 0, "a", [1])
    connection.pump()
    assert args_of(kernel.take(Sys.CANCEL)).id == call.id
    assert call.final is not None


def test_streams_abandoned_while_another_thread_leads(kernel: ChannelKernel, connection: Connection) -> None:
    """Their replies arrive at the same moment."""
    leader = aside(connection.call, Sys.GETPID, NoArgs(), int)
    first = kernel.take(Sys.GETPID)
    for _ in range(200):
        stream = Stream(connection, generate())
        request = kernel.take(Sys.GENERATE)
        kernel.piece(request, 0, "a", [1])
        kernel.end(request)
        stream.close()
        while not kernel.quiet():
            kernel.take(Sys.CANCEL)
    kernel.reply(first, 1)
    assert leader.result(PATIENCE_S) == 1
    assert connection.open_calls == 0


# ── a new kernel ──────────────────────────────────────────────────────────────────────────────────────────


def test_open_calls_go_to_the_new_kernel_under_their_ids(kernel: ChannelKernel, connection: Connection) -> None:
    calls = [aside(connection.call, Sys.TOKENIZE, wire.Tokenize(str(number)), str) for number in range(3)]
    before = {request.id: args_of(request).text for request in (kernel.take() for _ in calls)}
    kernel.die()
    kernel.rise()
    again = [kernel.take(Sys.TOKENIZE) for _ in calls]
    assert [request.id for request in again] == sorted(before)
    for request in again:
        assert args_of(request).text == before[request.id]
        kernel.reply(request, before[request.id])
    assert sorted(call.result(PATIENCE_S) for call in calls) == ["0", "1", "2"]
    assert kernel.quiet()


def test_a_reply_of_the_dead_kernel_counts_and_its_call_is_not_made_again(
    kernel: ChannelKernel, connection: Connection
) -> None:
    answered, open_ = connection.submit(Sys.GETPID, NoArgs()), connection.submit(Sys.GETPPID, NoArgs())
    kernel.reply(kernel.take(Sys.GETPID), 1)
    kernel.take(Sys.GETPPID)
    kernel.die()
    kernel.rise()
    connection.pump()
    request = kernel.take(Sys.GETPPID)
    assert kernel.quiet()
    assert connection.result(answered, int) == 1
    kernel.reply(request, 2)
    assert connection.result(open_, int) == 2


def test_a_call_sent_between_the_raise_and_the_notice(kernel: ChannelKernel, connection: Connection) -> None:
    kernel.die()
    kernel.rise()
    call = aside(connection.call, Sys.GETPID, NoArgs(), int)
    request = kernel.take(Sys.GETPID)
    kernel.reply(request, 1)
    assert call.result(PATIENCE_S) == 1
    assert kernel.quiet()


def test_a_call_whose_frame_was_half_sent_when_the_kernel_died() -> None:
    kernel = ChannelKernel(1 << 12)
    try:
        text = "x" * 20_000
        call = aside(kernel.connection.call, Sys.TOKENIZE, wire.Tokenize(text), int)
        while not kernel.connection._leader:
            threading.Event().wait(0.005)
        other = aside(kernel.connection.call, Sys.GETPID, NoArgs(), int)
        kernel.die()
        kernel.rise()
        for _ in range(2):
            request = kernel.take()
            kernel.reply(request, len(args_of(request).text) if request.sys == Sys.TOKENIZE else 3)
        assert call.result(PATIENCE_S) == len(text)
        assert other.result(PATIENCE_S) == 3
        assert kernel.quiet()
    finally:
        kernel.close()


def test_a_stream_goes_on_from_its_tokens(kernel: ChannelKernel, connection: Connection) -> None:
    stream = Stream(connection, generate())
    request = kernel.take(Sys.GENERATE)
    kernel.piece(request, 0, "a", [1])
    kernel.piece(request, 1, "b", [2])
    assert next(stream).text == "a"
    kernel.die()
    kernel.rise()
    assert next(stream).text == "b"
    third = aside(next, stream)
    again = kernel.take(Sys.GENERATE)
    assert (again.id, args_of(again).given) == (request.id, [1, 2])
    kernel.piece(again, 1, "b", [2])  # a token that the agent has already
    kernel.piece(again, 2, "c", [3])
    assert third.result(PATIENCE_S).text == "c"
    kernel.end(again)
    assert [piece.text for piece in stream] == [""]


def test_a_kernel_that_dies_again_and_again(kernel: ChannelKernel, connection: Connection) -> None:
    calls = [aside(connection.call, Sys.TOKENIZE, wire.Tokenize(str(number)), str) for number in range(4)]
    chance = random.Random(5)
    answered = 0
    while answered < 4:
        request = kernel.take(Sys.TOKENIZE)
        if chance.random() < 0.5:
            kernel.reply(request, args_of(request).text)
            answered += 1
        kernel.die()
        kernel.rise()
    assert sorted(call.result(PATIENCE_S) for call in calls) == ["0", "1", "2", "3"]


# ── the end ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_reply_and_the_end_of_the_system_at_once(unsupported: ChannelKernel) -> None:
    """Both cause one event on the bell, and no thread wakes by time: both are seen, whichever thread leads."""
    connection = unsupported.connection
    answered, other = (
        aside(connection.call, Sys.GETPID, NoArgs(), int),
        aside(connection.call, Sys.WAIT, wire.Wait(), int),
    )
    requests = {request.sys: request for request in (unsupported.take(), unsupported.take())}
    unsupported.reply(requests[Sys.GETPID], 5)
    unsupported.hang_up()
    assert answered.result(PATIENCE_S) == 5
    with pytest.raises(OSError, match="aiosd is gone"):
        other.result(PATIENCE_S)
    with pytest.raises(OSError, match="aiosd is gone"):
        connection.call(Sys.GETPID, NoArgs(), int)


def test_when_aiosd_has_ended_every_call_fails_with_that_error(kernel: ChannelKernel, connection: Connection) -> None:
    calls = [aside(connection.call, Sys.RECV, wire.Recv(), None) for _ in range(3)]
    for _ in calls:
        kernel.take(Sys.RECV)
    kernel.hang_up()
    for call in calls:
        with pytest.raises(OSError, match="aiosd is gone") as caught:
            call.result(PATIENCE_S)
        assert caught.value.errno == errno.ENOTCONN
    with pytest.raises(OSError, match="aiosd is gone"):
        connection.call(Sys.GETPID, NoArgs(), int)


def test_closing_while_others_wait_ends_their_calls_at_once(kernel: ChannelKernel, connection: Connection) -> None:
    calls = [aside(connection.call, Sys.RECV, wire.Recv(), None) for _ in range(3)]
    for _ in calls:
        kernel.take(Sys.RECV)
    until_followed(connection, 2)
    connection.close()
    for call in calls:
        with pytest.raises(OSError, match="closed"):
            call.result(0.9)  # sooner than a wake-up by time
    connection.close()


def test_closing_while_another_abandons_a_call_raises_nothing_there(
    kernel: ChannelKernel, connection: Connection
) -> None:
    class Racing(deque[int]):
        def append(self, number: int) -> None:
            super().append(number)
            aside(connection.close).result(PATIENCE_S)  # after abandon has found it open

    call = connection.submit(Sys.GETPID, NoArgs())
    connection._cancels = Racing()
    connection.abandon(call)
    connection.nudge()


def test_invalid_frames_of_a_kernel_end_the_connection(kernel: ChannelKernel, connection: Connection) -> None:
    call = aside(connection.call, Sys.GETPID, NoArgs(), int)
    kernel.take(Sys.GETPID)
    kernel.send(b"\xc1nonsense")
    with pytest.raises(OSError, match="nonsense"):
        call.result(PATIENCE_S)


# ── fork ──────────────────────────────────────────────────────────────────────────────────────────────────


def in_child(act: object) -> int:
    """Fork and run `act` in the child; returns its exit code."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)
            code = act()  # type: ignore[operator]
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_forked_child_has_no_connection_and_does_not_disturb(kernel: ChannelKernel, connection: Connection) -> None:
    """Another thread leads at the moment of the fork."""
    call = aside(connection.call, Sys.GETPID, NoArgs(), int)
    request = kernel.take(Sys.GETPID)
    stream = Stream(connection, generate())
    kernel.take(Sys.GENERATE)
    bell = connection.fileno()

    def act() -> int:
        nonlocal stream
        try:
            os.fstat(bell)
            return 1  # with it the kernel would not see the agent's end
        except OSError:
            pass
        del stream  # no CANCEL
        try:
            aios.proc.getpid()
        except OSError as err:
            return 0 if err.errno == errno.ENOTCONN and "forked" in str(err) else 2
        return 3

    with as_process_connection(connection):
        assert in_child(act) == 0
    assert kernel.quiet()
    kernel.reply(request, 1)
    assert call.result(PATIENCE_S) == 1
    stream.close()
    kernel.take(Sys.CANCEL)


def test_a_forked_child_does_not_wait_for_a_thread_that_was_sending(
    kernel: ChannelKernel, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That thread does not exist in the child, and never releases its locks."""
    sending, forked = threading.Event(), threading.Event()
    original = AgentTransport.send

    def send(self: AgentTransport, payload: bytes, fds: object = ()) -> None:
        sending.set()
        assert forked.wait(PATIENCE_S)
        original(self, payload)

    def act() -> int:
        try:
            aios.proc.getpid()
        except OSError as err:
            return 7 if err.errno == errno.ENOTCONN else 1
        return 2

    monkeypatch.setattr(AgentTransport, "send", send)
    with as_process_connection(connection):
        call = aside(aios.proc.getpid)
        assert sending.wait(PATIENCE_S)
        child = aside(in_child, lambda: aside(act).result(PATIENCE_S / 2))
        try:
            assert child.result(PATIENCE_S) == 7
        finally:
            forked.set()
        kernel.reply(kernel.take(Sys.GETPID), 5)
        assert call.result(PATIENCE_S) == 5


def test_multiprocessing_works_in_an_agent(kernel: ChannelKernel, connection: Connection) -> None:
    with as_process_connection(connection):
        process = multiprocessing.get_context("fork").Process(target=os.getpid)
        process.start()
        process.join(PATIENCE_S)
        assert process.exitcode == 0
        call = aside(aios.proc.getpid)
        kernel.reply(kernel.take(Sys.GETPID), 12)
        assert call.result(PATIENCE_S) == 12


# ── the process's connection ──────────────────────────────────────────────────────────────────────────────


def test_a_channel_is_only_its_owners(monkeypatch: pytest.MonkeyPatch) -> None:
    memfd, bell = os.memfd_create("a"), os.memfd_create("b")
    try:
        monkeypatch.setenv(wire.ENV_CHANNEL, f"{memfd}:{bell}:{os.getpid()}")
        assert agent.own_channel() == (memfd, bell)
        monkeypatch.setenv(wire.ENV_CHANNEL, f"{memfd}:{bell}:{os.getppid()}")
        assert agent.own_channel() is None
        for nonsense in ("", "1:2", "a:b:c", f"{1 << 20}:{1 << 20}:{os.getpid()}"):
            monkeypatch.setenv(wire.ENV_CHANNEL, nonsense)
            assert agent.own_channel() is None
    finally:
        os.close(memfd)
        os.close(bell)


def test_a_call_of_a_missing_service_reports_that(kernel: ChannelKernel, connection: Connection) -> None:
    with as_process_connection(connection):
        call = aside(aios.tool.list)
        kernel.fail(kernel.take(Sys.TOOL_LIST), errno.ENOSYS, "this system has no toolbox")
        with pytest.raises(OSError, match="no toolbox"):
            call.result(PATIENCE_S)


def test_arguments_are_checked_before_anything_is_sent(kernel: ChannelKernel, connection: Connection) -> None:
    with as_process_connection(connection):
        with pytest.raises(TypeError, match="message cannot hold"):
            aios.msg.send(1, object())
        with pytest.raises(TypeError):
            aios.llm.chat([], no_such_option=1)
        for call, said in (
            (lambda: aios.llm.chat("hello"), "messages: a list of dicts, not 'hello'"),
            (lambda: aios.llm.chat(["hello"]), r"messages\[0\]: a dict, not 'hello'"),
            (lambda: aios.llm.chat([], tools="calc"), "tools: a list of dicts"),
            (lambda: aios.llm.chat([], stop=5), "stop: a list of texts, not 5"),
            (lambda: aios.llm.context("hello"), "messages: a list"),
            (lambda: aios.llm.tokenize("\ud800"), "an argument cannot be sent: .* surrogates not allowed"),
            (lambda: aios.llm.chat([{"role": "user", "content": object()}]), "cannot be sent: .* type object"),
            (lambda: aios.proc.kill(1 << 70), "an argument cannot be sent: "),
        ):
            with pytest.raises(OSError, match=said) as caught:
                call()
            assert caught.value.errno == errno.EINVAL
    assert kernel.quiet()
