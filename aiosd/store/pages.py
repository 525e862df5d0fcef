"""The database file, read page by page without SQLite: for a file that SQLite cannot read completely any more.

SQLite reads a table from its root downwards and stops at the first page that is damaged. This reader goes on with the
other pages, and reports which row ids were on the lost one. A page is damaged when its checksum is wrong (see cksumvfs:
8 bytes at its end) or it is no page of a tree. A page of zeros has the right checksum, but is no page of a tree. If
such a page was the end of a large row, only that row can show it (`tables.KeptTable.whole`).

When a page in the middle of a tree is lost, the pages below it are still in the file, but nothing leads to them. They
are found as pages to which nothing else leads, and that are not free; their rows must lie within what is missing.

The format of the file is at https://sqlite.org/fileformat2.html. Overflow pages of indexes are not read, since indexes
are made anew.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PAGE = 4096
USABLE = PAGE - 8
_MOST_LOCAL = USABLE - 35  # bytes of a row that lie in its leaf
_LEAST_LOCAL = (USABLE - 12) * 32 // 255 - 23
_INDEX, _TABLE, _INDEX_LEAF, _TABLE_LEAF = 2, 5, 10, 13  # the first byte of a page
FIRST, LAST = -(1 << 63), (1 << 63) - 1  # row ids


class DamagedPage(Exception):
    def __init__(self, number: int) -> None:
        super().__init__(f"page {number}")
        self.number = number


@dataclass(frozen=True, slots=True)
class LostRows:
    """The rows of a damaged page: ids from `first` to `last`, as far as these existed."""

    page: int
    first: int = FIRST
    last: int = LAST


StoredRow = tuple[int, tuple[Any, ...]]  # row id, values as they lie in the file


class Pages:
    """Reads pages. `path`: a database without a WAL. To be closed."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 - closed by `close`
        self.number = path.stat().st_size // PAGE
        self._weights = _weights()
        self.reached: set[int] = set()  # pages that were read so far

    def close(self) -> None:
        self._file.close()

    def page(self, number: int) -> bytes:
        """The bytes of a page. Raises DamagedPage."""
        if not 1 <= number <= self.number:
            raise DamagedPage(number)
        try:
            self._file.seek((number - 1) * PAGE)
            data = self._file.read(PAGE)
        except OSError:  # the disk cannot read it
            raise DamagedPage(number) from None
        if len(data) < PAGE or not self._checks(data):
            raise DamagedPage(number)
        return data

    def damaged(self) -> list[int]:
        """All pages whose checksum is wrong, free ones included."""
        return [number for number in range(1, self.number + 1) if not self._readable(number)]

    def _readable(self, number: int) -> bool:
        try:
            self.page(number)
        except DamagedPage:
            return False
        return True

    def _checks(self, data: bytes) -> bool:
        words = np.frombuffer(data, "<u4")
        return bool(((self._weights * words[:-2]).sum(axis=1, dtype=np.uint32) == words[-2:]).all())

    # ── trees ─────────────────────────────────────────────────────────────────────────────────────────────

    def rows(self, root: int, lost: list[LostRows]) -> Iterator[StoredRow]:
        """All rows of a table that can be read, in the order of their ids; the others are added to `lost`. (Of an index
        only the latter.)"""
        for number, first, last in self._leaves(root, lost):
            yield from self._read_leaf(number, first, last, lost)

    def _leaves(self, root: int, lost: list[LostRows]) -> Iterator[tuple[int, int, int]]:
        """Pages at the bottom of a tree, with the row ids that they may have."""
        todo = [(root, FIRST, LAST)]
        while todo:
            number, first, last = todo.pop()
            if number in self.reached:  # a circle, which only damage can make
                lost.append(LostRows(number, first, last))
                continue
            self.reached.add(number)
            try:
                page = self.page(number)
                if (kind := page[_head(number)]) in (_TABLE, _INDEX):
                    todo += reversed(list(_children(page, number, first, last)))
                elif kind in (_TABLE_LEAF, _INDEX_LEAF):
                    yield number, first, last
                else:
                    raise DamagedPage(number)
            except (DamagedPage, IndexError, struct.error):
                lost.append(LostRows(number, first, last))

    def _read_leaf(self, number: int, first: int, last: int, lost: list[LostRows]) -> Iterator[StoredRow]:
        page = self.page(number)
        start = _head(number)
        if page[start] != _TABLE_LEAF:
            return
        for offset in _cells(page, start, 8):
            rowid = LAST
            try:
                size, at = _varint(page, offset)
                rowid, at = _varint(page, at)
                yield rowid, _record(self._payload(page, at, size))
            except DamagedPage as err:
                lost.append(LostRows(err.number, rowid, rowid))
            except (IndexError, struct.error, UnicodeDecodeError, KeyError):
                lost.append(LostRows(number, *((rowid, rowid) if rowid != LAST else (first, last))))

    def _payload(self, page: bytes, at: int, size: int) -> bytes:
        """The bytes of a row, the overflow pages included. Raises DamagedPage."""
        if size <= _MOST_LOCAL:
            return page[at : at + size]
        local = _LEAST_LOCAL + (size - _LEAST_LOCAL) % (USABLE - 4)
        local = local if local <= _MOST_LOCAL else _LEAST_LOCAL
        parts, missing = [page[at : at + local]], size - local
        (following,) = struct.unpack_from(">I", page, at + local)
        while missing > 0:
            if following in self.reached:
                raise DamagedPage(following)
            more = self.page(following)
            self.reached.add(following)
            parts.append(more[4 : 4 + min(missing, USABLE - 4)])
            missing -= USABLE - 4
            (following,) = struct.unpack_from(">I", more)
        return b"".join(parts)

    # ── leaves that cannot be reached from a root
    # ─────────────────────────────────────────────────────────────────────────────

    def orphans(self) -> Iterator[StoredRow]:
        """The rows of leaves that were not reached and are not free. To be called when all trees have been read."""
        try:
            free = self._free()
        except (DamagedPage, struct.error):
            return  # the free pages are not known, and removed rows must not come back
        for number in range(2, self.number + 1):
            if number in free or number in self.reached or not self._readable(number):
                continue
            if self.page(number)[0] == _TABLE_LEAF:
                yield from self._read_leaf(number, FIRST, LAST, [])

    def _free(self) -> set[int]:
        trunk, found = struct.unpack_from(">I", self.page(1), 32)[0], set[int]()
        while trunk:
            if trunk in found:
                raise DamagedPage(trunk)
            page = self.page(trunk)
            following, number = struct.unpack_from(">II", page)
            found.update((trunk, *struct.unpack_from(f">{number}I", page, 8)))
            trunk = following
        return found


def _weights() -> np.ndarray[Any, Any]:
    """The factors of the checksum. It adds each pair (x, y) of words by `a += x + b; b += y + a`, modulo 2³². So it is
    a sum of all words, each times a factor that follows from its place."""
    x, y = (1, 1), (0, 1)  # the factors of the last pair in (a, b)
    columns: list[tuple[int, int]] = []
    for _ in range(USABLE // 8):
        columns += [y, x]
        x, y = (((a + b) & 0xFFFFFFFF, (a + 2 * b) & 0xFFFFFFFF) for a, b in (x, y))
    return np.array(columns[::-1], np.uint32).T.copy()


def _head(number: int) -> int:
    return 100 if number == 1 else 0


def _cells(page: bytes, start: int, head: int) -> tuple[int, ...]:
    (number,) = struct.unpack_from(">H", page, start + 3)
    return struct.unpack_from(f">{number}H", page, start + head)


def _children(page: bytes, number: int, first: int, last: int) -> Iterator[tuple[int, int, int]]:
    """The pages below a page, with the row ids that each may have (of an index: all)."""
    start = _head(number)
    for offset in _cells(page, start, 12):
        (child,) = struct.unpack_from(">I", page, offset)
        if page[start] == _INDEX:
            yield child, first, last
            continue
        key, _ = _varint(page, offset + 4)
        yield child, first, key
        first = key + 1
    yield struct.unpack_from(">I", page, start + 8)[0], first, last


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for length in range(8):
        byte = data[at + length]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at + length + 1
    value = value << 8 | data[at + 8]
    return value - (1 << 64 if value >> 63 else 0), at + 9


_INT_SIZES = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}


def _record(payload: bytes) -> tuple[Any, ...]:
    """The values of a row."""
    end, at = _varint(payload, 0)
    where, values = end, []
    while at < end:
        kind, at = _varint(payload, at)
        size = _INT_SIZES.get(kind, 8 if kind == 7 else (kind - 12) // 2 if kind >= 12 else 0)
        part = payload[where : where + size]
        if len(part) < size:
            raise IndexError("a row that ends early")
        values.append(_value(kind, part))
        where += size
    return tuple(values)


def _value(kind: int, part: bytes) -> Any:
    if kind in _INT_SIZES:
        return int.from_bytes(part, "big", signed=True)
    if kind == 7:
        return struct.unpack(">d", part)[0]
    if kind >= 12:
        return part.decode() if kind % 2 else part
    return {0: None, 8: 0, 9: 1}[kind]
