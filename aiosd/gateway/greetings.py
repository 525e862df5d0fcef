"""How the gateway connects to the kernel in the name of an agent."""

from __future__ import annotations

import asyncio
import contextlib

from libaios import wire
from libaios.greeting import Greeting
from libaios.home import Home
from libaios.stream import FrameSocket

AT_A_TIME = 64  # when many agents begin at once, each gets its answer in time


class Greetings:
    def __init__(self, home: Home) -> None:
        self.home = home
        self._room = asyncio.Semaphore(AT_A_TIME)

    async def greet(self, token: str) -> tuple[FrameSocket, wire.Welcome]:
        """`token`: see `wire.Hello`. The socket is the caller's. Raises NoKernel."""
        async with self._room:
            greeting = Greeting(self.home, token=token)
            try:
                while (welcome := greeting.step()) is None:
                    await _readable(greeting)
            except BaseException:  # of any kind, an interrupt too: undo, and raise it again
                greeting.close()
                raise
        assert greeting.frames is not None
        return greeting.frames, welcome


async def _readable(greeting: Greeting) -> None:
    """Until there is a step to take, or its time is up."""
    frames, loop = greeting.frames, asyncio.get_running_loop()
    if frames is None:
        await asyncio.sleep(greeting.wait_s())
        return
    readable = asyncio.Event()
    loop.add_reader(frames.fileno(), readable.set)
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(greeting.wait_s()):
                await readable.wait()
    finally:
        loop.remove_reader(frames.fileno())
