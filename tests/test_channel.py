"""The channel: no frame is lost, torn or doubled, and no side sleeps while there is a frame for it."""

from __future__ import annotations

import os
import random
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libaios import channel as channels
from libaios import ring
from libaios.channel import Channel, ProtocolError, Side, make_channel, raise_epoch
from tests.interrupts import Interrupt, Interrupts

SMALL = ring.MIN_RING
LOST_S = 5.0  # a side that sleeps for so long has lost a wake-up


class Ends:
    """Both sides of a channel in this process."""

    def __init__(self, sub_size: int = SMALL, comp_size: int = SMALL) -> None:
        memfd, kernel_bell, agent_bell = make_channel(sub_size, comp_size)
        self.memfd, self.kernel_bell = os.dup(memfd), os.dup(kernel_bell)  # those of the supervisor
        self.kernel = Channel(memfd, kernel_bell, Side.KERNEL)
        self.agent = Channel(os.dup(memfd), agent_bell, Side.AGENT)

    def new_kernel(self) -> Channel:
        """Attach a new kernel, as the supervisor does when one has died."""
        self.kernel.close()
        raise_epoch(self.memfd)
        self.kernel = Channel(os.dup(self.memfd), os.dup(self.kernel_bell), Side.KERNEL)
        return self.kernel

    def close(self) -> None:
        self.kernel.close()
        self.agent.close()
        os.close(self.memfd)
        if self.kernel_bell >= 0:
            os.close(self.kernel_bell)


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.close()


def rung(side: Channel) -> bool:
    return bool(select.select([side.fileno()], [], [], 0)[0])


# ── patience ──────────────────────────────────────────────────────────────────────────────────────────────


class Item:
    """A value that changes after a number of looks; looks are counted."""

    def __init__(self, after: int) -> None:
        self.looks, self.after = 0, after

    def __getitem__(self, item: int) -> int:
        self.looks += 1
        return int(self.looks > self.after)


def test_patience_is_kept_while_it_pays() -> None:
    patience = channels.Patience()
    for _ in range(100):
        assert patience.look(Item(after=9), 0, 0, 10)


def test_patience_that_does_not_pay_is_lost_and_comes_back() -> None:
    patience, looks = channels.Patience(), 0
    for _ in range(10_000):
        item = Item(after=10**9)
        assert not patience.look(item, 0, 0, 100)
        looks += item.looks
    assert looks < 10_000  # less than one of a hundred
    found = sum(patience.look(Item(after=9), 0, 0, 10) for _ in range(4 * channels.RESTS))
    assert found > 3 * channels.RESTS - 10


def test_frames_that_come_while_channels_announce_sleep_are_found(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Ends()
    try:
        both = [ends.kernel, other.kernel]
        for side in both:
            side.receive()
            side._items[side._consumer.sleeps] = 0  # the value while the side is awake
        original = ring.fence

        def fence() -> None:
            monkeypatch.undo()
            other.agent.send(b"between the look and the sleep")
            original()

        monkeypatch.setattr(ring, "fence", fence)
        assert channels.restless(both) == [other.kernel]
        assert channels.restless([ends.kernel]) == []
        ends.agent.send(b"rings")
        assert rung(ends.kernel)
        assert channels.look([other.kernel, ends.kernel], 4)
    finally:
        other.close()


def test_a_look_at_several_rings_finds_the_one_that_has_something(ends: Ends) -> None:
    other = Ends()
    try:
        both = [ends.kernel, other.kernel]
        for side in both:
            side.receive()
            side._items[side._consumer.sleeps] = 0  # the value while the side is awake
        assert not channels.look(both, 100)
        other.agent.send(b"found without a bell")
        assert not rung(other.kernel)
        assert channels.look(both, 100)
        assert [side.filled() for side in both] == [False, True]
    finally:
        other.close()


def test_posted_frames_come_in_order_whatever_their_size(ends: Ends) -> None:
    frames = [b"a", bytes(3 * SMALL), b"b", b"", bytes(SMALL // 2)]
    ends.agent.post(frames)
    ends.agent.post([b"last"])
    got: list[bytes] = []
    while len(got) < 6:
        got += ends.kernel.receive()
        ends.agent.pump()
    assert got == [*frames, b"last"]
    assert ends.agent.unbalanced() == ""


# ── bells ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_first_frame_rings(ends: Ends) -> None:
    ends.agent.send(b"hello")
    assert rung(ends.kernel)
    assert ends.kernel.receive() == [b"hello"]
    assert not rung(ends.kernel)


def test_a_busy_reader_is_not_rung_for_every_frame(ends: Ends) -> None:
    for _ in range(20):
        ends.agent.send(b"frame")
    assert len(os.read(ends.kernel.fileno(), 100)) == 1


def test_a_limited_receive_reports_that_there_is_more(ends: Ends) -> None:
    for number in range(5):
        ends.agent.send(bytes([number]))
    assert ends.kernel.receive(3) == [b"\0", b"\1", b"\2"]
    assert ends.kernel.more
    assert ends.kernel.receive(3) == [b"\3", b"\4"]
    assert not ends.kernel.more


def test_a_reader_that_makes_room_rings_a_writer_that_waits_for_it(ends: Ends) -> None:
    frame = bytes(SMALL // 4)
    while not ends.agent.outbox_bytes:
        ends.agent.send(frame)
    assert not ends.agent.pump()
    assert not rung(ends.agent)
    assert ends.kernel.receive()
    assert rung(ends.agent)
    assert ends.agent.pump()
    assert ends.agent.outbox_bytes == 0


def test_wait_rings_again_when_its_ring_was_lost(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring is lost, for example, if a signal handler raises between a frame and its ring."""
    monkeypatch.setattr(channels, "BACKSTOP_S", 0.01)
    ends.agent.send(b"frame")
    os.read(ends.kernel.fileno(), 10)
    assert not rung(ends.kernel)
    assert not ends.agent.wait(0.05)
    assert rung(ends.kernel)


def test_the_bell_of_an_agent_that_never_reads_it_does_not_block(ends: Ends) -> None:
    sleeps = ring._COMP + ring._SLEEPS
    for _ in range(20_000):  # more than a pipe holds
        ends.agent._segment.items[sleeps] = 1  # an agent that announces sleep and never reads its bell
        ends.kernel.send(b"r")
        ends.agent._consumer.get()
    assert not ends.kernel.hung_up


def test_what_a_service_works_on_is_found_when_it_is_dead(ends: Ends) -> None:
    assert ends.agent.work.call is None
    ends.kernel.work.begin(7, 3)
    assert ends.agent.work.call == (7, 3)
    ends.kernel.work.end()
    assert ends.agent.work.call is None
    ends.kernel.work.begin(-2, 1 << 40)  # of a client
    ends.kernel.close()
    assert ends.agent.work.call == (-2, 1 << 40)


def test_what_is_sent_silently_comes_with_the_next_frame_or_at_the_end(ends: Ends) -> None:
    ends.agent.receive()  # asleep: a frame rings
    ends.kernel.send_silently(b"one")
    assert not rung(ends.agent)
    ends.kernel.send(b"two")
    assert rung(ends.agent)
    assert ends.agent.receive() == [b"one", b"two"]
    ends.kernel.send_silently(b"last words")
    ends.kernel.close()
    assert ends.agent.wait(LOST_S)
    assert ends.agent.receive() == [b"last words"]


def test_a_hang_up_is_seen(ends: Ends) -> None:
    ends.agent.send(b"last words")
    ends.agent.close()
    assert ends.kernel.wait(LOST_S)
    assert ends.kernel.receive() == [b"last words"]
    ends.kernel.receive()
    assert ends.kernel.hung_up


def test_a_frame_and_a_hang_up_at_once_are_both_found(ends: Ends) -> None:
    """Both cause one event on the bell, and reading it returns the ring only."""
    ends.agent.receive()  # asleep: the frame rings
    ends.kernel.send(b"last words")
    ends.kernel.close()
    os.close(ends.kernel_bell)
    ends.kernel_bell = -1
    assert ends.agent.wait()
    assert ends.agent.receive() == [b"last words"]
    assert ends.agent.wait(0)
    assert ends.agent.receive() == []
    assert ends.agent.hung_up


def test_shutdown_wakes_a_side_that_waits(ends: Ends) -> None:
    done = threading.Event()

    def wait() -> None:
        while not ends.agent.hung_up:
            ends.agent.wait()
            ends.agent.receive()
        done.set()

    thread = threading.Thread(target=wait)
    thread.start()
    ends.agent.shutdown()
    thread.join(LOST_S)
    assert done.is_set()


def test_a_bell_shut_down_by_halves_is_an_end_and_nothing_is_raised() -> None:
    """A hostile agent shuts it down. poll does not report this, and a kernel that attaches later rings, too."""
    memfd, kernel_bell, agent_bell = make_channel()
    raise_epoch(memfd)
    with socket.socket(fileno=agent_bell) as bell:
        bell.shutdown(socket.SHUT_RD)
        for _ in range(2):
            kernel = Channel(os.dup(memfd), os.dup(kernel_bell), Side.KERNEL)
            kernel.send(b"x")
            assert kernel.hung_up
            kernel.close()
    os.close(memfd)
    os.close(kernel_bell)


def test_rouse_wakes_a_side_once(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """Afterwards it sleeps again."""
    monkeypatch.setattr(channels, "BACKSTOP_S", 1000.0)
    ends.agent.sleep_in_read()
    bell = ends.agent.fileno()
    for _ in range(2):
        ends.agent.rouse()
        assert not ends.agent.wait()
        assert os.get_blocking(bell)
    ends.kernel.send(b"a frame")
    assert ends.agent.wait()
    assert ends.agent.receive() == [b"a frame"]


def test_a_long_wait_sleeps_longer_each_time(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a frame the first sleep is short again."""
    monkeypatch.setattr(channels, "BACKSTOP_S", 0.01)
    ends.agent._backstop_s = 0.01
    ends.agent.sleep_in_read()
    for _ in range(2):
        until, sleeps = time.monotonic() + 0.64, 0
        while time.monotonic() < until:
            assert not ends.agent.wait()
            sleeps += 1
        assert sleeps <= 8, "0.01 + 0.02 + 0.04 + …"
        ends.kernel.send(b"a frame")
        assert ends.agent.wait()
        assert ends.agent.receive() == [b"a frame"]
        assert ends.agent._backstop_s == 0.01


def test_wait_ends_after_its_time(ends: Ends) -> None:
    before = time.monotonic()
    assert not ends.agent.wait(0.02)
    assert 0.02 <= time.monotonic() - before < 10


def test_a_frame_that_comes_while_sleep_is_announced_is_received(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sender has read that we are awake, and has not rung."""
    ends.kernel.receive()
    ends.kernel._segment.items[ends.agent._producer.sleeps] = 0
    original = ring.Consumer.gather

    def gather(self: ring.Consumer, *args: Any) -> None:
        original(self, *args)
        monkeypatch.undo()
        ends.agent.send(b"just now")

    monkeypatch.setattr(ring.Consumer, "gather", gather)
    assert ends.kernel.receive() == [b"just now"]


def test_a_ring_for_room_that_comes_between_pump_and_receive_is_not_lost(ends: Ends) -> None:
    while not ends.kernel.outbox_bytes:
        ends.kernel.send(bytes(SMALL // 4))
    assert not ends.kernel.pump()
    ends.agent.receive()  # makes room and rings
    ends.kernel.receive()  # drains the bell
    assert ends.kernel.more


# ── frames ────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.integers(0, 6 * SMALL), max_size=30), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_large_and_small_frames_in_both_directions(lengths: list[int], chance: random.Random) -> None:
    ends = Ends()
    try:
        sent = [random.Random(n).randbytes(length) for n, length in enumerate(lengths)]
        pairs = [(ends.agent, ends.kernel), (ends.kernel, ends.agent)]
        left, got = [list(sent), list(sent)], [[], []]  # type: ignore[var-annotated]
        while got != [sent, sent]:
            way = chance.randrange(2)
            writer, reader = pairs[way]
            if left[way] and chance.random() < 0.6:
                writer.send(left[way].pop(0))
            writer.pump()
            got[way] += reader.receive(chance.randint(1, 8))
        assert [side.outbox_bytes for side in pairs[0]] == [0, 0]
    finally:
        ends.close()


def test_a_frame_of_sixteen_megabytes(ends: Ends) -> None:
    frame = random.Random(1).randbytes(ring.wire.MAX_FRAME)
    ends.agent.send(frame)
    got: list[bytes] = []
    while not got:
        ends.agent.pump()
        got = ends.kernel.receive()
    assert got == [frame]


@pytest.mark.parametrize("sizes", [(1, 3, 2), (1, 3000, 1, 700), (5000, 5000, 1)])
def test_a_signal_handler_that_raises_anywhere_tears_nothing(sizes: tuple[int, ...]) -> None:
    """The frame that was being sent or received may be lost or not. All others arrive once, whole and in order, and the
    owner gets the next ring."""
    frames = [struct.pack("<I", number) * size for number, size in enumerate(sizes, 1)]
    for n in range(1, 100_000):
        ends = Ends()
        interrupts = Interrupts(n, channels, ring)
        sure: list[bytes] = []
        requests: list[bytes] = []
        replies: list[bytes] = []
        for frame in frames:
            try:
                with interrupts:
                    ends.agent.send(frame)
                sure.append(frame)
            except Interrupt:
                pass
            while True:
                requests += ends.kernel.receive()
                ends.kernel.pump()
                try:
                    with interrupts:
                        sent = ends.agent.pump()
                        replies += ends.agent.receive()
                except Interrupt:
                    continue
                if sent:
                    break
            ends.kernel.send(frame)
        ends.agent.nudge()
        assert rung(ends.kernel) or not ends.agent._producer.unread()
        for _ in range(20):
            requests += ends.kernel.receive()
            ends.kernel.pump()
            replies += ends.agent.receive()
        ends.close()
        assert requests == [frame for frame in frames if frame in requests], n  # once, in order, whole
        assert set(sure) <= set(requests), n
        assert replies == [frame for frame in frames if frame in replies], n
        assert len(replies) >= len(frames) - 1, n
        if interrupts.left > 0:
            assert n > 50
            return


# ── epochs ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_new_kernel_receives_no_frame_of_an_earlier_epoch(ends: Ends) -> None:
    ends.agent.send(b"old")
    kernel = ends.new_kernel()
    ends.agent.send(b"between the raise and the notice")
    assert kernel.receive() == []
    assert ends.agent.reborn
    ends.agent.renew()
    assert not ends.agent.reborn
    ends.agent.send(b"new")
    assert kernel.receive() == [b"new"]


def test_the_kernel_died_with_half_a_frame_in_the_outbox(ends: Ends) -> None:
    ends.agent.send(bytes(3 * SMALL))
    assert ends.agent.outbox_bytes
    kernel = ends.new_kernel()
    ends.agent.renew()
    assert ends.agent.outbox_bytes == 0
    ends.agent.send(b"new")
    ends.agent.pump()
    got: list[bytes] = []
    while not got:
        got = kernel.receive()
        ends.agent.pump()
    assert got == [b"new"]


def test_the_kernel_died_with_half_a_reply_in_the_ring(ends: Ends) -> None:
    ends.kernel.send(b"whole")
    ends.kernel.send(bytes(3 * SMALL))
    kernel = ends.new_kernel()
    assert ends.agent.receive() == [b"whole"]  # a published frame counts
    kernel.send(b"from the new one")
    assert ends.agent.receive() == [b"from the new one"]


def test_a_new_kernel_wakes_an_agent_that_sleeps(ends: Ends) -> None:
    ends.agent.receive()
    assert not rung(ends.agent)
    ends.new_kernel()
    assert rung(ends.agent)
    assert ends.agent.wait(0)


def test_a_new_kernel_finds_the_ring_full(ends: Ends) -> None:
    while not ends.agent.outbox_bytes:
        ends.agent.send(bytes(SMALL // 4))
    kernel = ends.new_kernel()
    kernel.receive()
    assert rung(ends.agent)  # there is room
    ends.agent.renew()
    ends.agent.send(b"again")
    assert kernel.receive() == [b"again"]


# ── hostile agents ────────────────────────────────────────────────────────────────────────────────────────


def test_agent_keeps_writing_while_the_kernel_reads(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one receive the kernel takes at most as many bytes as the ring has, whatever its limit of frames."""
    original = ring.Consumer._available

    def available(self: ring.Consumer) -> int:
        ends.agent.send(b"flood")
        return original(self)

    ends.agent.send(b"flood")
    monkeypatch.setattr(ring.Consumer, "_available", available)
    assert len(ends.kernel.receive(1 << 30)) <= SMALL // 16
    assert ends.kernel.more


def test_agent_closes_its_bell_and_the_kernel_replies(ends: Ends) -> None:
    ends.kernel.receive()
    ends.agent.close()
    ends.kernel.send(b"reply")
    assert ends.kernel.hung_up


def test_agent_floods_the_bell(ends: Ends) -> None:
    try:
        while True:
            os.write(ends.agent.fileno(), b"!" * 4096)
    except BlockingIOError:
        pass
    ends.agent.send(b"frame")
    assert ends.kernel.receive() == [b"frame"]


def test_agent_destroys_the_header_before_the_kernel_looks() -> None:
    memfd, kernel_bell, agent_bell = make_channel()
    os.pwrite(memfd, os.urandom(ring.HEADER), 0)
    with pytest.raises(ProtocolError):
        Channel(memfd, kernel_bell, Side.KERNEL)
    assert os.read(agent_bell, 1) == b""  # the refused channel has closed its descriptors
    os.close(agent_bell)


@given(st.integers(0, 1 << 30))
@settings(max_examples=40)
def test_agent_writes_noise_everywhere(seed: int) -> None:
    ends = Ends()
    chance = random.Random(seed)
    items = ends.agent._segment.items
    try:
        for _ in range(200):
            match chance.randrange(5):
                case 0:
                    items[chance.randrange(8, ring.HEADER // 8)] = chance.getrandbits(chance.choice((3, 13, 64)))
                case 1:
                    at = ring.HEADER + chance.randrange(2 * SMALL - 8)
                    ends.agent._segment.memory[at : at + 8] = chance.randbytes(8)
                case 2:
                    ends.kernel.send(chance.randbytes(chance.randrange(2 * SMALL)))
                case 3:
                    ends.kernel.pump()
                case 4:
                    ends.kernel.receive()
    except ProtocolError:
        pass
    finally:
        ends.close()


# ── two processes ─────────────────────────────────────────────────────────────────────────────────────────


def idle(chance: random.Random) -> None:
    """A busy pause of random length, mostly none."""
    if chance.random() < 0.02:
        for _ in range(chance.randrange(2000)):
            pass
    elif chance.random() < 0.01:
        os.sched_yield()


def listen(side: Channel, what: str) -> None:
    """Sleep on the bell without a time limit, so that a lost wake-up shows."""
    poll = select.poll()
    poll.register(side.fileno(), select.POLLIN)
    if not side.more and not poll.poll(LOST_S * 1000):
        raise AssertionError(f"{what}: a wake-up was lost")


@pytest.mark.parametrize("seed", [1, 2])
def test_no_wake_up_is_lost_between_processes(seed: int) -> None:
    """100,000 frames through tiny rings, echoed, with random pauses on both sides."""
    frames = 50_000
    memfd, kernel_bell, agent_bell = make_channel(SMALL, SMALL)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(agent_bell)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            kernel = Channel(memfd, kernel_bell, Side.KERNEL)
            chance = random.Random(-seed)
            echoed = 0
            while (echoed < frames or not kernel.pump()) and not kernel.hung_up:
                got = kernel.receive(chance.randint(1, 64))
                for frame in got:
                    kernel.send(frame)
                    idle(chance)
                echoed += len(got)
                if not kernel.pump() or not got:
                    listen(kernel, "kernel")
            code = 0
        finally:
            os._exit(code)
    os.close(kernel_bell)
    agent = Channel(memfd, agent_bell, Side.AGENT)
    try:
        chance = random.Random(seed)
        sent = received = 0
        while received < frames:
            for _ in range(min(chance.randint(0, 40), frames - sent)):
                if agent.outbox_bytes > 2 * SMALL:
                    break
                length = chance.choice((4, 4, 40, 200, 2 * SMALL if chance.random() < 0.02 else 9))
                agent.send(struct.pack("<I", sent) + bytes(length))
                sent += 1
                idle(chance)
            agent.pump()
            got = agent.receive(chance.randint(1, 64))
            for frame in got:
                assert struct.unpack_from("<I", frame)[0] == received
                received += 1
            if not got and (sent == frames or agent.outbox_bytes > 2 * SMALL):
                listen(agent, f"agent, after {received} of {sent}")
    finally:
        agent.close()
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
