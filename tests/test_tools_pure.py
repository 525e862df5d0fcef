"""Tools that are computed by their callers: with the same results, rules and budgets as in the toolbox."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aiosd.tools import direct
from aiosd.tools.definition import functions_of
from libaios import pure
from tests.conftest import System, eventually

Fresh = Callable[..., System]

PARAMETERS = jsonschema_rs.validator_for(functions_of({"calc": direct.calc})["calc"].tool.parameters)

expressions = st.text(st.sampled_from("0123456789.+-*/() ×²x^%e\0\ud800é"), max_size=12)
values = expressions | st.integers() | st.none() | st.lists(expressions) | st.just("1" * 501)
calls = st.dictionaries(st.sampled_from(("expression", "more")), values)


def outcome(compute: Callable[[], Any]) -> tuple[Any, str]:
    try:
        return compute(), ""
    except ValueError as err:
        return None, str(err)


@given(calls)
@example({"expression": "1 / 0"})
@example({"expression": "1" * 500})
def test_what_a_caller_computes_is_what_the_toolbox_would_answer(arguments: dict[str, Any]) -> None:
    compute = pure.computation("calc", arguments)
    if compute is not None:
        assert PARAMETERS.is_valid(arguments)
        assert outcome(compute) == outcome(lambda: direct.FUNCTIONS["calc"](**arguments))


def test_only_tools_without_effects_are_computed() -> None:
    assert {name for name in direct.FUNCTIONS if pure.computation(name, {"expression": "1"})} == pure.NAMES


SEVERAL = """
import asyncio
import libaios as aios
print(aios.tool.call("calc", expression="6*7"), aios.tool.call("calc", {"expression": "1,250 × 3"}, timeout=5))
print(asyncio.run(aios.aio.tool.call("calc", expression="15% of 80")))
try: aios.tool.call("calc", expression="1 / 0")
except OSError as err: print(err)
"""


def test_a_stopped_toolbox_does_not_delay_arithmetic(fresh_aiosd: Fresh, tmp_path: Path) -> None:
    """Because it takes no part in it."""
    (tmp_path / "a.py").write_text(SEVERAL)
    system = fresh_aiosd()
    (toolbox,) = [entry["ospid"] for entry in system.ps() if entry["name"] == "toolbox"]
    os.kill(toolbox, signal.SIGSTOP)
    try:
        shown = system.run("aios-run", tmp_path / "a.py", check=True).stdout
    finally:
        os.kill(toolbox, signal.SIGCONT)
    assert shown.splitlines() == ["42 3750", "12", "[Errno 22] division by zero"]


def test_errors_have_the_words_of_the_toolbox(aiosd: System, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "import libaios as aios\n"
        "for arguments in ({'expression': 1}, {}, {'expression': '1', 'more': 2}, {'expression': '1' * 501}):\n"
        "    try: print('computed', aios.tool.call('calc', arguments))\n"
        "    except OSError as err: print(err.errno, err.strerror[:40])\n"
    )
    lines = aiosd.run("aios-run", tmp_path / "a.py", check=True).stdout.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("22 calc") for line in lines)


ADMITTED = """
import sys
from libaios import wire
from libaios.agent import connection
for name in sys.argv[1:]: print(name, connection().call(wire.Sys.TOOL_ADMIT, wire.AdmitTool(name), bool))
"""


def test_the_kernel_admits_these_alone(aiosd: System, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(ADMITTED)
    done = aiosd.run("aios-run", tmp_path / "a.py", "calc", "shell", "remember", "nonesuch", "", check=True)
    assert done.stdout.split() == ["calc", "True", "shell", "False", "remember", "False", "nonesuch", "False", "False"]


@pytest.mark.parametrize("rule", ['deny = [{ tool = "calc" }]', 'deny = [{ tool = "c*", by = "some" }]'])
def test_a_tool_that_a_rule_is_about_goes_to_the_toolbox(fresh_aiosd: Fresh, tmp_path: Path, rule: str) -> None:
    """The toolbox decides whether the rule is about this caller."""
    (tmp_path / "a.py").write_text(ADMITTED)
    (tmp_path / "aiosd.toml").write_text(f'[[group]]\nname = "some"\n[access]\n{rule}\n')
    system = fresh_aiosd("--config", str(tmp_path / "aiosd.toml"))
    assert system.run("aios-run", tmp_path / "a.py", "calc", check=True).stdout == "calc False\n"
    (tmp_path / "aiosd.toml").write_text('[[group]]\nname = "some"\n')
    system.run("aiosd", "reload", check=True)
    admitted = "calc True\n"
    assert eventually(lambda: system.run("aios-run", tmp_path / "a.py", "calc", check=True).stdout == admitted)
