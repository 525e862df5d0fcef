"""From messages to a prompt, by the chat template that the model carries.

The template is Jinja text from the GGUF: rendered in a sandbox, as it may come from anywhere. What agents send
is brought into the form that templates expect (the one of Hugging Face): content is a string, tools are
{"type": "function", "function": {…}}, the arguments of past calls are objects.

Templates differ in what they can do, and most say it only by failing. So every template is tried once, on a few
short conversations (`Abilities`), and what it cannot do is done for it (`_fitted`):

- no system role (Gemma, Mistral 7B): what the system says goes before the first user message;
- no tools (Gemma, Mistral v0.1), or calls written in a way that no grammar here knows: the tools are described in the
  system message, calls and results are written out as text, in the `fenced` dialect;
- one call per message (Llama 3.1): several become several messages, each followed by its result;
- ids of nine characters (Mistral): other ids are replaced, the same by the same.

What is left is the template's own refusal (roles that must alternate, …): EINVAL with its sentence.

A model without a template gets ChatML with tools in the Hermes dialect, and its info says so.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from aiosd.llm.dialects import FENCED, Tool, ToolDialect, dialect_of, nine_characters

Message = dict[str, Any]

DEFAULT_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- '# Tools\\n\\nYou may call one or more functions. Their signatures:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\\n</tools>\\n\\nFor each call write a JSON object with its name and arguments:\\n' }}
    {{- '<tool_call>\\n{"name": <function>, "arguments": <object>}\\n</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if not (loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n' + ({'name': call.function.name, 'arguments': call.function.arguments} | tojson) }}
            {{- '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def refuse(sentence: str, code: int = errno.EINVAL) -> OSError:
    """What the caller gets for an argument that cannot be served."""
    return OSError(code, sentence)


# ── messages and tools as templates expect them ───────────────────────────────────────────────────────────


def _content(value: Any, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        kinds = {str(part.get("type", "text")) for part in value} - {"text"}
        if kinds:
            raise refuse(f"{where}.content: parts of type {', '.join(sorted(kinds))} are not supported, only text")
        return "".join(str(part.get("text", "")) for part in value)
    raise refuse(f"{where}.content must be a string")


def _call(value: Any, where: str) -> dict[str, Any]:
    """One past tool call, in any of the forms {"name", "arguments"} and {"function": {…}}."""
    if not isinstance(value, dict):
        raise refuse(f"{where} must be an object with name and arguments")
    function = value.get("function", value)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise refuse(f"{where} has no name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise refuse(f"{where}.arguments is neither an object nor JSON") from None
    if not isinstance(arguments, dict):
        raise refuse(f"{where}.arguments must be an object")
    call = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": value["id"], **call} if "id" in value else call


#: What templates know; "ipython" is Llama's word for "tool".
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")


def normal_messages(messages: list[Message]) -> list[Message]:
    if not messages:
        raise refuse("messages: the list is empty")
    normal = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        role = message.get("role")
        if role not in ROLES:
            raise refuse(f"{where}.role must be one of {', '.join(ROLES)}, not {role!r}"[:200])
        calls = message.get("tool_calls")
        if message.get("content") is None and not calls:
            raise refuse(f"{where} has no content")
        new = {**message, "content": _content(message.get("content"), where)}
        if calls:
            if not isinstance(calls, list):
                raise refuse(f"{where}.tool_calls must be a list")
            new["tool_calls"] = [_call(call, f"{where}.tool_calls[{j}]") for j, call in enumerate(calls)]
        else:
            new.pop("tool_calls", None)
        normal.append(new)
    return normal


_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}\Z")


def normal_tools(tools: list[Tool] | None) -> list[Tool]:
    normal: list[Tool] = []
    for i, tool in enumerate(tools or []):
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise refuse(f"tools[{i}] has no name")
        if not _NAME.match(function["name"]):
            raise refuse(f"tools[{i}]: name must be 1 to 64 letters, digits, '_', '-' or '.'")
        parameters = function.get("parameters") or {"type": "object", "properties": {}}
        if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
            raise refuse(f"tools[{i}].parameters must be a JSON Schema of type object")
        normal.append({"type": "function", "function": {"description": "", **function, "parameters": parameters}})
    names = [tool["function"]["name"] for tool in normal]
    if len(set(names)) < len(names):
        raise refuse("tools: two tools have the same name")
    return normal


# ── templates ─────────────────────────────────────────────────────────────────────────────────────────────


def _raise(sentence: str) -> None:
    raise TemplateError(sentence)


def _tojson(value: Any, indent: int | None = None, **_: Any) -> str:
    """Jinja's own filter escapes <, > and ' for HTML, which no model has seen in training."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks for trainers what a model wrote. Here: what stands between."""

    tags = {"generation"}  # noqa: RUF012 (Jinja wants a plain attribute)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a template can do. The defaults are those of one that was not tried."""

    system: bool = True  # takes a system message
    tools: bool = False  # lists tools, calls and their results
    dialect: ToolDialect = FENCED
    several: bool = True  # several calls in one message
    objects: bool = True  # takes arguments as an object; else as JSON text
    no_tools: list[Tool] | None = None  # what it takes for a conversation without tools


class ChatTemplate:
    """A model's template, compiled once. A template that does not compile is only known to be bad when a chat
    needs it: completions work without."""

    def __init__(self, source: str | None, bos: str, eos: str) -> None:
        self.given = source is not None
        self.source = source if source is not None else DEFAULT_TEMPLATE
        self._tokens = {"bos_token": bos, "eos_token": eos}
        self._error = ""
        try:
            self._template = _environment().from_string(self.source)
        except TemplateError as error:
            self._error = str(error)
        self.can = Abilities() if self._error else _tried(self)
        self.thinks = THINK[0] in self.source
        self._nine = "[TOOL_CALLS]" in self.source

    @property
    def takes_tools(self) -> bool:
        """Does the template list tools itself? If not, they are described in the system message."""
        return self.can.tools

    @property
    def dialect(self) -> ToolDialect:
        return self.can.dialect

    def render(self, messages: list[Message], tools: list[Tool] | None, *, thinking: bool = True) -> str:
        """The prompt. Raises OSError (EINVAL) with a sentence where the template refuses. `thinking` False: where
        the template knows how, the model is told to answer at once."""
        if self._error:
            raise refuse(f"the model's chat template is broken: {self._error}")
        fitted = _fitted(messages, tools or [], self.can, self._nine)
        text = self.raw(fitted, (tools if self.can.tools else None) or self.can.no_tools, thinking=thinking)
        if not thinking and text.rstrip().endswith(THINK[0]):
            text += f"\n{THINK[1]}\n\n"
        return text

    def raw(self, messages: list[Message], tools: list[Tool] | None, *, thinking: bool = True) -> str:
        """What the template itself makes of these messages."""
        settings = {} if thinking else {"enable_thinking": False}
        try:
            return self._template.render(
                messages=messages, tools=tools, add_generation_prompt=True, **settings, **self._tokens
            )
        except TemplateError as error:
            raise refuse(f"the model's chat template refuses the messages: {error}") from None
        except (
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            RecursionError,
            ArithmeticError,
            MemoryError,
        ) as error:
            raise refuse(f"the model's chat template cannot render the messages: {error}") from None


#: What a thinking model writes around its thoughts.
THINK = ("<think>", "</think>")


# ── what a template can do ────────────────────────────────────────────────────────────────────────────────

_SYSTEM = {"role": "system", "content": "probe-system"}
_USER = {"role": "user", "content": "probe-user"}
_ANSWER = {"role": "assistant", "content": "probe-answer"}
_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "probe-description",
        "parameters": {"type": "object", "properties": {"probe": {"type": "string", "description": "probe"}}},
    },
}


def _tried(template: ChatTemplate) -> Abilities:
    def attempt(messages: list[Message], tools: list[Tool] | None, refused: str = "") -> str:
        try:
            return template.raw(messages, tools)
        except OSError:
            return refused

    none: list[Tool] | None = None if "probe-user" in attempt([_USER], None) else []
    if "probe-user" not in attempt([_USER], none):
        return Abilities()
    # One that loses the system message somewhere without a word (Mistral v0.3 after a tool's result) does not take it.
    longer: tuple[list[Message], ...] = ([], [_USER, _ANSWER, _USER], [_USER, *_exchange(1, True)])
    system = "probe-system" in attempt([_SYSTEM, _USER], none) and all(
        "probe-system" in attempt([_SYSTEM, *rest], [_TOOL] if rest else none, "probe-system") for rest in longer
    )
    opening = attempt([_USER], [_TOOL])
    if "probe_tool" not in opening:
        return Abilities(system, no_tools=none)
    for objects in (True, False):
        text = attempt([_USER, *_exchange(1, objects)], [_TOOL])
        dialect = dialect_of(text, "probe_call_0", opening)
        if dialect is not None and "probe-result-0" in text:
            several = "probe_call_1" in attempt([_USER, *_exchange(2, objects)], [_TOOL])
            return Abilities(system, True, dialect, several, objects, none)
    return Abilities(system, no_tools=none)


def _exchange(count: int, objects: bool) -> list[Message]:
    """So many calls in one message, and their results."""
    arguments: Any = {"probe": "x"} if objects else '{"probe": "x"}'
    ids = [f"00000000{i}" for i in range(count)]
    names = [f"probe_call_{i}" for i in range(count)]
    calls = [
        {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}
        for id_, name in zip(ids, names, strict=True)
    ]
    results = [
        {"role": "tool", "tool_call_id": id_, "name": name, "content": f"probe-result-{i}"}
        for i, (id_, name) in enumerate(zip(ids, names, strict=True))
    ]
    return [{"role": "assistant", "content": "", "tool_calls": calls}, *results]


# ── and what it cannot, done for it ───────────────────────────────────────────────────────────────────────


def _fitted(messages: list[Message], tools: list[Tool], can: Abilities, nine: bool) -> list[Message]:
    """The same conversation in a form that the template takes."""
    messages = _identified(messages, nine)
    if not can.tools:
        messages = _described(messages, tools)
    elif not can.several:
        messages = list(_one_by_one(messages))
    if not can.objects:
        messages = [_with_calls(message, _as_text) for message in messages]
    if not can.system:
        messages = _without_system(messages)
    return messages


def _with_calls(message: Message, change: Any) -> Message:
    if not message.get("tool_calls"):
        return message
    return {**message, "tool_calls": [change(call) for call in message["tool_calls"]]}


def _as_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": _tojson(function["arguments"])}}


def _identified(messages: list[Message], nine: bool) -> list[Message]:
    """Every call has an id, and every result says whose it is: by its `tool_call_id`, else in the order of calls."""
    out: list[Message] = []
    open_: dict[str, str] = {}  # calls without a result so far: id → name
    for i, message in enumerate(messages):
        calls = []
        for j, call in enumerate(message.get("tool_calls") or []):
            id_ = str(call.get("id") or f"call_{i}_{j}")
            id_ = nine_characters(id_) if nine else id_
            open_[id_] = call["function"]["name"]
            calls.append({**call, "id": id_})
        if calls:
            message = {**message, "tool_calls": calls}
        if message["role"] == "tool":
            given = message.get("tool_call_id")
            id_ = nine_characters(str(given)) if given and nine else str(given or next(iter(open_), f"call_{i}_0"))
            if not given and nine:
                id_ = nine_characters(id_)
            named = {"name": open_[id_]} if id_ in open_ and not message.get("name") else {}
            open_.pop(id_, None)
            message = {**message, **named, "tool_call_id": id_}
        out.append(message)
    return out


def _one_by_one(messages: list[Message]) -> Iterator[Message]:
    """Several calls of one message as messages of their own, each followed by its results."""
    at = 0
    while at < len(messages):
        message = messages[at]
        at += 1
        calls = message.get("tool_calls") or []
        if len(calls) < 2:
            yield message
            continue
        stop = next((i for i in range(at, len(messages)) if messages[i]["role"] != "tool"), len(messages))
        results = messages[at:stop]
        known = {call["id"] for call in calls}
        for i, call in enumerate(calls):
            yield {**message, "content": "" if i else message["content"], "tool_calls": [call]}
            yield from (result for result in results if result["tool_call_id"] == call["id"])
        yield from (result for result in results if result["tool_call_id"] not in known)
        at = stop


_CALL = '```tool_call\n{"name": %s, "parameters": %s}\n```'
_HOW = (
    "You can call functions. To call one, write a block such as\n"
    + _CALL % ("<its name>", "<an object of arguments>")
    + "\nand nothing after it; for several calls, several blocks. You are given the results then. Without a need for a "
    "function, answer plainly. The functions, with the JSON Schema of their parameters:"
)


def _described(messages: list[Message], tools: list[Tool]) -> list[Message]:
    """Tools in the system message; calls and results as text."""
    out: list[Message] = []
    ours = False  # is the last of `out` a user message made of results? What the user says next belongs to it
    for message in messages:
        if message.get("tool_calls"):
            parts = [message["content"]] if message["content"] else []
            parts += [_call_as_text(call["function"]) for call in message["tool_calls"]]
            message = {**message, "content": "\n".join(parts)}
            del message["tool_calls"]
        elif message["role"] == "tool":
            head = f"Result of {message['name']}:" if message.get("name") else "Result:"
            message = {"role": "user", "content": f"{head}\n{message['content']}"}
            if ours:
                message["content"] = f"{out.pop()['content']}\n\n{message['content']}"
            out.append(message)
            ours = True
            continue
        elif ours and message["role"] == "user":
            message = {**message, "content": f"{out.pop()['content']}\n\n{message['content']}"}
        ours = False
        out.append(message)
    if not tools:
        return out
    how = "\n".join([_HOW, *(_tojson(tool["function"]) for tool in tools)])
    if out[0]["role"] == "system":
        return [{**out[0], "content": f"{out[0]['content']}\n\n{how}"}, *out[1:]]
    return [{"role": "system", "content": how}, *out]


def _call_as_text(function: dict[str, Any]) -> str:
    return _CALL % (_tojson(function["name"]), _tojson(function["arguments"]))


def _without_system(messages: list[Message]) -> list[Message]:
    """What the system says at the beginning goes before what the user says first."""
    if messages[0]["role"] != "system":
        return messages
    said, rest = messages[0]["content"], messages[1:]
    if rest and rest[0]["role"] == "user":
        return [{**rest[0], "content": f"{said}\n\n{rest[0]['content']}"}, *rest[1:]]
    return [{"role": "user", "content": said}, *rest]
