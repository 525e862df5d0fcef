"""Tells public addresses from others: agents with a network of single hosts reach only public ones. Pure.

The owner of a name decides to which address it leads. So a granted name may lead to this machine, to one beside it, or
to a cloud's service that gives out keys; the address decides, not the name.
"""

from __future__ import annotations

import ipaddress

_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_COMPATIBLE = ipaddress.ip_network("::/96")  # IPv4 in IPv6, as it was meant at first
_SHARED = ipaddress.ip_network("100.64.0.0/10")
#: Not public either, even if the tables of this Python have them as public.
_MORE = [ipaddress.ip_network(text) for text in ("64:ff9b:1::/48", "2001::/23", "2002::/16", "fec0::/10", "5f00::/16")]


def why_not_public(address: str) -> str:
    """Why an address is not public, in a few words; "": it is public."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return "no plain address"
    inner = _inner(ip)
    if inner is not None:
        why = _why(inner)
        return f"{why} ({inner} in IPv6)" if why else ""
    return _why(ip)


def _inner(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 address stands for; None: it stands for none."""
    if isinstance(ip, ipaddress.IPv4Address):
        return None
    if ip in _NAT64 or (ip in _COMPATIBLE and int(ip) > 1):
        return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped


def _why(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    if ip.is_unspecified:
        return "an unspecified address"
    if ip.is_loopback:
        return "an address of this machine"
    if ip.is_multicast:
        return "a multicast address"
    if ip.is_link_local:
        return "a link-local address"
    if isinstance(ip, ipaddress.IPv4Address):
        if ip in _SHARED:
            return "an address of a provider's own network"
    elif ip.is_site_local or any(ip in network for network in _MORE):
        return "a reserved address"
    if ip.is_private:
        return "a private address"
    return "" if ip.is_global and not ip.is_reserved else "a reserved address"
