"""aios-wait: waits for agents to end, whichever process started them.

$ aios-run -d worker.py
7
$ aios-wait 7; echo $?
3
"""

from __future__ import annotations

import errno

import click

from aiosd.commands import agents, edge
from libaios.client import Client
from libaios.wire import Sys, Wait, Waited

EXAMPLES = """
  aios-wait 7                   exits with the status of agent 7
  aios-wait 7 8 planner         waits for all, exits as the last
  aios-wait --timeout 10 7      exits with 126 after 10 seconds
"""

BUDGET = 124  # as aios-run
NO_SYSTEM = 125  # as aios-run
RUNNING = 126
UNKNOWN = 127  # as wait of the shell


def exit_code(waited: Waited) -> int:
    """The exit code of a command for an agent that has ended like this."""
    if waited.budget:
        return BUDGET
    return waited.status if waited.status >= 0 else 128 - waited.status


@edge.new(
    click.Command,
    "Wait until all of the agents have ended, and exit with the status of the last one: its exit code, 128+n "
    "when signal n ended it, 124 when a budget did. A NAME stands for the newest agent of that name.\n\n"
    "Exit codes of its own: 125 when there is no aiosd, or it ended before the agents' ends were known; 126 when one "
    "still lives after --timeout; 127 when there is no such agent; 2 when it was used wrongly.",
    "[--timeout S]",
    EXAMPLES,
)
@click.option("--timeout", type=edge.SecondsType(min=0), metavar="S", help="Give up after S seconds.")
@click.argument("words", nargs=-1, required=True, metavar="PID|NAME...", shell_complete=agents.complete)
def command(timeout: float | None, words: tuple[str, ...]) -> int:
    try:
        with edge.connect() as client:
            return _wait(client, timeout, words)
    except ConnectionError as err:
        raise edge.CommandFailed(edge.reason(err), NO_SYSTEM) from None
    except OSError as err:
        if err.errno != errno.ENOTCONN:
            raise
        raise edge.CommandFailed(edge.reason(err), NO_SYSTEM) from None


def _wait(client: Client, timeout: float | None, words: tuple[str, ...]) -> int:
    code = 0
    pids: list[int | None] = []
    for word in words:
        try:
            pids.append(agents.newest(client, word))
        except edge.CommandFailed:
            pids.append(None)
    calls = [None if pid is None else client.submit(Sys.WAIT, Wait(pid, True, timeout)) for pid in pids]
    for word, call in zip(words, calls, strict=True):
        try:
            if call is None:
                raise ProcessLookupError(3, "no such agent")
            waited = client.result(call, Waited)
            code = exit_code(waited)
            if waited.budget:
                edge.complain("aios-wait", f"{word}: {waited.reason}")
        except TimeoutError:
            edge.complain("aios-wait", f"{word}: still running after {timeout:g} s")
            return RUNNING
        except (ProcessLookupError, ChildProcessError, PermissionError) as err:
            edge.complain("aios-wait", edge.reason_about(word, err))
            code = UNKNOWN
    return code
