"""The calls of a remote model: all open ones, which of them are parked, and which has its turn according to the
policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from aiosd.ipc import link
from aiosd.llm import policy
from aiosd.llm.remote.call import RemoteCall


class Queue:
    """All open calls. `clock`: in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.calls: dict[link.CallKey, RemoteCall] = {}  # waiting, parked and running
        self.policy: policy.SchedulingPolicy = policy.Fifo()
        self._clock = clock
        self._schedule: link.Schedule | None = None
        self._parked: set[int] = set()  # peers
        self._arrivals = 0

    def waiting(self) -> list[RemoteCall]:
        return [call for call in self.calls.values() if call.exchange is None and not call.parked]

    def next(
        self, ready: Sequence[RemoteCall], running: Sequence[RemoteCall], free: int, now: float
    ) -> RemoteCall | None:
        """The next of the calls that may begin. `free`: the number of free places."""
        admitted = self.policy.admit(ready, running, free, now) if ready else []
        return admitted[0] if admitted else None

    def add(self, call: RemoteCall, now: float) -> None:
        self._arrivals += 1
        call.order = self._arrivals
        self.calls[call.key] = call
        if call.peer in self._parked:
            call.parked_peer, call.parked_since = True, now
        else:
            self.policy.arrive(call, now)

    def remove(self, call: RemoteCall, now: float) -> None:
        del self.calls[call.key]
        self.policy.leave(call, now)

    # ── parking ───────────────────────────────────────────────────────────────────────────────────────────

    def park_peer(self, peer: int, parked: bool) -> None:
        (self._parked.add if parked else self._parked.discard)(peer)
        for call in self.calls.values():
            if call.peer == peer:
                self._set_parked(call, parked, call.parked_call)

    def park_call(self, call: RemoteCall, parked: bool) -> None:
        self._set_parked(call, call.parked_peer, parked)

    def unpark_peers(self) -> None:
        for call in self.calls.values():
            self._set_parked(call, False, call.parked_call)
        self._parked.clear()

    def _set_parked(self, call: RemoteCall, by_peer: bool, by_call: bool) -> None:
        """Set the flags. For the policy a parked call has left; its answer is not read further."""
        before = call.parked
        call.parked_peer, call.parked_call = by_peer, by_call
        if call.parked == before:
            return
        now = self._clock()
        call.parked_since = call.since = call.moved = now
        (self.policy.leave if call.parked else self.policy.arrive)(call, now)
        if call.exchange is not None:
            call.exchange.hold(call.parked)

    # ── reports to the policy ─────────────────────────────────────────────────────────────────────────────

    def renice(self, peer: int, nice: int) -> None:
        for call in self.calls.values():
            if call.peer == peer:
                call.nice = nice
                self.policy.renice(call, self._clock())

    def reschedule(self, schedule: link.Schedule) -> None:
        if schedule != self._schedule:
            self._schedule = schedule
            quantum = policy.Quantum(schedule.tokens, schedule.seconds)
            self.policy = policy.make(schedule.policy, quantum, schedule.shares)
            for call in self.calls.values():
                if not call.parked:
                    self.policy.arrive(call, self._clock())
