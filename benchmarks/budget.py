#!/usr/bin/env python
"""By how much an agent can exceed each kind of budget.

    $ python benchmarks/budget.py
    kind                     budget    beyond it   at most   lag
    tokens, 20 at once          400            0         0     -
    time                        1 s       0.02 s     0.1 s     -
    memory                     200M          61M         -  0.06 s
    …

Every agent tries to exceed its budget by as much as it can: by many calls at once, many forks, or allocating memory as
fast as possible. Budgets that are counted must not be exceeded at all. For those that are sampled this shows the worst
of `--rounds`: by how much an agent was over its budget when it was ended, and how long it had been over it. Exit code
1: a budget was exceeded by more than its bound.

Results go to benchmarks/results/budget.json.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from aiosd.units import format_size  # noqa: E402
from benchmarks import harness  # noqa: E402

HEADER = "import os, subprocess, sys, time\nimport libaios as aios\nME = aios.proc.getpid()\n"

#: Twenty generations at once, some of them streams, by four agents.
GENERATE = """
import threading
if len(sys.argv) < 2:
    pids = [aios.proc.spawn(sys.argv[0], "child") for _ in range(3)]
def generate(number):
    try: aios.llm.complete(f"Once {ME} {number}", max_tokens=1000, ignore_eos=True)
    except OSError: pass
threads = [threading.Thread(target=generate, args=(number,)) for number in range(5)]
for one in threads: one.start()
for one in threads: one.join()
if len(sys.argv) < 2:
    for _ in pids: aios.proc.wait()
"""

EMBED = """
import threading
def embed(number):
    try:
        for n in range(20): aios.llm.embed([f"text {number} {n} of several words"] * 3)
    except OSError: pass
threads = [threading.Thread(target=embed, args=(number,)) for number in range(8)]
for one in threads: one.start()
for one in threads: one.join()
"""

#: Four generations at once; meanwhile the main thread asks how many tokens of context they hold.
HOLD = """
import threading
def generate(number):
    try: aios.llm.complete(f"Once upon a time {number}", max_tokens=1000, ignore_eos=True)
    except OSError: pass
threads = [threading.Thread(target=generate, args=(number,)) for number in range(4)]
for one in threads: one.start()
most = 0
while any(one.is_alive() for one in threads):
    most = max(most, aios.proc.ps()[0].ctx_tokens)
print(most, flush=True)
"""

TOOLS = """
import threading
if len(sys.argv) < 2:
    pids = [aios.proc.spawn(sys.argv[0], "child") for _ in range(3)]
done = []
def call():
    try:
        while True: done.append(aios.tool.call("calc", expression="6*7"))
    except OSError: pass
threads = [threading.Thread(target=call) for _ in range(4)]
for one in threads: one.start()
for one in threads: one.join()
os.write(1, b"%d\\n" % len(done))
if len(sys.argv) < 2:
    for _ in pids: aios.proc.wait()
"""

CHILDREN = """
import threading
os.write(1, b"1\\n")
def spawn():
    try:
        while True: aios.proc.spawn(sys.argv[0])
    except OSError: pass
threads = [threading.Thread(target=spawn) for _ in range(2)]
for one in threads: one.start()
for one in threads: one.join()
"""

#: Allocates memory as fast as Linux gives it; prints after each block how much it has, and the time.
MEMORY = """
import mmap
limit, have = int(sys.argv[1]), 30 << 20
while True:
    block = mmap.mmap(-1, 4 << 20)
    block.write(bytes(4 << 20))
    have += 4 << 20
    globals()[f"b{have}"] = block
    os.write(1, b"%d %f\\n" % (have, time.time()))
"""

CPU = """
for _ in range(3):
    if not os.fork(): break
while True: pass
"""

#: Each child uses the processor for 30 ms and ends, and its parent waits for it.
SHORT = """
while True:
    if not os.fork():
        end = time.process_time() + 0.03
        while time.process_time() < end: pass
        os._exit(0)
    os.wait()
"""

FORKS = """
number = 1
while True:
    subprocess.Popen(["sleep", "100"])
    number += 1
    os.write(1, b"%d %f\\n" % (number, time.time()))
"""

FILES = """
size = 0
while True:
    with open(f"{os.environ['HOME']}/{size}", "wb") as file: file.write(bytes(1 << 20))
    size += 1 << 20
    os.write(1, b"%d %f\\n" % (size, time.time()))
    time.sleep(0.01)
"""

STORE = """
try:
    while True: aios.sto.write("file", b"x" * 100_000)
except OSError as err: print(err)
"""

IGNORES = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: time.sleep(1)\n"


@dataclass(frozen=True)
class Case:
    """`beyond`: from the agent's output and `aios-inspect` computes (by how much the budget was exceeded, for how many
    seconds). `bound`: by how much it may be exceeded; None: this is only shown."""

    name: str
    kind: str
    limit: str
    options: tuple[str, ...]
    script: str
    beyond: Callable[[list[str], dict[str, Any]], tuple[float, float | None]]
    bound: float | None
    show: Callable[[float], str]


def used(kind: str) -> Callable[[list[str], dict[str, Any]], tuple[float, float | None]]:
    """By how much the kernel's own count exceeds the limit."""

    def beyond(lines: list[str], found: dict[str, Any]) -> tuple[float, float | None]:
        one = found["budgets"][0]["kinds"][kind]
        return max(one["used"] - one["limit"], 0), None

    return beyond


def answered(limit: int) -> Callable[[list[str], dict[str, Any]], tuple[float, float | None]]:
    """By how much the agents' own count exceeds the limit."""
    return lambda lines, found: (max(sum(map(int, lines)) - limit, 0), None)


def seconds(limit: float) -> Callable[[list[str], dict[str, Any]], tuple[float, float | None]]:
    return lambda lines, found: (max(found["ended"] - found["started"] - limit, 0.0), None)


def grown(limit: int) -> Callable[[list[str], dict[str, Any]], tuple[float, float | None]]:
    """From lines with a size and a time: by how much the last size exceeds the limit, and for how long."""

    def beyond(lines: list[str], found: dict[str, Any]) -> tuple[float, float | None]:
        rows = [(int(size), float(at)) for size, at in (line.split() for line in lines)]
        over = next((at for size, at in rows if size > limit), found["ended"])
        return max(rows[-1][0] - limit, 0), max(found["ended"] - over, 0.0)

    return beyond


def number(value: float) -> str:
    return str(int(value))


def time_s(value: float) -> str:
    return f"{value:.2f} s"


M = 1 << 20
CASES = (
    Case("tokens, 20 calls at once", "tokens", "400", ("--tokens", "400"), GENERATE, used("tokens"), 0, number),
    Case("tokens, 8 embeddings at once", "tokens", "200", ("--tokens", "200"), EMBED, used("tokens"), 0, number),
    Case("context, 4 calls at once", "context", "300", ("--context", "300"), HOLD, answered(300), 0, number),
    Case("tool calls, 16 at once", "tool_calls", "200", ("--tool-calls", "200"), TOOLS, answered(200), 0, number),
    Case("children of children", "children", "12", ("--children", "12"), CHILDREN, answered(13), 0, number),
    Case("disk: store", "disk", "1M", ("--sandbox", "flat", "--disk", "1M"), STORE, used("disk"), 0, format_size),
    Case("time", "time", "1 s", ("--time", "1"), "time.sleep(100)", seconds(1), 0.1, time_s),
    Case("time, TERM ignored", "time", "1 s", ("--time", "1"), IGNORES, seconds(1), 5.1, time_s),
    Case("CPU, 4 processes", "cpu", "1 s", ("--cpu", "1"), CPU, used("cpu"), None, time_s),
    Case("CPU, short processes", "cpu", "1 s", ("--cpu", "1"), SHORT, used("cpu"), None, time_s),
    Case("memory", "memory", "200M", ("--memory", "200M"), MEMORY, grown(200 * M), None, format_size),
    Case("processes", "processes", "50", ("--processes", "50"), FORKS, grown(50), None, number),
    Case(
        "disk: workspace",
        "disk",
        "20M",
        ("--sandbox", "flat", "--disk", "20M"),
        FILES,
        grown(20 * M),
        None,
        format_size,
    ),
)


def run(system: harness.Aiosd, case: Case, number: int) -> tuple[float, float | None]:
    script = system.home / f"{case.kind}{CASES.index(case)}-{number}.py"
    script.write_text(HEADER + 'os.write(2, b"%d\\n" % ME)\n' + case.script)
    argv = [*harness.command("aios-run"), *case.options, str(script)]
    if case.kind == "memory":
        argv.append(str(200 * M))
    done = subprocess.run(argv, env=system.env, cwd=system.home, capture_output=True, text=True, timeout=120)
    pid = int(done.stderr.split()[0])
    (found,) = json.loads(system.call("aios-inspect", str(pid)))
    if done.returncode != 124 and case.script not in (CHILDREN, EMBED):  # these may end before their budget is used up
        sys.exit(f"{case.name}: exit code {done.returncode}\n{done.stderr}")
    return case.beyond(done.stdout.split("\n")[:-1], found)


def measure(rounds: int, wanted: list[str]) -> list[dict[str, Any]]:
    rows = []
    with harness.Aiosd(harness.model_path("nano"), "--threads", "1") as system:
        for case in CASES:
            if wanted and not any(word in case.name for word in wanted):
                continue
            results = [run(system, case, number) for number in range(rounds)]
            worst = max(beyond for beyond, _ in results)
            lags = [lag for _, lag in results if lag is not None]
            row = {"kind": case.name, "budget": case.limit, "beyond": worst, "bound": case.bound}
            rows.append(row | {"lag_s": max(lags, default=None), "each": results})
            show(case, rows[-1])
    return rows


def show(case: Case, row: dict[str, Any]) -> None:
    bound = "" if case.bound is None else case.show(case.bound)
    lag = "" if row["lag_s"] is None else f"{row['lag_s']:.2f} s"
    print(f"{case.name:30}{case.limit:>8}{case.show(row['beyond']):>12}{bound:>10}{lag:>10}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="where the results go")
    parser.add_argument("wanted", nargs="*", help="only kinds whose names contain one of these words")
    args = parser.parse_args()
    print(f"{'kind':30}{'budget':>8}{'beyond it':>12}{'at most':>10}{'lag':>10}")
    rows = measure(args.rounds, args.wanted)
    print(harness.write("budget", rows, args.out))
    return int(any(row["bound"] is not None and row["beyond"] > row["bound"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
