#!/usr/bin/env python
"""Many agents on one model: aiosd against llama-server, and against one prompt at a time behind a lock.

Workload W(n): n agents, each a process of its own. Each has a system prompt of P tokens that all share, 64 tokens of
its own, and 4 turns of 32 generated tokens, with 32 tokens of a tool's answer between two turns. Decoding is greedy.
Prompts are random token ids, from a seed that is new in every run, so that nothing is cached from the run before. The
figure is the makespan: from the first request to the last answer. On every side all processes run, are connected and
have read their order before the clock starts. Sides alternate (A B B A), neighbouring runs make a pair, and the median
of the pairs' ratios counts. The ratio of the CPU seconds of the two processes that compute is shown, too: it means more
on a machine that others use.

llama-server is built natively from the same llama.cpp sources (`make peers`). It has as many slots as agents, each
agent bound to its slot on a connection of its own, its prompt cache on, and flash attention on or off, as is faster in
this cell. The lock: one process with llama-cpp-python's `Llama`, warm, which keeps the last prompt's state.

Real models (`--real`, or by name: `make models`) get real text instead: conversations of talk.py, in their own
tokenizer and chat template, greedily and at the default temperature. The numbers of tokens are then about the same.

    $ make peers && taskset -c 0,1 python benchmarks/crowd.py
    model      n  prefix  temp   aiosd s  server s  ratio   bar    cpu   lock s  ratio   bar
    small     64     512   0.0      17.1      42.0   0.41  0.50   0.41     49.0   0.35  0.45
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import harness, talk  # noqa: E402  the checkout comes first
from benchmarks.harness import AGENT, HTTP, LOOP, Aiosd, Client, Server, cpu_seconds, makespan, race  # noqa: E402

AGENTS, PREFIXES = (1, 16, 64), (0, 512, 2048)
PRIVATE, TURNS, GENERATED, TOOL = 64, 4, 32, 32
NEVER_ABOVE = 1.05
BARS = {  # by (agents, prefix); NEVER_ABOVE for all others
    "small": {(64, 512): 0.5, (64, 2048): 0.3},
    "smollm2": {(16, 512): 0.7, (16, 1500): 0.7, (64, 512): 0.5, (64, 1500): 0.35},
    "gemma3": {(16, 512): 0.8, (16, 1500): 0.8, (64, 512): 0.8, (64, 1500): 0.8},
}
LOCK_BARS = {64: 0.45}
REAL, REAL_AGENTS, REAL_PREFIXES = ("smollm2", "gemma3"), (16, 64), (512, 1500)
TEMPERATURES = (0.0, 0.8)  # of real models: greedy, and the default
BRIEF = 4  # how many agents warm up both sides before one run each (`--brief`)
FRAME = 16  # tokens that a chat template may add to a message

TURNS_OF = """
def turns(order):
    tokens = order["prompt"]
    for tool in order["tools"]:
        tokens = tokens + complete(tokens, order["generate"]) + tool
    return {"tokens": len(tokens)}
serve(turns)
"""

OURS = (
    AGENT
    + """
def complete(tokens, number):
    return aios.llm.complete(tokens, max_tokens=number, temperature=0.0, ignore_eos=True).tokens
"""
    + TURNS_OF
)

#: The same through the gateway (`--http`): a program that does not use libaios.
OURS_HTTP = (
    LOOP
    + """
import http.client, os
from urllib.parse import urlsplit
url = urlsplit(os.environ["OPENAI_BASE_URL"])
connection = http.client.HTTPConnection(url.hostname, url.port)
headers = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "Content-Type": "application/json"}
connection.request("GET", "/v1/models", headers=headers)  # connected, as the server's clients are
connection.getresponse().read()
def complete(tokens, number):
    body = {"prompt": tokens, "max_tokens": number, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    for last in (False, True):  # connections that were idle for long are closed: then once more on a new one
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            return json.loads(connection.getresponse().read())["choices"][0]["token_ids"]
        except (ConnectionError, http.client.HTTPException):
            if last:
                raise
            connection.close()
"""
    + TURNS_OF
)

THEIRS = (
    HTTP
    + """
plain = complete
def complete(tokens, number):
    return plain(tokens, number, id_slot=me)
"""
    + TURNS_OF
)

LOCK = (
    LOOP
    + """
import llama_cpp
threads = int(sys.argv[3])
llama = llama_cpp.Llama(sys.argv[1], n_ctx=int(sys.argv[2]), n_threads=threads, n_threads_batch=threads, verbose=False)
def complete(tokens, number):
    out = []
    for token in llama.generate(tokens, temp=0.0):
        out.append(token)
        if len(out) == number:
            return out
def everybody(agents):
    for turn in range(len(agents[0]["tools"])):
        for order in agents:
            order["prompt"] += complete(order["prompt"], order["generate"]) + order["tools"][turn]
    return {"tokens": len(agents[0]["prompt"])}
complete([1, 2, 3], 2)
serve(everybody)
"""
)


def workload(n: int, prefix: int, seed: int, vocab: int) -> list[dict[str, Any]]:
    """The order of each agent: its first prompt, and the answers of its tool. Token ids below 300 are not used: they
    are special tokens or bytes in the models of models.py and in nano."""
    rng = np.random.default_rng(seed)

    def words(count: int) -> list[int]:
        return list(map(int, rng.integers(min(300, vocab // 2), vocab, count)))

    shared = words(prefix)
    return [
        {"prompt": shared + words(PRIVATE), "tools": [words(TOOL) for _ in range(TURNS)], "generate": GENERATED}
        for _ in range(n)
    ]


def distinct_tokens(n: int, prefix: int) -> tuple[int, int]:
    """(distinct prompt tokens, generated tokens) of a workload. The answer of the last tool belongs to no prompt."""
    return prefix + n * (PRIVATE + (TURNS - 1) * TOOL), n * TURNS * GENERATED


def context_of(prefix: int) -> int:
    """Tokens of the longest conversation, rounded up, as the context size."""
    return -(-(prefix + PRIVATE + TURNS * (GENERATED + TOOL)) // 256) * 256


def complete_run(clients: list[Client], orders: list[dict[str, Any]]) -> float:
    """The makespan, after a check that every agent got as many tokens as it requested."""
    said = race(clients, orders)
    wanted = len(orders[0]["prompt"]) + TURNS * (GENERATED + TOOL)
    assert all(one["tokens"] == wanted for one in said), "an agent got fewer tokens than asked for"
    return makespan(said)


# ── what is done in a cell ────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Work:
    """The work of a cell: the agents' orders for the run of a given number, and the scripts of both sides."""

    ctx: int
    orders: Callable[[int], list[dict[str, Any]]]
    ours: str
    theirs: str
    run: Callable[[list[Client], list[dict[str, Any]]], float]  # the makespan


def by_ids(model: Path, n: int, prefix: int, seed: int, http: bool = False) -> Work:
    vocab = harness.vocabulary(model)

    def orders(salt: int) -> list[dict[str, Any]]:
        return workload(n, prefix, seed * 1000 + salt, vocab)

    return Work(context_of(prefix), orders, OURS_HTTP if http else OURS, THEIRS, complete_run)


def by_text(model: Path, n: int, prefix: int, seed: int, temperature: float) -> Work:
    text = talk.Text(model)
    sizes = talk.Sizes(PRIVATE, TURNS, GENERATED, TOOL)

    def orders(salt: int) -> list[dict[str, Any]]:
        return talk.workload(text, n, prefix, seed * 1000 + salt, temperature, sizes)

    scripts = (talk.OURS_CHAT, talk.THEIRS_CHAT) if text.chat else (talk.OURS_TEXT, talk.THEIRS_TEXT)
    return Work(context_of(prefix + FRAME * (2 * TURNS + 2)), orders, *scripts, talk_run)


def talk_run(clients: list[Client], orders: list[dict[str, Any]]) -> float:
    said = race(clients, orders)
    assert all(one["tokens"] == TURNS * GENERATED for one in said), "an agent got fewer tokens than asked for"
    return makespan(said)


# ── a cell of the grid ────────────────────────────────────────────────────────────────────────────────────

Side = tuple[Callable[[list[dict[str, Any]]], float], int]  # runs a workload; pid of the process that computes


def pairs(
    ours: Side, theirs: Side, orders: Callable[[int], list[dict[str, Any]]], turns: Sequence[str]
) -> dict[str, Any]:
    """Run both sides in turns; returns pairs of wall seconds and pairs of CPU seconds."""
    found: dict[str, Any] = {"aiosd_s": [], "server_s": [], "aiosd_cpu_s": [], "server_cpu_s": []}
    for salt, name in enumerate(turns, 1):
        run, pid = ours if name == "aiosd" else theirs
        before = cpu_seconds(pid)
        found[f"{name}_s"].append(run(orders(salt)))
        found[f"{name}_cpu_s"].append(cpu_seconds(pid) - before)
    return found


def ratios(row: dict[str, Any], ours: str, theirs: str) -> list[float]:
    return [a / b for a, b in zip(row[ours], row[theirs], strict=True)]


def cell(name: str, n: int, prefix: int, temperature: float, options: argparse.Namespace) -> dict[str, Any]:
    model = harness.model_path(name)
    real = name in REAL or options.text
    if real:
        work = by_text(model, n, prefix, options.seed, temperature)
    else:
        work = by_ids(model, n, prefix, options.seed, options.http)
    row: dict[str, Any] = {"model": name, "agents": n, "prefix": prefix, "temperature": temperature}
    with ExitStack() as stack:
        flags = ["--slots", str(n), "--ctx", str(work.ctx), "--threads", str(options.threads)]
        gateway = ["--gateway", "auto"] if options.http else []
        ours = stack.enter_context(Aiosd(model, *flags, *gateway, *options.aiosd_options.split()))
        agents = ours.start(n, work.ours)
        theirs, row["server_flash"] = best_server(model, n, work, options)
        stack.enter_context(theirs)
        warm = BRIEF if options.brief else n
        work.run(agents[:warm], work.orders(900)[:warm])  # the server is warm by now, too
        before = ours.stats()
        row |= pairs(
            (lambda told: work.run(agents, told), ours.core()),
            (lambda told: work.run(theirs.clients, told), theirs.process.pid),
            work.orders,
            ("aiosd", "server") if options.brief else ("aiosd", "server", "server", "aiosd") * options.rounds,
        )
        row["aiosd_stats"] = {"before": before, "after": ours.stats()}
    row["ratio"] = statistics.median(ratios(row, "aiosd_s", "server_s"))
    row["cpu_ratio"] = statistics.median(ratios(row, "aiosd_cpu_s", "server_cpu_s"))
    row["bar"] = BARS[name].get((n, prefix), NEVER_ABOVE) if name in BARS else None
    if n > 1 and not real and not options.no_lock:
        row["lock_s"] = locked(model, work.ctx, options.threads, work.orders(500))
        row["lock_ratio"] = statistics.median(row["aiosd_s"]) / row["lock_s"]
        row["lock_bar"] = LOCK_BARS.get(n) if name == "small" else None
    return row


def best_server(model: Path, n: int, work: Work, options: argparse.Namespace) -> tuple[Server, str]:
    """llama-server, warm, with flash attention on or off, whichever is faster in this cell."""
    times = {}
    for i, flash in enumerate(options.flash.split(",")):
        if "," not in options.flash:
            times[flash] = 0.0
            break
        with Server(model, n, work.ctx, options.threads, "-fa", flash, *options.server_options.split()) as server:
            server.start(n, work.theirs)
            work.run(server.clients, work.orders(910 + 2 * i))
            times[flash] = work.run(server.clients, work.orders(911 + 2 * i))
    best = min(times, key=lambda flash: times[flash])
    server = Server(model, n, work.ctx, options.threads, "-fa", best, *options.server_options.split())
    server.start(n, work.theirs)
    warm = BRIEF if options.brief else n
    work.run(server.clients[:warm], work.orders(920)[:warm])
    return server, best


def locked(model: Path, ctx: int, threads: int, orders: list[dict[str, Any]]) -> float:
    client = Client([sys.executable, "-c", LOCK, str(model), str(ctx), str(threads)])
    try:
        client.expect("connected")
        return makespan(race([client], [orders]))
    finally:
        client.close()


# ── table and plot ────────────────────────────────────────────────────────────────────────────────────────

HEAD = "model      n  prefix  temp   aiosd s  server s  ratio   bar    cpu   lock s  ratio   bar"


def line(row: dict[str, Any]) -> str:
    ours, theirs = statistics.median(row["aiosd_s"]), statistics.median(row["server_s"])

    def bar(value: float | None) -> str:
        return f"{'–' if value is None else format(value, '.2f'):>6}"

    text = f"{row['model']:<8}{row['agents']:>4}{row['prefix']:>8}{row['temperature']:>6.1f}"
    text += f"{ours:>10.2f}{theirs:>10.2f}"
    text += f"{row['ratio']:>7.2f}{bar(row['bar'])}{row['cpu_ratio']:>7.2f}"
    missed = row["bar"] is not None and row["ratio"] > row["bar"]
    if "lock_s" in row:
        text += f"{row['lock_s']:>9.2f}{row['lock_ratio']:>7.2f}{bar(row['lock_bar'])}"
        missed |= row["lock_bar"] is not None and row["lock_ratio"] > row["lock_bar"]
    return text + ("   MISSED" if missed else "")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    plt = harness.pyplot()
    if plt is None:
        return
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(1, len(models), figsize=(5.5 * len(models), 3.8), squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        mine = [row for row in rows if row["model"] == model]
        by_cell = {(row["prefix"], row["agents"], row["temperature"]): row for row in mine}
        cells = sorted(by_cell)
        for i, key in enumerate(cells):
            ratio = by_cell[key]["ratio"]
            axis.bar(i, ratio, color=f"C{PREFIXES.index(key[0]) if key[0] in PREFIXES else 3}", width=0.7)
            axis.text(i, ratio + 0.02, f"{ratio:.2f}", ha="center", fontsize=8)
            if by_cell[key]["bar"] is not None:
                axis.hlines(by_cell[key]["bar"], i - 0.42, i + 0.42, color="black", linewidth=1.2)
        axis.axhline(1, color="grey", linewidth=0.8, linestyle=":")
        axis.set_xticks(range(len(cells)), [f"{n}\n{prefix}\n{t or ''}" for prefix, n, t in cells], fontsize=8)
        axis.set(xlabel="agents, tokens of shared prefix, temperature", title=model, ylim=(0, None))
        axis.set_ylabel("makespan, aiosd / llama-server")
    figure.suptitle("W(n): lower is better; black: the bar", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", help="nano, small, smollm2, …, a shape of models.py, or a GGUF")
    parser.add_argument("--real", action="store_true", help=f"{' and '.join(REAL)} (make models), on real text")
    parser.add_argument("--text", action="store_true", help="real text for other models too")
    parser.add_argument("--n", type=int, action="append", help=f"agents {AGENTS}")
    parser.add_argument("--prefix", type=int, action="append", help=f"shared tokens {PREFIXES}; real: {REAL_PREFIXES}")
    parser.add_argument("--temperature", type=float, action="append", help=f"on real text {TEMPERATURES}")
    parser.add_argument("--rounds", type=int, default=1, help="rounds of four runs (A B B A)")
    parser.add_argument("--brief", action="store_true", help="one run of each side, where a cell takes hours")
    parser.add_argument("--quick", action="store_true", help="64 agents with 512 shared tokens on the small model only")
    parser.add_argument("--threads", type=int, default=2, help="threads of each side")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--http", action="store_true", help="our side through the gateway, by plain HTTP (token ids)")
    parser.add_argument("--no-lock", action="store_true", help="leave out the side with the lock, which is slow")
    parser.add_argument("--flash", default="on,off", help="settings to try for llama-server")
    parser.add_argument("--aiosd-options", default="", help="more options for aiosd")
    parser.add_argument("--server-options", default="", help="more options for llama-server")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "crowd.json")
    options = parser.parse_args(argv)
    if options.quick:
        options.model, options.n, options.prefix = ["small"], [64], [512]
    return options


def grid(options: argparse.Namespace) -> Iterator[tuple[str, int, int, float]]:
    for name in options.model or (REAL if options.real else ("small", "nano")):
        real = name in REAL or options.text
        prefixes = options.prefix or (REAL_PREFIXES if real else PREFIXES)
        agents = options.n or (REAL_AGENTS if real else AGENTS)
        temperatures = options.temperature or TEMPERATURES if real else (0.0,)
        for cell_of in itertools.product([name], agents, prefixes, temperatures):
            if name != "nano" or context_of(cell_of[2]) <= 2048:  # nano's context
                yield cell_of


def main() -> None:
    options = parse()
    harness.peer("llama-server")
    print(HEAD, flush=True)
    rows: list[dict[str, Any]] = []
    for name, n, prefix, temperature in grid(options):
        rows.append(cell(name, n, prefix, temperature, options))
        print(line(rows[-1]), flush=True)
        harness.write("crowd", rows, options.out, seed=options.seed, threads=options.threads)
    plot(rows, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
