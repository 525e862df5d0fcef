"""Passages: messages with descriptors, and the death of the supervisor, which keeps both ends."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from aiosd.ipc import passage


@pytest.mark.parametrize("unread", [False, True])
def test_all_that_was_sent_arrives_and_then_the_end_is_read_once(
    unread: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (socket.socket(fileno=fd) for fd in passage._pair())
    (tmp_path / "x").write_bytes(b"handed over")
    given = os.open(tmp_path / "x", os.O_RDONLY)
    got: list[tuple[passage.PassageMessage, list[bytes]]] = []
    many = 2 * passage.AT_ONCE + 1

    async def scene() -> list[dict[str, object]]:
        loop = asyncio.get_running_loop()
        wrong: list[dict[str, object]] = []
        unwatched = asyncio.Event()
        remove = loop.remove_reader
        monkeypatch.setattr(loop, "remove_reader", lambda sock: (remove(sock), unwatched.set()))
        loop.set_exception_handler(lambda _, context: wrong.append(context))

        def handle(message: passage.PassageMessage, fds: list[int]) -> None:
            got.append((message, [os.pread(fd, 100, 0) for fd in fds]))
            for fd in fds:
                os.close(fd)

        passage.watch(loop, second, handle)
        for pid in range(many):
            passage.send(first, passage.Guest(pid), [given])
            if pid % 10 == 0:
                await asyncio.sleep(0)  # Linux limits the descriptors on their way
        if unread:  # a socket that is closed with unread data resets the other end
            passage.send(second, passage.Closed(1))
        first.close()
        await asyncio.wait_for(unwatched.wait(), 30)
        return wrong

    with second:
        assert asyncio.run(scene()) == []
    os.close(given)
    if not unread:  # a reset discards unread data
        assert [message.pid for message, _ in got if isinstance(message, passage.Guest)] == list(range(many))
    assert all(contents == [b"handed over"] for _, contents in got)
