"""What `aiosd status` shows: the figures of the kernel and of its services, and a check of the books.

A service answers between two of its steps, so the reply waits for all services, but not longer than `WAIT_S`; a service
that was too busy is shown with its last known figures. Work that takes long with thousands of agents is done in pieces
(`jobs`).
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aiosd import __version__
from aiosd.budgets.limits import SAMPLE_S
from aiosd.ipc import endpoint, link
from aiosd.kernel import listing
from aiosd.kernel.approvals import Approvals
from aiosd.kernel.books import Books
from aiosd.kernel.calls import CallTable
from aiosd.kernel.cores import Core
from aiosd.kernel.jobs import Jobs
from aiosd.kernel.peer import Call
from aiosd.kernel.proc import Proc, ProcTable
from aiosd.kernel.routes import Routes
from aiosd.kernel.sandboxes import Sandboxes
from aiosd.kernel.service import Service, Services, ServiceState
from aiosd.kernel.system import FdLimit, System
from libaios import wire

if TYPE_CHECKING:
    from aiosd.config import Settings
    from aiosd.init.records import Inheritance

WAIT_S = 1.0
SETTLE_S = 0.3  # between two checks of books that do not balance


@dataclass(slots=True)
class _Request:
    call: Call
    check: bool
    missing: int


class StatusRequests:
    """Open requests for the status. `settings`: those in force; `phase`: "loading", "ready" or "stopping"."""

    def __init__(
        self,
        born: Inheritance,
        calls: CallTable,
        table: ProcTable,
        services: Services,
        books: Books,
        jobs: Jobs,
        descriptors: FdLimit,
        settings: Callable[[], Settings],
        phase: Callable[[], str],
        is_parked: Callable[[Proc], bool],
        agent_problems: Callable[[], dict[str, str]],
        sandboxes: Sandboxes,
        approvals: Approvals,
        system: System,
        routes: Routes,
    ) -> None:
        self._born = born
        self._calls = calls
        self._table = table
        self._services = services
        self._books = books
        self._jobs = jobs
        self._descriptors = descriptors
        self._settings = settings
        self._phase = phase
        self._is_parked = is_parked
        self._agent_problems = agent_problems
        self._sandboxes = sandboxes
        self._approvals = approvals
        self._system = system
        self._routes = routes
        self._open: dict[int, _Request] = {}
        self._numbers = itertools.count(1)

    def ask(self, call: Call, check: bool) -> None:
        number = next(self._numbers)
        asked = [service for service in self._services if service.state is ServiceState.READY]
        self._open[number] = _Request(call, check, len(asked))
        for service in asked:
            service.send(link.GetStats(number))
        self._calls.timers.after(WAIT_S if asked else 0.0, lambda: self._answer(number))

    def part(self, number: int) -> None:
        """One service has answered."""
        request = self._open.get(number)
        if request is not None:
            request.missing -= 1
            if request.missing == 0:
                self._answer(number)

    def _answer(self, number: int) -> None:
        request = self._open.pop(number, None)
        if request is not None:
            self._jobs.start(self._checked(request) if request.check else self._described(request.call, None))

    def _checked(self, request: _Request) -> Iterator[None]:
        wrong: list[str] = []
        yield from self._books.check(wrong)
        if not wrong:
            yield from self._described(request.call, wrong)
            return
        self._calls.timers.after(SETTLE_S, lambda: self._jobs.start(self._look_again(request.call, wrong)))

    def _look_again(self, call: Call, wrong: list[str]) -> Iterator[None]:
        """Check again: messages that were on their way have arrived by now."""
        still: list[str] = []
        yield from self._books.check(still)
        yield from self._described(call, [line for line in wrong if line in still])

    def _described(self, call: Call, wrong: list[str] | None) -> Iterator[None]:
        letters: Counter[str] = Counter()
        for proc in self._table:
            listing.look(proc)
            calls = self._calls.peers.calls_of(proc)
            letters[listing.stat_letter(proc, calls, proc.os_state, self._is_parked(proc))] += 1
            yield
        self._calls.finish(call, self._describe(dict(letters), wrong))

    def _describe(self, letters: dict[str, int], wrong: list[str] | None) -> dict[str, Any]:
        born, settings, peers = self._born, self._settings(), self._calls.peers
        status: dict[str, Any] = {
            "version": __version__,
            "boot": born.boot,
            "state": self._phase(),
            "pid": born.guardian,
            "uptime_s": round(time.monotonic() - born.since, 1),
            "home": str(settings.home.root),
            "logs": str(settings.home.logs),
            "gateway": settings.door.url if settings.door is not None else "",
            "gateway_more": [one.url for one in settings.door.more] if settings.door is not None else [],
            "gateway_why": "" if settings.door is not None else endpoint.why_none(settings.gateway),
            "policy": settings.policy,
            "quantum": dict(zip(("tokens", "seconds"), settings.quantum, strict=True)),
            "group_shares": dict(settings.shares),
            "agents": letters,
            "agent_problems": self._agent_problems(),  # of the agents that aiosd.toml lists
            "dead_remembered": len(self._table.history),
            "max_agents": self._descriptors.max_agents,
            "sandbox": self._sandboxes.shown(),
            "access": self._approvals.status(),
            "memory_limits_by": f"samples every {SAMPLE_S:g} s, and RLIMIT_DATA in each process",
            "kernel": {
                "epoch": born.epoch,
                **self._calls.counters,
                "clients_now": len(peers.clients),
                "open_calls": sum(len(peer.calls) for peer in peers),
            },
            "models": [_model(core) for core in self._services if isinstance(core, Core)],
            "routes": [route.shown() for route in self._routes],
            "services": [_service(service) for service in self._services],
            "templates": [_template(one) for one in self._system.templates],
            "mcp_servers": [
                {"name": one.name, "pid": one.pid, "ospid": one.ospid, "started": one.started}
                for one in self._system.servers
            ],
        }
        if settings.reread:
            status["reread"] = dict(settings.reread)
        if wrong is not None:
            status["check"] = wrong
        return status


def _service(service: Service) -> dict[str, Any]:
    return {
        "name": service.name,
        "kind": service.kind,
        "state": service.state.value,
        "pid": service.pid,
        "ospid": service.ospid,
        "deaths": service.deaths,
        "last_death": service.last_death,
        "open_calls": len(service.calls),
        "stats": {} if isinstance(service, Core) else service.stats,  # a core's figures are shown with its model
    }


def _template(one: link.TemplateShown) -> dict[str, Any]:
    return {
        "name": one.name,
        "state": one.state.value,
        "pid": one.pid,
        "ospid": one.ospid,
        "python": wire.os_shown(one.of.python),
        "version": one.python,
        "modules": one.of.modules,
        "loaded": one.loaded,
        "agents": one.agents,
        "started": one.started,
    }


def _model(core: Core) -> dict[str, Any]:
    info = core.info
    return {
        "name": core.model,
        "path": core.path,
        "default": core.default,
        "state": core.state.value,
        "pid": core.pid,
        "ospid": core.ospid,
        "deaths": core.deaths,
        "last_death": core.last_death,
        "open_calls": len(core.calls),
        "info": {} if info is None else {field: getattr(info, field) for field in info.__struct_fields__},
        "stats": core.stats,
    }
