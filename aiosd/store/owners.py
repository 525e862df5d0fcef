"""The owners of notes and files. The owner follows from the caller, as the kernel reports it, never from an argument.

An agent that was given a name on purpose shares its notes and files with all agents of the same user, group and name,
before and after it. An agent without such a name owns them alone, and they end with it. (A name made from the script's
file name does not count: it does not show who runs the script.) A person at the terminal is an owner, too. Shared notes
belong to the group.
"""

from __future__ import annotations

from aiosd.ipc.link import Caller

ALONE = "agent/"
LOST = "lost/"  # the beginning of the owner's name of data that have lost their owner


def own(caller: Caller) -> str:
    if not caller.pid:
        return f"person/{caller.uid}"
    if caller.named:
        return f"name/{caller.uid}/{caller.group}/{caller.name}"
    return alone(caller.pid)


def alone(pid: int) -> str:
    return f"{ALONE}{pid}"


def shown(name: str) -> str:
    """The name of an owner for a person."""
    kind, _, rest = name.partition("/")
    if kind == "name":
        return rest.split("/", 2)[2]
    return f"agent {rest}" if kind == "agent" else "a person" if kind == "person" else "an unknown owner"


def group(caller: Caller) -> str:
    return f"group/{caller.uid}/{caller.group}"
