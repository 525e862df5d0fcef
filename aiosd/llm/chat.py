"""From messages to a prompt, by the chat template in the model's file.

The template is Jinja text from the GGUF. It is rendered in a sandbox, and its work is counted, because the file may
come from an untrusted source. The messages of agents are converted to the form that templates expect (that of Hugging
Face): content is a string, tools are {"type": "function", "function": {…}}, the arguments of past calls are objects.

Templates differ in what they can do. Most show a missing ability only by failing, or by dropping what they do not know.
So every template is tried once, on a few short conversations (`Abilities`), and `_fitted` makes up for what it lacks:

- an unknown role: developer becomes system, function and ipython become tool;
- no system role (Gemma, Mistral 7B), or only at the beginning: the text of a system message is put at the beginning of
  the next user message;
- two messages of one role in a row, where roles must alternate: they become one message;
- no tools (Gemma, Mistral v0.1), or calls in a form that no grammar here knows: the tools are described in the system
  message, calls and results are written as text, in the `fenced` dialect;
- only one call per message (Llama 3.1): several calls become several messages, each followed by its result;
- ids of nine characters (Mistral): other ids are replaced, equal ids by equal ones.

If a conversation ends with an assistant message, that message is continued: the prompt ends with its text. What the
template still refuses is EINVAL with the template's own sentence.

A model without a template is a base model. If its vocabulary has the marks of ChatML, ChatML is used; else each turn
ends with the model's end token, the one mark that such a model knows, and that no message can forge.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.environment import Template
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from aiosd.errors import refuse
from aiosd.llm.dialects import FENCED, ToolDialect, ToolDict, dialect_of, nine_characters
from aiosd.llm.document import Later
from aiosd.llm.text import HIDDEN, REASONING, TEXT

ChatMessage = dict[str, Any]

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

#: For models whose only mark is their end token.
PLAIN_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- {'system': 'System', 'user': 'User', 'assistant': 'Assistant'}[message.role] + ': ' + message.content }}
    {{- eos_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'Assistant:' }}{%- endif %}
"""
#: Where such a model continues with another role, its turn is over.
PLAIN_STOPS = ("\nUser:", "\nSystem:", "\nAssistant:")


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
    arguments = function.get("arguments")
    if arguments is None or arguments == "":
        arguments = {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise refuse(f"{where}.arguments is neither an object nor JSON") from None
    if not isinstance(arguments, dict):
        raise refuse(f"{where}.arguments must be an object")
    call = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": value["id"], **call} if "id" in value else call


#: The roles that templates know; "ipython" is Llama's word for "tool".
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")


def normal_messages(messages: list[ChatMessage]) -> list[ChatMessage]:
    if not messages:
        raise refuse("messages: the list is empty")
    normal = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        role = message.get("role")
        if role not in ROLES:
            raise refuse(f"{where}.role must be one of {', '.join(ROLES)}, not {role!r}"[:200])
        calls = message.get("tool_calls")
        if message.get("content") is None and not calls and role not in ("tool", "function", "ipython"):
            raise refuse(f"{where} has no content")
        new = {**message, "content": _content(message.get("content"), where)}
        thoughts = new.pop("reasoning", None)
        if isinstance(thoughts, str) and thoughts:  # under the names that templates look for
            new |= {"reasoning_content": thoughts, "thinking": thoughts}
        if calls:
            if not isinstance(calls, list):
                raise refuse(f"{where}.tool_calls must be a list")
            new["tool_calls"] = [_call(call, f"{where}.tool_calls[{j}]") for j, call in enumerate(calls)]
        else:
            new.pop("tool_calls", None)
        normal.append(new)
    return normal


_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}\Z")


def normal_tools(tools: list[ToolDict] | None) -> list[ToolDict]:
    normal: list[ToolDict] = []
    for i, tool in enumerate(tools or []):
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise refuse(f"tools[{i}] has no name")
        if not _NAME.match(function["name"]):
            raise refuse(f"tools[{i}].name must be 1 to 64 letters, digits, '_', '-' or '.'")
        given = next(
            (function[key] for key in ("parameters", "inputSchema", "input_schema") if function.get(key)), None
        )
        parameters = given or {"type": "object", "properties": {}}
        if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
            raise refuse(f"tools[{i}].parameters must be a JSON Schema of type object")
        known = {key: value for key, value in function.items() if key not in _NOT_SHOWN}
        normal.append({"type": "function", "function": {"description": "", **known, "parameters": parameters}})
    names = [tool["function"]["name"] for tool in normal]
    if len(set(names)) < len(names):
        raise refuse("tools: two tools have the same name")
    return normal


#: Of a tool's function: not for the model.
_NOT_SHOWN = ("inputSchema", "input_schema", "type", "strict")


def loose_tools(tools: list[ToolDict] | None) -> frozenset[str]:
    """The names of tools with `"strict": false`: whatever makes their calls checks the arguments."""
    functions = [tool.get("function", tool) for tool in tools or []]
    return frozenset(str(function["name"]) for function in functions if function.get("strict") is False)


# ── templates ─────────────────────────────────────────────────────────────────────────────────────────────


def _raise(sentence: str) -> None:
    raise TemplateError(sentence)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes <, > and ' for HTML, which no model has seen in training."""
    between = (separators[0], separators[1]) if separators else None
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=between, sort_keys=sort_keys)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks text of the model for training; here it has no effect."""

    tags = {"generation"}  # noqa: RUF012 (Jinja wants a plain attribute)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


MAX_STEPS = 2_000_000  # function calls, attribute look-ups and turns of loops
QUICK_STEPS, QUICK_SECONDS = 20_000, 0.1  # … that may run between two decode steps, and their time
MAX_ITEMS = 1_000_000  # of all ranges and of all multiplied sequences together
MAX_PROMPT = 1 << 26  # characters
MAX_SECONDS = 20.0


_TURNS = "turns of a loop"  # no template can name a filter like this


class _Turns:
    """The items of a loop; each takes a step of the sandbox."""

    def __init__(self, items: Iterable[Any], step: Callable[[], None]) -> None:
        self._items, self._step = items, step

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            self._step()
            yield item

    def __len__(self) -> int:
        return len(self._items)  # type: ignore[arg-type]  # TypeError if there is no length, which Jinja expects


class _Generator(CodeGenerator):
    """Lets the sandbox check `~` (concatenation) as well."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.together((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Sandbox(ImmutableSandboxedEnvironment):
    """Counts the work of a template: an untrusted one must not block the core."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    code_generator_class = _Generator

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.globals["range"] = self._range
        self.globals.pop("lipsum", None)
        self.filters[_TURNS] = lambda items: _Turns(items, self._step)
        for name in ("replace", "join"):
            self.filters[name] = self._measured(self.filters[name], name)
        self._steps = self._items = 0
        self._until = 0.0
        self._most_steps = MAX_STEPS
        self._quick = False

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Make every turn of a loop take a step, whatever its items and its body are."""
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, _TURNS, [], [], None, None, lineno=loop.lineno)
        return tree

    def begin(self, quick: bool) -> None:
        self._steps = self._items = 0
        self._quick, self._most_steps = quick, QUICK_STEPS if quick else MAX_STEPS
        self._until = time.monotonic() + (QUICK_SECONDS if quick else MAX_SECONDS)

    def _step(self) -> None:
        self._steps += 1
        if self._steps > self._most_steps or (self._steps % 16 == 0 and time.monotonic() > self._until):
            raise Later if self._quick else TemplateError("it takes too long")

    def _take(self, items: int) -> None:
        self._items += items
        if self._items > MAX_ITEMS:
            raise TemplateError("it makes too much")

    def together(self, values: tuple[Any, ...]) -> str:
        """The result of `~`."""
        texts = [str(value) for value in values]
        self._room(sum(map(len, texts)))
        return "".join(texts)

    def _room(self, size: int) -> None:
        self._step()
        if size > MAX_PROMPT // 4:
            raise TemplateError("it makes too long a text")

    def _longest(self, name: str, text: str, args: tuple[Any, ...]) -> int:
        """An upper limit for the length of the result of a method of `text`."""
        if name == "replace" and len(args) >= 2:
            return len(text) + (text.count(str(args[0])) if args[0] else len(text) + 1) * len(str(args[1]))
        if name == "join" and args and isinstance(args[0], list | tuple):
            return sum(len(str(item)) + len(text) for item in args[0])
        return max((arg for arg in args if isinstance(arg, int)), default=0)

    def _measured(self, filter_: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The filter `replace` or `join`, which refuses results that are too long."""

        @functools.wraps(filter_)
        def measured(eval_ctx: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            given = (*args, *kwargs.values())
            if name == "join" and isinstance(value, list | tuple):
                self._room(sum(len(str(item)) + len(str(given[0] if given else "")) for item in value))
            elif name == "replace":
                self._room(self._longest(name, str(value), given))
            return filter_(eval_ctx, value, *args, **kwargs)

        return measured

    def _range(self, *bounds: int) -> range:
        made = range(*bounds)
        self._take(len(made))
        return made

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self._step()
        text = getattr(__obj, "__self__", None)
        if isinstance(text, str):
            __self._room(__self._longest(__obj.__name__, text, args))
        return super().call(__context, __obj, *args, **kwargs)

    def getattr(self, obj: Any, attribute: str) -> Any:
        self._step()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self._step()
        return super().getitem(obj, argument)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self._step()
        for a, b in ((left, right), (right, left)):
            if operator == "*" and isinstance(a, str | list | tuple) and isinstance(b, int):
                self._take(max(b, 0) * len(a))
        if operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            self._room(len(left) + len(right))
        if operator == "**" and (abs(right) > 64 or abs(left) > 1 << 64):
            raise TemplateError("a number that is too large")
        if operator == "%" and isinstance(left, str) and re.search(r"%[^a-zA-Z%]*(\d{4}|\*)", left):
            raise TemplateError("a text that is too wide")
        return super().call_binop(context, operator, left, right)


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a template can do. The defaults are for a template that was not tried."""

    system: bool = True  # takes a system message
    later: bool = True  # … also in the middle of a conversation
    repeats: frozenset[str] = frozenset({"user", "assistant"})  # takes several messages in a row of these roles
    roles: frozenset[str] = frozenset()  # which of the less common roles it knows
    tools: bool = False  # lists tools, calls and their results
    dialect: ToolDialect = FENCED
    several: bool = True  # several calls in one message
    objects: bool = True  # takes arguments as an object; else as JSON text
    no_tools: list[ToolDict] | None = None  # the value of `tools` that means a conversation without tools


#: Names that a caller's `template_args` must not have: the prompt itself is made of these.
_OURS = {"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"}


class ChatTemplate:
    """A model's template, compiled once. A template that does not compile is an error only when a chat needs
    it, because completions work without; `broken` is the reason, in one line.

    `controls`: the control tokens of the vocabulary, for a model without a template. `for_tools`: the second
    template that some models carry, for conversations with tools.
    """

    def __init__(
        self,
        source: str | None,
        bos: str,
        eos: str,
        controls: Iterable[str] = ("<|im_start|>", "<|im_end|>"),
        for_tools: str | None = None,
    ) -> None:
        self.given = source is not None
        self.plain = source is None and not {"<|im_start|>", "<|im_end|>"} <= set(controls)
        self.source = source if source is not None else PLAIN_TEMPLATE if self.plain else DEFAULT_TEMPLATE
        self._tokens = {"bos_token": bos, "eos_token": eos}
        self._environment = _Sandbox()
        self.broken, self.broken_line = "", 0
        self.quick = False  # raise `Later` instead of working for long
        self._template: Template | None = None
        try:
            self._template = self._environment.from_string(self.source)
        except Exception as error:  # compiled templates fail with more errors than Jinja documents
            self.broken = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self.broken_line = getattr(error, "lineno", None) or 1
        self.can = Abilities() if self.broken else _tried(self)
        self.marks = marks_of(self.source)
        self._nine = "[TOOL_CALLS]" in self.source
        self._for_tools = ChatTemplate(for_tools, bos, eos) if for_tools else None

    def suited(self, tools: list[ToolDict]) -> ChatTemplate:
        """The template for a conversation with these tools."""
        return self._for_tools if tools and self._for_tools is not None and not self._for_tools.broken else self

    @property
    def thinks(self) -> bool:
        return self.marks.think is not None or bool(self.marks.switches)

    @property
    def takes_tools(self) -> bool:
        """Does the template list tools itself? If not, they are described in the system message."""
        return self.can.tools or (self._for_tools is not None and self._for_tools.can.tools)

    @property
    def dialect(self) -> ToolDialect:
        return self.can.dialect

    def render(
        self,
        messages: list[ChatMessage],
        tools: list[ToolDict] | None,
        *,
        thinking: bool = True,
        args: dict[str, Any] | None = None,
    ) -> str:
        """The prompt. Raises OSError (EINVAL) with a sentence where the template refuses. `thinking` False: the model
        should answer without thinking, if the template supports that. `args`: more variables for the template."""
        args = dict(args or {})
        if _OURS & set(args):
            raise refuse(f"template_args: {min(_OURS & set(args))} is made from the messages")
        if not thinking:
            args.setdefault("enable_thinking", False)
        fitted = _fitted(messages, tools or [], self.can, self._nine)
        listed = (tools if self.can.tools else None) or self.can.no_tools
        last = fitted[-1]
        if last["role"] == "assistant" and not last.get("tool_calls"):
            return self._continued(fitted, listed, args)
        text = self.raw(fitted, listed, **args)
        think = self.marks.think
        if not thinking and think and text.rstrip().endswith(think[0]):
            text += f"\n{think[1]}\n\n"
        return text

    def _continued(self, messages: list[ChatMessage], tools: list[ToolDict] | None, args: dict[str, Any]) -> str:
        """The prompt up to the end of the last message, which the model then continues."""
        *before, last = messages
        content = last["content"]
        text = self.raw([*before, {**last, "content": content + _HERE}], tools, add_generation_prompt=False, **args)
        if text.count(_HERE) != 1:
            raise refuse("messages: the last one is the assistant's, which the model's chat template cannot continue")
        return text[: text.index(_HERE)]

    def raw(
        self,
        messages: list[ChatMessage],
        tools: list[ToolDict] | None,
        *,
        add_generation_prompt: bool = True,
        **args: Any,
    ) -> str:
        """The template's own output for these messages, nothing adapted."""
        if self._template is None:
            raise refuse(f"messages: the model's chat template is broken: {self.broken}")
        self._environment.begin(self.quick)
        values = {
            **args,
            **self._tokens,
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        out: list[str] = []
        size = 0
        try:
            for part in self._template.generate(values):
                out.append(part)
                size += len(part)
                if size > MAX_PROMPT:
                    raise TemplateError("it writes too much")
        except Later:
            raise
        except TemplateError as error:
            raise refuse(f"messages: the model's chat template refuses them: {error}") from None
        except Exception as error:  # any error here is the template's
            raise refuse(
                f"messages: the model's chat template cannot render them: {type(error).__name__}: {error}"[:500]
            ) from None
        return "".join(out)


_HERE = "\U0010fffd"  # marks the end of the last message; no meaningful text contains it


# ── the marks of a thinking model around its thoughts ──────────────────────────────────────────────────────

_THINK = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))
_CHANNELS = {
    "<|channel|>analysis<|message|>": REASONING,
    "<|channel|>final<|message|>": TEXT,
    "<|channel|>commentary<|message|>": TEXT,
    "<|end|>": HIDDEN,
}


@dataclass(frozen=True, slots=True)
class Marks:
    """How a family of models separates its thoughts from its answer."""

    think: tuple[str, str] | None = None
    switches: dict[str, int] = field(default_factory=dict)
    answer: str = ""  # the mark at the beginning of the answer, if it has one

    @property
    def controls(self) -> set[str]:
        """Those of the marks that may be control tokens."""
        return {*(self.think or ()), *(("<|channel|>", "<|message|>", "<|end|>") if self.switches else ())}


def marks_of(source: str) -> Marks:
    if "<|channel|>" in source and "analysis" in source:
        return Marks(switches=_CHANNELS, answer="<|channel|>final<|message|>")
    return Marks(next((think for think in _THINK if think[0] in source or think[1] in source), None))


# ── what a template can do ────────────────────────────────────────────────────────────────────────────────

_SYSTEM = {"role": "system", "content": "probe-system"}
_USER = {"role": "user", "content": "probe-user"}
_ANSWER = {"role": "assistant", "content": "probe-said"}
_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "probe-description",
        "parameters": {"type": "object", "properties": {"probe": {"type": "string", "description": "probe"}}},
    },
}


def _tried(template: ChatTemplate) -> Abilities:
    def attempt(messages: list[ChatMessage], tools: list[ToolDict] | None, refused: str = "") -> str:
        try:
            return template.raw(messages, tools)
        except OSError:
            return refused

    none: list[ToolDict] | None = None if "probe-user" in attempt([_USER], None) else []
    if "probe-user" not in attempt([_USER], none):
        return Abilities()
    # A template that silently drops the system message in some place (Mistral v0.3, after a tool's result) has none.
    longer: tuple[list[ChatMessage], ...] = ([], [_USER, _ANSWER, _USER], [_USER, *_exchange(1, True)])
    system = "probe-system" in attempt([_SYSTEM, _USER], none) and all(
        "probe-system" in attempt([_SYSTEM, *rest], [_TOOL] if rest else none, "probe-system") for rest in longer
    )

    def kept(*messages: ChatMessage) -> bool:
        text = attempt(list(messages), none)
        return all(text.count(message["content"]) == 1 for message in messages)

    one, other = {**_USER, "content": "probe-one"}, {**_USER, "content": "probe-other"}
    answer = {**_ANSWER, "content": "probe-said"}
    can = Abilities(
        system=system,
        later=system and kept(one, _ANSWER, _SYSTEM, other),
        repeats=frozenset(
            role
            for role, taken in (("user", kept(one, other)), ("assistant", kept(one, answer, _ANSWER, other)))
            if taken
        ),
        roles=frozenset(
            role
            for role in ("developer", "function", "ipython")
            if kept(one, _ANSWER, {**other, "role": role}, _USER) or kept({**other, "role": role}, one)
        ),
        no_tools=none,
    )
    opening = attempt([_USER], [_TOOL])
    if "probe_tool" not in opening:
        return can
    for objects in (True, False):
        text = attempt([_USER, *_exchange(1, objects)], [_TOOL])
        dialect = dialect_of(text, "probe_call_0", opening)
        if dialect is not None and "probe-result-0" in text:
            several = "probe_call_1" in attempt([_USER, *_exchange(2, objects)], [_TOOL])
            return replace(can, tools=True, dialect=dialect, several=several, objects=objects)
    return can


def _exchange(count: int, objects: bool) -> list[ChatMessage]:
    """`count` calls in one message, and their results."""
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


# ── and how messages are adapted to it ───────────────────────────────────────────────────────────────────────


def _fitted(messages: list[ChatMessage], tools: list[ToolDict], can: Abilities, nine: bool) -> list[ChatMessage]:
    """The same conversation in a form that the template takes."""
    messages = _identified([_known(message, can) for message in messages], nine)
    if not can.tools:
        messages = _described(messages, tools)
    elif not can.several:
        messages = list(_one_by_one(messages))
    if not can.objects:
        messages = [_with_calls(message, _as_text) for message in messages]
    if not can.later:
        messages = _system_first(messages)
    if not can.system:
        messages = _without_system(messages)
    return _joined(messages, can)


def _known(message: ChatMessage, can: Abilities) -> ChatMessage:
    """The message with a role that the template knows."""
    role = message["role"]
    if role in can.roles:
        return message
    return {**message, "role": {"developer": "system", "function": "tool", "ipython": "tool"}.get(role, role)}


def _system_first(messages: list[ChatMessage]) -> list[ChatMessage]:
    """Later system messages go into the next user message; several at the beginning become one."""
    out: list[ChatMessage] = []
    texts: list[str] = []
    for message in messages:
        if message["role"] == "system":
            if len(out) == 1 and out[0]["role"] == "system":
                out[0] = {**out[0], "content": f"{out[0]['content']}\n\n{message['content']}"}
            elif out:
                texts.append(message["content"])
            else:
                out.append(message)
            continue
        if texts and message["role"] == "user":
            message = {**message, "content": "\n\n".join([*texts, message["content"]])}
            texts = []
        out.append(message)
    if texts:
        out.append({"role": "user", "content": "\n\n".join(texts)})
    return out


def _joined(messages: list[ChatMessage], can: Abilities) -> list[ChatMessage]:
    """Messages of one role in a row become one, where the template takes only one."""
    out: list[ChatMessage] = []
    for message in messages:
        role, last = message["role"], out[-1] if out else None
        plain = (
            last is not None and last["role"] == role and not last.get("tool_calls") and not message.get("tool_calls")
        )
        if plain and last is not None and role in ("user", "assistant") and role not in can.repeats:
            out[-1] = {**last, "content": f"{last['content']}\n\n{message['content']}"}
        else:
            out.append(message)
    return out


def _with_calls(message: ChatMessage, change: Any) -> ChatMessage:
    if not message.get("tool_calls"):
        return message
    return {**message, "tool_calls": [change(call) for call in message["tool_calls"]]}


def _as_text(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": _tojson(function["arguments"])}}


def _identified(messages: list[ChatMessage], nine: bool) -> list[ChatMessage]:
    """Give every call an id, and every result the id of its call: its `tool_call_id`, else by the order of calls."""
    out: list[ChatMessage] = []
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


def _one_by_one(messages: list[ChatMessage]) -> Iterator[ChatMessage]:
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


def _described(messages: list[ChatMessage], tools: list[ToolDict]) -> list[ChatMessage]:
    """Tools in the system message; calls and results as text."""
    out: list[ChatMessage] = []
    ours = False  # is the last of `out` a user message made of results? The next user message is appended to it
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


def _without_system(messages: list[ChatMessage]) -> list[ChatMessage]:
    """The system message at the beginning goes into the first user message."""
    if messages[0]["role"] != "system":
        return messages
    content, rest = messages[0]["content"], messages[1:]
    if rest and rest[0]["role"] == "user":
        return [{**rest[0], "content": f"{content}\n\n{rest[0]['content']}"}, *rest[1:]]
    return [{"role": "user", "content": content}, *rest]
