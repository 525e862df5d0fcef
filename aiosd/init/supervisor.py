"""The supervisor: init of the system. It forks everything, reaps everything, and owns every channel.

One thread, few imports, no rings mapped, no model: so that a fork is cheap and nothing in here is likely to
die. All that must survive the kernel lies in its records: `Agent` (who it is, its channel, its exit status
until that is collected) and `Core`. A new kernel is forked with copies of them and needs no other source.

It answers two kinds of events: messages from the kernel (`link.ToSupervisor`) and signals.

    SIGCHLD           reap: an agent, the kernel, a core; whatever else falls to us is the orphan of a dead
                      agent and is killed (see `spawn`: a live agent keeps its descendants)
    SIGTERM, SIGINT   stop the system: TERM to agents, KILL after a while, then kernel and cores, exit 0
    SIGHUP            read the settings again
    SIGUSR1           the guardian died (our parent-death signal): end everything at once

The guardian hears a heartbeat from here; the supervisor in its turn never waits for anybody.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import select
import signal
import socket
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import msgspec

from aiosd import link, log, procfs
from aiosd.birth import fork, modules
from aiosd.birth.spares import Spares
from aiosd.errors import Bug
from aiosd.heartbeat import BEAT_S, HANG_S, Heart, Rounds, beat, beat_in_background
from aiosd.init import notify
from aiosd.init.births import Birth, Births
from aiosd.init.pids import PidCounter
from aiosd.init.records import BACKOFF_S, Agent, Core, Inheritance
from aiosd.init.sweep import sweep
from aiosd.timers import Timers
from libaios.channel import make_channel, raise_epoch
from libaios.stream import FrameSocket

if TYPE_CHECKING:
    from aiosd.config import Settings

logger = logging.getLogger("supervisor")

RING_BYTES = 1 << 16  # of each direction between an agent and the kernel
CORE_RING_BYTES = 1 << 20  # between kernel and core: a step of 256 sequences is one frame
BOOT_TRIES = 3  # deaths of a kernel that has never been ready
PAYS_OFF = 0.2  # a second of life takes so many seconds off the wait after it
LAST_WAIT_S = 2.0  # for kernel and cores at the end
SIGNALS_REMEMBERED = 4096
GUARDIAN_DIED = signal.SIGUSR1


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
        self.pids = PidCounter(self.home.data / "last-pid")
        # processes
        self.agents: dict[int, Agent] = {}  # by pid, live and dead until forgotten
        self.by_ospid: dict[int, Agent] = {}  # live ones
        self.spares = Spares(self.timers)
        self.births = Births(self.epoll, self.timers, self._born)
        self.served: dict[link.Key, int] = {}  # spawn requests by key: the same request names the same agent
        self.signalled: OrderedDict[tuple[link.Key, int], None] = OrderedDict()  # KILL calls served, and on whom
        self.cores: dict[str, Core] = {}
        self.kernel_pid = 0
        self.kernel_ospid = 0
        self.kernel_heart: Heart | None = None
        self.kernel_deaths = 0
        self.kernel_forked_at = 0.0
        self.kernel_backoff_s = BACKOFF_S[0]
        self.kernel: FrameSocket | None = None
        self.served_once = False  # the system has been ready
        self.epoch = 0
        # the end
        self.stopping = ""
        self.exit_code: int | None = None
        self.wakeup = _signal_pipe()
        self.journal = (os.memfd_create("aios-journal"), os.memfd_create("aios-journal"))
        self.ledger = os.memfd_create("aios-ledger")

    # ── life ──────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> int:
        """Boot, serve until told to stop, leave nothing behind. Returns aiosd's exit code."""
        self.epoll.register(self.wakeup, select.EPOLLIN)
        self._make_cores()
        self.kernel_pid = self.pids.next()
        _preload()
        self._fork_kernel()
        for core in self.cores.values():
            self._fork_core(core)
        self._beat()
        while self.exit_code is None:
            self._turn()
        sweep(meanwhile=lambda: beat(self.heartbeat))
        with contextlib.suppress(OSError):  # a full disk: numbers are wasted, none is repeated
            self.pids.release()
        return self.exit_code

    def _turn(self) -> None:
        for fd, _ in self.epoll.poll(self.timers.until_next()):
            if fd == self.wakeup:
                self._on_signals()
            elif self.kernel is not None and fd == self.kernel.fileno():
                self._on_kernel(self.kernel)
            else:
                self.births.look(fd)
        self.timers.run_due()

    def _beat(self) -> None:
        """Once a second: say that we live, and listen whether the others do."""
        self.timers.after(BEAT_S, self._beat)
        beat(self.heartbeat)
        watched = [(self.kernel_ospid, self.kernel_heart, "kernel")]
        watched += [(core.ospid, core.heart, f"llm core {core.model.name}") for core in self.cores.values()]
        for ospid, heart, name in watched:
            if ospid and heart is not None and heart.hangs():
                logger.error("%s hangs (no heartbeat for %.0f s); killed", name, HANG_S)
                os.kill(ospid, signal.SIGKILL)

    def _on_signals(self) -> None:
        with contextlib.suppress(BlockingIOError):
            received = set(os.read(self.wakeup, 4096))
            if GUARDIAN_DIED in received:
                logger.critical("the guardian died; ending everything")
                self.exit_code = 1
                return
            if signal.SIGCHLD in received:
                self._reap()
            if received & {signal.SIGTERM, signal.SIGINT} or (signal.SIGHUP in received and self._terminal_gone()):
                self.stop("signal")
            elif signal.SIGHUP in received:
                self._reload()

    def _terminal_gone(self) -> bool:
        """Was this aiosd started in the foreground of a terminal that has been closed?"""
        return self._on_terminal and not os.isatty(2)

    def _reload(self) -> None:
        """SIGHUP: some settings can change in a running system (`config.LIVE`); the rest is said to need a restart."""
        from aiosd.config import reload

        try:
            self.settings, needs_restart = reload(self.settings)
        except Exception as err:  # a broken file must not take a running system down
            logger.error("settings not read again: %s", err)
            return
        log.set_level(self.settings.log_level)
        self._tell(link.Reread(self.settings.log_level, self.settings.schedule()))
        logger.info("settings read again%s", f"; after a restart: {', '.join(needs_restart)}" if needs_restart else "")

    # ── kernel and cores ──────────────────────────────────────────────────────────────────────────────────

    def _make_cores(self) -> None:
        for model in self.settings.models:
            self.cores[model.name] = Core(model, self.pids.next())

    def _fork_kernel(self) -> None:
        """Raises OSError, and leaves nothing behind, when Linux has no process or descriptor to give."""
        with contextlib.ExitStack() as undo:
            heart = Heart()
            undo.callback(heart.close)
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            undo.callback(ours.close)
            undo.callback(theirs.close)
            self.epoch += 1
            self.kernel_ospid = self._fork_kernel_with(heart, theirs)
            undo.pop_all()
        self.kernel_heart = heart
        self.kernel_forked_at = time.monotonic()
        heart.forked()
        theirs.close()
        ours.setblocking(False)
        self.kernel = FrameSocket(ours)
        self.epoll.register(ours.fileno(), select.EPOLLIN)

    def _fork_kernel_with(self, heart: Heart, theirs: socket.socket) -> int:
        inheritance = Inheritance(
            boot=self.boot,
            settings=self.settings,
            listener=self.listener.fileno(),
            link=theirs.fileno(),
            heartbeat=heart.write,
            epoch=self.epoch,
            pids={"supervisor": 1, "kernel": self.kernel_pid},
            guardian=self.guardian,
            started=self.started,
            since=self.since,
            journal=self.journal,
            ledger=self.ledger,
            ready=self.served_once,
            agents=list(self.agents.values()),
            cores=[core for core in self.cores.values() if core.ospid],
        )
        keep = [self.listener.fileno(), theirs.fileno(), heart.write, *self.journal, self.ledger]
        keep += [fd for agent in self.agents.values() if agent.status is None for fd in (agent.memfd, agent.bell)]
        keep += [fd for core in inheritance.cores for fd in (core.memfd, core.kernel_bell)]

        def child() -> int:
            os.setsid()
            modules.show()
            fork.name_process("aios:kernel")
            fork.keep_only(keep)
            from aiosd.kernel.loop import main

            return main(inheritance)

        return fork.fork(child)

    def _fork_core(self, core: Core) -> None:
        if self.stopping or core.ospid:
            return
        try:
            with contextlib.ExitStack() as undo:
                heart = Heart()
                undo.callback(heart.close)
                # The core serves the channel and the kernel submits, as an agent does to the kernel.
                core.memfd, core.core_bell, core.kernel_bell = make_channel(CORE_RING_BYTES, CORE_RING_BYTES)
                for fd in (core.memfd, core.core_bell, core.kernel_bell):
                    undo.callback(os.close, fd)
                core.ospid = self._fork_core_with(core, heart)
                undo.pop_all()
        except OSError as err:
            name, wait_s = core.model.name, BACKOFF_S[1]
            logger.error("llm core %s cannot be forked: %s; tried again in %.1f s", name, err.strerror, wait_s)
            self.timers.after(wait_s, lambda: self._fork_core(core))
            return
        core.heart = heart
        heart.forked()
        core.forked_at = time.monotonic()
        forked = link.CoreForked(core.model.name, core.pid, core.ospid, core.deaths)
        self._tell(forked, (core.memfd, core.kernel_bell))

    def _fork_core_with(self, core: Core, heart: Heart) -> int:
        def child() -> int:
            os.setsid()
            modules.show()
            fork.name_process(f"aios:{_core_name(self.cores, core.model.name)}")
            fork.keep_only((core.memfd, core.core_bell, heart.write))
            rounds = Rounds()
            beat_in_background(heart.write, rounds)
            log.setup(_core_name(self.cores, core.model.name), self.settings.log_level)
            from aiosd.llm.core import main
            from libaios.channel import Channel, Side

            return main(Channel(core.memfd, core.core_bell, Side.KERNEL), core.model, rounds)

        return fork.fork(child)

    def _kernel_died(self, status: int) -> None:
        self.kernel_ospid = 0
        if self.kernel_heart is not None:
            self.kernel_heart.close()
            self.kernel_heart = None
        while self.kernel is not None:  # what it had decided and sent counts
            self._on_kernel(self.kernel)
        if self.stopping:
            return
        self.kernel_deaths += 1
        reason = fork.describe(status)
        if not self.served_once and self.kernel_deaths >= BOOT_TRIES:
            self._on_shutdown(link.Shutdown(error="the kernel does not start; its log above says why"), [])
            return
        self.kernel_backoff_s = _backoff(self.kernel_backoff_s, time.monotonic() - self.kernel_forked_at)
        logger.error("kernel died (%s); forked again in %.1f s", reason, self.kernel_backoff_s)
        self.timers.after(self.kernel_backoff_s, self._refork_kernel)

    def _refork_kernel(self) -> None:
        """A new kernel inherits every channel; the raised epoch tells each peer to submit its open calls again."""
        if self.stopping:
            return
        for agent in self.by_ospid.values():
            raise_epoch(agent.memfd)
        for core in self.cores.values():
            if core.ospid:
                raise_epoch(core.memfd)
        try:
            self._fork_kernel()
        except OSError as err:  # no process or descriptor left: it is tried until there is
            logger.error("kernel cannot be forked: %s; tried again in %.1f s", err.strerror, BACKOFF_S[1])
            self.timers.after(BACKOFF_S[1], self._refork_kernel)
            return
        for agent in self.by_ospid.values():
            _ring(agent.bell)
        for core in self.cores.values():
            if core.ospid:
                _ring(core.kernel_bell)
        logger.warning("kernel forked again (death %d)", self.kernel_deaths)

    def _core_died(self, core: Core, status: int) -> None:
        core.ospid = 0
        core.deaths += 1
        for fd in (core.memfd, core.kernel_bell, core.core_bell):
            os.close(fd)
        if core.heart is not None:
            core.heart.close()
            core.heart = None
        if self.stopping:
            return
        core.backoff_s = _backoff(core.backoff_s, time.monotonic() - core.forked_at)
        reason = fork.describe(status)
        # At boot the kernel says in one line what that means.
        level = logging.ERROR if self.served_once else logging.DEBUG
        logger.log(level, "llm core %s died (%s); forked again in %.1f s", core.model.name, reason, core.backoff_s)
        self._tell(link.CoreDied(core.model.name, reason, core.backoff_s))
        self.timers.after(core.backoff_s, lambda: self._fork_core(core))

    def _tell(self, message: link.FromSupervisor, fds: tuple[int, ...] = ()) -> None:
        """To the kernel. Without one the message is not lost: the next is born with the records. One that has just died
        may have left messages of its own, so the link stays until all of it is read."""
        if self.kernel is None or not self.kernel_ospid:
            return
        with contextlib.suppress(OSError):
            self.kernel.send(link.encode(message), fds)
            self._watch_kernel()

    def _watch_kernel(self) -> None:
        if self.kernel is not None:
            events = select.EPOLLIN | (select.EPOLLOUT if self.kernel.pending else 0)
            self.epoll.modify(self.kernel.fileno(), events)

    def _close_kernel_link(self) -> None:
        if self.kernel is not None:
            self.epoll.unregister(self.kernel.fileno())
            self.kernel.close()
            self.kernel = None

    # ── messages from the kernel ──────────────────────────────────────────────────────────────────────────

    def _on_kernel(self, kernel: FrameSocket) -> None:
        with contextlib.suppress(OSError):  # it died; what it has said still counts
            if self.kernel_ospid:
                kernel.flush()
        try:
            frames = kernel.receive()
        except (OSError, EOFError):
            self._close_kernel_link()
            return
        for payload, fds in frames:
            try:
                message = link.decode_to_supervisor(payload)
                self._ON_MESSAGE[type(message)](self, message, fds)
            finally:
                for fd in fds:
                    os.close(fd)
        self._watch_kernel()

    def _on_fork(self, message: link.Fork, fds: list[int]) -> None:
        known = self.agents.get(self.served.get(message.key, 0))
        if known is not None:
            if self.births.claim(known, self.epoch):
                return  # it is answered when the birth is over
            self._tell(_forked(message.key, known))
            return
        try:
            if self.stopping:
                raise OSError(errno.EAGAIN, "aiosd is shutting down")
            self._spawn(message, fds)
        except OSError as err:
            self._tell(link.ForkFailed(message.key, err.errno or 5, err.strerror or str(err)))

    def _born(self, birth: Birth) -> None:
        """An agent runs, or cannot start: only now the kernel is answered. One that was forked during the birth has
        inherited the agent, and asks again."""
        agent = birth.agent
        if birth.refusal is None:
            if birth.epoch == self.epoch:
                self._tell(_forked(agent.spec.key, agent), () if birth.claimed else (agent.memfd, agent.bell))
            return
        if birth.epoch == self.epoch:
            self._tell(link.ForkFailed(agent.spec.key, *birth.refusal))
        self.agents.pop(agent.pid, None)
        self.served.pop(agent.spec.key, None)
        if agent.log:
            with contextlib.suppress(OSError):
                os.unlink(agent.log)

    def _spawn(self, spec: link.Fork, fds: list[int]) -> None:
        pid = self.pids.next()
        log_path = str(self.home.logs / f"{pid}.log") if spec.detached else ""
        stdio, opened = self._stdio(spec, fds, log_path)
        try:
            memfd, bell, agent_bell = make_channel(RING_BYTES, RING_BYTES)
            opened.append(agent_bell)
            try:
                ospid, report = self.spares.start(spec, pid, str(self.home.root), stdio, memfd, agent_bell)
            except OSError:
                opened += (memfd, bell)
                raise
        finally:
            for fd in opened:
                os.close(fd)
        agent = Agent(
            pid=pid,
            ospid=ospid,
            spec=msgspec.structs.replace(spec, env={}),
            pgid=spec.pgid or pid,
            started=time.time(),
            since=time.monotonic(),
            log=log_path,
            memfd=memfd,
            bell=bell,
            ppid=spec.ppid,
            nice=spec.nice,
        )
        self.agents[pid] = self.by_ospid[ospid] = agent
        self.served[spec.key] = pid
        self.births.expect(Birth(agent, report, self.epoch))

    def _stdio(self, spec: link.Fork, fds: list[int], log_path: str) -> tuple[tuple[int, int, int], list[int]]:
        """stdin, stdout, stderr of a new agent, and those of them that we opened and must close."""
        if len(fds) >= 3 and not spec.detached:
            return (fds[0], fds[1], fds[2]), []
        opened: list[int] = []
        try:
            parent = self.agents.get(spec.ppid)
            if parent is not None and parent.status is None and not spec.detached:
                with contextlib.suppress(OSError):  # it closed its own: like a detached one then
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
            if message.signal in (signal.SIGSTOP, signal.SIGCONT):  # what it led to may have been told to a dead kernel
                self._tell(link.ChildStopped(agent.pid, agent.stopped))
            return
        if message.key is not None:
            self.signalled[message.key, message.pid] = None
            if len(self.signalled) > SIGNALS_REMEMBERED:
                self.signalled.popitem(last=False)
        if message.signal == signal.SIGSTOP:
            # The agent itself first, the rest when it has stopped (see `_child_stopped`): a process between vfork and
            # its child's exec cannot stop while that child is stopped.
            with contextlib.suppress(PermissionError):  # it has become another user's
                os.kill(agent.ospid, signal.SIGSTOP)
        else:
            _signal_tree(agent.ospid, message.signal)

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
        agent.reaped_by = agent.reaped_by or message.reaped_by

    def _on_forget(self, message: link.Forget, fds: list[int]) -> None:
        agent = self.agents.pop(message.pid, None)
        if agent is None:
            return
        if agent.status is None:
            raise Bug(f"agent {agent.pid} forgotten while alive")
        self.served.pop(agent.spec.key, None)
        if agent.log:
            with contextlib.suppress(OSError):
                os.unlink(agent.log)

    def _on_ready(self, message: link.Ready, fds: list[int]) -> None:
        if self.stopping:
            return
        if not self.served_once:
            self.served_once = True
            with contextlib.suppress(OSError):  # where the log goes there is no room: no reason not to serve
                print(message.line, file=sys.stderr, flush=True)
            notify.ready(self.settings, message.line)

    def _on_shutdown(self, message: link.Shutdown, fds: list[int]) -> None:
        if message.error:
            print(f"aiosd: {message.error}", file=sys.stderr, flush=True)
            notify.failed(self.settings, message.error)
            self.exit_code = 1
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
        ended = False
        options = os.WEXITED | os.WSTOPPED | os.WCONTINUED | os.WNOHANG
        while True:
            try:
                child = os.waitid(os.P_ALL, 0, options)
            except ChildProcessError:
                break
            if child is None:
                break
            if child.si_code in (os.CLD_STOPPED, os.CLD_TRAPPED, os.CLD_CONTINUED):
                self._child_stopped(child.si_pid, child.si_code != os.CLD_CONTINUED)
                continue
            ended = True
            self._child_ended(child.si_pid, child.si_status if child.si_code == os.CLD_EXITED else -child.si_status)
        if ended:
            self._kill_orphans()
        if self.stopping:
            self._continue_stop()

    def _child_stopped(self, ospid: int, stopped: bool) -> None:
        """An agent stops and goes on with all that it started, also when somebody else's signal made it."""
        agent = self.by_ospid.get(ospid)
        if agent is not None:
            agent.stopped = stopped
            _signal_tree(ospid, signal.SIGSTOP if stopped else signal.SIGCONT)
            self._tell(link.ChildStopped(agent.pid, stopped))

    def _child_ended(self, ospid: int, status: int) -> None:
        if ospid == self.kernel_ospid:
            self._kernel_died(status)
            return
        for core in self.cores.values():
            if core.ospid == ospid:
                self._core_died(core, status)
                return
        agent = self.by_ospid.pop(ospid, None)
        if agent is not None:
            self.births.ended(agent)
            agent.status = status
            agent.stopped = False
            os.close(agent.memfd)
            os.close(agent.bell)
            self._tell(link.ChildExited(agent.pid, status))

    def _kill_orphans(self) -> None:
        """Whatever is our child and none of our records is what a dead agent left behind."""
        known = {self.kernel_ospid, *self.by_ospid, *(core.ospid for core in self.cores.values())}
        known.update(self.spares.ospids())
        for ospid in set(procfs.children(os.getpid())) - known:
            for victim in (ospid, *procfs.descendants(ospid)):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(victim, signal.SIGKILL)

    # ── the end ───────────────────────────────────────────────────────────────────────────────────────────

    def stop(self, why: str) -> None:
        """Begin to stop; a second call ends the patience with agents."""
        if self.stopping:
            self._kill_agents()
            return
        self.stopping = why
        self.spares.dismiss()
        logger.info("stopping (%s)", why)
        notify.stopping(self.settings)
        self._tell(link.Stop(why))
        for agent in list(self.by_ospid.values()):
            _signal_tree(agent.ospid, signal.SIGTERM)
            _signal_tree(agent.ospid, signal.SIGCONT)  # a stopped agent must get its TERM, too
        self.timers.after(self.settings.stop_timeout_s, self._kill_agents)
        self._continue_stop()

    def _kill_agents(self) -> None:
        for agent in list(self.by_ospid.values()):
            _signal_tree(agent.ospid, signal.SIGKILL)
        self._watch_killed(len(self.by_ospid))

    def _watch_killed(self, left: int) -> None:
        """Thousands take their time to die, but one that has become another user's never does."""

        def look() -> None:
            if not self.by_ospid:
                return
            if len(self.by_ospid) >= left:
                self._give_up()
            else:
                self._watch_killed(len(self.by_ospid))

        self.timers.after(LAST_WAIT_S, look)

    def _continue_stop(self) -> None:
        """Agents first, so that the kernel can tell who waits for them; then the system's own processes."""
        if self.by_ospid or self.exit_code is not None:
            return
        system = [core.ospid for core in self.cores.values()] + [self.kernel_ospid]
        if not any(system):
            self.exit_code = 0 if self.exit_code is None else self.exit_code
            return
        if self.stopping != "last":
            self._tell(link.Stop(self.stopping, last=True))
            self.stopping = "last"
            for core in self.cores.values():
                if core.ospid:
                    os.kill(core.ospid, signal.SIGTERM)
            self.timers.after(LAST_WAIT_S, self._give_up)

    def _give_up(self) -> None:
        logger.warning("not all has ended in time; killed")
        self.exit_code = 0


def _core_name(cores: dict[str, Core], name: str) -> str:
    return "llm" if len(cores) == 1 else f"llm:{name}"


def _forked(key: link.Key, agent: Agent) -> link.Forked:
    return link.Forked(key, agent.pid, agent.ospid, agent.pgid, agent.started, agent.since, agent.log)


def _ring(bell: int) -> None:
    with contextlib.suppress(OSError):  # full: it is awake; broken: it is about to be reaped
        os.write(bell, b"\0")


def _backoff(last_s: float, lived_s: float) -> float:
    """Twice the last wait, less what its life has paid off, within bounds. So a part that is killed now and then is
    back at once, and one that cannot live costs little."""
    first, longest = BACKOFF_S
    return max(first, min(2 * last_s - PAYS_OFF * lived_s, longest))


def _signal_tree(ospid: int, number: int) -> None:
    """The agent's process group (its pid cannot be reused: we have not reaped it), then every descendant
    that has left the group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        try:
            os.killpg(ospid, number)
        except ProcessLookupError:  # just forked: it has no group yet
            os.kill(ospid, number)
    for victim in procfs.descendants(ospid):
        stat = procfs.read_stat(victim)
        if stat is not None and stat.pgid != ospid:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(victim, number)


def _signal_pipe() -> int:
    """A descriptor that delivers the numbers of the signals that came."""
    read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, GUARDIAN_DIED):
        signal.signal(number, lambda *_: None)
    return read


def _preload() -> None:
    """Import what agents import, once, before they are forked, and run it; then keep the collector off those pages."""
    import asyncio  # noqa: F401
    import runpy  # noqa: F401

    import libaios.aio  # noqa: F401
    from aiosd.birth.rehearsal import rehearse, rehearse_birth, rehearse_imports

    rehearse()
    rehearse_birth()
    modules.hide()
    rehearse_imports()
    gc.collect()
    gc.freeze()


def main(settings: Settings, listener: socket.socket, guardian: int, heartbeat: int) -> int:
    """Entry of the supervisor process, forked by the guardian."""
    os.setsid()  # the terminal's signals go to the guardian alone
    fork.name_process("aios:supervisor")
    fork.prctl(fork.PR_SET_CHILD_SUBREAPER, 1)
    log.setup("supervisor", settings.log_level)
    supervisor = Supervisor(settings, listener, guardian, heartbeat)
    fork.die_with_parent(guardian, GUARDIAN_DIED)
    return supervisor.run()
