"""Notes of aios-run for a person about the sandbox of an agent: files that the person has named and the agent cannot
see, a folder that it may only read, and keys of the person's environment that the agent has not got.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from typing import TYPE_CHECKING, Any

import msgspec

from aiosd.commands import edge
from libaios import wire
from libaios.sandbox import is_broad
from libaios.wire import Spawn, Spawned

if TYPE_CHECKING:
    from aiosd.sandbox.box import Box

MOST_LOOKED_AT = 64  # arguments
MOST_SHOWN = 3
#: In the cage an agent has these folders of its own: writing there succeeds, but nothing of it is kept.
PRIVATE = ("/tmp", "/dev/shm")
#: Variables that an agent gets anyway, or that are of no use to it.
NOT_MISSED = ("AIOS", "OPENAI_", "CEREBRUM_", "OLLAMA_")
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL")


def note_alone(spawn: Spawn, spawned: Spawned) -> None:
    """Note that a script in the home folder itself does not get the whole home into its sandbox."""
    if spawned.sandbox != "none" and spawn.sandbox.alone:
        script = wire.os_shown(spawn.sandbox.own[0])
        folder = os.path.dirname(script)
        _say(f"agent {spawned.pid} can read {script}, nothing else in {folder} (--read grants more)")
        if spawned.sandbox == "cage" and _is_inside(folder, list(PRIVATE)):
            _say(f"what agent {spawned.pid} writes in {folder} is gone when it ends (its home and --write DIR stay)")


def named_outside(spawn: Spawn, spawned: Spawned) -> list[str]:
    """Arguments that name files which a confined agent was not granted with this call; settings may grant them."""
    if spawned.sandbox == "none" or wire.ENV_PID in os.environ:
        return []
    cwd, granted = wire.os_str(spawn.cwd), [wire.os_str(path) for path in _granted(spawn.sandbox)]
    words = [wire.os_str(arg) for arg in spawn.args[:MOST_LOOKED_AT]]
    return [word for word in words if _is_there(word, cwd) and not _is_inside(os.path.join(cwd, word), granted)]


def note_files(named: list[str], pid: int, agent: dict[str, Any]) -> None:
    """Note files that the agent cannot see. `agent`: its report as in aios-inspect, with grants by settings."""
    from aiosd.sandbox import plan

    seen = plan.machine(plan.common_rules(sys.path)).system
    confined = agent["box"]
    granted = [*seen, confined["workspace"], *confined["read"], *confined["write"]]
    hidden = [word for word in named if not _is_inside(word, granted) and not is_broad(os.path.realpath(word))]
    if hidden:
        words = " ".join(f"--read {shlex.quote(word)}" for word in hidden[:MOST_SHOWN])
        more = " and more" if len(hidden) > MOST_SHOWN else ""
        _say(f"agent {pid} cannot see {', '.join(hidden[:MOST_SHOWN])}{more} (aios-run {words} shows it)")


def note_variables(spawn: Spawn, spawned: Spawned) -> None:
    """After a program has failed: name keys of the person's environment that it may have missed."""
    if spawned.sandbox == "none" or wire.ENV_PID in os.environ:
        return
    from aiosd.sandbox import box

    passed = box.environment(spawn.env, spawn.sandbox.env)
    kept = [name for name in sorted(spawn.env) if name not in passed and SECRET.search(name.upper())]
    missed = [wire.os_shown(name) for name in kept if not name.startswith(NOT_MISSED)]
    if missed:
        words = ", ".join(missed[:MOST_SHOWN]) + (" and others" if len(missed) > MOST_SHOWN else "")
        _say(f"agent {spawned.pid} did not get {words} of your environment (-e {missed[0]} passes it on)")


def note_folder(spawn: Spawn, agent: dict[str, Any]) -> None:
    """After a program has failed: note that it may not write in its working folder, if only the sandbox denies that.
    Whether it tried to is not known. `agent`: its report as in aios-inspect."""
    from aiosd.sandbox import box, plan, why

    if agent["box"] is None or wire.ENV_PID in os.environ:
        return
    folder, confined = os.path.realpath(wire.os_str(spawn.cwd)), box.Box(**agent["box"])
    common = plan.common_rules(sys.path)

    def may(where: box.Box) -> set[str]:
        return {one.deed for one in why.findings(folder, where, plan.machine(common), common) if one.allowed}

    granted = msgspec.structs.replace(confined, write=[*confined.write, folder])
    now = may(confined)  # a program that cannot even read the folder does not work there
    if "read" in now and "write" in may(granted) - now and _may_be_granted(granted):
        _say(f"agent {agent['pid']} may not write in {folder} (if it failed because of that: --write . allows it)")


def _may_be_granted(wanted: Box) -> bool:
    from aiosd.sandbox import box
    from libaios.home import Home

    data = str(Home().data)
    try:
        box.refuse_data(wanted, data, os.path.join(data, "workspaces"))
    except OSError:
        return False
    return True


def _granted(wish: wire.Sandbox) -> list[str]:
    return [*wish.own, *wish.read, *wish.write]


def _is_there(word: str, cwd: str) -> bool:
    """Whether an argument names an existing file. Most arguments are plain words or options."""
    try:
        return bool(word) and not word.startswith("-") and os.path.lexists(os.path.join(cwd, word))
    except (OSError, ValueError):
        return False


def _is_inside(path: str, folders: list[str]) -> bool:
    real = os.path.realpath(path)
    return any(real == folder or folder == "/" or real.startswith(folder + "/") for folder in folders)


def _say(words: str) -> None:
    edge.complain("aios-run", words)
