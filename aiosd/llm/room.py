"""How many tokens a slot holds, and how many slots there are: from what the model allows and from the free memory.

What the user asks for is used or refused; all else is chosen here. The memory of all slots is a part of the free memory
(PART) or `--kv-memory`, and is written once at the start, so it is in use from then on. It goes to slots first, up to
AUTO_SLOTS, because a step for many costs little more than a step for one. But each slot shall hold at least GOOD_CTX
tokens, the conversation of an agent with its tools, even if that leaves only FEW slots: calls without a slot wait for
their turn, but a prompt that is too long for a slot cannot run at all.

Where all slots share their cells (`kvlayout.py`), the memory is for cells, and nothing has to be divided: a slot may
hold as many tokens as the model allows, and calls wait for cells.
"""

from __future__ import annotations

from dataclasses import dataclass

from aiosd.errors import UsageError
from aiosd.llm import rope
from aiosd.llm.modelfile import ModelFile
from aiosd.llm.spec import DEFAULT_CTX, ModelSpec

#: Slots where the user gives no number: 64 would give 5 % more throughput for twice the memory.
AUTO_SLOTS = 32

#: Tokens per slot that are worth having fewer slots, down to FEW.
GOOD_CTX, FEW = 8192, 2

#: The most tokens per slot without `--ctx`. Few agents ever use more, and all would wait at the start.
MOST_CTX = 32768

#: llama.cpp counts cells in steps of this size.
CELLS = 256

#: Slots get 1/PART of the free memory; without `--ctx` never more than MOST_BYTES, which take ten seconds to write.
PART, MOST_BYTES = 4, 16 << 30


@dataclass(frozen=True, slots=True)
class CacheSize:
    ctx: int  # tokens per slot
    slots: int
    why: str  # why this number of tokens, for people
    cells: int = 0  # that all slots share; 0: each slot has its own


def choose(spec: ModelSpec, file: ModelFile, free: int, unified: bool = False) -> CacheSize:
    """`free`: bytes of memory. `unified`: all slots share their cells. Raises UsageError where what was asked for is
    not possible."""
    budget = spec.kv_memory if spec.kv_memory is not None else max(free - file.size, 0) // PART
    if unified:
        return _common(spec, file, budget)
    if spec.ctx is None:
        budget = budget if spec.kv_memory is not None else min(budget, MOST_BYTES)
        ctx, why = _largest(spec, file, budget)
    else:
        ctx, why = spec.ctx, "asked for"
        _check_asked(spec, file)
    return CacheSize(ctx, _slots(spec, file, ctx, budget), why)


def _trained(spec: ModelSpec, file: ModelFile) -> int:
    """The number of tokens that the model was made for; 0: it is not known."""
    return rope.stretched(spec, file.number("context_length")) or 0


def _check_asked(spec: ModelSpec, file: ModelFile) -> None:
    most, ctx = _trained(spec, file), spec.ctx or 0
    if ctx < 16:
        raise UsageError(f"--ctx {ctx}: too small (at least 16)")
    if most and ctx > most:
        own = file.number("context_length")
        more = f", {most} with --rope-freq-scale {spec.rope_freq_scale}" if most > own else ""
        raise UsageError(f"--ctx {ctx}: the model was trained for {own} tokens{more}")


def _largest(spec: ModelSpec, file: ModelFile, budget: int) -> tuple[int, str]:
    """The largest number of tokens per slot for which there are slots enough, and why it is not more."""
    limit = _trained(spec, file) or GOOD_CTX
    most = min(limit, MOST_CTX)
    sizes = [size for size in (MOST_CTX, 16384, GOOD_CTX, 4096, DEFAULT_CTX) if size < most]
    too_large = ""
    for ctx in [most, *sizes]:
        slots = spec.slots or (FEW if ctx <= GOOD_CTX else AUTO_SLOTS)
        if slots * file.kv_bytes_per_slot(ctx) <= budget or ctx <= DEFAULT_CTX:
            break
        too_large = f"{slots} slots of {ctx} tokens need {size_of(slots * file.kv_bytes_per_slot(ctx))}, "
    if too_large:
        return ctx, f"{too_large}more than the {size_of(budget)} for slots"
    if not _trained(spec, file):
        return ctx, "it is not known for how many the model was trained"
    return ctx, "all that the model was trained for" if ctx == limit else f"the most without --ctx; trained for {limit}"


def _common(spec: ModelSpec, file: ModelFile, budget: int) -> CacheSize:
    """One set of cells for all slots: as many as all of them can use, or as the memory holds."""
    slots = spec.slots or AUTO_SLOTS
    if spec.ctx is not None:
        _check_asked(spec, file)
    limit = _trained(spec, file) or GOOD_CTX
    ctx = spec.ctx or min(limit, MOST_CTX)
    wanted = slots * padded(ctx)
    if spec.kv_memory is None and spec.ctx and spec.slots:
        return CacheSize(ctx, slots, "asked for", wanted)
    if spec.ctx is None and spec.kv_memory is None:
        budget = min(budget, MOST_BYTES)
    fit = budget // max(file.kv_bytes_per_token(), 1) // CELLS * CELLS
    least = padded(spec.ctx or min(limit, DEFAULT_CTX))
    if fit < least and spec.kv_memory is not None:
        need = least * file.kv_bytes_per_token()
        raise UsageError(f"{least} tokens need {size_of(need)} of KV cache, more than the {size_of(budget)} allowed")
    cells = max(min(wanted, fit), least)
    if spec.ctx:
        return CacheSize(ctx, slots, "asked for", cells)
    if ctx > cells:
        return CacheSize(cells, slots, f"one may have all {cells} cells", cells)
    return CacheSize(
        ctx, slots, "all that the model was trained for" if ctx == limit else "the most without --ctx", cells
    )


def padded(ctx: int) -> int:
    """llama.cpp rounds up."""
    return -(-ctx // CELLS) * CELLS


def _slots(spec: ModelSpec, file: ModelFile, ctx: int, budget: int) -> int:
    per_slot = max(file.kv_bytes_per_slot(ctx), 1)
    if spec.slots is not None:
        if spec.kv_memory is not None and spec.slots * per_slot > spec.kv_memory:
            raise UsageError(
                f"--slots {spec.slots}: {spec.slots} × {ctx} tokens need {size_of(spec.slots * per_slot)} of KV cache, "
                f"more than the {size_of(spec.kv_memory)} allowed"
            )
        return spec.slots
    if budget < per_slot and spec.kv_memory is not None:
        raise UsageError(
            f"--ctx {ctx}: one slot needs {size_of(per_slot)} of KV cache, more than the {size_of(budget)} allowed"
        )
    return max(1, min(AUTO_SLOTS, budget // per_slot))


def check_memory(path: str, weights: int, kv: int, room: CacheSize, free: int) -> None:
    """Refuse a model for which memory would run out later. Weights are mapped, not copied, but need memory in use."""
    if weights > free:
        raise UsageError(f"{path}: too large for the memory: {size_of(weights)}, but {size_of(free)} are free")
    if weights + kv > free:
        raise UsageError(
            f"{path}: {room.slots} slots of {room.ctx} tokens need {size_of(kv)} of KV cache beside {size_of(weights)} "
            f"of weights, but {size_of(free)} are free: use a smaller --ctx or --slots"
        )


def size_of(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
