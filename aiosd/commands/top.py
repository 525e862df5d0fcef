"""aios-top: shows a running system, live.

$ aios-top -b
aios-top 14:05:22, up 12 min 3 s, policy fair (64 tokens or 10 s)
agents 3: 2 R, 1 S, at most 333 at once; 2 open calls
nano  slots 2 of 32  [##..................]  2 running  0 waiting  0 preempted
      310.2 tokens/s  prefill 4,100/s  step 6.4 ms  prefix hits 67%
      contexts: slot 2 (96.0K), ram 3 (120K of 1.0G), disk 0 (0 of 2.0G)
2 CPUs 97% busy, load 1.80 1.10 0.90, memory 3.2G of 15.6G, disk 76.0G free

PID STAT NI TOK/S TOKENS CACHED CTX  MEM %CPU    TIME NAME
  7 R     0 155.1   1412    512 380 9.1M  1.0 0:00.31 planner
  8 R     5 155.1    120      0 140 8.7M  0.5 0:00.05 worker
  6 S     0   0.0     98      0   0 8.7M  0.0 0:00.04 clerk
"""

from __future__ import annotations

import sys
import time

import click

from aiosd.commands import agents, edge, picture, table
from aiosd.commands.picture import Sample, View
from libaios.client import Client
from libaios.wire import ProcInfo, Ps, Status, Sys

EXAMPLES = """
  aios-top                      live, until q; h shows the keys
  aios-top --sort mem           the largest first
  aios-top -b                   one plain picture
  aios-top -b -n 5 -d 1         five, a second apart
  aios-top -C planner           the agents named planner alone
"""


@edge.new(
    click.Command,
    "Show a running system: what the models do, where contexts lie, and the agents, sorted by what they use.\n\n"
    "TOK/S: tokens generated per second since the last picture. TOKENS: prompt tokens computed and tokens generated. "
    "CACHED: prompt tokens that were not computed again. MEM: PSS, sampled. A model's tokens/s are those of ten "
    "seconds. prefix hits: calls whose prompt began with what the model had already computed. guesses: how many of the "
    "tokens guessed ahead (--lookahead) were right. While it is live the keys h or ? show the others, and q ends it.",
    "[OPTIONS]",
    EXAMPLES,
)
@click.option("-b", "--batch", is_flag=True, help="Print plain text on stdout, once or -n times.")
@click.option("-n", "--iterations", type=edge.Whole(min=1), metavar="N", help="End after N updates.")
@click.option(
    "-d", "--delay", type=edge.SecondsType(0.1, 3600), default=2.0, metavar="S", help="Seconds between updates (2)."
)
@click.option("-e", "-A", "--all", "system", is_flag=True, help="aiosd's own processes too.")
@click.option(
    "--sort", type=click.Choice(picture.ORDER), default="rate", metavar="COL", help="Sort by this column (rate)."
)
@click.option(
    "-C",
    "--name",
    "names",
    multiple=True,
    metavar="NAME",
    help="Only agents of these names.",
    shell_complete=agents.complete_names,
)
def command(batch: bool, iterations: int | None, delay: float, system: bool, sort: str, names: tuple[str, ...]) -> int:
    wanted = [name for argument in names for name in argument.split(",") if name]
    view = View(sort=sort, system=system, names=wanted)
    if batch:
        with edge.connect() as client:
            _require_one(client, wanted)
            _batch(client, view, iterations or 1, delay)
        return 0
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise edge.CommandFailed("stdin or stdout is no terminal; for plain pictures use -b")
    from aiosd.commands import screen  # curses, only when it is needed

    with edge.connect() as client:
        _require_one(client, wanted)
        return screen.run(client, view, delay, iterations)


def _require_one(client: Client, names: list[str]) -> None:
    if names and not any(agents.named(client, name) for name in names):
        raise edge.CommandFailed(f"{', '.join(names)}: no such agent")


def _batch(client: Client, view: View, iterations: int, delay: float) -> None:
    width = table.line_width() or 1 << 16
    old: Sample | None = None
    for number in range(iterations):
        if number:
            time.sleep(delay)
            print()
        new = sample(client)
        print("\n".join(picture.plain(new, old, view, time.time(), width)), flush=True)
        old = new


def sample(client: Client) -> Sample:
    """Request a sample from the system, and wait for the replies."""
    asked = client.submit(Sys.STATUS, Status())
    found = client.call(Sys.PS, Ps(all=True), list[ProcInfo])
    status = client.result(asked, dict)
    from aiosd.commands import machine

    return Sample(time.monotonic(), status, found, machine.one_line(machine.measure(status.get("home", "/"))))
