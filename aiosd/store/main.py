"""The store's process: opens the database and serves. Only this process imports apsw."""

from __future__ import annotations

import logging
import os
import signal
from typing import Any

from msgspec import Struct

from aiosd import link, procfs
from aiosd.errors import WorldError
from aiosd.heartbeat import Rounds
from libaios.channel import Channel
from libaios.wire import Sys

logger = logging.getLogger("store")


class StoreSpec(Struct, frozen=True):
    """Settings of the store: its folder; bytes of memory for all; for each owner bytes of notes and of files; versions
    that are kept of a file; folders that agents may mount, with `=write` behind those that they may write to."""

    folder: str
    ram: int
    quota: int
    file_quota: int
    versions: int
    folders: tuple[str, ...] = ()


def main(channel: Channel, spec: StoreSpec, rounds: Rounds) -> int:
    from pathlib import Path

    from aiosd.store import archive
    from aiosd.store.database import Database
    from aiosd.store.grouping import GroupServer
    from aiosd.store.memory import Memory
    from aiosd.store.storage import Storage
    from aiosd.store.ticker import Ticker

    try:
        database = Database(Path(spec.folder))
        storage = Storage(database, Path(spec.folder), spec.file_quota, spec.versions, spec.folders)
    except (WorldError, OSError) as err:
        channel.send(link.encode(link.LoadFailed(f"the store cannot start: {err}")))
        return 1
    memory = Memory(database, spec.ram, spec.quota)
    database.undone += [memory.cache.clear, storage.undone]
    try:
        if database.begin_system(_boot()):
            storage.forget_system()
            memory.only_alive(())
        storage.mounts.open_all()
    except OSError as err:
        logger.warning("what an earlier system has left stays for now: %s", err.strerror)

    def stats() -> dict[str, Any]:
        return {**memory.cache.stats(), **database.stats(), **storage.stats(), "search": "by words"}

    def gone(peer: int) -> None:
        with database.transaction():
            database.memos.gone(peer)
            storage.peer_gone(peer)
            if peer > 0:
                memory.owner_gone(peer)  # behind the files: the owner's row goes, too

    def keep(peers: list[int]) -> None:
        with database.transaction():
            database.memos.only(peers)
            storage.only_alive(peers)
            memory.only_alive(peers)

    def rest() -> None:
        database.rest()
        ticker.now()

    archive.sweep_snapshots(Path(spec.folder))
    handlers = memory.handlers() | storage.handlers()
    handlers[Sys.STORE_SNAPSHOT] = lambda ask, args: archive.snapshot(database)
    server = GroupServer(channel, handlers, stats, gone, keep, rest=rest, group=database)
    ticker = Ticker(server.timers, storage.background)
    for fd in storage.watched:
        server.watch(fd, ticker.now)
    signal.signal(signal.SIGTERM, server.end)
    try:
        return server.run(rounds)
    finally:
        storage.mounts.close()
        database.close()


def _boot() -> str:
    """The same for every store of one system, and for none of another: its supervisor."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    parent = procfs.read_stat(os.getppid())
    return f"{boot} {os.getppid()} {parent.started if parent else 0}"
