"""Mounted folders: files that are read and found, files that never are, and how changes are noticed."""

from __future__ import annotations

import errno
import os
import select
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aiosd.ipc import link
from aiosd.store import inotify, mounts, realfolder
from aiosd.store.realfolder import RealFolder
from libaios import wire
from libaios.wire import Sys
from tests.test_store_files import ME, OTHER, PERSON, Store, refused

PATIENCE_S = 30.0


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path)
    yield made
    made.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "real"
    (made / "deep" / "er").mkdir(parents=True)
    (made / "a.txt").write_text("first words")
    (made / "deep" / "er" / "b.txt").write_text("second words")
    return made


def settle(store: Store) -> None:
    """Let the store do its work between calls until none is left."""
    end = time.monotonic() + PATIENCE_S
    poll = select.poll()
    poll.register(store.storage.mounts.fileno(), select.POLLIN)
    while time.monotonic() < end:
        wait = store.storage.background()
        if wait > 1.0 and not poll.poll(0):
            return
        poll.poll(wait * 1000)
    pytest.fail("the mounts do not come to rest")


def mount(store: Store, folder: Path, at: str = "docs", write: bool = False, of: str = "agent:me") -> wire.Mount:
    found: wire.Mount = store(Sys.STO_MOUNT, wire.StoMount(str(folder), at, write, of), PERSON)
    settle(store)
    return found


def shown(store: Store) -> wire.Mount:
    (found,) = store(Sys.STO_MOUNTS, wire.StoSpace())
    return found


def test_a_mounted_folder_is_read_listed_and_found(store: Store, folder: Path) -> None:
    store.write("own", b"words")
    mount(store, folder)
    assert store.paths() == ["docs/a.txt", "docs/deep/er/b.txt", "own"]
    assert store.read("docs/deep/er/b.txt") == b"second words"
    assert set(store.found("words")) == {"docs/a.txt", "docs/deep/er/b.txt", "own"}
    assert store(Sys.STO_SEARCH, wire.StoSearch("second"))[0].excerpt == "second words"
    file = store(Sys.STO_STAT, wire.StoPath("docs/a.txt"))
    assert (file.size, file.version, file.mounted) == (11, 0, True)
    found = shown(store)
    assert (found.at, found.folder, found.write, found.files, found.complete) == ("docs", str(folder), False, 2, True)
    refused(errno.ENOENT, lambda: store.read("docs/a.txt", OTHER))
    store(Sys.STO_SHARE, wire.StoShare("docs/deep", "agent:other"))
    assert store.read("docs/deep/er/b.txt", OTHER, of="agent:me") == b"second words"
    assert store.found("words", OTHER) == ["docs/deep/er/b.txt"]


def test_a_small_folder_is_listed_right_after_it_was_mounted(store: Store, folder: Path) -> None:
    store(Sys.STO_MOUNT, wire.StoMount(str(folder), "docs", False, "agent:me"), PERSON)
    assert store.paths() == ["docs/a.txt", "docs/deep/er/b.txt"]


def test_a_list_does_not_wait_long_for_a_large_folder(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounts, "CATCH_UP_S", 0.0)
    for number in range(50):
        (folder / str(number) / "deep").mkdir(parents=True)
        (folder / str(number) / "deep" / "c.txt").write_text("third words")
    store(Sys.STO_MOUNT, wire.StoMount(str(folder), "docs", False, "agent:me"), PERSON)
    assert len(store.paths()) < 52
    settle(store)
    assert len(store.paths()) == 52


def test_changes_are_noticed(store: Store, folder: Path) -> None:
    mount(store, folder)
    (folder / "a.txt").write_text("other text")
    (folder / "new").mkdir()
    (folder / "new" / "c.txt").write_text("third words")
    settle(store)
    assert (store.found("first"), store.found("third")) == ([], ["docs/new/c.txt"])
    assert store.found("other") == ["docs/a.txt"]
    (folder / "new").rename(folder / "moved")
    (folder / "deep" / "er" / "b.txt").unlink()
    settle(store)
    assert store.paths() == ["docs/a.txt", "docs/moved/c.txt"]
    (folder / "moved" / "d.txt").write_text("fourth")
    settle(store)
    assert store.found("fourth") == ["docs/moved/d.txt"], "a folder that was moved is still watched"
    (folder / "moved").rename(folder.parent / "away")
    settle(store)
    (folder.parent / "away" / "d.txt").write_text("fifth")
    settle(store)
    assert (store.paths(), store.found("fifth")) == (["docs/a.txt"], [])


def test_reading_returns_the_present_content(store: Store, folder: Path) -> None:
    """Even before any event was read."""
    mount(store, folder)
    (folder / "a.txt").write_text("0123456789")
    (folder / "late.txt").write_text("x")
    assert store.read("docs/a.txt") == b"0123456789"
    assert store(Sys.STO_STAT, wire.StoPath("docs/a.txt")).size == 10
    assert store(Sys.STO_STAT, wire.StoPath("docs/late.txt")).size == 1
    (folder / "a.txt").unlink()
    refused(errno.ENOENT, lambda: store(Sys.STO_STAT, wire.StoPath("docs/a.txt")))
    refused(errno.ENOENT, lambda: store.read("docs/a.txt"))


def test_after_an_overflow_of_events_the_folder_is_read_again(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount(store, folder)
    watcher = store.storage.mounts._inotify
    assert watcher is not None
    (folder / "a.txt").unlink()
    (folder / "deep" / "new").mkdir()
    (folder / "deep" / "new" / "c.txt").write_text("third")
    watcher.read()  # so the events are lost
    lost = [inotify.InotifyEvent(-1, inotify.Q_OVERFLOW, b"")]
    monkeypatch.setattr(
        inotify.Inotify,
        "read",
        lambda self: lost.pop() and [inotify.InotifyEvent(-1, inotify.Q_OVERFLOW, b"")] if lost else [],
    )
    settle(store)
    assert store.paths() == ["docs/deep/er/b.txt", "docs/deep/new/c.txt"]
    assert store.storage.stats()["mount_rescans"] == 1


def test_after_a_restart_all_folders_are_read(tmp_path: Path, folder: Path) -> None:
    store = Store(tmp_path)
    mount(store, folder)
    store.close()
    (folder / "a.txt").write_text("new text, same file")
    (folder / "deep" / "er" / "b.txt").unlink()
    (folder / "deep" / "er").rmdir()
    again = Store(tmp_path)
    settle(again)
    assert (again.paths(), again.found("first"), again.found("same")) == (["docs/a.txt"], [], ["docs/a.txt"])
    again.close()
    folder.rename(tmp_path / "gone")
    again = Store(tmp_path)
    assert "cannot be opened" in shown(again).note
    refused(errno.ENOENT, lambda: again.read("docs/a.txt"))
    again.close()


def test_links_and_special_files_are_left_out(store: Store, folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    (folder / "link").symlink_to(outside / "secret")
    (folder / "folder").symlink_to(outside)
    (folder / "round").symlink_to(folder)
    os.mkfifo(folder / "pipe")
    mount(store, folder, write=True)
    assert store.paths() == ["docs/a.txt", "docs/deep/er/b.txt"]
    for path in ("docs/link", "docs/folder/secret", "docs/round/a.txt", "docs/pipe", "docs", "docs/deep", "docs/none"):
        refused(errno.ENOENT, lambda path=path: store.read(path))
    assert store.found("secret") == []
    for path in ("docs/link", "docs/folder/secret", "docs/folder/new", "docs/pipe"):
        with pytest.raises(OSError, match="docs"):
            store.write(path, b"!")
    assert (outside / "secret").read_text() == "secret"
    assert os.listdir(outside) == ["secret"]
    (folder / "a.txt").unlink()
    (folder / "a.txt").symlink_to(outside / "secret")  # replaced after it was listed
    refused(errno.ENOENT, lambda: store.read("docs/a.txt"))
    refused(errno.ENOENT, lambda: store(Sys.STO_STAT, wire.StoPath("docs/a.txt")))


def test_aiosds_own_folder_is_in_no_mount(store: Store, tmp_path: Path) -> None:
    for path in (store.folder, store.folder.parent):
        refused(errno.EINVAL, lambda path=path: mount(store, path))
    (tmp_path / "link").symlink_to(store.folder)
    refused(errno.EINVAL, lambda: mount(store, tmp_path / "link"))
    mount(store, tmp_path)  # it lies below this folder
    assert [path for path in store.paths() if path.startswith("docs/data")] == []
    refused(errno.ENOENT, lambda: store.read("docs/data/store/store.db"))


def test_writing_needs_a_grant(store: Store, folder: Path) -> None:
    mount(store, folder)
    refused(errno.EROFS, lambda: store.write("docs/a.txt", b"x"))
    refused(errno.EROFS, lambda: store.write("docs/a.txt", b"x", append=True))
    refused(errno.EROFS, lambda: store(Sys.STO_REMOVE, wire.StoPath("docs/a.txt")))
    store(Sys.STO_UNMOUNT, wire.StoPath("docs"))
    assert store.paths() == []
    assert (folder / "a.txt").read_text() == "first words"
    mount(store, folder, write=True)
    os.chmod(folder / "a.txt", 0o640)
    store.write("docs/a.txt", b"changed")
    assert store.write("docs/deep/new/c.txt", b"made").size == 4
    assert (folder / "a.txt").read_text() == "changed"
    assert (folder / "a.txt").stat().st_mode & 0o777 == 0o640
    assert (folder / "deep" / "new" / "c.txt").read_text() == "made"
    assert store.found("made") == ["docs/deep/new/c.txt"]
    assert sorted(os.listdir(folder)) == ["a.txt", "deep"], "nothing is left beside it"
    for act in (
        lambda: store.write("docs/a.txt", b"x", if_version=0),
        lambda: store.read("docs/a.txt", version=1),
        lambda: store(Sys.STO_ROLLBACK, wire.StoRollback("docs/a.txt", version=1)),
    ):
        assert "mounted" in refused(errno.EINVAL, act)
    refused(errno.EFBIG, lambda: store(Sys.STO_UPLOAD, wire.StoUpload("docs/x")))


def test_appended_bytes_are_in_the_file_once(store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The effect is on the disk before the memo is in the database, so a call may be submitted again without a memo."""
    mount(store, folder, write=True)
    os.chmod(folder / "a.txt", 0o640)
    assert store.write("docs/a.txt", b", and more", append=True).size == 21
    store.database.do("DELETE FROM replies")
    store.database.memos.forget_all()
    assert store(Sys.STO_WRITE, wire.StoWrite("docs/a.txt", b", and more", append=True), again=True).size == 21
    store.write("docs/a.txt", b"!", append=True)
    assert (folder / "a.txt").read_text() == "first words, and more!"
    assert (folder / "a.txt").stat().st_mode & 0o777 == 0o640
    assert store.write("docs/new/log", b"1", append=True).size == 1
    monkeypatch.setattr(realfolder, "MOST_APPENDED", 29)
    refused(errno.EFBIG, lambda: store.write("docs/a.txt", b"too much", append=True))
    os.symlink(folder / "a.txt", folder / "link")
    refused(errno.ENOENT, lambda: store.write("docs/link", b"x", append=True))
    stamps = [realfolder.RealFolder._stamp_of]

    def changed_once(fd: int, name: bytes) -> str:
        if len(stamps) > 1:
            return stamps[0](fd, name)
        stamps.append(stamps[0])
        (folder / "a.txt").write_text("by another")
        return stamps[0](fd, name)

    monkeypatch.setattr(realfolder.RealFolder, "_stamp_of", staticmethod(changed_once))
    store.write("docs/a.txt", b"?", append=True)
    assert (folder / "a.txt").read_text() == "by another?"
    assert sorted(os.listdir(folder)) == ["a.txt", "deep", "link", "new"], "nothing is left beside it"


def test_a_file_is_removed_once(store: Store, folder: Path) -> None:
    mount(store, folder, write=True)
    outside = folder.parent / "outside"
    outside.write_text("secret")
    os.symlink(outside, folder / "link")
    refused(errno.EISDIR, lambda: store(Sys.STO_REMOVE, wire.StoPath("docs/deep")))
    for path in ("docs/link", "docs/none"):
        refused(errno.ENOENT, lambda path=path: store(Sys.STO_REMOVE, wire.StoPath(path)))
    assert store.found("first") == ["docs/a.txt"]
    assert store(Sys.STO_REMOVE, wire.StoPath("docs/a.txt")) == 0
    store.database.do("DELETE FROM replies")
    store.database.memos.forget_all()
    assert store(Sys.STO_REMOVE, wire.StoPath("docs/a.txt"), again=True) == 0
    refused(errno.ENOENT, lambda: store(Sys.STO_REMOVE, wire.StoPath("docs/a.txt")))
    assert (store.found("first"), outside.read_text(), sorted(os.listdir(folder))) == ([], "secret", ["deep", "link"])


def test_removing_a_file_of_a_groups_mount_needs_an_approval(store: Store, folder: Path) -> None:
    mount(store, folder, write=True, of="group:default")
    deeds: list[Any] = []
    store.storage.consent.require = lambda ask, deed: deeds.append(deed)
    store.write("docs/a.txt", b"!", append=True, of="group")
    assert [deed.default for deed in deeds] == []
    store(Sys.STO_REMOVE, wire.StoPath("docs/a.txt", "group"))
    assert ["removed" in deed.default for deed in deeds] == [True]


def test_an_agent_mounts_only_folders_that_a_person_has_named(tmp_path: Path, folder: Path) -> None:
    me = link.Caller(7, os.getuid(), "me", True, "default")
    (tmp_path / "other").mkdir()
    (folder / "out").symlink_to(tmp_path / "other")
    store = Store(tmp_path)
    store.storage.mounts = mounts.Mounts(
        store.database, store.storage.files, store.folder.parent, [str(folder), f"{folder}/deep=write"]
    )

    def act(path: str | Path, write: bool = False, caller: link.Caller = me) -> Any:
        return store(Sys.STO_MOUNT, wire.StoMount(str(path), "m", write), caller)

    for path, write in (
        (tmp_path / "other", False),
        ("/none", False),
        (tmp_path, False),
        (f"{folder}/..", False),
        (f"{folder}2", False),
        (folder / "out", False),
        (folder, True),
    ):
        assert "person" in refused(errno.EPERM, lambda path=path, write=write: act(path, write))
    refused(errno.EPERM, lambda: act(folder, caller=link.Caller(7, os.getuid() + 1, "me", True, "default")))
    refused(errno.EINVAL, lambda: act("relative", caller=PERSON))
    refused(errno.EINVAL, lambda: act("\0/x\0", caller=PERSON))
    refused(errno.ENOTDIR, lambda: act(folder / "a.txt"))
    assert not act(folder).write
    refused(errno.EEXIST, lambda: act(folder / "deep", True))
    assert store(Sys.STO_UNMOUNT, wire.StoPath("m"), me)
    assert act(folder / "deep", True).write
    store.close()


def test_a_mount_and_files_do_not_hide_each_other(store: Store, folder: Path) -> None:
    store.write("a/b", b"")
    for at in ("a", "a/b", "a/b/c"):
        with pytest.raises(OSError, match="a"):
            mount(store, folder, at)
    mount(store, folder, "a/m")
    for at in ("a/m", "a/m/x", "a"):
        refused(errno.EEXIST, lambda at=at: mount(store, folder, at))


def test_names_that_no_path_can_have_are_left_out(store: Store, folder: Path) -> None:
    for name in (b"\xff", b"new\nline", b"\xc2\x85"):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_text("odd")
    (folder / "cafe\u0301").write_text("decomposed")
    mount(store, folder)
    assert store.paths() == ["docs/a.txt", "docs/caf\u00e9", "docs/deep/er/b.txt"]
    assert store.read("docs/caf\u00e9") == store.read("docs/cafe\u0301") == b"decomposed"


def test_bounds_are_reported(store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(10):
        (folder / f"n{number}").write_text("x")
    monkeypatch.setattr(mounts, "MOST_FILES", 5)
    mount(store, folder)
    assert (shown(store).files, "more than 5 files" in shown(store).note) == (5, True)
    store(Sys.STO_UNMOUNT, wire.StoPath("docs"))
    monkeypatch.setattr(mounts, "MOST_FOLDERS", 2)
    mount(store, folder)
    assert "more than 2 folders" in shown(store).note


def test_a_write_is_the_old_file_or_the_new_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = RealFolder(os.fsencode(folder), (0, 0))
    monkeypatch.setattr(os, "rename", lambda *args, **options: (_ for _ in ()).throw(OSError(errno.EIO, "no")))
    refused(errno.EIO, lambda: real.write((b"a.txt",), b"new"))
    assert sorted(os.listdir(folder)) == ["a.txt", "deep"]
    assert (folder / "a.txt").read_text() == "first words"
    real.close()


def test_a_burst_of_events_is_handled_once(store: Store, folder: Path) -> None:
    mount(store, folder)
    looks = store.storage.mounts.counts["mount_looks"]
    for number in range(300):
        (folder / f"n{number}").write_text(f"number{number}")
        (folder / "a.txt").write_text(str(number))
    settle(store)
    assert len(store.paths()) == 302
    assert store.found("number299") == ["docs/n299"]
    assert store.storage.mounts.counts["mount_looks"] - looks < 350
    assert ME.pid
