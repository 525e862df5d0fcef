"""The address at which the gateway listens, and the variables from which programs learn it.

The guardian makes the sockets, before anything else runs, and they live as long as the system. So a port that is taken
is an error at the start, agents know the address from their birth on, and while the gateway is dead and forked again
connections wait in the sockets' queues.
"""

from __future__ import annotations

import importlib.util
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from aiosd.errors import UsageError

BACKLOG = 1024
MOST = 16  # addresses
NEEDS = ("uvicorn", "httptools")
INSTALL = "pip install 'aiosd[gateway]'"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An address on this machine. `port` 0: any that is free. `asked`: a person has named it, so it must come up.
    `more`: where the gateway listens, too, for programs that know only these addresses."""

    host: str = "127.0.0.1"
    port: int = 0
    on: bool = True
    asked: bool = False
    fd: int = -1  # of the socket that listens there
    more: tuple[Endpoint, ...] = ()

    @property
    def all(self) -> tuple[Endpoint, ...]:
        return (self, *self.more)

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.address}"


def read(value: Any) -> Endpoint:
    """auto · off · 8000 · 127.0.0.1:8000 · [::1]:8000 · 0,11434,1234 · [0, 11434, 1234] (0 at the first place is auto).
    Raises ValueError with a sentence."""
    if isinstance(value, Endpoint):
        return value
    if isinstance(value, bool):
        value = "auto" if value else "off"
    texts = [str(word).strip() for word in (value if isinstance(value, list) else str(value).split(","))]
    if texts == ["off"]:
        return Endpoint(on=False)
    if "off" in texts:
        raise ValueError("off stands alone: no port can be named beside it")
    if len(texts) > MOST:
        raise ValueError(f"more than {MOST} addresses")
    automatic = texts[:1] in (["auto"], ["on"], ["0"])
    first = Endpoint() if automatic else _address(texts[0] if texts else "", "127.0.0.1")
    more = tuple(_address(text, first.host) for text in texts[1:])
    found = [one.address for one in (first, *more)]
    if len(set(found)) < len(found):
        raise ValueError(f"{','.join(texts)} names an address twice")
    return replace(first, more=more)


def _address(text: str, usual: str) -> Endpoint:
    """`usual`: the host where none is named."""
    if text in ("0", "auto", "on"):
        raise ValueError(f"{text} can only be the first: one free port is all that is chosen")
    host, _, port = text.rpartition(":")
    host = host.strip("[]") or usual
    if not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise ValueError(f"{text!r} is neither auto nor off nor [HOST:]PORT")
    return Endpoint("127.0.0.1" if host == "localhost" else _loopback(host), int(port), asked=True)


def _loopback(host: str) -> str:
    """Only loopback addresses are allowed: the process at the other end can only be identified on the same machine."""
    import ipaddress  # takes milliseconds, and most systems never need it

    try:
        if ipaddress.ip_address(host).is_loopback:
            return host
    except ValueError:
        pass
    raise ValueError(f"{host} is no loopback address (the gateway serves this machine only)")


def why_none(wanted: Endpoint) -> str:
    """Why there is no gateway, in a sentence."""
    return "off" if not wanted.on else f"none, it needs more packages: {INSTALL}"


def installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in NEEDS)


def listen(wanted: Endpoint) -> Endpoint | None:
    """Open the sockets. None: the gateway is switched off, or its packages are not installed. Raises UsageError."""
    if not wanted.on:
        return None
    if not installed():
        if any(one.asked for one in wanted.all):
            raise UsageError(f"the gateway needs more packages: {INSTALL}")
        return None
    opened: list[Endpoint] = []
    try:
        for one in wanted.all:
            opened.append(_opened(one))
    except UsageError:
        for one in opened:
            os.close(one.fd)
        raise
    return replace(opened[0], more=tuple(opened[1:]))


def _opened(wanted: Endpoint) -> Endpoint:
    sock = socket.socket(socket.AF_INET6 if ":" in wanted.host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((wanted.host, wanted.port))
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as err:
        sock.close()
        raise UsageError(f"the gateway cannot listen on {wanted.address}: {err.strerror}") from None
    port = sock.getsockname()[1]
    return replace(wanted, port=port, fd=sock.detach(), more=())


# ── the environment of an agent ───────────────────────────────────────────────────────────────────────────

#: Variables to remove: they would lead somewhere else, or send the gateway data for another server.
LEAKING = (
    "OPENAI_ORG_ID",
    "OPENAI_ORGANIZATION",
    "OPENAI_PROJECT_ID",
    "OPENAI_ADMIN_KEY",
    "OPENAI_API_TYPE",
    "OPENAI_API_VERSION",
    "OPENAI_API_KEY_PATH",
)

#: Switches off frameworks' reports to their makers, and look-ups on the network at import. Variables that the
#: environment has already stay.
QUIET = {
    "ANONYMIZED_TELEMETRY": "False",
    "CREWAI_DISABLE_TELEMETRY": "true",
    "CREWAI_TRACING_ENABLED": "false",
    "DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "LANGCHAIN_TRACING_V2": "false",
    "LANGSMITH_TRACING": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
}

_PROXIES = frozenset({"http_proxy", "https_proxy", "all_proxy"})


def variables(url: str, token: str) -> dict[str, str]:
    """The variables that lead a program to the gateway at `url`."""
    return {
        "OPENAI_BASE_URL": f"{url}/v1",
        "OPENAI_API_BASE": f"{url}/v1",
        "OPENAI_API_KEY": token,
        "CEREBRUM_KERNEL_URL": url.replace("//", f"//agent:{token}@", 1),
    }


def environment(given: Mapping[str, str], door: Endpoint, token: str) -> dict[str, str]:
    """The environment of a program that shall find the gateway, made from its given one."""
    env = {**QUIET, **given}
    for name in LEAKING:
        env.pop(name, None)
    env |= variables(door.url, token)
    if not _PROXIES.isdisjoint(map(str.lower, env)):
        for name in ("no_proxy", "NO_PROXY"):
            known = [word for word in env.get(name, "").split(",") if word]
            env[name] = ",".join(dict.fromkeys([*known, door.host, "localhost"]))
    return env
