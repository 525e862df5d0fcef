"""Search for files: by words, and if there is an embedder by meaning, too, in one ranking as for notes (`search`).

The caller's rights and the requested folder are applied before any limit. A query is split into words and each is
quoted; the owner is a word of its own in the index, so no query leads to files that the caller may not see.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

from aiosd.ipc import link
from aiosd.ipc.service import Pause
from aiosd.store import plainly
from aiosd.store.database import Database
from aiosd.store.files import FileRow, Files
from aiosd.store.filewords import FILES, as_text
from aiosd.store.meaning import Meaning
from aiosd.store.search import AMONG, LEAST, MOST_WORDS, with_meaning
from aiosd.store.spaces import Namespace, below, name_for
from libaios import wire

if TYPE_CHECKING:
    from aiosd.store.meaning import Floats

EXCERPT = 160  # characters
EXCERPTS = 10  # of one search
SPACES_AT_ONCE = 100  # spaces of which a part may be seen, in one statement: SQLite has limits
WALKED_AT_ONCE = 16  # files that are read between two pauses
_ALL_OF = "SELECT f.id FROM files f WHERE f.owner = ? AND f.removed IS NULL"
_WORD = re.compile(r"[^\W_]+")


#: Returns the spaces in which a caller searches, with the files that it may see there now.
Seen = Callable[[], Sequence[Namespace]]


class FileSearch:
    def __init__(self, database: Database, files: Files, meaning: Meaning) -> None:
        self._db, self._files, self._meaning = database, files, meaning

    def search(
        self, caller: link.Caller, seen: Seen, query: str, folder: str, k: int
    ) -> list[wire.FoundFile] | Generator[Pause, None, list[wire.FoundFile]]:
        """Files of the spaces that `seen` returns, the best first: either the list, or a generator that yields pauses.
        Meanwhile shares may end, so `seen` is called again after each pause."""
        spaces = _by_owner(seen)
        if self._meaning.embedder is not None and spaces:
            return self._by_meaning(caller, seen, query, folder, k)
        try:
            return self._ranked(caller, spaces, query, folder, k, None)
        except OSError as err:
            if not plainly.is_damage(err):
                raise
        return self._walked(caller, seen, query, folder, k)

    def _by_meaning(
        self, caller: link.Caller, seen: Seen, query: str, folder: str, k: int
    ) -> Generator[Pause, None, list[wire.FoundFile]]:
        vector = yield from self._meaning.vector_of(query)
        if vector is not None:
            yield from self._meaning.finish(_by_owner(seen))
            if (yield from self._meaning.load(FILES, _by_owner(seen))):
                vector = None  # later, when they are read
        try:
            return self._ranked(caller, _by_owner(seen), query, folder, k, vector)
        except OSError as err:
            if not plainly.is_damage(err):
                raise
        return (yield from self._walked(caller, seen, query, folder, k))

    def _walked(
        self, caller: link.Caller, seen: Seen, query: str, folder: str, k: int
    ) -> Generator[Pause, None, list[wire.FoundFile]]:
        """Search by words in the files themselves, because a page of an index is damaged."""
        words, scores, lost = plainly.words_of(query), dict[int, float](), list[int]()

        def read(files: Sequence[int]) -> list[FileRow]:
            return [row for file in files if (row := self._files.by_id(file)) is not None]

        for space in _by_owner(seen).values():
            select, values = _files_of(space, folder) or (_ALL_OF, [space.owner])
            files = [file for (file,) in self._db.rows(select, *values)]
            for begin in range(0, len(files), WALKED_AT_ONCE):
                rows, gone = plainly.piecemeal(read, files[begin : begin + WALKED_AT_ONCE])
                lost += gone
                for row in rows:
                    text = f"{row.path} {as_text(self._files.words.read(row.id))}"
                    if score := len(words & plainly.words_of(text)):
                        scores[row.id] = float(score)
                yield Pause(0.0)
        plainly.report(self._db, "files with the numbers", lost)
        return self._found(caller, _by_owner(seen), query, k, scores)

    def _ranked(
        self, caller: link.Caller, spaces: dict[int, Namespace], query: str, folder: str, k: int, vector: Floats | None
    ) -> list[wire.FoundFile]:
        scores = self._by_words(spaces, query, folder, max(k, LEAST))
        if vector is not None:
            among = {owner: self._visible(space, folder) for owner, space in spaces.items()}
            scores = with_meaning(self._meaning, FILES, among, k, vector, scores)
        return self._found(caller, spaces, query, k, scores)

    def _found(
        self, caller: link.Caller, spaces: dict[int, Namespace], query: str, k: int, scores: dict[int, float]
    ) -> list[wire.FoundFile]:
        """The best of these that the caller may see now."""
        found: list[wire.FoundFile] = []
        for file in sorted(scores, key=lambda file: (scores[file], file), reverse=True)[:k]:
            row = None
            try:
                row = self._files.by_id(file)
            except OSError as err:  # only what is on a damaged page is lost
                if not plainly.is_damage(err):
                    raise
                plainly.report(self._db, "files with the numbers", [file])
            space = None if row is None else spaces.get(row.owner)
            if row is not None and space is not None and space.may_see(row.path):
                excerpt = self._excerpt(file, query) if len(found) < EXCERPTS else ""
                of = name_for(caller, space.name)
                found.append(wire.FoundFile(row.shown(), of, excerpt, scores[file]))
        return found

    def _by_words(self, spaces: dict[int, Namespace], query: str, folder: str, limit: int) -> dict[int, float]:
        """The files that have at least one of the words, and how well they fit (bm25)."""
        words = list(dict.fromkeys(_WORD.findall(query)))[:MOST_WORDS]
        if not words or not spaces:
            return {}
        wanted = " OR ".join(f'"{word}"' for word in words)
        allowed = {owner: _files_of(space, folder) for owner, space in spaces.items()}
        found = self._matching([owner for owner, part in allowed.items() if part is None], wanted, "", [], limit)
        limited = [(owner, part) for owner, part in allowed.items() if part is not None]
        for begin in range(0, len(limited), SPACES_AT_ONCE):
            some = limited[begin : begin + SPACES_AT_ONCE]
            among = AMONG.format(" UNION ALL ".join(select for _, (select, _) in some))
            values = [value for _, (_, parts) in some for value in parts]
            found |= self._matching([owner for owner, _ in some], wanted, f"AND {among}", values, limit)
        return found

    def _matching(
        self, owners: Sequence[int], wanted: str, among: str, values: Sequence[Any], limit: int
    ) -> dict[int, float]:
        if not owners:
            return {}
        either = " OR ".join(f'"own{owner}"' for owner in owners)
        sql = (
            "SELECT w.rowid, -bm25(file_words, 0.0, 2.0, 1.0) AS score FROM file_words w "
            f"WHERE file_words MATCH ? {among} ORDER BY score DESC, w.rowid DESC LIMIT ?"
        )
        return dict(self._db.rows(sql, f"{{owner}} : ({either}) AND {{path text}} : ({wanted})", *values, limit))

    def _visible(self, space: Namespace, folder: str) -> list[int] | None:
        """The files of a space that may be found; None: all."""
        part = _files_of(space, folder)
        return None if part is None else [file for (file,) in self._db.rows(part[0], *part[1])]

    def _excerpt(self, file: int, query: str) -> str:
        """A part of the text around the first word of the query in it; if there is none, its beginning."""
        text = as_text(self._files.words.read(file))
        words = [re.escape(word) for word in _WORD.findall(query)[:MOST_WORDS]]
        found = re.search(rf"(?<!\w)(?:{'|'.join(words)})(?!\w)", text, re.IGNORECASE) if words else None
        begin = 0 if found is None else max(0, found.start() - EXCERPT // 3)
        return " ".join(text[begin : begin + EXCERPT].split())


def _by_owner(seen: Seen) -> dict[int, Namespace]:
    return {space.owner: space for space in seen() if space.owner is not None}


def _files_of(space: Namespace, folder: str) -> tuple[str, list[Any]] | None:
    """A SELECT of the files of a space that may be found, from an index alone; None: all."""
    if space.grants is None and not folder:
        return None
    visible, values = space.where()
    sql = (
        f"SELECT f.id FROM files f WHERE f.owner = ? AND f.removed IS NULL AND f.path >= ? AND f.path < ? AND {visible}"
    )
    return sql, [space.owner, *below(folder), *values]
