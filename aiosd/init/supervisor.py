"""The supervisor: init of the system. It forks everything, reaps everything, and owns every channel.

One thread, few imports, no rings mapped, no model: so a fork is cheap, and this process is unlikely to die. It never
waits for another process, nor for a disk, and what belongs to one agent it passes on without reading it
(`aiosd.letter`). All that must survive the kernel is in its records: `Agent` and `Process` (the kernel, and one for
each service). A new kernel is forked with copies of them and needs no other source. `children` has the record of every
live child; the end of every child is handled in one place (`_child_ended`).

It answers two kinds of events: messages from the kernel (`link.ToSupervisor`) and signals.

    SIGCHLD           reap: an agent, the kernel, a service; any other child is an orphan of an agent (`orphans`)
    SIGTERM, SIGINT   stop the system: TERM to agents, KILL after a while, then kernel and services, exit 0
    SIGHUP            read the settings again
    SIGUSR1           the guardian died (our parent-death signal): end everything at once

The supervisor sends the guardian a heartbeat.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

from aiosd import apart, link, log, procfs, restart
from aiosd.birth import confinement, fork, gates, modules, spares
from aiosd.birth.server import House
from aiosd.errors import Bug
from aiosd.heartbeat import BEAT_S, Heart, Rounds, beat, beat_in_background
from aiosd.init import environment, notify, services
from aiosd.init.births import Birth, Births
from aiosd.init.orphans import Orphans
from aiosd.init.pids import PidCounter
from aiosd.init.records import BACKOFF_S, Agent, Inheritance, Memo, Process
from aiosd.init.servers import Server, Servers
from aiosd.init.signals import Received, describe_sender, open_signals, read_signals, signal_tree
from aiosd.init.signals import name as signal_name
from aiosd.init.sweep import sweep
from aiosd.init.templates import Order, Template, Templates
from aiosd.sandbox import cage
from aiosd.sandbox.box import LEVELS
from aiosd.sandbox.probe import Offer
from aiosd.service import Service, Stopped
from aiosd.timers import Timers
from libaios import wire
from libaios.channel import Channel, Side, make_channel, raise_epoch
from libaios.stream import FrameSocket

if TYPE_CHECKING:
    from aiosd.config import Settings

logger = logging.getLogger("supervisor")

RING_BYTES = 1 << 16  # of each direction between an agent and the kernel
SERVICE_RING_BYTES = 1 << 20  # between kernel and service: a step of 256 sequences is one frame
BOOT_TRIES = 3  # deaths of a kernel that has never been ready
PAYS_OFF = 0.2  # each second of life shortens the next wait by this number of seconds
LAST_WAIT_S = 2.0  # for kernel and services at the end
ORPHANS_LOOK_S = 0.05  # at the end, between two looks for orphans
GUARDIAN_DIED = signal.SIGUSR1
ORDERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SIGNALS = (signal.SIGCHLD, *ORDERS, GUARDIAN_DIED)
ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)  # signals that tell an agent to end
Spare = tuple[int, socket.socket]
KERNEL = Service("kernel", kind="", entry="")  # forked by `_fork_kernel`


class Supervisor:
    def __init__(self, settings: Settings, listener: socket.socket, guardian: int, heartbeat: int) -> None:
        self.settings = settings
        self._on_terminal = os.isatty(2)
        self.home = settings.home
        self.listener = listener
        self.guardian = guardian
        self.heartbeat = heartbeat
        self.boot = os.urandom(8).hex()
        self.started, self.since = time.time(), time.monotonic()
        self.timers = Timers()
        self.epoll = select.epoll()
        self.pids = PidCounter(self.home.data / "last-pid", self.home.logs)
        # processes
        self.children: dict[int, Agent | Process | Template | Server] = {}  # live ones, by Linux pid
        self.agents: dict[int, Agent] = {}  # by pid, live and dead until forgotten
        self.spares = spares.Spares(self.timers)
        self.orphans = Orphans(self.timers, self._known_children, settings.stop_timeout_s, settings.orphans == "term")
        self.kernel = Process(KERNEL, 0)
        self.guardian_pid = 0
        self.services: dict[str, Process] = {}
        self.link: FrameSocket | None = None  # to the kernel
        self.births = Births(self.epoll, self.timers, self._born)
        self.templates = Templates(
            self.epoll, self.timers, self.children, self.pids.next, self._tell_templates, settings.template_idle_s
        )
        self.servers = Servers(
            self.epoll, self.children, self._house, self.pids.next, lambda shown: self._tell(link.McpServers(shown))
        )
        self.orders: dict[link.Key, int] = {}  # spawns that wait for a template, with the epoch of their kernel
        self.served_once = False  # the system has been ready
        self.epoch = 0
        # results of calls that take effect once
        self.spawned: Memo[link.Key, int] = Memo()
        self.signalled: Memo[tuple[link.Key, int], None] = Memo()  # KILL calls, and the agents that they meant
        self.replies: Memo[link.Key, bytes] = Memo()
        # the end
        self.stopping = ""
        self.last_step: Stopped | None = None  # which of our own processes have been told to end
        self.exit_code: int | None = None
        self.signals = open_signals(SIGNALS)
        self.journal = (os.memfd_create("aios-journal"), os.memfd_create("aios-journal"))
        self.ledger = os.memfd_create("aios-ledger")
        self.environment = environment.hide()
        self.offer = Offer("none")  # which sandbox this machine can do

    def _known_children(self) -> set[int]:
        return {*self.children, *self.spares.ospids()}

    def _house(self) -> House:
        data = self.home.data
        return House(self.offer.level, self.settings.strict, str(data), str(data / "servers"))

    def _live_agents(self) -> list[Agent]:
        return [child for child in self.children.values() if isinstance(child, Agent)]

    # ── life ──────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> int:
        """Boot, serve until told to stop, leave nothing behind. Returns aiosd's exit code."""
        self.epoll.register(self.signals, select.EPOLLIN)
        for service in services.of(self.settings, self.servers.theirs.fileno()):
            self.services[service.name] = Process(service, self.pids.next())
        self.kernel.pid, self.guardian_pid = self.pids.next(), self.pids.next()
        self.offer = confinement.prepare(gates.of(self.settings.door))
        if self.settings.strict and self.offer.level != LEVELS[-1]:
            return self._refuse(f"sandbox strict: {self.offer.reason}")
        _preload()
        self._fork_kernel()
        for process in self.services.values():
            self._fork_service(process)
        self._beat()
        while self.exit_code is None:
            self._turn()
        sweep(meanwhile=lambda: beat(self.heartbeat))
        try:
            self.pids.release()
        except OSError as err:  # a full disk: numbers are wasted, but none is repeated
            logger.warning("pids: %s", err)
        return self.exit_code

    def _refuse(self, error: str) -> int:
        """Do not start; returns the exit code."""
        print(f"aiosd: {error}", file=sys.stderr, flush=True)
        notify.failed(self.settings, error)
        return 1

    def _turn(self) -> None:
        for fd, _ in self.epoll.poll(self.timers.until_next()):
            if fd == self.signals:
                self._on_signals(read_signals(fd))
            elif self.link is not None and fd == self.link.fileno():
                self._on_kernel(self.link)
            elif not self.templates.look(fd) and not self.servers.look(fd):
                self.births.look(fd)
        self.timers.run_due()

    def _beat(self) -> None:
        """Once a second: send a heartbeat to the guardian, and check the heartbeats of the others."""
        self.timers.after(BEAT_S, self._beat)
        beat(self.heartbeat)
        for process in (self.kernel, *self.services.values()):
            silent_s = process.service.silent_s
            if process.ospid and process.heart is not None and process.heart.hangs(silent_s=silent_s):
                logger.error("%s hangs (no heartbeat for %g s); killed", _title(process), silent_s)
                os.kill(process.ospid, signal.SIGKILL)

    def _on_signals(self, received: list[Received]) -> None:
        numbers = {one.number for one in received}
        if GUARDIAN_DIED in numbers and os.getppid() != self.guardian:  # an agent can also send that signal
            logger.critical("the guardian died; ending everything")
            self.exit_code = 1
            return
        # Before the dead are reaped: the sender of a signal is identified by its number.
        orders = [one for one in received if one.number in ORDERS and not self._is_refused(one)]
        if signal.SIGCHLD in numbers:
            self._reap()
        for one in orders:
            if one.number == signal.SIGHUP and not self._terminal_gone():
                self._reload()
            else:
                self.stop(f"{signal_name(one.number)} {describe_sender(one.sender)}")

    def _is_refused(self, one: Received) -> bool:
        """Signals are obeyed from the guardian, or from Linux itself, and from no other process: most others come from
        agents (`kill $PPID`). A user has the guardian's number, and `aiosd stop`."""
        if one.sender in (0, self.guardian):
            return False
        agent, sender = self._agent_above(one.sender), describe_sender(one.sender)
        whose = f", which belongs to agent {agent.pid}" if agent is not None else ""
        logger.warning("%s %s%s: ignored; to stop: aiosd stop", signal_name(one.number), sender, whose)
        return True

    def _agent_above(self, ospid: int) -> Agent | None:
        """The agent that a process is or descends from, if that can still be found out."""
        while ospid > 1:
            child = self.children.get(ospid)
            if isinstance(child, Agent):
                return child
            stat = procfs.read_stat(ospid)
            if stat is None:
                return None
            ospid = stat.ppid
        return None

    def _terminal_gone(self) -> bool:
        """Was this aiosd started in the foreground of a terminal that has been closed?"""
        return self._on_terminal and not os.isatty(2)

    def _reload(self) -> None:
        """SIGHUP: some settings can change in a running system (`config.keys.LIVE`); the rest needs a restart, and the
        log says so."""
        from aiosd.config import reload_and_report

        try:
            self.settings = apart.run(lambda: reload_and_report(self.settings))
        except Exception:  # neither a broken file nor an error in reading it may end a running system
            logger.exception("settings not read again")
            return
        report = self.settings.reread
        if report["error"]:
            logger.error("settings not read again: %s", report["error"])
        else:
            waiting = ", ".join(report["after_restart"])
            logger.info("settings read again%s", f"; after a restart: {waiting}" if waiting else "")
        log.set_level(self.settings.log_level)
        self._tell(link.Reread(self.settings.log_level, self.settings.schedule(), self.settings.access, dict(report)))

    # ── the kernel ────────────────────────────────────────────────────────────────────────────────────────

    def _fork_kernel(self) -> None:
        """Raises OSError, and leaves nothing behind, when Linux has no process or descriptor to give."""
        with contextlib.ExitStack() as undo:
            heart = Heart()
            undo.callback(heart.close)
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            undo.callback(ours.close)
            undo.callback(theirs.close)
            self.epoch += 1
            ospid = self._fork_kernel_with(heart, theirs)
            undo.pop_all()
        self._forked(self.kernel, ospid, heart)
        theirs.close()
        ours.setblocking(False)
        self.link = FrameSocket(ours)
        self.epoll.register(ours.fileno(), select.EPOLLIN)

    def _fork_kernel_with(self, heart: Heart, theirs: socket.socket) -> int:
        running = [process for process in self.services.values() if process.ospid]
        inheritance = Inheritance(
            boot=self.boot,
            settings=self.settings,
            listener=self.listener.fileno(),
            link=theirs.fileno(),
            heartbeat=heart.write,
            epoch=self.epoch,
            pids={"guardian": self.guardian_pid, "supervisor": 1, "kernel": self.kernel.pid},
            guardian=self.guardian,
            started=self.started,
            since=self.since,
            journal=self.journal,
            ledger=self.ledger,
            memo=self.replies,
            ready=self.served_once,
            offer=self.offer,
            agents=list(self.agents.values()),
            services=list(self.services.values()),
            templates=self.templates.shown(),
            servers=self.servers.shown(),
        )
        keep = [self.listener.fileno(), theirs.fileno(), heart.write, *self.journal, self.ledger]
        keep += [fd for agent in self._live_agents() for fd in (agent.memfd, agent.bell)]
        keep.append(self.settings.sealed)
        keep += [self.settings.passages.kernel] if self.settings.passages is not None else []
        keep += [fd for agent in self.agents.values() for fd in (agent.letter, agent.door, *agent.gates)]
        keep += [fd for process in running for fd in (process.memfd, process.kernel_bell)]

        def child() -> int:
            os.setsid()
            environment.restore(self.environment)
            modules.show()
            fork.name_process("aios:kernel")
            fork.keep_only(keep)
            from aiosd.kernel.loop import main

            return main(inheritance)

        return fork.fork(child)

    def _refork_kernel(self) -> None:
        """A new kernel inherits every channel; the raised epoch tells each peer to submit its open calls again."""
        if self.stopping:
            return
        agents = self._live_agents()
        running = [process for process in self.services.values() if process.ospid]
        for memfd in [*(agent.memfd for agent in agents), *(process.memfd for process in running)]:
            raise_epoch(memfd)
        try:
            self._fork_kernel()
        except OSError as err:  # no process or descriptor left: try again until there is
            logger.error("kernel cannot be forked: %s; tried again in %.1f s", err.strerror, BACKOFF_S[1])
            self.timers.after(BACKOFF_S[1], self._refork_kernel)
            return
        for bell in [*(agent.bell for agent in agents), *(process.kernel_bell for process in running)]:
            _ring(bell)
        logger.warning("kernel forked again (death %d)", self.kernel.deaths)

    def _tell(self, message: link.FromSupervisor, fds: tuple[int, ...] = ()) -> None:
        """Send to the kernel. Without a kernel nothing is lost: the next one inherits the records. A kernel that has
        just died may have left messages, so the link stays open until all of them are read."""
        if self.link is None or not self.kernel.ospid:
            return
        try:
            self.link.send(link.encode(message), fds)
            self._watch_link()
        except (BrokenPipeError, ConnectionError):
            pass  # it has just died

    def _watch_link(self) -> None:
        if self.link is not None:
            events = select.EPOLLIN | (select.EPOLLOUT if self.link.pending else 0)
            self.epoll.modify(self.link.fileno(), events)

    def _close_link(self) -> None:
        if self.link is not None:
            self.epoll.unregister(self.link.fileno())
            self.link.close()
            self.link = None

    # ── services ──────────────────────────────────────────────────────────────────────────────────────────

    def _fork_service(self, process: Process) -> None:
        if self.stopping or process.ospid:
            return
        try:
            with contextlib.ExitStack() as undo:
                heart = Heart()
                undo.callback(heart.close)
                # On this channel the service is the server and the kernel the client, as an agent is to the kernel.
                fds = make_channel(SERVICE_RING_BYTES, SERVICE_RING_BYTES)
                for fd in fds:
                    undo.callback(os.close, fd)
                process.memfd, process.own_bell, process.kernel_bell = fds
                ospid = self._fork_service_with(process, heart)
                undo.pop_all()
        except OSError as err:
            wait_s = BACKOFF_S[1]
            logger.error("%s cannot be forked: %s; tried again in %.1f s", _title(process), err.strerror, wait_s)
            self.timers.after(wait_s, lambda: self._fork_service(process))
            return
        self._forked(process, ospid, heart)
        forked = link.ServiceForked(process.service.name, process.pid, ospid, process.deaths)
        self._tell(forked, (process.memfd, process.kernel_bell))

    def _fork_service_with(self, process: Process, heart: Heart) -> int:
        def child() -> int:
            os.setsid()
            environment.restore(self.environment)
            modules.show()
            fork.name_process(f"aios:{_title(process)}")
            cage_fds = cage.descriptors() if process.service.confines else ()
            fork.keep_only((process.memfd, process.own_bell, heart.write, *process.service.keep, *cage_fds))
            rounds = Rounds()
            beat_in_background(heart.write, rounds)
            log.setup(_title(process), self.settings.log_level)
            return process.service.main(Channel(process.memfd, process.own_bell, Side.KERNEL), rounds)

        return fork.fork(child)

    # ── life and death of our own processes ───────────────────────────────────────────────────────────────

    def _forked(self, process: Process, ospid: int, heart: Heart) -> None:
        process.ospid, process.heart, process.forked_at = ospid, heart, time.monotonic()
        heart.forked()
        self.children[ospid] = process

    def _process_ended(self, process: Process, status: int) -> None:
        process.ospid = 0
        process.deaths += 1
        if process.heart is not None:
            process.heart.close()
            process.heart = None
        if process.memfd >= 0:
            for fd in (process.memfd, process.kernel_bell, process.own_bell):
                os.close(fd)
            process.memfd = process.kernel_bell = process.own_bell = -1
        if process is self.kernel:
            while self.link is not None:  # what it had sent before is still carried out
                self._on_kernel(self.link)
        if not self.stopping and self.exit_code is None:
            self._replace(process, restart.exit_in_words(status))

    def _replace(self, process: Process, reason: str) -> None:
        is_kernel = process is self.kernel
        if is_kernel and not self.served_once and process.deaths >= BOOT_TRIES:
            self._on_shutdown(link.Shutdown(error="the kernel does not start; its log above says why"), [])
            return
        process.backoff_s = _backoff(process.backoff_s, time.monotonic() - process.forked_at)
        # At boot the kernel reports in one line what the death of a service means.
        level = logging.ERROR if self.served_once or is_kernel else logging.DEBUG
        logger.log(level, "%s died (%s); forked again in %.1f s", _title(process), reason, process.backoff_s)
        if is_kernel:
            self.timers.after(process.backoff_s, self._refork_kernel)
        else:
            self._tell(link.ServiceDied(process.service.name, reason))
            self.timers.after(process.backoff_s, lambda: self._fork_service(process))

    # ── messages from the kernel ──────────────────────────────────────────────────────────────────────────

    def _on_kernel(self, kernel: FrameSocket) -> None:
        with contextlib.suppress(OSError):  # it died; what it has sent is still handled
            if self.kernel.ospid:
                kernel.flush()
        try:
            frames = kernel.receive()
        except (OSError, EOFError):
            self._close_link()
            return
        for payload, fds in frames:
            try:
                message = link.decode_to_supervisor(payload)
                self._ON_MESSAGE[type(message)](self, message, fds)
            finally:
                for fd in fds:
                    os.close(fd)
        self._watch_link()

    def _on_fork(self, message: link.Fork, fds: list[int]) -> None:
        known = self.agents.get(self.spawned.get(message.key) or 0)
        if known is not None:
            if self.births.claim(known, self.epoch):
                return  # the reply is sent when the birth is over
            self._tell(_forked(message.key, known))
            return
        if message.key in self.orders:
            self.orders[message.key] = self.epoch
            return
        try:
            if self.stopping:
                raise OSError(errno.EAGAIN, "aiosd is shutting down")
            if message.outside:
                self._enrol(message, fds)
            elif message.template is not None:
                self._order(message, fds)
            else:
                self._spawn(message, fds)
        except OSError as err:
            self._fork_failed(message.key, err.errno or 5, err.strerror or str(err))

    def _fork_failed(self, key: link.Key, number: int, words: str) -> None:
        self._tell(link.ForkFailed(key, number, words))

    def _order(self, spec: link.Fork, fds: list[int]) -> None:
        """Have a template fork the agent's process, and spawn it then. Raises OSError."""
        assert spec.template is not None
        kept = [os.dup(fd) for fd in fds]

        def over() -> bool:
            """Whether the kernel that waits for it is still there: another one knows nothing of it."""
            return self.orders.pop(spec.key, -1) == self.epoch and not self.stopping

        def done(ospid: int, sock: socket.socket) -> None:
            try:
                if over():
                    self._spawn(spec, kept, (ospid, sock))
                else:
                    sock.close()
            except OSError as err:
                sock.close()
                self._fork_failed(spec.key, err.errno or 5, err.strerror or str(err))
            finally:
                _close(kept)

        def failed(number: int, words: str) -> None:
            _close(kept)
            if over():
                self._fork_failed(spec.key, number, words)

        self.orders[spec.key] = self.epoch
        try:
            self.templates.order(spec.template, done, failed)
        except OSError:
            del self.orders[spec.key]
            _close(kept)
            raise

    def _tell_templates(self) -> None:
        self._tell(link.Templates(self.templates.shown()))

    def _born(self, birth: Birth) -> None:
        """An agent runs, or cannot start: only now the kernel gets its reply. A kernel that was forked during the birth
        has inherited the agent, and asks again."""
        agent = birth.agent
        doors = (agent.door, *agent.gates) if agent.door >= 0 else ()
        if agent.restarts is not None and agent.restarts.total:
            if birth.refusal is None:
                self._tell(link.ChildRestarted(agent.pid, agent.ospid), (agent.memfd, agent.bell, *doors))
            return  # else it ends now, which is handled like any other end
        if birth.refusal is None:
            if birth.epoch == self.epoch:
                self._tell(_forked(agent.spec.key, agent), () if birth.claimed else (agent.memfd, agent.bell, *doors))
            return
        if birth.epoch == self.epoch:
            number, reason = birth.refusal
            self._tell(link.ForkFailed(agent.spec.key, number, ""), (reason,))
        self.agents.pop(agent.pid, None)
        agent.restarts = None  # its caller never got its pid, and its letter is closed
        _drop(agent)
        self.spawned.forget(agent.spec.key)
        if agent.log:
            with contextlib.suppress(OSError):
                os.unlink(agent.log)

    def _spawn(self, spec: link.Fork, fds: list[int], spare: Spare | None = None) -> None:
        """`spare`: the process that becomes the agent, with the socket at which it waits; None: one is forked."""
        pid = self.pids.next()
        log_path = os.path.join(self.home.texts["logs"], f"{pid}.log") if spec.detached else ""
        policy = restart.parse(spec.restart)
        again = policy.when is not restart.When.NO
        kept = again or spec.sandbox != "none"  # else nothing in it is needed any more
        letter = os.dup(fds[0]) if kept else -1
        try:
            ospid, report, memfd, bell = self._start(spec, pid, fds, log_path, spare)
        except OSError:
            if kept:
                os.close(letter)
            raise
        agent = Agent(
            pid=pid,
            ospid=ospid,
            spec=spec,
            restarts=restart.Restarts(policy) if again else None,
            letter=letter,
            pgid=spec.pgid or pid,
            started=time.time(),
            since=time.monotonic(),
            log=log_path,
            memfd=memfd,
            bell=bell,
            ppid=spec.ppid,
            nice=spec.nice,
            forked_at=time.monotonic(),
        )
        self.agents[pid] = self.children[ospid] = agent
        self.spawned.put(spec.key, pid)
        self.births.expect(Birth(agent, report, self.epoch))

    def _enrol(self, spec: link.Fork, fds: list[int]) -> None:
        """An agent without a process: a record, for the next kernel."""
        pid, now = self.pids.next(), time.monotonic()
        agent = Agent(
            pid=pid,
            ospid=0,
            spec=spec,
            letter=os.dup(fds[0]),
            pgid=pid,
            started=time.time(),
            since=now,
            log="",
            memfd=-1,
            bell=-1,
            ppid=spec.ppid,
            nice=spec.nice,
        )
        self.agents[pid] = agent
        self.spawned.put(spec.key, pid)
        self._tell(_forked(spec.key, agent))

    def _start(
        self, spec: link.Fork, pid: int, fds: list[int], log_path: str, spare: Spare | None = None
    ) -> tuple[int, socket.socket, int, int]:
        """`fds`: its letter, and what was given as its stdin, stdout and stderr. Returns its Linux pid, the socket of
        its report, and its channel: memfd and the kernel's end of the bell."""
        letter, *given = fds
        stdio, opened = self._stdio(spec, given, log_path)
        try:
            memfd, bell, agent_bell = make_channel(RING_BYTES, RING_BYTES)
            opened.append(agent_bell)
            try:
                home = self.home.texts["root"]
                if spare is None:
                    ospid, report = self.spares.start(spec, pid, home, stdio, memfd, agent_bell, letter)
                else:
                    ospid, report = spare
                    spares.tell(report, spec, pid, home, stdio, (memfd, agent_bell, letter))
            except OSError:
                opened += (memfd, bell)
                raise
        finally:
            for fd in opened:
                os.close(fd)
        return ospid, report, memfd, bell

    def _start_again(self, agent: Agent) -> None:
        """Start an agent again, as its restart policy requires, with the same pid and log."""
        agent.again = None
        if self.stopping:
            return
        try:
            if agent.spec.template is None:
                self._restart(agent)
            else:
                agent.again = self._order_again(agent, agent.spec.template)
        except OSError as err:
            self._not_again(agent, err.strerror or str(err))

    def _order_again(self, agent: Agent, template: wire.Template) -> Order:
        def done(ospid: int, sock: socket.socket) -> None:
            agent.again = None
            try:
                self._restart(agent, (ospid, sock))
            except OSError as err:
                sock.close()
                self._not_again(agent, err.strerror or str(err))

        return self.templates.order(template, done, lambda number, words: self._not_again(agent, words))

    def _restart(self, agent: Agent, spare: Spare | None = None) -> None:
        ospid, report, agent.memfd, agent.bell = self._start(agent.spec, agent.pid, [agent.letter], agent.log, spare)
        agent.ospid, agent.forked_at, agent.told_to_end = ospid, time.monotonic(), False
        self.children[ospid] = agent
        self.births.expect(Birth(agent, report, self.epoch))

    def _not_again(self, agent: Agent, why: str) -> None:
        if not self.stopping:
            logger.error("agent %d cannot be started again: %s", agent.pid, why)
            self._wait_for_start(agent, BACKOFF_S[1])

    def _wait_for_start(self, agent: Agent, seconds: float) -> None:
        agent.again = self.timers.after(seconds, lambda: self._start_again(agent))

    def _signal_waiting(self, agent: Agent, number: int) -> None:
        """To an agent that waits to be started again: what would end it ends the wait, STOP and CONT hold it. One that
        has no process at all ends in the same way."""
        if number in (*ENDING, signal.SIGKILL):
            agent.last_status = -number if agent.spec.outside else agent.last_status
            self._end_waiting(agent)
        elif agent.spec.outside:
            agent.stopped = number == signal.SIGSTOP or (agent.stopped and number != signal.SIGCONT)
        elif number == signal.SIGSTOP and agent.again is not None:
            agent.again.cancel()
            agent.again = None
        elif number == signal.SIGCONT and agent.again is None:
            self._wait_for_start(agent, 0.0)

    def _end_waiting(self, agent: Agent) -> None:
        """The agent is not started again; its last exit status remains."""
        if agent.again is not None:
            agent.again.cancel()
            agent.again = None
        agent.status = agent.last_status
        _drop(agent)
        self._tell(link.ChildExited(agent.pid, agent.status))

    def _stdio(self, spec: link.Fork, fds: list[int], log_path: str) -> tuple[tuple[int, int, int], list[int]]:
        """stdin, stdout, stderr of a new agent, and those of them that we opened and must close."""
        if len(fds) >= 3 and (spec.tty or not spec.detached):  # a detached one's terminal is held by a client
            return (fds[0], fds[1], fds[2]), []
        opened: list[int] = []
        try:
            parent = self.agents.get(spec.ppid)
            if parent is not None and parent.status is None and not spec.detached:
                with contextlib.suppress(OSError):  # the parent has closed its own: then as if detached
                    for number in range(3):
                        opened.append(fork.pidfd_getfd(parent.ospid, number))
                    return (opened[0], opened[1], opened[2]), opened
            opened.append(os.open(os.devnull, os.O_RDWR))
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            opened.append(os.open(log_path or os.devnull, flags, 0o600))
        except OSError:
            for fd in opened:
                os.close(fd)
            raise
        return (opened[-2], opened[-1], opened[-1]), opened

    def _on_signal(self, message: link.SendSignal, fds: list[int]) -> None:
        agent = self.agents.get(message.pid)
        served = message.key is not None and (message.key, message.pid) in self.signalled
        if agent is None or agent.status is not None:
            return
        if served:
            if message.signal in (signal.SIGSTOP, signal.SIGCONT):  # a dead kernel may have received the result
                self._tell(link.ChildStopped(agent.pid, agent.stopped))
            return
        if message.key is not None:
            self.signalled.put((message.key, message.pid), None)
        if not agent.ospid:
            self._signal_waiting(agent, message.signal)
            return
        if message.signal in ENDING:
            agent.told_to_end = True
        agent.meant = agent.meant or message.signal in (*ENDING, signal.SIGKILL)
        if message.signal == signal.SIGSTOP:
            # The agent itself first, the rest when it has stopped (see `_child_stopped`): a process between vfork and
            # its child's exec cannot stop while that child is stopped.
            with contextlib.suppress(PermissionError):  # it now belongs to another user
                os.kill(agent.ospid, signal.SIGSTOP)
        else:
            signal_tree(agent.ospid, message.signal)

    def _on_mark(self, message: link.Mark, fds: list[int]) -> None:
        agent = self.agents.get(message.pid)
        if agent is None:
            return
        if message.nice is not None:
            agent.nice = message.nice
        if message.ppid is not None:
            agent.ppid = message.ppid
        agent.budget = message.budget or agent.budget
        agent.reason = message.reason or agent.reason
        agent.reaped = agent.reaped or message.reaped
        if message.by is not None:
            self.replies.put(message.by, message.answer)

    def _on_forget(self, message: link.Forget, fds: list[int]) -> None:
        agent = self.agents.pop(message.pid, None)
        if agent is None:
            return
        if agent.status is None:
            raise Bug(f"agent {agent.pid} forgotten while alive")

    def _on_ready(self, message: link.Ready, fds: list[int]) -> None:
        if self.stopping:
            return
        if not self.served_once:
            self.served_once = True
            with contextlib.suppress(OSError):  # no room for the log file: no reason to stop serving
                print(
                    message.line, *(f"aiosd: {note}" for note in message.notes), sep="\n", file=sys.stderr, flush=True
                )
            notify.ready(self.settings, message.line, message.notes)

    def _on_shutdown(self, message: link.Shutdown, fds: list[int]) -> None:
        if message.error:
            self.exit_code = self._refuse(message.error)
        else:
            self.stop("asked to")

    def _on_set(self, message: link.Set, fds: list[int]) -> None:
        from aiosd.config import change

        self.settings = change(self.settings, message.name, message.value)
        log.set_level(self.settings.log_level)

    _ON_MESSAGE: ClassVar[dict[type, Callable[..., None]]] = {
        link.Fork: _on_fork,
        link.SendSignal: _on_signal,
        link.Mark: _on_mark,
        link.Forget: _on_forget,
        link.Ready: _on_ready,
        link.Shutdown: _on_shutdown,
        link.Set: _on_set,
    }

    # ── children ──────────────────────────────────────────────────────────────────────────────────────────

    def _reap(self) -> None:
        while True:
            try:
                ospid, status, used = os.wait4(-1, os.WUNTRACED | os.WCONTINUED | os.WNOHANG)
            except ChildProcessError:
                break
            if not ospid:
                break
            if os.WIFSTOPPED(status) or os.WIFCONTINUED(status):
                self._child_stopped(ospid, os.WIFSTOPPED(status))
            else:
                self._child_ended(ospid, os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime)
        if self.stopping:
            self._continue_stop()

    def _child_stopped(self, ospid: int, stopped: bool) -> None:
        """An agent has stopped or continued: do the same to all that it started, whatever caused it."""
        agent = self.children.get(ospid)
        if isinstance(agent, Agent):
            agent.stopped = stopped
            signal_tree(ospid, signal.SIGSTOP if stopped else signal.SIGCONT)
            self._tell(link.ChildStopped(agent.pid, stopped))

    def _child_ended(self, ospid: int, status: int, cpu_s: float) -> None:
        """Handles the end of every child. A child without a record was an orphan."""
        child = self.children.pop(ospid, None)
        if isinstance(child, Process):
            self._process_ended(child, status)
        elif isinstance(child, Template):
            self.templates.ended(child, restart.exit_in_words(status))
        elif isinstance(child, Server):
            self.servers.ended(child, restart.exit_in_words(status))
            self.orphans.ended()  # what it had started is ours now
        elif child is not None:
            child.cpu_s = cpu_s
            self._agent_ended(child, status)
        elif not self.spares.ended(ospid):
            self.orphans.ended()

    def _agent_ended(self, agent: Agent, status: int) -> None:
        self.births.ended(agent)
        os.close(agent.memfd)
        os.close(agent.bell)
        if agent.door >= 0:
            os.close(agent.door)
            agent.door = -1
        for fd in agent.gates:
            os.close(fd)
        agent.gates = ()
        agent.ended, agent.stopped = time.time(), False
        self.orphans.agent_ended(agent.ospid, agent.told_to_end)
        wait_s = self._wait_before_restart(agent, status)
        if wait_s is None:
            agent.status = status
            _drop(agent)
        else:
            agent.ospid, agent.last_status = 0, status
            self._wait_for_start(agent, wait_s)
            reason = restart.exit_in_words(status)
            logger.info("agent %d (%s) ended: %s; started again in %.1f s", agent.pid, agent.spec.name, reason, wait_s)
        self._tell(link.ChildExited(agent.pid, status, again_s=wait_s, cpu_s=agent.cpu_s))

    def _wait_before_restart(self, agent: Agent, status: int) -> float | None:
        """Seconds to wait; None: it is not started again."""
        if agent.restarts is None:
            return None
        meant = agent.meant or bool(agent.budget) or bool(self.stopping)
        return agent.restarts.after(status, time.monotonic() - agent.forked_at, meant)

    # ── the end ───────────────────────────────────────────────────────────────────────────────────────────

    def stop(self, why: str) -> None:
        """Begin to stop; a second call ends the wait for agents."""
        if self.stopping:
            self._kill_agents()
            return
        self.stopping = why
        self.spares.dismiss()
        self.templates.stop()
        logger.info("stopping (%s)", why)
        notify.stopping(self.settings)
        self._tell(link.Stop(why))
        for agent in [agent for agent in self.agents.values() if agent.status is None and not agent.ospid]:
            self._end_waiting(agent)
        for agent in self._live_agents():
            agent.told_to_end = True
            signal_tree(agent.ospid, signal.SIGTERM)
            signal_tree(agent.ospid, signal.SIGCONT)  # a stopped agent must be able to act on its TERM
        self.timers.after(self.settings.stop_timeout_s, self._kill_agents)
        self._continue_stop()

    def _kill_agents(self) -> None:
        agents = self._live_agents()
        for agent in agents:
            signal_tree(agent.ospid, signal.SIGKILL)
        self._watch_killed(len(agents))
        self._continue_stop()

    def _watch_killed(self, left: int) -> None:
        """Wait as long as their number falls: thousands take time to die, but one of another user never dies."""

        def look() -> None:
            alive = len(self._live_agents())
            if not alive:
                return
            if alive >= left:
                self._give_up()
            else:
                self._watch_killed(alive)

        self.timers.after(LAST_WAIT_S, look)

    def _continue_stop(self) -> None:
        """Agents first, so that the kernel can reply to processes that wait for them; then orphans that still have time
        to end; then the system's own processes."""
        if self.exit_code is not None or self._live_agents():
            return
        if self.orphans.any():
            self.timers.after(ORPHANS_LOOK_S, self._continue_stop)
            return
        own = [process for process in (self.kernel, *self.services.values()) if process.ospid]
        if not own:
            self.exit_code = 0
            return
        step = min(process.service.stopped for process in own)
        if self.last_step is None or step > self.last_step:
            self.last_step = step
            self._end_step([process for process in own if process.service.stopped is step])

    def _end_step(self, processes: list[Process]) -> None:
        for process in processes:
            if process is self.kernel:
                self._tell(link.Stop(self.stopping, last=True))
            else:
                os.kill(process.ospid, signal.SIGTERM)
        self.timers.after(LAST_WAIT_S, lambda: self._step_over(processes))

    def _step_over(self, processes: list[Process]) -> None:
        """Whether or not all of them have ended: the next step follows."""
        if self.kernel in processes:
            self._give_up()
        for process in processes:
            if process.ospid:
                logger.warning("%s has not ended in time; killed", _title(process))
                os.kill(process.ospid, signal.SIGKILL)

    def _give_up(self) -> None:
        logger.warning("not all has ended in time; killed")
        self.exit_code = 0


def _title(process: Process) -> str:
    return process.service.shown


def _forked(key: link.Key, agent: Agent) -> link.Forked:
    return link.Forked(key, agent.pid, agent.ospid, agent.pgid, agent.started, agent.since, agent.log)


def _drop(agent: Agent) -> None:
    """The letter of an agent that is not started again."""
    if agent.letter >= 0:
        os.close(agent.letter)
        agent.letter = -1


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _ring(bell: int) -> None:
    with contextlib.suppress(OSError):  # full: the process is awake; broken: it is about to be reaped
        os.write(bell, b"\0")


def _backoff(last_s: float, lived_s: float) -> float:
    """Twice the last wait, minus a part of its lifetime, within bounds. So a process that is killed now and then is
    back at once, and one that dies at every start costs little."""
    first, longest = BACKOFF_S
    return max(first, min(2 * last_s - PAYS_OFF * lived_s, longest))


def _preload() -> None:
    """Import what agents use, and run it once, before they are forked."""
    import asyncio  # noqa: F401
    import runpy  # noqa: F401

    import libaios.aio  # noqa: F401
    from aiosd.birth import rehearsal

    rehearsal.warm_up()


def main(settings: Settings, listener: socket.socket, guardian: int, heartbeat: int) -> int:
    """Entry of the supervisor process, forked by the guardian."""
    os.setsid()  # so that the terminal's signals go to the guardian alone
    fork.name_process("aios:supervisor")
    fork.prctl(fork.PR_SET_CHILD_SUBREAPER, 1)
    log.setup("supervisor", settings.log_level)
    supervisor = Supervisor(settings, listener, guardian, heartbeat)
    fork.die_with_parent(guardian, GUARDIAN_DIED)
    return supervisor.run()
