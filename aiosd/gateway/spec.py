"""The settings that the supervisor passes to the gateway. In a file of their own: the supervisor imports nothing
else."""

from __future__ import annotations

from dataclasses import dataclass

from aiosd.ipc.endpoint import Endpoint
from libaios.home import Home


@dataclass(frozen=True, slots=True)
class GatewaySpec:
    """Where the kernel's socket is, where to listen, and the descriptor over which the proxy passes accepted
    connections (`aiosd.ipc.passage`; -1: none)."""

    home: Home
    door: Endpoint
    guests: int = -1
