"""What the supervisor gives the proxy. Apart, so that the supervisor imports nothing else of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProxySpec:
    """Descriptors of `aiosd.ipc.passage`: where gates come from, and where connections to the gateway go; -1: no
    gateway."""

    gates: int
    guests: int = -1
