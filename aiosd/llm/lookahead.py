"""Chooses how many guessed tokens a step computes, if any. (`lookup.py` guesses, `engine.py` verifies.)

A step that computes the next token of a call and some guesses after it (the *rows* of the step) takes longer than a
step with one row. How much longer depends on the model's file and the machine: hardly at all, or in proportion to the
rows. So it is measured when the model is loaded. If even guesses that are always right would bring little, there are
none.

In each step the `Guesser` chooses the number of guesses with which the most tokens per second are expected. The time
that a call loses with wrong guesses is bounded whatever its text is: it is paid out of the call's purse, into which
steps pay a small part of their time, and right guesses the time that they save. (Each call has a purse of its own, so
that its guesses, and with them the rounding of its rows, do not depend on earlier calls.) A call without guesses does
not become slower than its share of the model's time by the guesses of others. While many calls decode there are no
guesses: the rows of other calls fill a step better.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from aiosd.errors import WorldError
from aiosd.llm import llama
from aiosd.llm.lookup import Lookup
from aiosd.llm.passes import PassCost, passes, saved_by_filling

#: Guesses are made while at most CALLS calls decode, and a step has at most ROWS rows.
CALLS, ROWS = 4, 16

#: Numbers of guesses for one call that are considered: together with the next token, sizes that were measured.
SIZES = (1, 3, 7, 15)

#: The rows of steps that are measured, the most telling first. The first two are tried in any case; each is tried up to
#: ROUNDS times, after a beginning of HISTORY tokens.
MEASURED, ROUNDS, HISTORY = (1, 8, 4, 16, 2), 2, 16

#: No other step begins after this time (seconds) of its own, or of a clock on the wall.
MEASURE_S, WALL_S = 0.8, 3.0

#: Where a step takes longer than that (seconds), only steps of 1 and 8 rows are tried, once.
LONG_STEP = 0.15

#: What guesses that are always right must bring at least, or there are none.
WORTH = 1.2

#: A step with guesses must promise at least GAIN times the tokens per second of one without.
GAIN = 1.05

#: This part of the time of a call's steps without guesses may be lost with wrong guesses; and once, at its beginning,
#: the cost of a step with FIRST wrong guesses.
LOSS, FIRST = 0.01, 3

#: A purse holds at most PURSE times the seconds of the longest step.
PURSE = 1.2

#: Calls of which the tokens are remembered: those of the last steps.
REMEMBERED = 2 * CALLS


@dataclass(frozen=True, slots=True)
class Lookahead:
    """`most`: guesses for one call in a step, 0: none. `seconds`: of a step with as many rows as the index says.
    `cost`: of passes and rows, None: not measured."""

    most: int
    why: str  # for people
    seconds: tuple[float, ...] = ()
    again: bool = False  # there was no time to measure all: it is to be measured again on a quiet machine
    cost: PassCost | None = None

    @property
    def described(self) -> str:
        if not self.most:
            return f"does not look ahead: {self.why}"
        return f"looks up to {self.most} token{'s' * (self.most > 1)} ahead: {self.why}"


def measure(
    context: llama.LlamaContext,
    slot: int,
    asked: int | None,
    *,
    cost: Callable[[], float] = time.process_time,
    clock: Callable[[], float] = time.perf_counter,
) -> Lookahead:
    """Measure steps with several rows in this slot, which must be empty and is left empty. `asked`: how far to look
    ahead in any case, None: as far as it pays. `cost`: what a step takes; by default processor time, of which other
    processes take none. Raises WorldError if llama.cpp cannot decode."""
    began = clock()
    found = _steps(context, slot, cost, lambda: clock() - began > WALL_S)
    context.cut(slot, 0)
    costs, again = _costs(found), clock() - began > WALL_S and len(found) < len(MEASURED)
    gains = {rows: rows * costs[1] / costs[rows] for rows in found}
    best = max(gains, key=lambda rows: gains[rows])
    why, cost_of_passes = _ratio(costs, best), PassCost.of(found)
    most = best - 1
    if asked is not None:
        most, why = min(asked, len(costs) - 2), f"asked for; {why}"
    elif gains[best] < WORTH:
        most, why = 0, f"{why}, so that right guesses would bring {gains[best]:.2f} at most"
    return Lookahead(most, why, costs, again, cost_of_passes)


def _ratio(costs: tuple[float, ...], rows: int) -> str:
    rows = max(rows, 2)
    return f"a step of {rows} tokens costs {costs[rows] / costs[1]:.1f} × one of 1 ({1000 * costs[1]:.1f} ms)"


def _steps(
    context: llama.LlamaContext, slot: int, cost: Callable[[], float], late: Callable[[], bool]
) -> dict[int, float]:
    """The fastest step of each number of rows. One row is tried twice in a row: the graph of a step is used again by
    the next if that has as many rows, as it has when there are no guesses."""
    batch, found = llama.BatchBuffer(max(ROWS, HISTORY)), dict[int, float]()
    deadline = cost() + MEASURE_S
    _fill(batch, slot, 0, HISTORY)
    _step(context, batch, cost)
    for turn in range(ROUNDS):
        for rows in MEASURED:
            if (cost() > deadline or late()) and (turn or rows not in MEASURED[:2]):
                return found
            for _ in range(2 if rows == 1 else 1):
                _fill(batch, slot, HISTORY, rows)
                took = _step(context, batch, cost)
                context.cut(slot, HISTORY)
                found[rows] = min(took, found.get(rows, took))
            if found[1] > LONG_STEP and len(found) == 2:
                return found
    return found


def _fill(batch: llama.BatchBuffer, slot: int, at: int, rows: int) -> None:
    batch.size = rows
    batch.sequences[:rows] = slot
    batch.positions[:rows] = np.arange(at, at + rows)
    batch.tokens[:rows] = 0
    batch.wanted[:rows] = at > 0
    batch.wanted[rows - 1] = 1


def _step(context: llama.LlamaContext, batch: llama.BatchBuffer, cost: Callable[[], float]) -> float:
    began = cost()
    if context.decode(batch) != llama.OK:
        raise WorldError("llama.cpp could not decode a first step")
    context.logits(1)
    return cost() - began


def _costs(found: dict[int, float]) -> tuple[float, ...]:
    """By number of rows, up to the largest that was measured. A number in between costs as much as the next that was
    measured: the products of quantised matrices are made for 4 or 8 rows at a time, and 5 may take as long as 8."""
    costs, least = [0.0] * (max(found) + 1), float("inf")
    for rows in range(max(found), 0, -1):
        least = min(least, found.get(rows, least))
        costs[rows] = least
    return tuple(costs)


class GuessedCall(Protocol):
    """What is used of a call."""

    @property
    def order(self) -> int: ...  # its number
    @property
    def slot(self) -> int: ...
    @property
    def prompt(self) -> npt.NDArray[np.int32]: ...
    @property
    def out(self) -> list[int]: ...
    @property
    def limit(self) -> int: ...  # how many tokens `out` may hold


@dataclass(slots=True)
class _Record:
    """What is known of a call."""

    lookup: Lookup
    purse: float  # seconds that may be lost


@dataclass(slots=True)
class _Plan:
    sizes: list[int]  # guesses of each call
    seconds: float  # that the step will take,
    plain: float  # … and one without guesses
    payers: list[_Record]  # the calls with guesses


class Guesser:
    """Chooses the guesses of each step. `mixed`: one pass of the model computes rows of calls whatever their numbers
    are; else a step of calls with different numbers of rows takes several passes."""

    def __init__(self, ahead: Lookahead, mixed: bool) -> None:
        self.guessed = self.right = 0  # tokens
        self._mixed = mixed
        self.set(ahead)

    def set(self, ahead: Lookahead) -> None:
        """Use other measurements from now on."""
        self.ahead = ahead
        self._records: OrderedDict[int, _Record] = OrderedDict()
        self._sizes = (*(size for size in SIZES if size < ahead.most), ahead.most) if ahead.most else ()
        self._rows = len(ahead.seconds) - 1
        self._most_purse = PURSE * ahead.seconds[-1] if ahead.most else 0.0
        self._plan: _Plan | None = None

    def guesses(self, calls: Sequence[GuessedCall]) -> list[list[int]]:
        """The guesses of each of these calls (in ascending order of slots), [] if there are none in this step."""
        if not self._sizes or not 0 < len(calls) <= min(CALLS, self._rows):
            return []
        records = [self._record(call) for call in calls]
        self._plan = self._planned(calls, records)
        if self._plan is None:
            self._pay(records, LOSS * self.ahead.seconds[len(calls)])
            return []
        return [one.lookup.guess(size) if size else [] for one, size in zip(records, self._plan.sizes, strict=True)]

    def verified(self, calls: int, guessed: int, tokens: int) -> None:
        """Account for a step: its number of calls, of guesses computed, and of tokens that it has brought."""
        assert self._plan is not None
        self.guessed += guessed
        self.right += tokens - calls
        payers = self._plan.payers
        self._pay(payers, (tokens / calls * self._plan.plain - self._plan.seconds) / len(payers))

    def forget(self, call: GuessedCall) -> None:
        self._records.pop(call.order, None)

    def stats(self) -> dict[str, object]:
        return {"why": self.ahead.described, "guessed": self.guessed, "right": self.right}

    def _pay(self, records: Sequence[_Record], seconds: float) -> None:
        for record in records:
            record.purse = min(record.purse + seconds, self._most_purse)

    def _record(self, call: GuessedCall) -> _Record:
        record = self._records.pop(call.order, None)
        if record is None:
            seconds = self.ahead.seconds
            record = _Record(Lookup(call.prompt), seconds[min(FIRST + 1, self._rows)] - seconds[1])
        self._records[call.order] = record
        if len(self._records) > REMEMBERED:
            self._records.popitem(last=False)
        record.lookup.follow(call.out)
        return record

    def _planned(self, calls: Sequence[GuessedCall], records: Sequence[_Record]) -> _Plan | None:
        """The best plan: the calls with the most promising matches, 1 to all of them, have guesses of the same number.
        No call may get fewer tokens per second by it than if the calls took turns, each alone, so a call that copies
        nothing is not slowed down by those that copy. None: it is better to have no guesses, or they could cost more
        than the purses hold."""
        hopes = [(one.lookup.expected(self._sizes), i) for i, one in enumerate(records) if one.lookup.matched]
        if not hopes:
            return None
        hopes.sort(reverse=True, key=lambda hope: hope[0][-1])
        slots = [call.slot for call in calls]
        room = [call.limit - len(call.out) - 1 for call in calls]
        plain, alone = self._plain(slots), self.ahead.seconds[1] * len(calls)
        best, rate = None, GAIN * len(calls) / plain
        for number in range(1, len(hopes) + 1):
            for size in self._sizes:
                sizes, brings = [0] * len(calls), [1.0] * len(calls)
                for expected, i in hopes[:number]:
                    fits = [at for at, one in enumerate(self._sizes) if one <= min(size, room[i])]
                    if fits:
                        sizes[i], brings[i] = self._sizes[fits[-1]], expected[fits[-1]]
                if sum(sizes) + len(calls) > self._rows or not any(sizes):
                    break
                seconds = self._seconds(slots, [one + 1 for one in sizes])
                payers = [one for one, count in zip(records, sizes, strict=True) if count]
                if seconds > min(brings) * alone:
                    continue
                if sum(brings) > rate * seconds and seconds - plain <= sum(one.purse for one in payers):
                    best, rate = _Plan(sizes, seconds, plain, payers), sum(brings) / seconds
        return best

    def _plain(self, slots: list[int]) -> float:
        """Seconds of a step without guesses, in which gaps between the slots may be filled."""
        seconds = self._seconds(slots, [1] * len(slots))
        return seconds if self._mixed else seconds - saved_by_filling(slots, self.ahead.cost)

    def _seconds(self, slots: list[int], rows: list[int]) -> float:
        if self._mixed:
            return self.ahead.seconds[sum(rows)]
        return sum(self.ahead.seconds[one] for one in passes(slots, rows))
