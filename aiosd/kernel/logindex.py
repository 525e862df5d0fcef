"""When a log grew: what `aios-logs --since` reads.

A detached agent writes straight into its log, so its lines carry no time. Beside each log lies an index of
16-byte records (Unix time as float64, size of the log in bytes as uint64, little-endian), one appended at each
sample that found the log larger than before. It costs one stat per agent and second, and no copy of any output.
"""

from __future__ import annotations

import os
import struct
import time

RECORD = struct.Struct("<dQ")


def index_path(log: str) -> str:
    return log.removesuffix(".log") + ".idx"


class LogIndex:
    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}

    def sample(self, log: str) -> None:
        """Note the log's size if it changed. A disk that refuses loses times, never output."""
        try:
            size = os.stat(log).st_size
            if size == self._sizes.get(log, 0):
                return
            with open(index_path(log), "ab") as file:
                file.write(RECORD.pack(time.time(), size))
            self._sizes[log] = size
        except OSError:
            return

    def close(self, log: str) -> None:
        """The last sample, at the agent's end."""
        self.sample(log)
        self._sizes.pop(log, None)
