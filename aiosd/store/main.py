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
    """Settings of the store: its folder; bytes of memory for all, and of notes for each owner."""

    folder: str
    ram: int
    quota: int


def main(channel: Channel, spec: StoreSpec, rounds: Rounds) -> int:
    from pathlib import Path

    from aiosd.store import archive
    from aiosd.store.database import Database
    from aiosd.store.grouping import GroupServer
    from aiosd.store.memory import Memory

    try:
        database = Database(Path(spec.folder))
    except (WorldError, OSError) as err:
        channel.send(link.encode(link.LoadFailed(f"the store cannot start: {err}")))
        return 1
    memory = Memory(database, spec.ram, spec.quota)
    database.undone.append(memory.cache.clear)
    try:
        if database.begin_system(_boot()):
            memory.only_alive(())
    except OSError as err:
        logger.warning("what an earlier system has left stays for now: %s", err.strerror)

    def stats() -> dict[str, Any]:
        return {**memory.cache.stats(), **database.stats(), "search": "by words"}

    def gone(peer: int) -> None:
        with database.transaction():
            database.memos.gone(peer)
            if peer > 0:
                memory.owner_gone(peer)

    def keep(peers: list[int]) -> None:
        with database.transaction():
            database.memos.only(peers)
            memory.only_alive(peers)

    archive.sweep_snapshots(Path(spec.folder))
    handlers = {**memory.handlers(), Sys.STORE_SNAPSHOT: lambda ask, args: archive.snapshot(database)}
    server = GroupServer(channel, handlers, stats, gone, keep, rest=database.rest, group=database)
    signal.signal(signal.SIGTERM, server.end)
    try:
        return server.run(rounds)
    finally:
        database.close()


def _boot() -> str:
    """The same for every store of one system, and for none of another: its supervisor."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    parent = procfs.read_stat(os.getppid())
    return f"{boot} {os.getppid()} {parent.started if parent else 0}"
