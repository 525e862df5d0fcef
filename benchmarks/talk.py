"""Conversations in English for real models: a system prompt that describes tools, questions, and answers of tools.

The agents of a run share the system prompt. Its first line is new in each run, so that nothing is cached from the run
before. Each part is cut to a number of tokens of the model's own tokenizer. A model with a chat template gets messages,
another one continues a plain transcript. In both cases both sides get the same text, and tokenize it.
"""

from __future__ import annotations

import ctypes
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp

from aiosd.llm import llama
from benchmarks.harness import AGENT, HTTP

TOOLS: list[tuple[str, str, dict[str, str]]] = [
    ("read_file", "Read a text file of the project and return its lines with their numbers.",
     {"path": "the file, relative to the root of the project", "lines": "first and last line, such as 10-40"}),
    ("write_file", "Replace a file by new text. The old state can be had back with undo.",
     {"path": "the file", "text": "all of the new text", "reason": "one sentence for the log"}),
    ("search_code", "Search all source files for a regular expression and return the places where it matches.",
     {"pattern": "a regular expression", "folder": "where to look", "most": "how many places to return at most"}),
    ("run_tests", "Run the tests whose names contain a word, and return the failures with the last lines of output.",
     {"word": "part of the names", "timeout": "seconds after which to give up"}),
    ("web_search", "Search the web and return titles, addresses and the first sentences of the pages found.",
     {"query": "a few words", "language": "a code such as en or de", "most": "how many pages"}),
    ("fetch_page", "Fetch a web page and return its text without menus and advertisements.",
     {"url": "the full address", "most": "how many characters to return"}),
    ("query_database", "Run a read-only SQL query against the sales database and return the rows as JSON.",
     {"sql": "a single SELECT statement", "limit": "how many rows at most"}),
    ("send_mail", "Send an electronic mail to one of the known contacts after a person has agreed to it.",
     {"to": "the name of a contact", "subject": "one line", "text": "the message, without a signature"}),
    ("calendar_list", "List the appointments between two dates, with place, people and notes.",
     {"start": "a date such as 2026-03-01", "end": "a date", "person": "whose calendar"}),
    ("calendar_add", "Enter an appointment into the calendar; conflicts are returned, not resolved.",
     {"title": "what it is about", "start": "date and time", "minutes": "how long", "people": "who takes part"}),
    ("remember", "Keep a note that later conversations can find, by words and by meaning.",
     {"text": "the note, one fact in one sentence", "tags": "a few words that say what it belongs to"}),
    ("recall", "Find the notes that are nearest to a question, the most useful one first.",
     {"query": "what is asked", "most": "how many notes"}),
    ("calculate", "Evaluate an arithmetic expression exactly, with units where they are given.",
     {"expression": "such as (3 + 4) * 12 or 5 km / 20 min"}),
    ("weather", "The forecast for a place: temperature, rain and wind for each of the next days.",
     {"place": "a town", "days": "from 1 to 7"}),
    ("translate", "Translate a text and keep its format, its numbers and the names in it.",
     {"text": "what to translate", "target": "a language", "formal": "true for a formal tone"}),
    ("plot", "Draw a diagram from rows of numbers and return the name of the picture.",
     {"rows": "a list of lists of numbers", "kind": "line, bar or scatter", "title": "above the picture"}),
    ("list_issues", "List the open issues of a repository, the newest first, with labels and authors.",
     {"repository": "owner and name", "label": "only those that have it", "most": "how many"}),
    ("comment_issue", "Write a comment on an issue after a person has agreed to it.",
     {"repository": "owner and name", "number": "of the issue", "text": "in Markdown"}),
    ("convert_money", "Convert an amount between currencies at the rate of a day.",
     {"amount": "a number", "source": "a code such as EUR", "target": "a code", "day": "a date, today if left out"}),
    ("book_room", "Reserve a meeting room; returns the room's name or the next time when one is free.",
     {"start": "date and time", "minutes": "how long", "seats": "how many people"}),
]  # fmt: skip

RULES = (
    "You are a careful assistant of a small company. You may use the tools that are described below, one at a time. "
    "Think about what is asked, choose the tool that brings you nearer to the answer, wait for what it returns, and "
    "then go on or answer. Never make up what a tool has returned. When a tool fails, say so and try another way."
)
QUESTIONS = (
    "The tests of {name} fail since {day}. Find out which change of {person} it was, what it was meant to do, and how "
    "to mend it without losing that. Keep your answer to {number} sentences and name the files.",
    "{person} wants to know how many orders from {place} were paid on {day} but never sent. Give the number, the sum "
    "in euros and the {number} largest of them, and say how sure you are that the list is complete.",
    "Plan a meeting of {person} and {other} in {place} for {number} people in the week after {day}. It should last an "
    "hour, nobody should have to travel in the rain, and the room must have a screen. Propose two dates.",
    "Read what the notes say about {name}, compare it with what {other} wrote on {day}, and tell me in plain words "
    "where they contradict each other. List at most {number} points, the most serious one first.",
)
ANSWERS = (
    '{{"status": "ok", "rows": [["{place}", {number}, "{day}"], ["{other}", {more}]], "next": "{name}-{more}"}}',
    "src/{name}/{other}.py:{more}: def settle(self, {person}): # {place}, changed on {day} by {person}, {number} lines",
    "Found {number} notes. 1: {person} prefers {place} on {day}. 2: {name} is {more} days late, says {other}.",
    "error: {name} did not answer within {number} seconds (tried {more} times); last seen on {day} in {place}",
)
WORDS = {
    "name": ["atlas", "harbour", "quill", "meridian", "copper", "lantern", "juniper", "sable", "orchard", "tundra"],
    "person": ["Anna Lind", "Bo Okafor", "Carla Reyes", "Dmitri Vale", "Eun-ji Park", "Farid Haddad", "Greta Holm"],
    "other": ["ledger", "router", "invoice", "scheduler", "gateway", "parser", "storage", "billing", "mailer"],
    "place": ["Lisbon", "Oslo", "Krakow", "Nairobi", "Osaka", "Quito", "Tallinn", "Utrecht", "Valencia", "Zagreb"],
}

_TURNS = """
def turns(order):
    messages, made = order["messages"], 0
    for tool in order["tools"]:
        text, count = ask(messages, order)
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": tool}]
        made += count
    return {"tokens": made}
serve(turns)
"""

_TRANSCRIPT = """
def transcript(messages):
    names = {"system": "", "user": "User: ", "assistant": "Assistant: "}
    return "\\n\\n".join(names[m["role"]] + m["content"] for m in messages) + "\\n\\nAssistant:"
"""

_OURS = """
def options(order):
    return dict(max_tokens=order["generate"], temperature=order["temperature"], seed=order["seed"], ignore_eos=True)
"""

OURS_CHAT = (
    AGENT
    + _OURS
    + """
def ask(messages, order):
    r = aios.llm.chat(messages, **options(order))
    return r.text, r.usage.completion_tokens
"""
    + _TURNS
)
OURS_TEXT = (
    AGENT
    + _OURS
    + _TRANSCRIPT
    + """
def ask(messages, order):
    r = aios.llm.complete(transcript(messages), **options(order))
    return r.text, r.usage.completion_tokens
"""
    + _TURNS
)

_THEIRS = """
def options(order):
    return {"temperature": order["temperature"], "seed": order["seed"], "top_k": 40, "top_p": 0.95, "min_p": 0.05,
            "ignore_eos": True, "cache_prompt": True, "id_slot": me}
"""

THEIRS_CHAT = (
    HTTP
    + _THEIRS
    + """
def ask(messages, order):
    r = post("/v1/chat/completions", {"messages": messages, "max_tokens": order["generate"], **options(order)})
    return r["choices"][0]["message"]["content"], r["usage"]["completion_tokens"]
"""
    + _TURNS
)
THEIRS_TEXT = (
    HTTP
    + _THEIRS
    + _TRANSCRIPT
    + """
def ask(messages, order):
    r = post("/completion", {"prompt": transcript(messages), "n_predict": order["generate"], **options(order)})
    return r["content"], r["tokens_predicted"]
"""
    + _TURNS
)


@dataclass(frozen=True)
class Sizes:
    """Sizes of the parts in tokens, and the number of turns."""

    private: int
    turns: int
    generate: int
    tool: int


class Text:
    """A model's tokenizer, and texts with a given number of its tokens."""

    def __init__(self, model: Path) -> None:
        llama.start()
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        self._model = llama_cpp.llama_model_load_from_file(str(model).encode(), params)
        if not self._model:
            sys.exit(f"{model}: llama.cpp cannot read it")
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.chat = bool(llama_cpp.llama_model_chat_template(self._model, None))

    def count(self, text: str) -> int:
        return len(self._tokens(text))

    def cut(self, text: str, tokens: int) -> str:
        """The beginning of a text with `count` tokens; a text that is too short is repeated."""
        have = self._tokens(text)
        while len(have) < tokens:
            text += "\n" + text
            have = self._tokens(text)
        buffer = ctypes.create_string_buffer(16 * tokens + 256)
        size = llama_cpp.llama_detokenize(self._vocab, have, tokens, buffer, len(buffer), False, True)
        return buffer.raw[:size].decode(errors="ignore")

    def _tokens(self, text: str) -> Any:
        data = text.encode()
        found = (llama_cpp.llama_token * (len(data) + 8))()
        size = llama_cpp.llama_tokenize(self._vocab, data, len(data), found, len(found), False, False)
        return (llama_cpp.llama_token * size)(*found[:size])

    def close(self) -> None:
        llama_cpp.llama_model_free(self._model)


def system_prompt(text: Text, tokens: int, run: random.Random) -> str:
    head = f"Session {run.getrandbits(64):016x} of {run.choice(WORDS['place'])}.\n{RULES}\n\n"
    described = "\n".join(_tool(*tool) for tool in TOOLS)
    return text.cut(head + described, tokens)


def _tool(name: str, description: str, parameters: dict[str, str]) -> str:
    properties = {key: {"type": "string", "description": what} for key, what in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)[:1]}
    return json.dumps({"name": name, "description": description, "parameters": schema})


def _filled(templates: tuple[str, ...], rng: random.Random) -> str:
    words: dict[str, Any] = {key: rng.choice(some) for key, some in WORDS.items()}
    day = f"2026-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    return rng.choice(templates).format(**words, day=day, number=rng.randint(2, 9), more=rng.randint(10, 9999))


def workload(text: Text, n: int, prefix: int, seed: int, temperature: float, sizes: Sizes) -> list[dict[str, Any]]:
    """The order of each agent. `prefix` 0: without a system prompt."""
    run = random.Random(seed)
    shared = [{"role": "system", "content": system_prompt(text, prefix, run)}] if prefix else []

    def one(number: int) -> dict[str, Any]:
        rng = random.Random(f"{seed} {number}")
        question = text.cut(f"Task {rng.getrandbits(32)}: {_filled(QUESTIONS, rng)}", sizes.private)
        answers = [text.cut("Result: " + _filled(ANSWERS, rng), sizes.tool) for _ in range(sizes.turns)]
        messages = [*shared, {"role": "user", "content": question}]
        about = {"generate": sizes.generate, "temperature": temperature, "seed": rng.getrandbits(31)}
        return {"messages": messages, "tools": answers, **about}

    return [one(number) for number in range(n)]
