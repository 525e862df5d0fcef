"""The kernel's side of a service: the calls that it has, and what happens to them when it dies.

A service is a process that answers system calls: an llm core, the store, the toolbox. The supervisor forks it, and
forks it again when it dies; each time it gets a new channel. An accepted call stays in `Service.calls` until its final
reply. When the service dies, the row of the call (`wire.Row.again`) decides what happens:

    REPEAT, ONCE   it goes to the successor; for ONCE the service remembers keys, and does not do it twice
    NEVER          its caller gets EIO if the call had begun in the service that died

A call that kills its service would also kill every successor. So deaths are counted: for the one call that the service
had announced (in the channel, see `ring.Work`; an llm core with `Working`), else for all calls that it may have been
working on. A call with too many deaths ends with EIO.

This module passes on messages. The additions for llm cores are in `cores`.
"""

from __future__ import annotations

import enum
import errno
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
from msgspec import Raw

from aiosd.access.deed import Deed
from aiosd.ipc import link
from aiosd.kernel.calls import CallTable
from aiosd.kernel.copies import Copies, is_worth_it
from aiosd.kernel.events import EventSource
from aiosd.kernel.peer import AgentPeer, Call
from libaios import wire
from libaios.channel import Channel
from libaios.ring import ProtocolError
from libaios.wire import Again

logger = logging.getLogger("kernel.services")

POISON_DEATHS = 2  # of a call that was announced as worked on, or as running
POISON_OTHERS = 4  # of calls that had been sent to the service and may not have begun
MAX_ASK = 8 << 20  # bytes of a message to a service: when submitted again it may be larger, and must still fit a frame
MESSAGES_PER_TURN = 64


class ServiceState(enum.Enum):
    STARTING = "starting"  # not forked yet
    LOADING = "loading"
    READY = "ready"
    DOWN = "down"  # between a death and the next fork


@dataclass(slots=True, eq=False)
class ServiceCall:
    """An open call of a service."""

    call: Call
    message: link.ToService
    deaths: int = 0
    given: bool = False  # it was sent to this instance of the service,
    begun: bool = False  # … which has begun to work on it
    again: bool = False  # it was sent to an instance that has died, and may have begun there
    moved: bool = False  # it was sent to an instance that has died


class Owner(Protocol):
    """Handles the messages of a service that are not about one call."""

    def on_loading(self, service: Service, message: link.LoadProgress) -> None: ...
    def on_loaded(self, service: Service) -> None: ...
    def on_load_failed(self, service: Service, message: str) -> None: ...
    def on_stats(self, service: Service, req: int) -> None: ...
    def live_peers(self) -> list[int]: ...
    def charge(self, service: Service, call: Call, tokens: int) -> None: ...
    def rules(self) -> link.Rules: ...
    def judge(self, call: Call, deed: Deed, go_on: Callable[[], None]) -> None: ...


@dataclass(slots=True, eq=False)
class Service:
    """One service as the kernel sees it."""

    name: str  # unique in this system
    kind: str  # it answers the table's calls of this kind
    title: str  # in aios-ps
    calls_of_all: CallTable
    owner: Owner
    awaited: bool = True  # the system is not ready before this service is
    pid: int = 0
    ospid: int = 0
    state: ServiceState = ServiceState.STARTING
    deaths: int = 0
    last_death: str = ""
    channel: Channel | None = None
    source: EventSource | None = None  # while the kernel polls its channel
    on_submitted: Callable[[], None] = lambda: None  # called when it was sent a call, whose answer may come soon
    stats: dict[str, Any] = field(default_factory=dict)
    calls: dict[link.CallKey, ServiceCall] = field(default_factory=dict)
    working: link.CallKey | None = None  # the one call that a core has announced to work on
    copies: Copies = field(default_factory=Copies)  # of its answers

    @property
    def short_name(self) -> str:
        """The name without the kind: for a core the name of its model."""
        return self.name.removeprefix(f"{self.kind}:")

    # ── calls ─────────────────────────────────────────────────────────────────────────────────────────────

    def submit(self, call: Call, message: link.ToService) -> None:
        """Send a call to the service. Raises OSError (EMSGSIZE)."""
        payload = link.encode(message)
        if len(payload) > MAX_ASK:
            raise wire.error(errno.EMSGSIZE, f"{len(payload)} bytes for {self.title}; the limit is {MAX_ASK}")
        opened = self.calls[call.key] = ServiceCall(call, message)
        if self._ready():
            self._give(opened, payload)

    def cancel(self, call: Call) -> None:
        """The caller does not wait for the call any more."""
        opened = self.calls.get(call.key)
        if opened is not None and opened.call is call:
            del self.calls[call.key]
            self.send(link.CancelCall(call.key))

    def send(self, message: link.ToService) -> None:
        """Send if the service is ready; else the message is dropped, because `on_ready` sends all that matters."""
        if self.state is ServiceState.READY and self.channel is not None:
            self._report_used()
            self.channel.send(link.encode(message))

    def _ready(self) -> bool:
        return self.state is ServiceState.READY and self.channel is not None

    def _give(self, opened: ServiceCall, payload: bytes) -> None:
        assert self.channel is not None
        opened.given = True
        self._report_used()
        self.channel.send(payload)
        self.on_submitted()

    def _report_used(self) -> None:
        """Report copies that were given since the last message to the service."""
        if self.copies.used:
            assert self.channel is not None
            self.channel.send_silently(link.encode(link.CopiesUsed(self.copies.used)))
            self.copies.used.clear()

    # ── what a kind of service adds ───────────────────────────────────────────────────────────────────────

    def fresh(self, opened: ServiceCall) -> link.ToService:
        """The message for submitting the call again, to a successor or to the same service."""
        message = opened.message
        if isinstance(message, link.Ask):
            return msgspec.structs.replace(message, again=message.again or opened.again, moved=opened.moved)
        return message

    def under_way(self, opened: ServiceCall) -> bool:
        """Whether the service may have worked on the call when it died."""
        return opened.given

    def patience(self, opened: ServiceCall) -> int:
        """At how many deaths the call may be under way before it ends with EIO."""
        return POISON_OTHERS

    def on_ready(self) -> None:
        """Called when the service has loaded, or has a new kernel: send what it must know before its calls."""
        self.send(self.owner.rules())

    def failed(self, call: Call, message: link.Failed) -> None:
        """The service has reported that it will not answer this call."""
        self.calls_of_all.fail(call, message.errno, message.message)

    def handle(self, message: link.FromService) -> None:
        """Handle a message that only this kind of service sends."""
        logger.error("%s sent %s, which is not for this kernel", self.name, type(message).__name__)

    # ── life and death ────────────────────────────────────────────────────────────────────────────────────

    def forked(self, ospid: int, deaths: int, channel: Channel) -> None:
        self.ospid, self.deaths, self.channel, self.state = ospid, deaths, channel, ServiceState.LOADING

    def died(self, reason: str) -> None:
        """The service died: keep its calls for the successor, except those that must not be repeated or seem to kill
        it."""
        self._receive_last()
        working = self.working
        if working is None and self.channel is not None:
            working = self.channel.work.call
        guilty = self.calls.get(working) if working is not None else None  # the call may have been cancelled
        if working is not None:
            suspects = [guilty] if guilty is not None else []
        else:
            suspects = [one for one in self.calls.values() if self.under_way(one)]
        self.state, self.last_death, self.ospid, self.working = ServiceState.DOWN, reason, 0, None
        self.copies.clear()
        if self.channel is not None:
            self.channel.close()
            self.channel = None
        for opened in suspects:
            opened.deaths += 1
            if opened.deaths >= (POISON_DEATHS if opened is guilty else self.patience(opened)):
                times = "twice" if opened.deaths == 2 else f"{opened.deaths} times"
                self._lost(opened, f"{self.title} died {times} while this call was running (last: {reason})")
        for opened in list(self.calls.values()):
            never = opened.call.row.again is Again.NEVER
            if never and opened.begun:
                self._lost(opened, f"{self.title} died while this call was under way ({reason}); it is not done again")
            opened.again = opened.again or (opened.given and not never)
            opened.moved = opened.moved or opened.given
            opened.given = opened.begun = False

    def _receive_last(self) -> None:
        """What a dead service had sent still counts: answers, and which calls had begun."""
        try:
            while self.receive():
                pass
        except ProtocolError as err:
            logger.error("%s died and left a damaged channel: %s", self.title, err)

    def _lost(self, opened: ServiceCall, message: str) -> None:
        self.calls.pop(opened.call.key, None)
        self.failed(opened.call, link.Failed(opened.call.key, errno.EIO, message, elsewhere=True))

    def resubmit(self) -> None:
        for opened in list(self.calls.values()):
            self.submit_again(opened)

    def submit_again(self, opened: ServiceCall) -> None:
        opened.message = self.fresh(opened)
        if self._ready():
            self._give(opened, link.encode(opened.message))

    # ── messages ──────────────────────────────────────────────────────────────────────────────────────────

    def receive(self, limit: int = MESSAGES_PER_TURN) -> bool:
        """Handle what the service has sent; True when there is more."""
        channel = self.channel
        if channel is None:
            return False
        if channel.outbox_bytes:
            channel.pump()
        frames: list[bytes] = []
        channel.take(frames, limit)
        for payload in frames:
            self.on_message(link.decode_from_service(payload))
        return len(frames) == limit or channel.fragmented

    def on_message(self, message: link.FromService) -> None:
        match message:
            case link.Answered(key=key):
                if (opened := self._take(key)) is not None:
                    call = opened.call
                    if message.prompt_tokens:
                        self.owner.charge(self, call, message.prompt_tokens)
                    self.calls_of_all.finish(call, Raw(message.body))
                    if message.promise or message.ahead is not None:  # only now, after its caller got it
                        self._keep(opened, message)
            case link.Stale():
                self.copies.stale(message.promises)
            case link.Part(key=key):
                opened = self.calls.get(key)
                if opened is not None and opened.call.generation is None:
                    self.calls_of_all.send_piece(opened.call, message.offset, Raw(message.body))
            case link.Failed(key=key):
                opened = self.calls.pop(key, None)
                if opened is not None:
                    self.failed(opened.call, message)
            case link.Working():
                self.working = message.key
                self._begun(message.key)
            case link.Begun():
                self._begun(message.key)
            case link.Needs():
                self._needs(message)
            case link.Stats():
                self.stats = message.stats
                self.owner.on_stats(self, message.req)
            case link.LoadProgress():
                self.owner.on_loading(self, message)
            case link.Loaded():
                # A service sends this when it has loaded, and again to every new kernel.
                self.state, self.working = ServiceState.READY, None
                self.copies.clear()
                self.loaded(message)
                self.send(link.Keep(self.owner.live_peers()))
                self.on_ready()
                self.resubmit()
                self.owner.on_loaded(self)
            case link.LoadFailed():
                self.owner.on_load_failed(self, message.message)
            case _:
                self.handle(message)

    def _begun(self, key: link.CallKey | None) -> None:
        opened = self.calls.get(key) if key is not None else None
        if opened is not None:
            opened.begun = True

    def _needs(self, message: link.Needs) -> None:
        """The service has sent a call back, because it has to be allowed first. Until then the service does not have
        it."""
        opened = self.calls.pop(message.key, None)
        if opened is None or not isinstance(opened.message, link.Ask):
            return
        call, ask, digest = opened.call, opened.message, message.deed.digest

        def go_on() -> None:
            call.forget = lambda: self.cancel(call)
            self.submit(call, msgspec.structs.replace(ask, approved=digest))

        call.forget = None
        self.owner.judge(call, message.deed, go_on)

    def loaded(self, message: link.Loaded) -> None:
        """Take what the service reports about itself."""

    def _keep(self, opened: ServiceCall, answer: link.Answered) -> None:
        """Keep copies for an agent that makes the same call again, or the one that is expected. (A person's calls each
        come from another process.)"""
        ask, peer, ahead = opened.message, opened.call.peer, answer.ahead
        if not isinstance(ask, link.Ask) or not isinstance(peer, AgentPeer):
            return
        if answer.promise:
            self.copies.keep(peer, (ask.sys, bytes(ask.args)), answer.promise, answer.body)
        if ahead is not None:
            self.copies.keep(peer, (ahead.sys, ahead.args), ahead.promise, ahead.body, ahead=True)

    def _take(self, key: link.CallKey) -> ServiceCall | None:
        """The call that a reply is for. None: it was cancelled, and the service had not received that yet. (The agent
        may already have a generation with the same id.)"""
        opened = self.calls.get(key)
        if opened is None or opened.call.generation is not None:
            return None
        del self.calls[key]
        return opened


class Services:
    """All services, by name, in the order in which they are started."""

    def __init__(self) -> None:
        self.by_name: dict[str, Service] = {}
        self._by_kind: dict[str, Service] = {}

    def __iter__(self) -> Iterator[Service]:
        return iter(self.by_name.values())

    def add(self, service: Service) -> None:
        self.by_name[service.name] = service
        self._by_kind.setdefault(service.kind, service)

    def of_kind(self, kind: str) -> Service | None:
        """The service that answers the calls of a kind; the first if there are several."""
        return self._by_kind.get(kind)

    def ready(self) -> bool:
        return all(service.state is ServiceState.READY for service in self if service.awaited)


class Asker:
    """Forwards calls to the services that answer them. `caller_of`: the agent for which a call is made. `choose`, by
    kind: picks one of several services of the same kind, and may refuse."""

    def __init__(
        self,
        services: Services,
        calls: CallTable,
        caller_of: Callable[[Call], link.Caller],
        choose: Mapping[str, Callable[[Call, Any], Service]],
    ) -> None:
        self._services = services
        self._calls = calls
        self._caller_of = caller_of
        self._choose = choose

    def ask(self, call: Call, args: Any, raw: Raw) -> None:
        """Send the call to its service; it stays open until the service replies. `args`: its checked arguments; `raw`:
        the same as received. Raises OSError: ENOSYS, EMSGSIZE."""
        row = call.row
        choose = self._choose.get(row.by)
        service = choose(call, args) if choose is not None else self._services.of_kind(row.by)
        if service is None:
            raise wire.error(errno.ENOSYS, f"{row.name}: this system has no {row.by}")
        call.forget = lambda: service.cancel(call)
        self._calls.set_timeout(call, getattr(args, "timeout_s", None), "answer")
        settled = _settled(call, service) if row.again is Again.ONCE else 0
        agent = call.peer if isinstance(call.peer, AgentPeer) else None
        life = agent.proc.restarts if agent is not None and agent.proc is not None else 0
        ahead = agent is not None and is_worth_it(agent, call.id)
        caller = self._caller_of(call)
        service.submit(call, link.Ask(call.key, caller, row.sys, raw, call.again, settled, life, ahead=ahead))


def _settled(call: Call, service: Service) -> int:
    """The value of `link.Ask.settled`: the id up to which the peer's calls are answered. A reply has reached its peer
    as soon as it lies in the ring or in the socket, since the SDK reads all of that before it submits its open calls to
    a new kernel. Only replies in the kernel's own outbox would be lost with it.

    A peer's calls are in the order in which they came, which is that of their ids: so the first call that the service
    has is the lowest. (A peer that numbers its calls in another way loses its own memos too early, and no other's.)"""
    peer = call.peer
    if peer.outbox_bytes:
        return 0
    open_calls = (one for one in peer.calls.values() if one.row.again is Again.ONCE and one.key in service.calls)
    return min(next((one.id for one in open_calls), call.id), call.id)
