"""The rings: any frames in any interleaving arrive whole and in order, and whatever the other side writes into
the segment raises at most ProtocolError."""

from __future__ import annotations

import contextlib
import os
import random
import struct
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libaios import ring, wire
from libaios.ring import FIRST, HEADER, LAST, Consumer, Producer, ProtocolError, Segment

SIZE = ring.MIN_RING
WRITTEN, READ = ring._SUB + ring._WRITTEN, ring._SUB + ring._READ


class Pair:
    """Both sides of one segment, mapped twice as in two processes."""

    def __init__(self, epoch: int = 1, size: int = SIZE) -> None:
        self.memfd = ring.create(size, SIZE)
        self.theirs, self.ours = Segment(self.memfd), Segment(self.memfd)
        self.epoch = epoch

    def producer(self) -> Producer:
        return Producer(self.theirs, True, self.epoch)

    def consumer(self, max_frame: int = wire.MAX_FRAME) -> Consumer:
        return Consumer(self.ours, True, self.epoch, max_frame)

    def fragment(self, length: int, flags: int, epoch: int = 1, claimed: int | None = None) -> None:
        """Write a fragment with any head, as a hostile producer may."""
        written = self.theirs.items[WRITTEN]
        struct.pack_into("=II", self.theirs.memory, HEADER + written % SIZE, length | flags, epoch)
        self.theirs.items[WRITTEN] = written + (claimed if claimed is not None else (8 + length + 7) & ~7)

    def close(self) -> None:
        self.theirs.close()
        self.ours.close()
        os.close(self.memfd)


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


def bytes_of(number: int, length: int) -> bytes:
    return random.Random(number).randbytes(length)


# ── honest peers ──────────────────────────────────────────────────────────────────────────────────────────

sizes = st.one_of(
    st.integers(0, 40),
    st.integers(SIZE // 4 - 9, SIZE // 4 + 9),
    st.integers(SIZE // 2 - 17, SIZE // 2 + 9),
    st.integers(SIZE - 17, SIZE + 9),
    st.integers(0, 5 * SIZE),
)


@given(st.lists(sizes, max_size=40), st.randoms(use_true_random=False), st.integers(0, 1 << 40))
@settings(max_examples=150)
def test_frames_of_any_size_in_any_interleaving(lengths: list[int], chance: random.Random, turns: int) -> None:
    pair = Pair()
    try:
        for item in (WRITTEN, READ):  # any counter, so that frames wrap at any place
            pair.ours.items[item] = turns * 8
        producer, consumer = pair.producer(), pair.consumer()
        frames = [bytes_of(number, length) for number, length in enumerate(lengths)]
        waiting, offset, got = list(frames), 0, []
        while len(got) < len(frames):
            for _ in range(chance.randint(0, 4)):
                if waiting:
                    offset = max(0, producer.put(waiting[0], offset))
                    if offset == len(waiting[0]) and (offset or producer.unread()):
                        waiting.pop(0)
                        offset = 0
            for _ in range(chance.randint(0, 3)):
                frame = consumer.get()
                if frame is not None:
                    got.append(frame)
            written, read = pair.ours.items[WRITTEN], pair.ours.items[READ]
            assert 0 <= written - read <= SIZE
        assert got == frames
        assert consumer.empty()
    finally:
        pair.close()


def test_an_empty_frame_is_a_frame(pair: Pair) -> None:
    producer, consumer = pair.producer(), pair.consumer()
    assert producer.put(b"") == 0
    assert consumer.get() == b""
    while producer.put(b"") == 0:
        pass
    assert producer.put(b"") == -1  # no room


def test_a_frame_of_half_the_ring_waits_for_its_room_and_is_not_torn(pair: Pair) -> None:
    producer, consumer = pair.producer(), pair.consumer()
    first, second = bytes_of(1, SIZE // 2), bytes_of(2, SIZE // 2 - 8)
    assert producer.put(first) == len(first)
    assert producer.put(second) == 0
    assert consumer.get() == first
    assert producer.put(second) == len(second)
    assert consumer.get() == second


def test_a_producer_that_announces_a_wait_looks_again(pair: Pair) -> None:
    producer, consumer = pair.producer(), pair.consumer()
    while producer.put(bytes(500)) == 500:
        pass
    while consumer.get():  # between the failed put and the wait
        pass
    assert not producer.wait_for_room()


def test_a_consumer_that_announces_sleep_looks_again(pair: Pair) -> None:
    producer, consumer = pair.producer(), pair.consumer()
    assert consumer.get() is None
    producer.put(b"between")
    assert not consumer.sleep()


def test_a_new_consumer_drops_frames_for_the_dead_one(pair: Pair) -> None:
    producer = pair.producer()
    producer.put(b"for the dead")
    producer.put(bytes(3 * SIZE))  # a part of it
    ring.raise_epoch(pair.memfd)
    consumer = Consumer(pair.ours, True, pair.ours.epoch)
    producer.enter(pair.ours.epoch)
    assert consumer.get() is None
    assert producer.put(b"for the living") == 14
    assert consumer.get() == b"for the living"


def test_a_consumer_receives_from_later_producers_and_not_from_earlier_ones(pair: Pair) -> None:
    consumer = Consumer(pair.ours, True, 5)
    for epoch in (5, 9, 9, 4, 6, 5, 9):
        pair.epoch = epoch
        assert pair.producer().put_whole((b"%d" % epoch,)) == 1
        assert consumer.get() == (b"%d" % epoch if epoch >= 5 else None)


def test_frames_published_together_are_those_that_found_room(pair: Pair) -> None:
    producer, consumer = pair.producer(), pair.consumer()
    small = [bytes_of(number, SIZE // 4 - 8) for number in range(5)]
    assert producer.put_whole(small) == 4
    assert [consumer.get() for _ in range(5)] == [*small[:4], None]
    assert producer.put_whole([b"x", bytes(SIZE // 4 + 1), b"y"]) == 1  # the second frame may need several fragments
    assert [consumer.get(), consumer.get()] == [b"x", None]


def test_a_new_producer_begins_a_new_frame_after_an_incomplete_one(pair: Pair) -> None:
    """The producer died, or executed another program, in the middle of a frame."""
    consumer = pair.consumer()
    old = pair.producer()
    assert 0 < old.put(bytes(3 * SIZE)) < 3 * SIZE
    assert consumer.get() is None
    assert pair.producer().put(b"new") == 3
    assert consumer.get() == b"new"


def test_a_consumer_that_comes_in_the_middle_of_a_frame_skips_its_end(pair: Pair) -> None:
    producer = pair.producer()
    frame = bytes(2 * SIZE)
    offset = producer.put(frame)
    assert pair.consumer().get() is None
    while offset < len(frame):
        late = pair.consumer()
        offset = producer.put(frame, offset)
        assert late.get() is None
    producer.put(b"whole")
    assert late.get() == b"whole"


def test_call_ids_go_on_in_a_new_mapping(pair: Pair) -> None:
    assert [ring.CallIds(pair.theirs).next() for _ in range(3)] == [1, 2, 3]


# ── hostile peers ─────────────────────────────────────────────────────────────────────────────────────────


def test_agent_sends_length_beyond_what_is_written(pair: Pair) -> None:
    pair.fragment(1000, FIRST | LAST, claimed=16)
    with pytest.raises(ProtocolError, match="1000 bytes"):
        pair.consumer().get()


def test_agent_sends_negative_length(pair: Pair) -> None:
    pair.fragment(0, 0xFFFFFFFF, claimed=16)
    with pytest.raises(ProtocolError):
        pair.consumer().get()


def test_agent_claims_more_than_the_ring_holds(pair: Pair) -> None:
    consumer = pair.consumer()
    pair.theirs.items[WRITTEN] = SIZE + 8
    with pytest.raises(ProtocolError, match="claims"):
        consumer.get()


def test_agent_turns_its_counter_back(pair: Pair) -> None:
    consumer = pair.consumer()
    pair.producer().put(b"frame")
    assert consumer.get() == b"frame"
    pair.theirs.items[WRITTEN] = 0
    with pytest.raises(ProtocolError):
        consumer.get()


def test_agent_writes_a_counter_that_is_not_aligned(pair: Pair) -> None:
    consumer = pair.consumer()
    pair.theirs.items[WRITTEN] = 13
    with pytest.raises(ProtocolError):
        consumer.get()


@pytest.mark.parametrize("value", [5, (1 << 64) - 8, (1 << 63), (1 << 64) - 1])
@pytest.mark.parametrize("side", [Producer, Consumer])
def test_agent_overwrites_both_counters_before_the_kernel_attaches(
    pair: Pair, value: int, side: Callable[[Segment, bool, int], object]
) -> None:
    """The kernel takes its own counter from the header, and must not fail because of it later."""
    pair.theirs.items[WRITTEN] = pair.theirs.items[READ] = value
    with pytest.raises(ProtocolError, match="counter"):
        side(pair.ours, True, 1)


@pytest.mark.parametrize("value", [1, SIZE * 9, (1 << 64) - 1])
def test_reader_claims_to_have_read_what_was_never_written(pair: Pair, value: int) -> None:
    producer = pair.producer()
    producer.put(b"frame")
    pair.ours.items[READ] = value
    with pytest.raises(ProtocolError, match="reader's counter"):
        producer.put(b"next")


def test_agent_sends_a_frame_without_end(pair: Pair) -> None:
    consumer = pair.consumer(max_frame=4 * SIZE)
    for number in range(8):
        pair.fragment(SIZE // 2, 0 if number else FIRST)
        assert consumer.get() is None
    pair.fragment(SIZE // 2, 0)
    with pytest.raises(ProtocolError, match="more than"):
        consumer.get()


def test_agent_sends_a_single_fragment_beyond_the_limit(pair: Pair) -> None:
    pair.fragment(SIZE // 2, FIRST | LAST)
    with pytest.raises(ProtocolError, match="more than"):
        pair.consumer(max_frame=100).get()


@pytest.mark.parametrize("length", [0, 1, SIZE // 4 - 1])
def test_agent_sends_a_million_crumbs(pair: Pair, length: int) -> None:
    """Each would cost the kernel more memory than the agent."""
    pair.fragment(length, FIRST)
    with pytest.raises(ProtocolError, match="does not end"):
        pair.consumer().get()


def test_agent_floods_with_fragments_that_make_no_frame(pair: Pair) -> None:
    """It writes as fast as they are dropped. `get` returns after those that were there when it was called."""
    consumer = Consumer(pair.ours, True, 2)
    dropped = 0
    original = Consumer._take

    class Flooded(Consumer):
        __slots__ = ()

        def _take(self, available: int) -> bytes | None:
            nonlocal dropped
            dropped += 1
            assert dropped < 10_000
            pair.fragment(0, FIRST | LAST)
            return original(self, available)

    consumer = Flooded(pair.ours, True, 2)
    pair.fragment(0, FIRST | LAST)
    assert consumer.get() is None
    assert dropped == 1


@given(st.binary(min_size=8, max_size=512), st.integers(0, SIZE // 8), st.integers(0, 3))
@settings(max_examples=200)
def test_agent_fills_the_ring_with_noise(noise: bytes, words: int, epoch: int) -> None:
    pair = Pair()
    try:
        consumer = Consumer(pair.ours, True, epoch)
        pair.theirs.memory[HEADER : HEADER + SIZE] = (noise * SIZE)[:SIZE]
        pair.theirs.items[WRITTEN] = words * 8
        for _ in range(words + 1):
            if consumer.get() is None:
                break
    except ProtocolError:
        pass
    finally:
        pair.close()


@given(st.lists(st.tuples(st.integers(0, HEADER // 8 - 1), st.integers(0, (1 << 64) - 1)), max_size=6))
@settings(max_examples=200)
def test_agent_writes_anything_into_the_header(writes: list[tuple[int, int]]) -> None:
    pair = Pair()
    try:
        producer, consumer = Producer(pair.ours, False, 1), pair.consumer()
        for item, value in writes:
            pair.theirs.items[item] = value
        for act in (
            lambda: producer.put(b"reply"),
            consumer.get,
            consumer.sleep,
            lambda: ring.raise_epoch(pair.memfd),
            lambda: Producer(pair.ours, False, pair.ours.epoch).put(b"reply"),
            lambda: Consumer(pair.ours, True, pair.ours.epoch).get(),
            lambda: Segment(pair.memfd).close(),
        ):
            with contextlib.suppress(ProtocolError):
                act()
    finally:
        pair.close()


# ── segments ──────────────────────────────────────────────────────────────────────────────────────────────


def refused(memfd: int, why: str) -> None:
    try:
        with pytest.raises(ProtocolError, match=why):
            Segment(memfd)
    finally:
        os.close(memfd)


def test_a_segment_cannot_be_resized(pair: Pair) -> None:
    for size in (0, HEADER, 1 << 30):
        with pytest.raises(PermissionError):
            os.ftruncate(pair.memfd, size)


def test_a_segment_that_could_be_resized_is_refused() -> None:
    memfd = os.memfd_create("aios-test", os.MFD_ALLOW_SEALING)
    os.ftruncate(memfd, HEADER + 2 * SIZE)
    refused(memfd, "not sealed")


def test_a_file_is_no_segment() -> None:
    refused(os.open(__file__, os.O_RDWR), "no shared segment")


def test_a_segment_of_another_release_is_refused_with_a_sentence() -> None:
    memfd = ring.create(SIZE, SIZE)
    os.pwrite(memfd, struct.pack("=Q", wire.VERSION + 1), 8)
    refused(memfd, f"version {wire.VERSION + 1}; this is version {wire.VERSION}")


@pytest.mark.parametrize("size", [0, 7, SIZE * 2, 1 << 63])
def test_agent_lies_about_the_size_of_its_rings(size: int) -> None:
    memfd = ring.create(SIZE, SIZE)
    os.pwrite(memfd, struct.pack("=Q", size), 16)
    refused(memfd, "a ring of|a segment of")


@pytest.mark.parametrize("size", [0, SIZE - 1, SIZE + 8, ring.MAX_RING * 2])
def test_a_ring_that_is_no_power_of_two_is_not_made(size: int) -> None:
    with pytest.raises(ValueError, match="a ring of"):
        ring.create(size, SIZE)


def test_closing_a_segment_that_is_in_use_keeps_the_mapping_alive(pair: Pair) -> None:
    """A thread may be using the ring when another one closes it, or when the process forks."""
    segment = Segment(pair.memfd)
    piece = segment.memory[HEADER : HEADER + 8]
    segment.close()
    assert bytes(piece) == bytes(8)
