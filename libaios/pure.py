"""Tools that are computed where they are called: in the process of the caller.

A tool runs apart from its caller so that its effects stay away from others, and a service checks what goes to it. A
tool without effects, whose cost is bounded by what it accepts, needs neither: a hostile caller could only deceive
itself. Linux does the same with its vDSO, for calls that need no rights. So such a call asks the kernel alone
(`wire.AdmitTool`), which counts it for the budgets, and sends it the long way, through the toolbox, when a rule is
about this tool. Two of the four switches between processes and all of the toolbox's work are saved.

The toolbox has the same tools under the same names, for callers in other languages and for arguments that are not
exactly what a tool wants: it knows the words for what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

#: What the kernel lets its callers compute.
NAMES = frozenset(("calc",))


def computation(name: str, arguments: Mapping[str, Any]) -> Callable[[], Any] | None:
    """What is to be computed for this call; None: it has to go to the toolbox. The function raises ValueError with a
    sentence."""
    if name != "calc" or arguments.keys() != {"expression"}:
        return None
    from libaios import arithmetic  # not all agents calculate

    expression = arguments["expression"]
    if not isinstance(expression, str) or len(expression) > arithmetic.MAX_EXPRESSION or not _is_sent(expression):
        return None
    return lambda: arithmetic.calc(expression)


def _is_sent(text: str) -> bool:
    """Whether a message can carry it, which lone surrogates are too odd for."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)
