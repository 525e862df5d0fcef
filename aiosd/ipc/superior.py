"""The channel to the kernel for a service that answers no system calls (gateway, proxy)."""

from __future__ import annotations

import errno
from collections.abc import Callable

from aiosd.ipc import link
from libaios.channel import Channel


class Superior:
    """The service's side of the channel: sends its figures, and receives which agents are dead."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.over = False
        self.stats: Callable[[], dict[str, int]] = dict
        self.on_gone: Callable[[int], None] = lambda pid: None
        self.send(link.Loaded())

    def look(self) -> None:
        """Handle the messages that have come. Afterwards the channel's descriptor becomes readable when there are
        more."""
        channel = self.channel
        while True:
            for payload in channel.receive():
                self._handle(link.decode_to_service(payload))
            if channel.outbox_bytes:
                channel.pump()
            if channel.reborn:
                channel.renew()
                self.send(link.Loaded())
            elif not channel.more:
                break
        self.over = self.over or channel.hung_up

    def _handle(self, message: link.ToService) -> None:
        match message:
            case link.GetStats(req=req):
                self.send(link.Stats(req, self.stats()))
            case link.PeerGone(peer=peer):
                self.on_gone(peer)
            case link.Ask(key=key, sys=sys):
                self.send(link.Failed(key, errno.ENOSYS, f"there is no system call {sys}"))
            case link.Quit():
                self.over = True

    def send(self, message: link.FromService) -> None:
        self.channel.send(link.encode(message))
