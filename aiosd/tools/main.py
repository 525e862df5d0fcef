"""The toolbox: the service that answers calls of tools.

A call is checked against the schema of its tool, waits in `Admission` until everything it needs is free, and runs in a
worker of `Pool`. It has begun when a worker gets it; before that it survives the death of the toolbox, after that it is
never made again.

A built-in tool of a confined agent runs in a worker that is confined like that agent. Tools of a person's files run
with the person's rights: by adding such a tool the person grants these to agents. An MCP server is confined by its
settings.

Calls of a confined agent work in the agent's workspace, as the agent itself does. Callers without a sandbox have a
folder each in `data/tools`. Agents with a name of their own find it again; the folder of an agent without one is
removed at the agent's end.
"""

from __future__ import annotations

import errno
import logging
import os
import posixpath
import shutil
import signal
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from aiosd import threads
from aiosd.access.deed import Unapproved
from aiosd.access.rules import matcher
from aiosd.ipc import link, sealed
from aiosd.ipc.heartbeat import Rounds
from aiosd.ipc.service import LATER, Server
from aiosd.kin import adopt_orphans
from aiosd.sandbox.box import Box
from aiosd.tools import concerns, direct, held
from aiosd.tools.admission import Admission, Requirements
from aiosd.tools.errands import Errands
from aiosd.tools.messages import Described, Done, Run, Tool
from aiosd.tools.meter import Bills
from aiosd.tools.pins import Pins
from aiosd.tools.pool import Cell, Job, Pool
from aiosd.tools.servers import McpLauncher
from aiosd.tools.spec import BUILT_IN_KINDS, MCP, ToolboxSpec
from libaios import wire
from libaios.channel import Channel
from libaios.wire import CallTool, Sys, ToolInfo, TrustTool

logger = logging.getLogger("toolbox")

BUILT_IN = "aiosd.tools.builtin"
CHANGED = (
    "the server describes {0} otherwise than before; it is not offered, and asks a person at each call, until one has "
    "accepted that: aiosd tools --trust {0}"
)
ERRANDS = 256  # open with the kernel at a time
LEAST_S = 0.005  # of the toolbox's own time: smaller amounts are charged when their sum reaches this


@dataclass(slots=True)
class Known:
    """A tool that can be called."""

    tool: Tool
    source: str
    validator: Any
    changed: bool = False  # its server has changed its description, and no person has accepted that

    @property
    def info(self) -> ToolInfo:
        shown = "built in" if self.source == BUILT_IN else self.source
        return ToolInfo(self.tool.name, self.tool.description, self.tool.parameters, shown)


@dataclass(slots=True)
class _Call:
    job: Job
    source: str
    cell: Cell


class ToolboxService:
    def __init__(self, channel: Channel, spec: ToolboxSpec) -> None:
        self.spec = spec
        self.tools: dict[str, Known] = {}
        self.changed: dict[str, Known] = {}  # tools that are not offered, but that a person can be asked for
        self.errors: dict[str, str] = {}  # of sources that could not be loaded
        self.server = Server(
            channel,
            {Sys.TOOL_LIST: self.listing, Sys.TOOL_CALL: self.call, Sys.TOOL_TRUST: self.trust},
            self.stats,
            on_gone=self.peer_gone,
            on_keep=self.only_alive,
            on_cancel=self.cancelled,
            on_again=lambda key: self.errands.again(key),
            others=self._other,
            on_begin=self._report_files,
            queued=frozenset((Sys.TOOL_CALL, Sys.TOOL_LIST)),
        )
        self.admission: Admission[link.CallKey] = Admission(spec.workers)
        self.errands = Errands(self.server.send)
        self.direct: Admission[link.CallKey] = Admission(ERRANDS)  # of calls whose tool is a system call
        self._direct: dict[link.CallKey, Callable[[], None]] = {}  # the function that begins each of them
        self.pins = Pins(Path(spec.folder).parent / "tools.json")
        self._unknown: set[str] = set()  # unknown tools in rules, already reported in the log
        self._loading = {BUILT_IN, *spec.files}
        servers = sealed.servers(spec.sealed) if spec.sealed >= 0 else {}
        self._starting = {f"{MCP}{name}" for name in servers}  # starting servers: only their own calls wait
        self._early: list[tuple[link.Ask, Any]] = []  # calls that came before all sources were loaded
        self._calls: dict[link.CallKey, _Call] = {}
        self._served = 0
        os.makedirs(spec.folder, mode=0o700, exist_ok=True)
        self.bills = Bills(self._charge)
        self.pool = Pool(
            self.server.timers,
            self.server.watch,
            self.server.forget,
            spec.folder,
            self._described,
            McpLauncher(servers, spec.servers, self.server.watch),
            self.bills,
        )

    def run(self, rounds: Rounds) -> int:
        for source in (BUILT_IN, *self.spec.files, *self._starting):
            self.pool.load(source)
        try:
            signal.signal(signal.SIGTERM, self.server.end)  # at the end of the system; workers end before their parent
            return self.server.run(rounds)
        finally:
            self.pool.close()

    def stats(self) -> dict[str, Any]:
        return {
            "tools": len(self.tools),
            "calls": self._served,
            "waiting": self.admission.waiting,
            "running": self.admission.running,
            **self.pool.stats(),
            **({"errors": self.errors} if self.errors else {}),
        }

    # ── sources ───────────────────────────────────────────────────────────────────────────────────────────

    def _described(self, source: str, described: Described) -> None:
        """A worker of this source has described its tools, at its start or because a server has other tools now."""
        if described.error:
            self._failed(source, source, described.error)
        elif source in self._loading or source in self._starting or source.startswith(MCP):
            self._replace(source, described.tools)
        if source in self._loading:
            self._loading.discard(source)
            self._report_files()
        self._starting.discard(source)
        if not self._loading and not self._starting:
            self._note_unknown()
        early, self._early = self._early, []
        for ask, args in early:
            self._resume(ask, args)

    def _failed(self, source: str, place: str, why: str) -> None:
        """Record an error of a source, or (`place`) of one of its tools."""
        self.errors[place] = why
        if not (source in self._loading and source in self.spec.files):  # else the kernel tells it, to whom it matters
            logger.error("tools: %s: %s", place, why)

    def _report_files(self) -> None:
        """Tell the kernel, once all sources are loaded, which files have errors."""
        if not self._loading:
            of_files = {place: why for place, why in self.errors.items() if place.partition(": ")[0] in self.spec.files}
            self.server.send(link.ToolFiles(of_files))

    def _note_unknown(self) -> None:
        """Report rules about tools that do not exist: only now all tools of files and servers are known."""
        there = {*self.tools, *self.changed}
        for rule in self.server.policy.rules:
            missing = [name for name in rule.names if rule.tool and not any(map(matcher(name), there))]
            for name in set(missing) - self._unknown:
                self._unknown.add(name)
                logger.warning("%s: there is no tool %s", rule.shown, name)

    def _replace(self, source: str, tools: list[Tool]) -> None:
        """Replace the tools of a source."""
        self.tools = {name: known for name, known in self.tools.items() if known.source != source}
        self.changed = {name: known for name, known in self.changed.items() if known.source != source}
        self.errors = {place: why for place, why in self.errors.items() if place.partition(": ")[0] != source}
        for tool in tools:
            if source.startswith(MCP) and not self.pins.holds(tool):
                self.errors[f"{source}: {tool.name}"] = CHANGED.format(tool.name)
                logger.warning("%s: %s", source, CHANGED.format(tool.name))
                self._add(tool, source, changed=True)
            else:
                self._add(tool, source)

    def _add(self, tool: Tool, source: str, changed: bool = False) -> None:
        import jsonschema_rs  # 15 MB, in this process alone

        known = self.tools.get(tool.name)
        taken = known.info.source if known is not None else ""
        if tool.name in BUILT_IN_KINDS and source != BUILT_IN:  # regardless of the order of loading
            taken = "built in"
        if taken:
            self._failed(source, f"{source}: {tool.name}", f"there is a tool of this name already ({taken})")
            return
        try:
            validator = jsonschema_rs.validator_for(tool.parameters, offline=True)  # no reference in it is fetched
        except ValueError as err:
            reason = str(err).partition("\n")[0]
            self._failed(source, f"{source}: {tool.name}", f"its parameters are no JSON Schema: {reason}")
            return
        (self.changed if changed else self.tools)[tool.name] = Known(tool, source, validator, changed)

    # ── calls ─────────────────────────────────────────────────────────────────────────────────────────────

    def listing(self, ask: link.Ask, args: wire.NoArgs) -> Any:
        if self._loading:
            self._early.append((ask, args))
            return LATER
        return [self.tools[name].info for name in sorted(self.tools)]

    def trust(self, ask: link.Ask, args: TrustTool) -> None:
        """Accept the current description of a tool. Only a person may do that."""
        if ask.caller.pid:
            raise wire.error(errno.EPERM, "only a person trusts a tool")
        if not self.pins.accept(args.name):
            raise wire.error(errno.ENOENT, f"no tool of this name waits to be trusted: {args.name}")
        self.pool.load(f"{MCP}{args.name.partition('__')[0]}")  # it describes all its tools anew

    def _waits(self, args: CallTool) -> bool:
        """Is this a call of a tool that is still being loaded?"""
        if self._loading:
            return True
        return args.name not in self.tools and f"{MCP}{args.name.partition('__')[0]}" in self._starting

    def call(self, ask: link.Ask, args: CallTool) -> Any:
        if self._waits(args):
            self._early.append((ask, args))
            return LATER
        began = time.thread_time()
        try:
            return self._call(ask, args)
        finally:
            if ask.caller.pid:
                self.bills.add(ask.caller.pid, time.thread_time() - began, LEAST_S)

    def _charge(self, pid: int, cpu_us: int, memory_bytes: int) -> None:
        self.server.send(link.ToolUse(pid, cpu_us, memory_bytes))

    def _call(self, ask: link.Ask, args: CallTool) -> Any:
        known = self._check(args, asks=bool(ask.caller.pid))
        tool = known.tool
        files, hosts = self._allowed(ask, known, args)
        self._served += 1
        if known.source == BUILT_IN and tool.name in direct.FUNCTIONS:
            return self._call_direct(ask, tool, args)
        folder = self._folder(ask.caller)
        job = Job(
            tool,
            Run(tool.name, args.arguments, folder, files, hosts),
            ask.caller.pid,
            on_text=(lambda text: self.server.part(ask.key, text)) if args.stream else lambda text: None,
            on_done=lambda done: self._done(ask.key, done),
            on_over=lambda: self._over(ask.key),
        )
        self._calls[ask.key] = _Call(job, known.source, cell_of(ask.caller) if known.source == BUILT_IN else Cell())
        self.admission.submit(ask.key, ask.caller.pid, needs_of(tool, args.arguments, folder))
        self.server.timers.after(0.0, self._begin)  # after this call is recorded as one that is answered later
        return LATER

    def _allowed(
        self, ask: link.Ask, known: Known, args: CallTool
    ) -> tuple[dict[str, held.Identity] | None, list[str] | None]:
        """The files and hosts that a built-in tool may open in this call, for `held`. Raises Unapproved."""
        tool, policy = known.tool, self.server.policy
        if not (policy.concerns(tool.name, True) or tool.asks or known.changed) or not ask.caller.pid:
            return None, None
        built_in = known.source == BUILT_IN
        folder = "" if known.source.startswith(MCP) else self._folder(ask.caller)
        deed = concerns.deed(tool, args.arguments, folder, known.changed, known=built_in)
        self.server.require(ask, deed)
        ruled = {"path", "host"} if ask.approved else policy.kinds_for(tool.name, True)
        return (
            concerns.files_of(deed.resources) if built_in and "path" in ruled else None,
            concerns.hosts_of(deed.resources) if built_in and "host" in ruled else None,
        )

    def _call_direct(self, ask: link.Ask, tool: Tool, args: CallTool) -> Any:
        """Start a call of a tool that needs no worker."""
        key = ask.key
        try:
            result = direct.FUNCTIONS[tool.name](**args.arguments)
        except ValueError as err:
            raise wire.error(errno.EINVAL, str(err)) from None
        if not isinstance(result, Generator):
            return result
        self._direct[key] = lambda: self.errands.begin(key, result, partial(self._errand_done, key))
        self.direct.submit(key, ask.caller.pid, Requirements(tool.name, tool.instances))
        self.server.timers.after(0.0, self._begin_direct)  # after this call is recorded as one that is answered later
        return LATER

    def _begin_direct(self) -> None:
        for key in self.direct.begin():
            self.server.begun(key)
            self._direct.pop(key)()

    def _errand_done(self, key: link.CallKey, result: Any, error: OSError | None) -> None:
        self.direct.end(key)
        if error is not None:
            self.server.fail(key, error)
        else:
            self.server.answer(key, direct.plain(result))
        self._begin_direct()

    def _other(self, message: link.ToService) -> None:
        if isinstance(message, link.ErrandDone):
            self.errands.replied(message)

    def _resume(self, ask: link.Ask, args: Any) -> None:
        """Start a call that came before everything was loaded."""
        try:
            answer = self.listing(ask, args) if ask.sys == Sys.TOOL_LIST else self.call(ask, args)
        except (OSError, Unapproved) as err:
            self.server.fail(ask.key, err)
            return
        if answer is not LATER:
            self.server.answer(ask.key, answer)

    def _check(self, args: CallTool, asks: bool) -> Known:
        """Check a call; returns its tool. `asks`: a person will be asked, so tools that are not offered are allowed,
        too."""
        known = self.tools.get(args.name) or (self.changed.get(args.name) if asks else None)
        if known is None:
            there = ", ".join(sorted(self.tools)) or "none"
            raise wire.error(errno.ENOENT, f"no such tool: {args.name} (there are: {there})")
        for error in known.validator.iter_errors(args.arguments):
            place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.instance_path)
            raise wire.error(errno.EINVAL, f"{args.name}{place}: {error.message}"[:2000])
        return known

    def _begin(self) -> None:
        for key in self.admission.begin():
            call = self._calls[key]
            self.server.begun(key)
            self.pool.run(call.source, call.cell, call.job)

    def _done(self, key: link.CallKey, done: Done) -> None:
        if done.errno:
            self.server.fail(key, wire.error(done.errno, done.message))
        else:
            self.server.answer(key, done.result)

    def _over(self, key: link.CallKey) -> None:
        self._calls.pop(key, None)
        self.admission.end(key)
        self._begin()

    def cancelled(self, key: link.CallKey) -> None:
        """The caller does not wait for the call any more."""
        self._early = [(ask, args) for ask, args in self._early if ask.key != key]
        if self._direct.pop(key, None) is not None or key in self.errands:
            self.direct.end(key)
            self.errands.cancel(key)
            self._begin_direct()
        call = self._calls.get(key)
        if call is None:
            return
        if self.admission.position(key) is not None:  # it has not begun
            self._over(key)
        else:
            self.pool.cancel(call.job)

    # ── folders ───────────────────────────────────────────────────────────────────────────────────────────

    def _folder(self, caller: link.Caller) -> str:
        """The caller's folder, created if needed."""
        if caller.box:
            return msgspec.msgpack.decode(caller.box, type=Box).workspace  # where the agent itself works
        if not caller.pid:
            name = f"person-{caller.uid}"
        elif caller.named:
            name = f"name-{caller.uid}-{caller.group}-{caller.name}"
        else:
            name = f"agent-{caller.pid}"
        folder = os.path.join(self.spec.folder, name)
        os.makedirs(folder, mode=0o700, exist_ok=True)
        return folder

    def peer_gone(self, peer: int) -> None:
        self.bills.forget(peer)
        self._remove([Path(self.spec.folder, f"agent-{peer}")])

    def only_alive(self, peers: list[int]) -> None:
        self.bills.again()
        alive = {f"agent-{peer}" for peer in peers}
        self._remove(path for path in Path(self.spec.folder).glob("agent-*") if path.name not in alive)

    @staticmethod
    def _remove(folders: Iterable[Path]) -> None:
        """Remove folders, in a thread, because they may contain many files. Raises OSError if there is no thread: then
        they are removed when the toolbox is started again."""
        there = [folder for folder in folders if folder.exists()]
        if there:
            threads.start(lambda: _remove(there), "remove", daemon=False)


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def cell_of(caller: link.Caller) -> Cell:
    """How a built-in tool is confined for this caller."""
    return Cell(caller.box, caller.network if caller.network[1] else (0, 0))


def needs_of(tool: Tool, arguments: dict[str, Any], folder: str) -> Requirements:
    """What a call of this tool with these arguments uses."""
    return Requirements(
        tool.name,
        tool.instances,
        frozenset(_key(template, arguments, folder) for template in tool.reads),
        frozenset(_key(template, arguments, folder) for template in tool.writes),
    )


def _key(template: str, arguments: dict[str, Any], folder: str) -> str:
    """The key of a lock. The key of a file is its whole path, so that `a.txt` and `./a.txt` are the same."""
    key = template
    for name, value in arguments.items():
        key = key.replace("{" + name + "}", str(value))
    if key.startswith("file:"):
        return "file:" + posixpath.normpath(posixpath.join(folder, key.removeprefix("file:")))
    return key


def main(channel: Channel, spec: ToolboxSpec, rounds: Rounds) -> int:
    adopt_orphans()  # children of a dead worker become this process's, not the supervisor's
    return ToolboxService(channel, spec).run(rounds)
