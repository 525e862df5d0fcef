"""How families of models write tool calls: how a call begins, its grammar, and how to parse it.

| dialect      | a call                                                                   | families              |
|--------------|--------------------------------------------------------------------------|-----------------------|
| hermes       | `<tool_call>{"name": …, "arguments": …}</tool_call>`                     | Qwen 2.5 and 3, SmolLM |
| llama3       | `{"name": …, "parameters": …}` as the whole answer                       | Llama 3.1 to 3.3      |
| mistral      | `[TOOL_CALLS] [{"name": …, "arguments": …, "id": nine characters}]`      | Mistral 7B v0.3, Nemo |
| mistral-args | `[TOOL_CALLS]name[ARGS]{…}`                                              | newer Mistrals        |
| qwen-xml     | `<tool_call><function=name><parameter=key>…</parameter></function>` …    | Qwen3-Coder           |
| glm          | `<tool_call>name<arg_key>key</arg_key><arg_value>…</arg_value>` …        | GLM 4.5               |
| deepseek     | `<calls begin><call begin>name<sep>{…}<call end><calls end>`             | DeepSeek V3.1         |
| deepseek-r1  | the same with `function<sep>name`, and the object in a block of JSON     | DeepSeek V3, R1       |
| harmony      | `<|channel|>commentary to=functions.name<|message|>{…}`                  | gpt-oss               |
| fenced       | a block of JSON between ``` lines, as `chat.py` describes it             | Gemma, all others     |

The dialect of a model is recognised from a call that its template writes (`chat.py`), not from the model's name. Only
text in the model's own dialect is a call: an answer that happens to be JSON is an answer.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

from aiosd.ipc.link import CallKey
from aiosd.llm.document import Document
from aiosd.llm.schema import Converter, literal, written_raw
from aiosd.llm.text import Head
from libaios import parts
from libaios.wire import ToolCall

ToolDict = dict[str, Any]

_OBJECT = '"{" ws "\\"name\\"" ":" ws <name> "," ws "\\"<key>\\"" ":" ws <arguments> <more> ws "}"'
_ID = '("," ws "\\"id\\"" ":" ws "\\"" [0-9A-Za-z]{9} "\\"")?'
_NAMED = r'"name"\s*:\s*"(?P<name>[\w.-]+)"\s*,\s*"<key>"\s*:\s*\Z'
NINE = re.compile(r"[0-9A-Za-z]{9}\Z")


@dataclass(frozen=True)
class ToolDialect:
    """How one family of models writes tool calls.

    A generation is free text until `trigger` is complete (or, with `at_start`, until its first visible characters are
    the beginning of a call of one of the tools). From there on the grammar holds: `one`, `more` where several calls are
    allowed, `last`. In these, the rule `call` is one call of any tool, in the form `form`. Control tokens in `controls`
    may be part of it, and so may the trigger.
    """

    name: str
    trigger: str
    one: str = "ws call"
    more: str = ""
    last: str = ""
    at_start: bool = False
    arguments_key: str = "arguments"  # '': the object is the arguments, and the name comes before it
    form: str = _OBJECT
    controls: tuple[str, ...] = ()
    before: str = ""  # a regex for the text between a name and its arguments, where these are a separate object
    tags: tuple[str, str, str, str] | None = None  # around a parameter's name and value, where they are written as tags
    streams: bool = True  # id, name and arguments come in this order, so that a call can be shown while it is written

    def rules(self, *, begun: bool = True, several: bool = True) -> str:
        """The rule `root`. `begun`: the trigger has already been generated."""
        trigger = "" if begun or not self.trigger or self.at_start else literal(self.trigger)
        return f"root ::= {trigger} {self.one} {self.more if several else ''} {self.last}"

    def read(self, text: str, key: CallKey) -> list[ToolCall]:
        """The calls in the text after the trigger; an incomplete call is none."""
        return ToolCallReader(self, []).read(text, key)


@dataclass(frozen=True)
class ToolCallReader:
    """A dialect and the tools of one generation: finds the calls in its text."""

    dialect: ToolDialect
    tools: list[ToolDict]

    @property
    def trigger(self) -> str:
        return self.dialect.trigger

    def head(self) -> Head | None:
        """The beginning of a call, for a dialect without a trigger."""
        if not self.dialect.at_start:
            return None
        names = (json.dumps(tool["function"]["name"]) for tool in self.tools)
        return Head(f'{{"name":{name},"{self.dialect.arguments_key}":' for name in names)

    def read(self, text: str, key: CallKey) -> list[ToolCall]:
        text = _plain(text)
        if self.dialect.tags is not None:
            return self._read_tags(text, key)
        calls: list[ToolCall] = []
        decoder = json.JSONDecoder()
        begin, at = 0, text.find("{")
        while at >= 0:
            try:
                value, end = decoder.raw_decode(text, at)
                name, arguments = self._parts(value, text[begin:at])
            except (ValueError, KeyError, TypeError, RecursionError):
                break
            calls.append(ToolCall(id=self._id(value, calls, key), name=name, arguments=arguments))
            begin, at = end, text.find("{", end)
        return calls

    def _parts(self, value: Any, before: str) -> tuple[str, dict[str, Any]]:
        dialect = self.dialect
        if dialect.arguments_key:
            return value["name"], value[dialect.arguments_key]
        match = re.search(rf"(?P<name>[\w.-]+)\s*{dialect.before}\s*\Z", before)
        if match is None:
            raise ValueError("a call without a name")
        return match["name"], value

    def _id(self, value: dict[str, Any], before: list[ToolCall], key: CallKey) -> str:
        """The id that the model wrote, so that the next prompt repeats the generated text; else a new one."""
        own = value.get("id") if self.dialect.arguments_key else None
        if isinstance(own, str) and NINE.match(own) and all(call.id != own for call in before):
            return own
        return call_id(key, len(before))

    def _read_tags(self, text: str, key: CallKey) -> list[ToolCall]:
        assert self.dialect.tags is not None
        opens, middle, _, shut = map(re.escape, self.dialect.tags)
        parameter = re.compile(rf"\s*{opens}(.*?){middle}(.*?){shut}", re.S)
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in self.tools}
        calls: list[ToolCall] = []
        at = 0
        while (begin := _TAG_BEGIN.match(text, at)) is not None:
            name, at, arguments = begin["name"], begin.end(), {}
            while (found := parameter.match(text, at)) is not None:
                arguments[found[1]] = self._value(found[2], schemas.get(name, {}), found[1])
                at = found.end()
            end = _TAG_END.match(text, at)
            if end is None:
                break
            at = end.end()
            calls.append(ToolCall(id=call_id(key, len(calls)), name=name, arguments=arguments))
        return calls

    def _value(self, text: str, parameters: dict[str, Any], name: str) -> Any:
        schema = parameters.get("properties", {}).get(name, True)
        if written_raw(schema, parameters):
            return text
        try:
            return json.loads(text)
        except ValueError:
            return text


_TAG_BEGIN = re.compile(r"\s*(?:<tool_call>)?\s*(?:<function=)?(?P<name>[\w.-]+)>?")
_TAG_END = re.compile(r"\s*(?:</function>)?\s*</tool_call>")


class CallStream:
    """Shows the calls of a generation while they are written: id and name once, then arguments as they come."""

    def __init__(self, dialect: ToolDialect, key: CallKey) -> None:
        self._key = key
        self._count = 0
        named = _NAMED.replace("<key>", dialect.arguments_key)
        self._begin = re.compile(named if dialect.arguments_key else rf"(?P<name>[\w.-]+)\s*{dialect.before}\s*\Z")
        self._head = ""  # the text before the arguments of the next call
        self._depth = 0  # of brackets, within arguments
        self._quoted = self._escaped = False

    def feed(self, text: str) -> str:
        out: list[str] = []
        for char in text:
            if self._depth:
                out.append("\ufffd" if "\ufdd0" <= char <= "\ufdef" else char)
                self._within(char)
                continue
            match = self._begin.search(_plain(self._head[-256:])) if char == "{" else None
            if match is None:
                self._head += char
                continue
            out += [parts.call(self._count, call_id(self._key, self._count), match["name"]), char]
            self._count += 1
            self._depth, self._head = 1, ""
        return "".join(out)

    def _within(self, char: str) -> None:
        if self._quoted:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._quoted = False
        elif char == '"':
            self._quoted = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1


def _plain(text: str) -> str:
    """Control tokens as text."""
    return text.replace(parts.CONTROL, "").replace(parts.CONTROL_END, "")


def call_id(key: CallKey, index: int) -> str:
    """An id for a call that has none: always the same for the same call, also after a restart."""
    return "call_" + hashlib.blake2s(f"{key[0]}:{key[1]}:{index}".encode(), digest_size=9).hexdigest()


def nine_characters(word: str) -> str:
    """An id of nine letters or digits: the given one if it is such, else one that depends only on it."""
    return word if NINE.match(word) else hashlib.blake2s(word.encode(errors="replace")).hexdigest()[:9]


HERMES = ToolDialect(
    "hermes",
    trigger="<tool_call>",
    one='ws call ws "</tool_call>"',
    more='(ws "<tool_call>" ws call ws "</tool_call>")*',
    controls=("<tool_call>", "</tool_call>"),
)
LLAMA3 = ToolDialect(
    "llama3",
    trigger="<|python_tag|>",
    at_start=True,
    arguments_key="parameters",
    one=r"[ \t\r\n]* call",
    more='(ws ";" ws call)*',
)
MISTRAL = ToolDialect(
    "mistral",
    trigger="[TOOL_CALLS]",
    form=_OBJECT.replace("<more>", _ID),
    one='ws "[" ws call',
    more='(ws "," ws call)*',
    last='ws "]"',
    controls=("[TOOL_CALLS]",),
    streams=False,
)
MISTRAL_ARGS = ToolDialect(
    "mistral-args",
    trigger="[TOOL_CALLS]",
    arguments_key="",
    form='<bare> "[ARGS]" <arguments>',
    more='("[TOOL_CALLS]" call)*',
    controls=("[TOOL_CALLS]", "[ARGS]"),
    before=r"(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?",
)
QWEN_XML = ToolDialect(
    "qwen-xml",
    trigger="<tool_call>",
    arguments_key="",
    form='"<function=" <bare> ">\\n" <tagged> "</function>"',
    one='"\\n"? call "\\n"? "</tool_call>"',
    more='("\\n" "<tool_call>" "\\n"? call "\\n"? "</tool_call>")*',
    controls=("<tool_call>", "</tool_call>"),
    tags=("<parameter=", ">\n", "\n</parameter>", "\n</parameter>"),
    streams=False,
)
GLM = ToolDialect(
    "glm",
    trigger="<tool_call>",
    arguments_key="",
    form='<bare> "\\n" <tagged>',
    one='call "</tool_call>"',
    more='("\\n"? "<tool_call>" call "</tool_call>")*',
    controls=("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    tags=("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>", "</arg_value>"),
    streams=False,
)
_SEEK = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
)
DEEPSEEK = ToolDialect(
    "deepseek",
    trigger=_SEEK[0],
    arguments_key="",
    form=f'"{_SEEK[1]}" <bare> "{_SEEK[2]}" <arguments> "{_SEEK[3]}"',
    one="call",
    more='("\\n"? call)*',
    last=f'"{_SEEK[4]}"',
    controls=_SEEK,
    before=_SEEK[2],
)
DEEPSEEK_R1 = replace(
    DEEPSEEK,
    name="deepseek-r1",
    form=f'"{_SEEK[1]}" "function" "{_SEEK[2]}" <bare> "\\n```json\\n" <arguments> "\\n```" "{_SEEK[3]}"',
    before="```json",
)
HARMONY = ToolDialect(
    "harmony",
    trigger="<|channel|>commentary to=functions.",
    arguments_key="",
    form='<bare> (" "? "<|constrain|>json")? "<|message|>" <arguments>',
    one="call",
    controls=("<|channel|>", "<|constrain|>", "<|message|>"),
    before=r"(?:<\|constrain\|>json)?<\|message\|>",
)
FENCED = ToolDialect(
    "fenced",
    trigger="```tool_call",
    arguments_key="parameters",
    one='ws call (ws "```")?',
    more='(ws "```tool_call" ws call ws "```")*',
)


def dialect_of(written: str, name: str, opening: str) -> ToolDialect | None:
    """The dialect of a call of `name` as a template has written it; None: unknown. `opening`: a prompt, at whose end
    the model's answer begins."""
    end = written.find(name)
    if end < 0:
        return None
    before, after = written[:end], written[end + len(name) :]
    if re.search(r"\[TOOL_CALLS\]\s*\Z", before):
        return MISTRAL_ARGS if re.match(r"(\[CALL_ID\]\w*)?(\[ARGS\])?\s*\{", after) else None
    for pattern, dialect in _WRITTEN:
        if re.search(pattern[0], before) and re.match(pattern[1], after):
            return dialect
    match = re.match(r'"\s*,\s*"(arguments|parameters)"\s*:\s*\{', after)
    if match is None or not re.search(r'\{\s*"name"\s*:\s*"\Z', before):
        return None
    head = before[: before.rfind("{")].rstrip()
    if head.endswith("<tool_call>"):
        dialect = HERMES
    elif re.search(r"\[TOOL_CALLS\]\s*\[\Z", head):
        dialect = MISTRAL
    elif head.endswith((opening.rstrip()[-16:], LLAMA3.trigger)):
        dialect = LLAMA3
    else:
        return None
    return dialect if dialect.arguments_key == match[1] else replace(dialect, arguments_key=match[1])


#: Text before and after the name of a function.
_WRITTEN = (
    ((r"<tool_call>\s*<function=\Z", r">\s*<parameter="), QWEN_XML),
    ((r"<tool_call>\s*\Z", r"\s*<arg_key>"), GLM),
    ((rf"{_SEEK[1]}function{_SEEK[2]}\Z", r"\s*```json"), DEEPSEEK_R1),
    ((rf"{_SEEK[1]}\Z", _SEEK[2]), DEEPSEEK),
    ((r"to=functions\.\Z", r"[^{]*<\|message\|>\s*\{"), HARMONY),
)


def call_rules(
    dialect: ToolDialect, tools: Iterable[ToolDict], converter: Converter, loose: Collection[str] = frozenset()
) -> str:
    """The rule `call`: the name of any of the tools, with arguments that fit its schema; those of the tools `loose`
    only as far as a grammar can ensure it."""
    alternatives = []
    for i, tool in enumerate(tools):
        name, parameters = tool["function"]["name"], closed(tool["function"]["parameters"])
        words = {
            "<name>": literal(json.dumps(name)),
            "<bare>": literal(name),
            "<key>": dialect.arguments_key,
            "<more>": "",
        }
        try:
            words |= _arguments(dialect, converter, f"tool{i}", parameters, name in loose)
        except OSError as error:
            raise OSError(error.errno or errno.EINVAL, f"tools[{i}].parameters: {error.strerror}") from None
        alternatives.append(_filled(dialect.form, words))
    return "call ::= " + " | ".join(alternatives)


def _arguments(
    dialect: ToolDialect, converter: Converter, name: str, parameters: dict[str, Any], loose: bool
) -> dict[str, str]:
    """What stands for the arguments in the form."""
    if loose:
        try:
            with converter.loosely():
                return _arguments(dialect, converter, name, parameters, False)
        except OSError:  # what no dropped keyword mends: it is too large, or allows nothing
            names = parameters.get("properties")
            parameters = {"type": "object"}
            if "<tagged>" in dialect.form and isinstance(names, dict):
                parameters = {"type": "object", "properties": dict.fromkeys(names, True)}
    if "<tagged>" in dialect.form:
        return {"<tagged>": _tagged(dialect, converter, name, parameters)}
    return {"<arguments>": converter.convert(name, parameters)}


def _filled(form: str, words: dict[str, str]) -> str:
    return re.sub("|".join(words), lambda match: words[match[0]], form)


def closed(parameters: dict[str, Any]) -> dict[str, Any]:
    """A tool that declares no parameters takes none."""
    declaring = {"properties", "additionalProperties", "patternProperties", "$ref", "allOf", "anyOf", "oneOf"}
    if not parameters.get("properties") and not declaring - {"properties"} & set(parameters):
        return {**parameters, "properties": {}, "additionalProperties": False}
    return parameters


_PLAIN = {"type", "properties", "required", "additionalProperties"}


def _tagged(dialect: ToolDialect, converter: Converter, name: str, parameters: dict[str, Any]) -> str:
    """Parameters as tags, in their order; optional ones may be left out."""
    assert dialect.tags is not None
    opens, middle, end, shut = dialect.tags
    whole = Document(parameters, lambda work: None).merged(parameters)
    if set(whole) - _PLAIN and not converter.loose:
        raise OSError(errno.EINVAL, f"{min(set(whole) - _PLAIN)}: cannot be kept where parameters are written as tags")
    properties, required = whole.get("properties", {}), whole.get("required", [])
    rules = []
    for i, (key, schema) in enumerate({**dict.fromkeys(required, True), **properties}.items()):
        value = converter.convert_raw(f"{name}-{i}", schema, parameters, end)
        tagged = f"{literal(opens + key + middle)} {value} {literal(shut + chr(10))}"
        rules.append(tagged if key in required else f"({tagged})?")
    return " ".join(rules) or '""'
