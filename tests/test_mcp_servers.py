"""Real MCP servers, each in an environment of its own (`make mcp-servers`). Those not installed are skipped."""

from __future__ import annotations

import http.server
import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aiosd.llm.schema import grammar_of
from libaios import wire
from libaios.client import Client
from libaios.home import Home
from libaios.tool import result_text
from libaios.wire import CallTool, Sys, ToolInfo
from tests.conftest import System
from tools.mcpservers import SERVERS, program

HERE = [name for name in SERVERS if Path(program(name)).exists()]

pytest.importorskip("mcp")
pytestmark = pytest.mark.skipif(not HERE, reason="no servers here: make mcp-servers")


class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        found = self.path != "/robots.txt"
        body = b"<html><body><h1>Title</h1><p>A page about boilers.</p></body></html>" if found else b""
        self.send_response(200 if found else 404)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def page() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


def calls(folder: Path, page: str) -> dict[str, list[tuple[str, dict[str, Any], str]]]:
    """By name: tool, arguments, and a text that the result contains."""
    entity = {"name": "boiler", "entityType": "thing", "observations": ["made by Vaillant"]}
    return {
        "time": [("get_current_time", {"timezone": "Asia/Tokyo"}, "+09:00")],
        "git": [
            ("git_status", {"repo_path": str(folder)}, "On branch"),
            ("git_log", {"repo_path": str(folder)}, "one"),
        ],
        "fetch": [("fetch", {"url": page}, "A page about boilers.")],
        "filesystem": [
            ("write_file", {"path": str(folder / "a.txt"), "content": "hello"}, "Successfully"),
            ("list_directory", {"path": str(folder)}, "a.txt"),
        ],
        "everything": [("echo", {"message": "hi there"}, "hi there")],
        "memory": [("create_entities", {"entities": [entity]}, "boiler"), ("read_graph", {}, "Vaillant")],
    }


def config(name: str, folder: Path) -> str:
    args = {
        "filesystem": [str(folder)],
        "git": ["--repository", str(folder)],
        "fetch": ["--allow-private-ips"],
    }.get(name, [])
    env = {"memory": {"MEMORY_FILE_PATH": str(folder / "graph")}}.get(name, {})
    table = "".join(f"{key} = {json.dumps(value)}\n" for key, value in env.items())
    command = f"command = {json.dumps(program(name))}\nargs = {json.dumps(args)}\n"
    command += f"write = {json.dumps([str(folder)])}\n" if name in ("filesystem", "git", "memory") else ""
    return f"[mcpServers.{name}]\n{command}" + (f"[mcpServers.{name}.env]\n{table}" if table else "")


@pytest.mark.parametrize("name", HERE)
def test_its_tools_are_called_by_an_agent(
    fresh_aiosd: Callable[..., System], tmp_path: Path, page: str, name: str
) -> None:
    (folder := tmp_path / "work").mkdir()
    for words in (
        ["init", "-q"],
        ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "one", "--allow-empty"],
    ):
        subprocess.run(["git", *words], cwd=folder, check=True)
    (tmp_path / "aiosd.toml").write_text(config(name, folder))
    system = fresh_aiosd("--config", str(tmp_path / "aiosd.toml"), "--threads", "1")
    with Client(Home(str(system.home))) as client:
        for tool, arguments, expected in calls(folder, page)[name]:
            result = client.call(Sys.TOOL_CALL, CallTool(f"{name}__{tool}", arguments), Any, timeout=120.0)
            assert expected in result_text(result)
        tools = [tool for tool in client.call(Sys.TOOL_LIST, wire.NoArgs(), list[ToolInfo]) if "__" in tool.name]
        assert len(tools) >= len(calls(folder, page)[name])
        for tool in tools:
            assert grammar_of(tool.parameters, loose=True)
    status = next(one for one in system.status()["services"] if one["name"] == "toolbox")
    assert "errors" not in status["stats"]
