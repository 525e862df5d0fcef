"""Common fixtures: a deadline and leak checks for every test, and a real aiosd.

    aiosd         one system with the embedded model for the whole run. Tests that use it must leave it as they
                  found it: after each test every slot is free again and no agent is alive
    fresh_aiosd   a factory of systems for one test, which may stop, kill and damage them

A test fails if it leaves a process, a descriptor or a mapped segment behind, or runs for more than two minutes
(`@pytest.mark.deadline(seconds)` allows more). Each wait in this file has a deadline, and processes that do not end in
time are killed, so nothing here can hang a run.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import hypothesis
import psutil
import pytest

from aiosd import procfs
from libaios import wire
from libaios.client import Client
from libaios.home import Home
from tests.alone import pytest_configure_node, pytest_runtest_protocol
from tests.realmodels import gemma3, smollm2

__all__ = ["gemma3", "pytest_configure_node", "pytest_runtest_protocol", "smollm2"]  # fixtures and hooks for all tests

# Others use the machine, too, so the duration of one example says nothing about the code.
hypothesis.settings.register_profile("aiosd", deadline=None, print_blob=True)
hypothesis.settings.load_profile("aiosd")

DEADLINE_S = 120.0
# Long, because on a busy machine a process may get no processor for seconds. Only a fault takes all of it.
PATIENCE_S = 30.0  # until an event happens, or until something has gone after a test
BOOT_S = 60.0
STOP_S = 60.0

# A shell starts background jobs with INT and QUIT ignored, and children inherit this.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it

#: A variable in the environment of all processes that a test starts, by which they are found.
MARK = "AIOSD_TESTS"
os.environ[MARK] = str(os.getpid())


#: Files that take longest. They begin first, or of several processes that share the tests one would work alone at last.
LONGEST = (
    "faults",
    "real_smollm2",
    "cli_aiosd",
    "as_python",
    "scheduling",
    "hostile",
    "gateway",
    "llm_attention",
    "boot",
    "machine",
)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist, which has a second thread
        config.addinivalue_line("filterwarnings", "ignore:This process .* is multi-threaded:DeprecationWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


# ── deadlines ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(autouse=True)
def deadline(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that takes too long. If code in C blocks the signal's handler, faulthandler ends the run later."""
    marker = request.node.get_closest_marker("deadline")
    seconds = marker.args[0] if marker else DEADLINE_S

    def late(number: int, frame: FrameType | None) -> None:
        pytest.fail(f"not done after {seconds:.0f} s")

    old = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, old)


def eventually(holds: Callable[[], Any], timeout: float = PATIENCE_S, every: float = 0.02) -> Any:
    """Call `holds` until it returns a true value or the time is up; returns its last value."""
    end = time.monotonic() + timeout
    while not (value := holds()) and time.monotonic() < end:
        time.sleep(every)
    return value


def emptied(look: Callable[[], Any]) -> Any:
    """Call `look` until it finds nothing or the time is up; returns what it found last."""
    found: Any = ()

    def nothing() -> bool:
        nonlocal found
        found = look()
        return not any(found)

    eventually(nothing)
    return found


# ── leaks ─────────────────────────────────────────────────────────────────────────────────────────────────


def offspring() -> set[psutil.Process]:
    """All processes of this test run: its descendants, and those with its mark in their environment."""
    found = set(psutil.Process().children(recursive=True))
    for pid in psutil.pids():
        with contextlib.suppress(OSError, psutil.Error):
            if pid != os.getpid() and bears_mark(pid):
                found.add(psutil.Process(pid))
    return found


def born_since(before: set[int]) -> set[psutil.Process]:
    """Those of `offspring` whose pids are not in `before`.

    Only new processes are examined: to examine all of the machine around each of thousands of tests takes minutes.
    """
    found = set()
    for pid in set(psutil.pids()) - before:
        with contextlib.suppress(OSError, psutil.Error):
            if descends_from_here(pid) or bears_mark(pid):
                found.add(psutil.Process(pid))
    return found


def descends_from_here(pid: int) -> bool:
    while (stat := procfs.read_stat(pid)) and stat.ppid != os.getpid():
        pid = stat.ppid
    return stat is not None


def bears_mark(pid: int) -> bool:
    return f"{MARK}={os.getpid()}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def descriptors() -> set[str]:
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the descriptor with which the folder was listed
            found.add(f"descriptor {fd} → {os.readlink(f'/proc/self/fd/{fd}')}")
    return found


def segments() -> set[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {f"mapping {line.split()[0]} {line.split()[5]}" for line in lines if "/memfd:aios" in line}


def in_words(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return f"process {process.pid} ({process.status()}) {' '.join(process.cmdline()) or process.name()}"
    return f"process {process.pid}"


def command_line(process: psutil.Process) -> str:
    """The command line; empty if the process has ended, which it may do at any time."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def is_helper(process: psutil.Process, before: set[int]) -> bool:
    """Is it a child of a core or toolbox that ran before the test? Then it may outlive the test."""
    try:
        helps = {"aiosd.llm.front", "aiosd.tools.worker"} & set(process.cmdline())
        return bool(helps) and process.ppid() in before
    except psutil.Error:
        return False


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    before, held = set(psutil.pids()), descriptors() | segments()
    yield

    def left() -> tuple[set[psutil.Process], set[str]]:
        if drift := (descriptors() | segments()) - held:
            gc.collect()  # garbage that is not yet collected is no leak
            drift = (descriptors() | segments()) - held
        return {process for process in born_since(before) if not is_helper(process, before)}, drift

    alive, drift = emptied(left)
    complaints = sorted(map(in_words, alive)) + sorted(drift)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    if complaints:
        pytest.fail("left behind:\n  " + "\n  ".join(complaints))


# ── a real system ─────────────────────────────────────────────────────────────────────────────────────────

#: Variables that a test run may have and that its systems must not inherit.
STRANGE = {
    "PYTHONUNBUFFERED",  # print would write in several pieces, and outputs of agents would mix
    "PYTHONDONTWRITEBYTECODE",  # each of hundreds of systems would compile all code again
    "COLUMNS",  # pytest-xdist sets it; the width of a test's own terminal must count
    "LINES",
}

#: Settings that save hundreds of systems work at their start: measuring the best number of threads, and memory for 32
#: slots. With `env={"AIOSD_SLOTS": ""}` a system decides itself, and options override these settings.
SMALL = {"AIOSD_THREADS": "1", "AIOSD_SLOTS": "12"}

SYSTEMS: list[System] = []  # running systems; their logs are shown when a test fails


class System:
    """One aiosd in a home of its own, and the commands that talk to it."""

    def __init__(
        self,
        *options: str,
        home: Path | None = None,
        env: dict[str, str] | None = None,
        program: Sequence[str] = ("aiosd",),
        sandbox: str = "none",
        cwd: str | None = None,
    ) -> None:
        """`sandbox`: the default level for agents. It is none unless a test is about sandboxes, because agents of tests
        read files outside. "": aiosd's own default."""
        self.cwd = cwd
        self.options = options
        self.program = program
        self.own_home = home is None
        self.home = home or Path(tempfile.mkdtemp(prefix="aios-", dir="/tmp"))  # short: it holds a socket
        own = {name for name in os.environ if name.startswith(("AIOS_", "AIOSD_")) and name != MARK}
        self.env = {name: value for name, value in os.environ.items() if name not in own | STRANGE}
        self.env |= {"AIOS_HOME": str(self.home), **SMALL, **({"AIOSD_SANDBOX": sandbox} if sandbox else {})}
        self.env |= env or {}
        self.env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), self.env.get("PATH", os.defpath)])
        self.daemon: subprocess.Popen[bytes] | None = None
        fd, path = tempfile.mkstemp(prefix="aios-", suffix=".log", dir="/tmp")
        os.close(fd)
        self.stderr = Path(path)
        self.started: list[subprocess.Popen[Any]] = []

    # the daemon

    def start(self, timeout: float = BOOT_S) -> System:
        """Boot; returns when the system is ready."""
        if self not in SYSTEMS:
            SYSTEMS.append(self)
        began = len(self.log())
        with open(self.stderr, "ab") as log:
            self.daemon = subprocess.Popen(
                [*self.program, *self.options],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self.cwd,
            )
        eventually(lambda: "aiosd: ready" in self.log()[began:] or self.daemon.poll() is not None, timeout)
        if "aiosd: ready" not in self.log()[began:]:
            code = self.daemon.poll()
            self.destroy()
            pytest.fail(f"aiosd did not come up in {timeout:.0f} s (exit code {code}):\n{self.log()}")
        return self

    @property
    def alive(self) -> bool:
        return self.daemon is not None and self.daemon.poll() is None

    def log(self) -> str:
        """What aiosd has written to its stderr."""
        with contextlib.suppress(FileNotFoundError):
            return self.stderr.read_text(errors="replace")
        return ""

    def processes(self) -> list[psutil.Process]:
        """All processes of this system: aiosd's own, and those started in it."""
        home = f"AIOS_HOME={self.home}".encode()
        found = []
        for pid in psutil.pids():
            with contextlib.suppress(OSError, psutil.Error):
                if pid != os.getpid() and home in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    found.append(psutil.Process(pid))
        return found

    def stop(self, timeout: float = STOP_S) -> int:
        """Stop it as a user does; returns aiosd's exit code."""
        assert self.daemon is not None
        self.daemon.terminate()
        return self.daemon.wait(timeout)

    def destroy(self) -> list[str]:
        """End it by force if needed; returns what it has left behind."""
        left = []
        tree = set(self.processes())
        if self.alive:
            tree |= set(psutil.Process(self.daemon.pid).children(recursive=True))
            try:
                self.stop()
            except subprocess.TimeoutExpired:
                left.append(f"aiosd, {STOP_S:.0f} s after SIGTERM")
        self._end_clients()
        for process in emptied(lambda: _running(tree | set(self.processes()))):
            left.append(in_words(process))
            with contextlib.suppress(psutil.Error):
                process.kill()
        if self.daemon is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.daemon.wait(PATIENCE_S)
        return left

    def _end_clients(self) -> None:
        for client in self.started:
            if client.poll() is None:
                client.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                client.wait(PATIENCE_S)
            for pipe in (client.stdin, client.stdout, client.stderr):
                if pipe is not None:
                    with contextlib.suppress(OSError):  # output that was not yet written
                        pipe.close()
        self.started.clear()

    def remove(self) -> None:
        """Remove the home and the log."""
        if self in SYSTEMS:
            SYSTEMS.remove(self)
        self.stderr.unlink(missing_ok=True)
        if self.own_home:
            shutil.rmtree(self.home, ignore_errors=True)

    # commands

    def run(
        self, *argv: str | Path, input: str | None = None, timeout: float = 60, check: bool = False, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of `bin/` (or any other) in this system's environment; stdin is empty unless given."""
        if input is None:
            options.setdefault("stdin", subprocess.DEVNULL)
        else:
            options["input"] = input
        options.setdefault("stdout", subprocess.PIPE)
        options.setdefault("stderr", subprocess.PIPE)
        command = [os.fspath(part) for part in argv]
        env = self.env | options.pop("env", {})
        done = subprocess.run(command, env=env, timeout=timeout, encoding="utf-8", errors="replace", **options)
        if check:
            assert done.returncode == 0, f"{command} exited {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def popen(self, *argv: str | Path, **options: Any) -> subprocess.Popen[str]:
        """Start a command; it is ended at the end of the test if it still runs."""
        for stream in ("stdin", "stdout", "stderr"):
            options.setdefault(stream, subprocess.PIPE)
        env = self.env | options.pop("env", {})
        client = subprocess.Popen([os.fspath(part) for part in argv], env=env, encoding="utf-8", **options)
        self.started.append(client)
        return client

    def status(self) -> dict[str, Any]:
        return json.loads(self.run("aiosd", "status", "--json", check=True).stdout)

    def ps(self, *options: str) -> list[dict[str, Any]]:
        return json.loads(self.run("aios-ps", "--json", *(options or ["-e"]), check=True).stdout)

    def agents(self) -> list[dict[str, Any]]:
        """Live agents."""
        return [entry for entry in self.ps() if not entry["system"] and entry["exit"] is None]

    def unrest(self) -> list[str]:
        """What is left of a test: agents, calls, used slots. Empty if nothing is."""
        # Over the control socket, because two commands after each of a thousand tests would take minutes.
        with Client(Home(self.home)) as client:
            agents = client.call(wire.Sys.PS, wire.Ps(all=True), list[wire.ProcInfo], timeout=30)
            status = client.call(wire.Sys.STATUS, wire.Status(check=True), dict[str, Any], timeout=30)
        busy = [f"agent {one.pid} ({one.name}, {one.stat})" for one in agents if not one.system and one.exit is None]
        busy += status["check"]
        for model in status["models"]:
            slots = model["stats"]["slots"]
            if slots["free"] != slots["total"] or model["open_calls"]:
                busy.append(f"model {model['name']}: slots {slots}, {model['open_calls']} open calls")
        return busy

    def calm_down(self) -> list[str]:
        """Wait until the system is idle; kills and returns what is left when the time is up."""
        self._end_clients()
        left: list[str] = emptied(self.unrest)
        if left:
            for agent in self.agents():
                self.run("aios-kill", "-KILL", str(agent["pid"]))
        return left


def _running(processes: set[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if process.is_running()]


@pytest.fixture(scope="session")
def aiosd() -> Iterator[System]:
    system = System("--threads", "1").start()
    yield system
    left = system.destroy()
    code = system.daemon.returncode
    log = system.log()
    system.remove()
    assert (code, left) == (0, []), f"aiosd exited {code} and left {left}\n{log}"


@pytest.fixture(autouse=True)
def calm_aiosd(request: pytest.FixtureRequest, nothing_left_behind: None) -> Iterator[None]:
    """For each test that uses `aiosd`: the system runs before it, and is idle again after it."""
    if "aiosd" not in request.fixturenames:
        yield
        return
    system: System = request.getfixturevalue("aiosd")
    if not system.alive:
        system.start()
    yield
    assert system.alive, "the test ended the common aiosd"
    left = system.calm_down()
    assert left == [], f"still there after the test: {left}"


@pytest.fixture
def fresh_aiosd() -> Iterator[Callable[..., System]]:
    """`fresh_aiosd("--slots", "2", home=…, env=…, start=True)` makes a system for this test alone."""
    made: list[System] = []

    def make(*options: str, start: bool = True, **where: Any) -> System:
        system = System(*options, **where)
        made.append(system)
        return system.start() if start else system

    yield make
    left = [line for system in made for line in system.destroy()]
    for system in made:
        system.remove()
    assert left == [], f"left behind by aiosd: {left}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if report.failed:
        for system in SYSTEMS:
            report.sections.append((f"log of aiosd in {system.home}", "\n".join(system.log().splitlines()[-60:])))
    return report
