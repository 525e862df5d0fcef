"""The owner of a connection without a valid token: programs send a key of their own, or none."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import importlib.util
import json
import os
import shutil
import signal
import socket
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from aiosd.gateway import holders, identity
from aiosd.gateway.holders import Holders, SocketHolder
from aiosd.gateway.identity import SocketAddress
from aiosd.ipc import endpoint
from tests.conftest import System, eventually
from tests.gatewayagent import CHAT, HELLO, LONG, Agent
from tests.test_gateway import entry, gateway, kill
from tests.test_sandbox import skip_unless_possible

pytestmark = pytest.mark.skipif(not endpoint.installed(), reason="the extra `gateway` is not installed")
official = pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason="openai is not installed")

LEVELS = ("none", "flat", "cage")
NO_TOKEN = {"Authorization": None}

#: The beginning of programs: makes a request without a token, on a new connection or on a given one.
ASK = """
import http.client, json, os, socket, subprocess, sys
from urllib.parse import urlsplit

URL = urlsplit(os.environ["OPENAI_BASE_URL"])

def ask(sock=None):
    connection = http.client.HTTPConnection(URL.hostname, URL.port, timeout=30)
    connection.sock = sock
    if sock is not None:
        sock.settimeout(30)
    connection.request("GET", "/v1/models")
    response = connection.getresponse()
    found = json.loads(response.read())
    return [response.status, found["data"][0]["id"] if "data" in found else found["error"]["message"]]

def connected():
    return socket.create_connection((URL.hostname, URL.port), 30)
"""

KEYS = """
from openai import OpenAI
print(OpenAI(api_key="ollama").models.list().data[0].id)
print(OpenAI(api_key="sk-none").completions.create(model="llama3", prompt="Once", max_tokens=3).usage.completion_tokens)
print(OpenAI(api_key="aios-" + "x" * 43).models.list().data[0].id)
"""

FAMILY = """
print(*ask())
print(subprocess.run([sys.executable, "-c", GRANDCHILD], capture_output=True, text=True, check=True).stdout, end="")
"""

#: It forks twice and detaches; the process between has ended when the request is made.
GRANDCHILD = """
reader, writer = os.pipe()
if os.fork() == 0:
    os.setsid()
    between = os.getpid()
    if os.fork() == 0:
        while os.getppid() == between:
            pass
        os.write(writer, " ".join(map(str, ask())).encode())
    os._exit(0)
os.wait()
os.close(writer)
print(os.read(reader, 1000).decode())
"""


def url(system: System) -> tuple[str, int]:
    found = urlsplit(system.status()["gateway"])
    return found.hostname or "", found.port or 0


@pytest.fixture
def agent(aiosd: System) -> Agent:
    return Agent(aiosd)


@pytest.fixture(params=LEVELS)
def level(aiosd: System, request: pytest.FixtureRequest) -> str:
    if request.param != "none":
        skip_unless_possible(aiosd, request.param)
    return request.param


def program(folder: Path, code: str) -> Path:
    script = folder / "program.py"
    script.write_text(ASK + textwrap.dedent(code))
    return script


def run(system: System, folder: Path, code: str, *options: str) -> list[Any]:
    """Run a program as an agent; returns its line of JSON."""
    done = system.run("aios-run", *options, program(folder, code), timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# ── agents ────────────────────────────────────────────────────────────────────────────────────────────────


@official
def test_any_key_will_do(aiosd: System, tmp_path: Path, level: str) -> None:
    script = tmp_path / "keys.py"
    script.write_text(KEYS)
    done = aiosd.run("aios-run", "--sandbox", level, script, timeout=60)
    assert done.stdout.split() == ["nano", "3", "nano"], done.stderr


def test_what_descends_from_an_agent_needs_no_token(aiosd: System, tmp_path: Path, level: str) -> None:
    code = f"GRANDCHILD = {ASK + GRANDCHILD!r}\n{FAMILY}"
    done = aiosd.run("aios-run", "--sandbox", level, program(tmp_path, code), timeout=60)
    assert done.stdout.splitlines() == 2 * ["200 nano"], done.stderr


def test_a_child_in_another_pid_namespace_is_the_agent(aiosd: System, tmp_path: Path) -> None:
    unshare = ("unshare", "--user", "--map-root-user", "--pid", "--fork")
    if shutil.which("unshare") is None or aiosd.run(*unshare, "true").returncode != 0:
        pytest.skip("no namespaces here")
    script = program(tmp_path, "print(os.getpid(), *ask())")
    done = aiosd.run("aios-run", "--sandbox", "none", "--", *unshare, sys.executable, script, timeout=60)
    assert done.stdout == "1 200 nano\n", done.stderr


def test_requests_of_ollamas_clients(aiosd: System, agent: Agent) -> None:
    body = {"model": "llama3", "prompt": "Once", "stream": False, "options": {"num_predict": 3}}
    status, found = agent.post("/api/generate", body, headers=NO_TOKEN)
    assert (status, found["eval_count"]) == (200, 3)
    assert entry(aiosd, "http")["completion_tokens"] == 3


def test_it_is_one_agent_with_and_without_its_token(aiosd: System, agent: Agent) -> None:
    asked = {"input": "Hello!", "max_output_tokens": 3}
    first = agent.post("/v1/responses", asked, headers=NO_TOKEN)[1]["id"]
    assert agent.post("/v1/responses", asked | {"previous_response_id": first})[0] == 200
    assert gateway(aiosd)["agents"] == 1


def test_an_agent_whose_environment_is_its_own_is_served_too(aiosd: System, tmp_path: Path) -> None:
    given = {"OPENAI_BASE_URL": f"{aiosd.status()['gateway']}/v1"}
    done = aiosd.run("aios-run", "--no-gateway-env", program(tmp_path, "print(*ask())"), env=given)
    assert done.stdout == "200 nano\n", done.stderr


def test_a_stream_without_a_token_outlives_the_kernel(fresh_aiosd: Any) -> None:
    system = fresh_aiosd("--threads", "1")
    agent = Agent(system)
    body = {**LONG, "max_tokens": 300}
    stream = agent.do(start={"path": "/v1/completions", "body": body, "headers": NO_TOKEN})
    assert stream["status"] == 200
    kill(system, "kernel")
    assert agent.rest(stream["stream"])[-1] == "data: [DONE]"
    kill(system, "gateway")
    assert agent.post("/v1/models", method="GET", headers=NO_TOKEN)[0] == 200
    agent.end()
    assert eventually(lambda: gateway(system)["agents"] == 0)


# ── all others ────────────────────────────────────────────────────────────────────────────────────────────


def asked(system: System, sock: socket.socket | None = None, **headers: str) -> tuple[int, Any]:
    """The answer to a request of the test itself, which is a person's program."""
    connection = http.client.HTTPConnection(*url(system), timeout=30)
    if sock is not None:
        connection.sock = sock
    with contextlib.closing(connection):
        connection.request("GET", "/v1/models", headers=headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read()).get("error")


WRONG = ("Bearer ollama", "Bearer aios-" + "x" * 43, "Bearer " + "x" * 5000, "Bearer processes:1:1", "Bearer gate:1")


def test_a_persons_program_gets_an_error_that_says_how_to_get_a_token(aiosd: System) -> None:
    given = [{}, {"Authorization": "Basic !"}, *({"Authorization": text} for text in WRONG)]
    found = [asked(aiosd, **headers) for headers in given]
    assert [(status, error["code"]) for status, error in found] == [
        *2 * [(401, "no_api_key")],
        *len(WRONG) * [(401, "invalid_api_key")],
    ]
    assert {"aiosd token NAME" in error["message"] for _, error in found} == {True}


def test_a_persons_program_shows_its_token_each_time(aiosd: System) -> None:
    """The connection may be that of a proxy, which serves others, too."""
    token = aiosd.run("aiosd", "token", "proxy", check=True).stdout.strip()
    connection = http.client.HTTPConnection(*url(aiosd), timeout=30)
    codes = []
    with contextlib.closing(connection):
        for headers in ({"x-api-key": token}, {}, {"x-api-key": "ollama"}, {"x-api-key": token}):
            connection.request("GET", "/v1/models", headers=headers)
            response = connection.getresponse()
            response.read()
            codes.append(response.status)
    aiosd.run("aiosd", "token", "proxy", "--revoke", check=True)
    assert codes == [200, 401, 401, 200]


def test_pages_need_a_token(agent: Agent) -> None:
    for page in (
        {"Origin": "http://localhost:3000"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ):
        assert agent.error("/v1/models", method="GET", headers=NO_TOKEN | page)[::2] == (401, "no_api_key")
        assert agent.post("/v1/models", method="GET", headers=page)[0] == 200
    assert agent.post("/v1/models", method="GET", headers=NO_TOKEN | {"Sec-Fetch-Site": "none"})[0] == 200


ORPHAN = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
parent = os.getpid()
sock = connected()
if os.fork():
    os._exit(0)
while os.getppid() == parent:
    pass
with open(sys.argv[1] + "~", "w") as file:
    print(*ask(sock), file=file)
os.rename(sys.argv[1] + "~", sys.argv[1])
"""


def test_a_process_whose_agent_has_ended_is_refused(fresh_aiosd: Any, tmp_path: Path) -> None:
    system = fresh_aiosd("--threads", "1", "--orphans", "term", "--stop-timeout", "60")
    found = tmp_path / "found"
    done = system.run("aios-run", program(tmp_path, ORPHAN), found)
    assert eventually(found.exists), (done.returncode, done.stdout, done.stderr)
    assert found.read_text().startswith("401 a token is needed: ")


TAKES = """
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(sys.argv[1])
    listener.listen()
    other, _ = listener.accept()
_, fds, _, _ = socket.recv_fds(other, 1, 1)
print(json.dumps([ask(socket.socket(fileno=fds[0]))]))
other.sendall(b"x")
"""

GIVES = """
sock = connected()
with socket.socket(socket.AF_UNIX) as other:
    other.connect(sys.argv[1])
    socket.send_fds(other, [b"x"], [sock.fileno()])
    if sys.argv[2] == "gives up":
        sock.close()
    other.recv(1)
"""


@pytest.mark.parametrize("keeps", [True, False])
def test_a_connection_of_two_agents_belongs_to_neither(aiosd: System, tmp_path: Path, keeps: bool) -> None:
    """Either may have sent the request. A connection that was given away belongs to its new owner."""
    path = str(tmp_path / "s")
    for name, code in (("takes", TAKES), ("gives", GIVES)):
        (tmp_path / name).mkdir()
        program(tmp_path / name, code)
    taking = aiosd.popen("aios-run", tmp_path / "takes" / "program.py", path)
    assert eventually(lambda: os.path.exists(path))
    aiosd.run("aios-run", tmp_path / "gives" / "program.py", path, "keeps" if keeps else "gives up")
    out, err = taking.communicate(timeout=30)
    assert out, err
    status, words = json.loads(out)[0]
    assert (status, "one agent's own programs" in words) == ((401, True) if keeps else (200, False)), err


def test_a_connection_shared_with_a_person_belongs_to_no_agent(aiosd: System, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    taking = aiosd.popen("aios-run", program(tmp_path, TAKES), path)
    assert eventually(lambda: os.path.exists(path))
    with socket.create_connection(url(aiosd), 10) as sock, socket.socket(socket.AF_UNIX) as other:
        other.connect(path)
        socket.send_fds(other, [b"x"], [sock.fileno()])
        other.recv(1)
    out, _ = taking.communicate(timeout=30)
    assert json.loads(out)[0][0] == 401


HANDS = """
import libaios as aios
sock = connected()
os.dup2(sock.fileno(), 0)
child = aios.proc.spawn(sys.argv[1], sys.argv[2])
sock.close()
os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
with open(sys.argv[2] + ".go", "w"):
    pass
aios.proc.wait(child)
"""

HANDED = """
while not os.path.exists(sys.argv[1] + ".go"):
    pass
if len(sys.argv) > 2:
    fd = os.dup(0)
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
else:
    fd = 0
with open(sys.argv[1], "w") as file:
    print(*ask(socket.socket(fileno=fd)), file=file)
"""


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_connection_inherited_at_its_start_does_not_belong_to_an_agent(
    aiosd: System, tmp_path: Path, elsewhere: bool
) -> None:
    """The process that started it may have sent a request on it, and would be answered as the agent."""
    (tmp_path / "child").mkdir()
    moved = HANDED.replace("len(sys.argv) > 2", str(elsewhere))
    child, found = program(tmp_path / "child", moved), tmp_path / "found"
    done = aiosd.run("aios-run", program(tmp_path, HANDS), child, found, timeout=60)
    assert done.returncode == 0, done.stderr
    assert found.read_text().startswith("401 a token is needed: "), done.stderr


def test_a_process_of_a_tool_is_no_agents(aiosd: System, tmp_path: Path) -> None:
    code = """
    import libaios as aios
    code = "import urllib.request as u; print(u.urlopen('%s/models').status)" % os.environ["OPENAI_BASE_URL"]
    print(json.dumps(aios.tool.call("shell", command=f'{sys.executable} -c "{code}" 2>&1 | tail -1')))
    """
    assert "401" in str(run(aiosd, tmp_path, code))


# ── which processes have a connection ─────────────────────────────────────────────────────────────────────

Pair = tuple[socket.socket, SocketAddress, SocketAddress]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A connection, and both addresses. The test closes the ends."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        client.bind(("127.0.0.1", 0))
        client.connect(server.getsockname())
        with server.accept()[0]:
            yield client, SocketAddress(*client.getsockname()), SocketAddress(*server.getsockname())


def test_all_processes_with_a_connection_are_found(pair: Pair) -> None:
    client, *ends = pair
    inode = os.fstat(client.fileno()).st_ino
    child = os.fork()
    if child == 0:
        signal.pause()
    try:
        found = holders.look([(ends[0], ends[1])])[ends[0], ends[1]]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert {(one.pid, one.parent, one.inode) for one in found} == {
        (os.getpid(), os.getppid(), inode),
        (child, os.getpid(), inode),
    }
    assert [one.pid for one in holders.roots(found)] == [os.getpid()]


def test_an_address_that_cannot_be_looked_up_costs_no_other_connection(pair: Pair) -> None:
    _, *ends = pair
    odd = SocketAddress("fe80::1%lo", 1), SocketAddress("::1", 2)
    assert [one.pid for one in holders.look([odd, (ends[0], ends[1])])[ends[0], ends[1]]] == [os.getpid()]


def test_half_closed_is_still_connected(pair: Pair) -> None:
    client, theirs, ours = pair
    client.shutdown(socket.SHUT_WR)
    assert identity.other_end(theirs, ours).inode == os.fstat(client.fileno()).st_ino


def test_a_socket_that_listens_there_is_not_the_other_end(pair: Pair) -> None:
    """Linux returns it when the other end is closed; its owner could be taken for the sender, which has left."""
    client, theirs, ours = pair
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(theirs)
        listener.listen()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # the connection ends by a reset
        client.close()
        assert identity.other_end(theirs, ours).inode == 0
        assert identity.holder(theirs, ours) == 0


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list of the numbers of connections for which /proc was searched."""
    made: list[int] = []

    def look(asked: list[holders.Ends]) -> dict[holders.Ends, list[SocketHolder]]:
        made.append(len(asked))
        return {ends: [SocketHolder(ends[0].port, 1, 1, 3)] for ends in asked}

    monkeypatch.setattr(holders, "look", look)
    return made


def test_a_crowd_costs_one_look(looks: list[int]) -> None:
    async def crowd() -> list[list[SocketHolder]]:
        asks = Holders()
        return await asyncio.gather(
            *(asks.of(SocketAddress("::1", port), SocketAddress("::1", 1)) for port in range(1000))
        )

    assert [found[0].pid for found in asyncio.run(crowd())] == list(range(1000))
    assert looks == [1000]


def test_looks_take_a_part_of_the_time(looks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a constant load they are made one after the other, with pauses that bound their share of the time."""
    clock, slept = [100.0], 0.0
    plain = holders.look

    def one_s(asked: list[holders.Ends]) -> dict[holders.Ends, list[SocketHolder]]:
        clock[0] += 1
        return plain(asked)

    async def sleep(seconds: float) -> None:
        nonlocal slept
        clock[0] += max(0.0, seconds)
        slept += max(0.0, seconds)

    async def ask() -> None:
        asks = Holders()
        for port in range(10):
            await asks.of(SocketAddress("::1", port), SocketAddress("::1", 1))

    monkeypatch.setattr(holders, "look", one_s)
    for name in ("monotonic", "thread_time"):
        monkeypatch.setattr(holders.time, name, lambda: clock[0])
    monkeypatch.setattr(holders.asyncio, "sleep", sleep)
    asyncio.run(ask())
    assert looks == 10 * [1]
    assert slept == 9 * (holders.COST - 1) - holders.BURST_S


def test_strangers_without_a_token_keep_no_agent_out(aiosd: System, agent: Agent) -> None:
    agent.post("/v1/models", method="GET")
    request = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    address = url(aiosd)
    strangers = [socket.create_connection(address, 5) for _ in range(300)]
    try:
        for one in strangers:
            one.sendall(request)
        assert agent.post("/v1/models", method="GET", headers=NO_TOKEN)[0] == 200
        assert agent.post(CHAT, {"messages": HELLO, "max_tokens": 2}, headers=NO_TOKEN)[0] == 200
    finally:
        for one in strangers:
            one.close()
