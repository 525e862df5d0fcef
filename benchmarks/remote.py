#!/usr/bin/env python
"""What it costs to use a remote model through aiosd: calls through a remote core, against direct calls of its endpoint.

n clients, each a process of its own, make calls one after the other: a chat, G greedy tokens, streamed. Direct calls
come from a plain client that keeps its connection; through aiosd the same calls come from an agent with the SDK. The
sides alternate (A B B A). Neighbouring runs make a pair, and the median of the pairs' ratios counts. No prompt is sent
twice, because the endpoint would have it in its cache. The endpoint's work for the prompts of each side is shown, to
prove that it was the same. G = 1 shows the cost of a call, many tokens show the cost of a token.

The endpoint is llama-server (`make peers`), for the ratios that count, or a fake one that answers at once. With the
fake one the difference between the sides is aiosd's own time for each call and each token.

    $ python benchmarks/remote.py --model smollm2
    endpoint      n tokens  direct ms  aiosd ms  ratio  CPU ms  endpoint's  computed
    …
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from aiosd import procfs  # noqa: E402  the checkout comes first
from benchmarks import harness  # noqa: E402
from benchmarks.harness import AGENT, LOOP, Aiosd, Client, makespan, race  # noqa: E402

BAR = 1.10

THROUGH = (
    AGENT
    + """
def run(order):
    count = computed = 0
    for prompt in order["prompts"]:
        for piece in aios.llm.chat([{"role": "user", "content": prompt}], max_tokens=order["generate"], seed=1,
                                   temperature=0.0, stream=True):
            pass
        count += piece.usage.completion_tokens
        computed += piece.usage.prompt_tokens - piece.usage.cached_tokens
    return {"tokens": count, "computed": computed}
serve(run)
"""
)

DIRECTLY = (
    LOOP
    + """
import http.client
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
connection.connect()
def ask(body):
    for last in (False, True):  # the server closes connections that were idle for some seconds
        try:
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            return connection.getresponse()
        except (ConnectionError, http.client.HTTPException):
            if last:
                raise
            connection.close()
def run(order):
    count = computed = 0
    for prompt in order["prompts"]:
        body = {"model": "m", "messages": [{"role": "user", "content": prompt}], "max_tokens": order["generate"],
                "seed": 1, "temperature": 0, "top_p": 0.95, "stream": True, "stream_options": {"include_usage": True}}
        text, usage = "", None
        for line in ask(json.dumps(body)):
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    text += choice["delta"].get("content") or ""
        count += usage["completion_tokens"]
        computed += usage["prompt_tokens"] - usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
    return {"tokens": count, "computed": computed}
serve(run)
"""
)

#: The fake endpoint: it answers every request at once, with one event and one write for each requested token.
FAKE = """
import json, socket, sys, threading
def event(value):
    data = b"data: " + json.dumps(value).encode() + b"\\n\\n"
    return b"%x\\r\\n%s\\r\\n" % (len(data), data)
HEAD = b"HTTP/1.1 200 OK\\r\\nContent-Type: text/event-stream\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n"
TOKEN = event({"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m",
               "choices": [{"index": 0, "delta": {"content": " word"}, "finish_reason": None}]})
def serve(connection):
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    file = connection.makefile("rb")
    while file.readline():
        size = 0
        while (line := file.readline().strip()):
            if line.lower().startswith(b"content-length:"):
                size = int(line.split(b":")[1])
        number = json.loads(file.read(size))["max_tokens"]
        connection.sendall(HEAD)
        for _ in range(number):
            connection.sendall(TOKEN)
        connection.sendall(event({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
            + event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": number}})
            + b"e\\r\\ndata: [DONE]\\n\\n\\r\\n0\\r\\n\\r\\n")
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""

WORDS = ["river", "stone", "lamp", "green", "quiet", "winter", "paper", "cloud", "garden", "silver", "road", "music"]


def orders(count: int, calls: int, generate: int, rng: random.Random) -> list[dict[str, Any]]:
    """An order for each client. Prompts are random; the same `rng` gives new ones each time."""
    return [
        {"prompts": [" ".join(rng.choices(WORDS, k=24)) for _ in range(calls)], "generate": generate}
        for _ in range(count)
    ]


@contextlib.contextmanager
def fake() -> Iterator[tuple[int, int]]:
    """Start the fake endpoint; its port and pid."""
    process = subprocess.Popen([sys.executable, "-c", FAKE], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline()), process.pid
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@contextlib.contextmanager
def llama_server(options: argparse.Namespace) -> Iterator[tuple[int, int]]:
    path = harness.model_path(options.model)
    with harness.Server(path, max(options.n), 1024, options.threads, "--jinja") as server:
        yield server.port, server.process.pid


def cpu_seconds(pid: int) -> float:
    """CPU time of a process with all its threads, also those that have ended: each exchange has a thread."""
    stat = procfs.read_stat(pid)
    return stat.cpu_s if stat is not None else 0.0


def measure(
    clients: Sequence[Client], given: list[dict[str, Any]], processes: Sequence[int], endpoint: int
) -> dict[str, float]:
    before, its = sum(map(cpu_seconds, processes)), cpu_seconds(endpoint)
    told = race(clients, given)
    calls = len(given) * len(given[0]["prompts"])
    return {
        "calls": calls,
        "tokens": sum(one["tokens"] for one in told),
        "computed": sum(one["computed"] for one in told) / calls,  # tokens of a prompt, without those in a cache
        "ms": makespan(told) / len(given[0]["prompts"]) * 1e3,  # of a call, with n of them at a time
        "endpoint_ms": (cpu_seconds(endpoint) - its) / calls * 1e3,
        "cpu_ms": (sum(map(cpu_seconds, processes)) - before) / calls * 1e3,  # of kernel and core, per call
    }


def run_cells(name: str, port: int, endpoint: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    rng = random.Random(options.seed)
    with Aiosd(f"http://127.0.0.1:{port}/v1#m", "--concurrency", str(max(options.n))) as system:
        own = [int(one["ospid"]) for one in system.processes() if one["name"] in ("llm", "kernel")]
        for n in options.n:
            direct = [Client([sys.executable, "-c", DIRECTLY, str(port)]) for _ in range(n)]
            for client in direct:
                client.expect("connected")
            sides = {"direct": direct, "aiosd": system.start(n, THROUGH)}
            for generate in options.generate:
                calls = max(1, options.tokens // (generate + 8) // n)
                for clients in sides.values():  # warm up
                    measure(clients, orders(n, 2, generate, rng), own, endpoint)
                for turn in range(2 * options.pairs):
                    for side in ("direct", "aiosd") if turn % 2 == 0 else ("aiosd", "direct"):
                        given = orders(n, calls, generate, rng)
                        cell = {"endpoint": name, "n": n, "generate": generate, "side": side, "turn": turn}
                        rows.append({**cell, **measure(sides[side], given, own, endpoint)})
            for client in direct:
                client.close()
    return rows


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    if not options.only_fake:
        with llama_server(options) as (port, pid):
            rows += run_cells("llama-server", port, pid, options)
    with fake() as (port, pid):
        rows += run_cells("fake", port, pid, options)
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By cell: medians, the median ratio of neighbouring runs, and the CPU time of a token in aiosd's processes."""
    found = []
    for cell in dict.fromkeys((row["endpoint"], row["n"], row["generate"]) for row in rows):
        mine = [row for row in rows if (row["endpoint"], row["n"], row["generate"]) == cell]
        direct, ours = ([row for row in mine if row["side"] == side] for side in ("direct", "aiosd"))
        pairs = list(zip(ours, direct, strict=True))
        found.append(
            {
                "endpoint": cell[0],
                "n": cell[1],
                "generate": cell[2],
                "direct_ms": statistics.median(row["ms"] for row in direct),
                "aiosd_ms": statistics.median(row["ms"] for row in ours),
                "cpu_ms": statistics.median(row["cpu_ms"] for row in ours),
                "endpoint_ms": statistics.median(row["endpoint_ms"] for row in direct),
                "computed": [statistics.median(row["computed"] for row in side) for side in (direct, ours)],
                # A greedy text may end early, so one side may have more tokens: times are scaled to the same number.
                "ratio": harness.median_ratio([(a["ms"] / a["tokens"], b["ms"] / b["tokens"]) for a, b in pairs]),
            }
        )
    return found


def added(found: Sequence[dict[str, Any]]) -> list[str]:
    """aiosd's own time for each call, and for each token of a long answer, from the runs with the fake endpoint."""
    lines = []
    for n in dict.fromkeys(cell["n"] for cell in found if cell["endpoint"] == "fake"):
        cells = [cell for cell in found if cell["endpoint"] == "fake" and cell["n"] == n]
        short, long = cells[0], cells[-1]
        call = short["aiosd_ms"] - short["direct_ms"]
        tokens = max(long["generate"] - short["generate"], 1) * n
        token = (long["aiosd_ms"] - long["direct_ms"] - call) / tokens * 1e3
        cpu = (long["cpu_ms"] - short["cpu_ms"]) / tokens * n * 1e3
        lines.append(f"aiosd adds, {n} at a time: {call:.2f} ms a call, {token:.0f} us a token (CPU {cpu:.0f} us)")
    return lines


def table(found: Sequence[dict[str, Any]]) -> list[str]:
    """The table's lines. CPU: of aiosd's kernel and core, and of the endpoint, per call. Computed: prompt tokens per
    call that were not cached, for both sides."""
    lines = ["endpoint      n tokens  direct ms  aiosd ms  ratio  CPU ms  endpoint's  computed"]
    for cell in found:
        verdict = ""
        if cell["endpoint"] != "fake":
            verdict = f" (bar {BAR:.2f} {harness.verdict(cell['ratio'], BAR)})"
        lines.append(
            f"{cell['endpoint']:12} {cell['n']:2} {cell['generate']:6} {cell['direct_ms']:10.2f} "
            f"{cell['aiosd_ms']:9.2f} {cell['ratio']:6.3f} {cell['cpu_ms']:7.2f} {cell['endpoint_ms']:11.2f}  "
            f"{cell['computed'][0]:.1f}/{cell['computed'][1]:.1f}{verdict}"
        )
    return lines + added(found)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("-n", type=int, nargs="+", default=[1, 4], help="clients at a time (1 4)")
    parser.add_argument("--generate", type=int, nargs="+", default=[1, 64], help="tokens of an answer (1 64)")
    parser.add_argument("--tokens", type=int, default=200, help="about as many tokens in each measurement (200)")
    parser.add_argument("--pairs", type=int, default=6, help="how many times A B B A (6)")
    parser.add_argument("--threads", type=int, default=2, help="threads of llama-server (2)")
    parser.add_argument("--only-fake", action="store_true")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def main() -> None:
    options = parse()
    rows = run(options)
    found = summary(rows)
    print("\n".join(table(found)))
    about = {name: value for name, value in vars(options).items() if name != "out"}
    harness.write("remote", rows, options.out, options=about, summary=found)


if __name__ == "__main__":
    main()
