"""Calls for vectors and scores that are being computed, and which of them has its turn.

The embedder computes one batch of one call at a time. For the policy the embedder is a slot: the policy decides which
call has it, and which gives it up to one that waits. So a call with thousands of texts delays the calls of other agents
by one turn only. A call of a stopped agent has no turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from aiosd.ipc import link
from aiosd.llm import policy
from aiosd.llm.policy.contract import ANY_TURN, PROMPT_WEIGHT, Quantum
from libaios.wire import Embedded, Ranked

EmbedSteps = Iterator[Embedded | Ranked | None]


@dataclass(slots=True, eq=False)
class EmbedJob:
    """One call; for the policy an `Entry`."""

    key: link.CallKey
    steps: EmbedSteps
    peer: int
    nice: int
    group: str
    order: int
    arrived: float
    computed: int = 0  # tokens
    num_pending: int = 0
    least_turn: Quantum = ANY_TURN  # it has no state that would have to be moved

    @property
    def num_generated(self) -> int:
        return int(self.computed * PROMPT_WEIGHT)


class EmbedQueue:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._policy: policy.SchedulingPolicy = policy.Fifo()
        self._jobs: dict[link.CallKey, EmbedJob] = {}
        self._parked: set[int] = set()  # peers
        self._running: EmbedJob | None = None
        self._arrivals = 0

    def __contains__(self, key: link.CallKey) -> bool:
        return key in self._jobs

    @property
    def has_work(self) -> bool:
        return any(job.peer not in self._parked for job in self._jobs.values())

    def add(self, key: link.CallKey, caller: link.Caller, steps: EmbedSteps) -> None:
        self._arrivals += 1
        now = self._clock()
        job = self._jobs[key] = EmbedJob(key, steps, key[0], caller.nice, caller.group, self._arrivals, now)
        if job.peer not in self._parked:
            self._policy.arrive(job, now)

    def remove(self, key: link.CallKey) -> None:
        job = self._jobs.pop(key, None)
        if job is not None:
            self._leave(job)

    def keep(self, peers: Iterable[int]) -> None:
        """After the start of a new kernel: drop the calls of other peers than these, and park no peer any more."""
        kept = set(peers)
        for key in [key for key in self._jobs if key[0] not in kept]:
            self.remove(key)
        for peer in list(self._parked):
            self.park(peer, False)

    def park(self, peer: int, parked: bool) -> None:
        if parked == (peer in self._parked):
            return
        (self._parked.add if parked else self._parked.discard)(peer)
        for job in self._jobs.values():
            if job.peer != peer:
                continue
            if parked:
                self._leave(job)
            else:
                self._policy.arrive(job, self._clock())

    def gone(self, peer: int) -> None:
        self._parked.discard(peer)

    def renice(self, peer: int, nice: int) -> None:
        for job in self._jobs.values():
            if job.peer == peer:
                job.nice = nice
                self._policy.renice(job, self._clock())

    def set_policy(self, new: policy.SchedulingPolicy) -> None:
        self._policy = new
        for job in self._jobs.values():
            if job.peer not in self._parked:
                new.arrive(job, self._clock())

    def next(self) -> EmbedJob | None:
        """The call of which a batch is to be computed now."""
        now = self._clock()
        waiting = [job for job in self._jobs.values() if job is not self._running and job.peer not in self._parked]
        if self._running is not None and waiting and self._policy.evict(waiting, [self._running], 0, now):
            self._running = None
        if self._running is None and waiting:
            admitted = self._policy.admit(waiting, [], 1, now)
            self._running = admitted[0] if admitted else None
        return self._running

    def charge(self, job: EmbedJob, tokens: int) -> None:
        """A batch with this number of tokens was computed for the call."""
        job.computed += tokens
        if job.key in self._jobs:
            self._policy.charge_prompt(job, tokens, self._clock())

    def _leave(self, job: EmbedJob) -> None:
        self._policy.leave(job, self._clock())
        if self._running is job:
            self._running = None
