"""From a ModelSpec to a core that can serve, or one line that says why not.

In this order, the cheap checks first: the file's head (`modelfile`), memory for weights and KV cache, llama.cpp,
the number of slots, the threads. What the user asked for (`ctx`, `slots`, `threads`, `gpu_layers`) is kept or
refused; what was left open is chosen here.

Threads are measured: with a small model one thread beats two, because a step is shorter than it takes to wake
the others. The measurement is a few decode steps, well under a second in all.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from aiosd.errors import UsageError, WorldError
from aiosd.llm import llama, modelfile
from aiosd.llm.attention import Attention
from aiosd.llm.blob import Layout
from aiosd.llm.spec import DEFAULT_CTX, MAX_SLOTS, ModelSpec
from aiosd.models.fit import available_memory

logger = logging.getLogger("llm")

#: Slots when nothing is asked for: 64 give a twentieth more throughput for twice the memory.
AUTO_SLOTS = 32

#: Largest batch that llama.cpp computes at once.
UBATCH = 512

#: The measurement of threads takes about this long at most.
MEASURE_S = 0.8

#: Flash attention on a CPU pays for itself with no more slots or no longer contexts than these, and heads as wide.
FEW_SLOTS, SHORT_CTX, WIDE_KEYS = 8, 512, 64

#: Our attention is compared with llama.cpp's on a prompt of so many tokens (the smallest context has more); logits must
#: agree up to this part of the largest.
SAMPLE, SAME = 12, 0.02

Report = Callable[[str, float], None]


@dataclass
class Loaded:
    """A model with its KV cache, ready to decode."""

    spec: ModelSpec
    model: llama.Model
    context: llama.Context
    ctx: int
    slots: int
    threads: int
    gpu_layers: int
    kv_bytes: int
    flash_attention: bool | None  # None: llama.cpp decides
    path: str

    def info(self, chat: bool, tools: bool) -> dict[str, Any]:
        """The fields of `wire.ModelInfo` without name and default."""
        model = self.model
        return {
            "path": self.path,
            "description": model.description,
            "n_params": model.n_params,
            "n_ctx": self.ctx,
            "n_slots": self.slots,
            "n_vocab": model.n_vocab,
            "n_embd": model.n_embd_out,
            "gpu_layers": self.gpu_layers,
            "chat": chat,
            "tools": tools,
        }

    @property
    def device(self) -> str:
        """What runs where, for people."""
        if not self.gpu_layers:
            return "CPU"
        return f"{self.gpu_layers} of {self.model.n_layer + 1} layers on the GPU"

    def close(self) -> None:
        self.context.close()
        self.model.close()


def load(spec: ModelSpec, report: Report) -> Loaded:
    """Raises UsageError (it cannot be done as asked) or WorldError (the machine refuses), each with one line."""
    file = modelfile.read(spec.path)
    ctx = spec.ctx or DEFAULT_CTX
    _check_options(spec, file, ctx)
    slots = _slots(spec, file, ctx)
    _check_memory(spec, file, ctx, slots)
    model = _weights(spec, report)
    try:
        trained = model.n_ctx_train
        if trained and ctx > trained and spec.ctx is not None:
            raise UsageError(f"--ctx {ctx}: the model was trained for {trained} tokens")
        ctx = min(ctx, trained) if trained else ctx
        if spec.exact and model.recurrent:
            raise UsageError("--exact: not for a model with a recurrent state, of which no part can be taken back")
        context, flash_attention = _context(spec, model, ctx, slots, file.key_width())
        threads = _threads(spec, context, slots, report)
    except BaseException:
        model.close()
        raise
    return Loaded(
        spec,
        model,
        context,
        ctx,
        slots,
        threads,
        gpu_layers=_offloaded(spec, model),
        kv_bytes=slots * file.kv_bytes_per_slot(ctx),
        flash_attention=flash_attention,
        path=os.path.abspath(spec.path),
    )


def _check_options(spec: ModelSpec, file: modelfile.ModelFile, ctx: int) -> None:
    if ctx < 16:
        raise UsageError(f"--ctx {ctx}: too small (at least 16)")
    if spec.slots is not None and not 1 <= spec.slots <= MAX_SLOTS - spec.exact:
        raise UsageError(f"--slots {spec.slots}: must be between 1 and {MAX_SLOTS - spec.exact}")
    if spec.threads is not None and not 1 <= spec.threads <= 512:
        raise UsageError(f"--threads {spec.threads}: must be between 1 and 512")
    if spec.gpu_layers and not llama.supports_gpu():
        logger.warning("--gpu-layers %d: this llama.cpp was built without a GPU; all runs on the CPU", spec.gpu_layers)
    if spec.exact and spec.gpu_layers:
        raise UsageError("--exact: on the CPU only, not together with --gpu-layers")
    if spec.exact and spec.flash_attention == "on":
        raise UsageError("--exact: not together with --flash-attention on, which rounds as the batch is cut")
    if file.meta.get("general.type") not in (None, "model"):
        raise UsageError(f"{spec.path}: this is no model but a part for one ({file.meta['general.type']})")


def _flash_attention(spec: ModelSpec, slots: int, ctx: int, key_width: int) -> bool | None:
    """None: llama.cpp decides. On a CPU it makes decoding faster, and so it does prompts of which 64 tokens or more go
    into a batch; shorter ones become slower, the narrower the heads the more (docs/benchmarks.md). A few agents are
    better off with it, then, and any number with short contexts; a crowd with long ones, whose prompts come in short
    pieces, without."""
    if spec.flash_attention != "auto":
        return spec.flash_attention == "on"
    if spec.gpu_layers and llama.supports_gpu():
        return None
    return not spec.exact and (slots <= FEW_SLOTS or ctx <= SHORT_CTX) and key_width >= WIDE_KEYS


def _offloaded(spec: ModelSpec, model: llama.Model) -> int:
    if not spec.gpu_layers or not llama.supports_gpu():
        return 0
    return model.n_layer + 1 if spec.gpu_layers < 0 else min(spec.gpu_layers, model.n_layer + 1)


# ── memory ────────────────────────────────────────────────────────────────────────────────────────────────


def _slots(spec: ModelSpec, file: modelfile.ModelFile, ctx: int) -> int:
    per_slot = max(file.kv_bytes_per_slot(ctx), 1)
    if spec.slots is not None:
        if spec.kv_memory is not None and spec.slots * per_slot > spec.kv_memory:
            raise UsageError(
                f"--slots {spec.slots}: {spec.slots} × {ctx} tokens need {_size(spec.slots * per_slot)} of KV cache, "
                f"more than the {_size(spec.kv_memory)} allowed"
            )
        return spec.slots
    budget = spec.kv_memory if spec.kv_memory is not None else max(available_memory() - file.size, 0) // 4
    if budget < per_slot and spec.kv_memory is not None:
        raise UsageError(
            f"--ctx {ctx}: one slot needs {_size(per_slot)} of KV cache, more than the {_size(budget)} allowed"
        )
    return max(1, min(AUTO_SLOTS, budget // per_slot))


def _check_memory(spec: ModelSpec, file: modelfile.ModelFile, ctx: int, slots: int) -> None:
    """Refuse what would be killed halfway. Weights are mapped, not copied, but must be in memory to be used."""
    kv = file.kv_bytes_per_slot(ctx) * slots
    room = available_memory()
    weights = 0 if spec.gpu_layers and llama.supports_gpu() else file.size
    if weights > room:
        raise UsageError(f"{spec.path}: too large for the memory: {_size(weights)}, but {_size(room)} are free")
    if weights + kv > room:
        raise UsageError(
            f"{spec.path}: {slots} slots of {ctx} tokens need {_size(kv)} of KV cache beside {_size(weights)} of "
            f"weights, but {_size(room)} are free: use a smaller --ctx or --slots"
        )


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


# ── llama.cpp ─────────────────────────────────────────────────────────────────────────────────────────────


def _weights(spec: ModelSpec, report: Report) -> llama.Model:
    layers = spec.gpu_layers if spec.gpu_layers >= 0 else 1 << 20
    try:
        model = llama.Model(spec.path, layers, lambda fraction: report("loading", fraction))
    except WorldError as error:
        raise UsageError(f"{spec.path}: {error}") from error
    if not model.has_decoder or model.has_encoder:
        model.close()
        raise UsageError(
            f"{spec.path}: cannot generate: an encoder (for embeddings, or encoder-decoder) is no LLM core"
        )
    return model


def _context(
    spec: ModelSpec, model: llama.Model, ctx: int, slots: int, key_width: int
) -> tuple[llama.Context, bool | None]:
    """The context, and whether llama.cpp computes its attention in one go (None: it decides). With our own if that can
    be, see `attention.py`."""

    def make(flash_attention: bool | None, attention: Attention | None = None) -> llama.Context:
        try:
            return llama.Context(
                model,
                slots=slots + spec.exact,  # one more for the dummy tokens, see engine.py
                ctx=ctx + spec.exact,
                ubatch=UBATCH,
                threads=spec.threads or 1,
                flash_attention=flash_attention,
                attention=attention,
            )
        except WorldError as error:
            raise UsageError(f"{spec.path}: {slots} slots of {ctx} tokens: {error}") from error

    own = Attention.load(slots) if _may_be_own(spec, model) else None
    if own is not None:
        context = make(True, own)
        if agrees(context):
            return context, True
        context.close()
    flash_attention = _flash_attention(spec, slots, ctx, key_width)
    return make(flash_attention), flash_attention


def _may_be_own(spec: ModelSpec, model: llama.Model) -> bool:
    return spec.flash_attention == "auto" and not spec.exact and not model.recurrent and not llama.supports_gpu()


def agrees(context: llama.Context) -> bool:
    """Does this context compute the same with our attention as with llama.cpp's, but for rounding, also where the
    beginning of a sequence lies outside of its slot? Leaves it empty."""
    own = context.attention
    assert own is not None
    own.enabled = False
    theirs = _sample_logits(context, 0)
    own.enabled = True
    ours = _sample_logits(context, 0)
    state = context.read(0)
    layout = Layout.of(state) if ours.size else None
    if layout is not None and layout.by_rows and len(layout.sizes) == 2 * context.n_layer:
        piece = layout.cut(state, 0, context.last_position(0) + 1, 0, SAMPLE)
        own.set_layout(layout.sizes)
        own.set_runs([(piece.data.ctypes.data, piece.length)])
        own.base_length[0] = SAMPLE
        ours = np.concatenate([ours[:1], _sample_logits(context, SAMPLE)])
        own.base_length[0] = 0
        own.set_runs([])
    context.clear()
    spread = float(np.abs(theirs).max()) if theirs.size else 0.0
    return own.used and theirs.shape == ours.shape and bool(np.allclose(ours, theirs, rtol=0, atol=SAME * spread))


def _sample_logits(context: llama.Context, start: int) -> llama.Floats:
    """What comes after a prompt in two parts and a token more, from `start` on, in an empty context; empty if llama.cpp
    cannot."""
    context.clear()
    batch = llama.Batch(SAMPLE)
    found = []
    for at, size in ((0, SAMPLE), (SAMPLE, 2), (SAMPLE + 2, 1)):
        if at < start:
            continue
        batch.size = size
        batch.tokens[:size] = (np.arange(at, at + size) * 37 + 11) % context.n_vocab
        batch.positions[:size] = np.arange(at, at + size)
        batch.wanted[:size] = 0
        batch.wanted[size - 1] = 1
        if context.decode(batch) != llama.OK:
            return np.zeros((0, 0), np.float32)
        found.append(context.logits(1)[0].copy())
    return np.array(found)


def _threads(spec: ModelSpec, context: llama.Context, slots: int, report: Report) -> int:
    if spec.threads is not None:
        return spec.threads
    threads = _measure_threads(context, min(slots, 8), report)
    context.set_threads(threads)
    return threads


def _measure_threads(context: llama.Context, rows: int, report: Report) -> int:
    """The fastest number of threads for a decode step of some rows; more of them only for a clear gain, because
    the agents need the cores too, and threads that wait for each other waste them."""
    cores = len(os.sched_getaffinity(0))
    candidates = sorted({1, *(2**i for i in range(1, 9) if 2**i < cores), cores})
    if cores == 1:
        return 1
    batch = llama.Batch(rows)
    batch.size = rows
    batch.sequences[:] = np.arange(rows)
    batch.wanted[:] = 1
    best, fastest = 1, float("inf")
    deadline = time.monotonic() + MEASURE_S
    for i, threads in enumerate(candidates):
        report("measuring threads", i / len(candidates))
        context.set_threads(threads)
        took = _median_step(context, batch, deadline)
        if took < 0.8 * fastest:
            best, fastest = threads, took
    for row in range(rows):
        context.cut(row, 0)
    return best


def _median_step(context: llama.Context, batch: llama.Batch, deadline: float) -> float:
    """Seconds; the first step, which finds everything cold, does not count."""
    times: list[float] = []
    for _ in range(8):
        began = time.perf_counter()
        if context.decode(batch) != llama.OK:
            raise WorldError("llama.cpp could not decode a first step")
        context.logits(1)
        times.append(time.perf_counter() - began)
        batch.positions[:] += 1
        if time.monotonic() > deadline and len(times) > 1:
            break
    return sorted(times[1:])[(len(times) - 1) // 2]
