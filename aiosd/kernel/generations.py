"""Generations and the other calls to a model, from the kernel's side: check, queue, account, answer.

The kernel keeps of every open generation the tokens that were given out, so that a core's death costs a pause
and nothing else. Tokens are charged when they are given out; the prompt when it was computed (what came from
the cache is free), and only once however many cores die.
"""

from __future__ import annotations

import errno
import logging
import sys
from typing import TYPE_CHECKING

from msgspec import Raw

from aiosd import link
from aiosd.kernel import budget as budgets
from aiosd.kernel import ledger
from aiosd.kernel.cores import Core
from aiosd.kernel.peer import OUTBOX_PAUSE, OUTBOX_RESUME, Call, Generation, Peer
from aiosd.kernel.proc import Proc
from libaios import wire

if TYPE_CHECKING:
    from aiosd.kernel.loop import Kernel

logger = logging.getLogger("kernel.generations")

PROGRESS_S = 2.0  # between two lines about the loading of a model


class Generations:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.load_error = ""  # a model could not be loaded at boot: the system does not come up
        self._progress: dict[str, int] = {}  # percent shown last, by core
        self._said = kernel.timers.clock()

    # ── submitting ────────────────────────────────────────────────────────────────────────────────────────

    def core_for(self, model: str | None) -> Core:
        core = self.kernel.cores.find(model)
        if core is None:
            names = ", ".join(core.name for core in self.kernel.cores)
            raise wire.error(errno.EINVAL, f"model: no model named {model!r}; there are: {names}")
        return core

    def generate(self, call: Call, args: wire.Generate) -> None:
        if (args.messages is None) == (args.prompt is None):
            raise wire.error(errno.EINVAL, "exactly one of messages and prompt is needed")
        core = self.core_for(args.model)
        self._check_budget(call)
        call.generation = Generation(args, core.name, list(args.given), new_from=len(args.given))
        call.forget = lambda: self._closed(core, call)
        self.kernel.set_timeout(call, args.timeout_s, "answer")
        if args.given:  # generated, and charged, by a call whose kernel died
            self._count_completion(call, len(args.given))
            if call.peer.calls.get(call.id) is not call:
                return  # they were the last of the budget
        nice, group, left = self.call_budget(call)
        call.generation.budget = None if left is None else left + call.generation.used
        core.submit(call, link.Submit(call.key, args, nice, group, left))

    def forward(self, call: Call, model: str | None, message: link.ToCore, timeout_s: float | None) -> None:
        """Embed, tokenize, detokenize: the core answers with the finished body."""
        core = self.core_for(model)
        if isinstance(message, link.SubmitEmbed):
            self._check_budget(call)
        call.forget = lambda: core.cancel(call)
        self.kernel.set_timeout(call, timeout_s, "answer")
        core.submit(call, message)

    def call_budget(self, call: Call) -> tuple[int, str, int | None]:
        """nice, group and tokens left of whoever made the call."""
        proc = call.peer.proc
        if proc is None:
            return 0, "default", None
        return proc.nice, proc.group, budgets.tokens_left(proc.budgets)

    def _check_budget(self, call: Call) -> None:
        proc = call.peer.proc
        if proc is not None and budgets.tokens_left(proc.budgets) == 0:
            self._over_budget(proc)

    def _over_budget(self, proc: Proc) -> None:
        """Refuse, and end whoever does not take no for an answer."""
        budget = next(budget for budget in proc.budgets if budget.tokens_left == 0)
        if not budget.ending:
            budget.ending = True
            self.kernel.agents.reached(budget, "tokens")
            self.kernel.timers.after(budgets.GRACE_S, lambda: self.kernel.agents.end_budget(budget))
        raise wire.error(errno.EDQUOT, budgets.describe(budget))

    def _closed(self, core: Core, call: Call) -> None:
        core.cancel(call)
        generation, proc = call.generation, call.peer.proc
        if generation is not None and proc is not None:
            proc.ctx_tokens -= generation.ctx_tokens
            proc.row[ledger.PROMPT] += generation.prompt_tokens
            proc.row[ledger.CACHED] += generation.cached_tokens
            proc.row[ledger.COMPLETION] += len(generation.tokens)
            budgets.settle(proc.budgets, generation.used)

    # ── what a core says ──────────────────────────────────────────────────────────────────────────────────

    def on_loading(self, core: Core, message: link.Progress) -> None:
        """A line that moves on a terminal, elsewhere a new line now and then when it takes long."""
        percent = int(message.fraction * 100)
        if percent == self._progress.get(core.name):
            return
        if sys.stderr.isatty():
            print(f"\r\x1b[Kaiosd: {core.name}: {message.what} {percent} %", end="", file=sys.stderr, flush=True)
        elif self.kernel.timers.clock() - self._said >= PROGRESS_S:
            self._said = self.kernel.timers.clock()
            logger.info("%s: %s %d %%", core.name, message.what, percent)
        self._progress[core.name] = percent

    def on_loaded(self, core: Core) -> None:
        _clear_line()
        logger.info("%s: loaded", core.name)
        self.kernel.core_loaded()

    def on_load_failed(self, core: Core, message: str) -> None:
        _clear_line()
        if self.kernel.ready:  # a core that was forked again: the supervisor tries once more
            logger.error("%s: %s", core.name, message)
        else:
            self.load_error = message

    def on_started(self, call: Call, started: link.Started) -> None:
        generation = call.generation
        assert generation is not None
        generation.started = True
        if generation.prompt_tokens:
            return  # again, on a new core
        generation.prompt_tokens = started.prompt_tokens
        generation.cached_tokens = started.cached_tokens
        proc = call.peer.proc
        if proc is not None:
            proc.prompt_tokens += started.prompt_tokens
            proc.cached_tokens += started.cached_tokens
        self._count(call, started.prompt_tokens - started.cached_tokens, started.prompt_tokens)

    def on_preempted(self, call: Call) -> None:
        """It waits again: another has its slot."""
        assert call.generation is not None
        call.generation.started = False

    def on_delta(self, call: Call, delta: link.Delta) -> None:
        generation = call.generation
        assert generation is not None
        if delta.offset != len(generation.tokens):
            # Between a kernel's death and the calls' new submission a core does not know how far its callers are.
            self.kernel.cores.resynchronise(call)
            return
        generation.resyncing = False
        generation.tokens.extend(delta.tokens)
        if generation.request.stream:
            self.kernel.send_piece(call, delta.offset, wire.Piece(delta.text, delta.tokens))
            self._pause_if_slow(call, generation)
        else:
            generation.texts.append(delta.text)
        self._count_completion(call, len(delta.tokens))

    def on_finished(self, call: Call, finished: link.Finished) -> None:
        generation = call.generation
        assert generation is not None
        if finished.offset != len(generation.tokens):
            generation.resyncing = False
            self.kernel.cores.resynchronise(call)
            return
        generation.tokens.extend(finished.tokens)
        if not generation.started:  # over within its first step
            self.on_started(call, link.Started(call.key, finished.usage.prompt_tokens, finished.usage.cached_tokens))
        generation.ending = True  # by itself: a budget that is reached now need not end it
        self._count_completion(call, len(finished.tokens))
        if finished.finish_reason == "limit" and call.peer.proc is not None:
            for budget in call.peer.proc.budgets:
                if budget.tokens_left == 0:
                    self.kernel.agents.reached(budget, "tokens")
        self._answer(call, finished.tokens, finished.text, finished.finish_reason, finished)

    def on_answered(self, call: Call, answered: link.Answered) -> None:
        proc = call.peer.proc
        if proc is not None and answered.prompt_tokens:
            proc.prompt_tokens += answered.prompt_tokens
            proc.row[ledger.PROMPT] += answered.prompt_tokens
            budgets.charge(proc.budgets, answered.prompt_tokens)
            budgets.settle(proc.budgets, answered.prompt_tokens)
        self.kernel.finish(call, Raw(answered.body))

    def live_peers(self) -> list[int]:
        return [proc.pid for proc in self.kernel.table.live()] + list(self.kernel.control.clients)

    def on_stats(self, req: int) -> None:
        self.kernel.status.part(req)

    def fail(self, call: Call, code: int, message: str) -> None:
        self.kernel.fail(call, code, message)

    def _answer(
        self, call: Call, last_tokens: list[int], last_text: str, reason: str, finished: link.Finished | None
    ) -> None:
        generation = call.generation
        assert generation is not None
        if generation.request.stream:
            tokens, text = last_tokens, last_text
        else:
            tokens = generation.tokens[generation.new_from :]
            text = "".join(generation.texts) + last_text
        if finished is not None:
            usage, tool_calls = finished.usage, finished.tool_calls
        else:
            used = len(generation.tokens)
            usage, tool_calls = wire.Usage(generation.prompt_tokens, generation.cached_tokens, used), []
        self.kernel.finish(call, wire.Generated(text, tokens, reason, usage, tool_calls))

    # ── accounting ────────────────────────────────────────────────────────────────────────────────────────

    def _count_completion(self, call: Call, tokens: int) -> None:
        if call.peer.proc is not None:
            call.peer.proc.completion_tokens += tokens
        self._count(call, tokens, tokens)

    def _count(self, call: Call, charged: int, context: int) -> None:
        proc, generation = call.peer.proc, call.generation
        assert generation is not None
        generation.used += charged
        if proc is None:
            return
        generation.ctx_tokens += context
        proc.ctx_tokens += context
        if proc.budgets:
            empty = budgets.charge(proc.budgets, charged)
            if empty is not None:
                self._cut(empty)

    def _cut(self, empty: budgets.Budget) -> None:
        """End every generation that shares a budget of which nothing is left.

        A generation that has used up all it was submitted with is ended by the core itself, which knows its
        figures; the others are ended here.
        """
        self.kernel.agents.reached(empty, "tokens")
        for proc in self.kernel.table.live():
            if empty not in proc.budgets or proc.peer is None:
                continue
            for call in list(proc.peer.calls.values()):
                generation = call.generation
                if generation is None or generation.ending:
                    continue
                if generation.budget is not None and generation.used >= generation.budget:
                    continue
                self._answer(call, [], "", "limit", None)

    # ── pausing and parking ───────────────────────────────────────────────────────────────────────────────

    def _pause_if_slow(self, call: Call, generation: Generation) -> None:
        if call.peer.outbox_bytes > OUTBOX_PAUSE and not generation.paused:
            generation.paused = call.peer.paused = True
            self.kernel.cores.by_name[generation.model].pause(call, True)

    def resume_streams(self, peer: Peer) -> None:
        """The peer has read; let its streams go on when it has caught up."""
        if peer.outbox_bytes > OUTBOX_RESUME:
            return
        peer.paused = False
        for call in peer.calls.values():
            if call.generation is not None and call.generation.paused:
                call.generation.paused = False
                self.kernel.cores.by_name[call.generation.model].pause(call, False)

    def park(self, proc: Proc, parked: bool) -> None:
        """Take the agent's generations out of decoding, or let them go on."""
        for core in self.kernel.cores:
            if parked != (proc.pid in core.parked):
                core.park(proc.pid, parked)

    def forget(self, proc: Proc) -> None:
        """The agent is dead."""
        for core in self.kernel.cores:
            if proc.pid in core.parked:
                core.park(proc.pid, False)
            if core.contexts.pop(proc.pid, None) is not None or proc.prompt_tokens:
                core.send(link.Gone(proc.pid))


def _clear_line() -> None:
    """Of progress, before something is logged: it may have stood still before its end."""
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
