"""Networks of agents: their forms, which covers which, and the variables that name its proxy to an agent's programs.
Pure.

- `all`: the machine's network.
- `none`: no network.
- `gateway`: a network of its own, with aiosd's gateway and nothing else.
- `example.org,*.example.net:8443`: the same, and a proxy (`aiosd.net`) that connects to these hosts.
  Without a port, ports 80 and 443 are meant; `*.` stands for all names below a name, not that name itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from aiosd.access.patterns import covers as _covers
from aiosd.access.patterns import host_of, matches

ALL, NONE, GATEWAY = "all", "none", "gateway"
PORTS = (80, 443)  # of a host without a port
MOST = 64  # hosts of one agent
CHARACTERS = 8192  # of all of them

#: The address at which the proxy listens in an agent's own network.
PROXY_HOST, PROXY_PORT = "127.0.0.1", 3128

_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")  # a name with such a last part would be taken for an address
_CONTROL = re.compile(r"[\x00-\x20\x7f]")


class HostGrant(NamedTuple):
    host: str  # a name, *.NAME, or an address
    port: int = 0  # 0: any of PORTS

    @property
    def ports(self) -> tuple[int, ...]:
        return (self.port,) if self.port else PORTS

    def __str__(self) -> str:
        shown = f"[{self.host}]" if ":" in self.host else self.host
        return f"{shown}:{self.port}" if self.port else shown


def are_named(net: str) -> bool:
    """Whether the agent has a network of its own: with single hosts, or the gateway alone."""
    return net not in ("", ALL, NONE)


def normal(words: Iterable[str]) -> str:
    """A network in its normal form, from a person's words: `all`, `none`, `gateway`, or hosts, in one text or several.
    Raises ValueError."""
    found = [word.strip() for text in words for word in text.split(",")]
    if found in ([ALL], [NONE]):
        return found[0]
    if ALL in found or NONE in found:
        raise ValueError("all and none stand alone")
    if GATEWAY in found:  # it is reached besides hosts, too
        found = [word for word in found if word != GATEWAY]
        if not found:
            return GATEWAY
    net = ",".join(dict.fromkeys(str(_grant(word)) for word in found))
    grants(net)  # checks their number
    return net


def grants(net: str) -> tuple[HostGrant, ...]:
    """The hosts of a network in its normal form; empty if it is a word. Raises ValueError."""
    if not are_named(net) or net == GATEWAY:
        return ()
    if len(net) > CHARACTERS:
        raise ValueError(f"hosts of more than {CHARACTERS} characters")
    words = net.split(",")
    if len(words) > MOST:
        raise ValueError(f"{len(words)} hosts; the limit is {MOST}")
    return tuple(map(_grant, words))


def rule(granted: Iterable[HostGrant], host: str, port: int) -> HostGrant | None:
    """The grant by which a host (as `host_of` writes it) may be reached at a port; None: there is none."""
    return next((one for one in granted if port in one.ports and matches("host", one.host, host)), None)


def covers(wide: str, narrow: str) -> bool:
    """Whether the network `wide` reaches everything that `narrow` reaches."""
    if wide in (ALL, narrow) or narrow == NONE:
        return True
    mine = grants(wide)
    return (
        are_named(wide)
        and are_named(narrow)
        and all(
            any(port in one.ports and _covers("host", one.host, other.host) for one in mine)
            for other in grants(narrow)
            for port in other.ports
        )
    )


def refusal(granted: Iterable[HostGrant], host: str, port: int) -> str:
    """Why a host that no grant names is not reached, and the option that would allow it."""
    shown = f"[{host}]" if ":" in host else host
    found = [str(one) for one in granted if matches("host", one.host, host)]
    wanted = shown if port in PORTS else f"{shown}:{port}"
    what = f"port {port} of {shown} is not granted, only {', '.join(found)}" if found else f"{shown} is not granted"
    return f"sandbox: {what} ({_would_allow(wanted)})"


def no_network(level: str) -> str:
    """Why an agent without a network reaches nothing, and the option that would allow it. `level`: of its sandbox."""
    return f"sandbox: the network is not granted ({would_allow_one(level)})"


def would_allow_one(level: str) -> str:
    """The option for a host that is not known: only a cage has networks of single hosts."""
    return _would_allow("HOST" if level == "cage" else "all")


def _would_allow(net: str) -> str:
    return f"aios-run --net {net}, or net of [[group]] in aiosd.toml, would allow it"


def address(text: str) -> tuple[str, int]:
    """HOST or HOST:PORT, [v6] or [v6]:PORT, as a host that can be compared, and its port (0: none was given). Raises
    ValueError for other text."""
    host, port = text, 0
    if text.startswith("["):
        inside, closed, rest = text[1:].partition("]")
        if not closed or ":" not in inside or (rest and not rest.startswith(":")):
            raise ValueError(f"{text[:80]!r} is no host")
        host, number = inside, rest[1:]
        port = _port(number, text) if rest else 0
    elif text.count(":") == 1:
        host, _, number = text.partition(":")
        port = _port(number, text)
    return _host(host, text), port


def proxied(env: Mapping[str, str]) -> dict[str, str]:
    """The environment of an agent with a network of single hosts: names the proxy."""
    url = f"http://{PROXY_HOST}:{PROXY_PORT}"
    own = {"http_proxy": url, "https_proxy": url, "all_proxy": url, "no_proxy": "localhost,127.0.0.1"}
    kept = {name: value for name, value in env.items() if name.lower() not in own}
    return kept | own | {name.upper(): value for name, value in own.items()}


def _grant(word: str) -> HostGrant:
    _, there, rest = word.partition("://")
    if there:
        host = rest.partition("/")[0] or "its host"
        raise ValueError(f"{word[:80]!r} is a URL; what is named is its host: {host[:80]}")
    if word.startswith("*."):
        host, port = address(word[2:])
        if ":" in host or _is_address(host):
            raise ValueError(f"{word[:80]!r}: '*.' stands before a name")
        return HostGrant("*." + host, port)
    if "*" in word:
        raise ValueError(f"{word[:80]!r} is no host (such as example.org, *.example.org or example.org:8443)")
    host, port = address(word)
    if _is_address(host):
        _refuse_private(host)
    elif "." not in host:  # no such name has a public address: the person meant a word that does not exist
        raise ValueError(f"{word[:80]!r} is no host (such as example.org), and neither all nor none")
    return HostGrant(host, port)


def _port(number: str, text: str) -> int:
    if not (number.isascii() and number.isdecimal() and len(number) <= 5 and 1 <= int(number) <= 65535):
        raise ValueError(f"{text[:80]!r} has no port (from 1 to 65535) behind its colon")
    return int(number)


def _host(host: str, text: str) -> str:
    if ":" in host or _is_address(host):
        import ipaddress  # takes milliseconds, and most systems never need it

        if "%" in host:
            raise ValueError(f"{text[:80]!r} is an address of one interface")
        try:
            return str(ipaddress.ip_address(host))
        except ValueError:
            raise ValueError(f"{text[:80]!r} is no host") from None
    if _CONTROL.search(host) or len(host) > 253:
        raise ValueError(f"{text[:80]!r} is no host")
    plain = host_of(host)
    if len(plain) > 253 or not _NAME.fullmatch(plain):
        raise ValueError(f"{text[:80]!r} is no host (such as example.org, *.example.org or example.org:8443)")
    return plain


def _is_address(host: str) -> bool:
    """Whether the C library would take it for an address, in whatever form: 127.1 and 0x7f000001 are some."""
    return ":" in host or _NUMBER.fullmatch(host.rstrip(".").rpartition(".")[2].lower()) is not None


def _refuse_private(host: str) -> None:
    from aiosd.sandbox.addresses import why_not_public

    why = why_not_public(host)
    if why:
        raise ValueError(f"{host} is {why}, which a proxy does not connect to (--net all reaches it)")
