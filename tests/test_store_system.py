"""Notes through a whole system: names, deaths, bad input."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from libaios import wire
from libaios.client import Client
from libaios.home import Home
from tests.conftest import System, eventually

ADD = "import sys, libaios as aios\naios.mem.add(sys.argv[1])\n"
LIST = "import libaios as aios\nprint([note.text for note in aios.mem.list()])\n"


def ospid(system: System) -> int:
    return next((entry["ospid"] for entry in system.ps() if entry["name"] == "store"), 0)


def kill(system: System) -> None:
    old = eventually(lambda: ospid(system))  # 0 between a death and the next fork
    assert old
    os.kill(old, signal.SIGKILL)
    assert eventually(lambda: not psutil.pid_exists(old))


def test_an_agent_remembers_under_its_name(fresh_aiosd: Callable[..., System], tmp_path: Path) -> None:
    system = fresh_aiosd()
    (add := tmp_path / "add.py").write_text(ADD)
    (listed := tmp_path / "list.py").write_text(LIST)
    system.run("aios-run", "--name", "me", str(add), "named", check=True)
    system.run("aios-run", str(add), "nameless", check=True)
    assert system.run("aios-run", "--name", "me", str(listed), check=True).stdout == "['named']\n"
    assert system.run("aios-run", str(listed), check=True).stdout == "[]\n"
    system.stop()
    system.start()
    assert system.run("aios-run", "--name", "me", str(listed), check=True).stdout == "['named']\n"


def test_acknowledged_notes_outlive_the_store(fresh_aiosd: Callable[..., System]) -> None:
    """The store is killed again and again under open calls: each note is there, and once."""
    system = fresh_aiosd()
    with Client(Home(str(system.home))) as client:
        written = 0
        for _ in range(4):
            calls = [client.submit(wire.Sys.MEM_ADD, wire.MemAdd(f"note {written + n}")) for n in range(50)]
            kill(system)
            for call in calls:
                client.result(call, int, timeout=20.0)
            written += len(calls)
        notes = client.call(wire.Sys.MEM_LIST, wire.MemList(limit=1000), list[wire.Note])
    assert sorted(note.text for note in notes) == sorted(f"note {number}" for number in range(written))


def test_bad_input_is_refused_with_a_sentence(fresh_aiosd: Callable[..., System]) -> None:
    system = fresh_aiosd()
    nan = float("nan")
    with Client(Home(str(system.home))) as client:
        for number, args in (
            (wire.Sys.MEM_SEARCH, wire.MemSearch("x", 0)),
            (wire.Sys.MEM_SEARCH, wire.MemSearch("x", 10**6)),
            (wire.Sys.MEM_SEARCH, wire.MemSearch("x", -1)),
            (wire.Sys.MEM_SEARCH, wire.MemSearch("x", 5, wire.NoteFilters(since=nan))),
            (wire.Sys.MEM_GET, wire.MemGet(-1)),
            (wire.Sys.MEM_GET, wire.MemGet("k" * 4096)),
            (wire.Sys.MEM_UPDATE, wire.MemUpdate(1, if_version=-1)),
            (wire.Sys.MEM_ADD, wire.MemAdd("x" * (2 << 20))),
            (wire.Sys.MEM_ADD, wire.MemAdd("x", ttl_s=nan)),
            (wire.Sys.MEM_ADD, wire.MemAdd("x", metadata={"n": nan})),
            (wire.Sys.MEM_ADD, wire.MemAdd("x", metadata={"n": [1]})),
        ):
            with pytest.raises(OSError, match=r": (expected|at most) ") as caught:
                client.call(number, args, None)
            assert caught.value.errno == errno.EINVAL, args
        assert client.call(wire.Sys.MEM_LIST, wire.MemList(), list[wire.Note]) == []
        services = {service["name"]: service for service in system.status()["services"]}
        assert services["store"]["stats"]["search"].startswith("by words (no embedder")
