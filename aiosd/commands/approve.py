"""aios-approve: shows asks of agents, and sends a person's answers.

$ aios-approve
6f1b20c9  agent cleaner (pid 7, group web): sto_remove (path reports/a.txt, group web)
$ aios-approve 6f1b
"""

from __future__ import annotations

import os
import select
import sys
import time
from typing import Any

import click

from aiosd.commands import asks, edge
from libaios.client import Client
from libaios.connection import Pending, decode_body
from libaios.wire import Always, AnswerAsk, Asked, AskState, NoArgs, RevokeAlways, RulesInForce, Sys, WatchAsks

EXAMPLES = """
  aios-approve                  what is asked now
  aios-approve -f               waits for more; on a terminal asks you
  aios-approve 6f1b             shows one, and asks you on a terminal
  aios-approve --allow 6f1b     once; --always: and the like for all times
  aios-approve --deny 6f1b --reason "not on a Friday"
  aios-approve --list-always    --revoke 3: number 3 not any more
  aios-approve --rules          the rules in force
"""
WORDS = {"y": "allow", "yes": "allow", "a": "always", "always": "always", "n": "deny", "no": "deny", "s": "skip"}
PROMPT = "[y]es, once · [a]lways · [n]o · [s]kip: "
PROMPT_ONCE = "[y]es · [n]o · [s]kip: "  # for an ask that cannot be allowed for all times


@edge.new(
    click.Command,
    "Answer what agents ask for: actions that a rule of aiosd.toml, or a default, leaves to a person. An agent whose "
    "ask nobody answers waits; where nobody listens (-f, or the terminal that the agent is attached to) it is denied "
    "at once, unless ask_timeout says otherwise.\n\n"
    "What is allowed is what was shown: if it changes, it is asked for anew. Agents cannot use this command. An ID may "
    "be shortened.",
    "[-f] [--allow|--always|--deny]",
    EXAMPLES,
)
@click.option("-f", "--follow", is_flag=True, help="Wait, and show later asks, too.")
@click.option("-y", "--allow", "verdict", flag_value="allow", help="Allow it once.")
@click.option("--always", "verdict", flag_value="always", help="Allow it, and always the same kind.")
@click.option("-n", "--deny", "verdict", flag_value="deny", help="Deny it.")
@click.option("--reason", default="", metavar="TEXT", help="With --deny: a reason for the agent.")
@click.option("--full", is_flag=True, help="Show long texts completely.")
@click.option("--rules", is_flag=True, help="Print the rules in force, in the order in which they decide.")
@click.option("--list-always", is_flag=True, help="Print what is always allowed.")
@click.option("--revoke", type=edge.Whole(0), metavar="N", help="Remove number N of that list.")
@click.option("--json", "as_json", is_flag=True, help="As JSON; with -f one object per line.")
@click.argument("ids", nargs=-1, metavar="[ID]...")
def command(
    follow: bool,
    verdict: str | None,
    reason: str,
    full: bool,
    rules: bool,
    list_always: bool,
    revoke: int | None,
    as_json: bool,
    ids: tuple[str, ...],
) -> int:
    if sum((follow, rules, list_always, revoke is not None, bool(ids))) > 1:
        raise click.UsageError("one of IDs, --follow, --rules, --list-always and --revoke")
    if verdict and not ids:
        raise click.UsageError(f"--{verdict} wants the ID of what is asked")
    if reason and verdict != "deny":
        raise click.UsageError("--reason goes with --deny")
    with edge.connect() as client:
        if rules:
            return _print_rules(client.call(Sys.RULES, NoArgs(), RulesInForce), as_json)
        if list_always:
            return _print_always(client.call(Sys.ALWAYS_LIST, NoArgs(), list[Always]), as_json)
        if revoke is not None:
            client.call(Sys.ALWAYS_REVOKE, RevokeAlways(revoke), None)
            return 0
        if follow:
            return _Follow(client, full, as_json).run()
        there: list[Asked] = client.call(Sys.ASK_LIST, NoArgs(), list[Asked])
        if ids:
            return _answer_all(client, there, ids, verdict, reason, full, as_json)
    if as_json:
        _print_json(there)
    else:
        print("\n".join(map(asks.title, there)) or "nothing is asked")
    return 0


def _answer_all(
    client: Client,
    there: list[Asked],
    ids: tuple[str, ...],
    verdict: str | None,
    reason: str,
    full: bool,
    as_json: bool,
) -> int:
    code = 0
    for word in ids:
        try:
            asked = _one_of(there, word)
            if as_json:
                _print_json(asked)
            else:
                print("\n".join(asks.lines(asked, full)), flush=True)
            answer(client, asked, verdict or _prompt(asked), reason)
        except edge.CommandFailed as err:
            edge.complain("aios-approve", str(err))
            code = 1
        except OSError as err:
            edge.complain("aios-approve", edge.reason(err))
            code = 1
    return code


def _one_of(there: list[Asked], word: str) -> Asked:
    found = [asked for asked in there if asked.id.startswith(word)] if word else []
    if not found:
        raise edge.CommandFailed(f"{word}: nothing with this ID is asked (any more)")
    if len(found) > 1:
        raise edge.CommandFailed(f"{word}: may be {', '.join(asked.id for asked in found)}")
    return found[0]


def answer(client: Client, asked: Asked, verdict: str, reason: str = "") -> None:
    """Send the answer to an ask. Raises OSError."""
    if verdict != "skip":
        args = AnswerAsk(asked.id, asked.digest, verdict != "deny", verdict == "always", reason)
        client.call(Sys.ASK_ANSWER, args, None)


def question(asked: Asked) -> str:
    return PROMPT if asked.always else PROMPT_ONCE


def verdict_of(asked: Asked, line: str) -> str | None:
    """The answer that a person has typed; None: it is no valid answer."""
    verdict = WORDS.get(line.strip().lower())
    return None if verdict == "always" and not asked.always else verdict


def _prompt(asked: Asked) -> str:
    """Read a person's answer; without a terminal there is none."""
    if not os.isatty(0):
        return "skip"
    while True:
        _forget_typed()
        print(question(asked), end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return "skip"
        if verdict := verdict_of(asked, line):
            return verdict


def _forget_typed() -> None:
    """Drop keys that were typed before the question was shown: they are no answer to it."""
    import termios

    termios.tcflush(0, termios.TCIFLUSH)


# ── -f ────────────────────────────────────────────────────────────────────────────────────────────────────


class _Follow:
    """Shows asks as they come. On a terminal each is answered before the next is shown."""

    def __init__(self, client: Client, full: bool, as_json: bool) -> None:
        self._client, self._full, self._as_json = client, full, as_json
        self._interactive = os.isatty(0) and os.isatty(1) and not as_json
        self._open: dict[str, Asked] = {}
        self._current = ""  # the ask that is being answered
        self._readable = client.fileno()  # first, because this receives, too
        self._call: Pending = client.submit(Sys.ASK_WATCH, WatchAsks())

    def run(self) -> int:
        if self._interactive:
            print("waiting for what agents ask; Ctrl-C ends this", flush=True)
        while True:
            self._receive()
            if self._call.final is not None:
                decode_body(self._call.final, None)
                return 0
            if self._interactive and not self._current and self._open:
                self._ask(next(iter(self._open)))
            if not self._wait():
                return 0

    def _receive(self) -> None:
        self._client.pump()
        if self._client.socket.reborn:  # a new kernel must get the watch at once
            self._client.pump()
        while self._call.pieces:
            asked: Any = self._call.pieces.popleft()
            self._came(asked)

    def _came(self, asked: Asked) -> None:
        known = self._open.pop(asked.id, None)
        if asked.state is AskState.OPEN:
            self._open[asked.id] = asked
        if known is not None and asked.state is AskState.OPEN:
            return  # a new kernel sends it again
        if self._as_json:
            _print_json(asked, in_a_line=True)
        elif not self._interactive:
            print("\n".join(asks.lines(asked, self._full)) if asked.state is AskState.OPEN else _end(asked), flush=True)
        elif asked.state is not AskState.OPEN and self._current == asked.id:
            self._current = ""
            print(f"\n{_end(asked)}", flush=True)

    def _ask(self, name: str) -> None:
        self._current = name
        print("\n".join(["", *asks.lines(self._open[name], self._full)]))
        self._prompt()

    def _prompt(self) -> None:
        _forget_typed()
        print(question(self._open[self._current]), end="", flush=True)

    def _wait(self) -> bool:
        """Wait until something comes; False: stdin has ended."""
        poll = select.poll()
        poll.register(self._readable, select.POLLIN)
        if self._current:
            poll.register(0, select.POLLIN)
        ready = dict(poll.poll())
        return self._typed() if 0 in ready else True

    def _typed(self) -> bool:
        line = sys.stdin.readline()
        if not line:
            return False
        verdict = verdict_of(self._open[self._current], line)
        if verdict is None:
            self._prompt()
            return True
        name, self._current = self._current, ""
        asked = self._open.pop(name)
        try:
            answer(self._client, asked, verdict)
        except OSError as err:
            edge.complain("aios-approve", edge.reason(err))
        return True


def _end(asked: Asked) -> str:
    return edge.escaped(f"{asked.id}  {'not asked any more' if asked.state is AskState.GONE else asked.state}")


# ── tables ────────────────────────────────────────────────────────────────────────────────────────────────


def _print_rules(rules: RulesInForce, as_json: bool) -> int:
    if as_json:
        _print_json(rules)
        return 0
    fate = f"waits for {rules.ask_timeout_s:g} s" if rules.ask_timeout_s else "is denied at once"
    lines = rules.rules or ["no rules: defaults alone decide"]
    lines += [f"while nobody listens an ask {fate}; listening now: {rules.listening}", f"audit: {rules.audit}"]
    print("\n".join(map(edge.escaped, lines)))
    return 0


def _print_always(entries: list[Always], as_json: bool) -> int:
    if as_json:
        _print_json(entries)
        return 0
    lines = [
        f"{entry.number:>4}  {time.strftime('%Y-%m-%d %H:%M', time.localtime(entry.given))}  {entry.text}"
        f" (asked by {entry.agent})"
        for entry in entries
    ]
    print("\n".join(map(edge.escaped, lines)) or "nothing is allowed for all times")
    return 0


def _print_json(value: Any, in_a_line: bool = False) -> None:
    from msgspec import json

    encoded = json.encode(value)
    print((encoded if in_a_line else json.format(encoded)).decode(), flush=True)
