"""aios-logs, aios-wait, aios-inspect: the logs, the ends and the records of agents."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from aiosd.commands.logs import parse_moment
from tests.conftest import System, eventually

Fresh = Callable[..., System]

# ── pure ──────────────────────────────────────────────────────────────────────────────────────────────────


NOW = 1_800_000_000.0


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("@1700000000", 1700000000.0),
        ("1700000000.5", 1700000000.5),
        ("0", 0.0),
        ("10m", NOW - 600),
        ("2h30m", NOW - 9000),
        ("1.5d", NOW - 129600),
        ("2026-11-23T14:05:00Z", 1795442700.0),
        ("2026-11-23T16:05:00.25+02:00", 1795442700.25),
        ("2026-11-23t14:05:00z", 1795442700.0),
        ("14:05:00", datetime.fromtimestamp(NOW).replace(hour=14, minute=5, second=0).timestamp()),
    ],
)
def test_times_as_people_write_them(text: str, moment: float) -> None:
    assert parse_moment(text, NOW) == moment


@pytest.mark.parametrize(
    "text", ["", "yesterday", "-5", "@", "1e9", "inf", "nan", "10x", "2026-13-01", "25:00", "1:2", "@99999999999999"]
)
def test_invalid_times(text: str) -> None:
    with pytest.raises(ValueError, match="is neither a date"):
        parse_moment(text, NOW)


# ── logs ──────────────────────────────────────────────────────────────────────────────────────────────────


def start(aiosd: System, script: str, name: str = "writer") -> str:
    return aiosd.run("aios-run", "-d", "--name", name, "--", "sh", "-c", script, check=True).stdout.strip()


def test_logs_of_live_and_dead(aiosd: System) -> None:
    pid = start(aiosd, "echo out; echo err >&2; sleep 300")
    assert eventually(lambda: aiosd.run("aios-logs", pid).stdout == "out\nerr\n")
    assert aiosd.run("aios-logs", "writer", check=True).stdout == "out\nerr\n"
    aiosd.run("aios-kill", "-KILL", pid, check=True)
    aiosd.run("aios-wait", pid)
    assert aiosd.run("aios-logs", pid, check=True).stdout == "out\nerr\n"
    assert aiosd.run("aios-logs", "-f", pid, check=True).stdout == "out\nerr\n"


def test_a_name_stands_for_the_newest(aiosd: System) -> None:
    old, new = start(aiosd, "echo old; sleep 300"), start(aiosd, "echo new; sleep 300")
    assert eventually(lambda: aiosd.run("aios-logs", "writer").stdout == "new\n")
    aiosd.run("aios-kill", old, new, check=True)


def test_bytes_are_passed_as_they_are(aiosd: System) -> None:
    pid = aiosd.run("aios-run", "-d", "--", "printf", r"\377\000\033[1m no newline", check=True).stdout.strip()
    aiosd.run("aios-wait", pid, check=True)
    aiosd.run("sh", "-c", f"aios-logs {pid} > {aiosd.home}/copy", check=True)
    assert (aiosd.home / "copy").read_bytes() == b"\xff\x00\x1b[1m no newline"


def test_follow_prints_all_and_ends_with_the_agent(aiosd: System) -> None:
    pid = start(aiosd, "for i in 1 2 3 4 5 6; do echo line $i; sleep 0.1; done; printf 'last words'")
    done = aiosd.run("aios-logs", "-f", pid, check=True)
    assert done.stdout == "".join(f"line {i}\n" for i in range(1, 7)) + "last words"


def test_tail_and_follow(aiosd: System) -> None:
    pid = start(aiosd, "echo 1; echo 2; echo 3; while [ ! -e $AIOS_HOME/go4 ]; do sleep 0.05; done; echo 4")
    assert eventually(lambda: aiosd.run("aios-logs", "--tail", "2", pid).stdout == "2\n3\n")
    assert aiosd.run("aios-logs", "--tail", "0", pid).stdout == ""
    follower = aiosd.popen("aios-logs", "-f", "--tail", "1", pid)
    assert follower.stdout.readline() == "3\n"
    (aiosd.home / "go4").touch()
    assert follower.stdout.readline() == "4\n"
    assert follower.wait(30) == 0


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_follow_ends_with_the_system(fresh_aiosd: Fresh, end: str) -> None:
    system = fresh_aiosd(env={"AIOSD_STOP_TIMEOUT": "60"})
    pid = start(system, "trap 'sleep 1; echo last words; exit' TERM; echo up; while :; do sleep 0.05; done")
    follower = system.popen("aios-logs", "-f", pid)
    assert follower.stdout.readline() == "up\n"
    if end == "stop":
        system.run("aiosd", "stop", check=True)
        assert follower.stdout.read().endswith("last words\n")
    else:
        system.daemon.kill()
    assert follower.wait(30) == 0
    assert follower.stderr.read() in ["aios-logs: aiosd has ended, and the agent with it\n", *([""] * (end == "stop"))]


def test_since(aiosd: System) -> None:
    pid = start(aiosd, "echo early; while [ ! -e $AIOS_HOME/go ]; do sleep 0.05; done; echo late; sleep 300")
    log = Path(json.loads(aiosd.run("aios-inspect", pid, check=True).stdout)[0]["log"])
    index = log.with_suffix(".idx")
    assert eventually(lambda: index.exists() and index.stat().st_size == 16)
    (noticed, size) = struct.unpack("<dQ", index.read_bytes())
    assert size == len("early\n")
    (aiosd.home / "go").touch()
    assert eventually(lambda: index.stat().st_size == 32)
    moment = datetime.fromtimestamp(noticed + 0.001, UTC).isoformat()
    assert aiosd.run("aios-logs", "--since", moment, pid, check=True).stdout == "late\n"
    assert aiosd.run("aios-logs", "--since", "1h", pid, check=True).stdout == "early\nlate\n"
    assert aiosd.run("aios-logs", "--since", "2999-01-01T00:00:00Z", pid, check=True).stdout == ""
    aiosd.run("aios-kill", pid, check=True)


def test_an_attached_agent_has_no_log_and_the_command_reports_that(aiosd: System) -> None:
    run = aiosd.popen("aios-run", "--name", "here", "--", "sh", "-c", "echo up; read x")
    assert run.stdout.readline() == "up\n"
    done = aiosd.run("aios-logs", "here")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("aios-logs: here: no log")
    run.stdin.close()
    run.wait(30)


def test_logs_of_no_agent(aiosd: System) -> None:
    for word in ("999999", "nobody"):
        done = aiosd.run("aios-logs", word)
        assert (done.returncode, done.stderr) == (1, f"aios-logs: {word}: no such agent\n")


@pytest.mark.parametrize("command", ["aios-logs", "aios-inspect", "aios-wait", "aios-renice 5", "aios-kill"])
def test_the_system_is_no_agent(aiosd: System, command: str) -> None:
    program, *options = command.split()
    for word in ("1", "kernel"):
        told = aiosd.run(program, *options, word).stderr
        assert told == f"{program}: {word}: is part of aiosd itself (see aiosd status, aiosd stop)\n"


def test_it_dies_by_an_interrupt(aiosd: System) -> None:
    pid = start(aiosd, "echo up; exec sleep 300")
    follower = aiosd.popen("aios-logs", "-f", pid)
    assert follower.stdout.readline() == "up\n"
    follower.send_signal(signal.SIGINT)
    assert follower.wait(30) == -signal.SIGINT
    assert follower.stderr.read() == ""
    aiosd.run("aios-kill", pid, check=True)


@pytest.mark.parametrize("args", [[], ["--tail", "-1", "1"], ["--since", "yesterday", "1"], ["--until", "x", "1"]])
def test_wrong_use_is_exit_2_and_one_line(fresh_aiosd: Fresh, args: list[str]) -> None:
    done = fresh_aiosd(start=False).run("aios-logs", *args)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


# ── more than one file, agent, boot ───────────────────────────────────────────────────────────────────────


def log_of(system: System, pid: str) -> Path:
    return Path(json.loads(system.run("aios-inspect", pid, check=True).stdout)[0]["log"])


def test_a_log_has_a_limit_and_is_read_across_its_files(fresh_aiosd: Fresh) -> None:
    system = fresh_aiosd("--log-size", "64K", "--log-keep", "2")
    # 24 bytes a line; more than the limit at a time, and each round is cut before the next
    uncut = "[ $(stat -L -c %s /proc/$$/fd/1) -gt 69632 ]"
    rounds = "seq -f '%023.0f' $((i*4000)) $((i*4000+3999)); i=$((i+1))"
    script = f"i=0; while [ $i -lt 4 ]; do {rounds}; while {uncut}; do sleep 0.05; done; done"
    pid = start(system, script)
    follower = system.popen("aios-logs", "-f", pid, stdin=subprocess.DEVNULL)
    wanted = "".join(f"{n:023}\n" for n in range(16000))
    assert follower.communicate(timeout=60)[0] == wanted
    assert eventually(lambda: log_of(system, pid).stat().st_size <= 68 << 10)
    files = sorted(path.name for path in (system.home / "data" / "logs").glob("*.*"))
    assert files == [f"{pid}.idx", f"{pid}.idx.1", f"{pid}.idx.2", f"{pid}.log", f"{pid}.log.1", f"{pid}.log.2"]
    kept = system.run("aios-logs", pid, check=True).stdout
    assert wanted.endswith(kept)
    assert (128 << 10) <= len(kept) <= (196 << 10)
    assert system.run("aios-logs", "--tail", "4000", pid, check=True).stdout == wanted[-4000 * 24 :]
    found = [json.loads(system.run("aios-inspect", pid).stdout)[0]["exit"]]
    assert found == [0]


def test_an_agent_that_leaves_the_history_leaves_no_log(fresh_aiosd: Fresh) -> None:
    system = fresh_aiosd("--keep-dead", "2", "--log-size", "4K")
    logs = system.home / "data" / "logs"
    for _ in range(5):
        pid = start(system, "head -c 20000 /dev/zero | tr '\\0' x; sleep 0.1")
        system.run("aios-wait", pid, check=True)
    assert eventually(lambda: len({path.name.split(".")[0] for path in logs.glob("*.*")}) == 2), sorted(logs.iterdir())


def test_logs_outlive_the_system_as_long_as_their_agents_are_in_the_history(fresh_aiosd: Fresh) -> None:
    system = fresh_aiosd("--keep-dead", "2")
    first, second = (start(system, f"echo of the first boot {n}") for n in (1, 2))
    system.run("aios-wait", first, second, check=True)
    system.stop()
    assert system.run("aios-logs", first, check=True).stdout == "of the first boot 1\n"
    system.start()
    assert system.run("aios-logs", first, check=True).stdout == "of the first boot 1\n"
    assert system.run("aios-logs", "-f", second, check=True).stdout == "of the first boot 2\n"
    system.run("aios-wait", start(system, "true"), check=True)
    assert eventually(lambda: not (system.home / "data" / "logs" / f"{first}.log").exists())
    done = system.run("aios-logs", first)
    assert (done.returncode, done.stderr) == (1, f"aios-logs: {first}: no such agent\n")
    assert system.run("aios-logs", second, check=True).stdout == "of the first boot 2\n"


def test_a_name_finds_the_newest_log_of_earlier_boots(fresh_aiosd: Fresh) -> None:
    system = fresh_aiosd()
    first, second = (start(system, f"echo {word}") for word in ("old", "new"))
    other = start(system, "echo other", name="other")
    system.run("aios-wait", first, second, other, check=True)
    system.stop()
    assert system.run("aios-logs", "writer", check=True).stdout == "new\n"
    system.start()
    assert system.run("aios-logs", "writer", check=True).stdout == "new\n"
    lines = [line.split(" | ") for line in system.run("aios-logs", "other", first, check=True).stdout.splitlines()]
    assert [(label.strip(), text) for label, text in lines] == [
        (f"other[{other}]", "other"),
        (f"writer[{first}]", "old"),
    ]
    third = start(system, "echo newest")
    system.run("aios-wait", third, check=True)
    assert system.run("aios-logs", "writer", check=True).stdout == "newest\n"
    done = system.run("aios-logs", "nobody")
    assert (done.returncode, done.stderr) == (1, "aios-logs: nobody: no such agent\n")


def test_several_agents_have_their_names_before_their_lines(aiosd: System) -> None:
    one, two = start(aiosd, "echo a; printf b; sleep 300", "one"), start(aiosd, "echo c; sleep 300", "longer")
    wide = len(f"longer[{two}]")
    first, second = f"{f'one[{one}]':{wide}} | ", f"{f'longer[{two}]':{wide}} | "
    wanted = f"{first}a\n{first}b\n{second}c\n"
    assert eventually(lambda: aiosd.run("aios-logs", "one", two).stdout == wanted)
    assert aiosd.run("aios-logs", "--no-prefix", one, two, check=True).stdout == "a\nbc\n"
    done = aiosd.run("aios-logs", "nobody", two)
    assert (done.returncode, done.stdout, done.stderr) == (1, "c\n", "aios-logs: nobody: no such agent\n")
    follower = aiosd.popen("aios-logs", "-f", one, two)
    seen = {follower.stdout.readline() for _ in range(2)}
    assert seen == {f"{first}a\n", f"{second}c\n"}
    aiosd.run("aios-kill", two, check=True)
    aiosd.run("aios-kill", one, check=True)
    assert follower.communicate(timeout=30) == (f"{first}b\n", "")


def test_follow_goes_on_after_a_truncation(aiosd: System) -> None:
    pid = start(
        aiosd, "echo a long first line; while [ ! -e $AIOS_HOME/cut ]; do sleep 0.05; done; echo new; sleep 300"
    )
    follower = aiosd.popen("aios-logs", "-f", pid)
    assert follower.stdout.readline() == "a long first line\n"
    os.truncate(log_of(aiosd, pid), 0)
    cut = time.time()
    (aiosd.home / "cut").touch()
    assert follower.stdout.readline() == "new\n"
    for since in ("1h", f"@{cut - 0.01:.3f}"):
        assert aiosd.run("aios-logs", "--since", since, pid, check=True).stdout == "new\n"
    aiosd.run("aios-kill", pid, check=True)
    assert follower.wait(30) == 0


def test_follow_ends_when_its_reader_has_gone(aiosd: System) -> None:
    pid = start(aiosd, "echo up; exec sleep 300")
    follower = aiosd.popen("aios-logs", "-f", pid)
    assert follower.stdout.readline() == "up\n"
    follower.stdout.close()
    assert follower.wait(30) == 141
    assert follower.stderr.read() == ""
    aiosd.run("aios-kill", pid, check=True)


def test_until_is_the_other_end(aiosd: System) -> None:
    pid = start(aiosd, "echo early; while [ ! -e $AIOS_HOME/go-on ]; do sleep 0.05; done; echo late; sleep 300")
    index = log_of(aiosd, pid).with_suffix(".idx")
    assert eventually(lambda: index.exists() and index.stat().st_size == 16)
    (noticed, _) = struct.unpack("<dQ", index.read_bytes())
    (aiosd.home / "go-on").touch()
    assert eventually(lambda: index.stat().st_size == 32)
    assert aiosd.run("aios-logs", "--until", f"@{noticed - 0.01:.3f}", pid, check=True).stdout == "early\n"
    assert aiosd.run("aios-logs", "-f", "--until", f"{noticed - 0.01:.3f}", pid, check=True).stdout == "early\n"
    assert aiosd.run("aios-logs", "--until", "0s", pid, check=True).stdout == "early\nlate\n"
    soon = f"{time.time() + 0.5:.3f}"
    assert aiosd.run("aios-logs", "-f", "--until", soon, pid, check=True).stdout == "early\nlate\n"
    aiosd.run("aios-kill", pid, check=True)


# ── wait ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_wait_exits_with_the_last_status(aiosd: System) -> None:
    pids = [start(aiosd, f"exit {n}", f"w{n}") for n in (3, 4)]
    assert aiosd.run("aios-wait", *pids).returncode == 4
    assert aiosd.run("aios-wait", *reversed(pids)).returncode == 3
    assert aiosd.run("aios-wait", pids[0]).returncode == 3  # the status is kept, however often it is read


def test_wait_for_a_live_one_by_name(aiosd: System) -> None:
    start(aiosd, "sleep 0.3; exit 6", "later")
    assert aiosd.run("aios-wait", "later").returncode == 6


def test_wait_for_another_agents_child_does_not_reap_it(aiosd: System, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import libaios as aios\n"
        "child = aios.proc.spawn('sh', '-c', 'exit 7')\n"
        "print(child, flush=True)\n"
        "input()\n"
        "print(aios.proc.wait(child))\n"
    )
    parent = aiosd.popen("aios-run", script)
    child = parent.stdout.readline().strip()
    assert aiosd.run("aios-wait", child).returncode == 7
    parent.stdin.write("\n")
    parent.stdin.flush()
    assert parent.stdout.readline() == f"({child}, 7)\n"
    assert parent.wait(30) == 0


def test_wait_for_a_signal_a_budget_no_agent(aiosd: System) -> None:
    pid = start(aiosd, "kill -INT $$")
    assert aiosd.run("aios-wait", pid).returncode == 130
    budget = aiosd.run("aios-run", "-d", "--time", "0.2", "--", "sleep", "300", check=True).stdout.strip()
    done = aiosd.run("aios-wait", budget)
    assert (done.returncode, done.stderr) == (124, f"aios-wait: {budget}: time budget of 0.2 s used up\n")
    done = aiosd.run("aios-wait", pid, "999999")
    assert (done.returncode, done.stderr) == (127, "aios-wait: 999999: no such agent\n")


def test_wait_with_a_timeout(aiosd: System) -> None:
    pid = start(aiosd, "exec sleep 300")
    done = aiosd.run("aios-wait", "--timeout", "0.2", pid)
    assert (done.returncode, done.stderr) == (126, f"aios-wait: {pid}: still running after 0.2 s\n")
    aiosd.run("aios-kill", pid, check=True)


def test_wait_distinguishes_no_aiosd_from_an_agent_that_failed(fresh_aiosd: Fresh) -> None:
    system = fresh_aiosd(start=False)
    done = system.run("aios-wait", "7")
    assert (done.returncode, done.stderr.count("\n")) == (125, 1)
    system.start()
    pid = start(system, "echo up; exec sleep 300")
    waiter = system.popen("aios-wait", pid)
    assert eventually(lambda: system.status()["kernel"]["clients_now"] == 2)
    for process in [
        system.daemon.pid,
        *(one["ospid"] for one in system.ps() if one["name"] in ("supervisor", "kernel")),
    ]:
        os.kill(process, signal.SIGKILL)
    assert waiter.wait(30) == 125


# ── inspect ───────────────────────────────────────────────────────────────────────────────────────────────


def test_inspect_is_a_list_of_records(aiosd: System) -> None:
    pids = [start(aiosd, "exec sleep 300", name) for name in ("first", "second")]
    found = json.loads(aiosd.run("aios-inspect", pids[0], "second", check=True).stdout)
    assert [str(entry["pid"]) for entry in found] == pids
    assert found[0]["state"] == "running"
    aiosd.run("aios-kill", *pids, check=True)


def test_inspect_reports_found_and_unknown_agents(aiosd: System) -> None:
    pid = start(aiosd, "exit 3")
    aiosd.run("aios-wait", pid)
    done = aiosd.run("aios-inspect", pid, "nobody", "999999")
    assert done.returncode == 1
    assert [entry["exit"] for entry in json.loads(done.stdout)] == [3]
    assert done.stderr.splitlines() == [f"aios-inspect: {who}: no such agent" for who in ("nobody", "999999")]
