"""On a full or nearly full disk calls that need more room are refused, and all others work."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from aiosd.store.database import FILE, Database
from aiosd.store.room import WAL_BYTES, DiskReserve
from libaios import wire
from libaios.wire import Sys
from tests.test_store_commit import Store, add, ask


def room_in(folder: Path, **sizes: int) -> DiskReserve:
    return DiskReserve(folder, **({"wal": 1 << 20, "ballast": 1 << 20, "floor": 0} | sizes))


def test_the_wal_has_its_full_size_from_the_start_and_keeps_it(tmp_path: Path) -> None:
    store = Store(tmp_path, room=DiskReserve(tmp_path))
    wal = tmp_path / f"{FILE}-wal"
    assert wal.stat().st_size == WAL_BYTES
    for number in range(30):
        store.turn(*(add(32 * number + call, "x" * 2000) for call in range(1, 33)))
        store.database.rest()
    assert wal.stat().st_size == WAL_BYTES
    store.turn(*(add(10_000 + call, "x" * 500_000) for call in range(1, 25)))  # a commit that is larger than the WAL
    assert wal.stat().st_size > WAL_BYTES
    store.database.rest()
    store.turn(add(20_000, "small"))
    assert wal.stat().st_size <= WAL_BYTES + (1 << 20)
    store.close()
    assert not wal.exists(), "what is closed in order is one file"


def test_below_the_floor_only_growth_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.turn(add(1, "one"), add(2, "two"))
    store.database.room.floor = 1 << 60
    get, remove = ask(3, Sys.MEM_GET, wire.MemGet(1)), ask(4, Sys.MEM_REMOVE, wire.MemGet(2))
    answers = store.turn(add(5, "three"), get, remove)
    assert (answers[0], answers[1]["text"], answers[2]) == (errno.ENOSPC, "one", None)
    store.database.room.floor = 0
    assert store.turn(add(6, "four")) == [3]
    store.close()


def test_the_ballast_is_given_up_on_a_full_disk_and_laid_by_again(tmp_path: Path) -> None:
    database = Database(tmp_path, room_in(tmp_path))
    ballast = tmp_path / "ballast"
    assert ballast.stat().st_size == 1 << 20
    database.room.give_up_ballast()
    assert not ballast.exists()
    database.rest()
    assert ballast.stat().st_size == 1 << 20
    database.room.floor = 1 << 60
    database.room.give_up_ballast()
    database.rest()
    assert not ballast.exists(), "there is no room for it"
    database.close()


@pytest.fixture
def disk() -> Iterator[Path]:
    """A file system of 40 MB."""
    path = Path(f"/tmp/aios-room-{os.getpid()}")
    path.mkdir()
    try:
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", path], capture_output=True).returncode:
            pytest.skip("cannot mount")
        yield path
        subprocess.run(["umount", path], check=True)
    finally:
        path.rmdir()


@pytest.mark.parametrize("checkpoints", [True, False])
def test_on_a_disk_without_a_free_byte_removal_works(disk: Path, checkpoints: bool) -> None:
    """Without the floor, so that SQLite itself finds the disk full. A part of the WAL may not be in the file then."""
    with contextlib.closing(Store(disk, room=room_in(disk, ballast=8 << 20))) as store:
        if not checkpoints:
            store.database.db.wal_autocheckpoint(0)
        meet_a_full_disk(store, disk)


def meet_a_full_disk(store: Store, disk: Path) -> None:
    store.turn(*(add(call, f"{call} " + "x" * 8000) for call in range(1, 201)))
    with open(disk / "filler", "wb", buffering=0) as filler:
        while room_in(disk).free():
            filler.write(bytes(4096))
    big = "y" * 1_000_000
    answers = store.turn(*(add(1000 + call, big) for call in range(1, 13)))
    assert set(answers[-6:]) == {errno.ENOSPC}
    for note in range(1, 151):
        assert store.turn(ask(2000 + note, Sys.MEM_REMOVE, wire.MemGet(note))) == [None]
    assert store.turn(ask(3000, Sys.MEM_GET, wire.MemGet(180)))[0]["text"].startswith("180 ")
    os.unlink(disk / "filler")
    store.database.rest()
    assert (disk / "ballast").exists()
    assert isinstance(store.turn(add(4000, "there is room again"))[0], int)
    assert len(store.texts()) > 50


def test_on_a_full_disk_all_notes_can_be_cleared(disk: Path) -> None:
    """Clearing all at once would need more room than the WAL has."""
    with contextlib.closing(Store(disk, room=(room := room_in(disk, wal=1 << 18, ballast=0)))) as store:
        for begin in range(0, 4000, 200):
            store.turn(
                *(add(begin + one, f"{begin + one} of many", key=f"{one}", settled=begin) for one in range(1, 201))
            )
            store.turn(*(add(begin + one, f"{begin + one} of many", pid=8, settled=begin) for one in range(1, 201)))
        store.database.db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        store.database.db.wal_autocheckpoint(32)  # half of the WAL, as in the store
        room.prepare(store.database.path)
        with open(disk / "filler", "wb", buffering=0) as filler:
            while room.free():
                filler.write(bytes(4096))
        assert store.turn(ask(10_000, Sys.MEM_CLEAR, wire.NoArgs(), 8)) == [4000]
        assert store.database.counts["undone"] > 0, "all at once did not work"
        assert store.turn(ask(10_000, Sys.MEM_CLEAR, wire.NoArgs(), 8, again=True)) == [4000]
        assert len(store.texts()) == 200
