"""The gateway: which agent a request belongs to, what it costs, and what happens to it when a process dies."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from aiosd.errors import UsageError
from aiosd.gateway import identity
from aiosd.gateway.identity import SocketAddress
from aiosd.ipc import endpoint
from aiosd.ipc.endpoint import Endpoint
from libaios import wire
from libaios.client import Client, ControlSocket
from libaios.greeting import NoKernel
from libaios.home import Home
from tests.conftest import System, eventually
from tests.gatewayagent import CHAT, HELLO, LONG, Agent

pytestmark = pytest.mark.skipif(not endpoint.installed(), reason="the extra `gateway` is not installed")

#: A program of one request.
ASK = """
import os, sys, urllib.request as u
r = u.Request(os.environ['OPENAI_BASE_URL'] + '/models', headers={'x-api-key': os.environ['OPENAI_API_KEY']})
print(u.urlopen(r).status, flush=True)
"""


@pytest.fixture
def agent(aiosd: System) -> Agent:
    return Agent(aiosd)


def ospid(system: System, name: str) -> int:
    return next(entry["ospid"] for entry in system.ps() if entry["name"] == name)


def kill(system: System, name: str) -> None:
    old = ospid(system, name)
    os.kill(old, signal.SIGKILL)
    assert eventually(lambda: not psutil.pid_exists(old))


def entry(system: System, name: str) -> dict[str, Any]:
    return next(one for one in system.agents() if one["name"] == name)


def gateway(system: System) -> dict[str, Any]:
    """The gateway's figures in the status."""
    return next(one["stats"] for one in system.status()["services"] if one["name"] == "gateway")


def url(system: System) -> tuple[str, int]:
    return "127.0.0.1", gateway(system)["port"]


# ── where it listens ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [("8000", "127.0.0.1", 8000), ("localhost:81", "127.0.0.1", 81), ("[::1]:81", "::1", 81), ("auto", "127.0.0.1", 0)],
)
def test_addresses_of_this_machine_are_read(text: str, host: str, port: int) -> None:
    found = endpoint.read(text)
    assert (found.host, found.port, found.on, found.asked) == (host, port, True, text != "auto")


def test_further_addresses_are_read() -> None:
    """They are at the host of the first one, if they name none. The first one may be any free port."""
    found = endpoint.read("[::1]:81, 11434,127.0.0.1:82")
    assert [one.address for one in found.all] == ["[::1]:81", "[::1]:11434", "127.0.0.1:82"]
    for value in ("0,11434", "auto,11434", [0, 11434], ["auto", "localhost:11434"]):
        first, second = endpoint.read(value).all
        assert (first, second.address, second.asked) == (Endpoint(more=(second,)), "127.0.0.1:11434", True)
    assert endpoint.read("0") == endpoint.read(0) == endpoint.read(True) == Endpoint()


REFUSED = [
    "0.0.0.0:80",
    "192.168.1.5:80",
    "example.org:80",
    "65536",
    "-1",
    "",
    "x",
    ":",
    "80,",
    "off,80",
    "80,0",
    "80,80",
]


@pytest.mark.parametrize("text", [*REFUSED, ",".join(map(str, range(1, 18)))])
def test_other_addresses_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"loopback|neither auto nor off|twice|more than 16|stands alone|be the first"):
        endpoint.read(text)


@pytest.mark.parametrize("text", ["off,80", "80,off", "80,0", "0,0", "80,auto"])
def test_a_word_at_the_wrong_place_is_not_called_an_unknown_one(text: str) -> None:
    with pytest.raises(ValueError, match=r"stands alone|be the first"):
        endpoint.read(text)


def test_a_port_that_is_taken_is_an_error_at_the_start() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for text in (str(port), f"0,{port}"):
            with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1:{port}"):
                endpoint.listen(endpoint.read(text))
    assert endpoint.listen(endpoint.read("off")) is None


def test_environment_leads_to_the_gateway_and_leaks_nothing() -> None:
    given = {"OPENAI_ORG_ID": "org", "DO_NOT_TRACK": "0", "HTTP_PROXY": "http://proxy", "NO_PROXY": "a"}
    env = endpoint.environment(given, Endpoint(port=80), "TOKEN")
    assert env["OPENAI_BASE_URL"] == env["OPENAI_API_BASE"] == "http://127.0.0.1:80/v1"
    assert env["OPENAI_API_KEY"] == "TOKEN"
    assert env["CEREBRUM_KERNEL_URL"] == "http://agent:TOKEN@127.0.0.1:80"
    assert env["DO_NOT_TRACK"] == "0"
    assert env["NO_PROXY"] == "a,127.0.0.1,localhost"
    assert "OPENAI_ORG_ID" not in env


# ── whose request it is ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_the_process_at_the_other_end_is_found(family: socket.AddressFamily) -> None:
    host = "127.0.0.1" if family == socket.AF_INET else "::1"
    with socket.create_server((host, 0), family=family) as server:
        address = server.getsockname()[:2]
        with socket.create_connection(address) as client, server.accept()[0]:
            theirs, ours = SocketAddress(*client.getsockname()[:2]), SocketAddress(*address)
            assert identity.belongs(theirs, ours, os.getpid())
            sleeper = psutil.Popen(["sleep", "60"])
            assert not identity.belongs(theirs, ours, sleeper.pid)
            sleeper.kill()
            sleeper.wait()
        assert not identity.belongs(theirs, ours, os.getpid())  # the connection is closed


def test_a_request_is_charged_to_its_agent(aiosd: System, agent: Agent) -> None:
    status, found = agent.post(CHAT, {"model": "whatever", "messages": HELLO, "max_tokens": 20})
    assert status == 200
    assert found["model"] == "nano"
    mine = entry(aiosd, "http")
    assert mine["completion_tokens"] == found["usage"]["completion_tokens"] > 0
    assert mine["prompt_tokens"] == found["usage"]["prompt_tokens"]


STRANGERS: list[tuple[dict[str, Any], int, str | None]] = [
    ({"Host": "example.org"}, 403, None),
    ({"Origin": "http://example.org"}, 403, None),
    ({"Origin": "null"}, 403, None),
    ({"Origin": "http://[::1"}, 403, None),
]


def test_requests_of_a_page_from_elsewhere_are_refused(agent: Agent) -> None:
    for headers, status, code in STRANGERS:
        assert agent.error(CHAT, {"messages": HELLO}, headers=headers)[::2] == (status, code), headers


def test_a_token_comes_in_any_of_three_headers(agent: Agent) -> None:
    for headers in ({"x-api-key": agent.token()}, {"Authorization": f"Basic {agent.do(basic=1)['basic']}"}):
        assert agent.post("/v1/models", method="GET", headers={"Authorization": None, **headers})[0] == 200


def test_the_token_of_another_agent_is_of_no_use(aiosd: System, agent: Agent) -> None:
    other = Agent(aiosd, name="other")
    stolen = {"Authorization": f"Bearer {other.token()}"}
    assert agent.error(CHAT, {"messages": HELLO}, headers=stolen)[::2] == (403, "wrong_agent")
    other.end()
    assert entry(aiosd, "http")["calls"] == 0


def test_a_token_is_of_no_use_outside_of_its_agent(aiosd: System, agent: Agent) -> None:
    agent.post("/v1/models", method="GET")
    with socket.create_connection(url(aiosd), 10) as sock:
        sock.sendall(f"GET /v1/models HTTP/1.0\r\nHost: localhost\r\nx-api-key: {agent.token()}\r\n\r\n".encode())
        assert b"403 Forbidden" in sock.recv(4096)


def test_a_child_of_an_agent_is_the_agent(aiosd: System, tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text(ASK)
    program = f"{sys.executable} {script}"
    done = aiosd.run("aios-run", "--", "sh", "-c", f"{program}; (setsid {program})")
    assert done.stdout.split() == ["200", "200"], done.stderr


def test_only_the_gateway_may_act_for_an_agent(aiosd: System, agent: Agent) -> None:
    with pytest.raises(NoKernel, match="only aiosd's own gateway"):
        ControlSocket(Home(aiosd.home), token=agent.token())


def test_environment_is_left_alone_on_request(aiosd: System) -> None:
    show = ("--", "sh", "-c", "echo $OPENAI_BASE_URL $OPENAI_ORG_ID")
    given = {"OPENAI_BASE_URL": "http://elsewhere", "OPENAI_ORG_ID": "org"}
    for level in ("none", aiosd.status()["sandbox"]["possible"]):
        done = aiosd.run("aios-run", "--sandbox", level, "--no-gateway-env", *show, env=given)
        assert done.stdout == "http://elsewhere org\n"
    assert aiosd.run("aios-run", *show, env=given).stdout.startswith("http://127.0.0.1:")
    by_hand = ("-e", "OPENAI_BASE_URL=http://mine", *show)
    assert aiosd.run("aios-run", *by_hand, env=given).stdout == "http://mine org\n"
    nested = ("--no-gateway-env", "--", "aios-run", *show)
    assert aiosd.run("aios-run", *nested, env=given).stdout == "http://elsewhere org\n"


def test_without_a_gateway_the_environment_stays_as_it_is(fresh_aiosd: Any) -> None:
    system = fresh_aiosd("--threads", "1", "--gateway", "off")
    assert "gateway" not in [one["name"] for one in system.ps()]
    done = system.run("aios-run", "--", "sh", "-c", "echo $OPENAI_BASE_URL", env={"OPENAI_BASE_URL": "http://mine"})
    assert done.stdout == "http://mine\n"
    assert re.search(r"^ *gateway +off$", system.run("aiosd", "status").stdout, re.MULTILINE)


# ── budgets, stopping, leaving ────────────────────────────────────────────────────────────────────────────


def test_a_budget_that_is_used_up_is_not_worth_another_try(aiosd: System) -> None:
    agent = Agent(aiosd, "--tokens", "40")
    status, found = agent.post("/v1/completions", {**LONG, "stream": False})
    assert (status, found["choices"][0]["finish_reason"]) == (200, "length")
    answer = agent.do(path=CHAT, body={"messages": HELLO})
    assert answer["status"] == 429
    assert answer["headers"]["x-should-retry"] == "false"
    assert json.loads(answer["body"])["error"]["code"] == "insufficient_quota"


def open_calls(system: System, name: str) -> int:
    with Client(Home(system.home)) as client:  # a command would take longer than the call
        (pid,) = [one.pid for one in client.call(wire.Sys.PS, wire.Ps(), list[wire.ProcInfo]) if one.name == name]
        return len(client.call(wire.Sys.INSPECT, wire.PidArgs(pid), dict[str, Any])["open_calls"])


def test_a_program_that_leaves_ends_its_generation(aiosd: System, agent: Agent) -> None:
    stream = agent.stream({**LONG, "max_tokens": 2000})
    assert open_calls(aiosd, "http") == 1
    agent.do(drop=stream)
    assert eventually(lambda: open_calls(aiosd, "http") == 0)
    assert entry(aiosd, "http")["completion_tokens"] < 1900


def test_requests_of_a_stopped_agent_wait(aiosd: System, agent: Agent) -> None:
    stream = agent.stream()
    pid = str(entry(aiosd, "http")["pid"])
    aiosd.run("aios-kill", "-STOP", pid, check=True)
    stopped = entry(aiosd, "http")["completion_tokens"]
    aiosd.run("aios-ps", check=True)
    assert entry(aiosd, "http")["completion_tokens"] == stopped
    aiosd.run("aios-kill", "-CONT", pid, check=True)
    assert agent.rest(stream)[-1] == "data: [DONE]"


# ── deaths ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stream_outlives_the_kernel_and_ends_with_the_gateway(fresh_aiosd: Any) -> None:
    system = fresh_aiosd("--threads", "1")
    agent = Agent(system)
    _, whole = agent.post("/v1/completions", {**LONG, "stream": False, "max_tokens": 300})
    stream = agent.stream({**LONG, "max_tokens": 300, "stream_options": {"include_usage": True}})
    kill(system, "kernel")
    lines = agent.rest(stream)
    assert lines[-1] == "data: [DONE]"
    usage = json.loads(lines[-2].removeprefix("data: "))["usage"]
    assert usage["completion_tokens"] == whole["usage"]["completion_tokens"] == 300
    stream = agent.stream({**LONG, "max_tokens": 2000})
    kill(system, "gateway")
    assert "data: [DONE]" not in agent.rest(stream)
    assert agent.post("/v1/models", method="GET")[0] == 200  # the request waits in the socket's queue
    assert eventually(lambda: open_calls(system, "http") == 0)
    assert gateway(system)["agents"] == 1
    victims = ospid(system, "kernel"), entry(system, "http")["ospid"]
    for victim in victims:  # the agent dies when there is no kernel to tell the gateway
        os.kill(victim, signal.SIGKILL)
    assert eventually(lambda: gateway(system)["agents"] == 0)


def test_an_agent_that_is_started_again_keeps_its_token(aiosd: System, tmp_path: Path) -> None:
    code = """
if not os.path.exists(sys.argv[1]):
    open(sys.argv[1], 'w').close()
    sys.exit(1)
"""
    script = tmp_path / "again.py"
    script.write_text(ASK + code)
    pid = aiosd.run(
        "aios-run", "-d", "--restart", "on-failure:2", script, str(tmp_path / "mark"), check=True
    ).stdout.strip()
    assert aiosd.run("aios-wait", pid).returncode == 0
    assert aiosd.run("aios-logs", pid).stdout.split() == ["200", "200"]


# ── hostile programs ──────────────────────────────────────────────────────────────────────────────────────

HEAD = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nx-api-key: TOKEN\r\n"


BROKEN = (
    "",
    "nonsense\r\n\r\n",
    "GET / HTTP/9.9\r\n\r\n",
    "GET /v1/models HTTP/1.1\r\n" + 3000 * ("X-Long: " + "x" * 100 + "\r\n") + "\r\n",
    "GET /%ff%fe HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "GET http://[ HTTP/1.1\r\nHost: [\r\n\r\n",
    HEAD + "Content-Length: -5\r\n\r\n",
    HEAD + "Content-Length: 1000\r\n\r\n{",
    HEAD + "Content-Length: 99999999999\r\n\r\n{",
    HEAD + "Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
    HEAD + "Connection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    HEAD + "Content-Length: 2\r\n\r\n{}" + HEAD + "Content-Length: 2\r\n\r\n{}",
)


def test_what_is_no_proper_request_does_no_harm(aiosd: System, agent: Agent) -> None:
    before = ospid(aiosd, "gateway")
    for text in BROKEN:
        agent.do(raw=text)
        assert agent.post("/v1/models", method="GET")[0] == 200, text[:200]
    assert ospid(aiosd, "gateway") == before


HOSTILE = (
    "",
    "{",
    "[]",
    "null",
    '"x"',
    '{"messages": NaN}',
    "[" * 100_000,
    '{"messages": ' + "[" * 500 + "]" * 500 + "}",
    '{"messages": "x"}',
    '{"messages": [1]}',
    '{"messages": []}',
    '{"messages": [{}]}',
    '{"messages": [{"role": "nobody", "content": "x"}]}',
    '{"messages": [{"role": "user", "content": 5}]}',
    '{"messages": [{"role": "user", "content": [5]}]}',
    '{"messages": [{"role": "user", "content": "\\ud800"}]}',
    '{"messages": [{"role": "user", "content": "x", "tool_calls": 5}]}',
    '{"messages": [{"role": "user", "content": "x"}], "temperature": "hot"}',
    '{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
    '{"messages": [{"role": "user", "content": "x"}], "n": 1000000000}',
    '{"messages": [{"role": "user", "content": "x"}], "top_k": 99999999999999999999999}',
    '{"messages": [{"role": "user", "content": "x"}], "logit_bias": {"x": 1}}',
    '{"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}',
    '{"messages": [{"role": "user", "content": "x"}], "tools": [], "tool_choice": "required"}',
    '{"messages": [{"role": "user", "content": "x"}], "tools": [{}], "tool_choice": {"type": "allowed_tools"}}',
    '{"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_schema"}}',
    '{"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "xml"}}',
    '{"messages": [{"role": "user", "content": "x"}], "stop": [""]}',
    '{"messages": [{"role": "user", "content": "x"}], "stream_options": {"include_usage": true}}',
)


def test_a_hostile_body_is_a_400(agent: Agent) -> None:
    for text in HOSTILE:
        answer = agent.do(path=CHAT, text=text)
        assert answer.get("status") == 400, (text[:200], answer)
        assert json.loads(answer["body"])["error"]["message"]


def test_bodies_that_are_too_large_are_refused(agent: Agent) -> None:
    big = json.dumps({"messages": [{"role": "user", "content": "x" * (17 << 20)}]})
    answer = agent.do(path=CHAT, text=big)
    assert answer.get("status") == 413 or "error" in answer  # the client may see the closed connection first
    assert agent.error(CHAT, {"messages": [{"role": "user", "content": "x" * (9 << 20)}]})[0] == 400


def test_silent_connections_keep_no_other_out(aiosd: System, agent: Agent) -> None:
    agent.post("/v1/models", method="GET")
    address = url(aiosd)
    silent = [socket.create_connection(address, 5) for _ in range(300)]
    try:
        assert agent.post("/v1/models", method="GET")[0] == 200
    finally:
        for one in silent:
            one.close()


def test_unknown_paths_and_wrong_methods_are_distinguished(agent: Agent) -> None:
    assert agent.post("/v1/nothing", method="GET")[0] == 404
    assert agent.post(CHAT, method="GET")[0] == 405
    for path, method, words in (("/api/pull", "POST", "there is nothing"), ("/api/chat", "GET", "GET is not allowed")):
        assert agent.post(path, method=method)[1]["error"].startswith(words), "a text, as Ollama's clients expect"
    assert agent.post("/health", method="GET", headers={"Authorization": None}) == (200, {"status": "ok"})
    metrics = agent.do(path="/metrics", method="GET", headers={"Authorization": None})
    assert 'aios_gateway_requests_total{status="404"} ' in metrics["body"]


def test_books_balance_while_a_gateway_acts(aiosd: System, agent: Agent) -> None:
    stream = agent.stream({**LONG, "max_tokens": 2000})
    with Client(Home(aiosd.home)) as client:
        check = client.call(wire.Sys.STATUS, wire.Status(check=True), dict[str, Any], timeout=30)["check"]
    assert check == []
    agent.do(drop=stream)
