"""Agents that are started again when they end, and agents that start with the system."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from libaios import wire
from libaios.client import Client
from libaios.home import Home
from tests.conftest import System, eventually

Fresh = Callable[..., System]

#: Records each life and the messages in its mailbox. It lives on if the file `enough` exists, and else fails.
LIVES = """
import os, sys
import libaios as aios
with open("lives", "a") as file:
    print(os.getpid(), aios.proc.getpid(), file=file)
print("hello", flush=True)
if not os.path.exists("enough"):
    sys.exit(3)
sender, message = aios.msg.recv()
with open("lives", "a") as file:
    print(message, file=file)
aios.msg.recv()
"""


@pytest.fixture
def lives(tmp_path: Path) -> Path:
    (tmp_path / "agent.py").write_text(LIVES)
    return tmp_path


def start(system: System, folder: Path, policy: str, *more: str) -> int:
    done = system.run("aios-run", "-d", "--restart", policy, *more, "agent.py", cwd=str(folder), check=True)
    return int(done.stdout)


def lines(folder: Path) -> list[str]:
    path = folder / "lives"
    return path.read_text().splitlines() if path.exists() else []


def inspect(system: System, pid: int) -> dict[str, Any]:
    import json

    found = json.loads(system.run("aios-inspect", str(pid), check=True).stdout)
    return dict(found[0])


def test_it_is_started_again_under_its_pid_until_the_tries_are_used_up(aiosd: System, lives: Path) -> None:
    pid = start(aiosd, lives, "on-failure:2")
    assert aiosd.run("aios-wait", str(pid)).returncode == 3
    ospids, pids = zip(*(line.split() for line in lines(lives)), strict=True)
    assert set(pids) == {str(pid)}
    assert len(set(ospids)) == 3
    assert aiosd.run("aios-logs", str(pid)).stdout == "hello\n" * 3
    assert inspect(aiosd, pid)["restarts"] == 2


def test_one_that_does_well_is_left_alone_and_keeps_its_mailbox(aiosd: System, lives: Path) -> None:
    pid = start(aiosd, lives, "on-failure")
    assert eventually(lambda: lines(lives))
    aiosd.run("python", "-c", f"import libaios as aios; aios.msg.send({pid}, 'kept')", check=True)
    (lives / "enough").touch()
    assert eventually(lambda: "kept" in lines(lives))
    assert eventually(lambda: inspect(aiosd, pid)["state"] == "running")
    count = len(lines(lives))
    os.kill(inspect(aiosd, pid)["ospid"], signal.SIGKILL)  # not a signal of aiosd, so it counts as a failure
    assert eventually(lambda: len(lines(lives)) > count)
    aiosd.run("aios-kill", str(pid), check=True)
    assert aiosd.run("aios-wait", str(pid)).returncode == 143
    assert pid not in [agent["pid"] for agent in aiosd.agents()]


def test_while_it_waits_it_can_be_seen_held_and_ended(aiosd: System, lives: Path) -> None:
    pid = start(aiosd, lives, "always", "--name", "phoenix")
    assert eventually(lambda: len(lines(lives)) >= 4)  # the next wait is 0.8 s or longer
    with Client(Home(aiosd.home)) as client:  # a command may take as long as such a wait
        signals = {number: wire.Kill(pid, number) for number in (signal.SIGSTOP, signal.SIGCONT, signal.SIGTERM)}

        def waits() -> bool:
            return bool(client.call(wire.Sys.INSPECT, wire.PidArgs(pid), dict[str, Any])["stat"] == "W")

        assert eventually(waits)
        client.call(wire.Sys.KILL, signals[signal.SIGSTOP], None)
        assert waits()
        count = len(lines(lives))
        client.call(wire.Sys.KILL, signals[signal.SIGCONT], None)
        assert eventually(lambda: len(lines(lives)) > count)
        assert eventually(waits)
        client.call(wire.Sys.KILL, signals[signal.SIGTERM], None)
    assert aiosd.run("aios-wait", str(pid)).returncode == 3


def test_it_is_started_again_over_the_death_of_the_kernel(fresh_aiosd: Fresh, lives: Path) -> None:
    system = fresh_aiosd("--threads", "1")
    pid = start(system, lives, "always")
    assert eventually(lambda: len(lines(lives)) >= 3)
    kernel = next(entry["ospid"] for entry in system.ps() if entry["name"] == "kernel")
    os.kill(kernel, signal.SIGKILL)
    count = len(lines(lives))
    assert eventually(lambda: len(lines(lives)) >= count + 2)
    (lives / "enough").touch()
    assert eventually(lambda: inspect(system, pid)["stat"] == "S")


def test_a_budget_ends_it_for_good(aiosd: System, lives: Path) -> None:
    pid = start(aiosd, lives, "always", "--time", "1")
    assert aiosd.run("aios-wait", str(pid)).returncode == 124


def test_one_that_could_not_be_started_is_not_started_again(aiosd: System, lives: Path) -> None:
    """It has no pid, and is in no kernel's table."""

    def kernel() -> list[int]:
        return [row["ospid"] for row in aiosd.ps("-e") if row["name"] == "kernel"]

    before = kernel()
    done = aiosd.run("aios-run", "-d", "--restart", "always", "nonesuch.py", cwd=str(lives))
    assert (done.returncode, done.stderr) == (127, "aios-run: nonesuch.py: not found\n")
    assert aiosd.run("aios-wait", str(start(aiosd, lives, "on-failure:1"))).returncode == 3  # after the last end
    assert kernel() == before
    assert "(nonesuch) ended" not in aiosd.log()


def test_only_a_detached_one(aiosd: System, lives: Path) -> None:
    assert aiosd.run("aios-run", "--restart", "always", "agent.py", cwd=str(lives)).returncode == 2
    done = aiosd.run("aios-run", "-d", "--restart", "sometimes", "agent.py", cwd=str(lives))
    assert done.returncode == 125
    assert "'sometimes' is no restart policy" in done.stderr


def test_agents_of_the_settings_start_with_the_system(fresh_aiosd: Fresh, tmp_path: Path) -> None:
    system = fresh_aiosd("--threads", "1", start=False)
    (system.home / "aiosd.toml").write_text(
        f"""
        [[agent]]
        name = "first"
        command = ["sleep", "1000"]
        [[agent]]
        command = "sh -c 'echo $WORD > word; exit 1'"
        name = "second"
        cwd = "{tmp_path}"
        env = {{ WORD = "given" }}
        restart = "on-failure:1"
        [[agent]]
        name = "none"
        command = "/there/is/none"
        """
    )
    system.start()
    assert "aiosd: agent none has not started: /there/is/none: not found\n" in system.log()
    assert [agent["name"] for agent in system.agents()][:1] == ["first"]
    assert eventually(lambda: (tmp_path / "word").exists() and (tmp_path / "word").read_text() == "given\n")
    assert "agent none, which starts with the system: " in system.log()
    status = system.run("aiosd", "status").stdout
    assert re.search(r"  agent none +has not started: /there/is/none: not found\n", status)
    assert eventually(lambda: "agent second" in system.run("aiosd", "status").stdout)
    ended = r"  agent second +has ended with exit code 1 \(aios-logs [0-9]+\)\n"
    assert eventually(lambda: re.search(ended, system.run("aiosd", "status").stdout))
    os.kill(next(row["ospid"] for row in system.ps() if row["name"] == "kernel"), signal.SIGKILL)
    assert re.search(ended, system.run("aiosd", "status").stdout), "a new kernel knows less"
    assert "agent first" not in system.run("aiosd", "status").stdout


def test_the_start_in_the_background_shows_which_agent_of_the_settings_has_failed(fresh_aiosd: Fresh) -> None:
    system = fresh_aiosd(start=False)
    (system.home / "aiosd.toml").write_text("[[agent]]\nname = 'none'\ncommand = '/there/is/none'\n")
    try:
        done = system.run("aiosd", "--threads", "1", "-d")
        assert done.stderr.splitlines()[1:] == ["aiosd: agent none has not started: /there/is/none: not found"]
    finally:
        system.run("aiosd", "stop")
