"""Room on the disk: a reserve, so that a full disk refuses growth and nothing else.

On a full disk SQLite cannot even remove: a removal writes to the WAL, and a checkpoint to the file. Three things help.
The WAL has its full size from the start, so that most commits write into space that the file system has already given
(such commits also take half the time). Below FLOOR bytes of free space calls that may grow something are refused. And
BALLAST bytes lie in a file of their own: if SQLite finds the disk full all the same, the ballast is removed, which
makes room for removals. It is written again when there is enough space.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from pathlib import Path

from libaios import wire

logger = logging.getLogger("store")

WAL_BYTES = 8 << 20
BALLAST_BYTES = 8 << 20
FLOOR_BYTES = 16 << 20
_ZEROS = bytes(1 << 20)


class DiskReserve:
    """The reserve. `wal`, `ballast`, `floor`: bytes."""

    def __init__(
        self, folder: Path, wal: int = WAL_BYTES, ballast: int = BALLAST_BYTES, floor: int = FLOOR_BYTES
    ) -> None:
        self._folder, self._ballast = folder, folder / "ballast"
        self.wal, self.ballast, self.floor = wal, ballast, floor
        self.tight = False  # less than `floor` is free
        self.spent = True  # there is no ballast
        self.full = False  # SQLite found the disk full: nothing may grow until there is a ballast again

    def free(self) -> int:
        """Bytes that this user can still write."""
        found = os.statvfs(self._folder)
        return found.f_bavail * found.f_frsize

    def prepare(self, database: Path) -> None:
        """Make the reserve. Called when the database is open and this process has its lock."""
        self._fill(database.with_name(database.name + "-wal"), self.wal)
        self.restore()
        self.look()

    def look(self) -> None:
        """Check the free space. Called at the beginning of each transaction."""
        if self.full:
            self.restore()
        self.tight = self.full or self.free() < self.floor

    def require(self) -> None:
        """Called before a change that may grow something. Raises OSError (ENOSPC)."""
        if self.tight:
            kept = f"{self.floor >> 20} MB are kept free"
            raise wire.error(errno.ENOSPC, f"the disk of the store is nearly full ({kept}); removing works")

    def give_up_ballast(self) -> None:
        if not self.full:
            logger.warning("the disk is full; the store only removes")
        self.tight = self.full = self.spent = True
        with contextlib.suppress(OSError):
            os.unlink(self._ballast)

    def restore(self) -> None:
        """Write the ballast (again), if there is space for it and for other work."""
        if self.spent and self.free() >= self.floor + 2 * self.ballast and self._fill(self._ballast, self.ballast):
            self.spent = self.full = False

    def stats(self) -> dict[str, int]:
        return {"free_bytes": self.free(), "ballast_bytes": 0 if self.spent else self.ballast}

    def _fill(self, path: Path, size: int) -> bool:
        """Extend the file to at least this size with zeros (which end a WAL)."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_APPEND, 0o600)
        try:
            missing = size - os.fstat(fd).st_size
            if missing > 0 and self.free() < self.floor + missing:
                return False
            while missing > 0:
                missing -= os.write(fd, _ZEROS[: min(missing, len(_ZEROS))])
            os.fsync(fd)
        except OSError as err:
            logger.warning("%s: %s", path, err.strerror)
            return False
        finally:
            os.close(fd)
        return True
