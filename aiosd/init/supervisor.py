"""The supervisor: init of the system. It forks everything, reaps everything, and owns every channel.

One thread, few imports, no rings mapped, no model: so a fork is cheap, and this process is unlikely to die. It never
waits for another process, nor for a disk, and it passes on data of single agents without reading them
(`aiosd.ipc.letter`). All that must survive the kernel is in its records: `Agent` and `SystemProcess` (the kernel, and
one for each service). A new kernel is forked with copies of them and needs no other source. `children` has the record
of every live child; the end of every child is handled in one place (`_child_ended`). Its work for agents is in
`agents`.

It answers two kinds of events: messages from the kernel (`link.ToSupervisor`) and signals.

    SIGCHLD           reap: an agent, the kernel, a service; any other child is an orphan of an agent (`orphans`)
    SIGTERM, SIGINT   stop the system: TERM to agents, KILL after a while, then kernel and services, exit 0
    SIGHUP            read the settings again
    SIGUSR1           the guardian died (this is the parent-death signal): end everything at once

The supervisor sends the guardian a heartbeat.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from aiosd import kin, procfs
from aiosd.birth import confinement, fork, gates, modules
from aiosd.birth.server import House
from aiosd.birth.spares import Spares
from aiosd.init import apart, environment, notify, restart, services
from aiosd.init.agents import AgentSupervisor
from aiosd.init.kernellink import KernelLink
from aiosd.init.orphans import Orphans
from aiosd.init.pids import PidCounter
from aiosd.init.records import BACKOFF_S, Agent, Inheritance, SystemProcess
from aiosd.init.servers import McpServerPool, ServerProcess
from aiosd.init.signals import SignalInfo, describe_sender, open_signals, read_signals, signal_name
from aiosd.init.sweep import sweep
from aiosd.init.templates import TemplatePool, TemplateProcess
from aiosd.ipc import link
from aiosd.ipc.heartbeat import BEAT_S, Heart, Rounds, beat, beat_in_background
from aiosd.ipc.service import ServiceSpec, Stopped
from aiosd.logs import processlog
from aiosd.sandbox import cage
from aiosd.sandbox.box import LEVELS
from aiosd.sandbox.probe import Offer
from aiosd.timers import Timers
from libaios.channel import Channel, Side, make_channel, raise_epoch

if TYPE_CHECKING:
    from aiosd.config import Settings

logger = logging.getLogger("supervisor")

SERVICE_RING_BYTES = 1 << 20  # between kernel and service: a step of 256 sequences is one frame
BOOT_TRIES = 3  # deaths of a kernel that has never been ready
PAYS_OFF = 0.2  # each second of life shortens the next wait by this number of seconds
LAST_WAIT_S = 2.0  # for kernel and services at the end
ORPHANS_LOOK_S = 0.05  # at the end, between two searches for orphans
GUARDIAN_DIED = signal.SIGUSR1
ORDERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SIGNALS = (signal.SIGCHLD, *ORDERS, GUARDIAN_DIED)
Child = Agent | SystemProcess | TemplateProcess | ServerProcess
KERNEL = ServiceSpec("kernel", kind="", entry="")  # forked by `_fork_kernel`


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
        self.children: dict[int, Child] = {}  # live ones, by Linux pid
        self.kernel = SystemProcess(KERNEL, 0)
        self.guardian_pid = 0
        self.services: dict[str, SystemProcess] = {}
        self.link = KernelLink(self.epoll, self.kernel)
        self.orphans = Orphans(self.timers, self._known_children, settings.stop_timeout_s, settings.orphans == "term")
        self.templates = TemplatePool(
            self.epoll, self.timers, self.children, self.pids.next, self._send_templates, settings.template_idle_s
        )
        self.servers = McpServerPool(
            self.epoll, self.children, self._house, self.pids.next, lambda shown: self.link.send(link.McpServers(shown))
        )
        self.spares = Spares(self.timers)
        self.agents = AgentSupervisor(
            self.home,
            self.epoll,
            self.timers,
            self.children,
            self.pids,
            self.link,
            self.orphans,
            self.templates,
            self.spares,
        )
        self.served_once = False  # the system has been ready
        self._act: dict[type, Callable[[Any, list[int]], None]] = {
            link.Fork: self.agents.on_fork,
            link.SendSignal: self.agents.on_signal,
            link.Mark: self.agents.on_mark,
            link.Forget: self.agents.on_forget,
            link.Ready: self._on_ready,
            link.Shutdown: self._on_shutdown,
            link.SettingChanged: self._on_set,
        }
        # the end
        self.stopping = ""
        self.last_step: Stopped | None = None  # which of aiosd's own processes have been ordered to end
        self.exit_code: int | None = None
        self.signals = open_signals(SIGNALS)
        self.journal = (os.memfd_create("aios-journal"), os.memfd_create("aios-journal"))
        self.ledger = os.memfd_create("aios-ledger")
        self.environment = environment.hide()
        self.offer = Offer("none")  # the sandbox that this machine can do

    def _known_children(self) -> set[int]:
        return {*self.children, *self.spares.ospids()}

    def _send_templates(self) -> None:
        self.link.send(link.Templates(self.templates.shown()))

    def _house(self) -> House:
        data = self.home.data
        return House(self.offer.level, self.settings.strict, str(data), str(data / "servers"))

    # ── life ──────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> int:
        """Boot, serve until the system is stopped, leave nothing behind. Returns aiosd's exit code."""
        self.epoll.register(self.signals, select.EPOLLIN)
        for service in services.of(self.settings, self.servers.theirs.fileno()):
            self.services[service.name] = SystemProcess(service, self.pids.next())
        self.kernel.pid, self.guardian_pid = self.pids.next(), self.pids.next()
        self.offer = confinement.prepare(gates.of(self.settings.door))
        if self.settings.strict and self.offer.level != LEVELS[-1]:
            return self._refuse(f"sandbox strict: {self.offer.reason}")
        # Those that the system waits for first: they load while this process prepares what agents share.
        self._fork_services(awaited=True)
        _preload()
        self._fork_kernel()
        self._fork_services(awaited=False)
        self._beat()
        while self.exit_code is None:
            self._turn()
        sweep(meanwhile=lambda: beat(self.heartbeat))
        self._release_pids()
        return self.exit_code

    def _release_pids(self) -> None:
        """The last step, which waits for the disk. Nothing is forked any more, so a thread may send heartbeats
        meanwhile."""
        rounds = Rounds()
        rounds.begin()
        beat_in_background(self.heartbeat, rounds)
        try:
            self.pids.release()
        except OSError as err:  # a full disk: numbers are wasted, but none is repeated
            logger.warning("pids: %s", err)

    def _refuse(self, error: str) -> int:
        """Do not start; returns the exit code."""
        print(f"aiosd: {error}", file=sys.stderr, flush=True)
        notify.failed(self.settings, error)
        return 1

    def _turn(self) -> None:
        for fd, _ in self.epoll.poll(self.timers.until_next()):
            if fd == self.signals:
                self._on_signals(read_signals(fd))
            elif self.link.is_at(fd):
                self._on_kernel()
            elif not self.templates.look(fd) and not self.servers.look(fd):
                self.agents.look(fd)
        self.timers.run_due()

    def _beat(self) -> None:
        """Once a second: send a heartbeat to the guardian, and check the heartbeats of the others."""
        self.timers.after(BEAT_S, self._beat)
        beat(self.heartbeat)
        for process in (self.kernel, *self.services.values()):
            silent_s, ospid, heart = process.service.silent_s, process.ospid, process.heart
            if ospid and heart is not None and heart.hangs(silent_s=silent_s, ospid=ospid):
                logger.error("%s hangs (no heartbeat for %g s); killed", _title(process), silent_s)
                os.kill(ospid, signal.SIGKILL)

    def _on_signals(self, received: list[SignalInfo]) -> None:
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
                # What the guardian passes on it has logged itself, with its sender.
                sender = "" if one.sender == self.guardian else f" {describe_sender(one.sender)}"
                self.stop(f"{signal_name(one.number)}{sender}")

    def _is_refused(self, one: SignalInfo) -> bool:
        """Signals are obeyed from the guardian, or from Linux itself, and from no other process: most others come from
        agents (`kill $PPID`). A user has the guardian's number, and `aiosd stop`."""
        if one.sender in (0, self.guardian):
            return False
        agent, sender = self._agent_above(one.sender), describe_sender(one.sender)
        whose = f", which belongs to agent {agent.pid}" if agent is not None else ""
        logger.warning("%s %s%s: ignored; to stop: aiosd stop", signal_name(one.number), sender, whose)
        return True

    def _agent_above(self, ospid: int) -> Agent | None:
        """The agent that a process is or descends from; None: there is none, or it cannot be found any more."""
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
        """SIGHUP: some settings can change in a running system (`config.keys.LIVE`); the rest needs a restart, which
        the log reports."""
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
        processlog.set_level(self.settings.log_level)
        self.link.send(
            link.Reread(self.settings.log_level, self.settings.schedule(), self.settings.access, dict(report))
        )

    # ── the kernel ────────────────────────────────────────────────────────────────────────────────────────

    def _fork_kernel(self) -> None:
        """Raises OSError, and leaves nothing behind, when Linux has no process or descriptor to give."""
        with contextlib.ExitStack() as undo:
            heart = Heart()
            undo.callback(heart.close)
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            undo.callback(ours.close)
            undo.callback(theirs.close)
            self.link.epoch += 1
            ospid = self._fork_kernel_with(heart, theirs)
            undo.pop_all()
        self._forked(self.kernel, ospid, heart)
        theirs.close()
        self.link.open(ours)

    def _fork_kernel_with(self, heart: Heart, theirs: socket.socket) -> int:
        running = [process for process in self.services.values() if process.ospid]
        inheritance = Inheritance(
            boot=self.boot,
            settings=self.settings,
            listener=self.listener.fileno(),
            link=theirs.fileno(),
            heartbeat=heart.write,
            epoch=self.link.epoch,
            pids={"guardian": self.guardian_pid, "supervisor": 1, "kernel": self.kernel.pid},
            guardian=self.guardian,
            started=self.started,
            since=self.since,
            journal=self.journal,
            ledger=self.ledger,
            memo=self.agents.replies,
            ready=self.served_once,
            offer=self.offer,
            agents=list(self.agents.records.values()),
            services=list(self.services.values()),
            templates=self.templates.shown(),
            servers=self.servers.shown(),
        )
        keep = [self.listener.fileno(), theirs.fileno(), heart.write, *self.journal, self.ledger]
        keep += [fd for agent in self.agents.live() for fd in (agent.memfd, agent.bell)]
        keep.append(self.settings.sealed)
        keep += [self.settings.passages.kernel] if self.settings.passages is not None else []
        keep += [fd for agent in self.agents.records.values() for fd in (agent.letter, agent.door, *agent.gates)]
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
        """A new kernel inherits every channel; because of the raised epoch each peer submits its open calls again."""
        if self.stopping:
            return
        agents = self.agents.live()
        running = [process for process in self.services.values() if process.ospid]
        for memfd in [*(agent.memfd for agent in agents), *(process.memfd for process in running)]:
            raise_epoch(memfd)
        try:
            self._fork_kernel()
        except OSError as err:  # no process or descriptor left: try again until there is
            self._try_again(self.kernel, err, self._refork_kernel)
            return
        for bell in [*(agent.bell for agent in agents), *(process.kernel_bell for process in running)]:
            _ring(bell)
        logger.warning("kernel forked again (death %d)", self.kernel.deaths)

    # ── services ──────────────────────────────────────────────────────────────────────────────────────────

    def _fork_services(self, awaited: bool) -> None:
        for process in self.services.values():
            if process.service.awaited is awaited:
                self._fork_service(process)

    def _fork_service(self, process: SystemProcess) -> None:
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
            self._try_again(process, err, lambda: self._fork_service(process))
            return
        self._forked(process, ospid, heart)
        forked = link.ServiceForked(process.service.name, process.pid, ospid, process.deaths)
        self.link.send(forked, (process.memfd, process.kernel_bell))

    def _fork_service_with(self, process: SystemProcess, heart: Heart) -> int:
        def child() -> int:
            os.setsid()
            environment.restore(self.environment)
            modules.show()
            fork.name_process(f"aios:{_title(process)}")
            cage_fds = cage.descriptors() if process.service.confines else ()
            fork.keep_only((process.memfd, process.own_bell, heart.write, *process.service.keep, *cage_fds))
            rounds = Rounds()
            beat_in_background(heart.write, rounds)
            processlog.setup(_title(process), self.settings.log_level)
            return process.service.main(Channel(process.memfd, process.own_bell, Side.KERNEL), rounds)

        return fork.fork(child)

    # ── life and death of aiosd's own processes ───────────────────────────────────────────────────────────

    def _forked(self, process: SystemProcess, ospid: int, heart: Heart) -> None:
        process.ospid, process.heart, process.forked_at = ospid, heart, time.monotonic()
        heart.forked()
        self.children[ospid] = process

    def _try_again(self, process: SystemProcess, err: OSError, fork_it: Callable[[], None]) -> None:
        """Soon, and less often from time to time: there may be room again at any moment."""
        process.backoff_s = _backoff(process.backoff_s, lived_s=0.0)
        logger.error("%s cannot be forked: %s; tried again in %.1f s", _title(process), err.strerror, process.backoff_s)
        self.timers.after(process.backoff_s, fork_it)

    def _process_ended(self, process: SystemProcess, status: int) -> None:
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
            while self.link.is_open:  # what it had sent before is still carried out
                self._on_kernel()
        if not self.stopping and self.exit_code is None:
            self._replace(process, restart.exit_in_words(status))

    def _replace(self, process: SystemProcess, reason: str) -> None:
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
            self.link.send(link.ServiceDied(process.service.name, reason))
            self.timers.after(process.backoff_s, lambda: self._fork_service(process))

    # ── messages from the kernel ──────────────────────────────────────────────────────────────────────────

    def _on_kernel(self) -> None:
        for message, fds in self.link.receive():
            try:
                self._act[type(message)](message, fds)
            finally:
                for fd in fds:
                    os.close(fd)

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

    def _on_set(self, message: link.SettingChanged, fds: list[int]) -> None:
        from aiosd.config import change

        self.settings = change(self.settings, message.name, message.value)
        processlog.set_level(self.settings.log_level)

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
        agent = self.children.get(ospid)
        if isinstance(agent, Agent):
            self.agents.stopped(agent, stopped)

    def _child_ended(self, ospid: int, status: int, cpu_s: float) -> None:
        """Handles the end of every child. A child without a record was an orphan."""
        child = self.children.pop(ospid, None)
        if isinstance(child, SystemProcess):
            self._process_ended(child, status)
        elif isinstance(child, TemplateProcess):
            self.templates.ended(child, restart.exit_in_words(status))
        elif isinstance(child, ServerProcess):
            self.servers.ended(child, restart.exit_in_words(status))
            self.orphans.ended()  # processes that it had started are children of the supervisor now
        elif child is not None:
            child.cpu_s = cpu_s
            self.agents.ended(child, status)
        elif not self.spares.ended(ospid):
            self.orphans.ended()

    # ── the end ───────────────────────────────────────────────────────────────────────────────────────────

    def stop(self, why: str) -> None:
        """Begin to stop; a second call ends the wait for agents."""
        if self.stopping:
            self._kill_agents()
            return
        self.stopping = why
        self.templates.stop()
        logger.info("stopping (%s)", why)
        notify.stopping(self.settings)
        self.link.send(link.Stop(why))
        self.agents.stop()
        self.timers.after(self.settings.stop_timeout_s, self._kill_agents)
        self._continue_stop()

    def _kill_agents(self) -> None:
        self._watch_killed(self.agents.kill())
        self._continue_stop()

    def _watch_killed(self, left: int) -> None:
        """Wait as long as their number falls: thousands take time to die, but one of another user never dies."""

        def look() -> None:
            alive = len(self.agents.live())
            if not alive:
                return
            if alive >= left:
                self._give_up()
            else:
                self._watch_killed(alive)

        self.timers.after(LAST_WAIT_S, look)

    def _continue_stop(self) -> None:
        """The order of the end: agents first, so that the kernel can reply to processes that wait for them; then
        orphans that still have time to end; then the system's own processes."""
        if self.exit_code is not None or self.agents.live():
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

    def _end_step(self, processes: list[SystemProcess]) -> None:
        for process in processes:
            if process is self.kernel:
                self.link.send(link.Stop(self.stopping, last=True))
            else:
                os.kill(process.ospid, signal.SIGTERM)
        self.timers.after(LAST_WAIT_S, lambda: self._step_over(processes))

    def _step_over(self, processes: list[SystemProcess]) -> None:
        """Go on with the next step, whether or not all of these processes have ended."""
        if self.kernel in processes:
            self._give_up()
        for process in processes:
            if process.ospid:
                logger.warning("%s has not ended in time; killed", _title(process))
                os.kill(process.ospid, signal.SIGKILL)

    def _give_up(self) -> None:
        logger.warning("not all has ended in time; killed")
        self.exit_code = 0


def _title(process: SystemProcess) -> str:
    return process.service.shown


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
    kin.adopt_orphans()
    processlog.setup("supervisor", settings.log_level)
    supervisor = Supervisor(settings, listener, guardian, heartbeat)
    kin.die_with_parent(guardian, GUARDIAN_DIED)
    return supervisor.run()
