"""Length-prefixed frames, with descriptors, over a Unix stream socket.

    frame = u32 little-endian length, payload

The control socket uses this, and so do kernel and supervisor. Descriptors travel with the first bytes of the frame they
belong to, at most `MAX_FDS` of them. One recvmsg may return the bytes of several sends. Linux ends it behind a send
that carried descriptors, so these belong to the frame in which the last byte received lies.

Only `recv_blocking` blocks. What the socket does not take waits in an outbox. The caller must close the descriptors
that `receive` returns; those of frames that are never returned are closed here.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Sequence

from libaios import wire
from libaios.ring import ProtocolError

__all__ = ["MAX_FDS", "FrameSocket", "ProtocolError"]

MAX_FDS = 10
MAX_OUTBOX = 128 << 20
_LENGTH = struct.Struct("<I")
_CHUNK = 1 << 12  # bytes that are read at once: some small frames,
_CHUNK_MAX = 1 << 18  # … or this much of a large one
_TURN = 1 << 20  # bytes read in one `receive`, so that a peer that writes as fast as we read cannot hold us
_ANCILLARY = socket.CMSG_SPACE(MAX_FDS * 4)
# As plain numbers: an enum costs as much as the rest of a read.
_SEND_FLAGS = int(socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
_RECV_FLAGS = int(socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)
_TRUNCATED = int(socket.MSG_CTRUNC)


class FrameSocket:
    """One connected socket; owns it. One thread at a time."""

    def __init__(self, sock: socket.socket, max_frame: int = wire.MAX_FRAME, max_outbox: int = MAX_OUTBOX) -> None:
        self._sock = sock
        self.max_frame = max_frame
        self.max_fds = MAX_FDS
        self._max_outbox = max_outbox
        self._in = bytearray()
        self._consumed = 0  # bytes of the stream before those in `_in`
        # Descriptors, each list with the position in the stream of the byte that it came with.
        self._in_fds: deque[tuple[int, list[int]]] = deque()
        self._out: deque[tuple[memoryview, list[int]]] = deque()
        self._emptied = False  # the last read left room, so there was no more: a poll of the socket reports more
        self._eof = False
        self._broken = ""  # how the peer broke the protocol
        self.pending = 0  # bytes in the outbox

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        """Close the socket and every descriptor that has not been sent or returned. May be called again."""
        self._sock.close()
        for _, fds in [*self._out, *self._in_fds]:
            _close(fds)
        self._out.clear()
        self._in_fds.clear()
        self.pending = 0

    def shutdown(self) -> None:
        """Hang up, from any thread; a thread that waits for the socket wakes."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    # ── sending ───────────────────────────────────────────────────────────────────────────────────────────

    def send(self, payload: bytes, fds: Sequence[int] = ()) -> None:
        """Send a frame; what the socket does not take now waits in the outbox. `fds` are duplicated, so the caller may
        close its own. Raises BufferError when the outbox would grow beyond its limit, OSError when the peer is gone.
        """
        if self.pending + len(payload) > self._max_outbox:
            raise BufferError(f"{self.pending} bytes wait to be sent already")
        data = memoryview(_LENGTH.pack(len(payload)) + payload)
        if not self._out:
            sent = self._offer(data, fds)
            if sent == len(data):
                return
            if sent:
                data, fds = data[sent:], ()
        copies: list[int] = []
        try:
            for fd in fds:
                copies.append(os.dup(fd))
        except OSError:
            _close(copies)
            raise
        self._out.append((data, copies))
        self.pending += len(data)
        self.flush()

    def flush(self) -> bool:
        """Send as much as the socket takes. True: the outbox is empty."""
        while self._out:
            data, fds = self._out[0]
            sent = self._offer(data, fds)
            if not sent:
                return False
            _close(fds)
            self.pending -= sent
            if sent == len(data):
                self._out.popleft()
            else:
                self._out[0] = (data[sent:], [])
        return True

    def _offer(self, data: memoryview, fds: Sequence[int]) -> int:
        """Send without blocking; return how many bytes the socket took. The descriptors go with the first byte."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            return self._sock.sendmsg([data], rights, _SEND_FLAGS)
        except (BlockingIOError, InterruptedError):
            return 0

    # ── receiving ─────────────────────────────────────────────────────────────────────────────────────────

    @property
    def assembling(self) -> int:
        """Bytes held here: of a frame that is not complete yet, and of frames beyond the `limit` of a `receive`."""
        return len(self._in)

    @property
    def held_fds(self) -> int:
        """The number of descriptors that came with these bytes."""
        return sum(len(fds) for _, fds in self._in_fds)

    def receive(self, limit: int | None = None) -> list[tuple[bytes, list[int]]]:
        """The complete frames that are here now, with their descriptors; `limit` of them at most. If there are that
        many, call again: the socket does not become readable for frames that have been read from it already.

        Raises EOFError when the peer has hung up and all it sent was delivered, ProtocolError for a frame or a number
        of descriptors beyond the limits, OSError (EMFILE) when there is no room for descriptors.
        """
        frames: list[tuple[bytes, list[int]]] = []
        stop = self._consumed + len(self._in) + _TURN
        self._emptied = False
        while True:
            self._split(frames, limit)
            full = limit is not None and len(frames) >= limit
            if full or (frames and (self._eof or self._broken or self._emptied)):
                return frames
            if self._broken:
                raise ProtocolError(self._broken)
            if self._eof:
                raise EOFError("the peer hung up")
            try:
                if self._consumed + len(self._in) >= stop or not self._fill():
                    return frames
            except OSError:
                for _, fds in frames:
                    _close(fds)
                raise

    def _fill(self) -> bool:
        """Read from the socket. False: there is nothing to read."""
        wanted = _LENGTH.unpack_from(self._in)[0] - len(self._in) if len(self._in) >= _LENGTH.size else 0
        room = max(_CHUNK, min(wanted + _LENGTH.size, _CHUNK_MAX))
        try:
            data, ancillary, flags, _ = self._sock.recvmsg(room, _ANCILLARY, _RECV_FLAGS)
        except (BlockingIOError, InterruptedError):
            return False
        except ConnectionError:
            self._eof = True
            return True
        fds: list[int] = []
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.extend(array.array("i", content[: len(content) & ~3]))
        if flags & _TRUNCATED:
            few = len(fds) < MAX_FDS
            _close(fds)
            if few:
                raise OSError(errno.EMFILE, "no room for the descriptors that came with a frame")
            self._broken = f"more than {MAX_FDS} descriptors with a frame"
            return True
        self._in += data
        self._emptied = len(data) < room and not fds
        if fds:
            # All complete frames were cut off before this, so what is in the queue belongs to one unfinished frame.
            self._in_fds.append((self._consumed + len(self._in) - 1, fds))
            if sum(len(some) for _, some in self._in_fds) > 2 * self.max_fds:
                self._broken = f"more than {self.max_fds} descriptors with a frame"
        self._eof = not data
        return True

    def _split(self, frames: list[tuple[bytes, list[int]]], limit: int | None) -> None:
        """Cut complete frames off the bytes that were read."""
        buffer = self._in
        while not self._broken and len(buffer) >= _LENGTH.size and (limit is None or len(frames) < limit):
            (length,) = _LENGTH.unpack_from(buffer)
            if length > self.max_frame:
                self._broken = f"a frame of {length} bytes; the limit is {self.max_frame}"
                return
            end = _LENGTH.size + length
            if len(buffer) < end:
                return
            payload = bytes(memoryview(buffer)[_LENGTH.size : end])
            del buffer[:end]
            self._consumed += end
            fds: list[int] = []
            while self._in_fds and self._in_fds[0][0] < self._consumed:
                fds += self._in_fds.popleft()[1]
            if len(fds) > MAX_FDS:
                _close(fds)
                self._broken = f"more than {MAX_FDS} descriptors with a frame"
                return
            frames.append((payload, fds))

    def recv_blocking(self, timeout: float | None = None) -> tuple[bytes, list[int]]:
        """The next frame; TimeoutError after `timeout` seconds, EOFError and ProtocolError as `receive`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN)
        while True:
            frames = self.receive(1)
            if frames:
                return frames[0]
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError("no frame in time")
            poll.poll(None if left is None else left * 1000)


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
    fds.clear()
