"""The words of files: of their paths and of their texts, in an index of the database (`filesearch` looks into it).

What a file has changes with its words in one transaction. The index has the beginning (INDEXED bytes) of what is
UTF-8; of other files only the path. It keeps no copy of the texts. The owner is a word of its own in the index.

Others that index texts (search by meaning) follow along: `followers` are called within the same transaction. To them
this class is the source of the texts of files (`kind`, `everything`, `texts`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from aiosd.store.database import Database

INDEXED = 256 << 10
FILES = 1  # the kind of files in `meaning`


class Follower(Protocol):
    def changed(self, kind: int, item: int, owner: int) -> None: ...
    def gone(self, kind: int, item: int, owner: int) -> None: ...


class FileWords:
    """`read`: the beginning of what the file of this number has now; b"" if it cannot be read."""

    kind = FILES
    everything = "SELECT id AS item, owner FROM files WHERE removed IS NULL"

    def __init__(self, database: Database, read: Callable[[int], bytes]) -> None:
        self._db, self.read = database, read
        self.followers: list[Follower] = []

    def texts(self, items: Sequence[int]) -> list[tuple[int, str]]:
        """The texts of these files; one that is not text has its path."""
        return [(item, text) for item in items if (text := self._path_and_text(item))]

    def _path_and_text(self, item: int) -> str:
        row = self._db.row("SELECT path FROM files WHERE id = ? AND removed IS NULL", item)
        return "" if row is None else f"{row[0]}\n{as_text(self.read(item))}".strip()

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


def as_text(data: bytes) -> str:
    """What the bytes are as UTF-8, though a character may be cut off at the end; "" if they are no text."""
    if b"\0" in data:
        return ""
    try:
        return data.decode()
    except UnicodeDecodeError as err:
        cut = err.end == len(data) and err.start >= len(data) - 3
        return data[: err.start].decode() if cut else ""
