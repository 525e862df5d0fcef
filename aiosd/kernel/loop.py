"""The kernel: one thread, one epoll, no waiting for any other process.

    doorbell of an agent        → `turns`: its requests → `dispatch` → a handler in `syscalls`, or a service
    control socket              → `control`: a new client; its requests go the same way
    doorbell of a service       → `service`: its messages → replies
    link to the supervisor      → forked, stopped, exited
    timers                      → deadlines of calls, budgets, samples of memory and logs

This file only puts the parts together. Each part gets the others that it uses; no part knows the whole kernel.
"""

from __future__ import annotations

import logging
import select
import signal
import socket
import sys
from typing import TYPE_CHECKING

from aiosd.access.rules import AccessPolicy
from aiosd.budgets.price import FREE
from aiosd.config import agents_of
from aiosd.errors import WorldError
from aiosd.ipc import link
from aiosd.ipc.heartbeat import BEAT_S, beat
from aiosd.ipc.service import LLM, PROXY, TOOLBOX
from aiosd.kernel import sandboxes, spawning, syscalls
from aiosd.kernel.access import Access
from aiosd.kernel.agents import REATTACH_S, Lifecycle
from aiosd.kernel.always import LastingApprovals
from aiosd.kernel.approvals import Approvals
from aiosd.kernel.audit import Audit
from aiosd.kernel.books import Books
from aiosd.kernel.budget import Budgets
from aiosd.kernel.calls import CallTable
from aiosd.kernel.charges import Charges
from aiosd.kernel.control import Control
from aiosd.kernel.cores import Core, Cores
from aiosd.kernel.dispatch import CallHandler, Dispatcher
from aiosd.kernel.enforce import Enforcer
from aiosd.kernel.errands import Errander, ErrandPeer
from aiosd.kernel.events import Events, EventSource, Turn
from aiosd.kernel.forks import Forks
from aiosd.kernel.gates import Gates, ProxyService
from aiosd.kernel.generations import Generations
from aiosd.kernel.jobs import Jobs
from aiosd.kernel.journal import Journal
from aiosd.kernel.ledger import Ledger
from aiosd.kernel.live import Live
from aiosd.kernel.loading import Loading
from aiosd.kernel.logkeeper import LogKeeper
from aiosd.kernel.mail import Mail
from aiosd.kernel.measure import Measure
from aiosd.kernel.notices import Notices
from aiosd.kernel.outside import Outside
from aiosd.kernel.peer import AgentPeer, ClientPeer, Peer
from aiosd.kernel.peers import Peers
from aiosd.kernel.proc import Proc, ProcTable
from aiosd.kernel.routes import Routes
from aiosd.kernel.sandboxes import Sandboxes
from aiosd.kernel.service import Asker, Service, Services
from aiosd.kernel.status import StatusRequests
from aiosd.kernel.system import FdLimit, System
from aiosd.kernel.tokens import BearerTokens
from aiosd.kernel.toolfiles import FilesOfTools
from aiosd.kernel.turns import HUNG_UP, AgentTurns
from aiosd.kernel.uplink import Uplink
from aiosd.kernel.waiters import Waiters
from aiosd.logs import processlog
from aiosd.timers import Timers
from libaios import wire
from libaios.channel import Channel, Side
from libaios.stream import FrameSocket

if TYPE_CHECKING:
    from aiosd.init.records import Inheritance, SystemProcess

logger = logging.getLogger("kernel")

COMES_BACK_S = 60.0  # a client that connects again under its identity does so within this time


class Kernel:
    def __init__(self, born: Inheritance) -> None:
        self.born = born
        self.stopping = ""
        self.over = False
        self._make_floor()
        self._make_rooms()
        self._make_doors()
        self._adopt()

    # ── the parts ─────────────────────────────────────────────────────────────────────────────────────────

    def _make_floor(self) -> None:
        """Make the parts that use no other part."""
        born = self.born
        self.timers = Timers()
        self.events = Events(self.timers)
        self.jobs = Jobs(self.timers.clock)
        self.table = ProcTable(born.settings.keep_dead)
        self.calls = CallTable(Peers(), self.events, self.timers)
        self.uplink = Uplink(_socket_of(born.link), self.events, self._on_supervisor)
        self.ledger = Ledger(born.ledger)
        self.budgets = Budgets(self.ledger, self.timers, born.settings.budgets, born.settings.soft_limit / 100)
        self.journal = Journal(born.journal, self._is_alive)
        self.mail = Mail(self.journal, self.calls)
        passages = born.settings.passages
        self.gates = Gates(_socket_of(passages.kernel) if passages is not None else None, self.timers, born.epoch > 1)

    def _make_rooms(self) -> None:
        """Make the parts that manage agents and services."""
        born = self.born
        self.services, self.cores = Services(), Cores()
        self.live = Live(born.settings, self.uplink, self.cores, self._rule)
        self.system = System(born, self.services)
        settings = born.settings
        places = sandboxes.folder(settings.home.data)
        self.sandboxes = Sandboxes(
            settings.sandbox, settings.groups, born.offer, places, settings.strict, settings.sandbox_chosen
        )
        for line in (*self.sandboxes.warnings(), *settings.access_warnings):
            logger.warning("%s", line)
        self.approvals = Approvals(
            settings.access,
            self.table,
            self.calls,
            LastingApprovals(settings.home.data / "always.json"),
            Audit(settings.home.data / "audit.jsonl"),
            born.boot,
            born.epoch > 1,
        )
        self.rights = Access(self.table, self.system.pids, self.approvals, self._raised)
        self.waiters = Waiters(self.table, self.calls, self.rights)
        routes = Routes(self.cores.find, settings.routes)
        self.generations = Generations(self.calls, self.table, self.cores, routes, self.live.schedule)
        self.enforcer = Enforcer(self.table, self.uplink, self.timers, self._deliver)
        self.logs = LogKeeper(settings.home.logs, settings.log_size, settings.log_keep, settings.keep_dead)
        self.measure = Measure(
            self.table,
            self.budgets,
            self.timers,
            self.jobs,
            self.enforcer.exceeded,
            Forks(self.table, self.enforcer.crowded),
            self.logs,
            sandboxes.folder(settings.home.data),
        )
        self.handlers: dict[int, CallHandler] = {}
        self.charges = Charges(self.services, self.enforcer.refused)
        choose = {LLM: self.generations.choose, "toolbox": self.charges.tool, "store": self.charges.store}
        asker = Asker(self.services, self.calls, self.generations.caller_of, choose)
        self.dispatcher = Dispatcher(self.calls, self.rights, asker, self.handlers, born.memo.get)
        self.turns = AgentTurns(self.calls, self.events, self.timers, self.dispatcher, self.generations.resume_streams)
        self.agents = Lifecycle(
            self.table,
            self.calls,
            self.turns,
            self.uplink,
            self.timers,
            self.ledger,
            self.budgets,
            self.enforcer,
            self.generations,
            self.waiters,
            self.mail,
            self.logs,
            BearerTokens(settings.door),
            self.sandboxes,
        )
        self.tool_files = FilesOfTools(bool(settings.tools), self.timers, told=born.ready)
        self.outside = Outside(settings.home.data / "tokens.json", self.agents, self.sandboxes)
        self.agents.contents = lambda: self.approvals.policy.contents()
        self.generations.spent, self.generations.refused = self.enforcer.spent, self.enforcer.refused
        self.generations.stood_still = self.agents.stood_still
        self.budgets.time_is_up = self.enforcer.time_is_up
        self.budgets.near = Notices(self.table, self.mail).near
        self.agents.process_begun, self.agents.process_over = self.measure.begun, self.measure.ended
        self.waiters.collect = self.agents.collect
        self.calls.offended, self.calls.gone = self._offended, self._gone

    def _make_doors(self) -> None:
        """Make the parts that receive requests, and those that the handlers of the kernel's own calls use."""
        born = self.born
        self.control = Control(
            _socket_of(born.listener),
            born.boot,
            self.calls,
            self.events,
            self.timers,
            self.dispatcher,
            self.agents.by_ospid,
            lambda: self.descriptors,
            self._services_by_ospid,
            self.generations.resume_streams,
            self.generations.joined,
            self.agents.hang_up,
            self.agents.tokens.bearer,
        )
        self.descriptors = FdLimit(
            lambda: len(self.agents.by_ospid) + len(self.agents.forks),
            lambda: self.control.descriptors() + self.gates.descriptors(),
        )
        self.agents.open_door, self.agents.close_door = self.control.open_door, self.control.close_door
        self.agents.open_gates, self.agents.close_gates = self.gates.open, self.gates.close
        books = Books(
            self.table,
            self.calls,
            self.services,
            self.waiters,
            self.mail,
            self.ledger,
            self.budgets,
            self.agents.by_ospid,
            self.control.strangers,
            self.system,
        )
        self.status = StatusRequests(
            born,
            self.calls,
            self.table,
            self.services,
            books,
            self.jobs,
            self.descriptors,
            lambda: self.live.settings,
            self._phase,
            self.agents.is_parked,
            self.agents.listed.problems,
            self.sandboxes,
            self.approvals,
            self.system,
            self.generations.routes,
        )
        self.loading = Loading(
            self.services,
            self.timers,
            born.ready,
            self._on_ready,
            self.status.part,
            self._live_peers,
            self.generations.charge,
            self.calls,
            self.approvals,
        )
        self.handlers |= syscalls.bound(
            syscalls.ProcessCalls(
                self.table,
                self.agents,
                self.sandboxes,
                self.waiters,
                self.rights,
                self.system,
                self.descriptors,
                self.cores,
                self.measure,
                self.jobs,
            ),
            syscalls.MessageCalls(self.table, self.mail, self.calls, self.services),
            syscalls.ModelCalls(self.generations),
            syscalls.TokenCalls(self.agents, self.outside),
            syscalls.SystemCalls(self.status, lambda: self.uplink.send(link.Shutdown()), self.live.change),
            syscalls.AccessCalls(self.approvals),
            syscalls.ToolCalls(self.approvals, self.charges, self.services),
        )

    # ── birth of a successor ──────────────────────────────────────────────────────────────────────────────

    def _adopt(self) -> None:
        """Take over the agents and services of a dead kernel. The first kernel has nothing to take over."""
        for process in self.born.services:
            service = self._make_service(process)
            self.services.add(service)
            if process.ospid:
                self._connect(service, process.ospid, process.deaths, process.memfd, process.kernel_bell)
        self.agents.adopt(self.born.agents)
        if self.born.ready:  # the agents that the settings list have been started
            self.agents.listed.expect(agents_of(self.born.settings))
            self.outside.restore()
        self.logs.start({agent.pid for agent in self.born.agents}, len(self.table.history))
        self.mail.adopt({proc.pid: proc for proc in self.table.live()})
        self.budgets.adopt({proc.pid for proc in self.table} | set(self.table.history))
        if self.born.epoch > 1:
            self.timers.after(REATTACH_S, self.agents.hang_up_unclaimed)

    def _make_service(self, process: SystemProcess) -> Service:
        record = process.service
        if record.kind == TOOLBOX:
            return self._make_toolbox(process)
        if record.kind == PROXY:
            return self._make_proxy(process)
        if record.kind != LLM:
            return Service(*self._of_all(process))
        core = Core(
            name=record.name,
            kind=record.kind,
            title=record.shown,
            calls_of_all=self.calls,
            owner=self.loading,
            awaited=record.awaited,
            pid=process.pid,
            model=record.argument.name,
            path=record.argument.path,
            default=not self.cores.by_model,
            listener=self.generations,
            vectors_only=record.argument.vectors_only,
            price=record.argument.price or (None if record.argument.url else FREE),
        )
        self.cores.add(core)
        return core

    def _of_all(self, process: SystemProcess) -> tuple[str, str, str, CallTable, Loading, bool, int]:
        """The first arguments of every service's side."""
        record = process.service
        return record.name, record.kind, record.shown, self.calls, self.loading, record.awaited, process.pid

    def _make_proxy(self, process: SystemProcess) -> Service:
        return ProxyService(
            *self._of_all(process),
            gates=self.gates,
            audit=self.approvals.audit,
            agent=self.table.get,
            measure=self.measure,
        )

    def _make_toolbox(self, process: SystemProcess) -> Service:
        toolbox = Errander(
            *self._of_all(process),
            dispatch=self.dispatcher.dispatch,
            measure=self.measure,
            tool_files=self.tool_files,
        )
        self.calls.peers.others.append(ErrandPeer(toolbox, None, toolbox.errands))
        return toolbox

    def _connect(self, service: Service, ospid: int, deaths: int, memfd: int, bell: int) -> None:
        channel = Channel(memfd, bell, Side.AGENT)
        service.forked(ospid, deaths, channel)
        source: EventSource

        def serve() -> None:
            if service.channel is channel:
                self.events.move(source, Turn.HUNGRY if service.receive() else Turn.AWAKE)

        def on_bell(mask: int) -> None:
            if mask & HUNG_UP:
                channel.drain_bell()
            else:
                channel.count_ring()
            serve()

        def on_submitted() -> None:
            if source.turn is Turn.ASLEEP:
                self.events.move(source, Turn.AWAKE)

        # Each ring is an event. The service rings once for each time that the kernel announced sleep, so its bell is
        # never full.
        events = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET
        source = self.events.watch(channel.fileno(), on_bell, events, serve=serve, channel=channel, answers=True)
        service.source = source
        service.on_submitted = on_submitted
        self.events.move(source, Turn.HUNGRY)

    def _rule(self, policy: AccessPolicy) -> None:
        """Put these rules in force."""
        self.approvals.change(policy)
        self._send_to_services(link.Rules(policy))

    def _raised(self, args: wire.Spawn, parent: Proc) -> str:
        return "; ".join(filter(None, (self.sandboxes.raised(args, parent), spawning.raised(args, parent))))

    def _is_alive(self, pid: int) -> bool:
        proc = self.table.get(pid)
        return proc is not None and proc.alive

    # ── loop ──────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> int:
        self._beat()
        self.measure.start()
        events, timers, jobs, loading = self.events, self.timers, self.jobs, self.loading
        while not loading.error and not self.over:
            events.round(idle=not jobs.waiting)
            if jobs.waiting:
                jobs.run()
            timers.run_due()
        if self.loading.error:
            self.uplink.send(link.Shutdown(error=self.loading.error))
        return 0

    def _beat(self) -> None:
        self.timers.after(BEAT_S, self._beat)
        self.turns.on_beat()
        beat(self.born.heartbeat)

    # ── between the parts ─────────────────────────────────────────────────────────────────────────────────

    def _deliver(self, proc: Proc, number: int) -> None:
        self.agents.deliver(proc, number)

    def _offended(self, peer: AgentPeer, why: str) -> None:
        if peer.proc is not None:
            self.agents.offended(peer.proc, why)

    def _gone(self, peer: Peer) -> None:
        self.generations.left(peer)
        for service in self.services:
            service.copies.forget(peer)
        if isinstance(peer, ClientPeer):
            self.control.forget(peer)
            if peer.id:
                self.timers.after(COMES_BACK_S, lambda: self._client_gone(peer.id))

    def _client_gone(self, client: int) -> None:
        if client not in self.calls.peers.clients:
            self._send_to_services(link.PeerGone(client))

    def _live_peers(self) -> list[int]:
        others = (peer.id for peer in self.calls.peers.others)
        return [*(proc.pid for proc in self.table.live()), *self.calls.peers.clients, *others]

    def _services_by_ospid(self) -> dict[int, str]:
        return {service.ospid: service.name for service in self.services if service.channel is not None}

    def _phase(self) -> str:
        return "stopping" if self.stopping else "ready" if self.loading.ready else "loading"

    def _on_ready(self) -> None:
        self.outside.restore()
        self.agents.start_with_system(agents_of(self.live.settings))
        self.agents.listed.when_over(lambda: self.tool_files.when_over(self._report_ready))

    def _report_ready(self) -> None:
        names = ", ".join(self.cores.by_model)
        notes = [*self.sandboxes.notes(), *self.tool_files.notes()]
        notes += [f"agent {name} {problem}" for name, problem in self.agents.listed.problems().items()]
        self.uplink.send(link.Ready(f"aiosd: ready ({names}; {self.live.settings.home.root})", notes))

    # ── supervisor ────────────────────────────────────────────────────────────────────────────────────────

    def _on_supervisor(self, message: link.FromSupervisor, fds: list[int]) -> None:
        match message:
            case link.Forked():
                self.agents.forked(message, fds)
            case link.Forking():
                self.agents.forking(message, fds)
            case link.ForkFailed():
                self.agents.fork_failed(message, fds)
            case link.ChildStopped():
                self.agents.stopped(message)
            case link.ChildExited():
                self.agents.exited(message)
                if message.again_s is None:  # it is not started again
                    self._send_to_services(link.PeerGone(message.pid))
            case link.ChildRestarted():
                self.agents.restarted(message, fds)
            case link.ServiceForked():
                service = self.services.by_name[message.name]
                service.pid = message.pid
                self._connect(service, message.ospid, message.deaths, *fds)
            case link.ServiceDied():
                self._service_died(self.services.by_name[message.name], message.reason)
            case link.Templates():
                self.system.templates = message.shown
            case link.McpServers():
                self.system.servers = message.shown
            case link.Reread():
                self.live.reread(message)
            case link.Stop():
                self.stopping = message.reason
                self.outside.save()
                self.agents.system_stops()
                self.over = message.last

    def _send_to_services(self, message: link.ToService) -> None:
        """Send to all services but the cores, which get such messages from `generations`."""
        for service in self.services:
            if service.kind != LLM:
                service.send(message)

    def _service_died(self, service: Service, reason: str) -> None:
        while service.receive():  # messages that it sent before its end
            pass
        if service.source is not None:
            self.events.unwatch(service.source)
            service.source = None
        service.died(reason)
        self.loading.on_died(service, reason)


def _socket_of(fd: int) -> socket.socket:
    sock = socket.socket(fileno=fd)
    sock.setblocking(False)
    return sock


def main(born: Inheritance) -> int:
    """Entry of the kernel process, forked by the supervisor."""
    processlog.setup("kernel", born.settings.log_level)
    for number in (signal.SIGINT, signal.SIGTERM):  # only the supervisor's order or its end ends the kernel
        signal.signal(number, signal.SIG_IGN)
    try:
        kernel = Kernel(born)
    except WorldError as err:  # the data of a dead kernel cannot be read: no successor could go on
        shutdown = link.Shutdown(error=f"the kernel cannot start: {err}")
        FrameSocket(_socket_of(born.link)).send(link.encode(shutdown))
        return 1
    code = kernel.run()
    sys.stderr.flush()
    return code
