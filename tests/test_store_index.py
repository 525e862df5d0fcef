"""The index of vectors against a plain search with numpy: small and large, with dead rows, filters and duplicates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiosd.store import index
from aiosd.store.index import BITS, VectorIndex

WIDTH = 32


def vectors(count: int, seed: int = 0, width: int = WIDTH) -> Any:
    made = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float16).astype(np.float32)


class Naive:
    """A plain search, with the results that a `VectorIndex` must have."""

    def __init__(self) -> None:
        self.vectors: dict[int, Any] = {}

    def search(self, query: Any, k: int, among: list[int] | None = None) -> list[tuple[int, float]]:
        scored = [
            (number, float(vector @ query))
            for number, vector in self.vectors.items()
            if among is None or number in among
        ]
        return sorted(scored, key=lambda pair: -pair[1])[:k]


def same(found: list[tuple[int, float]], expected: list[tuple[int, float]]) -> None:
    """Check for the same scores in the same order; rows with equal scores may be in any order."""
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=1e-3)
    assert len({number for number, _ in found}) == len(found)


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["add", "add", "add", "replace", "remove", "search", "among"]), st.integers(0, 10**6)),
    max_size=60,
)


@pytest.mark.parametrize("large", [10**6, 8])
@given(operations=OPERATIONS)
@settings(max_examples=40, deadline=None)
def test_an_index_finds_what_a_plain_search_finds(large: int, operations: list[tuple[str, int]]) -> None:
    """Also in a large index, because all of so few rows are candidates."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "LARGE", large)
        mine, naive = VectorIndex(WIDTH), Naive()
        for operation, number in operations:
            one = number % 20
            if operation == "add" or (operation == "replace" and one in naive.vectors):
                count = 1 if operation == "replace" else 1 + number % 5
                new = vectors(count, number)
                ids = [(one + step) % 20 for step in range(count)]
                mine.add(ids, new)
                naive.vectors |= dict(zip(ids, new, strict=True))
            elif operation == "remove":
                mine.remove(one)
                naive.vectors.pop(one, None)
            else:
                among = sorted({one, (one * 7) % 20, 99}) if operation == "among" else None
                query = vectors(1, number + 1)[0]
                same(mine.search(query, 1 + number % 7, among), naive.search(query, 1 + number % 7, among))
        assert len(mine) == len(naive.vectors)
        assert mine.rows == len(mine) + mine.dead


def refine(made: VectorIndex) -> None:
    """Complete the index's copy in bits."""
    while not made.refine():
        pass
    assert made._rough is not None


def test_a_large_index_finds_nearly_all() -> None:
    """With vectors in clusters, like those of real texts."""
    width, middles = 384, vectors(200, 2, 384)
    many = middles[np.arange(20_000) % 200] + 0.7 * vectors(20_000, 3, width)
    many /= np.linalg.norm(many, axis=1, keepdims=True)
    mine = VectorIndex(width)
    for begin in range(0, len(many), 4000):
        mine.add(range(begin, begin + 4000), many[begin : begin + 4000])
    queries = middles[:20] + 0.7 * vectors(20, 1, width)
    refine(mine)
    hits = 0
    for query in queries:
        found = {number for number, _ in mine.search(query, 10)}
        hits += len(found & set(np.argsort(-(many @ query))[:10].tolist()))
    assert hits >= 0.99 * 200
    among = np.arange(3, 20_000, 10)
    mine.remove(int(among[0]))
    assert len(among) > 2 * index.RESCORED, "so many that bits are compared first"
    hits = 0
    for query in queries:
        found = {number for number, _ in mine.search(query, 10, among)}
        hits += len(found & set(among[1 + np.argsort(-(many[among[1:]] @ query))[:10]].tolist()))
    assert hits >= 0.99 * 200


def test_rows_added_after_the_bits_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each search makes the bits of some rows. Until all rows have them, all are compared."""
    monkeypatch.setattr(index, "AT_ONCE", 7_000)
    many = vectors(20_000, width=BITS)
    mine = VectorIndex(BITS)
    mine.add(range(len(many)), many)
    among = np.arange(1, 20_000, 2)
    for place in (1, 7_001, 19_999, 13_001):
        assert mine.search(many[place], 1, among)[0][0] == place
    assert mine._bits.ntotal == len(many)
    new = vectors(1, 5, BITS)
    mine.add([10**6], new)
    assert mine.search(new[0], 1, np.append(among, 10**6))[0][0] == 10**6
    assert mine.search(new[0], 1)[0][0] == 10**6
    assert mine._rough.ntotal == len(many) + 1


def test_dead_rows_cannot_hide_a_live_one() -> None:
    """The dead rows of a note that was changed thousands of times are nearer to the query than all live ones."""
    many = vectors(20_000, width=64)
    mine = VectorIndex(64)
    mine.add(range(len(many)), many)
    refine(mine)
    own = vectors(1, 5, 64)[0]
    for _ in range(4000):
        mine.add([7], own.reshape(1, -1))
    other = own + 0.1 * many[8]
    mine.add([8], (other / np.linalg.norm(other)).reshape(1, -1))
    assert [number for number, _ in mine.search(own, 2)] == [7, 8]
    assert not mine.worn
    for _ in range(4000):
        mine.add([7], own.reshape(1, -1))
    assert mine.worn


def test_the_mean_is_that_of_the_first_vectors() -> None:
    """With any number of dimensions, and with k larger than the index."""
    for width in (1, 7, 100, 384):
        mine = VectorIndex(width)
        mine.add([3, 4], vectors(2, width, width))
        assert len(mine.search(vectors(1, 9, width)[0], 1000)) == 2
        assert mine.search(vectors(1, 9, width)[0], 5, []) == []
    assert VectorIndex(8).search(vectors(1, 1, 8)[0], 5) == []
