"""A real quantised chat model through the whole system: it boots, chats by its own template, and its JSON is valid."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import System

HEADER = "import json\nimport libaios as aios\nllm = aios.llm\n"
CTX = 1024


@pytest.fixture(scope="module")
def system(smollm2: Path) -> Iterator[System]:
    system = System("--model", f"smol={smollm2}", "--slots", "4", "--ctx", str(CTX), "--threads", "1").start()
    yield system
    left = system.destroy()
    system.remove()
    assert left == []


@pytest.fixture
def ask(system: System, tmp_path: Path) -> Callable[[str], str]:
    """Run code as an agent; returns its output."""

    def run(code: str) -> str:
        path = tmp_path / "agent.py"
        path.write_text(HEADER + textwrap.dedent(code))
        done = system.run("aios-run", path)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
        return done.stdout

    return run


Ask = Callable[[str], str]


def test_it_chats_by_its_own_template(ask: Ask) -> None:
    said = ask("""
        system = {"role": "system", "content": "You are a helpful assistant."}
        question = {"role": "user", "content": "What is the capital of France?"}
        for messages in ([system, question], [question]):
            r = llm.chat(messages, max_tokens=40, temperature=0.0)
            print(json.dumps([r.text, r.finish_reason, r.usage.prompt_tokens]))
    """)
    (text, reason, given), (_, _, made_up) = map(json.loads, said.splitlines())
    assert "Paris" in text
    assert reason == "stop"
    assert "<|im_" not in text
    assert made_up > given + 5  # without a system message its template inserts a longer one


def test_a_schema_gives_valid_json(ask: Ask) -> None:
    said = ask("""
        schema = {"type": "object", "additionalProperties": False, "required": ["name", "age", "city"], "properties": {
            "name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "city": {"enum": ["Paris", "Rome", "Berlin"]}}}
        question = "Describe Anna, who is 34 and lives in Rome, as JSON with name, age and city."
        for temperature, seed in ((0.0, 1), (1.5, 2), (1.5, 3)):
            r = llm.chat([{"role": "user", "content": question}], schema=schema, max_tokens=120,
                         temperature=temperature, seed=seed)
            print(json.dumps([r.finish_reason, r.text]))
    """)
    for line in said.splitlines():
        reason, text = json.loads(line)
        value = json.loads(text)
        assert reason == "stop"
        assert sorted(value) == ["age", "city", "name"]
        assert value["city"] in ("Paris", "Rome", "Berlin")
        assert 0 <= value["age"] <= 120


def test_tools_are_called_with_valid_arguments(ask: Ask) -> None:
    """The template has no tools, and the model was not trained on any: two earlier calls are given as examples."""
    said = ask("""
        tool = {"type": "function", "function": {"name": "search", "description": "Search the web", "parameters": {
            "type": "object", "additionalProperties": False, "required": ["query", "most"],
            "properties": {"query": {"type": "string", "maxLength": 40}, "most": {"type": "integer"}}}}}
        def shown(n, query):
            call = {"id": f"c{n}", "type": "function",
                    "function": {"name": "search", "arguments": {"query": query, "most": 3}}}
            return [{"role": "user", "content": f"Search for {query}."},
                    {"role": "assistant", "content": None, "tool_calls": [call]},
                    {"role": "tool", "tool_call_id": f"c{n}", "content": "found"},
                    {"role": "assistant", "content": "Done."}]
        messages = [*shown(1, "cheap flights"), *shown(2, "good books"),
                    {"role": "user", "content": "Search for red shoes."}]
        r = llm.chat(messages, tools=[tool], max_tokens=80, temperature=0.0)
        print(json.dumps([r.finish_reason, [[call.name, call.arguments] for call in r.tool_calls], r.text]))
    """)
    reason, calls, text = json.loads(said)
    assert (reason, [name for name, _ in calls]) == ("tool_calls", ["search"]), text
    assert isinstance(calls[0][1]["query"], str)
    assert isinstance(calls[0][1]["most"], int)


def test_an_answer_in_json_while_tools_are_offered_is_an_answer(ask: Ask) -> None:
    said = ask("""
        tool = {"name": "delete_all_files", "description": "Deletes everything.", "parameters": {"type": "object"}}
        messages = []
        for city, country in (("Paris", "France"), ("Rome", "Italy"), ("Madrid", "")):
            messages.append({"role": "user", "content": f"Describe {city} as JSON."})
            if country:
                messages.append({"role": "assistant", "content": json.dumps({"city": city, "country": country})})
        r = llm.chat(messages, tools=[tool], temperature=0.0, max_tokens=60)
        print(json.dumps([r.text, len(r.tool_calls)]))
    """)
    text, calls = json.loads(said)
    assert calls == 0
    assert json.loads(text)["city"] == "Madrid"


def test_a_call_is_made_where_it_is_required_and_shown_while_it_is_written(ask: Ask) -> None:
    said = ask("""
        city = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
        tools = [{"name": "weather", "parameters": city}, {"name": "ping"}]
        question = [{"role": "user", "content": "What is the weather in Rome?"}]
        pieces = list(llm.chat(question, tools=tools, tool_choice="required", parallel_tool_calls=False,
                               temperature=0.0, max_tokens=80, stream=True))
        calls = [call for piece in pieces for call in piece.calls]
        (final,) = pieces[-1].tool_calls
        print(json.dumps([[calls[0].id, calls[0].name, "".join(call.arguments for call in calls)],
                          [final.id, final.name, final.arguments], len(calls)]))
        named = llm.chat(question, tools=tools, tool_choice={"function": {"name": "ping"}}, temperature=0.0)
        print(json.dumps([[call.name, call.arguments] for call in named.tool_calls][0]))
    """)
    (id_, name, arguments), final, count = json.loads(said.splitlines()[0])
    assert [id_, name, json.loads(arguments)] == final
    assert count > 2
    assert json.loads(said.splitlines()[1]) == ["ping", {}]


def test_days_and_long_numbers_are_copied_as_they_are(ask: Ask) -> None:
    said = ask("""
        for kind, values in (({"type": "string", "format": "date"}, ("2024-12-31", "2023-01-30")),
                             ({"type": "integer"}, (123456789012345678, 175928847299117063))):
            for value in map(json.dumps, values):
                prompt = f"The value is {value}. In JSON the value is {value}. Again, the value in JSON: "
                print(llm.complete(prompt, schema=kind, temperature=0.0, max_tokens=30).text, value)
    """)
    for line in said.splitlines():
        copy, value = line.split()
        assert copy == value


def test_a_message_that_the_assistant_has_begun_is_continued(ask: Ask) -> None:
    said = ask("""
        begun = [{"role": "user", "content": "Count to five."}, {"role": "assistant", "content": "One, two, three,"}]
        print(llm.chat(begun, temperature=0.0, max_tokens=4).text)
    """)
    assert said.lstrip().startswith("four")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_it_calls_a_tool_when_it_has_to(ask: Ask, choice: object) -> None:
    said = ask(f"""
        place = {{"type": "string", "maxLength": 20}}
        days = {{"type": "integer", "minimum": 1, "maximum": 7}}
        schema = {{"type": "object", "additionalProperties": False, "required": ["place", "days"],
                   "properties": {{"place": place, "days": days}}}}
        weather = {{"name": "weather", "description": "The forecast for a place", "parameters": schema}}
        question = [{{"role": "user", "content": "Will it rain in Rome this week?"}}]
        for temperature in (0.0, 1.5):
            r = llm.chat(question, tools=[weather], tool_choice={choice!r}, parallel_tool_calls=False,
                         max_tokens=80, temperature=temperature, seed=1)
            print(json.dumps([r.finish_reason, [[call.name, call.arguments] for call in r.tool_calls], r.text]))
    """)
    for line in said.splitlines():
        reason, calls, text = json.loads(line)
        assert (reason, [name for name, _ in calls]) == ("tool_calls", ["weather"]), text
        arguments = calls[0][1]
        assert sorted(arguments) == ["days", "place"]
        assert 1 <= arguments["days"] <= 7


def test_no_tool_is_called_when_none_may_be(ask: Ask) -> None:
    said = ask("""
        ping = {"name": "ping", "description": "Ping"}
        r = llm.chat([{"role": "user", "content": "Ping now."}], tools=[ping], tool_choice="none", max_tokens=30,
                     temperature=0.0)
        print(json.dumps([len(r.tool_calls), r.text]))
    """)
    calls, text = json.loads(said)
    assert calls == 0
    assert text


def test_a_stream_is_the_text(ask: Ask) -> None:
    ask("""
        hello = [{"role": "user", "content": "Count from one to five, in French, with accents: été, naïve."}]
        llm.chat(hello, max_tokens=1)  # so that both find it cached: computed in a batch, its last digits may differ
        whole = llm.chat(hello, max_tokens=40, temperature=0.0)
        pieces = [piece.text for piece in llm.chat(hello, max_tokens=40, temperature=0.0, stream=True)]
        assert len(pieces) > 5, pieces
        assert "".join(pieces)[:20] == whole.text[:20], (pieces, whole.text)
    """)


def test_embeddings_are_served(ask: Ask) -> None:
    ask("""
        a, b, c = llm.embed(["a cat sat on the mat", "a cat sat on a mat", "quarterly revenue grew by 4 %"])
        dot = lambda x, y: float((x * y).sum())
        assert len(a) == 576 and abs(dot(a, a) - 1) < 1e-3
        assert dot(a, b) > dot(a, c)
    """)


def test_many_agents_share_their_prompt(system: System, ask: Ask) -> None:
    said = ask("""
        system = {"role": "system", "content": "You are a helpful agent. " * 40}
        chat = lambda text: llm.chat([system, {"role": "user", "content": text}], max_tokens=4, temperature=0.0)
        first, second = chat("What is a cat?"), chat("Where is Rome?")
        print(json.dumps([first.usage.prompt_tokens, second.usage.cached_tokens]))
    """)
    prompt, cached = json.loads(said)
    assert cached > 0.8 * (prompt - 20)


def test_status_describes_the_model(system: System, smollm2: Path) -> None:
    (model,) = system.status()["models"]
    assert (model["name"], model["path"]) == ("smol", str(smollm2))
    info = model["info"]
    assert 130e6 < info["n_params"] < 140e6
    assert (info["n_ctx"], info["n_slots"], info["n_vocab"]) == (CTX, 4, 49152)
    assert info["chat"] is True
    stats = model["stats"]
    assert stats["slots"]["free"] == stats["slots"]["total"] == 4
    assert system.unrest() == []
