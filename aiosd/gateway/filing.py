"""Cerebrum's queries of a storage: files in the agent's own space of `aios.sto`.

A root folder of the real file system is only a name here: which real folders an agent may mount is set by the person
(`--store-folders`). Folders need not be created: they exist as long as they contain files.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from aiosd.gateway import places
from aiosd.gateway.calls import ask
from aiosd.gateway.openai import fields
from aiosd.gateway.web import HttpRequest, Problem, encode
from libaios import wire
from libaios.wire import Sys

A = TypeVar("A", bound=Struct)


class StorageQuery(Struct, kw_only=True):
    query_class: Any = None
    operation_type: str
    params: dict[str, Any] = {}


def checked(args: A) -> A:
    """Check arguments that the gateway made, before they are sent to the kernel. Raises Problem."""
    try:
        return msgspec.msgpack.decode(wire.encode(args), type=type(args))
    except (msgspec.ValidationError, OverflowError) as err:
        place, text = places.of_error(str(err))
        position = re.match(r"\[(\d+)\]", place)  # arguments travel as arrays
        name = args.__struct_fields__[int(position[1])] if position is not None else ""
        raise Problem(400, f"{name}: {text}" if name else text, param=name or None) from None


async def storage(request: HttpRequest, data: dict[str, Any]) -> dict[str, Any]:
    asked = fields.read(request, data, StorageQuery)
    message = await do(request, asked.operation_type, asked.params)
    return {"response_message": message, "finished": True, "error": None, "status_code": 200}


async def do(request: HttpRequest, operation: str, params: dict[str, Any]) -> str:
    """Carry out one operation. Returns a sentence with its result. Raises Problem, OSError."""
    function = _OPERATIONS.get(operation)
    if function is None:
        raise Problem(
            400, f"operation_type: {operation[:60]!r} is none of {', '.join(_OPERATIONS)}", param="operation_type"
        )
    return await function(request, params)


def _text(params: dict[str, Any], name: str) -> str:
    value = params.get(name)
    if not isinstance(value, str):
        raise Problem(400, f"{name}: a text", param=name)
    return value


def _path(params: dict[str, Any], name: str = "file_path") -> str:
    """The path as one in the agent's own space, whatever real folder it names."""
    return _text(params, name).strip("/")


async def _mount(request: HttpRequest, params: dict[str, Any]) -> str:
    _text(params, "root_dir")
    return "files are kept in the agent's own space"


async def _create_folder(request: HttpRequest, params: dict[str, Any]) -> str:
    return f"{_path(params, 'dir_path')}: a folder is there with its first file"


async def _create(request: HttpRequest, params: dict[str, Any]) -> str:
    connection, args = request.account.connection, checked(wire.StoWrite(_path(params), b"", if_version=0))
    try:
        await ask(connection, Sys.STO_WRITE, args, wire.File)
    except BlockingIOError:  # elsewhere EAGAIN means "try again"; here it means that the file exists
        await ask(connection, Sys.STO_HISTORY, wire.StoHistory(args.path, limit=1), list[wire.Version])
        raise Problem(409, f"{args.path} is there already") from None
    return f"{args.path} is created"


async def _write(request: HttpRequest, params: dict[str, Any]) -> str:
    args = checked(wire.StoWrite(_path(params), _text(params, "content").encode()))
    file = await ask(request.account.connection, Sys.STO_WRITE, args, wire.File)
    return f"{args.path} has version {file.version}"


async def _retrieve(request: HttpRequest, params: dict[str, Any]) -> str:
    """Search files; the result is a list of them as JSON."""
    k, more = params.get("n", 5), params.get("keywords")
    words = [_text(params, "query_text"), *(str(word) for word in (more if isinstance(more, list) else [more or ""]))]
    args = checked(wire.StoSearch(" ".join(words).strip(), k if isinstance(k, int) else 5, of=""))
    found = await ask(request.account.connection, Sys.STO_SEARCH, args, list[wire.FoundFile])
    return encode([{"file_path": one.file.path, "content": one.excerpt, "score": one.score} for one in found]).decode()


async def _rollback(request: HttpRequest, params: dict[str, Any]) -> str:
    """Go back by `n` versions."""
    path, n = _path(params), params.get("n", 1)
    if params.get("time") is not None:
        raise Problem(400, "time: only by a number of versions, n", param="time")
    if not isinstance(n, int) or not 1 <= n < 1000:
        raise Problem(400, "n: how many versions to go back, from 1 to 999", param="n")
    connection = request.account.connection
    versions = await ask(connection, Sys.STO_HISTORY, checked(wire.StoHistory(path, limit=n + 1)), list[wire.Version])
    if len(versions) <= n:
        raise wire.error(errno.ENOENT, f"{path}: there are {len(versions)} versions")
    args = wire.StoRollback(path, version=versions[n].number)
    file = await ask(connection, Sys.STO_ROLLBACK, args, wire.File)
    return f"{path} is as it was in version {args.version}; that is version {file.version}"


async def _share(request: HttpRequest, params: dict[str, Any]) -> str:
    args = checked(wire.StoShare(_path(params), "group"))
    await ask(request.account.connection, Sys.STO_SHARE, args, None)
    return f"{args.path} can be read by the agent's group"


_OPERATIONS: dict[str, Callable[[HttpRequest, dict[str, Any]], Awaitable[str]]] = {
    "mount": _mount,
    "create_file": _create,
    "create_dir": _create_folder,
    "write": _write,
    "retrieve": _retrieve,
    "rollback": _rollback,
    "share": _share,
}


# ── for a model that chooses file operations ──────────────────────────────────────────────────────────────

PARSER = "You turn instructions about files into calls of the tools that you have, and do nothing else."
_PATH = {"file_path": {"type": "string", "description": "path of the file"}}
_COUNT = {"n": {"type": "integer", "minimum": 1, "maximum": 100}}


def _tool(name: str, description: str, properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = [
    _tool("create_file", "Make an empty file.", _PATH, ["file_path"]),
    _tool("create_dir", "Make a folder.", {"dir_path": {"type": "string"}}, ["dir_path"]),
    _tool("write", "Write a text into a file.", {**_PATH, "content": {"type": "string"}}, ["file_path", "content"]),
    _tool("retrieve", "Find files by what is in them.", {"query_text": {"type": "string"}, **_COUNT}, ["query_text"]),
    _tool("rollback", "Go back by n versions of a file.", {**_PATH, **_COUNT}, ["file_path", "n"]),
    _tool("share", "Let the group read a file.", _PATH, ["file_path"]),
]
