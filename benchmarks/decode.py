#!/usr/bin/env python
"""Tokens per second through the whole system against the same batch in a bare llama.cpp loop.

Both sides run in turns (system, bare, bare, system), with the same model file, threads, context and prompts, greedily.
The system: an aiosd in a temporary home, with agents that are real processes without a sandbox, all connected before
the clock starts. Each requests one completion of N tokens. Bare: one process that only calls `llama_decode` and takes
the arg max, with all prompts in one batch. The figure is the median of the ratios of neighbouring runs. The same ratio
of the CPU seconds of the two processes that compute is shown, too: it is the core's own share of the difference, also
on a machine that others use.

    $ python benchmarks/decode.py
    model   agents    bare tok/s   system tok/s   ratio    bar   cpu ratio
    nano         1        2764.1         2395.0   0.866   0.60       0.970
    …

`--engine` runs only the engine, in the process of the bare loop, to show Python's share of a step. `--null` runs the
bare loop on both sides: the distance of this ratio from 1 is the error of the measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import harness  # noqa: E402  the checkout comes first

AGENTS = (1, 8, 32)
CTX = 2048
PROMPT = 16  # tokens
BARS = {"nano": (0.6, 0.8, 0.85), "small": (0.95, 0.95, 0.95)}
TOKENS = {"nano": 256, "small": 96}

AGENT = """
import json, sys, time
import libaios as aios
aios.proc.getpid()
print("connected", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    began = time.monotonic()
    result = aios.llm.complete(order["prompt"], max_tokens=order["tokens"], temperature=0.0, ignore_eos=True)
    print(json.dumps([began, time.monotonic(), len(result.tokens)]), flush=True)
"""


def prompts(count: int, salt: int) -> list[list[int]]:
    """Prompts that differ for every agent and run, so that no prefix can be reused."""
    return [[20 + (salt * 7919 + agent * 131 + place * 17) % 400 for place in range(PROMPT)] for agent in range(count)]


# ── the bare loop, in a process of its own ────────────────────────────────────────────────────────────────


class Bare:
    """llama.cpp alone. `engine`: aiosd's engine in the same process instead."""

    def __init__(self, path: str, threads: int, engine: bool = False) -> None:
        from aiosd.llm import llama
        from aiosd.llm.engine import Engine

        llama.start()
        self.llama = llama
        self.model = llama.Model(path, 0, lambda fraction: None)
        self.context = llama.LlamaContext(
            self.model, slots=max(AGENTS), ctx=CTX, ubatch=512, threads=threads, flash_attention=False
        )
        self.prefill, self.batch = llama.BatchBuffer(512), llama.BatchBuffer(max(AGENTS))
        said: list[Any] = []
        self.engine = Engine(self.model, self.context, ctx=CTX, slots=max(AGENTS), emit=said.append)
        self.run = self._engine if engine else self._bare
        self.calls = 0

    def _bare(self, count: int, tokens: int, salt: int) -> float:
        import numpy as np

        context, first, batch = self.context, self.prefill, self.batch
        for sequence in range(max(AGENTS)):
            context.cut(sequence, 0)
        began = time.perf_counter()
        first.size = size = count * PROMPT
        first.tokens[:size] = np.array(prompts(count, salt)).ravel()
        first.positions[:size] = np.tile(np.arange(PROMPT), count)
        first.sequences[:size] = np.repeat(np.arange(count), PROMPT)
        first.wanted[:size] = 0
        first.wanted[PROMPT - 1 : size : PROMPT] = 1
        assert context.decode(first) == self.llama.OK
        ids = context.logits(count).argmax(axis=1)
        batch.size = count
        batch.positions[:count] = PROMPT
        batch.sequences[:count] = np.arange(count)
        batch.wanted[:count] = 1
        generated = [ids]
        for _ in range(tokens - 1):
            batch.tokens[:count] = ids
            assert context.decode(batch) == self.llama.OK
            ids = context.logits(count).argmax(axis=1)
            generated.append(ids)
            batch.positions[:count] += 1
        return count * tokens / (time.perf_counter() - began)

    def _engine(self, count: int, tokens: int, salt: int) -> float:
        from aiosd.ipc.link import Submit
        from libaios.wire import Generate, Sampling

        sampling = Sampling(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        began = time.perf_counter()
        for prompt in prompts(count, salt):
            self.calls += 1
            self.engine.submit(Submit((1, self.calls), Generate(prompt=prompt, sampling=sampling)))
        while self.engine.has_work:
            self.engine.step()
        return count * tokens / (time.perf_counter() - began)


def serve_bare(path: str, threads: int, engine: bool) -> None:
    bare = Bare(path, threads, engine)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(bare.run(*json.loads(line))), flush=True)


class Child:
    """A process that answers each line with a line."""

    def __init__(self, command: list[str], env: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, bufsize=1
        )
        self.answer_line()

    def ask(self, value: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(value) + "\n")
        self.process.stdin.flush()

    def answer_line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.process.args!r} ended early, exit status {self.process.wait()}")
        return line

    def answer(self) -> Any:
        return json.loads(self.answer_line())

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


def bare_child(path: Path, threads: int, *flags: str) -> Child:
    return Child([sys.executable, __file__, "--serve-bare", str(path), "--threads", str(threads), *flags])


# ── the whole system ──────────────────────────────────────────────────────────────────────────────────────


def command(name: str) -> list[str]:
    return [sys.executable, str(ROOT / "bin" / name)]


class System:
    """An aiosd with agents that are connected and wait for an order."""

    def __init__(self, home: str, model: Path, threads: int | None) -> None:
        self.env = {**os.environ, "AIOS_HOME": home, "PYTHONPATH": str(ROOT)}
        options = ["--slots", str(max(AGENTS)), "--ctx", str(CTX), "--sandbox", "none"]
        if threads is not None:
            options += ["--threads", str(threads)]
        self.daemon = subprocess.Popen(
            [*command("aiosd"), "--model", f"bench={model}", *options],
            env=self.env, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.daemon.stderr is not None
        said = []
        for line in self.daemon.stderr:
            said.append(line)
            if line.startswith("aiosd: ready"):
                break
        else:
            sys.exit("aiosd did not start:\n" + "".join(said))
        script = Path(home, "agent.py")
        script.write_text(AGENT)
        self.agents = [Child([*command("aios-run"), str(script)], self.env) for _ in range(max(AGENTS))]

    def threads(self) -> int:
        status = subprocess.run(
            [*command("aiosd"), "status", "--json"], env=self.env, stdout=subprocess.PIPE, check=True
        )
        return int(json.loads(status.stdout)["models"][0]["stats"]["threads"])

    def core(self) -> int:
        """Linux's pid of the llm core."""
        show = [*command("aios-ps"), "-e", "--json"]
        processes = subprocess.run(show, env=self.env, stdout=subprocess.PIPE, check=True)
        return next(int(process["ospid"]) for process in json.loads(processes.stdout) if process["name"] == "llm")

    def run(self, count: int, tokens: int, salt: int) -> float:
        for agent, prompt in zip(self.agents, prompts(count, salt), strict=False):
            agent.ask({"prompt": prompt, "tokens": tokens})
        times = [agent.answer() for agent in self.agents[:count]]
        assert all(got == tokens for _, _, got in times)
        return count * tokens / (max(end for _, end, _ in times) - min(began for began, _, _ in times))

    def close(self) -> None:
        for agent in self.agents:
            agent.close()
        self.daemon.terminate()
        self.daemon.wait(30)
        assert self.daemon.stderr is not None
        self.daemon.stderr.close()


@contextmanager
def system(model: Path, threads: int | None) -> Iterator[System]:
    with tempfile.TemporaryDirectory(prefix="aios-bench-") as home:
        running = System(home, model, threads)
        try:
            yield running
        finally:
            running.close()


# ── both ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Run:
    tokens_per_s: float
    cpu_s: float


Pairs = dict[int, list[tuple[Run, Run]]]


def compare(side: Callable[[int, int, int], float], core: int, bare: Child, rounds: int, tokens: int) -> Pairs:
    """Pairs of figures (ours, bare) by number of agents. `core`: the pid of the process that computes on our side."""

    def ours(count: int, salt: int) -> Run:
        before = harness.cpu_seconds(core)
        return Run(side(count, tokens, salt), harness.cpu_seconds(core) - before)

    def theirs(count: int, salt: int) -> Run:
        before = harness.cpu_seconds(bare.process.pid)
        bare.ask([count, tokens, salt])
        return Run(float(bare.answer()), harness.cpu_seconds(bare.process.pid) - before)

    for count in AGENTS:
        side(count, 16, 1)
        bare.ask([count, 16, 1])  # warms up
        bare.answer()
    pairs: Pairs = {count: [] for count in AGENTS}
    salt = 2
    for _ in range(rounds):
        for count in AGENTS:
            salt += 4
            first, second = ours(count, salt), theirs(count, salt + 1)
            fourth, third = theirs(count, salt + 2), ours(count, salt + 3)
            pairs[count] += [(first, second), (third, fourth)]
    return pairs


def report(name: str, pairs: Pairs, **also: Any) -> list[dict[str, Any]]:
    rows = []
    for i, (count, measured) in enumerate(pairs.items()):
        ratios = [ours.tokens_per_s / bare.tokens_per_s for ours, bare in measured]
        row = {
            "model": name,
            "agents": count,
            "bare_tokens_per_s": statistics.median(bare.tokens_per_s for _, bare in measured),
            "system_tokens_per_s": statistics.median(ours.tokens_per_s for ours, _ in measured),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "cpu_ratio": statistics.median(bare.cpu_s / ours.cpu_s for ours, bare in measured),
            "bar": BARS[name][i] if name in BARS else None,
            **also,
        }
        rows.append(row)
        bar = "–" if row["bar"] is None else f"{row['bar']:.2f}"
        print(
            f"{name:<8}{count:>6}{row['bare_tokens_per_s']:>14.1f}{row['system_tokens_per_s']:>15.1f}"
            f"{row['ratio']:>8.3f}{bar:>7}{row['cpu_ratio']:>12.3f}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", help="nano, small, another shape of models.py, or a GGUF")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of four runs")
    parser.add_argument("--tokens", type=int, help="tokens that each agent generates in a run")
    parser.add_argument("--threads", type=int, help="threads of both sides (default: as the core measures)")
    parser.add_argument("--engine", action="store_true", help="the engine alone instead of the whole system")
    parser.add_argument("--null", action="store_true", help="a second bare loop instead of the whole system")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "decode.json")
    parser.add_argument("--serve-bare", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve_bare:
        serve_bare(options.serve_bare, options.threads, options.engine)
        return
    print("model   agents    bare tok/s   system tok/s   ratio    bar   cpu ratio")
    rows: list[dict[str, Any]] = []
    for name in options.model or ["nano", "small"]:
        path, tokens = harness.model_path(name), options.tokens or TOKENS.get(name, 128)
        if options.engine or options.null:
            threads = options.threads or 1
            ours = bare_child(path, threads, *["--engine"] * options.engine)
            bare = bare_child(path, threads)

            def side(count: int, tokens: int, salt: int, ours: Child = ours) -> float:
                ours.ask([count, tokens, salt])
                return float(ours.answer())

            pairs = compare(side, ours.process.pid, bare, options.rounds, tokens)
            ours.close()
        else:
            with system(path, options.threads) as whole:
                threads = whole.threads()
                bare = bare_child(path, threads)
                pairs = compare(whole.run, whole.core(), bare, options.rounds, tokens)
        bare.close()
        rows += report(name, pairs, threads=threads, tokens=tokens)
    result = {
        "benchmark": "decode",
        "date": datetime.now(UTC).date().isoformat(),
        "side": "bare loop" if options.null else "engine" if options.engine else "system",
        "ctx": CTX,
        "prompt_tokens": PROMPT,
        "hardware": {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "cpu": cpu_name()},
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return ""


if __name__ == "__main__":
    main()
