"""Calls of tools that the kernel answers itself: short sums.

To pass a call on to the toolbox and back costs ten times what a sum of a few numbers takes (`arithmetic.is_short`). It
is checked, counted and allowed as any call of a tool: where a rule is about `calc`, or anything is unusual about the
call, the toolbox gets it, and says what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aiosd.access.rules import Policy
from libaios import arithmetic
from libaios.wire import CallTool

NAME = "calc"


class Sums:
    """`policy`: the rules in force."""

    def __init__(self, policy: Callable[[], Policy]) -> None:
        self._policy = policy

    def answer(self, args: Any) -> str | None:
        """The result of a call of a tool; None: it is for the toolbox."""
        if not isinstance(args, CallTool) or args.name != NAME or self._policy().concerns(NAME, True):
            return None
        expression = args.arguments.get("expression")
        if len(args.arguments) != 1 or not isinstance(expression, str) or not arithmetic.is_short(expression):
            return None
        try:
            return arithmetic.calc(expression)
        except ValueError:
            return None
