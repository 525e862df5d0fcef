"""aiosd from outside: its start, its reports when it cannot start, its end, and that it leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import aiosd as aiosd_package
from tests.conftest import SMALL, System, eventually

NANO = Path(aiosd_package.__file__).parent / "nano" / "nano.gguf"

Fresh = Callable[..., System]


def one_line(text: str) -> str:
    """The only line that a failed command prints: no traceback, no log."""
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    return lines[0]


def ready_lines(log: str) -> list[str]:
    return [line for line in log.splitlines() if line.startswith("aiosd: ready")]


# ── up ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_says_ready_once_and_serves(fresh_aiosd: Fresh) -> None:
    """With all defaults."""
    system = fresh_aiosd(env=dict.fromkeys(SMALL, ""))
    assert len(ready_lines(system.log())) == 1
    status = system.status()
    assert status["state"] == "ready"
    (model,) = status["models"]
    assert model["info"]["n_slots"] != int(SMALL["AIOSD_SLOTS"])
    assert "asked for" not in model["stats"]["threads_why"]


def test_services_load_while_the_supervisor_prepares_for_agents(fresh_aiosd: Fresh) -> None:
    """The kernel is forked when all is prepared; a model that was loaded only then would delay the start."""
    system = fresh_aiosd()
    began = {entry["name"]: psutil.Process(entry["ospid"]).create_time() for entry in system.ps() if entry["system"]}
    assert max(began[name] for name in ("llm", "store", "toolbox")) < began["kernel"] <= began["gateway"]


def test_the_store_imports_no_numpy_before_it_needs_it(fresh_aiosd: Fresh) -> None:
    """numpy is half of its start and of its memory."""
    system = fresh_aiosd()
    maps = {name: Path(f"/proc/{ospid_of(system, name)}/maps").read_text() for name in ("llm", "store")}
    assert "numpy" in maps["llm"]
    assert "numpy" not in maps["store"]


def test_status_shows_what_runs(aiosd: System) -> None:
    status = aiosd.status()
    assert status["home"] == str(aiosd.home)
    assert status["pid"] == aiosd.daemon.pid
    assert status["max_agents"] > 100
    (model,) = status["models"]
    assert model["default"] is True
    assert model["info"]["gpu_layers"] == 0
    assert model["info"]["n_ctx"] >= 2048
    assert model["stats"]["kv_layout"] == "streams (all layers run on the CPU)"
    assert re.match(r"(looks up to \d+ tokens?|does not look) ahead: a step of ", model["stats"]["lookahead"]["why"])
    assert "guessed" in aiosd.run("aiosd", "status", "-v", check=True).stdout
    text = aiosd.run("aiosd", "status", check=True).stdout
    assert model["name"] in text
    assert str(aiosd.home) in text


def test_processes_are_named_as_promised(aiosd: System) -> None:
    names = {entry["name"] for entry in aiosd.ps() if entry["system"]}
    assert {"supervisor", "kernel", "llm"} <= names


def test_flags_override_environment_and_file(fresh_aiosd: Fresh, tmp_path: Path) -> None:
    system = fresh_aiosd("--slots", "3", "--ctx", "2048")
    (model,) = system.status()["models"]
    assert model["info"]["n_slots"] == 3
    assert model["info"]["n_ctx"] == 2048


def test_context_below_the_least_is_refused_with_the_reason(fresh_aiosd: Fresh) -> None:
    system = fresh_aiosd(start=False)
    done = system.run("aiosd", "--ctx", "0")
    assert done.returncode in (1, 2)
    assert "ctx" in done.stderr


def test_two_systems_live_side_by_side(aiosd: System, fresh_aiosd: Fresh) -> None:
    other = fresh_aiosd()
    assert other.status()["boot"] != aiosd.status()["boot"]


def test_a_home_too_long_for_a_socket_path_works(fresh_aiosd: Fresh, tmp_path: Path) -> None:
    home = tmp_path / ("long" * 30) / ("longer" * 20)
    home.mkdir(parents=True)
    system = fresh_aiosd(home=home)
    assert system.status()["home"] == str(home)
    assert system.run("aios-run", "--", "true").returncode == 0


def test_starts_without_standard_streams(fresh_aiosd: Fresh) -> None:
    """Some service managers start programs with descriptors 0, 1 and 2 closed."""
    system = fresh_aiosd(start=False)
    daemon = system.popen("sh", "-c", "exec aiosd <&- >&- 2>&-")
    assert eventually(lambda: system.run("aiosd", "status").returncode == 0, timeout=30, every=0.2)
    assert system.run("aios-run", "--", "echo", "hello").stdout == "hello\n"
    assert system.run("aiosd", "stop").returncode == 0
    assert daemon.wait(30) == 0


def test_reports_its_state_to_systemd(fresh_aiosd: Fresh, tmp_path: Path) -> None:
    address = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(os.fspath(address))
        listener.settimeout(30)
        system = fresh_aiosd(env={"NOTIFY_SOCKET": str(address)})
        assert b"READY=1" in listener.recv(4096)
        system.stop()
        assert b"STOPPING=1" in listener.recv(4096)


def test_hangup_rereads_settings_and_nothing_else(aiosd: System) -> None:
    boot = aiosd.status()["boot"]
    aiosd.daemon.send_signal(signal.SIGHUP)
    assert eventually(lambda: "settings read again" in aiosd.log())
    assert aiosd.status()["boot"] == boot


# ── in the background ─────────────────────────────────────────────────────────────────────────────────────


def test_background_returns_when_it_serves(fresh_aiosd: Fresh) -> None:
    system = fresh_aiosd(start=False)
    started = system.run("aiosd", "-d")
    assert started.returncode == 0, started.stderr
    assert system.status()["state"] == "ready"
    stopped = system.run("aiosd", "stop")
    assert (stopped.returncode, stopped.stderr) == (0, "")
    assert eventually(lambda: not system.processes())


def test_background_reports_why_the_start_failed(fresh_aiosd: Fresh, tmp_path: Path) -> None:
    system = fresh_aiosd(start=False)
    done = system.run("aiosd", "-d", "--model", tmp_path / "nowhere.gguf")
    assert done.returncode == 1
    assert "nowhere.gguf" in one_line(done.stderr)


BROKEN_TOOLS = {
    "syntax.py": ("def a() -> None: pass\n\ndef b(:\n", ": line 3: SyntaxError: invalid syntax"),
    "raises.py": ("import json\njson.loads('{')\n", ": line 2: JSONDecodeError: Expecting property name"),
    "taken.py": ("from libaios.tool import define\n@define\ndef calc(x: int) -> int: return x\n", ": calc: there is a"),
}


@pytest.mark.parametrize("how", ["-d", "foreground"])
def test_broken_files_of_tools_are_told_at_the_start(fresh_aiosd: Fresh, tmp_path: Path, how: str) -> None:
    files = [tmp_path / name for name in BROKEN_TOOLS]
    for file in files:
        file.write_text(BROKEN_TOOLS[file.name][0])
    options = ("--tools", ":".join(map(str, files)))
    system = fresh_aiosd(*options, start=how == "foreground")
    try:
        told = system.log() if how == "foreground" else system.run("aiosd", "-d", *options).stderr
        assert system.status()["state"] == "ready"  # with its other tools
    finally:
        assert system.run("aiosd", "stop").returncode == 0
    for file in files:
        [line] = [line for line in told.splitlines() if str(file) in line]  # once
        assert line.startswith(f"aiosd: tools: {file}{BROKEN_TOOLS[file.name][1]}")


def test_background_second_one_is_refused(aiosd: System) -> None:
    done = aiosd.run("aiosd", "-d")
    assert done.returncode == 1
    assert "already running" in one_line(done.stderr)


# ── refusals ──────────────────────────────────────────────────────────────────────────────────────────────


def test_second_aiosd_on_the_same_home(aiosd: System) -> None:
    done = aiosd.run("aiosd")
    assert done.returncode == 1
    assert re.search(rf"already running.*{aiosd.daemon.pid}", one_line(done.stderr))
    assert aiosd.status()["state"] == "ready"


def test_a_second_home_does_not_take_the_socket_of_the_first(fresh_aiosd: Fresh, tmp_path: Path) -> None:
    """Homes by the XDG rules: their data lie apart, but the folder of the socket is that of the user."""
    (tmp_path / "run").mkdir(mode=0o700)
    env = {"AIOS_HOME": "", "XDG_RUNTIME_DIR": str(tmp_path / "run")}
    first, second = ({**env, "XDG_STATE_HOME": str(tmp_path / name)} for name in ("first", "second"))
    system = fresh_aiosd(start=False)
    system.run("aiosd", "-d", env=first, check=True)
    try:
        done = system.run("aiosd", "-d", env=second)
        assert (done.returncode, "another aiosd has the socket" in one_line(done.stderr)) == (1, True)
        assert "/first/aios" in system.run("aiosd", "status", env=first, check=True).stdout
    finally:
        system.run("aiosd", "stop", env=first, check=True)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["aiosd", "status"], 1),
        (["aiosd", "stop"], 1),
        (["aios-ps"], 1),
        (["aios-kill", "1"], 1),
        (["aios-logs", "1"], 1),
        (["aios-wait", "1"], 125),
        (["aios-inspect", "1"], 1),
        (["aios-renice", "5", "1"], 1),
        (["aios-run", "--", "true"], 125),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_without_a_kernel_each_command_reports_that(fresh_aiosd: Fresh, command: list[str], code: int) -> None:
    done = fresh_aiosd(start=False).run(*command)
    assert (done.returncode, done.stdout) == (code, "")
    assert one_line(done.stderr).startswith(command[0])


def damaged(kind: str, path: Path) -> Path:
    data = NANO.read_bytes()
    match kind:
        case "missing":
            pass
        case "empty":
            path.touch()
        case "folder":
            path.mkdir()
        case "text":
            path.write_text("this is no model\n" * 1000)
        case "header only":
            path.write_bytes(data[:100])
        case "cut in the metadata":
            path.write_bytes(data[:5000])
        case "cut in the weights":
            path.write_bytes(data[: len(data) * 2 // 3])
        case "huge counts":
            path.write_bytes(data[:8] + b"\xff" * 16 + data[24:])
        case "unknown architecture":
            path.write_bytes(data.replace(b"llama", b"lxama"))
    return path


@pytest.mark.parametrize(
    "kind",
    [
        "missing",
        "empty",
        "folder",
        "text",
        "header only",
        "cut in the metadata",
        "cut in the weights",
        "huge counts",
        "unknown architecture",
    ],
)
def test_bad_model_is_one_line_and_exit_1(fresh_aiosd: Fresh, tmp_path: Path, kind: str) -> None:
    model = damaged(kind, tmp_path / "bad.gguf")
    system = fresh_aiosd(start=False)
    done = system.run("aiosd", "--model", model)
    assert done.returncode == 1, done.stderr
    assert "bad.gguf" in one_line(done.stderr)
    assert system.processes() == []


def test_model_too_large_for_memory_is_one_line_and_exit_1(fresh_aiosd: Fresh) -> None:
    done = fresh_aiosd(start=False).run("aiosd", "--ctx", "100000000")
    assert done.returncode == 1
    assert one_line(done.stderr).startswith("aiosd: ")


def test_home_that_is_a_file(fresh_aiosd: Fresh, tmp_path: Path) -> None:
    home = tmp_path / "file"
    home.touch()
    done = fresh_aiosd(start=False, home=home).run("aiosd")
    assert done.returncode == 1
    assert str(home) in one_line(done.stderr)


def test_unknown_option_is_a_usage_error(fresh_aiosd: Fresh) -> None:
    done = fresh_aiosd(start=False).run("aiosd", "--no-such-thing")
    assert done.returncode == 2
    assert "--no-such-thing" in done.stderr


# ── down ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_it_with_exit_0(fresh_aiosd: Fresh, number: signal.Signals) -> None:
    system = fresh_aiosd()
    system.daemon.send_signal(number)
    assert system.daemon.wait(30) == 0
    assert eventually(lambda: not system.processes())
    assert "Traceback" not in system.log()


def test_stop_waits_for_the_end(fresh_aiosd: Fresh) -> None:
    system = fresh_aiosd()
    assert system.run("aiosd", "stop").returncode == 0
    assert system.daemon.wait(30) == 0
    assert system.run("aiosd", "status").returncode == 1


def test_agents_get_term_then_kill(fresh_aiosd: Fresh) -> None:
    system = fresh_aiosd(env={"AIOSD_STOP_TIMEOUT": "4"})
    polite = system.popen(
        "aios-run", "--", "sh", "-c", "trap 'echo bye; exit 3' TERM; echo up; while :; do sleep 0.1; done"
    )
    stubborn = system.popen("aios-run", "--", "sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.1; done")
    assert (polite.stdout.readline(), stubborn.stdout.readline()) == ("up\n", "up\n")
    began = time.monotonic()
    system.daemon.terminate()
    assert polite.stdout.readline() == "bye\n"
    assert system.daemon.wait(30) == 0
    assert time.monotonic() - began >= 4
    assert polite.wait(30) in (3, 125)
    assert stubborn.wait(30) in (125, 137)
    assert polite.stderr.read().endswith(": aiosd was stopped\n")


@pytest.mark.parametrize("who", ["guardian", "supervisor"])
def test_nothing_outlives_either_of_the_two(fresh_aiosd: Fresh, who: str) -> None:
    """Not even agents that ignore TERM and fork twice."""
    system = fresh_aiosd()
    agent = system.popen("aios-run", "--", "sh", "-c", "trap '' TERM HUP; (setsid sleep 300 &) ; echo up; sleep 300")
    assert agent.stdout.readline() == "up\n"
    victim = {"guardian": system.daemon.pid, "supervisor": ospid_of(system, "supervisor")}[who]
    os.kill(victim, signal.SIGKILL)
    assert eventually(lambda: set(system.processes()) <= {psutil.Process(agent.pid)})
    assert agent.wait(30) == 125
    system.daemon.wait(30)
    assert system.start().status()["state"] == "ready"


def ospid_of(system: System, name: str) -> int:
    return next(entry["ospid"] for entry in system.ps() if entry["system"] and entry["name"] == name)


def test_starts_in_a_home_whose_owner_was_killed(fresh_aiosd: Fresh) -> None:
    system = fresh_aiosd()
    pid = int(system.run("aios-run", "-d", "--", "sleep", "300", check=True).stdout)
    for process in system.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    system.daemon.wait(30)
    assert eventually(lambda: not system.processes())
    system.start()
    assert int(system.run("aios-run", "-d", "--", "true", check=True).stdout) > pid  # pids are never used twice


def test_a_home_with_rubbish_where_the_socket_should_be(fresh_aiosd: Fresh) -> None:
    system = fresh_aiosd()
    system.stop()
    for name in ("last-pid", "boot"):
        for file in system.home.rglob(name):
            file.write_bytes(b"\xff\x00rubbish")
    assert system.start().status()["state"] == "ready"


@pytest.mark.alone
def test_idle_system_costs_next_to_nothing(aiosd: System) -> None:
    """Work of earlier tests may still be going on, so the idle time is awaited."""

    def spent() -> tuple[float, int]:
        """CPU seconds, and how often a thread has gone to sleep."""
        processes = [psutil.Process(aiosd.daemon.pid), *psutil.Process(aiosd.daemon.pid).children(recursive=True)]
        cpu_s, woken = 0.0, 0
        for process in processes:
            with contextlib.suppress(psutil.Error, OSError):  # a spare or a worker may end
                cpu_s += sum(process.cpu_times()[:2])
                woken += sleeps(process)
        return cpu_s, woken

    def sleeps(process: psutil.Process) -> int:
        states = Path(f"/proc/{process.pid}/task").glob("*/status")
        return sum(int(state.read_text().split("\nvoluntary_ctxt_switches:")[1].split()[0]) for state in states)

    windows = []

    def idle() -> bool:
        cpu_s, woken = spent()
        time.sleep(2)  # the measured time
        after_s, after_woken = spent()
        windows.append((after_s - cpu_s, after_woken - woken))
        return windows[-1][0] < 0.1 and windows[-1][1] < 60

    assert eventually(idle), f"CPU in seconds and wake-ups of every two seconds: {windows}"


def test_control_socket_is_private(aiosd: System) -> None:
    sockets = [path for path in aiosd.home.rglob("*") if path.is_socket()]
    assert sockets
    for path in (aiosd.home, *sockets):
        assert path.stat().st_mode & 0o077 == 0


# ── help ──────────────────────────────────────────────────────────────────────────────────────────────────

COMMANDS = ["aiosd", "aios-run", "aios-ps", "aios-kill", "aios-logs", "aios-wait", "aios-renice", "aios-inspect"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples(fresh_aiosd: Fresh, command: str) -> None:
    done = fresh_aiosd(start=False).run(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count(command) >= 2  # the usage line, and an example


def test_status_as_json_is_one_object(aiosd: System) -> None:
    assert isinstance(json.loads(aiosd.run("aiosd", "status", "--json", check=True).stdout), dict)


def test_output_into_a_closed_pipe_is_quiet(aiosd: System) -> None:
    done = aiosd.run("sh", "-c", "aiosd status | true; aios-ps -e | true")
    assert done.stderr == ""


def test_run_from_a_folder_that_is_gone(aiosd: System, tmp_path: Path) -> None:
    done = aiosd.run("sh", "-c", f"mkdir {tmp_path}/gone; cd {tmp_path}/gone; rmdir {tmp_path}/gone; aios-ps -e")
    assert (done.returncode, done.stderr) == (0, "")


def test_demo(fresh_aiosd: Fresh) -> None:
    """`make demo`, without the set-up."""
    script = Path(aiosd_package.__file__).parent.parent / "demo" / "demo.py"
    done = fresh_aiosd(start=False).run("python", script, stderr=subprocess.STDOUT, timeout=100)
    assert done.returncode == 0, done.stdout
    assert "3367" in done.stdout
    assert "Nothing is left" in done.stdout
