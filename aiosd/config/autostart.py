"""Agents that start with the system: the tables [[agent]] of aiosd.toml.

    [[agent]]
    name = "planner"                  in aios-ps; else that of the script, as with aios-run
    file = "agents/planner.py"        or module = "my.planner", or command = "node planner.js" or a list of words
    args = ["--fast"]
    cwd = "agents"                    relative to the folder of aiosd.toml, which is the default
    nice = 5
    group = "web"
    tokens = 100000                   budgets: tokens, time (60, "10m"), memory ("512M"), … see aiosd.budgets.limits
    restart = "on-failure:3"          see aiosd.init.restart
    env = { PLAN = "day" }            beside the environment that aiosd has
    sandbox = "flat"                  also net, read, write: see aiosd.sandbox.boxgroups
    preload = "openai,my.tools"       forked from a process that has imported these, in the interpreter or environment
    python = "venv"                   … that is named here, else in aiosd's

`READERS` checks one such table key by key, `read` as a whole; `spawn` makes the call that `aios-run -d` would send.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from aiosd.budgets import limits
from aiosd.init import restart
from aiosd.sandbox import boxgroups
from libaios import sandbox, template, wire

KINDS = {"file": "file", "module": "module", "command": "exec"}  # a key, and its name in wire.Spawn


@dataclass(frozen=True, slots=True)
class AgentSpec:
    """One agent of the file."""

    kind: str  # as in wire.Spawn
    target: str
    args: tuple[str, ...] = ()
    cwd: str = "/"
    name: str | None = None
    nice: int | None = None
    group: str | None = None
    limits: wire.Limits = field(default_factory=wire.Limits)
    restart: restart.RestartPolicy = field(default_factory=restart.RestartPolicy)
    env: Mapping[str, str] = field(default_factory=dict)
    sandbox: wire.Sandbox = field(default_factory=wire.Sandbox)
    template: wire.Template | None = None


def spawn(spec: AgentSpec, environ: Mapping[str, str], umask: int = 0o022) -> wire.Spawn:
    """The system call that starts the agent, in the environment `environ` with the variables of the file."""
    env = {key: value for key, value in environ.items() if key not in (wire.ENV_CHANNEL, wire.ENV_PID)}
    return wire.Spawn(
        kind=spec.kind,
        target=spec.target,
        args=list(spec.args),
        env=env | dict(spec.env),
        cwd=spec.cwd,
        name=spec.name,
        nice=spec.nice,
        group=spec.group,
        limits=spec.limits,
        umask=umask,
        detached=True,
        restart=str(spec.restart),
        sandbox=spec.sandbox,
        template=spec.template,
    )


def read(values: Mapping[str, Any], folder: str) -> AgentSpec:
    """Make an agent from its values, each of which its reader has checked. Raises ValueError with a sentence."""
    given = [key for key in KINDS if key in values]
    if len(given) != 1:
        found = f", not {' and '.join(given)}" if given else ""
        raise ValueError(f"an agent has one of file, module and command{found}")
    kind, words = KINDS[given[0]], list(values[given[0]])
    cwd = os.path.normpath(os.path.join(folder, os.path.expanduser(values.get("cwd", "."))))
    forked_from = _template(kind, values, folder)
    return AgentSpec(
        kind=kind,
        target=words[0],
        args=(*words[1:], *values.get("args", ())),
        cwd=cwd,
        name=values.get("name"),
        nice=values.get("nice"),
        group=values.get("group"),
        limits=limits.limits_of(values),
        restart=values.get("restart", restart.RestartPolicy()),
        env=values.get("env", {}),
        sandbox=sandbox.wish(
            kind,
            words[0],
            cwd,
            os.environ,
            args=(*words[1:], *values.get("args", ())),
            level=values.get("sandbox"),
            read=values.get("read", ()),
            write=values.get("write", ()),
            variables=values.get("env", {}),
            net=values.get("net"),
            needed=template.folders(forked_from),
        ),
        template=forked_from,
    )


def _template(kind: str, values: Mapping[str, Any], folder: str) -> wire.Template | None:
    """The template from which it is forked; None: aiosd's own processes."""
    if "preload" not in values and "python" not in values:
        return None
    if "preload" not in values or kind == "exec":
        raise ValueError("preload goes with file or module, and python with preload")
    python = values.get("python", "")
    try:
        return template.wish(values["preload"], os.path.join(folder, os.path.expanduser(python)) if python else "")
    except OSError as err:
        raise ValueError(err.strerror) from None


# ── the keys ──────────────────────────────────────────────────────────────────────────────────────────────


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r} is no text")
    if "\0" in value:
        raise ValueError("a text with a null byte")
    return value


def _one_word(value: Any) -> list[str]:
    return [_text(value)]


def _words(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(word, str) and "\0" not in word for word in value):
        raise ValueError(f"{value!r} is no list of texts")
    return value


def _modules(value: Any) -> list[str]:
    """A list of names, or one text with commas between them."""
    names = value.split(",") if isinstance(value, str) else _words(value)
    try:
        return msgspec.convert([name.strip() for name in names], list[wire.Module])
    except msgspec.ValidationError:
        raise ValueError(f"{value!r} are no names of modules") from None


def _command(value: Any) -> list[str]:
    """A list of words, or one line that is split as a shell would."""
    words = shlex.split(value) if isinstance(value, str) else _words(value)
    if not words or not words[0]:
        raise ValueError("no program is named")
    return words


def _name(value: Any) -> str:
    try:
        name = msgspec.convert(value, wire.Name)
    except msgspec.ValidationError:
        raise ValueError(f"{value!r} is no name (up to 64 characters, no blank, no '/')") from None
    if name.isdecimal() or name.startswith("-"):
        raise ValueError(f"{value!r} would be taken for a pid or an option")
    return name


def _group(value: Any) -> str:
    try:
        return msgspec.convert(value, wire.Name)
    except msgspec.ValidationError:
        raise ValueError(f"{value!r} is no name of a group (up to 64 characters, no blank, no '/')") from None


def _number(low: int, high: int) -> Callable[[Any], int]:
    def read_number(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{value!r} is no whole number")
        if not low <= value <= high:
            raise ValueError(f"{value} is out of range (from {low} to {high})")
        return value

    return read_number


def _env(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is no table of variables (such as {{ NAME = 'value' }})")
    for key, text in value.items():
        if not key or "=" in key or "\0" in key or not isinstance(text, str) or "\0" in text:
            raise ValueError(f"{key} = {text!r} is no variable of an environment")
    return value


def _restart(value: Any) -> restart.RestartPolicy:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no restart policy (no, on-failure[:N] or always[:N])")
    return restart.parse(value)


#: Every key of [[agent]], with the function that makes its value from that of TOML, or raises ValueError.
READERS: dict[str, Callable[[Any], Any]] = {
    "file": _one_word,
    "module": _one_word,
    "command": _command,
    "args": _words,
    "name": _name,
    "nice": _number(-20, 19),
    "group": _group,
    **limits.READERS,
    "restart": _restart,
    "env": _env,
    "cwd": _text,
    "sandbox": boxgroups.level,
    "net": boxgroups.net,
    "read": boxgroups.texts,
    "write": boxgroups.texts,
    "preload": _modules,
    "python": _text,
}
