"""Reads all kept data from the file of a store that no process has open, however damaged the file is.

The file is read by `pages`, so that only the rows on damaged pages are lost. Data that cannot be read are reported.
Export and repair read in this way, too: an undamaged file is read as well as by SQLite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw

from aiosd.errors import UsageError
from aiosd.store import roots
from aiosd.store.database import VERSION
from aiosd.store.pages import LostRows, Pages, StoredRow
from aiosd.store.tables import KEPT, KeptTable, content_path, file_hash


@dataclass(slots=True)
class Salvage:
    """Reads the file of a closed store. `lost` is complete when all `rows` have been iterated."""

    path: Path
    plan: roots.RootPages
    pages: Pages
    lost: dict[str, list[LostRows]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)  # sentences about content files

    @classmethod
    def open(cls, path: Path) -> Salvage:
        plan = roots.read(path)
        if plan.schema > VERSION:
            raise UsageError(f"{path}: was written by a newer aiosd (schema {plan.schema})")
        return cls(path, plan, Pages(path))

    def close(self) -> None:
        self.pages.close()

    def tables(self) -> list[KeptTable]:
        return [kept for kept in KEPT if kept.name in self.plan.roots]

    def rows(self, columns: Callable[[str], list[SqlColumn]]) -> Iterator[tuple[KeptTable, dict[str, Any]]]:
        """All rows of all tables. At the end, pages that no tree reaches are searched for rows of the tables that miss
        some."""
        for kept in self.tables():
            lost = self.lost.setdefault(kept.name, [])
            made = _Maker(columns(kept.name))
            for row in self.pages.rows(self.plan.roots[kept.name], lost):
                values = made(row)
                if kept.whole(values):
                    yield kept, values
                else:
                    lost.append(LostRows(0, row[0], row[0]))
        self._reach_the_rest()
        damaged = [kept for kept in self.tables() if self.lost[kept.name]]
        if damaged:
            makers = {kept.name: _Maker(columns(kept.name)) for kept in damaged}
            for row in self.pages.orphans():
                for kept in damaged:
                    if makers[kept.name].fits(row) and self._misses(kept, row[0]):
                        values = makers[kept.name](row)
                        if kept.whole(values):
                            yield kept, values
                        break

    def _misses(self, kept: KeptTable, rowid: int) -> bool:
        return any(one.first <= rowid <= one.last for one in self.lost[kept.name])

    def _reach_the_rest(self) -> None:
        """Read all other trees, so that no page of another table or of an index is taken for an orphan."""
        names = {kept.name for kept in self.tables()}
        for name, root in {**self.plan.roots, "sqlite_schema": 1}.items():
            if name not in names:
                lost = self.lost.setdefault(name, [])
                for _ in self.pages.rows(root, lost):
                    pass

    def check_contents(self, kept: KeptTable, row: dict[str, Any]) -> None:
        """Note a content file that is missing, or whose hash differs from its name."""
        name = row.get(kept.contents) if kept.contents else None
        if isinstance(name, str | bytes):
            shown = name.hex() if isinstance(name, bytes) else name
            problem = problem_of(self.path.parent, shown)
            if problem:
                self.missing.append(f"{kept.name} {row.get('id', '')}: content {shown} {problem}")


def problem_of(folder: Path, name: str) -> str:
    """What is wrong with a content file; "" if nothing is."""
    path = content_path(folder, name)
    try:
        return "" if file_hash(path) == name else "is damaged"
    except FileNotFoundError:
        return "is missing"
    except OSError as err:
        return f"cannot be read ({err.strerror})"


@dataclass(frozen=True, slots=True)
class SqlColumn:
    name: str
    default: Any
    required: bool
    is_rowid: bool
    kind: tuple[type, ...]


_KINDS: dict[str, tuple[type, ...]] = {"INTEGER": (int,), "REAL": (int, float), "TEXT": (str,), "BLOB": (bytes,)}


def columns_of(db: apsw.Connection) -> Callable[[str], list[SqlColumn]]:
    """The columns of each table, from a database with the same schema."""

    def columns(table: str) -> list[SqlColumn]:
        found = list(db.execute(f"PRAGMA table_info({table})"))
        keys = [row for row in found if row[5]]
        alias = keys[0][1] if len(keys) == 1 and keys[0][2].upper() == "INTEGER" else None
        return [
            SqlColumn(name, _literal(db, default), bool(required), name == alias, _KINDS[kind])
            for _, name, kind, required, default, _ in found
        ]

    return columns


def _literal(db: apsw.Connection, default: str | None) -> Any:
    return None if default is None else next(iter(db.execute(f"SELECT {default}")))[0]


class _Maker:
    """Makes a row of a table from the values in the file."""

    def __init__(self, columns: list[SqlColumn]) -> None:
        self._columns = columns

    def __call__(self, row: StoredRow) -> dict[str, Any]:
        rowid, values = row
        made = {}
        for place, column in enumerate(self._columns):
            value = values[place] if place < len(values) else column.default  # the column was added to the table later
            made[column.name] = rowid if column.is_rowid else value
        return made

    def fits(self, row: StoredRow) -> bool:
        if len(row[1]) != len(self._columns):
            return False
        made = self(row)
        return all(
            not column.required if made[column.name] is None else isinstance(made[column.name], column.kind)
            for column in self._columns
        )
