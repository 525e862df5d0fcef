"""The backend of a model that is elsewhere.

A call waits until the policy admits it, one of `concurrency` places is free, and rates and circuit breaker allow a
request. Then an `Exchange` reads the answer, and each step sends what has come.

What goes wrong on the way is tried again, a few times, with growing pauses. Text that was given out stays: a completion
goes on from it; a chat is asked again under the same seed, and the beginning must be what was given out already, or the
call fails: an agent never gets two halves of different answers. Calls that do not stream give nothing out before their
end, so they can always be asked again. None of that is exact.

A parked call is not read on; after PARK_S its request is cancelled, and it is asked again when it may go on.

Tokens are counted by chunks while they come, and by the endpoint's usage in the end (`bill`). The prompt is charged by
an estimate when it is sent, so that an agent cannot have prompts computed for nothing by leaving; what an attempt that
was refused, or got no answer, was charged is given back, and one that was given up later is charged by what came of it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakSet

import msgspec

from aiosd import link
from aiosd.errors import UsageError
from aiosd.llm import policy
from aiosd.llm.line import Line
from aiosd.llm.purse import Purses
from aiosd.llm.remote import bill, keys
from aiosd.llm.remote import body as bodies
from aiosd.llm.remote.answer import Answer, Wrong, check_text, printable
from aiosd.llm.remote.call import Call, Text
from aiosd.llm.remote.connections import Connections, Endpoint
from aiosd.llm.remote.exchange import Data, End, Event, Exchange, Lost, Refused
from aiosd.llm.remote.limits import LONGEST_RETRY_AFTER_S, Pace, backoff
from aiosd.llm.remote.past import Past
from aiosd.llm.spec import ModelSpec
from aiosd.price import FREE
from libaios import wire
from libaios.wire import Sys, Usage

logger = logging.getLogger("llm.remote")

MOST_TRIES = 5
TRIES_BESIDE_OTHERS = 2  # of a call for which other models stand ready,
WAIT_BESIDE_OTHERS_S = 2.0  # … and how long it waits for this one to be well
PARK_S = 20.0
CLOSE_S = 1.0  # for threads to end
OPEN_PATIENCE_S = 30.0  # how long a call waits for an endpoint that fails all the time
SILENT_S = 300.0  # how long an attempt may bring nothing, whatever bytes come
SPARE_THREADS = 32  # of requests that were given up and end in a moment
EVENTS_AT_ONCE = 64  # of one call in one step

_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_ERRNOS = {401: errno.EACCES, 403: errno.EACCES, 404: errno.ENOENT, 413: errno.EMSGSIZE}


def open_model(spec: ModelSpec, line: Line) -> Remote:
    """Raises UsageError. The endpoint is not asked: a system starts without its network."""
    try:
        Endpoint.of(spec.url, spec.key_file).key()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"key_file {spec.key_file}: {reason}") from None
    if spec.key_file and not spec.key_file.startswith(keys.PREFIX) and os.stat(spec.key_file).st_mode & 0o044:
        logger.warning("key_file %s: other users of this machine can read it", spec.key_file)
    return Remote(spec, line)


class Remote:
    """`clock` and `rng` are there for tests."""

    def __init__(
        self,
        spec: ModelSpec,
        line: Line,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self._spec, self._line, self._clock = spec, line, clock
        self._rng = rng or random.Random()
        self.endpoint = Endpoint.of(spec.url, spec.key_file)
        self._connections = Connections(self.endpoint)
        self._policy: policy.Policy = policy.Fifo()
        self._schedule: link.Schedule | None = None
        self._calls: dict[link.Key, Call] = {}
        self._past = Past()
        self._purses = Purses()
        self._parked: set[int] = set()
        self._arrivals = 0
        self._events: queue.SimpleQueue[tuple[Exchange, Event | None]] = queue.SimpleQueue()
        self._running: dict[Exchange, Call] = {}
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._closed = False
        self._timer: threading.Timer | None = None
        self._wakes_at = 0.0
        self._exchanges: WeakSet[Exchange] = WeakSet()  # also those that were closed and end in a moment
        self._pace = Pace(spec.rpm, spec.tpm)
        self._health = ""  # as the kernel knows it
        self._limit_name = "max_tokens"
        self._figures = {"requests": 0, "retries": 0, "calls_finished": 0, "calls_failed": 0, "tokens_generated": 0}
        self.info: dict[str, Any] = {
            "url": f"{self.endpoint.url}#{spec.model}",
            "description": spec.model,
            "n_slots": spec.concurrency,
            "chat": True,
            "tools": True,
        }
        self.table: dict[type, Callable[[Any], None]] = {
            link.Submit: self._submit,
            link.Ask: self._ask,
            link.CancelCall: lambda message: self._cancel(message.key),
            link.Park: self._park,
            link.ParkCall: self._park_call,
            link.Keep: self._keep,
            link.Gone: lambda message: None,
            link.Renice: self._renice,
            link.Schedule: self._reschedule,
        }

    # ── one round of the loop ─────────────────────────────────────────────────────────────────────────────

    @property
    def has_work(self) -> bool:
        return not self._events.empty() or self._wait() == 0.0 or any(self._unread())

    def step(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        while not self._events.empty():
            exchange, event = self._events.get()
            call = self._running.get(exchange)
            if call is not None and not exchange.closed and event is not None:
                call.backlog.append(event)
        for call in list(self._running.values()):
            self._go_on(call)
        self._admit()
        self._tell_health()
        wait = self._wait()
        if wait:
            self._wake_in(wait)

    def fds(self) -> Sequence[int]:
        return [self._bell]

    def stats(self) -> dict[str, Any]:
        used, total = len(self._running), self._spec.concurrency
        return {
            "slots": {"total": total, "free": total - used, "used": used},
            "running": used,
            "waiting": len(self._calls) - used,
            "policy": self._policy.name,
            "circuit": self._pace.breaker.state,
            "last_failure": self._pace.breaker.why,
            **self._figures,
        }

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()
        self._connections.close()
        for exchange in self._exchanges:
            exchange.close()
        for exchange in self._exchanges:
            exchange.join(CLOSE_S)
        self._closed = True  # a thread that hangs all the same must not ring what the number stands for by then
        os.close(self._bell)

    def _post(self, exchange: Exchange, event: Event | None) -> None:
        """Called by an exchange's thread."""
        if event is not None and not exchange.closed:
            self._events.put((exchange, event))
        self._ring()  # its end, too: another may begin

    def _ring(self) -> None:
        if not self._closed:
            os.eventfd_write(self._bell, 1)

    def _wake_in(self, seconds: float) -> None:
        """Unless it wakes by then anyhow."""
        now = time.monotonic()
        if self._timer is not None:
            if now < self._wakes_at <= now + seconds:
                return
            self._timer.cancel()
        self._wakes_at = now + seconds
        self._timer = threading.Timer(seconds, self._ring)
        self._timer.daemon = True
        self._timer.start()

    # ── who is asked next ─────────────────────────────────────────────────────────────────────────────────

    def _waiting(self) -> list[Call]:
        return [call for call in self._calls.values() if call.exchange is None and not call.parked]

    def _unread(self) -> Iterator[bool]:
        return (bool(call.backlog) and not call.parked for call in self._running.values())

    @property
    def _free(self) -> int:
        """How many requests may be sent: those that were given up count as long as their threads live."""
        concurrency = self._spec.concurrency
        return min(concurrency - len(self._running), concurrency + SPARE_THREADS - len(self._exchanges))

    def _wait(self) -> float | None:
        """Seconds until something can be done without an event; None: nothing can."""
        now, waits = self._clock(), []
        if self._free > 0:
            waits = [self._wait_of(call, now) for call in self._waiting()]
        waits += [max(self._patience_until(call) - now, 0.0) for call in self._running.values()]
        if self._health:
            waits.append(max(self._pace.wait(1, now), 0.01))
        return min(waits, default=None)

    def _tell_health(self) -> None:
        """What a call of a route should know that might come here."""
        now = self._clock()
        why = ""
        if self._pace.wait(1, now) > (0.0 if self._health else WAIT_BESIDE_OTHERS_S):
            why = self._pace.trouble(now)
        if why != self._health:
            self._health = why
            self._line.send(link.Health(why))

    def _patience_until(self, call: Call) -> float:
        """When its request is given up, if nothing happens."""
        return call.parked_since + PARK_S if call.parked else call.moved + SILENT_S

    def _wait_of(self, call: Call, now: float) -> float:
        """Seconds for which its request may not be sent."""
        return max(call.not_before - now, self._pace.wait(call.prompt_estimate, now))

    def _admit(self) -> None:
        now = self._clock()
        while (free := self._free) > 0:
            waiting = [call for call in self._waiting() if not self._wait_of(call, now)]
            admitted = self._policy.admit(waiting, list(self._running.values()), free, now) if waiting else []
            if not admitted:
                break
            self._ask_endpoint(admitted[0], now)
        for call in self._waiting():
            others = call.submit.others and not call.kept
            if others and self._wait_of(call, now) > WAIT_BESIDE_OTHERS_S:
                why = f"{self.endpoint.url}: a call would have to wait for long"
                self._fail(call, errno.EAGAIN, why, elsewhere=True)
            elif self._pace.breaker.state == "open" and now - call.since > OPEN_PATIENCE_S:
                why = f"{self.endpoint.url} fails again and again: {self._pace.breaker.why}"
                self._fail(call, errno.EIO, why, elsewhere=True)

    def _ask_endpoint(self, call: Call, now: float) -> None:
        request = call.submit.request
        if not request.stream:
            call.text = Text(call.kept)
        kept = call.kept
        if kept:
            how = "goes on from them" if request.messages is None else "is asked for all of it again"
            why = "its caller has %d characters already, and the model %s: not exactly the same"
            logger.info(f"call %d of %d: {why}", call.key[1], call.key[0], len(kept), how)
        call.answer, call.heard, call.moved = Answer(), False, now
        call.backlog.clear()
        call.expected = kept if request.messages is not None else ""
        allowed, short = bill.allowed(call, self._spec.price or FREE)
        if short:
            why = f"a prompt of about {call.prompt_estimate} tokens and an answer are more than is left of the budget"
            self._fail(call, errno.EDQUOT, why, elsewhere=short == "cost", short=short)
            return
        short = bill.pay(call, call.prompt_estimate + 1)  # with the first token of the answer
        if short:
            why = f"a prompt of about {call.prompt_estimate} tokens is more than its budget has room for"
            self._fail(call, errno.EDQUOT, why, short=short)
            return
        try:
            body = self._body(call, kept, allowed)
            call.exchange = Exchange(self._connections, bodies.path(request), body, self._post)
        except OSError as error:
            self._fail(call, error.errno or errno.EINVAL, error.strerror or str(error))
            return
        except RuntimeError as error:  # no thread
            if call.account is not None:
                call.account.give_back(call.prompt_estimate + 1)
            self._again(call, str(error))
            return
        call.is_trial = self._pace.sent(call.prompt_estimate, now)
        self._figures["requests"] += 1
        call.began = call.began or now
        self._running[call.exchange] = call
        self._exchanges.add(call.exchange)
        call.on_account = call.prompt_estimate
        call.prompt_charged += call.on_account
        started = [] if call.started else [link.Started(call.key, 0, 0)]
        call.started = True
        self._line.send(link.Step([], started, spent=[link.Spent(call.key, call.on_account)]))

    def _body(self, call: Call, kept: str, allowed: int | None) -> bytes:
        """Raises OSError."""
        most = call.submit.request.sampling.max_tokens
        call.limited = allowed is not None and (most is None or allowed < most)
        return bodies.encoded(call.submit.request, self._spec.model, allowed, kept, self._limit_name)

    # ── what comes ────────────────────────────────────────────────────────────────────────────────────────

    def _go_on(self, call: Call) -> None:
        """Take what has come for a call, and send it. No more at a time than keeps the loop going."""
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
        if self._clock() >= self._patience_until(call):
            if call.parked:
                if call.heard:
                    self._settle(call)
                self._let_go(call)
            else:
                self._again(call, f"nothing came for {SILENT_S:g} s")

    def _event(self, call: Call, event: Event) -> None:
        try:
            match event:
                case Data(data=data):
                    self._take(call, data)
                case End(done=done):
                    self._end(call, done)
                case Lost(why=why):
                    self._again(call, why)
                case Refused():
                    self._refused(call, event)
        except Wrong as wrong:
            self._again(call, printable(str(wrong)))
        except Exception:  # whatever an endpoint sends, it ends one call and not this process
            logger.exception("call %d of %d: an answer that was not understood", call.key[1], call.key[0])
            self._fail(call, errno.EPROTO, f"{self.endpoint.url}: an answer that was not understood")

    def _take(self, call: Call, data: bytes) -> None:
        chunks, call.heard = call.answer.chunks, True
        added = call.answer.take(data)
        if added or call.answer.chunks > chunks:
            call.moved = self._clock()
            call.first = call.first or call.moved
        if call.expected and added:
            count = min(len(call.expected), len(added))
            if call.expected[:count] != added[:count]:
                why = "its connection was lost after a part of the answer, and asked again the model answers otherwise"
                self._fail(call, errno.EIO, why)
                return
            call.expected, added = call.expected[count:], added[count:]
        call.text.add(added)
        if not call.expected and call.answer.chunks > chunks:
            call.uncharged += 1
            self._policy.charge([call], 1, self._clock())
        if call.answer.chunks > chunks:
            short = bill.pay(call, 1) if call.answer.chunks > 1 else ""  # the first was paid for with the prompt
            if short or bill.is_spent(call):
                self._finish(call, "limit", [], short)

    def _end(self, call: Call, done: bool) -> None:
        answer = call.answer
        if done and answer.length:
            answer.reason = answer.reason or "stop"  # some never say why
        if not answer.reason or call.expected:
            self._again(call, "the answer was cut off")
            return
        try:
            calls = self._checked(call)
        except Wrong as wrong:
            why = printable(str(wrong))
            if call.kept:  # another attempt would have to begin with it
                self._fail(call, errno.EPROTO, f"the model's answer does not keep to what was asked: {why}")
            else:
                self._again(call, why, errno.EPROTO)
            return
        reason = "tool_calls" if calls else answer.reason
        if reason == "length" and call.limited:
            reason = "limit"
        self._finish(call, reason, calls)

    def _checked(self, call: Call) -> list[wire.ToolCall]:
        """The tool calls of the answer. Raises Wrong where it is not what was asked for."""
        answer, request = call.answer, call.submit.request
        if not answer.has_calls and request.schema is None:
            return []
        self._line.send(link.Working(call.key))  # a schema can be made that takes for ever: that is this call's fault
        try:
            calls = answer.calls(bodies.tools_of(request), f"call_{call.key[0]}_{call.key[1]}_")
            if request.schema is not None and answer.reason == "stop":
                check_text(answer.spoken(), request.schema)
        finally:
            self._line.send(link.Working(None))
        return calls

    def _report(self, call: Call) -> None:
        if self._line.congested():
            return  # what is there goes with a later report
        offset = call.text.num_sent
        text = call.text.send() if call.submit.request.stream else ""
        if text or call.uncharged:
            delta = link.Delta(call.key, offset, [], text, charged=call.uncharged)
            call.counted, call.uncharged = call.counted + call.uncharged, 0
            self._line.send(link.Step([delta]))

    def _finish(self, call: Call, reason: str, calls: list[wire.ToolCall], short: str = "") -> None:
        now = self._clock()
        usage = self._usage(call, now)
        self._pace.breaker.succeeded()
        self._pace.used(usage.prompt_tokens + usage.completion_tokens - call.prompt_estimate, now)
        self._policy.charge_prompt(call, usage.prompt_tokens, now)
        self._figures["calls_finished"] += 1
        self._figures["tokens_generated"] += usage.completion_tokens
        offset, rest = call.text.num_sent, call.text.send()
        spent = link.Spent(call.key, usage.prompt_tokens - call.on_account, usage.cached_tokens)
        charged = usage.completion_tokens + call.wasted - call.counted
        finished = link.Finished(
            call.key, offset, [], rest, reason, usage, calls, charged=charged, spent=spent, short=short
        )
        call.prompt_charged, call.on_account = call.prompt_charged + spent.prompt_tokens, 0
        call.counted, call.uncharged, call.cached = call.counted + charged, 0, call.cached + usage.cached_tokens
        whole = link.Spent(call.key, call.prompt_charged, call.cached)
        of_all = msgspec.structs.replace(finished, charged=usage.completion_tokens + call.wasted, spent=whole)
        self._past.add(of_all, call.text.whole())
        self._leave(call)
        self._line.send(finished)

    def _usage(self, call: Call, now: float) -> Usage:
        """What the endpoint tells, where it is possible; else what was counted here."""
        prompt, cached = bill.of_prompt(call.answer, call.prompt_estimate, self.endpoint.url)
        return Usage(
            prompt_tokens=prompt,
            cached_tokens=cached,
            completion_tokens=bill.of_answer(call.answer),
            queue_s=call.began - call.arrived,
            prefill_s=max(call.first - call.began, 0.0) if call.first else 0.0,
            decode_s=max(now - call.first, 0.0) if call.first else 0.0,
            preemptions=call.failures,
        )

    # ── what goes wrong ───────────────────────────────────────────────────────────────────────────────────

    def _refused(self, call: Call, refused: Refused) -> None:
        status = refused.status
        self._give_back(call)
        if status == 400 and "max_completion_tokens" in refused.why and self._limit_name == "max_tokens":
            self._limit_name = "max_completion_tokens"
            self._pace.breaker.succeeded()
            self._let_go(call)  # asked again at once: newer models call it so
        elif status == 429 and refused.code == "insufficient_quota":
            self._pace.breaker.succeeded()
            self._fail(call, errno.EDQUOT, f"{self.endpoint.url}: {refused.why}", elsewhere=True)
        elif status in _AGAIN:
            after = min(refused.retry_after, LONGEST_RETRY_AFTER_S)
            if after:
                why = f"it asks for {after:g} s of rest: status {status}: {refused.why}"
                self._pace.rest(after, why, self._clock())
            self._again(call, f"status {status}: {refused.why}", errno.EAGAIN if status == 429 else errno.EIO)
        else:
            self._pace.breaker.succeeded()
            code = errno.EMSGSIZE if refused.code == "context_length_exceeded" else _ERRNOS.get(status, errno.EINVAL)
            code = code if status < 500 else errno.EIO
            self._fail(call, code, f"{self.endpoint.url}: status {status}: {refused.why}", elsewhere=True)

    def _again(self, call: Call, why: str, code: int = errno.EIO) -> None:
        """Try it once more after a pause, unless it has failed too often. `code`: what that is then; EAGAIN (it has no
        capacity) and EPROTO (its model does not keep to a form) say nothing against the endpoint."""
        now = self._clock()
        call.failures += 1
        (self._pace.breaker.failed(why, now) if code == errno.EIO else self._pace.breaker.succeeded())
        self._report(call)
        self._settle(call)
        self._let_go(call)
        if call.failures >= (TRIES_BESIDE_OTHERS if call.submit.others else MOST_TRIES):
            why = f"{self.endpoint.url}: {call.failures} attempts failed; the last: {why}"
            self._fail(call, code, why, elsewhere=True)
            return
        self._figures["retries"] += 1
        call.not_before = now + backoff(call.failures, self._rng)
        logger.info("call %d of %d: %s; it is tried again", call.key[1], call.key[0], why)

    def _give_back(self, call: Call) -> None:
        """The attempt under way cost nothing."""
        if call.on_account:
            self._line.send(link.Step(spent=[link.Spent(call.key, -call.on_account)]))
            if call.account is not None:
                call.account.give_back(call.on_account + 1)
            call.prompt_charged -= call.on_account
            call.on_account = 0

    def _settle(self, call: Call) -> None:
        """The attempt under way leads to nothing. What came of it is paid for, and no more."""
        if not call.heard:
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
        call.counted, call.uncharged, call.heard = call.wasted, 0, False
        call.cached += cached

    def _let_go(self, call: Call) -> None:
        """End its request; the call waits again."""
        exchange, call.exchange = call.exchange, None
        call.on_account = 0
        if call.account is not None:
            call.account.let_go()
        if exchange is not None:
            if not exchange.ended:
                exchange.close()
            self._running.pop(exchange, None)
        if call.is_trial:
            call.is_trial = False
            self._pace.breaker.given_up()  # where it has said neither yet
        call.backlog.clear()
        call.since = self._clock()

    def _fail(self, call: Call, code: int, why: str, elsewhere: bool = False, short: str = "") -> None:
        self._figures["calls_failed"] += 1
        if call.heard:
            self._settle(call)
        self._leave(call)
        self._line.refuse(call.key, OSError(code, why), elsewhere, short)

    def _leave(self, call: Call) -> None:
        self._let_go(call)
        del self._calls[call.key]
        if call.account is not None:
            used = call.prompt_charged - call.cached + call.num_generated
            self._purses.close(call.account, used, self._clock())
        self._policy.leave(call, self._clock())

    # ── messages ──────────────────────────────────────────────────────────────────────────────────────────

    def _submit(self, message: link.Submit) -> None:
        key, given = message.key, message.request.given
        count = len(given) if isinstance(given, str) else 0
        if (past := self._past.get(key)) is not None:
            finished, text = past
            self._line.send(msgspec.structs.replace(finished, offset=count, text=text[count:]))
            return
        if key in self._calls:
            call = self._calls[key]
            call.text.send_from(count)
            call.uncharged, call.counted = call.num_generated, 0
            self._line.send(link.Step(spent=[link.Spent(key, call.prompt_charged)]))
            self._set_parked(call, call.parked_peer, False)
            return
        try:
            size = len(bodies.encoded(message.request, self._spec.model, None, "", self._limit_name))
        except OSError as error:
            self._line.refuse(key, error, elsewhere=True)
            return
        now = self._clock()
        self._arrivals += 1
        come = Text(given if isinstance(given, str) else "")
        call = Call(message, self._arrivals, now, message.nice, come, bill.estimate(size), now)
        call.account = self._purses.open(key, message.shares, now)
        self._calls[key] = call
        if key[0] in self._parked:
            call.parked_peer, call.parked_since = True, now
        else:
            self._policy.arrive(call, now)

    def _ask(self, ask: link.Ask) -> None:
        if ask.sys == Sys.CTX_CLOSE:  # there is nothing to close
            self._line.answer(ask.key, None)
        elif ask.sys == Sys.CTX_LIST:
            self._line.answer(ask.key, [])
        else:
            name = wire.TABLE[ask.sys].name
            self._line.refuse(ask.key, wire.error(errno.ENOSYS, f"{name}: not for a model that is served elsewhere"))

    def _cancel(self, key: link.Key) -> None:
        self._past.forget(key)
        call = self._calls.get(key)
        if call is not None:
            self._leave(call)

    def _park(self, message: link.Park) -> None:
        (self._parked.add if message.parked else self._parked.discard)(message.peer)
        for call in self._calls.values():
            if call.peer == message.peer:
                self._set_parked(call, message.parked, call.parked_call)
        if message.number:
            self._line.send(link.Parked(message.number))

    def _park_call(self, message: link.ParkCall) -> None:
        call = self._calls.get(message.key)
        if call is not None:
            self._set_parked(call, call.parked_peer, message.parked)

    def _set_parked(self, call: Call, by_peer: bool, by_call: bool) -> None:
        """For the policy a parked call is gone."""
        before = call.parked
        call.parked_peer, call.parked_call = by_peer, by_call
        if call.parked == before:
            return
        now = self._clock()
        call.parked_since = call.since = call.moved = now
        (self._policy.leave if call.parked else self._policy.arrive)(call, now)
        if call.exchange is not None:
            call.exchange.hold(call.parked)
        self._ring()  # what came meanwhile, or when it is to be cancelled

    def _keep(self, message: link.Keep) -> None:
        kept = set(message.peers)
        for key in [key for key in (*self._calls, *self._past) if key[0] not in kept]:
            self._cancel(key)
        for call in self._calls.values():
            self._set_parked(call, False, call.parked_call)
        self._parked.clear()
        self._health = ""  # whoever sends this does not know it

    def _renice(self, message: link.Renice) -> None:
        for call in self._calls.values():
            if call.peer == message.peer:
                call.nice = message.nice
                self._policy.renice(call, self._clock())

    def _reschedule(self, message: link.Schedule) -> None:
        if message != self._schedule:
            self._schedule = message
            quantum = policy.Quantum(message.tokens, message.seconds)
            self._policy = policy.make(message.policy, quantum, message.shares)
            for call in self._calls.values():
                if not call.parked:
                    self._policy.arrive(call, self._clock())
