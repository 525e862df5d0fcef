"""Whose something in the store is: from the caller, which the kernel vouches for, and from nothing that a call says.

An agent that was given a name on purpose owns what it keeps together with all agents of that user, group and name,
before and after it. One without such a name owns it alone, and that ends with it: the stem of a script says nothing
about who runs it. A person at the terminal is an owner, too. What is shared belongs to the group.
"""

from __future__ import annotations

from aiosd.ipc.link import Caller

ALONE = "agent/"
LOST = "lost/"  # of what has no owner any more


def own(caller: Caller) -> str:
    if not caller.pid:
        return f"person/{caller.uid}"
    if caller.named:
        return f"name/{caller.uid}/{caller.group}/{caller.name}"
    return alone(caller.pid)


def alone(pid: int) -> str:
    return f"{ALONE}{pid}"


def shown(name: str) -> str:
    """Who is an owner, for a person."""
    kind, _, rest = name.partition("/")
    if kind == "name":
        return rest.split("/", 2)[2]
    return f"agent {rest}" if kind == "agent" else "a person" if kind == "person" else "nobody knows whom"


def group(caller: Caller) -> str:
    return f"group/{caller.uid}/{caller.group}"
