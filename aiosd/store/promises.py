"""Promises: answers that the kernel may give again as long as their data do not change (see `aiosd.kernel.copies`).

A promise is about a *subject*, for example a note. A change of a subject calls `broken`, before the answer to the call
that makes it, whether or not its transaction will be committed: a promise that was taken back without need costs one
call. The reverse must not happen. So no promise is made while a transaction is open, whose changes this process may
already see.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping

MOST = 20_000  # valid promises at a time; beyond that the oldest are taken back


class Promises:
    def __init__(self) -> None:
        self.take_back: Callable[[list[int]], None] = lambda promises: None
        self._numbers: dict[Hashable, int] = {}  # by subject, the oldest first
        self._subjects: dict[int, Hashable] = {}
        self._next = itertools.count(1)

    def __len__(self) -> int:
        return len(self._numbers)

    def make(self, subject: Hashable) -> int:
        """Promise that a subject stays as it is; returns the promise's number."""
        number = self._numbers.get(subject)
        if number is None:
            if len(self._numbers) >= MOST:
                self.broken(next(iter(self._numbers)))
            number = self._numbers[subject] = next(self._next)
            self._subjects[number] = subject
        return number

    def broken(self, subject: Hashable) -> None:
        """The subject changes now: take back its promise."""
        number = self._numbers.pop(subject, None)
        if number is not None:
            del self._subjects[number]
            self.take_back([number])

    def void(self) -> None:
        """Drop all promises, because a new kernel has none of them."""
        self._numbers.clear()
        self._subjects.clear()

    def of(self, counts: Mapping[int, int]) -> list[tuple[Hashable, int]]:
        """The subjects of these promises, with their counts, without those that were taken back."""
        return [(self._subjects[number], count) for number, count in counts.items() if number in self._subjects]
