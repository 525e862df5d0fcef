"""From messages to a prompt, by the chat template that the model carries; and the dialects of tool calls.

The template is Jinja text from the GGUF: rendered in a sandbox, as it may come from anywhere. What agents send
is brought into the form that templates expect (the one of Hugging Face): content is a string, tools are
{"type": "function", "function": {…}}, the arguments of past calls are objects.

A model without a template gets ChatML with tools in the Hermes dialect, and its info says so.

A `ToolDialect` says how a model's family writes tool calls: what begins one, the grammar that follows, and how
to read them back.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from aiosd.link import Key
from libaios.wire import ToolCall

Message = dict[str, Any]
Tool = dict[str, Any]

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
        kinds = {part.get("type", "text") for part in value} - {"text"}
        if kinds:
            raise refuse(f"{where}.content: parts of type {', '.join(map(str, kinds))} are not supported, only text")
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


def normal_messages(messages: list[Message]) -> list[Message]:
    if not messages:
        raise refuse("messages: the list is empty")
    normal = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message.get("role"), str):
            raise refuse(f"{where}.role must be a string such as 'user'")
        calls = message.get("tool_calls")
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


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


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
        self.takes_tools = re.search(r"\btools\b", self.source) is not None
        self.dialect = dialect_of(self.source) if self.takes_tools else None

    def render(self, messages: list[Message], tools: list[Tool] | None) -> str:
        if self._error:
            raise refuse(f"the model's chat template is broken: {self._error}")
        if tools and not self.takes_tools:
            raise refuse("tools: this model's chat template takes no tools")
        try:
            return self._template.render(
                messages=messages, tools=tools or None, add_generation_prompt=True, **self._tokens
            )
        except TemplateError as error:
            raise refuse(f"the model's chat template refuses the messages: {error}") from None
        except (TypeError, ValueError, KeyError, AttributeError, RecursionError, ArithmeticError) as error:
            raise refuse(f"the model's chat template cannot render the messages: {error}") from None


# ── dialects of tool calls ────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class ToolDialect:
    """How one family of models writes tool calls.

    A generation is free text until `trigger` is complete (or, with `at_start`, until its first visible
    character is '{'); from there on the grammar `rules` holds. In it `call` stands for one call of any tool.
    """

    name: str
    trigger: str
    at_start: bool
    arguments_key: str
    rules: str

    def read(self, text: str, key: Key) -> list[ToolCall]:
        """The calls in what follows the trigger; one that breaks off in the middle is none."""
        calls: list[ToolCall] = []
        decoder = json.JSONDecoder()
        at = text.find("{")
        while at >= 0:
            try:
                value, end = decoder.raw_decode(text, at)
                name, arguments = value["name"], value[self.arguments_key]
            except (ValueError, KeyError, TypeError):
                break
            calls.append(ToolCall(id=call_id(key, len(calls)), name=name, arguments=arguments))
            at = text.find("{", end)
        return calls


def call_id(key: Key, index: int) -> str:
    """Stable: the same call gets the same id after any restart."""
    return "call_" + hashlib.blake2s(f"{key[0]}:{key[1]}:{index}".encode(), digest_size=9).hexdigest()


HERMES = ToolDialect(
    "hermes",
    trigger="<tool_call>",
    at_start=False,
    arguments_key="arguments",
    rules='root ::= ws call ws "</tool_call>" (ws "<tool_call>" ws call ws "</tool_call>")*',
)
LLAMA3 = ToolDialect(
    "llama3",
    trigger="<|python_tag|>",
    at_start=True,
    arguments_key="parameters",
    rules='root ::= ws call (ws ";" ws call)*',
)
MISTRAL = ToolDialect(
    "mistral",
    trigger="[TOOL_CALLS]",
    at_start=False,
    arguments_key="arguments",
    rules='root ::= ws "[" ws call (ws "," ws call)* ws "]"',
)


def dialect_of(template: str) -> ToolDialect:
    """By what the template writes for past calls; Hermes, the most common, when nothing tells."""
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    if "<tool_call>" not in template and ("<|python_tag|>" in template or '"parameters": ' in template):
        return LLAMA3
    return HERMES


def call_rules(dialect: ToolDialect, tools: Iterable[Tool], convert: Callable[[str, dict[str, Any]], str]) -> str:
    """The rule `call`: any of the tools by name, with arguments by its schema. `convert` adds a schema's rules
    and returns the name of its first one."""
    alternatives = []
    for i, tool in enumerate(tools):
        function = tool["function"]
        try:
            arguments = convert(f"tool{i}", function["parameters"])
        except OSError as error:
            raise refuse(f"tools[{i}].parameters: {error.strerror}", error.errno or errno.EINVAL) from None
        name = json.dumps(json.dumps(function["name"]))
        key = f'"\\"{dialect.arguments_key}\\""'
        alternatives.append(f'"{{" ws "\\"name\\"" ":" ws {name} "," ws {key} ":" ws {arguments} ws "}}"')
    return "call ::= " + " | ".join(alternatives)
