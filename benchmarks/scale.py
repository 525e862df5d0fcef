#!/usr/bin/env python
"""From 64 to 2,000 agents with live contexts on one model: do all finish, and does the throughput hold?

Every agent is a process of its own that keeps its conversation: a shared system prompt of 128 tokens, 16 tokens of its
own, and two greedy calls of 80 generated tokens, with 8 tokens of a tool's answer between them. All run before the
clock starts. There are 64 slots. With the default quantum of 64 tokens every call is preempted before its end when
others wait; the contexts of waiting calls lie in memory and on disk, within the given budgets. Wait: from a call's
arrival to its slot. Jain's index: of the agents' tokens per second, each from the common start to its own end. Linux:
CPU time of the threads of Linux itself, in percent of one core. Where Linux monitors memory for reclaim (DAMON), it
must look two thousand times at a page that two thousand forked processes share.

    $ taskset -c 0,1 python benchmarks/scale.py
    policy  agents  finished  tokens/s  ÷ 64   wait p50    p90    p99   Jain  copy %  RAM MB  disk MB  Linux %
    rr          64        64     904.0  1.00       0.00   0.00   0.00  1.000     0.2       1        0      0.3
    rr        2000      2000     512.9  0.57     114.95 216.60 250.20  0.998     4.5    1072     1928     25.5
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import harness  # noqa: E402  the checkout comes first

AGENTS = (64, 250, 500, 1000, 2000)
POLICIES = ("rr", "fair")
SHARED, PRIVATE, TURNS, GENERATED, TOOL = 128, 16, 2, 80, 8
LEAST_RATE, MOST_COPYING = 0.9, 0.05
PATIENCE_S = 3600.0
LOOK_EVERY_S = 5.0

MEMBER = """
import errno, random, sys, time
import libaios as aios
def send(what):
    while True:  # the parent's mailbox is bounded
        try:
            return aios.msg.send(boss, what)
        except OSError as error:
            if error.errno != errno.EAGAIN:
                raise
            time.sleep(0.05)
boss = aios.proc.getppid()
send("up")
_, order = aios.msg.recv()
rng = random.Random(order["seed"] * 100003 + aios.proc.getpid())
def words(count):
    return [rng.randrange(300, order["vocab"]) for _ in range(count)]
shared = random.Random(order["seed"])
tokens = [shared.randrange(300, order["vocab"]) for _ in range(order["shared"])] + words(order["private"])
waits, preemptions, made = [], 0, 0
for turn in range(order["turns"]):
    r = aios.llm.complete(tokens, max_tokens=order["generated"], temperature=0.0, ignore_eos=True)
    tokens = tokens + r.tokens + words(order["tool"])
    waits.append(r.usage.queue_s)
    preemptions += r.usage.preemptions
    made += len(r.tokens)
send({"ended": time.monotonic(), "waits": waits, "preemptions": preemptions, "tokens": made})
aios.msg.recv()
"""

BOSS = """
import json, sys, time
import libaios as aios
count, member, out, order = int(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
def hear(what, number):
    heard = []
    while len(heard) < number:
        _, said = aios.msg.recv(timeout=3600)
        assert (said == "up") == (what == "up"), said
        heard.append(said)
    return heard
pids, up = [], 0
for _ in range(count):
    pids.append(aios.proc.spawn(member, name="member", detached=True))
    if len(pids) - up >= 100:
        hear("up", 50)
        up += 50
hear("up", count - up)
print("connected", flush=True)
sys.stdin.readline()
began = time.monotonic()
for pid in pids:
    aios.msg.send(pid, order)
told = time.monotonic()
said = hear("end", count)
with open(out, "w") as file:
    json.dump({"began": began, "told": told, "agents": said}, file)
print("done", flush=True)
for pid in pids:
    aios.msg.send(pid, "go home")
for pid in pids:
    aios.proc.wait(pid)
print("home", flush=True)
"""


def run(policy: str, agents: int, model: Path, options: argparse.Namespace) -> dict[str, Any]:
    flags = ["--policy", policy, "--quantum", options.quantum, "--slots", str(options.slots), "--ctx", "512"]
    flags += ["--threads", str(options.threads), "--context-ram", options.ram, "--context-disk", options.disk]
    order = {
        "seed": options.seed, "vocab": harness.vocabulary(model), "shared": SHARED, "private": PRIVATE, "turns": TURNS,
        "generated": GENERATED, "tool": TOOL,
    }  # fmt: skip
    with harness.Aiosd(model, *flags) as system:
        member, out = system.home / "member.py", system.home / "out.json"
        member.write_text(MEMBER)
        script = system.home / "boss.py"
        script.write_text(BOSS)
        argv = [*harness.command("aios-run"), str(script), str(agents), str(member), str(out), json.dumps(order)]
        boss = harness.Client(argv, system.env)
        boss.expect("connected")
        before, core = system.stats(), system.core()
        cpu, linux, began = harness.cpu_seconds(core), harness.kernel_seconds(), time.monotonic()
        boss.tell("go")
        peaks = watch(system, lambda: out.exists())
        boss.expect("done")
        after, cpu = system.stats(), harness.cpu_seconds(core) - cpu
        linux = (harness.kernel_seconds() - linux) / (time.monotonic() - began)
        boss.expect("home")
        boss.close()
        found = json.loads(out.read_text())
    return figures(policy, agents, found, before, after, peaks) | {"core_cpu_s": cpu, "linux_share": linux}


def watch(system: harness.Aiosd, over: Any) -> dict[str, float]:
    """The largest amount of contexts in each place, sampled during the run."""
    peaks = {"ram": 0.0, "disk": 0.0, "rss": 0.0}
    deadline = time.monotonic() + PATIENCE_S
    while not over():
        if time.monotonic() > deadline:
            sys.exit("the crowd does not come to an end")
        stats = system.stats()
        tiers = stats["tiers"]
        for name, value in (
            ("ram", tiers["ram"]["bytes"]),
            ("disk", tiers["disk"]["bytes"]),
            ("rss", stats["rss_bytes"]),
        ):
            peaks[name] = max(peaks[name], value)
        time.sleep(LOOK_EVERY_S)
    return peaks


def figures(
    policy: str,
    agents: int,
    found: dict[str, Any],
    before: dict[str, Any],
    after: dict[str, Any],
    peaks: dict[str, float],
) -> dict[str, Any]:
    began, said = found["began"], found["agents"]
    took = max(one["ended"] for one in said) - began
    waits = [wait for one in said for wait in one["waits"]]
    whole = [one for one in said if one["tokens"] == TURNS * GENERATED]
    tiers = after["tiers"]
    return {
        "policy": policy,
        "agents": agents,
        "finished": len(whole),
        "seconds": took,
        "told_s": found["told"] - began,
        "tokens_per_s": sum(one["tokens"] for one in said) / took,
        "wait_s": {f"p{int(100 * p)}": harness.percentile(waits, p) for p in (0.5, 0.9, 0.99)},
        "jain": harness.jain([one["tokens"] / (one["ended"] - began) for one in said]),
        "preemptions": sum(one["preemptions"] for one in said),
        "copy_share": (after["copy_s"] - before["copy_s"]) / took,
        "computed_tokens": after["tokens_prefilled"] - before["tokens_prefilled"],
        "peak_bytes": peaks,
        "budget_bytes": {name: tiers[name]["budget"] for name in ("ram", "disk")},
        "within_budget": all(peaks[name] <= tiers[name]["budget"] for name in ("ram", "disk")),
        "stats": after,
    }


HEAD = "policy  agents  finished  tokens/s  ÷ 64   wait p50    p90    p99   Jain  copy %  RAM MB  disk MB  Linux %"


def line(row: dict[str, Any]) -> str:
    share = row.get("of_smallest")
    missed = []
    if row["finished"] < row["agents"]:
        missed.append("unfinished")
    if share is not None and share < LEAST_RATE:
        missed.append("rate")
    if row["copy_share"] > MOST_COPYING:
        missed.append("copying")
    if not row["within_budget"]:
        missed.append("memory")
    waits, peaks = row["wait_s"], row["peak_bytes"]
    return (
        f"{row['policy']:<6}{row['agents']:>8}{row['finished']:>10}{row['tokens_per_s']:>10.1f}"
        f"{1.0 if share is None else share:>6.2f}{waits['p50']:>11.2f}{waits['p90']:>7.2f}{waits['p99']:>7.2f}"
        f"{row['jain']:>7.3f}{100 * row['copy_share']:>8.1f}{peaks['ram'] / 1e6:>8.0f}{peaks['disk'] / 1e6:>9.0f}"
        f"{100 * row['linux_share']:>9.1f}" + (f"   MISSED: {', '.join(missed)}" if missed else "")
    )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    plt = harness.pyplot()
    if plt is None:
        return
    figure, (rate, wait) = plt.subplots(1, 2, figsize=(9.5, 3.6))
    for policy in dict.fromkeys(row["policy"] for row in rows):
        mine = [row for row in rows if row["policy"] == policy]
        agents = [row["agents"] for row in mine]
        rate.plot(agents, [row["tokens_per_s"] for row in mine], marker="o", label=policy)
        for p, style in (("p50", "-"), ("p90", "--"), ("p99", ":")):
            wait.plot(agents, [row["wait_s"][p] for row in mine], style, marker=".", label=f"{policy} {p}")
    rate.set(xlabel="agents", ylabel="tokens/s, all agents", ylim=(0, None))
    wait.set(xlabel="agents", ylabel="wait for a slot, s")
    for axis in (rate, wait):
        axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="small", help="nano, small, another shape of models.py, or a GGUF")
    parser.add_argument("--agents", type=int, action="append", help=f"{AGENTS}")
    parser.add_argument("--policy", action="append", help=f"{POLICIES}")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--quantum", default="64,10", help="in tokens, and in seconds")
    parser.add_argument("--ram", default="1G", help="budget for contexts in memory")
    parser.add_argument("--disk", default="4G", help="budget for contexts on disk")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "scale.json")
    return parser.parse_args(argv)


def main() -> None:
    options = parse()
    model = harness.model_path(options.model)
    print(HEAD, flush=True)
    rows: list[dict[str, Any]] = []
    for policy in options.policy or POLICIES:
        first = None
        for agents in options.agents or AGENTS:
            row = run(policy, agents, model, options)
            first = first or row
            row["of_smallest"] = row["tokens_per_s"] / first["tokens_per_s"]
            rows.append(row)
            print(line(row), flush=True)
            harness.write("scale", rows, options.out, seed=options.seed, model=options.model, slots=options.slots)
    plot(rows, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
