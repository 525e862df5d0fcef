"""What the gateway's process is told by those above it: where to listen, and what its kernel says on its channel."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass

from aiosd import link
from aiosd.endpoint import Endpoint
from libaios.channel import Channel
from libaios.home import Home


@dataclass(frozen=True, slots=True)
class GatewaySpec:
    """Where the kernel is found, and where to listen."""

    home: Home
    door: Endpoint


class Superior:
    """The gateway's channel to the kernel. It answers no calls of the table: it tells its figures, and is told which
    agents are dead."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.over = False
        self.stats: Callable[[], dict[str, int]] = dict
        self.on_gone: Callable[[int], None] = lambda pid: None
        self._send(link.Loaded())

    def look(self) -> None:
        """Handle what has come. Afterwards the channel's descriptor becomes readable when there is more."""
        channel = self.channel
        while True:
            for payload in channel.receive():
                self._handle(link.decode_to_service(payload))
            if channel.outbox_bytes:
                channel.pump()
            if channel.reborn:
                channel.renew()
                self._send(link.Loaded())
            elif not channel.more:
                break
        self.over = self.over or channel.hung_up

    def _handle(self, message: link.ToService) -> None:
        match message:
            case link.GetStats(req=req):
                self._send(link.Stats(req, self.stats()))
            case link.Gone(peer=peer):
                self.on_gone(peer)
            case link.Ask(key=key, sys=sys):
                self._send(link.Failed(key, errno.ENOSYS, f"there is no system call {sys}"))
            case link.Quit():
                self.over = True

    def _send(self, message: link.FromService) -> None:
        self.channel.send(link.encode(message))
