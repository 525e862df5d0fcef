"""aios-inspect: all that the kernel knows about agents, as JSON; with --why, why a sandbox allows or denies a path or
host.

$ aios-inspect planner | jq '.[0].budgets'
"""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from aiosd.commands import agents, edge
from libaios.client import Client
from libaios.wire import MemStats, PidArgs, Sys

STORE_S = 2.0  # how long to wait for the store's figures

EXAMPLES = """
  aios-inspect 7                agent 7, dead or alive
  aios-inspect planner worker   the newest agent of each name
  ls "$(aios-inspect -w agent)" what that agent has left in its workspace
  aios-inspect 7 --why ~/notes  whether agent 7 may use that file, and why
  aios-inspect 7 --why https://example.org   the same for a host
"""


@edge.new(
    click.Command,
    "Print what is known of agents, live or among the last dead, as a JSON list. Exits with 1 when one of them is "
    "unknown.",
    "",
    EXAMPLES,
)
@click.option(
    "--why", "path", metavar="PATH|URL", help="Explain what its sandbox permits for a file, a folder or a host."
)
@click.option("-w", "--workspace", is_flag=True, help="Print only its workspace: its home in the sandbox.")
@click.argument("words", nargs=-1, required=True, metavar="PID|NAME...", shell_complete=agents.complete)
def command(words: tuple[str, ...], path: str | None, workspace: bool) -> int:
    from msgspec import json

    found: list[dict[str, Any]] = []
    failed = False
    with edge.connect() as client:
        for word in words:
            try:
                agent = client.call(Sys.INSPECT, PidArgs(agents.newest(client, word)), dict[str, Any])
                if path is not None:
                    _explain(agent, path)
                    continue
                if workspace:
                    print(_workspace(agent))
                    continue
                found.append({**agent, "memory": _memory(client, agent)})
            except edge.CommandFailed as err:
                edge.complain("aios-inspect", str(err))
                failed = True
            except (ProcessLookupError, PermissionError) as err:
                edge.complain("aios-inspect", edge.reason_about(word, err))
                failed = True
    if path is None and not workspace:
        print(json.format(json.encode(found)).decode())
    return 1 if failed else 0


def _workspace(agent: dict[str, Any]) -> str:
    if agent["box"] is None:
        raise edge.CommandFailed(f"{agent['pid']}: it is in no sandbox, and has no workspace")
    return str(agent["box"]["workspace"])


def _explain(agent: dict[str, Any], named: str) -> None:
    """Print whether and why the agent's sandbox allows a path, or the host of a URL."""
    from aiosd.sandbox import plan, why
    from aiosd.sandbox.box import Box

    is_url = "://" in named
    path = named if is_url else os.path.realpath(os.path.expanduser(named))
    confined = agent["box"]
    print(f"{edge.escaped(path)}, for agent {agent['pid']} ({confined['level'] if confined else 'not confined'})")
    if confined is None:
        print("  it has all the rights of the user")
        return
    common = plan.common_rules(sys.path)
    try:
        box = Box(**confined)
        found = [why.of_host(path, box)] if is_url else why.findings(path, box, plan.machine(common), common)
    except ValueError as err:
        raise edge.CommandFailed(f"--why: {err}") from None
    for one in found:
        print(f"  {one.deed:6}{'yes' if one.allowed else 'no':5}{edge.escaped(one.why)}")
    group = f'[[group]] "{agent["group"]}"'
    for option in dict.fromkeys(one.remedy for one in found if one.remedy):
        key = option.split()[0].removeprefix("--")
        print(f"  to allow it: aios-run {edge.escaped(option)}, or {key} of {edge.escaped(group)} in aiosd.toml")


def _memory(client: Client, agent: dict[str, Any]) -> dict[str, Any] | None:
    """The size of its notes, and how often they were found in memory. None: the store does not answer, or this caller
    may not read that."""
    from aiosd.ipc.link import Caller
    from aiosd.store import owners

    owner = owners.own(Caller(*(agent[field] for field in ("pid", "uid", "name", "named", "group"))))
    try:
        return dict(client.call(Sys.MEM_STATS, MemStats(owner), dict[str, Any], timeout=STORE_S))
    except (PermissionError, TimeoutError):
        return None
