"""How families of models write tool calls: what begins one, the grammar that follows, and how to read them back.

| dialect     | a call                                                                       | families            |
|-------------|------------------------------------------------------------------------------|---------------------|
| hermes      | `<tool_call>{"name": …, "arguments": …}</tool_call>`                         | Qwen, Hermes, nano  |
| llama3      | `{"name": …, "parameters": …}` as the whole answer, or after a control token | Llama 3.1 to 3.3    |
| mistral     | `[TOOL_CALLS] [{"name": …, "arguments": …, "id": nine letters or digits}]`   | Mistral 7B v0.3, Nemo |
| mistral-args| `[TOOL_CALLS]name[ARGS]{…}`                                                  | newer Mistrals      |
| fenced      | a block of JSON between ``` lines, as `chat.py` describes it                 | Gemma, all others   |

Which one it is, is found out by letting the template write a call (`chat.py`), not by the model's name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from aiosd.link import Key
from libaios.wire import ToolCall

Tool = dict[str, Any]

_OBJECT = '"{" ws "\\"name\\"" ":" ws <name> "," ws "\\"<key>\\"" ":" ws <arguments> <more> ws "}"'
_ID = '("," ws "\\"id\\"" ":" ws "\\"" [0-9A-Za-z]{9} "\\"")?'
NINE = re.compile(r"[0-9A-Za-z]{9}\Z")


@dataclass(frozen=True)
class ToolDialect:
    """How one family of models writes tool calls.

    A generation is free text until `trigger` is complete (or, with `at_start`, until its first visible character is
    '{'); from there on the grammar `rules` holds. In it `call` stands for one call of any tool, written as `form`.
    Control tokens whose text is in `controls` may be part of it.
    """

    name: str
    trigger: str
    rules: str
    at_start: bool = False
    arguments_key: str = "arguments"  # '': the object is the arguments, and the name stands before it
    form: str = _OBJECT
    controls: tuple[str, ...] = ()

    def read(self, text: str, key: Key) -> list[ToolCall]:
        """The calls in what follows the trigger; one that breaks off in the middle is none."""
        calls: list[ToolCall] = []
        decoder = json.JSONDecoder()
        begin, at = 0, text.find("{")
        while at >= 0:
            try:
                value, end = decoder.raw_decode(text, at)
                name, arguments = self._parts(value, text[begin:at])
            except (ValueError, KeyError, TypeError):
                break
            calls.append(ToolCall(id=self._id(value, calls, key), name=name, arguments=arguments))
            begin, at = end, text.find("{", end)
        return calls

    def _parts(self, value: Any, before: str) -> tuple[str, dict[str, Any]]:
        if self.arguments_key:
            return value["name"], value[self.arguments_key]
        for control in self.controls:
            before = before.replace(control, " ")
        words = before.split()
        if not words:
            raise ValueError("a call without a name")
        return words[-1], value

    def _id(self, value: dict[str, Any], before: list[ToolCall], key: Key) -> str:
        """The one that the model wrote, so that the next prompt repeats what was generated; else one of ours."""
        own = value.get("id") if self.arguments_key else None
        if isinstance(own, str) and NINE.match(own) and all(call.id != own for call in before):
            return own
        return call_id(key, len(before))


def call_id(key: Key, index: int) -> str:
    """Stable: the same call gets the same id after any restart."""
    return "call_" + hashlib.blake2s(f"{key[0]}:{key[1]}:{index}".encode(), digest_size=9).hexdigest()


def nine_characters(word: str) -> str:
    """What stands for an id where only nine letters or digits will do: the id itself, or always the same for it."""
    return word if NINE.match(word) else hashlib.blake2s(word.encode(errors="replace")).hexdigest()[:9]


HERMES = ToolDialect(
    "hermes",
    trigger="<tool_call>",
    rules='root ::= ws call ws "</tool_call>" (ws "<tool_call>" ws call ws "</tool_call>")*',
    controls=("<tool_call>", "</tool_call>"),
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
    form=_OBJECT.replace("<more>", _ID),
    rules='root ::= ws "[" ws call (ws "," ws call)* ws "]"',
)
MISTRAL_ARGS = ToolDialect(
    "mistral-args",
    trigger="[TOOL_CALLS]",
    arguments_key="",
    form='<bare> "[ARGS]" <arguments>',
    rules='root ::= ws call ("[TOOL_CALLS]" call)*',
    controls=("[TOOL_CALLS]", "[ARGS]"),
)
FENCED = ToolDialect(
    "fenced",
    trigger="```tool_call",
    at_start=True,
    arguments_key="parameters",
    rules='root ::= ws call (ws "```" (ws "```tool_call" ws call ws "```")*)?',
)


def dialect_of(written: str, name: str, opening: str) -> ToolDialect | None:
    """By what a template has written for a call of `name`; None: in none of the ways known here. `opening`: a prompt,
    at whose end the model's answer begins."""
    end = written.find(name)
    if end < 0:
        return None
    before, after = written[:end], written[end + len(name) :]
    if re.search(r"\[TOOL_CALLS\]\s*\Z", before):
        return MISTRAL_ARGS if "[ARGS]" in after[:40] else None
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


def call_rules(dialect: ToolDialect, tools: Iterable[Tool], convert: Callable[[str, dict[str, Any]], str]) -> str:
    """The rule `call`: any of the tools by name, with arguments by its schema. `convert` adds a schema's rules
    and returns the name of its first one."""
    alternatives = []
    for i, tool in enumerate(tools):
        function = tool["function"]
        try:
            arguments = convert(f"tool{i}", function["parameters"])
        except OSError as error:
            raise OSError(error.errno or errno.EINVAL, f"tools[{i}].parameters: {error.strerror}") from None
        parts = {
            "<name>": json.dumps(json.dumps(function["name"])),
            "<bare>": json.dumps(function["name"]),
            "<key>": dialect.arguments_key,
            "<arguments>": arguments,
            "<more>": "",
        }
        alternatives.append(_filled(dialect.form, parts))
    return "call ::= " + " | ".join(alternatives)


def _filled(form: str, parts: dict[str, str]) -> str:
    return re.sub("|".join(parts), lambda match: parts[match[0]], form)
