"""The state of a sequence as llama.cpp writes it: cut into pieces by tokens, and joined again.

`llama_state_seq_get_data` gives one block for a whole sequence. Its layout (read in `llama-kv-cache.cpp`,
`state_write`), with N cells and S streams, all little-endian:

    magic u32 · sequence i32
    for each cache (one; two, where some layers look through a sliding window):
        streams u32
        for each stream: cells u32 (0 for all but one), and for that one
            N × (position i32, 1 u32, sequence i32)
            v_transposed u32 · layers u32
            for each layer  K: type i32, row bytes u64, N rows
            for each layer  V: the same, or, transposed: type i32, element bytes u32, elements u32, and for each
                            element N values

A sequence's stream has its number; where all sequences share one stream, it is 0.

So the bytes of tokens [a, b) can be cut out, kept alone, and joined with others to a block that is bit for bit one that
llama.cpp would write. A piece is one array: the parts (K of layer 0, …, V of the last) one after the other, each as
in the block. The stream header is not kept: a piece fits a context with any number of slots.

The cache of layers with a window is made as large as the other, so that it keeps all cells; but a block has only the
cells that a next token would look at. Earlier cells are read in separate blocks and put in (`completed`), so that the
state may be cut anywhere.

Pure numpy. Caches of another kind (recurrent) have another layout: `StateLayout.of` returns None.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

_HEAD = struct.Struct("<Ii")
_CELL = np.dtype([("position", "<i4"), ("owners", "<u4"), ("sequence", "<i4")])


@dataclass(frozen=True, slots=True)
class LayerPart:
    """K or V of one layer: a header, then a row per token (`rows` 0), or `rows` rows with an item per token."""

    header: bytes
    item: int  # bytes per token in a row
    rows: int  # 0: not transposed

    @property
    def per_token(self) -> int:
        return self.item * (self.rows or 1)


@dataclass(frozen=True, slots=True)
class StatePiece:
    """The state of `length` tokens."""

    data: Bytes
    length: int

    @property
    def size(self) -> int:
        return self.data.nbytes


@dataclass(frozen=True, slots=True)
class Section:
    """One cache in a block."""

    transposed: int
    layers: int
    parts: list[LayerPart]  # K of each layer, then V of each

    @property
    def middle(self) -> bytes:
        return struct.pack("<II", self.transposed, self.layers)

    def size(self, streams: int, length: int) -> int:
        """Bytes of `length` tokens."""
        fixed = 4 + 4 * streams + 8 + sum(len(part.header) for part in self.parts)
        return fixed + length * (_CELL.itemsize + sum(part.per_token for part in self.parts))


class StateLayout:
    """Where each part lies in a block, for one context."""

    def __init__(self, magic: int, streams: int, sections: list[Section]) -> None:
        self._magic, self._streams, self._sections = magic, streams, sections
        self._parts = [part for section in sections for part in section.parts]
        self.bytes_per_token = sum(part.per_token for part in self._parts)

    @property
    def in_one(self) -> bool:
        """Do all layers lie in one cache?"""
        return len(self._sections) == 1

    @property
    def sizes(self) -> list[int]:
        """Bytes per token of each part: K of each layer, then V of each; the same for a second cache."""
        return [part.per_token for part in self._parts]

    @property
    def by_rows(self) -> bool:
        """Does every part have a row per token?"""
        return not any(part.rows for part in self._parts)

    @property
    def description(self) -> list[list[int | str]]:
        """Type and size of each part: where these are equal, one context can use the `plain` pieces of another. Whether
        values are transposed, as they are without flash attention, does not matter."""
        return [[part.header[:4].hex(), part.per_token] for part in self._parts]

    @classmethod
    def of(cls, block: Bytes) -> StateLayout | None:
        """The layout, learned from a block of at least one token. None: this is no plain KV cache."""
        try:
            return cls._read(bytes(block))
        except (struct.error, ValueError):
            return None

    @classmethod
    def _read(cls, block: bytes) -> StateLayout:
        magic, _ = _HEAD.unpack_from(block, 0)
        at = _HEAD.size
        sections: list[Section] = []
        found: set[tuple[int, int]] = set()
        while at < len(block):
            read = _read_section(block, at)
            sections.append(read.section)
            found.add((read.streams, read.cells))
            at = read.end
        if len(found) != 1 or not any(section.layers for section in sections):
            raise ValueError("not every cache holds all tokens, or none has layers")
        [(streams, cells)] = found
        layout = cls(magic, streams, sections)
        if at != len(block) or layout.size(cells) != len(block):
            raise ValueError("something else lies in it")
        return layout

    def size(self, length: int) -> int:
        """Bytes of a block of `length` tokens."""
        return _HEAD.size + sum(section.size(self._streams, length) for section in self._sections)

    def cut(self, block: Bytes, sequence: int, length: int, start: int, stop: int, first: int = 0) -> StatePiece:
        """The piece of the tokens [start, stop), from a block that was read from `sequence` and holds the tokens
        [first, length). Raises LookupError when the block lacks some of them."""
        if start < first:
            raise LookupError(f"tokens from {start} on, but the block begins with {first}")
        length, start, stop = length - first, start - first, stop - first
        data = np.empty((stop - start) * self.bytes_per_token, np.uint8)
        at, to = _HEAD.size, 0
        for section in self._sections:
            where = length, start, stop, first
            to += self._cut_section(section, block[at:], self._stream(sequence), where, data[to:])
            at += section.size(self._streams, length)
        return StatePiece(data, stop - start)

    def _stream(self, sequence: int) -> int:
        return sequence if self._streams > 1 else 0

    @staticmethod
    def _cut_section(section: Section, block: Bytes, stream: int, where: tuple[int, int, int, int], data: Bytes) -> int:
        """Write one section into `data`; returns how many bytes of it are filled."""
        length, start, stop, first = where
        at = 4 + 4 * (stream + 1)
        if int(block[at - 4 : at].view(np.uint32)[0]) != length:
            raise LookupError(f"a cache does not hold all of {length} tokens")
        cells = block[at : at + length * _CELL.itemsize].view(_CELL)
        pick = _in_order(cells["position"] - first, start, stop)
        at += cells.nbytes + 8
        count, to = stop - start, 0
        for part in section.parts:
            at += len(part.header)
            size, kept = length * part.per_token, count * part.per_token
            source, target = block[at : at + size], data[to : to + kept]
            if part.rows:
                _items(target, part, count)[:] = _items(source, part, length)[:, pick]
            else:
                target.reshape(count, part.item)[:] = source.reshape(length, part.item)[pick]
            at += size
            to += kept
        return to

    def part_of(self, piece: StatePiece, start: int, stop: int) -> StatePiece:
        """The tokens [start, stop) of a piece, as a piece of their own."""
        count = stop - start
        data = np.empty(count * self.bytes_per_token, np.uint8)
        at = to = 0
        for part in self._parts:
            size, kept = piece.length * part.per_token, count * part.per_token
            source, target = piece.data[at : at + size], data[to : to + kept]
            if part.rows:
                _items(target, part, count)[:] = _items(source, part, piece.length)[:, start:stop]
            else:
                target[:] = source[start * part.item : stop * part.item]
            at += size
            to += kept
        return StatePiece(data, count)

    def plain(self, piece: StatePiece) -> StatePiece:
        """The same state with a row per token in every part, even if this context keeps values transposed."""
        return self._turned(piece, plain=True)

    def own(self, piece: StatePiece) -> StatePiece:
        """A plain piece in the layout of this context: the inverse of `plain`."""
        return self._turned(piece, plain=False)

    def _turned(self, piece: StatePiece, plain: bool) -> StatePiece:
        if self.by_rows:
            return piece
        data = np.empty_like(piece.data)
        at, length = 0, piece.length
        for part in self._parts:
            here = slice(at, at + length * part.per_token)
            source, target = piece.data[here], data[here]
            if not part.rows:
                target[:] = source
            elif plain:
                _items(target, part, part.rows, length)[:] = _items(source, part, length).T
            else:
                _items(target, part, length)[:] = _items(source, part, part.rows, length).T
            at = here.stop
        return StatePiece(data, length)

    def merge(self, pieces: Sequence[StatePiece], length: int) -> StatePiece:
        """One piece of the first `length` tokens of several."""
        data = np.empty(length * self.bytes_per_token, np.uint8)
        to = offset = 0
        for part in self._parts:
            size = length * part.per_token
            self._gather(part, offset, _takes(pieces, length), data[to : to + size], length)
            to += size
            offset += part.per_token
        return StatePiece(data, length)

    def join(self, pieces: Sequence[StatePiece], sequence: int, length: int, out: Bytes, start: int = 0) -> Bytes:
        """A block of the tokens [start, length) of the pieces, for `sequence`, written into `out` (at least
        `size(length - start)` bytes); the part of `out` that it fills."""
        takes = _takes(pieces, length, start)
        length -= start
        block = out[: self.size(length)]
        block[: _HEAD.size] = np.frombuffer(_HEAD.pack(self._magic, sequence), np.uint8)
        at = _HEAD.size
        offset = 0  # of the part in a piece, in bytes per token
        for section in self._sections:
            end = at + section.size(self._streams, length)
            at = self._write_head(section, block, at, (sequence, length, start))
            for part in section.parts:
                block[at : at + len(part.header)] = np.frombuffer(part.header, np.uint8)
                at += len(part.header)
                target = block[at : at + length * part.per_token]
                self._gather(part, offset, takes, target, length)
                at += target.nbytes
                offset += part.per_token
            block[at:end] = 0  # streams after this one: no cells
            at = end
        return block

    @staticmethod
    def _gather(part: LayerPart, offset: int, takes: list[_Take], target: Bytes, length: int) -> None:
        """One part of `length` tokens from several pieces; `offset`: where it lies in them, in bytes per token."""
        for piece, skip, position, count in takes:
            begin = piece.length * offset
            source = piece.data[begin : begin + piece.length * part.per_token]
            if part.rows:
                into = _items(target, part, length)[:, position : position + count]
                into[:] = _items(source, part, piece.length)[:, skip : skip + count]
            else:
                taken = source[skip * part.item : (skip + count) * part.item]
                target[position * part.item : (position + count) * part.item] = taken

    def _write_head(self, section: Section, block: Bytes, at: int, where: tuple[int, int, int]) -> int:
        """Write what precedes the parts; returns where the parts begin."""
        sequence, length, start = where
        counts = [*[0] * self._stream(sequence), length]
        head = struct.pack(f"<{len(counts) + 1}I", self._streams, *counts)
        block[at : at + len(head)] = np.frombuffer(head, np.uint8)
        at += len(head)
        cells = block[at : at + length * _CELL.itemsize].view(_CELL)
        cells["position"] = np.arange(start, start + length)
        cells["owners"] = 1
        cells["sequence"] = sequence
        at += cells.nbytes
        block[at : at + 8] = np.frombuffer(section.middle, np.uint8)
        return at + 8


@dataclass(frozen=True, slots=True)
class _Read:
    """A cache in a block: where it begins and ends, which stream has cells, and how many."""

    section: Section
    streams: int
    stream: int
    cells: int
    begin: int
    end: int

    @property
    def table(self) -> slice:
        at = self.begin + 4 + 4 * (self.stream + 1)
        return slice(at, at + self.cells * _CELL.itemsize)

    def parts(self, block: Bytes) -> Iterator[Bytes]:
        at = self.table.stop + 8
        for part in self.section.parts:
            at += len(part.header)
            yield block[at : at + self.cells * part.per_token]
            at += self.cells * part.per_token


def _read_section(block: memoryview | bytes, at: int) -> _Read:
    """Read the cache that begins at `at` in a block."""
    begin = at
    (streams,) = struct.unpack_from("<I", block, at)
    at += 4
    cells = seen = 0
    while seen < streams and not cells:
        (cells,) = struct.unpack_from("<I", block, at)
        at += 4
        seen += 1
    if not cells:
        raise ValueError("no cells")
    table = np.frombuffer(block, _CELL, cells, at)
    if (table["owners"] != 1).any():
        raise ValueError("cells carry more than their position")
    at += table.nbytes
    transposed, layers = struct.unpack_from("<II", block, at)
    if transposed > 1 or layers > 4096:
        raise ValueError("no plain KV cache")
    at += 8
    parts: list[LayerPart] = []
    for i in range(2 * layers):
        if transposed and i >= layers:
            item, rows = struct.unpack_from("<II", block, at + 4)
        else:
            item, rows = struct.unpack_from("<Q", block, at + 4)[0], 0
        parts.append(LayerPart(bytes(block[at : at + 12]), item, rows))
        at += 12 + cells * parts[-1].per_token
    return _Read(Section(transposed, layers, parts), streams, seen - 1, cells, begin, at + 4 * (streams - seen))


def _last_section(block: Bytes) -> _Read:
    at = _HEAD.size
    while (read := _read_section(block.data, at)).end < len(block):
        at = read.end
    return read


def positions(block: Bytes) -> tuple[int, int] | None:
    """The first token in the first cache of a block, and the first in the last. None: these are no plain KV caches."""
    try:
        reads = _read_section(block.data, _HEAD.size), _last_section(block)
    except (struct.error, ValueError):
        return None
    first, last = (int(block[read.table].view(_CELL)["position"].min()) for read in reads)
    return first, last


def completed(block: Bytes, earlier: Sequence[Bytes]) -> Bytes:
    """A block whose last cache lacks early tokens, with these put in. `earlier`: blocks that end with the same cache;
    the last of them has the oldest tokens."""
    blocks = [*reversed(earlier), block]
    reads = [_last_section(one) for one in blocks]
    last = reads[-1]
    counts = np.zeros(1 + last.streams, np.uint32)
    counts[0], counts[1 + last.stream] = last.streams, sum(read.cells for read in reads)
    head, tail = np.split(counts, [2 + last.stream])
    out = [block[: last.begin], head.view(np.uint8)]
    out += [one[read.table] for read, one in zip(reads, blocks, strict=True)]
    out.append(np.frombuffer(last.section.middle, np.uint8))
    pieces = [read.parts(one) for read, one in zip(reads, blocks, strict=True)]
    for part in last.section.parts:
        rows = [(next(piece), read.cells) for piece, read in zip(pieces, reads, strict=True)]
        out.append(np.frombuffer(part.header, np.uint8))
        if part.rows:
            out.append(
                np.concatenate([_items(data, part, cells) for data, cells in rows], axis=1).reshape(-1).view(np.uint8)
            )
        else:
            out += [data for data, _ in rows]
    return np.concatenate([*out, tail.view(np.uint8)])


def _in_order(positions: npt.NDArray[np.int32], start: int, stop: int) -> slice | npt.NDArray[np.int64]:
    """Which cells hold the tokens [start, stop). Raises LookupError if one is missing."""
    expected = np.arange(len(positions), dtype=np.int32)
    if (positions == expected).all():
        return slice(start, stop)
    order = np.argsort(positions)
    if (positions[order] != expected).any():
        raise LookupError("some tokens have no cell any more")
    return order[start:stop]


#: A piece, how many of its tokens to skip, where the next ones go, and how many of them.
_Take = tuple[StatePiece, int, int, int]


def _takes(pieces: Sequence[StatePiece], length: int, start: int = 0) -> list[_Take]:
    """The tokens [start, length) of the pieces."""
    takes, at = [], 0
    for piece in pieces:
        if at >= length:
            break
        skip = max(start - at, 0)
        count = min(piece.length, length - at) - skip
        if count > 0:
            takes.append((piece, skip, at + skip - start, count))
        at += piece.length
    if at < length:
        raise ValueError(f"pieces for {at} tokens, {length} wanted")
    return takes


def _items(data: Bytes, part: LayerPart, count: int, rows: int | None = None) -> npt.NDArray[np.generic]:
    """A transposed part as a matrix of `count` items per row; `rows` None: all rows of the part."""
    items = data.view(f"V{part.item}" if part.item not in (1, 2, 4, 8) else f"u{part.item}")
    return items.reshape(part.rows if rows is None else rows, count)
