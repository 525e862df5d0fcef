"""Numbers between limits, as the bodies of grammar rules.

A number is written in decimal digits, so "at least 17.25" becomes a choice for each digit. Integers have at most 64
bits, as in every message between processes. A number with limits has at most 15 significant digits: every float parser
keeps decimals of that length apart, so none is rounded onto an excluded limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any, NamedTuple

from aiosd.errors import refuse

LOWEST, HIGHEST = -(2**63), 2**64 - 1

_SIGNIFICANT = 15


class Limit(NamedTuple):
    value: Decimal
    excluded: bool


def limits(schema: dict[str, Any]) -> tuple[Limit | None, Limit | None]:
    """The lower and the upper limit that the four keywords give together."""
    low = _limit(schema, "minimum", "exclusiveMinimum", lambda limit: (limit.value, limit.excluded))
    high = _limit(schema, "maximum", "exclusiveMaximum", lambda limit: (-limit.value, limit.excluded))
    return low, high


def _limit(schema: dict[str, Any], inclusive: str, exclusive: str, tightness: Callable[[Limit], Any]) -> Limit | None:
    found: list[Limit] = []
    for key, excluded in ((inclusive, False), (exclusive, True)):
        value = schema.get(key)
        if isinstance(value, bool):  # draft 4: a flag on the other keyword
            if value and excluded and inclusive in schema:
                found.append(Limit(_decimal(schema[inclusive], inclusive), True))
        elif value is not None:
            found.append(Limit(_decimal(value, key), excluded))
    return max(found, key=tightness) if found else None


def _decimal(value: Any, key: str) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise refuse(f"{key} must be a number")
    return Decimal(value) if isinstance(value, int) else Decimal(repr(value))


def first_integer(low: Limit | None) -> int:
    if low is None:
        return LOWEST
    return math.floor(low.value) + 1 if low.excluded else math.ceil(low.value)


def last_integer(high: Limit | None) -> int:
    if high is None:
        return HIGHEST
    return math.ceil(high.value) - 1 if high.excluded else math.floor(high.value)


# ── integers ──────────────────────────────────────────────────────────────────────────────────────────────


def integers(first: int, last: int) -> str:
    """The decimal numbers first … last, as alternatives."""
    first, last = max(first, LOWEST), min(last, HIGHEST)
    if first > last:
        raise refuse("minimum, maximum: no whole number of 64 bits lies between them")
    parts = []
    if first < 0:
        parts += [f'"-" {part}' for part in _naturals(max(-last, 1), -first)]
    if last >= 0:
        parts += _naturals(max(first, 0), last)
    return " | ".join(parts)


def _naturals(first: int, last: int) -> list[str]:
    parts = ['"0"'] if first == 0 else []
    first = max(first, 1)
    full: list[int] = []  # lengths of which all numbers are included: they become one alternative
    for length in range(len(str(first)), len(str(last)) + 1):
        least, most = 10 ** (length - 1), 10**length - 1
        if first <= least and most <= last:
            full.append(length)
        elif max(first, least) <= min(last, most):
            parts.append(_grouped(_same_length(str(max(first, least)), str(min(last, most)))))
    if full:
        parts.append(f"[1-9] [0-9]{{{full[0] - 1},{full[-1] - 1}}}" if full[-1] > 1 else "[1-9]")
    return parts


def _grouped(body: str) -> str:
    return f"({body})" if " | " in body else body


def _same_length(low: str, high: str) -> str:
    """The decimal strings from `low` to `high`, which have the same length."""
    if low == high:
        return f'"{low}"' if low else ""
    if set(low) == {"0"} and set(high) == {"9"}:
        return f"[0-9]{{{len(low)}}}"
    if low[0] == high[0]:
        return f'"{low[0]}" {_grouped(_same_length(low[1:], high[1:]))}'
    n = len(low) - 1
    start, end = int(low[0]), int(high[0])
    parts = []
    if set(low[1:]) - {"0"}:
        parts.append(_same_length(low, low[0] + "9" * n))
        start += 1
    tail = ""
    if set(high[1:]) - {"9"}:
        tail = _same_length(high[0] + "0" * n, high)
        end -= 1
    if start <= end:
        parts.append(f"[{start}-{end}]" + (f" [0-9]{{{n}}}" if n else ""))
    if tail:
        parts.append(tail)
    return " | ".join(parts)


# ── numbers with decimals ─────────────────────────────────────────────────────────────────────────────────


def decimals(low: Limit | None, high: Limit | None, places: int | None = None) -> str:
    """Numbers between two limits, as alternatives. `places`: at most this many digits after the point."""
    zero = Limit(Decimal(0), False)
    parts: list[str] = []
    if high is None or high.value >= 0:
        at_least = low if low is not None and low.value >= 0 else zero
        parts += _magnitudes(at_least, high, places)
    if low is None or low.value < 0:
        at_least = Limit(-high.value, high.excluded) if high is not None and high.value < 0 else Limit(zero.value, True)
        most = None if low is None else Limit(-low.value, low.excluded)
        parts += [f'"-" {_grouped(part)}' for part in _magnitudes(at_least, most, places)]
    if not parts:
        raise refuse("minimum, maximum: no number lies between them")
    return " | ".join(parts)


def _magnitudes(low: Limit, high: Limit | None, places: int | None) -> list[str]:
    high = high if high is not None and high.value <= HIGHEST else Limit(Decimal(HIGHEST), False)
    if low.value > high.value or (low.value == high.value and (low.excluded or high.excluded)):
        return []
    (first, least), (last, most) = _split(low.value), _split(high.value)
    if first == last:
        fraction = _between(least, low.excluded, most, high.excluded, _room(first, places))
        return [] if fraction is None else [f'"{first}" {_grouped(fraction)}']
    parts = []
    begin, end = (
        _at_least(least, low.excluded, _room(first, places)),
        _at_most(most, high.excluded, _room(last, places)),
    )
    if begin is not None:
        parts.append(f'"{first}" {_grouped(begin)}')
    parts += _whole_between(first + 1, last - 1, places)
    if end is not None:
        parts.append(f'"{last}" {_grouped(end)}')
    return parts


def _whole_between(first: int, last: int, places: int | None) -> list[str]:
    """Numbers with a whole part from `first` to `last`, and as many decimals as the limit of digits allows."""
    parts = []
    while first <= last:
        room = _room(first, places)
        stop = last if not room else min(last, 10 ** len(str(first)) - 1)
        parts.append(f"({integers(first, stop)})" + (f" {_any(room)}" if room else ""))
        first = stop + 1
    return parts


def _room(whole: int, places: int | None) -> int:
    """How many decimals may follow this whole number."""
    room = max(_SIGNIFICANT - len(str(whole)), 0)
    return room if places is None else min(room, places)


def _split(value: Decimal) -> tuple[int, str]:
    whole, _, fraction = f"{value:f}".partition(".")
    return int(whole), fraction.rstrip("0")


def _any(room: int) -> str:
    return f'("." [0-9]{{1,{room}}})?' if room else '""'


def _digits(room: int) -> str:
    return f"[0-9]{{0,{room}}}" if room > 0 else '""'


def _at_least(least: str, excluded: bool, room: int) -> str | None:
    """What may follow a whole number: nothing, or a point and digits, so that it is at least 0.`least`."""
    if not least and not excluded:
        return _any(room)
    digits = _digits_from(least, excluded, max(room, len(least)))
    return None if digits is None else f'"." ({digits})'


def _digits_from(least: str, excluded: bool, room: int) -> str | None:
    if not least:
        if not excluded:
            return _digits(room)
        return f"[0-9]{{0,{room - 1}}} [1-9]" if room > 0 else None
    digit, parts = int(least[0]), []
    if digit < 9:
        parts.append(f"[{digit + 1}-9] {_digits(room - 1)}")
    rest = _digits_from(least[1:], excluded, room - 1)
    if rest is not None:
        parts.append(f'"{digit}" ({rest})')
    return " | ".join(parts) if parts else None


def _at_most(most: str, excluded: bool, room: int) -> str | None:
    if not most:
        return None if excluded else ('("." "0")?' if room else '""')
    digits = _digits_to(most, excluded, max(room, len(most)))
    return '""' if digits is None else f'("." ({digits}))?'


def _digits_to(most: str, excluded: bool, room: int) -> str | None:
    """At least one digit; `most` has one, and does not end with 0."""
    digit, rest, parts = int(most[0]), most[1:], []
    if digit > 0:
        parts.append(f"[0-{digit - 1}] {_digits(room - 1)}")
    if rest:
        more = _digits_to(rest, excluded, room - 1)
        parts.append(f'"{digit}"' + (f" ({more})?" if more is not None else ""))
    elif not excluded:
        parts.append(f'"{digit}"')
    return " | ".join(parts) if parts else None


def _between(least: str, low_excluded: bool, most: str, high_excluded: bool, room: int) -> str | None:
    if least == most:
        if low_excluded or high_excluded:
            return None
        return f'"." "{most}"' if most else ('("." "0")?' if room else '""')
    if not least and not low_excluded:
        return _at_most(most, high_excluded, room)
    digits = _digits_between(least, low_excluded, most, high_excluded, max(room, len(least), len(most)))
    return None if digits is None else f'"." ({digits})'


def _digits_between(least: str, low_excluded: bool, most: str, high_excluded: bool, room: int) -> str | None:
    """`least` < `most` as fractions."""
    bottom, top = int(least[0]) if least else 0, int(most[0])
    if bottom == top:
        if not most[1:]:
            return None
        if not least[1:] and not low_excluded:
            rest = _digits_to(most[1:], high_excluded, room - 1)
            return f'"{top}"' + (f" ({rest})?" if rest is not None else "")
        rest = _digits_between(least[1:], low_excluded, most[1:], high_excluded, room - 1)
        return None if rest is None else f'"{top}" ({rest})'
    parts = []
    rest = _digits_from(least[1:], low_excluded, room - 1)
    if rest is not None:
        parts.append(f'"{bottom}" ({rest})')
    if bottom + 1 <= top - 1:
        parts.append(f"[{bottom + 1}-{top - 1}] {_digits(room - 1)}")
    if most[1:]:
        rest = _digits_to(most[1:], high_excluded, room - 1)
        parts.append(f'"{top}"' + (f" ({rest})?" if rest is not None else ""))
    elif not high_excluded:
        parts.append(f'"{top}"')
    return " | ".join(parts) if parts else None
