#!/usr/bin/env python
"""What it costs to save, restore and fork a context, against computing it again.

The core: the steps of preempting and resuming a sequence. Save: read llama.cpp's block of the sequence and cut it into
a piece. Restore: join the pieces to a block and write it into another slot. Fork: save once, and restore into the
child's slot. Recompute: prefill the prompt in batches of 512. Times are medians of alternating runs; the ratio is
recompute over restore.

The system: an agent calls `ctx.save`, `ctx.fork`, `aios.llm.restore`. The figure is the time of a call of one token
after it, over the time of the same call when nothing is cached. Both include the call itself (one step, messages
between processes). And a tree: 64 children of one context, each with one token, all at once.

    $ taskset -c 0,1 python benchmarks/switch.py
    tokens      MB  recompute ms  save ms  restore ms  fork ms  recompute/restore   bar
       512     4.2         215.0      3.9         0.9      4.9              238.9    50
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
from benchmarks.harness import AGENT, Aiosd, race  # noqa: E402

LENGTHS = (256, 512, 1024, 2048, 4096)
BAR, BAR_FROM = 50.0, 512  # on the model of 60 M parameters
CHILDREN, TREE = 64, 2000


# ── the core ──────────────────────────────────────────────────────────────────────────────────────────────


class Core:
    """A model with two slots, in this process."""

    def __init__(self, model: Path, ctx: int, threads: int) -> None:
        from aiosd.llm import llama
        from aiosd.llm.blob import StateLayout

        llama.start()
        self.llama = llama
        self.model = llama.Model(str(model), 0, lambda fraction: None)
        self.context = llama.LlamaContext(
            self.model, slots=2, ctx=ctx, ubatch=512, threads=threads, flash_attention=False
        )  # fmt: skip
        self.batch = llama.BatchBuffer(512)
        layout = StateLayout.of(self.context.sample())
        if layout is None:
            sys.exit("the contexts of this kind of model cannot be cut")
        self.layout = layout
        self.rng = np.random.default_rng(0)
        self.room = np.empty(layout.size(ctx), np.uint8)

    def recompute(self, length: int) -> float:
        context, batch = self.context, self.batch
        context.cut(0, 0)
        tokens = self.rng.integers(0, self.model.n_vocab, length)
        began = time.perf_counter()
        for start in range(0, length, 512):
            batch.size = size = min(512, length - start)
            batch.tokens[:size] = tokens[start : start + size]
            batch.positions[:size] = np.arange(start, start + size)
            batch.sequences[:size] = 0
            batch.wanted[:size] = 0
            batch.wanted[size - 1] = 1
            assert context.decode(batch) == self.llama.OK
        context.logits(1)  # waits for a device that computes asynchronously
        return time.perf_counter() - began

    def save(self, length: int) -> tuple[float, Any]:
        began = time.perf_counter()
        piece = self.layout.cut(self.context.read(0), 0, length, 0, length)
        return time.perf_counter() - began, piece

    def restore(self, piece: Any) -> float:
        began = time.perf_counter()
        block = self.layout.join([piece], 1, piece.length, self.room)
        self.context.cut(1, 0)
        assert self.context.restore(1, block)
        return time.perf_counter() - began


def engine(name: str, lengths: list[int], options: argparse.Namespace) -> list[dict[str, Any]]:
    core = Core(harness.model_path(name), max(lengths) + 256, options.threads)
    rows = []
    for length in lengths:
        times: dict[str, list[float]] = {"recompute": [], "save": [], "restore": [], "fork": []}
        size = 0
        for round_ in range(options.rounds + 1):
            computed = core.recompute(length)
            saved, piece = core.save(length)
            size = piece.size
            restored = core.restore(piece)
            if round_:  # the first round is for warming up
                for key, value in zip(times, (computed, saved, restored, saved + restored), strict=True):
                    times[key].append(value)
        medians = {f"{key}_s": statistics.median(values) for key, values in times.items()}
        ratio = statistics.median(a / b for a, b in zip(times["recompute"], times["restore"], strict=True))
        bar = BAR if name == "small" and length >= BAR_FROM else None
        rows.append({"model": name, "tokens": length, "bytes": size, **medians, "ratio": ratio, "bar": bar})
        print(line(rows[-1]), flush=True)
    return rows


HEAD = "tokens      MB  recompute ms  save ms  restore ms  fork ms  recompute/restore   bar"


def line(row: dict[str, Any]) -> str:
    bar = "–" if row["bar"] is None else f"{row['bar']:.0f}"
    return (
        f"{row['tokens']:>6}{row['bytes'] / 1e6:>8.1f}{1e3 * row['recompute_s']:>14.1f}{1e3 * row['save_s']:>9.2f}"
        f"{1e3 * row['restore_s']:>12.2f}{1e3 * row['fork_s']:>9.2f}{row['ratio']:>19.1f}{bar:>6}"
        f"   {harness.verdict(row['ratio'], row['bar'], at_least=True)}"
    )


# ── the system ────────────────────────────────────────────────────────────────────────────────────────────

SWITCHER = (
    AGENT
    + """
import random
from concurrent.futures import ThreadPoolExecutor
rng = random.Random(7)
def text(length):
    return "".join(rng.choice("0123456789") for _ in range(length))  # a token each, nearly
def timed(run):
    began = time.perf_counter()
    result = run()
    return time.perf_counter() - began, result
def say(context, word):
    return context.chat(word, max_tokens=1, temperature=0.0, ignore_eos=True)
def once(length):
    context = aios.llm.context([{"role": "system", "content": text(length)}])
    cold, first = timed(lambda: say(context, "1"))
    saving, _ = timed(lambda: context.save("switch"))
    twin = context.fork()
    forked, second = timed(lambda: say(twin, "2"))
    for one in (twin, context):
        one.close()
    restoring, back = timed(lambda: aios.llm.restore("switch"))
    restored, third = timed(lambda: say(back, "3"))
    back.close()
    return {"tokens": first.usage.prompt_tokens, "cold_cached": first.usage.cached_tokens, "cold_s": cold,
            "save_s": saving, "fork_s": forked, "fork_cached": second.usage.cached_tokens,
            "restore_s": restoring + restored, "restore_cached": third.usage.cached_tokens}
def tree(order):
    root = aios.llm.context([{"role": "system", "content": text(order["tree"])}])
    cold, _ = timed(lambda: say(root, "1"))
    twins = [root.fork() for _ in range(order["children"])]
    with ThreadPoolExecutor(len(twins)) as pool:
        took, said = timed(lambda: list(pool.map(lambda twin: say(twin, "2"), twins)))
    return {"cold_s": cold, "children_s": took,
            "computed": [r.usage.prompt_tokens - r.usage.cached_tokens for r in said]}
def run(order):
    if "tree" in order:
        return tree(order)
    return {"rounds": [once(order["length"]) for _ in range(order["rounds"])]}
serve(run)
"""
)

SYSTEM_HEAD = "tokens  cold call ms  save ms  after fork ms  after restore ms  cached  cold/fork  cold/restore"


def system(name: str, lengths: list[int], options: argparse.Namespace) -> list[dict[str, Any]]:
    ctx = max(*lengths, TREE) + 256
    flags = ["--slots", str(options.slots), "--ctx", str(ctx), "--threads", str(options.threads)]
    rows = []
    with Aiosd(harness.model_path(name), *flags, *options.aiosd_options.split()) as running:
        agent = running.start(1, SWITCHER)[0]
        for length in lengths:
            said = race([agent], [{"length": length, "rounds": options.rounds + 1}])[0]["rounds"][1:]
            row: dict[str, Any] = {key: statistics.median(one[key] for one in said) for key in said[0]}
            row |= {"model": name, "asked": length, "cold_fork": row["cold_s"] / row["fork_s"]}
            row["cold_restore"] = row["cold_s"] / row["restore_s"]
            rows.append(row)
            print(system_line(row), flush=True)
        before = running.stats()
        told = {"tree": TREE, "children": CHILDREN}
        said = race([agent], [told])[0]
        after = running.stats()
        tiers = {name: tier["bytes"] for name, tier in after["tiers"].items()}
        rows.append({"model": name, **told, **said, "tiers": tiers, "before": before["tiers"]})
        print(
            f"tree: {CHILDREN} children of {TREE} tokens: {said['children_s']:.2f} s in all, the parent alone took "
            f"{said['cold_s']:.2f} s; {max(said['computed'])} tokens computed for each child at most",
            flush=True,
        )
    return rows


def system_line(row: dict[str, Any]) -> str:
    return (
        f"{row['tokens']:>6.0f}{1e3 * row['cold_s']:>14.1f}{1e3 * row['save_s']:>9.1f}{1e3 * row['fork_s']:>15.1f}"
        f"{1e3 * row['restore_s']:>18.1f}{row['restore_cached']:>8.0f}{row['cold_fork']:>11.1f}"
        f"{row['cold_restore']:>14.1f}"
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="small", help="nano, small, another shape of models.py, or a GGUF")
    parser.add_argument("--tokens", type=int, action="append", help=f"{LENGTHS}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--aiosd-options", default="", help="more options for aiosd")
    parser.add_argument("--only", choices=("engine", "system"))
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "switch.json")
    return parser.parse_args(argv)


def main() -> None:
    options = parse()
    lengths = options.tokens or list(LENGTHS)
    rows: list[dict[str, Any]] = []
    if options.only != "system":
        print(HEAD, flush=True)
        rows += engine(options.model, lengths, options)
    if options.only != "engine":
        print(SYSTEM_HEAD, flush=True)
        rows += system(options.model, lengths, options)
    harness.write("switch", rows, options.out, model=options.model, threads=options.threads)


if __name__ == "__main__":
    main()
