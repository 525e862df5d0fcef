"""Faults of MCP servers, shown by servers of these tests: each affects only the call of that server."""

from __future__ import annotations

import errno
import http.server
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from libaios import wire
from libaios.client import Client
from libaios.home import Home
from libaios.wire import CallTool, Sys, ToolInfo
from tests.conftest import System, command_line, eventually

pytest.importorskip("mcp")

#: A server with an old version, which ignores TERM and the end of its input. Each tool is named after its fault.
SERVER = """
import json, os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
REFS = {"type": "object", "$defs": {"point": {"type": "object", "properties": {"x": {"type": "integer"}}}},
        "properties": {"at": {"anyOf": [{"$ref": "#/$defs/point"}, {"type": "null"}]}}}
ANY = {"type": "object"}
NAMES = ["env", "long_line", "large", "progress", "strange", "hangs", "changes", "deep", "reach", "starts"]
TOOLS = [{"name": name, "inputSchema": ANY} for name in NAMES] + [
    {"name": "refs", "inputSchema": REFS},
    {"name": "elsewhere", "inputSchema": {"type": "object", "$ref": "http://127.0.0.1:9/x"}},
    {"name": "no_schema"}, {"inputSchema": ANY}, "no tool", {"name": "odd", "inputSchema": 7},
    {"name": "wrong", "inputSchema": {"type": "object", "properties": {"a": {"type": "no type"}}}}]

def send(**message): print(json.dumps({"jsonrpc": "2.0", **message}), flush=True)

def called(name, params):
    if name == "env": return [{"type": "text", "text": ",".join(sorted(os.environ))}]
    if name == "long_line":
        sys.stdout.write("x" * (20 << 20)); sys.stdout.flush()
    if name == "large": return [{"type": "text", "text": "y" * (3 << 20)}]
    if name == "progress":
        for token in (None, "unknown", (params.get("_meta") or {}).get("progressToken")):
            send(method="notifications/progress", params={"progressToken": token, "progress": 1, "message": "half"})
    if name == "strange":
        send(id=12345, result={}); send(method="notifications/none", params={"a": 1}); print('{"jsonrpc": "2.0"}')
        print("[" * 100000, flush=True)
        return [{"type": "image", "data": "AA==", "mimeType": "image/png"}, {"type": "text", "text": "seen"}]
    if name == "reach":
        found = []
        for path in params["arguments"]["paths"]:
            try: found.append(str(os.listdir(path)))
            except OSError as err: found.append(type(err).__name__)
        return [{"type": "text", "text": ";".join(found)}]
    if name == "starts":
        child = subprocess.Popen([sys.executable, "-c", "import os, time; os.setsid(); time.sleep(1000)"])
        return [{"type": "text", "text": f"{os.getpid()} {os.getppid()} {child.pid}"}]
    if name == "hangs":
        subprocess.Popen([sys.executable, "-c", "import os, signal, time; os.setsid();"
                          "signal.signal(15, signal.SIG_IGN);"
                          "open(os.environ['MARK'], 'w').write(str(os.getpid())); time.sleep(1000)"])
        time.sleep(1000)
    if name == "changes":
        TOOLS.append({"name": "new", "inputSchema": ANY})
        for _ in range(300): send(method="notifications/tools/list_changed")
    if name == "deep":
        value = "[" * 500 + "]" * 500
        print('{"jsonrpc": "2.0", "id": %d, "result": {"content": [], "structuredContent": {"a": %s}}}'
              % (params["id"], value))
    return [{"type": "text", "text": name}]

for line in sys.stdin:
    message = json.loads(line)
    method, params = message["method"], message.get("params") or {}
    if "id" not in message: continue
    if method == "initialize":
        result = {"protocolVersion": "2024-11-05", "capabilities": {"tools": {}},
                  "serverInfo": {"name": "t", "version": "1"}}
    elif method == "tools/list": result = {"tools": TOOLS}
    elif method == "tools/call": result = {"content": called(params["name"], {**params, "id": message["id"]})}
    else:
        send(id=message["id"], error={"code": -32601, "message": "no"})
        continue
    send(id=message["id"], result=result)
time.sleep(1000)  # deaf to the end of its input, too
"""

#: A server with the newest version, which has no handshake.
MODERN = """
from mcp.server import MCPServer
server = MCPServer("modern")
@server.tool()
def add(a: int, b: int = 1) -> int:
    return a + b
server.run()
"""


class Web(http.server.BaseHTTPRequestHandler):
    """A server that is reached by HTTP, and requires a header. Its tool `drops` never answers."""

    def do_POST(self) -> None:
        message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        method = message["method"]
        if method == "tools/call" and message["params"]["name"] == "drops":
            return
        tools = [{"name": name, "inputSchema": {"type": "object"}} for name in ("key", "drops")]
        results: dict[str, Any] = {
            "initialize": {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}},
                           "serverInfo": {"name": "t", "version": "1"}},
            "tools/list": {"tools": tools},
            "tools/call": {"content": [{"type": "text", "text": self.headers.get("Authorization", "none")}]},
        }  # fmt: skip
        reply: dict[str, Any] = {"jsonrpc": "2.0", "id": message.get("id")}
        reply |= {"result": results[method]} if method in results else {"error": {"code": -32601, "message": "no"}}
        body = json.dumps(reply).encode() if "id" in message else b""
        self.send_response(200 if body else 202)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.send_error(405)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def web() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/mcp"
        server.shutdown()
        thread.join()


@pytest.fixture
def system(fresh_aiosd: Callable[..., System], tmp_path: Path, web: str) -> System:
    (tmp_path / "odd.py").write_text(SERVER)
    (tmp_path / "modern.py").write_text(MODERN)
    (tmp_path / "written").mkdir()
    (tmp_path / "aiosd.toml").write_text(
        f'[mcpServers.odd]\ncommand = "{sys.executable}"\nargs = ["{tmp_path / "odd.py"}"]\ntimeout = 6\n'
        f'env = {{ MARK = "{tmp_path / "written" / "mark"}" }}\nwrite = ["written"]\n'
        f'[mcpServers.modern]\ncommand = "{sys.executable}"\nargs = ["{tmp_path / "modern.py"}"]\n'
        'sandbox = "flat"\nnet = "none"\n'
        f'[mcpServers.web]\nurl = "{web}"\nheaders = {{ Authorization = "its key" }}\n'
    )
    return fresh_aiosd("--config", str(tmp_path / "aiosd.toml"), "--threads", "1", env={"SECRET_TOKEN": "hush"})


def call(client: Client, name: str, **arguments: Any) -> Any:
    return client.call(Sys.TOOL_CALL, CallTool(name, arguments), Any, timeout=60.0)


def names(client: Client) -> set[str]:
    return {tool.name for tool in client.call(Sys.TOOL_LIST, wire.NoArgs(), list[ToolInfo]) if "__" in tool.name}


def test_what_a_server_does_wrong_costs_its_call_alone(system: System, tmp_path: Path) -> None:
    with Client(Home(str(system.home))) as client:
        both_ways_of_the_protocol_are_spoken(client)
        servers_are_reached_by_http_and_lost_in_words(client)
        malformed_tools_cost_no_other(client)
        a_server_has_its_own_environment_alone(client)
        noise_and_strange_messages_are_passed_over(client)
        tools_that_change_are_seen_without_a_call(client)
        what_is_too_much_costs_its_call(client)
        a_server_reaches_what_it_was_given(client, system.home)
        a_server_is_the_supervisors_and_ends_with_its_bridge(client, system)
        a_server_that_is_deaf_to_term_is_ended_with_all_it_started(client, tmp_path / "written" / "mark")


def both_ways_of_the_protocol_are_spoken(client: Client) -> None:
    assert call(client, "modern__add", a=2) == "3"
    assert call(client, "odd__refs", at={"x": 1}) == "refs"


def servers_are_reached_by_http_and_lost_in_words(client: Client) -> None:
    for _ in range(2):
        assert call(client, "web__key") == "its key"
        with pytest.raises(OSError, match="disconnected") as caught:
            call(client, "web__drops")
        assert caught.value.errno == errno.EIO


def malformed_tools_cost_no_other(client: Client) -> None:
    assert {"odd__env", "odd__refs", "odd__deep"} < names(client)
    assert not names(client) & {"odd__no_schema", "odd__odd", "odd__wrong", "odd__elsewhere"}
    with pytest.raises(OSError, match=r"odd__refs.at: .*anyOf"):
        call(client, "odd__refs", at={"x": "1"})


def a_server_has_its_own_environment_alone(client: Client) -> None:
    found = call(client, "odd__env").split(",")
    assert {"MARK", "PATH"} < set(found)
    assert not {"SECRET_TOKEN", "AIOS_HOME", "PYTHONPATH"} & set(found)


def noise_and_strange_messages_are_passed_over(client: Client) -> None:
    assert call(client, "odd__strange")[1] == {"type": "text", "text": "seen"}
    pending = client.submit(Sys.TOOL_CALL, CallTool("odd__progress", {}, stream=True))
    assert client.result(pending, Any, timeout=60.0) == "progress"
    assert [*pending.pieces] == ["half\n"]
    assert call(client, "odd__deep") == "deep"


def tools_that_change_are_seen_without_a_call(client: Client) -> None:
    assert call(client, "odd__changes") == "changes"
    assert eventually(lambda: "odd__new" in names(client), 30.0)


def what_is_too_much_costs_its_call(client: Client) -> None:
    for name, code, message in (
        ("large", errno.EMSGSIZE, "1048576 are allowed"),
        ("long_line", errno.EIO, "a line of more than 16 MB"),
    ):
        with pytest.raises(OSError, match=message) as caught:
            call(client, f"odd__{name}")
        assert caught.value.errno == code
        assert call(client, "odd__refs") == "refs"


def a_server_reaches_what_it_was_given(client: Client, home: Path) -> None:
    (work := home / "data" / "tools" / "agent-7").mkdir(parents=True)
    secrets = [str(work), str(home / "data" / "store"), os.path.expanduser("~/.cache")]
    found = call(client, "odd__reach", paths=[*secrets, os.path.dirname(os.__file__)]).split(";")
    assert set(found[:3]) <= {"PermissionError", "FileNotFoundError"}
    assert "os.py" in found[3]


def a_server_is_the_supervisors_and_ends_with_its_bridge(client: Client, system: System) -> None:
    server, parent, child = map(int, call(client, "odd__starts").split())
    assert system.daemon is not None
    tree = psutil.Process(system.daemon.pid).children(recursive=True)
    assert parent == tree[0].pid, "the supervisor's"
    next(one for one in tree if {"aiosd.tools.bridge", "odd"} <= set(command_line(one).split())).kill()
    assert eventually(lambda: not psutil.pid_exists(server) and not psutil.pid_exists(child))
    assert call(client, "odd__refs") == "refs"


def a_server_that_is_deaf_to_term_is_ended_with_all_it_started(client: Client, mark: Path) -> None:
    with pytest.raises(TimeoutError, match="ran for 6 s"):
        call(client, "odd__hangs")
    child = int(mark.read_text())
    assert eventually(lambda: not psutil.pid_exists(child))
    assert call(client, "odd__refs") == "refs"
