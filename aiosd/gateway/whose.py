"""Finds the agent that sent a request, before its body is read: by its gate, its token, or its connection."""

from __future__ import annotations

import re
from http import HTTPStatus

from aiosd.gateway.accounts import Account, Accounts
from aiosd.gateway.owners import UnknownOwner
from aiosd.gateway.web import SOON, HttpRequest, Problem
from libaios.greeting import NoKernel, Refused

#: The form of tokens that aiosd makes. A key of another form was meant for another server.
OURS = re.compile(r"aios-[A-Za-z0-9_-]{43}")
HOW = "programs that are no agent's get a token by: aiosd token NAME"


async def identify(request: HttpRequest, accounts: Accounts) -> Account:
    """Raises Problem (401, 403, 503), Full."""
    try:
        if request.connection.agent:
            return await _of_gate(request, accounts)
        shown = await _of_token(request, accounts)
        return shown if shown is not None else await _of_connection(request, accounts)
    except NoKernel as err:
        raise Problem(503, err.strerror or str(err), "server_error", headers=SOON) from None


async def _of_gate(request: HttpRequest, accounts: Accounts) -> Account:
    """The gate determines the agent, whatever token a program sends."""
    connection = request.connection
    try:
        account = await accounts.of_gate(connection.agent)
    except Refused:
        raise Problem(403, "this agent has ended", "permission_error") from None
    if connection.account is None:
        connection.known(account)
    elif connection.account is not account:
        raise Problem(403, "this agent was started again", "permission_error")
    return account


async def _of_token(request: HttpRequest, accounts: Accounts) -> Account | None:
    """None: no token was sent, or no agent has it."""
    token, connection = request.token(), request.connection
    if not OURS.fullmatch(token) or token == connection.unknown:
        return None
    try:
        account = await accounts.of(token)
    except Refused:
        connection.unknown = token
        return None
    if connection.account is not account:
        if connection.account is not None or not await accounts.is_of(account, *connection.ends):
            raise Problem(403, "this token belongs to another agent", "permission_error", code="wrong_agent")
        if connection.account is None:  # no earlier request of this connection identified it meanwhile
            connection.known(account)
    return account


async def _of_connection(request: HttpRequest, accounts: Accounts) -> Account:
    """Looked up once for each connection. A person's program must send its token with each request: it may be a proxy,
    which sends requests of others on the same connection."""
    connection = request.connection
    if _is_of_page(request):
        raise _no_token(request, "requests of a page need a token")
    if connection.account is not None and not connection.account.ospid:
        raise _no_token(request, "each request needs the token")
    if connection.account is None and not connection.unproven:
        try:
            account = await accounts.at_other_end(connection)
        except UnknownOwner as err:
            connection.unproven = str(err)
        else:
            if connection.account is None:  # as above
                connection.known(account)
    if connection.account is None:
        raise _no_token(request, connection.unproven)
    return connection.account


def _is_of_page(request: HttpRequest) -> bool:
    """A browser may be an agent, but pages that it loads are not. (`none`: its user has typed the address.)"""
    origin, site = request.headers.get(b"origin"), request.headers.get(b"sec-fetch-site", b"none")
    return origin is not None or site != b"none"


def _no_token(request: HttpRequest, why: str) -> Problem:
    if request.token():
        return Problem(HTTPStatus.UNAUTHORIZED, f"no agent has this token, and {why}; {HOW}", code="invalid_api_key")
    return Problem(HTTPStatus.UNAUTHORIZED, f"a token is needed: {why}; {HOW}", code="no_api_key")
