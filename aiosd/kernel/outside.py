"""Agents without a process. They stand for a person's own programs, not started by aiosd, that use the gateway.

`aiosd token NAME` makes one. Such an agent has a pid, a group and a budget, is listed by `aios-ps`, stopped by
`aios-kill -STOP` and ended by TERM or KILL, as every agent; then its token is revoked. In the process table it is
always WAITING, and the supervisor has its record, so it survives the kernel's death. It also survives the end of aiosd,
with its usage:

    data/tokens.json     name, group, nice value, budgets, their usage, and the SHA-256 of each token

That file is written when a token is made or revoked, when aiosd stops, and every `SAVE_S` if something was used. So
after a power cut at most that much usage is missing. A budget of time runs on while there is no aiosd.

The use of such an agent is limited by the kinds of budgets that need no process (`limits.WITHOUT_PROCESS`).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from pathlib import Path

import msgspec
from msgspec import Struct

from aiosd.budgets import limits as kinds
from aiosd.budgets.limits import KINDS, WITHOUT_PROCESS, limits_of
from aiosd.ipc import link
from aiosd.kernel import inspection, ledger, spawning
from aiosd.kernel.agents import Lifecycle
from aiosd.kernel.peer import Call
from aiosd.kernel.proc import Proc
from aiosd.kernel.sandboxes import Sandboxes
from libaios import wire

logger = logging.getLogger("kernel")

SAVE_S = 10.0
OWNER = -(1 << 50)  # in the keys with which they are enrolled again; no client's id is as small


#: The ledger's item for each kind. (Time is known from its start; context is held by open calls only.)
COUNTED = {
    "tokens": ledger.CHARGED,
    "cost": ledger.COST_CHARGED,
    "tool_calls": ledger.TOOL_CALLS,
    "children": ledger.CHILDREN,
}


class OutsideRecord(Struct):
    """The record of one such agent in the file."""

    name: str
    group: str
    hash: bytes
    limit: int | None = None  # of tokens,
    used: int = 0
    nice: int = 0
    limits: dict[str, int | float] = {}  # … and of other kinds
    counted: dict[str, int] = {}
    made: float = 0.0  # Unix time

    @property
    def wanted(self) -> wire.Limits:
        return limits_of({**self.limits, "tokens": self.limit})


class Outside:
    """All agents without a process. `path`: the file."""

    def __init__(self, path: Path, agents: Lifecycle, sandboxes: Sandboxes) -> None:
        self._path = path
        self._agents = agents
        self._sandboxes = sandboxes
        self._written: list[OutsideRecord] = []
        self._known: dict[bytes, OutsideRecord] = {}  # by hash, as they were made or read
        agents.outside_changed = self.save

    # ── what a person asks for ────────────────────────────────────────────────────────────────────────────

    def new(self, call: Call, args: wire.NewToken) -> None:
        """Make an agent; the call is finished when it exists. Raises OSError: ENOTSUP, EEXIST, EINVAL."""
        if not self._agents.tokens.url:
            raise wire.error(errno.ENOTSUP, "there is no gateway (pip install 'aiosd[gateway]', and --gateway not off)")
        names = {proc.name for proc in self._live() if proc.token != args.hash}
        names |= {one.spec.name for one in self._agents.forks.values() if one.spec.outside and one.call is not call}
        if args.name in names:
            raise wire.error(errno.EEXIST, f"{args.name}: has a token already (to take it away: --revoke)")
        amounts = {kind.name: amount for kind in KINDS if (amount := kind.of(args.limits)) is not None}
        for kind in KINDS:
            if kind.name in amounts and kind not in WITHOUT_PROCESS:
                raise wire.error(errno.EINVAL, f"{kind.what} budget: cannot be measured of an agent without a process")
        tokens = amounts.pop("tokens", None)
        limit = None if tokens is None else int(tokens)
        kept = OutsideRecord(args.name, args.group or "default", args.hash, limit, limits=amounts, made=time.time())
        self._enrol(call, call.key, kept)

    def listed(self) -> wire.TokenList:
        tokens = []
        for proc in self._live():
            own = proc.budgets[0]
            shown = inspection.kinds(own, time.monotonic())
            tokens.append(wire.TokenInfo(proc.pid, proc.name, proc.group, own.tokens_used, own.limits.tokens, shown))
        return wire.TokenList(self._agents.tokens.url, tokens)

    def _enrol(self, call: Call | None, key: link.CallKey, kept: OutsideRecord) -> None:
        spawn = wire.Spawn("exec", kept.name, name=kept.name, group=kept.group, nice=kept.nice)
        box = self._sandboxes.decide(spawn, None)
        if box is not None:  # its tools work there, and it has no process that would make the folder
            os.makedirs(os.path.join(wire.os_str(box.workspace), "tmp"), 0o700, exist_ok=True)
        self._known[kept.hash] = kept
        budgets = self._agents.budgets
        own = kinds.least(kept.wanted, budgets.each_of(kept.group))
        age = max(time.time() - kept.made, 0.0) if kept.made else 0.0
        spec = msgspec.structs.replace(
            spawning.fork(spawn, key, None, box),
            shares=[link.BudgetShare(0, own, time.monotonic() - age), *budgets.of_group(kept.group)],
            token=kept.hash,
            outside=True,
        )
        letter = msgspec.structs.replace(spawning.letter(spawn, {}, box), target="[token]")
        used = {COUNTED[name]: amount for name, amount in kept.counted.items() if name in COUNTED}
        self._agents.enrol(call, spec, letter, {**used, ledger.CHARGED: kept.used})

    def _live(self) -> list[Proc]:
        return [proc for proc in self._agents.table.live() if proc.outside]

    # ── over the end of aiosd ─────────────────────────────────────────────────────────────────────────────

    def restore(self) -> None:
        """Enrol the agents of the file that have no record, because aiosd has been started again."""
        self._written = self._read()
        self._known = {kept.hash: kept for kept in self._written}
        table = self._agents.table
        there = {proc.token for proc in (*table, *table.history.values())}
        if self._agents.tokens.url:
            for kept in self._written:
                if kept.hash not in there:
                    self._restore(kept)
        self._save_later()

    def _restore(self, kept: OutsideRecord) -> None:
        try:
            self._enrol(None, (OWNER, int.from_bytes(kept.hash[:6])), kept)
        except OSError as err:
            logger.error("token of %s: %s", kept.name, err.strerror)

    def _read(self) -> list[OutsideRecord]:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=list[OutsideRecord])
        except FileNotFoundError:
            return []
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as err:
            logger.error("%s cannot be read, its tokens are of no use: %s", self._path, err)
            with contextlib.suppress(OSError):
                os.replace(self._path, self._path.with_suffix(".damaged"))
            return []

    def _save_later(self) -> None:
        self._agents.timers.after(SAVE_S, self._save_again)

    def _save_again(self) -> None:
        self.save()
        self._save_later()

    def save(self) -> None:
        if self._agents.stopping:
            return  # an agent that ends now ends with the system, and comes back with it
        if any(one.spec.outside and one.call is None for one in self._agents.forks.values()):
            return  # not all agents of the file are enrolled yet
        live = self._live()
        kept = [self._now(proc) for proc in live]
        self._known = {one.hash: one for one in kept}
        if kept == self._written or not self._agents.tokens.url:
            return
        try:
            _write(self._path, msgspec.json.encode(kept))
            self._written = kept
        except OSError as err:
            logger.error("%s cannot be written: %s", self._path, err.strerror)

    def _now(self, proc: Proc) -> OutsideRecord:
        """The agent's record for the file."""
        own, known = proc.budgets[0], self._known.get(proc.token)
        if known is None:  # a kernel died before the record was written
            amounts = {kind.name: amount for kind in WITHOUT_PROCESS if (amount := kind.of(own.limits)) is not None}
            amounts.pop("tokens", None)
            known = OutsideRecord(
                proc.name, proc.group, proc.token, own.limits.tokens, limits=amounts, made=proc.started
            )
        counted = {name: int(own.used(name)) for name in known.limits if name in COUNTED}
        return msgspec.structs.replace(known, group=proc.group, used=own.tokens_used, nice=proc.nice, counted=counted)


def _write(path: Path, data: bytes) -> None:
    new = path.with_suffix(".new")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
