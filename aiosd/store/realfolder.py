"""A real folder, and the way to what lies in it: step by step from its descriptor, never through a link.

So no link, whenever it was made, leads out of the folder; and since what is opened is looked at afterwards, a
file that was exchanged for a pipe or a device is not read. `hidden` is aiosd's own data, which is in no mounted folder,
even if it lies below one. Raises OSError in all functions.
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


@dataclass(frozen=True, slots=True)
class Real:
    """What a look at a file told. `stamp` changes with the file."""

    size: int
    created: float
    updated: float
    stamp: str


def real(found: os.stat_result) -> Real | None:
    """None: it is no plain file."""
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
        """A descriptor of the folder that these names lead to. `make`: what is not there."""
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
        """At one file. None: it is not there, or no plain file."""
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
        """Beside the file, and then in its place: a reader gets the old one or the new one."""
        with self.folder(names[:-1], make=True) as folder:
            mode = self._mode_of(folder, names[-1])
            with contextlib.suppress(FileNotFoundError):
                os.unlink(TEMPORARY, dir_fd=folder)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(TEMPORARY, flags, 0o666 if mode is None else 0o600, dir_fd=folder)
            try:
                if mode is not None:
                    os.fchmod(fd, mode)
                view = memoryview(data)
                while view:
                    view = view[os.write(fd, view) :]
                os.fsync(fd)
                os.rename(TEMPORARY, names[-1], src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:  # of any kind, an interrupt too: undo, and raise it again
                os.unlink(TEMPORARY, dir_fd=folder)
                raise
            finally:
                os.close(fd)
            os.fsync(folder)

    @staticmethod
    def _mode_of(folder: int, name: bytes) -> int | None:
        """Of the file that is there; None: there is none."""
        try:
            found = os.stat(name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "is no plain file there")
        return stat.S_IMODE(found.st_mode)

    @contextmanager
    def entries(self, names: tuple[bytes, ...]) -> Iterator[tuple[int, Iterator[os.DirEntry[str]]]]:
        """The folder's descriptor, and what is in it. (Names as Python has them, see os.fsencode.)"""
        with self.folder(names) as fd, os.scandir(fd) as found:
            yield fd, found


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
