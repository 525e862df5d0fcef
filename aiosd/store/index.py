"""Vectors of one owner in memory, and the nearest of them to another vector. The only file that imports FAISS.

A vector is a row, in half precision, as it is in the database. With up to LARGE vectors all rows are compared with the
query. Above that a second copy, of one bit for each dimension (RaBitQ), finds RESCORED candidates, which are compared
exactly. A third copy of the same bits, row by row, does that among the rows that pass a filter, if these are many. To
make each copy takes as long as all else when an index is read, so they are made afterwards: by searches, a part by
each, and (`refine`) between them. Until then all rows are compared. A vector that is removed or replaced leaves a dead
row, a tombstone: it is found no more, and when a fifth of the rows is dead the owner of this object makes the index
anew (`worn`).

A live vector is always found by itself. The estimates of RaBitQ are good enough not to miss it, and dead rows cannot
hide it: candidates are fetched until RESCORED of them are live (a note that is changed a thousand times leaves a
thousand dead rows). `among` is for filters: then only these rows are candidates.

Nothing of this is ever saved: FAISS loads a damaged file and uses it, or crashes, while the rows can be read again from
the database in a second. FAISS runs in one thread: a process that has used more cannot be forked safely.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Ints = NDArray[np.int64]

LARGE = 16_000  # rows; more get the copy in bits
RESCORED = 500  # candidates of that copy, for BITS dimensions; more if there are fewer bits
BITS = 384
AT_ONCE = 4_000  # rows that a copy in bits gets by one search
WORN = 0.2  # the share of dead rows at which it is time for a new index,
WORN_LEAST = 64  # … if there are more than this
LOOKED_UP = 20  # the part of all rows above which ids are not looked up one by one
PER_ENTRY = 120  # bytes of memory for the numbers of one vector


class VectorIndex:
    """The index of vectors with `width` dimensions and unit length."""

    def __init__(self, width: int) -> None:
        logging.getLogger("faiss").setLevel(logging.WARNING)  # it logs which library it tries
        import faiss
        import numpy as np

        faiss.omp_set_num_threads(1)
        self._np = np
        self._faiss: Any = faiss  # Any: its types do not include its own Python layer
        self.width = width
        self._exact: Any = self._new_exact()
        self._rough: Any = None
        self._bits: Any = None  # as `_rough`, but each row can be compared by itself
        self._rows: dict[int, int] = {}  # of the live ones, by id
        self._ids: Ints = np.zeros(0, np.int64)  # by row; -1: dead. Longer than there are rows
        self.dead = 0

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, number: int) -> bool:
        return number in self._rows

    @property
    def rows(self) -> int:
        return int(self._exact.ntotal)

    @property
    def bytes(self) -> int:
        rough = 2 * (self.width // 8 + 16) if self._rough is not None else 0
        return self.rows * (2 * self.width + rough) + len(self._rows) * PER_ENTRY

    @property
    def worn(self) -> bool:
        return self.dead > max(WORN_LEAST, WORN * self.rows)

    def _new_exact(self) -> Any:
        """An index that compares all rows, in half precision."""
        faiss = self._faiss
        return faiss.IndexScalarQuantizer(self.width, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)

    # ── changing ──────────────────────────────────────────────────────────────────────────────────────────

    def add(self, ids: Sequence[int], vectors: Floats) -> None:
        """One row of `vectors` for each id; an id that is here already has this vector from now on."""
        if not len(ids):
            return
        first = self.rows
        self._exact.add(vectors)
        self._enter(ids, first)
        if self._rough is not None and self._rough.ntotal == first:
            self._rough.add(vectors)

    def add_halves(self, ids: Sequence[int], halves: NDArray[np.uint8]) -> None:
        """The same in half precision, as bytes: many at once, when an index is made anew."""
        first = self.rows
        self._exact.add_sa_codes(halves)
        self._enter(ids, first)

    def _enter(self, ids: Sequence[int], first: int) -> None:
        """Enter the ids of the rows from `first` on."""
        self._make_room(self.rows)
        for row, number in enumerate(ids, first):
            self.remove(number)  # of two with one id in `ids` the last one counts
            self._ids[row] = number
            self._rows[number] = row

    def remove(self, number: int) -> None:
        row = self._rows.pop(number, None)
        if row is not None:
            self._ids[row] = -1
            self.dead += 1

    def _make_room(self, rows: int) -> None:
        if rows > len(self._ids):
            longer = self._np.full(max(rows, len(self._ids) * 5 // 4, 16), -1, self._np.int64)
            longer[: len(self._ids)] = self._ids
            self._ids = longer

    def refine(self) -> bool:
        """Go on with the copy in bits, for some milliseconds. True: it has all rows, or is not needed."""
        if self._rough is None:
            if self.rows <= LARGE:
                return True
            self._begin_rough()
        return self._catch_up(self._rough)

    def _begin_rough(self) -> None:
        """Make the copies in bits, without any row yet. The bits are relative to the mean of the rows."""
        vectors = self._exact.reconstruct_n(0, min(self.rows, LARGE))
        self._rough = self._faiss.IndexRaBitQFastScan(self.width, self._faiss.METRIC_INNER_PRODUCT)
        self._bits = self._new_bits()
        for index in (self._rough, self._bits):
            index.train(vectors)

    def _new_bits(self) -> Any:
        return self._faiss.IndexRaBitQ(self.width, self._faiss.METRIC_INNER_PRODUCT)

    # ── searching ─────────────────────────────────────────────────────────────────────────────────────────

    def search(self, vector: Floats, k: int, among: Sequence[int] | Ints | None = None) -> list[tuple[int, float]]:
        """(id, cosine) of the `k` nearest, the nearest first; of ids that are in `among` (each once), if that is
        given."""
        query = self._np.ascontiguousarray(vector, self._np.float32).reshape(1, self.width)
        refined = self.refine()
        if among is not None:
            return self._compare(query, k, self._sifted(query, self._rows_of(among), self._wanted(k)))
        if self._rough is None or not refined:
            return self._compare_all(query, k)
        return self._compare(query, k, self._candidates(query, self._wanted(k)))

    def _rows_of(self, ids: Sequence[int] | Ints) -> Ints:
        """The rows of the ids that are in the index. Looking up each takes long if there are many."""
        np = self._np
        if len(ids) * LOOKED_UP > self.rows:
            here: Ints = np.flatnonzero(np.isin(self._ids[: self.rows], np.asarray(ids, np.int64)))
            return here
        numbers = ids.tolist() if isinstance(ids, np.ndarray) else ids
        rows: Ints = np.fromiter(map(self._rows.get, numbers, itertools.repeat(-1)), np.int64)
        return rows[rows >= 0]

    def _wanted(self, k: int) -> int:
        """The number of candidates."""
        return max(RESCORED, 4 * k) * -(-BITS // self.width)

    def _sifted(self, query: Floats, rows: Ints, wanted: int) -> Ints:
        """The rows that may be the nearest: `wanted` of them, if there are many more."""
        if self._bits is None or len(rows) < 2 * wanted or not self._catch_up(self._bits):
            return rows
        chosen = self._new_bits()
        chosen.center, chosen.is_trained = self._bits.center, True
        chosen.add_sa_codes(self._np.take(self._codes(self._bits), rows, axis=0))
        return rows[chosen.search(query, wanted)[1][0]]  # type: ignore[no-any-return]

    def _catch_up(self, copy: Any) -> bool:
        """Whether a copy has all rows; if not, add some more, for some milliseconds."""
        begin = int(copy.ntotal)
        count = min(self.rows - begin, AT_ONCE)
        if count:
            copy.add(self._exact.reconstruct_n(begin, count))
        return begin + count == self.rows

    def _candidates(self, query: Floats, wanted: int) -> Ints:
        """Rows that may be the nearest: at least this number of live ones, or all."""
        count = wanted
        while True:
            count = min(count, self.rows)
            rows = self._rough.search(query, count)[1][0]
            live = rows[(rows >= 0) & (self._ids[rows] >= 0)]
            if len(live) >= min(wanted, len(self)) or count == self.rows:
                return live  # type: ignore[no-any-return]
            count *= 4

    def _compare_all(self, query: Floats, k: int) -> list[tuple[int, float]]:
        if not len(self):
            return []
        parameters = None
        if self.dead:
            live = self._np.packbits(self._ids[: self.rows] >= 0, bitorder="little")
            parameters = self._faiss.SearchParameters(sel=self._faiss.IDSelectorBitmap(live))
        scores, rows = self._exact.search(query, min(k, len(self)), params=parameters)
        return self._named(scores[0], rows[0])

    def _compare(self, query: Floats, k: int, rows: Ints) -> list[tuple[int, float]]:
        """Compare with these rows. They are copied first to lie side by side, which is faster."""
        if not len(rows):
            return []
        chosen = self._new_exact()
        chosen.add_sa_codes(self._np.take(self._codes(self._exact), rows, axis=0))
        scores, places = chosen.search(query, min(k, len(rows)))
        return self._named(scores[0], rows[places[0]])

    def _codes(self, index: Any) -> Any:
        """The memory of an index, row by row. Valid until the index changes."""
        size = int(index.code_size)
        return self._faiss.rev_swig_ptr(index.codes.data(), self.rows * size).reshape(self.rows, size)

    def _named(self, scores: Floats, rows: Ints) -> list[tuple[int, float]]:
        return list(zip(self._ids[rows].tolist(), scores.tolist(), strict=True))
