"""Confined agents in a real system: what they see, their children, their commands, their end."""

from __future__ import annotations

import json
import os
import signal
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import System, eventually

Fresh = Callable[..., System]
FLAT = ("--sandbox", "flat")


@pytest.fixture(autouse=True)
def possible(request: pytest.FixtureRequest) -> None:
    if "aiosd" in request.fixturenames:
        found = request.getfixturevalue("aiosd").status()["sandbox"]
        if found["possible"] == "none":
            pytest.skip(found["why_no_more"])


def script(folder: Path, code: str, name: str = "agent.py") -> Path:
    path = folder / "project" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(textwrap.dedent(code))
    return path


def test_what_an_agent_sees(aiosd: System, tmp_path: Path) -> None:
    """Its own folder to be read, a workspace as home, and of the environment what is no secret."""
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
    done = aiosd.run("aios-run", *FLAT, path, cwd=tmp_path, check=True, env={"API_KEY": "x", "LC_ALL": "C.UTF-8"})
    seen = json.loads(done.stdout)
    assert [seen[name] for name in ("own", "change", "beside", "home")] == [
        "done", "Permission denied", "Permission denied", "done",
    ]  # fmt: skip
    assert "API_KEY" not in seen["names"]
    assert "LC_ALL" in seen["names"]
    assert seen["HOME"].startswith(str(aiosd.home / "data" / "workspaces" / "default" / "agent.py-"))
    assert seen["cwd"] == seen["HOME"], "where it was started it could not read"
    assert seen["temporary"].startswith(seen["HOME"])
    assert os.path.exists(seen["HOME"] + "/notes")
    assert os.stat(seen["HOME"]).st_mode & 0o777 == 0o700


def test_what_is_granted(aiosd: System, tmp_path: Path) -> None:
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
    done = aiosd.run("aios-run", *FLAT, *options, path, cwd=tmp_path, env={"KEY": "1"})
    assert done.stdout == "text 1 2\n"
    assert (tmp_path / "out" / "b.txt").read_text() == "written"
    last = done.stderr.splitlines()[-1]
    assert last == (
        f"(sandbox flat: aios-run --write {tmp_path}/in/a.txt, or write of [[group]] in aiosd.toml, would allow it)"
    )
    assert (done.returncode, (tmp_path / "in" / "a.txt").read_text()) == (1, "text")


def test_a_link_in_what_is_granted_leads_nowhere(aiosd: System, tmp_path: Path) -> None:
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "a.txt").write_text("secret")
    path = script(tmp_path, "print(open('link/a.txt').read())")
    (path.parent / "link").symlink_to(tmp_path / "hidden")
    done = aiosd.run("aios-run", *FLAT, path, cwd=path.parent)
    assert (done.returncode, done.stdout) == (1, "")


def test_programs_are_confined_alike(aiosd: System, tmp_path: Path) -> None:
    (tmp_path / "hidden.txt").write_text("secret")
    assert aiosd.run("aios-run", *FLAT, "--", "cat", tmp_path / "hidden.txt").returncode == 1
    tool = tmp_path / "tools" / "tool"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\ncat ~/../../../../../../hidden.txt; cd; pwd; exit 3\n")
    tool.chmod(0o755)
    done = aiosd.run("aios-run", *FLAT, "--", "tools/tool", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "workspaces/default/tool-" in done.stdout


def test_a_script_is_looked_up_with_its_own_rights(aiosd: System, tmp_path: Path) -> None:
    """An agent that starts another names a file that it cannot read itself."""
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
    done = aiosd.run("aios-run", *FLAT, path, check=True)
    assert done.stdout == f"{tmp_path}/hidden.py: permission denied\n" * 2


def test_children_have_the_same_box_and_no_way_out(aiosd: System, tmp_path: Path) -> None:
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
    done = aiosd.run("aios-run", *FLAT, "--net", "none", path, cwd=path.parent, check=True)
    assert done.stdout == "seen\n1\n"
    refusals = [line for line in done.stderr.splitlines() if line.startswith("aios-run: ")]
    assert [line.split(": ")[1] for line in refusals] == ["sandbox"] * 4, done.stderr


def test_commands_work_with_the_agents_rights(aiosd: System, tmp_path: Path) -> None:
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
    done = aiosd.run("aios-run", *FLAT, "--net", "none", path, check=True)
    assert done.stdout.splitlines() == [
        "0 asleep", "0 ", "1 aiosd: an agent may not change settings", "0 from below", "True",
    ]  # fmt: skip


def test_a_door_opens_again_with_the_next_kernel(fresh_aiosd: Fresh, tmp_path: Path) -> None:
    """And the next kernel knows how its agents are confined."""
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
    assert run.stdout.read().splitlines() == [
        "agent", "sandbox: an agent in 'flat' may not start one in 'none'",
    ]  # fmt: skip
    assert run.wait(20) == 0


def test_settings_groups_and_status(fresh_aiosd: Fresh, tmp_path: Path) -> None:
    system = fresh_aiosd(start=False)
    system.home.mkdir(exist_ok=True)
    (tmp_path / "data").mkdir()
    (system.home / "aiosd.toml").write_text(
        f'[[group]]\nname = "web"\nsandbox = "flat"\nnet = "none"\nread = ["{tmp_path}/data"]\nenv = ["KEY"]\n'
        f'[[agent]]\nname = "own"\ncommand = "sleep 600"\nsandbox = "flat"\nwrite = ["{tmp_path}/data"]\n'
    )
    system.start()
    assert system.status()["sandbox"]["groups"] == {"web": "flat"}
    assert "none, web flat" in system.run("aiosd", "status").stdout
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
    for word in ("cage", "hosts"):
        assert system.run("aios-run", "--sandbox", word, path).returncode == 2
    assert system.run("aios-run", "--net", "example.org", path).stderr.endswith(
        "must be none or all; single hosts cannot be granted (see aios-run --help)\n"
    )


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


def test_workspaces_stay_and_are_kept_apart(aiosd: System, tmp_path: Path) -> None:
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
    assert [aiosd.run("aios-run", *FLAT, *more, path).stdout for more in options] == [
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
