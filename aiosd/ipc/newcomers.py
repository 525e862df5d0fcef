"""Finds calls that are submitted again, but have never come to this process of a service before.

A call that must not be done twice (`wire.Again.NEVER`) is submitted again when the kernel dies. If the service knows
its answer, or is working on it, all is well. If it does not know the call, an earlier process of the service may have
begun it, or its answer may have been dropped here, and then the call has to fail. But mostly the kernel has died before
it passed the call on. A peer numbers its calls upwards and the kernel passes them on in that order, so:

    a call is new here  ⇔  one with a lower number came here when it was new (so no earlier process has the later one),
                           and nothing was dropped here with its number or a higher one
"""

from __future__ import annotations

from dataclasses import dataclass, field

from aiosd.ipc import link


@dataclass(slots=True)
class Newcomers:
    _first: dict[int, tuple[int, int]] = field(
        default_factory=dict
    )  # by peer: its life, the lowest number that was new
    _dropped: dict[int, int] = field(default_factory=dict)  # by peer: the highest number that is not remembered

    def note(self, ask: link.Ask) -> None:
        """A call has come that no process of this service has had before."""
        peer, number = ask.key
        known = self._first.get(peer)
        if known is None or known[0] != ask.life:
            self._first[peer] = (ask.life, number)
            if known is not None:
                self._dropped.pop(peer, None)  # of an earlier life, whose numbers mean nothing now

    def drop(self, key: link.CallKey) -> None:
        """This call was here, and is forgotten from now on."""
        peer, number = key
        self._dropped[peer] = max(number, self._dropped.get(peer, 0))

    def has(self, ask: link.Ask) -> bool:
        """Whether an unknown call that is submitted again is new here."""
        peer, number = ask.key
        life, first = self._first.get(peer, (-1, 0))
        return life == ask.life and number > max(first, self._dropped.get(peer, 0))

    def forget(self, peer: int) -> None:
        """Forget a peer that is dead."""
        self._first.pop(peer, None)
        self._dropped.pop(peer, None)
