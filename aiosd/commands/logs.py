"""aios-logs: what a detached agent wrote, and what it goes on to write.

    $ aios-logs --tail 2 -f planner
    step 3 of 4
    step 4 of 4

The log is a file that the agent itself writes to; an index beside it says how large it was when (see
`aiosd.kernel.logindex` for its format), about once a second, which is how fine --since can tell.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
import time
from typing import Any, BinaryIO

import click

from aiosd.commands import agents, edge
from aiosd.units import parse_duration
from libaios.client import Client
from libaios.wire import PidArgs, Sys

EXAMPLES = """
  aios-logs 7                   all that agent 7 wrote
  aios-logs -f --tail 10 7      its last ten lines, then the new ones until it ends
  aios-logs --since 10m planner what it wrote in the last ten minutes
  aios-logs --since 2026-11-23T14:05:00Z 7
"""

POLL_S = 0.2
BLOCK = 1 << 16
INDEX_RECORD = struct.Struct("<dQ")  # Unix time, size of the log then


class Since(click.ParamType[float]):
    """A moment: RFC 3339, or how long ago (42s, 10m, 2h, 1d, 1h30m)."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        try:
            return time.time() - parse_duration(value)
        except ValueError:
            pass
        from datetime import datetime

        try:
            return datetime.fromisoformat(value).timestamp()
        except ValueError:
            self.fail(f"{value!r} is neither a date (2026-11-23T14:05:00Z) nor a length of time (10m)", param, ctx)


@edge.new(
    click.Command,
    "Print the output of an agent that was started with aios-run -d, live or among the last dead. A NAME stands "
    "for the newest agent of that name.",
    "[-f] [--tail N] [--since T]",
    EXAMPLES,
)
@click.option("-f", "--follow", is_flag=True, help="Go on until the agent, or aiosd, has ended.")
@click.option("-n", "--tail", type=edge.Whole(min=0), metavar="N", help="Only the last N lines.")
@click.option("--since", type=Since(), metavar="T", help="Only what was written since T: a date, or 10m, 42s.")
@click.argument("word", metavar="PID|NAME", shell_complete=agents.complete)
def command(follow: bool, tail: int | None, since: float | None, word: str) -> int:
    with edge.connect() as client:
        pid = agents.newest(client, word)
        try:
            found = _inspect(client, pid)
        except (ProcessLookupError, PermissionError) as err:
            raise edge.Failed(edge.reason_about(word, err)) from None
        path = found["log"]
        if not path:
            raise edge.Failed(f"{word}: no log; its output went where aios-run was started")
        start = 0 if since is None else written_before(_index_path(path), since)
        try:
            with open(path, "rb") as log:
                log.seek(start if tail is None else start_of_tail(log, tail, start))
                if follow:
                    _follow(client, pid, log)
                else:
                    _copy(log)
        except FileNotFoundError:
            raise edge.Failed(f"{word}: its log is gone ({path})") from None
    return 0


def _inspect(client: Client, pid: int) -> dict[str, Any]:
    found: dict[str, Any] = client.call(Sys.INSPECT, PidArgs(pid), dict[str, Any])
    return found


def _index_path(path: str) -> str:
    return path.removesuffix(".log") + ".idx"


def written_before(index: str, when: float) -> int:
    """The size that the log had at `when`, as far as the index knows. No index: 0."""
    try:
        with open(index, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        return 0
    whole = len(data) - len(data) % INDEX_RECORD.size
    sizes = [size for moment, size in INDEX_RECORD.iter_unpack(data[:whole]) if moment < when]
    return sizes[-1] if sizes else 0


def start_of_tail(log: BinaryIO, lines: int, start: int) -> int:
    """Where the last `lines` lines begin, at `start` or after it. A last line without newline counts as one."""
    end = log.seek(0, os.SEEK_END)
    if lines == 0:
        return end
    position = end
    newlines = 0
    while position > start:
        step = min(BLOCK, position - start)
        position -= step
        log.seek(position)
        block = log.read(step)
        searched = len(block) - 1 if position + step == end and block.endswith(b"\n") else len(block)
        while (searched := block.rfind(b"\n", 0, searched)) >= 0:
            newlines += 1
            if newlines == lines:
                return position + searched + 1
    return start


def _copy(log: BinaryIO) -> None:
    while block := log.read(BLOCK):
        sys.stdout.buffer.write(block)
    sys.stdout.buffer.flush()


def _follow(client: Client, pid: int, log: BinaryIO) -> None:
    """Copy until the agent has ended. Whether it has is asked before the last look at the file, so that what it
    wrote before its end is printed. When the whole system ends, so has the agent."""
    ended = False
    while not ended:
        ended = _has_ended(client, pid)
        _copy(log)
        if not ended:
            time.sleep(POLL_S)


def _has_ended(client: Client, pid: int) -> bool:
    try:
        return _inspect(client, pid)["exit"] is not None
    except OSError as err:
        if err.errno == errno.ENOTCONN:
            edge.complain("aios-logs", "aiosd has ended, and the agent with it")
        elif err.errno != errno.ESRCH:  # it ended, and has fallen out of the history
            raise
        return True
