"""The gateway's process. It waits, and has loaded nothing, until the first program connects: till then it takes no more
memory than an idle agent."""

from __future__ import annotations

import select

from aiosd.gateway.spec import GatewaySpec
from aiosd.ipc.heartbeat import Rounds
from aiosd.ipc.superior import Superior
from libaios.channel import Channel


def main(channel: Channel, spec: GatewaySpec, rounds: Rounds) -> int:
    superior = Superior(channel)
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    ways_in = {*(door.fd for door in spec.door.all), spec.guests} - {-1}
    for fd in ways_in:
        poll.register(fd, select.POLLIN)
    while not superior.over:
        superior.look()
        if any(fd in ways_in for fd, _ in poll.poll()):
            from aiosd.gateway.server import serve

            return serve(superior, spec, rounds)
    return 0
