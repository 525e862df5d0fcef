"""The tables [[group]] of aiosd.toml: how agents of a group are confined.

    [[group]]
    name = "web"
    sandbox = "flat"                  none, flat or cage
    net = "none"                      none, all, gateway, or hosts: ["example.org", "*.example.net:8443"]
    read = ["~/data"]                 files and folders, as seen from the folder of aiosd.toml
    write = ["out"]
    env = ["OPENAI_API_KEY", "AWS_*"] variables that they get from the environment of their start

Keys that a group does not have are as for all agents.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from aiosd.sandbox import hosts
from aiosd.sandbox.box import LEVELS, SandboxSettings
from libaios import wire


def read(values: Mapping[str, Any], folder: str, general: SandboxSettings) -> tuple[str, SandboxSettings]:
    """A group's name and its rules, from values that the keys' readers have made. ValueError with a sentence."""
    if "name" not in values:
        raise ValueError("a group without name")
    rules = SandboxSettings(
        values.get("sandbox", general.level),
        values.get("net", general.net),
        _paths(values.get("read", ()), folder),
        _paths(values.get("write", ()), folder),
        tuple(values.get("env", ())),
    )
    return values["name"], rules


def _paths(texts: Any, folder: str) -> tuple[str, ...]:
    return tuple(wire.os_text(os.path.realpath(os.path.join(folder, os.path.expanduser(text)))) for text in texts)


def _word(words: tuple[str, ...]) -> Callable[[Any], str]:
    def read_word(value: Any) -> str:
        if value not in words:
            raise ValueError(f"{value!r} is none of {', '.join(words)}")
        return str(value)

    return read_word


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(text, str) and text and "\0" not in text for text in value):
        raise ValueError(f"{value!r} is no list of texts")
    return value


def _name(value: Any) -> str:
    try:
        return msgspec.convert(value, wire.Name)
    except msgspec.ValidationError:
        raise ValueError(f"{value!r} is no name of a group (up to 64 characters, no blank, no '/')") from None


def net(value: Any) -> str:
    """ "none" · "all" · "example.org,*.example.net:8443" · a list of hosts"""
    return hosts.normal([value] if isinstance(value, str) else _texts(value))


level, texts = _word(LEVELS), _texts

#: Every key of [[group]], with the function that makes its value from that of TOML, or raises ValueError.
READERS: dict[str, Callable[[Any], Any]] = {
    "name": _name,
    "sandbox": level,
    "net": net,
    "read": texts,
    "write": texts,
    "env": texts,
}
