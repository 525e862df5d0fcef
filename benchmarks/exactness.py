#!/usr/bin/env python
"""Does a text change when its generation is interrupted? Match rate and BLEU against the uninterrupted one.

Every agent generates greedily: first one agent after the other, then all at once on a quarter as many slots, with a
quantum of 4 tokens. Then each is preempted many times, its context is saved and restored into another slot, and its
batches contain other sequences each time. With `--exact` every text must be the same. Without it batches of different
sizes round differently, and sometimes another token is chosen. Table 7 of the AIOS paper reports BLEU 1.0 for this.

    $ python benchmarks/exactness.py
    model   exact  texts  preemptions  same texts  same tokens   BLEU
    nano    no        24          310      1.000        1.000   1.000
    …

The embedded model gets the prompts of its held-out tasks, a model of random weights gets random prompts.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import harness  # noqa: E402  the checkout comes first
from benchmarks.harness import AGENT, Aiosd, race  # noqa: E402

QUANTUM = 4  # in tokens

WRITER = (
    AGENT
    + """
def write(order):
    options = dict(max_tokens=order["tokens"], temperature=0.0)
    if "messages" in order:
        r = aios.llm.chat(order["messages"], **options)
    else:
        r = aios.llm.complete(order["prompt"], ignore_eos=True, **options)
    return {"tokens": r.tokens, "preemptions": r.usage.preemptions}
serve(write)
"""
)


def orders(name: str, model: Path, count: int, tokens: int, seed: int) -> list[dict[str, Any]]:
    if name == "nano":
        from aiosd.nano.tasks import FAMILIES, HELD, make

        families = list(FAMILIES)
        tasks = [make(seed * 1_000_000 + i, HELD, families[i % len(families)]) for i in range(count)]
        # The task as a question without tools, because a call of a tool has few tokens.
        return [{"messages": [{"role": "user", "content": task.prompt}], "tokens": tokens} for task in tasks]
    rng, vocab = np.random.default_rng(seed), harness.vocabulary(model)
    return [
        {"prompt": list(map(int, rng.integers(300, vocab, rng.integers(32, 128)))), "tokens": tokens}
        for _ in range(count)
    ]


# ── how similar two texts are ─────────────────────────────────────────────────────────────────────────────


def bleu(candidate: Sequence[int], reference: Sequence[int], order: int = 4) -> float:
    """BLEU of one text against one reference, on tokens: the geometric mean of clipped n-gram precisions (n = 1 … 4, or
    as many as the text has), times the brevity penalty. 1 for equal texts; 0 when some n has no n-gram in common."""
    if not candidate or not reference:
        return float(list(candidate) == list(reference))
    logs = []
    for n in range(1, min(order, len(candidate), len(reference)) + 1):
        have, want = _grams(candidate, n), _grams(reference, n)
        matched = sum((have & want).values())
        if not matched:
            return 0.0
        logs.append(math.log(matched / sum(have.values())))
    brevity = min(0.0, 1 - len(reference) / len(candidate))
    return math.exp(brevity + sum(logs) / len(logs))


def _grams(tokens: Sequence[int], n: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens before the first difference."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# ── a model ───────────────────────────────────────────────────────────────────────────────────────────────


def compare(name: str, exact: bool, options: argparse.Namespace) -> dict[str, Any]:
    model = harness.model_path(name)
    told = orders(name, model, options.texts, options.tokens, options.seed)
    slots = max(options.texts // 4, 1)
    flags = ["--policy", "rr", "--quantum", str(QUANTUM), "--slots", str(slots), "--ctx", "1024"]
    flags += ["--threads", str(options.threads), *(["--exact"] if exact else [])]
    with Aiosd(model, *flags) as system:
        agents = system.start(len(told), WRITER)
        alone = [race([agent], [order])[0] for agent, order in zip(agents, told, strict=True)]
        together = race(agents, told)
    pairs = [(crowd["tokens"], single["tokens"]) for crowd, single in zip(together, alone, strict=True)]
    length = sum(len(reference) for _, reference in pairs)
    return {
        "model": name,
        "exact": exact,
        "texts": len(pairs),
        "tokens": length,
        "preemptions": sum(one["preemptions"] for one in together),
        "preemptions_alone": sum(one["preemptions"] for one in alone),
        "same_texts": sum(a == b for a, b in pairs) / len(pairs),
        "same_tokens": sum(common(a, b) for a, b in pairs) / max(length, 1),
        "bleu": sum(bleu(a, b) for a, b in pairs) / len(pairs),
    }


HEAD = "model   exact  texts  preemptions  same texts  same tokens   BLEU"


def line(row: dict[str, Any]) -> str:
    missed = row["exact"] and row["same_texts"] < 1
    return (
        f"{row['model']:<8}{'yes' if row['exact'] else 'no':<7}{row['texts']:>5}{row['preemptions']:>13}"
        f"{row['same_texts']:>12.3f}{row['same_tokens']:>13.3f}{row['bleu']:>7.3f}" + ("   MISSED" if missed else "")
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", help="nano, small, another shape of models.py, or a GGUF")
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="most tokens of a text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "exactness.json")
    return parser.parse_args(argv)


def main() -> None:
    options = parse()
    print(HEAD, flush=True)
    rows = []
    for name in options.model or ["nano", "small"]:
        for exact in (False, True):
            rows.append(compare(name, exact, options))
            print(line(rows[-1]), flush=True)
    harness.write("exactness", rows, options.out, seed=options.seed, quantum=QUANTUM)
    if any(row["exact"] and row["same_texts"] < 1 for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
