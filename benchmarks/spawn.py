#!/usr/bin/env python
"""Two thousand agents at once, and twenty thousand one after the other.

    $ python benchmarks/spawn.py
    2000 agents                              measured    bound
    spawned per second (aios.proc.spawn)        163.1      150
    bare os.fork per second                     498.0
    …

Crowd: one agent spawns all others through the SDK. Each of them makes three calls, sends a message to its parent, and
waits for messages; then each gets one and answers it. While all are alive, the memory of the whole system (PSS of every
process), `aios-ps -e` and one more message round are measured. The crowd is ended with `aios-kill NAME`, its parent
waits for every exit status, and processes that are left are counted. A second crowd is ended by stopping aiosd itself.
For comparison, as many processes that only sleep are forked by a bare os.fork. Agents run without a sandbox, as these
processes do; sandbox.py measures what a sandbox costs.

Soak: agents that make a call and end, of which some at a time are spawned and waited for. Memory and descriptors of
kernel and supervisor must be the same at the end as when the history of ended agents had become full. (Memory is
private pages, not PSS, which falls when pages are shared.)

Results go to benchmarks/results/spawn.json.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from aiosd import procfs  # noqa: E402

PATIENCE_S = 120.0
KEEP_DEAD = 1000
SETTLE_S = 1.5  # until the processes have ended that were forked ahead and share pages with the supervisor

MEMBER = """
import libaios as aios
aios.proc.getpid(), aios.proc.nice()
aios.msg.send(aios.proc.getppid(), 0)
while True:
    sender, number = aios.msg.recv()
    aios.msg.send(sender, number + 1)
"""

MAYFLY = """
import libaios as aios
aios.proc.getpid()
"""


# ── inside an agent ───────────────────────────────────────────────────────────────────────────────────────


def agent_crowd(member: str, agents: int, folder: Path) -> None:
    """Spawn all agents, get a message from each, send each one and get its answer; at last wait for all."""
    import libaios as aios

    pids, heard = [], 0
    began = time.monotonic()
    for _ in range(agents):
        pids.append(aios.proc.spawn(member, name="member", detached=True))
        heard += drain()
    spawned_s = time.monotonic() - began
    while heard < agents:
        heard += drain(PATIENCE_S)
    there_s = time.monotonic() - began
    report(folder / "born", spawned_s=spawned_s, there_s=there_s, round_s=message_round(pids))
    aios.msg.recv()  # the other measurements are done
    report(folder / "again", round_s=message_round(pids))
    ends = dict(aios.proc.wait() for _ in pids)
    report(folder / "ended", at=time.monotonic(), exits={pid: ends.get(pid) for pid in pids})


def drain(timeout: float = 0.0) -> int:
    import libaios as aios

    heard = 0
    with contextlib.suppress(TimeoutError):
        while True:
            aios.msg.recv(timeout=timeout)
            heard += 1
            timeout = 0.0
    return heard


def message_round(pids: list[int]) -> float:
    """Seconds for a message to each agent and an answer from each, at most as many at a time as a mailbox holds."""
    import libaios as aios

    began, flying = time.monotonic(), 0
    todo = deque(pids)
    answered = set()
    while todo or flying:
        while todo and flying < 200:
            aios.msg.send(todo.popleft(), 41)
            flying += 1
        sender, number = aios.msg.recv(timeout=PATIENCE_S)
        assert number == 42
        answered.add(sender)
        flying -= 1
    assert answered == set(pids), f"{len(answered)} of {len(pids)} answered"
    return time.monotonic() - began


def report(path: Path, **figures: Any) -> None:
    path.with_suffix(".new").write_text(json.dumps(figures))
    path.with_suffix(".new").rename(path)


# ── the system ────────────────────────────────────────────────────────────────────────────────────────────


class System:
    """An aiosd in a home of its own, to which AIOS_HOME is set."""

    def __init__(self, home: str) -> None:
        os.environ["AIOS_HOME"] = home
        os.environ["PATH"] = os.pathsep.join([str(ROOT / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
        self.log = Path(home) / "stderr"
        with open(self.log, "wb") as log:
            argv = [sys.executable, str(ROOT / "bin" / "aiosd"), "--sandbox", "none"]
            self.daemon = subprocess.Popen(argv, stderr=log)
        wait_for(lambda: "aiosd: ready" in self.log.read_text() or self.daemon.poll() is not None, "aiosd")
        if self.daemon.poll() is not None:
            raise SystemExit(f"aiosd did not start:\n{self.log.read_text()}")

    def processes(self) -> list[int]:
        return [self.daemon.pid, *procfs.descendants(self.daemon.pid)]

    def stop(self) -> float:
        """Stop it by TERM; returns the seconds until its end."""
        began = time.monotonic()
        self.daemon.terminate()
        if self.daemon.wait(60) != 0:
            raise SystemExit(f"aiosd exited {self.daemon.returncode}:\n{self.log.read_text()[-2000:]}")
        return time.monotonic() - began


@contextlib.contextmanager
def system() -> Iterator[System]:
    with tempfile.TemporaryDirectory(prefix="aios-") as home:
        running = System(home)
        try:
            yield running
        finally:
            if running.daemon.poll() is None:
                running.stop()


def wait_for(holds: Any, what: str, patience_s: float = PATIENCE_S) -> Any:
    deadline = time.monotonic() + patience_s
    while not (value := holds()):
        if time.monotonic() > deadline:
            raise SystemExit(f"{what}: not there after {patience_s:.0f} s")
        time.sleep(0.02)
    return value


def command(*argv: str) -> tuple[float, str]:
    """Run a command; returns its wall seconds and output."""
    began = time.monotonic()
    done = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE_S)
    if done.returncode:
        raise SystemExit(f"{' '.join(argv)}: {done.stderr}")
    return time.monotonic() - began, done.stdout


# ── a crowd ───────────────────────────────────────────────────────────────────────────────────────────────


def gather(folder: Path, agents: int) -> tuple[int, dict[str, float]]:
    """Start a crowd; returns the pid of its parent, and the parent's report when all run."""
    import libaios as aios

    for old in folder.glob("*"):
        old.unlink()
    member = folder / "member.py"
    member.write_text(MEMBER)
    boss = aios.proc.spawn(__file__, "--agent", str(member), str(agents), str(folder), name="boss")
    wait_for(lambda: (folder / "born").exists() or not alive(boss), "the crowd")
    if not (folder / "born").exists():
        raise SystemExit(command("aios-logs", str(boss))[1])
    return boss, json.loads((folder / "born").read_text())


def alive(pid: int) -> bool:
    import libaios as aios

    try:
        aios.proc.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def crowd(running: System, folder: Path, agents: int) -> dict[str, Any]:
    """Measure one crowd from its start until no process of it is left."""
    import libaios as aios

    before = set(running.processes())
    boss, found = gather(folder, agents)
    processes = running.processes()
    found["processes"] = len(processes)
    found["pss_bytes"] = sum(map(procfs.pss_bytes, processes))
    took = []
    for _ in range(5):
        seconds, listing = command("aios-ps", "-e", "--no-headers")
        took.append(seconds)
        assert sum(line.split()[-1] == "member" for line in listing.splitlines()) == agents
    found["ps_s"] = sorted(took)[2]
    aios.msg.send(boss, "go on")
    wait_for((folder / "again").exists, "a second round of messages")
    found["round_s"] = json.loads((folder / "again").read_text())["round_s"]
    began = time.monotonic()
    found["kill_s"], _ = command("aios-kill", "member")
    wait_for((folder / "ended").exists, "the end of the crowd")
    ended = json.loads((folder / "ended").read_text())
    found["ended_s"] = ended["at"] - began
    assert set(ended["exits"].values()) == {-signal.SIGTERM}, "an exit status was lost"
    wait_for(lambda: not alive(boss), "the end of its parent")
    wait_for(lambda: len(set(running.processes()) - before) == 0, "the last process", 5)
    found["left_over"] = len(set(running.processes()) - before)
    found["books"] = aios_status()["check"]
    return found


def shutdown(running: System, folder: Path, agents: int) -> dict[str, Any]:
    """Measure a crowd that ends because aiosd is stopped."""
    gather(folder, agents)
    processes = running.processes()
    seconds = running.stop()
    left = [pid for pid in processes if procfs.read_stat(pid) is not None]
    return {"shutdown_s": seconds, "left_over_after_shutdown": len(left)}


def aios_status() -> dict[str, Any]:
    done = subprocess.run(["aiosd", "status", "--json", "--check"], capture_output=True, text=True, timeout=60)
    return json.loads(done.stdout)


def bare(agents: int) -> dict[str, float]:
    """Measure as many bare forks of this interpreter, which sleep."""
    began = time.monotonic()
    pids = []
    for _ in range(agents):
        pid = os.fork()
        if pid == 0:
            signal.pause()
            os._exit(0)
        pids.append(pid)
    per_s = agents / (time.monotonic() - began)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)
    return {"fork_per_s": per_s}


# ── soak ──────────────────────────────────────────────────────────────────────────────────────────────────


def soak(running: System, folder: Path, agents: int, flying: int, samples: int) -> dict[str, Any]:
    mayfly = folder / "mayfly.py"
    mayfly.write_text(MAYFLY)
    parts = {row["name"]: row["ospid"] for row in json.loads(command("aios-ps", "-e", "--json")[1]) if row["system"]}
    watched = {name: parts[name] for name in ("kernel", "supervisor")}
    taken = [{"agents": 0, **{name: size_of(pid) for name, pid in watched.items()}}]
    began = time.monotonic()
    for done in range(agents // samples, agents + 1, agents // samples):
        asyncio.run(live_and_die(mayfly, agents // samples, flying))
        time.sleep(SETTLE_S)
        taken.append({"agents": done, **{name: size_of(pid) for name, pid in watched.items()}})
    took = time.monotonic() - began - samples * SETTLE_S
    full = next(sample for sample in taken if sample["agents"] >= 2 * KEEP_DEAD)
    return {
        "agents": agents,
        "per_s": agents / took,
        "samples": taken,
        "growth": {
            name: {key: taken[-1][name][key] - full[name][key] for key in ("private_bytes", "fds")} for name in watched
        },
        "books": aios_status()["check"],
    }


async def live_and_die(script: Path, agents: int, flying: int) -> None:
    from libaios import aio

    gate = asyncio.Semaphore(flying)

    async def one() -> None:
        async with gate:
            pid = await aio.proc.spawn(str(script), name="mayfly")
            _, status = await aio.proc.wait(pid, timeout=PATIENCE_S)
            if status:
                raise SystemExit(f"an agent ended with {status}; see {os.environ['AIOS_HOME']}/logs/{pid}.log")

    await asyncio.gather(*(one() for _ in range(agents)))


def size_of(ospid: int) -> dict[str, int]:
    private = 0
    for line in Path(f"/proc/{ospid}/smaps_rollup").read_text().splitlines():
        if line.startswith(("Private_Clean", "Private_Dirty")):
            private += int(line.split()[1]) * 1024
    return {"private_bytes": private, "fds": len(os.listdir(f"/proc/{ospid}/fd"))}


# ── the run ───────────────────────────────────────────────────────────────────────────────────────────────


def measure(options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="aios-spawn-") as scratch:
        folder = Path(scratch)
        if options.agents:
            with system() as running:
                found["bare"] = bare(options.agents)
                found["crowd"] = crowd(running, folder, options.agents)
                found["crowd"] |= shutdown(running, folder, options.agents)
            forget_connection()
        if options.soak:
            with system() as running:
                found["soak"] = soak(running, folder, options.soak, options.flying, options.samples)
            forget_connection()
    return found


def forget_connection() -> None:
    from libaios import agent

    agent.reset()


def show(found: dict[str, Any]) -> None:
    if "crowd" in found:
        crowd, agents = found["crowd"], found["agents"]
        print(f"{f'{agents} agents':46}{'measured':>10}{'bound':>9}")
        rate = agents / crowd["spawned_s"]
        line("spawned per second (aios.proc.spawn)", f"{rate:.0f}", "≥ 150")
        line("  until each had called and said so, per second", f"{agents / crowd['there_s']:.0f}")
        line("bare os.fork, per second", f"{found['bare']['fork_per_s']:.0f}")
        line("memory of all processes (PSS), GB", f"{crowd['pss_bytes'] / 1e9:.2f}", "≤ 6")
        line("a message to each and an answer, s", f"{crowd['round_s']:.2f}")
        line("aios-ps -e, s (median of 5)", f"{crowd['ps_s']:.2f}", "≤ 1")
        line("aios-kill NAME, s", f"{crowd['kill_s']:.2f}")
        line("  until all had ended and were collected, s", f"{crowd['ended_s']:.2f}", "≤ 10")
        line("  processes left", f"{crowd['left_over']}", "0")
        line("aiosd stopped with all alive, s", f"{crowd['shutdown_s']:.2f}", "≤ 10")
        line("  processes left", f"{crowd['left_over_after_shutdown']}", "0")
        line("books", "; ".join(crowd["books"]) or "balanced")
        print()
    if "soak" in found:
        soak = found["soak"]
        print(f"soak: {soak['agents']} agents spawned and ended, {soak['per_s']:.0f} per second")
        print(f"{'after agents':>14}{'kernel MB':>12}{'fds':>6}{'supervisor MB':>16}{'fds':>6}")
        for sample in soak["samples"]:
            kernel, supervisor = sample["kernel"], sample["supervisor"]
            print(
                f"{sample['agents']:14}{kernel['private_bytes'] / 1e6:12.2f}{kernel['fds']:6}"
                f"{supervisor['private_bytes'] / 1e6:16.2f}{supervisor['fds']:6}"
            )
        print(f"growth since the history of {KEEP_DEAD} dead is full: {soak['growth']}")
        print(f"books: {'; '.join(soak['books']) or 'balanced'}")


def line(what: str, value: str, bound: str = "") -> None:
    print(f"{what:46}{value:>10}{bound:>9}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, default=2000, help="agents in the crowd; 0: no crowd")
    parser.add_argument("--soak", type=int, default=20000, help="agents in the soak; 0: no soak")
    parser.add_argument("--flying", type=int, default=16, help="agents of the soak that are alive at a time")
    parser.add_argument("--samples", type=int, default=10, help="measurements of memory and descriptors in the soak")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "spawn.json")
    parser.add_argument("--agent", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.agent:
        member, agents, folder = options.agent
        agent_crowd(member, int(agents), Path(folder))
        return
    from benchmarks.harness import hardware  # here, because agents run this file, too, and see only this folder

    machine, load = hardware(), os.getloadavg()[0]
    print(f"{machine['cpu']}, {machine['cores']} cores, Linux {machine['linux']}, Python {machine['python']}")
    print(f"load before {load:.1f}; model: nano, idle\n", flush=True)
    settings = {name: getattr(options, name) for name in ("agents", "flying")}
    found = {"hardware": machine, "load": load, **settings, **measure(options)}
    show(found)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
