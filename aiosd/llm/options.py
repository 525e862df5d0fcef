"""Makes the objects with which the engine chooses tokens from the sampling parameters of a call."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from aiosd.llm import llama
from aiosd.llm.mirostat import Mirostat
from aiosd.llm.penalties import Breakers, Dry, Edits
from aiosd.llm.sampling import Sampler
from libaios.wire import BREAKERS, Sampling

_REMEMBERED = 16  # how many sets of breakers are kept: finding one needs a look at the whole vocabulary
_LONGEST_TAIL = 20  # how many tokens are compared, at most, after the one in which a breaker begins


@dataclass(frozen=True, slots=True)
class SamplerChain:
    """How the tokens of one call are chosen."""

    sampler: Sampler
    edits: Edits | None
    mirostat: Mirostat | None
    stops: frozenset[int]  # tokens that end the call; they are not part of its output
    top_logprobs: int | None  # how many alternatives come with each log probability; None: no log probabilities


class SamplerFactory:
    """Makes a `SamplerChain` for each call of one model."""

    def __init__(self, model: llama.Model) -> None:
        self._model = model
        self._breakers: OrderedDict[tuple[str, ...], Breakers] = OrderedDict()

    def chain(self, sampling: Sampling, constrained: bool) -> SamplerChain:
        ends = frozenset() if sampling.ignore_eos and not constrained else self._model.end_tokens
        stops = ends | frozenset(sampling.stop_tokens)
        edits = self._edits(sampling, stops)
        return SamplerChain(
            sampler=_sampler(sampling),
            edits=None if edits.none else edits,
            mirostat=_mirostat(sampling),
            stops=stops,
            top_logprobs=min(sampling.top_logprobs, self._model.n_vocab) if sampling.logprobs else None,
        )

    def _edits(self, sampling: Sampling, stops: frozenset[int]) -> Edits:
        return Edits(
            bias_ids=np.array(list(sampling.logit_bias), np.int64),
            bias=np.array(list(sampling.logit_bias.values()), np.float32),
            min_tokens=sampling.min_tokens,
            # Also with ignore_eos: end tokens have no text and must not count towards the least number of tokens.
            ends=np.array(sorted(stops | self._model.end_tokens), np.int64),
            repeat_penalty=sampling.repeat_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            dry=self._dry(sampling),
        )

    def _dry(self, sampling: Sampling) -> Dry | None:
        if not sampling.dry_multiplier or not sampling.dry_last_n:
            return None
        return Dry(
            multiplier=sampling.dry_multiplier,
            base=sampling.dry_base,
            allowed_length=sampling.dry_allowed_length,
            last_n=sampling.dry_last_n,
            breakers=self._breakers_of(BREAKERS if sampling.dry_breakers is None else tuple(sampling.dry_breakers)),
        )

    def _breakers_of(self, texts: tuple[str, ...]) -> Breakers:
        found = self._breakers.get(texts)
        if found is None:
            found = self._breakers[texts] = self._find_breakers(texts)
            if len(self._breakers) > _REMEMBERED:
                self._breakers.popitem(last=False)
        return found

    def _find_breakers(self, texts: tuple[str, ...]) -> Breakers:
        """The tokens that contain one of these texts, and those that end with the beginning of one, each with the
        tokens of the rest that must follow."""
        found: Breakers = {}
        for text in texts:
            wanted = text.encode(errors="replace")
            for token, piece in enumerate(self._model.pieces):
                for rest in _rests(piece, wanted):
                    tail = self._model.tokenize(rest.decode(errors="replace"), bos=False, special=False) if rest else []
                    found.setdefault(token, []).append(tuple(tail[:_LONGEST_TAIL]))
        return found


def _rests(piece: bytes, wanted: bytes) -> list[bytes]:
    """What is missing of `wanted` after `piece`: nothing if the piece contains it, else one rest for each beginning of
    `wanted` with which the piece ends."""
    if wanted in piece:
        return [b""]
    heads = range(1, min(len(piece), len(wanted) - 1) + 1)
    return [wanted[head:] for head in heads if piece.endswith(wanted[:head])]


def _sampler(sampling: Sampling) -> Sampler:
    return Sampler(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=sampling.seed,
        xtc_probability=sampling.xtc_probability,
        xtc_threshold=sampling.xtc_threshold,
    )


def _mirostat(sampling: Sampling) -> Mirostat | None:
    """None also at temperature 0, where the likeliest token is taken and nothing is drawn."""
    if not sampling.mirostat or not sampling.temperature:
        return None
    return Mirostat(
        sampling.mirostat, sampling.mirostat_tau, sampling.mirostat_eta, sampling.temperature, sampling.seed
    )
