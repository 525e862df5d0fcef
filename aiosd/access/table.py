"""The table [access] of aiosd.toml.

    [access]
    ask_timeout = 60                            seconds that an ask waits while no person listens (0: denied at once)
    deny  = [
      { tool = "shell", by = "web" },           agents of group web run no shell
      { call = "kill", signal = "KILL" },
    ]
    ask   = [ { tool = "fetch", host = "*" } ]
    allow = [
      { tool = "fetch", host = ["*.example.org", "192.0.2.1"] },
      { call = "sto_write", path = "reports", program = "agents/report.py" },
    ]

A rule is about a `tool` or a `call`. `by` names groups, `program` the program that a person started (not programs that
this one starts), `sha256` its content (of a Python script; modules that it imports are not checked); all other keys are
resources. Every value may be a list. A name that ends in `*` stands for all names that begin so. All rules that deny
come first, then those that ask, then those that allow.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from aiosd.access import patterns
from aiosd.access.deed import KINDS, program_key
from aiosd.access.rules import AccessPolicy, Act, Rule
from libaios import wire

#: Calls that no rule can name: they cannot fail, or are steps of another one, which is named instead.
_UNNAMED = {
    "getpid": "",
    "getppid": "",
    "cancel": "",
    "tool_call": 'tool = "NAME"',
    "tool_admit": 'tool = "NAME"',
    "sto_upload": "sto_write",
    "sto_piece": "sto_write",
    "sto_finish": "sto_write",
    "sto_abort": "sto_write",
}
_STORED = ("sto_write", "sto_read", "sto_stat", "sto_history", "sto_rollback", "sto_remove", "sto_share", "sto_unshare")
#: Types of resources that calls have. Built-in tools: see `tools.spec`.
KINDS_OF_CALLS = {
    "kill": ("signal", "group"),
    "nice": ("group",),
    "inspect": ("group",),
    "send": ("group",),
    **dict.fromkeys(("mem_add", "mem_update", "mem_remove"), ("group",)),
    **dict.fromkeys(_STORED, ("path", "group")),
}
KEYS = ("tool", "call", "by", "program", "sha256", *KINDS)


@dataclass(frozen=True, slots=True)
class Names:
    """The names that rules may use. `tools`: with the types of their resources, None if these are not known before the
    tools are loaded; `open`: there are tools whose names are not known either."""

    tools: Mapping[str, tuple[str, ...] | None]
    servers: Collection[str] = ()
    open: bool = False


class RuleError(ValueError):
    """An error in the table; the message has the line."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


def read(table: Any, text: str, folder: str, names: Names) -> tuple[AccessPolicy, list[str]]:
    """The rules, and warnings about rules that never decide. `text`: of the file, used to find line numbers; `folder`:
    of the file. Raises RuleError."""
    first = _line_of(text, r"\[\s*access\s*\]", 1)
    if not isinstance(table, Mapping):
        raise RuleError(first, "access is a table: [access]")
    rules: list[Rule] = []
    for key, value in table.items():
        line = _line_of(text, rf"{key}\s*=", first)
        if key == "ask_timeout":
            continue
        if key not in {act.value for act in Act}:
            raise RuleError(line, f"access: unknown key {key!r}; there are: ask_timeout, deny, ask, allow")
        if not isinstance(value, list) or not all(isinstance(rule, dict) for rule in value):
            raise RuleError(line, f'access.{key} is a list of rules: [ {{ tool = "shell", by = "web" }}, … ]')
        lines = [*_lines_of_rules(text, line), *[line] * len(value)]
        for rule, place in zip(value, lines, strict=False):
            try:
                rules.append(_rule(Act(key), rule, place, folder, names))
            except ValueError as err:
                raise RuleError(place, f"access.{key}: {err}") from None
    timeout = _seconds(table.get("ask_timeout", 0), _line_of(text, r"ask_timeout\s*=", first))
    policy = AccessPolicy(rules, timeout)
    shadows = [f"{rule.shown} never decides: {other.shown} comes before it" for rule, other in policy.shadowed()]
    return policy, shadows


def _seconds(value: Any, line: int) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e9:
        raise RuleError(line, f"access.ask_timeout: {value!r} is no number of seconds")
    return float(value)


def _rule(act: Act, given: Mapping[str, Any], line: int, folder: str, names: Names) -> Rule:
    for key in given:
        if key not in KEYS:
            raise ValueError(f"unknown key {key!r}{_meant(key, KEYS)}")
    if ("tool" in given) == ("call" in given):
        raise ValueError("a rule is about one of: tool, call")
    if "sha256" in given and "program" not in given:
        raise ValueError("sha256 is that of a program: which one?")
    tool = "tool" in given
    what = _texts("tool" if tool else "call", given["tool" if tool else "call"])
    kinds = [kind for kind in KINDS if kind in given]
    for name in what:
        for kinds_there in _known_tool(name, names) if tool else _known_call(name):
            _require_kinds(name, kinds, kinds_there)
    resources = [(kind, [_resource(kind, one, tool) for one in _texts(kind, given[kind])]) for kind in kinds]
    return Rule(
        act,
        tool,
        what,
        [_group(name) for name in _texts("by", given["by"])] if "by" in given else [],
        [_program(path, folder) for path in _texts("program", given["program"])] if "program" in given else [],
        [_sha256(text) for text in _texts("sha256", given["sha256"])] if "sha256" in given else [],
        resources,
        " ".join(f"{key}={_shown(value)}" for key, value in given.items()),
        line,
    )


def _known_tool(name: str, names: Names) -> Iterator[tuple[str, ...] | None]:
    """The types of resources of each tool that the name stands for. Raises ValueError."""
    if name == "*":
        return
    stem = name.removesuffix("*")
    found = [tool for tool in names.tools if tool == name or (name != stem and tool.startswith(stem))]
    server, apart, _ = stem.partition("__")
    if not found and not names.open and not (apart and server in names.servers):
        raise ValueError(f"no tool {name!r}{_meant(name, [*names.tools, *(f'{one}__*' for one in names.servers)])}")
    for tool in found:
        yield names.tools[tool]


def _known_call(name: str) -> Iterator[tuple[str, ...] | None]:
    known = sorted(row.name for row in wire.TABLE.values())
    if name in _UNNAMED:
        instead = _UNNAMED[name]
        raise ValueError(f"{name} cannot be ruled by itself" + (f", but {instead} can" if instead else ""))
    if name == "*":
        return
    found = [call for call in known if call == name or (name.endswith("*") and call.startswith(name[:-1]))]
    if not found:
        raise ValueError(f"no call {name!r}{_meant(name, known)}")
    for call in found:
        if call not in _UNNAMED:
            yield KINDS_OF_CALLS.get(call, ())


def _require_kinds(name: str, wanted: list[str], there: tuple[str, ...] | None) -> None:
    """Refuse a rule for a resource that the deed never has: it would never match, although it looks as if it did."""
    for kind in wanted:
        if there is not None and kind not in there:
            has = f"only {', '.join(there)}" if there else "none; a rule can be about all of its calls"
            raise ValueError(f"{name} has no {kind} ({has})")


def _resource(kind: str, pattern: str, tool: bool) -> str:
    plain = os.path.expanduser(pattern) if kind == "path" and tool else pattern
    checked = patterns.checked(kind, plain)
    if kind == "path" and not tool and checked.startswith("/"):
        raise ValueError(f"{pattern!r}: a path of the store begins with no slash")
    return checked


def _group(name: str) -> str:
    try:
        return msgspec.convert(name, wire.Name)
    except msgspec.ValidationError:
        raise ValueError(f"by: {name!r} is no name of a group") from None


def _program(path: str, folder: str) -> bytes:
    return program_key(os.fsencode(os.path.realpath(os.path.join(folder, os.path.expanduser(path)))))


def _sha256(text: str) -> bytes:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise ValueError(f"sha256: {text!r} is none (64 digits, as sha256sum prints them)")
    return bytes.fromhex(text)


def _texts(key: str, value: Any) -> list[str]:
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(one, str) and one for one in texts):
        raise ValueError(f"{key}: {value!r} is neither a text nor a list of texts")
    return texts


def _shown(value: Any) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)


def _meant(name: str, known: Collection[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {close[0]!r}?)" if close else f"; there are: {', '.join(known)}"


# ── line numbers, because tomllib does not report them ────────────────────────────────────────────────────


def _line_of(text: str, pattern: str, first: int) -> int:
    lines = text.splitlines()
    found = (number for number in range(first, len(lines) + 1) if re.match(rf"\s*{pattern}", lines[number - 1]))
    return next(found, first)


_TOKEN = re.compile(r"""\"{3}.*?\"{3}|'{3}.*?'{3}|"(?:\\.|[^"\\\n])*"|'[^'\n]*'|\#[^\n]*|[\[\]{}]""", re.DOTALL)


def _lines_of_rules(text: str, line: int) -> Iterator[int]:
    """The lines in which the inline tables begin, of the list that is set in line `line`."""
    start = sum(len(part) for part in text.splitlines(keepends=True)[: line - 1])
    depth = 0
    for token in _TOKEN.finditer(text, start):
        mark = token.group()
        if mark in ("[", "{"):
            depth += 1
            if mark == "{" and depth == 2:
                yield text.count("\n", 0, token.start()) + 1
        elif mark in ("]", "}"):
            depth -= 1
            if depth == 0:
                return
