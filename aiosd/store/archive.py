"""The store as one file: export, backup, and import of both.

An export is a tar for people and other programs: a file of JSON lines for each table (bytes as {"base64": …}), the
large contents under their hashes, and `aiosd.json`, which describes the rest. A backup is a tar of the database file
itself and the same contents. Either is read back into a store, whose database is kept beside the new one.

Both are made from files that do not change any more: the files of a store that no process has open, or a snapshot,
which the running store makes of itself (`snapshots.py`).
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import shutil
import tarfile
import tempfile
import time
from pathlib import Path
from typing import IO, Any

import apsw

from aiosd import __version__
from aiosd.errors import UsageError, WorldError
from aiosd.store import roots
from aiosd.store.database import FILE, VERSION
from aiosd.store.pages import Pages
from aiosd.store.rebuild import finish, new_database, put, sequences, take_place
from aiosd.store.salvage import Salvage, columns_of, problem_of
from aiosd.store.tables import CONTENTS, KEPT, content_path

FORMAT = 1
ABOUT = "aiosd.json"


# ── out ───────────────────────────────────────────────────────────────────────────────────────────────────


def backup(folder: Path, target: IO[bytes]) -> None:
    """Write a tar of the database file in this folder and its contents."""
    with tarfile.open(fileobj=target, mode="w|") as tar:
        _add_json(tar, ABOUT, {"format": FORMAT, "kind": "backup", "release": __version__})
        tar.add(folder / FILE, FILE)
        contents = folder / CONTENTS
        if contents.is_dir():
            for path in sorted(contents.iterdir()):
                tar.add(path, f"{CONTENTS}/{path.name}")


def export(folder: Path, target: IO[bytes]) -> tuple[dict[str, int], list[str]]:
    """Write a tar of all rows and contents. Returns the number of rows of each table, and sentences about what could
    not be read."""
    salvage = Salvage.open(folder / FILE)
    model = new_database(None, salvage.plan.schema)
    columns = columns_of(model)
    counts = {kept.name: 0 for kept in salvage.tables()}
    names: dict[str, None] = {}
    try:
        with tarfile.open(fileobj=target, mode="w|") as tar, contextlib.ExitStack() as opened:
            files = {name: opened.enter_context(tempfile.TemporaryFile()) for name in counts}
            for kept, row in salvage.rows(columns):
                salvage.check_contents(kept, row)
                counts[kept.name] += 1
                files[kept.name].write(json.dumps(row, default=_plain, ensure_ascii=False).encode() + b"\n")
                if kept.contents and (name := row[kept.contents]) is not None:
                    names[name.hex() if isinstance(name, bytes) else name] = None
            counts = {name: number for name, number in counts.items() if number or salvage.lost[name]}
            about = {"format": FORMAT, "kind": "export", "release": __version__, "schema": salvage.plan.schema}
            given_out = sequences(folder / FILE, salvage.plan)
            _add_json(tar, ABOUT, about | {"rows": counts, "sequences": given_out})
            for name in counts:
                _add_stream(tar, f"{name}.jsonl", files[name])
            for name in names:
                if content_path(folder, name).exists():
                    tar.add(content_path(folder, name), f"{CONTENTS}/{name}")
    finally:
        model.close()
        salvage.close()
    lost = [f"{name}: page {one.page} is damaged" for name in files for one in salvage.lost[name]]
    return counts, lost + salvage.missing


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    raise TypeError(type(value).__name__)


def _add_json(tar: tarfile.TarFile, name: str, what: dict[str, Any]) -> None:
    _add_stream(tar, name, io.BytesIO(json.dumps(what, indent=1).encode() + b"\n"))


def _add_stream(tar: tarfile.TarFile, name: str, file: IO[bytes]) -> None:
    info = tarfile.TarInfo(name)
    info.size = file.seek(0, os.SEEK_END)
    info.mtime, info.mode = int(time.time()), 0o600
    file.seek(0)
    tar.addfile(info, file)


def counted(folder: Path) -> dict[str, int]:
    """The number of rows of each table that is not empty."""
    path = folder / FILE
    if not path.exists():
        return {}
    return {name: number for name, number in _count(path, roots.read(path)).items() if number}


def _count(path: Path, plan: roots.RootPages) -> dict[str, int]:
    pages, names = Pages(path), [kept.name for kept in KEPT if kept.name in plan.roots]
    try:
        return {name: sum(1 for _ in pages.rows(plan.roots[name], [])) for name in names}
    finally:
        pages.close()


# ── in ────────────────────────────────────────────────────────────────────────────────────────────────────


def load(source: IO[bytes], folder: Path) -> tuple[dict[str, int], Path | None]:
    """Read an export or a backup into a store that no process has open. Returns the number of rows of each table, and
    the path to which the old database was moved. Raises UsageError for a file that is neither; then the store is
    unchanged."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    new = folder / f"{FILE}.new"
    for stale in (new, new.with_name(new.name + "-wal")):
        stale.unlink(missing_ok=True)
    try:
        with tarfile.open(fileobj=source, mode="r:*") as tar:
            about = _about(tar)
            counts = _load_backup(tar, new) if about["kind"] == "backup" else _load_rows(tar, about, new)
            _load_contents(tar, folder)
    except (tarfile.TarError, EOFError, KeyError, ValueError, TypeError, apsw.Error) as err:
        new.unlink(missing_ok=True)
        why = str(err).partition(":\n")[0]  # without the list of compressions that were tried
        raise UsageError(f"is no export and no backup of aiosd, or a damaged one ({why})") from err
    return counts, take_place(new, folder / FILE, "before-import")


def _about(tar: tarfile.TarFile) -> dict[str, Any]:
    file = tar.extractfile(ABOUT)
    assert file is not None
    about = dict(json.load(file))
    if about["format"] > FORMAT or about.get("schema", 0) > VERSION:
        raise UsageError(f"it comes from a newer aiosd ({about['release']})")
    return about


def _load_backup(tar: tarfile.TarFile, new: Path) -> dict[str, int]:
    file = tar.extractfile(FILE)
    assert file is not None
    with open(new, "wb") as target:
        shutil.copyfileobj(file, target)
        os.fsync(target.fileno())
    plan = roots.read(new)
    if not plan.first_page or _has_damage(new):
        raise ValueError("its database is damaged")
    if plan.schema > VERSION:
        raise UsageError(f"it comes from a newer aiosd (schema {plan.schema})")
    return {name: number for name, number in _count(new, plan).items() if number}


def _has_damage(path: Path) -> bool:
    pages = Pages(path)
    try:
        return bool(pages.damaged())
    finally:
        pages.close()


def _load_rows(tar: tarfile.TarFile, about: dict[str, Any], new: Path) -> dict[str, int]:
    db = new_database(new, about["schema"])
    columns = columns_of(db)
    counts: dict[str, int] = {}
    try:
        with db:
            for kept in KEPT:
                if kept.name not in about["rows"]:
                    continue
                known = {column.name for column in columns(kept.name)}
                file = tar.extractfile(f"{kept.name}.jsonl")
                assert file is not None
                counts[kept.name] = 0
                for line in file:
                    row = json.loads(line)
                    if not known.issuperset(row):
                        raise ValueError(f"{kept.name} has unknown columns")
                    counts[kept.name] += put(db, kept.name, {name: _value(value) for name, value in row.items()})
        finish(db, about["sequences"])
    finally:
        db.close()
    return counts


def _value(value: Any) -> Any:
    return base64.b64decode(value["base64"], validate=True) if isinstance(value, dict) else value


def _load_contents(tar: tarfile.TarFile, folder: Path) -> None:
    """Write the contents. A content that exists already is not written again: it has the same hash."""
    for member in tar.getmembers():
        place, _, name = member.name.partition("/")
        if place != CONTENTS or not member.isfile():
            continue
        if not name.isalnum():
            raise ValueError(f"a content named {name!r}")
        if not problem_of(folder, name):
            continue
        file = tar.extractfile(member)
        assert file is not None
        path = content_path(folder, name)
        path.parent.mkdir(exist_ok=True, mode=0o700)
        part = path.with_name(name + ".part")
        with open(part, "wb") as target:
            shutil.copyfileobj(file, target)
            os.fsync(target.fileno())
        os.replace(part, path)
        if problem := problem_of(folder, name):
            raise WorldError(f"{path}: {problem}")
