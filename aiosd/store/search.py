"""Search for notes: by words, by meaning, or by both.

By both: the candidates of words and those of meaning get one score each, `cosine + WORDS · bm25 / (HALF + bm25)`.
(Mixing the two rankings instead of the scores ruins a good embedder: a chance hit that is first by words counts as much
as a text that means the same.) A note whose text is the query itself comes before all others, so a live note is always
found by its own text, whatever that is.

Filters are applied before any limit: SQLite gives the ids that pass, and only these are compared. A query is split into
words and each is quoted; the owner is a token of its own in the index of words, so no query leads to another owner's
notes.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aiosd.ipc import link
from aiosd.ipc.service import Pause
from aiosd.store import plainly
from aiosd.store.database import Database
from aiosd.store.meaning import Meaning
from aiosd.store.noterows import COLUMNS, FROM, LIVE, filtered, ids_of, marks, note_of, passing, union, visible
from aiosd.store.words import NOTES, NoteWords
from libaios import wire
from libaios.wire import Note

if TYPE_CHECKING:
    from aiosd.store.meaning import Floats, Ints

#: For each owner the notes that pass the filters; None: all pass.
Among = Mapping[int, "Sequence[int] | Ints | None"]

WORDS, HALF = 0.15, 8.0
ITSELF = 2.0  # for a note whose text is the query: more than any other score
LEAST = 50  # candidates of each side
MOST_WORDS = 256  # of a query
_BM25 = "(-bm25(note_words, 0.0, 1.0))"
#: The condition that a match of an index of words is among these ids. SQLite makes one set of them, and looks up each
#: match there. The plus forbids the other way round, to search the words in each id, which takes a thousand times as
#: long.
AMONG = "+w.rowid IN ({})"


class NoteTexts:
    """The texts of notes, as `meaning.Searchable`."""

    kind = NOTES
    everything = "SELECT id AS item, owner FROM notes"

    def __init__(self, database: Database) -> None:
        self._db = database

    def texts(self, items: Sequence[int]) -> list[tuple[int, str]]:
        """The texts of these notes. A damaged note has none: otherwise the queue would not get past it."""
        return [(item, text) for item in items if (text := self._text(item))]

    def _text(self, item: int) -> str:
        try:
            row = self._db.row("SELECT text FROM notes WHERE id = ?", item)
        except OSError:
            return ""
        return "" if row is None else row[0]


class NoteSearch:
    def __init__(self, database: Database, words: NoteWords, meaning: Meaning, clock: Callable[[], float]) -> None:
        self._db, self._words, self._meaning, self._clock = database, words, meaning, clock

    def search(
        self, caller: link.Caller, args: wire.MemSearch
    ) -> list[wire.Found] | Generator[Pause, None, list[wire.Found]]:
        """The answer, or a generator that yields pauses and returns it. Raises OSError (EOPNOTSUPP, EAGAIN)."""
        if args.by == "meaning" and self._meaning.embedder is None:
            raise wire.error(errno.EOPNOTSUPP, "there is no embedder, so nothing can be found by meaning")
        names = visible(caller)
        rows = self._db.rows(f"SELECT id FROM owners WHERE name IN ({marks(names)})", *names)
        owners = [row[0] for row in rows]
        words = self._words.finish(owners)
        by_words = args.by == "words" or not owners or self._meaning.embedder is None
        if words is None and by_words:
            try:
                self._require_words(owners)
                return self.ranked(owners, args, None)
            except OSError as err:
                if not plainly.is_damage(err):
                    raise
            return self._walked(owners, args)
        return self._later(owners, args, words, by_words)

    def _later(
        self, owners: Sequence[int], args: wire.MemSearch, words: Generator[Pause, None, None] | None, by_words: bool
    ) -> Generator[Pause, None, list[wire.Found]]:
        if words is not None:
            yield from words
        if by_words:
            return (yield from self._ranked_or_walked(owners, args, None))
        vector = yield from self._meaning.vector_of(args.query)
        if args.by == "meaning" and self._meaning.away:
            raise wire.error(errno.EAGAIN, "the embedder does not answer")
        if vector is not None:
            yield from self._meaning.finish(owners)
            loading = yield from self._meaning.load(NOTES, owners)
            if loading and args.by == "meaning":
                raise wire.error(errno.EAGAIN, f"{loading}; ask again, or by words")
            vector = None if loading else vector
        return (yield from self._ranked_or_walked(owners, args, vector))

    def _ranked_or_walked(
        self, owners: Sequence[int], args: wire.MemSearch, vector: Floats | None
    ) -> Generator[Pause, None, list[wire.Found]]:
        try:
            self._require_words(owners)
            return self.ranked(owners, args, vector)
        except OSError as err:
            if not plainly.is_damage(err):
                raise
        return (yield from self._walked(owners, args))

    def _require_words(self, owners: Sequence[int]) -> None:
        """Check that the indexes of words can be read. Raises OSError (EIO)."""
        if self._words.stuck and any(self._words.waiting_of(owner) for owner in owners):
            raise wire.error(errno.EIO, "words cannot be entered into their index, which is damaged on the disk")

    def _walked(self, owners: Sequence[int], args: wire.MemSearch) -> Generator[Pause, None, list[wire.Found]]:
        """Search by words in the notes themselves, because a page of an index is damaged."""
        rows = self._db.rows(f"SELECT id, name FROM owners WHERE id IN ({marks(owners)})", *owners)
        words = plainly.words_of(args.query)
        best: list[wire.Found] = []
        for notes in plainly.walk(self._db, dict(rows), args.filters, self._clock()):
            for note in [one for one in notes if not one.damaged]:
                score = len(words & plainly.words_of(note.text)) + ITSELF * (note.text == args.query)
                if score:
                    best.append(wire.Found(note, float(score)))
            best = sorted(best, key=lambda found: (found.score, found.note.id), reverse=True)[: args.k]
            yield Pause(0.0)
        return best

    def ranked(self, owners: Sequence[int], args: wire.MemSearch, vector: Floats | None) -> list[wire.Found]:
        """The answer, at once; without a vector by words alone."""
        if not owners:
            return []
        now = self._clock()
        among = {owner: passing(self._db, owner, args.filters, now) for owner in owners}
        words = {} if args.by == "meaning" else self._by_words(owners, args, any(among.values()))
        scores = words
        if vector is not None:
            chosen = {owner: some and _numbers(ids_of(self._db, *some)) for owner, some in among.items()}
            scores = with_meaning(self._meaning, NOTES, chosen, args.k, vector, words)
        for note in self._by_text(owners, args):
            scores[note] = ITSELF + scores.get(note, 0.0)
        best = sorted(scores, key=lambda note: (scores[note], note), reverse=True)[: args.k]
        return self._fetch(best, scores)

    def _by_words(self, owners: Sequence[int], args: wire.MemSearch, some: bool) -> dict[int, float]:
        """The notes that have at least one of the words, and how well they fit (bm25). `some`: not all notes pass."""
        words = re.findall(r"[^\W_]+", args.query)
        if not words:
            return {}
        either = " OR ".join(f'"own{owner}"' for owner in owners)
        wanted = " OR ".join(f'"{word}"' for word in list(dict.fromkeys(words))[:MOST_WORDS])
        values: list[Any] = [f"{{owner}} : ({either}) AND {{text}} : ({wanted})"]
        where = "note_words MATCH ?"
        if some:
            select, parts = union(self._db, owners, args.filters, self._clock())
            where, values = f"{where} AND {AMONG.format(select)}", values + parts
        best = "ORDER BY score DESC, w.rowid DESC LIMIT ?"
        sql = f"SELECT w.rowid, {_BM25} AS score FROM note_words w WHERE {where} {best}"
        return dict(self._db.rows(sql, *values, max(args.k, LEAST)))

    def _by_text(self, owners: Sequence[int], args: wire.MemSearch) -> list[int]:
        where, values = filtered(self._db, args.filters, self._clock())
        return self._words.same(owners, args.query, where, values, args.k)

    def _fetch(self, notes: Sequence[int], scores: Mapping[int, float]) -> list[wire.Found]:
        found: dict[int, Note] = {}
        for begin in range(0, len(notes), 500):
            some = notes[begin : begin + 500]
            read, lost = plainly.piecemeal(self._live, some)
            plainly.report(self._db, "notes", lost)
            found |= {note.id: note for note in read}
        return [wire.Found(found[note], scores[note]) for note in notes if note in found]

    def _live(self, notes: Sequence[int]) -> list[Note]:
        sql = f"SELECT {COLUMNS} {FROM} WHERE n.id IN ({marks(notes)}) AND {LIVE}"
        return [note_of(row) for row in self._db.rows(sql, *notes, self._clock())]


def _numbers(ids: str) -> Ints:
    """Numbers from a text with commas."""
    import numpy as np

    return np.fromstring(ids, np.int64, sep=",") if ids else np.zeros(0, np.int64)


def with_meaning(
    meaning: Meaning, kind: int, among: Among, k: int, vector: Floats, words: Mapping[int, float]
) -> dict[int, float]:
    """Scores of the notes found by words and of those nearest to the vector."""
    cosines = dict(meaning.nearest(kind, vector, max(k, LEAST), among))
    # Notes found by words alone, which are farther away or have no vector yet, get the cosine of the last of these.
    level = min(cosines.values(), default=0.0)
    others = [item for item in words if item not in cosines]
    if others:
        cosines |= dict.fromkeys(others, level)
        cosines |= dict(meaning.nearest(kind, vector, len(others), dict.fromkeys(among, others)))
    return {item: cosine + WORDS * fit(words.get(item, 0.0)) for item, cosine in cosines.items()}


def fit(bm25: float) -> float:
    """A bm25 score scaled to 0 … 1."""
    return bm25 / (HALF + bm25) if bm25 > 0 else 0.0
