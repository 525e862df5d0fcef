#!/usr/bin/env python
"""How fast the model is beside processes that use the processor all the time, as agents that compute do.

A few agents generate while k such neighbours run, in turns with none. The figure is tokens/s with neighbours over
tokens/s without. It is compared with what a fair scheduler leaves to the model: T threads and k neighbours on C cores
get C/(T+k) of a core each, and at most a whole one. The bar is 0.8 of that; threads that spin while they wait for each
other fall far below it.

    $ taskset -c 0,1 python benchmarks/busy.py
    model   threads  busy  quiet tok/s  busy tok/s  ratio  fair   bar
    small         2     2        152.0        71.0   0.47  0.50  0.40
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import harness  # noqa: E402  the checkout comes first

SHARE = 0.8  # of the fair part
AGENTS = 4

SCRIPT = (
    harness.AGENT
    + """
def run(order):
    r = aios.llm.complete("Once", max_tokens=order, temperature=0.0, ignore_eos=True)
    return {"tokens": r.usage.completion_tokens}
serve(run)
"""
)


def fair(threads: int, busy: int, cores: int) -> float:
    return min(1.0, cores / (threads + busy))


def tokens_per_s(agents: list[harness.Client], tokens: int, busy: int) -> float:
    neighbours = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        said = harness.race(agents, [tokens] * len(agents))
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()
    return float(sum(one["tokens"] for one in said) / harness.makespan(said))


def cell(name: str, threads: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each number of neighbours."""
    cores = len(os.sched_getaffinity(0))
    pairs: dict[int, list[tuple[float, float]]] = {busy: [] for busy in options.busy}
    flags = ["--slots", str(AGENTS), "--ctx", "1024", "--threads", str(threads)]
    with harness.Aiosd(harness.model_path(name), *flags) as system:
        agents = system.start(AGENTS, SCRIPT)
        tokens_per_s(agents, options.tokens, 0)
        for _ in range(options.rounds):
            for busy in options.busy:
                quiet = tokens_per_s(agents, options.tokens, 0)
                pairs[busy].append((tokens_per_s(agents, options.tokens, busy), quiet))
    return [row(name, threads, busy, pairs[busy], cores) for busy in options.busy]


def row(name: str, threads: int, busy: int, pairs: list[tuple[float, float]], cores: int) -> dict[str, Any]:
    return {
        "model": name,
        "threads": threads,
        "busy": busy,
        "pairs": pairs,
        "ratio": harness.median_ratio(pairs),
        "fair": fair(threads, busy, cores),
        "bar": SHARE * fair(threads, busy, cores),
    }


HEAD = "model   threads  busy  quiet tok/s  busy tok/s  ratio  fair   bar"


def line(row: dict[str, Any]) -> str:
    busy, quiet = (statistics.median(pair[i] for pair in row["pairs"]) for i in (0, 1))
    return (
        f"{Path(row['model']).stem[:7]:<7}{row['threads']:>8}{row['busy']:>6}{quiet:>13.1f}{busy:>12.1f}"
        f"{row['ratio']:>7.2f}{row['fair']:>6.2f}{row['bar']:>6.2f}"
        f"   {harness.verdict(row['ratio'], row['bar'], at_least=True)}"
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", help="nano, a shape of models.py, or a GGUF (nano, small)")
    parser.add_argument("--threads", type=int, action="append", help="threads of the model (1 and 2)")
    parser.add_argument("--busy", type=int, action="append", help="neighbours (1 and 2)")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs without and with neighbours")
    parser.add_argument("--tokens", type=int, default=64, help="tokens that each agent generates in a run")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "busy.json")
    options = parser.parse_args(argv)
    options.busy = options.busy or [1, 2]
    return options


def main() -> None:
    options = parse()
    print(HEAD, flush=True)
    rows: list[dict[str, Any]] = []
    for name in options.model or ["nano", "small"]:
        for threads in options.threads or [1, 2]:
            for new in cell(name, threads, options):
                rows.append(new)
                print(line(new), flush=True)
            harness.write("busy", rows, options.out)


if __name__ == "__main__":
    main()
