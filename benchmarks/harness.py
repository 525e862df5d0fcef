"""Common parts of the benchmarks: an aiosd in a temporary home, agents and clients as processes, peers, results.

A client answers each line of JSON with a line of JSON. `race` first sends every client its order, and waits for a line
"armed" from each. Only then it starts all at once, so that neither starting a process nor reading an order is measured.

Unless a benchmark chooses otherwise, agents run without a sandbox, like the programs that they are compared with.
sandbox.py measures what a sandbox costs.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Python puts the folder of the script first on the path; there tools.py would hide the package `tools`.
sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != ROOT / "benchmarks")]

from tools.models import MODELS  # noqa: E402  the checkout comes first


def end_tidily() -> None:
    """Let TERM and HUP raise SystemExit: then a benchmark removes its folders and ends its systems, as after Ctrl-C."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # not under nohup, which ignores HUP
            signal.signal(number, lambda number, _: sys.exit(128 + number))


if Path(sys.argv[0]).resolve().parent == ROOT / "benchmarks":
    end_tidily()

RESULTS = ROOT / "benchmarks" / "results"
PEERS = ROOT / "build" / "peers" / "bin"

#: The beginning of every client: it reads an order, prints "armed", waits for a line, and prints the result of `run`.
LOOP = """
import json, sys, time
def serve(run):
    print("connected", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        print("armed", flush=True)
        if not sys.stdin.readline():
            break
        began = time.monotonic()
        said = run(order)
        print(json.dumps({"began": began, "ended": time.monotonic(), **said}), flush=True)
"""

AGENT = LOOP + "import libaios as aios\naios.proc.getpid()\n"


# ── the machine and its models ────────────────────────────────────────────────────────────────────────────


def model_path(name: str) -> Path:
    """The file of a model: nano, a real model of `make models`, a shape of models.py, or the path of a GGUF."""
    if name == "nano":
        return ROOT / "aiosd" / "nano" / "nano.gguf"
    if name in MODELS:
        if not MODELS[name].path.exists():
            sys.exit(f"{MODELS[name].path} is not there; `make models ARGS={name}` fetches it")
        return MODELS[name].path
    if name.endswith(".gguf"):
        return Path(name)
    from benchmarks.models import path_of

    return path_of(name)


def vocabulary(model: Path) -> int:
    import gguf

    field = gguf.GGUFReader(model).get_field("tokenizer.ggml.tokens")
    assert field is not None
    return len(field.data)


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return ""


def hardware() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0))
    cpu = cpu_name() or platform.machine()
    return {"cpu": cpu, "cores": cores, "linux": platform.release(), "python": platform.python_version()}


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process so far."""
    return sum(int(file.read_text().split()[0]) for file in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def kernel_seconds() -> float:
    """CPU time of Linux's own threads (reclaim, compaction and others) so far. No process of a run accounts for it."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if fields[1] == "2":  # a child of kthreadd
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def peer(name: str) -> Path:
    path = PEERS / name
    if not path.exists():
        sys.exit(f"{name} is not built; `make peers` does it")
    return path


def chroma() -> str | None:
    """An interpreter that has chromadb, or None."""
    folder = PEERS.parent / "chroma"
    return str(folder / "bin" / "python") if (folder / ".installed").exists() else None


def write(name: str, rows: Sequence[dict[str, Any]], out: Path | None = None, **also: Any) -> Path:
    """Write the results as JSON, with a description of the machine."""
    path = out or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "benchmark": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": {
            "cpu": cpu_name() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "system": f"{platform.system()} {platform.release()}",
            "load": os.getloadavg()[0],
        },
        "python": platform.python_version(),
        **also,
    }
    path.write_text(json.dumps(about | {"rows": list(rows)}, indent=1) + "\n")
    return path


def pyplot() -> Any:
    """matplotlib's pyplot, without a screen; None if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'aiosd[bench]')", file=sys.stderr)
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def verdict(value: float, bar: float | None, at_least: bool = False) -> str:
    if bar is None:
        return ""
    return "kept" if (value >= bar if at_least else value <= bar) else "MISSED"


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def jain(values: Sequence[float]) -> float:
    """Jain's index of fairness: 1 when all have the same, 1/n when one has everything."""
    total = sum(values)
    return total * total / (len(values) * sum(value * value for value in values)) if total else 0.0


# ── clients ───────────────────────────────────────────────────────────────────────────────────────────────


class Client:
    """A process that answers each line with a line."""

    def __init__(self, argv: Sequence[str], env: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(argv, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"a client ended early, exit status {self.process.wait()}: {self.process.args!r}")
        return line.strip()

    def expect(self, word: str) -> None:
        line = self.line()
        if line != word:
            sys.exit(f"a client said {line!r} instead of {word!r}")

    def tell(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def race(clients: Sequence[Client], orders: Sequence[Any]) -> list[dict[str, Any]]:
    """Start all clients on their orders at the same time; returns their results."""
    for client, order in zip(clients, orders, strict=True):
        client.tell(json.dumps(order))
    for client in clients:
        client.expect("armed")
    for client in clients:
        client.tell("go")
    return [json.loads(client.line()) for client in clients]


def makespan(said: Sequence[dict[str, Any]]) -> float:
    return float(max(one["ended"] for one in said) - min(one["began"] for one in said))


# ── aiosd ─────────────────────────────────────────────────────────────────────────────────────────────────


def command(name: str) -> list[str]:
    return [sys.executable, str(ROOT / "bin" / name)]


class Aiosd:
    """A system in a home of its own, with agents that are connected and wait. It must be closed."""

    def __init__(self, model: Path | str, *options: str, sandbox: str = "none") -> None:
        """`sandbox`: of its agents; "": aiosd's default."""
        self._home = tempfile.TemporaryDirectory(prefix="aios-bench-")
        self.home = Path(self._home.name)
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("AIOS")}
        self.env |= {"AIOS_HOME": str(self.home), "PYTHONPATH": str(ROOT)}
        self.env |= {"AIOSD_SANDBOX": sandbox} if sandbox else {}
        self.agents: list[Client] = []
        self.log = self.home / "stderr"
        with open(self.log, "wb") as log:
            argv = [*command("aiosd"), "--model", f"bench={model}", *options]
            self.daemon = subprocess.Popen(argv, env=self.env, stderr=log)
        while not any(line.startswith("aiosd: ready") for line in self.log.read_text().splitlines()):
            if self.daemon.poll() is not None:
                said = self.log.read_text()
                self._home.cleanup()
                sys.exit(f"aiosd did not start:\n{said}")
            time.sleep(0.02)

    def start(self, count: int, script: str, *args: str, options: Sequence[str] = ()) -> list[Client]:
        """Start agents; returns when all are connected."""
        path = self.home / f"agent{len(self.agents)}.py"
        path.write_text(script)
        argv = [*command("aios-run"), *options, str(path), *args]
        new = [Client(argv, self.env) for _ in range(count)]
        self.agents += new
        for agent in new:
            agent.expect("connected")
        return new

    def call(self, *argv: str) -> str:
        done = subprocess.run([*command(argv[0]), *argv[1:]], env=self.env, stdout=subprocess.PIPE, check=True)
        return done.stdout.decode()

    def status(self) -> dict[str, Any]:
        return dict(json.loads(self.call("aiosd", "status", "--json")))

    def stats(self) -> dict[str, Any]:
        """The statistics of the core."""
        return dict(self.status()["models"][0]["stats"])

    def processes(self) -> list[dict[str, Any]]:
        return list(json.loads(self.call("aios-ps", "-e", "--json")))

    def core(self) -> int:
        """Linux's pid of the llm core."""
        return next(int(process["ospid"]) for process in self.processes() if process["name"] == "llm")

    def set(self, name: str, value: str) -> None:
        self.call("aiosd", "set", name, value)

    def close(self) -> None:
        for agent in self.agents:
            agent.close()
        self.daemon.send_signal(signal.SIGTERM)
        self.daemon.wait(60)
        self._home.cleanup()

    def __enter__(self) -> Aiosd:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ── llama-server ──────────────────────────────────────────────────────────────────────────────────────────


class Server:
    """llama-server with a slot for each client, which keep their connections. It must be closed."""

    def __init__(self, model: Path, slots: int, ctx: int, threads: int, *options: str) -> None:
        self.port = free_port()
        argv = [str(peer("llama-server")), "-m", str(model), "-c", str(ctx * slots), "-np", str(slots)]
        argv += ["-t", str(threads), "-tb", str(threads), "--no-kv-unified", "--no-ui", "--port", str(self.port)]
        self.clients: list[Client] = []
        self.process = subprocess.Popen([*argv, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not self._healthy():
            if self.process.poll() is not None:
                sys.exit(f"llama-server ended with {self.process.returncode}: {' '.join([*argv, *options])}")
            time.sleep(0.1)

    def start(self, count: int, script: str) -> list[Client]:
        """Start clients; `script` gets the port and the client's number i as arguments."""
        new = [Client([sys.executable, "-c", script, str(self.port), str(i)]) for i in range(count)]
        self.clients += new
        for client in new:
            client.expect("connected")
        return new

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

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


#: A client of llama-server: `complete(tokens, number)` returns the generated ids, `post(path, body)` any answer. The
#: server closes connections that were idle for some seconds; the request is then sent again on a new one.
HTTP = (
    LOOP
    + """
import http.client
port, me = int(sys.argv[1]), int(sys.argv[2])
connection = http.client.HTTPConnection("127.0.0.1", port)
connection.connect()
def complete(tokens, number, **also):
    return post("/completion", {"prompt": tokens, "n_predict": number, "temperature": 0.0, "ignore_eos": True,
                                "cache_prompt": True, "return_tokens": True, **also})["tokens"]
def post(path, body):
    for last in (False, True):
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            return json.loads(connection.getresponse().read())
        except (ConnectionError, http.client.HTTPException):
            if last:
                raise
            connection.close()
"""
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def median_ratio(pairs: Sequence[tuple[float, float]]) -> float:
    return statistics.median(ours / theirs for ours, theirs in pairs)
