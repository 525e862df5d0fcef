"""What the supervisor gives the gateway. Apart, so that the supervisor imports nothing else of it."""

from __future__ import annotations

from dataclasses import dataclass

from aiosd.ipc.endpoint import Endpoint
from libaios.home import Home


@dataclass(frozen=True, slots=True)
class GatewaySpec:
    """Where the kernel is found, where to listen, and where connections come from that were accepted elsewhere: a
    descriptor of `aiosd.ipc.passage`, -1: there is none."""

    home: Home
    door: Endpoint
    guests: int = -1
