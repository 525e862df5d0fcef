"""The life of agents, from the kernel's side: made, signalled, measured, ended, collected.

The supervisor forks, signals and reaps; here is what that means for the process table, for the agents' calls, and for
whoever waits. Budgets are enforced here (`budget` says what they are).
"""

from __future__ import annotations

import errno
import signal
import time
from typing import TYPE_CHECKING

from aiosd import link, procfs
from aiosd.kernel import budget as budgets
from aiosd.kernel import ledger
from aiosd.kernel.budget import Budget
from aiosd.kernel.logindex import LogIndex
from aiosd.kernel.peer import AgentPeer, Call
from aiosd.kernel.proc import INIT, Event, Proc, State
from libaios import wire
from libaios.channel import Channel, Side
from libaios.ring import ProtocolError

if TYPE_CHECKING:
    from aiosd.init.records import Agent
    from aiosd.kernel.loop import Kernel

LOG_INDEX_S = 1.0
FORKS_BYTES = 16 << 20  # of spawns that the supervisor has not read
COMMAND_SHOWN = 4096  # characters of an agent's command in listings
SAMPLE_FEW = 16  # agents without a memory budget that are measured in one turn


class Agents:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.by_ospid: dict[int, Proc] = {}  # live ones
        self.forks: dict[link.Key, tuple[Call, link.Fork]] = {}  # spawns under way
        self.log_index = LogIndex()

    def start_measuring(self) -> None:
        self.kernel.timers.after(LOG_INDEX_S, self._index_logs)
        self.kernel.timers.after(budgets.SAMPLE_S, self._sample_memory)

    # ── birth ─────────────────────────────────────────────────────────────────────────────────────────────

    def adopt(self, agent: Agent) -> None:
        """Take over an agent, dead or alive, from a kernel that died."""
        proc = self.make(agent.spec, agent.pid, agent.ospid, agent.pgid, (agent.started, agent.since), agent.log)
        proc.ppid, proc.nice, proc.budget, proc.reason = agent.ppid, agent.nice, agent.budget, agent.reason
        proc.reaped_by = agent.reaped_by
        self.kernel.table.add(proc)
        if agent.status is None:
            self.connect(proc, agent.memfd, agent.bell)
            if agent.stopped:
                self.kernel.table.advance(proc, Event.STOP)
                self.kernel.generations.park(proc, True)
            return
        self.kernel.table.exit(proc, agent.status)
        if agent.reaped:
            self._reap(proc)

    def fork(self, call: Call, spec: link.Fork, fds: tuple[int, ...]) -> None:
        """Have the supervisor fork an agent; the call is finished when it has."""
        under_way = self.forks.get(call.key)
        if under_way is not None:  # asked for once more, under the same id: one process, and this call is told of it
            self.forks[call.key] = (call, under_way[1])
            return
        if self.kernel.supervisor.pending > FORKS_BYTES:
            raise wire.error(errno.EAGAIN, "so many are being started that the supervisor does not keep up")
        self.forks[call.key] = (call, spec)
        self.kernel.to_supervisor(spec, fds)

    def forked(self, message: link.Forked, fds: list[int]) -> None:
        call, spec = self.forks.pop(message.key)
        proc = self.kernel.table.find(message.pid)
        if proc is None and not fds:  # an old one, forgotten since
            self.kernel.finish(call, wire.Spawned(message.pid, message.log))
            return
        if proc is None:
            started = (message.started, message.since)
            proc = self.make(spec, message.pid, message.ospid, message.pgid, started, message.log)
            self.kernel.table.add(proc)
            self.connect(proc, *fds)
        self.kernel.finish(call, wire.Spawned(proc.pid, proc.log))
        if proc.attached_to and not self.kernel.control.knows(proc.attached_to):
            self.deliver(proc, signal.SIGHUP)  # the client went while we forked

    def fork_failed(self, message: link.ForkFailed) -> None:
        call, _ = self.forks.pop(message.key)
        self.kernel.fail(call, message.errno, message.message)

    def connect(self, proc: Proc, memfd: int, bell: int) -> None:
        """Serve an agent's channel; one whose header it has ruined already ends it here."""
        self.by_ospid[proc.ospid] = proc
        try:
            channel = Channel(memfd, bell, Side.KERNEL)
        except ProtocolError as err:
            self.kernel.counters["offenders"] += 1
            self.set_reason(proc, f"EPROTO: {err}")
            self.deliver(proc, signal.SIGKILL)
            return
        proc.peer = AgentPeer(proc, channel)
        self.kernel.serve(proc.peer)

    def hang_up(self, client: int) -> None:
        """A terminal's command ended: the agents it was attached to get HUP, as a shell's jobs would."""
        for proc in self.kernel.table.live():
            if proc.attached_to == client:
                self.deliver(proc, signal.SIGHUP)

    def hang_up_unclaimed(self) -> None:
        """Clients had time to come back to a new kernel; who has not is gone."""
        for proc in self.kernel.table.live():
            if proc.attached_to and not self.kernel.control.knows(proc.attached_to):
                self.deliver(proc, signal.SIGHUP)

    def make(
        self, spec: link.Fork, pid: int, ospid: int, pgid: int, started: tuple[float, float], log_path: str
    ) -> Proc:
        parent = self.kernel.table.get(spec.ppid)
        proc = Proc(
            pid=pid,
            ospid=ospid,
            pgid=pgid,
            uid=spec.uid,
            name=spec.name,
            command=" ".join(map(wire.os_shown, [spec.target, *spec.args]))[:COMMAND_SHOWN],
            group=spec.group,
            log=log_path,
            started=started[0],
            attached_to=spec.key[0] if spec.attached else 0,
            ppid=spec.ppid if parent is not None and parent.alive else INIT,
            nice=spec.nice,
            row=(row := self.kernel.ledger.row(pid)),
            calls=row[ledger.CALLS],
            prompt_tokens=row[ledger.PROMPT],
            cached_tokens=row[ledger.CACHED],
            completion_tokens=row[ledger.COMPLETION],
        )
        if parent is not None:
            proc.budgets.extend(parent.budgets)
        if spec.limits != wire.Limits():
            proc.budgets.append(Budget(pid, spec.limits, tokens_used=row[ledger.CHARGED], row=row))
            if spec.limits.time_s is not None:
                when = started[1] + spec.limits.time_s
                proc.budgets[-1].timer = self.kernel.timers.at(when, lambda: self._time_is_up(proc))
        self.kernel.counters["agents"] += 1
        return proc

    # ── life and death ────────────────────────────────────────────────────────────────────────────────────

    def renice(self, proc: Proc, nice: int) -> None:
        """Its open calls get the new value too, and those of clients that it has started."""
        proc.nice = nice
        self.kernel.to_supervisor(link.Mark(proc.pid, nice=nice))
        clients = [client.id for client in self.kernel.control.clients.values() if client.proc is proc]
        for peer in (proc.pid, *clients):
            self.kernel.cores.renice(peer, nice)

    def set_reason(self, proc: Proc, reason: str) -> None:
        if not proc.reason:
            proc.reason = reason
            self.kernel.to_supervisor(link.Mark(proc.pid, reason=reason))

    def deliver(self, proc: Proc, number: int, key: link.Key | None = None) -> None:
        """Deliver a signal. STOP and CONT act on the running generations as well, before and after."""
        if number == signal.SIGSTOP:
            self.kernel.generations.park(proc, True)
        self.kernel.to_supervisor(link.SendSignal(proc.pid, number, key))
        if number == signal.SIGCONT:
            self._goes_on(proc)

    def stopped(self, message: link.ChildStopped) -> None:
        proc = self.kernel.table.get(message.pid)
        if proc is None or not proc.alive:
            return
        self.kernel.table.advance(proc, Event.STOP if message.stopped else Event.CONT)
        if message.stopped:
            self.kernel.generations.park(proc, True)
            self.kernel.waiters.on_stop(proc)
        else:
            self._goes_on(proc)

    def _goes_on(self, proc: Proc) -> None:
        """Linux tells nothing, or not all, of a STOP with a CONT right behind it: whoever waits for that stop has
        waited long enough."""
        proc.continued += 1
        self.kernel.generations.park(proc, False)
        self.kernel.waiters.on_stop(proc)

    def exited(self, proc: Proc, status: int, reason: str) -> None:
        if proc.peer is not None:
            self.kernel.drop_peer(proc.peer)
        self.by_ospid.pop(proc.ospid, None)
        self.kernel.generations.forget(proc)
        self.kernel.journal.forget(proc.pid, [message.seq for message in proc.mailbox])
        proc.mailbox.clear()
        proc.mailbox_bytes = 0
        for budget in proc.budgets:
            if budget.owner == proc.pid and budget.timer is not None:
                budget.timer.cancel()
        if proc.log:
            self.log_index.close(proc.log)
        if reason:
            self.set_reason(proc, reason)
        for child in self.kernel.table.exit(proc, status):
            self.kernel.to_supervisor(link.Mark(child.pid, ppid=INIT))
            if child.state is State.ZOMBIE:
                self._reap(child)
        self.kernel.waiters.on_exit(proc)
        if proc.ppid == INIT and proc.state is State.ZOMBIE:
            self._reap(proc)

    def _reap(self, proc: Proc) -> None:
        forgotten = self.kernel.table.reap(proc)
        self.kernel.to_supervisor(link.Mark(proc.pid, reaped=True, reaped_by=proc.reaped_by))
        for pid in forgotten:
            self.kernel.to_supervisor(link.Forget(pid))
            self.kernel.ledger.forget(pid)

    def collect(self, proc: Proc, by: link.Key) -> None:
        """The parent gets the exit status with this call."""
        if proc.state is State.ZOMBIE:
            proc.reaped_by = by
            self._reap(proc)

    # ── budgets ───────────────────────────────────────────────────────────────────────────────────────────

    def reached(self, budget: Budget, which: str) -> None:
        """Note that a budget was reached; its owner's exit status will say so."""
        if budget.reached:
            return
        budget.reached = which
        owner = self.kernel.table.get(budget.owner)
        if owner is not None and not owner.budget:
            owner.budget = which
            self.kernel.to_supervisor(link.Mark(owner.pid, budget=which))
            self.set_reason(owner, budgets.describe(budget))

    def end_budget(self, budget: Budget, number: int = signal.SIGTERM) -> None:
        """End the owner and all that share its budget: TERM, and KILL after a grace."""
        victims = [proc for proc in self.kernel.table.live() if budget in proc.budgets]
        for proc in victims:
            self.deliver(proc, number)
            if number == signal.SIGTERM:
                self.deliver(proc, signal.SIGCONT)
        if victims and number != signal.SIGKILL:
            self.kernel.timers.after(budgets.GRACE_S, lambda: self.end_budget(budget, signal.SIGKILL))

    def _time_is_up(self, proc: Proc) -> None:
        if proc.alive:
            budget = next(budget for budget in proc.budgets if budget.owner == proc.pid)
            self.reached(budget, "time")
            self.end_budget(budget)

    def _sample_memory(self) -> None:
        """PSS of agents: of all with a memory budget each time, of a few others in turn."""
        self.kernel.timers.after(budgets.SAMPLE_S, self._sample_memory)
        live = self.kernel.table.live()
        limited = [proc for proc in live if any(b.limits.memory_bytes is not None for b in proc.budgets)]
        pids = {proc.pid for proc in limited}
        others = sorted((proc for proc in live if proc.pid not in pids), key=lambda proc: proc.sampled)[:SAMPLE_FEW]
        used: dict[int, int] = {}
        for proc in limited + others:
            self._sample(proc)
            for budget in proc.budgets:
                used[budget.owner] = used.get(budget.owner, 0) + proc.mem_bytes
        for budget in {budget for proc in limited for budget in proc.budgets}:
            limit = budget.limits.memory_bytes
            if limit is not None and used[budget.owner] > limit:
                self.reached(budget, "memory")
                self.end_budget(budget, signal.SIGKILL)

    def _sample(self, proc: Proc) -> None:
        proc.mem_bytes = procfs.tree_pss_bytes(proc.ospid)
        proc.sampled = time.monotonic()

    def sample_new(self, procs: list[Proc]) -> None:
        """Agents too young to have been sampled, a few of them, so that a listing shows no zeros."""
        for proc in [proc for proc in procs if proc.alive and not proc.sampled][:SAMPLE_FEW]:
            self._sample(proc)

    def _index_logs(self) -> None:
        self.kernel.timers.after(LOG_INDEX_S, self._index_logs)
        for proc in self.kernel.table.live():
            if proc.log:
                self.log_index.sample(proc.log)
