"""The life of agents, from the kernel's side: they are made, signalled, ended, collected.

The supervisor forks, signals and reaps. This file applies its reports to the process table, to the agents' calls, and
to the calls of others that wait for an agent.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiosd import procfs
from aiosd.config import autostart
from aiosd.ipc import letter, link
from aiosd.ipc.letter import Letter
from aiosd.kernel import ledger, spawning
from aiosd.kernel.budget import Budgets, Stage, sentence
from aiosd.kernel.calls import CallTable
from aiosd.kernel.enforce import Enforcer
from aiosd.kernel.events import EventSource
from aiosd.kernel.generations import Generations
from aiosd.kernel.ledger import Ledger
from aiosd.kernel.listed import Listed, key_of
from aiosd.kernel.logkeeper import LogKeeper
from aiosd.kernel.mail import Mail
from aiosd.kernel.peer import AgentPeer, Call
from aiosd.kernel.proc import INIT, Proc, ProcEvent, ProcState, ProcTable
from aiosd.kernel.sandboxes import Sandboxes
from aiosd.kernel.tokens import BearerTokens
from aiosd.kernel.turns import AgentTurns
from aiosd.kernel.uplink import Uplink
from aiosd.kernel.waiters import Waiters
from aiosd.sandbox.box import Box
from aiosd.timers import Timers
from libaios import wire
from libaios.channel import Channel, Side
from libaios.ring import ProtocolError

if TYPE_CHECKING:
    from aiosd.config.autostart import AgentSpec
    from aiosd.init.records import Agent

logger = logging.getLogger("kernel")

FORKS_BYTES = 1 << 20  # of spawn requests that the supervisor has not read: some thousand, with a descriptor for each
COMMAND_SHOWN = 4096  # characters of an agent's command in listings
REATTACH_S = 10.0  # how long clients have to come back to a new kernel before their agents get HUP
ATTACHED_LOOK_S = 1.0  # between two checks of clients that are stopped and cannot come back to a new kernel


@dataclass(slots=True)
class UnderWay:
    """A spawn that the supervisor has not answered yet."""

    call: Call | None  # None: the system made it itself
    spec: link.Fork
    command: str
    box: Box | None
    used: Mapping[int, int]  # the usage with which its row in the ledger begins, from an earlier run of the system
    newborn: Newborn | None = None  # its process, as soon as it was forked


@dataclass(slots=True)
class Newborn:
    """A process that was forked and still looks up its agent's program."""

    forked: link.Forked
    channel: Channel | str  # or a sentence: what is wrong with it
    bell: EventSource | None
    stopped: bool = False


class Lifecycle:
    def __init__(
        self,
        table: ProcTable,
        calls: CallTable,
        turns: AgentTurns,
        uplink: Uplink,
        timers: Timers,
        ledger: Ledger,
        budgets: Budgets,
        enforcer: Enforcer,
        generations: Generations,
        waiters: Waiters,
        mail: Mail,
        logs: LogKeeper,
        tokens: BearerTokens,
        sandboxes: Sandboxes,
    ) -> None:
        self.tokens = tokens
        self.table = table
        self.calls = calls
        self.peers = calls.peers
        self.turns = turns
        self.uplink = uplink
        self.timers = timers
        self.ledger = ledger
        self.budgets = budgets
        self.enforcer = enforcer
        self.generations = generations
        self.waiters = waiters
        self.mail = mail
        self.logs = logs
        self.sandboxes = sandboxes
        self.by_ospid: dict[int, Proc] = {}  # live ones
        self.forks: dict[link.CallKey, UnderWay] = {}
        self._adopted: set[link.CallKey] = set()  # the calls for which a dead kernel has started agents
        self._patience: dict[int, float] = {}  # attached agents whose client may still come back, until when
        self.listed = Listed(table, timers)
        tokens.agent = table.get
        self.stopping = False  # the system is stopping
        self.process_begun: Callable[[Proc], None]  # see `measure`
        self.process_over: Callable[[Proc, float], None]  # with the seconds that it has used, see `measure`
        self.outside_changed: Callable[[], None] = lambda: None  # an agent without a process has come, or ended
        self.open_door: Callable[[Proc, int], None]  # of a confined agent, see `control`
        self.close_door: Callable[[Proc], None]
        self.open_gates: Callable[[Proc, Sequence[int]], None]  # of one in a network of its own, see `gates`
        self.close_gates: Callable[[Proc], None]
        self.contents: Callable[[], Container[bytes]] = frozenset  # hashes of programs' contents that matter to a rule

    # ── birth ─────────────────────────────────────────────────────────────────────────────────────────────

    def adopt(self, agents: list[Agent]) -> None:
        """Take over all agents, dead or alive, from a kernel that died."""
        for agent in agents:
            started, command = (agent.started, agent.since), self.ledger.command(agent.pid)
            proc = self._make(agent.spec, command, agent.pid, agent.ospid, agent.pgid, started, agent.log)
            if agent.letter >= 0:
                proc.box = letter.read(agent.letter).box
                os.close(agent.letter)
            proc.ppid, proc.nice, proc.budget, proc.reason = agent.ppid, agent.nice, agent.budget, agent.reason
            proc.handed = agent.handed
            self.table.add(proc)
            self.listed.started(agent.spec.key, agent.pid)
            self._adopted.add(agent.spec.key)
        for agent in agents:
            self._adopt(self.table.procs[agent.pid], agent)
        self._repair_families()

    def _adopt(self, proc: Proc, agent: Agent) -> None:
        proc.restarts = agent.restarts.total if agent.restarts is not None else 0
        self.budgets.born(proc.pid, proc.row, proc.budgets)
        if not agent.ospid or agent.status is not None:
            self._used(proc, agent.cpu_s)
        if agent.status is None and not agent.ospid:
            self._enrolled(proc)
            self.generations.park(proc, agent.stopped)
            return
        if agent.status is None:
            self._connect(proc, _open(agent.memfd, agent.bell))
            if agent.door >= 0:
                self.open_door(proc, agent.door)
            self.open_gates(proc, agent.gates)
            if agent.stopped:
                self.table.advance(proc, ProcEvent.STOP)
                self.generations.park(proc, True)
            self.enforcer.adopted(proc)
            return
        self.budgets.leave(proc.pid, proc.budgets)
        self.table.advance(proc, ProcEvent.EXIT)
        proc.status, proc.ended = agent.status, agent.ended
        if agent.reaped:
            self._reap(proc)

    def _repair_families(self) -> None:
        """Agents may have ended while there was no kernel: make their children pid 1's, which also collects them."""
        for proc in list(self.table):
            parent = self.table.get(proc.ppid)
            if proc.ppid != INIT and (parent is None or not parent.alive):
                self._orphaned(proc)
        for proc in list(self.table):
            if proc.ppid == INIT and proc.state is ProcState.ZOMBIE:
                self._reap(proc)

    def shares(
        self, args: wire.Spawn, parent: Proc | None, key: link.CallKey, allowed: bool = False
    ) -> list[link.BudgetShare]:
        """The budgets that a new agent will share. `allowed`: as for `spawning.fork`. Raises OSError (EDQUOT, EAGAIN)
        if one of them has no room for it."""
        group = spawning.group_of_child(parent, args.group, allowed)
        shares = self.budgets.of_new(None if parent is None else parent.budgets, group, args.limits)
        if shares and not self.ledger.room:
            raise wire.error(errno.EAGAIN, f"at most {ledger.ROWS} agents can be remembered while budgets are kept")
        if key in self._adopted or key in self.forks:
            return shares  # submitted again: that agent is counted already
        full = self.budgets.full(shares, "children")
        if full is not None and full.stage >= Stage.TERM:
            raise wire.error(errno.EDQUOT, sentence(full))
        if full is not None:
            if parent is not None:
                self.enforcer.refused(full, "children", parent)
            raise wire.error(errno.EDQUOT, sentence(full, "children"))
        return shares

    def fork(self, call: Call, spec: link.Fork, content: Letter, fds: tuple[int, ...]) -> None:
        """Request an agent from the supervisor; the call is finished when the agent was forked."""
        under_way = self.forks.get(call.key)
        if under_way is not None:  # submitted again under the same id: there is one process, and this call gets its pid
            under_way.call = call
            return
        if self.uplink.pending > FORKS_BYTES:
            raise wire.error(errno.EAGAIN, "more is being started than the supervisor keeps up with")
        self._send_fork(call, spec, content, fds)
        self.budgets.expect(spec.shares)

    def _send_fork(
        self,
        call: Call | None,
        spec: link.Fork,
        content: Letter,
        fds: tuple[int, ...] = (),
        used: Mapping[int, int] | None = None,
    ) -> None:
        sealed = letter.write(content)
        try:
            self.uplink.send(spec, (sealed, *fds))
        finally:
            os.close(sealed)
        self.forks[spec.key] = UnderWay(call, spec, letter.command(content)[:COMMAND_SHOWN], content.box, used or {})

    def forking(self, message: link.Forking, fds: list[int]) -> None:
        """An agent was forked and looks up its program. Meanwhile its channel is opened; it rings when the program
        runs."""
        under_way = self.forks[message.forked.key]
        channel = _open(*fds)
        bell = None
        if isinstance(channel, Channel):
            bell = self.turns.listen(channel, lambda: self._begin(under_way, message.forked))
        under_way.newborn = Newborn(message.forked, channel, bell)

    def forked(self, message: link.Forked, fds: list[int]) -> None:
        under_way = self.forks.get(message.key)
        if under_way is not None:
            self._begin(under_way, message)
        proc = self.table.get(message.pid)
        if fds and proc is not None and proc.alive:
            self._open_doors(proc, fds)
            return
        for fd in fds:
            os.close(fd)

    def _begin(self, under_way: UnderWay, message: link.Forked) -> None:
        """An agent begins, or is known already; answer its spawn."""
        del self.forks[message.key]
        self.listed.started(message.key, message.pid)
        call, spec = under_way.call, under_way.spec
        proc = self.table.find(message.pid)
        if proc is None and under_way.newborn is None and not spec.outside:  # an old one, forgotten since
            self.budgets.arrived(spec.shares)
            self._answer_spawn(call, wire.Spawned(message.pid, message.log, spec.sandbox))
            return
        if proc is None:
            proc = self._make_new(under_way, message)
        self.budgets.arrived(spec.shares)
        self._answer_spawn(call, wire.Spawned(proc.pid, proc.log, spec.sandbox))
        if proc.attached_to and proc.attached_to not in self.peers.clients:
            self.deliver(proc, signal.SIGHUP)  # the client went while we forked

    def _make_new(self, under_way: UnderWay, message: link.Forked) -> Proc:
        started = (message.started, message.since)
        row = self.ledger.row(message.pid)
        for column, amount in under_way.used.items():
            row[column] = amount
        proc = self._make(
            under_way.spec, under_way.command, message.pid, message.ospid, message.pgid, started, message.log
        )
        proc.box, proc.handed = under_way.box, message.handed
        self.ledger.keep_command(proc.pid, under_way.command)
        parent = self.table.get(proc.ppid)
        if proc.ppid != INIT and (parent is None or not parent.alive):  # it died while we forked
            proc.ppid = INIT
            self.uplink.send(link.Mark(proc.pid, ppid=INIT))
        self.table.add(proc)
        if proc.log:
            self.logs.begun(proc.pid, proc.name)
        self.budgets.born(proc.pid, proc.row, proc.budgets)
        if under_way.newborn is None:
            self._enrolled(proc)
            self.outside_changed()
        else:
            self._connect(proc, self._grown(under_way.newborn))
        self.enforcer.born(proc)
        self.process_begun(proc)
        if under_way.newborn is not None and under_way.newborn.stopped:
            self.stopped(link.ChildStopped(proc.pid, True))
        if parent is not None and parent.halted:  # it was stopped, with all its children, while we forked
            self.deliver(proc, signal.SIGSTOP)
        return proc

    def _grown(self, newborn: Newborn) -> Channel | str:
        """The agent's channel, taken from the code that waited for its first ring."""
        if newborn.bell is not None:
            self.turns.leave(newborn.bell)
        return newborn.channel

    def _known(self, pid: int) -> Proc | None:
        """The agent that a report of the supervisor is about. It may have rung without the kernel having noticed
        yet."""
        if pid not in self.table.procs and (under_way := self._newborn(pid)) is not None:
            assert under_way.newborn is not None
            self._begin(under_way, under_way.newborn.forked)
        return self.table.get(pid)

    def _newborn(self, pid: int) -> UnderWay | None:
        for under_way in self.forks.values():
            if under_way.newborn is not None and under_way.newborn.forked.pid == pid:
                return under_way
        return None

    def fork_failed(self, message: link.ForkFailed, fds: list[int]) -> None:
        under_way = self.forks.pop(message.key, None)
        if under_way is None:  # it rang although it cannot run, and ends now: modules of its template may do that
            for fd in fds:
                os.close(fd)
            return
        if under_way.newborn is not None and isinstance(channel := self._grown(under_way.newborn), Channel):
            channel.close()
        self.budgets.arrived(under_way.spec.shares)
        words = letter.read_text(fds[0]) if fds else message.message
        for fd in fds:
            os.close(fd)
        if under_way.call is not None:
            self.calls.fail(under_way.call, message.errno, words)
        else:
            logger.error("agent %s, which starts with the system: %s", under_way.spec.name, words)
            self.listed.refused(message.key, f"has not started: {words}")

    def _answer_spawn(self, call: Call | None, answer: wire.Spawned) -> None:
        if call is not None:
            self.calls.finish(call, answer)

    def system_stops(self) -> None:
        """Commands that wait for an agent show why it ended. Not recorded: no kernel comes after this one."""
        self.stopping = True
        for proc in self.table.live():
            proc.reason = proc.reason or "aiosd was stopped"

    def start_with_system(self, specs: Sequence[AgentSpec]) -> None:
        """Start the agents that the settings list, once, when the system is ready."""
        self.listed.expect(specs)
        for number, spec in enumerate(specs, 1):
            try:
                spawn = autostart.spawn(spec, os.environ)
                box = self.sandboxes.decide(spawn, None)
                key, content = key_of(number), spawning.content(spawn, None, self.contents())
                shares = self.shares(spawn, None, key)
                fork = spawning.fork(spawn, key, None, box, shares=shares, content=content)
                letter = spawning.letter(spawn, self.sandboxes.environment(spawn, None, box), box, content)
                self._send_fork(None, *self.tokens.give(fork, letter, None, None))
            except OSError as err:
                logger.error("agent %s, which starts with the system: %s", spec.name or spec.target, err.strerror)
                self.listed.refused(key_of(number), f"has not started: {err.strerror}")

    def enrol(self, call: Call | None, spec: link.Fork, content: Letter, used: Mapping[int, int]) -> None:
        """Add an agent without a process; the call is finished when the supervisor has noted it."""
        self._send_fork(call, spec, content, used=used)

    def _enrolled(self, proc: Proc) -> None:
        """Record an agent that has no process: it never has one, or is between two."""
        self.table.advance(proc, ProcEvent.FAIL)
        if proc.outside:
            self.tokens.add(proc)

    def _connect_all(self, proc: Proc, fds: list[int]) -> None:
        """Take over its descriptors: its channel; of a confined agent its door, and then its gates."""
        memfd, bell, *doors = fds
        self._connect(proc, _open(memfd, bell))
        self._open_doors(proc, doors)

    def _open_doors(self, proc: Proc, fds: Sequence[int]) -> None:
        for door in fds[:1]:
            self.open_door(proc, door)
        self.open_gates(proc, fds[1:])

    def _connect(self, proc: Proc, channel: Channel | str) -> None:
        """Serve an agent's channel; one whose header it has ruined already ends it here."""
        self.by_ospid[proc.ospid] = proc
        self.tokens.add(proc)
        if isinstance(channel, str):
            self.calls.counters["offenders"] += 1
            self.offended(proc, channel)
            return
        peer = AgentPeer(proc, channel)
        self.peers.add(peer)
        self.turns.serve(peer)

    def offended(self, proc: Proc, why: str) -> None:
        """The agent broke the protocol: kill it; aios-inspect shows why."""
        if proc.alive:
            self.enforcer.set_reason(proc, f"EPROTO: {why}")
            self.deliver(proc, signal.SIGKILL)

    def _make(
        self,
        spec: link.Fork,
        command: str,
        pid: int,
        ospid: int,
        pgid: int,
        started: tuple[float, float],
        log_path: str,
    ) -> Proc:
        row = self.ledger.row(pid)
        self.calls.counters["agents"] += 1
        return Proc(
            pid=pid,
            ospid=ospid,
            pgid=pgid,
            uid=spec.uid,
            name=spec.name,
            named=spec.named,
            command=command,
            group=spec.group,
            log=log_path,
            started=started[0],
            attached_to=spec.key[0] if spec.attached else 0,
            client=spec.client,
            ppid=spec.ppid,
            nice=spec.nice,
            row=row,
            calls=row[ledger.CALLS],
            prompt_tokens=row[ledger.PROMPT],
            cached_tokens=row[ledger.CACHED],
            completion_tokens=row[ledger.COMPLETION],
            cost=row[ledger.COST],
            budgets=self.budgets.join(pid, started[1], spec.shares),
            restart=spec.restart,
            token=spec.token,
            program=spec.program,
            sha256=spec.sha256,
            outside=spec.outside,
            template=spec.template,
        )

    # ── attached agents ───────────────────────────────────────────────────────────────────────────────────

    def hang_up(self, client: int) -> None:
        """A terminal's command ended: the agents it was attached to get HUP, as a shell's jobs would."""
        if not self.stopping:
            for proc in self.table.live():
                if proc.attached_to == client:
                    self.deliver(proc, signal.SIGHUP)

    def hang_up_unclaimed(self) -> None:
        """Clients had time to come back to a new kernel. A client that is stopped (Ctrl-Z) could not do that, and gets
        the same time when it continues; any other is gone."""
        now, patience = self.timers.clock(), self._patience
        self._patience = {}
        for proc in self.table.live():
            if proc.attached_to and proc.attached_to not in self.peers.clients:
                until = now + REATTACH_S if procfs.is_stopped(*proc.client) else patience.get(proc.pid, now)
                if now < until and procfs.is_there(*proc.client):
                    self._patience[proc.pid] = until
                else:
                    proc.attached_to = 0
                    self.deliver(proc, signal.SIGHUP)
        if self._patience:
            self.timers.after(ATTACHED_LOOK_S, self.hang_up_unclaimed)

    # ── signals ───────────────────────────────────────────────────────────────────────────────────────────

    def renice(self, proc: Proc, nice: int, by: link.CallKey, answer: bytes) -> None:
        """Set the nice value of an agent, and of its open calls, those of clients that descend from it included."""
        proc.nice = nice
        self.uplink.send(link.Mark(proc.pid, nice=nice, by=by, answer=answer))
        self.generations.renice(proc, nice)

    def deliver(self, proc: Proc, number: int, key: link.CallKey | None = None) -> None:
        """Deliver a signal. STOP and CONT act on the running generations as well, before and after."""
        if number == signal.SIGSTOP:
            self.generations.park(proc, True)
        self.uplink.send(link.SendSignal(proc.pid, number, key))
        if number == signal.SIGCONT:
            self._goes_on(proc)

    def stopped(self, message: link.ChildStopped) -> None:
        proc = self.table.get(message.pid)
        if proc is None and (under_way := self._newborn(message.pid)) is not None:
            assert under_way.newborn is not None
            under_way.newborn.stopped = message.stopped  # it is applied when the agent begins
        if proc is None or not proc.alive:
            return
        self.table.advance(proc, ProcEvent.STOP if message.stopped else ProcEvent.CONT)
        if message.stopped:
            self.generations.park(proc, True)
            self.waiters.on_change(proc)
        else:
            self._goes_on(proc)

    def _goes_on(self, proc: Proc) -> None:
        """Linux reports a STOP that is followed at once by a CONT not at all, or only in part: a call that waits for
        that stop need not wait any longer."""
        proc.continued += 1
        self.generations.park(proc, False)
        self.waiters.on_change(proc)

    def stood_still(self, proc: Proc) -> None:
        """A core has stopped decoding generations of this agent: if the agent is stopped, too, its STOP may be
        complete."""
        if proc.state is ProcState.STOPPED or proc.outside:
            self.waiters.on_change(proc)

    def is_parked(self, proc: Proc) -> bool:
        """Whether it is stopped and nothing is generated for it any more."""
        stopped = proc.halted if proc.outside else proc.state is ProcState.STOPPED
        return stopped and self.generations.stands_still(proc)

    # ── death ─────────────────────────────────────────────────────────────────────────────────────────────

    def exited(self, message: link.ChildExited) -> None:
        proc = self._known(message.pid)
        if proc is None or not proc.alive:
            return
        self._process_ended(proc, message.cpu_s)
        if message.again_s is not None:
            self.table.advance(proc, ProcEvent.FAIL)
            self.waiters.on_change(proc)
            return
        self.mail.forget(proc.pid)
        self.tokens.forget(proc)
        self.enforcer.ended(proc, message.status)
        self.budgets.leave(proc.pid, proc.budgets)
        if proc.log:
            self.logs.close(proc.log)
        if message.reason:
            self.enforcer.set_reason(proc, message.reason)
        for child in self.table.exit(proc, message.status):
            self._orphaned(child)
        if proc.outside:
            self.outside_changed()
        ppid = proc.ppid
        self.waiters.on_exit(proc, ppid)
        if ppid == INIT and proc.state is ProcState.ZOMBIE:
            self._reap(proc)

    def _process_ended(self, proc: Proc, cpu_s: float) -> None:
        """The process of an agent has ended: drop its connections, and all that was kept for them."""
        self._used(proc, cpu_s)
        for peer in self.peers.of(proc):
            self.calls.drop(peer)
        self.by_ospid.pop(proc.ospid, None)
        self.close_door(proc)
        self.close_gates(proc)
        self.generations.forget(proc)
        proc.ospid = 0

    def _used(self, proc: Proc, cpu_s: float) -> None:
        """Count the processor time of its ended process, once, whichever kernel counts it."""
        proc.cpu_s = max(proc.cpu_s, cpu_s)  # the last sample may be older, or missing
        if not proc.row[ledger.ENDED]:
            self.process_over(proc, cpu_s)
            proc.row[ledger.ENDED] = 1

    def restarted(self, message: link.ChildRestarted, fds: list[int]) -> None:
        """An agent was started again: it keeps its pid, its mailbox, its budgets and its children."""
        proc = self._known(message.pid)
        assert proc is not None
        self.table.advance(proc, ProcEvent.START)
        proc.halted, proc.denied = False, ""
        proc.row[ledger.ENDED] = 0
        proc.ospid, proc.restarts, proc.looked, proc.sampled = message.ospid, proc.restarts + 1, 0.0, 0.0
        self._connect_all(proc, fds)

    def _orphaned(self, child: Proc) -> None:
        """The parent of an agent is dead."""
        if child.ppid != INIT:
            self.table.adopt_orphan(child)
        self.uplink.send(link.Mark(child.pid, ppid=INIT))
        if child.state is ProcState.ZOMBIE:
            self._reap(child)

    def _reap(self, proc: Proc, by: link.CallKey | None = None, answer: bytes = b"") -> None:
        forgotten = self.table.reap(proc)
        self.uplink.send(link.Mark(proc.pid, reaped=True, by=by, answer=answer))
        for pid in forgotten:
            self.uplink.send(link.Forget(pid))
            self.budgets.forget(pid)
        self.logs.forget(forgotten, len(self.table.history))

    def collect(self, proc: Proc, by: link.CallKey, result: wire.Waited) -> None:
        """Give the exit status to the parent, by this call."""
        if proc.state is ProcState.ZOMBIE:
            self._reap(proc, by, wire.encode(result))


def _open(memfd: int, bell: int) -> Channel | str:
    """The channel of an agent, or a sentence about what is wrong: the agent may have overwritten its header already."""
    try:
        return Channel(memfd, bell, Side.KERNEL)
    except ProtocolError as err:
        return str(err)
