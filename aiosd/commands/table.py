"""Tables of agents: the columns, their names for `-o`, and their layout.

    PID PPID STAT NI CALLS TOKENS  CTX   MEM    TIME NAME
      7    1 R     0     3    412  380  9.1M 0:00.31 planner
      8    7 S     5     1    120    0  8.7M 0:00.05  \\_ worker

A column has a header, a value for sorting and a text to show. The last column of a row is not padded, and it is cut
only on a terminal.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from aiosd.units import format_size, parse_money
from libaios.wire import ProcInfo

Value = int | float | str

LAST_LEAST = 16  # cells of the last column for which other columns may be left out


class Column:
    """Not a dataclass, because creating one would take longer than printing a table."""

    __slots__ = ("header", "left", "text", "value")

    def __init__(
        self, header: str, value: Callable[[ProcInfo], Value], text: Callable[[ProcInfo], str], left: bool = False
    ) -> None:
        self.header = header
        self.value = value
        self.text = text
        self.left = left  # aligned to the left, as words are; figures are aligned to the right


def cpu_time(seconds: float) -> str:
    """CPU time as in top: 0:01.23, from an hour on 12:34:56."""
    if seconds < 3600:
        hundredths = int(seconds * 100)
        return f"{hundredths // 6000}:{hundredths // 100 % 60:02}.{hundredths % 100:02}"
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def lived_s(p: ProcInfo) -> float:
    """How long the agent has lived (until its end, if it is dead)."""
    return (p.ended or time.time()) - p.started


def elapsed(seconds: float) -> str:
    """A length of time like etime of ps: [[D-]HH:]MM:SS."""
    whole = max(0, int(seconds))
    text = f"{whole // 60 % 60:02}:{whole % 60:02}"
    if whole >= 3600:
        text = f"{whole // 3600 % 24:02}:{text}"
    return f"{whole // 86400}-{text}" if whole >= 86400 else text


def start_time(when: float) -> str:
    """A start time: 14:05 for today, Nov23 for this year, 2025 for another year."""
    now, then = time.localtime(), time.localtime(when)
    if then[:3] == now[:3]:
        return time.strftime("%H:%M", then)
    return time.strftime("%b%d" if then.tm_year == now.tm_year else "%Y", then)


def date(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))


def printable(text: str) -> str:
    """`text` with ? for each character that could control a terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def cells(text: str) -> int:
    """How many cells of a terminal the text takes: some characters take two, combining accents take none."""
    if text.isascii():
        return len(text)
    return sum(map(_cells_of, text))


def _cells_of(character: str) -> int:
    import unicodedata  # seldom needed

    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def cut(text: str, width: int | None) -> str:
    """The beginning of the text, cut to `width` cells."""
    if width is None or cells(text) <= width:
        return text
    for end, character in enumerate(text):
        width -= _cells_of(character)
        if width < 0:
            return text[:end]
    return text


def spelled(text: str, encoding: str) -> str:
    """The text with ? (as many as it takes cells) for each character that `encoding` does not have."""
    if text.isascii():
        return text
    return "".join(c if _has(encoding, c) else "?" * _cells_of(c) for c in text)


def _has(encoding: str, character: str) -> bool:
    try:
        return bool(character.encode(encoding))
    except UnicodeEncodeError:
        return False


def line_width() -> int | None:
    """How many cells a line of stdout may have: COLUMNS if it is set, else the terminal's width; None: no terminal."""
    if not sys.stdout.isatty():
        return None
    columns = os.environ.get("COLUMNS", "")
    return int(columns) if columns.isdecimal() and int(columns) else terminal_size(1).columns


def terminal_size(fd: int) -> os.terminal_size:
    """The size of a terminal, in lines and columns. 80 × 24 where Linux has none: on a serial line, or a pty whose size
    was never set."""
    size = os.get_terminal_size(fd)
    return os.terminal_size((size.columns or 80, size.lines or 24))


def tokens(p: ProcInfo) -> int:
    """How many tokens were computed for the agent, as its budget counts them."""
    return p.prompt_tokens - p.cached_tokens + p.completion_tokens


def context(p: ProcInfo) -> int:
    """How many tokens its running generations have, or else the context that is kept for it."""
    return p.ctx_tokens or p.ctx_kept


def _exit(p: ProcInfo) -> int:
    return -1 if p.exit is None else p.exit


def _number(header: str, value: Callable[[ProcInfo], Value]) -> Column:
    return Column(header, value, lambda p: str(value(p)))


def _word(header: str, value: Callable[[ProcInfo], str]) -> Column:
    return Column(header, value, lambda p: printable(value(p)), left=True)


COLUMNS: dict[str, Column] = {
    "pid": _number("PID", lambda p: p.pid),
    "ppid": _number("PPID", lambda p: p.ppid),
    "pgid": _number("PGID", lambda p: p.pgid),
    "ospid": _number("OSPID", lambda p: p.ospid),
    "uid": _number("UID", lambda p: p.uid),
    "stat": _word("STAT", lambda p: p.stat),
    "restarts": _number("RESTARTS", lambda p: p.restarts),
    "ni": _number("NI", lambda p: p.nice),
    "group": _word("GROUP", lambda p: p.group or "-"),
    "sandbox": _word("SANDBOX", lambda p: p.sandbox),
    "calls": _number("CALLS", lambda p: p.calls),
    "tokens": _number("TOKENS", tokens),
    "prompt": _number("PROMPT", lambda p: p.prompt_tokens),
    "cached": _number("CACHED", lambda p: p.cached_tokens),
    "completion": _number("COMPLETION", lambda p: p.completion_tokens),
    "ctx": Column("CTX", context, lambda p: f"{context(p)}/{p.ctx_place}" if p.ctx_place else str(context(p))),
    "mem": Column("MEM", lambda p: p.mem_bytes, lambda p: format_size(p.mem_bytes)),
    "mem_bytes": _number("MEM_BYTES", lambda p: p.mem_bytes),
    "time": Column("TIME", lambda p: p.cpu_s, lambda p: cpu_time(p.cpu_s)),
    "stime": Column("STIME", lambda p: p.started, lambda p: start_time(p.started)),
    "started": Column("STARTED", lambda p: p.started, lambda p: date(p.started)),
    "etime": Column("ELAPSED", lambda p: lived_s(p), lambda p: elapsed(lived_s(p))),
    "exit": Column("EXIT", _exit, lambda p: "-" if p.exit is None else str(p.exit)),
    "cost": Column("COST", lambda p: parse_money(p.cost), lambda p: p.cost),
    "budget": _word("BUDGET", lambda p: p.budget or "-"),
    "reason": _word("REASON", lambda p: p.reason or "-"),
    "template": _word("TEMPLATE", lambda p: p.template or "-"),
    "name": _word("NAME", lambda p: p.name),
    "command": _word("COMMAND", lambda p: p.command or f"[{p.name}]"),
}

#: Other names of the columns: those of ps, and the keys of --json.
ALIASES = {
    "pgrp": "pgid",
    "state": "stat",
    "s": "stat",
    "nice": "ni",
    "prompt_tokens": "prompt",
    "cached_tokens": "cached",
    "completion_tokens": "completion",
    "ctx_tokens": "ctx",
    "cpu_s": "time",
    "cputime": "time",
    "start": "stime",
    "comm": "name",
    "cmd": "command",
    "args": "command",
}

SHORT = "pid ppid stat ni calls tokens ctx mem time name"
FULL = "uid pid ppid pgid ospid stat ni calls tokens ctx mem stime time command"


def column(word: str) -> Column:
    """The column of this name. Raises ValueError with the known names if there is none."""
    key = word.lower()
    found = COLUMNS.get(ALIASES.get(key, key))
    if found is None:
        raise ValueError(f"unknown column {word!r}; there are: {' '.join(COLUMNS)}")
    return found


def layout(words: Iterable[str]) -> list[tuple[str, Column]]:
    """Read `-o` arguments (`pid,stat=STATE`, `pid=`) as headers and columns."""
    chosen = []
    for word in (w for argument in words for w in argument.replace(",", " ").split()):
        name, equals, header = word.partition("=")
        found = column(name)
        chosen.append((header if equals else found.header, found))
    if not chosen:
        raise ValueError(f"no column given; there are: {' '.join(COLUMNS)}")
    return chosen


def objects(processes: Iterable[ProcInfo], words: Iterable[str]) -> list[dict[str, Any]]:
    """The columns of `-o` arguments as objects for programs. The key is the header, if one was given, else the word. A
    word that is a key of --json gives that value; any other column gives the value by which it is sorted."""
    names = [w for argument in words for w in argument.replace(",", " ").split()]
    chosen = [(header or name.lower(), name.lower()) for name, _, header in (w.partition("=") for w in names)]
    return [{key: _datum(p, name) for key, name in chosen} for p in processes]


def _datum(p: ProcInfo, name: str) -> Any:
    if name in p.__struct_fields__:
        return getattr(p, name)
    return column(name).value(p)


def sort_keys(arguments: Iterable[str]) -> list[tuple[Column, bool]]:
    """Read `--sort` arguments (`-tokens,pid`) as columns, each with whether the largest comes first."""
    keys = [key for argument in arguments for key in argument.replace(",", " ").split()]
    return [(column(key.lstrip("+-")), key.startswith("-")) for key in keys]


def sort(processes: list[ProcInfo], keys: Sequence[tuple[Column, bool]]) -> None:
    """Sort in place; the first key counts most. Rows with equal values keep their order."""
    for key, descending in reversed(keys):
        processes.sort(key=key.value, reverse=descending)


def forest(processes: Sequence[ProcInfo]) -> tuple[list[ProcInfo], list[str]]:
    """The processes with children after their parents, and for each one the branch to draw before its name."""
    present = {p.pid for p in processes}
    children: dict[int, list[ProcInfo]] = {}
    for p in processes:
        children.setdefault(p.ppid if p.ppid in present else 0, []).append(p)
    order: list[ProcInfo] = []
    branches: list[str] = []
    pending = [(p, "", "") for p in reversed(children.get(0, []))]  # a process, its branch, its children's indent
    while pending:
        p, branch, below = pending.pop()
        order.append(p)
        branches.append(branch)
        family = children.get(p.pid, [])
        for child in reversed(family):
            pending.append((child, below + " \\_ ", below + ("    " if child is family[-1] else " |  ")))
    return order, branches


def render(
    processes: Sequence[ProcInfo],
    chosen: Sequence[tuple[str, Column]],
    *,
    branches: Sequence[str] = (),
    headers: bool = True,
    width: int | None = None,
    spared: Sequence[Column] = (),
) -> list[str]:
    """The lines of the table, cut to `width`. Without a line of headers if all headers are empty. Where the lines would
    be too long, the columns of `spared` are left out, one after another, as many as necessary."""
    texts = [[c.text(p) for _, c in chosen] for p in processes]
    if branches:
        drawn = next((i for i, (_, c) in enumerate(chosen) if c in (COLUMNS["name"], COLUMNS["command"])), None)
        if drawn is not None:
            for row, branch in zip(texts, branches, strict=True):
                row[drawn] = branch + row[drawn]
    if headers and any(header for header, _ in chosen):
        texts.insert(0, [printable(header) for header, _ in chosen])
    widths = [max((cells(row[i]) for row in texts), default=0) for i in range(len(chosen))]
    places = [i for column in spared for i, (_, c) in enumerate(chosen) if c is column]
    kept = _fitting(widths, places, width)
    lines = []
    for row in texts:
        padded = [_pad(row[i], widths[i], chosen[i][1].left) for i in kept]
        if chosen[-1][1].left:
            padded[-1] = row[-1]
        lines.append(cut(" ".join(padded), width))
    return lines


def _fitting(widths: Sequence[int], spared: Iterable[int], width: int | None) -> list[int]:
    """Which of the columns are shown if those of `spared` are left out, the first one first, until the others fit. The
    last column may be cut, so that one long name does not take the place of figures."""
    needed = [*widths[:-1], min(widths[-1], LAST_LEAST)]
    kept = list(range(len(widths)))
    for i in spared:
        if width is None or sum(needed[k] for k in kept) + len(kept) - 1 <= width:
            break
        kept.remove(i)
    return kept


def _pad(text: str, width: int, left: bool) -> str:
    blanks = " " * (width - cells(text))
    return text + blanks if left else blanks + text
