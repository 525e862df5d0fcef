#!/usr/bin/env python
"""What a sandbox costs an agent: at its start, in memory, and in its work.

    $ python benchmarks/sandbox.py
                                        none      flat      cage     flat     cage
    agents spawned per second          241.0     213.0     190.0     0.88     0.79
    …

The last columns are ratios to none. The levels take turns, `--rounds` times; each figure is the median. One agent
spawns many others through the SDK, and their memory is read while all are alive. The work of an agent is timed inside
the sandbox, each operation many times.

Results go to benchmarks/results/sandbox.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import harness  # noqa: E402

LEVELS = ("none", "flat", "cage")
BOUND = 1.1

MEMBER = "import libaios as aios\naios.proc.getpid()\naios.msg.send(aios.proc.getppid(), 0)\naios.msg.recv()\n"

CROWD = """
import json, sys, time
import libaios as aios
from aiosd import procfs
number, level = int(sys.argv[1]), sys.argv[2]
began = time.monotonic()
pids = [aios.proc.spawn("member.py", sandbox=level, detached=True) for _ in range(number)]
spawned_s = time.monotonic() - began
for _ in pids:
    aios.msg.recv(timeout=60)
ospids = {one.pid: one.ospid for one in aios.proc.ps()}
pss = sum(procfs.pss_bytes(ospids[pid]) for pid in pids)
for pid in pids:
    aios.msg.send(pid, 0)
assert not any(aios.proc.wait()[1] for _ in pids)
print(json.dumps({"per_s": number / spawned_s, "pss_kb": pss / number / 1e3}))
"""

#: Operations of an agent inside the sandbox, timed in µs.
INSIDE = """
import json, os, subprocess, sys, time
import libaios as aios
def each(act, times):
    best = None
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(times): act()
        took = (time.perf_counter() - began) / times * 1e6
        best = took if best is None else min(best, took)
    return best
def read():
    fd = os.open("/etc/passwd", os.O_RDONLY); os.read(fd, 4096); os.close(fd)
def fork():
    pid = os.fork()
    if not pid: os._exit(0)
    os.waitpid(pid, 0)
imports = [sys.executable, "-c", "import json, asyncio, email, http.client, sqlite3, unittest, xml.dom.minidom"]
print(json.dumps({
    "aios_getpid_us": each(aios.proc.getpid, 2000), "getppid_us": each(os.getppid, 200000),
    "open_read_us": each(read, 20000), "fork_us": each(fork, 100),
    "imports_us": each(lambda: subprocess.run(imports, check=True), 2),
}))
"""

FIGURES = {
    "per_s": "agents spawned per second", "pss_kb": "memory of an agent (PSS), kB", "start_us": "aios-run -- true, µs",
    "aios_getpid_us": "aios.proc.getpid(), µs", "getppid_us": "getppid(2), µs",
    "open_read_us": "open, read, close, µs", "fork_us": "fork and wait, µs", "imports_us": "python3 with imports, µs",
}  # fmt: skip


def run(system: harness.Aiosd, *argv: str, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [*harness.command("aios-run"), *argv], env=system.env, cwd=cwd or system.home, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, check=True, text=True,
    )  # fmt: skip
    return done.stdout


def one_round(system: harness.Aiosd, level: str, agents: int) -> dict[str, float]:
    found: dict[str, float] = json.loads(run(system, "crowd.py", str(agents), level))
    found |= json.loads(run(system, "--sandbox", level, "inside.py"))
    starts = []
    for _ in range(10):
        began = time.perf_counter()
        run(system, "--sandbox", level, "--", "true")
        starts.append((time.perf_counter() - began) * 1e6)
    return found | {"start_us": statistics.median(starts)}


def measure(rounds: int, agents: int) -> dict[str, dict[str, float]]:
    with harness.Aiosd(harness.model_path("nano")) as system:
        for name, text in (("member.py", MEMBER), ("crowd.py", CROWD), ("inside.py", INSIDE)):
            (system.home / name).write_text(text)
        taken: dict[str, list[dict[str, float]]] = {level: [] for level in LEVELS}
        for _ in range(rounds):
            for level in LEVELS:
                taken[level].append(one_round(system, level, agents))
    return {
        level: {name: statistics.median(one[name] for one in some) for name in FIGURES} for level, some in taken.items()
    }


def rows(found: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    return [
        {
            "figure": name,
            **{level: round(found[level][name], 3) for level in LEVELS},
            **{f"{level}_ratio": round(found[level][name] / found[LEVELS[0]][name], 3) for level in LEVELS[1:]},
        }
        for name in FIGURES
    ]


def show(table: list[dict[str, Any]]) -> None:
    print(f"{'':34}{''.join(f'{level:>12}' for level in LEVELS)}{''.join(f'{level:>10}' for level in LEVELS[1:])}")
    for row in table:
        cells = "".join(f"{row[level]:12.2f}" for level in LEVELS)
        cells += "".join(f"{row[level + '_ratio']:10.2f}" for level in LEVELS[1:])
        print(f"{FIGURES[row['figure']]:34}{cells}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--agents", type=int, default=200, help="agents alive at once")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    table = rows(measure(options.rounds, options.agents))
    show(table)
    harness.write("sandbox", table, options.out, agents=options.agents, rounds=options.rounds)


if __name__ == "__main__":
    main()
