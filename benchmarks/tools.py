#!/usr/bin/env python
"""Calls of tools: what one costs, whether many agents are served in order and fairly, how a slow tool affects others.

    $ python benchmarks/tools.py
    one caller, µs                        p50      p99
    getpid                               21.3     60.1
    …

Four parts, each `--rounds` times; figures are medians over the rounds.

latency  One agent: getpid, `calc` (computed in the agent, counted by the kernel), `list_files` (run by a worker), and
         for comparison a note read from the store. The bound is for calc.
crowd    64 agents with several calls in flight each, of one tool that may run only once at a time. The tool records its
         begins and ends. This shows whether two calls overlapped, whether each agent's calls ran in order, whether any
         was lost or done twice, and by how much agents' numbers of served calls differed while all still waited.
slow     A call of a tool with a worker, while another tool runs and has a queue, against the same without.
mcp      A call of an MCP server's tool through aiosd, against the `mcp` package's own client with the same server. The
         server is mcp-server-time where `make mcp-servers` has installed it, else a small one of the same package.

Results go to benchmarks/results/tools.json.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Remove this folder from the path: in it this file would hide the package `tools`.
sys.path[:] = [str(ROOT), *(path for path in sys.path if path != str(ROOT / "benchmarks"))]

from benchmarks import harness  # noqa: E402

CALC_BOUND = 6.0  # × getpid
SLOW_BOUND = 1.1
AGENTS = 64
EACH = 6  # calls of each agent of the crowd, all in flight at once

TOOLS = '''
import os, time
from libaios.tool import define

@define(time=120)
def turn(log: str, agent: int, number: int, gate: str = "") -> None:
    """Writes down that it has begun and ended; with a gate, when that is there."""
    while gate and not os.path.exists(gate): time.sleep(0.001)
    if gate: return
    with open(log, "ab", buffering=0) as file:
        file.write(f"begin {agent} {number}\\n".encode())
        time.sleep(0.0005)
        file.write(f"end {agent} {number}\\n".encode())

@define(instances=8)
def quick() -> str:
    """Does nothing."""
    return "done"

@define(time=300)
def slow(seconds: float) -> None:
    """Takes long."""
    time.sleep(seconds)
'''

#: The server that is used if mcp-server-time is not installed.
SERVER = """
from mcp.server import MCPServer
server = MCPServer("own")
@server.tool()
def get_current_time(timezone: str) -> str:
    return timezone
server.run()
"""
QUESTION = {"timezone": "Europe/Berlin"}

LATENCY = """
import json, sys, time
import libaios as aios
calls = int(sys.argv[1])
aios.mem.add("x" * 100, key="note")
acts = {
    "getpid": (aios.proc.getpid, calls),
    "calc": (lambda: aios.tool.call("calc", expression="(3 + 4) * 2.5"), calls),
    "list_files": (lambda: aios.tool.call("list_files"), calls // 5),
    "mem.get": (lambda: aios.mem.get("note"), calls // 5),
}
took = {name: [] for name in acts}
for act, _ in acts.values():
    for _ in range(100): act()
for _ in range(10):  # they take turns, so that each has its share of what else the machine does
    for name, (act, times) in acts.items():
        for _ in range(times // 10):
            began = time.perf_counter()
            act()
            took[name].append((time.perf_counter() - began) * 1e6)
print(json.dumps(took))
"""

CROWD = """
import json, sys
import libaios as aios
from libaios.agent import connection
from libaios.wire import CallTool, Sys
log, each = sys.argv[1], int(sys.argv[2])
conn, me = connection(), aios.proc.getpid()
flying = [conn.submit(Sys.TOOL_CALL, CallTool("turn", {"log": log, "agent": me, "number": n})) for n in range(each)]
aios.msg.send(aios.proc.getppid(), me)
for one in flying: conn.result(one, type(None))
"""

LEADER = """
import os, sys, time
import libaios as aios
from libaios.agent import connection
from libaios.wire import CallTool, Sys
agents, log, each = int(sys.argv[1]), sys.argv[2], sys.argv[3]
conn, gate = connection(), log + ".gate"
held = conn.submit(Sys.TOOL_CALL, CallTool("turn", {"log": log, "agent": 0, "number": 0, "gate": gate}))
pids = [aios.proc.spawn("crowd.py", log, each) for _ in range(agents)]
for _ in pids: aios.msg.recv(timeout=120)  # all calls of all agents wait
began = time.monotonic()
open(gate, "w").close()
conn.result(held, type(None))
os.unlink(gate)
assert not any(aios.proc.wait(pid)[1] for pid in pids)
print(time.monotonic() - began)
"""

SLOW = """
import json, sys, time
import libaios as aios
from libaios.agent import connection
from libaios.wire import CallTool, Sys
calls = int(sys.argv[1])
conn = connection()
def each(times):
    took = []
    for _ in range(times):
        began = time.perf_counter()
        aios.tool.call("quick")
        took.append((time.perf_counter() - began) * 1e6)
    return took
each(100)
alone, beside = [], []
for _ in range(5):
    alone += each(calls // 5)
    flying = [conn.submit(Sys.TOOL_CALL, CallTool("slow", {"seconds": 1000})) for _ in range(8)]
    time.sleep(0.1)
    beside += each(calls // 5)
    for one in flying: conn.abandon(one)
    time.sleep(1.3)  # until its worker has been ended
print(json.dumps({"alone": alone, "beside": beside}))
"""

MCP = """
import json, sys, time
import libaios as aios
calls, question = int(sys.argv[1]), json.loads(sys.argv[2])
took = []
for number in range(calls + 20):
    began = time.perf_counter()
    aios.tool.call("clock__get_current_time", question)
    took.append((time.perf_counter() - began) * 1e6)
print(json.dumps(took[20:]))
"""


# ── aiosd ─────────────────────────────────────────────────────────────────────────────────────────────────


def run(system: harness.Aiosd, script: str, *args: str) -> str:
    """Run an agent; returns its output."""
    path = system.home / "agent.py"
    path.write_text(script)
    words = [*harness.command("aios-run"), str(path), *args]
    done = subprocess.run(words, env=system.env, cwd=system.home, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def latency(system: harness.Aiosd, calls: int) -> dict[str, dict[str, float]]:
    took = json.loads(run(system, LATENCY, str(calls)))
    return {name: figures(times) for name, times in took.items()}


def figures(times: Sequence[float]) -> dict[str, float]:
    return {"p50": harness.percentile(times, 0.5), "p99": harness.percentile(times, 0.99)}


def crowd(system: harness.Aiosd, agents: int, each: int) -> dict[str, float]:
    """Measure the crowd. Raises SystemExit if a call was lost, doubled or out of order."""
    log = system.home / "turns"
    log.unlink(missing_ok=True)
    (system.home / "crowd.py").write_text(CROWD)
    took = float(run(system, LEADER, str(agents), str(log), str(each)))
    order = turns(log.read_text().splitlines())
    numbers: dict[int, list[int]] = {}
    for agent, number in order:
        numbers.setdefault(agent, []).append(number)
    if len(numbers) != agents or any(served != list(range(each)) for served in numbers.values()):
        raise SystemExit("calls were lost, done twice, or out of order")
    return {"calls_per_s": len(order) / took, "apart": float(apart(order, each))}


def turns(lines: Sequence[str]) -> list[tuple[int, int]]:
    """The calls in the order in which they ran. Raises SystemExit if two overlapped."""
    order = []
    for begin, end in zip(lines[::2], lines[1::2], strict=True):
        if not begin.startswith("begin ") or end != begin.replace("begin", "end"):
            raise SystemExit(f"two calls at once: {begin!r}, {end!r}")
        _, agent, number = begin.split()
        order.append((int(agent), int(number)))
    return order


def apart(order: Sequence[tuple[int, int]], each: int) -> int:
    """The largest difference in the numbers of served calls of two agents, while all agents had calls waiting."""
    served: Counter[int] = Counter(dict.fromkeys((agent for agent, _ in order), 0))
    most = 0
    for agent, _ in order:
        served[agent] += 1
        most = max(most, max(served.values()) - min(served.values()))
        if served[agent] == each:
            break
    return most


def slow(system: harness.Aiosd, calls: int) -> dict[str, float]:
    took = json.loads(run(system, SLOW, str(calls)))
    alone, beside = (harness.percentile(took[name], 0.5) for name in ("alone", "beside"))
    return {"alone": alone, "beside": beside, "ratio": beside / alone}


# ── MCP ───────────────────────────────────────────────────────────────────────────────────────────────────


def server(folder: Path) -> list[str]:
    """The command of an MCP server with a tool get_current_time."""
    real = ROOT / "build" / "mcp-servers" / "time" / "bin" / "mcp-server-time"
    if real.exists():
        return [str(real)]
    own = folder / "server.py"
    own.write_text(SERVER)
    return [sys.executable, str(own)]


def mcp_through_aiosd(system: harness.Aiosd, calls: int) -> dict[str, float]:
    return figures(json.loads(run(system, MCP, str(calls), json.dumps(QUESTION))))


def mcp_direct(command: list[str], calls: int) -> dict[str, float]:
    return figures(asyncio.run(_direct(command, calls)))


async def _direct(command: list[str], calls: int) -> list[float]:
    from mcp import Client, StdioServerParameters, stdio_client

    took = []
    async with Client(stdio_client(StdioServerParameters(command=command[0], args=command[1:]))) as client:
        for _ in range(calls + 20):
            began = time.perf_counter()
            await client.call_tool("get_current_time", QUESTION)
            took.append((time.perf_counter() - began) * 1e6)
    return took[20:]


# ── the run ───────────────────────────────────────────────────────────────────────────────────────────────


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    (folder / "tools.py").write_text(TOOLS)
    parts = options.parts.split(",")
    config = []
    command = server(folder) if "mcp" in parts else []
    if command:
        (folder / "aiosd.toml").write_text(
            f"[mcpServers.clock]\ncommand = {json.dumps(command[0])}\nargs = {json.dumps(command[1:])}\n"
        )
        config = ["--config", str(folder / "aiosd.toml")]
    with harness.Aiosd(
        harness.model_path("nano"), "--tools", str(folder / "tools.py"), "--threads", "1", *config
    ) as system:
        acts: dict[str, Callable[[], Any]] = {
            "latency": lambda: latency(system, options.calls),
            "crowd": lambda: crowd(system, options.agents, EACH),
            "slow": lambda: slow(system, options.calls // 2),
            "mcp": lambda: {
                "aiosd": mcp_through_aiosd(system, options.calls // 10),
                "package": mcp_direct(command, options.calls // 10),
            },
        }
        return [{"part": part, "round": number, **acts[part]()} for number in range(options.rounds) for part in parts]


def median(rows: Sequence[dict[str, Any]], part: str, *keys: str) -> float:
    found = []
    for row in rows:
        if row["part"] == part:
            value: Any = row
            for key in keys:
                value = value[key]
            found.append(value)
    return statistics.median(found)


def show(rows: Sequence[dict[str, Any]]) -> None:
    parts = {row["part"] for row in rows}
    if "latency" in parts:
        print(f"{'one caller, µs':34}{'p50':>9}{'p99':>9}{'× getpid':>10}")
        for name in ("getpid", "calc", "list_files", "mem.get"):
            ratio = statistics.median(r[name]["p50"] / r["getpid"]["p50"] for r in rows if r["part"] == "latency")
            bound = f"  (≤ {CALC_BOUND:g}: {harness.verdict(ratio, CALC_BOUND)})" if name == "calc" else ""
            p50, p99 = (median(rows, "latency", name, key) for key in ("p50", "p99"))
            print(f"{name:34}{p50:9.1f}{p99:9.1f}{ratio:10.1f}{bound}")
    if "crowd" in parts:
        print("\ncrowd on one tool: one at a time, each agent's calls in order, none lost or done twice")
        print(f"{'calls per second':34}{median(rows, 'crowd', 'calls_per_s'):9.0f}")
        most = max(row["apart"] for row in rows if row["part"] == "crowd")
        print(f"{'agents apart, calls at most':34}{most:9.0f}")
    if "slow" in parts:
        ratio = median(rows, "slow", "ratio")
        print("\na call beside a slow tool and its queue")
        print(f"{'p50 alone, beside, µs':34}{median(rows, 'slow', 'alone'):9.1f}{median(rows, 'slow', 'beside'):9.1f}")
        print(f"{'ratio':34}{ratio:9.2f}  (≤ {SLOW_BOUND}: {harness.verdict(ratio, SLOW_BOUND)})")
    if "mcp" in parts:
        print(f"\n{'a call of an MCP server, µs':34}{'p50':>9}{'p99':>9}")
        for name, shown in (("aiosd", "through aiosd"), ("package", "the package's own client")):
            p50, p99 = (median(rows, "mcp", name, key) for key in ("p50", "p99"))
            print(f"{shown:34}{p50:9.0f}{p99:9.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=2000, help="calls of the single caller per round")
    parser.add_argument("--agents", type=int, default=AGENTS)
    parser.add_argument("--parts", default="latency,crowd,slow,mcp", help="the parts to run")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="aios-tools-") as folder:
        rows = measure(options, Path(folder))
    show(rows)
    settings = {name: getattr(options, name) for name in ("rounds", "calls", "agents", "parts")}
    print(f"\n{harness.write('tools', rows, options.out, each=EACH, **settings)}")


if __name__ == "__main__":
    main()
