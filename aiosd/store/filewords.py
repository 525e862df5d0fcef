"""Search in files: the words of their paths and of their texts, in an index of the database.

What a file has changes with its words in one transaction. The index has the beginning (INDEXED bytes) of what is
UTF-8; of other files only the path. It keeps no copy of the texts. The owner is a word of its own in the index, so that
no query leads to files that the caller may not see; a query is split into words and each is quoted.

Others that index texts (search by meaning) follow along: `followers` are told within the same transaction. To them
this class is the source of the texts of files (`kind`, `everything`, `texts`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from aiosd.store.database import Database
from aiosd.store.spaces import Space, below

INDEXED = 256 << 10
EXCERPT = 160  # characters
MOST_WORDS = 256  # of a query
_WORD = re.compile(r"[^\W_]+")


class Follower(Protocol):
    def changed(self, kind: int, item: int, owner: int) -> None: ...
    def gone(self, kind: int, item: int, owner: int) -> None: ...


class FileWords:
    """`read`: the beginning of what the file of this number has now; b"" if it cannot be read."""

    kind = 1  # notes are 0
    everything = "SELECT id AS item, owner FROM files WHERE removed IS NULL"

    def __init__(self, database: Database, read: Callable[[int], bytes]) -> None:
        self._db, self._read = database, read
        self.followers: list[Follower] = []

    def texts(self, items: Sequence[int]) -> list[tuple[int, str]]:
        """The texts of these files; one that is not text has its path."""
        return [(item, text) for item in items if (text := self._path_and_text(item))]

    def _path_and_text(self, item: int) -> str:
        row = self._db.row("SELECT path FROM files WHERE id = ? AND removed IS NULL", item)
        return "" if row is None else f"{row[0]}\n{as_text(self._read(item))}".strip()

    # ── within the transaction that changes a file ────────────────────────────────────────────────────────

    def enter(self, file: int, owner: int, path: str, data: bytes) -> None:
        """The file has this path and begins with `data` from now on."""
        row = (file, f"own{owner}", path, as_text(data[:INDEXED]))
        self._db.do("DELETE FROM file_words WHERE rowid = ?", file)
        self._db.do("INSERT INTO file_words(rowid, owner, path, text) VALUES(?, ?, ?, ?)", *row)
        for follower in self.followers:
            follower.changed(self.kind, file, owner)

    def drop(self, file: int, owner: int) -> None:
        self._db.do("DELETE FROM file_words WHERE rowid = ?", file)
        for follower in self.followers:
            follower.gone(self.kind, file, owner)

    # ── searching ─────────────────────────────────────────────────────────────────────────────────────────

    def search(self, spaces: Iterable[Space], query: str, folder: str, k: int) -> list[tuple[int, Space, float]]:
        """Numbers of files that have at least one word of the query, the best first, with their spaces."""
        words = list(dict.fromkeys(_WORD.findall(query)))[:MOST_WORDS]
        known = {space.owner: space for space in spaces if space.owner is not None}
        if not words or not known:
            return []
        either = " OR ".join(f'"own{owner}"' for owner in known)
        wanted = " OR ".join(f'"{word}"' for word in words)
        conditions: list[str] = []
        values: list[Any] = []
        for owner, space in known.items():
            visible, parts = space.where()
            conditions.append(f"(f.owner = ? AND {visible})")
            values += [owner, *parts]
        sql = (
            "SELECT f.id, f.owner, -bm25(file_words, 0.0, 2.0, 1.0) AS score FROM file_words w "
            "JOIN files f ON f.id = w.rowid WHERE file_words MATCH ? AND f.removed IS NULL "
            f"AND ({' OR '.join(conditions)}) AND f.path >= ? AND f.path < ? ORDER BY score DESC, f.id DESC LIMIT ?"
        )
        match = f"{{owner}} : ({either}) AND {{path text}} : ({wanted})"
        rows = self._db.rows(sql, match, *values, *below(folder), k)
        return [(file, known[owner], score) for file, owner, score in rows]

    def excerpt(self, file: int, query: str) -> str:
        """A piece of the text around the first of the words that is in it."""
        text = as_text(self._read(file))
        words = [re.escape(word) for word in _WORD.findall(query)[:MOST_WORDS]]
        found = re.search(rf"(?<!\w)(?:{'|'.join(words)})(?!\w)", text, re.IGNORECASE) if words else None
        if found is None:
            return ""
        begin = max(0, found.start() - EXCERPT // 3)
        return " ".join(text[begin : begin + EXCERPT].split())


def as_text(data: bytes) -> str:
    """What the bytes are as UTF-8, though a character may be cut off at the end; "" if they are no text."""
    if b"\0" in data:
        return ""
    try:
        return data.decode()
    except UnicodeDecodeError as err:
        cut = err.end == len(data) and err.start >= len(data) - 3
        return data[: err.start].decode() if cut else ""
