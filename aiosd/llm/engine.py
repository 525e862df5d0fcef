"""One step: plan → decode → settle.

- *plan*: waiting calls get slots (the policy says who), parked ones lose theirs if others need them.
- *decode*: prompts first, in batches of their own, of calls with equally many tokens to go (llama.cpp cuts a
  batch at its shortest run), under a token budget, so that the others' next token does not wait for a long
  prompt. Then one token for every call whose prompt is in place, in one batch, ascending by slot.
- *settle*: a token from each row of logits; ends; text; what the kernel must hear.

The loop is Python, and it is the processor's inner loop: the batch arrays are numpy views that are moved on in
place while the same calls run, the arg max of all rows is one call, and a call without stop strings, stream or
grammar costs a few list operations per token. Text is made when it is sent.

Invariants: a sequence is in `_waiting` (QUEUED) or owns a slot (PREFILL, DECODE), never both; `length` tokens of
it lie in its slot; after a step that leaves no call, all slots are free, or `Bug`.

In exact mode no batch ever runs a single sequence with a single token (llama.cpp multiplies a vector by other
code than a matrix): a dummy token runs along in the next slot and is forgotten at once. Tokens that were
decoded one by one are replayed one by one, and only prefilled tokens are shared between calls.
"""

from __future__ import annotations

import errno
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np

from aiosd.errors import Bug
from aiosd.link import Delta, Failed, Finished, Key, Started, Step, Submit
from aiosd.llm import llama
from aiosd.llm.cache import Cache
from aiosd.llm.picking import Picker, Rows
from aiosd.llm.policy import Fifo, Policy
from aiosd.llm.request import Prepared, Requests
from aiosd.llm.sampling import NOTHING, Drawer
from aiosd.llm.sequence import Phase, Sequence
from aiosd.llm.slots import Slots
from aiosd.llm.stats import Meter
from aiosd.llm.structured import END
from libaios.wire import ToolCall, Usage

logger = logging.getLogger("llm.engine")

#: Calls that do not stream are reported this often (seconds).
REPORT_EVERY = 0.1

#: Finished calls are remembered this long, and this many, for a kernel that asks again after it died.
REMEMBER_S, REMEMBER = 60.0, 256

#: While others decode, prompts get so many seconds of a step; without others more, but a cancel or a new call
#: must not wait long for the step to end.
PREFILL_SLICE, PREFILL_ALONE = 0.25, 1.0

#: … and never less than twice this many tokens of a prompt in one batch, unless it has no more.
LEAST_PROMPT = 16

#: A batch of prompts that takes so long (seconds) is looked after: a cancel need not wait for its end.
LONG_BATCH, LOOK_EVERY = 0.02, 0.002

#: A call whose state was lost keeps its slot until it is so many tokens further than it was. Else, where contexts find
#: no room, its turn could be over before it is back where it stood, for ever.
LEAST_GAIN = 16

#: A batch that was in several pieces for so many steps is made whole.
PATIENCE = 4


@dataclass(slots=True)
class _Past:
    sequence: Sequence
    reason: str
    usage: Usage
    calls: list[ToolCall]
    at: float


class Engine:
    def __init__(
        self,
        model: llama.Model,
        context: llama.Context,
        *,
        ctx: int,
        slots: int,
        exact: bool = False,
        emit: Callable[[Step | Finished | Failed], None],
        congested: Callable[[], bool] = lambda: False,
        policy: Policy | None = None,
        clock: Callable[[], float] = time.monotonic,
        ram: int = 0,
        disk: int = 0,
        folder: str = "",
        cancelled: Callable[[], set[Key]] = set,
    ) -> None:
        self.model = model
        self.requests = Requests(model, ctx)
        self.slots = Slots(slots)
        self.policy: Policy = policy or Fifo()
        self.meter = Meter(clock)
        self.cache = Cache(context, self.slots, exact=exact, ram=ram, disk=disk, folder=folder, clock=clock)
        self._context = context
        self._ctx = ctx
        self._exact = exact
        self._emit = emit
        self._congested = congested
        self._cancelled = cancelled
        self._clock = clock
        self._pieces = model.pieces
        self._picker = Picker(Drawer())

        self._calls: dict[Key, Sequence] = {}
        self._waiting: dict[Key, Sequence] = {}
        self._past: OrderedDict[Key, _Past] = OrderedDict()
        self._parked_peers: set[int] = set()
        self._arrivals = 0

        self._prompts = llama.Batch(context.ubatch)
        self._batch = llama.Batch(2 * slots + 1)
        self._ready: list[Sequence] = []  # calls that can decode, ascending by slot
        self._rows: list[Sequence] = []  # the calls of the decode batch, row by row
        self._drawn = Rows([])  # the same for the sampler
        self._chosen: list[Sequence] = self._rows  # what the policy said of those that are ready
        self._dummies: list[tuple[int, int]] = []  # (slot, position) to forget after the step
        self._stale = False  # the rows no longer fit the calls
        self._num_pieces = 0  # runs of consecutive slots in it
        self._pieces_for = 0  # steps for which there has been more than one
        self._streams: dict[Key, Sequence] = {}  # calls that report in every step
        self._started: list[Started] = []
        self._preempted: list[Key] = []
        self._reported = 0.0

    # ── what may be asked of it ───────────────────────────────────────────────────────────────────────────

    def knows(self, key: Key) -> bool:
        """Is this call here, or was it a moment ago?"""
        return key in self._calls or key in self._past

    def submit(self, submit: Submit, prepared: Prepared | None = None) -> None:
        """Queue a call, or attach to it when its key is known. Refusals are reported, not raised. `prepared`: the work
        on its text, where that is done."""
        now = self._clock()
        if self._attach(submit):
            return
        self._arrivals += 1
        try:
            sequence = self.requests.sequence(submit, self._arrivals, now, prepared)
        except OSError as error:
            self._emit(Failed(submit.key, error.errno or errno.EINVAL, error.strerror or str(error)))
            return
        except Exception:  # a bug, that the same call would find in every successor as well
            logger.exception("call %d of %d cannot be read", submit.key[1], submit.key[0])
            self._emit(Failed(submit.key, errno.EIO, "the llm core made a mistake; aiosd's log has the details"))
            return
        sequence.parked_peer = sequence.peer in self._parked_peers
        self._calls[sequence.key] = self._waiting[sequence.key] = sequence
        if not sequence.parked:
            self.policy.arrive(sequence, now)
        if sequence.stream:
            self._streams[sequence.key] = sequence
        self._limit(sequence, computed=0)
        reason = self._over(sequence)
        if reason:
            self._finish_unbegun(sequence, reason)

    def cancel(self, key: Key) -> None:
        """Free whatever the call holds; nothing more is heard of it."""
        sequence = self._calls.get(key)
        if sequence is not None:
            self._leave(sequence)
        self._past.pop(key, None)

    def park(self, peer: int, parked: bool) -> None:
        if parked:
            self._parked_peers.add(peer)
        else:
            self._parked_peers.discard(peer)
        for sequence in self._calls.values():
            if sequence.peer == peer:
                self._park(sequence, parked, sequence.parked_call)

    def park_call(self, key: Key, parked: bool) -> None:
        sequence = self._calls.get(key)
        if sequence is not None:
            self._park(sequence, sequence.parked_peer, parked)

    def _park(self, sequence: Sequence, by_peer: bool, by_call: bool) -> None:
        """For the policy a parked call is gone: what stands still must not save up service."""
        before = sequence.parked
        sequence.parked_peer, sequence.parked_call = by_peer, by_call
        if sequence.parked != before:
            (self.policy.leave if sequence.parked else self.policy.arrive)(sequence, self._clock())
            self._stale = True

    def gone(self, peer: int) -> None:
        """The peer is dead, and its calls have been cancelled."""
        self.cache.gone(peer)

    def keep(self, peers: Iterable[int]) -> None:
        """For a new kernel: cancel every call of any other peer. Whose calls stand still it says anew."""
        kept = set(peers)
        for key in [key for key in (*self._calls, *self._past) if key[0] not in kept]:
            self.cancel(key)
        for peer in list(self._parked_peers):
            self.park(peer, False)

    @property
    def has_work(self) -> bool:
        """Would a step do anything?"""
        return any(not sequence.parked for sequence in self._calls.values()) or bool(self._started)

    @property
    def num_calls(self) -> int:
        return len(self._calls)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def set_policy(self, policy: Policy) -> None:
        """Another policy from the next step on; it hears of all calls as if they came now."""
        self.policy, now = policy, self._clock()
        for sequence in self._calls.values():
            if not sequence.parked:
                policy.arrive(sequence, now)
        self._stale = True

    def renice(self, peer: int, nice: int) -> None:
        now = self._clock()
        for sequence in self._calls.values():
            if sequence.peer == peer:
                sequence.nice = nice
                self.policy.renice(sequence, now)

    def step(self) -> None:
        """Let every call that can go on do so by one token, and prompts by their share."""
        self.meter.begin()
        if self._waiting:
            self._plan()
            self._say_started()  # before anything is computed: whoever dies of it must be known to have run
        self._prefill()
        self._choose()
        generated = len(self._rows)
        if generated:
            self._decode()
        self._report()
        self.meter.end(generated)
        if not self._calls:
            self._count()

    # ── plan ──────────────────────────────────────────────────────────────────────────────────────────────

    def _plan(self) -> None:
        now = self._clock()
        waiting = [s for s in self._waiting.values() if not s.parked and (s.leader is None or not self._follows(s))]
        if not waiting:
            return
        running = list(self.slots.owners())
        lacking = len(waiting) - self.slots.num_free
        if lacking > 0:  # a stopped agent does not block a slot
            parked = [sequence for sequence in running if sequence.parked]
            for sequence in parked[:lacking]:
                self._take_off(sequence)
            running = [sequence for sequence in running if not sequence.parked]
        running = [sequence for sequence in running if len(sequence.out) >= sequence.least]
        for sequence in self.policy.evict(waiting, running, self.slots.num_free, now):
            self._take_off(sequence)
        while waiting and self.slots.num_free:
            running = [sequence for sequence in self.slots.owners() if not sequence.parked]
            admitted = self.policy.admit(waiting, running, self.slots.num_free, now)
            followers = [sequence for sequence in admitted if not self._put_on(sequence, now)]
            if not followers:
                return
            out = set(map(id, admitted))
            waiting = [sequence for sequence in waiting if id(sequence) not in out]

    def _follows(self, sequence: Sequence) -> bool:
        """Is the beginning of this prompt being computed for another call, so that waiting is better?"""
        leader = sequence.leader
        assert leader is not None
        if leader.phase is Phase.PREFILL and not leader.parked and leader.length < sequence.leader_stop:
            return True
        sequence.leader = None
        return False

    def _put_on(self, sequence: Sequence, now: float) -> bool:
        """Into a slot, with whatever of its tokens is to be had. False: it waits for another's prefill."""
        led = self.cache.leader(sequence)
        if led is not None:
            sequence.leader, sequence.leader_stop = led
            self._cut_at(*led)
            return False
        del self._waiting[sequence.key]
        self.cache.seat(sequence, now)
        if sequence.out and sequence.length < sequence.target:  # its state is lost: getting back must not cost its turn
            sequence.least = len(sequence.out) + LEAST_GAIN
        if not sequence.started_told:
            sequence.cached = sequence.length
            self.cache.count(sequence.cached)
            sequence.slot_at, sequence.started_told = now, True
            self._limit(sequence, computed=len(sequence.prompt) - sequence.cached)
            reason = self._over(sequence)
            if reason:
                self._finish_unbegun(sequence, reason)
                return True
            self._started.append(Started(sequence.key, len(sequence.prompt), sequence.cached))
        elif sequence.key in self._preempted:  # the kernel has not heard of it yet
            self._preempted.remove(sequence.key)
        else:
            self._started.append(Started(sequence.key, len(sequence.prompt), sequence.cached))
        self._place(sequence)
        return True

    def _cut_at(self, leader: Sequence, stop: int) -> None:
        """Let a batch of the leader's prompt end where others go on; never before or after a single token (see the
        head of the file)."""
        if stop - leader.length < 2 or len(leader.prompt) - stop < 2:
            return
        if not leader.length < leader.cut_at <= stop:
            leader.cut_at = stop

    def _place(self, sequence: Sequence) -> None:
        """The phase that fits what is in the cache."""
        sequence.phase = Phase.PREFILL if self._pending(sequence) else Phase.DECODE
        if sequence.phase is Phase.DECODE and not sequence.first_at and sequence.out:  # its first tokens were given
            sequence.first_at = self._clock()
        self._stale = True

    def _pending(self, sequence: Sequence) -> int:
        """Tokens to prefill. In exact mode generated tokens are decoded again, one by one."""
        target = len(sequence.prompt) if self._exact else sequence.target
        return max(target - sequence.length, 0)

    def _take_off(self, sequence: Sequence) -> None:
        """Back to the queue, its state saved: it goes on bit for bit where it stopped."""
        self.cache.unseat(sequence, self._clock())
        sequence.phase = Phase.QUEUED
        sequence.preemptions += 1
        self.meter.preemptions += 1
        self._preempted.append(sequence.key)
        self._waiting[sequence.key] = sequence
        self._stale = True

    def _limit(self, sequence: Sequence, computed: int) -> None:
        """How many tokens `out` may come to hold, and what it means to reach that, when the prompt costs so many
        computed tokens."""
        full = self._ctx - len(sequence.prompt)
        sequence.limit, sequence.limit_reason = min(sequence.max_tokens, full), "length"
        if sequence.budget is not None:
            allowed = sequence.forced + sequence.budget - computed
            if allowed < sequence.limit:
                sequence.limit, sequence.limit_reason = max(allowed, 0), "limit"

    def _over(self, sequence: Sequence) -> str:
        """Why a call is at its end before its next step, or ''."""
        if sequence.text.stopped:
            return "stop"
        return sequence.limit_reason if len(sequence.out) >= sequence.limit else ""

    # ── prompts ───────────────────────────────────────────────────────────────────────────────────────────

    def _prefill(self) -> None:
        pending = [s for s in self.slots.owners() if s.phase is Phase.PREFILL and not s.parked]
        if not pending:
            return
        # A few that decode must not wait long for many prompts; many that wait are not held up by a few, and begin to
        # decode together, as steps for a part of a crowd cost nearly as much as those for all of it.
        seconds = PREFILL_SLICE if len(self._rows) >= len(pending) else PREFILL_ALONE
        pending = self.policy.order(pending, self._clock())
        budget = self.meter.tokens_in(seconds, least=2 * LEAST_PROMPT)
        while pending and budget >= LEAST_PROMPT:
            group, size = self._group(pending, min(budget, self._context.ubatch))
            budget -= size * len(group)
            self._prefill_group(group, size)
            gone = self._cancelled()
            pending = [s for s in pending if s.phase is Phase.PREFILL and s.slot >= 0 and s.key not in gone]

    def _group(self, pending: list[Sequence], budget: int) -> tuple[list[Sequence], int]:
        """The first call and those with as many tokens to go, as far as they fit; a long prompt alone, in part.
        Never one ubatch more than asked for, and never a last part of one token (see the head of the file)."""
        first = self._due(pending[0])
        if first > budget:
            return pending[:1], budget - 1 if first - budget == 1 else budget
        if first == 1 and self._exact:
            return pending[:1], 1
        same = [sequence for sequence in pending if self._due(sequence) == first][: budget // first]
        return sorted(same, key=lambda sequence: sequence.slot), first

    def _due(self, sequence: Sequence) -> int:
        """Tokens to prefill up to the place where others wait for it, or to the end."""
        if sequence.length < sequence.cut_at:
            return sequence.cut_at - sequence.length
        return self._pending(sequence)

    def _prefill_group(self, group: list[Sequence], size: int) -> None:
        batch = self._prompts
        batch.size = total = size * len(group)
        batch.wanted[:total] = 0
        last: list[Sequence] = []  # those whose prompt ends with this batch, and whose next token is not known
        for i, sequence in enumerate(group):
            part = slice(i * size, (i + 1) * size)
            start = sequence.length
            batch.tokens[part] = self._tokens(sequence, start, start + size)
            batch.positions[part] = np.arange(start, start + size)
            batch.sequences[part] = sequence.slot
            if not sequence.out and start + size == len(sequence.prompt):
                batch.wanted[part.stop - 1] = 1
                last.append(sequence)
        lone = self._exact and total == 1
        if lone:
            self._pad_prompt(group[0].slot)
        began = self._clock()
        with self._abortable(group, total):
            went = self._decoded(batch, group)
        if not went:
            return
        if lone:
            self._context.cut(self._dummies.pop()[0], batch.positions[1])
        now = self._clock()
        self.meter.prefilled(total, now - began)
        logits = self._context.logits(len(last)) if last else None
        for sequence in group:
            sequence.length += size
            sequence.computed += size
            sequence.prefilled = sequence.length
            self.policy.charge_prompt(sequence, size, now)
            if not self._pending(sequence):
                self._place(sequence)
        picks = self._picker.pick(Rows(last), logits) if logits is not None else []
        for row, sequence in enumerate(last):
            assert logits is not None
            sequence.first_at = now
            self._next(sequence, logits[row], picks[row])
        self.meter.generated += len(last)

    @contextmanager
    def _abortable(self, group: list[Sequence], tokens: int) -> Iterator[None]:
        """A long batch is given up as soon as every call in it has been cancelled."""
        if tokens < self.meter.tokens_in(LONG_BATCH, least=1, unknown=1):
            yield
            return
        keys = {sequence.key for sequence in group}
        looked = self._clock()

        def all_cancelled() -> bool:
            nonlocal looked
            now = self._clock()
            if now - looked < LOOK_EVERY:
                return False
            looked = now
            return keys <= self._cancelled()

        self._context.abort_when(all_cancelled)
        try:
            yield
        finally:
            self._context.abort_when(None)

    def _tokens(self, sequence: Sequence, start: int, stop: int) -> llama.Ints:
        prompt = sequence.prompt
        if stop <= len(prompt):
            return prompt[start:stop]
        return sequence.tokens()[start:stop]

    def _pad_prompt(self, slot: int) -> None:
        batch = self._prompts
        position = self._context.last_position(slot + 1) + 1
        batch.size = 2
        batch.tokens[1], batch.positions[1], batch.sequences[1], batch.wanted[1] = 0, position, slot + 1, 0
        self._dummies.append((slot + 1, position))

    # ── one token each ────────────────────────────────────────────────────────────────────────────────────

    def _choose(self) -> None:
        """Who takes part in this decode step; the batch is filled anew when that has changed."""
        stale = self._stale
        if stale:
            self._ready = [s for s in self.slots.owners() if s.phase is Phase.DECODE and not s.parked]
        chosen = self.policy.select(self._ready, self._clock()) if self._ready else self._ready
        if stale or chosen != self._chosen:
            self._chosen = chosen
            self._arrange(chosen)

    def _arrange(self, chosen: list[Sequence]) -> None:
        rows = chosen if chosen is self._ready else sorted(chosen, key=lambda sequence: sequence.slot)
        self._rows = rows
        self._stale = False
        slots = [sequence.slot for sequence in rows]
        self._num_pieces = sum(b != a + 1 for a, b in pairwise(slots)) + 1
        if self._num_pieces == 1:
            self._pieces_for = 0
        self._drawn = Rows(rows)
        batch = self._batch
        entries = [(s.slot, s.upcoming, s.length, 1) for s in rows]
        self._dummies = self._lone_neighbours(slots) if self._exact else []
        if self._dummies:
            entries = sorted([*entries, *((slot, 0, position, 0) for slot, position in self._dummies)])
        batch.size = n = len(entries)
        if n:
            batch.sequences[:n], batch.tokens[:n], batch.positions[:n], batch.wanted[:n] = np.array(entries).T

    def _lone_neighbours(self, slots: list[int]) -> list[tuple[int, int]]:
        """A dummy next to every slot that has no neighbour in the batch."""
        taken = set(slots)
        dummies = []
        for slot in slots:
            if slot - 1 not in taken and slot + 1 not in taken:
                taken.add(slot + 1)
                dummies.append((slot + 1, self._context.last_position(slot + 1) + 1))
        return dummies

    def _decode(self) -> None:
        rows, batch = self._rows, self._batch
        if not self._decoded(batch, rows):
            return
        n = len(rows)
        self.policy.charge(rows, 1, self._clock())
        logits = self._context.logits(n)
        picks = self._picker.pick(self._drawn, logits)
        self._drawn.next_step()
        pieces, tokens = self._pieces, batch.tokens
        for i, sequence in enumerate(rows):
            sequence.length += 1
            token = picks[i]
            if not sequence.plain or token == NOTHING:
                self._next(sequence, logits[i], token)
                if sequence.phase is Phase.DECODE:
                    tokens[i] = sequence.upcoming
                continue
            if token in sequence.choice.stops:
                self._finish(sequence, "stop")
                continue
            out = sequence.out
            out.append(token)
            tokens[i] = token
            if sequence.watched:
                sequence.fed += 1
                sequence.text.feed(pieces[token])
                if sequence.text.stopped:
                    self._finish(sequence, "stop")
                    continue
            if len(out) >= sequence.limit:
                self._finish(sequence, sequence.limit_reason)
        if self._dummies:
            self._forget_dummies()
        if self._num_pieces > 1:
            self._close_gap()
        if not self._stale:
            batch.positions[:n] += 1

    def _next(self, sequence: Sequence, row: llama.Floats, token: int) -> None:
        """`token` was drawn from this row, for a call of any kind: append it or what fits instead, or finish."""
        if sequence.length - len(sequence.prompt) < len(sequence.out):
            return  # it is being replayed: the next token is known
        if token == NOTHING:
            slot = sequence.slot
            self._fail(sequence, errno.EIO, "the model gave no number for any token at this place")
            self.cache.wipe(slot)  # nothing may go on from what led here
            return
        if sequence.constraint is not None:
            try:
                draw = partial(self._picker.again, sequence)
                token = sequence.constraint.settle(sequence.text, row, token, draw)
            except OSError as error:
                self._fail(sequence, error.errno or errno.EIO, error.strerror or str(error))
                return
        if token == END or token in sequence.choice.stops:
            self._finish(sequence, "stop")
            return
        self._append(sequence, token)

    def _append(self, sequence: Sequence, token: int) -> None:
        sequence.out.append(token)
        if sequence.choice.mirostat is not None:
            sequence.choice.mirostat.learn()
        if sequence.logprobs is not None and sequence.raw is not None:
            sequence.logprobs.append(sequence.raw.of(token, self._pieces))
        if sequence.watched:
            sequence.fed += 1
            sequence.text.feed(self._pieces[token])
        reason = self._over(sequence)
        if reason:
            self._finish(sequence, reason)

    def _forget_dummies(self) -> None:
        for slot, position in self._dummies:
            self._context.cut(slot, position)
        self._dummies = []
        self._stale = True

    def _close_gap(self) -> None:
        """A batch whose slots are not consecutive runs in several pieces, each reading all the weights. If that
        lasts for a few steps, calls change places with what free slots hold, one in a step: what lies there is
        often the prompt of an agent whose next call is on its way."""
        self._pieces_for += 1
        if self._pieces_for < PATIENCE:
            return
        rows = [sequence for sequence in self._rows if sequence.phase is Phase.DECODE]
        move = self.slots.closing_move(rows) if rows else None
        if move is None:
            return
        sequence, hole = move
        self.cache.exchange(sequence, hole)
        self._stale = True

    # ── llama_decode and what may come of it ──────────────────────────────────────────────────────────────

    def _decoded(self, batch: llama.Batch, sequences: list[Sequence]) -> bool:
        """Run a batch. False: it did not work out, and everything that follows from that is done."""
        result = self._context.decode(batch)
        if result == llama.OK:
            return True
        self._stale = True
        self._dummies = []
        if result == llama.ABORTED:  # what has been computed stays: go on from there
            for sequence in sequences:
                sequence.length = self.cache.tokens_in(sequence.slot)
            return False
        why = "; ".join(llama.take_errors()) or "no reason given"
        sentence = f"llama.cpp could not decode the batch (result {result}): {why}"
        for sequence in list(sequences):
            slot = sequence.slot
            self._fail(sequence, errno.ENOSPC if result == llama.NO_ROOM else errno.EIO, sentence)
            self.cache.wipe(slot)
        return False

    # ── ends ──────────────────────────────────────────────────────────────────────────────────────────────

    def _finish(self, sequence: Sequence, reason: str) -> None:
        """The one place where a call comes to its good end."""
        now = self._clock()
        self._feed(sequence)
        sequence.text.finish()
        calls: list[ToolCall] = []
        if sequence.dialect is not None and sequence.text.triggered:
            calls = sequence.dialect.read(sequence.text.rest, sequence.key)
            if calls and reason == "stop":
                reason = "tool_calls"
        first, slot_at = sequence.first_at or now, sequence.slot_at or now
        usage = Usage(
            prompt_tokens=len(sequence.prompt),
            cached_tokens=sequence.cached,
            completion_tokens=len(sequence.out),
            queue_s=slot_at - sequence.arrived,
            prefill_s=max(first - slot_at, 0.0),
            decode_s=now - first,
            preemptions=sequence.preemptions,
            context_left=1 - (len(sequence.prompt) + len(sequence.out)) / self._ctx,
        )
        past = _Past(sequence, reason, usage, calls, now)
        self.meter.calls += 1
        self.meter.cached += sequence.cached
        self._leave(sequence)
        self._remember(past)
        self._say_finished(past)

    def _finish_unbegun(self, sequence: Sequence, reason: str) -> None:
        """Nothing of its prompt is computed, and so nothing of it is charged."""
        sequence.cached = len(sequence.prompt)
        self._finish(sequence, reason)

    def _fail(self, sequence: Sequence, code: int, sentence: str) -> None:
        self._leave(sequence)
        self._say_started()
        self._emit(Failed(sequence.key, code, sentence))

    def _leave(self, sequence: Sequence) -> None:
        """Whatever the end: the call holds nothing any more. What lies in its slot stays usable as a prefix."""
        now = self._clock()
        self._calls.pop(sequence.key, None)
        self._waiting.pop(sequence.key, None)
        self._streams.pop(sequence.key, None)
        self.cache.leave(sequence, now)
        self.policy.leave(sequence, now)
        if sequence.constraint is not None:
            sequence.constraint.close()
            sequence.constraint = None
        sequence.leader = None
        sequence.phase = Phase.DONE
        self._stale = True

    def _remember(self, past: _Past) -> None:
        self._past[past.sequence.key] = past
        while len(self._past) > REMEMBER or past.at - next(iter(self._past.values())).at > REMEMBER_S:
            self._past.popitem(last=False)

    def _attach(self, submit: Submit) -> bool:
        """A call that is known already, asked for again by a kernel that lost its memory: tell it the rest."""
        past, sequence = self._past.get(submit.key), self._calls.get(submit.key)
        if past is not None:
            self._rewind(past.sequence, len(submit.request.given))
            self._say_finished(past)
        elif sequence is not None:
            self._rewind(sequence, len(submit.request.given))
            self._park(sequence, sequence.parked_peer, False)
            if sequence.slot >= 0 or sequence.snapshot is not None:
                self._started.append(Started(sequence.key, len(sequence.prompt), sequence.cached))
        return past is not None or sequence is not None

    def _rewind(self, sequence: Sequence, count: int) -> None:
        """Let the next report begin after the first `count` tokens."""
        self._feed(sequence)
        text = sequence.new_text()
        sequence.sent = count = min(count, len(sequence.out))
        for token in sequence.out[:count]:
            text.feed(self._pieces[token])
        sequence.text.skip(min(text.shown, sequence.text.shown))

    # ── what the kernel hears ─────────────────────────────────────────────────────────────────────────────

    def _feed(self, sequence: Sequence) -> None:
        """Make the text of tokens that nobody has looked at yet."""
        if sequence.fed < len(sequence.out):
            sequence.text.feed(self.model.detokenize(sequence.out[sequence.fed :]))
            sequence.fed = len(sequence.out)

    def _report(self) -> None:
        now = self._clock()
        due = now - self._reported >= REPORT_EVERY
        if not (due or self._started or self._streams):
            return
        if self._congested():
            return
        deltas = [self._delta(s) for s in (self._calls if due else self._streams).values() if s.sent < len(s.out)]
        if due:
            self._reported = now
        if deltas or self._started or self._preempted:
            self._emit(Step(deltas, *self._moves()))

    def _delta(self, sequence: Sequence) -> Delta:
        self._feed(sequence)
        offset, sequence.sent = sequence.sent, len(sequence.out)
        logprobs = sequence.logprobs[offset:] if sequence.logprobs is not None else None
        return Delta(sequence.key, offset, sequence.out[offset:], sequence.text.take(), logprobs)

    def _say_started(self) -> None:
        """A call's end must not overtake its beginning."""
        if self._started:
            self._emit(Step([], *self._moves()))

    def _moves(self) -> tuple[list[Started], list[Key]]:
        """Who got a slot and who lost it since the kernel heard of that last."""
        moves = self._started, self._preempted
        self._started, self._preempted = [], []
        return moves

    def _say_finished(self, past: _Past) -> None:
        self._say_started()
        sequence = past.sequence
        offset, sequence.sent = sequence.sent, len(sequence.out)
        self._emit(
            Finished(
                sequence.key,
                offset,
                sequence.out[offset:],
                sequence.text.take(),
                past.reason,
                past.usage,
                past.calls,
                sequence.logprobs[offset:] if sequence.logprobs is not None else None,
            )
        )

    # ── counts ────────────────────────────────────────────────────────────────────────────────────────────

    def _count(self) -> None:
        """Nothing is running: everything must be free."""
        self.slots.check()
        if self._waiting or self._streams or self.slots.num_free != self.slots.total:
            raise Bug(f"idle, but {self.slots.total - self.slots.num_free} slots are in use")

    def stats(self) -> dict[str, object]:
        free = self.slots.num_free
        return {
            "slots": {"total": self.slots.total, "free": free, "used": self.slots.total - free},
            "running": len(self._calls) - len(self._waiting),
            "waiting": len(self._waiting),
            "policy": self.policy.name,
            **self.cache.stats(),
            **self.meter.stats(),
        }
