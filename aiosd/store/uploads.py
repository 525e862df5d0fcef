"""Files that come in pieces: begun, filled at offsets, finished; or given up.

A piece becomes a content at once, so no process holds more of a file than one piece, however large the file is. Pieces
may be sent in any order, and again: the last one sent for an offset counts. Nothing is seen of a file before `finish`.
That has the disk write the rest, and makes a version of all pieces in one transaction. An upload belongs to the
connection that began it, and ends with that, or after a day.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

from msgspec import Struct

from aiosd.store.contents import Contents
from aiosd.store.database import Database
from aiosd.store.files import Files
from libaios import wire
from libaios.wire import PIECE

MOST = 64  # of one peer
DAY_S = 86400.0


class Upload(Struct, frozen=True):
    id: int
    owner: int
    path: str
    if_version: int | None


class Uploads:
    """All methods but `expired` must be called in the transaction of a call."""

    def __init__(self, database: Database, files: Files) -> None:
        self._db, self._files = database, files
        self._contents: Contents = files.contents

    def begin(self, peer: int, owner: int, path: str, if_version: int | None, now: float) -> int:
        """Begin an upload; returns its number. Raises OSError (EAGAIN)."""
        (count,) = self._db.rows("SELECT count(*) FROM uploads WHERE peer = ?", peer)[0]
        if count >= MOST:
            raise wire.error(errno.EAGAIN, f"{MOST} uploads have been begun and not finished")
        sql = "INSERT INTO uploads(peer, owner, path, if_version, begun) VALUES(?, ?, ?, ?, ?)"
        self._db.do(sql, peer, owner, path, if_version, now)
        return self._db.db.last_insert_rowid()

    def find(self, peer: int, upload: int) -> Upload:
        """The upload of this number. Raises OSError (ENOENT)."""
        sql = "SELECT id, owner, path, if_version FROM uploads WHERE id = ? AND peer = ?"
        row = self._db.row(sql, upload, peer)
        if row is None:
            raise wire.error(errno.ENOENT, f"there is no upload {upload}")
        return Upload(*row)

    def put(self, upload: Upload, offset: int, data: bytes) -> None:
        """Add a piece. Raises OSError: EINVAL, EDQUOT."""
        number, rest = divmod(offset, PIECE)
        if rest or not data:
            raise wire.error(errno.EINVAL, f"offset: a piece begins at a multiple of {PIECE}, and is not empty")
        if number >= 1 << 32:
            raise wire.error(errno.EINVAL, "offset: beyond what any quota allows")
        before = self._contents.bytes_of(upload.owner)
        content = self._contents.put(upload.owner, data, sync=False)
        sql = "SELECT content FROM upload_pieces WHERE upload = ? AND number = ?"
        old = self._db.row(sql, upload.id, number)
        if old is not None:
            self._contents.release(upload.owner, [old[0]])
        sql = "INSERT OR REPLACE INTO upload_pieces VALUES(?, ?, ?, ?)"
        self._db.do(sql, upload.id, number, len(data), content)
        self._files.require_quota(upload.owner, before)

    def files(self, peer: int, upload: int) -> list[bytes]:
        """The names of the files that hold the pieces so far."""
        sql = (
            "SELECT DISTINCT c.file FROM uploads u JOIN upload_pieces p ON p.upload = u.id "
            "JOIN contents c ON c.id = p.content WHERE u.id = ? AND u.peer = ? AND c.file IS NOT NULL"
        )
        return [name for (name,) in self._db.rows(sql, upload, peer)]

    def take(self, upload: Upload, size: int) -> list[int]:
        """The contents of the whole file; their uses pass to the caller. Raises OSError (EINVAL)."""
        sql = "SELECT number, size, content FROM upload_pieces WHERE upload = ? ORDER BY number"
        pieces = self._db.rows(sql, upload.id)
        for index, (number, piece, _) in enumerate(pieces):
            if number != index or (piece != PIECE and index != len(pieces) - 1):
                raise wire.error(errno.EINVAL, f"upload {upload.id}: not all bytes have come from {index * PIECE} on")
        whole = sum(piece for _, piece, _ in pieces)
        if whole != size:
            raise wire.error(errno.EINVAL, f"size: {whole} bytes have been sent, not {size}")
        self._forget(upload.id)
        return [content for _, _, content in pieces]

    def drop(self, upload: int, owner: int) -> None:
        rows = self._db.rows("SELECT content FROM upload_pieces WHERE upload = ?", upload)
        self._contents.release(owner, [content for (content,) in rows])
        self._forget(upload)

    def _forget(self, upload: int) -> None:
        self._db.do("DELETE FROM upload_pieces WHERE upload = ?", upload)
        self._db.do("DELETE FROM uploads WHERE id = ?", upload)

    def drop_of_peer(self, peer: int) -> None:
        for upload, owner in self._db.rows("SELECT id, owner FROM uploads WHERE peer = ?", peer):
            self.drop(upload, owner)

    def drop_of_owner(self, owner: int) -> None:
        for (upload,) in self._db.rows("SELECT id FROM uploads WHERE owner = ?", owner):
            self.drop(upload, owner)

    def only(self, peers: Iterable[int]) -> None:
        """Drop uploads of agents that are not among these. Clients (negative numbers) may still come back; theirs
        expire."""
        alive = set(peers)
        for (peer,) in self._db.rows("SELECT DISTINCT peer FROM uploads WHERE peer > 0"):
            if peer not in alive:
                self.drop_of_peer(peer)

    def drop_expired(self, now: float) -> None:
        for upload, owner in self._db.rows("SELECT id, owner FROM uploads WHERE begun < ?", now - DAY_S):
            self.drop(upload, owner)

    def drop_all(self) -> None:
        """Drop all uploads, because another system has begun: none of their peers will come back."""
        for upload, owner in self._db.rows("SELECT id, owner FROM uploads"):
            self.drop(upload, owner)
