"""Agents without a process: programs outside of aiosd with a token of `aiosd token`."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from aiosd.gateway import identity
from aiosd.gateway.identity import SocketAddress
from aiosd.ipc import endpoint
from aiosd.kernel.outside import Outside
from aiosd.kernel.proc import ProcTable
from aiosd.timers import Timers
from libaios.client import Client
from libaios.home import Home
from libaios.wire import Limits, NewToken, Spawned, Sys
from tests.conftest import System, eventually
from tests.gatewayagent import CHAT, HELLO, LONG, Agent
from tests.test_gateway import entry, kill

pytestmark = pytest.mark.skipif(not endpoint.installed(), reason="the extra `gateway` is not installed")


class Program:
    """A person's program with a token. Here it is the test itself."""

    def __init__(self, system: System, name: str, *options: str) -> None:
        self.system, self.name = system, name
        made = system.run("aiosd", "token", name, *options, check=True)
        self.token = made.stdout.strip()
        self.told = made.stderr

    def open(self, path: str, body: Any = None) -> http.client.HTTPResponse:
        found = re.search(r"http://([\w.]+):(\d+)", self.system.run("aiosd", "status", check=True).stdout)
        assert found is not None
        connection = http.client.HTTPConnection(found[1], int(found[2]), timeout=60)
        headers = {"authorization": f"Bearer {self.token}", "connection": "close"}
        connection.request("POST" if body is not None else "GET", path, json.dumps(body) if body else None, headers)
        return connection.getresponse()

    def ask(self, path: str, body: Any = None) -> tuple[int, Any]:
        with self.open(path, body) as response:
            return response.status, json.loads(response.read())

    def listed(self) -> dict[str, Any]:
        found = json.loads(self.system.run("aiosd", "token", "--json", check=True).stdout)
        return next(one for one in found if one["name"] == self.name)


@pytest.fixture
def program(aiosd: System) -> Iterator[Program]:
    program = Program(aiosd, "editor", "--group", "desk", "--tokens", "5000")
    yield program
    aiosd.run("aiosd", "token", "editor", "--revoke")


def test_a_program_from_outside_is_an_agent(aiosd: System, program: Program) -> None:
    status, found = program.ask(CHAT, {"messages": HELLO, "max_tokens": 8})
    assert status == 200
    mine = entry(aiosd, "editor")
    assert (mine["ospid"], mine["group"], mine["command"], mine["stat"]) == (0, "desk", "[token]", "S")
    assert mine["completion_tokens"] == found["usage"]["completion_tokens"] > 0
    assert program.listed()["limit"] == 5000
    assert 0 < program.listed()["used"] <= found["usage"]["total_tokens"]


def test_a_token_is_shown_once(aiosd: System, program: Program) -> None:
    assert len(program.token) >= 43  # 256 bits
    shown = program.told + aiosd.log() + json.dumps(aiosd.ps()) + (aiosd.home / "data/tokens.json").read_text()
    shown += aiosd.run("aios-inspect", "editor", check=True).stdout
    assert program.token not in shown
    again = aiosd.run("aiosd", "token", "editor")
    assert (again.returncode, again.stdout) == (1, "")
    assert "has a token already" in again.stderr


def test_no_agent_can_use_it(aiosd: System, program: Program) -> None:
    agent = Agent(aiosd)
    headers = {"authorization": f"Bearer {program.token}"}
    assert agent.error(CHAT, {"messages": HELLO}, headers=headers)[2] == "wrong_agent"
    agent.end()
    refused = aiosd.run("aios-run", "--", "aiosd", "token", "mine")
    assert refused.returncode == 1
    assert "an agent may not make tokens" in refused.stderr


def test_where_a_connection_comes_from_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as client, server.accept()[0]:
            theirs, ours = SocketAddress(*client.getsockname()), SocketAddress(*server.getsockname())
            sleeper = psutil.Popen(["sleep", "60"])
            assert identity.is_outside(theirs, ours, sleeper.pid)
            assert not identity.is_outside(theirs, ours, os.getpid())  # it is this process, the system here
            sleeper.kill()
            sleeper.wait()
        assert not identity.is_outside(theirs, ours, 1 << 30)  # it is closed


def test_a_spent_budget_ends_requests_and_not_the_token(aiosd: System) -> None:
    program = Program(aiosd, "small", "--tokens", "40")
    body = {"prompt": "one two", "max_tokens": 100, "ignore_eos": True}
    assert program.ask("/v1/completions", body)[0] == 200
    with program.open("/v1/completions", body) as response:
        assert (response.status, response.headers["x-should-retry"]) == (429, "false")
        assert json.loads(response.read())["error"]["code"] == "insufficient_quota"
    assert program.ask("/v1/models")[0] == 200
    assert program.listed()["used"] == 40
    aiosd.run("aios-kill", "small", check=True)
    assert eventually(lambda: program.ask("/v1/models")[0] == 401)


def test_it_is_stopped_and_continued(aiosd: System, program: Program) -> None:
    with program.open("/v1/completions", LONG | {"max_tokens": 300}) as response:
        assert response.readline().startswith(b"data: ")
        aiosd.run("aios-kill", "-STOP", "editor", check=True)
        tokens = entry(aiosd, "editor")["completion_tokens"]
        assert entry(aiosd, "editor")["stat"] == "T"
        aiosd.run("aios-kill", "-STOP", "editor", check=True)  # a second one changes nothing
        assert entry(aiosd, "editor")["completion_tokens"] == tokens
        aiosd.run("aios-kill", "-CONT", "editor", check=True)
        assert response.read().endswith(b"data: [DONE]\n\n")
    assert entry(aiosd, "editor")["completion_tokens"] == 300


def test_its_running_calls_are_cancelled_when_it_is_revoked(aiosd: System) -> None:
    program = Program(aiosd, "gone")
    with program.open("/v1/completions", LONG) as response:
        assert response.readline().startswith(b"data: ")
        aiosd.run("aiosd", "token", "gone", "--revoke", check=True)
        with pytest.raises((http.client.HTTPException, OSError)):
            response.read()
    assert program.ask("/v1/models")[0] == 401
    assert aiosd.run("aiosd", "token", "gone", "--revoke").returncode == 1
    assert all(one["name"] != "gone" for one in aiosd.agents())


def test_it_outlives_the_kernel_and_the_system(tmp_path: Path) -> None:
    """Its use of each budget is kept, also of money and tools, each of which is used up separately."""
    system = System("--threads", "1", "--price", "1000,10000", home=tmp_path / "h").start()
    limits = ("--tokens", "1000", "--cost", "0.25", "--tool-calls", "1", "--time", "1h")
    program = Program(system, "editor", *limits, "-g", "desk")
    brief = Program(system, "brief", "--time", "0")
    text = {"prompt": "one", "max_tokens": 20, "ignore_eos": True}
    tool = {"query_type": "tool", "query_data": {"tool_calls": [{"name": "calc", "parameters": {"expression": "1"}}]}}
    assert program.ask("/v1/completions", text)[0] == 200
    assert program.ask("/query", tool)[1]["response"]["status_code"] == 200
    assert program.ask("/query", tool)[1]["response"]["status_code"] == 429
    used = program.listed()
    assert used["used"] > 20
    assert float(used["budgets"]["cost"]["used"]) > 0.2
    kill(system, "kernel")
    assert eventually(lambda: program.ask("/v1/models")[0] == 200)
    system.run("aiosd", "token", "other", check=True)
    system.run("aiosd", "token", "other", "--revoke", check=True)
    assert system.stop() == 0
    system.start()
    again = program.listed()
    assert again["budgets"]["time"].pop("used") >= used["budgets"]["time"].pop("used")
    assert again | {"pid": 0} == used | {"pid": 0}
    assert again["budgets"]["tool_calls"] == {"limit": 1, "used": 1, "lag_s": None}
    assert program.ask("/v1/models")[0] == 200
    for _ in range(2):
        status, found = program.ask("/v1/completions", text)
    assert (status, found["error"]["code"]) == (429, "insufficient_quota")
    assert "cost budget of 0.25 used up" in found["error"]["message"]
    status, found = brief.ask("/v1/completions", text)
    assert (status, found["error"]["message"]) == (429, "time budget of 0 s used up")
    listed = system.run("aiosd", "token", "--list", check=True).stdout
    assert "other" not in listed
    assert re.search(r"cost 0\.2[0-9]* of 0\.25, time ", listed), "a model of this machine does not go beyond it"
    assert not system.destroy()


def test_budgets_that_need_a_process_are_refused(aiosd: System) -> None:
    wanted = NewToken("x", b"x" * 32, None, Limits(memory_bytes=1))
    refused = pytest.raises(OSError, match="memory budget: cannot be measured of an agent without a process")
    with Client(Home(aiosd.home)) as client, refused:
        client.call(Sys.TOKEN_NEW, wanted, Spawned)


def test_a_damaged_file_costs_its_tokens_and_no_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "tokens.json"
    file.write_text('[{"name":"editor","gr')
    tokens = SimpleNamespace(url="http://127.0.0.1:1")
    agents: Any = SimpleNamespace(tokens=tokens, table=ProcTable(1), timers=Timers(), forks={}, stopping=False)
    Outside(file, agents, agents).restore()
    assert "its tokens are of no use" in caplog.text
    assert file.with_suffix(".damaged").exists()
