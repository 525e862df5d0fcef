"""Confined agents in a real system: visible files, children, commands, restarts."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from aiosd.birth import fork
from aiosd.kernel.control import _note_received
from aiosd.kernel.ledger import Ledger
from aiosd.sandbox import doors
from aiosd.sandbox.box import LEVELS
from tests.conftest import System, eventually

Fresh = Callable[..., System]
FLAT = ("--sandbox", "flat")

#: By level: the errors of a change in the script's folder, and of reading beside it.
HIDDEN = {
    "flat": ("Permission denied", "Permission denied"),
    "cage": ("Read-only file system", "No such file or directory"),
}


def skip_unless_possible(system: System, level: str) -> None:
    found = system.status()["sandbox"]
    if LEVELS.index(found["possible"]) < LEVELS.index(level):
        pytest.skip(found["why_no_more"])


@pytest.fixture(params=LEVELS[1:])
def level(request: pytest.FixtureRequest, aiosd: System) -> str:
    """Run a test with each level that this machine offers."""
    skip_unless_possible(aiosd, request.param)
    return str(request.param)


@pytest.fixture(autouse=True)
def possible(request: pytest.FixtureRequest) -> None:
    if "aiosd" in request.fixturenames:
        skip_unless_possible(request.getfixturevalue("aiosd"), "flat")


def script(folder: Path, code: str, name: str = "agent.py") -> Path:
    path = folder / "project" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(textwrap.dedent(code))
    return path


def test_what_an_agent_sees(aiosd: System, level: str, tmp_path: Path) -> None:
    """It can read its script's folder, has a workspace as home, and no secrets in its environment."""
    (tmp_path / "beside.txt").write_text("x")
    path = script(tmp_path, """
        import json, os, tempfile
        def tried(path, mode="r"):
            try: open(path, mode).close()
            except OSError as err: return err.strerror
            return "done"
        folder = os.path.dirname(__file__)
        with tempfile.NamedTemporaryFile() as file: temporary = file.name
        print(json.dumps({
            "own": tried(__file__), "change": tried(folder + "/new", "w"), "beside": tried(folder + "/../beside.txt"),
            "home": tried(os.path.expanduser("~/notes"), "a"), "names": sorted(os.environ), "cwd": os.getcwd(),
            "HOME": os.environ["HOME"], "temporary": temporary,
        }))
    """)  # fmt: skip
    done = aiosd.run(
        "aios-run", "--sandbox", level, path, cwd=tmp_path, check=True, env={"API_KEY": "x", "LC_ALL": "C.UTF-8"}
    )
    seen = json.loads(done.stdout)
    assert [seen[name] for name in ("own", "change", "beside", "home")] == [
        "done", *HIDDEN[level], "done",
    ]  # fmt: skip
    assert "API_KEY" not in seen["names"]
    assert "LC_ALL" in seen["names"]
    assert seen["HOME"].startswith(str(aiosd.home / "data" / "workspaces" / "default" / "agent.py-"))
    assert seen["cwd"] == str(tmp_path), "a path that was typed means the same to the agent"
    assert seen["temporary"].startswith(seen["HOME"])
    assert os.path.exists(seen["HOME"] + "/notes")
    assert os.stat(seen["HOME"]).st_mode & 0o777 == 0o700


def test_what_is_granted(aiosd: System, level: str, tmp_path: Path) -> None:
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "in" / "a.txt").write_text("text")
    path = script(
        tmp_path,
        f"""
        import os, sys
        print(open("{tmp_path}/in/a.txt").read(), os.environ.get("KEY"), os.environ["OTHER"])
        open("{tmp_path}/out/b.txt", "w").write("written")
        open("{tmp_path}/in/a.txt", "w")
    """,
    )
    options = ("--read", "in", "--write", "out", "-e", "KEY", "-e", "OTHER=2")
    done = aiosd.run("aios-run", "--sandbox", level, *options, path, cwd=tmp_path, env={"KEY": "1"})
    assert done.stdout == "text 1 2\n"
    assert (tmp_path / "out" / "b.txt").read_text() == "written"
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        f"(sandbox {level}: aios-run --write {tmp_path}/in/a.txt, or write of [[group]] in aiosd.toml, would allow it; "
    )
    assert last.endswith(f"its home, {aiosd.run('aios-inspect', '-w', 'agent').stdout.strip()})")
    assert (done.returncode, (tmp_path / "in" / "a.txt").read_text()) == (1, "text")


DENIALS = [
    ("open('{0}/hidden/secret')", "--read {0}/hidden/secret"),
    ("open('{0}/hidden/secret', mode='w')", "--write {0}/hidden/secret"),
    ("open('{0}/hidden/new', 'w')", "--write {0}/hidden"),
    ("pathlib.Path('{0}/hidden/secret').write_text('x')", "--write {0}/hidden/secret"),
    ("pathlib.Path('{0}/hidden/secret').read_text()", "--read {0}/hidden/secret"),
    ("os.open('{0}/project/new', os.O_WRONLY | os.O_CREAT)", "--write {0}/project"),
    ("os.mkdir('{0}/project/new')", "--write {0}/project"),
    ("os.listdir('{0}/hidden')", "--read {0}/hidden"),
    ("shutil.copy(__file__, '{0}/project/copy')", "--write {0}/project"),
]


def test_a_denial_names_the_option_that_would_permit_it(aiosd: System, level: str, tmp_path: Path) -> None:
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "secret").touch()
    deeds = "\n".join(f"def deed{number}(): {deed.format(tmp_path)}" for number, (deed, _) in enumerate(DENIALS))
    ask = f"""
for number in range({len(DENIALS)}):
    try: globals()[f"deed{{number}}"]()
    except OSError as err: print(confinement.explain(err))
"""
    path = script(tmp_path, f"import os, pathlib, shutil\nfrom aiosd.birth import confinement\n{deeds}\n{ask}")
    done = aiosd.run("aios-run", "--sandbox", level, path, check=True)
    found = [line.split("aios-run ")[1].split(", or")[0] for line in done.stdout.splitlines()]
    # In the cage it is not known whether the file exists, so its folder is named.
    hidden = "hidden" if level == "cage" else "hidden/secret"
    assert found == [
        grant.format(tmp_path).replace("hidden/secret", hidden if "--write" in grant else "hidden/secret")
        for _, grant in DENIALS
    ]


def test_inspect_explains_denials(aiosd: System, level: str, tmp_path: Path) -> None:
    for name in ("in", "out", "hidden"):
        (tmp_path / name).mkdir()
    (tmp_path / "out" / "locked").touch(mode=0o000)
    options = ("--sandbox", level, "--read", tmp_path / "in", "--write", tmp_path / "out")
    pid = aiosd.run("aios-run", "-d", *options, "--", "sleep", "600", check=True).stdout.strip()

    def why(path: Path | str) -> list[str]:
        done = aiosd.run("aios-inspect", pid, "--why", path, check=True)
        return [line.strip() for line in done.stdout.splitlines()]

    private = "in the cage /tmp is the agent's own: no such file"
    hidden = {"flat": "no rule of Landlock grants it", "cage": private}[level]
    error = {"flat": "EACCES", "cage": "ENOENT"}[level]
    frozen = {"flat": "", "cage": "mounted read-only (EROFS), and "}[level]
    remedy = 'to allow it: aios-run --{0} {1}, or {0} of [[group]] "default" in aiosd.toml'
    inner, mine, shown = tmp_path / "in", tmp_path / "out", tmp_path / "hidden"
    assert why(inner) == [
        f"{inner}, for agent {pid} ({level})", f"read  yes  granted by read: {inner}",
        f"write no   {frozen}no rule of Landlock grants it (EACCES)", f"run   yes  granted by read: {inner}",
        remedy.format("write", inner),
    ]  # fmt: skip
    assert why(mine)[1:] == [f"{deed:6}yes  granted by write: {mine}" for deed in ("read", "write", "run")]
    assert why(shown)[1:] == [
        *(f"{deed:6}no   {hidden} ({error})" for deed in ("read", "write", "run")),
        remedy.format("read", shown), remedy.format("write", shown),
    ]  # fmt: skip
    assert f"its mode (----------) denies it (EACCES), although granted by write: {mine}" in why(mine / "locked")[1]
    if level == "cage":
        assert why("/var")[1] == "read  no   not in the cage: no such file (ENOENT)"
    assert why("/etc/passwd")[1] == "read  yes  all agents may: /etc/passwd"
    aiosd.run("aios-kill", "-KILL", pid, check=True)


def test_a_link_in_a_granted_folder_grants_nothing(aiosd: System, level: str, tmp_path: Path) -> None:
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "a.txt").write_text("secret")
    path = script(tmp_path, "print(open('link/a.txt').read())")
    (path.parent / "link").symlink_to(tmp_path / "hidden")
    done = aiosd.run("aios-run", "--sandbox", level, path, cwd=path.parent)
    assert (done.returncode, done.stdout) == (1, "")


def test_programs_are_confined_alike(aiosd: System, level: str, tmp_path: Path) -> None:
    (tmp_path / "hidden.txt").write_text("secret")
    assert aiosd.run("aios-run", "--sandbox", level, "--", "cat", tmp_path / "hidden.txt").returncode == 1
    tool = tmp_path / "tools" / "tool"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\ncat ~/../../../../../../hidden.txt; cd; pwd; exit 3\n")
    tool.chmod(0o755)
    done = aiosd.run("aios-run", "--sandbox", level, "--", "tools/tool", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "workspaces/default/tool-" in done.stdout


def test_a_script_is_looked_up_with_its_own_rights(aiosd: System, level: str, tmp_path: Path) -> None:
    """An agent cannot start a file that it cannot read itself."""
    (tmp_path / "hidden.py").write_text("print('ran')")
    path = script(
        tmp_path,
        f"""
        import libaios as aios
        for kind in ("file", "exec"):
            try: aios.proc.spawn("{tmp_path}/hidden.py", kind=kind)
            except OSError as err: print(err.strerror)
    """,
    )
    done = aiosd.run("aios-run", "--sandbox", level, path, check=True)
    words = {"flat": "permission denied", "cage": "not found"}[level]
    assert done.stdout == f"{tmp_path}/hidden.py: {words}\n" * 2


def test_a_wrapped_program_that_misses_the_network_is_explained(aiosd: System, level: str) -> None:
    """It reports an error of Linux, which does not mention a sandbox."""
    words = f"sandbox: the network is not granted (aios-run --net {'HOST' if level == 'cage' else 'all'}, or net of "
    words += "[[group]] in aiosd.toml, would allow it)"
    program = "import socket; socket.create_connection(('127.0.0.1', 9))"
    run = ("aios-run", "--sandbox", level, "--net", "none", "--", "python3", "-c")
    done = aiosd.run(*run, program)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert "Address family not supported" in lines[-2]
    assert lines[-1] == f"aios-run: agent {newest(aiosd)}: {words}"
    assert "aios-run" not in aiosd.run(*run, "raise SystemExit(1)").stderr, "it did not want the network"
    assert "aios-run" not in aiosd.run(*run, f"try: {program}\nexcept OSError: pass", check=True).stderr, "it went on"
    assert json.loads(aiosd.run("aios-inspect", newest(aiosd)).stdout)[0]["denied"] == words


def newest(system: System) -> str:
    return str(max(entry["pid"] for entry in system.ps("--dead")))


def test_children_have_the_same_box_and_no_way_out(aiosd: System, level: str, tmp_path: Path) -> None:
    (tmp_path / "hidden.txt").write_text("secret")
    path = script(
        tmp_path,
        f"""
        import os, sys
        import libaios as aios
        open(os.path.expanduser("~/common"), "w").write("seen")
        status = aios.proc.wait(aios.proc.spawn("child.py", detached=False))[1]
        print(status, flush=True)
        for options in (["--sandbox", "none"], ["--net", "all"], ["--read", "{tmp_path}"], ["--write", sys.argv[0]]):
            os.spawnlp(os.P_WAIT, "aios-run", "aios-run", *options, "child.py")
    """,
    )
    script(tmp_path, f"""
        import os
        print(open(os.path.expanduser("~/common")).read(), flush=True)
        open("{tmp_path}/hidden.txt")
    """, "child.py")  # fmt: skip
    done = aiosd.run("aios-run", "--sandbox", level, "--net", "none", path, cwd=path.parent, check=True)
    assert done.stdout == "seen\n1\n"
    refusals = [line for line in done.stderr.splitlines() if line.startswith("aios-run: ")]
    assert [line.split(": ")[1] for line in refusals] == ["sandbox"] * 4, done.stderr


def test_commands_work_with_the_agents_rights(aiosd: System, level: str, tmp_path: Path) -> None:
    path = script(
        tmp_path,
        """
        import os, subprocess
        import libaios as aios
        def run(*argv):
            done = subprocess.run(argv, capture_output=True, text=True)
            print(done.returncode, (done.stdout + done.stderr).strip(), flush=True)
        own = aios.proc.getpid()
        child = aios.proc.spawn("sleep", "600", kind="exec", name="asleep")
        run("aios-ps", "-o", "name=", "-p", str(child))
        run("aios-kill", str(child))
        run("aiosd", "set", "policy", "rr")
        run("aios-run", "--", "echo", "from below")
        pid = os.fork()
        if pid == 0:
            from libaios import wire
            from libaios.client import Client
            with Client() as client: print(client.call(wire.Sys.GETPID, wire.NoArgs(), int) == own, flush=True)
            os._exit(0)
        os.waitpid(pid, 0)
    """,
    )
    done = aiosd.run("aios-run", "--sandbox", level, "--net", "none", path, check=True)
    assert done.stdout.splitlines() == [
        "0 asleep", "0 ", "1 aiosd: an agent may not change settings", "0 from below", "True",
    ]  # fmt: skip


def test_a_door_opens_again_with_the_next_kernel(fresh_aiosd: Fresh, tmp_path: Path) -> None:
    """And the next kernel has the boxes of all agents."""
    system = fresh_aiosd("--sandbox", "flat")
    path = script(
        tmp_path,
        """
        import os, subprocess, sys
        import libaios as aios
        print("up", flush=True)
        sys.stdin.readline()
        print(subprocess.run(["aios-ps", "-o", "name=", "-C", "agent"], capture_output=True, text=True).stdout.strip())
        try: aios.proc.spawn("true", sandbox="none")
        except PermissionError as err: print(err.strerror)
    """,
    )
    run = system.popen("aios-run", path)
    assert run.stdin is not None
    assert run.stdout is not None
    assert run.stdout.readline() == "up\n"
    kernel = next(entry["ospid"] for entry in system.ps() if entry["name"] == "kernel")
    os.kill(kernel, signal.SIGKILL)
    print(file=run.stdin, flush=True)
    agent, refused = run.stdout.read().splitlines()
    assert agent == "agent"
    assert refused.startswith("sandbox: an agent in 'flat' may not start one in 'none': needs a person's approval")
    assert run.wait(30) == 0


def descriptor_of(ospid: int, what: str) -> int:
    """The number of a descriptor of a process that leads there."""
    return next(int(one.name) for one in Path(f"/proc/{ospid}/fd").iterdir() if what in os.readlink(one))


@pytest.mark.parametrize("noted", [True, False])
def test_a_request_at_a_door_is_answered_although_the_kernel_that_has_it_dies(
    fresh_aiosd: Fresh, tmp_path: Path, noted: bool
) -> None:
    """`noted`: it died just after it had noted the request, else just before."""
    system = fresh_aiosd("--sandbox", "flat")
    path = script(
        tmp_path,
        """
        import socket, subprocess, sys
        code = ["import socket", "socket.socket(socket.AF_UNIX).getpeername()"]
        for line in sys.stdin:
            done = subprocess.run([sys.executable, "-c", "\\n".join(code)], capture_output=True, text=True)
            print(done.returncode, *done.stderr.splitlines()[-1:], flush=True)
    """,
    )
    run = system.popen("aios-run", path)
    assert run.stdin is not None
    assert run.stdout is not None

    def again() -> None:
        assert run.stdin is not None
        print(file=run.stdin, flush=True)

    again()
    assert run.stdout.readline() == "0\n"
    [pid] = [entry["pid"] for entry in system.agents()]
    kernel = next(entry["ospid"] for entry in system.ps() if entry["name"] == "kernel")
    door = fork.pidfd_getfd(kernel, descriptor_of(kernel, "seccomp notify"))
    ledger = os.open(f"/proc/{kernel}/fd/{descriptor_of(kernel, 'aios-ledger')}", os.O_RDWR)
    os.kill(kernel, signal.SIGSTOP)
    again()
    received = doors.receive(door)  # in the place of the kernel
    if noted:
        _note_received(SimpleNamespace(row=Ledger(ledger).row(pid)), received)  # type: ignore[arg-type]
    os.kill(kernel, signal.SIGKILL)
    os.close(door)
    os.close(ledger)
    told = run.stdout.readline()
    assert told == "0\n" if noted else "Connection reset" in told
    again()
    assert run.stdout.readline() == "0\n", "its door is open"
    run.stdin.close()
    assert run.wait(30) == 0


def test_settings_groups_and_status(fresh_aiosd: Fresh, tmp_path: Path) -> None:
    system = fresh_aiosd(start=False, sandbox="")
    system.home.mkdir(exist_ok=True)
    (tmp_path / "data").mkdir()
    (system.home / "aiosd.toml").write_text(
        'sandbox = "none"\n'
        f'[[group]]\nname = "web"\nsandbox = "flat"\nnet = "none"\nread = ["{tmp_path}/data"]\nenv = ["KEY"]\n'
        f'[[agent]]\nname = "own"\ncommand = "sleep 600"\nsandbox = "flat"\nwrite = ["{tmp_path}/data"]\n'
    )
    system.start()
    assert system.status()["sandbox"]["groups"] == {"web": "flat"}
    assert "none, web flat" in system.run("aiosd", "status").stdout
    everything = system.run("aiosd", "status", "-v").stdout
    read = re.search(r"^  agents' read +(.*(?:\n {10}.*)*)$", everything, re.MULTILINE)  # in several lines
    assert read
    paths = set(re.split(r",\s+", read[1]))
    assert {"/usr", "/etc/passwd", sys.prefix} <= paths
    assert not {"/", os.path.expanduser("~"), "/etc/shadow"} & paths
    assert "LC_*, TZ" in everything
    (own,) = [entry for entry in system.ps() if entry["name"] == "own"]
    (shown,) = json.loads(system.run("aios-inspect", str(own["pid"])).stdout)
    assert shown["box"]["write"] == [str(tmp_path / "data")]
    path = script(
        tmp_path,
        f"""
        import os
        import libaios as aios
        print(os.listdir("{tmp_path}/data"), os.environ["KEY"], aios.proc.ps()[-1].sandbox)
    """,
    )
    done = system.run("aios-run", "-g", "web", path, env={"KEY": "k"})
    assert done.stdout == "[] k flat\n", done.stderr
    assert system.run("aios-run", path, env={"KEY": "k"}).stdout == "[] k none\n"
    assert system.run("aios-run", "--sandbox", "cave", path).returncode == 2
    missing = system.run("aios-run", *FLAT, "--write", "nonesuch", path)
    assert (missing.returncode, missing.stderr) == (
        125, "aios-run: nonesuch: there is no such file or folder to grant; make it first\n",
    )  # fmt: skip
    assert system.run("aios-run", "--net", "x/y", path).stderr.startswith("aios-run: --net: 'x/y' is no host")


#: In a user namespace with a limit of 0 further ones no cage is possible.
WITHOUT = ("unshare", "-Ur", "sh", "-c", 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"', "sh")
REMEDY = "user namespaces are switched off; sysctl user.max_user_namespaces=10000 allows them"


def test_where_there_is_no_cage_strict_does_not_start_and_all_else_is_one_level_lower(
    fresh_aiosd: Fresh, aiosd: System
) -> None:
    skip_unless_possible(aiosd, "cage")
    system = fresh_aiosd(start=False, sandbox="")
    refused = system.run(*WITHOUT, "aiosd", "--sandbox", "strict")
    assert (refused.returncode, refused.stderr) == (1, f"aiosd: sandbox strict: {REMEDY}\n")
    started = system.run(*WITHOUT, "aiosd", "-d")
    assert started.stderr.splitlines()[1:] == [f"aiosd: agents run in flat, not in a cage: {REMEDY}"]
    assert system.status()["sandbox"]["default"] == "flat"
    assert REMEDY in system.run("aiosd", "status").stdout
    assert system.run("aios-run", "--", "ls", "/").returncode == 2
    system.run("aiosd", "stop", check=True)


def test_under_strict_no_lower_level_can_be_chosen(fresh_aiosd: Fresh, aiosd: System) -> None:
    skip_unless_possible(aiosd, "cage")
    system = fresh_aiosd("--sandbox", "strict")
    assert "cage (strict)" in system.run("aiosd", "status").stdout
    assert "run in 'cage' or more" in system.run("aios-run", "--sandbox", "flat", "--", "true").stderr
    assert system.run("aios-run", "--", "true").returncode == 0


def test_hooks_and_settings_of_repositories_stay_as_they_are(aiosd: System, tmp_path: Path) -> None:
    """A hook that an agent wrote into a person's repository would run with the person's rights."""
    skip_unless_possible(aiosd, "cage")
    for repository in ("mine", "mine/sub/other"):
        (tmp_path / repository / ".git" / "hooks").mkdir(parents=True)
        (tmp_path / repository / ".git" / "config").write_text("[core]")
    (tmp_path / "mine" / ".envrc").touch()
    path = script(
        tmp_path,
        f"""
        import os
        def tried(deed, *args):
            try: deed(*args)
            except OSError as err: return err.strerror
            return "done"
        for top in ("{tmp_path}/mine", "{tmp_path}/mine/sub/other"):
            git = top + "/.git"
            print(tried(os.mkdir, git + "/hooks/x"), tried(open, git + "/config", "a"),
                tried(os.rename, git, git + "x"),
                tried(os.rename, git + "/hooks", git + "/y"), tried(open, git + "/index", "w"), sep=", ")
        print(tried(os.rename, "{tmp_path}/mine/sub", "{tmp_path}/mine/x"), tried(open, "{tmp_path}/mine/.envrc", "w"))
        print(tried(open, "{tmp_path}/mine/new", "w"))
    """,
    )
    done = aiosd.run("aios-run", "--sandbox", "cage", "--write", tmp_path / "mine", path, check=True)
    frozen, busy = "Read-only file system", "Device or resource busy"
    assert done.stdout.splitlines() == [
        *[f"{frozen}, {frozen}, {busy}, {busy}, done"] * 2, f"{busy} {frozen}", "done",
    ]  # fmt: skip


def test_what_an_agent_makes_in_tmp_is_its_own(aiosd: System, tmp_path: Path) -> None:
    skip_unless_possible(aiosd, "cage")
    path = script(
        tmp_path,
        """
        import os
        for folder in ("/tmp", "/dev/shm"):
            print(os.path.exists(folder + "/of-an-agent"))
            open(folder + "/of-an-agent", "w").close()
        print(os.statvfs("/tmp").f_blocks * os.statvfs("/tmp").f_frsize >> 20)
    """,
    )
    for _ in range(2):
        assert aiosd.run("aios-run", "--sandbox", "cage", path, check=True).stdout == "False\nFalse\n64\n"
    assert not any(os.path.exists(folder + "/of-an-agent") for folder in ("/tmp", "/dev/shm"))


def test_a_restarted_agent_is_confined_again(aiosd: System, tmp_path: Path) -> None:
    path = script(
        tmp_path,
        """
        import os, subprocess
        done = subprocess.run(["aios-ps", "-o", "name="], capture_output=True, text=True)
        try: os.listdir("/root" if os.getuid() == 0 else os.path.expanduser("~root"))
        except PermissionError: print("confined", done.stdout.strip(), flush=True)
        os._exit(1)
    """,
    )
    options = ("-d", "--name", "twice", "--restart", "on-failure:1", *FLAT)
    pid = aiosd.run("aios-run", *options, path, check=True).stdout.strip()
    assert aiosd.run("aios-wait", pid).returncode == 1
    assert eventually(lambda: aiosd.run("aios-logs", pid).stdout == "confined twice\n" * 2)


def test_workspaces_stay_and_are_kept_apart(aiosd: System, level: str, tmp_path: Path) -> None:
    path = script(
        tmp_path,
        """
        import os
        seen = os.path.exists(os.path.expanduser("~/mark"))
        open(os.path.expanduser("~/mark"), "w").close()
        print(seen, end="")
    """,
    )
    options = [(), (), ("--name", "ada"), ("--name", "ada"), ("-g", "others")]
    assert [aiosd.run("aios-run", "--sandbox", level, *more, path).stdout for more in options] == [
        "False", "True", "False", "True", "False",
    ]  # fmt: skip


def test_an_agent_that_is_not_confined_may_start_one_that_is(aiosd: System, tmp_path: Path) -> None:
    path = script(
        tmp_path,
        """
        import libaios as aios
        print(aios.proc.wait(aios.proc.spawn("child.py", sandbox="flat", detached=False))[1])
    """,
    )
    script(tmp_path, "import os\nos.listdir('/')", "child.py")
    assert aiosd.run("aios-run", path, cwd=path.parent, check=True).stdout == "1\n"
