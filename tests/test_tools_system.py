"""Tools through a whole system: calls, locks, wrong arguments, and faults of tools."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from libaios import wire
from libaios.client import Client
from libaios.home import Home
from libaios.wire import CallTool, Sys, ToolInfo
from tests.conftest import System, command_line, eventually

TOOLS = '''
import os, time
from pathlib import Path
from typing import Literal
from libaios.tool import define

@define(reads=["file:{path}"])
def count_words(path: str, kind: Literal["all", "different"] = "all") -> int:
    """Count the words of a text.

    Longer.

    Args:
        path: the file
        kind: which words
    """
    words = Path(path).read_text().split()
    return len(words if kind == "all" else set(words))

@define(time=30)
def hold(gate: str) -> str:
    """Go on when the file is there."""
    print("begun", flush=True)
    with open(gate + ".log", "a") as log: log.write("begun ")
    while not os.path.exists(gate): time.sleep(0.005)
    with open(gate + ".log", "a") as log: log.write("ended ")
    return "done"

@define
def ends() -> None: os._exit(3)

@define
def burns(how: str, seconds: float) -> str:
    """Uses a processor in a child, and ends in one of many ways."""
    pid = os.fork()
    until = time.process_time() + seconds
    if pid == 0:
        if how == "detaches": os.setsid()
        while time.process_time() < until: pass
        while how == "leaves": time.sleep(1)
        os._exit(0)
    state = {"leaves": "S", "detaches": "Z"}.get(how, "")
    while state and Path(f"/proc/{pid}/stat").read_text().split()[2] != state: time.sleep(0.005)
    if not state: os.waitpid(pid, 0)
    if how == "dies": os._exit(3)
    return how

@define
def raises(kind: str) -> None: raise {"key": KeyError("k"), "os": FileNotFoundError(2, "no such thing"),
                                      "value": ValueError("bad")}[kind]

@define
def calc(expression: str) -> str: return "not the one that is built in"

@define(memory=256 << 20)
def eats() -> int: return len(bytearray(1 << 30))

@define(time=0.3)
def hangs() -> None:
    import subprocess
    subprocess.Popen(["sleep", "1000"])
    while True: pass

@define(time=20)
def forks() -> None:
    while True:
        try:
            if os.fork() == 0: time.sleep(1000)
        except OSError: time.sleep(0.01)

@define(output=1000)
def writes() -> str:
    for _ in range(10000): print("x" * 100)
    return "y" * 100

@define(output=1000)
def returns() -> str: return "y" * 10000

@define
def lies() -> None:
    for fd in range(3, 20):
        try: os.write(fd, b"\\xff\\xff\\xff\\x7fgarbage")
        except OSError: pass
    time.sleep(100)
'''


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder = tmp_path_factory.mktemp("tools")
    (folder / "mine.py").write_text(TOOLS)
    (folder / "bad.py").write_text("import nothing_of_this_name\n")
    files = f"{folder / 'mine.py'}:{folder / 'bad.py'}"
    system = System("--tools", files, "--threads", "1", cwd="/").start()  # as for `aiosd -d`: it grants no folder
    yield system
    assert system.destroy() == []


@pytest.fixture
def client(system: System) -> Iterator[Client]:
    with Client(Home(str(system.home))) as client:
        yield client


def call(client: Client, name: str, **arguments: Any) -> Any:
    return client.call(Sys.TOOL_CALL, CallTool(name, arguments), Any, timeout=30.0)


def failure(client: Client, name: str, **arguments: Any) -> tuple[str, str]:
    with pytest.raises(OSError) as caught:  # noqa: PT011 - the caller looks at it
        call(client, name, **arguments)
    return errno.errorcode[caught.value.errno or 0], caught.value.strerror or ""


def toolbox(system: System) -> int:
    return next((entry["ospid"] for entry in system.ps() if entry["name"] == "toolbox"), 0)


def below(system: System) -> list[psutil.Process]:
    return psutil.Process(toolbox(system)).children(recursive=True)


def test_tools_are_functions_with_a_schema(system: System, client: Client) -> None:
    tools = {tool.name: tool for tool in client.call(Sys.TOOL_LIST, wire.NoArgs(), list[ToolInfo])}
    assert {"calc", "shell", "fetch", "count_words"} <= set(tools)
    assert tools["calc"].source == "built in"
    mine = tools["count_words"]
    assert mine.source.endswith("mine.py")
    assert mine.description == "Count the words of a text.\n\nLonger."
    assert mine.parameters == {
        "type": "object",
        "properties": {
            "path": {"type": "string", "description": "the file"},
            "kind": {"enum": ["all", "different"], "default": "all", "description": "which words"},
        },
        "required": ["path"],
        "additionalProperties": False,
    }
    errors = next(s for s in system.status()["services"] if s["name"] == "toolbox")["stats"]["errors"]
    assert any("nothing_of_this_name" in error for error in errors.values())
    (taken,) = (error for place, error in errors.items() if place.endswith("mine.py: calc"))
    assert "already (built in)" in taken


def test_a_call_runs_in_the_folder_of_its_caller(client: Client) -> None:
    assert call(client, "calc", expression="2*21") == "42"
    call(client, "write_file", path="a/b.txt", content="one two one")
    assert call(client, "list_files", path="a") == ["b.txt"]
    assert call(client, "edit_file", path="a/b.txt", old="two", new="2") == "changed"
    assert call(client, "read_file", path="a/b.txt") == "one 2 one"
    assert call(client, "count_words", path="a/b.txt", kind="different") == 2
    assert call(client, "shell", command="cat a/b.txt; exit 3") == {"output": "one 2 one", "exit_code": 3}
    assert call(client, "python", code="print(6 * 7)") == {"output": "42\n", "exit_code": 0}


def test_an_agent_calls_tools_and_so_does_its_model(system: System, tmp_path: Path) -> None:
    (script := tmp_path / "agent.py").write_text(
        "import asyncio, libaios as aios, libaios.aio as aio\n"
        "print(aios.tool.call('calc', expression='1 + 1'), aios.tool.schema('calc')['required'])\n"
        "print([*aios.tool.stream('shell', command='echo one; echo two')])\n"
        "asked = [{'role': 'user', 'content': 'What is 37 * 91?'}]\n"
        "print(aios.llm.chat(asked, tools=['calc'], temperature=0.0).tool_calls[0].name)\n"
        "done = aios.llm.run(asked, tools=['calc'], temperature=0.0)\n"
        "print(done.text, done.calls, done.finish_reason, len(done.messages))\n"
        "async def main():\n"
        "    print((await aio.llm.chat(asked, tools=['calc'], temperature=0.0)).tool_calls[0].name)\n"
        "    done = await aio.llm.run(asked[0]['content'], tools=['calc'], temperature=0.0)\n"
        "    print(done.text, await aio.tool.call('calc', {'expression': '3'}))\n"
        "    texts = [text async for text in aio.tool.stream('shell', command='echo three')]\n"
        "    print(texts, [text async for text in aio.tool.stream('calc', expression='4')])\n"
        "    print((await aio.tool.schema('calc'))['required'])\n"
        "asyncio.run(main())\n"
        "try: aios.llm.chat(asked, tools=['nope'])\n"
        "except FileNotFoundError as err: print(err.strerror[:20])\n"
    )
    done = system.run("aios-run", str(script))
    assert done.stderr == ""
    answer = "The answer is 3367."
    assert done.stdout.splitlines() == [
        "2 ['expression']",
        "['one\\ntwo\\n']" if "['one\\ntwo\\n']" in done.stdout else "['one\\n', 'two\\n']",
        "calc",
        f"{answer} 1 stop 4",
        "calc",
        f"{answer} 3",
        "['three\\n'] ['4']",
        "['expression']",
        "no such tool: nope (",
    ]


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("nope", {}, ("ENOENT", "no such tool: nope")),
        ("calc", {}, ("EINVAL", '"expression" is a required property')),
        ("calc", {"expression": 7}, ("EINVAL", 'calc.expression: 7 is not of type "string"')),
        ("calc", {"expression": "1", "x": 1}, ("EINVAL", "'x' was unexpected")),
        ("calc", {"expression": "9**9**9"}, ("EINVAL", "too large")),
        ("count_words", {"path": "x", "kind": "all of them"}, ("EINVAL", "count_words.kind")),
        ("read_file", {"path": "../../aiosd.toml"}, ("EACCES", "outside the working folder")),
        ("read_file", {"path": "a\0b"}, ("EINVAL", "is no path")),
        ("read_file", {"path": "not there"}, ("ENOENT", "not there")),
        ("fetch", {"url": "http://127.0.0.1:1/"}, ("EACCES", "no public address")),
        ("fetch", {"url": "http://[::ffff:10.0.0.1]/"}, ("EACCES", "no public address")),
        ("fetch", {"url": "file:///etc/passwd"}, ("EINVAL", "no http or https URL")),
        ("raises", {"kind": "key"}, ("EREMOTEIO", "KeyError: 'k'")),
        ("raises", {"kind": "os"}, ("ENOENT", "no such thing")),
        ("raises", {"kind": "value"}, ("EINVAL", "bad")),
        ("ends", {}, ("EIO", "exit code 3")),
        ("eats", {}, ("ENOMEM", "more than 256 MB")),
        ("hangs", {}, ("ETIMEDOUT", "hangs ran for 0.3 s")),
        ("forks", {}, ("EAGAIN", "more than 64 processes")),
        ("returns", {}, ("EMSGSIZE", "may return 1000")),
        ("lies", {}, ("EIO", "its worker sent what no worker sends")),
    ],
)
def test_a_fault_of_a_tool_affects_that_call_only(
    system: System, client: Client, name: str, arguments: dict[str, Any], expected: tuple[str, str]
) -> None:
    box = toolbox(system)
    code, message = failure(client, name, **arguments)
    assert (code, expected[1] in message) == (expected[0], True), message
    assert call(client, "calc", expression="1") == "1"
    assert toolbox(system) == box
    assert eventually(lambda: all("tools.worker" in line for line in map(command_line, below(system)) if line))


def test_resources_of_a_call_are_charged_to_its_agent_however_it_ends(system: System, tmp_path: Path) -> None:
    """The call takes less time than the interval of samples."""
    (script := tmp_path / "agent.py").write_text(
        "import libaios as aios\n"
        "def used(): return next(one.cpu_s for one in aios.proc.ps() if one.pid == aios.proc.getpid())\n"
        "for how in ('waits', 'leaves', 'dies', 'detaches'):\n"
        "    before = used()\n"
        "    try: aios.tool.call('burns', how=how, seconds=0.05)\n"
        "    except OSError as err: assert how == 'dies' and err.errno == 5, err\n"
        "    print(how, used() - before)\n"
    )
    done = system.run("aios-run", "--name", "burner", "--cpu", "100", script)
    shown = [line.split() for line in done.stdout.splitlines()]
    assert [how for how, _ in shown] == ["waits", "leaves", "dies", "detaches"], done.stderr
    assert [how for how, used in shown if not 0.04 <= float(used) < 10.0] == []
    agent = json.loads(system.run("aios-inspect", "burner", check=True).stdout)[0]
    assert agent["cpu_s"] >= agent["tools"]["cpu_s"] >= 4 * 0.04
    assert agent["tools"]["memory_bytes"] == 0
    assert system.run("aiosd", "status", "--check").returncode == 0


def test_endless_output_is_cut(client: Client) -> None:
    pending = client.submit(Sys.TOOL_CALL, CallTool("writes", {}, stream=True))
    assert client.result(pending, str, timeout=30) == "y" * 100
    assert 900 <= sum(map(len, pending.pieces)) <= 1000


def test_a_tool_runs_once_at_a_time_and_its_queue_survives_the_toolbox(
    fresh_aiosd: Callable[..., System], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(TOOLS)
    system = fresh_aiosd("--tools", str(tmp_path / "mine.py"), "--threads", "1")
    gate, log = tmp_path / "gate", tmp_path / "gate.log"
    with Client(Home(str(system.home))) as client:
        calls = [client.submit(Sys.TOOL_CALL, CallTool("hold", {"gate": str(gate)})) for _ in range(3)]
        assert eventually(lambda: log.exists() and log.read_text() == "begun ")
        os.kill(toolbox(system), signal.SIGKILL)
        with pytest.raises(OSError, match="died while this call was under way") as caught:
            client.result(calls[0], str, timeout=30)
        assert caught.value.errno == errno.EIO
        gate.touch()
        assert [client.result(one, str, timeout=30) for one in calls[1:]] == ["done", "done"]
    assert log.read_text() == "begun begun ended begun ended "


def test_a_cancelled_call_ends_its_processes(system: System, client: Client, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    one = client.submit(Sys.TOOL_CALL, CallTool("hold", {"gate": str(gate)}))
    two = client.submit(Sys.TOOL_CALL, CallTool("hold", {"gate": str(tmp_path / "other")}))
    assert eventually(lambda: (tmp_path / "gate.log").exists())
    client.abandon(one)
    assert eventually(lambda: (tmp_path / "other.log").exists())  # the next call has begun
    (tmp_path / "other").touch()
    assert client.result(two, str, timeout=30) == "done"
    assert (tmp_path / "gate.log").read_text() == "begun "


def test_a_slow_tool_does_not_delay_others(client: Client, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    slow = client.submit(Sys.TOOL_CALL, CallTool("hold", {"gate": str(gate)}))
    assert eventually(lambda: (tmp_path / "gate.log").exists())
    for _ in range(20):
        assert call(client, "calc", expression="1") == "1"
    gate.touch()
    assert client.result(slow, str, timeout=30) == "done"


def test_a_tool_has_no_rights_of_a_person(system: System, client: Client) -> None:
    """A process of a tool descends from no agent, and is no program of the user, so the kernel refuses it."""
    done = call(client, "shell", command=f"AIOS_HOME={system.home} aios-ps")
    assert (done["exit_code"], "aios-ps: " in done["output"], "no aiosd" in done["output"]) == (1, True, False), done


def test_tools_do_not_get_the_environment_of_aiosd(tmp_path: Path) -> None:
    system = System(home=tmp_path / "home", env={"OPENAI_API_KEY": "sk-secret"})
    try:
        system.start()
        with Client(Home(str(system.home))) as client:
            assert "sk-secret" not in call(client, "shell", command="env")["output"]
    finally:
        assert system.destroy() == []


@pytest.mark.parametrize(("level", "denied"), [("flat", "Permission denied"), ("cage", "No such file or directory")])
def test_built_in_tools_of_a_confined_agent_are_confined_too(
    system: System, level: str, denied: str, tmp_path: Path
) -> None:
    (folder := tmp_path / "its folder").mkdir()
    (secret := tmp_path / "secret").write_text("private")
    (script := folder / "agent.py").write_text(
        "import os, sys, libaios as aios\n"
        "open(os.path.join(os.environ['HOME'], 'mine'), 'w').write('x')\n"
        "print(aios.tool.call('shell', command=f'cat {sys.argv[1]}')['output'].rpartition(': ')[2])\n"
        "print(aios.tool.call('python', code='open(\\'made\\', \\'w\\'); print(open(\\'mine\\').read())')['output'])\n"
        "print(os.path.exists(os.path.join(os.environ['HOME'], 'made')))\n"
        "try: aios.tool.call('fetch', url='http://192.0.2.1/')\n"
        "except OSError as err: print('no network' if err.errno in (1, 13, 97, 113) else err)\n"
    )
    done = system.run("aios-run", "--sandbox", level, "--net", "none", str(script), str(secret))
    if "not possible here" in done.stderr:
        pytest.skip(done.stderr)
    assert done.stdout.splitlines() == [denied, "", "x", "", "True", "no network"], done.stderr
    used = json.loads(system.run("aios-inspect", "agent", check=True).stdout)[0]["tools"]["cpu_s"]
    assert used >= 0.05  # the start of its own worker is charged, too
