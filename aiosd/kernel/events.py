"""The event loop of the kernel: one epoll, and rounds in which every source of events gets its turn.

A *source* is one descriptor with a callback: an agent's doorbell, a client's socket, a service's doorbell, the link to
the supervisor. Its `turn` is its state in the rounds, and the only record of that:

    ASLEEP   epoll reports when there is something to read
    AWAKE    just served, and need not ring its bell: the kernel looks into its ring for the next frame
    QUIET    the same, and its ring was found empty once
    FOUND    all that it had sent was read, and it has sent again: has its turn before sources that send much
    HUNGRY   has sent more than is read in one turn; gets the next turn when there is time

So a call of an agent that sends little waits for one turn of a busy one, not for all of them: in each round every
FOUND source has its turn, and all HUNGRY sources and clients together have about as much time as one turn.
"""

from __future__ import annotations

import enum
import select
from collections.abc import Callable, Iterable

from aiosd.timers import Timers
from libaios.channel import Channel, look, restless

TURN_S = 0.002  # the longest turn of one agent, if possible, before the others have theirs
EVENTS_PER_ROUND = 256
FEW = 2  # an agent, and the service that answers it
LOOKS = 700  # about 20 µs, during which all others wait: to find an agent that calls again right after its reply,
LOOKS_AT_TWO = 2000  # … or the answer of a service that has to be woken, about 60 µs


class Turn(enum.IntEnum):
    ASLEEP = 0
    AWAKE = 1
    QUIET = 2
    FOUND = 3
    HUNGRY = 4


#: The members as plain names: looking them up in the enum class would cost time, several times per call.
ASLEEP, AWAKE, QUIET, FOUND, HUNGRY = Turn


class EventSource:
    """One descriptor. `act` is called with the events that epoll reported; `serve` does one turn without an event."""

    __slots__ = ("act", "answers", "channel", "fd", "of_clients", "serve", "turn")

    def __init__(
        self,
        fd: int,
        act: Callable[[int], None],
        serve: Callable[[], None],
        channel: Channel | None,
        of_clients: bool,
        answers: bool,
    ) -> None:
        self.fd = fd
        self.act = act
        self.serve = serve
        self.channel = channel  # of an agent or a service: the kernel looks into it before it requests a ring
        self.of_clients = of_clients
        self.answers = answers  # a service, from which agents wait for replies
        self.turn = ASLEEP


class Events:
    def __init__(self, timers: Timers) -> None:
        self._timers = timers
        self._epoll = select.epoll()
        self._sources: dict[int, EventSource] = {}
        self._lines: list[dict[EventSource, None]] = [{} for _ in Turn]  # by turn; that of ASLEEP stays empty

    # ── the sources ───────────────────────────────────────────────────────────────────────────────────────

    def watch(
        self,
        fd: int,
        act: Callable[[int], None],
        events: int = select.EPOLLIN,
        serve: Callable[[], None] | None = None,
        channel: Channel | None = None,
        of_clients: bool = False,
        answers: bool = False,
    ) -> EventSource:
        """Watch a descriptor. Without `serve` a turn is `act` with EPOLLIN."""
        turn = serve if serve is not None else lambda: act(select.EPOLLIN)
        source = self._sources[fd] = EventSource(fd, act, turn, channel, of_clients, answers)
        self._epoll.register(fd, events)
        return source

    def unwatch(self, source: EventSource) -> None:
        """Remove a source. May be called twice."""
        if self._sources.get(source.fd) is source:
            del self._sources[source.fd]
            self._epoll.unregister(source.fd)
        self.move(source, ASLEEP)

    def modify(self, source: EventSource, events: int) -> None:
        if self._sources.get(source.fd) is source:
            self._epoll.modify(source.fd, events)

    def watches(self, source: EventSource) -> bool:
        return self._sources.get(source.fd) is source

    def move(self, source: EventSource, turn: Turn) -> None:
        """The only place where a source changes its turn. A source that is not watched stays ASLEEP."""
        old = source.turn
        if old is not turn:
            lines = self._lines
            if old is not ASLEEP:
                lines[old].pop(source, None)
            if turn is not ASLEEP and self._sources.get(source.fd) is source:
                lines[turn][source] = None
                source.turn = turn
            else:
                source.turn = ASLEEP

    # ── a round ───────────────────────────────────────────────────────────────────────────────────────────

    def round(self, idle: bool = True) -> None:
        """Wait for events, and serve. `idle` False: there is other work, so do not wait."""
        lines = self._lines
        if lines[AWAKE] or lines[QUIET]:
            self._look()
        found = bool(lines[FOUND])
        if found:  # before a system call, because a caller waits for the answer of this service
            self._serve_found()
        timeout = 0.0 if found or lines[HUNGRY] or not idle else self._timers.until_next()
        clients = []
        for fd, mask in self._epoll.poll(timeout, EVENTS_PER_ROUND):
            source = self._sources.get(fd)
            if source is None:  # closed by an earlier event of this round
                continue
            if source.of_clients:
                clients.append((source, mask))
            else:
                source.act(mask)
        if lines[HUNGRY] or clients:
            until = self._timers.clock() + TURN_S
            self._serve_hungry(until)
            self._serve_clients(clients, until)

    def _serve_found(self) -> None:
        """A turn for each FOUND source."""
        found, self._lines[FOUND] = self._lines[FOUND], {}
        for source in found:
            if source.turn is FOUND:  # else: dropped while another's requests were handled
                source.turn = ASLEEP
                source.serve()

    def _serve_hungry(self, until: float) -> None:
        """A turn for the HUNGRY sources, one after another, while there is time; for at least one of them."""
        for source in list(self._lines[HUNGRY]):
            if source.turn is HUNGRY:
                self.move(source, ASLEEP)
                source.serve()
                if self._timers.clock() >= until:
                    break

    def _serve_clients(self, events: Iterable[tuple[EventSource, int]], until: float) -> None:
        """Serve clients and new connections while there is time; at least one. Epoll reports the rest again, before
        those that had their turn."""
        for source, mask in events:
            if self.watches(source):
                source.act(mask)
                if self._timers.clock() >= until:
                    break

    def _look(self) -> None:
        """Look into the rings of sources that were just served and therefore need not ring. Before the kernel sleeps,
        it requests a ring from all of them; otherwise only from those whose rings were found empty twice."""
        awake, quiet, hungry = self._lines[AWAKE], self._lines[QUIET], self._lines[HUNGRY]
        if len(awake) <= FEW and not quiet and not hungry:
            few = list(awake)
            if self._wait_for_few(few):
                return
            if not any(source.channel is not None and source.channel.filled() for source in few):
                for source in few:
                    self.move(source, ASLEEP)
                self._request_rings(few)
                return
        for line in (quiet, awake):
            for source in [one for one in line if one.channel is not None and one.channel.filled()]:
                self.move(source, FOUND)
        busy = bool(self._lines[FOUND] or hungry)
        sleepy = list(quiet) if busy else [*awake, *quiet]
        if busy:
            for source in list(awake):
                self.move(source, QUIET)
        for source in sleepy:
            self.move(source, ASLEEP)
        self._request_rings(sleepy)

    def _wait_for_few(self, few: list[EventSource]) -> bool:
        """Look into the rings of the few active sources for a short time, if that has paid off before: it saves both
        sides their bells. True: one has sent something meanwhile, and is FOUND."""
        if len(few) == 1:
            (source,) = few
            if source.channel is None or not source.channel.look(LOOKS):
                return False
            self.move(source, FOUND)
            return True
        if not any(source.answers for source in few):
            return False
        if not look([source.channel for source in few if source.channel is not None], LOOKS_AT_TWO):
            return False
        for source in few:
            if source.channel is not None and source.channel.filled():
                self.move(source, FOUND)
        return True

    def _request_rings(self, sources: list[EventSource]) -> None:
        unsettled = restless([source.channel for source in sources if source.channel is not None])
        if unsettled:
            for source in sources:
                if source.channel in unsettled:
                    self.move(source, FOUND)
