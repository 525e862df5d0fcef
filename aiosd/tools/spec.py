"""The settings that the supervisor passes to the toolbox. In a file of their own: the supervisor imports nothing
else."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, Literal

import msgspec
from msgspec import Struct
from msgspec.structs import replace

#: The built-in tools, with the types of their resources: rules name them before any is loaded.
BUILT_IN_KINDS: dict[str, tuple[str, ...]] = {
    "calc": (),
    "remember": (),
    "recall": (),
    "search_notes": (),
    "list_notes": (),
    "forget_note": (),
    "list_stored": (),
    "read_stored": (),
    "write_stored": (),
    "stored_history": (),
    "python": (),
    "shell": (),
    "read_file": ("path",),
    "write_file": ("path",),
    "edit_file": ("path",),
    "list_files": ("path",),
    "fetch": ("host",),
}

MCP = "mcp:"  # the beginning of the name of a source that is an MCP server
CONCERN = re.compile(r"(path|host|group|signal):\{\w+\}\Z")
SERVER_NAME = re.compile(r"[A-Za-z0-9_-]{1,32}\Z")


MEMORY_BYTES = 2 << 30  # of each process of an MCP server


class McpServer(Struct, frozen=True, forbid_unknown_fields=True):
    """One of [mcpServers] in aiosd.toml: a program (`command`), or an address (`url`). The keys are those of other
    programs; `env` is its whole environment except PATH and the like. How it is confined: `sandbox` ("": as strictly as
    the machine can), `net` ("": all). It may reach its program and the paths in its arguments, and those in `read` and
    `write`, which `read_servers` makes absolute."""

    command: str = ""
    args: list[str] = []
    env: dict[str, str] = {}
    cwd: str = ""
    url: str = ""
    headers: dict[str, str] = {}
    timeout: float = 60.0  # seconds that a call may take
    type: str = ""  # "stdio", "http": not needed; accepted because files of other programs have it
    disabled: bool = False
    sandbox: Literal["", "none", "flat", "cage"] = ""
    net: Literal["", "none", "all"] = ""
    read: list[str] = []
    write: list[str] = []
    concerns: dict[str, list[str]] = {}  # by tool, as in `libaios.tool.define`: the resources that rules can name


class ToolboxSpec(Struct, frozen=True):
    """Settings of the toolbox: the folder for its callers' folders, files of tools, calls that run at a time, the
    descriptor that has the settings of MCP servers (`aiosd.ipc.sealed`; -1: there are none), and the socket over which
    the supervisor is asked to fork them."""

    folder: str
    files: tuple[str, ...] = ()
    workers: int = 8
    sealed: int = -1
    servers: int = -1


def read_servers(table: Any, folder: str = "/") -> dict[str, McpServer]:
    """The servers of a table [mcpServers]; paths are as seen from `folder`. Raises ValueError with a sentence."""
    if not isinstance(table, Mapping):
        raise ValueError("mcpServers is a table: [mcpServers.NAME]")
    found = {}
    for name, value in table.items():
        if not SERVER_NAME.match(name):
            raise ValueError(f"{name!r} is no name of a server (1 to 32 of A-Z a-z 0-9 _ -)")
        try:
            server = msgspec.convert(value, McpServer)
        except msgspec.ValidationError as err:
            raise ValueError(f"mcpServers.{name}: {err}") from None
        if bool(server.command) == bool(server.url):
            raise ValueError(f"mcpServers.{name}: one of command and url")
        for tool, concerns in server.concerns.items():
            if not all(CONCERN.match(concern) for concern in concerns):
                raise ValueError(
                    f'mcpServers.{name}: concerns.{tool}: is a list of "path:{{argument}}", "host:{{argument}}"'
                )
        if server.url and (server.sandbox or server.net or server.read or server.write):
            raise ValueError(f"mcpServers.{name}: sandbox, net, read and write are about a program (command)")
        if server.sandbox == "none" and (server.net == "none" or server.read or server.write):
            raise ValueError(f"mcpServers.{name}: net, read and write need a sandbox")
        server = replace(server, read=_paths(server.read, folder), write=_paths(server.write, folder))
        if not server.timeout > 0:
            raise ValueError(f"mcpServers.{name}: timeout is a number of seconds")
        if not server.disabled:
            found[name] = server
    return found


def _paths(texts: list[str], folder: str) -> list[str]:
    return [os.path.join(folder, os.path.expanduser(text)) for text in texts]
