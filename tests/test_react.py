"""The ReAct agent: its loop with scripted models, its tools with hostile ones."""

import errno
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import libaios
import libaios.tool
from libaios import wire
from libaios.agents import react as agent
from libaios.agents.react import AgentError, Toolbox, ToolError, Toolkit, calc, react, search


@dataclass
class Call:
    name: str
    arguments: dict[str, Any]
    id: str = "call-1"


@dataclass
class Reply:
    text: str = ""
    tool_calls: list[Call] = field(default_factory=list)
    finish_reason: str = "stop"


class Script:
    """A model with given answers, which records its prompts."""

    def __init__(self, *replies: Reply) -> None:
        self.replies = list(replies)
        self.asked: list[list[dict[str, Any]]] = []
        self.options: list[dict[str, Any]] = []

    def __call__(self, messages: list[dict[str, Any]], **options: Any) -> Reply:
        self.asked.append(json.loads(json.dumps(messages)))
        self.options.append(options)
        return self.replies.pop(0)


# --- calc


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("37 * 91", "3367"),
        ("84 / 2", "42"),
        ("10 / 4", "2.5"),
        ("10 / 3", "3.333333"),
        ("0.1 + 0.2", "0.3"),
        ("(2 + 3) * 4 ** 2", "80"),
        ("2^10", "1024"),
        ("-5 + 3", "-2"),
        ("7 % 4", "3"),
        ("7 // 2", "3"),
        ("sqrt(144)", "12"),
        ("max(3, 9)", "9"),
        ("1,250 × 3", "3750"),
        ("$12.50 * 2 =", "25"),
        ("15% of 80", "12"),
        ("2 x 4", "8"),
        ("6 ÷ 4", "1.5"),
        ("-0.0000001 * 0", "0"),
        ("1 / 30000", "3.33333e-05"),
        ("123456789 * 987654321", "121932631112635269"),
    ],
)
def test_calc(expression: str, value: str) -> None:
    assert calc(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "   ",
        "hello",
        "__import__('os').system('id')",
        "(lambda: 1)()",
        "[1, 2]",
        "'a' * 9",
        "1 if 1 else 2",
        "x = 3",
        "open",
        "(1).__class__",
        "max",
        "round(1, ndigits=1)",
        "abs('a')",
        "True + 1",
        "1j * 1j",
        "(-8) ** 0.5",
        "1; 2",
        "f'{1}'",
        "9 ** 9 ** 9",
        "10 ** 100000",
        "2.0 ** 100000",
        "1e308 * 10",
        "1e309 - 1e309",
        "(" * 400 + "1" + ")" * 400,
        "-" * 499 + "1",
        "1 + " * 5000 + "1",
        "1 / 0",
        "0 ** -1",
        "5 % 0",
        "max()",
        "sqrt(-1)",
        "sqrt(10 ** 1000)",
        "round(1e200 * 1e200)",
        "9" * 499,
        "\0",
    ],
)
def test_calc_refuses_in_one_sentence(expression: str) -> None:
    observation = Toolkit(Path()).call("calc", {"expression": expression})
    if observation.startswith("error: "):
        assert len(observation) < 600
    else:  # valid arithmetic, whose result is a number of bounded size
        assert len(observation) <= 1300
        float(observation)


def test_calc_powers_stay_small() -> None:
    with pytest.raises(ToolError, match="too large"):
        calc("9 ** 9 ** 9")
    with pytest.raises(ToolError, match="too large"):
        calc("*".join(["(2 ** 4000)"] * 40))
    with pytest.raises(ToolError, match="division by zero"):
        calc("1 / (2 - 2)")


# --- notes


def test_recall_finds_the_best_note() -> None:
    notes = ["my dog's name is Rex", "Anna's birthday is 4 May", "I parked the car on level 3", "Tom's birthday: June"]
    assert search(notes, "my dog's name") == [notes[0]]
    assert search(notes, "Anna's birthday") == [notes[1]]
    assert search(notes, "where did I park?") == [notes[2]]
    assert search(notes, "my cat's name") == []
    assert search(notes, "everything") == notes
    assert search([], "everything") == []
    assert search([*notes, "my dog's name is Fido"], "my dog's name") == ["my dog's name is Fido"]


def test_notes_outlive_the_run(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    Toolkit(tmp_path, notes).call("remember", {"text": "the rent\nis 850"})
    assert Toolkit(tmp_path, notes).call("recall", {"query": "the rent"}) == "the rent is 850"


# --- files


@pytest.mark.parametrize(
    "path", ["../secret", "/etc/passwd", "a/../../secret", "link", "link/secret", "deep/link2", "..", "\0"]
)
def test_no_path_leaves_the_folder(tmp_path: Path, path: str) -> None:
    folder = tmp_path / "work"
    (folder / "deep").mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    (folder / "link").symlink_to(tmp_path)
    (folder / "deep" / "link2").symlink_to("../../secret")
    tools = Toolkit(folder)
    assert tools.call("read_file", {"path": path}).startswith("error: ")
    assert tools.call("write_file", {"path": path, "content": "x"}).startswith("error: ")
    assert (tmp_path / "secret").read_text() == "secret"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["secret", "work"]


def test_files_are_written_and_read_back(tmp_path: Path) -> None:
    tools = Toolkit(tmp_path)
    assert tools.call("write_file", {"path": "a/b.txt", "content": "größe\n2"}) == "ok"
    assert tools.call("read_file", {"path": "a/b.txt"}) == "größe\n2"
    assert tools.call("read_file", {"path": "a/../a/b.txt"}) == "größe\n2"
    assert tools.call("read_file", {"path": "none.txt"}) == "error: no such file: none.txt"
    assert tools.call("read_file", {"path": "a"}).startswith("error: is a directory")


def test_files_have_bounds(tmp_path: Path) -> None:
    tools = Toolkit(tmp_path)
    (tmp_path / "big").write_bytes(b"x" * 100_001)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert tools.call("read_file", {"path": "big"}) == "error: file too large: big"
    assert tools.call("read_file", {"path": "binary"}) == "error: not a text file: binary"
    assert tools.call("write_file", {"path": "c", "content": "x" * 100_001}).startswith("error: ")
    assert tools.call("read_file", {"path": "n" * 5000}).startswith("error: ")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("rm", {"path": "a"}),
        ("__init__", {}),
        ("calc", {}),
        ("calc", {"expression": 3}),
        ("calc", {"expression": "1", "more": "2"}),
        ("remember", {"text": "  "}),
        ("write_file", {"path": "a", "content": None}),
    ],
)
def test_invalid_calls_get_an_error(tmp_path: Path, name: str, arguments: dict[str, Any]) -> None:
    assert Toolkit(tmp_path).call(name, arguments).startswith("error: ")
    assert list(tmp_path.iterdir()) == []


# --- the loop


def test_thinks_acts_observes_answers(tmp_path: Path) -> None:
    call = Reply("I will calculate it. ", [Call("calc", {"expression": "37 * 91"})], "tool_calls")
    chat = Script(call, Reply(" It is 3367.\n"))
    lines: list[str] = []
    assert react("What is 37 * 91?", chat, Toolkit(tmp_path), watch=lines.append) == "It is 3367."
    assert [m["role"] for m in chat.asked[1]] == ["system", "user", "assistant", "tool"]
    said, observed = chat.asked[1][2:]
    assert said["content"] == "I will calculate it."
    assert said["tool_calls"][0]["function"] == {"name": "calc", "arguments": {"expression": "37 * 91"}}
    assert observed == {"role": "tool", "tool_call_id": "call-1", "name": "calc", "content": "3367"}
    assert [line.split(":")[0] for line in lines] == ["thought", "call", "observation"]
    assert chat.options[0]["tools"] is agent.TOOLS
    assert chat.options[0]["temperature"] == 0.0


def test_several_calls_in_one_turn(tmp_path: Path) -> None:
    calls = [Call("calc", {"expression": "1 + 1"}, "a"), Call("calc", {"expression": "2 / 0"}, "b")]
    chat = Script(Reply("", calls, "tool_calls"), Reply("done"))
    assert react("?", chat, Toolkit(tmp_path)) == "done"
    seen = [(m["tool_call_id"], m["content"]) for m in chat.asked[1][3:]]
    assert seen == [("a", "2"), ("b", "error: division by zero")]


def test_step_limit(tmp_path: Path) -> None:
    chat = Script(*[Reply("", [Call("calc", {"expression": "1"})], "tool_calls")] * 5)
    with pytest.raises(AgentError, match="no answer after 3 steps"):
        react("?", chat, Toolkit(tmp_path), max_steps=3)
    assert len(chat.asked) == 3


def test_cut_off_answer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AgentError, match="cut off after 7 tokens"):
        react("?", Script(Reply("The ans", finish_reason="length")), Toolkit(tmp_path), max_tokens=7)


# --- the toolbox


def test_each_tool_is_one_of_the_toolbox(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []
    notes = [{"id": 2, "text": "", "damaged": True}, {"id": 1, "text": "the rent is 850", "damaged": False}]
    results = {"list_notes": notes, "read_stored": "850\n", "fetch": {"a": 1}}
    monkeypatch.setattr(libaios.tool, "call", lambda name, arguments: asked.append(name) or results.get(name, "42"))
    tools = Toolbox(tmp_path.parent, more=[wire.ToolInfo("fetch", "Fetches.", {}, "")])
    tools.files_stored, tools._space = True, ""
    given = [{"expression": "6*7"}, {"text": "a"}, {"query": "the rent"}, {"path": "a"}, {"path": "a", "content": "b"}]
    called = zip(agent.IN_TOOLBOX, given, strict=True)
    assert [tools.call(*one) for one in called] == ["42", "ok", "the rent is 850", "850", "ok"]
    assert tools.notes == ["the rent is 850"]
    assert asked == ["calc", "remember", "list_notes", "read_stored", "write_stored"]
    assert tools.call("fetch", {"url": "x"}) == '{"a":1}'
    assert [tool["function"]["name"] for tool in tools.tools] == [*agent.IN_TOOLBOX, "fetch"]


def test_denials_are_observations_and_a_budget_is_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libaios.tool, "call", toolbox)
    tools = Toolbox()
    tools._space = ""
    for name, arguments in (("remember", {"text": "a"}), ("recall", {"query": "a"}), ("read_file", {"path": "a"})):
        assert re.fullmatch("error: \\w+: denied by a rule", tools.call(name, arguments))
    assert tools.call("calc", {"expression": "1 +"}) == "error: not arithmetic: 1 +"

    def spent(name: str, arguments: dict[str, Any]) -> Any:
        raise wire.error(errno.EDQUOT, "no more calls")

    monkeypatch.setattr(libaios.tool, "call", spent)
    for name, arguments in (("calc", {"expression": "1"}), ("write_file", {"path": "a", "content": "b"})):
        with pytest.raises(OSError, match="no more calls"):
            tools.call(name, arguments)


# --- the command


class FakeLlm:
    def __init__(self, chat: Any) -> None:
        self.chat = chat


def toolbox(name: str, arguments: dict[str, Any]) -> Any:
    if name != "calc":
        raise wire.error(errno.EACCES, f"{name}: denied by a rule")
    return calc(arguments["expression"])


def run(monkeypatch: pytest.MonkeyPatch, chat: Any, *args: str, stdin: str = "") -> Any:
    monkeypatch.setattr(libaios, "llm", FakeLlm(chat), raising=False)
    monkeypatch.setattr(libaios.tool, "call", toolbox)
    return CliRunner().invoke(agent.main, list(args), input=stdin)


def test_the_answer_alone_is_on_stdout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    replies = [Reply("I will calculate it.", [Call("calc", {"expression": "2 + 2"})], "tool_calls"), Reply("4")]
    quiet = run(monkeypatch, Script(*replies), "2", "+", "2?")
    assert (quiet.stdout, quiet.stderr, quiet.exit_code) == ("4\n", "", 0)
    loud = run(monkeypatch, Script(*replies), "-v", stdin="2 + 2?\n")
    assert (loud.stdout, loud.exit_code) == ("4\n", 0)
    assert loud.stderr.splitlines()[0] == "thought: I will calculate it."


def test_errors_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)

    def gone(*_: Any, **__: Any) -> Reply:
        raise OSError(5, "the kernel is gone")

    broken = run(monkeypatch, gone, "hi")
    assert broken.exit_code == 1
    assert broken.stdout == ""
    assert broken.stderr == "react: [Errno 5] the kernel is gone\n"
    assert run(monkeypatch, Script(), stdin="").exit_code == 2
