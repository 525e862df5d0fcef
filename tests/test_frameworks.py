"""Frameworks as agents, unchanged: those that `make frameworks` has installed (none of them is a dependency).

That command makes the whole table, with every framework and with a real model. Here two of them are tested.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.conftest import System
from tools.frameworks import FRAMEWORKS, ROOT, python_of

#: Frameworks that start within seconds, with the modules for a template.
CHEAP = {
    "autogen": "autogen_agentchat.agents,autogen_ext.models.openai",
    "pydantic_ai": "pydantic_ai,pydantic_ai.models.openai",
}


@pytest.mark.parametrize("name", CHEAP)
def test_a_framework_calls_model_and_tool_and_answers(aiosd: System, name: str) -> None:
    """With the embedded model, which was trained on this tool."""
    python = python_of(name)
    if not python.exists():
        pytest.skip(f"make frameworks ARGS={name} installs it")
    done = aiosd.run("aios-run", "--", python, ROOT / "examples" / f"{name}_agent.py")
    assert done.returncode == 0, done.stderr
    assert "tool: calc 37 * 91" in done.stdout
    assert "answer: The answer is 3367." in done.stdout


def test_the_same_program_from_a_template(fresh_aiosd: Callable[..., System]) -> None:
    name, modules = next(iter(CHEAP.items()))
    if not python_of(name).exists():
        pytest.skip(f"make frameworks ARGS={name} installs it")
    program = ROOT / "examples" / f"{name}_agent.py"
    done = fresh_aiosd().run("aios-run", "--preload", modules, "--python", python_of(name), program)
    assert done.returncode == 0, done.stderr
    assert "answer: The answer is 3367." in done.stdout


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_each_framework_has_an_example_that_compiles(name: str) -> None:
    path = ROOT / "examples" / f"{name}_agent.py"
    compile(path.read_text(), str(path), "exec")
    assert f"python examples/{name}_agent.py" in path.read_text()
