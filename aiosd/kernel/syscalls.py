"""The table of system calls, and their handlers.

A handler gets the kernel, the open call and its decoded arguments. It checks what types cannot say, asks
`access` whether the caller may, calls one part of the kernel and returns the body of the reply — or PENDING,
when `Kernel.finish` or `Kernel.fail` will close the call later. An OSError it raises becomes the reply.
"""

from __future__ import annotations

import errno
import os
import re
import signal
from collections.abc import Callable
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Final

from msgspec import Raw

from aiosd import link, procfs
from aiosd.kernel import access, live
from aiosd.kernel.peer import Call, ClientPeer, Peer
from aiosd.kernel.proc import Message, Proc, State, describe, shell_status
from aiosd.kernel.status import FDS_PER_AGENT, descriptors_left, max_agents
from libaios import wire
from libaios.wire import Sys

if TYPE_CHECKING:
    from aiosd.kernel.loop import Kernel

#: "The reply comes later."
PENDING: Final = object()

SPAWN_CHARS = 1 << 20
MAILBOX_MESSAGES = 1000
MAILBOX_BYTES = 4 << 20

Handler = Callable[["Kernel", Call, Any], Any]


# ── processes ─────────────────────────────────────────────────────────────────────────────────────────────


def pid_of(peer: Peer) -> int:
    return peer.proc.pid if peer.proc is not None else 0


def ppid_of(peer: Peer) -> int:
    return peer.proc.ppid if peer.proc is not None else 0


def sys_known(kernel: Kernel, call: Call, args: wire.NoArgs) -> int:
    return KNOWN[call.sys](call.peer)


def sys_spawn(kernel: Kernel, call: Call, args: wire.Spawn) -> Any:
    peer, parent = call.peer, call.peer.proc
    if kernel.stopping:
        raise wire.error(errno.EAGAIN, "aiosd is shutting down")
    if descriptors_left(kernel) < FDS_PER_AGENT:
        message = f"no descriptors for another agent: the limit on open files allows {max_agents()} (ulimit -n)"
        raise wire.error(errno.EMFILE, message)
    fds = tuple(peer.fds[:3]) if isinstance(peer, ClientPeer) else ()
    if isinstance(peer, ClientPeer) and not args.detached and len(fds) < 3:
        raise wire.error(errno.EINVAL, "stdin, stdout and stderr must come with an attached spawn")
    if not os.path.isabs(wire.os_str(args.cwd)):
        raise wire.error(errno.EINVAL, "cwd must be an absolute path")
    if args.name is not None and (args.name.isdecimal() or args.name.startswith("-")):
        raise wire.error(errno.EINVAL, f"name: {args.name!r} would be taken for a pid or an option")
    texts = (args.target, args.cwd, *args.args, *args.env, *args.env.values())
    if any("\0" in text and not _is_bytes(text) for text in texts):
        raise wire.error(errno.EINVAL, "a string with a null byte")
    if sum(map(len, texts)) > SPAWN_CHARS:
        raise wire.error(errno.E2BIG, f"arguments and environment have more than {SPAWN_CHARS} characters")
    if any(not key or "=" in key for key in args.env):
        raise wire.error(errno.EINVAL, "env: a name is empty or holds '='")
    spec = link.Fork(
        key=call.key,
        ppid=access.parent_pid(peer),
        pgid=parent.pgid if parent is not None else 0,
        uid=os.getuid(),
        kind=args.kind,
        target=args.target,
        args=args.args,
        env=args.env,
        cwd=args.cwd,
        name=args.name or _default_name(args),
        nice=_nice_of_child(parent, args.nice),
        group=_group_of_child(parent, args.group),
        limits=args.limits,
        umask=args.umask,
        detached=args.detached,
        attached=args.attached and isinstance(peer, ClientPeer) and not args.detached,
        tty=args.tty,
    )
    kernel.agents.fork(call, spec, fds)
    return PENDING


def _is_bytes(text: str) -> bool:
    """Whether it is bytes as `wire.os_text` writes them."""
    rest = text[1:]
    return text[0] == "\0" and bool(rest) and "\0" not in rest and ord(max(rest)) < 256


def _default_name(args: wire.Spawn) -> str:
    target = "stdin" if args.kind == "file" and args.target == "-" else wire.os_shown(args.target)
    stem = target.rpartition(".")[2] if args.kind == "module" else PurePath(target).stem
    name = re.sub(r"[\x00-\x20\x7f/]+", "_", stem)[:64] or "agent"
    return f"_{name}"[:64] if name.isdecimal() or name.startswith("-") else name


def _nice_of_child(parent: Proc | None, nice: int | None) -> int:
    if parent is None:
        return nice or 0
    if nice is not None and nice < parent.nice:
        raise wire.error(errno.EPERM, f"nice: an agent may not start one nicer than itself ({parent.nice})")
    return parent.nice if nice is None else nice


def _group_of_child(parent: Proc | None, group: str | None) -> str:
    if parent is None:
        return group or "default"
    if group is not None and group != parent.group:
        raise wire.error(errno.EPERM, f"group: an agent of {parent.group!r} may not start one of {group!r}")
    return parent.group


def sys_wait(kernel: Kernel, call: Call, args: wire.Wait) -> Any:
    result = kernel.waiters.wait(call, args)
    return PENDING if result is None else result


def sys_kill(kernel: Kernel, call: Call, args: wire.Kill) -> Any:
    targets = _targets(kernel, call, args.pid)
    alive = [proc for proc in targets if proc.alive]
    if args.signal == 0 or not alive:
        return None
    if args.signal in (signal.SIGSTOP, signal.SIGCONT):
        # An agent is parked with all that it started.
        trees = {proc.pid: proc for target in alive for proc in kernel.table.subtree(target) if proc.alive}
        alive = list(trees.values())
    before = [(proc, proc.continued) for proc in alive]
    for proc in alive:
        kernel.agents.deliver(proc, args.signal, call.key)
    if args.signal == signal.SIGSTOP:
        done = kernel.waiters.until(
            call, lambda: all(p.state is not State.RUNNING or p.continued != count for p, count in before)
        )
        return None if done else PENDING
    if args.signal == signal.SIGCONT:
        done = kernel.waiters.until(call, lambda: all(p.state is not State.STOPPED for p in alive))
        return None if done else PENDING
    if args.timeout_s is not None:
        return None if kernel.waiters.until_dead(call, alive, args.timeout_s) else PENDING
    return None


def _targets(kernel: Kernel, call: Call, pid: int) -> list[Proc]:
    """The agents meant by `pid`, all of which the caller may control; raises ESRCH or EPERM."""
    if pid <= 0:
        pgid = -pid or access.require_agent(call.peer, "has a process group of its own").pgid
        members = kernel.table.members(pgid)
        if not members:
            raise wire.error(errno.ESRCH, f"{-pgid}: no such process group")
        allowed = [proc for proc in members if access.may_control(kernel.table, call.peer, proc)]
        if not allowed:
            raise wire.error(errno.EPERM, f"{-pgid}: permission denied")
        return allowed
    proc = kernel.table.get(pid)
    if proc is None:
        raise kernel.status.no_agent(pid)
    access.require_control(kernel.table, call.peer, proc)
    return [proc]


def sys_ps(kernel: Kernel, call: Call, args: wire.Ps) -> list[wire.ProcInfo]:
    me = call.peer.proc
    pids = None if args.pids is None else set(args.pids)  # as many as somebody may send
    procs = [proc for proc in kernel.table if proc.alive or args.all or args.dead or pids is not None]
    if args.dead:
        procs += kernel.table.history.values()
    if me is not None and not args.all and pids is None:
        procs = [proc for proc in procs if kernel.table.is_ancestor(me.pid, proc)]
    if pids is not None:
        procs = [proc for proc in procs if proc.pid in pids]
    if args.name is not None:
        procs = [proc for proc in procs if proc.name == args.name]
    kernel.agents.sample_new(procs)
    lines = _system_lines(kernel, pids, args.name) if args.all or pids is not None else []
    return lines + [describe(proc, kernel.cores.context_of(proc.pid)) for proc in procs]


def _system_lines(kernel: Kernel, pids: set[int] | None, wanted: str | None) -> list[wire.ProcInfo]:
    """aiosd's own processes as lines of aios-ps."""
    lines = []
    for name, (pid, ospid) in kernel.status.system_processes().items():
        if (pids is not None and pid not in pids) or (wanted is not None and name != wanted):
            continue
        stat = procfs.read_stat(ospid)
        lines.append(
            wire.ProcInfo(
                pid=pid,
                ppid=0 if pid == 1 else 1,
                pgid=pid,
                ospid=ospid,
                uid=os.getuid(),
                stat="S" if stat is None or stat.state != "R" else "R",
                nice=0,
                name=name,
                command=f"aiosd: {name}",
                group="system",
                calls=0,
                prompt_tokens=0,
                cached_tokens=0,
                completion_tokens=0,
                ctx_tokens=0,
                mem_bytes=kernel.status.pss_bytes(ospid),
                cpu_s=stat.cpu_s if stat is not None else 0.0,
                started=kernel.born.started,
                system=True,
            )
        )
    return lines


def sys_nice(kernel: Kernel, call: Call, args: wire.NiceArgs) -> int:
    if args.pid:
        (proc,) = _targets(kernel, call, args.pid)
    else:
        proc = access.require_agent(call.peer, "has a nice value of its own")
    if args.value is None:
        return proc.nice
    new = max(-20, min(19, proc.nice + args.value if args.relative else args.value))
    if new < proc.nice and call.peer.proc is not None:
        raise wire.error(errno.EACCES, f"nice: an agent may not lower it (from {proc.nice} to {new})")
    kernel.agents.renice(proc, new)
    return new


def sys_inspect(kernel: Kernel, call: Call, args: wire.PidArgs) -> dict[str, Any]:
    proc = kernel.table.find(args.pid)
    if proc is None:
        raise kernel.status.no_agent(args.pid)
    access.require_control(kernel.table, call.peer, proc)
    return _inspection(kernel, proc)


def _inspection(kernel: Kernel, proc: Proc) -> dict[str, Any]:
    info = describe(proc, kernel.cores.context_of(proc.pid))
    open_calls = list(proc.peer.calls.values()) if proc.peer is not None else []
    return {
        **{field: getattr(info, field) for field in info.__struct_fields__},
        "state": proc.state.value,
        "log": proc.log,
        "attached": bool(proc.attached_to),
        "ended": proc.ended or None,
        "signal": -proc.status if proc.status is not None and proc.status < 0 else None,
        "exit": None if proc.status is None else shell_status(proc.status),
        "budget": proc.budget,
        "reason": proc.reason,
        "children": [child.pid for child in kernel.table.children_of(proc.pid)],
        "budgets": [
            {
                "owner": budget.owner,
                "tokens": budget.limits.tokens,
                "tokens_used": budget.tokens_used,
                "time_s": budget.limits.time_s,
                "memory_bytes": budget.limits.memory_bytes,
                "reached": budget.reached,
            }
            for budget in proc.budgets
        ],
        "mailbox": len(proc.mailbox),
        "connected": proc.peer is not None,
        "open_calls": [{"id": open_call.id, "call": _call_name(open_call.sys)} for open_call in open_calls],
    }


def _call_name(number: int) -> str:
    return Sys(number).name.lower() if number in Sys._value2member_map_ else str(number)


# ── messages ──────────────────────────────────────────────────────────────────────────────────────────────


def sys_send(kernel: Kernel, call: Call, args: wire.Send) -> None:
    if call.key in kernel.journal.served:
        return  # by a kernel that died
    target = kernel.table.get(args.pid)
    if target is None or not target.alive:
        raise wire.error(errno.ESRCH, f"{args.pid}: no such agent")
    sender = call.peer.proc.pid if call.peer.proc is not None else 0
    obj = Raw(bytes(args.obj))
    size = len(memoryview(obj))
    if size > MAILBOX_BYTES:
        raise wire.error(errno.EMSGSIZE, f"a message of {size} bytes; at most {MAILBOX_BYTES} fit into a mailbox")
    if len(target.mailbox) >= MAILBOX_MESSAGES or target.mailbox_bytes + size > MAILBOX_BYTES:
        raise wire.error(errno.EAGAIN, f"{args.pid}: mailbox is full ({len(target.mailbox)} messages)")
    target.mailbox.append(Message(kernel.journal.sent(call.key, target.pid, sender, obj), sender, obj))
    target.mailbox_bytes += size
    if target.receivers:
        receiver = target.receivers[0]
        kernel.finish(receiver, _take_message(kernel, receiver, target))


def sys_recv(kernel: Kernel, call: Call, args: wire.Recv) -> Any:
    me = access.require_agent(call.peer, "has a mailbox")
    served = kernel.journal.served.get(call.key)
    if served is not None:
        return served
    if me.mailbox:
        return _take_message(kernel, call, me)
    me.receivers.append(call)
    call.forget = lambda: me.receivers.remove(call)
    kernel.set_timeout(call, args.timeout_s, "message")
    return PENDING


def _take_message(kernel: Kernel, call: Call, proc: Proc) -> wire.Received:
    message = proc.mailbox.popleft()
    proc.mailbox_bytes -= len(memoryview(message.obj))
    kernel.journal.taken(call.key, message.seq)
    return wire.Received(message.sender, message.obj)


# ── language model ────────────────────────────────────────────────────────────────────────────────────────


def sys_generate(kernel: Kernel, call: Call, args: wire.Generate) -> Any:
    kernel.generations.generate(call, args)
    return PENDING


def sys_embed(kernel: Kernel, call: Call, args: wire.Embed) -> Any:
    kernel.generations.forward(call, args.model, link.SubmitEmbed(call.key, args), args.timeout_s)
    return PENDING


def sys_tokenize(kernel: Kernel, call: Call, args: wire.Tokenize) -> Any:
    kernel.generations.forward(call, args.model, link.SubmitTokenize(call.key, args), None)
    return PENDING


def sys_detokenize(kernel: Kernel, call: Call, args: wire.Detokenize) -> Any:
    kernel.generations.forward(call, args.model, link.SubmitDetokenize(call.key, args), None)
    return PENDING


def sys_context(kernel: Kernel, call: Call, args: Any) -> Any:
    """All calls about contexts: the core that has the model does them."""
    group = kernel.generations.call_budget(call)[1]
    message = link.SubmitContext(call.key, group, call.sys, wire.raw(args))
    kernel.generations.forward(call, args.model, message, None)
    return PENDING


def sys_models(kernel: Kernel, call: Call, args: wire.NoArgs) -> list[wire.ModelInfo]:
    return [core.info for core in kernel.cores if core.info is not None]


# ── calls about calls, and about the system ───────────────────────────────────────────────────────────────


def sys_cancel(kernel: Kernel, call: Call, args: wire.Cancel) -> bool:
    """Whether there was something to cancel. The cancelled call gets ECANCELED as its final reply."""
    victim = call.peer.calls.get(args.id)
    if victim is None:
        # A call of the last kernel's time that was not submitted again, perhaps: a core may have it still.
        if kernel.born.epoch > 1:
            for core in kernel.cores:
                core.send(link.CancelCall((call.peer.id, args.id)))
        return False
    if victim is call:
        return False
    kernel.fail(victim, errno.ECANCELED, "cancelled")
    return True


def sys_status(kernel: Kernel, call: Call, args: wire.Status) -> Any:
    kernel.status.ask(call, args.check)
    return PENDING


def sys_shutdown(kernel: Kernel, call: Call, args: wire.NoArgs) -> None:
    access.require_person(call.peer, "stop the system")
    kernel.to_supervisor(link.Shutdown())


def sys_set(kernel: Kernel, call: Call, args: wire.Set) -> tuple[str, str]:
    access.require_person(call.peer, "change settings")
    return live.change(kernel, args.name, args.value)


def sys_not_here(kernel: Kernel, call: Call, args: None) -> Any:
    manager = {Sys.MEM: "the memory manager", Sys.STO: "the storage manager", Sys.TOOL: "the tool manager"}
    raise wire.error(errno.ENOSYS, f"{manager[Sys(call.sys)]} is not part of this release")


#: Calls without arguments whose answer is known of every caller: they cannot fail and need not be opened.
KNOWN: dict[int, Callable[[Peer], int]] = {
    Sys.GETPID: pid_of,
    Sys.GETPPID: ppid_of,
}

SYSCALLS: dict[int, Handler] = {
    Sys.GETPID: sys_known,
    Sys.GETPPID: sys_known,
    Sys.SPAWN: sys_spawn,
    Sys.WAIT: sys_wait,
    Sys.KILL: sys_kill,
    Sys.PS: sys_ps,
    Sys.NICE: sys_nice,
    Sys.INSPECT: sys_inspect,
    Sys.SEND: sys_send,
    Sys.RECV: sys_recv,
    Sys.GENERATE: sys_generate,
    Sys.EMBED: sys_embed,
    Sys.TOKENIZE: sys_tokenize,
    Sys.DETOKENIZE: sys_detokenize,
    Sys.MODELS: sys_models,
    Sys.CTX_SAVE: sys_context,
    Sys.CTX_RESTORE: sys_context,
    Sys.CTX_CLOSE: sys_context,
    Sys.CTX_LIST: sys_context,
    Sys.CTX_REMOVE: sys_context,
    Sys.CANCEL: sys_cancel,
    Sys.STATUS: sys_status,
    Sys.SHUTDOWN: sys_shutdown,
    Sys.SET: sys_set,
    Sys.MEM: sys_not_here,
    Sys.STO: sys_not_here,
    Sys.TOOL: sys_not_here,
}
