#!/usr/bin/env python
"""How near the whole system is to the shortest possible time on this machine, with this model and workload.

That time, the floor, is computed: every distinct prompt token once, at the speed of one long prompt, and every
generated token at the speed of llama-batched-bench with as many sequences of the workload's mean length. So it has no
processes, no sampling, no waiting and no copies of contexts. Both speeds are measured before and after the system's
run, each with flash attention on and off, and the better one counts. The workload is crowd.py's.

    $ make peers && taskset -c 0,1 python benchmarks/floor.py
    model    n  prefix  prefill/s  decode/s  floor s  aiosd s  floor/aiosd   bar
    small   64     512     2177.0     711.0     16.6     18.0         0.92  0.90

`unified` in the JSON is the same decode with one cache for all sequences: the cells of the prefix exist only once, but
each sequence attends over the cells of all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import harness  # noqa: E402  the checkout comes first
from benchmarks.crowd import GENERATED, OURS, PRIVATE, TOOL, TURNS, complete_run, context_of, distinct_tokens, workload  # noqa: E402  # noqa: E402

BAR = 0.9  # at 64 agents


def mean_length(prefix: int) -> int:
    """Tokens in a sequence before a call's first generated token, on average over the turns."""
    return prefix + PRIVATE + (TURNS - 1) * (GENERATED + TOOL) // 2


def bench(model: Path, n: int, prefix: int, threads: int, *flags: str) -> tuple[float, float]:
    """(prompt tokens per second of one prompt, generated tokens per second of n sequences). The prompt is computed
    once, and copied into the other sequences."""
    length = mean_length(prefix)
    argv = [str(harness.peer("llama-batched-bench")), "-m", str(model), "-c", str((length + GENERATED + 256) * n)]
    argv += ["-b", "2048", "-ub", "512", "-npp", str(length), "-ntg", str(GENERATED), "-npl", str(n), "-pps"]
    argv += ["-t", str(threads), "-tb", str(threads), "--output-format", "jsonl", *flags]
    said = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True).stdout.decode()
    row = next(json.loads(line) for line in said.splitlines() if line.startswith("{"))
    return float(row["speed_pp"]), float(row["speed_tg"])


def speeds(model: Path, n: int, prefix: int, options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    more = options.server_options.split()
    return {flash: bench(model, n, prefix, options.threads, "-fa", flash, "-no-kvu", *more) for flash in ("on", "off")}


def cell(name: str, n: int, prefix: int, options: argparse.Namespace) -> dict[str, Any]:
    model = harness.model_path(name)
    vocab = harness.vocabulary(model)
    flags = ["--slots", str(n), "--ctx", str(context_of(prefix)), "--threads", str(options.threads)]
    measured, seconds = [], []
    with harness.Aiosd(model, *flags, *options.aiosd_options.split()) as system:
        agents = system.start(n, OURS)
        complete_run(agents, workload(n, prefix, options.seed * 1000 + 900, vocab))
        for salt in range(options.rounds):
            measured.append(speeds(model, n, prefix, options))
            for i in (0, 1):
                orders = workload(n, prefix, options.seed * 1000 + 2 * salt + i, vocab)
                seconds.append(complete_run(agents, orders))
            measured.append(speeds(model, n, prefix, options))
        stats = system.stats()
    prompt, generated = distinct_tokens(n, prefix)
    best = [[max(run[flash][i] for flash in run) for run in measured] for i in (0, 1)]
    prefill, decode = (statistics.median(values) for values in best)
    floor, took = prompt / prefill + generated / decode, statistics.median(seconds)
    return {
        "model": name, "agents": n, "prefix": prefix, "prompt_tokens": prompt, "generated_tokens": generated,
        "speeds": measured, "prefill_per_s": prefill, "decode_per_s": decode, "floor_s": floor, "aiosd_s": seconds,
        "ratio": floor / took, "bar": BAR if n == 64 and name == "small" else None, "aiosd_stats": stats,
        "unified": bench(model, n, prefix, options.threads, "-fa", "on", "-kvu", *options.server_options.split()),
    }  # fmt: skip


HEAD = "model    n  prefix  prefill/s  decode/s  floor s  aiosd s  floor/aiosd   bar"


def line(row: dict[str, Any]) -> str:
    bar = "–" if row["bar"] is None else f"{row['bar']:.2f}"
    return (
        f"{row['model']:<6}{row['agents']:>4}{row['prefix']:>8}{row['prefill_per_s']:>11.1f}{row['decode_per_s']:>10.1f}"
        f"{row['floor_s']:>9.2f}{statistics.median(row['aiosd_s']):>9.2f}{row['ratio']:>13.2f}{bar:>6}"
        f"   {harness.verdict(row['ratio'], row['bar'], at_least=True)}"
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="small", help="nano, small, another shape of models.py, or a GGUF")
    parser.add_argument("--n", type=int, action="append", help="agents (64)")
    parser.add_argument("--prefix", type=int, action="append", help="shared tokens (512)")
    parser.add_argument("--rounds", type=int, default=1, help="two runs of the system between two of the bench")
    parser.add_argument("--threads", type=int, default=2, help="threads of each side")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--aiosd-options", default="", help="more options for aiosd")
    parser.add_argument("--server-options", default="", help="more options for llama-batched-bench")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "floor.json")
    return parser.parse_args(argv)


def main() -> None:
    options = parse()
    harness.peer("llama-batched-bench")
    print(HEAD, flush=True)
    rows = []
    for n in options.n or [64]:
        for prefix in options.prefix or [512]:
            rows.append(cell(options.model, n, prefix, options))
            print(line(rows[-1]), flush=True)
            harness.write("floor", rows, options.out, seed=options.seed, threads=options.threads)


if __name__ == "__main__":
    main()
