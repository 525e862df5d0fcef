"""Simulates signal handlers that raise, at each possible point in turn."""

from __future__ import annotations

import sys
from types import FrameType, ModuleType


class Interrupt(Exception):
    pass


class Interrupts:
    """Raises once, at the n-th point in these modules at which a signal handler could raise: where a Python function is
    entered or a C function returns."""

    def __init__(self, n: int, *modules: ModuleType) -> None:
        self.left = n
        self._files = {module.__file__ for module in modules}

    def __enter__(self) -> None:
        sys.setprofile(self._at)

    def __exit__(self, *exc: object) -> None:
        sys.setprofile(None)

    def _at(self, frame: FrameType, event: str, arg: object) -> None:
        if event in ("call", "c_return") and frame.f_code.co_filename in self._files:
            self.left -= 1
            if self.left == 0:
                raise Interrupt
