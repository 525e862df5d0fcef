"""Measures the disk use of workspaces in a thread, because the kernel never waits for a disk.

The thread exists only while there is something to measure. A folder that cannot be read has no size: then a budget that
needs it counts as used up.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Mapping, Sequence


class DiskWatch:
    """Call `ask` with folders and the processes that write there; later their `sizes` are here: bytes, or None for a
    folder that could not be read. `took_s`: how long the measurement took."""

    def __init__(self) -> None:
        self.sizes: dict[str, int | None] = {}
        self.took_s = 0.0
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def ask(self, folders: Mapping[str, Sequence[int]]) -> None:
        """Have these measured. It must not be busy."""
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
