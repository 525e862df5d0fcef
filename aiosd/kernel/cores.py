"""The kernel's side of the llm cores: which calls lie with which core, and what comes back.

A generation that was accepted stays in `Core.calls` until its final word. If the core dies, its calls stay
there and go to its successor with the tokens that were already given out, which are then forced, never sampled
again. A call that was running at two deaths is taken for their cause and ends with EIO.

This module moves messages; it decides nothing about agents. What a message means for a caller is decided by
the `Listener` (the kernel).
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from aiosd import link
from aiosd.kernel.peer import Call
from libaios import wire
from libaios.channel import Channel

logger = logging.getLogger("kernel.cores")

POISON_DEATHS = 2
POISON_OTHERS = 4  # of calls that are no generations: nobody knows whether they had begun
MAX_SUBMIT = 8 << 20  # bytes; submitted again it has its tokens with it, and still fits a frame


class Listener(Protocol):
    """What the kernel does with a core's messages."""

    def on_loading(self, core: Core, message: link.Progress) -> None: ...
    def on_loaded(self, core: Core) -> None: ...
    def on_load_failed(self, core: Core, message: str) -> None: ...
    def on_started(self, call: Call, started: link.Started) -> None: ...
    def on_preempted(self, call: Call) -> None: ...
    def on_delta(self, call: Call, delta: link.Delta) -> None: ...
    def on_finished(self, call: Call, finished: link.Finished) -> None: ...
    def on_answered(self, call: Call, answered: link.Answered) -> None: ...
    def live_peers(self) -> list[int]: ...
    def on_stats(self, req: int) -> None: ...
    def fail(self, call: Call, code: int, message: str) -> None: ...
    def call_budget(self, call: Call) -> tuple[int, str, int | None]: ...


@dataclass(slots=True, eq=False)
class Core:
    """One llm core as the kernel sees it."""

    name: str
    path: str
    default: bool
    pid: int
    state: str = "starting"  # starting → loading → ready; down between a death and the next fork
    ospid: int = 0
    deaths: int = 0
    last_death: str = ""
    channel: Channel | None = None
    info: wire.ModelInfo | None = None
    stats: dict[str, Any] = field(default_factory=dict)
    calls: dict[link.Key, tuple[Call, link.ToCore]] = field(default_factory=dict)
    parked: set[int] = field(default_factory=set)  # peers whose generations are parked
    contexts: dict[int, tuple[str, int]] = field(default_factory=dict)  # peer → place, tokens

    def send(self, message: link.ToCore) -> None:
        """To the core, if it serves; else it will get what matters when it does (`_resubmit`)."""
        if self.state == "ready" and self.channel is not None:
            self.channel.send(link.encode(message))

    def submit(self, call: Call, message: link.ToCore) -> None:
        payload = link.encode(message)
        if len(payload) > MAX_SUBMIT:
            raise wire.error(errno.EMSGSIZE, f"{len(payload)} bytes for a model; the limit is {MAX_SUBMIT}")
        self.calls[call.key] = (call, message)
        call.core = self.name
        if self.state == "ready" and self.channel is not None:
            self.channel.send(payload)

    def cancel(self, call: Call) -> None:
        if self.calls.pop(call.key, None) is not None:
            self.send(link.CancelCall(call.key))

    def generation(self, key: link.Key) -> Call | None:
        """The generation that a word of the core is about. None: it was cancelled, and the core had not heard of that
        when it said this. An agent that uses an id again may have a call of another kind under it by now."""
        call, _ = self.calls.get(key, (None, None))
        return call if call is not None and call.generation is not None else None

    def park(self, peer: int, parked: bool) -> None:
        if parked:
            self.parked.add(peer)
        else:
            self.parked.discard(peer)
        self.send(link.Park(peer, parked))

    def pause(self, call: Call, paused: bool) -> None:
        self.send(link.ParkCall(call.key, paused))


class Cores:
    """All cores of the system, in the order of the command line; the first is the default."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.by_name: dict[str, Core] = {}
        self.schedule: link.Schedule | None = None  # what every core is told when it has loaded

    def __iter__(self) -> Iterator[Core]:
        return iter(self.by_name.values())

    def find(self, name: str | None) -> Core | None:
        if name is None:
            return next(iter(self.by_name.values()))
        return self.by_name.get(name)

    def reschedule(self, schedule: link.Schedule) -> None:
        self.schedule = schedule
        for core in self:
            core.send(schedule)

    def renice(self, peer: int, nice: int) -> None:
        for core in self:
            core.send(link.Renice(peer, nice))

    def context_of(self, peer: int) -> tuple[str, int]:
        """Where the longest context of a peer lies, and its tokens."""
        found = [core.contexts[peer] for core in self if peer in core.contexts]
        return max(found, key=lambda place: place[1], default=("", 0))

    # ── life of a core ────────────────────────────────────────────────────────────────────────────────────

    def forked(self, core: Core, ospid: int, deaths: int, channel: Channel) -> None:
        core.ospid, core.deaths, core.channel, core.state = ospid, deaths, channel, "loading"

    def died(self, core: Core, reason: str) -> None:
        """Keep its calls for the successor, but those that look like the cause of the death."""
        served = core.state == "ready"  # else it had been given nothing
        core.state, core.last_death, core.ospid = "down", reason, 0
        core.contexts = {}
        if core.channel is not None:
            core.channel.close()
            core.channel = None
        for call, _ in list(core.calls.values()):
            generation = call.generation
            if not (served if generation is None else generation.started):
                continue
            if generation is not None:
                generation.started = False
            call.deaths += 1
            if call.deaths >= (POISON_DEATHS if generation is not None else POISON_OTHERS):
                times = "twice" if call.deaths == 2 else f"{call.deaths} times"
                message = f"the llm core died {times} while this call was running (last: {reason})"
                del core.calls[call.key]
                self.listener.fail(call, errno.EIO, message)

    def _resubmit(self, core: Core) -> None:
        for peer in core.parked:
            core.send(link.Park(peer, True))
        for call, message in list(core.calls.values()):
            self._send_again(core, call, message)

    def _send_again(self, core: Core, call: Call, message: link.ToCore) -> None:
        core.send(self.fresh(call, message))
        if call.generation is not None and call.generation.paused:
            core.pause(call, True)

    def resynchronise(self, call: Call) -> None:
        """What the core said does not join what we have: have it told again from there."""
        core = self.by_name[call.core]
        if call.generation is not None and not call.generation.resyncing:
            call.generation.resyncing = True
            call_and_message = core.calls.setdefault(call.key, (call, link.Submit(call.key, call.generation.request)))
            self._send_again(core, *call_and_message)

    def fresh(self, call: Call, message: link.ToCore) -> link.ToCore:
        """The message as it must be now: with the tokens given out so far and what is left of the budget."""
        if call.generation is None:
            return message
        nice, group, budget = self.listener.call_budget(call)
        request = msgspec.structs.replace(call.generation.request, given=list(call.generation.tokens))
        return link.Submit(call.key, request, nice, group, budget)

    # ── messages ──────────────────────────────────────────────────────────────────────────────────────────

    def receive(self, core: Core, limit: int = 64) -> bool:
        """Handle what the core sent; True when there is more."""
        if core.channel is None:
            return False
        core.channel.pump()
        for payload in core.channel.receive(limit):
            self._on_message(core, link.decode_from_core(payload))
            if core.channel is None:
                return False
        return core.channel.more

    def _on_message(self, core: Core, message: link.FromCore) -> None:
        listener = self.listener
        match message:
            case link.Step():
                for started in message.started:
                    if (call := core.generation(started.key)) is not None:
                        listener.on_started(call, started)
                for key in message.preempted:
                    if (call := core.generation(key)) is not None:
                        listener.on_preempted(call)
                for delta in message.deltas:
                    if (call := core.generation(delta.key)) is not None:
                        listener.on_delta(call, delta)
            case link.Finished(key=key):
                if (call := core.generation(key)) is not None:
                    del core.calls[key]
                    listener.on_finished(call, message)
            case link.Answered(key=key):
                if key in core.calls and core.generation(key) is None:
                    listener.on_answered(core.calls.pop(key)[0], message)
            case link.Failed(key=key):
                if key in core.calls:
                    listener.fail(core.calls.pop(key)[0], message.errno, message.message)
            case link.Contexts():
                core.contexts = message.places
            case link.Stats():
                core.stats = message.stats
                listener.on_stats(message.req)
            case link.Progress():
                listener.on_loading(core, message)
            case link.Loaded():
                # A core says this when it has loaded, and again to every new kernel.
                core.state = "ready"
                if self.schedule is not None:
                    core.send(self.schedule)
                core.send(link.Keep(listener.live_peers()))
                core.info = wire.ModelInfo(name=core.name, default=core.default, **message.info)
                self._resubmit(core)
                listener.on_loaded(core)
            case link.LoadFailed():
                listener.on_load_failed(core, message.message)
