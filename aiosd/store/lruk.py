"""LRU-K: a cache that considers how often, not only how recently, an entry was used.

Plain LRU keeps the entries that were used last, so a pass over many entries that are used once (a listing, a search)
evicts all that are used again and again. LRU-K considers the K-th last reference instead: the entry whose K-th last
reference is the oldest is evicted first, and entries with fewer than K references are evicted before all others, by
plain LRU among themselves. Two corrections make it work for agents. References that follow each other closely belong to
one piece of work (an agent reads a note, thinks, reads it again) and do not predict later uses. So within the
*correlated reference period* they count as one, and the entry is not evicted, because its agent is working on it;
otherwise a new note among well-known ones would be gone before it is read the second time. And an entry that returns
soon after its eviction must not start from nothing, or it would never get its second reference: so the references of
evicted entries are kept as a *history*, with as many entries as there are residents. Without it a working set a little
larger than the cache is never learned.

Time is counted in references, so the same references give the same evictions. The cache is pure: its values lie
elsewhere too, evicting one loses nothing and costs no I/O. Its size is in bytes, for each owner and in all.

Invariants: `bytes` is the sum over the residents and at most `most_bytes`; the same for each owner; no key is both
resident and in the history; the history has no more entries than there are residents, or `least_history`.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

K = 2
CORRELATED = 30  # references within which a repetition does not count
LEAST_HISTORY = 16

Value = TypeVar("Value")


@dataclass(slots=True)
class _Entry(Generic[Value]):
    value: Value
    owner: Hashable
    size: int
    times: tuple[int, ...]  # the times of the last K uncorrelated references, the newest first
    last: int  # the last reference, correlated or not

    def rank(self, k: int) -> tuple[int, int]:
        """The entry with the smallest rank is evicted first. A first part of 0: there was no K-th last reference
        yet."""
        return (self.times[k - 1] if len(self.times) >= k else 0, self.last)


class LruK(Generic[Value]):
    """The cache. `most_bytes` in all, `owner_bytes` for each owner (None: only the sum counts)."""

    def __init__(
        self, most_bytes: int, owner_bytes: int | None = None, k: int = K, correlated: int = CORRELATED
    ) -> None:
        self.most_bytes = most_bytes
        self.owner_bytes = most_bytes if owner_bytes is None else min(owner_bytes, most_bytes)
        self.k, self.correlated = k, correlated
        self.bytes = 0
        self.hits = self.misses = self.evictions = 0
        self.clock = 0
        self._entries: dict[Hashable, _Entry[Value]] = {}
        self._history: OrderedDict[Hashable, tuple[tuple[int, ...], int]] = OrderedDict()
        self._of_owner: dict[Hashable, set[Hashable]] = {}
        self._owner_bytes: dict[Hashable, int] = {}
        self._counts: dict[Hashable, list[int]] = {}  # of owners: hits, misses, evictions
        # Residents that were referred to within the correlated reference period, the oldest first. The others are in
        # heaps of (rank, number, key), one for all and one for each owner; what is there of one that has been referred
        # to since is out of date, and skipped.
        self._young: OrderedDict[Hashable, None] = OrderedDict()
        self._heaps: dict[Hashable, list[tuple[tuple[int, int], int, Hashable]]] = {}
        self._number = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def bytes_of(self, owner: Hashable) -> int:
        return self._owner_bytes.get(owner, 0)

    def get(self, key: Hashable, asking: Hashable = None) -> Value | None:
        """The value, and a reference to it; None: it is not here. `asking`: the owner for which a miss is counted."""
        entry = self._entries.get(key)
        if entry is None:
            self.misses += 1
            self._count(asking, 1)
            return None
        self.hits += 1
        self._count(entry.owner, 0)
        self._touch(key, entry)
        return entry.value

    def peek(self, key: Hashable) -> Value | None:
        """The value, without a reference to it."""
        entry = self._entries.get(key)
        return None if entry is None else entry.value

    def again(self, key: Hashable, times: int) -> None:
        """As `times` calls of `get`, one right after the other: the value was used by holders of a copy."""
        entry = self._entries.get(key)
        if entry is not None and times > 0:
            self.hits += times
            self._count(entry.owner, 0, times)
            self._touch(key, entry)
            self.clock += times - 1
            entry.last = self.clock

    def put(self, key: Hashable, value: Value, size: int, owner: Hashable) -> list[Hashable]:
        """Keep a value, and return the keys that were evicted for it. A value larger than an owner's limit is not kept.
        Counts as a reference."""
        old = self._entries.get(key)
        if old is not None and old.size == size and old.owner == owner:  # nothing has to be evicted for it
            old.value = value
            self._touch(key, old)
            return []
        times, last = (old.times, old.last) if old is not None else self._history.pop(key, ((), 0))
        if old is not None:
            self._drop(key)
        entry = _Entry(value, owner, size, times, last)
        self._refer(entry)
        if size > self.owner_bytes:
            self._remember(key, entry)
            return []
        gone = []
        while self.bytes_of(owner) + size > self.owner_bytes:
            gone.append(self._evict(owner))
        while self.bytes + size > self.most_bytes:
            gone.append(self._evict(None))
        self._add(key, entry)
        return gone

    def remove(self, key: Hashable) -> None:
        """The entry does not exist any more: drop it and its history."""
        if key in self._entries:
            self._drop(key)
        self._history.pop(key, None)

    def forget_owner(self, owner: Hashable) -> None:
        for key in list(self._of_owner.get(owner, ())):
            self.remove(key)
        self._counts.pop(owner, None)

    def clear(self) -> None:
        """Drop all values and the history of references."""
        self._entries.clear()
        self._history.clear()
        self._of_owner.clear()
        self._owner_bytes.clear()
        self._heaps.clear()
        self._young.clear()
        self.bytes = 0

    def stats(self) -> dict[str, int]:
        return {
            "entries": len(self._entries),
            "bytes": self.bytes,
            "most_bytes": self.most_bytes,
            "hits": self.hits,
            "faults": self.misses,
            "evictions": self.evictions,
            "history": len(self._history),
        }

    def stats_of(self, owner: Hashable) -> dict[str, int]:
        """Figures about an owner's entries and references."""
        hits, misses, evictions = self._counts.get(owner, (0, 0, 0))
        return {"ram_bytes": self.bytes_of(owner), "hits": hits, "faults": misses, "evictions": evictions}

    def _count(self, owner: Hashable, which: int, times: int = 1) -> None:
        counts = self._counts.get(owner)
        if counts is None:
            counts = self._counts[owner] = [0, 0, 0]
        counts[which] += times

    def _touch(self, key: Hashable, entry: _Entry[Value]) -> None:
        """Note a reference to a resident."""
        self._refer(entry)
        self._young[key] = None
        self._young.move_to_end(key)

    def _refer(self, entry: _Entry[Value]) -> None:
        self.clock += 1
        if not entry.times or self.clock - entry.last > self.correlated:
            # The time between two uncorrelated references counts from the end of the first burst to the begin of this.
            burst = entry.last - entry.times[0] if entry.times else 0
            entry.times = (self.clock, *[time + burst for time in entry.times[: self.k - 1]])
        entry.last = self.clock

    def _add(self, key: Hashable, entry: _Entry[Value]) -> None:
        self._entries[key] = entry
        self._of_owner.setdefault(entry.owner, set()).add(key)
        self._owner_bytes[entry.owner] = self.bytes_of(entry.owner) + entry.size
        self.bytes += entry.size
        self._young[key] = None

    def _drop(self, key: Hashable) -> _Entry[Value]:
        entry = self._entries.pop(key)
        self._young.pop(key, None)
        self.bytes -= entry.size
        self._owner_bytes[entry.owner] -= entry.size
        keys = self._of_owner[entry.owner]
        keys.discard(key)
        if not keys:
            del self._of_owner[entry.owner], self._owner_bytes[entry.owner]
            self._heaps.pop(("owner", entry.owner), None)
        return entry

    def _push(self, which: Hashable, key: Hashable, entry: _Entry[Value]) -> None:
        self._number += 1
        heap = self._heaps.setdefault(which, [])
        heapq.heappush(heap, (entry.rank(self.k), self._number, key))
        present = self._entries if which is None else self._of_owner[entry.owner]
        if len(heap) > 2 * len(present) + 64:  # most of its entries are out of date
            numbered = enumerate((one for one in present if one not in self._young), self._number + 1)
            heap[:] = [(self._entries[one].rank(self.k), number, one) for number, one in numbered]
            self._number += len(heap)
            heapq.heapify(heap)

    def _evict(self, owner: Hashable | None) -> Hashable:
        """Evict the resident (of an owner) with the smallest rank; returns its key."""
        self._age()
        key = self._first(owner)
        entry = self._drop(key)
        self._remember(key, entry)
        self.evictions += 1
        self._count(entry.owner, 2)
        return key

    def _age(self) -> None:
        """Make residents whose correlated period is over candidates for eviction."""
        while self._young:
            key = next(iter(self._young))
            entry = self._entries[key]
            if self.clock - entry.last <= self.correlated:
                return
            del self._young[key]
            self._push(None, key, entry)
            self._push(("owner", entry.owner), key, entry)

    def _first(self, owner: Hashable | None) -> Hashable:
        heap = self._heaps.get(None if owner is None else ("owner", owner), [])
        while heap:
            rank, _, key = heapq.heappop(heap)
            entry = self._entries.get(key)
            current = entry is not None and key not in self._young and entry.rank(self.k) == rank
            if current and (owner is None or entry is None or entry.owner == owner):
                return key
        return next(key for key in self._young if owner is None or self._entries[key].owner == owner)

    def _remember(self, key: Hashable, entry: _Entry[Value]) -> None:
        self._history[key] = (entry.times, entry.last)
        self._history.move_to_end(key)
        while len(self._history) > max(len(self._entries), LEAST_HISTORY):
            self._history.popitem(last=False)
