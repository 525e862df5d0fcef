"""Settings that change while the system runs: by `aiosd set`, or by a SIGHUP, which has the file read again.

The supervisor keeps them, so that they outlive this kernel and its services. A value that was set at run time is in
force until the settings file is read again.
"""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from aiosd import config
from aiosd.access.rules import AccessPolicy
from aiosd.ipc import link
from aiosd.kernel.cores import Cores
from aiosd.kernel.uplink import Uplink
from aiosd.logs import processlog
from libaios import wire

if TYPE_CHECKING:
    from aiosd.config import Settings


class Live:
    """The settings in force (`settings`), and their changes."""

    def __init__(self, settings: Settings, uplink: Uplink, cores: Cores, rules: Callable[[AccessPolicy], None]) -> None:
        self.settings = settings
        self._uplink = uplink
        self._cores = cores
        self._rules = rules  # called with new rules about what agents may do

    def change(self, name: str, text: str) -> tuple[str, str]:
        """Set one setting. Returns its old value and its new one, as on the command line. Raises OSError (EINVAL)."""
        try:
            settings = config.change(self.settings, name, text)
        except ValueError as err:
            raise wire.error(errno.EINVAL, str(err)) from None
        old, new = config.show(self.settings, name), config.show(settings, name)
        self._uplink.send(link.SettingChanged(name, text))
        self._apply(settings)
        return old, new

    def reread(self, message: link.Reread) -> None:
        schedule = message.schedule
        self._apply(
            dataclasses.replace(
                self.settings,
                log_level=message.log_level,
                policy=schedule.policy,
                quantum=(schedule.tokens, schedule.seconds),
                shares=schedule.shares,
                reread=message.report,
                access=message.access,
            )
        )
        self._rules(message.access)

    def schedule(self) -> link.Schedule:
        return self.settings.schedule()

    def _apply(self, settings: Settings) -> None:
        self.settings = settings
        processlog.set_level(settings.log_level)
        for core in self._cores:
            core.send(settings.schedule())
