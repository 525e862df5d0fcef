"""aiosd run by an ordinary user. The other tests run as the user who starts them, who is often root.

In a user namespace root becomes an ordinary user here: with another uid, no capabilities, and the same files.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import System

UID = 1000
ORDINARY = ("unshare", "--user", f"--map-user={UID}", f"--map-group={UID}", "--") if os.geteuid() == 0 else ()


def can_be_ordinary() -> bool:
    try:
        return subprocess.run([*ORDINARY, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


pytestmark = pytest.mark.skipif(not can_be_ordinary(), reason="no user namespaces here, and this is root")

#: Prints what an agent sees of itself and of the machine.
LOOK = """
import json, os, sys
import libaios as aios

def tried(deed):
    try: return bool(deed())
    except OSError as err: return type(err).__name__

status = dict(line.split(":\\t") for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
open(os.path.expanduser("~/kept"), "w").write("mine")
print(json.dumps({
    "uid": os.getuid(),
    "capabilities": int(status["CapEff"], 16),
    "data": tried(lambda: open(sys.argv[1])),
    "kernel": tried(lambda: os.kill(int(sys.argv[2]), 9)),
    "tool": aios.tool.call("shell", command="cat kept; echo; id -u")["output"].split(),
    "answer": bool(aios.llm.complete("1 2 3", max_tokens=4).tokens),
    "child": aios.proc.wait(aios.proc.spawn("true"))[1],
}))
"""


@pytest.fixture(scope="module")
def ordinary() -> Iterator[System]:
    system = System(program=(*ORDINARY, "aiosd"), sandbox="").start()
    possible = system.status()["sandbox"]["possible"]
    if possible != "none":
        yield system
    assert system.destroy() == []
    system.remove()
    if possible == "none":
        pytest.skip("this machine confines no agents")


def test_an_agent_is_confined_and_has_all_that_the_documentation_says(ordinary: System, tmp_path: Path) -> None:
    (tmp_path / "look.py").write_text(LOOK)
    kernel = next(entry["ospid"] for entry in ordinary.ps() if entry["name"] == "kernel")
    data = next(path for path in (ordinary.home / "data").rglob("*") if path.is_file())
    done = ordinary.run(*ORDINARY, "aios-run", tmp_path / "look.py", data, str(kernel), check=True)
    found = json.loads(done.stdout)
    uid = os.geteuid() or UID
    assert found.pop("data") in ("PermissionError", "FileNotFoundError")
    assert found.pop("kernel") in ("PermissionError", "ProcessLookupError")
    assert found == {"uid": uid, "capabilities": 0, "tool": ["mine", str(uid)], "answer": True, "child": 0}


def test_it_goes_into_the_background_and_ends_as_a_whole(fresh_aiosd: Callable[..., System]) -> None:
    system = fresh_aiosd(start=False, sandbox="")
    inside = "aiosd -d && aios-run -d -- sleep 1000 && aios-ps && aiosd stop"
    done = system.run(*ORDINARY, "sh", "-c", inside)
    assert (done.returncode, done.stderr.partition(";")[0]) == (0, "aiosd: ready (nano"), done.stderr
    assert "sleep" in done.stdout
    assert system.processes() == []
