"""aios-ps: tables, columns, sorting, trees; then a real one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiosd.commands import table
from libaios.wire import ProcInfo
from tests.conftest import System, eventually
from tests.test_jobcontrol import Terminal


def proc(pid: int, ppid: int = 1, name: str = "agent", **fields: object) -> ProcInfo:
    known = {
        "pgid": pid, "ospid": 1000 + pid, "uid": 0, "stat": "S", "nice": 0, "command": name, "group": "default",
        "calls": 0, "prompt_tokens": 0, "cached_tokens": 0, "completion_tokens": 0, "ctx_tokens": 0, "mem_bytes": 0,
        "cpu_s": 0.0, "started": 0.0,
    }  # fmt: skip
    return ProcInfo(pid=pid, ppid=ppid, name=name, **(known | fields))  # type: ignore[arg-type]


# ── pure ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_columns_are_as_wide_as_what_is_in_them() -> None:
    lines = table.render([proc(7), proc(12345, name="long-name", calls=10)], table.layout(["pid,calls,name"]))
    assert lines == ["  PID CALLS NAME", "    7     0 agent", "12345    10 long-name"]


def test_last_column_is_not_padded() -> None:
    lines = table.render([proc(7, name="ab"), proc(8, name="abcdef")], table.layout(["name"]))
    assert lines == ["NAME", "ab", "abcdef"]


def test_width_cuts_lines() -> None:
    assert table.render([proc(7, name="abcdef")], table.layout(["pid,name"]), width=9)[1] == "  7 abcde"


@pytest.mark.parametrize(
    ("arguments", "headers"),
    [
        (["pid,stat"], ["PID", "STAT"]),
        (["pid stat"], ["PID", "STAT"]),
        (["pid", "stat"], ["PID", "STAT"]),
        (["pid=,stat=STATE"], ["", "STATE"]),
        (["PID=x=y"], ["x=y"]),
        (["comm,args,nice"], ["NAME", "COMMAND", "NI"]),
    ],
)
def test_reads_o(arguments: list[str], headers: list[str]) -> None:
    assert [header for header, _ in table.layout(arguments)] == headers


def test_no_header_line_when_all_are_empty() -> None:
    assert table.render([proc(7)], table.layout(["pid=,name="])) == ["7 agent"]
    assert table.render([proc(7)], table.layout(["pid=,name"]))[0].strip() == "NAME"


@pytest.mark.parametrize("word", ["nosuch", "pid,nosuch", ""])
def test_unknown_column_lists_the_known_ones(word: str) -> None:
    with pytest.raises(ValueError, match="there are: pid ppid"):
        table.layout([word])


def test_sorts_by_several_keys() -> None:
    found = [proc(1, calls=2), proc(2, calls=3), proc(3, calls=2), proc(4, calls=10)]
    table.sort(found, table.sort_keys(["-calls,pid"]))
    assert [p.pid for p in found] == [4, 2, 1, 3]
    table.sort(found, table.sort_keys(["-calls", "-pid"]))
    assert [p.pid for p in found] == [4, 2, 3, 1]


def test_forest_is_drawn() -> None:
    family = [
        proc(1, 0, "init"),
        proc(2, 1, "a"),
        proc(3, 2, "b"),
        proc(4, 1, "c"),
        proc(5, 2, "d"),
        proc(9, 8, "lost"),
    ]
    order, branches = table.forest(family)
    lines = table.render(order, table.layout(["name="]), branches=branches)
    assert lines == ["init", " \\_ a", " |   \\_ b", " |   \\_ d", " \\_ c", "lost"]


@given(st.lists(st.integers(0, 30), max_size=30))
def test_forest_shows_everyone_once_and_parents_first(parents: list[int]) -> None:
    """With any parents that form no circle."""
    family = [proc(pid, parent if parent < pid else 0) for pid, parent in enumerate(parents, 1)]
    order, branches = table.forest(family)
    assert sorted(p.pid for p in order) == [p.pid for p in family]
    places = {p.pid: i for i, p in enumerate(order)}
    assert all(places[p.ppid] < places[p.pid] for p in order if p.ppid in places)
    assert len(branches) == len(order)


@given(st.text(), st.integers(0, 30))
def test_what_is_cut_fits_and_nothing_more_would(text: str, width: int) -> None:
    kept = table.cut(text, width)
    assert text.startswith(kept)
    assert table.cells(kept) <= width
    assert kept == text or table.cells(text[: len(kept) + 1]) > width


def test_wide_characters_take_two_cells() -> None:
    rows = table.render([proc(1, name="日本語"), proc(22, name="e\u0301a")], table.layout(["name,pid"]))
    assert [table.cells(row) for row in rows] == [10, 10, 10]
    assert table.render([proc(1, name="日本語")], table.layout(["name="]), width=5) == ["日本"]


def test_command_cannot_move_the_cursor() -> None:
    line = table.render([proc(7, command="\x1b[2Jevil\n\x9b31m")], table.layout(["command="]))[0]
    assert line == "?[2Jevil??31m"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00.00"), (61.239, "1:01.23"), (3599.99, "59:59.99"), (3600, "1:00:00"), (360000, "100:00:00")],
)
def test_cpu_time(seconds: float, text: str) -> None:
    assert table.cpu_time(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "00:00"), (61, "01:01"), (3661, "01:01:01"), (90061, "1-01:01:01"), (-5, "00:00")]
)
def test_elapsed(seconds: float, text: str) -> None:
    assert table.elapsed(seconds) == text


@given(st.text())
def test_printable_never_passes_a_control_character(text: str) -> None:
    assert table.printable(text).isprintable()
    assert len(table.printable(text)) == len(text)


# ── real ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def sleepers(aiosd: System) -> list[str]:
    """Pids of two agents of one name and one of another."""
    pids = [
        aiosd.run("aios-run", "-d", "--name", name, "--", "sleep", "300", check=True).stdout.strip()
        for name in ("twin", "twin", "single")
    ]
    yield pids  # type: ignore[misc]
    aiosd.run("aios-kill", "-KILL", *pids)


def test_bare_lists_live_agents_alone(aiosd: System, sleepers: list[str]) -> None:
    lines = aiosd.run("aios-ps", check=True).stdout.splitlines()
    assert lines[0].split() == ["PID", "PPID", "STAT", "NI", "CALLS", "TOKENS", "CTX", "MEM", "TIME", "NAME"]
    assert [line.split()[0] for line in lines[1:]] == sleepers
    assert {line.split()[-1] for line in lines[1:]} == {"twin", "single"}


def test_e_adds_the_system(aiosd: System, sleepers: list[str]) -> None:
    names = [line.split()[-1] for line in aiosd.run("aios-ps", "-e", "--no-headers", check=True).stdout.splitlines()]
    system = {"guardian", "supervisor", "kernel", "llm", "store", "toolbox", "proxy"}
    assert {*system, "twin", "single"} == set(names) - {"gateway"}


def test_f_has_more_columns(aiosd: System, sleepers: list[str]) -> None:
    lines = aiosd.run("aios-ps", "-f", check=True).stdout.splitlines()
    assert {"UID", "PGID", "OSPID", "STIME", "COMMAND"} <= set(lines[0].split())
    assert lines[1].endswith("sleep 300")


def test_p_and_name_choose(aiosd: System, sleepers: list[str]) -> None:
    first, second, third = sleepers

    def pids(*options: str) -> list[str]:
        return aiosd.run("aios-ps", *options, "-o", "pid=", check=True).stdout.split()

    assert pids("-p", f"{first},{third}") == [first, third]
    assert pids("-p", first, "-p", second) == [first, second]
    assert pids("-C", "twin") == [first, second]
    assert pids("-C", "single", "-p", first) == [first, third]
    assert pids("-C", "twin", "--sort", "-pid") == [second, first]


def test_nothing_found_is_exit_1(aiosd: System) -> None:
    for options in (["-p", "999999"], ["-C", "nobody"]):
        done = aiosd.run("aios-ps", "-o", "pid=", *options)
        assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    assert aiosd.run("aios-ps", check=True).stdout.startswith("PID")


@pytest.mark.parametrize(
    "options",
    [
        ["-o", "nosuch"],
        ["--sort", "nosuch"],
        ["-p", "x"],
        ["-p", ""],
        ["--nosuch"],
        ["7"],
        ["--watch", "0"],
        ["--watch", "--json"],
    ],
)
def test_wrong_use_is_exit_2_and_one_line(fresh_aiosd: Callable[..., System], options: list[str]) -> None:
    done = fresh_aiosd(start=False).run("aios-ps", *options)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("aios-ps: ")


@pytest.mark.parametrize(
    ("word", "hint"), [("aux", "aios-ps -e"), ("7", "aios-ps -p 7"), ("planner", "aios-ps -C planner")]
)
def test_a_word_that_is_no_option_gets_a_hint(fresh_aiosd: Callable[..., System], word: str, hint: str) -> None:
    done = fresh_aiosd(start=False).run("aios-ps", word)
    assert done.returncode == 2
    assert done.stderr.startswith(f"aios-ps: {word}: ")
    assert hint in done.stderr


def test_json_has_what_was_promised(aiosd: System, sleepers: list[str]) -> None:
    found = json.loads(aiosd.run("aios-ps", "--json", "-p", sleepers[0], check=True).stdout)
    promised = {
        "pid", "ppid", "ospid", "stat", "nice", "name", "calls", "prompt_tokens", "cached_tokens",
        "completion_tokens", "mem_bytes", "started", "exit",
    }  # fmt: skip
    assert promised <= set(found[0])
    assert found[0]["exit"] is None
    assert Path(f"/proc/{found[0]['ospid']}").exists()
    assert json.loads(aiosd.run("aios-ps", "--json", "-C", "nobody").stdout) == []


def test_json_of_chosen_columns(aiosd: System, sleepers: list[str]) -> None:
    def ask(*options: str) -> list[dict[str, object]]:
        return json.loads(aiosd.run("aios-ps", "--json", "-p", sleepers[0], *options, check=True).stdout)

    assert ask("-o", "pid,NAME,exit=left", "-o", "ni") == [
        {"pid": int(sleepers[0]), "name": "twin", "left": None, "ni": 0}
    ]
    (one,) = ask("-o", "nice,tokens,etime,mem_bytes")
    assert list(one) == ["nice", "tokens", "etime", "mem_bytes"]
    assert 0 < float(one["etime"]) < 120
    assert len(ask("-f")[0]) > 15


def test_agents_of_the_history(aiosd: System) -> None:
    pid = aiosd.run("aios-run", "-d", "--name", "gone", "--", "sh", "-c", "exit 3", check=True).stdout.strip()
    aiosd.run("aios-wait", pid)
    columns = ["-o", "pid=,stat=,exit=,name="]
    assert aiosd.run("aios-ps", "-e", *columns, check=True).stdout.count("gone") == 0
    assert aiosd.run("aios-ps", "-p", pid, *columns).returncode == 1
    for options in (["--dead"], ["--dead", "-p", pid], ["--dead", "-C", "gone"], ["--dead", "-e"]):
        lines = aiosd.run("aios-ps", *options, *columns, check=True).stdout.splitlines()
        assert [pid, "X", "3", "gone"] in [line.split() for line in lines]
    head, line = aiosd.run("aios-ps", "--dead", "-p", pid, check=True).stdout.splitlines()
    assert (head.split()[2:4], line.split()[2:4]) == (["STAT", "EXIT"], ["X", "3"])


def test_the_time_of_an_ended_agent_is_complete_and_grows_no_more(aiosd: System) -> None:
    work = "import time\nwhile time.process_time() < 0.3: pass"
    pid = aiosd.run("aios-run", "-d", "--", "python3", "-c", work, check=True).stdout.strip()
    aiosd.run("aios-wait", pid, check=True)
    ask = ["--dead", "--json", "-p", pid, "-o", "cpu_s,etime"]
    first, second = (json.loads(aiosd.run("aios-ps", *ask, check=True).stdout)[0] for _ in range(2))
    assert first["cpu_s"] >= 0.3  # it was never sampled while it lived
    assert first == second


def test_forest_below_the_supervisor(aiosd: System, sleepers: list[str]) -> None:
    lines = aiosd.run("aios-ps", "-e", "--forest", "--no-headers", check=True).stdout.splitlines()
    assert {line.split()[-1] for line in lines if "\\_ " not in line} == {"guardian", "supervisor"}


def test_no_colour_and_no_cut_in_a_pipe(aiosd: System) -> None:
    pid = aiosd.run("aios-run", "-d", "--", "sh", "-c", f"sleep 300 # {'x' * 300}", check=True).stdout.strip()
    text = aiosd.run("aios-ps", "-f", env={"COLUMNS": "40"}, check=True).stdout
    aiosd.run("aios-kill", "-KILL", pid)
    assert "x" * 300 in text
    assert "\x1b" not in text


def test_on_a_terminal_lines_fit(aiosd: System) -> None:
    pid = aiosd.run("aios-run", "-d", "--", "sh", "-c", f"sleep 300 # {'x' * 300}", check=True).stdout.strip()
    terminal = Terminal(aiosd, "sh", "-c", "read go; aios-ps -f; echo end")
    try:
        terminal.resize(24, 50)
        terminal.type("\n")
        terminal.expect("end\n")
    finally:
        terminal.close()
        aiosd.run("aios-kill", "-KILL", pid)
    lines = terminal.seen.splitlines()
    assert max(map(len, lines)) == 50
    assert any(re.search(rf"\b{pid}\b", line) for line in lines)


@pytest.mark.parametrize("command", ["aios-ps -e", "TERM=xterm aios-ps -e --watch 60"])
def test_a_terminal_that_does_not_know_its_size_is_80_by_24(aiosd: System, command: str) -> None:
    terminal = Terminal(aiosd, "sh", "-i")
    try:
        terminal.expect("READY> $")
        terminal.resize(0, 0)
        terminal.command(command)
        terminal.expect("supervisor")
    finally:
        terminal.close()


def test_a_zombie_is_shown_with_e_and_by_pid(aiosd: System, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text("import libaios as aios\nprint(aios.proc.spawn('true'), flush=True)\ninput()\n")
    parent = aiosd.popen("aios-run", script)
    child = parent.stdout.readline().strip()
    assert eventually(lambda: aiosd.run("aios-ps", "-p", child, "-o", "stat=").stdout.strip() == "Z")
    assert child in aiosd.run("aios-ps", "-e", "-o", "pid=", check=True).stdout.split()
    assert child not in aiosd.run("aios-ps", "-o", "pid=", check=True).stdout.split()
    parent.stdin.close()
    assert parent.wait(30) == 1  # EOFError


def test_reader_that_goes_away_is_no_error(aiosd: System) -> None:
    done = aiosd.run("sh", "-c", "aios-ps -e | head -n 0")
    assert (done.returncode, done.stderr) == (0, "")


def test_output_that_cannot_be_written_is_an_error(aiosd: System) -> None:
    with open("/dev/full", "w") as full:
        done = aiosd.run("aios-ps", "-e", stdout=full)
    assert (done.returncode, done.stderr) == (1, "aios-ps: No space left on device\n")


# ── again and again ───────────────────────────────────────────────────────────────────────────────────────


def test_watch_in_a_pipe_prints_pictures_one_after_another(aiosd: System, sleepers: list[str]) -> None:
    watcher = aiosd.popen("aios-ps", "--watch", "0.1", "-o", "pid,name", "-C", "single")
    picture = [watcher.stdout.readline() for _ in range(3)]
    assert picture[0].split() == ["PID", "NAME"]
    assert picture[1:] == [f"{int(sleepers[2]):3} single\n", "\n"]
    assert [watcher.stdout.readline() for _ in range(3)] == picture
    watcher.stdout.close()
    assert watcher.wait(30) == 141
    assert watcher.stderr.read() == ""


def test_watch_redraws_in_place_and_gives_the_terminal_back(aiosd: System, sleepers: list[str]) -> None:
    terminal = Terminal(aiosd, "sh", "-i")
    try:
        terminal.expect("READY> $")
        before = terminal.modes()
        terminal.command("TERM=xterm aios-ps --watch 0.1 -o name=")
        terminal.expect(r"\x1b\[\?1049h.*every 0.1 s   [\d:]+   q quits\x1b\[K\r?\n+(twin|single)")
        aiosd.run("aios-kill", "-KILL", sleepers[2], check=True)
        terminal.expect(r"\x1b\[H[^\x1b]+\x1b\[K\r?\ntwin\x1b\[K\r?\ntwin\x1b\[K\x1b\[J")
        terminal.type("\x03")
        terminal.expect(r"\x1b\[\?25h\x1b\[\?1049l")
        assert terminal.exit_code() == 130
        assert terminal.modes() == before
        terminal.command("TERM=xterm aios-ps --watch 60")
        terminal.expect(r"q quits")
        terminal.type("q")
        terminal.expect(r"\x1b\[\?25h\x1b\[\?1049l")
        assert terminal.exit_code() == 0
        assert terminal.modes() == before
        terminal.command("TERM=xterm sh -c 'aios-ps --watch & sleep 1; kill $!; wait $!'")
        terminal.expect(r"\x1b\[\?1049h")
        terminal.expect(r"\x1b\[\?25h\x1b\[\?1049l")
        assert terminal.exit_code() == 128 + 15
    finally:
        terminal.close()


def test_a_picture_is_not_longer_than_the_terminal(aiosd: System) -> None:
    terminal = Terminal(aiosd, "sh", "-i")
    try:
        terminal.expect("READY> $")
        terminal.resize(5, 40)
        terminal.command("TERM=xterm aios-ps -e --watch 0.1")
        terminal.expect(r"… [0-9]+ more lines\x1b\[K\x1b\[J")
        terminal.type("\x03")
        assert terminal.exit_code() == 130
    finally:
        terminal.close()
