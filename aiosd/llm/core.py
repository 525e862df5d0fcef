"""The core's process: it receives the kernel's messages, lets its backend work, and sends the results back.

`main` runs in a process that the supervisor has forked. Its exit code is 0 after `link.Quit` or when the kernel's end
of the channel is closed for good, and 1 after `link.LoadFailed`. Any other exception is a bug: its trace goes to
stderr, and the supervisor starts a new core. SIGINT is ignored: Ctrl-C is meant for the foreground process.

While there is work, the loop does not wait: it checks for messages between two steps, which costs a read of shared
memory. Without work it sleeps until a message comes, or a descriptor of the backend becomes readable.
"""

from __future__ import annotations

import faulthandler
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from aiosd.errors import AiosdError
from aiosd.ipc import link
from aiosd.ipc.heartbeat import Rounds
from aiosd.llm.backend import Backend, opened
from aiosd.llm.line import KernelChannel, Line
from aiosd.llm.spec import ModelSpec

_SLEEP = 5.0  # seconds of sleep without work; any message wakes the core at once
_LOOK_EVERY = 0.05  # seconds between two checks for a hang-up while busy


def main(channel: KernelChannel, spec: ModelSpec, rounds: Rounds) -> int:
    """Load the model, serve, return the exit code. `rounds` is called when a round of the loop begins and ends."""
    faulthandler.enable(sys.stderr)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    line = Line(channel, spec.name)
    try:
        backend = opened(spec, line)
    except AiosdError as error:
        return line.give_up(str(error))
    return CoreProcess(line, backend).run(rounds)


class CoreProcess:
    """A backend and its line to the kernel."""

    def __init__(self, line: Line, backend: Backend) -> None:
        self._line = line
        self._backend = backend
        self._quit = False
        self._table: dict[type, Callable[[Any], None]] = {
            **backend.table,
            link.GetStats: lambda message: line.send(link.Stats(message.req, backend.stats())),
            link.Quit: lambda message: setattr(self, "_quit", True),
        }

    def run(self, rounds: Rounds) -> int:
        line, backend, channel = self._line, self._backend, self._line.channel
        line.send(link.Loaded(backend.info))
        looked = 0.0
        while not self._quit and not channel.hung_up:
            rounds.begin()
            now = time.monotonic()
            if line.has_mail or now - looked > _LOOK_EVERY:  # the second also detects a hang-up
                looked = now
                self._receive()
            if channel.outbox_bytes:
                channel.pump()
            backend.step()
            if not backend.has_work and not channel.more and not self._quit:
                rounds.end()
                channel.wait(_SLEEP, backend.fds())
                looked = 0.0
        backend.close()
        line.drain()
        return 0

    def _receive(self) -> None:
        for message in self._line.messages():
            self._table[type(message)](message)
        channel = self._line.channel
        if channel.reborn:  # a new kernel: it sends which calls to keep, and submits its open calls again
            channel.renew()
            self._line.send(link.Loaded(self._backend.info))
