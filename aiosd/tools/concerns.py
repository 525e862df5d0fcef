"""The deeds of calls of tools, for rules and people: the typed resources of a call, and what an approval is bound to.

A tool declares which of its arguments are resources (`libaios.tool.define`: concerns). The text of a command is never
interpreted.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

import msgspec

from aiosd.access.deed import KINDS, Deed, detail, details_of
from aiosd.access.patterns import host_of
from aiosd.tools import held
from aiosd.tools.messages import Tool

DESTRUCTIVE = "a tool that its server calls destructive asks"
MOST = 256  # resources of one type; if a call names more, its resources count as unknown
CHANGED = "a tool that its server describes otherwise than before asks"


def deed(tool: Tool, arguments: dict[str, Any], folder: str, changed: bool = False, known: bool = False) -> Deed:
    """The deed of a call. `folder`: where the call works, "" if that is not known. `changed`: the tool's description
    differs from the accepted one. `known`: resource types that the tool does not declare count as not used (otherwise
    as unknown)."""
    resources, unclear = resources_of(tool, arguments, folder)
    stated = {concern.partition(":")[0] for concern in tool.concerns}
    details = details_of(arguments.items())
    if changed:
        details += [detail("described now", tool.description), detail("parameters now", tool.parameters)]
    return Deed(
        tool.name,
        tool=True,
        resources=resources,
        details=details,
        bound=fingerprint(tool) + _identities(resources),
        default=CHANGED if changed else DESTRUCTIVE if tool.asks else "",
        unknown=sorted(unclear | (set() if known else set(KINDS) - stated)),
        base=folder,
    )


def resources_of(tool: Tool, arguments: dict[str, Any], folder: str) -> tuple[list[tuple[str, str]], set[str]]:
    """The type and value of each resource; and the types for which they are unknown."""
    found: dict[tuple[str, str], None] = {}
    unclear: set[str] = set()
    for concern in tool.concerns:
        kind, _, template = concern.partition(":")
        texts = _filled(template, tool, arguments)
        if len(texts) > MOST:
            unclear.add(kind)
        for text in texts[:MOST]:
            try:
                found |= dict.fromkeys((kind, value) for value in _values(kind, text, folder))
            except (ValueError, OSError):
                unclear.add(kind)
    return list(found), unclear


def files_of(resources: Iterable[tuple[str, str]]) -> dict[str, held.Identity]:
    """The identities of the files at all these paths now."""
    return {path: held.identity(path) for kind, path in resources if kind == "path"}


def hosts_of(resources: Iterable[tuple[str, str]]) -> list[str]:
    return [host for kind, host in resources if kind == "host"]


def fingerprint(tool: Tool) -> bytes:
    """The hash of the tool's description: 16 bytes."""
    content = msgspec.json.encode((tool.name, tool.description, tool.parameters), order="sorted")
    return hashlib.blake2b(content, digest_size=16).digest()


def _identities(resources: Iterable[tuple[str, str]]) -> bytes:
    return msgspec.msgpack.encode(sorted(files_of(resources).items()))


def _filled(template: str, tool: Tool, arguments: dict[str, Any]) -> list[str]:
    """The template filled with its argument: one text for a value, several for a list; or with the schema's default."""
    name = template[1:-1] if template[:1] == "{" and template[-1:] == "}" else ""
    if not name:
        return [template]
    value = arguments.get(name, tool.parameters.get("properties", {}).get(name, {}).get("default"))
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [str(one) for one in values]


def _values(kind: str, text: str, folder: str) -> list[str]:
    """The value as it is written, and the real path or host that it leads to. Raises ValueError, OSError."""
    if kind == "host":
        return [host_of((urlsplit(text).hostname or "") if "://" in text else text)]
    if kind == "path":
        if not folder and not os.path.isabs(text):
            raise ValueError(f"{text!r}: as seen from where?")
        plain = os.path.normpath(os.path.join(folder, text))
        return list(dict.fromkeys((plain, os.path.realpath(plain))))
    return [text]
