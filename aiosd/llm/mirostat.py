"""Mirostat (Basu et al., 2020), versions 1 and 2: keeps the surprise of the text near a target.

The surprise of a token is -log2 of its probability. `mu` is the largest surprise that is allowed; it changes with each
token that is drawn. It is the only state that any sampler has. A call keeps it when it loses its slot. It is sent to
the kernel with the tokens, so that after the death of the model's process the call continues with it. Only if the
kernel dies, too, before it has got any tokens, does `mu` begin anew.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from aiosd.llm.arrays import Doubles, LogitRow
from aiosd.llm.sampling import NOTHING, uniform

#: Version 1 estimates from this number of the likeliest tokens how fast the probabilities fall.
_LOOKED_AT = 100


class Mirostat:
    """The state of one call. `version`: 1 or 2; `tau`: the target surprise in bits; `eta`: how fast `mu` follows."""

    def __init__(self, version: int, tau: float, eta: float, temperature: float, seed: int) -> None:
        self._version, self._tau, self._eta = version, tau, eta
        self._temperature, self._seed = temperature, seed
        self.mu = 2 * tau
        self._surprise = tau

    def draw(self, row: LogitRow, index: int) -> int:
        """The token for place `index`, or NOTHING. If it is called again for the same place, the last result counts."""
        ids, probabilities = _sorted(row, self._temperature)
        if not len(ids):
            return NOTHING
        count = self._count_1(probabilities, len(row)) if self._version == 1 else self._count_2(probabilities)
        cumulative = np.cumsum(probabilities[:count])
        place = int(np.searchsorted(cumulative, uniform(self._seed, index) * cumulative[-1], side="right"))
        place = min(place, count - 1)
        self._surprise = -math.log2(probabilities[place] / cumulative[-1])
        return int(ids[place])

    def learn(self) -> None:
        """The token that was drawn last is now part of the text: adapt `mu`."""
        self.mu -= self._eta * (self._surprise - self._tau)

    def _count_2(self, probabilities: Doubles) -> int:
        """Version 2: how many tokens have a surprise of at most `mu`; at least 1."""
        return max(int((-np.log2(probabilities) <= self.mu).sum()), 1)

    def _count_1(self, probabilities: Doubles, vocabulary: int) -> int:
        """Version 1: how many tokens to keep, computed from an estimate of Zipf's exponent."""
        head = probabilities[:_LOOKED_AT]
        if len(head) < 2:
            return 1
        steps = np.log(np.arange(2, len(head) + 1) / np.arange(1, len(head)))
        falls = np.log(head[:-1] / head[1:])
        exponent = float((steps * falls).sum() / (steps * steps).sum())
        excess = exponent - 1
        if exponent <= 0 or excess == 0:
            return len(probabilities)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            bound = np.float64(excess * 2.0**self.mu) / (1 - np.float64(vocabulary) ** -excess)
            count = float(np.power(bound, 1 / exponent))
        return len(probabilities) if not count < len(probabilities) else max(int(count), 1)


def _sorted(row: LogitRow, temperature: float) -> tuple[npt.NDArray[np.int64], Doubles]:
    """The tokens that can be drawn, the likeliest first, and their probabilities."""
    ids = np.flatnonzero(row > -np.inf)
    if not len(ids):
        return ids, np.zeros(0)
    logits = np.minimum(row[ids].astype(np.float64), np.finfo(np.float32).max)
    with np.errstate(over="ignore"):
        weights = np.exp((logits - logits.max()) / temperature)
    keep = weights > 0
    ids, weights = ids[keep], weights[keep]
    order = np.lexsort((ids, -weights))
    return ids[order], weights[order] / weights.sum()
