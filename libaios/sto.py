"""Storage: files that an agent keeps, with all their versions. What a call has written is on the disk when it returns.

An agent that was started under a name of its own (`aios-run --name`) finds its files again under that name, in the
same group; without such a name they end with it. A path is names with a slash between them, `notes/plan.txt`. `of`
names the owner: "" the caller's own; "group" those of its group; "agent:NAME", "agent:GROUP/NAME" or "group:NAME"
those of another owner, if they are shared with the caller.

Each write makes a new version. A removed file lies in the trash until a person empties that. A file of a mounted folder
is a real one: it has version 0 and no history.

All calls raise OSError: FileNotFoundError, PermissionError, EAGAIN, EDQUOT, ENOSPC, EINVAL, EIO with a sentence. A file
that the caller may not see is not found, as if it did not exist.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from libaios import wire
from libaios.plan import Plan, Steps, Window, syscall, syscalls
from libaios.wire import PIECE, File, FoundFile, Mount, Share, Sys, Trashed, Version

__all__ = [
    "File",
    "FoundFile",
    "Mount",
    "Share",
    "Trashed",
    "Version",
    "append",
    "diff",
    "download",
    "empty_trash",
    "history",
    "list",
    "mount",
    "mounts",
    "read",
    "remove",
    "restore",
    "rollback",
    "search",
    "share",
    "shares",
    "stat",
    "stats",
    "trash",
    "unmount",
    "unshare",
    "upload",
    "write",
]

T = TypeVar("T")

MOST_DIFF = 8 << 20  # bytes of a version that `diff` compares


# ── writing ───────────────────────────────────────────────────────────────────────────────────────────────


@syscalls
def write(path: str, data: bytes | str, of: str = "", if_version: int | None = None) -> Steps[File]:
    """Make a new version of a file, or a new file. A text is written as UTF-8.

    With `if_version` the file must still have that version (0: not exist), else BlockingIOError (EAGAIN). Raises
    OSError: EDQUOT, EISDIR, ENOTDIR; PermissionError for what is shared for reading only.
    """
    raw = _bytes(data)
    if len(raw) <= PIECE:
        return (yield from _call(Plan(Sys.STO_WRITE, wire.StoWrite(_text(path), raw, _text(of), False, if_version))))
    return (yield from _upload(_text(path), io.BytesIO(raw), _text(of), if_version))


@syscalls
def append(path: str, data: bytes | str, of: str = "") -> Steps[File]:
    """Make a new version with `data` (at most 1 MB) after the bytes of the newest one. Equal content is stored once.

    A file of a folder that is mounted for writing is copied, so it may have at most 16 MB (EFBIG); EAGAIN if other
    processes keep changing it meanwhile.
    """
    raw = _bytes(data)
    if len(raw) > PIECE:
        raise wire.error(errno.EMSGSIZE, f"{len(raw)} bytes; at most {PIECE} are appended at a time")
    return (yield from _call(Plan(Sys.STO_WRITE, wire.StoWrite(_text(path), raw, _text(of), True))))


@syscalls
def upload(
    path: str, source: str | os.PathLike[str] | BinaryIO, of: str = "", if_version: int | None = None
) -> Steps[File]:
    """As `write`, from a real file or an open one, of any size: in pieces of 1 MB."""
    if isinstance(source, str | os.PathLike):
        with open(source, "rb") as file:
            return (yield from _upload(_text(path), file, _text(of), if_version))
    return (yield from _upload(_text(path), source, _text(of), if_version))


def _upload(path: str, source: BinaryIO, of: str, if_version: int | None) -> Steps[File]:
    number: int = yield Plan(Sys.STO_UPLOAD, wire.StoUpload(path, of, if_version))
    sizes: builtins.list[int] = []
    try:
        yield Window(_sent(number, source, sizes), lambda nothing: None)
        return (yield from _call(Plan(Sys.STO_FINISH, wire.StoFinish(number, sum(sizes)))))
    except (Exception, KeyboardInterrupt):
        yield Plan(Sys.STO_ABORT, wire.StoAbort(number))
        raise


def _sent(upload: int, source: BinaryIO, sizes: builtins.list[int]) -> Iterator[Plan[Any]]:
    while piece := _full_piece(source):
        offset = sum(sizes)
        sizes.append(len(piece))
        yield Plan(Sys.STO_PIECE, wire.StoPiece(upload, offset, piece))


def _full_piece(source: BinaryIO) -> bytes:
    """PIECE bytes, or the rest; several reads, since a pipe returns less at a time."""
    parts = []
    missing = PIECE
    while missing and (part := source.read(missing)):
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────


@syscalls
def read(path: str, version: int | None = None, of: str = "") -> Steps[bytes]:
    """All bytes of a file, of its newest version or of another. Raises FileNotFoundError, IsADirectoryError."""
    parts: builtins.list[bytes] = []
    yield from _pieces(_text(path), version, _text(of), parts.append)
    return b"".join(parts)


@syscalls
def download(
    path: str, target: str | os.PathLike[str] | BinaryIO, version: int | None = None, of: str = ""
) -> Steps[int]:
    """Copy a file of any size into a real file (which is replaced when all has arrived) or into an open one, and return
    its size."""
    if not isinstance(target, str | os.PathLike):
        return (yield from _pieces(_text(path), version, _text(of), target.write))
    final = Path(target)
    beside = final.with_name(f".{final.name}.part")
    try:
        with open(beside, "wb") as file:
            size = yield from _pieces(_text(path), version, _text(of), file.write)
        os.replace(beside, final)
    finally:
        beside.unlink(missing_ok=True)
    return size


def _pieces(path: str, version: int | None, of: str, take: Callable[[bytes], Any]) -> Steps[int]:
    """Read all pieces of one version, even if new versions are written meanwhile."""
    first: wire.FileData = yield Plan(Sys.STO_READ, wire.StoRead(path, of, version))
    offset = 0

    def keep(found: wire.FileData) -> None:
        nonlocal offset
        take(found.data)
        offset += len(found.data)

    keep(first)
    if first.version:
        ahead = range(offset, first.size, PIECE) if offset else range(0)
        plans = (Plan[Any](Sys.STO_READ, wire.StoRead(path, of, first.version, place)) for place in ahead)
        yield Window(plans, keep)
        return offset
    found = first  # of a mounted folder: there are no versions, and it may change at any time
    while found.data and offset < found.size:
        found = yield Plan(Sys.STO_READ, wire.StoRead(path, of, None, offset))
        keep(found)
    return offset


@syscalls
def diff(path: str, old: int, new: int | None = None, of: str = "") -> Steps[str]:
    """What changed from one version to another (the newest), as `diff -u` shows it; "": nothing. Raises OSError
    (EINVAL) when they are no text, or larger than 8 MB."""
    import difflib

    now = yield Plan(Sys.STO_STAT, wire.StoPath(_text(path), _text(of)))
    new = now.version if new is None else new
    texts = []
    for version in (old, new):
        parts: builtins.list[bytes] = []
        yield from _pieces(_text(path), version, _text(of), _at_most(parts, path))
        texts.append(_lines(b"".join(parts), f"{path}: version {version}"))
    names = (f"{path} (version {old})", f"{path} (version {new})")
    return "".join(_marked(difflib.unified_diff(texts[0], texts[1], *names)))


def _at_most(parts: builtins.list[bytes], path: str) -> Callable[[bytes], None]:
    def take(part: bytes) -> None:
        parts.append(part)
        if sum(map(len, parts)) > MOST_DIFF:
            raise wire.error(errno.EINVAL, f"{path}: larger than {MOST_DIFF} bytes, which is too much to compare")

    return take


def _lines(data: bytes, what: str) -> builtins.list[str]:
    try:
        return data.decode().splitlines(keepends=True)
    except UnicodeDecodeError:
        raise wire.error(errno.EINVAL, f"{what} is no text") from None


def _marked(lines: Any) -> Any:
    """The lines, with a mark after a last line that has no newline, as in diff."""
    for line in lines:
        yield line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"


@syscall
def stat(path: str, of: str = "") -> Plan[File]:
    """Size, version and times of a file. Raises FileNotFoundError."""
    return Plan(Sys.STO_STAT, wire.StoPath(_text(path), _text(of)))


@syscalls
def list(folder: str = "", of: str = "") -> Steps[builtins.list[File]]:
    """All files in a folder and below it, by path. What a damaged disk has lost is in the list, as `File.damaged`; to
    read it raises OSError (EIO)."""
    found: builtins.list[File] = []
    while True:
        after = found[-1].path if found else ""
        some = yield Plan(Sys.STO_LIST, wire.StoList(_text(folder), _text(of), after=after))
        found += some
        if not some:
            return found


@syscall
def history(path: str, of: str = "", limit: int = 1000, before: int = 0) -> Plan[builtins.list[Version]]:
    """The versions that are kept, the newest first; only those below `before`, if that is given."""
    return Plan(Sys.STO_HISTORY, wire.StoHistory(_text(path), _text(of), limit, before))


@syscall
def search(query: str, k: int = 10, folder: str = "", of: str | None = None) -> Plan[builtins.list[FoundFile]]:
    """At most `k` files that have words of `query` in their path or text, the best first. Without `of`: among all that
    the caller can read."""
    return Plan(Sys.STO_SEARCH, wire.StoSearch(_text(query), k, _text(folder), None if of is None else _text(of)))


# ── old versions and the trash ────────────────────────────────────────────────────────────────────────────


@syscall
def rollback(path: str, version: int | None = None, time: float | None = None, of: str = "") -> Plan[File]:
    """Make a new version that is as an old one: of this number, or the newest that is not later than `time` (a Unix
    time). Raises FileNotFoundError when there is no such version."""
    return Plan(Sys.STO_ROLLBACK, wire.StoRollback(_text(path), _text(of), version, time))


@syscall
def remove(path: str, of: str = "") -> Plan[int]:
    """Move a file with all its versions into the trash. Returns its number there; 0 for a file of a mounted folder,
    which is removed for good."""
    return Plan(Sys.STO_REMOVE, wire.StoPath(_text(path), _text(of)))


@syscall
def trash(of: str = "", limit: int = 1000, after: int = 0) -> Plan[builtins.list[Trashed]]:
    """The removed files; with `after` only those with higher numbers."""
    return Plan(Sys.STO_TRASH, wire.StoTrash(_text(of), limit, after))


@syscall
def restore(number: int, of: str = "") -> Plan[File]:
    """Take a file out of the trash. Raises FileExistsError when there is a file of that path again."""
    return Plan(Sys.STO_RESTORE, wire.StoRestore(number, _text(of)))


@syscalls
def empty_trash(of: str = "", numbers: builtins.list[int] | None = None) -> Steps[int]:
    """Remove these files, or all that lie in the trash, for good, and return their number. Only a person may do that:
    an agent gets PermissionError."""
    total: int = yield Plan(Sys.STO_EMPTY, wire.StoEmpty(_text(of), numbers))
    while numbers is None and (more := (yield Plan(Sys.STO_EMPTY, wire.StoEmpty(_text(of))))):
        total += more
    return total


# ── others ────────────────────────────────────────────────────────────────────────────────────────────────


@syscall
def share(path: str, to: str, write: bool = False, of: str = "") -> Plan[None]:
    """Let an agent ("agent:NAME") or a group ("group", "group:NAME") read a file, or all files of a folder, later ones
    included; with `write` change them, too. They find the files with `of`. Raises FileNotFoundError."""
    return Plan(Sys.STO_SHARE, wire.StoShare(_text(path), _text(to), write, _text(of)))


@syscall
def unshare(path: str, to: str, of: str = "") -> Plan[bool]:
    """End a share. False: there was none."""
    return Plan(Sys.STO_UNSHARE, wire.StoUnshare(_text(path), _text(to), _text(of)))


@syscall
def shares() -> Plan[builtins.list[Share]]:
    """What the caller and its group share with others, and what others share with them."""
    return Plan(Sys.STO_SHARES, wire.NoArgs())


@syscall
def mount(folder: str | os.PathLike[str], at: str, write: bool = False, of: str = "") -> Plan[Mount]:
    """Let the files of a real folder be found under the path `at`, for reading; with `write` for writing, too.

    A person may mount any folder, an agent only one of those that `--store-folders` names. Links in it are not
    followed.
    """
    return Plan(Sys.STO_MOUNT, wire.StoMount(wire.os_text(os.path.abspath(folder)), _text(at), write, _text(of)))


@syscall
def unmount(at: str, of: str = "") -> Plan[bool]:
    """End a mount; the real folder stays as it is. False: none is mounted there."""
    return Plan(Sys.STO_UNMOUNT, wire.StoPath(_text(at), _text(of)))


@syscall
def mounts(of: str = "") -> Plan[builtins.list[Mount]]:
    """The mounted folders."""
    return Plan(Sys.STO_MOUNTS, wire.StoSpace(_text(of)))


@syscall
def stats(of: str = "") -> Plan[dict[str, Any]]:
    """`files` and `trash`: numbers of files; `bytes`: what they take of the `quota`; `versions`: how many are kept of
    each file; `lasting`: whether they outlast the agent."""
    return Plan(Sys.STO_STATS, wire.StoSpace(_text(of)))


# ── arguments ─────────────────────────────────────────────────────────────────────────────────────────────


def _call(plan: Plan[T]) -> Steps[T]:
    """One call as steps: gives the result its type, which a `yield` does not."""
    result: T = yield plan
    return result


def _text(value: str) -> str:
    """Check a text. Raises OSError (EINVAL) if no message can carry it."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise wire.error(errno.EINVAL, f"{value!r}: is no UTF-8") from None
    return value


def _bytes(data: bytes | str) -> bytes:
    return _text(data).encode() if isinstance(data, str) else bytes(data)
