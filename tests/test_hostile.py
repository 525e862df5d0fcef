"""Hostile bytes: whatever an agent or a client writes, the kernel lives on and others are served.

The pure parts are tested with many inputs, and some offences are tried on a real system. benchmarks/fuzz.py tries many
more; a small part of it is run here.
"""

from __future__ import annotations

import array
import contextlib
import errno
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import MsgspecError, Raw, msgpack

from aiosd.ipc import link
from aiosd.kernel import control
from aiosd.kernel.calls import OPEN_BYTES, OPEN_BYTES_ALL, CallTable
from aiosd.kernel.cores import Core
from aiosd.kernel.events import TURN_S, Events, Turn
from aiosd.kernel.generation import OpenGeneration
from aiosd.kernel.journal import COMPACT_BYTES, REMEMBER_BYTES, Journal
from aiosd.kernel.peer import (
    ASSEMBLY_MAX,
    FRAMES_PER_TURN,
    UNKNOWN,
    Assembly,
    Call,
    Peer,
    no_request,
    read_args,
)
from aiosd.kernel.peers import Peers
from aiosd.kernel.service import ServiceCall, ServiceState
from aiosd.kernel.turns import AgentTurns
from benchmarks import fuzz
from libaios import msg, ring, wire
from libaios.channel import Channel, ProtocolError, Side, make_channel
from libaios.client import Client
from libaios.home import Home
from libaios.stream import FrameSocket
from libaios.wire import Sys
from tests.conftest import System, eventually

SLICE = 3000  # frames of each kind
HELLO = msgpack.encode([wire.VERSION, 0, ""])


# ── reading requests ──────────────────────────────────────────────────────────────────────────────────────


def read(frame: bytes) -> None:
    """Read a request and its arguments as the kernel does."""
    try:
        request = wire.decode_request(frame)
    except (MsgspecError, RecursionError) as err:
        raise no_request(err) from None
    row = wire.TABLE.get(request.sys, UNKNOWN)
    if row is not UNKNOWN:
        read_args(row, request.args)


def understood(frame: bytes) -> bool:
    """Read a request as the kernel does; False if it would end its sender or get an errno."""
    said: OSError | ProtocolError | None = None
    try:
        read(frame)
    except (OSError, ProtocolError) as err:
        said = err
    assert said is None or str(said)
    assert not isinstance(said, OSError) or said.errno == errno.EINVAL
    return said is None


@pytest.mark.parametrize("kind", ["mutated", "structured", "reused"])
def test_garbage_is_refused_with_a_sentence(kind: str) -> None:
    maker = fuzz.Maker(f"test {kind}")
    found = [understood(getattr(maker, kind)()) for _ in range(SLICE)]
    assert True in found
    assert kind == "reused" or False in found


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    understood(data)
    understood(b"\x93\x01" + data)


NUMBERS = st.integers(-(1 << 63), (1 << 64) - 1) | st.floats()
ANYTHING = st.recursive(
    st.none() | NUMBERS | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@given(st.sampled_from(sorted(wire.TABLE)), ANYTHING)
@settings(max_examples=300)
def test_any_arguments(number: int, args: object) -> None:
    understood(msgpack.encode([1, number, args]))


@pytest.mark.parametrize("deep", [b"\x91", b"\x81\x01", b"\x81\xa1a", b"\x92\x01"])
def test_nesting_without_end(deep: bytes) -> None:
    for sys_ in (Sys.SEND, Sys.GENERATE, Sys.GETPID, 9):
        for depth in (300, 450, 700, 900, 990, 5000, 100_000):
            understood(msgpack.encode([1, sys_]).replace(b"\x92", b"\x93", 1) + deep * depth + b"\xc0")


def test_what_the_kernel_takes_others_can_read() -> None:
    """A core gets a call, and an agent a message, nested deeper by some levels."""
    deepest = b""
    for depth in range(100, 2000):
        frame = msgpack.encode([1, Sys.GENERATE]).replace(b"\x92", b"\x93", 1)
        frame += b"\x91\x91\x81\xa1a" + b"\x91" * depth + b"\xc0"
        try:
            read(frame)
        except (OSError, ProtocolError):
            break
        deepest = frame
    assert deepest
    msgpack.decode(b"\x91" * 300 + deepest)


@pytest.mark.parametrize("data", [b"\xa2\xff\xfe", b"\x91" * 5000 + b"\xc0", b"\xc1", b"\x82\x90\x01\x91\xc0"])
def test_a_message_that_is_none_is_an_error_of_its_receiver(data: bytes) -> None:
    with pytest.raises(OSError, match="agent 5 sent what cannot be read") as caught:
        msg._open(wire.Received(5, Raw(data)))
    assert caught.value.errno == errno.EBADMSG


# ── rings ─────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def channel_of_kernel(size: int = ring.MIN_RING) -> Iterator[Channel]:
    memfd, bell, agent_bell = make_channel(size, size)
    channel = Channel(memfd, bell, Side.KERNEL)
    try:
        yield channel
    finally:
        channel.close()
        os.close(agent_bell)


HEADS = st.builds(
    lambda length, flags, epoch: struct.pack("=II", length | flags, epoch),
    st.sampled_from([0, 1, 8, 100, 1024, 2040, 4088, 1 << 20, (1 << 30) - 1]),
    st.sampled_from([0, 1 << 30, 1 << 31, 3 << 30]),
    st.sampled_from([0, 1, 2, 1 << 31]),
)


@given(st.lists(HEADS | st.binary(min_size=8, max_size=300), max_size=12), st.lists(st.integers(0, 6000), max_size=6))
@settings(max_examples=200)
def test_any_bytes_in_a_ring(pieces: list[bytes], steps: list[int]) -> None:
    content = b"".join(pieces)[: ring.MIN_RING]
    with channel_of_kernel() as channel:
        items, memory = channel._segment.items, channel._segment.memory
        memory[ring.HEADER : ring.HEADER + len(content)] = content
        written = 0
        with contextlib.suppress(ProtocolError):
            for step in steps:
                written += step & ~7
                items[192 // 8] = written
                for frame in channel.receive():
                    assert len(frame) <= wire.MAX_FRAME
                assert channel.assembling <= wire.MAX_FRAME


@given(st.integers(0, (1 << 64) - 1), st.sampled_from([192 // 8, 256 // 8, 448 // 8, 512 // 8]))
def test_any_counter(value: int, item: int) -> None:
    with channel_of_kernel() as channel, contextlib.suppress(ProtocolError):
        channel._segment.items[item] = value
        channel.receive()
        channel.send(b"reply" * 100)


def test_a_frame_without_an_end() -> None:
    """Never more than MAX_FRAME of it is kept."""
    size = 1 << 16
    piece = size // 2 - 8
    with channel_of_kernel(size) as channel:
        items, memory = channel._segment.items, channel._segment.memory
        most = 0

        def write_it() -> None:
            nonlocal most
            for number in range(2 * wire.MAX_FRAME // piece):
                most = max(most, channel.assembling)
                at = ring.HEADER + (number * (piece + 8) & (size - 1))
                memory[at : at + 8] = struct.pack("=II", piece | (0 if number else 1 << 31), 1)
                items[192 // 8] = (number + 1) * (piece + 8)
                channel.receive()

        with pytest.raises(ProtocolError, match="a frame of more than"):
            write_it()
        assert wire.MAX_FRAME - size < most <= wire.MAX_FRAME


def crumbs(channel: Channel, head: int) -> int:
    """Fill the ring with fragments without bytes (crumbs), which complete no frame; the last one is a whole frame."""
    items, memory = channel._segment.items, channel._segment.memory
    size = items[2]
    for at in range(ring.HEADER, ring.HEADER + size - 16, 8):
        memory[at : at + 8] = struct.pack("=II", head, 1)
    memory[ring.HEADER + size - 16 : ring.HEADER + size] = (
        struct.pack("=II", ring.FIRST | ring.LAST | 8, 1) + b"the last"
    )
    items[192 // 8] = size
    return size


@pytest.mark.parametrize("size", [ring.MIN_RING, 1 << 16])
def test_fragments_are_work_and_bounded_in_a_turn(size: int) -> None:
    """Eight thousand crumbs once took as long as twelve turns. Now a turn takes few, and the rest wait for the next."""
    moves: list[Turn] = []
    handled: list[bytes] = []
    turns = turns_with(lambda: 0.0, [], lambda peer, payload: handled.append(payload))
    turns._events.move = lambda source, turn: moves.append(turn)  # type: ignore[method-assign]
    with channel_of_kernel(size) as channel:
        crumbs(channel, ring.LAST)
        source = SimpleNamespace(turn=Turn.ASLEEP, fd=9)
        peer: Any = SimpleNamespace(channel=channel, paused=False, turn=FRAMES_PER_TURN, gone=False, assembling=0)
        peer.source = source
        while not handled:
            before = channel._consumer.read
            turns._take_turn(peer)
            assert channel._consumer.read - before <= 8 * ring.FRAGMENTS + 16
        assert handled == [b"the last"]
        assert len(moves) >= size // 8 // ring.FRAGMENTS
        assert set(moves[:-1]) == {Turn.HUNGRY}


def test_frames_of_an_honest_peer_are_taken_at_once() -> None:
    """With frames of any size the bound on fragments is never reached."""
    memfd, bell, agent_bell = make_channel(ring.MIN_RING, ring.MIN_RING)
    agent, kernel = Channel(os.dup(memfd), agent_bell, Side.AGENT), Channel(memfd, bell, Side.KERNEL)
    try:
        sent = [bytes([number]) * (37 * number * number) for number in range(60)]
        for frame in sent:
            agent.send(frame)
        got: list[bytes] = []
        while len(got) < len(sent):
            agent.pump()
            kernel.take(got)
            assert not kernel.fragmented
            assert not kernel.filled()
        assert got == sent
    finally:
        agent.close()
        kernel.close()


# ── bounds for all together ───────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 60)), max_size=40))
def test_unfinished_frames_of_all_have_a_bound(steps: list[tuple[int, int]]) -> None:
    assembly, peers = Assembly(limit=100), [Peer(number, None) for number in range(6)]
    for number, size in steps:
        victim = assembly.note(peers[number], size)
        while victim is not None:
            assert victim.assembling > 0
            victim = assembly.note(victim, 0)
        assert assembly.total == sum(peer.assembling for peer in peers) <= 100


def test_of_unfinished_frames_the_oldest_ends_its_sender() -> None:
    assembly, (slow, quick, third) = Assembly(limit=100), [Peer(number, None) for number in range(3)]
    assert assembly.note(slow, 40) is None
    assert assembly.note(quick, 40) is None
    assert assembly.note(quick, 10) is None  # the next frame
    assert assembly.note(third, 49) is None
    assert assembly.note(slow, 42) is slow


def opened(calls: CallTable, peer: Peer, number: int, size: int) -> int:
    """Open a call as the dispatcher does; the errno with which it is refused, or 0."""
    call = calls.open(peer, wire.Request(number, Sys.TOKENIZE), size)
    try:
        calls.check_room(call)
    except OSError as err:
        calls.close(call)
        return err.errno or -1
    return 0


def room() -> CallTable:
    nothing: Any = None
    return CallTable(Peers(), nothing, nothing)


def test_what_one_agents_open_calls_hold_has_a_bound() -> None:
    calls, peer, other = room(), Peer(1, None), Peer(2, None)
    size = 8 << 20
    refused = [opened(calls, peer, number, size) for number in range(1024)]
    assert refused.count(0) == OPEN_BYTES // size
    assert set(refused) == {0, errno.EAGAIN}
    assert peer.open_bytes == calls.open_bytes == OPEN_BYTES
    assert opened(calls, other, 1, size) == 0, "one that has nothing open"
    calls.close(peer.calls[0])
    assert opened(calls, peer, 2000, size) == 0


def test_what_all_open_calls_hold_has_a_bound() -> None:
    calls, size = room(), 8 << 20
    refused = [opened(calls, Peer(pid, None), number, size) for pid in range(200) for number in range(8)]
    assert refused.count(0) == OPEN_BYTES_ALL // size
    assert calls.open_bytes == OPEN_BYTES_ALL


def test_a_large_call_by_itself_finds_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiosd.kernel.calls.OPEN_BYTES", 100)
    calls, peer = room(), Peer(1, None)
    assert opened(calls, peer, 1, 1000) == 0
    assert opened(calls, peer, 2, 1) == errno.EAGAIN
    calls.close(peer.calls[1])
    assert (peer.open_bytes, calls.open_bytes) == (0, 0)


def journal(alive: set[int]) -> Iterator[Journal]:
    fds = os.memfd_create("a"), os.memfd_create("b")
    try:
        yield Journal(fds, lambda pid: pid in alive)
    finally:
        for fd in fds:
            os.close(fd)


def test_messages_to_agents_that_die_do_not_fill_the_journal() -> None:
    alive: set[int] = set()
    for made in journal(alive):
        obj = wire.raw(bytes(1 << 20))
        for number in range(40):
            alive.add(number)
            seq = made.sent((1, number), number, 1, obj)
            alive.discard(number)
            made.forget(number, [seq])
        assert sum(os.fstat(fd).st_size for fd in made._fds) < 4 * COMPACT_BYTES


def test_the_kept_delivered_messages_have_a_bound() -> None:
    for made in journal({1}):
        obj = wire.raw(bytes(1 << 20))
        for number in range(40):
            made.taken((1, 100 + number), made.sent((1, number), 1, 1, obj))
        assert sum(len(memoryview(message.obj)) for message, _ in made._recent) <= REMEMBER_BYTES
        assert sum(os.fstat(fd).st_size for fd in made._fds) < 6 * REMEMBER_BYTES


# ── sockets ───────────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.binary(max_size=60), max_size=8))
def test_any_bytes_on_a_socket(chunks: list[bytes]) -> None:
    ours, theirs = socket.socketpair()
    frames = FrameSocket(ours, max_frame=100)
    try:
        with contextlib.suppress(ProtocolError, EOFError):
            for chunk in chunks:
                theirs.sendall(chunk)
                for payload, _ in frames.receive(3):
                    assert len(payload) <= 100
    finally:
        frames.close()
        theirs.close()


def test_descriptors_without_end_leave_none_behind() -> None:
    """When the process has run out of descriptors, those of frames that are already complete are closed, too."""
    ours, theirs = socket.socketpair()
    frames = FrameSocket(ours)
    before = len(os.listdir("/proc/self/fd"))
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * 8))]
        for _ in range(10):
            theirs.sendmsg([struct.pack("<I", 1) + b"x"], rights)
        resource.setrlimit(resource.RLIMIT_NOFILE, (before + 30, hard))
        with pytest.raises(OSError, match="no room"):
            frames.receive()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        frames.close()
        theirs.close()
    assert len(os.listdir("/proc/self/fd")) <= before


# ── cores ─────────────────────────────────────────────────────────────────────────────────────────────────


class Heard:
    """Records which of its methods were called, and with which call."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda call=None, *_: self.names.append(f"{name} {call.row.name if isinstance(call, Call) else ''}")


def core_of(heard: Any) -> Core:
    ready = ServiceState.READY
    return Core(
        "llm:nano", "llm", "llm", heard, heard, state=ready, model="nano", path="", default=True, listener=heard
    )


def call_of(number: int, sys: int, generation: OpenGeneration | None = None) -> Call:
    return Call(Peer(7, None), number, wire.TABLE[sys], generation=generation)


def test_what_a_core_sends_of_an_id_that_is_in_use_again_is_for_calls_of_its_kind() -> None:
    """The agent has cancelled a call and used its id for another one, and the core has not yet received this."""
    heard = Heard()
    core = core_of(heard)
    step = link.Step([link.Delta((7, 1), 0, [1], "x")], [link.Started((7, 1), 5, 0)], [(7, 1)])
    finished = link.GenerationDone((7, 1), 0, [], "", "stop", wire.Usage())
    answered = link.Answered((7, 1), b"\xc0")

    def sent(call: Call, *messages: Any) -> list[str]:
        heard.names.clear()
        core.calls[7, 1] = ServiceCall(call, link.CancelCall((7, 1)))  # the submitted message does not matter here
        for message in messages:
            core.on_message(message)
        return list(heard.names)

    assert sent(call_of(1, Sys.TOKENIZE), step, finished, answered) == ["finish tokenize"]
    generate = call_of(1, Sys.GENERATE, OpenGeneration(wire.Generate(), "nano", wire.Progress()))
    assert sent(generate, answered, finished) == ["on_finished generate"]
    assert (7, 1) not in core.calls
    core.on_message(step)


def failing(failed: list[int]) -> Any:
    """Replaces all that a core calls; records the calls that fail."""
    return SimpleNamespace(
        fail=lambda call, code, why: failed.append(call.id),
        on_parked=lambda peer: None,
        on_death=lambda call, reason: None,
        on_failed=lambda call, message: failed.append(call.id),
        call_budget=lambda call: (0, "", 0),
    )


def test_a_call_that_costs_core_after_core_is_given_up() -> None:
    """A generation is given up if it was running at two deaths; a call that may not have begun, after some more."""
    failed: list[int] = []
    core = core_of(failing(failed))
    running = call_of(1, Sys.GENERATE, OpenGeneration(wire.Generate(), "nano", wire.Progress(), started=True))
    waiting = call_of(2, Sys.GENERATE, OpenGeneration(wire.Generate(), "nano", wire.Progress()))
    embed = call_of(3, Sys.EMBED)
    for call in (running, waiting, embed):
        core.calls[call.key] = ServiceCall(call, link.CancelCall(call.key))
    gone = []
    for _ in range(6):
        assert running.generation is not None
        running.generation.started = True
        for opened in core.calls.values():
            opened.given = True
        core.died("SIGSEGV")
        gone.append(list(failed))
        core.died("cannot be loaded")  # it had got no call
    assert gone == [[], [1], [1], [1, 3], [1, 3], [1, 3]]
    assert list(core.calls) == [waiting.key]


def test_the_call_that_a_core_works_on_alone_is_blamed_alone() -> None:
    """Its template, schema or text ends the core before the call has a slot; other calls go on."""
    failed: list[int] = []
    core = core_of(failing(failed))
    neighbour = call_of(1, Sys.GENERATE, OpenGeneration(wire.Generate(), "nano", wire.Progress()))
    guilty = call_of(2, Sys.GENERATE, OpenGeneration(wire.Generate(), "nano", wire.Progress()))
    for call in (neighbour, guilty):
        core.calls[call.key] = ServiceCall(call, link.CancelCall(call.key))
    for _ in range(4):
        assert neighbour.generation is not None
        neighbour.generation.started = True
        core.on_message(link.Working(guilty.key))
        core.died("SIGSEGV")
    assert failed == [guilty.id]
    core.on_message(link.Working(neighbour.key))
    core.on_message(link.Working(None))
    neighbour.generation.started = True
    core.died("SIGSEGV")
    assert core.calls[neighbour.key].deaths == 1


# ── streams that stand still ──────────────────────────────────────────────────────────────────────────────


def turns_with(now: Any, resumed: list[Any], answer: Any = None) -> AgentTurns:
    timers: Any = SimpleNamespace(clock=now)
    events: Any = SimpleNamespace(move=lambda source, turn: None)
    dispatcher: Any = SimpleNamespace(answer=answer, count=lambda peer, requests: None)
    return AgentTurns(CallTable(Peers(), events, timers), events, timers, dispatcher, resumed.append)


def test_a_paused_stream_goes_on_though_another_reply_emptied_the_outbox() -> None:
    resumed: list[Any] = []
    channel = SimpleNamespace(
        outbox_bytes=0, pump=lambda: True, take=lambda into, limit: 0, hung_up=False, fragmented=False
    )
    source = SimpleNamespace(turn=Turn.ASLEEP, fd=9)
    peer: Any = SimpleNamespace(channel=channel, paused=True, turn=8, gone=False, assembling=0, source=source)
    turns_with(lambda: 0.0, resumed)._take_turn(peer)
    assert resumed == [peer]


# ── turns ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_agent_with_expensive_calls_gets_short_turns() -> None:
    """And long ones again when it no longer does so. The time of a turn is bounded, whatever the calls are."""
    now = 0.0

    def answer(peer: Any, payload: bytes) -> None:
        nonlocal now
        now += cost

    turns = turns_with(lambda: now, [], answer)
    channel = SimpleNamespace(outbox_bytes=0)
    peer: Any = SimpleNamespace(turn=FRAMES_PER_TURN, gone=False, channel=channel)
    cost = 1e-3
    for _ in range(10):
        turns._handle_many(peer, [b""] * peer.turn)
    before = now
    turns._handle_many(peer, [b""] * peer.turn)
    assert now - before <= 2 * TURN_S
    cost = 1e-5
    for _ in range(10):
        turns._handle_many(peer, [b""] * peer.turn)
    assert peer.turn == FRAMES_PER_TURN


def test_all_that_send_much_have_one_turn_together() -> None:
    """Each has its turns, and an agent that had nothing left goes first every time."""
    now, served = 0.0, []
    timers: Any = SimpleNamespace(clock=lambda: now, until_next=lambda: 0.0)
    events = Events(timers)
    pipes = [os.pipe() for _ in range(6)]

    def source(number: int, cost: float) -> Any:
        def serve() -> None:
            nonlocal now
            now += cost
            served.append(number)
            if number < 10:
                events.move(made, Turn.HUNGRY)  # it has further frames

        made = events.watch(pipes[number % 10 if number < 10 else number - 6][0], lambda mask: None, serve=serve)
        return made

    try:
        for number in range(4):
            events.move(source(number, TURN_S * 0.7), Turn.HUNGRY)
        quiet = [source(number, 0.0) for number in (10, 11)]
        for _ in range(6):
            for one in quiet:
                events.move(one, Turn.FOUND)
            events.round()
        assert served == [10, 11, 0, 1, 10, 11, 2, 3] * 3
    finally:
        events._epoll.close()
        for pipe in pipes:
            for fd in pipe:
                os.close(fd)


# ── the real system ───────────────────────────────────────────────────────────────────────────────────────

OFFENDER = """
import os, struct, sys, time
from msgspec import Raw, msgpack
from libaios import wire
from libaios.agent import own_channel
from libaios.channel import Channel, Side
channel = Channel(*own_channel(), Side.AGENT)
items, memory = channel._segment.items, channel._segment.memory
size = items[2]
def request(number, call, *args):
    return msgpack.encode([number, call, list(args)])
def replies(count):
    found = {}
    while len(found) < count:
        channel.pump()
        for frame in channel.receive():
            reply = wire.decode_reply(frame)
            found[reply.id] = reply
        if not channel.more and len(found) < count:
            channel.wait(1.0)
        if channel.hung_up:
            sys.exit("the kernel hung up")
    return found
def errors(count):
    return {number: (reply.errno, msgpack.decode(reply.body)) for number, reply in replies(count).items()}
"""


@pytest.fixture
def system(aiosd: System) -> Iterator[System]:
    """The common system, whose kernel and core must not die during the test."""

    def lives() -> tuple[int, list[int]]:
        status = aiosd.status()
        return status["kernel"]["epoch"], [model["deaths"] for model in status["models"]]

    before = lives()
    yield aiosd
    assert lives() == before


@pytest.fixture
def client(system: System) -> Iterator[Client]:
    with Client(Home(system.home)) as made:
        yield made


def start(client: Client, folder: Path, code: str, *args: str) -> int:
    path = folder / f"offender{len(os.listdir(folder))}.py"
    path.write_text(OFFENDER + code)
    spec = wire.Spawn("file", str(path), list(args), dict(os.environ), str(folder), name="offender", detached=True)
    return client.call(Sys.SPAWN, spec, wire.Spawned, timeout=30).pid


def end(client: Client, pid: int) -> tuple[int, str]:
    """The exit status, and the reason that aios-inspect shows."""
    status = client.call(Sys.WAIT, wire.Wait(pid), wire.Waited, timeout=60).status
    return status, client.call(Sys.INSPECT, wire.PidArgs(pid), dict[str, Any], timeout=30)["reason"]


def output(client: Client, pid: int) -> str:
    log = client.call(Sys.INSPECT, wire.PidArgs(pid), dict[str, Any], timeout=30)["log"]
    return Path(log).read_text()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("channel.send(b'')", "no request"),
        ("channel.send(b'\\xc1')", "no request"),
        ("channel.send(b'\\x93\\x01\\x01' + b'\\x91' * 60000)", "nested too deeply"),
        ("memory[4096:4104] = struct.pack('=II', (1 << 30) - 1 | 3 << 30, 1); items[24] = 64", "a fragment of 107374"),
        ("memory[4096:4104] = struct.pack('=II', 8 | 1 << 31, 1); items[24] = 64", "does not end its frame"),
        ("items[24] = 1 << 63", "the writer's counter claims"),
        ("items[24] = 4", "the writer's counter claims"),
        # Its reply cannot be sent, and the sender of the other requests has ended.
        ("items[64] = 1 << 40; [channel.send(request(n, 1)) for n in range(60)]", "the reader's counter claims"),
        ("channel.send(bytes(17 << 20))\nwhile not channel.pump(): channel.wait(1.0)", "a frame of more than"),
    ],
)
def test_an_agent_that_breaks_the_protocol_is_ended(client: Client, tmp_path: Path, code: str, reason: str) -> None:
    pid = start(client, tmp_path, f"{code}\nos.write(channel.fileno(), b'!')\ntime.sleep(60)")
    status, why = end(client, pid)
    assert status == -9
    assert why.startswith("EPROTO: ")
    assert reason in why


def test_a_bell_shut_down_by_halves_harms_no_other_agent(client: Client, tmp_path: Path) -> None:
    """Writing to it fails, which poll does not report."""
    before = client.call(Sys.STATUS, wire.Status(), dict)["kernel"]["epoch"]
    code = """
import socket
socket.socket(fileno=os.dup(channel.fileno())).shutdown(socket.SHUT_RD)
for number in range(1, 50):
    channel.send(request(number, wire.Sys.GETPID))
    os.write(channel.fileno(), b"!")
    channel.receive()  # announces sleep, so that the reply is rung for
"""
    pid = start(client, tmp_path, code)
    assert end(client, pid)[0] == 0
    assert client.call(Sys.STATUS, wire.Status(), dict)["kernel"]["epoch"] == before


def test_large_calls_that_stay_open_do_not_fill_the_kernel(fresh_aiosd: Any, tmp_path: Path) -> None:
    """The core is stopped, and an agent sends it twenty texts of 7 MB: most are refused."""
    system = fresh_aiosd("--threads", "1")
    (kernel, core) = (
        psutil.Process(next(entry["ospid"] for entry in system.ps() if entry["name"] == name))
        for name in ("kernel", "llm")
    )
    code = """
from libaios.wire import Sys, Tokenize
args = wire.raw(Tokenize("x" * 7_000_000))
for number in range(1, 21):
    channel.send(wire.encode(wire.Request(number, Sys.TOKENIZE, args)))
    while channel.outbox_bytes:
        channel.pump()
        channel.wait(0.1)
print([reply.errno for reply in replies(10).values()])
"""
    core.suspend()
    try:
        before = kernel.memory_info().rss
        with Client(Home(system.home)) as client:
            pid = start(client, tmp_path, code)
            assert end(client, pid) == (0, "")
            refused = json.loads(output(client, pid))
            assert refused == [errno.EAGAIN] * len(refused)
            assert len(refused) >= 10
        assert kernel.memory_info().rss - before < 128 << 20
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):  # it may have been killed as hung
            core.kill()


def test_a_request_and_the_end_of_its_sender_at_once(system: System, client: Client, tmp_path: Path) -> None:
    """Linux reports both with one event, once. The process lives on; its call is cancelled."""
    code = """
import signal
from libaios.wire import Generate, Sampling, Sys
args = Generate(prompt="Once", sampling=Sampling(max_tokens=1900, ignore_eos=True))
while not os.path.exists(sys.argv[1]):
    pass
channel.send(wire.encode(wire.Request(1, Sys.GENERATE, wire.raw(args))))
channel.shutdown()
channel.close()
open(sys.argv[2], "w").close()
while True:
    signal.pause()
"""
    go, gone = tmp_path / "go", tmp_path / "gone"
    pid = start(client, tmp_path, code, str(go), str(gone))
    kernel = next(entry["ospid"] for entry in system.ps() if entry["name"] == "kernel")
    os.kill(kernel, signal.SIGSTOP)
    try:
        go.touch()
        assert eventually(gone.exists)
    finally:
        os.kill(kernel, signal.SIGCONT)

    def shown() -> dict[str, Any]:
        return client.call(Sys.INSPECT, wire.PidArgs(pid), dict[str, Any], timeout=30)

    assert eventually(lambda: shown()["calls"] == 1)
    assert eventually(lambda: not shown()["connected"])
    assert shown()["open_calls"] == []
    assert shown()["completion_tokens"] < 1900
    client.call(Sys.KILL, wire.Kill(pid, 9), None, timeout=30)
    assert end(client, pid)[0] == -9


def test_a_spawn_that_is_cancelled_and_sent_again_is_one_process(client: Client, tmp_path: Path) -> None:
    """Otherwise both answers of the supervisor would belong to the same call."""
    before = client.call(Sys.STATUS, wire.Status(), dict)["kernel"]["epoch"]
    code = """
spawn = request(5, wire.Sys.SPAWN, "exec", "true", [], dict(os.environ), "/")
for _ in range(20):
    channel.post([spawn, request(6, wire.Sys.CANCEL, 5), spawn])
    found = {}
    while 5 not in found or not found[5]:
        channel.more or channel.wait(1.0)
        for frame in channel.receive():
            reply = wire.decode_reply(frame)
            found[reply.id] = reply.errno == 0
print("done")
"""
    pid = start(client, tmp_path, code)
    assert end(client, pid)[0] == 0
    assert output(client, pid) == "done\n"
    assert client.call(Sys.STATUS, wire.Status(), dict)["kernel"]["epoch"] == before


def test_a_spawn_that_is_answered_and_sent_again_is_answered_again(client: Client, tmp_path: Path) -> None:
    """The agent has rung, and the supervisor may not have read yet that its birth is over."""
    (tmp_path / "child.py").write_text("")
    code = """
for number in range(5, 35):
    spawn = request(number, wire.Sys.SPAWN, "file", sys.argv[1], [], dict(os.environ), "/")
    pids = []
    channel.post([spawn])
    while len(pids) < 3:
        channel.more or channel.wait(1.0)
        for frame in channel.receive():
            pids.append(msgpack.decode(wire.decode_reply(frame).body)[0])
            channel.post([spawn] if len(pids) < 3 else [])
    assert len(set(pids)) == 1, pids
print("done")
"""
    pid = start(client, tmp_path, code, str(tmp_path / "child.py"))
    assert end(client, pid)[0] == 0, output(client, pid)
    assert output(client, pid) == "done\n"


def test_wrong_arguments_get_an_errno(client: Client, tmp_path: Path) -> None:
    code = """
channel.send(b"\\x93\\x01" + bytes([wire.Sys.TOKENIZE]) + b"\\x91\\xa2\\xff\\xfe")
channel.send(b"\\x93\\x02" + bytes([wire.Sys.SEND]) + b"\\x92\\x05" + b"\\x91" * 700 + b"\\xc0")
channel.send(request(3, 77))
channel.send(request(4, wire.Sys.SPAWN, "file", "x.py", ["y" * 2_000_000]))
channel.send(request(5, wire.Sys.GENERATE, None, "x" * (wire.MAX_FRAME - 20)))
channel.send(request(6, wire.Sys.RECV, float("nan")))
channel.send(request(7, wire.Sys.EMBED, ["x"] * 70_000))
channel.send(b"\\x93\\x08" + bytes([wire.Sys.GETPID]) + b"\\xc3")
for number, (code, why) in sorted(errors(8).items()):
    print(number, code, why[0][:60])
"""
    pid = start(client, tmp_path, code)
    assert end(client, pid) == (0, "")
    lines = [line.split(maxsplit=2) for line in output(client, pid).splitlines()]
    assert [int(line[1]) for line in lines] == [
        errno.EINVAL,
        errno.EINVAL,
        errno.ENOSYS,
        errno.E2BIG,
        errno.EMSGSIZE,
        errno.EINVAL,
        errno.EINVAL,
        errno.EINVAL,
    ]
    assert "UTF-8" in lines[0][2]
    assert "nested" in lines[1][2]


def test_an_agent_that_does_not_read_waits(client: Client, tmp_path: Path) -> None:
    """It sends 100,000 requests and reads no reply: the requests stay in its ring, and all are served in the end."""
    code = """
sent = 0
while channel.outbox_bytes < 1 << 20:
    sent += 1
    channel.send(request(sent, 1))
end = time.monotonic() + 1.0
while time.monotonic() < end:
    channel.pump()
    time.sleep(0.01)
print("stuck" if channel.outbox_bytes > 1 << 19 else "swallowed", flush=True)
print(set(range(1, sent + 1)) == set(replies(sent)))
"""
    pid = start(client, tmp_path, code)
    for _ in range(20):
        client.call(Sys.GETPID, wire.NoArgs(), int, timeout=30)
    assert end(client, pid) == (0, "")
    assert output(client, pid) == "stuck\nTrue\n"


def test_unfinished_frames_of_many_agents(client: Client, tmp_path: Path) -> None:
    """Each is within its own bound, but all together are beyond the common one. The agent that began first is ended,
    and a large frame of an honest agent arrives."""
    held = 15 << 20
    code = f"""
piece, written = size // 2 - 8, 0
for number in range({held} // piece):
    while size - (written - items[32]) < piece + 8:
        items[48] = 1
        channel.wait(0.05)
        channel.receive()
        if channel.hung_up:
            sys.exit(1)
    at = 4096 + (written & (size - 1))
    memory[at:at + 8] = struct.pack("=II", piece | (0 if number else 1 << 31), 1)
    written += piece + 8
    items[24] = channel._producer._written = written  # `wait` compares it with what was read
    os.write(channel.fileno(), b"!")
while items[32] != written:
    time.sleep(0.01)
print("held", flush=True)
time.sleep(60)
"""
    pids = [start(client, tmp_path, code)]
    assert eventually(lambda: output(client, pids[0]) == "held\n")
    pids += [start(client, tmp_path, code) for _ in range(ASSEMBLY_MAX // held)]
    status, why = end(client, pids[0])
    assert status == -9
    assert "no room for more" in why
    honest = start(client, tmp_path, "channel.send(request(1, wire.Sys.SEND, 1 << 40, 'x' * (8 << 20)))\nreplies(1)")
    assert end(client, honest) == (0, "")
    for pid in pids[1:]:
        with contextlib.suppress(ProcessLookupError):
            client.call(Sys.KILL, wire.Kill(pid, 9, 5.0), None, timeout=30)


def test_the_segment_keeps_its_size(client: Client, tmp_path: Path) -> None:
    code = """
import fcntl
memfd = channel._memfd
for attempt in (lambda: os.ftruncate(memfd, 0), lambda: os.ftruncate(memfd, 1 << 24),
                lambda: fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, 8)):
    try:
        attempt()
    except OSError as err:
        print(err.errno)
"""
    pid = start(client, tmp_path, code)
    assert end(client, pid) == (0, "")
    assert output(client, pid) == f"{errno.EPERM}\n" * 3


# ── the control socket ────────────────────────────────────────────────────────────────────────────────────


def connected(system: System) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(30)
    sock.connect(str(system.home / "aiosd.sock"))
    return sock


def kernel_descriptors(system: System) -> int:
    ospid = next(entry["ospid"] for entry in system.ps() if entry["name"] == "kernel")
    return len(os.listdir(f"/proc/{ospid}/fd"))


@pytest.mark.parametrize(
    "message",
    [
        b"\xff\xff\xff\xff" + bytes(100),
        struct.pack("<I", 2 << 20) + bytes(100),
        fuzz.framed(b"\x93\x01\x00\xa2\xff\xfe"),
        fuzz.framed(b"\x93\x01" + b"\x91" * 1000),
        fuzz.framed(b"\x91" * 1000),
        fuzz.framed(b""),
        fuzz.framed(msgpack.encode([99, 0, ""])),
        fuzz.framed(HELLO) + fuzz.framed(b"\x93\x01\x01" + b"\x91" * 900),
    ],
)
def test_garbage_from_a_client_ends_it_alone(system: System, client: Client, message: bytes) -> None:
    with connected(system) as sock:
        sock.sendall(message)
        while sock.recv(1 << 12):
            pass
    assert client.call(Sys.GETPID, wire.NoArgs(), int, timeout=30) == 0


def test_half_messages_keep_no_client_waiting(system: System, client: Client) -> None:
    with contextlib.ExitStack() as stack:
        for cut in range(len(fuzz.framed(HELLO))):
            stack.enter_context(connected(system)).sendall(fuzz.framed(HELLO)[:cut])
        assert client.call(Sys.GETPID, wire.NoArgs(), int, timeout=30) == 0
        # the rest is sent late
        sock = stack.enter_context(connected(system))
        for byte in fuzz.framed(HELLO) + fuzz.framed(msgpack.encode([1, Sys.GETPID])):
            sock.sendall(bytes([byte]))
        frames = FrameSocket(sock.dup())
        try:
            assert len([frames.recv_blocking(30.0) for _ in range(2)]) == 2
        finally:
            frames.close()


def test_a_thousand_silent_connections_keep_no_client_out(system: System) -> None:
    before = kernel_descriptors(system)
    with contextlib.ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(connected(system))
        assert system.run("aios-ps", "-e", timeout=30).returncode == 0
        assert eventually(lambda: kernel_descriptors(system) <= before + control.MAX_STRANGERS + 1)
    assert eventually(lambda: kernel_descriptors(system) <= before)


def test_a_thousand_clients_are_served(system: System) -> None:
    with contextlib.ExitStack() as stack:
        socks = []
        for _ in range(1000):
            sock = stack.enter_context(connected(system))
            sock.sendall(fuzz.framed(HELLO) + fuzz.framed(msgpack.encode([1, Sys.GETPID])))
            socks.append(sock)
        for sock in socks:
            assert sock.recv(1 << 12)
        assert system.status()["kernel"]["clients_now"] > 1000


def test_an_agents_children_do_not_take_all_connections(system: System, client: Client, tmp_path: Path) -> None:
    code = f"""
import socket
socks = []
for number in range(300):
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(30)
    sock.connect({str(system.home / "aiosd.sock")!r})
    try:
        sock.sendall({fuzz.framed(HELLO)!r})
        said = sock.recv(1000)
    except OSError:
        said = b""
    if said:
        socks.append(sock)
print(len(socks))
"""
    pid = start(client, tmp_path, code)
    assert end(client, pid) == (0, "")
    assert output(client, pid) == f"{control.CLIENTS_OF_AGENT}\n"


def test_descriptors_that_a_client_sends_are_closed(system: System, client: Client) -> None:
    before = kernel_descriptors(system)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * 8))]
    with connected(system) as silent, connected(system) as sock:
        silent.sendmsg([b"\x10"], rights)  # not permitted before a Hello
        sock.sendall(fuzz.framed(HELLO))
        sock.recv(1 << 12)
        for number in range(200):
            sock.sendmsg([fuzz.framed(msgpack.encode([number, Sys.GETPID]))], rights)
        client.call(Sys.GETPID, wire.NoArgs(), int, timeout=30)
        sock.sendmsg([b"\x10"], rights)  # a frame without an end
        assert eventually(lambda: kernel_descriptors(system) <= before + 2 + 8)
    assert eventually(lambda: kernel_descriptors(system) <= before)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to be another user")
def test_another_user_is_refused(system: System) -> None:
    from benchmarks.harness import Aiosd

    bare = Aiosd.__new__(Aiosd)
    bare.home = system.home
    assert fuzz.another_uid(bare) == "refused"


# ── a slice of the benchmark ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.deadline(180)
def test_offenders_of_all_kinds_beside_honest_agents(tmp_path: Path) -> None:
    out = tmp_path / "fuzz.json"
    argv = ["--frames", "15000", "--seed", str(random.Random(4).randrange(100)), "--phase", "2", "--corpora", "1"]
    done = subprocess.run(
        [sys.executable, Path(fuzz.__file__), *argv, "--clients", "100", "--out", out],
        capture_output=True,
        text=True,
        timeout=170,
        env={name: value for name, value in os.environ.items() if not name.startswith("AIOS_")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads(out.read_text())["rows"]
    assert found["hostile"] >= 15000
    assert (found["kernel_deaths"], found["unbalanced"], found["harmed"]) == (0, [], [])
    assert found["replies"]["EINVAL"] > 100
    assert any("EPROTO" in reason for reason in found["reasons"])
