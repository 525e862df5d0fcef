"""Arithmetic as people and models write it: numbers, operators and a few functions. Never by `eval`.

The expression is untrusted input, so its cost is bounded: by its length, and by the size of every number that occurs in
the calculation.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable
from typing import Any

MAX_EXPRESSION = 500  # characters
MAX_BITS = 4096  # of any number in the calculation

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: lambda a, b: a // b if isinstance(a, int) and isinstance(b, int) and a % b == 0 else a / b,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: lambda a, b: _power(a, b),
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "sqrt": math.sqrt,
    "abs": abs,
    "round": lambda *args: _rounded(*args),
    "min": min,
    "max": max,
}

# How people write arithmetic, and how Python writes it.
_SPELLINGS = [
    (re.compile(r"(?<=\d),(?=\d{3}(?!\d))"), ""),
    (re.compile(r"[$€£]|\s*[=?]\s*$"), ""),
    (re.compile("[×·]"), "*"),
    (re.compile("[÷:]"), "/"),
    (re.compile("[−–]"), "-"),
    (re.compile(r"\^"), "**"),
    (re.compile(r"(?<=[\d)])\s*[xX]\s*(?=[\d(])"), " * "),
    (re.compile(r"(\d)\s*(?:%|percent)\s*of\b"), r"\1 / 100 *"),
]
#: Expressions in which none of these occurs.
_PLAIN = re.compile(r"[\d .+*/()-]*\Z", re.ASCII)


def calc(expression: str) -> str:
    """The value of an arithmetic expression, rounded to six decimals. Accepts `1,250 × 3` and `15% of 80`. Raises
    ValueError with a sentence."""
    if len(expression) > MAX_EXPRESSION:
        raise ValueError(f"expression longer than {MAX_EXPRESSION} characters")
    text = expression
    if not _PLAIN.match(text):
        for pattern, replacement in _SPELLINGS:
            text = pattern.sub(replacement, text)
    try:
        value = _value(ast.parse(text.strip(), mode="eval").body)
        return _written(value)
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    except (SyntaxError, TypeError, ValueError, MemoryError, RecursionError):
        raise ValueError(f"not arithmetic: {expression}") from None
    except OverflowError:
        raise ValueError("number too large") from None


def _value(node: ast.expr) -> int | float:
    """Evaluates one node. Only numbers, operators and a few functions exist here."""
    result: int | float
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            result = value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            result = _BINARY[type(op)](_value(left), _value(right))
        case ast.UnaryOp(op=unary, operand=operand) if type(unary) in _UNARY:
            result = _UNARY[type(unary)](_value(operand))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            result = _FUNCTIONS[name](*map(_value, args))
        case _:
            raise ValueError("not arithmetic")
    if isinstance(result, complex):
        raise ValueError("not a real number")
    if isinstance(result, int) and result.bit_length() > MAX_BITS:
        raise OverflowError
    return result


def _power(base: int | float, exponent: int | float) -> Any:
    """Refuses a result that is too large before computing it: 9 ** 9 ** 9 would not end."""
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * abs(exponent) > MAX_BITS:
        raise OverflowError
    return base**exponent


def _rounded(value: int | float, digits: int = 0) -> Any:
    """Refuses digits for which Python would first compute a power of ten that does not end."""
    if abs(digits) > MAX_BITS:
        raise OverflowError
    return round(value, digits) if digits else round(value)


def _written(value: int | float) -> str:
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        raise OverflowError
    if value and abs(value) < 1e-4:
        return f"{value:.6g}"
    text = f"{value:.6f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text
