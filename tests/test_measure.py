"""Samples for budgets: files of workspaces, memory in memfds, and amounts that cannot be measured."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aiosd import procfs, threads
from aiosd.budgets.limits import most_processes
from aiosd.kernel import diskwatch, forks, measure
from aiosd.kernel.budget import Budget
from aiosd.kernel.diskwatch import DiskWatch, held, size_of
from aiosd.kernel.forks import MORE, Forks
from aiosd.kernel.ledger import CPU_US
from aiosd.kernel.measure import Measure
from aiosd.kernel.proc import Proc, ProcTable
from aiosd.procfs import Stat
from aiosd.sandbox.box import Box
from aiosd.timers import Timers
from libaios.wire import Limits
from tests.conftest import eventually

# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_files_count_by_their_blocks_and_once_for_all_their_links(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    empty = size_of(str(tmp_path))
    (tmp_path / "a" / "file").write_bytes(bytes(1 << 20))
    os.link(tmp_path / "a" / "file", tmp_path / "again")
    (tmp_path / "elsewhere").symlink_to("/usr")
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(1 << 40)
    found = size_of(str(tmp_path))
    assert empty is not None
    assert found is not None
    assert 1 << 20 <= found - empty < 2 << 20
    assert size_of(str(tmp_path / "none")) == 0


def test_a_folder_that_cannot_be_read_has_no_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scandir(path: str) -> Any:
        raise PermissionError(13, "no")

    monkeypatch.setattr(diskwatch.os, "scandir", scandir)
    assert size_of(str(tmp_path)) is None


def test_a_deleted_file_counts_for_the_process_that_has_it_open(tmp_path: Path) -> None:
    with open(tmp_path / "file", "wb") as file:
        file.write(bytes(1 << 20))
        file.flush()
        before = held(os.getpid())
        (tmp_path / "file").unlink()
        after = held(os.getpid())
    assert before is not None
    assert after is not None
    assert after - before >= 1 << 20


def test_the_thread_measures_and_ends(tmp_path: Path) -> None:
    watch = DiskWatch()
    watch.ask({str(tmp_path): [os.getpid()]})
    assert eventually(lambda: not watch.busy)
    assert watch.sizes[str(tmp_path)] is not None


def test_a_workspace_that_no_thread_can_measure_is_over_every_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*args: object) -> None:
        raise threads.none_left()

    monkeypatch.setattr(threads, "start", none)
    house = House(Limits(disk_bytes=1 << 20), monkeypatch)
    house.sample()
    assert house.exceeded == []
    house.measure._disk_asked -= measure.DISK_LATE_S + 1
    house.budget.limits = Limits(cpu_s=1.0)  # it ends, and another one comes much later
    house.sample()
    house.budget.limits = Limits(disk_bytes=1 << 20)
    house.sample()
    assert house.exceeded == []
    house.measure._disk_asked -= measure.DISK_LATE_S + 1
    house.sample()
    assert [which for which, _ in house.exceeded] == ["disk"]


# ── memory ────────────────────────────────────────────────────────────────────────────────────────────────


def test_memory_of_a_memfd_is_found_by_its_descriptor() -> None:
    fd = os.memfd_create("test")
    try:
        before = procfs.memfds(os.getpid())
        os.write(fd, bytes(1 << 20))
        after = procfs.memfds(os.getpid())
    finally:
        os.close(fd)
    assert before is not None
    assert after is not None
    assert sum(after.values()) - sum(before.values()) >= 1 << 20


class House:
    """Measures one agent, whose figures the test sets."""

    def __init__(self, limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
        self.budget = Budget(7, limits, sharers={7})
        table = ProcTable(10)
        table.add(Proc(7, 70, 7, 0, "x", "x", "", "", 0.0, 0, budgets=[self.budget]))
        self.exceeded: list[tuple[str, str]] = []
        self.tree = {70: Stat("S", 1, 70, 70, 0.0, 5, 0.0, 10 << 20)}
        everything: Any = SimpleNamespace()
        self.timers = Timers(lambda: 0.0)
        self.measure = Measure(
            table,
            [self.budget],  # type: ignore[arg-type]
            self.timers,
            everything,
            lambda budget, which, why: self.exceeded.append((which, why)),
            SimpleNamespace(look=lambda: iter(()), watches=lambda proc: False),  # type: ignore[arg-type]
            everything,
            "/none",
        )
        monkeypatch.setattr(measure.procfs, "tree", lambda ospid: self.tree)
        monkeypatch.setattr(measure.procfs, "memfds", lambda ospid: {})
        monkeypatch.setattr(measure.procfs, "measured_pss_bytes", lambda ospid: 3 << 20)

    def sample(self) -> None:
        for _ in self.measure._sample_limited():
            pass


def test_shared_memory_counts_in_proportion_where_that_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    house = House(Limits(memory_bytes=20 << 20), monkeypatch)
    house.sample()
    assert house.budget.used("memory") == 10 << 20
    house = House(Limits(memory_bytes=5 << 20), monkeypatch)
    house.sample()
    assert (house.budget.used("memory"), house.exceeded) == (3 << 20, [])
    monkeypatch.setattr(measure.procfs, "memfds", lambda ospid: {(1, ospid): 4 << 20})
    house.sample()
    assert house.exceeded == [("memory", "")]


def test_memory_that_cannot_be_read_is_over_every_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    for unreadable in ("memfds", "measured_pss_bytes"):
        house = House(Limits(memory_bytes=5 << 20), monkeypatch)
        monkeypatch.setattr(measure.procfs, unreadable, lambda ospid: None)
        house.sample()
        assert house.exceeded == [("memory", "memory budget: it cannot be measured (process 70 cannot be read)")]


def test_processes_and_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    house = House(Limits(processes=1, cpu_s=2.0), monkeypatch)
    house.sample()
    assert house.exceeded == []
    house.tree = {70: house.tree[70], 71: Stat("R", 70, 70, 70, 2.5, 6)}
    house.sample()
    assert house.exceeded == [("cpu", ""), ("processes", "")]
    assert house.budget.row[CPU_US] == 2_500_000


def test_the_last_use_of_an_agent_is_counted_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    house = House(Limits(cpu_s=2.0), monkeypatch)
    house.sample()
    house.measure.ended(house.measure._table.procs[7], 0.75)
    assert house.budget.cpu_s == 0.75


def test_without_sampled_budgets_the_kernel_samples_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until an agent with such a budget starts."""
    house = House(Limits(tokens=5), monkeypatch)
    house.sample()
    assert house.timers.until_next() == measure.CALM_S
    other = Proc(8, 80, 8, 0, "x", "x", "", "", 0.0, 0, budgets=[Budget(8, Limits(tokens=5))])
    house.measure.begun(other)
    assert house.timers.until_next() == measure.CALM_S
    other.budgets.append(Budget(8, Limits(cpu_s=1.0)))
    house.measure.begun(other)
    assert house.timers.until_next() == measure.SAMPLE_S


def test_the_nearer_the_end_of_a_budget_the_sooner_the_next_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    house = House(Limits(cpu_s=2.0), monkeypatch)
    house.measure._cores = 4
    waits = []
    for used in (0.0, 1.8, 2.0):
        house.budget.row[CPU_US] = int(used * 1e6)
        waits.append(round(house.measure._wait(house.budget), 3))
    assert waits == [0.1, 0.05, 0.01]


# ── fork bombs ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("uid", "level", "limits", "ended"),
    [
        (1000, "flat", None, True),
        (0, "flat", None, True),
        (0, "cage", None, True),
        (1000, "cage", None, False),  # in a cage Linux counts
        (0, "", None, False),
        (0, "flat", Limits(processes=5000), False),
        (0, "flat", Limits(tokens=5), True),
    ],
)
def test_an_agent_with_too_many_processes_and_no_other_bound_is_ended(
    monkeypatch: pytest.MonkeyPatch, uid: int, level: str, limits: Limits | None, ended: bool
) -> None:
    monkeypatch.setattr(forks.os, "getuid", lambda: uid)
    below = {70: 1, 80: 1}
    monkeypatch.setattr(forks.procfs, "threads_of_machine", lambda: 300 + sum(below.values()))
    monkeypatch.setattr(forks.procfs, "threads_below", lambda ospid, most: below[ospid])
    table = ProcTable(10)
    for pid in (7, 8):
        box = Box(level, "all", "/w") if level else None
        budgets = [Budget(pid, limits, sharers={pid})] if limits else []
        table.add(Proc(pid, pid * 10, pid, 0, "x", "x", "", "", 0.0, 0, box=box, budgets=budgets))
    found: list[int] = []
    watch = Forks(table, lambda proc, why: found.append(proc.pid))
    most = most_processes()
    for more in (0, most - 1, MORE // 2, MORE):  # few, as many as permitted, too many
        assert found == []
        below[70] += more
        list(watch.look())
    assert found == ([7] if ended else [])
