"""Prompt lookup: the next tokens guessed from where the last few stood before, and all verified in one pass.

An agent copies: a tool's output into its answer, a file into an edit of it. Where the last tokens of a call have stood
before, in its prompt or its output, what came after them then is a *draft*. A step then computes the rows of all tokens
of the draft at once; each is drawn as always, with the generator's number for its place, and as long as what is drawn
is what the draft says, the next row counts as well. So the text is the same as without drafts, greedy or seeded, and
a wrong draft costs time, never a token.

Whether a draft is worth its time is reckoned: what a pass of so many tokens takes is measured, and how often drafts
after a match of such a length were right is counted for each call. For a few calls only: in a crowd the rows of others
fill a pass better than guesses do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

MOST_CALLS = 4
MOST_ROWS = 36  # in one pass, the rows of the drafts and one for each call
SIZES = (3, 7, 15, 31)  # tokens of a draft

_GRAM = 3  # tokens that must match at least
_PLACES = 8  # of each three tokens, the last so many places are remembered
_LONGEST = 32  # matches are compared so far back
_REMEMBERED = 8192  # tokens of a prompt, the last ones

#: The length of a match from which on it belongs to the next class, and what is believed of each class at first:
#: that so many of the tokens of a draft are right, as if seen in so many tokens.
_CLASSES = (3, 6, 12)
_BELIEF = (0.5, 0.75, 0.9)
_WEIGHT = 3.0
_FORGET = 0.9  # what was counted before weighs so much less with each draft

_QUICKER, _SLOWER = 0.3, 0.03
_GAIN = 1.05  # a pass with a draft must promise to be so much better


class Lookup:
    """The tokens of one call, and where each three of them stand."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.matched = 0  # tokens before the draft that is being verified
        self._tokens: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}
        self._first = len(prompt)  # how many of the tokens are no output
        self._right = [belief * _WEIGHT for belief in _BELIEF]
        self._tried = [_WEIGHT] * len(_BELIEF)
        self._extend(prompt)

    def follow(self, out: list[int]) -> None:
        """What came since the last time."""
        self._extend(out[len(self._tokens) - self._first :])

    def _extend(self, tokens: Sequence[int]) -> None:
        known, places = self._tokens, self._places
        for token in tokens:
            known.append(token)
            end = len(known)
            if end >= _GRAM:
                found = places.setdefault(tuple(known[end - _GRAM :]), [])
                found.append(end)
                if len(found) > _PLACES:
                    del found[0]

    def match(self) -> tuple[int, int]:
        """Where the draft begins, after the longest match with the end, the last of equals; and how long that is."""
        tokens, end = self._tokens, len(self._tokens)
        best = (0, 0)
        for place in self._places.get(tuple(tokens[end - _GRAM :]), ()):
            if place < end:
                length = _GRAM
                while length < min(_LONGEST, place) and tokens[place - length - 1] == tokens[end - length - 1]:
                    length += 1
                best = max(best, (length, place))
        return best[1], best[0]

    def draft(self, place: int, size: int) -> list[int]:
        """Text that repeats itself goes on beyond its end."""
        tokens = self._tokens[place : place + size]
        return (tokens * (size // len(tokens) + 1))[:size]

    def trust(self) -> float:
        """The chance that the next token of a draft is right, after a match of so many tokens."""
        kind = _class(self.matched)
        return self._right[kind] / self._tried[kind]

    def learn(self, right: int, size: int) -> None:
        """Of a draft of `size` tokens the first `right` were."""
        kind = _class(self.matched)
        self._right[kind] = self._right[kind] * _FORGET + right
        self._tried[kind] = self._tried[kind] * _FORGET + min(right + 1, size)


def _class(match: int) -> int:
    return max(kind for kind, least in enumerate(_CLASSES) if match >= least)


class Generation(Protocol):
    """What is used of a call."""

    prompt: npt.NDArray[np.int32]
    out: list[int]
    limit: int
    lookup: Lookup | None

    @property
    def replaying(self) -> bool: ...


class Guesser:
    """Drafts for the calls of a step, when they are worth it."""

    def __init__(self, prefill: Callable[[], float]) -> None:
        self.costs = Costs(prefill)
        self.drafted = self.right = 0  # tokens

    def drafts(self, calls: Sequence[Generation]) -> list[list[int]]:
        """One for each call, all of one size (else a batch is cut into several passes); []: better none."""
        if not 0 < len(calls) <= MOST_CALLS:
            return []
        found: list[tuple[Lookup, int]] = []
        for call in calls:
            lookup = call.lookup
            if lookup is None:
                lookup = call.lookup = Lookup(call.prompt[-_REMEMBERED:].tolist())
            lookup.follow(call.out)
            place, lookup.matched = lookup.match()
            if not lookup.matched or call.replaying:
                return []
            found.append((lookup, place))
        most = min(call.limit - len(call.out) for call in calls) - 1
        size = best_size(self.costs, [lookup.trust() for lookup, _ in found], most)
        return [lookup.draft(place, size) for lookup, place in found] if size else []


class Costs:
    """What passes take, by calls and tokens of each. A quicker one is believed sooner than a slower one, which tells
    more about what else the machine did."""

    def __init__(self, prefill: Callable[[], float]) -> None:
        self._prefill = prefill  # seconds for a token of a prompt; 0: not known yet
        self._seconds: dict[tuple[int, int], float] = {}

    def learn(self, calls: int, size: int, seconds: float) -> None:
        """A pass of `calls` with drafts of `size`, 0 for none."""
        known = self._seconds.get((calls, size), seconds)
        self._seconds[calls, size] = known + (_QUICKER if seconds < known else _SLOWER) * (seconds - known)

    def of(self, calls: int, size: int) -> float | None:
        """None: nobody knows."""
        known = self._seconds.get((calls, size))
        alone, each = self._seconds.get((calls, 0)), self._prefill()
        if known is not None or alone is None or not each:
            return known
        return alone + 1.5 * calls * size * each  # until it has been tried


def best_size(costs: Costs, trusts: Sequence[float], most: int) -> int:
    """How many tokens to draft for each of some calls; 0: not worth it."""
    calls = len(trusts)
    plain = costs.of(calls, 0)
    best, speed = 0, _GAIN * calls / plain if plain else 0.0
    for size in SIZES:
        seconds = costs.of(calls, size)
        if size > most or (size + 1) * calls > MOST_ROWS or not seconds or not speed:
            break
        promised = sum(expected(trust, size) for trust in trusts) / seconds
        if promised > speed:
            best, speed = size, promised
    return best


def expected(trust: float, size: int) -> float:
    """Tokens from a pass: those of the draft that are right, and one more."""
    trust = min(trust, 0.995)
    return float((1 - trust ** (size + 1)) / (1 - trust))
