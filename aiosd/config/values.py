"""Readers of single settings: each converts a string or a TOML value to the setting's value, or raises ValueError."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from aiosd.llm.spec import Lora
from aiosd.units import format_size, parse_size
from libaios.wire import NAME_PATTERN

DEFAULT_QUANTUM = (64, 10.0)  # tokens, seconds


def whole(low: int, high: int = 1 << 31) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if isinstance(value, str) and re.fullmatch(r"-?[0-9]+", value.strip()):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{value!r} is no whole number")
        if not low <= value <= high:
            limits = f"at least {low}" if high == 1 << 31 else f"from {low} to {high}"
            raise ValueError(f"{value} is out of range ({limits})")
        return value

    return read


def lookahead(value: Any) -> int | None:
    """auto: None · off: 0 · a number of tokens"""
    if value in ("auto", "off"):
        return None if value == "auto" else 0
    try:
        return whole(0, 15)(value)
    except ValueError as error:
        raise ValueError(f"{error}; else auto or off") from None


def seconds(value: Any) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{value!r} is no number of seconds") from None
    if not 0 <= seconds <= 1e9:
        raise ValueError(f"{value} is out of range (from 0 to 1000000000)")
    return seconds


def number(low: float, high: float) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(value, bool) or math.isnan(number):
            raise ValueError(f"{value!r} is no number")
        if not low <= number <= high:
            raise ValueError(f"{value} is out of range (from {low:g} to {high:g})")
        return number

    return read


def pairs(value: Any, sample: str) -> list[tuple[str, str]]:
    """ "a=1,b=2" · ["a=1", "b=2"]"""
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in items):
        raise ValueError(f"{value!r} is not of the form {sample}")
    pairs = [part.strip().partition("=") for item in items for part in item.split(",") if part.strip()]
    if not pairs or not all(name and equals and rest for name, equals, rest in pairs):
        raise ValueError(f"{value!r} is not of the form {sample}")
    return [(name, rest) for name, _, rest in pairs]


def loras(value: Any) -> tuple[Lora, ...]:
    """ "sql=sql.gguf" · "sql=sql.gguf:0.5,chat=chat.gguf" · a list of these"""
    return tuple(lora(name, rest) for name, rest in pairs(value, "NAME=PATH[:SCALE]"))


def lora(name: str, rest: str) -> Lora:
    path, colon, scale = rest.rpartition(":")
    try:
        number = float(scale) if colon else 1.0
    except ValueError:  # a colon in the path
        path, colon, number = rest, "", 1.0
    if not re.fullmatch(NAME_PATTERN, name) or len(name) > 64:
        raise ValueError(f"{name!r} is no name for an adapter")
    if not -1000 <= number <= 1000 or number == 0:
        raise ValueError(f"{name}: a scale of {scale} is out of range (from -1000 to 1000, not 0)")
    return Lora(name, path if colon else rest, number)


def places(value: Any) -> tuple[tuple[str, str], ...]:
    return tuple(pairs(value, "PATTERN=BUFFER"))


def text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r} is no text")
    return value


def one_of(words: Sequence[str]) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if not isinstance(value, str) or value.lower() not in words:
            raise ValueError(f"{value!r} is none of {', '.join(words)}")
        return value.lower()

    return read


def switch(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    known = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if not isinstance(value, str) or value.lower() not in known:
        raise ValueError(f"{value!r} is neither true nor false")
    return known[value.lower()]


def size(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{value!r} is no size (such as 512M or 2G)")
    return parse_size(str(value))


def size_or_none(low: int) -> Callable[[Any], int]:
    """0 means that there is no limit."""

    def read(value: Any) -> int:
        found = 0 if str(value).strip() == "0" and not isinstance(value, bool) else size(value)
        if 0 < found < low:
            raise ValueError(f"{value} is out of range (from {format_size(low)}, or 0: no limit)")
        return found

    return read


def quantum(value: Any) -> tuple[int, float]:
    """64 · "64,10" · [64, 10]"""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    if not 1 <= len(parts) <= 2:
        raise ValueError(f"{value!r} is no quantum (such as 64, or 64,10: tokens and seconds)")
    tokens = whole(1, 1_000_000)(parts[0])
    limit = seconds(parts[1]) if len(parts) == 2 else DEFAULT_QUANTUM[1]
    if limit < 0.001:
        raise ValueError(f"{parts[1]} is out of range (from 0.001 seconds on)")
    return tokens, limit


def shares(value: Any) -> dict[str, float]:
    """ "web=4,batch=0.5" · {web = 4, batch = 0.5}"""
    if isinstance(value, str):
        value = dict(part.partition("=")[::2] for part in value.split(",") if part.strip())
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is no list of shares (such as web=4,batch=0.5)")
    return {name.strip(): share(name.strip(), part) for name, part in value.items()}


def share(name: str, value: Any) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = 0.0
    if not name or not 0.001 <= found <= 1e6 or isinstance(value, bool):
        raise ValueError(f"{name}={value} is no share of a group (from 0.001 to 1000000)")
    return found


def routes(value: Any) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """ "fast=small,gpt" · "fast=small,gpt;deep=big,gpt" · {fast = ["small", "gpt"]}"""
    if isinstance(value, str):
        value = {name.strip(): models for name, _, models in (one.partition("=") for one in value.split(";") if one)}
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is no route (such as fast=small,gpt)")
    return tuple((name, route(name, models)) for name, models in value.items())


def route(name: str, value: Any) -> tuple[str, ...]:
    words = value.split(",") if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"{name}={value!r} is no list of models (such as fast=small,gpt)")
    models = tuple(dict.fromkeys(word.strip() for word in words if word.strip()))
    if not models or not re.fullmatch(NAME_PATTERN, name) or len(name) > 64:
        raise ValueError(f"{name}={value} is no route (such as fast=small,gpt)")
    return models


def folders(value: Any) -> tuple[str, ...]:
    """ "/srv/docs,/srv/out=write" · ["/srv/docs", "/srv/out=write"]"""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{value!r} is no list of folders (such as /srv/docs,/srv/out=write)")
    folders = tuple(part.strip() for part in parts if part.strip())
    for folder in folders:
        path, equals, mode = folder.partition("=")
        if not path.startswith("/") or (equals and mode != "write"):
            raise ValueError(f"{folder!r} is neither an absolute path nor one with =write behind it")
    return folders


def files(value: Any) -> tuple[str, ...]:
    """ "a.py:b.py" · ["a.py", "b.py"]"""
    words = value.split(os.pathsep) if isinstance(value, str) else value
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"{value!r} is no list of files (such as a.py:b.py)")
    return tuple(word for word in words if word)


def any_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value
