"""Vectors of one owner in memory, and the nearest of them to another vector. The only file that imports FAISS.

A vector is a row, in half precision, as it is in the database. Rows of up to LARGE vectors are all compared with the
query. Above that a second copy, of one bit for each dimension (RaBitQ), finds RESCORED candidates, which are compared
exactly. What is removed or replaced leaves a dead row, a tombstone: it is found no more, and when a fifth of the rows
is dead the owner of this object makes it anew (`worn`).

A live vector is always found by itself. The estimates of RaBitQ are too good to miss it, and dead rows cannot hide
it: candidates are asked for until RESCORED of them are live (a note that is changed a thousand times leaves a thousand
rows beside its own). `among` is for filters: then these rows, and no others, are compared.

Nothing of this is ever saved. FAISS loads a damaged file and uses it, or dies of it, and the rows come back from the
database in a second. It runs in one thread: a process that has used more cannot be forked safely.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Ints = NDArray[np.int64]

LARGE = 16_000  # rows; more get the copy in bits
RESCORED = 500  # candidates of that copy, for BITS dimensions; more where fewer bits say less
BITS = 384
WORN = 0.2  # the share of dead rows at which it is time for a new index,
WORN_LEAST = 64  # … if there are more than this
PER_ENTRY = 120  # bytes of memory for the numbers of one vector


class Index:
    """Of vectors with `width` dimensions and unit length; `expected`: how many will be added at first."""

    def __init__(self, width: int, expected: int = 0) -> None:
        logging.getLogger("faiss").setLevel(logging.WARNING)  # it tells which library it tries
        import faiss
        import numpy as np

        faiss.omp_set_num_threads(1)
        self._np = np
        self._faiss: Any = faiss  # whose types do not know its own Python layer
        self.width = width
        self._exact: Any = self._new_exact()
        self._rough: Any = None
        self._expected = expected
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
        rough = self.width // 8 + 16 if self._rough is not None else 0
        return self.rows * (2 * self.width + rough) + len(self._rows) * PER_ENTRY

    @property
    def worn(self) -> bool:
        return self.dead > max(WORN_LEAST, WORN * self.rows)

    def _new_exact(self) -> Any:
        """All of its rows are compared, in half precision."""
        faiss = self._faiss
        return faiss.IndexScalarQuantizer(self.width, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)

    # ── changing ──────────────────────────────────────────────────────────────────────────────────────────

    def add(self, ids: Sequence[int], vectors: Floats) -> None:
        """One row of `vectors` for each id; an id that is here already has this vector from now on."""
        if not len(ids):
            return
        for number in ids:
            self.remove(number)
        first = self.rows
        self._make_room(first + len(ids))
        self._exact.add(vectors)
        for row, number in enumerate(ids, first):
            self.remove(number)  # of two with one id in `ids` the last one counts
            self._ids[row] = number
            self._rows[number] = row
        if self._rough is not None:
            self._rough.add(vectors)
        elif max(self.rows, self._expected) > LARGE:
            self._begin_rough()

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

    def _begin_rough(self) -> None:
        """The copy in bits, of all rows so far. Their mean is what its bits are relative to."""
        faiss = self._faiss
        vectors = self._exact.reconstruct_n(0, self.rows)
        self._rough = faiss.IndexRaBitQFastScan(self.width, faiss.METRIC_INNER_PRODUCT)
        self._rough.train(vectors)
        self._rough.add(vectors)

    # ── searching ─────────────────────────────────────────────────────────────────────────────────────────

    def search(self, vector: Floats, k: int, among: Iterable[int] | None = None) -> list[tuple[int, float]]:
        """(id, cosine) of the `k` nearest, the nearest first; of ids that are in `among` (each once), if that is
        given."""
        query = self._np.ascontiguousarray(vector, self._np.float32).reshape(1, self.width)
        if among is not None:
            rows: Any = self._np.fromiter(map(self._rows.get, among, itertools.repeat(-1)), self._np.int64)
            return self._compare(query, k, rows[rows >= 0])
        if self._rough is None:
            return self._compare_all(query, k)
        return self._compare(query, k, self._candidates(query, max(RESCORED, 4 * k) * -(-BITS // self.width)))

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
        """With these rows, which are copied to lie side by side: to find each where it is takes longer."""
        if not len(rows):
            return []
        size = int(self._exact.code_size)
        codes = self._faiss.rev_swig_ptr(self._exact.codes.data(), self.rows * size).reshape(self.rows, size)
        chosen = self._new_exact()
        chosen.add_sa_codes(self._np.take(codes, rows, axis=0))
        scores, places = chosen.search(query, min(k, len(rows)))
        return self._named(scores[0], rows[places[0]])

    def _named(self, scores: Floats, rows: Ints) -> list[tuple[int, float]]:
        return list(zip(self._ids[rows].tolist(), scores.tolist(), strict=True))
