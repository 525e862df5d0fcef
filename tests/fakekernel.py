"""Kernels whose behaviour a test sets: one on a channel, one on a control socket. Neither has a thread: a test takes
requests and sends replies in its own thread, and makes the SDK's calls in others (`aside`)."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec

from libaios import agent, wire
from libaios.agent import AgentTransport
from libaios.channel import Channel, Side, make_channel, raise_epoch
from libaios.connection import Connection
from libaios.stream import FrameSocket

PATIENCE_S = 30.0  # only a fault takes so long


def aside(function: Callable[..., Any], *args: Any) -> Future[Any]:
    """Run a function in a thread of its own; returns a future."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as err:
            future.set_exception(err)

    threading.Thread(target=run, daemon=True).start()
    return future


def args_of(request: wire.Request) -> Any:
    return wire.decode_args[request.sys](request.args)


class Replies:
    """Replies, which both kinds of kernel send."""

    def send(self, payload: bytes) -> None:
        raise NotImplementedError

    def poll(self, timeout: float) -> list[wire.Request]:
        raise NotImplementedError

    def __init__(self) -> None:
        self.taken: list[wire.Request] = []

    def take(self, sys: int | None = None) -> wire.Request:
        """Wait for the next request (with this number)."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.taken:
            assert time.monotonic() < deadline, "no request came"
            self.taken += self.poll(0.2)
        request = self.taken.pop(0)
        assert sys is None or request.sys == sys, request
        return request

    def quiet(self) -> bool:
        """Whether no request has arrived."""
        self.taken += self.poll(0.0)
        return not self.taken

    def reply(self, request: wire.Request, body: object) -> None:
        self.send(wire.encode(wire.Reply(request.id, body=wire.raw(body))))

    def fail(self, request: wire.Request, code: int, message: str) -> None:
        self.send(wire.encode(wire.Reply(request.id, code, body=wire.raw(wire.Failure(message)))))

    def piece(self, request: wire.Request, offset: int, text: str, tokens: list[int]) -> None:
        self.send(wire.encode(wire.Reply(request.id, 0, True, offset, wire.raw(wire.Piece(text, tokens)))))

    def end(self, request: wire.Request, text: str = "", tokens: list[int] | None = None) -> None:
        self.reply(request, wire.Generated(text, tokens or [], "stop", wire.Usage()))


class ChannelKernel(Replies):
    """The kernel's side of one agent's channel."""

    def __init__(self, ring_bytes: int = 1 << 16) -> None:
        super().__init__()
        memfd, bell, agent_bell = make_channel(ring_bytes, ring_bytes)
        self.memfd, self.bell = os.dup(memfd), os.dup(bell)
        self.channel = Channel(memfd, bell, Side.KERNEL)
        self.connection = Connection(AgentTransport(os.dup(memfd), agent_bell))

    def send(self, payload: bytes) -> None:
        self.channel.send(payload)

    def poll(self, timeout: float) -> list[wire.Request]:
        if not self.channel.more:
            self.channel.wait(timeout)
        self.channel.pump()
        return [wire.decode_request(frame) for frame in self.channel.receive()]

    @contextlib.contextmanager
    def one_bell(self) -> Iterator[None]:
        """The agent finds all that is sent in this block at once."""
        items, sleeps = self.channel._segment.items, self.channel._producer.sleeps
        items[sleeps] = 0
        yield
        os.write(self.bell, b"!")

    def die(self) -> None:
        """End as by kill -9: requests that were taken but not answered are lost."""
        self.channel.close()
        self.taken.clear()

    def rise(self) -> None:
        """Start a new kernel on the channel, as the supervisor does."""
        raise_epoch(self.memfd)
        self.channel = Channel(os.dup(self.memfd), os.dup(self.bell), Side.KERNEL)

    def hang_up(self) -> None:
        """Close the kernel's end for good, as when the system ends."""
        self.channel.close()
        if self.bell >= 0:
            os.close(self.bell)
        self.bell = -1

    def serve(self, answer: Callable[[wire.Request], object]) -> Callable[[], None]:
        """Answer every request from a thread, until the returned function is called."""
        stop = threading.Event()

        def loop() -> None:
            while not stop.is_set() and not self.channel.hung_up:
                for request in self.poll(0.05):
                    self.reply(request, answer(request))

        thread = threading.Thread(target=loop)
        thread.start()

        def end() -> None:
            stop.set()
            thread.join()

        return end

    def close(self) -> None:
        self.connection.close()
        self.hang_up()
        os.close(self.memfd)


@contextlib.contextmanager
def as_process_connection(connection: Connection) -> Iterator[None]:
    """Let `libaios.*` use this connection in this block."""
    assert agent._connection is None
    agent._connection = connection
    try:
        yield
    finally:
        agent._connection = None


class SocketKernel(Replies):
    """A control socket with one client at a time."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        folder = os.open(path.parent, os.O_PATH)
        try:
            self.listener.bind(f"/proc/self/fd/{folder}/{path.name}")
        finally:
            os.close(folder)
        self.listener.listen(8)
        self.path = path
        self.boot = "boot"
        self.frames: FrameSocket | None = None
        self.hello: wire.Hello | None = None

    def accept(self) -> wire.Hello:
        """Accept a client and read its Hello."""
        self.listener.settimeout(PATIENCE_S)
        sock, _ = self.listener.accept()
        self.frames = FrameSocket(sock)
        payload, _ = self.frames.recv_blocking(PATIENCE_S)
        self.hello = msgspec.msgpack.decode(payload, type=wire.Hello)
        return self.hello

    def welcome(self, client: int = 7) -> None:
        hello = self.accept()
        self.send(wire.encode(wire.Welcome(wire.VERSION, self.boot, hello.client or client, "9.9")))

    def send(self, payload: bytes) -> None:
        assert self.frames is not None
        self.frames.send(payload)
        while not self.frames.flush():
            select.select([], [self.frames.fileno()], [], PATIENCE_S)

    def poll(self, timeout: float) -> list[wire.Request]:
        assert self.frames is not None
        select.select([self.frames.fileno()], [], [], timeout)
        got = self.frames.receive()
        for _, fds in got:
            for fd in fds:
                os.close(fd)
        return [wire.decode_request(payload) for payload, _ in got]

    def die(self) -> None:
        assert self.frames is not None
        self.frames.close()
        self.taken.clear()

    def close(self) -> None:
        if self.frames is not None:
            self.frames.close()
        self.listener.close()
        self.path.unlink(missing_ok=True)
