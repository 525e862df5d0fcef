"""Search by meaning: the vectors of texts, the queue of texts that have none yet, and what lies near to a query.

Contract. The change of a text and its entry in the queue are one transaction (`changed`, `gone`), so that no text is
forgotten and no vector outlives its text. The embedder works on the queue afterwards, outside of any commit. A vector
names its embedder; vectors of another one do not count, and when the embedder changes all texts are put into the queue
again. Texts in the queue are found by their words.

Everything that has an owner, a number and a text can be found (`Searchable`): notes, and other kinds. Each kind has a
number of its own. Vectors are kept in half precision. In memory there is one `VectorIndex` for each owner and kind. It
is read from the database when it is first searched, in slices so that other calls are served meanwhile, and dropped,
the least recently used first, when all of them are larger than `ram`. A search waits for that reading, but no longer
than LOAD_S: then its answer is by words, `how` reports that, and reading goes on in the background.

An index follows the database, never the other way round: rows that a transaction has touched are read again before the
index is used again, so a transaction that was rolled back has changed nothing.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from aiosd.ipc.service import Pause
from aiosd.store.database import Database

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from aiosd.store.index import VectorIndex

    Floats = NDArray[np.float32]
    Ints = NDArray[np.int64]

logger = logging.getLogger("store")

BATCH = 32  # texts that an embedder gets at once
SLICE = 4_000  # vectors that are read at once
MOST_CHARS = 2_000  # of a text: its vector is made from this beginning
WAIT_S = 1.0  # a search waits at most this long for vectors to be made,
LOAD_S = 2.0  # … and this long for existing ones to be read
RETRY_S, RETRY_MAX_S = 1.0, 30.0  # after the embedder has failed; doubled each time, up to the second
IDLE_S = 5.0

#: One row of the queue: number, kind, item, owner.
QueueRow = tuple[int, int, int, int]
OnVectors = Callable[["Sequence[Floats | None] | None"], None]


class Searchable(Protocol):
    """One kind of texts. `everything`: a SELECT of (item, owner) of all of them."""

    kind: int
    everything: str

    def texts(self, items: Sequence[int]) -> Iterable[tuple[int, str]]: ...


class Embedder(Protocol):
    """Makes vectors of unit length. `ask` calls `done` now or in a later `poll`: with a vector for each text (None:
    this text cannot have one), or with None when it failed as a whole."""

    name: str  # embedders with different names make different vectors
    shown: str

    def ask(self, texts: list[str], done: OnVectors, urgent: bool) -> None: ...
    def poll(self) -> None: ...


@dataclass(slots=True)
class _Shelf:
    """The index of one owner and kind."""

    index: VectorIndex | None = None  # None: no vector yet
    read: int = 0  # the last row of the database that is in it,
    whole: bool = False  # … and whether that was the last of all
    touched: set[int] = field(default_factory=set)  # may have been changed or removed


class Meaning:
    def __init__(
        self, database: Database, embedder: Embedder | None, ram: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._db, self.embedder, self._ram, self._clock = database, embedder, ram, clock
        self._kinds: dict[int, Searchable] = {}
        self._embedder_id = 0
        self._shelves: OrderedDict[tuple[int, int], _Shelf] = OrderedDict()
        self._evictions = 0
        self._loading: dict[tuple[int, int], None] = {}  # indexes that are read, and then refined, in the background
        self._queue_may_have_more = True
        self._wanted: set[int] = set()  # owners whose searches wait for their texts
        self._turn = -1  # the owner whose texts were embedded last
        self._under_way: list[QueueRow] = []
        self._retry_at, self._pause = 0.0, RETRY_S
        self.away = False  # the embedder did not answer in time; searches do not wait for it
        self._probing = False
        self._incomplete = False  # there is an embedder, but changes are not in its queue: begin anew next time

    def begin(self, *kinds: Searchable) -> None:
        """Called once, with all kinds of texts. If the disk is full or damaged, search is by words."""
        self._kinds = {source.kind: source for source in kinds}
        try:
            self._begin()
        except OSError as err:
            logger.warning("search is by words, for the queue of texts cannot be kept: %s", err.strerror)
            self.embedder, self._incomplete = None, True

    def _begin(self) -> None:
        with self._db.transaction():
            if self.embedder is None:
                self._db.do("UPDATE embedders SET current = 0")
                self._db.do("DELETE FROM pending")
                return
            self._db.do("INSERT OR IGNORE INTO embedders(name) VALUES(?)", self.embedder.name)
            row = self._db.row("SELECT id, current FROM embedders WHERE name = ?", self.embedder.name)
            assert row is not None
            self._embedder_id = row[0]
            if not row[1]:
                self._db.do("UPDATE embedders SET current = (id = ?)", self._embedder_id)
                for source in self._kinds.values():
                    self._enqueue_all(source)

    def _enqueue_all(self, source: Searchable) -> None:
        has_vector = "SELECT 1 FROM vectors v WHERE v.kind = ?1 AND v.item = e.item AND v.embedder = ?2"
        self._db.do(
            "INSERT OR IGNORE INTO pending(kind, item, owner) SELECT ?1, e.item, e.owner "
            f"FROM ({source.everything}) e WHERE NOT EXISTS ({has_vector})",
            source.kind,
            self._embedder_id,
        )

    # ── within the transaction that changes a text ────────────────────────────────────────────────────────

    def changed(self, kind: int, item: int, owner: int) -> None:
        """A text is new or has changed."""
        self.gone(kind, item, owner)
        self.enqueue(kind, [(item, owner)])

    def enqueue(self, kind: int, texts: Iterable[tuple[int, int]]) -> None:
        """Put texts without vectors, as (item, owner), into the queue."""
        if self.embedder is not None:
            rows = [(kind, item, owner) for item, owner in texts]
            self._db.many("INSERT OR REPLACE INTO pending(kind, item, owner) VALUES(?, ?, ?)", rows)
            self._queue_may_have_more = True
        elif self._incomplete:
            self._db.do("UPDATE embedders SET current = 0 WHERE current")

    def gone(self, kind: int, item: int, owner: int) -> None:
        self._db.do("DELETE FROM vectors WHERE kind = ? AND item = ?", kind, item)
        self._db.do("DELETE FROM pending WHERE kind = ? AND item = ?", kind, item)
        self._touch(kind, item, owner)

    def _touch(self, kind: int, item: int, owner: int) -> None:
        shelf = self._shelves.get((kind, owner))
        if shelf is not None:
            shelf.touched.add(item)

    # ── the queue ─────────────────────────────────────────────────────────────────────────────────────────

    def work(self) -> float:
        """Go on with the queue: one batch. Returns the number of seconds after which to call this again, unless the
        embedder has an answer before that."""
        if self.embedder is None:
            return IDLE_S
        self.embedder.poll()
        if self._load_some():
            return 0.0
        now = self._clock()
        if self._under_way or not self._queue_may_have_more:
            return IDLE_S
        if now < self._retry_at:
            return self._retry_at - now
        rows = self._next()
        if rows:
            self._embed(rows)
        else:
            self._queue_may_have_more = False
        return 0.0 if not self._under_way and self._queue_may_have_more and now >= self._retry_at else IDLE_S

    def _next(self) -> list[QueueRow]:
        """The next batch: texts of owners that wait, else of all owners in turn, so that none holds up the others."""
        for owner in list(self._wanted):
            found = self._of(owner, BATCH)
            if found:
                return found
            self._wanted.discard(owner)
        rows: list[QueueRow] = []
        begun = set[int]()
        while len(rows) < BATCH:
            row = self._db.row("SELECT min(owner) FROM pending WHERE owner > ?", self._turn)
            self._turn = -1 if row is None or row[0] is None else row[0]
            if self._turn in begun:
                break
            begun.add(self._turn)
            rows += self._of(self._turn, BATCH - len(rows))
        return rows

    def _of(self, owner: int, limit: int) -> list[Any]:
        mine = "SELECT number, kind, item, owner FROM pending WHERE owner = ? ORDER BY number LIMIT ?"
        return self._db.rows(mine, owner, limit)

    def _embed(self, rows: list[QueueRow]) -> None:
        assert self.embedder is not None
        texts: dict[tuple[int, int], str] = {}
        for kind in {row[1] for row in rows}:
            items = [row[2] for row in rows if row[1] == kind]
            texts |= {(kind, item): text for item, text in self._kinds[kind].texts(items)}
        given = [row for row in rows if texts.get((row[1], row[2]), "").strip()]
        self._settle([row for row in rows if row not in given], None)  # without a text there is no vector
        if given:
            self._under_way = given
            chosen = [texts[row[1], row[2]][:MOST_CHARS] for row in given]
            self.embedder.ask(chosen, self._embedded, False)

    def _embedded(self, vectors: Sequence[Floats | None] | None) -> None:
        rows, self._under_way = self._under_way, []
        if vectors is None:
            self._try_again_later()
            return
        self.away, self._pause = False, RETRY_S
        self._settle(rows, vectors)

    def _try_again_later(self) -> None:
        self._retry_at = self._clock() + self._pause
        self._pause = min(2 * self._pause, RETRY_MAX_S)

    def _settle(self, rows: list[QueueRow], vectors: Sequence[Floats | None] | None) -> None:
        """Remove rows from the queue, unless their texts have changed since. Each gets its vector, or (None) none."""
        if not rows:
            return
        stored: list[tuple[QueueRow, Floats]] = []
        try:
            with self._db.lazily():
                for number, row in enumerate(rows):
                    self._db.do("DELETE FROM pending WHERE number = ?", row[0])
                    vector = None if vectors is None else vectors[number]
                    if self._db.db.changes() and vector is not None:
                        self._insert(row, vector)
                        stored.append((row, vector))
        except OSError as err:  # the disk is full, for example; they stay in the queue
            logger.warning("vectors cannot be kept: %s", err.strerror)
            self._try_again_later()
            return
        for row, vector in stored:
            self._enter(row, vector)

    def _insert(self, row: QueueRow, vector: Floats) -> None:
        values = "INSERT OR REPLACE INTO vectors(kind, item, owner, embedder, vector) VALUES(?, ?, ?, ?, ?)"
        self._db.do(values, *row[1:], self._embedder_id, vector.astype("<f2").tobytes())

    def _enter(self, row: QueueRow, vector: Floats) -> None:
        """Enter a vector into the index, if there is one in memory."""
        _, kind, item, owner = row
        shelf = self._shelves.get((kind, owner))
        if shelf is not None and shelf.whole:
            shelf.touched.discard(item)
            shelf.index = shelf.index or self._new_index(len(vector))
            shelf.index.add([item], vector.reshape(1, -1))

    def forget(self) -> None:
        """A transaction was lost after it had ended: drop all that was made in memory from it."""
        self._shelves.clear()
        self._queue_may_have_more = True

    # ── before a search ───────────────────────────────────────────────────────────────────────────────────

    def vector_of(self, query: str) -> Generator[Pause, None, Floats | None]:
        """The vector of a query; None if there is none in time: then the search is by words alone."""
        if self.embedder is None or not query.strip() or (self.away and self._probing):
            return None
        answer: list[Sequence[Floats | None] | None] = []

        def done(vectors: Sequence[Floats | None] | None) -> None:
            answer.append(vectors)
            self.away, self._probing = vectors is None, False

        self._probing = True
        self.embedder.ask([query[:MOST_CHARS]], done, True)
        until = self._clock() + WAIT_S
        while not answer and not self.away:
            if self._clock() >= until:
                self.away = True
                break
            yield Pause(until)
            self.embedder.poll()
        return answer[0][0] if answer and answer[0] is not None else None

    def finish(self, owners: Iterable[int]) -> Generator[Pause, None, None]:
        """Have the texts of these owners embedded first, for as long as a search may wait."""
        until = self._clock() + WAIT_S
        self._wanted |= set(owners)
        while not self.away and self._clock() < until and self._pending_of(owners):
            self.work()
            yield Pause(until if self._under_way else 0.0)
            if self._clock() < self._retry_at:
                break
        self._wanted -= set(owners)

    def _pending_of(self, owners: Iterable[int]) -> bool:
        if not self._queue_may_have_more and not self._under_way:
            return False
        return any(self._db.row("SELECT 1 FROM pending WHERE owner = ? LIMIT 1", owner) for owner in owners)

    def load(self, kind: int, owners: Iterable[int]) -> Generator[Pause, None, str]:
        """Have the indexes of these owners in memory, for as long as a search may wait. Returns "", or a sentence about
        one that is not there yet: reading it goes on in the background (`work`)."""
        until = self._clock() + LOAD_S
        for owner in owners:
            while not self._shelf(kind, owner).whole:
                if self._clock() >= until:
                    self._loading[kind, owner] = None
                    return self._loading_shown()
                self._read_slice(kind, owner)
                yield Pause(0.0)
        return ""

    def _load_some(self) -> bool:
        """Go on reading indexes for which searches did not wait. True: there may be more."""
        for key in list(self._loading):
            shelf = self._shelves.get(key)
            if shelf is not None and not shelf.whole:
                self._read_slice(*key)
                return True
            if shelf is not None and shelf.index is not None and not shelf.index.refine():
                return True
            del self._loading[key]
        return False

    def _loading_shown(self) -> str:
        """A sentence about the index that is being read; "": none is."""
        shelves = [shelf for key in self._loading if (shelf := self._shelves.get(key)) and not shelf.whole]
        rows = sum(shelf.index.rows for shelf in shelves if shelf.index is not None)
        return f"vectors are being read ({rows:,} so far)" if shelves else ""

    def _shelf(self, kind: int, owner: int) -> _Shelf:
        shelf = self._shelves.get((kind, owner))
        if shelf is not None and shelf.index is not None and shelf.index.worn:
            shelf = None  # half of it is tombstones: read it anew
        if shelf is None:
            shelf = self._shelves[kind, owner] = _Shelf()
        self._shelves.move_to_end((kind, owner))
        return shelf

    def _read_slice(self, kind: int, owner: int) -> None:
        import numpy as np

        shelf = self._shelf(kind, owner)
        mine = "FROM vectors WHERE owner = ? AND kind = ? AND embedder = ?"
        of = (owner, kind, self._embedder_id)
        next_ones = f"{mine} AND id > ? ORDER BY id LIMIT ?"
        try:
            rows = self._db.rows(f"SELECT id, item, vector {next_ones}", *of, shelf.read, SLICE)
            last = rows[-1][0] if len(rows) == SLICE else None
        except OSError:  # only what is on a damaged page is lost
            ids = [number for (number,) in self._db.rows(f"SELECT id {next_ones}", *of, shelf.read, SLICE)]
            rows = [row for number in ids if (row := self._readable(number)) is not None]
            last = ids[-1] if len(ids) == SLICE else None
        if rows:
            width = len(rows[0][2]) // 2
            if shelf.index is None:
                shelf.index = self._new_index(width)
            halves = np.frombuffer(b"".join(row[2] for row in rows), np.uint8).reshape(len(rows), 2 * width)
            shelf.index.add_halves([row[1] for row in rows], halves)
        if last is None:
            shelf.whole = True
            self._loading[kind, owner] = None  # to be refined
            self._make_room((kind, owner))
        else:
            shelf.read = last

    def _readable(self, number: int) -> tuple[Any, ...] | None:
        try:
            return self._db.row("SELECT id, item, vector FROM vectors WHERE id = ?", number)
        except OSError:
            return None

    def _new_index(self, width: int) -> VectorIndex:
        from aiosd.store.index import VectorIndex

        return VectorIndex(width)

    def _make_room(self, keep: tuple[int, int]) -> None:
        held = self._bytes()
        for key in list(self._shelves):
            if held <= self._ram:
                return
            if key != keep:
                index = self._shelves.pop(key).index
                held -= index.bytes if index is not None else 0
                self._evictions += 1

    def _bytes(self) -> int:
        return sum(shelf.index.bytes for shelf in self._shelves.values() if shelf.index is not None)

    # ── the search itself ─────────────────────────────────────────────────────────────────────────────────

    def nearest(
        self, kind: int, vector: Floats, k: int, among: Mapping[int, Sequence[int] | Ints | None]
    ) -> list[tuple[int, float]]:
        """(item, cosine) of the `k` nearest texts of these owners, the nearest first. `among`: for each owner the items
        that may be found (None: all). Owners whose index is not in memory (`load`) are skipped."""
        found: list[tuple[int, float]] = []
        for owner, items in among.items():
            shelf = self._shelves.get((kind, owner))
            if shelf is not None and shelf.index is not None and len(vector) == shelf.index.width:
                self._catch_up(kind, shelf, shelf.index)
                found += shelf.index.search(vector, k, items)
        return sorted(found, key=lambda pair: -pair[1])[:k]

    def _catch_up(self, kind: int, shelf: _Shelf, index: VectorIndex) -> None:
        """Apply the changes of transactions to an index."""
        touched, shelf.touched = shelf.touched, set()
        for item in touched:
            mine = "SELECT 1 FROM vectors WHERE kind = ? AND item = ? AND embedder = ?"
            if not self._db.row(mine, kind, item, self._embedder_id):
                index.remove(item)

    # ── what is shown ─────────────────────────────────────────────────────────────────────────────────────

    @property
    def how(self) -> str:
        if self.embedder is None:
            return "by words (no embedder: aiosd get-embedder)"
        if self.away:
            return f"by words; {self.embedder.shown} does not answer"
        if loading := self._loading_shown():
            return f"by words, {loading}; by meaning ({self.embedder.shown})"
        return f"by words and by meaning ({self.embedder.shown})"

    def waiting(self, owners: Iterable[int]) -> int:
        """How many texts of these owners have no vector yet."""
        counts = [self._db.row("SELECT count(*) FROM pending WHERE owner = ?", owner) for owner in owners]
        return sum(row[0] for row in counts if row)

    def stats(self) -> dict[str, Any]:
        try:
            vectors = self._db.row("SELECT count(*) FROM vectors WHERE embedder = ?", self._embedder_id)
            pending = self._db.row("SELECT count(*) FROM pending")
        except OSError as err:
            return {"search": f"{self.how}; {err.strerror}"}
        return {
            "search": self.how,
            "vectors": vectors[0] if vectors else 0,
            "pending": pending[0] if pending else 0,
            "indexes": len(self._shelves),
            "index_bytes": self._bytes(),
            "index_evictions": self._evictions,
        }
