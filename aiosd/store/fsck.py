"""Finds the damage in a store that no process has open, and reports it. Changes nothing."""

from __future__ import annotations

from pathlib import Path

import apsw

from aiosd.store import roots
from aiosd.store.pages import LostRows
from aiosd.store.rebuild import new_database
from aiosd.store.salvage import Salvage, columns_of


def check(path: Path) -> list[str]:
    """One sentence for each damage; an empty list: there is none."""
    salvage = Salvage.open(path)
    try:
        found = [] if salvage.plan.first_page else ["page 1 is damaged: without a repair aiosd cannot open the store"]
        db = new_database(None, salvage.plan.schema)
        for kept, row in salvage.rows(columns_of(db)):
            salvage.check_contents(kept, row)
        db.close()
        named = {one.page for lost in salvage.lost.values() for one in lost} | {1}
        kept_names = {kept.name for kept in salvage.tables()}
        for name, lost in salvage.lost.items():
            found += [_sentence(name, one, name in kept_names) for one in lost if one.page != 1]
        others = [number for number in salvage.pages.damaged() if number not in named]
        found += [f"page {number}: damaged; nothing that is kept was on it" for number in others]
        return found + salvage.missing + ([] if found else _inconsistencies(path))
    finally:
        salvage.close()


def _sentence(name: str, lost: LostRows, kept: bool) -> str:
    if not kept:
        return f"page {lost.page}: of {name}, which a repair makes anew"
    if not lost.page:
        return f"{name} {lost.first}: its end has become zeros"
    if lost.first == lost.last:
        return f"page {lost.page}: {name} {lost.first}"
    first, last = max(lost.first, 1), lost.last
    to = f" to {last}" if last < 1 << 62 else " and what follows"
    return f"page {lost.page}: {name} {first}{to}, as far as there are any"


def _inconsistencies(path: Path) -> list[str]:
    """Damage that the pages alone do not show."""
    try:
        db = roots.open_closed(path)
        try:
            return [line for (line,) in db.execute("PRAGMA integrity_check(20)") if line != "ok"]
        finally:
            db.close()
    except apsw.Error as err:
        return [f"it cannot be checked: {err}"]
