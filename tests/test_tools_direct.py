"""Built-in tools without a worker: arithmetic, and system calls in the name of the calling agent."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec import Raw, msgpack

from aiosd.ipc import link
from aiosd.tools.direct import FUNCTIONS
from aiosd.tools.errands import Errands
from libaios import arithmetic, mem, wire
from libaios.client import Client
from libaios.home import Home
from libaios.plan import Steps, Window, plan_of
from libaios.wire import CallTool, Sys
from tests.conftest import System, eventually
from tests.pace import cheap

# ── arithmetic ────────────────────────────────────────────────────────────────────────────────────────────

BOUND_S = 0.1  # processor time for any expression

words = st.sampled_from((
    "9", "2", "0.5", "1e308", "9" * 40, "(", ")", "-", "+", "*", "**", "/", "//", "%", ",", " ", "^", "x", "×", "$",
    "round(", "sqrt(", "abs(", "min(", "max(", "15% of ", "~", "not ", "\0", "é", "1j", "'a'", "[", "lambda:", "=", "?",
))  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(words, max_size=80).map("".join))
@example("round(5,-10**7)")
@example("round(5,-10**1000)")
@example("round(7," + "9" * 100 + ")")
@example("2**4095*2**4095//3**2000")
@example("9**9**9**9")
@example("-" * 490 + "1")
@example("(" * 240 + "1" + ")" * 240)
@example("1+" * 249 + "1")
@example(" " * 499 + "=")
@example("**".join("2" * 100))
@example("max(" + "2**4000," * 60 + "1)")
@example("2**4000%" * 60 + "7")
def test_no_expression_costs_much(expression: str) -> None:
    """It is computed in the toolbox itself, where it would delay all others."""

    def calculate() -> None:
        with contextlib.suppress(ValueError):
            assert len(arithmetic.calc(expression)) < 2000

    cheap(BOUND_S, calculate)


# ── errands ───────────────────────────────────────────────────────────────────────────────────────────────


class Kernel:
    """A fake kernel, which gets the errands and answers them."""

    def __init__(self) -> None:
        self.got: list[link.Errand] = []
        self.errands = Errands(self._take)
        self.results: list[Any] = []

    def _take(self, message: link.FromService) -> None:
        assert isinstance(message, link.Errand)
        self.got.append(message)

    def begin(self, steps: Steps[Any]) -> None:
        self.errands.begin((1, 7), steps, lambda result, error: self.results.append(error or result))

    def reply(self, body: Any, code: int = 0) -> None:
        number = self.got[-1].number
        raw = Raw(msgpack.encode(wire.Failure(body) if code else body))
        self.errands.replied(link.ErrandDone(number, msgpack.encode(wire.Reply(number, code, body=raw))))


def two_calls(seen: list[Any]) -> Steps[str]:
    try:
        yield plan_of(mem.get)("missing")
    except FileNotFoundError as err:
        seen.append(err.strerror)
    number = yield plan_of(mem.add)("text")
    return f"kept {number}"


def test_steps_get_results_and_errors_of_their_calls() -> None:
    kernel, seen = Kernel(), []
    kernel.begin(two_calls(seen))
    kernel.reply("no such note", errno.ENOENT)
    kernel.reply(12)
    assert (kernel.results, seen) == (["kept 12"], ["no such note"])
    assert [one.sys for one in kernel.got] == [Sys.MEM_GET, Sys.MEM_ADD]
    assert kernel.got[0].number < kernel.got[1].number
    assert (1, 7) not in kernel.errands


def windowed(got: list[Any]) -> Steps[str]:
    try:
        yield Window((plan_of(mem.add)(text) for text in "abc"), got.append)
    except FileExistsError:
        yield plan_of(mem.remove)(1)
    return "done"


def test_calls_that_others_make_at_the_same_time_are_made_one_by_one() -> None:
    kernel, got = Kernel(), []
    kernel.begin(windowed(got))
    for number in (1, 2, 3):
        kernel.reply(number)
    assert (kernel.results, got, len(kernel.got)) == (["done"], [1, 2, 3], 3)
    kernel.begin(windowed(got))
    kernel.reply("it failed", errno.EEXIST)
    kernel.reply(None)
    assert [one.sys for one in kernel.got[3:]] == [Sys.MEM_ADD, Sys.MEM_REMOVE]
    assert kernel.results == ["done", "done"]


def test_a_new_kernel_gets_what_is_open_under_its_number() -> None:
    kernel = Kernel()
    kernel.begin(FUNCTIONS["remember"]("text"))
    kernel.errands.again((1, 7))
    kernel.errands.again((1, 8))  # unknown to this toolbox
    first, second = kernel.got
    assert (first.again, second.again, first.number, first.args) == (False, True, second.number, second.args)
    kernel.reply(3)
    kernel.reply(3)  # a late reply of the first kernel
    assert kernel.results == ["kept as note 3"]


def test_a_cancelled_errand_ends_its_steps() -> None:
    ended = []

    def steps() -> Steps[None]:
        try:
            yield plan_of(mem.add)("text")
        finally:
            ended.append(True)

    kernel = Kernel()
    kernel.begin(steps())
    kernel.errands.cancel((1, 7))
    kernel.reply(3)
    assert (ended, kernel.results) == ([True], [])


# ── through a whole system ────────────────────────────────────────────────────────────────────────────────

AGENT = """
import sys
import libaios as aios
call = aios.tool.call
print(call("remember", text="The boiler is a Vaillant", key="boiler", tags=["house"]))
print(aios.mem.get("boiler").text, call("recall", note="boiler")["tags"])
print([note["key"] for note in call("search_notes", query="Vaillant")], len(call("list_notes")))
call("remember", text="For all", key="common", shared=True)
print(call("write_stored", path="plans/a.txt", content="one"), call("write_stored", path="plans/a.txt", content="two"))
print(call("read_stored", path="plans/a.txt"), call("read_stored", path="plans/a.txt", version=1))
print([file["path"] for file in call("list_stored", folder="plans")])
print([version["number"] for version in call("stored_history", path="plans/a.txt")], aios.sto.read("plans/a.txt"))
"""

OTHER = """
import errno
import libaios as aios
def failure(name, **arguments):
    try: return aios.tool.call(name, **arguments)
    except OSError as err: return errno.errorcode[err.errno], err.strerror
print(failure("recall", note="boiler")[0], failure("read_stored", path="plans/a.txt")[0])
print(failure("read_stored", path="plans/a.txt", of="agent:first")[0], failure("forget_note", note=1)[0])
print(aios.tool.call("recall", note="common")["text"], aios.tool.call("list_notes", tags=["house"]))
aios.sto.write("long", b"x" * 1_500_000)
aios.sto.write("bytes", b"\\xff")
print(*failure("read_stored", path="long"))
print(*failure("read_stored", path="bytes"))
print(*failure("recall", note=""))
print(*failure("search_notes", query="x", k=51))
"""


@pytest.fixture
def client(aiosd: System) -> Iterator[Client]:
    with Client(Home(str(aiosd.home))) as client:
        yield client


def test_notes_and_files_are_those_of_the_agent_that_calls(aiosd: System, client: Client, tmp_path: Path) -> None:
    (tmp_path / "first.py").write_text(AGENT)
    (tmp_path / "other.py").write_text(OTHER)
    first = aiosd.run("aios-run", "--name", "first", str(tmp_path / "first.py"))
    assert first.stderr == ""
    kept, *rest = first.stdout.splitlines()
    assert kept.startswith("kept as note ")
    assert rest == [
        "The boiler is a Vaillant ['house']",
        "['boiler'] 1",
        "kept as version 1 kept as version 2",
        "two one",
        "['plans/a.txt']",
        "[2, 1] b'two'",
    ]
    other = aiosd.run("aios-run", "--name", "other", str(tmp_path / "other.py"))
    assert other.stderr == ""
    assert other.stdout.splitlines() == [
        "ENOENT ENOENT",
        "ENOENT ENOENT",
        "For all []",
        "EMSGSIZE long: 1500000 bytes; at most 1048576 are read by a tool",
        "EINVAL bytes is no text file",
        "EINVAL recall.note: \"\" is not valid under any of the schemas listed in the 'anyOf' keyword",
        "EINVAL search_notes.k: 51 is greater than the maximum of 50",
    ]
    with pytest.raises(OSError, match="there is no note 'boiler'") as caught:  # a person has notes of its own
        client.call(Sys.TOOL_CALL, CallTool("recall", {"note": "boiler"}), Any)
    assert caught.value.errno == errno.ENOENT


MANY = """
import libaios as aios
for number in range(200):
    aios.tool.call("remember", text=f"note {number}")
    if number == 20: print("begun", flush=True)
print(sorted(int(note.text.split()[1]) for note in aios.mem.list(limit=1000)) == list(range(200)))
"""


def test_a_note_added_while_the_kernel_dies_exists_once(fresh_aiosd: Callable[..., System], tmp_path: Path) -> None:
    system = fresh_aiosd()
    (tmp_path / "many.py").write_text(MANY)
    pid = system.run("aios-run", "-d", "--name", "many", str(tmp_path / "many.py"), check=True).stdout.strip()
    assert eventually(lambda: "begun" in system.run("aios-logs", pid).stdout)
    os.kill(next(entry["ospid"] for entry in system.ps() if entry["name"] == "kernel"), signal.SIGKILL)
    assert system.run("aios-wait", pid).returncode == 0
    assert system.run("aios-logs", pid).stdout == "begun\nTrue\n"
