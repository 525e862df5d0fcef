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
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from aiosd import link, log
from aiosd.errors import WorldError
from aiosd.heartbeat import BEAT_S, beat
from aiosd.kernel import live, syscalls
from aiosd.kernel.agents import Agents
from aiosd.kernel.control import Control
from aiosd.kernel.cores import Core, Cores
from aiosd.kernel.generations import Generations
from aiosd.kernel.journal import Journal
from aiosd.kernel.ledger import CALLS, Ledger
from aiosd.kernel.peer import (
    FRAMES_PER_TURN,
    MAX_OPEN_CALLS,
    OUTBOX_MAX,
    OUTBOX_PAUSE,
    AgentPeer,
    Assembly,
    Call,
    ClientPeer,
    Peer,
    failure,
    read_args,
    read_request,
    reply,
)
from aiosd.kernel.proc import Message, ProcTable
from aiosd.kernel.status import StatusRequests
from aiosd.kernel.waiters import Waiters
from aiosd.timers import Timers
from libaios import wire
from libaios.channel import Channel, Side, restless
from libaios.ring import ProtocolError
from libaios.stream import FrameSocket

if TYPE_CHECKING:
    from aiosd.init.records import Inheritance

logger = logging.getLogger("kernel")

TURN_S = 0.002  # of one agent, if it can be helped, before the others have their turn
REPLIES_PER_RING = 16  # to one peer in its turn: the first of them should not wait for the last
EVENTS_PER_TURN = 256
LOOKS = 700  # some 20 µs, for which everybody else waits: one who goes on calling as soon as it has its reply
LOG_INDEX_S = 1.0
REATTACH_S = 10.0  # how long clients have to come back to a new kernel before their agents get HUP
PENDING = syscalls.PENDING
SYSCALLS, KNOWN = syscalls.SYSCALLS, syscalls.KNOWN
NO_ARGS = wire.raw(wire.NoArgs())


class Kernel:
    def __init__(self, born: Inheritance) -> None:
        self.settings = born.settings
        self.boot = born.boot
        self.born = born
        self.timers = Timers()
        self.epoll = select.epoll()
        self.on_event: dict[int, Callable[[int], None]] = {}  # by descriptor
        self.clients: set[int] = set()  # descriptors of clients, and the one over which they come
        self.hungry: dict[int, Callable[[int], None]] = {}  # has more to read; by descriptor
        self.found: dict[int, Callable[[int], None]] = {}  # had sent all and has sent again; by descriptor
        self.awake: dict[int, AgentPeer] = {}  # served just now, and not told to ring; by descriptor
        self.quiet: dict[int, AgentPeer] = {}  # those of them that had sent nothing when we looked last
        self.rung: dict[int, AgentPeer] = {}  # whose bells were heard since the last beat
        # who is there
        self.table = ProcTable(self.settings.keep_dead)
        self.agents = Agents(self)
        self.waiters = Waiters(self)
        self.assembly = Assembly()
        self.generations = Generations(self)
        self.cores = Cores(self.generations)
        self.cores.schedule = self.settings.schedule()
        self.stopping = ""
        self.over = False
        self.ready = False
        self.counters = {"calls": 0, "refused": 0, "offenders": 0, "clients": 0, "agents": 0}
        self.status = StatusRequests(self)
        self.ledger = Ledger(born.ledger)
        self.journal = Journal(born.journal, self._is_alive)
        # to the outside
        self.supervisor = FrameSocket(_socket_of(born.link), max_outbox=1 << 62)  # `Agents.fork` keeps it small
        self.watch(self.supervisor.fileno(), self._on_supervisor)
        self.control = Control(self, _socket_of(born.listener))
        self._adopt()

    # ── loop ──────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> int:
        self._beat()
        self.agents.start_measuring()
        while not self.generations.load_error and not self.over:
            if self.awake or self.quiet:
                self._look()
            timeout = 0.0 if self.hungry or self.found else self.timers.until_next()
            clients = []
            for fd, mask in self.epoll.poll(timeout, EVENTS_PER_TURN):
                act = self.on_event.get(fd)
                if fd in self.clients:
                    clients.append((fd, mask))
                elif act is not None:  # else: closed by an earlier event of this turn
                    act(mask)
            until = self.timers.clock() + TURN_S
            if self.hungry or self.found:
                self._feed(until)
            if clients:
                self._receive_clients(clients, until)
            self.timers.run_due()
        if self.generations.load_error:
            self.to_supervisor(link.Shutdown(error=self.generations.load_error))
        return 0

    # Whoever sends little must not wait long behind those who send much, however many they are: in each round all who
    # had nothing left have their turn, and all others together, agents and clients, about as much time as one turn.

    def _feed(self, until: float) -> None:
        """Let those agents go on who had been through with what they had sent, and then in turn, while there is time,
        those who send more than is done in a turn; at least one."""
        for fd in list(self.found):
            act = self.found.pop(fd, None)
            if act is not None:  # else: dropped while another's requests were handled
                act(select.EPOLLIN)
        for fd in list(self.hungry):
            act = self.hungry.pop(fd, None)
            if act is not None:
                act(select.EPOLLIN)
                if self.timers.clock() >= until:
                    break

    def _receive_clients(self, events: list[tuple[int, int]], until: float) -> None:
        """What clients have sent, and new ones, while there is time; at least one. Of those who are left epoll tells
        again, before those who had their turn."""
        for fd, mask in events:
            act = self.on_event.get(fd)
            if act is not None:
                act(mask)
                if self.timers.clock() >= until:
                    break

    def _look(self) -> None:
        """At agents that were served and have not been told to ring: who has sent something meanwhile is found. Before
        we sleep all of them are told, and those in whose rings nothing was found twice."""
        found, awake, quiet = self.found, self.awake, self.quiet
        if len(awake) == 1 and not quiet and not self.hungry:
            # Nobody else talks: where that has paid, a moment's patience saves both of us their bells.
            fd, peer = awake.popitem()
            if not peer.channel.fall_asleep(LOOKS):
                found[fd] = peer.serve
            return
        for peers in (awake, quiet):
            for fd, peer in peers.items():
                if peer.channel.filled():
                    found[fd] = peer.serve
        if found or self.hungry:
            tell = {fd: peer for fd, peer in quiet.items() if fd not in found}
            self.quiet = {fd: peer for fd, peer in awake.items() if fd not in found}
        else:
            tell = awake | quiet if quiet else awake
            self.quiet = {}
        self.awake = {}
        for channel in restless([peer.channel for peer in tell.values()]):
            fd = channel.fileno()
            found[fd] = tell[fd].serve

    def _beat(self) -> None:
        self.timers.after(BEAT_S, self._beat)
        rung, self.rung = self.rung, {}
        for fd, peer in rung.items():  # a bell that somebody has filled would be mute for ever
            peer.channel.drain_bell()
            self.hungry[fd] = peer.serve
        beat(self.born.heartbeat)

    def watch(
        self, fd: int, act: Callable[[int], None], events: int = select.EPOLLIN, of_clients: bool = False
    ) -> None:
        self.on_event[fd] = act
        if of_clients:
            self.clients.add(fd)
        self.epoll.register(fd, events)

    def unwatch(self, fd: int) -> None:
        if self.on_event.pop(fd, None) is not None:
            self.epoll.unregister(fd)
        self.clients.discard(fd)
        self.hungry.pop(fd, None)
        self.found.pop(fd, None)
        self.awake.pop(fd, None)
        self.quiet.pop(fd, None)
        self.rung.pop(fd, None)

    def watch_output(self, sock: FrameSocket) -> None:
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
            self.agents.adopt(agent)
        for message in self.journal.waiting():
            proc = self.table.get(message.to)
            if proc is not None and proc.alive:
                proc.mailbox.append(Message(message.seq, message.sender, message.obj))
                proc.mailbox_bytes += len(memoryview(message.obj))
        if self.born.epoch > 1:
            self.ready = self.born.ready
            self.timers.after(REATTACH_S, self.agents.hang_up_unclaimed)

    def _is_alive(self, pid: int) -> bool:
        proc = self.table.get(pid)
        return proc is not None and proc.alive

    # ── requests ──────────────────────────────────────────────────────────────────────────────────────────

    def _on_bell(self, peer: AgentPeer, mask: int) -> None:
        if mask == select.EPOLLIN:
            if peer.channel.heard():
                self.rung[peer.channel.fileno()] = peer
            if peer.channel.fileno() in self.hungry:
                return  # it stands in line, however often it rings
        else:
            peer.channel.drain_bell()  # the end of the bell, perhaps
        self._on_agent(peer, mask)

    def _on_agent(self, peer: AgentPeer, mask: int) -> None:
        channel = peer.channel
        fd = channel.fileno()
        requests: list[bytes] = []
        more, assembling = False, 0
        try:
            if (channel.outbox_bytes or peer.paused) and not self._unload(peer):
                return
            assembling = channel.take(requests, peer.turn)
            more = len(requests) == peer.turn
            if more:
                self._serve_a_turn(peer, requests)
            else:
                self._serve(peer, requests)
        except ProtocolError as err:
            self.offend(peer, str(err))
        if peer.gone:  # dropped while its requests were handled
            return
        if assembling or peer.assembling:
            self.note_assembling(peer, assembling)
            if peer.gone:
                return
        if more:
            self.hungry[fd] = peer.serve
        elif channel.hung_up and not channel.filled():
            self.drop_peer(peer)
        else:
            self.awake[fd] = peer

    def _serve_a_turn(self, peer: AgentPeer, requests: list[bytes]) -> None:
        """As `_serve`; whoever sends much that takes long gets shorter turns."""
        began = self.timers.clock()
        self._serve(peer, requests)
        long = self.timers.clock() - began > TURN_S
        peer.turn = max(1, peer.turn // 2) if long else min(FRAMES_PER_TURN, 2 * peer.turn)

    def _serve(self, peer: AgentPeer, requests: list[bytes]) -> None:
        """Execute them. What is answered at once is told with one ring for several."""
        channel = peer.channel
        answers: list[bytes] = []
        for payload in requests:
            answer = self._answer(peer, payload)
            if peer.gone:
                return
            if answer is not None:
                answers.append(answer)
                if len(answers) == REPLIES_PER_RING:
                    channel.post(answers)
                    answers.clear()
        if answers:
            channel.post(answers)
        if channel.outbox_bytes:
            self._check_outbox(peer)

    def _unload(self, peer: AgentPeer) -> bool:
        """Send what waits. False while so much still waits that the peer's next requests must wait as well, until it
        has read its replies: then it rings."""
        channel = peer.channel
        if channel.pump():
            self.generations.resume_streams(peer)
        if channel.outbox_bytes <= OUTBOX_PAUSE:
            return True
        if channel.hung_up:
            self.drop_peer(peer)
        return False

    def note_assembling(self, peer: Peer, size: int) -> None:
        """Of all that is being put together; `size` bytes of it are this peer's."""
        offender = self.assembly.note(peer, size)
        if offender is not None:
            self.offend(offender, f"a frame of {offender.assembling} bytes and no end, when there was no room for more")

    def dispatch(self, peer: Peer, payload: bytes) -> None:
        """Do what a request asks for, and answer."""
        answer = self._answer(peer, payload)
        if answer is not None:
            self._send(peer, answer)

    def _answer(self, peer: Peer, payload: bytes) -> bytes | None:
        """Do what a request asks for. Returns its final reply, or None: it was sent, or will be."""
        request = read_request(payload)
        calls = peer.calls
        if request.id in calls:
            self._refuse(peer, request.id, errno.EINVAL, f"call id {request.id} is in use")
            return None
        self.counters["calls"] += 1
        proc = peer.proc
        if proc is not None:
            proc.row[CALLS] = proc.calls = proc.calls + 1
        known = KNOWN.get(request.sys)
        if known is not None and request.args == NO_ARGS:
            return reply(request.id, known(peer))
        call = calls[request.id] = Call(peer, request.id, request.sys)
        try:
            body = self._execute(call, request)
        except OSError as err:
            self.fail(call, err.errno or errno.EIO, err.strerror or str(err))
        except Exception:
            logger.exception("system call %d of %d: a bug of the kernel", request.sys, peer.id)
            self.fail(call, errno.EIO, "the kernel made a mistake; its log has the details")
        else:
            if body is not PENDING and self._close_call(call):
                return reply(call.id, body)
        return None

    def _execute(self, call: Call, request: wire.Request) -> Any:
        peer = call.peer
        handler = SYSCALLS.get(request.sys)
        if handler is None:
            if not peer.strange:
                peer.strange = True
                logger.warning("pid %d: unknown system call %d", peer.id, request.sys)
            raise wire.error(errno.ENOSYS, f"there is no system call {request.sys}")
        if len(peer.calls) > MAX_OPEN_CALLS:
            raise wire.error(errno.EAGAIN, f"more than {MAX_OPEN_CALLS} calls open")
        return handler(self, call, read_args(request))

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
        calls = call.peer.calls
        if calls.get(call.id) is not call:
            return False
        del calls[call.id]
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
        if peer.gone:
            return
        try:
            peer.send(payload)
            self._check_outbox(peer)
        except ProtocolError as err:
            self.offend(peer, str(err))
        except OSError:
            self.drop_peer(peer)
        else:
            if isinstance(peer, ClientPeer) and peer.socket.pending:
                self.control.watch(peer)

    @staticmethod
    def _check_outbox(peer: Peer) -> None:
        if peer.outbox_bytes > OUTBOX_MAX:
            raise ProtocolError(f"does not read its replies ({peer.outbox_bytes} bytes wait)")

    # ── peers ────────────────────────────────────────────────────────────────────────────────────────────

    def serve(self, peer: AgentPeer) -> None:
        """Listen to an agent from now on; it may have rung before."""
        peer.serve = partial(self._on_agent, peer)
        # Each ring is an event, whether or not older ones were drained: so they need not be, each time.
        events = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET
        self.watch(peer.fileno(), partial(self._on_bell, peer), events)
        self.hungry[peer.fileno()] = peer.serve

    def offend(self, peer: Peer, why: str) -> None:
        """The peer broke the protocol: end it, and say why where aios-inspect shows it."""
        self.counters["offenders"] += 1
        logger.warning("%s %d: EPROTO: %s", "agent" if isinstance(peer, AgentPeer) else "client", peer.id, why)
        if isinstance(peer, AgentPeer) and peer.proc is not None and peer.proc.alive:
            self.agents.set_reason(peer.proc, f"EPROTO: {why}")
            self.to_supervisor(link.SendSignal(peer.proc.pid, signal.SIGKILL))
        self.drop_peer(peer)

    def drop_peer(self, peer: Peer) -> None:
        """The connection is gone: close whatever it had open, without replies."""
        peer.gone = True
        self.assembly.note(peer, 0)
        for call in list(peer.calls.values()):
            self._close_call(call)
        fd = peer.fileno()
        if fd in self.on_event:
            self.unwatch(fd)
            peer.close()
        if isinstance(peer, AgentPeer):
            if peer.proc is not None and peer.proc.peer is peer:
                peer.proc.peer = None
        elif isinstance(peer, ClientPeer):
            self.control.forget(peer)

    # ── supervisor ────────────────────────────────────────────────────────────────────────────────────────

    def to_supervisor(self, message: link.ToSupervisor, fds: tuple[int, ...] = ()) -> None:
        self.supervisor.send(link.encode(message), fds)
        if self.supervisor.pending:
            self.watch_output(self.supervisor)

    def _on_supervisor(self, mask: int) -> None:
        try:
            self.supervisor.flush()
            frames = self.supervisor.receive()
        except (EOFError, OSError):
            os._exit(1)  # the supervisor is gone, and with it the system
        for payload, fds in frames:
            self._on_supervisor_message(link.decode_from_supervisor(payload), fds)
        self.watch_output(self.supervisor)

    def _on_supervisor_message(self, message: link.FromSupervisor, fds: list[int]) -> None:
        match message:
            case link.Forked():
                self.agents.forked(message, fds)
            case link.ForkFailed():
                self.agents.fork_failed(message)
            case link.ChildStopped():
                self.agents.stopped(message)
            case link.ChildExited():
                proc = self.table.get(message.pid)
                if proc is not None:
                    self.agents.exited(proc, message.status, message.reason)
            case link.CoreForked():
                core = self.cores.by_name[message.name]
                core.pid = message.pid
                self._connect_core(core, message.ospid, message.deaths, *fds)
            case link.CoreDied():
                self._core_died(self.cores.by_name[message.name], message.reason)
            case link.Reread():
                live.reread(self, message)
            case link.Stop():
                self.stopping = message.reason
                self.over = message.last

    # ── cores ─────────────────────────────────────────────────────────────────────────────────────────────

    def _connect_core(self, core: Core, ospid: int, deaths: int, memfd: int, bell: int) -> None:
        channel = Channel(memfd, bell, Side.AGENT)
        self.cores.forked(core, ospid, deaths, channel)
        fd = channel.fileno()
        self.watch(fd, lambda mask: self._on_core(core, channel))
        self.hungry[fd] = self.on_event[fd]

    def _on_core(self, core: Core, channel: Channel) -> None:
        if core.channel is channel and self.cores.receive(core):
            self.hungry[channel.fileno()] = self.on_event[channel.fileno()]

    def _core_died(self, core: Core, reason: str) -> None:
        if core.channel is not None:
            self._on_core(core, core.channel)  # its last words
            self.unwatch(core.channel.fileno())
        self.cores.died(core, reason)
        if not self.ready and not self.generations.load_error:
            self.generations.load_error = f"{core.name}: the llm core died while it was loading ({reason})"

    def core_loaded(self) -> None:
        """Every time a core is ready; the first time that all are, the system is."""
        if not self.ready and all(core.state == "ready" for core in self.cores):
            self.ready = True
            names = ", ".join(core.name for core in self.cores)
            self.to_supervisor(link.Ready(f"aiosd: ready ({names}; {self.settings.home.root})"))


def _socket_of(fd: int) -> socket.socket:
    sock = socket.socket(fileno=fd)
    sock.setblocking(False)
    return sock


def main(born: Inheritance) -> int:
    """Entry of the kernel process, forked by the supervisor."""
    log.setup("kernel", born.settings.log_level)
    for number in (signal.SIGINT, signal.SIGTERM):  # it ends when the supervisor says so, or is gone
        signal.signal(number, signal.SIG_IGN)
    try:
        kernel = Kernel(born)
    except WorldError as err:  # what a dead kernel left cannot be read: no successor could go on
        shutdown = link.Shutdown(error=f"the kernel cannot start: {err}")
        FrameSocket(_socket_of(born.link)).send(link.encode(shutdown))
        return 1
    code = kernel.run()
    sys.stderr.flush()
    return code
