"""Memory: notes that an agent keeps. They are on the disk when a call returns.

An agent that was started under a name of its own (`aios-run --name`) finds its notes again when it is started under
that name again, in the same group; without such a name they end with it. Notes that are `shared` belong to the group.

A note is named by its id or by its key. Notes of other owners are not found, as if they did not exist. All calls raise
OSError: FileNotFoundError, EAGAIN, EDQUOT, ENOSPC, EINVAL with a sentence.
"""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence, Set
from typing import Any

from libaios import wire
from libaios.plan import Plan, syscall
from libaios.wire import Found, Note, NoteFilters, Sys

__all__ = ["Found", "Note", "add", "clear", "get", "list", "remove", "search", "stats", "update"]


@syscall
def add(
    text: str,
    key: str | None = None,
    tags: Sequence[str] = (),
    metadata: Mapping[str, Any] | None = None,
    ttl: float | None = None,
    shared: bool = False,
) -> Plan[int]:
    """Keep a note and return its id. A note with the same key is replaced, and keeps its id.

    `metadata` is flat: texts, numbers, truth values. `ttl`: seconds after which the note is not found any more.
    `shared`: for all agents of the group. Raises OSError(EDQUOT) when the quota of the owner is used up, and
    PermissionError if the call would overwrite a note of the group that another agent wrote last, and it was not
    allowed.
    """
    return Plan(Sys.MEM_ADD, wire.MemAdd(text, key, _tags(tags), _metadata(metadata), ttl, shared))


@syscall
def get(note: int | str) -> Plan[Note]:
    """The note with this id or key. Raises FileNotFoundError."""
    return Plan(Sys.MEM_GET, wire.MemGet(note))


@syscall
def update(
    note: int | str,
    text: str | None = None,
    tags: Sequence[str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    ttl: float | None = None,
    if_version: int | None = None,
) -> Plan[int]:
    """Change the given fields of a note, and return its new version number.

    With `if_version` the note must still have that version, else BlockingIOError (EAGAIN) and nothing is changed.
    Raises FileNotFoundError, OSError(EDQUOT), and PermissionError as `add`.
    """
    new_tags = None if tags is None else _tags(tags)
    new_metadata = None if metadata is None else _metadata(metadata)
    return Plan(Sys.MEM_UPDATE, wire.MemUpdate(note, text, new_tags, new_metadata, ttl, if_version))


@syscall
def remove(note: int | str) -> Plan[None]:
    """Remove a note for good. Raises FileNotFoundError, and PermissionError as `add`."""
    return Plan(Sys.MEM_REMOVE, wire.MemGet(note))


@syscall
def search(
    query: str,
    k: int = 5,
    tags: Sequence[str] = (),
    metadata: Mapping[str, Any] | None = None,
    since: float | None = None,
    until: float | None = None,
    by: str = "",
) -> Plan[builtins.list[Found]]:
    """At most `k` notes that fit `query`, the best first: notes that contain words of it, or (if aiosd has an embedder)
    that mean about the same. `by`: "words" or "meaning" alone. The query has no operators, only words. `stats` reports
    how search works in this system.

    The filters: only notes that have all `tags` and `metadata`, and were changed from `since` on and before `until`
    (Unix times). A note is found by its exact text at once, and by its words and its meaning when these have been
    indexed: a search first indexes the caller's own new notes, for a second or two at most. For "meaning" raises
    OSError(EOPNOTSUPP) if there is no embedder, EAGAIN while it is not running, or while the vectors of very many notes
    are read after a start.
    """
    filters = NoteFilters(_tags(tags), _metadata(metadata), since, until)
    return Plan(Sys.MEM_SEARCH, wire.MemSearch(query, k, filters, by))


@syscall
def list(
    tags: Sequence[str] = (),
    metadata: Mapping[str, Any] | None = None,
    since: float | None = None,
    until: float | None = None,
    limit: int = 100,
    offset: int = 0,
) -> Plan[builtins.list[Note]]:
    """Notes, the newest first; filters as in `search`. At most 1,000 at a time.

    A note that a damaged disk has lost is in the list, as `Note.damaged`; `get` raises OSError (EIO) for it."""
    filters = NoteFilters(_tags(tags), _metadata(metadata), since, until)
    return Plan(Sys.MEM_LIST, wire.MemList(filters, limit, offset))


@syscall
def clear() -> Plan[int]:
    """Remove all notes of the caller, and return the number of them. Those of its group stay. OSError (EIO): notes that
    a damaged disk has lost cannot be removed; all others are."""
    return Plan(Sys.MEM_CLEAR, wire.NoArgs())


@syscall
def stats() -> Plan[dict[str, Any]]:
    """Of the caller's own notes: `notes`, `bytes`, `quota`, `ram_bytes` (held in memory), `hits`, `faults` and
    `evictions` of that memory, `pending` (texts that cannot be found by their meaning yet), and how `search` works."""
    return Plan(Sys.MEM_STATS, wire.MemStats())


# A value of another type is sent as it is: the kernel refuses it, and its error names the argument.


def _tags(tags: Any) -> Any:
    """Tags as they are sent. A text is no list of tags, although it is a sequence."""
    return builtins.list(tags) if isinstance(tags, Sequence | Set) and not isinstance(tags, str | bytes) else tags


def _metadata(metadata: Any) -> Any:
    return dict(metadata or {}) if isinstance(metadata, Mapping | None) else metadata
