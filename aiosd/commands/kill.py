"""aios-kill: send a signal to agents, by pid, name or process group.

$ aios-kill -STOP planner
$ aios-kill 42
aios-kill: 42: no such agent
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click

from aiosd.commands import agents, edge, signals
from libaios.client import Client
from libaios.connection import Pending
from libaios.wire import Kill, Sys

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

EXAMPLES = """
  aios-kill 7                   TERM to agent 7
  aios-kill -STOP planner       park all named planner, until -CONT
  aios-kill -9 -- -7            KILL to the process group 7
  aios-kill --timeout 3 7       TERM, KILL when it still lives 3 seconds later
  aios-kill -0 7                checks that it lives, and may be signalled
  aios-kill -l                  list the signals
"""


class KillCommand(click.Command):
    """Reads arguments as kill(1) does: the first `-NAME` or `-N` is the signal, `-N` after it is a group."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, untangle(args))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        found = super().shell_complete(ctx, incomplete)
        return found + _complete_signal(ctx, None, incomplete) if incomplete[:1] == "-" else found


def _complete_signal(
    context: click.Context, parameter: click.Parameter | None, incomplete: str
) -> list[CompletionItem]:
    """Complete the name of a signal: `TERM` or `SIGTERM` for -s; `-TERM` without."""
    before = ("-" if parameter is None else "") + ("SIG" if "SIG" in incomplete else "")
    return edge.completions({before + signals.name_of(n): str(n) for n in signals.numbers()}, incomplete)


def untangle(args: list[str]) -> list[str]:
    """The same arguments in a form that click understands: options first, `--`, operands."""
    options: list[str] = []
    operands: list[str] = []
    signal_known = False
    rest = iter(args)
    for arg in rest:
        if arg == "--":
            operands += rest
        elif arg in ("-s", "--signal", "--timeout"):
            signal_known = signal_known or arg != "--timeout"
            options += [arg, *_next(rest)]
        elif arg.startswith(("--", "-s")) and not signals.is_signal(arg[1:]):
            signal_known = signal_known or arg.startswith(("-s", "--signal"))
            options.append(arg)
        elif arg in ("-l", "-L", "-h"):
            options.append("-l" if arg == "-L" else arg)
        elif re.fullmatch(r"-[0-9]+", arg) and signal_known:
            operands.append(arg)
        elif len(arg) > 1 and arg[0] == "-" and not signal_known:
            signal_known = True
            options += ["--signal", arg[1:]]
        elif arg[0:1] == "-":
            options.append(arg)  # click reports the error
        else:
            operands.append(arg)
    return [*options, "--", *operands]


def _next(rest: Any) -> list[str]:
    return [word for word in [next(rest, None)] if word is not None]


@edge.new(
    KillCommand,
    "Send a signal (TERM unless told otherwise) to agents. A NAME stands for all live agents of that name, a "
    "negative PID for a process group.\n\n"
    "STOP parks the agent, its children and its running generation, and returns when it has stopped; CONT lets "
    "it go on exactly there. Exits with 0 when all was done, with 1 when something failed.",
    "[-SIGNAL | -s SIGNAL] [--timeout S]",
    EXAMPLES,
)
@click.option(
    "-s",
    "--signal",
    "word",
    default="TERM",
    metavar="SIGNAL",
    help="By name or number; 0 sends none, and only checks.",
    shell_complete=_complete_signal,
)
@click.option("--timeout", type=edge.SecondsType(min=0), metavar="S", help="KILL after S seconds; returns when dead.")
@click.option("-l", "listing", is_flag=True, help="List the signals, or translate those given.")
@click.argument("targets", nargs=-1, metavar="PID|NAME...", type=click.UNPROCESSED, shell_complete=agents.complete)
def command(word: str, timeout: float | None, listing: bool, targets: tuple[str, ...]) -> int:
    if listing:
        return _list(targets)
    if word == "--":  # added by `untangle` after the options
        raise click.UsageError("-s: a signal is missing")
    try:
        number = signals.number_of(word)
    except ValueError as err:
        raise click.UsageError(str(err)) from None
    if not targets:
        raise click.UsageError("a pid or a name is missing")
    with edge.connect() as client:
        return _kill(client, number, timeout, targets)


def _kill(client: Client, number: int, timeout: float | None, targets: tuple[str, ...]) -> int:
    """Send all signals before waiting for the first reply. Failures are reported in the order of the arguments."""
    sent: list[tuple[str, bool, Pending | None]] = []
    for word in targets:
        pids = [int(word)] if re.fullmatch(r"-[0-9]+", word) else agents.live(client, word)
        for pid in pids:
            subject = agents.subject(word, pid, pids)
            sent.append((subject, word == str(pid), client.submit(Sys.KILL, Kill(pid, number, timeout))))
        if not pids:
            sent.append((word, True, None))
    failed = False
    for subject, by_number, call in sent:
        try:
            if call is None:
                raise ProcessLookupError(3, "no such agent")
            client.result(call, None)
        except ProcessLookupError as err:
            # One of several agents of a name may have ended since they were listed.
            if by_number:
                failed = _failure(subject, err)
        except OSError as err:
            failed = _failure(subject, err)
    return 1 if failed else 0


def _failure(subject: str, err: OSError) -> bool:
    edge.complain("aios-kill", edge.reason_about(subject, err))
    return True


def _list(words: tuple[str, ...]) -> int:
    if not words:
        print("\n".join(signals.listing()))
        return 0
    for word in words:
        try:
            if word.isascii() and word.isdigit():
                number = int(word)
                print(signals.name_of(number - 128 if number > 128 else number))
            else:
                print(signals.number_of(word))
        except ValueError as err:
            raise click.UsageError(str(err)) from None
    return 0
