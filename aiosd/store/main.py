"""The store's process: opens the database and serves. Only this process imports apsw."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from aiosd import link, procfs
from aiosd.errors import WorldError
from aiosd.heartbeat import Rounds
from aiosd.service import Server
from libaios.channel import Channel


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

    from aiosd.store.database import Database
    from aiosd.store.memory import Memory
    from aiosd.store.storage import Storage

    try:
        database = Database(Path(spec.folder))
        storage = Storage(database, Path(spec.folder), spec.file_quota, spec.versions, spec.folders)
    except (WorldError, OSError) as err:
        channel.send(link.encode(link.LoadFailed(f"the store cannot start: {err}")))
        return 1
    memory = Memory(database, spec.ram, spec.quota)
    new_system = database.begin_system(_boot())
    storage.begin(new_system)

    def gone(peer: int) -> None:
        storage.owner_gone(peer)  # before the notes: with these goes the owner's row
        memory.owner_gone(peer)

    def keep(peers: Sequence[int]) -> None:
        storage.only_alive(peers)
        memory.only_alive(peers)

    if new_system:
        keep(())

    def stats() -> dict[str, Any]:
        return {**memory.cache.stats(), **database.stats(), **storage.stats(), "search": "by words"}

    handlers = {**memory.handlers(), **storage.handlers()}
    server = Server(channel, handlers, stats, gone, keep, storage.background, storage.watched)
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
