"""The relays between a terminal and an attached agent, piece by piece: no agent, no aiosd."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import termios
from collections.abc import Callable, Iterator

import pytest

from aiosd.commands.terminal import CHUNK, EOT, LIMIT, Relay, open_pty


@pytest.fixture
def held() -> Iterator[Callable[..., int]]:
    """Descriptors that are closed after the test if they are still open."""
    fds: list[int] = []

    def hold(fd: int) -> int:
        fds.append(fd)
        return fd

    yield hold
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


Hold = Callable[[int], int]


def pipe(hold: Hold) -> tuple[int, int]:
    reading, writing = os.pipe()
    return hold(reading), hold(writing)


def fill(writing: int) -> int:
    """Write until nothing more fits; returns how much was written."""
    os.set_blocking(writing, False)
    written = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            written += os.write(writing, bytes(CHUNK))
    os.set_blocking(writing, True)
    return written


def turn(*relays: Relay, timeout_s: float = 0.0) -> dict[int, int]:
    """One turn, as in the loop of aios-run."""
    interests: dict[int, int] = {}
    for relay in relays:
        for fd, mask in relay.interests():
            interests[fd] = interests.get(fd, 0) | mask
    poll = select.poll()
    for fd, mask in interests.items():
        poll.register(fd, mask)
    ready = dict(poll.poll(timeout_s * 1000))
    for relay in relays:
        relay.step(ready)
    return ready


INPUTS = {
    "nothing": (b"", b""),
    "a line": (b"abc\n", b"abc\r\n"),
    "an unfinished line": (b"abc", b"abc"),
    "a line and an unfinished one": (b"one\ntwo", b"one\r\ntwo"),
}


@pytest.mark.deadline(30)
@pytest.mark.parametrize(("typed", "shown"), INPUTS.values(), ids=INPUTS)
def test_the_end_of_the_input_is_one_for_a_terminal(held: Hold, typed: bytes, shown: bytes) -> None:
    master, slave = map(held, open_pty(None))
    modes = termios.tcgetattr(slave)
    modes[3] &= ~termios.ECHO
    termios.tcsetattr(slave, termios.TCSANOW, modes)
    source, typing = pipe(held)
    output, printing = pipe(held)
    os.write(typing, typed)
    os.close(typing)
    cat = subprocess.Popen(["cat"], stdin=slave, stdout=slave, start_new_session=True)
    os.close(slave)
    try:
        relays = Relay(source, master, last_words=EOT), Relay(master, printing)
        while not relays[1].done:  # until cat has ended: that closes the terminal
            turn(*relays, timeout_s=1.0)
    finally:
        cat.kill()
        cat.wait()
    os.close(printing)
    assert os.read(output, 100) == shown


def test_an_end_is_sent_twice_only_after_an_unfinished_line(held: Hold) -> None:
    """A program that reads on after an end of file would get a second one."""
    for typed, passed_on in ((b"", EOT), (b"abc\n", b"abc\n" + EOT), (b"abc", b"abc" + EOT + EOT)):
        source, typing = pipe(held)
        output, printing = pipe(held)
        os.write(typing, typed)
        os.close(typing)
        relay = Relay(source, printing, last_words=EOT)
        while not relay.done:
            turn(relay)
        assert os.read(output, 100) == passed_on


@pytest.mark.deadline(30)
def test_a_reader_that_does_not_read_is_not_waited_for(held: Hold) -> None:
    source, typing = pipe(held)
    output, printing = pipe(held)
    filled = fill(printing)
    os.write(typing, b"more")
    relay = Relay(source, printing)
    assert turn(relay) == {source: select.POLLIN}  # comes back, though the pipe is full
    assert turn(relay) == {}
    while filled:
        filled -= len(os.read(output, filled))
    turn(relay)
    assert os.read(output, 100) == b"more"


@pytest.mark.deadline(30)
def test_no_more_is_written_than_fits(held: Hold) -> None:
    """A pipe that poll reports as writable may have room for only one page."""
    source, typing = pipe(held)
    output, printing = pipe(held)
    relay = Relay(source, printing)
    fill(printing)
    while len(relay._buffer) < LIMIT:
        os.write(typing, bytes(CHUNK))
        turn(relay)
    for _ in range(3):
        os.read(output, CHUNK)
        assert turn(relay) == {printing: select.POLLOUT}
        assert turn(relay).get(printing) is None


@pytest.mark.deadline(30)
def test_the_last_output_is_passed_on(held: Hold) -> None:
    source, typing = pipe(held)
    output, printing = pipe(held)
    ends: list[str] = []
    relay = Relay(source, printing, at_end=lambda: ends.append("end"))
    os.write(typing, b"last")
    relay.drain(60.0)  # no more data, and the writer is open: it returns at once
    assert (os.read(output, 100), ends) == (b"last", [])
    os.write(typing, b"words")
    os.close(typing)
    relay.drain(60.0)
    assert (os.read(output, 100), ends) == (b"words", ["end"])


@pytest.mark.deadline(30)
def test_the_last_output_does_not_wait_for_ever_for_a_reader(held: Hold) -> None:
    source, typing = pipe(held)
    _, printing = pipe(held)
    fill(printing)
    os.write(typing, b"last words")
    os.close(typing)
    relay = Relay(source, printing)
    relay.drain(0.01)
    assert not relay.done


@pytest.mark.deadline(30)
def test_the_last_output_has_an_end_though_a_process_writes_on(held: Hold) -> None:
    relay = Relay(held(os.open("/dev/zero", os.O_RDONLY)), held(os.open(os.devnull, os.O_WRONLY)))
    relay.drain(60.0)


def test_only_a_reader_that_has_gone_is_reported(held: Hold) -> None:
    """An agent that closes its terminal or ends has not lost its reader, and gets no HUP."""
    told: list[str] = []
    source, writing = pipe(held)
    _, sink = pipe(held)
    relay = Relay(source, sink, unread=lambda: told.append("ended"))
    os.close(writing)
    relay.step({source: select.POLLIN})
    assert relay.done
    source, writing = pipe(held)
    reading, sink = pipe(held)
    relay = Relay(source, sink, unread=lambda: told.append("gone"))
    os.close(reading)
    os.write(writing, b"x")
    relay.step({source: select.POLLIN, sink: select.POLLOUT})
    assert relay.done
    assert told == ["gone"]
