"""aios-attach: coming back to a detached agent, and to the terminal of one that was started with -d -t."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiosd.commands.detachkeys import DetachKeys, parse
from tests.conftest import System, eventually, offspring
from tests.test_jobcontrol import CTRL_BACKSLASH, CTRL_C, CTRL_Z, PATIENCE_S, PROMPT, Terminal, stat_of

Fresh = Callable[..., System]
DETACH = "\x10\x11"  # Ctrl-P Ctrl-Q
LOOP = "while :; do sleep 0.05; done"


def start(system: System, script: str, *options: str, name: str = "watched") -> str:
    argv = ["aios-run", "-d", *options, "--name", name, "--", "sh", "-c", script]
    return system.run(*argv, check=True).stdout.strip()


def attach(system: System, word: str, *options: str) -> subprocess.Popen[str]:
    return system.popen("aios-attach", *options, word)


def line_of(command: subprocess.Popen[str]) -> str:
    assert command.stdout is not None
    return command.stdout.readline()


def ospid_of(system: System, name: str) -> int:
    return next(entry["ospid"] for entry in system.ps() if entry["name"] == name)


# ── keys that detach ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "keys"),
    [("ctrl-p,ctrl-q", b"\x10\x11"), ("a", b"a"), ("ctrl-@,Ctrl-[", b"\0\x1b"), ("ctrl-\\,~", b"\x1c~"), ("", b"")],
)
def test_keys(text: str, keys: bytes) -> None:
    assert parse(text) == keys


@pytest.mark.parametrize("text", ["ctrl-", "ctrl-ab", "ctrl-1", "ab", "ü", ",", "a,"])
def test_no_keys(text: str) -> None:
    with pytest.raises(ValueError, match="is no key"):
        parse(text)


@given(st.lists(st.binary(max_size=4).map(lambda b: bytes(97 + x % 3 for x in b))), st.sampled_from([b"ab", b"aab"]))
def test_keys_are_found_however_they_arrive(pieces: list[bytes], keys: bytes) -> None:
    finder, passed, found = DetachKeys(keys), b"", False
    for piece in pieces:
        out, found = finder.feed(piece)
        passed += out
        if found:
            break
    typed = b"".join(pieces)
    assert found == (keys in typed)
    if found:
        assert passed == typed.partition(keys)[0]
    else:
        assert typed.startswith(passed)
        assert keys.startswith(typed[len(passed) :])


# ── a log ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_end_of_the_log_then_what_comes_then_the_agents_status(aiosd: System) -> None:
    pid = start(aiosd, "seq 1 12; while [ ! -e $AIOS_HOME/on ]; do sleep 0.02; done; printf last; exit 5")
    assert eventually(lambda: aiosd.run("aios-logs", "--tail", "1", pid).stdout == "12\n")
    views = [attach(aiosd, "watched"), attach(aiosd, pid, "--tail", "2")]
    assert [line_of(views[0]) for _ in range(10)] == [f"{n}\n" for n in range(3, 13)]
    assert [line_of(views[1]) for _ in range(2)] == ["11\n", "12\n"]
    (aiosd.home / "on").touch()
    assert [view.communicate(timeout=PATIENCE_S)[0] for view in views] == ["last"] * 2
    assert [view.returncode for view in views] == [5] * 2
    (aiosd.home / "on").unlink()
    again = aiosd.run("aios-attach", "--tail", "1", pid)
    assert (again.returncode, again.stdout) == (5, "last")


def test_tail_0_shows_nothing_of_what_was_before(aiosd: System) -> None:
    pid = start(aiosd, "i=0; while :; do i=$((i+1)); echo $i; sleep 0.02; done")
    assert eventually(lambda: aiosd.run("aios-logs", pid).stdout)
    before = int(aiosd.run("aios-logs", "--tail", "1", pid).stdout)
    view = attach(aiosd, pid, "--tail", "0")
    assert int(line_of(view)) > before
    view.send_signal(signal.SIGQUIT)
    assert view.wait(PATIENCE_S) == 128 + signal.SIGQUIT


def test_the_status_is_that_of_aios_run(aiosd: System) -> None:
    done = aiosd.run("aios-attach", start(aiosd, "sleep 300", "--time", "0.2"))
    assert done.returncode == 124
    assert re.fullmatch(r"aios-attach: agent \d+: time budget of 0.2 s used up\n", done.stderr)
    assert aiosd.run("aios-attach", start(aiosd, "kill -TERM $$")).returncode == 143


@pytest.mark.parametrize("name", ["INT", "QUIT"])
def test_int_and_quit_are_passed_on(aiosd: System, name: str) -> None:
    view = attach(aiosd, start(aiosd, f"trap 'echo {name}; exit 8' {name}; echo up; {LOOP}"))
    assert line_of(view) == "up\n"
    view.send_signal(getattr(signal, f"SIG{name}"))
    assert f"{name}\n" in view.communicate(timeout=PATIENCE_S)[0]  # after the shell's line about its child
    assert view.returncode == 8


def test_an_agent_that_dies_of_our_int_takes_us_with_it(aiosd: System) -> None:
    view = attach(aiosd, start(aiosd, "echo up; exec sleep 300"))
    assert line_of(view) == "up\n"
    view.send_signal(signal.SIGINT)
    assert view.wait(PATIENCE_S) == -signal.SIGINT


@pytest.mark.parametrize(("options", "number"), [(["--no-signals"], 2), ([], 1), ([], 15)], ids=["INT", "HUP", "TERM"])
def test_what_detaches_and_does_not_end_the_agent(aiosd: System, options: list[str], number: int) -> None:
    pid = start(aiosd, "echo up; exec sleep 300")
    view = attach(aiosd, pid, *options)
    assert line_of(view) == "up\n"
    view.send_signal(number)
    assert view.wait(PATIENCE_S) == -number
    assert eventually(lambda: stat_of(aiosd, "watched") == "S")
    aiosd.run("aios-kill", pid, check=True)


def test_nothing_of_it_is_lost_when_the_kernel_dies(fresh_aiosd: Fresh) -> None:
    system = fresh_aiosd()
    pid = start(system, f"trap 'echo caught; exit 6' INT; echo up; {LOOP}")
    view = attach(system, pid)
    assert line_of(view) == "up\n"
    os.kill(ospid_of(system, "kernel"), signal.SIGKILL)
    view.send_signal(signal.SIGINT)
    assert line_of(view) == "caught\n"
    assert view.wait(PATIENCE_S) == 6


def test_when_aiosd_has_ended_it_reports_that(fresh_aiosd: Fresh) -> None:
    system = fresh_aiosd()
    view = attach(system, start(system, "echo up; exec sleep 300"))
    assert line_of(view) == "up\n"
    assert system.daemon is not None
    system.daemon.kill()
    assert view.wait(PATIENCE_S) == 125
    assert view.stderr is not None
    assert view.stderr.read() == "aios-attach: aiosd is gone\n"


def test_what_cannot_be_watched(aiosd: System, fresh_aiosd: Fresh) -> None:
    run = aiosd.popen("aios-run", "--name", "here", "--", "sh", "-c", "echo up; read x")
    assert line_of(run) == "up\n"
    for word, code in (("here", 125), ("kernel", 125), ("1", 125), ("999999", 127), ("nobody", 127)):
        done = aiosd.run("aios-attach", word)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1), word
        assert done.stderr.startswith(f"aios-attach: {word}: ")
    run.communicate("\n", timeout=PATIENCE_S)
    none = fresh_aiosd(start=False)
    assert none.run("aios-attach", "1").returncode == 125
    for args in ([], ["--tail", "-1", "1"], ["--detach-keys", "ctrl-", "1"], ["1", "2"]):
        done = none.run("aios-attach", *args)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_it_ends_when_its_reader_has_gone(aiosd: System) -> None:
    pid = start(aiosd, "echo up; exec sleep 300")
    view = attach(aiosd, pid)
    assert line_of(view) == "up\n"
    assert view.stdout is not None
    view.stdout.close()
    assert view.wait(PATIENCE_S) == 141
    aiosd.run("aios-kill", pid, check=True)


def test_signals_are_passed_on_while_the_reader_does_not_read(aiosd: System) -> None:
    output, printing = os.pipe()
    try:
        view = aiosd.popen(
            "aios-attach", start(aiosd, "seq 1 100000; exec sleep 300"), "--tail", "90000", stdout=printing
        )
        os.close(printing)
        assert os.read(output, 1)
        view.send_signal(signal.SIGINT)
        assert eventually(lambda: stat_of(aiosd, "watched") is None)
        with open(output, closefd=False) as file:
            assert file.read().endswith("100000\n")
        assert view.wait(PATIENCE_S) == -signal.SIGINT
    finally:
        os.close(output)


# ── at a terminal ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def shells(aiosd: System) -> Iterator[Callable[[], Terminal]]:
    made: list[Terminal] = []

    def new() -> Terminal:
        made.append(Terminal(aiosd, "bash", "--norc", "--noprofile", "--noediting", "-i"))
        made[-1].expect(re.escape(PROMPT) + "$")
        return made[-1]

    yield new
    for one in made:
        one.close()


@pytest.fixture
def shell(shells: Callable[[], Terminal]) -> Terminal:
    return shells()


@pytest.mark.parametrize(("key", "code"), [(CTRL_C, 130), (CTRL_BACKSLASH, 131)], ids=["ctrl-c", "ctrl-backslash"])
def test_keys_end_the_agent(shell: Terminal, aiosd: System, key: str, code: int) -> None:
    start(aiosd, "ulimit -c 0; echo up; exec sleep 300")
    shell.command("aios-attach watched")
    shell.expect("up\n")
    shell.type(key)
    assert shell.exit_code() == code


def test_ctrl_z_stops_the_view_alone(shell: Terminal, aiosd: System) -> None:
    start(aiosd, "echo up; while [ ! -e $AIOS_HOME/zed ]; do sleep 0.02; done; echo later; exit 4")
    shell.command("aios-attach watched")
    shell.expect("up\n")
    shell.type(CTRL_Z)
    shell.expect("Stopped.*watched")
    shell.expect(re.escape(PROMPT) + "$")
    (aiosd.home / "zed").touch()
    assert eventually(lambda: stat_of(aiosd, "watched") is None)
    shell.command("fg")
    shell.expect("later\n")
    assert shell.exit_code() == 4
    (aiosd.home / "zed").unlink()


def test_closing_the_terminal_detaches(shell: Terminal, aiosd: System) -> None:
    pid = start(aiosd, "echo up; exec sleep 300")
    shell.command("aios-attach watched")
    shell.expect("up\n")
    view = psutil.Process(shell.foreground())
    shell.close()
    assert eventually(lambda: not view.is_running())
    assert eventually(lambda: stat_of(aiosd, "watched") == "S")
    aiosd.run("aios-kill", pid, check=True)


# ── -d -t ─────────────────────────────────────────────────────────────────────────────────────────────────


def held(
    system: System, script: str = "echo up; while read x; do echo got $x; done; echo end", name: str = "held"
) -> str:
    return start(system, script, "-t", name=name)


def holders() -> list[psutil.Process]:
    return [process for process in offspring() if is_holder(process)]


def is_holder(process: psutil.Process) -> bool:
    try:
        return process.name() == "aios-holder"
    except psutil.NoSuchProcess:  # it has ended since
        return False


def sockets(system: System) -> list[Path]:
    return [path for path in system.home.rglob("*") if path.is_socket() and path.name != "aiosd.sock"]


def test_dt_type_detach_come_back_and_end(shell: Terminal, aiosd: System) -> None:
    held(aiosd)
    shell.command("stty -a | md5sum")
    before = shell.expect(r"[0-9a-f]{32}")[0]
    shell.command("aios-attach held")
    shell.expect("up\n")
    shell.type("one\r")
    shell.expect("one\ngot one\n")
    shell.type(DETACH)
    shell.expect("aios-attach: detached; agent [0-9]+ goes on")
    assert shell.exit_code() == 0
    shell.command("stty -a | md5sum")
    assert shell.expect(r"[0-9a-f]{32}")[0] == before
    assert eventually(lambda: stat_of(aiosd, "held") == "S")
    shell.command("aios-attach held")
    shell.expect("up\none\ngot one\n")  # what was on the screen before
    shell.type("\x04")
    shell.expect("end\n")
    assert shell.exit_code() == 0
    assert eventually(lambda: not holders())
    assert sockets(aiosd) == []


def test_dt_keys_and_the_window_belong_to_the_agent(shell: Terminal, aiosd: System) -> None:
    shell.resize(33, 111)
    shell.command(
        r"aios-run -dt --name held -- sh -c 'stty size; trap \"stty size\" WINCH; trap \"echo int; exit 9\" INT; "
        r"echo up; while :; do sleep 0.05; done'".replace('\\"', '"')
    )
    shell.expect(re.escape(PROMPT) + "$")
    shell.command("aios-attach held")
    shell.expect("33 111\nup\n")
    shell.expect("33 111\n")  # it gets WINCH and paints again
    shell.resize(17, 55)
    shell.expect("17 55\n")
    shell.type(CTRL_C)
    shell.expect("int\n")
    assert shell.exit_code() == 9


def test_dt_other_keys_to_detach(shell: Terminal, aiosd: System) -> None:
    pid = held(aiosd)
    shell.command("aios-attach --detach-keys ctrl-a,d held")
    shell.expect("up\n")
    shell.type("\x10\x11x\r")  # now these keys go to the agent
    shell.expect("got .*x\n")
    shell.type("\x01d")
    shell.expect("detached")
    assert shell.exit_code() == 0
    aiosd.run("aios-kill", "-KILL", pid, check=True)


def test_dt_several_at_once(shells: Callable[[], Terminal], aiosd: System) -> None:
    held(aiosd)
    one, two = shells(), shells()
    for shell in (one, two):
        shell.command("aios-attach held")
        shell.expect("up\n")
    one.type("first\r")
    two.expect("got first\n")
    two.type("second\r")
    one.expect("got second\n")
    one.type(DETACH)
    assert one.exit_code() == 0
    two.type("\x04")
    two.expect("end\n")
    assert two.exit_code() == 0


@pytest.mark.parametrize("how", ["TERM", "HUP", "INT", "agent killed", "holder killed", "no signal for the agent"])
def test_dt_leaves_the_terminal_as_it_was(shell: Terminal, aiosd: System, how: str) -> None:
    pid = held(aiosd, "trap '' HUP; echo up; exec sleep 300" if how.startswith("no") else "echo up; exec sleep 300")
    shell.command("true")
    shell.expect(re.escape(PROMPT) + "$")
    shell.command("sh -c 'echo $$; read x'")
    shell.expect(r"\d+\n")
    before = shell.modes()
    shell.type("\n")
    shell.expect(re.escape(PROMPT) + "$")
    shell.command("aios-attach held")
    shell.expect("up\n")
    assert eventually(lambda: shell.modes() != before)
    match how:
        case "agent killed":
            aiosd.run("aios-kill", "-KILL", pid, check=True)
        case "holder killed":
            holders()[0].kill()
        case "no signal for the agent":  # the agent lives on without its terminal: Ctrl-C is a signal again
            holders()[0].kill()
            assert eventually(lambda: shell.modes() == before)
            shell.type(CTRL_C)
        case _:
            os.kill(shell.foreground(), getattr(signal, f"SIG{how}"))
    shell.expect(re.escape(PROMPT) + "$")
    shell.command("sh -c 'echo $$; read x'")
    shell.expect(r"\d+\n")
    assert shell.modes() == before
    shell.type("\n")
    aiosd.run("aios-kill", "-KILL", pid)


def test_dt_stopped_from_outside_and_continued(shell: Terminal, aiosd: System) -> None:
    held(aiosd)
    shell.command("aios-attach held")
    shell.expect("up\n")
    os.kill(shell.foreground(), signal.SIGTSTP)
    shell.expect("Stopped.*held")
    shell.expect(re.escape(PROMPT) + "$")
    assert eventually(lambda: stat_of(aiosd, "held") == "S")
    shell.command("fg")
    shell.expect("held\n")
    shell.type("word\r")
    shell.expect("got word\n")
    shell.type("\x04")
    assert shell.exit_code() == 0


def test_dt_in_the_background_it_shows_and_ends_and_takes_no_keys(shell: Terminal, aiosd: System) -> None:
    held(aiosd)
    shell.command("aios-attach held &")
    shell.expect("up\r*\n")
    shell.command("echo $((40 + 2))")
    shell.expect("42\n")
    shell.command("kill %1; wait %1; echo code=$?")
    shell.expect("code=143\n")
    shell.command("aios-attach held &")
    shell.expect("up\r*\n")
    shell.command("fg")
    shell.expect("held\r*\n")
    shell.type("word\r")
    shell.expect("got word\n")
    shell.type("\x04")
    assert shell.exit_code() == 0


def test_dt_an_agent_that_closes_its_terminal_goes_on(shell: Terminal, aiosd: System) -> None:
    held(aiosd, "echo up; exec <&- >&- 2>&-; while [ ! -e $AIOS_HOME/closed ]; do sleep 0.02; done; exit 5")
    shell.command("aios-attach held")
    shell.expect("up\n")
    shell.type("keys for no program\r" + DETACH)
    assert shell.exit_code() == 0
    shell.command("aios-attach --tail 1 held")
    shell.expect("up\n")
    (aiosd.home / "closed").touch()
    assert shell.exit_code() == 5
    (aiosd.home / "closed").unlink()


def test_dt_all_output_is_in_the_log(aiosd: System) -> None:
    pid = held(aiosd, "seq 1 20000; exit 3")
    done = aiosd.run("aios-attach", "--tail", "20000", pid)  # without a terminal: the log alone
    assert (done.returncode, done.stdout.replace("\r", "")) == (3, "".join(f"{n}\n" for n in range(1, 20001)))


def test_dt_has_a_size_where_there_is_no_terminal(aiosd: System) -> None:
    assert aiosd.run("aios-attach", held(aiosd, "stty size; tty")).stdout.startswith("24 80\n/dev/pts/")


def test_dt_a_failed_start_is_reported_as_by_aios_run(aiosd: System, fresh_aiosd: Fresh) -> None:
    done = aiosd.run("aios-run", "-dt", "--", "no-such-program")
    assert (done.returncode, done.stderr) == (127, "aios-run: no-such-program: not found\n")
    none = fresh_aiosd(start=False).run("aios-run", "-dt", "--", "true")
    assert (none.returncode, none.stderr.split(" (")[0]) == (125, "aios-run: no aiosd is running")
    inside = aiosd.run("aios-run", "--", "aios-run", "-dt", "--", "true")
    assert (inside.returncode, inside.stderr.count("only a person can")) == (1, 1)
    assert not holders()


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_dt_no_holder_outlives_aiosd(fresh_aiosd: Fresh, end: str) -> None:
    system = fresh_aiosd(env={"AIOSD_STOP_TIMEOUT": "0.5"})
    held(system, "trap '' HUP TERM; exec sleep 300")
    assert len(holders()) == 1
    if end == "stop":
        system.run("aiosd", "stop", check=True)
    else:
        assert system.daemon is not None
        system.daemon.kill()
    assert eventually(lambda: not holders())
    assert sockets(system) == []


def test_dt_a_dead_kernel_is_survived_and_a_dead_holder_hangs_up(fresh_aiosd: Fresh) -> None:
    system = fresh_aiosd(home=None)
    pid = held(system, f"trap 'echo hung up >$AIOS_HOME/told; exit 7' HUP; echo up; {LOOP}")
    os.kill(ospid_of(system, "kernel"), signal.SIGKILL)
    assert stat_of(system, "held") in ("S", "R")
    (holder,) = holders()
    holder.kill()
    assert system.run("aios-wait", pid).returncode == 7
    assert (system.home / "told").read_text() == "hung up\n"


def test_dt_in_a_home_with_a_long_path(fresh_aiosd: Fresh, tmp_path: Path) -> None:
    home = tmp_path / ("long" * 30)
    home.mkdir()
    system = fresh_aiosd(home=home)
    held(system, "read x; echo got $x; exit 2")
    line = f"stty -echo; aios-attach {shlex.quote('held')}; echo code=$?"
    terminal = Terminal(system, "sh", "-c", line)
    terminal.type("this\r")
    terminal.expect("got this\n")
    terminal.expect("code=2\n")
    terminal.close()
