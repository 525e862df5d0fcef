"""Boots a system whose proxy resolves names by a table, and accepts one address of this machine as a public one, so
that a test can be the server. No setting, option or agent can do this."""

from __future__ import annotations

import socket
import sys

from aiosd import config
from aiosd.init import guardian
from aiosd.net import dialing
from aiosd.sandbox import addresses
from libaios.home import Home

UPSTREAM = "127.0.0.3"
NAMES = {
    "upstream.test": UPSTREAM,
    "api.upstream.test": UPSTREAM,
    "inside.test": "127.0.0.1",
    "mapped.test": "::ffff:127.0.0.1",
}


def resolve(host: str, port: int) -> list[dialing.Resolved]:
    if host not in NAMES:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    address = NAMES[host]
    if ":" in address:
        return [(socket.AF_INET6, (address, port, 0, 0))]
    return [(socket.AF_INET, (address, port))]


def boot() -> None:
    plain = addresses.why_not_public
    addresses.why_not_public = lambda address: "" if address == UPSTREAM else plain(address)
    dialing._is_ours = lambda address: False
    dialing._resolve = resolve
    sys.exit(guardian.main(config.load({"threads": 1}, Home())))
