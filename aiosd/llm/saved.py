"""Contexts saved by name: files that outlive aiosd, one each, in a folder per privilege group.

    "AIOSCTX1" · header length u32 · header crc u32 · header · tokens (int32 each) · state

The header (msgpack) describes what must be equal for the state to be usable: the model's SHA-256, llama.cpp's version
and the parts of a token's state. The state is kept with a row per token, so that it fits with flash attention and
without. llama.cpp itself checks none of this. If anything differs, or a checksum does not match, the state is refused
and computed again from the messages, which every file has; only a file with a damaged header is an error.

A file gets its name only when all of it is on the disk: a full disk or a crash leaves the old file.
"""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import msgspec
import numpy as np

from aiosd.llm import modelfile
from aiosd.llm.arrays import Tokens
from aiosd.llm.blob import StateLayout, StatePiece
from libaios import wire

MAGIC = b"AIOSCTX1"
_LENGTHS = struct.Struct("<II")
_SUFFIX = ".ctx"
_CHUNK = 1 << 20


class Header(msgspec.Struct):
    fits: dict[str, Any]  # what must be equal for the state to be usable
    messages: list[dict[str, Any]]
    tokens: int
    tokens_crc: int
    state: int  # tokens whose state follows
    state_size: int
    state_crc: int
    created: float
    lora: str = ""  # the adapter that the state was computed with


@dataclass(frozen=True, slots=True)
class Opened:
    """The content of a file. `piece` None: there is no state, or it does not fit."""

    messages: list[dict[str, Any]]
    tokens: Tokens
    piece: StatePiece | None
    refused: str  # why the state is not used, '' if it is
    lora: str = ""


class Saved:
    def __init__(
        self,
        folder: str,
        fits: dict[str, Any],
        layout: StateLayout | None = None,
        adapters: Mapping[str, str] | None = None,
    ) -> None:
        """`layout`: of the context whose pieces are written and read; None: pieces are kept unchanged. `adapters`:
        by name, what must be equal for a state that was computed with the adapter."""
        self._adapters = adapters or {}
        self._folder = Path(folder)
        self._fits = fits
        self._layout = layout

    def path(self, scope: str, name: str) -> Path:
        return self._folder / (quote(scope, safe="") or "_") / (quote(name, safe=" ") + _SUFFIX)

    def write(
        self,
        scope: str,
        name: str,
        messages: list[dict[str, Any]],
        tokens: Tokens,
        piece: StatePiece | None,
        lora: str = "",
    ) -> wire.SavedContext:
        """Save a context. Raises OSError (ENOSPC, EDQUOT, …), and then leaves no part of a file behind."""
        path = self.path(scope, name)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _sweep(path.parent)
        created = time.time()
        if piece is not None and self._layout is not None:
            piece = self._layout.plain(piece)
        state = piece.data.data if piece is not None else memoryview(b"")
        ids = np.ascontiguousarray(tokens, np.int32).data.cast("B")
        header = msgspec.msgpack.encode(
            Header(
                self._fits | self._adapter(lora),
                messages,
                len(tokens),
                zlib.crc32(ids),
                piece.length if piece is not None else 0,
                len(state),
                zlib.crc32(state),
                created,
                lora,
            )
        )
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with open(partial, "wb") as file:
                for part in (MAGIC, _LENGTHS.pack(len(header), zlib.crc32(header)), header, ids, state):
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
                size = file.tell()
            os.replace(partial, path)
        except BaseException:  # of any kind, an interrupt too: undo, and raise it again
            partial.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
        return wire.SavedContext(name, len(tokens), size, created)

    def read(self, scope: str, name: str) -> Opened:
        """Read a context. Raises FileNotFoundError; OSError EIO with a sentence when the file is damaged."""
        path = self.path(scope, name)
        try:
            with open(path, "rb") as file:
                header = _header(file, name)
                data = file.read(4 * header.tokens)
                tokens = np.frombuffer(data, np.int32) if len(data) == 4 * header.tokens else np.zeros(0, np.int32)
                if len(tokens) != header.tokens or zlib.crc32(data) != header.tokens_crc:
                    return Opened(header.messages, np.zeros(0, np.int32), None, "its tokens are damaged", header.lora)
                piece, refused = self._state(file, header)
                return Opened(header.messages, tokens, piece, refused, header.lora)
        except FileNotFoundError:
            raise wire.error(errno.ENOENT, f"{name}: no such saved context") from None

    def _state(self, file: Any, header: Header) -> tuple[StatePiece | None, str]:
        if header.lora and header.lora not in self._adapters:
            return None, f"the adapter {header.lora!r} is not loaded"
        for what, mine in (self._fits | self._adapter(header.lora)).items():
            if header.fits.get(what) != mine:
                return None, f"it was saved under another {what}"
        if not header.state:
            return None, "it was saved without state"
        data = np.empty(header.state_size, np.uint8)
        if file.readinto(data.data) != header.state_size or zlib.crc32(data.data) != header.state_crc:
            return None, "its state is damaged"
        piece = StatePiece(data, header.state)
        return (self._layout.own(piece) if self._layout is not None else piece), ""

    def _adapter(self, lora: str) -> dict[str, Any]:
        return {"adapter": self._adapters[lora]} if lora else {}

    def list(self, scope: str) -> list[wire.SavedContext]:
        """All contexts of a scope, by name. Files that cannot be read are left out."""
        found = []
        for path in sorted(self.path(scope, "x").parent.glob("*" + _SUFFIX)):
            name = unquote(path.name.removesuffix(_SUFFIX))
            try:
                with open(path, "rb") as file:
                    header = _header(file, name)
                found.append(wire.SavedContext(name, header.tokens, path.stat().st_size, header.created))
            except OSError:
                continue
        return found

    def remove(self, scope: str, name: str) -> bool:
        """Remove a context. Returns whether there was one."""
        try:
            self.path(scope, name).unlink()
        except FileNotFoundError:
            return False
        return True


def _header(file: Any, name: str) -> Header:
    start = file.read(len(MAGIC) + _LENGTHS.size)
    if len(start) != len(MAGIC) + _LENGTHS.size or not start.startswith(MAGIC[:-1]):
        raise wire.error(errno.EIO, f"{name}: this is no saved context, or its beginning is damaged")
    if not start.startswith(MAGIC):
        raise wire.error(errno.EIO, f"{name}: saved by another release of aiosd, in a format this one cannot read")
    size, checksum = _LENGTHS.unpack(start[len(MAGIC) :])
    data = file.read(min(size, wire.MAX_FRAME))
    if len(data) != size or zlib.crc32(data) != checksum:
        raise wire.error(errno.EIO, f"{name}: the saved context is damaged")
    return msgspec.msgpack.decode(data, type=Header)


def _sweep(folder: Path) -> None:
    """Remove unfinished files of cores that died while they wrote."""
    for partial in folder.glob(f".*{_SUFFIX}.*"):
        pid = partial.name.rpartition(".")[2]
        if pid != str(os.getpid()) and not (pid.isdigit() and os.path.exists(f"/proc/{pid}")):
            partial.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """The new name must survive a power cut too."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def file_sha256(path: str) -> str:
    """The checksum of a GGUF with all its parts. May take seconds: not for the decoding thread."""
    digest = hashlib.sha256()
    for part in modelfile.parts(path):
        with open(part, "rb") as file:
            for chunk in iter(lambda: file.read(_CHUNK), b""):
                digest.update(chunk)
    return digest.hexdigest()
