"""Rights of agents in a real system: calls that need an approval, a person who answers, agents that try to answer."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from aiosd.commands import approve, asks
from libaios import wire
from libaios.client import Client
from libaios.home import Home
from libaios.wire import AnswerAsk, Asked, NoArgs, Sys, WatchAsks
from tests.conftest import System, eventually

RULES = """
[access]
deny = [ { tool = "shell", by = "web" } ]
ask = [
  { tool = "calc" },
  { tool = "write_file", path = "keep" },
  { call = "kill", signal = "USR1" },
]
"""

#: An agent that makes the calls in its arguments, one after the other, and prints the outcome of each as JSON.
AGENT = """
import json, os, sys
import libaios as aios
from libaios.agent import connection
from libaios.wire import *

for code in sys.argv[1:]:
    try:
        done = eval(code)
        print(json.dumps(["ok", repr(done)]), flush=True)
    except OSError as err:
        print(json.dumps([type(err).__name__, str(err)]), flush=True)
"""
CALC = 'aios.tool.call("calc", expression="6*7")'


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder = tmp_path_factory.mktemp("access")
    (folder / "aiosd.toml").write_text(RULES)
    (folder / "agent.py").write_text(AGENT)
    found = System("--config", str(folder / "aiosd.toml"), "--threads", "1")
    found.start()
    try:
        yield found
        assert found.destroy() == []
    finally:
        found.destroy()
        found.remove()


@pytest.fixture
def agent(system: System) -> str:
    return str(Path(system.options[1]).parent / "agent.py")


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(system: System) -> Iterator[Start]:
    """Start an attached agent, which is ended at the end of the test if it still runs."""
    yield lambda *argv, **options: system.popen("aios-run", *argv, **options)
    system._end_clients()


@pytest.fixture
def person(system: System) -> Iterator[Client]:
    with Client(Home(str(system.home))) as client:
        yield client


class Listener:
    """A person who listens to all asks."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self._call = client.submit(Sys.ASK_WATCH, WatchAsks())
        eventually(lambda: client.call(Sys.RULES, NoArgs(), wire.RulesInForce).listening)

    def next(self) -> Asked:
        def came() -> bool:
            self.client.pump()
            return bool(self._call.pieces)

        eventually(came)
        piece: Any = self._call.pieces.popleft()
        return piece

    def answer(self, asked: Asked, allow: bool, **more: Any) -> None:
        self.client.call(Sys.ASK_ANSWER, AnswerAsk(asked.id, asked.digest, allow, **more), None)

    def close(self) -> None:
        self.client.abandon(self._call)
        eventually(lambda: not self.client.call(Sys.RULES, NoArgs(), wire.RulesInForce).listening)


@pytest.fixture
def listener(person: Client) -> Iterator[Listener]:
    made = Listener(person)
    yield made
    made.close()


def did(system: System, *argv: str) -> list[list[str]]:
    """The outcomes of an agent's calls."""
    done = system.run("aios-run", *argv)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def result(running: subprocess.Popen[str]) -> list[str]:
    assert running.stdout is not None
    found: list[str] = json.loads(running.stdout.readline())
    return found


def audit(system: System) -> list[dict[str, Any]]:
    path = system.home / "data" / "audit.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ── nobody listens ────────────────────────────────────────────────────────────────────────────────────────


def test_a_denial_names_its_rule_and_comes_at_once(system: System, agent: str) -> None:
    shell = 'aios.tool.call("shell", command="true")'
    kill = "aios.proc.kill(aios.proc.getpid(), 10)"
    write = 'aios.tool.call("write_file", path="keep/../keep/a", content="x")'
    results = did(system, "-g", "web", agent, shell, CALC, kill, write)
    assert [kind for kind, _ in results] == ["PermissionError"] * 4
    rules = ["deny tool=shell by=web", "ask tool=calc", "ask call=kill signal=USR1", "ask tool=write_file path=keep"]
    for (_, words), rule in zip(results, rules, strict=True):
        assert f"{rule} (aiosd.toml, line " in words
    assert "nobody listens" in results[1][1]
    denied = eventually(lambda: [one for one in audit(system) if one["event"] == "denied" and one["what"] == "kill"])
    assert (denied[-1]["rule"].startswith("ask call=kill"), denied[-1]["group"]) == (True, "web")


def test_what_concerns_only_the_agent_needs_no_approval(system: System, agent: str) -> None:
    own = (
        'aios.sto.write("mine", b"1"), aios.sto.write("mine", b"2"), aios.sto.rollback("mine", 1)',
        'aios.sto.remove("mine")',
        '[aios.sto.write("new", text, of="group") for text in (b"1", b"2")], aios.sto.remove("new", of="group")',
        'aios.mem.remove(aios.mem.add("a note"))',
        '[aios.mem.add(text, key="mine", shared=True) for text in "ab"], aios.mem.update("mine", "c")',
        'aios.mem.remove("mine")',
        'aios.tool.call("write_file", path="kept/not", content="x")',
        "aios.proc.nice(1)",
    )
    assert [kind for kind, _ in did(system, "--name", "own", agent, *own)] == ["ok"] * len(own)
    for _ in range(2):  # an agent of the same name finds its files again, whatever its pid is
        assert did(system, "--name", "own", agent, 'aios.sto.write("again", b"1")')[0][0] == "ok"


def test_what_belongs_to_others_too_needs_an_approval(system: System, agent: str) -> None:
    did(system, agent, 'aios.sto.write("shared", b"1", of="group"), aios.mem.add("all", key="all", shared=True)')
    tries = (
        'aios.sto.write("shared", b"2", of="group")',
        'aios.sto.remove("shared", of="group")',
        'aios.sto.rollback("shared", 1, of="group")',
        'aios.mem.remove("all")',
        'aios.mem.add("mine now", key="all", shared=True)',
        'aios.mem.update("all", tags=["mine"])',
        'aios.tool.call("remember", text="mine now", key="all", shared=True)',
    )
    results = did(system, agent, *tries, 'aios.sto.append("shared", b"!", of="group")')
    assert [kind for kind, _ in results] == ["PermissionError"] * 7 + ["ok"]
    whats = ("overwritten", "removed", "rolled back", "removed", *["overwritten"] * 3)
    for (_, words), what in zip(results[:7], whats, strict=True):
        assert f"default: what belongs to others, too, is not {what} without asking" in words
    assert did(system, agent, 'aios.sto.read("shared", of="group")') == [["ok", "b'1!'"]]


# ── a person answers ──────────────────────────────────────────────────────────────────────────────────────


def test_allowed_and_denied(system: System, start: Start, agent: str, listener: Listener) -> None:
    running = start(agent, CALC, CALC)
    asked = listener.next()
    assert (asked.what, asked.tool, asked.group, asked.state) == ("calc", True, "default", "open")
    assert ("expression", "6*7") in asked.details
    assert asked.rule.startswith("ask tool=calc (aiosd.toml, line ")
    (inspected,) = json.loads(system.run("aios-inspect", str(asked.pid), check=True).stdout)
    assert inspected["asks"] == [{"id": asked.id, "what": "calc", "rule": asked.rule}]
    assert system.status()["access"]["asks"] == 1
    listener.answer(asked, allow=True)
    assert result(running) == ["ok", "'42'"]
    assert listener.next().state == "allowed"
    again = listener.next()
    assert again.id != asked.id  # the same deed, and another call
    done = system.run("aios-approve", again.id[:6], "--deny", "--reason", "not \x1b[2J on a Friday", check=True)
    assert "6*7" in done.stdout
    kind, words = result(running)
    assert (kind, "a person has denied it: not" in words) == ("PermissionError", True)
    assert listener.next().state == "denied"


def test_what_was_shown_and_nothing_else_is_allowed(
    system: System, start: Start, agent: str, listener: Listener
) -> None:
    """While a person thinks, another agent changes the file that is to be removed."""
    write = 'aios.sto.write("report", b"%d", of="group")'
    first = start(agent, write % 1, "sys.stdin.readline()", write % 2)
    assert result(first)[0] == "ok"
    second = start(agent, 'aios.sto.remove("report", of="group")')
    asked = listener.next()
    assert asked.resources == [("path", "report"), ("group", "default")]
    assert any(text.startswith("version 1,") for _, text in asked.details)
    assert first.stdin is not None
    first.stdin.write("\n")
    first.stdin.flush()
    assert [result(first)[0], result(first)[0]] == ["ok", "ok"]
    with pytest.raises(OSError, match="something else is asked by now"):
        listener.answer(Asked(**{**_fields(asked), "digest": "00"}), allow=True)
    listener.answer(asked, allow=True)
    assert listener.next().state == "allowed"
    anew = listener.next()
    assert anew.id != asked.id
    assert any(text.startswith("version 2,") for _, text in anew.details)
    listener.answer(anew, allow=True)
    assert listener.next().state == "allowed"
    assert result(second)[0] == "ok"


def test_always_holds_until_it_is_revoked(system: System, start: Start, agent: str, listener: Listener) -> None:
    write = 'aios.tool.call("write_file", path="keep/a", content=str(os.getpid()))'
    running = start(agent, write)
    asked = listener.next()
    done = system.run("aios-approve", "--always", asked.id, check=True)
    assert "write_file path ./keep/a, by agents of group default of the same program" in done.stdout
    assert result(running)[0] == "ok"
    assert listener.next().state == "allowed"
    assert did(system, agent, write)[0][0] == "ok"  # another agent of the same program, without being asked
    assert oct(stat.S_IMODE((system.home / "data" / "always.json").stat().st_mode)) == "0o600"
    listed = system.run("aios-approve", "--list-always", check=True).stdout
    assert "./keep/a" in listed
    other = Path(agent).with_name("other.py")
    other.write_text(AGENT)
    running = start(other, write)  # another program needs its own approval
    listener.answer(listener.next(), allow=False)
    assert result(running)[0] == "PermissionError"
    assert listener.next().state == "denied"
    system.run("aios-approve", "--revoke", listed.split()[0], check=True)
    assert system.run("aios-approve", "--revoke", listed.split()[0]).returncode == 1
    running = start(agent, write)
    listener.answer(listener.next(), allow=False)
    assert result(running)[0] == "PermissionError"
    assert listener.next().state == "denied"


def test_rights_are_raised_only_when_a_person_allows_it(
    system: System, start: Start, agent: str, listener: Listener
) -> None:
    spawn = f'aios.proc.wait(aios.proc.spawn("{agent}", group="dev", nice=-5))[1]'
    running = start(agent, spawn, "aios.proc.nice(-3)")
    asked = listener.next()
    why = dict(asked.details)["raises"]
    assert why.startswith("nice: an agent may not start one nicer than itself (0); group: an agent of 'default'")
    with pytest.raises(OSError, match="only be allowed once"):
        listener.answer(asked, allow=True, always=True)
    listener.answer(asked, allow=True)
    assert listener.next().state == "allowed"
    assert result(running) == ["ok", "0"]
    listener.answer(listener.next(), allow=True)
    assert listener.next().state == "allowed"
    assert result(running) == ["ok", "-3"]


def test_an_ask_ends_with_its_call_and_with_its_agent(
    system: System, start: Start, agent: str, listener: Listener
) -> None:
    running = start(agent, CALC.replace(")", ", timeout=0.2)"), CALC)
    asked = listener.next()
    assert listener.next().state == "gone"
    assert result(running)[0] == "TimeoutError"
    with pytest.raises(ProcessLookupError):
        listener.answer(asked, allow=True)
    listener.next()
    running.kill()  # which ends the agent
    assert listener.next().state == "gone"


def test_when_the_last_listener_leaves_waiting_calls_are_denied(system: System, start: Start, agent: str) -> None:
    with Client(Home(str(system.home))) as client:
        listener = Listener(client)
        running = start(agent, CALC)
        listener.next()
    kind, words = result(running)
    assert (kind, "nobody listens" in words) == ("PermissionError", True)


def test_nothing_that_an_agent_writes_controls_the_terminal(
    system: System, start: Start, agent: str, listener: Listener
) -> None:
    content = r'"\x1b]0;x\x07 \u202e\nalways means  nothing\n" + "x" * 3000'
    evil = rf'aios.tool.call("write_file", path="keep/\x1b[2Ja", content={content})'
    running = start("--name", "evil", agent, evil)
    asked = listener.next()
    shown = system.run("aios-approve", asked.id, check=True).stdout  # without a terminal it is only shown
    assert not any(not char.isprintable() for line in shown.splitlines() for char in line)
    assert r"\x1b[2Ja" in shown
    assert r"\u202e" in shown
    assert "  | always means  nothing" in shown  # marked as the agent's text
    assert "more characters: --full shows them]" in shown
    assert "more characters" not in system.run("aios-approve", "--full", asked.id, check=True).stdout
    assert asked.id in system.run("aios-approve", check=True).stdout
    listener.answer(asked, allow=False)
    assert listener.next().state == "denied"
    assert result(running)[0] == "PermissionError"


# ── no agent answers ──────────────────────────────────────────────────────────────────────────────────────

DETACHED = """
import os, subprocess, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
        with open("came", "w") as file:
            file.write(f"exit {done.returncode} {done.stderr}")
        os.rename("came", "done")
    os._exit(0)
os.wait()
while not os.path.exists("done"):
    time.sleep(0.02)
print(open("done").read())
"""


def test_an_agent_cannot_answer(system: System, start: Start, agent: str, listener: Listener, tmp_path: Path) -> None:
    asking = start(agent, CALC)
    asked = listener.next()
    answer = f'AnswerAsk("{asked.id}", "{asked.digest}", True)'
    calls = [
        f"connection().call(Sys.ASK_ANSWER, {answer}, None)",
        "connection().call(Sys.ASK_LIST, NoArgs(), None)",
        "connection().call(Sys.ASK_WATCH, WatchAsks(), None)",
        "connection().call(Sys.ALWAYS_REVOKE, RevokeAlways(1), None)",
        "connection().call(Sys.RULES, NoArgs(), None)",
    ]
    assert [kind for kind, _ in did(system, agent, *calls)] == ["PermissionError"] * 5
    (tmp_path / "detached.py").write_text(DETACHED)
    approve = ("aios-approve", "--allow", asked.id)
    for way in (("--", *approve), ("--", "aios-approve", "-f"), ("detached.py", *approve)):
        done = system.run("aios-run", *way, cwd=tmp_path)
        assert "an agent may not" in done.stdout + done.stderr
    assert [one.id for one in listener.client.call(Sys.ASK_LIST, NoArgs(), list[Asked])] == [asked.id]
    listener.answer(asked, allow=False)
    assert listener.next().state == "denied"
    assert result(asking)[0] == "PermissionError"


# ── deaths ────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_ask_outlives_the_kernel(fresh_aiosd: Callable[..., System], agent: str) -> None:
    """The kernel is killed before a person answers: the same ask is shown again, and its call is done once."""
    own = fresh_aiosd("--config", str(Path(agent).with_name("aiosd.toml")), "--threads", "1")
    did(own, agent, 'aios.sto.write("kept", b"1", of="group")')
    running = own.popen("aios-run", agent, 'aios.sto.write("kept", b"2", of="group").version', CALC)
    with Client(Home(str(own.home))) as client:
        listener = Listener(client)
        asked = listener.next()
        _kill(own, "kernel")
        again = listener.next()
        assert (again.id, again.digest, again.state) == (asked.id, asked.digest, "open")
        _kill(own, "store")  # which has no record of the call
        listener.answer(again, allow=True)
        assert listener.next().state == "allowed"
        assert result(running) == ["ok", "2"]
        asked = listener.next()
        _kill(own, "kernel")
        again = listener.next()
        assert again.id == asked.id
        listener.answer(again, allow=True)  # a call that is never done twice has not been begun
        assert result(running) == ["ok", "'42'"]


def _kill(system: System, name: str) -> None:
    (line,) = [line for line in system.ps("-e") if line["name"] == name]
    process = psutil.Process(line["ospid"])
    os.kill(process.pid, signal.SIGKILL)
    eventually(lambda: [one["ospid"] for one in system.ps("-e") if one["name"] == name] not in ([], [process.pid]))


# ── how it is shown ───────────────────────────────────────────────────────────────────────────────────────


def an_ask(what: str, resources: list[tuple[str, str]], details: list[tuple[str, str]], always: str = "") -> Asked:
    return Asked("6f1b20c9", "d", 7, "clerk", "web", what, False, resources, details, "a rule", always, time.time())


def test_one_line_describes_what_would_happen() -> None:
    renice = an_ask("nice", [("group", "web")], [("agent", "clerk(7)"), ("nice", "from 0 to -5")])
    assert asks.in_short(renice) == "nice (group web, agent clerk(7), nice from 0 to -5)"
    written = an_ask("sto_write", [("path", "a.txt")], [("file", "a.txt"), ("text", "one\ntwo"), ("why", "x" * 61)])
    assert asks.in_short(written) == "sto_write (path a.txt)"
    assert asks.in_short(an_ask("reload", [], [])) == "reload"
    assert "\x1b" not in asks.title(an_ask("calc", [], [("expression", "\x1b[2J")]))


def test_always_is_no_answer_where_it_can_only_be_allowed_once() -> None:
    once, lasting = an_ask("nice", [], []), an_ask("calc", [], [], always="calc by clerk")
    assert [approve.verdict_of(ask, "Always\n") for ask in (once, lasting)] == [None, "always"]
    assert [approve.verdict_of(ask, "y\n") for ask in (once, lasting)] == ["allow", "allow"]
    assert [approve.verdict_of(ask, "what?\n") for ask in (once, lasting)] == [None, None]
    assert ["[a]lways" in approve.question(ask) for ask in (once, lasting)] == [False, True]


# ── the terminal of an attached agent ─────────────────────────────────────────────────────────────────────


def test_the_terminal_of_an_attached_agent_shows_what_it_asks(
    system: System, start: Start, agent: str, person: Client
) -> None:
    """And a person at this terminal counts as listening."""
    master, slave = os.openpty()
    running = start(agent, CALC, stderr=slave, stdin=subprocess.DEVNULL)
    os.close(slave)
    try:
        shown = b""
        while b"aios-approve " not in shown or not shown.endswith(b"\n"):
            shown += os.read(master, 4096)
        words = shown.decode()
        assert "needs your approval: calc (expression 6*7); answer it in another terminal: aios-approve " in words
        (asked,) = person.call(Sys.ASK_LIST, NoArgs(), list[Asked])
        assert words.split()[-1] == asked.id
        person.call(Sys.ASK_ANSWER, AnswerAsk(asked.id, asked.digest, True), None)
        assert result(running) == ["ok", "'42'"]
        assert running.wait(30) == 0
    finally:
        os.close(master)


def test_a_person_answers_at_a_terminal(system: System, start: Start, agent: str) -> None:
    """Keys typed before a question are no answer to it; Ctrl-C ends the command."""
    master, slave = os.openpty()
    follow = system.popen("aios-approve", "-f", stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    try:
        until(master, "Ctrl-C ends this")
        os.write(master, b"y\ny\n")  # too early
        running = start(agent, CALC, CALC, CALC)
        until(master, "[s]kip: ")
        os.write(master, b"what\n")
        until(master, "[s]kip: ")
        os.write(master, b"y\n")
        assert result(running) == ["ok", "'42'"]
        until(master, "[s]kip: ")
        os.write(master, b"n\n")
        assert result(running)[0] == "PermissionError"
        until(master, "[s]kip: ")
        running.kill()
        until(master, "not asked any more")
        os.write(master, b"\x03")
        follow.send_signal(signal.SIGINT)
        assert follow.wait(30) in (-signal.SIGINT, 130)
    finally:
        os.close(master)


def until(master: int, words: str) -> None:
    """Read from a terminal until this text appears."""
    shown = b""
    while words.encode() not in shown:
        shown += os.read(master, 1)


# ── rules that change ─────────────────────────────────────────────────────────────────────────────────────


def test_rules_are_read_again(system: System, agent: str) -> None:
    config = Path(system.options[1])
    config.write_text(RULES.replace('{ tool = "calc" },', ""))
    try:
        assert system.run("aiosd", "reload").returncode == 0
        eventually(lambda: did(system, agent, CALC) == [["ok", "'42'"]])
        config.write_text('[access]\ndeny = [{ tool = "clac" }]\n')
        done = system.run("aiosd", "reload")
        assert "line 2: access.deny: no tool 'clac' (did you mean 'calc'?)" in done.stdout + done.stderr
    finally:
        config.write_text(RULES)
        system.run("aiosd", "reload", check=True)
    assert "ask tool=calc" in system.run("aios-approve", "--rules", check=True).stdout


def test_a_rule_for_a_program_and_its_content(fresh_aiosd: Callable[..., System], agent: str, tmp_path: Path) -> None:
    """It holds for this script, started by a person; not for a changed script, a copy, or one that an agent starts."""
    script = tmp_path / "trusted.py"
    script.write_text(AGENT)
    digest = hashlib.sha256(script.read_bytes()).hexdigest()
    (tmp_path / "aiosd.toml").write_text(
        f'[access]\nallow = [{{ call = "sto_remove", program = "trusted.py", sha256 = "{digest}" }}]\n'
    )
    own = fresh_aiosd("--config", str(tmp_path / "aiosd.toml"), "--threads", "1")
    for name in "ab":
        did(own, agent, f'aios.sto.write("{name}", b"1", of="group")')
    remove = 'aios.sto.remove("%s", of="group")'
    assert did(own, str(script), remove % "a")[0][0] == "ok"
    below = did(own, agent, f"""aios.proc.wait(aios.proc.spawn("{script}", '{remove % "b"}'))""")
    assert [kind for kind, _ in below] == ["PermissionError", "ok"]  # the child's line, and its parent's
    script.write_text(AGENT + "\n# changed\n")
    assert did(own, str(script), remove % "b")[0][0] == "PermissionError"
    with Client(Home(str(own.home))) as client:  # the script changes after it was hashed, before it starts
        forged = wire.Sandbox(program=str(script), sha256=bytes.fromhex(digest))
        spawn = wire.Spawn("file", str(script), detached=True, sandbox=forged)
        with pytest.raises(OSError, match="has changed since it was to be started"):
            client.call(Sys.SPAWN, spawn, wire.Spawned)
    (tmp_path / "copy.py").write_text(AGENT)
    assert did(own, str(tmp_path / "copy.py"), remove % "b")[0][0] == "PermissionError"


def _fields(asked: Asked) -> dict[str, Any]:
    return {name: getattr(asked, name) for name in asked.__struct_fields__}
