"""The MCP server of `aiosd mcp`: calls about processes (`mcpcalls`), and the tools that agents have.

Only the built-in tools and those of a person's files are offered. MCP servers of aiosd itself are not: the other
program can configure them itself, and one of them might lead back here.
"""

from __future__ import annotations

import asyncio
import errno
import signal
import sys
from importlib.metadata import version
from typing import Any

import msgspec
from mcp.server import Server, ServerRequestContext
from mcp.server.stdio import stdio_server
from mcp_types import (
    CallToolRequestParams,
    CallToolResult,
    ListToolsResult,
    PaginatedRequestParams,
    TextContent,
    ToolAnnotations,
)
from mcp_types import Tool as McpTool

from aiosd.commands import mcpcalls
from aiosd.tools.definition import Function, functions_of
from aiosd.tools.spec import MCP
from libaios import agent, aio
from libaios.client import Client
from libaios.tool import result_text
from libaios.wire import NoArgs, Sys, ToolInfo

McpContext = ServerRequestContext[Any]

#: Calls that change nothing, for programs that ask a person before other calls.
READING = frozenset((
    "ps", "wait", "logs", "calc", "read_file", "list_files", "recall", "search_notes", "list_notes", "list_stored",
    "read_stored", "stored_history",
))  # fmt: skip
ABOUT = "Agents of aiosd, which runs on this machine: start, list, end them; their tools, with notes and stored files."


def known(client: Client) -> list[str]:
    """The names of all that can be offered."""
    tools = client.call(Sys.TOOL_LIST, NoArgs(), list[ToolInfo])
    return sorted({*functions_of(vars(mcpcalls)), *(tool.name for tool in tools if not tool.source.startswith(MCP))})


def serve(only: frozenset[str] | None) -> int:
    """Serve on stdin and stdout until stdin ends. `only`: the names that are offered; None: all."""
    functions = functions_of(vars(mcpcalls))

    async def on_list(context: McpContext, params: PaginatedRequestParams | None) -> ListToolsResult:
        found = [_described(one.tool.name, one.tool.description, one.tool.parameters) for one in functions.values()]
        for tool in await _tools():
            if tool.name not in functions:
                found.append(_described(tool.name, tool.description, tool.parameters))
        return ListToolsResult(tools=[one for one in found if only is None or one.name in only])

    async def on_call(context: McpContext, params: CallToolRequestParams) -> CallToolResult:
        if only is not None and params.name not in only:
            return _result(f"no such tool: {params.name}", failed=True)
        try:
            return _result(result_text(await _call(functions, params.name, params.arguments or {})))
        except msgspec.ValidationError as err:
            return _result(f"{params.name}: {err}", failed=True)
        except OSError as err:
            if isinstance(err, ConnectionError) or err.errno == errno.ENOTCONN:
                agent.reset()  # aiosd may run again when the next call comes
            return _result(err.strerror or str(err), failed=True)

    server: Server[Any] = Server(
        "aiosd", version=version("aiosd"), instructions=ABOUT, on_list_tools=on_list, on_call_tool=on_call
    )
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as an exception it would wait for the thread that reads stdin
    asyncio.run(_serve(server))
    return 0


async def _serve(server: Server[Any]) -> None:
    async with stdio_server() as (reading, writing):
        sys.stdout = sys.stderr  # from here on stdout is only for messages
        await server.run(reading, writing, server.create_initialization_options())


async def _call(functions: dict[str, Function], name: str, arguments: dict[str, Any]) -> Any:
    """Make one call. Raises OSError, msgspec.ValidationError."""
    if name in functions:
        return await functions[name].run(arguments)
    if name not in [tool.name for tool in await _tools()]:
        raise FileNotFoundError(errno.ENOENT, f"no such tool: {name}")
    return await aio.tool.call(name, arguments)


async def _tools() -> list[ToolInfo]:
    return [tool for tool in await aio.tool.list() if not tool.source.startswith(MCP)]


def _described(name: str, description: str, parameters: dict[str, Any]) -> McpTool:
    hints = ToolAnnotations(read_only_hint=name in READING)
    return McpTool(name=name, description=description, input_schema=parameters, annotations=hints)


def _result(text: str, failed: bool = False) -> CallToolResult:
    return CallToolResult(content=[TextContent(type="text", text=text)], is_error=failed)
