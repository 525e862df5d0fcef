"""aios-ps: lists the agents of a running system, as ps lists processes.

$ aios-ps -e
PID PPID STAT NI CALLS TOKENS      CTX   MEM    TIME NAME
  1    0 S     0     0      0        0 24.1M 0:00.40 supervisor
  3    1 S     0     0      0        0 31.6M 0:00.92 kernel
  2    1 S     0     0      0        0 52.0M 0:03.18 llm
  7    1 R     0     3    412 380/slot  9.1M 0:00.31 planner

CTX is how many tokens of context the model keeps for the agent, and where: in a slot, in memory (ram) or on disk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from aiosd.commands import agents, edge, table
from libaios.client import Client
from libaios.wire import ProcInfo, Ps, Sys

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

EXAMPLES = """
  aios-ps                       your live agents
  aios-ps -e --forest           everything, children below their parents
  aios-ps -f -p 7,8             agents 7 and 8, with more columns
  aios-ps -C planner -o pid=    the pids of the agents named planner
  aios-ps -e --sort -tokens     those with most tokens first
  aios-ps --dead --sort -pid    the dead as well, the last one first
  aios-ps -e --watch            live, every 2 seconds, until q or Ctrl-C
  aios-ps --json                for programs
"""


class PsCommand(click.Command):
    """Accepts words that are no options, to report what the user probably meant: `aios-ps aux`, `aios-ps 7`."""

    allow_extra_args = True

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        if ctx.args and not ctx.resilient_parsing:
            raise click.UsageError(_hint(ctx.args[0]))
        return rest


def _hint(word: str) -> str:
    if word.isascii() and word.isdigit():
        return f"{word}: pids go with -p: aios-ps -p {word}"
    if set(word) <= set("auxefw"):
        return f"{word}: options begin with -: for all agents aios-ps -e, with more columns aios-ps -ef"
    return f"{word}: names go with -C: aios-ps -C {word}"


def _complete_columns(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return edge.completions({name: column.header for name, column in table.COLUMNS.items()}, incomplete, listed=True)


@edge.new(
    PsCommand,
    "List agents: the caller's live ones, unless -e, -p, -C or --dead say otherwise.\n\n"
    f"Columns for -o and --sort: {' '.join(table.COLUMNS)}.\n\n"
    "STAT: R on the LLM or computing, Q waiting for the LLM, S sleeping, D waiting for tool or store, T stopped, "
    "Z dead and not yet waited for, X dead. TOKENS: prompt tokens computed and tokens generated. CTX: tokens of "
    "context that the model keeps for the agent, and where they lie: slot, ram or disk. MEM: memory, where several "
    "share a page each its part (PSS), sampled, with what its calls of tools hold; TIME likewise. Lines of aiosd's own "
    "processes count what these have started. Exits with 1 when nothing was found for -p or -C.",
    "[OPTIONS]",
    EXAMPLES,
)
@click.option("-e", "-A", "--all", "everything", is_flag=True, help="All agents, zombies and aiosd's own processes.")
@click.option("--dead", is_flag=True, help="Ended agents too, as many as the history has, and exit codes.")
@click.option("-f", "--full", is_flag=True, help="More columns.")
@click.option(
    "-p",
    "--pid",
    "pids",
    multiple=True,
    metavar="PIDS",
    help="These pids: 7,8 or '7 8'.",
    shell_complete=agents.complete_pids,
)
@click.option(
    "-C",
    "--name",
    "names",
    multiple=True,
    metavar="NAMES",
    help="Agents with these names: a,b.",
    shell_complete=agents.complete_names,
)
@click.option(
    "-o",
    "--format",
    "columns",
    multiple=True,
    metavar="COLS",
    help="pid,stat=STATE; pid= drops the header.",
    shell_complete=_complete_columns,
)
@click.option(
    "--sort",
    "keys",
    multiple=True,
    metavar="[-]COL",
    help="Sort by a column, - for the largest first.",
    shell_complete=_complete_columns,
)
@click.option("--no-headers", is_flag=True, help="No line of headers.")
@click.option(
    "--json", "as_json", is_flag=True, help="For programs: a list of objects, with all fields or those of -o."
)
@click.option("--forest", is_flag=True, help="Children below their parents.")
@click.option(
    "--watch",
    type=edge.SecondsType(0.1, 86400),
    is_flag=False,
    flag_value=2.0,
    metavar="[S]",
    help="Repeat every S seconds (2), in place.",
)
def command(
    everything: bool,
    dead: bool,
    full: bool,
    pids: tuple[str, ...],
    names: tuple[str, ...],
    columns: tuple[str, ...],
    keys: tuple[str, ...],
    no_headers: bool,
    as_json: bool,
    forest: bool,
    watch: float | None,
) -> int:
    wanted = _pids(pids)
    try:
        usual = table.FULL if full else table.SHORT
        chosen = table.layout(columns or [usual.replace(" stat ", " stat exit ") if dead else usual])
        order = table.sort_keys(keys)
    except ValueError as err:
        raise click.UsageError(str(err)) from None
    if watch is not None and as_json:
        raise click.UsageError("--watch and --json exclude each other")

    def find(client: Client) -> list[ProcInfo]:
        found = _find(client, everything, dead, wanted, names)
        table.sort(found, order)
        return found

    def picture(found: list[ProcInfo]) -> list[str]:
        shown, branches = table.forest(found) if forest else (found, [])
        return table.render(shown, chosen, branches=branches, headers=not no_headers, width=table.line_width())

    with edge.connect() as client:
        if watch is not None:
            from aiosd.commands.watch import run

            return run(lambda: picture(find(client)), "aios-ps", watch)
        found = find(client)
    if as_json:
        ordered = table.forest(found)[0] if forest else found
        _print_json(table.objects(ordered, columns) if columns else ordered)
    else:
        for line in picture(found):
            print(line)
    return 1 if (pids or names) and not found else 0


def _find(client: Client, everything: bool, dead: bool, pids: set[int], names: tuple[str, ...]) -> list[ProcInfo]:
    """The requested processes, in order of their pids. -p and -C together select those of both, as in ps."""
    asked = [Ps(all=True, name=name, dead=dead) for argument in names for name in argument.split(",") if name]
    if pids:
        asked.append(Ps(all=True, pids=sorted(pids), dead=dead))
    found: dict[int, ProcInfo] = {}
    for args in asked or [Ps(all=everything, dead=dead)]:
        found |= {p.pid: p for p in client.call(Sys.PS, args, list[ProcInfo])}
    return [found[pid] for pid in sorted(found)]


def _pids(arguments: tuple[str, ...]) -> set[int]:
    words = [word for argument in arguments for word in argument.replace(",", " ").split()]
    for word in words:
        if not (word.isascii() and word.isdigit()):
            raise click.UsageError(f"-p: {word!r} is not a pid (names go with -C)")
    if arguments and not words:
        raise click.UsageError("-p: a pid is missing")
    return {int(word) for word in words}


def _print_json(found: list[Any]) -> None:
    from msgspec import json

    print(json.format(json.encode(found)).decode())
