"""Reads and writes sizes, counts, lengths of time and money (`512M`, `10k`, `1h30m`, `2.50`)."""

from __future__ import annotations

import re

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_size(text: str) -> int:
    """Bytes: `1048576`, `512M`, `1.5G`, `2GiB` (K is 1024). Raises ValueError for anything else, and for 0."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if size < 1:
        raise ValueError(f"{text!r} is no size (such as 512M or 2G)")
    return size


def parse_count(text: str) -> int:
    """A number of things: `500`, `10k`, `1.5M` (k is 1000). Raises ValueError for anything else."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([kKmM]?)", text.strip())
    if match is None or ("." in match[1] and not match[2]):
        raise ValueError(f"{text!r} is not a valid whole number (such as 500, 10k or 2M)")
    return round(float(match[1]) * {"": 1, "k": 1000, "m": 1000_000}[match[2].lower()])


def format_size(n: float) -> str:
    """`512B`, `9.1M`, `120M`, `2.0G`."""
    if n < 1024:
        return f"{int(n)}B"
    for unit in "KMGT":
        n /= 1024
        if n < 1000 or unit == "T":
            break
    return f"{n:.1f}{unit}" if n < 100 else f"{n:.0f}{unit}"


def parse_duration(text: str) -> float:
    """Seconds: `42s`, `10m`, `1h30m`, `1.5d`. Raises ValueError for anything else."""
    parts = re.findall(r"([0-9]+(?:\.[0-9]+)?)([smhd])", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"{text!r} is no length of time (such as 42s or 10m)")
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


MONEY = 10**12  # amounts of money are counted in this part of the currency's unit
_MOST_MONEY = 1_000_000  # units: so that sums fit 64 bits


def parse_money(value: object) -> int:
    """`2.50`, `"2.5"`, `3`: in 10^-12 of a unit, exactly. Raises ValueError for anything else."""
    text = str(value).strip() if isinstance(value, str | int | float) and not isinstance(value, bool) else ""
    match = re.fullmatch(r"([0-9]+)(?:\.([0-9]+))?(?:e-([0-9]{1,2}))?", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{value!r} is no amount of money (such as 2.50)")
    digits, decimals = match[1] + (match[2] or ""), len(match[2] or "") + int(match[3] or 0)
    scale: int = 10**decimals
    amount, rest = divmod(int(digits) * MONEY, scale)
    if rest:
        raise ValueError(f"{value} has more than twelve decimals")
    if amount > _MOST_MONEY * MONEY:
        raise ValueError(f"{value} is out of range (from 0 to {_MOST_MONEY})")
    return amount


def format_money(amount: int) -> str:
    """`2.50`, `0.000153`: exactly, with two decimals at least."""
    whole, part = divmod(amount, MONEY)
    return f"{whole}.{f'{part:012d}'.rstrip('0'):0<2}"


def format_duration(seconds: float) -> str:
    """`12 s`, `3 min 4 s`, `5 h 12 min`, `2 d 3 h`."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole // 60 % 60} min"
    return f"{whole // 86400} d {whole // 3600 % 24} h"
