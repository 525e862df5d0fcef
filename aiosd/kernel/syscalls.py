"""The handlers of the system calls that the kernel answers itself, in families.

A handler gets the open call and its decoded arguments; `access` has allowed it. It checks what types cannot express,
calls one part of the kernel and returns the body of the reply, or PENDING if `CallTable.finish` or `CallTable.fail`
will close the call later. An OSError that it raises becomes the reply.

The row in `wire.TABLE` defines the arguments of a call, and which process answers it. At its end this file compares the
two: at import, so that neither can be without the other.
"""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from aiosd.errors import Bug
from aiosd.ipc import link
from aiosd.kernel import access, listing, spawning
from aiosd.kernel.access import Access
from aiosd.kernel.agents import Lifecycle
from aiosd.kernel.approvals import Approvals
from aiosd.kernel.calls import PENDING, CallTable
from aiosd.kernel.charges import Charges
from aiosd.kernel.cores import Cores
from aiosd.kernel.dispatch import KNOWN, CallHandler
from aiosd.kernel.generations import Generations
from aiosd.kernel.inspection import inspect
from aiosd.kernel.jobs import Jobs
from aiosd.kernel.mail import Mail
from aiosd.kernel.measure import Measure
from aiosd.kernel.outside import Outside
from aiosd.kernel.peer import Call, ClientPeer
from aiosd.kernel.proc import Proc, ProcState, ProcTable
from aiosd.kernel.sandboxes import Sandboxes
from aiosd.kernel.service import Services
from aiosd.kernel.status import StatusRequests
from aiosd.kernel.system import FdLimit, System
from aiosd.kernel.waiters import Waiters
from libaios import pure, wire
from libaios.wire import Sys

#: The handlers of a family of calls by number, before they are bound to the parts that they use.
Family = dict[int, Callable[[Any, Call, Any], Any]]


class ProcessCalls:
    def __init__(
        self,
        table: ProcTable,
        agents: Lifecycle,
        sandboxes: Sandboxes,
        waiters: Waiters,
        rights: Access,
        system: System,
        descriptors: FdLimit,
        cores: Cores,
        measure: Measure,
        jobs: Jobs,
    ) -> None:
        self.table = table
        self.agents = agents
        self.sandboxes = sandboxes
        self.calls = agents.calls
        self.peers = agents.peers
        self.waiters = waiters
        self.rights = rights
        self.system = system
        self.descriptors = descriptors
        self.cores = cores
        self.measure = measure
        self.jobs = jobs

    def known(self, call: Call, args: wire.NoArgs) -> int:
        return KNOWN[call.row.sys](call.peer)

    def spawn(self, call: Call, args: wire.Spawn) -> Any:
        peer, parent = call.peer, call.peer.proc
        if self.agents.stopping:
            raise wire.error(errno.EAGAIN, "aiosd is shutting down")
        if not self.descriptors.room_for_agent():
            most = self.descriptors.max_agents
            raise wire.error(
                errno.EMFILE, f"no descriptors for another agent: the limit on open files allows {most} (ulimit -n)"
            )
        fds = tuple(peer.fds[:3]) if isinstance(peer, ClientPeer) else ()
        if isinstance(peer, ClientPeer) and not args.detached and len(fds) < 3:
            raise wire.error(errno.EINVAL, "stdin, stdout and stderr must come with an attached spawn")
        attached = args.attached and isinstance(peer, ClientPeer) and not args.detached
        client = spawning.process_of(peer.ospid) if isinstance(peer, ClientPeer) and attached else (0, 0)
        box = self.sandboxes.decide(args, parent, call.allowed)
        shares = self.agents.shares(args, parent, call.key, call.allowed)
        content = spawning.content(args, parent, self.agents.contents())
        spec = spawning.fork(args, call.key, parent, box, attached, client, call.allowed, shares, content)
        letter = spawning.letter(args, self.sandboxes.environment(args, parent, box), box, content)
        spec, letter = self.agents.tokens.give(spec, letter, parent, args.gateway)
        self.agents.fork(call, spec, letter, fds)
        return PENDING

    def wait(self, call: Call, args: wire.Wait) -> Any:
        result = self.waiters.wait(call, args)
        return PENDING if result is None else result

    def kill(self, call: Call, args: wire.Kill) -> Any:
        alive = [proc for proc in self.rights.targets(call.peer, args.pid) if proc.alive]
        if args.signal == 0 or not alive:
            return None
        if args.signal in (signal.SIGSTOP, signal.SIGCONT):
            # An agent is parked with all that it started.
            alive = [proc for proc in self.table.subtrees(alive) if proc.alive]
        before = {proc.pid: proc.continued for proc in alive}
        for proc in alive:
            self.agents.deliver(proc, args.signal, call.key)
        if args.signal == signal.SIGSTOP:
            return self._until(call, alive, lambda proc: self._stopped(proc, before[proc.pid]))
        if args.signal == signal.SIGCONT:
            return self._until(call, alive, lambda proc: proc.state is not ProcState.STOPPED)
        if args.timeout_s is not None:
            return self._until_dead(call, alive, args.timeout_s)
        return None

    def _stopped(self, proc: Proc, continued: int) -> bool:
        """Whether an agent is stopped (then nothing is generated or counted for it), or will not stop any more."""
        if not proc.alive or (proc.state is ProcState.WAITING and not proc.outside):
            return True
        return proc.continued != continued or self.agents.is_parked(proc)

    def _until(self, call: Call, procs: list[Proc], done: Callable[[Proc], bool]) -> Any:
        return None if self.waiters.until(call, procs, done) else PENDING

    def _until_dead(self, call: Call, procs: list[Proc], patience_s: float) -> Any:
        """Wait for the end of these agents, with a KILL after `patience_s`."""

        def kill() -> None:
            for proc in procs:
                if proc.alive:
                    self.agents.deliver(proc, signal.SIGKILL)

        if self.waiters.until(call, procs, lambda proc: not proc.alive):
            return None
        call.timer = self.calls.timers.after(patience_s, kill)
        return PENDING

    def ps(self, call: Call, args: wire.Ps) -> Any:
        self.jobs.start(self._ps(call, args))
        return PENDING

    def _ps(self, call: Call, args: wire.Ps) -> Iterator[None]:
        procs = self._chosen(call, args)
        yield from self.measure.sample_new(procs)
        pids = None if args.pids is None else set(args.pids)
        lines: list[wire.ProcInfo] = []
        if args.all or pids is not None:
            yield from self.system.lines(pids, args.name, lines)
        for proc in procs:
            lines.append(self._line(proc))
            yield
        self.calls.finish(call, lines)

    def _line(self, proc: Proc) -> wire.ProcInfo:
        context = self.cores.context_of(proc.pid)
        return listing.line(proc, self.peers.calls_of(proc), context, self.agents.is_parked(proc))

    def _chosen(self, call: Call, args: wire.Ps) -> list[Proc]:
        me = call.peer.proc
        if args.pids is not None:
            pids = dict.fromkeys(args.pids)
            procs = [proc for pid in pids if (proc := self.table.find(pid) if args.dead else self.table.get(pid))]
        else:
            procs = [proc for proc in self.table if proc.alive or args.all or args.dead]
            if args.dead:
                procs += self.table.history.values()
            if me is not None and not args.all:
                family = {proc.pid for proc in self.table.subtrees([me])}
                procs = [proc for proc in procs if proc.pid in family or proc.ppid in family]
        return [proc for proc in procs if args.name is None or proc.name == args.name]

    def nice(self, call: Call, args: wire.NiceArgs) -> int:
        if args.pid:
            (proc,) = self.rights.targets(call.peer, args.pid)
        else:
            proc = access.require_agent(call.peer, "has a nice value of its own")
        if args.value is None:
            return proc.nice
        new = access.new_nice(proc, args)
        if new < proc.nice and call.peer.proc is not None and not call.allowed:
            raise wire.error(errno.EACCES, f"nice: an agent may not lower it (from {proc.nice} to {new})")
        if new == proc.nice:  # `nice(0)` only reads the value
            return new
        self.agents.renice(proc, new, call.key, wire.encode(new))
        return new

    def inspect(self, call: Call, args: wire.PidArgs) -> dict[str, Any]:
        proc = self.rights.known(args.pid)
        children = [child.pid for child in self.table.children_of(proc.pid)]
        mailbox = self.agents.mail.box(proc.pid)
        shown = inspect(proc, self._line(proc), self.peers.of(proc), children, len(mailbox.messages))
        return {**shown, "asks": self.rights.asks_of(proc)}

    HANDLERS: ClassVar[Family] = {
        Sys.GETPID: known,
        Sys.GETPPID: known,
        Sys.SPAWN: spawn,
        Sys.WAIT: wait,
        Sys.KILL: kill,
        Sys.PS: ps,
        Sys.NICE: nice,
        Sys.INSPECT: inspect,
    }


class MessageCalls:
    def __init__(self, table: ProcTable, mail: Mail, calls: CallTable, services: Services) -> None:
        self.table = table
        self.mail = mail
        self.calls = calls
        self.services = services

    def send(self, call: Call, args: wire.Send) -> None:
        if call.key in self.mail.journal.served:
            return  # by a kernel that died
        target = self.table.get(args.pid)
        if target is None or not target.alive:
            raise wire.error(errno.ESRCH, f"{args.pid}: no such agent")
        self.mail.send(call, target, args.obj)

    def recv(self, call: Call, args: wire.Recv) -> Any:
        me = access.require_agent(call.peer, "has a mailbox")
        served = self.mail.journal.served.get(call.key)
        if served is not None:
            return served
        if args.timeout_s == 0 and not self.mail.has_message(me.pid):
            raise wire.error(errno.ETIMEDOUT, "no message within 0 s")
        received = self.mail.receive(call, me)
        if received is not None:
            return received
        self.calls.set_timeout(call, args.timeout_s, "message")
        return PENDING

    def cancel(self, call: Call, args: wire.Cancel) -> bool:
        """Cancel a call; whether there was one. The cancelled call gets ECANCELED as its final reply."""
        victim = call.peer.calls.get(args.id)
        if victim is None:
            # Perhaps a call from before a kernel's death that was not submitted again: a service may still have it.
            for service in self.services:
                service.send(link.CancelCall((call.peer.id, args.id)))
            return False
        if victim is call:
            return False
        self.calls.fail(victim, errno.ECANCELED, "cancelled")
        return True

    HANDLERS: ClassVar[Family] = {Sys.SEND: send, Sys.RECV: recv, Sys.CANCEL: cancel}


class ModelCalls:
    def __init__(self, generations: Generations) -> None:
        self.generations = generations

    def generate(self, call: Call, args: wire.Generate) -> Any:
        self.generations.generate(call, args)
        return PENDING

    def models(self, call: Call, args: wire.NoArgs) -> list[wire.ModelInfo]:
        models = [core.info for core in self.generations.cores if core.info is not None]
        return [*models, *(route.info for route in self.generations.routes)]

    HANDLERS: ClassVar[Family] = {Sys.GENERATE: generate, Sys.MODELS: models}


class SystemCalls:
    """Calls about the system. `stop` begins to stop it; `change` sets a setting, and returns its old value and its new
    one."""

    def __init__(
        self, status: StatusRequests, stop: Callable[[], None], change: Callable[[str, str], tuple[str, str]]
    ) -> None:
        self._status = status
        self._stop = stop
        self._change = change

    def status(self, call: Call, args: wire.Status) -> Any:
        self._status.ask(call, args.check)
        return PENDING

    def shutdown(self, call: Call, args: wire.NoArgs) -> None:
        self._stop()

    def set(self, call: Call, args: wire.Set) -> tuple[str, str]:
        return self._change(args.name, args.value)

    HANDLERS: ClassVar[Family] = {Sys.STATUS: status, Sys.SHUTDOWN: shutdown, Sys.SET: set}


class AccessCalls:
    """Calls about rules and asks."""

    def __init__(self, approvals: Approvals) -> None:
        self._approvals = approvals

    def asks(self, call: Call, args: wire.NoArgs) -> list[wire.Asked]:
        return self._approvals.listed()

    def watch(self, call: Call, args: wire.WatchAsks) -> Any:
        self._approvals.watch(call, args)
        return PENDING

    def answer(self, call: Call, args: wire.AnswerAsk) -> None:
        self._approvals.answer(call.peer, args)

    def rules(self, call: Call, args: wire.NoArgs) -> wire.RulesInForce:
        return self._approvals.in_force()

    def always(self, call: Call, args: wire.NoArgs) -> list[wire.Always]:
        return self._approvals.always.listed()

    def revoke(self, call: Call, args: wire.RevokeAlways) -> None:
        self._approvals.revoke(call.peer, args.number)

    HANDLERS: ClassVar[Family] = {
        Sys.ASK_LIST: asks,
        Sys.ASK_WATCH: watch,
        Sys.ASK_ANSWER: answer,
        Sys.RULES: rules,
        Sys.ALWAYS_LIST: always,
        Sys.ALWAYS_REVOKE: revoke,
    }


class ToolCalls:
    """Tools that need no toolbox."""

    def __init__(self, approvals: Approvals, charges: Charges, services: Services) -> None:
        self._approvals = approvals
        self._charges = charges
        self._services = services

    def admit(self, call: Call, args: wire.AdmitTool) -> bool:
        there = args.name in pure.NAMES and self._services.of_kind("toolbox") is not None
        if not there or self._approvals.concerns_tool(args.name):
            return False
        self._charges.admit(call)
        return True

    HANDLERS: ClassVar[Family] = {Sys.TOOL_ADMIT: admit}


class TokenCalls:
    """Calls about agents without a process."""

    def __init__(self, agents: Lifecycle, outside: Outside) -> None:
        self._agents = agents
        self._outside = outside

    def new(self, call: Call, args: wire.NewToken) -> Any:
        if self._agents.stopping:
            raise wire.error(errno.EAGAIN, "aiosd is shutting down")
        self._outside.new(call, args)
        return PENDING

    def listed(self, call: Call, args: wire.NoArgs) -> wire.TokenList:
        return self._outside.listed()

    HANDLERS: ClassVar[Family] = {Sys.TOKEN_NEW: new, Sys.TOKEN_LIST: listed}


FAMILIES = (ProcessCalls, MessageCalls, ModelCalls, SystemCalls, AccessCalls, ToolCalls, TokenCalls)
Handlers = ProcessCalls | MessageCalls | ModelCalls | SystemCalls | AccessCalls | ToolCalls | TokenCalls


def bound(*families: Handlers) -> dict[int, CallHandler]:
    """The handlers of these families, by number."""
    return {sys: handler.__get__(family) for family in families for sys, handler in family.HANDLERS.items()}


def _compare() -> None:
    """Raises Bug unless every call of the kernel has a handler, and every handler a call. (Generations are answered by
    an llm core, but the kernel has a handler for them, because it counts and keeps them.)"""
    handlers = [sys for family in FAMILIES for sys in family.HANDLERS]
    rows = [row.sys for row in wire.TABLE.values() if row.by == "kernel"] + [Sys.GENERATE]
    if sorted(handlers) != sorted(rows):
        raise Bug(f"calls without a handler, or handlers without a call: {sorted(set(handlers) ^ set(rows))}")


_compare()
