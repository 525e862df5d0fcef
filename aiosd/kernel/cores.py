"""The kernel's side of the llm cores: services that also run generations.

A generation is more than a call that is answered: its tokens come in pieces, it may be parked, paused and preempted. If
its core dies, the generation goes to the successor together with the tokens that were already given out; these are
forced there, never sampled again.

This module passes on messages and decides nothing about agents. The `Listener` (`generations`) decides what a message
means for a caller.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from aiosd.budgets.price import Price
from aiosd.ipc import link
from aiosd.kernel.budget import purses
from aiosd.kernel.peer import Call
from aiosd.kernel.service import POISON_DEATHS, POISON_OTHERS, Service, ServiceCall, ServiceState
from libaios import wire


class Listener(Protocol):
    """Handles a core's messages about generations."""

    def on_started(self, call: Call, started: link.Started) -> None: ...
    def on_spent(self, call: Call, spent: link.Spent) -> None: ...
    def on_preempted(self, call: Call) -> None: ...
    def on_delta(self, call: Call, delta: link.Delta) -> None: ...
    def on_finished(self, call: Call, finished: link.GenerationDone) -> None: ...
    def on_failed(self, call: Call, failed: link.Failed) -> None: ...
    def on_death(self, call: Call, reason: str) -> None: ...
    def on_parked(self, peer: int) -> None: ...
    def call_budget(self, call: Call) -> tuple[int, str, int | None]: ...
    def money_left(self, call: Call) -> int | None: ...
    def schedule(self) -> link.Schedule: ...


@dataclass(slots=True, eq=False, kw_only=True)
class Core(Service):
    """One llm core as the kernel sees it."""

    model: str
    path: str
    default: bool
    listener: Listener
    vectors_only: bool = False
    price: Price | None = None  # None: it is not known
    info: wire.ModelInfo | None = None
    unwell: str = ""  # why a new call would have to wait long
    parked: set[int] = field(default_factory=set)  # peers whose generations must not be decoded
    unconfirmed: dict[int, int] = field(default_factory=dict)  # number of a `Park` that is not in force yet → peer,
    latest: dict[int, int] = field(default_factory=dict)  # … and by peer the last of these
    contexts: dict[int, tuple[str, int]] = field(default_factory=dict)  # peer → place, tokens
    # Random at the start: a core may still confirm what a dead kernel asked for.
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(int.from_bytes(os.urandom(5), "little")))

    # ── what a core adds to a service ─────────────────────────────────────────────────────────────────────

    def fresh(self, opened: ServiceCall) -> link.ToService:
        """The message that submits a generation: with the tokens given out so far and the rest of the budget."""
        call, generation = opened.call, opened.call.generation
        if generation is None:
            return Service.fresh(self, opened)
        nice, group, budget = self.listener.call_budget(call)
        request = msgspec.structs.replace(generation.request, given=generation.progress.given())
        shares = purses(call.peer.proc.budgets) if call.peer.proc is not None else []
        money = self.listener.money_left(call)
        return link.Submit(call.key, request, nice, group, budget, generation.mu, generation.others, shares, money)

    def under_way(self, opened: ServiceCall) -> bool:
        generation = opened.call.generation
        return opened.given if generation is None else generation.started

    def patience(self, opened: ServiceCall) -> int:
        return POISON_OTHERS if opened.call.generation is None else POISON_DEATHS

    def died(self, reason: str) -> None:
        Service.died(self, reason)
        self.contexts, self.unwell = {}, ""
        waiting = list(self.latest)
        self.unconfirmed.clear()
        self.latest.clear()
        for opened in self.calls.values():
            if opened.call.generation is not None:
                opened.call.generation.started = False
        for peer in waiting:
            self.listener.on_parked(peer)
        for opened in list(self.calls.values()):
            if opened.call.generation is not None:
                self.listener.on_death(opened.call, reason)

    def failed(self, call: Call, message: link.Failed) -> None:
        if call.generation is not None:
            self.listener.on_failed(call, message)
        else:
            Service.failed(self, call, message)

    @property
    def trouble(self) -> str:
        """Why a new call would have to wait long; "": it would not. (A core that this kernel has not seen dying is
        loading for the first time, or has not yet reported to a new kernel that it is ready.)"""
        if self.state is ServiceState.DOWN or (self.state is not ServiceState.READY and self.last_death):
            return f"it is down: {self.last_death}"
        return self.unwell

    def loaded(self, message: link.Loaded) -> None:
        self.info = wire.ModelInfo(name=self.model, default=self.default, **message.info)

    def on_ready(self) -> None:
        self.send(self.listener.schedule())
        for peer in self.parked:
            self._send_park(peer)

    def submit_again(self, opened: ServiceCall) -> None:
        Service.submit_again(self, opened)
        if opened.call.generation is not None and opened.call.generation.paused:
            self.pause(opened.call, True)

    def handle(self, message: link.FromService) -> None:
        listener = self.listener
        match message:
            case link.Step():
                for started in message.started:
                    if (call := self.generation(started.key)) is not None:
                        listener.on_started(call, started)
                for spent in message.spent:
                    if (call := self.generation(spent.key)) is not None:
                        listener.on_spent(call, spent)
                for key in message.preempted:
                    if (call := self.generation(key)) is not None:
                        listener.on_preempted(call)
                for delta in message.deltas:
                    if (call := self.generation(delta.key)) is not None:
                        listener.on_delta(call, delta)
            case link.GenerationDone(key=key):
                if (call := self.generation(key)) is not None:
                    del self.calls[key]
                    listener.on_finished(call, message)
            case link.Health():
                self.unwell = message.why
            case link.Contexts():
                self.contexts = message.places
            case link.Parked():
                peer = self.unconfirmed.pop(message.number, None)
                if peer is not None and self.latest.get(peer) == message.number:
                    del self.latest[peer]
                    listener.on_parked(peer)
            case _:
                Service.handle(self, message)

    def generation(self, key: link.CallKey) -> Call | None:
        """The generation that a message is about. None: it was cancelled before the core received that. (An agent that
        uses an id again may have a call of another kind under it by now.)"""
        opened = self.calls.get(key)
        return opened.call if opened is not None and opened.call.generation is not None else None

    # ── parking, pausing, sending again ───────────────────────────────────────────────────────────────────

    def park(self, peer: int, parked: bool) -> None:
        if parked:
            self.parked.add(peer)
            self._send_park(peer)
        else:
            self.parked.discard(peer)
            self.send(link.Park(peer, False))

    def _send_park(self, peer: int) -> None:
        if self.state is ServiceState.READY:
            number = next(self.numbers)
            self.unconfirmed[number] = peer
            self.latest[peer] = number
            self.send(link.Park(peer, True, number))

    def stands_still(self, peers: Iterable[int]) -> bool:
        """Whether nothing of these peers is decoded any more, and nothing of it is on its way here."""
        return not any(peer in self.latest for peer in peers)

    def pause(self, call: Call, paused: bool) -> None:
        self.send(link.ParkCall(call.key, paused))

    def resynchronise(self, call: Call) -> None:
        """There is a gap before the tokens that the core sent: request them again from the gap on."""
        generation = call.generation
        if generation is not None and not generation.resyncing:
            generation.resyncing = True
            fresh = link.Submit(call.key, generation.request)
            self.submit_again(self.calls.setdefault(call.key, ServiceCall(call, fresh)))


class Cores:
    """All cores of the system, in the order of the command line; the first is the default."""

    def __init__(self) -> None:
        self.by_model: dict[str, Core] = {}

    def __iter__(self) -> Iterator[Core]:
        return iter(self.by_model.values())

    def add(self, core: Core) -> None:
        self.by_model[core.model] = core

    def find(self, model: str | None) -> Core | None:
        if model is None:
            return next(iter(self.by_model.values()))
        return self.by_model.get(model)

    def for_vectors(self) -> Core:
        """The core for vectors if a call names none: one that does nothing else, if there is one."""
        return next((core for core in self if core.vectors_only), next(iter(self)))

    def context_of(self, peer: int) -> tuple[str, int]:
        """Where the longest context of a peer is kept, and its number of tokens."""
        found = [core.contexts[peer] for core in self if peer in core.contexts]
        return max(found, key=lambda place: place[1], default=("", 0))
