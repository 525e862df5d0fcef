#!/usr/bin/env python
"""What drawing a token costs: tokens per second at temperature 0.8 (and aiosd's other defaults) over greedy ones.

The engine runs in one process. 32 calls generate at the same time, in turns greedily and with drawing, with the same
prompts. The model has random weights, a large vocabulary and few layers, so that its steps are shorter than those of a
real model, while drawing takes as long. The ratio is the median of the ratios of neighbouring runs; of each run the
faster steps count. The table also has the time of drawing from as many rows without a model: in C, in numpy (used where
there is no compiler), and of the bare arg max.

    $ taskset -c 0,1 python benchmarks/sampling.py
    model     words  rows   greedy/s    0.8/s  ratio   bar   C ms  numpy ms  argmax ms
    words49   49152    32      520.0    515.0   0.99  0.95   0.75     12.00       0.11
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

BAR = 0.95
PROMPT = 16
QUIET = 0.25  # share of a run's steps that counts, the fastest; other work on the machine delays the others
CTX = 512


class Side:
    """One engine; `run` returns tokens per second of decoding."""

    def __init__(self, path: Path, rows: int, threads: int) -> None:
        from aiosd.llm import llama
        from aiosd.llm.engine import Engine

        llama.start()
        self.rows = rows
        self.model = llama.Model(str(path), 0, lambda fraction: None)
        self.context = llama.LlamaContext(
            self.model, slots=rows, ctx=CTX, ubatch=512, threads=threads, flash_attention=False
        )  # fmt: skip
        self.engine = Engine(self.model, self.context, ctx=CTX, slots=rows, emit=lambda message: None)
        self.calls = 0

    def run(self, temperature: float, tokens: int, salt: int) -> float:
        from aiosd.ipc.link import Submit
        from libaios.wire import Generate, Sampling

        for row in range(self.rows):
            self.calls += 1
            prompt = [20 + (salt * 7919 + row * 131 + place * 17) % 400 for place in range(PROMPT)]
            sampling = Sampling(temperature=temperature, max_tokens=tokens, ignore_eos=True, seed=self.calls)
            self.engine.submit(Submit((1, self.calls), Generate(prompt=prompt, sampling=sampling)))
        steps = []
        while self.engine.has_work:
            whole = len(self.engine._rows) == self.rows
            began = time.perf_counter()
            self.engine.step()
            if whole:  # a step in which all calls decoded and none prefilled
                steps.append(time.perf_counter() - began)
        return self.rows / harness.percentile(steps, QUIET)

    def close(self) -> None:
        self.context.close()
        self.model.close()


def drawing(words: int, rows: int) -> dict[str, float]:
    """Milliseconds to draw from all rows, without a model."""
    from aiosd.llm.sampling import Drawer, Sampler, draws

    logits = np.random.default_rng(1).normal(0, 3, (rows, words)).astype(np.float32)
    wanted = draws([(Sampler(0.8, 40, 0.95, 0.05, row), 0, row) for row in range(rows)])
    ways = {
        "c_ms": lambda: Drawer().draw(logits, wanted),
        "numpy_ms": lambda: Drawer(native=False).draw(logits, wanted),
        "argmax_ms": lambda: logits.argmax(axis=1),
    }
    return {name: min(milliseconds(way) for _ in range(7)) for name, way in ways.items()}


def milliseconds(way: Any) -> float:
    began = time.perf_counter()
    way()
    return (time.perf_counter() - began) * 1e3


def cell(name: str, options: argparse.Namespace) -> dict[str, Any]:
    path = harness.model_path(name)
    side = Side(path, options.rows, options.threads)
    pairs = []
    side.run(0.0, options.tokens, 0)
    side.run(0.8, options.tokens, 1)
    for salt in range(2, 2 + options.rounds):  # A B B A
        greedy, drawn = side.run(0.0, options.tokens, salt), side.run(0.8, options.tokens, salt)
        pairs += [(drawn, greedy)]
        drawn, greedy = side.run(0.8, options.tokens, salt), side.run(0.0, options.tokens, salt)
        pairs += [(drawn, greedy)]
    words = side.model.n_vocab
    side.close()
    return {
        "model": name, "words": words, "rows": options.rows,
        "greedy_per_s": statistics.median(greedy for _, greedy in pairs),
        "drawn_per_s": statistics.median(drawn for drawn, _ in pairs),
        "ratio": harness.median_ratio(pairs), "pairs": pairs, "bar": BAR, **drawing(words, options.rows),
    }  # fmt: skip


HEAD = "model      words  rows   greedy/s      0.8/s  ratio   bar    C ms  numpy ms  argmax ms"


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['model']:<9}{row['words']:>7}{row['rows']:>6}{row['greedy_per_s']:>11.1f}{row['drawn_per_s']:>11.1f}"
        f"{row['ratio']:>7.3f}{row['bar']:>6.2f}{row['c_ms']:>8.2f}{row['numpy_ms']:>10.2f}{row['argmax_ms']:>11.2f}"
        f"   {harness.verdict(row['ratio'], row['bar'], at_least=True)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", help="a shape of models.py, or a GGUF (words49, words152)")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=24, help="tokens that each call generates in a run")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of four runs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "sampling.json")
    options = parser.parse_args()
    print(HEAD, flush=True)
    rows = []
    for name in options.model or ["words49", "words152"]:
        rows.append(cell(name, options))
        print(line(rows[-1]), flush=True)
        harness.write("sampling", rows, options.out, threads=options.threads, tokens=options.tokens)


if __name__ == "__main__":
    main()
