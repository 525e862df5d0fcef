"""Attempts to get the answer of a call, one after the other: the request, its result, its failures.

A failed request is sent again, a few times, with growing pauses. Text that was given out stays: a completion goes on
from it; a chat is sent again with the same seed, and the new answer must begin with the text that was given out, or the
call fails. So an agent never gets two halves of different answers. Calls that do not stream give nothing out before
their end, so they can always be sent again. None of this is exact.

The answer of a parked call is not read further; after PARK_S its request is cancelled, and is sent again when the call
may go on.

Tokens are counted by chunks while they come, and by the endpoint's usage in the end (`bill`). The prompt is charged by
an estimate when it is sent, so that an agent cannot have prompts computed for nothing by leaving. The charge of an
attempt that was refused, or got no answer, is given back; an attempt that was given up later is charged by what has
come of it.
"""

from __future__ import annotations

import errno
import logging
import random
import re
from collections.abc import Callable
from queue import SimpleQueue
from weakref import WeakSet

import msgspec

from aiosd.budgets.price import FREE
from aiosd.ipc import link
from aiosd.llm.line import Line
from aiosd.llm.purse import Purses
from aiosd.llm.remote import bill
from aiosd.llm.remote import body as bodies
from aiosd.llm.remote.answer import BadAnswer, StreamedAnswer, check_text, safe_line
from aiosd.llm.remote.bell import Bell
from aiosd.llm.remote.call import OutputText, RemoteCall
from aiosd.llm.remote.connections import Connections, RemoteEndpoint
from aiosd.llm.remote.exchange import BadStatus, ConnectionLost, Data, End, Exchange, ExchangeEvent
from aiosd.llm.remote.limits import LONGEST_RETRY_AFTER_S, RateLimiter, backoff
from aiosd.llm.remote.past import Past
from aiosd.llm.remote.queue import Queue
from aiosd.llm.remote.vectors import Vectors
from aiosd.llm.spec import ModelSpec
from libaios import wire
from libaios.wire import Usage

logger = logging.getLogger("llm.remote")

MOST_TRIES = 5
TRIES_BESIDE_OTHERS = 2  # of a call for which other models are available
PARK_S = 20.0
CLOSE_S = 1.0  # for threads to end
SILENT_S = 300.0  # how long an attempt may bring no content, whatever bytes come
SPARE_THREADS = 32  # of requests that were given up and end in a moment
EVENTS_AT_ONCE = 64  # of one call in one step

_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_NOT_THERE = {404, 405, 501}
#: Endpoints' error codes for a prompt that is too long: OpenAI and aiosd, llama-server; vLLM and SGLang have only a
#: sentence.
_TOO_LONG = ("context_length_exceeded", "exceed_context_size_error")
_TOO_LONG_SENTENCE = re.compile(r"\b(?:maximum|model's) context length\b")
_ERRNOS = {401: errno.EACCES, 403: errno.EACCES, 404: errno.ENOENT, 413: errno.EMSGSIZE}


class Attempts:
    """The attempts of all calls in `queue`."""

    def __init__(
        self,
        spec: ModelSpec,
        line: Line,
        queue: Queue,
        bell: Bell,
        clock: Callable[[], float],
        rng: random.Random,
    ) -> None:
        self._spec, self._line, self._queue, self._bell = spec, line, queue, bell
        self._clock, self._rng = clock, rng
        self.endpoint = RemoteEndpoint.of(spec.url, spec.key_file)
        self._connections = Connections(self.endpoint)
        self._events: SimpleQueue[tuple[Exchange, ExchangeEvent]] = SimpleQueue()
        self.running: dict[Exchange, RemoteCall] = {}
        self._exchanges: WeakSet[Exchange] = WeakSet()  # also those that were closed and end in a moment
        self.pace = RateLimiter(spec.rpm, spec.tpm)
        self.past = Past()  # the calls that have ended well
        self.purses = Purses()
        self._dialect = bodies.Dialect()
        self.figures = {"requests": 0, "retries": 0, "calls_finished": 0, "calls_failed": 0, "tokens_generated": 0}

    @property
    def free(self) -> int:
        """How many requests may be sent: requests that were given up count as long as their threads live."""
        concurrency = self._spec.concurrency
        return min(concurrency - len(self.running), concurrency + SPARE_THREADS - len(self._exchanges))

    @property
    def have_come(self) -> bool:
        """Have events come that were not handled yet?"""
        return not self._events.empty() or any(call.backlog and not call.parked for call in self.running.values())

    def patience_until(self, call: RemoteCall) -> float:
        """The time at which the call's request is given up, if nothing happens."""
        return call.parked_since + PARK_S if call.parked else call.moved + SILENT_S

    def step(self) -> None:
        """Handle the events that have come, and send results to the kernel."""
        while not self._events.empty():
            exchange, event = self._events.get()
            call = self.running.get(exchange)
            if call is not None and not exchange.closed:
                call.backlog.append(event)
        for call in list(self.running.values()):
            self._go_on(call)

    def close(self) -> None:
        self._connections.close()
        for exchange in self._exchanges:
            exchange.close()
        for exchange in self._exchanges:
            exchange.join(CLOSE_S)

    def _post(self, exchange: Exchange, event: ExchangeEvent | None) -> None:
        """Add an event. Called by an exchange's thread."""
        if event is not None and not exchange.closed:
            self._events.put((exchange, event))
        self._bell.ring()  # also at its end: another request may begin

    # ── a request ─────────────────────────────────────────────────────────────────────────────────────────

    def size_of(self, request: wire.Generate) -> int:
        """Bytes of its body. Raises OSError where it cannot be passed on."""
        return len(bodies.encoded(request, self._spec.model, None, "", self._dialect))

    def begin(self, call: RemoteCall, now: float) -> None:
        request = call.submit.request
        if not request.stream:
            call.text = OutputText(call.kept)
        kept = call.kept
        if kept:
            how = "goes on from them" if request.messages is None else "is asked for all of it again"
            why = "its caller has %d characters already, and the model %s: not exactly the same"
            logger.info(f"call %d of %d: {why}", call.key[1], call.key[0], len(kept), how)
        sampling = request.sampling
        call.answer = StreamedAnswer(sampling.top_logprobs if sampling.logprobs else None)
        call.answered, call.moved = False, now
        call.backlog.clear()
        call.expected = kept if request.messages is not None else ""
        allowed, short = bill.allowed(call, self._spec.price or FREE)
        if short:
            why = f"a prompt of about {call.prompt_estimate} tokens and an answer are more than is left of the budget"
            self.fail(call, errno.EDQUOT, why, elsewhere=short == "cost", short=short)
            return
        short = bill.pay(call, call.prompt_estimate + 1)  # with the first token of the answer
        if short:
            why = f"a prompt of about {call.prompt_estimate} tokens is more than its budget has room for"
            self.fail(call, errno.EDQUOT, why, short=short)
            return
        if call.vectors is not None:
            call.vectors.begin()
        try:
            body = self._body(call, kept, allowed)
            path = bodies.path(request) if call.vectors is None else "embeddings"
            call.exchange = Exchange(self._connections, path, body, self._post)
        except OSError as error:
            self.fail(call, error.errno or errno.EINVAL, error.strerror or str(error))
            return
        except RuntimeError as error:  # no thread
            if call.account is not None:
                call.account.give_back(call.prompt_estimate + 1)
            self._again(call, str(error))
            return
        call.is_trial = self.pace.sent(call.prompt_estimate, now)
        self.figures["requests"] += 1
        call.began = call.began or now
        self.running[call.exchange] = call
        self._exchanges.add(call.exchange)
        call.on_account = call.prompt_estimate
        call.prompt_charged += call.on_account
        started = [] if call.started else [link.Started(call.key, 0, 0)]
        call.started = True
        self._send_step(call, link.Step([], started, spent=[link.Spent(call.key, call.on_account)]))

    def _send_step(self, call: RemoteCall, step: link.Step) -> None:
        """Report how far a generation is, and its cost. (For vectors the answer itself reports that.)"""
        if call.vectors is None:
            self._line.send(step)

    def _body(self, call: RemoteCall, kept: str, allowed: int | None) -> bytes:
        """The body of the call's request. Raises OSError."""
        if call.vectors is not None:
            return call.vectors.body(self._spec.model)
        most = call.submit.request.sampling.max_tokens
        call.limited = allowed is not None and (most is None or allowed < most)
        return bodies.encoded(call.submit.request, self._spec.model, allowed, kept, self._dialect)

    # ── the answer ────────────────────────────────────────────────────────────────────────────────────────

    def _go_on(self, call: RemoteCall) -> None:
        """Handle the events of a call, and send results; only a few at a time, so that the loop goes on."""
        for _ in range(EVENTS_AT_ONCE):
            if call.parked or call.exchange is None or not call.backlog:
                break
            exchange, event = call.exchange, call.backlog.popleft()
            self._event(call, event)
            exchange.taken(event)
        if call.exchange is None:
            return  # it is over, or waits again
        if not call.parked:
            self._report(call)
        if self._clock() >= self.patience_until(call):
            if call.parked:
                if call.answered:
                    self._settle(call)
                self._let_go(call)
            else:
                self._again(call, f"nothing came for {SILENT_S:g} s")

    def _event(self, call: RemoteCall, event: ExchangeEvent) -> None:
        try:
            match event:
                case Data(data=data):
                    self._take(call, data)
                case End(done=done):
                    self._end(call, done)
                case ConnectionLost(why=why):
                    self._again(call, why)
                case BadStatus():
                    self._refused(call, event)
        except BadAnswer as wrong:
            self._again(call, safe_line(str(wrong)))
        except Exception:  # whatever an endpoint sends may end one call, not this process
            logger.exception("call %d of %d: an answer that was not understood", call.key[1], call.key[0])
            self.fail(call, errno.EPROTO, f"{self.endpoint.url}: an answer that was not understood")

    def _take(self, call: RemoteCall, data: bytes) -> None:
        if call.vectors is not None:
            call.moved = self._clock()
            call.reported = call.vectors.take(data)
            return
        chunks, call.answered = call.answer.chunks, True
        added = call.answer.take(data)
        if added or call.answer.chunks > chunks:
            call.moved = self._clock()
            call.first = call.first or call.moved
        chances = call.answer.chances if not call.expected else []  # … of what was given out already are there, too
        if call.expected and added:
            count = min(len(call.expected), len(added))
            if call.expected[:count] != added[:count]:
                why = "its connection was lost after a part of the answer, and asked again the model answers otherwise"
                self.fail(call, errno.EIO, why)
                return
            call.expected, added = call.expected[count:], added[count:]
        call.text.add(added, chances)
        if not call.expected and call.answer.chunks > chunks:
            call.uncharged += 1
            self._queue.policy.charge([call], 1, self._clock())
        if call.answer.chunks > chunks:
            short = bill.pay(call, 1) if call.answer.chunks > 1 else ""  # the first was paid for with the prompt
            if short or bill.is_spent(call):
                self._finish(call, "limit", [], short)

    def _end(self, call: RemoteCall, done: bool) -> None:
        if call.vectors is not None:
            self._end_of_vectors(call, call.vectors)
            return
        answer = call.answer
        if done and answer.length:
            answer.reason = answer.reason or "stop"  # some endpoints send no reason
        if not answer.reason or call.expected:
            self._again(call, "the answer was cut off")
            return
        try:
            calls = self._checked(call)
        except BadAnswer as wrong:
            why = safe_line(str(wrong))
            if call.kept:  # another attempt would have to begin with this text
                self.fail(call, errno.EPROTO, f"the model's answer does not keep to what was asked: {why}")
            else:
                self._again(call, why, errno.EPROTO)
            return
        if answer.num_top is not None and not answer.num_chances and answer.spoken():
            why = f"logprobs: {self.endpoint.url} gives no log probabilities with its answers"
            self.fail(call, errno.EINVAL, why, elsewhere=True)
            return
        reason = "tool_calls" if calls else answer.reason
        if reason == "length" and call.limited:
            reason = "limit"
        self._finish(call, reason, calls)

    def _end_of_vectors(self, call: RemoteCall, vectors: Vectors) -> None:
        """Handle the end of one request for some of the vectors."""
        now, tokens = self._clock(), bill.of_texts(call.reported, call.prompt_estimate)
        if not vectors.keep(tokens):
            self._again(call, "the answer was cut off")
            return
        self.pace.breaker.succeeded()
        self.pace.used(tokens - call.prompt_estimate, now)
        self._queue.policy.charge_prompt(call, tokens, now)
        call.prompt_charged, call.failures = vectors.prompt_tokens, 0
        self._let_go(call)
        if vectors.too_many:
            self.fail(call, errno.EMSGSIZE, "texts: their vectors are too long for one reply; ask for fewer at a time")
        elif vectors.complete:
            self.figures["calls_finished"] += 1
            self.leave(call)
            self._line.answer(call.key, vectors.embedded(), vectors.prompt_tokens)
        else:  # the call waits as a new call of its agent would: others have their turn
            call.prompt_estimate = bill.estimate(sum(map(len, vectors.batch())))
            self._bell.ring()

    def _checked(self, call: RemoteCall) -> list[wire.ToolCall]:
        """The tool calls of the answer. Raises BadAnswer if the answer is not as requested."""
        answer, request = call.answer, call.submit.request
        if not answer.has_calls and request.schema is None:
            return []
        self._line.send(link.Working(call.key))  # some schemas take for ever: then this call is to blame
        try:
            calls = answer.calls(bodies.tools_of(request), f"call_{call.key[0]}_{call.key[1]}_")
            if request.schema is not None and answer.reason == "stop":
                check_text(answer.spoken(), request.schema)
        finally:
            self._line.send(link.Working(None))
        return calls

    def _report(self, call: RemoteCall) -> None:
        if call.vectors is not None or self._line.congested():
            return  # what has come goes with a later report
        offset = call.text.num_sent
        streams = call.submit.request.stream
        text, chances = (call.text.send(), call.text.send_chances()) if streams else ("", None)
        if text or chances or call.uncharged:
            delta = link.Delta(call.key, offset, [], text, chances, charged=call.uncharged)
            call.counted, call.uncharged = call.counted + call.uncharged, 0
            self._line.send(link.Step([delta]))

    def _finish(self, call: RemoteCall, reason: str, calls: list[wire.ToolCall], short: str = "") -> None:
        now = self._clock()
        usage = self._usage(call, now)
        self.pace.breaker.succeeded()
        self.pace.used(usage.prompt_tokens + usage.completion_tokens - call.prompt_estimate, now)
        self._queue.policy.charge_prompt(call, usage.prompt_tokens, now)
        self.figures["calls_finished"] += 1
        self.figures["tokens_generated"] += usage.completion_tokens
        offset, rest, chances = call.text.num_sent, call.text.send(), call.text.send_chances()
        spent = link.Spent(call.key, usage.prompt_tokens - call.on_account, usage.cached_tokens)
        charged = usage.completion_tokens + call.wasted - call.counted
        finished = link.GenerationDone(call.key, offset, [], rest, reason, usage, calls, chances, charged, short, spent)
        call.prompt_charged, call.on_account = call.prompt_charged + spent.prompt_tokens, 0
        call.counted, call.uncharged, call.cached = call.counted + charged, 0, call.cached + usage.cached_tokens
        whole = link.Spent(call.key, call.prompt_charged, call.cached)
        of_all = msgspec.structs.replace(finished, charged=usage.completion_tokens + call.wasted, spent=whole)
        self.past.add(of_all, call.text)
        self.leave(call)
        self._line.send(finished)

    def _usage(self, call: RemoteCall, now: float) -> Usage:
        """The usage that the endpoint reports, if it is plausible; else what was counted here."""
        prompt, cached = bill.of_prompt(call.answer, call.prompt_estimate, self.endpoint.url)
        return Usage(
            prompt_tokens=prompt,
            cached_tokens=cached,
            completion_tokens=bill.of_answer(call.answer),
            queue_s=call.began - call.arrived,
            prefill_s=max(call.first - call.began, 0.0) if call.first else 0.0,
            decode_s=max(now - call.first, 0.0) if call.first else 0.0,
            preemptions=call.failures,
            reasoning_tokens=call.answer.usage.reasoning_tokens if call.answer.usage is not None else 0,
        )

    # ── failures ──────────────────────────────────────────────────────────────────────────────────────────

    def _refused(self, call: RemoteCall, refused: BadStatus) -> None:
        status = refused.status
        self._give_back(call)
        if status == 400 and (dialect := self._dialect.after(refused.why, refused.code)) is not None:
            self._dialect = dialect
            self.pace.breaker.succeeded()
            self._let_go(call)  # sent again at once, in the form that this endpoint accepts
        elif status == 429 and refused.code == "insufficient_quota":
            self.pace.breaker.succeeded()
            self.fail(call, errno.EDQUOT, f"{self.endpoint.url}: {refused.why}", elsewhere=True)
        elif status in _AGAIN:
            after = min(refused.retry_after, LONGEST_RETRY_AFTER_S)
            if after:
                why = f"it asks for {after:g} s of rest: status {status}: {refused.why}"
                self.pace.rest(after, why, self._clock())
            self._again(call, f"status {status}: {refused.why}", errno.EAGAIN if status == 429 else errno.EIO)
        else:
            self.pace.breaker.succeeded()
            code = errno.EMSGSIZE if _too_long(refused) else _ERRNOS.get(status, errno.EINVAL)
            code = code if status < 500 else errno.EIO
            why = f"{self.endpoint.url}: status {status}: {refused.why}"
            if call.vectors is not None and status in _NOT_THERE:
                code, why = errno.ENOSYS, f"EMBED: it makes no vectors: {why}"
            self.fail(call, code, why, elsewhere=True)

    def _again(self, call: RemoteCall, why: str, code: int = errno.EIO) -> None:
        """Try the call once more after a pause, unless it has failed too often; then it ends with `code`. EAGAIN (no
        capacity) and EPROTO (the model does not keep to a form) do not count against the endpoint."""
        now = self._clock()
        call.failures += 1
        (self.pace.breaker.failed(why, now) if code == errno.EIO else self.pace.breaker.succeeded())
        self._report(call)
        self._settle(call)
        self._let_go(call)
        if call.failures >= (TRIES_BESIDE_OTHERS if call.submit.others else MOST_TRIES):
            why = f"{self.endpoint.url}: {call.failures} attempts failed; the last: {why}"
            self.fail(call, code, why, elsewhere=True)
            return
        self.figures["retries"] += 1
        call.not_before = now + backoff(call.failures, self._rng)
        logger.info("call %d of %d: %s; it is tried again", call.key[1], call.key[0], why)

    def _give_back(self, call: RemoteCall) -> None:
        """The attempt under way costs nothing: give back its charge."""
        if call.on_account:
            self._send_step(call, link.Step(spent=[link.Spent(call.key, -call.on_account)]))
            if call.account is not None:
                call.account.give_back(call.on_account + 1)
            call.prompt_charged -= call.on_account
            call.on_account = 0

    def _settle(self, call: RemoteCall) -> None:
        """The attempt under way has failed: charge only what has come of it."""
        if not call.answered:
            self._give_back(call)
            return
        prompt, cached = bill.of_prompt(call.answer, call.prompt_estimate, self.endpoint.url)
        more = prompt - call.on_account
        call.wasted += bill.of_answer(call.answer)
        owed = call.wasted - call.counted
        deltas = [link.Delta(call.key, call.text.num_sent, [], "", charged=owed)] if owed else []
        spent = [link.Spent(call.key, more, cached)] if more or cached else []
        if deltas or spent:
            self._line.send(link.Step(deltas, spent=spent))
        call.prompt_charged, call.on_account = call.prompt_charged + more, 0
        call.counted, call.uncharged, call.answered = call.wasted, 0, False
        call.cached += cached

    def _let_go(self, call: RemoteCall) -> None:
        """End its request; the call waits again."""
        exchange, call.exchange = call.exchange, None
        call.on_account = 0
        if call.account is not None:
            call.account.let_go()
        if exchange is not None:
            if not exchange.ended:
                exchange.close()
            self.running.pop(exchange, None)
        if call.is_trial:
            call.is_trial = False
            self.pace.breaker.given_up()  # if it has reported neither success nor failure yet
        call.backlog.clear()
        call.since = self._clock()

    def fail(self, call: RemoteCall, code: int, why: str, elsewhere: bool = False, short: str = "") -> None:
        self.figures["calls_failed"] += 1
        if call.answered:
            self._settle(call)
        self.leave(call)
        self._line.refuse(call.key, OSError(code, why), elsewhere, short)

    def leave(self, call: RemoteCall) -> None:
        self._let_go(call)
        if call.account is not None:
            used = call.prompt_charged - call.cached + call.num_generated
            self.purses.close(call.account, used, self._clock())
        self._queue.remove(call, self._clock())


def _too_long(refused: BadStatus) -> bool:
    return refused.status == 400 and (refused.code in _TOO_LONG or _TOO_LONG_SENTENCE.search(refused.why) is not None)
