"""LRU-K against a simple model that sorts all entries at each eviction."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiosd.store.lruk import LEAST_HISTORY, LruK

MOST, OF_OWNER, CORRELATED = 40, 25, 3


class Model:
    """The same rules, implemented simply."""

    def __init__(self, k: int) -> None:
        self.k, self.clock = k, 0
        self.here: dict[int, tuple[int, str]] = {}  # size, owner
        self.refs: dict[int, tuple[list[int], int]] = {}
        self.gone: list[int] = []

    def refer(self, key: int) -> None:
        self.clock += 1
        times, last = self.refs.get(key, ([], 0))
        if not times or self.clock - last > CORRELATED:
            burst = last - times[0] if times else 0
            times = [self.clock, *(time + burst for time in times)][: self.k]
        self.refs[key] = (times, self.clock)

    def rank(self, key: int) -> tuple[int, int]:
        times, last = self.refs[key]
        return (times[self.k - 1] if len(times) >= self.k else 0, last)

    def to_history(self, key: int) -> None:
        self.here.pop(key, None)
        self.gone = [one for one in self.gone if one != key] + [key]
        while len(self.gone) > max(len(self.here), LEAST_HISTORY):
            del self.refs[self.gone.pop(0)]

    def first(self, keys: list[int]) -> int:
        """The next victim: an entry that no agent is working on, if there is one."""
        free = [key for key in keys if self.clock - self.refs[key][1] > CORRELATED]
        return min(free, key=self.rank) if free else min(keys, key=lambda key: self.refs[key][1])

    def get(self, key: int) -> bool:
        if key in self.here:
            self.refer(key)
        return key in self.here

    def put(self, key: int, size: int, owner: str) -> list[int]:
        self.here.pop(key, None)
        self.gone = [one for one in self.gone if one != key]
        self.refer(key)
        if size > OF_OWNER:
            self.to_history(key)
            return []
        victims = []
        while sum(s for s, o in self.here.values() if o == owner) + size > OF_OWNER:
            victims.append(self.first([key for key, (_, o) in self.here.items() if o == owner]))
            self.to_history(victims[-1])
        while sum(s for s, _ in self.here.values()) + size > MOST:
            victims.append(self.first(list(self.here)))
            self.to_history(victims[-1])
        self.here[key] = (size, owner)
        return victims

    def remove(self, key: int) -> None:
        self.here.pop(key, None)
        self.gone = [one for one in self.gone if one != key]
        self.refs.pop(key, None)


KEYS = st.integers(0, 30)
OWNERS = st.sampled_from("abc")
DEEDS = st.one_of(
    st.tuples(st.just("get"), KEYS),
    st.tuples(st.just("put"), KEYS, st.integers(1, 30), OWNERS),
    st.tuples(st.just("remove"), KEYS),
    st.tuples(st.just("again"), KEYS, st.integers(1, 5)),
)


@given(st.integers(1, 3), st.lists(DEEDS, max_size=200))
def test_it_does_what_the_model_does(k: int, deeds: list[Any]) -> None:
    compare(k, deeds)


@pytest.mark.parametrize("seed", range(20))
def test_it_does_what_the_model_does_for_long(seed: int) -> None:
    """Each key has one size and one owner, like notes, so evictions depend only on references."""
    draw = random.Random(seed)
    deeds: list[Any] = []
    for _ in range(400):
        key = min(draw.randrange(18), draw.randrange(18))
        deeds.append(draw.choice((("get", key), ("put", key, 2 + key % 5, "abc"[key % 3]))))
    compare(1 + seed % 3, deeds)


def compare(k: int, deeds: list[Any]) -> None:
    cache: LruK[int] = LruK(MOST, OF_OWNER, k, CORRELATED)
    model = Model(k)
    for deed, key, *rest in deeds:
        if deed == "get":
            assert (cache.get(key) is not None) == model.get(key)
        elif deed == "again":
            cache.again(key, *rest)
            assert len({model.get(key) for _ in range(*rest)}) == 1
        elif deed == "put":
            assert cache.put(key, key, *rest) == model.put(key, *rest)
        else:
            cache.remove(key)
            model.remove(key)
        assert {one for one in range(31) if one in cache} == set(model.here)
        assert cache.bytes == sum(size for size, _ in model.here.values()) <= MOST
        for owner in "abc":
            assert cache.bytes_of(owner) == sum(s for s, o in model.here.values() if o == owner) <= OF_OWNER


def test_a_scan_does_not_evict_entries_that_are_used_again() -> None:
    cache: LruK[int] = LruK(20, correlated=3)
    for _ in range(3):
        for key in range(5):
            if cache.get(key) is None:
                cache.put(key, key, 1, "a")
    for filler in range(1000):
        cache.put(("once", filler), 0, 1, "a")
    assert all(key in cache for key in range(5))


def test_an_entry_that_an_agent_is_working_on_stays() -> None:
    """A new note among often used ones is read again a few references later."""
    cache: LruK[int] = LruK(10, correlated=5)
    for _ in range(3):
        for key in range(10):
            if cache.get(key) is None:
                cache.put(key, key, 1, "a")
    cache.put("new", 1, 1, "a")
    for filler in range(4):
        cache.put(("once", filler), 0, 1, "b")
    assert cache.get("new") == 1


def test_an_entry_that_returns_soon_after_its_eviction_has_its_history() -> None:
    cache: LruK[int] = LruK(10, correlated=3)
    cache.put("wanted", 1, 1, "a")
    for filler in range(12):
        cache.put(("once", filler), 0, 1, "a")
    assert "wanted" not in cache
    cache.put("wanted", 1, 1, "a")
    for filler in range(100):
        cache.put(("later", filler), 0, 1, "a")
    assert "wanted" in cache


def test_an_owner_that_is_forgotten_leaves_nothing() -> None:
    cache: LruK[int] = LruK(100)
    for key in range(10):
        cache.put(key, key, 5, "ab"[key % 2])
    cache.forget_owner("a")
    assert (cache.bytes, cache.bytes_of("a"), len(cache)) == (25, 0, 5)
