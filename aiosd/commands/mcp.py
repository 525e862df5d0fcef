"""aiosd mcp: the calls of a running aiosd as tools of an MCP server, for other programs.

$ cat mcp.json
{"mcpServers": {"aiosd": {"command": "aiosd", "args": ["mcp"]}}}
"""

from __future__ import annotations

import sys

import click

from aiosd.commands import edge


def register(group: click.Group) -> None:
    group.add_command(mcp)


@click.command("mcp", context_settings=edge.SETTINGS, short_help="Serve aiosd to other programs, as an MCP server.")
@click.option("--only", metavar="NAMES", help="Offer only these, separated by commas: ps,logs,search_notes")
def mcp(only: str | None) -> int:
    """Serve the running aiosd as an MCP server on stdin and stdout, for programs that take one: an editor, a chat.

    Such a program has your rights: it starts, lists and ends agents (spawn, ps, wait, kill, logs), and has the tools
    that agents have, with the notes and stored files that are yours. Tools of MCP servers are not passed on.

    \b
      {"mcpServers": {"aiosd": {"command": "aiosd", "args": ["mcp"]}}}
      aiosd mcp --only ps,logs             only calls that change nothing
    """
    try:
        from aiosd.commands import mcpserver
    except ModuleNotFoundError as err:
        if not (err.name or "").startswith("mcp"):
            raise
        raise edge.CommandFailed("this needs packages that are not installed: pip install 'aiosd[mcp]'") from None
    names = None if only is None else frozenset(name.strip() for name in only.split(",") if name.strip())
    with edge.connect() as client:  # a system that does not run is reported where people see it
        there = mcpserver.known(client)
    if names is not None and (unknown := sorted(names.difference(there))):
        edge.complain("aiosd", f"--only: no such tool: {', '.join(unknown)} (there are: {', '.join(there)})")
    if sys.stdin.isatty():
        edge.complain("aiosd", "waits for an MCP client on stdin, but that is a terminal; Ctrl-C ends it")
    return mcpserver.serve(names)
