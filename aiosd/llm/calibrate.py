"""How many tokens of prompts are computed in one batch, where that is measured (`--kv-layout unified`).

A GPU computes more tokens per second the more there are in a batch, up to a number that depends on card and model. A
larger batch only keeps other calls waiting. So batches of growing size are tried, and the smallest that is nearly as
fast as the fastest is used. What comes out is also the first estimate of how much of a prompt a step has time for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from aiosd.errors import WorldError
from aiosd.llm import llama

#: The smallest batch that is tried; each next one is twice as large.
SMALLEST = 256

#: No batch is tried that would likely end after MEASURE_S seconds.
MEASURE_S = 1.0

#: A batch is large enough if it computes at least this part of the most tokens per second.
NEARLY = 0.95


@dataclass(frozen=True, slots=True)
class PromptBatch:
    tokens: int
    rate: float  # tokens per second; 0: not measured
    why: str  # for people


def measure(
    context: llama.LlamaContext, seconds: float = MEASURE_S, clock: Callable[[], float] = time.perf_counter
) -> PromptBatch:
    """Compute prompts in the context, which must be empty and is left empty."""
    most = min(context.ubatch, context.cells)
    sizes = [size for size in (SMALLEST << i for i in range(16)) if size < most]
    rates: dict[int, float] = {}
    began = clock()
    for size in [*sizes, most]:
        took = _compute(context, size, clock)
        if took < seconds / 4:  # the first of a size also builds its graph
            took = min(took, _compute(context, size, clock))
        rates[size] = size / took
        if clock() - began + 4 * took > seconds:  # the next one takes up to twice as long, and is tried twice
            break
    best = max(rates.values())
    chosen = min(size for size, rate in rates.items() if rate >= NEARLY * best)
    tried = ", ".join(f"{size}: {rate:.0f}" for size, rate in rates.items())
    return PromptBatch(chosen, rates[chosen], f"measured ({tried} tokens/s)")


def _compute(context: llama.LlamaContext, size: int, clock: Callable[[], float]) -> float:
    """Seconds for a batch of `size` tokens of one prompt."""
    batch = llama.BatchBuffer(size)
    batch.size = size
    batch.tokens[:] = (np.arange(size) * 37 + 11) % context.n_vocab
    batch.positions[:] = np.arange(size)
    batch.wanted[-1] = 1
    began = clock()
    if context.decode(batch) != llama.OK:
        raise WorldError(f"llama.cpp could not decode a first batch of {size} tokens")
    context.logits(1)  # waits until a GPU is done
    took = clock() - began
    context.clear()
    return took
