"""aios-inspect: all that the kernel knows about agents, as JSON.

$ aios-inspect planner | jq '.[0].budgets'
"""

from __future__ import annotations

from typing import Any

import click

from aiosd.commands import agents, edge
from libaios.client import Client
from libaios.wire import MemStats, PidArgs, Sys

STORE_S = 2.0  # for what the store tells

EXAMPLES = """
  aios-inspect 7                agent 7, dead or alive
  aios-inspect planner worker   the newest agent of each name
"""


@edge.new(
    click.Command,
    "Print what is known of agents, live or among the last dead, as a JSON list. Exits with 1 when one of them is "
    "unknown.",
    "",
    EXAMPLES,
)
@click.argument("words", nargs=-1, required=True, metavar="PID|NAME...", shell_complete=agents.complete)
def command(words: tuple[str, ...]) -> int:
    from msgspec import json

    found: list[dict[str, Any]] = []
    failed = False
    with edge.connect() as client:
        for word in words:
            try:
                agent = client.call(Sys.INSPECT, PidArgs(agents.newest(client, word)), dict[str, Any])
                found.append({**agent, "memory": _memory(client, agent)})
            except edge.Failed as err:
                edge.complain("aios-inspect", str(err))
                failed = True
            except (ProcessLookupError, PermissionError) as err:
                edge.complain("aios-inspect", edge.reason_about(word, err))
                failed = True
    print(json.format(json.encode(found)).decode())
    return 1 if failed else 0


def _memory(client: Client, agent: dict[str, Any]) -> dict[str, Any] | None:
    """What its notes take, and how often they were found in memory. None: the store does not answer, or this caller may
    not ask."""
    from aiosd.link import Caller
    from aiosd.store import owners

    owner = owners.own(Caller(*(agent[field] for field in ("pid", "uid", "name", "named", "group"))))
    try:
        return dict(client.call(Sys.MEM_STATS, MemStats(owner), dict[str, Any], timeout=STORE_S))
    except (PermissionError, TimeoutError):
        return None
