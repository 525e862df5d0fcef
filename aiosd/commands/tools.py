"""aiosd tools: lists the tools of agents, and calls one.

$ aiosd tools
NAME        SOURCE    WHAT IT DOES
calc        built in  Computes arithmetic.
fetch       built in  Fetches a text from the web. Addresses that are not public are refused.
$ aiosd tools calc expression="37 * 91"
3367
"""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

import click

from aiosd.commands import edge
from libaios.tool import result_text
from libaios.wire import CallTool, NoArgs, Sys, ToolInfo, TrustTool

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


def register(group: click.Group) -> None:
    group.add_command(tools)


def _complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of tools, for the shell's completion."""
    try:
        with edge.connect() as client:
            there: list[ToolInfo] = client.call(Sys.TOOL_LIST, NoArgs(), list[ToolInfo])
    except OSError:
        return []
    return edge.completions({tool.name: tool.description for tool in there}, incomplete)


@click.command("tools", context_settings=edge.SETTINGS, short_help="List the tools of agents, or try one.")
@click.argument("name", required=False, shell_complete=_complete)
@click.argument("arguments", nargs=-1, metavar="[KEY=VALUE]…")
@click.option("--schema", is_flag=True, help="The JSON Schema of the tool's arguments.")
@click.option("--trust", is_flag=True, help="Offer NAME again although its MCP server has changed its description.")
@click.option("--json", "as_json", is_flag=True, help="A list of objects; for a call its result as JSON.")
def tools(name: str | None, arguments: tuple[str, ...], schema: bool, trust: bool, as_json: bool) -> int:
    """List the tools that agents of the running system have; with NAME, call one as an agent would.

    A VALUE is taken as JSON where the tool wants no text. What the tool writes comes at once, its result at the end.

    \b
      aiosd tools
      aiosd tools calc expression="37 * 91"
      aiosd tools --schema fetch
      aiosd --tools mytools.py            adds functions of yours
    """
    with edge.connect() as client:
        if trust:
            if name is None:
                raise click.UsageError("--trust wants the NAME of a tool")
            client.call(Sys.TOOL_TRUST, TrustTool(name), None)
            return 0
        there = {tool.name: tool for tool in client.call(Sys.TOOL_LIST, NoArgs(), list[ToolInfo])}
        if name is None:
            print(_as_json(list(there.values())) if as_json else "\n".join(_lines(list(there.values()))))
            return 0
        if name not in there:
            raise edge.CommandFailed(f"{name}: no such tool (there are: {', '.join(there)})")
        if schema:
            print(json.dumps(there[name].parameters, indent=2))
            return 0
        given = _arguments(there[name], arguments)
        call = client.submit(Sys.TOOL_CALL, CallTool(name, given, stream=not as_json), stream=False)
        for text in client.pieces(call):
            print(text, end="", flush=True)
        result = client.result(call, Any)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        _show(result)
    return 0


def _show(result: Any) -> None:
    """Show the result. Output was shown while the tool ran; of a program's result only the exit code is left."""
    if isinstance(result, dict) and set(result) == {"output", "exit_code"}:
        if result["exit_code"]:
            print(f"aiosd: exit code {result['exit_code']}", file=sys.stderr)
    elif result is not None:
        print(result_text(result))


def _arguments(tool: ToolInfo, words: tuple[str, ...]) -> dict[str, Any]:
    properties = tool.parameters.get("properties", {})
    found: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise click.UsageError(f"{word!r} is not KEY=VALUE")
        found[key] = value if properties.get(key, {}).get("type") == "string" else _from_json(value)
    return found


def _from_json(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def _as_json(tools: list[ToolInfo]) -> str:
    import msgspec

    return msgspec.json.format(msgspec.json.encode(tools)).decode()


def _lines(tools: list[ToolInfo]) -> list[str]:
    rows = [("NAME", "SOURCE", "WHAT IT DOES")]
    rows += [(tool.name, os.path.basename(tool.source), tool.description.partition("\n")[0]) for tool in tools]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return [edge.escaped(f"{a:{widths[0]}} {b:{widths[1]}} {c}".rstrip()) for a, b, c in rows]
