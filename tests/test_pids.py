"""Pids are never used twice in one home."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiosd.init.pids import BLOCK, PidCounter


def test_starts_after_pid_1_and_counts_up(tmp_path: Path) -> None:
    pids = PidCounter(tmp_path / "last-pid")
    assert [pids.next() for _ in range(3)] == [2, 3, 4]


def test_a_crash_wastes_numbers_and_repeats_none(tmp_path: Path) -> None:
    seen: set[int] = set()
    for _ in range(5):
        pids = PidCounter(tmp_path / "last-pid")  # a boot that ends without `release`
        new = {pids.next() for _ in range(BLOCK + 3)}
        assert not seen & new
        seen |= new


def test_a_clean_end_gives_the_rest_of_the_block_back(tmp_path: Path) -> None:
    pids = PidCounter(tmp_path / "last-pid")
    last = [pids.next() for _ in range(3)][-1]
    pids.release()
    assert PidCounter(tmp_path / "last-pid").next() == last + 1


def test_a_full_disk_loses_no_number(tmp_path: Path) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    pids = PidCounter(folder / "last-pid")
    first = pids.next()
    numbers = [pids.next() for _ in range(BLOCK - 1)]
    away = folder.rename(tmp_path / "gone")
    with pytest.raises(OSError, match="No such file"):
        pids.next()
    away.rename(folder)
    assert pids.next() == [first, *numbers][-1] + 1


def test_a_damaged_file_is_not_fatal(tmp_path: Path) -> None:
    (tmp_path / "last-pid").write_text("garbage")
    assert PidCounter(tmp_path / "last-pid").next() == 2
