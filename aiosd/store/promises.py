"""Which answers the kernel may give again, because nothing that they say has changed (see `aiosd.kernel.copies`).

A promise is about a *subject*, a note say. What changes a subject calls `broken`, before the answer to the call that
does so, and whether or not its transaction will hold: a promise that was taken back for nothing costs one call. So that
the reverse cannot happen, none is made while a transaction is open, whose changes others may already see here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping

MOST = 20_000  # that stand at a time; the oldest are taken back


class Promises:
    def __init__(self) -> None:
        self.take_back: Callable[[list[int]], None] = lambda promises: None
        self._numbers: dict[Hashable, int] = {}  # by subject, the oldest first
        self._subjects: dict[int, Hashable] = {}
        self._next = itertools.count(1)

    def __len__(self) -> int:
        return len(self._numbers)

    def make(self, subject: Hashable) -> int:
        """The number of the promise that a subject stays as it is."""
        number = self._numbers.get(subject)
        if number is None:
            if len(self._numbers) >= MOST:
                self.broken(next(iter(self._numbers)))
            number = self._numbers[subject] = next(self._next)
            self._subjects[number] = subject
        return number

    def broken(self, subject: Hashable) -> None:
        """The subject changes now."""
        number = self._numbers.pop(subject, None)
        if number is not None:
            del self._subjects[number]
            self.take_back([number])

    def void(self) -> None:
        """There is a new kernel, which has none of them."""
        self._numbers.clear()
        self._subjects.clear()

    def of(self, counts: Mapping[int, int]) -> list[tuple[Hashable, int]]:
        """The subjects of these promises, with their counts; those that do not stand any more are left out."""
        return [(self._subjects[number], count) for number, count in counts.items() if number in self._subjects]
