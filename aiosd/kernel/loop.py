"""The kernel loop: one thread, one epoll, no waiting for anybody.

    doorbell of an agent        → its requests → `dispatch` → handler in `syscalls` → reply, now or later
    control socket              → a new client; its requests go the same way
    doorbell of a core          → what the model brought (`cores`) → replies
    link to the supervisor      → forked, stopped, exited
    timers                      → deadlines of calls, budgets, samples of memory and logs

Theory of operation. A handler either returns the body of the reply or PENDING; a pending call sits in its
peer's `calls` and on one list that something else will look at (a core's calls, a mailbox's receivers, the
waiters for an exit). `finish` and `fail` close a call, send its only final reply and take it off that list.
When a peer goes, `drop_peer` closes all it had open. So every request gets exactly one final reply, and nothing
waits for a peer that is gone.

An agent can make no exception travel up here: what it sends is decoded against `wire.ARGS` at one place, a
frame or a ring header that is nonsense ends that agent with EPROTO, and the `except` in `dispatch` turns a bug
of ours into EIO for the caller and a traceback in the log.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from aiosd import link, log, procfs
from aiosd.heartbeat import BEAT_S, beat
from aiosd.kernel import budget as budgets
from aiosd.kernel import syscalls
from aiosd.kernel.budget import Budget
from aiosd.kernel.cores import Core, Cores
from aiosd.kernel.explain import explain
from aiosd.kernel.generations import Generations
from aiosd.kernel.logindex import LogIndex
from aiosd.kernel.peer import (
    MAX_OPEN_CALLS,
    OUTBOX_MAX,
    AgentPeer,
    Call,
    ClientPeer,
    Peer,
    failure,
    reply,
)
from aiosd.kernel.proc import INIT, Event, Proc, ProcTable, State
from aiosd.kernel.status import StatusRequests
from aiosd.kernel.waiters import Waiters
from aiosd.timers import Timers
from libaios import wire
from libaios.channel import Channel, Side
from libaios.ring import ProtocolError
from libaios.stream import FrameSocket

if TYPE_CHECKING:
    from aiosd.supervisor import Agent, Inheritance

logger = logging.getLogger("kernel")

FRAMES_PER_TURN = 64  # of one peer, before the others have their turn
LOG_INDEX_S = 1.0
REATTACH_S = 10.0  # how long clients have to come back to a new kernel before their agents get HUP
PENDING = syscalls.PENDING


class Kernel:
    def __init__(self, born: Inheritance) -> None:
        self.settings = born.settings
        self.boot = born.boot
        self.born = born
        self.timers = Timers()
        self.epoll = select.epoll()
        self.on_event: dict[int, Callable[[int], None]] = {}  # by descriptor
        self.hungry: dict[int, Callable[[int], None]] = {}  # has more to read; by descriptor
        # who is there
        self.table = ProcTable(self.settings.keep_dead)
        self.clients: dict[int, ClientPeer] = {}  # by id, once they have said Hello
        self.by_ospid: dict[int, Proc] = {}
        self.forks: dict[link.Key, tuple[Call, link.Fork]] = {}  # spawns under way
        self.waiters = Waiters(self)
        self.generations = Generations(self)
        self.cores = Cores(self.generations)
        self.log_index = LogIndex()
        self.stopping = ""
        self.over = False
        self.ready = False
        self.counters = {"calls": 0, "refused": 0, "offenders": 0, "clients": 0, "agents": 0}
        self.status = StatusRequests(self)
        # to the outside
        self.supervisor = FrameSocket(_socket_of(born.link))
        self.listener = _socket_of(born.listener)
        self._watch(self.supervisor.fileno(), self._on_supervisor)
        self._watch(self.listener.fileno(), self._on_connect)
        self._adopt()

    # ── loop ──────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> int:
        self._beat()
        self.timers.after(LOG_INDEX_S, self._index_logs)
        self.timers.after(budgets.SAMPLE_S, self._sample_memory)
        while not self.generations.load_error and not self.over:
            timeout = 0.0 if self.hungry else self.timers.until_next()
            for fd, mask in self.epoll.poll(timeout):
                act = self.on_event.get(fd)
                if act is not None:  # else: closed by an earlier event of this turn
                    act(mask)
            for fd, act in list(self.hungry.items()):
                del self.hungry[fd]
                act(select.EPOLLIN)
            self.timers.run_due()
        if self.generations.load_error:
            self.to_supervisor(link.Shutdown(error=self.generations.load_error))
        return 0

    def _beat(self) -> None:
        self.timers.after(BEAT_S, self._beat)
        beat(self.born.heartbeat)

    def _watch(self, fd: int, act: Callable[[int], None]) -> None:
        self.on_event[fd] = act
        self.epoll.register(fd, select.EPOLLIN)

    def _unwatch(self, fd: int) -> None:
        if self.on_event.pop(fd, None) is not None:
            self.epoll.unregister(fd)
        self.hungry.pop(fd, None)

    def _watch_output(self, sock: FrameSocket) -> None:
        self.epoll.modify(sock.fileno(), select.EPOLLIN | (select.EPOLLOUT if sock.pending else 0))

    # ── birth of a successor ──────────────────────────────────────────────────────────────────────────────

    def _adopt(self) -> None:
        """Take over what a dead kernel served. After the first boot there is nothing to take over."""
        for number, model in enumerate(self.settings.models):
            known = next((core for core in self.born.cores if core.model.name == model.name), None)
            core = Core(model.name, str(model.path), default=number == 0, pid=0)
            self.cores.by_name[model.name] = core
            if known is not None:
                core.pid = known.pid
                self._connect_core(core, known.ospid, known.deaths, known.memfd, known.kernel_bell)
        for agent in self.born.agents:
            self._adopt_agent(agent)
        live = [proc.pid for proc in self.table.live()]
        if self.born.cores:
            self.ready = True
            for core in self.cores:
                if core.channel is not None:
                    self.cores.adopted(core, live)
            self.timers.after(REATTACH_S, self._hang_up_unclaimed)

    def _adopt_agent(self, agent: Agent) -> None:
        proc = self._new_proc(agent.spec, agent.pid, agent.ospid, agent.pgid, agent.started, agent.log)
        proc.ppid, proc.nice, proc.budget, proc.reason = agent.ppid, agent.nice, agent.budget, agent.reason
        proc.reaped_by = agent.reaped_by
        self.table.add(proc)
        if agent.status is None:
            self._connect_agent(proc, agent.memfd, agent.bell)
            if agent.stopped:
                self.table.advance(proc, Event.STOP)
            return
        self.table.exit(proc, agent.status)
        if agent.reaped:
            self._reap(proc)

    def _hang_up_unclaimed(self) -> None:
        for proc in self.table.live():
            if proc.attached_to and proc.attached_to not in self.clients:
                self.deliver(proc, signal.SIGHUP)

    # ── requests ──────────────────────────────────────────────────────────────────────────────────────────

    def _on_agent(self, peer: AgentPeer, mask: int) -> None:
        channel = peer.channel
        try:
            if channel.outbox_bytes and channel.pump():
                self.generations.resume_streams(peer)
            for payload in channel.receive(FRAMES_PER_TURN):
                self._dispatch(peer, payload)
        except ProtocolError as err:
            self.offend(peer, str(err))
            return
        if peer.proc is None or peer.proc.peer is not peer:
            return  # dropped while its requests were handled
        if channel.more:
            self.hungry[channel.fileno()] = self.on_event[channel.fileno()]
        elif channel.hung_up:
            self.drop_peer(peer)

    def _dispatch(self, peer: Peer, payload: bytes) -> None:
        try:
            request = wire.decode_request(payload)
        except msgspec.MsgspecError as err:
            raise ProtocolError(f"a frame that is no request: {err}") from None
        if request.id in peer.calls:
            self._refuse(peer, request.id, errno.EINVAL, f"call id {request.id} is in use")
            return
        self.counters["calls"] += 1
        if peer.proc is not None:
            peer.proc.calls += 1
        call = Call(peer, request.id, request.sys)
        peer.calls[request.id] = call
        try:
            body = self._execute(call, request)
        except OSError as err:
            self.fail(call, err.errno or errno.EIO, err.strerror or str(err))
        except Exception:
            logger.exception("system call %d of %d: a bug of the kernel", request.sys, peer.id)
            self.fail(call, errno.EIO, "the kernel made a mistake; its log has the details")
        else:
            if body is not PENDING:
                self.finish(call, body)

    def _execute(self, call: Call, request: wire.Request) -> Any:
        handler = syscalls.SYSCALLS.get(request.sys)
        if handler is None:
            logger.warning("pid %d: unknown system call %d", call.peer.id, request.sys)
            raise wire.error(errno.ENOSYS, f"there is no system call {request.sys}")
        if len(call.peer.calls) > MAX_OPEN_CALLS:
            raise wire.error(errno.EAGAIN, f"more than {MAX_OPEN_CALLS} calls open")
        decode = wire.decode_args.get(request.sys)
        if decode is None:
            return handler(self, call, None)
        try:
            args = decode(request.args)
        except msgspec.MsgspecError as err:
            raise wire.error(errno.EINVAL, explain(err, wire.ARGS[request.sys])) from None
        return handler(self, call, args)

    def _refuse(self, peer: Peer, call_id: int, code: int, message: str) -> None:
        self.counters["refused"] += 1
        self._send(peer, failure(call_id, code, message))

    # ── replies ───────────────────────────────────────────────────────────────────────────────────────────

    def finish(self, call: Call, body: Any) -> None:
        """Close a call with its result."""
        if self._close_call(call):
            self._send(call.peer, reply(call.id, body))

    def fail(self, call: Call, code: int, message: str) -> None:
        """Close a call with an error."""
        if self._close_call(call):
            self.counters["refused"] += 1
            self._send(call.peer, failure(call.id, code, message))

    def _close_call(self, call: Call) -> bool:
        """Take a call off all lists; False when it was closed before."""
        if call.peer.calls.get(call.id) is not call:
            return False
        del call.peer.calls[call.id]
        if call.timer is not None:
            call.timer.cancel()
        if call.forget is not None:
            forget, call.forget = call.forget, None
            forget()
        return True

    def set_timeout(self, call: Call, seconds: float | None, what: str) -> None:
        if seconds is not None:
            message = f"no {what} within {seconds:g} s"
            call.timer = self.timers.after(seconds, lambda: self.fail(call, errno.ETIMEDOUT, message))

    def send_piece(self, call: Call, offset: int, piece: wire.Piece) -> None:
        self._send(call.peer, wire.encode(wire.Reply(call.id, 0, True, offset, wire.raw(piece))))

    def _send(self, peer: Peer, payload: bytes) -> None:
        try:
            peer.send(payload)
            if peer.outbox_bytes > OUTBOX_MAX:
                raise ProtocolError(f"does not read its replies ({peer.outbox_bytes} bytes wait)")
        except ProtocolError as err:
            self.offend(peer, str(err))
        except OSError:
            self.drop_peer(peer)
        else:
            if isinstance(peer, ClientPeer) and peer.socket.pending:
                self._watch_output(peer.socket)

    # ── agents ────────────────────────────────────────────────────────────────────────────────────────────

    def _new_proc(
        self, spec: link.Fork, pid: int, ospid: int, pgid: int, started: float, log_path: str
    ) -> Proc:
        parent = self.table.get(spec.ppid)
        proc = Proc(
            pid=pid,
            ospid=ospid,
            pgid=pgid,
            uid=spec.uid,
            name=spec.name,
            command=" ".join([spec.target, *spec.args]),
            group=spec.group,
            log=log_path,
            started=started,
            attached_to=spec.key[0] if spec.attached else 0,
            ppid=spec.ppid if parent is not None and parent.alive else INIT,
            nice=spec.nice,
        )
        if parent is not None:
            proc.budgets.extend(parent.budgets)
        if spec.limits != wire.Limits():
            proc.budgets.append(Budget(pid, spec.limits))
            if spec.limits.time_s is not None:
                left_s = started + spec.limits.time_s - time.time()
                self.timers.after(max(0.0, left_s), lambda: self._time_is_up(proc))
        self.counters["agents"] += 1
        return proc

    def _connect_agent(self, proc: Proc, memfd: int, bell: int) -> None:
        peer = AgentPeer(proc, Channel(memfd, bell, Side.KERNEL))
        proc.peer = peer
        self.by_ospid[proc.ospid] = proc
        self._watch(peer.fileno(), lambda mask: self._on_agent(peer, mask))
        # It may have rung before we listened.
        self.hungry[peer.fileno()] = self.on_event[peer.fileno()]

    def offend(self, peer: Peer, why: str) -> None:
        """The peer broke the protocol: end it, and say why where aios-inspect shows it."""
        self.counters["offenders"] += 1
        logger.warning("%s %d: EPROTO: %s", "agent" if isinstance(peer, AgentPeer) else "client", peer.id, why)
        if isinstance(peer, AgentPeer) and peer.proc is not None and peer.proc.alive:
            self.set_reason(peer.proc, f"EPROTO: {why}")
            self.to_supervisor(link.SendSignal(peer.proc.pid, signal.SIGKILL))
        self.drop_peer(peer)

    def drop_peer(self, peer: Peer) -> None:
        """The connection is gone: close whatever it had open, without replies."""
        for call in list(peer.calls.values()):
            self._close_call(call)
        fd = peer.fileno()
        if fd in self.on_event:
            self._unwatch(fd)
            peer.close()
        if isinstance(peer, AgentPeer):
            if peer.proc is not None and peer.proc.peer is peer:
                peer.proc.peer = None
        elif self.clients.get(peer.id) is peer:
            del self.clients[peer.id]
            self._hang_up(peer.id)

    def _hang_up(self, client: int) -> None:
        """A terminal's command ended: the agents it was attached to get HUP, as a shell's jobs would."""
        if self.stopping:
            return
        for proc in self.table.live():
            if proc.attached_to == client:
                self.deliver(proc, signal.SIGHUP)

    def renice(self, proc: Proc, nice: int) -> None:
        proc.nice = nice
        self.to_supervisor(link.Mark(proc.pid, nice=nice))

    def set_reason(self, proc: Proc, reason: str) -> None:
        if not proc.reason:
            proc.reason = reason
            self.to_supervisor(link.Mark(proc.pid, reason=reason))

    def deliver(self, proc: Proc, number: int, key: link.Key | None = None) -> None:
        """Deliver a signal. STOP and CONT act on the running generations as well, before and after."""
        if number == signal.SIGSTOP:
            self.generations.park(proc, True)
        self.to_supervisor(link.SendSignal(proc.pid, number, key))

    def _exited(self, proc: Proc, status: int, reason: str) -> None:
        if proc.peer is not None:
            self.drop_peer(proc.peer)
        self.by_ospid.pop(proc.ospid, None)
        self.generations.unpark_dead(proc)
        proc.mailbox.clear()
        proc.mailbox_bytes = 0
        if reason:
            self.set_reason(proc, reason)
        for child in self.table.exit(proc, status):
            self.to_supervisor(link.Mark(child.pid, ppid=INIT))
            if child.state is State.ZOMBIE:
                self._reap(child)
        self.waiters.on_exit(proc)
        if proc.ppid == INIT and proc.state is State.ZOMBIE:
            self._reap(proc)

    def _reap(self, proc: Proc) -> None:
        forgotten = self.table.reap(proc)
        self.to_supervisor(link.Mark(proc.pid, reaped=True, reaped_by=proc.reaped_by))
        for pid in forgotten:
            self.to_supervisor(link.Forget(pid))

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
        owner = self.table.get(budget.owner)
        if owner is not None and not owner.budget:
            owner.budget = which
            self.to_supervisor(link.Mark(owner.pid, budget=which))
            self.set_reason(owner, budgets.describe(budget))

    def end_budget(self, budget: Budget, number: int = signal.SIGTERM) -> None:
        """End the owner and all that share its budget: TERM, and KILL after a grace."""
        victims = [proc for proc in self.table.live() if budget in proc.budgets]
        for proc in victims:
            self.deliver(proc, number)
            if number == signal.SIGTERM:
                self.deliver(proc, signal.SIGCONT)
        if victims and number != signal.SIGKILL:
            self.timers.after(budgets.GRACE_S, lambda: self.end_budget(budget, signal.SIGKILL))

    def _time_is_up(self, proc: Proc) -> None:
        if proc.alive:
            budget = next(budget for budget in proc.budgets if budget.owner == proc.pid)
            self.reached(budget, "time")
            self.end_budget(budget)

    def _sample_memory(self) -> None:
        """PSS of agents: of all with a memory budget each time, of a few others in turn."""
        self.timers.after(budgets.SAMPLE_S, self._sample_memory)
        live = self.table.live()
        limited = [proc for proc in live if any(b.limits.memory_bytes is not None for b in proc.budgets)]
        others = sorted((proc for proc in live if proc not in limited), key=lambda proc: proc.sampled)[:16]
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
        for proc in [proc for proc in procs if proc.alive and not proc.sampled][:16]:
            self._sample(proc)

    def _index_logs(self) -> None:
        self.timers.after(LOG_INDEX_S, self._index_logs)
        for proc in self.table.live():
            if proc.log:
                self.log_index.sample(proc.log)

    # ── supervisor ────────────────────────────────────────────────────────────────────────────────────────

    def to_supervisor(self, message: link.ToSupervisor, fds: tuple[int, ...] = ()) -> None:
        self.supervisor.send(link.encode(message), fds)
        if self.supervisor.pending:
            self._watch_output(self.supervisor)

    def _on_supervisor(self, mask: int) -> None:
        try:
            self.supervisor.flush()
            frames = self.supervisor.receive()
        except (EOFError, OSError):
            os._exit(1)  # the supervisor is gone, and with it the system
        for payload, fds in frames:
            self._on_supervisor_message(link.decode_from_supervisor(payload), fds)
        self._watch_output(self.supervisor)

    def _on_supervisor_message(self, message: link.FromSupervisor, fds: list[int]) -> None:
        match message:
            case link.Forked():
                self._forked(message, fds)
            case link.ForkFailed():
                call, _ = self.forks.pop(message.key)
                self.fail(call, message.errno, message.message)
            case link.ChildStopped():
                self._child_stopped(message)
            case link.ChildExited():
                proc = self.table.get(message.pid)
                if proc is not None:
                    self._exited(proc, message.status, message.reason)
            case link.CoreForked():
                core = self.cores.by_name[message.name]
                core.pid = message.pid
                self._connect_core(core, message.ospid, message.deaths, *fds)
            case link.CoreDied():
                self._core_died(self.cores.by_name[message.name], message.reason)
            case link.Stop():
                self.stopping = message.reason
                self.over = message.last

    def fork(self, call: Call, spec: link.Fork, fds: tuple[int, ...]) -> None:
        self.forks[call.key] = (call, spec)
        self.to_supervisor(spec, fds)

    def _forked(self, message: link.Forked, fds: list[int]) -> None:
        call, spec = self.forks.pop(message.key)
        proc = self.table.find(message.pid)
        if proc is None:
            proc = self._new_proc(spec, message.pid, message.ospid, message.pgid, message.started, message.log)
            self.table.add(proc)
            self._connect_agent(proc, *fds)
        self.finish(call, wire.Spawned(proc.pid, proc.log))
        if proc.attached_to and proc.attached_to not in self.clients:
            self.deliver(proc, signal.SIGHUP)  # the client went while we forked

    def _child_stopped(self, message: link.ChildStopped) -> None:
        proc = self.table.get(message.pid)
        if proc is None or not proc.alive:
            return
        self.table.advance(proc, Event.STOP if message.stopped else Event.CONT)
        self.generations.park(proc, message.stopped)
        self.waiters.on_stop(proc)

    # ── cores ─────────────────────────────────────────────────────────────────────────────────────────────

    def _connect_core(self, core: Core, ospid: int, deaths: int, memfd: int, bell: int) -> None:
        channel = Channel(memfd, bell, Side.AGENT)
        self.cores.forked(core, ospid, deaths, channel)
        fd = channel.fileno()
        self._watch(fd, lambda mask: self._on_core(core, channel))
        self.hungry[fd] = self.on_event[fd]

    def _on_core(self, core: Core, channel: Channel) -> None:
        if core.channel is channel and self.cores.receive(core):
            self.hungry[channel.fileno()] = self.on_event[channel.fileno()]

    def _core_died(self, core: Core, reason: str) -> None:
        if core.channel is not None:
            self._on_core(core, core.channel)  # its last words
            self._unwatch(core.channel.fileno())
        self.cores.died(core, reason)

    def core_loaded(self) -> None:
        """Every time a core is ready; the first time that all are, the system is."""
        if not self.ready and all(core.state == "ready" for core in self.cores):
            self.ready = True
            names = ", ".join(core.name for core in self.cores)
            self.to_supervisor(link.Ready(f"aiosd: ready ({names}; {self.settings.home.root})"))

    # ── clients ───────────────────────────────────────────────────────────────────────────────────────────

    def _on_connect(self, mask: int) -> None:
        try:
            sock, _ = self.listener.accept()
        except OSError as err:  # out of descriptors, or it left before we came
            logger.warning("control socket: %s", err)
            return
        sock.setblocking(False)
        ospid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid not in (os.getuid(), 0):
            logger.warning("control socket: uid %d refused", uid)
            sock.close()
            return
        peer = ClientPeer(FrameSocket(sock), uid, ospid, self._agent_above(ospid))
        self.counters["clients"] += 1
        self._watch(peer.fileno(), lambda mask: self._on_client(peer, mask))

    def _agent_above(self, ospid: int) -> Proc | None:
        """The agent that a client descends from, if any: its rights are the client's."""
        for _ in range(64):
            if ospid in self.by_ospid:
                return self.by_ospid[ospid]
            stat = procfs.read_stat(ospid)
            if stat is None or stat.ppid <= 1:
                return None
            ospid = stat.ppid
        return None

    def _on_client(self, peer: ClientPeer, mask: int) -> None:
        try:
            if peer.socket.flush():
                self.generations.resume_streams(peer)
            for payload, fds in peer.socket.receive():
                peer.fds = fds
                try:
                    if peer.welcome:
                        self._dispatch(peer, payload)
                    else:
                        self._greet(peer, payload)
                finally:
                    for fd in fds:
                        os.close(fd)
                    peer.fds = []
        except ProtocolError as err:
            self.offend(peer, str(err))
        except (EOFError, OSError):
            self.drop_peer(peer)
        else:
            if peer.fileno() in self.on_event:
                self._watch_output(peer.socket)

    def _greet(self, peer: ClientPeer, payload: bytes) -> None:
        try:
            hello = msgspec.msgpack.decode(payload, type=wire.Hello)
        except msgspec.MsgspecError as err:
            raise ProtocolError(f"no Hello: {err}") from None
        if hello.version != wire.VERSION:
            message = f"version {hello.version} of the protocol; this aiosd speaks {wire.VERSION}"
            peer.send(failure(0, errno.EPROTONOSUPPORT, message))
            raise ProtocolError(message)
        ident = hello.client if hello.boot == self.boot and hello.client else _new_client_id()
        if -ident in self.clients:
            raise ProtocolError("an identity that is in use")
        peer.id = -ident
        peer.welcome = True
        self.clients[peer.id] = peer
        from aiosd import __version__

        peer.send(wire.encode(wire.Welcome(wire.VERSION, self.boot, ident, __version__)))


def _new_client_id() -> int:
    """Random, so that nobody can claim the identity of a client that is about to reconnect."""
    return int.from_bytes(os.urandom(6), "little") + 1


def _socket_of(fd: int) -> socket.socket:
    sock = socket.socket(fileno=fd)
    sock.setblocking(False)
    return sock


def main(born: Inheritance) -> int:
    """Entry of the kernel process, forked by the supervisor."""
    log.setup("kernel", born.settings.log_level)
    for number in (signal.SIGINT, signal.SIGTERM):  # it ends when the supervisor says so, or is gone
        signal.signal(number, signal.SIG_IGN)
    kernel = Kernel(born)
    code = kernel.run()
    sys.stderr.flush()
    return code
