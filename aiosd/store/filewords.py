"""The words of files: of their paths and of their texts, in an index of the database (`filesearch` looks into it).

A file and its words change in one transaction. The index has the beginning (INDEXED bytes) of files that are UTF-8; of
other files only the path. It keeps no copy of the texts. The owner is a word of its own in the index.

Other indexes of texts (search by meaning) follow the changes: `followers` are called within the same transaction. They
read the texts of files from this class (`kind`, `everything`, `texts`).
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
    """The index. `read`: returns the beginning of the file with this number; b"" if it cannot be read."""

    kind = FILES
    everything = "SELECT id AS item, owner FROM files WHERE removed IS NULL"

    def __init__(self, database: Database, read: Callable[[int], bytes]) -> None:
        self._db, self.read = database, read
        self.followers: list[Follower] = []

    def texts(self, items: Sequence[int]) -> list[tuple[int, str]]:
        """The texts of these files; the path of a file that is no text."""
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
    """The bytes as UTF-8; the last character may be cut off. "": they are no text."""
    if b"\0" in data:
        return ""
    try:
        return data.decode()
    except UnicodeDecodeError as err:
        cut = err.end == len(data) and err.start >= len(data) - 3
        return data[: err.start].decode() if cut else ""
