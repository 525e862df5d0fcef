"""The kinds of budgets: the name of each, its field in `wire.Limits`, how it is read and shown.

Flags of aios-run, the keys of [[agent]] and [[group]] in aiosd.toml, the kernel's sentences and `aios-inspect` are all
made from `KINDS`. A kind is *exact* if the budget cannot be exceeded: the kernel, or a model's core, counts before it
does the work. It is *sampled* if the usage is read from Linux now and then; then it has a lag, and for some kinds there
is a limit that Linux itself enforces in each process (`bounds`).
"""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from msgspec import Struct

from aiosd.units import format_money, format_size, parse_count, parse_duration, parse_money, parse_size
from libaios.wire import Limits

SAMPLE_S = 0.1  # between two samples of an agent with a sampled budget; longer if there are many of them
DISK_S = 0.2  # the same for files
#: One process may have twice the memory budget and this number of bytes of private memory: programs such as node
#: reserve that much before they use any of it.
DATA_BYTES = 256 << 20


#: Processes and threads that an agent in a sandbox may have, if no budget sets another number.
PROCESSES, PROCESSES_PER_CPU = 256, 128


def most_processes() -> int:
    return PROCESSES + PROCESSES_PER_CPU * (os.cpu_count() or 1)


class Kind(Struct, frozen=True):
    """One kind of budget. `over`: the words for a reached budget. `lag_s` 0: it is exact."""

    name: str  # as a key in files, as the reason of an end, and with '-' for '_' as a flag
    field: str  # of `wire.Limits`
    what: str
    read: Callable[[Any], Any]  # of a flag's text, or a value of TOML; ValueError with a sentence
    show: Callable[[float], str]
    over: str
    metavar: str
    help: str
    lag_s: float = 0.0
    shown: Callable[[float], Any] = lambda number: round(number, 3)  # in JSON, for programs

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    def of(self, limits: Limits) -> float | None:
        """The amount that these limits allow; None: it is not limited."""
        amount: float | None = getattr(limits, self.field)
        return amount


# ── reading and showing ───────────────────────────────────────────────────────────────────────────────────


def _count(low: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        number = parse_count(value) if isinstance(value, str) else value
        if not isinstance(number, int) or isinstance(number, bool):
            raise ValueError(f"{value!r} is no whole number")
        if not low <= number <= 1 << 62:
            raise ValueError(f"{value} is out of range (from {low} to {1 << 62})")
        return number

    return read


def _seconds(value: Any) -> float:
    seconds = value
    if isinstance(value, str):
        try:
            seconds = float(value)
        except ValueError:
            seconds = parse_duration(value)
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 <= seconds <= 1e9:
        raise ValueError(f"{value!r} is no length of time (such as 60 or '10m')")
    return float(seconds)


def _size(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{value!r} is no size (such as 512M or 2G)")
    return parse_size(str(value))


def _whole(number: float) -> str:
    return str(int(number))


def _time(number: float) -> str:
    return f"{number:g} s"


def _tokens(number: float) -> str:
    return f"{int(number)} tokens"


def _money(number: float) -> str:
    return format_money(int(number))


_USED, _EXCEEDED = "used up", "exceeded"

KINDS = (
    Kind("tokens", "tokens", "token", _count(0), _whole, _USED, "N", "tokens, computed and generated, such as 10k."),
    Kind("cost", "cost", "cost", parse_money, _money, _USED, "AMOUNT", "money, by models' prices.", shown=_money),
    Kind("time", "time_s", "time", _seconds, _time, _USED, "S", "wall seconds, or 1h30m."),
    Kind("cpu", "cpu_s", "CPU", _seconds, _time, _USED, "S", "seconds on processors.", SAMPLE_S),
    Kind("memory", "memory_bytes", "memory", _size, format_size, _EXCEEDED, "SIZE", "memory, such as 512M.", SAMPLE_S),
    Kind("context", "context", "context", _count(1), _tokens, _USED, "N", "tokens that open calls hold at a time."),
    Kind("tool_calls", "tool_calls", "tool call", _count(0), _whole, _USED, "N", "calls of tools."),
    Kind("children", "children", "child", _count(0), _whole, _USED, "N", "agents that it starts, and these start."),
    Kind("processes", "processes", "process", _count(1), _whole, _EXCEEDED, "N", "Linux processes.", SAMPLE_S),
    Kind("disk", "disk_bytes", "disk", _size, format_size, _EXCEEDED, "SIZE", "store and workspace (sandbox).", DISK_S),
)
BY_NAME = {kind.name: kind for kind in KINDS}
SAMPLED = tuple(kind for kind in KINDS if kind.lag_s)
#: Kinds for an agent without a process (`aiosd token`): only those that are not read from Linux.
WITHOUT_PROCESS = tuple(kind for kind in KINDS if not kind.lag_s)


def sentence(limits: Limits, name: str, group: str = "") -> str:
    """The sentence for a person when the budget of this kind is reached; "" for no kind."""
    kind = BY_NAME.get(name)
    amount = kind.of(limits) if kind is not None else None
    if kind is None or amount is None:
        return ""
    whose = f" by group {group}" if group else ""
    return f"{kind.what} budget of {kind.show(amount)} {kind.over}{whose}"


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────

#: The part of a budget at which its agent gets a message.
SOFT = "soft_limit"


def read_percent(value: Any) -> int:
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if not isinstance(number, int) or isinstance(number, bool):
        raise ValueError(f"{value!r} is no whole number")
    if not 0 <= number <= 100:
        raise ValueError(f"{value} is out of range (from 0 to 100)")
    return number


#: The keys of [[agent]] that are about budgets.
READERS: dict[str, Callable[[Any], Any]] = {**{kind.name: kind.read for kind in KINDS}, SOFT: read_percent}


def limits_of(values: Mapping[str, Any]) -> Limits:
    """The limits, from values that `READERS` have read; other keys are ignored."""
    amounts = {kind.field: values[kind.name] for kind in KINDS if values.get(kind.name) is not None}
    return _limits({**amounts, "soft": values.get(SOFT)})


def is_any(limits: Limits) -> bool:
    return any(kind.of(limits) is not None for kind in KINDS)


class GroupLimits(Struct, frozen=True):
    """The budgets of a [[group]]: how much all its agents may use together while aiosd runs, and how much each agent
    that a person starts may use, with all that it starts."""

    all: Limits = Limits()
    each: Limits = Limits()


def _each(value: Any) -> Limits:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is no table of budgets (such as {{ tokens = 10000 }})")
    read = {}
    for name, amount in value.items():
        if name not in READERS:
            raise ValueError(f"unknown key {name!r}; there are: {', '.join(READERS)}")
        try:
            read[name] = READERS[name](amount)
        except ValueError as err:
            raise ValueError(f"{name}: {err}") from None
    return limits_of(read)


#: The keys of [[group]] that are budgets.
GROUP_READERS = READERS | {"each": _each}


def group_limits_of(values: Mapping[str, Any]) -> GroupLimits:
    return GroupLimits(limits_of(values), values.get("each", Limits()))


def least(first: Limits, second: Limits) -> Limits:
    """The smaller amount of each kind. `soft` is that of the first, if it has one."""
    both = {kind.field: [n for n in (kind.of(first), kind.of(second)) if n is not None] for kind in KINDS}
    soft = second.soft if first.soft is None else first.soft
    return _limits({**{field: min(amounts) for field, amounts in both.items() if amounts}, "soft": soft})


def _limits(amounts: Mapping[str, Any]) -> Limits:
    return Limits(**amounts)


# ── limits that Linux enforces ────────────────────────────────────────────────────────────────────────────


def bounds(shared: Iterable[Limits]) -> list[tuple[int, int]]:
    """The rlimits of a process that shares budgets with these limits: (which, amount)."""
    whole = Limits()
    for limits in shared:
        whole = least(whole, limits)
    found = []
    if whole.memory_bytes is not None:
        found.append((resource.RLIMIT_DATA, 2 * whole.memory_bytes + DATA_BYTES))
    if whole.disk_bytes is not None:
        found.append((resource.RLIMIT_FSIZE, whole.disk_bytes))
    if whole.cpu_s is not None:
        found.append((resource.RLIMIT_CPU, math.ceil(whole.cpu_s) + 1))
    return found
