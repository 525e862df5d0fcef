"""Files: their contract, against the storage manager itself; what a real system makes of it is in
test_store_files_system."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Raw, msgpack

from aiosd.commands import sto
from aiosd.ipc import link
from aiosd.ipc.service import Lasting
from aiosd.store import archive, contents, fsck, owners, rebuild, roots
from aiosd.store.database import Database
from aiosd.store.meaning import Meaning
from aiosd.store.remake import remake
from aiosd.store.room import DiskReserve
from aiosd.store.storage import SYNC_AT_ONCE, Storage
from aiosd.store.tables import CONTENTS, content_hash
from libaios import wire
from libaios.wire import PIECE, TABLE, Sys
from tests.test_store_commit import flip, leaf_of
from tests.test_store_meaning import Fake

ME = link.Caller(7, 1000, "me", True, "default")
SCRIPT = link.Caller(8, 1000, "me", False, "default")
OTHER = link.Caller(9, 1000, "other", True, "default")
STRANGER = link.Caller(10, 1000, "me", True, "web")
PERSON = link.Caller(0, 1000, "", False, "default")
LARGE = os.urandom(PIECE + 100_000)


class Store:
    def __init__(self, folder: Path, quota: int = 1 << 30, versions: int = 100, embedder: Any = None) -> None:
        self.now = 1000.0
        self.calls = 0
        self.folder = folder / "data" / "store"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.database = Database(self.folder, DiskReserve(self.folder, wal=0, ballast=0, floor=0))
        meaning = Meaning(self.database, embedder, 1 << 20)
        self.storage = Storage(self.database, self.folder, quota, versions, clock=lambda: self.now, meaning=meaning)
        meaning.begin(self.storage.files.words)
        self.database.undone.append(self.storage.undone)
        if self.database.begin_system("one"):
            self.storage.forget_system()
        self.storage.mounts.open_all()
        self.handlers = self.storage.handlers()

    def __call__(self, sys: Sys, args: Any, caller: link.Caller = ME, again: bool = False) -> Any:
        """Make a call as the service does, with the conversions of kernel and SDK on both sides."""
        self.calls += 0 if again else 1
        self.now += 1.0
        raw = wire.encode(args)
        ask = link.Ask((caller.pid or -1, self.calls), caller, sys, Raw(raw), again)
        reply = self.handlers[sys](ask, wire.decode_args[sys](raw))
        if isinstance(reply, Generator):
            reply = drained(reply)
        if isinstance(reply, Lasting):
            reply = reply.body
        return msgpack.decode(wire.encode(reply), type=TABLE[sys].reply)

    def close(self) -> None:
        self.storage.mounts.close()
        self.database.close()

    # common calls

    def write(self, path: str, data: bytes, caller: link.Caller = ME, **options: Any) -> wire.File:
        return self(Sys.STO_WRITE, wire.StoWrite(path, data, **options), caller)

    def read(self, path: str, caller: link.Caller = ME, version: int | None = None, of: str = "") -> bytes:
        data = b""
        while True:
            part = self(Sys.STO_READ, wire.StoRead(path, of, version, len(data)), caller)
            data += part.data
            if len(data) >= part.size:
                return data

    def paths(self, caller: link.Caller = ME, folder: str = "", of: str = "") -> list[str]:
        return [file.path for file in self(Sys.STO_LIST, wire.StoList(folder, of), caller)]

    def found(self, query: str, caller: link.Caller = ME, **options: Any) -> list[str]:
        return [one.file.path for one in self(Sys.STO_SEARCH, wire.StoSearch(query, **options), caller)]

    def stats(self, caller: link.Caller = ME) -> dict[str, Any]:
        return self(Sys.STO_STATS, wire.StoSpace(), caller)

    def files(self) -> set[str]:
        """Contents that are files of their own, after the cleaning between calls."""
        while self.storage.contents.clean():
            pass
        assert os.listdir(self.folder / "new") == []
        return set(os.listdir(self.folder / "contents"))


def drained(call: Generator[Any, None, Any]) -> Any:
    """The return value of a generator, whose pauses are for other calls."""
    while True:
        try:
            next(call)
        except StopIteration as end:
            return end.value


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path)
    yield made
    made.close()


def refused(code: int, act: Any) -> str:
    with pytest.raises(OSError, match=r".") as caught:
        act()
    assert caught.value.errno == code, caught.value
    return str(caught.value.strerror)


# ── versions ──────────────────────────────────────────────────────────────────────────────────────────────


def test_each_write_is_a_version(store: Store) -> None:
    store.write("a/plan.txt", b"one")
    file = store.write("a/plan.txt", b"two")
    assert (file.path, file.version, file.size, file.by, file.mounted) == ("a/plan.txt", 2, 3, "me(7)", False)
    assert (store.read("a/plan.txt"), store.read("a/plan.txt", version=1)) == (b"two", b"one")
    history = store(Sys.STO_HISTORY, wire.StoHistory("a/plan.txt"))
    assert [(one.number, one.size) for one in history] == [(2, 3), (1, 3)]
    assert store(Sys.STO_STAT, wire.StoPath("a/plan.txt")).version == 2
    assert store(Sys.STO_HISTORY, wire.StoHistory("a/plan.txt", before=2, limit=5))[0].number == 1


@pytest.mark.parametrize("size", [0, 1, contents.SMALL, contents.SMALL + 1, PIECE])
def test_reading_returns_the_written_bytes(store: Store, size: int) -> None:
    data = os.urandom(size)
    store.write("x", data)
    assert store.read("x") == data
    assert len(store.files()) == (size > contents.SMALL)


def test_a_part_is_read(store: Store) -> None:
    store.write("x", b"0123456789")
    assert store(Sys.STO_READ, wire.StoRead("x", offset=3, size=4)) == wire.FileData(b"3456", 10, 1)
    for offset in (10, 11, 1 << 62):
        assert store(Sys.STO_READ, wire.StoRead("x", offset=offset)).data == b""


def test_a_small_file_of_ones_own_is_read_by_one_statement(store: Store) -> None:
    store.write("x", b"one")
    store.write("x", b"two")
    db, seen = store.database.db, []
    db.exec_trace = lambda cursor, sql, values: seen.append(sql) is None
    assert (store.read("x"), store.read("x", version=1)) == (b"two", b"one")
    assert len(seen) == 2
    db.exec_trace = None
    assert db.config(apsw.SQLITE_DBCONFIG_ENABLE_QPSG, -1), "and that is not planned anew each time"
    assert "no version 3" in refused(errno.ENOENT, lambda: store.read("x", version=3))


def test_appending_shares_equal_pieces(store: Store) -> None:
    upload(store, "log", LARGE)
    before, files = store.stats()["bytes"], store.files()
    for number in range(5):
        store.write("log", b"%d\n" % number, append=True)
    assert store.read("log") == LARGE + b"0\n1\n2\n3\n4\n"
    assert store.read("log", version=1) == LARGE
    assert store.stats()["bytes"] - before < 6 * (len(LARGE) - PIECE + 1000), "the first piece is there once"
    assert files < store.files()
    store.write("new", b"n", append=True)
    assert store.read("new") == b"n"


@settings(max_examples=12)
@given(st.lists(st.binary(max_size=300), min_size=1, max_size=6), st.integers(1, 50))
def test_appended_bytes_are_read_back(parts: list[bytes], piece: int) -> None:
    """With small pieces, so that all ways of filling the last one occur."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for module in ("contents", "files", "storage", "uploads"):
            patch.setattr(f"aiosd.store.{module}.PIECE", piece)
        store = Store(Path(folder))
        for number, part in enumerate(parts, 1):
            data = part[: max(1, piece)]
            store.write("x", data, append=True)
            parts[number - 1] = data
        for version in range(1, len(parts) + 1):
            assert store.read("x", version=version) == b"".join(parts[:version])
        store.close()


def test_rollback_to_a_version_and_to_a_time(store: Store) -> None:
    times = [store.write("x", data).updated for data in (b"one", b"two", LARGE[:PIECE])]
    assert store(Sys.STO_ROLLBACK, wire.StoRollback("x", version=1)).version == 4
    assert store.read("x") == b"one"
    for time, data in ((times[1], b"two"), (times[1] + 0.5, b"two"), (times[2], LARGE[:PIECE]), (1e12, LARGE[:PIECE])):
        store(Sys.STO_ROLLBACK, wire.StoRollback("x", time=time))
        assert store.read("x") == data, "the newest that is not later"
    refused(errno.ENOENT, lambda: store(Sys.STO_ROLLBACK, wire.StoRollback("x", time=times[0] - 0.5)))
    refused(errno.ENOENT, lambda: store(Sys.STO_ROLLBACK, wire.StoRollback("x", version=99)))
    refused(errno.EINVAL, lambda: store(Sys.STO_ROLLBACK, wire.StoRollback("x")))
    refused(errno.EINVAL, lambda: store(Sys.STO_ROLLBACK, wire.StoRollback("x", "", 1, 1.0)))
    assert len(store.files()) == 1, "the same content is there once"


def test_the_oldest_version_goes_first(tmp_path: Path) -> None:
    store = Store(tmp_path, versions=3)
    for number in range(5):
        store.write("x", bytes([number]) * (contents.SMALL + 1))
    assert [one.number for one in store(Sys.STO_HISTORY, wire.StoHistory("x"))] == [5, 4, 3]
    refused(errno.ENOENT, lambda: store.read("x", version=2))
    assert len(store.files()) == 3
    store.close()


def test_if_version_refuses_a_lost_update(store: Store) -> None:
    store.write("x", b"1", if_version=0)
    refused(errno.EAGAIN, lambda: store.write("x", b"2", if_version=0))
    store.write("x", b"2", if_version=1)
    refused(errno.EAGAIN, lambda: store.write("x", b"3", if_version=1))
    assert store.read("x") == b"2"


def test_a_file_is_no_folder(store: Store) -> None:
    store.write("a/b", b"")
    refused(errno.EISDIR, lambda: store.write("a", b""))
    refused(errno.EISDIR, lambda: store.read("a"))
    refused(errno.ENOTDIR, lambda: store.write("a/b/c", b""))
    store.write("a.txt", b"")
    store.write("a0", b"")
    assert store.paths(folder="a") == store.paths(folder="a/") == ["a/b"], "and nothing that only begins so"


def test_lists_go_on(store: Store) -> None:
    for number in range(10):
        store.write(f"n{number}", b"")
    seen: list[str] = []
    while page := store(Sys.STO_LIST, wire.StoList(limit=3, after=seen[-1] if seen else "")):
        seen += [file.path for file in page]
    assert seen == [f"n{number}" for number in range(10)]


# ── the trash and the quota ───────────────────────────────────────────────────────────────────────────────


def test_removed_files_lie_in_the_trash_until_a_person_empties_it(store: Store) -> None:
    store.write("x", b"word")
    store.write("x", LARGE[:PIECE])
    number = store(Sys.STO_REMOVE, wire.StoPath("x"))
    refused(errno.ENOENT, lambda: store.read("x"))
    assert store.paths() == store.found("x") == []
    (trashed,) = store(Sys.STO_TRASH, wire.StoTrash())
    assert (trashed.id, trashed.path, trashed.size, trashed.version) == (number, "x", PIECE, 2)
    store.write("x", b"new")
    refused(errno.EEXIST, lambda: store(Sys.STO_RESTORE, wire.StoRestore(number)))
    store(Sys.STO_REMOVE, wire.StoPath("x"))
    assert store(Sys.STO_RESTORE, wire.StoRestore(number)).version == 2
    assert (store.read("x", version=1), store.found("x")) == (b"word", ["x"])
    store(Sys.STO_REMOVE, wire.StoPath("x"))
    assert store(Sys.STO_EMPTY, wire.StoEmpty("agent:me", [number]), PERSON) == 1
    assert store(Sys.STO_EMPTY, wire.StoEmpty("agent:me"), PERSON) == 1
    assert (store.stats()["bytes"], store.files()) == (0, set())
    refused(errno.ENOENT, lambda: store(Sys.STO_RESTORE, wire.StoRestore(number)))


def test_the_quota_counts_all_that_is_kept_and_each_content_once(tmp_path: Path) -> None:
    store = Store(tmp_path, quota=2 * PIECE)
    for path in ("a", "b", "c"):
        store.write(path, LARGE[:PIECE])
    store.write("d", LARGE[:1000])
    said = refused(errno.EDQUOT, lambda: store.write("e", bytes(PIECE)))
    assert "quota" in said
    assert store.paths() == ["a", "b", "c", "d"]
    assert len(store.files()) == 1, "nothing is left of what was refused"
    store.write("e", LARGE[:PIECE], OTHER)
    assert store.stats(OTHER)["bytes"] > PIECE, "others pay for the same content, too"
    for path in ("a", "b", "c"):
        store(Sys.STO_REMOVE, wire.StoPath(path))
    assert "trash" in refused(errno.EDQUOT, lambda: store.write("e", bytes(PIECE)))
    store(Sys.STO_EMPTY, wire.StoEmpty("agent:me"), PERSON)
    store.write("e", bytes(PIECE))
    store.close()


# ── others ────────────────────────────────────────────────────────────────────────────────────────────────


def reading(path: str, of: str) -> list[tuple[Sys, Any]]:
    return [
        (Sys.STO_READ, wire.StoRead(path, of)),
        (Sys.STO_STAT, wire.StoPath(path, of)),
        (Sys.STO_HISTORY, wire.StoHistory(path, of)),
    ]


def changing(path: str, of: str) -> list[tuple[Sys, Any]]:
    return [
        (Sys.STO_WRITE, wire.StoWrite(path, b"!", of)),
        (Sys.STO_ROLLBACK, wire.StoRollback(path, of, 1)),
        (Sys.STO_REMOVE, wire.StoPath(path, of)),
        (Sys.STO_UPLOAD, wire.StoUpload(path, of)),
    ]


def test_others_files_seem_not_to_exist(store: Store) -> None:
    store.write("secret/plan", b"word")
    for caller in (OTHER, STRANGER, SCRIPT):
        of = "agent:default/me"
        for path in ("secret/plan", "not/there", content_hash(b"word").hex()):
            for sys, args in [*reading(path, of), *changing(path, of), (Sys.STO_SHARE, wire.StoShare(path, "group"))]:
                refused(errno.ENOENT, lambda sys=sys, args=args, caller=caller: store(sys, args, caller))
        assert store.paths(caller, of=of) == store.paths(caller, of="agent:default/nobody") == []
        assert store.found("word", caller) == store.found("word", caller, of=of) == []
        for sys, args in (
            (Sys.STO_TRASH, wire.StoTrash(of)),
            (Sys.STO_RESTORE, wire.StoRestore(1, of)),
            (Sys.STO_STATS, wire.StoSpace(of)),
            (Sys.STO_UNSHARE, wire.StoUnshare("secret/plan", "group", of)),
        ):
            refused(errno.EACCES, lambda sys=sys, args=args, caller=caller: store(sys, args, caller))
    assert store.read("secret/plan") == b"word"
    assert store.read("secret/plan", PERSON, of="agent:me") == b"word", "a person may see all"


def test_a_share_for_reading_and_one_for_writing(store: Store) -> None:
    store.write("out/plan", b"word one")
    store.write("out2", b"word two")
    store(Sys.STO_SHARE, wire.StoShare("out", "agent:other"))
    assert store.paths(OTHER, of="agent:me") == store.found("word", OTHER) == ["out/plan"]
    assert store.read("out/plan", OTHER, of="agent:me") == b"word one"
    for sys, args in changing("out/plan", "agent:me"):
        refused(errno.EACCES, lambda sys=sys, args=args: store(sys, args, OTHER))
    refused(errno.ENOENT, lambda: store.read("out2", OTHER, of="agent:me"))
    refused(errno.ENOENT, lambda: store.read("out/plan", STRANGER, of="agent:default/me"))
    refused(errno.EACCES, lambda: store(Sys.STO_SHARE, wire.StoShare("out", "group", of="agent:me"), OTHER))
    store(Sys.STO_SHARE, wire.StoShare("out", "group:web", write=True))
    assert store.write("out/new", b"from web", STRANGER, of="agent:default/me").by == "me(10)"
    assert store.read("out/new") == b"from web"
    assert store.stats(STRANGER)["bytes"] == 0, "the owner of the file pays"
    shares = {(one.path, one.of, one.to, one.write) for one in store(Sys.STO_SHARES, wire.NoArgs())}
    assert shares == {("out", "", "agent:other", False), ("out", "", "group:web", True)}
    assert store(Sys.STO_SHARES, wire.NoArgs(), OTHER)[0] == wire.Share("out", "agent:me", "", False)
    assert store(Sys.STO_UNSHARE, wire.StoUnshare("out", "agent:other"))
    assert not store(Sys.STO_UNSHARE, wire.StoUnshare("out", "agent:other"))
    refused(errno.ENOENT, lambda: store.read("out/plan", OTHER, of="agent:me"))
    refused(errno.ENOENT, lambda: store(Sys.STO_SHARE, wire.StoShare("none", "agent:other")))


def test_a_groups_files_are_all_its_agents(store: Store) -> None:
    store.write("todo", b"word", SCRIPT, of="group")
    assert store.write("todo", b"more word", OTHER, of="group:default").version == 2
    assert store.read("todo", ME, of="group") == b"more word"
    assert store.found("word", ME) == ["todo"]
    refused(errno.ENOENT, lambda: store.read("todo", STRANGER, of="group:default"))


def test_files_without_an_explicit_name_end_with_the_agent(store: Store) -> None:
    for caller in (ME, SCRIPT):
        store.write("x", LARGE[:PIECE], caller)
        store(Sys.STO_UPLOAD, wire.StoUpload("y"), caller)
    store(Sys.STO_SHARE, wire.StoShare("x", "pid:8"))
    assert store.read("x", SCRIPT, of="agent:me") == LARGE[:PIECE]
    for pid in (ME.pid, SCRIPT.pid):
        store.storage.peer_gone(pid)
    assert store.read("x") == LARGE[:PIECE]
    assert store.paths(SCRIPT) == store(Sys.STO_SHARES, wire.NoArgs()) == []
    assert store.database.rows("SELECT * FROM uploads") == []
    store.write("x", b"2", SCRIPT)
    store.storage.only_alive([ME.pid])
    assert store.paths(SCRIPT) == []


# ── search ────────────────────────────────────────────────────────────────────────────────────────────────


def test_search_finds_names_and_words_of_the_newest_version(store: Store) -> None:
    store.write("report.txt", "über the quick brown fox\nand more".encode())
    store.write("quick.bin", b"\0\xff fox")
    (first, second) = store(Sys.STO_SEARCH, wire.StoSearch("quick"))
    assert {first.file.path, second.file.path} == {"quick.bin", "report.txt"}
    assert store(Sys.STO_SEARCH, wire.StoSearch("brown"))[0].excerpt == "über the quick brown fox and more"
    assert store.found("fox") == ["report.txt"], "what is no text has no words"
    store.write("report.txt", b"slow")
    assert store.found("brown") == []
    assert store.found("slow", folder="other") == []
    assert store.found("slow", k=1) == ["report.txt"]


def test_files_are_found_by_what_they_mean(tmp_path: Path) -> None:
    store = Store(tmp_path, embedder=Fake())
    store.write("a", b"the kitten sleeps")
    store.write("b/car", b"\0 no text")
    store.write("b/c", b"tea")
    assert store.found("cat", k=1) == ["a"]
    assert store.found("automobile", k=1) == ["b/car"], "by the words of its path"
    assert store.found("cat", k=1, folder="b") != ["a"], "the folder holds before the limit"
    store.write("a", b"rain")
    assert store.found("cat storm", k=1) == ["a"]
    assert store.found("feline", OTHER) == []
    store(Sys.STO_SHARE, wire.StoShare("b", "agent:other"))
    assert set(store.found("weather", OTHER)) == {"b/c", "b/car"}, "and nothing of what is not shared"
    store(Sys.STO_REMOVE, wire.StoPath("a"))
    assert "a" not in store.found("storm")
    store.close()


TAKEN_BACK: dict[str, Callable[[Store], Any]] = {
    "unshared": lambda store: store(Sys.STO_UNSHARE, wire.StoUnshare("b", "agent:other")),
    "removed": lambda store: store(Sys.STO_REMOVE, wire.StoPath("b/c")),
    "its owner ends": lambda store: store.storage._end(owners.own(ME)),
}


@pytest.mark.parametrize("what", TAKEN_BACK)
def test_files_taken_back_while_a_search_waits_are_not_found(tmp_path: Path, what: str) -> None:
    """The search waits for the embedder, or until the index is loaded."""
    embedder = Fake()
    with contextlib.closing(Store(tmp_path, embedder=embedder)) as store:
        store.write("b/c", b"the kitten sleeps")
        store.write("of the other", b"a kitten", OTHER)
        store(Sys.STO_SHARE, wire.StoShare("b", "agent:other"))
        assert set(store.found("kitten", OTHER)) == {"b/c", "of the other"}
        embedder.late = True
        args = wire.StoSearch("kitten")
        call = store.handlers[Sys.STO_SEARCH](link.Ask((OTHER.pid, 999), OTHER, Sys.STO_SEARCH, Raw(b"")), args)
        next(call)
        TAKEN_BACK[what](store)
        embedder.deliver()
        assert [one.file.path for one in drained(call)] == ["of the other"]


def test_a_damaged_page_of_files_costs_the_files_on_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [f"d{number % 3}/{number:03} " + "n" * 90 for number in range(120)]
    with contextlib.closing(Store(tmp_path)) as store:
        for name in names:
            store.write(name, b"word")
        store.write("mine", b"word", OTHER)
    path = store.database.path
    flip(path, leaf_of(path, "files", 40))
    with contextlib.closing(Store(tmp_path)) as store:
        listed = store(Sys.STO_LIST, wire.StoList())
        assert [file.path for file in listed] == sorted(names)
        lost = [file.path for file in listed if file.damaged]
        assert {sto._row(file) for file in listed if file.damaged} == {("-", "-", "-", "damaged", one) for one in lost}
        assert names[39] in lost
        assert len(lost) < 60
        assert store.paths(folder="d0") == sorted(name for name in names if name.startswith("d0"))
        assert store.stats()["files"] == len(names)
        for name in names:
            if name in lost:
                refused(errno.EIO, lambda name=name: store.read(name))
            else:
                assert store.read(name) == b"word"
        assert set(store.found("word", k=200)) == set(names) - set(lost)
        assert store.paths(OTHER) == store.found("word", OTHER) == ["mine"]
    assert "files cannot be read, and stand in no answer: d" in caplog.text


def test_a_damaged_index_of_words_costs_time_and_no_file(tmp_path: Path) -> None:
    with contextlib.closing(Store(tmp_path)) as store:
        for number in range(20):
            store.write(f"a{number}", b"word")
        store.write("secret", b"word", OTHER)
        store(Sys.STO_SHARE, wire.StoShare("secret", "agent:me"), OTHER)
        store.write("own", b"word", OTHER)
    flip(store.database.path, roots.read(store.database.path).roots["file_words_data"])
    with contextlib.closing(Store(tmp_path)) as store:
        assert set(store.found("WÖRD", k=50)) == {f"a{number}" for number in range(20)} | {"secret"}
        assert store.found("a7") == ["a7"]
        assert set(store.found("word", OTHER)) == {"secret", "own"}
        assert store.found("word", folder="a") == store.found("word", STRANGER) == []


@pytest.mark.parametrize(
    "name", ["live_files", "sqlite_autoindex_versions_1", "content_users", "doomed", "file_words_data", "unindexed"]
)
def test_tables_made_from_rows_of_files_are_made_again(tmp_path: Path, name: str) -> None:
    names = [f"d/{number}" for number in range(20)]
    with contextlib.closing(Store(tmp_path)) as store:
        for one in names:
            store.write(one, b"word")
    flip(store.database.path, roots.read(store.database.path).roots[name])
    with contextlib.closing(Store(tmp_path)) as store:
        assert len(remake(store.database)) == 1
        while store.storage.files.index_some():
            pass
        assert store.write(names[0], b"other").version == 2
        store(Sys.STO_REMOVE, wire.StoPath(names[1]))
        assert store.read(names[0], version=1) == b"word"
        assert store.paths() == sorted(names[:1] + names[2:])
        assert set(store.found("word", k=50)) == set(names[2:])
        assert store.found("other") == names[:1]


def test_a_follower_gets_a_message_in_the_same_transaction(store: Store) -> None:
    told: list[tuple[Any, ...]] = []

    class Follower:
        def changed(self, *what: int) -> None:
            told.append(("changed", *what))

        def gone(self, *what: int) -> None:
            told.append(("gone", *what))

    words = store.storage.files.words
    words.followers.append(Follower())
    store.write("x", b"text")
    ((file, owner),) = store.database.rows(words.everything)
    assert words.texts([file, 99]) == [(file, "x\ntext")]
    store(Sys.STO_REMOVE, wire.StoPath("x"))
    assert told == [("changed", 1, file, owner), ("gone", 1, file, owner)]


@settings(max_examples=25)
@given(st.text() | st.sampled_from(["own:own1 OR text:the", "NEAR(a b)", '"', "a* ^b", "{owner}:x", "-", "_", "²"]))
def test_a_query_is_words_and_nothing_else(tmp_path_factory: pytest.TempPathFactory, query: str) -> None:
    store = Store(tmp_path_factory.mktemp("s"))
    store.write("the own1 OR text a b x", b"the own1 OR text a b x", OTHER)
    store.found(query, OTHER)
    assert store.found(query) == []
    store.close()


# ── pieces ────────────────────────────────────────────────────────────────────────────────────────────────


def upload(store: Store, path: str, data: bytes, caller: link.Caller = ME) -> wire.File:
    number = store(Sys.STO_UPLOAD, wire.StoUpload(path), caller)
    for offset in reversed(range(0, len(data), PIECE)):  # in any order
        store(Sys.STO_PIECE, wire.StoPiece(number, offset, data[offset : offset + PIECE]), caller)
    return store(Sys.STO_FINISH, wire.StoFinish(number, len(data)), caller)


def test_a_file_in_pieces(store: Store) -> None:
    file = upload(store, "large", LARGE)
    assert (file.size, file.version, store.read("large")) == (len(LARGE), 1, LARGE)
    assert upload(store, "empty", b"").size == 0
    before = store.stats()["bytes"]
    upload(store, "large", LARGE)
    assert store.stats()["bytes"] - before < 1000, "the same bytes again are the same contents"


def test_a_piece_may_come_again_and_replace_another(store: Store) -> None:
    number = store(Sys.STO_UPLOAD, wire.StoUpload("x"))
    for data in (b"1" * PIECE, b"2" * PIECE, b"2" * PIECE):
        store(Sys.STO_PIECE, wire.StoPiece(number, 0, data))
    store(Sys.STO_PIECE, wire.StoPiece(number, PIECE, b"3"))
    assert store.paths() == [], "nothing is seen of it before the end"
    refused(errno.EINVAL, lambda: store(Sys.STO_FINISH, wire.StoFinish(number, PIECE)))
    store(Sys.STO_FINISH, wire.StoFinish(number, PIECE + 1))
    assert store.read("x") == b"2" * PIECE + b"3"
    assert len(store.files()) == 1
    refused(errno.ENOENT, lambda: store(Sys.STO_FINISH, wire.StoFinish(number, PIECE + 1)))


def test_pieces_wait_for_the_disk_when_the_file_is_finished(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or when another call that is answered then stores the same bytes."""
    synced: set[str] = set()
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.add(Path(os.readlink(f"/proc/self/fd/{fd}")).name) or fsync(fd))
    pieces = [os.urandom(PIECE) for _ in range(SYNC_AT_ONCE + 2)]
    names = [content_hash(piece).hex() for piece in pieces]
    number = store(Sys.STO_UPLOAD, wire.StoUpload("large"))
    for place, piece in enumerate(pieces):
        store(Sys.STO_PIECE, wire.StoPiece(number, place * PIECE, piece))
    assert not synced & set(names)
    store(Sys.STO_WRITE, wire.StoWrite("another", pieces[3]), OTHER)
    assert synced & set(names) == {names[3]}
    assert CONTENTS in synced
    assert store(Sys.STO_FINISH, wire.StoFinish(number, len(pieces) * PIECE)).size == len(pieces) * PIECE
    assert synced >= set(names)


def test_bad_pieces_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path, quota=2 * PIECE)
    number = store(Sys.STO_UPLOAD, wire.StoUpload("x"))
    for offset, data in ((1, b"x"), (0, b""), (PIECE << 33, b"x")):
        refused(
            errno.EINVAL, lambda offset=offset, data=data: store(Sys.STO_PIECE, wire.StoPiece(number, offset, data))
        )
    refused(errno.ENOENT, lambda: store(Sys.STO_PIECE, wire.StoPiece(number, 0, b"x"), OTHER))
    refused(errno.ENOENT, lambda: store(Sys.STO_PIECE, wire.StoPiece(number + 1, 0, b"x")))
    store(Sys.STO_PIECE, wire.StoPiece(number, 2 * PIECE, b"x"))
    refused(errno.EINVAL, lambda: store(Sys.STO_FINISH, wire.StoFinish(number, 2 * PIECE + 1)))
    store(Sys.STO_PIECE, wire.StoPiece(number, 0, bytes(PIECE)))
    refused(errno.EDQUOT, lambda: store(Sys.STO_PIECE, wire.StoPiece(number, PIECE, b"1" * PIECE)))
    store(Sys.STO_ABORT, wire.StoAbort(number))
    assert (store.stats()["bytes"], store.files()) == (0, set())
    for _ in range(64):
        store(Sys.STO_UPLOAD, wire.StoUpload("x"))
    refused(errno.EAGAIN, lambda: store(Sys.STO_UPLOAD, wire.StoUpload("x")))
    store.now += 2 * 86400
    store.storage.background()
    assert store.database.rows("SELECT * FROM uploads") == [], "given up after a day"
    store.close()


def test_an_upload_is_refused_when_its_share_has_ended(store: Store) -> None:
    store.write("out/x", b"")
    store(Sys.STO_SHARE, wire.StoShare("out", "agent:other", write=True))
    number = store(Sys.STO_UPLOAD, wire.StoUpload("out/x", "agent:me"), OTHER)
    store(Sys.STO_UNSHARE, wire.StoUnshare("out", "agent:other"))
    refused(errno.ENOENT, lambda: store(Sys.STO_FINISH, wire.StoFinish(number, 0), OTHER))


# ── deaths and disks ──────────────────────────────────────────────────────────────────────────────────────


def test_a_call_that_is_submitted_again_takes_effect_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    append = wire.StoWrite("x", b"line\n", append=True)
    first = store(Sys.STO_WRITE, append)
    store.close()
    again = Store(tmp_path)
    again.calls = 1
    assert again(Sys.STO_WRITE, append, again=True) == first
    assert again.read("x") == b"line\n"
    again.close()


def test_a_file_without_a_commit_is_removed(tmp_path: Path) -> None:
    """The transaction is lost after its file was written, in this process, and in one that dies."""
    store = Store(tmp_path)
    store.write("kept", b"k" * PIECE)

    def lose() -> None:
        store.database.begin()
        store.write("lost", b"l" * PIECE)
        assert len(os.listdir(store.folder / "contents")) == 2
        assert store.storage.contents.clean(), "not within a transaction"
        store.database._lost = OSError(errno.EIO, "lost")
        refused(errno.EIO, store.database.commit)

    lose()
    assert len(store.files()) == 1
    lose()
    store.close()  # before anything was cleaned
    (store.folder / "contents" / ("0" * 64)).touch()  # not of this store: it may be the only copy of something
    again = Store(tmp_path)
    assert again.files() == {content_hash(b"k" * PIECE).hex(), "0" * 64}
    assert again.write("lost", b"l" * PIECE).version == 1
    assert again.read("lost") == b"l" * PIECE
    again.close()


def test_a_content_that_is_dropped_and_written_again_stays(store: Store) -> None:
    store.write("x", LARGE[:PIECE])
    number = store(Sys.STO_REMOVE, wire.StoPath("x"))
    store(Sys.STO_EMPTY, wire.StoEmpty("agent:me", [number]), PERSON)
    store.write("y", LARGE[:PIECE])  # before its file was removed
    assert len(store.files()) == 1
    assert store.read("y") == LARGE[:PIECE]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "link"])
def test_bytes_that_the_disk_has_changed_are_an_error_for_that_file_only(store: Store, damage: str) -> None:
    upload(store, "hit", LARGE)
    store.write("whole", b"w" * PIECE)
    path = store.folder / "contents" / content_hash(LARGE[:PIECE]).hex()
    raw = bytearray(path.read_bytes())
    path.unlink()
    raw[1000] ^= 1
    if damage == "flip":
        path.write_bytes(raw)
    elif damage == "cut":
        path.write_bytes(raw[:-1])
    elif damage == "link":
        path.symlink_to("/etc/passwd")
    assert "on the disk" in refused(errno.EIO, lambda: store.read("hit"))
    assert store.read("whole") == b"w" * PIECE
    store.write("hit", b"new")
    assert store.read("hit") == b"new"
    refused(errno.EIO, lambda: store.read("hit", version=1))


def filled(folder: Path) -> Path:
    """Make a store with files of all kinds, and close it. Returns its folder."""
    store = Store(folder)
    upload(store, "large", LARGE)
    store.write("deep/small", b"some words")
    store.write("deep/small", b"other words")
    store.write("gone", LARGE[:PIECE])
    store(Sys.STO_REMOVE, wire.StoPath("gone"))
    store(Sys.STO_SHARE, wire.StoShare("deep", "agent:other"))
    (folder / "real").mkdir()
    (folder / "real" / "r.txt").write_text("real")
    store(Sys.STO_MOUNT, wire.StoMount(str(folder / "real"), "docs", of="agent:me"), PERSON)
    store.close()
    return store.folder


def is_whole(folder: Path, bytes_before: int) -> None:
    """Check that all content of `filled` exists and is counted."""
    store = Store(folder)
    while store.storage.background() < 1.0:
        pass
    assert store.read("large") == LARGE
    assert store.read("deep/small", OTHER, of="agent:me") == b"other words"
    assert store.read("deep/small", version=1) == b"some words"
    assert (store.found("other"), store.found("small")) == (["deep/small"], ["deep/small"])
    assert store.paths() == ["deep/small", "docs/r.txt", "large"]
    assert store.stats()["bytes"] == bytes_before
    (trashed,) = store(Sys.STO_TRASH, wire.StoTrash())
    store(Sys.STO_RESTORE, wire.StoRestore(trashed.id))
    assert store.read("gone") == LARGE[:PIECE]
    for path in ("gone", "large"):
        store(Sys.STO_REMOVE, wire.StoPath(path))
    store(Sys.STO_EMPTY, wire.StoEmpty("agent:me"), PERSON)
    assert store.files() == set()
    store.close()


def bytes_of(folder: Path) -> int:
    store = Store(folder)
    found = store.stats()["bytes"]
    store.close()
    return int(found)


@pytest.mark.parametrize("write", [archive.export, archive.backup])
def test_an_export_and_a_backup_include_files(tmp_path: Path, write: Any) -> None:
    (tmp_path / "old").mkdir()
    folder = filled(tmp_path / "old")
    before = bytes_of(tmp_path / "old")
    with tempfile.TemporaryFile() as tar:
        write(folder, tar)
        tar.seek(0)
        archive.load(tar, tmp_path / "new" / "data" / "store")
    is_whole(tmp_path / "new", before)


def test_a_repair_counts_again(tmp_path: Path) -> None:
    folder = filled(tmp_path)
    before = bytes_of(tmp_path)
    assert fsck.check(folder / "store.db") == []
    rebuild.repair(folder / "store.db")
    is_whole(tmp_path, before)


def test_fsck_names_a_content_that_is_missing(tmp_path: Path) -> None:
    folder = filled(tmp_path)
    name = content_hash(LARGE[:PIECE]).hex()
    (folder / "contents" / name).unlink()
    assert fsck.check(folder / "store.db") == [f"contents 2: content {name} is missing"]


def test_uploads_of_an_earlier_system_are_dropped(tmp_path: Path) -> None:
    store = Store(tmp_path)
    number = store(Sys.STO_UPLOAD, wire.StoUpload("x"))
    store(Sys.STO_PIECE, wire.StoPiece(number, 0, bytes(PIECE)))
    store.storage.forget_system()
    assert (store.database.rows("SELECT * FROM uploads"), store.files(), store.stats()["bytes"]) == ([], set(), 0)
    store.close()


# ── paths ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "path",
    ["..", "a/../b", ".", "a/./b", "/a", "a/", "a//b", "/", "\0", "a\nb", "a\x7f", "a\u0085b", "a\u2028b", "a\x1b[31m"],
)
def test_invalid_paths_are_refused(store: Store, path: str) -> None:
    for sys, args in [*reading(path, ""), *changing(path, ""), (Sys.STO_MOUNT, wire.StoMount("/tmp", path))]:
        assert refused(errno.EINVAL, lambda sys=sys, args=args: store(sys, args, PERSON))
    assert store.paths(PERSON) == []


def test_paths_have_bounds(store: Store) -> None:
    store.write("n" * 255, b"")
    refused(errno.ENAMETOOLONG, lambda: store.write("n" * 256, b""))
    refused(errno.ENAMETOOLONG, lambda: store.write("ü" * 128, b""))
    refused(errno.ENAMETOOLONG, lambda: store.write("/".join(["ü" * 100] * 6), b""))


def test_a_name_in_nfc_and_in_nfd_is_one_file(store: Store) -> None:
    store.write("caf\u00e9/\u00fc", b"1")
    assert store.write("cafe\u0301/u\u0308", b"2").version == 2
    assert store.read("caf\u00e9/u\u0308") == b"2"
    assert store.paths(folder="cafe\u0301") == ["caf\u00e9/\u00fc"]


@pytest.mark.parametrize(
    "of", ["me", "agent:", "agent:a/b/c", "agent:..", "pid:0", "pid:-1", "pid:x", "group:", ":", "\0"]
)
def test_invalid_spaces_are_refused(store: Store, of: str) -> None:
    refused(errno.EINVAL, lambda: store.read("x", of=of))


@settings(max_examples=25)
@given(st.text(min_size=1, max_size=30), st.text(max_size=30))
def test_any_text_is_a_path_or_a_sentence(tmp_path_factory: pytest.TempPathFactory, path: str, of: str) -> None:
    store = Store(tmp_path_factory.mktemp("s"))
    for sys, args in [*changing(path, of), *reading(path, of)]:
        said: OSError | None = None
        try:
            store(sys, args)
        except OSError as err:
            said = err
        assert said is None or said.errno in (errno.EINVAL, errno.ENOENT, errno.ENAMETOOLONG, errno.EISDIR)
        assert said is None or said.strerror
    store.close()
