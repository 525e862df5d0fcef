"""Tests whether the result for a token depends on what else is in its batch. `--exact` promises that it does not.

With some files it does depend: from a certain number of rows on, other code computes the product of a K-quantised
matrix, and rounds in another way. The files and the number depend on processor and build, so it is tested: the same
tokens in batches of several sizes must leave the same state, bit for bit, and the same logits. (A state contains every
token and every layer, but nothing of what comes behind the last layer's keys and values.)
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from aiosd.errors import WorldError
from aiosd.llm import llama
from aiosd.llm.blob import Bytes

#: Tokens of a prompt, and the batch sizes in which it is computed; never one token alone, see `engine.py`.
TOKENS = 20
CUTS = ((20,), (2,) * 10, (3, 5, 12), (8, 7, 5))

#: Most rows of the decode step that is tried.
ROWS = 16


def holds(context: llama.LlamaContext, slots: int) -> bool:
    """Is the promise kept? Leaves the context empty."""
    prompts = [_prompt(context, cut) for cut in CUTS]
    most = min(slots, ROWS)
    steps = [_step(context, rows) for rows in {2, 3, 4, most - 1, most} if 2 <= rows <= slots]
    context.clear()
    return _all_equal(prompts) and _all_equal(steps)


def _all_equal(states: list[Bytes]) -> bool:
    return all(np.array_equal(state, states[0]) for state in states[1:])


def _prompt(context: llama.LlamaContext, sizes: Iterable[int]) -> Bytes:
    """The state after a prompt that is computed in batches of these sizes."""
    context.clear()
    at = 0
    for size in sizes:
        _decode(context, [(0, position) for position in range(at, at + size)])
        at += size
    return context.read(0).copy()


def _step(context: llama.LlamaContext, rows: int) -> Bytes:
    """`rows` sequences with a prompt of two tokens each and one more token: state and logits of the first of them."""
    context.clear()
    for row in range(rows):
        _decode(context, [(row, 0), (row, 1)])
    _decode(context, [(row, 2) for row in range(rows)], logits=True)
    return np.concatenate([context.read(0), context.logits(1).view(np.uint8).ravel()])


def _decode(context: llama.LlamaContext, entries: list[tuple[int, int]], logits: bool = False) -> None:
    batch = llama.BatchBuffer(len(entries))
    batch.size = len(entries)
    batch.wanted[:] = logits
    batch.sequences[:], batch.positions[:] = np.array(entries).T
    batch.tokens[:] = (batch.positions * 37 + batch.sequences + 11) % context.n_vocab
    if context.decode(batch) != llama.OK:
        raise WorldError("llama.cpp could not decode a first batch")
