"""Decides whether an agent may do a deed, and keeps the *asks*: questions that wait for the answer of a person.

    deed → rules (`aiosd.access.rules`) → denied, allowed, or a person must be asked
    an ask → allowed for all times? → is a client watching asks? → the call stays open until a person has answered

Promises:

    * While no client watches asks: denied at once, with a message that names the rule; with `ask_timeout` after that
      time.
    * An ask holds nothing but its call. When the call ends (its timeout, its agent's end) the ask is gone.
    * An answer is for a digest: of the deed as it was shown. If the call amounts to something else by then, there is a
      new ask (`link.Ask.approved`).
    * No agent answers, lists or watches asks: all of that is for persons (`Access`).
    * An ask outlives the kernel: its call is submitted again to the next one, and becomes the same ask, by the same
      name. Watching clients come back meanwhile: for BACK_S it is not denied for lack of them. An answer that the dead
      kernel had taken and not passed on is lost, and the person is asked again.

A person watches all asks with `aios-approve -f`; the terminal to which an agent is attached shows its asks and those of
its descendants.
"""

from __future__ import annotations

import errno
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
from msgspec import Raw

from aiosd.access.deed import Deed, Subject
from aiosd.access.rules import AccessPolicy, Act, lasting
from aiosd.kernel.always import LastingApprovals
from aiosd.kernel.audit import Audit
from aiosd.kernel.calls import CallTable
from aiosd.kernel.peer import Call, ClientPeer, Peer
from aiosd.kernel.proc import Proc, ProcTable
from aiosd.timers import Timer
from libaios import wire

OPEN_OF_AGENT, OPEN_OF_ALL = 16, 1024  # asks
BACK_S = 10.0  # for watching clients to come back after a kernel's death: for older asks,
BACK_NEW_S = 1.0  # … and for new ones
REMEDY = "aios-approve -f would, and [access] in aiosd.toml can have it allowed"


@dataclass(slots=True, eq=False)
class _Ask:
    call: Call
    proc: Proc
    deed: Deed
    go_on: Callable[[], None]
    shown: wire.Asked
    patience: Timer | None = None  # runs while no client watches


class Approvals:
    """All asks, and the decisions. `boot`: of this system; `reborn`: another kernel has served it before."""

    def __init__(
        self,
        policy: AccessPolicy,
        table: ProcTable,
        calls: CallTable,
        always: LastingApprovals,
        audit: Audit,
        boot: str,
        reborn: bool,
    ) -> None:
        self.policy = policy
        self.always = always
        self.audit = audit
        self._table = table
        self._calls = calls
        self._boot = boot
        self._ruled: dict[int, bool] = {}  # whether a rule names a call, by its number
        self._ruled_tools: dict[str, bool] = {}  # … a tool that callers may compute
        self._asks: dict[str, _Ask] = {}
        self._watchers: dict[Call, wire.WatchAsks] = {}
        self._born = calls.timers.clock() if reborn else -BACK_S

    def concerns(self, row: wire.Row) -> bool:
        """Whether any rule names this system call. This runs for almost every call."""
        known = self._ruled.get(row.sys)
        if known is None:
            known = self._ruled[row.sys] = self.policy.concerns(row.name, False)
        return known

    def concerns_tool(self, name: str) -> bool:
        """Whether any rule names this tool."""
        known = self._ruled_tools.get(name)
        if known is None:
            known = self._ruled_tools[name] = self.policy.concerns(name, True)
        return known

    def change(self, policy: AccessPolicy) -> None:
        self.policy = policy
        self._ruled.clear()
        self._ruled_tools.clear()

    # ── the decision ──────────────────────────────────────────────────────────────────────────────────────

    def judge(self, call: Call, deed: Deed, go_on: Callable[[], None]) -> bool:
        """Whether the call may do this now. False: a person is asked, and `go_on` is called when it is allowed. Raises
        OSError (EPERM) that names the rule."""
        proc = call.peer.proc
        if proc is None:
            return True
        subject = subject_of(proc)
        decision = self.policy.decide(subject, deed)
        if decision.act is Act.DENY:
            self.denied(proc, deed, decision.rule)
            raise wire.error(errno.EPERM, f"{deed.shown}: denied by the rule: {decision.rule}")
        if decision.act is Act.ALLOW:
            if decision.rule:
                self._note("allowed", proc, deed, rule=decision.rule)
            return True
        lasts = self.always.covering(subject, deed)
        if lasts is not None:
            self._note("allowed", proc, deed, rule=decision.rule, always=lasts.number)
            return True
        self._ask(call, proc, deed, decision.rule, go_on)
        return False

    def _ask(self, call: Call, proc: Proc, deed: Deed, rule: str, go_on: Callable[[], None]) -> None:
        if sum(ask.proc is proc for ask in self._asks.values()) >= OPEN_OF_AGENT:
            raise wire.error(errno.EAGAIN, f"{deed.shown}: {OPEN_OF_AGENT} asks of this agent wait already")
        if len(self._asks) >= OPEN_OF_ALL:
            raise wire.error(errno.EAGAIN, f"{deed.shown}: {OPEN_OF_ALL} asks wait already")
        ask = _Ask(call, proc, deed, go_on, self._shown(call, proc, deed, rule))
        wait_s = self._patience(ask)
        if wait_s is not None and wait_s <= 0:
            self.denied(proc, deed, rule, why="nobody listens")
            raise wire.error(errno.EPERM, self._unheard(ask))
        if self._asks.setdefault(ask.shown.id, ask) is not ask:
            raise wire.error(errno.EAGAIN, f"{deed.shown}: another ask has its name")
        call.forget = lambda: self._over(ask, wire.AskState.GONE)
        self._note("asked", proc, deed, rule=rule, ask=ask.shown.id)
        self._set_clock(ask, wait_s)
        self._notify(ask)

    def denied(self, proc: Proc, deed: Deed, rule: str, **more: str) -> None:
        self._note("denied", proc, deed, rule=rule, **more)

    def _shown(self, call: Call, proc: Proc, deed: Deed, rule: str) -> wire.Asked:
        name = f"{self._boot} {call.peer.id} {call.id} {proc.restarts}".encode() + deed.digest
        always = lasting(0, subject_of(proc), deed, proc.name, 0.0)
        return wire.Asked(
            id=hashlib.blake2b(name, digest_size=4).hexdigest(),
            digest=deed.digest.hex(),
            pid=proc.pid,
            name=proc.name,
            group=proc.group,
            what=deed.what,
            tool=deed.tool,
            resources=deed.resources,
            details=deed.details,
            rule=rule,
            folder=deed.base,
            always="" if deed.once else always.shown,
            since=time.time(),
        )

    # ── those who can answer ──────────────────────────────────────────────────────────────────────────────

    def watch(self, call: Call, args: wire.WatchAsks) -> None:
        """Open a watch: the call stays open, and its pieces are new asks and their results."""
        self._watchers[call] = args
        call.forget = lambda: self._unwatch(call)
        for ask in self._asks.values():
            if self._concerns(call, ask):
                self._send(call, ask.shown)
                self._set_clock(ask, None)

    def _unwatch(self, call: Call) -> None:
        del self._watchers[call]
        for ask in list(self._asks.values()):
            self._set_clock(ask, self._patience(ask))

    def _concerns(self, watcher: Call, ask: _Ask) -> bool:
        args = self._watchers[watcher]
        if not args.attached:
            return not args.pid or self._table.is_ancestor(args.pid, ask.proc)
        proc: Proc | None = ask.proc
        while proc is not None and proc.attached_to != watcher.peer.id:
            proc = self._table.get(proc.ppid)
        return proc is not None

    def _patience(self, ask: _Ask) -> float | None:
        """For how many seconds the ask waits from now on; None: as long as a client watches."""
        if any(self._concerns(watcher, ask) for watcher in self._watchers):
            return None
        back_s = BACK_S if ask.call.again else BACK_NEW_S
        return max(self.policy.ask_timeout_s, self._born + back_s - self._calls.timers.clock())

    def _set_clock(self, ask: _Ask, seconds: float | None) -> None:
        if ask.patience is not None:
            ask.patience.cancel()
            ask.patience = None
        if seconds is not None:
            ask.patience = self._calls.timers.after(seconds, lambda: self._unheard_of(ask))

    def _unheard_of(self, ask: _Ask) -> None:
        self.denied(ask.proc, ask.deed, ask.shown.rule, why="nobody listens", ask=ask.shown.id)
        self._close(ask, wire.AskState.DENIED)
        self._calls.fail(ask.call, errno.EPERM, self._unheard(ask))

    @staticmethod
    def _unheard(ask: _Ask) -> str:
        what = ask.deed.reason or ask.deed.shown
        return f"{what}: needs a person's approval ({ask.shown.rule}), and nobody listens: {REMEDY}"

    # ── answers ───────────────────────────────────────────────────────────────────────────────────────────

    def answer(self, peer: Peer, args: wire.AnswerAsk) -> None:
        """Answer an ask. Raises OSError: ESRCH, EAGAIN, or the error of the file if an answer for all times cannot be
        kept."""
        ask = self._asks.get(args.id)
        if ask is None:
            raise wire.error(errno.ESRCH, f"{args.id}: nothing with this ID is asked (any more)")
        if args.digest != ask.shown.digest:
            raise wire.error(errno.EAGAIN, f"{args.id}: something else is asked by now; look at it again")
        if args.always and ask.deed.once:
            raise wire.error(errno.EINVAL, f"{args.id}: this can only be allowed once at a time")
        by = {"ask": ask.shown.id, "rule": ask.shown.rule, "by": _person(peer)}
        if args.allow and args.always:
            proc = ask.proc
            entry = self.always.add(subject_of(proc), ask.deed, f"{proc.name}({proc.pid})", time.time())
            by["always"] = str(entry.number)
        state = wire.AskState.ALLOWED if args.allow else wire.AskState.DENIED
        self._note(state, ask.proc, ask.deed, **by)
        self._close(ask, state)
        if args.allow:
            ask.go_on()
        else:
            reason = f": {args.reason}" if args.reason else ""
            self._calls.fail(ask.call, errno.EPERM, f"{ask.deed.shown}: a person has denied it{reason}")

    def revoke(self, peer: Peer, number: int) -> None:
        """Revoke a permission. Raises OSError: ENOENT, or the error of the file."""
        entry = self.always.revoke(number)
        if entry is None:
            raise wire.error(errno.ENOENT, f"{number}: nothing of this number is allowed for all times")
        self.audit.note("revoked", always=number, what=entry.what, group=entry.group, by=_person(peer))

    # ── the end of an ask ─────────────────────────────────────────────────────────────────────────────────

    def _close(self, ask: _Ask, state: wire.AskState) -> None:
        """Remove an ask that was answered. Its call goes on, or the caller of this method fails it."""
        ask.call.forget = None
        self._over(ask, state)

    def _over(self, ask: _Ask, state: wire.AskState) -> None:
        self._set_clock(ask, None)
        self._asks.pop(ask.shown.id, None)
        ask.shown = msgspec.structs.replace(ask.shown, state=state)
        if state is wire.AskState.GONE:
            self._note(state, ask.proc, ask.deed, ask=ask.shown.id)
        self._notify(ask)

    # ── what is shown ─────────────────────────────────────────────────────────────────────────────────────

    def listed(self) -> list[wire.Asked]:
        return [ask.shown for ask in self._asks.values()]

    def of(self, proc: Proc) -> list[dict[str, str]]:
        """The open asks of one agent, in a few words."""
        asks = [ask for ask in self._asks.values() if ask.proc is proc]
        return [{"id": ask.shown.id, "what": ask.deed.shown, "rule": ask.shown.rule} for ask in asks]

    def in_force(self) -> wire.RulesInForce:
        rules = [rule.shown for act in Act for rule in self.policy.rules if rule.act is act]
        everywhere = sum(args == wire.WatchAsks() for args in self._watchers.values())
        return wire.RulesInForce(rules, self.policy.ask_timeout_s, everywhere, str(self.audit.path))

    def status(self) -> dict[str, object]:
        return {
            "rules": len(self.policy.rules),
            "always": len(self.always.listed()),
            "asks": len(self._asks),
            "listening": len(self._watchers),
            "ask_timeout_s": self.policy.ask_timeout_s,
        }

    def _notify(self, ask: _Ask) -> None:
        for watcher in list(self._watchers):
            if watcher in self._watchers and self._concerns(watcher, ask):
                self._send(watcher, ask.shown)

    def _send(self, call: Call, shown: wire.Asked) -> None:
        self._calls.send_piece(call, 0, Raw(wire.encode(shown)))

    def _note(self, event: str, proc: Proc, deed: Deed, **more: object) -> None:
        self.audit.note(
            event,
            proc.pid,
            name=proc.name,
            group=proc.group,
            what=deed.what,
            tool=deed.tool,
            resources=deed.resources,
            digest=deed.digest.hex(),
            **more,
        )


def subject_of(proc: Proc) -> Subject:
    return Subject(proc.group, proc.program, proc.sha256)


def _person(peer: Peer) -> str:
    return f"client {peer.ospid}" if isinstance(peer, ClientPeer) else str(peer.id)
