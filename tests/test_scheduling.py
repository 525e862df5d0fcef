"""Scheduling as a person sets it: at the start, at run time, by nice values; and settings that outlive a death."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from libaios import wire
from libaios.client import Client
from libaios.home import Home
from tests.conftest import System, eventually

Fresh = Callable[..., System]

pytestmark = pytest.mark.alone  # shares of the model

ENDLESS = """
import libaios as aios
while True:
    for _ in aios.llm.complete("Once", max_tokens=100000, ignore_eos=True, stream=True):
        pass
"""

#: Makes one long call when a line arrives.
LONG = """
import sys
import libaios as aios
print("up", flush=True)
sys.stdin.readline()
for piece in aios.llm.complete("Once", max_tokens=1500, ignore_eos=True, stream=True):
    sys.stdout.write(".")
    sys.stdout.flush()
print("|", piece.usage.completion_tokens, piece.finish_reason)
"""


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], Path]:
    def make(text: str) -> Path:
        path = tmp_path / f"agent{len(list(tmp_path.iterdir()))}.py"
        path.write_text(text)
        return path

    return make


def core(system: System) -> dict[str, Any]:
    (model,) = system.status()["models"]
    return model["stats"]


def start(system: System, path: Path, *options: str) -> str:
    return system.run("aios-run", "-d", *options, path, check=True).stdout.strip()


def tokens(system: System, *pids: str) -> int:
    """The tokens of all together."""
    return sum(count(system, *pids))


def count(system: System, *pids: str) -> list[int]:
    """The tokens of each, at the same moment: between two commands a model generates many more."""
    found = {str(agent["pid"]): agent["completion_tokens"] for agent in system.ps("-p", ",".join(pids))}
    return [found[pid] for pid in pids]


def end(system: System, *pids: str) -> None:
    system.run("aios-kill", "-KILL", *pids, check=True)
    assert eventually(lambda: not system.agents())


def test_fair_is_the_default(aiosd: System) -> None:
    status = aiosd.status()
    assert (status["policy"], core(aiosd)["policy"]) == ("fair", "fair")
    assert status["quantum"] == {"tokens": 64, "seconds": 10.0}


def test_set_at_the_start(fresh_aiosd: Fresh) -> None:
    system = fresh_aiosd("--policy", "mlfq", "--quantum", "32,2", "--shares", "web=4")
    status = system.status()
    assert (status["policy"], core(system)["policy"]) == ("mlfq", "mlfq")
    assert status["quantum"] == {"tokens": 32, "seconds": 2.0}
    assert status["group_shares"] == {"web": 4.0}


def test_changed_at_run_time_it_outlives_the_kernel_and_the_core(fresh_aiosd: Fresh) -> None:
    system = fresh_aiosd()
    done = system.run("aiosd", "set", "policy", "rr", check=True)
    assert done.stdout == "policy rr (was fair)\n"
    assert system.run("aiosd", "set", "quantum", "16", check=True).stdout == "quantum 16,10 (was 64,10)\n"
    assert core(system)["policy"] == "rr"
    for name in ("kernel", "llm"):
        victim = next(entry["ospid"] for entry in system.ps() if entry["name"] == name)
        os.kill(victim, signal.SIGKILL)
        assert eventually(lambda pid=victim: not psutil.pid_exists(pid))  # type: ignore[misc]
        assert eventually(lambda: core(system).get("policy") == "rr", timeout=30)
        assert system.status()["quantum"] == {"tokens": 16, "seconds": 10.0}


def test_sighup_applies_what_the_file_says(fresh_aiosd: Fresh) -> None:
    system = fresh_aiosd()
    (system.home / "aiosd.toml").write_text("policy = 'priority'\nquantum = 8\n[shares]\nweb = 2\n")
    system.daemon.send_signal(signal.SIGHUP)
    assert eventually(lambda: core(system)["policy"] == "priority")
    status = system.status()
    assert (status["quantum"]["tokens"], status["group_shares"]) == (8, {"web": 2.0})
    assert "after a restart" not in system.log()


def test_a_change_keeps_every_call(fresh_aiosd: Fresh, script: Callable[[str], Path]) -> None:
    system = fresh_aiosd("--slots", "2", "--threads", "1")
    jobs = [system.popen("aios-run", script(LONG)) for _ in range(4)]
    for job in jobs:
        assert job.stdout.readline() == "up\n"
    with Client(Home(system.home)) as client:
        for job in jobs:
            job.stdin.write("\n")
            job.stdin.flush()

        def all_are_there() -> bool:
            stats = client.call(wire.Sys.STATUS, wire.Status(), dict[str, Any])["models"][0]["stats"]
            return bool((stats["running"], stats["waiting"]) == (2, 2))

        assert eventually(all_are_there)
    for name in ("fifo", "rr", "priority", "mlfq", "fair", "rr"):
        system.run("aiosd", "set", "policy", name, check=True)
        system.run("aiosd", "set", "quantum", "8", check=True)
    for job in jobs:
        out, err = job.communicate(timeout=60)
        assert (job.returncode, err) == (0, "")
        assert out.endswith("| 1500 length\n")
        assert out.count(".") >= 1


def test_who_may_not_and_what_cannot_be_changed(aiosd: System) -> None:
    done = aiosd.run("aios-run", "--", "aiosd", "set", "policy", "fifo")
    assert (done.returncode, done.stderr) == (1, "aiosd: an agent may not change settings\n")
    done = aiosd.run("aiosd", "set", "policy", "lottery")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "aiosd: policy: 'lottery' is none of fifo, rr, priority, mlfq, fair (see aiosd set --help)\n"
    assert aiosd.status()["policy"] == "fair"


def test_renice_reaches_a_call_that_runs(fresh_aiosd: Fresh, script: Callable[[str], Path]) -> None:
    """With one slot, and the policy in which a more urgent call runs at once."""
    system = fresh_aiosd("--slots", "1", "--policy", "priority", "--quantum", "1000000,1000", "--threads", "1")
    path = script(ENDLESS)
    first = start(system, path, "-n", "-10")
    assert eventually(lambda: tokens(system, first) > 0)
    second = start(system, path, "-n", "0")
    assert eventually(lambda: core(system)["waiting"] == 1)
    assert tokens(system, second) == 0
    system.run("aios-renice", "15", first, check=True)
    assert eventually(lambda: tokens(system, second) > 0)
    assert core(system)["preemptions"] >= 1
    end(system, first, second)


def test_nice_values_share_out_the_model(fresh_aiosd: Fresh, script: Callable[[str], Path]) -> None:
    """Two agents of each value on two slots: after some turns tokens are about in the ratio of the weights."""
    system = fresh_aiosd("--slots", "2", "--quantum", "16", "--threads", "1")
    path = script(ENDLESS)
    urgent = [start(system, path) for _ in range(2)]
    patient = [start(system, path, "-n", "10") for _ in range(2)]
    assert eventually(lambda: all(count(system, *urgent, *patient)))
    before = count(system, *urgent, *patient)
    gained = [0, 0, 0, 0]

    def enough() -> bool:
        gained[:] = [now - then for now, then in zip(count(system, *urgent, *patient), before, strict=True)]
        return sum(gained[2:]) > 300

    assert eventually(enough, timeout=60)
    end(system, *urgent, *patient)
    assert 5 < sum(gained[:2]) / sum(gained[2:]) < 15, "1024 to 110"


def test_a_group_gets_its_share_however_many_they_are(fresh_aiosd: Fresh, script: Callable[[str], Path]) -> None:
    """Two agents of a group with a share of three, against one agent without a group."""
    system = fresh_aiosd("--slots", "1", "--quantum", "16", "--threads", "1", "--shares", "web=3")
    path = script(ENDLESS)
    web = [start(system, path, "-g", "web") for _ in range(2)]
    other = start(system, path)
    assert eventually(lambda: all(count(system, *web, other)))

    def ratio(tokens_of_other: int) -> float:
        before = count(system, *web, other)
        gained = [0, 0, 0]

        def enough() -> bool:
            gained[:] = [now - then for now, then in zip(count(system, *web, other), before, strict=True)]
            return gained[2] > tokens_of_other

        assert eventually(enough, timeout=60)
        return (gained[0] + gained[1]) / gained[2]

    more = ratio(400)
    system.run("aiosd", "set", "shares", "web=0.1", check=True)
    less = ratio(600)
    end(system, *web, other)
    assert 2 < more < 4.5
    assert less < 0.4


def test_a_stopped_agent_has_saved_up_nothing(fresh_aiosd: Fresh, script: Callable[[str], Path]) -> None:
    system = fresh_aiosd("--slots", "1", "--quantum", "16", "--threads", "1")
    path = script(ENDLESS)
    stopped, other = start(system, path), start(system, path)
    assert eventually(lambda: all(count(system, stopped, other)))
    system.run("aios-kill", "-STOP", stopped, check=True)
    base = tokens(system, other)
    assert eventually(lambda: tokens(system, other) > base + 1000, timeout=60)
    system.run("aios-kill", "-CONT", stopped, check=True)
    before = count(system, stopped, other)
    gained = [0, 0]

    def enough() -> bool:
        gained[:] = [now - then for now, then in zip(count(system, stopped, other), before, strict=True)]
        return gained[0] > 200

    assert eventually(enough)
    end(system, stopped, other)
    assert gained[1] > 60, "the other one had to wait until the first had caught up"


def test_a_call_that_lost_its_slot_is_shown_waiting(fresh_aiosd: Fresh, script: Callable[[str], Path]) -> None:
    system = fresh_aiosd("--slots", "1", "--policy", "rr", "--quantum", "16")
    path = script(ENDLESS)
    pids = [start(system, path) for _ in range(2)]

    def seen() -> list[str]:
        return sorted(agent["stat"] for agent in system.ps("-p", ",".join(pids)))

    assert eventually(lambda: core(system)["preemptions"] > 4)
    found = [seen() for _ in range(12)]
    assert eventually(lambda: ["Q", "R"] in found or found.append(seen()))
    assert ["R", "R"] not in found
    end(system, *pids)
