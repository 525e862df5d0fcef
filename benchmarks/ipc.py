#!/usr/bin/env python
"""What a system call costs, compared with the standard library's pipe.

    $ python benchmarks/ipc.py
    one caller: getpid, µs                      p50     p99
    aiosd                                      24.1    61.0
    multiprocessing.Pipe echo                  19.9    55.2
    ratio of the medians                       1.21
    …

Latency: one agent calls getpid again and again, against one process that echoes 20 bytes over a bare
multiprocessing.Pipe. Throughput: 64 agents with 8 calls in flight each, against 64 clients of one echo server on 64
Pipes, with one message in flight (the usual way with a Pipe) and with 8. Both sides alternate, and every figure is the
median of the rounds. Where uvicorn is installed, an HTTP echo over one kept connection is shown for comparison.

The system runs in a temporary home, with the embedded model, which is idle. Agents run without a sandbox, like the
processes that they are compared with (sandbox.py measures getpid in one). Results go to benchmarks/results/ipc.json.
"""

import argparse
import contextlib
import http.client
import importlib.util
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.harness import cpu_seconds, hardware  # noqa: E402

MESSAGE = b"x" * 20  # about the size of a getpid request
IN_FLIGHT = 8
BOOT_S = 120.0


# ── inside an agent ───────────────────────────────────────────────────────────────────────────────────────


def agent_latency(calls: int, result: Path) -> None:
    import libaios as aios

    result.write_text(json.dumps(timed(aios.proc.getpid, calls)))


def agent_throughput(calls: int, result: Path) -> None:
    import libaios as aios
    from libaios.agent import connection
    from libaios.wire import NoArgs, Sys

    conn, args = connection(), NoArgs()
    conn.call(Sys.GETPID, args, int)
    result.with_suffix(".ready").touch()
    aios.msg.recv()  # the start
    began, cpu = time.monotonic(), time.process_time()
    flying = deque(conn.submit(Sys.GETPID, args) for _ in range(IN_FLIGHT))
    for left in range(calls, 0, -1):
        conn.result(flying.popleft(), int)
        if left > IN_FLIGHT:
            flying.append(conn.submit(Sys.GETPID, args))
    ended, used = time.monotonic(), time.process_time() - cpu
    report(result, [began, ended, used])
    aios.msg.recv()  # so that no end of an agent is measured


def report(result: Path, figures: list[float]) -> None:
    part = result.with_suffix(".part")
    part.write_text(json.dumps(figures))
    part.rename(result)


def timed(call: Callable[[], object], calls: int) -> list[float]:
    """The duration of each call in µs, after a warm-up."""
    for _ in range(200):
        call()
    took = []
    for _ in range(calls):
        began = time.perf_counter()
        call()
        took.append((time.perf_counter() - began) * 1e6)
    return took


# ── aiosd ─────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def system() -> Iterator[None]:
    """An aiosd in a home of its own, to which AIOS_HOME is set."""
    with tempfile.TemporaryDirectory(prefix="aios-") as home:
        os.environ["AIOS_HOME"] = home
        argv = [sys.executable, str(ROOT / "bin" / "aiosd"), "--sandbox", "none"]
        daemon = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env=os.environ)
        assert daemon.stderr is not None
        try:
            for line in daemon.stderr:
                if "aiosd: ready" in line:
                    break
            else:
                raise SystemExit("aiosd did not start")
            yield
        finally:
            daemon.terminate()
            daemon.communicate(timeout=30)


def through_aiosd(calls: int, folder: Path) -> list[float]:
    import libaios as aios

    result = folder / "latency"
    pid = aios.proc.spawn(__file__, "--agent", "latency", str(calls), str(result))
    finished(pid)
    return json.loads(result.read_text())


def finished(pid: int) -> None:
    import libaios as aios

    _, status = aios.proc.wait(pid)
    if status:
        raise SystemExit(f"agent {pid} ended with {status}; see aios-logs {pid}")


def many_through_aiosd(agents: int, calls: int, folder: Path) -> dict[str, float]:
    import libaios as aios

    results = [folder / f"agent-{number}" for number in range(agents)]
    for result in results:
        result.unlink(missing_ok=True)
        result.with_suffix(".ready").unlink(missing_ok=True)
    pids = [aios.proc.spawn(__file__, "--agent", "throughput", str(calls), str(result)) for result in results]
    appear([result.with_suffix(".ready") for result in results])
    kernel = next(process.ospid for process in aios.proc.ps(all=True) if process.name == "kernel")
    before = cpu_seconds(kernel)
    for pid in pids:
        aios.msg.send(pid, "go")
    appear(results)
    figures = summary([json.loads(result.read_text()) for result in results], calls, cpu_seconds(kernel) - before)
    for pid in pids:
        aios.msg.send(pid, "end")
    for pid in pids:
        finished(pid)
    return figures


def appear(files: list[Path]) -> None:
    deadline = time.monotonic() + BOOT_S
    while not all(file.exists() for file in files):
        if time.monotonic() > deadline:
            raise SystemExit("agents have not come so far")
        time.sleep(0.05)


def summary(spans: list[list[float]], calls: int, server_cpu_s: float) -> dict[str, float]:
    """Calls per second of all agents, from the first start to the last end; CPU time per call on both sides."""
    began, ended, cpu = zip(*spans, strict=True)
    total = len(spans) * calls
    return {
        "calls_per_s": total / (max(ended) - min(began)),
        "client_cpu_us": sum(cpu) / total * 1e6,
        "server_cpu_us": server_cpu_s / total * 1e6,
    }


# ── bare pipes ────────────────────────────────────────────────────────────────────────────────────────────


def echo(end: multiprocessing.connection.Connection) -> None:
    with contextlib.suppress(EOFError):
        while True:
            end.send_bytes(end.recv_bytes())


def through_pipe(calls: int) -> list[float]:
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    server = fork.Process(target=_echo_alone, args=(theirs, ours))
    server.start()
    theirs.close()

    def call() -> None:
        ours.send_bytes(MESSAGE)
        ours.recv_bytes()

    took = timed(call, calls)
    ours.close()
    server.join()
    return took


def _echo_alone(end: multiprocessing.connection.Connection, others: multiprocessing.connection.Connection) -> None:
    others.close()
    echo(end)


def many_through_pipes(clients: int, calls: int, in_flight: int) -> dict[str, float]:
    fork = multiprocessing.get_context("fork")
    pipes = [fork.Pipe() for _ in range(clients)]
    gates = [fork.Pipe() for _ in range(clients)]
    spans = fork.SimpleQueue()
    server = fork.Process(target=_echo_all, args=([theirs for _, theirs in pipes], [ours for ours, _ in pipes]))
    server.start()
    for _, theirs in pipes:
        theirs.close()
    workers = [
        fork.Process(target=_client, args=(number, pipes, gates, spans, calls, in_flight)) for number in range(clients)
    ]
    for worker in workers:
        worker.start()
    for ours, _ in pipes:
        ours.close()
    for gate, _ in gates:
        gate.recv_bytes()  # the client is ready
    for gate, _ in gates:
        gate.send_bytes(b"go")
    got = [spans.get() for _ in workers]
    assert server.pid is not None
    server_cpu_s = cpu_seconds(server.pid)
    for gate, _ in gates:
        gate.send_bytes(b"end")
    for process in [*workers, server]:
        process.join()
    for pair in gates:
        for end in pair:
            end.close()
    return summary(got, calls, server_cpu_s)


def _client(number: int, pipes: Any, gates: Any, spans: Any, calls: int, in_flight: int) -> None:
    for other, (ours, _) in enumerate(pipes):
        if other != number:
            ours.close()
    end, gate = pipes[number][0], gates[number][1]
    gate.send_bytes(b"ready")
    gate.recv_bytes()
    began, cpu = time.monotonic(), time.process_time()
    for _ in range(in_flight):
        end.send_bytes(MESSAGE)
    for left in range(calls, 0, -1):
        end.recv_bytes()
        if left > in_flight:
            end.send_bytes(MESSAGE)
    spans.put([began, time.monotonic(), time.process_time() - cpu])
    gate.recv_bytes()  # so that no end of a client is measured
    end.close()


def _echo_all(ends: list[Any], others: list[Any]) -> None:
    for end in others:
        end.close()
    selector = selectors.DefaultSelector()
    for end in ends:
        selector.register(end, selectors.EVENT_READ)
    while selector.get_map():
        for key, _ in selector.select():
            end: Any = key.fileobj
            try:
                end.send_bytes(end.recv_bytes())
            except (EOFError, ConnectionError):
                selector.unregister(end)
                end.close()


# ── HTTP ──────────────────────────────────────────────────────────────────────────────────────────────────


def through_http(calls: int) -> list[float] | None:
    if importlib.util.find_spec("uvicorn") is None:
        return None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = multiprocessing.get_context("fork").Process(target=_serve_http, args=(port,))
    server.start()
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        deadline = time.monotonic() + BOOT_S
        while True:
            try:
                connection.connect()
                break
            except ConnectionRefusedError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

        def call() -> None:
            connection.request("POST", "/", MESSAGE)
            connection.getresponse().read()

        took = timed(call, calls)
        connection.close()
        return took
    finally:
        server.kill()
        server.join()


def _serve_http(port: int) -> None:
    import uvicorn

    async def app(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": message.get("body", b"")})

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="critical", lifespan="off")


# ── the run ───────────────────────────────────────────────────────────────────────────────────────────────


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[int(q * (len(values) - 1))]


def alternate(rounds: int, chance: random.Random, sides: dict[str, Callable[[], Any]]) -> dict[str, list[Any]]:
    """Run every side once in each round, in a new random order."""
    results: dict[str, list[Any]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name in chance.sample(list(sides), len(sides)):
            results[name].append(sides[name]())
    return results


def measure(options: argparse.Namespace) -> dict[str, Any]:
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="aios-ipc-") as scratch, system():
        folder = Path(scratch)
        sides: dict[str, Callable[[], Any]] = {
            "aiosd": lambda: through_aiosd(options.calls, folder),
            "pipe": lambda: through_pipe(options.calls),
        }
        if importlib.util.find_spec("uvicorn") is not None:
            sides["http"] = lambda: through_http(options.calls // 10)
        took = alternate(options.rounds, chance, sides)
        many, calls = options.agents, options.many_calls
        rates = alternate(
            options.rounds,
            chance,
            {
                "aiosd": lambda: many_through_aiosd(many, calls, folder),
                "pipe": lambda: many_through_pipes(many, calls, 1),
                "pipe, 8 in flight": lambda: many_through_pipes(many, calls, IN_FLIGHT),
            },
        )
    latency = {
        name: {
            "p50_us": statistics.median(quantile(values, 0.5) for values in rounds),
            "p99_us": statistics.median(quantile(values, 0.99) for values in rounds),
        }
        for name, rounds in took.items()
    }
    many_callers = {
        name: {key: statistics.median(found[key] for found in rounds) for key in rounds[0]}
        for name, rounds in rates.items()
    }
    throughput = {name: figures["calls_per_s"] for name, figures in many_callers.items()}
    return {
        "latency": latency,
        "latency_ratio": latency["aiosd"]["p50_us"] / latency["pipe"]["p50_us"],
        "many_callers": many_callers,
        "throughput_ratio": throughput["aiosd"] / throughput["pipe"],
        "throughput_ratio_8_in_flight": throughput["aiosd"] / throughput["pipe, 8 in flight"],
    }


NAMES = {
    "aiosd": "aiosd",
    "pipe": "multiprocessing.Pipe echo",
    "pipe, 8 in flight": "multiprocessing.Pipe echo, 8 in flight",
    "http": "HTTP echo (uvicorn)",
}


def show(found: dict[str, Any], options: argparse.Namespace) -> None:
    print(f"{'one caller: getpid, µs':42}{'p50':>9}{'p99':>9}")
    for name, figures in found["latency"].items():
        print(f"{NAMES[name]:42}{figures['p50_us']:9.1f}{figures['p99_us']:9.1f}")
    print(f"{'ratio of the medians (at most 1.25)':42}{found['latency_ratio']:9.2f}")
    if "http" not in found["latency"]:
        print("(no HTTP echo: uvicorn is not installed)")
    print()
    print(f"{options.agents} callers".ljust(42) + f"{'calls/s':>9}{'CPU of a call, µs: client':>27}{'server':>8}")
    for name, figures in found["many_callers"].items():
        print(f"{NAMES[name] + (', 8 in flight' if name == 'aiosd' else ''):42}{figures['calls_per_s']:9.0f}", end="")
        print(f"{figures['client_cpu_us']:27.1f}{figures['server_cpu_us']:8.1f}")
    print(f"{'ratio to Pipe echo (at least 2)':42}{found['throughput_ratio']:9.2f}")
    print(f"{'ratio to Pipe echo with 8 in flight':42}{found['throughput_ratio_8_in_flight']:9.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=5000, help="calls of the single caller per round")
    parser.add_argument("--agents", type=int, default=64)
    parser.add_argument("--many-calls", type=int, default=2000, help="calls of each of the many callers per round")
    parser.add_argument("--seed", type=int, default=1, help="of the order in which the sides take turns")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "ipc.json")
    parser.add_argument("--agent", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.agent:
        kind, calls, result = options.agent
        {"latency": agent_latency, "throughput": agent_throughput}[kind](int(calls), Path(result))
        return
    machine, load = hardware(), os.getloadavg()[0]
    found = measure(options)
    print(f"{machine['cpu']}, {machine['cores']} cores, Linux {machine['linux']}, Python {machine['python']}")
    print(f"seed {options.seed}, {options.rounds} rounds, load before {load:.1f}\n")
    show(found, options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(options, name) for name in ("rounds", "calls", "agents", "many_calls", "seed")}
    options.out.write_text(json.dumps({"hardware": machine, "load": load, **settings, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
