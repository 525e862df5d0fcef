"""Pids are never used twice in one home."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from aiosd.init import pids
from aiosd.init.pids import BLOCK, STRETCH, PidCounter


def test_starts_after_pid_1_and_counts_up(tmp_path: Path) -> None:
    counter = PidCounter(tmp_path / "last-pid", tmp_path)
    assert [counter.next() for _ in range(3)] == [2, 3, 4]


def test_a_crash_skips_numbers_and_repeats_none(tmp_path: Path) -> None:
    seen: set[int] = set()
    for _ in range(5):
        counter = PidCounter(tmp_path / "last-pid", tmp_path)  # a boot that ends without `release`
        new = {counter.next() for _ in range(BLOCK + 3)}
        assert not seen & new
        seen |= new


def test_a_clean_end_returns_the_rest_of_the_block(tmp_path: Path) -> None:
    counter = PidCounter(tmp_path / "last-pid", tmp_path)
    last = [counter.next() for _ in range(3)][-1]
    counter.release()
    assert PidCounter(tmp_path / "last-pid", tmp_path).next() == last + 1


def test_a_full_disk_loses_no_number(tmp_path: Path) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    counter = PidCounter(folder / "last-pid", folder)
    first = counter.next()
    numbers = [counter.next() for _ in range(BLOCK - 1)]
    away = folder.rename(tmp_path / "gone")
    with pytest.raises(OSError, match="No such file"):
        counter.next()
    away.rename(folder)
    assert counter.next() == [first, *numbers][-1] + 1


def give_out(folder: Path, count: int = 3, clean: bool = True) -> int:
    """Assign pids as a boot in this folder does; returns the last one."""
    counter = PidCounter(folder / "last-pid", folder)
    last = [counter.next() for _ in range(count)][-1]
    if clean:
        counter.release()
    return last


@pytest.mark.parametrize("damage", ["", "garbage", "12 clean x 00000000", "\0" * 20])
def test_a_damaged_file_repeats_no_number(tmp_path: Path, damage: str) -> None:
    last = [give_out(tmp_path) for _ in range(2)][-1]
    (tmp_path / "last-pid").write_text(damage)
    assert PidCounter(tmp_path / "last-pid", tmp_path).next() > last


def test_with_both_files_damaged_the_last_pid_comes_from_the_logs(tmp_path: Path) -> None:
    give_out(tmp_path)
    give_out(tmp_path)
    for name in ("last-pid", "last-pid.old", "4711.log", "17.idx"):
        (tmp_path / name).write_text("garbage")
    assert PidCounter(tmp_path / "last-pid", tmp_path).next() > 4711


def test_after_a_power_cut_some_numbers_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest block may then be missing in the file, although its numbers were assigned."""
    last = give_out(tmp_path, clean=False)
    assert last < give_out(tmp_path) <= last + BLOCK + 3  # a crash of aiosd alone
    monkeypatch.setattr(pids, "_boot_id", lambda: "another-boot")
    now = give_out(tmp_path, clean=False)
    assert now < 2 * BLOCK  # the boot before ended in order
    monkeypatch.setattr(pids, "_boot_id", lambda: "a-third-boot")
    assert give_out(tmp_path) > now + STRETCH


def test_the_file_of_an_older_release_is_read(tmp_path: Path) -> None:
    (tmp_path / "last-pid").write_text("512")
    assert PidCounter(tmp_path / "last-pid", tmp_path).next() == 513


def test_nothing_waits_for_the_disk_while_the_system_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = PidCounter(tmp_path / "last-pid", tmp_path)

    def slow(fd: int) -> None:
        raise AssertionError("fsync")

    monkeypatch.setattr(os, "fsync", slow)
    assert len({counter.next() for _ in range(3 * BLOCK)}) == 3 * BLOCK
