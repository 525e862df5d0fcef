"""The proxy's process. It waits, and has loaded nothing, until the first agent has a network of single hosts: till then
it takes no more memory than an idle agent."""

from __future__ import annotations

import select

from aiosd.ipc.heartbeat import Rounds
from aiosd.ipc.superior import Superior
from aiosd.net.spec import ProxySpec
from libaios.channel import Channel


def main(channel: Channel, spec: ProxySpec, rounds: Rounds) -> int:
    superior = Superior(channel)
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    poll.register(spec.gates, select.POLLIN)
    while not superior.over:
        superior.look()
        if any(fd == spec.gates for fd, _ in poll.poll()):
            from aiosd.net.serving import serve

            return serve(superior, spec, rounds)
    return 0
