"""Reports the loading of services: lines of progress, readiness, and why the system does not start."""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Callable

from aiosd.access.deed import Deed
from aiosd.budgets.price import FREE, Price
from aiosd.ipc import link
from aiosd.ipc.service import LLM
from aiosd.kernel.approvals import Approvals
from aiosd.kernel.calls import CallTable
from aiosd.kernel.cores import Core
from aiosd.kernel.peer import Call
from aiosd.kernel.service import Service, Services
from aiosd.timers import Timers

logger = logging.getLogger("kernel.services")

PROGRESS_S = 2.0  # between two lines about the loading of a service


class Loading:
    """The owner of all services (`service.Owner`). `on_ready` is called once, when all awaited services are ready."""

    def __init__(
        self,
        services: Services,
        timers: Timers,
        ready: bool,
        on_ready: Callable[[], None],
        stats: Callable[[int], None],
        peers: Callable[[], list[int]],
        charge: Callable[[Call, int, Price], None],
        calls: CallTable,
        approvals: Approvals,
    ) -> None:
        self._services = services
        self._timers = timers
        self.ready = ready
        self._on_ready = on_ready
        self._stats = stats
        self._peers = peers
        self._charge = charge
        self._calls = calls
        self._approvals = approvals
        self.error = ""  # a service could not be loaded at boot: the system does not start
        self._shown: dict[str, int] = {}  # percent shown last, by service
        self._last_line = timers.clock()

    def on_loading(self, service: Service, message: link.LoadProgress) -> None:
        """Show progress: on a terminal one line that is updated; elsewhere a new line now and then when it takes
        long."""
        percent, name = int(message.fraction * 100), service.short_name
        if percent == self._shown.get(name):
            return
        if sys.stderr.isatty():
            # The cursor goes back to the beginning: what another process logs meanwhile is written over this line.
            print(f"\r\x1b[Kaiosd: {name}: {message.what} {percent} %", end="\r", file=sys.stderr, flush=True)
        elif self._timers.clock() - self._last_line >= PROGRESS_S:
            self._last_line = self._timers.clock()
            logger.info("%s: %s %d %%", name, message.what, percent)
        self._shown[name] = percent

    def on_loaded(self, service: Service) -> None:
        """Called every time a service is ready. When all are ready for the first time, the system is ready."""
        _clear_line()
        level = logging.INFO if service.kind == LLM else logging.DEBUG  # a model loads for long, others for ms
        logger.log(level, "%s: loaded", service.short_name)
        if not self.ready and self._services.ready():
            self.ready = True
            self._on_ready()

    def on_load_failed(self, service: Service, message: str) -> None:
        _clear_line()
        if self.ready:  # the service was forked again: the supervisor will try once more
            logger.error("%s: %s", service.short_name, message)
        elif not self.error:
            self.error = message

    def on_died(self, service: Service, reason: str) -> None:
        if not self.ready and service.awaited and not self.error:
            self.error = f"{service.short_name}: {service.title} died while it was loading ({reason})"

    def on_stats(self, service: Service, req: int) -> None:
        self._stats(req)

    def live_peers(self) -> list[int]:
        return self._peers()

    def charge(self, service: Service, call: Call, tokens: int) -> None:
        self._charge(call, tokens, (service.price if isinstance(service, Core) else None) or FREE)

    def rules(self) -> link.Rules:
        return link.Rules(self._approvals.policy)

    def judge(self, call: Call, deed: Deed, go_on: Callable[[], None]) -> None:
        """Decide about a call that its service has sent back."""
        try:
            if self._approvals.judge(call, deed, go_on):
                go_on()
        except OSError as err:
            self._calls.fail(call, err.errno or errno.EIO, err.strerror or str(err))


def _clear_line() -> None:
    """End the line of progress before a log message is written."""
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
