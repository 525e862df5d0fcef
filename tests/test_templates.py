"""Agents that are forked from templates (`aios-run --preload`) behave like others, and share loaded modules."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from aiosd.config import autostart
from aiosd.sandbox.box import LEVELS
from libaios import wire
from libaios.client import Client
from libaios.home import Home
from tests.conftest import System, eventually

#: Prints what an agent finds: its interpreter, its parent, whether modules were loaded before it, its folder.
LOOK = """
import json, os, sys
import libaios as aios
found = {"python": sys.executable, "argv": sys.argv, "name": __name__, "pid": aios.proc.getpid(), "cwd": os.getcwd()}
found |= {"parent": os.getppid(), "session": os.getsid(0) == os.getpid(), "threads": len(os.listdir("/proc/self/task"))}
import warm
found |= {"warm": warm.IMPORTED_IN != os.getpid(), "uses": warm.use(), "environ": dict(os.environ)}
found |= {"fds": sorted(int(fd) for fd in os.listdir("/proc/self/fd"))}
print(json.dumps(found))
sys.exit(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
"""

MODULES = {
    "warm": "import os\nIMPORTED_IN = os.getpid()\ndef use():\n    return 1\n",
    "threaded": "import threading as t, time\nt.Thread(target=time.sleep, args=(9,), name='ticker').start()\n",
    "late": "VALUE = 5\n",
    "broken": "raise ValueError('no luck')\n",
    "needy": "import not_there\n",
    "leaving": "raise SystemExit(0)\n",
    "gated": "import os, time\nwhile not os.path.exists({gate!r}):\n    time.sleep(0.02)\n",
    "endings": "import atexit\natexit.register(lambda: print('at exit', flush=True))\n",
}


#: A client that loads a part of itself at its first use.
CLIENT = """
import json, urllib.request

class OpenAI:
    def __init__(self, base_url, **options):
        self.url, self.chat, self.completions = base_url, self, self
    def __enter__(self):
        return self
    def __exit__(self, *of_error):
        pass
    def create(self, **ask):
        import lazy
        request = urllib.request.Request(self.url + "/chat/completions", json.dumps(ask).encode())
        with urllib.request.urlopen(request) as reply:
            lazy.ANSWERS.append(reply.read().decode())
        return lazy.ANSWERS
"""
MODULES |= {"openai": CLIENT, "lazy": "ANSWERS = []\n"}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment without aiosd and msgspec, with some modules of its own."""
    folder = tmp_path_factory.mktemp("env") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--symlinks", folder], check=True, timeout=60)
    site = next(folder.glob("lib/python*/site-packages"))
    for name, source in MODULES.items():
        (site / f"{name}.py").write_text(source.replace("{gate!r}", repr(str(folder / "gate"))))
    return folder


@pytest.fixture(scope="module")
def system_of_module() -> Iterator[System]:
    system = System("--log-level", "info").start()
    yield system
    left = system.destroy()
    system.remove()
    assert left == []


@pytest.fixture
def system(system_of_module: System) -> Iterator[System]:
    """A system that has no agents and templates at the end of a test."""
    yield system_of_module
    end_templates(system_of_module)
    assert system_of_module.calm_down() == []


def end_templates(system: System) -> None:
    """Kill all templates, and wait until the kernel has recorded it."""
    with Client(Home(system.home)) as client:

        def status() -> dict[str, Any]:
            return client.call(wire.Sys.STATUS, wire.Status(), dict[str, Any], timeout=30)

        for template in status()["templates"]:
            psutil.Process(template["ospid"]).kill()
        assert eventually(lambda: not status()["templates"])


def templates(system: System) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(supervisor(system)).children():
        with contextlib.suppress(psutil.Error):
            if process.name() == "aios:template":
                found.append(process)
    return found


def supervisor(system: System) -> int:
    return int(next(entry["ospid"] for entry in system.ps() if entry["name"] == "supervisor"))


def script(folder: Path, source: str, name: str = "agent.py") -> Path:
    path = folder / name
    path.write_text(textwrap.dedent(source))
    return path


def run(system: System, environment: Path, *words: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return system.run("aios-run", "--preload", "warm", "--python", environment, *words, **options)  # type: ignore[arg-type]


def test_an_agent_of_another_environment(system: System, environment: Path, tmp_path: Path) -> None:
    path = script(tmp_path, LOOK)
    done = run(system, environment, path, "7", cwd=tmp_path, env={"COLOUR": "green", "OPENBLAS_NUM_THREADS": "3"})
    assert (done.returncode, done.stderr) == (7, "")
    found = json.loads(done.stdout)
    assert found["python"] == str(environment / "bin" / "python")
    assert (found["warm"], found["uses"], found["argv"]) == (True, 1, [str(path), "7"])
    assert (found["name"], found["cwd"], found["session"], found["threads"]) == ("__main__", str(tmp_path), True, 1)
    assert found["parent"] == supervisor(system)
    environ = found["environ"]
    assert environ["COLOUR"] == "green"
    assert environ["OPENBLAS_NUM_THREADS"] == "3"  # not that of the template
    assert len(found["fds"]) == 7  # three, bell, channel and its mapping, the folder being listed
    (shown,) = system.status()["templates"]
    assert (shown["name"], shown["state"], shown["agents"]) == ("template:warm", "ready", 1)
    line = next(entry for entry in system.ps() if entry["name"] == "template:warm")
    assert line["system"]
    assert line["mem_bytes"] > 0
    assert "templates" in system.run("aiosd", "status").stdout
    shown = system.run("aios-ps", "-e", "--dead", "-C", "agent", "-o", "template=", check=True).stdout.split()
    assert set(shown) == {"template:warm"}
    (about,) = json.loads(system.run("aios-inspect", "agent", check=True).stdout)
    python = str(environment / "bin" / "python")
    assert about["template"] == {"name": "template:warm", "modules": ["warm"], "python": python}
    refused = system.run("aios-kill", "template:warm")
    assert refused.returncode == 1


def test_many_at_once_share_one_template(system: System, environment: Path, tmp_path: Path) -> None:
    path = script(
        tmp_path, "import os, random, libaios, warm\nprint(libaios.proc.getpid(), random.random(), os.getpid())"
    )
    clients = [
        system.popen("aios-run", "--preload", "warm", "--python", environment, path, stderr=subprocess.STDOUT)
        for _ in range(12)
    ]
    lines = [client.communicate(timeout=60)[0].split() for client in clients]
    assert [client.returncode for client in clients] == [0] * 12
    assert [len({line[column] for line in lines}) for column in range(3)] == [12] * 3
    assert [one["agents"] for one in system.status()["templates"]] == [12]


def test_signals_stops_and_exit_codes(system: System, environment: Path, tmp_path: Path) -> None:
    path = script(tmp_path, "import signal, warm\nprint('here', flush=True)\nsignal.pause()")
    pid = run(system, environment, "-d", path).stdout.strip()
    assert eventually(lambda: "here" in system.run("aios-logs", pid).stdout)
    assert system.run("aios-kill", "-STOP", pid).returncode == 0
    assert [agent["stat"] for agent in system.agents()] == ["T"]
    assert system.run("aios-kill", "-CONT", pid).returncode == 0
    (agent,) = system.agents()
    assert os.getpgid(agent["ospid"]) == agent["ospid"]
    end_templates(system)  # an agent does not need its template any more
    assert system.run("aios-kill", pid).returncode == 0
    assert system.run("aios-wait", pid).returncode == 128 + signal.SIGTERM


def test_a_module_as_the_program_and_what_it_registers_for_its_end(system: System, environment: Path) -> None:
    done = system.run("aios-run", "--preload", "endings", "--python", environment, "-m", "timeit", "-n1", "-r1", "0")
    assert done.returncode == 0
    assert "1 loop" in done.stdout
    assert done.stdout.endswith("at exit\n")


def test_objects_that_are_created_in_use_exist_before(system: System, environment: Path, tmp_path: Path) -> None:
    source = """
        import sys
        whole, stream = sys.modules["lazy"].ANSWERS
        print('"content": "x"' in whole, stream.startswith("data: {"), stream.endswith("[DONE]\\n\\n"))
    """
    done = system.run("aios-run", "--preload", "openai", "--python", environment, script(tmp_path, source))
    assert (done.returncode, done.stdout, done.stderr) == (0, "True True True\n", "")
    (template,) = templates(system)
    assert template.children() == []


def test_a_template_has_no_data_of_its_agents(system: System, environment: Path, tmp_path: Path) -> None:
    path = script(tmp_path, "import sys\nprint(input(), sys.argv[1][::-1])")
    secret = "".join(reversed("eman-terces"))
    done = run(system, environment, path, f"{secret}-1", input=f"{secret}-2\n", env={"KEY": f"{secret}-3"})
    assert (done.returncode, done.stdout.split()) == (0, [f"{secret}-2", f"{secret}-1"[::-1]])
    (template,) = templates(system)
    memory = whole_memory(template.pid)
    assert b"template" in memory
    assert secret.encode() not in memory
    assert str(tmp_path).encode() not in memory


def whole_memory(pid: int) -> bytes:
    parts = []
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in maps:
            place, mode, *_ = line.split()
            if mode.startswith("rw"):
                low, high = (int(end, 16) for end in place.split("-"))
                with contextlib.suppress(OSError):
                    parts.append(os.pread(memory.fileno(), high - low, low))
    return b"".join(parts)


CANNOT = {
    "not_there": ("no module 'not_there' in ", 127),
    "needy": ("no module 'not_there' (which needy imports)", 127),
    "broken": ("the import of broken failed: ValueError: no luck", 125),
    "leaving": ("the import of leaving failed: SystemExit", 125),
    "threaded": ("threads, which agents would not have: ticker", 125),
}


def test_invalid_templates(system: System, environment: Path, tmp_path: Path) -> None:
    path = script(tmp_path, "print('runs')")
    for module, (words, code) in CANNOT.items():
        done = system.run("aios-run", "--preload", f"warm,{module}", "--python", environment, path)
        assert (done.returncode, done.stdout) == (code, "")
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
    assert system.status()["templates"] == []


def test_invalid_interpreters(system: System, tmp_path: Path) -> None:
    path = script(tmp_path, "print('runs')")
    old = script(tmp_path, "#!/bin/sh\nexit 3\n", "python")
    missing = system.run("aios-run", "--preload", "json", "--python", tmp_path / "nowhere", path)
    assert (missing.returncode, "there is no such interpreter" in missing.stderr) == (127, True)
    plain = system.run("aios-run", "--preload", "json", "--python", old, path)
    assert (plain.returncode, "cannot be executed" in plain.stderr) == (126, True)
    old.chmod(0o755)
    other = system.run("aios-run", "--preload", "json", "--python", old, path)
    assert (other.returncode, "template:json" in other.stderr) == (125, True)
    for words in (("--preload", "a b"), ("--preload", "json", "--"), ("--python", "x")):
        assert system.run("aios-run", *words, path).returncode == 2


def test_files_that_change_make_a_new_template(system: System, environment: Path, tmp_path: Path) -> None:
    path = script(tmp_path, "import warm\nprint(warm.use())")
    file = next(environment.glob("lib/python*/site-packages/warm.py"))
    was = file.read_text()
    try:
        assert run(system, environment, path).stdout == "1\n"
        (first,) = templates(system)
        file.write_text(was.replace("return 1", "return 22"))
        assert eventually(lambda: run(system, environment, path).stdout == "22\n")  # files are checked once a second
        (second,) = templates(system)
        assert first.pid != second.pid
    finally:
        file.write_text(was)


def test_an_agent_is_started_again_from_its_template(system: System, environment: Path, tmp_path: Path) -> None:
    path = script(tmp_path, "import os, warm\nprint(warm.IMPORTED_IN != os.getpid(), flush=True)\nraise SystemExit(3)")
    pid = run(system, environment, "-d", "--restart", "on-failure:2", path).stdout.strip()
    assert system.run("aios-wait", pid).returncode == 3
    assert system.run("aios-logs", pid).stdout.splitlines() == ["True"] * 3


def test_a_kernel_that_dies_while_a_template_loads(
    fresh_aiosd: Callable[..., System], environment: Path, tmp_path: Path
) -> None:
    system = fresh_aiosd()
    path, gate = script(tmp_path, "print('once')"), environment / "gate"
    client = system.popen("aios-run", "--preload", "gated", "--python", environment, path)
    assert eventually(lambda: [one["state"] for one in system.status()["templates"]] == ["loading"])
    kernel = next(entry["ospid"] for entry in system.ps() if entry["name"] == "kernel")
    os.kill(kernel, signal.SIGKILL)
    assert eventually(lambda: system.run("aiosd", "status").returncode == 0)
    assert [one["state"] for one in system.status()["templates"]] == ["loading"]
    try:
        gate.touch()
        out, err = client.communicate(timeout=30)
    finally:
        gate.unlink()
    assert (client.returncode, out, err) == (0, "once\n", "")


def test_a_template_that_is_killed_while_it_loads(system: System, environment: Path, tmp_path: Path) -> None:
    path = script(tmp_path, "print('never')")
    client = system.popen("aios-run", "--preload", "gated", "--python", environment, path)
    assert eventually(lambda: templates(system))
    templates(system)[0].kill()
    out, err = client.communicate(timeout=30)
    assert (client.returncode, out) == (125, "")
    assert "template:gated" in err


@pytest.mark.parametrize("level", LEVELS[1:])
def test_confined_agents(system: System, environment: Path, tmp_path: Path, level: str) -> None:
    """An agent that is forked from a template is confined. A confined agent may name none: its modules would not be."""
    if LEVELS.index(system.status()["sandbox"]["possible"]) < LEVELS.index(level):
        pytest.skip(f"no {level} on this machine")
    (tmp_path / "own").mkdir()
    (tmp_path / "secret").write_text("secret")
    source = """
        import libaios, os, warm
        try:
            print(open("../secret").read())
        except OSError:
            print("confined")
        try:
            libaios.proc.spawn("x.py", preload=["warm"])
        except PermissionError as err:
            print(err.strerror)
        import late
        print(libaios.tool.list()[:0], late.VALUE)
    """
    script(tmp_path / "own", source)
    done = run(system, environment, "--sandbox", level, "agent.py", cwd=tmp_path / "own")
    assert (done.returncode, done.stderr) == (0, "")
    first, second, third = done.stdout.splitlines()
    assert (first, "no confined agent" in second, third) == ("confined", True, "[] 5")


def test_random_numbers_of_numpy_differ(system: System, tmp_path: Path) -> None:
    pytest.importorskip("numpy")
    path = script(tmp_path, "import numpy as np\nprint(np.random.rand())")
    drawn = {system.run("aios-run", "--preload", "numpy.random", path, check=True).stdout for _ in range(2)}
    assert len(drawn) == 2


def test_an_agent_that_starts_with_the_system(
    fresh_aiosd: Callable[..., System], environment: Path, tmp_path: Path
) -> None:
    """It is forked from a template, which ends when it has been idle for a while."""
    script(tmp_path, "import warm\nprint(warm.use())")
    agent = f'[[agent]]\nfile = "agent.py"\npreload = "warm"\npython = "{environment}"\n'
    (tmp_path / "aiosd.toml").write_text(agent)
    system = fresh_aiosd("--template-idle", "0.3", "--config", str(tmp_path / "aiosd.toml"))
    assert eventually(lambda: system.run("aios-logs", "agent").stdout == "1\n")
    assert eventually(lambda: not system.status()["templates"])
    assert templates(system) == []


@pytest.mark.parametrize(
    "values",
    [
        {"command": ["true"], "preload": ["json"]},
        {"file": ["x.py"], "python": "venv"},
        {"file": ["x.py"], "preload": ["json"], "python": "nowhere"},
    ],
)
def test_invalid_settings(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"preload goes with|there is no such interpreter"):
        autostart.read(values, str(tmp_path))
    with pytest.raises(ValueError, match="no names of modules"):
        autostart.READERS["preload"]("json,2x")
