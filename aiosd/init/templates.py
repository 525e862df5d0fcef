"""Templates, from the supervisor's side: started when an agent needs one, ended when none has needed it for a while.

A template (`birth.template`) is executed, not forked: it may be the interpreter of another environment, and it has
nothing of the supervisor's memory. `TemplatePool.order` requests one agent's process from it; when the template has
loaded, one end of a socket pair is sent to it, over which it reports the process. Orders never fail silently: each ends
in `done` or `failed`, unless it is cancelled.

    LOADING ──ready──▶ READY ──its files have changed──▶ it ends, and its open orders go to a new one
       │                 │──no order for `idle_s`──────▶ it ends
       │                 └──it dies────────────────────▶ the same
       └──it cannot load, or dies──────────────────────▶ its orders fail, and the next order starts a new one
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import logging
import os
import select
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from aiosd import procfs
from aiosd.birth import confinement, fork, spares
from aiosd.birth.spares import PID
from aiosd.ipc import endpoint, link
from aiosd.ipc.link import TemplateReport, TemplateState
from aiosd.sandbox import cage
from aiosd.timers import Timer, Timers
from libaios import wire

logger = logging.getLogger("supervisor")

LOADING_S = 300.0
FORK_S = 30.0
MOST = 16  # templates at a time: each may have hundreds of megabytes
TRIES = 3  # how many templates an order is given to, if each finds its files changed
REPORT_BYTES = 65536

#: Pools of threads in C libraries: with more than one thread a process cannot be forked.
_ONE_THREAD = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "RAYON_NUM_THREADS")

OnForked = Callable[
    [int, socket.socket], None
]  # the Linux pid of a process that waits in `spares.become`, and its socket
OnFailed = Callable[[int, str], None]  # errno and a sentence


@dataclass(slots=True, eq=False)
class Order:
    """A request for one agent's process from a template."""

    of: wire.Template
    done: OnForked
    failed: OnFailed
    tries: int = 0
    template: TemplateProcess | None = None
    sock: socket.socket | None = None  # the supervisor's end, after the other was sent to the template
    timer: Timer | None = None
    cancelled: bool = False

    def cancel(self) -> None:
        """Cancel the order. A process that comes nevertheless is dismissed."""
        self.cancelled = True


@dataclass(slots=True, eq=False)
class TemplateProcess:
    of: wire.Template
    name: str
    pid: int
    ospid: int
    sock: socket.socket
    started: float  # Unix time
    orders: list[Order] = field(default_factory=list)  # not served yet
    report: TemplateReport | None = None
    agents: int = 0
    timer: Timer | None = None  # for a template that loads too long, or is idle
    over: bool = False  # its process has closed the socket, and will be reaped in a moment

    @property
    def ready(self) -> bool:
        return self.report is not None and self.report.ready


class TemplatePool:
    """All templates. `children`: the supervisor's map of live children. `changed`: called after each visible change."""

    def __init__(
        self,
        epoll: select.epoll,
        timers: Timers,
        children: dict[int, Any],
        next_pid: Callable[[], int],
        changed: Callable[[], None],
        idle_s: float,
    ) -> None:
        self._epoll = epoll
        self._timers = timers
        self._children = children
        self._next_pid = next_pid
        self._changed = changed
        self._idle_s = idle_s
        self._all: list[TemplateProcess] = []
        self._by_fd: dict[int, TemplateProcess | Order] = {}

    def shown(self) -> list[link.TemplateShown]:
        return [_shown(one) for one in self._all]

    # ── orders ────────────────────────────────────────────────────────────────────────────────────────────

    def order(self, of: wire.Template, done: OnForked, failed: OnFailed) -> Order:
        """Request a process. Raises OSError when its template cannot be started."""
        order = Order(of, done, failed)
        self._place(order)
        return order

    def _place(self, order: Order) -> None:
        template = next((one for one in self._all if one.of == order.of and not one.over), None)
        if template is None:
            template = self._start(order.of)
        order.tries += 1
        order.template = template
        template.orders.append(order)
        if template.ready:
            if template.timer is not None:
                template.timer.cancel()
            self._send(template, order)

    def _send(self, template: TemplateProcess, order: Order) -> None:
        ours, theirs = spares.pair()
        with theirs:
            try:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [theirs.fileno()]))]
                template.sock.sendmsg([b"+"], rights, socket.MSG_DONTWAIT)
            except BlockingIOError:  # many orders are under way: there is room when the template takes the next one
                ours.close()
                self._timers.after(0.01, lambda: self._send_again(template, order))
                return
            except OSError:  # the template has just died, which is handled when it is reaped
                ours.close()
                return
        order.sock = ours
        order.timer = self._timers.after(FORK_S, lambda: self._too_slow(template))
        self._watch(ours, order)

    def _send_again(self, template: TemplateProcess, order: Order) -> None:
        if order in template.orders and order.sock is None:
            self._send(template, order)

    def _served(self, order: Order, ospid: int) -> None:
        sock, template = order.sock, order.template
        assert sock is not None
        assert template is not None
        self._drop(order)
        if order.cancelled:
            sock.close()
            self._rest(template)
            return
        template.agents += 1
        try:
            order.done(ospid, sock)
        finally:
            self._rest(template)
            self._changed()

    def _drop(self, order: Order) -> None:
        """Take an order away from its template. Its socket stays open."""
        if order.template is not None:
            order.template.orders.remove(order)
        if order.sock is not None:
            self._unwatch(order.sock)
        if order.timer is not None:
            order.timer.cancel()
        order.template = order.sock = order.timer = None

    def _too_slow(self, template: TemplateProcess) -> None:
        self._end(template, errno.ETIMEDOUT, f"{template.name} does not fork agents; killed")

    # ── events ────────────────────────────────────────────────────────────────────────────────────────────

    def look(self, fd: int) -> bool:
        """Handle an event of this descriptor; returns whether it belongs here."""
        source = self._by_fd.get(fd)
        if isinstance(source, TemplateProcess):
            self._receive(source)
        elif isinstance(source, Order):
            self._look_at(source)
        return source is not None

    def _look_at(self, order: Order) -> None:
        template, sock = order.template, order.sock
        assert template is not None
        assert sock is not None
        try:
            payload = sock.recv(PID.size, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            payload = b""
        ospid = PID.unpack(payload)[0] if len(payload) == PID.size else 0
        if _is_from(ospid, template.ospid):
            self._served(order, ospid)
            return
        self._receive(template)  # it sends its reason before it ends
        if order.template is template and not template.over:
            self._drop(order)
            sock.close()
            _fail(order, errno.EIO, f"{template.name} has forked no process: memory may be short")
            self._rest(template)
        elif order.sock is sock:
            self._unwatch(sock)

    def _receive(self, template: TemplateProcess) -> None:
        """Handle the reports of a template. A template that sends an invalid report is ended."""
        try:
            payload = template.sock.recv(REPORT_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            payload = b""
        if not payload:
            self._close(template)
            return
        try:
            report = msgspec.json.decode(payload, type=TemplateReport)
        except msgspec.MsgspecError as err:
            report = TemplateReport(errno=errno.EIO, words=f"{template.name} reports nonsense: {err}")
        if report.stale:
            self._renew(template, "files that it has imported have changed")
        elif report.ready and not template.ready:
            self._loaded(template, report)
        else:
            self._end(template, report.errno or errno.EIO, report.words or f"{template.name} reports nonsense")

    def _close(self, template: TemplateProcess) -> None:
        """Its socket is closed: kill it. Its orders are handled when it is reaped."""
        template.over = True
        self._unwatch(template.sock)
        self._kill(template)

    def _loaded(self, template: TemplateProcess, report: TemplateReport) -> None:
        template.report = report
        if template.timer is not None:
            template.timer.cancel()
        logger.info("%s is ready: Python %s, %d modules", template.name, report.version, report.loaded)
        for order in list(template.orders):
            self._send(template, order)
        self._rest(template)
        self._changed()

    def _rest(self, template: TemplateProcess) -> None:
        """End it after a while without orders."""
        if not template.orders and template in self._all:
            if template.timer is not None:
                template.timer.cancel()
            template.timer = self._timers.after(self._idle_s, lambda: self._end(template, 0, "idle"))

    def _renew(self, template: TemplateProcess, why: str) -> None:
        """It is of no more use: give its open orders to another one."""
        logger.info("%s ended: %s", template.name, why)
        orders = self._remove(template)
        for order in orders:
            if order.cancelled:
                continue
            try:
                if order.tries >= TRIES:
                    raise OSError(errno.EAGAIN, f"{template.name}, tried {TRIES} times: {why}")
                self._place(order)
            except OSError as err:
                order.failed(err.errno or errno.EIO, err.strerror or str(err))

    def _end(self, template: TemplateProcess, number: int, words: str) -> None:
        """Kill it; its orders fail."""
        orders = self._remove(template)
        logger.info("%s ended: %s", template.name, words)
        for order in orders:
            _fail(order, number, words)

    def _remove(self, template: TemplateProcess) -> list[Order]:
        """Remove it; returns its orders."""
        orders = list(template.orders)
        for order in orders:
            sock = order.sock
            self._drop(order)
            if sock is not None:
                sock.close()
        self._all.remove(template)
        if template.timer is not None:
            template.timer.cancel()
        self._unwatch(template.sock)
        template.sock.close()
        self._kill(template)
        self._changed()
        return orders

    def _kill(self, template: TemplateProcess) -> None:
        if self._children.get(template.ospid) is template:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(template.ospid, signal.SIGKILL)

    def ended(self, template: TemplateProcess, why: str) -> None:
        """Its process has ended. Its earlier reports still count."""
        while template in self._all and not template.over:
            self._receive(template)
        if template in self._all and template.ready:
            self._renew(template, f"died ({why})")
        elif template in self._all:
            self._end(template, errno.EIO, f"{template.name} died ({why})")

    def stop(self) -> None:
        """End all templates, because aiosd ends."""
        for template in list(self._all):
            self._end(template, errno.EAGAIN, "aiosd is shutting down")

    # ── the process ───────────────────────────────────────────────────────────────────────────────────────

    def _start(self, of: wire.Template) -> TemplateProcess:
        if len(self._all) >= MOST and not self._make_room():
            raise OSError(errno.EAGAIN, f"there are {MOST} templates already, and all of them are in use")
        ours, theirs = spares.pair()
        with theirs:
            try:
                ospid = fork.fork(lambda: _execute(of, theirs))
            except OSError:
                ours.close()
                raise
        template = TemplateProcess(of, self._name(of), self._next_pid(), ospid, ours, time.time())
        self._children[ospid] = template
        self._all.append(template)
        self._watch(ours, template)
        words = f"{template.name} has not loaded in {LOADING_S:.0f} s"
        template.timer = self._timers.after(LOADING_S, lambda: self._end(template, errno.ETIMEDOUT, words))
        self._changed()
        return template

    def _make_room(self) -> bool:
        for template in self._all:
            if template.ready and not template.orders:
                self._end(template, 0, "another one is needed")
                return True
        return False

    def _name(self, of: wire.Template) -> str:
        """The name of a new template in aios-ps."""
        taken = Counter(one.name.partition("#")[0] for one in self._all)[of.name]
        return f"{of.name}#{taken + 1}" if taken else of.name

    def _watch(self, sock: socket.socket, source: TemplateProcess | Order) -> None:
        self._by_fd[sock.fileno()] = source
        self._epoll.register(sock.fileno(), select.EPOLLIN)

    def _unwatch(self, sock: socket.socket) -> None:
        if self._by_fd.pop(sock.fileno(), None) is not None:
            self._epoll.unregister(sock.fileno())


def _fail(order: Order, number: int, words: str) -> None:
    if not order.cancelled:
        order.failed(number, words)


def _is_from(ospid: int, template: int) -> bool:
    """Whether a process is a grandchild of the template, as a spare must be."""
    spare = procfs.read_stat(ospid) if ospid > 1 else None
    middle = procfs.read_stat(spare.ppid) if spare is not None else None
    return middle is not None and middle.ppid == template


def _shown(one: TemplateProcess) -> link.TemplateShown:
    report = one.report or TemplateReport()
    state = TemplateState.READY if one.ready else TemplateState.LOADING
    return link.TemplateShown(
        one.name, one.pid, one.ospid, state, one.of, report.version, report.loaded, one.agents, one.started
    )


def _execute(of: wire.Template, sock: socket.socket) -> int:
    """In the child: execute the interpreter. Nothing of aiosd's environment is passed on."""
    os.setsid()
    supervisor = os.getppid()
    silent = os.open(os.devnull, os.O_RDWR)
    number = fcntl.fcntl(sock, fcntl.F_DUPFD, 3)  # aiosd may have been started without stdio
    for standard in (0, 1, 2):
        os.dup2(silent, standard)
    ground = os.memfd_create("aios-ground")
    os.write(ground, confinement.packed())
    inherited = (number, ground, *cage.descriptors())
    fork.keep_only(inherited)
    for fd in inherited:
        os.set_inheritable(fd, True)
    python = wire.os_str(of.python) or sys.executable
    here = Path(__file__).resolve().parent.parent
    numbers = [str(one) for one in (number, supervisor, ground)]
    words = [python, str(here / "birth" / "bootstrap.py"), *numbers, str(here.parent), _folder_of(msgspec), *of.modules]
    try:
        os.chdir("/")
        os.execve(python, words, _environment())
    except OSError as err:
        report = TemplateReport(errno=err.errno or errno.EIO, words=f"{python}: {err.strerror}")
        os.write(number, msgspec.json.encode(report))
        return 1


def _folder_of(package: object) -> str:
    return str(Path(str(package.__file__)).resolve().parent.parent)  # type: ignore[attr-defined]


def _environment() -> dict[str, str]:
    """The environment in which modules are imported: as at a login, and the same for all agents."""
    environment = {"PATH": os.defpath, "LANG": "C.UTF-8", "TOKENIZERS_PARALLELISM": "false"}
    home = os.environ.get("HOME")
    if home:
        environment["HOME"] = home
    return environment | dict.fromkeys(_ONE_THREAD, "1") | endpoint.QUIET
