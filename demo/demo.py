"""`make demo`: the system from boot to shutdown, with the embedded model, in a temporary home.

It boots aiosd, asks one agent a question, runs three more at once with a fourth that never ends, lists them, kills the
fourth, runs an agent of a group with fewer rights, shuts down, and checks that no process is left. Each command is
shown as one would type it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
#: Agents and their options: an agent may change files in the folder where it is started only if that is granted.
CLERKS = {"adder": "", "keeper": "", "writer": "--write . "}
#: The system's settings: agents of the group guests may not call the tool shell.
RULES = """\
[access]
deny = [{ tool = "shell", by = "guests" }]
"""
PATIENCE_S = 60.0
BOLD, DIM, PLAIN = ("\x1b[1m", "\x1b[2m", "\x1b[m") if sys.stdout.isatty() else ("", "", "")


class Terminal:
    """Runs commands and shows each with its output, as in a shell."""

    def __init__(self, home: Path, desk: Path) -> None:
        self.home, self.desk = home, desk
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        self.env = os.environ | {"AIOS_HOME": str(home), "PATH": path, "PYTHONUNBUFFERED": "1"}
        self.jobs: list[tuple[str, subprocess.Popen[bytes], Path]] = []

    def say(self, words: str) -> None:
        print(f"\n{DIM}# {words}{PLAIN}", flush=True)

    def type(self, line: str) -> int:
        """Run one command in the foreground."""
        print(f"{BOLD}$ {line}{PLAIN}", flush=True)
        return subprocess.call(
            shlex.split(line), env=self.env, cwd=self.desk, stderr=subprocess.STDOUT, timeout=PATIENCE_S
        )

    def type_and_read(self, line: str) -> str:
        """Run one command in the foreground; returns its output."""
        print(f"{BOLD}$ {line}{PLAIN}", flush=True)
        done = subprocess.run(
            shlex.split(line), env=self.env, cwd=self.desk, stdout=subprocess.PIPE, text=True, timeout=PATIENCE_S
        )
        print(done.stdout, end="", flush=True)
        return done.stdout.strip()

    def type_in_background(self, line: str) -> None:
        """Run `command < file &`. `wait` prints its output, so that the outputs of several do not mix."""
        print(f"{BOLD}$ {line} &{PLAIN}", flush=True)
        command, stdin = line.split(" < ")
        output = self.desk / f"{stdin}.out"
        with open(self.desk / stdin, "rb") as read, open(output, "wb") as write:
            job = subprocess.Popen(shlex.split(command), env=self.env, cwd=self.desk, stdin=read, stdout=write)
        self.jobs.append((stdin.removesuffix(".txt"), job, output))

    def wait(self) -> None:
        print(f"{BOLD}$ wait{PLAIN}", flush=True)
        for name, job, output in self.jobs:
            job.wait(PATIENCE_S)
            print(f"{name}:\n{output.read_text()}", end="", flush=True)

    def sandbox(self) -> str:
        """The level of the sandbox in which agents run."""
        done = subprocess.run(
            ["aiosd", "status", "--json"], env=self.env, stdout=subprocess.PIPE, check=True, timeout=20
        )
        return str(json.loads(done.stdout)["sandbox"]["default"])

    def live_agents(self) -> set[str]:
        done = subprocess.run(["aios-ps", "-e", "--json"], env=self.env, stdout=subprocess.PIPE, check=True, timeout=20)
        return {entry["name"] for entry in json.loads(done.stdout) if entry["exit"] is None}

    def left_over(self) -> list[int]:
        """Processes that still belong to the home."""
        mark = f"AIOS_HOME={self.home}".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return found


def main() -> int:
    home = Path(tempfile.mkdtemp(prefix="aios-demo-"))
    desk = home / "desk"
    desk.mkdir()
    for file in [*HERE.glob("*.txt"), HERE / "clerk.py", HERE / "endless.py"]:
        shutil.copy(file, desk)
    (desk / "guests").mkdir()
    shutil.copy(HERE / "guest.py", desk / "guests")
    (desk / "keys.txt").write_text("a secret\n")
    (home / "aiosd.toml").write_text(RULES)
    terminal = Terminal(home, desk)
    try:
        return show(terminal)
    except (subprocess.SubprocessError, KeyboardInterrupt) as err:
        print(f"demo: {err or 'interrupted'}", file=sys.stderr)
        return 1
    finally:
        for process in terminal.left_over():  # there are some only if something went wrong
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        shutil.rmtree(home, ignore_errors=True)


def show(terminal: Terminal) -> int:
    terminal.say("boot: kernel and language model, in the background")
    if terminal.type("aiosd -d"):
        return 1

    terminal.say("an agent is a process that thinks with the model; -v shows its thoughts")
    if terminal.type('aios-run -m libaios.agents.react -v "What is 37 * 91?"'):
        return 1

    terminal.say("three at once, each with its own list of questions, and one that never ends")
    endless = terminal.type_and_read("aios-run -d --name endless endless.py")
    for name, grant in CLERKS.items():
        terminal.type_in_background(f"aios-run {grant}--name {name} clerk.py < {name}.txt")
    wait_for(terminal, {"endless", *CLERKS})
    terminal.type("aios-ps -e")

    terminal.say("end the one that never ends by itself; 143 is 128 + SIGTERM")
    terminal.type("aios-kill endless")
    print(f"exit code {terminal.type(f'aios-wait {endless}')}")

    terminal.say("the others go on undisturbed")
    terminal.wait()

    terminal.say("a guest: its model may call a tool; a rule denies another tool, and its sandbox hides a file")
    terminal.type("tail -n 1 ../aiosd.toml")
    terminal.type("aios-run -g guests --tool-calls 5 guests/guest.py keys.txt")
    if terminal.sandbox() != "none":
        terminal.type("aios-inspect guest --why keys.txt")

    terminal.say("shut down")
    if terminal.type("aiosd stop"):
        return 1
    end = time.monotonic() + 5
    while (left := terminal.left_over()) and time.monotonic() < end:
        time.sleep(0.05)
    if left:
        print(f"demo: processes left behind: {left}", file=sys.stderr)
        return 1
    print("\nNothing is left: no process, no socket, no segment.")
    return 0


def wait_for(terminal: Terminal, names: set[str]) -> None:
    """Wait until all agents run, or until the first has ended."""
    end = time.monotonic() + 5
    while not names <= terminal.live_agents() and time.monotonic() < end:
        if any(job.poll() is not None for _, job, _ in terminal.jobs):
            return
        time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main())
