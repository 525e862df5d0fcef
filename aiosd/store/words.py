"""The words of notes, and their texts as wholes: two indexes in the database that follow the notes a little later.

Contract. Indexing a note costs more than all else that is done for it, so it is done outside of commits: a new text is
put into a queue (`wordless`) in the transaction that adds it, and `work` takes it from there, many at a time. A live
note is in both indexes or in the queue. A changed or removed note leaves the indexes in its own transaction, so no note
is found by words that it does not have any more. A search first enters the texts of its own caller (`finish`), for a
limited time. By its own text a note is always found (`same`): the texts in the queue are compared. With its words a
text goes into the queue of search by meaning, too.
"""

from __future__ import annotations

import errno
import logging
import time
import zlib
from collections.abc import Callable, Generator, Sequence
from typing import Any

from aiosd.ipc.service import Pause
from aiosd.store.database import Database
from aiosd.store.meaning import Meaning
from aiosd.store.noterows import marks

logger = logging.getLogger("store")

NOTES = 0  # the kind of notes in `meaning`
SLICE = 64  # texts that are entered at once,
SLICE_CHARS = 256 << 10  # … unless they are longer than this together
WAIT_S = 0.5  # a search waits at most this long for words
IDLE_S = 5.0


class NoteWords:
    def __init__(self, database: Database, meaning: Meaning, clock: Callable[[], float] = time.monotonic) -> None:
        self._db, self._meaning, self._clock = database, meaning, clock
        self.stuck = False  # the last entries were lost with their transaction: a page may be damaged
        self._entered = False  # entries were made whose transaction has not ended yet
        self.recount()

    def recount(self) -> None:
        """Count the queue: at the start, and when a transaction was lost after it had ended."""
        self.stuck, self._entered = self.stuck or self._entered, False
        try:
            row = self._db.row("SELECT count(*) FROM wordless")
            self.waiting = row[0] if row else 0  # about
        except OSError as err:
            logger.warning("the queue of notes without words: %s", err.strerror)
            self.waiting = 0

    def remade(self) -> None:
        """Damaged indexes were made anew: try again."""
        self.stuck = self._entered = False
        self.recount()

    # ── within the transaction that changes a text ────────────────────────────────────────────────────────

    def added(self, note: int, owner: int) -> None:
        self._db.do("INSERT INTO wordless VALUES(?, ?)", note, owner)
        self.waiting += 1

    def changed(self, note: int, owner: int, old: str) -> None:
        """A note has another text than the old one."""
        self.gone(note, owner, old)
        self.added(note, owner)

    def gone(self, note: int, owner: int, old: str) -> None:
        self._db.do("DELETE FROM wordless WHERE note = ?", note)
        if not self._db.db.changes():
            self._db.do("DELETE FROM note_words WHERE rowid = ?", note)
            self._db.do("DELETE FROM note_sums WHERE owner = ? AND sum = ? AND note = ?", owner, _sum(old), note)
        self._meaning.gone(NOTES, note, owner)

    # ── the queue ─────────────────────────────────────────────────────────────────────────────────────────

    def work(self) -> float:
        """Go on with the queue, one slice; returns the number of seconds after which to call this again. Raises
        OSError: the texts stay in the queue."""
        if not self.waiting:
            return IDLE_S
        places = self._db.rows("SELECT note, owner FROM wordless ORDER BY note LIMIT ?", SLICE)
        if not places:
            self.waiting = 0
            return IDLE_S
        self._enter(places)
        return 0.0

    def finish(self, owners: Sequence[int]) -> Generator[Pause, None, None] | None:
        """Have the texts of these owners entered first. None: they are; else a generator that takes as long as a search
        may wait. If the disk is full the search finds only notes that are in the indexes; if the queue is `stuck`,
        words must be searched in the notes themselves."""
        return self._finish(owners) if self._enter_of(owners) else None

    def _finish(self, owners: Sequence[int]) -> Generator[Pause, None, None]:
        until = self._clock() + WAIT_S
        while self._clock() < until and self._enter_of(owners):
            yield Pause(0.0)

    def waiting_of(self, owner: int) -> int:
        """How many texts of this owner have no words yet."""
        row = self._db.row("SELECT count(*) FROM wordless WHERE owner = ?", owner) if self.waiting else None
        return 0 if row is None else int(row[0])

    def stats(self) -> dict[str, int]:
        return {"wordless": self.waiting}

    def _enter_of(self, owners: Sequence[int]) -> bool:
        """Enter one slice of these owners' texts. True: there are more."""
        if not self.waiting:
            return False
        sql = f"SELECT note, owner FROM wordless WHERE owner IN ({marks(owners)}) ORDER BY note LIMIT ?"
        places = self._db.rows(sql, *owners, SLICE)
        if not places:
            return False
        try:
            self._enter(places)
        except OSError as err:
            logger.debug("words wait: %s", err.strerror)
            self.stuck = self.stuck or err.errno == errno.EIO
            return False
        return True

    def _enter(self, places: Sequence[tuple[int, ...]]) -> None:
        if self._entered:  # and the transaction was not lost
            self.stuck, self._entered = False, False
        read = self._texts(places)
        done = [(note, owner) for note, owner, _ in read]
        rows = [(note, owner, text) for note, owner, text in read if text is not None]
        with self._db.lazily():
            self._db.room.require()
            words = ((note, f"own{owner}", text) for note, owner, text in rows)
            self._db.many("INSERT INTO note_words(rowid, owner, text) VALUES(?, ?, ?)", words)
            sums = ((owner, _sum(text), note) for note, owner, text in rows)
            self._db.many("INSERT INTO note_sums VALUES(?, ?, ?)", sums)
            self._db.many("DELETE FROM wordless WHERE note = ? AND owner = ?", done)
            self._meaning.enqueue(NOTES, done)
        self.waiting, self._entered = max(0, self.waiting - len(done)), True

    def _texts(self, places: Sequence[tuple[int, ...]]) -> list[tuple[int, int, str | None]]:
        """The texts of the first of these, as many as are entered at once. None: a text is damaged; `aiosd fsck`
        reports it."""
        read: list[tuple[int, int, str | None]] = []
        chars = 0
        for note, owner in places:
            if chars > SLICE_CHARS:
                break
            try:
                row = self._db.row("SELECT text FROM notes WHERE id = ?", note)
            except OSError:
                row = None
            text = None if row is None else row[0]
            read.append((note, owner, text))
            chars += len(text or "")
        return read

    # ── searching ─────────────────────────────────────────────────────────────────────────────────────────

    def same(self, owners: Sequence[int], text: str, where: str, values: Sequence[Any], limit: int) -> list[int]:
        """Notes of these owners that have this very text and pass the condition (of `n`), the newest first."""
        mine = f"s.owner IN ({marks(owners)})"
        rest = f"n.text = ? AND {where} ORDER BY n.id DESC LIMIT ?"
        indexed = f"SELECT n.id FROM note_sums s JOIN notes n ON n.id = s.note WHERE {mine} AND s.sum = ? AND {rest}"
        rows = self._db.rows(indexed, *owners, _sum(text), text, *values, limit)
        if self.waiting:
            queued = f"SELECT n.id FROM wordless s JOIN notes n ON n.id = s.note WHERE {mine} AND {rest}"
            rows += self._db.rows(queued, *owners, text, *values, limit)
        return sorted((row[0] for row in rows), reverse=True)[:limit]


def _sum(text: str) -> int:
    return zlib.crc32(text.encode())
