"""The default sandbox: agents run in the strongest one of the machine, and the examples of README work in it."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from aiosd.commands import unseen
from libaios import wire
from tests.conftest import System


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    """A system without any setting about the sandbox."""
    system = System("--threads", "1", sandbox="").start()
    yield system
    left = system.destroy()
    log = system.log()
    system.remove()
    assert left == [], log


@pytest.fixture
def project(system: System, tmp_path: Path) -> Path:
    """A folder with an agent's files, and a secret beside it."""
    if system.status()["sandbox"]["possible"] == "none":
        pytest.skip(system.status()["sandbox"]["why_no_more"])
    (tmp_path / "secret").write_text("a secret")
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "data.csv").write_text("1,2")
    return folder


def script(folder: Path, code: str, name: str = "agent.py") -> str:
    (folder / name).write_text(textwrap.dedent(code))
    return name


def test_agents_are_in_the_strongest_sandbox_and_the_status_shows_it(system: System) -> None:
    found = system.status()["sandbox"]
    assert found["default"] == found["possible"]
    line = next(line for line in system.run("aiosd", "status").stdout.splitlines() if line.startswith("  sandbox"))
    assert line.split()[1].rstrip(",") == found["possible"]
    assert found["possible"] == "cage" or found["why_no_more"] in system.log(), "in the line with which it starts"
    agent = "import libaios as aios; print([one.sandbox for one in aios.proc.ps() if one.pid == aios.proc.getpid()][0])"
    for option, level in (((), found["possible"]), (("--sandbox", "none"), "none")):
        assert system.run("aios-run", *option, "-", input=agent, check=True).stdout.strip() == level


def test_an_agent_reads_beside_its_script_writes_at_home_and_sees_nothing_else(system: System, project: Path) -> None:
    name = script(project, f"""
        import os, sys
        import libaios as aios
        print(open(sys.argv[1]).read(), open("data.csv").read())
        with open(os.path.expanduser("~/report.txt"), "w") as file: file.write("done")
        hello = [{{"role": "user", "content": "Hello!"}}]
        print(aios.llm.chat(hello, max_tokens=8, ignore_eos=True).usage.completion_tokens, flush=True)
        child = aios.proc.spawn("helper.py")
        aios.msg.send(child, {{"look": "here"}})
        print(aios.msg.recv(timeout=20)[1], aios.proc.wait(child)[1], aios.tool.call("calc", expression="2*21"))
        try: open("{project.parent}/secret")
        except OSError as err: print(type(err).__name__, flush=True)
        open("out.txt", "w")
    """)  # fmt: skip
    script(project, """
        import os
        import libaios as aios
        sender, task = aios.msg.recv()
        aios.msg.send(sender, {"done": task["look"], "home": os.listdir(os.environ["HOME"])})
    """, "helper.py")  # fmt: skip
    done = system.run("aios-run", name, "data.csv", cwd=project)
    out = done.stdout.splitlines()
    assert out[:2] == ["1,2 1,2", "8"], done.stderr
    assert "'done': 'here'" in out[2]
    assert "report.txt" in out[2], "a child has its parent's workspace"
    assert out[2].endswith(" 0 42")
    assert out[3] in ("FileNotFoundError", "PermissionError")
    workspace = system.run("aios-inspect", "-w", "agent", check=True).stdout.strip()
    assert Path(workspace, "report.txt").read_text() == "done"
    note = done.stderr.splitlines()[-1]
    assert (done.returncode, f"aios-run --write {project}, or" in note, workspace in note) == (1, True, True)
    assert not (project / "out.txt").exists()
    assert system.run("aios-run", "--write", ".", "--read", "../secret", name, "data.csv", cwd=project).returncode == 0
    assert (project / "out.txt").exists()


def test_a_named_path_that_the_sandbox_hides_is_reported(system: System, project: Path) -> None:
    """For programs in any language."""
    below = project / "below"
    below.mkdir()
    (below / "own.txt").write_text("own")
    name = script(below, "import sys; print([open(path).read() for path in sys.argv[1:]])")
    assert system.run("aios-run", f"below/{name}", "below/own.txt", cwd=project, check=True).stdout == "['own']\n"
    for argv in (["below/agent.py"], ["--", "cat"]):
        done = system.run("aios-run", *argv, "../secret", cwd=project)
        told = [line for line in done.stderr.splitlines() if line.startswith("aios-run: ")]
        assert len(told) == 1, done.stderr
        assert told[0].endswith("cannot see ../secret (aios-run --read ../secret shows it)")
        done = system.run("aios-run", "--read", "../secret", *argv, "../secret", cwd=project, check=True)
        assert "a secret" in done.stdout
        assert done.stderr == ""


def test_pipes_and_files_of_the_person_work(system: System, project: Path) -> None:
    """They are passed as open descriptors. Programs run as scripts do."""
    with open(project / "out.txt", "w") as out:
        code = "cat; pwd; echo $HOME; echo again >> /dev/stdout"
        done = system.run("aios-run", "--", "sh", "-c", code, input="typed\n", stdout=out, cwd=project)
    typed, cwd, home, again = (project / "out.txt").read_text().splitlines()
    assert (typed, cwd, again, done.stderr) == ("typed", str(project), "again", "")
    assert home.startswith(str(system.home / "data" / "workspaces"))
    code = "tty; test -t 0 && test -t 1 && echo yes; echo again > $(tty)"
    terminal = system.run("aios-run", "-t", "--", "sh", "-c", code)
    named, *more = terminal.stdout.splitlines()
    assert (named[:5], more) == ("/dev/", ["yes", "again"]), terminal.stdout
    (way := project.parent / "way").symlink_to(project)
    words = ("cat", "/dev/stdin", f"{way}/data.csv")
    linked = system.run("aios-run", "--", *words, input="typed\n", cwd=project)
    assert linked.stdout == "typed\n1,2", linked.stderr
    (project / "mine.py").write_text("import os; print(os.path.exists('data.csv'))")
    assert system.run("aios-run", "--", "python3", "mine.py", cwd=project, check=True).stdout == "True\n"
    done = system.run("aios-run", "--", "python3", "project/mine.py", cwd=project.parent, check=True)
    assert done.stdout == "False\n", "it starts where the person is"
    assert "mine.py-" in system.run("aios-inspect", "-w", "python3").stdout, "others of this interpreter have others"


def test_a_key_that_is_missed_is_named(system: System, project: Path) -> None:
    env = {"SOME_API_KEY": "k"}
    for number, code in enumerate((
        "import os; print(os.environ['SOME_API_KEY'])",
        "import os\nif 'SOME_API_KEY' not in os.environ: raise RuntimeError('set SOME_API_KEY, please')\nprint('k')",
    )):  # fmt: skip
        name = script(project, code, f"keys{number}.py")
        refused = system.run("aios-run", name, cwd=project, env=env)
        assert refused.returncode == 1
        assert "aios-run -e SOME_API_KEY, or env of [[group]]" in refused.stderr.splitlines()[-1]
        assert system.run("aios-run", "-e", "SOME_API_KEY", name, cwd=project, env=env, check=True).stdout == "k\n"


def test_an_agent_that_a_person_has_let_out_has_children_outside(system: System, project: Path) -> None:
    """And children that it starts in a sandbox stay in it."""
    name = script(project, """
        import sys
        import libaios as aios
        for level in (None, "flat"):
            print(aios.proc.wait(aios.proc.spawn("helper.py", sandbox=level, detached=False))[1], flush=True)
    """)  # fmt: skip
    script(project, f"open('{project.parent}/secret')", "helper.py")
    done = system.run("aios-run", "--sandbox", "none", name, cwd=project, check=True)
    assert done.stdout == "0\n1\n", done.stderr


def test_the_ready_agent_works_in_it(system: System, project: Path) -> None:
    done = system.run("aios-run", "-m", "libaios.agents.react", "What is 37 * 91?", cwd=os.path.expanduser("~"))
    assert (done.returncode, "3367" in done.stdout) == (0, True), done.stderr


def test_keys_that_a_program_may_have_missed_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    """For programs in any language, after they have failed."""
    env = {"PATH": "/bin", "HF_TOKEN": "x", "MY_KEY": "y", "OPENAI_API_KEY": "z", "PAGE": "1"}
    spawn = wire.Spawn("exec", "true", env=env, sandbox=wire.Sandbox(env=["MY_*"]))
    unseen.note_variables(spawn, wire.Spawned(7, sandbox="cage"))
    words = "agent 7 did not get HF_TOKEN of your environment (-e HF_TOKEN passes it on)"
    assert capsys.readouterr().err == f"aios-run: {words}\n"
    unseen.note_variables(spawn, wire.Spawned(7, sandbox="none"))
    assert capsys.readouterr().err == ""


def on_terminal(system: System, *words: str, cwd: Path) -> tuple[int, str]:
    """Exit code and stderr of `aios-run`, whose stderr alone is a terminal."""
    ours, theirs = pty.openpty()
    try:
        done = system.popen(
            "aios-run", *words, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=theirs
        )
        code = done.wait(60)
    finally:
        os.close(theirs)
    said = b""
    with contextlib.suppress(OSError):  # EIO: all has been read
        while part := os.read(ours, 4096):
            said += part
    os.close(ours)
    return code, said.decode().replace("\r\n", "\n")


def test_a_program_that_may_not_write_in_its_folder_and_fails_is_told_what_allows_that(
    system: System, project: Path
) -> None:
    touch, hint = ("--", "touch", "new.txt"), f"may not write in {project} (if it failed because of that: --write . "
    code, said = on_terminal(system, *touch, cwd=project)
    assert (code, said.count(hint)) == (1, 1), said
    code, said = on_terminal(system, "--write", ".", *touch, cwd=project)
    assert (code, said) == (0, "")
    assert (project / "new.txt").exists()
    fails = ("--", "sh", "-c", "exit 3")
    assert on_terminal(system, "--write", ".", *fails, cwd=project) == (3, ""), "it may write there"
    assert on_terminal(system, *fails, cwd=Path("/usr/lib") if os.getuid() else Path("/")) == (3, ""), "no grant helps"
    assert system.run("aios-run", *fails, cwd=project).stderr == "", "no person reads it"


def test_a_line_reports_that_files_beside_a_script_in_tmp_do_not_stay(capsys: pytest.CaptureFixture[str]) -> None:
    """In other folders writing beside the script fails. In /tmp it succeeds, but in a memory of the agent's own."""

    def told(script: str, sandbox: str) -> list[str]:
        own = wire.Sandbox(own=[script], alone=True)
        unseen.note_alone(wire.Spawn("file", script, sandbox=own), wire.Spawned(7, sandbox=sandbox))
        return [line for line in capsys.readouterr().err.splitlines() if "is gone when it ends" in line]

    assert len(told("/tmp/a.py", "cage")) == len(told("/dev/shm/a.py", "cage")) == 1
    assert told("/home/me/a.py", "cage") == told("/tmp/a.py", "flat") == told("/tmp/a.py", "none") == []
