"""Budgets and STOP of an agent hold for its child processes, over every connection, and across every death."""

from __future__ import annotations

import json
import os
import signal
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from aiosd.kernel.budget import GRACE_S
from libaios import wire
from libaios.client import Client
from libaios.home import Home
from tests.conftest import System, eventually

Fresh = Callable[..., System]

HEADER = "import os, signal, subprocess, sys\nimport libaios as aios\n"

#: A program beside the agent: it generates over the control socket once a line comes on its stdin.
CHILD = """
import sys
import libaios as aios
aios.llm.models()
print("up", flush=True)
sys.stdin.readline()
try:
    r = aios.llm.complete(sys.argv[1], max_tokens=int(sys.argv[2]), ignore_eos=True, temperature=0.0)
    print(r.finish_reason, flush=True)
except OSError as err:
    print(err.strerror, flush=True)
"""

#: Starts `count` of them, lets all go at once, and prints what each of them printed.
CROWD = """
count, tokens = int(sys.argv[1]), sys.argv[2]
def start(number):
    env = {name: value for name, value in os.environ.items() if name != "AIOS_CHANNEL"}
    argv = [sys.executable, "-c", CHILD, f"Child {number} says", tokens]
    return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
jobs = [start(number) for number in range(count)]
assert [job.stdout.readline() for job in jobs] == count * ["up\\n"]
print("all up", flush=True)
for job in jobs:
    print(file=job.stdin, flush=True)
for job in jobs:
    print(job.stdout.read().strip(), flush=True)
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def make(code: str, name: str = "agent.py") -> Path:
        path = tmp_path / name
        path.write_text(HEADER + f"CHILD = {CHILD!r}\n" + textwrap.dedent(code))
        return path

    return make


Write = Callable[..., Path]


def ospid(system: System, name: str) -> int:
    return next(entry["ospid"] for entry in system.ps() if entry["name"] == name)


def kill_kernel(system: System) -> None:
    old = ospid(system, "kernel")
    os.kill(old, signal.SIGKILL)
    assert eventually(lambda: not psutil.pid_exists(old))


def inspected(system: System, pid: int | str) -> dict[str, Any]:
    return json.loads(system.run("aios-inspect", str(pid), check=True).stdout)[0]


def seen(client: Client, pid: int) -> dict[str, Any]:
    """Like `inspected`, without a command: a command takes long, and a stopped process of aiosd is soon replaced."""
    return client.call(wire.Sys.INSPECT, wire.PidArgs(pid), dict[str, Any], timeout=30)


def books(client: Client) -> list[str]:
    return client.call(wire.Sys.STATUS, wire.Status(check=True), dict[str, Any], timeout=30.0)["check"]


# ── tokens ────────────────────────────────────────────────────────────────────────────────────────────────


def test_calls_over_the_control_socket_are_cut_by_the_agents_budget(aiosd: System, write: Write) -> None:
    """Twenty children that would generate 8,000 tokens at the same time get 150, and the books balance meanwhile."""
    job = aiosd.popen("aios-run", "--name", "crowd", "--tokens", "150", write(CROWD), "20", "400")
    assert job.stdout is not None
    assert job.stdout.readline() == "all up\n"
    pid = next(entry["pid"] for entry in aiosd.agents())
    checks = []
    with Client(Home(aiosd.home)) as client:
        while job.poll() is None:
            checks.append(books(client))
    said = job.stdout.read().splitlines()
    assert len(said) == 20
    assert set(said) <= {"limit", "token budget of 150 used up"}
    found = inspected(aiosd, pid)
    charged = found["prompt_tokens"] - found["cached_tokens"] + found["completion_tokens"]
    assert charged == 150, found
    assert [line for check in checks for line in check] == []


# ── STOP ──────────────────────────────────────────────────────────────────────────────────────────────────


def tokens_of(client: Client, name: str) -> int:
    procs = client.call(wire.Sys.PS, wire.Ps(all=True), list[wire.ProcInfo], timeout=30.0)
    return sum(proc.completion_tokens for proc in procs if proc.name == name)


def test_of_a_stopped_agent_nothing_is_counted_until_it_goes_on(aiosd: System, write: Write) -> None:
    """Neither for it, nor for its child, nor for their processes, while another agent gets its tokens."""
    generate = "for _ in aios.llm.complete('Once', max_tokens=1500, ignore_eos=True, stream=True): pass\n"
    write(generate, "child.py")
    family = write(
        "env = {name: value for name, value in os.environ.items() if name != 'AIOS_CHANNEL'}\n"
        f"code = 'import libaios as aios\\n' + {generate!r}\n"
        "aios.proc.spawn('child.py', name='family')\n"
        "jobs = [subprocess.Popen([sys.executable, '-c', code], env=env) for _ in range(2)]\n" + generate
    )
    other = write("while True: aios.llm.complete('Else', max_tokens=50, ignore_eos=True)\n", "other.py")
    aiosd.run("aios-run", "-d", "--name", "other", other, check=True)
    aiosd.run("aios-run", "-d", "--name", "family", family, check=True, cwd=family.parent)
    with Client(Home(aiosd.home)) as client:

        def running() -> int:
            status = client.call(wire.Sys.STATUS, wire.Status(), dict[str, Any], timeout=30.0)
            return status["models"][0]["open_calls"]

        assert eventually(lambda: running() >= 5 and tokens_of(client, "family") > 20)
        procs = client.call(wire.Sys.PS, wire.Ps(), list[wire.ProcInfo], timeout=30)
        first = min(one.pid for one in procs if one.name == "family")
        client.call(wire.Sys.KILL, wire.Kill(first, signal.SIGSTOP), None, timeout=30.0)
        stopped, others = tokens_of(client, "family"), tokens_of(client, "other")
        assert stopped < 4 * 1500
        assert eventually(lambda: tokens_of(client, "other") >= others + 300, timeout=60)
        assert tokens_of(client, "family") == stopped
        assert books(client) == []
        client.call(wire.Sys.KILL, wire.Kill(first, signal.SIGCONT), None, timeout=30.0)
        assert eventually(lambda: tokens_of(client, "family") > stopped + 20)
    aiosd.run("aios-kill", "-KILL", "family", "other", check=True)


def test_a_child_that_is_being_forked_when_its_parent_stops_is_stopped_too(aiosd: System, write: Write) -> None:
    write("aios.llm.complete('Once', max_tokens=1500, ignore_eos=True)", "child.py")
    parent = write("""
        print(aios.proc.getpid(), flush=True)
        sys.stdin.readline()
        aios.proc.spawn("child.py")
        aios.msg.recv()
    """)
    job = aiosd.popen("aios-run", parent, cwd=parent.parent)
    assert job.stdout is not None
    assert job.stdin is not None
    pid = int(job.stdout.readline())
    supervisor = ospid(aiosd, "supervisor")
    with Client(Home(aiosd.home)) as client:
        os.kill(supervisor, signal.SIGSTOP)
        try:
            print(file=job.stdin, flush=True)
            # It has requested a child; the supervisor is stopped.
            assert eventually(lambda: any(call["call"] == "spawn" for call in seen(client, pid)["open_calls"]))
            stop = client.submit(wire.Sys.KILL, wire.Kill(pid, signal.SIGSTOP))
        finally:
            os.kill(supervisor, signal.SIGCONT)
        client.result(stop, None, 20.0)
    assert eventually(lambda: [entry["stat"] for entry in aiosd.agents()] == ["T", "T"])
    assert [entry["completion_tokens"] for entry in aiosd.agents()] == [0, 0]
    aiosd.run("aios-kill", "-CONT", str(pid), check=True)
    assert eventually(lambda: any(entry["completion_tokens"] for entry in aiosd.agents()))
    aiosd.run("aios-kill", "-KILL", "child", "agent", check=True)
    job.wait(30)


# ── budgets that outlive their owner ──────────────────────────────────────────────────────────────────────


def test_the_time_of_a_parent_that_is_gone_ends_its_children(aiosd: System, write: Write) -> None:
    parent = write("print(aios.proc.spawn('sleep', '1000'))")
    done = aiosd.run("aios-run", "--time", "3", parent, check=True)  # ends in time, by itself
    assert aiosd.run("aios-wait", done.stdout.strip()).returncode == 124
    assert inspected(aiosd, done.stdout.strip())["reason"] == "time budget of 3 s used up"


def test_a_parent_that_ends_in_its_spawn_leaves_its_budget(aiosd: System, write: Write) -> None:
    """It has ended and was waited for before its child exists."""
    parent = write("""
        from libaios.agent import connection
        from libaios import wire
        spec = wire.Spawn("exec", "sleep", ["1000"], dict(os.environ), "/", detached=True)
        connection().submit(wire.Sys.SPAWN, spec)
        aios.proc.getpid()  # so the kernel has the spawn too
        os._exit(0)
    """)
    for _ in range(10):
        aiosd.run("aios-run", "--time", "1000", "--tokens", "77", parent, check=True)
    assert eventually(lambda: len(aiosd.agents()) == 10)
    for entry in aiosd.agents():
        (budget,) = inspected(aiosd, entry["pid"])["budgets"]
        assert (budget["tokens"], budget["time_s"]) == (77, 1000)
    aiosd.run("aios-kill", "-KILL", "sleep", check=True)


def test_a_budget_of_the_dead_outlives_the_kernel(fresh_aiosd: Fresh, write: Write) -> None:
    write(
        """
        print("here", flush=True)
        aios.msg.recv()
        r = aios.llm.complete("more", max_tokens=500, ignore_eos=True)
        print(r.finish_reason, r.usage.completion_tokens, flush=True)
        aios.msg.recv()
    """,
        "child.py",
    )
    parent = write("""
        aios.llm.complete("Once upon a time", max_tokens=40, ignore_eos=True)
        print(aios.proc.spawn("child.py"), flush=True)
    """)
    system = fresh_aiosd("--threads", "1")
    job = system.popen("aios-run", "--tokens", "100", "--time", "1000", parent, cwd=parent.parent)
    assert job.wait(30) == 0
    (child,) = system.agents()
    kill_kernel(system)
    (budget,) = inspected(system, child["pid"])["budgets"]
    assert budget["owner"] != child["pid"]
    assert (budget["tokens"], budget["time_s"]) == (100, 1000.0)
    assert budget["tokens_used"] >= 40
    with Client(Home(system.home)) as client:
        client.call(wire.Sys.SEND, wire.Send(child["pid"], wire.raw("go")), None, timeout=30)
    assert job.stdout is not None
    said = sorted(job.stdout.readline().split() for _ in range(3))  # parent and child share it
    assert said[:2] == [[str(child["pid"])], ["here"]]
    assert said[2][0] == "limit"
    assert int(said[2][1]) <= 60
    system.run("aios-kill", "-KILL", str(child["pid"]), check=True)


def test_a_fork_under_way_when_the_budget_ends_is_ended(aiosd: System, write: Write) -> None:
    """The supervisor has not forked it yet. The parent dies meanwhile, or by the same budget."""
    parent = write("""
        print(aios.proc.getpid(), flush=True)
        sys.stdin.readline()
        aios.proc.spawn("sh", "-c", "trap '' TERM; sleep 1000")
        aios.msg.recv()
    """)
    supervisor, known = ospid(aiosd, "supervisor"), {one["pid"] for one in aiosd.ps("--dead")}
    job = aiosd.popen("aios-run", "--time", "2", parent)
    assert job.stdout is not None
    assert job.stdin is not None
    pid = int(job.stdout.readline())
    with Client(Home(aiosd.home)) as client:
        os.kill(supervisor, signal.SIGSTOP)
        try:
            print(file=job.stdin, flush=True)
            assert eventually(lambda: seen(client, pid)["budgets"][0]["reached"] == "time")
        finally:
            os.kill(supervisor, signal.SIGCONT)
    assert job.wait(30) == 124
    assert eventually(lambda: aiosd.agents() == [])
    lives = [one["ended"] - one["started"] for one in aiosd.ps("--dead") if one["pid"] not in known | {pid}]
    assert all(seconds < GRACE_S for seconds in lives), "it did not get the grace of a new deadline"
