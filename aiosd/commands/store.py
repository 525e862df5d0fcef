"""aiosd fsck, backup, export, import: the store as a whole.

$ aiosd export notes.tar
notes.tar: 2 owners, 1392 notes
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeVar

import click

from aiosd.commands import edge
from aiosd.errors import AiosdError, UsageError
from libaios.client import NoKernel
from libaios.home import Home
from libaios.wire import NoArgs, Sys

if TYPE_CHECKING:
    from aiosd.store.lost import LostOwner

T = TypeVar("T")
STDIO = Path("-")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a write; it names no file


@click.command(
    "fsck", context_settings=edge.SETTINGS, short_help="Check notes and files of agents; --repair saves them."
)
@click.option("--repair", is_flag=True, help="Copy all readable data into a new file. The old one is kept.")
@click.option("--give", nargs=2, metavar="LOST NAME", help="Give notes and files under LOST to agents named NAME.")
def fsck(repair: bool, give: tuple[str, str] | None) -> int:
    """Check the store: each page of its database, each large content. What is damaged is named, and nothing changed;
    the exit code is 1 then. What has lost its owner by damage is listed, too. aiosd must not be running.

    \b
      aiosd fsck
      aiosd fsck --repair               the old file stays beside the new one
      aiosd fsck --give lost/3 planner  to the agents that are named planner
    """
    from aiosd.store import fsck, lost, rebuild
    from aiosd.store.database import FILE

    with _failing(), _closed() as folder:
        if give is not None:
            given = lost.give(folder, *give)
            print(f"{give[0]}: {_held(given)} of {give[1]} now")
            return 0
        found = fsck.check(folder / FILE)
        print("\n".join(found) or f"{folder / FILE}: nothing is damaged")
        if found and repair:
            copied, old = rebuild.repair(folder / FILE)
            print(f"copied into a new file: {_counted(copied)}")
            print(f"the old one is {old}")
        for one in lost.found(folder / FILE):
            print(f"{one.name}: {_held(one)} of an owner that is not known; aiosd fsck --give {one.name} NAME")
    return 1 if found and not repair else 0


@click.command("backup", context_settings=edge.SETTINGS, short_help="Copy notes and files of agents into one file.")
@click.argument("file", type=click.Path(path_type=Path))
def backup(file: Path) -> int:
    """Copy the database of the store and its large contents into FILE (- is stdout), a tar, while aiosd runs or not:
    all as it was at one moment. `aiosd import` reads it back.

    \b
      aiosd backup ~/backups/$(date +%F).tar
      aiosd backup - | ssh host 'cat > backup.tar'
    """
    from aiosd.store import archive

    with _failing(), _readable() as folder:
        _write(file, lambda target: archive.backup(folder, target))
    return 0


@click.command("export", context_settings=edge.SETTINGS, short_help="Write notes and files of agents as JSON lines.")
@click.argument("file", type=click.Path(path_type=Path))
def export(file: Path) -> int:
    """Write what agents keep into FILE (- is stdout), a tar: a file of JSON lines for each table, and the large
    contents. While aiosd runs or not. Of a damaged store what is readable is written, the rest is named, and the exit
    code is 1.

    \b
      aiosd export notes.tar
      tar -xOf notes.tar notes.jsonl | jq .text
    """
    from aiosd.store import archive

    with _failing(), _readable() as folder:
        counts, lost = _write(file, lambda target: archive.export(folder, target))
    print(f"{file}: {_counted(counts)}", file=sys.stderr if file == STDIO else sys.stdout)
    for line in lost:
        edge.complain("aiosd", line)
    return 1 if lost else 0


@click.command("import", context_settings=edge.SETTINGS, short_help="Read an export or a backup.")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path))
@click.option("--replace", is_flag=True, help="Replace the content of the store; the old one is kept beside it.")
def load(file: Path, replace: bool) -> int:
    """Read from FILE (- is stdin) what `aiosd export` or `aiosd backup` wrote. The store must be empty, or --replace be
    given: then its database is kept under another name. aiosd must not be running.

    \b
      aiosd import notes.tar
    """
    from aiosd.init import guardian
    from aiosd.store import archive

    guardian.prepare(Home())
    with _failing(), _closed(must_exist=False) as folder:
        if not replace and (kept := archive.counted(folder)):
            raise edge.CommandFailed(f"the store has {_counted(kept)}; --replace keeps them beside what is imported")
        with _opened(file) as source:
            try:
                counts, old = archive.load(source, folder)
            except UsageError as err:
                raise edge.CommandFailed(f"{file}: {err}") from None
    print(f"{file}: {_counted(counts)}")
    if old is not None:
        print(f"what was there is {old}")
    return 0


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    """The file, or a copy of stdin: reading a tar goes back and forth."""
    if file != STDIO:
        with open(file, "rb") as source:
            yield source
        return
    from shutil import copyfileobj
    from tempfile import TemporaryFile

    with TemporaryFile() as copy:
        copyfileobj(sys.stdin.buffer, copy)
        copy.seek(0)
        yield copy


COMMANDS = (fsck, backup, export, load)


def register(group: click.Group) -> None:
    for command in COMMANDS:
        group.add_command(command)


# ── the store's files ─────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def _failing() -> Iterator[None]:
    try:
        yield
    except AiosdError as err:
        raise edge.CommandFailed(str(err)) from None


@contextlib.contextmanager
def _closed(must_exist: bool = True) -> Iterator[Path]:
    """The folder of the store. No aiosd runs, and none can start meanwhile."""
    from aiosd.store.database import FILE, settle

    home = Home()
    folder = home.data / "store"
    if must_exist and not (folder / FILE).exists():
        raise edge.CommandFailed(f"there is no store in {folder}")
    lock = os.open(home.data / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise edge.CommandFailed(f"aiosd is running in {home.root}; end it first with: aiosd stop") from None
        if (folder / FILE).exists():
            settle(folder / FILE)
        yield folder
    finally:
        os.close(lock)


@contextlib.contextmanager
def _readable() -> Iterator[Path]:
    """A folder with a database that does not change: the store's own, or a snapshot that the running store has made."""
    import shutil

    try:
        client = edge.connect()
    except NoKernel:
        with _closed() as folder:
            yield folder
        return
    with client:
        snapshot = Path(client.call(Sys.STORE_SNAPSHOT, NoArgs(), str))
    try:
        yield snapshot
    finally:
        shutil.rmtree(snapshot, ignore_errors=True)


def _write(file: Path, fill: Callable[[IO[bytes]], T]) -> T:
    """Write a file, or to stdout. A file gets its name when all of it is on the disk. An existing one is not
    overwritten."""
    if file == STDIO:
        return _write_out(fill)
    if file.exists():
        raise edge.CommandFailed(f"{file}: exists already")
    if not file.parent.is_dir():
        raise edge.CommandFailed(f"{file.parent}: there is no such folder")
    part = file.with_name(file.name + ".part")
    try:
        with open(os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w+b") as target:
            result = fill(target)
            target.flush()
            os.fsync(target.fileno())
        os.rename(part, file)
    except BaseException as err:  # of any kind, an interrupt too: undo, and raise it again
        part.unlink(missing_ok=True)
        if isinstance(err, OSError) and err.errno in FULL and err.filename is None:
            raise OSError(err.errno, err.strerror, str(file)) from None
        raise
    return result


def _write_out(fill: Callable[[IO[bytes]], T]) -> T:
    if os.isatty(1):
        raise edge.CommandFailed("a tar is nothing for a terminal; send stdout into a file or a pipe")
    result = fill(sys.stdout.buffer)
    sys.stdout.buffer.flush()
    return result


def _held(one: LostOwner) -> str:
    return _counted({name: number for name, number in (("notes", one.notes), ("files", one.files)) if number})


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {name.removesuffix('s') if n == 1 else name}" for name, n in counts.items()) or "nothing"
