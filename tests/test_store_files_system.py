"""Files through a whole system: names, deaths, sizes, bad input, and the command for people."""

from __future__ import annotations

import asyncio
import errno
import functools
import io
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import libaios as aios
from aiosd.store.main import combined
from libaios import agent, sto, wire
from libaios.client import Client
from libaios.home import Home
from libaios.wire import PIECE, Sys
from tests.conftest import System, eventually
from tests.test_store_system import kill, ospid

MB = 1 << 20


def aside(function: Callable[..., Any]) -> Callable[..., Any]:
    return functools.partial(asyncio.to_thread, function)


@pytest.fixture
def system(fresh_aiosd: Callable[..., System], monkeypatch: pytest.MonkeyPatch) -> Iterator[System]:
    """A system; this process is the person at the terminal."""
    made = fresh_aiosd()
    monkeypatch.setenv(wire.ENV_HOME, str(made.home))
    agent.reset()
    yield made
    agent.reset()


def process(system: System, name: str) -> psutil.Process:
    return psutil.Process(next(entry["ospid"] for entry in system.ps() if entry["name"] == name))


def peak(process: psutil.Process) -> int:
    """The peak of a process's memory in bytes."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) << 10


def test_an_agent_has_its_files_again_under_its_name(system: System, tmp_path: Path) -> None:
    (write := tmp_path / "write.py").write_text("import libaios as aios\naios.sto.append('log', 'line\\n')\n")
    (read := tmp_path / "read.py").write_text("import libaios as aios\nprint([f.path for f in aios.sto.list()])\n")
    for _ in range(2):
        system.run("aios-run", "--name", "me", str(write), check=True)
    system.run("aios-run", str(write), check=True)
    assert system.run("aios-run", "--name", "me", str(read), check=True).stdout == "['log']\n"
    assert system.run("aios-run", str(read), check=True).stdout == "[]\n"
    agent.reset()
    system.stop()
    system.start()
    assert sto.read("log", of="agent:me") == b"line\nline\n"
    assert list(sto.stats()["spaces"]) == ["agent:me"], "what the nameless one kept ended with it"


@pytest.mark.parametrize("victim", ["store", "kernel"])
def test_acknowledged_writes_outlive_a_death_and_happen_once(system: System, victim: str) -> None:
    """Writers append lines while the store is killed again and again: each line is in the file once, and in order."""
    rounds, writers, lines = 3, 4, 12
    home = Home(str(system.home))
    barrier = threading.Barrier(writers + 1)
    failures: list[BaseException] = []

    def write(number: int) -> None:
        try:
            with Client(home) as client:
                for turn in range(rounds):
                    barrier.wait(30)
                    for line in range(lines):
                        data = b"%d.%d\n" % (turn, line) + bytes([number]) * (70_000 if line % 4 == 0 else 10)
                        args = wire.StoWrite(f"file{number}", data, append=True)
                        client.call(Sys.STO_WRITE, args, wire.File, timeout=30)
        except BaseException as err:
            failures.append(err)
            barrier.abort()

    threads = [threading.Thread(target=write, args=(number,)) for number in range(writers)]
    for thread in threads:
        thread.start()
    for _ in range(rounds):
        barrier.wait(30)
        if victim == "store":
            kill(system)
        else:
            os.kill(process(system, "kernel").pid, signal.SIGKILL)
    for thread in threads:
        thread.join(60)
    assert failures == []
    for number in range(writers):
        expected = b"".join(
            b"%d.%d\n" % (turn, line) + bytes([number]) * (70_000 if line % 4 == 0 else 10)
            for turn in range(rounds)
            for line in range(lines)
        )
        assert sto.read(f"file{number}") == expected
        assert sto.stat(f"file{number}").version == rounds * lines


def test_a_large_file_goes_through_little_memory_and_a_death(system: System, tmp_path: Path) -> None:
    large = tmp_path / "large"
    block = os.urandom(MB)
    with open(large, "wb") as file:
        for number in range(100):
            file.write(number.to_bytes(4, "big") + block[4:])
        file.write(b"end")
    processes = [psutil.Process(), process(system, "kernel"), process(system, "store")]
    before = [peak(one) for one in processes]

    class Source:
        """A source of bytes that kills the store in the middle."""

        def read(self, size: int) -> bytes:
            if file.tell() == 50 * MB:
                kill(system)
                assert eventually(lambda: ospid(system))
                processes[2] = process(system, "store")
                before[2] = peak(processes[2])
            return file.read(size)

    with open(large, "rb") as file:
        kept = sto.upload("large", Source())  # type: ignore[arg-type] # all that is used of a file
    assert kept.size == 100 * MB + 3
    assert sto.download("large", tmp_path / "copy") == kept.size
    for one, at_first in zip(processes, before, strict=True):
        assert peak(one) - at_first < 64 * MB, one
    with open(large, "rb") as first, open(tmp_path / "copy", "rb") as second:
        while piece := first.read(MB):
            assert second.read(MB) == piece
        assert second.read(1) == b""
    assert os.listdir(system.home / "data" / "store" / "new") == [] or eventually(
        lambda: os.listdir(system.home / "data" / "store" / "new") == []
    )


def test_coroutines_have_the_same_names(system: System) -> None:
    async def main() -> None:
        await aios.aio.sto.write("a", "one\n")
        await aios.aio.sto.append("a", b"two\n")
        assert await aios.aio.sto.read("a") == b"one\ntwo\n"
        assert "+two" in await aios.aio.sto.diff("a", 1)
        assert [file.path for file in await aios.aio.sto.list()] == ["a"]
        with pytest.raises(FileNotFoundError):
            await aios.aio.sto.read("b")
        large = b"".join(bytes([number]) * MB for number in range(6)) + b"end"
        assert (await aios.aio.sto.write("large", large)).size == len(large)
        assert await aios.aio.sto.read("large") == large

        class Torn(io.BytesIO):
            def read(self, size: int | None = -1) -> bytes:
                if self.tell() > 2 * MB:
                    raise ValueError("torn")
                return super().read(size)

        for upload in (aios.aio.sto.upload, aside(sto.upload)):
            with pytest.raises(ValueError, match="torn"):
                await upload("torn", Torn(large))
        stats = await aios.aio.sto.stats()
        assert (stats["files"], stats["bytes"] < 7 * MB) == (2, True)

    asyncio.run(main())
    public = {name for name in sto.__all__ if name[0].islower()}
    assert public <= set(vars(aios.aio.sto))


def test_bad_input_is_refused_with_a_sentence(system: System) -> None:
    with Client(Home(str(system.home))) as client:
        for number, args in (
            (Sys.STO_READ, wire.StoRead("p" * 4096)),
            (Sys.STO_READ, wire.StoRead("")),
            (Sys.STO_READ, wire.StoRead("x", version=-1)),
            (Sys.STO_READ, wire.StoRead("x", version=0)),
            (Sys.STO_READ, wire.StoRead("x", offset=-1)),
            (Sys.STO_READ, wire.StoRead("x", size=PIECE + 1)),
            (Sys.STO_LIST, wire.StoList(limit=0)),
            (Sys.STO_SEARCH, wire.StoSearch("x", 0)),
            (Sys.STO_SEARCH, wire.StoSearch("x", 10**6)),
            (Sys.STO_SEARCH, wire.StoSearch("x", -1)),
            (Sys.STO_ROLLBACK, wire.StoRollback("x", version=-1)),
            (Sys.STO_ROLLBACK, wire.StoRollback("x", time=float("nan"))),
            (Sys.STO_WRITE, wire.StoWrite("x", bytes(PIECE + 1))),
            (Sys.STO_PIECE, wire.StoPiece(1, 0, bytes(PIECE + 1))),
            (Sys.STO_READ, wire.StoRead("x", "o" * 4096)),
        ):
            with pytest.raises(OSError, match=": ") as caught:
                client.call(number, args, None)
            assert caught.value.errno == errno.EINVAL, args
        too_much = client.submit(Sys.STO_WRITE, wire.StoWrite("x", bytes(15 << 20)))
        with pytest.raises(OSError, match="length") as caught:
            client.result(too_much, None)
        assert caught.value.errno == errno.EINVAL
        raw = b"\xa3\xed\xa0\x80"  # a surrogate, which no encoder of the SDK writes
        with pytest.raises(OSError, match="UTF-8") as caught:
            client.call(Sys.STO_STAT, wire.Raw(b"\x91" + raw), None)
        assert caught.value.errno == errno.EINVAL
    for path in ("\ud800", "a\udcff"):
        with pytest.raises(OSError, match="UTF-8") as caught:
            sto.read(path)
        assert caught.value.errno == errno.EINVAL
    assert sto.list() == []


def test_only_a_person_empties_the_trash(system: System, tmp_path: Path) -> None:
    (script := tmp_path / "agent.py").write_text(
        "import libaios as aios\n"
        "aios.sto.write('x', 'y'); aios.sto.remove('x')\n"
        "for act in (aios.sto.empty_trash, lambda: aios.sto.mount('/tmp', 'tmp')):\n"
        "    try: act()\n"
        "    except PermissionError as err: print(err.strerror)\n"
    )
    said = system.run("aios-run", "--name", "me", str(script), check=True).stdout.splitlines()
    assert [line.split(" ")[0] for line in said] == ["an", "/tmp:"]
    assert sto.empty_trash("agent:me") == 1


def test_the_command(system: System, tmp_path: Path) -> None:
    def run(*words: str, code: int = 0, **options: str) -> str:
        done = system.run("aios-sto", *words, **options)
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    (tmp_path / "here").mkdir()
    (tmp_path / "file").write_text("one\n")
    of = ("--of", "agent:planner")
    assert run("put", str(tmp_path / "file"), "notes/plan", *of) == "notes/plan: version 1, 4B\n"
    assert run("get", "notes/plan", "-", *of) == (tmp_path / "file").read_text()
    run("put", "-", "notes/plan", *of, input="two\n")
    assert "needs a PATH" in run("put", "-", *of, input="two\n", code=2)
    assert run("cat", "notes/plan", *of) == "two\n"
    assert run("cat", "-v", "1", "notes/plan", *of) == "one\n"
    assert "-one\n+two\n" in run("diff", "notes/plan", "1", *of)
    assert [line.split()[-1] for line in run("ls", *of).splitlines()] == ["PATH", "notes/plan"]
    assert run("ls").splitlines() == ["VERSION SIZE CHANGED BY PATH"]
    assert len(run("history", "notes/plan", *of).splitlines()) == 3
    assert run("rollback", "notes/plan", "1", *of) == "notes/plan: version 3\n"
    assert run("rollback", "notes/plan", "--time", "2001-01-01", *of, code=1)
    assert run("search", "plan", *of) == "notes/plan: one\n"
    assert run("search", "one", *of) == "notes/plan: one\n"
    run("get", "notes/plan", str(tmp_path / "copy"), *of)
    assert (tmp_path / "copy").read_text() == "one\n"
    assert run("put", str(tmp_path / "copy"), "--of", "agent:short") == "copy: version 1, 4B\n"
    run("get", "copy", "--of", "agent:short", cwd=str(tmp_path / "here"))
    assert (tmp_path / "here" / "copy").read_text() == "one\n"
    assert "exists already" in run("get", "copy", "--of", "agent:short", cwd=str(tmp_path / "here"), code=2)
    assert "agent:planner" in run("spaces")
    run("share", "notes", "agent:critic", *of)
    run("unshare", "notes", "agent:critic", *of)
    assert run("unshare", "notes", "agent:critic", *of, code=1) == "aios-sto: notes: is not shared with agent:critic\n"
    run("mount", str(tmp_path), "real", *of)
    assert eventually(lambda: "real/copy" in run("ls", *of))
    assert run("mounts", *of).splitlines()[1].split()[:3] == ["real", "read", "3"]
    run("unmount", "real", *of)
    run("rm", "notes/plan", *of)
    number = run("trash", *of).splitlines()[1].split()[0]
    run("restore", number, *of)
    run("rm", "notes/plan", *of)
    assert run("empty-trash", *of) == "1 removed\n"
    assert run("cat", "notes/plan", *of, code=1) == "aios-sto: there is no file 'notes/plan'\n"
    assert run("rm", "none", *of, code=1) == "aios-sto: there is no file 'none'\n"


def test_the_status_has_each_figure_under_a_name_of_its_own(system: System, tmp_path: Path) -> None:
    """The database's size and that of what is kept as files; deaths of a service and of its workers."""
    (tmp_path / "large").write_bytes(bytes(123456))
    system.run("aios-sto", "put", str(tmp_path / "large"), "--of", "agent:large", check=True)
    services = {service["name"]: service for service in system.status()["services"]}
    stats = services["store"]["stats"]
    assert (stats["file_bytes"] >= 123456, stats["database_bytes"] % 4096) == (True, 0)
    assert stats["database_bytes"] > 0
    for service in services.values():
        assert not set(service) & set(service["stats"])
    shown = system.run("aiosd", "status", "-v", check=True).stdout
    assert all(f"\n  {label} " in shown for label in ("size of the database", "size of files", "worker deaths"))


def test_two_figures_of_one_name_are_a_mistake() -> None:
    assert combined([{"a": 1}, {"b": 2}]) == {"a": 1, "b": 2}
    with pytest.raises(AssertionError, match="two figures are named"):
        combined([{"a": 1}, {"a": 2}])


# ── the ReAct agent ───────────────────────────────────────────────────────────────────────────────────────

REACT = ("-m", "libaios.agents.react", "--")
TOOLS = """
import sys
from libaios.agents.react import Toolbox
tools = Toolbox()
for name, arguments in {calls!r}:
    print(repr(tools.call(name, arguments)))
"""


def test_an_agent_that_is_started_again_under_its_name_remembers(system: System) -> None:
    """Tested with the embedded model."""
    system.run("aios-run", "--name", "bob", *REACT, "Remember that the rent is 850.", check=True)
    again = system.run("aios-run", "--name", "bob", *REACT, "What is the rent?", check=True)
    assert "850" in again.stdout
    other = system.run("aios-run", "--name", "eve", *REACT, "What is the rent?", check=True)
    assert "850" not in other.stdout
    system.run("aios-run", "--name", "bob", *REACT, "Write hello to a.txt", check=True)
    assert sto.read("a.txt", of="agent:bob") == b"hello\n"


def test_its_tools_are_those_of_the_toolbox(system: System, tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("on the disk\n")
    (tmp_path / "big").write_text("x" * 200_000)
    calls = [
        ("remember", {"text": " the rent\nis 850 "}),
        ("recall", {"query": "rents"}),
        ("recall", {"query": "the cat"}),
        ("write_file", {"path": "a/b.txt", "content": "größe"}),
        ("read_file", {"path": "a/../a/b.txt"}),
        ("read_file", {"path": "real.txt"}),
        ("read_file", {"path": "none.txt"}),
        ("read_file", {"path": "../secret"}),
        ("write_file", {"path": "/etc/passwd", "content": "x"}),
        ("write_file", {"path": "a", "content": "x"}),
        ("write_file", {"path": "x", "content": "x" * 200_000}),
        ("read_file", {"path": "big"}),
        ("read_file", {"path": "a\0b"}),
    ]
    (script := tmp_path / "agent.py").write_text(TOOLS.format(calls=calls))
    expected = [
        "ok",
        "the rent is 850",
        "nothing found",
        "ok",
        "größe",
        "on the disk",
        "error: no such file: none.txt",
        "error: outside the working folder: ../secret",
        "error: outside the working folder: /etc/passwd",
        "error: is a directory: a",
        "error: content too large",
        "error: file too large: big",
        "error: invalid argument: a\0b",
    ]
    for options, of in ((("--name", "me"), "agent:me"), ((), "group")):
        done = system.run("aios-run", *options, str(script), check=True, cwd=tmp_path)
        assert done.stdout.splitlines() == [repr(line) for line in expected]
        assert [file.path for file in sto.list(of=of)] == ["a/b.txt"], (
            "what a nameless agent writes does not end with it"
        )
    assert not (tmp_path / "a").exists()
