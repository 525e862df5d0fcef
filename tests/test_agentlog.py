"""Logs of agents: their indexes, how they are cut, and readers that lose nothing when they are."""

from __future__ import annotations

import errno
import os
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiosd.kernel import logkeeper
from aiosd.kernel.logkeeper import LogKeeper, cut_index, rotate
from aiosd.logs import agentlog
from aiosd.logs.agentlog import LogIndex, LogPart, LogReader, read_names, start_of_tail, written_before, written_until

BLOCK = 4096


@pytest.fixture
def log(tmp_path: Path) -> str:
    return str(tmp_path / "7.log")


@pytest.fixture(params=["collapse", "truncate"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with both ways to cut off a log's beginning, whatever the file system supports."""
    if request.param == "truncate":
        monkeypatch.setattr(logkeeper, "_collapse", lambda fd, end: False)
    return str(request.param)


def write(log: str, data: bytes) -> None:
    with open(log, "ab", buffering=0) as file:
        file.write(data)


def numbered(first: int, last: int) -> bytes:
    return b"".join(b"line %06d\n" % n for n in range(first, last))


def read_all(reader: LogReader, size: int = 1000) -> bytes:
    return b"".join(iter(lambda: reader.read(size), b""))


@pytest.fixture
def reader(log: str) -> Iterator[LogReader]:
    write(log, b"")
    made = LogReader(log)
    yield made
    made.close()


# ── the index ─────────────────────────────────────────────────────────────────────────────────────────────


def test_index_has_how_much_was_written_before_a_time(tmp_path: Path) -> None:
    path = tmp_path / "7.idx"
    path.write_bytes(
        b"".join(struct.pack("<dQ", t, size) for t, size in ((10.0, 100), (11.0, 150), (20.0, 900))) + b"half"
    )
    records = agentlog.read_index(str(path)).records
    assert [written_before(records, t, 950) for t in (9, 10.5, 15, 21)] == [None, 100, 150, 900]
    assert [written_until(records, t, 950) for t in (9, 10.5, 15, 21)] == [100, 150, 900, 950]
    assert agentlog.read_index(str(tmp_path / "none.idx")) == (0, [])


def test_a_truncated_log_has_nothing_of_what_was_before() -> None:
    records = [(10.0, 100), (11.0, 200), (12.0, 50), (13.0, 90)]
    assert [written_before(records, t, 95) for t in (9, 10.5, 11.5, 12.5, 14)] == [None, 0, 0, 50, 90]
    assert written_before([(10.0, 100)], 11, 30) == 0  # since the last sample


def test_index_is_cut_with_its_log() -> None:
    index = LogIndex(50, [(1.0, 100), (2.0, 250), (3.0, 400)])
    assert cut_index(index, 0, 200) == (50, [(1.0, 100), (2.0, 200)])
    assert cut_index(index, 200, 300) == (250, [(2.0, 50), (3.0, 100)])
    assert cut_index(index, 300, 1000) == (350, [(3.0, 100)])
    assert cut_index(index, 400, 1000) == (450, [])


def test_a_long_index_becomes_coarser_not_longer(log: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logkeeper, "INDEX_RECORDS", 16)
    logkeeper.write_index(agentlog.index_path(log), LogIndex(5, []))
    for size in range(1, 200):
        logkeeper.note(log, size)
    cut, records = agentlog.read_index(agentlog.index_path(log))
    assert cut == 5
    assert len(records) < 16
    assert records[-1][1] == 199
    assert records == sorted(records)


def test_names() -> None:
    assert agentlog.index_path("/x/7.log") == "/x/7.idx"
    assert agentlog.index_path(agentlog.rotated_path("/x.log/7.log", 2)) == "/x.log/7.idx.2"


# ── the last lines ────────────────────────────────────────────────────────────────────────────────────────


@given(
    st.lists(st.lists(st.sampled_from([b"", b"a", b"bc", b"x" * 70000]), max_size=5), min_size=1, max_size=3),
    st.booleans(),
    st.integers(0, 10),
)
def test_tail_is_the_last_lines(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[bytes]], newline: bool, wanted: int
) -> None:
    folder = tmp_path_factory.mktemp("tail")
    text, parts = b"", []
    for number, lines in enumerate(files):
        data = b"\n".join(lines) + (b"\n" if newline and lines else b"")
        (folder / str(number)).write_bytes(data)
        parts.append(LogPart(str(folder / str(number)), len(text), len(text) + len(data)))
        text += data
    start = start_of_tail(parts, wanted, 0, len(text))
    kept = text.split(b"\n")
    kept = [line + b"\n" for line in kept[:-1]] + [kept[-1]] * bool(kept[-1])
    assert text[start:] == b"".join(kept[max(0, len(kept) - wanted) :])


def test_tail_goes_not_back_beyond_the_start(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one\ntwo\nthree\n")
    whole = [LogPart(str(tmp_path / "a"), 0, 14)]
    assert start_of_tail(whole, 10, 4, 14) == 4
    assert start_of_tail(whole, 1, 4, 14) == 8
    assert start_of_tail(whole, 1, 0, 8) == 4


# ── making room ───────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_cut_off_is_kept_in_order(log: str, way: str) -> None:
    text = b""
    for round_ in range(6):
        data = numbered(round_ * 1000, round_ * 1000 + 1000)
        write(log, data)
        text += data
        rotate(log, 2 * BLOCK, 50)
    reader = LogReader(log)
    assert read_all(reader) == text
    reader.close()
    assert max(path.stat().st_size for path in Path(log).parent.iterdir()) <= 3 * BLOCK
    assert not list(Path(log).parent.glob(f"*{logkeeper.NEW}"))


def test_a_limited_number_of_files_is_kept(log: str, way: str) -> None:
    for _ in range(9):
        write(log, b"x" * 3 * BLOCK)
        rotate(log, 2 * BLOCK, 3)
    files = {path.name for path in Path(log).parent.iterdir() if ".log" in path.name}
    assert files == {"7.log", "7.log.1", "7.log.2", "7.log.3"}


def test_more_than_fits_leaves_the_newest(log: str, way: str) -> None:
    write(log, numbered(0, 10000))
    rotate(log, 2 * BLOCK, 2)
    reader = LogReader(log)
    text = read_all(reader)
    reader.close()
    assert text == numbered(0, 10000)[-len(text) :]
    assert 4 * BLOCK < len(text) <= 6 * BLOCK


def test_the_agent_loses_nothing_while_its_log_is_cut(log: str) -> None:
    """Where the file system can cut off a beginning. The writer's descriptor is as an agent's."""
    write(log, b"x" * 2 * BLOCK)
    with open(log, "r+b") as file:
        if not logkeeper._collapse(file.fileno(), BLOCK):
            pytest.skip("this file system cannot cut off the beginning of a file")
    os.truncate(log, 0)
    reader, over, got = LogReader(log), threading.Event(), bytearray()

    def agent() -> None:
        fd = os.open(log, os.O_WRONLY | os.O_APPEND)
        for n in range(0, 40000, 20):
            os.write(fd, numbered(n, n + 20))
        os.close(fd)
        over.set()

    def follow() -> None:
        ends = time.monotonic() + 20
        while not got.endswith(b"line 039999\n") and time.monotonic() < ends:
            got.extend(reader.read())

    threads = [threading.Thread(target=agent), threading.Thread(target=follow)]
    for thread in threads:
        thread.start()
    while not over.is_set():
        if os.stat(log).st_size > 16 * BLOCK:
            rotate(log, 16 * BLOCK, 100)
    for thread in threads:
        thread.join(30)
    reader.close()
    assert bytes(got) == numbered(0, 40000)
    assert Path(agentlog.rotated_path(log, 1)).exists()


def test_no_room_for_the_copy_leaves_the_log_as_it_is(log: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    write(log, b"x" * 3 * BLOCK)
    monkeypatch.setattr(os, "sendfile", full)
    with pytest.raises(OSError, match="No space"):
        rotate(log, BLOCK, 3)
    assert [path.name for path in Path(log).parent.iterdir()] == ["7.log"]
    assert os.stat(log).st_size == 3 * BLOCK


def test_a_reader_that_is_stopped_does_not_block_the_cut(log: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logkeeper, "LOCK_PATIENCE_S", 0.05)
    write(log, b"x" * 3 * BLOCK)
    reader = LogReader(log)
    with reader._locked():
        rotate(log, BLOCK, 5)
    reader.close()
    assert Path(f"{log}.1").exists()


# ── readers ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_reader_keeps_its_place(log: str, reader: LogReader, way: str) -> None:
    seen = b""
    for round_ in range(12):
        write(log, numbered(round_ * 500, round_ * 500 + 500))
        if round_ % 3 == 1:
            rotate(log, BLOCK, 100)
        seen += reader.read(700)
        if round_ % 5 == 4:
            rotate(log, BLOCK, 100)
    assert seen + read_all(reader) == numbered(0, 6000)


def test_a_reader_that_was_left_behind_goes_on_with_the_oldest(log: str, reader: LogReader, way: str) -> None:
    write(log, numbered(0, 1000))
    rotate(log, BLOCK, 2)
    begun = reader.read(1200)
    assert begun in numbered(0, 1000)
    for round_ in range(1, 5):
        write(log, numbered(round_ * 1000, round_ * 1000 + 1000))
        rotate(log, BLOCK, 2)
    rest = read_all(reader)
    assert numbered(0, 5000).endswith(rest)
    assert begun not in rest
    assert len(rest) >= 2 * BLOCK


def test_a_log_truncated_by_another_process_is_read_from_its_new_beginning(log: str, reader: LogReader) -> None:
    write(log, b"old old old\n")
    assert read_all(reader) == b"old old old\n"
    os.truncate(log, 0)
    assert read_all(reader) == b""
    write(log, b"new\n")
    assert read_all(reader) == b"new\n"


def test_times_are_found_across_files(log: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    for second in range(40):
        now[0] = 1000.0 + second
        write(log, numbered(second * 100, second * 100 + 100))
        logkeeper.note(log, os.stat(log).st_size)
        if second % 10 == 9:
            rotate(log, 2 * BLOCK, 100)
    for since in (0.5, 9.5, 10.5, 25.5, 38.5):
        for until in (None, 1030.0):
            reader = LogReader(log)
            reader.seek(1000 + since, until)
            first = (int(since) + 1) * 100
            last = 4000 if until is None else 3100
            assert read_all(reader) == (numbered(first, last) if first < last else b"")
            reader.close()
    reader = LogReader(log)
    reader.seek(since=1020.5, until=1030.0, tail=3)
    assert read_all(reader) == numbered(3097, 3100)
    reader.close()


# ── the keeper ────────────────────────────────────────────────────────────────────────────────────────────


def test_the_keeper_makes_room_in_the_background(log: str) -> None:
    keeper = LogKeeper(Path(log).parent, 2 * BLOCK, 2, 10)
    for n in range(10):
        write(log, numbered(n * 500, n * 500 + 500))
        keeper.sample(log)
        keeper.wait(30)
    keeper.close(log)
    keeper.wait(30)
    assert sorted(path.name for path in Path(log).parent.glob("*.log*")) == ["7.log", "7.log.1", "7.log.2"]
    assert agentlog.read_index(agentlog.index_path(log)).records[-1][1] == os.stat(log).st_size
    keeper.forget([7], 0)
    keeper.wait(30)
    assert list(Path(log).parent.iterdir()) == []


def test_without_a_limit_nothing_is_cut(log: str) -> None:
    keeper = LogKeeper(Path(log).parent, 0, 2, 10)
    write(log, b"x" * 100 * BLOCK)
    keeper.sample(log)
    keeper.wait(30)
    assert os.stat(log).st_size == 100 * BLOCK


def test_a_log_that_cannot_be_cut_is_reported_once(
    log: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(logkeeper, "rotate", refuse)
    keeper = LogKeeper(Path(log).parent, BLOCK, 2, 10)
    write(log, b"x" * 3 * BLOCK)
    for _ in range(3):
        keeper.sample(log)
        keeper.wait(30)
    assert caplog.text.count("cannot be cut: No space left on device") == 1


def test_logs_of_earlier_boots_are_removed_when_other_agents_end(tmp_path: Path) -> None:
    for pid in (3, 5, 20, 100):
        (tmp_path / f"{pid}.log").touch()
    (tmp_path / "5.log.1").touch()
    keeper = LogKeeper(tmp_path, 0, 1, 4)

    def left() -> list[str]:
        keeper.wait(30)
        return sorted(path.name for path in tmp_path.iterdir())

    keeper.start({100}, 0)
    assert left() == ["100.log", "20.log", "3.log", "5.log", "5.log.1"]
    keeper.forget([], 2)
    assert left() == ["100.log", "20.log", "5.log", "5.log.1"]
    keeper.forget([], 10)
    assert left() == ["100.log"]


def test_names_are_kept_as_long_as_their_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logkeeper, "SPARE_NAMES", 4)
    keeper = LogKeeper(tmp_path, 0, 1, 10)
    keeper.start(set(), 0)
    for pid in range(2, 30):
        keeper.begun(pid, f"agent{pid}")
        keeper.begun(pid, f"agent{pid}")  # a new kernel hears of it again
        if pid > 3:
            keeper.forget([pid - 2], 0)
    keeper.wait(30)
    assert list(read_names(str(tmp_path)).items())[-2:] == [(28, "agent28"), (29, "agent29")]
    assert len((tmp_path / "names").read_text().splitlines()) <= 2 * 2 + 4 + 1
    (tmp_path / "29.log").touch()
    LogKeeper(tmp_path, 0, 1, 10).start(set(), 0)
    assert (tmp_path / "names").read_text() == "29 agent29\n"


def test_lines_that_are_no_names_are_left_out(tmp_path: Path) -> None:
    assert read_names(str(tmp_path)) == {}
    (tmp_path / "names").write_bytes(b"7 planner\n\xff\n8\nx y\n9 caf\xc3\xa9\n10 half")
    assert read_names(str(tmp_path)) == {7: "planner", 9: "caf\u00e9", 10: "half"}


def test_files_that_a_dead_kernel_left_are_removed(tmp_path: Path) -> None:
    for name in ("7.log", "7.idx", "8.idx", "7.log.0.new", "7.idx.new"):
        (tmp_path / name).touch()
    keeper = LogKeeper(tmp_path, 0, 1, 10)
    keeper.start(set(), 0)
    keeper.wait(30)
    assert {path.name for path in tmp_path.iterdir()} == {"7.log", "7.idx"}
