"""Makes the picture of aios-top, as lines of text, from a sample of the system; rates need two samples.

A figure that the system does not report is left out together with its label. No line is longer than the width.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from aiosd.commands import table
from aiosd.commands.table import Column
from aiosd.units import format_duration, format_size
from libaios.wire import ProcInfo

BAR = 20  # characters for the slots of a model
FOLDED_FROM = 72  # columns of a window in which long lines go on below
INDENT = " " * 6
BETWEEN = re.compile(r"[,;] |  +(?=\S)")  # what stands between two figures


class Sample(NamedTuple):
    """The system at one moment."""

    at: float  # monotonic
    status: dict[str, Any]
    agents: list[ProcInfo]
    machine: str = ""  # its figures, in words


class Rate(NamedTuple):
    """The rates of one agent between two samples; -1: there is only one sample of it."""

    tokens_per_s: float = -1.0
    cpu: float = -1.0  # percent of one processor


class View:
    """What the user has chosen to see."""

    __slots__ = ("names", "reverse", "sort", "system")

    def __init__(
        self, sort: str = "rate", reverse: bool = False, system: bool = False, names: Sequence[str] = ()
    ) -> None:
        self.sort = sort
        self.reverse = reverse
        self.system = system  # aiosd's own processes too
        self.names = list(names)  # only agents of these names; empty: all


def rates(old: Sample | None, new: Sample) -> dict[int, Rate]:
    before = {p.pid: p for p in old.agents} if old is not None else {}
    passed = max(new.at - old.at, 1e-3) if old is not None else 1.0
    found = {}
    for p in new.agents:
        was = before.get(p.pid)
        if was is not None:
            made = p.completion_tokens - was.completion_tokens
            found[p.pid] = Rate(max(made, 0) / passed, max(p.cpu_s - was.cpu_s, 0.0) / passed * 100)
    return found


# ── the system ────────────────────────────────────────────────────────────────────────────────────────────


def head(status: dict[str, Any], width: int, clock: float, machine: str = "") -> list[str]:
    """The lines above the agents."""
    words = [f"aios-top {time.strftime('%H:%M:%S', time.localtime(clock))}"]
    if "uptime_s" in status:
        words.append(f"up {format_duration(status['uptime_s'])}")
    if status.get("state") not in (None, "ready"):
        words.append(str(status["state"]))
    if "policy" in status:
        words.append(f"policy {status['policy']}{_quantum(status.get('quantum'))}")
    lines = [", ".join(words), _agents(status)]
    models = status.get("models", [])
    indent = max((len(table.printable(model.get("name", "?"))) for model in models), default=0)
    for model in models:
        lines += _model(model, min(indent, 12), with_bar=width >= FOLDED_FROM)
    lines += _notes(status)
    lines += [machine] * bool(machine)
    return [table.cut(part, width) for line in lines for part in _folded(line, width)]


def _folded(line: str, width: int) -> list[str]:
    """A line that is too long, broken between its figures. In a narrow window it ends there: agents need the lines."""
    lines: list[str] = []
    while table.cells(line) > width:
        breaks = [found for found in BETWEEN.finditer(line) if found.start() > len(INDENT)]
        fitting = [found for found in breaks if table.cells(line[: found.end()].rstrip()) <= width]
        if not fitting:
            break
        if width < FOLDED_FROM:
            return [line[: fitting[-1].start()]]
        lines.append(line[: fitting[-1].end()].rstrip())
        line = INDENT + line[fitting[-1].end() :]
    return [*lines, line]


def _quantum(quantum: Any) -> str:
    if not isinstance(quantum, dict) or "tokens" not in quantum:
        return ""
    return f" ({quantum['tokens']} tokens or {quantum.get('seconds', 0):g} s)"


def _agents(status: dict[str, Any]) -> str:
    states = status.get("agents", {})
    text = f"agents {sum(states.values())}"
    if states:
        text += ": " + ", ".join(f"{count} {stat}" for stat, count in sorted(states.items()))
    if "max_agents" in status:
        text += f", at most {status['max_agents']} at once"
    calls = sum(model.get("open_calls", 0) for model in status.get("models", []))
    return f"{text}; {calls} open call{'s' * (calls != 1)}"


def _model(model: dict[str, Any], indent: int, with_bar: bool) -> list[str]:
    name, stats = table.printable(str(model.get("name", "?"))), model.get("stats") or {}
    title = f"{name[:indent]:{indent}}  "
    if model.get("state") != "ready":
        why = f" ({model['last_death']})" if model.get("last_death") else ""
        return [f"{title}{model.get('state', '?')}{why}"]
    lines = [_join(_slots(stats, with_bar)), _join(_speed(stats)), _join(_tiers(stats.get("tiers")))]
    return [(" " * len(title) if number else title) + line for number, line in enumerate(filter(None, lines))]


def _notes(status: dict[str, Any]) -> list[str]:
    """A line about the store, if it was used: the content of its memory, and how often that was enough."""
    stats = next((one.get("stats") or {} for one in status.get("services", []) if one.get("kind") == "store"), {})
    parts = []
    if stats.get("bytes") or stats.get("faults"):
        held = format_size(stats.get("bytes", 0))
        parts += [f"{held} in memory", f"{stats.get('hits', 0)} hits", f"{stats.get('faults', 0)} faults"]
        parts.append(f"{stats.get('evictions', 0)} evictions")
    if stats.get("vectors"):
        parts.append(f"{stats['vectors']} vectors ({format_size(stats.get('index_bytes', 0))})")
    if waiting := stats.get("pending", 0) + stats.get("wordless", 0):
        parts.append(f"{waiting} pending")
    return ["notes: " + ", ".join(parts)] if parts else []


def _join(parts: Sequence[str]) -> str:
    return "  ".join(part for part in parts if part)


def _slots(stats: dict[str, Any], with_bar: bool) -> list[str]:
    slots = stats.get("slots")
    parts = []
    if isinstance(slots, dict) and slots.get("total"):
        used, total = slots.get("used", 0), slots["total"]
        full = min(BAR, -(-used * BAR // total))
        parts += [f"slots {used} of {total}", f"[{'#' * full}{'.' * (BAR - full)}]" if with_bar else ""]
    for name, words in (("running", "running"), ("waiting", "waiting"), ("preemptions", "preempted")):
        if name in stats:
            parts.append(f"{stats[name]} {words}")
    return parts


def _speed(stats: dict[str, Any]) -> list[str]:
    parts = []
    if "tokens_per_s" in stats:
        parts.append(f"{stats['tokens_per_s']:,.1f} tokens/s")
    if "prefill_tokens_per_s" in stats:
        parts.append(f"prefill {stats['prefill_tokens_per_s']:,.0f}/s")
    if stats.get("step_s"):
        parts.append(f"step {stats['step_s'] * 1000:.1f} ms")
    prefix = stats.get("prefix")
    if isinstance(prefix, dict) and "hit_rate" in prefix:
        parts.append(f"prefix hits {prefix['hit_rate'] * 100:.0f}%")
    ahead = stats.get("lookahead")
    if isinstance(ahead, dict) and ahead.get("guessed"):
        parts.append(f"guesses {ahead.get('right', 0) / ahead['guessed'] * 100:.0f}%")
    return parts


def _tiers(tiers: Any) -> list[str]:
    if not isinstance(tiers, dict) or not tiers:
        return []
    parts = []
    for name, tier in tiers.items():
        size = format_size(tier.get("bytes", 0))
        if tier.get("budget") is not None:
            size += f" of {format_size(tier['budget'])}"
        parts.append(f"{name} {tier.get('contexts', 0)} ({size})")
    return ["contexts: " + ", ".join(parts)]


# ── the agents ────────────────────────────────────────────────────────────────────────────────────────────

#: The columns from left to right. Sorting starts with the largest value, but for those in SMALLEST_FIRST.
ORDER = ("pid", "stat", "ni", "rate", "tokens", "cached", "ctx", "mem", "cpu", "time", "name")
SMALLEST_FIRST = ("pid", "stat", "ni", "name")
#: What a narrow window leaves out, the first one first, but for the column of the sort.
SPARED = ("cached", "time", "ni", "ctx", "cpu", "mem", "tokens", "stat", "rate")


def columns(usage: dict[int, Rate]) -> dict[str, Column]:
    known = {key: table.COLUMNS[key] for key in ORDER if key in table.COLUMNS}
    nothing = Rate()

    def figure(value: Callable[[Rate], float]) -> tuple[Callable[[ProcInfo], float], Callable[[ProcInfo], str]]:
        def of(p: ProcInfo) -> float:
            return value(usage.get(p.pid, nothing))

        return of, lambda p: "-" if of(p) < 0 else f"{of(p):.1f}"

    return known | {
        "rate": Column("TOK/S", *figure(lambda rate: rate.tokens_per_s)),
        "cpu": Column("%CPU", *figure(lambda rate: rate.cpu)),
    }


def rows(sample: Sample, usage: dict[int, Rate], view: View, width: int) -> tuple[str, list[int], list[str]]:
    """The line of headers, the pids of the agents in order, and their lines. Agents with equal values are sorted by the
    tokens that they have used, then by pid."""
    known = columns(usage)
    shown = [p for p in sample.agents if (view.system or not p.system) and (not view.names or p.name in view.names)]
    shown.sort(key=lambda p: p.pid)
    shown.sort(key=table.tokens, reverse=True)
    descending = (view.sort not in SMALLEST_FIRST) != view.reverse
    shown.sort(key=known[view.sort].value, reverse=descending)
    mark = {view.sort: known[view.sort].header + ("-" if descending else "+")} if view.reverse else {}
    chosen = [(mark.get(key, known[key].header), known[key]) for key in ORDER]
    spared = [known[key] for key in SPARED if key != view.sort]
    lines = table.render(shown, chosen, width=width, spared=spared)
    return lines[0], [p.pid for p in shown], lines[1:]


def plain(sample: Sample, old: Sample | None, view: View, clock: float, width: int = 1 << 16) -> list[str]:
    """The whole picture."""
    title, _, lines = rows(sample, rates(old, sample), view, width)
    return [*head(sample.status, width, clock, sample.machine), "", title, *lines]
