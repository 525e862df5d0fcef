"""The worker processes of the toolbox: start, calls, limits, end.

Each worker has loaded one source and runs one call at a time; it is used again when a call has ended in order. A worker
that died, ran out of time or memory, was cancelled, or sent an invalid message is ended with all its descendants, and
its call gets an error. The toolbox is a subreaper: processes that a dead worker leaves become its children and are
killed.

Limits. Time: by the clock, synchronous. Memory: RLIMIT_DATA in the worker, which limits each process by itself; the
number of processes and their memory together are sampled every SAMPLE_S (or less often, so that sampling takes at most
a quarter of the time), so a call may exceed these limits for that long. Bytes that it writes and returns: counted.

Processor time and memory of a call are charged to the agent that has called (`meter`): at each sample, and at the end
of the call, before it is answered.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from aiosd import procfs
from aiosd.budgets.limits import SAMPLE_S
from aiosd.procfs import Stat
from aiosd.sandbox import cage, hosts
from aiosd.timers import Timer, Timers
from aiosd.tools.messages import Described, Done, Run, Tool, Wrote, decode_from_worker, encode
from aiosd.tools.meter import Bills, WorkerMeter
from aiosd.tools.servers import McpLauncher
from aiosd.tools.spec import MCP
from libaios.ring import ProtocolError
from libaios.stream import FrameSocket

logger = logging.getLogger("toolbox")

LOAD_S = 60.0  # for a source to be imported
GRACE_S = 1.0  # between TERM and KILL
PART = 4  # sampling takes at most 1/PART of the time
STRAYS_S = 0.2  # after this time processes that a dead worker had started have ended, or are children of this process
ENDED = 64  # workers that ended last, to which strays may belong
MOST_PROCESSES = 64  # of one call
IDLE_S = 60.0  # seconds for which a worker without a call is kept
FRAME_BYTES = 16 << 20
#: The variables of aiosd's environment that a tool gets; no others, so no keys and no tokens.
KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "SSL_CERT_FILE", "SSL_CERT_DIR", "VIRTUAL_ENV")


@dataclass(slots=True)
class Job:
    """One call in a worker. `payer`: the agent that pays for it; 0: none. `on_text` gets what it writes, `on_done` its
    result or error, once. Then `on_over` is called, once, when all its processes are gone and others may use its locks.
    """

    tool: Tool
    request: Run
    payer: int
    on_text: Callable[[str], None]
    on_done: Callable[[Done], None]
    on_over: Callable[[], None]


class Cell(NamedTuple):
    """How a worker is confined, as in `link.Caller`. b"": not at all."""

    box: bytes = b""
    network: tuple[int, int] = (0, 0)


WorkerKind = tuple[str, Cell]  # a source, and how its worker is confined


@dataclass(slots=True, eq=False)
class Worker:
    source: str
    cell: Cell  # how it has confined itself, for good
    process: subprocess.Popen[bytes]
    frames: FrameSocket
    job: Job | None = None
    deadline: Timer | None = None
    described: bool = False
    wrote: int = 0  # bytes that the call has written
    verdict: Done | None = None  # the result of its call, if the worker is being ended
    ending: Job | None = None  # … and that call, which has its answer already
    idle: Timer | None = field(default=None)
    server: int = 0  # for a worker of an MCP server: the server's number in `McpLauncher`
    meter: WorkerMeter = field(default_factory=WorkerMeter)

    @property
    def kind(self) -> WorkerKind:
        return self.source, self.cell


class Pool:
    """All workers. `watch` and `forget`: the loop's descriptors. `described` is called at each start of a worker, and
    when an MCP server (`servers`) has other tools than before. `bills`: for the usage of calls."""

    def __init__(
        self,
        timers: Timers,
        watch: Callable[[int, Callable[[], None]], None],
        forget: Callable[[int], None],
        home: str,
        described: Callable[[str, Described], None],
        servers: McpLauncher,
        bills: Bills,
    ) -> None:
        self._timers = timers
        self._watch = watch
        self._forget = forget
        self._home = home
        self._described = described
        self._servers = servers
        self._bills = bills
        self._workers: list[Worker] = []
        self._queue: dict[WorkerKind, list[Job]] = {}  # admitted calls that wait for a starting worker
        self._ended: deque[WorkerMeter] = deque(maxlen=ENDED)
        self._sampler: Timer | None = None
        self.deaths = 0

    # ── the methods that the toolbox uses ─────────────────────────────────────────────────────────────────

    def load(self, source: str) -> None:
        """Start a first worker of a source, which describes the source's tools."""
        self._start(source, Cell())

    def run(self, source: str, cell: Cell, job: Job) -> None:
        """Run a call, in a worker that is idle or in a new one. `cell`: how it must be confined."""
        kind = source, cell
        same = [worker for worker in self._workers if worker.kind == kind and worker.verdict is None]
        for worker in same:
            if worker.described and worker.job is None:
                self._give(worker, job)
                return
        self._queue.setdefault(kind, []).append(job)
        if sum(not worker.described for worker in same) < len(self._queue[kind]):
            self._start_another(kind)

    def cancel(self, job: Job) -> None:
        """Cancel a call: TERM, and a second later KILL for its worker, which is not used again."""
        for jobs in self._queue.values():
            if job in jobs:
                jobs.remove(job)
                job.on_over()
        for worker in self._workers:
            if worker.job is job:
                self._end(worker, Done(None, errno.ECANCELED, "cancelled"))

    def close(self) -> None:
        for worker in list(self._workers):
            self._kill(worker)

    def stats(self) -> dict[str, int]:
        return {
            "workers": len(self._workers),
            "busy": sum(worker.job is not None for worker in self._workers),
            "worker_deaths": self.deaths,
            "servers": self._servers.running,
        }

    # ── life of a worker ──────────────────────────────────────────────────────────────────────────────────

    def _start_another(self, kind: WorkerKind) -> None:
        """Start a worker for a call that waits; if none can be started, the call is refused."""
        try:
            self._start(*kind)
        except OSError as err:
            job = self._queue[kind].pop()
            why = Done(None, err.errno or errno.EAGAIN, f"no process can be started for it: {err.strerror or err}")
            self._timers.after(0.0, lambda: self._refuse(job, why))  # not here: it lets the next one begin

    @staticmethod
    def _refuse(job: Job, why: Done) -> None:
        job.on_done(why)
        job.on_over()

    def _start(self, source: str, cell: Cell) -> None:
        """Raises OSError."""
        ours, theirs = socket.socketpair()
        name = source.removeprefix(MCP)
        server = self._servers.wanted.get(name) if source.startswith(MCP) else None
        number = 0
        with theirs, contextlib.ExitStack() as ends, contextlib.ExitStack() as undo:
            undo.callback(ours.close)
            words, passed = [], [theirs.fileno()]
            if server is not None and server.command:
                number, given = self._servers.start(name, self._environment())
                for fd in given:
                    ends.callback(os.close, fd)
                words, passed = [",".join(map(str, given))], [*passed, *given]
            environment = self._environment()
            if cell.box:
                fds = list(cage.descriptors())
                if (network := _network(*cell.network)) is not None:
                    ends.callback(os.close, network)
                    fds.append(network)
                    environment = hosts.proxied(environment)
                words, passed = [",".join(["boxed", *map(str, fds)])], [*passed, *fds]
            process = subprocess.Popen(
                [
                    # -P: no modules from the working folder, which would have to be readable, too
                    *(sys.executable, "-P", "-m", f"aiosd.tools.{'worker' if server is None else 'bridge'}"),
                    *(str(theirs.fileno()), name, *words),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**environment, "HOME": self._home, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                pass_fds=passed,
                start_new_session=True,
            )
            undo.pop_all()
        waiting = self._queue.get((source, cell), []) if cell.box else []
        meter = WorkerMeter(waiting[0].payer if waiting else 0)
        worker = Worker(source, cell, process, FrameSocket(ours, FRAME_BYTES), server=number, meter=meter)
        self._workers.append(worker)
        if server is not None:
            worker.frames.send(encode(server))  # not as an argument, which others can read: it may have keys
        if cell.box:
            worker.frames.send(cell.box)
        self._watch(worker.frames.fileno(), lambda: self._on_readable(worker))
        late = Done(None, errno.ETIMEDOUT, f"{source} was not loaded after {LOAD_S:.0f} s")
        worker.deadline = self._timers.after(LOAD_S, lambda: self._end(worker, late))

    @staticmethod
    def _environment() -> dict[str, str]:
        return {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}

    def _give(self, worker: Worker, job: Job) -> None:
        worker.job, worker.wrote = job, 0
        if worker.idle is not None:
            worker.idle.cancel()
            worker.idle = None
        limit = job.tool.time_s
        late = Done(None, errno.ETIMEDOUT, f"{job.tool.name} ran for {limit:g} s, which is its limit")
        worker.meter.begin(job.payer, self._tree(worker))
        worker.deadline = self._timers.after(limit, lambda: self._end(worker, late))
        with contextlib.suppress(OSError):  # it is dead, which its socket reports in a moment
            worker.frames.send(encode(job.request))
        if self._sampler is None:
            self._sampler = self._timers.after(SAMPLE_S, self._sample)

    def _on_readable(self, worker: Worker) -> None:
        try:
            for payload, _ in worker.frames.receive(64):
                self._on_message(worker, decode_from_worker(payload))
        except (EOFError, OSError):
            self._died(worker)
        except (ProtocolError, msgspec.DecodeError, msgspec.ValidationError) as err:
            self._end(worker, Done(None, errno.EIO, f"its worker sent what no worker sends: {err}"), at_once=True)

    def _on_message(self, worker: Worker, message: Described | Wrote | Done) -> None:
        if worker.verdict is not None:
            return  # too late: its call has its answer already
        match message:
            case Described() if not worker.described:
                self._on_described(worker, message)
            case Described() if worker.source.startswith(MCP):
                self._report(worker, message)
            case Wrote(text=text) if worker.job is not None:
                worker.wrote += len(text.encode())
                if worker.wrote <= worker.job.tool.output_bytes:
                    worker.job.on_text(text)
            case Done() if worker.job is not None:
                self._over(worker, message)
            case _:
                raise ProtocolError(f"{type(message).__name__} at the wrong time")

    def _on_described(self, worker: Worker, message: Described) -> None:
        worker.described = True
        self._stop_clock(worker)
        self._report(worker, message)
        if message.error:
            self._fail_queue(worker, f"{worker.source} cannot be loaded: {message.error}")
        else:
            self._next(worker)

    def _report(self, worker: Worker, described: Described) -> None:
        """Report the tools of a source. (A source that only a confined worker cannot load is not reported as
        broken.)"""
        if not worker.cell.box:
            self._described(worker.source, described)

    def _over(self, worker: Worker, done: Done) -> None:
        """A call has ended in order. Processes that it left below the worker must not outlive it."""
        job, worker.job = worker.job, None
        self._stop_clock(worker)
        tree = self._tree(worker)
        leftovers = not worker.source.startswith(MCP) and len(tree) > 1
        if done.spent or leftovers:
            worker.verdict = done
            self._kill(worker)
        else:
            self._close(worker, tree)
            self._next(worker)
        if job is not None:
            job.on_done(done)
            job.on_over()

    def _next(self, worker: Worker) -> None:
        queue = self._queue.get(worker.kind)
        if queue:
            self._give(worker, queue.pop(0))
        else:
            worker.idle = self._timers.after(IDLE_S, lambda: self._retire(worker))

    def _retire(self, worker: Worker) -> None:
        """End a worker that was idle for long. The last one of a source stays, unless it is confined (there may be one
        for each agent), or belongs to an MCP server, since it takes a hundred megabytes together with the server."""
        same = [other for other in self._workers if other.kind == worker.kind and other.verdict is None]
        if worker.job is None and (len(same) > 1 or worker.cell.box or worker.source.startswith(MCP)):
            self._kill(worker)

    # ── the end of a worker ───────────────────────────────────────────────────────────────────────────────

    def _end(self, worker: Worker, verdict: Done, at_once: bool = False) -> None:
        """Send TERM to a worker and all its descendants, and KILL a moment later. Its call gets the result `verdict`
        now."""
        if worker.verdict is not None:
            return
        worker.verdict = verdict
        self._stop_clock(worker)
        self._charge(worker, self._tree(worker))
        self._answer(worker, verdict)
        if at_once:
            self._kill(worker)
            return
        for ospid in [worker.process.pid, *procfs.descendants(worker.process.pid)]:
            _signal(ospid, signal.SIGTERM)
        self._timers.after(GRACE_S, lambda: self._kill(worker))

    def _kill(self, worker: Worker) -> None:
        if worker not in self._workers:
            return
        self._workers.remove(worker)
        self._stop_clock(worker)
        if worker.idle is not None:
            worker.idle.cancel()
        self._forget(worker.frames.fileno())
        worker.frames.close()
        if worker.process.returncode is None:  # else another process may have its number
            stop_tree(worker.process.pid)
            worker.meter.look(self._tree(worker))  # sample processes now for which no parent would wait
            kill_tree(worker.process.pid)
        self._ended.append(worker.meter)
        self._reap(worker)
        self._kill_strays()
        self._close(worker, {})
        self._timers.after(STRAYS_S, self._kill_strays)
        ending, worker.ending = worker.ending, None
        if ending is not None:
            ending.on_over()

    def _died(self, worker: Worker) -> None:
        """The worker's end of the socket is closed: it has ended, or something in it has closed it."""
        if worker.verdict is None:
            self.deaths += worker.job is not None or not worker.described
            status = self._reap(worker, 0.5) or 0
            self._settle(worker.meter.payer)
            how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"
            reason = f"the process of this call ended ({how}); it is not done again"
            if not worker.described:
                self._report(worker, Described([], f"its worker ended ({how})"))
                self._fail_queue(worker, f"{worker.source} cannot be loaded ({how})")
            worker.verdict = Done(None, errno.EIO, reason)
            self._answer(worker, worker.verdict)
        self._kill(worker)
        self._replace(worker.kind)

    def _replace(self, kind: WorkerKind) -> None:
        """Start another worker if calls wait for one of this kind."""
        starting = sum(worker.kind == kind and not worker.described for worker in self._workers)
        for _ in range(len(self._queue.get(kind, ())) - starting):
            self._start_another(kind)

    def _answer(self, worker: Worker, done: Done) -> None:
        job, worker.job = worker.job, None
        if job is not None:
            worker.ending = job
            job.on_done(done)
        elif not worker.described:
            self._report(worker, Described([], done.message))
            self._fail_queue(worker, done.message)

    def _fail_queue(self, worker: Worker, reason: str) -> None:
        for job in self._queue.pop(worker.kind, []):
            self._refuse(job, Done(None, errno.EIO, reason))

    @staticmethod
    def _stop_clock(worker: Worker) -> None:
        if worker.deadline is not None:
            worker.deadline.cancel()
            worker.deadline = None

    def _kill_strays(self) -> None:
        """Kill the processes that dead workers left: they are children of this process now."""
        ours = {worker.process.pid for worker in self._workers}
        for ospid in set(procfs.children(os.getpid())) - ours:
            kill_tree(ospid)
            with contextlib.suppress(ChildProcessError):
                usage = os.wait4(ospid, 0)[2]
                meter = next((one for one in self._ended if one.knows(ospid)), None)
                if meter is None and self._ended:  # it was started between two samples
                    meter = self._ended[-1]
                if meter is not None:
                    meter.reaped(usage.ru_utime + usage.ru_stime)
                    self._settle(meter.payer)

    @staticmethod
    def _reap(worker: Worker, timeout: float | None = None) -> int | None:
        """Its exit status; None: it has not ended within `timeout` seconds. Called once, it charges the processor time
        that Linux reports."""
        process = worker.process
        if process.returncode is None:
            if timeout is not None and not _ends_within(process.pid, timeout):
                return None
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            worker.meter.reaped(usage.ru_utime + usage.ru_stime)
        return process.returncode

    # ── the usage of calls ────────────────────────────────────────────────────────────────────────────────

    def _tree(self, worker: Worker) -> dict[int, Stat]:
        """The processes of a worker, and of its MCP server."""
        found = procfs.tree(worker.process.pid) if worker.process.returncode is None else {}
        if server := self._servers.ospid(worker.server):
            found |= procfs.tree(server)
        return found

    def _charge(self, worker: Worker, tree: dict[int, Stat]) -> None:
        worker.meter.look(tree)
        self._settle(worker.meter.payer)

    def _close(self, worker: Worker, tree: dict[int, Stat]) -> None:
        """All processes of its call are gone: close the call's account."""
        worker.meter.memory = 0
        self._charge(worker, tree)
        worker.meter.payer = 0 if tree else worker.meter.payer  # processes of a dead worker may still be found

    def _settle(self, payer: int) -> None:
        self._bills.settle([*(worker.meter for worker in self._workers), *self._ended], payer)

    # ── limits for which there is no rlimit
    # ─────────────────────────────────────────────────────────────────────────────

    def _sample(self) -> None:
        began = time.monotonic()
        busy = [worker for worker in self._workers if worker.job is not None or worker.ending is not None]
        for worker in busy:
            self._look_at(worker)
        wait_s = max(SAMPLE_S, (PART - 1) * (time.monotonic() - began))
        self._sampler = self._timers.after(wait_s, self._sample) if busy else None

    def _look_at(self, worker: Worker) -> None:
        tree = self._tree(worker)
        crowded = len(tree) - 1 > MOST_PROCESSES
        memory = 0 if crowded else worker.meter.weigh(tree)  # this takes long if there are many
        self._charge(worker, tree)
        if worker.job is None:
            return
        tool = worker.job.tool
        if crowded:
            reason = f"{tool.name} started more than {MOST_PROCESSES} processes"
            self._end(worker, Done(None, errno.EAGAIN, reason), at_once=True)
        elif memory > tool.memory_bytes:
            reason = f"{tool.name} and its processes used more than {tool.memory_bytes >> 20} MB of memory"
            self._end(worker, Done(None, errno.ENOMEM, reason), at_once=True)


def _network(ospid: int, inode: int) -> int | None:
    """A descriptor of the process's network, if that has this inode; None: it has another, or the process has ended."""
    if not inode:
        return None
    try:
        fd = os.open(f"/proc/{ospid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    if os.fstat(fd).st_ino == inode:
        return fd
    os.close(fd)  # another process has the number now
    return None


def stop_tree(ospid: int) -> None:
    """Stop a child of this process and all its descendants, parents before children, so that none can fork
    meanwhile."""
    for _ in range(100):
        tree = [ospid, *procfs.descendants(ospid)]
        for one in tree:
            _signal(one, signal.SIGSTOP)
        if len(tree) == 1 + len(procfs.descendants(ospid)):
            break


def kill_tree(ospid: int) -> None:
    """Kill a child of this process and all its descendants."""
    stop_tree(ospid)
    for one in reversed([ospid, *procfs.descendants(ospid)]):
        _signal(one, signal.SIGKILL)


def _ends_within(ospid: int, seconds: float) -> bool:
    fd = os.pidfd_open(ospid)
    try:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))
    finally:
        os.close(fd)


def _signal(ospid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(ospid, number)
