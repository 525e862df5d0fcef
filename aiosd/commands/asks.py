"""Shows asks. All of their text may come from agents, so none of it reaches the terminal unescaped."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from aiosd.commands.edge import escaped
from aiosd.units import format_duration
from libaios.wire import Asked, AskState, Sys, WatchAsks

if TYPE_CHECKING:
    from libaios.client import Client
    from libaios.connection import Pending

SHOWN_CHARS = 2000  # of each text, unless the whole is requested
NEVER_ALWAYS = "(it can only be allowed once at a time)"
SHORT_CHARS, SHORT_DETAILS = 60, 2  # in the one-line form: the length and the number of details


def title(asked: Asked) -> str:
    """An ask in one line."""
    return escaped(f"{asked.id}  agent {asked.name} (pid {asked.pid}, group {asked.group}): {in_short(asked)}")


def lines(asked: Asked, full: bool = False) -> list[str]:
    """All details of an ask, which a person must see before allowing it."""
    ago = format_duration(max(0.0, time.time() - asked.since))
    found = [escaped(f"{asked.id}  agent {asked.name} (pid {asked.pid}, group {asked.group}) has waited for {ago}")]
    rows = [("tool" if asked.tool else "call", _deed(asked)), ("because of", asked.rule), *asked.details]
    rows += [("in", asked.folder)] if asked.folder else []
    rows += [("always means", asked.always or NEVER_ALWAYS)]
    width = max(len(escaped(label)) for label, _ in rows)
    for label, text in rows:
        first, *more = _text(text, full)
        found.append(f"  {escaped(label):{width}}  {first}")
        found += [f"  {'':{width}}  | {line}" for line in more]
    return found


def _text(text: str, full: bool) -> list[str]:
    """The lines of a text, with a mark if something is left out."""
    left = len(text) - SHOWN_CHARS
    shown = text if full or left <= 0 else text[:SHOWN_CHARS]
    parts = [escaped(line) for line in shown.split("\n")]
    if len(shown) < len(text):
        parts[-1] += f" [… {left} more characters: --full shows them]"
    return parts


def _deed(asked: Asked) -> str:
    things = ", ".join(f"{kind} {value}" for kind, value in asked.resources)
    return f"{asked.what} ({things})" if things else asked.what


def in_short(asked: Asked) -> str:
    """`nice (group web, nice from 0 to -5)`: the deed, with the details that go into a line."""
    named = {word for resource in asked.resources for word in resource}
    short = [
        f"{label} {text}"
        for label, text in asked.details
        if label not in named and text not in named and "\n" not in text and len(text) <= SHORT_CHARS
    ]
    things = [f"{kind} {value}" for kind, value in asked.resources] + short[:SHORT_DETAILS]
    return f"{asked.what} ({', '.join(things)})" if things else asked.what


# ── on the terminal of an attached agent ──────────────────────────────────────────────────────────────────


def watch(client: Client, which: WatchAsks) -> Pending | None:
    """Receive asks, if there is a terminal to show them; meanwhile they wait for an answer."""
    return client.submit(Sys.ASK_WATCH, which) if os.isatty(2) else None


def notices(call: Pending | None) -> list[str]:
    """A line for each ask that has come since the last time."""
    found = []
    while call is not None and call.pieces:
        asked = call.pieces.popleft()
        if isinstance(asked, Asked) and asked.state is AskState.OPEN:
            words = escaped(f"agent {asked.pid} ({asked.name}) needs your approval: {in_short(asked)}")
            found.append(f"{words}; answer it in another terminal: aios-approve {asked.id}")
    return found
