"""Guesses the next tokens of a call: those that came where its last tokens stood before, in its prompt or its output.

Agents copy: a tool's output into an answer, a file into an edit of it. A table has, for each run of three tokens (a
*gram*), where it ended last, and each place knows the one before it with the same gram. When the last tokens of a call
are such a gram, a *match* begins: of the last few places the one that agrees with the end for longest. The tokens
behind it are the guess. While the tokens that come are those of the guess, the match goes on and gets longer, without
another search.

How far a guess is to be believed is counted for each call, by the length of the match. Every token that comes is
compared with the one that was expected, whether or not a step has computed guesses. So counting costs no decoding, and
a call for which guessing has stopped is found to copy again.

Pure. All costs are bounded: a token takes one look-up, the beginning of a match a few comparisons, whatever the length
of the text; and of a text only the last tokens are remembered.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

GRAM = 3

#: Places that are compared when a match begins, and how many tokens at most.
PLACES, LONGEST = 16, 32

#: At least this many tokens are remembered, and at most twice as many. (Each takes some 200 bytes.)
REACH = 8192

#: Matches of fewer tokens than the first number belong to the first class, and so on; the part of the guesses that is
#: believed to be right in each class, counted as WEIGHT tokens that were compared. What was compared earlier counts
#: FORGET times as much with each token.
CLASSES = (5, 8, 16)
BELIEF, WEIGHT, FORGET = (0.4, 0.6, 0.85, 0.95), 4.0, 0.95

_BITS = 21  # of a token: more than any vocabulary needs


class Lookup:
    """The last tokens of one call, where their grams stand, and the match with what came before."""

    def __init__(self, prompt: npt.NDArray[np.int32]) -> None:
        self.matched = 0  # tokens of the match; 0: there is none
        self._next = 0  # the place of the token that the match expects
        self._seen = 0  # tokens of the output so far
        self._right = [belief * WEIGHT for belief in BELIEF]
        self._compared = [WEIGHT] * len(BELIEF)
        self._tokens: list[int] = []
        self._restart(prompt[-REACH:])
        self._find()

    def _restart(self, tokens: npt.NDArray[np.int32]) -> None:
        """Remember these tokens and no others."""
        self._tokens = tokens.tolist()
        ends, before = _places(tokens)
        self._ends: dict[int, int] = ends  # by gram: behind its last place
        self._before: list[int] = before  # behind the place before that with the same gram, 0: there is none

    def follow(self, out: Sequence[int]) -> None:
        """`out`: the whole output, of which the tokens that are new are added."""
        new, self._seen = out[self._seen :], len(out)
        if len(new) > REACH:  # it was forgotten, or began elsewhere: what happened to its guesses is not counted
            self.matched = 0
            self._restart(np.array(new[-REACH:], np.int32))
            self._find()
            return
        for token in new:
            self._add(token)
        if len(self._tokens) > 2 * REACH:
            dropped = len(self._tokens) - REACH
            self._restart(np.array(self._tokens[dropped:], np.int32))
            self._next -= dropped
            if self._next <= 0:
                self.matched = 0
                self._find()

    def _add(self, token: int) -> None:
        tokens = self._tokens
        if self.matched:
            self._compare(tokens[self._next] == token)
        tokens.append(token)
        end = len(tokens)
        before = 0
        if end >= GRAM:
            gram = (tokens[-3] << 2 * _BITS) | (tokens[-2] << _BITS) | token
            before = self._ends.get(gram, 0)
            self._ends[gram] = end
        self._before.append(before)
        if before and not self.matched:
            self._find()

    def _compare(self, right: bool) -> None:
        """Count whether a token was the expected one, and go on with the match or end it."""
        kind = bisect_right(CLASSES, self.matched)
        self._right[kind] = self._right[kind] * FORGET + right
        self._compared[kind] = self._compared[kind] * FORGET + 1
        self.matched = self.matched + 1 if right else 0
        self._next += 1

    def _find(self) -> None:
        """Begin the longest match with the last tokens."""
        tokens, end = self._tokens, len(self._tokens)
        place = self._before[end] if end else 0
        for _ in range(PLACES):
            if not place or self.matched == LONGEST:
                return
            length = GRAM
            most = min(LONGEST, place)
            while length < most and tokens[place - length - 1] == tokens[end - length - 1]:
                length += 1
            if length > self.matched:
                self.matched, self._next = length, place
            place = self._before[place]

    def guess(self, count: int) -> list[int]:
        """The next `count` tokens, after a match. A text that repeats itself is expected to go on with that."""
        found = self._tokens[self._next : self._next + count]
        return (found * (count // len(found) + 1))[:count]

    def expected(self, counts: Sequence[int]) -> list[float]:
        """For each of these numbers of guesses (ascending), how many tokens a step is expected to bring: those that are
        right, up to the first wrong one, and the one that is drawn after them."""
        found, total, chance, length = [], 1.0, 1.0, self.matched
        for count in counts:
            while length < self.matched + count:
                kind = bisect_right(CLASSES, length)
                chance *= self._right[kind] / self._compared[kind]
                total += chance
                length += 1
            found.append(total)
        return found


def _places(tokens: npt.NDArray[np.int32]) -> tuple[dict[int, int], list[int]]:
    """Behind the last place of each gram, and for each end of a gram behind the place before it. All at once, in numpy:
    a prompt may be long."""
    count = len(tokens) - GRAM + 1
    before = np.zeros(len(tokens) + 1, np.int64)
    if count <= 0:
        return {}, before.tolist()
    wide = tokens.astype(np.int64)
    grams = (wide[:-2] << 2 * _BITS) | (wide[1:-1] << _BITS) | wide[2:]
    order = np.argsort(grams, kind="stable")
    same = grams[order[1:]] == grams[order[:-1]]
    before[order[1:][same] + GRAM] = order[:-1][same] + GRAM
    return dict(zip(grams.tolist(), range(GRAM, len(tokens) + 1), strict=True)), before.tolist()
