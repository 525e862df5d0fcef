"""Agents that reach single hosts, in a real system whose proxy finds the test as a server (`netboot`)."""

from __future__ import annotations

import json
import os
import signal
import sys
import textwrap
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from libaios.wire import GATE
from tests.conftest import System, eventually
from tests.netboot import UPSTREAM

BOOT = (sys.executable, "-c", "from tests.netboot import boot; boot()")


class Upstream(BaseHTTPRequestHandler):
    """Answers with the method, path, host and body of the request."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        if self.headers["Transfer-Encoding"] != "chunked":
            self._answer(self.rfile.read(int(self.headers["Content-Length"])))
            return
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size + 2)[:-2]
        self.rfile.readline()
        self._answer(body)

    def _answer(self, body: bytes) -> None:
        text = f"{self.command} {self.path} {self.headers['Host']} ".encode() + body
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def upstream() -> Iterator[int]:
    """Start a server at UPSTREAM; returns its port."""
    server = ThreadingHTTPServer((UPSTREAM, 0), Upstream)
    server.daemon_threads = True
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    made = System(program=BOOT)
    made.start()
    if made.status()["sandbox"]["possible"] != "cage":
        made.destroy()
        made.remove()
        pytest.skip("there is no cage here")
    yield made
    left = made.destroy()
    made.remove()
    assert left == []


def ospid(system: System, name: str) -> int:
    return next((entry["ospid"] for entry in system.ps() if entry["name"] == name), 0)


#: The beginning of agents in these tests: `got` returns the outcome of a request.
HELP = """
import http.client, json, os, socket, subprocess, sys, urllib.request
def tried(deed, *args):
    try: return deed(*args)
    except OSError as err: return f"{type(err).__name__}: {getattr(err, 'reason', None) or err.strerror or err}"
def got(url, data=None, headers={}):
    request = urllib.request.Request(url, data, headers)
    return tried(lambda: urllib.request.urlopen(request, timeout=20).read().decode())
def through(host, port):
    tunnel = http.client.HTTPConnection("127.0.0.1", 3128, timeout=20)
    tunnel.set_tunnel(host, port)
    def ask():
        tunnel.request("GET", "/tunnel")
        return tunnel.getresponse().read().decode()
    return tried(ask)
def ok(url):
    return "yes" if got(url).startswith("{") else got(url)
"""


def agent(system: System, folder: Path, net: str, code: str, *args: object, name: str = "agent.py") -> Any:
    path = folder / "project" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(HELP + textwrap.dedent(code))
    words = [str(arg) for arg in args]
    return json.loads(system.run("aios-run", "--sandbox", "cage", "--net", net, path, *words, check=True).stdout)


def test_an_agent_reaches_what_it_was_granted_and_nothing_else(system: System, upstream: int, tmp_path: Path) -> None:
    found = agent(
        system,
        tmp_path,
        f"upstream.test:{upstream},inside.test,mapped.test,lost.test",
        """
        port = int(sys.argv[1])
        print(json.dumps({
            "plain": got(f"http://upstream.test:{port}/a?b", headers={"Host": "elsewhere"}),
            "posted": got(f"http://upstream.test:{port}/p", b"body"),
            "chunked": got(f"http://upstream.test:{port}/c", iter([b"first ", b"second"])),
            "tunnel": through("upstream.test", port),
            "other name": got(f"http://api.upstream.test:{port}/"),
            "other port": through("upstream.test", 443),
            "inside": through("inside.test", 80), "mapped": through("mapped.test", 80),
            "lost": through("lost.test", 80), "no https": through("upstream.test:0", 1),
            "direct": tried(socket.create_connection, ("1.1.1.1", 80), 5),
            "upstream": tried(socket.create_connection, (sys.argv[2], port), 5),
            "name": tried(socket.getaddrinfo, "example.org", 80),
            "datagram": tried(socket.socket(type=socket.SOCK_DGRAM).sendto, b"x", ("8.8.8.8", 53)),
        }))
        """,
        upstream,
        UPSTREAM,
    )
    granted = f"upstream.test:{upstream}"
    assert found["plain"] == f"GET /a?b {granted} "
    assert found["posted"] == f"POST /p {granted} body"
    assert found["chunked"] == f"POST /c {granted} first second"
    assert found["tunnel"] == f"GET /tunnel {granted} "
    assert f"aios-run --net api.{granted}, or net of [[group]] in aiosd.toml, would allow it" in found["other name"]
    assert f"403 sandbox: port 443 of upstream.test is not granted, only {granted}" in found["other port"]
    assert "403 sandbox: inside.test is 127.0.0.1, an address of this machine" in found["inside"]
    assert "403 sandbox: mapped.test is ::ffff:127.0.0.1, an address of this machine" in found["mapped"]
    assert "502 lost.test is not known" in found["lost"]
    assert "400" in found["no https"]
    assert "Network is unreachable" in found["direct"]
    assert "Connection refused" in found["upstream"]
    assert "name resolution" in found["name"]
    assert "Network is unreachable" in found["datagram"]
    noted = [json.loads(line) for line in (system.home / "data" / "audit.jsonl").read_text().splitlines()]
    denied = {line["what"]: line["by"] for line in noted if line["event"] == "denied"}
    assert set(denied) == {
        f"net api.{granted}", "net upstream.test:443", "net inside.test:80", "net mapped.test:80",
    }  # fmt: skip
    assert denied["net upstream.test:443"].startswith("sandbox: port 443 of upstream.test is not granted")
    pid = str(max(entry["pid"] for entry in system.ps("--dead")))
    assert eventually(lambda: json.loads(system.run("aios-inspect", pid).stdout)[0]["tools"]["cpu_s"] > 0), (
        "the proxy's"
    )


def test_a_wrapped_program_that_was_refused_is_explained(system: System) -> None:
    """curl, for example, shows only the number 403."""
    program = "import urllib.request as u\ntry: u.urlopen('http://other.test/')\nexcept OSError: raise SystemExit(56)"
    done = system.run("aios-run", "--sandbox", "cage", "--net", "upstream.test", "--", "python3", "-c", program)
    assert done.returncode == 56
    start, _, words = done.stderr.rstrip().partition(": sandbox: ")
    assert start.startswith("aios-run: agent ")
    assert (
        words
        == "other.test is not granted (aios-run --net other.test, or net of [[group]] in aiosd.toml, would allow it)"
    )


def test_built_in_tools_reach_what_their_agent_reaches(system: System, upstream: int, tmp_path: Path) -> None:
    code = f"""
        import libaios as aios
        python = 'import urllib.request as u; print(u.urlopen(%r, timeout=20).read().decode())'
        direct = 'import socket; socket.create_connection((%r, {upstream}), 5)'
        def tool(name, **arguments): return tried(lambda: aios.tool.call(name, **arguments))
        print(json.dumps({{
            **{{host: tool("fetch", url=f"http://{{host}}.upstream.test:{upstream}/f") for host in ("api", "other")}},
            "python": tool("python", code=python % "http://api.upstream.test:{upstream}/p")["output"],
            "direct": tool("python", code=direct % sys.argv[1])["output"].strip(),
        }}))
    """
    found = agent(system, tmp_path, f"api.upstream.test:{upstream}", code, UPSTREAM)
    granted = f"api.upstream.test:{upstream} "
    assert found["api"] == f"GET /f {granted}"
    assert found["other"].startswith("PermissionError: sandbox: other.upstream.test is not granted")
    assert found["python"] == f"GET /p {granted}\n"
    assert "Connection refused" in found["direct"]
    others = agent(system, tmp_path, f"other.upstream.test:{upstream}", code, UPSTREAM)
    assert others["api"].startswith("PermissionError: ")  # workers are not shared between agents with different hosts
    pid = max(entry["pid"] for entry in system.ps("--dead"))
    noted = [json.loads(line) for line in (system.home / "data" / "audit.jsonl").read_text().splitlines()]
    assert f"net {granted.strip()}" in [line["what"] for line in noted if line.get("pid") == pid]


def test_the_gateway_is_found_at_its_own_and_at_fixed_addresses_without_a_token(system: System, tmp_path: Path) -> None:
    found = agent(
        system,
        tmp_path,
        "gateway",
        """
        import libaios as aios
        own = os.environ["OPENAI_BASE_URL"] + "/models"
        print(json.dumps([
            ok(own), *(ok(f"http://localhost:{port}/v1/models") for port in (8000, 8080, 11434, 1234)),
            got(own, headers={"Authorization": "Bearer wrong"})[:1],
            got("http://localhost:11434/api/generate", b'{"model":"nano","prompt":"a","stream":false,"options":'
                b'{"num_predict":1}}', {"Content-Type": "application/json"})[:1],
            aios.proc.ps()[-1].completion_tokens > 0, through("upstream.test", 80)[-40:],
        ]))
        """,
    )
    if found[0] != "yes":  # the gateway's packages are not installed
        pytest.skip(found[0])
    assert found == ["yes"] * 5 + ["{", "{", True, "net of [[group]] in aiosd.toml, would allow it)"[-40:]]
    pid = system.run("aios-run", "-d", "--sandbox", "cage", "--net", "a.org", "--", "sleep", "600").stdout.strip()
    pretending = urllib.request.Request(
        system.status()["gateway"] + "/v1/models", headers={"Authorization": f"Bearer {GATE}{pid}"}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(pretending)
    assert refused.value.code == 401
    refused.value.close()
    system.run("aios-kill", pid, check=True)


def test_children_and_other_agents_reach_only_their_own_hosts(system: System, upstream: int, tmp_path: Path) -> None:
    code = f"""
        print(json.dumps([got(f"http://{{host}}:{upstream}/")[:4] for host in ("upstream.test", "api.upstream.test")]))
    """
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "child.py").write_text(HELP + textwrap.dedent(code))
    found = agent(
        system,
        tmp_path,
        f"upstream.test:{upstream},api.upstream.test:{upstream}",
        f"""
        import libaios as aios
        child = os.path.join(os.path.dirname(__file__), "child.py")
        def with_net(net):
            done = subprocess.run(["aios-run", *net, child], capture_output=True, text=True)
            return json.loads(done.stdout) if done.returncode == 0 else done.stderr.split(":")[2].split(" ")[1:4]
        print(json.dumps([
            with_net([]), with_net(["--net", "api.upstream.test:{upstream}"]), with_net(["--net", "none"]),
            with_net(["--net", "other.test"]), with_net(["--net", "all"]),
            tried(lambda: aios.proc.spawn(child, net=["upstream.test"]))[:15],
        ]))
        """,
    )
    refused = ["an", "agent", "that"]
    assert found == [
        ["GET ", "GET "], ["HTTP", "GET "], ["URLE", "URLE"], refused, refused, "PermissionError",
    ]  # fmt: skip
    assert agent(system, tmp_path, f"api.upstream.test:{upstream}", code) == ["HTTP", "GET "]


def test_gates_outlive_the_proxy_and_the_kernel(
    system: System, fresh_aiosd: Callable[..., System], upstream: int, tmp_path: Path
) -> None:
    system = fresh_aiosd(program=BOOT)  # the common system has shown that there is a cage
    path = tmp_path / "agent.py"
    path.write_text(
        HELP + f"for line in sys.stdin: print(got('http://upstream.test:{upstream}/' + line.strip()), flush=True)\n"
    )
    run = system.popen("aios-run", "--sandbox", "cage", "--net", f"upstream.test:{upstream}", path)

    def asked(word: str) -> str:
        assert run.stdin is not None
        assert run.stdout is not None
        print(word, file=run.stdin, flush=True)
        return run.stdout.readline()

    assert asked("first").startswith("GET /first")
    for name in ("proxy", "kernel"):
        os.kill(ospid(system, name), signal.SIGKILL)
        assert asked(name).startswith(f"GET /{name}")
    other = agent(system, tmp_path, f"upstream.test:{upstream}", f"""
        print(json.dumps(got("http://upstream.test:{upstream}/new")))
    """)  # fmt: skip
    assert other.startswith("GET /new")
    assert run.stdin is not None
    run.stdin.close()
    assert run.wait(30) == 0


def test_a_hostile_agent_delays_no_other(system: System, upstream: int, tmp_path: Path) -> None:
    """It keeps silent connections open, sends invalid requests, and reads no replies."""
    before = ospid(system, "proxy")
    path = tmp_path / "hostile.py"
    path.write_text(
        HELP
        + textwrap.dedent(
            f"""
        def send(data):
            sock = socket.create_connection(("127.0.0.1", 3128), 20)
            sock.sendall(data)
            return sock
        end = b"\\r\\n\\r\\n"
        for data in (b"\\0" * 70000, b"GET / HTTP/1.1" + b"\\r\\nx: y" * 20000, end, b"CONNECT \\xff:1 x" + end):
            tried(lambda: send(data).recv(1000))
        silent = [tried(send, b"CONNECT upstream.test:{upstream} HTTP/1.1" + end) for _ in range(40)]
        silent += [tried(send, b"GET") for _ in range(40)]
        print("full", flush=True)
        sys.stdin.read()
        """
        )
    )
    run = system.popen("aios-run", "--sandbox", "cage", "--net", f"upstream.test:{upstream}", path)
    assert run.stdout is not None
    assert run.stdout.readline() == "full\n"
    code = f"""
        print(json.dumps(got("http://upstream.test:{upstream}/")))
    """
    assert agent(system, tmp_path, f"upstream.test:{upstream}", code).startswith("GET /")
    stats = next(one["stats"] for one in system.status()["services"] if one["name"] == "proxy")
    assert stats["connections"] <= 64
    assert ospid(system, "proxy") == before
    run.communicate("", timeout=30)

    def rest() -> int:
        return int(next(one["stats"]["agents"] for one in system.status()["services"] if one["name"] == "proxy"))

    assert eventually(lambda: rest() == 0)


def test_why_a_host_is_not_reached_and_what_is_refused(system: System, tmp_path: Path) -> None:
    options = ("--sandbox", "cage", "--net", "example.org", "--net", "*.a.org:8443")
    pid = system.run("aios-run", "-d", *options, "--", "sleep", "600", check=True).stdout.strip()
    assert json.loads(system.run("aios-inspect", pid).stdout)[0]["box"]["net"] == "example.org,*.a.org:8443"
    assert (
        "yes  granted by net: example.org" in system.run("aios-inspect", pid, "--why", "https://example.org/x").stdout
    )
    denied = system.run("aios-inspect", pid, "--why", "http://a.org").stdout
    assert "no rule of net names it" in denied
    assert 'to allow it: aios-run --net a.org, or net of [[group]] "default" in aiosd.toml' in denied
    system.run("aios-kill", pid, check=True)
    flat = system.run("aios-run", "--sandbox", "flat", "--net", "example.org", "--", "true")
    assert (flat.returncode, flat.stderr) == (
        125,
        "aios-run: sandbox: --net example.org needs --sandbox cage: in flat an agent has the machine's network, "
        "or none\n",
    )
    assert "needs --sandbox cage" in system.run("aios-run", "--net", "example.org", "--", "true").stderr
    assert "is no host" in system.run("aios-run", "--sandbox", "cage", "--net", "a/b", "--", "true").stderr
