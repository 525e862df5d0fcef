"""Changes to a row of logits before a token is drawn from it: bias, the least number of tokens, penalties, DRY.

The order is llama.cpp's: bias, repeat penalty, presence and frequency penalty, DRY. The repeat penalty and DRY look at
the last tokens of prompt and output, as in llama.cpp. Presence and frequency penalty count the whole output and nothing
of the prompt, as in OpenAI's API, so that the words of a long prompt may be used in the answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from aiosd.llm.arrays import Ids, LogitRow, Tokens

#: How many tokens back the repeat penalty looks.
PENALTY_WINDOW = 64

SMALLEST_PENALTY = 1e-6  # this makes a recent token nearly certain; with a smaller one its logit could be infinite

_LARGEST_LOG = 88.7228391  # the logarithm of the largest float

_NO_IDS: Ids = np.zeros(0, np.int64)
_NO_BIAS: LogitRow = np.zeros(0, np.float32)

#: For each token that begins a breaker: all sequences of tokens that complete it (mostly the empty one).
Breakers = dict[int, list[tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Dry:
    """ "Don't repeat yourself": where the last tokens repeat earlier ones, the token that came next at that time
    becomes less likely. If at least `allowed_length` tokens are repeated, its logit is lowered by
    `multiplier` · `base` ^ (length - allowed_length). A repetition does not reach back over a breaker."""

    multiplier: float
    base: float
    allowed_length: int
    last_n: int
    breakers: Breakers = field(default_factory=dict)

    def apply(self, row: LogitRow, tokens: Sequence[int]) -> None:
        """`tokens`: prompt and output so far; the last `last_n` of them are looked at."""
        backwards = list(reversed(tokens[-self.last_n :]))
        limit = self._limit(backwards)
        if len(backwards) <= self.allowed_length or limit < self.allowed_length:
            return
        longest: dict[int, int] = {}
        for place, length in enumerate(repeats(backwards)):
            if place and min(length, limit) >= self.allowed_length:
                token = backwards[place - 1]  # the one that came next at that time
                longest[token] = max(longest.get(token, 0), min(length, limit))
        most = int(_LARGEST_LOG / math.log(self.base)) if self.base > 1.000001 else 0
        for token, length in longest.items():
            if () not in self.breakers.get(token, ()):
                power = length - self.allowed_length
                row[token] -= np.float32(self.multiplier * self.base ** (min(power, most) if most else power))

    def _limit(self, backwards: Sequence[int]) -> int:
        """How many tokens there are after the last breaker."""
        for place, token in enumerate(backwards):
            tails = [
                tail
                for tail in self.breakers.get(token, ())
                if len(tail) <= place and tail == tuple(backwards[place - len(tail) : place][::-1])
            ]
            if tails:
                return place - max(map(len, tails))
        return len(backwards)


def repeats(tokens: Sequence[int]) -> list[int]:
    """For each place, how many tokens from there on equal the tokens from the beginning on: the Z function. It takes
    linear time: inside the last stretch that equals the beginning, results for the beginning are used again."""
    count = len(tokens)
    found = [count] + [0] * (count - 1) if count else []
    left = right = 0
    for place in range(1, count):
        same = min(right - place, found[place - left]) if place < right else 0
        while place + same < count and tokens[same] == tokens[place + same]:
            same += 1
        found[place] = same
        if place + same > right:
            left, right = place, place + same
    return found


def penalise(row: LogitRow, recent: Sequence[int], penalty: float) -> None:
    """Make every token of `recent` less likely (penalty > 1), or more (penalty < 1)."""
    penalty = max(penalty, SMALLEST_PENALTY)
    ids = np.unique(np.asarray(recent, dtype=np.int64))
    values = row[ids]
    row[ids] = np.where(values > 0, values / penalty, values * penalty)


@dataclass(frozen=True, slots=True)
class Edits:
    """The changes that one call wants in every row. `ends`: tokens that are forbidden before `min_tokens` are there."""

    bias_ids: Ids = field(default_factory=lambda: _NO_IDS)
    bias: LogitRow = field(default_factory=lambda: _NO_BIAS)
    min_tokens: int = 0
    ends: Ids = field(default_factory=lambda: _NO_IDS)
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    dry: Dry | None = None

    @property
    def none(self) -> bool:
        plain = self.repeat_penalty == 1 and not self.presence_penalty and not self.frequency_penalty
        return plain and not len(self.bias_ids) and not self.min_tokens and self.dry is None

    def apply(self, row: LogitRow, prompt: Tokens, out: list[int]) -> None:
        """Change the row, in place, from which the token after `out` will be drawn."""
        if len(self.bias_ids):
            row[self.bias_ids] += self.bias
        if len(out) < self.min_tokens:
            row[self.ends] = -np.inf
        if self.repeat_penalty != 1:
            recent = last_tokens(prompt, out, PENALTY_WINDOW)
            penalise(row, recent, self.repeat_penalty)
        if out and (self.presence_penalty or self.frequency_penalty):
            ids, counts = np.unique(np.asarray(out, np.int64), return_counts=True)
            row[ids] -= (counts * self.frequency_penalty + self.presence_penalty).astype(np.float32)
        if self.dry is not None:
            self.dry.apply(row, last_tokens(prompt, out, self.dry.last_n))


def last_tokens(prompt: Tokens, out: list[int], count: int) -> list[int]:
    """The last `count` tokens of prompt and output together."""
    tail = out[-count:]
    missing = count - len(tail)
    return [*prompt[-missing:].tolist(), *tail] if missing else tail
