#!/usr/bin/env python
"""Many agents on one model: aiosd against llama-server, and against one prompt at a time behind a lock.

Workload W(n): n agents, each a process of its own; a shared system prompt of P tokens, 64 private tokens, 4 turns of 32
generated tokens with 32 tokens of a tool's answer between them; greedy, token ids, random from a seed that is new in
every run, so that nothing is cached from the run before. What counts is the makespan: from the first request to the
last answer, all processes connected before. Sides alternate (A B B A); the ratio is the median of the pairs'.

llama-server runs natively built from the same llama.cpp sources (`make peers`), with as many slots as agents, each
agent bound to its slot, its prompt cache on, and flash attention as is faster for it in a run before the clock starts. The
lock: one process with llama-cpp-python's `Llama`, which keeps the last prompt's state, serving turn after turn.

    $ make peers && taskset -c 0,1 python benchmarks/crowd.py
    model    n  prefix   aiosd s  server s  ratio   bar   lock s  ratio
    small   64     512      10.1      24.0   0.42  0.50     …
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.decode import command, cpu_name, model_path  # noqa: E402

AGENTS, PREFIXES = (1, 16, 64), (0, 512, 2048)
PRIVATE, TURNS, GENERATED, TOOL = 64, 4, 32, 32
BARS = {(64, 512): 0.5, (64, 2048): 0.3}  # on the model of 60 M parameters; elsewhere never above
NEVER_ABOVE = 1.05
LOCK_BAR = 0.45  # at 64 agents

AIOSD_AGENT = """
import json, sys, time
import libaios as aios
aios.proc.getpid()
print("connected", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    tokens, began = order["prompt"], time.monotonic()
    for tool in order["tools"]:
        result = aios.llm.complete(tokens, max_tokens=order["generate"], temperature=0.0, ignore_eos=True)
        tokens = tokens + result.tokens + tool
    print(json.dumps([began, time.monotonic(), len(tokens)]), flush=True)
"""


def orders(n: int, prefix: int, seed: int, vocab: int) -> list[dict[str, Any]]:
    """What each agent is told: its first prompt and the answers of its tool."""
    rng = np.random.default_rng(seed)

    def words(count: int) -> list[int]:
        return list(map(int, rng.integers(300, vocab, count)))

    shared = words(prefix)
    return [
        {"prompt": shared + words(PRIVATE), "tools": [words(TOOL) for _ in range(TURNS)], "generate": GENERATED}
        for _ in range(n)
    ]


def context_of(prefix: int) -> int:
    """Tokens of the longest conversation, rounded up."""
    return -(-(prefix + PRIVATE + TURNS * (GENERATED + TOOL) + 32) // 256) * 256


# ── clients: a process per agent on every side, told what to do by a line on stdin ────────────────────────


class Client:
    def __init__(self, argv: list[str], env: dict[str, str]) -> None:
        self.process = subprocess.Popen(argv, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"a client ended: {self.process.args}")
        return line.strip()

    def tell(self, order: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


def makespan(clients: list[Client], told: list[dict[str, Any]]) -> float:
    for client, order in zip(clients, told, strict=True):
        client.tell(order)
    times = [json.loads(client.read()) for client in clients]
    wanted = len(told[0]["prompt"]) + TURNS * (GENERATED + TOOL)
    assert all(length == wanted for _, _, length in times), "somebody got fewer tokens"
    return float(max(end for _, end, _ in times) - min(began for began, _, _ in times))


class Aiosd:
    def __init__(self, home: str, model: Path, n: int, ctx: int, threads: int, options: list[str]) -> None:
        self.env = {**os.environ, "AIOS_HOME": home, "PYTHONPATH": str(ROOT)}
        argv = [*command("aiosd"), "--model", f"bench={model}", "--slots", str(n), "--ctx", str(ctx)]
        self.daemon = subprocess.Popen(
            [*argv, "--threads", str(threads), *options], env=self.env, stderr=subprocess.PIPE, text=True
        )
        assert self.daemon.stderr is not None
        for line in self.daemon.stderr:
            if line.startswith("aiosd: ready"):
                break
        else:
            sys.exit("aiosd did not start")
        script = Path(home, "agent.py")
        script.write_text(AIOSD_AGENT)
        self.clients = [Client([*command("aios-run"), str(script)], self.env) for _ in range(n)]
        for client in self.clients:
            assert client.read() == "connected"

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.daemon.terminate()
        self.daemon.wait(30)
        assert self.daemon.stderr is not None
        self.daemon.stderr.close()


class Server:
    def __init__(self, binary: Path, model: Path, n: int, ctx: int, threads: int, flash: str) -> None:
        self.port = free_port()
        argv = [str(binary), "-m", str(model), "-c", str(ctx * n), "-np", str(n), "-t", str(threads)]
        argv += ["-tb", str(threads), "-fa", flash, "--no-kv-unified", "--port", str(self.port), "--no-ui"]
        self.process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not self._healthy():
            if self.process.poll() is not None:
                sys.exit(f"llama-server ended with {self.process.returncode}: {' '.join(argv)}")
            time.sleep(0.1)
        argv = [sys.executable, __file__, "--http-client", str(self.port)]
        self.clients = [Client([*argv, str(slot)], dict(os.environ)) for slot in range(n)]
        for client in self.clients:
            assert client.read() == "connected"

    def _healthy(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.process.terminate()
        self.process.wait(30)


def http_client(port: int, slot: int) -> None:
    """One agent of llama-server: a connection that is kept, its own slot."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.connect()
    print("connected", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        tokens, began = order["prompt"], time.monotonic()
        for tool in order["tools"]:
            body = {
                "prompt": tokens, "n_predict": order["generate"], "temperature": 0.0, "ignore_eos": True,
                "cache_prompt": True, "return_tokens": True, "id_slot": slot,
            }  # fmt: skip
            answer = post(connection, json.dumps(body))
            tokens = tokens + answer["tokens"] + tool
        print(json.dumps([began, time.monotonic(), len(tokens)]), flush=True)


def post(connection: http.client.HTTPConnection, body: str) -> Any:
    """The server closes connections that were idle for some seconds: then once more on a new one."""
    for last in (False, True):
        try:
            connection.request("POST", "/completion", body, {"Content-Type": "application/json"})
            return json.loads(connection.getresponse().read())
        except (ConnectionError, http.client.HTTPException):
            if last:
                raise
            connection.close()
    return None


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def lock(model: Path, ctx: int, threads: int) -> None:
    """One prompt at a time: serves the turns of all agents one after the other."""
    import llama_cpp

    llama = llama_cpp.Llama(str(model), n_ctx=ctx, n_threads=threads, n_threads_batch=threads, verbose=False)
    llama.create_completion([1, 2, 3], max_tokens=1)
    print("connected", flush=True)
    for line in sys.stdin:
        told = json.loads(line)["agents"]
        began = time.monotonic()
        for turn in range(TURNS):
            for order in told:
                out = []
                for token in llama.generate(order["prompt"], temp=0.0):
                    out.append(token)
                    if len(out) == order["generate"]:
                        break
                order["prompt"] += out + order["tools"][turn]
        print(json.dumps([began, time.monotonic(), len(told[0]["prompt"])]), flush=True)


# ── a cell of the grid ────────────────────────────────────────────────────────────────────────────────────


def cell(name: str, n: int, prefix: int, options: argparse.Namespace) -> dict[str, Any]:
    model, ctx, seed = model_path(name), context_of(prefix), options.seed * 1000
    vocab = vocabulary(model)
    row: dict[str, Any] = {"model": name, "agents": n, "prefix": prefix, "aiosd_s": [], "server_s": [], "lock_s": None}
    with ExitStack() as stack:
        home = stack.enter_context(tempfile.TemporaryDirectory(prefix="aios-bench-"))
        ours = Aiosd(home, model, n, ctx, options.threads, options.aiosd_options.split())
        stack.callback(ours.close)
        theirs, row["server_flash"] = best_server(options, model, n, ctx, orders(n, prefix, seed, vocab))
        stack.callback(theirs.close)
        makespan(ours.clients, orders(n, prefix, seed + 1, vocab))  # warm, as the server is by now
        for round_ in range(options.rounds):
            for i, side in enumerate("abba"):
                clients = ours.clients if side == "a" else theirs.clients
                took = makespan(clients, orders(n, prefix, seed + 10 + 4 * round_ + i, vocab))
                row["aiosd_s" if side == "a" else "server_s"].append(took)
    row["ratio"] = statistics.median(a / b for a, b in zip(row["aiosd_s"], row["server_s"], strict=True))
    row["bar"] = (BARS.get((n, prefix), NEVER_ABOVE)) if name == "small" else None
    if n > 1 and options.lock:
        row["lock_s"] = locked(model, ctx, options.threads, orders(n, prefix, seed + 2, vocab))
        row["lock_ratio"] = statistics.median(row["aiosd_s"]) / row["lock_s"]
    return row


def best_server(
    options: argparse.Namespace, model: Path, n: int, ctx: int, told: list[dict[str, Any]]
) -> tuple[Server, str]:
    """llama-server with flash attention on or off, whichever is faster here."""
    times = {}
    for flash in ("on", "off"):
        server = Server(options.server, model, n, ctx, options.threads, flash)
        makespan(server.clients, told[:n])
        fresh = [{**order, "prompt": order["prompt"][::-1]} for order in told]
        times[flash] = makespan(server.clients, fresh)
        server.close()
    best = min(times, key=lambda flash: times[flash])
    return Server(options.server, model, n, ctx, options.threads, best), best


def locked(model: Path, ctx: int, threads: int, told: list[dict[str, Any]]) -> float:
    client = Client([sys.executable, __file__, "--lock-server", str(model), str(ctx), str(threads)], dict(os.environ))
    assert client.read() == "connected"
    client.tell({"agents": told})
    began, ended, _ = json.loads(client.read())
    client.close()
    return float(ended - began)


def vocabulary(model: Path) -> int:
    import gguf

    field = gguf.GGUFReader(model).get_field("tokenizer.ggml.tokens")
    assert field is not None
    return len(field.data)


def show(row: dict[str, Any]) -> None:
    ours, theirs = statistics.median(row["aiosd_s"]), statistics.median(row["server_s"])
    bar = f"{row['bar']:.2f}" if row["bar"] is not None else "–"
    lock = f"{row['lock_s']:8.2f}{row['lock_ratio']:7.2f}" if row["lock_s"] is not None else ""
    print(
        f"{row['model']:<8}{row['agents']:>4}{row['prefix']:>8}{ours:>10.2f}{theirs:>10.2f}{row['ratio']:>7.2f}{bar:>6}"
        f"{lock}",
        flush=True,
    )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(1, len(models), figsize=(5.5 * len(models), 3.6), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        mine = [row for row in rows if row["model"] == model]
        for prefix in sorted({row["prefix"] for row in mine}):
            points = sorted((row["agents"], row["ratio"]) for row in mine if row["prefix"] == prefix)
            axis.plot(*zip(*points, strict=True), marker="o", label=f"shared prefix {prefix}")
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(xscale="log", xlabel="agents", ylabel="makespan, aiosd / llama-server", title=model, ylim=(0, None))
        axis.set_xticks(sorted({row["agents"] for row in mine}), [str(n) for n in sorted({r["agents"] for r in mine})])
        axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    if sys.argv[1:2] == ["--http-client"]:
        http_client(int(sys.argv[2]), int(sys.argv[3]))
        return
    if sys.argv[1:2] == ["--lock-server"]:
        lock(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", help="nano, small, another shape of models.py, or a GGUF")
    parser.add_argument("--n", type=int, action="append", help=f"agents {AGENTS}")
    parser.add_argument("--prefix", type=int, action="append", help=f"shared tokens {PREFIXES}")
    parser.add_argument("--rounds", type=int, default=1, help="of four runs each (A B B A)")
    parser.add_argument("--threads", type=int, default=2, help="of each side")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lock", action="store_true", help="also one prompt at a time (slow)")
    parser.add_argument("--aiosd-options", default="", help="more options for aiosd")
    parser.add_argument("--server", type=Path, default=ROOT / "build" / "peers" / "bin" / "llama-server")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "crowd.json")
    options = parser.parse_args()
    if not options.server.exists():
        sys.exit(f"{options.server}: not there; `make peers` builds it")
    print("model      n  prefix   aiosd s  server s  ratio   bar  lock s  ratio")
    rows = []
    for name in options.model or ["small", "nano"]:
        for n in options.n or AGENTS:
            for prefix in options.prefix or PREFIXES:
                if name == "nano" and context_of(prefix) > 2048:
                    continue  # it was trained for no more
                rows.append(cell(name, n, prefix, options))
                show(rows[-1])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "benchmark": "crowd", "date": datetime.now(UTC).date().isoformat(), "seed": options.seed,
        "threads": options.threads, "rows": rows,
        "hardware": {"cores": len(os.sched_getaffinity(0)), "cpu": cpu_name()},
    }  # fmt: skip
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    plot(rows, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
