#!/usr/bin/env python
"""The latency of an interactive agent beside agents that generate without end, and the shares of different nice values.

Latency: one interactive agent has a growing conversation, with calls of 64 new prompt tokens and 32 generated ones and
a second between them. It does so on an idle system, and then beside 32 agents that generate without end. These have run
for a while by then, because until each has used up a quantum it has the same priority as a new call. The figure is the
90th percentile of its latency over that on the idle system. It is measured with a slot for each agent (33) and with 8
slots, under the default policy, under fifo, and with llama-server.

Shares: 16 agents generate without end on 8 slots, half of them with nice 5. The figure is the ratio of the tokens of
both classes in a minute, against the ratio of Linux's weights for these nice values, 1024 : 335.

    $ make peers && taskset -c 0,1 python benchmarks/fairness.py
    system        slots  idle p90  crowd p50    p90  × idle   bar  calls
    aiosd fair       33      0.21       0.40   0.48     2.3  2.50     24
    …
    shares: nice 0 : nice 5 = 3.07 : 1, Linux's weights 3.06 : 1, off by 0.4 % (bar 5 %)   kept
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import harness  # noqa: E402  the checkout comes first
from benchmarks.harness import AGENT, HTTP, Aiosd, Client, Server, race  # noqa: E402

CROWD, SLOTS, CTX = 32, (33, 8), 1024
NEW, GENERATED, PAUSE_S = 64, 32, 1.0
TALK = 8  # calls of one conversation
LATENCY_BAR, SHARE_BAR = 2.5, 0.05
WEIGHTS = {0: 1024, 5: 335}  # from Linux's kernel/sched/core.c

COMPLETE = """
def complete(tokens, number, **also):
    return aios.llm.complete(tokens, max_tokens=number, temperature=0.0, ignore_eos=True, **also).tokens
"""

TALKING = """
import random
def talk(order):
    rng, latencies, tokens = random.Random(order["seed"]), [], []
    until = time.monotonic() + order["seconds"]
    while time.monotonic() < until or not latencies:
        if len(latencies) % order["talk"] == 0:
            tokens = []
        tokens = tokens + [rng.randrange(order["low"], order["vocab"]) for _ in range(order["new"])]
        began = time.monotonic()
        tokens = tokens + complete(tokens, order["generated"])
        latencies.append(time.monotonic() - began)
        time.sleep(order["pause"])
    return {"latencies": latencies}
serve(talk)
"""

#: It ends when its input does, even during a generation.
ENDLESS = """
import os, random, threading
def endless(order):
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    rng = random.Random(order["seed"])
    print("{}", flush=True)
    while True:
        complete([rng.randrange(order["low"], order["vocab"]) for _ in range(64)], order["ctx"] - 128)
serve(endless)
"""


def order(seed: int, vocab: int, **also: Any) -> dict[str, Any]:
    low = min(300, vocab // 2)
    return {"seed": seed, "vocab": vocab, "low": low, "new": NEW, "generated": GENERATED, "pause": PAUSE_S, **also}


# ── latency ───────────────────────────────────────────────────────────────────────────────────────────────


def latency(talker: Client, crowd: list[Client], vocab: int, options: argparse.Namespace) -> dict[str, Any]:
    """Latencies of the interactive agent alone, and then beside the others."""

    def talk(seed: int, seconds: float) -> list[float]:
        return list(race([talker], [order(seed, vocab, seconds=seconds, talk=TALK)])[0]["latencies"])

    talk(1, 0.0)  # warms up
    idle = talk(2, options.idle)
    race(crowd, [order(100 + i, vocab, ctx=CTX) for i in range(len(crowd))])
    time.sleep(options.settle)
    busy = talk(3, options.seconds)
    p90 = [harness.percentile(values, 0.9) for values in (idle, busy)]
    return {
        "idle_s": idle, "crowd_s": busy, "idle_p90": p90[0], "crowd_p50": statistics.median(busy), "crowd_p90": p90[1],
        "times": p90[1] / p90[0],
    }  # fmt: skip


def ours(model: Path, policy: str, slots: int, vocab: int, options: argparse.Namespace) -> dict[str, Any]:
    flags = ["--policy", policy, "--slots", str(slots), "--ctx", str(CTX), "--threads", str(options.threads)]
    with Aiosd(model, *flags) as system:
        talker = system.start(1, AGENT + COMPLETE + TALKING)[0]
        crowd = system.start(CROWD, AGENT + COMPLETE + ENDLESS)
        row = latency(talker, crowd, vocab, options)
        row["stats"] = system.stats()
    return row


def theirs(model: Path, slots: int, vocab: int, options: argparse.Namespace) -> dict[str, Any]:
    """The same with llama-server, which chooses slots by their content. A call waits in its queue for a free slot."""
    with Server(model, slots, CTX, options.threads) as server:
        talker = server.start(1, HTTP + TALKING)[0]
        crowd = server.start(CROWD, HTTP + ENDLESS)
        return latency(talker, crowd, vocab, options)


HEAD = "system        slots  idle p90  crowd p50    p90  × idle   bar  calls"


def line(row: dict[str, Any]) -> str:
    bar = "–" if row["bar"] is None else f"{row['bar']:.2f}"
    return (
        f"{row['system']:<13}{row['slots']:>6}{row['idle_p90']:>10.3f}{row['crowd_p50']:>11.3f}{row['crowd_p90']:>7.3f}"
        f"{row['times']:>8.2f}{bar:>6}{len(row['crowd_s']):>7}   {harness.verdict(row['times'], row['bar'])}"
    )


# ── shares ────────────────────────────────────────────────────────────────────────────────────────────────


def shares(model: Path, vocab: int, options: argparse.Namespace) -> dict[str, Any]:
    """The tokens of both classes within a minute, from the process table."""
    flags = ["--policy", "fair", "--slots", "8", "--ctx", str(CTX), "--threads", str(options.threads)]
    with Aiosd(model, *flags) as system:
        classes = {nice: [f"class{nice}-{i}" for i in range(8)] for nice in WEIGHTS}
        crowd = []
        for nice, names in classes.items():
            for name in names:
                crowd += system.start(1, AGENT + COMPLETE + ENDLESS, options=["-n", str(nice), "--name", name])
        race(crowd, [order(i, vocab, ctx=CTX) for i in range(len(crowd))])
        time.sleep(options.settle)
        before = made(system)
        time.sleep(options.share_seconds)
        after = made(system)
    got = {nice: sum(after[name] - before[name] for name in names) for nice, names in classes.items()}
    ratio, wanted = got[0] / got[5], WEIGHTS[0] / WEIGHTS[5]
    return {"system": "aiosd fair", "tokens": got, "ratio": ratio, "wanted": wanted, "off": abs(ratio / wanted - 1)}


def made(system: Aiosd) -> dict[str, int]:
    return {process["name"]: process["completion_tokens"] for process in system.processes()}


def share_line(row: dict[str, Any]) -> str:
    return (
        f"shares: nice 0 : nice 5 = {row['ratio']:.2f} : 1, Linux's weights {row['wanted']:.2f} : 1, "
        f"off by {100 * row['off']:.1f} % (bar {100 * SHARE_BAR:.0f} %)   {harness.verdict(row['off'], SHARE_BAR)}"
    )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="small", help="nano, small, another shape of models.py, or a GGUF")
    parser.add_argument("--slots", type=int, action="append", help=f"{SLOTS}")
    parser.add_argument("--side", action="append", help="fair, fifo, another policy, llama-server, shares")
    parser.add_argument("--seconds", type=float, default=45.0, help="seconds beside the other agents")
    parser.add_argument("--idle", type=float, default=15.0, help="seconds alone")
    parser.add_argument("--settle", type=float, default=10.0, help="seconds of the others before it counts")
    parser.add_argument("--share-seconds", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "fairness.json")
    return parser.parse_args(argv)


def main() -> None:
    options = parse()
    model = harness.model_path(options.model)
    vocab = harness.vocabulary(model)
    sides = options.side or ["fair", "fifo", "llama-server", "shares"]
    rows: list[dict[str, Any]] = []
    if sides != ["shares"]:
        print(HEAD, flush=True)
    for slots in options.slots or SLOTS:
        for side in sides:
            if side == "shares":
                continue
            server = side == "llama-server"
            row = theirs(model, slots, vocab, options) if server else ours(model, side, slots, vocab, options)
            name = side if server else f"aiosd {side}"
            rows.append({"system": name, "slots": slots, **row, "bar": LATENCY_BAR if side == "fair" else None})
            print(line(rows[-1]), flush=True)
            harness.write("fairness", rows, options.out, model=options.model)
    if "shares" in sides:
        rows.append(shares(model, vocab, options))
        print(share_line(rows[-1]), flush=True)
    harness.write("fairness", rows, options.out, model=options.model)


if __name__ == "__main__":
    main()
