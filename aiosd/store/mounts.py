"""Real folders in the spaces of owners: their files are read, listed and found with the others.

A person may mount any folder, an agent only folders that a person has named for that (`--store-folders`), and for
writing only if that setting allows it. Writing and appending replace a whole file; a removed file is gone for good. A
call whose store dies is submitted again: it writes the same again, finds that it has already appended (see
`realfolder`), or finds that the file is gone, which is what it wanted.

Names, sizes and words of the files lie in rows, for lists and searches. These are kept up to date by reading the
folder:

- A new mount, and every mount at the start, is scanned folder by folder, a little between any two calls.
- Events of inotify are hints. A file that one names is checked (lstat) after a moment, once for all hints of that time.
  When the queue of events has overflowed everything is scanned again.
- A call that reads a file, or its figures, gets the current state; lists and searches may be late by that moment. (A
  change through a memory mapping of the file gives no event: it is noticed at the next check.) They first go on with
  scans that have begun, for CATCH_UP_S at most: so the files of a small folder are found right after it was mounted.

The mount of a folder that is gone, or cannot be opened, stays; `note` names the problem.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import stat
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from aiosd.ipc import link
from aiosd.store import inotify
from aiosd.store.database import Database
from aiosd.store.files import FileRow, Files
from aiosd.store.filewords import INDEXED
from aiosd.store.realfolder import TEMPORARY, Real, RealFolder, may_be_mounted, real
from aiosd.store.spaces import clean_path, no_file
from libaios import wire

logger = logging.getLogger("store")

MOST_FILES = 20_000  # of one mount
MOST_FOLDERS = 4_000
MOST_DEPTH = 32
MOST_ENTRIES = 100_000  # of one folder
MOST_MOUNTS = 32  # of one owner
SETTLE_S = 0.1  # from a hint to the look
AT_ONCE, AT_ONCE_S = 64, 0.005  # files that are checked between two calls, and for how long
CATCH_UP_S = 0.02
REST_S = 60.0
HINTS_MOST = 100_000  # more are as good as an overflow

PathParts = tuple[bytes, ...]  # the names on the way from the mounted folder


@dataclass(slots=True, eq=False)
class Mounted:
    """One mount, with what this process knows of its folder."""

    id: int
    owner: int
    at: str
    path: bytes
    writable: bool
    folder: RealFolder | None = None
    note: str = ""
    watches: dict[PathParts, int] = field(default_factory=dict)
    met: set[PathParts] = field(default_factory=set)  # folders that have been scanned
    ahead: deque[PathParts] = field(default_factory=deque)  # folders to be scanned
    queued: set[PathParts] = field(default_factory=set)
    files: int = 0  # about
    whole: bool = False  # it has been scanned completely since it was opened


class Mounts:
    def __init__(
        self,
        database: Database,
        files: Files,
        hidden: Path,
        grants: Iterable[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._db, self._files, self._clock = database, files, clock
        files.read_mounted = self._beginning
        stats = os.stat(hidden)
        self._hidden = (stats.st_dev, stats.st_ino)
        self._grants: list[tuple[bytes, bool]] = []
        for path, _, mode in (one.partition("=") for one in grants):
            self._grants += [(os.fsencode(one), mode == "write") for one in {path, os.path.realpath(path)}]
        self._mounted: dict[int, Mounted] = {}
        self._of_watch: dict[int, tuple[Mounted, PathParts]] = {}
        self._hints: dict[tuple[int, PathParts], float] = {}  # files to be checked, and when
        self._inotify: inotify.Inotify | None = None
        self._unsure = False  # a mount was made or removed in a transaction that may not have ended yet
        self.counts = {"mount_looks": 0, "mount_rescans": 0}

    def fileno(self) -> int:
        """The descriptor that reports changes, made when it is first needed."""
        if self._inotify is None:
            self._inotify = inotify.Inotify()
        return self._inotify.fd

    # ── mounting, in the transaction of a call ────────────────────────────────────────────────────────────

    def checked_folder(self, caller: link.Caller, folder: str, write: bool) -> bytes:
        """The real folder that the caller names. Raises OSError: EPERM, EINVAL, ENOENT, …"""
        path = wire.os_bytes(folder)
        if not path.startswith(b"/") or b"\0" in path:
            raise wire.error(errno.EINVAL, "folder: an absolute path is needed")
        # First check the path as written: a folder that an agent may not mount is not even looked up.
        if caller.pid and (caller.uid != os.getuid() or not self._granted(os.path.normpath(path), write)):
            raise wire.error(errno.EPERM, _how_to_mount(folder, write))
        try:
            found = may_be_mounted(path, self._hidden)
        except OSError as err:
            raise wire.error(err.errno or errno.EIO, f"{wire.os_shown(folder)}: {err.strerror}") from None
        if caller.pid and not self._granted(found, write):  # a link leads elsewhere
            raise wire.error(errno.EPERM, _how_to_mount(folder, write))
        return found

    def _granted(self, path: bytes, write: bool) -> bool:
        return any(
            (path == folder or path.startswith(folder.rstrip(b"/") + b"/")) and (writable or not write)
            for folder, writable in self._grants
        )

    def add(self, owner: int, at: str, path: bytes, write: bool) -> wire.Mount:
        """Add a mount. Raises OSError: EEXIST, EMFILE, ENOTDIR."""
        rows = self._db.rows("SELECT at FROM mounts WHERE owner = ?", owner)
        for (other,) in rows:
            if other == at or other.startswith(f"{at}/") or at.startswith(f"{other}/"):
                raise wire.error(errno.EEXIST, f"{at}: a folder is mounted at {other}")
        if len(rows) >= MOST_MOUNTS:
            raise wire.error(errno.EMFILE, f"{MOST_MOUNTS} folders are mounted already")
        if self._files.find(owner, at) is not None or self._files.is_folder(owner, at):
            raise wire.error(errno.EEXIST, f"{at}: there are files")
        self._files.require_free(owner, at)
        self._unsure = True
        self._db.do("INSERT INTO mounts(owner, at, folder, write) VALUES(?, ?, ?, ?)", owner, at, path, write)
        return self._shown(self._get(self._db.db.last_insert_rowid()))

    def remove(self, owner: int, at: str) -> bool:
        row = self._db.row("DELETE FROM mounts WHERE owner = ? AND at = ? RETURNING id", owner, at)
        if row is None:
            return False
        self._unsure = True
        for (file,) in self._db.rows("SELECT file FROM mounted WHERE mount = ?", row[0]):
            self._drop(file, owner)
        self._close(row[0])
        return True

    def of_owner(self, owner: int | None) -> list[wire.Mount]:
        rows = self._db.rows("SELECT id FROM mounts WHERE owner = ? ORDER BY at", owner)
        return [self._shown(self._get(mount)) for (mount,) in rows]

    def _shown(self, mount: Mounted) -> wire.Mount:
        (files,) = self._db.rows("SELECT count(*) FROM mounted WHERE mount = ?", mount.id)[0]
        complete = mount.whole and not mount.ahead and all(hinted != mount.id for hinted, _ in self._hints)
        return wire.Mount(mount.at, wire.os_text(mount.path), mount.writable, files, complete, mount.note)

    # ── reading and writing ───────────────────────────────────────────────────────────────────────────────

    def over(self, owner: int | None, path: str) -> Mounted | None:
        """The mount in which a path lies."""
        for mount, at in self._db.rows("SELECT id, at FROM mounts WHERE owner = ?", owner):
            if path.startswith(f"{at}/") or path == at:
                return self._get(mount)
        return None

    def read(self, mount: Mounted, path: str, offset: int, size: int) -> tuple[bytes, int]:
        folder = self._folder(mount, path)
        try:
            data, found = folder.read(self._names(mount, path), offset, size)
        except OSError as err:
            raise _as_seen(err, path) from None
        return data, found.size

    def fresh(self, mount: Mounted, path: str) -> FileRow:
        """The row of a file, after a check of the file. Raises OSError: ENOENT, EISDIR."""
        names = self._names(mount, path)
        folder = self._folder(mount, path)
        try:
            found = folder.look(names)
        except OSError as err:
            raise _as_seen(err, path) from None
        with self._db.transaction():
            self._update(mount, names, found)
        return self._files.require(mount.owner, path)

    def write(self, mount: Mounted, path: str, args: wire.StoWrite, call: bytes) -> FileRow:
        """Write a file. `call` names the call for all times: one that appends may be submitted again, and appends
        once."""
        self.require_writable(mount, path)
        if args.if_version is not None:
            raise wire.error(errno.EINVAL, f"{path}: lies in a mounted folder, and has no versions")
        folder, names = self._folder(mount, path), self._names(mount, path)
        try:
            if args.append:
                folder.append(names, args.data, call)
            else:
                folder.write(names, args.data)
        except OSError as err:
            raise _as_seen(err, path) from None
        return self.fresh(mount, path)

    def remove_file(self, mount: Mounted, path: str) -> None:
        """Remove a file for good."""
        folder, names = self._folder(mount, path), self._names(mount, path)
        try:
            folder.remove(names)
        except OSError as err:
            raise _as_seen(err, path) from None
        with self._db.transaction():
            self._update(mount, names, None)

    @staticmethod
    def require_writable(mount: Mounted, path: str) -> None:
        """Raises OSError (EROFS)."""
        if not mount.writable:
            raise wire.error(errno.EROFS, f"{path}: the folder at {mount.at} is mounted for reading only")

    def _folder(self, mount: Mounted, path: str) -> RealFolder:
        self._open(mount)
        if mount.folder is None or path == mount.at:
            raise no_file(path)
        return mount.folder

    def _names(self, mount: Mounted, path: str) -> PathParts:
        """The real names on the way to a file: as in its row (they may be written in NFD), or else as in the path."""
        sql = "SELECT m.folder, m.name FROM files f JOIN mounted m ON m.file = f.id WHERE f.owner = ? AND f.path = ?"
        row = self._db.row(f"{sql} AND f.removed IS NULL", mount.owner, path)
        if row is not None:
            return (*_parts(row[0]), row[1])
        return tuple(os.fsencode(name) for name in path[len(mount.at) + 1 :].split("/"))

    def _beginning(self, row: FileRow) -> bytes:
        mount = self._get(row.mount) if row.mount is not None else None
        return self.read(mount, row.path, 0, INDEXED)[0] if mount is not None else b""

    # ── what is open ──────────────────────────────────────────────────────────────────────────────────────

    def open_all(self) -> None:
        for (mount,) in self._db.rows("SELECT id FROM mounts"):
            self._open(self._get(mount))

    def _get(self, mount: int) -> Mounted:
        if mount not in self._mounted:
            row = self._db.row("SELECT id, owner, at, folder, write FROM mounts WHERE id = ?", mount)
            assert row is not None
            found = Mounted(row[0], row[1], row[2], row[3], bool(row[4]))
            found.files = self._db.rows("SELECT count(*) FROM mounted WHERE mount = ?", mount)[0][0]
            self._mounted[mount] = found
            self._open(found)
        return self._mounted[mount]

    def _open(self, mount: Mounted) -> None:
        if mount.folder is not None:
            return
        try:
            self.fileno()
            mount.folder = RealFolder(mount.path, self._hidden)
            mount.note = ""
        except OSError as err:
            mount.note = f"the folder cannot be opened ({err.strerror})"
            return
        self._queue(mount, ())

    def _close(self, mount_id: int) -> None:
        mount = self._mounted.pop(mount_id, None)
        if mount is None:
            return
        for watch in mount.watches.values():
            self._forget_watch(watch)
        if mount.folder is not None:
            mount.folder.close()

    def undone(self) -> None:
        """A transaction was lost. If it made or removed a mount, make the records in memory anew from the rows."""
        if not self._unsure:
            return
        self._unsure = False
        for mount in list(self._mounted):
            self._close(mount)
        self._hints.clear()
        self.open_all()

    def close(self) -> None:
        for mount in list(self._mounted):
            self._close(mount)
        if self._inotify is not None:
            self._inotify.close()
            self._inotify = None

    # ── looking ───────────────────────────────────────────────────────────────────────────────────────────

    def work(self) -> float:
        """Check some of the files and folders that are due. Outside of any transaction. Returns the seconds until there
        is more to do."""
        self._unsure = False  # all transactions of calls are over
        self._look_at_some()
        for mount in list(self._mounted.values()):
            if mount.ahead:
                self._look_through(mount)
                return 0.0
        if not self._hints:
            return REST_S
        return max(0.0, next(iter(self._hints.values())) - self._clock())

    def catch_up(self) -> None:
        """Go on with scans before a list or a search. In a transaction that is not possible."""
        now = self._clock()
        end = now + CATCH_UP_S
        while now <= end and not self._db.db.in_transaction:
            if not any(mount.ahead for mount in self._mounted.values()) and next(iter(self._hints.values()), end) > now:
                return
            self.work()
            now = self._clock()

    def _look_at_some(self) -> None:
        begun = self._clock()
        due = [hint for hint, at in itertools.islice(self._hints.items(), AT_ONCE) if at <= begun]
        done = []
        if due:
            with self._db.transaction():
                for hint in due:
                    self._look_at(*hint)
                    done.append(hint)
                    if self._clock() - begun > AT_ONCE_S:
                        break
        for hint in done:
            del self._hints[hint]

    def take_events(self) -> None:
        if self._inotify is None:
            return
        for event in self._inotify.read():
            if event.mask & inotify.Q_OVERFLOW or len(self._hints) > HINTS_MOST:
                self._hints.clear()
                self.counts["mount_rescans"] += 1
                for mount in self._mounted.values():
                    self._begin_again(mount)
                continue
            found = self._of_watch.get(event.watch)
            if found is None:
                continue
            mount, folder = found
            if event.mask & inotify.IGNORED:
                self._of_watch.pop(event.watch, None)
                mount.watches.pop(folder, None)
            elif event.mask & (inotify.DELETE_SELF | inotify.MOVE_SELF):
                if folder:
                    self._hint(mount, folder)
                else:
                    mount.note = "the folder was moved or removed"
            elif event.name and event.name != TEMPORARY:
                self._hint(mount, (*folder, event.name))

    def _hint(self, mount: Mounted, names: PathParts, settle: float = SETTLE_S) -> None:
        self._hints.setdefault((mount.id, names), self._clock() + settle)

    def _look_at(self, mount_id: int, names: PathParts) -> None:
        """Check one name: there is a file, a folder, or nothing any more."""
        mount = self._mounted.get(mount_id)
        if mount is None or mount.folder is None or not names:
            return
        self.counts["mount_looks"] += 1
        try:
            with mount.folder.folder(names[:-1]) as fd:
                found = os.stat(names[-1], dir_fd=fd, follow_symlinks=False)
        except OSError:
            found = None
        self._update(mount, names, real(found) if found is not None else None)
        if found is not None and stat.S_ISDIR(found.st_mode):
            self._queue(mount, names)
        else:
            self._drop_folder(mount, names)

    def _queue(self, mount: Mounted, names: PathParts) -> None:
        if names not in mount.queued:
            mount.queued.add(names)
            mount.ahead.append(names)

    def _begin_again(self, mount: Mounted) -> None:
        mount.whole = False
        mount.met.clear()
        mount.ahead.clear()
        mount.queued.clear()
        self._queue(mount, ())

    def _look_through(self, mount: Mounted) -> None:
        """Scan one folder: files that differ from their rows are to be checked."""
        names = mount.ahead.popleft()
        mount.queued.discard(names)
        mount.met.add(names)
        assert mount.folder is not None
        sql = "SELECT name, stamp FROM mounted WHERE mount = ? AND folder = ?"
        known = dict(self._db.rows(sql, mount.id, _joined(names)))
        try:
            with mount.folder.entries(names) as (fd, entries):
                self._watch(mount, names, fd)
                for entry in itertools.islice(entries, MOST_ENTRIES):
                    self._compare(mount, (*names, os.fsencode(entry.name)), entry, known)
        except OSError as err:
            if err.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                mount.note = f"a folder cannot be read ({err.strerror})"
        for name in known:  # these were not met
            self._hint(mount, (*names, name), 0.0)
        if not mount.ahead and not mount.whole:
            mount.whole = True
            self._drop_unmet(mount)

    def _compare(self, mount: Mounted, names: PathParts, entry: os.DirEntry[str], known: dict[bytes, str]) -> None:
        try:
            found = entry.stat(follow_symlinks=False)
        except OSError:
            return  # gone meanwhile
        if stat.S_ISDIR(found.st_mode):
            if names not in mount.met and (found.st_dev, found.st_ino) != self._hidden:
                self._queue_new(mount, names)
            return
        plain = real(found)
        if plain is not None and names[-1] != TEMPORARY and known.pop(names[-1], None) != plain.stamp:
            self._hint(mount, names, 0.0)

    def _queue_new(self, mount: Mounted, names: PathParts) -> None:
        if len(mount.met) + len(mount.ahead) >= MOST_FOLDERS or len(names) > MOST_DEPTH:
            mount.note = f"more than {MOST_FOLDERS} folders, or more than {MOST_DEPTH} deep: not all are known"
        else:
            self._queue(mount, names)

    def _watch(self, mount: Mounted, names: PathParts, fd: int) -> None:
        """Watch a folder. Done before its content is read, so that each later change brings an event."""
        assert self._inotify is not None
        try:
            watch = self._inotify.watch(fd)
        except OSError as err:
            mount.note = f"changes are not noticed everywhere ({err.strerror})"
            return
        old = self._of_watch.get(watch)
        if old is not None and old[1] != names:  # the folder was moved: its watch keeps its number
            old[0].watches.pop(old[1], None)
        self._of_watch[watch] = (mount, names)
        mount.watches[names] = watch

    def _forget_watch(self, watch: int) -> None:
        if self._of_watch.pop(watch, None) is not None and self._inotify is not None:
            self._inotify.forget(watch)

    # ── rows, in a transaction ────────────────────────────────────────────────────────────────────────────

    def _update(self, mount: Mounted, names: PathParts, found: Real | None) -> None:
        """Bring the row of one file up to date."""
        folder, name = _joined(names[:-1]), names[-1]
        sql = "SELECT file, stamp FROM mounted WHERE mount = ? AND folder = ? AND name = ?"
        row = self._db.row(sql, mount.id, folder, name)
        if found is None:
            if row is not None:
                self._drop(row[0], mount.owner)
                mount.files -= 1
            return
        if row is not None and row[1] == found.stamp:
            return
        path = self._path(mount, names)
        if path is None:
            return
        file = row[0] if row is not None else self._enter(mount, path, folder, name, found)
        if file is None:
            return
        sql = "UPDATE files SET size = ?, created = ?, updated = ? WHERE id = ?"
        self._db.do(sql, found.size, found.created, found.updated, file)
        self._db.do("UPDATE mounted SET stamp = ? WHERE file = ?", found.stamp, file)
        self._files.words.enter(file, mount.owner, path, self._files.beginning(file))

    def _enter(self, mount: Mounted, path: str, folder: bytes, name: bytes, found: Real) -> int | None:
        if mount.files >= MOST_FILES:
            mount.note = f"more than {MOST_FILES} files: not all are listed and found"
            return None
        if self._files.find(mount.owner, path) is not None:
            return None  # the same name in another Unicode form
        sql = (
            "INSERT INTO files(owner, path, version, size, created, updated, author, mount) "
            "VALUES(?, ?, 0, ?, ?, ?, '', ?)"
        )
        self._db.do(sql, mount.owner, path, found.size, found.created, found.updated, mount.id)
        file = self._db.db.last_insert_rowid()
        self._db.do("INSERT INTO mounted VALUES(?, ?, ?, ?, ?)", file, mount.id, folder, name, found.stamp)
        mount.files += 1
        return file

    def _path(self, mount: Mounted, names: PathParts) -> str | None:
        """The path of a file in the store; None: its name is not allowed in a path (it is no UTF-8, for example)."""
        try:
            return clean_path(unicodedata.normalize("NFC", f"{mount.at}/{b'/'.join(names).decode()}"))
        except (OSError, UnicodeDecodeError):
            return None

    def _drop(self, file: int, owner: int) -> None:
        self._files.words.drop(file, owner)
        self._db.do("DELETE FROM mounted WHERE file = ?", file)
        self._db.do("DELETE FROM files WHERE id = ?", file)

    def _drop_folder(self, mount: Mounted, names: PathParts) -> None:
        """Drop the rows of a folder that does not exist any more."""
        for folder in [one for one in mount.met if one[: len(names)] == names]:
            mount.met.discard(folder)
            if folder in mount.watches:
                self._forget_watch(mount.watches.pop(folder))
        prefix = _joined(names)
        sql = "SELECT file FROM mounted WHERE mount = ? AND (folder = ? OR (folder >= ? AND folder < ?))"
        for (file,) in self._db.rows(sql, mount.id, prefix, prefix + b"/", prefix + b"0"):
            self._drop(file, mount.owner)
            mount.files -= 1

    def _drop_unmet(self, mount: Mounted) -> None:
        """After a complete scan: drop folders that were not found."""
        for (folder,) in self._db.rows("SELECT DISTINCT folder FROM mounted WHERE mount = ?", mount.id):
            names = _parts(folder)
            if names and names not in mount.met:
                with self._db.transaction():
                    self._drop_folder(mount, names)

    def stats(self) -> dict[str, int]:
        mounted = self._mounted.values()
        return {"mounts": len(mounted), "mounted_files": sum(mount.files for mount in mounted), **self.counts}


def _joined(names: PathParts) -> bytes:
    return b"/".join(names)


def _parts(folder: bytes) -> PathParts:
    return tuple(folder.split(b"/")) if folder else ()


def _as_seen(err: OSError, path: str) -> OSError:
    """The error as the caller sees it: a link, a pipe, or a file in place of a folder counts as missing."""
    if err.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
        return no_file(path)
    return wire.error(err.errno or errno.EIO, f"{path}: {err.strerror}")


def _how_to_mount(folder: str, write: bool) -> str:
    what = "for writing " if write else ""
    return f"{wire.os_shown(folder)}: a person mounts it {what}(aios-sto mount), or names it in --store-folders"
