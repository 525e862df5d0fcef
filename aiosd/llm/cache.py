"""Moves contexts between slots, memory and disk. It owns none of them: each fact about a context has one owner.

    tokens      0 ···················· 511 | 512 ·········· 599 | 600 ····
    lie in      the store: a base, pinned  | cells of the slot  | nothing: to be computed
    known to    Bases, Store               | Slots              | Sequence

The engine decides which sequence gets a slot and which gives one up. The cache fills the slot with the longest prefix
of the sequence's tokens whose state is kept anywhere, and loses nothing useful when a slot goes to another sequence:

- what a free slot still holds is used in place when it is the caller's own context, or no other call would miss it;
- else the longest prefix in the store, or in any slot (of a running or a finished call), is copied; the part that other
  sequences need too stays in the store, as a base, if it can be read there (`bases.py`);
- before a slot is given to another call, its content goes to the store.

Where all slots lie in one cache (`cells.py`), the state in another slot is not copied but shared. Then a call needs not
only a slot but also cells: free slots give up theirs when cells are needed (`make_room`).

Copying the state of a few hundred tokens takes as long as decoding one token; computing them again takes a hundred
times as long. In exact mode only prefilled tokens are shared (see `engine.py`).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from aiosd.llm import llama
from aiosd.llm.arrays import Tokens
from aiosd.llm.bases import Bases
from aiosd.llm.blob import Bytes, StateLayout, StatePiece
from aiosd.llm.cells import Cells
from aiosd.llm.contexts import Store, Swap
from aiosd.llm.prefix import Node, common_prefix, most_shared
from aiosd.llm.sequence import Phase, Sequence
from aiosd.llm.slots import SlotContent, Slots

logger = logging.getLogger("llm.cache")

#: State is moved only if that saves at least WORTH tokens from being computed again. (WORTH_NOTHING: any gain counts.)
WORTH = 16
WORTH_NOTHING = 1

#: A call is admitted if there are cells for its prompt and for this many tokens more of every call.
AHEAD = 64

#: How many bytes of states are moved in a second: assumed, until MEASURED bytes have been moved.
COPIED_PER_S, MEASURED = 1 << 30, 64 << 20

#: The part of the memory for contexts that bases of slots may pin: what is pinned cannot be evicted.
MOST_PINNED = 1 / 2

#: The part of it that buffers may keep while no state moves.
MOST_BUFFERS = 1 / 4


class Cache:
    """The slots of one context and the store behind them. `ram`, `disk`: budgets in bytes."""

    def __init__(
        self,
        context: llama.LlamaContext,
        slots: Slots,
        *,
        exact: bool = False,
        ram: int = 0,
        disk: int = 0,
        folder: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.slots = slots
        self.store: Store | None = None
        self.why_not = ""  # why contexts stay in their slots
        self.copy_s = 0.0
        self._blocks = self._block_bytes = 0  # states saved whole, where there is no store
        self.copied = {"saved": 0, "restored": 0}  # bytes
        self.hits = self.misses = 0  # calls that found a beginning of their prompt, or none
        self._reserved = 0  # bytes of the budget that are kept free for buffers
        self._context = context
        self._exact = exact
        self._budgets = (ram, disk, folder)
        self._clock = clock
        self.cells = Cells(context.cells, slots.total, self._tokens_in_cells) if context.cells else None
        self._refused: Sequence | None = None  # the last call for which there were no cells
        self._open_store()

    def _open_store(self) -> None:
        """Read a sample block to learn how blocks are laid out, or that they cannot be cut."""
        ram, disk, folder = self._budgets
        layout = StateLayout.of(self._context.sample()) if ram else None
        if layout is not None:
            self.store = Store(layout, ram, Swap(folder, disk) if disk and folder else None, self._clock)
        elif ram:
            self.why_not = "within a slot only: the state of this kind of model cannot be cut by tokens"
        else:
            self.why_not = "no memory is set aside for contexts"
        attention = None
        if layout is not None and layout.in_one and len(layout.sizes) == 2 * self._context.n_layer:
            attention = self._context.attention
        self.bases = Bases(attention, self.store, self.slots.total, int(ram * MOST_PINNED))
        if self.store is not None:
            self.store.relieve = self._relieve
            self.store.beside = lambda: self._reserved

    # ── into a slot ───────────────────────────────────────────────────────────────────────────────────────

    def seat(self, sequence: Sequence, now: float) -> None:
        """Give the sequence a free slot (there is one), with the state of as many of its tokens as is kept anywhere.
        Sets `slot`, `length`, `prefilled`."""
        if sequence.snapshot is not None and self._resume(sequence):
            return
        sequence.length = sequence.prefilled = 0
        tokens, most = self._wanted(sequence)
        here = self.slots.match(sequence, tokens, most)
        assert here is not None, "a call was admitted, but no slot is free"
        held = self.slots.held(here.slot)
        target = self.slots.cheapest()
        move = here.length and not self._may_use_up(held, here.length, sequence) and not len(target.tokens)
        length, source = self._elsewhere(sequence.scope, tokens, most)
        if length >= here.length + WORTH or (move and length >= here.length):
            if source is not None and self.cells is None:
                self._keep(source, tokens, length, sequence.scope)
            if self._copy(sequence, target, tokens, length):
                return
        self._in_place(sequence, here.slot, here.length)

    def reusable(self, sequence: Sequence) -> int:
        """How many tokens of the sequence need not be computed if it got a slot now."""
        if sequence.snapshot is not None:
            return len(sequence.prompt)
        tokens, most = self._wanted(sequence)
        here = self.slots.match(sequence, tokens, most)
        return max(here.length if here else 0, self._elsewhere(sequence.scope, tokens, most)[0])

    def leader(self, sequence: Sequence) -> tuple[Sequence, int] | None:
        """The running prefill whose result this sequence should wait for, and up to which token."""
        if sequence.snapshot is not None or (self.store is None and self.cells is None):
            return None
        tokens, most = self._wanted(sequence)
        best: tuple[int, int, Sequence] | None = None
        for owner in self.slots.owners():
            if owner.phase is not Phase.PREFILL or owner.parked or owner.scope != sequence.scope:
                continue
            length = min(common_prefix(tokens, owner.prompt), most)
            if length > owner.length and (best is None or (length, owner.length) > best[:2]):
                best = (length, owner.length, owner)
        if best is None or best[0] < self.reusable(sequence) + WORTH:
            return None
        return best[2], best[0]

    def _wanted(self, sequence: Sequence) -> tuple[Tokens, int]:
        """The tokens to look for, and how many of them may come from kept state. The last token of a prompt is always
        computed, because its logits are needed; in exact mode the last two, because one alone is computed in another
        way."""
        if sequence.out and not self._exact:
            return sequence.tokens(), sequence.target
        return sequence.prompt, max(len(sequence.prompt) - (2 if self._exact else 1), 0)

    def _may_use_up(self, held: SlotContent, length: int, sequence: Sequence) -> bool:
        """May the tokens after the first `length` of a free slot be overwritten: no other call needs them from here?"""
        return held.kept or held.peer == sequence.peer or held.reusable - length < WORTH

    def _elsewhere(self, scope: str, tokens: Tokens, most: int, worth: int = WORTH) -> tuple[int, int | None]:
        """The longest beginning that can be copied, and the slot it must be taken from (None: the store has it)."""
        if self.store is None and self.cells is None:
            return 0, None
        length, source = self.store.length(scope, tokens, most) if self.store is not None else 0, None
        least = length + worth  # what a slot must offer to be worth reading
        for slot, content, available in self._contents(scope):
            if min(available, most) > max(length, least - 1):
                there = min(common_prefix(tokens, content), available, most)
                if there > length and there >= least:
                    length, source = there, slot
        return length, source

    def _contents(self, scope: str) -> Iterator[tuple[int, Tokens, int]]:
        """The contents of the slots of a scope: slot, tokens, and how many of them other calls may use."""
        for owner in self.slots.owners():
            if owner.scope == scope:
                yield owner.slot, owner.prompt, self._shareable(owner)
        for held in self.slots.free_slots():
            if held.scope == scope:
                yield held.slot, held.tokens, held.reusable

    def _shareable(self, sequence: Sequence) -> int:
        """How many tokens of a running call other calls may use."""
        return min(sequence.prefilled if self._exact else sequence.length, len(sequence.prompt))

    def _in_place(self, sequence: Sequence, slot: int, length: int) -> None:
        held = self.slots.held(slot)
        if not self._may_use_up(held, length, sequence):
            self._keep(slot, held.tokens, held.reusable, held.scope)
        if not self.slots.holds(slot):  # wiped, because memory was needed
            length = 0
        self.slots.take(slot, sequence)
        if not self._context.cut(slot, length):  # this kind of model can only forget all
            self._context.cut(slot, 0)
            length = 0
        self.bases.cut(slot, length)
        if self.cells is not None:
            self.cells.cut(slot, length)
        sequence.length = sequence.prefilled = length

    def _copy(self, sequence: Sequence, target: SlotContent, tokens: Tokens, length: int) -> bool:
        """From the store, or from slots that share their cells, into a slot. False: it is not there any more, and no
        slot is taken."""
        with self._copying():
            pieces: list[StatePiece] = []
            there = self._in_slots(sequence.scope, tokens[:length], target.slot)[0]
            if there < length:
                pieces, kept = self.store.find(sequence.scope, tokens, length, sequence.peer) if self.store else ([], 0)
                length = max(kept, there)
            if not length:
                return False
            self._clear(target)
            self.slots.take(target.slot, sequence)
            self._fill(sequence, tokens, pieces, length, length)
            sequence.prefilled = sequence.length
            return True

    def _fill(self, sequence: Sequence, tokens: Tokens, pieces: list[StatePiece], length: int, public: int) -> None:
        """Fill the slot. What other slots have is shared with them, or, of the first `public` tokens, what others use
        too is read as a base. The rest is copied from the pieces."""
        slot = sequence.slot
        self._empty(slot)
        if self.cells is not None:
            start, source = self._in_slots(sequence.scope, tokens[:length], slot)
            copied = start < length and self._make_room(length - start, spare=source)
            copied = copied and self._restore(slot, pieces, start, length)
            if source is not None:
                self._context.share(source, slot, start)
                self.cells.share(source, slot, start)
            sequence.length = length if copied else start
            return
        start = 0
        if self.bases.possible:
            start = self.bases.take(slot, sequence.scope, tokens, self._in_common(sequence, tokens[:public]))
        sequence.length = length
        if start < length and not self._restore(slot, pieces, start, length):
            self._empty(slot)
            sequence.length = 0

    def _restore(self, slot: int, pieces: list[StatePiece], start: int, length: int) -> bool:
        """Copy the tokens [start, length) of the pieces into a slot. False: llama.cpp refuses that, and it is empty."""
        if not pieces:
            return False
        assert self.store is not None
        layout = self.store.layout
        block = layout.join(pieces, slot, length, self._context.buffer(layout.size(length - start)), start)
        self.copied["restored"] += block.nbytes
        if self.cells is not None:
            self.cells.take(length - start)
        return self._context.restore(slot, block)

    def _in_slots(self, scope: str, tokens: Tokens, slot: int) -> tuple[int, int | None]:
        """How many leading tokens this slot can share with another one, and with which."""
        if self.cells is None:
            return 0, None
        there = ((min(common_prefix(tokens, held), most), other) for other, held, most in self._contents(scope))
        length, source = max((found for found in there if found[1] != slot), default=(0, None))
        return length, source if length else None

    def _in_common(self, sequence: Sequence, tokens: Tokens) -> int:
        """How many leading tokens to read as a base: the number that saves most, judged by the tokens in the other
        slots and in the store. (A base that many slots already stand on is taken without this search.)"""
        assert self.store is not None
        scope, slots = sequence.scope, self.slots
        popular = self.bases.popular(scope, tokens)
        if popular:
            return popular
        owners = [owner.prompt for owner in slots.owners() if owner.scope == scope and owner is not sequence]
        held = [held.tokens for held in slots.free_slots() if held.scope == scope]
        kept = self.store.branches(scope, tokens, len(tokens))
        return most_shared([*kept, *(common_prefix(tokens, other) for other in owners + held)])

    def _relieve(self) -> bool:
        """Memory is needed: wipe the free slot that stands on a base and was unused for longest. False: there is
        none."""
        held = [held for held in self.slots.free_slots() if self.bases.length(held.slot)]
        if held:
            self.wipe(min(held, key=lambda held: held.used).slot)
        return bool(held)

    def _empty(self, slot: int) -> None:
        self._context.cut(slot, 0)
        self.bases.drop(slot)
        if self.cells is not None:
            self.cells.cut(slot, 0)

    def wipe(self, slot: int) -> None:
        """Forget what a free slot holds."""
        self.slots.forget(slot)
        self._empty(slot)

    def tokens_in(self, slot: int) -> int:
        """How many tokens a slot holds, its base included."""
        return max(self._context.last_position(slot) + 1, self.bases.length(slot))

    @property
    def move_s(self) -> float:
        """Seconds for moving the state of one token out of a slot and that of another into it."""
        if self.store is None:
            return 0.0
        copied = sum(self.copied.values())
        rate = copied / self.copy_s if copied >= MEASURED and self.copy_s else COPIED_PER_S
        return 2 * self.store.layout.bytes_per_token / rate

    def exchange(self, a: int, b: int) -> None:
        """Two slots exchange their owners and contents."""
        with self._buffers_given_back():
            self._context.exchange(a, b)
        self.bases.exchange(a, b)
        self.slots.exchange(a, b)

    def _resume(self, sequence: Sequence) -> bool:
        """Restore the state that `unseat` saved. False: it is gone."""
        snapshot, sequence.snapshot = sequence.snapshot, None
        with self._copying():
            target = self.slots.cheapest()
            if not isinstance(snapshot, Node):
                assert snapshot is not None
                self._forget_block(snapshot)
                self.slots.take(target.slot, sequence)
                self._empty(target.slot)
                room = self._make_room(sequence.length)
                if self.cells is not None:
                    self.cells.take(sequence.length)
                if not room or not self._context.restore(target.slot, snapshot):
                    sequence.length = sequence.prefilled = 0
                return True
            assert self.store is not None
            self._clear(target)  # first: making room for it may evict the pieces we look for
            pieces = self.store.whole(snapshot, sequence.peer)
            if pieces is None:
                return False
            self.slots.take(target.slot, sequence)
            prefilled = sequence.prefilled
            public = snapshot.start if snapshot.private else snapshot.stop
            self._fill(sequence, sequence.tokens(), pieces, snapshot.stop, public)
            sequence.prefilled = min(prefilled, sequence.length)
            if snapshot.private:
                self.store.drop(snapshot)
            return True

    # ── cells, where all slots lie in one cache ───────────────────────────────────────────────────────────

    def fits(self, sequence: Sequence) -> bool:
        """Are there cells for this waiting call, if all free slots gave up theirs? No cell is promised twice: what is
        still to be computed of running calls' prompts counts, and so do some tokens more of each call. A call alone
        always fits, because a slot never holds more tokens than there are cells."""
        if self.cells is None:
            return True
        owners = list(self.slots.owners())
        if not owners:
            return True
        promised = sum(max(owner.num_pending, 0) + _ahead(owner) for owner in owners)
        used = self.cells.used_by(owner.slot for owner in owners)
        tokens, _ = self._wanted(sequence)
        running = [owner for owner in owners if owner.scope == sequence.scope]
        shared = max((min(common_prefix(tokens, one.prompt), self._shareable(one)) for one in running), default=0)
        needed = sequence.target + _ahead(sequence) - shared
        fits = used + promised + needed <= self.cells.total
        self._refused = None if fits else sequence
        return fits

    def crowded(self, waiting: list[Sequence]) -> bool:
        """Are there still no cells for the call that was refused last?"""
        return self._refused is not None and self._refused in waiting and not self.fits(self._refused)

    def make_room(self, count: int) -> bool:
        """Make `count` cells free: free slots are wiped, those unused for longest first; their content goes to the
        store. False: that is not enough."""
        if self.cells is None or self.cells.has(count):
            return True
        with self._copying():
            return self._make_room(count)

    def _make_room(self, count: int, spare: int | None = None) -> bool:
        while self.cells is not None and not self.cells.has(count):
            idle = self._idle(spare)
            if not idle:
                return False
            oldest = min(idle, key=lambda held: held.used)
            self._clear(oldest)
            self.wipe(oldest.slot)
        return True

    def has_fewer_cells(self, count: int) -> bool:
        """llama.cpp reports no room for `count` tokens, although there is room by this count: correct the count, so
        that the next step makes room. False: that would not help, because one call has everything."""
        if self.cells is None or (self.slots.num_free >= self.slots.total - 1 and not self._idle()):
            return False
        logger.warning("llama.cpp has no room for %d tokens: %s", count, self.stats()["cells"])
        self.cells.total = min(self.cells.total, self.cells.used + count - 1)
        return True

    def _idle(self, spare: int | None = None) -> list[SlotContent]:
        """The free slots that hold something."""
        return [held for held in self.slots.free_slots() if len(held.tokens) and held.slot != spare]

    def _tokens_in_cells(self, slot: int) -> int:
        return self._context.last_position(slot) + 1

    # ── out of a slot ─────────────────────────────────────────────────────────────────────────────────────

    def unseat(self, sequence: Sequence, now: float) -> None:
        """Preempt: free the slot, and keep the sequence's state where `seat` finds it."""
        slot, length = sequence.slot, sequence.length
        if length:
            with self._copying():
                sequence.snapshot = self._save(sequence, length)
        self._empty(slot)
        self.slots.release(sequence, now, keep=False)

    def leave(self, sequence: Sequence, now: float) -> None:
        """The call is over. Its slot keeps the content until another call needs the slot."""
        if sequence.slot >= 0:
            self.slots.release(sequence, now, keep=True, exact=self._exact)
        snapshot, sequence.snapshot = sequence.snapshot, None
        if isinstance(snapshot, Node):
            if snapshot.private and self.store is not None:
                self.store.drop(snapshot)
        elif snapshot is not None:
            self._forget_block(snapshot)

    def _keep_block(self, block: Bytes) -> Bytes | None:
        """Keep a whole state where there is no store. None: there is no room."""
        if self._block_bytes + self._reserved + block.nbytes > self._budgets[0]:
            return None
        self._blocks += 1
        self._block_bytes += block.nbytes
        return block.copy()

    def _forget_block(self, block: Bytes) -> None:
        self._blocks -= 1
        self._block_bytes -= block.nbytes

    def _save(self, sequence: Sequence, length: int) -> Node[Any] | Bytes | None:
        """Save the state of a slot, which is lost to the slot; the caller must still empty it."""
        slot, store = sequence.slot, self.store
        if store is None:
            return self._keep_block(self._read(slot))
        layout, tokens = store.layout, sequence.tokens()
        common = min(sequence.prefilled if self._exact else length, len(sequence.prompt), length)
        common = max(common, self.bases.length(slot))  # a base may reach further, into tokens that were given out
        first = max(store.length(sequence.scope, tokens, common), self.bases.length(slot))
        block = self._read(slot, first)
        node = self._add(sequence.scope, tokens, common, (block, slot, length, first), sequence.peer)
        if node is None or common == length:
            return node
        try:
            own = layout.cut(block, slot, length, common, length, first)
        except LookupError:
            return node
        return store.add_private(node, tokens[common:length], own, sequence.peer) or node

    def _read(self, slot: int, first: int = 0) -> Bytes:
        """The state in a slot from token `first` on. The slot loses the tokens before it."""
        block = self._context.read(slot, first)
        self.copied["saved"] += block.nbytes
        return block

    def _add(
        self, scope: str, tokens: Tokens, stop: int, where: tuple[Bytes, int, int, int], peer: int
    ) -> Node[Any] | None:
        """Add to the store from `where`: a block, the slot that it was read from, and `length`, `first`: it holds the
        tokens [first, length). None: there is no room, or the store has meanwhile lost tokens before `first`."""
        store, (block, slot, length, first) = self.store, where
        assert store is not None
        try:
            return store.add(scope, tokens, stop, lambda a, b: store.layout.cut(block, slot, length, a, b, first), peer)
        except LookupError:
            return None
        finally:
            self.bases.sync()

    def _keep(self, slot: int, tokens: Tokens, stop: int, scope: str) -> None:
        """Copy the first `stop` tokens of a slot to the store, unless it has them."""
        store = self.store
        if store is None or store.length(scope, tokens, stop) >= stop:
            return
        length = self.tokens_in(slot)
        if length < stop:
            return
        with self._copying():
            owner = self.slots.owner(slot)
            peer = owner.peer if owner is not None else self.slots.held(slot).peer
            node = self._add(scope, tokens, stop, (self._read(slot), slot, length, self.bases.length(slot)), peer)
        if node is not None and owner is None and stop >= self.slots.held(slot).reusable:
            self.slots.mark_kept(slot)

    def _clear(self, held: SlotContent) -> None:
        """Before a free slot goes to another call: what is kept nowhere else goes to the store."""
        store, slot, stop = self.store, held.slot, held.reusable
        if store is None or held.kept or stop < WORTH:
            return
        first = max(store.length(held.scope, held.tokens, stop), self.bases.length(slot))
        if first >= stop:
            return
        length = self.tokens_in(slot)
        if length >= stop:
            self.slots.forget(slot)
            self._add(held.scope, held.tokens, stop, (self._read(slot, first), slot, length, first), held.peer)
            self._empty(slot)

    @contextlib.contextmanager
    def _copying(self) -> Iterator[None]:
        """The time inside this block counts as copying. Never nested, so that no time is counted twice."""
        began = self._clock()
        try:
            with self._buffers_given_back():
                yield
        finally:
            self.copy_s += self._clock() - began

    @contextlib.contextmanager
    def _buffers_given_back(self) -> Iterator[None]:
        """States go in and out of slots through buffers, which count as memory for contexts. They are kept for the next
        time if they are small and the store leaves room for them; else they are freed."""
        yield
        budget, buffers = self._budgets[0], self._context.buffer_bytes
        self._reserved = max(self._reserved, min(buffers, int(budget * MOST_BUFFERS)))
        kept = self.store.ram if self.store is not None else self._block_bytes
        if buffers > self._reserved or kept + buffers > budget:
            self._context.drop_buffers()

    # ── contexts by name ──────────────────────────────────────────────────────────────────────────────────

    def export(self, scope: str, tokens: Tokens, peer: int) -> StatePiece | None:
        """The state of the longest kept prefix of these tokens, as one piece."""
        if self.store is None:
            return None
        length, source = self._elsewhere(scope, tokens, len(tokens), WORTH_NOTHING)
        if source is not None:
            self._keep(source, tokens, length, scope)
        pieces, length = self.store.find(scope, tokens, length, peer)
        return self.store.layout.merge(pieces, length) if length else None

    def take_in(self, scope: str, tokens: Tokens, piece: StatePiece, peer: int) -> int:
        """Keep a state read from a file; returns how many of its tokens are in the store now."""
        store = self.store
        if store is None:
            return 0
        layout = store.layout
        store.add(scope, tokens, piece.length, lambda a, b: layout.part_of(piece, a, b), peer)
        self.bases.sync()
        return store.length(scope, tokens, piece.length)

    def release(self, scope: str, tokens: Tokens, peer: int) -> None:
        """This peer will not continue these tokens: drop the state that only it used."""
        for held in self.slots.free_slots():
            if (
                held.peer == peer
                and held.scope == scope
                and common_prefix(tokens, held.tokens) >= held.reusable - WORTH
            ):
                self.wipe(held.slot)
        if self.store is not None:
            self.store.release(scope, tokens, peer)

    def gone(self, peer: int) -> None:
        """The peer is dead: state that only it used goes first when room is needed."""
        if self.store is not None:
            self.store.gone(peer)

    # ── counts ────────────────────────────────────────────────────────────────────────────────────────────

    def count(self, cached: int) -> None:
        """Count a call that has begun with `cached` tokens from the cache."""
        if cached:
            self.hits += 1
        else:
            self.misses += 1

    def stats(self) -> dict[str, Any]:
        slots = self.slots
        held = [held for held in slots.free_slots() if len(held.tokens)]
        resident = sum(owner.length for owner in slots.owners()) + sum(len(held.tokens) for held in held)
        elsewhere = sum(self.bases.length(slot) for slot in range(slots.total))
        cells = self.cells.stats(owner.slot for owner in slots.owners()) if self.cells is not None else None
        if cells is not None:
            elsewhere = cells["saved_by_sharing"]
        below: dict[str, Any] = self.store.stats() if self.store else {}
        ram, disk, folder = self._budgets
        per_token = self.store.layout.bytes_per_token if self.store else 0
        asked = self.hits + self.misses
        return {
            "tiers": {
                "slot": {
                    "contexts": slots.total - slots.num_free + len(held),
                    "tokens": resident,
                    "bytes": (resident - elsewhere) * per_token,
                },
                "ram": {
                    **below.get("ram", {"contexts": self._blocks, "bytes": self._block_bytes, "budget": ram}),
                    "buffers": self._context.buffer_bytes,
                },
                "disk": below.get("disk", {"contexts": 0, "bytes": 0, "budget": disk if folder else 0}),
            },
            "prefix": {
                "hits": self.hits,
                "misses": self.misses,
                "hit_rate": round(self.hits / asked, 3) if asked else 0.0,
                "entries": below.get("entries", 0),
                "sharing": self.why_not or "on",
                "in_place": self.bases.stats() if self.bases.possible else None,
            },
            "cells": cells,
            "evictions": below.get("evictions", {"disk": 0, "dropped": 0}),
            "copy_s": round(self.copy_s, 4),
            "copied_bytes": dict(self.copied),
        }

    def by_peer(self) -> dict[int, tuple[str, int]]:
        """Where the context of each peer lies (slot, ram or disk), and how many tokens it has."""
        found = self.store.by_peer() if self.store else {}
        for held in self.slots.free_slots():
            if len(held.tokens) >= found.get(held.peer, ("", 0))[1]:
                found[held.peer] = ("slot", len(held.tokens))
        for owner in self.slots.owners():
            found[owner.peer] = ("slot", owner.length)
        return found

    def close(self) -> None:
        if self.store is not None:
            self.store.close()


def _ahead(sequence: Sequence) -> int:
    """How many tokens a call may generate soon."""
    return max(min(AHEAD, sequence.limit - len(sequence.out)), 1)
