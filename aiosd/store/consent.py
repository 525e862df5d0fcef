"""What a call of the store amounts to, for rules and people.

What an agent keeps in its own space is its own. What belongs to its group, or to another agent, belongs to others, too:
to remove it, to roll it back, or to write over what another one wrote last, asks a person where no rule decides.
Two things do not ask: to append, which takes nothing away; and to write where the owner has shared a path for writing,
because it has allowed that. An agent may also write over what it wrote last itself.

The question is asked within the transaction of the call, when all is known and nothing has been done: the exception
ends the transaction. The call that comes again, allowed, does the same once more, and what it is about must be the
same: the version of the file and the content that is written are part of what was allowed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from aiosd import link
from aiosd.access.deed import Deed, detail
from aiosd.store import owners, spaces
from aiosd.store.files import Row
from aiosd.store.spaces import Space
from libaios.wire import Note

SHARED = "what belongs to others, too, is not {} without asking"


class Consent:
    """`require` raises `Unapproved`; `ruled` says whether any rule names a call (see `service.Server`)."""

    def __init__(self) -> None:
        self.require: Callable[[link.Ask, Deed], None] = lambda ask, deed: None
        self.ruled: Callable[[str], bool] = lambda call: False

    def to(
        self,
        ask: link.Ask,
        call: str,
        space: Space,
        path: str,
        old: Row | None = None,
        done: str = "",
        content: bytes | None = None,
        more: Sequence[tuple[str, object]] = (),
        names: bytes = b"",
    ) -> None:
        """The caller is about to do `call` to this file. `done`: what becomes of what there is ("removed"), "".
        `content`: what is written; `names`: the hashes of what is written in pieces. Raises Unapproved."""
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

    def to_remove_note(self, ask: link.Ask, note: Note) -> None:
        """One of the group asks, whoever wrote it: that is not kept."""
        default = SHARED.format("removed") if note.shared else ""
        if not default and not self.ruled("mem_remove"):
            return
        groups = [("group", ask.caller.group)] if note.shared else []
        of = f"group {ask.caller.group}" if note.shared else "its own"
        details = [("note", note.key or str(note.id)), ("of", of), detail("text", note.text)]
        bound = note.id.to_bytes(8, "little") + note.version.to_bytes(8, "little")
        self.require(ask, Deed("mem_remove", False, groups, details, bound, default))

    @staticmethod
    def _of_others(caller: link.Caller, space: Space, old: Row, call: str) -> bool:
        if space.name == owners.own(caller) or old.author.endswith(f"({caller.pid})"):
            return False
        return call != "sto_write" or space.grants is None


def _groups(space: Space) -> list[tuple[str, str]]:
    kind, _, rest = space.name.partition("/")
    return [("group", rest.partition("/")[2])] if kind == "group" else []


def _shown(caller: link.Caller, space: Space) -> str:
    return spaces.shown(caller, space.name) or "its own"


def _text(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return f"bytes that are no text; SHA-256: {hashlib.sha256(content).hexdigest()}"
