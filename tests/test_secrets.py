"""Data of one agent are not in the memory of another.

Every agent begins as a copy of the supervisor's memory, so all that the supervisor has ever read may be in it. The name
of an agent is no secret: `aios-ps` shows it to all.
"""

from __future__ import annotations

import os
import signal
import socket
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from aiosd.birth import report
from aiosd.ipc import letter
from tests.conftest import System, eventually
from tests.fakeendpoint import Endpoint, answers

Fresh = Callable[..., System]

MARK = "qz7f3a9c"  # followed by '-' and the place where it was put

#: Prints every marked string in its own memory. The pattern does not match itself.
SEARCHER = """
import re, sys
pattern, found = re.compile(rb"[q]z7f3a9c-[a-z]+"), set()
with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", buffering=0) as mem:
    for line in list(maps):
        area, rights, *_ = line.split()
        if rights[0] != "r" or "[v" in line:
            continue
        start, end = (int(part, 16) for part in area.split("-"))
        while start < end:
            mem.seek(start)
            try: chunk = mem.read(min(end - start, 1 << 24))
            except OSError: break
            found.update(pattern.findall(chunk))
            start += max(1, len(chunk) - 64) if start + len(chunk) < end else len(chunk)
print(*sorted(word.decode() for word in found))
"""

#: An agent with marked strings in all its data, and a child with others.
MARKED = """
import sys, time
import libaios as aios
aios.msg.send(aios.proc.getpid(), {"note": "qz7f3a9c-message"})
aios.llm.complete("qz7f3a9c-prompt", max_tokens=1)
aios.mem.add("qz7f3a9c-note")
try: aios.proc.spawn("qz7f3a9c-dir/missing.py")
except FileNotFoundError: pass
child = aios.proc.spawn("child.py", "qz7f3a9c-childargument", env={"KEY": "qz7f3a9c-childkey"}, name="child")
aios.proc.wait(child)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a marked name, and the agents' files."""
    folder = tmp_path / f"{MARK}-folder"
    folder.mkdir()
    (folder / "marked.py").write_text(textwrap.dedent(MARKED))
    (folder / "child.py").write_text("")
    (tmp_path / "search").mkdir()  # a folder of its own, because Python reads the names in a script's folder
    (tmp_path / "search" / "search.py").write_text(textwrap.dedent(SEARCHER))
    return folder


def found_by(system: System, folder: Path, *options: str) -> str:
    """The marked strings that a new agent finds in its memory."""
    done = system.run("aios-run", *options, "search.py", cwd=folder.parent / "search", check=True)
    return done.stdout.strip()


def run_marked(system: System, folder: Path) -> None:
    system.run("aios-run", "-e", f"KEY={MARK}-key", "marked.py", f"{MARK}-argument", cwd=folder, check=True)


def test_the_search_finds_what_is_there(aiosd: System, folder: Path) -> None:
    assert found_by(aiosd, folder, "-e", f"KEY={MARK}-own") == f"{MARK}-own"


def test_a_new_agent_has_nothing_of_others(aiosd: System, folder: Path) -> None:
    run_marked(aiosd, folder)
    aiosd.run("aios-run", "-m", f"{MARK}-package.module", cwd=folder)
    aiosd.run("aios-run", f"{MARK}-dir/absent.py", cwd=folder)
    aiosd.run("aios-run", "--name", "listed", "--", "true", f"{MARK}-word", cwd=folder)
    assert f"{MARK}-word" in aiosd.run("aios-ps", "--dead", "-o", "args", check=True).stdout
    assert found_by(aiosd, folder) == ""


def test_an_agent_that_was_forked_ahead_has_nothing_of_others(aiosd: System, folder: Path) -> None:
    """Spares are forked while others are being started."""
    (folder.parent / "search" / "crowd.py").write_text(
        "import libaios as aios\n"
        "pids = [aios.proc.spawn('true', 'qz7f3a9c-' + 'crowd', kind='exec', detached=True) for _ in range(8)]\n"
        "print(*{status for _, status in map(aios.proc.wait, pids)})\n"
        "aios.proc.wait(aios.proc.spawn('search.py'))\n"
    )
    done = aiosd.run("aios-run", "crowd.py", cwd=folder.parent / "search", check=True)
    assert done.stdout == "0\n\n"


def test_a_new_agent_has_nothing_of_others_after_restarts_of_agents_and_of_the_kernel(
    fresh_aiosd: Fresh, folder: Path
) -> None:
    """An agent that is started again still has its letter, and the next kernel has its command line."""
    system = fresh_aiosd()
    (folder / "again.py").write_text("import os\nprint(os.environ['KEY'], flush=True)\nos.kill(os.getpid(), 9)\n")
    words = ("-d", "--restart", "on-failure:1", "-e", f"KEY={MARK}-again", "again.py", f"{MARK}-argument")
    pid = system.run("aios-run", *words, cwd=folder, check=True).stdout.strip()
    kernel = next(entry["ospid"] for entry in system.ps() if entry["name"] == "kernel")
    os.kill(kernel, signal.SIGKILL)
    assert system.run("aios-wait", pid).returncode == 137
    assert eventually(lambda: system.run("aios-logs", pid).stdout == f"{MARK}-again\n" * 2)
    run_marked(system, folder)
    (dead,) = [entry for entry in system.ps("--dead") if entry["pid"] == int(pid)]
    assert dead["command"] == f"again.py {MARK}-argument"
    assert found_by(system, folder) == ""


def test_a_new_agent_has_nothing_of_the_environment_in_which_aiosd_was_started(
    fresh_aiosd: Fresh, folder: Path, request: pytest.FixtureRequest
) -> None:
    """An agent that starts with the system gets that environment, and so do aiosd's own processes. The key of a remote
    model is not in an agent's memory either, whatever its endpoint sends back."""
    system = fresh_aiosd(start=False, env={"API_KEY": f"{MARK}-user", "OTHER": "x" * 5000 + f"{MARK}-long"})
    (folder / "first.py").write_text("import os\nprint(os.environ['API_KEY'], len(os.environ['OTHER']), flush=True)\n")
    system.home.mkdir(exist_ok=True)
    (system.home / "far.key").write_text(f"{MARK}-modelkey")
    endpoint = Endpoint(answers(f"{MARK}-modelkey is yours"))
    request.addfinalizer(endpoint.close)
    (system.home / "aiosd.toml").write_text(
        f'[[model]]\nurl = "{endpoint.url}"\nmodel = "far"\nkey_file = "far.key"\n[[model]]\npath = "nano"\n'
        f'[[agent]]\nname = "first"\nfile = "{folder}/first.py"\nargs = ["{MARK}-filed"]\nenv = {{K = "{MARK}-toml"}}\n'
        f'[mcpServers.it]\ncommand = "false"\nargs = ["{MARK}-serverword"]\nenv = {{ KEY = "{MARK}-serverkey" }}\n'
        f'[mcpServers.there]\nurl = "http://127.0.0.1:1"\nheaders = {{ Authorization = "{MARK}-bearer" }}\n'
    )
    system.start()
    (first,) = eventually(lambda: [one for one in system.ps("--dead") if one["name"] == "first"])
    assert system.run("aios-logs", str(first["pid"])).stdout == f"{MARK}-user {5000 + len(MARK) + 5}\n"
    clean = {"env": {"API_KEY": "", "OTHER": ""}}
    found = system.run("aios-run", "search.py", cwd=folder.parent / "search", check=True, **clean).stdout.split()
    assert found == []
    ask = "import libaios as aios\nprint(aios.llm.complete('x').text)\n"
    (folder.parent / "search" / "asks.py").write_text(ask + textwrap.dedent(SEARCHER))
    found = system.run("aios-run", "asks.py", cwd=folder.parent / "search", check=True, **clean).stdout.split("\n")
    assert endpoint.asked[0][2]["Authorization"] == f"Bearer {MARK}-modelkey"
    assert found[:2] == ["... is yours", ""]
    system.run("aiosd", "reload", check=True)
    found = system.run("aios-run", "search.py", cwd=folder.parent / "search", check=True, **clean).stdout.split()
    assert found == []


# ── letters ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_letter_is_read_as_it_was_written_and_cannot_be_changed() -> None:
    content = letter.Letter("file", "a.py", ["x"], {"K": "\0\xff"}, "/tmp")
    fd = letter.write(content)
    try:
        assert (letter.read(fd), letter.read(fd)) == (content, content)
        for change in (lambda: os.pwrite(fd, b"x", 0), lambda: os.ftruncate(fd, 0)):
            with pytest.raises(PermissionError):
                change()
    finally:
        os.close(fd)


def test_a_refusal_reaches_the_supervisor_as_a_number_and_a_descriptor() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with pytest.raises(BlockingIOError):
            report.read(ours)
        words = f"{MARK}-\udcff: not found"
        assert report.Report(theirs.detach()).refuse(FileNotFoundError(2, "x"), words) == report.CANNOT_EXECUTE
        refusal = report.read(ours)
        assert refusal is not None
        number, (reason,) = refusal
        assert (number, letter.read_text(reason)) == (2, f"{MARK}-\\xff: not found")
        os.close(reason)
        assert report.read(ours) is None
