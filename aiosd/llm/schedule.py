"""What is computed in one step, and for which calls. `schedule` is the whole decision; read it from top to bottom.

A step has three parts. Calls get slots and lose them. Prompts are computed, in batches of their own. Then every call
whose prompt is complete gets its next token, all in one batch. If all slots lie in one cache, each part needs free
cells of it, too: a call gets a slot only if there are cells for its prompt, and if running calls need more cells than
there are, the least urgent ones lose their slots. The policy (`policy/`) decides in each part which calls come first;
the cache (`cache.py`) decides what a slot holds, and where a context lies meanwhile.

    waiting ──admit──▶ slot: PREFILL ──prompt complete──▶ slot: DECODE ──▶ done
       ▲                         │                              │
       └──────── evict ──────────┴──────────── evict ───────────┘
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from aiosd.ipc.link import CallKey
from aiosd.llm.policy import SchedulingPolicy
from aiosd.llm.sequence import Phase, Sequence
from aiosd.llm.slots import Slots
from aiosd.llm.stats import EngineMeter

#: How many seconds of a step prompts may use: at least, while other calls decode; and at most, because a cancel or a
#: new call waits for the end of the step.
PREFILL_SLICE, PREFILL_ALONE = 0.25, 1.0

#: A step computes at least twice this many tokens of prompts, however short its time is, or all that are left.
LEAST_PROMPT = 16


@dataclass(slots=True)
class Batch:
    """What is computed at once: of the prompt of each of `calls` as many tokens as `sizes` has for it; without `sizes`
    the next token of each (of none, if there are no calls)."""

    calls: list[Sequence]
    sizes: list[int] = field(default_factory=list)


class Desk(Protocol):
    """The part of the engine that the decision uses."""

    policy: SchedulingPolicy
    slots: Slots
    meter: EngineMeter
    clock: Callable[[], float]
    exact: bool
    ubatch: int  # tokens that one batch holds at most
    mixed: bool  # may a batch hold prompts of several lengths?

    @property
    def cache(self) -> Any: ...
    @property
    def waiting(self) -> dict[CallKey, Sequence]: ...
    @property
    def num_decoding(self) -> int: ...  # calls of the last step's token batch

    def give_turns(self, running: list[Sequence]) -> None: ...  # set how long each should keep its slot at least
    def put_on(self, call: Sequence, now: float) -> None: ...  # give it a slot, with what is stored of its tokens
    def take_off(self, call: Sequence) -> None: ...  # take its slot away, and store its state
    def make_room(self, least: int, most: int) -> int: ...  # cells to use; for `least` calls are taken off, if need be
    def ready(self) -> list[Sequence]: ...  # calls in slots whose prompt is complete, except parked ones
    def cancelled(self) -> set[CallKey]: ...  # since the step began


def schedule(desk: Desk) -> Iterator[Batch]:
    """The batches of one step. Each must have been computed before the next is taken, because that depends on it."""
    policy, slots, now = desk.policy, desk.slots, desk.clock()

    # Slots. A parked call keeps its slot only while no other call needs it.
    waiting = [call for call in desk.waiting.values() if not call.parked and not _follows(call)]
    if waiting:
        parked = [call for call in slots.owners() if call.parked]
        free = 0 if desk.cache.crowded(waiting) else slots.num_free
        for call in parked[: max(len(waiting) - free, 0)]:
            desk.take_off(call)
        running = [call for call in slots.owners() if not call.parked and len(call.out) >= call.least]
        desk.give_turns(running)
        for call in policy.evict(waiting, running, free, now):
            desk.take_off(call)
    while waiting and slots.num_free:
        running = [call for call in slots.owners() if not call.parked]
        admitted = policy.admit(waiting, running, slots.num_free, now)
        late = False
        for call in admitted:  # one by one: the first may compute the beginning of the next
            if _leader_found(desk, call):
                late = True
            elif desk.cache.fits(call):
                desk.put_on(call, now)
            else:  # nor does a later call get these cells: a long prompt would wait for ever
                late = False
                break
        if not late:
            break
        waiting = [call for call in waiting if call not in admitted]  # a slot is still free for one of these

    # Prompts, under a budget of tokens. If at least as many calls decode as have prompts to compute, prompts get as
    # much of the step as these calls do, and at least a short part of it. If fewer do, they get more: calls that came
    # together then decode together, and a step for a part of a crowd costs nearly as much as a step for all of it.
    pending = [call for call in slots.owners() if call.phase is Phase.PREFILL and not call.parked]
    if pending:
        decoding = min(max(PREFILL_SLICE, desk.meter.decode_s), PREFILL_ALONE)
        seconds = decoding if desk.num_decoding >= len(pending) else PREFILL_ALONE
        budget = desk.meter.tokens_in(seconds, least=2 * LEAST_PROMPT)
        pending = policy.order(pending, desk.clock())
        while pending and budget >= LEAST_PROMPT:
            most = min(budget, desk.ubatch)
            most = desk.make_room(min(most, _due(pending[0], desk.exact)), most)
            pending = [call for call in pending if call.slot >= 0]
            if pending:
                batch = _prompts(desk, pending, most)
                budget -= sum(batch.sizes)
                yield batch
            gone = desk.cancelled()
            pending = [s for s in pending if s.phase is Phase.PREFILL and s.slot >= 0 and s.key not in gone]

    # One token for each call that decodes.
    rows = len(desk.ready())
    desk.make_room(rows, rows)
    ready = desk.ready()
    yield Batch(policy.select(ready, desk.clock()) if ready else ready)


def _follows(call: Sequence) -> bool:
    """Is the beginning of its prompt still being computed for another call, its leader? Then it waits for that."""
    leader = call.leader
    if leader is None:
        return False
    if leader.phase is Phase.PREFILL and not leader.parked and leader.length < call.leader_stop:
        return True
    call.leader = None
    return False


def _leader_found(desk: Desk, call: Sequence) -> bool:
    """Set the leader of a call whose prompt begins as one that is just being computed. A batch of the leader ends where
    the call continues, unless that would leave a single token before or after (see the opening of engine.py)."""
    found = desk.cache.leader(call)
    if found is None:
        return False
    leader, stop = call.leader, call.leader_stop = found
    if stop - leader.length >= 2 and len(leader.prompt) - stop >= 2 and not leader.length < leader.cut_at <= stop:
        leader.cut_at = stop
    return True


def _prompts(desk: Desk, pending: list[Sequence], most: int) -> Batch:
    """The first call, and those with the same number of tokens left and the same adapter, as many as fit. Where the
    first one alone does not fit, a part of it, which never leaves a single token for later (see the opening of
    engine.py)."""
    if desk.mixed:
        return _mixed(pending, most)
    first = _due(pending[0], desk.exact)
    if first > most:
        return Batch(pending[:1], [most - 1 if first - most == 1 else most])
    if first == 1 and desk.exact:
        return Batch(pending[:1], [1])
    same = [call for call in pending if _due(call, desk.exact) == first and call.lora == pending[0].lora]
    same = same[: most // first]
    return Batch(sorted(same, key=lambda call: call.slot), [first] * len(same))


def _mixed(pending: list[Sequence], most: int) -> Batch:
    """All prompts with the adapter of the first one, as far as they fit; of the last one perhaps a part."""
    batch = Batch([])
    for call in pending:
        size = min(_due(call, False), most - sum(batch.sizes))
        if call.lora == pending[0].lora and size:
            batch.calls.append(call)
            batch.sizes.append(size)
    return batch


def _due(call: Sequence, exact: bool) -> int:
    """How many tokens to compute up to the place that other calls wait for, else up to the end of the prompt."""
    if call.length < call.cut_at:
        return call.cut_at - call.length
    return prompt_left(call, exact)


def prompt_left(call: Sequence, exact: bool) -> int:
    """How many tokens are still to be computed as a prompt. In exact mode generated tokens do not count: they are
    decoded again one by one."""
    target = len(call.prompt) if exact else call.target
    return max(target - call.length, 0)
