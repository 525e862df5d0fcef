"""A service is a record, a struct, a row and a function: a service for tests, with deaths of every kind."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from libaios.client import Client
from libaios.connection import Pending
from libaios.home import Home
from tests import toy
from tests.conftest import System, eventually

ALL = (toy.REPEAT, toy.ONCE, toy.NEVER)


@pytest.fixture
def system() -> Iterator[System]:
    made = System(program=(sys.executable, "-c", "from tests.toy import boot; boot()"))
    made.start()
    yield made
    made.destroy()


def ospid(system: System, name: str) -> int:
    return next(entry["ospid"] for entry in system.ps() if entry["name"] == name)


def kill(system: System, name: str) -> None:
    old = ospid(system, name)
    os.kill(old, signal.SIGKILL)
    assert eventually(lambda: not psutil.pid_exists(old))


def begun(folder: Path) -> list[int]:
    path = folder / "begun"
    return [int(word) for word in path.read_text().split()] if path.exists() else []


def start(client: Client, folder: Path, numbers: tuple[int, ...] = ALL) -> dict[int, Pending]:
    """Start these calls, and wait until all have begun."""
    calls = {number: client.submit(number, toy.Work(str(folder))) for number in numbers}
    assert eventually(lambda: client.pump() or len(begun(folder)) == len(numbers))
    return calls


def outcome(client: Client, call: Pending) -> str:
    try:
        return str(client.result(call, str, timeout=30))
    except OSError as err:
        return errno.errorcode[err.errno or 0]


def test_a_call_of_a_service_is_a_struct_a_row_and_a_function(system: System) -> None:
    with Client(Home(str(system.home))) as client:
        answer = client.call(toy.ECHO, toy.Text("hi"), list[Any])
        assert answer == ["hi", 0, "default", "", False]
        with pytest.raises(FileNotFoundError, match="there is none"):
            client.call(toy.ECHO, toy.Text("raise"), None)
        with pytest.raises(OSError, match="made a mistake") as caught:
            client.call(toy.ECHO, toy.Text("bug"), None)
        assert caught.value.errno == errno.EIO
        with pytest.raises(OSError, match="text: expected `str`"):
            client.call(toy.ECHO, toy.Work(7), None)  # type: ignore[arg-type]


def test_the_caller_is_the_agent(system: System, tmp_path: Path) -> None:
    path = tmp_path / "ask.py"
    path.write_text(
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from tests import toy; from libaios.agent import connection\n"
        "print(connection().call(toy.ECHO, toy.Text('x'), list))\n"
    )
    done = system.run("aios-run", "--name", "me", "-g", "web", str(path), str(Path(__file__).parent.parent))
    assert done.stdout.startswith("['x', "), done.stderr
    assert done.stdout.endswith(", 'web', 'me', True]\n")


def test_the_record_is_seen_everywhere(system: System) -> None:
    assert "toy" in [entry["name"] for entry in system.ps()]
    services = {entry["name"]: entry for entry in system.status()["services"]}
    assert services["toy"]["state"] == "ready"
    kill(system, "toy")
    assert eventually(lambda: "toy died (signal SIGKILL); forked again" in system.log())
    assert eventually(lambda: ospid(system, "toy") > 0)


def test_deaths_of_the_service(system: System, tmp_path: Path) -> None:
    with Client(Home(str(system.home))) as client:
        calls = start(client, tmp_path)
        kill(system, "toy")
        (tmp_path / "gate").touch()
        got = {number: outcome(client, call) for number, call in calls.items()}
    assert got == {toy.REPEAT: "done", toy.ONCE: "done before", toy.NEVER: "EIO"}
    assert sorted(begun(tmp_path)) == sorted([*ALL, toy.REPEAT, toy.ONCE])


def test_deaths_of_the_kernel(system: System, tmp_path: Path) -> None:
    """The service goes on, and its answers go to the next kernel."""
    with Client(Home(str(system.home))) as client:
        calls = start(client, tmp_path)
        kill(system, "kernel")
        (tmp_path / "gate").touch()
        got = {number: outcome(client, call) for number, call in calls.items()}
        assert got[toy.NEVER] in ("done", "EIO"), "cancelled before its client was back, it is not done again"
        assert {got[toy.REPEAT], got[toy.ONCE]} <= {"done", "done before"}
    assert begun(tmp_path).count(toy.NEVER) == 1


def test_a_call_that_ends_its_service_is_given_up_and_its_neighbours_go_on(system: System, tmp_path: Path) -> None:
    with Client(Home(str(system.home))) as client:
        calls = start(client, tmp_path, (toy.REPEAT,))
        with pytest.raises(OSError, match="toy died twice while this call was running") as caught:
            client.call(toy.CRASH, toy.Text(""), None, timeout=30)
        assert caught.value.errno == errno.EIO
        (tmp_path / "gate").touch()
        assert outcome(client, calls[toy.REPEAT]) == "done"


def test_a_call_that_no_process_answers_is_refused(system: System) -> None:
    with Client(Home(str(system.home))) as client, pytest.raises(OSError, match="has no storeroom") as caught:
        client.call(toy.NOWHERE, toy.Text(""), None)
    assert caught.value.errno == errno.ENOSYS
