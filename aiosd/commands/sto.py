"""aios-sto: agents' files in the store, for a person.

$ aios-sto ls --of agent:planner
VERSION  SIZE CHANGED          BY         PATH
      3  1.2K 2026-11-28 06:41 planner(7) notes/plan.txt
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from aiosd.commands import edge
from aiosd.units import format_size
from libaios import sto
from libaios.wire import File

EXAMPLES = """
  aios-sto ls --of agent:planner                 the files of agent planner
  aios-sto cat notes/plan.txt --of agent:planner
  aios-sto put report.pdf in/report.pdf --of group
  aios-sto history notes/plan.txt --of agent:planner
  aios-sto rollback notes/plan.txt 2 --of agent:planner
  aios-sto mount ~/docs docs --of agent:planner  a real folder, for reading
  aios-sto trash --of agent:planner              what was removed
  aios-sto empty-trash --of agent:planner        for good
  aios-sto spaces                                who keeps how much
"""

F = TypeVar("F", bound=Callable[..., Any])
TableRow = Sequence[str]


@edge.new(
    click.Group,
    "Look at the files that agents keep in the store, and put files there. Without --of they are those of the person "
    "at the terminal; --of takes agent:NAME, agent:GROUP/NAME, pid:N, group or group:NAME.",
    "[OPTIONS]",
    EXAMPLES,
    no_args_is_help=False,  # an error is one line
)
def command() -> None:
    pass


def _command(name: str, summary: str) -> Callable[[F], click.Command]:
    """Decorator: a subcommand with --of; its help is the docstring, its line in the list `summary`."""
    of = click.option("--of", default="", metavar="WHOSE", help="Whose files: agent:NAME, group, …")

    def decorate(function: F) -> click.Command:
        return command.command(name, context_settings=edge.SETTINGS, short_help=summary)(of(function))

    return decorate


# ── looking ───────────────────────────────────────────────────────────────────────────────────────────────


@_command("ls", "List files.")
@click.argument("folder", default="")
def ls(folder: str, of: str) -> int:
    """List the files in FOLDER and below it, or all."""
    found = sto.list(folder, of)
    _table(("VERSION", "SIZE", "CHANGED", "BY", "PATH"), map(_row, found), right=2)
    return 0


def _row(file: File) -> TableRow:
    if file.damaged:
        return ("-", "-", "-", "damaged", file.path)
    by = "mounted" if file.mounted else file.by
    return (str(file.version or "-"), format_size(file.size), _when(file.updated), by, file.path)


@_command("cat", "Write a file to stdout.")
@click.argument("path")
@click.option("-v", "--version", type=edge.Whole(1), metavar="N", help="This version; else the newest.")
def cat(path: str, version: int | None, of: str) -> int:
    """Write a file to stdout, in its newest version or in another."""
    return _to_stdout(path, version, of)


def _to_stdout(path: str, version: int | None, of: str) -> int:
    sys.stdout.flush()
    sto.download(path, sys.stdout.buffer, version, of)
    return 0


@_command("history", "List the versions of a file.")
@click.argument("path")
def history(path: str, of: str) -> int:
    """List the versions of a file that are kept, the newest first."""
    rows = [(str(one.number), format_size(one.size), _when(one.time), one.by) for one in sto.history(path, of)]
    _table(("VERSION", "SIZE", "MADE", "BY"), rows, right=2)
    return 0


@_command("diff", "Show what changed between two versions.")
@click.argument("path")
@click.argument("old", type=edge.Whole(1))
@click.argument("new", type=edge.Whole(1), required=False)
def diff(path: str, old: int, new: int | None, of: str) -> int:
    """Show what changed from version OLD to NEW (the newest), as `diff -u` does."""
    for line in sto.diff(path, old, new, of).splitlines():
        print(edge.escaped(line))
    return 0


@_command("search", "Find files by words.")
@click.argument("words", nargs=-1, required=True)
@click.option("-k", type=edge.Whole(1, 1000), default=10, metavar="N", help="At most N files (10).")
def search(words: tuple[str, ...], k: int, of: str) -> int:
    """Find files that have WORDS in their path or text, the best first."""
    for one in sto.search(" ".join(words), k, of=of):
        excerpt = f": {one.excerpt}" if one.excerpt else ""
        print(edge.escaped(f"{one.file.path}{excerpt}"))
    return 0


@_command("spaces", "List who keeps how much.")
def spaces(of: str) -> int:
    """List who keeps files, and how many bytes of the quota they take, with old versions and trash."""
    stats = sto.stats(of)
    rows = [(format_size(size), name or "person") for name, size in stats.get("spaces", {}).items()]
    _table(("KEPT", "WHOSE"), rows, right=1)
    return 0


# ── changing ──────────────────────────────────────────────────────────────────────────────────────────────


@_command("put", "Keep a file.")
@click.argument("file", type=click.Path())
@click.argument("path", required=False)
def put(file: str, path: str | None, of: str) -> int:
    """Keep the real FILE (- is stdin) under PATH, else under its own name, as a new version of what is there."""
    if path is None and file == "-":
        raise click.UsageError("what comes from stdin needs a PATH")
    path = path or Path(file).name
    kept = sto.upload(path, sys.stdin.buffer if file == "-" else Path(file), of)
    print(edge.escaped(f"{kept.path}: version {kept.version}, {format_size(kept.size)}"))
    return 0


@_command("get", "Copy a file out of the store.")
@click.argument("path")
@click.argument("file", type=click.Path(), required=False)
@click.option("-v", "--version", type=edge.Whole(1), metavar="N", help="This version; else the newest.")
def get(path: str, file: str | None, version: int | None, of: str) -> int:
    """Copy what is kept under PATH to the real FILE (- is stdout), which is replaced when all of it is there; without
    FILE to a new one of its name in this folder."""
    if file == "-":
        return _to_stdout(path, version, of)
    target = Path(file or Path(path).name)
    if file is None and target.exists():
        raise click.UsageError(f"{target} exists already; name a FILE to replace it")
    sto.download(path, target, version, of)
    return 0


@_command("rollback", "Go back to an old version.")
@click.argument("path")
@click.argument("version", type=edge.Whole(1), required=False)
@click.option("--time", "when", metavar="TIME", help="The newest version at TIME (YYYY-MM-DD HH:MM[:SS]).")
def rollback(path: str, version: int | None, when: str | None, of: str) -> int:
    """Make a new version that is as an old one: VERSION, or that of a time."""
    if (version is None) == (when is None):
        raise click.UsageError("either a version or --time is needed")
    kept = sto.rollback(path, version, None if when is None else _seconds(when), of)
    print(edge.escaped(f"{kept.path}: version {kept.version}"))
    return 0


@_command("rm", "Move files into the trash.")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
def rm(paths: tuple[str, ...], of: str) -> int:
    """Move files with all their versions into the trash; `restore` brings them back."""
    return _each(paths, lambda path: sto.remove(path, of))


# ── the trash ─────────────────────────────────────────────────────────────────────────────────────────────


@_command("trash", "List what was removed.")
def trash(of: str) -> int:
    """List what was removed, with the numbers that `restore` and `empty-trash` take."""
    rows: list[TableRow] = []
    after = 0
    while some := sto.trash(of, after=after):
        rows += [(str(one.id), format_size(one.size), _when(one.removed), one.path) for one in some]
        after = some[-1].id
    _table(("NUMBER", "SIZE", "REMOVED", "PATH"), rows, right=2)
    return 0


@_command("restore", "Take files out of the trash.")
@click.argument("numbers", nargs=-1, required=True, type=edge.Whole(1), metavar="NUMBER...")
def restore(numbers: tuple[int, ...], of: str) -> int:
    """Take files out of the trash."""
    return _each(numbers, lambda number: print(edge.escaped(sto.restore(number, of).path)))


@_command("empty-trash", "Remove for good what lies in the trash.")
@click.argument("numbers", nargs=-1, type=edge.Whole(1), metavar="[NUMBER...]")
def empty_trash(numbers: tuple[int, ...], of: str) -> int:
    """Remove for good what lies in the trash: these files, or all."""
    print(f"{sto.empty_trash(of, list(numbers) or None)} removed")
    return 0


# ── shares and mounts ─────────────────────────────────────────────────────────────────────────────────────


@_command("share", "Let others read or change files.")
@click.argument("path")
@click.argument("to", metavar="WITH")
@click.option("--write", is_flag=True, help="They may change it, too.")
def share(path: str, to: str, write: bool, of: str) -> int:
    """Let WITH (agent:NAME, group:NAME, …) read a file, or all files of a folder."""
    sto.share(path, to, write, of)
    return 0


@_command("unshare", "End a share.")
@click.argument("path")
@click.argument("to", metavar="WITH")
def unshare(path: str, to: str, of: str) -> int:
    """End a share of PATH with WITH."""
    if not sto.unshare(path, to, of):
        raise edge.CommandFailed(f"{path}: is not shared with {to}")
    return 0


@_command("mount", "Let the files of a real folder be found.")
@click.argument("folder", type=click.Path())
@click.argument("at")
@click.option("--write", is_flag=True, help="They may be written, too.")
def mount(folder: str, at: str, write: bool, of: str) -> int:
    """Let the files of a real FOLDER be read and found under the path AT. Links in it are not followed."""
    sto.mount(folder, at, write, of)
    return 0


@_command("unmount", "End a mount.")
@click.argument("at")
def unmount(at: str, of: str) -> int:
    """End a mount; the real folder stays as it is."""
    if not sto.unmount(at, of):
        raise edge.CommandFailed(f"{at}: no folder is mounted there")
    return 0


@_command("mounts", "List the mounted folders.")
def mounts(of: str) -> int:
    """List the mounted folders, and what is known of them."""
    rows = []
    for one in sto.mounts(of):
        note = one.note or ("" if one.complete else "is being looked through")
        rows.append((one.at, "write" if one.write else "read", str(one.files), one.folder, note))
    _table(("AT", "FOR", "FILES", "FOLDER", "NOTE"), rows, right=0)
    return 0


# ── what is printed ───────────────────────────────────────────────────────────────────────────────────────


def _each(items: Iterable[Any], act: Callable[[Any], object]) -> int:
    """Call `act` for all items; if it fails for one, go on with the others."""
    failed = False
    for item in items:
        try:
            act(item)
        except OSError as err:
            words = edge.reason(err)
            edge.complain("aios-sto", words if str(item) in words else f"{item}: {words}")
            failed = True
    return 1 if failed else 0


def _table(headers: TableRow, rows: Iterable[TableRow], right: int) -> None:
    """Print a table. The first `right` columns are figures; the last is not padded."""
    lines = [headers, *([edge.escaped(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    for line in lines:
        cells = [
            cell.rjust(width) if i < right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print(" ".join(cells).rstrip())


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _seconds(text: str) -> float:
    for shape in ("%Y-%m-%d %H:%M:%S", "%Y-%m-%d %H:%M", "%Y-%m-%d"):
        try:
            return time.mktime(time.strptime(text, shape))
        except (ValueError, OverflowError):
            pass
    raise click.UsageError(f"{text!r} is no time (such as 2026-11-28 06:41)")
