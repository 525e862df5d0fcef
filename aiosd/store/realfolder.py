"""A real folder, and the way to what lies in it: step by step from its descriptor, never through a link.

So no link, whenever it was made, leads out of the folder. Since a file is checked after it was opened, a file that was
exchanged for a pipe or a device is not read. `hidden` is aiosd's own data, which is in no mounted folder, even if it
lies below one. All functions raise OSError.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
TEMPORARY = b".aios-new"
CALLS, CALL_BYTES, MOST_CALLS = b"user.aios.calls", 8, 256  # an attribute of files that were appended to
MOST_APPENDED = 16 << 20  # bytes of a file that is copied for each append
TRIES = 3


@dataclass(frozen=True, slots=True)
class Real:
    """The state of a file when it was checked. `stamp` changes with the file."""

    size: int
    created: float
    updated: float
    stamp: str


def real(found: os.stat_result) -> Real | None:
    """The state of a file; None: it is no plain file."""
    if not stat.S_ISREG(found.st_mode):
        return None
    stamp = f"{found.st_dev}:{found.st_ino}:{found.st_size}:{found.st_mtime_ns}:{found.st_ctime_ns}"
    return Real(found.st_size, min(found.st_ctime, found.st_mtime), found.st_mtime, stamp)


class RealFolder:
    def __init__(self, path: bytes, hidden: tuple[int, int]) -> None:
        self._hidden = hidden
        self.root = os.open(path, _FOLDER)

    def close(self) -> None:
        os.close(self.root)

    @contextmanager
    def folder(self, names: tuple[bytes, ...], make: bool = False) -> Iterator[int]:
        """A descriptor of the folder that these names lead to. `make`: create missing folders."""
        fd = os.dup(self.root)
        try:
            for name in names:
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(name, 0o777, dir_fd=fd)
                below = os.open(name, _FOLDER, dir_fd=fd)
                os.close(fd)
                fd = below
                self._refuse_hidden(fd)
            yield fd
        finally:
            os.close(fd)

    def _refuse_hidden(self, fd: int) -> None:
        found = os.fstat(fd)
        if (found.st_dev, found.st_ino) == self._hidden:
            raise FileNotFoundError(errno.ENOENT, "that is aiosd's own folder")

    def look(self, names: tuple[bytes, ...]) -> Real | None:
        """Check one file. None: it is missing, or no plain file."""
        try:
            with self.folder(names[:-1]) as fd:
                return real(os.stat(names[-1], dir_fd=fd, follow_symlinks=False))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as err:
            if err.errno == errno.ELOOP:  # a folder on the way is a link
                return None
            raise

    def read(self, names: tuple[bytes, ...], offset: int, size: int) -> tuple[bytes, Real]:
        with self.folder(names[:-1]) as folder:
            fd = os.open(names[-1], _FILE, dir_fd=folder)
        try:
            found = real(os.fstat(fd))
            if found is None:
                raise FileNotFoundError(errno.ENOENT, "it is no plain file")
            return os.pread(fd, size, min(offset, (1 << 63) - 1 - size)), found
        finally:
            os.close(fd)

    def write(self, names: tuple[bytes, ...], data: bytes) -> None:
        """Write a new file beside the old one, and put it in its place: a reader gets the old one or the new one."""
        with self.folder(names[:-1], make=True) as folder, self._replacing(folder, names[-1], None) as fd:
            _write_all(fd, data)

    def append(self, names: tuple[bytes, ...], data: bytes, call: bytes) -> None:
        """Write a new file with the old content and `data` after it. The new file names the last calls that appended to
        it (CALL_BYTES each), and such a call does not append again. Changes that another process makes between the copy
        and the renaming are lost, as with every program that replaces a file; earlier ones are not."""
        with self.folder(names[:-1], make=True) as folder:
            for _ in range(TRIES):
                with contextlib.suppress(_ChangedError):
                    return self._append(folder, names[-1], data, call)
        raise OSError(errno.EAGAIN, "others change the file all the time")

    def _append(self, folder: int, name: bytes, data: bytes, call: bytes) -> None:
        try:
            old = os.open(name, _FILE, dir_fd=folder)
        except FileNotFoundError:
            with self._replacing(folder, name, "") as fd:
                _write_all(fd, data)
                _set_calls(fd, call)
            return
        try:
            found = real(os.fstat(old))
            if found is None:
                raise OSError(errno.EINVAL, "is no plain file there")
            calls = _calls_of(old)
            if call in calls:
                return
            if found.size + len(data) > MOST_APPENDED:
                raise OSError(errno.EFBIG, f"more than {MOST_APPENDED} bytes: to append means to copy")
            with self._replacing(folder, name, found.stamp) as fd:
                while part := os.read(old, 1 << 20):
                    _write_all(fd, part)
                _write_all(fd, data)
                _set_calls(fd, b"".join([*calls, call][-MOST_CALLS:]))
        finally:
            os.close(old)

    @contextmanager
    def _replacing(self, folder: int, name: bytes, stamp: str | None) -> Iterator[int]:
        """A new file that gets this name at the end. `stamp`: of the file that has the name until then ("": there is
        none)."""
        mode = self._mode_of(folder, name)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(TEMPORARY, dir_fd=folder)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(TEMPORARY, flags, 0o666 if mode is None else 0o600, dir_fd=folder)
        try:
            if mode is not None:
                os.fchmod(fd, mode)
            yield fd
            os.fsync(fd)
            if stamp is not None and stamp != self._stamp_of(folder, name):
                raise _ChangedError
            os.rename(TEMPORARY, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:  # of any kind, an interrupt too: undo, and raise it again
            os.unlink(TEMPORARY, dir_fd=folder)
            raise
        finally:
            os.close(fd)
        os.fsync(folder)

    def remove(self, names: tuple[bytes, ...]) -> None:
        """Remove a file for good."""
        with self.folder(names[:-1]) as folder:
            if not self._stamp_of(folder, names[-1]):
                raise FileNotFoundError(errno.ENOENT, "it is no plain file")
            os.unlink(names[-1], dir_fd=folder)  # removes the name itself, never the target of a link
            os.fsync(folder)

    @staticmethod
    def _stamp_of(folder: int, name: bytes) -> str:
        try:
            found = real(os.stat(name, dir_fd=folder, follow_symlinks=False))
        except FileNotFoundError:
            return ""
        return "" if found is None else found.stamp

    @staticmethod
    def _mode_of(folder: int, name: bytes) -> int | None:
        """The mode of the file; None: there is no file."""
        try:
            found = os.stat(name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "is no plain file there")
        return stat.S_IMODE(found.st_mode)

    @contextmanager
    def entries(self, names: tuple[bytes, ...]) -> Iterator[tuple[int, Iterator[os.DirEntry[str]]]]:
        """The folder's descriptor, and its entries. (Names as Python has them, see os.fsencode.)"""
        with self.folder(names) as fd, os.scandir(fd) as found:
            yield fd, found


class _ChangedError(Exception):
    """Another process has changed the file meanwhile."""


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _calls_of(fd: int) -> list[bytes]:
    try:
        found = os.getxattr(fd, CALLS)
    except OSError:  # the file has no such attribute
        return []
    return [found[begin : begin + CALL_BYTES] for begin in range(0, len(found), CALL_BYTES)]


def _set_calls(fd: int, calls: bytes) -> None:
    try:
        os.setxattr(fd, CALLS, calls)
    except OSError as err:
        if err.errno != errno.EOPNOTSUPP:
            raise
        reason = "its file system keeps no attributes of files, and an append could happen twice"
        raise OSError(errno.EOPNOTSUPP, reason) from None


def may_be_mounted(path: bytes, hidden: tuple[int, int]) -> bytes:
    """The real path of a folder that is not within aiosd's own data. Raises OSError: ENOENT, ENOTDIR, EINVAL."""
    found = os.path.realpath(path, strict=True)
    above = found
    while True:
        stats = os.stat(above)
        if (stats.st_dev, stats.st_ino) == hidden:
            raise OSError(errno.EINVAL, "lies in aiosd's own folder")
        if above == b"/":
            break
        above = os.path.dirname(above)
    if not os.path.isdir(found):
        raise NotADirectoryError(errno.ENOTDIR, "is not a folder")
    return found
