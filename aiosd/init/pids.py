"""Agent pids: small numbers from 1 up, never used twice in one home.

Numbers are reserved in blocks: a file has the highest number that may have been given out, so that a crash wastes
numbers but never repeats one. The loop never waits for the disk: the file is synced only at boot and at a clean end. So
after a power cut the newest blocks may be missing from it. That is the case when the file has another boot id of Linux
and was not closed cleanly; then STRETCH numbers are skipped, more than can have been lost. The previous file is kept:
when one is damaged, the other is used, and when both are, the names of the agents' logs show the highest number.

    last-pid, last-pid.old    NUMBER open|clean BOOT-ID CRC32
"""

from __future__ import annotations

import logging
import os
import re
import zlib
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger("supervisor")

BLOCK = 256
STRETCH = 1 << 14  # more numbers than can be given out before Linux writes the file to the disk by itself


class _State(NamedTuple):
    upto: int  # numbers up to here may have been given out
    clean: bool  # the system ended in order
    boot: str  # the id of Linux's boot


class PidCounter:
    """`next()` raises OSError when the disk refuses a new block; then no number is lost or repeated. `logs`: the folder
    of the agents' logs, which have pids as names."""

    def __init__(self, path: Path, logs: Path) -> None:
        self._path = path
        self._old = path.with_suffix(".old")
        self._boot = _boot_id()
        self._last = max(1, self._first(logs))  # 1 is aiosd itself
        self._reserved = self._last
        if self._last > 1:
            self._reserve(self._last + BLOCK, clean=False, sync=True)

    def next(self) -> int:
        if self._last >= self._reserved:
            self._reserve(self._last + BLOCK, clean=False)
        self._last += 1
        return self._last

    def release(self) -> None:
        """At a clean end: let the next boot use the rest of the block."""
        self._reserve(self._last, clean=True, sync=True)

    def _first(self, logs: Path) -> int:
        """The number after which to continue."""
        state, old = _read(self._path), _read(self._old)
        if state is None and old is None and not self._path.exists() and not self._old.exists():
            return max(1, _highest_log(logs))
        if state is None:
            found = max(_highest_log(logs), old.upto if old is not None else 1) + STRETCH
            logger.error("%s is damaged; pids go on from %d", self._path, found)
            return found
        upto = max(state.upto, _highest_log(logs))
        return upto if state.clean or state.boot in (self._boot, "") else upto + STRETCH

    def _reserve(self, upto: int, clean: bool, sync: bool = False) -> None:
        new = self._path.with_suffix(".new")
        with open(new, "w") as file:
            file.write(_line(_State(upto, clean, self._boot)))
            file.flush()
            if sync:
                os.fsync(file.fileno())
        if self._path.exists():
            os.replace(self._path, self._old)
        os.replace(new, self._path)
        self._reserved = upto


def _line(state: _State) -> str:
    text = f"{state.upto} {'clean' if state.clean else 'open'} {state.boot}"
    return f"{text} {zlib.crc32(text.encode()):08x}\n"


def _read(path: Path) -> _State | None:
    """None: there is no such file, or it is damaged."""
    try:
        text = path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    if re.fullmatch(r"[0-9]{1,15}", text):  # as release 0.1 wrote it
        return _State(int(text), False, "")
    found = re.fullmatch(r"(([0-9]{1,15}) (open|clean) ([\w-]*)) ([0-9a-f]{8})", text)
    if found is None or f"{zlib.crc32(found[1].encode()):08x}" != found[5]:
        return None
    return _State(int(found[2]), found[3] == "clean", found[4])


def _highest_log(logs: Path) -> int:
    try:
        names = os.listdir(logs)
    except OSError:
        return 1
    return max((int(found[1]) for name in names if (found := re.match(r"([0-9]{1,15})\.", name))), default=1)


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
