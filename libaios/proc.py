"""Processes: the caller's pid; start other agents, wait for them, send them signals, list them.

Pids are aiosd's own, not Linux's. Signals are numbers or `signal.Signals`. An agent may act on itself and on its
descendants; a notebook or script outside any agent acts for its user.
"""

from __future__ import annotations

import contextlib
import os
import signal as _signal
import sys as _sys
from collections.abc import Mapping, Sequence

from libaios import template, wire
from libaios.agent import is_agent
from libaios.plan import Plan, syscall
from libaios.sandbox import wish
from libaios.wire import Limits, ProcInfo, Sys

__all__ = ["Limits", "ProcInfo", "getpid", "getppid", "kill", "nice", "ps", "spawn", "wait"]


@syscall
def getpid() -> Plan[int]:
    """The caller's pid; 0 outside an agent."""
    return Plan(Sys.GETPID, wire.NoArgs())


@syscall
def getppid() -> Plan[int]:
    """The pid of the agent that started the caller; 1 for one started from outside, or whose parent is dead."""
    return Plan(Sys.GETPPID, wire.NoArgs())


@syscall
def spawn(
    target: str | os.PathLike[str],
    *args: str,
    kind: str | None = None,
    name: str | None = None,
    nice: int | None = None,
    group: str | None = None,
    limits: Limits | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    detached: bool | None = None,
    restart: str = "no",
    sandbox: str | None = None,
    net: str | Sequence[str] | None = None,
    preload: Sequence[str] = (),
    python: str | os.PathLike[str] | None = None,
) -> Plan[int]:
    """Start an agent and return its pid.

    `target` is a Python script, a module (`kind="module"`) or a program (`kind="exec"`); without `kind`, a name that
    ends in .py is a script and anything else a program. The child has the caller's environment, working directory,
    stdin, stdout and stderr, its nice value and its budgets; outside an agent, or with `detached=True`, its output
    goes to its log. `limits` gives it a budget of its own: `Limits(tokens=10_000)`; `cost` is in 10^-12 of the unit of
    prices, so 2_500_000_000_000 is 2.50. `restart` ("on-failure", "on-failure:3", "always") has a detached one started
    again when it ends.

    `sandbox` ("none", "flat", "cage") sets how it is confined. Without it, an agent's child is confined as its parent,
    and an agent that is started from outside by the settings. A confined agent can start no agent with more rights,
    and its children have its files and its workspace. `net` is the network of a confined agent: "none", "all", or in
    the cage "gateway" alone or single hosts, such as ["example.org", "*.example.net:8443"]. `preload` has it forked
    from a warm process (a template) that has imported these modules, in the interpreter or virtual environment
    `python`; a confined agent may not name any (PermissionError).

    Raises FileNotFoundError, PermissionError (not executable; a nice value below the caller's; a weaker sandbox),
    OSError(EAGAIN).
    """
    target = os.fspath(target)
    if kind is None:
        kind = "file" if target.endswith(".py") else "exec"
    if detached is None:
        detached = not is_agent()
    environment = os.environ if env is None else env
    forked_from = template.wish(preload, os.fspath(python or "")) if preload or python else None
    folder = os.path.abspath(os.getcwd() if cwd is None else cwd)
    spec = wire.Spawn(
        kind=kind,
        target=wire.os_text(target),
        args=[wire.os_text(str(arg)) for arg in args],
        env={wire.os_text(key): wire.os_text(value) for key, value in environment.items()},
        cwd=wire.os_text(folder),
        name=name,
        nice=nice,
        group=group,
        limits=limits if limits is not None else Limits(),
        umask=_umask(),
        detached=detached,
        restart=restart,
        sandbox=_sandbox(kind, target, folder, environment, [str(arg) for arg in args], sandbox, net, forked_from),
        template=forked_from,
    )
    with contextlib.suppress(AttributeError, ValueError, OSError):  # stdout is None, or closed, or has no reader
        _sys.stdout.flush()  # so that what was printed here comes before what the child prints
    return Plan(Sys.SPAWN, spec, lambda spawned: int(spawned.pid))


def _sandbox(
    kind: str,
    target: str,
    folder: str,
    environment: Mapping[str, str],
    args: Sequence[str],
    level: str | None,
    net: str | Sequence[str] | None,
    forked_from: wire.Template | None,
) -> wire.Sandbox:
    """The sandbox to send. An agent's child has its parent's, so there is nothing to look up unless the caller names
    one."""
    if level is None and net is None and is_agent():
        return wire.Sandbox()
    needed = template.folders(forked_from)
    return wish(kind, target, folder, environment, args=args, level=level, net=net, needed=needed)


def _umask() -> int:
    """The umask, read from /proc: the system call `umask` would also set it, for all threads."""
    try:
        fd = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0o022
    try:
        _, _, rest = os.read(fd, 256).partition(b"\nUmask:")  # the second line
    finally:
        os.close(fd)
    return int(rest.split(None, 1)[0], 8) if rest else 0o022


@syscall
def wait(pid: int = 0, block: bool = True, timeout: float | None = None) -> Plan[tuple[int, int]]:
    """Wait for a child to end (`pid` 0: any) and collect its exit status.

    Returns (pid, status): the exit code, or -n for death by signal n; (0, 0) with `block=False` while none has ended.
    Raises ChildProcessError without such a child, TimeoutError after `timeout` seconds. Outside an agent `pid` may be
    any agent's, and nothing is collected.
    """
    args = wire.Wait(pid, block, timeout)
    return Plan(Sys.WAIT, args, lambda waited: (waited.pid, waited.status), timeout)


@syscall
def kill(pid: int, sig: int = _signal.SIGTERM, timeout: float | None = None) -> Plan[None]:
    """Send a signal to an agent, or with a negative pid to a process group. Signal 0 sends nothing, and only checks
    whether the caller may send one.

    SIGSTOP stops the agent, all processes that it started, and its running generations; the call returns when they are
    stopped. SIGCONT lets them go on. With `timeout` the call returns when the agent has ended: it gets SIGKILL if it is
    still alive after `timeout` seconds. Raises ProcessLookupError, PermissionError.
    """
    return Plan(Sys.KILL, wire.Kill(pid, int(sig), timeout))


@syscall
def ps(all: bool = False) -> Plan[list[ProcInfo]]:
    """The live agents that are the caller's (an agent's: itself and its descendants), or `all` processes of the
    system, zombies and aiosd's own included."""
    return Plan(Sys.PS, wire.Ps(all=all))


@syscall
def nice(increment: int = 0, pid: int = 0) -> Plan[int]:
    """Add to the nice value of the caller (or of `pid`) and return the new one, -20 to 19; higher yields to others.

    Raises PermissionError when an agent tries to lower one.
    """
    return Plan(Sys.NICE, wire.NiceArgs(pid, increment, relative=True))
