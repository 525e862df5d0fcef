"""Calls that have ended well, for a new kernel that submits them again. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import msgspec

from aiosd.ipc import link
from aiosd.llm.remote.call import OutputText

MOST = 256
MOST_SIZE = 16 << 20  # … and the size of all their texts together


class Past:
    def __init__(self) -> None:
        self._ends: OrderedDict[link.CallKey, tuple[link.GenerationDone, OutputText]] = OrderedDict()
        self._size = 0

    def __iter__(self) -> Iterator[link.CallKey]:
        return iter(self._ends)

    def add(self, finished: link.GenerationDone, text: OutputText) -> None:
        """Keep a finished call. `text`: all of its text, kept as one piece."""
        text.send_from(text.length)
        self._ends[finished.key] = finished, text
        self._size += text.size
        while len(self._ends) > MOST or (self._size > MOST_SIZE and len(self._ends) > 1):
            self.forget(next(iter(self._ends)))

    def get(self, key: link.CallKey, count: int) -> link.GenerationDone | None:
        """The end of a call for a new kernel, which has `count` characters of it; None: it is not kept."""
        if key not in self._ends:
            return None
        finished, text = self._ends[key]
        text.send_from(count)
        rest, chances = text.send(), text.send_chances()
        return msgspec.structs.replace(finished, offset=count, text=rest, logprobs=chances)

    def forget(self, key: link.CallKey) -> None:
        _, text = self._ends.pop(key, (None, None))
        self._size -= text.size if text is not None else 0
