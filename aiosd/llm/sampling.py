"""One token from one row of logits.

The order of the filters is llama.cpp's default: repeat penalty, top-k, top-p, min-p, temperature, draw. What is
drawn depends on the logits, the parameters, the seed and the index of the token alone: the generator is a hash
of (seed, index), so a sampler has no state to save, restore or replay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Row = npt.NDArray[np.float32]

#: How many tokens back the repeat penalty looks.
PENALTY_WINDOW = 64

_MASK = (1 << 64) - 1


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that belongs to (seed, index): splitmix64 over both."""
    x = (seed * 0xD1342543DE82EF95 + index * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & _MASK
    for _ in range(2):  # one round leaves neighbouring indices correlated with neighbouring seeds
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
        x ^= x >> 31
    return (x >> 11) * 2.0**-53


SMALLEST_PENALTY = 1e-6  # makes a recent token certain; much less would make its logit infinite


def penalise(row: Row, recent: Sequence[int], penalty: float) -> Row:
    """A copy of `row` in which every token of `recent` is less likely (penalty > 1), or more (penalty < 1)."""
    penalty = max(penalty, SMALLEST_PENALTY)
    row = row.copy()
    ids = np.unique(np.asarray(recent, dtype=np.int64))
    values = row[ids]
    row[ids] = np.where(values > 0, values / penalty, values * penalty)
    return row


@dataclass(frozen=True, slots=True)
class Sampler:
    """The parameters of one call. `temperature` 0 takes the most likely token."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    seed: int

    @property
    def plain(self) -> bool:
        """Is it the arg max of the untouched row? Then the engine does it for all rows at once."""
        return self.temperature == 0 and self.repeat_penalty == 1

    def prepare(self, row: Row, recent: Sequence[int]) -> Row:
        """The row with the penalty applied; what `draw` and a grammar work on."""
        return row if self.repeat_penalty == 1 or not recent else penalise(row, recent, self.repeat_penalty)

    def draw(self, row: Row, index: int) -> int:
        """The token for place `index` of the generation, from a prepared row. -inf entries are never taken."""
        if self.temperature == 0:
            return int(row.argmax())
        ids, probabilities = self.candidates(row)
        cumulative = np.cumsum(probabilities)
        place = int(np.searchsorted(cumulative, uniform(self.seed, index) * cumulative[-1], side="right"))
        return int(ids[min(place, len(ids) - 1)])

    def candidates(self, row: Row) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """The tokens that may be drawn, the likeliest first, with probabilities that add up to 1."""
        ids = self._top_k(row)
        logits = row[ids].astype(np.float64)
        weights = np.exp(logits - logits.max())
        total = weights.sum()
        # Whatever min-p leaves is a head of the sorted list, and so is what top-p leaves: sort only the shorter.
        keep = weights >= max(self.min_p, 1e-30)
        ids, weights, logits = ids[keep], weights[keep], logits[keep]
        order = np.lexsort((ids, -weights))
        ids, weights, logits = ids[order], weights[order], logits[order]
        if self.top_p < 1:
            enough = int(np.searchsorted(np.cumsum(weights), self.top_p * total)) + 1
            ids, logits = ids[:enough], logits[:enough]
        with np.errstate(over="ignore"):  # next to no temperature: what is not the likeliest is impossible
            heated = np.exp((logits - logits[0]) / self.temperature)
        return ids, heated / heated.sum()

    def _top_k(self, row: Row) -> npt.NDArray[np.int64]:
        if 0 < self.top_k < len(row):
            # Ties at the edge: all ids with a value above it, then the lowest ids with that value.
            edge = np.partition(row, len(row) - self.top_k)[len(row) - self.top_k]
            above = np.flatnonzero(row > edge)
            return np.concatenate([above, np.flatnonzero(row == edge)[: self.top_k - len(above)]])
        return np.arange(len(row), dtype=np.int64)
