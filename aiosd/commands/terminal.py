"""The connection between a terminal and an attached agent: relays, raw mode, window size.

An agent has its own session, so the terminal's job control does not reach it: nothing would stop it from reading input
that is typed for another program. Therefore an agent never gets the terminal as stdin. Input goes through a pipe, or
with `-t` through a pseudo-terminal, and only while this process is in the foreground.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import struct
import termios
import tty
from collections.abc import Callable

LIMIT = 1 << 16  # if the reader is this many bytes behind, no more is read
CHUNK = select.PIPE_BUF  # after POLLOUT a write of this size does not block, though the pipe is a blocking one
LAST_BYTES = 1 << 20  # more than a pseudo-terminal holds
EOT = b"\x04"


class Ended(Exception):
    """Raised by the signals that end a program which shows pictures on the terminal."""


class Relay:
    """Bytes from one descriptor to another, as fast as the slower one goes.

    The loop of `aios-run` runs it: `interests` returns what to poll for, `step` gets the result of the poll. At the end
    of the input, or when the output has no reader, it calls `at_end` once and is `done`.
    """

    def __init__(
        self,
        source: int,
        sink: int,
        allowed: Callable[[], bool] = lambda: True,
        at_end: Callable[[], None] = lambda: None,
        unread: Callable[[], None] = lambda: None,
        last_words: bytes = b"",
    ) -> None:
        self.source = source
        self.sink = sink
        self.allowed = allowed  # asked before each read
        self.done = False
        self._at_end = at_end
        self._unread = unread  # called when the output has no reader any more
        # Written after the end of the input; twice if the last line has no end. After such a line a terminal takes the
        # first EOT as "pass on what was typed so far"; only an EOT at the beginning of a line means the end.
        self._last_words = last_words
        self._in_line = False
        self._read_bytes = 0
        self._buffer = bytearray()
        self._source_ended = False

    def interests(self) -> list[tuple[int, int]]:
        wanted = []
        if not self.done and not self._source_ended and len(self._buffer) < LIMIT and self.allowed():
            wanted.append((self.source, select.POLLIN))
        if not self.done and self._buffer:
            wanted.append((self.sink, select.POLLOUT))
        return wanted

    def step(self, ready: dict[int, int]) -> None:
        if self.done:
            return
        if ready.get(self.source) and not self._source_ended and len(self._buffer) < LIMIT and self.allowed():
            self._read()
        if self._buffer and ready.get(self.sink):  # only after poll: a write to a blocking stdout could wait
            self._write()
        if self._source_ended and not self._buffer:
            self._end()

    def drain(self, timeout_s: float) -> None:
        """After the agent's end: pass on the output that is still there. It is given up if the reader takes nothing for
        `timeout_s`, or if another process that has the terminal open writes on and on."""
        last = self._read_bytes + LAST_BYTES
        while not self.done:
            self._source_ended = self._source_ended or self._read_bytes >= last
            poll = select.poll()
            for fd, mask in self.interests():
                poll.register(fd, mask)
            ready = dict(poll.poll(timeout_s * 1000 if self._buffer else 0))
            if not ready:
                return
            self.step(ready)

    def _read(self) -> None:
        try:
            data = os.read(self.source, CHUNK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as err:
            if err.errno == errno.EIO and not self.allowed():
                return  # this process was sent to the background just before the read
            data = b""  # EIO: the other side of a pty, or the terminal itself, is gone
        if data:
            self._buffer += data
            self._read_bytes += len(data)
            self._in_line = not data.endswith(b"\n")
        else:
            self._source_ended = True
            self._buffer += self._last_words * (2 if self._in_line else 1)

    def _write(self) -> None:
        try:
            n = os.write(self.sink, self._buffer[:CHUNK])
        except (BlockingIOError, InterruptedError):
            return
        except OSError:  # EPIPE, EIO: no reader
            self._buffer.clear()
            if not self._source_ended:
                self._unread()
            self._end()
        else:
            del self._buffer[:n]

    def _end(self) -> None:
        if not self.done:
            self.done = True
            self._at_end()


def in_foreground(fd: int) -> bool:
    """Whether what is typed at terminal `fd` is meant for this process. Also true if it is not our controlling
    terminal: then there is no job control."""
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:
        return True


class RawMode:
    """Lets a terminal pass every key on unchanged, from `enter` to `leave`. A second `enter` does nothing. With
    `tty.setcbreak` as mode keys come at once, too, and Ctrl-C and Ctrl-Z are still signals."""

    def __init__(self, fd: int, mode: Callable[[int, int], object] = tty.setraw) -> None:
        self.fd = fd
        self._mode = mode
        self._saved: list[object] | None = None

    @property
    def entered(self) -> bool:
        return self._saved is not None

    def enter(self) -> None:
        if self._saved is None:
            saved = termios.tcgetattr(self.fd)
            _retry(lambda: self._mode(self.fd, termios.TCSADRAIN))
            self._saved = saved

    def leave(self) -> None:
        if self._saved is not None:
            saved, self._saved = self._saved, None
            with contextlib.suppress(termios.error):  # the terminal is gone
                _retry(lambda: termios.tcsetattr(self.fd, termios.TCSADRAIN, saved))  # type: ignore[arg-type]


def _retry(act: Callable[[], object]) -> None:
    """Repeat it when a signal interrupted it: Python does that for other system calls, but not in termios."""
    while True:
        try:
            act()
            return
        except termios.error as err:
            if err.args[0] != errno.EINTR:
                raise


def open_pty(like: int | None) -> tuple[int, int]:
    """A pseudo-terminal with the modes and the size of the terminal `like`."""
    master, slave = os.openpty()
    os.set_blocking(master, False)
    if like is not None:
        termios.tcsetattr(slave, termios.TCSANOW, termios.tcgetattr(like))
        copy_size(like, master)
    return master, slave


def copy_size(source: int, target: int) -> None:
    with contextlib.suppress(OSError):
        size = fcntl.ioctl(source, termios.TIOCGWINSZ, struct.pack("4H", 0, 0, 0, 0))
        fcntl.ioctl(target, termios.TIOCSWINSZ, size)
