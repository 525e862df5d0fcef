"""aiosd.toml: its tables, checked key by key. Errors have the number of the line."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiosd.access import table as access_table
from aiosd.access.rules import AccessPolicy
from aiosd.budgets import limits
from aiosd.config import autostart
from aiosd.config.autostart import AgentSpec
from aiosd.config.keys import KEYS
from aiosd.config.values import text as any_name
from aiosd.errors import UsageError, WorldError
from aiosd.sandbox import boxgroups
from aiosd.sandbox.box import SandboxSettings
from aiosd.tools.spec import BUILT_IN_KINDS, McpServer, read_servers


@dataclass(slots=True)
class ConfigFile:
    values: dict[str, Any] = field(default_factory=dict)
    models: list[dict[str, Any]] = field(default_factory=list)
    agents: list[AgentSpec] = field(default_factory=list)
    groups: list[tuple[int, dict[str, Any]]] = field(default_factory=list)  # with the line of each
    servers: Mapping[str, McpServer] = field(default_factory=dict)
    access: Any = None  # the table [access], and the text of the file
    text: str = ""


def read(path: Path, must_exist: bool) -> ConfigFile:
    import tomllib

    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if must_exist:
            raise UsageError(f"{path}: there is no such file") from None
        return ConfigFile()
    except UnicodeDecodeError:
        raise UsageError(f"{path}: is not UTF-8") from None
    except NotADirectoryError:
        return ConfigFile()  # the home is a file; creating its folders reports that
    except OSError as err:
        raise WorldError(f"{path}: {err.strerror}") from err
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as err:
        raise UsageError(f"{path}: {err}") from None
    models, agents, groups = (_tables(path, text, data, name) for name in ("model", "agent", "group"))
    try:
        servers = read_servers(data.pop("mcpServers", {}), str(path.resolve().parent))
    except ValueError as err:
        raise UsageError(f"{path}, line {_line(text, 'mcpServers')}: {err}") from None
    access = data.pop("access", None)
    file = ConfigFile(_read_table(path, text, data, _SETTINGS, 0), servers=servers, access=access, text=text)
    for first, table in models:
        model = _read_table(path, text, table, _OF_MODEL, first)
        if ("path" in model) == ("url" in model):
            raise UsageError(f"{path}, line {first}: a model without path" + (" or url" if "model" in model else ""))
        if ("url" in model) != ("model" in model):
            raise UsageError(f"{path}, line {first}: url and model (its name there) belong together")
        file.models.append(model)
    for first, table in agents:
        values = _read_table(path, text, table, autostart.READERS, first)
        try:
            file.agents.append(autostart.read(values, str(path.parent.absolute())))
        except ValueError as err:
            raise UsageError(f"{path}, line {first}: {err}") from None
    readers = boxgroups.READERS | limits.GROUP_READERS
    file.groups = [(first, _read_table(path, text, table, readers, first)) for first, table in groups]
    return file


def access_of(path: Path, file: ConfigFile, more_tools: bool) -> tuple[AccessPolicy, tuple[str, ...]]:
    """The rules about agents. `more_tools`: there are tools whose names are not known yet."""
    if file.access is None:
        return AccessPolicy(), ()
    names = access_table.Names(BUILT_IN_KINDS, file.servers, more_tools)
    try:
        policy, warnings = access_table.read(file.access, file.text, str(path.parent.absolute()), names)
    except access_table.RuleError as err:
        raise UsageError(f"{path}, line {err.line}: {err}") from None
    return policy, tuple(warnings)


def groups_of(
    path: Path, tables: Sequence[tuple[int, Mapping[str, Any]]], general: SandboxSettings, strict: bool
) -> dict[str, SandboxSettings]:
    found: dict[str, SandboxSettings] = {}
    for first, values in tables:
        try:
            name, rules = boxgroups.read(values, str(path.parent.absolute()), general)
            if name in found:
                raise ValueError(f"group {name!r} is there twice")
            if strict and rules.level != general.level:
                raise ValueError(f"group {name!r}: sandbox = {rules.level!r} is less than strict allows")
        except ValueError as err:
            raise UsageError(f"{path}, line {first}: {err}") from None
        found[name] = rules
    return found


def _tables(path: Path, text: str, data: dict[str, Any], name: str) -> list[tuple[int, dict[str, Any]]]:
    """Take the tables [[name]] out of the data, each with the line where it begins."""
    tables = data.pop(name, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UsageError(f"{path}, line {_line(text, name)}: {name}s are written as [[{name}]]")
    return [(_line_of_table(text, name, number), table) for number, table in enumerate(tables, 1)]


Readers = Mapping[str, Callable[[Any], Any]]


def _read_table(path: Path, text: str, table: Mapping[str, Any], readers: Readers, first: int) -> dict[str, Any]:
    """Check one table that begins at line `first`."""
    values = {}
    for name, value in table.items():
        place = f"{path}, line {_line(text, name, first)}"
        if name not in readers:
            raise UsageError(f"{place}: unknown key {name!r}{meant(name, set(readers))}")
        try:
            values[name] = readers[name](value)
        except ValueError as err:
            raise UsageError(f"{place}: {name}: {err}") from None
    return values


def meant(name: str, known: set[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {close[0]!r}?)" if close else f"; there are: {', '.join(sorted(known))}"


def _line(text: str, name: str, first: int = 0) -> int:
    """The number of the line at or after `first` that sets `name`. tomllib does not report the place of a key."""
    lines = text.splitlines()
    pattern = re.compile(rf"""\s*\[*\s*(?:\w+\s*\.\s*)?["']?{re.escape(name)}["']?\s*[]=.]""")
    for number in range(max(first, 1), len(lines) + 1):
        if pattern.match(lines[number - 1]):
            return number
    return max(first, 1)


def _line_of_table(text: str, name: str, number: int) -> int:
    """The line in which the `number`th [[name]] begins."""
    starts = [n for n, line in enumerate(text.splitlines(), 1) if re.match(rf"\s*\[\[\s*{name}\s*\]\]", line)]
    return starts[number - 1] if number <= len(starts) else 1


_SETTINGS: Readers = {key.name: key.read for key in KEYS}
_OF_MODEL: Readers = {
    "name": any_name,
    "path": any_name,
    "url": any_name,
    "model": any_name,
    **{key.name: key.read for key in KEYS if key.per_model},
}
