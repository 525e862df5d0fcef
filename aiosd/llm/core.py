"""The core's process: it receives the kernel's messages, runs the engine's steps, and sends the results back.

`main` runs in a process that the supervisor has forked. Its exit code is 0 after `link.Quit` or when the kernel's end
of the channel is closed for good, and 1 after `link.LoadFailed`. Any other exception is a bug: its trace goes to
stderr, and the supervisor starts a new core. SIGINT is ignored: Ctrl-C is meant for the foreground process.

While a call can run, the loop does not wait: it looks at its messages between two steps, which costs a read of shared
memory. Without work it sleeps until a message comes.
"""

from __future__ import annotations

import errno
import faulthandler
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import msgspec

from aiosd import link
from aiosd.errors import AiosdError, as_oserror
from aiosd.heartbeat import Rounds
from aiosd.llm import policy
from aiosd.llm.document import Later
from aiosd.llm.front import PREPARE, TOKENIZE, Front
from aiosd.llm.spec import ModelSpec
from libaios import wire
from libaios.wire import Sys

logger = logging.getLogger("llm.core")

#: If more bytes than this wait for the kernel, it reads slowly: then the engine collects tokens and reports them later.
CONGESTED = 256 << 10

#: The most memory for contexts without a slot where no setting gives a size.
MOST_CONTEXT_RAM = 4 << 30

#: The largest answer (bytes) that fits into one frame on its way to the caller.
MAX_ANSWER = wire.MAX_FRAME - 1024

_CONTEXT_CALLS = (Sys.CTX_SAVE, Sys.CTX_RESTORE, Sys.CTX_CLOSE, Sys.CTX_LIST, Sys.CTX_REMOVE)

#: How threads of llama.cpp wait for each other; OpenMP reads this when it is loaded. A thread that waits checks 1,000
#: times, which takes some microseconds, and then sleeps. By default it would check for milliseconds. If other processes
#: need the processors too, the thread that it waits for cannot run meanwhile: beside two busy processes a step took 10
#: to 150 times as long.
THREADS_WAIT = {"GOMP_SPINCOUNT": "1000"}

_MESSAGES_AT_ONCE = 64
PLACES_EVERY = 1.0  # seconds between two reports on where contexts lie, while calls run; more where a report takes long
PLACES_SHARE = 0.005  # the largest part of the time that these reports may take
LONG_TEXT = 1 << 15  # texts of more characters are tokenised by the front process, so that other calls need not wait
_FRONT_POLL = 0.002  # seconds to wait for the front process where there is no other work; messages wait no longer
_POLL = 0.005  # seconds of sleep while a file is written or read
_SLEEP = 5.0  # seconds of sleep without work; any message wakes the core at once
_LOOK_EVERY = 0.05  # seconds between two checks for a hang-up while busy


class Channel(Protocol):
    """The part of `libaios.channel.Channel` that the core uses."""

    outbox_bytes: int
    hung_up: bool
    more: bool

    @property
    def reborn(self) -> bool: ...
    def renew(self) -> None: ...
    def ready(self) -> bool: ...
    def receive(self, limit: int) -> list[bytes]: ...
    def send(self, payload: bytes) -> None: ...
    def pump(self) -> bool: ...
    def wait(self, timeout: float | None) -> bool: ...


def main(channel: Channel, spec: ModelSpec, rounds: Rounds) -> int:
    """Load the model, serve, return the exit code. `rounds` is told when a round of the loop begins and ends."""
    faulthandler.enable(sys.stderr)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name, value in THREADS_WAIT.items():
        os.environ.setdefault(name, value)
    from aiosd.llm import llama, loading  # llama.cpp and numpy, only in this process

    llama.start(spec.verbose)
    send = _sender(channel)

    def refuse(why: str) -> int:
        send(link.LoadFailed(f"{spec.name}: {why}".replace("\n", " ")))
        _drain(channel)
        return 1

    # Some damaged files are detected only by an assertion in llama.cpp, which ends the process: send a reason first.
    llama.on_abort(lambda why: os._exit(refuse(f"{spec.path}: damaged: {why}")))
    try:
        loaded = loading.load(spec, lambda what, fraction: send(link.Progress(what, fraction)))
    except AiosdError as error:
        return refuse(str(error))
    llama.on_abort(None)
    core = CoreProcess(channel, spec, loaded)
    send(link.Loaded(core.info))
    return core.run(rounds)


def _sender(channel: Channel) -> Callable[[link.FromService], None]:
    def send(message: link.FromService) -> None:
        channel.send(link.encode(message))

    return send


def _drain(channel: Channel) -> None:
    """Send what is still unsent before the process ends."""
    deadline = time.monotonic() + 2.0
    while channel.outbox_bytes and not channel.hung_up and time.monotonic() < deadline:
        channel.wait(0.05)
        channel.pump()


class CoreProcess:
    """One engine and the channel to its kernel."""

    def __init__(self, channel: Channel, spec: ModelSpec, loaded: Any) -> None:
        from aiosd.llm.embed import Embedder
        from aiosd.llm.engine import Engine
        from aiosd.llm.library import Library

        self._channel = channel
        self._spec = spec
        self._loaded = loaded
        self._send = _sender(channel)
        self._inbox: list[link.ToService] = []  # messages that came while a batch was computed
        self._cancelled: set[link.Key] = set()  # calls that are cancelled by these messages
        self.engine = Engine(
            loaded.model,
            loaded.context,
            ctx=loaded.ctx,
            slots=loaded.slots,
            exact=spec.exact,
            emit=self._send,
            congested=lambda: channel.outbox_bytes > CONGESTED,
            ram=context_ram(spec),
            disk=spec.context_disk,
            folder=spec.folder,
            cancelled=self._look_ahead,
        )
        self._embedder = Embedder(loaded.model, loaded.threads.number)
        self._embeds: dict[link.Key, Iterator[wire.Embedded | None]] = {}  # being computed, the oldest first
        self.info = loaded.info(
            chat=self.engine.requests.template.given, tools=self.engine.requests.template.takes_tools
        )
        self._library = Library(
            spec.folder,
            loaded.path,
            self.engine.cache,
            self.engine.requests,
            self._answer,
            self._refuse,
            exact=spec.exact,
        )
        self._front = Front(loaded.path, loaded.ctx)
        self._places_due = 0.0
        self._places: dict[int, tuple[str, int]] = {}
        self._quit = False
        self._calls: dict[int, Callable[[link.Key, Any], None]] = {
            Sys.EMBED: self._embed,
            Sys.TOKENIZE: self._tokenize,
            Sys.DETOKENIZE: self._detokenize,
        }
        self._schedule: link.Schedule | None = None
        self._handlers: dict[type, Callable[[Any], None]] = {
            link.Submit: self._submit,
            link.Ask: self._ask,
            link.CancelCall: self._cancel,
            link.Park: self._park,
            link.ParkCall: lambda message: self.engine.park_call(message.key, message.parked),
            link.Keep: self._keep,
            link.Schedule: self._reschedule,
            link.Renice: lambda message: self.engine.renice(message.peer, message.nice),
            link.Gone: lambda message: self.engine.gone(message.peer),
            link.GetStats: lambda message: self._send(link.Stats(message.req, self.stats())),
            link.Quit: lambda message: setattr(self, "_quit", True),
        }

    def run(self, rounds: Rounds) -> int:
        channel, engine = self._channel, self.engine
        looked = 0.0
        while not self._quit and not channel.hung_up:
            rounds.begin()
            now = time.monotonic()
            if (
                self._inbox or channel.ready() or now - looked > _LOOK_EVERY
            ):  # the second also finds out about a hang-up
                looked = now
                self._receive()
            if channel.outbox_bytes:
                channel.pump()
            if self._library.busy:
                self._library.poll()
            if self._embeds:
                self._embed_one()
            if self._front.busy:
                idle = not engine.has_work and not self._embeds and not channel.more
                self._front.poll(_FRONT_POLL if idle else 0.0)
            if engine.has_work:
                engine.step()
                if now > self._places_due:
                    self._tell_places()
            elif not self._embeds and not channel.more and not self._quit and not self._front.busy:
                self._tell_places()
                rounds.end()
                if not channel.wait(_POLL if self._library.busy else _SLEEP):
                    self._measure_again()
                looked = 0.0
        self._front.close()
        self._library.close()
        _drain(channel)
        return 0

    def _measure_again(self) -> None:
        """No message has come for a while. If the number of threads was measured beside other busy processes, and the
        machine is quiet now, measure it again."""
        from aiosd.llm.loading import MEASURED_ROWS
        from aiosd.llm.threads import machine_is_quiet

        if self._loaded.threads.again and not self.engine.num_calls and machine_is_quiet():
            empty = self.engine.slots.empty()[:MEASURED_ROWS]
            if empty:
                self._loaded.measure_again(empty)

    def _receive(self) -> None:
        inbox, self._inbox = self._inbox, []
        self._cancelled.clear()
        for message in inbox:
            self._handlers[type(message)](message)
        for payload in self._channel.receive(_MESSAGES_AT_ONCE):
            self.handle(payload)
        if self._channel.reborn:  # a new kernel: it sends which calls to keep, and submits its open calls again
            self._channel.renew()
            self._send(link.Loaded(self.info))

    def handle(self, payload: bytes) -> None:
        message = link.decode_to_service(payload)
        self._handlers[type(message)](message)

    def _look_ahead(self) -> set[link.Key]:
        """The calls that were cancelled while a batch is computed. Their messages are handled after the batch."""
        if self._channel.ready() and len(self._inbox) < _MESSAGES_AT_ONCE:
            for payload in self._channel.receive(_MESSAGES_AT_ONCE):
                message = link.decode_to_service(payload)
                self._inbox.append(message)
                if isinstance(message, link.CancelCall):
                    self._cancelled.add(message.key)
        return self._cancelled

    def _reschedule(self, message: link.Schedule) -> None:
        """Use another policy or another quantum. A new kernel sends the settings again: if they are the same, the
        policy keeps its state."""
        if message != self._schedule:
            self._schedule = message
            quantum = policy.Quantum(message.tokens, message.seconds)
            self.engine.set_policy(policy.make(message.policy, quantum, message.shares))

    def _park(self, message: link.Park) -> None:
        self.engine.park(message.peer, message.parked)
        if message.number:
            self._send(link.Parked(message.number))

    # ── calls. Templates, schemas and tokenising may hang or end this process, so the kernel is told which call is
    #    being worked on (`Working`), and blames only that ──

    def _submit(self, message: link.Submit) -> None:
        self._send(link.Working(message.key))
        self._front.cancel(lambda key: key == message.key)  # if it is there, a new kernel has submitted it again
        prepared = None
        if not self.engine.knows(message.key):
            try:
                prepared = self.engine.requests.prepare(message.request, quick=True)
            except Later:
                self._prepare(message)
                return
            except Exception as error:  # any: the engine meets the same one below, and reports it
                logger.debug("call %d of %d: %s", message.key[1], message.key[0], error)
        self.engine.submit(message, prepared)
        self._send(link.Working(None))

    def _prepare(self, message: link.Submit) -> None:
        """The work on its text takes long: the front process does it, and this process works on other calls."""
        from aiosd.llm.request import Prepared

        self._send(link.Working(None))
        decode = msgspec.msgpack.Decoder(Prepared).decode
        self._front.ask(
            message.key,
            PREPARE,
            wire.encode(message.request),
            lambda result: self.engine.submit(message, decode(result)),
            lambda error: self._refuse(message.key, error),
        )

    def _ask(self, ask: link.Ask) -> None:
        self._send(link.Working(ask.key))
        if ask.sys in _CONTEXT_CALLS:
            self._library.handle(ask)
        else:
            self._calls[ask.sys](ask.key, wire.decode_args[ask.sys](ask.args))
        self._send(link.Working(None))

    def _tokenize(self, key: link.Key, request: wire.Tokenize) -> None:
        if len(request.text) > LONG_TEXT:
            self._front.ask(
                key,
                TOKENIZE,
                wire.encode(request),
                lambda result: self._answer(key, msgspec.msgpack.decode(result)),
                lambda error: self._refuse(key, error),
            )
            return
        try:
            tokens = self._loaded.model.tokenize(request.text, bos=False, special=request.special)
        except Exception as error:
            self._refuse(key, as_oserror(error))
            return
        self._answer(key, tokens)

    def _detokenize(self, key: link.Key, request: wire.Detokenize) -> None:
        try:
            self.engine.requests.check_ids(request.tokens, "tokens")
            text = self._loaded.model.text(request.tokens)
        except Exception as error:
            self._refuse(key, as_oserror(error))
            return
        self._answer(key, text)

    def _cancel(self, message: link.CancelCall) -> None:
        self._embeds.pop(message.key, None)
        self._front.cancel(lambda key: key == message.key)
        self.engine.cancel(message.key)

    def _keep(self, message: link.Keep) -> None:
        kept = set(message.peers)
        self._embeds = {key: steps for key, steps in self._embeds.items() if key[0] in kept}
        self._front.cancel(lambda key: key[0] not in kept)
        self.engine.keep(kept)

    # ── embeddings: one text in each round of the loop, so that many texts do not delay other calls for long ──

    def _embed(self, key: link.Key, request: wire.Embed) -> None:
        if key not in self._embeds:
            self._embeds[key] = self._embedder.in_steps(request.texts)

    def _embed_one(self) -> None:
        key, steps = next(iter(self._embeds.items()))
        try:
            embedded = next(steps)
        except Exception as error:
            del self._embeds[key]
            self._refuse(key, as_oserror(error))
            return
        if embedded is not None:
            del self._embeds[key]
            self._answer(key, embedded, embedded.prompt_tokens)

    def _tell_places(self) -> None:
        began = time.monotonic()
        places = {peer: place for peer, place in self.engine.cache.by_peer().items() if peer > 0}
        if places != self._places:
            self._places = places
            self._send(link.Contexts(places))
        now = time.monotonic()
        self._places_due = now + max(PLACES_EVERY, (now - began) / PLACES_SHARE)

    def _answer(self, key: link.Key, body: object, prompt_tokens: int = 0) -> None:
        encoded = wire.encode(body)
        if len(encoded) > MAX_ANSWER:
            self._refuse(key, wire.error(errno.EMSGSIZE, f"an answer of {len(encoded)} bytes; ask for less at a time"))
        else:
            self._send(link.Answered(key, encoded, prompt_tokens))

    def _refuse(self, key: link.Key, error: OSError) -> None:
        self._send(link.Failed(key, error.errno or 22, error.strerror or str(error)))

    # ── figures for `aiosd status` ──

    def stats(self) -> dict[str, Any]:
        from aiosd.llm import llama

        loaded = self._loaded
        return {
            "model_bytes": loaded.model.size,
            "kv_bytes": loaded.kv_bytes,
            "rss_bytes": _rss(),
            "threads": loaded.threads.number,
            "threads_why": loaded.threads.why,
            "gpu_layers": loaded.gpu_layers,
            "device": loaded.device,
            "flash_attention": "auto" if loaded.flash_attention is None else loaded.flash_attention,
            "attention": loaded.attention,
            "exact": self._spec.exact,
            "chat_template": "the model's" if self.engine.requests.template.given else "ChatML (the model has none)",
            "llama_cpp": llama.version(),
            **self.engine.stats(),
        }


def context_ram(spec: ModelSpec) -> int:
    """How many bytes of memory contexts without a slot may use."""
    from aiosd.models.fit import available_memory

    return spec.context_ram if spec.context_ram is not None else min(available_memory() // 8, MOST_CONTEXT_RAM)


def _rss() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
