"""aios-renice: changes the nice values of agents.

$ aios-renice 5 planner
7: old nice 0, new nice 5
"""

from __future__ import annotations

import errno
import re

import click

from aiosd.commands import agents, edge
from libaios.client import Client
from libaios.wire import NiceArgs, Sys

EXAMPLES = """
  aios-renice 5 planner         all agents named planner
  aios-renice -n -5 7 8         agents 7 and 8, ahead of the others
  aios-renice --relative 1 7    one step nicer than it is
"""

NICE = edge.Whole(-20, 19, clamp=True)  # values beyond are taken for the nearest, as by renice(1)


class ReniceCommand(click.Command):
    """Accepts a negative value, which would look like an option: `aios-renice -5 7`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and re.fullmatch(r"-[0-9]+", args[0]):
            args = ["-n", *args]
        return super().parse_args(ctx, args)


@edge.new(
    ReniceCommand,
    "Set the nice value of agents, from -20 (goes first) to 19 (lets others go first); what is beyond is taken for the "
    "nearest. A NAME stands for all live agents of that name.",
    "[-n] NICE",
    EXAMPLES,
)
@click.option("-n", "--priority", "absolute", type=NICE, metavar="NICE", help="The new value.")
@click.option("--relative", type=edge.Whole(-39, 39), metavar="STEP", help="Add STEP to the present value.")
@click.argument("words", nargs=-1, metavar="PID|NAME...", shell_complete=agents.complete)
def command(absolute: int | None, relative: int | None, words: tuple[str, ...]) -> int:
    if absolute is not None and relative is not None:
        raise click.UsageError("-n and --relative exclude each other")
    if absolute is None and relative is None:
        if not words:
            raise click.UsageError("a nice value is missing")
        try:
            absolute = int(words[0])
        except ValueError:
            raise click.UsageError(f"{words[0]!r} is no nice value") from None
        absolute = max(-20, min(19, absolute))
        words = words[1:]
    if not words:
        raise click.UsageError("a pid or a name is missing")
    value = relative if absolute is None else absolute
    assert value is not None
    with edge.connect() as client:
        results = [_renice(client, word, value, relative is not None) for word in words]
    return 0 if all(results) else 1


def _renice(client: Client, word: str, value: int, relative: bool) -> bool:
    pids = agents.live(client, word)
    done = bool(pids)
    if not pids:
        edge.complain("aios-renice", f"{word}: no such agent")
    for pid in pids:
        try:
            old = client.call(Sys.NICE, NiceArgs(pid), int)
            wanted = max(-20, min(19, old + value)) if relative else value
            new = client.call(Sys.NICE, NiceArgs(pid, wanted), int)
        except OSError as err:
            if err.errno == errno.ESRCH and str(pid) != word:
                continue  # it ended since the agents of that name were listed
            edge.complain("aios-renice", edge.reason_about(agents.subject(word, pid, pids), err))
            done = False
        else:
            print(f"{pid}: old nice {old}, new nice {new}")
    return done
