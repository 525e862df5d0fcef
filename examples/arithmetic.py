"""The tool, the question and the instructions that the examples for frameworks share.

All these agents do the same, so that they can be compared: they are asked for a product, and may use a tool for it.
"""

from __future__ import annotations

import operator
import re

SYSTEM = "You are a helpful agent. Think, use a tool when you need one, and then answer briefly."
QUESTION = "What is 37 * 91?"
#: No model of aiosd has this name, so its default model answers.
MODEL = "local"

_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def calc(expression: str) -> str:
    """Computes arithmetic.

    Args:
        expression: for example 3 * 4
    """
    print(f"tool: calc {expression}", flush=True)
    found = re.fullmatch(r"\s*(-?\d{1,9})\s*([-+*])\s*(-?\d{1,9})\s*", expression)
    if found is None:
        return f"error: not two numbers with + - or * between them: {expression[:50]}"
    return str(_OPERATIONS[found[2]](int(found[1]), int(found[3])))
