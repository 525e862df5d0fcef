"""aiosd token: programs that aiosd has not started use its models, with a group and a budget.

$ export OPENAI_API_KEY=$(aiosd token editor --tokens 1000000)
aiosd: editor: http://127.0.0.1:8000/v1; the token is shown this once
$ aiosd token --list
NAME    PID  GROUP    USED    BUDGET   OTHER BUDGETS
editor  42   default  1520    1000000  cost 0.02 of 2.5
$ aiosd token editor --revoke
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shlex
import signal
import sys

import click
from msgspec.structs import replace

from aiosd.budgets import limits
from aiosd.commands import budgets, edge
from libaios.client import Client
from libaios.wire import Kill, NewToken, NoArgs, Spawned, Sys, TokenInfo, TokenList


def register(group: click.Group) -> None:
    group.add_command(token)


@click.command("token", context_settings=edge.SETTINGS, short_help="Let programs outside of aiosd use the gateway.")
@click.argument("name", required=False)
@click.option("-g", "--group", metavar="G", help="Its group: for shares of the models, and for files.")
@budgets.options(limits.WITHOUT_PROCESS)
@click.option("--export", "as_export", is_flag=True, help="Print lines for a shell: OPENAI_BASE_URL and so on.")
@click.option("--revoke", is_flag=True, help="End it: running requests are cancelled, later ones get 401.")
@click.option("--list", "listed", is_flag=True, help="List all tokens.")
@click.option("--json", "as_json", is_flag=True, help="The list as one JSON array.")
def token(
    name: str | None,
    group: str | None,
    as_export: bool,
    revoke: bool,
    listed: bool,
    as_json: bool,
    **amounts: float | None,
) -> int:
    """Make a token for a program of yours that aiosd has not started (an editor, a notebook, a script), and print it.

    A program that shows it is an agent of this NAME: it stands in aios-ps, has a group and a budget, and aios-kill
    stops and ends it. No agent can use it, nor another user. The token is shown once and kept nowhere; it is good
    until it is revoked, also when aiosd is started again. A request that needs more than is left of a budget gets
    429; a budget of time runs from now on.

    \b
      aiosd token editor --tokens 1000000
      aiosd token notebook --cost 2.50 --time 30d
      eval "$(aiosd token notebook --export)"
      aiosd token --list
      aiosd token editor --revoke
      aiosd --gateway 8000                    the same address at each start
    """
    if listed or as_json:
        _exclude(name, "a NAME", "--list")
        with edge.connect() as client:
            found = client.call(Sys.TOKEN_LIST, NoArgs(), TokenList)
        print(_as_json(found.tokens) if as_json else "\n".join(_lines(found.tokens)))
        return 0
    if name is None:
        raise click.UsageError("the NAME of a token is needed, or --list")
    with edge.connect() as client:
        if revoke:
            given = any(amount is not None for amount in amounts.values())
            _exclude(group or given or as_export, "an option of a new token", "--revoke")
            _revoke(client, name)
        else:
            _make(client, NewToken(name, b"", group, budgets.limits_of(amounts)), as_export)
    return 0


def _exclude(given: object, what: str, option: str) -> None:
    if given:
        raise click.UsageError(f"{option} goes without {what}")


def _make(client: Client, wanted: NewToken, as_export: bool) -> None:
    secret = f"aios-{secrets.token_urlsafe(32)}"
    digest = hashlib.sha256(secret.encode()).digest()
    client.call(Sys.TOKEN_NEW, replace(wanted, hash=digest), Spawned)
    url = client.call(Sys.TOKEN_LIST, NoArgs(), TokenList).url
    if as_export:
        from aiosd.ipc import endpoint

        for variable, value in endpoint.variables(url, secret).items():
            print(f"export {variable}={shlex.quote(value)}")
    else:
        print(secret)
    sys.stdout.flush()
    edge.complain("aiosd", f"{wanted.name}: {url}/v1; the token is shown this once")


def _revoke(client: Client, name: str) -> None:
    for one in client.call(Sys.TOKEN_LIST, NoArgs(), TokenList).tokens:
        if one.name == name:
            client.call(Sys.KILL, Kill(one.pid, signal.SIGTERM, timeout_s=5.0), None)
            return
    raise edge.CommandFailed(f"{name}: no token of this name")


def _as_json(tokens: list[TokenInfo]) -> str:
    return json.dumps([{field: getattr(one, field) for field in one.__struct_fields__} for one in tokens], indent=2)


def _lines(tokens: list[TokenInfo]) -> list[str]:
    rows = [("NAME", "PID", "GROUP", "USED", "BUDGET", "OTHER BUDGETS")]
    for one in tokens:
        limit = "-" if one.limit is None else str(one.limit)
        others = [f"{name} {kind['used']} of {kind['limit']}" for name, kind in one.budgets.items() if name != "tokens"]
        row = (edge.escaped(one.name), str(one.pid), edge.escaped(one.group), str(one.used), limit)
        rows.append((*row, ", ".join(others) or "-"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
