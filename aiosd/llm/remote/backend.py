"""The backend of a remote model: the kernel's messages, the rounds of the loop, which request is sent next.

A call waits until the policy admits it, one of `concurrency` places is free, and rates and circuit breaker allow a
request. Then an attempt begins (`attempts`), an `Exchange` reads the answer, and each step sends its new pieces to the
kernel.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from aiosd.errors import UsageError
from aiosd.ipc import link
from aiosd.llm.line import Line
from aiosd.llm.remote import bill, keys
from aiosd.llm.remote.attempts import Attempts
from aiosd.llm.remote.bell import Bell
from aiosd.llm.remote.call import OutputText, RemoteCall
from aiosd.llm.remote.connections import RemoteEndpoint
from aiosd.llm.remote.limits import Circuit
from aiosd.llm.remote.queue import Queue
from aiosd.llm.remote.vectors import Vectors
from aiosd.llm.spec import ModelSpec
from libaios import wire
from libaios.wire import Sys

logger = logging.getLogger("llm.remote")

WAIT_BESIDE_OTHERS_S = 2.0  # how long a call for which other models are available waits for this one to recover
OPEN_PATIENCE_S = 30.0  # how long a call waits for an endpoint that fails all the time


def open_model(spec: ModelSpec, line: Line) -> Remote:
    """Make the backend. Raises UsageError. No request is sent: a system also starts without a network."""
    try:
        RemoteEndpoint.of(spec.url, spec.key_file).key()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"key_file {spec.key_file}: {reason}") from None
    if spec.key_file and not spec.key_file.startswith(keys.PREFIX) and os.stat(spec.key_file).st_mode & 0o044:
        logger.warning("key_file %s: other users of this machine can read it", spec.key_file)
    return Remote(spec, line)


class Remote:
    """`clock` and `rng` are there for tests."""

    def __init__(
        self,
        spec: ModelSpec,
        line: Line,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self._spec, self._line, self._clock = spec, line, clock
        self._bell = Bell()
        self._queue = Queue(clock)
        self._attempts = Attempts(spec, line, self._queue, self._bell, clock, rng or random.Random())
        self._url = self._attempts.endpoint.url
        self._pace = self._attempts.pace
        self._health = ""  # as last reported to the kernel
        self.info: dict[str, Any] = {
            "url": f"{self._url}#{spec.model}",
            "description": spec.model,
            "n_slots": spec.concurrency,
            "chat": True,
            "tools": True,
        }
        self.table: dict[type, Callable[[Any], None]] = {
            link.Submit: self._submit,
            link.Ask: self._ask,
            link.CancelCall: lambda message: self._cancel(message.key),
            link.Park: self._park,
            link.ParkCall: self._park_call,
            link.Keep: self._keep,
            link.PeerGone: lambda message: None,
            link.Renice: lambda message: self._queue.renice(message.peer, message.nice),
            link.Schedule: self._queue.reschedule,
        }

    # ── one round of the loop ─────────────────────────────────────────────────────────────────────────────

    @property
    def has_work(self) -> bool:
        return self._attempts.have_come or self._wait() == 0.0

    def step(self) -> None:
        self._bell.clear()
        self._attempts.step()
        self._admit()
        self._report_health()
        wait = self._wait()
        if wait:
            self._bell.ring_in(wait)

    def fds(self) -> Sequence[int]:
        return [self._bell.fileno()]

    def stats(self) -> dict[str, Any]:
        used, total = len(self._attempts.running), self._spec.concurrency
        return {
            "slots": {"total": total, "free": total - used, "used": used},
            "running": used,
            "waiting": len(self._queue.calls) - used,
            "policy": self._queue.policy.name,
            "circuit": self._pace.breaker.circuit,
            "last_failure": self._pace.breaker.why,
            **self._attempts.figures,
        }

    def close(self) -> None:
        self._bell.stop()
        self._attempts.close()
        self._bell.close()

    # ── which request is sent next ────────────────────────────────────────────────────────────────────────

    def _wait(self) -> float | None:
        """Seconds until there is work without an event; None: only an event brings work."""
        now, waits = self._clock(), []
        if self._attempts.free > 0:
            waits = [self._wait_of(call, now) for call in self._queue.waiting()]
        running = self._attempts.running.values()
        waits += [max(self._attempts.patience_until(call) - now, 0.0) for call in running]
        if self._health:
            waits.append(max(self._pace.wait(1, now), 0.01))
        return min(waits, default=None)

    def _report_health(self) -> None:
        """Report to the kernel whether calls would wait long here, so that routes can skip this model."""
        now = self._clock()
        why = ""
        if self._pace.wait(1, now) > (0.0 if self._health else WAIT_BESIDE_OTHERS_S):
            why = self._pace.trouble(now)
        if why != self._health:
            self._health = why
            self._line.send(link.Health(why))

    def _wait_of(self, call: RemoteCall, now: float) -> float:
        """Seconds for which the call's request may not be sent."""
        return max(call.not_before - now, self._pace.wait(call.prompt_estimate, now))

    def _admit(self) -> None:
        now, attempts, queue = self._clock(), self._attempts, self._queue
        while (free := attempts.free) > 0:
            ready = [call for call in queue.waiting() if not self._wait_of(call, now)]
            call = queue.next(ready, list(attempts.running.values()), free, now)
            if call is None:
                break
            attempts.begin(call, now)
        for call in queue.waiting():
            others = call.submit.others and not call.kept
            if others and self._wait_of(call, now) > WAIT_BESIDE_OTHERS_S:
                why = f"{self._url}: a call would have to wait for long"
                attempts.fail(call, errno.EAGAIN, why, elsewhere=True)
            elif self._pace.breaker.circuit is Circuit.OPEN and now - call.since > OPEN_PATIENCE_S:
                why = f"{self._url} fails again and again: {self._pace.breaker.why}"
                attempts.fail(call, errno.EIO, why, elsewhere=True)

    # ── messages ──────────────────────────────────────────────────────────────────────────────────────────

    def _submit(self, message: link.Submit) -> None:
        key, given = message.key, message.request.given
        count = len(given) if isinstance(given, str) else 0
        if (past := self._attempts.past.get(key, count)) is not None:
            self._line.send(past)
            return
        if key in self._queue.calls:
            self._go_on_from(self._queue.calls[key], count)
            return
        try:
            size = self._attempts.size_of(message.request)
        except OSError as error:
            self._line.refuse(key, error, elsewhere=True)
            return
        now = self._clock()
        come = OutputText(given if isinstance(given, str) else "")
        call = RemoteCall(message, now, message.nice, come, bill.estimate(size), now)
        call.account = self._attempts.purses.open(key, message.shares, now)
        self._queue.add(call, now)

    def _go_on_from(self, call: RemoteCall, count: int) -> None:
        """Continue a call for a new kernel, which has `count` characters of it, and no record of what was charged."""
        call.text.send_from(count)
        call.uncharged, call.counted = call.num_generated, 0
        self._line.send(link.Step(spent=[link.Spent(call.key, call.prompt_charged)]))
        self._queue.park_call(call, False)
        self._bell.ring()

    def _ask(self, ask: link.Ask) -> None:
        if ask.sys == Sys.EMBED:
            self._embed(ask, wire.decode_args[ask.sys](ask.args))
        elif ask.sys == Sys.CTX_CLOSE:  # there is nothing to close
            self._line.answer(ask.key, None)
        elif ask.sys == Sys.CTX_LIST:
            self._line.answer(ask.key, [])
        else:
            name = wire.TABLE[ask.sys].name
            self._line.refuse(ask.key, wire.error(errno.ENOSYS, f"{name}: not for a model that is served elsewhere"))

    def _embed(self, ask: link.Ask, request: wire.Embed) -> None:
        if ask.key in self._queue.calls:  # submitted again by a new kernel
            return
        if not request.texts:
            self._line.answer(ask.key, wire.Embedded(0, 0, b""))
            return
        now, caller, vectors = self._clock(), ask.caller, Vectors(request.texts)
        none = wire.Generate(stream=False)
        submit = link.Submit(ask.key, none, caller.nice, caller.group, caller.budget, shares=caller.shares)
        size = bill.estimate(sum(map(len, vectors.batch())))
        call = RemoteCall(submit, now, caller.nice, OutputText(""), size, now, vectors)
        call.account = self._attempts.purses.open(ask.key, caller.shares, now)
        self._queue.add(call, now)

    def _cancel(self, key: link.CallKey) -> None:
        self._attempts.past.forget(key)
        call = self._queue.calls.get(key)
        if call is not None:
            self._attempts.leave(call)

    def _park(self, message: link.Park) -> None:
        self._queue.park_peer(message.peer, message.parked)
        self._bell.ring()  # for events that came meanwhile, or the time at which it is to be cancelled
        if message.number:
            self._line.send(link.Parked(message.number))

    def _park_call(self, message: link.ParkCall) -> None:
        call = self._queue.calls.get(message.key)
        if call is not None:
            self._queue.park_call(call, message.parked)
            self._bell.ring()

    def _keep(self, message: link.Keep) -> None:
        kept = set(message.peers)
        for key in [key for key in (*self._queue.calls, *self._attempts.past) if key[0] not in kept]:
            self._cancel(key)
        self._queue.unpark_peers()
        self._bell.ring()
        self._health = ""  # a new kernel sends this and does not know the health
