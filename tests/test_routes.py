"""Routes: a call goes to the first model of the list that can take it, and on to the next when that fails."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from aiosd import config
from aiosd.config import keys
from aiosd.errors import UsageError
from aiosd.ipc import endpoint as gateway
from aiosd.kernel.routes import ModelRoute
from libaios.home import Home
from libaios.wire import Generate, ModelInfo
from tests.conftest import System
from tests.fakeendpoint import Endpoint, Handler, answers, status


@dataclass
class Core:
    model: str
    trouble: str = ""
    info: ModelInfo | None = None


def route(*cores: Any) -> ModelRoute:
    return ModelRoute("fast", cores)


def chosen(found: ModelRoute, request: Generate | None = None, tried: Collection[str] = ()) -> str:
    return found.choose(request or Generate(), set(tried)) or ""


def test_the_first_healthy_model_gets_the_call() -> None:
    a, b, c = Core("a"), Core("b"), Core("c")
    found = route(a, b, c)
    assert chosen(found) == "a"
    a.trouble = "its rate is used up"
    assert chosen(found) == "b"
    assert chosen(found, tried={"b"}) == "c"
    assert chosen(found, tried={"a", "b", "c"}) == ""
    b.trouble = c.trouble = "it is down"
    assert chosen(found) == "a", "all are in trouble: it waits for the first"
    assert found.shown()["models"][0] == {
        "name": "a", "calls": 2, "passed_over": 3, "why": "its rate is used up", "trouble": "its rate is used up",
    }  # fmt: skip


def test_a_model_without_tools_is_passed_over_for_calls_that_have_some() -> None:
    found = route(Core("plain", info=ModelInfo("plain")), Core("able", info=ModelInfo("able", tools=True)))
    assert chosen(found) == "plain"
    assert chosen(found, Generate(tools=[{"name": "f"}])) == "able"
    assert found.info.tools
    assert found.info.route == ["plain", "able"]


def test_a_change_is_in_the_log_once(caplog: pytest.LogCaptureFixture) -> None:
    a = Core("a", "it is down: gone")
    found = route(a, Core("b"))
    for _ in range(3):
        chosen(found)
    a.trouble = ""
    for _ in range(3):
        chosen(found)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert "b serves now (a: it is down: gone)" in lines[0]


def test_settings_of_routes(tmp_path: Path) -> None:
    flags = {"model": ["small=nano", "gpt=https://h/v1#g"], "route": keys.BY_NAME["route"].read("fast=small,gpt")}
    assert config.load(flags, Home(tmp_path), environ={}, cwd="/").routes == {"fast": ("small", "gpt")}
    environ = {"AIOSD_ROUTE": "fast=nano; deep=nano"}
    assert list(config.load({}, Home(tmp_path), environ=environ, cwd="/").routes) == ["fast", "deep"]
    (tmp_path / "aiosd.toml").write_text('[[model]]\npath = "nano"\n[route]\nfast = ["nano"]\n')
    assert config.load({}, Home(tmp_path), environ={}, cwd="/").routes == {"fast": ("nano",)}
    for wrong, why in (("fast=", "no route"), ("=nano", "no route"), ("fast", "no route"), ("a/b=nano", "no route")):
        with pytest.raises(ValueError, match=why):
            keys.BY_NAME["route"].read(wrong)
    for name, models, why in (("x", ("y",), "no model is named 'y'"), ("nano", ("nano",), "there is a model")):
        with pytest.raises(UsageError, match=why):
            config.load({"route": ((name, models),)}, Home(tmp_path), environ={}, cwd="/")


AGENT = r"""
import json, os, re, sys, urllib.request
import libaios as aios
HELLO = [{"role": "user", "content": "hi"}]
SHORT = {"options": {"num_predict": 4}}
ASKED = {
    "/v1/chat/completions": {"messages": HELLO, "max_tokens": 4, "n": 2},
    "/v1/completions": {"prompt": "hi", "max_tokens": 4},
    "/v1/responses": {"input": "hi", "max_output_tokens": 4},
    "/api/chat": {"messages": HELLO, **SHORT},
    "/api/generate": {"prompt": "hi", **SHORT},
}
def call(**more):
    return aios.llm.chat([{"role": "user", "content": "hi"}], max_tokens=4, model="fast", **more)
def asked(path, body=None):
    address = os.environ["OPENAI_BASE_URL"].removesuffix("/v1") + path
    key = "Bearer " + os.environ["OPENAI_API_KEY"]
    return urllib.request.urlopen(urllib.request.Request(address, body, {"authorization": key}))
for line in sys.stdin:
    if line.startswith("stream"):
        text, model = "", ""
        for piece in call(stream=True):
            text, model = text + piece.text, model or piece.model
            print("part" + piece.text, flush=True)
        print(json.dumps([model, text]), flush=True)
    elif line.startswith("running"):
        print(json.dumps(json.load(asked("/api/ps"))["models"]), flush=True)
    elif line.startswith("http"):
        named = {}
        for path, fields in ASKED.items():
            for stream in (True, False):
                body = json.dumps({"model": "fast", "stream": stream, **fields}).encode()
                answer = asked(path, body).read().decode()
                named[f"{path} {stream}"] = sorted(set(re.findall(r'"model":"([^"]*)"', answer)))
        print(json.dumps(named), flush=True)
    elif line.startswith("tokens"):
        try:
            aios.llm.tokenize("x", model="fast")
        except OSError as err:
            print(json.dumps([err.strerror]), flush=True)
    else:
        try:
            found = call()
            print(json.dumps([found.model, found.text]), flush=True)
        except OSError as err:
            print(json.dumps(["", err.strerror]), flush=True)
"""


def test_a_call_goes_on_to_the_next_model(fresh_aiosd: Callable[..., System], tmp_path: Path) -> None:
    """When the first fails; at once, while that one demands a pause; not if the caller has got a part of the answer."""
    endpoint, go = Endpoint(status(500)), threading.Event()

    def waits(handler: Handler) -> None:
        handler.stream()
        handler.chunk(content="one ")
        go.wait(20)
        handler.chunk("stop", content="two")
        handler.event("[DONE]")

    script = tmp_path / "agent.py"
    script.write_text(AGENT)
    try:
        system = fresh_aiosd("--model", f"far={endpoint.url}#gpt", "--model", "near=nano", "--route", "fast=far,near")
        job = system.popen("aios-run", script, stdin=-1)
        assert job.stdin is not None
        assert job.stdout is not None
        out = job.stdout

        def tell(word: str) -> None:
            assert job.stdin is not None
            job.stdin.write(word + "\n")
            job.stdin.flush()

        def answer(word: str) -> Any:
            tell(word)
            return json.loads(out.readline())

        assert answer("chat")[0] == "near"
        assert len(endpoint.asked) == 2, "not as often as without another model"
        endpoint.deeds[:] = [answers("hello")]
        assert answer("chat") == ["far", "hello"]
        endpoint.deeds[:] = [waits, answers("one ", "two")]
        tell("stream")
        assert out.readline() == "partone \n"
        (kernel,) = (one for one in system.ps() if one["name"] == "kernel")
        os.kill(kernel["ospid"], signal.SIGKILL)
        go.set()
        rest = [out.readline() for _ in range(2)]
        assert rest == ["parttwo\n", '["far", "one two"]\n']
        endpoint.deeds[:] = [status(429, "slow down", {"Retry-After": "60"})]
        assert answer("chat")[0] == "near"
        count = len(endpoint.asked)
        assert answer("chat")[0] == "near"
        assert len(endpoint.asked) == count, "it has asked for rest"
        if gateway.installed():
            running = answer("running")
            assert [(one["name"], one["context_length"] > 0) for one in running] == [("near", True)], "in this memory"
            assert {tuple(models) for models in answer("http").values()} == {("near",)}, "it is named in all replies"
        assert "fast is a route" in answer("tokens")[0]
        shown = json.loads(system.run("aiosd", "status", "--json", check=True).stdout)["routes"]
        assert shown[0]["models"][0]["trouble"].startswith("it asks for 60 s of rest")
        assert "slow down" in system.run("aiosd", "status").stdout
        assert "route fast: near serves now (far: " in system.log()
        job.stdin.close()
        assert job.wait(30) == 0
        system.calm_down()
    finally:
        endpoint.close()
