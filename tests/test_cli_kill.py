"""aios-kill and aios-renice: what their arguments mean, and what they do."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiosd.commands import signals
from aiosd.commands.kill import untangle
from tests.conftest import System, eventually

# ── signals by name ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("word", "number"),
    [
        ("TERM", 15),
        ("SIGTERM", 15),
        ("term", 15),
        ("15", 15),
        ("0", 0),
        ("RTMIN", 34),
        ("RTMIN+3", 37),
        ("RTMAX-1", 63),
        ("SIGCLD", 17),
    ],
)
def test_number_of(word: str, number: int) -> None:
    assert signals.number_of(word) == number


@pytest.mark.parametrize("word", ["", "FOO", "65", "-1", "RTMIN+31", "RTMIN+", "RTMAX-99", "SIG", "1.5", "²"])
def test_no_such_signal(word: str) -> None:
    with pytest.raises(ValueError, match="no such signal"):
        signals.number_of(word)


@given(st.integers(1, 31) | st.integers(34, 64))
def test_names_and_numbers_are_inverse(number: int) -> None:
    assert signals.number_of(signals.name_of(number)) == number


# ── arguments, as kill(1) reads them ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("args", "options", "operands"),
    [
        ("7", [], ["7"]),
        ("-9 7", ["--signal", "9"], ["7"]),
        ("-KILL 7", ["--signal", "KILL"], ["7"]),
        ("-SIGKILL 7", ["--signal", "SIGKILL"], ["7"]),
        ("-stop 7", ["--signal", "stop"], ["7"]),
        ("-s STOP 7", ["-s", "STOP"], ["7"]),
        ("-sSTOP 7", ["-sSTOP"], ["7"]),
        ("--signal=STOP 7", ["--signal=STOP"], ["7"]),
        ("-STOP -7", ["--signal", "STOP"], ["-7"]),
        ("-9 -7 -8", ["--signal", "9"], ["-7", "-8"]),
        ("-s 9 -7", ["-s", "9"], ["-7"]),
        ("-- -7", [], ["-7"]),
        ("-9 -- -7 name", ["--signal", "9"], ["-7", "name"]),
        ("7 -9", ["--signal", "9"], ["7"]),
        ("-0 7", ["--signal", "0"], ["7"]),
        ("--timeout 3 7", ["--timeout", "3"], ["7"]),
        ("--timeout=3 -INT 7", ["--timeout=3", "--signal", "INT"], ["7"]),
        ("-INT --timeout 3 -7", ["--signal", "INT", "--timeout", "3"], ["-7"]),
        ("-l", ["-l"], []),
        ("-l 9", ["-l"], ["9"]),
        ("--help", ["--help"], []),
        ("-s", ["-s"], []),
        ("-RTMIN+1 7", ["--signal", "RTMIN+1"], ["7"]),
    ],
)
def test_untangle(args: str, options: list[str], operands: list[str]) -> None:
    assert untangle(args.split()) == [*options, "--", *operands]


@given(
    st.lists(st.sampled_from(["-9", "-KILL", "7", "-7", "--", "-s", "TERM", "--timeout", "1", "-l", "-x", "--x", "-"]))
)
def test_untangle_loses_nothing(args: list[str]) -> None:
    done = untangle(args)
    assert done.count("--") >= 1
    told = [word.removeprefix("-") for word in done if word not in ("--", "--signal")]
    given_words = [word.removeprefix("-") for word in args if word != "--"]
    assert sorted(told) == sorted(given_words) or args.count("--") > 1


# ── real ──────────────────────────────────────────────────────────────────────────────────────────────────


def sleeper(aiosd: System, name: str = "sleeper") -> str:
    return aiosd.run("aios-run", "-d", "--name", name, "--", "sleep", "300", check=True).stdout.strip()


def test_default_is_term(aiosd: System) -> None:
    pid = sleeper(aiosd)
    done = aiosd.run("aios-kill", pid)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert aiosd.run("aios-wait", pid).returncode == 143


@pytest.mark.parametrize("how", [["-9"], ["-KILL"], ["-s", "KILL"], ["-SIGKILL"], ["--signal", "kill"]], ids=" ".join)
def test_ways_to_name_a_signal(aiosd: System, how: list[str]) -> None:
    pid = sleeper(aiosd)
    aiosd.run("aios-kill", *how, pid, check=True)
    assert aiosd.run("aios-wait", pid).returncode == 137


def test_stop_returns_when_it_has_stopped(aiosd: System) -> None:
    pid = sleeper(aiosd)
    aiosd.run("aios-kill", "-STOP", pid, check=True)
    assert aiosd.run("aios-ps", "-p", pid, "-o", "stat=").stdout == "T\n"
    aiosd.run("aios-kill", "-CONT", pid, check=True)
    assert aiosd.run("aios-ps", "-p", pid, "-o", "stat=").stdout == "S\n"
    aiosd.run("aios-kill", pid, check=True)


def test_a_name_stands_for_all_live_agents(aiosd: System) -> None:
    pids = [sleeper(aiosd, "crowd") for _ in range(3)]
    bystander = sleeper(aiosd, "bystander")
    aiosd.run("aios-kill", "crowd", check=True)
    assert [aiosd.run("aios-wait", pid).returncode for pid in pids] == [143] * 3
    assert aiosd.run("aios-kill", "-0", bystander).returncode == 0
    done = aiosd.run("aios-kill", "crowd")
    assert (done.returncode, done.stderr) == (1, "aios-kill: crowd: no such agent\n")
    aiosd.run("aios-kill", bystander, check=True)


def test_unknown_pids_are_reported_and_the_others_signalled(aiosd: System) -> None:
    pid = sleeper(aiosd)
    done = aiosd.run("aios-kill", "999998", pid, "999999", "nobody")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"aios-kill: {who}: no such agent" for who in ("999998", "999999", "nobody")]
    assert aiosd.run("aios-wait", pid).returncode == 143


def test_probe(aiosd: System) -> None:
    pid = sleeper(aiosd)
    assert aiosd.run("aios-kill", "-0", pid).returncode == 0
    aiosd.run("aios-kill", "-KILL", pid, check=True)
    aiosd.run("aios-wait", pid)
    done = aiosd.run("aios-kill", "-0", pid)
    assert (done.returncode, done.stderr) == (1, f"aios-kill: {pid}: no such agent\n")


def test_a_process_group(aiosd: System, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import libaios as aios\n"
        "for _ in range(2): aios.proc.spawn('sleep', '300')\n"
        "print('up', flush=True)\n"
        "aios.msg.recv()\n"
    )
    run = aiosd.popen("aios-run", "--name", "parent", script)
    assert run.stdout.readline() == "up\n"
    pid = next(str(entry["pid"]) for entry in aiosd.agents() if entry["name"] == "parent")
    aiosd.run("aios-kill", "-KILL", "--", f"-{pid}", check=True)
    assert run.wait(30) == 137
    assert eventually(lambda: aiosd.agents() == [])
    done = aiosd.run("aios-kill", "--", "-999999")
    assert done.returncode == 1
    assert "aios-kill: -999999: no such" in done.stderr


def test_timeout_kills_an_agent_that_does_not_end(aiosd: System) -> None:
    run = aiosd.popen(
        "aios-run", "--name", "stubborn", "--", "sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.1; done"
    )
    assert run.stdout.readline() == "up\n"
    aiosd.run("aios-kill", "--timeout", "0.3", "stubborn", check=True)
    assert run.wait(30) == 137
    polite = sleeper(aiosd, "polite")
    aiosd.run("aios-kill", "--timeout", "30", polite, check=True)
    assert aiosd.run("aios-wait", polite).returncode == 143


@pytest.mark.parametrize("name", ["supervisor", "kernel", "llm"])
def test_system_processes_are_refused(aiosd: System, name: str) -> None:
    pid = next(str(entry["pid"]) for entry in aiosd.ps() if entry["system"] and entry["name"] == name)
    for word in (pid, name):
        done = aiosd.run("aios-kill", "-KILL", word)
        assert done.returncode == 1
        assert done.stderr.startswith(f"aios-kill: {word}: ")
        assert done.stderr.count("\n") == 1
    assert aiosd.status()["state"] == "ready"


def test_an_agent_may_not_kill_a_stranger(aiosd: System) -> None:
    pid = sleeper(aiosd)
    done = aiosd.run("aios-run", "--", "aios-kill", pid)
    assert (done.returncode, done.stderr) == (1, f"aios-kill: {pid}: permission denied\n")
    aiosd.run("aios-kill", pid, check=True)


@pytest.mark.parametrize("command", ["aios-kill", "aios-renice 5"])
def test_an_error_names_the_argument_as_typed(aiosd: System, command: str) -> None:
    """And names the agent, where several have this name."""
    program, *options = command.split()
    first = sleeper(aiosd, "typed")
    one = aiosd.run("aios-run", "--", program, *options, "typed")
    assert (one.returncode, one.stderr) == (1, f"{program}: typed: permission denied\n")
    second = sleeper(aiosd, "typed")
    several = aiosd.run("aios-run", "--", program, *options, "typed").stderr.splitlines()
    assert several == [f"{program}: typed (pid {pid}): permission denied" for pid in (first, second)]
    group = aiosd.run("aios-kill", "--", "-999999")
    assert (group.returncode, group.stderr) == (1, "aios-kill: -999999: no such process group\n")
    aiosd.run("aios-kill", first, second, check=True)


def test_lists_signals(aiosd: System) -> None:
    lines = aiosd.run("aios-kill", "-l", check=True).stdout.splitlines()
    assert lines[0].split() == ["1", "HUP", "2", "INT", "3", "QUIT", "4", "ILL", "5", "TRAP"]
    assert len(lines) == 13
    assert max(map(len, lines)) <= 80
    assert aiosd.run("aios-kill", "-l", "9", "TERM", "137", check=True).stdout == "KILL\n15\nKILL\n"


@pytest.mark.parametrize(
    "args", [[], ["-FOO", "1"], ["-s", "FOO", "1"], ["-99", "1"], ["--timeout", "x", "1"], ["--nosuch", "1"], ["-s"]]
)
def test_wrong_use_is_exit_2_and_one_line(fresh_aiosd: Callable[..., System], args: list[str]) -> None:
    done = fresh_aiosd(start=False).run("aios-kill", *args)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("aios-kill: ")


# ── renice ────────────────────────────────────────────────────────────────────────────────────────────────


def nice_of(aiosd: System, pid: str) -> int:
    return int(aiosd.run("aios-ps", "-p", pid, "-o", "ni=", check=True).stdout)


def test_renice(aiosd: System) -> None:
    pids = [sleeper(aiosd, "crowd") for _ in range(2)]
    done = aiosd.run("aios-renice", "5", "crowd", check=True)
    assert done.stdout.splitlines() == [f"{pid}: old nice 0, new nice 5" for pid in pids]
    assert [nice_of(aiosd, pid) for pid in pids] == [5, 5]
    aiosd.run("aios-renice", "-n", "-3", pids[0], check=True)
    assert nice_of(aiosd, pids[0]) == -3
    aiosd.run("aios-renice", "-4", pids[0], check=True)
    assert nice_of(aiosd, pids[0]) == -4
    aiosd.run("aios-renice", "--relative", "10", *pids, check=True)
    assert [nice_of(aiosd, pid) for pid in pids] == [6, 15]
    aiosd.run("aios-renice", "--relative", "39", pids[0], check=True)
    assert nice_of(aiosd, pids[0]) == 19
    for value, new in ((["-40"], -20), (["-n", "40"], 19), (["-n", "-99"], -20), (["40"], 19)):
        done = aiosd.run("aios-renice", *value, pids[1], check=True)
        assert done.stdout.endswith(f", new nice {new}\n")
    aiosd.run("aios-kill", *pids, check=True)


def test_run_with_a_nice_value(aiosd: System) -> None:
    pid = aiosd.run("aios-run", "-d", "-n", "-7", "--", "sleep", "300", check=True).stdout.strip()
    assert nice_of(aiosd, pid) == -7
    aiosd.run("aios-kill", pid, check=True)


def test_renice_an_unknown_agent(aiosd: System) -> None:
    done = aiosd.run("aios-renice", "5", "999999", "nobody")
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["aios-renice: 999999: no such agent", "aios-renice: nobody: no such agent"]


@pytest.mark.parametrize(
    "args", [[], ["5"], ["x", "1"], ["-n", "x", "1"], ["-n", "5"], ["-n", "5", "--relative", "1", "1"]]
)
def test_renice_wrong_use(fresh_aiosd: Callable[..., System], args: list[str]) -> None:
    done = fresh_aiosd(start=False).run("aios-renice", *args)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_signals_of_linux_are_all_listed() -> None:
    listed = {int(number) for line in signals.listing() for number in line.split()[::2]}
    assert {int(number) for number in signal.valid_signals()} <= listed
