"""Carries an MCP server's messages to the `mcp` package: over the pipes of a process, or over HTTP.

The package's own code for pipes has no limit for a line, and processes a long line again for each piece that comes; and
one malformed tool makes it refuse the whole list. So pipes are read here, and malformed tools are left out for both.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from typing import Any

from mcp.client.streamable_http import streamable_http_client
from mcp.shared.message import SessionMessage
from mcp_types import JSONRPCResponse, Tool, jsonrpc_message_adapter

from aiosd.tools.spec import McpServer

LINE_BYTES = 16 << 20
REASON_BYTES = 4096
LEAVE_S = 1.0  # the time that a server has to end after its input has ended


class NotStarted(Exception):
    """The server's program cannot be started; the message has the reason."""


async def _reader(fd: int, limit: int) -> asyncio.StreamReader:
    reader = asyncio.StreamReader(limit)
    protocol = asyncio.StreamReaderProtocol(reader)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, os.fdopen(fd, "rb", 0))
    return reader


class Streams:
    """A transport for `mcp.Client`. `fault`: why it has ended, if the server is to blame; `dropped`: the number of
    malformed tools in the server's last list. `pipes`: for a server that is a program, as the bridge gets them."""

    def __init__(self, server: McpServer, pipes: list[int]) -> None:
        self._server = server
        self._pipes = pipes
        self._stack = contextlib.AsyncExitStack()
        self.fault = ""
        self.dropped = 0

    async def __aenter__(self) -> tuple[Any, Any]:
        if self._server.url:
            reading, writing = await self._stack.enter_async_context(self._http())
            return _Reading(self._cleaned(reading)), writing
        reader, writer = await self._stack.enter_async_context(self._process())
        return _Reading(self._cleaned(self._lines(reader))), _Writing(writer)

    async def __aexit__(self, *error: Any) -> None:
        await self._stack.aclose()

    def _http(self) -> Any:
        if not self._server.headers:
            return streamable_http_client(self._server.url)
        import httpx2

        client = httpx2.AsyncClient(headers=self._server.headers)
        return streamable_http_client(self._server.url, http_client=client)

    @contextlib.asynccontextmanager
    async def _process(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        stdin, stdout, reason, _ = self._pipes
        reader, why = await _reader(stdout, LINE_BYTES), await _reader(reason, REASON_BYTES)
        if words := (await why.read()).decode(errors="replace"):  # the stream ends when the program begins
            raise NotStarted(words)
        loop = asyncio.get_running_loop()
        transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, os.fdopen(stdin, "wb", 0))
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        try:
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(TimeoutError, ValueError, OSError):  # time to end in order, before it is killed
                async with asyncio.timeout(LEAVE_S):
                    while await reader.read(LINE_BYTES):
                        pass

    async def _lines(self, reader: asyncio.StreamReader) -> AsyncIterator[SessionMessage]:
        """The messages that the server writes; all other lines are ignored."""
        while True:
            try:
                line = await reader.readline()
            except ValueError:
                self.fault = f"the server wrote a line of more than {LINE_BYTES >> 20} MB"
                return
            if not line:
                return
            with contextlib.suppress(ValueError):
                yield SessionMessage(jsonrpc_message_adapter.validate_json(line, by_name=False))

    async def _cleaned(self, messages: Any) -> AsyncIterator[SessionMessage | Exception]:
        async for message in messages:
            if isinstance(message, SessionMessage) and isinstance(message.message, JSONRPCResponse):
                result = message.message.result
                if isinstance(result.get("tools"), list):
                    result["tools"], self.dropped = _well_formed(result["tools"])
            yield message


def _well_formed(tools: list[Any]) -> tuple[list[Any], int]:
    """The well-formed tools, and the number of others."""
    kept = [tool for tool in tools if _is_tool(tool)]
    return kept, len(tools) - len(kept)


def _is_tool(entry: Any) -> bool:
    try:
        Tool.model_validate(entry, by_name=False)
    except ValueError:
        return False
    return isinstance(entry, dict) and isinstance(entry.get("inputSchema"), dict)


class _Reading:
    """An iterator with the interface of a stream that the package reads."""

    def __init__(self, messages: AsyncIterator[SessionMessage | Exception]) -> None:
        self._messages = messages

    def __aiter__(self) -> _Reading:
        return self

    async def __anext__(self) -> SessionMessage | Exception:
        return await anext(self._messages)

    async def receive(self) -> SessionMessage | Exception:
        return await anext(self._messages)

    async def aclose(self) -> None:
        pass

    async def __aenter__(self) -> _Reading:
        return self

    async def __aexit__(self, *error: Any) -> None:
        pass


class _Writing:
    """The input of a process with the interface of a stream that the package writes."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._input = writer

    async def send(self, message: SessionMessage) -> None:
        text = message.message.model_dump_json(by_alias=True, exclude_unset=True)
        self._input.write(text.encode() + b"\n")
        await self._input.drain()

    async def aclose(self) -> None:
        self._input.close()

    async def __aenter__(self) -> _Writing:
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self.aclose()
