"""aios-run at a real terminal: an interactive bash on a pty, with keys and output as a person has them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import System, eventually

PROMPT = "READY> "
CTRL_C, CTRL_D, CTRL_Z, CTRL_BACKSLASH = "\x03", "\x04", "\x1a", "\x1c"
PATIENCE_S = 30.0


class Terminal:
    """One end of a pty whose other end is the controlling terminal of `argv`."""

    def __init__(self, system: System, *argv: str) -> None:
        self.system = system
        self.seen = ""  # all output
        self.read_to = 0  # end of the output that was awaited last
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            try:
                os.execvpe(argv[0], argv, system.env | {"PS1": PROMPT, "TERM": "dumb", "HISTFILE": "", "PS0": ""})
            finally:
                os._exit(127)
        self.resize(24, 80)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def expect(self, pattern: str, timeout: float = PATIENCE_S) -> re.Match[str]:
        """Wait for matching output after that of the last wait."""
        end = time.monotonic() + timeout
        while not (found := re.search(pattern, self.seen[self.read_to :])):
            left = end - time.monotonic()
            if left <= 0 or not self._more(left):
                pytest.fail(
                    f"no {pattern!r} on the terminal after:\n{self.seen[self.read_to :]}\n--- before:\n{self.seen}"
                )
        self.read_to += found.end()
        return found

    def _more(self, timeout: float) -> bool:
        """Read once; False at the end."""
        ready, _, _ = select.select([self.fd], [], [], timeout)
        if ready:
            try:
                data = os.read(self.fd, 65536)
            except OSError:
                return False
            self.seen += data.decode(errors="replace").replace("\r\n", "\n")
            return bool(data)
        return True

    def command(self, line: str) -> None:
        """Type a line at the prompt of the shell."""
        self.type(line + "\n")
        self.expect(re.escape(line) + "\n")  # the echo is no output of the command

    def exit_code(self) -> int:
        """$? of the last command, as soon as the shell shows its prompt."""
        self.expect(re.escape(PROMPT) + "$")
        self.command("echo code=$?")
        return int(self.expect(r"code=(\d+)\n")[1])

    def modes(self) -> list[Any]:
        return termios.tcgetattr(self.fd)[:4]

    def foreground(self) -> int:
        """The process group in the foreground."""
        return os.tcgetpgrp(self.fd)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self.fd)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGHUP)
        with contextlib.suppress(ChildProcessError):
            if not eventually(lambda: os.waitpid(self.pid, os.WNOHANG)[0]):
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)


@pytest.fixture
def terminal(aiosd: System) -> Iterator[Callable[..., Terminal]]:
    made: list[Terminal] = []

    def start(*argv: str) -> Terminal:
        made.append(Terminal(aiosd, *argv))
        return made[-1]

    yield start
    for one in made:
        one.close()


@pytest.fixture
def shell(terminal: Callable[..., Terminal]) -> Terminal:
    bash = terminal("bash", "--norc", "--noprofile", "--noediting", "-i")
    bash.expect(re.escape(PROMPT) + "$")
    return bash


def stat_of(system: System, name: str) -> str | None:
    return next((entry["stat"] for entry in system.agents() if entry["name"] == name), None)


def test_what_is_typed_reaches_the_agent_and_ctrl_d_ends_it(shell: Terminal) -> None:
    shell.command("aios-run --name typed -- cat")
    shell.type("hello\n")
    shell.expect("hello\nhello\n")
    shell.type("again\n")
    shell.expect("again\nagain\n")
    shell.type(CTRL_D)
    assert shell.exit_code() == 0


@pytest.mark.parametrize("agent", ["react", "reflexion --expect 9"])
def test_a_ready_agent_without_a_question_asks_for_it(shell: Terminal, agent: str) -> None:
    shell.command(f"aios-run -m libaios.agents.{agent}")
    shell.expect(r"The question, please \(Ctrl-D")
    shell.type("What is 4 + 5?\n" + CTRL_D)
    shell.expect(r"\b9\b")
    assert shell.exit_code() == 0
    shell.command(f"aios-run -m libaios.agents.{agent} < /dev/null")
    assert "please" not in shell.expect(r"(?s).*no question: .*stdin")[0]
    assert shell.exit_code() == 2


def test_ctrl_c_is_forwarded_as_often_as_it_is_pressed(shell: Terminal, tmp_path: Path) -> None:
    script = tmp_path / "stubborn.py"
    script.write_text(
        "import signal, sys\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})\n"
        "print('up', flush=True)\n"
        "for n in (1, 2):\n"
        "    signal.sigwait({signal.SIGINT})\n"
        "    print('interrupt', n, flush=True)\n"
        "sys.exit(4)\n"
    )
    shell.command(f"aios-run {script}")
    shell.expect("up\n")
    shell.type(CTRL_C)
    shell.expect("interrupt 1\n")
    shell.type(CTRL_C)
    shell.expect("interrupt 2\n")
    assert shell.exit_code() == 4


@pytest.mark.parametrize(("key", "code"), [(CTRL_C, 130), (CTRL_BACKSLASH, 131)], ids=["ctrl-c", "ctrl-backslash"])
def test_keys_end_an_agent_with_default_signal_handlers(shell: Terminal, key: str, code: int) -> None:
    shell.command("ulimit -c 0; aios-run -- sh -c 'echo up; exec sleep 100'")
    shell.expect("up\n")
    shell.type(key)
    assert shell.exit_code() == code


def test_ctrl_c_leaves_a_shells_loop(shell: Terminal, aiosd: System) -> None:
    agent = "sh -c 'echo up; exec sleep 100'"
    aiosd.run("sh", "-c", f"aios-run -d --name logged -- {agent}", check=True)
    for command in (f"aios-run -- {agent}", "aios-logs -f logged"):
        shell.command(f"while :; do {command}; done")
        shell.expect("up\n")
        shell.type(CTRL_C)
        assert shell.exit_code() == 130
    aiosd.run("aios-kill", "logged", check=True)


def test_ctrl_z_stops_the_agent_and_fg_continues_it(shell: Terminal, aiosd: System) -> None:
    shell.command("aios-run --name zed -- sh -c 'echo up; read line; echo got $line; exit 6'")
    shell.expect("up\n")
    shell.type(CTRL_Z)
    shell.expect("Stopped.*zed")
    shell.expect(re.escape(PROMPT) + "$")
    assert stat_of(aiosd, "zed") == "T"
    shell.command("fg")
    assert eventually(lambda: stat_of(aiosd, "zed") == "S")
    shell.type("word\n")
    shell.expect("got word\n")
    assert shell.exit_code() == 6


def test_ctrl_z_twice_and_again(shell: Terminal, aiosd: System) -> None:
    shell.command("aios-run --name zed -- sh -c 'echo up; read line; exit 6'")
    shell.expect("up\n")
    for _ in range(3):
        shell.type(CTRL_Z)
        shell.expect("Stopped.*zed")
        shell.expect(re.escape(PROMPT) + "$")
        assert stat_of(aiosd, "zed") == "T"
        shell.command("fg")
        assert eventually(lambda: stat_of(aiosd, "zed") == "S")
    shell.type("\n")
    assert shell.exit_code() == 6


def test_stopped_and_sent_to_the_background_it_runs_on(shell: Terminal, aiosd: System) -> None:
    shell.command("aios-run --name bee -- sh -c 'echo up; sleep 1; echo done in background'")
    shell.expect("up\n")
    shell.type(CTRL_Z)
    shell.expect("Stopped.*bee")
    shell.expect(re.escape(PROMPT) + "$")
    shell.command("bg")
    shell.expect("done in background\n")
    shell.command("wait; echo over")
    shell.expect("over\n")


def test_a_background_agent_takes_nothing_that_is_typed(shell: Terminal, aiosd: System) -> None:
    shell.command("aios-run --name quiet -- cat &")
    shell.expect(re.escape(PROMPT) + "$")
    assert eventually(lambda: stat_of(aiosd, "quiet"))
    for number in range(5):
        shell.command(f"echo shell has $(({number} + 40))")
        shell.expect(f"shell has {number + 40}\n")
    shell.command("fg")
    shell.expect("quiet -- cat")
    shell.type("now for cat\n")
    shell.expect("now for cat\nnow for cat\n")
    shell.type(CTRL_D)
    assert shell.exit_code() == 0


def test_killing_aios_run_hangs_its_agent_up(shell: Terminal, aiosd: System) -> None:
    shell.command("aios-run --name orphan -- sh -c 'echo up; exec sleep 100'")
    shell.expect("up\n")
    os.kill(shell.foreground(), signal.SIGKILL)
    shell.expect("Killed")
    assert eventually(lambda: stat_of(aiosd, "orphan") is None)


def test_closing_the_terminal_hangs_its_agent_up(shell: Terminal, aiosd: System) -> None:
    shell.command("aios-run --name orphan -- sh -c 'echo up; exec sleep 100'")
    shell.expect("up\n")
    shell.close()
    assert eventually(lambda: stat_of(aiosd, "orphan") is None)


def test_window_size_changes_are_passed_on(shell: Terminal) -> None:
    shell.command("aios-run -- sh -c 'trap \"echo resized; exit 3\" WINCH; echo up; while :; do sleep 0.05; done'")
    shell.expect("up\n")
    shell.resize(30, 100)
    shell.expect("resized\n")
    assert shell.exit_code() == 3


def test_output_keeps_its_order_around_a_stop(shell: Terminal) -> None:
    shell.command(
        "aios-run --name count -- sh -c 'i=0; while [ $i -lt 40 ]; do i=$((i+1)); echo n$i; sleep 0.02; done'"
    )
    shell.expect("n5\n")
    shell.type(CTRL_Z)
    shell.expect("Stopped.*count")
    shell.command("fg")
    shell.expect("n40\n")
    numbers = [int(n) for n in re.findall(r"^(?:\^Z)?n(\d+)$", shell.seen, re.MULTILINE)]  # the key is echoed
    assert numbers == list(range(1, 41))


def test_as_session_leader_without_a_shell(terminal: Callable[..., Terminal], aiosd: System) -> None:
    """Without job control Ctrl-Z stops no process, so the agent must not stay stopped either."""
    alone = terminal("aios-run", "--name", "alone", "--", "sh", "-c", "echo up; read line; echo got $line")
    alone.expect("up\n")
    alone.type(CTRL_Z)
    alone.type("word\n")
    alone.expect("got word\n")


# ── -t ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_t_gives_a_terminal_of_its_own(shell: Terminal) -> None:
    shell.resize(33, 111)
    shell.command(
        "tty; aios-run -t -- sh -c 'tty; stty size; test -t 0 -a -t 1 -a -t 2 && echo all; echo x > /dev/tty'"
    )
    ours = shell.expect(r"(/dev/pts/\d+)\n")[1]
    theirs = shell.expect(r"(/dev/pts/\d+)\n")[1]
    assert ours != theirs
    shell.expect("33 111\nall\nx\n")
    assert shell.exit_code() == 0


def test_t_passes_on_a_new_size(shell: Terminal) -> None:
    shell.command("aios-run -t -- sh -c 'trap \"stty size; exit 3\" WINCH; echo up; while :; do sleep 0.05; done'")
    shell.expect("up\n")
    shell.resize(17, 55)
    shell.expect("17 55\n")
    assert shell.exit_code() == 3


def test_t_keys_belong_to_the_agent(shell: Terminal, tmp_path: Path) -> None:
    script = tmp_path / "keys.py"
    script.write_text(
        "import sys, termios, tty\n"
        "saved = termios.tcgetattr(0)\n"
        "tty.setraw(0)\n"
        "print('up', end='\\r\\n', flush=True)\n"
        "keys = sys.stdin.buffer.raw.read(1) + sys.stdin.buffer.raw.read(1) + sys.stdin.buffer.raw.read(1)\n"
        "termios.tcsetattr(0, termios.TCSADRAIN, saved)\n"
        "print(keys)\n"
    )
    shell.command(f"aios-run -t {script}")
    shell.expect("up\n")
    shell.type(CTRL_C + CTRL_Z + CTRL_D)
    shell.expect(re.escape(repr(b"\x03\x1a\x04")) + "\n")
    assert shell.exit_code() == 0


def test_t_ctrl_c_becomes_a_signal_in_there(shell: Terminal) -> None:
    shell.command("aios-run -t -- sh -c 'trap \"echo caught; exit 9\" INT; echo up; while :; do sleep 0.05; done'")
    shell.expect("up\n")
    shell.type(CTRL_C)
    shell.expect("caught\n")
    assert shell.exit_code() == 9


def test_t_runs_an_interactive_shell_with_jobs_of_its_own(shell: Terminal) -> None:
    shell.command("aios-run -t -e PS1='inner: ' -- bash --norc --noprofile --noediting -i")
    shell.expect("inner: $")
    shell.command("cat")
    shell.type("one\n")
    shell.expect("one\none\n")
    shell.type(CTRL_Z)
    shell.expect("Stopped.*cat")
    shell.expect("inner: $")
    shell.command("fg")
    shell.expect("cat\n")
    shell.type("two\n")
    shell.expect("two\ntwo\n")
    shell.type(CTRL_C)
    shell.expect("inner: $")
    shell.command("exit 5")
    assert shell.exit_code() == 5


@pytest.mark.parametrize("how", ["exit", "agent killed", "TERM to aios-run"])
def test_t_leaves_the_terminal_as_it_was(shell: Terminal, aiosd: System, how: str) -> None:
    shell.command("true")
    shell.expect(re.escape(PROMPT) + "$")
    shell.command("sh -c 'echo $$; read x'")
    shell.expect(r"\d+\n")
    before = shell.modes()
    shell.type("\n")
    shell.expect(re.escape(PROMPT) + "$")
    shell.command("aios-run -t --name raw -- sh -c 'echo up; read line'")
    shell.expect("up\n")
    assert shell.modes() != before
    match how:
        case "exit":
            shell.type("\r")
        case "agent killed":
            aiosd.run("aios-kill", "-KILL", "raw", check=True)
        case _:
            os.kill(shell.foreground(), signal.SIGTERM)
    shell.expect(re.escape(PROMPT) + "$")
    shell.command("sh -c 'echo $$; read x'")
    shell.expect(r"\d+\n")
    assert shell.modes() == before
    shell.type("\n")


def test_t_stopped_from_outside_and_continued(shell: Terminal, aiosd: System) -> None:
    shell.command("aios-run -t --name raw -- sh -c 'echo up; read line; echo got $line; exit 2'")
    shell.expect("up\n")
    os.kill(shell.foreground(), signal.SIGTSTP)
    shell.expect("Stopped.*raw")
    shell.expect(re.escape(PROMPT) + "$")
    assert stat_of(aiosd, "raw") == "T"
    shell.command("echo cooked again")
    shell.expect("cooked again\n")
    shell.command("fg")
    assert eventually(lambda: stat_of(aiosd, "raw") == "S")
    shell.type("word\r")
    shell.expect("got word\n")
    assert shell.exit_code() == 2


def test_t_in_the_background_runs_on_and_takes_the_terminal_in_the_foreground(shell: Terminal, aiosd: System) -> None:
    """Linux stops a process that changes the terminal from the background, by TTOU at each attempt."""
    shell.command("aios-run -t --name raw -- sh -c 'echo up; read line; echo got $line' &")
    shell.expect("up\r*\n")
    shell.command("jobs")
    shell.expect(r"\[1\]\+ +Running +aios-run -t")
    cooked = shell.modes()
    shell.command("fg")
    assert eventually(lambda: shell.modes() != cooked)
    os.kill(shell.foreground(), signal.SIGTSTP)
    shell.expect("Stopped.*raw")
    shell.command("bg")
    assert eventually(lambda: stat_of(aiosd, "raw") == "S")
    shell.command("jobs")
    shell.expect(r"\[1\]\+ +Running +aios-run -t")
    shell.command("fg")
    assert eventually(lambda: shell.modes() != cooked)
    shell.type("word\r")
    shell.expect("got word\n")
    assert shell.exit_code() == 0


def test_t_all_output_arrives(shell: Terminal) -> None:
    shell.command("aios-run -t -- seq 1 20000 | tail -n 1")
    shell.expect("20000\r?\n")


@pytest.mark.parametrize("text", ["one\ntwo\n", "one\ntwo", ""], ids=["lines", "unfinished line", "nothing"])
def test_t_without_a_terminal_on_stdin(aiosd: System, text: str) -> None:
    done = aiosd.run("aios-run", "-t", "--", "cat", input=text, timeout=PATIENCE_S)
    assert done.returncode == 0
    assert done.stdout.count("two") == 2 * text.count("two")  # the echo, and cat's output


def test_t_signals_are_passed_on_while_the_reader_does_not_read(aiosd: System) -> None:
    output, printing = os.pipe()
    try:
        run = aiosd.popen("aios-run", "-t", "--name", "loud", "--", "yes", stdout=printing)
        room = select.poll()
        room.register(printing, select.POLLOUT)
        assert eventually(lambda: not room.poll(0), timeout=PATIENCE_S)
        run.send_signal(signal.SIGTERM)
        assert run.wait(PATIENCE_S) == 128 + signal.SIGTERM
    finally:
        os.close(output)
        os.close(printing)


def test_t_when_no_process_reads_any_more_the_terminal_is_gone(aiosd: System) -> None:
    run = aiosd.popen("aios-run", "-t", "--", "yes", stdin=subprocess.DEVNULL)
    assert run.stdout is not None
    assert run.stdout.readline() == "y\n"
    run.stdout.close()
    assert run.wait(30) == 128 + signal.SIGHUP


# ── signals without a terminal ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["INT", "QUIT", "TERM", "HUP", "WINCH"])
def test_signals_are_forwarded(aiosd: System, name: str) -> None:
    script = f"trap 'echo {name}; exit 8' {name}; echo up; while :; do sleep 0.05; done"
    run = aiosd.popen("aios-run", "--", "sh", "-c", script)
    assert run.stdout.readline() == "up\n"
    run.send_signal(getattr(signal, f"SIG{name}"))
    assert run.stdout.readline() == f"{name}\n"
    assert run.wait(30) == 8


def test_an_ignored_signal_is_not_forwarded(aiosd: System) -> None:
    """nohup aios-run …"""
    agent = "trap 'exit 7' HUP; trap 'exit 8' TERM; echo up; while :; do sleep 0.05; done"
    run = aiosd.popen("sh", "-c", 'trap "" HUP; exec aios-run -- sh -c "$1"', "sh", agent)
    assert run.stdout.readline() == "up\n"
    run.send_signal(signal.SIGHUP)
    run.send_signal(signal.SIGTERM)
    assert run.wait(30) == 8


def test_cont_reaches_an_agent_that_was_stopped_with_aios_kill(aiosd: System) -> None:
    run = aiosd.popen("aios-run", "--name", "held", "--", "sh", "-c", "echo up; read line; echo got $line")
    assert run.stdout.readline() == "up\n"
    aiosd.run("aios-kill", "-STOP", "held", check=True)
    assert stat_of(aiosd, "held") == "T"
    run.send_signal(signal.SIGCONT)
    assert eventually(lambda: stat_of(aiosd, "held") == "S")
    run.stdin.write("word\n")
    run.stdin.flush()
    assert run.stdout.readline() == "got word\n"
    assert run.wait(30) == 0
