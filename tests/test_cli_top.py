"""aios-top: screens from given samples; then a real aios-top, plain, on a pty, and in tmux."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiosd.commands import figures, picture, screen, table
from aiosd.commands.picture import Rate, Sample, View
from tests.conftest import System, command_line, eventually
from tests.test_cli_ps import proc
from tests.test_jobcontrol import Terminal

STATUS: dict[str, Any] = {
    "state": "ready",
    "uptime_s": 75.0,
    "policy": "fair",
    "quantum": {"tokens": 64, "seconds": 10.0},
    "agents": {"R": 2, "S": 1},
    "max_agents": 333,
    "models": [
        {
            "name": "nano",
            "state": "ready",
            "open_calls": 5,
            "stats": {
                "slots": {"total": 32, "used": 5, "free": 27},
                "running": 5,
                "waiting": 0,
                "preemptions": 7,
                "tokens_per_s": 1234.56,
                "prefill_tokens_per_s": 4100.4,
                "step_s": 0.0064,
                "prefix": {"hits": 2, "misses": 1, "hit_rate": 2 / 3, "cached_tokens": 1024, "entries": 1},
                "tiers": {
                    "slot": {"contexts": 5, "bytes": 98304},
                    "ram": {"contexts": 3, "bytes": 1 << 20, "budget": 1 << 30},
                    "disk": {"contexts": 0, "bytes": 0, "budget": 2 << 30},
                },
            },
        }
    ],
}

# ── pure ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_head_shows_the_figures_of_the_system() -> None:
    lines = picture.head(STATUS, 80, 0.0)
    assert re.fullmatch(r"aios-top \d\d:\d\d:\d\d, up 1 min 15 s, policy fair \(64 tokens or 10 s\)", lines[0])
    assert lines[1:] == [
        "agents 3: 2 R, 1 S, at most 333 at once; 5 open calls",
        "nano  slots 5 of 32  [####................]  5 running  0 waiting  7 preempted",
        "      1,234.6 tokens/s  prefill 4,100/s  step 6.4 ms  prefix hits 67%",
        "      contexts: slot 5 (96.0K), ram 3 (1.0M of 1.0G), disk 0 (0B of 2.0G)",
    ]


def test_how_many_guesses_were_right_is_shown_once_there_were_some() -> None:
    def speed(guessed: int) -> str:
        (model,) = STATUS["models"]
        stats = model["stats"] | {"lookahead": {"why": "", "guessed": guessed, "right": 7}}
        return picture.head(STATUS | {"models": [model | {"stats": stats}]}, 100, 0.0)[3]

    assert speed(8).endswith("prefix hits 67%  guesses 88%")
    assert speed(0).endswith("prefix hits 67%")


keys = st.sampled_from(["slots", "running", "waiting", "preemptions", "tokens_per_s", "step_s", "prefix", "tiers"])


@given(missing=st.sets(keys), empty=st.booleans(), width=st.integers(1, 120))
def test_what_is_missing_is_left_out_and_nothing_is_too_wide(missing: set[str], empty: bool, width: int) -> None:
    stats = {key: value for key, value in STATUS["models"][0]["stats"].items() if key not in missing}
    status = {} if empty else STATUS | {"models": [STATUS["models"][0] | {"stats": stats}]}
    lines = picture.plain(Sample(0.0, status, [proc(7)]), None, View(), 0.0, width)
    assert all(len(line) <= width for line in lines)
    text = " ".join(picture.head(status, 1000, 0.0))
    assert ("waiting" in text) == (not empty and "waiting" not in missing)
    assert ("contexts" in text) == (not empty and "tiers" not in missing)


def test_a_line_that_is_too_long_is_broken_between_figures() -> None:
    (model,) = STATUS["models"]
    stats = model["stats"] | {"lookahead": {"guessed": 8, "right": 7}, "tokens_per_s": 12345.6}
    machine = "12 CPUs 99% busy, load 14.64 16.08 19.23, memory 17.4G of 123.5G, disk 161.9G free"
    status = STATUS | {"models": [model | {"stats": stats}]}
    lines = picture.head(status, 80, 0.0, machine)
    assert lines[3:5] == [
        "      12,345.6 tokens/s  prefill 4,100/s  step 6.4 ms  prefix hits 67%",
        "      guesses 88%",
    ]
    assert lines[-2:] == [machine.removesuffix(" disk 161.9G free"), "      disk 161.9G free"]


def test_a_narrow_window_keeps_its_lines_for_agents() -> None:
    machine = "12 CPUs 99% busy, load 14.64 16.08 19.23, memory 17.4G of 123.5G, disk 161.9G free"
    clock, *lines = picture.head(STATUS, 60, 0.0, machine)
    assert re.fullmatch(r"aios-top \d\d:\d\d:\d\d, up 1 min 15 s", clock)
    assert lines == [
        "agents 3: 2 R, 1 S, at most 333 at once; 5 open calls",
        "nano  slots 5 of 32  5 running  0 waiting  7 preempted",
        "      1,234.6 tokens/s  prefill 4,100/s  step 6.4 ms",
        "      contexts: slot 5 (96.0K), ram 3 (1.0M of 1.0G)",
        "12 CPUs 99% busy, load 14.64 16.08 19.23",
    ]
    assert len(picture.head(STATUS, 20, 0.0, machine)) == 6


def test_the_store_is_shown_when_it_is_used() -> None:
    store = {"kind": "store", "stats": {"bytes": 2048, "hits": 5, "faults": 2, "evictions": 1, "vectors": 3,
                                        "index_bytes": 1024, "pending": 3, "wordless": 1}}  # fmt: skip
    shown = "notes: 2.0K in memory, 5 hits, 2 faults, 1 evictions, 3 vectors (1.0K), 4 pending"
    assert picture.head({"services": [store]}, 100, 0.0)[2:] == [shown]
    assert picture.head({"services": [{"kind": "store", "stats": {"hits": 0, "bytes": 0}}]}, 100, 0.0)[2:] == []


def test_a_model_that_does_not_run_is_shown_with_the_reason() -> None:
    model = {"name": "big", "state": "down", "last_death": "SIGKILL", "stats": {}}
    assert picture.head({"models": [model]}, 80, 0.0)[2] == "big  down (SIGKILL)"


def test_rates_are_between_two_samples_of_the_same_agent() -> None:
    old = Sample(10.0, {}, [proc(1, completion_tokens=5, cpu_s=1.0), proc(2, completion_tokens=9)])
    new = Sample(12.0, {}, [proc(1, completion_tokens=25, cpu_s=2.0), proc(2, completion_tokens=9), proc(3)])
    assert picture.rates(old, new) == {1: Rate(10.0, 50.0), 2: Rate(0.0, 0.0)}
    assert picture.rates(None, new) == {}


def listed(sort: str, reverse: bool = False, **view: Any) -> list[int]:
    agents = [
        proc(1, name="kernel", system=True, mem_bytes=900),
        proc(5, name="b", mem_bytes=10, completion_tokens=3),
        proc(6, name="a", mem_bytes=30, completion_tokens=2),
        proc(7, name="c", mem_bytes=20, completion_tokens=2),
    ]
    usage = {5: Rate(1.0, 0.0), 6: Rate(1.0, 5.0), 7: Rate(8.0, 0.0)}
    return picture.rows(Sample(0.0, {}, agents), usage, View(sort, reverse, **view), 80)[1]


def test_agents_are_sorted_by_what_they_use() -> None:
    assert listed("rate") == [7, 5, 6]
    assert listed("rate", reverse=True) == [5, 6, 7]
    assert listed("mem") == [6, 7, 5]
    assert listed("cpu") == [6, 5, 7]
    assert listed("pid") == [5, 6, 7]
    assert listed("name") == [6, 5, 7]
    assert listed("tokens") == [5, 6, 7]


def test_which_agents_are_shown() -> None:
    assert listed("mem", system=True) == [1, 6, 7, 5]
    assert listed("pid", names=["a", "c"]) == [6, 7]


def headers(width: int, sort: str = "rate", name: str = "storyteller") -> list[str]:
    agents = [proc(7, name=name, mem_bytes=9 << 20, ctx_kept=380, ctx_place="slot")]
    title, _, (line,) = picture.rows(Sample(0.0, {}, agents), {}, View(sort), width)
    assert line.endswith(name[:16]) or width < 24
    return title.split()


def test_a_narrow_window_leaves_out_what_matters_least() -> None:
    everything = ["PID", "STAT", "NI", "TOK/S", "TOKENS", "CACHED", "CTX", "MEM", "%CPU", "TIME", "NAME"]
    assert headers(79) == everything
    assert headers(59) == ["PID", "STAT", "NI", "TOK/S", "TOKENS", "CTX", "MEM", "%CPU", "NAME"]
    assert headers(59, "cached") == ["PID", "STAT", "TOK/S", "TOKENS", "CACHED", "CTX", "MEM", "%CPU", "NAME"]
    assert headers(39) == ["PID", "STAT", "TOK/S", "TOKENS", "MEM", "NAME"]
    assert headers(12, "pid") == ["PID", "NAME"]
    assert headers(79, name="n" * 64) == everything, "a long name is cut"


def test_an_agent_cannot_move_the_cursor() -> None:
    _, _, (line,) = picture.rows(Sample(0.0, {}, [proc(7, name="\x1b[2Jx")]), {}, View(), 80)
    assert line.isprintable()


# ── real, plain ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def sleepers(aiosd: System) -> Iterator[list[str]]:
    names = ("first", "second")
    pids = [aiosd.run("aios-run", "-d", "--name", n, "--", "sleep", "300", check=True).stdout.strip() for n in names]
    yield pids
    aiosd.run("aios-kill", "-KILL", *pids)


def test_one_plain_picture(aiosd: System, sleepers: list[str]) -> None:
    done = aiosd.run("aios-top", "-b", check=True)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("aios-top ")
    assert "policy fair" in lines[0]
    assert any(re.match(r"nano  slots 0 of \d+", line) for line in lines)
    assert lines[-3].split() == ["PID", "STAT", "NI", "TOK/S", "TOKENS", "CACHED", "CTX", "MEM", "%CPU", "TIME", "NAME"]
    assert [line.split()[0] for line in lines[-2:]] == sleepers
    assert (done.stderr, "\x1b" in done.stdout) == ("", False)


def test_several_plain_pictures_have_rates(aiosd: System, sleepers: list[str]) -> None:
    out = aiosd.run("aios-top", "-b", "-n", "2", "-d", "0.1", "-C", "first", "--sort", "pid", check=True).stdout
    first, second = out.split("\n\naios-top")
    assert first.splitlines()[-1].split()[3] == "-"
    assert second.splitlines()[-1].split()[3] == "0.0"
    assert "second" not in out


def test_of_names(aiosd: System, sleepers: list[str]) -> None:
    out = aiosd.run("aios-top", "-b", "-C", "first,nobody", "-C", "second", "--sort", "pid", check=True).stdout
    assert [line.split()[0] for line in out.splitlines()[-2:]] == sleepers
    for options in ([], ["-b"]):
        done = aiosd.run("script", "-qec", " ".join(["aios-top", *options, "-C", "nope"]), "/dev/null")
        assert (done.returncode, done.stdout.strip()) == (1, "aios-top: nope: no such agent")


def test_all_adds_the_system(aiosd: System) -> None:
    names = {line.split()[-1] for line in aiosd.run("aios-top", "-b", "-e", check=True).stdout.splitlines() if line}
    assert {"supervisor", "kernel", "llm"} <= names


def test_status_prints_the_same_figures(aiosd: System) -> None:
    told, shown = aiosd.status()["models"][0]["stats"], aiosd.run("aiosd", "status", "-v", check=True).stdout
    assert "tiers" in told
    for name in ("slots", "running", "waiting", "policy", "tokens_per_s", "prefix", "preemptions", "step_s"):
        assert name in told
        assert re.search(rf"^  {figures.label(name)} ", shown, re.MULTILINE)


@pytest.mark.parametrize(
    ("options", "code"), [([], 1), (["-n", "0"], 2), (["-d", "0"], 2), (["--sort", "x"], 2), (["x"], 2)]
)
def test_wrong_use_is_one_line(aiosd: System, options: list[str], code: int) -> None:
    done = aiosd.run("aios-top", *options)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1)
    assert done.stderr.startswith("aios-top: ")
    assert options or "use -b" in done.stderr


# ── on a terminal ─────────────────────────────────────────────────────────────────────────────────────────

MODERN = ("env", "TERM=xterm")


@pytest.fixture
def shell(aiosd: System) -> Iterator[Terminal]:
    """`sh` at a terminal, whose modes show what a command has changed."""
    terminal = Terminal(aiosd, "sh", "-i")
    yield terminal
    terminal.close()


def top(shell: Terminal, *options: str) -> list[Any]:
    """Start aios-top; returns the modes of the terminal before."""
    shell.expect("READY> $")
    before = shell.modes()
    shell.command(" ".join([*MODERN, "aios-top", "-d", "0.2", *options]))
    shell.expect("policy")
    assert shell.modes() != before
    return before


def the_top(shell: Terminal) -> int:
    """The Linux pid of aios-top."""
    (pid,) = (p.pid for p in shell.system.processes() if "/aios-top" in command_line(p))
    return pid


def test_q_and_n_end_it_and_the_terminal_is_as_before(shell: Terminal) -> None:
    before = top(shell)
    shell.type("q")
    assert shell.exit_code() == 0
    shell.expect("READY> $")  # or it would match as the prompt after the next command
    assert shell.modes() == before
    shell.command(" ".join([*MODERN, "aios-top", "-d", "0.1", "-n", "2"]))
    assert shell.exit_code() == 0
    assert shell.modes() == before


def test_ctrl_c_ends_it_and_the_terminal_is_as_before(shell: Terminal) -> None:
    before = top(shell)
    shell.type("\x03")
    assert shell.exit_code() == 130
    assert shell.modes() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_and_the_terminal_is_as_before(shell: Terminal, number: signal.Signals) -> None:
    before = top(shell)
    os.kill(the_top(shell), number)
    assert shell.exit_code() == 128 + number
    assert shell.modes() == before


def test_after_a_crash_the_terminal_is_as_before(shell: Terminal, tmp_path: Path) -> None:
    crash = "import curses, sys; from aiosd.commands import main, picture\n"
    crash += "def broken(*args): raise RuntimeError('out of order')\n"
    crash += "picture.rows = broken\nsys.argv[1:] = ['-d', '0.2']\nmain('aios-top')\n"
    (tmp_path / "crash.py").write_text(crash)
    shell.expect("READY> $")
    before = shell.modes()
    shell.command(f"env TERM=xterm python {tmp_path / 'crash.py'}")
    shell.expect("RuntimeError: out of order")
    assert shell.exit_code() == 1
    assert shell.modes() == before


def test_ctrl_z_gives_the_terminal_back_and_fg_takes_it_again(aiosd: System) -> None:
    shell = Terminal(aiosd, "bash", "--norc", "--noediting", "-i")
    try:
        before = top(shell)
        shell.type("\x1a")
        shell.expect("Stopped")
        assert eventually(lambda: shell.modes() == before)
        shell.expect("READY> $")
        shell.command("fg")
        shell.expect("policy")
        shell.type("q")
        assert shell.exit_code() == 0
    finally:
        shell.close()


def test_names_that_the_locale_does_not_know_are_question_marks(aiosd: System, shell: Terminal) -> None:
    pid = aiosd.run("aios-run", "-d", "--name", "日本é-worker", "--", "sleep", "300", check=True).stdout.strip()
    shell.expect("READY> $")
    shell.command("LC_ALL=C TERM=xterm aios-top -n 1")
    assert "?????-worker" in shell.expect(r"\S*-worker")[0]
    assert shell.exit_code() == 0
    aiosd.run("aios-kill", pid, check=True)


def test_wide_names_are_spelled_as_wide() -> None:
    assert table.spelled("日本é-x", "ascii") == "?????-x"
    assert table.spelled("日本é-x", "iso-8859-1") == "????é-x"
    assert table.spelled("日本é-x", "utf-8") == "日本é-x"


def test_the_machine_is_in_the_picture(aiosd: System) -> None:
    first, _, second = aiosd.run("aios-top", "-b", "-n", "2", "-d", "0.2", check=True).stdout.partition("\n\naios-top")
    assert re.search(r"\n\d+ CPUs?, load [\d. ]+, memory \S+ of \S+, disk \S+ free\n", first)
    assert re.search(r"\n\d+ CPUs? \d+% busy, load ", second)


def test_on_a_terminal_without_the_abilities_the_error_names_option_b(shell: Terminal) -> None:
    for name in ("dumb", "nosuchterminal"):
        shell.expect("READY> $")
        shell.command(f"env TERM={name} aios-top")
        shell.expect(r"aios-top: .*use -b\n")
        assert shell.exit_code() == 1


def test_it_ends_with_the_system(fresh_aiosd: Callable[..., System]) -> None:
    system = fresh_aiosd()
    shell = Terminal(system, "sh", "-i")
    try:
        before = top(shell)
        system.stop()
        shell.expect("aios-top: aiosd is gone\n")
        assert shell.exit_code() == 1
        assert shell.modes() == before
    finally:
        shell.close()


# ── in tmux: what is on the screen ────────────────────────────────────────────────────────────────────────


class Tmux:
    """A server of its own with one window, 80 × 24."""

    def __init__(self, system: System, folder: Path, command: str) -> None:
        self.env = {**system.env, "TMUX_TMPDIR": str(folder), "TERM": "xterm"}
        self("-f", "/dev/null", "new-session", "-d", "-x", "80", "-y", "24", f"{command}; echo code=$?; exec cat")

    def __call__(self, *args: str) -> str:
        command = ["tmux", "-L", "top", *args]
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60, check=True).stdout

    def type(self, *keys: str) -> None:
        self("send-keys", *keys)

    def screen(self) -> list[str]:
        return self("capture-pane", "-p").split("\n")[:-1]

    def shows(self, pattern: str) -> bool:
        return bool(eventually(lambda: re.search(pattern, "\n".join(self.screen()), re.MULTILINE), every=0.05))


@pytest.fixture
def tmux(aiosd: System, tmp_path: Path) -> Iterator[Callable[..., Tmux]]:
    if shutil.which("tmux") is None:
        pytest.skip("tmux is not installed")
    made: list[Tmux] = []

    def start(*options: str) -> Tmux:
        made.append(Tmux(aiosd, tmp_path, " ".join(["aios-top", "-d", "0.2", *options])))
        return made[-1]

    yield start
    for one in made:
        one("kill-server")


def first_row(lines: list[str]) -> int:
    """The row of the first agent. Above is a line of the store, once it is used."""
    return next(number for number, line in enumerate(lines, 1) if line.split()[:1] == ["PID"])


def test_80_by_24(tmux: Callable[..., Tmux], sleepers: list[str]) -> None:
    window = tmux()
    assert window.shows(rf"^ +{sleepers[1]} S .*second$")
    lines = window.screen()
    assert lines[0].startswith("aios-top ")
    assert lines[2].startswith("nano  slots 0 of ")
    assert lines[first_row(lines) - 1].split()[0] == "PID"
    assert "q quit" in lines[23]
    assert (len(lines), max(map(len, lines)) <= 80) == (24, True)


def test_another_size(tmux: Callable[..., Tmux], sleepers: list[str]) -> None:
    window = tmux()
    assert window.shows("second$")
    window("resize-window", "-x", "40", "-y", "12")
    assert eventually(lambda: len(window.screen()) == 12 and "q quit" in window.screen()[-1])
    assert max(map(len, window.screen())) <= 40
    window("resize-window", "-x", "5", "-y", "2")  # an absurd size must not crash it
    window("resize-window", "-x", "100", "-y", "30")
    assert window.shows("second$")
    assert len(window.screen()) == 30


def test_a_small_window(tmux: Callable[..., Tmux], sleepers: list[str]) -> None:
    window = tmux()
    window("resize-window", "-x", "60", "-y", "15")
    assert window.shows(rf"^ +{sleepers[1]} S .*second$")
    assert window.shows(r"^q quit .*r renice  \(2 agents by rate\)$")
    assert max(map(len, window.screen())) <= 60
    window.type("?")
    assert window.shows("any key leaves it")
    assert max(map(len, screen.KEYS.splitlines())) <= 60, "and nothing of that page is cut"


def test_signal_and_renice_the_chosen_agent(aiosd: System, tmux: Callable[..., Tmux], sleepers: list[str]) -> None:
    window = tmux("--sort", "pid")
    assert window.shows("second$")
    window.type("k")
    assert window.shows(rf"^pid to signal \[{sleepers[0]}\]: _")
    window.type("x", "Enter")
    assert window.shows("'x' is no pid")
    window.type("r", "Enter")
    assert window.shows(rf"^nice value of {sleepers[0]} first: _")
    window.type("3", "Enter")
    assert window.shows(rf"^nice value of {sleepers[0]} is 3$")
    window.type("k", *sleepers[1], "Enter")
    assert window.shows(rf"^signal to {sleepers[1]} second \[TERM\]: _")
    window.type("Escape")
    window.type("Down", "Down")
    assert window.shows(rf"^>\s*{sleepers[1]} ")
    window.type("r", "7", "Enter")
    assert window.shows(rf"^nice value of {sleepers[1]} is 7$")
    assert window.shows(rf"^>\s*{sleepers[1]} S +7 ")
    window.type("k", "S", "T", "P", "BSpace", "O", "P", "Enter")
    assert window.shows(rf"^STOP sent to {sleepers[1]}$")
    assert window.shows(rf"^>\s*{sleepers[1]} T ")
    window.type("k", "x", "Enter")
    assert window.shows("x: no such signal")
    window.type("k", "Escape")
    assert window.shows("^q quit")
    window.type("k", "KILL", "Enter")
    assert eventually(lambda: [entry["name"] for entry in aiosd.agents()] == ["first"])
    window.type("q")
    assert window.shows("code=0")


def test_keys_sort_scroll_and_explain(aiosd: System, tmux: Callable[..., Tmux], sleepers: list[str]) -> None:
    window = tmux()
    for key, column in (("M", "mem"), ("T", "tokens"), (">", "cached"), ("<", "tokens"), ("P", "pid"), ("N", "name")):
        window.type(key)
        assert window.shows(rf"\(2 agents by {column}\)")
    window.type("R")
    assert window.shows(r"first\s*\n(.*\n)*q quit")
    lines = window.screen()
    names = [line.split()[-1] for line in lines[first_row(lines) : first_row(lines) + 2]]
    assert names == ["second", "first"]
    window.type("e")
    assert window.shows("supervisor")
    window.type("?")
    assert window.shows("any key leaves it")
    window.type("x", "d", "5", "Enter")
    assert window.shows("every 5 s")
