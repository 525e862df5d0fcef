"""How much the files of workspaces take, looked at by a thread: the kernel never waits for a disk.

The thread exists only while there is something to look at. A folder that cannot be looked through has no size: a budget
that needs it is not open any more.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Mapping, Sequence


class DiskWatch:
    """`ask` for folders, with the processes that write there, and later find their `sizes`: bytes, or None where one
    could not be looked through. `took_s`: how long that took."""

    def __init__(self) -> None:
        self.sizes: dict[str, int | None] = {}
        self.took_s = 0.0
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def ask(self, folders: Mapping[str, Sequence[int]]) -> None:
        """Have these looked at. It must not be busy."""
        self._thread = threading.Thread(target=self._look, args=(dict(folders),), name="disk", daemon=True)
        self._thread.start()

    def _look(self, folders: Mapping[str, Sequence[int]]) -> None:
        began = time.monotonic()
        self.sizes = {folder: _sum([size_of(folder), *map(held, ospids)]) for folder, ospids in folders.items()}
        self.took_s = time.monotonic() - began


def _sum(sizes: list[int | None]) -> int | None:
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def held(ospid: int) -> int | None:
    """Bytes of the files that a process holds open and that have no name any more. None: that cannot be read."""
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
    something in it cannot be looked at."""
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
