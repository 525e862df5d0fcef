"""Generations, from the kernel's side: check, queue, account, answer.

For every open generation the kernel keeps the tokens that were given out, so that a core's death causes a pause and
nothing else. Tokens are charged when they are given out; the prompt when it was computed (tokens from the cache are
free), and only once however many cores die.

Stopping, counting and cutting concern the agent, not one connection of it: generations of its children over the control
socket are treated as its own (`peers`).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

from aiosd.budgets.price import FREE, Price
from aiosd.ipc import link
from aiosd.kernel import budget as budgets
from aiosd.kernel import ledger
from aiosd.kernel.budget import Budget
from aiosd.kernel.calls import CallTable
from aiosd.kernel.charges import check_open
from aiosd.kernel.cores import Core, Cores
from aiosd.kernel.generation import OpenGeneration
from aiosd.kernel.peer import OUTBOX_PAUSE, OUTBOX_RESUME, Call, Peer
from aiosd.kernel.proc import Proc, ProcTable
from aiosd.kernel.routes import Routes
from libaios import wire
from libaios.wire import Sys


class Generations:
    """All generations. `spent` is called with a budget that has no tokens or no money left; `refused` with a budget and
    an agent whose call needs more than is left; `stood_still` when a core has stopped decoding the generations of a
    stopped agent; `schedule` is the policy in force."""

    def __init__(
        self,
        calls: CallTable,
        table: ProcTable,
        cores: Cores,
        routes: Routes,
        schedule: Callable[[], link.Schedule],
    ) -> None:
        self.calls = calls
        self.peers = calls.peers
        self.table = table
        self.cores = cores
        self.routes = routes
        self.schedule = schedule
        self.spent: Callable[[Budget, str], None]
        self.refused: Callable[[Budget, str, Proc], None]
        self.stood_still: Callable[[Proc], None]

    # ── submitting ────────────────────────────────────────────────────────────────────────────────────────

    def core_for(self, model: str | None) -> Core:
        core = self.cores.find(model)
        if core is None:
            if (route := self.routes.find(model)) is not None:
                models = ", ".join(core.model for core in route.cores)
                raise wire.error(
                    errno.EINVAL, f"model: {model} is a route, for chats and completions; name one of {models}"
                )
            names = ", ".join([*(core.model for core in self.cores), *(route.name for route in self.routes)])
            raise wire.error(errno.EINVAL, f"model: no model named {model!r}; there are: {names}")
        return core

    def generate(self, call: Call, args: wire.Generate) -> None:
        if (args.messages is None) == (args.prompt is None):
            raise wire.error(errno.EINVAL, "exactly one of messages and prompt is needed")
        self.check_budget(call)
        route, money = self.routes.find(args.model), self.money_left(call)
        core = self.core_for(route.choose(args, set(), money) if route is not None else args.model)
        if money is not None:
            self._check_money(call, core, money)
        progress = wire.Progress(args.given)
        generation = OpenGeneration(args, core.model, progress, new_from=len(args.given), route=route)
        generation.tried.add(core.model)
        generation.others = route is not None and len(route.cores) > 1
        call.generation = generation
        call.forget = lambda: self._closed(call)
        self.calls.set_timeout(call, args.timeout_s, "answer")
        if args.given:  # generated, and charged, by a call whose kernel died
            self._count_completion(call, len(args.given) if isinstance(args.given, list) else 0)
            if call.peer.calls.get(call.id) is not call:
                return  # they were the last of the budget
        self._submit(call, core, args)

    def _submit(self, call: Call, core: Core, request: wire.Generate) -> None:
        generation = call.generation
        assert generation is not None
        nice, group, left = self.call_budget(call)
        generation.budget = None if left is None else left + generation.used
        shares = budgets.purses(call.peer.proc.budgets) if call.peer.proc is not None else []
        others, money = generation.others, self.money_left(call)
        price = None if money is None else core.price
        more = link.Submit(call.key, request, nice, group, left, others=others, shares=shares, money=money, price=price)
        core.submit(call, more)

    def _check_money(self, call: Call, core: Core, money: int) -> None:
        """Raises OSError (EDQUOT, EINVAL) if a budget of money forbids this model. A model that is free may always be
        used."""
        proc = call.peer.proc
        if core.price is None:
            why = f'model: what {core.model} costs is not known: set its price (price = "0,0" if it is free)'
            raise wire.error(errno.EINVAL, f"{why}, or use no budget of money")
        if money == 0 and not core.price.is_free and proc is not None:
            budget = next(budget for budget in proc.budgets if budget.cost_left == 0)
            self.refused(budget, "cost", proc)
            raise wire.error(errno.EDQUOT, budgets.sentence(budget, "cost"))

    def money_left(self, call: Call) -> int | None:
        """What the agent may still spend; None: it has no budget of money."""
        proc = call.peer.proc
        return None if proc is None else budgets.cost_left(proc.budgets)

    def choose(self, call: Call, args: Any) -> Core:
        """The core for a call that is no generation. Raises OSError: EINVAL, EDQUOT."""
        shared = call.peer.proc.budgets if call.peer.proc is not None else []
        if call.row.sys == Sys.CTX_SAVE and any(budget.limits.disk_bytes is not None for budget in shared):
            raise wire.error(errno.EDQUOT, "disk budget: what a saved context takes cannot be measured")
        if call.row.sys in (Sys.EMBED, Sys.RERANK):
            self.check_budget(call)
            core = self.cores.for_vectors() if args.model is None else self.core_for(args.model)
            if (money := self.money_left(call)) is not None:
                self._check_money(call, core, money)
            return core
        return self.core_for(args.model)

    def caller_of(self, call: Call) -> link.Caller:
        proc = call.peer.proc
        if proc is None:
            return link.Caller(0, os.getuid(), "", False, "default")
        network = (proc.ospid, proc.network)
        if proc.caller is not None and not proc.budgets:
            known, box_then = proc.caller
            if known.nice == proc.nice and known.network == network and box_then is proc.box:
                return known
        left = budgets.tokens_left(proc.budgets)
        box = b"" if proc.box is None else wire.encode(proc.box)
        rest = (left, box, proc.program, proc.sha256, budgets.purses(proc.budgets), network)
        caller = link.Caller(proc.pid, proc.uid, proc.name, proc.named, proc.group, proc.nice, *rest)
        proc.caller = None if proc.budgets else (caller, proc.box)
        return caller

    def call_budget(self, call: Call) -> tuple[int, str, int | None]:
        """nice, group and tokens left of the agent that made the call."""
        proc = call.peer.proc
        if proc is None:
            return 0, "default", None
        left = budgets.tokens_left(proc.budgets)
        room = [budget.limits.context for budget in proc.budgets if budget.limits.context is not None]
        return proc.nice, proc.group, min(room, default=None) if left is None else min([left, *room])

    def check_budget(self, call: Call) -> None:
        """Raises OSError (EDQUOT) when no token is left."""
        proc = call.peer.proc
        if proc is None or not proc.budgets:
            return
        check_open(proc)
        if budgets.tokens_left(proc.budgets) == 0:
            budget = next(budget for budget in proc.budgets if budget.tokens_left == 0)
            self.refused(budget, "tokens", proc)
            raise wire.error(errno.EDQUOT, budgets.sentence(budget, "tokens"))

    def _closed(self, call: Call) -> None:
        generation, proc = call.generation, call.peer.proc
        if generation is not None:
            self.cores.by_model[generation.model].cancel(call)
        if generation is not None and proc is not None:
            proc.ctx_tokens -= generation.ctx_tokens
            budgets.hold(proc.budgets, -generation.ctx_tokens)
            proc.row[ledger.PROMPT] += generation.prompt_tokens
            proc.row[ledger.CACHED] += generation.cached_tokens
            proc.row[ledger.COMPLETION] += generation.completion_tokens
            proc.row[ledger.COST] += generation.cost
            budgets.settle(proc.budgets, generation.used, generation.cost)

    # ── what a core sends ─────────────────────────────────────────────────────────────────────────────────

    def on_started(self, call: Call, started: link.Started) -> None:
        generation = call.generation
        assert generation is not None
        generation.started = True
        if generation.prompt_counted or not started.prompt_tokens:
            return  # known already, since a new core repeats it; or not known yet
        self._count_prompt(call, started.prompt_tokens, started.cached_tokens)

    def on_spent(self, call: Call, spent: link.Spent) -> None:
        self._count_prompt(call, spent.prompt_tokens, spent.cached_tokens)

    def on_preempted(self, call: Call) -> None:
        """The generation waits again, because another one has got its slot."""
        assert call.generation is not None
        call.generation.started = False

    def on_delta(self, call: Call, delta: link.Delta) -> None:
        generation = call.generation
        assert generation is not None
        if delta.offset != generation.progress.length:
            # Between a kernel's death and the calls' new submission a core does not know what its callers have
            # received.
            self.cores.by_model[generation.model].resynchronise(call)
            return
        generation.resyncing = False
        generation.progress.add(delta.tokens, delta.text)
        generation.mu = delta.mu
        if generation.request.stream:
            model = generation.model if generation.route is not None and not delta.offset else ""
            piece = wire.Piece(delta.text, delta.tokens, delta.logprobs, model)
            self.calls.send_piece(call, delta.offset, wire.raw(piece))
            self._pause_if_slow(call, generation)
        else:
            generation.texts.append(delta.text)
            generation.logprobs += delta.logprobs or []
        self._count_completion(call, len(delta.tokens) if delta.charged is None else delta.charged)

    def on_finished(self, call: Call, finished: link.GenerationDone) -> None:
        generation = call.generation
        assert generation is not None
        if finished.offset != generation.progress.length:
            generation.resyncing = False
            self.cores.by_model[generation.model].resynchronise(call)
            return
        generation.progress.add(finished.tokens, finished.text)
        generation.ending = True  # by itself: if a budget is reached now, the generation need not be ended
        # The prompt's cost is known only now if the generation ended in its first step; else this changes nothing.
        self.on_started(call, link.Started(call.key, finished.usage.prompt_tokens, finished.usage.cached_tokens))
        if finished.spent is not None:
            self.on_spent(call, finished.spent)
        self._count_completion(call, len(finished.tokens) if finished.charged is None else finished.charged)
        if finished.finish_reason == "limit" and call.peer.proc is not None:
            short = finished.short if finished.short in ("tokens", "cost") else ""
            if short and not generation.progress.length and self._refuse(call, call.peer.proc, short):
                return
            for budget in call.peer.proc.budgets:
                for kind, left in (("tokens", budget.tokens_left), ("cost", budget.cost_left)):
                    if left == 0:
                        self.spent(budget, kind)
            if finished.short == "context":
                self._no_room(call.peer.proc)
        self._answer(call, finished.tokens, finished.text, finished.finish_reason, finished)

    def _refuse(self, call: Call, proc: Proc, kind: str) -> bool:
        """A generation got no token, because the first would cost more than is left: refuse the call. (An empty answer
        would make callers try again and again.) False: nothing at all is left, and that ends the agent."""
        budget = budgets.tightest(proc.budgets, kind)
        left = None if budget is None else budget.left(kind)
        if budget is None or left is None or left <= 0:
            return False
        if kind == "cost" and self._move(call, budgets.sentence(budget, kind)):
            return True
        self.refused(budget, kind, proc)
        self.calls.fail(call, errno.EDQUOT, budgets.sentence(budget, kind))
        return True

    def on_failed(self, call: Call, failed: link.Failed) -> None:
        if (failed.elsewhere or failed.errno == errno.EMSGSIZE) and self._move(call, failed.message):
            return
        proc = call.peer.proc
        budget = budgets.tightest(proc.budgets, failed.short) if failed.short and proc is not None else None
        if budget is not None and proc is not None:
            self.refused(budget, failed.short, proc)
        self.calls.fail(call, failed.errno, failed.message)

    def on_death(self, call: Call, reason: str) -> None:
        """The core of a generation is dead: the generation waits for the next one, unless another model can take it."""
        self._move(call, f"it is down: {reason}")

    def _move(self, call: Call, why: str) -> bool:
        """Move it to the next model of its route, if its caller has got nothing yet. Its usage stays charged."""
        generation = call.generation
        assert generation is not None
        if generation.route is None or (generation.request.stream and generation.progress.length):
            return False
        old = self.cores.by_model[generation.model]
        generation.route.failed(old.model, why)
        money = self.money_left(call)
        model = generation.route.choose(generation.request, generation.tried, money)
        if model is None:
            return False
        core = self.cores.by_model[model]
        if money is not None and (core.price is None or (money == 0 and not core.price.is_free)):
            return False
        old.cancel(call)
        if call.peer.proc is not None:
            call.peer.proc.ctx_tokens -= generation.ctx_tokens
            budgets.hold(call.peer.proc.budgets, -generation.ctx_tokens)
        generation.restart(core.model)
        self._submit(call, core, generation.request)
        return True

    def _no_room(self, proc: Proc) -> None:
        """A call of this agent needed more tokens at a time than one of its budgets allows."""
        budget = budgets.tightest(proc.budgets, "context")
        if budget is not None:
            self.refused(budget, "context", proc)

    def charge(self, call: Call, tokens: int, price: Price) -> None:
        """Charge the tokens of a call that is no generation (an embedding)."""
        proc = call.peer.proc
        if proc is not None:
            cost = price.of_prompt(tokens, 0)
            proc.prompt_tokens += tokens
            proc.cost += cost
            proc.row[ledger.PROMPT] += tokens
            proc.row[ledger.COST] += cost
            poor = budgets.pay(proc.budgets, cost) if cost else None
            empty = budgets.charge(proc.budgets, tokens)
            budgets.settle(proc.budgets, tokens, cost)
            if empty is not None:
                self._cut(empty, "tokens")
            if poor is not None:
                self._cut(poor, "cost")

    def on_parked(self, peer: int) -> None:
        found = self.peers.find(peer)
        if found is not None and found.proc is not None:
            self.stood_still(found.proc)

    def _answer(
        self, call: Call, last_tokens: list[int], last_text: str, reason: str, finished: link.GenerationDone | None
    ) -> None:
        generation = call.generation
        assert generation is not None
        if generation.request.stream:
            tokens, text = last_tokens, last_text
        else:
            tokens = generation.progress.tokens[generation.new_from :]
            text = "".join(generation.texts) + last_text
        logprobs = finished.logprobs if finished is not None else None
        if generation.request.sampling.logprobs and not generation.request.stream:
            logprobs = generation.logprobs + (logprobs or [])
        if finished is not None:
            usage, tool_calls = finished.usage, finished.tool_calls
        else:
            used = generation.prompt_tokens, generation.cached_tokens, generation.completion_tokens
            usage, tool_calls = wire.Usage(*used), []
        self.calls.finish(call, wire.Generated(text, tokens, reason, usage, tool_calls, logprobs, generation.model))

    # ── accounting ────────────────────────────────────────────────────────────────────────────────────────

    def _count_prompt(self, call: Call, tokens: int, cached: int) -> None:
        generation, proc = call.generation, call.peer.proc
        assert generation is not None
        generation.prompt_counted = True
        generation.prompt_tokens += tokens
        generation.cached_tokens += cached
        if proc is not None:
            proc.prompt_tokens += tokens
            proc.cached_tokens += cached
        self._count(call, tokens - cached, tokens, self._price(generation).of_prompt(tokens, cached))

    def _count_completion(self, call: Call, tokens: int) -> None:
        generation = call.generation
        assert generation is not None
        generation.completion_tokens += tokens
        if call.peer.proc is not None:
            call.peer.proc.completion_tokens += tokens
        self._count(call, tokens, tokens, self._price(generation).of_completion(tokens))

    def _price(self, generation: OpenGeneration) -> Price:
        return self.cores.by_model[generation.model].price or FREE

    def _count(self, call: Call, charged: int, context: int, cost: int) -> None:
        proc, generation = call.peer.proc, call.generation
        assert generation is not None
        generation.used += charged
        generation.cost += cost
        if proc is None:
            return
        generation.ctx_tokens += context
        proc.ctx_tokens += context
        proc.cost += cost
        if proc.budgets:
            budgets.hold(proc.budgets, context)
            poor = budgets.pay(proc.budgets, cost) if cost else None
            empty = budgets.charge(proc.budgets, charged)
            if empty is not None:
                self._cut(empty, "tokens")
            if poor is not None:
                self._cut(poor, "cost")

    def _cut(self, empty: budgets.Budget, kind: str) -> None:
        """End every generation that shares a budget of which nothing is left. A model that is free goes on when only
        money is used up.

        A generation that has used up all that it was submitted with is ended by the core itself, which knows its
        figures; the others are ended here.
        """
        self.spent(empty, kind)
        sharers = [proc for pid in list(empty.sharers) if (proc := self.table.get(pid)) is not None]
        for call in [call for proc in sharers for call in self.peers.calls_of(proc)]:
            generation = call.generation
            if generation is None or generation.ending:
                continue
            if kind == "cost" and self._price(generation).is_free:
                continue
            if kind == "tokens" and generation.budget is not None and generation.used >= generation.budget:
                continue
            self._answer(call, [], "", "limit", None)

    # ── pausing and parking ───────────────────────────────────────────────────────────────────────────────

    def _pause_if_slow(self, call: Call, generation: OpenGeneration) -> None:
        if call.peer.outbox_bytes > OUTBOX_PAUSE and not generation.paused:
            generation.paused = call.peer.paused = True
            self.cores.by_model[generation.model].pause(call, True)

    def resume_streams(self, peer: Peer) -> None:
        """The peer has read replies: continue its paused streams when it has caught up."""
        if peer.outbox_bytes > OUTBOX_RESUME:
            return
        peer.paused = False
        for call in peer.calls.values():
            if call.generation is not None and call.generation.paused:
                call.generation.paused = False
                self.cores.by_model[call.generation.model].pause(call, False)

    def park(self, proc: Proc, parked: bool) -> None:
        """Stop decoding the agent's generations, those of later connections included, or let them go on."""
        proc.halted = parked
        for peer in self.peers.of(proc):
            self.park_peer(peer, parked)

    def park_peer(self, peer: Peer, parked: bool) -> None:
        for core in self.cores:
            if parked != (peer.id in core.parked):
                core.park(peer.id, parked)

    def joined(self, peer: Peer) -> None:
        """An agent has a new connection: if the agent is parked, calls of the connection wait."""
        if peer.proc is not None and peer.proc.halted:
            self.park_peer(peer, True)

    def left(self, peer: Peer) -> None:
        """A connection is gone, and with it all its calls."""
        for core in self.cores:
            if peer.id in core.parked:
                core.park(peer.id, False)
        if peer.proc is not None:
            self.stood_still(peer.proc)

    def stands_still(self, proc: Proc) -> bool:
        """Whether nothing of a parked agent is decoded any more, and nothing of it is on its way here."""
        peers = [peer.id for peer in self.peers.of(proc)]
        return all(core.stands_still(peers) for core in self.cores)

    def renice(self, proc: Proc, nice: int) -> None:
        """Set the nice value of all open calls of an agent."""
        for peer in self.peers.of(proc):
            for core in self.cores:
                core.send(link.Renice(peer.id, nice))

    def forget(self, proc: Proc) -> None:
        """Forget an agent that is dead."""
        for core in self.cores:
            if core.contexts.pop(proc.pid, None) is not None or proc.prompt_tokens:
                core.send(link.PeerGone(proc.pid))
