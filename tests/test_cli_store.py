"""aiosd fsck, backup, export, import, against a real system."""

from __future__ import annotations

import errno
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from aiosd.store import roots
from aiosd.store.database import FILE
from libaios import wire
from libaios.client import Client
from libaios.home import Home
from tests.conftest import System
from tests.test_store_damage import zero

SNAPSHOT = """
import libaios.wire as wire
from libaios.agent import connection
try:
    connection().call(wire.Sys.STORE_SNAPSHOT, wire.NoArgs(), str)
except PermissionError as err:
    print(err.strerror)
"""


def texts(file: Path) -> list[str]:
    with tarfile.open(file) as tar:
        return [json.loads(line)["text"] for line in tar.extractfile("notes.jsonl") or []]


def test_from_one_home_to_another(fresh_aiosd: Callable[..., System], tmp_path: Path) -> None:
    system = fresh_aiosd()
    (agent := tmp_path / "agent.py").write_text(SNAPSHOT)
    with Client(Home(str(system.home))) as client:
        for number in range(20):
            client.call(wire.Sys.MEM_ADD, wire.MemAdd(f"note {number}"), int)
    noted = [f"note {number}" for number in range(20)]
    assert system.run("aios-run", str(agent)).stdout == "an agent may not copy what all agents keep\n"
    for argv in (["fsck"], ["import", str(agent)]):
        done = system.run("aiosd", *argv)
        assert (done.returncode, done.stdout) == (1, "")
        assert "aiosd is running" in done.stderr

    export, backup = tmp_path / "export.tar", tmp_path / "backup.tar"
    assert system.run("aiosd", "export", export, check=True).stdout == f"{export}: 1 owner, 20 notes\n"
    system.run("aiosd", "backup", backup, check=True)
    assert texts(export) == noted
    assert system.run("aiosd", "export", export).stderr == f"aiosd: {export}: exists already\n"
    assert not list((system.home / "data" / "store" / "snapshots").iterdir())

    system.stop()
    assert "nothing is damaged" in system.run("aiosd", "fsck", check=True).stdout
    refused = system.run("aiosd", "import", backup)
    assert refused.returncode == 1
    assert "the store has 1 owner, 20 notes; --replace" in refused.stderr
    system.run("aiosd", "import", "--replace", backup, check=True)
    system.run("aiosd", "export", tmp_path / "again.tar", check=True)
    assert texts(tmp_path / "again.tar") == noted

    script = "aiosd export - | tee piped.tar | AIOS_HOME=$OTHER aiosd import -"
    piped = system.run("sh", "-c", script, env={"OTHER": str(tmp_path / "piped")}, cwd=tmp_path)
    assert (piped.stdout, piped.stderr) == ("-: 1 owner, 20 notes\n", "-: 1 owner, 20 notes\n")
    assert texts(tmp_path / "piped.tar") == noted
    assert not (tmp_path / "-").exists()

    other = fresh_aiosd(start=False)
    other.run("aiosd", "import", export, check=True)
    other.start()
    with Client(Home(str(other.home))) as client:
        found = client.call(wire.Sys.MEM_SEARCH, wire.MemSearch("7"), list[wire.Found])
    assert [one.note.text for one in found] == ["note 7"]


def test_a_damaged_store_is_named_and_repaired(fresh_aiosd: Callable[..., System], tmp_path: Path) -> None:
    """aiosd serves the undamaged part meanwhile, and its log says what to do."""
    system = fresh_aiosd()
    with Client(Home(str(system.home))) as client:
        for number in range(20):
            client.call(wire.Sys.MEM_ADD, wire.MemAdd(f"note {number}", key=f"k{number}"), int)
    system.stop()
    path = system.home / "data" / "store" / FILE
    zero(path, roots.read(path).roots["owners"])
    assert "lost/1: 20 notes of an owner that is not known" in system.run("aiosd", "fsck", "--repair").stdout
    assert system.run("aiosd", "fsck", "--give", "lost/1", "me", check=True).stdout == "lost/1: 20 notes of me now\n"
    twice = system.run("aiosd", "fsck", "--give", "lost/1", "me")
    assert (twice.returncode, "nothing that has lost its owner" in twice.stderr) == (1, True)

    zero(path, roots.read(path).roots["notes"])
    damaged = system.run("aiosd", "fsck")
    assert damaged.returncode == 1
    assert ": notes 1 and what follows" in damaged.stdout

    system.start()
    with Client(Home(str(system.home))) as client:
        with pytest.raises(OSError, match="damaged on the disk") as caught:
            client.call(wire.Sys.MEM_GET, wire.MemGet(1), wire.Note)
        assert caught.value.errno == errno.EIO
        assert client.call(wire.Sys.GETPID, wire.NoArgs(), int) == 0
    assert "`aiosd fsck` names what was hit" in system.log()
    system.stop()

    repaired = system.run("aiosd", "fsck", "--repair", check=True).stdout
    assert "the old one is " in repaired
    assert "nothing is damaged" in system.run("aiosd", "fsck", check=True).stdout
    first = path.with_name(FILE).read_bytes()
    system.run("aiosd", "fsck", "--repair", check=True)
    assert path.read_bytes() == first, "a whole store is left alone"
    assert system.run("aiosd", "fsck", env={"AIOS_HOME": str(tmp_path)}).stderr.startswith(
        "aiosd: there is no store in"
    )
