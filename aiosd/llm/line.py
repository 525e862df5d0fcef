"""A core's line to the kernel: the channel, as the core's process and its backend use it."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from aiosd.ipc import link
from libaios import wire

#: If more bytes than this wait for the kernel, it reads slowly: then tokens are collected and reported later.
CONGESTED = 256 << 10

#: The largest answer (bytes) that fits into one frame on its way to the caller.
MAX_ANSWER = wire.MAX_FRAME - 1024

_MESSAGES_AT_ONCE = 64
_DRAIN_S = 2.0


class KernelChannel(Protocol):
    """The part of `libaios.channel.Channel` that a core uses."""

    outbox_bytes: int
    hung_up: bool
    more: bool

    @property
    def reborn(self) -> bool: ...
    def renew(self) -> None: ...
    def ready(self) -> bool: ...
    def receive(self, limit: int) -> list[bytes]: ...
    def send(self, payload: bytes) -> None: ...
    def pump(self) -> bool: ...
    def wait(self, timeout: float | None, also: Sequence[int] = ()) -> bool: ...


class Line:
    """`name`: the model's, for sentences."""

    def __init__(self, channel: KernelChannel, name: str) -> None:
        self.channel = channel
        self._name = name
        self._early: list[link.ToService] = []  # messages that `cancelled` took
        self._cancelled: set[link.CallKey] = set()  # calls that are cancelled by these

    # ── for backends ──────────────────────────────────────────────────────────────────────────────────────

    def send(self, message: link.FromService) -> None:
        self.channel.send(link.encode(message))

    def answer(self, key: link.CallKey, body: object, prompt_tokens: int = 0) -> None:
        """The reply to an `Ask`. `prompt_tokens` are charged."""
        encoded = wire.encode(body)
        if len(encoded) > MAX_ANSWER:
            self.refuse(key, wire.error(errno.EMSGSIZE, f"an answer of {len(encoded)} bytes; ask for less at a time"))
        else:
            self.send(link.Answered(key, encoded, prompt_tokens))

    def refuse(self, key: link.CallKey, error: OSError, elsewhere: bool = False, short: str = "") -> None:
        """The end of any call that cannot be served. `elsewhere` and `short`: see `link.Failed`."""
        self.send(link.Failed(key, error.errno or errno.EINVAL, error.strerror or str(error), elsewhere, short))

    def progress(self, what: str, fraction: float) -> None:
        """Report how far the opening of the backend is: what it does, and the part that is done (0 to 1)."""
        self.send(link.LoadProgress(what, fraction))

    def congested(self) -> bool:
        """Does the kernel read too slowly? Then reports can wait."""
        return self.channel.outbox_bytes > CONGESTED

    def cancelled(self) -> set[link.CallKey]:
        """For a backend in the middle of a long step: the calls that have been cancelled meanwhile. The messages
        themselves are handled after the step."""
        if self.channel.ready() and len(self._early) < _MESSAGES_AT_ONCE:
            for message in self._received():
                self._early.append(message)
                if isinstance(message, link.CancelCall):
                    self._cancelled.add(message.key)
        return self._cancelled

    def give_up(self, why: str) -> int:
        """The model cannot be loaded, and the process must end now. Returns its exit code."""
        self.send(link.LoadFailed(f"{self._name}: {why}".replace("\n", " ")))
        self.drain()
        return 1

    def die(self, why: str) -> None:
        """The same from a place from which nothing returns."""
        os._exit(self.give_up(why))

    # ── for the process ───────────────────────────────────────────────────────────────────────────────────

    def messages(self) -> Iterator[link.ToService]:
        """The messages that have come, in order."""
        early, self._early = self._early, []
        self._cancelled.clear()
        yield from early
        yield from self._received()

    def _received(self) -> Iterator[link.ToService]:
        return map(link.decode_to_service, self.channel.receive(_MESSAGES_AT_ONCE))

    @property
    def has_mail(self) -> bool:
        return bool(self._early) or self.channel.ready()

    def drain(self) -> None:
        """Send what is still unsent before the process ends."""
        channel, deadline = self.channel, time.monotonic() + _DRAIN_S
        while channel.outbox_bytes and not channel.hung_up and time.monotonic() < deadline:
            channel.wait(0.05)
            channel.pump()
