#!/usr/bin/env python
"""aiosd's own attention against llama.cpp's two, on the same model, in one process.

What is measured: a decode step of n sequences that share a beginning of `prefix` tokens, a batch of short prompts after
that beginning, and the prefill of the beginning itself. The kinds of attention: llama.cpp's plain and its flash
attention, where each slot has a copy of the beginning; ours with such copies; and ours with one base for all. Times are
milliseconds, medians of alternating rounds. The ratio is llama.cpp's better time over ours with a base (for the
beginning itself: over ours without).

    $ taskset -c 0,1 python benchmarks/attention.py
    model    n  prefix  what      plain  flash   ours  on base  llama.cpp/ours
    small   64     512  decode     87.9   65.8   60.1     45.4            1.45
    …
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import harness  # noqa: E402  the checkout comes first

CELLS = ((64, 512), (64, 2048), (16, 512), (1, 2048))
STEPS, PER_PROMPT, UBATCH = 12, 32, 512
KINDS = ("plain", "flash", "ours", "base")


class Side:
    """A context with `n` sequences, each of which begins with the same `prefix` tokens."""

    def __init__(self, model: Any, kind: str, n: int, prefix: int, threads: int) -> None:
        from aiosd.llm import llama
        from aiosd.llm.attention import Attention, Unavailable
        from aiosd.llm.blob import StateLayout

        self.llama, self.model, self.kind, self.n, self.prefix = llama, model, kind, n, prefix
        try:
            self.own = Attention.load(n) if kind in ("ours", "base") else None
        except Unavailable as why:
            sys.exit(f"no attention of our own here: {why}")
        self.context = llama.LlamaContext(
            model, slots=n, ctx=prefix + 256, ubatch=UBATCH, threads=threads, flash_attention=kind != "plain",
            attention=self.own,
        )  # fmt: skip
        self.batch = llama.BatchBuffer(UBATCH)
        self.first = self.beginning()
        if kind == "base":
            assert self.own is not None
            layout = StateLayout.of(self.context.read(0))
            assert layout is not None
            self.piece = layout.cut(self.context.read(0), 0, prefix, 0, prefix)
            self.context.clear()
            self.own.set_layout(layout.sizes)
            self.own.set_runs([(self.piece.data.ctypes.data, prefix)])
            self.own.base_length[:] = prefix
        else:
            for slot in range(1, n):
                self.context.copy(0, slot)

    def run(self, slots: int, start: int, size: int) -> float:
        """Seconds to decode `size` tokens in each of the first `slots` slots, from position `start` on."""
        batch, total = self.batch, slots * size
        batch.size = total
        batch.tokens[:total] = (np.arange(total) * 7919 + start) % self.model.n_vocab
        batch.positions[:total] = np.tile(np.arange(start, start + size), slots)
        batch.sequences[:total] = np.repeat(np.arange(slots), size)
        batch.wanted[:total] = 0
        batch.wanted[size - 1 : total : size] = 1
        began = time.perf_counter()
        assert self.context.decode(batch) == self.llama.OK
        self.context.logits(1)
        return time.perf_counter() - began

    def beginning(self) -> float:
        return sum(
            self.run(1, start, min(UBATCH, self.prefix - start)) for start in range(0, self.prefix, UBATCH)
        )  # fmt: skip

    def forget(self, slots: int) -> None:
        for slot in range(slots):
            self.context.take_back(slot, self.prefix)

    def can_stand_on_a_base(self) -> bool:
        """Not in a model with sliding windows, whose layers do not all keep the same tokens."""
        from aiosd.llm.blob import StateLayout

        layout = StateLayout.of(self.context.read(0))
        return layout is not None and layout.in_one and len(layout.sizes) == 2 * self.context.n_layer

    def decode(self) -> float:
        times = [self.run(self.n, self.prefix + step, 1) for step in range(STEPS)]
        self.forget(self.n)
        return statistics.median(times)

    def prompts(self) -> float:
        slots = min(self.n, UBATCH // PER_PROMPT)
        took = self.run(slots, self.prefix, PER_PROMPT)
        self.forget(slots)
        return took


def cell(name: str, n: int, prefix: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    from aiosd.llm import llama

    llama.start()
    model = llama.Model(str(harness.model_path(name)), 0, lambda fraction: None)
    sides = [Side(model, kind, n, prefix, options.threads) for kind in KINDS[:-1]]
    if sides[-1].can_stand_on_a_base():
        sides.append(Side(model, KINDS[-1], n, prefix, options.threads))
    kinds = [side.kind for side in sides]
    times: dict[str, dict[str, list[float]]] = {what: {k: [] for k in kinds} for what in ("decode", "prompts")}
    for round_ in range(options.rounds + 1):
        for side in sides if round_ % 2 else sides[::-1]:
            for what, measure in (("decode", side.decode), ("prompts", side.prompts)):
                if round_:  # the first round is for warming up
                    times[what][side.kind].append(measure() * 1000)
                else:
                    measure()
    rows = [row(name, n, prefix, what, {k: statistics.median(v) for k, v in times[what].items()}) for what in times]
    rows.append(row(name, n, prefix, "prefix", {side.kind: side.first * 1000 for side in sides[:3]}))
    for side in sides:
        side.context.close()
    model.close()
    return rows


def row(name: str, n: int, prefix: int, what: str, ms: dict[str, float]) -> dict[str, Any]:
    ratio = min(ms["plain"], ms["flash"]) / ms.get("base", ms["ours"])
    return {"model": name, "sequences": n, "prefix": prefix, "what": what, "ms": ms, "ratio": ratio}


HEAD = "model    n  prefix  what      plain  flash   ours  on base  llama.cpp/ours"


def line(row: dict[str, Any]) -> str:
    ms = row["ms"]
    base = f"{ms['base']:9.1f}" if "base" in ms else f"{'–':>9}"
    head = f"{row['model']:<6}{row['sequences']:>4}{row['prefix']:>8}  {row['what']:<8}"
    return head + f"{ms['plain']:>7.1f}{ms['flash']:>7.1f}{ms['ours']:>7.1f}{base}{row['ratio']:>16.2f}"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", help="nano, small, another shape of models.py, or a GGUF")
    parser.add_argument("--n", type=int, help="sequences (default: several numbers)")
    parser.add_argument("--prefix", type=int, help="shared tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "attention.json")
    return parser.parse_args(argv)


def main() -> None:
    options = parse()
    cells = CELLS if options.n is None and options.prefix is None else [(options.n or 64, options.prefix or 512)]
    print(HEAD, flush=True)
    rows: list[dict[str, Any]] = []
    for name in options.model or ["small"]:
        for n, prefix in cells:
            found = cell(name, n, prefix, options)
            rows += found
            for one in found:
                print(line(one), flush=True)
            harness.write("attention", rows, options.out, threads=options.threads)


if __name__ == "__main__":
    main()
