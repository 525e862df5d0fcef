"""Serving agents through their rings: an agent gets turns as long as it has sent something; then the kernel waits for
its bell.

An agent's doorbell is edge-triggered: every ring is an event, whether or not older rings were read, so they need not be
read each time. An event also shows that the agent has closed its end. Epoll reports that once, so the kernel records it
at once; it takes effect when everything that the agent sent before has been handled.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from functools import partial

from aiosd.kernel.calls import CallTable
from aiosd.kernel.dispatch import Dispatcher
from aiosd.kernel.events import AWAKE, HUNGRY, TURN_S, Events, EventSource
from aiosd.kernel.peer import FRAMES_PER_TURN, OUTBOX_PAUSE, AgentPeer, Peer
from aiosd.timers import Timers
from libaios.channel import Channel
from libaios.ring import ProtocolError

REPLIES_PER_RING = 16  # ring after this number of replies in a turn: the first need not wait for the last
HUNG_UP = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR


class AgentTurns:
    """Serves agents in turns. `caught_up` is called with a peer that has read its replies."""

    def __init__(
        self,
        calls: CallTable,
        events: Events,
        timers: Timers,
        dispatcher: Dispatcher,
        caught_up: Callable[[Peer], None],
    ) -> None:
        self._calls = calls
        self._events = events
        self._timers = timers
        self._answer = dispatcher.answer
        self._count = dispatcher.count
        self._caught_up = caught_up
        self._rung: list[AgentPeer] = []  # peers whose bells have rung since the last beat

    def listen(self, channel: Channel, rung: Callable[[], None]) -> EventSource:
        """Wait for the first ring of an agent that is being started, and call `rung` then. Its frames are not read
        yet."""

        def on_bell(mask: int) -> None:
            if mask & HUNG_UP:
                channel.drain_bell()  # it may have rung before its end
            if not channel.hung_up:
                rung()

        return self._events.watch(channel.fileno(), on_bell, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)

    def leave(self, source: EventSource) -> None:
        """Stop waiting for its ring."""
        self._events.unwatch(source)

    def serve(self, peer: AgentPeer) -> None:
        """Serve an agent from now on; it may already have rung."""
        events = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET
        peer.source = self._events.watch(
            peer.channel.fileno(),
            partial(self._on_bell, peer),
            events,
            serve=partial(self._take_turn, peer),
            channel=peer.channel,
        )
        self._events.move(peer.source, HUNGRY)

    def on_beat(self) -> None:
        """Empty the bells, once a second: a full bell could not ring again."""
        rung, self._rung = self._rung, []
        for peer in rung:
            if not peer.gone:
                peer.rung = False
                peer.channel.drain_bell()
                if peer.source is not None:
                    self._events.move(peer.source, HUNGRY)

    def _on_bell(self, peer: AgentPeer, mask: int) -> None:
        channel = peer.channel
        if mask & HUNG_UP:
            channel.hung_up = True
        elif channel.count_ring() and not peer.rung:
            peer.rung = True
            self._rung.append(peer)
        if peer.source is not None and peer.source.turn is HUNGRY:
            return  # it is already waiting for a turn
        self._take_turn(peer)

    def _take_turn(self, peer: AgentPeer) -> None:
        channel = peer.channel
        requests: list[bytes] = []
        more = fragmented = False
        assembling = 0
        try:
            if (channel.outbox_bytes or peer.paused) and not self._unload(peer):
                return
            assembling = channel.take(requests, peer.turn)
            more = len(requests) == peer.turn
            fragmented = channel.fragmented
            if more:
                self._handle_many(peer, requests)
            else:
                self._handle(peer, requests)
        except ProtocolError as err:
            self._calls.offend(peer, str(err))
        if peer.gone:  # dropped while its requests were handled
            return
        if assembling or peer.assembling:
            self._calls.note_assembling(peer, assembling)
            if peer.gone:
                return
        source = peer.source
        assert source is not None
        if more or fragmented or (channel.hung_up and channel.filled()):
            self._events.move(source, HUNGRY)
        elif channel.hung_up:
            self._calls.drop(peer)
        else:
            self._events.move(source, AWAKE)

    def _handle_many(self, peer: AgentPeer, requests: list[bytes]) -> None:
        """As `_handle`; an agent that sends many slow requests gets shorter turns."""
        began = self._timers.clock()
        self._handle(peer, requests)
        long = self._timers.clock() - began > TURN_S
        peer.turn = max(1, peer.turn // 2) if long else min(FRAMES_PER_TURN, 2 * peer.turn)

    def _handle(self, peer: AgentPeer, requests: list[bytes]) -> None:
        """Execute requests. One ring of the bell serves for several replies."""
        channel, answer_to = peer.channel, self._answer
        answers: list[bytes] = []
        self._count(peer, len(requests))
        for payload in requests:
            answer = answer_to(peer, payload)
            if peer.gone:
                return
            if answer is not None:
                answers.append(answer)
                if len(answers) == REPLIES_PER_RING:
                    channel.post(answers)
                    answers.clear()
        if answers:
            channel.post(answers)
        if channel.outbox_bytes:
            self._calls.check_outbox(peer)

    def _unload(self, peer: AgentPeer) -> bool:
        """Send waiting replies. False while too many are still waiting: then the peer's next requests are not read
        until it has read its replies, and rings."""
        channel = peer.channel
        if channel.pump():
            self._caught_up(peer)
        if channel.outbox_bytes <= OUTBOX_PAUSE:
            return True
        if channel.hung_up:
            self._calls.drop(peer)
        return False
