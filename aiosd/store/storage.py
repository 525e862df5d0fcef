"""The storage manager: the files of agents, with all their versions.

Contract. When a call has returned its effect is on the disk, and it takes effect once, whatever dies. A write makes a
new version; old ones stay, up to the number that is set, and the oldest is removed first. A removed file lies in the
trash until a person empties that. All data count for the quota of their owner, the trash and old versions too, and a
call that would exceed it gets EDQUOT: nothing is deleted to make room. Rows, words, uses of contents and the memo of
the call change in one transaction.

`spaces` checks the rights, `files` has the rows, `contents` the bytes, `uploads` files that come in pieces, and
`mounts` the real folders. This file has the calls, and the order in which they use these parts.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

from aiosd.ipc import link
from aiosd.ipc.service import Followed, Lasting, Pause
from aiosd.store import owners, spaces
from aiosd.store.consent import Consent
from aiosd.store.contents import Contents
from aiosd.store.database import Database
from aiosd.store.files import FileRow, Files
from aiosd.store.filesearch import FileSearch
from aiosd.store.meaning import Meaning
from aiosd.store.mounts import Mounted, Mounts
from aiosd.store.realfolder import CALL_BYTES
from aiosd.store.spaces import Namespace, Spaces, clean_folder, clean_path
from aiosd.store.uploads import Uploads
from libaios import wire
from libaios.wire import PIECE, Sys

logger = logging.getLogger("store")

SYNC_AT_ONCE = 8  # files of a megabyte
EXPIRE_S = 3600.0  # between two checks for uploads that were given up
REST_S, RETRY_S = 5.0, 5.0


class Storage:
    def __init__(
        self,
        database: Database,
        folder: Path,
        quota: int,
        most_versions: int,
        grants: Iterable[str] = (),
        clock: Callable[[], float] = time.time,
        meaning: Meaning | None = None,
    ) -> None:
        self._db, self._clock = database, clock
        self.contents = Contents(database, folder)
        self.files = Files(database, self.contents, quota, most_versions)
        self.spaces = Spaces(database)
        self.uploads = Uploads(database, self.files)
        self.meaning = meaning if meaning is not None else Meaning(database, None, 0)
        self.files.words.followers.append(self.meaning)
        self._search = FileSearch(database, self.files, self.meaning)
        self.consent = Consent()
        self.mounts = Mounts(database, self.files, hidden=folder.parent, grants=grants)
        self._removed: deque[link.CallKey] = deque(maxlen=1000)  # calls that have removed real files
        self._expire_at = 0.0

    def handlers(self) -> dict[int, Any]:
        return {
            Sys.STO_WRITE: self.write,
            Sys.STO_READ: self.read,
            Sys.STO_LIST: self.list_files,
            Sys.STO_STAT: self.stat,
            Sys.STO_HISTORY: self.history,
            Sys.STO_ROLLBACK: self.rollback,
            Sys.STO_REMOVE: self.remove,
            Sys.STO_TRASH: self.trash,
            Sys.STO_RESTORE: self.restore,
            Sys.STO_EMPTY: self.empty,
            Sys.STO_SHARE: self.share,
            Sys.STO_UNSHARE: self.unshare,
            Sys.STO_SHARES: self.shares,
            Sys.STO_MOUNT: self.mount,
            Sys.STO_UNMOUNT: self.unmount,
            Sys.STO_MOUNTS: self.list_mounts,
            Sys.STO_SEARCH: self.search,
            Sys.STO_UPLOAD: self.upload,
            Sys.STO_PIECE: self.piece,
            Sys.STO_FINISH: self.finish,
            Sys.STO_ABORT: self.abort,
            Sys.STO_STATS: self.stats_of,
        }

    # ── reading ───────────────────────────────────────────────────────────────────────────────────────────

    def read(self, ask: link.Ask, args: wire.StoRead) -> Any:
        return self.read_at_once(ask, args) or self._read_in_steps(ask, args)

    def read_at_once(self, ask: link.Ask, args: wire.StoRead) -> Any:
        """A fast way for most reads, those of a small file of the caller's own. None: this is another case."""
        if args.of or self.consent.ruled("sto_read"):
            return None
        found = self.files.at_once(owners.own(ask.caller), clean_path(args.path), args.version, args.offset)
        if found is None:
            return None
        file, version, size, data = found
        return self._promised(wire.FileData(data[: args.size], size, version), file)

    def _promised(self, found: wire.FileData, file: int) -> Any:
        return found if self._db.open else Lasting(found, self.files.promises.make(("file", file)))

    def _read_in_steps(self, ask: link.Ask, args: wire.StoRead) -> Any:
        space, path = self._meant(ask, args)
        self.consent.to(ask, "sto_read", space, path)
        mount = self.mounts.over(space.owner, path)
        if mount is not None:
            require_no_version(path, args.version)
            return wire.FileData(*self.mounts.read(mount, path, args.offset, args.size), 0)
        row = self.files.require(space.owner, path)
        version = row.version if args.version is None else args.version
        data, size = self.files.piece(row, version, args.offset, args.size)
        found = wire.FileData(data, size, version)
        if space.grants is not None:  # a share may end without a change of the file
            return found
        return self._promised(found, row.id)

    def stat(self, ask: link.Ask, args: wire.StoPath) -> wire.File:
        return self._find(*self._readable(ask, args, "sto_stat")).shown()

    def list_files(self, ask: link.Ask, args: wire.StoList) -> list[wire.File]:
        self._catch_up()
        space = self.spaces.find(ask.caller, args.of)
        return [row.shown() for row in self.files.listed(space, clean_folder(args.folder), args.after, args.limit)]

    def history(self, ask: link.Ask, args: wire.StoHistory) -> list[wire.Version]:
        return self.files.history(self._find(*self._readable(ask, args, "sto_history")), args.before, args.limit)

    def search(self, ask: link.Ask, args: wire.StoSearch) -> Any:
        """Search; with `of` None in all files that the caller can read."""

        def seen() -> list[Namespace]:
            spaces = self.spaces
            return spaces.all_seen(ask.caller) if args.of is None else [spaces.find(ask.caller, args.of)]

        self._catch_up()
        return self._search.search(ask.caller, seen, args.query, clean_folder(args.folder), args.k)

    def _catch_up(self) -> None:
        """If the disk refuses, files of mounted folders are found later."""
        with contextlib.suppress(OSError):
            self.mounts.catch_up()

    def _readable(self, ask: link.Ask, args: Any, call: str) -> tuple[Namespace, str]:
        space, path = self._meant(ask, args)
        self.consent.to(ask, call, space, path)
        return space, path

    def _meant(self, ask: link.Ask, args: Any, write: bool = False) -> tuple[Namespace, str]:
        """Namespace and path of a call, after a check that the caller may see (or change) it. Raises OSError: EINVAL,
        ENOENT, EACCES."""
        path = clean_path(args.path)
        space = self.spaces.find(ask.caller, args.of)
        space.require(path, write)
        return space, path

    def _find(self, space: Namespace, path: str) -> FileRow:
        mount = self.mounts.over(space.owner, path)
        return self.mounts.fresh(mount, path) if mount is not None else self.files.require(space.owner, path)

    # ── changing ──────────────────────────────────────────────────────────────────────────────────────────

    def write(self, ask: link.Ask, args: wire.StoWrite) -> Any:
        def effect() -> wire.File:
            space, path = self._meant(ask, args, write=True)
            mount = self.mounts.over(space.owner, path)
            if mount is not None:
                self.consent.to(ask, "sto_write", space, path, content=args.data)
                return self.mounts.write(mount, path, args, self._named(ask)).shown()
            owner = self.spaces.make(space)
            old = self.files.find(owner, path)
            require_version(path, old, args.if_version)
            self.consent.to(ask, "sto_write", space, path, old, "" if args.append else "overwritten", args.data)
            before = self.contents.bytes_of(owner)
            size, parts = self._appended(owner, old, args.data) if args.append else self._whole(owner, args.data)
            return self._add(ask, owner, path, old, size, parts, before)

        reply = self._db.once(ask, effect)
        if not ask.ahead or args.append or args.of or len(args.data) > link.LARGEST_COPY:
            return reply
        return Followed(reply, ask, Sys.STO_READ, wire.StoRead(args.path))

    def _whole(self, owner: int, data: bytes) -> tuple[int, list[int]]:
        return len(data), [self.contents.put(owner, data)] if data else []

    def _appended(self, owner: int, old: FileRow | None, data: bytes) -> tuple[int, list[int]]:
        """The contents of the file with `data` after it; whole pieces are shared with the old version."""
        if old is None:
            return self._whole(owner, data)
        size, parts = self.files.version(old, None)
        if size % PIECE:
            data = self.contents.read(parts.pop()) + data
        self.contents.use(owner, parts)
        new = [self.contents.put(owner, data[begin : begin + PIECE]) for begin in range(0, len(data), PIECE)]
        return len(parts) * PIECE + len(data), [*parts, *new]

    def _add(
        self, ask: link.Ask, owner: int, path: str, old: FileRow | None, size: int, parts: list[int], before: int
    ) -> wire.File:
        row = self.files.add(owner, path, old, size, parts, self._clock(), author(ask.caller))
        self.files.require_quota(owner, before)
        return row.shown()

    def rollback(self, ask: link.Ask, args: wire.StoRollback) -> Any:
        """Make a new version that is equal to an old one."""
        if (args.version is None) == (args.time is None):
            raise wire.error(errno.EINVAL, "exactly one of version and time is needed")

        def effect() -> wire.File:
            space, path = self._meant(ask, args, write=True)
            self._require_kept(space, path, "has no old versions")
            row = self.files.require(space.owner, path)
            to = [("to", f"version {args.version}" if args.time is None else f"what it was at {args.time} (Unix time)")]
            self.consent.to(ask, "sto_rollback", space, path, row, "rolled back", more=to)
            number = self.files.version_at(row, args.time) if args.time is not None else args.version
            size, parts = self.files.version(row, number)
            before = self.contents.bytes_of(row.owner)
            self.contents.use(row.owner, parts)
            return self._add(ask, row.owner, path, row, size, parts, before)

        return self._db.once(ask, effect)

    def remove(self, ask: link.Ask, args: wire.StoPath) -> Any:
        """Move a file into the trash. Returns its number there; 0: it was a real file and is removed for good."""

        def effect() -> int:
            space, path = self._meant(ask, args, write=True)
            mount = self.mounts.over(space.owner, path)
            if mount is not None:
                self._remove_real(ask, mount, space, path)
                return 0
            row = self.files.require(space.owner, path)
            self.consent.to(ask, "sto_remove", space, path, row, "removed")
            self.files.remove(row, self._clock())
            return row.id

        return self._db.once(ask, effect, frees=True)

    def _remove_real(self, ask: link.Ask, mount: Mounted, space: Namespace, path: str) -> None:
        self.mounts.require_writable(mount, path)
        try:
            row = self.mounts.fresh(mount, path)
        except FileNotFoundError:
            if ask.again or ask.key in self._removed:
                return  # the file was removed, and the record of that was lost
            raise
        seen = f"{row.size} bytes, changed at {row.updated!r}"
        self.consent.to(ask, "sto_remove", space, path, row, "removed", more=[("there is", seen)], names=seen.encode())
        self.mounts.remove_file(mount, path)
        self._removed.append(ask.key)

    def _named(self, ask: link.Ask) -> bytes:
        """A name for this call that is unique among all systems and agents."""
        name = f"{self._db.rows('SELECT boot FROM system')} {ask.key} {ask.life}"
        return hashlib.blake2b(name.encode(), digest_size=CALL_BYTES).digest()

    def _require_kept(self, space: Namespace, path: str, reason: str) -> None:
        mount = self.mounts.over(space.owner, path)
        if mount is not None:
            raise wire.error(errno.EINVAL, f"{path}: lies in a folder mounted at {mount.at}, and {reason}")

    # ── the trash ─────────────────────────────────────────────────────────────────────────────────────────

    def trash(self, ask: link.Ask, args: wire.StoTrash) -> list[wire.Trashed]:
        return self.files.trash(self._all_of(ask, args.of, "look into the trash").owner, args.after, args.limit)

    def restore(self, ask: link.Ask, args: wire.StoRestore) -> Any:
        def effect() -> wire.File:
            owner = self._all_of(ask, args.of, "restore from the trash").owner
            if owner is None:
                raise wire.error(errno.ENOENT, f"there is no {args.id} in the trash")
            return self.files.restore(owner, args.id).shown()

        return self._db.once(ask, effect)

    def empty(self, ask: link.Ask, args: wire.StoEmpty) -> Any:
        """Remove files for good; the kernel allows that only to a person. Returns their number, at most
        REMOVE_AT_ONCE."""

        def effect() -> int:
            return self.files.empty(self.spaces.find(ask.caller, args.of).owner, args.ids)

        return self._db.once(ask, effect, frees=True)

    def _all_of(self, ask: link.Ask, of: str, what: str) -> Namespace:
        space = self.spaces.find(ask.caller, of)
        space.require_all(what)
        return space

    # ── shares ────────────────────────────────────────────────────────────────────────────────────────────

    def share(self, ask: link.Ask, args: wire.StoShare) -> Any:
        def effect() -> None:
            path, grantee = clean_folder(args.path), spaces.named(ask.caller, args.to)
            space = self.spaces.find(ask.caller, args.of)
            space.require(path)
            space.require_all("share this")
            if self.files.find(space.owner, path) is None and not self.files.is_folder(space.owner, path):
                raise spaces.no_file(path)
            to = [("with", args.to), ("for", "writing" if args.write else "reading")]
            self.consent.to(ask, "sto_share", space, path, more=to)
            self.spaces.share(self.spaces.make(space), path, grantee, args.write)

        return self._db.once(ask, effect)

    def unshare(self, ask: link.Ask, args: wire.StoUnshare) -> Any:
        def effect() -> bool:
            path, grantee = clean_folder(args.path), spaces.named(ask.caller, args.to)
            space = self._all_of(ask, args.of, "end a share")
            self.consent.to(ask, "sto_unshare", space, path, more=[("with", args.to)])
            owner = space.owner
            return owner is not None and self.spaces.unshare(owner, path, grantee)

        return self._db.once(ask, effect, frees=True)

    def shares(self, ask: link.Ask, args: wire.NoArgs) -> list[wire.Share]:
        return self.spaces.shares(ask.caller)

    # ── mounts ────────────────────────────────────────────────────────────────────────────────────────────

    def mount(self, ask: link.Ask, args: wire.StoMount) -> Any:
        def effect() -> wire.Mount:
            space = self._all_of(ask, args.of, "mount a folder there")
            at = clean_path(args.at)
            folder = self.mounts.checked_folder(ask.caller, args.folder, args.write)
            return self.mounts.add(self.spaces.make(space), at, folder, args.write)

        return self._db.once(ask, effect)

    def unmount(self, ask: link.Ask, args: wire.StoPath) -> Any:
        def effect() -> bool:
            owner = self._all_of(ask, args.of, "unmount a folder there").owner
            return owner is not None and self.mounts.remove(owner, clean_path(args.path))

        return self._db.once(ask, effect, frees=True)

    def list_mounts(self, ask: link.Ask, args: wire.StoSpace) -> list[wire.Mount]:
        return self.mounts.of_owner(self._all_of(ask, args.of, "list the mounted folders").owner)

    # ── files in pieces ───────────────────────────────────────────────────────────────────────────────────

    def upload(self, ask: link.Ask, args: wire.StoUpload) -> Any:
        def effect() -> int:
            space, path = self._meant(ask, args, write=True)
            if self.mounts.over(space.owner, path) is not None:
                raise wire.error(errno.EFBIG, f"{path}: at most {PIECE} bytes can be written to a mounted folder")
            owner = self.spaces.make(space)
            return self.uploads.begin(ask.key[0], owner, path, args.if_version, self._clock())

        return self._db.once(ask, effect)

    def piece(self, ask: link.Ask, args: wire.StoPiece) -> None:
        self._db.room.require()
        with self._db.lazily():  # a power cut ends all uploads
            self.uploads.put(self.uploads.find(ask.key[0], args.upload), args.offset, args.data)

    def finish(self, ask: link.Ask, args: wire.StoFinish) -> Any:
        files = self.uploads.files(ask.key[0], args.upload)
        return self._finish_later(ask, args, files) if len(files) > SYNC_AT_ONCE else self._finish(ask, args, set())

    def _finish_later(self, ask: link.Ask, args: wire.StoFinish, files: list[bytes]) -> Generator[Pause, None, Any]:
        """Finish an upload while other calls are served and the disk writes."""
        for begin in range(0, len(files), SYNC_AT_ONCE):
            self.contents.sync(files[begin : begin + SYNC_AT_ONCE])
            yield Pause(0.0)
        return self._finish(ask, args, set(files))

    def _finish(self, ask: link.Ask, args: wire.StoFinish, synced: set[bytes]) -> Any:
        def effect() -> wire.File:
            self.contents.sync(set(self.uploads.files(ask.key[0], args.upload)) - synced)
            upload = self.uploads.find(ask.key[0], args.upload)
            space = self.spaces.of_owner(ask.caller, upload.owner)
            space.require(upload.path, write=True)  # the share may have ended
            old = self.files.find(upload.owner, upload.path)
            require_version(upload.path, old, upload.if_version)
            before = self.contents.bytes_of(upload.owner)
            parts = self.uploads.take(upload, args.size)
            whole = [("writes", f"{args.size} bytes, which came in pieces and are not shown")]
            self._consent_to_pieces(ask, space, upload.path, old, parts, whole)
            return self._add(ask, upload.owner, upload.path, old, args.size, parts, before)

        return self._db.once(ask, effect)

    def _consent_to_pieces(
        self,
        ask: link.Ask,
        space: Namespace,
        path: str,
        old: FileRow | None,
        parts: list[int],
        shown: list[tuple[str, str]],
    ) -> None:
        names = self.contents.names(parts)
        self.consent.to(ask, "sto_write", space, path, old, "overwritten", more=shown, names=names)

    def abort(self, ask: link.Ask, args: wire.StoAbort) -> Any:
        def effect() -> None:
            upload = self.uploads.find(ask.key[0], args.upload)
            self.uploads.drop(upload.id, upload.owner)

        return self._db.once(ask, effect, frees=True)

    # ── figures ───────────────────────────────────────────────────────────────────────────────────────────

    def stats_of(self, ask: link.Ask, args: wire.StoSpace) -> dict[str, Any]:
        space = self._all_of(ask, args.of, "see these figures")
        live, removed = self.files.counted(space.owner)
        found: dict[str, Any] = {
            "files": live,
            "trash": removed,
            "bytes": self.contents.bytes_of(space.owner) if space.owner is not None else 0,
            "quota": self.files.quota,
            "versions": self.files.most_versions,
            "lasting": not space.name.startswith(owners.ALONE),
        }
        if not ask.caller.pid:
            sql = "SELECT o.name, b.bytes FROM file_bytes b JOIN owners o ON o.id = b.owner ORDER BY o.name LIMIT 1000"
            found["spaces"] = {spaces.name_for(ask.caller, name): size for name, size in self._db.rows(sql)}
        return found

    def stats(self) -> dict[str, Any]:
        return {"file_bytes": self.contents.stored(), **self.mounts.stats()}

    # ── owners that end, and work between calls ───────────────────────────────────────────────────────────

    def forget_system(self) -> None:
        """Another system begins: none of the agents of the last one will come back, and no client."""
        with self._db.transaction():
            self.uploads.drop_all()
            self.only_alive(())

    def peer_gone(self, peer: int) -> None:
        """A connection has ended: drop its uploads, and the files of an agent that had no name of its own."""
        with self._db.transaction():
            self.uploads.drop_of_peer(peer)
            if peer > 0:
                self._end(owners.alone(peer))

    def undone(self) -> None:
        """A transaction was lost: undo what was done in memory for it."""
        self.mounts.undone()

    def only_alive(self, pids: Iterable[int]) -> None:
        peers = list(pids)
        alive = {owners.alone(pid) for pid in peers}
        with self._db.transaction():
            self.uploads.only(peers)
            for (name,) in self._db.rows("SELECT name FROM owners WHERE name LIKE ?", owners.ALONE + "%"):
                if name not in alive:
                    self._end(name)

    def _end(self, name: str) -> None:
        self.spaces.forget(name)
        row = self._db.row("SELECT id FROM owners WHERE name = ?", name)
        if row is None:
            return
        (owner,) = row
        self.uploads.drop_of_owner(owner)
        for mount in self.mounts.of_owner(owner):
            self.mounts.remove(owner, mount.at)
        for (file,) in self._db.rows("SELECT id FROM files WHERE owner = ?", owner):
            self.files.destroy(owner, file)
        self._db.do("DELETE FROM file_bytes WHERE owner = ?", owner)

    @property
    def watched(self) -> tuple[int, ...]:
        """Descriptors that are readable when `background` has something to do."""
        try:
            return (self.mounts.fileno(),)
        except OSError as err:
            logger.warning("changes in mounted folders are not noticed: %s", err.strerror)
            return ()

    def background(self) -> float:
        """Do work between calls. Returns the seconds until there is something to do again."""
        try:
            return self._work()
        except OSError as err:  # a full disk, for example
            logger.warning("what is done between calls has to wait: %s", err.strerror)
            return RETRY_S

    def _work(self) -> float:
        self.mounts.take_events()  # always, else the descriptor stays readable
        if self._db.db.in_transaction:
            return 0.0
        if self.contents.clean():
            return 0.0
        self._db.room.look()
        if self._db.room.tight:
            return RETRY_S
        if self.files.index_some():
            return 0.0
        if self._clock() >= self._expire_at:
            self._expire_at = self._clock() + EXPIRE_S
            with self._db.transaction():
                self.uploads.drop_expired(self._clock())
        return min(REST_S, self.mounts.work())


def author(caller: link.Caller) -> str:
    return f"{caller.name}({caller.pid})" if caller.pid else "person"


def require_version(path: str, old: FileRow | None, wanted: int | None) -> None:
    """Check `if_version`. Raises OSError (EAGAIN)."""
    version = 0 if old is None else old.version
    if wanted is not None and wanted != version:
        raise wire.error(errno.EAGAIN, f"{path}: has version {version}, not {wanted}")


def require_no_version(path: str, version: int | None) -> None:
    if version is not None:
        raise wire.error(errno.EINVAL, f"{path}: lies in a mounted folder, and has no versions")
