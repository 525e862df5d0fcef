"""The interface of backends: one without llama.cpp serves a real system."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aiosd.errors import Bug
from aiosd.llm.backend import opened
from aiosd.llm.line import Line
from aiosd.llm.spec import ModelSpec
from libaios import wire
from tests.conftest import System
from tests.toybackend import PROMPT, Toy


@pytest.fixture
def system(fresh_aiosd: Callable[..., System]) -> System:
    return fresh_aiosd(program=(sys.executable, "-c", "from tests.toybackend import boot; boot()"))


def agent(system: System, tmp_path: Path, program: str, *options: str, code: int = 0) -> str:
    """Run a program as an agent; returns its output."""
    script = tmp_path / "agent.py"
    script.write_text("import libaios as aios\n" + textwrap.dedent(program))
    done = system.run("aios-run", *options, script)
    assert done.returncode == code, done.stderr
    return done.stdout


def test_an_agent_chats_with_a_backend_that_has_no_llama_cpp(system: System, tmp_path: Path) -> None:
    said = agent(system, tmp_path, "print(aios.llm.chat([{'role': 'user', 'content': 'modules'}]).text)")
    assert said == "none\n"


def test_text_alone_is_streamed_and_usage_at_the_end_is_what_it_cost(system: System, tmp_path: Path) -> None:
    code = """
        pieces = list(aios.llm.chat([{'role': 'user', 'content': 'count 4'}], stream=True))
        print([piece.text for piece in pieces if piece.text], pieces[-1].usage.prompt_tokens)
        print([each.completion_tokens for each in aios.proc.ps() if each.pid == aios.proc.getpid()])
        print([each.prompt_tokens for each in aios.proc.ps() if each.pid == aios.proc.getpid()])
    """
    assert agent(system, tmp_path, code) == f"['0 ', '1 ', '2 ', '3 '] {PROMPT}\n[4]\n[{PROMPT}]\n"
    assert system.calm_down() == []


@pytest.mark.parametrize("stream", [True, False])
def test_a_text_goes_on_after_the_cores_death(system: System, tmp_path: Path, stream: bool) -> None:
    """The successor gets the text so far, and the agent gets every word once."""
    code = f"""
        answer = aios.llm.chat([{{'role': 'user', 'content': 'count 6 die 3'}}], stream={stream})
        print("".join(piece.text for piece in answer) if {stream} else answer.text)
    """
    deaths = service(system)["deaths"]
    assert agent(system, tmp_path, code) == "0 1 2 3 4 5 \n"
    assert service(system)["deaths"] == deaths + 1
    assert system.calm_down() == []


def test_a_budget_ends_a_text_that_has_no_tokens(system: System, tmp_path: Path) -> None:
    code = """
        answer = aios.llm.chat([{'role': 'user', 'content': 'count 200000'}])
        print(answer.finish_reason, answer.usage.completion_tokens)
    """
    assert agent(system, tmp_path, code, "--tokens", "20", code=124) == "limit 20\n"


def test_what_a_backend_cannot_do_is_an_error_of_that_call(system: System, tmp_path: Path) -> None:
    code = """
        try:
            aios.llm.tokenize("x")
        except OSError as error:
            print(error)
    """
    assert "a toy does not do this" in agent(system, tmp_path, code)


def test_a_model_without_a_file_is_listed(system: System) -> None:
    (model,) = system.status()["models"]
    assert (model["name"], model["path"], model["state"]) == ("toy", "", "ready")
    assert "toy" in system.run("aiosd", "status", check=True).stdout


def service(system: System) -> dict[str, Any]:
    return next(one for one in system.status()["services"] if one["kind"] == "llm")


class Incomplete(Toy):
    def __init__(self, spec: ModelSpec, line: Line) -> None:
        super().__init__(spec, line)
        del self.table[max(self.table, key=lambda kind: kind.__name__)]


def test_a_backend_without_a_function_for_a_message_is_a_bug() -> None:
    channel: Any = None
    with pytest.raises(Bug, match="no function for Submit"):
        opened(ModelSpec("x", backend="tests.test_llm_backend:Incomplete"), Line(channel, "x"))


@pytest.mark.parametrize("given", [[], [1, 2], "", "some text"])
def test_progress_counts_in_its_own_unit(given: list[int] | str) -> None:
    progress = wire.Progress(given)
    assert progress.length == len(given)
    if isinstance(given, str):
        progress.add([], "more")
        assert (progress.given(), progress.length) == (given + "more", len(given) + 4)
    else:
        progress.add([7], "more")
        assert (progress.given(), progress.length) == ([*given, 7], len(given) + 1)
