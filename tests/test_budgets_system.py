"""Budgets of real agents, which spawn, die and use them at the same time."""

from __future__ import annotations

import json
import os
import signal
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from libaios.client import Client
from libaios.home import Home
from libaios.wire import PidArgs, Send, Sys, raw
from tests.conftest import System, command_line, eventually

Write = Callable[..., Path]
Fresh = Callable[..., System]

HEADER = "import errno, os, subprocess, sys, time\nimport libaios as aios\n"

#: Calls tools until it is refused, and prints how many were answered. A call in the kernel when it dies is not.
CALLS = """
done = err = 0
while not err or err.errno == errno.EIO:
    try:
        aios.tool.call("calc", expression="6*7")
        done += 1
    except OSError as error: err = error
print(done, errno.errorcode[err.errno], err.strerror, flush=True)
"""

GROUPS = """
[[group]]
name = "few"
tool_calls = 20
children = 6

[[group]]
name = "brief"
cpu = 0.4

[[group]]
name = "short"
each = { time = 0.3 }
"""


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder = tmp_path_factory.mktemp("budgets")
    (folder / "aiosd.toml").write_text(GROUPS)
    system = System("--config", str(folder / "aiosd.toml")).start()
    yield system
    assert system.destroy() == []


@pytest.fixture
def system(booted: System) -> Iterator[System]:
    yield booted
    booted._end_clients()


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(code: str, name: str = "agent.py") -> Path:
        path = tmp_path / name
        path.write_text(HEADER + textwrap.dedent(code))
        return path

    return make


def inspected(system: System, pid: int | str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(system.run("aios-inspect", str(pid), check=True).stdout)[0]
    return found


# ── each kind ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--cpu", "0.3"), "while True: pass", "CPU budget of 0.3 s used up"),
        (("--cpu", "0.3"), "subprocess.run(['sh', '-c', 'while :; do :; done'])", "CPU budget of 0.3 s used up"),
        (
            ("--memory", "80M"),
            "fd = os.memfd_create('x')\nfor _ in range(200): os.write(fd, bytes(1 << 20))\naios.msg.recv()",
            "memory budget of 80.0M exceeded",
        ),
        (
            ("--processes", "3"),
            "for _ in range(5): subprocess.Popen(['sleep', '100'])\naios.msg.recv()",
            "process budget of 3 exceeded",
        ),
        (("--cpu", "0.5"), "aios.tool.call('python', code='while True: pass')", "CPU budget of 0.5 s used up"),
        (
            ("--memory", "120M"),
            "aios.tool.call('shell', command='head -c 200M /dev/zero | tail -n 1 | sleep 100')",
            "memory budget of 120M exceeded",
        ),
    ],
)
def test_an_agent_beyond_a_sampled_budget_is_ended(
    system: System, write: Write, options: tuple[str, ...], code: str, words: str
) -> None:
    done = system.run("aios-run", "--name", "sampled", *options, write(code))
    assert done.returncode == 124
    assert words in done.stderr
    found = inspected(system, "sampled")
    assert (found["exit"], found["reason"]) == (124, words)
    assert found["budget"] == options[0].removeprefix("--")
    assert f"agent {found['pid']}: {words}" in system.log()


def test_a_fork_bomb_in_a_sandbox_is_ended_and_no_other_agent(fresh_aiosd: Fresh, write: Write) -> None:
    """Linux counts no processes of root, and otherwise all processes of the user, so aiosd's kernel counts. The bomb
    ends by itself at 2,048, so that the machine survives if it is not stopped. On a single processor the bomb may delay
    the kernel for so long that it is replaced; so the test has a system of its own."""
    system = fresh_aiosd("--threads", "1")
    beside = write("for _ in sys.stdin: print(aios.proc.getpid(), flush=True)", "beside.py")
    neighbour = system.popen("aios-run", beside)
    bomb = write("for _ in range(11): os.fork()\ntime.sleep(100)")
    done = system.run("aios-run", "--name", "bomb", "--sandbox", "flat", bomb)
    if "not possible here" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 124, done.stderr
    assert "processes and threads (--processes N allows more)" in done.stderr
    assert inspected(system, "bomb")["budget"] == "processes"
    assert neighbour.communicate("x\n", timeout=30)[0].strip().isdecimal()
    assert eventually(lambda: not any("agent.py" in line for line in map(command_line, system.processes())))


def test_linux_refuses_what_is_far_beyond_a_memory_budget(system: System, write: Write) -> None:
    """A sample would be too late."""
    script = write("""
        try: bytes(1 << 30)
        except MemoryError: print("refused")
    """)
    done = system.run("aios-run", "--memory", "80M", script)
    assert (done.returncode, done.stdout) == (0, "refused\n")


def test_calls_of_tools_are_counted_and_the_next_is_refused(system: System, write: Write) -> None:
    done = system.run("aios-run", "--tool-calls", "3", write(CALLS))
    assert done.stdout == "3 EDQUOT tool call budget of 3 used up\n"
    assert done.returncode == 124
    assert "tool call budget of 3 used up" in done.stderr


def test_children_of_children_count(system: System, write: Write) -> None:
    """In a chain of agents each starts the next one, and ends."""
    script = write("""
        print(aios.proc.getpid(), flush=True)
        try: aios.proc.spawn(sys.argv[0])
        except OSError as err: print(err.strerror, flush=True)
    """)
    done = system.run("aios-run", "--children", "4", script)
    lines = done.stdout.splitlines()
    assert eventually(lambda: system.agents() == [])
    assert len(lines) <= 6
    assert eventually(lambda: "child budget of 4 used up" in system.log())


def test_a_disk_budget_is_refused_where_it_could_not_be_measured(system: System) -> None:
    done = system.run("aios-run", "--disk", "1M", "--", "true")
    assert done.returncode == 125
    assert "disk budget: cannot be measured without a sandbox" in done.stderr


def test_files_and_the_store_count_as_disk(system: System, write: Write) -> None:
    script = write("""
        fd = os.open(os.environ["HOME"] + "/large", os.O_WRONLY | os.O_CREAT)
        try: os.pwrite(fd, b"x", 2 << 20)
        except OSError as err: print(errno.errorcode[err.errno])
        try:
            for number in range(30): aios.mem.add("x" * (100 << 10))
        except OSError as err: print(number, err.strerror, flush=True)
    """)
    done = system.run("aios-run", "--sandbox", "flat", "--disk", "1M", script)
    if "not possible here" in done.stderr:
        pytest.skip(done.stderr)
    assert done.stdout == "EFBIG\n10 disk budget of 1.0M exceeded\n"
    many = write("""
        for number in range(64): open(os.environ["HOME"] + f"/{number}", "wb").write(bytes(64 << 10))
        aios.msg.recv()
    """, "many.py")  # fmt: skip
    done = system.run("aios-run", "--sandbox", "flat", "--disk", "1M", many)
    assert (done.returncode, "disk budget of 1.0M exceeded" in done.stderr) == (124, True)


def test_an_agent_gets_a_message_when_a_budget_runs_short(system: System, write: Write) -> None:
    script = write("""
        for _ in range(4): aios.tool.call("calc", expression="1")
        print(aios.msg.recv(timeout=30))
    """)
    done = system.run("aios-run", "--tool-calls", "5", "--soft-limit", "80", script)
    assert done.returncode == 0
    assert done.stdout == "(1, {'budget': 'tool_calls', 'used': 4.0, 'limit': 5, 'group': ''})\n"


def test_inspect_shows_which_figures_are_exact_and_which_lag(system: System, write: Write) -> None:
    script = write("print(aios.proc.getpid(), flush=True); aios.msg.recv()")
    job = system.popen("aios-run", "--tokens", "5", "--memory", "1G", script)
    assert job.stdout is not None
    pid = int(job.stdout.readline())
    (budget,) = eventually(
        lambda: [one for one in inspected(system, pid)["budgets"] if one["kinds"]["memory"]["age_s"]]
    )
    assert budget["kinds"]["tokens"] == {"limit": 5, "used": 0, "lag_s": None}
    assert budget["kinds"]["memory"]["lag_s"] == 0.1
    assert budget["kinds"]["memory"]["used"] > 1 << 20
    system.run("aios-kill", "-KILL", str(pid), check=True)
    job.wait(30)


# ── trees ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_agents_that_race_with_one_budget_do_not_go_beyond_it(system: System, write: Write) -> None:
    write(CALLS, "child.py")
    parent = write("for _ in range(5): aios.proc.spawn('child.py')\nfor _ in range(5): aios.proc.wait()")
    done = system.run("aios-run", "--tool-calls", "40", parent, cwd=parent.parent)
    lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
    assert sum(int(count) for count, _ in lines) == 40
    assert {words for _, words in lines} == {"EDQUOT tool call budget of 40 used up"}


def test_a_chain_of_agents_that_end_shares_one_cpu_budget(system: System, write: Write) -> None:
    """Each lives for less than the time between two samples."""
    script = write("""
        end = time.process_time() + 0.04
        while time.process_time() < end: pass
        aios.proc.spawn(sys.argv[0])
    """)
    system.run("aios-run", "--cpu", "0.5", script)
    assert eventually(lambda: system.agents() == [], timeout=60), "it goes on for ever"
    assert eventually(lambda: "CPU budget of 0.5 s used up" in system.log())


def test_a_group_shares_its_budget_and_only_the_agent_that_requests_more_is_ended(system: System, write: Write) -> None:
    first = system.run("aios-run", "-g", "few", write(CALLS))
    assert first.stdout == "20 EDQUOT tool call budget of 20 used up by group few\n"
    assert first.returncode == 124
    assert system.run("aios-run", "-g", "few", "--", "true").returncode == 0
    assert system.run("aios-run", "-g", "few", write(CALLS)).stdout.startswith("0 EDQUOT")
    for _ in range(3):
        assert system.run("aios-run", "-g", "few", "--", "true").returncode == 0
    done = system.run("aios-run", "-g", "few", "--", "true")
    assert (done.returncode, done.stderr) == (125, "aios-run: child budget of 6 used up by group few\n")


def test_a_group_without_cpu_time_starts_nothing_more(system: System) -> None:
    done = system.run("aios-run", "-g", "brief", "--", "sh", "-c", "while :; do :; done")
    assert (done.returncode, "by group brief" in done.stderr) == (124, True)
    assert system.run("aios-run", "-g", "brief", "--", "true").returncode == 125
    assert system.run("aios-run", "-g", "short", "--", "sleep", "100").returncode == 124


# ── the kernel's death ────────────────────────────────────────────────────────────────────────────────────


def kill_kernel(system: System) -> None:
    old = next(entry["ospid"] for entry in system.ps() if entry["name"] == "kernel")
    os.kill(old, signal.SIGKILL)
    assert eventually(lambda: not psutil.pid_exists(old))


def test_a_kernels_death_in_the_middle_gives_nothing_back(fresh_aiosd: Fresh, write: Write) -> None:
    """The parent is dead, its children call at the same time, and the kernel dies twice: no call beyond the budget
    begins, no child is counted twice, and processor time is counted on from where it was."""
    system = fresh_aiosd("--threads", "1")
    write("aios.msg.recv()\n" + CALLS + "\naios.msg.recv()", "child.py")
    parent = write("for _ in range(3): print(aios.proc.spawn('child.py'), flush=True)")
    options = ("--tool-calls", str(limit := 10_000), "--children", "5", "--cpu", "100")
    job = system.popen("aios-run", *options, parent, cwd=parent.parent)
    assert job.stdout is not None
    pids = [int(job.stdout.readline()) for _ in range(3)]
    before = inspected(system, pids[0])["budgets"][0]["kinds"]
    assert before["children"]["used"] == 3
    old = {entry["name"]: entry["ospid"] for entry in system.ps()}["kernel"]
    with Client(Home(system.home)) as client:
        for pid in pids:
            client.call(Sys.SEND, Send(pid, raw("go")), None, timeout=30)

        def calls() -> float:
            return client.call(Sys.INSPECT, PidArgs(pids[0]), dict[str, Any], timeout=30)["budgets"][0]["kinds"][
                "tool_calls"
            ]["used"]

        assert eventually(lambda: calls() > 50)
        os.kill(old, signal.SIGKILL)
        assert eventually(lambda: not psutil.pid_exists(old))
        assert 50 < calls() < limit
    kill_kernel(system)
    said = [job.stdout.readline().split(" ", 1) for _ in range(3)]
    assert limit - 10 <= sum(int(count) for count, _ in said) <= limit
    after = inspected(system, pids[0])["budgets"][0]["kinds"]
    assert after["tool_calls"]["used"] == limit
    assert after["children"]["used"] == 3
    assert after["cpu"]["used"] >= before["cpu"]["used"]
    system.run("aios-kill", "-KILL", *map(str, pids))
    job.wait(30)


def test_no_answer_is_empty_because_too_little_is_left(fresh_aiosd: Fresh, write: Write) -> None:
    """The last call is refused, whatever is left: an agent might repeat a call with an empty answer for ever."""
    system = fresh_aiosd("--threads", "1")
    agent = write("""
        try:
            while aios.llm.complete("Once", max_tokens=8, ignore_eos=True).tokens:
                pass
            print("empty")
        except OSError as err:
            print(err.errno == errno.EDQUOT)
    """)
    for tokens in range(20, 32):
        done = system.run("aios-run", "--tokens", str(tokens), agent)
        assert done.stdout == "True\n", (tokens, done.stderr)
