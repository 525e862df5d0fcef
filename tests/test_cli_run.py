"""aios-run without a terminal: arguments, what the agent gets, exit codes, and a kernel that dies meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiosd.commands.run import command, split
from aiosd.units import format_duration, format_size, parse_count, parse_duration, parse_size
from tests.conftest import System, eventually

Fresh = Callable[..., System]

VALUED = {word for p in command.params if not getattr(p, "is_flag", True) for word in p.opts}

# ── arguments ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("args", "options", "kind", "target"),
    [
        ("a.py", "", "file", "a.py"),
        ("a.py -d -- x", "", "file", "a.py -d -- x"),
        ("-d a.py -t", "-d", "file", "a.py -t"),
        ("-n 5 a.py", "-n 5", "file", "a.py"),
        ("-n5 a.py", "-n5", "file", "a.py"),
        ("-dn 5 a.py", "-dn 5", "file", "a.py"),
        ("-n -5 a.py", "-n -5", "file", "a.py"),
        ("--name x a.py", "--name x", "file", "a.py"),
        ("--name=x a.py", "--name=x", "file", "a.py"),
        ("--name -m a.py", "--name -m", "file", "a.py"),
        ("-m mod", "", "module", "mod"),
        ("-m mod -m -d -- x", "", "module", "mod -m -d -- x"),
        ("-mmod x", "", "module", "mod x"),
        ("-dm mod x", "-d", "module", "mod x"),
        ("-d -m mod", "-d", "module", "mod"),
        ("-e A=1 -e B=2 -m mod", "-e A=1 -e B=2", "module", "mod"),
        ("-- prog -x -- y", "", "exec", "prog -x -- y"),
        ("-t -- prog", "-t", "exec", "prog"),
        ("--memory 1G --time 3 -- prog", "--memory 1G --time 3", "exec", "prog"),
        ("-d", "-d", "file", ""),
        ("", "", "file", ""),
        ("-m", "", "module", ""),
        ("--", "", "exec", ""),
    ],
)
def test_split(args: str, options: str, kind: str, target: str) -> None:
    assert split(args.split(), VALUED) == (options.split(), kind, target.split())


@given(st.lists(st.text(max_size=5)))
def test_nothing_after_the_target_is_touched(args: list[str]) -> None:
    for start, kind in ((["x.py"], "file"), (["--", "x"], "exec"), (["-m", "x"], "module")):
        assert split([*start, *args], VALUED) == ([], kind, [start[-1], *args])


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("1k", 1024),
        ("1.5M", 3 << 19),
        ("2G", 2 << 30),
        ("2GiB", 2 << 30),
        ("2GB", 2 << 30),
        ("1T", 1 << 40),
        ("7b", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "x", "1X", "1e3", "M", "1 2", "0.0001"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


@given(st.integers(0, 1 << 50))
def test_a_size_reads_as_about_what_it_was(size: int) -> None:
    text = format_size(size)
    assert len(text) <= 6
    if size > 0:
        assert abs(parse_size(text) - size) <= size * 0.06


@pytest.mark.parametrize(("text", "seconds"), [("42s", 42), ("10m", 600), ("1h30m", 5400), ("1.5d", 129600)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "m", "10x", "1h 30m", "-1s"])
def test_no_durations(text: str) -> None:
    with pytest.raises(ValueError, match="no length of time"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "count"), [("0", 0), ("500", 500), ("10k", 10_000), ("1.5M", 1_500_000), ("2K", 2000)]
)
def test_counts(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5", "10 k", "1G"])
def test_no_counts(text: str) -> None:
    with pytest.raises(ValueError, match="whole number"):
        parse_count(text)


def test_budgets_with_units(aiosd: System, tmp_path: Path) -> None:
    options = ["--time", "1h30m", "--tokens", "10k", "--memory", "1G"]
    pid = aiosd.run("aios-run", "-d", *options, "--", "sleep", "300", check=True).stdout.strip()
    (found,) = json.loads(aiosd.run("aios-inspect", pid, check=True).stdout)
    (budget,) = found["budgets"]
    assert (budget["time_s"], budget["tokens"], budget["memory_bytes"]) == (5400, 10_000, 1 << 30)
    aiosd.run("aios-kill", pid, check=True)


def test_durations_for_people() -> None:
    assert [format_duration(s) for s in (0, 61, 3661, 90000)] == ["0 s", "1 min 1 s", "1 h 1 min", "1 d 1 h"]


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["-d"],
        ["-m"],
        ["--"],
        ["-d", "-t", "--restart", "always", "x.py"],
        ["--nosuch", "x.py"],
        ["-n", "99", "x.py"],
        ["-e", "=v", "x.py"],
        ["--memory", "lots", "x.py"],
        ["--time", "-1", "x.py"],
        ["--time", "nan", "x.py"],
        ["--time", "inf", "x.py"],
        ["--tokens", "x", "x.py"],
    ],
    ids=" ".join,
)
def test_wrong_use_is_exit_2_and_one_line(fresh_aiosd: Fresh, args: list[str]) -> None:
    done = fresh_aiosd(start=False).run("aios-run", *args)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith("aios-run: ")


def test_numbers_are_called_by_their_names(fresh_aiosd: Fresh) -> None:
    system = fresh_aiosd(start=False)
    for option, words in (("--time", "number of seconds"), ("--tokens", "whole number"), ("-n", "whole number")):
        assert f"'abc' is not a valid {words}" in system.run("aios-run", option, "abc", "x.py").stderr


# ── what the agent gets ───────────────────────────────────────────────────────────────────────────────────


def test_arguments_environment_folder_umask_streams(aiosd: System, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    script = tmp_path / "agent.py"
    script.write_text(
        "import json, os, sys\n"
        "mask = os.umask(0)\n"
        "env = {k: os.environ.get(k) for k in ('FROM_CALLER', 'EXTRA', 'AIOS_HOME')}\n"
        "print(json.dumps([sys.argv[1:], os.getcwd(), mask, env, sys.stdin.read()]))\n"
        "print('to stderr', file=sys.stderr)\n"
    )
    odd = ["-x", "--", "", "a b", "ü", "*", "-m"]
    done = subprocess.run(
        ["sh", "-c", 'umask 027; exec aios-run -e EXTRA=a=b "$@"', "sh", script, *odd],
        env=aiosd.env | {"FROM_CALLER": "yes"},
        cwd=tmp_path / "here",
        input="typed\n",
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    env = {"FROM_CALLER": "yes", "EXTRA": "a=b", "AIOS_HOME": str(aiosd.home)}
    assert json.loads(done.stdout) == [odd, str(tmp_path / "here"), 0o027, env, "typed\n"]
    assert done.stderr == "to stderr\n"


def test_its_very_descriptors_are_passed(aiosd: System, tmp_path: Path) -> None:
    """A file stays a file: the agent can seek in it, and appends if the shell opened it so."""
    (tmp_path / "in").write_text("0123456789")
    (tmp_path / "out").write_text("before\n")
    script = "import os; os.lseek(0, 5, 0); os.write(1, os.read(0, 9) + b'\\n')"
    line = f'aios-run -- python3 -c "{script}" <{tmp_path}/in >>{tmp_path}/out'
    assert aiosd.run("sh", "-c", line).returncode == 0
    assert (tmp_path / "out").read_text() == "before\n56789\n"


def test_closed_descriptors(aiosd: System) -> None:
    done = aiosd.run("sh", "-c", "aios-run -- sh -c 'cat; echo out' <&-")
    assert (done.returncode, done.stdout) == (0, "out\n")
    assert aiosd.run("sh", "-c", "aios-run -- true >&- 2>&-").returncode == 0


def test_a_reader_that_goes_away_ends_the_agent_as_in_a_shell(aiosd: System) -> None:
    done = aiosd.run("sh", "-c", "aios-run -- yes | head -n 1")
    assert done.stdout == "y\n"
    assert eventually(lambda: aiosd.agents() == [])


def test_what_is_printed_is_seen_at_once_where_python_shows_it(aiosd: System, tmp_path: Path) -> None:
    script = tmp_path / "agent.py"
    script.write_text("import sys\nprint('now')\nsys.stdin.read()\n")
    run = aiosd.popen("aios-run", script, env={"PYTHONUNBUFFERED": "1"})
    assert run.stdout is not None
    assert run.stdout.readline() == "now\n"
    run.communicate("")
    script.write_text("import signal\nprint('now')\nsignal.pause()\n")
    pid = aiosd.run("aios-run", "-d", script, check=True).stdout.strip()
    assert eventually(lambda: aiosd.run("aios-logs", pid).stdout == "now\n"), "a log is written line by line"
    aiosd.run("aios-kill", pid, check=True)


def test_the_callers_time_zone(aiosd: System, tmp_path: Path) -> None:
    (tmp_path / "agent.py").write_text("import time\nprint(time.strftime('%z', time.localtime(0)))\n")
    done = aiosd.run("aios-run", tmp_path / "agent.py", env={"TZ": "ABC-9"}, check=True)
    assert done.stdout == "+0900\n"


def test_modules_are_not_looked_for_beside_aiosd(aiosd: System, tmp_path: Path) -> None:
    (tmp_path / "agent.py").write_text("import shutil, sys\nprint(sys.path[0], shutil.which('aiosd'), *sys.path[1:])\n")
    first, command, *others = aiosd.run("aios-run", tmp_path / "agent.py", check=True).stdout.split()
    assert first == str(tmp_path)
    assert os.path.dirname(os.path.realpath(command)) not in others


def run_bytes(system: System, *argv: bytes, env: dict[bytes, bytes] | None = None, cwd: bytes | None = None) -> bytes:
    """Run a command whose words may be any bytes; returns its output."""
    done = subprocess.run(
        argv,
        env={os.fsencode(k): os.fsencode(v) for k, v in system.env.items()} | (env or {}),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=30,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout


SHOW = b"""import os, sys
out = sys.stdout.buffer
for word in (*sys.argv, os.environ["ODD"], os.getcwd(), __file__): out.write(os.fsencode(word) + b"|")
out.write(os.environb[b"ODD"] + b"|" + open("/proc/self/cmdline", "rb").read().split(bytes(1))[-2])
"""


def test_bytes_that_are_not_utf8_arrive_as_they_are(aiosd: System, tmp_path: Path) -> None:
    odd, folder = b"a\xff\xfe\xc3", os.fsencode(tmp_path) + b"/\xe4"
    os.mkdir(folder)
    with open(folder + b"/\xfc.py", "wb") as file:
        file.write(SHOW)
    env = {b"ODD": odd, b"N\xff": b"v"}
    seen = run_bytes(aiosd, b"aios-run", b"\xfc.py", odd, "ü".encode(), env=env, cwd=folder)
    assert seen.split(b"|") == [b"\xfc.py", odd, "ü".encode(), odd, folder, folder + b"/\xfc.py", odd, "ü".encode()]
    script = b'printf %s "$ODD" "$0"; pwd'
    argv = [b"aios-run", b"--", b"sh", b"-c", script, odd]
    assert run_bytes(aiosd, *argv, env=env, cwd=folder) == odd + odd + folder + b"\n"
    assert b"N\xff=v" in run_bytes(aiosd, b"aios-run", b"--", b"env", b"-0", env=env).split(b"\0")
    assert run_bytes(aiosd, b"aios-run", b"-e", b"ODD=\xff", b"--", b"printenv", b"ODD") == b"\xff\n"


def test_bytes_that_are_not_utf8_are_shown_as_text(aiosd: System, tmp_path: Path) -> None:
    pid = run_bytes(aiosd, b"aios-run", b"-d", b"--", b"sh", b"-c", b"sleep 300; : \xff").decode().strip()
    (entry,) = [entry for entry in aiosd.ps() if entry["pid"] == int(pid)]
    assert entry["command"] == r"sh -c sleep 300; : \xff"
    aiosd.run("aios-kill", pid, check=True)
    done = subprocess.run([b"aios-run", b"none\xff.py"], env=aiosd.env, stderr=subprocess.PIPE, timeout=30)
    assert (done.returncode, done.stderr) == (127, b"aios-run: none\\xff.py: not found\n")


def test_an_agent_passes_bytes_on_to_its_children(aiosd: System, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "import os, libaios as aios\n"
        "os.environb[b'ODD'] = b'\\xff'\n"
        "pid = aios.proc.spawn('printf', '%s%s', os.fsdecode(b'\\xfe'), 'x')\n"
        "assert aios.proc.wait(pid)[1] == 0\n"
        "assert aios.proc.wait(aios.proc.spawn('printenv', 'ODD'))[1] == 0\n"
    )
    assert run_bytes(aiosd, b"aios-run", os.fsencode(tmp_path / "a.py")) == b"\xfex\xff\n"


@pytest.mark.parametrize(
    ("args", "name"),
    [(["--name", "given", "dir/script.py"], "given"), (["dir/script.py"], "script"), (["-m", "pack.mod"], "mod")],
    ids=["given", "file", "module"],
)
def test_names(aiosd: System, tmp_path: Path, args: list[str], name: str) -> None:
    for path in ("dir/script.py", "pack/mod.py"):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text("print('up', flush=True); input()")
    run = aiosd.popen("aios-run", *args, cwd=tmp_path)
    assert run.stdout.readline() == "up\n"
    assert [entry["name"] for entry in aiosd.agents()] == [name]
    run.stdin.write("\n")
    run.stdin.close()
    assert run.wait(30) == 0


@pytest.mark.parametrize("name", ["a b", "12", "-x", ""])
def test_a_name_that_cannot_be_one_is_refused(aiosd: System, name: str) -> None:
    done = aiosd.run("aios-run", "--name", name, "--", "true")
    assert (done.returncode, done.stderr.count("\n")) == (125, 1)
    assert "name: " in done.stderr
    assert "regex" not in done.stderr


def test_a_script_whose_name_is_a_number(aiosd: System, tmp_path: Path) -> None:
    script = tmp_path / "12.py"
    script.write_text("import libaios as aios; print([p.name for p in aios.proc.ps() if p.pid == aios.proc.getpid()])")
    assert aiosd.run("aios-run", script, check=True).stdout == "['_12']\n"


def test_a_script_on_stdin(aiosd: System, tmp_path: Path) -> None:
    script = "import sys\nprint(sys.argv, sys.path[0] == '', '__file__' in globals(), repr(sys.stdin.read()))\n1/0\n"
    done = aiosd.run("aios-run", "-", "one", input=script, cwd=tmp_path)
    python = subprocess.run(
        [sys.executable, "-", "one"], input=script, cwd=tmp_path, capture_output=True, encoding="utf-8"
    )
    assert (done.returncode, done.stdout, done.stderr) == (python.returncode, python.stdout, python.stderr)
    pid = aiosd.run("aios-run", "-d", "-", check=True, input="raise SystemExit(3)").stdout.strip()
    assert aiosd.run("aios-wait", pid).returncode == 0  # a detached agent does not get the stdin of aios-run


def test_a_program_that_was_taken_for_a_script(aiosd: System) -> None:
    done = aiosd.run("aios-run", "sleep", "1")
    assert (done.returncode, done.stderr) == (127, "aios-run: sleep: not found; for the program: aios-run -- sleep\n")


def test_a_terminal_is_given_for_writing_only(aiosd: System, tmp_path: Path) -> None:
    script = tmp_path / "agent.py"
    script.write_text(
        "import fcntl, os\n"
        "modes = [fcntl.fcntl(n, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY for n in (1, 2)]\n"
        "os.write(1, b'%d %d %d %d.' % (*modes, os.isatty(1), os.isatty(2)))\n"
    )
    ours, theirs = os.openpty()
    try:
        run = subprocess.Popen(["aios-run", script], env=aiosd.env, stdin=theirs, stdout=theirs, stderr=theirs)
        seen = b""
        while b"." not in seen:
            seen += os.read(ours, 1000)
        assert (seen, run.wait(30)) == (b"1 1 1 1.", 0)
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_terminal_that_cannot_be_opened_again_is_not_given(aiosd: System, tmp_path: Path) -> None:
    """After su, for example, it belongs to another user. The agent then writes into pipes, and aios-run prints that."""
    script = tmp_path / "agent.py"
    script.write_text(
        "import os, stat, sys\n"
        "pipes = [stat.S_ISFIFO(os.fstat(n).st_mode) for n in (1, 2)]\n"
        "os.write(1, b'%d %d ' % (*pipes,))\nos.write(2, b'err.')\nsys.exit(3)\n"
    )
    command = (
        "import os, sys\nopen_ = os.open\n"
        "def denied(path, *args, **more):\n"
        "    if str(path) in ('/proc/self/fd/1', '/proc/self/fd/2'): raise PermissionError(13, 'denied', path)\n"
        "    return open_(path, *args, **more)\n"
        "os.open = denied\nfrom aiosd.commands import edge\n"
        "sys.exit(edge.run('aios-run', 'aiosd.commands.run', sys.argv[1:]))\n"
    )
    ours, theirs = os.openpty()
    try:
        run = subprocess.Popen(
            [sys.executable, "-c", command, script], env=aiosd.env, stdin=theirs, stdout=theirs, stderr=theirs
        )
        seen = b""
        while b"." not in seen:
            seen += os.read(ours, 1000)
        assert (seen, run.wait(30)) == (b"1 1 err.", 3)
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_reader_that_is_slow_gets_all_of_an_unbuffered_stdout(aiosd: System) -> None:
    pid = aiosd.run("aios-run", "-d", "--", "head", "-c", "300000", "/dev/zero", check=True).stdout.strip()
    aiosd.run("aios-wait", pid, check=True)
    for unbuffered in ("1", ""):
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        logs = aiosd.popen("aios-logs", pid, stdout=writing, env={"PYTHONUNBUFFERED": unbuffered})
        os.close(writing)
        with open(reading, "rb") as pipe:
            assert len(pipe.read()) == 300_000
        assert logs.wait(30) == 0


# ── what others see of it ─────────────────────────────────────────────────────────────────────────────────


def test_linux_shows_the_agents_own_environment_and_command_line(fresh_aiosd: Fresh, tmp_path: Path) -> None:
    system = fresh_aiosd(env={"STARTERS_SECRET": "xyzzy"})
    del system.env["STARTERS_SECRET"]
    (tmp_path / "agent.py").write_text("print('up', flush=True); input()")
    run = system.popen("aios-run", "agent.py", "a b", cwd=tmp_path, env={"MINE": "yes"})
    assert run.stdout.readline() == "up\n"
    (entry,) = system.agents()
    proc = Path(f"/proc/{entry['ospid']}")
    shown = proc.joinpath("environ").read_bytes().split(b"\0")
    assert b"MINE=yes" in shown
    assert f"AIOS_PID={entry['pid']}".encode() in shown
    assert not any(b"xyzzy" in variable for variable in shown)
    assert proc.joinpath("cmdline").read_bytes().split(b"\0")[1:] == [b"agent.py", b"a b", b""]
    run.communicate("\n")


# ── exit codes ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("exit 0", 0),
        ("exit 3", 3),
        ("exit 255", 255),
        ("kill -TERM $$", 143),
        ("kill -KILL $$", 137),
        ("kill -USR1 $$", 138),
    ],
)
def test_exits_as_the_agent_does(aiosd: System, program: str, code: int) -> None:
    done = aiosd.run("aios-run", "--", "sh", "-c", program)
    assert (done.returncode, done.stderr) == (code, "")


def test_signals_are_sent_on(aiosd: System) -> None:
    traps = "; ".join(f"trap 'echo {name}' {name}" for name in ("USR1", "USR2", "HUP", "INT"))
    run = aiosd.popen("aios-run", "--", "sh", "-c", f"{traps}; echo up; while :; do sleep 0.05; done")
    assert run.stdout.readline() == "up\n"
    for name in ("USR1", "USR2", "HUP", "INT"):
        run.send_signal(signal.Signals[f"SIG{name}"])
        assert run.stdout.readline() == f"{name}\n"
    run.terminate()
    assert run.wait(30) == 143


def test_it_dies_of_an_interrupt_as_the_agent_does(aiosd: System) -> None:
    """Otherwise a shell would go on with its loop."""
    run = aiosd.popen("aios-run", "--", "sh", "-c", "echo up; exec sleep 300")
    assert run.stdout.readline() == "up\n"
    run.send_signal(signal.SIGINT)
    assert run.wait(30) == -signal.SIGINT
    assert aiosd.run("aios-run", "--", "sh", "-c", "kill -INT $$").returncode == 130, "no signal came to aios-run"


def test_a_used_up_budget_is_reported_on_stderr(aiosd: System) -> None:
    done = aiosd.run("aios-run", "--time", "0.3", "--", "sleep", "300")
    assert done.returncode == 124
    assert done.stderr.startswith("aios-run: agent ")
    assert done.stderr.endswith(": time budget of 0.3 s used up\n")


def test_detached_prints_the_pid_and_returns(aiosd: System) -> None:
    done = aiosd.run("aios-run", "-d", "--", "sh", "-c", "echo hidden; sleep 300", check=True)
    pid = done.stdout.strip()
    assert pid.isdigit()
    assert done.stderr == ""
    assert eventually(lambda: aiosd.run("aios-logs", pid).stdout == "hidden\n")
    aiosd.run("aios-kill", pid, check=True)


def test_detached_with_nowhere_to_print_the_pid(aiosd: System) -> None:
    with open("/dev/full", "w") as full:
        done = aiosd.run("aios-run", "-d", "--name", "unheard", "--", "sleep", "300", stdout=full)
    pid = next(str(entry["pid"]) for entry in aiosd.agents() if entry["name"] == "unheard")
    words = f"aios-run: agent {pid} runs, but stdout takes no pid: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, words)
    aiosd.run("aios-kill", pid, check=True)


def test_detached_has_no_stdin_of_ours(aiosd: System) -> None:
    pid = aiosd.run("aios-run", "-d", "--", "cat", input="not for it", check=True).stdout.strip()
    assert aiosd.run("aios-wait", pid).returncode == 0
    assert aiosd.run("aios-logs", pid, check=True).stdout == ""


def test_inside_an_agent_it_starts_a_child(aiosd: System) -> None:
    script = "aios-run -- sh -c 'aios-ps -e -o name=,ppid= ; exit 5'; echo code $?"
    done = aiosd.run("aios-run", "--name", "outer", "--", "sh", "-c", script)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[-1] == ["code", "5"]
    outer = next(line for line in lines if line[0] == "outer")
    assert outer[1] == "1"
    assert any(line[0] == "sh" and line[1] != "1" for line in lines)


def test_fast_agents_one_after_the_other(aiosd: System) -> None:
    """An agent may end before it is waited for."""
    assert [aiosd.run("aios-run", "--", "sh", "-c", f"exit {n}").returncode for n in range(10)] == list(range(10))


# ── the kernel dies ───────────────────────────────────────────────────────────────────────────────────────


def kill_kernel(system: System) -> None:
    os.kill(
        next(entry["ospid"] for entry in system.ps() if entry["system"] and entry["name"] == "kernel"), signal.SIGKILL
    )


def test_the_kernel_dies_while_attached(fresh_aiosd: Fresh) -> None:
    system = fresh_aiosd()
    run = system.popen("aios-run", "--name", "survivor", "--", "sh", "-c", "echo up; read line; echo got $line; exit 9")
    assert run.stdout.readline() == "up\n"
    (before,) = system.agents()
    for _ in range(2):
        kill_kernel(system)
        assert eventually(lambda: system.run("aios-ps").returncode == 0)
        assert [(entry["pid"], entry["ospid"]) for entry in system.agents()] == [(before["pid"], before["ospid"])]
    run.stdin.write("word\n")
    run.stdin.flush()
    assert run.stdout.readline() == "got word\n"
    assert run.wait(30) == 9


def test_signals_are_forwarded_after_the_kernel_died(fresh_aiosd: Fresh) -> None:
    system = fresh_aiosd()
    run = system.popen("aios-run", "--", "sh", "-c", "trap 'exit 9' TERM; echo up; while :; do sleep 0.05; done")
    assert run.stdout.readline() == "up\n"
    kill_kernel(system)
    run.send_signal(signal.SIGTERM)
    assert run.wait(30) == 9


def test_aios_wait_and_logs_survive_the_kernel_too(fresh_aiosd: Fresh) -> None:
    system = fresh_aiosd()
    script = "echo one; while [ ! -e $AIOS_HOME/go ]; do sleep 0.05; done; echo two; exit 4"
    pid = system.run("aios-run", "-d", "--", "sh", "-c", script, check=True).stdout.strip()
    wait, logs = system.popen("aios-wait", pid), system.popen("aios-logs", "-f", pid)
    assert logs.stdout.readline() == "one\n"
    kill_kernel(system)
    assert eventually(lambda: system.run("aios-ps").returncode == 0)
    (system.home / "go").touch()
    assert logs.stdout.readline() == "two\n"
    assert (wait.wait(30), logs.wait(30)) == (4, 0)


def test_aiosd_gone_for_good_is_125(fresh_aiosd: Fresh) -> None:
    system = fresh_aiosd()
    run = system.popen("aios-run", "--", "sh", "-c", "echo up; exec sleep 300")
    assert run.stdout.readline() == "up\n"
    system.daemon.kill()
    assert run.wait(30) == 125
    assert run.stderr.read() == "aios-run: aiosd is gone\n"
