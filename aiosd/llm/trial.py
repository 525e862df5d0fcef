"""A test of aiosd's own attention, before a model is served with it.

These things could be wrong: the nodes of a graph mean something else than assumed, a state has its parts in another
order, or threads or instructions fail. So some tokens are computed, and each attention is compared with exact
arithmetic, in double precision, on the same inputs: llama.cpp's (if its operation means something else, it is far off),
aiosd's in its place, and aiosd's with the beginning read from a base.

Comparing logits would not do. A quantised model rounds its activations to 8 bits before each product, so a difference
in the last bit of one node becomes some percent of the logits: llama.cpp's own two attentions are 3 to 10 % apart.
"""

from __future__ import annotations

import numpy as np

from aiosd.llm import llama
from aiosd.llm.blob import StateLayout

#: Tokens of the prompt (the smallest context has room for more); (first, count) of each batch: the prompt, then more.
SAMPLE = 12
_PARTS = ((0, SAMPLE), (SAMPLE, 2), (SAMPLE + 2, 1))

#: How far an attention may be from exact arithmetic, as a part of the largest value. Ours computes with 32-bit floats;
#: llama.cpp's rounds queries and sums to 16 bits, which causes errors of some percent where scores are large.
OURS, THEIRS = 0.002, 0.15


def held_against(context: llama.LlamaContext) -> str:
    """Why this context must not be used with our attention, '' if it may. Leaves the context empty."""
    own = context.attention
    assert own is not None
    own.enabled = False
    with own.judged():
        decoded = _decode_sample(context)
    own.enabled = True
    with own.judged():
        decoded = decoded and _decode_sample(context)
    if decoded:
        decoded = _from_a_base(context)
    context.clear()
    if not decoded:
        return "llama.cpp could not decode a first batch"
    if own.refusal:
        return own.refusal
    if not own.used:
        return "the model's graph has no attention that could be replaced"
    return _verdict(*own.errors)


def _verdict(theirs: float, ours: float, based: float) -> str:
    if theirs > THEIRS:
        return f"llama.cpp means something else by attention in this model: {theirs:.1%} from what we take it for"
    if ours > OURS:
        return f"ours would be wrong for this model by {ours:.1%}"
    if based > OURS:
        return f"ours would be wrong for this model by {based:.1%} where beginnings are shared"
    return ""


def _from_a_base(context: llama.LlamaContext) -> bool:
    """Compute one more token, by llama.cpp, and by us with the prompt read from a base. False: llama.cpp cannot."""
    own, state = context.attention, context.read(0)
    assert own is not None
    layout = StateLayout.of(state)
    if layout is None or not (layout.by_rows and layout.in_one) or len(layout.sizes) != 2 * context.n_layer:
        return True  # nothing will be read from a base, see `Cache`
    piece = layout.cut(state, 0, context.last_position(0) + 1, 0, SAMPLE)
    own.set_layout(layout.sizes)
    own.set_runs([(piece.data.ctypes.data, piece.length)])
    own.base_length[0], own.enabled = SAMPLE, False
    with own.judged(skip=SAMPLE):
        decoded = _decode(context, context.last_position(0) + 1, 1)
    own.base_length[0], own.enabled = 0, True
    own.set_runs([])
    return decoded


def _decode_sample(context: llama.LlamaContext) -> bool:
    """Compute a prompt in two parts and one more token, in an empty context. False: llama.cpp cannot."""
    context.clear()
    return all(_decode(context, at, size) for at, size in _PARTS)


def _decode(context: llama.LlamaContext, at: int, size: int) -> bool:
    batch = llama.BatchBuffer(size)
    batch.size = size
    batch.tokens[:] = (np.arange(at, at + size) * 37 + 11) % context.n_vocab
    batch.positions[:] = np.arange(at, at + size)
    batch.wanted[-1] = 1
    return context.decode(batch) == llama.OK
