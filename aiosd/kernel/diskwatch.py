"""Measures the disk use of workspaces in a thread, because the kernel never waits for a disk.

The thread exists only while there is something to measure. A folder that cannot be read has no size: then a budget that
needs it counts as used up.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, Sequence

from aiosd import threads


class DiskWatch:
    """Call `ask` with folders and the processes that write there; later their `sizes` are here: bytes, or None for a
    folder that could not be read. `took_s`: how long the measurement took. `busy`: from `ask` to the result. If no
    thread can be started it stays busy, as with a disk that does not answer, until `ask` is called again."""

    def __init__(self) -> None:
        self.sizes: dict[str, int | None] = {}
        self.took_s = 0.0
        self.busy = self.waits = False  # `waits`: for a thread

    def ask(self, folders: Mapping[str, Sequence[int]]) -> None:
        """Have these measured. It must not be busy, unless it waits for a thread."""
        self.busy = self.waits = True
        asked = dict(folders)
        with contextlib.suppress(OSError):
            threads.start(lambda: self._look(asked), "disk")
            self.waits = False

    def forget(self) -> None:
        """Nothing has to be measured any more."""
        self.sizes = {}
        if self.waits:
            self.busy = self.waits = False

    def _look(self, folders: Mapping[str, Sequence[int]]) -> None:
        began = time.monotonic()
        try:
            self.sizes = {folder: _sum([size_of(folder), *map(held, ospids)]) for folder, ospids in folders.items()}
        finally:
            self.took_s, self.busy = time.monotonic() - began, False


def _sum(sizes: list[int | None]) -> int | None:
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def held(ospid: int) -> int | None:
    """Bytes of the files that a process holds open and that have no name any more. None: this cannot be read."""
    total = 0
    folder = f"/proc/{ospid}/fd"
    try:
        for fd in os.listdir(folder):
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                path = f"{folder}/{fd}"
                name = os.readlink(path)
                if name.endswith(" (deleted)") and not name.startswith("/memfd:"):
                    total += os.stat(path).st_blocks * 512
    except PermissionError:
        return None
    except OSError:
        return 0
    return total


def size_of(folder: str) -> int | None:
    """Bytes on the disk of all files below a folder, a file of several names once. 0: there is no such folder; None:
    something in it cannot be read."""
    total = 0
    linked: set[tuple[int, int]] = set()
    folders = [folder]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    stat = entry.stat(follow_symlinks=False)
                    if stat.st_nlink > 1 and not entry.is_dir(follow_symlinks=False):
                        if (stat.st_dev, stat.st_ino) in linked:
                            continue
                        linked.add((stat.st_dev, stat.st_ino))
                    total += stat.st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
        except FileNotFoundError:
            continue  # removed meanwhile
        except OSError:
            return None
    return total
