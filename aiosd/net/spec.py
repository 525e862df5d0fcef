"""The settings that the supervisor passes to the proxy. In a file of their own: the supervisor imports nothing else."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProxySpec:
    """Descriptors of `aiosd.ipc.passage`: one over which gates come, and one for connections to the gateway; -1: there
    is no gateway."""

    gates: int
    guests: int = -1
