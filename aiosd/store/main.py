"""The store's process: opens the database and serves. Only this process imports apsw."""

from __future__ import annotations

import os
from typing import Any

from msgspec import Struct

from aiosd import link, procfs
from aiosd.errors import WorldError
from aiosd.heartbeat import Rounds
from aiosd.service import Server
from libaios.channel import Channel


class StoreSpec(Struct, frozen=True):
    """Settings of the store: its folder; bytes of memory for all, and of notes for each owner."""

    folder: str
    ram: int
    quota: int


def main(channel: Channel, spec: StoreSpec, rounds: Rounds) -> int:
    from pathlib import Path

    from aiosd.store.database import Database
    from aiosd.store.memory import Memory

    try:
        database = Database(Path(spec.folder))
    except (WorldError, OSError) as err:
        channel.send(link.encode(link.LoadFailed(f"the store cannot start: {err}")))
        return 1
    memory = Memory(database, spec.ram, spec.quota)
    if database.begin_system(_boot()):
        memory.only_alive(())

    def stats() -> dict[str, Any]:
        return {**memory.cache.stats(), **database.stats(), "search": "by words"}

    server = Server(channel, memory.handlers(), stats, memory.owner_gone, memory.only_alive)
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
