"""Spaces: the owner whose files a call means, which of them the caller may see and change, and valid paths.

Each owner and each group has one namespace, a *space*. An agent has all rights in its own and in its group's, a person
in all. In the space of another owner it sees what is shared with it or with its group, a file or all of a folder, and
may change it if it was shared for writing. A file that an agent may not see is ENOENT, as if it did not exist; one that
it may see and not change is EACCES.

A path is names with a slash between them, relative to its space. It is converted to Unicode's form NFC: the same name
in NFC and NFD is one file. A share belongs to the path, not to the file that is there now.
"""

from __future__ import annotations

import errno
import re
import unicodedata
from dataclasses import dataclass
from typing import Any

from aiosd.ipc import link
from aiosd.store import owners
from aiosd.store.database import Database
from libaios import wire

NAME_BYTES = 255
PATH_BYTES = 1024
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_NAME = re.compile(wire.NAME_PATTERN)


def is_name(name: str) -> bool:
    """Whether this can be the name of an agent or a group."""
    return len(name) <= 64 and _NAME.match(name) is not None


def clean_path(path: str) -> str:
    """The path as it is kept. Raises OSError (EINVAL, ENAMETOOLONG)."""
    path = unicodedata.normalize("NFC", path)
    if _CONTROL.search(path):
        raise wire.error(errno.EINVAL, "a path may not have control characters")
    if len(path.encode()) > PATH_BYTES:
        raise wire.error(errno.ENAMETOOLONG, f"a path may have {PATH_BYTES} bytes")
    for name in path.split("/"):
        if name in ("", ".", ".."):
            raise wire.error(errno.EINVAL, f"{path!r}: a path is names with a slash between them, and none is {name!r}")
        if len(name.encode()) > NAME_BYTES:
            raise wire.error(errno.ENAMETOOLONG, f"a name in a path may have {NAME_BYTES} bytes")
    return path


def clean_folder(folder: str) -> str:
    """The same for a folder, where "" is the whole space and a slash at the end means nothing."""
    folder = folder.removesuffix("/")
    return clean_path(folder) if folder else ""


def below(folder: str) -> tuple[str, str]:
    """The range of all paths in a folder: from the first of these on, and before the second ("0" follows "/")."""
    return (f"{folder}/", f"{folder}0") if folder else ("", "\U0010ffff")


@dataclass(frozen=True, slots=True)
class PathGrant:
    path: str
    write: bool

    def covers(self, path: str) -> bool:
        return path == self.path or path.startswith(f"{self.path}/")


@dataclass(frozen=True, slots=True)
class Namespace:
    """One namespace as a caller sees it. `owner` None: nothing was ever stored there. `grants` None: all rights."""

    name: str
    owner: int | None
    grants: tuple[PathGrant, ...] | None

    def may_see(self, path: str) -> bool:
        return self.grants is None or any(grant.covers(path) for grant in self.grants)

    def may_write(self, path: str) -> bool:
        return self.grants is None or any(grant.write and grant.covers(path) for grant in self.grants)

    def require(self, path: str, write: bool = False) -> None:
        """Check the caller's right to a path. Raises OSError: ENOENT, EACCES."""
        if not self.may_see(path):
            raise no_file(path)
        if write and not self.may_write(path):
            raise wire.error(errno.EACCES, f"{path}: is shared for reading only")

    def require_all(self, what: str) -> None:
        if self.grants is not None:
            raise wire.error(errno.EACCES, f"only its owner may {what}")

    def where(self) -> tuple[str, list[Any]]:
        """The right to read as a condition in SQL, on `f.path`."""
        if self.grants is None:
            return "1", []
        parts: list[str] = []
        values: list[Any] = []
        for grant in self.grants:
            parts.append("f.path = ? OR (f.path >= ? AND f.path < ?)")
            values += [grant.path, *below(grant.path)]
        return f"({' OR '.join(parts) or '0'})", values


def no_file(path: str) -> OSError:
    return wire.error(errno.ENOENT, f"there is no file {path!r}")


class Spaces:
    def __init__(self, database: Database) -> None:
        self._db = database

    def find(self, caller: link.Caller, of: str) -> Namespace:
        """The space that `of` names. Raises OSError (EINVAL)."""
        return self._space(caller, named(caller, of))

    def of_owner(self, caller: link.Caller, owner: int) -> Namespace:
        (name,) = self._db.rows("SELECT name FROM owners WHERE id = ?", owner)[0]
        return self._space(caller, name)

    def all_seen(self, caller: link.Caller) -> list[Namespace]:
        """The caller's own space, its group's, and all spaces of which something is shared with the caller."""
        mine = identities(caller)
        sql = "SELECT DISTINCT o.name FROM grants g JOIN owners o ON o.id = g.owner WHERE g.grantee IN (?, ?)"
        others = [name for (name,) in self._db.rows(sql, *mine) if name not in mine]
        return [self._space(caller, name) for name in (*mine, *others)]

    def _space(self, caller: link.Caller, name: str) -> Namespace:
        row = self._db.row("SELECT id FROM owners WHERE name = ?", name)
        owner = None if row is None else int(row[0])
        if not caller.pid or name in identities(caller):
            return Namespace(name, owner, None)
        sql = "SELECT path, write FROM grants WHERE owner = ? AND grantee IN (?, ?)"
        rows = self._db.rows(sql, owner, *identities(caller)) if owner is not None else []
        return Namespace(name, owner, tuple(PathGrant(path, bool(write)) for path, write in rows))

    def make(self, space: Namespace) -> int:
        """The number of its owner, which is created if it does not exist. In the transaction of a call."""
        self._db.do("INSERT OR IGNORE INTO owners(name) VALUES(?)", space.name)
        row = self._db.row("SELECT id FROM owners WHERE name = ?", space.name)
        assert row is not None
        return int(row[0])

    # ── shares, in the transaction of a call ──────────────────────────────────────────────────────────────

    def share(self, owner: int, path: str, grantee: str, write: bool) -> None:
        self._db.do("INSERT OR REPLACE INTO grants VALUES(?, ?, ?, ?)", owner, path, grantee, write)

    def unshare(self, owner: int, path: str, grantee: str) -> bool:
        sql = "DELETE FROM grants WHERE owner = ? AND path = ? AND grantee = ? RETURNING 1"
        return self._db.row(sql, owner, path, grantee) is not None

    def shares(self, caller: link.Caller) -> list[wire.Share]:
        """Shares that the caller and its group have made, and shares with them."""
        mine = identities(caller)
        sql = (
            "SELECT g.path, o.name, g.grantee, g.write FROM grants g JOIN owners o ON o.id = g.owner "
            "WHERE o.name IN (?1, ?2) OR g.grantee IN (?1, ?2) ORDER BY o.name, g.path, g.grantee"
        )
        rows = self._db.rows(sql, *mine)
        return [
            wire.Share(path, name_for(caller, of), name_for(caller, to), bool(write)) for path, of, to, write in rows
        ]

    def forget(self, name: str) -> None:
        """Drop the shares of an owner that has ended. In a transaction."""
        self._db.do("DELETE FROM grants WHERE owner = (SELECT id FROM owners WHERE name = ?1) OR grantee = ?1", name)


# ── the names of spaces ───────────────────────────────────────────────────────────────────────────────────


def identities(caller: link.Caller) -> tuple[str, str]:
    return owners.own(caller), owners.group(caller)


def named(caller: link.Caller, of: str) -> str:
    """The owner that `of` means in a call of this caller. Raises OSError (EINVAL)."""
    kind, _, rest = of.partition(":")
    group, slash, name = rest.rpartition("/")
    if not of:
        return owners.own(caller)
    if of == "group":
        return owners.group(caller)
    if of == "person":
        return f"person/{caller.uid}"
    if kind == "group" and _NAME.match(rest):
        return f"group/{caller.uid}/{rest}"
    if kind == "agent" and _NAME.match(name) and (not slash or _NAME.match(group)):
        return f"name/{caller.uid}/{group or caller.group}/{name}"
    if kind == "pid" and re.fullmatch(r"[1-9][0-9]{0,15}", rest):
        return owners.alone(int(rest))
    raise wire.error(errno.EINVAL, f"{of!r}: neither group, group:NAME, agent:NAME, agent:GROUP/NAME, pid:N nor person")


def name_for(caller: link.Caller, name: str) -> str:
    """The other way round: how the caller names this owner."""
    kind, _, rest = name.partition("/")
    if name == owners.own(caller):
        return ""
    if kind == "agent":
        return f"pid:{rest}"
    if kind == "person":
        return "person"
    rest = rest.partition("/")[2]  # behind the uid
    if kind == "group":
        return "group" if name == owners.group(caller) else f"group:{rest}"
    group, _, name = rest.partition("/")
    return f"agent:{name}" if group == caller.group else f"agent:{group}/{name}"
