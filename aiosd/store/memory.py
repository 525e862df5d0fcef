"""The memory manager: the notes of agents.

Contract. When a call has returned its effect is on the disk. `add` adds, and with a key replaces the note of that key;
notes are never judged, merged or dropped otherwise. A note is a text with an optional key, tags, metadata, times and a
version, which grows by one with each change; `if_version` refuses a change (EAGAIN) if the note has another version by
now. A note with a `ttl` is not found after that time, and its row is removed within seconds (`clean`). Notes, their
words and the bytes of their owner change in one transaction. Notes of other owners are ENOENT, as if they did not
exist.

Memory holds clean copies of notes that were read or written, under LRU-K: evicting one costs nothing. `quota` limits
the stored bytes of an owner; `ram` limits the bytes in memory, and `owner_ram` those of each owner (0: a quarter).
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import logging
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from aiosd.ipc import link
from aiosd.ipc.service import Followed, Lasting, Pause
from aiosd.store import owners, plainly
from aiosd.store.consent import Consent
from aiosd.store.database import Database
from aiosd.store.lruk import LruK
from aiosd.store.meaning import Meaning
from aiosd.store.noterows import (
    COLUMNS,
    FROM,
    LIVE,
    OVERHEAD,
    enter_labels,
    marks,
    note_of,
    remove_labels,
    union,
    visible,
)
from aiosd.store.promises import Promises
from aiosd.store.remake import Mender
from aiosd.store.search import NoteSearch
from aiosd.store.words import NoteWords
from libaios import wire
from libaios.wire import Note, Sys

logger = logging.getLogger("store")

KEYS = 10_000  # most keys whose notes are found without a query
OWNERS = 10_000  # most owners whose numbers are known without a query
FILL = 0.8  # the part of `ram` that is filled at the start
CLEAN_S = 10.0  # between two checks for notes whose time is over,
CLEAN_AT_ONCE = 100  # … of which at most this number are removed in one transaction
PIECEMEAL = (errno.EIO, errno.ENOSPC)  # errors after which many notes are removed a few at a time


class NoteStore:
    def __init__(
        self,
        database: Database,
        ram: int,
        quota: int,
        clock: Any = time.time,
        meaning: Meaning | None = None,
        owner_ram: int = 0,
    ) -> None:
        self._db, self.quota, self._clock = database, quota, clock
        self.meaning = meaning if meaning is not None else Meaning(database, None, 0)
        self.consent = Consent()
        self.promises = Promises()
        self.words = NoteWords(database, self.meaning)
        self.finder = NoteSearch(database, self.words, self.meaning, clock)
        size, of_owner = (int(one * FILL) for one in (ram, owner_ram or ram // 4))
        self.cache: LruK[tuple[str, Note]] = LruK(size, of_owner)
        self._ids: dict[tuple[str, str], int] = {}  # by owner and key, of notes that may be in the cache
        self._owners: dict[str, int] = {}  # the numbers of owners
        self.mender = Mender(database, self.words.remade)
        database.undone.append(self._undone)

    def handlers(self) -> dict[int, Any]:
        return {
            Sys.MEM_ADD: self.add,
            Sys.MEM_GET: self.get,
            Sys.MEM_UPDATE: self.update,
            Sys.MEM_REMOVE: self.remove,
            Sys.MEM_SEARCH: self.search,
            Sys.MEM_LIST: self.list,
            Sys.MEM_CLEAR: self.clear,
            Sys.MEM_STATS: self.stats_of,
        }

    # ── reading ───────────────────────────────────────────────────────────────────────────────────────────

    def get(self, ask: link.Ask, args: wire.MemGet) -> Any:
        return self._promised(self._held(ask.caller, args.note) or self._find(ask.caller, args.note), args)

    def get_ahead(self, ask: link.Ask, args: wire.MemGet) -> Any:
        """The same for a call that is not made yet, if the note is in memory."""
        note = self._held(ask.caller, args.note, counts=False)
        return None if note is None else self._promised(note, args)

    def _held(self, caller: link.Caller, which: int | str, counts: bool = True) -> Note | None:
        """The note that the caller means, if it is in memory."""
        own = owners.own(caller)
        wanted = which if isinstance(which, int) else self._ids.get((own, which))
        if wanted is None:
            return None
        held = self.cache.get(wanted, own) if counts else self.cache.peek(wanted)
        if held is None or self._over(held[1]):
            return None
        name, note = held
        if wanted != which:
            return note if name == own and note.key == which else None
        return note if name == own or name == owners.group(caller) else None

    def _promised(self, note: Note, args: wire.MemGet) -> Any:
        """The answer with a promise: as long as the note does not change, the same caller gets the same answer. (Not
        for a group's note by key, since the caller may get its own one; nor with a `ttl`, which runs out by itself.)"""
        if self._db.open or note.expires is not None or (note.shared and note.id != args.note):
            return note
        return Lasting(note, self.promises.make(note.id))

    def used(self, counts: dict[int, int]) -> None:
        """Count how often the kernel has given promised notes again, by promise."""
        for note, times in self.promises.of(counts):
            self.cache.again(note, times)

    def search(self, ask: link.Ask, args: wire.MemSearch) -> Any:
        return self.finder.search(ask.caller, args)

    def list(self, ask: link.Ask, args: wire.MemList) -> Any:
        found = {owner: name for name in visible(ask.caller) if (owner := self._known_owner(name)) is not None}
        if not found:
            return []
        try:
            select, values = union(self._db, found, args.filters, self._clock())
            chosen = f"SELECT note FROM ({select}) ORDER BY note DESC LIMIT ? OFFSET ?"
            values += [args.limit, args.offset]
            try:
                return self._listed(chosen, values)
            except OSError as err:
                if not plainly.is_damage(err):
                    raise
            return self._listed_singly([row[0] for row in self._db.rows(chosen, *values)])
        except OSError as err:
            if not plainly.is_damage(err):
                raise
        return self._walked(found, args)

    def _listed(self, chosen: str, values: Sequence[Any]) -> builtins.list[Note]:
        """The notes of these ids. `chosen`: a SELECT or a list of values."""
        sql = f"SELECT {COLUMNS} {FROM} WHERE n.id IN ({chosen}) ORDER BY n.id DESC"
        return [note_of(row) for row in self._db.rows(sql, *values)]

    def _listed_singly(self, ids: Sequence[int]) -> builtins.list[Note]:
        """The same, one by one; notes that cannot be read are marked as damaged."""
        found, lost = plainly.piecemeal(lambda some: self._listed(marks(some), some), ids)
        plainly.report(self._db, "notes", lost)
        return sorted([*found, *map(plainly.lost_note, lost)], key=lambda note: note.id, reverse=True)

    def _walked(self, names: Mapping[int, str], args: wire.MemList) -> Generator[Pause, None, builtins.list[Note]]:
        """The same, read without any index."""
        found: builtins.list[Note] = []
        for notes in plainly.walk(self._db, names, args.filters, self._clock()):
            found += notes
            if len(found) >= args.offset + args.limit:
                break
            yield Pause(0.0)
        return found[args.offset : args.offset + args.limit]

    def stats_of(self, ask: link.Ask, args: wire.MemStats) -> dict[str, Any]:
        name = owners.own(ask.caller)
        if args.owner not in ("", name):
            if ask.caller.pid:
                raise wire.error(errno.EPERM, f"{args.owner!r}: another owner's memory")
            name = args.owner
        owner_id = self._owner_id(name)
        return {
            "notes": self._count(name),
            "bytes": self._stored(name),
            "quota": self.quota,
            **self.cache.stats_of(name),
            "pending": 0 if owner_id is None else self.words.waiting_of(owner_id) + self.meaning.waiting([owner_id]),
            "search": self.meaning.how,
        }

    # ── changing ──────────────────────────────────────────────────────────────────────────────────────────

    def add(self, ask: link.Ask, args: wire.MemAdd) -> Any:
        kept: list[tuple[str, Note]] = []
        name = owners.group(ask.caller) if args.shared else owners.own(ask.caller)

        if args.key is not None:
            self._sweep(name)  # a note whose time is over does not count as an older version

        def effect() -> int:
            old = self._of_key(name, args.key) if args.key is not None else None
            now = self._clock()
            note = Note(
                id=old.id if old is not None else 0,
                text=args.text,
                key=args.key,
                tags=list(args.tags),
                metadata=args.metadata,
                created=old.created if old is not None else now,
                updated=now,
                expires=None if args.ttl_s is None else now + args.ttl_s,
                version=old.version + 1 if old is not None else 1,
                shared=args.shared,
            )
            done = "overwritten" if old is not None else ""
            self.consent.to_note(ask, "mem_add", old, self._author(old), args.shared, done, args)
            note = self._write(name, note, old, ask.caller)
            kept.append((name, note))
            return note.id

        reply = self._in_quota(ask, lambda: self._db.once(ask, effect, bare=True))
        return self._changed(ask, reply, kept, None if args.shared else args.key)

    def update(self, ask: link.Ask, args: wire.MemUpdate) -> Any:
        kept: list[tuple[str, Note]] = []

        def effect() -> int:
            old = self._find(ask.caller, args.note, keep=False)
            if args.if_version is not None and args.if_version != old.version:
                raise wire.error(errno.EAGAIN, f"note {old.id} has version {old.version}, not {args.if_version}")
            self.consent.to_note(ask, "mem_update", old, self._author(old), old.shared, "overwritten", args)
            now = self._clock()
            given = {
                "text": args.text,
                "tags": args.tags,
                "metadata": args.metadata,
                "expires": None if args.ttl_s is None else now + args.ttl_s,
            }
            changes = {field: value for field, value in given.items() if value is not None}
            note = msgspec.structs.replace(old, **changes, updated=now, version=old.version + 1)
            name = owners.group(ask.caller) if old.shared else owners.own(ask.caller)
            kept.append((name, self._write(name, note, old, ask.caller)))
            return note.version

        reply = self._in_quota(ask, lambda: self._db.once(ask, effect))
        return self._changed(ask, reply, kept, args.note)

    def remove(self, ask: link.Ask, args: wire.MemGet) -> Any:
        gone: list[int] = []

        def effect() -> None:
            note = self._find(ask.caller, args.note, keep=False)
            self.consent.to_note(ask, "mem_remove", note, self._author(note), note.shared, "removed")
            gone.append(note.id)
            self._delete([note.id])

        reply = self._db.once(ask, effect, frees=True)
        for note_id in gone:
            self.cache.remove(note_id)
        return reply

    def clear(self, ask: link.Ask, args: wire.NoArgs) -> Any:
        """Remove all of the caller's own notes; those of its group stay."""
        if self._db.room.full:  # one transaction may need more room than there is
            return self._cleared_piecemeal(ask)
        try:
            return self._clear(ask)
        except OSError as err:
            if err.errno not in PIECEMEAL:
                raise
        return self._cleared_piecemeal(ask)

    def _clear(self, ask: link.Ask) -> Any:
        name = owners.own(ask.caller)

        def effect() -> int:
            ids = self._ids_of(name)
            self._delete(ids)
            return len(ids)

        reply = self._db.once(ask, effect, frees=True)
        self.cache.forget_owner(name)
        return reply

    def _cleared_piecemeal(self, ask: link.Ask) -> Generator[Pause, None, Any]:
        """Remove the notes in transactions of their own, as far as possible, because a full disk has no room for one
        transaction, or a page is damaged. If some stay, that is an error."""
        yield Pause(0.0)  # from here on each step has a commit of its own, and a failure harms no other call
        if ask.again and (known := self._db.memos.find(ask)) is not None:
            return msgspec.Raw(known)
        reason: str | None = "the disk of the store is full"
        if not self._db.room.full:
            try:
                return self._clear(ask)  # it was another call that failed
            except OSError as err:
                if err.errno not in PIECEMEAL:
                    raise
                reason = err.strerror
            yield Pause(0.0)
        name = owners.own(ask.caller)
        left = ids = self._ids_of(name)
        for size in (CLEAN_AT_ONCE, 10, 1):
            for begin in range(0, len(left), size):
                with contextlib.suppress(OSError), self._db.transaction():
                    self._delete(left[begin : begin + size])
                yield Pause(0.0)  # the commit, which may fail, too
            there = set(self._ids_of(name))
            left = [note for note in left if note in there]
        self.cache.forget_owner(name)
        if left:
            raise wire.error(errno.EIO, f"{len(ids) - len(left)} notes are removed, {len(left)} are not: {reason}")
        return self._db.once(ask, lambda: len(ids), frees=True)

    def owner_gone(self, pid: int) -> None:
        """An agent has ended: if it had no name of its own, remove its notes."""
        self._end(owners.alone(pid))

    def only_alive(self, pids: Iterable[int]) -> None:
        """The same for all agents but these."""
        alive = {owners.alone(pid) for pid in pids}
        for name in self._all_alone():
            if name not in alive:
                self._end(name)

    def forget_system(self) -> None:
        """Another system begins, whose agents have the same numbers as those of the last one. Notes that a damaged page
        or a full disk keeps from being removed have no owner from now on. Not in a transaction."""
        for name in self._all_alone():
            try:
                self._end(name)
            except OSError as err:
                logger.warning("what %s has left cannot be removed, and has no owner now: %s", name, err.strerror)
                with self._db.transaction():
                    self._db.do("UPDATE owners SET name = ? || id WHERE name = ?", owners.LOST, name)
                self._owners.pop(name, None)

    def _all_alone(self) -> builtins.list[str]:
        return [row[0] for row in self._db.rows("SELECT name FROM owners WHERE name LIKE ?", owners.ALONE + "%")]

    # ── rows ──────────────────────────────────────────────────────────────────────────────────────────────

    def _find(self, caller: link.Caller, note: int | str, keep: bool = True) -> Note:
        """A note that the caller may see; of two with the same key its own. Raises FileNotFoundError."""
        names = visible(caller)
        which = "n.id" if isinstance(note, int) else "n.key"
        sql = f"SELECT {COLUMNS} {FROM} WHERE {which} = ? AND o.name IN (?, ?) AND {LIVE} ORDER BY o.name = ? DESC"
        row = self._db.row(sql, note, *names, self._clock(), names[0])
        if row is None:
            raise wire.error(errno.ENOENT, f"there is no note {note!r}")
        found = note_of(row)
        if keep:
            self._keep(row[9], found)
        return found

    def _of_key(self, name: str, key: str) -> Note | None:
        row = self._db.row(f"SELECT {COLUMNS} {FROM} WHERE o.name = ? AND n.key = ?", name, key)
        return None if row is None else note_of(row)

    def _known_owner(self, name: str) -> int | None:
        known = self._owners.get(name)
        if known is None and (known := self._owner_id(name)) is not None:
            if len(self._owners) >= OWNERS:
                self._owners.clear()
            self._owners[name] = known
        return known

    def _owner_id(self, name: str) -> int | None:
        row = self._db.row("SELECT id FROM owners WHERE name = ?", name)
        return None if row is None else int(row[0])

    def _author(self, note: Note | None) -> str:
        """The owner that wrote a group's note last; "": it is not known."""
        if note is None or not note.shared:
            return ""
        row = self._db.row("SELECT author FROM note_authors WHERE note = ?", note.id)
        return "" if row is None else str(row[0])

    def _write(self, name: str, note: Note, old: Note | None, caller: link.Caller) -> Note:
        """Write the rows of a note. Raises OSError (EDQUOT) before the first change."""
        size = _size(note)
        owner_id = self._charge(name, size - (_size(old) if old is not None else 0))
        tags, metadata = (msgspec.json.encode(part).decode() for part in (note.tags, note.metadata))
        if old is not None:
            self.promises.broken(old.id)
            remove_labels(self._db, old.id)
        how = "INSERT" if old is None else "REPLACE"
        self._db.do(
            f"{how} INTO notes VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            *(note.id or None, owner_id, note.key, note.text, tags, metadata),
            *(note.created, note.updated, note.expires, note.version, size),
        )
        if old is None:
            note = msgspec.structs.replace(note, id=self._db.db.last_insert_rowid())
            self.words.added(note.id, owner_id)
        elif old.text != note.text:
            self.words.changed(note.id, owner_id, old.text)
        enter_labels(self._db, owner_id, note, metadata)
        if note.shared:
            self._db.do("INSERT OR REPLACE INTO note_authors VALUES(?, ?)", note.id, owners.own(caller))
        return note

    def _charge(self, name: str, grown: int) -> int:
        """Count bytes of an owner; returns its number."""
        owner_id = self._known_owner(name)
        if owner_id is not None:
            sql = "UPDATE owners SET note_bytes = note_bytes + ?1 WHERE id = ?2 AND (?1 <= 0 OR note_bytes + ?1 <= ?3)"
            self._db.do(sql, grown, owner_id, self.quota)
            if self._db.db.changes():
                return owner_id
        elif grown <= self.quota:  # its number is not kept in memory yet, because the call may be undone
            self._db.do("INSERT INTO owners(name, note_bytes) VALUES(?, ?)", name, grown)
            return self._db.db.last_insert_rowid()
        raise wire.error(errno.EDQUOT, f"the quota of {self.quota} bytes of notes is used up")

    def _in_quota(self, ask: link.Ask, act: Callable[[], Any]) -> Any:
        """Do it; if the quota is used up, remove notes whose time is over, and do it again."""
        try:
            return act()
        except OSError as err:
            if err.errno != errno.EDQUOT or not sum([self._sweep(name) for name in visible(ask.caller)]):
                raise
        return act()

    def _delete(self, ids: Iterable[int]) -> None:
        for note_id in ids:
            self.promises.broken(note_id)
            row = self._db.row("SELECT owner, text FROM notes WHERE id = ?", note_id)
            if row is not None:
                self.words.gone(note_id, *row)
            remove_labels(self._db, note_id)
            self._db.do(
                "UPDATE owners SET note_bytes = note_bytes - (SELECT bytes FROM notes WHERE id = ?1) "
                "WHERE id = (SELECT owner FROM notes WHERE id = ?1)",
                note_id,
            )
            self._db.do("DELETE FROM note_authors WHERE note = ?", note_id)
            self._db.do("DELETE FROM notes WHERE id = ?", note_id)

    def _sweep(self, name: str) -> int:
        """Remove this owner's notes whose time is over; returns how many."""
        sql = "SELECT id FROM notes WHERE owner = ? AND expires <= ?"
        over = [row[0] for row in self._db.rows(sql, self._known_owner(name), self._clock())]
        if over:
            with self._db.transaction():
                self._delete(over)
        return len(over)

    def clean(self) -> float:
        """Remove notes of all owners whose time is over, some at a time. Returns the number of seconds after which to
        call this again."""
        sql = "SELECT id FROM notes WHERE expires <= ? ORDER BY expires LIMIT ?"
        over = [row[0] for row in self._db.rows(sql, self._clock(), CLEAN_AT_ONCE)]
        if not over:
            return CLEAN_S
        try:
            with self._db.lazily():
                self._delete(over)
        except OSError as err:
            if err.errno != errno.EIO:
                raise
            for note_id in over:  # only notes on a damaged page stay
                with contextlib.suppress(OSError), self._db.lazily():
                    self._delete([note_id])
        for note_id in over:
            self.cache.remove(note_id)
        return 0.0 if len(over) == CLEAN_AT_ONCE else CLEAN_S

    def _end(self, name: str) -> None:
        with self._db.transaction():
            self._delete(self._ids_of(name))
            self._db.do("DELETE FROM owners WHERE name = ?", name)
        self._owners.pop(name, None)
        self.cache.forget_owner(name)

    def _ids_of(self, name: str) -> builtins.list[int]:
        return [row[0] for row in self._db.rows(f"SELECT n.id {FROM} WHERE o.name = ?", name)]

    def _stored(self, name: str) -> int:
        row = self._db.row("SELECT note_bytes FROM owners WHERE name = ?", name)
        return 0 if row is None else int(row[0])

    def _count(self, name: str) -> int:
        """The number of notes, from indexes alone, so that damaged pages of the table do not matter."""
        counts = "SELECT count(*) FROM notes WHERE owner = ?"
        owner = self._owner_id(name)
        over = self._db.rows(f"{counts} AND expires <= ?", owner, self._clock())
        return int(self._db.rows(counts, owner)[0][0] - over[0][0])

    def _undone(self) -> None:
        """A transaction was lost after it had ended: drop what was made in memory from it."""
        self.cache.clear()
        self._owners.clear()
        self.words.recount()

    def _over(self, note: Note) -> bool:
        return note.expires is not None and note.expires <= self._clock()

    def _changed(self, ask: link.Ask, reply: Any, kept: Sequence[tuple[str, Note]], which: int | str | None) -> Any:
        """Give the reply, and update the copies in memory after the commit. `kept`: the changed note with its owner, if
        any. `which`: the name by which the caller is likely to read the note next; None: its id."""
        for name, note in kept:
            self._keep(name, note)
            if ask.ahead and len(note.text) <= link.LARGEST_COPY:
                return Followed(reply, ask, Sys.MEM_GET, wire.MemGet(note.id if which is None else which))
        return reply

    def _keep(self, name: str, note: Note) -> None:
        self.cache.put(note.id, (name, note), _size(note), name)
        if note.key is not None:
            if len(self._ids) >= KEYS:
                self._ids.clear()
            self._ids[name, note.key] = note.id


def _size(note: Note) -> int:
    parts = (note.text, note.key or "", *note.tags)
    size = sum([len(part) if part.isascii() else len(part.encode()) for part in parts])
    return OVERHEAD + size + (len(msgspec.json.encode(note.metadata)) if note.metadata else 2)
