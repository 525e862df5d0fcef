"""The gateway's process. Until the first program connects it waits and has loaded nothing, so it costs no more than an
agent that sleeps."""

from __future__ import annotations

import select

from aiosd.gateway.superior import GatewaySpec, Superior
from aiosd.heartbeat import Rounds
from libaios.channel import Channel


def main(channel: Channel, spec: GatewaySpec, rounds: Rounds) -> int:
    superior = Superior(channel)
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    poll.register(spec.door.fd, select.POLLIN)
    while not superior.over:
        superior.look()
        if any(fd == spec.door.fd for fd, _ in poll.poll()):
            from aiosd.gateway.server import serve

            return serve(superior, spec, rounds)
    return 0
