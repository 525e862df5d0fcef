"""One step: plan → decode → settle.

- *plan*: waiting calls get slots; the policy chooses which. Parked calls lose their slots if other calls need them.
- *decode*: first the prompts, in batches of their own. A batch holds only calls that have the same number of tokens
  left, because llama.cpp splits a batch at the length of its shortest sequence (it does not if all slots lie in one
  cache, see `cells.py`). Prompts have a token budget in each step, so that the other calls do not wait long for their
  next token. Then one batch, in ascending order of slots, with one token of every call whose prompt is complete.
- *settle*: choose a token from each row of logits, end the calls that are complete, make text, report to the kernel.

While few calls decode, the decode batch also holds guesses of their next tokens (`lookahead.py`). The rows of a call
are settled one after another, as in as many steps, up to the first guess that differs from the token that was chosen;
the cells of the guesses after that are removed.

This loop is written in Python though it runs for every token, so it does little per call: the batch arrays are numpy
views, and while the same calls run only their positions are increased; one call draws the tokens of all rows; a call
without stop strings, stream or grammar needs a few list operations per token. Text is made only when it is sent.

Invariants: a sequence is either in `waiting` (QUEUED) or owns a slot (PREFILL, DECODE), never both; the first
`length` tokens of its prompt and output lie in its slot; when no call is left, all slots are free (else `Bug`).

In exact mode a batch never holds a single token alone: llama.cpp multiplies a vector with other code than a matrix,
and the result could differ in its last bits. A dummy token is computed with it in the next slot and removed after the
step. Nor are logits ever computed of one token alone, for which the last layer would be such a vector. Tokens that
were decoded one by one are computed one by one again after a loss, and calls share only tokens that were computed as
part of a prompt.
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
from itertools import accumulate

import numpy as np

from aiosd.errors import Bug
from aiosd.ipc.link import CallKey, Delta, Failed, GenerationDone, Started, Step, Submit
from aiosd.llm import adapters, llama
from aiosd.llm.cache import Cache
from aiosd.llm.lookahead import ROWS, Guesser, Lookahead
from aiosd.llm.passes import fillers, waste
from aiosd.llm.picking import Picker, Rows
from aiosd.llm.policy import Fifo, Quantum, SchedulingPolicy
from aiosd.llm.purse import Purses
from aiosd.llm.request import Prepared, Requests
from aiosd.llm.sampling import NOTHING, Drawer
from aiosd.llm.schedule import prompt_left, schedule
from aiosd.llm.sequence import Phase, Sequence
from aiosd.llm.slots import Slots
from aiosd.llm.stats import EngineMeter
from aiosd.llm.structured import END
from libaios.wire import ToolCall, Usage

logger = logging.getLogger("llm.engine")

#: Calls that do not stream are reported this often (seconds).
REPORT_EVERY = 0.1

#: How long (seconds) and how many finished calls are remembered: a kernel that was started again requests them.
REMEMBER_S, REMEMBER = 60.0, 256

#: While a batch of prompts is computed that takes at least LONG_BATCH seconds, the engine checks every LOOK_EVERY
#: seconds whether its calls were cancelled, so that a cancel need not wait for the end of the batch.
LONG_BATCH, LOOK_EVERY = 0.02, 0.002

#: A call whose state was lost keeps its slot until it has generated this many tokens more than before the loss.
#: Without that, where memory has no room for states, it could lose its slot again each time before it is back there.
LEAST_GAIN = 16

#: After this many steps in which the slots of the batch were not consecutive, calls are moved (see `_close_gaps`), if
#: that saves more than it takes within the next WHILE steps.
PATIENCE, WHILE = 4, 16

#: In place of what a pass costs, if that is not measured.
NOT_FILLED = "gaps between slots are not filled"

#: How much a new exchange counts in the average of what they take; and by how much that becomes less in each step in
#: which an exchange would take too long.
EASE, FADE = 0.2, 0.01

#: The part of the time that moving states may take, while calls take turns and while their slots are brought together.
MOVING = 1 / 8


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
        context: llama.LlamaContext,
        *,
        ctx: int,
        slots: int,
        exact: bool = False,
        emit: Callable[[Step | GenerationDone | Failed], None],
        congested: Callable[[], bool] = lambda: False,
        policy: SchedulingPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
        ram: int = 0,
        disk: int = 0,
        folder: str = "",
        cancelled: Callable[[], set[CallKey]] = set,
        ahead: Lookahead | None = None,
    ) -> None:
        self.model = model
        self.requests = Requests(model, ctx)
        self.slots = Slots(slots)
        self.policy: SchedulingPolicy = policy or Fifo()
        self.meter = EngineMeter(clock)
        self.cache = Cache(context, self.slots, exact=exact, ram=ram, disk=disk, folder=folder, clock=clock)
        self.ubatch = context.ubatch
        self.mixed = context.cells > 0  # all slots lie in one cache: batches and slots may be of any kind, see cells.py
        self._context = context
        self._ctx = ctx
        self.exact = exact
        self._emit = emit
        self._congested = congested
        self.cancelled = cancelled
        self.clock = clock
        self._pieces = model.pieces
        self._picker = Picker(Drawer())
        self.guesser = Guesser(ahead or Lookahead(0, "not asked for"), self.mixed)

        self._calls: dict[CallKey, Sequence] = {}
        self.waiting: dict[CallKey, Sequence] = {}
        self._past: OrderedDict[CallKey, _Past] = OrderedDict()
        self.purses = Purses()
        self._paying = 0  # calls with an account
        self._parked_peers: set[int] = set()
        self._arrivals = 0

        self._prompts = llama.BatchBuffer(context.ubatch)
        self._batch = llama.BatchBuffer(2 * slots + 1)
        self._guess_batch = llama.BatchBuffer(ROWS)
        self._ready: list[Sequence] = []  # calls that can decode, ascending by slot
        self._rows: list[Sequence] = []  # the calls of the decode batch, row by row
        self._drawn = Rows([])  # the same for the sampler
        self._turns = adapters.AdapterTurns()
        self._chosen: list[Sequence] = self._rows  # the calls of `_ready` that the policy has chosen
        self._dummies: list[tuple[int, int]] = []  # (slot, position) to remove after the step
        self._stale = False  # the rows must be made again: calls came, left or changed
        self._scattered = False  # are its calls in slots that are not consecutive?
        self._scattered_for = 0  # steps
        self._moving_s = 0.0  # how long states may be moved; below 0: until that is paid back
        self._exchange_s = 0.0  # what an exchange of slots takes, smoothed
        self.exchanges = self.filled = 0  # since the start: exchanges of slots, rows that filled gaps
        self._streams: dict[CallKey, Sequence] = {}  # calls that report in every step
        self._started: list[Started] = []
        self._preempted: list[CallKey] = []
        self._reported = 0.0

    # ── requests of the process around it ─────────────────────────────────────────────────────────────────

    def knows(self, key: CallKey) -> bool:
        """Is this call in the engine, or did it end so lately that its result is still remembered?"""
        return key in self._calls or key in self._past

    def submit(self, submit: Submit, prepared: Prepared | None = None) -> None:
        """Queue a call. Where its key is known already, its reports are sent again instead. Refusals are reported, not
        raised. `prepared`: the result of the work on its text, where that was done before."""
        now = self.clock()
        if self._attach(submit):
            return
        self._arrivals += 1
        try:
            sequence = self.requests.sequence(submit, self._arrivals, now, prepared)
        except OSError as error:
            self._emit(Failed(submit.key, error.errno or errno.EINVAL, error.strerror or str(error)))
            return
        except Exception:  # a bug; raised, it would end this process, and the same call would end every later one, too
            logger.exception("call %d of %d cannot be read", submit.key[1], submit.key[0])
            self._emit(Failed(submit.key, errno.EIO, "the llm core made a mistake; aiosd's log has the details"))
            return
        sequence.account = self.purses.open(submit.key, submit.shares, now)
        self._paying += sequence.account is not None
        sequence.parked_peer = sequence.peer in self._parked_peers
        self._calls[sequence.key] = self.waiting[sequence.key] = sequence
        if not sequence.parked:
            self.policy.arrive(sequence, now)
        if sequence.stream:
            self._streams[sequence.key] = sequence
        self._limit(sequence, computed=0)
        reason = self._over(sequence)
        if reason:
            self._finish_unbegun(sequence, reason)

    def cancel(self, key: CallKey) -> None:
        """Free everything that the call holds. It is not reported any more."""
        sequence = self._calls.get(key)
        if sequence is not None:
            self._leave(sequence)
        self._past.pop(key, None)

    def park(self, peer: int, parked: bool) -> None:
        """Park the calls of a peer, or let them go on. Tokens of parked calls are reported at once, so that none is
        counted later."""
        if parked:
            self._parked_peers.add(peer)
        else:
            self._parked_peers.discard(peer)
        calls = [sequence for sequence in self._calls.values() if sequence.peer == peer]
        for sequence in calls:
            self._park(sequence, parked, sequence.parked_call)
        deltas = [self._delta(sequence) for sequence in calls if sequence.parked and sequence.sent < len(sequence.out)]
        if deltas:
            self._emit(Step(deltas, *self._moves()))

    def park_call(self, key: CallKey, parked: bool) -> None:
        sequence = self._calls.get(key)
        if sequence is not None:
            self._park(sequence, sequence.parked_peer, parked)

    def _park(self, sequence: Sequence, by_peer: bool, by_call: bool) -> None:
        """For the policy a parked call has left, so that a call that cannot run does not collect a claim to service."""
        before = sequence.parked
        sequence.parked_peer, sequence.parked_call = by_peer, by_call
        if sequence.parked != before:
            (self.policy.leave if sequence.parked else self.policy.arrive)(sequence, self.clock())
            self._stale = True

    def gone(self, peer: int) -> None:
        """The peer is dead, and its calls have been cancelled."""
        self.cache.gone(peer)

    def keep(self, peers: Iterable[int]) -> None:
        """After the start of a new kernel: cancel all calls of other peers than these. No peer counts as parked any
        more; the kernel sends that again."""
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
        return len(self.waiting)

    def set_policy(self, policy: SchedulingPolicy) -> None:
        """Use this policy from the next step on. For it, all calls that are here arrive now."""
        self.policy, now = policy, self.clock()
        for sequence in self._calls.values():
            if not sequence.parked:
                policy.arrive(sequence, now)
        self._stale = True

    def renice(self, peer: int, nice: int) -> None:
        now = self.clock()
        for sequence in self._calls.values():
            if sequence.peer == peer:
                sequence.nice = nice
                self.policy.renice(sequence, now)

    def step(self) -> None:
        """Compute a token for every call that decodes (more, where guesses are right), and for prompts as much as the
        time of a step allows."""
        self.meter.begin()
        brought, alone = 0, True
        for batch in schedule(self):
            self._report_started()  # first: if a call ends this process, the kernel must know which ones ran
            if batch.sizes:
                self._prefill(batch.calls, batch.sizes)
                alone = False
            else:
                self._arrange(self._paid(batch.calls))
                guesses = self._guesses() if alone else []
                calls = len(self._rows)
                brought = self._decode_guesses(guesses) if guesses else self._decode()
                if calls:
                    self._turns.done(calls, brought)
        self._report()
        self.meter.end(brought)
        if not self._calls:
            self._count()

    # ── the methods that `schedule` uses ──────────────────────────────────────────────────────────────────

    def give_turns(self, running: list[Sequence]) -> None:
        """Set how long the running calls should keep their slots, so that moving states takes little of the time."""
        step_s, move_s = self.meter.step_s, self.cache.move_s
        for sequence in running:
            seconds = len(running) * sequence.length * move_s / MOVING
            if 0 < step_s < seconds:
                sequence.least_turn = Quantum(int(seconds / step_s), seconds)

    @property
    def num_decoding(self) -> int:
        return len(self._rows)

    def ready(self) -> list[Sequence]:
        """The calls that can decode, ascending by slot; if there are adapters, the calls of one of them."""
        if self._stale:
            self._ready = [s for s in self.slots.owners() if s.phase is Phase.DECODE and not s.parked]
        return self._turns.of(self._ready) if self.model.adapters and self._ready else self._ready

    def put_on(self, sequence: Sequence, now: float) -> None:
        """Give the call a slot and fill that with what is stored of its tokens."""
        del self.waiting[sequence.key]
        self.cache.seat(sequence, now)
        if sequence.out and sequence.length < sequence.target:  # its state is lost: it is computed again
            sequence.least = len(sequence.out) + LEAST_GAIN
        if not sequence.started_reported:
            sequence.cached = sequence.length
            self.cache.count(sequence.cached)
            sequence.slot_at, sequence.started_reported = now, True
            self._limit(sequence, computed=len(sequence.prompt) - sequence.cached)
            reason = self._over(sequence) or self._pay_prompt(sequence)
            if reason:
                self._finish_unbegun(sequence, reason)
                return
            self._started.append(Started(sequence.key, len(sequence.prompt), sequence.cached))
        elif sequence.key in self._preempted:  # not reported to the kernel yet: both reports are dropped
            self._preempted.remove(sequence.key)
        else:
            self._started.append(Started(sequence.key, len(sequence.prompt), sequence.cached))
        self._place(sequence)

    def _place(self, sequence: Sequence) -> None:
        """Set the phase: PREFILL while a part of the prompt is missing in the cache, else DECODE."""
        sequence.phase = Phase.PREFILL if prompt_left(sequence, self.exact) else Phase.DECODE
        if sequence.phase is Phase.DECODE and not sequence.first_at and sequence.out:  # its tokens came with the call
            sequence.first_at = self.clock()
        self._stale = True

    def take_off(self, sequence: Sequence) -> None:
        """Take its slot away and put it back into the queue. Its state is saved: it continues exactly where it was."""
        self.cache.unseat(sequence, self.clock())
        sequence.phase = Phase.QUEUED
        sequence.preemptions += 1
        self.meter.preemptions += 1
        self._preempted.append(sequence.key)
        self.waiting[sequence.key] = sequence
        self._stale = True

    def make_room(self, least: int, most: int) -> int:
        """Returns for how many tokens there are cells, up to `most`. Free slots give up theirs for these; if there are
        fewer than `least`, running calls lose their slots, too: parked ones first, then the least urgent, but never the
        last, which has cells enough."""
        if self.cache.make_room(most) or self.cache.cells is None:
            return most
        while not self.cache.make_room(least) and self.slots.num_free < self.slots.total - 1:
            self._take_one_off()
        return max(min(most, self.cache.cells.free), 1)

    def _take_one_off(self) -> None:
        owners = list(self.slots.owners())
        urgent = [call for call in owners if not call.parked]
        ranked = self.policy.order(urgent, self.clock())
        rank = {call.key: i for i, call in enumerate(ranked)}
        # A call whose lost state is being computed again keeps its slot if possible, or it might lose the state again
        # and again.
        victim = max(owners, key=lambda call: (call.parked, len(call.out) >= call.least, rank.get(call.key, len(rank))))
        self.take_off(victim)

    def _limit(self, sequence: Sequence, computed: int) -> None:
        """Set how many tokens `out` may hold at most, and the finish reason when it is full. `computed`: how many
        tokens of the prompt must be computed; these, too, are charged to the call's budget."""
        full = self._ctx - len(sequence.prompt)
        sequence.limit, sequence.limit_reason = min(sequence.max_tokens, full), "length"
        if sequence.budget is not None:
            allowed = sequence.forced + sequence.budget - computed
            if allowed < sequence.limit:
                sequence.limit, sequence.limit_reason, sequence.limit_kind = max(allowed, 0), "limit", "tokens"
        price = sequence.price
        if sequence.money is not None and price.completion:
            num_prompt = len(sequence.prompt)
            left = sequence.money - price.of_prompt(num_prompt, num_prompt - computed)
            allowed = sequence.forced + max(left, 0) // price.completion
            if allowed < sequence.limit:
                sequence.limit, sequence.limit_reason, sequence.limit_kind = allowed, "limit", "cost"

    def _pay_prompt(self, sequence: Sequence) -> str:
        """Pay for the computed part of the prompt and for the first token; "limit" if the budget has too little
        left."""
        account = sequence.account
        if account is not None:
            whole = len(sequence.prompt) + len(sequence.out) + 1
            sequence.short = account.pay(len(sequence.prompt) - sequence.cached + 1, whole)
        return "limit" if sequence.short else ""

    def _paid(self, chosen: list[Sequence]) -> list[Sequence]:
        """The calls that have paid for their next token; the others end."""
        if not self._paying:
            return chosen
        rest = []
        for sequence in chosen:
            if self._pays(sequence):
                rest.append(sequence)
        if len(rest) == len(chosen):
            return chosen
        self._ready = [sequence for sequence in self._ready if sequence.phase is Phase.DECODE]
        return rest

    def _pays(self, sequence: Sequence) -> bool:
        """Pay for the next token of a call. False: too little is left for it, and the call has ended."""
        account = sequence.account
        if account is not None and not sequence.replaying:
            sequence.short = account.pay(1, 1)
        if sequence.short:
            self._finish(sequence, "limit")
        return not sequence.short

    def _over(self, sequence: Sequence) -> str:
        """The finish reason of a call that must not run another step, or ''."""
        if sequence.text.stopped:
            return "stop"
        return sequence.limit_reason if len(sequence.out) >= sequence.limit else ""

    # ── prompts ───────────────────────────────────────────────────────────────────────────────────────────

    def _prefill(self, group: list[Sequence], sizes: list[int]) -> None:
        batch = self._prompts
        batch.size = total = sum(sizes)
        batch.wanted[:total] = 0
        last: list[Sequence] = []  # calls whose prompt ends in this batch and that need their first token drawn
        for sequence, size, stop in zip(group, sizes, accumulate(sizes), strict=True):
            part = slice(stop - size, stop)
            start = sequence.length
            batch.tokens[part] = self._tokens(sequence, start, start + size)
            batch.positions[part] = np.arange(start, start + size)
            batch.sequences[part] = sequence.slot
            if not sequence.out and start + size == len(sequence.prompt):
                batch.wanted[part.stop - 1] = 1
                last.append(sequence)
        lone = self.exact and total == 1
        if lone:
            self._pad_prompt(group[0].slot)
        before = self._pad_logits() if self.exact and len(last) == 1 else 0
        began = self.clock()
        with self._abortable(group, total):
            went = self._decoded(batch, group)
        if not went:
            return
        if lone:
            self._forget_dummies()
        now = self.clock()
        self.meter.prefilled(total, now - began)
        logits = self._context.logits(before + len(last))[before:] if last else None
        for sequence, size in zip(group, sizes, strict=True):
            sequence.length += size
            sequence.computed += size
            sequence.prefilled = sequence.length
            self.policy.charge_prompt(sequence, size, now)
            if not prompt_left(sequence, self.exact):
                self._place(sequence)
        picks = self._picker.pick(Rows(last), logits) if logits is not None else []
        for row, sequence in enumerate(last):
            assert logits is not None
            sequence.first_at = now
            self._next(sequence, logits[row], picks[row])
        self.meter.generated += len(last)

    @contextmanager
    def _abortable(self, group: list[Sequence], tokens: int) -> Iterator[None]:
        """While this is entered, llama.cpp breaks off a long batch as soon as every call in it has been cancelled."""
        if tokens < self.meter.tokens_in(LONG_BATCH, least=1, unknown=1):
            yield
            return
        keys = {sequence.key for sequence in group}
        looked = self.clock()

        def all_cancelled() -> bool:
            nonlocal looked
            now = self.clock()
            if now - looked < LOOK_EVERY:
                return False
            looked = now
            return keys <= self.cancelled()

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

    def _pad_logits(self) -> int:
        """Want the logits of a second token of the prompts' batch, too. Returns how many rows come before ours."""
        wanted = self._prompts.wanted[: self._prompts.size]
        ours = int(wanted.argmax())
        wanted[ours - 1 if ours else 1] = 1
        return int(ours > 0)

    # ── one token for each call ───────────────────────────────────────────────────────────────────────────

    def _arrange(self, chosen: list[Sequence]) -> None:
        """Fill the batch with the calls of this decode step, if they are others than last time."""
        if not self._stale and chosen == self._chosen:
            return
        self._chosen = chosen
        rows = chosen if chosen is self._ready else sorted(chosen, key=lambda sequence: sequence.slot)
        self._rows = rows
        self._stale = False
        slots = [sequence.slot for sequence in rows]
        self._scattered = not self.mixed and len(slots) > 1 and slots[-1] - slots[0] >= len(slots)
        if not self._scattered:
            self._scattered_for = 0
        self._drawn = Rows(rows)
        batch = self._batch
        entries = [(s.slot, s.upcoming, s.length, 1) for s in rows]
        self._dummies = self._lone_neighbours(slots) if self.exact else self._fillers(slots)
        if self._dummies:
            alone = int(self.exact and len(rows) == 1)  # then its dummy's logits, behind its own, are computed, too
            entries = sorted([*entries, *((slot, 0, position, alone) for slot, position in self._dummies)])
        batch.size = n = len(entries)
        if n:
            batch.sequences[:n], batch.tokens[:n], batch.positions[:n], batch.wanted[:n] = np.array(entries).T

    def _lone_neighbours(self, slots: list[int]) -> list[tuple[int, int]]:
        """Exact mode: (slot, position) of a dummy token beside every slot that has no neighbour in the batch."""
        taken = set(slots)
        dummies = []
        for slot in slots:
            if slot - 1 not in taken and slot + 1 not in taken:
                taken.add(slot + 1)
                dummies.append((slot + 1, self._context.last_position(slot + 1) + 1))
        return dummies

    def _fillers(self, slots: list[int]) -> list[tuple[int, int]]:
        """(slot, position) of a token of no use in each slot of the gaps that are filled (see `passes.py`)."""
        if not self._scattered:
            return []
        last = self._context.last_position
        found = fillers(slots, self.guesser.ahead.cost, lambda slot: last(slot) + 1 < self._ctx)
        return [(slot, last(slot) + 1) for slot in found]

    def _decode(self) -> int:
        """Returns how many tokens it has brought."""
        rows, batch = self._rows, self._batch
        if not rows or not self._decoded(batch, rows):
            return 0
        n = len(rows)
        self.policy.charge(rows, 1, self.clock())
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
            if token in sequence.chain.stops:
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
        self.filled += len(self._dummies)
        self._forget_dummies()
        self._close_gaps()
        if not self._stale:
            batch.positions[:n] += 1
        return n

    def _guesses(self) -> list[list[int]]:
        """The guesses for each call of this step, [] if there are none or no cells for them."""
        guesses = self.guesser.guesses(self._rows)
        cells = self.cache.cells
        if cells is not None and guesses and not cells.has(len(guesses) + sum(map(len, guesses))):
            return []
        return guesses

    def _decode_guesses(self, guesses: list[list[int]]) -> int:
        """The next token of each call and the guesses after it. Returns how many tokens that has brought."""
        rows, batch = self._rows, self._guess_batch
        self._dummies = []  # this batch has none
        entries = [
            (sequence.slot, token, sequence.length + i)
            for sequence, guess in zip(rows, guesses, strict=True)
            for i, token in enumerate((sequence.upcoming, *guess))
        ]
        batch.size = n = len(entries)
        batch.sequences[:n], batch.tokens[:n], batch.positions[:n] = np.array(entries).T
        batch.wanted[:n] = 1
        self._stale = True
        result = self._computed(batch, rows)
        if result == llama.NO_ROOM:  # without guesses there may be
            return self._decode()
        if not self._decoded(batch, rows, result):
            return 0
        logits = self._context.logits(n)
        at = brought = 0
        for sequence, guess in zip(rows, guesses, strict=True):
            brought += self._verify(sequence, guess, logits[at : at + len(guess) + 1])
            at += len(guess) + 1
        self.guesser.verified(len(rows), n - len(rows), brought)
        self._close_gaps()
        return brought

    def _verify(self, sequence: Sequence, guess: list[int], logits: llama.Floats) -> int:
        """Choose the token after each of a call's rows, one after another, as long as it is the one that was guessed.
        Returns how many tokens that are."""
        slot, held = sequence.slot, sequence.length + len(logits)
        count = 0
        for row, expected in zip(logits, (*guess, None), strict=True):
            self.policy.charge([sequence], 1, self.clock())
            sequence.length += 1
            count += 1
            self._next(sequence, row, self._picker.pick_one(sequence, row))
            if sequence.phase is not Phase.DECODE or sequence.out[-1] != expected or not self._pays(sequence):
                break
        if sequence.length < held:
            self._context.take_back(slot, sequence.length)
        return count

    def _next(self, sequence: Sequence, row: llama.Floats, token: int) -> None:
        """`token` was drawn from this row. Append it to the call, or another one where its grammar does not allow it,
        or end the call."""
        if sequence.length - len(sequence.prompt) < len(sequence.out):
            return  # its lost state is being computed again: the next token is known
        if token == NOTHING:
            slot = sequence.slot
            self._fail(sequence, errno.EIO, "the model gave no number for any token at this place")
            self.cache.wipe(slot)  # no other call may begin from this state
            return
        if sequence.constraint is not None:
            try:
                draw = partial(self._picker.again, sequence)
                token = sequence.constraint.settle(sequence.text, row, token, draw)
            except OSError as error:
                self._fail(sequence, error.errno or errno.EIO, error.strerror or str(error))
                return
        if token == END or token in sequence.chain.stops:
            self._finish(sequence, "stop")
            return
        self._append(sequence, token)

    def _append(self, sequence: Sequence, token: int) -> None:
        sequence.out.append(token)
        if sequence.chain.mirostat is not None:
            sequence.chain.mirostat.learn()
        if sequence.logprobs is not None and sequence.raw is not None:
            sequence.logprobs.append(sequence.raw.of(token, self._pieces))
        if sequence.watched:
            sequence.fed += 1
            sequence.text.feed(self._pieces[token])
        reason = self._over(sequence)
        if reason:
            self._finish(sequence, reason)

    def _forget_dummies(self) -> None:
        if self._dummies:
            for slot, position in self._dummies:
                self._context.take_back(slot, position)
            self._dummies = []
            self._stale = True

    def _close_gaps(self) -> None:
        """llama.cpp computes a batch whose slots are not consecutive in several passes (`passes.py`). If that lasts for
        PATIENCE steps, calls change places with what is in the slots between the others: a call whose prompt is being
        computed, or what a free slot holds, often the prompt of an agent whose next call comes soon."""
        if not self._scattered:
            return
        self._scattered_for += 1
        self._moving_s = min(self._moving_s + MOVING * self.meter.step_s, self._exchange_s)
        if self._scattered_for < PATIENCE or self._moving_s < 0:
            return
        rows = [sequence for sequence in self._rows if sequence.phase is Phase.DECODE]
        moves = self.slots.closing_moves(rows) if rows else []
        cost = self.guesser.ahead.cost
        if cost is not None and WHILE * waste([row.slot for row in rows], cost) < len(moves) * self._exchange_s:
            self._exchange_s *= 1 - FADE  # the last ones may have been slow because the machine was busy
            return
        for a, b in moves:
            began = self.clock()
            self.cache.exchange(a, b)
            took = self.clock() - began
            self._exchange_s += (took - self._exchange_s) * (EASE if self._exchange_s else 1.0)
            self._moving_s -= took
            self.exchanges += 1
            self._stale = True
            if self._moving_s < 0:
                break

    # ── llama_decode and its results ──────────────────────────────────────────────────────────────────────

    def _computed(self, batch: llama.BatchBuffer, sequences: list[Sequence]) -> int:
        """Compute a batch, of calls with one adapter. Returns llama.cpp's result."""
        self._context.use(sequences[0].lora)
        result = self._context.decode(batch)
        if self.cache.cells is not None:
            self.cache.cells.take(batch.size)
        return result

    def _decoded(self, batch: llama.BatchBuffer, sequences: list[Sequence], result: int | None = None) -> bool:
        """Compute a batch, unless its result is there. False: it was broken off or failed; its calls are set back or
        ended already."""
        result = self._computed(batch, sequences) if result is None else result
        if result == llama.OK:
            return True
        self._stale = True
        self._forget_dummies()
        if result == llama.NO_ROOM and self.cache.has_fewer_cells(batch.size):
            return False
        if result == llama.ABORTED:  # what was computed before that stays in the cache
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
        """End a call with a result. This is the only place that does."""
        now = self.clock()
        if reason == "limit":
            sequence.short = sequence.short or sequence.limit_kind
        self._feed(sequence)
        sequence.text.finish()
        calls: list[ToolCall] = []
        if sequence.dialect is not None and sequence.text.triggered:
            calls = sequence.dialect.read(sequence.text.rest, sequence.key)
            whole = sequence.constraint is not None and sequence.constraint.can_end
            if calls and (reason == "stop" or (reason == "length" and whole)):  # only the end token was missing
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
            reasoning_tokens=sequence.text.num_inside,
        )
        past = _Past(sequence, reason, usage, calls, now)
        self.meter.calls += 1
        self.meter.cached += sequence.cached
        self._leave(sequence)
        self._remember(past)
        self._report_finished(past)

    def _finish_unbegun(self, sequence: Sequence, reason: str) -> None:
        """End a call of which nothing was computed. Its prompt counts as cached, so that nothing is charged for it."""
        sequence.cached = len(sequence.prompt)
        self._finish(sequence, reason)

    def _fail(self, sequence: Sequence, code: int, sentence: str) -> None:
        self._leave(sequence)
        self._report_started()
        self._emit(Failed(sequence.key, code, sentence))

    def _leave(self, sequence: Sequence) -> None:
        """At any end: free everything that the call holds. What lies in its slot may still be used as a prefix."""
        now = self.clock()
        self._calls.pop(sequence.key, None)
        self.waiting.pop(sequence.key, None)
        self._streams.pop(sequence.key, None)
        self.cache.leave(sequence, now)
        self.policy.leave(sequence, now)
        self.guesser.forget(sequence)
        if sequence.constraint is not None:
            sequence.constraint.close()
            sequence.constraint = None
        if sequence.account is not None:
            self.purses.close(sequence.account, sequence.used, now)
            sequence.account = None
            self._paying -= 1
        sequence.leader = None
        sequence.phase = Phase.DONE
        self._stale = True

    def _remember(self, past: _Past) -> None:
        self._past[past.sequence.key] = past
        while len(self._past) > REMEMBER or past.at - next(iter(self._past.values())).at > REMEMBER_S:
            self._past.popitem(last=False)

    def _attach(self, submit: Submit) -> bool:
        """A new kernel submits its open calls again. If this call is known, send what the kernel has not got of it and
        return True."""
        past, sequence = self._past.get(submit.key), self._calls.get(submit.key)
        if past is not None:
            self._rewind(past.sequence, len(submit.request.given))
            self._report_finished(past)
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

    # ── reports to the kernel ─────────────────────────────────────────────────────────────────────────────

    def _feed(self, sequence: Sequence) -> None:
        """Turn the tokens of which no text was made yet into text."""
        new, text = sequence.out[sequence.fed :], sequence.text
        sequence.fed = len(sequence.out)
        if new and text.can_think:
            for token in new:
                text.feed(self._pieces[token])
        elif new:
            text.feed(self.model.detokenize(new))

    def _report(self) -> None:
        now = self.clock()
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
        mirostat = sequence.chain.mirostat
        mu = mirostat.mu if mirostat is not None else None
        return Delta(sequence.key, offset, sequence.out[offset:], sequence.text.take(), logprobs, mu=mu)

    def _report_started(self) -> None:
        """Report which calls got or lost slots. Before a call's end, because the kernel expects its start first."""
        if self._started:
            self._emit(Step([], *self._moves()))

    def _moves(self) -> tuple[list[Started], list[CallKey]]:
        """The calls that got a slot and those that lost one since the last report; they count as reported now."""
        moves = self._started, self._preempted
        self._started, self._preempted = [], []
        return moves

    def _report_finished(self, past: _Past) -> None:
        self._report_started()
        sequence = past.sequence
        offset, sequence.sent = sequence.sent, len(sequence.out)
        self._emit(
            GenerationDone(
                sequence.key,
                offset,
                sequence.out[offset:],
                sequence.text.take(),
                past.reason,
                past.usage,
                past.calls,
                sequence.logprobs[offset:] if sequence.logprobs is not None else None,
                short=sequence.short,
            )
        )

    # ── counts ────────────────────────────────────────────────────────────────────────────────────────────

    def _count(self) -> None:
        """No call is left: check that everything is free."""
        self.slots.check()
        if self.waiting or self._streams or self.slots.num_free != self.slots.total:
            raise Bug(f"idle, but {self.slots.total - self.slots.num_free} slots are in use")

    def stats(self) -> dict[str, object]:
        free = self.slots.num_free
        return {
            "slots": {"total": self.slots.total, "free": free, "used": self.slots.total - free},
            "running": len(self._calls) - len(self.waiting),
            "waiting": len(self.waiting),
            "policy": self.policy.name,
            "lookahead": self.guesser.stats(),
            "passes": {
                "why": str(self.guesser.ahead.cost or NOT_FILLED),
                "filled": self.filled,
                "moved": self.exchanges,
            },
            **self.cache.stats(),
            **self.meter.stats(),
        }
