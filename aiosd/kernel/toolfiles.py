"""The files of tools in the settings: which of them could not be loaded, for the person who starts the system.

The system starts without their tools: a file that cannot be loaded may depend on what is missing only now. It is ready
when the toolbox has loaded all files or failed, but it does not wait long for a file that loads slowly.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from aiosd.ipc import link
from aiosd.timers import Timer, Timers

logger = logging.getLogger("kernel")

PATIENCE_S = 10.0  # how long "ready" waits for them


class FilesOfTools:
    """`files`: are there any in the settings? `told`: the system was ready before, so a person has got their errors."""

    def __init__(self, files: bool, timers: Timers, told: bool) -> None:
        self._timers = timers
        self._loaded = not files
        self._errors: dict[str, str] = {}
        self._told = told  # later errors are for the log
        self._then: Callable[[], None] | None = None
        self._patience: Timer | None = None

    def loaded(self, message: link.ToolFiles) -> None:
        """The toolbox has loaded them; also called for every later toolbox, whose files may have changed."""
        new = {place: why for place, why in message.errors.items() if self._errors.get(place) != why}
        self._loaded, self._errors = True, message.errors
        if self._told:
            for place, why in new.items():
                logger.error("tools: %s: %s", place, why)
        self._look()

    def when_over(self, then: Callable[[], None]) -> None:
        """Call `then` when the files are loaded, or have taken too long."""
        self._then = then
        self._patience = self._timers.after(PATIENCE_S, self._over)
        self._look()

    def notes(self) -> list[str]:
        """The lines for the person who starts aiosd."""
        if not self._loaded:
            return ["tools: their files are still being loaded; aiosd status shows what is wrong with them"]
        return [f"tools: {place}: {why}" for place, why in self._errors.items()]

    def _look(self) -> None:
        if self._loaded:
            self._over()

    def _over(self) -> None:
        then, self._then = self._then, None
        if self._patience is not None:
            self._patience.cancel()
        if then is not None:
            self._told = True
            then()
