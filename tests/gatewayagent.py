"""The test's side of an agent that sends HTTP requests for it (`gatewayprogram`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.conftest import System

PROGRAM = Path(__file__).parent / "gatewayprogram.py"
HELLO = [{"role": "user", "content": "Hello! Who are you?"}]
CHAT = "/v1/chat/completions"
LONG: dict[str, Any] = {"prompt": "Once", "max_tokens": 1500, "ignore_eos": True, "temperature": 0, "stream": True}


class Agent:
    """A program that runs as an agent and sends HTTP requests for the test."""

    def __init__(self, system: System, *options: str, name: str = "http") -> None:
        self.name = name
        self.job = system.popen("aios-run", "--name", name, *options, PROGRAM)

    def do(self, **asked: Any) -> dict[str, Any]:
        assert self.job.stdin is not None
        assert self.job.stdout is not None
        self.job.stdin.write(json.dumps(asked) + "\n")
        self.job.stdin.flush()
        line = self.job.stdout.readline()
        assert line, f"the agent has ended: {self.job.stderr and self.job.stderr.read()}"
        return json.loads(line)

    def post(self, path: str, body: Any = None, **more: Any) -> tuple[int, Any]:
        answer = self.do(path=path, body=body, **more)
        assert "status" in answer, answer
        return answer["status"], json.loads(answer["body"] or "null")

    def error(self, path: str, body: Any = None, **more: Any) -> tuple[int, Any, Any]:
        status, found = self.post(path, body, **more)
        return status, found["error"]["param"], found["error"]["code"]

    def token(self) -> str:
        return self.do(env=1)["env"]["OPENAI_API_KEY"]

    def stream(self, body: dict[str, Any] = LONG, path: str = "/v1/completions") -> int:
        """Start a stream; returns its number."""
        answer = self.do(start={"path": path, "body": body})
        assert answer["status"] == 200, answer
        assert self.line(answer["stream"]).startswith("data: ")
        return answer["stream"]

    def line(self, stream: int) -> str:
        """The next line of it that is neither empty nor a comment, which tells only that it waits; "" at the end."""
        while (answer := self.do(next=stream)).get("line", "").startswith(("\n", ":")):
            pass
        return answer.get("line", "")

    def rest(self, stream: int) -> list[str]:
        lines = []
        while line := self.line(stream):
            lines.append(line.strip())
        return lines

    def end(self) -> None:
        self.job.communicate("", timeout=30)
