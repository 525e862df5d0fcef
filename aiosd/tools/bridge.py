"""A worker whose tools are those of an MCP server, through the `mcp` package (extra `mcp`).

    python -m aiosd.tools.bridge FD NAME [IN,OUT,REASON,LEASE]

The first frame is the server's record (`spec.McpServer`); for the others see `worker`. The server is no child of this
process: the supervisor has forked it, with pipes to here (`tools.servers`), and kills it when this process ends, which
closes the server's lease. The server is not trusted: names are converted to ones that models can write, of two tools
with one name the first counts, malformed tools are left out; lines, errors and results have a limit (`mcpstreams`).
When the server reports that its tools have changed they are described anew, once in RELIST_S at most.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import resource
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any

from msgspec import msgpack
from msgspec.structs import replace

from aiosd.kin import adopt_orphans, die_with_parent
from aiosd.tools.messages import Described, Done, Run, Tool, Wrote
from aiosd.tools.spec import MEMORY_BYTES, McpServer
from aiosd.tools.worker import LIMITS, MESSAGE_BYTES, limit, send
from libaios.stream import FrameSocket

if TYPE_CHECKING:
    from mcp import Client

OUTPUT_BYTES = 1 << 20
MOST_TOOLS = 512
MOST_PAGES = 100
RELIST_S = 1.0


def main(fd: str, name: str, ends: str = "") -> int:
    adopt_orphans()
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    limit(*LIMITS, (resource.RLIMIT_DATA, MEMORY_BYTES))
    frames = FrameSocket(socket.socket(fileno=int(fd)))
    pipes = [int(end) for end in ends.split(",") if end]
    for one in (int(fd), *pipes):
        os.set_inheritable(one, False)
    sys.stdin = open(os.devnull)  # noqa: SIM115 - for the whole life of the process
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - the server's noise
    running: list[Run] = []  # the call, if there is one
    try:
        payload, _ = frames.recv_blocking()
        asyncio.run(_serve(frames, name, msgpack.decode(payload, type=McpServer), pipes, running))
    except (EOFError, ConnectionError):
        return 0
    except ModuleNotFoundError as err:
        send(frames, Described([], f"{err}: MCP servers need `pip install 'aiosd[mcp]'`"))
    except BaseException as err:  # a server may cause any error
        lost = Done(None, errno.EIO, _reason(err), spent=True)
        send(frames, lost if running else Described([], lost.message))
    return 1


async def _serve(frames: FrameSocket, name: str, server: McpServer, pipes: list[int], running: list[Run]) -> None:
    from mcp import Client

    from aiosd.tools.mcpstreams import Streams

    changed = asyncio.Event()
    streams = Streams(server, pipes)

    async def on_message(message: Any) -> None:
        if "list_changed" in str(getattr(message, "method", "")):
            changed.set()

    async with Client(streams, message_handler=on_message) as client:
        names = await _describe(frames, client, name, server)
        relist = asyncio.create_task(_pause_and(changed))
        while True:
            payload = await _next(frames, relist)
            if payload is not None:
                request = msgpack.decode(payload, type=Run)
                running.append(request)
                done = await _call(frames, client, names[request.tool], request.arguments)
                running.clear()
                if done.spent:  # the server is gone: a new worker will start a new one
                    send(frames, replace(done, message=streams.fault or done.message))
                    return
                send(frames, done)
            if relist.done():
                changed.clear()
                names |= await _describe(frames, client, name, server)  # a call of an older tool may be on its way
                relist = asyncio.create_task(_pause_and(changed))


async def _pause_and(changed: asyncio.Event) -> None:
    await asyncio.sleep(RELIST_S)
    await changed.wait()


async def _next(frames: FrameSocket, relist: asyncio.Task[None]) -> bytes | None:
    """The next frame of the toolbox, or None when the tools are to be listed anew. Raises EOFError."""
    loop = asyncio.get_running_loop()
    while not relist.done():
        found = frames.receive(1)
        if found:
            return found[0][0]
        readable = asyncio.Event()
        loop.add_reader(frames.fileno(), readable.set)
        waiting = asyncio.create_task(readable.wait())
        try:
            await asyncio.wait((waiting, relist), return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
            loop.remove_reader(frames.fileno())
    return None


# ── the list of tools ─────────────────────────────────────────────────────────────────────────────────────


async def _describe(frames: FrameSocket, client: Client, name: str, server: McpServer) -> dict[str, str]:
    """Send the descriptions of the server's tools. Returns the server's name of each tool."""
    names: dict[str, str] = {}
    tools: list[Tool] = []
    for entry in await _listed(client):
        shown = tool_name(name, entry["name"])
        if shown in names:
            continue  # the first one of a name counts
        names[shown] = entry["name"]
        tools.append(
            Tool(
                shown,
                entry.get("description") or "",
                entry["inputSchema"],
                time_s=server.timeout,
                memory_bytes=MEMORY_BYTES,
                output_bytes=OUTPUT_BYTES,
                writes=(f"server:{name}",),  # the server is one process, with one call at a time
                concerns=tuple(server.concerns.get(entry["name"], ())),
                asks=_is_destructive(entry),
            )
        )
    send(frames, Described(tools))
    return names


def _is_destructive(entry: dict[str, Any]) -> bool:
    """Whether the server marks the tool as destructive. (That a server marks a tool as harmless does not count.)"""
    annotations = entry.get("annotations")
    return isinstance(annotations, dict) and annotations.get("destructiveHint") is True


async def _listed(client: Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    cursor: str | None = None
    for _ in range(MOST_PAGES):
        page = await client.list_tools(cursor=cursor)
        for tool in page.tools:
            entry = tool.model_dump(mode="json", by_alias=True, exclude_none=True)
            if isinstance(entry.get("inputSchema"), dict) and len(found) < MOST_TOOLS:
                found.append(entry)
        cursor = page.next_cursor
        if not cursor:
            break
    return found


def tool_name(server: str, tool: str) -> str:
    """The tool's name here: `server__tool`, at most 64 characters, as the APIs of models allow."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", f"{server}__{tool}")[:64]


# ── calls ─────────────────────────────────────────────────────────────────────────────────────────────────


async def _call(frames: FrameSocket, client: Client, name: str, arguments: dict[str, Any]) -> Done:
    async def on_progress(progress: float, total: float | None, message: str | None) -> None:
        if message:
            send(frames, Wrote(message[:MESSAGE_BYTES] + "\n"))

    from mcp import MCPError
    from mcp_types import CONNECTION_CLOSED

    try:
        result = await client.call_tool(name, arguments, progress_callback=on_progress)
    except Exception as err:  # any error of a server is the result of the call
        refused = isinstance(err, MCPError) and err.code != CONNECTION_CLOSED
        return Done(None, errno.EREMOTEIO if refused else errno.EIO, _reason(err), spent=not refused)
    blocks = [block.model_dump(mode="json", by_alias=True, exclude_none=True) for block in result.content]
    text = "\n".join(block["text"] for block in blocks if block.get("type") == "text")
    if result.is_error:
        return Done(None, errno.EREMOTEIO, text[:MESSAGE_BYTES] or "the server gives no reason")
    if all(block.get("type") == "text" for block in blocks):
        return _bounded(text)
    return _bounded(blocks)


def _bounded(result: Any) -> Done:
    size = len(msgpack.encode(result))
    if size > OUTPUT_BYTES:
        return Done(None, errno.EMSGSIZE, f"a result of {size} bytes; {OUTPUT_BYTES} are allowed")
    return Done(result)


def _reason(err: BaseException) -> str:
    """The message of an exception; of a group that of its first one."""
    while isinstance(err, BaseExceptionGroup) and err.exceptions:
        err = err.exceptions[0]
    return f"{type(err).__name__}: {err}"[:MESSAGE_BYTES]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
