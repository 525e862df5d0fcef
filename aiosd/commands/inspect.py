"""aios-inspect: all that the kernel knows about agents, as JSON.

$ aios-inspect planner | jq '.[0].budgets'
"""

from __future__ import annotations

from typing import Any

import click

from aiosd.commands import agents, edge
from libaios.wire import PidArgs, Sys

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
                found.append(client.call(Sys.INSPECT, PidArgs(agents.newest(client, word)), dict[str, Any]))
            except edge.Failed as err:
                edge.complain("aios-inspect", str(err))
                failed = True
            except (ProcessLookupError, PermissionError) as err:
                edge.complain("aios-inspect", edge.reason_about(word, err))
                failed = True
    print(json.format(json.encode(found)).decode())
    return 1 if failed else 0
