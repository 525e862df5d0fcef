"""The state of a sequence as llama.cpp writes it, cut into pieces by tokens and put together again.

`llama_state_seq_get_data` gives one block for a whole sequence. Its layout, for a plain KV cache (read in
`llama-kv-cache.cpp`, `state_write`), with N cells and S streams, all little-endian:

    magic u32 · sequence i32 · streams u32
    for each stream: cells u32 (0 for all but one), and for that one
        N × (position i32, 1 u32, sequence i32)
        v_transposed u32 · layers u32
        for each layer  K: type i32, row bytes u64, N rows
        for each layer  V: the same, or, transposed: type i32, element bytes u32, elements u32, and for each
                        element N values

So what belongs to tokens [a, b) can be cut out, kept alone, and joined with others to a block that llama.cpp
takes as its own, bit for bit. A piece is one array: the parts (K of layer 0, …, V of the last) one after the
other, each as in the block. The stream header is not kept: a piece fits a context with any number of slots.

Pure numpy. Caches of another kind (recurrent, sliding window) have another layout: `Layout.of` returns None.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

_HEAD = struct.Struct("<IiI")
_CELL = np.dtype([("position", "<i4"), ("owners", "<u4"), ("sequence", "<i4")])


@dataclass(frozen=True, slots=True)
class Part:
    """K or V of one layer: a header, then a row per token (`rows` 0), or `rows` rows with an item per token."""

    header: bytes
    item: int  # bytes per token in a row
    rows: int  # 0: not transposed

    @property
    def per_token(self) -> int:
        return self.item * (self.rows or 1)


@dataclass(frozen=True, slots=True)
class Piece:
    """The state of `length` tokens."""

    data: Bytes
    length: int

    @property
    def size(self) -> int:
        return self.data.nbytes


class Layout:
    """Where what lies in a block, for one context."""

    def __init__(self, magic: int, streams: int, transposed: int, layers: int, parts: list[Part]) -> None:
        self._magic, self._streams = magic, streams
        self._middle = struct.pack("<II", transposed, layers)
        self._parts = parts
        self.bytes_per_token = sum(part.per_token for part in parts)
        self._fixed = _HEAD.size + 4 * streams + 8 + sum(len(part.header) for part in parts)

    @property
    def sizes(self) -> list[int]:
        """Bytes per token of each part: K of each layer, then V of each."""
        return [part.per_token for part in self._parts]

    @property
    def by_rows(self) -> bool:
        """Has every part a row per token?"""
        return not any(part.rows for part in self._parts)

    @property
    def description(self) -> list[list[int | str]]:
        """What two contexts must have in common for one to take the other's `plain` pieces: type and size of each part.
        Whether values are transposed, as they are without flash attention, does not matter."""
        return [[part.header[:4].hex(), part.per_token] for part in self._parts]

    @classmethod
    def of(cls, block: Bytes) -> Layout | None:
        """Learn it from a block of at least one token. None: this is no plain KV cache."""
        try:
            return cls._read(bytes(block))
        except (struct.error, ValueError):
            return None

    @classmethod
    def _read(cls, block: bytes) -> Layout:
        magic, _, streams = _HEAD.unpack_from(block, 0)
        at, cells = _HEAD.size, 0
        seen = 0
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
        if transposed > 1 or not 0 < layers <= 4096:
            raise ValueError("no plain KV cache")
        at += 8
        parts: list[Part] = []
        for _ in range(layers):
            part = Part(block[at : at + 12], struct.unpack_from("<Q", block, at + 4)[0], 0)
            parts.append(part)
            at += 12 + cells * part.per_token
        for _ in range(layers):
            if transposed:
                item, rows = struct.unpack_from("<II", block, at + 4)
                part = Part(block[at : at + 12], item, rows)
            else:
                part = Part(block[at : at + 12], struct.unpack_from("<Q", block, at + 4)[0], 0)
            parts.append(part)
            at += 12 + cells * part.per_token
        at += 4 * (streams - seen)
        layout = cls(magic, streams, transposed, layers, parts)
        if at != len(block) or layout.size(cells) != len(block):
            raise ValueError("something else lies in it")
        return layout

    def size(self, length: int) -> int:
        """Bytes of a block of so many tokens."""
        return self._fixed + length * (_CELL.itemsize + self.bytes_per_token)

    def cut(self, block: Bytes, sequence: int, length: int, start: int, stop: int, first: int = 0) -> Piece:
        """The piece for the tokens [start, stop) of a block that lay in `sequence`, where it held the tokens
        [first, length). Raises LookupError when some of them are not in it."""
        if start < first:
            raise LookupError(f"tokens from {start} on, but the block begins with {first}")
        length, start, stop = length - first, start - first, stop - first
        at = _HEAD.size + 4 * (sequence + 1)
        cells = block[at : at + length * _CELL.itemsize].view(_CELL)
        order = cells["position"] - first
        sorted_already = bool((order == np.arange(length, dtype=np.int32)).all())
        pick: slice | npt.NDArray[np.int64] = slice(start, stop) if sorted_already else np.argsort(order)[start:stop]
        at += cells.nbytes + 8
        count = stop - start
        data = np.empty(count * self.bytes_per_token, np.uint8)
        to = 0
        for part in self._parts:
            at += len(part.header)
            size, kept = length * part.per_token, count * part.per_token
            source, target = block[at : at + size], data[to : to + kept]
            if part.rows:
                _items(target, part, count)[:] = _items(source, part, length)[:, pick]
            else:
                target.reshape(count, part.item)[:] = source.reshape(length, part.item)[pick]
            at += size
            to += kept
        return Piece(data, count)

    def part_of(self, piece: Piece, start: int, stop: int) -> Piece:
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
        return Piece(data, count)

    def plain(self, piece: Piece) -> Piece:
        """The same state with a row per token in every part, however this context keeps it."""
        return self._turned(piece, plain=True)

    def own(self, piece: Piece) -> Piece:
        """A plain piece as this context keeps it."""
        return self._turned(piece, plain=False)

    def _turned(self, piece: Piece, plain: bool) -> Piece:
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
        return Piece(data, length)

    def merge(self, pieces: Sequence[Piece], length: int) -> Piece:
        """One piece of the first `length` tokens of several."""
        data = np.empty(length * self.bytes_per_token, np.uint8)
        to = offset = 0
        for part in self._parts:
            size = length * part.per_token
            self._gather(part, offset, _takes(pieces, length), data[to : to + size], length)
            to += size
            offset += part.per_token
        return Piece(data, length)

    def join(self, pieces: Sequence[Piece], sequence: int, length: int, out: Bytes, start: int = 0) -> Bytes:
        """A block of the tokens [start, length) of the pieces, for `sequence`, written into `out` (at least
        `size(length - start)` bytes); the part of `out` that it fills."""
        takes = _takes(pieces, length, start)
        length -= start
        block = out[: self.size(length)]
        self._write_head(block, sequence, length, start)
        at = _HEAD.size + 4 * (sequence + 1) + length * _CELL.itemsize + 8
        offset = 0  # of the part in a piece, in bytes per token
        for part in self._parts:
            block[at : at + len(part.header)] = np.frombuffer(part.header, np.uint8)
            at += len(part.header)
            target = block[at : at + length * part.per_token]
            self._gather(part, offset, takes, target, length)
            at += target.nbytes
            offset += part.per_token
        block[at:] = 0  # streams after this one: no cells
        return block

    @staticmethod
    def _gather(part: Part, offset: int, takes: list[_Take], target: Bytes, length: int) -> None:
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

    def _write_head(self, block: Bytes, sequence: int, length: int, start: int) -> None:
        counts = [0] * (sequence + 1)
        counts[sequence] = length
        head = _HEAD.pack(self._magic, sequence, self._streams) + struct.pack(f"<{sequence + 1}I", *counts)
        at = len(head)
        block[:at] = np.frombuffer(head, np.uint8)
        cells = block[at : at + length * _CELL.itemsize].view(_CELL)
        cells["position"] = np.arange(start, start + length)
        cells["owners"] = 1
        cells["sequence"] = sequence
        at += cells.nbytes
        block[at : at + 8] = np.frombuffer(self._middle, np.uint8)


#: A piece, how many of its tokens to skip, where the next ones go, and how many of them.
_Take = tuple[Piece, int, int, int]


def _takes(pieces: Sequence[Piece], length: int, start: int = 0) -> list[_Take]:
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


def _items(data: Bytes, part: Part, count: int, rows: int | None = None) -> npt.NDArray[np.generic]:
    """A transposed part as a matrix: `rows` rows (of the part, if nothing else is said) of `count` items."""
    items = data.view(f"V{part.item}" if part.item not in (1, 2, 4, 8) else f"u{part.item}")
    return items.reshape(part.rows if rows is None else rows, count)
