"""The supervisor's part of agents: their births, their restarts, signals to them, their ends.

A request from a kernel is carried out once, whichever kernel sends it, and however often (`Memo`). A spawn is answered
when the new process has reported that it runs (`births`).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import signal
import socket
import stat
import time
from collections.abc import Iterable, MutableMapping
from typing import Any

from aiosd.birth import fork, spares
from aiosd.errors import Bug
from aiosd.init import restart
from aiosd.init.births import Birth, Births
from aiosd.init.kernellink import KernelLink
from aiosd.init.orphans import Orphans
from aiosd.init.pids import PidCounter
from aiosd.init.records import BACKOFF_S, Agent, Memo
from aiosd.init.signals import signal_tree
from aiosd.init.templates import Order, TemplatePool
from aiosd.ipc import link
from aiosd.ipc.link import CallKey
from aiosd.timers import Timers
from libaios import wire
from libaios.channel import make_channel
from libaios.home import Home

logger = logging.getLogger("supervisor")

RING_BYTES = 1 << 16  # of each direction between an agent and the kernel
ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)  # signals that request an agent's end
Spare = tuple[int, socket.socket]


class AgentSupervisor:
    """`children`: the records of all live children of the supervisor, by Linux pid."""

    def __init__(
        self,
        home: Home,
        epoll: select.epoll,
        timers: Timers,
        children: MutableMapping[int, Any],
        pids: PidCounter,
        kernel: KernelLink,
        orphans: Orphans,
        templates: TemplatePool,
        reserve: spares.Spares,
    ) -> None:
        self._home = home
        self._timers = timers
        self._children = children
        self._pids = pids
        self._link = kernel
        self._orphans = orphans
        self._templates = templates
        self._spares = reserve
        self.records: dict[int, Agent] = {}  # by pid, live and dead until forgotten
        self.stopping = False
        self._births = Births(epoll, timers, self._born)
        self._orders: dict[CallKey, int] = {}  # spawns that wait for a template, with the epoch of their kernel
        # results of calls that take effect once
        self._spawned: Memo[CallKey, int] = Memo()
        self._signalled: Memo[tuple[CallKey, int], None] = Memo()  # KILL calls, and the agents that they meant
        self.replies: Memo[CallKey, bytes] = Memo()

    def live(self) -> list[Agent]:
        return [child for child in self._children.values() if isinstance(child, Agent)]

    def look(self, fd: int) -> None:
        """Handle an event of this descriptor: a new process may have reported."""
        self._births.look(fd)

    # ── births ────────────────────────────────────────────────────────────────────────────────────────────

    def on_fork(self, message: link.Fork, fds: list[int]) -> None:
        known = self.records.get(self._spawned.get(message.key) or 0)
        if known is not None:
            if self._births.claim(known, self._link.epoch):
                return  # the reply is sent when the birth is over
            self._link.send(_forked(message.key, known))
            return
        if message.key in self._orders:
            self._orders[message.key] = self._link.epoch
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

    def _fork_failed(self, key: CallKey, number: int, words: str) -> None:
        self._link.send(link.ForkFailed(key, number, words))

    def _order(self, spec: link.Fork, fds: list[int]) -> None:
        """Have a template fork the agent's process, and spawn it then. Raises OSError."""
        assert spec.template is not None
        kept = [os.dup(fd) for fd in fds]

        def over() -> bool:
            """Whether the kernel that sent this order still waits for it. (Another kernel has no record of it.)"""
            return self._orders.pop(spec.key, -1) == self._link.epoch and not self.stopping

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

        self._orders[spec.key] = self._link.epoch
        try:
            self._templates.order(spec.template, done, failed)
        except OSError:
            del self._orders[spec.key]
            _close(kept)
            raise

    def _born(self, birth: Birth) -> None:
        """An agent runs, or cannot start: send the kernel its reply, unless the agent has rung for it. A kernel that
        was forked during the birth has inherited the agent, and sends its request again."""
        agent, epoch = birth.agent, self._link.epoch
        doors = (agent.door, *agent.gates) if agent.door >= 0 else ()
        if agent.restarts is not None and agent.restarts.total:
            self._born_again(birth, doors)
            return
        if birth.refusal is None:
            if epoch == birth.claimed or (epoch == birth.epoch and not birth.rung) or doors:
                self._link.send(_forked(agent.spec.key, agent), doors)
            return
        if epoch in (birth.epoch, birth.claimed):
            number, reason = birth.refusal
            self._link.send(link.ForkFailed(agent.spec.key, number, ""), (reason,))
        self.records.pop(agent.pid, None)
        agent.restarts = None  # its caller never got its pid, and its letter is closed
        _drop(agent)
        self._spawned.forget(agent.spec.key)
        if agent.log:
            with contextlib.suppress(OSError):
                os.unlink(agent.log)

    def _born_again(self, birth: Birth, doors: tuple[int, ...]) -> None:
        """The same for a restart. If the agent cannot start, it ends now, which is handled like any other end."""
        agent, epoch = birth.agent, self._link.epoch
        if birth.refusal is not None:
            doors = ()
        elif epoch == birth.epoch:
            self._link.send(link.ChildRestarted(agent.pid, agent.ospid), (agent.memfd, agent.bell, *doors))
            doors = ()
        if epoch == birth.claimed or doors:
            self._link.send(_forked(agent.spec.key, agent), doors)

    def _spawn(self, spec: link.Fork, fds: list[int], spare: Spare | None = None) -> None:
        """`spare`: the process that becomes the agent, with the socket at which it waits; None: one is forked."""
        pid = self._pids.next()
        log_path = os.path.join(self._home.texts["logs"], f"{pid}.log") if spec.detached else ""
        policy = restart.parse(spec.restart)
        again = policy.when is not restart.When.NO
        kept = again or spec.sandbox != "none"  # else its letter is not needed any more
        letter = os.dup(fds[0]) if kept else -1
        try:
            ospid, report, memfd, bell, handed = self._start(spec, pid, fds, log_path, spare)
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
            handed=handed,
        )
        self.records[pid] = self._children[ospid] = agent
        self._spawned.put(spec.key, pid)
        self._births.expect(Birth(agent, report, self._link.epoch))
        self._link.send(link.Forking(_forked(spec.key, agent)), (memfd, bell))

    def _enrol(self, spec: link.Fork, fds: list[int]) -> None:
        """Add an agent without a process: a record, for the next kernel."""
        pid, now = self._pids.next(), time.monotonic()
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
        self.records[pid] = agent
        self._spawned.put(spec.key, pid)
        self._link.send(_forked(spec.key, agent))

    def _start(
        self, spec: link.Fork, pid: int, fds: list[int], log_path: str, spare: Spare | None = None
    ) -> tuple[int, socket.socket, int, int, tuple[int, ...]]:
        """Start an agent's process. `fds`: its letter, and its stdin, stdout and stderr, if given. Returns its Linux
        pid, the socket of its report, its channel (memfd and the kernel's end of the bell), and `Agent.handed`."""
        letter, *given = fds
        stdio, opened = self._stdio(spec, given, log_path)
        try:
            handed = _sockets(stdio)
            memfd, bell, agent_bell = make_channel(RING_BYTES, RING_BYTES)
            opened.append(agent_bell)
            try:
                home = self._home.texts["root"]
                if spare is None:
                    ospid, report = self._spares.start(spec, pid, home, stdio, memfd, agent_bell, letter)
                else:
                    ospid, report = spare
                    spares.assign(report, spec, pid, home, stdio, (memfd, agent_bell, letter))
            except OSError:
                opened += (memfd, bell)
                raise
        finally:
            for fd in opened:
                os.close(fd)
        return ospid, report, memfd, bell, handed

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

        return self._templates.order(template, done, lambda number, words: self._not_again(agent, words))

    def _restart(self, agent: Agent, spare: Spare | None = None) -> None:
        started = self._start(agent.spec, agent.pid, [agent.letter], agent.log, spare)
        ospid, report, agent.memfd, agent.bell, agent.handed = started
        agent.ospid, agent.forked_at, agent.got_term = ospid, time.monotonic(), False
        self._children[ospid] = agent
        self._births.expect(Birth(agent, report, self._link.epoch))

    def _not_again(self, agent: Agent, why: str) -> None:
        if not self.stopping:
            logger.error("agent %d cannot be started again: %s", agent.pid, why)
            self._wait_for_start(agent, BACKOFF_S[1])

    def _wait_for_start(self, agent: Agent, seconds: float) -> None:
        agent.again = self._timers.after(seconds, lambda: self._start_again(agent))

    def _signal_waiting(self, agent: Agent, number: int) -> None:
        """A signal to an agent that waits to be started again: one that would end it ends the wait, STOP and CONT hold
        the wait. An agent that never has a process ends in the same way."""
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
        self._link.send(link.ChildExited(agent.pid, agent.status))

    def _stdio(self, spec: link.Fork, fds: list[int], log_path: str) -> tuple[tuple[int, int, int], list[int]]:
        """stdin, stdout, stderr of a new agent, and those of them that were opened here and must be closed."""
        if len(fds) >= 3 and (spec.tty or not spec.detached):  # a detached one's terminal is held by a client
            return (fds[0], fds[1], fds[2]), []
        opened: list[int] = []
        try:
            parent = self.records.get(spec.ppid)
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

    # ── signals and marks ─────────────────────────────────────────────────────────────────────────────────────

    def on_signal(self, message: link.SendSignal, fds: list[int]) -> None:
        agent = self.records.get(message.pid)
        served = message.key is not None and (message.key, message.pid) in self._signalled
        if agent is None or agent.status is not None:
            return
        if served:
            if message.signal in (signal.SIGSTOP, signal.SIGCONT):  # a dead kernel may have received the result
                self._link.send(link.ChildStopped(agent.pid, agent.stopped))
            return
        if message.key is not None:
            self._signalled.put((message.key, message.pid), None)
        if not agent.ospid:
            self._signal_waiting(agent, message.signal)
            return
        if message.signal in ENDING:
            agent.got_term = True
        agent.meant = agent.meant or message.signal in (*ENDING, signal.SIGKILL)
        if message.signal == signal.SIGSTOP:
            # The agent itself first, the rest when it has stopped (see `_child_stopped`): a process between vfork and
            # its child's exec cannot stop while that child is stopped.
            with contextlib.suppress(PermissionError):  # it now belongs to another user
                os.kill(agent.ospid, signal.SIGSTOP)
        else:
            signal_tree(agent.ospid, message.signal)

    def on_mark(self, message: link.Mark, fds: list[int]) -> None:
        agent = self.records.get(message.pid)
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

    def on_forget(self, message: link.Forget, fds: list[int]) -> None:
        agent = self.records.pop(message.pid, None)
        if agent is None:
            return
        if agent.status is None:
            raise Bug(f"agent {agent.pid} forgotten while alive")

    def stopped(self, agent: Agent, stopped: bool) -> None:
        """An agent has stopped or continued: do the same to all processes that it started, whatever the cause."""
        agent.stopped = stopped
        signal_tree(agent.ospid, signal.SIGSTOP if stopped else signal.SIGCONT)
        self._link.send(link.ChildStopped(agent.pid, stopped))

    # ── their ends ────────────────────────────────────────────────────────────────────────────────────────────

    def ended(self, agent: Agent, status: int) -> None:
        self._births.ended(agent)
        os.close(agent.memfd)
        os.close(agent.bell)
        if agent.door >= 0:
            os.close(agent.door)
            agent.door = -1
        for fd in agent.gates:
            os.close(fd)
        agent.gates = ()
        agent.ended, agent.stopped = time.time(), False
        self._orphans.agent_ended(agent.ospid, agent.got_term)
        wait_s = self._wait_before_restart(agent, status)
        if wait_s is None:
            agent.status = status
            _drop(agent)
        else:
            agent.ospid, agent.last_status = 0, status
            self._wait_for_start(agent, wait_s)
            reason = restart.exit_in_words(status)
            logger.info("agent %d (%s) ended: %s; started again in %.1f s", agent.pid, agent.spec.name, reason, wait_s)
        self._link.send(link.ChildExited(agent.pid, status, again_s=wait_s, cpu_s=agent.cpu_s))

    def _wait_before_restart(self, agent: Agent, status: int) -> float | None:
        """Seconds to wait; None: it is not started again."""
        if agent.restarts is None:
            return None
        meant = agent.meant or bool(agent.budget) or self.stopping
        return agent.restarts.after(status, time.monotonic() - agent.forked_at, meant)

    # ── all of them ───────────────────────────────────────────────────────────────────────────────────────────

    def stop(self) -> None:
        """The system stops: start no agent any more, and send TERM to live ones."""
        self.stopping = True
        self._spares.dismiss()
        for agent in [agent for agent in self.records.values() if agent.status is None and not agent.ospid]:
            self._end_waiting(agent)
        for agent in self.live():
            agent.got_term = True
            signal_tree(agent.ospid, signal.SIGTERM)
            signal_tree(agent.ospid, signal.SIGCONT)  # a stopped agent must be able to act on its TERM

    def kill(self) -> int:
        """Kill all agents; returns their number."""
        live = self.live()
        for agent in live:
            signal_tree(agent.ospid, signal.SIGKILL)
        return len(live)


def _forked(key: CallKey, agent: Agent) -> link.Forked:
    known = (agent.pid, agent.ospid, agent.pgid, agent.started, agent.since, agent.log, agent.handed)
    return link.Forked(key, *known)


def _sockets(fds: Iterable[int]) -> tuple[int, ...]:
    """The inodes of those that are sockets."""
    stats = [os.fstat(fd) for fd in fds]
    return tuple(one.st_ino for one in stats if stat.S_ISSOCK(one.st_mode))


def _drop(agent: Agent) -> None:
    """Close the letter of an agent that is not started again."""
    if agent.letter >= 0:
        os.close(agent.letter)
        agent.letter = -1


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
