"""The backend that runs a model in this process, with llama.cpp.

`open_model` loads it. `Local` takes the kernel's messages: generations go to the engine, embeddings to the embedder,
contexts by name to the library, and work on text that takes long to the front process.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from msgspec import msgpack

from aiosd.errors import as_oserror
from aiosd.ipc import link
from aiosd.llm import libraries, policy
from aiosd.llm.document import Later
from aiosd.llm.front import CONVERSATION, PAIRS, PREPARE, TEXTS, TOKENIZE, Front
from aiosd.llm.line import Line
from aiosd.llm.spec import ModelSpec
from libaios import wire
from libaios.wire import Sys

logger = logging.getLogger("llm.local")

#: The most memory for contexts without a slot if no setting gives a size.
MOST_CONTEXT_RAM = 4 << 30

PLACES_EVERY = 1.0  # seconds between two reports on where contexts lie, while calls run; more where a report takes long
PLACES_SHARE = 0.005  # the largest part of the time that these reports may take
LONG_TEXT = 1 << 15  # texts of more characters are tokenised by the front process, so that other calls need not wait
QUIET_S = 5.0  # seconds without work after which the machine may be quiet enough to measure threads again


def open_model(spec: ModelSpec, line: Line) -> Local:
    """Load the model. Raises AiosdError with one line: the reason why it cannot be loaded."""
    libraries.prepare()
    from aiosd.llm import llama, loading  # llama.cpp and numpy, only in this process

    llama.start(spec.verbose)
    # Some damaged files are detected only by an assertion in llama.cpp, which ends the process: send a reason first.
    llama.on_abort(lambda why: line.die(f"{spec.path}: damaged: {why}"))
    loaded = loading.load(spec, line.progress)
    llama.on_abort(None)
    return Local(spec, line, loaded)


class Local:
    """One engine, with the embedder, the library and the front process beside it."""

    def __init__(self, spec: ModelSpec, line: Line, loaded: Any) -> None:
        from aiosd.llm.embed import EmbeddingEngine
        from aiosd.llm.embedqueue import EmbedQueue
        from aiosd.llm.engine import Engine
        from aiosd.llm.library import Library

        self._spec = spec
        self._line = line
        self._loaded = loaded
        self.engine = Engine(
            loaded.model,
            loaded.context,
            ctx=loaded.ctx,
            slots=loaded.slots,
            exact=spec.exact,
            emit=line.send,
            congested=line.congested,
            ram=context_ram(spec),
            disk=spec.context_disk,
            folder=spec.folder,
            cancelled=line.cancelled,
            ahead=loaded.ahead,
        )
        self.engine.meter.expect(loaded.prompt_batch.rate)
        self._embedder = EmbeddingEngine(loaded.model, loaded.threads.number)
        self._embeds = EmbedQueue()
        template = self.engine.requests.template
        self.info: dict[str, Any] = loaded.info(chat=template.given, tools=template.takes_tools)
        self._library = Library(spec, self.engine.cache, line.answer, line.refuse, exact=spec.exact, rope=spec.rope)
        self._front = Front(loaded.path, loaded.ctx, loaded.model.own_template)
        self._places_due = 0.0
        self._places: dict[int, tuple[str, int]] = {}
        self._quiet_since = time.monotonic()
        self._schedule: link.Schedule | None = None
        self._calls: dict[int, Callable[[link.Ask, Any], None]] = {
            Sys.EMBED: self._embed,
            Sys.RERANK: self._rerank,
            Sys.TOKENIZE: self._tokenize,
            Sys.DETOKENIZE: self._detokenize,
            Sys.CTX_SAVE: self._about_conversation,
            Sys.CTX_CLOSE: self._about_conversation,
            Sys.CTX_RESTORE: self._library.handle,
            Sys.CTX_LIST: self._library.handle,
            Sys.CTX_REMOVE: self._library.handle,
        }
        self.table: dict[type, Callable[[Any], None]] = {
            link.Submit: self._submit,
            link.Ask: self._ask,
            link.CancelCall: self._cancel,
            link.Park: self._park,
            link.ParkCall: lambda message: self.engine.park_call(message.key, message.parked),
            link.Keep: self._keep,
            link.Schedule: self._reschedule,
            link.Renice: self._renice,
            link.PeerGone: self._gone,
        }

    # ── one round of the loop ─────────────────────────────────────────────────────────────────────────────

    @property
    def has_work(self) -> bool:
        return self.engine.has_work or self._embeds.has_work

    def step(self) -> None:
        now = time.monotonic()
        if self._library.busy:
            self._library.poll()
        if self._embeds.has_work:
            self._embed_one()
        if self._front.busy:
            self._front.poll()
        if self.engine.has_work:
            self.engine.step()
            self._quiet_since = now
            if now > self._places_due:
                self._report_places()
        elif not self._embeds.has_work:
            self._report_places()
            if now - self._quiet_since > QUIET_S:
                self._quiet_since = now
                self.measure_again()

    def fds(self) -> Sequence[int]:
        return [*self._front.fds(), *self._library.fds()]

    def close(self) -> None:
        self._front.close()
        self._library.close()

    def measure_again(self) -> None:
        """What was measured beside other busy processes is measured again when the machine is quiet."""
        from aiosd.llm.loading import MEASURED_ROWS
        from aiosd.llm.threads import MOST_STEPS, machine_is_quiet

        if self._loaded.again and not self.engine.num_calls and machine_is_quiet():
            empty = self.engine.slots.empty()[:MEASURED_ROWS]
            if empty and self.engine.cache.make_room(len(empty) * MOST_STEPS):
                self._loaded.measure_again(empty)
                self.engine.guesser.set(self._loaded.ahead)

    def _report_places(self) -> None:
        began = time.monotonic()
        places = {peer: place for peer, place in self.engine.cache.by_peer().items() if peer > 0}
        if places != self._places:
            self._places = places
            self._line.send(link.Contexts(places))
        now = time.monotonic()
        self._places_due = now + max(PLACES_EVERY, (now - began) / PLACES_SHARE)

    # ── messages ──────────────────────────────────────────────────────────────────────────────────────────

    def _reschedule(self, message: link.Schedule) -> None:
        """Use another policy or another quantum. A new kernel sends the settings again: if they are the same, the
        policy keeps its state."""
        if message != self._schedule:
            self._schedule = message
            quantum = policy.Quantum(message.tokens, message.seconds)
            self.engine.set_policy(policy.make(message.policy, quantum, message.shares))
            self._embeds.set_policy(policy.make(message.policy, quantum, message.shares))

    def _renice(self, message: link.Renice) -> None:
        self.engine.renice(message.peer, message.nice)
        self._embeds.renice(message.peer, message.nice)

    def _gone(self, message: link.PeerGone) -> None:
        self.engine.gone(message.peer)
        self._embeds.gone(message.peer)

    def _park(self, message: link.Park) -> None:
        self.engine.park(message.peer, message.parked)
        self._embeds.park(message.peer, message.parked)
        if message.number:
            self._line.send(link.Parked(message.number))

    def _cancel(self, message: link.CancelCall) -> None:
        self._embeds.remove(message.key)
        self._front.cancel(lambda key: key == message.key)
        self.engine.cancel(message.key)

    def _keep(self, message: link.Keep) -> None:
        kept = set(message.peers)
        self._embeds.keep(kept)
        self._front.cancel(lambda key: key[0] not in kept)
        self.engine.keep(kept)

    # ── calls. Templates, schemas and tokenising may hang or end this process, so the core reports which call is
    #    being worked on (`Working`), and the kernel blames only that ──

    def _submit(self, message: link.Submit) -> None:
        if not self._loaded.model.causal:
            what = "an encoder, which makes vectors or scores (embed, rerank) and writes no text"
            self._line.refuse(message.key, OSError(errno.EINVAL, f"model: {self._spec.name} is {what}"))
            return
        self._line.send(link.Working(message.key))
        self._front.cancel(lambda key: key == message.key)  # a new kernel may have submitted it again
        prepared = None
        if not self.engine.knows(message.key):
            try:
                prepared = self.engine.requests.prepare(message.request, quick=True)
            except Later:
                self._prepare(message)
                return
            except Exception as error:  # of any kind: the engine raises the same one below, and reports it
                logger.debug("call %d of %d: %s", message.key[1], message.key[0], error)
        self.engine.submit(message, prepared)
        self._line.send(link.Working(None))

    def _prepare(self, message: link.Submit) -> None:
        from aiosd.llm.request import Prepared

        self._line.send(link.Working(None))
        submit = self.engine.submit
        self._aside(message.key, PREPARE, message.request, Prepared, lambda prepared: submit(message, prepared))

    def _ask(self, ask: link.Ask) -> None:
        self._line.send(link.Working(ask.key))
        self._front.cancel(lambda key: key == ask.key)
        try:
            self._calls[ask.sys](ask, wire.decode_args[ask.sys](ask.args))
        except Exception as error:  # a bug in one of these: it costs this call, and no other
            self._line.refuse(ask.key, as_oserror(error))
        self._line.send(link.Working(None))

    def _aside(self, key: link.CallKey, kind: str, request: object, result: Any, then: Callable[[Any], None]) -> None:
        """The work on its text takes long: the front process does it, and this process works on other calls meanwhile.
        `then` gets the result."""

        def done(encoded: bytes) -> None:
            try:
                then(msgpack.decode(encoded, type=result))
            except Exception as error:  # a bug in one of these: it costs this call, and no other
                self._line.refuse(key, as_oserror(error))

        self._front.ask(key, kind, wire.encode(request), done, lambda error: self._line.refuse(key, error))

    def _tokenize(self, ask: link.Ask, request: wire.Tokenize) -> None:
        def answer(tokens: list[int]) -> None:
            self._line.answer(ask.key, tokens)

        if request.call is not None:
            self._tokens_of_call(ask.key, request.call, answer)
        elif len(request.text) > LONG_TEXT:
            self._aside(ask.key, TOKENIZE, request, list[int], answer)
        else:
            answer(self._loaded.model.tokenize(request.text, bos=request.bos, special=request.special))

    def _tokens_of_call(self, key: link.CallKey, call: wire.Generate, answer: Callable[[list[int]], None]) -> None:
        from aiosd.llm.request import Prepared

        try:
            prepared = self.engine.requests.prepare(call, quick=True)
        except Later:
            self._aside(key, PREPARE, call, Prepared, lambda prepared: answer(prepared.prompt))
        else:
            answer(prepared.prompt)

    def _detokenize(self, ask: link.Ask, request: wire.Detokenize) -> None:
        self.engine.requests.check_ids(request.tokens, "tokens")
        model = self._loaded.model
        found = model.apart(request.tokens) if request.apart else model.text(request.tokens)
        self._line.answer(ask.key, found)

    def _about_conversation(self, ask: link.Ask, args: wire.SaveContext | wire.CloseContext) -> None:
        """The library gets the tokens of the conversation so far, as the prompt of a call that continues it begins."""

        def handle(tokens: list[int]) -> None:
            self._library.handle(ask, args, tokens)

        self.engine.requests.check_lora(args.lora)
        try:
            tokens = self.engine.requests.conversation(args.messages, args.tools, quick=True)
        except Later:
            self._aside(ask.key, CONVERSATION, (args.messages, args.tools), list[int], handle)
        else:
            handle(tokens)

    # ── embeddings and scores: one batch in each round of the loop, so that many do not delay other calls for long ──

    def _embed(self, ask: link.Ask, request: wire.Embed) -> None:
        def begin(tokens: list[list[int]] | None) -> None:
            steps = self._embedder.in_steps(request.texts, tokens, self._payer(ask))
            self._embeds.add(ask.key, ask.caller, steps)

        if ask.key in self._embeds:
            return
        if max(map(len, request.texts), default=0) > LONG_TEXT:
            self._aside(ask.key, TEXTS, request.texts, list[list[int]], begin)
        else:
            begin(None)

    def _rerank(self, ask: link.Ask, request: wire.Rerank) -> None:
        from aiosd.llm.pairs import tokens_of_pairs

        def begin(pairs: Iterable[list[int]]) -> None:
            self._embeds.add(ask.key, ask.caller, self._embedder.ranked_in_steps(pairs, self._payer(ask)))

        if ask.key in self._embeds:
            return
        if max(map(len, [request.query, *request.documents])) > LONG_TEXT:
            self._aside(ask.key, PAIRS, (request.query, request.documents), list[list[int]], begin)
        else:
            begin(tokens_of_pairs(self._loaded.model, request.query, request.documents))

    def _payer(self, ask: link.Ask) -> Callable[[int], None] | None:
        """The function that pays for a number of tokens from the caller's budgets, or raises OSError (EDQUOT). None: it
        has no budget."""
        if not ask.caller.shares:
            return None
        return lambda tokens: self.engine.purses.spend(ask.key, ask.caller.shares, tokens, time.monotonic())

    def _embed_one(self) -> None:
        job = self._embeds.next()
        if job is None:
            return
        before = self._embedder.computed
        try:
            embedded = next(job.steps)
        except Exception as error:  # a bug in one of these: it costs this call, and no other
            self._embeds.remove(job.key)
            self._line.refuse(job.key, as_oserror(error))
            return
        self._embeds.charge(job, self._embedder.computed - before)
        if embedded is not None:
            self._embeds.remove(job.key)
            self._line.answer(job.key, embedded, embedded.prompt_tokens)

    # ── figures for `aiosd status` ────────────────────────────────────────────────────────────────────────

    def stats(self) -> dict[str, Any]:
        from aiosd.llm import llama, placement, rope

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
            "kv_layout": loaded.kv_layout,
            "prompt_batch": loaded.prompt_batch.tokens,
            "prompt_batch_why": loaded.prompt_batch.why,
            "exact": self._spec.exact,
            "chat_template": self._template(),
            "ctx_why": loaded.room.why,
            "rope": rope.described(self._spec),
            "tensors": [f"{pattern}={kind}" for pattern, kind in placement.places(self._spec)],
            "lora": [f"{lora.name} × {lora.scale:g} ({lora.path})" for lora in self._spec.lora],
            "llama_cpp": llama.version(),
            **self.engine.stats(),
        }

    def _template(self) -> str:
        """Where the chat template comes from, for people."""
        if self._spec.chat_template_file:
            return self._spec.chat_template_file
        return "the model's" if self.engine.requests.template.given else "ChatML (the model has none)"


def context_ram(spec: ModelSpec) -> int:
    """How many bytes of memory contexts without a slot may use."""
    from aiosd.models.fit import available_memory

    return spec.context_ram if spec.context_ram is not None else min(available_memory() // 8, MOST_CONTEXT_RAM)


def _rss() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
