"""Memory, disk, descriptors or processes run out, or the wall clock jumps. Agents get clear errors or are ended; the
system survives, and goes on as before when the shortage is over.

Control groups and mounts need root; tests that need them are skipped where they are not available.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from libaios import wire
from libaios.client import Client
from libaios.home import Home
from tests.conftest import System, eventually

Fresh = Callable[..., System]


def part(system: System, name: str) -> int:
    return next(entry["ospid"] for entry in system.ps() if entry["name"] == name)


def parts(system: System) -> list[int]:
    return [entry["ospid"] for entry in system.ps() if entry["system"]]


def serves(system: System) -> bool:
    return system.run("aios-run", "--", "true").returncode == 0


class Group:
    """A control group of version 1."""

    def __init__(self, controller: str) -> None:
        self.path = Path("/sys/fs/cgroup") / controller / f"aiosd-test-{os.getpid()}"
        try:
            self.path.mkdir()
        except OSError as err:
            pytest.skip(f"no {controller} control group: {err}")

    def set(self, name: str, value: str | int) -> None:
        (self.path / name).write_text(str(value))

    def get(self, name: str) -> str:
        return (self.path / name).read_text()

    def adopt(self, *ospids: int) -> None:
        for ospid in ospids:
            self.set("cgroup.procs", ospid)


@pytest.fixture
def group(fresh_aiosd: Fresh) -> Iterator[Callable[[str], Group]]:
    made: list[Group] = []

    def make(controller: str) -> Group:
        made.append(Group(controller))
        return made[-1]

    yield make
    for one in made:
        for ospid in one.get("cgroup.procs").split():
            with contextlib.suppress(OSError):  # move them to the root group, so that this group can be removed
                (one.path.parent / "cgroup.procs").write_text(ospid)
        assert eventually(lambda one=one: removed(one.path))


def removed(path: Path) -> bool:
    with contextlib.suppress(OSError):
        path.rmdir()
    return not path.exists()


# ── memory ────────────────────────────────────────────────────────────────────────────────────────────────


BOMB = "blocks = []\nwhile True:\n    blocks.append(b'x' * (4 << 20))\n"


def test_agents_are_killed_first_when_memory_runs_out(aiosd: System) -> None:
    shown = "cat /proc/self/oom_score_adj"
    agent = aiosd.run("aios-run", "--", "sh", "-c", f"{shown}; ({shown}) & wait", check=True)
    assert agent.stdout.split() == ["1000", "1000"]
    for ospid in parts(aiosd):
        assert int(Path(f"/proc/{ospid}/oom_score_adj").read_text()) < 1000


def test_out_of_memory_kills_the_agent_and_no_other_process(
    fresh_aiosd: Fresh, group: Callable[[str], Group], tmp_path: Path
) -> None:
    (tmp_path / "bomb.py").write_text(BOMB)
    memory = group("memory")
    memory.set("memory.limit_in_bytes", 256 << 20)
    system = fresh_aiosd("--threads", "1")
    before = parts(system)
    system.run("aios-run", "-d", "--name", "bystander", "--", "sleep", "1000", check=True)
    assert system.daemon is not None
    memory.adopt(system.daemon.pid, *before, *(agent["ospid"] for agent in system.agents()))
    assert system.run("aios-run", tmp_path / "bomb.py").returncode == 128 + signal.SIGKILL
    assert parts(system) == before
    assert [agent["name"] for agent in system.agents()] == ["bystander"]
    assert system.run("aiosd", "status", "--check").returncode == 0


# ── disk ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for one megabyte."""
    path = Path(f"/tmp/aios-disk-{os.getpid()}")
    path.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path], capture_output=True, text=True)
    except FileNotFoundError:
        path.rmdir()
        pytest.skip("no mount")
    if done.returncode:
        path.rmdir()
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    yield path
    assert eventually(lambda: subprocess.run(["umount", path], capture_output=True).returncode == 0)
    path.rmdir()


def spawn_many(system: System, number: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    try:
        with Client(Home(system.home)) as client:
            for _ in range(number):
                spawn = wire.Spawn("exec", "true", env={"PATH": os.environ["PATH"]}, cwd="/")
                client.call(wire.Sys.SPAWN, spawn, wire.Spawned, (null, null, null), timeout=30)
    finally:
        os.close(null)


def test_a_full_disk_costs_output_and_not_the_system(small_disk: Path, fresh_aiosd: Fresh) -> None:
    system = fresh_aiosd("--threads", "1", home=small_disk)
    before = set(parts(system))
    chatty = system.run("aios-run", "-d", "--", "sh", "-c", "yes; sleep 1000", check=True).stdout.strip()
    log = small_disk / "data" / "logs" / f"{chatty}.log"
    assert eventually(lambda: os.statvfs(small_disk).f_bavail == 0)
    assert serves(system)  # attached: no log
    # Pids are assigned in blocks, and a new block is first written to the disk.
    with pytest.raises(OSError, match="No space left on device"):
        spawn_many(system, 300)
    failed = system.run("aios-run", "--", "true")
    assert failed.returncode == 125
    assert "No space left on device" in failed.stderr
    kernel = part(system, "kernel")
    os.kill(kernel, signal.SIGKILL)
    assert eventually(lambda: system.run("aios-ps", "-p", chatty).returncode == 0)
    log.write_bytes(b"")
    assert serves(system)
    assert system.run("aios-kill", "--timeout", "1", chatty).returncode == 0
    assert before - set(parts(system)) == {kernel}
    assert system.run("aiosd", "status", "--check").returncode == 0


# ── descriptors and processes ─────────────────────────────────────────────────────────────────────────────


def test_descriptors_that_run_out_are_an_error_for_the_spawner(fresh_aiosd: Fresh) -> None:
    system = fresh_aiosd("--threads", "1")
    limits = {ospid: resource.prlimit(ospid, resource.RLIMIT_NOFILE) for ospid in parts(system)}
    for ospid in limits:
        resource.prlimit(ospid, resource.RLIMIT_NOFILE, (100, limits[ospid][1]))
    started = []
    for _ in range(40):
        done = system.run("aios-run", "-d", "--", "sleep", "1000")
        if done.returncode:
            break
        started.append(done.stdout.strip())
    assert 5 < len(started) < 40
    assert done.returncode == 125
    assert "no descriptors for another agent" in done.stderr
    assert "ulimit -n" in done.stderr
    assert parts(system) == list(limits)
    system.run("aios-kill", "--timeout", "1", started.pop(), check=True)
    started.append(system.run("aios-run", "-d", "--", "sleep", "1000", check=True).stdout.strip())
    for ospid, limit in limits.items():
        resource.prlimit(ospid, resource.RLIMIT_NOFILE, limit)
    started.append(system.run("aios-run", "-d", "--", "sleep", "1000", check=True).stdout.strip())
    assert len(system.agents()) == len(started)
    assert system.run("aiosd", "status", "--check").returncode == 0


def test_processes_that_run_out_are_an_error_and_delay_what_must_be_forked_again(
    fresh_aiosd: Fresh, group: Callable[[str], Group]
) -> None:
    pids = group("pids")
    system = fresh_aiosd("--threads", "1")
    assert system.daemon is not None
    pids.adopt(system.daemon.pid, *parts(system))
    sleeper = system.run("aios-run", "-d", "--", "sleep", "1000", check=True).stdout.strip()
    pids.set("pids.max", int(pids.get("pids.current")))
    refused = system.run("aios-run", "--", "true")
    assert refused.returncode == 125
    assert "Resource temporarily unavailable" in refused.stderr
    no_room = "{} cannot be forked: Resource temporarily unavailable; tried again in 0.2 s"
    pids.set("pids.max", 1)
    core = part(system, "llm")
    os.kill(core, signal.SIGKILL)
    assert eventually(lambda: no_room.format("llm") in system.log())
    pids.set("pids.max", "max")
    assert serves(system)
    assert eventually(lambda: system.status()["models"][0]["state"] == "ready")
    pids.set("pids.max", 1)
    os.kill(part(system, "kernel"), signal.SIGKILL)
    assert eventually(lambda: no_room.format("kernel") in system.log())
    pids.set("pids.max", "max")
    assert serves(system)
    assert [str(agent["pid"]) for agent in system.agents()] == [sleeper]


# ── the wall clock ────────────────────────────────────────────────────────────────────────────────────────


JUMPING = """
import os, time
_now, _flag = time.time, {flag!r}
def jumped():
    try:
        return _now() + float(open(_flag).read() or 0)
    except OSError:
        return _now()
time.time = jumped
"""


@pytest.mark.parametrize("days", [-400, 400])
def test_deadlines_do_not_care_for_the_wall_clock(fresh_aiosd: Fresh, tmp_path: Path, days: int) -> None:
    """After a jump of the clock and a new kernel an agent still has its remaining time; one without any is ended."""
    flag = tmp_path / "jump"
    (tmp_path / "sitecustomize.py").write_text(JUMPING.format(flag=str(flag)))
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    system = fresh_aiosd("--threads", "1", env={"PYTHONPATH": path})
    patient = system.run("aios-run", "-d", "--time", "1000", "--", "sleep", "1000", check=True).stdout.strip()
    brief = system.run("aios-run", "-d", "--time", "3", "--", "sleep", "1000", check=True).stdout.strip()
    flag.write_text(str(days * 86400))
    kernel = part(system, "kernel")
    os.kill(kernel, signal.SIGKILL)
    assert eventually(lambda: not psutil.pid_exists(kernel))
    assert system.run("aios-wait", "--timeout", "20", brief).returncode == 124
    assert [str(agent["pid"]) for agent in system.agents()] == [patient]
    assert 0 <= system.status()["uptime_s"] < 100
    (started,) = re.findall(r"\d+", system.run("aios-ps", "-p", patient, "-o", "ospid=").stdout)
    assert psutil.pid_exists(int(started))
