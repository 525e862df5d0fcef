"""Further ports of the gateway, for programs with a fixed address."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from aiosd.ipc import endpoint
from tests.conftest import System
from tests.test_gateway import kill
from tests.test_sandbox import LEVELS

pytestmark = pytest.mark.skipif(not endpoint.installed(), reason="the extra `gateway` is not installed")

#: A program with a fixed address, which sends no token.
ASK = """
import json, sys, urllib.request as u
for port in sys.argv[1:]:
    body = {"model": "llama3", "prompt": "Once", "stream": False, "options": {"num_predict": 2}}
    asked = u.Request(f"http://localhost:{port}/api/generate", json.dumps(body).encode())
    print(json.load(u.urlopen(asked))["eval_count"])
"""


@pytest.fixture
def ports() -> tuple[int, int]:
    """Two free ports."""
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        found = [one.getsockname()[1] for one in taken]
    return found[0], found[1]


def ask(system: System, program: Path, ports: tuple[int, int], *options: str) -> list[str]:
    done = system.run("aios-run", *options, program, *map(str, ports), timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_programs_with_a_fixed_address_find_their_model(
    fresh_aiosd: Any, tmp_path: Path, ports: tuple[int, int]
) -> None:
    """In the machine's network, in a network of their own, and after the gateway has died."""
    program = tmp_path / "program.py"
    program.write_text(ASK)
    system = fresh_aiosd("--threads", "1", "--gateway", f"0,{ports[0]},{ports[1]}")
    status = system.status()
    assert status["gateway_more"] == [f"http://127.0.0.1:{port}" for port in ports]
    shown = system.run("aiosd", "status", check=True).stdout
    assert f"{status['gateway']}/v1, also at {ports[0]}, {ports[1]}\n" in shown
    possible = LEVELS[: LEVELS.index(status["sandbox"]["possible"]) + 1]
    for level in possible:
        assert ask(system, program, ports, "--sandbox", level) == ["2", "2"]
    if "cage" in possible:
        assert ask(system, program, ports, "--sandbox", "cage", "--net", "gateway") == ["2", "2"]
    kill(system, "gateway")
    assert ask(system, program, ports) == ["2", "2"]
