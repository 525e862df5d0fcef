"""Notes through a whole system: names, deaths, bad input."""

from __future__ import annotations

import errno
import json
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
#: Arguments that the SDK refuses, or changes before they are sent.
BAD = """
import libaios as aios
for act in (
    lambda: aios.mem.add("a\\udc80"),
    lambda: aios.mem.get(1 << 70),
    lambda: aios.mem.add("x" * (100 << 20)),
    lambda: aios.mem.add("x", tags="abc"),
    lambda: aios.mem.add("x", metadata=[("a", 1)]),
    lambda: aios.mem.search("x", tags=5),
):
    try: act()
    except OSError as err: print(err.errno, err.strerror.partition(":")[0])
print(aios.mem.stats()["notes"])
"""
#: For each line: reads the note and the file, or changes both to the line's text.
READ = """
import sys, libaios as aios
for line in sys.stdin:
    if text := line.strip():
        aios.mem.add(text, key="k")
        aios.sto.write("f", text.encode())
    print(aios.mem.get("k").text, aios.sto.read("f").decode(), flush=True)
"""
#: Writes what the line has, or reads it.
WRITE = """
import sys, libaios as aios
for line in sys.stdin:
    if text := line.strip():
        note = aios.mem.add(text)
        aios.mem.add(text, key="k")
        aios.sto.write("f", text.encode())
        print("written", flush=True)
    else:
        print(aios.mem.get(note).text, aios.mem.get("k").text, aios.sto.read("f").decode(), flush=True)
print(aios.mem.stats()["hits"], flush=True)
"""
LIST = "import libaios as aios\nprint([note.text for note in aios.mem.list()])\n"


def ospid(system: System) -> int:
    return next((entry["ospid"] for entry in system.ps() if entry["name"] == "store"), 0)


def kill(system: System) -> None:
    old = eventually(lambda: ospid(system))  # it is 0 between a death and the next fork
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
    """The store is killed again and again during calls: each acknowledged note exists, once."""
    system = fresh_aiosd()
    with Client(Home(str(system.home))) as client:
        written = 0
        for _ in range(4):
            calls = [client.submit(wire.Sys.MEM_ADD, wire.MemAdd(f"note {written + n}")) for n in range(50)]
            kill(system)
            for call in calls:
                client.result(call, int, timeout=30)
            written += len(calls)
        notes = client.call(wire.Sys.MEM_LIST, wire.MemList(limit=1000), list[wire.Note])
    assert sorted(note.text for note in notes) == sorted(f"note {number}" for number in range(written))


def test_bad_input_is_refused_with_a_sentence(fresh_aiosd: Callable[..., System], tmp_path: Path) -> None:
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
            (wire.Sys.MEM_ADD, wire.MemAdd("x", tags=["t"] * 65)),
            (wire.Sys.MEM_ADD, wire.MemAdd("x", tags=["t" * 257])),
            (wire.Sys.MEM_SEARCH, wire.MemSearch("x", 5, wire.NoteFilters(metadata={"n": {"$gt": 1}}))),
            (wire.Sys.MEM_SEARCH, wire.MemSearch("x", 5, by="sql")),
            (wire.Sys.MEM_SEARCH, wire.MemSearch("x" * 65537)),
            (wire.Sys.MEM_LIST, wire.MemList(limit=0)),
            (wire.Sys.MEM_LIST, wire.MemList(offset=-1)),
        ):
            with pytest.raises(OSError, match=r": (expected|at most) ") as caught:
                client.call(number, args, None)
            assert caught.value.errno == errno.EINVAL, args
        large = client.submit(wire.Sys.MEM_ADD, wire.MemAdd("x" * (15 << 20)))
        with pytest.raises(OSError, match="text") as caught:
            client.result(large, int)
        assert caught.value.errno == errno.EINVAL
        assert client.call(wire.Sys.MEM_LIST, wire.MemList(), list[wire.Note]) == []
        services = {service["name"]: service for service in system.status()["services"]}
        assert services["store"]["stats"]["search"].startswith("by words (no embedder")
    (script := tmp_path / "bad.py").write_text(BAD)
    said = system.run("aios-run", str(script), check=True).stdout.splitlines()
    assert said == [
        "22 an argument cannot be sent",
        "22 an argument cannot be sent",
        "90 a call of 104857614 bytes; the limit is 16777216",
        "22 tags",
        "22 metadata",
        "22 tags",
        "0",
    ]


def test_inspect_shows_what_an_agent_keeps(fresh_aiosd: Callable[..., System], tmp_path: Path) -> None:
    """A person may inspect any agent; an agent itself."""
    system = fresh_aiosd()
    (script := tmp_path / "keep.py").write_text(
        "import json, os, subprocess, sys\nimport libaios as aios\n"
        "note = aios.mem.add('one')\n[aios.mem.get(note) for _ in range(3)]\n"
        "shown = subprocess.run(['aios-inspect', str(aios.proc.getpid())], capture_output=True, text=True).stdout\n"
        "print(json.dumps([aios.proc.getpid(), json.loads(shown)[0]['memory']]), flush=True)\nsys.stdin.read()\n"
    )
    job = system.popen("aios-run", str(script))
    assert job.stdin is not None
    assert job.stdout is not None
    pid, own = json.loads(job.stdout.readline())
    assert (own["notes"], own["hits"], own["faults"], own["evictions"]) == (1, 3, 0, 0), "two of them without the store"
    shown = json.loads(system.run("aios-inspect", str(pid), check=True).stdout)[0]["memory"]
    assert shown == own
    job.communicate("")


def test_reading_a_note_again_needs_no_store_until_it_changes(
    fresh_aiosd: Callable[..., System], tmp_path: Path
) -> None:
    aiosd = fresh_aiosd()
    (script := tmp_path / "read.py").write_text(READ)
    agents = [aiosd.popen("aios-run", "--name", "reader", str(script)) for _ in range(2)]

    def reads(number: int, text: str = "") -> str:
        job = agents[number]
        assert job.stdin is not None
        assert job.stdout is not None
        job.stdin.write(f"{text}\n")
        job.stdin.flush()
        return str(job.stdout.readline().strip())

    assert reads(0, "one") == "one one"
    assert reads(1) == "one one"
    store = psutil.Process(ospid(aiosd))
    store.suspend()
    try:
        assert [reads(number) for number in (0, 1)] == ["one one"] * 2
    finally:
        store.resume()
    assert reads(1, "two") == "two two"
    assert [reads(number) for number in (0, 1)] == ["two two"] * 2
    kill(aiosd)
    assert reads(0, "three") == "three three", "a promise of the dead store holds no more"
    assert reads(1) == "three three"
    kernel = next(entry["ospid"] for entry in aiosd.ps() if entry["name"] == "kernel")
    os.kill(kernel, signal.SIGKILL)
    assert reads(1, "four") == "four four"
    assert reads(0) == "four four"
    for job in agents:
        job.communicate("")


def test_an_agent_reads_what_it_has_just_written_without_the_store(
    fresh_aiosd: Callable[..., System], tmp_path: Path
) -> None:
    aiosd = fresh_aiosd()
    (script := tmp_path / "write.py").write_text(WRITE)
    job = aiosd.popen("aios-run", str(script))

    def does(text: str) -> str:
        assert job.stdin is not None
        assert job.stdout is not None
        job.stdin.write(f"{text}\n")
        job.stdin.flush()
        return str(job.stdout.readline().strip())

    for text in ("one", "two"):
        assert does(text) == "written"
        store = psutil.Process(ospid(aiosd))
        store.suspend()
        try:
            assert does("") == f"{text} {text} {text}"
        finally:
            store.resume()
    assert job.communicate("")[0].strip() == "4", "the reads of notes are counted"
