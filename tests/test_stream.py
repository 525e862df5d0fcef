"""Frames with descriptors over a Unix socket: whole, in order, each descriptor with its frame, none leaked."""

from __future__ import annotations

import array
import os
import random
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libaios.stream import MAX_FDS, FrameSocket, ProtocolError


class Ends:
    def __init__(self, max_frame: int = 1 << 24) -> None:
        left, right = socket.socketpair()
        self.raw = left.dup()  # on which a hostile peer writes
        self.sender, self.receiver = FrameSocket(left), FrameSocket(right, max_frame)

    def close(self) -> None:
        self.raw.close()
        self.sender.close()
        self.receiver.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.close()


def count() -> int:
    return len(os.listdir("/proc/self/fd"))


def send_raw(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


@given(st.lists(st.tuples(st.integers(0, 300_000), st.integers(0, MAX_FDS)), max_size=12), st.integers(0, 99))
@settings(max_examples=60)
def test_every_descriptor_comes_with_its_frame(frames: list[tuple[int, int]], seed: int) -> None:
    """However the frames are joined in the socket's buffer."""
    before = count()
    ends = Ends()
    chance = random.Random(seed)
    files = [os.memfd_create(f"m{number}") for number in range(MAX_FDS)]
    marks = [os.fstat(fd).st_ino for fd in files]
    got: list[tuple[bytes, list[int]]] = []
    for number, (length, fds) in enumerate(frames):
        ends.sender.send(random.Random(number).randbytes(length), files[:fds])
        if chance.random() < 0.3:
            got += ends.receiver.receive()
    while len(got) < len(frames):
        ends.sender.flush()
        got += ends.receiver.receive(chance.choice((None, 1, 2)))
    for number, (payload, fds) in enumerate(got):
        length, expected = frames[number]
        assert payload == random.Random(number).randbytes(length)
        assert [os.fstat(fd).st_ino for fd in fds] == marks[:expected]
    for _, fds in got:
        for fd in fds:
            os.close(fd)
    for fd in files:
        os.close(fd)
    ends.close()
    assert count() == before


def test_descriptors_do_not_go_to_the_frame_before(ends: Ends) -> None:
    """Linux may return bytes without descriptors and bytes with some in one read."""
    ends.sender.send(b"plain")
    ends.sender.send(b"with", [0])
    ends.sender.send(b"after")
    got = ends.receiver.receive()
    assert [(payload, len(fds)) for payload, fds in got] == [(b"plain", 0), (b"with", 1), (b"after", 0)]
    os.close(got[1][1][0])


def test_all_frames_of_a_burst_are_delivered(ends: Ends) -> None:
    """The socket does not become readable again for bytes that were read already."""
    for number in range(200):
        ends.sender.send(struct.pack("<I", number))
    assert len(ends.receiver.receive()) == 200


def test_recv_blocking_keeps_the_next_frame(ends: Ends) -> None:
    ends.sender.send(b"one")
    ends.sender.send(b"two")
    assert ends.receiver.recv_blocking(1) == (b"one", [])
    assert ends.receiver.recv_blocking(1) == (b"two", [])
    with pytest.raises(TimeoutError):
        ends.receiver.recv_blocking(0.01)


def test_a_hang_up_comes_after_all_that_was_sent(ends: Ends) -> None:
    ends.sender.send(b"last words")
    ends.sender.close()
    ends.raw.close()
    assert ends.receiver.receive() == [(b"last words", [])]
    with pytest.raises(EOFError):
        ends.receiver.receive()


def test_bytes_that_the_socket_does_not_take_wait(ends: Ends) -> None:
    payload = bytes(4 << 20)
    ends.sender.send(payload, [0])
    assert ends.sender.pending
    got: list[tuple[bytes, list[int]]] = []
    while not got:
        ends.sender.flush()
        got = ends.receiver.receive()
    assert got[0][0] == payload
    os.close(got[0][1][0])
    assert ends.sender.pending == 0


def test_a_bad_descriptor_leaves_no_copies_of_the_good_ones(ends: Ends) -> None:
    before = count()
    with pytest.raises(OSError, match="descriptor"):
        ends.sender.send(b"x", [0, 1, 1 << 20])
    assert count() == before
    assert ends.sender.pending == 0


def test_close_closes_descriptors_on_their_way(ends: Ends) -> None:
    before = count()
    send_raw(ends.raw, struct.pack("<I", 100) + b"half", [0, 1])
    assert ends.receiver.receive() == []
    assert count() == before + 2
    ends.receiver.close()
    assert count() == before - 1  # the socket is closed, too


# ── hostile peers ─────────────────────────────────────────────────────────────────────────────────────────


def test_client_announces_a_frame_of_four_gigabytes(ends: Ends) -> None:
    ends.raw.sendall(b"\xff\xff\xff\xff")
    with pytest.raises(ProtocolError, match="4294967295 bytes"):
        ends.receiver.receive()


def test_client_sends_good_frames_with_descriptors_before_a_bad_one(ends: Ends) -> None:
    """The good ones are delivered, because the receiver has to close their descriptors."""
    send_raw(ends.raw, struct.pack("<I", 2) + b"ok", [0])
    ends.raw.sendall(b"\xff\xff\xff\xff")
    ((payload, fds),) = ends.receiver.receive()
    assert payload == b"ok"
    os.close(fds[0])
    with pytest.raises(ProtocolError):
        ends.receiver.receive()
    with pytest.raises(ProtocolError):
        ends.receiver.receive()


def test_client_sends_more_descriptors_than_allowed(ends: Ends) -> None:
    before = count()
    send_raw(ends.raw, struct.pack("<I", 2) + b"ok", [0] * (MAX_FDS + 1))
    with pytest.raises(ProtocolError, match=f"more than {MAX_FDS}"):
        ends.receiver.receive()
    assert count() == before


def test_client_collects_descriptors_in_a_frame_that_never_ends(ends: Ends) -> None:
    before = count()
    ends.raw.sendall(struct.pack("<I", 1000))
    for _ in range(60):
        send_raw(ends.raw, b"x", [0] * MAX_FDS)
    with pytest.raises(ProtocolError, match="descriptors"):
        ends.receiver.receive()
    assert count() <= before + 3 * MAX_FDS
    ends.receiver.close()
    assert count() == before - 1


def test_client_sends_an_endless_frame_as_fast_as_it_is_read(ends: Ends) -> None:
    """One `receive` reads no more than a bounded number of bytes."""
    ends.raw.setblocking(False)
    ends.raw.sendall(struct.pack("<I", 1 << 24))
    original = FrameSocket._fill
    turns = 0

    def fill(self: FrameSocket) -> bool:
        nonlocal turns
        turns += 1
        assert turns < 1000
        try:
            while True:
                ends.raw.send(bytes(1 << 16))
        except BlockingIOError:
            return original(self)

    FrameSocket._fill = fill  # type: ignore[method-assign]
    try:
        assert ends.receiver.receive() == []
    finally:
        FrameSocket._fill = original  # type: ignore[method-assign]


@given(st.binary(max_size=4000), st.integers(0, 1 << 30))
@settings(max_examples=60)
def test_client_sends_noise(noise: bytes, seed: int) -> None:
    before = count()
    ends = Ends(max_frame=1000)
    chance = random.Random(seed)
    try:
        at = 0
        while at < len(noise):
            piece = noise[at : at + chance.randint(1, 500)]
            at += len(piece)
            send_raw(ends.raw, piece, [0] * chance.randint(1, 3)) if chance.random() < 0.3 else ends.raw.sendall(piece)
            if chance.random() < 0.5:
                for _, fds in ends.receiver.receive():
                    for fd in fds:
                        os.close(fd)
    except ProtocolError:
        pass
    finally:
        ends.close()
    assert count() == before
