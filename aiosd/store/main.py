"""The store's process: opens the database and serves. Only this process imports apsw and FAISS."""

from __future__ import annotations

import logging
import os
import signal
import time
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from aiosd import procfs
from aiosd.errors import UsageError, WorldError
from aiosd.ipc import link
from aiosd.ipc.heartbeat import Rounds
from libaios.channel import Channel
from libaios.wire import Sys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from aiosd.store.meaning import Embedder
    from aiosd.store.memory import NoteStore

logger = logging.getLogger("store")

FAILED_S = 5.0  # after a chore that failed
SHARE = 0.1  # part of the time for chores while calls keep coming,
LOOK_S = 0.002  # … and the shortest time between two of them
MOST_WORDLESS = 8192  # texts that may wait for indexing under this limit


class StoreSpec(Struct, frozen=True):
    """Settings of the store: its folder; bytes of memory for copies of notes; for each owner bytes of notes and of
    files; versions that are kept of a file; folders that agents may mount, with `=write` after those that they may
    write to; bytes of memory for vectors. Vectors are made by a `table`, or by the core of `model`, whose file is
    `model_path`; or there are none."""

    folder: str
    ram: int
    quota: int
    file_quota: int
    versions: int
    folders: tuple[str, ...] = ()
    index_ram: int = 256 << 20
    table: str = ""
    model: str = ""
    model_path: str = ""
    home: str | None = None  # of the system, as in AIOS_HOME
    owner_ram: int = 0  # the part of `ram` for each owner; 0: a quarter


class Chores:
    """What the store does between calls: words and vectors for texts that wait for theirs, the removal of notes whose
    time is over, and new indexes in place of damaged ones. While calls keep coming (`busy`) chores get a part of the
    time, unless too many texts wait. A chore that failed is tried again later."""

    def __init__(self, memory: NoteStore, busy: Callable[[], bool]) -> None:
        self._memory, self._busy = memory, busy
        self._clean_at = self._next_at = 0.0
        self._failed: dict[Callable[[], float], float] = {}  # what failed, and when it is tried again

    def __call__(self) -> float:
        """Do some chores. Returns for how many seconds there is nothing to do."""
        now = time.monotonic()
        if now < self._next_at:
            return self._next_at - now
        memory = self._memory
        if now >= self._clean_at:
            self._clean_at = now + self._tried(memory.clean, now)
        wait = min(self._tried(work, now) for work in (memory.mender.work, memory.words.work, memory.meaning.work))
        if self._busy() and memory.words.waiting < MOST_WORDLESS:
            self._next_at = now + max(LOOK_S, (time.monotonic() - now) / SHARE)
        return max(0.0, min(wait, self._clean_at - now))

    def _tried(self, work: Callable[[], float], now: float) -> float:
        """Do one chore. If it fails (because a page is damaged, for example), that does not hold up others."""
        if now < (later := self._failed.get(work, 0.0)):
            return later - now
        try:
            return work()
        except OSError as err:
            logger.warning("%s", err.strerror)
            self._failed[work] = now + FAILED_S
            return FAILED_S


def main(channel: Channel, spec: StoreSpec, rounds: Rounds) -> int:
    from pathlib import Path

    from aiosd.store import snapshots
    from aiosd.store.database import Database
    from aiosd.store.embedders import OfCore
    from aiosd.store.grouping import GroupServer
    from aiosd.store.meaning import Meaning
    from aiosd.store.memory import NoteStore
    from aiosd.store.search import NoteTexts
    from aiosd.store.storage import Storage
    from aiosd.store.ticker import Ticker

    try:
        database = Database(Path(spec.folder))
        embedder = _embedder(spec)
        meaning = Meaning(database, embedder, spec.index_ram)
        storage = Storage(database, Path(spec.folder), spec.file_quota, spec.versions, spec.folders, meaning=meaning)
        meaning.begin(NoteTexts(database), storage.files.words)
    except UsageError as err:
        channel.send(link.encode(link.LoadFailed(str(err))))
        return 1
    except (WorldError, OSError) as err:
        channel.send(link.encode(link.LoadFailed(f"the store cannot start: {err}")))
        return 1
    memory = NoteStore(database, spec.ram, spec.quota, meaning=meaning, owner_ram=spec.owner_ram)
    database.undone += [meaning.forget, storage.undone]
    try:
        if database.begin_system(_boot()):
            try:
                storage.forget_system()
            finally:
                memory.forget_system()
        storage.mounts.open_all()
    except OSError as err:
        logger.warning("what an earlier system has left stays for now: %s", err.strerror)

    def stats() -> dict[str, Any]:
        parts = (memory.cache, database, storage, meaning, memory.words)
        return combined(part.stats() for part in parts)

    def gone(peer: int) -> None:
        with database.transaction():
            database.memos.gone(peer)
            storage.peer_gone(peer)
            if peer > 0:
                memory.owner_gone(peer)  # after the files, because this removes the owner's row, too

    def keep(peers: list[int]) -> None:
        with database.transaction():
            database.memos.only(peers)
            storage.only_alive(peers)
            memory.only_alive(peers)

    def rest() -> None:
        database.rest()
        ticker.now()

    snapshots.sweep(Path(spec.folder))
    handlers = memory.handlers() | storage.handlers()
    handlers[Sys.STORE_SNAPSHOT] = lambda ask, args: snapshots.snapshot(database)
    chores = Chores(memory, lambda: server.busy)
    server = GroupServer(channel, handlers, stats, gone, keep, rest=rest, group=database, background=chores)
    consent = memory.consent = storage.consent
    consent.require, consent.ruled = server.require, lambda call: server.policy.concerns(call, False)
    promises = memory.promises = storage.files.promises
    promises.take_back, server.on_begin, server.on_used = server.take_back, promises.void, memory.used
    server.ahead = {Sys.MEM_GET: memory.get_ahead, Sys.STO_READ: storage.read_at_once}
    ticker = Ticker(server.timers, storage.background)
    for fd in storage.watched:
        server.watch(fd, ticker.now)
    signal.signal(signal.SIGTERM, server.end)
    if isinstance(embedder, OfCore):
        server.watch(embedder.fileno(), embedder.poll)
    try:
        return server.run(rounds)
    finally:
        storage.mounts.close()
        database.close()


def combined(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The figures of all parts. No two may have the same name, because one would hide the other."""
    found: dict[str, Any] = {}
    for part in parts:
        assert not found.keys() & part.keys(), f"two figures are named {found.keys() & part.keys()}"
        found |= part
    return found


def _embedder(spec: StoreSpec) -> Embedder | None:
    """The embedder of the settings, if any. Raises UsageError, WorldError, OSError."""
    from pathlib import Path

    if spec.table:
        from aiosd.store import static

        return static.read(Path(spec.table))
    if spec.model:
        from aiosd.store.embedders import OfCore

        try:
            return OfCore(spec.home, spec.model, spec.model_path)
        except FileNotFoundError:  # the model's core reports the same, whichever is first
            why = "no such file (aiosd models lists what is on this machine)"
            raise UsageError(f"{spec.model}: {spec.model_path}: {why}") from None
    return None


def _boot() -> str:
    """Names the running system: the same for every store that its supervisor starts, different for another system."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    parent = procfs.read_stat(os.getppid())
    return f"{boot} {os.getppid()} {parent.started if parent else 0}"
