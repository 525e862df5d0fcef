"""Built-in tools that the toolbox answers itself, without a worker.

`calc` is here for those callers that do not compute it themselves (`libaios.pure`).

A worker is there to keep the effects of a tool away from other calls. These tools need no such protection: `calc` is
arithmetic with limited cost (`libaios.arithmetic`), and the others are system calls that the kernel makes in the name
of the agent that called (`errands`), so they can do what that agent can do itself, and no more. Passing such a call to
another process and back would be most of its cost; and a confined agent would need a worker of its own for each.

Each is a function of checked arguments, as any tool. One that needs system calls is a generator of plans, as in
`libaios.plan.Steps`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from libaios import arithmetic, mem, sto, wire
from libaios.plan import Plan, Steps, plan_of, steps_of
from libaios.tool import define
from libaios.wire import Sys

MOST_READ = 1 << 20  # bytes of a stored file that a model gets
MOST_LISTED = 1000

Text = Annotated[str, Meta(max_length=1 << 20)]
StoredName = Annotated[str, Meta(min_length=1, max_length=1024)]
Few = Annotated[int, Meta(ge=1, le=50)]
OwnerName = Annotated[str, Meta(max_length=1024)]


@define(instances=64, time=10)
def calc(expression: Annotated[str, Meta(max_length=arithmetic.MAX_EXPRESSION)]) -> str:
    """Computes arithmetic.

    Args:
        expression: for example (3 + 4) * 2.5
    """
    return arithmetic.calc(expression)


# ── notes ─────────────────────────────────────────────────────────────────────────────────────────────────


@define(instances=64)
def remember(
    text: Text, key: Annotated[str, Meta(max_length=256)] = "", tags: Sequence[str] = (), shared: bool = False
) -> Steps[str]:
    """Keeps a note for later.

    Args:
        text: what is to be remembered
        key: a name for it; a note that has this name already is replaced
        tags: words by which it can be listed
        shared: for all agents of the group
    """
    number: int = yield plan_of(mem.add)(text, key or None, tags, shared=shared)
    return f"kept as note {number}"


@define(instances=64)
def recall(note: int | StoredName) -> Steps[Any]:
    """Reads a note.

    Args:
        note: its key or its number
    """
    return (yield plan_of(mem.get)(note))


@define(instances=64)
def search_notes(query: Text, k: Few = 5, tags: Sequence[str] = ()) -> Steps[Any]:
    """Finds notes by their words and their meaning, the best first.

    Args:
        query: what they are about
        k: how many at most
        tags: only notes that have all of these
    """
    found: list[wire.Found] = yield plan_of(mem.search)(query, k, tags)
    return [one.note for one in found]


@define(instances=64)
def list_notes(tags: Sequence[str] = (), limit: Few = 20) -> Steps[Any]:
    """Lists notes, the newest first.

    Args:
        tags: only notes that have all of these
        limit: how many at most
    """
    return (yield plan_of(mem.list)(tags, limit=limit))


@define(instances=64)
def forget_note(note: int | StoredName) -> Steps[str]:
    """Removes a note for good.

    Args:
        note: its key or its number
    """
    yield plan_of(mem.remove)(note)
    return "removed"


# ── stored files ──────────────────────────────────────────────────────────────────────────────────────────


@define(instances=64)
def list_stored(folder: Annotated[str, Meta(max_length=1024)] = "", of: OwnerName = "") -> Steps[Any]:
    """Lists files that are kept with their versions, those in folders below included.

    Args:
        folder: only what is in it
        of: whose files: "" one's own, "group" those of the group, or "agent:NAME"
    """
    files: list[wire.File] = yield Plan(Sys.STO_LIST, wire.StoList(folder, of))
    return files[:MOST_LISTED]


@define(instances=64)
def read_stored(path: StoredName, version: Annotated[int, Meta(ge=1)] | None = None, of: OwnerName = "") -> Steps[str]:
    """Reads a kept text file.

    Args:
        path: its path
        version: an old version instead of the newest
        of: whose file: "" one's own, "group" one of the group, or "agent:NAME"
    """
    data = b""
    while True:
        found: wire.FileData = yield Plan(Sys.STO_READ, wire.StoRead(path, of, version, len(data)))
        if found.size > MOST_READ:
            raise wire.error(errno.EMSGSIZE, f"{path}: {found.size} bytes; at most {MOST_READ} are read by a tool")
        version, data = found.version or None, data + found.data  # 0: a file of a mounted folder, which has no versions
        if not found.data or len(data) >= found.size:
            break
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise wire.error(errno.EINVAL, f"{path} is no text file") from None


@define(instances=64)
def write_stored(path: StoredName, content: Text, of: OwnerName = "") -> Steps[str]:
    """Keeps a text file. An older one of this path stays as an old version.

    Args:
        path: its path
        content: the whole text
        of: whose file: "" one's own, "group" one of the group, or "agent:NAME"
    """
    file: wire.File = yield from steps_of(sto.write)(path, content, of)
    return f"kept as version {file.version}"


@define(instances=64)
def stored_history(path: StoredName, of: OwnerName = "") -> Steps[Any]:
    """Lists the versions of a kept file, the newest first.

    Args:
        path: its path
        of: whose file: "" one's own, "group" one of the group, or "agent:NAME"
    """
    return (yield plan_of(sto.history)(path, of, 100))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        calc,
        remember,
        recall,
        search_notes,
        list_notes,
        forget_note,
        list_stored,
        read_stored,
        write_stored,
        stored_history,
    )
}


def plain(result: Any) -> Any:
    """A result as a value of JSON."""
    return msgspec.to_builtins(result)
