"""`aiosd mcp`: another program uses a running aiosd through the MCP package's own client."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aiosd.sandbox.box import LEVELS
from tests.conftest import System
from tests.test_jobcontrol import Terminal

pytest.importorskip("mcp")
from mcp import Client, StdioServerParameters, stdio_client

ROOT = Path(__file__).resolve().parents[1]


def with_client(system: System, act: Callable[[Client], Any], *options: str) -> Any:
    """Run `act` with a client of `aiosd mcp`; returns its result."""

    async def run() -> Any:
        env = {**os.environ, "AIOS_HOME": str(system.home), "PYTHONPATH": str(ROOT)}
        words = [str(ROOT / "bin" / "aiosd"), "mcp", *options]
        server = StdioServerParameters(command=sys.executable, args=words, env=env)
        async with Client(stdio_client(server)) as client:
            return await act(client)

    return asyncio.run(run())


async def call(client: Client, name: str, **arguments: Any) -> tuple[str, bool]:
    done = await client.call_tool(name, arguments)
    return "".join(block.text for block in done.content), bool(done.is_error)  # type: ignore[union-attr]


async def spawned(client: Client, **arguments: Any) -> int:
    return int(json.loads((await call(client, "spawn", **arguments))[0])["pid"])


def test_agents_are_started_listed_and_ended(aiosd: System, tmp_path: Path) -> None:
    (tmp_path / "agent.py").write_text(
        "import sys, time\nprint('hello', *sys.argv[1:], flush=True)\ntime.sleep(1000)\n"
    )
    (tmp_path / "short.py").write_text("print('one'); print('two'); raise SystemExit(3)\n")

    async def act(client: Client) -> None:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert {"spawn", "ps", "wait", "kill", "logs", "calc", "shell", "remember", "read_stored"} <= set(tools)
        assert tools["ps"].annotations.read_only_hint
        assert not tools["kill"].annotations.read_only_hint
        assert tools["spawn"].input_schema["required"] == ["program"]
        levels = tools["spawn"].input_schema["properties"]["sandbox"]["anyOf"]
        assert {level for one in levels for level in one.get("enum", ())} == set(LEVELS)
        pid = int(
            (await call(client, "spawn", program="agent.py", args=["you"], folder=str(tmp_path)))[0].split(":")[1][:-1]
        )
        assert f'"pid":{pid}' in (await call(client, "ps"))[0]
        assert await call(client, "wait", pid=pid, seconds=0) == ('{"ended":false}', False)
        while (await call(client, "logs", pid=pid)) != ("hello you\n", False):
            await asyncio.sleep(0.02)
        assert await call(client, "kill", pid=pid, sig="TERM") == ("sent", False)
        assert await call(client, "wait", pid=pid) == ('{"ended":true,"status":-15}', False)
        short = await spawned(client, program="short.py", folder=str(tmp_path))
        assert await call(client, "wait", pid=short) == ('{"ended":true,"status":3}', False)
        assert await call(client, "logs", pid=short, lines=1) == ("two\n", False)
        assert (await call(client, "kill", pid=pid))[1]
        assert "no such" in (await call(client, "logs", pid=99999))[0]

    with_client(aiosd, act)


def test_the_tools_of_agents_are_those_of_the_person(aiosd: System) -> None:
    async def act(client: Client) -> None:
        assert await call(client, "calc", expression="6*7") == ("42", False)
        assert (await call(client, "remember", text="the key is blue", key="k"))[0].startswith("kept as note ")
        assert "the key is blue" in (await call(client, "search_notes", query="key"))[0]
        assert await call(client, "write_stored", path="a", content="x") == ("kept as version 1", False)
        assert await call(client, "calc", expression=1) == ('calc.expression: 1 is not of type "string"', True)
        text, failed = await call(client, "spawn", program="")
        assert ("length >= 1" in text, failed) == (True, True)
        assert await call(client, "nothing") == ("no such tool: nothing", True)
        slow = asyncio.create_task(call(client, "shell", command="sleep 30"))
        assert await call(client, "calc", expression="1") == ("1", False)  # one call does not hold up another
        slow.cancel()

    with_client(aiosd, act)


def test_only_named_tools_are_offered(aiosd: System) -> None:
    async def act(client: Client) -> None:
        assert [tool.name for tool in (await client.list_tools()).tools] == ["ps", "calc"]
        assert await call(client, "calc", expression="1") == ("1", False)
        assert await call(client, "shell", command="id") == ("no such tool: shell", True)

    with_client(aiosd, act, "--only", "ps, calc")


def test_names_that_there_are_not_are_named(aiosd: System) -> None:
    done = aiosd.run("aiosd", "mcp", "--only", "ps,calc,pss", stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stderr.count("\n")) == (0, 1)
    assert done.stderr.startswith("aiosd: --only: no such tool: pss (there are: calc, ")


def test_a_person_who_starts_it_at_a_terminal_is_told_what_it_waits_for(aiosd: System) -> None:
    terminal = Terminal(aiosd, "sh", "-i")
    try:
        terminal.expect("READY> $")
        terminal.command("aiosd mcp")
        terminal.expect("aiosd: waits for an MCP client on stdin")
        terminal.type("\x03")
        assert terminal.exit_code() == 130
    finally:
        terminal.close()


def test_it_goes_on_when_aiosd_was_started_again(fresh_aiosd: Callable[..., System]) -> None:
    system = fresh_aiosd()

    async def act(client: Client) -> None:
        assert await call(client, "calc", expression="1") == ("1", False)
        system.stop()
        text, failed = await call(client, "calc", expression="2")
        assert ("aiosd" in text, failed) == (True, True)
        system.start()
        assert await call(client, "calc", expression="3") == ("3", False)

    with_client(system, act)


HELLO = (
    '{"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {"protocolVersion": "2025-06-18",'
    ' "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}}\n'
)


@pytest.mark.parametrize("end", ["input", "INT"])
def test_it_ends_with_its_input_and_on_an_interrupt(aiosd: System, end: str) -> None:
    words = [sys.executable, str(ROOT / "bin" / "aiosd"), "mcp"]
    env = {**os.environ, "AIOS_HOME": str(aiosd.home), "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    with subprocess.Popen(words, env=env, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(HELLO)
        process.stdin.flush()
        assert '"name":"aiosd"' in process.stdout.readline()
        if end == "input":
            process.stdin.close()
        else:
            process.send_signal(signal.Signals[f"SIG{end}"])
        assert process.wait(30) == {"input": 0, "INT": -signal.SIGINT}[end]
        assert process.stderr.read() == ""


def test_without_aiosd_or_the_package_it_reports_that(fresh_aiosd: Callable[..., System], tmp_path: Path) -> None:
    system = fresh_aiosd(start=False)
    done = system.run("aiosd", "mcp")
    assert (done.returncode, "no aiosd is running" in done.stderr) == (1, True), done.stderr
    (tmp_path / "mcp.py").write_text("raise ModuleNotFoundError(\"No module named 'mcp'\", name='mcp')\n")
    done = system.run("aiosd", "mcp", env={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert (done.returncode, done.stderr) == (
        1,
        "aiosd: this needs packages that are not installed: pip install 'aiosd[mcp]'\n",
    )
