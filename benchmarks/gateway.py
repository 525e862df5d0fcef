#!/usr/bin/env python
"""What HTTP costs: agents that stream from one model through the gateway, against the same agents with the SDK.

n agents, each a process of its own, generate at the same time: P random prompt tokens, G greedy tokens, streamed. The
sides alternate (A B B A) on one running system, with new prompts every time. Neighbouring runs make a pair, and the
median of the pairs' ratios counts. CPU is that of the gateway's process per token that it has passed on. `--official`
uses the client of the openai package instead of a plain one (its import takes each agent a second or two of CPU time).

    $ taskset -c 0,1 python benchmarks/gateway.py
    side     tokens/s  first token s  gateway us/token
    sdk           893           2.31
    gateway       871           2.35              31.2
    tokens/s, gateway over sdk: 0.98 (bar 0.90 kept); first token: 1.02 (bar 1.20 kept)
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import harness  # noqa: E402  the checkout comes first
from benchmarks.harness import AGENT, LOOP, Aiosd, Client, cpu_seconds, makespan, race  # noqa: E402

RATE_BAR, FIRST_BAR = 0.9, 1.2

SDK = (
    AGENT
    + """
def run(order):
    first, count = None, 0
    for piece in aios.llm.complete(order["prompt"], max_tokens=order["generate"], temperature=0.0, ignore_eos=True,
                                   stream=True):
        first = first or time.monotonic()
        count += len(piece.tokens)
    return {"first": first, "tokens": count}
serve(run)
"""
)

HTTP = (
    LOOP
    + """
import http.client, os
from urllib.parse import urlsplit
url = urlsplit(os.environ["OPENAI_BASE_URL"])
connection = http.client.HTTPConnection(url.hostname, url.port)
headers = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}
connection.request("GET", "/v1/models", headers=headers)  # so that neither side measures how it is let in
connection.getresponse().read()
def run(order):
    body = {"prompt": order["prompt"], "max_tokens": order["generate"], "temperature": 0, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True}}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    response, first, usage = connection.getresponse(), None, None
    for line in response:
        if line.startswith(b"data: {"):
            first = first or time.monotonic()
            usage = line
    return {"first": first, "tokens": json.loads(usage[6:])["usage"]["completion_tokens"]}
serve(run)
"""
)

OFFICIAL = (
    LOOP
    + """
from openai import OpenAI
client = OpenAI()
client.models.list()
def run(order):
    first = None
    for chunk in client.completions.create(model="x", prompt=order["prompt"], max_tokens=order["generate"],
            temperature=0, stream=True, stream_options={"include_usage": True}, extra_body={"ignore_eos": True}):
        first = first or time.monotonic()
        usage = chunk.usage
    return {"first": first, "tokens": usage.completion_tokens}
serve(run)
"""
)


def orders(count: int, prompt: int, generate: int, seed: int, vocab: int) -> list[dict[str, Any]]:
    """An order for each agent; all prompts are random."""
    rng = random.Random(seed)
    ids = range(256, vocab)
    return [{"prompt": [rng.choice(ids) for _ in range(prompt)], "generate": generate} for _ in range(count)]


def measure(clients: Sequence[Client], given: list[dict[str, Any]], gateway: int) -> dict[str, float]:
    before = cpu_seconds(gateway)
    said = race(clients, given)
    tokens = sum(one["tokens"] for one in said)
    return {
        "tokens_per_s": tokens / makespan(said),
        "first_s": statistics.median(one["first"] - one["began"] for one in said),
        "cpu_us": (cpu_seconds(gateway) - before) / tokens * 1e6,
    }


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    path = harness.model_path(options.model)
    vocab = harness.vocabulary(path)
    context = options.prompt + options.generate + 64
    rows = []
    with Aiosd(path, "--slots", str(options.n), "--ctx", str(context), "--gateway", "auto") as system:
        sides = {
            "sdk": system.start(options.n, SDK),
            "gateway": system.start(options.n, OFFICIAL if options.official else HTTP),
        }
        gateway = next(int(one["ospid"]) for one in system.processes() if one["name"] == "gateway")
        for clients in sides.values():  # warm up
            measure(clients, orders(options.n, options.prompt, 8, options.seed, vocab), gateway)
        for turn in range(2 * options.pairs):
            order = ("sdk", "gateway") if turn % 2 == 0 else ("gateway", "sdk")
            for side in order:
                seed = options.seed + 1 + 2 * turn + (side == "sdk")
                given = orders(options.n, options.prompt, options.generate, seed, vocab)
                rows.append({"side": side, "turn": turn, **measure(sides[side], given, gateway)})
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Medians, and the median ratios of neighbouring runs."""
    ours = [row for row in rows if row["side"] == "gateway"]
    theirs = [row for row in rows if row["side"] == "sdk"]

    def ratio(figure: str) -> float:
        return harness.median_ratio([(a[figure], b[figure]) for a, b in zip(ours, theirs, strict=True)])

    return {
        "rate_ratio": ratio("tokens_per_s"),
        "first_ratio": ratio("first_s"),
        "cpu_us": statistics.median(row["cpu_us"] for row in ours),
    }


def table(rows: Sequence[dict[str, Any]], found: dict[str, float]) -> list[str]:
    lines = ["side     tokens/s  first token s  gateway us/token"]
    for side in ("sdk", "gateway"):
        mine = [row for row in rows if row["side"] == side]
        rate, first = (statistics.median(row[figure] for row in mine) for figure in ("tokens_per_s", "first_s"))
        cpu = f"{found['cpu_us']:18.1f}" if side == "gateway" else ""
        lines.append(f"{side:8} {rate:8.0f} {first:14.2f}{cpu}")
    rate_verdict = harness.verdict(found["rate_ratio"], RATE_BAR, at_least=True)
    first_verdict = harness.verdict(found["first_ratio"], FIRST_BAR)
    lines.append(
        f"tokens/s, gateway over sdk: {found['rate_ratio']:.2f} (bar {RATE_BAR:.2f} {rate_verdict}); "
        f"first token: {found['first_ratio']:.2f} (bar {FIRST_BAR:.2f} {first_verdict})"
    )
    return lines


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small")
    parser.add_argument("-n", type=int, default=64, help="agents (64)")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt (64)")
    parser.add_argument("--generate", type=int, default=64, help="tokens that each agent generates (64)")
    parser.add_argument("--pairs", type=int, default=2, help="how many times A B B A (2)")
    parser.add_argument("--official", action="store_true", help="use the client of the openai package")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def main() -> None:
    options = parse()
    rows = run(options)
    found = summary(rows)
    print("\n".join(table(rows, found)))
    about = {name: value for name, value in vars(options).items() if name != "out"}
    harness.write("gateway", rows, options.out, options=about, summary=found)


if __name__ == "__main__":
    main()
