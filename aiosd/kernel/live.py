"""Settings that change while the system runs: by `aiosd set`, or because SIGHUP had them read again.

The supervisor keeps them, so that they outlive this kernel and its cores. What was set at run time is in force until
the settings are read again.
"""

from __future__ import annotations

import dataclasses
import errno
from typing import TYPE_CHECKING

from aiosd import config, link, log
from libaios import wire

if TYPE_CHECKING:
    from aiosd.kernel.loop import Kernel


def change(kernel: Kernel, name: str, text: str) -> tuple[str, str]:
    """Set one; its old value and its new one, as on the command line."""
    try:
        settings = config.change(kernel.settings, name, text)
    except ValueError as err:
        raise wire.error(errno.EINVAL, str(err)) from None
    old, new = config.show(kernel.settings, name), config.show(settings, name)
    kernel.to_supervisor(link.Set(name, text))
    kernel.settings = settings
    apply(kernel)
    return old, new


def reread(kernel: Kernel, message: link.Reread) -> None:
    schedule = message.schedule
    kernel.settings = dataclasses.replace(
        kernel.settings,
        log_level=message.log_level,
        policy=schedule.policy,
        quantum=(schedule.tokens, schedule.seconds),
        shares=schedule.shares,
    )
    apply(kernel)


def apply(kernel: Kernel) -> None:
    log.set_level(kernel.settings.log_level)
    kernel.cores.reschedule(kernel.settings.schedule())
