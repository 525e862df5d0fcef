"""From a ModelSpec to a core that can serve, or one line with the reason why not.

In this order, the cheap checks first: the file's head (`modelfile`), tokens and number of slots (`room`), memory for
weights and KV cache, llama.cpp, adapters, the threads. A value that the user gave (`ctx`, `slots`, `threads`,
`gpu_layers`) is used or refused, never changed; other values are chosen here.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aiosd.errors import UsageError, WorldError
from aiosd.llm import (
    adapters,
    calibrate,
    exact,
    kvlayout,
    llama,
    lookahead,
    modelfile,
    placement,
    room,
    rope,
    threads,
    trial,
)
from aiosd.llm.attention import Attention, Unavailable
from aiosd.llm.calibrate import PromptBatch
from aiosd.llm.chat import ChatTemplate
from aiosd.llm.kvlayout import KvLayout
from aiosd.llm.lookahead import Lookahead
from aiosd.llm.room import CacheSize
from aiosd.llm.spec import MAX_SLOTS, ModelSpec
from aiosd.llm.threads import Threads
from aiosd.models.fit import available_memory

logger = logging.getLogger("llm")

#: Largest batch that llama.cpp computes at once; where all slots share their cells it is measured, up to MOST_UBATCH.
UBATCH, MOST_UBATCH = 512, 2048

#: Bytes per number in the cache; with q8_0, 32 numbers share a scale of 2 bytes.
KV_BYTES = {"f16": 2.0, "q8_0": 34 / 32}

#: Threads are measured with steps of this number of rows.
MEASURED_ROWS = 8

#: On a CPU flash attention is used with at most FEW_SLOTS slots or SHORT_CTX tokens, and keys of at least WIDE_KEYS.
FEW_SLOTS, SHORT_CTX, WIDE_KEYS = 8, 512, 64

#: Bytes of a chat template that are read; the longest of known models has 20,000.
MOST_TEMPLATE = 1 << 20

ReportProgress = Callable[[str, float], None]


@dataclass
class LoadedModel:
    """A model with its KV cache, ready to decode."""

    spec: ModelSpec
    model: llama.Model
    context: llama.LlamaContext
    room: CacheSize
    threads: Threads
    layout: KvLayout
    prompt_batch: PromptBatch
    ahead: Lookahead
    gpu_layers: int
    kv_bytes: int
    flash_attention: bool | None  # None: llama.cpp decides
    why_not_own: str  # why llama.cpp's attention is used, '' if our own is
    path: str

    @property
    def ctx(self) -> int:
        return self.room.ctx

    @property
    def slots(self) -> int:
        return self.room.slots

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
            "loras": list(model.adapters),
        }

    @property
    def again(self) -> bool:
        """Was anything measured in a bad moment, so that it is to be measured again when the machine is quiet?"""
        return self.threads.again or self.ahead.again

    def measure_again(self, slots: list[int]) -> None:
        """Choose the number of threads and of guesses again. `slots` must be empty."""
        if self.threads.again:
            found = threads.measure(self.context, slots, seconds=threads.MEASURE_S / 2)
            if not found.again:
                self.threads = found
                logger.info("threads: %d, %s", found.number, found.why)
            self.context.set_threads(self.threads.number)
        self.ahead = _ahead(self.spec, self.model, self.context, slots[0])

    @property
    def attention(self) -> str:
        """Which attention is used, for people; if not our own, also why."""
        return f"llama.cpp ({self.why_not_own})" if self.why_not_own else "aiosd"

    @property
    def kv_layout(self) -> str:
        """How the KV cache is divided among slots, and why, for people."""
        how = f"unified, {self.room.cells} cells" if self.layout.unified else "streams"
        return f"{how} ({self.layout.why})"

    @property
    def device(self) -> str:
        """Which part of the model runs on which device, for people."""
        if not self.gpu_layers:
            return "CPU"
        return f"{self.gpu_layers} of {self.model.n_layer + 1} layers on the GPU"

    def close(self) -> None:
        self.context.close()
        self.model.close()


def load(spec: ModelSpec, report: ReportProgress) -> LoadedModel:
    """Load a model. Raises UsageError (the settings are not possible) or WorldError (the machine refuses), each with
    one line."""
    file = modelfile.read(spec.path)
    file.kv_bytes = KV_BYTES[spec.kv_type]
    rope.check(spec, file)
    template = _own_template(spec.chat_template_file)
    _check_options(spec, file)
    on_gpu = bool(spec.gpu_layers and llama.supports_gpu())
    layout = kvlayout.choose(spec, file, on_gpu)
    all_on_gpu = on_gpu and spec.gpu_layers < 0 and not placement.places(spec)
    free = (llama.gpu_memory() if all_on_gpu else 0) or available_memory()
    chosen = room.choose(spec, file, free, layout.unified)
    weights = (0 if on_gpu and not all_on_gpu else file.size) + adapters.size(spec)
    kv_bytes = (
        chosen.cells * file.kv_bytes_per_token() if chosen.cells else chosen.slots * file.kv_bytes_per_slot(chosen.ctx)
    )
    room.check_memory(spec.path, weights, kv_bytes, chosen, free)
    model = _weights(spec, report)
    try:
        model.own_template = template
        adapters.load(spec, model, file.architecture)
        if spec.exact and model.recurrent:
            raise UsageError("--exact: not for a model with a recurrent state, of which no part can be taken back")
        context, flash_attention, why = _context(spec, model, chosen, file.key_width())
        if spec.exact:
            _check_exact(context, model, chosen.slots + 1)
        logger.info("%d slots of %d tokens: %s", chosen.slots, chosen.ctx, chosen.why)  # only if it could be loaded
        number = _threads(spec, context, chosen.slots, report)
        prompt_batch = _prompt_batch(context)
        report("measuring guesses", 0.0)
        ahead = _ahead(spec, model, context, 0)
    except BaseException:  # of any kind: llama.cpp's memory is not freed by Python
        model.close()
        raise
    loaded = LoadedModel(
        spec,
        model,
        context,
        chosen,
        number,
        layout,
        prompt_batch,
        ahead,
        gpu_layers=_offloaded(spec, model),
        kv_bytes=kv_bytes,
        flash_attention=flash_attention,
        why_not_own=why,
        path=os.path.abspath(spec.path),
    )
    logger.info("KV cache: %s", loaded.kv_layout)
    return loaded


def _own_template(path: str) -> str:
    """The chat template to use instead of the model's; '': use the model's. Raises UsageError."""
    if not path:
        return ""
    try:
        text = Path(path).read_bytes()[:MOST_TEMPLATE].decode()
    except OSError as error:
        raise UsageError(f"--chat-template-file {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise UsageError(f"--chat-template-file {path}: is not UTF-8") from None
    template = ChatTemplate(text, "", "")
    if template.broken or not text.strip():
        line = template.broken_line or 1
        raise UsageError(f"--chat-template-file {path}, line {line}: {template.broken or 'it is empty'}")
    return text


def _check_exact(context: llama.LlamaContext, model: llama.Model, slots: int) -> None:
    """Raises UsageError if a row depends on the others in its batch, with any of the adapters or without."""
    for adapter in ("", *model.adapters):
        context.use(adapter)
        if not exact.holds(context, slots):
            context.close()
            what = f"--lora {adapter}" if adapter else f"this file ({model.description})"
            raise UsageError(
                f"--exact: not with {what}: llama.cpp computes it in another way in larger "
                "batches (so it does with K-quants; F16, Q8_0, Q4_0 and Q4_1 are the same in all)"
            )
    context.use("")


def _check_options(spec: ModelSpec, file: modelfile.ModelFile) -> None:
    if spec.slots is not None and not 1 <= spec.slots <= MAX_SLOTS - spec.exact:
        raise UsageError(f"--slots {spec.slots}: must be between 1 and {MAX_SLOTS - spec.exact}")
    if spec.threads is not None and not 1 <= spec.threads <= 512:
        raise UsageError(f"--threads {spec.threads}: must be between 1 and 512")
    if spec.gpu_layers and not llama.supports_gpu():
        logger.warning("--gpu-layers %d: this llama.cpp was built without a GPU; all runs on the CPU", spec.gpu_layers)
    if spec.exact and spec.gpu_layers:
        raise UsageError("--exact: on the CPU only, not together with --gpu-layers")
    if spec.kv_type != "f16" and (spec.exact or spec.flash_attention == "off"):
        other = "--exact" if spec.exact else "--flash-attention off"
        raise UsageError(f"--kv-type {spec.kv_type}: not together with {other}: only flash attention reads such values")
    if spec.exact and spec.flash_attention == "on":
        raise UsageError("--exact: not together with --flash-attention on, which rounds as the batch is cut")
    kind = file.text("general.type")
    if kind not in ("", "model"):
        raise UsageError(f"{spec.path}: this is no model but a part for one ({kind})")


def _flash_attention(spec: ModelSpec, slots: int, ctx: int, key_width: int) -> bool | None:
    """None: llama.cpp decides. On a CPU flash attention makes decoding faster, and prompts too if 64 tokens or more of
    them go into one batch; shorter ones become slower, the more so the narrower the heads (docs/benchmarks.md). So it
    is better for a few agents, and for any number of agents with short contexts; it is worse for many agents with long
    contexts, whose prompts come in short pieces."""
    if spec.flash_attention != "auto":
        return spec.flash_attention == "on"
    if spec.gpu_layers and llama.supports_gpu():
        return None
    if spec.kv_type != "f16":
        return True
    return not spec.exact and (slots <= FEW_SLOTS or ctx <= SHORT_CTX) and key_width >= WIDE_KEYS


def _offloaded(spec: ModelSpec, model: llama.Model) -> int:
    if not spec.gpu_layers or not llama.supports_gpu():
        return 0
    return model.n_layer + 1 if spec.gpu_layers < 0 else min(spec.gpu_layers, model.n_layer + 1)


# ── llama.cpp ─────────────────────────────────────────────────────────────────────────────────────────────


def _weights(spec: ModelSpec, report: ReportProgress) -> llama.Model:
    layers = spec.gpu_layers if spec.gpu_layers >= 0 else 1 << 20
    try:
        model = llama.Model(
            spec.path, layers, lambda fraction: report("loading", fraction), places=placement.places(spec)
        )
    except WorldError as error:
        raise UsageError(f"{spec.path}: {error}") from error
    if not model.has_decoder or model.has_encoder:
        model.close()
        raise UsageError(
            f"{spec.path}: cannot generate: an encoder (for embeddings, or encoder-decoder) is no LLM core"
        )
    return model


def _context(
    spec: ModelSpec, model: llama.Model, chosen: CacheSize, key_width: int
) -> tuple[llama.LlamaContext, bool | None, str]:
    """The context, whether llama.cpp uses flash attention (None: it decides), and why our own attention is not used
    (see `attention.py`)."""
    ctx, slots = chosen.ctx, chosen.slots

    def make(flash_attention: bool | None, attention: Attention | None = None) -> llama.LlamaContext:
        try:
            return llama.LlamaContext(
                model,
                slots=slots + spec.exact,  # one more for the dummy tokens, see engine.py
                ctx=ctx + spec.exact,
                cells=chosen.cells,
                ubatch=MOST_UBATCH if chosen.cells else UBATCH,
                threads=spec.threads or 1,
                flash_attention=flash_attention,
                kv_type=spec.kv_type,
                attention=attention,
                rope=spec.rope,
                outputs=0 if _not_measured(spec, model) else lookahead.ROWS,
            )
        except WorldError as error:
            raise UsageError(f"{spec.path}: {slots} slots of {ctx} tokens: {error}") from error

    why = _not_own(spec, model, chosen)
    if not why:
        try:
            context = make(True, Attention.load(slots))
            why = trial.held_against(context)
            if not why:
                return context, True, ""
            context.close()
        except Unavailable as unavailable:
            why = str(unavailable)
        logger.warning("attention: llama.cpp's own is used: %s", why)
    flash_attention = _flash_attention(spec, slots, ctx, key_width)
    return make(flash_attention), flash_attention, why


def _not_own(spec: ModelSpec, model: llama.Model, chosen: CacheSize) -> str:
    """Why our own attention is not even tried, '' if it is."""
    if spec.flash_attention != "auto":
        return f"--flash-attention {spec.flash_attention}"
    if spec.kv_type != "f16":
        return f"--kv-type {spec.kv_type}: ours reads f16"
    if spec.exact:
        return "--exact: the order of its sums depends on the others in a batch"
    if model.recurrent:
        return "the model keeps a recurrent state"
    if chosen.cells:
        return "--kv-layout unified: ours reads slots that have their own cells"
    return "llama.cpp was built for a GPU" if llama.supports_gpu() else ""


def _threads(spec: ModelSpec, context: llama.LlamaContext, slots: int, report: ReportProgress) -> Threads:
    if spec.threads is not None:
        return Threads(spec.threads, "asked for")
    most = context.cells // threads.MOST_STEPS or slots
    rows = list(range(min(slots, MEASURED_ROWS, most)))
    found = threads.measure(context, rows, lambda fraction: report("measuring threads", fraction))
    context.set_threads(found.number)
    logger.info("threads: %d, %s", found.number, found.why)
    return found


def _ahead(spec: ModelSpec, model: llama.Model, context: llama.LlamaContext, slot: int) -> Lookahead:
    """How many guesses are computed in a step, and what its passes cost. `slot` must be empty."""
    why = _not_measured(spec, model)
    cost = time.perf_counter if spec.gpu_layers and llama.supports_gpu() else time.process_time
    found = Lookahead(0, why) if why else lookahead.measure(context, slot, spec.lookahead, cost=cost)
    if spec.lookahead == 0:
        found = replace(found, why="--lookahead off")
    logger.info("%s", found.described)
    return found


def _not_measured(spec: ModelSpec, model: llama.Model) -> str:
    """Why a step has one row for each call, whatever more would cost; '' if it may have more."""
    if spec.exact:
        return "--exact: several tokens of a call at once round in another way"
    return "the model keeps a recurrent state, of which no part can be taken back" if model.recurrent else ""


def _prompt_batch(context: llama.LlamaContext) -> PromptBatch:
    """How many tokens of prompts a batch holds; set in the context."""
    if not context.cells:
        return PromptBatch(context.ubatch, 0.0, "not measured: slots have their own cells")
    found = calibrate.measure(context)
    context.ubatch = found.tokens
    logger.info("batches of %d tokens of prompts: %s", found.tokens, found.why)
    return found
