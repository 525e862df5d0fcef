"""Draws one token from each row of logits (a row has one number for each token of the vocabulary).

The filters come in llama.cpp's default order: top-k, top-p, min-p, XTC, temperature, draw. (What changes a row before
that is in `penalties.py`.) The result depends only on the row, the parameters, the seed and the index of the token in
the generation: the random number is a hash of (seed, index). So a sampler has no state to save, restore or repeat, and
the other rows of a batch change nothing.

`Sampler` defines the result, in numpy. `Drawer` computes it for all rows of a step in one call of `native/sampling.c`.
Both do the same operations on doubles in the same order and give the same bits, so a text does not depend on whether
there was a compiler. Tokens whose logit is NaN or -inf are never drawn.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from aiosd.llm.arrays import Doubles, Ids, LogitRow

#: The result for a row in which no token can be drawn.
NOTHING = -1

_MASK = (1 << 64) - 1
_SECOND = 1 << 62  # added to the index for the second number that a token may need
_LEAST_WEIGHT = 1e-30  # tokens with less than this part of the likeliest token's weight are never drawn
_LARGEST = float(np.finfo(np.float32).max)


def uniform(seed: int, index: int) -> float:
    """A random number in [0, 1), always the same for the same (seed, index): splitmix64 over both."""
    x = (seed * 0xD1342543DE82EF95 + index * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & _MASK
    for _ in range(2):  # one round leaves neighbouring indices correlated with neighbouring seeds
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
        x ^= x >> 31
    return (x >> 11) * 2.0**-53


#: 1/13!, 1/12!, … 1/1!, 1/0!
_TAYLOR = (
    1.6059043836821613e-10,
    2.08767569878681e-09,
    2.505210838544172e-08,
    2.755731922398589e-07,
    2.7557319223985893e-06,
    2.48015873015873e-05,
    0.0001984126984126984,
    0.001388888888888889,
    0.008333333333333333,
    0.041666666666666664,
    0.16666666666666666,
    0.5,
    1.0,
    1.0,
)
_SHIFT = 6755399441055744.0  # 1.5 · 2^52: added and taken away again, it rounds to a whole number


def exponential(x: Doubles) -> Doubles:
    """e^x for x ≤ 0, and 0 below -708. Not numpy's function: its last bit depends on the processor."""
    at = np.maximum(x, -708.0)
    whole = (at * 1.4426950408889634 + _SHIFT) - _SHIFT
    r = (at - whole * 0.6931471803691238) - whole * 1.9082149292705877e-10
    p = np.full_like(r, _TAYLOR[0])
    for factor in _TAYLOR[1:]:
        p = p * r + factor
    return np.where(x < -708.0, 0.0, np.ldexp(p, whole.astype(np.int64)))


@dataclass(frozen=True, slots=True)
class Sampler:
    """The parameters of one call. With `temperature` 0 the most likely token is taken."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1

    def draw(self, row: LogitRow, index: int) -> int:
        """The token for place `index` of the generation, or NOTHING."""
        if self.temperature == 0:
            usable = np.where(np.isnan(row), -np.inf, row)
            best = int(usable.argmax())
            return best if usable[best] > -np.inf else NOTHING
        ids, weights = self.candidates(row, index)
        if not len(ids):
            return NOTHING
        cumulative = np.cumsum(weights)
        place = int(np.searchsorted(cumulative, uniform(self.seed, index) * cumulative[-1], side="right"))
        return int(ids[min(place, len(ids) - 1)])

    def candidates(self, row: LogitRow, index: int = 0) -> tuple[Ids, Doubles]:
        """The tokens that may be drawn, the likeliest first, and weights proportional to their probabilities."""
        ids, logits = self._by_logit(row)
        if not len(ids):
            return ids, logits
        weights = exponential(logits - logits[0])
        total = np.cumsum(weights)[-1]
        if not 0 < self.top_k < len(row):  # all tokens, in the order of their ids, as sampling.c adds them
            everything = np.minimum(row.astype(np.float64), _LARGEST)
            total = np.cumsum(exponential(np.where(everything > -np.inf, everything - logits[0], -1e9)))[-1]
        keep = weights >= max(self.min_p, _LEAST_WEIGHT)
        ids, weights, logits = ids[keep], weights[keep], logits[keep]
        if self.top_p < 1:
            enough = int(np.searchsorted(np.cumsum(weights), self.top_p * total)) + 1
            ids, weights, logits = ids[:enough], weights[:enough], logits[:enough]
        first = self._excluded(weights, index)
        ids, logits = ids[first:], logits[first:]
        with np.errstate(over="ignore"):  # at a tiny temperature all but the likeliest become impossible
            return ids, exponential((logits - logits[0]) / self.temperature)

    def _by_logit(self, row: LogitRow) -> tuple[Ids, Doubles]:
        """The tokens that can be drawn and that top-k leaves, the likeliest first, equal ones in order of their ids."""
        usable = np.where(np.isnan(row), -np.inf, row) if np.isnan(row.max()) else row
        least = -np.inf
        if 0 < self.top_k < len(row):
            least = np.partition(usable, len(row) - self.top_k)[len(row) - self.top_k]
        ids = np.flatnonzero((usable >= least) & (usable > -np.inf))
        logits = np.minimum(usable[ids].astype(np.float64), _LARGEST)
        order = np.lexsort((ids, -logits))
        if 0 < self.top_k < len(row):
            order = order[: self.top_k]
        return ids[order], logits[order]

    def _excluded(self, weights: Doubles, index: int) -> int:
        """XTC, "exclude top choices": how many of the likeliest tokens are left out. With the given probability these
        are all that have at least the threshold's share, except the last of them."""
        if self.xtc_probability <= 0 or self.xtc_threshold > 0.5 or len(weights) < 2:
            return 0
        if uniform(self.seed, index + _SECOND) > self.xtc_probability:
            return 0
        likely = weights[1:] >= self.xtc_threshold * np.cumsum(weights)[-1]
        return int(likely.sum())  # they are sorted


#: What is drawn from one row; the same layout as `params` in sampling.c.
DRAW = np.dtype(
    [
        ("temperature", np.float64),
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("xtc_probability", np.float64),
        ("xtc_threshold", np.float64),
        ("seed", np.uint64),
        ("index", np.int64),
        ("row", np.int64),
        ("top_k", np.int64),
    ]
)

Draws = npt.NDArray[Any]


def draws(wanted: Sequence[tuple[Sampler, int, int]]) -> Draws:
    """The array for these (sampler, index of the token, row of the logits). The engine increases `index` each step."""
    return np.array(
        [
            (s.temperature, s.top_p, s.min_p, s.xtc_probability, s.xtc_threshold, s.seed, index, row, s.top_k)
            for s, index, row in wanted
        ],
        DRAW,
    )


class Drawer:
    """Draws for all rows of a step. `native`: False means numpy, even where the part in C was compiled."""

    def __init__(self, native: bool = True) -> None:
        self._call = _native() if native else None
        self._scratch: npt.NDArray[np.uint8] = np.empty(0, np.uint8)

    @property
    def native(self) -> bool:
        return self._call is not None

    def draw(self, logits: LogitRow, wanted: Draws) -> list[int]:
        """A token (or NOTHING) for each of `wanted`. `logits`: a contiguous array, one row for each call."""
        if self._call is None:
            return [_sampler_of(draw).draw(logits[draw["row"]], int(draw["index"])) for draw in wanted]
        n, count = logits.shape[1], len(wanted)
        if len(self._scratch) < _SCRATCH * n:
            self._scratch = np.empty(_SCRATCH * n, np.uint8)
        tokens = np.empty(count, np.int32)
        self._call(logits.ctypes.data, n, wanted.ctypes.data, count, tokens.ctypes.data, self._scratch.ctypes.data)
        result: list[int] = tokens.tolist()
        return result

    def one(self, row: LogitRow, sampler: Sampler, index: int) -> int:
        """Draw from one row, which may hold only a part of the vocabulary. Returns the place in the row, or NOTHING."""
        return self.draw(np.ascontiguousarray(row)[np.newaxis], draws([(sampler, index, 0)]))[0]


_SCRATCH = 24  # bytes of working memory for each token of the vocabulary, as `aios_sampling_scratch` gives it


def _sampler_of(draw: Any) -> Sampler:
    return Sampler(
        temperature=float(draw["temperature"]),
        top_k=int(draw["top_k"]),
        top_p=float(draw["top_p"]),
        min_p=float(draw["min_p"]),
        seed=int(draw["seed"]),
        xtc_probability=float(draw["xtc_probability"]),
        xtc_threshold=float(draw["xtc_threshold"]),
    )


def _native() -> Callable[..., None] | None:
    """The function in C, or None where it was not compiled."""
    spec = importlib.util.find_spec("aiosd.llm._sampling")
    if spec is None or spec.origin is None:
        return None
    try:
        library = ctypes.CDLL(spec.origin)
    except OSError:
        return None
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.aios_sampling_scratch.argtypes, library.aios_sampling_scratch.restype = [integer], integer
    if library.aios_sampling_scratch(1) != _SCRATCH:
        return None
    library.aios_sampling_start(1)
    call: Any = library.aios_sample
    call.argtypes, call.restype = [pointer, integer, pointer, integer, pointer, pointer], None
    return call  # type: ignore[no-any-return]
