"""Services: the processes that answer system calls for the kernel; their records, and their loop.

A service is data (`ServiceSpec`): its name, where its code is, whether the system waits for it. The supervisor forks it
from that record, and forks it again when it dies; the kernel, `aios-ps -e`, `aiosd status` and the logs use the same
record. The calls that it answers are the rows of `wire.TABLE` whose `by` is its kind.

A service that is no llm core serves with a `Server`: one function for each call. A function gets the `link.Ask` (with
key and caller) and the arguments, and returns the body of the reply; a generator yields parts of it before that, or a
`Pause` when it has to wait for something. An exception becomes the reply: an OSError as it is, any other as EIO. The
server fulfils `wire.Again`: it keeps its answers, and sends the same answer when a call is submitted again. For calls
that may be repeated it keeps only answers that took more than one step, and no large ones; other calls are done again.
A call that must take effect ONCE even if the service dies has to store its key together with its effect.

A function that finds that its call needs a decision (a deed) calls `require`. Nothing must have been done by then, or
the exception must undo it.

A service that waits for others (workers, files) returns LATER, and answers by `Server.answer`, `part` and `fail`. Its
loop sleeps until a message comes, a watched descriptor becomes readable, or a timer is due.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import importlib
import logging
import select
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from types import GeneratorType
from typing import Any, NamedTuple

import msgspec

from aiosd.access.deed import Deed, Subject, Unapproved
from aiosd.access.rules import AccessPolicy, Act
from aiosd.ipc import link
from aiosd.ipc.heartbeat import HANG_S, Rounds
from aiosd.ipc.newcomers import Newcomers
from aiosd.timers import Timers
from libaios import wire
from libaios.channel import Channel
from libaios.wire import Again

logger = logging.getLogger("service")

#: The kind of the llm cores.
LLM = "llm"
#: The name and kind of the tool manager.
TOOLBOX = "toolbox"
#: The name and kind of the proxy for agents that reach single hosts.
PROXY = "proxy"
#: The name of the service that acts for agents: see `aiosd.kernel.control`.
GATEWAY = "gateway"

TURNED_BACK = 4096  # calls that were sent back for a decision, and still count as new when they come again
REMEMBERED = 4096  # answers, for calls that are submitted again,
REMEMBERED_BYTES = 32 << 20  # … and most bytes of them;
SMALL = 64 << 10  # bytes: a larger answer is not remembered if its call may be done again
MESSAGES_AT_ONCE = 64
SLEEP_S = 5.0  # a back-stop: any message wakes the service at once
LOOK_S = 0.002  # while messages come one after another: how often the watched descriptors are checked
PAUSE_S = 0.05  # without a message, before work that can wait is done

#: What a function returns if its answer comes later.
LATER = object()

Handler = Callable[[link.Ask, Any], Any]


class Stopped(enum.IntEnum):
    """The order in which the system's own processes end, after all agents; those of one step together."""

    FIRST = 0  # before the kernel, which still serves: services that accept calls from outside
    LAST = 1  # together with the kernel


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """One system process below the supervisor. `entry` is `module:function`, called in the forked process with its
    channel, `argument`, and `Rounds`, to which its loop reports its rounds; it returns the exit code."""

    name: str  # unique in this system: "store", "llm:NAME"
    kind: str  # it answers the calls of the table with this `by`
    entry: str
    title: str = ""  # in aios-ps and logs; "": the name
    argument: Any = None
    awaited: bool = True  # the system is not ready before this is
    silent_s: float = HANG_S  # it is killed and replaced when no heartbeat came for this time
    stopped: Stopped = Stopped.LAST  # when it ends at the end of the system
    keep: tuple[int, ...] = ()  # descriptors of the supervisor that it needs
    confines: bool = False  # it starts processes that enter the cage

    @property
    def shown(self) -> str:
        """Its name in listings and logs."""
        return self.title or self.name

    def main(self, channel: Channel, rounds: Rounds) -> int:
        module, _, function = self.entry.partition(":")
        entry: Callable[[Channel, Any, Rounds], int] = getattr(importlib.import_module(module), function)
        return entry(channel, self.argument, rounds)


class Lasting(NamedTuple):
    """What a function returns if its caller would get the same body again for the same call, until `Server.take_back`
    is called with this promise (a number, not 0)."""

    body: Any
    promise: int


class Followed(NamedTuple):
    """What a function returns if the caller of `ask` is likely to make another call next. The answer to that is made
    when the effects of this call are durable, by a function of `Server.ahead`: as the handler of the other call, but it
    counts nothing, and may return None. If it is `Lasting` it goes along with the answer to this call."""

    body: Any
    ask: link.Ask
    sys: int
    args: Any


class Pause(NamedTuple):
    """What a call yields that cannot go on. It is resumed when anything has come, and at `until` (monotonic clock) at
    the latest; with 0 after all others have had their turn."""

    until: float = 0.0


@dataclass(slots=True)
class _KeptAnswer:
    """The answer of a call, for when it is submitted again."""

    message: link.Answered | link.Failed
    size: int
    life: int  # of its peer, see `link.Ask`


class _Begun(NamedTuple):
    """A call that was begun."""

    life: int  # of its peer, see `link.Ask`; 0 where it does not matter
    repeats: bool  # it may be done again (`wire.Again`)


_NOT_BEGUN = _Begun(0, False)
#: A call that may be done again, and has not been put off: doing it again is as fast as remembering its answer.
_SHORT = _Begun(0, True)


class _Woken(Exception):
    """Ends a sleep. (After a signal handler that returns, Python would resume it.)"""


@dataclass(slots=True)
class Server:
    """The loop of a service with one thread. `queued`: calls that may wait here before they begin; their function
    announces the beginning by `begun`."""

    channel: Channel
    handlers: Mapping[int, Handler]
    stats: Callable[[], dict[str, Any]] = dict
    on_gone: Callable[[int], None] = lambda peer: None  # called when this peer is dead
    on_keep: Callable[[list[int]], None] = lambda peers: None  # called when all peers but these are dead
    on_cancel: Callable[[link.CallKey], None] = lambda key: None  # for a cancelled call whose answer was to come later
    on_again: Callable[[link.CallKey], None] = lambda key: None  # called when such a call is open in a new kernel, too
    queued: frozenset[int] = frozenset()
    rest: Callable[[], None] = lambda: None  # called in a pause: for work that can wait
    timers: Timers = field(default_factory=Timers)
    _watched: dict[int, Callable[[], None]] = field(default_factory=dict)
    _later: set[link.CallKey] = field(default_factory=set)
    info: Mapping[str, Any] = field(default_factory=dict)  # for `link.Loaded`
    others: Callable[[link.ToService], link.FromService | None] = lambda message: None  # any other message, its answer
    charge: Callable[[Any], int] = lambda body: 0  # tokens that the caller pays for this answer
    on_used: Callable[[dict[int, int]], None] = lambda counts: None  # promised answers that the kernel has given again
    on_begin: Callable[[], None] = lambda: None  # called when a new kernel begins, which has no promise
    ahead: Mapping[int, Handler] = field(default_factory=dict)  # the answers to calls that may follow
    background: Callable[[], float] = lambda: SLEEP_S  # called in each round; for how many seconds it can wait then
    _answers: OrderedDict[link.CallKey, _KeptAnswer] = field(default_factory=OrderedDict)
    _bytes: int = 0
    _under_way: dict[link.CallKey, Generator[Any, None, Any]] = field(default_factory=dict)
    _offsets: dict[link.CallKey, int] = field(default_factory=dict)
    policy: AccessPolicy = field(default_factory=AccessPolicy)
    _newcomers: Newcomers = field(default_factory=Newcomers)
    _turned_back: OrderedDict[link.CallKey, int] = field(default_factory=OrderedDict)  # with their lives
    _lives: dict[link.CallKey, _Begun] = field(default_factory=dict)  # the calls that were begun and have no answer yet
    _rested: bool = False  # `rest` was called since the last message
    _asleep: bool = False
    _looked_at: float = 0.0
    _paused: dict[link.CallKey, float] = field(default_factory=dict)
    _quit: bool = False

    def run(self, rounds: Rounds) -> int:
        """Serve until the kernel ends the service, or its end of the channel is gone for good."""
        channel = self.channel
        self.send(link.Loaded(dict(self.info)))
        while not self._quit and not channel.hung_up:
            rounds.begin()
            frames: list[bytes] = []
            channel.take(frames, MESSAGES_AT_ONCE)
            messages = [link.decode_to_service(payload) for payload in frames]
            more = len(frames) == MESSAGES_AT_ONCE or channel.fragmented
            if messages:
                self._rested = False
                self._turn(messages)
            if channel.outbox_bytes:
                channel.pump()
            if channel.reborn:  # a new kernel: it submits again what is open
                channel.renew()
                channel.work.end()  # the announced call was for the kernel that has died
                self.on_begin()
                self.send(link.Loaded(dict(self.info)))
            wait = min(SLEEP_S, self.background())
            if self._under_way:
                for key in list(self._under_way):
                    self._step(key)
            self.timers.run_due()
            if self._under_way:
                wait = min(wait, self._next_turn())
            if wait > 0 and not more and not self._quit:
                rounds.end()
                with contextlib.suppress(_Woken):
                    self._pause(wait)
            else:
                self._look_in_time()
        return 0

    def _next_turn(self) -> float:
        """The number of seconds for which no call can go on."""
        if len(self._paused) < len(self._under_way):
            return 0.0
        return min(self._paused.values()) - time.monotonic()

    def end(self, *_: object) -> None:
        """For a signal handler: end in order, after the current turn."""
        self._quit = True
        if self._asleep:
            raise _Woken

    def _turn(self, messages: list[link.ToService]) -> None:
        """Handle all messages that have come."""
        for message in messages:
            self._handle(message)

    def _step(self, key: link.CallKey) -> None:
        """Do one step of a call whose function is a generator."""
        self._go_on(key)

    def _pause(self, wait: float) -> None:
        """Sleep until there is something to do. `rest` is called in a pause, not in the moment between two calls."""
        try:
            self._asleep = True
            if self._quit:
                return
            due = self.timers.until_next()
            timeout = wait if due is None else min(wait, due)
            if self._rested or timeout <= PAUSE_S:
                self._sleep(timeout)
                return
            if self._sleep(PAUSE_S):
                return
        finally:
            self._asleep = False
        self._rested = True
        self.rest()

    def _sleep(self, timeout: float) -> bool:
        """Sleep until a message or an event of a watched descriptor comes. False: nothing has come."""
        if not self._watched:
            return self.channel.wait(timeout)
        awake = self.channel.wait(timeout, tuple(self._watched))
        if self.channel.filled():
            self._look_in_time()
        else:
            self._look()
        return awake

    def _look_in_time(self) -> None:
        """While messages wait, check the watched descriptors now and then."""
        if self._watched and time.monotonic() >= self._looked_at + LOOK_S:
            self._look()

    def _look(self) -> None:
        """Check the watched descriptors, and handle their events."""
        self._looked_at = time.monotonic()
        poll = select.poll()
        for fd in self._watched:
            poll.register(fd, select.POLLIN)
        for fd, _ in poll.poll(0):
            if fd in self._watched:  # an earlier callback may have ended the watch
                self._watched[fd]()

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Call back whenever the descriptor is readable or hung up."""
        self._watched[fd] = callback

    def forget(self, fd: int) -> None:
        """End a watch. To be called before the descriptor is closed."""
        self._watched.pop(fd, None)

    def send(self, message: link.FromService) -> None:
        self.channel.send(link.encode(message))

    def _handle(self, message: link.ToService) -> None:
        match message:
            case link.Ask():
                self._ask(message)
            case link.CancelCall(key=key):
                self._newcomers.drop(key)
                self._end(key)
                self._lives.pop(key, None)
            case link.Keep(peers=peers):
                kept = set(peers)
                for key in [key for key in (*self._under_way, *self._later) if key[0] not in kept]:
                    self._newcomers.drop(key)
                    self._end(key)
                    self._lives.pop(key, None)
                self._quietly(lambda: self.on_keep(peers))
            case link.PeerGone(peer=peer):
                self._newcomers.forget(peer)
                self._quietly(lambda: self.on_gone(peer))
            case link.Rules(policy=policy):
                self.policy = policy
            case link.CopiesUsed(counts=counts):
                self.on_used(counts)
            case link.GetStats(req=req):
                self.send(link.Stats(req, self.stats()))
            case link.Quit():
                self._quit = True
            case _:
                answer = self.others(message)
                if answer is not None:
                    self.send(answer)

    @staticmethod
    def _quietly(act: Callable[[], None]) -> None:
        """Do work for which no call waits. If it fails it is done again at the next start of the service."""
        try:
            act()
        except OSError as err:
            logger.warning("what dead agents have left stays for now: %s", err.strerror)

    # ── calls ─────────────────────────────────────────────────────────────────────────────────────────────

    def _ask(self, ask: link.Ask) -> None:
        row = wire.TABLE[ask.sys]
        if not ask.again and not ask.moved:
            self._newcomers.note(ask)
        known = self._answers.get(ask.key) if ask.again else None
        if known is not None and known.life == ask.life:
            self.send(known.message)
        elif ask.key in self._under_way or ask.key in self._later:
            self.on_again(ask.key)  # the call goes on, and its answer goes to the new kernel
        elif ask.again and row.again is Again.NEVER and not self._may_begin(ask):
            reason = f"{row.name}: it had begun before a process died, and is not done again"
            self.send(link.Failed(ask.key, errno.EIO, reason))
        else:
            if ask.sys not in self.queued:
                self.channel.work.begin(*ask.key)
                if row.again is Again.NEVER:
                    self.begun(ask.key)
            self._lives[ask.key] = _SHORT if row.again is Again.REPEAT else _Begun(ask.life, False)
            self._begin(ask)

    def _may_begin(self, ask: link.Ask) -> bool:
        """Whether it is certain that a call that is submitted again was not begun before."""
        return self._turned_back.get(ask.key) == ask.life or self._newcomers.has(ask)

    def require(self, ask: link.Ask, deed: Deed) -> None:
        """Raises Unapproved unless the call may do this: the deed was allowed, or no rule and no default is against
        it."""
        caller = ask.caller
        if not caller.pid or ask.approved == deed.digest:
            return
        decision = self.policy.decide(Subject(caller.group, caller.program, caller.sha256), deed)
        if decision.act is not Act.ALLOW or decision.rule:
            raise Unapproved(deed)

    def _begin(self, ask: link.Ask) -> None:
        try:
            handler = self.handlers[ask.sys]
            result = handler(ask, wire.decode_args[ask.sys](ask.args))
        except Exception as err:  # a bug of one handler: it ends this call, and no other
            self._failed(ask.key, err)
            return
        self._turned_back.pop(ask.key, None)
        if isinstance(result, GeneratorType):
            self._under_way[ask.key] = result
            self._put_off(ask)
        elif result is LATER:
            self._later.add(ask.key)
            self._put_off(ask)
        else:
            self._answered(ask.key, result)

    def _put_off(self, ask: link.Ask) -> None:
        self._offsets[ask.key] = 0
        if self._lives.get(ask.key) is _SHORT:
            self._lives[ask.key] = _Begun(ask.life, True)

    def _go_on(self, key: link.CallKey) -> None:
        """Make one more part of a long answer, so that no call waits for all of another one's."""
        self.channel.work.begin(*key)
        try:
            part = next(self._under_way[key])
        except StopIteration as end:
            self._answered(key, end.value)
        except Exception as err:  # a bug of one handler: it ends this call, and no other
            self._failed(key, err)
        else:
            self._paused.pop(key, None)
            if isinstance(part, Pause):
                self._paused[key] = part.until
                self.channel.work.end()  # the call is not to blame for a death while it waits
            else:
                self.send(link.Part(key, self._offsets[key], wire.encode(part)))
                self._offsets[key] += 1

    def begun(self, key: link.CallKey) -> None:
        """A queued call begins now. From here on, a NEVER call is lost if this process dies."""
        self.channel.send_silently(link.encode(link.Begun(key)))  # read with the next message, or after a death

    def take_back(self, promises: list[int]) -> None:
        """Take back promises of `Lasting` answers. To be called before the answer to the call that has changed their
        data."""
        self.send(link.Stale(promises))

    def part(self, key: link.CallKey, body: object) -> None:
        """Send a part of an answer that comes later."""
        if key in self._later:
            self.send(link.Part(key, self._offsets[key], wire.encode(body)))
            self._offsets[key] += 1

    def answer(self, key: link.CallKey, body: object) -> None:
        """Send the answer that was to come later. Without effect for a call that was cancelled."""
        if key in self._later:
            self._later.remove(key)
            self._answered(key, body)

    def fail(self, key: link.CallKey, err: Exception) -> None:
        """The same for an error."""
        if key in self._later:
            self._later.remove(key)
            self._failed(key, err)

    def _answered(self, key: link.CallKey, body: object) -> None:
        promise = 0
        followed: Followed | None = None
        if isinstance(body, Lasting):
            body, promise = body
        elif isinstance(body, Followed):
            followed, body = body, body.body
        encoded = wire.encode(body)
        if len(encoded) > wire.MAX_FRAME - 1024:
            self._failed(key, wire.error(errno.EMSGSIZE, f"an answer of {len(encoded)} bytes; ask for less at a time"))
        else:
            answer = link.Answered(key, encoded, self.charge(body), promise)
            self._finish(key, answer, len(encoded), followed)

    def _failed(self, key: link.CallKey, err: Exception) -> None:
        if isinstance(err, Unapproved):
            self._turn_back(key, err.deed)
            return
        if not isinstance(err, OSError):
            logger.error("a call cannot be served", exc_info=err)
            err = OSError(errno.EIO, "the service made a mistake; aiosd's log has the details")
        self._finish(key, as_failed(key, err), 0)

    def _turn_back(self, key: link.CallKey, deed: Deed) -> None:
        """Send a call back, because the kernel has to decide; here it counts as never begun."""
        life = self._lives.pop(key, _NOT_BEGUN).life
        self._end(key)
        self._turned_back[key] = life
        if len(self._turned_back) > TURNED_BACK:
            self._turned_back.popitem(last=False)
        self.send(link.Needs(key, deed))

    def _finish(
        self, key: link.CallKey, message: link.Answered | link.Failed, size: int, followed: Followed | None = None
    ) -> None:
        if key in self._offsets:  # its answer was to come later
            self._end(key)
        self._out(message, size, followed)

    def _out(self, message: link.Answered | link.Failed, size: int, followed: Followed | None = None) -> None:
        key = message.key
        ahead = self._made_ahead(followed) if followed is not None else None
        self.send(message if ahead is None else msgspec.structs.replace(message, ahead=ahead))
        begun = self._lives.pop(key, _NOT_BEGUN)
        if begun is _SHORT or (begun.repeats and size > SMALL):
            return
        if isinstance(message, link.Answered) and message.promise:  # not again: it may be taken back by then
            message = link.Answered(key, message.body, message.prompt_tokens)
        old = self._answers.pop(key, None)
        self._answers[key] = _KeptAnswer(message, size, begun.life)
        self._bytes += size - (old.size if old is not None else 0)
        while len(self._answers) > REMEMBERED or self._bytes > max(REMEMBERED_BYTES, size):
            dropped, answer = self._answers.popitem(last=False)
            self._newcomers.drop(dropped)
            self._bytes -= answer.size

    def _made_ahead(self, followed: Followed) -> link.Ahead | None:
        """The answer to the call that is expected, if the kernel may keep a copy of it."""
        found = self.ahead[followed.sys](followed.ask, followed.args)
        if not isinstance(found, Lasting):
            return None
        body = wire.encode(found.body)
        if len(body) > link.LARGEST_COPY:
            return None
        return link.Ahead(followed.sys, wire.encode(followed.args), body, found.promise)

    def _end(self, key: link.CallKey) -> None:
        """End a call that goes on in steps: it is over or cancelled."""
        if key in self._later:
            self._later.remove(key)
            self.on_cancel(key)
        generator = self._under_way.pop(key, None)
        self._offsets.pop(key, None)
        self._paused.pop(key, None)
        if generator is not None:
            generator.close()


def as_failed(key: link.CallKey, err: OSError) -> link.Failed:
    return link.Failed(key, err.errno or errno.EIO, err.strerror or str(err))
