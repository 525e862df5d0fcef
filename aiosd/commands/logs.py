"""aios-logs: prints the output of detached agents, and with -f also their new output.

    $ aios-logs --tail 2 -f planner
    step 3 of 4
    step 4 of 4

    $ aios-logs --tail 1 planner worker
    planner[7] | step 4 of 4
    worker[8]  | waiting

`aiosd.logs.agentlog` knows the files of a log, and how to read it while the kernel shortens it. Of agents of earlier
boots only these files and their names are left; if no aiosd runs, that is true of all agents.
"""

from __future__ import annotations

import errno
import os
import re
import select
import sys
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import click

from aiosd.commands import agents, edge
from aiosd.logs import agentlog
from aiosd.units import parse_duration
from libaios.client import Client, NoKernel
from libaios.home import Home
from libaios.wire import PidArgs, Sys

EXAMPLES = """
  aios-logs 7                   all that agent 7 wrote
  aios-logs -f --tail 10 7      its last ten lines, then new ones
  aios-logs -f planner worker   two at once, with names before lines
  aios-logs --since 10m planner what it wrote in the last ten minutes
  aios-logs --since 2026-11-23T14:05:00Z --until 2h30m 7
"""

POLL_S = 0.2  # seconds between two checks of a log that is followed


class Moment(click.ParamType[float]):
    """A moment: a date, a Unix time, or how long ago."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        try:
            return parse_moment(value, time.time())
        except ValueError as err:
            self.fail(str(err), param, ctx)


def parse_moment(text: str, now: float) -> float:
    """Returns a Unix time. `text`: a date such as `2026-11-23T14:05:00Z` (RFC 3339; without a zone: local time), a time
    of today (`14:05`), a Unix time (`@1700000000`, `1700000000.5`), or how long ago (`10m`, `2h30m`). Raises ValueError
    with a sentence."""
    if re.fullmatch(r"@?[0-9]{1,12}(\.[0-9]*)?", text):
        return float(text.removeprefix("@"))
    try:
        return now - parse_duration(text)
    except ValueError:
        from datetime import datetime

        today = f"{datetime.fromtimestamp(now):%Y-%m-%dT}" if re.match("[0-9]{2}:", text) else ""
        try:
            return datetime.fromisoformat(today + text.upper()).timestamp()
        except (ValueError, OverflowError):
            known = "a date (2026-11-23T14:05:00Z), a time of today (14:05), a Unix time (@1700000000) nor a length of "
            known += "time (10m, 2h30m)"
            raise ValueError(f"{text!r} is neither {known}") from None


@edge.new(
    click.Command,
    "Print the output of agents that were started with aios-run -d: live ones, the last dead, and those of earlier "
    "boots whose logs are still kept (keep_dead). A NAME stands for the newest agent of that name. Of several agents "
    "each line has the agent before it, and without -f one agent comes after the other.\n\n"
    "T is a date (2026-11-23T14:05:00Z; without a zone: local time), a time of today (14:05), a Unix time "
    "(@1700000000), or how long ago (42s, 10m, 2h30m, 1d). aiosd looks at logs once a second, so up to a second more "
    "is printed than was asked for.",
    "[-f] [--tail N] [--since T] [--until T]",
    EXAMPLES,
)
@click.option("-f", "--follow", is_flag=True, help="Go on until the agents, or aiosd, have ended.")
@click.option("-n", "--tail", type=edge.Whole(min=0), metavar="N", help="Only the last N lines.")
@click.option("--since", type=Moment(), metavar="T", help="Only output since T.")
@click.option("--until", type=Moment(), metavar="T", help="Only output until T.")
@click.option("--no-prefix", is_flag=True, help="With several agents: no name before each line.")
@click.argument("words", nargs=-1, required=True, metavar="PID|NAME...", shell_complete=agents.complete)
def command(
    follow: bool, tail: int | None, since: float | None, until: float | None, no_prefix: bool, words: tuple[str, ...]
) -> int:
    client = _connect(words)
    try:
        logs, failed = _open_all(client, words)
        later = follow and until is not None and until > time.time()
        for log in logs:
            log.reader.seek(since, None if later else until, tail)
        if len(logs) > 1 and not no_prefix:
            width = max(len(log.label) for log in logs)
            for log in logs:
                log.prefix = f"{log.label:{width}} | ".encode()
        if follow and (later or until is None):
            _follow(client, logs, until)
        else:
            for log in logs:
                log.copy()
                log.end()
    finally:
        if client is not None:
            client.close()
    return 1 if failed else 0


# ── which logs ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class _Log:
    """The log of one agent, which is being copied to stdout."""

    pid: int
    label: str
    reader: agentlog.LogReader
    ended: bool  # the agent has ended and writes no more
    prefix: bytes = b""
    _line: bytes = b""  # the part of a line whose end has not been read yet

    def copy(self) -> None:
        """Copy all that there is."""
        while block := self.reader.read():
            sys.stdout.buffer.write(self._with_prefix(block) if self.prefix else block)
        sys.stdout.buffer.flush()

    def end(self) -> None:
        """The agent writes no more: copy a last line without an end, and close the log."""
        self.reader.close()
        if self._line:
            sys.stdout.buffer.write(self.prefix + self._line + b"\n")
            sys.stdout.buffer.flush()

    def _with_prefix(self, block: bytes) -> bytes:
        """The whole lines of it, each with the prefix, so that lines of several agents are not mixed."""
        *lines, self._line = (self._line + block).split(b"\n")
        if len(self._line) > agentlog.BLOCK:
            lines, self._line = [*lines, self._line], b""
        return b"".join(self.prefix + line + b"\n" for line in lines)

    def look(self, client: Client | None) -> bool:
        """Check whether the agent has ended. (A WAIT would report it at once, but then its parent could not collect the
        status any more.) With the end of the whole system the agent has ended, too."""
        if self.ended or client is None:
            return True
        try:
            self.ended = _inspect(client, self.pid)["exit"] is not None
        except OSError as err:
            if err.errno == errno.ENOTCONN:
                edge.complain("aios-logs", "aiosd has ended, and the agent with it")
            elif err.errno != errno.ESRCH:  # it has ended, and there is no record of it any more
                raise
            self.ended = True
        return self.ended


def _inspect(client: Client, pid: int) -> dict[str, Any]:
    found: dict[str, Any] = client.call(Sys.INSPECT, PidArgs(pid), dict[str, Any])
    return found


def _connect(words: tuple[str, ...]) -> Client | None:
    """Connect; None: no aiosd runs, but logs of these agents are left."""
    try:
        return edge.connect()
    except NoKernel:
        if not any(_left_behind(word) for word in words):
            raise
        return None


class _Left(NamedTuple):
    """The log of an agent that no running system has a record of."""

    pid: int
    name: str  # "": it is not known
    path: str


def _left_behind(word: str) -> _Left | None:
    """The log of that pid, or of the newest agent of that name; None: there is no such log."""
    folder = str(Home().logs)
    names = agentlog.read_names(folder)
    if word.isascii() and word.isdigit():
        pids = [int(word)] if len(word) < 20 else []
    else:
        pids = [pid for pid, name in names.items() if name == word]
    for pid in reversed(pids):
        path = os.path.join(folder, f"{pid}.log")
        if os.path.exists(path):
            return _Left(pid, names.get(pid, ""), path)
    return None


def _open_all(client: Client | None, words: tuple[str, ...]) -> tuple[list[_Log], bool]:
    """The logs, and whether one is missing. Raises CommandFailed if it is the only one."""
    logs: list[_Log] = []
    failed = False
    for word in words:
        try:
            logs.append(_open(client, word))
        except edge.CommandFailed as err:
            if len(words) == 1:
                raise
            edge.complain("aios-logs", str(err))
            failed = True
    return logs, failed


def _open(client: Client | None, word: str) -> _Log:
    pid, name, path, ended = _find(client, word)
    if not path:
        raise edge.CommandFailed(f"{word}: no log; its output went where aios-run was started")
    try:
        reader = agentlog.LogReader(path)
    except FileNotFoundError:
        raise edge.CommandFailed(f"{word}: its log is gone ({path})") from None
    return _Log(pid, f"{edge.escaped(name)}[{pid}]" if name else str(pid), reader, ended)


def _find(client: Client | None, word: str) -> tuple[int, str, str, bool]:
    """Pid, name, path of the log, and whether the agent has ended."""
    if client is not None:
        try:
            pid = agents.newest(client, word)
            found = _inspect(client, pid)
            return pid, found["name"], found["log"], found["exit"] is not None
        except edge.CommandFailed as err:
            complaint = str(err)
        except ProcessLookupError as err:
            complaint = edge.reason_about(word, err)
        except PermissionError as err:
            raise edge.CommandFailed(edge.reason_about(word, err)) from None
    else:
        complaint = f"{word}: no aiosd is running, and there is no such log"
    left = _left_behind(word)
    if left is None:
        raise edge.CommandFailed(complaint)
    return left.pid, left.name, left.path, True


# ── following ─────────────────────────────────────────────────────────────────────────────────────────────


def _follow(client: Client | None, logs: list[_Log], until: float | None) -> None:
    """Copy until all agents have ended, or until `until`. Whether an agent has ended is checked before its files are
    read the last time, so that all output before its end is printed."""
    poll = select.poll()
    poll.register(1, 0)  # reports when the reader of the output has gone
    while logs:
        over = until is not None and time.time() >= until
        ended = [log for log in logs if log.look(client) or over]
        for log in logs:
            log.copy()
        for log in ended:
            log.end()
            logs.remove(log)
        if logs and poll.poll(POLL_S * 1000):
            raise BrokenPipeError
