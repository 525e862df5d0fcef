"""aios-logs, aios-wait, aios-inspect: the logs, the ends and the records of agents."""

from __future__ import annotations

import io
import json
import signal
import struct
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiosd.commands.logs import start_of_tail, written_before
from tests.conftest import System, eventually

Fresh = Callable[..., System]

# ── pure ──────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.sampled_from([b"", b"a", b"bc", b"x" * 70000]), max_size=8), st.booleans(), st.integers(0, 10))
def test_tail_is_the_last_lines(lines: list[bytes], newline: bool, wanted: int) -> None:
    text = b"\n".join(lines) + (b"\n" if newline and lines else b"")
    start = start_of_tail(io.BytesIO(text), wanted, 0)
    kept = text.splitlines(keepends=True)
    assert text[start:] == b"".join(kept[max(0, len(kept) - wanted) :])


def test_tail_goes_not_back_beyond_the_start() -> None:
    text = b"one\ntwo\nthree\n"
    assert start_of_tail(io.BytesIO(text), 10, 4) == 4
    assert start_of_tail(io.BytesIO(text), 1, 4) == 8


def test_index_tells_how_much_was_written_before(tmp_path: Path) -> None:
    index = tmp_path / "7.idx"
    index.write_bytes(
        b"".join(struct.pack("<dQ", t, size) for t, size in ((10.0, 100), (11.0, 150), (20.0, 900))) + b"half"
    )
    assert [written_before(str(index), t) for t in (9, 10.5, 15, 21)] == [0, 100, 150, 900]
    assert written_before(str(tmp_path / "none.idx"), 5) == 0


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
    assert follower.wait(10) == 0


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_follow_ends_with_the_system(fresh_aiosd: Fresh, end: str) -> None:
    system = fresh_aiosd()
    pid = start(system, "trap 'sleep 1; echo last words; exit' TERM; echo up; while :; do sleep 0.05; done")
    follower = system.popen("aios-logs", "-f", pid)
    assert follower.stdout.readline() == "up\n"
    if end == "stop":
        system.run("aiosd", "stop", check=True)
        assert follower.stdout.read().endswith("last words\n")
    else:
        system.daemon.kill()
    assert follower.wait(20) == 0
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


def test_an_attached_agent_has_no_log_and_that_is_said(aiosd: System) -> None:
    run = aiosd.popen("aios-run", "--name", "here", "--", "sh", "-c", "echo up; read x")
    assert run.stdout.readline() == "up\n"
    done = aiosd.run("aios-logs", "here")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("aios-logs: here: no log")
    run.stdin.close()
    run.wait(10)


def test_logs_of_nobody(aiosd: System) -> None:
    for word in ("999999", "nobody"):
        done = aiosd.run("aios-logs", word)
        assert (done.returncode, done.stderr) == (1, f"aios-logs: {word}: no such agent\n")


@pytest.mark.parametrize("command", ["aios-logs", "aios-inspect", "aios-wait", "aios-renice 5", "aios-kill"])
def test_the_system_is_no_agent(aiosd: System, command: str) -> None:
    program, *options = command.split()
    for word in ("1", "kernel"):
        told = aiosd.run(program, *options, word).stderr
        assert told.startswith(f"{program}: ")
        assert told.endswith(": is part of aiosd itself, which ends by: aiosd stop\n")


def test_interrupted_it_dies_of_that(aiosd: System) -> None:
    pid = start(aiosd, "echo up; exec sleep 300")
    follower = aiosd.popen("aios-logs", "-f", pid)
    assert follower.stdout.readline() == "up\n"
    follower.send_signal(signal.SIGINT)
    assert follower.wait(10) == -signal.SIGINT
    assert follower.stderr.read() == ""
    aiosd.run("aios-kill", pid, check=True)


@pytest.mark.parametrize("args", [[], ["--tail", "-1", "1"], ["--since", "yesterday", "1"], ["1", "2"]])
def test_wrong_use_is_exit_2_and_one_line(fresh_aiosd: Fresh, args: list[str]) -> None:
    done = fresh_aiosd(start=False).run("aios-logs", *args)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


# ── wait ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_wait_exits_with_the_last_status(aiosd: System) -> None:
    pids = [start(aiosd, f"exit {n}", f"w{n}") for n in (3, 4)]
    assert aiosd.run("aios-wait", *pids).returncode == 4
    assert aiosd.run("aios-wait", *reversed(pids)).returncode == 3
    assert aiosd.run("aios-wait", pids[0]).returncode == 3  # it is kept, however often it is asked for


def test_wait_for_a_live_one_by_name(aiosd: System) -> None:
    start(aiosd, "sleep 0.3; exit 6", "later")
    assert aiosd.run("aios-wait", "later").returncode == 6


def test_wait_for_somebody_elses_child_does_not_take_it_away(aiosd: System, tmp_path: Path) -> None:
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
    assert parent.wait(10) == 0


def test_wait_for_a_signal_a_budget_nobody(aiosd: System) -> None:
    pid = start(aiosd, "kill -INT $$")
    assert aiosd.run("aios-wait", pid).returncode == 130
    budget = aiosd.run("aios-run", "-d", "--time", "0.2", "--", "sleep", "300", check=True).stdout.strip()
    assert aiosd.run("aios-wait", budget).returncode == 124
    done = aiosd.run("aios-wait", pid, "999999")
    assert (done.returncode, done.stderr) == (127, "aios-wait: 999999: no such agent\n")


def test_wait_with_a_timeout(aiosd: System) -> None:
    pid = start(aiosd, "exec sleep 300")
    done = aiosd.run("aios-wait", "--timeout", "0.2", pid)
    assert (done.returncode, done.stderr) == (1, f"aios-wait: {pid}: still running after 0.2 s\n")
    aiosd.run("aios-kill", pid, check=True)


# ── inspect ───────────────────────────────────────────────────────────────────────────────────────────────


def test_inspect_is_a_list_of_records(aiosd: System) -> None:
    pids = [start(aiosd, "exec sleep 300", name) for name in ("first", "second")]
    found = json.loads(aiosd.run("aios-inspect", pids[0], "second", check=True).stdout)
    assert [str(entry["pid"]) for entry in found] == pids
    assert found[0]["state"] == "running"
    aiosd.run("aios-kill", *pids, check=True)


def test_inspect_tells_what_it_found_and_what_not(aiosd: System) -> None:
    pid = start(aiosd, "exit 3")
    aiosd.run("aios-wait", pid)
    done = aiosd.run("aios-inspect", pid, "nobody", "999999")
    assert done.returncode == 1
    assert [entry["exit"] for entry in json.loads(done.stdout)] == [3]
    assert done.stderr.splitlines() == [f"aios-inspect: {who}: no such agent" for who in ("nobody", "999999")]
