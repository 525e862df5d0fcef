"""Finds the agents that a user names on the command line, by PID or NAME.

A word of digits is a pid. A name stands for all live agents of that name; where a command needs one agent, for the
newest of them. A name that no agent has, but one of aiosd's own processes, stands for that process.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from aiosd.commands.edge import CommandFailed, completions
from libaios.client import Client, NoKernel
from libaios.wire import ProcInfo, Ps, Sys

if TYPE_CHECKING:
    import click
    from click.shell_completion import CompletionItem


def named(client: Client, name: str, dead: bool = False) -> list[ProcInfo]:
    """Agents of that name, the oldest first: live ones and zombies, and with `dead` also those of which there is only a
    record. If no agent has the name, aiosd's own process of that name."""
    found: list[ProcInfo] = client.call(Sys.PS, Ps(all=True, name=name, dead=dead), list[ProcInfo])
    agents = [p for p in found if not p.system]
    return sorted(agents or found, key=lambda p: p.pid)


def live(client: Client, word: str) -> list[int]:
    """The pids that `word` stands for in kill and renice; empty when no live agent has that name."""
    if word.isascii() and word.isdigit():
        return [int(word)]
    return [p.pid for p in named(client, word) if p.exit is None]


def subject(word: str, pid: int, pids: Collection[int]) -> str:
    """What an error about one of `pids` names: what the user has typed, and which of several it is."""
    return f"{word} (pid {pid})" if len(pids) > 1 else word


def newest(client: Client, word: str) -> int:
    """The pid that `word` stands for, if the command needs one agent."""
    if word.isascii() and word.isdigit():
        return int(word)
    found = named(client, word, dead=True)
    if not found:
        raise CommandFailed(f"{word}: no such agent")
    return max(found, key=lambda p: (p.exit is None, p.pid)).pid


def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Pids and names of live agents, for the shell's completion."""
    found = _live_ones()
    return completions(_pids(found) | _names(found), incomplete)


def complete_names(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the last name of a list."""
    return completions(_names(_live_ones()), incomplete, listed=True)


def complete_pids(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the last pid of a list."""
    return completions(_pids(_live_ones()), incomplete, listed=True)


def _pids(found: list[ProcInfo]) -> dict[str, str]:
    return {str(p.pid): p.name for p in found}


def _names(found: list[ProcInfo]) -> dict[str, str]:
    return {p.name: f"pid {p.pid}" for p in found}


def _live_ones() -> list[ProcInfo]:
    try:
        with Client() as client:
            agents: list[ProcInfo] = client.call(Sys.PS, Ps(all=True), list[ProcInfo])
    except (NoKernel, OSError):
        return []
    return [p for p in agents if p.exit is None and not p.system]
