"""The store's server: all calls that have come share one commit, and their answers wait for it.

If the commit fails the calls are done again, each with a commit of its own, so that each gets its own result: on a disk
on which one call's addition fails, another call's removal still succeeds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from aiosd.ipc import link
from aiosd.ipc.service import Followed, Server, as_failed

logger = logging.getLogger("store")

#: An answer, its size, and what is expected after it.
_Held = tuple[link.Answered | link.Failed, int, Followed | None]

BUSY_S = 0.02  # for this time after a message more messages are expected


class Group(Protocol):
    """Effects of calls that become durable together: of all calls between `begin` and `commit`. Effects of other work
    are durable at once."""

    def begin(self) -> None: ...
    @property
    def open(self) -> bool: ...  # there is something to commit
    def commit(self) -> None: ...  # raises OSError: nothing of it has happened


class Nothing:
    """The group of a service without effects."""

    open = False

    def begin(self) -> None:
        pass

    def commit(self) -> None:
        pass


@dataclass(slots=True)
class GroupServer(Server):
    group: Group = field(default_factory=Nothing)
    _held: list[_Held] = field(default_factory=list)  # answers before their commit
    _came: float = 0.0  # when the last messages came

    @property
    def busy(self) -> bool:
        """Whether calls keep coming."""
        return time.monotonic() - self._came < BUSY_S

    def _turn(self, messages: list[link.ToService]) -> None:
        self._came = time.monotonic()
        group = self.group
        group.begin()
        for message in messages:
            self._handle(message)
        if group.open and len(messages) > 1:
            self.channel.work.end()  # if the process dies from here on, no single call is to blame
        try:
            group.commit()
        except OSError as err:
            logger.warning("a commit failed (%s); its calls are done again, each alone", err.strerror)
            self._held.clear()
            for message in messages:
                if self._has_effect(message):
                    self._alone(partial(self._handle, message))
        self._release()

    def _has_effect(self, message: link.ToService) -> bool:
        """Whether the message's call may have had an effect, and has no answer yet."""
        if isinstance(message, link.Ask):
            return message.key in self._lives
        return isinstance(message, link.PeerGone | link.Keep)

    def _step(self, key: link.CallKey) -> None:
        self._alone(partial(self._go_on, key))

    def _alone(self, act: Callable[[], None]) -> None:
        """Do one thing with a commit of its own."""
        self.group.begin()
        act()
        try:
            self.group.commit()
        except OSError as err:
            self._held = [
                (as_failed(message.key, err) if isinstance(message, link.Answered) else message, 0, None)
                for message, _, _ in self._held
            ]
        self._release()

    def _release(self) -> None:
        """Send the answers, because their effects are durable."""
        held, self._held = self._held, []
        for message, size, followed in held:
            Server._out(self, message, size, followed)

    def _out(self, message: link.Answered | link.Failed, size: int, followed: Followed | None = None) -> None:
        if self.group.open:
            self._held.append((message, size, followed))
        else:
            Server._out(self, message, size, followed)
