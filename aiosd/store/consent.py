"""Decides which calls of the store need a person's consent, and describes them for rules and people.

Files and notes in an agent's own space are its own. Those of its group, or of another agent, belong to others, too: to
remove them, to roll them back, or to overwrite what another agent wrote last, needs a person's consent if no rule
decides. That holds for files and for the group's notes. Two things need none: to append to a file, because that takes
nothing away; and to write to a path that the owner has shared for writing, because the owner has allowed that. An agent
may also change, overwrite and (a note) remove what it wrote last itself. The author of a note that an older aiosd has
kept is not known, so it needs consent.

The decision is made within the transaction of the call, when all is known and nothing has been done: the exception ends
the transaction. When the call comes again, allowed, it goes through the same steps, and must concern the same: the
version of the file and the content that is written are part of what was allowed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import msgspec

from aiosd.access.deed import Deed, detail
from aiosd.ipc import link
from aiosd.store import owners, spaces
from aiosd.store.files import FileRow
from aiosd.store.spaces import Namespace
from libaios import wire
from libaios.wire import Note

SHARED = "what belongs to others, too, is not {} without asking"


class Consent:
    """The decision. `require` raises `Unapproved`; `ruled` returns whether any rule names a call (see
    `service.Server`)."""

    def __init__(self) -> None:
        self.require: Callable[[link.Ask, Deed], None] = lambda ask, deed: None
        self.ruled: Callable[[str], bool] = lambda call: False

    def to(
        self,
        ask: link.Ask,
        call: str,
        space: Namespace,
        path: str,
        old: FileRow | None = None,
        done: str = "",
        content: bytes | None = None,
        more: Sequence[tuple[str, object]] = (),
        names: bytes = b"",
    ) -> None:
        """The caller is about to make `call` on this file. `done`: what the call does to existing content ("removed"),
        or "". `content`: what is written; `names`: the hashes of content that is written in pieces. Raises
        Unapproved."""
        asks = done and old is not None and self._of_others(ask.caller, space, old, call)
        default = SHARED.format(done) if asks else ""
        if not default and not self.ruled(call):
            return
        details = [("file", path), ("of", _shown(ask.caller, space))]
        if old is not None:
            details.append(("there is", f"version {old.version}, {old.size} bytes, by {old.author}"))
        details += [detail(label, value) for label, value in more]
        if content is not None:
            details.append(detail(f"writes {len(content)} bytes", _text(content)))
        version = 0 if old is None else old.version
        bound = hashlib.blake2b(content or names, digest_size=16).digest() + version.to_bytes(8, "little")
        deed = Deed(call, False, [("path", path), *_groups(space)], details, bound, default)
        self.require(ask, deed)

    def to_note(
        self,
        ask: link.Ask,
        call: str,
        old: Note | None,
        author: str,
        shared: bool,
        done: str = "",
        writes: wire.MemAdd | wire.MemUpdate | None = None,
    ) -> None:
        """The caller is about to make `call` on this note. `author`: the owner that wrote it last, "" if that is not
        known, None if there is no note yet. `done`: what the call does to it ("removed"), or "". `writes`: what is
        written. Raises Unapproved."""
        asks = done and old is not None and shared and author != owners.own(ask.caller)
        default = SHARED.format(done) if asks else ""
        if not default and not self.ruled(call):
            return
        details: list[tuple[str, str]] = []
        if old is not None:
            details.append(("note", old.key or str(old.id)))
        details.append(("of", f"group {ask.caller.group}" if shared else "its own"))
        if old is not None:
            by = f", by {owners.shown(author)}" if shared else ""
            details.append(detail(f"there is version {old.version}{by}", old.text))
        if writes is not None:
            details += [detail(name, value) for name, value in _given(writes)]
        content = b"" if writes is None else msgspec.msgpack.encode(writes)
        number, version = (0, 0) if old is None else (old.id, old.version)
        bound = number.to_bytes(8, "little") + version.to_bytes(8, "little")
        bound += hashlib.blake2b(content, digest_size=16).digest()
        groups = [("group", ask.caller.group)] if shared else []
        self.require(ask, Deed(call, False, groups, details, bound, default))

    @staticmethod
    def _of_others(caller: link.Caller, space: Namespace, old: FileRow, call: str) -> bool:
        if space.name == owners.own(caller) or old.author.endswith(f"({caller.pid})"):
            return False
        return call != "sto_write" or space.grants is None


def _groups(space: Namespace) -> list[tuple[str, str]]:
    kind, _, rest = space.name.partition("/")
    return [("group", rest.partition("/")[2])] if kind == "group" else []


def _shown(caller: link.Caller, space: Namespace) -> str:
    return spaces.name_for(caller, space.name) or "its own"


def _given(args: wire.MemAdd | wire.MemUpdate) -> list[tuple[str, object]]:
    """What a call writes into a note: the arguments that differ from their defaults."""
    fields = [field for field in msgspec.structs.fields(args) if field.name not in ("note", "if_version", "shared")]
    given = [(field.name, getattr(args, field.name), field.default) for field in fields]
    return [(f"writes {name}", value) for name, value, default in given if value not in (default, [], {}, None)]


def _text(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return f"bytes that are no text; SHA-256: {hashlib.sha256(content).hexdigest()}"
