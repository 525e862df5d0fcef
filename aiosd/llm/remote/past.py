"""Calls that have ended well, for a new kernel that asks for them again. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from aiosd.ipc import link

MOST = 256
MOST_CHARACTERS = 16 << 20  # … and no more of them than have this much text


class Past:
    def __init__(self) -> None:
        self._ends: OrderedDict[link.Key, tuple[link.Finished, str]] = OrderedDict()
        self._characters = 0

    def __iter__(self) -> Iterator[link.Key]:
        return iter(self._ends)

    def add(self, finished: link.Finished, text: str) -> None:
        """`text`: all of it."""
        self._ends[finished.key] = finished, text
        self._characters += len(text)
        while len(self._ends) > MOST or (self._characters > MOST_CHARACTERS and len(self._ends) > 1):
            self.forget(next(iter(self._ends)))

    def get(self, key: link.Key) -> tuple[link.Finished, str] | None:
        return self._ends.get(key)

    def forget(self, key: link.Key) -> None:
        _, text = self._ends.pop(key, (None, ""))
        self._characters -= len(text)
